//! A KMS that fails as it is told, for tests.

use std::{collections::VecDeque, fmt, sync::Arc, thread, time::Duration};

use super::{Kms, KmsCall, KmsError};
use crate::{
    crypto::SecretKey,
    sync::{
        LockRank, Mutex,
        atomic::{AtomicU64, Ordering},
        lock,
    },
};

/// What a KMS is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// [`Kms::wrap`].
    Wrap,
    /// [`Kms::unwrap`].
    Unwrap,
}

/// What a call to a [`FaultyKms`] comes to, if it comes to its end in time.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Answer {
    /// What the KMS behind it says.
    True,
    /// This error. The KMS behind it is not asked.
    Error(KmsError),
    /// Success, and a key that is not the right one: another one is wrapped, or what was unwrapped is changed.
    OtherKey,
    /// What is wrapped is cut short on its way back, or on its way there to be unwrapped.
    Truncated,
    /// What is wrapped is changed on its way.
    Garbled,
}

/// What becomes of one call to a [`FaultyKms`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// How long the call takes to get to the KMS.
    pub there: Duration,
    /// How long the answer takes to get back: what becomes of the master key in the meantime is not in it.
    pub back: Duration,
    /// What the answer is.
    pub answer: Answer,
    /// Whether a call that takes longer than it may is waited for all the same, against the rules for a backend. Else it is given up after its
    /// time limit, as unreachable.
    pub overdue: bool,
}

impl Fault {
    /// No fault at all.
    #[must_use]
    pub fn none() -> Self {
        Self::answer(Answer::True)
    }

    /// This answer, at once.
    #[must_use]
    pub fn answer(answer: Answer) -> Self {
        Self { there: Duration::ZERO, back: Duration::ZERO, answer, overdue: false }
    }

    /// This error, at once.
    #[must_use]
    pub fn error(error: KmsError) -> Self {
        Self::answer(Answer::Error(error))
    }

    /// The true answer after these delays.
    #[must_use]
    pub fn delay(there: Duration, back: Duration) -> Self {
        Self { there, back, ..Self::none() }
    }
}

type Plan = Box<dyn FnMut(Operation, &KmsCall<'_>) -> Fault + Send>;
type Sleep = Box<dyn Fn(Duration) + Send + Sync>;

/// A KMS in front of another one, which delays, fails and falsifies calls as it is told: to test what an embedder's service
/// does when a customer's KMS misbehaves.
///
/// ```
/// # #[cfg(feature = "kms-local")] {
/// use std::{sync::Arc, time::Duration};
/// use envelog::kms::{Fault, FaultyKms, KmsError, LocalKms};
///
/// let dir = tempfile::tempdir().unwrap();
/// let kms = Arc::new(FaultyKms::new(Arc::new(LocalKms::at(dir.path()))));
/// // Throttled once, then slow; after that as healthy as the one behind it.
/// kms.then(Fault::error(KmsError::Unreachable { detail: "throttled".into() }));
/// kms.then(Fault::delay(Duration::from_millis(300), Duration::ZERO));
/// // Or, once those are used up: every third call gets no answer.
/// let mut count = 0;
/// kms.plan(move |_, call| {
///     count += 1;
///     if count % 3 == 0 { Fault::delay(call.timeout, Duration::ZERO) } else { Fault::none() }
/// });
/// # }
/// ```
pub struct FaultyKms {
    kms: Arc<dyn Kms>,
    sleep: Sleep,
    script: Mutex<VecDeque<Fault>>,
    plan: Mutex<Plan>,
    calls: AtomicU64,
}

impl fmt::Debug for FaultyKms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultyKms").field("kms", &self.kms).field("calls", &self.calls()).finish_non_exhaustive()
    }
}

impl FaultyKms {
    /// In front of `kms`, without a fault so far.
    #[expect(clippy::disallowed_methods, reason = "who has a clock of his own says so by `sleeping_by`")]
    pub fn new(kms: Arc<dyn Kms>) -> Self {
        Self {
            kms,
            sleep: Box::new(thread::sleep),
            script: Mutex::new(LockRank::KmsScript, VecDeque::new()),
            plan: Mutex::new(LockRank::KmsPlan, Box::new(|_, _| Fault::none())),
            calls: AtomicU64::new(0),
        }
    }

    /// Lets time pass by this instead of sleeping: for tests that have a clock of their own.
    #[must_use]
    pub fn sleeping_by(mut self, sleep: impl Fn(Duration) + Send + Sync + 'static) -> Self {
        self.sleep = Box::new(sleep);
        self
    }

    /// Adds what the next call comes to that nothing else was said of.
    pub fn then(&self, fault: Fault) {
        lock(&self.script).push_back(fault);
    }

