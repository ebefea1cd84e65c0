//! The gate: the data keys of one Logstore in memory, and the only way to use them.
//!
//! A use of a key asks the leases first ([`Gate::admit`]), unwraps the data key if it is not in
//! memory, and holds the keys for reading while the closure of the caller runs. Only the sealing of
//! segments after a loss asks no lease ([`Gate::with_held`]). A wipe takes the keys for writing. So
//! it waits for the uses under way, which last for one block each, and no use touches a key after
//! it.
//!
//! A key that is on its way into memory while the lease is lost arrives after the wipe. The gate
//! therefore asks the lease again after each insert ([`Gate::may_stay`]) and removes the key if the
//! lease was lost.
//!
//! A loss wipes the keys in two steps. [`Gate::lose`] wipes everything but the keys of segments
//! that are being written, with which the shards seal acknowledged groups. Each of those keys goes
//! with its segment, and at the latest at a deadline ([`Gate::end_segments_before`]).

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    sync::{Arc, OnceLock, Weak},
    time::Duration,
};

use super::{
    envelope::{EnvelopeIdentity, KeysSection, TaggedKeys, fingerprint},
    keyring::Keyring,
    lease::{Lease, Probe},
    service_key::ServiceKey,
};
use crate::{
    Error, Result,
    config::LogstoreName,
    crypto::{CryptoProvider, SecretKey, SegmentCipher, Suite, tags_equal},
    error::Location,
    ids::{LogstoreId, SegmentId, StoreId, hex_decode},
    io::Clock,
    key_status::{KeyState, KeyStatus, Refusal},
    kms::Cmk,
    metrics::{Counters, LogstoreMetrics},
    segment::{DecodedHeader, KeySource, SegmentHeader},
    sync::{
        LockRank, Mutex, RwLock,
        atomic::{AtomicU64, Ordering},
        lock, read, write,
    },
};

/// The most segment keys that a Logstore keeps derived. More are derived again when needed.
const CIPHERS_MAX: usize = 512;

/// Plaintext that is wiped together with the keys.
pub(crate) trait KeptPlaintext: Send + Sync {
    /// Overwrites it.
    fn wipe(&self);
}

/// A store that is open for reading beside a writer.
pub(crate) trait FollowWriter: Send + Sync {
    /// Takes in the writer's changes to the metadata of this Logstore. Reads files.
    ///
    /// # Errors
    /// The Logstore was deleted, or its metadata cannot be read.
    fn catch_up(&self, name: &LogstoreName, id: LogstoreId) -> Result<()>;
}

/// The number of losses of the keys that a gate depends on: the sum of the epochs of its leases and
/// the losses of the service key. No term ever decreases, so the era changes whenever a term does.
/// Keys that were loaded in one era are not used in another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct KeyEra(u64);

/// The state that the gates of a store share.
pub(crate) struct KeyContext {
    pub(crate) store: StoreId,
    pub(crate) provider: Arc<dyn CryptoProvider>,
    pub(crate) service: Arc<ServiceKey>,
    /// The process that opened the store.
    pub(crate) pid: u32,
    pub(crate) counters: Arc<Counters>,
}

impl KeyContext {
    /// Refuses a handle that came through `fork`: parent and child would use the same sequence
    /// numbers.
    pub(crate) fn check_process(&self) -> Result<()> {
        if std::process::id() == self.pid { Ok(()) } else { Err(Error::Forked) }
    }
}

/// The keys of a Logstore, replaced as a whole when the metadata changes.
#[derive(Clone, Default)]
pub(crate) struct GateKeys {
    pub(crate) section: Option<Arc<KeysSection>>,
    pub(crate) lease: Option<Arc<Lease>>,
    /// The standby lease of the Logstore's own envelopes, beside a shared lease.
    pub(crate) standby: Option<Arc<Lease>>,
    /// The section as its file has it, under a customer's key, until the current data key has
    /// proved it. The gate uses no key before.
    pub(crate) unproved: Option<Arc<TaggedKeys>>,
}

impl GateKeys {
    /// The leases that an operation needs.
    pub(crate) fn leases(&self) -> impl Iterator<Item = &Arc<Lease>> {
        self.lease.iter().chain(&self.standby)
    }
}

