//! Making and opening stores.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::{
    AdminState, Open, RecoverReport, Recoverable, Store, StoreShared,
    anchor::{Anchor, AnchorPlace, Feeder},
    catalogue::{self, Catalogue, Journal, Loaded, load_newest},
    creation,
    lock::StoreLock,
    recover,
    scheduler::Scheduler,
};
use crate::{
    Error, Result,
    config::{LogstoreName, check_cmk},
    crypto::CryptoProvider,
    document::{self, DOCUMENT_BYTES_MAX, Document, DocumentKind, UnverifiedDocument},
    epoch::{EPOCH_MAX, Fence, FencedDisk},
    error::Location,
    ids::{KeyringId, StoreId},
    io::{self, Access, Clock, Disk, Existing, OsRandom, Random, RealDisk, SystemClock},
    keys::{
        AuditEvent,
        audit::{AuditLog, FILE_BYTES_LIMIT},
        gate::KeyContext,
        keyring::{Keyring, NewKeyring},
        keyring_file::KeyringFile,
        keyring_seal::KeyringSeal,
        renewal_pool::RenewalPool,
    },
    kms::{Cmk, Kms, KmsRouter},
    metrics::Counters,
    segment::{BLOCK_LIST_BYTES_MAX, Features, SEGMENT_BYTES_MAX},
    shard::{Budget, PayloadHasher, ReaderPermits},
    sync::{LockRank, Mutex, RwLock, lock, read},
};

/// Who does what is not done at once: partial batches, marks, rolling by age, retention, leases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Background {
    /// Threads of the store.
    #[default]
    Threads,
    /// The embedder, by calling [`Store::tick`]; nothing happens by itself. For simulations and tests.
    Manual,
}

/// The settings of a store. They are not stored: each opening brings its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoreOptions {
    /// How often the KMS is asked whether a master key may still be used. 30 s by default; 100 ms to 1 h. From the moment a
    /// reachable KMS refuses, no operation that starts later than this plus [`StoreOptions::kms_timeout`] succeeds.
    pub revalidate_every: Duration,
    /// How long a key may be used after the last successful call was sent, should the KMS not answer. 5 min by default; at least
    /// `revalidate_every`, at most 24 h.
    pub outage_grace: Duration,
    /// How long one call to the KMS may take. 1 s by default; 10 ms to 1 min.
    pub kms_timeout: Duration,
    /// Who does the background work.
    pub background: Background,
    /// Threads that write what nobody waits for. 2 by default; 1 to 64.
    pub workers: usize,
    /// How many bytes of groups are collected into one block when there is no hurry. 256 KiB by default; 4 KiB to 32 MiB. A group
    /// larger than this is a block of its own.
    pub block_bytes: usize,
    /// After how long a partial batch is written, should nobody wait for it. 100 ms by default; at most 10 s.
    pub linger: Duration,
    /// At what size a segment is sealed and the next one begun, in bytes on disk. 64 MiB by default; 4 KiB to 3 GiB.
    pub segment_bytes: u64,
    /// At what age a segment is sealed and the next one begun. 6 h by default; at least 1 s.
    pub segment_age: Duration,
    /// The memory that groups waiting to be written may take in the whole store, in bytes; appends wait when it is used up. 64 MiB by
    /// default; at least 1 MiB.
    pub pending_bytes_max: usize,
    /// How many readers may be open at once. 1,024 by default; at least 1.
    pub readers_max: usize,
    /// At what size a file of the key audit log is followed by the next, in bytes. 4 MiB by default; 4 KiB to 64 MiB.
    pub audit_file_bytes: u64,
    /// How often retention is applied. 60 s by default; at least 1 s.
    pub retention_every: Duration,
    /// How often the catalogue notes how far the synced part of each open segment reaches. Without a key, no more than what was synced
    /// since can be cut off unnoticed. 10 s by default; 100 ms to 1 h.
    pub head_every: Duration,
    /// For how long the anchor may be behind before appends are refused with [`Error::AnchorBehind`]. `None` by default: an anchor that
    /// fails stops nothing. At least 1 s.
    pub anchor_required: Option<Duration>,
    /// Whether the group may read the files and directories that the store creates: modes 0640 and 0750 in place of 0600 and 0700.
    /// Off by default. What exists keeps its mode.
    pub group_read: bool,
    /// Whether the group may read the service keyring: one that it can read is accepted, and a new one gets mode 0640. Off by
    /// default.
    pub keyring_group_read: bool,
    /// Whether the store may be written on a network file system. Off by default: two writers on two machines lose what they have
    /// acknowledged, unless the file system keeps `flock` locks across machines and its caches coherent. Known by `statfs(2)` on
    /// Linux alone; file systems behind FUSE are not recognised.
    pub allow_network_fs: bool,
    pub(super) hash_payloads: bool,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            revalidate_every: Duration::from_secs(30),
            outage_grace: Duration::from_secs(300),
            kms_timeout: Duration::from_secs(1),
            background: Background::Threads,
            workers: 2,
            block_bytes: 256 << 10,
            linger: Duration::from_millis(100),
            segment_bytes: 64 << 20,
            segment_age: Duration::from_secs(6 * 3600),
            pending_bytes_max: 64 << 20,
            readers_max: 1024,
            audit_file_bytes: 4 << 20,
            retention_every: Duration::from_secs(60),
            head_every: Duration::from_secs(10),
            anchor_required: None,
            group_read: false,
            keyring_group_read: false,
            allow_network_fs: false,
            hash_payloads: true,
        }
    }
}

