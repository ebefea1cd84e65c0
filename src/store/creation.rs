//! Creating a store, and continuing a creation that was interrupted.
//!
//! A creation first syncs a record, `CREATING`, which names the store and its keyring and is tagged
//! under that keyring. If the process dies, the next creation in the directory continues only with
//! the keyring that the record names. The creation writes the `STORE` file last, which makes the
//! directory a store, and then removes the record.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{Deserialize, Serialize};
use tracing::info;

use super::{
    anchoring,
    assembly::{Opening, Setup},
    catalogue,
    identity::{STORE, verify_identity, write_identity},
    lock::StoreLock,
    open_store::OpenStore,
    reserve::Reserve,
};
use crate::{
    Error, Result,
    document::{self, DOCUMENT_BYTES_MAX, Document, DocumentKind, UnverifiedDocument},
    epoch,
    error::Location,
    ids::{KeyringId, StoreId},
    io::{self, Access, DirEntry, Disk, Existing, FileKind, WrongFileType, is_temporary},
    keys::{
        AuditEvent,
        keyring::{Keyring, NewKeyring},
        keyring_file::KeyringFile,
    },
};

/// The directories of a store.
const PARTS: [&str; 4] = ["audit", "catalogue", "logstores", "probes"];
const RECORD: &str = "CREATING";
const EPOCH: &str = epoch::NAME;

/// The contents of a directory that is no store yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Remains {
    /// Nothing.
    Nothing,
    /// The remains of an interrupted creation. They hold no log data.
    Unfinished,
}

impl Remains {
    /// Lists a directory.
    ///
    /// # Errors
    /// [`Error::StoreMissing`] when there is no directory; [`Error::StoreExists`];
    /// [`Error::NotAStore`] when the directory has an entry that no creation leaves behind;
    /// [`Error::WrongFileType`] when an entry has a name of a creation and another type;
    /// [`Error::Io`].
    pub(super) fn look(disk: &dyn Disk, dir: &Path) -> Result<Self> {
        let entries = disk.list_dir(dir).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Error::StoreMissing { path: dir.to_owned() },
            _ => Error::io("list", dir)(error),
        })?;
        let identity = |entry: &&DirEntry| io::original_name(&entry.name) == STORE;
        if let Some(store) = entries.iter().find(identity) {
            return Err(match store.kind {
                FileKind::File => Error::StoreExists { path: dir.to_owned() },
                found => wrong_type(dir.join(&store.name), FileKind::File, found),
            });
        }
        let begun = entries.iter().any(|entry| entry.name == RECORD);
        for entry in &entries {
            let name = &*entry.name;
            let ours = match entry.kind {
                FileKind::File => {
                    matches!(name, "LOCK" | RECORD | EPOCH)
                        || is_temporary(name, RECORD)
                        || (begun
                            && (is_temporary(name, EPOCH)
                                || io::is_either_or_temporary(name, STORE)))
                }
                FileKind::Directory if PARTS.contains(&name) => {
                    let part = dir.join(name);
                    let entries = disk.list_dir(&part).map_err(Error::io("list", &part))?;
                    let is_catalogue =
                        |entry: &DirEntry| catalogue::is_catalogue_file_or_temporary(&entry.name);
                    entries.is_empty()
                        || (begun && name == "catalogue" && entries.iter().all(is_catalogue))
                }
                _ => false,
            };
            if !ours {
                let expected = match name {
                    "LOCK" | RECORD | EPOCH => Some(FileKind::File),
                    _ if begun && PARTS.contains(&name) => Some(FileKind::Directory),
                    _ => None,
                };
                return Err(match expected.filter(|expected| *expected != entry.kind) {
                    Some(expected) => wrong_type(dir.join(name), expected, entry.kind),
                    None => Error::NotAStore { path: dir.to_owned() },
                });
            }
        }
        Ok(if entries.is_empty() { Self::Nothing } else { Self::Unfinished })
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RecordBody {
    keyring: KeyringId,
}

