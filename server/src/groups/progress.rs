//! How far the consumer groups of a Logstore have come, for the console.

use super::{Groups, timeout_of};

/// A consumer group.
#[derive(Debug)]
pub(crate) struct GroupProgress {
    pub(crate) name: String,
    pub(crate) timeout_s: f64,
    pub(crate) order: bool,
    /// The number of live consumers.
    pub(crate) consumers: usize,
    pub(crate) shards: Vec<ShardProgress>,
}

/// A shard, as a consumer group reads it.
#[derive(Debug)]
pub(crate) struct ShardProgress {
    pub(crate) shard: u32,
    /// The consumer that reads it.
    pub(crate) owner: Option<String>,
    pub(crate) checkpoint: Option<String>,
    /// When the checkpoint was set, in microseconds since the Unix epoch.
    pub(crate) updated_us: Option<u64>,
}

impl Groups {
    /// The groups of the Logstore with this id, by name, with these shards of it.
    pub(crate) fn progress(&self, logstore: &str, shards: &[u32]) -> Vec<GroupProgress> {
        let now = self.now();
        let of_group = |group: std::sync::Arc<super::Group>| {
            let document = group.document();
            let mut assignment = group.assignment();
            assignment.expire(now, timeout_of(&document));
            let of_shard = |shard: &u32| {
                let checkpoint = document.checkpoints.get(shard);
                ShardProgress {
                    shard: *shard,
                    owner: assignment.owner(*shard).map(str::to_owned),
                    checkpoint: checkpoint.map(|it| it.cursor.clone()),
                    updated_us: checkpoint.map(|it| it.updated_us),
                }
            };
            GroupProgress {
                shards: shards.iter().map(of_shard).collect(),
                name: document.name.clone(),
                timeout_s: document.timeout_s,
                order: document.order,
                consumers: assignment.consumers(),
            }
        };
        self.list(logstore).into_iter().map(of_group).collect()
    }
}
