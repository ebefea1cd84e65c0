//! Operations on a whole shard: rolling, pausing, checkpoints, closing, repair.
//!
//! An operation that stops the leader takes the leadership first, and then the writer's lock. The
//! others take the writer's lock alone: they run while no segment is open, or only look.

use std::{sync::Arc, time::Duration};

use tracing::{debug, info};

use super::{
    End, Head, Shard,
    leader::{Leading, is_refusal},
    loss::Locked,
    recovery::{RepairReport, head_on_disk},
    salvage::FoundLoss,
    writer::{KeyUse, SegmentWriter},
};
use crate::{Error, Result, schedule::ShardJob, segment::KeySource};

impl Shard {
    /// Makes everything durable, including blocks that an earlier process, or a failed fsync, has
    /// left. Reports groups that were lost.
    pub(crate) fn make_durable(&self) -> Result<()> {
        self.report_lost()?;
        self.sync()?;
        let mut writer = self.writer();
        if self.context.read_only || writer.is_open() || writer.next().is_some() {
            return Ok(());
        }
        let Some(last) = self.list.segments(false)?.last().cloned() else { return Ok(()) };
        if matches!(self.list.open_segment(&last)?.end, End::Unknown) {
            self.context.gate.admit()?;
            let next =
                self.recover().inspect_err(|error| self.latch_if_failed(&mut writer, error))?;
            writer.set_next(next);
            return Ok(());
        }
        // The segment is whole. An earlier process may have died, or failed, between its rename and
        // the sync of the directory.
        self.list.make_names_durable()?;
        self.env.check_fence()
    }

    /// Writes everything, seals the active segment, and accepts no more appends. Returns the head
    /// of the shard.
    pub(crate) fn close(&self) -> Result<Option<Head>> {
        if self.commit.has_handed_over() {
            // The tickets of the groups have the error.
            drop(self.place_handed_over());
        }
        self.commit.close();
        let flushed = match self.latch_cause() {
            Some(cause) => Err(self.latched(&cause)),
            None => self.sync(),
        };
        if let Err(error) = &flushed
            && is_refusal(error)
        {
            // This is the last chance to seal acknowledged groups.
            let _leading = self.lead();
            self.write_acknowledged(&mut self.writer(), error);
        }
        let leading = self.lead();
        let sealed = {
            let mut writer = self.writer();
            let sealed = self.seal_by_any_key(&mut writer).map(|()| self.head(&writer));
            writer.wipe();
            sealed
        };
        let (given_up, freed) = self.commit.give_up(&Error::Closed("the Logstore"));
        drop(leading);
        self.context.budget.release(freed);
        let head = sealed?;
        match flushed {
            // Groups that were acknowledged as buffered, and have no key to be sealed with, are
            // lost. The caller gets the error.
            Err(error) if given_up || !is_refusal(&error) => Err(error),
            _ => Ok(head),
        }
    }

    /// Accepts no more appends: the Logstore was deleted.
    pub(crate) fn refuse_appends(&self) {
        self.commit.close();
    }

    /// Forgets the queue of a Logstore that was deleted, and wipes the buffers of the writer. A
    /// thread that is at work in the shard may wait for the KMS. Then a job does this, and that
    /// thread fails, because the gate is closed.
    pub(crate) fn abandon_soon(&self) {
        match self.lead_within(Duration::ZERO) {
            Some((leading, writer)) => self.abandon_with(leading, writer),
            None => self.schedule(Duration::ZERO, ShardJob::Abandon),
        }
    }

    /// As [`Shard::abandon_soon`], and waits for the thread that is at work in the shard.
    pub(super) fn abandon(&self) {
        let leading = self.lead();
        self.abandon_with(leading, self.writer());
    }

    fn abandon_with(&self, _leading: Leading<'_>, mut writer: Locked<'_>) {
        self.latch(&mut writer, Error::Closed("the Logstore"));
        writer.wipe();
    }

