//! The handles of an open store: [`Store`], [`Keys`] and [`Admin`]. Each method calls one
//! operation.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    anchor::AnchorStatus,
    anchoring, auto_rotation,
    backup::{self, BackupOptions, BackupReport, CopyProgress},
    core::Core,
    inspect::{
        self, AuditExport, AuditMark, AuditVerification, Checkpoint, VerifyOptions, VerifyProgress,
        VerifyReport,
    },
    key_change::{self, ReplaceCmk},
    key_usage::{self, KeyUsage},
    logstores,
    open_store::OpenStore,
    options::StoreOptions,
    removal::DeleteReport,
    repair::{self, StoreRepairReport},
    reserve::ReserveStatus,
    resharding::{self, ShardMerge, ShardSplit},
    retention::{self, RetainOptions, RetentionReport, RetentionStatus},
    rewrap_all::{self, RewrapOptions, RewrapProgress, RewrapReport},
    service_rotation::{self, ServiceRotation},
};
#[cfg(doc)]
use crate::{Background, Error, config::ConfigError};
use crate::{
    Result,
    config::{LogstoreConfig, LogstoreName, LogstoreSpec},
    ids::StoreId,
    key_status::KeyStatus,
    keys::{AuditEvent, AuditRecord},
    kms::Cmk,
    logstore::{Logstore, LogstoreShared},
    metrics::StoreMetrics,
    shard::{RepairOptions, RepairReport},
};

/// A store: cheap to clone, usable from any thread.
///
/// Dropping the last handle to the store, or to a Logstore in it, closes the store.
/// [`Store::close`] closes it at once and returns the errors.
///
/// ```
/// use envelog::{AppendOptions, EncryptConf, EncryptType, LogstoreSpec, Payload, Store, crypto::RustCrypto};
///
/// let dir = tempfile::tempdir().unwrap();
/// let (data, keyring) = (dir.path().join("data"), dir.path().join("keyring"));
/// let store = Store::builder(data, keyring, RustCrypto::new()).create()?;
/// let spec = LogstoreSpec::default().encrypt_conf(EncryptConf::service_key(EncryptType::Sm4));
/// let logstore = store.create_logstore(&"shop/orders".parse()?, spec)?;
/// logstore.append(Payload::opaque("paid")?, &AppendOptions::default())?;
/// store.close()?;
/// # Ok::<(), envelog::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Store {
    open: Arc<OpenStore>,
}

impl Store {
    /// The first handle of a store.
    pub(super) fn new(open: OpenStore) -> Self {
        Self { open: Arc::new(open) }
    }

    fn core(&self) -> &Core {
        self.open.core()
    }

    fn handle(&self, logstore: Arc<LogstoreShared>) -> Logstore {
        Logstore::new(logstore, Arc::clone(&self.open) as _)
    }

    /// Its id.
    pub fn id(&self) -> StoreId {
        self.core().env.id
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.core().env.dir
    }

    /// Whether it was opened read-only.
    pub fn is_read_only(&self) -> bool {
        self.core().env.read_only
    }

    /// The settings it was opened with.
    pub fn options(&self) -> &StoreOptions {
        &self.core().env.options
    }

    /// The names of all Logstores, in order.
    ///
    /// # Errors
    /// In a store that is open read-only, the errors of reading the catalogue again.
    pub fn list(&self) -> Result<Vec<LogstoreName>> {
        self.core().registry.list()
    }

    /// Creates a Logstore, with its envelope if `spec` turns encryption on. Waits for the
    /// administrative operation that is under way.
    ///
    /// # Errors
    /// [`Error::LogstoreExists`];
    /// [`Error::Config`] when a rule refuses `spec`, for example when the
    /// customer master key cannot be used;
    /// [`Error::KmsUnreachable`]. No Logstore is created then.
    pub fn create_logstore(&self, name: &LogstoreName, spec: LogstoreSpec) -> Result<Logstore> {
        logstores::create(self.core(), name, spec).map(|logstore| self.handle(logstore))
    }

