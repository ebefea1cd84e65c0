//! Group commit: many appends share one write and one fsync.
//!
//! Callers submit groups and wait until a watermark, *written* or *synced*, has passed the sequence
//! number of their group. The first caller to wait becomes the leader: it takes a batch off the
//! queue, writes and syncs it, and reports how far that got. The other callers are followers: they
//! sleep until the leader resigns. Groups that arrive meanwhile form the next batch.
//!
//! A [`GroupCommit`] does no I/O and uses no key. It elects the leader, forms the next batch,
//! decides when the leader calls fsync, and remembers the appends that failed. The leader writes
//! and syncs, and reports the results with [`GroupCommit::written`], [`GroupCommit::synced`],
//! [`GroupCommit::fail`] and [`GroupCommit::refuse`]. A `GroupCommit` has one lock. A thread holds
//! it for memory operations only, and takes no other lock of the shard under it.
//!
//! When a shard is not sealed at the deadline of a loss of its key, the queue *expires*: it keeps
//! no plaintext from then on, whatever its leader does. [`GroupCommit::expire`] drops the queue at
//! once. [`GroupCommit::finish_expiry`] does the rest as soon as no thread holds the writer. It may
//! depose a leader that a system call holds: that leader's resignation then changes nothing.
//!
//! `tests/shuttle/tests/commit.rs` compiles this file by itself and explores its schedules.

use std::{collections::VecDeque, ops::Range, sync::Arc, task::Waker, time::Duration};

use bytes::Bytes;

use super::{
    Durability,
    handover::{Claim, HandedOver, Handover, Place},
    wakers::{News, Tasks},
};
use crate::{
    Error, Result, group,
    segment::{BLOCK_GROUPS_MAX, BlockKind},
    sync::{Condvar, LockRank, Mutex, MutexGuard, lock, wait, wait_timeout},
};

/// By how much the clock may be behind the last receive time, in microseconds, before times go back
/// in the shard. Up to this much, a group gets the last receive time instead.
pub(super) const CLOCK_SLACK_US: u64 = 1_000_000;

/// The queue, the watermarks and the leadership of one shard.
pub(super) struct GroupCommit {
    /// The limit of a block's list, in bytes: a batch gets no further group beyond it. A larger
    /// single group gets a block of its own. A queue with this many bytes is written at once.
    block_bytes: usize,
    /// How long a group stays in the queue if no caller waits for it.
    linger: Duration,
    state: Mutex<State>,
    /// Notified when the leader resigns.
    progress: Condvar,
}

/// A group to be submitted.
pub(super) struct Group {
    pub(super) kind: BlockKind,
    pub(super) bytes: Bytes,
    pub(super) logs: u32,
    /// How much of the store's memory budget it holds, in bytes.
    pub(super) charged: usize,
    /// When it was received, in microseconds since the Unix epoch. Receive times do not run
    /// backwards within a segment, so that a reader can search by time: [`GroupCommit::submit`]
    /// raises this to the one before it. If the clock was set back, the group begins a segment.
    pub(super) time_us: u64,
    /// When it was submitted, by the uptime: at the same moment as `time_us`.
    pub(super) submitted: Duration,
    /// Whether the caller has its acknowledgement once it is submitted (`Durability::Buffered`).
    pub(super) acked: bool,
}

/// A group that waits in the queue, or is part of a batch.
pub(super) struct Pending {
    pub(super) seq: u64,
    pub(super) group: Group,
}

/// A group that was accepted. The submitter is an asker until it calls [`GroupCommit::leave`].
pub(super) struct Submitted {
    pub(super) seq: u64,
    /// After how long the caller must schedule a flush, if it must.
    pub(super) flush: Option<Duration>,
}

/// Why no group is accepted any more.
pub(super) enum Stopped {
    Closed,
    /// An earlier failure has latched the writer.
    Latched(Arc<Error>),
}

/// Why a group was not accepted.
pub(super) enum Rejected {
    Stopped(Stopped),
    /// Other shards take the range of this one.
    Retired(Group),
    /// No segment reserves sequence numbers. [`GroupCommit::open`], then submit the group again.
    NotOpen(Group),
    /// All reserved sequence numbers are in use.
    Exhausted,
}

/// The sequence numbers that a segment reserves.
pub(super) struct Reserved {
    /// One past the last number that the segment holds already.
    pub(super) end_seq: u64,
    pub(super) limit_seq: u64,
    /// The last receive time in the shard.
    pub(super) last_time_us: u64,
    /// How often the key had been lost when the segment was begun.
    pub(super) losses: u64,
}

/// One leadership, by its number. A leader that was deposed has an earlier one than its successor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Term(u64);

/// What a caller that waits for a group does next.
pub(super) enum Role {
    /// Return this outcome.
    Done(Result<()>),
    /// Lead: take a batch, write it, then [`GroupCommit::resign`].
    Leader(Term),
}

/// What a flush job does next.
pub(super) enum Flush {
    /// Lead: take a batch, write it, then [`GroupCommit::resign`].
    Leader(Term),
    /// Nothing: the current leader looks at the queue when it resigns.
    Busy,
    /// Nothing is due. The caller must schedule the next flush, if there is one.
    Idle(Option<Duration>),
}

/// The state after a leader has resigned.
pub(super) struct Resigned {
    /// After how long the caller must schedule a flush, if it must.
    pub(super) flush: Option<Duration>,
    /// The outcome of the group that the leader waits for, if it waits for one.
    pub(super) outcome: Option<Result<()>>,
    /// Whether that group is still not written.
    pub(super) is_queued: bool,
}

/// Acknowledged groups of one shard that are lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LostGroups {
    pub(crate) groups: u64,
    /// The lowest and the highest of their sequence numbers. Groups in between may not be lost.
    pub(crate) first_seq: u64,
    pub(crate) last_seq: u64,
}

impl LostGroups {
    fn add(&mut self, seq: u64) {
        self.merge(Self { groups: 1, first_seq: seq, last_seq: seq });
    }

    pub(super) fn merge(&mut self, other: Self) {
        if other.groups == 0 {
            return;
        }
        if self.groups == 0 {
            *self = other;
            return;
        }
        self.groups += other.groups;
        self.first_seq = self.first_seq.min(other.first_seq);
        self.last_seq = self.last_seq.max(other.last_seq);
    }
}

/// Groups that were taken out of the queue, and are not written.
#[derive(Default)]
#[must_use = "the groups are wiped, and those that are lost are counted"]
pub(super) struct Dropped {
    pub(super) groups: Vec<Bytes>,
    /// The loss of the key that they are lost with, and its error.
    pub(super) loss: u64,
    pub(super) error: Option<Error>,
    /// How much of the budget is free again, in bytes.
    pub(super) freed: usize,
    /// The acknowledged ones.
    pub(super) lost: LostGroups,
}

impl Dropped {
    fn add(&mut self, Pending { seq, group }: Pending) {
        self.freed += group.charged;
        if group.acked {
            self.lost.add(seq);
        }
        self.groups.push(group.bytes);
    }
}

impl GroupCommit {
    pub(super) fn new(block_bytes: usize, linger: Duration) -> Self {
        Self {
            block_bytes,
            linger,
            state: Mutex::new(LockRank::ShardState, State::default()),
            progress: Condvar::new(),
        }
    }

    // ---- callers ----

