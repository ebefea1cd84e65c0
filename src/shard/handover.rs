//! Groups that a shard took over without a sequence number.
//!
//! A submission that must not block hands its group over while no segment is open, or while the KMS
//! has not answered. [`GroupCommit`](super::commit::GroupCommit) gives these groups their sequence
//! numbers later, in order, or refuses them.

use std::collections::{BTreeMap, VecDeque};

use super::{Durability, commit::Group, wakers::Wakers};
use crate::{Error, Result};

/// What the submitter of a group asks for its outcome with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// The group has this sequence number.
    Seq(u64),
    /// The group was handed over, as the one with this number.
    HandedOver(u64),
}

/// A group that was handed over and has no sequence number yet.
pub(super) struct HandedOver {
    pub(super) number: u64,
    pub(super) group: Group,
    pub(super) durability: Durability,
    /// Whether its submitter may still ask for its outcome.
    pub(super) asked: bool,
}

/// What became of a group that was handed over.
pub(super) enum Place {
    /// It has a sequence number.
    Seq(u64),
    /// It was refused.
    Refused(Error),
}

/// The groups that were handed over.
#[derive(Default)]
pub(super) struct Handover {
    /// Those without a sequence number, by their own numbers.
    pub(super) waiting: VecDeque<HandedOver>,
    last: u64,
    /// What became of the others, for their askers.
    pub(super) places: BTreeMap<u64, Place>,
    /// The tasks that await a sequence number.
    pub(super) awaiting: Wakers,
}

impl Handover {
    /// Returns the number of the group, and whether it is the only one without a sequence number.
    pub(super) fn push(&mut self, group: Group, durability: Durability) -> (u64, bool) {
        self.last += 1;
        let number = self.last;
        self.waiting.push_back(HandedOver { number, group, durability, asked: true });
        (number, self.waiting.len() == 1)
    }

    pub(super) fn seq_of(&self, claim: Claim) -> Result<Option<u64>> {
        match claim {
            Claim::Seq(seq) => Ok(Some(seq)),
            Claim::HandedOver(number) => match self.places.get(&number) {
                None => Ok(None),
                Some(Place::Seq(seq)) => Ok(Some(*seq)),
                Some(Place::Refused(error)) => Err(error.clone()),
            },
        }
    }

    /// The asker of this group is done.
    pub(super) fn leave(&mut self, number: u64) {
        self.places.remove(&number);
        self.awaiting.remove(number);
        let at = self.waiting.partition_point(|group| group.number < number);
        if let Some(group) = self.waiting.get_mut(at).filter(|group| group.number == number) {
            group.asked = false;
        }
    }
}
