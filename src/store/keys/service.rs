//! The lease of the service key: its loss, and its return.
//!
//! At a loss the audit log gets a record first, as long as the key is there that tags it. A disk
//! that fails or hangs delays the wipe by no more than the time limit of a KMS call, and the record
//! is written after the return then. For the return, the keyring is read from its file, which calls
//! the KMS: by a thread of the renewal pool, or in a store without threads by the next caller.

use std::{
    sync::{Arc, Weak, mpsc},
    thread,
    time::Duration,
};

use tracing::info;

use super::{KeyService, describe, leases::LeaseOf};
use crate::{
    Error, Result,
    key_status::{KeyStatus, Refusal},
    keys::{
        AuditEvent,
        keyring_seal::Wrapping,
        lease::{Lease, LeaseListener},
        renewal_pool::Renewable,
        service_key::{LeaseServiceKey, Load},
    },
    sync::lock,
};

/// What is left to do for the return of the service key.
#[derive(Default)]
pub(super) struct ServiceReturn {
    /// The uptime before which the keyring is not read again.
    not_before: Duration,
    /// The loss that was not on record when the key was wiped.
    unrecorded: Option<Loss>,
    /// Whether the loss that is about to be acted on is on record.
    on_record: bool,
}

/// A loss of the service key.
struct Loss {
    event: AuditEvent,
    detail: String,
    /// When it happened, by the uptime.
    at: Duration,
}

impl KeyService {
    /// Uses the service key under a lease from now on, if its keyring is under a master key.
    /// `listener` hears of its loss.
    ///
    /// # Errors
    /// When no thread can be started for the lease.
    pub(crate) fn watch_service_key(&self, listener: Weak<dyn LeaseListener>) -> Result<()> {
        // Set once, when the store is opened.
        let _ = self.service_listener.set(listener);
        self.service.lease_with(self.this.clone())
    }

    /// Whether this is the lease of the service key now.
    pub(crate) fn is_service_lease(&self, lease: &Lease) -> bool {
        self.service.lease().is_some_and(|service| std::ptr::eq(&*service, lease))
    }

    /// Whether the service key is under a master key.
    pub(crate) fn has_service_lease(&self) -> bool {
        self.service.lease().is_some()
    }

    /// Admits an operation that uses the service key. Blocks for a KMS call if the last answer is
    /// too old.
    ///
    /// # Errors
    /// [`Error::ServiceKey`], [`Error::KeyringNotRead`].
    pub(crate) fn admit_service_key(&self) -> Result<()> {
        self.tend_service_key();
        self.service.admit().map(|_| ())
    }

    /// Whether the service key may be used by the last answer of the KMS. Makes no call.
    pub(crate) fn is_service_key_usable(&self) -> bool {
        self.service.is_usable()
    }

    /// The state of the service key and its lease.
    pub(crate) fn service_key_status(&self) -> KeyStatus {
        self.service.status()
    }

    /// As [`KeyService::admit_service_key`], by the last answer of the KMS: makes no call. The
    /// caller was admitted when its operation began.
    ///
    /// # Errors
    /// As [`KeyService::admit_service_key`].
    pub(crate) fn check_service_key(&self) -> Result<()> {
        self.service.check()
    }

    /// In a store without threads: renews the lease of the service key if that is due, and acts on
    /// its loss or its return. Calls the KMS. Does nothing in a store with threads.
    pub(crate) fn tend_service_key(&self) {
        if self.renewals.is_none() {
            if let Some(lease) = self.service.lease() {
                lease.tend();
            }
            self.load_keyring();
        }
    }

    /// The lease of the service key is lost: records that, before the wipe. In a store with threads
    /// this waits for at most the time limit of a KMS call.
    pub(crate) fn record_service_loss(&self, refusal: &Refusal) {
        let on_record = self.env.read_only || self.record_loss(refusal);
        lock(&self.service_return).on_record = on_record;
    }

    /// The lease of the service key is lost: wipes the roots. Returns the error of each operation
    /// from now on; `None` if the keyring is under no master key any more.
    pub(crate) fn wipe_service_key(&self, refusal: &Refusal) -> Option<Error> {
        let lease = self.service.lease()?;
        let error = self.service.lose(&lease, refusal);
        let (event, detail) = describe(refusal);
        let loss = Loss { event, detail, at: self.env.clock.uptime() };
        let mut state = lock(&self.service_return);
        if !std::mem::take(&mut state.on_record) && !self.env.read_only {
            state.unrecorded = state.unrecorded.take().or(Some(loss));
        }
        drop(state);
        self.return_soon();
        Some(error)
    }