    /// Replaces the whole configuration of a Logstore by `config`, which the caller got from
    /// [`Logstore::config`] and changed. Returns the new configuration with its new revision. Waits
    /// for the administrative operation that is under way.
    ///
    /// # Errors
    /// [`Error::Config`], with one variant for each rule.
    /// [`Error::KmsUnreachable`] when the first `enable: true` needs
    /// an envelope. Under a customer master key `enable`, `ttl_days` and `retention_bytes` change
    /// only while that key can be used: otherwise [`Error::Revoked`] or
    /// [`Error::KmsUnreachable`]. Nothing has changed then.
    pub fn update_logstore(
        &self,
        name: &LogstoreName,
        config: LogstoreConfig,
    ) -> Result<LogstoreConfig> {
        logstores::update(self.core(), name, config)
    }

    /// Splits a readwrite shard at the hash key `at`, or in the middle of its range. The shard
    /// becomes read-only and keeps its data until retention drops it, and two new shards take its
    /// range: the one with the higher number takes `at` and the keys above it. No number of a shard
    /// is used twice. A crash leaves the shard as it was, or split.
    ///
    /// Appends go on: those for the range wait in the new shards meanwhile. Blocks until everything
    /// that the shard has accepted is synced, and for a KMS call under a customer master key.
    ///
    /// # Errors
    /// [`Error::ShardMissing`]; [`Error::ShardReadOnly`], which names the new shards, if the shard
    /// was split or merged before; [`ConfigError::SplitKey`]; [`Error::TooMany`] beyond
    /// [`SHARDS_MAX`](crate::limits::SHARDS_MAX) shards, those included that were split or merged;
    /// [`Error::Revoked`] or [`Error::KmsUnreachable`] if the key may not be used. Nothing has
    /// changed after an error. Appends to the range that did not wait for their outcome may have
    /// failed with it.
    ///
    /// ```
    /// # use envelog::{Store, crypto::RustCrypto, LogstoreSpec, Payload, AppendOptions, ShardChoice};
    /// # let dir = tempfile::tempdir().unwrap();
    /// # let store = Store::builder(dir.path().join("s"), dir.path().join("k"), RustCrypto::new()).create().unwrap();
    /// let name = "app/events".parse()?;
    /// let logstore = store.create_logstore(&name, LogstoreSpec::default())?;
    /// let split = store.split_shard(&name, 0, Some(1 << 127))?;
    /// assert_eq!((split.low.id, split.high.id), (1, 2));
    /// let high = AppendOptions::default().shard(ShardChoice::HashKey(1 << 127));
    /// assert_eq!(logstore.append(Payload::opaque("hello")?, &high)?.shard, 2);
    /// # Ok::<(), envelog::Error>(())
    /// ```
    pub fn split_shard(
        &self,
        name: &LogstoreName,
        shard: u32,
        at: Option<u128>,
    ) -> Result<ShardSplit> {
        resharding::split(self.core(), name, shard, at)
    }

    /// Merges the readwrite shard `left` with the readwrite shard that has the range behind its own.
    /// Both become read-only and keep their data until retention drops it, and a new shard takes
    /// their ranges. Otherwise as [`Store::split_shard`].
    ///
    /// # Errors
    /// [`ConfigError::NoNeighbour`]; otherwise as [`Store::split_shard`].
    ///
    /// ```
    /// # use envelog::{Store, crypto::RustCrypto, LogstoreSpec};
    /// # let dir = tempfile::tempdir().unwrap();
    /// # let store = Store::builder(dir.path().join("s"), dir.path().join("k"), RustCrypto::new()).create().unwrap();
    /// let name = "app/events".parse()?;
    /// store.create_logstore(&name, LogstoreSpec::default().shard_count(2))?;
    /// let merge = store.merge_shards(&name, 0)?;
    /// assert_eq!((merge.right.id, merge.merged.parents), (1, vec![0, 1]));
    /// # Ok::<(), envelog::Error>(())
    /// ```
    pub fn merge_shards(&self, name: &LogstoreName, left: u32) -> Result<ShardMerge> {
        resharding::merge(self.core(), name, left)
    }

    /// Deletes a Logstore: its envelopes first, so that the rest of its data on the disk cannot be
    /// read through this store, and then its files. Needs no key. Removes the names that envelog
    /// gives and follows no symlink; the report lists the remaining entries.
    ///
    /// # Errors
    /// [`Error::LogstoreMissing`];
    /// [`Error::WrongFileType`] when a symlink, a directory or the like
    /// is in the place of a file of the Logstore, with nothing changed;
    /// [`Error::Io`].
    pub fn delete_logstore(&self, name: &LogstoreName) -> Result<DeleteReport> {
        logstores::delete(self.core(), name)
    }

