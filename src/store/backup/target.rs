//! The directory of a backup.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    BackupReport,
    record::{BackupRecord, RECORD},
    refused,
    source::View,
};
use crate::{
    Error, ErrorKind, Result,
    document::{DOCUMENT_BYTES_MAX, to_json},
    epoch,
    ids::LogstoreId,
    io::{self, Access, Disk, Existing, FileKind},
    keys::audit::is_audit_file,
    shard::ShardRecord,
    store::{
        catalogue::{self, Catalogue, Loaded, load_newest},
        core::Core,
        creation::{create_missing_directories, make_directory},
        identity::{ClaimedIdentity, identity_path, load_identity, verify_identity},
        inspect::{Checkpoint, VerifyReport},
        lock::StoreLock,
    },
};

const CHECKPOINT: &str = "checkpoint";
/// The longest file of the key audit log that is copied, in bytes.
const AUDIT_BYTES_MAX: u64 = 65 << 20;

/// The directory of a backup, locked.
pub(super) struct Target {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    _lock: StoreLock,
    /// The catalogue of the former backup, if it can be read.
    former: Option<Loaded>,
}

impl Target {
    /// Opens the directory, and creates it if there is none.
    ///
    /// # Errors
    /// [`Error::BackupRefused`] for a directory with other contents; [`Error::Locked`] while another
    /// process makes a backup there; [`Error::Io`].
    pub(super) fn open(core: &Core, dir: &Path) -> Result<Self> {
        let (outside, options) = (&*core.env.outside, &core.env.options);
        let find = |path: &Path| outside.resolve(path).map_err(Error::io("find", path));
        let (store, resolved) = (find(&core.env.dir)?, find(dir)?);
        if resolved.starts_with(&store) || store.starts_with(&resolved) {
            return Err(refused(dir, "it lies within the store, or the store within it"));
        }
        let access = if options.group_read { Access::GroupRead } else { Access::Owner };
        let disk = match outside.beneath(dir, access) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                make_directory(outside, dir, access)?;
                io::sync_parent(outside, &resolved)
                    .map_err(Error::io("sync the directory of", dir))?;
                outside.beneath(dir, access)
            }
            opened => opened,
        };
        let disk = disk.map_err(Error::io("open", dir))?;
        check_contents(core, &*disk, dir)?;
        let lock = StoreLock::take_or_create(&*disk, dir)?;
        // Another process may have begun before this one had the lock.
        check_contents(core, &*disk, dir)?;
        let load = |keyring: &_| load_newest(&*disk, dir, core.env.id, keyring);
        let former = match core.keys.with_keyring(load) {
            Ok(former) => Some(former),
            // The backup is damaged or from before a rotation of the service key: the new catalogue
            // replaces it.
            Err(error) if error.kind() == ErrorKind::Integrity => None,
            Err(error) => return Err(error),
        };
        Ok(Self { disk, dir: dir.to_owned(), _lock: lock, former })
    }

    /// Refuses to put an older state of the store in the place of a newer backup.
    ///
    /// # Errors
    /// [`Error::RolledBack`].
    pub(super) fn check_not_newer(&self, source: &Catalogue) -> Result<()> {
        let Some(former) = &self.former else { return Ok(()) };
        let (found, known) = (source.generation, former.catalogue.generation);
        if found >= known {
            return Ok(());
        }
        let what = format!(
            "the catalogue of the store is of generation {found}, the backup in {} was made of generation {known}",
            self.dir.display()
        );
        Err(Error::RolledBack { what })
    }

    /// Refuses a store that was rolled back and went on from there: the backup has segments that the
    /// store would replace by others. If the catalogue of the backup cannot be read, its last segments
    /// decide.
    ///
    /// # Errors
    /// [`Error::RolledBack`]; [`Error::Io`].
    pub(super) fn check_continues(&self, core: &Core, views: &[View]) -> Result<()> {
        for view @ View { name, shards, .. } in views {
            for ((shard, _), record) in shards.iter().zip(self.former_records(core, view)?) {
                if !shard.continues(&record)? {
                    let (shard, dir) = (shard.id(), self.dir.display());
                    let what = format!(
                        "shard {shard} of Logstore {name} does not continue the backup in {dir}, which has other logs than the store: back up to another directory"
                    );
                    return Err(Error::RolledBack { what });
                }
            }
        }
        Ok(())
    }

    /// The records of the shards of a Logstore in the former backup. None if it does not have the
    /// Logstore.
    fn former_records(&self, core: &Core, view: &View) -> Result<Vec<ShardRecord>> {
        let View { name, entry, logstore, meta, .. } = view;
        if let Some(former) = &self.former {
            let known = former.catalogue.logstores.get(name).filter(|known| known.id == entry.id);
            return Ok(known.map_or_else(Vec::new, |known| known.shards.clone()));
        }
        let (dir, unknown) =
            (self.logstore_dir(entry.id), vec![ShardRecord::default(); entry.shards.len()]);
        let shards = core.registry.shards_in(logstore, meta, &self.disk, &dir, &unknown);
        shards.iter().map(|shard| shard.record_by_files()).collect()
    }

    /// Notes that a run has begun, and makes the directories of a store.
    pub(super) fn begin(&self, core: &Core, begun_us: u64) -> Result<()> {
        let store = core.env.id;
        let nothing = BackupReport { begun_us, ..BackupReport::default() };
        self.note(&BackupRecord { store, finished_us: None, ..BackupRecord::of(core, &nothing) })?;
        create_missing_directories(&*self.disk, &self.dir)?;
        self.sync_dir(&self.dir)
    }

    /// Writes the record of the run.
    pub(super) fn note(&self, record: &BackupRecord) -> Result<()> {
        self.put(&self.dir.join(RECORD), to_json(record).as_bytes())
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn disk(&self) -> &dyn Disk {
        &*self.disk
    }

    pub(super) fn shared_disk(&self) -> &Arc<dyn Disk> {
        &self.disk
    }

    pub(super) fn former(&self) -> Option<&Loaded> {
        self.former.as_ref()
    }

    pub(super) fn logstore_dir(&self, id: LogstoreId) -> PathBuf {
        self.logstores_dir().join(id.to_string())
    }

    fn logstores_dir(&self) -> PathBuf {
        self.dir.join("logstores")
    }

    /// The place of a file of the store.
    pub(super) fn path_of(&self, store: &Path, path: &Path) -> PathBuf {
        self.dir.join(path.strip_prefix(store).unwrap_or(path))
    }

    /// Makes the directory of a Logstore.
    pub(super) fn make_logstore_dir(&self, id: LogstoreId) -> Result<PathBuf> {
        let dir = self.logstore_dir(id);
        self.make_dir(&dir)?;
        Ok(dir)
    }

    /// Makes a directory, durably, unless it is there.
    pub(super) fn make_dir(&self, dir: &Path) -> Result<()> {
        match self.disk.create_dir(dir) {
            Ok(()) => self.sync_dir(dir.parent().unwrap_or(dir)),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(Error::io("create", dir)(error)),
        }
    }

    pub(super) fn sync_dir(&self, dir: &Path) -> Result<()> {
        self.disk.sync_dir(dir).map_err(Error::io("sync", dir))
    }

    /// The Logstores that have a directory.
    pub(super) fn logstores(&self) -> Result<BTreeSet<LogstoreId>> {
        let dir = self.logstores_dir();
        let entries = self.disk.list_dir(&dir).map_err(Error::io("list", &dir))?;
        let dirs = entries.iter().filter(|entry| entry.kind == FileKind::Directory);
        Ok(dirs.filter_map(|entry| entry.name.parse().ok()).collect())
    }

    /// Writes a small file, durably, unless it has these contents.
    pub(super) fn put(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let stat = self.disk.stat(path).map_err(Error::io("look for", path))?;
        if stat.is_some_and(|stat| stat.kind == FileKind::File && stat.len == bytes.len() as u64) {
            let there = io::read_file(&*self.disk, path, bytes.len() as u64);
            if there.map_err(Error::io("read", path))? == bytes {
                return Ok(());
            }
        }
        io::write_file(&*self.disk, path, bytes, Existing::Replace)
            .map_err(Error::io("write", path))
    }

    /// Writes a file and its second copy, as [`Target::put`] does.
    pub(super) fn put_twice(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        self.put(path, bytes)?;
        self.put(&io::copy_path(path), bytes)
    }

    /// Copies the documents of the store and its key audit log, and verifies them.
    pub(super) fn put_documents(
        &self,
        core: &Core,
        catalogue: &Catalogue,
        verified: &mut VerifyReport,
    ) -> Result<()> {
        self.put_audit_log(core)?;
        let audit = core.keys.audit_log_in(&self.disk, self.dir.join("audit"));
        if let Err(error) = audit.verified(&[&catalogue.audit]) {
            verified.note(None, error)?;
        }
        for path in core.keys.probe_paths()? {
            // A probe can be made again, so a damaged one is no reason to have no backup.
            match core.keys.read_probe(&path).and_then(|_| read(core, &path)) {
                Ok(bytes) => self.put(&self.path_of(&core.env.dir, &path), &bytes)?,
                Err(error) if error.is_not_found() => {}
                Err(error) => verified.note(None, error)?,
            }
        }
        Ok(())
    }

    pub(super) fn put_checkpoint(&self, checkpoint: &Checkpoint) -> Result<()> {
        self.put(&self.dir.join(CHECKPOINT), checkpoint.to_bytes())
    }

    /// Copies the files of the key audit log, as far as they have whole lines. The catalogue was read
    /// before, so they have the record that it names.
    fn put_audit_log(&self, core: &Core) -> Result<()> {
        let dir = core.env.dir.join("audit");
        let entries = match core.env.disk.list_dir(&dir) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            entries => entries.map_err(Error::io("list", &dir))?,
        };
        let is_ours =
            |entry: &&io::DirEntry| entry.kind == FileKind::File && is_audit_file(&entry.name);
        for entry in entries.iter().filter(is_ours) {
            let path = dir.join(&entry.name);
            let bytes = match io::read_file(&*core.env.disk, &path, AUDIT_BYTES_MAX) {
                // It is no part of the log.
                Err(error) if error.kind() == std::io::ErrorKind::FileTooLarge => continue,
                bytes => bytes.map_err(Error::io("read", &path))?,
            };
            let whole = memchr::memrchr(b'\n', &bytes).map_or(0, |end| end + 1);
            self.put(&self.path_of(&core.env.dir, &path), bytes.get(..whole).unwrap_or_default())?;
        }
        Ok(())
    }

    /// Copies the file `STORE`. Without it, the directory is no store.
    fn put_identity(&self, core: &Core) -> Result<()> {
        let env = &core.env;
        let (_, bytes) =
            core.keys.with_keyring(|keyring| load_identity(&*env.disk, &env.dir, keyring))?;
        self.put_twice(&identity_path(&self.dir), &bytes)
    }

    /// Writes the catalogue of the backup, which puts the backup in force.
    pub(super) fn put_catalogue(
        &self,
        core: &Core,
        catalogue: &Catalogue,
        epoch: u64,
    ) -> Result<()> {
        let write = |keyring: &_| {
            catalogue::write_copy(&*self.disk, &self.dir, core.env.id, keyring, catalogue, epoch)
        };
        core.keys.with_keyring(write)?;
        self.put_identity(core)
    }
}