impl StoreOptions {
    /// Leaves the hashes of the payloads out of the digests of segments. Verification finds such a store corrupt: a benchmark measures
    /// with it what the hashes cost, and throws it away.
    #[doc(hidden)]
    #[must_use]
    pub fn without_payload_hashes_for_benchmarks(self) -> Self {
        Self { hash_payloads: false, ..self }
    }

    pub(super) fn check(&self) -> Result<()> {
        let hour = Duration::from_secs(3600);
        let (ms, s) = (Duration::from_millis, Duration::from_secs);
        let ranges = [
            ("revalidate_every (100 ms to 1 h)", (ms(100)..=hour).contains(&self.revalidate_every)),
            (
                "outage_grace (revalidate_every to 24 h)",
                (self.revalidate_every..=24 * hour).contains(&self.outage_grace),
            ),
            ("kms_timeout (10 ms to 1 min)", (ms(10)..=s(60)).contains(&self.kms_timeout)),
            ("workers (1 to 64)", (1..=64).contains(&self.workers)),
            ("block_bytes (4 KiB to 32 MiB)", (4 << 10..=BLOCK_LIST_BYTES_MAX as usize).contains(&self.block_bytes)),
            ("linger (at most 10 s)", self.linger <= s(10)),
            ("segment_bytes (4 KiB to 3 GiB)", (4 << 10..=SEGMENT_BYTES_MAX / 4 * 3).contains(&self.segment_bytes)),
            ("segment_age (at least 1 s)", self.segment_age >= s(1)),
            ("pending_bytes_max (at least 1 MiB)", self.pending_bytes_max >= 1 << 20),
            ("readers_max (at least 1)", self.readers_max >= 1),
            ("audit_file_bytes (4 KiB to 64 MiB)", (4 << 10..=FILE_BYTES_LIMIT).contains(&self.audit_file_bytes)),
            ("retention_every (at least 1 s)", self.retention_every >= s(1)),
            ("anchor_required (at least 1 s)", self.anchor_required.is_none_or(|limit| limit >= s(1))),
            ("head_every (100 ms to 1 h)", (ms(100)..=s(3600)).contains(&self.head_every)),
        ];
        match ranges.iter().find(|(_, within)| !within) {
            Some((what, _)) => Err(Error::InvalidArgument(format!("{what} is out of its range"))),
            None => Ok(()),
        }
    }
}

/// What a store is made of and opened with; from [`Store::builder`].
#[derive(Clone, Debug)]
#[must_use = "a builder does nothing until one of its opening methods is called"]
pub struct StoreBuilder {
    pub(super) dir: PathBuf,
    pub(super) keyring: PathBuf,
    provider: Arc<dyn CryptoProvider>,
    kms: Vec<Arc<dyn Kms>>,
    service_cmk: Option<Cmk>,
    anchor: Option<Arc<dyn Anchor>>,
    without_anchor: bool,
    accept_retired: bool,
    pub(super) disk: Arc<dyn Disk>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) random: Arc<dyn Random>,
    pub(super) options: StoreOptions,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoreBody {
    created_us: u64,
    keyring: KeyringId,
}

