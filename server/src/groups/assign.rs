//! Which consumer of a group reads which shard.
//!
//! Consumers learn of their shards by heartbeats, and report in them the shards that they have not
//! given up yet. A shard is moved in two steps: its owner's answer leaves it out, and the next
//! owner gets it when the owner's report does, so that two consumers never read it at once.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::readable::{Readable, SILENCE};

/// The consumer is not known, and reports shards: it was away for longer than the timeout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unknown;

#[derive(Debug)]
struct Owner {
    consumer: String,
    /// Whether the consumer has been told to give the shard up, by an answer that leaves it out.
    revoked: bool,
    /// When the consumer was given the shard.
    since: Duration,
}

impl Owner {
    fn new(consumer: &str, since: Duration) -> Self {
        Self { consumer: consumer.to_owned(), revoked: false, since }
    }
}

/// The consumers of a group, and the owners of its shards. Times are those of a clock that only
/// advances.
#[derive(Debug, Default)]
pub(crate) struct Assignment {
    /// The last heartbeat of each live consumer.
    consumers: BTreeMap<String, Duration>,
    owners: BTreeMap<u32, Owner>,
    /// The service assigns a shard before this time only to a consumer that reports it, because the
    /// service was restarted and its consumers may still read the shards that they owned before.
    recovering_until: Option<Duration>,
}

impl Assignment {
    /// An assignment of which the consumers may hold shards that nothing here knows of.
    pub(crate) fn recovering_until(time: Duration) -> Self {
        Self { recovering_until: Some(time), ..Self::default() }
    }

    /// The consumer that owns a shard.
    pub(crate) fn owner(&self, shard: u32) -> Option<&str> {
        self.owners.get(&shard).map(|owner| &*owner.consumer)
    }

    pub(crate) fn is_consumer(&self, name: &str) -> bool {
        self.consumers.contains_key(name)
    }

    pub(crate) fn consumers(&self) -> usize {
        self.consumers.len()
    }

    /// Takes a heartbeat of `consumer` that reports the shards `held`, and returns the shards that
    /// it shall read.
    pub(crate) fn heartbeat(
        &mut self,
        now: Duration,
        timeout: Duration,
        consumer: &str,
        held: &BTreeSet<u32>,
        readable: &Readable,
    ) -> Result<Vec<u32>, Unknown> {
        let shards = &readable.shards[..];
        self.expire(now, timeout);
        self.owners.retain(|shard, _| shards.contains(shard));
        let recovering = self.recovering_until.is_some_and(|until| now < until);
        if !self.is_consumer(consumer) && !held.is_empty() && !recovering {
            return Err(Unknown);
        }
        self.consumers.insert(consumer.to_owned(), now);
        self.take_report(now, consumer, held, shards);
        self.revoke_finished(now, consumer, readable);
        self.revoke_surplus(consumer, shards.len());
        if !recovering {
            self.fill_up(now, consumer, shards);
        }
        let is_assigned = |owner: &Owner| owner.consumer == consumer && !owner.revoked;
        Ok(self.owners.iter().filter(|(_, owner)| is_assigned(owner)).map(|(id, _)| *id).collect())
    }

    /// Forgets the consumers that have been silent for longer than the timeout. Their shards are
    /// free.
    pub(crate) fn expire(&mut self, now: Duration, timeout: Duration) {
        self.consumers.retain(|_, last| now.saturating_sub(*last) <= timeout);
        let consumers = &self.consumers;
        self.owners.retain(|_, owner| consumers.contains_key(&owner.consumer));
    }

    fn take_report(&mut self, now: Duration, consumer: &str, held: &BTreeSet<u32>, shards: &[u32]) {
        // A report may be one answer behind, so it gives up revoked shards only.
        self.owners.retain(|shard, owner| {
            owner.consumer != consumer || !owner.revoked || held.contains(shard)
        });
        for shard in held.iter().filter(|shard| shards.contains(shard)) {
            self.owners.entry(*shard).or_insert_with(|| Owner::new(consumer, now));
        }
    }

    /// How many shards a consumer owns, without those that were revoked.
    fn count(&self, consumer: &str) -> usize {
        let is_kept = |owner: &&Owner| owner.consumer == consumer && !owner.revoked;
        self.owners.values().filter(is_kept).count()
    }

    /// How many shards a consumer shall have: an even part, and one of those that are left over if
    /// not enough others have one.
    fn share(&self, consumer: &str, shards: usize) -> usize {
        let even = shards / self.consumers.len().max(1);
        let left_over = shards - even * self.consumers.len();
        let others = self.consumers.keys().filter(|other| *other != consumer);
        let with_more = others.filter(|other| self.count(other) > even).count();
        even + usize::from(with_more < left_over)
    }

