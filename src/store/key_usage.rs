//! The uses of every key, and so the keys that may be destroyed.
//!
//! The answers err on the side of keeping a key: an object that cannot be checked is reported as a
//! use of every key that it may need.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::{Path, PathBuf},
};

use serde::Serialize;

use super::{catalogue::load_newest, core::Core, env::StoreEnv, identity::identity_path};
use crate::{
    Error, Result,
    config::LogstoreName,
    document::{DOCUMENT_BYTES_MAX, UnverifiedDocument},
    ids::LogstoreId,
    io::{self, Disk},
    keys::envelope::{DataKeyVersion, KeysSection},
    kms::Cmk,
    logstore::{DataKeyStatus, LogstoreShared},
    segment::KeySource,
};

/// A use of a key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "what", rename_all = "snake_case")]
#[non_exhaustive]
pub enum KeyNeed {
    /// New data is encrypted, wrapped or tagged with the key.
    Current,
    /// Segments under the key, or under a key that it wraps.
    Segments {
        /// The number of segments.
        segments: u64,
        /// Their size on disk, in bytes.
        bytes: u64,
    },
    /// Segments under the key that are being written, or that no process has sealed yet.
    Writing {
        /// The number of segments.
        segments: u64,
    },
    /// Readers of this process in segments under the key, also in segments that retention has
    /// dropped.
    Readers {
        /// The number of readers.
        readers: u64,
    },
    /// Envelopes that the key has wrapped.
    Envelopes {
        /// The number of envelopes.
        envelopes: u64,
    },
    /// The tag that authenticates the metadata of the Logstore without the keyring.
    MetadataTag,
    /// Documents of the store that the key has tagged.
    Documents {
        /// The number of documents.
        documents: u64,
    },
    /// Records of the key audit log that the key has tagged.
    AuditRecords {
        /// The number of records.
        records: u64,
    },
    /// An object could not be checked.
    Unknown {
        /// The object and the reason.
        detail: String,
    },
}

impl fmt::Display for KeyNeed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |f: &mut fmt::Formatter<'_>, n: u64, what: &str| {
            write!(f, "{n} {what}{}", if n == 1 { "" } else { "s" })
        };
        match self {
            KeyNeed::Current => f.write_str("it is the current one"),
            KeyNeed::Segments { segments, .. } => count(f, *segments, "segment"),
            KeyNeed::Writing { segments } => {
                count(f, *segments, "segment")?;
                f.write_str(" not ended")
            }
            KeyNeed::Readers { readers } => count(f, *readers, "open reader"),
            KeyNeed::Envelopes { envelopes } => count(f, *envelopes, "envelope"),
            KeyNeed::MetadataTag => f.write_str("the second tag of the metadata"),
            KeyNeed::Documents { documents } => count(f, *documents, "document"),
            KeyNeed::AuditRecords { records } => count(f, *records, "audit record"),
            KeyNeed::Unknown { detail } => write!(f, "unknown: {detail}"),
        }
    }
}

/// One data-key version of a Logstore.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct DataKeyUsage {
    /// The Logstore.
    pub logstore: LogstoreName,
    /// The version, the key that wraps it, and the segments under it.
    #[serde(flatten)]
    pub status: DataKeyStatus,
    /// When it was made, in microseconds since the Unix epoch.
    pub created_us: u64,
    /// When its present envelope was made, in microseconds since the Unix epoch.
    pub wrapped_us: u64,
    /// The uses of the key.
    pub needed_for: Vec<KeyNeed>,
    /// Whether the key has no use, so that [`Keys::shred_data_keys`](crate::Keys::shred_data_keys)
    /// loses no kept data.
    pub safe_to_destroy: bool,
}

/// One version of a customer master key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct CmkVersionUsage {
    /// The version, as the KMS names it; `None` if the KMS does not report it.
    pub version: Option<String>,
    /// The number of data-key envelopes under it.
    pub envelopes: u64,
    /// When the oldest of these envelopes was wrapped, in microseconds since the Unix epoch. No
    /// envelope uses a version that the KMS replaced before this time.
    pub oldest_wrapped_us: Option<u64>,
    /// Whether the probe that renews the lease is under it.
    pub probe: bool,
}

