"""Writes numbered logs from several threads, and prints each number when its log is acknowledged.
Goes on through failures, until standard input ends."""
import sys
import threading
import time

from sdk import LogException, LogItem, PutLogsRequest, client, say

THREADS, LOGS = 8, 5
stop = threading.Event()


def produce(thread):
    it, number = client('v4' if thread % 2 else 'v1'), 0
    while not stop.is_set():
        ids = ['%d.%d' % (thread, number + i) for i in range(LOGS)]
        number += LOGS
        items = [LogItem(int(time.time()), [('id', it_id)]) for it_id in ids]
        try:
            it.put_logs(PutLogsRequest('crash', 'logs', '', '', items))
        except LogException:
            time.sleep(0.1)
            continue
        say(*ids)


threads = [threading.Thread(target=produce, args=(n,)) for n in range(THREADS)]
for thread in threads:
    thread.start()
sys.stdin.read()
stop.set()
for thread in threads:
    thread.join()