/// Creates a store and its keyring, and opens it.
pub(super) fn create(setup: Setup) -> Result<OpenStore> {
    setup.options.check()?;
    let outside = Arc::clone(&setup.disk);
    let file = setup.keyring_file(&*outside).map_err(|error| match error {
        Error::KeyringMissing { path } => Error::io("find the directory of the keyring", path)(
            std::io::ErrorKind::NotFound.into(),
        ),
        other => other,
    })?;
    let found = setup.clone().rooted_for_writing().and_then(|rooted| {
        let remains = Remains::look(&*rooted.0.disk, &rooted.0.dir)?;
        Ok((rooted, remains))
    });
    match found {
        Ok((rooted, remains)) => {
            if remains == Remains::Nothing && file.exists()? {
                return Err(Error::KeyringExists { path: file.path().to_owned() });
            }
            create_in(rooted, &*outside, &file, None)
        }
        Err(Error::StoreMissing { .. }) => {
            if file.exists()? {
                return Err(Error::KeyringExists { path: file.path().to_owned() });
            }
            // Before the directory is made, because a KMS may refuse to wrap the keyring.
            let new = draw_keyring(&setup, &file)?;
            make_directory(&*outside, &setup.dir, setup.access())?;
            create_in(setup.rooted_for_writing()?, &*outside, &file, Some(new))
        }
        Err(error) => Err(error),
    }
}

/// Makes a directory outside a store. Its parent must exist.
///
/// # Errors
/// [`Error::Io`].
pub(super) fn make_directory(outside: &dyn Disk, dir: &Path, access: Access) -> Result<()> {
    let failed = |error| Error::io("create", dir)(error);
    let dir = outside.resolve(dir).map_err(failed)?;
    let parent = match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let beside = outside.beneath(parent, access).map_err(failed)?;
    let name = dir.file_name().map_or_else(|| dir.clone(), |name| parent.join(name));
    match beside.create_dir(&name) {
        // Another process has made the directory. The lock decides which of the two continues.
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        made => made.map_err(failed),
    }
}

fn draw_keyring(setup: &Setup, file: &Arc<KeyringFile>) -> Result<NewKeyring> {
    let store = StoreId::random(&*setup.random).map_err(Error::io("draw an id for", &setup.dir))?;
    setup.new_keyring(file, store, setup.clock.wall_us())
}

/// Creates the store in its directory, which exists.
fn create_in(
    (setup, reserve): (Setup, Arc<Reserve>),
    outside: &dyn Disk,
    file: &Arc<KeyringFile>,
    new: Option<NewKeyring>,
) -> Result<OpenStore> {
    let (disk, dir) = (Arc::clone(&setup.disk), setup.dir.clone());
    setup.check_file_system()?;
    let held = StoreLock::take_or_create(&*disk, &dir)?;
    // Another process may have created the store before this one had the lock.
    Remains::look(&*disk, &dir)?;
    let sync_parent = || {
        let resolved = outside.resolve(&dir).map_err(Error::io("find", &dir))?;
        io::sync_parent(outside, &resolved).map_err(Error::io("sync the directory of", &dir))
    };
    let keyring = match read_record(&setup, file)? {
        Some(keyring) => {
            info!(store = %keyring.store(), dir = %dir.display(), "store creation resumed");
            file.remove_leftovers();
            keyring
        }
        None => {
            let new = new.map_or_else(|| draw_keyring(&setup, file), Ok)?;
            write_record(&*disk, &dir, new.keyring())?;
            sync_parent()?;
            // The keyring is durable before any document depends on it.
            new.write().inspect_err(|error| {
                if matches!(error, Error::KeyringExists { .. }) {
                    // The keyring is another store's: no creation with this record can continue.
                    forget(&*disk, &dir);
                }
            })?
        }
    };
    create_missing_directories(&*disk, &dir)?;
    if !catalogue::exists(&*disk, &dir)? {
        catalogue::write_first(&*disk, &dir, keyring.store(), &keyring)?;
    }
    let (fence, found) = setup.take_over(keyring.store(), &keyring, 0)?;
    sync_parent()?;
    write_identity(&*disk, &dir, keyring.store(), &keyring, setup.clock.wall_us())?;
    forget(&*disk, &dir);
    // The creation has succeeded if the store can be opened again.
    keyring.verify_file()?;
    verify_identity(&*disk, &dir, &keyring)?;
    let opening = Opening::for_writing(keyring, found.catalogue, held, fence, reserve);
    let store = setup.assemble(opening)?;
    store.core().keys.audit().record(AuditEvent::StoreCreated, None, "")?;
    anchoring::begin(store.core(), false)?;
    store.core().tend_reserve();
    Ok(store)
}

