//! Room that a store keeps for a full disk, so that the operations that free space need no free
//! page and no free inode.
//!
//! The room is a file with allocated blocks, and some empty files, whose inodes are the spare ones.
//! An operation that frees space *borrows* the room ([`Reserve::borrow`]). While a thread borrows
//! it, [`ReservedDisk`] gives up a part of the room at each file operation of that thread that
//! finds the disk full, and repeats the file operation. Other threads, such as those of appends,
//! cannot take the room. It is made again when the borrower is done, by a background job, and when
//! the store is opened or closed.
//!
//! A sync that fails is not repeated, because a second sync that succeeds proves nothing. A part of
//! the room is given up all the same, so the operation succeeds when its caller repeats it.

use std::{
    cell::Cell,
    io,
    marker::PhantomData,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::Serialize;
use tracing::{debug, info, warn};

use crate::{
    io::{Access, DirEntry, Disk, DiskFile, FileKind, FileStat, Map, OpenMode, Owner, is_full},
    sync::{LockRank, Mutex, lock},
};

/// The name of the file that has the blocks.
const BLOCKS: &str = "RESERVE";
/// The names of the empty files: two for each copy of a file that exists twice. An opening may have
/// to create a lost file and a new file of the audit log before it replaces others.
const SPARES: [&str; 4] = ["RESERVE-1", "RESERVE-2", "RESERVE-3", "RESERVE-4"];
/// The least size of the room, in bytes.
const BYTES_MIN: u64 = 1 << 20;
/// How much one file operation gives up at first, in bytes. It doubles with each repetition.
const STEP_BYTES: u64 = 16 << 10;
/// How often it doubles.
const STEP_DOUBLINGS: u32 = 16;
/// How often the creation of a file or a directory is repeated. It needs few blocks.
const INODE_ATTEMPTS: u32 = 8;

thread_local! {
    /// How many borrowers of a reserve this thread is inside of.
    static BORROWERS: Cell<u32> = const { Cell::new(0) };
}

/// The state of the room that a store keeps for a full disk, from
/// [`Admin::reserve_status`](crate::Admin::reserve_status).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ReserveStatus {
    /// The allocated bytes.
    pub bytes: u64,
    /// How many bytes are to be allocated: 1 MiB, or twice the catalogue and the largest metadata
    /// of a Logstore if that is more: both exist twice.
    pub wanted_bytes: u64,
    /// The number of spare inodes.
    pub inodes: u64,
    /// How many spare inodes are wanted.
    pub wanted_inodes: u64,
}

impl ReserveStatus {
    /// Whether a part of the room is missing.
    pub fn is_short(&self) -> bool {
        self.bytes < self.wanted_bytes || self.inodes < self.wanted_inodes
    }
}

/// The room of one store.
pub(crate) struct Reserve {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    state: Mutex<State>,
}

impl Reserve {
    /// The reserve of the store in `dir`, which lies on `disk`. Does no I/O.
    pub(crate) fn new(disk: Arc<dyn Disk>, dir: &Path) -> Arc<Self> {
        let state = Mutex::new(LockRank::Reserve, State::default());
        Arc::new(Self { disk, dir: dir.to_owned(), state })
    }

    /// The disk of the store, whose file operations can use the reserve.
    pub(crate) fn disk(self: &Arc<Self>) -> Arc<dyn Disk> {
        Arc::new(ReservedDisk { disk: Arc::clone(&self.disk), reserve: Arc::clone(self) })
    }

