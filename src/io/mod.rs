//! The traits through which the engine reaches files, time and randomness.
//!
//! [`RealDisk`], [`SystemClock`] and [`OsRandom`] are the real implementations. Tests inject
//! implementations that fail, tear and reorder writes, lose power and replay from a seed. No other
//! part of the engine uses `std::fs`, a clock or a random number generator.

#![expect(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "the real implementations use the operating system"
)]

mod clock;
mod map;
mod random;
mod real;
#[cfg(test)]
mod tests;
mod twice;

use std::{
    error, fmt, io,
    os::fd::BorrowedFd,
    path::{Path, PathBuf},
    sync::Arc,
};

pub(crate) use clock::DAY_US;
pub use clock::{Clock, SystemClock};
pub use map::Map;
pub use random::{OsRandom, Random};
pub use real::RealDisk;
pub(crate) use real::process_user;
pub(crate) use twice::{
    copy_path, is_either_or_temporary, lost_of_two, mend, original_name, write_twice,
};

/// How [`Disk::open`] opens a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenMode {
    /// An existing file, for reading.
    Read,
    /// An existing file, for reading and writing.
    ReadWrite,
    /// A new file, for reading and writing. It is an error if the name exists.
    CreateNew,
}

/// Who besides the owner may access the files that a [`Disk`] creates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Access {
    /// Only the owner: files get mode 0600, directories 0700.
    #[default]
    Owner,
    /// The group may read: files get mode 0640, directories 0750.
    GroupRead,
}

/// The type of a directory entry or file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
    /// A character or block device.
    Device,
    /// The system does not report the type.
    Unknown,
}

impl fmt::Display for FileKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::File => "regular file",
            Self::Directory => "directory",
            Self::Symlink => "symbolic link",
            Self::Fifo => "named pipe",
            Self::Socket => "socket",
            Self::Device => "device",
            Self::Unknown => "file of unknown type",
        })
    }
}

/// A name has another file type than the operation needs. The error is the inner error of an
/// [`io::Error`]; the engine returns it as [`Error::WrongFileType`](crate::Error::WrongFileType).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrongFileType {
    /// The name.
    pub path: PathBuf,
    /// The type that the operation needs.
    pub expected: FileKind,
    /// The type that the name has.
    pub found: FileKind,
}

impl fmt::Display for WrongFileType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is a {}, not a {}", self.path.display(), self.found, self.expected)
    }
}

impl error::Error for WrongFileType {}

impl From<WrongFileType> for io::Error {
    fn from(wrong: WrongFileType) -> Self {
        let kind = match (wrong.expected, wrong.found) {
            (FileKind::Directory, _) => io::ErrorKind::NotADirectory,
            (_, FileKind::Directory) => io::ErrorKind::IsADirectory,
            _ => io::ErrorKind::InvalidInput,
        };
        io::Error::new(kind, wrong)
    }
}

/// An entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// The name, without the directory. A name that is not UTF-8 is converted with loss. The engine
    /// creates no such name.
    pub name: String,
    /// The type. A symlink is not followed.
    pub kind: FileKind,
}

/// The owner and permissions of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// The permission bits: 0 to 0o7777.
    pub mode: u32,
}

impl Owner {
    /// Whether a replacement for a file of this owner, created by root, keeps the owner and group.
    /// A file of root that no other group may read shows no intention, so its replacement `new`
    /// keeps the owner and group of the directory.
    fn stays(self, new: Self) -> bool {
        const GROUP_READ: u32 = 0o040;
        self.uid != 0 || (self.gid != 0 && self.mode & new.mode & GROUP_READ != 0)
    }
}

/// The status of a file. A symlink is not followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileStat {
    /// Its type.
    pub kind: FileKind,
    /// Its length in bytes.
    pub len: u64,
    /// A number that changes when another file takes the name, such as an inode number.
    pub identity: u64,
    /// The number of its names (hard links).
    pub links: u64,
    /// Its owner and permissions. `None` on a disk without users.
    pub owner: Option<Owner>,
}

/// A file system, or a simulation of one.
///
/// A change to a directory (create, rename, remove) is durable once [`Disk::sync_dir`] on that
/// directory has returned. The contents of a file are durable once [`DiskFile::sync_data`] has
/// returned. The engine assumes nothing else.
///
/// No operation follows a symlink in the last name of a path, or waits for a FIFO or a device.
///
/// Every method returns the error of the operating system if it fails. A method has an `# Errors`
/// section only where callers distinguish errors.
pub trait Disk: Send + Sync + fmt::Debug {
    /// The disk below the directory `dir`. Paths that begin with `dir` lead to the directory that
    /// has this name now. No symlink below it is followed. Other paths are an error. `access` says
    /// who may access the files that the engine creates there.
    ///
    /// # Errors
    /// `NotFound` and `NotADirectory`, among others.
    fn beneath(&self, dir: &Path, access: Access) -> io::Result<Arc<dyn Disk>>;

