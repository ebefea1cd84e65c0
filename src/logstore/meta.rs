//! The metadata of a Logstore on disk: its configuration and its envelopes.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    Error, Result,
    config::{LogstoreConfig, ProbeMode},
    crypto::SecretKey,
    document::{
        self, DOCUMENT_BYTES_MAX, Document, DocumentKind, RESHARDED, UnverifiedDocument, to_json,
    },
    error::Location,
    ids::{LogstoreId, StoreId, hex_decode, hex_encode},
    io::{self, Disk, Existing, FileKind},
    keys::{
        envelope::{KeysSection, TaggedKeys, metadata_key},
        keyring::Keyring,
    },
    segment::Features,
};

/// The identity of the metadata that is in force for a Logstore. Each change writes a new file. The
/// change takes effect once the catalogue names that file. So a writer that was fenced off replaces
/// nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MetaRef {
    /// The number of the change, from 1.
    pub(crate) generation: u64,
    /// Tag A of the document.
    pub(crate) tag: [u8; 32],
}

impl MetaRef {
    /// The path of its file in the directory of the Logstore. The file exists twice.
    pub(crate) fn path(&self, logstore_dir: &Path) -> PathBuf {
        logstore_dir.join(self.name().to_string())
    }

    fn name(&self) -> MetaName {
        let [a, b, c, d, e, f, g, h, ..] = self.tag;
        MetaName { generation: self.generation, tag: [a, b, c, d, e, f, g, h] }
    }
}

/// The name of a metadata file: `meta-GENERATION-TAG`, with the first 8 bytes of tag A.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct MetaName {
    pub(crate) generation: u64,
    tag: [u8; 8],
}

impl MetaName {
    /// Parses the name of a metadata file or of its second copy. `None` for any other name.
    fn parse(name: &str) -> Option<Self> {
        let name = io::original_name(name);
        let (generation, tag) = name.strip_prefix("meta-")?.split_once('-')?;
        let parsed =
            Self { generation: generation.parse().ok()?, tag: hex_decode(tag)?.try_into().ok()? };
        (parsed.to_string() == name).then_some(parsed)
    }

    /// Whether this is the name of a metadata file, of its second copy, or of a temporary file for
    /// either.
    pub(crate) fn is_file_or_temporary(name: &str) -> bool {
        let stem = name.split('.').next().unwrap_or_default();
        Self::parse(stem).is_some() && io::is_either_or_temporary(name, stem)
    }

    /// The metadata in the directory of a Logstore, oldest first. At least one of the two files of
    /// each is there.
    pub(crate) fn list(disk: &dyn Disk, logstore_dir: &Path) -> Result<Vec<Self>> {
        let entries = match disk.list_dir(logstore_dir) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(Error::io("list", logstore_dir))?,
        };
        let mut names: Vec<_> =
            entries.iter().filter_map(|entry| Self::parse(&entry.name)).collect();
        names.sort_unstable();
        names.dedup();
        Ok(names)
    }
}

impl fmt::Display for MetaName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "meta-{:010}-{}", self.generation, hex_encode(&self.tag))
    }
}

/// Removes the metadata files of older changes, and temporary files of killed processes. It keeps
/// files of newer generations: a writer that has taken over may have written them.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn remove_older(disk: &dyn Disk, logstore_dir: &Path, current: &MetaRef) -> Result<()> {
    let mut removed = false;
    for entry in disk.list_dir(logstore_dir).map_err(Error::io("list", logstore_dir))? {
        let path = logstore_dir.join(&entry.name);
        match MetaName::parse(&entry.name) {
            Some(name)
                if entry.kind == FileKind::File
                    && name.generation <= current.generation
                    && name != current.name() =>
            {
                removed = true;
                match disk.remove_file(&path) {
                    Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                        return Err(Error::io("remove", path)(error));
                    }
                    _ => {}
                }
            }
            None if entry.kind == FileKind::File && MetaName::is_file_or_temporary(&entry.name) => {
                io::remove_temporary(disk, &path);
            }
            _ => {}
        }
    }
    if removed {
        disk.sync_dir(logstore_dir).map_err(Error::io("sync", logstore_dir))?;
    }
    Ok(())
}

