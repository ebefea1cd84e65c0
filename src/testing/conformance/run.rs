//! A run of the suite: calls to the backend, and the records of all that it has shown.

use std::{
    any::Any,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};

use zeroize::Zeroizing;

use super::{
    Settings,
    proxy::pause,
    subject::{AdminError, Subject},
};
use crate::{
    crypto::{SecretKey, tags_equal},
    io::{Clock, OsRandom, Random, SystemClock},
    kms::{Cmk, EncryptionContext, Kms, KmsCall, KmsError, RevokedReason},
    sync::{LockRank, Mutex, lock},
};

/// The pause before the suite looks again whether a change has taken effect.
const SETTLE_PAUSE: Duration = Duration::from_millis(50);

/// The reason why a check ended early.
#[derive(Debug)]
pub(super) enum Stop {
    Failed(String),
    NotApplicable(String),
}

impl From<AdminError> for Stop {
    fn from(error: AdminError) -> Self {
        match error {
            AdminError::Unsupported(reason) => Self::NotApplicable(reason),
            AdminError::Failed(_) => Self::Failed(error.to_string()),
        }
    }
}

/// The result of a check, or of a part of it.
pub(super) type Check<T = ()> = Result<T, Stop>;

pub(super) fn failed<T>(why: impl Into<String>) -> Check<T> {
    Err(Stop::Failed(why.into()))
}

/// The records of a run, for the checks of secrecy.
pub(super) struct Heard {
    /// The keys that the suite has drawn.
    pub(super) keys: Vec<Zeroizing<[u8; 32]>>,
    /// The errors of all calls.
    pub(super) errors: Vec<KmsError>,
    /// The `Debug` output of the instances, and the wrapped keys.
    pub(super) shown: Vec<Vec<u8>>,
}

/// A run of the suite.
pub(super) struct Run<'a> {
    pub(super) subject: &'a dyn Subject,
    pub(super) settings: &'a Settings,
    pub(super) heard: Mutex<Heard>,
}

/// A wrapped key that must open until the administrator intervenes.
pub(super) struct Sample {
    pub(super) cmk: Cmk,
    pub(super) context: EncryptionContext,
    pub(super) key: SecretKey,
    pub(super) wrapped: Vec<u8>,
}

impl<'a> Run<'a> {
    pub(super) fn new(subject: &'a dyn Subject, settings: &'a Settings) -> Self {
        let heard = Heard { keys: Vec::new(), errors: Vec::new(), shown: Vec::new() };
        Self { subject, settings, heard: Mutex::new(LockRank::KmsConformance, heard) }
    }

    /// A new instance of the backend, with the time limit for a KMS that answers.
    pub(super) fn caller(&self) -> Caller<'_> {
        self.caller_of(self.subject.kms())
    }

    pub(super) fn caller_of(&self, kms: Arc<dyn Kms>) -> Caller<'_> {
        let caller = Caller { run: self, kms, timeout: self.settings.timeout };
        caller.show();
        caller
    }

    /// Random bytes.
    pub(super) fn random(&self, len: usize) -> Check<Vec<u8>> {
        let mut bytes = vec![0; len];
        match OsRandom.fill(&mut bytes) {
            Ok(()) => Ok(bytes),
            Err(error) => failed(format!("no randomness: {error}")),
        }
    }

    /// A new data key.
    pub(super) fn key(&self) -> Check<SecretKey> {
        let Ok(key) = SecretKey::generate(&OsRandom) else { return failed("no randomness") };
        lock(&self.heard).keys.push(Zeroizing::new(*key.expose()));
        Ok(key)
    }

    /// A key wrapped under a new master key.
    pub(super) fn sample(&self, caller: &Caller<'_>) -> Check<Sample> {
        self.sample_under(caller, self.subject.create_key()?)
    }

    /// A key wrapped under this master key. It has been unwrapped once, so a backend that caches
    /// keys has it.
    pub(super) fn sample_under(&self, caller: &Caller<'_>, cmk: Cmk) -> Check<Sample> {
        let (context, key) = (context("1"), self.key()?);
        let wrapped = accepted(caller.wrap(&cmk, &context, &key)?, "wrapping a key")?;
        let sample = Sample { cmk, context, key, wrapped };
        caller.opens(&sample, "a key that was just wrapped")?;
        Ok(sample)
    }

    /// Repeats a check until a change of the administrator must have taken effect.
    pub(super) fn settled(&self, check: impl Fn() -> Check) -> Check {
        let began = SystemClock.uptime();
        loop {
            match check() {
                Err(_) if SystemClock.uptime() < began + self.settings.settle => {
                    pause(SETTLE_PAUSE);
                }
                done => return done,
            }
        }
    }
}

