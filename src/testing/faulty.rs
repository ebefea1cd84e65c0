//! A KMS with injected faults, for tests.

use std::{collections::VecDeque, fmt, sync::Arc, thread, time::Duration};

use crate::{
    crypto::SecretKey,
    kms::{Kms, KmsCall, KmsError},
    sync::{
        LockRank, Mutex,
        atomic::{AtomicU64, Ordering},
        lock,
    },
};

/// The operation of a KMS call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// [`Kms::wrap`].
    Wrap,
    /// [`Kms::unwrap`].
    Unwrap,
}

/// The answer of a call to a [`FaultyKms`] that returns in time.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Answer {
    /// The answer of the KMS behind it.
    True,
    /// This error. The call does not reach the KMS behind it.
    Error(KmsError),
    /// Success with a wrong key. `wrap` wraps another key, and `unwrap` changes the unwrapped key.
    OtherKey,
    /// The wrapped key is cut short: after `wrap`, or before `unwrap`.
    Truncated,
    /// The wrapped key is changed: after `wrap`, or before `unwrap`.
    Garbled,
}

/// The faults of one call to a [`FaultyKms`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The delay before the call reaches the KMS.
    pub there: Duration,
    /// The delay of the answer on its way back. The answer does not reflect changes to the master
    /// key during this time.
    pub back: Duration,
    /// The answer.
    pub answer: Answer,
    /// Whether the caller waits for a call that exceeds its time limit, as for a backend that
    /// breaks the rules. Otherwise the call ends at its time limit, as unreachable.
    pub overdue: bool,
}

impl Fault {
    /// No fault.
    #[must_use]
    pub fn none() -> Self {
        Self::answer(Answer::True)
    }

    /// This answer, without delay.
    #[must_use]
    pub fn answer(answer: Answer) -> Self {
        Self { there: Duration::ZERO, back: Duration::ZERO, answer, overdue: false }
    }

    /// This error, without delay.
    #[must_use]
    pub fn error(error: KmsError) -> Self {
        Self::answer(Answer::Error(error))
    }

    /// The answer of the KMS behind it, with these delays.
    #[must_use]
    pub fn delay(there: Duration, back: Duration) -> Self {
        Self { there, back, ..Self::none() }
    }
}

type Plan = Box<dyn FnMut(Operation, &KmsCall<'_>) -> Fault + Send>;
type Sleep = Box<dyn Fn(Duration) + Send + Sync>;

/// A KMS in front of another KMS. It delays, fails and falsifies calls as configured. With it an
/// embedder tests how its service behaves when a customer's KMS fails.
///
/// ```
/// # #[cfg(feature = "kms-local")] {
/// use std::{sync::Arc, time::Duration};
/// use envelog::{kms::{KmsError, LocalKms}, testing::{Fault, FaultyKms}};
///
/// let dir = tempfile::tempdir().unwrap();
/// let kms = Arc::new(FaultyKms::new(Arc::new(LocalKms::at(dir.path()))));
/// // Throttled once, then slow. After that it passes calls through.
/// kms.then(Fault::error(KmsError::Unreachable { detail: "throttled".into() }));
/// kms.then(Fault::delay(Duration::from_millis(300), Duration::ZERO));
/// // After those two calls, every third call gets no answer.
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
        f.debug_struct("FaultyKms")
            .field("kms", &self.kms)
            .field("calls", &self.calls())
            .finish_non_exhaustive()
    }
}

impl FaultyKms {
    /// A KMS in front of `kms`, without a fault.
    #[expect(
        clippy::disallowed_methods,
        reason = "a test with a clock of its own calls `sleeping_by`"
    )]
    pub fn new(kms: Arc<dyn Kms>) -> Self {
        Self {
            kms,
            sleep: Box::new(thread::sleep),
            script: Mutex::new(LockRank::KmsScript, VecDeque::new()),
            plan: Mutex::new(LockRank::KmsPlan, Box::new(|_, _| Fault::none())),
            calls: AtomicU64::new(0),
        }
    }

    /// Replaces sleeping by `sleep`, for tests with a clock of their own.
    #[must_use]
    pub fn sleeping_by(mut self, sleep: impl Fn(Duration) + Send + Sync + 'static) -> Self {
        self.sleep = Box::new(sleep);
        self
    }

    /// Queues the fault for the next call that has none queued yet.
    pub fn then(&self, fault: Fault) {
        lock(&self.script).push_back(fault);
    }

    /// Sets the faults of the calls after the queue of [`FaultyKms::then`] is empty.
    pub fn plan(&self, plan: impl FnMut(Operation, &KmsCall<'_>) -> Fault + Send + 'static) {
        *lock(&self.plan) = Box::new(plan);
    }

    /// The number of calls so far.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    /// Makes one call with `make`, on the KMS behind, and applies the fault.
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

    fn try_serves(&self, region_id: &str) -> Result<bool, KmsError> {
        self.kms.try_serves(region_id)
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

        // After the script has ended, the plan decides. The answer does not reflect changes during
        // its way back.
        kms.plan(|operation, _| {
            let error = KmsError::Unreachable { detail: "down".into() };
            if operation == Operation::Wrap { Fault::error(error) } else { Fault::none() }
        });
        assert!(kms.wrap(&call, &key).is_err() && unwrapped().is_ok());
        assert_eq!(kms.calls(), 18);
        assert!(kms.serves("r") && kms.name() == "local");
    }
}
