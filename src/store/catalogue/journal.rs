//! The writer of the catalogue: appends changes to the journal, and begins a new file when the
//! journal is long.

use std::{
    iter,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use tracing::warn;

use super::{
    super::{
        anchor::{AnchorPlace, Feeder, Mirror},
        reserve::Borrowing,
    },
    Catalogue, Change,
    file::{self, CHANGES_MAX, Place, Tip},
};
use crate::{
    Error, Result,
    config::LogstoreName,
    epoch::Fence,
    ids::{LogstoreId, StoreId},
    io::{self, Disk, DiskFile, Existing, FileKind, OpenMode},
    keys::service_key::ServiceKey,
    shard::{Head, RecordHead},
    sync::{Condvar, LockRank, Mutex, RwLock, RwLockReadGuard, lock, read, wait, write},
};

/// A journal up to this length never causes a new snapshot.
const JOURNAL_BYTES_MIN: u64 = 1 << 20;

/// The catalogue of an open store, and its file.
///
/// Changes that arrive during a sync share the next one (group commit). The first caller that finds
/// no leader becomes the leader: it writes and syncs one record for all waiting changes, and wakes
/// the followers.
pub(crate) struct Journal {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    store: StoreId,
    service: Arc<ServiceKey>,
    /// The durable catalogue.
    catalogue: RwLock<Catalogue>,
    queue: Mutex<Queue>,
    done: Condvar,
    /// `None` in a store that is open for reading.
    fence: Option<Arc<Fence>>,
    /// Copies the file to the anchor.
    feeder: RwLock<Option<Arc<Feeder>>>,
    /// The leader holds this lock during I/O. All others hold it for a moment, except in
    /// [`Journal::settle`].
    files: Mutex<Files>,
}

#[derive(Default)]
struct Queue {
    /// The changes that the next leader writes.
    waiting: Vec<Change>,
    /// Their result.
    outcome: Arc<OnceLock<Result<()>>>,
    leading: bool,
    /// Whether the reserve may be used for them.
    borrowing: bool,
}

/// The files that this writer has begun.
#[derive(Default)]
struct Files {
    /// Their number. The last files may not exist, because a failed attempt uses a number too.
    begun: u64,
    /// The file that takes the records. `None` after a failure, when its contents are unknown: the
    /// next change begins another file.
    current: Option<Writer>,
}

/// The file that takes the records, and its second copy.
struct Writer {
    fence: Arc<Fence>,
    file: Arc<dyn DiskFile>,
    /// `None` if an object of another type has its name.
    copy: Option<Arc<dyn DiskFile>>,
    path: PathBuf,
    serial: u64,
    /// The length of the snapshot with its tips.
    snapshot_len: u64,
    /// The offset of the next record.
    end: u64,
    /// The last record.
    last: Tip,
    /// Whether the tip that names it is synced.
    settled: bool,
}

impl Writer {
    fn mirror(&self) -> Mirror {
        let place = AnchorPlace { epoch: self.fence.epoch(), serial: self.serial };
        Mirror::new(Arc::clone(&self.file), place, self.end)
    }

    fn files(&self) -> impl Iterator<Item = &Arc<dyn DiskFile>> {
        iter::once(&self.file).chain(&self.copy)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.files()
            .try_for_each(|file| file.write_at(bytes, offset))
            .map_err(Error::io("write", &self.path))
    }

    fn sync(&self) -> Result<()> {
        self.files().try_for_each(|file| file.sync_data()).map_err(Error::io("sync", &self.path))
    }
}

impl RecordHead for Journal {
    fn record_head(
        &self,
        name: &LogstoreName,
        id: LogstoreId,
        shard: u32,
        head: Head,
    ) -> Result<()> {
        self.commit(vec![Change::reached(name, id, shard, head)])
    }
}

impl Journal {
    /// The catalogue of a store that is open for reading.
    pub(crate) fn for_reading(
        disk: Arc<dyn Disk>,
        store_dir: &Path,
        store: StoreId,
        service: Arc<ServiceKey>,
        catalogue: Catalogue,
    ) -> Self {
        Self {
            disk,
            dir: super::dir(store_dir),
            store,
            service,
            catalogue: RwLock::new(LockRank::Catalogue, catalogue),
            queue: Mutex::new(LockRank::JournalQueue, Queue::default()),
            done: Condvar::new(),
            fence: None,
            feeder: RwLock::new(LockRank::JournalFeeder, None),
            files: Mutex::new(LockRank::JournalFiles, Files::default()),
        }
    }

    /// The catalogue of a store that this process has opened for writing. A commit works only after
    /// the first [`Journal::replace`] or [`Journal::rewrite`].
    pub(crate) fn for_writing(
        disk: Arc<dyn Disk>,
        store_dir: &Path,
        store: StoreId,
        service: Arc<ServiceKey>,
        catalogue: Catalogue,
        fence: Arc<Fence>,
    ) -> Self {
        let reading = Self::for_reading(disk, store_dir, store, service, catalogue);
        Self { fence: Some(fence), ..reading }
    }

    /// Writes a new file and its second copy, and removes the others.
    fn begin(&self, catalogue: &Catalogue, serial: u64, fence: Arc<Fence>) -> Result<Writer> {
        let disk = &*self.disk;
        let place = Place { epoch: fence.epoch(), serial };
        let path = place.path(&self.dir);
        let beside = io::copy_path(&path);
        let (bytes, tag) =
            file::encode_snapshot(catalogue, place, self.store, &self.service.keyring())?;
        io::write_twice(disk, &path, &bytes, Existing::Keep).map_err(Error::io("write", &path))?;
        fence.check()?;
        for entry in disk.list_dir(&self.dir).map_err(Error::io("list", &self.dir))? {
            let other = self.dir.join(&entry.name);
            let is_old = file::is_catalogue_file(&entry.name) && other != path && other != beside;
            // An object of another type is no catalogue file, and stays.
            if is_old && matches!(entry.kind, FileKind::File | FileKind::Unknown) {
                disk.remove_file(&other).map_err(Error::io("remove", &other))?;
            }
        }
        // If an earlier file comes back after a crash, the newer file is still in force.
        disk.sync_dir(&self.dir).map_err(Error::io("sync", &self.dir))?;
        let open =
            |path: &Path| disk.open(path, OpenMode::ReadWrite).map_err(Error::io("open", path));
        let file = open(&path)?;
        let copy = match open(&beside) {
            Err(error @ Error::WrongFileType { .. }) => {
                warn!(%error, "catalogue without a second copy");
                None
            }
            opened => Some(opened?),
        };
        let len = bytes.len() as u64;
        let last = Tip { number: catalogue.generation, tag };
        Ok(Writer {
            fence,
            file,
            copy,
            path,
            serial,
            snapshot_len: len,
            end: len,
            last,
            settled: true,
        })
    }

    /// The durable catalogue. The caller must not commit while it holds this guard.
    pub(crate) fn now(&self) -> RwLockReadGuard<'_, Catalogue> {
        read(&self.catalogue)
    }

    /// Replaces the catalogue in memory, in a store that is open for reading. `known` was its
    /// generation before the caller read the file. Keeps a later catalogue that another thread has
    /// put in place since.
    pub(crate) fn reload(&self, catalogue: Catalogue, known: u64) {
        let mut now = write(&self.catalogue);
        if catalogue.generation >= now.generation || now.generation == known {
            *now = catalogue;
        }
    }

    /// Lets a feeder copy the file to the anchor, now and after each change.
    pub(crate) fn feed(&self, feeder: Arc<Feeder>) {
        if let Some(writer) = &lock(&self.files).current {
            feeder.want(writer.mirror());
        }
        *write(&self.feeder) = Some(feeder);
    }

    /// The file that takes the records, for messages.
    pub(crate) fn path(&self) -> PathBuf {
        lock(&self.files)
            .current
            .as_ref()
            .map_or_else(|| self.dir.clone(), |writer| writer.path.clone())
    }

    /// Makes changes durable. Blocks for one write and one sync, and for those under way.
    ///
    /// # Errors
    /// The error of the write or the sync. The next commit begins a new file without these changes.
    pub(crate) fn commit(&self, changes: Vec<Change>) -> Result<()> {
        let mut queue = lock(&self.queue);
        queue.waiting.extend(changes);
        queue.borrowing |= Borrowing::is_under_way();
        let outcome = Arc::clone(&queue.outcome);
        loop {
            if let Some(outcome) = outcome.get() {
                return outcome.clone();
            }
            if queue.leading {
                queue = wait(&self.done, queue);
                continue;
            }
            queue.leading = true;
            let batch = std::mem::take(&mut queue.waiting);
            let borrowing = std::mem::take(&mut queue.borrowing).then(Borrowing::begin);
            queue.outcome = Arc::default();
            drop(queue);
            let written = self.write(&batch);
            drop(borrowing);
            if written.is_ok() {
                self.feed_anchor();
            }
            // Only the leader sets it.
            let _ = outcome.set(written);
            queue = lock(&self.queue);
            queue.leading = false;
            self.done.notify_all();
        }
    }

    /// Syncs the last tip, so that the last record cannot be cut off without a key.
    ///
    /// # Errors
    /// [`Error::Io`]. The next commit begins a new file.
    pub(crate) fn sync_tip(&self) -> Result<()> {
        // Holds the lock during the sync: the operating system reports a failed write once, and the
        // sync of a record must not miss it.
        let mut files = lock(&self.files);
        let Some(mut writer) = files.current.take_if(|writer| !writer.settled) else {
            return Ok(());
        };
        writer.sync()?;
        writer.settled = true;
        files.current = Some(writer);
        Ok(())
    }

    /// Replaces the whole catalogue, in a new file.
    ///
    /// # Errors
    /// As [`Journal::commit`].
    pub(crate) fn replace(&self, catalogue: Catalogue) -> Result<()> {
        self.begin_with(|| Ok(catalogue))
    }

    /// Writes the unchanged catalogue in a new file, under the newest version of the service key.
    ///
    /// # Errors
    /// As [`Journal::commit`].
    pub(crate) fn rewrite(&self) -> Result<()> {
        self.begin_with(|| Ok(self.now().clone()))
    }

    /// Changes the catalogue, in a new file: for changes that no record has.
    ///
    /// # Errors
    /// As [`Journal::commit`]; [`Error::InvalidArgument`] with the rule that the change breaks.
    pub(crate) fn rewrite_with(
        &self,
        change: impl FnOnce(&mut Catalogue) -> Result<(), &'static str>,
    ) -> Result<()> {
        self.begin_with(|| {
            let mut catalogue = self.now().clone();
            // A record would have this number.
            catalogue.generation += 1;
            change(&mut catalogue).map_err(|rule| Error::InvalidArgument(rule.to_owned()))?;
            Ok(catalogue)
        })
    }

    /// Becomes the leader, and writes a new file. Calls `contents` as the leader, because another
    /// leader may change the catalogue before.
    fn begin_with(&self, contents: impl FnOnce() -> Result<Catalogue>) -> Result<()> {
        let mut queue = lock(&self.queue);
        while queue.leading {
            queue = wait(&self.done, queue);
        }
        queue.leading = true;
        drop(queue);
        let written = contents().and_then(|catalogue| {
            self.write_snapshot(&catalogue)?;
            *write(&self.catalogue) = catalogue;
            Ok(())
        });
        if written.is_ok() {
            self.feed_anchor();
        }
        lock(&self.queue).leading = false;
        self.done.notify_all();
        written
    }

    fn feed_anchor(&self) {
        let feeder = read(&self.feeder).clone();
        let mirror = lock(&self.files).current.as_ref().map(Writer::mirror);
        if let (Some(feeder), Some(mirror)) = (feeder, mirror) {
            feeder.want(mirror);
        }
    }

    fn write_snapshot(&self, catalogue: &Catalogue) -> Result<()> {
        let fence = self.fence.clone().ok_or(Error::ReadOnly)?;
        let mut files = lock(&self.files);
        // If this fails, the new file may exist, and would be in force in place of the current one.
        files.current = None;
        files.begun += 1;
        files.current = Some(self.begin(catalogue, files.begun, fence)?);
        Ok(())
    }

    /// Writes records of these changes. The caller is the leader.
    fn write(&self, changes: &[Change]) -> Result<()> {
        let changes: Vec<&Change> = {
            let catalogue = self.now();
            let changes: Vec<_> =
                changes.iter().filter(|change| !change.is_moot(&catalogue)).collect();
            for change in &changes {
                catalogue
                    .check_change(change)
                    .map_err(|rule| Error::InvalidArgument(rule.to_owned()))?;
            }
            changes
        };
        let fits = lock(&self.files).current.as_ref().is_some_and(|writer| {
            writer.end - writer.snapshot_len <= JOURNAL_BYTES_MIN.max(2 * writer.snapshot_len)
        });
        if !fits {
            let catalogue = self.now().clone();
            self.write_snapshot(&catalogue)?;
        }
        for changes in changes.chunks(CHANGES_MAX) {
            self.append(changes)?;
        }
        Ok(())
    }

    /// Appends one record.
    fn append(&self, changes: &[&Change]) -> Result<()> {
        let mut files = lock(&self.files);
        let (version, key) = {
            let keyring = self.service.keyring();
            (keyring.newest(), keyring.document_key(keyring.newest())?)
        };
        let Some(mut writer) = files.current.take() else { return Err(Error::ReadOnly) };
        let number = writer.last.number + 1;
        let (bytes, tag) = file::encode_record(number, changes, &writer.last.tag, version, &key);
        let last = Tip { number, tag };
        let (offset, sector) = last.encode_at(writer.snapshot_len, version, &key);
        // Before the disk, which may hang.
        drop(key);
        writer.write_at(&bytes, writer.end)?;
        writer.sync()?;
        // A writer that has taken over may not have read the record.
        writer.fence.check()?;
        // The next sync makes the tip durable. The record is in force before that.
        writer.write_at(&sector, offset)?;
        writer.end += bytes.len() as u64;
        writer.last = last;
        writer.settled = false;
        files.current = Some(writer);
        let mut catalogue = write(&self.catalogue);
        for change in changes {
            let applied = catalogue.apply(change);
            debug_assert_eq!(applied, Ok(()), "it was checked before it was written");
        }
        catalogue.generation = number;
        Ok(())
    }
}