    /// Gives `group` the next sequence number and puts it into the queue, behind the groups that
    /// were handed over before.
    pub(super) fn submit(&self, group: Group) -> Result<Submitted, Rejected> {
        let mut state = self.lock();
        state.check().map_err(Rejected::Stopped)?;
        if state.retired {
            return Err(Rejected::Retired(group));
        }
        if !state.open {
            return Err(Rejected::NotOpen(group));
        }
        state.place_handed_over();
        if state.next_seq >= state.limit_seq {
            return Err(Rejected::Exhausted);
        }
        let now = group.submitted;
        let was_full = state.queued_bytes >= self.block_bytes;
        let seq = state.push(group);
        let fills = !was_full && state.queued_bytes >= self.block_bytes;
        let due = fills || !state.flush_scheduled;
        let flush = if due { self.schedule_flush(&mut state, now) } else { None };
        state.askers += 1;
        self.wake(state);
        Ok(Submitted { seq, flush })
    }

    /// Takes a group that gets its sequence number later: no segment is open, or the key has to be
    /// admitted first. The caller is an asker, and has a thread that may block call
    /// [`GroupCommit::place`] or [`GroupCommit::refuse_handed_over`]. Returns the number of the
    /// group, and whether it is the only one.
    pub(super) fn hand_over(
        &self,
        group: Group,
        durability: Durability,
    ) -> Result<(u64, bool), Rejected> {
        let mut state = self.lock();
        state.check().map_err(Rejected::Stopped)?;
        if state.retired {
            return Err(Rejected::Retired(group));
        }
        state.askers += 1;
        Ok(state.handover.push(group, durability))
    }

    /// Puts the groups that were handed over into the queue, if a segment is open. Returns after
    /// how long the caller must schedule a flush, if it must.
    pub(super) fn place(&self, now: Duration) -> Option<Duration> {
        let mut state = self.lock();
        if state.open {
            state.place_handed_over();
        }
        let flush = self.schedule_missing_flush(&mut state, now);
        self.wake(state);
        flush
    }

    /// Fails the groups that were handed over and have no sequence number yet.
    pub(super) fn refuse_handed_over(&self, error: &Error) -> Dropped {
        let mut state = self.lock();
        let mut dropped = state.nothing_dropped();
        state.refuse_handed_over(error, &mut dropped);
        self.wake(state);
        dropped
    }

    /// Whether groups that were handed over have no sequence number yet.
    pub(super) fn has_handed_over(&self) -> bool {
        !self.lock().handover.waiting.is_empty()
    }

    /// The sequence number of a group. `None` if it was handed over and has none yet.
    ///
    /// # Errors
    /// The group was handed over, and refused.
    pub(super) fn seq_of(&self, claim: Claim) -> Result<Option<u64>> {
        self.lock().handover.seq_of(claim)
    }

    /// Deregisters an asker. The last one to leave clears the remembered failures.
    pub(super) fn leave(&self) {
        self.lock().leave();
    }

    /// The asker of this group is done.
    pub(super) fn leave_claim(&self, claim: Claim, durability: Durability) {
        let mut state = self.lock();
        if let Ok(Some(seq)) = state.handover.seq_of(claim) {
            state.tasks.forget_group(seq, durability);
        }
        if let Claim::HandedOver(number) = claim {
            state.handover.leave(number);
        }
        state.leave();
    }

    /// Whether the append has succeeded, with its sequence number, or failed; `None` while it is
    /// under way.
    pub(super) fn outcome(&self, claim: Claim, durability: Durability) -> Option<Result<u64>> {
        self.lock().outcome_of(claim, durability)
    }

    /// As [`GroupCommit::outcome`]. Wakes `waker` once there is one.
    pub(super) fn poll(
        &self,
        claim: Claim,
        durability: Durability,
        waker: &Waker,
    ) -> Option<Result<u64>> {
        let mut state = self.lock();
        let outcome = state.outcome_of(claim, durability);
        if outcome.is_none() {
            match (state.handover.seq_of(claim), claim) {
                (Ok(Some(seq)), _) => state.tasks.await_group(seq, durability, waker),
                (_, Claim::HandedOver(number)) => state.handover.awaiting.insert(number, waker),
                _ => {}
            }
        }
        outcome
    }

    /// What a follower of the shard knows by now.
    pub(super) fn news(&self) -> News {
        self.lock().tasks.news()
    }

    /// The id of a new follower.
    pub(super) fn new_follower(&self) -> u64 {
        self.lock().tasks.new_follower()
    }

    /// Whether there is news since `seen`. If not, has `waker` woken when there is.
    pub(super) fn poll_news(&self, seen: &News, follower: u64, waker: &Waker) -> bool {
        self.lock().tasks.poll_news(seen, follower, waker)
    }

    /// Forgets a follower.
    pub(super) fn forget_follower(&self, follower: u64) {
        self.lock().tasks.forget_follower(follower);
    }

    /// Wakes the followers: a read may find more, or an error.
    pub(super) fn wake_followers(&self) {
        let mut state = self.lock();
        state.tasks.other_news();
        self.wake(state);
    }

    /// Requests that a group is written, and synced if `durability` says so, although no caller
    /// waits for it. Returns after how long the caller must schedule a flush, if it must.
    pub(super) fn hasten(
        &self,
        seq: u64,
        durability: Durability,
        now: Duration,
    ) -> Option<Duration> {
        let mut state = self.lock();
        if state.outcome(seq, durability).is_some() {
            return None;
        }
        state.want(seq, durability);
        if state.led.is_some() { None } else { self.schedule_flush(&mut state, now) }
    }

    /// Waits for the outcome of an append, or for the leadership. The caller is an asker.
    pub(super) fn wait_or_lead(&self, seq: u64, durability: Durability) -> Role {
        let mut state = self.lock();
        loop {
            if let Some(outcome) = state.outcome(seq, durability) {
                return Role::Done(outcome);
            }
            state.want(seq, durability);
            if !state.is_led() {
                return Role::Leader(state.begin_term());
            }
            state = wait(&self.progress, state);
        }
    }

    /// The last sequence number that must be synced so that everything submitted so far is;
    /// `None` if all of it is synced. The caller is an asker after `Some`.
    pub(super) fn begin_sync(&self) -> Result<Option<u64>, Stopped> {
        let mut state = self.lock();
        state.check_latch()?;
        let end = state.queue.back().map_or(state.taken.max(state.written), |last| last.seq + 1);
        if state.synced >= end {
            return Ok(None);
        }
        state.askers += 1;
        Ok(Some(end - 1))
    }

    // ---- leadership ----

    /// A scheduled flush begins. Groups that have lingered long enough are due now; with `all`,
    /// every group is.
    pub(super) fn begin_flush(&self, now: Duration, all: bool) {
        let mut state = self.lock();
        state.flush_scheduled = false;
        if state
            .queue
            .front()
            .is_some_and(|front| all || front.group.submitted + self.linger <= now)
        {
            state.flush_to = state.next_seq;
        }
    }

    /// Takes the leadership if there is work and no other leader.
    pub(super) fn lead_if_due(&self, now: Duration) -> Flush {
        let mut state = self.lock();
        if state.is_led() {
            return Flush::Busy;
        }
        if !state.wants_work(self.block_bytes) {
            return Flush::Idle(self.schedule_missing_flush(&mut state, now));
        }
        Flush::Leader(state.begin_term())
    }

