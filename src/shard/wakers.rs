//! The tasks that await the progress of a shard: its appends, and its followers.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    ops::Range,
    task::Waker,
};

use super::Durability;

/// What a follower of a shard knows of it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct News {
    /// One past the last group that this process has written.
    pub(super) written: u64,
    /// Counts the other events that a follower is woken for.
    pub(super) others: u64,
    /// Whether the shard is read-only for good: it grows no more.
    pub(super) ended: bool,
}

/// The tasks that await a shard. The thread that changes the shard wakes the tasks that
/// [`Tasks::take_woken`] returns, without the lock of the shard.
#[derive(Default)]
pub(super) struct Tasks {
    written: Wakers,
    synced: Wakers,
    /// The followers that wait for news, by their ids.
    followers: BTreeMap<u64, Waker>,
    last_follower: u64,
    news: News,
    woken: Vec<Waker>,
}

impl Tasks {
    /// Has `waker` woken when the group `seq` has this durability, or fails.
    pub(super) fn await_group(&mut self, seq: u64, durability: Durability, waker: &Waker) {
        self.of(durability).insert(seq, waker);
    }

    /// Forgets the task that awaits a group.
    pub(super) fn forget_group(&mut self, seq: u64, durability: Durability) {
        self.of(durability).remove(seq);
    }

    fn of(&mut self, durability: Durability) -> &mut Wakers {
        // `tests/shuttle` builds this file outside of the crate, where no match is exhaustive.
        if durability < Durability::Synced { &mut self.written } else { &mut self.synced }
    }

    /// Wakes the tasks whose groups are written or synced.
    pub(super) fn reached(&mut self, written: u64, synced: u64) {
        self.woken.extend(self.written.take(0..written));
        self.woken.extend(self.synced.take(0..synced));
    }

    /// Wakes the tasks whose groups have failed; with `synced_only` those that await a sync.
    pub(super) fn failed(&mut self, range: Range<u64>, synced_only: bool) {
        if !synced_only {
            self.woken.extend(self.written.take(range.clone()));
        }
        self.woken.extend(self.synced.take(range));
    }

    /// Wakes the tasks of `wakers` with numbers in `range`.
    pub(super) fn wake(&mut self, wakers: &mut Wakers, range: Range<u64>) {
        self.woken.extend(wakers.take(range));
    }

    /// What a follower knows by now.
    pub(super) fn news(&self) -> News {
        self.news
    }

    /// The id of a new follower.
    pub(super) fn new_follower(&mut self) -> u64 {
        self.last_follower += 1;
        self.last_follower
    }

    /// Whether there is news since `seen`. If not, has `waker` woken when there is.
    pub(super) fn poll_news(&mut self, seen: &News, follower: u64, waker: &Waker) -> bool {
        let has_news = self.news.written > seen.written || self.news.others != seen.others;
        if !has_news {
            self.followers.insert(follower, waker.clone());
        }
        has_news
    }

    pub(super) fn forget_follower(&mut self, follower: u64) {
        self.followers.remove(&follower);
    }

    /// Wakes the followers: everything below `to` is written.
    pub(super) fn wrote(&mut self, to: u64) {
        self.news.written = to;
        self.wake_followers();
    }

    /// Wakes the followers: a read may find more, or an error.
    pub(super) fn other_news(&mut self) {
        self.news.others += 1;
        self.wake_followers();
    }

    /// Wakes the followers: the shard grows no more.
    pub(super) fn end(&mut self) {
        self.news.ended = true;
        self.other_news();
    }

    fn wake_followers(&mut self) {
        self.woken.extend(std::mem::take(&mut self.followers).into_values());
    }

    /// The tasks to wake.
    pub(super) fn take_woken(&mut self) -> Vec<Waker> {
        std::mem::take(&mut self.woken)
    }
}

/// Tasks by the number that each of them awaits. A task costs O(log n), and nothing more until its
/// number is reached.
#[derive(Default)]
pub(super) struct Wakers(BTreeMap<u64, Waker>);

impl Wakers {
    /// Has the only task for `number` woken. Its last waker replaces the others.
    pub(super) fn insert(&mut self, number: u64, waker: &Waker) {
        match self.0.entry(number) {
            Entry::Occupied(mut known) => known.get_mut().clone_from(waker),
            Entry::Vacant(new) => drop(new.insert(waker.clone())),
        }
    }

    pub(super) fn remove(&mut self, number: u64) -> Option<Waker> {
        self.0.remove(&number)
    }

    /// Takes the tasks with numbers in `range`.
    fn take(&mut self, range: Range<u64>) -> impl Iterator<Item = Waker> + use<> {
        let mut taken = self.0.split_off(&range.start);
        let mut above = taken.split_off(&range.end);
        self.0.append(&mut above);
        taken.into_values()
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicU32, Ordering},
        },
        task::Wake,
    };

    use super::*;

    #[derive(Default)]
    struct Count(AtomicU32);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn only_the_tasks_in_the_range_are_taken() {
        let counts: Vec<Arc<Count>> = (0..6).map(|_| Arc::default()).collect();
        let mut wakers = Wakers::default();
        for (number, count) in (0..).zip(&counts) {
            // Each registers twice.
            for _ in 0..2 {
                wakers.insert(number, &Arc::clone(count).into());
            }
        }
        let called = |counts: &[Arc<Count>]| -> Vec<u32> {
            counts.iter().map(|count| count.0.load(Ordering::Relaxed)).collect()
        };
        wakers.take(1..3).for_each(Waker::wake);
        assert_eq!(called(&counts), [0, 1, 1, 0, 0, 0]);
        wakers.remove(4);
        wakers.take(0..u64::MAX).for_each(Waker::wake);
        assert_eq!(called(&counts), [1, 1, 1, 1, 0, 1]);
        assert!(wakers.0.is_empty());
    }
}