/// One customer master key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct MasterKeyUsage {
    /// The master key, its region and the role.
    pub cmk: Cmk,
    /// The Logstores under it.
    pub logstores: Vec<LogstoreName>,
    /// Its versions that are in use.
    pub versions: Vec<CmkVersionUsage>,
    /// The number of segments of these Logstores under data keys.
    pub segments: u64,
    /// Their size on disk, in bytes.
    pub bytes: u64,
    /// The uses of the key.
    pub needed_for: Vec<KeyNeed>,
    /// Whether this store has no use of the key. Copies of the store (backups, snapshots) may have
    /// one.
    pub safe_to_destroy: bool,
}

impl MasterKeyUsage {
    fn new(cmk: Cmk) -> Self {
        Self {
            cmk,
            logstores: Vec::new(),
            versions: Vec::new(),
            segments: 0,
            bytes: 0,
            needed_for: Vec::new(),
            safe_to_destroy: false,
        }
    }

    fn version(&mut self, version: Option<String>) -> &mut CmkVersionUsage {
        let place = match self.versions.iter().position(|known| known.version == version) {
            Some(place) => place,
            None => {
                let usage = CmkVersionUsage {
                    version,
                    envelopes: 0,
                    oldest_wrapped_us: None,
                    probe: false,
                };
                self.versions.push(usage);
                self.versions.len() - 1
            }
        };
        &mut self.versions[place]
    }

    /// Lists the uses of the key.
    fn judge(mut self, unknown: &[KeyNeed]) -> Self {
        let envelopes = self.versions.iter().map(|version| version.envelopes).sum();
        if !self.logstores.is_empty() {
            self.needed_for.push(KeyNeed::Current);
        }
        if envelopes > 0 {
            self.needed_for.push(KeyNeed::Envelopes { envelopes });
        }
        if self.segments > 0 {
            self.needed_for.push(KeyNeed::Segments { segments: self.segments, bytes: self.bytes });
        }
        self.needed_for.extend_from_slice(unknown);
        self.safe_to_destroy = self.needed_for.is_empty();
        self
    }
}

/// One version of the service key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ServiceKeyUsage {
    /// The version.
    pub version: u32,
    /// Whether it wraps and tags new data.
    pub current: bool,
    /// Whether documents under it are accepted. If versions older than the current one are
    /// accepted, a rotation is unfinished.
    pub accepted: bool,
    /// When it was made, in microseconds since the Unix epoch.
    pub created_us: u64,
    /// The uses of the key.
    pub needed_for: Vec<KeyNeed>,
    /// Whether this store has no use of the key. Checkpoints outside the store may have one.
    pub safe_to_destroy: bool,
}

/// The uses of every key of a store.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct KeyUsage {
    /// The data keys of all Logstores.
    pub data_keys: Vec<DataKeyUsage>,
    /// The customer master keys, including those that have a probe in the store and no Logstore
    /// any more.
    pub master_keys: Vec<MasterKeyUsage>,
    /// The versions of the service key.
    pub service_keys: Vec<ServiceKeyUsage>,
    /// Whether a rotation of the service key is unfinished:
    /// [`Keys::rotate_service_key`](crate::Keys::rotate_service_key) continues it.
    pub service_rotation_unfinished: bool,
}

/// The segments under one key.
#[derive(Clone, Copy, Default)]
struct Under {
    segments: u64,
    bytes: u64,
    writing: u64,
}

impl Under {
    fn add(&mut self, other: Self) {
        self.segments += other.segments;
        self.bytes += other.bytes;
        self.writing += other.writing;
    }

