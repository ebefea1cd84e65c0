//! KMS calls with a time limit that holds for any backend.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::Duration,
};

use tracing::{debug, debug_span, warn};

use super::{
    Cmk, EncryptionContext, Kms, KmsCall, KmsError,
    calls::{Busy, Calls, Slot},
    meter::{KmsMeter, Outcome},
};
#[cfg(test)]
use crate::sync::lock;
use crate::{
    crypto::{SecretKey, on_clean_stack},
    io::{Clock, SystemClock},
    sync::assert_may_wait_for_kms,
};

/// How often a thread that waits for an answer looks at the clocks. A timed wait does not count the
/// time in which the machine was suspended; the clocks do.
pub(crate) const LOOK_EVERY: Duration = Duration::from_millis(50);

/// A KMS whose calls end after their time limit. So the bound on revocation does not depend on a
/// backend that honours its timeout.
#[derive(Clone, Debug)]
pub(crate) struct BoundedKms {
    kms: Arc<dyn Kms>,
    timeout: Duration,
    runs: Runs,
    calls: Arc<Calls>,
    watch: Watch,
}

/// Where calls run.
#[derive(Clone, Debug)]
enum Runs {
    /// Each in a thread of its own.
    InThreads,
    /// In the caller's thread, for a store without threads.
    Inline,
    /// When a simulation runs them.
    #[cfg(test)]
    Later(DeferredCalls),
}

/// The calls that were sent and that the KMS has not answered yet, in a simulation.
#[cfg(test)]
#[derive(Clone, Default)]
pub(crate) struct DeferredCalls(pub(crate) Arc<crate::sync::Mutex<Vec<DeferredCall>>>);

/// The master key of a call, and when it was sent, by the wall clock in microseconds. The function
/// makes the call and delivers the answer.
#[cfg(test)]
pub(crate) type DeferredCall = (Cmk, u64, Box<dyn FnOnce() + Send>);

#[cfg(test)]
impl std::fmt::Debug for DeferredCalls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DeferredCalls")
    }
}

/// Measures and counts the calls.
#[derive(Clone, Debug)]
pub(crate) struct Watch {
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) meter: Arc<KmsMeter>,
}

/// A call in progress.
#[derive(Clone)]
pub(crate) struct Call(Arc<Progress>);

struct Progress {
    slot: Slot,
    began: Began,
    limit: Duration,
    watch: Watch,
    subject: Arc<Subject>,
}

/// When a call began, by the clock of the store and by the clock of the machine. They differ in
/// tests only. Both count the time in which the machine was suspended.
struct Began {
    uptime: Duration,
    real: Duration,
}

/// The call in its log line.
struct Subject {
    kms: String,
    operation: &'static str,
    key: String,
    region: String,
}

/// The end of a call, which is counted and not logged yet. A subscriber may block in
/// [`CallReport::log`], so the caller acts on the answer first and holds no lock.
#[must_use = "the call is not logged yet"]
pub(crate) struct CallReport {
    subject: Arc<Subject>,
    outcome: Outcome,
    latency_us: u64,
    error: Option<KmsError>,
    /// Whether the answer came after the call was given up.
    late: bool,
}

impl CallReport {
    /// Writes the log line.
    pub(crate) fn log(&self) {
        let Self { subject, outcome, latency_us, error, late } = self;
        let Subject { kms, operation, key, region } = &**subject;
        let outcome = outcome.word();
        match error {
            _ if *late => debug!(kms, operation, key, region, "late KMS answer discarded"),
            None => debug!(kms, operation, key, region, outcome, latency_us, "KMS call succeeded"),
            Some(error) => {
                warn!(kms, operation, key, region, outcome, latency_us, %error, "KMS call failed");
            }
        }
    }
}

impl Call {
    /// How long the call may take from now on. Zero: its time limit has passed.
    pub(crate) fn left(&self) -> Duration {
        let Progress { began, limit, watch, .. } = &*self.0;
        let by = |now: Duration, then: Duration| limit.saturating_sub(now.saturating_sub(then));
        by(watch.clock.uptime(), began.uptime).min(by(SystemClock.uptime(), began.real))
    }

    /// Ends the call without its answer. `None` if the answer came first.
    pub(crate) fn give_up(&self) -> Option<CallReport> {
        self.0.slot.give_up().then(|| self.0.count(&Err::<(), _>(self.no_answer())))
    }

    /// The error of a call that was given up.
    pub(crate) fn no_answer(&self) -> KmsError {
        KmsError::Unreachable { detail: format!("no answer within {:?}", self.0.limit) }
    }
}

impl Progress {
    /// Notes the answer. Its thread ends after this.
    fn answered<T>(&self, answer: &Result<T, KmsError>) -> CallReport {
        if self.slot.answer() {
            self.count(answer)
        } else {
            CallReport { late: true, ..self.report(answer) }
        }
    }

    fn count<T>(&self, answer: &Result<T, KmsError>) -> CallReport {
        let report = self.report(answer);
        self.watch.meter.count(report.outcome, Duration::from_micros(report.latency_us));
        report
    }

    fn report<T>(&self, answer: &Result<T, KmsError>) -> CallReport {
        let took = self.watch.clock.uptime().saturating_sub(self.began.uptime);
        CallReport {
            subject: Arc::clone(&self.subject),
            outcome: Outcome::of(answer),
            latency_us: took.as_micros() as u64,
            error: answer.as_ref().err().cloned(),
            late: false,
        }
    }
}

impl BoundedKms {
    pub(crate) fn new(kms: Arc<dyn Kms>, timeout: Duration, inline: bool, watch: Watch) -> Self {
        let runs = if inline { Runs::Inline } else { Runs::InThreads };
        Self { kms, timeout, runs, calls: Arc::default(), watch }
    }