    /// Takes the leadership. Waits for the current leader, but not for followers.
    pub(super) fn lead(&self) -> Term {
        let mut state = self.lock();
        state.claims += 1;
        while state.led.is_some() {
            state = wait(&self.progress, state);
        }
        state.claims -= 1;
        state.begin_term()
    }

    /// As [`GroupCommit::lead`], but gives up after `patience`.
    pub(super) fn lead_within(&self, patience: Duration) -> Option<Term> {
        let mut state = self.lock();
        if state.is_led() && !patience.is_zero() {
            state.claims += 1;
            state = wait_timeout(&self.progress, state, patience);
            state.claims -= 1;
            // Followers have waited for this claim.
            self.progress.notify_all();
        }
        if state.is_led() { None } else { Some(state.begin_term()) }
    }

    /// Gives up the leadership and wakes the followers, unless the leader was deposed. `own` is the
    /// group that the leader waits for, if it waits for one.
    pub(super) fn resign(
        &self,
        term: Term,
        now: Duration,
        own: Option<(u64, Durability)>,
    ) -> Resigned {
        let mut state = self.lock();
        if state.led == Some(term) {
            state.led = None;
        }
        let flush = self.schedule_missing_flush(&mut state, now);
        let outcome = own.and_then(|(seq, durability)| state.outcome(seq, durability));
        let is_queued = own.is_some_and(|(seq, _)| seq >= state.written);
        self.progress.notify_all();
        state.wake_reached();
        self.wake(state);
        Resigned { flush, outcome, is_queued }
    }

    // ---- what the leader does ----

    /// Takes groups off the front of the queue that fit into one block.
    pub(super) fn take_batch(&self) -> Option<Vec<Pending>> {
        self.lock().take_batch(self.block_bytes)
    }

    /// Takes a batch, and up to `more` further ones if the queue fills their blocks.
    pub(super) fn take_run(&self, more: usize) -> Vec<Vec<Pending>> {
        let mut state = self.lock();
        let mut run: Vec<_> = state.take_batch(self.block_bytes).into_iter().collect();
        while run.len() <= more
            && state.queued_bytes >= self.block_bytes
            && let Some(batch) = state.take_batch(self.block_bytes)
        {
            run.push(batch);
        }
        run
    }

    /// Whether the leader must sync now. `own` is the group that it waits for. `at_once`: sync now,
    /// even if queued groups could share the fsync.
    pub(super) fn wants_sync(&self, own: Option<u64>, at_once: bool) -> bool {
        let state = self.lock();
        // Groups in front of the last one that waits for a sync share that sync.
        let shared = state.queue.front().is_none_or(|front| front.seq >= state.sync_to);
        let own_is_written = own.is_some_and(|own| state.written > own);
        state.latched.is_none()
            && state.sync_to > state.synced
            && state.written > state.synced
            && (shared || own_is_written || at_once)
    }

    /// Everything below `to` is written, into a segment that reserves these numbers.
    pub(super) fn written(&self, to: u64, reserved: Option<&Reserved>) {
        let mut state = self.lock();
        state.written = to;
        state.tasks.wrote(to);
        state.in_hand.written(to);
        state.retry_at = Duration::ZERO;
        if let Some(reserved) = reserved {
            state.limit_seq = reserved.limit_seq;
            state.expiry.note_segment(reserved.losses);
        }
        // Before a sync, which takes long: a reader sees the block, and its append may be done.
        state.wake_reached();
        self.wake(state);
    }

    /// Everything written so far is synced.
    pub(super) fn synced(&self) {
        let mut state = self.lock();
        state.synced = state.written;
    }

    /// The appends in `range` have failed with `error`.
    pub(super) fn fail(&self, range: Range<u64>, error: &Error) {
        let mut state = self.lock();
        state.gave_up |= state.in_hand.take().groups > 0;
        state.fail(range, false, error);
    }

    /// The key may not be used. Groups that were acknowledged go back into the queue and are not
    /// tried before `retry_at`; all others fail with `error`. A group that stays holds nothing of
    /// the budget any more: it may stay for some time, and other Logstores need the room. Once the
    /// queue has expired, no group stays.
    pub(super) fn refuse(&self, batch: Vec<Pending>, error: &Error, retry_at: Duration) -> Dropped {
        let mut state = self.lock();
        let mut dropped = state.refuse(batch, error);
        state.refuse_handed_over(error, &mut dropped);
        if !state.queue.is_empty() {
            state.retry_at = retry_at;
        }
        dropped
    }

    // ---- the loss of the key ----

    /// Drops the queue. It holds only acknowledged groups, and no segment can take them. They are
    /// lost with the `loss`-th loss of the key.
    pub(super) fn lose_queue(&self, loss: u64, error: &Error) -> Dropped {
        let mut state = self.lock();
        if state.queue.is_empty() {
            return Dropped::default();
        }
        let dropped = state.drop_queue();
        state.end_all(error);
        Dropped { loss, error: Some(error.clone()), ..dropped }
    }

    /// The deadline of a loss, the `loss`-th of this key, has passed. Drops the queue: groups that
    /// a caller waits for fail with `error`. Leaves out the batch that the leader has, which may
    /// be in a block by now. Does nothing if a segment was begun after the loss. The caller then
    /// calls [`GroupCommit::finish_expiry`], or leaves that to the thread that has the writer.
    pub(super) fn expire(&self, loss: u64, error: &Error) -> Dropped {
        let mut state = self.lock();
        if !state.expiry.begin(loss, error) {
            return Dropped::default();
        }
        state.open = false;
        let (in_batch, next) = (state.taken.max(state.written), state.next_seq);
        state.fail(in_batch..next, false, error);
        let mut dropped = state.drop_queue();
        state.refuse_handed_over(error, &mut dropped);
        self.progress.notify_all();
        self.wake(state);
        dropped
    }

    /// The loss at whose deadline the queue expired, while [`GroupCommit::finish_expiry`] is due.
    pub(super) fn unfinished_expiry(&self) -> Option<u64> {
        self.lock().expiry.unfinished()
    }

    /// Ends all that was under way when the queue expired. The caller has the writer, and the
    /// segment that was open is abandoned: the batch that the leader may still have is in no block.
    /// With `depose` the leadership ends: another thread may lead, and the resignation of the
    /// deposed leader changes nothing.
    pub(super) fn finish_expiry(&self, depose: bool) -> Dropped {
        let mut state = self.lock();
        state.expiry.finish();
        let mut dropped = state.drop_queue();
        dropped.lost.merge(state.in_hand.take());
        if let Some(error) = state.expiry.error.clone() {
            state.end_all(&error);
            state.refuse_handed_over(&error, &mut dropped);
        }
        state.open = false;
        if depose {
            state.led = None;
        }
        self.progress.notify_all();
        state.wake_reached();
        self.wake(state);
        dropped
    }

    /// Whether the queue has expired, and no segment was begun since.
    pub(super) fn has_expired(&self) -> bool {
        self.lock().expiry.is_in_force()
    }

    /// The error of the loss at whose deadline the queue expired last.
    pub(super) fn expiry_error(&self) -> Option<Error> {
        self.lock().expiry.error.clone()
    }

    /// Whether a segment was begun after the `loss`-th loss of the key.
    pub(super) fn has_begun_after(&self, loss: u64) -> bool {
        self.lock().expiry.begun_after >= loss
    }

    // ---- the writer ----

