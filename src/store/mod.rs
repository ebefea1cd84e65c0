//! A store: a directory of Logstores under one service keyring, opened by one writer and any number of readers.

mod admin;
mod anchor;
mod audit;
mod builder;
mod catalogue;
mod checkpoint;
mod creation;
mod keyops;
mod lock;
mod policy;
mod recover;
mod removal;
mod retention;
mod rewrap;
mod rotation;
mod scheduler;
mod usage;
mod verify;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Weak},
};

use serde::{Deserialize, Serialize};
use tracing::{debug, info, warn};

use crate::{
    Error, Result,
    config::{ConfigError, LogstoreConfig, LogstoreName, check_cmk},
    crypto::{CryptoProvider, HashAlg, SecretKey, hash},
    document::{self, DOCUMENT_BYTES_MAX, Document, DocumentKind},
    epoch::Fence,
    error::Location,
    ids::{LogstoreId, StoreId, hex_decode, hex_encode},
    io::{self, Clock, Disk, Existing, Random},
    key_status::Refusal,
    keys::{
        AuditEvent,
        audit::AuditLog,
        circuit_breaker::CircuitBreaker,
        envelope::{DataKeyVersion, EnvelopeIdentity, KeysSection, fingerprint},
        gate::{FollowWriter, Gate, GateKeys, KeyContext},
        keyring::Keyring,
        lease::{Lease, LeaseListener, LeaseParts, LeaseTerms, Probe},
        renewal_pool::RenewalPool,
    },
    kms::{BoundedKms, Cmk, EncryptionContext, KmsError, KmsRouter},
    logstore::{KeyObserver, Logstore, LogstoreShared, Meta, MetaName, remove_older_meta, write_plan},
    metrics::StoreMetrics,
    segment::Features,
    shard::{AdmitAppend, Budget, PayloadHasher, ReaderPermits, ReloadRecord, ShardContext, ShardOptions, ShardRecord},
    sync::{LockRank, Mutex, MutexGuard, RwLock, lock, read},
};

pub use anchor::{Anchor, AnchorPlace, AnchorStatus, DirAnchor};
use anchor::{AnchorLimit, Feeder};
pub use audit::{AuditExport, AuditMark, AuditVerification};
pub use builder::{Background, StoreBuilder, StoreOptions};
use catalogue::{Catalogue, Change, Entry, Journal, load_newest};
pub use catalogue::{LOGSTORES_MAX, STORE_SHARDS_MAX};
pub use checkpoint::Checkpoint;
pub use keyops::ReplaceCmk;
use lock::StoreLock;
pub use recover::{RecoverReport, Recoverable};
pub use removal::DeleteReport;
use retention::ClockWatch;
pub use retention::RetentionReport;
pub use rewrap::{RewrapOptions, RewrapProgress, RewrapReport};
pub use rotation::ServiceRotation;
use scheduler::Scheduler;
pub use usage::{CmkVersionUsage, DataKeyUsage, KeyNeed, KeyUsage, MasterKeyUsage, ServiceKeyUsage};
pub use verify::{Fault, VerifyOptions, VerifyProgress, VerifyReport};

/// A store: cheap to clone, usable from any thread.
///
/// The last handle that goes (of the store or of a Logstore in it) closes the store; [`Store::close`] does it at once, and says
/// whether it succeeded.
///
/// ```
/// use envelog::{AppendOptions, EncryptConf, EncryptType, LogstoreSpec, Payload, ReadOptions, Store, crypto::RustCrypto};
///
/// let dir = tempfile::tempdir().unwrap();
/// let store = Store::builder(dir.path().join("data"), dir.path().join("keyring"), RustCrypto::new()).create()?;
/// let spec = LogstoreSpec::default().encrypted(EncryptConf::service_key(EncryptType::Sm4));
/// let logstore = store.create_logstore(&"shop/orders".parse()?, spec)?;
/// logstore.append(Payload::opaque("paid")?, &AppendOptions::default())?;
/// store.close()?;
/// # Ok::<(), envelog::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Store {
    shared: Arc<StoreShared>,
    /// How many records of the catalogue the anchor lacked when the store was opened for reading.
    anchor_lacks: Option<u64>,
    open: Arc<Open>,
}

/// Closes the store when the last handle goes.
#[derive(Debug)]
struct Open {
    shared: Arc<StoreShared>,
}

impl Drop for Open {
    fn drop(&mut self) {
        // There is nobody to tell: `Store::close` is for those who want to know.
        let _ = self.shared.close();
    }
}

