//! The catalogue: which Logstore lives under which name, and how far each shard is known to reach.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    config::LogstoreName,
    document::{self, DOCUMENT_BYTES_MAX, Document, DocumentKind},
    error::Location,
    ids::{LogstoreId, StoreId},
    io::{self, Disk, OpenMode},
    keys::{audit::AuditHead, keyring::Keyring},
    segment::Features,
    shard::ShardRecord,
};

/// The most Logstores in a store.
pub const LOGSTORES_MAX: usize = 100_000;

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
        catalogue.generation = document.generation;
        catalogue.features = document.features;
        catalogue.keyring_version = document.keyring_version;
        Ok(catalogue)
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
        io::replace_file(disk, &path, &bytes, OpenMode::CreateNew).map_err(Error::io("replace", &path))?;
        self.generation += 1;
        self.keyring_version = keyring.newest();
        Ok(())
    }
}
