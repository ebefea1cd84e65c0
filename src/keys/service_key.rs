//! The service key of an open store: the keyring in memory, and the lease of its master key.
//!
//! A keyring under a master key is used under a lease, like the data keys of a customer. The probe
//! of that lease is the wrapped key in the keyring file, under which the file encrypts the roots.
//! When the lease is lost, the roots are wiped. When the KMS allows the key again, the keyring is
//! reloaded from its file, which calls the KMS. A keyring under no master key has no lease.

use std::{
    path::PathBuf,
    sync::{Arc, OnceLock, Weak},
};

use tracing::warn;

use super::{
    keyring::{Keyring, NewKeyring},
    keyring_seal::{Wrapping, service_key_error},
    lease::Lease,
    roots::Roots,
};
use crate::{
    Error, Result,
    key_status::{KeyState, KeyStatus, Refusal},
    kms::{Cmk, KmsError},
    metrics::Counters,
    sync::{
        LockRank, Mutex, MutexGuard, RwLock, RwLockReadGuard,
        atomic::{AtomicBool, Ordering},
        lock, read, write,
    },
};

/// Makes the lease of the service key.
pub(crate) trait LeaseServiceKey: Send + Sync {
    /// The lease of a master key that a keyring is under.
    fn lease(&self, wrapping: &Wrapping) -> Arc<Lease>;

    /// Renews a lease from now on, and has its listener notified. The listener depends on the lease
    /// that the service key has, so the service key takes the lease first.
    ///
    /// # Errors
    /// When no thread can be started for it.
    fn start(&self, lease: &Lease) -> Result<()>;

    /// Schedules a call of [`ServiceKey::load`], as soon as it is allowed.
    fn load_soon(&self);
}

/// The result of [`ServiceKey::load`].
pub(crate) enum Load {
    /// The roots are in memory.
    Held,
    /// The roots were wiped, and are in memory again.
    Back,
    /// The roots stay wiped.
    Wiped,
}

/// The service key of an open store. The gates, the audit log and the journal of the catalogue
/// share it.
pub(crate) struct ServiceKey {
    keyring: RwLock<Keyring>,
    /// The path of its file.
    path: PathBuf,
    /// The roots of that keyring, and of each one that takes its place.
    roots: Arc<Roots>,
    lease: RwLock<Option<Arc<Lease>>>,
    /// Whether [`ServiceKey::admit`] has to look at the lease and the roots.
    guarded: AtomicBool,
    /// Held while the keyring is changed or read from its file, so that no change is lost.
    changing: Mutex<()>,
    /// Set once the store is open.
    leases: OnceLock<Weak<dyn LeaseServiceKey>>,
    counters: Arc<Counters>,
    /// Whether the store is open for reading only. Its writer may rotate the service key, so the
    /// keyring is loaded again when it is too old.
    follows_writer: bool,
}

impl ServiceKey {
    /// The service key of a store that is being opened. It has no lease yet.
    pub(crate) fn new(keyring: Keyring, counters: Arc<Counters>, read_only: bool) -> Self {
        Self {
            path: keyring.path().to_owned(),
            roots: Arc::clone(keyring.roots()),
            keyring: RwLock::new(LockRank::Keyring, keyring),
            lease: RwLock::new(LockRank::ServiceLease, None),
            guarded: AtomicBool::new(false),
            changing: Mutex::new(LockRank::KeyringChange, ()),
            leases: OnceLock::new(),
            counters,
            follows_writer: read_only,
        }
    }

    /// Uses a lease from now on if the keyring is under a master key.
    ///
    /// # Errors
    /// As [`LeaseServiceKey::lease`].
    pub(crate) fn lease_with(&self, leases: Weak<dyn LeaseServiceKey>) -> Result<()> {
        let _changing = lock(&self.changing);
        // Set once, when the store is opened.
        let _ = self.leases.set(leases);
        self.switch_lease()
    }

