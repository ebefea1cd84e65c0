//! What every key is still needed for, and so which of them may be destroyed.
//!
//! The answers err on the side of keeping a key: what could not be looked at counts as needed.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use serde::Serialize;

use super::{Store, StoreShared, builder::identity_path, catalogue::load_newest};
use crate::{
    Error, Result,
    config::LogstoreName,
    document::{DOCUMENT_BYTES_MAX, UnverifiedDocument},
    ids::LogstoreId,
    io,
    kms::Cmk,
    logstore::{KeyObserver as _, LogstoreShared},
    segment::KeySource,
    sync::{lock, read},
};

/// What needs a key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "what", rename_all = "snake_case")]
#[non_exhaustive]
pub enum KeyNeed {
    /// What comes from now on is sealed, wrapped or tagged with it.
    Current,
    /// Segments that it, or what it wraps, has sealed.
    Segments {
        /// How many.
        segments: u64,
        /// Their bytes on disk.
        bytes: u64,
    },
    /// Segments that are being written under it, or that nobody has ended yet.
    Writing {
        /// How many.
        segments: u64,
    },
    /// Readers of this process that are in segments under it, also in such as retention has dropped.
    Readers {
        /// How many.
        readers: u64,
    },
    /// Envelopes that it has wrapped.
    Envelopes {
        /// How many.
        envelopes: u64,
    },
    /// The tag by which the metadata of its Logstore is recognised without the keyring.
    MetadataTag,
    /// Documents of the store that it has tagged.
    Documents {
        /// How many.
        documents: u64,
    },
    /// Records of the key audit log that it has tagged.
    AuditRecords {
        /// How many.
        records: u64,
    },
    /// It cannot be told: something could not be looked at.
    Unknown {
        /// What, and why.
        detail: String,
    },
}

impl fmt::Display for KeyNeed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count =
            |f: &mut fmt::Formatter<'_>, n: u64, what: &str| write!(f, "{n} {what}{}", if n == 1 { "" } else { "s" });
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
    /// The version.
    pub version: u32,
    /// Whether new segments are sealed with it.
    pub current: bool,
    /// Whether it was destroyed.
    pub shredded: bool,
    /// When it was made, in microseconds since the Unix epoch.
    pub created_us: u64,
    /// Since when it is wrapped as it is, in microseconds since the Unix epoch.
    pub wrapped_us: u64,
    /// The version of the service key that wraps it, under the service key.
    pub service_key_version: Option<u32>,
    /// The version of the master key that wraps it, where the KMS tells.
    pub cmk_version: Option<String>,
    /// Segments under it.
    pub segments: u64,
    /// Their bytes on disk.
    pub bytes: u64,
    /// What needs it.
    pub needed_for: Vec<KeyNeed>,
    /// Whether nothing needs it, so that [`Store::shred_data_keys`] destroys nothing that is kept.
    pub safe_to_destroy: bool,
}

/// One version of a customer master key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct CmkVersionUsage {
    /// In the words of the KMS; `None` for what does not tell.
    pub version: Option<String>,
    /// Envelopes of data keys under it.
    pub envelopes: u64,
    /// When the oldest of them was wrapped, in microseconds since the Unix epoch: what the KMS made current before that is in use
    /// by none of them.
    pub oldest_wrapped_us: Option<u64>,
    /// Whether the probe that renews the lease is under it.
    pub probe: bool,
}

/// One customer master key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct MasterKeyUsage {
    /// Which.
    pub cmk: Cmk,
    /// The Logstores under it.
    pub logstores: Vec<LogstoreName>,
    /// Its versions that are in use.
    pub versions: Vec<CmkVersionUsage>,
    /// Segments of those Logstores that were sealed under data keys.
    pub segments: u64,
    /// Their bytes on disk.
    pub bytes: u64,
    /// What needs it.
    pub needed_for: Vec<KeyNeed>,
    /// Whether nothing of this store needs it. Copies of the store (backups, snapshots) may.
    pub safe_to_destroy: bool,
}

