//! Appends under way.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use super::{
    Appended, Durability, NotTaken, Payload, Shard, ShardChoice, budget::AwaitsRoom,
    handover::Claim,
};
use crate::{Error, Result};

/// An append under way: wait for it, ask whether it is done, or await it as a future.
///
/// Dropping a ticket does not take the append back.
#[must_use = "a ticket says whether the append succeeded"]
pub struct Ticket {
    shard: Arc<Shard>,
    claim: Claim,
    durability: Durability,
}

impl std::fmt::Debug for Ticket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ticket")
            .field("shard", &self.shard.id())
            .field("claim", &self.claim)
            .finish_non_exhaustive()
    }
}

impl Ticket {
    /// A ticket for a group that was submitted. Until the ticket is dropped, the shard remembers
    /// whether the group failed.
    pub(super) fn new(shard: Arc<Shard>, claim: Claim, durability: Durability) -> Self {
        Self { shard, claim, durability }
    }

    /// Requests the write of the group, although no caller waits for it yet.
    pub(super) fn hasten(&self) {
        // A group without a sequence number is written as soon as it has one.
        if let Claim::Seq(seq) = self.claim {
            self.shard.hasten(seq, self.durability);
        }
    }

    /// The shard of the group, and its sequence number. `None` while the group has no number: a
    /// segment has to be begun for it first, or the KMS has to answer. Does not block.
    ///
    /// The append can still fail after that.
    pub fn appended(&self) -> Option<Appended> {
        let seq = self.shard.commit().seq_of(self.claim).ok()??;
        Some(Appended { shard: self.shard.id(), seq })
    }

    /// Whether [`Ticket::wait`] would return at once. Does not block.
    pub fn is_done(&self) -> bool {
        self.shard.commit().outcome(self.claim, self.durability).is_some()
    }

    /// Blocks until the group is as durable as the append asked for.
    ///
    /// # Errors
    /// What kept it from being written. The group may then be on disk or not, but never in part.
    pub fn wait(self) -> Result<Appended> {
        let seq = self.shard.place(self.claim)?;
        self.shard.wait_for(seq, self.durability)?;
        Ok(Appended { shard: self.shard.id(), seq })
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.shard.commit().leave_claim(self.claim, self.durability);
    }
}

impl Future for Ticket {
    type Output = Result<Appended>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let shard = self.shard.id();
        match self.shard.commit().poll(self.claim, self.durability, context.waker()) {
            Some(outcome) => Poll::Ready(outcome.map(|seq| Appended { shard, seq })),
            None => Poll::Pending,
        }
    }
}

/// Chooses the shard of an append.
pub(crate) trait Route: Send + Sync {
    /// # Errors
    /// No shard takes the append.
    fn route(&self, choice: ShardChoice) -> Result<Arc<Shard>>;
}

/// A group on its way into the memory budget and then to the disk, as a future.
///
/// Awaits room in the budget, and then the durability that the append asked for. Nothing is
/// appended before the first poll. Polling it never blocks. If it is dropped while it awaits room,
/// nothing is appended; later, dropping it does not take the append back.
#[must_use = "a future does nothing until it is awaited"]
pub struct AppendFuture(Appending);

enum Appending {
    Failed(Option<Error>),
    /// There was no room yet, or the future was not polled.
    Waits {
        router: Arc<dyn Route>,
        choice: ShardChoice,
        shard: Arc<Shard>,
        payload: Option<Payload>,
        durability: Durability,
        room: AwaitsRoom,
    },
    Submitted(Ticket),
}

impl std::fmt::Debug for AppendFuture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AppendFuture").finish_non_exhaustive()
    }
}

impl AppendFuture {
    /// The append of a group to the shard that `router` chooses.
    pub(crate) fn new(
        router: Arc<dyn Route>,
        choice: ShardChoice,
        payload: Payload,
        durability: Durability,
    ) -> Self {
        match router.route(choice) {
            Ok(shard) => {
                let (room, payload) = (shard.await_room(), Some(payload));
                Self(Appending::Waits { router, choice, shard, payload, durability, room })
            }
            Err(error) => Self::failed(error),
        }
    }

    /// Fails when it is awaited.
    pub(crate) fn failed(error: Error) -> Self {
        Self(Appending::Failed(Some(error)))
    }
}

impl Future for AppendFuture {
    type Output = Result<Appended>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        loop {
            let ticket = match &mut self.0 {
                Appending::Failed(error) => {
                    let again = || Error::Closed("the append");
                    return Poll::Ready(Err(error.take().unwrap_or_else(again)));
                }
                Appending::Submitted(ticket) => return Pin::new(ticket).poll(context),
                Appending::Waits { router, choice, shard, payload, durability, room } => {
                    let polled = shard.poll_hand_over(payload, *durability, room, context.waker());
                    match ready!(polled) {
                        Ok(ticket) => Ok(ticket),
                        Err(NotTaken::Failed(error)) => Err(error),
                        Err(NotTaken::Moved(moved)) => match router.route(*choice) {
                            Ok(other) => {
                                (*shard, *payload) = (other, Some(moved));
                                continue;
                            }
                            Err(error) => Err(error),
                        },
                    }
                }
            };
            self.0 = match ticket {
                Ok(ticket) => Appending::Submitted(ticket),
                Err(error) => Appending::Failed(Some(error)),
            };
        }
    }
}
