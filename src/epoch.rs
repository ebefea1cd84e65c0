//! The writer epoch: it decides which process writes a store if the advisory lock fails.
//!
//! The file `EPOCH` has two slots. Each opening for writing raises the epoch durably, before it
//! reads anything else that a writer changes. After each write and sync, and before acknowledging
//! them, a writer compares the file with its own last version of it. If another writer has raised
//! the epoch since, that writer may not see these bytes, so they are not acknowledged.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::BufMut;

use crate::{
    Error, Result,
    error::TakenOver,
    ids::StoreId,
    io::{
        Access, DirEntry, Disk, DiskFile, Existing, FileStat, OpenMode, Random, read_exact_at,
        write_file,
    },
    sync::atomic::{AtomicBool, Ordering},
    wire::{Cursor, DecodeError, put_crc, require, strip_crc},
};

/// The name of the file.
pub(crate) const NAME: &str = "EPOCH";
const MAGIC: &[u8; 8] = b"ENVLEPO\0";
const VERSION: u16 = 2;
const WRITER_LEN: usize = 16;
/// The used bytes of a slot. The rest is zeros.
const USED_LEN: usize = 8 + 2 + 6 + 8 + WRITER_LEN + 16 + 4;
/// One sector. The disk writes it whole or not at all.
const SLOT_LEN: usize = 512;
const FILE_LEN: usize = 2 * SLOT_LEN;
/// The highest epoch. A slot with a higher one is ignored.
pub(crate) const EPOCH_MAX: u64 = 1 << 48;
/// How far the file may be ahead of the catalogue. Only openings that were cut short before they
/// wrote a catalogue put it ahead. A slot beyond this distance is ignored, so that a forged slot
/// does not use up all epochs.
const AHEAD_MAX: u64 = 1 << 32;
/// How often an opening tries again if another one interferes.
const ATTEMPTS: u32 = 32;

/// One slot of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Slot {
    epoch: u64,
    writer: [u8; WRITER_LEN],
    store: StoreId,
}

impl Slot {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(SLOT_LEN);
        out.put_slice(MAGIC);
        out.put_u16_le(VERSION);
        out.put_bytes(0, 6);
        out.put_u64_le(self.epoch);
        out.put_slice(&self.writer);
        out.put_slice(self.store.as_bytes());
        put_crc(&mut out, 0);
        out.resize(SLOT_LEN, 0);
        out
    }

    fn decode(bytes: &[u8]) -> std::result::Result<Self, DecodeError> {
        let mut cursor = Cursor::new(bytes);
        cursor.magic(MAGIC)?;
        cursor.version(VERSION)?;
        cursor.zeros(6, "reserved bytes of the epoch")?;
        let slot = Self {
            epoch: cursor.u64()?,
            writer: cursor.array()?,
            store: StoreId::from_bytes(cursor.array()?),
        };
        strip_crc(Cursor::new(bytes).bytes(USED_LEN)?)?;
        require((1..=EPOCH_MAX).contains(&slot.epoch), "epoch")?;
        Ok(slot)
    }
}

/// The whole file, as a writer wrote or read it.
type Image = [u8; FILE_LEN];

/// The slot with the highest epoch of the store, and its index.
///
/// An invalid slot is ignored: a crash has torn it, and the name of the catalogue also records an
/// epoch.
///
/// # Errors
/// [`DecodeError::NewerVersion`]: a newer envelog wrote a slot.
fn highest(
    image: &Image,
    store: StoreId,
    above: u64,
) -> std::result::Result<Option<(usize, Slot)>, DecodeError> {
    let counts = |slot: &Slot| slot.store == store && slot.epoch <= above.saturating_add(AHEAD_MAX);
    let mut found: Option<(usize, Slot)> = None;
    for (place, bytes) in image.chunks_exact(SLOT_LEN).enumerate() {
        match Slot::decode(bytes) {
            Ok(slot)
                if counts(&slot) && found.is_none_or(|(_, other)| other.epoch < slot.epoch) =>
            {
                found = Some((place, slot));
            }
            Err(newer @ DecodeError::NewerVersion(_)) => return Err(newer),
            _ => {}
        }
    }
    Ok(found)
}

/// Detects that another writer has taken over the store.
#[derive(Debug)]
pub(crate) struct Fence {
    file: Arc<dyn DiskFile>,
    path: PathBuf,
    epoch: u64,
    image: Image,
    /// Whether another writer has been detected. Once set, it stays set.
    lost: AtomicBool,
}