/// What changes when the store is administrated; one administrative operation at a time.
struct AdminState {
    /// Set when a change of the catalogue failed, and the catalogue could not be written again without it: the change may count after a
    /// crash. Nothing more is changed until the catalogue can be written.
    latched: Option<Error>,
    /// Whether the store was closed. Whoever waited for this meanwhile finds it out here.
    closed: bool,
}

/// An open store.
pub(crate) struct StoreShared {
    this: Weak<StoreShared>,
    id: StoreId,
    dir: PathBuf,
    read_only: bool,
    options: StoreOptions,
    disk: Arc<dyn Disk>,
    clock: Arc<dyn Clock>,
    random: Arc<dyn Random>,
    provider: Arc<dyn CryptoProvider>,
    kms: KmsRouter,
    keyring: Arc<RwLock<Keyring>>,
    keys: Arc<KeyContext>,
    audit: AuditLog,
    scheduler: Arc<Scheduler>,
    budget: Arc<Budget>,
    hasher: Arc<PayloadHasher>,
    permits: Arc<ReaderPermits>,
    admin: Mutex<AdminState>,
    catalogue: Arc<Journal>,
    /// Tells a writer that another one has taken over; `None` in a store that is open for reading.
    fence: Option<Arc<Fence>>,
    anchor: Option<Arc<Feeder>>,
    /// In order, as whatever is walked through is, so that a simulation takes the same way twice.
    logstores: Mutex<BTreeMap<LogstoreName, Arc<LogstoreShared>>>,
    leases: Mutex<BTreeMap<Cmk, Arc<Lease>>>,
    /// By region, as that decides which KMS is asked.
    circuits: Mutex<BTreeMap<String, Arc<CircuitBreaker>>>,
    /// Who renews them; nobody in a store without threads.
    lease_pool: Option<Arc<RenewalPool>>,
    retention: Mutex<ClockWatch>,
    /// Held while the store is open for writing.
    held: Mutex<Option<StoreLock>>,
}

impl std::fmt::Debug for StoreShared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("id", &self.id).field("dir", &self.dir).finish_non_exhaustive()
    }
}

impl Store {
    /// Begins to make or open the store in `dir`, with the service keyring in the file `keyring` and this provider of AES and SM4.
    pub fn builder(
        dir: impl Into<PathBuf>,
        keyring: impl Into<PathBuf>,
        provider: impl CryptoProvider + 'static,
    ) -> StoreBuilder {
        StoreBuilder::new(dir.into(), keyring.into(), Arc::new(provider))
    }

    /// Its id.
    pub fn id(&self) -> StoreId {
        self.shared.id
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.shared.dir
    }

    /// Where its service keyring is: it must be backed up, apart from the data.
    pub fn keyring_path(&self) -> PathBuf {
        read(&self.shared.keyring).path().to_owned()
    }

    /// The master key that its service keyring is under; `None` for one that holds its roots in its file.
    pub fn service_cmk(&self) -> Option<Cmk> {
        read(&self.shared.keyring).cmk().cloned()
    }

    /// Whether it was opened read-only.
    pub fn is_read_only(&self) -> bool {
        self.shared.read_only
    }

    /// The settings it was opened with.
    pub fn options(&self) -> &StoreOptions {
        &self.shared.options
    }

    /// The names of all Logstores, in order.
    ///
    /// # Errors
    /// For a store that is open read-only, what keeps the catalogue from being read again.
    pub fn list(&self) -> Result<Vec<LogstoreName>> {
        let _admin = lock(&self.shared.admin);
        self.shared.reload_catalogue()?;
        Ok(self.shared.names())
    }

    /// A handle to a Logstore. Calls no KMS: the key is asked for at first use.
    ///
    /// # Errors
    /// [`Error::LogstoreMissing`], and the integrity errors of its metadata.
    pub fn logstore(&self, name: &LogstoreName) -> Result<Logstore> {
        let shared = self.shared.logstore(name)?;
        Ok(self.handle(shared))
    }

    fn handle(&self, shared: Arc<LogstoreShared>) -> Logstore {
        Logstore::new(shared, Arc::clone(&self.open) as _)
    }

    /// The whole configuration of a Logstore, with its revision.
    ///
    /// # Errors
    /// As [`Store::logstore`].
    pub fn config(&self, name: &LogstoreName) -> Result<LogstoreConfig> {
        Ok(lock(&self.shared.logstore(name)?.meta).config.clone())
    }

