//! Tickets: appends under way.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use super::{Appended, Durability, Shard};
use crate::Result;

/// An append under way: wait for it, ask whether it is done, or await it as a future.
///
/// Dropping a ticket does not take the append back.
#[must_use = "a ticket says whether the append succeeded"]
pub struct Ticket {
    shard: Arc<Shard>,
    seq: u64,
    durability: Durability,
}

impl std::fmt::Debug for Ticket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ticket")
            .field("shard", &self.shard.id())
            .field("seq", &self.seq)
            .finish_non_exhaustive()
    }
}

impl Ticket {
    /// A ticket for a group that was submitted. Until the ticket is dropped, the shard remembers
    /// whether the group failed.
    pub(super) fn new(shard: Arc<Shard>, seq: u64, durability: Durability) -> Self {
        Self { shard, seq, durability }
    }

    /// Requests the write of the group, although no caller waits for it yet.
    pub(crate) fn hasten(&self) {
        self.shard.hasten(self.seq, self.durability);
    }

    /// The shard, and the sequence number that the group will have.
    pub fn appended(&self) -> Appended {
        Appended { shard: self.shard.id(), seq: self.seq }
    }

    /// Whether [`Ticket::wait`] would return at once.
    pub fn is_done(&self) -> bool {
        self.shard.commit().outcome(self.seq, self.durability).is_some()
    }

    /// Waits until the group is as durable as the append asked for.
    ///
    /// # Errors
    /// What kept it from being written. The group may then be on disk or not, but never in part.
    pub fn wait(self) -> Result<Appended> {
        self.shard.wait_for(self.seq, self.durability)?;
        Ok(self.appended())
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.shard.commit().leave();
    }
}

impl Future for Ticket {
    type Output = Result<Appended>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match self.shard.commit().poll(self.seq, self.durability, context.waker()) {
            Some(outcome) => Poll::Ready(outcome.map(|()| self.appended())),
            None => Poll::Pending,
        }
    }
}