/// The metadata of one Logstore.
#[derive(Clone, Debug)]
pub(crate) struct Meta {
    /// The number of the change, from 1. Stored in the frame.
    pub(crate) generation: u64,
    /// Tag A of the document as it was read or written. Stored in the frame.
    pub(crate) tag: [u8; 32],
    /// The feature bits of the file that was read. Stored in the frame.
    pub(crate) features: Features,
    /// The version of the service keyring that authenticates it. Stored in the frame.
    pub(crate) keyring_version: u32,
    pub(crate) config: LogstoreConfig,
    pub(crate) keys: Option<KeysSection>,
    /// The keys section as the file has it, with its tag under the data key (BYOK only).
    pub(crate) tagged: Option<Arc<TaggedKeys>>,
}

impl Meta {
    pub(crate) fn new(config: LogstoreConfig) -> Self {
        Self {
            generation: 1,
            tag: [0; 32],
            features: Features::default(),
            keyring_version: 0,
            config,
            keys: None,
            tagged: None,
        }
    }

    /// The reference by which the catalogue names it.
    pub(crate) fn reference(&self) -> MetaRef {
        MetaRef { generation: self.generation, tag: self.tag }
    }

    /// Reads the metadata that the catalogue names, and returns the bytes of its file too.
    pub(crate) fn load(
        disk: &dyn Disk,
        logstore_dir: &Path,
        store: StoreId,
        id: LogstoreId,
        keyring: &Keyring,
        named: &MetaRef,
    ) -> Result<(Self, Vec<u8>)> {
        document::load_either(&named.path(logstore_dir), |path| {
            Self::load_file(disk, path, store, id, keyring, named)
        })
    }

    /// Reads the metadata that the catalogue names from the file `path`.
    fn load_file(
        disk: &dyn Disk,
        path: &Path,
        store: StoreId,
        id: LogstoreId,
        keyring: &Keyring,
        named: &MetaRef,
    ) -> Result<(Self, Vec<u8>)> {
        let logstore_dir = path.parent().unwrap_or(path);
        let bytes = match read(disk, path) {
            // The other files are of older changes, or of changes that the catalogue does not name.
            Err(Error::Truncated { .. }) if !MetaName::list(disk, logstore_dir)?.is_empty() => {
                let what = format!(
                    "{}, which the catalogue names, is not there, and other metadata is",
                    path.display()
                );
                return Err(Error::RolledBack { what });
            }
            bytes => bytes?,
        };
        let meta = Self::authenticate(&bytes, path, store, id, keyring)?;
        if meta.reference() != *named {
            let what = format!("{} is not the metadata that the catalogue knows", path.display());
            return Err(Error::RolledBack { what });
        }
        meta.check(path)?;
        Ok((meta, bytes))
    }

    /// Reads authentic metadata from the file `path`, which has the name of its generation and tag,
    /// or from its second copy.
    pub(crate) fn load_from(
        disk: &dyn Disk,
        path: &Path,
        store: StoreId,
        id: LogstoreId,
        keyring: &Keyring,
    ) -> Result<Self> {
        document::load_either(path, |file| {
            let meta = Self::authenticate(&read(disk, file)?, file, store, id, keyring)?;
            if meta.reference().path(path.parent().unwrap_or(path)) != path {
                let what = format!("{} is other metadata than its name says", file.display());
                return Err(Error::RolledBack { what });
            }
            meta.check(file)?;
            Ok(meta)
        })
    }

    fn authenticate(
        bytes: &[u8],
        path: &Path,
        store: StoreId,
        id: LogstoreId,
        keyring: &Keyring,
    ) -> Result<Self> {
        let document = document::open(bytes, DocumentKind::Logstore, path, |version| {
            keyring.document_key(version)
        })?;
        let meta = Self::from_document(&document, store, id, path)?;
        Ok(Self { tag: document::tag_a(bytes), ..meta })
    }

