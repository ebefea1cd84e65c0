//! The catalogue: which Logstore lives under which name, and how far each shard is known to reach.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    marker::PhantomData,
    path::{Path, PathBuf},
};

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{self, MapAccess, Visitor},
};

use crate::{
    Error, Result,
    config::{LogstoreName, SHARDS_MAX},
    document::{self, DOCUMENT_BYTES_MAX, Document, DocumentKind},
    error::Location,
    ids::{LogstoreId, StoreId, hex_decode},
    io::{self, Disk, Existing},
    keys::{audit::AuditHead, keyring::Keyring},
    segment::Features,
    shard::ShardRecord,
};

/// The most Logstores in a store.
pub const LOGSTORES_MAX: usize = 100_000;
/// The most shards in a store, of all its Logstores together: the catalogue has to hold where each of them ends.
pub const STORE_SHARDS_MAX: usize = 100_000;

/// One Logstore in the catalogue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Entry {
    pub(crate) id: LogstoreId,
    /// The generation of its metadata.
    pub(crate) generation: u64,
    pub(crate) shards: Vec<ShardRecord>,
}

/// The contents of the catalogue.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Catalogue {
    /// Counts the times it was written; kept in the frame.
    #[serde(skip)]
    pub(crate) generation: u64,
    /// Its feature bits as it was read; kept in the frame.
    #[serde(skip)]
    pub(crate) features: Features,
    /// The version of the service keyring that it was authenticated under; kept in the frame.
    #[serde(skip)]
    pub(crate) keyring_version: u32,
    /// How far the key audit log was.
    pub(crate) audit: AuditHead,
    #[serde(deserialize_with = "unique")]
    pub(crate) logstores: BTreeMap<LogstoreName, Entry>,
    /// Logstores that were deleted and whose files may not all be gone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) deleting: Vec<LogstoreId>,
}

pub(crate) fn path(store: &Path) -> PathBuf {
    store.join("catalogue")
}

impl Catalogue {
    pub(crate) fn load(disk: &dyn Disk, dir: &Path, store: StoreId, keyring: &Keyring) -> Result<Self> {
        let path = path(dir);
        let bytes = match io::read_file(disk, &path, DOCUMENT_BYTES_MAX) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::truncated(Location::new(&path, 0), "the catalogue is missing"));
            }
            bytes => bytes.map_err(Error::io("read", &path))?,
        };
        let document = document::open(&bytes, DocumentKind::Catalogue, &path, |version| keyring.document_key(version))?;
        if document.store != store {
            return Err(Error::Tampered { at: Location::new(&path, 24), what: "the catalogue of another store" });
        }
        let mut catalogue: Self = serde_json::from_slice(&document.a).map_err(|error| {
            Error::corrupt(Location::new(&path, 80), format!("the catalogue does not parse: {error}"))
        })?;
        catalogue.check().map_err(|rule| Error::corrupt(Location::new(&path, 80), format!("the catalogue: {rule}")))?;
        catalogue.generation = document.generation;
        catalogue.features = document.features;
        catalogue.keyring_version = document.keyring_version;
        Ok(catalogue)
    }

    /// Checks what it says by itself.
    fn check(&self) -> Result<(), &'static str> {
        check_audit_head(&self.audit)?;
        if self.logstores.len() > LOGSTORES_MAX {
            return Err("there are too many Logstores");
        }
        if self.logstores.values().map(|entry| entry.shards.len()).sum::<usize>() > STORE_SHARDS_MAX {
            return Err("there are too many shards");
        }
        let mut ids = BTreeSet::new();
        if !self.logstores.values().map(|entry| &entry.id).chain(&self.deleting).all(|id| ids.insert(*id)) {
            return Err("a Logstore is there twice");
        }
        self.logstores.values().try_for_each(|entry| check_entry(entry.generation, &entry.shards))
    }

    /// Writes the catalogue as its next generation. `self` is changed only when that has succeeded.
    pub(crate) fn save(&mut self, disk: &dyn Disk, dir: &Path, store: StoreId, keyring: &Keyring) -> Result<()> {
        let path = path(dir);
        let document = Document {
            kind: DocumentKind::Catalogue,
            features: Features::default(),
            store,
            subject: [0; 16],
            generation: self.generation + 1,
            keyring_version: keyring.newest(),
            a: serde_json::to_vec(self).expect("plain data always serializes"),
            b: Vec::new(),
            tag_b: None,
        };
        let bytes = document.seal(&keyring.document_key(keyring.newest())?);
        io::write_file(disk, &path, &bytes, Existing::Replace).map_err(Error::io("replace", &path))?;
        self.generation += 1;
        self.keyring_version = keyring.newest();
        Ok(())
    }
}

