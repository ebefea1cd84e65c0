//! Making a store, and going on with a creation that was interrupted.
//!
//! A creation first syncs a record, `CREATING`, which names the store and its keyring and is tagged under that keyring. Should the
//! process die, the next creation in the directory goes on only with the keyring that the record names. The `STORE` file, which
//! makes the directory a store, comes last, and the record goes.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{Deserialize, Serialize};
use tracing::info;

use super::{
    Store, StoreBuilder,
    builder::{Audit, identity_path, verify_identity, write_identity},
    catalogue,
    lock::StoreLock,
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
    segment::Features,
};

/// The directories of a store.
const PARTS: [&str; 4] = ["audit", "catalogue", "logstores", "probes"];
const RECORD: &str = "CREATING";
const EPOCH: &str = epoch::NAME;

/// What is in a directory that is no store yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Remains {
    /// Nothing.
    Nothing,
    /// An interrupted creation left it. Nothing was stored in it yet.
    Unfinished,
}

impl Remains {
    /// Looks what is in a directory.
    ///
    /// # Errors
    /// [`Error::StoreMissing`] when there is no directory; [`Error::StoreExists`]; [`Error::NotAStore`] when something is in it that no creation leaves behind;
    /// [`Error::WrongFileType`] when the name of something of ours stands for something else; [`Error::Io`].
    pub(super) fn look(disk: &dyn Disk, dir: &Path) -> Result<Self> {
        let entries = disk.list_dir(dir).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Error::StoreMissing { path: dir.to_owned() },
            _ => Error::io("list", dir)(error),
        })?;
        if let Some(store) = entries.iter().find(|entry| entry.name == "STORE") {
            return Err(match store.kind {
                FileKind::File => Error::StoreExists { path: dir.to_owned() },
                found => wrong_type(identity_path(dir), FileKind::File, found),
            });
        }
        let begun = entries.iter().any(|entry| entry.name == RECORD);
        for entry in &entries {
            let name = &*entry.name;
            let ours = match entry.kind {
                FileKind::File => {
                    matches!(name, "LOCK" | RECORD | EPOCH)
                        || is_temporary(name, RECORD)
                        || (begun && (is_temporary(name, EPOCH) || is_temporary(name, "STORE")))
                }
                FileKind::Directory if PARTS.contains(&name) => {
                    let part = dir.join(name);
                    let entries = disk.list_dir(&part).map_err(Error::io("list", &part))?;
                    let is_catalogue = |entry: &DirEntry| catalogue::is_catalogue_file_or_temporary(&entry.name);
                    entries.is_empty() || (begun && name == "catalogue" && entries.iter().all(is_catalogue))
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

fn wrong_type(path: PathBuf, expected: FileKind, found: FileKind) -> Error {
    let wrong = WrongFileType { path: path.clone(), expected, found };
    Error::io("look for", path)(wrong.into())
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RecordBody {
    keyring: KeyringId,
}

/// Writes the record of a creation with a keyring that is not written yet.
fn write_record(disk: &dyn Disk, dir: &Path, keyring: &Keyring) -> Result<()> {
    let path = dir.join(RECORD);
    let document = Document {
        kind: DocumentKind::Creation,
        features: Features::default(),
        store: keyring.store(),
        subject: [0; 16],
        generation: 1,
        keyring_version: keyring.newest(),
        a: serde_json::to_vec(&RecordBody { keyring: keyring.id() }).expect("plain data always serializes"),
        b: Vec::new(),
        tag_b: None,
    };
    let bytes = document.seal(&keyring.document_key(keyring.newest())?);
    io::write_file(disk, &path, &bytes, Existing::Replace).map_err(Error::io("write", &path))
}

/// Removes the record of a creation that has ended. Best effort: beside `STORE` it means nothing.
pub(super) fn forget(disk: &dyn Disk, dir: &Path) {
    let path = dir.join(RECORD);
    if let Ok(Some(stat)) = disk.stat(&path)
        && stat.kind == FileKind::File
    {
        let _ = disk.remove_file(&path);
    }
}

impl StoreBuilder {
    /// Makes a new store and its service keyring, and opens it. The directory may exist if it is empty, or if a creation in it was
    /// interrupted: that one is continued, with its keyring.
    ///
    /// # Errors
    /// [`Error::StoreExists`]; [`Error::NotAStore`] when the directory has something else in it; [`Error::KeyringExists`];
    /// [`Error::KeyringForeign`] when the keyring that is found is not that of the interrupted creation; [`Error::KeyringUnsafe`];
    /// [`Error::NetworkFileSystem`];
    /// [`Error::Locked`] when another process makes the store; [`Error::Io`]; [`Error::ServiceKey`] and
    /// [`ConfigError::NoKmsForRegion`](crate::ConfigError::NoKmsForRegion) when the keyring is to be under a master key and
    /// cannot, with nothing made.
    pub fn create(self) -> Result<Store> {
        self.options.check()?;
        let outside = Arc::clone(&self.disk);
        let file = self.keyring_file(&*outside).map_err(|error| match error {
            Error::KeyringMissing { path } => {
                Error::io("find the directory of the keyring", path)(std::io::ErrorKind::NotFound.into())
            }
            other => other,
        })?;
        let found = self.clone().rooted().and_then(|rooted| {
            let remains = Remains::look(&*rooted.disk, &rooted.dir)?;
            Ok((rooted, remains))
        });
        match found {
            Ok((rooted, remains)) => {
                if remains == Remains::Nothing && file.exists()? {
                    return Err(Error::KeyringExists { path: file.path().to_owned() });
                }
                rooted.create_in(&*outside, &file, None)
            }
            Err(Error::StoreMissing { .. }) => {
                if file.exists()? {
                    return Err(Error::KeyringExists { path: file.path().to_owned() });
                }
                // A KMS may refuse it: before anything is made.
                let new = self.draw_keyring(&file)?;
                self.make_directory(&*outside)?;
                self.rooted()?.create_in(&*outside, &file, Some(new))
            }
            Err(error) => Err(error),
        }
    }

    fn make_directory(&self, outside: &dyn Disk) -> Result<()> {
        let failed = |error| Error::io("create", &self.dir)(error);
        let dir = outside.resolve(&self.dir).map_err(failed)?;
        let parent = match dir.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let access = if self.options.group_read { Access::GroupRead } else { Access::Owner };
        let beside = outside.beneath(parent, access).map_err(failed)?;
        let name = dir.file_name().map_or_else(|| dir.clone(), |name| parent.join(name));
        match beside.create_dir(&name) {
            // Another process was quicker; the lock decides.
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
            made => made.map_err(failed),
        }
    }

    fn draw_keyring(&self, file: &Arc<KeyringFile>) -> Result<NewKeyring> {
        let store = StoreId::random(&*self.random).map_err(Error::io("draw an id for", &self.dir))?;
        self.new_keyring(file, store, self.clock.wall_us())
    }

    /// Makes the store in its directory, which exists.
    fn create_in(self, outside: &dyn Disk, file: &Arc<KeyringFile>, new: Option<NewKeyring>) -> Result<Store> {
        let (disk, dir) = (Arc::clone(&self.disk), self.dir.clone());
        self.check_file_system()?;
        let held = StoreLock::take_or_create(&*disk, &dir)?;
        // Another process may have made the store before this one had the lock.
        Remains::look(&*disk, &dir)?;
        let sync_parent = || {
            let resolved = outside.resolve(&dir).map_err(Error::io("find", &dir))?;
            io::sync_parent(outside, &resolved).map_err(Error::io("sync the directory of", &dir))
        };
        let keyring = match self.read_record(file)? {
            Some(keyring) => {
                info!(store = %keyring.store(), dir = %dir.display(), "the creation of a store is continued");
                file.remove_leftovers();
                keyring
            }
            None => {
                let new = new.map_or_else(|| self.draw_keyring(file), Ok)?;
                write_record(&*disk, &dir, new.keyring())?;
                sync_parent()?;
                // Durable before anything depends on it.
                new.write().inspect_err(|error| {
                    if matches!(error, Error::KeyringExists { .. }) {
                        // The keyring is another store's: no creation with this record can be continued.
                        forget(&*disk, &dir);
                    }
                })?
            }
        };
        for part in PARTS {
            let part = dir.join(part);
            match disk.create_dir(&part) {
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                made => made.map_err(Error::io("create", &part))?,
            }
        }
        if !catalogue::exists(&*disk, &dir)? {
            catalogue::write_first(&*disk, &dir, keyring.store(), &keyring)?;
        }
        let (fence, found) = self.take_over(keyring.store(), &keyring, 0)?;
        sync_parent()?;
        write_identity(&*disk, &dir, keyring.store(), &keyring, self.clock.wall_us())?;
        forget(&*disk, &dir);
        // The creation has succeeded if the store opens again.
        keyring.verify_file()?;
        verify_identity(&*disk, &dir, &keyring)?;
        let store = self.assemble(keyring.store(), keyring, found.catalogue, Some((held, fence)), Audit::Ours)?;
        store.shared.audit.record(AuditEvent::StoreCreated, None, "")?;
        store.shared.begin_anchoring(false)?;
        Ok(store)
    }

    /// The keyring of an interrupted creation; `None` when there was none, or when it did not get as far as writing its keyring.
    fn read_record(&self, file: &Arc<KeyringFile>) -> Result<Option<Keyring>> {
        let (disk, dir) = (&*self.disk, &self.dir);
        let path = dir.join(RECORD);
        let bytes = match io::read_file(disk, &path, DOCUMENT_BYTES_MAX) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return match file.exists()? {
                    // No record names it, so it is not known to be this store's.
                    true => Err(Error::KeyringForeign { path: file.path().to_owned() }),
                    false => Ok(None),
                };
            }
            bytes => bytes.map_err(Error::io("read", &path))?,
        };
        if !file.exists()? {
            return match catalogue::exists(disk, dir)? {
                // The keyring was there before the catalogue was.
                true => Err(Error::KeyringMissing { path: file.path().to_owned() }),
                false => Ok(None),
            };
        }
        let parsed = UnverifiedDocument::parse(&bytes).map_err(|error| error.in_file(&path, 0))?;
        let claimed = parsed.unverified();
        let body: RecordBody = serde_json::from_slice(&claimed.a)
            .map_err(|error| Error::corrupt(Location::new(&path, 80), format!("it does not parse: {error}")))?;
        let keyring = Keyring::load(Arc::clone(file), claimed.store, body.keyring, &self.keyring_seal())?;
        document::open(&bytes, DocumentKind::Creation, &path, |version| keyring.document_key(version))?;
        if keyring.newest() > 1 {
            // A keyring is rotated in a finished store alone.
            return Err(Error::KeyringForeign { path: file.path().to_owned() });
        }
        Ok(Some(keyring))
    }
}
