//! The loss of a shard's key: sealing under the keys in memory, and the deadline for that.
//!
//! A shard that is not sealed at the deadline *expires*. Its key and its queue are wiped at once
//! ([`Shard::expire`]). Its segment is then as after a crash: it has no footer, and the next append
//! recovers the shard. Blocks that were written stay.
//!
//! A thread may hold the shard at the deadline, in a system call that does not return:
//!
//! - in an fsync of the active segment. No thread holds the lock of the writer across that
//!   ([`Locked::sync`]). So the segment is abandoned at once, and its leader is deposed: another
//!   thread may lead, recover the shard and begin a segment. When the fsync returns, its thread
//!   finds that the active segment is not its own any more, and changes nothing.
//! - in any other system call. The thread has the lock of the writer. When it gives the lock back,
//!   it abandons the segment ([`Shard::finish_expiry`]). An append waits for that lock until then.

use std::{
    ops::{Deref, DerefMut},
    sync::Arc,
    time::Duration,
};

use tracing::warn;

use super::{
    Shard,
    commit::{Dropped, LostGroups, Pending},
    leader::Leading,
    writer::{KeyUse, SegmentWriter, Unsynced},
};
use crate::{
    Error, Result,
    config::LogstoreName,
    crypto::wipe_shared,
    ids::LogstoreId,
    keys::sealing::LostShard,
    sync::{MutexGuard, atomic::Ordering, lock, try_lock},
};

/// Records the acknowledged groups of a shard that were lost with their key.
pub(crate) trait RecordLostGroups: Send + Sync {
    /// Blocks for I/O.
    fn lost_groups(&self, logstore: (&LogstoreName, LogstoreId), shard: u32, lost: LostGroups);
}

/// A shard that has lost its key.
pub(crate) struct ShardLoss {
    pub(crate) shard: Arc<Shard>,
    /// Which loss of the key it is.
    pub(crate) loss: u64,
    /// The error of appends that were not acknowledged.
    pub(crate) error: Error,
}

impl LostShard for ShardLoss {
    fn write(&self, patience: Duration) -> bool {
        self.with_writer(patience, |_| {})
    }

    fn seal(&self, patience: Duration) -> bool {
        let shard = &*self.shard;
        self.with_writer(patience, |writer| {
            // A failure latches the shard, and the next caller gets the error.
            let _ = shard.seal(writer, KeyUse::Held);
            writer.wipe();
            if !writer.is_deposed() && shard.gate().is_lost() {
                shard.account(shard.commit().lose_queue(self.loss, &self.error));
            }
        })
    }

    fn expire(&self) {
        self.shard.expire(self.loss, &self.error);
    }

    fn record(&self) {
        self.shard.record_lost(self.loss);
    }
}

impl ShardLoss {
    /// Writes the acknowledged groups, and calls `act`, unless a segment was begun after the loss
    /// or the deadline has passed. `false` if another thread has the shard for longer than
    /// `patience`.
    fn with_writer(&self, patience: Duration, act: impl FnOnce(&mut Locked<'_>)) -> bool {
        let shard = &*self.shard;
        let Some((_leading, mut writer)) = shard.lead_within(patience) else { return false };
        let commit = shard.commit();
        if !commit.has_begun_after(self.loss) && !commit.has_expired() {
            shard.write_acknowledged(&mut writer, &self.error);
            act(&mut writer);
        }
        true
    }
}

/// The acknowledged groups that were lost.
#[derive(Default)]
pub(super) struct Lost {
    /// Those that are not on record.
    groups: LostGroups,
    /// The last loss of the key that is on record. Groups that are found lost later are recorded at
    /// once.
    recorded: u64,
    /// Those that no caller knows of, and the error of their loss.
    unreported: Option<(LostGroups, Error)>,
}

/// The writer of a shard, locked. Whichever thread takes or gives back the lock also does the rest
/// of an expiry that is due.
pub(super) struct Locked<'a> {
    shard: &'a Shard,
    /// `None` during a sync only.
    writer: Option<MutexGuard<'a, SegmentWriter>>,
    deposed: bool,
}

const LOCKED: &str = "the writer is locked but for a sync";

impl Deref for Locked<'_> {
    type Target = SegmentWriter;

    fn deref(&self) -> &SegmentWriter {
        self.writer.as_ref().expect(LOCKED)
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut SegmentWriter {
        self.writer.as_mut().expect(LOCKED)
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        self.unlock();
    }
}

impl<'a> Locked<'a> {
    fn new(shard: &'a Shard, mut writer: MutexGuard<'a, SegmentWriter>) -> Self {
        shard.finish_expiry(&mut writer);
        Self { shard, writer: Some(writer), deposed: false }
    }

    fn unlock(&mut self) {
        if self.writer.take().is_some()
            && self.shard.commit().writer_is_free().is_some()
            && let Some(writer) = try_lock(&self.shard.writer)
        {
            drop(Self::new(self.shard, writer));
        }
    }

    /// Syncs the active segment, without the lock meanwhile. The caller leads, so no other thread
    /// writes to the segment.
    ///
    /// # Errors
    /// The error of the disk. The error of the loss, if the shard has expired meanwhile: then the
    /// caller is deposed ([`Locked::is_deposed`]), and the writer is not its own any more.
    pub(super) fn sync(&mut self, unsynced: &Unsynced) -> Result<()> {
        self.set_syncing(true);
        self.unlock();
        let synced = unsynced.sync(&self.shard.env);
        let mut writer = lock(&self.shard.writer);
        self.shard.finish_expiry(&mut writer);
        let writer = self.writer.insert(writer);
        if writer.segment() == Some(unsynced.segment) {
            writer.set_syncing(false);
            return synced;
        }
        self.deposed = true;
        let error = self.shard.commit().expiry_error();
        Err(error.unwrap_or(Error::Closed("the active segment")))
    }

