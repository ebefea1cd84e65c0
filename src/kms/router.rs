//! Chooses the KMS that serves a region.

use std::{sync::Arc, time::Duration};

use super::{BoundedKms, Kms, KmsCall, KmsError, RevokedReason, bounded::Watch, meter::KmsMeter};
use crate::{crypto::SecretKey, io::Clock};

/// The KMSs of a store, each with bounded calls. The first one that serves a region is asked about
/// its master keys. If it does not know a key, the next one that serves the region is asked.
#[derive(Clone, Debug)]
pub(crate) struct KmsRouter {
    kms: Arc<[BoundedKms]>,
    /// All of them as one, if there are several.
    all: Option<BoundedKms>,
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
        let bounded = |kms| BoundedKms::new(kms, timeout, inline, watch.clone());
        let all = (kms.len() > 1).then(|| bounded(Arc::new(InOrder::new(kms))));
        let kms = kms.iter().map(|kms| bounded(Arc::clone(kms))).collect();
        Self { kms, all, timeout, inline, watch }
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
                Ok(true) => return Ok(self.all.as_ref().unwrap_or(kms).clone()),
                Ok(false) => {}
                Err(why) => unknown = unknown.or_else(|| Some(Unknown { kms: kms.clone(), why })),
            }
        }
        let unknown = unknown.ok_or_else(|| NoKms { region: region.to_owned() })?;
        Ok(self.stand_in(unknown))
    }

    /// The KMS that serves a region. If none is known to serve it, or there are several, a KMS that
    /// looks for one at each call.
    pub(crate) fn serving_or_later(&self, region: &str) -> BoundedKms {
        if let Some(all) = &self.all {
            return all.clone();
        }
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

/// Several KMSs as one: each call goes to those that serve the region, in their order, until one
/// knows the key.
#[derive(Debug)]
struct InOrder {
    kms: Box<[Arc<dyn Kms>]>,
    name: String,
}

impl InOrder {
    fn new(kms: &[Arc<dyn Kms>]) -> Self {
        let mut names: Vec<&str> = kms.iter().map(|kms| kms.name()).collect();
        names.dedup();
        Self { kms: kms.into(), name: names.join("+") }
    }

    /// A key that no KMS knows is deleted only if all of them could look for it: the KMS of a key
    /// that cannot be reached must not make the key look deleted in another one.
    fn ask<T>(
        &self,
        region: &str,
        call: impl Fn(&dyn Kms) -> Result<T, KmsError>,
    ) -> Result<T, KmsError> {
        let (mut absent, mut unknown) = (None, None);
        for kms in &*self.kms {
            match kms.try_serves(region) {
                Ok(false) => {}
                Err(why) => unknown = unknown.or(Some(why)),
                Ok(true) => match call(&**kms) {
                    Err(error @ KmsError::Revoked { reason: RevokedReason::Deleted, .. }) => {
                        absent = absent.or(Some(error));
                    }
                    answer => return answer,
                },
            }
        }
        let none = || NoKms { region: region.to_owned() }.into();
        Err(unknown.or(absent).unwrap_or_else(none))
    }
}

impl Kms for InOrder {
    fn name(&self) -> &str {
        &self.name
    }

    fn serves(&self, region_id: &str) -> bool {
        self.kms.iter().any(|kms| kms.serves(region_id))
    }

    fn wrap(&self, call: &KmsCall<'_>, key: &SecretKey) -> Result<Vec<u8>, KmsError> {
        self.ask(&call.cmk.region_id, |kms| kms.wrap(call, key))
    }

    fn unwrap(&self, call: &KmsCall<'_>, wrapped: &[u8]) -> Result<SecretKey, KmsError> {
        self.ask(&call.cmk.region_id, |kms| kms.unwrap(call, wrapped))
    }

    fn cmk_version(&self, wrapped: &[u8]) -> Option<String> {
        self.kms.iter().find_map(|kms| kms.cmk_version(wrapped))
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
        let wraps = |kms: BoundedKms, region| {
            let key = SecretKey::from_bytes(&mut [7; 32]);
            kms.wrap(&cmk(region), EncryptionContext::new(), &key)
        };
        assert_eq!(wraps(router.serving("cn-north").unwrap(), "cn-north"), Ok(b"cn".to_vec()));
        assert_eq!(wraps(router.serving_or_later("cn-north"), "cn-north"), Ok(b"cn".to_vec()));
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
        let key = SecretKey::from_bytes(&mut [7; 32]);
        for kms in [router.serving("cn").unwrap(), router.serving_or_later("cn")] {
            assert_eq!(kms.wrap(&cmk("cn"), EncryptionContext::new(), &key), Ok(b"cn".to_vec()));
        }
        let (now, later) = (router.serving("eu").unwrap(), router.serving_or_later("eu"));
        let dark = Err(KmsError::unreachable("it is dark"));
        for kms in [&now, &later] {
            let unwrapped = kms.unwrap(&cmk("eu"), EncryptionContext::new(), b"wrapped");
            assert_eq!(unwrapped.map(|_| ()), dark);
            assert_eq!(kms.wrap(&cmk("eu"), EncryptionContext::new(), &key).map(|_| ()), dark);
        }
        sees.store(true, Ordering::SeqCst);
        assert_eq!(later.wrap(&cmk("eu"), EncryptionContext::new(), &key), Ok(b"blind".to_vec()));
    }

    /// A KMS of all regions that knows one key, if it can be reached.
    #[derive(Debug)]
    struct OfOneKey(&'static str, Arc<AtomicBool>);

    impl OfOneKey {
        fn check(&self, key: &str) -> Result<(), KmsError> {
            let deleted = || KmsError::revoked(RevokedReason::Deleted, "no such key");
            (key == self.0).then_some(()).ok_or_else(deleted)
        }
    }

    impl Kms for OfOneKey {
        fn name(&self) -> &str {
            self.0
        }

        fn serves(&self, region_id: &str) -> bool {
            self.try_serves(region_id).unwrap_or(false)
        }

        fn try_serves(&self, _region_id: &str) -> Result<bool, KmsError> {
            let away = || KmsError::unreachable("it is away");
            self.1.load(Ordering::SeqCst).then_some(true).ok_or_else(away)
        }

        fn wrap(&self, call: &KmsCall<'_>, _key: &SecretKey) -> Result<Vec<u8>, KmsError> {
            self.check(&call.cmk.cmk_key_id).map(|()| self.0.as_bytes().to_vec())
        }

        fn unwrap(&self, call: &KmsCall<'_>, _wrapped: &[u8]) -> Result<SecretKey, KmsError> {
            self.check(&call.cmk.cmk_key_id).map(|()| SecretKey::from_bytes(&mut [7; 32]))
        }
    }

    /// Two KMSs have keys of one region.
    #[test]
    fn a_key_is_deleted_only_if_every_kms_could_look_for_it() {
        let is_there = [(); 2].map(|()| Arc::new(AtomicBool::new(true)));
        let all: Vec<Arc<dyn Kms>> = ["a", "b"]
            .into_iter()
            .zip(&is_there)
            .map(|(key, is_there)| Arc::new(OfOneKey(key, Arc::clone(is_there))) as _)
            .collect();
        let clock = Arc::new(crate::io::SystemClock);
        let router = KmsRouter::new(&all, Duration::from_secs(1), true, clock);
        let asked = router.serving_or_later("eu");
        let wrap = |key: &str| {
            let cmk = Cmk { cmk_key_id: key.to_owned(), ..cmk("eu") };
            asked.wrap(&cmk, EncryptionContext::new(), &SecretKey::from_bytes(&mut [7; 32]))
        };
        let deleted = Err(KmsError::revoked(RevokedReason::Deleted, "no such key"));
        let away = Err(KmsError::unreachable("it is away"));
        assert_eq!((wrap("a"), wrap("b")), (Ok(b"a".to_vec()), Ok(b"b".to_vec())));
        assert_eq!(wrap("c"), deleted);
        is_there[0].store(false, Ordering::SeqCst);
        assert_eq!((wrap("a"), wrap("b")), (away.clone(), Ok(b"b".to_vec())));
        is_there[1].store(false, Ordering::SeqCst);
        assert_eq!(wrap("b"), away.clone());
        is_there[0].store(true, Ordering::SeqCst);
        // The first KMS does not know the key.
        assert_eq!((wrap("a"), wrap("b")), (Ok(b"a".to_vec()), away));
    }
}