    /// A handle to a Logstore. Calls no KMS: the first use of the key does. The first handle to a
    /// Logstore waits for the administrative operation that is under way.
    ///
    /// # Errors
    /// [`Error::LogstoreMissing`], and the integrity errors of its
    /// metadata.
    pub fn logstore(&self, name: &LogstoreName) -> Result<Logstore> {
        self.core().registry.logstore(name).map(|logstore| self.handle(logstore))
    }

    /// The counters since the store was opened: KMS calls and their outcomes, leases, refusals,
    /// bytes by suite, syncs, failures. Cheap, and calls no KMS.
    pub fn metrics(&self) -> StoreMetrics {
        let Core { keys, registry, .. } = self.core();
        let mut metrics = keys.metrics();
        metrics.logstores = registry.open_logstores().iter().map(|open| open.metrics()).collect();
        metrics.pending_bytes = registry.pending_bytes();
        metrics.retention_suspended = retention::status(self.core()).suspended;
        metrics.reserve_short = !self.is_read_only() && self.core().reserve_status().is_short();
        metrics
    }

    /// Does the background work that is due: partial batches, marks, rolling by age, retention,
    /// leases. For a store that was opened with [`Background::Manual`]; otherwise threads do it.
    pub fn tick(&self) {
        let Core { keys, registry, .. } = self.core();
        keys.tend_leases();
        registry.scheduler().run_due();
        if let Some(anchor) = registry.anchor() {
            anchor.tend();
        }
    }

    /// The operations on keys, and the key audit log.
    pub fn keys(&self) -> Keys<'_> {
        Keys { open: &self.open }
    }

    /// Verification, checkpoints, retention, repair, and the state of the anchor.
    pub fn admin(&self) -> Admin<'_> {
        Admin { open: &self.open }
    }

    /// Writes all groups, seals the open segments, records the head of each shard in the catalogue,
    /// and releases the lock. Other handles refuse calls from now on.
    ///
    /// # Errors
    /// The error that prevented a clean close. Synced data is safe, and the next opening recovers.
    /// [`Error::GroupsLost`] if groups are lost with their key and [`Logstore::sync`] has not
    /// reported it.
    pub fn close(self) -> Result<()> {
        self.open.close()
    }
}

/// The operations on the keys of a store, and the key audit log; from [`Store::keys`].
///
/// Each operation that changes keys waits for the administrative operation that is under way, and
/// blocks other administrative operations while it calls the KMS.
#[derive(Clone, Copy, Debug)]
pub struct Keys<'a> {
    open: &'a OpenStore,
}

