"""Two Logstores, one under a customer's key. Does what it is told on standard input, a word a line."""
import json
import sys
import time

from sdk import LogException, LogItem, PutLogsRequest, client, drain, say

it = client()
it.create_project('keys', '')
it.create_logstore('keys', 'mine', shard_count=1, encrypt_conf=json.loads(sys.argv[1]))
it.create_logstore('keys', 'other', shard_count=1, encrypt_conf={'enable': True, 'encrypt_type': 'default'})
say('ready')


def put(logstore, text):
    it.put_logs(PutLogsRequest('keys', logstore, '', '', [LogItem(int(time.time()), [('text', text)])]))


def outcome(call):
    try:
        call()
        return '200'
    except LogException as error:
        return '%s %s' % (error.get_resp_status(), error.get_error_code())


for line in sys.stdin:
    word = line.strip()
    mine = [outcome(lambda: put('mine', word)), outcome(lambda: drain(it, 'keys', 'mine', [0]))]
    put('other', word)
    say(json.dumps({'mine': mine, 'other': drain(it, 'keys', 'other', [0])}))
    if mine[1] == '200':
        say(json.dumps(drain(it, 'keys', 'mine', [0])))
    else:
        say('[]')
