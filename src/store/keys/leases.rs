//! Routing master keys to KMSs, and the leases: one for each master key, one for each Logstore
//! under a master key, and one for the service key.
//!
//! When the lease of the service key is lost, the audit log gets a record first, while the key that
//! tags it is still in memory. A disk that fails or hangs delays the wipe by at most the time limit
//! of a KMS call. The record is then written after the return of the key. For the return, the
//! keyring is reloaded from its file, which calls the KMS: in a thread of the renewal pool, or in a
//! store without threads by the next caller.

use std::{
    sync::{Arc, Weak, mpsc},
    thread,
    time::Duration,
};

use tracing::info;

use super::{KeyService, describe};
use crate::{
    Error, Result,
    config::ProbeMode,
    ids::LogstoreId,
    key_status::{KeyStatus, Refusal},
    keys::{
        AuditEvent,
        envelope::KeysSection,
        gate::GateKeys,
        keyring_seal::Wrapping,
        lease::{Lease, LeaseListener, LeaseParts, LeaseScope, LeaseTerms, Probe},
        renewal_pool::Renewable,
        service_key::{LeaseServiceKey, Load},
    },
    kms::{BoundedKms, Cmk},
    logstore::Meta,
    sync::lock,
};

/// The pending work of a return of the service key.
#[derive(Default)]
pub(super) struct ServiceReturn {
    /// The uptime before which the keyring is not reloaded.
    not_before: Duration,
    /// The loss of which the audit log had no record when the key was wiped.
    unrecorded: Option<Loss>,
    /// Whether the audit log has a record of the loss whose wipe comes next.
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
    /// The KMS that serves the region of a master key.
    ///
    /// # Errors
    /// [`crate::error::ConfigError::NoKmsForRegion`].
    pub(super) fn serving(&self, cmk: &Cmk) -> Result<BoundedKms> {
        Ok(self.kms.serving(&cmk.region_id)?)
    }

    /// The keys of metadata that was read from its file. The current data key has not yet proved
    /// them.
    pub(crate) fn loaded_keys(&self, meta: &Meta, id: LogstoreId) -> Result<GateKeys> {
        Ok(GateKeys { unproved: meta.tagged.clone(), ..self.gate_keys(meta.keys.as_ref(), id)? })
    }

    /// The keys of a keys section that this process made, with the lease of its master key.
    pub(crate) fn gate_keys(
        &self,
        section: Option<&KeysSection>,
        id: LogstoreId,
    ) -> Result<GateKeys> {
        let Some(section) = section else { return Ok(GateKeys::default()) };
        let own = |cmk, scope| self.own_lease(cmk, section, id, scope).map(Some);
        let (lease, standby) = match (&section.cmk, section.probe_mode()) {
            (None, _) => (None, None),
            (Some(cmk), ProbeMode::Own) => (own(cmk, LeaseScope::Logstore(id))?, None),
            (Some(cmk), ProbeMode::Shared) => {
                let shared = self.lease(cmk, section, id)?;
                (Some(shared), own(cmk, LeaseScope::Standby(id))?)
            }
        };
        Ok(GateKeys { section: Some(Arc::new(section.clone())), lease, standby, unproved: None })
    }

    /// The lease of one Logstore, whose probe is one of its envelopes. Calls no KMS.
    fn own_lease(
        &self,
        cmk: &Cmk,
        section: &KeysSection,
        id: LogstoreId,
        scope: LeaseScope,
    ) -> Result<Arc<Lease>> {
        let probe = self.envelope_probe(section, id)?;
        let mut leases = lock(&self.own_leases);
        if let Some(lease) = leases.get(&id)
            && lease.cmk() == cmk
            && lease.scope() == scope
        {
            lease.set_probe(probe);
            return Ok(Arc::clone(lease));
        }
        let lease = self.new_lease(cmk, probe, scope);
        leases.insert(id, Arc::clone(&lease));
        drop(leases);
        lease.start().map_err(Error::io("start a thread for", &self.env.dir))?;
        Ok(lease)
    }

    /// Drops the lease of a Logstore that was deleted.
    pub(crate) fn forget_leases_of(&self, id: LogstoreId) {
        lock(&self.own_leases).remove(&id);
    }

    /// The lease that the Logstores under a master key share. Calls no KMS.
    fn lease(&self, cmk: &Cmk, section: &KeysSection, id: LogstoreId) -> Result<Arc<Lease>> {
        if let Some(lease) = lock(&self.leases).get(cmk) {
            return Ok(Arc::clone(lease));
        }
        let probe = match self.usable_probe(cmk)? {
            Some(probe) => probe,
            // The unwrap of an envelope renews a lease as well as the unwrap of a probe does.
            None => self.envelope_probe(section, id)?,
        };
        let lease = self.new_lease(cmk, probe, LeaseScope::MasterKey);
        lease.start().map_err(Error::io("start a thread for", &self.env.dir))?;
        // Another thread may have made the lease in the meantime.
        Ok(Arc::clone(lock(&self.leases).entry(cmk.clone()).or_insert(lease)))
    }

