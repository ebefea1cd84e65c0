//! The file of the service keyring: where it may be, who may have a right to it, and how the engine
//! makes and replaces it.

use std::{
    io::ErrorKind,
    path::{Path, PathBuf},
    sync::Arc,
};

use zeroize::Zeroizing;

use crate::{
    Error, Result,
    crypto::{HashAlg, hash},
    error::KeyringRisk,
    io::{self, Access, Disk, Existing, OpenMode, Owner},
    sync::{LockRank, Mutex, lock},
};

/// The largest keyring file, in bytes.
const KEYRING_BYTES_MAX: u64 = 4 << 20;
/// The permission bits of the group and of others.
const OTHERS: u32 = 0o077;
/// The permission bit that the group may have if the embedder allows it.
const GROUP_READ: u32 = 0o040;

/// The file of a service keyring. The path of the caller is resolved once, so a symlink stays when
/// the engine replaces its target.
#[derive(Debug)]
pub(crate) struct KeyringFile {
    /// The disk below the directory that the file is in.
    disk: Arc<dyn Disk>,
    path: PathBuf,
    access: Access,
    /// The owner of the store directory, or the future owner if it does not exist yet; `None` on a
    /// disk without users.
    store_owner: Option<Owner>,
    /// SHA-256 of the contents that this process loaded or wrote last.
    known: Mutex<Option<[u8; 32]>>,
}

