//! The keys of a store: the service keyring, the leases of the customer master keys, the probes,
//! the envelopes of the data keys, and the key audit log.

mod envelopes;
mod leases;
mod probes;

use std::{collections::BTreeMap, sync::Arc};

use super::env::StoreEnv;
use crate::{
    Error, Result,
    config::{ConfigError, LogstoreName},
    ids::{LogstoreId, hex_decode},
    key_status::Refusal,
    keys::{
        AuditEvent,
        audit::AuditLog,
        circuit_breaker::CircuitBreaker,
        envelope::DataKeyVersion,
        gate::{Gate, GateKeys, KeyContext},
        keyring::{Keyring, NewKeyring},
        lease::Lease,
        renewal_pool::RenewalPool,
    },
    kms::{Cmk, KmsError, KmsRouter},
    logstore::{KeyObserver, LogstoreShared},
    metrics::{Counters, StoreMetrics},
    sync::{LockRank, Mutex, MutexGuard, RwLock, RwLockReadGuard, lock, read, write},
};

/// The keys of an open store.
///
/// It decides which KMS serves a master key, holds the one lease for each master key, wraps and
/// unwraps data keys, and records each operation on keys in the audit log. When a KMS refuses a
/// key, the Logstore wipes the key and then reports the loss here ([`KeyObserver`]).
pub(crate) struct KeyService {
    env: Arc<StoreEnv>,
    /// The first KMS that serves a region is used for it.
    kms: KmsRouter,
    /// Shared with the gates, the audit log and the catalogue's journal.
    keyring: Arc<RwLock<Keyring>>,
    /// Held while the keyring is changed.
    changing: Mutex<()>,
    /// The part that the gates of all Logstores share.
    context: Arc<KeyContext>,
    counters: Arc<Counters>,
    audit: AuditLog,
    /// The lease of each master key in use. A simulation needs the fixed order of the map.
    leases: Mutex<BTreeMap<Cmk, Arc<Lease>>>,
    /// The circuit breakers, by region, because the region decides which KMS is called.
    breakers: Mutex<BTreeMap<String, Arc<CircuitBreaker>>>,
    /// The threads that renew the leases. `None` in a store without threads.
    renewals: Option<Arc<RenewalPool>>,
}

impl KeyService {
    pub(crate) fn new(
        env: Arc<StoreEnv>,
        keyring: Arc<RwLock<Keyring>>,
        kms: KmsRouter,
        counters: Arc<Counters>,
        audit: AuditLog,
    ) -> Self {
        let context = Arc::new(KeyContext {
            store: env.id,
            provider: Arc::clone(&env.provider),
            keyring: Arc::clone(&keyring),
            pid: std::process::id(),
            counters: Arc::clone(&counters),
            reloads_keyring: env.read_only,
        });
        let renewals = env.has_threads().then(|| RenewalPool::new(Arc::clone(&env.clock)));
        let leases = Mutex::new(LockRank::Leases, BTreeMap::new());
        let breakers = Mutex::new(LockRank::Circuits, BTreeMap::new());
        let changing = Mutex::new(LockRank::KeyringChange, ());
        Self { env, kms, keyring, changing, context, counters, audit, leases, breakers, renewals }
    }

    /// Refuses to work in a process that `fork` made: parent and child would use the same sequence
    /// numbers.
    pub(crate) fn check_process(&self) -> Result<()> {
        self.context.check_process()
    }