    /// Does what is due: partial batches, marks, rolling by age, retention, leases. For a store that is opened with
    /// [`Background::Manual`]; otherwise threads do it.
    pub fn tick(&self) {
        let leases: Vec<_> = lock(&self.shared.leases).values().cloned().collect();
        for lease in leases {
            lease.tend();
        }
        self.shared.scheduler.run_due();
        if let Some(anchor) = &self.shared.anchor {
            anchor.tend();
        }
    }

    /// How many calls were made to KMSs to renew leases since the store was opened.
    pub fn renewal_calls(&self) -> u64 {
        lock(&self.shared.leases).values().map(|lease| lease.calls()).sum()
    }

    /// What has been counted since the store was opened: calls to KMSs and what they came to, leases, refusals, bytes by suite,
    /// syncs, failures. Cheap, and calls nobody.
    pub fn metrics(&self) -> StoreMetrics {
        let leases: Vec<_> = lock(&self.shared.leases).values().cloned().collect();
        self.shared.keys.counters.snapshot(leases.iter().map(|lease| lease.metrics()).collect())
    }

    /// How far the anchor is, if the store was opened with one.
    pub fn anchor_status(&self) -> AnchorStatus {
        let lacks = AnchorStatus {
            anchored: read(&self.shared.keyring).is_anchored(),
            configured: self.anchor_lacks.is_some(),
            records_behind: self.anchor_lacks,
            ..AnchorStatus::default()
        };
        self.shared.anchor.as_ref().map_or(lacks, |anchor| anchor.status())
    }

    /// Writes everything, seals what is being written, notes in the catalogue how far each shard is, and lets go of the lock. Other
    /// handles refuse from now on.
    ///
    /// # Errors
    /// What kept it from closing cleanly. What was synced is safe all the same, and the next opening recovers.
    pub fn close(self) -> Result<()> {
        self.shared.close()
    }
}

impl StoreShared {
    fn logstore_dir(&self, id: LogstoreId) -> PathBuf {
        self.dir.join("logstores").join(id.to_string())
    }

    fn check_writable(&self) -> Result<()> {
        self.keys.check_process()?;
        if self.read_only {
            return Err(Error::ReadOnly);
        }
        if lock(&self.held).is_none() {
            return Err(Error::Closed("the store"));
        }
        Ok(())
    }

