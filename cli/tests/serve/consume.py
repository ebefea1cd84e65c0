"""A worker of the SDK's consumer library. Arguments: project, Logstore, group, name. Prints what happens
to it, and stops when standard input ends."""
import logging
import sys
import time

from aliyun.log.consumer import ConsumerProcessorBase, ConsumerWorker, CursorPosition, LogHubConfig
from sdk import endpoint, say, texts

logging.basicConfig(level=logging.ERROR, stream=sys.stderr)
project, logstore, group, name = sys.argv[1:]


class Processor(ConsumerProcessorBase):
    def initialize(self, shard):
        super().initialize(shard)
        say('begin', shard)

    def process(self, groups, tracker):
        for text in texts(groups):
            say('log', text, time.monotonic_ns())
        tracker.save_check_point(True)

    def shutdown(self, tracker):
        super().shutdown(tracker)
        say('end', self.shard_id)


options = LogHubConfig(endpoint(), 'tester', 'secret of tester', project, logstore, group, name,
                       cursor_position=CursorPosition.BEGIN_CURSOR, heartbeat_interval=2,
                       data_fetch_interval=0.2, in_order=True)
worker = ConsumerWorker(Processor, options)
worker.start()
say('started')
sys.stdin.read()
worker.shutdown()
worker.join()
say('stopped')