    /// The keyring in memory.
    pub(crate) fn keyring(&self) -> RwLockReadGuard<'_, Keyring> {
        read(&self.keyring)
    }

    /// Uses the keyring. In a store that is open for reading, reads the keyring file again if the
    /// copy in memory is too old.
    pub(crate) fn with_keyring<T>(&self, act: impl Fn(&Keyring) -> Result<T>) -> Result<T> {
        self.context.with_keyring(act)
    }

    /// In a store that is open for reading, takes over the keyring that the writer has rotated.
    pub(crate) fn follow_keyring(&self) -> Result<()> {
        self.context.follow_keyring()
    }

    /// The right to change the keyring. Waits for the change that is under way, also while it calls
    /// the KMS of the keyring.
    pub(crate) fn change_keyring(&self) -> KeyringChange<'_> {
        KeyringChange { keys: self, _one_at_a_time: lock(&self.changing) }
    }

    /// The key audit log.
    pub(crate) fn audit(&self) -> &AuditLog {
        &self.audit
    }

    /// A gate with these keys.
    pub(crate) fn new_gate(&self, name: &LogstoreName, id: LogstoreId, keys: GateKeys) -> Gate {
        Gate::new(Arc::clone(&self.context), name.clone(), id, keys)
    }

    /// The counters of the store and of each lease.
    pub(crate) fn metrics(&self) -> StoreMetrics {
        let leases = self.all_leases();
        self.counters.snapshot(leases.iter().map(|lease| lease.metrics()).collect())
    }

    /// Records a loss or a return of a key that has already happened. It is in force even if the
    /// record cannot be written.
    fn record_transition(&self, event: AuditEvent, logstore: &LogstoreShared, detail: String) {
        if !self.env.read_only {
            let _ = self.audit.transition(event, (&logstore.name, logstore.id), detail);
        }
    }
}

impl KeyObserver for KeyService {
    fn key_lost(&self, logstore: &LogstoreShared, refusal: &Refusal) {
        let (event, detail) = match refusal {
            Refusal::Revoked(reason) => (AuditEvent::Revoked, reason.to_string()),
            Refusal::Unreachable(detail) => {
                (AuditEvent::LeaseEnded, format!("unreachable: {detail}"))
            }
            Refusal::Invalid(detail) => (AuditEvent::LeaseEnded, format!("invalid: {detail}")),
        };
        self.record_transition(event, logstore, detail);
    }

    fn key_recovered(&self, logstore: &LogstoreShared) {
        self.record_transition(AuditEvent::Recovered, logstore, String::new());
    }

    fn envelope_version(&self, cmk: &Cmk, version: &DataKeyVersion) -> Option<String> {
        self.cmk_version(cmk, &hex_decode(version.wrapped.as_deref()?)?)
    }
}

/// Holds the right to change the service keyring.
pub(crate) struct KeyringChange<'a> {
    keys: &'a KeyService,
    _one_at_a_time: MutexGuard<'a, ()>,
}

impl KeyringChange<'_> {
    /// Makes a changed keyring, and writes nothing. `change` may call the KMS: it works on a copy,
    /// and the caller does not hold the administration.
    pub(crate) fn prepare(
        &self,
        change: impl FnOnce(&Keyring) -> Result<NewKeyring>,
    ) -> Result<NewKeyring> {
        let copy = read(&self.keys.keyring).duplicate();
        change(&copy)
    }

    /// Replaces the file of the keyring, and then the keyring in memory. The caller holds the
    /// administration, so that no document is written under an older version after this.
    ///
    /// # Errors
    /// [`Error::KeyringChanged`], [`Error::Locked`], [`Error::Io`]. Nothing has changed then.
    pub(crate) fn put(&self, changed: NewKeyring) -> Result<()> {
        let changed = changed.replace()?;
        *write(&self.keys.keyring) = changed;
        Ok(())
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
    /// The error of an operation that needs a new envelope. A KMS that refuses the master key
    /// makes the configuration invalid.
    pub(crate) fn refusing(self, name: &LogstoreName, cmk: &Cmk) -> Error {
        let (logstore, cmk_id, region) =
            (name.clone(), cmk.cmk_key_id.clone(), cmk.region_id.clone());
        match self {
            KmsOrEngine::Engine(error) => error,
            KmsOrEngine::Kms(KmsError::Revoked { reason, detail }) => {
                Error::Config(ConfigError::CmkRefused {
                    cmk: cmk_id,
                    detail: format!("it is {reason} ({detail})"),
                })
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