    /// The name of the network file system that holds `dir`, if it is one. Locks on such a file
    /// system may not reach other machines. By default `None`.
    fn network_file_system(&self, dir: &Path) -> io::Result<Option<&'static str>> {
        let _ = dir;
        Ok(None)
    }

    /// How many bytes this process can still write on the file system that holds `dir`. By default
    /// `None`, as on a disk that cannot be full.
    fn available(&self, dir: &Path) -> io::Result<Option<u64>> {
        let _ = dir;
        Ok(None)
    }

    /// Makes a file of at least `len` bytes whose first `len` bytes have blocks of their own on the
    /// disk, and creates it if it does not exist. The contents of new blocks are zeros. Later writes
    /// of other files cannot take these blocks. A disk that cannot be full need not implement this.
    ///
    /// # Errors
    /// `Unsupported` by default. `InvalidInput` for a file with a second name. After another error
    /// the file may have any length.
    fn allocate(&self, path: &Path, len: u64) -> io::Result<()> {
        let _ = (path, len);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Resolves a path: its directory without symlinks, and the name at the end of the symlinks
    /// that its last name leads through. That name need not exist. By default the path itself, as
    /// on a disk without symlinks.
    ///
    /// # Errors
    /// `NotFound` for a missing directory, among others.
    fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        Ok(path.to_owned())
    }

    /// Opens a regular file.
    ///
    /// # Errors
    /// `NotFound` and `AlreadyExists`, among others. [`WrongFileType`] for anything but a regular
    /// file.
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>>;

    /// Renames a file. It replaces a file that has the new name.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Renames a file, unless the new name exists.
    ///
    /// # Errors
    /// `AlreadyExists`, among others.
    fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file.
    fn remove_file(&self, path: &Path) -> io::Result<()>;

    /// Creates a directory. Its parent must exist. It is an error if the directory exists already.
    fn create_dir(&self, path: &Path) -> io::Result<()>;

    /// Removes an empty directory.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;

    /// Makes the entries of a directory durable.
    ///
    /// # Errors
    /// After an error the state of the entries is unknown.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;

    /// The entries of a directory, in no order.
    fn list_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>>;

    /// A number that changes when a name in a directory is added, removed or replaced. `None` if the
    /// disk cannot tell now: a caller then lists the directory. By default always `None`. A disk of
    /// the operating system tells by the times of the directory. A network file system may show them
    /// late, so a caller lists the directory from time to time all the same.
    ///
    /// # Errors
    /// As [`Disk::list_dir`].
    fn names_mark(&self, dir: &Path) -> io::Result<Option<u128>> {
        let _ = dir;
        Ok(None)
    }

    /// The status of a file. `None` if the name does not exist, so `NotFound` is not an error here.
    fn stat(&self, path: &Path) -> io::Result<Option<FileStat>>;

    /// Gives an open file one more name (a hard link), without a copy of its contents. The file may
    /// have been opened through another disk. By default this is an error.
    ///
    /// # Errors
    /// `Unsupported`, `CrossesDevices` and `AlreadyExists`, among others.
    fn link(&self, file: &dyn DiskFile, path: &Path) -> io::Result<()> {
        let _ = (file, path);
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// An open file, or a simulation of one. Several threads may call its methods at once.
///
/// Every method returns the error of the operating system if it fails. A method has an `# Errors`
/// section only where the error says something about the file.
#[expect(clippy::len_without_is_empty, reason = "the engine never asks whether a file is empty")]
pub trait DiskFile: Send + Sync + fmt::Debug {
    /// Reads at `offset` and fills `buf` as far as the file reaches. Returns fewer bytes than `buf`
    /// holds only at the end of the file.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Writes all of `buf` at `offset`.
    ///
    /// # Errors
    /// After an error it is unknown how much has been written.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;

    /// Makes the contents and the length durable.
    ///
    /// # Errors
    /// After an error the contents of the file are unknown. A second call that succeeds proves
    /// nothing.
    fn sync_data(&self) -> io::Result<()>;

    /// The length in bytes.
    fn len(&self) -> io::Result<u64>;

    /// The status of the file.
    fn stat(&self) -> io::Result<FileStat>;

    /// Gives the file to another user and group if this process runs as root. Otherwise it does
    /// nothing. By default it does nothing, as on a disk without users.
    fn set_owner(&self, owner: Owner) -> io::Result<()> {
        let _ = owner;
        Ok(())
    }

    /// Truncates or extends the file. The engine truncates no bytes that a reader may rely on.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Takes the advisory lock of the file for this handle without waiting. `false` if another
    /// handle has it. Dropping the handle releases the lock.
    fn try_lock(&self) -> io::Result<bool>;

    /// Maps the file for reading.
    ///
    /// # Errors
    /// `Unsupported` where files cannot be mapped.
    fn map(&self) -> io::Result<Map>;

    /// The descriptor of the file in this process, for [`Disk::link`] and
    /// [`DiskFile::clone_contents`]. By default `None`.
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Replaces the contents of the file by those of another one, and lets both share the blocks of
    /// the disk until one of them changes (a reflink). By default this is an error.
    ///
    /// # Errors
    /// `Unsupported` and `CrossesDevices`, among others. The file may have changed then.
    fn clone_contents(&self, from: &dyn DiskFile) -> io::Result<()> {
        let _ = from;
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Whether the operation failed because the disk is full, or the quota of the user is used up.
pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Reads exactly `buf.len()` bytes at `offset`, or fails with `UnexpectedEof`.
pub(crate) fn read_exact_at(file: &dyn DiskFile, buf: &mut [u8], offset: u64) -> io::Result<()> {
    if file.read_at(buf, offset)? < buf.len() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(())
}

/// Whether [`write_file`] may put its file in place of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Existing {
    /// It replaces the file that has the name.
    Replace,
    /// It fails with `AlreadyExists`.
    Keep,
}

/// Writes the file `path` atomically and durably: it writes a temporary file beside it, syncs it,
/// renames it and syncs the directory.
///
/// # Errors
/// The error of the file system. The file under `path` is then the old or the new one, never a
/// mixture. No temporary file is left, unless it cannot be removed.
pub(crate) fn write_file(
    disk: &dyn Disk,
    path: &Path,
    bytes: &[u8],
    existing: Existing,
) -> io::Result<()> {
    NewFile::write(disk, path, bytes, existing)?.give_name()?;
    sync_parent(disk, path)
}

/// A synced file that does not have its name yet. Dropping it removes it.
struct NewFile<'a> {
    disk: &'a dyn Disk,
    path: &'a Path,
    existing: Existing,
    temporary: Temporary,
    has_name: bool,
}

impl<'a> NewFile<'a> {
    /// Writes and syncs the temporary file of `path`.
    fn write(
        disk: &'a dyn Disk,
        path: &'a Path,
        bytes: &[u8],
        existing: Existing,
    ) -> io::Result<Self> {
        let old = disk.stat(path)?;
        let temporary = Temporary::create(disk, path)?;
        let new = Self { disk, path, existing, temporary, has_name: false };
        let file = &new.temporary.file;
        match (existing, old.and_then(|old| old.owner), file.stat()?.owner) {
            (Existing::Replace, Some(old), Some(owner)) if old.stays(owner) => {
                file.set_owner(old)?
            }
            _ => {}
        }
        file.write_at(bytes, 0)?;
        file.sync_data()?;
        Ok(new)
    }

    /// Renames the file. The caller syncs its directory.
    fn give_name(mut self) -> io::Result<()> {
        match self.existing {
            Existing::Replace => self.disk.rename(&self.temporary.path, self.path)?,
            Existing::Keep => self.disk.rename_new(&self.temporary.path, self.path)?,
        }
        self.has_name = true;
        Ok(())
    }
}

impl Drop for NewFile<'_> {
    fn drop(&mut self) {
        if !self.has_name {
            // Best effort: the caller gets the first error, and the next opening removes the file.
            let _ = self.disk.remove_file(&self.temporary.path);
        }
    }
}