    /// A caller will wait for the writer. Returns how often its release was signalled so far.
    pub(super) fn want_writer(&self) -> u64 {
        let mut state = self.lock();
        state.writer.wanted += 1;
        state.writer.releases
    }

    /// Waits until the writer has been released since [`GroupCommit::want_writer`] returned `seen`,
    /// or for at most `patience`. Returns at once if `patience` is `None`.
    pub(super) fn await_writer(&self, seen: u64, patience: Option<Duration>) {
        let mut state = self.lock();
        if let Some(patience) = patience
            && state.writer.releases == seen
        {
            state = wait_timeout(&self.progress, state, patience);
        }
        state.writer.wanted -= 1;
    }

    /// A thread has released the writer. Returns as [`GroupCommit::unfinished_expiry`] does.
    pub(super) fn writer_is_free(&self) -> Option<u64> {
        let mut state = self.lock();
        if state.writer.wanted > 0 {
            state.writer.releases += 1;
            self.progress.notify_all();
        }
        state.expiry.unfinished()
    }

    // ---- segments ----

    /// A segment is open and reserves these sequence numbers: submissions are accepted. Does
    /// nothing if the queue has expired since the segment was begun.
    pub(super) fn open(&self, reserved: &Reserved) {
        let mut state = self.lock();
        if reserved.losses < state.expiry.loss {
            return;
        }
        state.expiry.note_segment(reserved.losses);
        if state.queue.is_empty() {
            state.next_seq = state.next_seq.max(reserved.end_seq);
            state.written = state.written.max(reserved.end_seq);
            state.synced = state.synced.max(reserved.end_seq);
        }
        state.limit_seq = reserved.limit_seq;
        if state.queue.is_empty() && state.last_time_us != reserved.last_time_us {
            (state.last_time_us, state.last_at) = (reserved.last_time_us, Duration::ZERO);
        }
        state.open = true;
    }

    /// No segment is open any more: the next submission needs another one.
    pub(super) fn suspend(&self) {
        self.lock().open = false;
    }

    /// The segment was sealed with everything written so far, all of it durable.
    pub(super) fn sealed(&self) {
        let mut state = self.lock();
        state.synced = state.written;
        state.open = false;
    }

    /// Whether submissions are accepted now.
    pub(super) fn is_open(&self) -> Result<bool, Stopped> {
        let mut state = self.lock();
        state.check().map(|()| state.open)
    }

    /// The sequence number that the next segment must begin with at the latest. Numbers of groups
    /// that failed are not handed out again; groups that are still queued go into that segment.
    pub(super) fn next_to_write(&self) -> u64 {
        let state = self.lock();
        state.queue.front().map_or(state.next_seq, |front| front.seq)
    }

    /// One past the last sequence number that was handed out.
    pub(super) fn next_seq(&self) -> u64 {
        self.lock().next_seq
    }

    /// When the next group to be written was received. `None` if the queue is empty.
    pub(super) fn next_time_us(&self) -> Option<u64> {
        self.lock().queue.front().map(|front| front.group.time_us)
    }

    /// Whether a group waits in the queue, or was handed over.
    pub(super) fn has_queued(&self) -> bool {
        let state = self.lock();
        !(state.queue.is_empty() && state.handover.waiting.is_empty())
    }

    /// How many groups wait, and how many bytes they have.
    pub(super) fn queued(&self) -> (usize, usize) {
        let state = self.lock();
        let handed_over = &state.handover.waiting;
        let bytes: usize = handed_over.iter().map(|waiting| waiting.group.bytes.len()).sum();
        (state.queue.len() + handed_over.len(), state.queued_bytes + bytes)
    }

    /// Whether a segment is open, the queue is empty, and no caller leads.
    pub(super) fn is_idle(&self) -> bool {
        let state = self.lock();
        state.led.is_none() && state.queue.is_empty() && state.open
    }

    // ---- a split or a merge ----

    /// Accepts no more submissions: other shards take the range of this one. Groups in the queue,
    /// and those that were handed over, can still be written.
    pub(super) fn retire(&self) {
        self.lock().retired = true;
    }

    /// Accepts submissions again: the split or merge has failed.
    pub(super) fn reinstate(&self) {
        self.lock().retired = false;
    }

    /// Whether other shards take the range of this one, and everything that this one has accepted
    /// is written or has failed. It needs no segment any more.
    pub(super) fn is_done(&self) -> bool {
        let state = self.lock();
        state.retired && state.queue.is_empty() && state.handover.waiting.is_empty()
    }

    /// The shard is read-only for good. Wakes the followers: those that have read everything end.
    pub(super) fn end(&self) {
        let mut state = self.lock();
        state.retired = true;
        state.tasks.end();
        self.wake(state);
    }

    // ---- the end ----

    /// A failure has latched the writer: a failed operation is never retried. Appends that are not
    /// written fail with `error`, and so do written ones for callers that wait for a sync.
    /// Returns how much of the budget the queued groups held.
    pub(super) fn latch(&self, cause: Arc<Error>, error: &Error) -> usize {
        let mut state = self.lock();
        let in_hand = state.in_hand.take();
        state.gave_up |= in_hand.groups > 0
            || state.written > state.synced
            || state.queue.iter().any(|pending| pending.group.acked);
        state.end_all(error);
        let freed = state.forget(error);
        state.open = false;
        state.latched = Some(cause);
        freed
    }

    /// Why the writer is latched, if it is.
    pub(super) fn latch_cause(&self) -> Option<Arc<Error>> {
        self.lock().latched.clone()
    }

    /// Why the writer is latched, if it is and can be reopened: after [`GroupCommit::close`] it
    /// cannot.
    pub(super) fn reopenable(&self) -> Option<Arc<Error>> {
        let state = self.lock();
        if state.closed { None } else { state.latched.clone() }
    }

    /// Removes the latch for a caller that knows of the failure. Returns whether there was one;
    /// after [`GroupCommit::close`] it stays.
    pub(super) fn unlatch(&self) -> bool {
        let mut state = self.lock();
        (state.gave_up, state.unreported) = (false, None);
        !state.closed && state.latched.take().is_some()
    }

    /// Removes the latch, although no caller may know of the failure. If it has ended acknowledged
    /// groups that were not synced, the next caller that submits or syncs gets it, once.
    pub(super) fn unlatch_unasked(&self) {
        let mut state = self.lock();
        if !state.closed
            && let Some(cause) = state.latched.take()
            && std::mem::take(&mut state.gave_up)
        {
            state.unreported = Some(cause);
        }
    }

    /// Accepts no more submissions. Groups in the queue can still be written.
    pub(super) fn close(&self) {
        self.lock().closed = true;
    }

    /// Fails everything that is not written with `error`, and empties the queue. Returns whether
    /// the queue held a group, and how much of the budget its groups held.
    pub(super) fn give_up(&self, error: &Error) -> (bool, usize) {
        let mut state = self.lock();
        let (written, next) = (state.written, state.next_seq);
        state.fail(written..next, false, error);
        let had_groups = !state.queue.is_empty();
        let freed = state.forget(error);
        state.tasks.other_news();
        self.wake(state);
        (had_groups, freed)
    }

