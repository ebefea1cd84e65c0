//! The memory budget of the store for groups that wait to be written.

use std::{collections::BTreeMap, sync::Arc, task::Waker};

use crate::sync::{Condvar, LockRank, Mutex, lock, wait};

/// Limits how many bytes of groups wait to be written in the whole store.
pub(crate) struct Budget {
    limit: usize,
    state: Mutex<State>,
    released: Condvar,
}

#[derive(Default)]
struct State {
    used: usize,
    /// The tasks that await room, by their ids: in the order in which they came.
    awaiting: BTreeMap<u64, Waker>,
    /// The id of the last task.
    tasks: u64,
}

impl State {
    fn take(&mut self, bytes: usize, limit: usize) -> bool {
        let fits = self.used == 0 || self.used + bytes <= limit;
        if fits {
            self.used += bytes;
        }
        fits
    }
}

impl Budget {
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        let state = Mutex::new(LockRank::Budget, State::default());
        Arc::new(Self { limit, state, released: Condvar::new() })
    }

    /// Takes `bytes`, if there is room. A request larger than the whole budget succeeds alone.
    pub(super) fn try_take(&self, bytes: usize) -> bool {
        lock(&self.state).take(bytes, self.limit)
    }

    /// Takes `bytes` even if there is no room. Returns `true`.
    pub(super) fn take(&self, bytes: usize) -> bool {
        lock(&self.state).used += bytes;
        true
    }

    /// As [`Budget::try_take`]. Blocks until there is room.
    pub(super) fn take_waiting(&self, bytes: usize) {
        let mut state = lock(&self.state);
        while !state.take(bytes, self.limit) {
            state = wait(&self.released, state);
        }
    }

    pub(super) fn release(&self, bytes: usize) {
        if bytes > 0 {
            lock(&self.state).used -= bytes;
            self.released.notify_all();
            self.wake_next();
        }
    }

    /// Wakes the first task. It takes its room and wakes the next one, or waits again.
    fn wake_next(&self) {
        let next = lock(&self.state).awaiting.pop_first();
        if let Some((_, waker)) = next {
            waker.wake();
        }
    }

    pub(crate) fn used(&self) -> usize {
        lock(&self.state).used
    }
}

/// A task that awaits room.
pub(super) struct AwaitsRoom {
    budget: Arc<Budget>,
    id: u64,
}

impl AwaitsRoom {
    pub(super) fn new(budget: &Arc<Budget>) -> Self {
        let mut state = lock(&budget.state);
        state.tasks += 1;
        Self { id: state.tasks, budget: Arc::clone(budget) }
    }

    /// Takes `bytes`, if there is room. If not, has `waker` woken when there may be room.
    pub(super) fn poll_take(&self, bytes: usize, waker: &Waker) -> bool {
        let taken = {
            let mut state = lock(&self.budget.state);
            let taken = state.take(bytes, self.budget.limit);
            if !taken {
                state.awaiting.insert(self.id, waker.clone());
            }
            taken
        };
        if taken {
            self.budget.wake_next();
        }
        taken
    }
}

impl Drop for AwaitsRoom {
    fn drop(&mut self) {
        lock(&self.budget.state).awaiting.remove(&self.id);
        // This task may have been woken, and then no other one was.
        self.budget.wake_next();
    }
}