    /// Lets this thread use up the reserve, until the returned value is dropped.
    pub(crate) fn borrow(&self) -> Borrower<'_> {
        Borrower { reserve: self, _borrowing: Borrowing::begin() }
    }

    /// Notes the size of a file that may have to be replaced on a full disk.
    pub(crate) fn note_document(&self, path: &Path) {
        if let Ok(Some(stat)) = self.disk.stat(path) {
            let mut state = lock(&self.state);
            state.document_bytes = state.document_bytes.max(stat.len);
        }
    }

    /// Makes the missing part of the room, if there is space for it. Takes into account the size of
    /// the catalogue, which is in the directory `catalogue`.
    pub(crate) fn tend(&self, catalogue: &Path) {
        let bytes = self.largest_file(catalogue);
        let mut state = lock(&self.state);
        state.catalogue_bytes = bytes.unwrap_or(state.catalogue_bytes);
        if !state.looked || state.status().is_short() {
            self.try_to_make(&mut state);
        }
    }

    /// Makes the part of the room again that was given up, or that could not be made before, if
    /// there is space for it.
    pub(crate) fn fill(&self) {
        let mut state = lock(&self.state);
        if state.looked && state.status().is_short() {
            self.try_to_make(&mut state);
        }
    }

    fn try_to_make(&self, state: &mut State) {
        let made = self.make(state);
        let dir = self.dir.display();
        match made {
            Ok(()) if state.failed => info!(store = %dir, "reserve for a full disk complete again"),
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::Unsupported => state.unsupported = true,
            Err(error) if !state.failed => {
                warn!(store = %dir, %error, "reserve for a full disk incomplete");
                state.failed = true;
                return;
            }
            Err(error) => {
                debug!(store = %dir, %error, "reserve for a full disk incomplete");
                return;
            }
        }
        state.failed = false;
    }

    /// The state of the room. Looks at the files if this process has not done so, or if `catalogue`
    /// is the directory of a catalogue that another process may write.
    pub(crate) fn status(&self, catalogue: Option<&Path>) -> ReserveStatus {
        let bytes = catalogue.and_then(|dir| self.largest_file(dir));
        let mut state = lock(&self.state);
        state.catalogue_bytes = bytes.unwrap_or(state.catalogue_bytes);
        if catalogue.is_some() {
            // A file that cannot be looked at is none.
            let _ = self.look(&mut state);
        }
        state.status()
    }

    fn largest_file(&self, dir: &Path) -> Option<u64> {
        let entries = self.disk.list_dir(dir).ok()?;
        let stat = |entry: DirEntry| self.disk.stat(&dir.join(entry.name)).ok()?;
        entries.into_iter().filter_map(stat).map(|stat| stat.len).max()
    }

    /// Whether there is a file of the reserve with this name, and its length. Anything else under
    /// the name is left alone.
    fn find(&self, name: &str) -> io::Result<Option<u64>> {
        match self.disk.stat(&self.dir.join(name))? {
            None => Ok(None),
            Some(stat) if stat.kind == FileKind::File && stat.links == 1 => Ok(Some(stat.len)),
            Some(_) => {
                let what = format!("{name} is not a regular file with one name");
                Err(io::Error::new(io::ErrorKind::InvalidInput, what))
            }
        }
    }

    /// Looks at the files. The outer result is about the one that has the blocks, the inner one
    /// about the empty ones.
    fn look(&self, state: &mut State) -> io::Result<io::Result<()>> {
        state.looked = true;
        state.bytes = 0;
        let mut spares = Ok(());
        for (is_there, name) in state.spares.iter_mut().zip(SPARES) {
            let found = self.find(name);
            *is_there = matches!(found, Ok(Some(_)));
            spares = spares.and(found.map(drop));
        }
        state.bytes = self.find(BLOCKS)?.unwrap_or(0);
        Ok(spares)
    }

    fn make(&self, state: &mut State) -> io::Result<()> {
        self.remove_shared_names()?;
        let spares = self.look(state)?;
        let (path, wanted) = (self.dir.join(BLOCKS), state.wanted());
        if state.bytes < wanted {
            self.check_space(wanted - state.bytes)?;
        }
        // Although the file may be long enough: a copy of the store may lack the blocks.
        if let Err(error) = self.disk.allocate(&path, wanted) {
            // Best effort: gives a part back that was allocated.
            let _ = match state.bytes {
                0 => self.disk.remove_file(&path),
                bytes => self.cut(&path, bytes),
            };
            return Err(error);
        }
        state.bytes = state.bytes.max(wanted);
        spares?;
        for (is_there, name) in state.spares.iter_mut().zip(SPARES).filter(|(there, _)| !**there) {
            drop(self.disk.open(&self.dir.join(name), OpenMode::CreateNew)?);
            *is_there = true;
        }
        self.disk.sync_dir(&self.dir)
    }

    /// Removes the names of files that have other names too, such as in a snapshot by hard links:
    /// giving them up would free nothing.
    fn remove_shared_names(&self) -> io::Result<()> {
        for name in SPARES.iter().chain([&BLOCKS]) {
            let path = self.dir.join(name);
            let stat = self.disk.stat(&path)?;
            if stat.is_some_and(|stat| stat.kind == FileKind::File && stat.links > 1) {
                self.disk.remove_file(&path)?;
            }
        }
        Ok(())
    }

    /// Refuses to take space that other files may need soon: an allocation that fails would take
    /// all of it for a moment.
    fn check_space(&self, missing: u64) -> io::Result<()> {
        match self.disk.available(&self.dir)? {
            Some(available) if available < missing.saturating_mul(2) => {
                Err(io::ErrorKind::StorageFull.into())
            }
            _ => Ok(()),
        }
    }

    /// Gives up a part of the room. Returns whether there was one.
    fn give_up(&self, lacks: Lacks, step: u64) -> bool {
        let mut state = lock(&self.state);
        if !state.looked {
            // A file that cannot be looked at is none.
            let _ = self.look(&mut state);
        }
        let dir = self.dir.display();
        if lacks == Lacks::Inode {
            for (is_there, name) in state.spares.iter_mut().zip(SPARES) {
                if std::mem::take(is_there) && self.disk.remove_file(&self.dir.join(name)).is_ok() {
                    // Best effort: some file systems free an inode with the next sync.
                    let _ = self.disk.sync_dir(&self.dir);
                    info!(store = %dir, "disk full: spare inode given up");
                    return true;
                }
            }
        }
        let left = state.bytes.saturating_sub(step);
        if left == state.bytes || self.cut(&self.dir.join(BLOCKS), left).is_err() {
            return false;
        }
        state.bytes = left;
        info!(store = %dir, left, "disk full: a part of the reserve given up");
        true
    }

    fn cut(&self, path: &Path, len: u64) -> io::Result<()> {
        let file = self.disk.open(path, OpenMode::ReadWrite)?;
        if file.stat()?.links > 1 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        file.set_len(len)?;
        // Best effort: some file systems free blocks with the next sync.
        let _ = file.sync_data();
        Ok(())
    }

    /// Runs an operation, and repeats it as long as the disk is full and there is room to give up.
    fn retrying<T>(&self, lacks: Lacks, operation: impl Fn() -> io::Result<T>) -> io::Result<T> {
        let mut attempt = 0;
        loop {
            match operation() {
                Err(error) if self.yields(&error, lacks, attempt) => attempt += 1,
                done => return done,
            }
        }
    }

    /// After a sync that failed because the disk is full, gives up room, so that the caller of the
    /// whole operation can repeat that.
    fn after_sync(&self, synced: io::Result<()>) -> io::Result<()> {
        synced.inspect_err(|error| {
            let _ = self.yields(error, Lacks::Blocks, 0);
        })
    }

    /// Gives up room after an error, if that may help and there is some.
    fn yields(&self, error: &io::Error, lacks: Lacks, attempt: u32) -> bool {
        if !is_full(error) || !Borrowing::is_under_way() {
            return false;
        }
        match lacks {
            Lacks::Blocks => self.give_up(lacks, STEP_BYTES << attempt.min(STEP_DOUBLINGS)),
            Lacks::Inode => attempt < INODE_ATTEMPTS && self.give_up(lacks, STEP_BYTES),
        }
    }
}