    /// Makes everything durable and marked, and returns the head of the shard. Without the key the
    /// mark is left out.
    pub(crate) fn checkpoint(&self) -> Result<Option<Head>> {
        if !self.context.read_only && self.latch_cause().is_none() {
            match self.sync() {
                Err(error) if !is_refusal(&error) => return Err(error),
                _ => {}
            }
            let _leading = self.lead();
            let mut writer = self.writer();
            match writer.write_mark() {
                Err(error) if !is_refusal(&error) => self.latch(&mut writer, error),
                _ => self.sync_active(&mut writer),
            }
            if let Some(head) = self.head(&writer) {
                return Ok(Some(head));
            }
        }
        head_on_disk(&self.list)
    }

    /// Seals the active segment. No other one is begun as long as the returned value lives.
    pub(crate) fn pause(&self) -> Result<Paused<'_>> {
        let leading = self.lead();
        let mut writer = self.writer();
        self.seal(&mut writer, KeyUse::Admitted)?;
        Ok(Paused { shard: self, writer, _leading: leading })
    }

    /// Writes everything that the shard has accepted, seals its last segment, and pauses it. The
    /// shard is retired, so it grows no more. A segment that another process has left open is
    /// recovered.
    pub(crate) fn pause_at_end(&self) -> Result<Paused<'_>> {
        self.sync()?;
        let leading = self.lead();
        let mut writer = self.writer();
        self.seal(&mut writer, KeyUse::Admitted)?;
        if self.commit.has_queued() {
            // They are acknowledged, and the key has refused them since.
            return Err(Error::Closed("the segment of acknowledged groups"));
        }
        if writer.next().is_none()
            && let Some(last) = self.list.segments(false)?.last().cloned()
            && matches!(self.list.open_segment(&last)?.end, End::Unknown)
        {
            // The header of the next segment says where this one ends.
            self.context.gate.admit()?;
            self.begin(&mut writer)
                .inspect_err(|error| self.latch_if_failed(&mut writer, error))?;
            self.seal(&mut writer, KeyUse::Admitted)?;
        }
        Ok(Paused { shard: self, writer, _leading: leading })
    }

    /// Rolls the active segment, if it has blocks. Everything appended before is in it.
    pub(crate) fn roll(&self) -> Result<()> {
        if self.commit.has_queued() {
            self.sync()?;
        }
        let _leading = self.lead();
        let mut writer = self.writer();
        if !writer.has_blocks() {
            return Ok(());
        }
        self.seal(&mut writer, KeyUse::Admitted)?;
        self.record_head().inspect_err(|error| {
            // Without the service key the catalogue takes no record. The head is recorded later.
            if !is_refusal(error) {
                self.latch(&mut writer, error.clone());
            }
        })
    }

    /// Ends the last segment if `ends` holds for its key and it has not been ended yet: no block
    /// can be added to it from then on. If another process has left it open, the shard is recovered
    /// first, and continues in a new segment. Returns whether a segment was ended.
    pub(crate) fn end_segment_if(&self, ends: impl Fn(KeySource) -> bool) -> Result<bool> {
        {
            let _leading = self.lead();
            let mut writer = self.writer();
            if let Some(source) = writer.key_source() {
                // The queue goes into the next segment. The loss of an access takes no key of a
                // segment that is being written.
                return if ends(source) {
                    self.seal_by_any_key(&mut writer).map(|()| true)
                } else {
                    Ok(false)
                };
            }
        }
        let Some(last) = self.settled_segments()?.last().cloned() else { return Ok(false) };
        let left_open = ends(self.key_source(&last)?)
            && matches!(self.list.open_segment(&last)?.end, End::Unknown);
        if left_open {
            self.prepare()?;
        }
        Ok(left_open)
    }

    /// Seals the active segment, with the key in memory if it may not be used any more.
    fn seal_by_any_key(&self, writer: &mut Locked<'_>) -> Result<()> {
        match self.seal(writer, KeyUse::Admitted) {
            Err(refusal) if is_refusal(&refusal) && !writer.is_deposed() => {
                // The deadline of the loss may have passed, and the key be gone.
                self.seal(writer, KeyUse::Held).map_err(|error| match error {
                    Error::Closed(_) => refusal,
                    error => error,
                })
            }
            sealed => sealed,
        }
    }

    /// Clears a latch. The next append recovers the shard first.
    pub(crate) fn reopen(&self) {
        let _writer = self.writer();
        if self.commit.unlatch() {
            // The failed operation may have left a segment that is not in the list.
            self.list.forget();
        }
    }

    /// Recovers a shard that a full disk has stopped, and lets it write again. If the disk is still
    /// full, or the key may not be used, tries again later. A failure of another kind is left to the
    /// next append.
    pub(super) fn reopen_if_room(&self) {
        self.timers.reopen_begins();
        let mut writer = self.writer();
        if !self.commit.reopenable().is_some_and(|cause| cause.is_disk_full()) {
            return;
        }
        let (logstore, shard) = (self.name(), self.id());
        // As after any failure: the failed operation may have left a segment.
        self.list.forget();
        let begun = self.context.gate.admit().and_then(|_| self.begin(&mut writer));
        match &begun {
            Ok(()) => info!(%logstore, shard, "shard writer reopened, the disk has room again"),
            Err(error) => {
                debug!(%logstore, shard, %error, "shard writer not reopened");
                if writer.abandon() {
                    self.list.abandon_active();
                }
                if error.is_disk_full() || is_refusal(error) {
                    return self.schedule_reopen();
                }
            }
        }
        self.commit.unlatch_unasked();
        if let Some(reserved) = writer.reserved() {
            self.commit.open(&reserved);
        }
    }

    /// Why the writer is latched, if it is.
    pub(crate) fn latch_cause(&self) -> Option<Arc<Error>> {
        self.commit.latch_cause()
    }

    /// The losses of the shard that were not accepted yet. See
    /// [`super::recovery::Recovery::find_losses`].
    pub(crate) fn find_losses(&self, accept_tampered: bool) -> Result<Vec<FoundLoss>> {
        let writer = self.writer();
        // While a segment is open, appends go on: that segment is not looked at.
        let _held = if writer.is_open() {
            None
        } else {
            // A file may have been lost since the directory was listed.
            self.list.forget();
            Some(writer)
        };
        self.recovery().find_losses(accept_tampered)
    }

    /// Gives up damaged blocks at the end of the shard, so that it can be written again. Keeps
    /// everything that can be read.
    pub(crate) fn repair(&self) -> Result<RepairReport> {
        let mut writer = self.writer();
        let Some((next, report)) = self.recovery().repair()? else {
            return Ok(RepairReport {
                shard: self.id(),
                segment: None,
                groups_salvaged: 0,
                bytes_lost: 0,
                losses: Vec::new(),
                metadata: None,
            });
        };
        writer.set_next(next);
        self.begin_segment(&mut writer, KeyUse::Admitted, None)?;
        Ok(report)
    }

    /// See [`super::recovery::Recovery::head_in_place`]. Waits for the writer.
    pub(crate) fn head_in_place(&self) -> Result<Option<Head>> {
        drop(self.writer());
        self.recovery().head_in_place()
    }

    /// The head of the shard. Sequence numbers of groups that were never written stay used.
    fn head(&self, writer: &SegmentWriter) -> Option<Head> {
        let head = writer.head()?;
        let next_seq = head.next_seq.max(self.commit.next_seq());
        Some(Head { next_seq, ..head })
    }
}