/// One version of the service key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ServiceKeyUsage {
    /// The version.
    pub version: u32,
    /// Whether it wraps and tags what is new.
    pub current: bool,
    /// Whether documents under it are accepted. Where older versions than the current one are, a rotation is unfinished.
    pub accepted: bool,
    /// When it was made, in microseconds since the Unix epoch.
    pub created_us: u64,
    /// What needs it.
    pub needed_for: Vec<KeyNeed>,
    /// Whether nothing of this store needs it. Checkpoints kept elsewhere may.
    pub safe_to_destroy: bool,
}

/// What every key of a store is needed for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct KeyUsage {
    /// The data keys of all Logstores.
    pub data_keys: Vec<DataKeyUsage>,
    /// The customer master keys, those included that have a probe in the store and no Logstore any more.
    pub master_keys: Vec<MasterKeyUsage>,
    /// The versions of the service key.
    pub service_keys: Vec<ServiceKeyUsage>,
    /// Whether a rotation of the service key is unfinished: [`Store::rotate_service_key`] continues it.
    pub service_rotation_unfinished: bool,
}

impl Store {
    /// What every key is needed for, and whether it may be destroyed. Needs no key and calls no KMS.
    ///
    /// It looks at this store, as it is now, and at the readers of this process; other processes and copies of the store it cannot
    /// see. What cannot be looked at (a damaged segment, a directory that no catalogue knows) counts as needing every key that it
    /// may need.
    ///
    /// # Errors
    /// What keeps it from looking at the store at all.
    pub fn key_usage(&self) -> Result<KeyUsage> {
        self.shared.key_usage()
    }
}

/// Segments under one key.
#[derive(Clone, Copy, Default)]
struct Under {
    segments: u64,
    bytes: u64,
    writing: u64,
}

/// What is counted on the way.
#[derive(Default)]
struct Tally {
    data_keys: Vec<DataKeyUsage>,
    masters: BTreeMap<Cmk, MasterKeyUsage>,
    services: BTreeMap<u32, ServiceTally>,
    /// What could not be looked at and may need any key but data keys of other Logstores.
    unknown: Vec<String>,
}

#[derive(Clone, Copy, Default)]
struct ServiceTally {
    envelopes: u64,
    documents: u64,
    records: u64,
    under: Under,
    readers: u64,
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
                let usage = CmkVersionUsage { version, envelopes: 0, oldest_wrapped_us: None, probe: false };
                self.versions.push(usage);
                self.versions.len() - 1
            }
        };
        &mut self.versions[place]
    }
}

impl StoreShared {
    fn key_usage(&self) -> Result<KeyUsage> {
        self.keys.check_process()?;
        let mut tally = Tally::default();
        let mut seen = BTreeSet::new();
        // Other administration goes on meanwhile; what is made while this looks is looked at too.
        loop {
            let admin = lock(&self.admin);
            self.reload_catalogue()?;
            let new: Vec<(LogstoreName, LogstoreId)> = {
                let catalogue = self.catalogue.now();
                let entries = catalogue.logstores.iter().map(|(name, entry)| (name.clone(), entry.id));
                entries.filter(|entry| !seen.contains(entry)).collect()
            };
            if new.is_empty() {
                // Last, so that the probes and records of what is new are among them.
                self.tally_store(&mut tally)?;
                break;
            }
            drop(admin);
            for (name, id) in new {
                match self.logstore(&name) {
                    Ok(logstore) => self.tally_logstore(&logstore, &mut tally),
                    Err(Error::LogstoreMissing(_)) => {}
                    Err(error) => tally.unknown.push(format!("Logstore {name}: {error}")),
                }
                seen.insert((name, id));
            }
        }
        Ok(self.judge(tally))
    }