    /// Checks the rules within the document.
    fn check(&self, path: &Path) -> Result<()> {
        let broken = |rule: String| {
            Err(Error::corrupt(Location::new(path, 80), format!("the metadata: {rule}")))
        };
        if let Err(rule) = self.config.check() {
            return broken(rule);
        }
        if self.features.incompatible != features_of(&self.config).incompatible {
            return broken("its features are not those of its shards".to_owned());
        }
        let Some(keys) = &self.keys else {
            let encrypts = self.config.encrypt_conf.as_ref().is_some_and(|conf| conf.enable);
            return match (encrypts, &self.tagged) {
                (true, _) => broken("encryption is on and there is no envelope".to_owned()),
                (false, Some(_)) => broken("there is a second tag and no envelope".to_owned()),
                (false, None) => Ok(()),
            };
        };
        if let Err(rule) = keys.check() {
            return broken(rule);
        }
        if keys.shard_count() != self.config.shards.len() {
            return broken(
                "a data-key version does not have one ordinal for each shard".to_owned(),
            );
        }
        if keys.since > self.generation {
            return broken("it is older than the first envelope".to_owned());
        }
        let tampered = |what| Err(Error::Tampered { at: Location::new(path, 0), what });
        if keys.name != self.config.name {
            return tampered("the metadata under another name");
        }
        let mut config = self.config.clone();
        keys.lead(&mut config);
        if config != self.config {
            return tampered("the configuration beside the keys section of the metadata");
        }
        match keys.cmk.is_some() == self.tagged.is_some() {
            true => Ok(()),
            false => broken(
                "there is a second tag without a customer's key, or none with one".to_owned(),
            ),
        }
    }

    /// Reads the metadata of a BYOK Logstore from the file `path`, without the keyring. `data_key`
    /// finds the current data key from the keys section. That key authenticates the keys section,
    /// but not the configuration.
    pub(crate) fn load_without_keyring(
        disk: &dyn Disk,
        path: &Path,
        store: StoreId,
        id: LogstoreId,
        data_key: impl FnOnce(&KeysSection) -> Result<SecretKey>,
    ) -> Result<Self> {
        let meta = Self::load_unverified(disk, path, store, id)?;
        let tampered = || Error::Tampered {
            at: Location::new(path, 0),
            what: "the keys section of the metadata",
        };
        let (Some(keys), Some(tagged)) = (&meta.keys, &meta.tagged) else { return Err(tampered()) };
        tagged.prove(&data_key(keys)?)?;
        keys.check().map_err(|rule| {
            Error::corrupt(Location::new(path, 80), format!("the metadata: {rule}"))
        })?;
        Ok(meta)
    }

    /// Reads metadata from the file `path`, or from its second copy. It authenticates nothing.
    pub(crate) fn load_unverified(
        disk: &dyn Disk,
        path: &Path,
        store: StoreId,
        id: LogstoreId,
    ) -> Result<Self> {
        document::load_either(path, |path| {
            let bytes = read(disk, path)?;
            let parsed =
                UnverifiedDocument::parse(&bytes).map_err(|error| error.in_file(path, 0))?;
            Self::from_document(parsed.unverified(), store, id, path)
        })
    }

    fn from_document(
        document: &Document,
        store: StoreId,
        id: LogstoreId,
        path: &Path,
    ) -> Result<Self> {
        if document.kind != DocumentKind::Logstore
            || document.store != store
            || document.subject != *id.as_bytes()
        {
            return Err(Error::Tampered {
                at: Location::new(path, 0),
                what: "the metadata of another Logstore",
            });
        }
        let malformed = |error: serde_json::Error| {
            Error::corrupt(Location::new(path, 80), format!("the metadata does not parse: {error}"))
        };
        let keys: Option<KeysSection> = match document.b.is_empty() {
            true => None,
            false => Some(serde_json::from_slice(&document.b).map_err(malformed)?),
        };
        let unknown = |probe: &&String| ProbeMode::of_name(probe).is_none();
        if let Some(probe) = keys.as_ref().map(|keys| &keys.probe).filter(unknown) {
            return Err(Error::UnsupportedFeature {
                path: path.to_owned(),
                what: format!("probe {probe:?}"),
            });
        }
        let config = serde_json::from_slice(&document.a).map_err(malformed)?;
        Ok(Self {
            generation: document.generation,
            tag: [0; 32],
            features: document.features,
            keyring_version: document.keyring_version,
            config,
            keys,
            tagged: TaggedKeys::of(document, path).map(Arc::new),
        })
    }