/// Checks what a catalogue or a checkpoint says of one Logstore.
///
/// # Errors
/// The rule of the format that it breaks.
pub(super) fn check_entry(generation: u64, shards: &[ShardRecord]) -> Result<(), &'static str> {
    // There is always a next one.
    let ordinals = 1..u64::MAX;
    if !ordinals.contains(&generation) {
        return Err("the generation of a Logstore is out of range");
    }
    if !(1..=SHARDS_MAX as usize).contains(&shards.len()) {
        return Err("the number of shards of a Logstore is out of range");
    }
    for shard in shards {
        let head = shard.head.as_ref();
        if !ordinals.contains(&shard.first_ordinal) || !head.is_none_or(|head| ordinals.contains(&head.ordinal)) {
            return Err("the ordinal of a segment is out of range");
        }
        if head.is_some_and(|head| head.next_seq < head.end_seq) {
            return Err("the next sequence number of a shard lies below its end");
        }
    }
    Ok(())
}

/// Checks how far a catalogue or a checkpoint says that the audit log was.
///
/// # Errors
/// The rule of the format that it breaks.
pub(super) fn check_audit_head(head: &AuditHead) -> Result<(), &'static str> {
    let fits = match head.number {
        0 => head.tag.is_empty(),
        _ => hex_decode(&head.tag).is_some_and(|tag| tag.len() == 32),
    };
    if fits { Ok(()) } else { Err("the tag of the audit record is not one") }
}

/// Deserializes a map, and refuses a key that is there twice.
pub(super) fn unique<'de, D, K, V>(deserializer: D) -> Result<BTreeMap<K, V>, D::Error>
where
    D: Deserializer<'de>,
    K: Deserialize<'de> + Ord,
    V: Deserialize<'de>,
{
    struct Unique<K, V>(PhantomData<(K, V)>);
    impl<'de, K: Deserialize<'de> + Ord, V: Deserialize<'de>> Visitor<'de> for Unique<K, V> {
        type Value = BTreeMap<K, V>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a map without doubled keys")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
            let mut map = BTreeMap::new();
            while let Some((key, value)) = entries.next_entry()? {
                if map.insert(key, value).is_some() {
                    return Err(de::Error::custom("a key is there twice"));
                }
            }
            Ok(map)
        }
    }
    deserializer.deserialize_map(Unique(PhantomData))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::{config::NAME_BYTES_MAX, ids::SegmentId, shard::Head};

    /// Whatever the limits let a store become, it can be opened again.
    #[test]
    fn the_largest_catalogue_can_be_read() {
        let head = Head {
            ordinal: u64::MAX,
            segment: SegmentId::from_bytes([0xff; 16]),
            sealed: false,
            blocks: u32::MAX,
            bytes: u64::MAX,
            end_seq: u64::MAX,
            next_seq: u64::MAX,
            last_time_us: u64::MAX,
            digest: [0xff; 32],
        };
        let record = ShardRecord { first_ordinal: u64::MAX, first_seq: u64::MAX, head: Some(head) };
        let shard = serde_json::to_vec(&record).unwrap().len() + 1;
        let entry = Entry { id: LogstoreId::from_bytes([0xff; 16]), generation: u64::MAX, shards: Vec::new() };
        let logstore = serde_json::to_vec(&entry).unwrap().len() + 2 * NAME_BYTES_MAX + 8;
        let deleting = 40;
        let all = STORE_SHARDS_MAX * shard + LOGSTORES_MAX * (logstore + deleting);
        assert!((all as u64) < DOCUMENT_BYTES_MAX - (1 << 20), "{all} bytes");
    }
}
