//! The write path of a shard: appends, and the leader's work on the files.
//!
//! [`GroupCommit`](super::commit::GroupCommit) decides who leads and what the next batch is. The
//! leader makes a block of it here, writes it, syncs if a caller waits for that, and reports back.
//! Groups that no caller waits for are written by a scheduled job, after `linger` at the latest.

use std::{sync::Arc, time::Duration};

use tracing::error;

use super::{
    Durability, Payload, Shard, Ticket,
    commit::{Flush, Group, Pending, Rejected, Resigned, Role, Stopped, Submitted, Term},
    loss::{Locked, wipe_batch},
    recovery::Recovery,
    rules::check_no_data_key,
    writer::{KeyUse, Next, RESERVED_SEQS, SegmentWriter},
};
use crate::{
    Error, Result,
    schedule::{ShardJob, Work},
    sync::{
        atomic::{AtomicBool, AtomicU64, Ordering},
        lock,
    },
};

/// How long after a sync without further blocks a mark block records it.
const MARK_AFTER: Duration = Duration::from_secs(1);
/// After how long a job that would have to wait for a KMS is tried again.
pub(super) const KMS_RETRY_AFTER: Duration = Duration::from_millis(20);
/// After how long acknowledged groups that could not be sealed without the key are tried again.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// How much of the budget a waiting group takes beyond its own bytes.
const PENDING_BYTES: usize = size_of::<Pending>();

/// Which background jobs of a shard are scheduled. At most one of each kind is, however many
/// segments begin and however often the shard is synced.
#[derive(Default)]
pub(super) struct Timers {
    roll: AtomicBool,
    mark: AtomicBool,
    /// When the shard was synced last, in nanoseconds of uptime.
    synced_at_ns: AtomicU64,
}

impl Timers {
    /// Returns whether no roll was scheduled, so that the caller schedules it.
    fn claim_roll(&self) -> bool {
        !self.roll.swap(true, Ordering::SeqCst)
    }

    /// The scheduled roll has begun: the next one can be scheduled.
    fn roll_begins(&self) {
        self.roll.store(false, Ordering::SeqCst);
    }

    /// Returns whether no mark was scheduled, so that the caller schedules it.
    fn claim_mark(&self) -> bool {
        !self.mark.swap(true, Ordering::SeqCst)
    }

    /// The scheduled mark has begun: the next one can be scheduled.
    fn mark_begins(&self) {
        self.mark.store(false, Ordering::SeqCst);
    }

    /// Notes a sync that began at this uptime.
    fn synced(&self, began: Duration) {
        self.synced_at_ns.store(began.as_nanos() as u64, Ordering::SeqCst);
    }

    /// The time since the last sync began.
    fn since_sync(&self, now: Duration) -> Duration {
        now.saturating_sub(Duration::from_nanos(self.synced_at_ns.load(Ordering::SeqCst)))
    }
}

/// The leadership of a shard. It ends when this is dropped.
pub(super) struct Leading<'a> {
    shard: &'a Shard,
    term: Term,
}

impl<'a> Leading<'a> {
    pub(super) fn new(shard: &'a Shard, term: Term) -> Self {
        Self { shard, term }
    }
}

impl Drop for Leading<'_> {
    fn drop(&mut self) {
        self.shard.resign(self.term, None);
    }
}

impl Shard {
    // ---- callers ----

