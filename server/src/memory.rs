//! The memory that bodies of requests and answers may take, in the whole service.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use crate::error::{ApiError, Result};

/// The unit of account, in bytes.
const UNIT: usize = 4 << 10;
/// How long a call waits for memory.
const PATIENCE: Duration = Duration::from_secs(10);

/// Memory that is accounted for until this is dropped.
#[derive(Debug)]
pub(crate) struct Memory(OwnedSemaphorePermit);

impl Memory {
    /// Gives back all but `bytes`.
    pub(crate) fn shrink(&mut self, bytes: usize) {
        let surplus = self.0.num_permits().saturating_sub(units(bytes));
        drop(self.0.split(surplus));
    }
}

/// The budget. Calls wait for their part of it in the order in which they came.
#[derive(Debug)]
pub(crate) struct Budget {
    free: Arc<Semaphore>,
    units: usize,
}

impl Budget {
    pub(crate) fn new(bytes: usize) -> Self {
        let units = units(bytes).min(Semaphore::MAX_PERMITS);
        Self { free: Arc::new(Semaphore::new(units)), units }
    }

    /// Takes `bytes`, or the whole budget if that is less.
    ///
    /// # Errors
    /// 503 if so much does not become free in time.
    pub(crate) async fn take(&self, bytes: usize) -> Result<Memory> {
        let wanted = u32::try_from(units(bytes).min(self.units)).unwrap_or(u32::MAX);
        match timeout(PATIENCE, Arc::clone(&self.free).acquire_many_owned(wanted)).await {
            Ok(Ok(permit)) => Ok(Memory(permit)),
            _ => Err(ApiError::busy("too many bytes of requests and answers are under way")),
        }
    }

    /// The bytes that are taken.
    pub(crate) fn taken(&self) -> usize {
        (self.units - self.free.available_permits()) * UNIT
    }
}

fn units(bytes: usize) -> usize {
    bytes.div_ceil(UNIT).max(1)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_call_waits_for_memory_and_gives_up_in_the_end() {
        let budget = Budget::new(10 * UNIT);
        let mut first = budget.take(8 * UNIT).await.unwrap();
        assert_eq!(budget.take(3 * UNIT).await.unwrap_err().code, "ServerBusy");
        first.shrink(UNIT);
        assert_eq!(budget.taken(), UNIT);
        // More than there is at all: the whole budget.
        drop(first);
        drop(budget.take(100 * UNIT).await.unwrap());
        assert_eq!(budget.taken(), 0);
    }
}