    // ---- inside ----

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// After how long the next flush is due: at once if there is work, else when the first group in
    /// the queue has lingered. Notes that the caller schedules it.
    fn schedule_flush(&self, state: &mut State, now: Duration) -> Option<Duration> {
        let front = state.queue.front().map(|front| front.group.submitted);
        let delay = match front {
            _ if state.wants_work(self.block_bytes) => Duration::ZERO,
            Some(submitted) => (submitted + self.linger).saturating_sub(now),
            None => return None,
        };
        state.flush_scheduled = true;
        Some(delay.max(state.retry_at.saturating_sub(now)))
    }

    /// Gives the lock back, and wakes the tasks that there is news for.
    fn wake(&self, mut state: MutexGuard<'_, State>) {
        let woken = state.tasks.take_woken();
        drop(state);
        woken.into_iter().for_each(Waker::wake);
    }

    /// As [`GroupCommit::schedule_flush`], unless a flush is scheduled already.
    fn schedule_missing_flush(&self, state: &mut State, now: Duration) -> Option<Duration> {
        if state.flush_scheduled { None } else { self.schedule_flush(state, now) }
    }
}

/// Appends that failed: all of them, or only those that asked to be synced.
struct Failure {
    range: Range<u64>,
    synced_only: bool,
    error: Error,
}

/// The last loss of the key at whose deadline the shard was not sealed.
#[derive(Default)]
struct Expiry {
    /// The number of that loss; 0 before the first one.
    loss: u64,
    error: Option<Error>,
    /// Whether [`GroupCommit::finish_expiry`] is due.
    unfinished: bool,
    /// How often the key had been lost when the last segment was begun.
    begun_after: u64,
}

impl Expiry {
    /// The deadline of this loss has passed. `false` if a segment was begun after the loss.
    fn begin(&mut self, loss: u64, error: &Error) -> bool {
        if self.begun_after >= loss {
            return false;
        }
        self.loss = self.loss.max(loss);
        self.error = Some(error.clone());
        self.unfinished = true;
        true
    }

    fn finish(&mut self) {
        self.unfinished = false;
    }

    /// The loss, while the expiry is unfinished.
    fn unfinished(&self) -> Option<u64> {
        self.unfinished.then_some(self.loss)
    }

    /// Notes a segment that was begun after so many losses.
    fn note_segment(&mut self, losses: u64) {
        self.begun_after = self.begun_after.max(losses);
    }

    /// Whether no segment was begun since the loss.
    fn is_in_force(&self) -> bool {
        self.loss > self.begun_after
    }
}

/// The callers that wait for the writer of the shard.
#[derive(Default)]
struct WriterDemand {
    wanted: usize,
    /// How often a release was signalled to them.
    releases: u64,
}

/// The acknowledged groups of the batches that the leader has, and one past the last group of each.
#[derive(Default)]
struct InHand(VecDeque<(u64, LostGroups)>);

impl InHand {
    fn add(&mut self, batch: &[Pending]) {
        let mut acked = LostGroups::default();
        for pending in batch.iter().filter(|pending| pending.group.acked) {
            acked.add(pending.seq);
        }
        self.0.extend(batch.last().map(|last| (last.seq + 1, acked)));
    }

    /// Everything below `to` is written.
    fn written(&mut self, to: u64) {
        while self.0.front().is_some_and(|(end, _)| *end <= to) {
            self.0.pop_front();
        }
    }

    /// The leader has none any more. Returns the groups.
    fn take(&mut self) -> LostGroups {
        let mut all = LostGroups::default();
        self.0.drain(..).for_each(|(_, acked)| all.merge(acked));
        all
    }
}

#[derive(Default)]
struct State {
    /// Whether a segment reserves the numbers that are handed out.
    open: bool,
    closed: bool,
    /// Whether other shards take the range of this one.
    retired: bool,
    latched: Option<Arc<Error>>,

    /// The next sequence number to hand out, and the first one that is not reserved.
    next_seq: u64,
    limit_seq: u64,
    /// The last receive time that was given out, and the uptime at that moment, if it is known.
    last_time_us: u64,
    last_at: Duration,

    queue: VecDeque<Pending>,
    queued_bytes: usize,
    /// One past the last group that was taken off the queue.
    taken: u64,
    in_hand: InHand,
    /// Whether the failure that has latched the writer has ended acknowledged groups that were not
    /// synced: they may be lost.
    gave_up: bool,
    /// Such a failure, after the latch was removed unasked.
    unreported: Option<Arc<Error>>,
    /// Everything below is written.
    written: u64,
    /// Everything below is synced.
    synced: u64,
    /// Everything below is to be written now.
    flush_to: u64,
    /// Everything below is to be synced now.
    sync_to: u64,

    /// The leadership that is under way, and the number of the last one.
    led: Option<Term>,
    terms: u64,
    /// How many callers of [`GroupCommit::lead`] wait for their turn. Followers let them go first:
    /// otherwise one follower after the other would lead, and they would wait for ever.
    claims: usize,

    flush_scheduled: bool,
    /// No flush is scheduled before: the key could not be used.
    retry_at: Duration,

    expiry: Expiry,
    writer: WriterDemand,

    /// How many callers may still ask for an outcome. Failures are remembered for them.
    askers: usize,
    failures: Vec<Failure>,

    handover: Handover,
    tasks: Tasks,
}

impl State {
    fn check(&mut self) -> Result<(), Stopped> {
        if self.closed {
            return Err(Stopped::Closed);
        }
        self.check_latch()
    }

    /// Returns the failure that has latched the writer, or an earlier one that no caller knows of.
    fn check_latch(&mut self) -> Result<(), Stopped> {
        let cause = self.latched.clone().or_else(|| self.unreported.take());
        cause.map_or(Ok(()), |cause| Err(Stopped::Latched(cause)))
    }

    fn outcome(&self, seq: u64, durability: Durability) -> Option<Result<()>> {
        if durability == Durability::Buffered {
            return Some(Ok(()));
        }
        let hit = |failure: &&Failure| {
            failure.range.contains(&seq)
                && (!failure.synced_only || durability == Durability::Synced)
        };
        if let Some(failure) = self.failures.iter().find(hit) {
            return Some(Err(failure.error.clone()));
        }
        let reached = if durability == Durability::Synced { self.synced } else { self.written };
        (seq < reached).then_some(Ok(()))
    }

    fn want(&mut self, seq: u64, durability: Durability) {
        self.flush_to = self.flush_to.max(seq + 1);
        if durability == Durability::Synced {
            self.sync_to = self.sync_to.max(seq + 1);
        }
    }

    fn outcome_of(&self, claim: Claim, durability: Durability) -> Option<Result<u64>> {
        match self.handover.seq_of(claim) {
            Ok(Some(seq)) => Some(self.outcome(seq, durability)?.map(|()| seq)),
            Ok(None) => None,
            Err(error) => Some(Err(error)),
        }
    }

    /// Notes the tasks whose groups are written or synced by now.
    fn wake_reached(&mut self) {
        self.tasks.reached(self.written, self.synced);
    }

    /// Gives `group` the next sequence number and puts it into the queue.
    fn push(&mut self, mut group: Group) -> u64 {
        let seq = self.next_seq;
        self.next_seq += 1;
        let behind_us = self.last_time_us.saturating_sub(group.time_us);
        // A thread that reaches the lock late has read the clock earlier.
        let late_us = self.last_at.saturating_sub(group.submitted).as_micros();
        let late_us = u64::try_from(late_us).unwrap_or(u64::MAX);
        if behind_us == 0 || behind_us > late_us.saturating_add(CLOCK_SLACK_US) {
            (self.last_time_us, self.last_at) = (group.time_us, group.submitted);
        }
        group.time_us = self.last_time_us;
        self.queued_bytes += group.bytes.len();
        self.queue.push_back(Pending { seq, group });
        seq
    }