    /// The KMS lets the service key be used.
    pub(crate) fn service_key_is_allowed(&self) {
        if self.service.is_usable() {
            // An earlier process may have recorded a loss.
            self.record_service_key(AuditEvent::Recovered, String::new());
        } else {
            self.return_soon();
        }
    }

    /// Has the keyring read again as soon as it may be.
    fn return_soon(&self) {
        lock(&self.service_return).not_before = Duration::ZERO;
        if let Some((pool, id)) = &self.renewals {
            let this: Weak<dyn Renewable> = self.this.clone();
            // The lease has started the first thread of the pool.
            let _ = pool.wake(*id, this);
        }
    }

    /// Reads the keyring again if its roots are wiped and it may be used. Returns after how long to
    /// call this again. Calls the KMS.
    fn load_keyring(&self) -> Duration {
        const IDLE: Duration = Duration::from_secs(3600);
        let (now, every) = (self.env.clock.uptime(), self.env.options.revalidate_every);
        if self.renewals.is_none() && now < lock(&self.service_return).not_before {
            return every;
        }
        match self.service.load() {
            Load::Held => IDLE,
            Load::Wiped => {
                lock(&self.service_return).not_before = now + every;
                every
            }
            Load::Back => {
                info!(store = %self.env.id, "service key usable again");
                self.record_return();
                IDLE
            }
        }
    }

    /// Records the return of the service key, after its loss if that is not on record. The write of
    /// the loss may have ended after its time limit: the log does not record it again then.
    fn record_return(&self) {
        let unrecorded = lock(&self.service_return).unrecorded.take();
        if let Some(Loss { event, detail, at }) = unrecorded {
            let ago = self.env.clock.uptime().saturating_sub(at).as_secs();
            let note =
                format!("; recorded {ago} s later, since the audit log could not be written then");
            let _ = self.audit.transition_if(event, None, detail, &note, || true);
        }
        self.record_service_key(AuditEvent::Recovered, String::new());
    }

    /// Records a loss or a return of the service key that has already happened.
    fn record_service_key(&self, event: AuditEvent, detail: String) {
        if !self.env.read_only {
            let _ = self.audit.transition(event, None, detail);
        }
    }

    /// Records a loss that the wipe follows. In a store with threads this waits for at most the
    /// time limit of a KMS call. Returns whether the loss is on record then.
    fn record_loss(&self, refusal: &Refusal) -> bool {
        let (event, detail) = describe(refusal);
        let losses = self.service.losses();
        if self.renewals.is_none() {
            return self.write_loss(event, detail, losses);
        }
        let (done, written) = mpsc::sync_channel(1);
        let this = self.this.upgrade();
        let write = move || {
            let on_record = this.is_some_and(|this| this.write_loss(event, detail, losses));
            // The waiting thread may have given up.
            let _ = done.send(on_record);
        };
        let writer = thread::Builder::new().name("envelog-audit".to_owned()).spawn(write);
        // Without a thread the channel is closed.
        writer.is_ok() && written.recv_timeout(self.env.options.kms_timeout).unwrap_or(false)
    }

    /// Writes the record of a loss, unless the wipe has come first: a later record belongs behind
    /// the return. `losses` is the number of wipes before that. Returns whether it is on record.
    fn write_loss(&self, event: AuditEvent, detail: String, losses: u64) -> bool {
        let in_time = || self.service.losses() == losses;
        self.audit.transition_if(event, None, detail, "", in_time).unwrap_or(false)
    }
}

impl LeaseServiceKey for KeyService {
    fn lease(&self, wrapping: &Wrapping) -> Result<Arc<Lease>> {
        let lease = self.new_lease(&wrapping.cmk, wrapping.probe(), LeaseOf::ServiceKey);
        lease.begin(wrapping.asked);
        if let Some(listener) = self.service_listener.get() {
            lease.listen(Weak::clone(listener));
        }
        lease.start().map_err(Error::io("start a thread for", &self.env.dir))?;
        Ok(lease)
    }

    fn load_soon(&self) {
        self.return_soon();
    }
}

impl Renewable for KeyService {
    fn tend(&self) -> Duration {
        self.load_keyring()
    }
}
