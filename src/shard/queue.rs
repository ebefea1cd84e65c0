//! The queue of a shard, and what callers see of its progress: held only for moments.

use std::{collections::VecDeque, sync::Arc, task::Waker, time::Duration};

use bytes::Bytes;

use super::{BLOCK_GROUPS, Durability};
use crate::{Error, Result, group, segment::BlockKind};

/// A group that waits to be written.
pub(super) struct Pending {
    pub(super) seq: u64,
    pub(super) kind: BlockKind,
    pub(super) bytes: Bytes,
    pub(super) logs: u32,
    pub(super) time_us: u64,
    /// When it came in (uptime).
    pub(super) queued: Duration,
    /// Whether it was acknowledged already (`Durability::Buffered`).
    pub(super) acked: bool,
    /// What it took of the store's budget, to be given back.
    pub(super) charged: usize,
}

/// Appends that failed: those from `from` to below `to`, or only those of them that asked to be synced.
struct Failure {
    from: u64,
    to: u64,
    synced_only: bool,
    error: Error,
}

/// The queue and the watermarks.
#[derive(Default)]
pub(super) struct State {
    /// Whether there is an active segment that reserves the numbers being handed out.
    pub(super) ready: bool,
    pub(super) closed: bool,
    pub(super) latched: Option<Arc<Error>>,
    pub(super) next_seq: u64,
    pub(super) limit_seq: u64,
    pub(super) last_time_us: u64,
    pub(super) queue: VecDeque<Pending>,
    pub(super) queued_bytes: usize,
    /// What is below this is to be written now.
    pub(super) flush_to: u64,
    /// What is below this is to be synced now.
    pub(super) sync_to: u64,
    pub(super) written: u64,
    pub(super) synced: u64,
    /// One past the last group that was taken off the queue to be written.
    pub(super) taken: u64,
    pub(super) driving: bool,
    /// How many threads are to drive before any caller does that waits for a group: they would never have their turn while callers drive
    /// one after the other.
    pub(super) claims: usize,
    pub(super) flush_scheduled: bool,
    /// Not to be tried before: the key could not be used.
    pub(super) retry_at: Duration,
    pub(super) mark_scheduled: bool,
    /// Whether it will be looked whether the segment is old: one task a shard, however many segments begin.
    pub(super) roll_scheduled: bool,
    pub(super) last_sync: Duration,
    /// Those who may still ask for an outcome: tickets, and callers that wait. What failed is remembered for them.
    askers: usize,
    failures: Vec<Failure>,
    pub(super) wakers: Vec<Waker>,
}

impl State {
    /// Whether the append of `seq` has succeeded or failed; `None` while it is under way.
    pub(super) fn outcome(&self, seq: u64, durability: Durability) -> Option<Result<()>> {
        if durability == Durability::Buffered {
            return Some(Ok(()));
        }
        let hit = |f: &&Failure| (f.from..f.to).contains(&seq) && (!f.synced_only || durability == Durability::Synced);
        if let Some(failure) = self.failures.iter().find(hit) {
            return Some(Err(failure.error.clone()));
        }
        let reached = if durability == Durability::Synced { self.synced } else { self.written };
        (seq < reached).then_some(Ok(()))
    }

    pub(super) fn fail(&mut self, from: u64, to: u64, synced_only: bool, error: &Error) {
        if from >= to || self.askers == 0 {
            return;
        }
        match self.failures.last_mut() {
            // A refusal fails what is queued one by one, each with the same error.
            Some(last)
                if last.to == from
                    && last.synced_only == synced_only
                    && std::mem::discriminant(&last.error) == std::mem::discriminant(error) =>
            {
                last.to = to;
            }
            _ => self.failures.push(Failure { from, to, synced_only, error: error.clone() }),
        }
    }

    /// Somebody will ask for outcomes until they have [left](State::leave).
    pub(super) fn ask(&mut self) {
        self.askers += 1;
    }

    /// Somebody asks no more. When nobody does, nobody is left to be told of what failed.
    pub(super) fn leave(&mut self) {
        self.askers -= 1;
        if self.askers == 0 {
            self.failures.clear();
        }
    }

    /// Takes groups off the front that may go into one block.
    pub(super) fn take_batch(&mut self, list_bytes_max: usize) -> Option<Vec<Pending>> {
        let first = self.queue.pop_front()?;
        let first_time_us = first.time_us;
        let mut list_bytes = group::frame_len(first.bytes.len());
        self.queued_bytes -= first.bytes.len();
        let mut batch = vec![first];
        while let Some(next) = self.queue.front()
            && let Some(last) = batch.last()
            && next.kind == last.kind
            && next.seq == last.seq + 1
            && list_bytes + group::frame_len(next.bytes.len()) <= list_bytes_max
            // A block has the receive times as differences of 32 bits.
            && next.time_us - first_time_us <= u64::from(u32::MAX)
            && batch.len() < BLOCK_GROUPS
        {
            list_bytes += group::frame_len(next.bytes.len());
            self.queued_bytes -= next.bytes.len();
            batch.extend(self.queue.pop_front());
        }
        self.taken = batch.last().map_or(self.taken, |last| last.seq + 1);
        Some(batch)
    }

