//! The metadata of a Logstore on disk: its configuration and its envelopes.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    Error, Result,
    config::LogstoreConfig,
    crypto::SecretKey,
    document::{self, DOCUMENT_BYTES_MAX, Document, DocumentKind, UnverifiedDocument},
    error::Location,
    ids::{LogstoreId, StoreId},
    io::{self, Disk, Existing},
    keys::{
        envelope::{KeysSection, PROBE_SHARED, TaggedKeys, metadata_key},
        keyring::Keyring,
    },
    segment::Features,
};

/// The metadata of one Logstore.
#[derive(Clone, Debug)]
pub(crate) struct Meta {
    /// Counts the times it was written; kept in the frame.
    pub(crate) generation: u64,
    /// Its feature bits as it was read; kept in the frame.
    pub(crate) features: Features,
    /// The version of the service keyring that it is authenticated under; kept in the frame.
    pub(crate) keyring_version: u32,
    pub(crate) config: LogstoreConfig,
    pub(crate) keys: Option<KeysSection>,
    /// The keys section as the file has it, with the tag of the data key (BYOK only).
    pub(crate) tagged: Option<Arc<TaggedKeys>>,
}

/// The name of the file in the directory of its Logstore.
pub(crate) const META_FILE: &str = "meta";

pub(crate) fn path(logstore_dir: &Path) -> PathBuf {
    logstore_dir.join(META_FILE)
}

impl Meta {
    pub(crate) fn new(config: LogstoreConfig) -> Self {
        Self { generation: 1, features: Features::default(), keyring_version: 0, config, keys: None, tagged: None }
    }

    pub(crate) fn load(
        disk: &dyn Disk,
        logstore_dir: &Path,
        store: StoreId,
        id: LogstoreId,
        keyring: &Keyring,
    ) -> Result<Self> {
        let path = path(logstore_dir);
        let bytes = read(disk, &path)?;
        let document = document::open(&bytes, DocumentKind::Logstore, &path, |version| keyring.document_key(version))?;
        let meta = Self::from_document(&document, store, id, &path)?;
        meta.check(&path)?;
        Ok(meta)
    }

