//! The keys of a store: the service keyring, the leases, the probes,
//! the envelopes of the data keys, and the key audit log.

mod envelopes;
mod leases;
mod probes;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, OnceLock, Weak},
};

use super::env::StoreEnv;
use crate::{
    Error, Result,
    config::{ConfigError, LogstoreName},
    ids::{LogstoreId, hex_decode},
    io::Disk,
    key_status::Refusal,
    keys::{
        AuditEvent,
        audit::AuditLog,
        circuit_breaker::CircuitBreaker,
        envelope::DataKeyVersion,
        gate::{Gate, GateKeys, KeyContext},
        keyring::Keyring,
        lease::{Lease, LeaseListener},
        renewal_pool::RenewalPool,
        sealing::Sealer,
        service_key::{KeyringChange, ServiceKey},
    },
    kms::{Cmk, KmsError, KmsRouter},
    logstore::{KeyObserver, LogstoreShared},
    metrics::{Counters, StoreMetrics},
    shard::{LostGroups, RecordLostGroups},
    sync::{LockRank, Mutex, RwLockReadGuard},
};

use leases::ServiceReturn;

/// The keys of an open store.
///
/// It decides which KMS serves a master key, holds the leases (one that Logstores under a master
/// key share, and one for each Logstore under a master key), wraps and unwraps data keys, and
/// records each operation on keys in the audit log. When a KMS refuses a key, the Logstore wipes
/// the key and then reports the loss here ([`KeyObserver`]).
pub(crate) struct KeyService {
    env: Arc<StoreEnv>,
    /// The first KMS that serves a region is used for it.
    kms: KmsRouter,
    /// Shared with the gates, the audit log and the catalogue's journal.
    service: Arc<ServiceKey>,
    /// Hears of the loss of the service key. Set once the store is open.
    service_listener: OnceLock<Weak<dyn LeaseListener>>,
    service_return: Mutex<ServiceReturn>,
    /// The part that the gates of all Logstores share.
    context: Arc<KeyContext>,
    counters: Arc<Counters>,
    audit: AuditLog,
    /// The shared lease of each master key in use. A simulation needs the fixed order of the map.
    leases: Mutex<BTreeMap<Cmk, Arc<Lease>>>,
    /// The lease of each Logstore under a master key, whose probe is one of its envelopes. It is a
    /// standby lease beside a shared one.
    own_leases: Mutex<BTreeMap<LogstoreId, Arc<Lease>>>,
    /// The circuit breakers, by region, because the region decides which KMS is called.
    breakers: Mutex<BTreeMap<String, Arc<CircuitBreaker>>>,
    /// The threads that renew the leases, and the number of this service in them. `None` in a store
    /// without threads.
    renewals: Option<(Arc<RenewalPool>, u64)>,
    /// Seals the shards of a lost master key.
    sealer: Arc<Sealer>,
    /// For the threads.
    this: Weak<Self>,
}

impl KeyService {
    pub(crate) fn new(
        env: Arc<StoreEnv>,
        service: Arc<ServiceKey>,
        kms: KmsRouter,
        counters: Arc<Counters>,
        audit: AuditLog,
    ) -> Arc<Self> {
        let context = Arc::new(KeyContext {
            store: env.id,
            provider: Arc::clone(&env.provider),
            service: Arc::clone(&service),
            pid: std::process::id(),
            counters: Arc::clone(&counters),
        });
        let renewals = env.has_threads().then(RenewalPool::new);
        let sealer = Sealer::new(Arc::clone(&env.clock), env.has_threads());
        Arc::new_cyclic(|this| Self {
            env,
            kms,
            service,
            service_listener: OnceLock::new(),
            service_return: Mutex::new(LockRank::ServiceReturn, ServiceReturn::default()),
            context,
            counters,
            audit,
            leases: Mutex::new(LockRank::Leases, BTreeMap::new()),
            own_leases: Mutex::new(LockRank::OwnLeases, BTreeMap::new()),
            breakers: Mutex::new(LockRank::Circuits, BTreeMap::new()),
            renewals: renewals.map(|pool| (Arc::clone(&pool), pool.enter())),
            sealer,
            this: Weak::clone(this),
        })
    }

    /// Refuses to work in a process that `fork` made: parent and child would use the same sequence
    /// numbers.
    pub(crate) fn check_process(&self) -> Result<()> {
        self.context.check_process()
    }

