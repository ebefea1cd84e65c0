//! Splitting and merging shards.

use serde::Serialize;

use super::{catalogue::STORE_SHARDS_MAX, core::Core};
use crate::{
    Error, Result,
    config::{LogstoreConfig, LogstoreName, Resharding, SHARDS_MAX, ShardInfo, ShardStatus},
    crypto::SecretKey,
    logstore::{LogstoreShared, Meta},
};

/// A shard that was split, from [`Store::split_shard`](crate::Store::split_shard).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ShardSplit {
    /// The shard, which is read-only now.
    pub parent: ShardInfo,
    /// The new shard with the keys below the key of the split.
    pub low: ShardInfo,
    /// The new shard with the key of the split and those above it.
    pub high: ShardInfo,
}

/// Two shards that were merged, from [`Store::merge_shards`](crate::Store::merge_shards).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ShardMerge {
    /// The new shard with the keys of both.
    pub merged: ShardInfo,
    /// The shard with the lower keys, which is read-only now.
    pub left: ShardInfo,
    /// The shard with the higher keys, which is read-only now.
    pub right: ShardInfo,
}

/// Splits a shard at a hash key, or in the middle.
pub(super) fn split(
    core: &Core,
    name: &LogstoreName,
    shard: u32,
    at: Option<u128>,
) -> Result<ShardSplit> {
    let changed = change(core, name, shard, 2, |shards, now_s| {
        Ok(Resharding::split(shards, shard, at, now_s)?)
    })?;
    match &changed[..] {
        [parent, low, high] => {
            Ok(ShardSplit { parent: parent.clone(), low: low.clone(), high: high.clone() })
        }
        _ => Err(Error::ShardMissing { logstore: name.clone(), shard }),
    }
}

/// Merges a shard with its neighbour on the right.
pub(super) fn merge(core: &Core, name: &LogstoreName, shard: u32) -> Result<ShardMerge> {
    let changed =
        change(core, name, shard, 1, |shards, now_s| Ok(Resharding::merge(shards, shard, now_s)?))?;
    match &changed[..] {
        [left, right, merged] => {
            Ok(ShardMerge { merged: merged.clone(), left: left.clone(), right: right.clone() })
        }
        _ => Err(Error::ShardMissing { logstore: name.clone(), shard }),
    }
}

/// Changes the shards of a Logstore. Returns the parents and the children, each by their ranges.
fn change(
    core: &Core,
    name: &LogstoreName,
    shard: u32,
    added: usize,
    plan: impl FnOnce(&[ShardInfo], u64) -> Result<Resharding>,
) -> Result<Vec<ShardInfo>> {
    let one = core.registry.administer_logstore(name)?;
    let logstore = one.logstore()?;
    let mut meta = logstore.meta();
    check_writable(&meta.config, shard)?;
    check_room(core, &meta.config, added)?;
    let now_s = core.env.clock.wall_us() / 1_000_000;
    let change = plan(&meta.config.shards, now_s)?;
    meta.config = meta.config.resharded(change.shards.clone(), now_s);
    let data_key = add_to_keys(&logstore, &mut meta, added);
    let data_key = data_key.map_err(|error| core.registry.cause(&logstore, error))?;
    one.reshard(&logstore, meta, &change, data_key.as_ref())?;
    let ids = change.parents.iter().chain(&change.children);
    Ok(ids.filter_map(|id| change.shards.get(*id as usize).cloned()).collect())
}

/// # Errors
/// [`Error::ShardMissing`], [`Error::ShardReadOnly`].
fn check_writable(config: &LogstoreConfig, shard: u32) -> Result<()> {
    let logstore = config.name.clone();
    match config.shards.get(shard as usize).map(|info| info.status) {
        None => Err(Error::ShardMissing { logstore, shard }),
        Some(ShardStatus::ReadWrite) => Ok(()),
        Some(ShardStatus::ReadOnly) => {
            Err(Error::ShardReadOnly { logstore, shard, children: config.children(shard) })
        }
    }
}

/// Checks that the Logstore and the store have room for more shards. Read-only shards count: their
/// numbers are not used again.
fn check_room(core: &Core, config: &LogstoreConfig, added: usize) -> Result<()> {
    if config.shards.len() + added > SHARDS_MAX as usize {
        let what = "shards of a Logstore, with those that were split or merged";
        return Err(Error::TooMany { what, limit: SHARDS_MAX.into() });
    }
    let catalogue = core.registry.catalogue();
    let shards: usize = catalogue.logstores.values().map(|entry| entry.shards.len()).sum();
    if shards + added > STORE_SHARDS_MAX {
        let limit = STORE_SHARDS_MAX as u64;
        return Err(Error::TooMany { what: "shards of all Logstores", limit });
    }
    Ok(())
}

/// Adds shards to the keys section: the current data key owns all their segments. Returns the data
/// key of a customer that authenticates the section. Calls the KMS if there is one.
fn add_to_keys(
    logstore: &LogstoreShared,
    meta: &mut Meta,
    added: usize,
) -> Result<Option<SecretKey>> {
    let Some(section) = &mut meta.keys else { return Ok(None) };
    section.add_shards(added);
    if section.cmk.is_none() {
        return Ok(None);
    }
    logstore.gate.admit()?;
    logstore.gate.unwrap(section.current).map(Some)
}