    /// Whether a thread drives, or has a claim to be the next.
    pub(super) fn is_driven(&self) -> bool {
        self.driving || self.claims > 0
    }

    pub(super) fn wants_work(&self, block_bytes: usize) -> bool {
        let front = self.queue.front().map(|pending| pending.seq);
        front.is_some_and(|seq| seq < self.flush_to || self.queued_bytes >= block_bytes)
            || (self.sync_to > self.synced && self.written > self.synced)
    }

    /// Groups that were acknowledged and are not written yet stay; the others fail with `error`. Returns what they had taken of the
    /// budget: those that stay hold none either, for nobody can say for how long, and other Logstores need it.
    pub(super) fn refuse(&mut self, batch: Vec<Pending>, error: &Error) -> usize {
        let mut freed = 0;
        let mut kept = VecDeque::new();
        let queued = std::mem::take(&mut self.queue);
        for mut pending in batch.into_iter().chain(queued) {
            freed += std::mem::take(&mut pending.charged);
            if pending.acked {
                kept.push_back(pending);
            } else {
                self.fail(pending.seq, pending.seq + 1, false, error);
            }
        }
        self.queued_bytes = kept.iter().map(|pending| pending.bytes.len()).sum();
        self.queue = kept;
        self.taken = self.written;
        freed
    }

    /// Gives up everything that is queued. Returns what it had taken of the budget.
    pub(super) fn forget(&mut self) -> usize {
        self.queued_bytes = 0;
        self.queue.drain(..).map(|pending| pending.charged).sum()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn pending(seq: u64, len: usize, time_us: u64, acked: bool) -> Pending {
        Pending {
            seq,
            kind: BlockKind::Opaque,
            bytes: Bytes::from(vec![0; len]),
            logs: 0,
            time_us,
            queued: Duration::ZERO,
            acked,
            charged: len + 1,
        }
    }

    fn queue(groups: impl IntoIterator<Item = Pending>) -> State {
        let mut state = State::default();
        for pending in groups {
            state.queued_bytes += pending.bytes.len();
            state.next_seq = pending.seq + 1;
            state.queue.push_back(pending);
        }
        state
    }

    fn numbers(batch: &[Pending]) -> Vec<u64> {
        batch.iter().map(|pending| pending.seq).collect()
    }

    #[test]
    fn a_batch_counts_the_frames_too() {
        let mut state = queue((0..4).map(|seq| pending(seq, 100, 0, false)));
        assert_eq!(numbers(&state.take_batch(3 * 102).unwrap()), [0, 1, 2]);
        assert_eq!((state.queued_bytes, state.taken), (100, 3));
        let mut state = queue((0..4).map(|seq| pending(seq, 100, 0, false)));
        assert_eq!(numbers(&state.take_batch(3 * 102 - 1).unwrap()), [0, 1]);
        assert_eq!(numbers(&state.take_batch(1).unwrap()), [2]);
    }

    #[test]
    fn a_batch_ends_where_its_receive_times_no_longer_fit() {
        let far = u64::from(u32::MAX);
        let mut state = queue([(0, 5), (1, far + 5), (2, far + 6)].map(|(seq, time)| pending(seq, 1, time, true)));
        assert_eq!(numbers(&state.take_batch(1000).unwrap()), [0, 1]);
        assert_eq!(numbers(&state.take_batch(1000).unwrap()), [2]);
    }

    #[test]
    fn however_many_appends_fail_none_is_taken_for_done_later() {
        let error = Error::Closed("the key");
        let mut state = queue((0..20_000).map(|seq| pending(seq, 1, 0, seq % 3 == 0)));
        state.ask();
        let freed = state.refuse(Vec::new(), &error);
        assert_eq!((freed, state.queue.len(), state.queued_bytes), (40_000, 6_667, 6_667));
        assert!(state.queue.iter().all(|pending| pending.acked && pending.charged == 0));
        // The key comes back, and others are written and synced.
        (state.written, state.synced) = (30_000, 30_000);
        for seq in 0..20_000 {
            let failed = seq % 3 != 0;
            for durability in [Durability::Written, Durability::Synced] {
                assert_eq!(state.outcome(seq, durability).unwrap().is_err(), failed, "{seq}");
            }
            assert!(state.outcome(seq, Durability::Buffered).unwrap().is_ok());
        }
        state.leave();
        assert!(state.failures.is_empty());
    }

    #[test]
    fn neighbouring_failures_are_remembered_as_one() {
        let error = Error::Closed("the key");
        let mut state = State::default();
        state.ask();
        for seq in 0..1000 {
            state.fail(seq, seq + 1, false, &error);
        }
        state.fail(1000, 1001, true, &error);
        assert_eq!(state.failures.len(), 2);
        assert!(state.outcome(999, Durability::Written).unwrap().is_err());
        assert!(state.outcome(1000, Durability::Written).is_none());
        assert!(state.outcome(1000, Durability::Synced).unwrap().is_err());
    }
}
