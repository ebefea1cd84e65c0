//! The builder that creates and opens stores.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    anchor::Anchor,
    assembly::Setup,
    backup::CopyProgress,
    creation,
    handles::Store,
    keyring_loss::{RecoverProgress, RecoverReport, Recoverable},
    opening,
    options::StoreOptions,
    restore::{self, RestoreOptions, RestoreReport},
};
#[cfg(doc)]
use crate::config::ConfigError;
use crate::{
    Error, Result,
    config::LogstoreName,
    crypto::CryptoProvider,
    io::{Clock, Disk, OsRandom, Random, RealDisk, SystemClock},
    kms::{Cmk, Kms},
};

/// The parts and the settings that a store is created or opened with; from [`Store::builder`].
#[derive(Clone, Debug)]
#[must_use = "a builder does nothing until one of its opening methods is called"]
pub struct StoreBuilder {
    setup: Setup,
}

impl Store {
    /// Begins to create or open the store in `dir`, with the service keyring in the file `keyring`
    /// and this provider of AES and SM4.
    pub fn builder(
        dir: impl Into<PathBuf>,
        keyring: impl Into<PathBuf>,
        provider: impl CryptoProvider + 'static,
    ) -> StoreBuilder {
        StoreBuilder::new(dir.into(), keyring.into(), Arc::new(provider))
    }
}

impl StoreBuilder {
    fn new(dir: PathBuf, keyring: PathBuf, provider: Arc<dyn CryptoProvider>) -> Self {
        let setup = Setup {
            dir,
            keyring,
            provider,
            kms: Vec::new(),
            service_cmk: None,
            anchor: None,
            without_anchor: false,
            accept_retired: false,
            disk: Arc::new(RealDisk),
            outside: Arc::new(RealDisk),
            clock: Arc::new(SystemClock),
            random: Arc::new(OsRandom),
            options: StoreOptions::default(),
        };
        Self { setup }
    }

    /// Adds a KMS. The first KMS that serves a region is used for it.
    pub fn kms(mut self, kms: Arc<dyn Kms>) -> Self {
        self.setup.kms.push(kms);
        self
    }

    /// Puts a new service keyring under a master key, in the KMS that serves its region. The file
    /// then has the root keys in encrypted form only, and each opening asks that KMS once for them.
    /// Applies where a keyring is made ([`StoreBuilder::create`],
    /// [`StoreBuilder::recover_without_keyring`]). An existing keyring names its master key itself,
    /// and [`Keys::rewrap_keyring`](crate::Keys::rewrap_keyring) changes it.
    ///
    /// The service key has a lease, as a customer's key has: a refusal of the master key closes an open
    /// store within the bound of [`StoreOptions::revalidate_every`], and an outage of its KMS does so
    /// after [`StoreOptions::service_outage_grace`].
    pub fn service_cmk(mut self, cmk: Cmk) -> Self {
        self.setup.service_cmk = Some(cmk);
        self
    }

    /// Keeps a copy of the catalogue in an anchor, and compares the store with it at each opening.
    /// From the first opening for writing with an anchor on, the keyring records that the store has
    /// an anchor, and the store does not open for writing without one.
    pub fn anchor(mut self, anchor: Arc<dyn Anchor>) -> Self {
        self.setup.anchor = Some(anchor);
        self
    }

    /// Opens a store with an anchor for writing without comparing the two: an older store in its
    /// place is not detected. The audit log records that. If an anchor is passed, it keeps a copy
    /// of this store from then on.
    pub fn without_anchor(mut self) -> Self {
        self.setup.without_anchor = true;
        self
    }

    /// Accepts documents, audit records and checkpoints under versions of the service key that a
    /// rotation has retired. For restoring a backup from before the rotation that is known to be
    /// good. An attacker with a retired version can forge all of them. Applies to
    /// [`StoreBuilder::open_read_only`] only.
    pub fn accept_retired_versions(mut self, accept: bool) -> Self {
        self.setup.accept_retired = accept;
        self
    }

    /// Replaces the settings.
    pub fn options(mut self, options: StoreOptions) -> Self {
        self.setup.options = options;
        self
    }

    /// Replaces the file system.
    pub fn disk(mut self, disk: Arc<dyn Disk>) -> Self {
        self.setup.outside = Arc::clone(&disk);
        self.setup.disk = disk;
        self
    }

