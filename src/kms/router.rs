//! Chooses the KMS that serves a region.

use std::{sync::Arc, time::Duration};

use super::{BoundedKms, Kms, KmsCall, KmsError, bounded::Watch, meter::KmsMeter};
use crate::{crypto::SecretKey, io::Clock};

/// The KMSs of a store, each with bounded calls. The first one that serves a region is asked about
/// its master keys.
#[derive(Clone, Debug)]
pub(crate) struct KmsRouter {
    kms: Arc<[BoundedKms]>,
    timeout: Duration,
    watch: Watch,
}

impl KmsRouter {
    /// Bounds the calls to `kms` by `timeout`. With `inline` a call runs in the thread of its caller, and its backend is
    /// trusted with the bound.
    pub(crate) fn new(kms: &[Arc<dyn Kms>], timeout: Duration, inline: bool, clock: Arc<dyn Clock>) -> Self {
        let watch = Watch { clock, meter: Arc::default() };
        let bounded = |kms| BoundedKms::new(Arc::clone(kms), timeout, inline, watch.clone());
        Self { kms: kms.iter().map(bounded).collect(), timeout, watch }
    }

    /// The counters of the calls to these KMSs.
    pub(crate) fn meter(&self) -> &Arc<KmsMeter> {
        &self.watch.meter
    }

    /// The KMS to ask about the master keys of a region.
    ///
    /// # Errors
    /// [`NoKms`] when none serves it. A KMS may serve it later: each answers that by itself.
    pub(crate) fn serving(&self, region: &str) -> Result<&BoundedKms, NoKms> {
        self.kms.iter().find(|kms| kms.serves(region)).ok_or_else(|| NoKms { region: region.to_owned() })
    }

    /// The KMS that serves a region. If none does, a KMS that looks for one at each call.
    pub(crate) fn serving_or_later(&self, region: &str) -> BoundedKms {
        // The stand-in needs no thread: it fails at once, or makes a call that is bounded already.
        let later = |_| BoundedKms::new(Arc::new(Later(self.clone())), self.timeout, true, self.watch.clone());
        self.serving(region).cloned().unwrap_or_else(later)
    }
}

/// No KMS is configured that serves a region.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no KMS is configured that serves region {region}")]
pub(crate) struct NoKms {
    pub(crate) region: String,
}

/// Envelopes that exist need a KMS. One that is not configured counts as one that cannot be reached.
impl From<NoKms> for KmsError {
    fn from(none: NoKms) -> Self {
        KmsError::Unreachable { detail: none.to_string() }
    }
}

/// Stands in for the KMS of a region that none serves yet. It looks for one at each call.
#[derive(Debug)]
struct Later(KmsRouter);

impl Kms for Later {
    fn name(&self) -> &str {
        "none"
    }

    fn serves(&self, _region_id: &str) -> bool {
        true
    }

    fn wrap(&self, call: &KmsCall<'_>, key: &SecretKey) -> Result<Vec<u8>, KmsError> {
        self.0.serving(&call.cmk.region_id)?.wrap(call.cmk, call.context.clone(), key)
    }

    fn unwrap(&self, call: &KmsCall<'_>, wrapped: &[u8]) -> Result<SecretKey, KmsError> {
        self.0.serving(&call.cmk.region_id)?.unwrap(call.cmk, call.context.clone(), wrapped)
    }
}

#[cfg(test)]
impl KmsRouter {
    /// A router without any KMS.
    pub(crate) fn for_tests() -> Self {
        Self::new(&[], Duration::ZERO, true, Arc::new(crate::io::SystemClock))
    }
}
