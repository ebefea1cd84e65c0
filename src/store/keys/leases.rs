//! Routing master keys to KMSs, and the lease of each master key.

use std::sync::Arc;

use super::KeyService;
use crate::{
    Error, Result,
    config::ProbeMode,
    ids::LogstoreId,
    keys::{
        envelope::KeysSection,
        gate::GateKeys,
        lease::{Lease, LeaseParts, LeaseTerms, Probe},
    },
    kms::{BoundedKms, Cmk},
    logstore::Meta,
    sync::lock,
};

/// The Logstores that a lease is for.
#[derive(Clone, Copy)]
pub(super) enum LeaseOf {
    /// All Logstores under the master key.
    MasterKey,
    /// One of them.
    Logstore { id: LogstoreId, standby: bool },
    /// All of them: the lease of the service key.
    ServiceKey,
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
        let (lease, own) = match (&section.cmk, section.probe_mode()) {
            (None, _) => (None, None),
            (Some(cmk), ProbeMode::Own) => (Some(self.own_lease(cmk, section, id, false)?), None),
            (Some(cmk), ProbeMode::Shared) => {
                (Some(self.lease(cmk, section, id)?), Some(self.own_lease(cmk, section, id, true)?))
            }
        };
        Ok(GateKeys { section: Some(Arc::new(section.clone())), lease, own, unproved: None })
    }

    /// The lease that the envelopes of one Logstore renew. Calls no KMS.
    fn own_lease(
        &self,
        cmk: &Cmk,
        section: &KeysSection,
        id: LogstoreId,
        standby: bool,
    ) -> Result<Arc<Lease>> {
        let probe = self.envelope_probe(section, id)?;
        let mut leases = lock(&self.own_leases);
        if let Some(lease) = leases.get(&id)
            && lease.cmk() == cmk
            && lease.is_standby() == standby
        {
            lease.set_probe(probe);
            return Ok(Arc::clone(lease));
        }
        let lease = self.new_lease(cmk, probe, LeaseOf::Logstore { id, standby });
        leases.insert(id, Arc::clone(&lease));
        drop(leases);
        lease.start().map_err(Error::io("start a thread for", &self.env.dir))?;
        Ok(lease)
    }

    /// Drops the lease of a Logstore that was deleted.
    pub(crate) fn forget_leases_of(&self, id: LogstoreId) {
        lock(&self.own_leases).remove(&id);
    }

    /// The one lease of a master key. Calls no KMS.
    fn lease(&self, cmk: &Cmk, section: &KeysSection, id: LogstoreId) -> Result<Arc<Lease>> {
        if let Some(lease) = lock(&self.leases).get(cmk) {
            return Ok(Arc::clone(lease));
        }
        let probe = match self.load_probe(cmk)? {
            Some(probe) => probe,
            // An envelope of the Logstore proves as much as a probe does.
            None => self.envelope_probe(section, id)?,
        };
        let lease = self.new_lease(cmk, probe, LeaseOf::MasterKey);
        lease.start().map_err(Error::io("start a thread for", &self.env.dir))?;
        // Another thread may have made the lease in the meantime.
        Ok(Arc::clone(lock(&self.leases).entry(cmk.clone()).or_insert(lease)))
    }

    /// A lease that [`KeyService`] does not keep.
    pub(super) fn new_lease(&self, cmk: &Cmk, probe: Probe, of: LeaseOf) -> Arc<Lease> {
        let (logstore, standby) = match of {
            LeaseOf::MasterKey | LeaseOf::ServiceKey => (None, false),
            LeaseOf::Logstore { id, standby } => (Some(id), standby),
        };
        let breaker = Arc::clone(lock(&self.breakers).entry(cmk.region_id.clone()).or_default());
        Lease::new(LeaseParts {
            cmk: cmk.clone(),
            kms: self.kms.serving_or_later(&cmk.region_id),
            breaker,
            probe,
            terms: self.terms(of),
            clock: Arc::clone(&self.env.clock),
            random: Arc::clone(&self.env.random),
            pool: self.renewals.as_ref().map(|(pool, _)| Arc::clone(pool)),
            standby,
            logstore,
            sealer: Arc::clone(&self.sealer),
        })
    }

    fn terms(&self, of: LeaseOf) -> LeaseTerms {
        let options = &self.env.options;
        let terms = LeaseTerms {
            revalidate_every: options.revalidate_every,
            outage_grace: Some(options.outage_grace),
            call_timeout: options.kms_timeout,
            busy_is_outage: false,
        };
        let service_grace = options.service_outage_grace;
        match of {
            LeaseOf::MasterKey | LeaseOf::Logstore { .. } => terms,
            // Hung calls, those under customers' keys included, close no store.
            LeaseOf::ServiceKey => LeaseTerms {
                outage_grace: (!service_grace.is_zero()).then_some(service_grace),
                busy_is_outage: true,
                ..terms
            },
        }
    }

    /// Has the lease of a master key, if there is one, renew with a newly wrapped probe.
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
        // All keys are wiped before this waits for a disk.
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
}