/// Whose audit log is there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Audit {
    Ours,
    /// That of a lost keyring.
    Lost,
}

/// What the `STORE` file says.
struct Identity {
    store: StoreId,
    keyring: KeyringId,
    features: Features,
}

pub(super) fn identity_path(dir: &Path) -> PathBuf {
    dir.join("STORE")
}

impl StoreBuilder {
    pub(super) fn new(dir: PathBuf, keyring: PathBuf, provider: Arc<dyn CryptoProvider>) -> Self {
        Self {
            dir,
            keyring,
            provider,
            kms: Vec::new(),
            service_cmk: None,
            anchor: None,
            without_anchor: false,
            accept_retired: false,
            disk: Arc::new(RealDisk),
            clock: Arc::new(SystemClock),
            random: Arc::new(OsRandom),
            options: StoreOptions::default(),
        }
    }

    /// Adds a KMS. The first one that serves a region is used for it.
    pub fn kms(mut self, kms: Arc<dyn Kms>) -> Self {
        self.kms.push(kms);
        self
    }

    /// Puts the service keyring that is about to be made under a master key, in the KMS that serves its region: the file then
    /// holds the roots only sealed, and whoever opens the store asks that KMS for them, once. Counts where a keyring is made
    /// ([`StoreBuilder::create`], [`StoreBuilder::recover_without_keyring`]); an existing one says itself what it is under, and
    /// [`Store::rewrap_keyring`] changes that.
    ///
    /// There is no lease on the service key: a store that is open stays so whatever becomes of the master key.
    pub fn service_cmk(mut self, cmk: Cmk) -> Self {
        self.service_cmk = Some(cmk);
        self
    }

    /// Keeps how far the store is in an anchor, too, and compares the store with it at each opening. From the first opening for writing
    /// with an anchor on, the keyring says that there is one, and the store is not opened for writing without it.
    pub fn anchor(mut self, anchor: Arc<dyn Anchor>) -> Self {
        self.anchor = Some(anchor);
        self
    }

    /// Opens a store for writing that has an anchor, without comparing it with that: an older store in its place is not found out. The
    /// audit log records that. If there is an anchor, it keeps the store as it is from then on.
    pub fn without_anchor(mut self) -> Self {
        self.without_anchor = true;
        self
    }

    /// Accepts documents, audit records and checkpoints under versions of the service key that a rotation has retired: for restoring a
    /// backup from before the rotation that is known to be good. A holder of a retired version can forge all of them. Counts for
    /// [`StoreBuilder::open_read_only`]; a store is not opened for writing so.
    pub fn accept_retired_versions(mut self, accept: bool) -> Self {
        self.accept_retired = accept;
        self
    }

    /// Settings other than the default ones.
    pub fn options(mut self, options: StoreOptions) -> Self {
        self.options = options;
        self
    }

    /// Another file system.
    pub fn disk(mut self, disk: Arc<dyn Disk>) -> Self {
        self.disk = disk;
        self
    }

    /// Another clock.
    pub fn clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    /// Another source of randomness. Keys, salts and nonces come from it: whoever can predict it, or makes it repeat, reads
    /// everything.
    pub fn insecure_random_for_tests(mut self, random: Arc<dyn Random>) -> Self {
        self.random = random;
        self
    }