    /// What belongs to no single Logstore: documents, probes, the audit log, directories that nobody knows.
    fn tally_store(&self, tally: &mut Tally) -> Result<()> {
        let document = |path: &std::path::Path, tally: &mut Tally| match self.keyring_version_of(path) {
            Ok(version) => tally.services.entry(version).or_default().documents += 1,
            Err(error) => tally.unknown.push(error.to_string()),
        };
        document(&identity_path(&self.dir), tally);
        match self.keys.with_keyring(|keyring| load_newest(&*self.disk, &self.dir, self.id, keyring)) {
            Ok(found) => tally.services.entry(found.keyring_version).or_default().documents += 1,
            Err(error) => tally.unknown.push(error.to_string()),
        }
        let probes = self.probes_dir();
        for entry in self.disk.list_dir(&probes).map_err(Error::io("list", &probes))? {
            if entry.name.ends_with(".tmp") {
                continue;
            }
            let path = probes.join(&entry.name);
            document(&path, tally);
            match self.read_probe(&path) {
                Ok(found) => {
                    let master = tally.masters.entry(found.cmk.clone());
                    let master = master.or_insert_with(|| MasterKeyUsage::new(found.cmk.clone()));
                    master.version(self.cmk_version(&found.cmk, &found.wrapped)).probe = true;
                }
                Err(error) => tally.unknown.push(error.to_string()),
            }
        }
        let known = self.catalogue.now().audit.clone();
        match self.audit.verified(&[&known]) {
            Ok(records) => {
                for record in records {
                    tally.services.entry(record.keyring_version).or_default().records += 1;
                }
            }
            Err(error) => tally.unknown.push(format!("the audit log: {error}")),
        }
        for (dir, has_segments) in self.unlisted()? {
            if has_segments {
                tally.unknown.push(format!("{} has segments in it, and the catalogue does not know it", dir.display()));
            }
        }
        Ok(())
    }

    fn tally_logstore(&self, logstore: &LogstoreShared, tally: &mut Tally) {
        let (under, fault) = self.under_each_key(logstore);
        let documents = lock(&logstore.meta).keyring_version;
        tally.services.entry(documents).or_default().documents += 1;
        for (&source, &under) in &under {
            if let KeySource::Keyring(version) = source {
                let service = tally.services.entry(version).or_default();
                service.under.add(under);
                service.readers += logstore.gate.readers(source) as u64;
            }
        }
        if let Some(fault) = &fault {
            tally.unknown.push(format!("Logstore {}: {fault}", logstore.name));
        }
        let Some(section) = logstore.keys_section() else { return };
        let known: BTreeSet<u32> = section.versions.iter().map(|version| version.version).collect();
        for source in under.keys() {
            if let KeySource::DataKey(version) = source
                && !known.contains(version)
            {
                let name = &logstore.name;
                tally
                    .unknown
                    .push(format!("Logstore {name}: a segment under data-key version {version}, unknown here"));
            }
        }
        for version in &section.versions {
            let source = KeySource::DataKey(version.version);
            let under = under.get(&source).copied().unwrap_or_default();
            let readers = logstore.gate.readers(source) as u64;
            let cmk_version = section.cmk.as_ref().and_then(|cmk| self.envelope_version(cmk, version));
            if version.wrapped.is_some() {
                if let Some(keyring_version) = version.keyring_version {
                    tally.services.entry(keyring_version).or_default().envelopes += 1;
                }
                if let Some(cmk) = &section.cmk {
                    let master = tally.masters.entry(cmk.clone()).or_insert_with(|| MasterKeyUsage::new(cmk.clone()));
                    let of_version = master.version(cmk_version.clone());
                    let wrapped_us = version.wrapped_us.unwrap_or(version.created_us);
                    of_version.envelopes += 1;
                    of_version.oldest_wrapped_us =
                        Some(of_version.oldest_wrapped_us.map_or(wrapped_us, |oldest| oldest.min(wrapped_us)));
                    master.segments += under.segments;
                    master.bytes += under.bytes;
                }
            }
            let current = version.version == section.current;
            let mut needed_for = Vec::new();
            if current {
                needed_for.push(KeyNeed::Current);
                if section.cmk.is_some() {
                    needed_for.push(KeyNeed::MetadataTag);
                }
            }
            under.put_needs(&mut needed_for);
            if readers > 0 {
                needed_for.push(KeyNeed::Readers { readers });
            }
            if let Some(detail) = &fault {
                needed_for.push(KeyNeed::Unknown { detail: detail.clone() });
            }
            tally.data_keys.push(DataKeyUsage {
                logstore: logstore.name.clone(),
                version: version.version,
                current,
                shredded: version.wrapped.is_none(),
                created_us: version.created_us,
                wrapped_us: version.wrapped_us.unwrap_or(version.created_us),
                service_key_version: version.keyring_version,
                cmk_version,
                segments: under.segments,
                bytes: under.bytes,
                safe_to_destroy: needed_for.is_empty(),
                needed_for,
            });
        }
        if let Some(cmk) = &section.cmk {
            let master = tally.masters.entry(cmk.clone()).or_insert_with(|| MasterKeyUsage::new(cmk.clone()));
            master.logstores.push(logstore.name.clone());
        }
    }

