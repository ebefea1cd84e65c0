//! The tasks that await the progress of a shard.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    ops::Range,
    task::Waker,
};

/// Tasks that each await that a watermark passes a number. A task costs O(log n), and nothing more
/// until its number is passed.
#[derive(Default)]
pub(super) struct Wakers {
    /// By the awaited number and the id of the task.
    awaiting: BTreeMap<(u64, u64), Waker>,
}

impl Wakers {
    /// Has the task `id` woken when `number` is passed. The last waker of a task replaces the
    /// others.
    pub(super) fn insert(&mut self, number: u64, id: u64, waker: &Waker) {
        match self.awaiting.entry((number, id)) {
            Entry::Occupied(mut known) => known.get_mut().clone_from(waker),
            Entry::Vacant(new) => drop(new.insert(waker.clone())),
        }
    }

    /// Forgets a task.
    pub(super) fn remove(&mut self, number: u64, id: u64) {
        self.awaiting.remove(&(number, id));
    }

    /// Takes the tasks that await numbers in `range`.
    pub(super) fn take(&mut self, range: Range<u64>) -> impl Iterator<Item = Waker> + use<> {
        let mut taken = self.awaiting.split_off(&(range.start, 0));
        let mut above = taken.split_off(&(range.end, 0));
        self.awaiting.append(&mut above);
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
            // Two tasks await number 2, and each registers twice.
            let number = if number == 3 { 2 } else { number };
            for _ in 0..2 {
                wakers.insert(number, Arc::as_ptr(count) as u64, &Arc::clone(count).into());
            }
        }
        let called = |counts: &[Arc<Count>]| -> Vec<u32> {
            counts.iter().map(|count| count.0.load(Ordering::Relaxed)).collect()
        };
        wakers.take(1..3).for_each(Waker::wake);
        assert_eq!(called(&counts), [0, 1, 1, 1, 0, 0]);
        wakers.remove(4, Arc::as_ptr(&counts[4]) as u64);
        wakers.take(0..u64::MAX).for_each(Waker::wake);
        assert_eq!(called(&counts), [1, 1, 1, 1, 0, 1]);
        assert!(wakers.awaiting.is_empty());
    }
}
