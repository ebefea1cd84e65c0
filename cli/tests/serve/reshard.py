"""Splits or merges shards, and checks the answers and the refusals. Arguments: project, Logstore, and
`split SHARD` or `merge SHARD`. Prints the numbers of the new shards."""
import sys

from sdk import client, refused, say

project, logstore, action, shard = sys.argv[1:]
it, shard = client('v4'), int(shard)
before = {info['shardID']: info for info in it.list_shards(project, logstore).get_shards_info()}
refused(lambda: it.split_shard(project, logstore, 99, '8' * 32), 400, 'ParameterInvalid')
refused(lambda: it.split_shard(project, logstore, shard, 'x'), 400, 'ParameterInvalid')
outside = before[shard]['inclusiveBeginKey']
refused(lambda: it.split_shard(project, logstore, shard, outside), 400, 'ParameterInvalid')
last = max(before.values(), key=lambda info: info['exclusiveEndKey'])['shardID']
refused(lambda: it.merge_shard(project, logstore, last), 400, 'ParameterInvalid')
if action == 'split':
    begin, end = (int(before[shard][key], 16) for key in ('inclusiveBeginKey', 'exclusiveEndKey'))
    key = '%032x' % ((begin + end) // 2)
    answer = it.split_shard(project, logstore, shard, key).get_shards_info()
    parents, children = answer[:1], answer[1:]
    assert [child['inclusiveBeginKey'] for child in children] == [before[shard]['inclusiveBeginKey'], key], answer
    assert [child['exclusiveEndKey'] for child in children] == [key, before[shard]['exclusiveEndKey']], answer
else:
    answer = it.merge_shard(project, logstore, shard).get_shards_info()
    children, parents = answer[:1], answer[1:]
    assert parents[0]['exclusiveEndKey'] == parents[1]['inclusiveBeginKey'], answer
assert parents[0]['shardID'] == shard, answer
assert {info['status'] for info in parents} == {'readonly'}, answer
assert {info['status'] for info in children} == {'readwrite'}, answer
assert all(info['createTime'] > 0 for info in answer), answer
now = {info['shardID']: info for info in it.list_shards(project, logstore).get_shards_info()}
assert all(now[info['shardID']] == info for info in answer), (now, answer)
refused(lambda: it.split_shard(project, logstore, shard, '8' * 32), 400, 'ParameterInvalid')
say(*[info['shardID'] for info in children])