    /// The keyring in memory. Its roots may be wiped.
    pub(crate) fn keyring(&self) -> RwLockReadGuard<'_, Keyring> {
        self.service.keyring()
    }

    /// Uses the keyring. In a store that is open for reading, reads the keyring file again if the
    /// copy in memory is too old, and may call the KMS.
    ///
    /// # Errors
    /// [`Error::ServiceKey`], and the error of `act`.
    pub(crate) fn with_keyring<T>(&self, act: impl Fn(&Keyring) -> Result<T>) -> Result<T> {
        self.service.with_keyring(act)
    }

    /// In a store that is open for reading, takes over the keyring that the writer has changed.
    pub(crate) fn follow_keyring(&self) -> Result<()> {
        self.service.follow_writer()
    }

    /// The right to change the keyring. Waits for the change that is under way, also while it calls
    /// the KMS of the keyring.
    pub(crate) fn change_keyring(&self) -> KeyringChange<'_> {
        self.service.change()
    }

    /// The key audit log.
    pub(crate) fn audit(&self) -> &AuditLog {
        &self.audit
    }

    /// The key audit log by the files in another directory, for reading.
    pub(crate) fn audit_log_in(&self, disk: &Arc<dyn Disk>, dir: PathBuf) -> AuditLog {
        AuditLog::new(
            Arc::clone(disk),
            Arc::clone(&self.env.clock),
            Arc::clone(&self.service),
            dir,
            self.env.options.audit_file_bytes,
            Arc::clone(&self.counters),
            None,
        )
    }

    /// A gate with these keys.
    pub(crate) fn new_gate(&self, name: &LogstoreName, id: LogstoreId, keys: GateKeys) -> Gate {
        Gate::new(Arc::clone(&self.context), name.clone(), id, keys)
    }

    /// The counters of the store and of each lease.
    pub(crate) fn metrics(&self) -> StoreMetrics {
        let mut leases = self.all_leases();
        leases.retain(|lease| !lease.is_unused());
        let leases = leases.iter().map(|lease| lease.metrics()).collect();
        self.counters.snapshot(leases, self.service.lease().map(|lease| lease.metrics()))
    }

    /// Records a loss or a return of a key that has already happened. It is in force even if the
    /// record cannot be written.
    fn record_transition(&self, event: AuditEvent, logstore: &LogstoreShared, detail: String) {
        if !self.env.read_only {
            let _ = self.audit.transition(event, Some((&logstore.name, logstore.id)), detail);
        }
    }
}

impl KeyObserver for KeyService {
    fn key_lost(&self, logstore: &LogstoreShared, refusal: &Refusal) {
        let (event, detail) = describe(refusal);
        self.record_transition(event, logstore, detail);
    }

    fn key_returned(&self, logstore: &LogstoreShared) {
        self.record_transition(AuditEvent::Recovered, logstore, String::new());
    }

    fn envelope_version(&self, cmk: &Cmk, version: &DataKeyVersion) -> Option<String> {
        self.cmk_version(cmk, &hex_decode(version.wrapped.as_deref()?)?)
    }

    fn tend_service_key(&self) {
        KeyService::tend_service_key(self);
    }
}

/// How the loss of a key is recorded in the audit log.
fn describe(refusal: &Refusal) -> (AuditEvent, String) {
    match refusal {
        Refusal::Revoked(reason) => (AuditEvent::Revoked, reason.to_string()),
        Refusal::Unreachable(detail) => (AuditEvent::LeaseEnded, format!("unreachable: {detail}")),
        Refusal::Invalid(detail) => (AuditEvent::LeaseEnded, format!("invalid: {detail}")),
    }
}

impl RecordLostGroups for KeyService {
    fn lost_groups(&self, logstore: (&LogstoreName, LogstoreId), shard: u32, lost: LostGroups) {
        let LostGroups { groups, first_seq, last_seq } = lost;
        let noun = if groups == 1 { "group" } else { "groups" };
        let detail =
            format!("shard {shard}: {groups} {noun}, sequence numbers {first_seq} to {last_seq}");
        // The groups are lost even if the record cannot be written.
        let _ = self.audit.record(AuditEvent::GroupsLost, Some(logstore), detail);
    }
}

/// The error of an operation that calls the KMS: either the KMS refuses, or the engine fails.
pub(crate) enum KmsOrEngine {
    Kms(KmsError),
    Engine(Error),
}

impl From<Error> for KmsOrEngine {
    fn from(error: Error) -> Self {
        KmsOrEngine::Engine(error)
    }
}

impl KmsOrEngine {
    /// The error of an operation that needs a new envelope.
    pub(crate) fn refusing(self, name: &LogstoreName, cmk: &Cmk) -> Error {
        let (logstore, cmk_id, region) =
            (name.clone(), cmk.cmk_key_id.clone(), cmk.region_id.clone());
        match self {
            KmsOrEngine::Engine(error) => error,
            KmsOrEngine::Kms(KmsError::Revoked { reason, detail }) => {
                Error::Config(ConfigError::CmkRefused { cmk: cmk_id, reason, detail })
            }
            KmsOrEngine::Kms(KmsError::Invalid { detail }) => {
                Error::KmsInvalid { logstore, cmk: cmk_id, detail }
            }
            KmsOrEngine::Kms(other) => {
                Error::KmsUnreachable { logstore, cmk: cmk_id, region, detail: other.to_string() }
            }
        }
    }

    /// The KMS gave a wrong answer.
    fn invalid(detail: &str) -> Self {
        KmsOrEngine::Kms(KmsError::Invalid { detail: detail.to_owned() })
    }
}
