"""What the scripts of the tests share: a client of the unmodified SDK, which finds the service.

The SDK asks for the host PROJECT.sls.local. In this process such names resolve to the loopback address.
"""
import os
import socket
import sys
import threading

from aliyun.log import LogClient, LogException, LogItem, PutLogsRequest  # noqa: F401

HOST = 'sls.local'
REGION = 'cn-hangzhou'
_printing = threading.Lock()
_real = socket.getaddrinfo


def _resolve(host, *args, **more):
    name = host.decode() if isinstance(host, bytes) else host
    if isinstance(name, str) and (name == HOST or name.endswith('.' + HOST)):
        host = '127.0.0.1'
    return _real(host, *args, **more)


socket.getaddrinfo = _resolve


def endpoint():
    return 'http://%s:%s' % (HOST, os.environ['SERVE_PORT'])


def client(auth='v1'):
    return LogClient(endpoint(), 'tester', 'secret of tester', auth_version=auth, region='local')


def refused(call, status, code):
    """Checks that a call is refused with this status and code. Returns the message."""
    try:
        call()
    except LogException as error:
        got = (error.get_resp_status(), error.get_error_code())
        assert got == (status, code), '%s: %s' % (got, error.get_error_message())
        assert len(error.get_request_id()) == 24, error.get_request_id()
        return error.get_error_message()
    raise AssertionError('accepted, and not refused with %s %s' % (status, code))


def say(*words):
    """Prints a line. Lines of several threads do not mix."""
    with _printing:
        sys.stdout.write(' '.join(map(str, words)) + '\n')
        sys.stdout.flush()


def texts(groups):
    """The values of all logs of a list of groups."""
    out = []
    for group in groups.LogGroups:
        for log in group.Logs:
            for content in log.Contents:
                out.append(content.Value if isinstance(content.Value, str) else content.Value.decode())
    return out


def drain(it, project, logstore, shards, **more):
    """Reads all shards from their begin to their end. Returns the values of all logs."""
    out = []
    for shard in shards:
        cursor = it.get_begin_cursor(project, logstore, shard).get_cursor()
        while True:
            answer = it.pull_logs(project, logstore, shard, cursor, count=10, **more)
            groups = answer.get_loggroup_list()
            assert answer.get_loggroup_count() == len(groups.LogGroups)
            out += texts(groups)
            if answer.get_next_cursor() == cursor:
                break
            cursor = answer.get_next_cursor()
        assert cursor == it.get_end_cursor(project, logstore, shard).get_cursor()
    return out
