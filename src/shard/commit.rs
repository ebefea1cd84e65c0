//! Group commit: many appends share one write and one fsync.
//!
//! Callers submit groups and wait until a watermark, *written* or *synced*, has passed the sequence
//! number of their group. The first caller to wait becomes the leader: it takes a batch off the
//! queue, writes and syncs it, and reports how far that got. The other callers are followers: they
//! sleep until the leader resigns. Groups that arrive meanwhile form the next batch.
//!
//! A [`GroupCommit`] does no I/O and uses no key. It elects the leader, forms the next batch, tells
//! the leader when to call fsync, and remembers the appends that failed. The leader writes and
//! syncs, and reports the results with [`GroupCommit::written`], [`GroupCommit::synced`],
//! [`GroupCommit::fail`] and [`GroupCommit::refuse`]. A `GroupCommit` has one lock. A thread holds
//! it for memory operations only, and takes no other lock of the shard under it.
//!
//! `tests/shuttle/tests/commit.rs` compiles this file by itself and explores its schedules.

use std::{collections::VecDeque, ops::Range, sync::Arc, task::Waker, time::Duration};

use bytes::Bytes;

use super::Durability;
use crate::{
    Error, Result, group,
    segment::{BLOCK_GROUPS_MAX, BlockKind},
    sync::{Condvar, LockRank, Mutex, MutexGuard, lock, wait},
};

/// The queue, the watermarks and the leadership of one shard.
pub(super) struct GroupCommit {
    /// The most bytes that the list of a batch has. A queue with more of them is written at once.
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
    /// When it was received, in microseconds since the Unix epoch. Receive times never run
    /// backwards within a shard, so that a reader can search by time: [`GroupCommit::submit`]
    /// raises this to the one before it.
    pub(super) time_us: u64,
    /// When it was submitted, by the uptime.
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
}

/// What a caller that waits for a group does next.
pub(super) enum Role {
    /// Return this outcome.
    Done(Result<()>),
    /// Lead: take a batch, write it, then [`GroupCommit::resign`].
    Leader,
}

/// What a flush job does next.
pub(super) enum Flush {
    /// Lead: take a batch, write it, then [`GroupCommit::resign`].
    Leader,
    /// Nothing: the current leader looks at the queue when it resigns.
    Busy,
    /// Nothing is due. The caller must schedule the next flush, if there is one.
    Idle(Option<Duration>),
}

/// How things stand after a leader has resigned.
pub(super) struct Resigned {
    /// After how long the caller must schedule a flush, if it must.
    pub(super) flush: Option<Duration>,
    /// The outcome of the group that the leader waits for, if it waits for one.
    pub(super) outcome: Option<Result<()>>,
    /// Whether that group is still not written.
    pub(super) is_queued: bool,
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

    /// Gives `group` the next sequence number and puts it into the queue.
    pub(super) fn submit(&self, mut group: Group) -> Result<Submitted, Rejected> {
        let mut state = self.lock();
        state.check().map_err(Rejected::Stopped)?;
        if !state.open {
            return Err(Rejected::NotOpen(group));
        }
        if state.next_seq >= state.limit_seq {
            return Err(Rejected::Exhausted);
        }
        let (seq, now) = (state.next_seq, group.submitted);
        state.next_seq += 1;
        group.time_us = group.time_us.max(state.last_time_us);
        state.last_time_us = group.time_us;
        let was_full = state.queued_bytes >= self.block_bytes;
        state.queued_bytes += group.bytes.len();
        state.queue.push_back(Pending { seq, group });
        let fills = !was_full && state.queued_bytes >= self.block_bytes;
        let due = fills || !state.flush_scheduled;
        let flush = if due { self.schedule_flush(&mut state, now) } else { None };
        state.askers += 1;
        Ok(Submitted { seq, flush })
    }

    /// An asker is done. When the last one is, no failure needs to be remembered any longer.
    pub(super) fn leave(&self) {
        self.lock().leave();
    }

    /// Whether the append of `seq` has succeeded or failed; `None` while it is under way.
    pub(super) fn outcome(&self, seq: u64, durability: Durability) -> Option<Result<()>> {
        self.lock().outcome(seq, durability)
    }