impl std::fmt::Debug for Reserve {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reserve").field("dir", &self.dir).finish_non_exhaustive()
    }
}

/// This thread may use up the reserve of its store, until this is dropped.
pub(crate) struct Borrowing {
    _of_this_thread: PhantomData<*const ()>,
}

impl Borrowing {
    pub(crate) fn begin() -> Self {
        BORROWERS.set(BORROWERS.get() + 1);
        Self { _of_this_thread: PhantomData }
    }

    /// Whether this thread may use up the reserve.
    pub(crate) fn is_under_way() -> bool {
        BORROWERS.get() > 0
    }
}

impl Drop for Borrowing {
    fn drop(&mut self) {
        BORROWERS.set(BORROWERS.get().saturating_sub(1));
    }
}

/// An operation that may use up the reserve. Makes the room again at its end.
pub(crate) struct Borrower<'a> {
    reserve: &'a Reserve,
    _borrowing: Borrowing,
}

impl Drop for Borrower<'_> {
    fn drop(&mut self) {
        self.reserve.fill();
    }
}

#[derive(Default)]
struct State {
    /// Whether the files were looked for.
    looked: bool,
    /// Whether the disk cannot allocate, as one that cannot be full.
    unsupported: bool,
    bytes: u64,
    spares: [bool; SPARES.len()],
    catalogue_bytes: u64,
    /// The largest metadata that this process has seen.
    document_bytes: u64,
    /// Whether the last attempt to make the room has failed.
    failed: bool,
}

