"""Creates a project with one Logstore. Arguments: project, Logstore, number of shards."""
import sys

from sdk import client, say

it = client()
project, logstore, shards = sys.argv[1:]
it.create_project(project, '')
it.create_logstore(project, logstore, shard_count=int(shards), encrypt_conf={'enable': True, 'encrypt_type': 'default'})
say('done')