    /// Checks what the document says by itself.
    fn check(&self, path: &Path) -> Result<()> {
        let broken = |rule: String| Err(Error::corrupt(Location::new(path, 80), format!("the metadata: {rule}")));
        if let Err(rule) = self.config.check() {
            return broken(rule);
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
        if keys.since.ordinals.len() != self.config.shards.len() {
            return broken("there is not one ordinal in since for each shard".to_owned());
        }
        if keys.since.generation > self.generation {
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
            false => broken("there is a second tag without a customer's key, or none with one".to_owned()),
        }
    }

    /// Reads the metadata of a BYOK Logstore without the keyring. `data_key` finds the current data key by the keys section; with it
    /// that section is authenticated, which the configuration is not.
    pub(crate) fn load_without_keyring(
        disk: &dyn Disk,
        logstore_dir: &Path,
        store: StoreId,
        id: LogstoreId,
        data_key: impl FnOnce(&KeysSection) -> Result<SecretKey>,
    ) -> Result<Self> {
        let path = path(logstore_dir);
        let bytes = read(disk, &path)?;
        let parsed = UnverifiedDocument::parse(&bytes).map_err(|error| error.in_file(&path, 0))?;
        let meta = Self::from_document(parsed.unverified(), store, id, &path)?;
        let tampered = || Error::Tampered { at: Location::new(&path, 0), what: "the keys section of the metadata" };
        let (Some(keys), Some(tagged)) = (&meta.keys, &meta.tagged) else { return Err(tampered()) };
        tagged.prove(&data_key(keys)?)?;
        keys.check().map_err(|rule| Error::corrupt(Location::new(&path, 80), format!("the metadata: {rule}")))?;
        Ok(meta)
    }

    /// Reads metadata and authenticates nothing of it.
    pub(crate) fn load_unverified(
        disk: &dyn Disk,
        logstore_dir: &Path,
        store: StoreId,
        id: LogstoreId,
    ) -> Result<Self> {
        let path = path(logstore_dir);
        let bytes = read(disk, &path)?;
        let parsed = UnverifiedDocument::parse(&bytes).map_err(|error| error.in_file(&path, 0))?;
        Self::from_document(parsed.unverified(), store, id, &path)
    }

    fn from_document(document: &Document, store: StoreId, id: LogstoreId, path: &Path) -> Result<Self> {
        if document.kind != DocumentKind::Logstore || document.store != store || document.subject != *id.as_bytes() {
            return Err(Error::Tampered { at: Location::new(path, 0), what: "the metadata of another Logstore" });
        }
        let malformed = |error: serde_json::Error| {
            Error::corrupt(Location::new(path, 80), format!("the metadata does not parse: {error}"))
        };
        let config = serde_json::from_slice(&document.a).map_err(malformed)?;
        let keys: Option<KeysSection> = match document.b.is_empty() {
            true => None,
            false => Some(serde_json::from_slice(&document.b).map_err(malformed)?),
        };
        if let Some(probe) = keys.as_ref().map(|keys| &keys.probe).filter(|probe| *probe != PROBE_SHARED) {
            return Err(Error::UnsupportedFeature { path: path.to_owned(), what: format!("probe {probe:?}") });
        }
        Ok(Self {
            generation: document.generation,
            features: document.features,
            keyring_version: document.keyring_version,
            config,
            keys,
            tagged: TaggedKeys::of(document, path).map(Arc::new),
        })
    }

    /// Writes it as the generation that it says. `data_key` is the current data key, given when the keys section of a BYOK Logstore
    /// has changed; otherwise the section stays as it is, byte by byte, and so does its tag.
    pub(crate) fn save(
        &mut self,
        disk: &dyn Disk,
        logstore_dir: &Path,
        store: StoreId,
        id: LogstoreId,
        keyring: &Keyring,
        data_key: Option<&SecretKey>,
    ) -> Result<()> {
        let path = path(logstore_dir);
        let json = "plain data always serializes";
        let serialized = || self.keys.as_ref().map_or_else(Vec::new, |keys| serde_json::to_vec(keys).expect(json));
        let (b, tag_b) = match (&self.tagged, data_key) {
            (Some(tagged), None) => tagged.parts(),
            _ => (serialized(), None),
        };
        let mut document = Document {
            kind: DocumentKind::Logstore,
            features: Features::default(),
            store,
            subject: *id.as_bytes(),
            generation: self.generation,
            keyring_version: keyring.newest(),
            a: serde_json::to_vec(&self.config).expect(json),
            b,
            tag_b,
        };
        if let Some(data_key) = data_key {
            document.sign_b(&metadata_key(data_key));
            self.tagged = TaggedKeys::of(&document, &path).map(Arc::new);
        }
        let bytes = document.seal(&keyring.document_key(keyring.newest())?);
        io::write_file(disk, &path, &bytes, Existing::Replace).map_err(Error::io("replace", &path))?;
        self.keyring_version = keyring.newest();
        Ok(())
    }
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
        let config = LogstoreConfig::new("p/l".parse().unwrap(), LogstoreSpec::default(), 1).unwrap();
        let (store, id) = (StoreId::from_bytes([1; 16]), LogstoreId::from_bytes([2; 16]));
        let read = |kind, of: u8, subject: u8| {
            let document = Document {
                kind,
                features: Features::default(),
                store: StoreId::from_bytes([of; 16]),
                subject: [subject; 16],
                generation: 3,
                keyring_version: 4,
                a: serde_json::to_vec(&config).unwrap(),
                b: Vec::new(),
                tag_b: None,
            };
            Meta::from_document(&document, store, id, Path::new("meta"))
        };
        let meta = read(DocumentKind::Logstore, 1, 2).unwrap();
        assert_eq!((meta.generation, meta.keyring_version, meta.config.name), (3, 4, config.name.clone()));
        for (kind, of, subject) in
            [(DocumentKind::Probe, 1, 2), (DocumentKind::Logstore, 5, 2), (DocumentKind::Logstore, 1, 5)]
        {
            assert!(matches!(read(kind, of, subject), Err(Error::Tampered { .. })), "{kind:?} {of} {subject}");
        }
    }
}