impl State {
    fn wanted(&self) -> u64 {
        BYTES_MIN.max(2 * self.catalogue_bytes.saturating_add(self.document_bytes))
    }

    fn status(&self) -> ReserveStatus {
        let inodes = self.spares.iter().filter(|there| **there).count() as u64;
        match self.unsupported {
            true => ReserveStatus::default(),
            false => ReserveStatus {
                bytes: self.bytes,
                wanted_bytes: self.wanted(),
                inodes,
                wanted_inodes: SPARES.len() as u64,
            },
        }
    }
}

/// What a file operation lacks.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lacks {
    /// Blocks.
    Blocks,
    /// An inode, or blocks.
    Inode,
}

/// A disk whose operations give up the reserve where they find the disk full, if their thread
/// borrows it.
#[derive(Debug)]
struct ReservedDisk {
    disk: Arc<dyn Disk>,
    reserve: Arc<Reserve>,
}

/// A file of a [`ReservedDisk`] that is open for writing.
#[derive(Debug)]
struct ReservedFile {
    file: Arc<dyn DiskFile>,
    reserve: Arc<Reserve>,
}

impl Disk for ReservedDisk {
    fn beneath(&self, dir: &Path, access: Access) -> io::Result<Arc<dyn Disk>> {
        let disk = self.disk.beneath(dir, access)?;
        Ok(Arc::new(Self { disk, reserve: Arc::clone(&self.reserve) }))
    }

    fn network_file_system(&self, dir: &Path) -> io::Result<Option<&'static str>> {
        self.disk.network_file_system(dir)
    }

    fn available(&self, dir: &Path) -> io::Result<Option<u64>> {
        self.disk.available(dir)
    }

    fn allocate(&self, path: &Path, len: u64) -> io::Result<()> {
        self.disk.allocate(path, len)
    }

    fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        self.disk.resolve(path)
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        let file = match mode {
            OpenMode::Read => return self.disk.open(path, mode),
            OpenMode::ReadWrite => self.disk.open(path, mode)?,
            OpenMode::CreateNew => {
                self.reserve.retrying(Lacks::Inode, || self.disk.open(path, mode))?
            }
        };
        Ok(Arc::new(ReservedFile { file, reserve: Arc::clone(&self.reserve) }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.reserve.retrying(Lacks::Blocks, || self.disk.rename(from, to))
    }

    fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.reserve.retrying(Lacks::Blocks, || self.disk.rename_new(from, to))
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.reserve.retrying(Lacks::Blocks, || self.disk.remove_file(path))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.reserve.retrying(Lacks::Inode, || self.disk.create_dir(path))
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.reserve.retrying(Lacks::Blocks, || self.disk.remove_dir(path))
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.reserve.after_sync(self.disk.sync_dir(path))
    }

    fn list_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        self.disk.list_dir(path)
    }

    fn stat(&self, path: &Path) -> io::Result<Option<FileStat>> {
        self.disk.stat(path)
    }
}