    fn put_needs(self, needs: &mut Vec<KeyNeed>) {
        if self.segments > 0 {
            needs.push(KeyNeed::Segments { segments: self.segments, bytes: self.bytes });
        }
        if self.writing > 0 {
            needs.push(KeyNeed::Writing { segments: self.writing });
        }
    }
}

/// The counts for one version of the service key.
#[derive(Clone, Copy, Default)]
struct ServiceTally {
    envelopes: u64,
    documents: u64,
    records: u64,
    under: Under,
    readers: u64,
}

impl ServiceTally {
    fn put_needs(self, needs: &mut Vec<KeyNeed>) {
        if self.envelopes > 0 {
            needs.push(KeyNeed::Envelopes { envelopes: self.envelopes });
        }
        self.under.put_needs(needs);
        if self.readers > 0 {
            needs.push(KeyNeed::Readers { readers: self.readers });
        }
        if self.documents > 0 {
            needs.push(KeyNeed::Documents { documents: self.documents });
        }
        if self.records > 0 {
            needs.push(KeyNeed::AuditRecords { records: self.records });
        }
    }
}

/// The counts so far.
#[derive(Default)]
struct Tally {
    data_keys: Vec<DataKeyUsage>,
    masters: BTreeMap<Cmk, MasterKeyUsage>,
    services: BTreeMap<u32, ServiceTally>,
    /// The objects that could not be checked. Each may need any key but the data keys of other
    /// Logstores.
    unknown: Vec<String>,
}

impl Tally {
    fn master(&mut self, cmk: &Cmk) -> &mut MasterKeyUsage {
        self.masters.entry(cmk.clone()).or_insert_with(|| MasterKeyUsage::new(cmk.clone()))
    }

    fn service(&mut self, version: u32) -> &mut ServiceTally {
        self.services.entry(version).or_default()
    }

    fn document(&mut self, disk: &dyn Disk, path: &Path) {
        match keyring_version_of(disk, path) {
            Ok(version) => self.service(version).documents += 1,
            Err(error) => self.unknown.push(error.to_string()),
        }
    }

    /// The envelope of a data-key version, if the version was not destroyed.
    fn envelope(
        &mut self,
        cmk: Option<&Cmk>,
        version: &DataKeyVersion,
        cmk_version: Option<String>,
        under: Under,
    ) {
        if version.wrapped.is_none() {
            return;
        }
        if let Some(keyring_version) = version.keyring_version {
            self.service(keyring_version).envelopes += 1;
        }
        let Some(cmk) = cmk else { return };
        let master = self.master(cmk);
        let wrapped_us = version.wrapped_us.unwrap_or(version.created_us);
        let of_version = master.version(cmk_version);
        of_version.envelopes += 1;
        of_version.oldest_wrapped_us =
            Some(of_version.oldest_wrapped_us.map_or(wrapped_us, |oldest| oldest.min(wrapped_us)));
        master.segments += under.segments;
        master.bytes += under.bytes;
    }
}

/// Finds the uses of every key.
pub(super) fn key_usage(core: &Core) -> Result<KeyUsage> {
    core.keys.check_process()?;
    let mut tally = Tally::default();
    let mut seen = BTreeSet::new();
    // Other operations run in between. The loop also checks the Logstores that they create.
    loop {
        core.registry.reload_catalogue()?;
        let (new, unlisted) = {
            let _no_change = core.registry.exclusive();
            let catalogue = core.registry.catalogue();
            let entries = catalogue.logstores.iter().map(|(name, entry)| (name.clone(), entry.id));
            let new: Vec<(LogstoreName, LogstoreId)> =
                entries.filter(|entry| !seen.contains(entry)).collect();
            drop(catalogue);
            (new, core.registry.unlisted()?)
        };
        if new.is_empty() {
            // Last, so that the probes and the audit records of new Logstores are included.
            tally_store(core, unlisted, &mut tally)?;
            break;
        }
        for (name, id) in new {
            match core.registry.logstore(&name) {
                Ok(logstore) => tally_logstore(core, &logstore, &mut tally),
                Err(Error::LogstoreMissing(_)) => {}
                Err(error) => tally.unknown.push(format!("Logstore {name}: {error}")),
            }
            seen.insert((name, id));
        }
    }
    Ok(judge(core, tally))
}