    /// The keyring in memory. Its roots may be wiped.
    pub(crate) fn keyring(&self) -> RwLockReadGuard<'_, Keyring> {
        read(&self.keyring)
    }

    /// The lease of the master key that the keyring is under.
    pub(crate) fn lease(&self) -> Option<Arc<Lease>> {
        read(&self.lease).clone()
    }

    /// Drops the lease: the store is closed.
    pub(crate) fn drop_lease(&self) {
        *write(&self.lease) = None;
    }

    /// Admits an operation that starts now. Returns how often the roots were wiped: the caller must
    /// not use keys that were loaded before a later wipe. Blocks for a KMS call if the last answer
    /// is too old.
    ///
    /// # Errors
    /// [`Error::ServiceKey`], and the error of reading the keyring again.
    pub(crate) fn admit(&self) -> Result<u64> {
        let losses = self.roots.losses();
        if !self.guarded.load(Ordering::Acquire) {
            return Ok(losses);
        }
        if let Some(lease) = self.lease() {
            lease.admit().map_err(|refusal| {
                self.counters.refused(&refusal);
                self.refused(lease.cmk(), &refusal)
            })?;
        }
        self.roots.wiped().map_or(Ok(losses), Err)
    }

    /// Checks that operations are admitted by the last answer of the KMS. Makes no call.
    ///
    /// # Errors
    /// As [`ServiceKey::admit`].
    pub(crate) fn check(&self) -> Result<()> {
        if !self.guarded.load(Ordering::Acquire) {
            return Ok(());
        }
        if let Some(lease) = self.lease() {
            lease.check().map_err(|refusal| self.refused(lease.cmk(), &refusal))?;
        }
        self.roots.wiped().map_or(Ok(()), Err)
    }

    /// Whether operations are admitted by the last answer of the KMS. Makes no call.
    pub(crate) fn is_usable(&self) -> bool {
        self.check().is_ok()
    }

    /// Whether [`ServiceKey::admit`] decides without a KMS call, now and for a while. If not,
    /// starts a call, and does not wait for it.
    pub(crate) fn decides_or_asks(&self) -> bool {
        let decides = || self.lease().is_none_or(|lease| lease.decides_or_asks());
        !self.guarded.load(Ordering::Acquire) || decides()
    }

    /// The error of an operation that the lease refuses.
    fn refused(&self, cmk: &Cmk, refusal: &Refusal) -> Error {
        let cause = match refusal {
            Refusal::Revoked(reason) => {
                let detail = "the KMS has refused it since the store was opened".to_owned();
                KmsError::Revoked { reason: *reason, detail }
            }
            Refusal::Unreachable(detail) => KmsError::Unreachable { detail: detail.clone() },
            Refusal::Invalid(detail) => KmsError::Invalid { detail: detail.clone() },
        };
        service_key_error(&self.path, cmk, cause)
    }

    /// The state of the service key and its lease. Calls no KMS.
    pub(crate) fn status(&self) -> KeyStatus {
        let active = KeyStatus { state: KeyState::Active, lease_left: None };
        self.lease().map_or(active, |lease| lease.status())
    }

    /// How often the roots were wiped so far.
    pub(crate) fn losses(&self) -> u64 {
        self.roots.losses()
    }

    /// The lease is lost: wipes the roots. Returns the error of each operation from now on.
    pub(crate) fn lose(&self, lease: &Lease, refusal: &Refusal) -> Error {
        let error = self.refused(lease.cmk(), refusal);
        self.roots.wipe(error.clone());
        error
    }

    /// Reloads the keyring if the roots are wiped and either the lease admits it or the file is now
    /// under another master key. First notifies the listeners of a return of the lease. Calls the
    /// KMS. The caller holds no lock that a listener takes.
    pub(crate) fn load(&self) -> Load {
        if !self.guarded.load(Ordering::Acquire) {
            return Load::Held;
        }
        // Read the count before the listeners hear of a return: a loss after that wipes the roots
        // again, and then the reload must not restore them.
        let losses = self.roots.losses();
        let lease = self.lease();
        if let Some(lease) = &lease {
            lease.tell();
        }
        if self.roots.wiped().is_none() {
            return Load::Held;
        }
        let copy = self.keyring().clone();
        let is_refused = lease.as_ref().is_some_and(|lease| lease.is_lost());
        if is_refused && copy.is_under_same_key().unwrap_or(true) {
            return Load::Wiped;
        }
        let _changing = lock(&self.changing);
        if self.roots.wiped().is_none() {
            return Load::Held;
        }
        let same = |now: &Arc<Lease>| lease.as_ref().is_some_and(|lease| Arc::ptr_eq(lease, now));
        if !self.lease().as_ref().map_or(lease.is_none(), same) {
            // Another lease has taken its place, and the caller is woken for that.
            return Load::Wiped;
        }
        let copy = self.keyring().clone();
        match copy.reload_no_older().and_then(|loaded| self.take_over(loaded, losses)) {
            Ok(()) => Load::Back,
            Err(error) => {
                warn!(path = %self.path.display(), %error, "keyring reload failed");
                self.roots.refuse_with(match error {
                    Error::ServiceKey { .. } => error,
                    other => {
                        Error::KeyringNotRead { path: self.path.clone(), cause: Arc::new(other) }
                    }
                });
                Load::Wiped
            }
        }
    }

    /// Calls `act` with the keyring.
    ///
    /// A read-only opener calls the KMS if the last answer is too old. If the keyring in memory is
    /// too old, the opener reloads it, which may call the KMS, and retries `act` once. A writer
    /// never calls the KMS here, and may hold the administration: it was admitted when its
    /// operation began.
    ///
    /// # Errors
    /// As [`ServiceKey::admit`], and the error of `act`.
    pub(crate) fn with_keyring<T>(&self, act: impl Fn(&Keyring) -> Result<T>) -> Result<T> {
        if !self.follows_writer {
            self.check()?;
            return act(&self.keyring());
        }
        self.admit()?;
        let done = act(&self.keyring());
        if !matches!(done, Err(Error::KeyringTooOld { .. })) {
            return done;
        }
        self.reload()?;
        act(&self.keyring())
    }

    /// In a read-only opener, reloads the keyring if the writer has rotated it, or has put it
    /// under another master key. From then on the opener refuses documents under a retired
    /// version. If the file cannot be read, the opener keeps its copy. May call the KMS.
    ///
    /// # Errors
    /// As [`ServiceKey::admit`], and the errors of reading the changed keyring.
    pub(crate) fn follow_writer(&self) -> Result<()> {
        self.admit()?;
        if self.follows_writer && self.keyring().is_outdated().unwrap_or(false) {
            self.reload()?;
        }
        Ok(())
    }

    /// Takes over the keyring as its file has it now. May call the KMS, and holds no lock of the
    /// keyring or its roots during that call.
    fn reload(&self) -> Result<()> {
        let _changing = lock(&self.changing);
        let losses = self.roots.losses();
        if let Some(error) = self.roots.wiped() {
            return Err(error);
        }
        let copy = self.keyring().clone();
        let loaded = copy.reload()?;
        if loaded.generation() < copy.generation() {
            return Ok(());
        }
        self.take_over(loaded, losses)
    }

    /// Replaces the keyring by one that was read from the file. Takes over its roots too, unless
    /// the number of wipes has grown since it was `losses`.
    fn take_over(&self, loaded: Keyring, losses: u64) -> Result<()> {
        let fresh = Arc::clone(loaded.roots());
        *write(&self.keyring) = loaded.with_roots(&self.roots);
        let refilled = self.roots.refill(&fresh, losses);
        self.switch_lease().and(refilled)
    }

    /// The right to change the keyring. Waits for the change or the reading that is under way, also
    /// while it calls the KMS.
    pub(crate) fn change(&self) -> KeyringChange<'_> {
        KeyringChange { service: self, _changing: lock(&self.changing) }
    }

    /// Brings the lease in line with the master key that the keyring is under. The caller holds
    /// `changing`.
    fn switch_lease(&self) -> Result<()> {
        let Some(leases) = self.leases.get().and_then(Weak::upgrade) else { return Ok(()) };
        let wrapping = self.keyring().wrapping().cloned();
        let mut begun = None;
        let lease = match (&wrapping, self.lease()) {
            (None, _) => None,
            (Some(wrapping), Some(lease)) if *lease.cmk() == wrapping.cmk => {
                lease.set_probe(wrapping.probe());
                Some(lease)
            }
            (Some(wrapping), _) => {
                begun = Some(leases.lease(wrapping));
                begun.clone()
            }
        };
        let guarded = lease.is_some() || self.roots.wiped().is_some();
        // The flag is set before the lease is, and reset after it.
        if guarded {
            self.guarded.store(true, Ordering::Release);
        }
        *write(&self.lease) = lease;
        if !guarded {
            self.guarded.store(false, Ordering::Release);
        }
        begun.map_or(Ok(()), |lease| leases.start(&lease))
    }
}