    /// A KMS whose calls the test runs.
    #[cfg(test)]
    pub(crate) fn deferred(
        kms: Arc<dyn Kms>,
        timeout: Duration,
        watch: Watch,
        later: DeferredCalls,
    ) -> Self {
        Self { runs: Runs::Later(later), ..Self::new(kms, timeout, false, watch) }
    }

    pub(crate) fn name(&self) -> &str {
        self.kms.name()
    }

    pub(crate) fn cmk_version(&self, wrapped: &[u8]) -> Option<String> {
        self.kms.cmk_version(wrapped)
    }

    pub(crate) fn try_serves(&self, region_id: &str) -> Result<bool, KmsError> {
        self.kms.try_serves(region_id)
    }

    /// Wraps a key. Blocks for at most the time limit.
    pub(crate) fn wrap(
        &self,
        cmk: &Cmk,
        context: EncryptionContext,
        key: &SecretKey,
    ) -> Result<Vec<u8>, KmsError> {
        let key = key.duplicate();
        self.call("wrap", cmk, context, move |kms, call| kms.wrap(call, &key))
    }

    /// Unwraps a key. Blocks for at most the time limit.
    pub(crate) fn unwrap(
        &self,
        cmk: &Cmk,
        context: EncryptionContext,
        wrapped: &[u8],
    ) -> Result<SecretKey, KmsError> {
        let wrapped = wrapped.to_vec();
        self.call("unwrap", cmk, context, move |kms, call| kms.unwrap(call, &wrapped))
    }

    /// Starts to unwrap a key, in a thread of its own, and does not wait for it. `done` gets the
    /// answer, even one that comes after the time limit, and logs the call. In a store without
    /// threads, this blocks and calls `done` before it returns.
    ///
    /// # Errors
    /// [`Busy`]: too many calls have not returned. The KMS is not called, and `done` is dropped.
    pub(crate) fn start_unwrap(
        &self,
        cmk: &Cmk,
        context: EncryptionContext,
        wrapped: &[u8],
        done: impl FnOnce(Result<SecretKey, KmsError>, CallReport) + Send + 'static,
    ) -> Result<Call, Busy> {
        let wrapped = wrapped.to_vec();
        self.start("unwrap", cmk, context, move |kms, call| kms.unwrap(call, &wrapped), done)
    }

    fn start<T: 'static>(
        &self,
        operation: &'static str,
        cmk: &Cmk,
        context: EncryptionContext,
        make: impl FnOnce(&dyn Kms, &KmsCall<'_>) -> Result<T, KmsError> + Send + 'static,
        done: impl FnOnce(Result<T, KmsError>, CallReport) + Send + 'static,
    ) -> Result<Call, Busy> {
        let subject = Subject {
            kms: self.name().to_owned(),
            operation,
            key: cmk.cmk_key_id.clone(),
            region: cmk.region_id.clone(),
        };
        let progress = Arc::new(Progress {
            slot: Calls::begin(&self.calls, cmk)?,
            began: Began { uptime: self.watch.clock.uptime(), real: SystemClock.uptime() },
            limit: self.timeout,
            watch: self.watch.clone(),
            subject: Arc::new(subject),
        });
        let call = Call(Arc::clone(&progress));
        #[cfg(test)]
        let of = cmk;
        let (kms, cmk, timeout) = (Arc::clone(&self.kms), cmk.clone(), self.timeout);
        let run = move || {
            let call = || make(&*kms, &KmsCall { cmk: &cmk, context: &context, timeout });
            // The backend handles the key on this stack. The thread may continue or its stack may
            // be reused.
            let answer = on_clean_stack(|| catch_unwind(AssertUnwindSafe(call)));
            let panicked = || KmsError::invalid("the backend has panicked");
            let answer = answer.unwrap_or_else(|_| Err(panicked()));
            let report = progress.answered(&answer);
            drop(progress);
            done(answer, report);
        };
        match &self.runs {
            Runs::InThreads => {
                let spawned = thread::Builder::new().name("envelog-kms".to_owned()).spawn(run);
                spawned.map_err(|error| Busy(format!("no thread for a call: {error}")))?;
            }
            Runs::Inline => {
                assert_may_wait_for_kms();
                run();
            }
            #[cfg(test)]
            Runs::Later(DeferredCalls(calls)) => {
                lock(calls).push((of.clone(), self.watch.clock.wall_us(), Box::new(run)));
            }
        }
        Ok(call)
    }

    /// Makes a call, and waits for at most the time limit. A call that has not returned by then is
    /// unreachable. Its thread is left to end by itself.
    fn call<T: Send + 'static>(
        &self,
        operation: &'static str,
        cmk: &Cmk,
        context: EncryptionContext,
        make: impl FnOnce(&dyn Kms, &KmsCall<'_>) -> Result<T, KmsError> + Send + 'static,
    ) -> Result<T, KmsError> {
        assert_may_wait_for_kms();
        // Here and not where the call is made: a subscriber that blocks must not keep the renewal
        // of a lease from the KMS.
        let _span = debug_span!("kms_call", kms = self.name(), operation).entered();
        let (sender, receiver) = mpsc::sync_channel(1);
        let done = move |answer, report: CallReport| {
            // The caller may have stopped waiting for the answer.
            drop(sender.send(answer));
            report.log();
        };
        let call = self.start(operation, cmk, context, make, done)?;
        loop {
            let left = call.left();
            if left.is_zero()
                && let Some(report) = call.give_up()
            {
                report.log();
                return Err(call.no_answer());
            }
            match receiver.recv_timeout(left.clamp(Duration::from_millis(1), LOOK_EVERY)) {
                Ok(answer) => return answer,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(call.no_answer()),
            }
        }
    }
}