/// Checks that a directory is empty, or has a backup of this store.
fn check_contents(core: &Core, disk: &dyn Disk, dir: &Path) -> Result<()> {
    let entries = disk.list_dir(dir).map_err(Error::io("list", dir))?;
    let has = |name: &str| entries.iter().any(|entry| entry.name == name);
    if let Some(identity) = ClaimedIdentity::read(disk, dir)? {
        if identity.store != core.env.id {
            return Err(refused(dir, "it has another store"));
        }
        if has(epoch::NAME) {
            return Err(refused(dir, "it was opened for writing, and is a store of its own now"));
        }
    }
    let is_begun = |name: &str| name == "LOCK" || io::is_temporary(name, RECORD);
    if has(RECORD) || entries.iter().all(|entry| is_begun(&entry.name)) {
        return Ok(());
    }
    // The record is lost. A restored store has no checkpoint.
    let is_ours = || core.keys.with_keyring(|keyring| verify_identity(disk, dir, keyring)).is_ok();
    if has(CHECKPOINT) && is_ours() {
        return Ok(());
    }
    Err(refused(dir, "it is not empty, and has no backup"))
}

fn read(core: &Core, path: &Path) -> Result<Vec<u8>> {
    io::read_file(&*core.env.disk, path, DOCUMENT_BYTES_MAX).map_err(Error::io("read", path))
}
