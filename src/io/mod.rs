//! What the engine needs of the world: files, time and randomness, each behind a narrow trait.
//!
//! The real ones are [`RealDisk`], [`SystemClock`] and [`OsRandom`]. Tests inject others that fail, tear, reorder, cut the power
//! and replay from a seed; nothing else in the engine touches `std::fs`, a clock or a random number generator.

#![expect(clippy::disallowed_methods, clippy::disallowed_types, reason = "here is where the world is let in")]

mod clock;
mod map;
mod random;
mod real;

use std::{fmt, io, path::Path, sync::Arc};

pub use clock::{Clock, SystemClock};
pub use map::Map;
pub use random::{OsRandom, Random};
pub use real::RealDisk;

/// How [`Disk::open`] opens a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenMode {
    /// An existing file, for reading.
    Read,
    /// An existing file, for reading and writing.
    ReadWrite,
    /// A new file, for reading and writing; it is an error if the name exists.
    CreateNew,
    /// A new file as above that only its owner may read (mode 0600).
    CreateNewPrivate,
}

/// What a directory entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// The name, without the directory. A name that is not UTF-8 is converted with loss: the engine makes none such.
    pub name: String,
    /// Whether it is a directory.
    pub is_dir: bool,
}

/// What a file is, without opening it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileStat {
    /// Its length in bytes.
    pub len: u64,
    /// Something that changes when another file takes the name (an inode number).
    pub identity: u64,
}

/// A file system, or a simulation of one.
///
/// A change to a directory (create, rename, remove) is durable once [`Disk::sync_dir`] of it has returned; the contents of a
/// file once [`DiskFile::sync_data`] has. Nothing else may be assumed, and the engine assumes nothing else.
pub trait Disk: Send + Sync + fmt::Debug {
    /// Opens a file.
    ///
    /// # Errors
    /// What the system says, `NotFound` and `AlreadyExists` among it.
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>>;

    /// Renames a file, replacing what has the new name.
    ///
    /// # Errors
    /// What the system says.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file.
    ///
    /// # Errors
    /// What the system says.
    fn remove_file(&self, path: &Path) -> io::Result<()>;

    /// Creates a directory; its parent must exist. One that exists already is an error.
    ///
    /// # Errors
    /// What the system says.
    fn create_dir(&self, path: &Path) -> io::Result<()>;

    /// Removes an empty directory.
    ///
    /// # Errors
    /// What the system says.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;

    /// Makes the entries of a directory durable.
    ///
    /// # Errors
    /// What the system says; the state of the entries is then unknown.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;

    /// The entries of a directory, in no order.
    ///
    /// # Errors
    /// What the system says.
    fn list_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>>;

    /// What a file is; `None` when there is none.
    ///
    /// # Errors
    /// What the system says, but for `NotFound`.
    fn stat(&self, path: &Path) -> io::Result<Option<FileStat>>;
}

/// An open file, or a simulation of one. All methods may be called from several threads at once.
#[expect(clippy::len_without_is_empty, reason = "whether a file is empty is never the question")]
pub trait DiskFile: Send + Sync + fmt::Debug {
    /// Reads at `offset`, as much as there is, up to the length of `buf`. Less than that only at the end of the file.
    ///
    /// # Errors
    /// What the system says.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Writes all of `buf` at `offset`.
    ///
    /// # Errors
    /// What the system says; how much has been written is then unknown.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;

    /// Makes the contents and the length durable.
    ///
    /// # Errors
    /// What the system says; the contents of the file are then unknown, and a second call that succeeds proves nothing.
    fn sync_data(&self) -> io::Result<()>;

    /// The length in bytes.
    ///
    /// # Errors
    /// What the system says.
    fn len(&self) -> io::Result<u64>;

    /// Cuts or extends the file. The engine cuts nothing that anybody relies on.
    ///
    /// # Errors
    /// What the system says.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Takes the advisory lock of the file for this handle without waiting; `false` when somebody else has it. It is released
    /// when the handle is dropped.
    ///
    /// # Errors
    /// What the system says.
    fn try_lock(&self) -> io::Result<bool>;

    /// Maps the file for reading, where that is possible.
    ///
    /// # Errors
    /// What the system says; `Unsupported` where files cannot be mapped.
    fn map(&self) -> io::Result<Map>;
}

/// Reads exactly `buf.len()` bytes at `offset`, or fails with `UnexpectedEof`.
pub(crate) fn read_exact_at(file: &dyn DiskFile, buf: &mut [u8], offset: u64) -> io::Result<()> {
    if file.read_at(buf, offset)? < buf.len() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(())
}

/// Replaces `path` by `bytes`, atomically and durably: a temporary file beside it, synced, renamed, the directory synced.
///
/// # Errors
/// What the system says. The file under `path` is then the old one or the new one, never a mixture.
pub(crate) fn replace_file(disk: &dyn Disk, path: &Path, bytes: &[u8], mode: OpenMode) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let temporary = Path::new(&temporary);
    match disk.remove_file(temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file = disk.open(temporary, mode)?;
    file.write_at(bytes, 0)?;
    file.sync_data()?;
    disk.rename(temporary, path)?;
    sync_parent(disk, path)
}

/// Makes the name of `path` durable.
///
/// # Errors
/// What the system says.
pub(crate) fn sync_parent(disk: &dyn Disk, path: &Path) -> io::Result<()> {
    disk.sync_dir(path.parent().unwrap_or(Path::new(".")))
}

/// Reads a whole file of at most `limit` bytes.
///
/// # Errors
/// What the system says; `FileTooLarge` when it is longer than `limit`.
pub(crate) fn read_file(disk: &dyn Disk, path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let file = disk.open(path, OpenMode::Read)?;
    let len = file.len()?;
    if len > limit {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let mut bytes = vec![0; len as usize];
    let read = file.read_at(&mut bytes, 0)?;
    bytes.truncate(read);
    Ok(bytes)
}