    /// Opens a store for reading and writing. Calls no KMS, unless the service keyring is under a master key, and reads no data.
    ///
    /// # Errors
    /// [`Error::ServiceKey`] when the service keyring is under a master key that cannot be used;
    /// [`Error::StoreMissing`], [`Error::NotAStore`], [`Error::NewerFormat`]; [`Error::UnsupportedFeature`], also when the store can
    /// be read but not written; [`Error::Locked`] when another process writes it; [`Error::NetworkFileSystem`];
    /// [`Error::KeyringMissing`], [`Error::KeyringForeign`], [`Error::KeyringTooOld`]; [`Error::RetiredKeyVersion`] for a store from before
    /// a rotation of the service key; the integrity errors of the catalogue.
    pub fn open(self) -> Result<Store> {
        self.options.check()?;
        if self.accept_retired {
            let what = "a store that accepts retired versions of the service key is opened read-only alone";
            return Err(Error::InvalidArgument(what.to_owned()));
        }
        let outside = Arc::clone(&self.disk);
        let this = self.rooted()?;
        let identity = this.identity()?;
        check_writing(&identity.features, &identity_path(&this.dir))?;
        this.check_file_system()?;
        let held = StoreLock::take(&*this.disk, &this.dir)?;
        let mut keyring = this.load_keyring(&*outside, &identity)?;
        check_writing(keyring.features(), keyring.path())?;
        verify_identity(&*this.disk, &this.dir, &keyring)?;
        // The directory is an authentic store: only from here on is anything in it written.
        let held = match held {
            Some(held) => held,
            None => {
                let held = StoreLock::take_or_create(&*this.disk, &this.dir)?;
                if keyring.is_outdated()? {
                    keyring = keyring.reload()?;
                }
                verify_identity(&*this.disk, &this.dir, &keyring)?;
                held
            }
        };
        // Syncs the directory, because a previous process may have died between a rename and the sync of it.
        this.disk.sync_dir(&this.dir).map_err(Error::io("sync", &this.dir))?;
        let kept = this.load_anchor(&keyring)?;
        let above = kept.as_ref().map_or(0, |(place, _)| place.epoch);
        let (fence, found) = this.take_over(identity.store, &keyring, above)?;
        check_writing(&found.features, &found.path)?;
        this.compare_with_anchor(&keyring, &found.catalogue, kept.as_ref())?;
        if keyring.newest() > found.keyring_version {
            keyring.file().sync_name()?;
        }
        keyring.file().remove_leftovers();
        creation::forget(&*this.disk, &this.dir);
        let without_anchor = this.without_anchor;
        let store = this.assemble(identity.store, keyring, found.catalogue, Some((held, fence)), Audit::Ours)?;
        store.shared.begin_anchoring(without_anchor)?;
        store.shared.clean_up()?;
        Ok(store)
    }

    /// Opens a store for reading, beside the process that writes it or without one.
    ///
    /// # Errors
    /// As [`StoreBuilder::open`], but never [`Error::Locked`].
    pub fn open_read_only(self) -> Result<Store> {
        self.options.check()?;
        let outside = Arc::clone(&self.disk);
        let this = self.rooted()?;
        let identity = this.identity()?;
        let mut keyring = this.load_keyring(&*outside, &identity)?;
        if this.accept_retired {
            keyring.accept_retired();
        }
        verify_identity(&*this.disk, &this.dir, &keyring)?;
        // Before the catalogue, which a writer may change meanwhile: the anchor never knows more than the store had then.
        let kept = match &this.anchor {
            Some(_) => this.load_anchor(&keyring)?,
            None => None,
        };
        let found = load_newest(&*this.disk, &this.dir, identity.store, &keyring)?;
        let kept = this.compare_with_anchor(&keyring, &found.catalogue, kept.as_ref())?;
        let reached = found.catalogue.generation;
        let mut store = this.assemble(identity.store, keyring, found.catalogue, None, Audit::Ours)?;
        store.anchor_lacks = kept.map(|kept| reached.saturating_sub(kept));
        Ok(store)
    }

    /// What the anchor keeps of the store. `None` when there is no anchor, or none that counts.
    ///
    /// # Errors
    /// [`Error::Anchor`] when it cannot be read, or there should be one.
    fn load_anchor(&self, keyring: &Keyring) -> Result<Option<(AnchorPlace, Vec<u8>)>> {
        let unusable = |why: String| Error::Anchor { path: self.dir.clone(), why };
        match self.anchor.as_ref().map(|anchor| anchor.load(keyring.store())) {
            Some(Err(error)) if self.without_anchor => {
                warn!(store = %keyring.store(), %error, "the anchor cannot be read, and the store is opened without it");
                Ok(None)
            }
            Some(Err(error)) => Err(unusable(format!("it cannot be read: {error}"))),
            Some(Ok(None)) if keyring.is_anchored() && !self.without_anchor => {
                Err(unusable("it keeps nothing of this store".to_owned()))
            }
            // No writer has such an epoch: the name was made up.
            Some(Ok(Some((place, _)))) if place.epoch >= EPOCH_MAX => {
                Err(unusable(format!("it keeps something under the epoch {}, which no writer has had", place.epoch)))
            }
            Some(Ok(kept)) => Ok(kept),
            None if keyring.is_anchored() && !self.without_anchor => Err(unusable("none is configured".to_owned())),
            None => Ok(None),
        }
    }