    /// Puts a group into the queue and returns a ticket for it. With `wait_for_room` it blocks
    /// while the store's memory budget is used up.
    pub(crate) fn enqueue(
        self: &Arc<Self>,
        payload: Payload,
        durability: Durability,
        wait_for_room: bool,
    ) -> Result<Ticket> {
        if self.context.read_only {
            return Err(Error::ReadOnly);
        }
        self.context.gate.admit()?;
        if let Some(limit) = &self.context.limit {
            limit.admit_append()?;
        }
        let charge = payload.bytes.len() + PENDING_BYTES;
        let budget = &self.context.budget;
        // A Logstore whose KMS hangs may have used up the budget. A shard without a group that
        // waits continues in any case.
        let taken = budget.try_take(charge) || (!self.commit.has_queued() && budget.take(charge));
        if !taken {
            if !wait_for_room {
                return Err(Error::Full { pending: budget.used() as u64 });
            }
            if self.context.options.threads {
                budget.take_waiting(charge);
            } else {
                self.context.wake.relieve();
                if !budget.try_take(charge) {
                    return Err(Error::Full { pending: budget.used() as u64 });
                }
            }
            // The wait may have been long.
            self.context.gate.admit().inspect_err(|_| budget.release(charge))?;
        }
        self.submit(payload, durability, charge).inspect_err(|_| budget.release(charge))
    }

    fn submit(
        self: &Arc<Self>,
        payload: Payload,
        durability: Durability,
        charged: usize,
    ) -> Result<Ticket> {
        let clock = &self.context.clock;
        let Payload { kind, bytes, logs } = payload;
        let acked = durability == Durability::Buffered;
        let mut group =
            Group { kind, bytes, logs, charged, time_us: 0, submitted: Duration::ZERO, acked };
        loop {
            (group.time_us, group.submitted) = (clock.wall_us(), clock.uptime());
            group = match self.commit.submit(group) {
                Ok(Submitted { seq, flush }) => {
                    let ticket = Ticket::new(Arc::clone(self), seq, durability);
                    self.schedule_flush(flush);
                    return Ok(ticket);
                }
                Err(Rejected::NotOpen(group)) => {
                    self.prepare()?;
                    group
                }
                Err(Rejected::Stopped(stopped)) => return Err(self.stopped(stopped)),
                Err(Rejected::Exhausted) => {
                    return Err(Error::TooMany {
                        what: "sequence numbers waiting to be written",
                        limit: RESERVED_SEQS,
                    });
                }
            };
        }
    }

    /// Schedules the write of a group in the queue, although no caller waits for it yet.
    pub(super) fn hasten(&self, seq: u64, durability: Durability) {
        self.schedule_flush(self.commit.hasten(seq, durability, self.context.clock.uptime()));
    }

    /// Waits until a group is as durable as asked, and leads if no other caller does. The caller
    /// holds a ticket, or has begun a sync.
    pub(super) fn wait_for(&self, seq: u64, durability: Durability) -> Result<()> {
        loop {
            let term = match self.commit.wait_or_lead(seq, durability) {
                Role::Done(outcome) => return outcome,
                Role::Leader(term) => term,
            };
            let written = self.write_and_sync(Some(seq));
            let resigned = self.resign(term, Some((seq, durability)));
            match (resigned.outcome, written) {
                (Some(outcome), _) => return outcome,
                // The group was acknowledged before and stays queued. It cannot be made durable
                // now.
                (None, Err(refusal)) if resigned.is_queued => return Err(refusal),
                _ => {}
            }
        }
    }

    /// Writes the groups that are due, in a thread of the scheduler. With `all` no group lingers.
    pub(super) fn flush_queued(&self, all: bool) {
        let now = self.context.clock.uptime();
        self.commit.begin_flush(now, all);
        loop {
            let term = match self.commit.lead_if_due(now) {
                Flush::Busy => return,
                Flush::Idle(flush) => return self.schedule_flush(flush),
                Flush::Leader(term) => term,
            };
            let written = self.write_and_sync(None);
            self.resign(term, None);
            if written.is_err() {
                // Acknowledged groups stay queued until the loss of the key is dealt with, or the
                // key can be used again.
                return;
            }
        }
    }

    /// Writes and syncs everything that has been appended so far.
    pub(crate) fn sync(&self) -> Result<()> {
        let Some(last) = self.commit.begin_sync().map_err(|stopped| self.stopped(stopped))? else {
            return Ok(());
        };
        let synced = self.wait_for(last, Durability::Synced);
        self.commit.leave();
        synced
    }