impl DiskFile for ReservedFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.reserve.retrying(Lacks::Blocks, || self.file.write_at(buf, offset))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.reserve.after_sync(self.file.sync_data())
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn stat(&self) -> io::Result<FileStat> {
        self.file.stat()
    }

    fn set_owner(&self, owner: Owner) -> io::Result<()> {
        self.reserve.retrying(Lacks::Blocks, || self.file.set_owner(owner))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.reserve.retrying(Lacks::Blocks, || self.file.set_len(len))
    }

    fn try_lock(&self) -> io::Result<bool> {
        self.file.try_lock()
    }

    fn map(&self) -> io::Result<Map> {
        self.file.map()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use tempfile::TempDir;

    use super::*;
    use crate::io::{Map, RealDisk};

    /// The bytes of a small disk.
    const DISK_BYTES: u64 = 3 << 20;
    /// The names that fit into it.
    const DISK_NAMES: u64 = 10;

    /// A directory that holds a limited number of bytes and names. Its files do not share blocks.
    #[derive(Clone, Debug)]
    struct SmallDisk {
        dir: PathBuf,
        /// Whether a sync fails because the disk is full.
        full_at_sync: bool,
    }

    #[derive(Debug)]
    struct SmallFile(Arc<dyn DiskFile>, SmallDisk);

    impl SmallDisk {
        fn left(&self) -> (u64, u64) {
            let entries = RealDisk.list_dir(&self.dir).unwrap();
            let len = |entry: &DirEntry| {
                RealDisk.stat(&self.dir.join(&entry.name)).unwrap().map_or(0, |stat| stat.len)
            };
            let used: u64 = entries.iter().map(len).sum();
            (DISK_BYTES - used, DISK_NAMES - entries.len() as u64)
        }

        fn check_bytes(&self, more: u64) -> io::Result<()> {
            if more > self.left().0 { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
        }
    }

    impl Disk for SmallDisk {
        fn beneath(&self, _dir: &Path, _access: Access) -> io::Result<Arc<dyn Disk>> {
            Ok(Arc::new(self.clone()))
        }

        fn available(&self, _dir: &Path) -> io::Result<Option<u64>> {
            Ok(Some(self.left().0))
        }

        fn allocate(&self, path: &Path, len: u64) -> io::Result<()> {
            self.check_bytes(len - RealDisk.stat(path)?.map_or(0, |stat| stat.len))?;
            RealDisk.allocate(path, len)
        }

        fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
            if mode == OpenMode::CreateNew && self.left().1 == 0 {
                return Err(io::ErrorKind::QuotaExceeded.into());
            }
            Ok(Arc::new(SmallFile(RealDisk.open(path, mode)?, self.clone())))
        }

        fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
            RealDisk.rename(from, to)
        }

        fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()> {
            RealDisk.rename_new(from, to)
        }

        fn remove_file(&self, path: &Path) -> io::Result<()> {
            RealDisk.remove_file(path)
        }

        fn create_dir(&self, path: &Path) -> io::Result<()> {
            if self.left().1 == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            RealDisk.create_dir(path)
        }

        fn remove_dir(&self, path: &Path) -> io::Result<()> {
            RealDisk.remove_dir(path)
        }

        fn sync_dir(&self, _path: &Path) -> io::Result<()> {
            Ok(())
        }

        fn list_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
            RealDisk.list_dir(path)
        }

        fn stat(&self, path: &Path) -> io::Result<Option<FileStat>> {
            RealDisk.stat(path)
        }
    }

    impl DiskFile for SmallFile {
        fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
            self.0.read_at(buf, offset)
        }

        fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
            let end = offset + buf.len() as u64;
            self.1.check_bytes(end.saturating_sub(self.0.len()?))?;
            self.0.write_at(buf, offset)
        }

        fn sync_data(&self) -> io::Result<()> {
            if self.1.full_at_sync { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
        }

        fn len(&self) -> io::Result<u64> {
            self.0.len()
        }

        fn stat(&self) -> io::Result<FileStat> {
            self.0.stat()
        }

        fn set_len(&self, len: u64) -> io::Result<()> {
            self.1.check_bytes(len.saturating_sub(self.0.len()?))?;
            self.0.set_len(len)
        }

        fn try_lock(&self) -> io::Result<bool> {
            self.0.try_lock()
        }

        fn map(&self) -> io::Result<Map> {
            self.0.map()
        }
    }

    struct Fixture {
        dir: TempDir,
        small: SmallDisk,
        reserve: Arc<Reserve>,
        disk: Arc<dyn Disk>,
    }

    impl Fixture {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let small = SmallDisk { dir: dir.path().to_owned(), full_at_sync: false };
            let reserve = Reserve::new(Arc::new(small.clone()), dir.path());
            let disk = reserve.disk();
            Self { dir, small, reserve, disk }
        }

        fn made() -> Self {
            let fixture = Self::new();
            fixture.reserve.tend(&fixture.path("catalogue"));
            assert!(!fixture.reserve.status(None).is_short());
            fixture
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
            self.disk.open(&self.path(name), OpenMode::CreateNew)
        }

        /// Takes all bytes, and all names, as other files do.
        fn fill(&self) -> Arc<dyn DiskFile> {
            let file = self.create("ballast").unwrap();
            file.set_len(self.small.left().0).unwrap();
            while self.small.left().1 > 0 {
                self.create(&format!("name-{}", self.small.left().1)).unwrap();
            }
            file
        }

        fn allocated(&self) -> u64 {
            RealDisk.stat(&self.path(BLOCKS)).unwrap().map_or(0, |stat| stat.len)
        }
    }

    fn is_refused<T>(result: io::Result<T>) -> bool {
        result.is_err_and(|error| is_full(&error))
    }

    #[test]
    fn the_room_has_blocks_and_inodes() {
        use std::os::unix::fs::MetadataExt;
        let fixture = Fixture::made();
        let status = fixture.reserve.status(None);
        assert_eq!((status.bytes, status.wanted_bytes), (BYTES_MIN, BYTES_MIN));
        assert_eq!((status.inodes, status.wanted_inodes), (4, 4));
        #[expect(clippy::disallowed_methods, reason = "the number of blocks is in no trait")]
        let blocks = std::fs::metadata(fixture.path(BLOCKS)).unwrap().blocks() * 512;
        assert!(blocks >= BYTES_MIN, "{blocks} bytes of blocks");
    }

    #[test]
    fn its_size_follows_the_catalogue_and_the_largest_document() {
        let fixture = Fixture::new();
        let (catalogue, meta) = (fixture.path("catalogue"), fixture.path("meta"));
        RealDisk.create_dir(&catalogue).unwrap();
        RealDisk.allocate(&catalogue.join("1"), 600 << 10).unwrap();
        RealDisk.allocate(&meta, 5 << 10).unwrap();
        fixture.reserve.tend(&catalogue);
        fixture.reserve.note_document(&meta);
        assert!(fixture.reserve.status(None).is_short());
        fixture.reserve.fill();
        assert_eq!(fixture.allocated(), 2 * ((600 << 10) + (5 << 10)));
    }

    #[test]
    fn a_borrower_needs_no_free_byte_and_no_free_name() {
        let fixture = Fixture::made();
        let ballast = fixture.fill();
        for full in [fixture.create("a"), fixture.create("b")] {
            assert!(is_refused(full), "no borrower may take the room");
        }
        assert!(is_refused(ballast.write_at(&[1], DISK_BYTES)));
        assert_eq!(fixture.allocated(), BYTES_MIN);
        let borrowed = fixture.reserve.borrow();
        let file = fixture.create("a").unwrap();
        file.write_at(&[1; 100], 0).unwrap();
        assert_eq!(fixture.allocated(), BYTES_MIN - STEP_BYTES, "only a small part is given up");
        file.write_at(&[1; 200 << 10], 0).unwrap();
        let others = ["b", "c", "d"];
        others.iter().for_each(|name| drop(fixture.create(name).unwrap()));
        assert!(is_refused(fixture.create("e")), "there are four inodes");
        assert!(is_refused(file.write_at(&[1; 2 << 20], 0)), "there is no more than 1 MiB");
        drop(borrowed);
        assert!(fixture.reserve.status(None).is_short());
        ballast.set_len(0).unwrap();
        for name in others.iter().chain(&["a"]) {
            RealDisk.remove_file(&fixture.path(name)).unwrap();
        }
        fixture.reserve.fill();
        assert!(!fixture.reserve.status(None).is_short());
        assert_eq!(fixture.allocated(), BYTES_MIN);
    }

    #[test]
    fn the_room_is_back_when_its_borrower_has_freed_space() {
        let fixture = Fixture::made();
        let ballast = fixture.fill();
        {
            let _borrowed = fixture.reserve.borrow();
            fixture.create("a").unwrap().write_at(&[1; 5000], 0).unwrap();
            ballast.set_len(0).unwrap();
            RealDisk.remove_file(&fixture.path("a")).unwrap();
        }
        assert!(!fixture.reserve.status(None).is_short());
    }

    #[test]
    fn another_thread_cannot_take_what_one_has_borrowed() {
        let fixture = Fixture::made();
        let ballast = fixture.fill();
        let _borrowed = fixture.reserve.borrow();
        std::thread::scope(|scope| {
            let other = scope.spawn(|| ballast.write_at(&[1], DISK_BYTES));
            assert!(is_refused(other.join().unwrap()));
        });
        assert_eq!(fixture.allocated(), BYTES_MIN);
        ballast.write_at(&[1], DISK_BYTES - BYTES_MIN).unwrap();
    }

    #[test]
    fn a_failed_sync_is_not_repeated() {
        let mut fixture = Fixture::made();
        fixture.small.full_at_sync = true;
        fixture.reserve = Reserve::new(Arc::new(fixture.small.clone()), fixture.dir.path());
        fixture.disk = fixture.reserve.disk();
        let file = fixture.create("a").unwrap();
        let _borrowed = fixture.reserve.borrow();
        assert!(is_refused(file.sync_data()));
        assert_eq!(fixture.allocated(), BYTES_MIN - STEP_BYTES, "its caller may repeat the rest");
    }

    #[test]
    fn a_disk_that_is_nearly_full_keeps_its_space() {
        let fixture = Fixture::new();
        let ballast = fixture.create("ballast").unwrap();
        ballast.set_len(DISK_BYTES - 2 * BYTES_MIN + 1).unwrap();
        fixture.reserve.tend(&fixture.path("catalogue"));
        assert!(fixture.reserve.status(None).is_short());
        assert_eq!(RealDisk.stat(&fixture.path(BLOCKS)).unwrap(), None);
        ballast.set_len(0).unwrap();
        fixture.reserve.fill();
        assert!(!fixture.reserve.status(None).is_short());
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "the traits make no links")]
    fn files_of_other_kinds_are_left_alone() {
        let fixture = Fixture::new();
        let other = fixture.path("other");
        std::fs::write(&other, [7; 100]).unwrap();
        std::fs::create_dir(fixture.path(BLOCKS)).unwrap();
        std::os::unix::fs::symlink(&other, fixture.path(SPARES[0])).unwrap();
        fixture.reserve.tend(&fixture.path("catalogue"));
        let _borrowed = fixture.reserve.borrow();
        fixture.create("ballast").unwrap().set_len(fixture.small.left().0).unwrap();
        assert!(is_refused(fixture.create("a").unwrap().write_at(&[1], 0)));
        assert_eq!(std::fs::read(&other).unwrap(), [7; 100]);
        assert!(fixture.path(SPARES[0]).is_symlink() && fixture.path(BLOCKS).is_dir());
        assert!(fixture.reserve.status(None).is_short());
    }

    /// A snapshot by hard links (`cp -al`) has the files too.
    #[test]
    #[expect(clippy::disallowed_methods, reason = "the traits make no links")]
    fn files_with_a_second_name_are_replaced() {
        let fixture = Fixture::new();
        fixture.reserve.tend(&fixture.path("catalogue"));
        let names = SPARES.iter().chain([&BLOCKS]);
        for name in names.clone() {
            let kept = fixture.path(&format!("kept-{name}"));
            std::fs::hard_link(fixture.path(name), kept).unwrap();
        }
        assert!(fixture.reserve.status(Some(&fixture.path("catalogue"))).is_short());
        fixture.reserve.tend(&fixture.path("catalogue"));
        assert!(!fixture.reserve.status(Some(&fixture.path("catalogue"))).is_short());
        for name in names {
            assert!(fixture.path(&format!("kept-{name}")).exists());
            let links = std::os::unix::fs::MetadataExt::nlink(
                &std::fs::metadata(fixture.path(name)).unwrap(),
            );
            assert_eq!(links, 1, "{name}");
        }
    }
}