/// The keys of one Logstore.
pub(crate) struct Gate {
    context: Arc<KeyContext>,
    name: LogstoreName,
    id: LogstoreId,
    keys: RwLock<GateKeys>,
    held: RwLock<Held>,
    /// Taken while a data key is unwrapped, so that threads that need the same key make one call.
    loading: Mutex<()>,
    /// The plaintext that open readers have read ahead.
    kept: Mutex<Vec<Weak<dyn KeptPlaintext>>>,
    /// The name of the thing that was closed or deleted, once it was.
    closed: OnceLock<&'static str>,
    /// Why no segment may begin: the engine does not know which key it would have to be under.
    halted: Mutex<Option<Error>>,
    /// Set in a store that is open for reading. The metadata in memory may be older than the
    /// writer's.
    writer_watch: OnceLock<WriterWatch>,
    /// How many readers are in a segment under each key, dropped segments included.
    readers: Mutex<BTreeMap<KeySource, usize>>,
    used: Used,
}

/// How often and for how much the keys were used, since the Logstore was opened.
#[derive(Default)]
struct Used {
    bytes_read: AtomicU64,
    refusals: AtomicU64,
}

/// A reader is in a segment under a key as long as this lives.
pub(crate) struct InUse {
    gate: Arc<Gate>,
    source: KeySource,
}