    /// The right to change what there is: one operation at a time, and none in a store that was closed.
    fn administer(&self) -> Result<MutexGuard<'_, AdminState>> {
        self.check_writable()?;
        let mut admin = lock(&self.admin);
        if admin.closed {
            return Err(Error::Closed("the store"));
        }
        // What needs the catalogue tries again, and reports the error.
        let _ = self.unlatch(&mut admin);
        Ok(admin)
    }

    /// Writes the catalogue again, in a new file, after a change of it has failed. The change does not count from then on.
    ///
    /// # Errors
    /// That of the change, where the catalogue cannot be written yet.
    fn unlatch(&self, admin: &mut AdminState) -> Result<()> {
        let Some(error) = &admin.latched else { return Ok(()) };
        self.catalogue.write_anew().map_err(|_| error.clone())?;
        admin.latched = None;
        for logstore in self.open_logstores() {
            logstore.gate.resume();
        }
        Ok(())
    }

    fn load_catalogue(&self) -> Result<Catalogue> {
        self.keys.follow_keyring()?;
        self.keys
            .with_keyring(|keyring| load_newest(&*self.disk, &self.dir, self.id, keyring))
            .map(|loaded| loaded.catalogue)
    }

    /// A reader has the catalogue as the writer last left it.
    fn reload_catalogue(&self) -> Result<()> {
        if self.read_only {
            self.catalogue.reload(self.load_catalogue()?);
        }
        Ok(())
    }

    /// The names of all Logstores that the catalogue knows.
    fn names(&self) -> Vec<LogstoreName> {
        self.catalogue.now().logstores.keys().cloned().collect()
    }

    /// What the catalogue knows of a Logstore.
    ///
    /// # Errors
    /// [`Error::LogstoreMissing`].
    fn entry(&self, name: &LogstoreName) -> Result<Entry> {
        let entry = self.catalogue.now().logstores.get(name).cloned();
        entry.ok_or_else(|| Error::LogstoreMissing(name.clone()))
    }

    fn logstore(&self, name: &LogstoreName) -> Result<Arc<LogstoreShared>> {
        self.keys.check_process()?;
        if !self.read_only && lock(&self.held).is_none() {
            return Err(Error::Closed("the store"));
        }
        // A Logstore that is open is found without waiting for an administrative operation on another.
        if !self.read_only
            && let Some(open) = lock(&self.logstores).get(name)
        {
            return Ok(Arc::clone(open));
        }
        let mut admin = lock(&self.admin);
        self.logstore_locked(&mut admin, name)
    }

    fn logstore_locked(&self, admin: &mut AdminState, name: &LogstoreName) -> Result<Arc<LogstoreShared>> {
        if admin.closed {
            return Err(Error::Closed("the store"));
        }
        if self.read_only {
            return self.read_only_logstore(name);
        }
        if let Some(open) = lock(&self.logstores).get(name) {
            return Ok(Arc::clone(open));
        }
        let entry = self.entry(name)?;
        let meta = self.load_meta(name, &entry)?;
        let dir = self.logstore_dir(entry.id);
        meta.features.check_writing().map_err(|error| error.in_file(&entry.meta().path(&dir), 0))?;
        if let Err(error) = remove_older_meta(&*self.disk, &dir, &entry.meta()) {
            warn!(logstore = %name, %error, "older metadata of a Logstore cannot be removed");
        }
        let shared = self.open_logstore(meta, &entry)?;
        lock(&self.logstores).insert(name.clone(), Arc::clone(&shared));
        Ok(shared)
    }

    /// A reader looks at the metadata anew each time it is asked for a Logstore, and keeps what it has while nothing changed.
    fn read_only_logstore(&self, name: &LogstoreName) -> Result<Arc<LogstoreShared>> {
        let (entry, meta) = self.read_meta(name)?;
        let open = lock(&self.logstores).get(name).cloned();
        if let Some(open) = &open {
            if open.id == entry.id {
                self.take_in(open, meta)?;
                for (shard, record) in open.shards.iter().zip(&entry.shards) {
                    shard.set_record(record.clone());
                }
                return Ok(Arc::clone(open));
            }
            // It was deleted, and another one made of its name.
            open.gate.close("the Logstore");
        }
        let shared = self.open_logstore(meta, &entry)?;
        lock(&self.logstores).insert(name.clone(), Arc::clone(&shared));
        Ok(shared)
    }

    /// Reads the catalogue again, and the metadata that it names.
    fn read_meta(&self, name: &LogstoreName) -> Result<(Entry, Meta)> {
        // The writer may replace the metadata meanwhile, and remove the older file.
        let mut attempts = 0;
        loop {
            self.reload_catalogue()?;
            let entry = self.entry(name)?;
            match self.load_meta(name, &entry) {
                Err(Error::RolledBack { .. } | Error::Truncated { .. }) if attempts < 3 => attempts += 1,
                meta => return meta.map(|meta| (entry, meta)),
            }
        }
    }

    fn load_meta(&self, name: &LogstoreName, entry: &Entry) -> Result<Meta> {
        let dir = self.logstore_dir(entry.id);
        let load = |keyring: &Keyring| Meta::load(&*self.disk, &dir, self.id, entry.id, keyring, &entry.meta());
        let meta = self.keys.with_keyring(load)?;
        if meta.config.name != *name || meta.keys.as_ref().is_some_and(|keys| keys.name != *name) {
            return Err(Error::Tampered { at: Location::new(&dir, 0), what: "the metadata under another name" });
        }
        let (shards, recorded) = (meta.config.shards.len(), entry.shards.len());
        if shards != recorded {
            let what = format!("the catalogue has {recorded} shards of Logstore {name}, its metadata {shards}");
            return Err(Error::corrupt(Location::new(self.catalogue_path(), 80), what));
        }
        Ok(meta)
    }

    fn open_logstore(&self, meta: Meta, entry: &Entry) -> Result<Arc<LogstoreShared>> {
        let keys = self.loaded_keys(&meta, entry.id)?;
        let lease = keys.lease.clone();
        let gate = Arc::new(Gate::new(Arc::clone(&self.keys), meta.config.name.clone(), entry.id, keys));
        let plan = Arc::new(RwLock::new(LockRank::WritePlan, write_plan(&meta, read(&self.keyring).newest())));
        let context = Arc::new(ShardContext {
            disk: Arc::clone(&self.disk),
            clock: Arc::clone(&self.clock),
            random: Arc::clone(&self.random),
            wake: Arc::clone(&self.scheduler) as _,
            budget: Arc::clone(&self.budget),
            hasher: Arc::clone(&self.hasher),
            gate,
            options: self.shard_options(),
            read_only: self.read_only,
            heads: Arc::clone(&self.catalogue) as _,
            fence: self.fence.clone(),
            limit: self.append_limit(),
            plan: Arc::clone(&plan),
            permits: Arc::clone(&self.permits),
            reload: self.read_only.then(|| self.this.clone() as Weak<dyn ReloadRecord>),
        });
        let observer: Weak<dyn KeyObserver> = self.this.clone();
        let dir = self.logstore_dir(entry.id);
        let shared = Arc::new(LogstoreShared::new(&dir, meta, plan, context, &entry.shards, observer));
        if self.read_only {
            // Another master key counts within `revalidate_every`, a version of the data key as soon as it is met.
            let (writer, every): (Weak<dyn FollowWriter>, _) = (self.this.clone(), self.options.revalidate_every);
            shared.gate.follow_with(writer, Arc::clone(&self.clock), every);
        }
        if let Some(lease) = lease {
            let listener: Weak<dyn LeaseListener> = Arc::<LogstoreShared>::downgrade(&shared);
            lease.listen(listener);
            // The others have heard of how it stands already.
            match lease.told() {
                Some(Ok(())) => shared.recovered(),
                Some(Err(refusal)) => shared.note_lost(&refusal),
                None => {}
            }
        }
        Ok(shared)
    }

    /// Reads the metadata of a reader's Logstore again, if the writer has changed it.
    fn catch_up_with_writer(&self, logstore: &Arc<LogstoreShared>) -> Result<()> {
        self.keys.follow_keyring()?;
        let current = lock(&logstore.meta).reference().path(&logstore.dir);
        let files = MetaName::list(&*self.disk, &logstore.dir)?;
        if let [only] = files.as_slice()
            && logstore.dir.join(only.to_string()) == current
        {
            return Ok(());
        }
        if files.is_empty() {
            // The writer removes it first when it deletes a Logstore.
            debug!(logstore = %logstore.name, "a Logstore was deleted by the writer");
            logstore.gate.close("the Logstore");
            return Err(Error::Closed("the Logstore"));
        }
        let (entry, meta) = self.read_meta(&logstore.name)?;
        if entry.id != logstore.id {
            logstore.gate.close("the Logstore");
            return Err(Error::Closed("the Logstore"));
        }
        self.take_in(logstore, meta)
    }

    /// Takes in metadata that the writer may have changed.
    fn take_in(&self, logstore: &Arc<LogstoreShared>, meta: Meta) -> Result<()> {
        let known = lock(&logstore.meta).generation;
        if meta.generation < known {
            let (name, found) = (&logstore.name, meta.generation);
            let what = format!("the metadata of Logstore {name} is of generation {found}, it was of {known}");
            return Err(Error::RolledBack { what });
        }
        if meta.generation > known {
            let keys = self.loaded_keys(&meta, logstore.id)?;
            let changed = logstore.keys_section().as_deref() != meta.keys.as_ref();
            let lease = if changed { use_keys(logstore, keys) } else { None };
            logstore.set_meta(meta, read(&self.keyring).newest());
            hear_of_loss(logstore, lease);
        }
        Ok(())
    }

    /// Refuses appends while the anchor is too far behind, if that is asked for.
    fn append_limit(&self) -> Option<Arc<dyn AdmitAppend>> {
        let (feeder, limit) = (Arc::clone(self.anchor.as_ref()?), self.options.anchor_required?);
        Some(Arc::new(AnchorLimit { feeder, limit }))
    }

    fn shard_options(&self) -> ShardOptions {
        ShardOptions {
            block_bytes: self.options.block_bytes,
            linger: self.options.linger,
            segment_bytes: self.options.segment_bytes,
            segment_age: self.options.segment_age,
            threads: self.options.background == Background::Threads,
        }
    }

    /// Changes the catalogue durably; the one in memory changes only with it. Notes too how far the audit log is.
    fn commit(&self, admin: &mut AdminState, mut changes: Vec<Change>) -> Result<()> {
        self.unlatch(admin)?;
        let known = self.catalogue.now().audit.clone();
        let audit = self.audit.head_after(&known);
        if audit != known {
            changes.push(Change::Audited(audit));
        }
        if changes.is_empty() {
            return Ok(());
        }
        self.catalogue.commit(changes).inspect_err(|error| {
            admin.latched = Some(error.clone());
            let _ = self.unlatch(admin);
        })
    }

    // ---- leases ----

    fn terms(&self) -> LeaseTerms {
        LeaseTerms {
            revalidate_every: self.options.revalidate_every,
            outage_grace: self.options.outage_grace,
            call_timeout: self.options.kms_timeout,
        }
    }

    /// The keys of metadata that was read, not proved yet.
    fn loaded_keys(&self, meta: &Meta, id: LogstoreId) -> Result<GateKeys> {
        Ok(GateKeys { unproved: meta.tagged.clone(), ..self.gate_keys(meta.keys.as_ref(), id)? })
    }

    /// A keys section that this process made, and the lease that belongs to it.
    fn gate_keys(&self, section: Option<&KeysSection>, id: LogstoreId) -> Result<GateKeys> {
        let Some(section) = section else { return Ok(GateKeys::default()) };
        let lease = match &section.cmk {
            Some(cmk) => Some(self.lease(cmk, section, id)?),
            None => None,
        };
        Ok(GateKeys { section: Some(Arc::new(section.clone())), lease, unproved: None })
    }

    /// The one lease for a master key. Makes no call.
    fn lease(&self, cmk: &Cmk, section: &KeysSection, id: LogstoreId) -> Result<Arc<Lease>> {
        if let Some(lease) = lock(&self.leases).get(cmk) {
            return Ok(Arc::clone(lease));
        }
        let kms = self.kms.serving(&cmk.region_id).ok();
        let probe = match kms.map(|kms| self.load_probe(kms.name(), cmk)).transpose()?.flatten() {
            Some(probe) => probe,
            // The probe is a convenience: an envelope of the Logstore itself proves as much.
            None => self.envelope_probe(section, id)?,
        };
        let lease = self.new_lease(cmk, probe);
        lease.start().map_err(Error::io("start a thread for", &self.dir))?;
        lock(&self.leases).insert(cmk.clone(), Arc::clone(&lease));
        Ok(lease)
    }

    fn new_lease(&self, cmk: &Cmk, probe: Probe) -> Arc<Lease> {
        let breaker = Arc::clone(lock(&self.circuits).entry(cmk.region_id.clone()).or_default());
        Lease::new(LeaseParts {
            cmk: cmk.clone(),
            kms: self.kms.serving_or_later(&cmk.region_id),
            breaker,
            probe,
            terms: self.terms(),
            clock: Arc::clone(&self.clock),
            random: Arc::clone(&self.random),
            pool: self.lease_pool.clone(),
        })
    }

    fn probe_path(&self, id: [u8; 16]) -> PathBuf {
        self.probes_dir().join(hex_encode(&id))
    }

    fn probes_dir(&self) -> PathBuf {
        self.dir.join("probes")
    }

    /// What the probe of a master key at a KMS is called.
    fn probe_id(&self, kms: &str, cmk: &Cmk) -> [u8; 16] {
        let mut id = [0; 16];
        let field = |text: &str| [&(text.len() as u32).to_le_bytes(), text.as_bytes()].concat();
        let digest = hash(
            HashAlg::Sha256,
            &[self.id.as_bytes(), &field(kms), &field(&cmk.region_id), &field(&cmk.arn), &field(&cmk.cmk_key_id)],
        );
        id.copy_from_slice(&digest[..16]);
        id
    }

    fn probe_context(&self) -> EncryptionContext {
        EncryptionContext::from([
            ("envelog:store".to_owned(), self.id.to_string()),
            ("envelog:purpose".to_owned(), "probe".to_owned()),
        ])
    }

    fn load_probe(&self, kms: &str, cmk: &Cmk) -> Result<Option<Probe>> {
        let path = self.probe_path(self.probe_id(kms, cmk));
        let found = match self.read_probe(&path) {
            Err(error) if error.is_not_found() => return Ok(None),
            found => found?,
        };
        if found.kms != kms || found.cmk != *cmk {
            return Err(Error::Tampered { at: Location::new(&path, 0), what: "the probe of another master key" });
        }
        Ok(Some(Probe { wrapped: found.wrapped, context: self.probe_context(), fingerprint: found.fingerprint }))
    }

    /// Reads the probe in a file, which must be the one that belongs there.
    fn read_probe(&self, path: &Path) -> Result<FoundProbe> {
        let document = self.keys.with_keyring(|keyring| {
            let bytes = io::read_file(&*self.disk, path, DOCUMENT_BYTES_MAX).map_err(Error::io("read", path))?;
            document::open(&bytes, DocumentKind::Probe, path, |version| keyring.document_key(version))
        })?;
        let malformed = || Error::corrupt(Location::new(path, 80), "the probe does not parse");
        let ProbeBody { kms, cmk, wrapped, fingerprint } =
            serde_json::from_slice(&document.a).map_err(|_| malformed())?;
        let id = self.probe_id(&kms, &cmk);
        if document.store != self.id || document.subject != id || self.probe_path(id) != path {
            return Err(Error::Tampered { at: Location::new(path, 0), what: "the probe of another master key" });
        }
        let wrapped = hex_decode(&wrapped).filter(|wrapped| !wrapped.is_empty()).ok_or_else(malformed)?;
        if check_cmk(&cmk).is_err() || hex_decode(&fingerprint).is_none_or(|bytes| bytes.len() != 16) {
            return Err(malformed());
        }
        Ok(FoundProbe { kms, cmk, wrapped, fingerprint, generation: document.generation })
    }

    /// Makes the probe envelope of a master key, if there is none yet.
    fn ensure_probe(&self, kms: &BoundedKms, cmk: &Cmk) -> std::result::Result<(), KmsOrEngine> {
        if self.load_probe(kms.name(), cmk)?.is_some() {
            return Ok(());
        }
        let secret =
            SecretKey::generate(&*self.random).map_err(Error::io("draw a random key for", self.probes_dir()))?;
        let wrapped = kms.wrap(cmk, self.probe_context(), &secret).map_err(KmsOrEngine::Kms)?;
        let (kms, fingerprint) = (kms.name().to_owned(), fingerprint(&secret));
        self.write_probe(FoundProbe { kms, cmk: cmk.clone(), wrapped, fingerprint, generation: 1 })?;
        Ok(())
    }

    fn write_probe(&self, probe: FoundProbe) -> Result<()> {
        let id = self.probe_id(&probe.kms, &probe.cmk);
        let path = self.probe_path(id);
        let FoundProbe { kms, cmk, wrapped, fingerprint, generation } = probe;
        let body = ProbeBody { kms, cmk, wrapped: hex_encode(&wrapped), fingerprint };
        let keyring = read(&self.keyring);
        let document = Document {
            kind: DocumentKind::Probe,
            features: Features::default(),
            store: self.id,
            subject: id,
            generation,
            keyring_version: keyring.newest(),
            a: serde_json::to_vec(&body).expect("plain data always serializes"),
            b: Vec::new(),
            tag_b: None,
        };
        let bytes = document.seal(&keyring.document_key(keyring.newest())?);
        io::write_file(&*self.disk, &path, &bytes, Existing::Replace).map_err(Error::io("write", &path))
    }

    fn envelope_probe(&self, section: &KeysSection, id: LogstoreId) -> Result<Probe> {
        let entry = section.versions.iter().rev().find(|entry| entry.wrapped.is_some());
        let wrapped = entry.and_then(|entry| Some((entry, hex_decode(entry.wrapped.as_deref()?)?)));
        let Some((entry, wrapped)) = wrapped else {
            let what = format!("no envelope of Logstore {} can be used", section.name);
            return Err(Error::corrupt(Location::new(self.logstore_dir(id), 0), what));
        };
        let identity = EnvelopeIdentity {
            store: self.id,
            logstore: id,
            version: entry.version,
            suite: section.encrypt_type.suite(),
        };
        Ok(Probe { wrapped, context: identity.context(), fingerprint: entry.fingerprint.clone() })
    }

    // ---- end ----

    /// The Logstores that are open now.
    fn open_logstores(&self) -> Vec<Arc<LogstoreShared>> {
        lock(&self.logstores).values().cloned().collect()
    }

    fn close(&self) -> Result<()> {
        if self.keys.check_process().is_err() {
            // A copy made by fork: the files belong to the parent.
            return Ok(());
        }
        // What the KMS has answered is dealt with and on record, whether or not the pool has come to it.
        let leases: Vec<_> = lock(&self.leases).values().cloned().collect();
        leases.iter().for_each(|lease| lease.tell());
        let mut result = Ok(());
        let mut admin = lock(&self.admin);
        if lock(&self.held).is_some() && !admin.closed {
            self.audit.settle();
            let mut heads = Vec::new();
            for logstore in self.open_logstores() {
                for shard in &logstore.shards {
                    match shard.close() {
                        Ok(Some(head)) => heads.push(Change::reached(&logstore.name, logstore.id, shard.id(), head)),
                        Ok(None) => {}
                        Err(error) => result = Err(error),
                    }
                }
            }
            if admin.latched.is_none() {
                let noted = self.commit(&mut admin, heads).and_then(|()| self.catalogue.settle());
                result = result.and(noted);
            }
        }
        admin.closed = true;
        drop(admin);
        for logstore in self.open_logstores() {
            logstore.gate.close("the store");
        }
        lock(&self.leases).clear();
        if let Some(pool) = &self.lease_pool {
            pool.stop();
        }
        self.scheduler.stop();
        if let Some(anchor) = &self.anchor {
            anchor.stop();
        }
        self.hasher.stop();
        lock(&self.logstores).clear();
        self.unlock();
        match &result {
            Ok(()) => info!(store = %self.id, "a store is closed"),
            Err(error) => warn!(store = %self.id, %error, "a store is closed, and not all of it cleanly"),
        }
        result
    }
}