    /// Says what calls come to, once those are over that [`FaultyKms::then`] was about.
    pub fn plan(&self, plan: impl FnMut(Operation, &KmsCall<'_>) -> Fault + Send + 'static) {
        *lock(&self.plan) = Box::new(plan);
    }

    /// The calls so far.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    /// One call, which `make` makes at the KMS behind, in the way that the answer says.
    fn call<T>(
        &self,
        operation: Operation,
        call: &KmsCall<'_>,
        make: impl FnOnce(&Answer) -> Result<T, KmsError>,
    ) -> Result<T, KmsError> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let scripted = lock(&self.script).pop_front();
        let fault = scripted.unwrap_or_else(|| (lock(&self.plan))(operation, call));
        let given_up = |left| {
            (self.sleep)(left);
            Err(KmsError::Unreachable { detail: format!("no answer within {:?}", call.timeout) })
        };
        if fault.there >= call.timeout && !fault.overdue {
            return given_up(call.timeout);
        }
        (self.sleep)(fault.there);
        let answer = match fault.answer {
            Answer::Error(error) => Err(error),
            answer => make(&answer),
        };
        let left = call.timeout.saturating_sub(fault.there);
        if fault.back >= left && !fault.overdue {
            return given_up(left);
        }
        (self.sleep)(fault.back);
        answer
    }
}

/// A key that differs from this one.
fn other(key: &SecretKey) -> SecretKey {
    let mut bytes = key.expose().map(|byte| !byte);
    SecretKey::from_bytes(&mut bytes)
}

fn mangled(answer: &Answer, mut wrapped: Vec<u8>) -> Vec<u8> {
    match answer {
        Answer::Truncated => wrapped.truncate(wrapped.len() / 2),
        Answer::Garbled => wrapped.iter_mut().for_each(|byte| *byte = byte.rotate_left(3) ^ 0x5a),
        Answer::True | Answer::Error(_) | Answer::OtherKey => {}
    }
    wrapped
}

impl Kms for FaultyKms {
    fn name(&self) -> &str {
        self.kms.name()
    }

    fn serves(&self, region_id: &str) -> bool {
        self.kms.serves(region_id)
    }

    fn wrap(&self, call: &KmsCall<'_>, key: &SecretKey) -> Result<Vec<u8>, KmsError> {
        self.call(Operation::Wrap, call, |answer| match answer {
            Answer::OtherKey => self.kms.wrap(call, &other(key)),
            answer => Ok(mangled(answer, self.kms.wrap(call, key)?)),
        })
    }

    fn unwrap(&self, call: &KmsCall<'_>, wrapped: &[u8]) -> Result<SecretKey, KmsError> {
        self.call(Operation::Unwrap, call, |answer| {
            let key = self.kms.unwrap(call, &mangled(answer, wrapped.to_vec()))?;
            Ok(if *answer == Answer::OtherKey { other(&key) } else { key })
        })
    }
}

#[cfg(all(test, feature = "kms-local"))]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::kms::{Cmk, EncryptionContext, LocalKms};

    fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    #[test]
    fn calls_take_and_come_to_what_they_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let local = LocalKms::create_or_open(dir.path()).unwrap();
        let cmk_key_id = local.create_key("r", &["role"]).unwrap();
        let local = Arc::new(local);
        let slept = Arc::new(Mutex::new(LockRank::Test, Duration::ZERO));
        let time = Arc::clone(&slept);
        let kms = FaultyKms::new(Arc::clone(&local) as _).sleeping_by(move |by| *lock(&time) += by);
        let cmk = Cmk { cmk_key_id, arn: "role".into(), region_id: "r".into() };
        let context = EncryptionContext::from([("a".to_owned(), "b".to_owned())]);
        let call = KmsCall { cmk: &cmk, context: &context, timeout: ms(100) };
        let key = SecretKey::from_bytes(&mut [7; 32]);
        let wrapped = kms.wrap(&call, &key).unwrap();
        let unwrapped = || kms.unwrap(&call, &wrapped).map(|key| *key.expose());
        let took = || std::mem::take(&mut *lock(&slept));
        assert_eq!(unwrapped(), Ok([7; 32]));
        assert_eq!(took(), ms(0));

        kms.then(Fault::delay(ms(30), ms(20)));
        assert_eq!((unwrapped(), took()), (Ok([7; 32]), ms(50)));
        for late in [Fault::delay(ms(100), ms(0)), Fault::delay(ms(60), ms(40))] {
            kms.then(late.clone());
            assert!(matches!(unwrapped(), Err(KmsError::Unreachable { .. })));
            assert_eq!(took(), ms(100));
            kms.then(Fault { overdue: true, ..late });
            assert_eq!((unwrapped(), took()), (Ok([7; 32]), ms(100)));
        }
        kms.then(Fault::answer(Answer::OtherKey));
        assert_eq!(unwrapped(), Ok([!7; 32]));
        for answer in [Answer::Truncated, Answer::Garbled] {
            kms.then(Fault::answer(answer.clone()));
            assert!(matches!(unwrapped(), Err(KmsError::Invalid { .. })));
            kms.then(Fault::answer(answer));
            let bad = kms.wrap(&call, &key).unwrap();
            assert!(matches!(kms.unwrap(&call, &bad), Err(KmsError::Invalid { .. })));
        }
        kms.then(Fault::answer(Answer::OtherKey));
        let bad = kms.wrap(&call, &key).unwrap();
        assert_eq!(kms.unwrap(&call, &bad).map(|key| *key.expose()), Ok([!7; 32]));

        // The plan decides when the script is over; what changes while the answer is on its way is not in it.
        kms.plan(|operation, _| {
            let error = KmsError::Unreachable { detail: "down".into() };
            if operation == Operation::Wrap { Fault::error(error) } else { Fault::none() }
        });
        assert!(kms.wrap(&call, &key).is_err() && unwrapped().is_ok());
        assert_eq!(kms.calls(), 18);
        assert!(kms.serves("r") && kms.name() == "local");
    }
}