    /// Writes the metadata into two new files for its generation, durably. It takes effect once the
    /// catalogue names it. If the keys section of a BYOK Logstore has changed, the caller passes
    /// the current data key as `data_key`. Otherwise the section keeps its bytes and its tag.
    pub(crate) fn save(
        &mut self,
        disk: &dyn Disk,
        logstore_dir: &Path,
        store: StoreId,
        id: LogstoreId,
        keyring: &Keyring,
        data_key: Option<&SecretKey>,
    ) -> Result<()> {
        let serialized =
            || self.keys.as_ref().map(|keys| to_json(keys).into_bytes()).unwrap_or_default();
        let (b, tag_b) = match (&self.tagged, data_key) {
            (Some(tagged), None) => tagged.parts(),
            _ => (serialized(), None),
        };
        let version = keyring.newest();
        let (kind, generation) = (DocumentKind::Logstore, self.generation);
        let mut document = Document {
            features: features_of(&self.config),
            subject: *id.as_bytes(),
            b,
            tag_b,
            ..Document::new(kind, store, generation, version, &self.config)
        };
        if let Some(data_key) = data_key {
            document.sign_b(&metadata_key(data_key));
        }
        let bytes = document.seal(&keyring.document_key(version)?);
        self.tag = document::tag_a(&bytes);
        let path = self.reference().path(logstore_dir);
        if data_key.is_some() {
            self.tagged = TaggedKeys::of(&document, &path).map(Arc::new);
        }
        io::write_twice(disk, &path, &bytes, Existing::Replace)
            .map_err(Error::io("write", &path))?;
        (self.features, self.keyring_version) = (document.features, version);
        Ok(())
    }
}

/// The features that the metadata with this configuration has. A build that does not know
/// [`RESHARDED`] ends no follower of a read-only shard, and cannot read the time of its children.
fn features_of(config: &LogstoreConfig) -> Features {
    let resharded = config.shards.iter().any(|shard| shard.create_time.is_some());
    Features { incompatible: if resharded { RESHARDED } else { 0 }, ..Features::default() }
}

fn read(disk: &dyn Disk, path: &Path) -> Result<Vec<u8>> {
    match io::read_file(disk, path, DOCUMENT_BYTES_MAX) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(Error::truncated(Location::new(path, 0), "the metadata of a Logstore is missing"))
        }
        bytes => bytes.map_err(Error::io("read", path)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::LogstoreSpec;

    #[test]
    fn what_is_about_something_else_is_refused() {
        let config =
            LogstoreConfig::new("p/l".parse().unwrap(), LogstoreSpec::default(), 1).unwrap();
        let (store, id) = (StoreId::from_bytes([1; 16]), LogstoreId::from_bytes([2; 16]));
        let read = |kind, of: u8, subject: u8| {
            let document = Document {
                subject: [subject; 16],
                ..Document::new(kind, StoreId::from_bytes([of; 16]), 3, 4, &config)
            };
            Meta::from_document(&document, store, id, Path::new("meta"))
        };
        let meta = read(DocumentKind::Logstore, 1, 2).unwrap();
        assert_eq!(
            (meta.generation, meta.keyring_version, meta.config.name),
            (3, 4, config.name.clone())
        );
        for (kind, of, subject) in [
            (DocumentKind::Probe, 1, 2),
            (DocumentKind::Logstore, 5, 2),
            (DocumentKind::Logstore, 1, 5),
        ] {
            assert!(
                matches!(read(kind, of, subject), Err(Error::Tampered { .. })),
                "{kind:?} {of} {subject}"
            );
        }
    }
}