impl Keys<'_> {
    /// Gives a Logstore a new data-key version for new data. Existing data stays under its version.
    /// Returns the new version.
    ///
    /// # Errors
    /// [`ConfigError::NotEncrypted`]; the errors of the KMS.
    pub fn rotate_data_key(&self, name: &LogstoreName) -> Result<u32> {
        key_change::rotate(self.open.core(), name)
    }

    /// Gives a new data-key version to each Logstore whose [`crate::RotateDataKey`] asks for one
    /// now. Background work does this every [`crate::StoreOptions::retention_every`]. If the KMS
    /// prevents a rotation, the engine tries it again after ten minutes at the earliest. Returns
    /// the Logstores that have a new version.
    ///
    /// # Errors
    /// The first error of a Logstore, except an error of a KMS. The other Logstores are done.
    pub fn rotate_due_data_keys(&self) -> Result<Vec<LogstoreName>> {
        auto_rotation::rotate_due(self.open.core())
    }

    /// Wraps every data-key version of a Logstore again: under the newest service key, or under the
    /// current version of its master key. Rewrites no data. Returns the number of envelopes.
    ///
    /// # Errors
    /// [`ConfigError::NotEncrypted`]; the errors of the KMS. Nothing has changed then.
    pub fn rewrap(&self, name: &LogstoreName) -> Result<u32> {
        let core = self.open.core();
        key_change::rewrap(core, &core.registry.administer_logstore(name)?)
    }

    /// Wraps the data keys of many Logstores again, under the newest service key and the current
    /// versions of their master keys, and with them the probes that renew the leases. Rewrites no
    /// data; reads and writes continue. A failure for one Logstore does not stop the others.
    ///
    /// The run skips a Logstore whose envelopes are all under the newest version already, if the
    /// KMS reports the versions. The next run of the same scope within a day continues a run that
    /// was killed, or in which a Logstore failed: it skips the Logstores that are done according to
    /// the audit log.
    ///
    /// # Errors
    /// [`Error::ReadOnly`], [`Error::Closed`], and the error of recording the begin or the end. The
    /// report has the errors of single Logstores.
    pub fn rewrap_all(
        &self,
        options: &RewrapOptions,
        progress: &mut dyn FnMut(&RewrapProgress),
    ) -> Result<RewrapReport> {
        rewrap_all::rewrap_all(self.open.core(), options, progress)
    }

    /// Replaces the customer master key of a Logstore by another. Unwraps every data key under the
    /// old master key and wraps it under the new one. New data gets a new data key unless `how`
    /// says otherwise. Returns the number of envelopes.
    ///
    /// This cannot undo a leak: an attacker who could use the old master key and has a copy of an
    /// old envelope can still read the old data.
    ///
    /// # Errors
    /// [`ConfigError::NotByok`]; [`Error::Revoked`] when the old master key cannot be used;
    /// [`ConfigError::NoKmsForRegion`] and [`ConfigError::CmkRefused`] for the new one. Nothing has
    /// changed then.
    pub fn replace_cmk(&self, name: &LogstoreName, new: Cmk, how: ReplaceCmk) -> Result<u32> {
        key_change::replace_cmk(self.open.core(), name, new, how)
    }

    /// Destroys data-key versions. This store can no longer read the data under them. The current
    /// version, and a version with a segment that is being written, cannot be destroyed: rotate
    /// first. Earlier copies of the metadata (backups, snapshots, freed blocks of the disk) are not
    /// affected; under a customer master key, deleting that key affects them too.
    ///
    /// # Errors
    /// [`ConfigError::CannotShred`], [`ConfigError::NotEncrypted`]; the errors of the KMS, because
    /// the data key makes the second tag of the metadata. [`Error::Io`] also when the envelopes are
    /// out of force and the file that has them could not be removed: call this again.
    pub fn shred_data_keys(&self, name: &LogstoreName, versions: &[u32]) -> Result<()> {
        key_change::shred(self.open.core(), name, versions)
    }

    /// Makes a new version of the service key, brings all documents of the store under it, and
    /// retires the older versions. Returns the new version. The keyring must be backed up again.
    ///
    /// An attacker with an older version can authenticate nothing from then on: the store refuses
    /// documents, audit records and checkpoints under it with [`Error::RetiredKeyVersion`]. The
    /// older versions stay in the keyring, because segments of Logstores without an envelope, and
    /// envelopes in copies of the store, need them. No data is rewritten. Each Logstore under the
    /// service key gets a new data key for new data, as with [`Keys::rotate_data_key`], because an
    /// older version with a copy of the metadata gives the older data keys.
    ///
    /// The new version is durable in the keyring before any document is under it, and the older
    /// versions are retired last. The next call continues a rotation that was interrupted or could
    /// not be finished, with the version that the rotation has made. The store stays open and
    /// usable, and accepts older versions until the end of the rotation.
    ///
    /// Calls no KMS, unless the keyring is under a master key, or a Logstore under a master key has
    /// a segment that was being written without encryption when a process was killed.
    ///
    /// A document costs one write to a temporary file, its rename, and two syncs: of the file and
    /// of its directory. For n Logstores, m of them under the service key, and p probes, there are
    /// n + p + 3 documents (the metadata, the probes, `STORE`, and twice the keyring),
    /// n / 64 + m + 2 writes of the catalogue, and 2m + 2 records of the audit log with one sync
    /// each. A shard costs one sync of its directory, and three syncs of files for a segment that
    /// has to be sealed. Appends to a Logstore under the service key wait while its data key is
    /// replaced.
    ///
    /// # Errors
    /// [`Error::Io`], and the error of a Logstore, of a probe or of the `STORE` file that could not
    /// be brought under the new version; all others are. The store then still accepts the older
    /// versions. A Logstore that cannot be read keeps the rotation unfinished until it is repaired
    /// or deleted.
    pub fn rotate_service_key(&self) -> Result<u32> {
        self.rotate_service_key_with(&mut |_| {}).map(|done| done.version)
    }

    /// As [`Keys::rotate_service_key`]. Reports its progress, and returns a full report.
    ///
    /// # Errors
    /// As [`Keys::rotate_service_key`].
    pub fn rotate_service_key_with(
        &self,
        progress: &mut dyn FnMut(&RewrapProgress),
    ) -> Result<ServiceRotation> {
        service_rotation::rotate_service_key(self.open.core(), progress)
    }

    /// Whether a rotation of the service key is unfinished: the store accepts older versions until
    /// [`Keys::rotate_service_key`] finishes the rotation.
    pub fn is_service_rotation_unfinished(&self) -> bool {
        self.open.core().keys.keyring().is_rotating()
    }

    /// Puts the service keyring under another master key, or with `None` under none. Its root keys
    /// stay the same, so no other document is written. To replace the root keys, also call
    /// [`Keys::rotate_service_key`].
    ///
    /// This cannot undo a leak: an attacker with a copy of the old file who can use its old master
    /// key has the root keys.
    ///
    /// # Errors
    /// [`ConfigError::NoKmsForRegion`]; [`Error::ServiceKey`] when the new master key cannot be
    /// used. Nothing has changed then.
    pub fn rewrap_keyring(&self, cmk: Option<Cmk>) -> Result<()> {
        key_change::rewrap_keyring(self.open.core(), cmk)
    }

    /// The path of the service keyring. Back it up, apart from the data.
    pub fn keyring_path(&self) -> PathBuf {
        self.open.core().keys.keyring().path().to_owned()
    }

    /// The master key of the service keyring; `None` for a keyring that has its root keys in its
    /// file.
    pub fn service_cmk(&self) -> Option<Cmk> {
        self.open.core().keys.keyring().cmk().cloned()
    }

    /// The state of the service key: whether the KMS lets the master key be used that the keyring is
    /// under, and how long the store may still use it should that KMS stop answering now. A keyring
    /// under no master key is always active. Calls no KMS.
    ///
    /// While the KMS refuses, or after [`crate::StoreOptions::service_outage_grace`], the root keys
    /// and everything derived from them are wiped from memory, and every operation that needs a key
    /// is refused with [`Error::ServiceKey`]. Once the KMS lets the master key be used again, the
    /// store reads the keyring again and works.
    ///
    /// ```
    /// use envelog::{KeyState, Store, crypto::RustCrypto};
    ///
    /// let dir = tempfile::tempdir().unwrap();
    /// let (data, keyring) = (dir.path().join("data"), dir.path().join("keyring"));
    /// let store = Store::builder(data, keyring, RustCrypto::new()).create()?;
    /// assert_eq!(store.keys().service_key_status().state, KeyState::Active);
    /// # Ok::<(), envelog::Error>(())
    /// ```
    pub fn service_key_status(&self) -> KeyStatus {
        self.open.core().keys.service_key_status()
    }

    /// The uses of every key, and whether it may be destroyed. Needs no key and calls no KMS.
    ///
    /// Covers this store as it is now and the readers of this process. It cannot see other
    /// processes and copies of the store. An object that cannot be checked (a damaged segment, a
    /// directory that the catalogue does not list) is reported as a use of every key that it may
    /// need.
    ///
    /// # Errors
    /// The errors of listing the directories of the store.
    pub fn usage(&self) -> Result<KeyUsage> {
        key_usage::key_usage(self.open.core())
    }

    /// The number of KMS calls that renewed leases since the store was opened.
    pub fn renewal_calls(&self) -> u64 {
        self.open.core().keys.renewal_calls()
    }

    /// The records of the key audit log, with their chain verified from the first to the last.
    ///
    /// # Errors
    /// [`Error::Tampered`], [`Error::Corrupt`], [`Error::Truncated`] when the chain is broken.
    pub fn audit_records(&self) -> Result<Vec<AuditRecord>> {
        inspect::audit_records(self.open.core())
    }

    /// The records about what operators have accepted, as far as no Logstore has a record of it
    /// ([`LogstoreStatus::losses`](crate::LogstoreStatus::losses)): the loss of the key audit log, other
    /// metadata that a repair has put in force, and Logstores that were given up. Reads the whole key
    /// audit log.
    ///
    /// # Errors
    /// As [`Keys::audit_records`].
    pub fn accepted_losses(&self) -> Result<Vec<AuditRecord>> {
        inspect::accepted_losses(self.open.core())
    }

    /// Verifies the key audit log: the tags, the chain, that it reaches the end that the catalogue
    /// has recorded, and, with an earlier mark, that the same records are still there. Needs no
    /// data key and calls no KMS.
    ///
    /// # Errors
    /// The errors of reading the log. The result has the fault that was found.
    pub fn verify_audit(&self, against: Option<&AuditMark>) -> Result<AuditVerification> {
        inspect::verify_audit(self.open.core(), against)
    }

    /// The key audit log as lines of JSON, verified while it is read. With these lines another
    /// party can check without any key that no record was removed, moved or changed since: by the
    /// hashes, and by comparing the head with that of an earlier export.
    ///
    /// # Errors
    /// As [`Keys::audit_records`]: a broken log is not exported.
    pub fn export_audit(&self) -> Result<AuditExport> {
        inspect::export_audit(self.open.core())
    }
}

