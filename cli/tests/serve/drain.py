"""Prints the values of all logs of a Logstore, one a line. Arguments: project, Logstore."""
import sys

from sdk import client, drain, say

it = client()
project, logstore = sys.argv[1:]
ids = [s['shardID'] for s in it.list_shards(project, logstore).get_shards_info()]
say('\n'.join(drain(it, project, logstore, ids)))