/// Holds the right to change the keyring.
pub(crate) struct KeyringChange<'a> {
    service: &'a ServiceKey,
    _changing: MutexGuard<'a, ()>,
}

impl KeyringChange<'_> {
    /// Makes a changed keyring, and writes nothing. `change` may call the KMS: it works on a copy,
    /// and the caller does not hold the administration.
    ///
    /// # Errors
    /// The error of `change`.
    pub(crate) fn prepare(
        &self,
        change: impl FnOnce(&Keyring) -> Result<NewKeyring>,
    ) -> Result<NewKeyring> {
        let copy = self.service.keyring().clone();
        change(&copy)
    }

    /// Replaces the file of the keyring, and then the keyring in memory. The caller holds the
    /// administration, so that no document is written under an older version after this.
    ///
    /// # Errors
    /// [`Error::KeyringChanged`], [`Error::Locked`], [`Error::Io`]: nothing has changed then. Also
    /// when no thread can be started for the lease.
    pub(crate) fn put(&self, changed: NewKeyring) -> Result<()> {
        *write(&self.service.keyring) = changed.replace()?;
        self.service.switch_lease()?;
        // The lease may have been lost meanwhile, and another master key may take its place now.
        if !self.service.is_usable()
            && let Some(leases) = self.service.leases.get().and_then(Weak::upgrade)
        {
            leases.load_soon();
        }
        Ok(())
    }
}

#[cfg(test)]
impl ServiceKey {
    /// The service key of a keyring under no master key.
    pub(crate) fn for_tests(keyring: Keyring) -> Arc<Self> {
        Arc::new(Self::new(keyring, Arc::default(), false))
    }
}
