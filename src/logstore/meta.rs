//! The metadata of a Logstore on disk: its configuration and its envelopes.

use std::path::{Path, PathBuf};

use crate::{
    Error, Result,
    config::LogstoreConfig,
    crypto::SecretKey,
    document::{self, DOCUMENT_BYTES_MAX, Document, DocumentKind, UnverifiedDocument},
    error::Location,
    ids::{LogstoreId, StoreId},
    io::{self, Disk, Existing},
    keys::{
        envelope::{KeysSection, metadata_key},
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
    /// The tag over the keys section under a key derived from the data key (BYOK only).
    keys_tag: Option<[u8; 32]>,
}

/// The name of the file in the directory of its Logstore.
pub(crate) const META_FILE: &str = "meta";

pub(crate) fn path(logstore_dir: &Path) -> PathBuf {
    logstore_dir.join(META_FILE)
}

impl Meta {
    pub(crate) fn new(config: LogstoreConfig) -> Self {
        Self { generation: 1, features: Features::default(), keyring_version: 0, config, keys: None, keys_tag: None }
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
            return match (encrypts, self.keys_tag) {
                (true, _) => broken("encryption is on and there is no envelope".to_owned()),
                (false, Some(_)) => broken("there is a second tag and no envelope".to_owned()),
                (false, None) => Ok(()),
            };
        };
        if let Err(rule) = keys.check() {
            return broken(rule);
        }
        if keys.name != self.config.name {
            return Err(Error::Tampered { at: Location::new(path, 0), what: "the metadata under another name" });
        }
        match keys.cmk.is_some() == self.keys_tag.is_some() {
            true => Ok(()),
            false => broken("there is a second tag without a customer's key, or none with one".to_owned()),
        }
    }

    /// Verifies the tag that the current data key makes over the keys section, if the file is of `generation`.
    pub(crate) fn verify_keys_tag(
        disk: &dyn Disk,
        logstore_dir: &Path,
        generation: u64,
        data_key: &SecretKey,
    ) -> Result<()> {
        let path = path(logstore_dir);
        let bytes = read(disk, &path)?;
        let parsed = UnverifiedDocument::parse(&bytes).map_err(|error| error.in_file(&path, 0))?;
        let document = parsed.unverified();
        if document.generation != generation {
            return Ok(());
        }
        let at = Location::new(&path, 80 + document.a.len() as u64);
        let tampered = |_| Error::Tampered { at, what: "the keys section of the metadata" };
        parsed.verify_b(&metadata_key(data_key)).map_err(tampered)
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
        let keys = meta.keys.as_ref().ok_or_else(tampered)?;
        parsed.verify_b(&metadata_key(&data_key(keys)?)).map_err(|_| tampered())?;
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
        let keys = match document.b.is_empty() {
            true => None,
            false => Some(serde_json::from_slice(&document.b).map_err(malformed)?),
        };
        Ok(Self {
            generation: document.generation,
            features: document.features,
            keyring_version: document.keyring_version,
            config,
            keys,
            keys_tag: document.tag_b,
        })
    }

    /// Writes it as the generation that it says. `data_key` is the current data key, given when the keys section of a BYOK Logstore
    /// has changed; otherwise its tag stays.
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
        let mut document = Document {
            kind: DocumentKind::Logstore,
            features: Features::default(),
            store,
            subject: *id.as_bytes(),
            generation: self.generation,
            keyring_version: keyring.newest(),
            a: serde_json::to_vec(&self.config).expect(json),
            b: self.keys.as_ref().map_or_else(Vec::new, |keys| serde_json::to_vec(keys).expect(json)),
            tag_b: self.keys_tag,
        };
        if let Some(data_key) = data_key {
            document.sign_b(&metadata_key(data_key));
            self.keys_tag = document.tag_b;
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