/// Creates the directories of a store that are missing: all of them in a new store; in an old one
/// those that a copy has left out because they were empty. The caller syncs `dir`.
pub(super) fn create_missing_directories(disk: &dyn Disk, dir: &Path) -> Result<()> {
    let entries = disk.list_dir(dir).map_err(Error::io("list", dir))?;
    for part in PARTS.iter().filter(|part| entries.iter().all(|entry| entry.name != **part)) {
        let part = dir.join(part);
        disk.create_dir(&part).map_err(Error::io("create", &part))?;
    }
    Ok(())
}

/// The keyring of an interrupted creation. `None` if there was no creation, or if it was
/// interrupted before it wrote its keyring.
fn read_record(setup: &Setup, file: &Arc<KeyringFile>) -> Result<Option<Keyring>> {
    let (disk, dir) = (&*setup.disk, &setup.dir);
    let path = dir.join(RECORD);
    let bytes = match io::read_file(disk, &path, DOCUMENT_BYTES_MAX) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return match file.exists()? {
                // No record names the keyring, so it may be another store's.
                true => Err(Error::KeyringForeign { path: file.path().to_owned() }),
                false => Ok(None),
            };
        }
        bytes => bytes.map_err(Error::io("read", &path))?,
    };
    if !file.exists()? {
        return match catalogue::exists(disk, dir)? {
            // The creation wrote the keyring before the catalogue, so the keyring was removed.
            true => Err(Error::KeyringMissing { path: file.path().to_owned() }),
            false => Ok(None),
        };
    }
    let parsed = UnverifiedDocument::parse(&bytes).map_err(|error| error.in_file(&path, 0))?;
    let claimed = parsed.unverified();
    let body: RecordBody = serde_json::from_slice(&claimed.a).map_err(|error| {
        Error::corrupt(Location::new(&path, 80), format!("it does not parse: {error}"))
    })?;
    let keyring =
        Keyring::load(Arc::clone(file), claimed.store, body.keyring, &setup.keyring_seal())?;
    document::open(&bytes, DocumentKind::Creation, &path, |version| keyring.document_key(version))?;
    if keyring.newest() > 1 {
        // Only a finished store rotates its keyring.
        return Err(Error::KeyringForeign { path: file.path().to_owned() });
    }
    Ok(Some(keyring))
}

/// Writes the record of a creation, before its keyring is written.
fn write_record(disk: &dyn Disk, dir: &Path, keyring: &Keyring) -> Result<()> {
    let path = dir.join(RECORD);
    let body = RecordBody { keyring: keyring.id() };
    let document =
        Document::new(DocumentKind::Creation, keyring.store(), 1, keyring.newest(), &body);
    let bytes = document.seal(&keyring.document_key(keyring.newest())?);
    io::write_file(disk, &path, &bytes, Existing::Replace).map_err(Error::io("write", &path))
}

/// Removes the record of a finished creation. Best effort: the record has no effect beside `STORE`.
pub(super) fn forget(disk: &dyn Disk, dir: &Path) {
    let path = dir.join(RECORD);
    if let Ok(Some(stat)) = disk.stat(&path)
        && stat.kind == FileKind::File
    {
        let _ = disk.remove_file(&path);
    }
}

fn wrong_type(path: PathBuf, expected: FileKind, found: FileKind) -> Error {
    let wrong = WrongFileType { path: path.clone(), expected, found };
    Error::io("look for", path)(wrong.into())
}
