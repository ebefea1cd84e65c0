//! The write path of a shard: appends, and the leader's work on the files.
//!
//! [`GroupCommit`](super::commit::GroupCommit) decides who leads and what the next batch is. The
//! leader makes a block of it here, writes it, syncs if a caller waits for that, and reports back.
//! Groups that no caller waits for are written by a scheduled job, after `linger` at the latest.

use std::{
    sync::Arc,
    task::{Poll, Waker},
    time::Duration,
};

use tracing::{debug, debug_span, error, trace_span};

use super::{
    Durability, Payload, Shard, Ticket,
    budget::AwaitsRoom,
    commit::{Flush, Group, Pending, Rejected, Resigned, Role, Stopped, Submitted, Term},
    draft::Draft,
    handover::Claim,
    loss::{Locked, wipe_batch},
    recovery::Recovery,
    rules::check_no_data_key,
    writer::{KeyUse, Next, SegmentWriter},
};
use crate::{
    Error, Result,
    schedule::{ShardJob, Work},
    sync::{
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
        lock,
    },
};

/// How long after a sync without further blocks a mark block records it.
const MARK_AFTER: Duration = Duration::from_secs(1);
/// After how long a job that would have to wait for a KMS is tried again.
pub(super) const KMS_RETRY_AFTER: Duration = Duration::from_millis(20);
/// After how long acknowledged groups that could not be sealed without the key are tried again.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// How often the followers of a shard look for more that another process writes.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How often the followers of a shard that another process writes look whether it is read-only.
const LOOK_FOR_END_EVERY: Duration = Duration::from_secs(1);
/// After how long groups are tried again that were handed over and got no sequence number.
const PLACE_AGAIN_AFTER: Duration = Duration::from_millis(20);
/// After how long a shard is reopened that a full disk has stopped.
const REOPEN_AFTER: Duration = Duration::from_secs(1);
/// How often that time doubles while the disk stays full.
const REOPEN_DOUBLINGS: u32 = 6;
/// How many blocks beyond the first one a leader makes before it looks at the queue again. Helpers
/// compress them meanwhile.
const BLOCKS_MORE: usize = 7;
/// How much of the budget a waiting group takes beyond its own bytes.
const PENDING_BYTES: usize = size_of::<Pending>();

/// Which background jobs of a shard are scheduled. At most one of each kind is, however many
/// segments begin and however often the shard is synced.
#[derive(Default)]
pub(super) struct Timers {
    roll: AtomicBool,
    mark: AtomicBool,
    look: AtomicBool,
    reopen: AtomicBool,
    /// How often the shard was to be reopened since it has written a block.
    reopenings: AtomicU32,
    /// When the shard was synced last, in nanoseconds of uptime.
    synced_at_ns: AtomicU64,
    /// When the end of the shard was looked for last, in nanoseconds of uptime.
    looked_for_end_ns: AtomicU64,
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

    /// Whether the last look for the end of the shard is long enough ago for another one.
    fn claim_look_for_end(&self, now: Duration) -> bool {
        let (now_ns, every_ns) = (now.as_nanos() as u64, LOOK_FOR_END_EVERY.as_nanos() as u64);
        let due_at = |last: u64| (last.saturating_add(every_ns) <= now_ns).then_some(now_ns);
        self.looked_for_end_ns.fetch_update(Ordering::SeqCst, Ordering::SeqCst, due_at).is_ok()
    }

    /// Returns whether no look was scheduled, so that the caller schedules it.
    fn claim_look(&self) -> bool {
        !self.look.swap(true, Ordering::SeqCst)
    }

    /// The scheduled look has begun: the next one can be scheduled.
    fn look_begins(&self) {
        self.look.store(false, Ordering::SeqCst);
    }

    /// After how long the shard is to be reopened. `None` if that is scheduled already.
    fn claim_reopen(&self) -> Option<Duration> {
        if self.reopen.swap(true, Ordering::SeqCst) {
            return None;
        }
        let earlier = self.reopenings.fetch_add(1, Ordering::SeqCst);
        Some(REOPEN_AFTER * 2u32.pow(earlier.min(REOPEN_DOUBLINGS)))
    }

    /// The scheduled reopening has begun: the next one can be scheduled.
    pub(super) fn reopen_begins(&self) {
        self.reopen.store(false, Ordering::SeqCst);
    }