impl KeyringFile {
    /// Finds the file of the keyring of the store in `store`. The file need not exist.
    ///
    /// # Errors
    /// [`Error::KeyringUnsafe`] for a path inside the store directory; [`Error::KeyringMissing`]
    /// when not even its directory exists; [`Error::Io`].
    pub(crate) fn locate(
        disk: &dyn Disk,
        path: &Path,
        store: &Path,
        access: Access,
    ) -> Result<Self> {
        let inside = |path: &Path| Error::KeyringUnsafe {
            path: path.to_owned(),
            why: KeyringRisk::InsideStore,
        };
        let missing = |error: std::io::Error| match error.kind() {
            ErrorKind::NotFound => Error::KeyringMissing { path: path.to_owned() },
            _ => Error::io("find the service keyring", path)(error),
        };
        let (store, store_owner) = match disk.resolve(store) {
            Ok(store) => {
                let look = |path: &Path| disk.stat(path).map_err(Error::io("look for", path));
                let stat = match look(&store)? {
                    // A store that root makes belongs to the owner of its parent directory.
                    None => look(store.parent().unwrap_or(Path::new(".")))?,
                    found => found,
                };
                (store, stat.and_then(|stat| stat.owner))
            }
            Err(error) if error.kind() == ErrorKind::NotFound => (store.to_owned(), None),
            Err(error) => return Err(Error::io("find", store)(error)),
        };
        let path = match disk.resolve(path) {
            // The directory does not exist. It may be below the store, which may not exist either.
            Err(error) if error.kind() == ErrorKind::NotFound && leads_into(disk, path, &store) => {
                return Err(inside(path));
            }
            resolved => resolved.map_err(missing)?,
        };
        let dir = match path.parent() {
            Some(dir) if dir.as_os_str().is_empty() => Path::new("."),
            Some(dir) => dir,
            None => {
                return Err(Error::InvalidArgument(format!(
                    "{} cannot be a keyring",
                    path.display()
                )));
            }
        };
        if path.starts_with(&store) {
            return Err(inside(&path));
        }
        let disk = disk.beneath(dir, access).map_err(missing)?;
        Ok(Self {
            disk,
            path,
            access,
            store_owner,
            known: Mutex::new(LockRank::KeyringKnown, None),
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the file exists, of any type.
    pub(crate) fn exists(&self) -> Result<bool> {
        Ok(self.disk.stat(&self.path).map_err(Error::io("look for", &self.path))?.is_some())
    }

    /// Reads the file, if only its owner has a right to it.
    ///
    /// # Errors
    /// [`Error::KeyringMissing`], [`Error::KeyringUnsafe`], [`Error::WrongFileType`],
    /// [`Error::Io`].
    pub(crate) fn read(&self) -> Result<Zeroizing<Vec<u8>>> {
        let failed = |error: std::io::Error| match error.kind() {
            ErrorKind::NotFound => Error::KeyringMissing { path: self.path.clone() },
            _ => Error::io("read the service keyring", &self.path)(error),
        };
        let file = self.disk.open(&self.path, OpenMode::Read).map_err(failed)?;
        if let Some(owner) = file.stat().map_err(failed)?.owner {
            self.check(owner)?;
        }
        io::read_open_file(&*file, KEYRING_BYTES_MAX).map(Zeroizing::new).map_err(failed)
    }

    fn check(&self, owner: Owner) -> Result<()> {
        let refuse = |why| Err(Error::KeyringUnsafe { path: self.path.clone(), why });
        let group_may_read = self.access == Access::GroupRead;
        let refused = if group_may_read { OTHERS & !GROUP_READ } else { OTHERS };
        if owner.mode & refused != 0 {
            return refuse(KeyringRisk::Exposed { mode: owner.mode, group_may_read });
        }
        let process = io::process_user();
        let of_store = process == 0 && self.store_owner.is_some_and(|store| store.uid == owner.uid);
        if owner.uid == process || owner.uid == 0 || of_store {
            return Ok(());
        }
        refuse(KeyringRisk::ForeignOwner { uid: owner.uid })
    }

    /// Makes the file durably. Never replaces an existing file, also not one that another process
    /// makes at the same time.
    ///
    /// # Errors
    /// [`Error::KeyringExists`], [`Error::Io`].
    pub(crate) fn create(&self, bytes: &[u8]) -> Result<()> {
        io::write_file(&*self.disk, &self.path, bytes, Existing::Keep).map_err(
            |error| match error.kind() {
                ErrorKind::AlreadyExists => Error::KeyringExists { path: self.path.clone() },
                _ => Error::io("write the service keyring", &self.path)(error),
            },
        )?;
        self.note_known(bytes);
        Ok(())
    }

    /// Notes the contents that this process goes by.
    pub(crate) fn note_known(&self, bytes: &[u8]) {
        *lock(&self.known) = Some(hash(HashAlg::Sha256, &[bytes]));
    }

    /// Replaces the file, durably, unless another process has replaced it since this one loaded it.
    /// The lock of the old file keeps other processes out between this check and the rename.
    ///
    /// # Errors
    /// [`Error::Locked`] while another process replaces it; [`Error::KeyringChanged`];
    /// [`Error::Io`].
    pub(crate) fn replace(&self, bytes: &[u8]) -> Result<()> {
        let failed = || Error::io("write the service keyring", &self.path);
        let old = self.disk.open(&self.path, OpenMode::Read).map_err(failed())?;
        match old.try_lock() {
            Ok(true) => {}
            Ok(false) => return Err(Error::Locked { path: self.path.clone(), pid: None }),
            // A file system without locks.
            Err(error) if error.kind() == ErrorKind::Unsupported => {}
            Err(error) => return Err(failed()(error)),
        }
        let (locked, named) =
            (old.stat().map_err(failed())?, self.disk.stat(&self.path).map_err(failed())?);
        let found =
            io::read_open_file(&*old, KEYRING_BYTES_MAX).map(Zeroizing::new).map_err(failed())?;
        let same_file = named.is_some_and(|named| named.identity == locked.identity);
        let known = lock(&self.known).is_none_or(|known| hash(HashAlg::Sha256, &[&found]) == known);
        if !same_file || !known {
            return Err(Error::KeyringChanged { path: self.path.clone() });
        }
        io::write_file(&*self.disk, &self.path, bytes, Existing::Replace).map_err(failed())?;
        self.note_known(bytes);
        Ok(())
    }

    /// Removes the file.
    pub(crate) fn remove(&self) -> Result<()> {
        self.disk.remove_file(&self.path).map_err(Error::io("remove", &self.path))
    }

    /// Makes the name of the file durable.
    pub(crate) fn sync_name(&self) -> Result<()> {
        io::sync_parent(&*self.disk, &self.path).map_err(Error::io("sync", &self.path))
    }

    /// Removes the temporary files, which hold keys, of processes that were killed. If the
    /// directory cannot be listed, they stay.
    pub(crate) fn remove_leftovers(&self) {
        if let Err(error) = io::remove_temporaries(&*self.disk, &self.path) {
            tracing::debug!(path = %self.path.display(), %error, "cannot list temporary files of the service keyring");
        }
    }
}

/// Whether `path`, whose directory does not exist, would lie in the store directory.
fn leads_into(disk: &dyn Disk, path: &Path, store: &Path) -> bool {
    let nearest = path.ancestors().skip(1).find_map(|dir| disk.resolve(dir).ok());
    nearest.is_some_and(|dir| dir.starts_with(store))
}

#[cfg(test)]
impl KeyringFile {
    /// A file on the real disk, of a store that does not exist.
    pub(crate) fn for_tests(path: &Path) -> Arc<Self> {
        let store = path.with_extension("store");
        Arc::new(
            Self::locate(&io::RealDisk, path, &store, Access::Owner).expect("its directory exists"),
        )
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::io::RealDisk;

    /// A store that root makes belongs to the owner of its parent directory, and so does a keyring
    /// in that directory.
    #[test]
    fn who_will_own_the_store_is_known_before_it_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let owner = RealDisk.stat(dir.path()).unwrap().unwrap().owner;
        let store = dir.path().join("store");
        let located = || {
            KeyringFile::locate(&RealDisk, &dir.path().join("keyring"), &store, Access::Owner)
                .unwrap()
        };
        assert_eq!(located().store_owner.map(|owner| owner.uid), owner.map(|owner| owner.uid));
        RealDisk.create_dir(&store).unwrap();
        assert_eq!(located().store_owner.map(|owner| owner.uid), owner.map(|owner| owner.uid));
    }
}