    /// Makes a lease. The caller stores it.
    pub(super) fn new_lease(&self, cmk: &Cmk, probe: Probe, scope: LeaseScope) -> Arc<Lease> {
        let breaker = Arc::clone(lock(&self.breakers).entry(cmk.region_id.clone()).or_default());
        Lease::new(LeaseParts {
            cmk: cmk.clone(),
            kms: self.kms.serving_or_later(&cmk.region_id),
            breaker,
            probe,
            terms: self.terms(scope),
            clock: Arc::clone(&self.env.clock),
            random: Arc::clone(&self.env.random),
            pool: self.renewals.as_ref().map(|(pool, _)| Arc::clone(pool)),
            scope,
            sealer: Arc::clone(&self.sealer),
        })
    }

    fn terms(&self, scope: LeaseScope) -> LeaseTerms {
        let options = &self.env.options;
        let terms = LeaseTerms {
            revalidate_every: options.revalidate_every,
            outage_grace: Some(options.outage_grace),
            call_timeout: options.kms_timeout,
            busy_is_outage: false,
        };
        let service_grace = options.service_outage_grace;
        match scope {
            LeaseScope::MasterKey | LeaseScope::Logstore(_) | LeaseScope::Standby(_) => terms,
            // Too many hung calls count as an outage, so the store keeps its outage grace.
            LeaseScope::ServiceKey => LeaseTerms {
                outage_grace: (!service_grace.is_zero()).then_some(service_grace),
                busy_is_outage: true,
                ..terms
            },
        }
    }

    /// From now on the lease of a master key, if there is one, is renewed with this probe.
    pub(super) fn renew_with(&self, cmk: &Cmk, probe: Probe) {
        if let Some(lease) = lock(&self.leases).get(cmk) {
            lease.set_probe(probe);
        }
    }

    /// The leases of customers' keys.
    pub(super) fn all_leases(&self) -> Vec<Arc<Lease>> {
        let mut leases: Vec<_> = lock(&self.leases).values().cloned().collect();
        leases.extend(lock(&self.own_leases).values().cloned());
        leases
    }

    /// Renews the leases that are due, in a store without threads. Calls KMSs.
    pub(crate) fn tend_leases(&self) {
        self.tend_service_key();
        for lease in self.all_leases() {
            lease.tend();
        }
    }

    /// Reports each loss and each return of a key to the Logstores, and so to the audit log,
    /// without waiting for the renewal threads. Calls no KMS.
    pub(crate) fn deliver_answers(&self) {
        let leases: Vec<_> = self.service.lease().into_iter().chain(self.all_leases()).collect();
        // All keys are wiped before this waits for segments to be sealed. The service key is first:
        // its listener waits for the audit record before the wipe, for at most the time limit of a
        // KMS call in a store with threads.
        for lease in &leases {
            lease.begin_telling();
        }
        for lease in leases {
            lease.tell();
        }
    }

    /// The number of KMS calls that renewed leases since the store was opened.
    pub(crate) fn renewal_calls(&self) -> u64 {
        let service = self.service.lease().map_or(0, |lease| lease.calls());
        self.all_leases().iter().map(|lease| lease.calls()).sum::<u64>() + service
    }

    /// Drops the leases and ends the threads that renew them.
    pub(crate) fn stop_renewals(&self) {
        lock(&self.leases).clear();
        lock(&self.own_leases).clear();
        self.service.drop_lease();
        if let Some((pool, _)) = &self.renewals {
            pool.stop();
        }
    }

    // ---- the service key ----

    /// Uses the service key under a lease from now on, if its keyring is under a master key.
    /// `listener` is notified of its loss.
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

    /// Schedules a reload of the keyring, as soon as it is allowed.
    fn return_soon(&self) {
        lock(&self.service_return).not_before = Duration::ZERO;
        if let Some((pool, id)) = &self.renewals {
            let this: Weak<dyn Renewable> = self.this.clone();
            // The lease has started the first thread of the pool.
            let _ = pool.wake(*id, this);
        }
    }

    /// Reloads the keyring if its roots are wiped and it may be used. Returns after how long to
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

    /// Writes the record of a loss, unless the wipe has come first: then the record is written
    /// after the return of the key. `losses` is the number of wipes before that. Returns whether it
    /// is on record.
    fn write_loss(&self, event: AuditEvent, detail: String, losses: u64) -> bool {
        let in_time = || self.service.losses() == losses;
        self.audit.transition_if(event, None, detail, "", in_time).unwrap_or(false)
    }
}

impl LeaseServiceKey for KeyService {
    fn lease(&self, wrapping: &Wrapping) -> Arc<Lease> {
        let lease = self.new_lease(&wrapping.cmk, wrapping.probe(), LeaseScope::ServiceKey);
        lease.begin(wrapping.asked);
        lease
    }

    fn start(&self, lease: &Lease) -> Result<()> {
        if let Some(listener) = self.service_listener.get() {
            lease.listen(Weak::clone(listener));
        }
        lease.start().map_err(Error::io("start a thread for", &self.env.dir))
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