/// An instance of the backend, and a time limit for its calls.
#[derive(Clone)]
pub(super) struct Caller<'r> {
    run: &'r Run<'r>,
    pub(super) kms: Arc<dyn Kms>,
    pub(super) timeout: Duration,
}

impl<'r> Caller<'r> {
    /// The same instance with another time limit.
    pub(super) fn within(&self, timeout: Duration) -> Self {
        Self { timeout, ..self.clone() }
    }

    pub(super) fn wrap(
        &self,
        cmk: &Cmk,
        context: &EncryptionContext,
        key: &SecretKey,
    ) -> Check<Result<Vec<u8>, KmsError>> {
        let call = KmsCall { cmk, context, timeout: self.timeout };
        let answer = self.call("wrap", || self.kms.wrap(&call, key))?;
        if let Ok(wrapped) = &answer {
            lock(&self.run.heard).shown.push(wrapped.clone());
        }
        Ok(answer)
    }

    pub(super) fn unwrap(
        &self,
        cmk: &Cmk,
        context: &EncryptionContext,
        wrapped: &[u8],
    ) -> Check<Result<SecretKey, KmsError>> {
        let call = KmsCall { cmk, context, timeout: self.timeout };
        self.call("unwrap", || self.kms.unwrap(&call, wrapped))
    }

    /// The version of the master key that wrapped this.
    pub(super) fn cmk_version(&self, wrapped: &[u8]) -> Check<Option<String>> {
        caught("cmk_version", || self.kms.cmk_version(wrapped))
    }

    pub(super) fn serves(&self, region_id: &str) -> Check<bool> {
        caught("serves", || self.kms.serves(region_id))
    }

    /// Records the `Debug` output of the instance.
    pub(super) fn show(&self) {
        let text = format!("{:?}\n{:#?}", self.kms, self.kms).into_bytes();
        lock(&self.run.heard).shown.push(text);
    }

    fn call<T>(
        &self,
        method: &str,
        make: impl FnOnce() -> Result<T, KmsError>,
    ) -> Check<Result<T, KmsError>> {
        let answer = caught(method, make)?;
        if let Err(error) = &answer {
            lock(&self.run.heard).errors.push(error.clone());
        }
        Ok(answer)
    }

    fn unwrap_sample(&self, sample: &Sample) -> Check<Result<SecretKey, KmsError>> {
        self.unwrap(&sample.cmk, &sample.context, &sample.wrapped)
    }

    fn wrap_again(&self, sample: &Sample) -> Check<Result<Vec<u8>, KmsError>> {
        self.wrap(&sample.cmk, &sample.context, &sample.key)
    }

    /// The wrapped key opens, to the key that was wrapped.
    pub(super) fn opens(&self, sample: &Sample, when: &str) -> Check {
        let key = accepted(self.unwrap_sample(sample)?, &format!("unwrapping {when}"))?;
        if tags_equal(key.expose(), sample.key.expose()) {
            return Ok(());
        }
        failed(format!("unwrapping {when} gives another key"))
    }

    /// The wrapped key opens, and another key can be wrapped.
    pub(super) fn works(&self, sample: &Sample, when: &str) -> Check {
        self.opens(sample, when)?;
        self.run.sample_under(self, sample.cmk.clone()).map(drop)
    }