    fn revoke_surplus(&mut self, consumer: &str, shards: usize) {
        let surplus = self.count(consumer).saturating_sub(self.share(consumer, shards));
        let kept = self.owners.values_mut().rev();
        let kept = kept.filter(|owner| owner.consumer == consumer && !owner.revoked);
        kept.take(surplus).for_each(|owner| owner.revoked = true);
    }

    /// Has the consumer give up the read-only shards that it may have read to their ends without
    /// saying so: it saves a checkpoint when it gives a shard up, and may have saved none because
    /// the shard had nothing for it. If it has not finished, it gets the shard again.
    fn revoke_finished(&mut self, now: Duration, consumer: &str, readable: &Readable) {
        for (shard, owner) in &mut self.owners {
            let long = now.saturating_sub(owner.since) > SILENCE;
            if owner.consumer == consumer && long && readable.silent.contains(shard) {
                owner.revoked = true;
            }
        }
    }

    fn fill_up(&mut self, now: Duration, consumer: &str, shards: &[u32]) {
        let wanted = self.share(consumer, shards.len()).saturating_sub(self.count(consumer));
        let free: Vec<u32> =
            shards.iter().filter(|shard| !self.owners.contains_key(shard)).copied().collect();
        for shard in free.into_iter().take(wanted) {
            self.owners.insert(shard, Owner::new(consumer, now));
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(10);
    const NONE: [u32; 0] = [];

    fn readable(shards: u32) -> Readable {
        Readable { shards: (0..shards).collect(), silent: BTreeSet::new() }
    }

    fn beat(
        assignment: &mut Assignment,
        at_s: u64,
        consumer: &str,
        held: &[u32],
        shards: u32,
    ) -> Result<Vec<u32>, Unknown> {
        let (held, readable) = (held.iter().copied().collect(), readable(shards));
        assignment.heartbeat(Duration::from_secs(at_s), TIMEOUT, consumer, &held, &readable)
    }

    #[test]
    fn a_shard_is_moved_after_its_owner_has_given_it_up() {
        let mut it = Assignment::default();
        assert_eq!(beat(&mut it, 0, "a", &[], 2).unwrap(), [0, 1]);
        assert_eq!(beat(&mut it, 1, "b", &[], 2).unwrap(), NONE);
        assert_eq!(beat(&mut it, 2, "a", &[0, 1], 2).unwrap(), [0]);
        // Shard 1 is still being given up.
        assert_eq!(beat(&mut it, 3, "a", &[0, 1], 2).unwrap(), [0]);
        assert_eq!(beat(&mut it, 3, "b", &[], 2).unwrap(), NONE);
        assert_eq!(it.owner(1), Some("a"));
        assert_eq!(beat(&mut it, 4, "a", &[0], 2).unwrap(), [0]);
        assert_eq!(beat(&mut it, 5, "b", &[], 2).unwrap(), [1]);
        // A report that lacks a shard which was never revoked gives nothing up.
        assert_eq!(beat(&mut it, 6, "a", &[], 2).unwrap(), [0]);
    }

    #[test]
    fn a_silent_consumer_loses_its_shards_and_must_begin_anew() {
        let mut it = Assignment::default();
        beat(&mut it, 0, "a", &[], 2).unwrap();
        beat(&mut it, 9, "b", &[], 2).unwrap();
        assert_eq!(beat(&mut it, 10, "b", &[], 2).unwrap(), NONE);
        assert_eq!(beat(&mut it, 11, "b", &[], 2).unwrap(), [0, 1]);
        assert_eq!(beat(&mut it, 12, "a", &[0, 1], 2), Err(Unknown));
        assert_eq!(beat(&mut it, 12, "a", &[], 2).unwrap(), NONE);
    }

    #[test]
    fn after_a_start_a_shard_goes_to_a_consumer_that_reports_it() {
        let mut it = Assignment::recovering_until(TIMEOUT);
        assert_eq!(beat(&mut it, 1, "new", &[], 3).unwrap(), NONE);
        assert_eq!(beat(&mut it, 2, "a", &[0, 1], 3).unwrap(), [0, 1]);
        assert_eq!(beat(&mut it, 9, "new", &[], 3).unwrap(), NONE);
        assert_eq!(beat(&mut it, 9, "a", &[0, 1], 3).unwrap(), [0, 1]);
        assert_eq!(beat(&mut it, 10, "new", &[], 3).unwrap(), [2]);
        assert_eq!(beat(&mut it, 11, "late", &[2], 3), Err(Unknown));
    }

    #[test]
    fn the_owner_of_a_silent_shard_gives_it_up_and_gets_it_again() {
        let mut it = Assignment::default();
        let mut beat = |at_s, held: &[u32], silent: &[u32]| {
            let silent = silent.iter().copied().collect();
            let readable = Readable { silent, ..readable(2) };
            let held = held.iter().copied().collect();
            it.heartbeat(Duration::from_secs(at_s), TIMEOUT, "a", &held, &readable).unwrap()
        };
        let late = SILENCE.as_secs() + 5;
        assert_eq!(beat(0, &[], &[0]), [0, 1]);
        for at_s in (5..late).step_by(5) {
            assert_eq!(beat(at_s, &[0, 1], &[0]), [0, 1], "{at_s}");
        }
        assert_eq!(beat(late, &[0, 1], &[0]), [1]);
        assert_eq!(beat(late + 1, &[0, 1], &[0]), [1]);
        // It has saved no checkpoint at the end, so there is something left to read.
        assert_eq!(beat(late + 2, &[1], &[0]), [0, 1]);
        assert_eq!(beat(late + 7, &[0, 1], &[0]), [0, 1]);
    }

    /// A consumer as the libraries behave: it gives up a shard that an answer leaves out some
    /// heartbeats later, and reports a shard until then.
    #[derive(Clone, Debug, Default)]
    struct Simulated {
        reads: BTreeSet<u32>,
        stopping: BTreeMap<u32, u32>,
        dead: bool,
    }

    impl Simulated {
        fn beat(&mut self, it: &mut Assignment, now_s: u64, name: &str, shards: u32, delay: u32) {
            let held: BTreeSet<u32> = self.holds();
            let now = Duration::from_secs(now_s);
            match it.heartbeat(now, TIMEOUT, name, &held, &readable(shards)) {
                Err(Unknown) => *self = Self::default(),
                Ok(assigned) => {
                    let assigned: BTreeSet<u32> = assigned.into_iter().collect();
                    for shard in self.reads.difference(&assigned) {
                        self.stopping.insert(*shard, delay);
                    }
                    self.reads = &assigned - &self.stopping.keys().copied().collect();
                }
            }
            for left in self.stopping.values_mut() {
                *left = left.saturating_sub(1);
            }
            self.stopping.retain(|_, left| *left > 0);
        }

        fn holds(&self) -> BTreeSet<u32> {
            self.reads.iter().chain(self.stopping.keys()).copied().collect()
        }
    }

    proptest! {
        /// Consumers come, go and die. No shard is ever held by two of them that the service thinks
        /// alive, and once nothing changes any more, the shards are spread evenly.
        #[test]
        fn no_two_consumers_hold_a_shard_and_all_are_served(
            shards in 1..9_u32,
            events in prop::collection::vec((0..4_usize, 0..3_u32, 0..20_u8), 1..60),
        ) {
            let mut it = Assignment::default();
            let mut consumers = vec![Simulated { dead: true, ..Simulated::default() }; 4];
            let mut now_s = 0;
            for (which, delay, dies) in events {
                now_s += 1;
                consumers[which].dead = dies == 0;
                for (index, consumer) in consumers.iter_mut().enumerate() {
                    if consumer.dead {
                        *consumer = Simulated { dead: true, ..Simulated::default() };
                    } else {
                        consumer.beat(&mut it, now_s, &index.to_string(), shards, delay);
                    }
                }
                let mut seen = BTreeSet::new();
                for consumer in &consumers {
                    for shard in consumer.holds() {
                        prop_assert!(seen.insert(shard), "shard {} twice: {:?}", shard, consumers);
                    }
                }
            }
            for _ in 0..40 {
                now_s += 1;
                for (index, consumer) in consumers.iter_mut().enumerate().filter(|(_, it)| !it.dead) {
                    consumer.beat(&mut it, now_s, &index.to_string(), shards, 1);
                }
            }
            let live: Vec<usize> =
                consumers.iter().filter(|it| !it.dead).map(|it| it.reads.len()).collect();
            if let (Some(least), Some(most)) = (live.iter().min(), live.iter().max()) {
                prop_assert!(most - least <= 1, "{:?}", live);
                prop_assert_eq!(live.iter().sum::<usize>() as u32, shards);
            }
        }
    }
}