    /// The segments under each key, and what kept the rest from being looked at.
    fn under_each_key(&self, logstore: &LogstoreShared) -> (BTreeMap<KeySource, Under>, Option<String>) {
        let mut all: BTreeMap<KeySource, Under> = BTreeMap::new();
        let mut fault = None;
        for shard in &logstore.shards {
            let counted = shard.settled_segments().and_then(|segments| {
                let last = segments.last().map(|last| last.ordinal);
                for segment in segments.iter() {
                    let source = shard.key_source(segment)?;
                    let stat = self.disk.stat(&segment.path).map_err(Error::io("look for", &*segment.path))?;
                    let under = all.entry(source).or_default();
                    under.segments += 1;
                    under.bytes += stat.map_or(0, |stat| stat.len);
                    // The last one may be being written, by this process or by another.
                    let ended = Some(segment.ordinal) != last || shard.is_sealed(segment)?;
                    under.writing += u64::from(!ended);
                }
                Ok(())
            });
            if let Err(error) = counted {
                fault.get_or_insert(error.to_string());
            }
        }
        (all, fault)
    }

    pub(super) fn cmk_version(&self, cmk: &Cmk, wrapped: &[u8]) -> Option<String> {
        self.kms.serving(&cmk.region_id).ok()?.cmk_version(wrapped)
    }

    /// Which version of the keyring a document says that it was tagged under.
    fn keyring_version_of(&self, path: &std::path::Path) -> Result<u32> {
        let bytes = io::read_file(&*self.disk, path, DOCUMENT_BYTES_MAX).map_err(Error::io("read", path))?;
        let parsed = UnverifiedDocument::parse(&bytes).map_err(|error| error.in_file(path, 0))?;
        Ok(parsed.unverified().keyring_version)
    }

    fn judge(&self, tally: Tally) -> KeyUsage {
        let unknown: Vec<KeyNeed> = tally.unknown.into_iter().map(|detail| KeyNeed::Unknown { detail }).collect();
        let master_keys = tally.masters.into_values().map(|mut master| {
            let envelopes = master.versions.iter().map(|version| version.envelopes).sum();
            if !master.logstores.is_empty() {
                master.needed_for.push(KeyNeed::Current);
            }
            if envelopes > 0 {
                master.needed_for.push(KeyNeed::Envelopes { envelopes });
            }
            if master.segments > 0 {
                master.needed_for.push(KeyNeed::Segments { segments: master.segments, bytes: master.bytes });
            }
            master.needed_for.extend_from_slice(&unknown);
            master.safe_to_destroy = master.needed_for.is_empty();
            master
        });
        let keyring = read(&self.keyring);
        let service_keys = keyring.versions().map(|(version, created_us)| {
            let used = tally.services.get(&version).copied().unwrap_or_default();
            let current = version == keyring.newest();
            let mut needed_for = Vec::new();
            if current {
                needed_for.push(KeyNeed::Current);
            }
            if used.envelopes > 0 {
                needed_for.push(KeyNeed::Envelopes { envelopes: used.envelopes });
            }
            used.under.put_needs(&mut needed_for);
            if used.readers > 0 {
                needed_for.push(KeyNeed::Readers { readers: used.readers });
            }
            if used.documents > 0 {
                needed_for.push(KeyNeed::Documents { documents: used.documents });
            }
            if used.records > 0 {
                needed_for.push(KeyNeed::AuditRecords { records: used.records });
            }
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
            master_keys: master_keys.collect(),
            service_keys: service_keys.collect(),
            service_rotation_unfinished: keyring.is_rotating(),
        }
    }
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
