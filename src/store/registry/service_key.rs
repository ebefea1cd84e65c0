//! The loss and the return of the service key. Every Logstore depends on it.

use std::sync::{Arc, Weak};

use super::Registry;
use crate::{
    Result,
    key_status::Refusal,
    keys::{
        lease::{Lease, LeaseListener},
        sealing::LostShard,
    },
};

impl Registry {
    /// Uses the service key under a lease from now on, if its keyring is under a master key.
    ///
    /// # Errors
    /// When no thread can be started for the lease.
    pub(crate) fn watch_service_key(&self) -> Result<()> {
        let listener: Weak<dyn LeaseListener> = self.this.clone();
        self.keys.watch_service_key(listener)
    }
}

impl LeaseListener for Registry {
    fn depends_on(&self, lease: &Lease) -> bool {
        self.keys.is_service_lease(lease)
    }

    /// The record is written before the wipe: the key that tags it is wiped too.
    fn before_wipe(&self, refusal: &Refusal) {
        self.keys.record_service_loss(refusal);
    }

    /// Customers' data keys go too: without the service key nothing authenticates the metadata, and
    /// every operation is refused.
    fn wipe(&self, refusal: &Refusal) -> Vec<Arc<dyn LostShard>> {
        let Some(error) = self.keys.wipe_service_key(refusal) else { return Vec::new() };
        self.open_logstores().iter().flat_map(|logstore| logstore.wipe_keys(&error)).collect()
    }

    fn note_lost(&self, _refusal: &Refusal) {}

    fn returned(&self) {
        self.keys.service_key_is_allowed();
    }
}
