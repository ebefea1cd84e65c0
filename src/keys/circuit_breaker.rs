//! A circuit breaker for the leases at one KMS and region.
//!
//! While a KMS is down, every lease calls it once a period, and each call takes as long as a call
//! may take. With many master keys these calls pile up and delay the first good answer. Once
//! several calls in a row got no answer, the breaker opens. *Expired* leases then stop calling: one
//! call a period probes the KMS for all of them. The first answer of any kind closes the breaker,
//! and each of those leases calls for itself again.
//!
//! A lease that has not expired always calls for itself. An outage that concerns other keys must
//! not cost it a renewal.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use super::moment::Moment;
use crate::{
    io::Clock,
    key_status::Refusal,
    sync::{LockRank, Mutex, lock},
};

/// After how many calls in a row without an answer the breaker opens.
const OPENS_AFTER: u32 = 3;
/// How many renewal periods a lease may go without a call of its own. The outage may concern the
/// master keys of other leases only.
pub(super) const PERIODS_SPARED: u32 = 8;

/// A lease that reused the result of another lease's call.
pub(super) trait Spared: Send + Sync {
    /// The KMS answers again. The lease is to call it soon.
    fn ask_soon(&self);
}

/// The circuit breaker of one KMS and region.
pub(crate) struct CircuitBreaker(Mutex<State>);

impl Default for CircuitBreaker {
    fn default() -> Self {
        Self(Mutex::new(LockRank::CircuitBreaker, State::default()))
    }
}

impl CircuitBreaker {
    /// Takes in the result of a call that was sent at `sent`. When the call got the first answer
    /// after an outage, this returns the leases that stopped calling. They are to call now.
    pub(super) fn note(&self, sent: Moment, answer: &Result<(), Refusal>) -> Vec<Arc<dyn Spared>> {
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

    /// The outage that another lease's call found within the last `age`, if any: when that call was
    /// sent, and its error. An expired lease may reuse it instead of calling. On `None` the caller
    /// must call the KMS. The others then reuse the result of that call.
    pub(super) fn spare(
        &self,
        lease: Weak<dyn Spared>,
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

#[derive(Default)]
struct State {
    /// Calls in a row that got no answer.
    failures: u32,
    /// When the last call was sent on behalf of all expired leases, and the last error.
    asked: Option<(Moment, String)>,
    /// The leases that reused a result.
    spared: Vec<Weak<dyn Spared>>,
}

#[cfg(test)]
mod tests {
    use super::{
        super::lease::{
            Lease,
            tests::{World, away},
        },
        *,
    };
    use crate::io::SystemClock;

    #[test]
    fn it_opens_after_failures_in_a_row_and_lets_one_probe() {
        const HOUR: Duration = Duration::from_secs(3600);
        let (breaker, now) = (CircuitBreaker::default(), Moment::now(&SystemClock));
        let spare = |age| breaker.spare(Weak::<Lease>::new(), now, age, &SystemClock);
        let fails = |detail: &str| breaker.note(now, &Err(Refusal::Unreachable(detail.to_owned())));
        for detail in ["first", "second", "third"] {
            assert!(!breaker.is_open() && spare(HOUR).is_none(), "before the {detail}");
            assert!(fails(detail).is_empty());
        }
        assert!(breaker.is_open());
        assert_eq!(spare(HOUR), Some((now, "third".to_owned())));
        assert_eq!(spare(Duration::ZERO), None, "the caller must call");
        // A refusal is an answer.
        breaker.note(now, &Err(Refusal::Invalid("none".to_owned())));
        assert!(!breaker.is_open() && spare(HOUR).is_none());
    }

    #[test]
    fn all_that_were_spared_are_told_of_the_first_answer() {
        let world = World::new();
        let leases = [(); 4].map(|()| world.lease());
        world.kms_is(away());
        leases.iter().for_each(|lease| lease.renew().unwrap());
        let spared = || lock(&world.breaker.0).spared.len();
        let now = Moment::now(&*world.clock);
        let spare = |lease: &Arc<Lease>| {
            let weak: Weak<Lease> = Arc::downgrade(lease);
            world.breaker.spare(weak, now, Duration::from_secs(3600), &*world.clock)
        };
        for (lease, count) in [(0, 1), (0, 1), (1, 2), (0, 2), (2, 3)] {
            assert!(spare(&leases[lease]).is_some());
            assert_eq!(spared(), count, "{lease}");
        }
        // The breaker forgets a lease that was dropped.
        let [first, second, third, fourth] = leases;
        drop(second);
        assert!(spare(&fourth).is_some());
        assert_eq!(spared(), 3);
        let told = world.breaker.note(now, &Ok(()));
        assert_eq!(told.len(), 3);
        let same = |lease: &Arc<Lease>, told: &Arc<dyn Spared>| {
            std::ptr::addr_eq(Arc::as_ptr(lease), Arc::as_ptr(told))
        };
        assert!([first, third, fourth].iter().zip(&told).all(|(lease, told)| same(lease, told)));
        assert_eq!(spared(), 0);
    }
}
