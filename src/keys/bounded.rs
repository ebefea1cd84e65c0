//! Calls to a KMS that end in time, whatever its backend does.

use std::{
    sync::{Arc, mpsc},
    time::Duration,
};

use crate::{
    crypto::SecretKey,
    kms::{Kms, KmsCall, KmsError},
};

/// A KMS whose calls take no longer than they may: each runs in a thread of its own, which a backend that never returns may keep.
/// What has not come back by then counts as unreachable.
#[derive(Debug)]
pub(crate) struct Bounded {
    kms: Arc<dyn Kms>,
}

impl Bounded {
    pub(crate) fn new(kms: Arc<dyn Kms>) -> Arc<dyn Kms> {
        Arc::new(Self { kms })
    }

    fn run<T: Send + 'static>(
        &self,
        call: &KmsCall<'_>,
        make: impl FnOnce(&dyn Kms, &KmsCall<'_>) -> Result<T, KmsError> + Send + 'static,
    ) -> Result<T, KmsError> {
        let (kms, cmk, context, timeout) =
            (Arc::clone(&self.kms), call.cmk.clone(), call.context.clone(), call.timeout);
        let (sender, answer) = mpsc::sync_channel(1);
        let work = move || {
            // An answer that nobody waits for any more is dropped, and a key in it wiped.
            let _ = sender.send(make(&*kms, &KmsCall { cmk: &cmk, context: &context, timeout }));
        };
        let unreachable = |detail: String| KmsError::Unreachable { detail };
        std::thread::Builder::new()
            .name("envelog-kms".to_owned())
            .spawn(work)
            .map_err(|error| unreachable(error.to_string()))?;
        answer.recv_timeout(timeout).map_err(|_| unreachable(no_answer_within(timeout)))?
    }
}

/// What is said of a call that took too long.
pub(crate) fn no_answer_within(limit: Duration) -> String {
    format!("no answer within {limit:?}")
}

impl Kms for Bounded {
    fn name(&self) -> &str {
        self.kms.name()
    }

    fn serves(&self, region_id: &str) -> bool {
        self.kms.serves(region_id)
    }

    fn wrap(&self, call: &KmsCall<'_>, key: &SecretKey) -> Result<Vec<u8>, KmsError> {
        let key = key.duplicate();
        self.run(call, move |kms, call| kms.wrap(call, &key))
    }

    fn unwrap(&self, call: &KmsCall<'_>, wrapped: &[u8]) -> Result<SecretKey, KmsError> {
        let wrapped = wrapped.to_vec();
        self.run(call, move |kms, call| kms.unwrap(call, &wrapped))
    }
}