    /// As [`GroupCommit::outcome`]. While the append is under way, `waker` is woken whenever the
    /// leader resigns.
    pub(super) fn poll(
        &self,
        seq: u64,
        durability: Durability,
        waker: &Waker,
    ) -> Option<Result<()>> {
        let mut state = self.lock();
        let outcome = state.outcome(seq, durability);
        if outcome.is_none() && !state.wakers.iter().any(|known| known.will_wake(waker)) {
            state.wakers.push(waker.clone());
        }
        outcome
    }

    /// Has a group written, and synced if `durability` says so, although no caller waits for it.
    /// Returns after how long the caller must schedule a flush, if it must.
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
        if state.led { None } else { self.schedule_flush(&mut state, now) }
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
                state.led = true;
                return Role::Leader;
            }
            state = wait(&self.progress, state);
        }
    }

    /// The last sequence number that must be synced so that everything submitted so far is;
    /// `None` if all of it is synced. The caller is an asker after `Some`.
    pub(super) fn begin_sync(&self) -> Result<Option<u64>, Stopped> {
        let mut state = self.lock();
        if let Some(cause) = &state.latched {
            return Err(Stopped::Latched(Arc::clone(cause)));
        }
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
        state.led = true;
        Flush::Leader
    }

    /// Takes the leadership. Waits for the current leader, but not for followers.
    pub(super) fn lead(&self) {
        let mut state = self.lock();
        state.claims += 1;
        while state.led {
            state = wait(&self.progress, state);
        }
        state.claims -= 1;
        state.led = true;
    }

    /// Takes the leadership, unless another caller has it or waits for it. Returns whether it did.
    pub(super) fn try_lead(&self) -> bool {
        let mut state = self.lock();
        let free = !state.is_led();
        state.led |= free;
        free
    }

    /// Gives up the leadership and wakes the followers. `own` is the group that the leader waits
    /// for, if it waits for one.
    pub(super) fn resign(&self, now: Duration, own: Option<(u64, Durability)>) -> Resigned {
        let mut state = self.lock();
        state.led = false;
        let flush = self.schedule_missing_flush(&mut state, now);
        self.progress.notify_all();
        for waker in state.wakers.drain(..) {
            waker.wake();
        }
        let outcome = own.and_then(|(seq, durability)| state.outcome(seq, durability));
        let is_queued = own.is_some_and(|(seq, _)| seq >= state.written);
        Resigned { flush, outcome, is_queued }
    }

    // ---- what the leader does ----

    /// Takes groups off the front of the queue that fit into one block.
    pub(super) fn take_batch(&self) -> Option<Vec<Pending>> {
        self.lock().take_batch(self.block_bytes)
    }

    /// Whether the leader must sync now. `own` is the group that it waits for; `at_once` does not
    /// put the fsync off to share it with groups that are still queued.
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

    /// Everything below `to` is written, into a segment that reserves the numbers below
    /// `limit_seq`.
    pub(super) fn written(&self, to: u64, limit_seq: Option<u64>) {
        let mut state = self.lock();
        state.written = to;
        state.retry_at = Duration::ZERO;
        state.limit_seq = limit_seq.unwrap_or(state.limit_seq);
    }

    /// Everything written so far is synced.
    pub(super) fn synced(&self) {
        let mut state = self.lock();
        state.synced = state.written;
    }

    /// The appends in `range` have failed with `error`.
    pub(super) fn fail(&self, range: Range<u64>, error: &Error) {
        self.lock().fail(range, false, error);
    }

    /// The key may not be used. Groups that were acknowledged go back into the queue and are not
    /// tried before `retry_at`; all others fail with `error`. Returns how much of the budget the
    /// groups held. A group that stays holds none of it any more: it may stay for long, and other
    /// Logstores need the room.
    pub(super) fn refuse(&self, batch: Vec<Pending>, error: &Error, retry_at: Duration) -> usize {
        let mut state = self.lock();
        let freed = state.refuse(batch, error);
        if !state.queue.is_empty() {
            state.retry_at = retry_at;
        }
        freed
    }

    // ---- segments ----

    /// A segment is open and reserves these sequence numbers: submissions are accepted.
    pub(super) fn open(&self, reserved: &Reserved) {
        let mut state = self.lock();
        if state.queue.is_empty() {
            state.next_seq = state.next_seq.max(reserved.end_seq);
            state.written = state.written.max(reserved.end_seq);
            state.synced = state.synced.max(reserved.end_seq);
        }
        state.limit_seq = reserved.limit_seq;
        state.last_time_us = state.last_time_us.max(reserved.last_time_us);
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
        let state = self.lock();
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

    /// Whether a group waits in the queue.
    pub(super) fn has_queued(&self) -> bool {
        !self.lock().queue.is_empty()
    }

    /// Whether a segment is open, the queue is empty, and no caller leads.
    pub(super) fn is_idle(&self) -> bool {
        let state = self.lock();
        !state.led && state.queue.is_empty() && state.open
    }

    // ---- the end ----

    /// A failure has latched the writer: nothing is tried again as if it had worked. Appends that
    /// are not written fail with `error`, and so do written ones for callers that wait for a sync.
    /// Returns how much of the budget the queued groups held.
    pub(super) fn latch(&self, cause: Arc<Error>, error: &Error) -> usize {
        let mut state = self.lock();
        let (synced, written, next) = (state.synced, state.written, state.next_seq);
        state.fail(synced..written, true, error);
        state.fail(written..next, false, error);
        let freed = state.forget();
        state.written = next;
        state.synced = next;
        state.open = false;
        state.latched = Some(cause);
        freed
    }

    /// Why the writer is latched, if it is.
    pub(super) fn latch_cause(&self) -> Option<Arc<Error>> {
        self.lock().latched.clone()
    }

    /// Removes the latch. Returns whether there was one; after [`GroupCommit::close`] it stays.
    pub(super) fn unlatch(&self) -> bool {
        let mut state = self.lock();
        !state.closed && state.latched.take().is_some()
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
        (!state.queue.is_empty(), state.forget())
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

#[derive(Default)]
struct State {
    /// Whether a segment reserves the numbers that are handed out.
    open: bool,
    closed: bool,
    latched: Option<Arc<Error>>,

    /// The next sequence number to hand out, and the first one that is not reserved.
    next_seq: u64,
    limit_seq: u64,
    last_time_us: u64,

    queue: VecDeque<Pending>,
    queued_bytes: usize,
    /// One past the last group that was taken off the queue.
    taken: u64,
    /// Everything below is written.
    written: u64,
    /// Everything below is synced.
    synced: u64,
    /// Everything below is to be written now.
    flush_to: u64,
    /// Everything below is to be synced now.
    sync_to: u64,

    /// Whether a caller leads.
    led: bool,
    /// How many callers of [`GroupCommit::lead`] wait for their turn. Followers let them go first:
    /// otherwise one follower after the other would lead, and they would wait for ever.
    claims: usize,

    flush_scheduled: bool,
    /// No flush is scheduled before: the key could not be used.
    retry_at: Duration,

    /// How many callers may still ask for an outcome. Failures are remembered for them.
    askers: usize,
    failures: Vec<Failure>,
    wakers: Vec<Waker>,
}

impl State {
    fn check(&self) -> Result<(), Stopped> {
        if self.closed {
            return Err(Stopped::Closed);
        }
        self.latched.as_ref().map_or(Ok(()), |cause| Err(Stopped::Latched(Arc::clone(cause))))
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
            && next.group.time_us - first_time_us <= u64::from(u32::MAX)
            && batch.len() < BLOCK_GROUPS_MAX as usize
        {
            list_bytes += group::frame_len(next.group.bytes.len());
            self.queued_bytes -= next.group.bytes.len();
            batch.extend(self.queue.pop_front());
        }
        self.taken = batch.last().map_or(self.taken, |last| last.seq + 1);
        Some(batch)
    }

    /// Whether a caller leads, or has claimed the leadership.
    fn is_led(&self) -> bool {
        self.led || self.claims > 0
    }

    fn wants_work(&self, block_bytes: usize) -> bool {
        let front = self.queue.front().map(|pending| pending.seq);
        front.is_some_and(|seq| seq < self.flush_to || self.queued_bytes >= block_bytes)
            || (self.sync_to > self.synced && self.written > self.synced)
    }

    fn refuse(&mut self, batch: Vec<Pending>, error: &Error) -> usize {
        let mut freed = 0;
        let mut kept = VecDeque::new();
        let queued = std::mem::take(&mut self.queue);
        for mut pending in batch.into_iter().chain(queued) {
            freed += std::mem::take(&mut pending.group.charged);
            if pending.group.acked {
                kept.push_back(pending);
            } else {
                self.fail(pending.seq..pending.seq + 1, false, error);
            }
        }
        self.queued_bytes = kept.iter().map(|pending| pending.group.bytes.len()).sum();
        self.queue = kept;
        self.taken = self.written;
        freed
    }

    /// Empties the queue. Returns how much of the budget its groups held.
    fn forget(&mut self) -> usize {
        self.queued_bytes = 0;
        self.queue.drain(..).map(|pending| pending.group.charged).sum()
    }
}

// Under `cfg(shuttle)` a lock works only inside of a schedule.
#[cfg(all(test, not(shuttle)))]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::thread;

    use super::*;

    const LINGER: Duration = Duration::from_millis(100);

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
        commit.open(&Reserved { end_seq: 0, limit_seq: u64::MAX, last_time_us: 0 });
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
        commit.open(&Reserved { end_seq: 7, limit_seq: 8, last_time_us: 50 });
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
        let Flush::Leader = commit.lead_if_due(LINGER) else { panic!() };
        let Flush::Busy = commit.lead_if_due(LINGER) else { panic!() };
        assert_eq!(commit.take_batch().map(|batch| batch.len()), Some(1));
        commit.written(3, None);
        assert_eq!(commit.resign(LINGER, None).flush, None);
        assert!(commit.is_idle());
    }

    #[test]
    fn a_sync_is_shared_with_the_groups_in_front_of_the_last_one_that_waits_for_it() {
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
                commit.outcome(to - 1, Durability::Written).map(|done| done.is_ok()),
                Some(true)
            );
            wants.push((
                commit.wants_sync(None, false),
                commit.wants_sync(Some(1), false),
                commit.wants_sync(None, true),
            ));
        }
        assert_eq!(wants, [(false, false, true), (false, true, true), (true, true, true)]);
        assert!(commit.outcome(2, Durability::Synced).is_none());
        commit.synced();
        assert!(commit.outcome(2, Durability::Synced).unwrap().is_ok());
        assert!(!commit.wants_sync(None, true));
        let Ok(None) = commit.begin_sync() else { panic!() };
    }

    #[test]
    fn a_latch_fails_unwritten_groups_and_callers_that_wait_for_a_sync() {
        let (error, cause) = (Error::Closed("the file"), Arc::new(Error::Closed("the disk")));
        let commit = open(1);
        submit_all(&commit, (0..3).map(|_| group(1, 0, true)));
        commit.take_batch().unwrap();
        commit.written(1, None);
        assert_eq!(commit.latch(Arc::clone(&cause), &error), 4);
        assert!(commit.outcome(0, Durability::Written).unwrap().is_ok());
        assert!(commit.outcome(0, Durability::Synced).unwrap().is_err());
        assert!(commit.outcome(1, Durability::Written).unwrap().is_err());
        assert!(matches!(
            commit.submit(group(1, 0, true)),
            Err(Rejected::Stopped(Stopped::Latched(_)))
        ));
        assert!(commit.unlatch() && !commit.unlatch());
        // The next segment goes on behind the numbers that were handed out.
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
        let freed = commit.refuse(Vec::new(), &error, LINGER);
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
                assert_eq!(commit.outcome(seq, durability).unwrap().is_err(), failed, "{seq}");
            }
            assert!(commit.outcome(seq, Durability::Buffered).unwrap().is_ok());
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
        assert!(commit.outcome(999, Durability::Written).unwrap().is_err());
        assert!(commit.outcome(1000, Durability::Written).is_none());
        assert!(commit.outcome(1000, Durability::Synced).unwrap().is_err());
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
                        while let Role::Leader = role {
                            let batch = commit.take_batch().unwrap();
                            commit.written(batch.last().unwrap().seq + 1, None);
                            commit.synced();
                            let resigned =
                                commit.resign(Duration::ZERO, Some((seq, Durability::Synced)));
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
