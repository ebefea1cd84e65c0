//! What the leases at one KMS know of its health together.
//!
//! A KMS that is down is asked by every lease once a period, and each call takes all the time that it may. With many master
//! keys that is a crowd, which also delays the first good answer. So once several calls in a row got no answer, leases that have
//! *ended* are spared calls of their own: one call a period finds out for all of them, and at the first answer of any kind each asks for itself
//! again. A lease that is still alive is never spared: what happens to other keys must not cost it its renewal.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use super::lease::{Lease, Moment, Refusal};
use crate::{
    io::Clock,
    sync::{Mutex, lock},
};

/// After how many calls in a row without an answer leases are spared.
const OPENS_AFTER: u32 = 3;
/// For at most how many periods of renewal a lease goes without a call of its own: the keys of others may be what is out of order.
pub(super) const PERIODS_SPARED: u32 = 8;

#[derive(Default)]
struct State {
    /// Calls in a row that got no answer.
    failures: u32,
    /// When the KMS was last asked, for all that are spared, and what came of it so far.
    asked: Option<(Moment, String)>,
    spared: Vec<Weak<Lease>>,
}

/// The circuit breaker of one KMS and region.
#[derive(Default)]
pub(crate) struct Circuit(Mutex<State>);

impl Circuit {
    /// Takes in what a call came to. Returns the leases that were spared when it is the first one to get an answer again: they are to
    /// ask for themselves now.
    pub(super) fn note(&self, sent: Moment, answer: &Result<(), Refusal>) -> Vec<Arc<Lease>> {
        let mut state = lock(&self.0);
        if let Err(Refusal::Unreachable(detail)) = answer {
            state.failures = state.failures.saturating_add(1);
            state.asked = Some((sent, detail.clone()));
            return Vec::new();
        }
        state.failures = 0;
        state.asked = None;
        std::mem::take(&mut state.spared).iter().filter_map(Weak::upgrade).collect()
    }

    /// Whether several calls in a row got no answer.
    pub(super) fn is_open(&self) -> bool {
        lock(&self.0).failures >= OPENS_AFTER
    }

    /// What a lease that has ended can do without a call of its own for: the outage that a call of at most `age` ago has found. `None`
    /// when it has to call; the others are then spared on its behalf.
    pub(super) fn spare(
        &self,
        lease: Weak<Lease>,
        now: Moment,
        age: Duration,
        clock: &dyn Clock,
    ) -> Option<(Moment, String)> {
        let mut state = lock(&self.0);
        if state.failures < OPENS_AFTER {
            return None;
        }
        let asked = state.asked.as_mut()?;
        if asked.0.is_past(age, clock) {
            asked.0 = now;
            return None;
        }
        let asked = asked.clone();
        if !state.spared.iter().any(|other| other.ptr_eq(&lease)) {
            state.spared.retain(|other| other.strong_count() > 0);
            state.spared.push(lease);
        }
        Some(asked)
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::lease::tests::{World, away},
        *,
    };
    use crate::io::SystemClock;

    #[test]
    fn it_opens_after_several_calls_in_a_row_and_lets_one_ask_now_and_then() {
        const HOUR: Duration = Duration::from_secs(3600);
        let (circuit, now) = (Circuit::default(), Moment::now(&SystemClock));
        let spare = |age| circuit.spare(Weak::new(), now, age, &SystemClock);
        let fails = |detail: &str| circuit.note(now, &Err(Refusal::Unreachable(detail.to_owned())));
        for detail in ["first", "second", "third"] {
            assert!(!circuit.is_open() && spare(HOUR).is_none(), "before the {detail}");
            assert!(fails(detail).is_empty());
        }
        assert!(circuit.is_open());
        assert_eq!(spare(HOUR), Some((now, "third".to_owned())));
        assert_eq!(spare(Duration::ZERO), None, "it is to ask");
        // A refusal is an answer.
        circuit.note(now, &Err(Refusal::Invalid("none".to_owned())));
        assert!(!circuit.is_open() && spare(HOUR).is_none());
    }

    #[test]
    fn all_that_were_spared_are_told_of_the_first_answer() {
        let world = World::new();
        let leases = [(); 4].map(|()| world.lease());
        world.kms_is(away());
        leases.iter().for_each(|lease| lease.renew());
        let spared = || lock(&world.circuit.0).spared.len();
        let now = Moment::now(&*world.clock);
        let spare = |lease: &Arc<Lease>| {
            world.circuit.spare(Arc::downgrade(lease), now, Duration::from_secs(3600), &*world.clock)
        };
        for (lease, count) in [(0, 1), (0, 1), (1, 2), (0, 2), (2, 3)] {
            assert!(spare(&leases[lease]).is_some());
            assert_eq!(spared(), count, "{lease}");
        }
        // One that is gone is forgotten.
        let [first, second, third, fourth] = leases;
        drop(second);
        assert!(spare(&fourth).is_some());
        assert_eq!(spared(), 3);
        let told = world.circuit.note(now, &Ok(()));
        assert_eq!(told.len(), 3);
        assert!([first, third, fourth].iter().zip(&told).all(|(lease, told)| Arc::ptr_eq(lease, told)));
        assert_eq!(spared(), 0);
    }
}