    /// Compares the store with what its anchor keeps of it, before anything in it is changed. Returns the number of the last record that
    /// the anchor knows.
    ///
    /// # Errors
    /// [`Error::RolledBack`]; the integrity errors of what the anchor keeps.
    fn compare_with_anchor(
        &self,
        keyring: &Keyring,
        catalogue: &Catalogue,
        kept: Option<&(AnchorPlace, Vec<u8>)>,
    ) -> Result<Option<u64>> {
        let (Some(anchor), Some((place, kept))) = (&self.anchor, kept.filter(|_| !self.without_anchor)) else {
            return Ok(None);
        };
        let path = anchor.name_of(keyring.store(), *place);
        let kept = catalogue::load_mirror(kept, &path, keyring.store(), keyring)?;
        let reader = Self { anchor: None, ..self.clone() };
        let reader = reader.assemble(keyring.store(), keyring.duplicate(), catalogue.clone(), None, Audit::Ours)?;
        reader.shared.check_against_anchor(&kept)?;
        Ok(Some(kept.generation))
    }

    /// Opens the store, or makes it where there is none.
    ///
    /// # Errors
    /// As [`StoreBuilder::open`] and [`StoreBuilder::create`].
    pub fn open_or_create(self) -> Result<Store> {
        match self.clone().open() {
            Err(Error::StoreMissing { .. }) => self.create(),
            opened => opened,
        }
    }

    /// The Logstores that [`StoreBuilder::recover_without_keyring`] may recover, by name, with the master key and the role that it would
    /// use for each. Nothing authenticates this list, so compare it with a source outside the store. Calls no KMS and changes nothing.
    ///
    /// # Errors
    /// [`Error::StoreMissing`], [`Error::NotAStore`], [`Error::NewerFormat`], [`Error::KeyringExists`], [`Error::Io`].
    pub fn recoverable(self) -> Result<Vec<Recoverable>> {
        let outside = Arc::clone(&self.disk);
        let this = self.rooted()?;
        let identity = this.identity()?;
        let keyring = this.keyring_file(&*outside)?;
        if keyring.exists()? {
            return Err(Error::KeyringExists { path: keyring.path().to_owned() });
        }
        recover::recoverable(&*this.disk, &this.dir, identity.store)
    }

    /// Opens a store whose keyring is lost, with a new keyring, as far as customer master keys reach: the Logstores under them keep
    /// everything that was encrypted. Logstores under the lost service key, and what was written before encryption was turned on,
    /// cannot be authenticated any more. The configuration of the recovered Logstores is taken as it is found, but for `encrypt_conf`:
    /// it follows their envelopes, which the data key vouches for, and is on.
    ///
    /// `expected` has the master key, its region and the role of each Logstore that is to be recovered, from a source that an attacker
    /// on the disk cannot write. A Logstore that names another key or role, or that is not in it, is not recovered, and no KMS is asked:
    /// an attacker who owns a master key of their own could otherwise put their Logstore in place of the customer's.
    ///
    /// # Errors
    /// [`Error::KeyringExists`] when there is a file where the new keyring is to be; [`Error::ServiceKey`] when that one is to be under
    /// a master key and cannot; [`Error::KmsUnreachable`] when a KMS does not answer, and [`Error::Corrupt`] when two Logstores of one
    /// name prove themselves, both with nothing changed; otherwise as [`StoreBuilder::open`].
    pub fn recover_without_keyring(self, expected: &BTreeMap<LogstoreName, Cmk>) -> Result<(Store, RecoverReport)> {
        self.options.check()?;
        let outside = Arc::clone(&self.disk);
        let this = self.rooted()?;
        let identity = this.identity()?;
        check_writing(&identity.features, &identity_path(&this.dir))?;
        this.check_file_system()?;
        let held = StoreLock::take_or_create(&*this.disk, &this.dir)?;
        let (disk, dir) = (Arc::clone(&this.disk), this.dir.clone());
        let now_us = this.clock.wall_us();
        let file = this.keyring_file(&*outside)?;
        let keyring = this.new_keyring(&file, identity.store, now_us)?.write()?;
        // Until the new STORE file is in place, the old one still names the old keyring: an interrupted recovery is done anew.
        let recovered = (|| {
            let above = catalogue::newest_epoch(&*disk, &dir)?;
            let fence = Fence::raise(&*disk, &dir, identity.store, above, &*this.random)?;
            let lost = Catalogue { generation: 1, ..Catalogue::default() };
            let store = this.assemble(identity.store, keyring, lost, Some((held, fence)), Audit::Lost)?;
            let report = store.shared.recover_logstores(expected).inspect_err(|error| {
                // The catalogue stays under the old keyring, which may be found yet: the new one is discarded.
                lock(&store.shared.admin).latched = Some(error.clone());
            })?;
            let keyring = read(&store.shared.keyring);
            write_identity(&*disk, &dir, identity.store, &keyring, now_us)?;
            drop(keyring);
            store.shared.audit.record(AuditEvent::KeyringReplaced, None, "")?;
            store.shared.begin_anchoring(false)?;
            Ok((store, report))
        })();
        if recovered.is_err() {
            // Nothing depends on the new keyring yet.
            let _ = file.remove();
        }
        recovered
    }

