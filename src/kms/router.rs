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
    inline: bool,
    watch: Watch,
}

impl KmsRouter {
    /// Bounds the calls to `kms` by `timeout`. With `inline` a call runs in the thread of its
    /// caller, and its backend is trusted with the bound.
    pub(crate) fn new(
        kms: &[Arc<dyn Kms>],
        timeout: Duration,
        inline: bool,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let watch = Watch { clock, meter: Arc::default() };
        let bounded = |kms| BoundedKms::new(Arc::clone(kms), timeout, inline, watch.clone());
        Self { kms: kms.iter().map(bounded).collect(), timeout, inline, watch }
    }

    /// The clock that measures the calls.
    pub(crate) fn clock(&self) -> &Arc<dyn Clock> {
        &self.watch.clock
    }

    /// The counters of the calls to these KMSs.
    pub(crate) fn meter(&self) -> &Arc<KmsMeter> {
        &self.watch.meter
    }

    /// The KMS to ask about the master keys of a region. If no KMS serves the region but one could
    /// not answer, returns a stand-in whose calls fail with that reason.
    ///
    /// # Errors
    /// [`NoKms`] when no KMS serves it. A KMS may serve it later.
    pub(crate) fn serving(&self, region: &str) -> Result<BoundedKms, NoKms> {
        let mut unknown = None;
        for kms in &*self.kms {
            match kms.try_serves(region) {
                Ok(true) => return Ok(kms.clone()),
                Ok(false) => {}
                Err(why) => unknown = unknown.or_else(|| Some(Unknown { kms: kms.clone(), why })),
            }
        }
        let unknown = unknown.ok_or_else(|| NoKms { region: region.to_owned() })?;
        Ok(self.stand_in(unknown))
    }

    /// The KMS that serves a region. If none is known to serve it, a KMS that looks for one at each
    /// call.
    pub(crate) fn serving_or_later(&self, region: &str) -> BoundedKms {
        let known = self.kms.iter().find(|kms| kms.try_serves(region) == Ok(true));
        known.cloned().unwrap_or_else(|| self.stand_in(Later(self.clone())))
    }

    /// A KMS in place of a real one.
    fn stand_in(&self, kms: impl Kms + 'static) -> BoundedKms {
        BoundedKms::new(Arc::new(kms), self.timeout, self.inline, self.watch.clone())
    }
}

/// No KMS is configured that serves a region.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no KMS is configured that serves region {region}")]
pub(crate) struct NoKms {
    pub(crate) region: String,
}