    /// Replaces the clock.
    pub fn clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.setup.clock = clock;
        self
    }

    /// Replaces the source of randomness. Keys, salts and nonces come from it: an attacker who can
    /// predict it or make it repeat can read all data.
    pub fn insecure_random_for_tests(mut self, random: Arc<dyn Random>) -> Self {
        self.setup.random = random;
        self
    }

    /// Creates a new store and its service keyring, and opens it. The directory may exist if it is
    /// empty, or if a creation in it was interrupted: the call continues that creation, with its
    /// keyring.
    ///
    /// # Errors
    /// [`Error::StoreExists`]; [`Error::NotAStore`] when the directory has another file in it;
    /// [`Error::KeyringExists`]; [`Error::KeyringForeign`] when the existing keyring is not that of
    /// the interrupted creation; [`Error::KeyringUnsafe`]; [`Error::NetworkFileSystem`];
    /// [`Error::Locked`] when another process creates the store; [`Error::Io`];
    /// [`Error::ServiceKey`] and
    /// [`ConfigError::NoKmsForRegion`] when the keyring is to be under a master key that cannot be
    /// used, with nothing created.
    pub fn create(self) -> Result<Store> {
        creation::create(self.setup).map(Store::new)
    }

    /// Opens a store for reading and writing. Reads no data. Calls no KMS, unless the service
    /// keyring is under a master key.
    ///
    /// # Errors
    /// [`Error::ServiceKey`] when the service keyring is under a master key that cannot be used;
    /// [`Error::StoreMissing`], [`Error::NotAStore`], [`Error::NewerFormat`];
    /// [`Error::UnsupportedFeature`], also when the store can be read but not written;
    /// [`Error::Locked`] when another process writes it; [`Error::NetworkFileSystem`];
    /// [`Error::KeyringMissing`], [`Error::KeyringForeign`], [`Error::KeyringTooOld`];
    /// [`Error::RetiredKeyVersion`] for a store from before a rotation of the service key;
    /// [`Error::RolledBack`] and [`Error::Anchor`] with an anchor; the integrity errors of the
    /// catalogue.
    pub fn open(self) -> Result<Store> {
        opening::open(self.setup).map(Store::new)
    }

    /// Opens a store for reading, beside the process that writes it or without one.
    ///
    /// # Errors
    /// As [`StoreBuilder::open`], but never [`Error::Locked`].
    pub fn open_read_only(self) -> Result<Store> {
        opening::open_read_only(self.setup).map(Store::new)
    }

    /// Opens the store, or creates it if there is none.
    ///
    /// # Errors
    /// As [`StoreBuilder::open`] and [`StoreBuilder::create`].
    pub fn open_or_create(self) -> Result<Store> {
        match self.clone().open() {
            Err(Error::StoreMissing { .. }) => self.create(),
            opened => opened,
        }
    }

    /// Restores the backup in the directory `from` ([`Admin::backup`](crate::Admin::backup)) to the
    /// directory of the builder, which must be empty or absent. The keyring of the store must be in
    /// place. The caller opens the store afterwards.
    ///
    /// The restored store is verified, and the report has the faults: what can be restored is. May call
    /// the customers' KMS; a Logstore whose key cannot be used is verified without it.
    ///
    /// The restored store does not repeat a number of the lost one: each shard continues 2^48
    /// sequence numbers behind the last one that the backup knows, and the writer epoch is raised by
    /// 2^24. So a reader that has come further in the lost store begins behind all records of the
    /// restored one: until the first append, that is [`Error::AboveEnd`]. The key audit log records
    /// the restore.
    ///
    /// With [`StoreBuilder::accept_retired_versions`], a backup from before a rotation of the service
    /// key is restored too. The restored store is under the newest version.
    ///
    /// # Errors
    /// [`Error::NotEmpty`]; the errors of [`StoreBuilder::open_read_only`] for the backup; for
    /// [`RestoreOptions::until_us`] also the integrity errors of its segments;
    /// [`Error::NetworkFileSystem`]; [`Error::Io`]. A restore that fails leaves a directory that is no
    /// store.
    pub fn restore(
        self,
        from: impl AsRef<Path>,
        options: &RestoreOptions,
        progress: &mut dyn FnMut(CopyProgress),
    ) -> Result<RestoreReport> {
        restore::restore(self.setup, from.as_ref(), options, progress)
    }

    /// The Logstores that [`StoreBuilder::recover_without_keyring`] may recover, each with the
    /// master key and the role that the recovery would use. Nothing authenticates this list, so
    /// compare it with a source outside the store. Calls no KMS and changes nothing.
    ///
    /// # Errors
    /// [`Error::StoreMissing`], [`Error::NotAStore`], [`Error::NewerFormat`],
    /// [`Error::KeyringExists`], [`Error::Io`].
    pub fn recoverable(self) -> Result<Vec<Recoverable>> {
        opening::recoverable(self.setup)
    }

    /// Opens a store whose keyring is lost, with a new keyring. Recovers the encrypted data of the
    /// Logstores under customer master keys. Logstores under the lost service key, and data from
    /// before encryption was turned on, cannot be authenticated any more. The configuration of a
    /// recovered Logstore is taken as found, except `encrypt_conf`: it follows the envelopes, which
    /// the data key authenticates, and is on.
    ///
    /// `expected` has the master key, its region and the role of each Logstore to recover, from a
    /// source that an attacker on the disk cannot write. A Logstore that is not in it, or that
    /// names another key or role, is not recovered, and no KMS is called for it. Otherwise an
    /// attacker with a master key could put a Logstore in the place of the customer's.
    ///
    /// # Errors
    /// [`Error::KeyringExists`] when the file of the new keyring exists; [`Error::ServiceKey`] when
    /// the new keyring is to be under a master key that cannot be used; [`Error::KmsUnreachable`]
    /// when a KMS does not answer, and [`Error::Corrupt`] when two Logstores of one name prove
    /// themselves, both with nothing changed; otherwise as [`StoreBuilder::open`].
    pub fn recover_without_keyring(
        self,
        expected: &BTreeMap<LogstoreName, Cmk>,
    ) -> Result<(Store, RecoverReport)> {
        self.recover_without_keyring_with(expected, &mut |_| {})
    }

    /// As [`StoreBuilder::recover_without_keyring`]. Reports its progress while it asks the KMSs.
    ///
    /// # Errors
    /// As [`StoreBuilder::recover_without_keyring`].
    pub fn recover_without_keyring_with(
        self,
        expected: &BTreeMap<LogstoreName, Cmk>,
        progress: &mut dyn FnMut(&RecoverProgress),
    ) -> Result<(Store, RecoverReport)> {
        let (store, report) = opening::recover_without_keyring(self.setup, expected, progress)?;
        Ok((Store::new(store), report))
    }
}