    pub(super) fn keyring_seal(&self) -> KeyringSeal {
        let inline = self.options.background == Background::Manual;
        let kms = KmsRouter::new(&self.kms, self.options.kms_timeout, inline, Arc::clone(&self.clock));
        KeyringSeal::new(Arc::clone(&self.provider), kms)
    }

    /// Refuses to write a store on a network file system, unless the options allow it.
    pub(super) fn check_file_system(&self) -> Result<()> {
        let found =
            self.disk.network_file_system(&self.dir).map_err(Error::io("look at the file system of", &self.dir))?;
        match found.filter(|_| !self.options.allow_network_fs) {
            Some(kind) => Err(Error::NetworkFileSystem { path: self.dir.clone(), kind }),
            None => Ok(()),
        }
    }

    /// The same store on the disk below its directory, in which no symlink is followed.
    pub(super) fn rooted(self) -> Result<Self> {
        let access = if self.options.group_read { Access::GroupRead } else { Access::Owner };
        let disk = self.disk.beneath(&self.dir, access).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Error::StoreMissing { path: self.dir.clone() },
            std::io::ErrorKind::NotADirectory => Error::NotAStore { path: self.dir.clone() },
            _ => Error::io("open", &self.dir)(error),
        })?;
        Ok(Self { disk, ..self })
    }

    /// The file of the keyring. It is outside the store, and so found on the whole disk.
    pub(super) fn keyring_file(&self, outside: &dyn Disk) -> Result<Arc<KeyringFile>> {
        let access = if self.options.keyring_group_read { Access::GroupRead } else { Access::Owner };
        KeyringFile::locate(outside, &self.keyring, &self.dir, access).map(Arc::new)
    }

    pub(super) fn new_keyring(&self, file: &Arc<KeyringFile>, store: StoreId, now_us: u64) -> Result<NewKeyring> {
        if let Some(cmk) = &self.service_cmk {
            check_cmk(cmk)?;
        }
        let file = Arc::clone(file);
        Keyring::prepare(&*self.random, file, store, now_us, self.keyring_seal(), self.service_cmk.clone())
    }

    fn load_keyring(&self, outside: &dyn Disk, identity: &Identity) -> Result<Keyring> {
        Keyring::load(self.keyring_file(outside)?, identity.store, identity.keyring, &self.keyring_seal())
    }

    /// Reads the `STORE` file, which is authenticated once the keyring is there.
    fn identity(&self) -> Result<Identity> {
        let path = identity_path(&self.dir);
        let missing = |error: std::io::Error| match error.kind() {
            std::io::ErrorKind::NotFound => match creation::Remains::look(&*self.disk, &self.dir) {
                Ok(_) => Error::StoreMissing { path: self.dir.clone() },
                Err(error) => error,
            },
            _ => Error::io("read", &path)(error),
        };
        let bytes = io::read_file(&*self.disk, &path, DOCUMENT_BYTES_MAX).map_err(missing)?;
        let parsed = UnverifiedDocument::parse(&bytes).map_err(|error| error.in_file(&path, 0))?;
        let claimed = parsed.unverified();
        if claimed.kind != DocumentKind::Store {
            return Err(Error::NotAStore { path: self.dir.clone() });
        }
        let body: StoreBody = serde_json::from_slice(&claimed.a)
            .map_err(|error| Error::corrupt(Location::new(&path, 80), format!("it does not parse: {error}")))?;
        Ok(Identity { store: claimed.store, keyring: body.keyring, features: claimed.features })
    }

    /// Raises the writer epoch above that of every earlier writer, and above `above`, and reads the catalogue that the last of them left.
    pub(super) fn take_over(&self, store: StoreId, keyring: &Keyring, above: u64) -> Result<(Fence, Loaded)> {
        let mut above = above.max(catalogue::newest_epoch(&*self.disk, &self.dir)?);
        loop {
            let fence = Fence::raise(&*self.disk, &self.dir, store, above, &*self.random)?;
            let found = load_newest(&*self.disk, &self.dir, store, keyring)?;
            if found.place.epoch < fence.epoch() {
                return Ok((fence, found));
            }
            // The epoch file was lost, or put back.
            above = found.place.epoch;
        }
    }

    pub(super) fn assemble(
        self,
        id: StoreId,
        keyring: Keyring,
        catalogue: Catalogue,
        held: Option<(StoreLock, Fence)>,
        found: Audit,
    ) -> Result<Store> {
        let kms = keyring.seal().kms().clone();
        let counters = Arc::new(Counters::new(Arc::clone(kms.meter())));
        let keyring = Arc::new(RwLock::new(LockRank::Keyring, keyring));
        let known = catalogue.audit.clone();
        let disk = Arc::clone(&self.disk);
        let (mut held, fence): (Option<StoreLock>, Option<Arc<Fence>>) =
            held.map(|(held, fence)| (held, Arc::new(fence))).unzip();
        let audit = AuditLog::new(
            Arc::clone(&self.disk),
            Arc::clone(&self.clock),
            Arc::clone(&keyring),
            self.dir.join("audit"),
            self.options.audit_file_bytes,
            Arc::clone(&counters),
            fence.clone(),
        );
        if found == Audit::Ours {
            audit.find_end(&known)?;
            if let Some(held) = &held {
                audit.make_durable(&known)?;
                if !held.is_clean() {
                    audit.begin_new_file();
                }
            }
        }
        let (disk, catalogue): (Arc<dyn Disk>, _) = match &fence {
            Some(fence) => {
                let disk = Arc::new(FencedDisk::new(disk, Arc::clone(fence)));
                let (on, keyring, fence) = (Arc::clone(&disk) as _, Arc::clone(&keyring), Arc::clone(fence));
                (disk, Journal::for_writing(on, &self.dir, id, keyring, catalogue, fence))
            }
            None => {
                let catalogue = Journal::for_reading(Arc::clone(&disk), &self.dir, id, Arc::clone(&keyring), catalogue);
                (disk, catalogue)
            }
        };
        if held.is_some() && found == Audit::Ours {
            // Before it looks at any shard: an earlier catalogue must not count any more.
            catalogue.write_anew()?;
        }
        let anchor = match (&self.anchor, held.is_some()) {
            (Some(anchor), true) => {
                let (clock, counters) = (Arc::clone(&self.clock), Arc::clone(&counters));
                Some(Feeder::new(Arc::clone(anchor), id, clock, counters))
            }
            _ => None,
        };
        {
            let keyring = read(&keyring);
            if keyring.is_rotating() {
                let (accepts, newest) = (keyring.accepts(), keyring.newest());
                warn!(store = %id, accepts, newest, "a rotation of the service key is unfinished: `rotate_service_key` continues it");
            }
        }
        // From here on nothing is refused any more.
        if let Some(held) = &mut held {
            held.note_process();
        }
        let scheduler = Scheduler::new(Arc::clone(&self.clock));
        let hasher = PayloadHasher::new(self.options.hash_payloads);
        let read_only = held.is_none();
        if self.options.background == Background::Threads && !read_only {
            let spawned = scheduler.spawn(self.options.workers).and_then(|()| hasher.spawn());
            spawned.map_err(Error::io("start threads for", &self.dir))?;
        }
        let lease_pool = match self.options.background {
            Background::Threads => Some(RenewalPool::new(Arc::clone(&self.clock))),
            Background::Manual => None,
        };
        let shared = Arc::new_cyclic(|this| StoreShared {
            this: this.clone(),
            keys: Arc::new(KeyContext {
                store: id,
                provider: Arc::clone(&self.provider),
                keyring: Arc::clone(&keyring),
                pid: std::process::id(),
                counters,
                reloads_keyring: read_only,
            }),
            budget: Budget::new(self.options.pending_bytes_max),
            hasher,
            permits: ReaderPermits::new(self.options.readers_max),
            admin: Mutex::new(LockRank::Admin, AdminState { latched: None, closed: false }),
            catalogue: Arc::new(catalogue),
            fence,
            anchor,
            logstores: Mutex::new(LockRank::Logstores, BTreeMap::new()),
            leases: Mutex::new(LockRank::Leases, BTreeMap::new()),
            circuits: Mutex::new(LockRank::Circuits, BTreeMap::new()),
            lease_pool,
            retention: Mutex::new(LockRank::ClockWatch, super::retention::ClockWatch::new(&*self.clock)),
            held: Mutex::new(LockRank::StoreLock, held),
            id,
            read_only,
            scheduler,
            audit,
            keyring,
            dir: self.dir,
            provider: self.provider,
            kms,
            disk,
            clock: self.clock,
            random: self.random,
            options: self.options,
        });
        if !read_only {
            shared.schedule_retention();
            shared.schedule_heads();
        }
        info!(store = %id, dir = %shared.dir.display(), read_only, "a store is open");
        Ok(Store { open: Arc::new(Open { shared: Arc::clone(&shared) }), shared, anchor_lacks: None })
    }
}

