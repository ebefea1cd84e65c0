"""The life of a project and a Logstore, by both signatures. Arguments: encrypt_conf as JSON."""
import json
import sys
import time

from aliyun.log import GetHistogramsRequest, GetLogsRequest
from sdk import LogItem, PutLogsRequest, client, drain, refused, say

conf = json.loads(sys.argv[1])


def live(auth):
    it = client(auth)
    project, logstore = 'life-' + auth, 'logs'
    it.create_project(project, 'a life')
    assert it.get_project(project).get_description() == 'a life'
    assert project in [p['projectName'] for p in it.list_project().get_projects()]
    refused(lambda: it.create_project(project, ''), 400, 'ProjectAlreadyExist')

    it.create_logstore(project, logstore, ttl=3, shard_count=3, encrypt_conf=conf)
    got = it.get_logstore(project, logstore)
    assert (got.get_ttl(), got.get_shard_count()) == (3, 3)
    assert got.get_encrypt_conf() == conf, got.get_encrypt_conf()
    refused(lambda: it.create_logstore(project, logstore), 400, 'LogStoreAlreadyExist')
    # Without encrypt_conf an update would say that there is none any more.
    why = refused(lambda: it.update_logstore(project, logstore, ttl=9), 400, 'ParameterInvalid')
    assert 'encrypt_conf' in why, why
    for other in (dict(conf, encrypt_type='default' if conf['encrypt_type'] == 'sm4' else 'sm4'),
                  dict(conf, user_cmk_info={'cmk_key_id': 'other', 'arn': 'acs:ram::13234:role/logsource', 'region_id': 'r'})):
        refused(lambda: it.update_logstore(project, logstore, encrypt_conf=other), 400, 'ParameterInvalid')
    assert it.get_logstore(project, logstore).get_ttl() == 3
    it.update_logstore(project, logstore, ttl=3650, encrypt_conf=conf)
    assert it.get_logstore(project, logstore).get_ttl() == 3650

    shards = it.list_shards(project, logstore).get_shards_info()
    assert [s['shardID'] for s in shards] == [0, 1, 2]
    now, wanted = int(time.time()), []

    def put(text, **more):
        wanted.append(text)
        it.put_logs(PutLogsRequest(project, logstore, 'topic', 'source', [LogItem(now, [('text', text)])], **more))
    put('compressed ' * 100)
    put('plain', compress=False)
    put('\u4e16\u754c')
    for shard in shards:
        put('routed %d' % shard['shardID'], hashKey=shard['inclusiveBeginKey'])
    ids = [s['shardID'] for s in shards]
    for more in ({}, {'compress': False}):
        assert sorted(drain(it, project, logstore, ids, **more)) == sorted(wanted)
    for shard in shards:
        assert 'routed %d' % shard['shardID'] in drain(it, project, logstore, [shard['shardID']])

    begin = it.get_begin_cursor(project, logstore, 0).get_cursor()
    assert abs(int(it.get_cursor_time(project, logstore, 0, begin).get_cursor_time()) - now) < 60
    assert it.get_cursor(project, logstore, 0, now - 3600).get_cursor() == begin
    it.get_previous_cursor_time(project, logstore, 0, it.get_end_cursor(project, logstore, 0).get_cursor())
    refused(lambda: it.pull_logs(project, logstore, 0, 'bad!'), 400, 'ParameterInvalid')
    refused(lambda: it.get_begin_cursor(project, logstore, 3), 400, 'ShardNotExist')
    refused(lambda: it.split_shard(project, logstore, 0, 'f' * 32), 400, 'ParameterInvalid')

    found = it.get_logs(GetLogsRequest(project, logstore, now - 60, now + 60, query='routed and not 1'))
    assert found.is_completed() and found.get_count() == 2, found.get_count()
    assert sorted(log.get_contents()['text'] for log in found.get_logs()) == ['routed 0', 'routed 2']
    histograms = it.get_histograms(GetHistogramsRequest(project, logstore, now - 60, now + 60, query='routed'))
    assert histograms.is_completed() and histograms.get_total_count() == 3
    refused(lambda: it.get_log(project, logstore, now - 60, now, query='* | select 1'), 400, 'ParameterInvalid')

    it.update_logstore(project, logstore, encrypt_conf=dict(conf, enable=False))
    put('in the clear')
    assert sorted(drain(it, project, logstore, ids)) == sorted(wanted)
    it.delete_logstore(project, logstore)
    refused(lambda: it.get_logstore(project, logstore), 404, 'LogStoreNotExist')
    it.delete_project(project)
    refused(lambda: it.get_project(project), 404, 'ProjectNotExist')


for version in ('v1', 'v4'):
    live(version)
say('done')