/// Verification, checkpoints, retention, repair, and the state of the anchor; from
/// [`Store::admin`].
#[derive(Clone, Copy, Debug)]
pub struct Admin<'a> {
    open: &'a OpenStore,
}

impl Admin<'_> {
    /// Verifies the store, or one Logstore, also against a checkpoint if there is one. Continues
    /// after a fault, to find all faults.
    ///
    /// # Errors
    /// An error that prevents the verification. The report has the faults.
    pub fn verify(
        &self,
        options: &VerifyOptions,
        progress: &mut dyn FnMut(VerifyProgress),
    ) -> Result<VerifyReport> {
        inspect::verify(self.open.core(), options, progress)
    }

    /// Makes all data durable and marked, records the head of each shard in the catalogue, and
    /// returns the heads, to be kept outside the store. Takes a Logstore whose key cannot be used
    /// as it is on disk, and one whose files are damaged as the catalogue has it
    /// ([`Checkpoint::failed`]).
    ///
    /// # Errors
    /// The error of syncing a shard, or of writing the catalogue.
    pub fn checkpoint(&self) -> Result<Checkpoint> {
        inspect::checkpoint(self.open.core())
    }

    /// Drops the segments that are over the age or the size limit of their Logstore. Background
    /// work does this every [`crate::StoreOptions::retention_every`], and a close does it if that is
    /// due. Needs no key.
    ///
    /// For the size it drops no more than necessary, and never the newest segment that has data.
    ///
    /// While the wall clock is more than 24 h ahead of the newest time that the store trusts, it
    /// drops nothing by age: see [`crate::StoreOptions::clock_settle`].
    ///
    /// When it has dropped the last segment of a data-key version that is not the current one, it
    /// also destroys that version. The data key also tags the metadata of a Logstore under a
    /// customer master key, so there this waits until the master key can be used.
    ///
    /// It calls the KMS for that, and once after a Logstore under a customer master key was opened,
    /// before it drops the first segment: the data key proves the limits of the Logstore. If the
    /// master key cannot be used then, it drops the segments without that proof.
    ///
    /// # Errors
    /// [`Error::Io`], and the error of checking a segment. The other Logstores are done.
    pub fn apply_retention(&self) -> Result<RetentionReport> {
        self.retain(&RetainOptions::default())
    }

    /// As [`Admin::apply_retention`], with options.
    ///
    /// # Errors
    /// As [`Admin::apply_retention`].
    pub fn retain(&self, options: &RetainOptions) -> Result<RetentionReport> {
        retention::apply(self.open.core(), options)
    }

    /// When retention was applied last, and whether retention by age is suspended. Needs no key.
    pub fn retention_status(&self) -> RetentionStatus {
        retention::status(self.open.core())
    }

    /// The room that the store keeps for a full disk: with it, deletion, retention, shredding,
    /// repair and the opening of the store work without a free page or inode. A store that is open
    /// for reading looks at the files.
    pub fn reserve_status(&self) -> ReserveStatus {
        self.open.core().reserve_status()
    }

    /// Accepts the loss of the segments of a shard that are missing or damaged, and gives up damaged
    /// data at its end, so that the shard can be read past the loss and accepts appends again. Keeps
    /// all readable data, and does nothing if there is no damage. Reads all segments of the shard.
    ///
    /// An accepted loss is permanent. The key audit log records it
    /// ([`AuditEvent::LossAccepted`](crate::audit::AuditEvent::LossAccepted)), the status of the
    /// Logstore and a verification keep showing it, and a checkpoint from before it still reports
    /// the lost data.
    ///
    /// # Errors
    /// A key that may not be used prevents the repair. [`Error::Tampered`], [`Error::RolledBack`]
    /// and the like for a segment that is forged or exchanged, unless the options accept that.
    pub fn repair(
        &self,
        name: &LogstoreName,
        shard: u32,
        options: &RepairOptions,
    ) -> Result<RepairReport> {
        repair::repair_shard(self.open.core(), name, shard, options)
    }

    /// Repairs the whole store: every shard as [`Admin::repair`] does, the key audit log, and the
    /// probes. Reads all segments of the store.
    ///
    /// If the key audit log is damaged or lost, this renames its files to `damaged-…` and begins a
    /// new log with a record of the loss. It removes damaged probes; the envelopes of the Logstores
    /// take their place.
    ///
    /// A Logstore that cannot be repaired does not stop the others: see
    /// [`StoreRepairReport::failed`].
    ///
    /// # Errors
    /// [`Error::Tampered`], [`Error::RolledBack`] and the like if the key audit log or a probe is
    /// forged or exchanged, unless the options accept that; [`Error::Io`].
    pub fn repair_all(&self, options: &RepairOptions) -> Result<StoreRepairReport> {
        repair::repair_all(self.open.core(), options)
    }

    /// Deletes a Logstore whose metadata is lost, and with it the only copies of its wrapped data
    /// keys, so that the rest of the store verifies again. The key audit log records the loss
    /// ([`AuditEvent::GivenUp`](crate::audit::AuditEvent::GivenUp)) and the deletion. A verification
    /// against a checkpoint that has the Logstore keeps failing.
    /// There is no way back. If a backup has the metadata, restore that file instead.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the metadata can be read. Otherwise as
    /// [`Store::delete_logstore`](crate::Store::delete_logstore).
    pub fn give_up(&self, name: &LogstoreName) -> Result<DeleteReport> {
        repair::give_up(self.open.core(), name)
    }

    /// Makes a backup of the store in a directory, or brings the backup there up to date: a
    /// consistent copy, which is itself a store. Works beside the process that writes the store, if
    /// this one has it open read-only; takes no lock of the store and writes nothing into it. The
    /// keyring is not part of a backup.
    ///
    /// Every record that was durable when the call began is in the backup. Only new segments are
    /// copied, and each is verified once it is. A key that cannot be used is no error: the segments
    /// under it are verified without it. A fault of the store is no error either: the report has it.
    ///
    /// A Logstore that is deleted, and segments that retention drops, are no longer in the catalogue
    /// of the next backup, and their files stay in the directory until [`BackupOptions::prune`]. The
    /// same holds for metadata with a data key that was destroyed.
    ///
    /// If the run is interrupted, the former backup stays in force, and the next run continues. The
    /// directory has a file `checkpoint`, for [`Admin::verify`], and a file `BACKUP`, which says when
    /// the last run was finished.
    ///
    /// # Errors
    /// [`Error::BackupRefused`] for a directory with other contents, or one that was opened for
    /// writing; [`Error::RolledBack`] if the store is older than the backup in the directory, or has
    /// other records in its place: the backup then stays as it is, and another directory is needed;
    /// [`Error::Locked`] while another process makes a backup there; [`Error::ServiceKey`];
    /// [`Error::Io`].
    pub fn backup(
        &self,
        dir: impl AsRef<Path>,
        options: &BackupOptions,
        progress: &mut dyn FnMut(CopyProgress),
    ) -> Result<BackupReport> {
        backup::backup(self.open.core(), dir.as_ref(), options, progress)
    }

    /// Records in the key audit log that a caller has asked for an administrative command, with
    /// [`AuditEvent::CommandReceived`](crate::audit::AuditEvent::CommandReceived). A service that
    /// takes such commands from others calls this before it does one: the engine's own records
    /// know only the process. `detail` names the caller and the command; of more than 8 KiB, the
    /// rest is left out. Blocks for file I/O: the record is durable when this returns.
    ///
    /// # Errors
    /// [`Error::ReadOnly`]; [`Error::ServiceKey`]; [`Error::Io`], and the integrity errors of the
    /// end of the log.
    pub fn record_command(&self, detail: &str) -> Result<()> {
        let Core { keys, registry, .. } = self.open.core();
        registry.check_writable()?;
        keys.audit().record(AuditEvent::CommandReceived, None, detail)
    }

    /// The state of the anchor.
    pub fn anchor_status(&self) -> AnchorStatus {
        anchoring::status(self.open.core(), self.open.anchor_lacks())
    }
}