fn check_writing(features: &Features, path: &Path) -> Result<()> {
    features.check_writing().map_err(|error| error.in_file(path, 0))
}

/// Authenticates the `STORE` file.
pub(super) fn verify_identity(disk: &dyn Disk, dir: &Path, keyring: &Keyring) -> Result<()> {
    load_identity(disk, dir, keyring).map(drop)
}

/// Reads the `STORE` file, which must be that of the keyring's store.
fn load_identity(disk: &dyn Disk, dir: &Path, keyring: &Keyring) -> Result<Document> {
    let path = identity_path(dir);
    let bytes = io::read_file(disk, &path, DOCUMENT_BYTES_MAX).map_err(Error::io("read", &path))?;
    let document = document::open(&bytes, DocumentKind::Store, &path, |version| keyring.document_key(version))?;
    let body: StoreBody = serde_json::from_slice(&document.a)
        .map_err(|error| Error::corrupt(Location::new(&path, 80), format!("it does not parse: {error}")))?;
    if document.store != keyring.store() || body.keyring != keyring.id() {
        return Err(Error::Tampered { at: Location::new(&path, 24), what: "the identity of another store" });
    }
    match document.generation {
        1 => Ok(document),
        _ => Err(Error::corrupt(Location::new(&path, 56), "the generation of the identity of a store is not 1")),
    }
}

