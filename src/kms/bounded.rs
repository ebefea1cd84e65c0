//! KMS calls with a time limit that holds for any backend.

use std::{
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use tracing::{debug, warn};

use super::{
    Cmk, EncryptionContext, Kms, KmsCall, KmsError,
    meter::{KmsMeter, Outcome},
};
use crate::{
    crypto::{SecretKey, on_clean_stack},
    io::Clock,
    sync::{
        assert_no_lock_across,
        atomic::{AtomicUsize, Ordering},
    },
};

/// The most calls to one KMS at once. Calls that were given up and have not returned yet are
/// included.
const CALLS_MAX: usize = 256;

/// A KMS whose calls end after their time limit. So the bound on revocation does not depend on a
/// backend that honours its timeout.
#[derive(Clone, Debug)]
pub(crate) struct BoundedKms {
    kms: Arc<dyn Kms>,
    timeout: Duration,
    /// Whether calls run in the caller's thread, for a store without threads.
    inline: bool,
    /// The number of calls in progress, each in a thread of its own.
    calls: Arc<AtomicUsize>,
    watch: Watch,
}

/// One call in progress. Dropped when its thread ends.
struct Underway(Arc<AtomicUsize>);

impl Drop for Underway {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Measures and counts the calls.
#[derive(Clone, Debug)]
pub(crate) struct Watch {
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) meter: Arc<KmsMeter>,
}

impl Watch {
    /// Makes a call. Logs and counts its outcome and its duration.
    fn call<T>(
        &self,
        kms: &str,
        operation: &'static str,
        cmk: &Cmk,
        make: impl FnOnce() -> Result<T, KmsError>,
    ) -> Result<T, KmsError> {
        let began = self.clock.uptime();
        let answer = make();
        let took = self.clock.uptime().saturating_sub(began);
        let outcome = Outcome::of(&answer);
        self.meter.count(outcome, took);
        let (key, region, latency_us) =
            (&*cmk.cmk_key_id, &*cmk.region_id, took.as_micros() as u64);
        let outcome = outcome.word();
        match &answer {
            Ok(_) => debug!(kms, operation, key, region, outcome, latency_us, "KMS call succeeded"),
            Err(error) => {
                warn!(kms, operation, key, region, outcome, latency_us, %error, "KMS call failed")
            }
        }
        answer
    }
}

impl BoundedKms {
    pub(crate) fn new(kms: Arc<dyn Kms>, timeout: Duration, inline: bool, watch: Watch) -> Self {
        Self { kms, timeout, inline, calls: Arc::default(), watch }
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

    pub(crate) fn wrap(
        &self,
        cmk: &Cmk,
        context: EncryptionContext,
        key: &SecretKey,
    ) -> Result<Vec<u8>, KmsError> {
        let key = key.duplicate();
        self.watch.call(self.name(), "wrap", cmk, || {
            self.call(cmk, context, move |kms, call| kms.wrap(call, &key))
        })
    }

    pub(crate) fn unwrap(
        &self,
        cmk: &Cmk,
        context: EncryptionContext,
        wrapped: &[u8],
    ) -> Result<SecretKey, KmsError> {
        let wrapped = wrapped.to_vec();
        self.watch.call(self.name(), "unwrap", cmk, || {
            self.call(cmk, context, move |kms, call| kms.unwrap(call, &wrapped))
        })
    }

    /// Makes a call in a thread of its own, and waits for at most the time limit. A call that has
    /// not returned by then is unreachable. Its thread is left to end by itself.
    fn call<T: Send + 'static>(
        &self,
        cmk: &Cmk,
        context: EncryptionContext,
        make: impl FnOnce(&dyn Kms, &KmsCall<'_>) -> Result<T, KmsError> + Send + 'static,
    ) -> Result<T, KmsError> {
        assert_no_lock_across("a KMS call");
        let (kms, cmk, timeout) = (Arc::clone(&self.kms), cmk.clone(), self.timeout);
        // The backend handles the key on this stack. The thread may continue or its stack may be
        // reused.
        let call = move || {
            on_clean_stack(|| make(&*kms, &KmsCall { cmk: &cmk, context: &context, timeout }))
        };
        if self.inline {
            return call();
        }
        let unreachable = |detail: String| KmsError::Unreachable { detail };
        let underway = Underway(Arc::clone(&self.calls));
        if self.calls.fetch_add(1, Ordering::Relaxed) >= CALLS_MAX {
            return Err(unreachable(format!("{CALLS_MAX} calls have not returned")));
        }
        let (sender, receiver) = mpsc::sync_channel(1);
        let spawned = thread::Builder::new().name("envelog-kms".to_owned()).spawn(move || {
            let _underway = underway;
            // The caller may have stopped waiting for the answer.
            let _ = sender.send(call());
        });
        spawned.map_err(|error| unreachable(error.to_string()))?;
        receiver
            .recv_timeout(timeout)
            .unwrap_or_else(|_| Err(unreachable(format!("no answer within {timeout:?}"))))
    }
}
