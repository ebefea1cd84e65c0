//! Which shards a group has something to read in.

use std::{collections::BTreeSet, time::Duration};

use envelog::Logstore;

use super::{Document, now_us};
use crate::{
    cursors::Cursors,
    error::Result,
    shards::{Shards, has_no_data},
};

/// After how long without a checkpoint the owner of a read-only shard is asked for one. The client
/// libraries save one a minute while there is data.
pub(super) const SILENCE: Duration = Duration::from_secs(90);

/// The shards of a group.
#[derive(Debug)]
pub(super) struct Readable {
    /// Those that are handed out: not those that are read-only and read to their ends, and in a group
    /// with order none whose parents are not. Clients would read a finished shard for ever.
    pub(super) shards: Vec<u32>,
    /// The read-only ones among them that had no checkpoint for longer than [`SILENCE`].
    pub(super) silent: BTreeSet<u32>,
}

impl Readable {
    /// Blocks for file I/O.
    ///
    /// # Errors
    /// The error of opening a segment of a read-only shard.
    pub(super) fn of(logstore: &Logstore, document: &Document) -> Result<Self> {
        let all = Shards::of(logstore)?;
        let cursors = Cursors::of(&logstore.config());
        let mut unfinished = BTreeSet::new();
        for &shard in all.ids().iter().filter(|shard| all.is_read_only(**shard)) {
            if !is_finished(logstore, document, cursors, shard)? {
                unfinished.insert(shard);
            }
        }
        let is_silent = |shard: &u32| {
            let updated_us = document.checkpoints.get(shard).map_or(0, |it| it.updated_us);
            u128::from(now_us().saturating_sub(updated_us)) > SILENCE.as_micros()
        };
        let waits = |shard: u32| {
            document.order && all.ancestors(shard).iter().any(|it| unfinished.contains(it))
        };
        let is_handed_out = |shard: &u32| {
            (!all.is_read_only(*shard) || unfinished.contains(shard)) && !waits(*shard)
        };
        Ok(Self {
            shards: all.ids().iter().copied().filter(is_handed_out).collect(),
            silent: unfinished.iter().copied().filter(is_silent).collect(),
        })
    }
}

/// Whether a group has read a read-only shard to its end. One without data has nothing to read.
fn is_finished(
    logstore: &Logstore,
    document: &Document,
    cursors: Cursors,
    shard: u32,
) -> Result<bool> {
    let checkpoint = document.checkpoints.get(&shard);
    let seq = checkpoint.and_then(|checkpoint| cursors.seq(&checkpoint.cursor));
    let end = logstore.end_seq(shard)?;
    Ok(seq.is_some_and(|seq| seq >= end) || has_no_data(logstore, shard)?)
}

/// The checkpoint of a shard for which the group has none: its begin if the group has read one of its
/// parents, and otherwise none. The service stores it at a split; it may have died before.
pub(super) fn begin(all: &Shards, shard: u32, document: &Document, cursors: Cursors) -> String {
    let has_read = |parent: &u32| document.checkpoints.contains_key(parent);
    match all.parents(shard).iter().any(has_read) {
        true => cursors.text(0),
        false => String::new(),
    }
}