impl ReloadRecord for StoreShared {
    fn reload_record(&self, logstore: &LogstoreName, shard: u32) -> Result<ShardRecord> {
        let catalogue = self.load_catalogue()?;
        let entry = catalogue.logstores.get(logstore).ok_or(Error::Closed("the Logstore"))?;
        entry.shards.get(shard as usize).cloned().ok_or(Error::Closed("the shard"))
    }
}

impl KeyObserver for StoreShared {
    fn key_lost(&self, logstore: &LogstoreShared, refusal: &Refusal) {
        let (event, detail) = match refusal {
            Refusal::Revoked(reason) => (AuditEvent::Revoked, reason.to_string()),
            Refusal::Unreachable(detail) => (AuditEvent::LeaseEnded, format!("unreachable: {detail}")),
            Refusal::Invalid(detail) => (AuditEvent::LeaseEnded, format!("invalid: {detail}")),
        };
        self.note(event, logstore, detail);
    }

    fn key_recovered(&self, logstore: &LogstoreShared) {
        self.note(AuditEvent::Recovered, logstore, String::new());
    }

    fn envelope_version(&self, cmk: &Cmk, version: &DataKeyVersion) -> Option<String> {
        self.cmk_version(cmk, &hex_decode(version.wrapped.as_deref()?)?)
    }
}

