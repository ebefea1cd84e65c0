//! Puts a split or a merge of shards in force.
//!
//! The children get their appends before the change is in force, and their writers are paused until
//! it is: so no append waits longer than for a new data key, and none goes to a parent that is
//! written to its end. The commit is one new catalogue file, which names the new metadata, the ends
//! of the parents, and the children.

use std::{io::ErrorKind, sync::Arc};

use super::{LogstoreAdministration, Registry};
use crate::{
    Error, Result,
    config::Resharding,
    crypto::SecretKey,
    io::FileKind,
    logstore::{LogstoreShared, Meta, ShardTable, shard_dir},
    shard::{Paused, Shard},
    store::catalogue::Change,
};

impl LogstoreAdministration<'_> {
    /// Puts metadata with changed shards in force. `data_key` is the current data key of a
    /// customer. Blocks for what the parents have accepted to be written and synced, which may call
    /// the KMS.
    ///
    /// # Errors
    /// As [`LogstoreAdministration::replace_meta`]. Nothing has changed then; the groups that the
    /// children were handed over meanwhile have failed.
    pub(crate) fn reshard(
        &self,
        logstore: &Arc<LogstoreShared>,
        meta: Meta,
        change: &Resharding,
        data_key: Option<&SecretKey>,
    ) -> Result<()> {
        let before = logstore.table();
        let after = logstore.changed_table(&meta.config.shards, &[]);
        let of = |table: &ShardTable, ids: &[u32]| -> Vec<Arc<Shard>> {
            ids.iter().filter_map(|id| table.get(*id).cloned()).collect()
        };
        let (parents, children) = (of(&before, &change.parents), of(&after, &change.children));
        // Most of the queue is written while the parents still take appends.
        parents.iter().try_for_each(|parent| parent.sync())?;
        let held = children.iter().map(|child| child.pause()).collect::<Result<Vec<_>>>()?;
        logstore.put_table(Arc::clone(&after));
        parents.iter().for_each(|parent| parent.retire());
        let done = parents
            .iter()
            .map(|parent| parent.pause_at_end())
            .collect::<Result<Vec<_>>>()
            .and_then(|ended| self.commit_shards(logstore, meta, change, data_key, &ended));
        if let Err(error) = done {
            logstore.put_table(before);
            parents.iter().for_each(|parent| parent.reinstate());
            for child in &children {
                child.retire();
                child.refuse_handed_over(&error);
            }
            return Err(self.registry.cause(logstore, error));
        }
        drop(held);
        logstore.end_read_only(&after);
        Ok(())
    }

    /// Writes the files of the change, and commits it. The parents are paused at their ends.
    fn commit_shards(
        &self,
        logstore: &Arc<LogstoreShared>,
        mut meta: Meta,
        change: &Resharding,
        data_key: Option<&SecretKey>,
        ended: &[Paused<'_>],
    ) -> Result<()> {
        let registry = self.registry;
        let mut changes = Vec::new();
        for parent in ended {
            let head = parent.last_head()?;
            changes.extend(
                head.map(|head| {
                    Change::reached(&logstore.name, logstore.id, parent.shard_id(), head)
                }),
            );
        }
        let mut admin = registry.administer()?;
        admin.unlatch()?;
        admin.check_exists(logstore)?;
        for child in &change.children {
            make_shard_dir(registry, logstore, *child)?;
        }
        // A rotation of the service key may have authenticated the metadata since.
        meta.generation = logstore.generation();
        // The directories of the children are durable with the metadata.
        let saved = admin.save_meta(logstore, meta, data_key)?;
        changes.push(saved.change());
        let committed = admin.commit_shards(logstore, changes, change.children.len());
        committed.inspect_err(|error| {
            if admin.latched().is_some() {
                // The catalogue names the new metadata or the old one, and with the new one the
                // parents grow no more.
                logstore.gate.halt(error);
            }
        })?;
        let keyring_version = registry.keys.keyring().newest();
        // The keys stay, so there are no leases to hear of.
        drop(saved.take_effect(&*registry.env.disk, keyring_version));
        ended.iter().for_each(Paused::note_head);
        Ok(())
    }
}

/// Makes the directory of a new shard. An interrupted split may have left it.
fn make_shard_dir(registry: &Registry, logstore: &LogstoreShared, shard: u32) -> Result<()> {
    let (disk, dir) = (&*registry.env.disk, shard_dir(&logstore.dir, shard));
    match disk.create_dir(&dir) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            let stat = disk.stat(&dir).map_err(Error::io("look for", &dir))?;
            match stat.map(|stat| stat.kind) {
                Some(FileKind::Directory) => Ok(()),
                _ => Err(Error::io("create", &dir)(error)),
            }
        }
        made => made.map_err(Error::io("create", &dir)),
    }
}