/// Existing envelopes need a KMS. A KMS that is not configured is treated as one that cannot be
/// reached.
impl From<NoKms> for KmsError {
    fn from(none: NoKms) -> Self {
        KmsError::unreachable(none.to_string())
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

/// Stands in for a KMS that cannot tell whether it serves a region.
#[derive(Debug)]
struct Unknown {
    kms: BoundedKms,
    why: KmsError,
}

impl Kms for Unknown {
    fn name(&self) -> &str {
        self.kms.name()
    }

    fn serves(&self, _region_id: &str) -> bool {
        true
    }

    fn wrap(&self, _call: &KmsCall<'_>, _key: &SecretKey) -> Result<Vec<u8>, KmsError> {
        Err(self.why.clone())
    }

    fn unwrap(&self, _call: &KmsCall<'_>, _wrapped: &[u8]) -> Result<SecretKey, KmsError> {
        Err(self.why.clone())
    }

    fn cmk_version(&self, wrapped: &[u8]) -> Option<String> {
        self.kms.cmk_version(wrapped)
    }
}

#[cfg(test)]
impl KmsRouter {
    /// A router without any KMS.
    pub(crate) fn for_tests() -> Self {
        Self::new(&[], Duration::ZERO, true, Arc::new(crate::io::SystemClock))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::{
        kms::{Cmk, EncryptionContext},
        sync::atomic::{AtomicBool, Ordering},
    };

    /// A KMS of one region that unwraps everything to one key, once it is there.
    #[derive(Debug)]
    struct Regional(&'static str, AtomicBool);

    /// A KMS of all regions, once it can look.
    #[derive(Debug)]
    struct Blind(Arc<AtomicBool>);

    impl Kms for Blind {
        fn name(&self) -> &str {
            "blind"
        }

        fn serves(&self, region_id: &str) -> bool {
            self.try_serves(region_id).unwrap_or(false)
        }

        fn try_serves(&self, _region_id: &str) -> Result<bool, KmsError> {
            let blind = || KmsError::unreachable("it is dark");
            self.0.load(Ordering::SeqCst).then_some(true).ok_or_else(blind)
        }

        fn wrap(&self, _call: &KmsCall<'_>, _key: &SecretKey) -> Result<Vec<u8>, KmsError> {
            Ok(b"blind".to_vec())
        }

        fn unwrap(&self, _call: &KmsCall<'_>, _wrapped: &[u8]) -> Result<SecretKey, KmsError> {
            Ok(SecretKey::from_bytes(&mut [8; 32]))
        }
    }

    impl Kms for Regional {
        fn name(&self) -> &str {
            self.0
        }

        fn serves(&self, region_id: &str) -> bool {
            self.1.load(Ordering::SeqCst) && region_id.starts_with(self.0)
        }

        fn wrap(&self, _call: &KmsCall<'_>, _key: &SecretKey) -> Result<Vec<u8>, KmsError> {
            Ok(self.0.as_bytes().to_vec())
        }

        fn unwrap(&self, _call: &KmsCall<'_>, _wrapped: &[u8]) -> Result<SecretKey, KmsError> {
            Ok(SecretKey::from_bytes(&mut [7; 32]))
        }
    }

    fn cmk(region: &str) -> Cmk {
        Cmk { cmk_key_id: "key".to_owned(), arn: "role".to_owned(), region_id: region.to_owned() }
    }

    #[test]
    fn the_first_kms_that_serves_a_region_is_asked_even_if_late() {
        let kms = ["cn", "cn-north", "eu"]
            .map(|name| Arc::new(Regional(name, AtomicBool::new(name != "eu"))));
        let all = kms.clone().map(|kms| kms as Arc<dyn Kms>);
        let router =
            KmsRouter::new(&all, Duration::from_secs(1), true, Arc::new(crate::io::SystemClock));
        assert_eq!(router.serving("cn-north").unwrap().name(), "cn");
        assert_eq!(router.serving_or_later("cn-north").name(), "cn");
        let none = router.serving("eu").unwrap_err();
        assert_eq!(none.to_string(), "no KMS is configured that serves region eu");
        let later = router.serving_or_later("eu");
        let unwrap = || later.unwrap(&cmk("eu"), EncryptionContext::new(), b"wrapped").map(|_| ());
        assert_eq!(unwrap(), Err(KmsError::unreachable(none.to_string())));
        kms[2].1.store(true, Ordering::SeqCst);
        assert_eq!(unwrap(), Ok(()));
        let key = SecretKey::from_bytes(&mut [7; 32]);
        assert_eq!(later.wrap(&cmk("eu"), EncryptionContext::new(), &key), Ok(b"eu".to_vec()));
    }

    #[test]
    fn a_kms_that_cannot_tell_takes_no_region_and_no_lease() {
        let sees = Arc::new(AtomicBool::new(false));
        let all: [Arc<dyn Kms>; 2] =
            [Arc::new(Blind(Arc::clone(&sees))), Arc::new(Regional("cn", AtomicBool::new(true)))];
        let clock = Arc::new(crate::io::SystemClock);
        let router = KmsRouter::new(&all, Duration::from_secs(1), true, clock);
        assert_eq!(router.serving("cn").unwrap().name(), "cn");
        assert_eq!(router.serving_or_later("cn").name(), "cn");
        let (now, later) = (router.serving("eu").unwrap(), router.serving_or_later("eu"));
        assert_eq!((now.name(), later.name()), ("blind", "none"));
        let dark = Err(KmsError::unreachable("it is dark"));
        let key = SecretKey::from_bytes(&mut [7; 32]);
        for kms in [&now, &later] {
            let unwrapped = kms.unwrap(&cmk("eu"), EncryptionContext::new(), b"wrapped");
            assert_eq!(unwrapped.map(|_| ()), dark);
            assert_eq!(kms.wrap(&cmk("eu"), EncryptionContext::new(), &key).map(|_| ()), dark);
        }
        sees.store(true, Ordering::SeqCst);
        assert_eq!(later.wrap(&cmk("eu"), EncryptionContext::new(), &key), Ok(b"blind".to_vec()));
        assert_eq!(router.serving_or_later("eu").name(), "blind");
    }
}