/// How many names a temporary file may try. A name that cannot be used belongs to another process,
/// or is not a regular file.
const TEMPORARIES_MAX: u32 = 64;

/// A temporary file, locked by the process that writes it.
pub(crate) struct Temporary {
    pub(crate) file: Arc<dyn DiskFile>,
    pub(crate) path: PathBuf,
}

impl Temporary {
    /// Creates the temporary file of `path`, under the first name that is free or that a dead
    /// process left behind.
    ///
    /// # Errors
    /// The error of the file system. `ResourceBusy` if no name can be used.
    pub(crate) fn create(disk: &dyn Disk, path: &Path) -> io::Result<Self> {
        for number in 0..TEMPORARIES_MAX {
            let name = temporary_path(path, number);
            // A leftover is removed once, and then the same name is tried again.
            for _ in 0..2 {
                match disk.open(&name, OpenMode::CreateNew) {
                    Ok(file) => match owns(disk, &*file, &name) {
                        Ok(true) => return Ok(Self { file, path: name }),
                        // Another process took the file for a leftover before this process locked
                        // it.
                        Ok(false) => {}
                        // Without locks, no process can take it for a leftover.
                        Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                            return Ok(Self { file, path: name });
                        }
                        Err(error) => return Err(error),
                    },
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                        if !remove_temporary(disk, &name) {
                            break;
                        }
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        // Not `AlreadyExists`: the caller would relate that to `path` itself.
        Err(io::Error::new(
            io::ErrorKind::ResourceBusy,
            "all names of its temporary file are taken; remove them",
        ))
    }
}

/// The name of a temporary file beside `path`: `X.tmp`, or `X.N.tmp`.
fn temporary_path(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(if number == 0 { ".tmp".to_owned() } else { format!(".{number}.tmp") });
    name.into()
}

/// Whether `name` is the name of a temporary file of the file `of`.
pub(crate) fn is_temporary(name: &str, of: &str) -> bool {
    let number = |text: &str| {
        text.parse().is_ok_and(|n: u32| (1..TEMPORARIES_MAX).contains(&n) && n.to_string() == text)
    };
    let middle = name.strip_prefix(of).and_then(|rest| rest.strip_suffix("tmp"));
    middle.is_some_and(|middle| {
        middle == "."
            || middle.strip_prefix('.').and_then(|rest| rest.strip_suffix('.')).is_some_and(number)
    })
}

/// Locks a file and checks that it still has its name. A process that removes leftovers locks them
/// first, so the file may have been removed.
fn owns(disk: &dyn Disk, file: &dyn DiskFile, path: &Path) -> io::Result<bool> {
    if !file.try_lock()? {
        return Ok(false);
    }
    let (opened, named) = (file.stat()?, disk.stat(path)?);
    Ok(named.is_some_and(|named| named.identity == opened.identity))
}

/// Removes a temporary file that a dead process left behind. `false` if it is in use or cannot be
/// removed.
pub(crate) fn remove_temporary(disk: &dyn Disk, path: &Path) -> bool {
    let removed =
        disk.open(path, OpenMode::ReadWrite).and_then(|file| match owns(disk, &*file, path)? {
            true => disk.remove_file(path),
            false => Err(io::ErrorKind::ResourceBusy.into()),
        });
    removed.map_or_else(|error| error.kind() == io::ErrorKind::NotFound, |()| true)
}

/// Removes the temporary files of `path` that dead processes left behind.
///
/// # Errors
/// The error of listing the directory. A temporary file that cannot be removed stays.
pub(crate) fn remove_temporaries(disk: &dyn Disk, path: &Path) -> io::Result<()> {
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else { return Ok(()) };
    for entry in disk.list_dir(path.parent().unwrap_or(Path::new(".")))? {
        if entry.kind == FileKind::File && is_temporary(&entry.name, name) {
            remove_temporary(disk, &path.with_file_name(&entry.name));
        }
    }
    Ok(())
}

/// Makes the name of `path` durable: syncs its directory.
pub(crate) fn sync_parent(disk: &dyn Disk, path: &Path) -> io::Result<()> {
    disk.sync_dir(path.parent().unwrap_or(Path::new(".")))
}

/// Reads a whole file of at most `limit` bytes.
///
/// # Errors
/// `FileTooLarge` if it is longer than `limit`, or the error of the file system.
pub(crate) fn read_file(disk: &dyn Disk, path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    read_open_file(&*disk.open(path, OpenMode::Read)?, limit)
}

/// Reads a whole file that the user has configured: credentials, certificates, a PIN. Unlike other
/// files it may be reached through a symlink.
///
/// # Errors
/// As [`read_file`].
#[cfg(any(
    feature = "kms-aliyun",
    feature = "kms-aws",
    feature = "kms-pkcs11",
    feature = "kms-vault"
))]
pub(crate) fn read_configured(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    read_file(&RealDisk, &RealDisk.resolve(path)?, limit)
}

/// Reads a whole open file of at most `limit` bytes.
///
/// # Errors
/// As [`read_file`].
pub(crate) fn read_open_file(file: &dyn DiskFile, limit: u64) -> io::Result<Vec<u8>> {
    let len = file.len()?;
    if len > limit {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let mut bytes = vec![0; len as usize];
    let read = file.read_at(&mut bytes, 0)?;
    bytes.truncate(read);
    Ok(bytes)
}