    /// Puts the groups that were handed over into the queue, as far as there are numbers for them.
    fn place_handed_over(&mut self) {
        while self.next_seq < self.limit_seq
            && let Some(HandedOver { number, group, durability, asked }) =
                self.handover.waiting.pop_front()
        {
            let seq = self.push(group);
            if durability == Durability::Buffered {
                self.tasks.wake(&mut self.handover.awaiting, number..number + 1);
            } else {
                self.want(seq, durability);
                // The task awaits the group itself from now on.
                if let Some(waker) = self.handover.awaiting.remove(number) {
                    self.tasks.await_group(seq, durability, &waker);
                }
            }
            if asked {
                self.handover.places.insert(number, Place::Seq(seq));
            }
        }
    }

    fn refuse_handed_over(&mut self, error: &Error, dropped: &mut Dropped) {
        let waiting = std::mem::take(&mut self.handover.waiting);
        for HandedOver { number, group, asked, .. } in waiting {
            dropped.freed += group.charged;
            dropped.groups.push(group.bytes);
            if asked {
                self.handover.places.insert(number, Place::Refused(error.clone()));
                self.tasks.wake(&mut self.handover.awaiting, number..number + 1);
            }
        }
    }

    fn leave(&mut self) {
        self.askers -= 1;
        if self.askers == 0 {
            self.failures.clear();
        }
    }

    fn fail(&mut self, range: Range<u64>, synced_only: bool, error: &Error) {
        if range.is_empty() || self.askers == 0 {
            return;
        }
        self.tasks.failed(range.clone(), synced_only);
        match self.failures.last_mut() {
            // A refusal fails the queued groups one by one, each with the same error.
            Some(last)
                if last.range.end == range.start
                    && last.synced_only == synced_only
                    && std::mem::discriminant(&last.error) == std::mem::discriminant(error) =>
            {
                last.range.end = range.end;
            }
            _ => self.failures.push(Failure { range, synced_only, error: error.clone() }),
        }
    }

    fn take_batch(&mut self, list_bytes_max: usize) -> Option<Vec<Pending>> {
        let first = self.queue.pop_front()?;
        let first_time_us = first.group.time_us;
        let mut list_bytes = group::frame_len(first.group.bytes.len());
        self.queued_bytes -= first.group.bytes.len();
        let mut batch = vec![first];
        while let Some(next) = self.queue.front()
            && let Some(last) = batch.last()
            && next.group.kind == last.group.kind
            && next.seq == last.seq + 1
            && list_bytes + group::frame_len(next.group.bytes.len()) <= list_bytes_max
            // A block stores receive times as 32-bit differences from its first one.
            && next.group.time_us >= last.group.time_us
            && next.group.time_us - first_time_us <= u64::from(u32::MAX)
            && batch.len() < BLOCK_GROUPS_MAX as usize
        {
            list_bytes += group::frame_len(next.group.bytes.len());
            self.queued_bytes -= next.group.bytes.len();
            batch.extend(self.queue.pop_front());
        }
        self.taken = batch.last().map_or(self.taken, |last| last.seq + 1);
        self.in_hand.add(&batch);
        Some(batch)
    }

    /// Whether a caller leads, or has claimed the leadership.
    fn is_led(&self) -> bool {
        self.led.is_some() || self.claims > 0
    }

    fn begin_term(&mut self) -> Term {
        self.terms += 1;
        let term = Term(self.terms);
        self.led = Some(term);
        term
    }

    fn wants_work(&self, block_bytes: usize) -> bool {
        let front = self.queue.front().map(|pending| pending.seq);
        front.is_some_and(|seq| seq < self.flush_to || self.queued_bytes >= block_bytes)
            || (self.sync_to > self.synced && self.written > self.synced)
    }

    fn refuse(&mut self, batch: Vec<Pending>, error: &Error) -> Dropped {
        let (mut dropped, mut kept) = (self.nothing_dropped(), VecDeque::new());
        let queued = std::mem::take(&mut self.queue);
        for mut pending in batch.into_iter().chain(queued) {
            if pending.group.acked && !self.expiry.is_in_force() {
                dropped.freed += std::mem::take(&mut pending.group.charged);
                kept.push_back(pending);
                continue;
            }
            if !pending.group.acked {
                self.fail(pending.seq..pending.seq + 1, false, error);
            }
            dropped.add(pending);
        }
        self.queued_bytes = kept.iter().map(|pending| pending.group.bytes.len()).sum();
        self.queue = kept;
        self.in_hand.take();
        self.taken = self.written;
        dropped
    }

    fn nothing_dropped(&self) -> Dropped {
        Dropped { loss: self.expiry.loss, error: self.expiry.error.clone(), ..Dropped::default() }
    }

    fn drop_queue(&mut self) -> Dropped {
        let mut dropped = self.nothing_dropped();
        self.queued_bytes = 0;
        self.queue.drain(..).for_each(|pending| dropped.add(pending));
        dropped
    }

    /// Ends every append that is under way: those that are not written fail with `error`, and so do
    /// written ones for callers that wait for a sync.
    fn end_all(&mut self, error: &Error) {
        let (synced, written, next) = (self.synced, self.written, self.next_seq);
        self.fail(synced..written, true, error);
        self.fail(written..next, false, error);
        (self.taken, self.written, self.synced) = (next, next, next);
    }

    /// Empties the queue. Groups that were handed over fail with `error`. Returns how much of the
    /// budget all these groups held.
    fn forget(&mut self, error: &Error) -> usize {
        let mut handed_over = Dropped::default();
        self.refuse_handed_over(error, &mut handed_over);
        self.queued_bytes = 0;
        let queued: usize = self.queue.drain(..).map(|pending| pending.group.charged).sum();
        queued + handed_over.freed
    }
}

