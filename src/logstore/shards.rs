//! The shards of an open Logstore, and which of them takes which append.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use crate::{
    Error, Result,
    config::{LogstoreName, ShardInfo, ShardStatus},
    shard::{Shard, ShardChoice},
    sync::{LockRank, RwLock, read, write},
};

/// The shards at one moment. A split or a merge replaces it as a whole.
pub(crate) struct ShardTable {
    infos: Vec<ShardInfo>,
    shards: Vec<Arc<Shard>>,
    /// The first key and the number of each readwrite shard, by the keys. Their ranges cover all
    /// keys.
    writable: Vec<(u128, u32)>,
}

impl ShardTable {
    /// A table of these shards, by their numbers.
    fn new(infos: &[ShardInfo], shards: Vec<Arc<Shard>>) -> Self {
        let is_writable = |info: &&ShardInfo| info.status == ShardStatus::ReadWrite;
        let begin = |info: &ShardInfo| Some((info.range()?.0, info.id));
        let mut writable: Vec<_> = infos.iter().filter(is_writable).filter_map(begin).collect();
        writable.sort_unstable();
        Self { infos: infos.to_vec(), shards, writable }
    }

    pub(crate) fn shards(&self) -> &[Arc<Shard>] {
        &self.shards
    }

    /// The shard with this number.
    pub(crate) fn get(&self, shard: u32) -> Option<&Arc<Shard>> {
        self.shards.get(shard as usize)
    }

    /// The shard of an append. `turn` counts the appends without a choice.
    ///
    /// # Errors
    /// [`Error::ShardMissing`], [`Error::ShardReadOnly`].
    fn route(
        &self,
        logstore: &LogstoreName,
        choice: ShardChoice,
        turn: impl FnOnce() -> usize,
    ) -> Result<&Arc<Shard>> {
        let id = match choice {
            ShardChoice::Shard(id) => Some(id),
            ShardChoice::HashKey(key) => {
                let behind = self.writable.partition_point(|(begin, _)| *begin <= key);
                self.writable.get(behind.wrapping_sub(1)).map(|(_, id)| *id)
            }
            ShardChoice::RoundRobin => {
                self.writable.get(turn() % self.writable.len().max(1)).map(|(_, id)| *id)
            }
        };
        let missing = |shard| Error::ShardMissing { logstore: logstore.clone(), shard };
        let id = id.ok_or_else(|| missing(0))?;
        let shard = self.get(id).ok_or_else(|| missing(id))?;
        if self.infos[id as usize].status == ShardStatus::ReadOnly {
            let is_child = |info: &&ShardInfo| info.parents.contains(&id);
            let children = self.infos.iter().filter(is_child).map(|info| info.id).collect();
            return Err(Error::ShardReadOnly { logstore: logstore.clone(), shard: id, children });
        }
        Ok(shard)
    }
}

/// The table in force.
pub(super) struct Shards {
    table: RwLock<Arc<ShardTable>>,
    turns: AtomicUsize,
}

impl Shards {
    pub(super) fn new(infos: &[ShardInfo], shards: Vec<Arc<Shard>>) -> Self {
        let table = Arc::new(ShardTable::new(infos, shards));
        end_read_only(&table);
        Self { table: RwLock::new(LockRank::ShardTable, table), turns: AtomicUsize::new(0) }
    }

    pub(super) fn table(&self) -> Arc<ShardTable> {
        Arc::clone(&read(&self.table))
    }

    /// A table of these shards, with new ones from `create`. It is not in force yet.
    pub(super) fn changed(
        &self,
        infos: &[ShardInfo],
        create: impl Fn(u32) -> Arc<Shard>,
    ) -> Arc<ShardTable> {
        let now = self.table();
        let shard = |info: &ShardInfo| match now.get(info.id) {
            Some(shard) => Arc::clone(shard),
            None => create(info.id),
        };
        Arc::new(ShardTable::new(infos, infos.iter().map(shard).collect()))
    }

    /// Puts a table in force for the appends that choose their shard from now on.
    pub(super) fn put(&self, table: Arc<ShardTable>) {
        *write(&self.table) = table;
    }

    /// The shard of an append.
    ///
    /// # Errors
    /// [`Error::ShardMissing`], [`Error::ShardReadOnly`].
    pub(super) fn route(&self, logstore: &LogstoreName, choice: ShardChoice) -> Result<Arc<Shard>> {
        let turn = || self.turns.fetch_add(1, Ordering::Relaxed);
        self.table().route(logstore, choice, turn).cloned()
    }
}

/// Ends the followers of the read-only shards, once they have read everything.
pub(super) fn end_read_only(table: &ShardTable) {
    for (info, shard) in table.infos.iter().zip(&table.shards) {
        if info.status == ShardStatus::ReadOnly {
            shard.end();
        }
    }
}