    /// Whether the segment that the caller wrote was abandoned during [`Locked::sync`].
    pub(super) fn is_deposed(&self) -> bool {
        self.deposed
    }
}

impl Shard {
    /// Takes the writer. Waits for the thread that has it.
    pub(super) fn writer(&self) -> Locked<'_> {
        Locked::new(self, lock(&self.writer))
    }

    /// Takes the writer if the next block can be written, or is refused, without waiting for a KMS
    /// or for a thread that may call one. The caller leads.
    pub(super) fn writer_at_once(&self) -> Option<Locked<'_>> {
        let mut writer = Locked::new(self, try_lock(&self.writer)?);
        let gate = self.gate();
        let next_us = self.commit().next_time_us().unwrap_or(u64::MAX);
        let mut ready =
            || writer.takes_another_block(next_us) || gate.has_key(self.env.plan().key_source);
        (gate.decides_or_asks() && (gate.is_lost() || ready())).then_some(writer)
    }

    /// Takes the leadership and the writer, unless another thread has one of them for longer than
    /// `patience`.
    pub(super) fn lead_within(&self, patience: Duration) -> Option<(Leading<'_>, Locked<'_>)> {
        let leading = Leading::new(self, self.commit().lead_within(patience)?);
        let writer = try_lock(&self.writer).or_else(|| {
            if patience.is_zero() {
                return None;
            }
            let seen = self.commit().want_writer();
            let writer = try_lock(&self.writer);
            self.commit().await_writer(seen, writer.is_none().then_some(patience));
            writer.or_else(|| try_lock(&self.writer))
        });
        Some((leading, Locked::new(self, writer?)))
    }

    /// Writes the acknowledged groups of the queue with the key in memory. All others fail, and no
    /// group is accepted any more. Groups stay in the queue if no segment is open, or if the open
    /// one was begun under older settings: encryption may have been turned on since.
    pub(super) fn write_acknowledged(&self, writer: &mut Locked<'_>, error: &Error) {
        self.commit().suspend();
        self.refuse(Vec::new(), error);
        while writer.is_as_planned()
            && let Some(batch) = self.commit().take_batch()
        {
            // A failure latches the shard, which empties the queue.
            let _ = self.write_run(writer, vec![batch], KeyUse::Held);
        }
    }

    /// The deadline of a loss has passed, and the shard is not sealed. Wipes the key of the
    /// segment, the queue, and the buffers of the writer unless a thread is using them.
    fn expire(&self, loss: u64, error: &Error) {
        if self.commit().has_begun_after(loss) {
            return;
        }
        self.gate().end_segments_before(loss, self.id());
        self.account(self.commit().expire(loss, error));
        // If a thread has the writer, that thread finishes the expiry when it gives the writer
        // back.
        drop(try_lock(&self.writer).map(|writer| Locked::new(self, writer)));
    }

    /// Does the rest of an expiry, if one is due: abandons the segment, and deposes a leader that
    /// is syncing it.
    fn finish_expiry(&self, writer: &mut SegmentWriter) {
        let Some(loss) = self.commit().unfinished_expiry() else { return };
        writer.wipe();
        let ends = writer.begun_after().is_some_and(|losses| losses < loss);
        let deposes = ends && writer.is_syncing();
        if ends && writer.abandon() {
            self.list.abandon_active();
            let (logstore, shard) = (self.name(), self.id());
            warn!(%logstore, shard, "key wiped before the segment was sealed");
        }
        self.account(self.commit().finish_expiry(deposes));
    }

    /// Wipes groups that are not written, and returns their part of the budget. Counts those that
    /// were acknowledged, and records them if the record of the loss is written already.
    pub(super) fn account(&self, dropped: Dropped) {
        let Dropped { groups, loss, error, freed, lost } = dropped;
        groups.into_iter().for_each(wipe_shared);
        self.context.budget.release(freed);
        if lost.groups == 0 {
            return;
        }
        self.env.counters().groups_lost.fetch_add(lost.groups, Ordering::Relaxed);
        let is_recorded = {
            let mut all = lock(&self.lost);
            all.groups.merge(lost);
            if let Some(error) = error {
                all.unreported.get_or_insert((LostGroups::default(), error)).0.merge(lost);
            }
            all.recorded >= loss
        };
        if is_recorded {
            self.record_lost(loss);
        }
    }

    /// Reports acknowledged groups that were lost, once.
    ///
    /// # Errors
    /// [`Error::GroupsLost`].
    pub(crate) fn report_lost(&self) -> Result<()> {
        let Some((lost, error)) = lock(&self.lost).unreported.take() else { return Ok(()) };
        let LostGroups { groups, first_seq, last_seq } = lost;
        let (logstore, shard, cause) = (self.name().clone(), self.id(), Arc::new(error));
        Err(Error::GroupsLost { logstore, shard, groups, first_seq, last_seq, cause })
    }

    /// The record of the loss is written. Records the groups that were lost with the key.
    fn record_lost(&self, loss: u64) {
        let lost = {
            let mut lost = lock(&self.lost);
            lost.recorded = lost.recorded.max(loss);
            std::mem::take(&mut lost.groups)
        };
        let gate = self.gate();
        if lost.groups > 0
            && let Some(recorder) = self.context.lost.upgrade()
        {
            recorder.lost_groups((gate.name(), gate.id()), self.id(), lost);
        }
    }
}

/// Wipes groups that are in a block, or that are lost.
pub(super) fn wipe_batch(batch: Vec<Pending>) {
    batch.into_iter().for_each(|pending| wipe_shared(pending.group.bytes));
}
