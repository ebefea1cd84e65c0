//! The `STORE` file, which names the store and its keyring.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    document::{self, DOCUMENT_BYTES_MAX, Document, DocumentKind, UnverifiedDocument},
    error::Location,
    ids::{KeyringId, StoreId},
    io::{self, Disk, Existing},
    keys::keyring::Keyring,
    segment::Features,
};

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoreBody {
    created_us: u64,
    keyring: KeyringId,
}

impl StoreBody {
    fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        serde_json::from_slice(bytes).map_err(|error| {
            Error::corrupt(Location::new(path, 80), format!("it does not parse: {error}"))
        })
    }
}

/// The contents of a `STORE` file, before the keyring authenticates it.
pub(super) struct ClaimedIdentity {
    pub(super) store: StoreId,
    pub(super) keyring: KeyringId,
    pub(super) features: Features,
}

impl ClaimedIdentity {
    /// Reads the `STORE` file, or its second copy, without a key. `None` if there is neither.
    ///
    /// # Errors
    /// [`Error::NotAStore`], [`Error::NewerFormat`], [`Error::Corrupt`], [`Error::Io`].
    pub(super) fn read(disk: &dyn Disk, dir: &Path) -> Result<Option<Self>> {
        let claimed = document::load_either(&identity_path(dir), |path| {
            let bytes = read(disk, path)?;
            let parsed =
                UnverifiedDocument::parse(&bytes).map_err(|error| error.in_file(path, 0))?;
            let claimed = parsed.unverified();
            if claimed.kind != DocumentKind::Store {
                return Err(Error::NotAStore { path: dir.to_owned() });
            }
            let body = StoreBody::parse(path, &claimed.a)?;
            Ok(Self { store: claimed.store, keyring: body.keyring, features: claimed.features })
        });
        match claimed {
            Err(error) if error.is_not_found() => Ok(None),
            claimed => claimed.map(Some),
        }
    }
}

/// The name of the file that names the store. The file exists twice.
pub(super) const STORE: &str = "STORE";

pub(super) fn identity_path(dir: &Path) -> PathBuf {
    dir.join(STORE)
}

/// Authenticates the `STORE` file.
///
/// # Errors
/// [`Error::Io`], and the integrity errors of the file.
pub(super) fn verify_identity(disk: &dyn Disk, dir: &Path, keyring: &Keyring) -> Result<()> {
    load_identity(disk, dir, keyring).map(drop)
}

/// Writes the `STORE` file or its second copy again, if it is lost or damaged.
///
/// # Errors
/// [`Error::Io`], and the integrity errors of the file.
pub(super) fn mend_identity(disk: &dyn Disk, dir: &Path, keyring: &Keyring) -> Result<()> {
    let (_, bytes) = load_identity(disk, dir, keyring)?;
    let path = identity_path(dir);
    io::mend(disk, &path, &bytes).map_err(Error::io("write", path))
}

/// Reads the `STORE` file, or its second copy. It must name the keyring and its store. Returns the
/// bytes too.
///
/// # Errors
/// [`Error::Io`], and the integrity errors of the file.
pub(super) fn load_identity(
    disk: &dyn Disk,
    dir: &Path,
    keyring: &Keyring,
) -> Result<(Document, Vec<u8>)> {
    document::load_either(&identity_path(dir), |path| {
        let bytes = read(disk, path)?;
        let document = document::open(&bytes, DocumentKind::Store, path, |version| {
            keyring.document_key(version)
        })?;
        let body = StoreBody::parse(path, &document.a)?;
        if document.store != keyring.store() || body.keyring != keyring.id() {
            return Err(Error::Tampered {
                at: Location::new(path, 24),
                what: "the identity of another store",
            });
        }
        match document.generation {
            1 => Ok((document, bytes)),
            _ => Err(Error::corrupt(
                Location::new(path, 56),
                "the generation of the identity of a store is not 1",
            )),
        }
    })
}

fn read(disk: &dyn Disk, path: &Path) -> Result<Vec<u8>> {
    io::read_file(disk, path, DOCUMENT_BYTES_MAX).map_err(Error::io("read", path))
}

/// Writes the `STORE` file again under the newest version of the service key, otherwise unchanged.
///
/// # Errors
/// [`Error::Io`], and the integrity errors of the file.
pub(super) fn rewrite_identity(disk: &dyn Disk, dir: &Path, keyring: &Keyring) -> Result<()> {
    let (document, _) = load_identity(disk, dir, keyring)?;
    put_identity(disk, dir, keyring, Document { features: Features::default(), ..document })
}

/// Copies the `STORE` file into the copy of a store, under the newest version of the service key.
///
/// # Errors
/// [`Error::Io`], and the integrity errors of the file.
pub(super) fn copy_identity(
    from: &dyn Disk,
    from_dir: &Path,
    to: &dyn Disk,
    dir: &Path,
    keyring: &Keyring,
) -> Result<()> {
    let (document, _) = load_identity(from, from_dir, keyring)?;
    put_identity(to, dir, keyring, Document { features: Features::default(), ..document })
}

/// Writes the `STORE` file of a new store, or of a store with a new keyring.
///
/// # Errors
/// [`Error::Io`].
pub(super) fn write_identity(
    disk: &dyn Disk,
    dir: &Path,
    store: StoreId,
    keyring: &Keyring,
    now_us: u64,
) -> Result<()> {
    let body = StoreBody { created_us: now_us, keyring: keyring.id() };
    let document = Document::new(DocumentKind::Store, store, 1, keyring.newest(), &body);
    put_identity(disk, dir, keyring, document)
}

fn put_identity(disk: &dyn Disk, dir: &Path, keyring: &Keyring, document: Document) -> Result<()> {
    let path = identity_path(dir);
    let document = Document { keyring_version: keyring.newest(), ..document };
    let bytes = document.seal(&keyring.document_key(keyring.newest())?);
    io::write_twice(disk, &path, &bytes, Existing::Replace).map_err(Error::io("write", &path))
}