    // ---- leadership ----

    /// Takes the leadership. Waits for the current leader.
    pub(super) fn lead(&self) -> Leading<'_> {
        Leading::new(self, self.commit.lead())
    }

    fn resign(&self, term: Term, own: Option<(u64, Durability)>) -> Resigned {
        let resigned = self.commit.resign(term, self.context.clock.uptime(), own);
        self.schedule_flush(resigned.flush);
        resigned
    }

    /// Writes one block, and syncs once if a caller waits for that. The caller is the leader; `own`
    /// is the group that it waits for.
    ///
    /// # Errors
    /// The key may not be used. Any other failure latches the shard.
    fn write_and_sync(&self, own: Option<u64>) -> Result<()> {
        let mut writer = self.writer();
        let batch = self.commit.take_batch();
        let written =
            batch.map_or(Ok(()), |batch| self.write_batch(&mut writer, batch, KeyUse::Admitted));
        // Written blocks are synced for the callers that wait for it, whether or not the key may be
        // used.
        if self.commit.wants_sync(own, written.is_err() || writer.owes_sync()) {
            self.sync_active(&mut writer);
        }
        written
    }

    /// Makes a block of `batch`, writes it, and reports that to the group commit.
    ///
    /// # Errors
    /// The key may not be used. Any other failure latches the shard.
    pub(super) fn write_batch(
        &self,
        writer: &mut Locked<'_>,
        batch: Vec<Pending>,
        keys: KeyUse,
    ) -> Result<()> {
        let (Some(first), Some(last)) = (batch.first(), batch.last()) else { return Ok(()) };
        let (from, to) = (first.seq, last.seq + 1);
        let charged: usize = batch.iter().map(|pending| pending.group.charged).sum();
        let losses = self.gate().losses();
        match self.write_block(writer, &batch, keys) {
            Ok(()) => {
                if keys == KeyUse::Held || self.gate().losses() > losses {
                    wipe_batch(batch);
                } else {
                    drop(batch);
                }
                self.context.budget.release(charged);
                self.commit.written(to, writer.reserved().as_ref());
                Ok(())
            }
            Err(error) if writer.is_deposed() => {
                // The expiry has counted the groups.
                wipe_batch(batch);
                self.context.budget.release(charged);
                Err(error)
            }
            Err(error) if self.commit.unfinished_expiry().is_some() => {
                // The segment is given up anyway. Its key may be gone.
                let error = self.commit.expiry_error().unwrap_or(error);
                self.refuse(batch, &error);
                Err(error)
            }
            Err(error) if keys == KeyUse::Admitted && is_refusal(&error) => {
                self.refuse(batch, &error);
                if !writer.is_open() {
                    // The old segment is sealed and the new one could not be begun: no segment
                    // reserves numbers any more.
                    self.commit.suspend();
                }
                Err(error)
            }
            Err(error) => {
                drop(batch);
                self.context.budget.release(charged);
                self.commit.fail(from..to, &error);
                self.latch(writer, error);
                Ok(())
            }
        }
    }

    /// Writes one block, and rolls first if the active segment does not take it.
    fn write_block(&self, writer: &mut Locked<'_>, batch: &[Pending], keys: KeyUse) -> Result<()> {
        if keys == KeyUse::Admitted
            && let Some(first) = batch.first()
            && !writer.takes_another_block()
        {
            if writer.is_open() {
                self.seal_active(writer, KeyUse::Admitted)?;
                self.record_head()?;
            }
            let Some(next) = writer.next().cloned() else {
                return Err(Error::Closed("the active segment"));
            };
            writer.set_next(Next { first_seq: first.seq, ..next });
            self.begin_segment(writer)?;
        }
        writer.write_block(batch, keys)?;
        self.env.check_fence()
    }

    /// Syncs the active segment, and reports that to the group commit.
    pub(super) fn sync_active(&self, writer: &mut Locked<'_>) {
        let now = self.context.clock.uptime();
        let Some(unsynced) = writer.begin_sync() else { return self.commit.synced() };
        match writer.sync(&unsynced).and_then(|()| self.env.check_fence()) {
            Ok(()) => {
                if let Some(head) = writer.end_sync(&unsynced) {
                    self.reach(head);
                }
                self.commit.synced();
                self.timers.synced(now);
                self.schedule_mark(MARK_AFTER);
            }
            Err(_) if writer.is_deposed() => {}
            Err(error) => self.latch(writer, error),
        }
    }

    /// The key may not be used: groups that a caller waits for fail, acknowledged groups stay in
    /// the queue.
    pub(super) fn refuse(&self, batch: Vec<Pending>, error: &Error) {
        let retry_at = self.context.clock.uptime() + RETRY_AFTER;
        self.account(self.commit.refuse(batch, error, retry_at));
    }

    // ---- failures ----

    /// Stops the writer after a failure: a failed operation is never retried. If the shard
    /// has expired, the next append recovers the shard anyway.
    pub(super) fn latch(&self, writer: &mut SegmentWriter, error: Error) {
        if self.commit.unfinished_expiry().is_some() {
            return;
        }
        // A writer that has taken over the store removes unfinished files of this one. Then the
        // missing file is not the cause.
        let fenced =
            if matches!(error, Error::Io { .. }) { self.env.check_fence().err() } else { None };
        let error = fenced.unwrap_or(error);
        if writer.abandon() {
            self.list.abandon_active();
        }
        if !matches!(error, Error::Closed(_)) {
            self.env.counters().writers_latched.fetch_add(1, Ordering::Relaxed);
            error!(logstore = %self.name(), shard = self.id(), %error, "shard writer latched");
        }
        let cause = Arc::new(error);
        let reported = self.latched(&cause);
        self.context.budget.release(self.commit.latch(cause, &reported));
    }

    /// Latches the shard after a failed operation. A finding or a refusal does not latch it.
    pub(super) fn latch_if_failed(&self, writer: &mut SegmentWriter, error: &Error) {
        if matches!(error, Error::Io { .. } | Error::Fenced { .. }) {
            self.latch(writer, error.clone());
        }
    }

    pub(super) fn latched(&self, cause: &Arc<Error>) -> Error {
        Error::Latched { logstore: self.name().clone(), shard: self.id(), cause: Arc::clone(cause) }
    }

    fn stopped(&self, stopped: Stopped) -> Error {
        match stopped {
            Stopped::Closed => Error::Closed("the Logstore"),
            Stopped::Latched(cause) => self.latched(&cause),
        }
    }

    // ---- segments ----

    /// Opens a segment for submissions: finds the end of the shard, recovers it if necessary, and
    /// begins the segment.
    pub(super) fn prepare(&self) -> Result<()> {
        self.context.gate.admit()?;
        let mut writer = self.writer();
        if self.commit.is_open().map_err(|stopped| self.stopped(stopped))? {
            return Ok(());
        }
        // After a repair a segment is open already.
        if !writer.is_open() {
            self.begin(&mut writer)
                .inspect_err(|error| self.latch_if_failed(&mut writer, error))?;
        }
        if let Some(reserved) = writer.reserved() {
            self.commit.open(&reserved);
        }
        Ok(())
    }

    fn begin(&self, writer: &mut SegmentWriter) -> Result<()> {
        check_no_data_key(&self.list)?;
        let next = match writer.next().cloned() {
            Some(next) => next,
            None => self.recover()?,
        };
        let first_seq = next.first_seq.max(self.commit.next_to_write());
        writer.set_next(Next { first_seq, ..next });
        self.begin_segment(writer)
    }

    pub(super) fn recovery(&self) -> Recovery<'_> {
        Recovery { list: &self.list, env: &self.env }
    }

    /// Recovers the shard. The caller holds the writer's lock, and no segment is open.
    pub(super) fn recover(&self) -> Result<Next> {
        let (next, notice) = self.recovery().recover()?;
        lock(&self.notices).extend(notice);
        Ok(next)
    }

    /// Begins the segment that the writer is to begin next, and lists it.
    pub(super) fn begin_segment(&self, writer: &mut SegmentWriter) -> Result<()> {
        self.list.push(writer.begin()?);
        self.schedule_roll(self.context.options.segment_age);
        Ok(())
    }

    /// Seals the active segment, so that the next append begins a new one. Latches the shard if
    /// that fails, unless the key may not be used.
    pub(super) fn seal(&self, writer: &mut Locked<'_>, keys: KeyUse) -> Result<()> {
        if !writer.is_open() {
            return Ok(());
        }
        match self.seal_active(writer, keys) {
            Ok(()) => self.commit.sealed(),
            Err(error) if is_refusal(&error) || writer.is_deposed() => return Err(error),
            Err(error) => {
                self.latch(writer, error.clone());
                return Err(error);
            }
        }
        Ok(())
    }

    /// Seals the active segment: syncs its blocks, writes the footer, and syncs that. Everything
    /// written so far is synced after that, so the fence is checked here, whether or not the
    /// caller writes the head to the catalogue.
    fn seal_active(&self, writer: &mut Locked<'_>, keys: KeyUse) -> Result<()> {
        if let Some(blocks) = writer.begin_sync_of_blocks() {
            writer.sync(&blocks)?;
            writer.end_sync(&blocks);
        }
        let Some((head, footer)) = writer.write_footer(keys)? else { return Ok(()) };
        writer.sync(&footer)?;
        let head = writer.end_segment(head);
        self.reach(head.clone());
        self.list.seal_last(head.into_end());
        self.env.check_fence()
    }

    // ---- background jobs ----

    pub(super) fn schedule(&self, after: Duration, job: ShardJob) {
        self.context.wake.after(after, Work::Shard(self.this.clone(), job));
    }

    fn schedule_flush(&self, after: Option<Duration>) {
        if let Some(after) = after {
            self.schedule(after, ShardJob::Flush);
        }
    }

    fn schedule_mark(&self, after: Duration) {
        if self.timers.claim_mark() {
            self.schedule(after, ShardJob::Mark);
        }
    }

    fn schedule_roll(&self, after: Duration) {
        if self.timers.claim_roll() {
            self.schedule(after, ShardJob::RollByAge);
        }
    }

    /// Rolls the active segment if it is old enough.
    pub(super) fn roll_if_old(&self) {
        self.timers.roll_begins();
        let left = self.writer().rolls_in();
        match left {
            None => {}
            // A refusal or a failure shows at the next append. A queue that is not empty rolls by
            // itself.
            Some(Duration::ZERO) => drop(self.roll()),
            Some(left) => self.schedule_roll(left),
        }
    }

    /// Writes a mark block if the last sync is old enough and the shard is idle.
    pub(super) fn mark_if_idle(&self) {
        self.timers.mark_begins();
        let idle = self.timers.since_sync(self.context.clock.uptime());
        if idle < MARK_AFTER {
            return self.schedule_mark(MARK_AFTER - idle);
        }
        if !self.commit.is_idle() {
            return;
        }
        let _leading = self.lead();
        let mut writer = self.writer();
        match writer.write_mark() {
            Err(error) if !is_refusal(&error) => self.latch(&mut writer, error),
            _ => {}
        }
    }
}

/// Whether the error is the gate's: the key may not be used now, and the files are in order.
pub(super) fn is_refusal(error: &Error) -> bool {
    matches!(
        error,
        Error::Revoked { .. }
            | Error::KmsUnreachable { .. }
            | Error::KmsInvalid { .. }
            | Error::ServiceKey { .. }
            | Error::KeyringNotRead { .. }
            | Error::Forked
    )
}
