//! The memory budget of the store for groups that wait to be written.

use std::sync::Arc;

use crate::sync::{Condvar, LockRank, Mutex, lock, wait};

/// Limits how many bytes of groups wait to be written in the whole store.
pub(crate) struct Budget {
    limit: usize,
    used: Mutex<usize>,
    released: Condvar,
}

impl Budget {
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, used: Mutex::new(LockRank::Budget, 0), released: Condvar::new() })
    }

    /// Takes `bytes`, if there is room. A request larger than the whole budget succeeds alone.
    pub(super) fn try_take(&self, bytes: usize) -> bool {
        let mut used = lock(&self.used);
        let fits = *used == 0 || *used + bytes <= self.limit;
        if fits {
            *used += bytes;
        }
        fits
    }

    /// Takes `bytes` even if there is no room. Returns `true`.
    pub(super) fn take(&self, bytes: usize) -> bool {
        *lock(&self.used) += bytes;
        true
    }

    /// As [`Budget::try_take`]. Blocks until there is room.
    pub(super) fn take_waiting(&self, bytes: usize) {
        let mut used = lock(&self.used);
        while *used > 0 && *used + bytes > self.limit {
            used = wait(&self.released, used);
        }
        *used += bytes;
    }

    pub(super) fn release(&self, bytes: usize) {
        if bytes > 0 {
            *lock(&self.used) -= bytes;
            self.released.notify_all();
        }
    }

    pub(crate) fn used(&self) -> usize {
        *lock(&self.used)
    }
}