impl Fence {
    /// Raises the epoch of the store in `dir`, durably, above the epochs in the file and the
    /// caller's `above`. From then on, every earlier writer detects that it was taken over. `above`
    /// is the epoch in the name of the catalogue.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::NewerFormat`]; [`Error::TooMany`] if there is no higher epoch;
    /// [`Error::Fenced`] if other openings of the store keep interfering.
    pub(crate) fn raise(
        disk: &dyn Disk,
        dir: &Path,
        store: StoreId,
        above: u64,
        random: &dyn Random,
    ) -> Result<Self> {
        let path = dir.join(NAME);
        let failed = |op| Error::io(op, &path);
        let mut writer = [0; WRITER_LEN];
        random.fill(&mut writer).map_err(failed("draw an id for the writer of"))?;
        let mut found = 0;
        for _ in 0..ATTEMPTS {
            let file = open(disk, &path)?;
            if file.len().map_err(failed("look at"))? < FILE_LEN as u64 {
                file.set_len(FILE_LEN as u64).map_err(failed("extend"))?;
            }
            let mut image = [0; FILE_LEN];
            read_exact_at(&*file, &mut image, 0).map_err(failed("read"))?;
            let newest = highest(&image, store, above).map_err(|error| error.in_file(&path, 0))?;
            let (place, known) = newest.map_or((1, 0), |(place, slot)| (place, slot.epoch));
            let epoch = known.max(above).saturating_add(1);
            if epoch > EPOCH_MAX {
                return Err(Error::TooMany { what: "openings of the store", limit: EPOCH_MAX });
            }
            // Overwrites the older slot: if the write is torn, the newer slot is still valid.
            let at = (1 - place) * SLOT_LEN;
            let slot = Slot { epoch, writer, store }.encode();
            file.write_at(&slot, at as u64).map_err(failed("write"))?;
            file.sync_data().map_err(failed("sync"))?;
            if let Some(place) = image.get_mut(at..at + SLOT_LEN) {
                place.copy_from_slice(&slot);
            }
            let fence =
                Self { file, path: path.clone(), epoch, image, lost: AtomicBool::new(false) };
            if fence.is_held().map_err(failed("read"))? {
                return Ok(fence);
            }
            found = epoch;
        }
        Err(Error::Fenced { path: dir.to_owned(), epoch: found })
    }

    /// The epoch of this writer.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Checks that no other writer has opened the store since this one did. If the check succeeds,
    /// every later writer sees the bytes that this one has written and synced before the call.
    /// Costs one read of 1 KiB from the page cache and one `fstat`.
    ///
    /// # Errors
    /// [`Error::Fenced`] once another writer has been detected, and from then on; [`Error::Io`].
    pub(crate) fn check(&self) -> Result<()> {
        let held = !self.lost.load(Ordering::Relaxed)
            && self.is_held().map_err(Error::io("read", &self.path))?;
        if held {
            return Ok(());
        }
        self.lost.store(true, Ordering::Relaxed);
        let dir = self.path.parent().unwrap_or(Path::new("."));
        Err(Error::Fenced { path: dir.to_owned(), epoch: self.epoch })
    }

    fn is_held(&self) -> io::Result<bool> {
        let mut now = [0; FILE_LEN];
        let read = self.file.read_at(&mut now, 0)?;
        // A replaced file says nothing about the epochs that other writers raised in the new file.
        Ok(read == FILE_LEN && now == self.image && self.file.stat()?.links > 0)
    }
}

/// The disk of a writer. It checks the epoch before each rename.
///
/// A paused writer may resume after another writer has taken over. If it created its temporary file
/// before the takeover, the new writer has removed that file before reading the file that it was to
/// replace. If it created the file afterwards, the check stops it here.
#[derive(Debug)]
pub(crate) struct FencedDisk {
    disk: Arc<dyn Disk>,
    fence: Arc<Fence>,
}

impl FencedDisk {
    pub(crate) fn new(disk: Arc<dyn Disk>, fence: Arc<Fence>) -> Self {
        Self { disk, fence }
    }

    fn check(&self) -> io::Result<()> {
        self.fence.check().map_err(|error| match error {
            Error::Fenced { path, epoch } => io::Error::other(TakenOver { path, epoch }),
            other => io::Error::other(other),
        })
    }
}

impl Disk for FencedDisk {
    fn beneath(&self, dir: &Path, access: Access) -> io::Result<Arc<dyn Disk>> {
        Ok(Arc::new(Self::new(self.disk.beneath(dir, access)?, Arc::clone(&self.fence))))
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
        self.disk.open(path, mode)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.check()?;
        self.disk.rename(from, to)
    }

    fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.check()?;
        self.disk.rename_new(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.disk.remove_file(path)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.disk.create_dir(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.disk.remove_dir(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.disk.sync_dir(path)
    }

    fn list_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        self.disk.list_dir(path)
    }

    fn stat(&self, path: &Path) -> io::Result<Option<FileStat>> {
        self.disk.stat(path)
    }
}

/// Opens the file. Creates it first if it does not exist.
fn open(disk: &dyn Disk, path: &Path) -> Result<Arc<dyn DiskFile>> {
    for _ in 0..ATTEMPTS {
        match disk.open(path, OpenMode::ReadWrite) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            opened => return opened.map_err(Error::io("open", path)),
        }
        match write_file(disk, path, &[0; FILE_LEN], Existing::Keep) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => made.map_err(Error::io("create", path))?,
        }
    }
    Err(Error::io("open", path)(io::ErrorKind::NotFound.into()))
}