    /// The shard has written a block.
    fn wrote(&self) {
        self.reopenings.store(0, Ordering::Relaxed);
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

/// Why a shard has not taken a group.
#[derive(Debug)]
pub(crate) enum NotTaken {
    /// Other shards take the range of this one.
    Moved(Payload),
    Failed(Error),
}

impl From<Error> for NotTaken {
    fn from(error: Error) -> Self {
        Self::Failed(error)
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

    /// Puts a group into the queue and returns a ticket for it. Blocks until there is room in the
    /// memory budget, the key is admitted, and a segment is open.
    pub(crate) fn enqueue(
        self: &Arc<Self>,
        payload: Payload,
        durability: Durability,
    ) -> Result<Ticket, NotTaken> {
        let charge = self.charge_of(&payload)?;
        self.context.gate.admit()?;
        if !self.try_charge(charge) {
            self.charge_waiting(charge)?;
            // The wait may have been long.
            self.context.gate.admit().inspect_err(|_| self.context.budget.release(charge))?;
        }
        self.submit(self.group(payload, durability, charge), durability)
    }

    /// Hands a group over and returns a ticket for it. Waits for no KMS and no I/O: where the key
    /// has to be admitted first, or a segment to be begun, a job does that. With `wait_for_room`
    /// blocks while the memory budget is used up.
    ///
    /// In a store without threads nothing runs the job, so the caller does its work.
    ///
    /// # Errors
    /// [`Error::Full`] if there is no room, and the refusals that show at once.
    pub(crate) fn hand_over(
        self: &Arc<Self>,
        payload: Payload,
        durability: Durability,
        wait_for_room: bool,
    ) -> Result<Ticket, NotTaken> {
        let charge = self.charge_of(&payload)?;
        let mut admitted = self.admits_at_once()?;
        if !self.try_charge(charge) {
            if !wait_for_room {
                return Err(self.full().into());
            }
            self.charge_waiting(charge)?;
            admitted =
                self.admits_at_once().inspect_err(|_| self.context.budget.release(charge))?;
        }
        self.hand_over_charged(self.group(payload, durability, charge), durability, admitted)
    }

    /// As [`Shard::hand_over`]. While there is no room, leaves the payload in its place, and has
    /// `waker` woken when there may be room.
    pub(super) fn poll_hand_over(
        self: &Arc<Self>,
        payload: &mut Option<Payload>,
        durability: Durability,
        room: &AwaitsRoom,
        waker: &Waker,
    ) -> Poll<Result<Ticket, NotTaken>> {
        let Some(next) = payload.take() else {
            return Poll::Ready(Err(Error::Closed("the append").into()));
        };
        let charge = self.charge_of(&next)?;
        let admitted = self.admits_at_once()?;
        if !self.try_charge(charge) && !room.poll_take(charge, waker) {
            *payload = Some(next);
            return Poll::Pending;
        }
        let group = self.group(next, durability, charge);
        Poll::Ready(self.hand_over_charged(group, durability, admitted))
    }

    /// A place for a task that awaits room in the memory budget.
    pub(super) fn await_room(&self) -> AwaitsRoom {
        AwaitsRoom::new(&self.context.budget)
    }

    /// How much of the memory budget a group takes.
    ///
    /// # Errors
    /// The store takes no appends.
    fn charge_of(&self, payload: &Payload) -> Result<usize> {
        if self.context.read_only {
            return Err(Error::ReadOnly);
        }
        if let Some(limit) = &self.context.limit {
            limit.admit_append()?;
        }
        Ok(payload.bytes.len() + PENDING_BYTES)
    }

    /// Whether the key is admitted. `false` if only an answer of a KMS will say that: the call is
    /// under way then.
    ///
    /// # Errors
    /// The key is refused.
    fn admits_at_once(&self) -> Result<bool> {
        let gate = &self.context.gate;
        if self.context.options.threads && !gate.decides_or_asks() {
            return Ok(false);
        }
        gate.admit().map(|_| true)
    }

    /// Takes room in the memory budget, if there is room. A Logstore whose KMS hangs may have used
    /// up the budget, so a shard without a group that waits takes one in any case.
    fn try_charge(&self, charge: usize) -> bool {
        let budget = &self.context.budget;
        budget.try_take(charge) || (!self.commit.has_queued() && budget.take(charge))
    }

    /// Takes room in the memory budget. Blocks until there is room.
    fn charge_waiting(&self, charge: usize) -> Result<()> {
        let budget = &self.context.budget;
        if self.context.options.threads {
            budget.take_waiting(charge);
            return Ok(());
        }
        self.context.wake.relieve();
        if budget.try_take(charge) { Ok(()) } else { Err(self.full()) }
    }

    fn full(&self) -> Error {
        Error::Full { pending: self.context.budget.used() as u64 }
    }

    fn group(&self, payload: Payload, durability: Durability, charged: usize) -> Group {
        let Payload { kind, bytes, logs } = payload;
        let clock = &self.context.clock;
        let (time_us, submitted) = (clock.wall_us(), clock.uptime());
        let acked = durability == Durability::Buffered;
        Group { kind, bytes, logs, charged, time_us, submitted, acked }
    }

    /// Queues a group. Blocks until a segment is open. Gives the room of the group back if it is
    /// not queued.
    fn submit(
        self: &Arc<Self>,
        mut group: Group,
        durability: Durability,
    ) -> Result<Ticket, NotTaken> {
        let charged = group.charged;
        loop {
            group = match self.commit.submit(group) {
                Ok(submitted) => return Ok(self.ticket(&submitted, durability)),
                Err(Rejected::NotOpen(group)) => group,
                Err(rejected) => return Err(self.rejected(rejected, charged)),
            };
            match self.prepare() {
                Ok(()) => {}
                Err(_) if self.commit.is_done() => {
                    return Err(self.rejected(Rejected::Retired(group), charged));
                }
                Err(error) => {
                    self.context.budget.release(charged);
                    return Err(error.into());
                }
            }
        }
    }

    /// Queues a group if the key is `admitted` and a segment is open, and hands it over if not.
    fn hand_over_charged(
        self: &Arc<Self>,
        mut group: Group,
        durability: Durability,
        admitted: bool,
    ) -> Result<Ticket, NotTaken> {
        if !self.context.options.threads {
            return self.submit(group, durability).inspect(Ticket::hasten);
        }
        let charged = group.charged;
        if admitted {
            group = match self.commit.submit(group) {
                Ok(submitted) => {
                    return Ok(self.ticket(&submitted, durability)).inspect(Ticket::hasten);
                }
                Err(Rejected::NotOpen(group)) => group,
                Err(rejected) => return Err(self.rejected(rejected, charged)),
            };
        }
        let handed_over = self.commit.hand_over(group, durability);
        let (number, is_only_one) =
            handed_over.map_err(|rejected| self.rejected(rejected, charged))?;
        if is_only_one {
            self.schedule(Duration::ZERO, ShardJob::Place);
        }
        Ok(Ticket::new(Arc::clone(self), Claim::HandedOver(number), durability))
    }

    fn ticket(self: &Arc<Self>, submitted: &Submitted, durability: Durability) -> Ticket {
        let ticket = Ticket::new(Arc::clone(self), Claim::Seq(submitted.seq), durability);
        self.schedule_flush(submitted.flush);
        ticket
    }

    /// Gives the room of a group back that was not queued.
    fn rejected(&self, rejected: Rejected, charged: usize) -> NotTaken {
        self.context.budget.release(charged);
        match rejected {
            Rejected::Stopped(stopped) => self.stopped(stopped).into(),
            Rejected::Retired(Group { kind, bytes, logs, .. }) => {
                NotTaken::Moved(Payload { kind, bytes, logs })
            }
            Rejected::Exhausted | Rejected::NotOpen(_) => self.full().into(),
        }
    }

    /// Gives the groups that were handed over their sequence numbers. Blocks until a segment is
    /// open.
    ///
    /// # Errors
    /// Why these groups have failed.
    pub(super) fn place_handed_over(&self) -> Result<()> {
        if let Err(error) = self.prepare() {
            self.account(self.commit.refuse_handed_over(&error));
            return Err(error);
        }
        self.schedule_flush(self.commit.place(self.context.clock.uptime()));
        if self.commit.has_handed_over() {
            // The segment was sealed in between, or has no numbers left.
            self.schedule(PLACE_AGAIN_AFTER, ShardJob::Place);
        }
        Ok(())
    }

    /// The sequence number of a group. Blocks until it has one.
    ///
    /// # Errors
    /// Why the group has failed.
    pub(super) fn place(&self, claim: Claim) -> Result<u64> {
        if let Claim::Seq(seq) = claim {
            return Ok(seq);
        }
        loop {
            if let Some(seq) = self.commit.seq_of(claim)? {
                return Ok(seq);
            }
            if self.place_handed_over().is_ok() && self.commit.seq_of(claim)?.is_none() {
                // The segment has no numbers left. Writing the queue leads to the next segment.
                self.sync()?;
            }
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
            let written = self.write_and_sync(self.writer(), Some(seq), KeyUse::Admitted);
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
    /// With [`KeyUse::InMemory`], leaves the rest to [`ShardJob::FlushByKms`] where it would have to
    /// wait for a KMS.
    pub(super) fn flush_queued(&self, all: bool, keys: KeyUse) {
        let now = self.context.clock.uptime();
        self.commit.begin_flush(now, all);
        loop {
            let term = match self.commit.lead_if_due(now) {
                Flush::Busy => return,
                Flush::Idle(flush) => return self.schedule_flush(flush),
                Flush::Leader(term) => term,
            };
            let writer = match keys {
                KeyUse::InMemory => self.writer_at_once(),
                _ => Some(self.writer()),
            };
            let Some(writer) = writer else {
                let resigned = self.commit.resign(term, self.context.clock.uptime(), None);
                if let Some(after) = resigned.flush {
                    self.schedule(after, ShardJob::FlushByKms);
                }
                return;
            };
            let written = self.write_and_sync(writer, None, keys);
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
        if self.commit.has_handed_over() {
            self.place_handed_over()?;
        }
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

    /// Writes the blocks of one run, and syncs once if a caller waits for that. The caller is the
    /// leader; `own` is the group that it waits for.
    ///
    /// # Errors
    /// The key may not be used. Any other failure latches the shard.
    fn write_and_sync(&self, mut writer: Locked<'_>, own: Option<u64>, keys: KeyUse) -> Result<()> {
        let run = self.commit.take_run(BLOCKS_MORE);
        let written = self.write_run(&mut writer, run, keys);
        // Written blocks are synced for the callers that wait for it, whether or not the key may be
        // used.
        if self.commit.wants_sync(own, written.is_err() || writer.owes_sync()) {
            self.sync_active(&mut writer);
        }
        written
    }

    /// Makes a block of each batch, writes them in order, and reports that to the group commit.
    ///
    /// # Errors
    /// The key may not be used. Any other failure latches the shard.
    pub(super) fn write_run(
        &self,
        writer: &mut Locked<'_>,
        batches: Vec<Vec<Pending>>,
        keys: KeyUse,
    ) -> Result<()> {
        let mut run = writer.begin_run(batches);
        while let Some(mut draft) = writer.next_draft(&mut run) {
            let (from, to) = (draft.first_seq(), draft.end_seq());
            let _span = trace_span!("append", logstore = %self.name(), shard = self.id(), from, to)
                .entered();
            let losses = self.gate().losses();
            match self.write_block(writer, &mut draft, keys) {
                Ok(()) => self.note_written(writer, draft.batch, keys, losses),
                Err(error) => {
                    let mut left = draft.into_batch();
                    left.append(&mut writer.end_run(run));
                    return self.not_written(writer, left, error, keys);
                }
            }
        }
        Ok(())
    }

    /// Reports a block that was written while the key had been lost `losses` times.
    fn note_written(&self, writer: &Locked<'_>, batch: Vec<Pending>, keys: KeyUse, losses: u64) {
        self.count_written(&batch);
        let charged: usize = batch.iter().map(|pending| pending.group.charged).sum();
        let to = batch.last().map_or(0, |last| last.seq + 1);
        if keys == KeyUse::Held || self.gate().losses() > losses {
            wipe_batch(batch);
        } else {
            drop(batch);
        }
        self.context.budget.release(charged);
        self.commit.written(to, writer.reserved().as_ref());
    }

    /// Groups that the leader has taken are not written, because of `error`.
    ///
    /// # Errors
    /// The key may not be used. Any other failure latches the shard.
    fn not_written(
        &self,
        writer: &mut Locked<'_>,
        batch: Vec<Pending>,
        error: Error,
        keys: KeyUse,
    ) -> Result<()> {
        let charged: usize = batch.iter().map(|pending| pending.group.charged).sum();
        if writer.is_deposed() {
            // The expiry has counted the groups.
            wipe_batch(batch);
            self.context.budget.release(charged);
            return Err(error);
        }
        if self.commit.unfinished_expiry().is_some() {
            // The segment is given up anyway. Its key may be gone.
            let error = self.commit.expiry_error().unwrap_or(error);
            self.refuse(batch, &error);
            return Err(error);
        }
        if keys != KeyUse::Held && is_refusal(&error) {
            self.refuse(batch, &error);
            if !writer.is_open() {
                // The old segment is sealed and the new one could not be begun: no segment
                // reserves numbers any more.
                self.commit.suspend();
            }
            return Err(error);
        }
        let from = batch.first().map_or(0, |first| first.seq);
        let to = batch.last().map_or(from, |last| last.seq + 1);
        drop(batch);
        self.context.budget.release(charged);
        self.commit.fail(from..to, &error);
        self.latch(writer, error);
        Ok(())
    }

    /// Counts groups that were written.
    fn count_written(&self, batch: &[Pending]) {
        self.timers.wrote();
        let now = self.context.clock.uptime();
        let after = batch.iter().map(|pending| now.saturating_sub(pending.group.submitted));
        self.env.counters().written(after);
        let bytes = batch.iter().map(|pending| pending.group.bytes.len() as u64).sum();
        self.written.groups.fetch_add(batch.len() as u64, Ordering::Relaxed);
        self.written.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Writes one block, and rolls first if the active segment does not take it.
    fn write_block(&self, writer: &mut Locked<'_>, draft: &mut Draft, keys: KeyUse) -> Result<()> {
        if keys != KeyUse::Held
            && let Some(first) = draft.batch.first()
            && !writer.takes_another_block(first.group.time_us)
        {
            if writer.is_open() {
                self.seal_active(writer, keys)?;
                self.record_head()?;
            }
            let Some(next) = writer.next().cloned() else {
                return Err(Error::Closed("the active segment"));
            };
            writer.set_next(Next { first_seq: first.seq, ..next });
            self.begin_segment(writer, keys, Some(first.group.time_us))?;
        }
        writer.write_block(draft, keys)?;
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
        let (reported, is_full) = (self.latched(&cause), cause.is_disk_full());
        self.context.budget.release(self.commit.latch(cause, &reported));
        if is_full {
            self.schedule_reopen();
        }
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
        if self.commit.is_done() {
            return Err(Error::Closed("the shard"));
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

    pub(super) fn begin(&self, writer: &mut SegmentWriter) -> Result<()> {
        check_no_data_key(&self.list)?;
        let next = match writer.next().cloned() {
            Some(next) => next,
            None => self.recover()?,
        };
        let first_seq = next.first_seq.max(self.commit.next_to_write());
        writer.set_next(Next { first_seq, ..next });
        self.begin_segment(writer, KeyUse::Admitted, None)
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

    /// Begins the segment that the writer is to begin next, and lists it. Its first group was
    /// received at `first_time_us`, if that is known.
    pub(super) fn begin_segment(
        &self,
        writer: &mut SegmentWriter,
        keys: KeyUse,
        first_time_us: Option<u64>,
    ) -> Result<()> {
        self.list.push(writer.begin(keys, first_time_us)?);
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
        let _span = debug_span!("seal", logstore = %self.name(), shard = self.id()).entered();
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
        self.wake_after(after, Work::Shard(self.this.clone(), job));
    }

    /// Schedules work of a part of the shard.
    pub(super) fn wake_after(&self, after: Duration, work: Work) {
        self.context.wake.after(after, work);
    }

    /// Has the followers of a shard that another process writes woken.
    pub(super) fn schedule_look(&self) {
        if self.timers.claim_look() {
            self.schedule(LOOK_EVERY, ShardJob::Look);
        }
    }

    /// In a store that is open for reading: looks from time to time whether the writer has split or
    /// merged the shard, so that its followers end. An error is for the next read.
    pub(super) fn look_for_end(&self) {
        if self.context.read_only
            && !self.commit.news().ended
            && self.timers.claim_look_for_end(self.context.clock.uptime())
            && let Err(error) = self.context.gate.catch_up()
        {
            debug!(logstore = %self.name(), shard = self.id(), %error, "metadata not read again");
        }
    }

    /// Wakes the followers of a shard that another process writes.
    pub(super) fn look(&self) {
        self.timers.look_begins();
        self.wake_followers();
    }

    /// Wakes the followers: a read may find more, or an error.
    pub(crate) fn wake_followers(&self) {
        self.commit.wake_followers();
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

    /// Has the shard reopened once the disk may have room again, unless the options forbid that.
    pub(super) fn schedule_reopen(&self) {
        if self.context.options.reopen_full_shards
            && let Some(after) = self.timers.claim_reopen()
        {
            self.schedule(after, ShardJob::Reopen);
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