    /// Both operations are refused for this reason.
    pub(super) fn revoked(&self, sample: &Sample, reason: RevokedReason, when: &str) -> Check {
        let wanted = Wanted::Revoked(reason);
        refused(self.unwrap_sample(sample)?, wanted, &format!("unwrapping {when}"))?;
        refused(self.wrap_again(sample)?, wanted, &format!("wrapping {when}"))
    }

    /// Unwrapping is unreachable, and ends in time.
    pub(super) fn unreachable_once(&self, sample: &Sample, when: &str) -> Check {
        self.in_time(&format!("unwrapping {when}"), |what| {
            refused(self.unwrap_sample(sample)?, Wanted::Unreachable, what)
        })
    }

    /// Both operations are unreachable, and end in time.
    pub(super) fn unreachable(&self, sample: &Sample, when: &str) -> Check {
        self.unreachable_once(sample, when)?;
        self.in_time(&format!("wrapping {when}"), |what| {
            refused(self.wrap_again(sample)?, Wanted::Unreachable, what)
        })
    }

    /// The check ends within the time limit of a call and the tolerance.
    pub(super) fn in_time(&self, what: &str, check: impl FnOnce(&str) -> Check) -> Check {
        let began = SystemClock.uptime();
        check(what)?;
        let took = SystemClock.uptime().saturating_sub(began);
        let Settings { tolerance, .. } = *self.run.settings;
        if took <= self.timeout + tolerance {
            return Ok(());
        }
        failed(format!(
            "{what} took {took:?}, with a time limit of {:?} and a tolerance of {tolerance:?}",
            self.timeout
        ))
    }
}

/// The required kind of a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    Invalid,
    Unreachable,
    Revoked(RevokedReason),
    /// Invalid, or revoked for any reason.
    InvalidOrRevoked,
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid => f.write_str("invalid"),
            Self::Unreachable => f.write_str("unreachable"),
            Self::Revoked(reason) => write!(f, "revoked ({reason})"),
            Self::InvalidOrRevoked => f.write_str("invalid or revoked"),
        }
    }
}

/// The value of a call that must succeed.
pub(super) fn accepted<T>(answer: Result<T, KmsError>, what: &str) -> Check<T> {
    answer.or_else(|error| failed(format!("{what} must succeed, and failed: {error}")))
}

/// A call that must fail in this way.
pub(super) fn refused<T>(answer: Result<T, KmsError>, wanted: Wanted, what: &str) -> Check {
    let error = match answer {
        Ok(_) => return failed(format!("{what} must be {wanted}, and succeeded")),
        Err(error) => error,
    };
    let fits = match (&error, wanted) {
        (KmsError::Invalid { .. }, Wanted::Invalid | Wanted::InvalidOrRevoked)
        | (KmsError::Unreachable { .. }, Wanted::Unreachable)
        | (KmsError::Revoked { .. }, Wanted::InvalidOrRevoked) => true,
        (KmsError::Revoked { reason, .. }, Wanted::Revoked(wanted)) => *reason == wanted,
        _ => false,
    };
    if fits { Ok(()) } else { failed(format!("{what} must be {wanted}, and was: {error}")) }
}

/// Runs a part of a check. A panic fails the check.
pub(super) fn caught<T>(what: &str, run: impl FnOnce() -> T) -> Check<T> {
    catch_unwind(AssertUnwindSafe(run))
        .or_else(|panic| failed(format!("{what} panicked: {}", message(&*panic))))
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or(panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a message")
}

/// A context like those of the engine.
pub(super) fn context(store: &str) -> EncryptionContext {
    context_of(&[
        ("envelog:key-version", "1"),
        ("envelog:logstore", "31c393bf2a6259de8078"),
        ("envelog:store", store),
        ("envelog:suite", "AES-256-GCM"),
    ])
}

pub(super) fn context_of(entries: &[(&str, &str)]) -> EncryptionContext {
    entries.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect()
}