// Under `cfg(shuttle)` a lock works only inside of a schedule.
#[cfg(all(test, not(shuttle)))]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::thread;

    use super::*;

    const LINGER: Duration = Duration::from_millis(100);
    const NOW: Duration = Duration::ZERO;

    fn group(len: usize, time_us: u64, acked: bool) -> Group {
        Group {
            kind: BlockKind::Opaque,
            bytes: Bytes::from(vec![0; len]),
            logs: 0,
            charged: len + 1,
            time_us,
            submitted: Duration::ZERO,
            acked,
        }
    }

    /// With a segment open that reserves every sequence number.
    fn open(block_bytes: usize) -> GroupCommit {
        let commit = GroupCommit::new(block_bytes, LINGER);
        commit.open(&Reserved { end_seq: 0, limit_seq: u64::MAX, last_time_us: 0, losses: 0 });
        commit
    }

    fn submit(commit: &GroupCommit, group: Group) -> Submitted {
        let Ok(submitted) = commit.submit(group) else { panic!("not accepted") };
        submitted
    }

    fn submit_all(commit: &GroupCommit, groups: impl IntoIterator<Item = Group>) {
        for group in groups {
            submit(commit, group);
        }
    }

    fn numbers(batch: Option<Vec<Pending>>) -> Vec<u64> {
        batch.iter().flatten().map(|pending| pending.seq).collect()
    }

    #[test]
    fn a_batch_counts_the_frames_too() {
        let filled = |block_bytes| {
            let commit = open(block_bytes);
            submit_all(&commit, (0..4).map(|_| group(100, 0, false)));
            commit
        };
        let commit = filled(3 * 102);
        assert_eq!(numbers(commit.take_batch()), [0, 1, 2]);
        assert_eq!(commit.lock().queued_bytes, 100);
        assert_eq!(commit.lock().taken, 3);
        let commit = filled(3 * 102 - 1);
        assert_eq!(numbers(commit.take_batch()), [0, 1]);
        assert_eq!(numbers(commit.take_batch()), [2, 3]);
        assert_eq!(numbers(filled(1).take_batch()), [0]);
    }

    #[test]
    fn a_run_has_further_batches_only_if_they_are_full() {
        let filled = || {
            let commit = open(2 * 102);
            submit_all(&commit, (0..7).map(|_| group(100, 0, true)));
            commit
        };
        let seqs = |run: Vec<Vec<Pending>>| -> Vec<Vec<u64>> {
            run.into_iter().map(|batch| numbers(Some(batch))).collect()
        };
        assert_eq!(seqs(filled().take_run(0)), [[0, 1]]);
        let commit = filled();
        assert_eq!(seqs(commit.take_run(7)), [vec![0, 1], vec![2, 3], vec![4, 5]]);
        assert_eq!(seqs(commit.take_run(7)), [[6]]);
        assert!(commit.take_run(7).is_empty());
    }

    #[test]
    fn the_groups_in_hand_are_those_that_are_not_written() {
        let commit = open(2 * 102);
        submit_all(&commit, (0..7).map(|n| group(100, 0, n != 3)));
        assert_eq!(commit.take_run(7).len(), 3);
        commit.written(2, None);
        // With the one that is queued.
        let lost = commit.finish_expiry(false).lost;
        assert_eq!(lost, LostGroups { groups: 4, first_seq: 2, last_seq: 6 });
    }

    #[test]
    fn a_batch_ends_where_its_receive_times_no_longer_fit() {
        let far = u64::from(u32::MAX);
        let commit = open(1000);
        submit_all(&commit, [5, far + 5, far + 6].map(|time_us| group(1, time_us, true)));
        assert_eq!(numbers(commit.take_batch()), [0, 1]);
        assert_eq!(numbers(commit.take_batch()), [2]);
    }

    #[test]
    fn receive_times_do_not_run_backwards() {
        let commit = open(1000);
        submit_all(&commit, [5, 3, 7].map(|time_us| group(1, time_us, true)));
        let times: Vec<_> =
            commit.take_batch().unwrap().iter().map(|pending| pending.group.time_us).collect();
        assert_eq!(times, [5, 5, 7]);
    }

    #[test]
    fn groups_are_accepted_while_numbers_are_reserved() {
        let commit = GroupCommit::new(1000, LINGER);
        let Err(Rejected::NotOpen(back)) = commit.submit(group(1, 0, true)) else { panic!() };
        commit.open(&Reserved { end_seq: 7, limit_seq: 8, last_time_us: 50, losses: 0 });
        assert_eq!(submit(&commit, back).seq, 7);
        assert!(matches!(commit.submit(group(1, 0, true)), Err(Rejected::Exhausted)));
        commit.close();
        assert!(matches!(
            commit.submit(group(1, 0, true)),
            Err(Rejected::Stopped(Stopped::Closed))
        ));
        assert_eq!(commit.take_batch().unwrap()[0].group.time_us, 50);
    }

    #[test]
    fn a_flush_is_due_when_a_group_has_lingered_or_a_block_is_full() {
        let commit = open(100);
        assert_eq!(submit(&commit, group(1, 0, true)).flush, Some(LINGER));
        assert_eq!(submit(&commit, group(1, 0, true)).flush, None);
        assert_eq!(submit(&commit, group(98, 0, true)).flush, Some(Duration::ZERO));
        assert_eq!(commit.take_batch().map(|batch| batch.len()), Some(2));
        commit.written(2, None);
        // The rest has not lingered yet.
        commit.begin_flush(Duration::ZERO, false);
        let Flush::Idle(Some(LINGER)) = commit.lead_if_due(Duration::ZERO) else { panic!() };
        commit.begin_flush(LINGER, false);
        let Flush::Leader(term) = commit.lead_if_due(LINGER) else { panic!() };
        let Flush::Busy = commit.lead_if_due(LINGER) else { panic!() };
        assert_eq!(commit.take_batch().map(|batch| batch.len()), Some(1));
        commit.written(3, None);
        assert_eq!(commit.resign(term, LINGER, None).flush, None);
        assert!(commit.is_idle());
    }

    #[test]
    fn groups_before_the_last_waiter_share_its_sync() {
        let commit = open(1);
        for seq in 0..3 {
            submit(&commit, group(1, 0, false));
            commit.hasten(seq, Durability::Synced, Duration::ZERO);
        }
        let mut wants = Vec::new();
        for to in 1..4 {
            commit.take_batch().unwrap();
            commit.written(to, None);
            assert_eq!(
                commit.outcome(Claim::Seq(to - 1), Durability::Written).map(|done| done.is_ok()),
                Some(true)
            );
            wants.push((
                commit.wants_sync(None, false),
                commit.wants_sync(Some(1), false),
                commit.wants_sync(None, true),
            ));
        }
        assert_eq!(wants, [(false, false, true), (false, true, true), (true, true, true)]);
        assert!(commit.outcome(Claim::Seq(2), Durability::Synced).is_none());
        commit.synced();
        assert!(commit.outcome(Claim::Seq(2), Durability::Synced).unwrap().is_ok());
        assert!(!commit.wants_sync(None, true));
        let Ok(None) = commit.begin_sync() else { panic!() };
    }

    #[test]
    fn a_latch_fails_unwritten_groups_and_waits_for_a_sync() {
        let (error, cause) = (Error::Closed("the file"), Arc::new(Error::Closed("the disk")));
        let commit = open(1);
        submit_all(&commit, (0..3).map(|_| group(1, 0, true)));
        commit.take_batch().unwrap();
        commit.written(1, None);
        assert_eq!(commit.latch(Arc::clone(&cause), &error), 4);
        assert!(commit.outcome(Claim::Seq(0), Durability::Written).unwrap().is_ok());
        assert!(commit.outcome(Claim::Seq(0), Durability::Synced).unwrap().is_err());
        assert!(commit.outcome(Claim::Seq(1), Durability::Written).unwrap().is_err());
        assert!(matches!(
            commit.submit(group(1, 0, true)),
            Err(Rejected::Stopped(Stopped::Latched(_)))
        ));
        assert!(commit.unlatch() && !commit.unlatch());
        // The next segment continues behind the numbers that were handed out.
        let Ok(false) = commit.is_open() else { panic!() };
        assert_eq!((commit.next_seq(), commit.next_to_write(), commit.has_queued()), (3, 3, false));
        commit.latch(cause, &error);
        commit.close();
        assert!(!commit.unlatch());
    }

    #[test]
    fn however_many_appends_fail_none_is_taken_for_done_later() {
        let error = Error::Closed("the key");
        let commit = open(1000);
        submit_all(&commit, (0..20_000).map(|seq| group(1, 0, seq % 3 == 0)));
        let Dropped { groups, freed, lost, .. } = commit.refuse(Vec::new(), &error, LINGER);
        assert_eq!((groups.len(), lost), (13_333, LostGroups::default()));
        {
            let state = commit.lock();
            assert_eq!((freed, state.queue.len(), state.queued_bytes), (40_000, 6_667, 6_667));
            assert!(
                state.queue.iter().all(|pending| pending.group.acked && pending.group.charged == 0)
            );
        }
        // Access to the key returns, and later groups are written and synced.
        commit.written(30_000, None);
        commit.synced();
        for seq in 0..20_000 {
            let failed = seq % 3 != 0;
            for durability in [Durability::Written, Durability::Synced] {
                assert_eq!(
                    commit.outcome(Claim::Seq(seq), durability).unwrap().is_err(),
                    failed,
                    "{seq}"
                );
            }
            assert!(commit.outcome(Claim::Seq(seq), Durability::Buffered).unwrap().is_ok());
        }
        (0..20_000).for_each(|_| commit.leave());
        assert!(commit.lock().failures.is_empty());
    }

    #[test]
    fn adjacent_failures_are_remembered_as_one() {
        let error = Error::Closed("the key");
        let commit = open(1000);
        submit(&commit, group(1, 0, true));
        for seq in 0..1000 {
            commit.fail(seq..seq + 1, &error);
        }
        commit.lock().fail(1000..1001, true, &error);
        assert_eq!(commit.lock().failures.len(), 2);
        assert!(commit.outcome(Claim::Seq(999), Durability::Written).unwrap().is_err());
        assert!(commit.outcome(Claim::Seq(1000), Durability::Written).is_none());
        assert!(commit.outcome(Claim::Seq(1000), Durability::Synced).unwrap().is_err());
    }

    /// The leader has a batch in hand, and groups are queued behind it.
    fn expiring() -> (GroupCommit, Term, Vec<Pending>) {
        let commit = open(6);
        for acked in [true, false, true, true, false, true] {
            submit(&commit, group(1, 0, acked));
        }
        let term = commit.lead();
        let batch = commit.take_batch().unwrap();
        assert_eq!(batch.len(), 2);
        (commit, term, batch)
    }

    fn is_lost(commit: &GroupCommit, seq: u64, durability: Durability) -> bool {
        matches!(commit.outcome(Claim::Seq(seq), durability), Some(Err(Error::Closed("the key"))))
    }

    #[test]
    fn an_expired_queue_keeps_nothing_but_the_batch_that_is_in_hand() {
        let error = Error::Closed("the key");
        for writes in [false, true] {
            let (commit, term, batch) = expiring();
            let dropped = commit.expire(1, &error);
            let expected = LostGroups { groups: 3, first_seq: 2, last_seq: 5 };
            assert_eq!((dropped.lost, dropped.freed, dropped.groups.len()), (expected, 8, 4));
            assert!(commit.has_expired() && commit.unfinished_expiry() == Some(1));
            // A caller that waits knows, and no group is accepted.
            assert!(is_lost(&commit, 4, Durability::Written));
            assert!(commit.outcome(Claim::Seq(1), Durability::Written).is_none());
            assert!(matches!(commit.submit(group(1, 0, true)), Err(Rejected::NotOpen(_))));
            let in_hand = if writes {
                commit.written(2, None);
                commit.finish_expiry(false)
            } else {
                let dropped = commit.refuse(batch, &error, LINGER);
                assert_eq!(dropped.lost, LostGroups { groups: 1, first_seq: 0, last_seq: 0 });
                assert!(!commit.has_queued());
                commit.finish_expiry(false)
            };
            assert_eq!(in_hand.lost, LostGroups::default());
            assert_eq!(is_lost(&commit, 1, Durability::Written), !writes);
            assert!(is_lost(&commit, 1, Durability::Synced));
            commit.resign(term, NOW, None);
            // Only a segment that was begun since takes groups again.
            let begun_after = |losses| {
                commit.open(&Reserved { end_seq: 0, limit_seq: 9, last_time_us: 0, losses });
                matches!(commit.is_open(), Ok(true))
            };
            assert!(!begun_after(0) && begun_after(1) && !commit.has_expired());
            assert_eq!(submit(&commit, group(1, 0, true)).seq, 6);
            assert_eq!(commit.expire(1, &error).lost.groups, 0, "it is too late for that loss");
            assert_eq!(commit.expire(2, &error).lost.groups, 1);
        }
    }

    #[test]
    fn a_leader_that_is_deposed_has_no_say() {
        let error = Error::Closed("the key");
        let (commit, term, _batch) = expiring();
        assert_eq!(commit.expire(1, &error).lost.groups, 3);
        assert_eq!(
            commit.finish_expiry(true).lost,
            LostGroups { groups: 1, first_seq: 0, last_seq: 0 }
        );
        assert_eq!(commit.unfinished_expiry(), None);
        assert!(is_lost(&commit, 1, Durability::Written));
        let next = commit.lead_within(Duration::ZERO).unwrap();
        commit.resign(term, NOW, None);
        assert!(commit.lead_within(Duration::ZERO).is_none(), "the next one still leads");
        commit.resign(next, NOW, None);
        assert!(commit.lead_within(Duration::ZERO).is_some());
    }

    /// Otherwise the caller would lead again and again, with nothing to write.
    #[test]
    fn a_caller_that_waits_for_lost_groups_is_told() {
        let error = Error::Closed("the key");
        let commit = open(1000);
        submit(&commit, group(1, 0, true));
        let Ok(Some(0)) = commit.begin_sync() else { panic!() };
        let term = commit.lead();
        let dropped = commit.lose_queue(7, &error);
        assert_eq!((dropped.lost.groups, dropped.loss), (1, 7));
        let resigned = commit.resign(term, NOW, Some((0, Durability::Synced)));
        assert!(matches!(resigned.outcome, Some(Err(Error::Closed("the key")))));
        let Ok(None) = commit.begin_sync() else { panic!() };
        assert_eq!(commit.lose_queue(7, &error).lost.groups, 0);
    }

    #[test]
    fn a_claim_that_is_given_up_stands_in_no_followers_way() {
        let commit = open(1000);
        let term = commit.lead();
        assert!(commit.lead_within(Duration::from_millis(1)).is_none());
        commit.resign(term, NOW, None);
        submit(&commit, group(1, 0, false));
        let Role::Leader(_) = commit.wait_or_lead(0, Durability::Written) else { panic!() };
    }

    #[test]
    fn one_leads_and_the_others_follow() {
        let commit = open(1 << 10);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        let seq = submit(&commit, group(1, 0, false)).seq;
                        let mut role = commit.wait_or_lead(seq, Durability::Synced);
                        while let Role::Leader(term) = role {
                            let batch = commit.take_batch().unwrap();
                            commit.written(batch.last().unwrap().seq + 1, None);
                            commit.synced();
                            let resigned =
                                commit.resign(term, NOW, Some((seq, Durability::Synced)));
                            role = match resigned.outcome {
                                Some(outcome) => Role::Done(outcome),
                                None => commit.wait_or_lead(seq, Durability::Synced),
                            };
                        }
                        commit.leave();
                    }
                });
            }
        });
        assert_eq!(commit.next_seq(), 800);
        assert_eq!(commit.lock().synced, 800);
        assert!(commit.is_idle());
    }
}