/// Counts the objects that belong to no single Logstore: documents, probes, the audit log, and
/// directories that the catalogue does not list. A read-only opener may call the KMS of the service
/// keyring.
fn tally_store(core: &Core, unlisted: Vec<(PathBuf, bool)>, tally: &mut Tally) -> Result<()> {
    let Core { env, keys, registry } = core;
    let disk = &*env.disk;
    tally.document(disk, &identity_path(&env.dir));
    match keys.with_keyring(|keyring| load_newest(disk, &env.dir, env.id, keyring)) {
        Ok(found) => tally.service(found.keyring_version).documents += 1,
        Err(error) => tally.unknown.push(error.to_string()),
    }
    for path in keys.probe_paths()? {
        tally.document(disk, &path);
        match keys.read_probe(&path) {
            Ok(probe) => tally.master(probe.cmk()).version(keys.probe_version(&probe)).probe = true,
            Err(error) => tally.unknown.push(error.to_string()),
        }
    }
    let known = registry.catalogue().audit.clone();
    match keys.audit().verified(&[&known]) {
        Ok(records) => {
            for record in records {
                tally.service(record.keyring_version).records += 1;
            }
        }
        Err(error) => tally.unknown.push(format!("the audit log: {error}")),
    }
    for (dir, _) in unlisted.into_iter().filter(|(_, may_have_segments)| *may_have_segments) {
        tally.unknown.push(format!(
            "{} has segments in it, and the catalogue does not know it",
            dir.display()
        ));
    }
    Ok(())
}

fn tally_logstore(core: &Core, logstore: &LogstoreShared, tally: &mut Tally) {
    let (under, fault) = under_each_key(&core.env, logstore);
    tally.service(logstore.meta().keyring_version).documents += 1;
    for (&source, &under) in &under {
        if let KeySource::Keyring(version) = source {
            let service = tally.service(version);
            service.under.add(under);
            service.readers += logstore.gate.readers(source) as u64;
        }
    }
    let name = &logstore.name;
    if let Some(fault) = &fault {
        tally.unknown.push(format!("Logstore {name}: {fault}"));
    }
    let Some(section) = logstore.keys_section() else { return };
    for source in under.keys() {
        if let KeySource::DataKey(version) = source
            && section.version(*version).is_none()
        {
            let what = format!(
                "Logstore {name}: a segment under data-key version {version}, unknown here"
            );
            tally.unknown.push(what);
        }
    }
    for version in &section.versions {
        let under = under.get(&KeySource::DataKey(version.version)).copied().unwrap_or_default();
        let usage = data_key_usage(logstore, &section, version, under, fault.as_deref());
        let cmk_version = usage.status.cmk_version.clone();
        tally.envelope(section.cmk.as_ref(), version, cmk_version, under);
        tally.data_keys.push(usage);
    }
    if let Some(cmk) = &section.cmk {
        tally.master(cmk).logstores.push(name.clone());
    }
}

/// The use of a data-key version. `fault` is the reason why a shard could not be checked.
fn data_key_usage(
    logstore: &LogstoreShared,
    section: &KeysSection,
    version: &DataKeyVersion,
    under: Under,
    fault: Option<&str>,
) -> DataKeyUsage {
    let readers = logstore.gate.readers(KeySource::DataKey(version.version)) as u64;
    let status = DataKeyStatus {
        segments: under.segments,
        bytes_stored: under.bytes,
        ..logstore.data_key_status(section, version)
    };
    let mut needed_for = Vec::new();
    if status.current {
        needed_for.push(KeyNeed::Current);
        if section.cmk.is_some() {
            needed_for.push(KeyNeed::MetadataTag);
        }
    }
    under.put_needs(&mut needed_for);
    if readers > 0 {
        needed_for.push(KeyNeed::Readers { readers });
    }
    if let Some(detail) = fault {
        needed_for.push(KeyNeed::Unknown { detail: detail.to_owned() });
    }
    DataKeyUsage {
        logstore: logstore.name.clone(),
        status,
        created_us: version.created_us,
        wrapped_us: version.wrapped_us.unwrap_or(version.created_us),
        safe_to_destroy: needed_for.is_empty(),
        needed_for,
    }
}