impl FollowWriter for StoreShared {
    fn catch_up(&self, name: &LogstoreName, id: LogstoreId) -> Result<()> {
        let logstore = lock(&self.logstores).get(name).cloned().ok_or(Error::Closed("the store"))?;
        if logstore.id != id {
            return Err(Error::Closed("the Logstore"));
        }
        self.catch_up_with_writer(&logstore)
    }
}

impl StoreShared {
    /// Records what has happened already. The transition stands whether or not it can be recorded.
    fn note(&self, event: AuditEvent, logstore: &LogstoreShared, detail: String) {
        if !self.read_only {
            let _ = self.audit.transition(event, (&logstore.name, logstore.id), detail);
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ProbeBody {
    kms: String,
    cmk: Cmk,
    wrapped: String,
    fingerprint: String,
}

/// A probe as its file has it.
struct FoundProbe {
    kms: String,
    cmk: Cmk,
    wrapped: Vec<u8>,
    fingerprint: String,
    generation: u64,
}

/// Puts changed keys in place. The caller has the Logstore hear of their loss, once what is written follows them.
fn use_keys(logstore: &Arc<LogstoreShared>, keys: GateKeys) -> Option<Arc<Lease>> {
    let lease = keys.lease.clone();
    logstore.gate.replace_keys(keys);
    lease
}

/// Has a Logstore hear of the loss of its keys.
fn hear_of_loss(logstore: &Arc<LogstoreShared>, lease: Option<Arc<Lease>>) {
    let Some(lease) = lease else { return };
    let listener: Weak<dyn LeaseListener> = Arc::<LogstoreShared>::downgrade(logstore);
    lease.listen(listener);
    // The others may have heard of it between these lines.
    if let Some(Err(refusal)) = lease.told() {
        logstore.lost(&refusal);
        logstore.note_lost(&refusal);
    }
}

/// An error on either side of a call to the KMS.
enum KmsOrEngine {
    Kms(KmsError),
    Engine(Error),
}

impl From<Error> for KmsOrEngine {
    fn from(error: Error) -> Self {
        KmsOrEngine::Engine(error)
    }
}

impl KmsOrEngine {
    /// The error of an operation that needs a new envelope: there, a refusal of the KMS refuses the configuration.
    fn refusing(self, name: &LogstoreName, cmk: &Cmk) -> Error {
        let (logstore, cmk_id, region) = (name.clone(), cmk.cmk_key_id.clone(), cmk.region_id.clone());
        match self {
            KmsOrEngine::Engine(error) => error,
            KmsOrEngine::Kms(KmsError::Revoked { reason, detail }) => {
                Error::Config(ConfigError::CmkRefused { cmk: cmk_id, detail: format!("it is {reason} ({detail})") })
            }
            KmsOrEngine::Kms(KmsError::Invalid { detail }) => Error::KmsInvalid { logstore, cmk: cmk_id, detail },
            KmsOrEngine::Kms(other) => {
                Error::KmsUnreachable { logstore, cmk: cmk_id, region, detail: other.to_string() }
            }
        }
    }
}
