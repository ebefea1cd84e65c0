"""Writes numbered logs by hash key, each key from a thread of its own, and prints each number when its
log is acknowledged. Goes on through failures, until standard input ends. Arguments: project, Logstore."""
import sys
import threading
import time

from sdk import LogException, LogItem, PutLogsRequest, client, say

KEYS = 8
project, logstore = sys.argv[1:]
stop = threading.Event()


def produce(key):
    it, number = client(), 0
    hash_key = '%02x' % (key * 256 // KEYS) + '7' * 30
    while not stop.is_set():
        item = LogItem(int(time.time()), [('id', '%d.%d' % (key, number))])
        try:
            it.put_logs(PutLogsRequest(project, logstore, '', '', [item], hashKey=hash_key))
        except LogException:
            # It may be stored. The next one has another number.
            time.sleep(0.1)
        else:
            say('%d.%d' % (key, number))
        number += 1
        time.sleep(0.02)


threads = [threading.Thread(target=produce, args=(n,)) for n in range(KEYS)]
for thread in threads:
    thread.start()
sys.stdin.read()
stop.set()
for thread in threads:
    thread.join()