/// A shard whose writer is paused: no segment of it is open, and none is begun.
pub(crate) struct Paused<'a> {
    shard: &'a Shard,
    // Dropped in this order.
    writer: Locked<'a>,
    _leading: Leading<'a>,
}

impl Paused<'_> {
    /// The ordinal of the next segment. A recovery may make that segment itself.
    pub(crate) fn next_ordinal(&self) -> Result<u64> {
        self.writer
            .next()
            .map_or_else(|| self.shard.list().next_ordinal_on_disk(), |next| Ok(next.ordinal))
    }

    pub(crate) fn shard_id(&self) -> u32 {
        self.shard.id()
    }

    /// The head of the shard; `None` if its end was not looked for yet.
    pub(crate) fn head(&self) -> Option<Head> {
        self.shard.head(&self.writer)
    }

    /// The head of a shard that grows no more, from its files if its end was not looked for yet.
    ///
    /// # Errors
    /// The error of opening its last segment.
    pub(crate) fn last_head(&self) -> Result<Option<Head>> {
        self.head().map_or_else(|| head_on_disk(&self.shard.list), |head| Ok(Some(head)))
    }

    /// Notes that the catalogue has the head of the shard.
    pub(crate) fn note_head(&self) {
        if let Some(head) = self.head() {
            self.shard.note_head(&head);
        }
    }
}