/// The segments under each key, and the first reason why a shard could not be checked entirely: an
/// error, or a file that a key may still be needed for.
fn under_each_key(
    env: &StoreEnv,
    logstore: &LogstoreShared,
) -> (BTreeMap<KeySource, Under>, Option<String>) {
    let mut all: BTreeMap<KeySource, Under> = BTreeMap::new();
    let mut fault = None;
    // The writer of a shard under a customer's key may wait for the KMS. No segment is begun there
    // under keys that were replaced, because the shards are paused while the keys are replaced.
    let uses_kms = logstore.keys_section().is_some_and(|section| section.cmk.is_some());
    for shard in logstore.table().shards() {
        let segments = if uses_kms { shard.segments(true) } else { shard.settled_segments() };
        let counted = segments.and_then(|segments| {
            let last = segments.last().map(|last| last.ordinal);
            for segment in segments.iter().filter(|segment| !shard.is_lost(segment.ordinal)) {
                let source = shard.key_source(segment)?;
                let stat =
                    env.disk.stat(&segment.path).map_err(Error::io("look for", &*segment.path))?;
                let under = all.entry(source).or_default();
                under.segments += 1;
                under.bytes += stat.map_or(0, |stat| stat.len);
                // This process or another may be writing the last segment.
                let ended = Some(segment.ordinal) != last || shard.is_sealed(segment)?;
                under.writing += u64::from(!ended);
            }
            Ok(())
        });
        let strange = shard.strangers().map(|strangers| strangers.into_iter().next());
        let found = match (counted, strange) {
            (Err(error), _) | (Ok(()), Err(error)) => Some(error.to_string()),
            (Ok(()), Ok(Some(path))) => Some(format!(
                "{} has the name of a segment, and is none of the shard: move it away",
                path.display()
            )),
            (Ok(()), Ok(None)) => None,
        };
        if let Some(found) = found {
            fault.get_or_insert(found);
        }
    }
    (all, fault)
}

/// The version of the service key that a document claims to be tagged under.
fn keyring_version_of(disk: &dyn Disk, path: &Path) -> Result<u32> {
    let bytes = io::read_file(disk, path, DOCUMENT_BYTES_MAX).map_err(Error::io("read", path))?;
    let parsed = UnverifiedDocument::parse(&bytes).map_err(|error| error.in_file(path, 0))?;
    Ok(parsed.unverified().keyring_version)
}

/// Lists the uses of each key from the counts.
fn judge(core: &Core, tally: Tally) -> KeyUsage {
    let unknown: Vec<KeyNeed> =
        tally.unknown.into_iter().map(|detail| KeyNeed::Unknown { detail }).collect();
    let keyring = core.keys.keyring();
    let service_keys = keyring.versions().map(|(version, created_us)| {
        let current = version == keyring.newest();
        let mut needed_for = Vec::new();
        if current {
            needed_for.push(KeyNeed::Current);
        }
        tally.services.get(&version).copied().unwrap_or_default().put_needs(&mut needed_for);
        needed_for.extend_from_slice(&unknown);
        ServiceKeyUsage {
            version,
            current,
            accepted: version >= keyring.accepts(),
            created_us,
            safe_to_destroy: needed_for.is_empty(),
            needed_for,
        }
    });
    KeyUsage {
        data_keys: tally.data_keys,
        master_keys: tally.masters.into_values().map(|master| master.judge(&unknown)).collect(),
        service_keys: service_keys.collect(),
        service_rotation_unfinished: keyring.is_rotating(),
    }
}