/// Authenticates the `STORE` file under the newest version of the service key, as it is otherwise.
pub(super) fn rewrite_identity(disk: &dyn Disk, dir: &Path, keyring: &Keyring) -> Result<()> {
    let document = load_identity(disk, dir, keyring)?;
    put_identity(disk, dir, keyring, Document { features: Features::default(), ..document })
}

pub(super) fn write_identity(
    disk: &dyn Disk,
    dir: &Path,
    store: StoreId,
    keyring: &Keyring,
    now_us: u64,
) -> Result<()> {
    let body = StoreBody { created_us: now_us, keyring: keyring.id() };
    let document = Document {
        kind: DocumentKind::Store,
        features: Features::default(),
        store,
        subject: [0; 16],
        generation: 1,
        keyring_version: keyring.newest(),
        a: serde_json::to_vec(&body).expect("plain data always serializes"),
        b: Vec::new(),
        tag_b: None,
    };
    put_identity(disk, dir, keyring, document)
}

fn put_identity(disk: &dyn Disk, dir: &Path, keyring: &Keyring, document: Document) -> Result<()> {
    let path = identity_path(dir);
    let document = Document { keyring_version: keyring.newest(), ..document };
    let bytes = document.seal(&keyring.document_key(keyring.newest())?);
    io::write_file(disk, &path, &bytes, Existing::Replace).map_err(Error::io("write", &path))
}

impl StoreShared {
    /// The path of the catalogue, for messages.
    pub(super) fn catalogue_path(&self) -> PathBuf {
        self.catalogue.path()
    }

    /// Lets go of the advisory lock.
    pub(super) fn unlock(&self) {
        if let Some(held) = lock(&self.held).take() {
            held.release();
        }
    }
}