impl Drop for InUse {
    fn drop(&mut self) {
        let mut readers = lock(&self.gate.readers);
        if let Some(count) = readers.get_mut(&self.source) {
            *count -= 1;
            if *count == 0 {
                readers.remove(&self.source);
            }
        }
    }
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gate")
            .field("name", &self.name)
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl Gate {
    pub(crate) fn new(
        context: Arc<KeyContext>,
        name: LogstoreName,
        id: LogstoreId,
        keys: GateKeys,
    ) -> Self {
        Self {
            context,
            name,
            id,
            keys: RwLock::new(LockRank::GateKeys, keys),
            held: RwLock::new(LockRank::GateHeld, Held::default()),
            loading: Mutex::new(LockRank::GateLoading, ()),
            kept: Mutex::new(LockRank::GateKept, Vec::new()),
            closed: OnceLock::new(),
            halted: Mutex::new(LockRank::GateHalted, None),
            writer_watch: OnceLock::new(),
            readers: Mutex::new(LockRank::GateReaders, BTreeMap::new()),
            used: Used::default(),
        }
    }

    /// Notes that a reader is in a segment under this key, until the returned value is dropped.
    pub(crate) fn mark_in_use(self: &Arc<Self>, source: KeySource) -> InUse {
        *lock(&self.readers).entry(source).or_default() += 1;
        InUse { gate: Arc::clone(self), source }
    }

    /// How many readers of this process are in segments under this key.
    pub(crate) fn readers(&self, source: KeySource) -> usize {
        lock(&self.readers).get(&source).copied().unwrap_or(0)
    }

    pub(crate) fn context(&self) -> &Arc<KeyContext> {
        &self.context
    }

    pub(crate) fn id(&self) -> LogstoreId {
        self.id
    }

    pub(crate) fn name(&self) -> &LogstoreName {
        &self.name
    }

    pub(crate) fn keys(&self) -> GateKeys {
        read(&self.keys).clone()
    }

    /// Takes new keys: a first enable, a rotation, a replacement. Wipes the loaded data keys.
    pub(crate) fn replace_keys(&self, keys: GateKeys) {
        let mut held = write(&self.held);
        *write(&self.keys) = keys;
        held.forget_loaded();
    }

    /// Admits an operation that starts now. Returns the era of the keys. Blocks for a KMS call if
    /// the last answer of the KMS is too old. The service key comes first: it authenticates the
    /// metadata.
    ///
    /// # Errors
    /// The error of the refused operation.
    pub(crate) fn admit(&self) -> Result<KeyEra> {
        self.context.check_process()?;
        if let Some(what) = self.closed.get() {
            return Err(Error::Closed(what));
        }
        let mut era = self.context.service.admit()?;
        if let Some(watch) = self.writer_watch.get() {
            watch.catch_up_if_due(self)?;
        }
        let (lease, standby) = {
            let keys = read(&self.keys);
            (keys.lease.clone(), keys.standby.clone())
        };
        for lease in lease.iter().chain(&standby) {
            era += lease.admit().map_err(|refusal| {
                self.context.counters.refused(&refusal);
                self.used.refusals.fetch_add(1, Ordering::Relaxed);
                self.refused(&refusal, lease.cmk())
            })?;
        }
        Ok(KeyEra(era))
    }

    /// Counts a block that was opened to be read.
    pub(crate) fn count_read(&self, suite: Suite, bytes: u64) {
        self.context.counters.read(suite, bytes);
        self.used.bytes_read.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Adds the figures of the keys.
    pub(crate) fn add_to(&self, metrics: &mut LogstoreMetrics) {
        metrics.bytes_read += self.used.bytes_read.load(Ordering::Relaxed);
        metrics.refusals += self.used.refusals.load(Ordering::Relaxed);
    }

    /// Whether [`Gate::admit`] decides without a KMS call, now and for a while. If not, starts a
    /// call, and does not wait for it.
    pub(crate) fn decides_or_asks(&self) -> bool {
        let keys = self.keys();
        let service = &self.context.service;
        self.is_closed()
            || (service.decides_or_asks() && keys.leases().all(|lease| lease.decides_or_asks()))
    }

    /// Whether a use of the keys may call a KMS.
    pub(crate) fn may_call_a_kms(&self) -> bool {
        self.context.service.lease().is_some() || self.keys().leases().next().is_some()
    }

    /// The error of an operation that the lease refuses.
    pub(crate) fn refused(&self, refusal: &Refusal, cmk: &Cmk) -> Error {
        let (logstore, cmk_id) = (self.name.clone(), cmk.cmk_key_id.clone());
        match refusal {
            Refusal::Revoked(reason) => Error::Revoked { logstore, cmk: cmk_id, reason: *reason },
            Refusal::Unreachable(detail) => Error::KmsUnreachable {
                logstore,
                cmk: cmk_id,
                region: cmk.region_id.clone(),
                detail: detail.clone(),
            },
            Refusal::Invalid(detail) => {
                Error::KmsInvalid { logstore, cmk: cmk_id, detail: detail.clone() }
            }
        }
    }

    pub(crate) fn status(&self) -> KeyStatus {
        let keys = self.keys();
        match (&keys.section, &keys.lease) {
            (None, _) => KeyStatus { state: KeyState::None, lease_left: None },
            (Some(_), None) => self.context.service.status(),
            (Some(_), Some(lease)) => match &keys.standby {
                Some(standby) if standby.told().is_some_and(|told| told.is_err()) => {
                    standby.status()
                }
                _ => lease.status(),
            },
        }
    }

    /// Calls `use_it` with the key of an existing segment. A key that has to be derived is checked
    /// against the commitment in the header first. Blocks for KMS calls.
    pub(crate) fn with_cipher<R>(
        &self,
        segment: &DecodedHeader,
        path: &Path,
        use_it: impl FnOnce(&SegmentCipher) -> Result<R>,
    ) -> Result<R> {
        let era = self.admit()?;
        loop {
            {
                let held = read(&self.held);
                // A key serves only the header that it was derived for. The ids of segments come
                // from a disk and may repeat.
                let its_own = |cipher: &&SegmentCipher| {
                    *cipher.header_hash() == segment.header_hash
                        && tags_equal(cipher.commitment(), &segment.commitment)
                };
                let reading = held.reading.get(&segment.header.segment);
                let reading = reading.filter(|_| held.era == era);
                let writing = held.writing.get(&segment.header.segment);
                let writing = writing.map(|writing| &writing.cipher);
                if let Some(cipher) = writing.filter(its_own).or(reading.filter(its_own)) {
                    return use_it(cipher);
                }
            }
            let derived = self.derive(era, &segment.header, &segment.header_hash, true)?;
            let Some(cipher) = derived else { return self.with_cipher(segment, path, use_it) };
            if !tags_equal(cipher.commitment(), &segment.commitment) {
                return Err(Error::WrongKey { at: Location::new(path, 0) });
            }
            {
                let mut held = write(&self.held);
                if held.era == era {
                    held.keep(segment.header.segment, cipher);
                }
            }
            if !self.may_stay(era)? {
                return self.with_cipher(segment, path, use_it);
            }
        }
    }

    /// Calls `use_it` with the key of a segment that is being written, although the lease no longer
    /// admits it: to seal acknowledged groups before the wipe. `None` if the key is gone.
    pub(crate) fn with_held<R>(
        &self,
        segment: SegmentId,
        use_it: impl FnOnce(&SegmentCipher) -> R,
    ) -> Option<R> {
        read(&self.held).writing.get(&segment).map(|writing| use_it(&writing.cipher))
    }

    /// Whether a segment under this key can begin without an unwrap at a customer's KMS.
    pub(crate) fn has_key(&self, source: KeySource) -> bool {
        let under_cmk = read(&self.keys).lease.is_some();
        let held = read(&self.held);
        let loaded = match source {
            KeySource::Keyring(_) => true,
            KeySource::DataKey(version) => {
                self.is_still_in(held.era) && held.data.contains_key(&version)
            }
        };
        !under_cmk || (loaded && !self.is_unproved())
    }

    /// Derives and keeps the key of a new segment, whose header is about to be written. Returns the
    /// commitment, and how often the key has been lost so far. Blocks for KMS calls. Unless
    /// `may_load`, refuses to unwrap a data key at a customer's KMS.
    pub(crate) fn begin_segment(
        &self,
        header: &SegmentHeader,
        header_hash: &[u8; 32],
        may_load: bool,
    ) -> Result<([u8; 32], u64)> {
        if let Some(error) = &*lock(&self.halted) {
            return Err(error.clone());
        }
        loop {
            let era = self.admit()?;
            let derived = self.derive(era, header, header_hash, may_load)?;
            let Some(cipher) = derived else { continue };
            let commitment = *cipher.commitment();
            let losses = {
                let mut held = write(&self.held);
                let (shard, losses) = (header.shard, held.losses);
                held.writing.insert(header.segment, Writing { cipher, shard, losses });
                losses
            };
            // If the lease was lost before the insert, the wipe has missed this key.
            if self.is_still_in(era) {
                let admitted = self.admit();
                if matches!(admitted, Ok(now) if now == era) {
                    return Ok((commitment, losses));
                }
            }
            self.end_segment(header.segment);
        }
    }

    /// Forgets the key of a segment whose writing has ended.
    pub(crate) fn end_segment(&self, segment: SegmentId) {
        write(&self.held).writing.remove(&segment);
    }

    /// Forgets the keys of the segments of a shard that were begun before the `losses`-th loss of
    /// the key.
    pub(crate) fn end_segments_before(&self, losses: u64, shard: u32) {
        let stays = |writing: &Writing| writing.shard != shard || writing.losses >= losses;
        write(&self.held).writing.retain(|_, writing| stays(writing));
    }

    /// Lets no segment begin until [`Gate::resume`]: its key is not known.
    pub(crate) fn halt(&self, error: &Error) {
        *lock(&self.halted) = Some(error.clone());
    }

    /// Lets segments begin again.
    pub(crate) fn resume(&self) {
        *lock(&self.halted) = None;
    }

    /// Whether the current data key has still to prove the keys section.
    pub(crate) fn is_unproved(&self) -> bool {
        read(&self.keys).unproved.is_some()
    }

    /// Proves the keys section by the current data key, unless that is done. The caller has called
    /// [`Gate::admit`]. Blocks for a KMS call.
    pub(crate) fn prove(&self) -> Result<()> {
        match self.unproved_version() {
            Some(current) => self.unwrap(current).map(|_| ()),
            None => Ok(()),
        }
    }

    /// The current version of a keys section that is not proved yet.
    fn unproved_version(&self) -> Option<u32> {
        let keys = read(&self.keys);
        keys.section.as_ref().filter(|_| keys.unproved.is_some()).map(|section| section.current)
    }

    /// The key of a segment. `None` if the lease was lost in between and is back: the caller begins
    /// again.
    fn derive(
        &self,
        era: KeyEra,
        header: &SegmentHeader,
        header_hash: &[u8; 32],
        may_load: bool,
    ) -> Result<Option<SegmentCipher>> {
        let load = |version| {
            if !may_load {
                self.refuse_load()?;
            }
            self.load(era, version)
        };
        let provider = &*self.context.provider;
        let derive = |key: &SecretKey| {
            let (suite, salt) = (header.suite, &header.salt);
            let cipher = SegmentCipher::derive(provider, suite, key, salt, header_hash);
            cipher.map(Some).map_err(Error::Crypto)
        };
        match header.key_source {
            KeySource::Keyring(version) => {
                // Under a customer's key, the data key authenticates the list of segments under the
                // keyring, so prove that list first.
                if let Some(current) = self.unproved_version()
                    && !load(current)?
                {
                    return Ok(None);
                }
                write(&self.held).enter(era);
                let integrity_key = |keyring: &Keyring| keyring.integrity_key(version, self.id);
                derive(&self.context.service.with_keyring(integrity_key)?)
            }
            KeySource::DataKey(version) => loop {
                {
                    let held = read(&self.held);
                    if held.era == era
                        && !self.is_unproved()
                        && let Some(key) = held.data.get(&version)
                    {
                        return derive(key);
                    }
                }
                if !load(version)? {
                    return Ok(None);
                }
            },
        }
    }

    /// Refuses to unwrap a data key that is not in memory, if its envelope is at a customer's KMS.
    fn refuse_load(&self) -> Result<()> {
        let Some(lease) = self.keys().lease else { return Ok(()) };
        // A loss has wiped it. If the key is still lost, that is the error.
        self.admit()?;
        let wiped = "the data key was wiped while a segment began".to_owned();
        Err(self.refused(&Refusal::Unreachable(wiped), lease.cmk()))
    }

    /// Unwraps a data key and keeps it under `era`. `false` if another era has begun.
    fn load(&self, era: KeyEra, version: u32) -> Result<bool> {
        // Before the lock: this may notify the Logstore of a lost lease, which takes other locks.
        self.catch_up_for(version)?;
        {
            let _once = lock(&self.loading);
            {
                let held = read(&self.held);
                let loaded = held.era == era && held.data.contains_key(&version);
                if loaded && !self.is_unproved() {
                    return Ok(true);
                }
            }
            let key = self.unwrap_known(version)?;
            let mut held = write(&self.held);
            held.enter(era);
            held.data.insert(version, key);
        }
        self.may_stay(era)
    }

    /// Asks the lease again after a key was inserted under `era`. If the lease was lost between
    /// the admission and the insert, the wipe has already run and will not run again. So this
    /// removes the key and returns `false`, or the error of the refusal.
    fn may_stay(&self, era: KeyEra) -> Result<bool> {
        let forget = || {
            let mut held = write(&self.held);
            if held.era == era {
                held.forget_loaded();
            }
        };
        // Before the admission, which may wait for the KMS.
        if !self.is_still_in(era) {
            forget();
        }
        let admitted = self.admit();
        if matches!(admitted, Ok(now) if now == era) {
            return Ok(true);
        }
        forget();
        admitted.map(|_| false)
    }

    /// Whether the era that [`Gate::admit`] returned is still the present one. Calls no KMS.
    pub(crate) fn is_still_in(&self, era: KeyEra) -> bool {
        let of_leases: u64 = read(&self.keys).leases().map(|lease| lease.epoch()).sum();
        KeyEra(self.context.service.losses() + of_leases) == era
    }

    /// Unwraps a data key from its envelope, with the keyring or at the KMS. Under a customer's key
    /// the current data key proves the keys section first.
    pub(crate) fn unwrap(&self, version: u32) -> Result<SecretKey> {
        self.catch_up_for(version)?;
        self.unwrap_known(version)
    }

    /// In a read-only opener, takes in the writer's changes if a data-key version is not known.
    /// Reads files.
    fn catch_up_for(&self, version: u32) -> Result<()> {
        let keys = self.keys();
        let known = keys.section.is_some_and(|section| section.version(version).is_some());
        if known { Ok(()) } else { self.catch_up() }
    }

    fn unwrap_known(&self, version: u32) -> Result<SecretKey> {
        let keys = self.keys();
        if let (Some(tagged), Some(section)) = (&keys.unproved, &keys.section) {
            let current = self.unwrap_from(&keys, section.current)?;
            tagged.prove(&current)?;
            // Unless other keys have come in meanwhile.
            let same = |unproved: &mut Arc<TaggedKeys>| Arc::ptr_eq(unproved, tagged);
            drop(write(&self.keys).unproved.take_if(same));
            if version == section.current {
                return Ok(current);
            }
        }
        self.unwrap_from(&keys, version)
    }

    /// The error about a data-key version that the metadata does not have.
    pub(crate) fn version_missing(&self, version: u32) -> Error {
        let name = &self.name;
        let what = format!("data-key version {version} of Logstore {name} is not in its metadata");
        Error::RolledBack { what }
    }

    fn unwrap_from(&self, keys: &GateKeys, version: u32) -> Result<SecretKey> {
        let missing = || self.version_missing(version);
        let section = keys.section.as_ref().ok_or_else(missing)?;
        let entry = section.version(version).ok_or_else(missing)?;
        let Some(wrapped) = &entry.wrapped else {
            return Err(Error::Shredded { logstore: self.name.clone(), version });
        };
        let damaged = |what: &str| Error::Corrupt {
            at: Location::new("", 0),
            what: format!("{what} of {}", self.name),
        };
        let wrong_key = || {
            let envelope = format!("envelope {version} of {}", self.name);
            Error::WrongKey { at: Location::new(envelope, 0) }
        };
        let wrapped = hex_decode(wrapped)
            .ok_or_else(|| damaged("an envelope does not parse in the metadata"))?;
        let identity = self.identity(section, version);
        let provider = &*self.context.provider;
        let key = match (entry.keyring_version, &keys.lease) {
            (Some(under), _) => self
                .context
                .service
                .with_keyring(|keyring| keyring.unwrap(provider, under, &identity, &wrapped))?
                .ok_or_else(wrong_key)?,
            (None, Some(lease)) => {
                let refused = keys.standby.as_ref().unwrap_or(lease);
                let fingerprint = entry.fingerprint.clone();
                let probe = Probe { wrapped, context: identity.context(), fingerprint };
                self.unwrap_at_kms(lease, refused, probe)?
            }
            (None, None) => return Err(damaged("an envelope has no key to unwrap it")),
        };
        if fingerprint(&key) == entry.fingerprint {
            return Ok(key);
        }
        match &keys.lease {
            Some(lease) => {
                let wrong = Refusal::Invalid("it unwrapped an envelope to another key".to_owned());
                Err(self.refused(&wrong, lease.cmk()))
            }
            None => Err(wrong_key()),
        }
    }

    /// Unwraps an envelope at the KMS. If the KMS refuses the envelope, `refused` is the lease that
    /// is lost, and the envelope becomes its probe.
    fn unwrap_at_kms(&self, lease: &Lease, refused: &Lease, probe: Probe) -> Result<SecretKey> {
        let sent = lease.now();
        lease.unwrap_envelope(probe.context.clone(), &probe.wrapped).map_err(|error| {
            let refusal = Refusal::from(&error);
            if matches!(refusal, Refusal::Revoked(_)) {
                refused.take_in_refusal(sent, refusal.clone(), probe);
            }
            self.refused(&refusal, lease.cmk())
        })
    }

    pub(crate) fn identity(&self, section: &KeysSection, version: u32) -> EnvelopeIdentity {
        let suite = section.encrypt_type.suite();
        EnvelopeIdentity { store: self.context.store, logstore: self.id, version, suite }
    }

    /// In a read-only opener, takes in the writer's changes. Does nothing in the writer's process.
    /// Reads files.
    pub(crate) fn catch_up(&self) -> Result<()> {
        self.writer_watch.get().map_or(Ok(()), |watch| watch.catch_up(self))
    }

    /// In a read-only opener, takes in the writer's changes from now on: every `every` by the
    /// uptime, and when a data-key version is not known.
    pub(crate) fn follow_with(
        &self,
        writer: Weak<dyn FollowWriter>,
        clock: Arc<dyn Clock>,
        every: Duration,
    ) {
        let at = Mutex::new(LockRank::FollowedAt, clock.uptime());
        // Set once, where the gate is made.
        let _ = self.writer_watch.set(WriterWatch { writer, clock, every, at });
    }

    /// Admits nothing from now on, and wipes: `what` is closed or deleted. Open readers end too.
    pub(crate) fn close(&self, what: &'static str) {
        // The first close names the reason.
        let _ = self.closed.set(what);
        {
            let mut held = write(&self.held);
            held.forget_loaded();
            held.writing.clear();
        }
        self.wipe_kept();
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.get().is_some()
    }

    /// The lease is lost: wipes the data keys, the keys of segments that are being read, and the
    /// plaintext that open readers have read ahead. Waits for the uses under way, which make no
    /// system call. Returns how often the key has been lost so far.
    pub(crate) fn lose(&self) -> u64 {
        let losses = {
            let mut held = write(&self.held);
            held.forget_loaded();
            held.losses += 1;
            held.losses
        };
        self.wipe_kept();
        losses
    }

    /// Whether the lease admits no operation now, as far as is known. Calls no KMS.
    pub(crate) fn is_lost(&self) -> bool {
        !self.context.service.is_usable() || read(&self.keys).leases().any(|lease| lease.is_lost())
    }

    /// How often the key has been lost so far.
    pub(crate) fn losses(&self) -> u64 {
        read(&self.held).losses
    }

    fn wipe_kept(&self) {
        let kept: Vec<_> = lock(&self.kept).iter().filter_map(Weak::upgrade).collect();
        kept.iter().for_each(|plaintext| plaintext.wipe());
    }

    /// From now on each wipe of the keys wipes this plaintext too, as long as it lives. After each
    /// addition to the plaintext, its owner must call [`Gate::is_still_in`] and wipe if the era has
    /// changed: the wipe may have run just before.
    pub(crate) fn keep(&self, plaintext: Weak<dyn KeptPlaintext>) {
        let mut kept = lock(&self.kept);
        kept.retain(|other| other.strong_count() > 0);
        kept.push(plaintext);
    }
}

/// Keeps a Logstore of a read-only opener up to date with its writer.
struct WriterWatch {
    writer: Weak<dyn FollowWriter>,
    clock: Arc<dyn Clock>,
    every: Duration,
    /// When it last caught up, by the uptime.
    at: Mutex<Duration>,
}

impl WriterWatch {
    fn catch_up_if_due(&self, gate: &Gate) -> Result<()> {
        let due = self.clock.uptime() >= *lock(&self.at) + self.every;
        match due {
            true => self.catch_up(gate),
            false if self.writer.strong_count() == 0 => Err(Error::Closed("the store")),
            false => Ok(()),
        }
    }

    fn catch_up(&self, gate: &Gate) -> Result<()> {
        let writer = self.writer.upgrade().ok_or(Error::Closed("the store"))?;
        let now = self.clock.uptime();
        writer.catch_up(&gate.name, gate.id)?;
        *lock(&self.at) = now;
        Ok(())
    }
}

/// The keys in memory.
#[derive(Default)]
struct Held {
    /// The era in which `data` and `reading` were loaded.
    era: KeyEra,
    /// The data keys, by version.
    data: BTreeMap<u32, SecretKey>,
    /// The keys of segments that are being read.
    reading: HashMap<SegmentId, SegmentCipher>,
    /// The keys of segments that are being written. When the lease is lost, each stays until its
    /// segment is sealed, or until the deadline for that.
    writing: HashMap<SegmentId, Writing>,
    /// How often the lease was lost.
    losses: u64,
}

/// The key of a segment that is being written.
struct Writing {
    cipher: SegmentCipher,
    shard: u32,
    /// How often the lease had been lost when the segment was begun.
    losses: u64,
}

impl Held {
    /// Drops the keys that were loaded in another era.
    fn enter(&mut self, era: KeyEra) {
        if self.era != era {
            self.era = era;
            self.forget_loaded();
        }
    }

    /// Keeps the key of a segment that is being read.
    fn keep(&mut self, segment: SegmentId, cipher: SegmentCipher) {
        if self.reading.len() >= CIPHERS_MAX {
            self.reading.clear();
        }
        self.reading.insert(segment, cipher);
    }

    /// Drops every key that can be loaded again.
    fn forget_loaded(&mut self) {
        self.data.clear();
        self.reading.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        crypto::{HashAlg, RustCrypto, Suite},
        segment::{Features, Predecessor},
    };

    fn gate(pid: u32) -> Arc<Gate> {
        let dir = tempfile::tempdir().unwrap();
        let store = StoreId::from_bytes([1; 16]);
        let keyring = Keyring::for_tests(&dir.path().join("keyring"), store);
        let context = KeyContext {
            store,
            provider: Arc::new(RustCrypto::new()),
            service: ServiceKey::for_tests(keyring),
            pid,
            counters: Arc::default(),
        };
        let id = LogstoreId::from_bytes([2; 16]);
        Arc::new(Gate::new(Arc::new(context), "p/l".parse().unwrap(), id, GateKeys::default()))
    }

    /// A child process finds the process id of its parent in its copy of the memory.
    #[test]
    fn a_gate_that_came_through_fork_admits_nothing() {
        assert_eq!(gate(std::process::id()).admit().unwrap(), KeyEra(0));
        let forked = gate(std::process::id().wrapping_add(1));
        assert!(matches!(forked.admit(), Err(Error::Forked)));
        assert!(matches!(forked.context().check_process(), Err(Error::Forked)));
    }

    #[test]
    fn readers_are_counted_under_each_key() {
        let gate = gate(std::process::id());
        let [old, new] = [KeySource::DataKey(1), KeySource::DataKey(2)];
        let counts = || [old, new].map(|source| gate.readers(source));
        let (first, second, other) =
            (gate.mark_in_use(old), gate.mark_in_use(old), gate.mark_in_use(new));
        assert_eq!(counts(), [2, 1]);
        drop(first);
        assert_eq!(counts(), [1, 1]);
        drop((second, other));
        assert_eq!(counts(), [0, 0]);
        assert!(lock(&gate.readers).is_empty());
    }

    #[test]
    fn loaded_keys_are_limited_and_held_in_one_era() {
        let mut held = Held::default();
        let key = SecretKey::from_bytes(&mut [3; 32]);
        let keep = |held: &mut Held, n: u128| {
            let cipher = SegmentCipher::derive(
                &RustCrypto::new(),
                Suite::Aes256Gcm,
                &key,
                &[4; 32],
                &[5; 32],
            );
            held.keep(SegmentId::from_bytes(n.to_le_bytes()), cipher.unwrap());
            held.reading.len()
        };
        for n in 1..=CIPHERS_MAX {
            assert_eq!(keep(&mut held, n as u128), n);
        }
        assert_eq!(keep(&mut held, 0), 1);
        held.data.insert(1, key.duplicate());
        held.enter(KeyEra(0));
        assert_eq!((held.data.len(), held.reading.len()), (1, 1));
        held.enter(KeyEra(1));
        assert_eq!((held.era, held.data.len(), held.reading.len()), (KeyEra(1), 0, 0));
    }

    /// A loss wipes before a key on its way comes in, and does not wipe again.
    #[test]
    fn a_key_stays_only_in_the_era_of_its_insertion() {
        let gate = gate(std::process::id());
        let put = |era| {
            let mut held = write(&gate.held);
            held.enter(KeyEra(era));
            held.data.insert(1, SecretKey::from_bytes(&mut [3; 32]));
        };
        let left = || read(&gate.held).data.len();
        put(0);
        assert!(gate.may_stay(KeyEra(0)).unwrap());
        assert_eq!(left(), 1);
        put(7);
        // A key of another era stays.
        assert!(!gate.may_stay(KeyEra(6)).unwrap());
        assert_eq!(left(), 1);
        assert!(!gate.may_stay(KeyEra(7)).unwrap());
        assert_eq!(left(), 0);
        put(0);
        gate.closed.set("it").unwrap();
        assert!(matches!(gate.may_stay(KeyEra(0)), Err(Error::Closed("it"))));
        assert_eq!(left(), 0);
    }

    #[test]
    fn a_key_serves_no_header_but_its_own() {
        let gate = gate(std::process::id());
        let header = SegmentHeader {
            suite: Suite::Aes256Gmac,
            features: Features::default(),
            shard: 0,
            store: gate.context.store,
            logstore: gate.id,
            segment: SegmentId::from_bytes([3; 16]),
            generation: 1,
            ordinal: 1,
            first_seq: 1,
            limit_seq: 100,
            created_us: 1,
            key_source: KeySource::Keyring(1),
            salt: [4; 32],
            predecessor: Predecessor::None,
            payload_hash: HashAlg::Sha256,
            setbacks: 0,
            epoch: 1,
            latest_us: 0,
            extensions: Vec::new(),
        };
        let (commitment, _) = gate.begin_segment(&header, &[5; 32], true).unwrap();
        let uses = |header_hash: u8, commitment: [u8; 32]| {
            let segment = DecodedHeader {
                header: header.clone(),
                header_hash: [header_hash; 32],
                commitment,
                body_start: 512,
            };
            gate.with_cipher(&segment, Path::new("segment"), |cipher| Ok(*cipher.header_hash()))
        };
        // First the key for writing, then, once that is gone, the key for reading.
        for held in [true, false] {
            assert_eq!(uses(5, commitment).unwrap(), [5; 32]);
            assert!(matches!(uses(6, commitment), Err(Error::WrongKey { .. })));
            assert!(matches!(uses(5, [0; 32]), Err(Error::WrongKey { .. })));
            assert_eq!(gate.with_held(header.segment, |_| ()).is_some(), held);
            gate.end_segment(header.segment);
        }
    }

    struct Kept(Mutex<u32>);

    impl KeptPlaintext for Kept {
        fn wipe(&self) {
            *lock(&self.0) += 1;
        }
    }

    #[test]
    fn plaintext_that_is_kept_goes_with_the_keys() {
        let gate = gate(std::process::id());
        let kept = [(); 3].map(|()| Arc::new(Kept(Mutex::default())));
        let keep = |kept: &Arc<Kept>| {
            let weak: Weak<Kept> = Arc::downgrade(kept);
            gate.keep(weak);
        };
        keep(&kept[0]);
        keep(&kept[1]);
        let [first, second, third] = kept;
        drop(second);
        keep(&third);
        assert_eq!(lock(&gate.kept).len(), 2);
        assert_eq!(gate.lose(), 1);
        assert_eq!([first, third].map(|kept| *lock(&kept.0)), [1, 1]);
    }
}
