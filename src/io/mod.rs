//! What the engine needs of the world: files, time and randomness, each behind a narrow trait.
//!
//! The real ones are [`RealDisk`], [`SystemClock`] and [`OsRandom`]. Tests inject others that fail, tear, reorder, cut the power
//! and replay from a seed; nothing else in the engine touches `std::fs`, a clock or a random number generator.

#![expect(clippy::disallowed_methods, clippy::disallowed_types, reason = "here is where the world is let in")]

mod clock;
mod map;
mod random;
mod real;
#[cfg(test)]
mod tests;

use std::{
    error, fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
};

pub use clock::{Clock, SystemClock};
pub use map::Map;
pub use random::{OsRandom, Random};
pub use real::RealDisk;
pub(crate) use real::process_user;

/// How [`Disk::open`] opens a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenMode {
    /// An existing file, for reading.
    Read,
    /// An existing file, for reading and writing.
    ReadWrite,
    /// A new file, for reading and writing; it is an error if the name exists.
    CreateNew,
}

/// Who may use the files that a [`Disk`] creates, besides their owner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Access {
    /// No one: files get mode 0600, directories 0700.
    #[default]
    Owner,
    /// The group may read: files get mode 0640, directories 0750.
    GroupRead,
}

/// What a name stands for.
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
    /// The system does not say.
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

/// A name that stands for something else than it should. Comes as the inner error of an [`io::Error`], and as
/// [`Error::WrongFileType`](crate::Error::WrongFileType) from the engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrongFileType {
    /// The name.
    pub path: PathBuf,
    /// What it should be.
    pub expected: FileKind,
    /// What it is.
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

/// What a directory entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// The name, without the directory. A name that is not UTF-8 is converted with loss: the engine makes none such.
    pub name: String,
    /// What it stands for. A symlink is not followed.
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
    /// Whether root gives the file that replaces one of this owner to the same owner and group. A file of root that no other group
    /// reads shows no intention: its replacement `new` keeps the owner and group of the directory.
    fn stays(self, new: Self) -> bool {
        const GROUP_READ: u32 = 0o040;
        self.uid != 0 || (self.gid != 0 && self.mode & new.mode & GROUP_READ != 0)
    }
}

/// What a file is. A symlink is not followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileStat {
    /// Its type.
    pub kind: FileKind,
    /// Its length in bytes.
    pub len: u64,
    /// Something that changes when another file takes the name (an inode number).
    pub identity: u64,
    /// How many names it has.
    pub links: u64,
    /// Whose it is; `None` on a disk without users.
    pub owner: Option<Owner>,
}

/// A file system, or a simulation of one.
///
/// A change to a directory (create, rename, remove) is durable once [`Disk::sync_dir`] of it has returned; the contents of a
/// file once [`DiskFile::sync_data`] has. Nothing else may be assumed, and the engine assumes nothing else.
///
/// No operation follows a symlink in the last name of a path, or waits for a FIFO or a device.
pub trait Disk: Send + Sync + fmt::Debug {
    /// The disk below the directory `dir`: paths that begin with `dir` lead to the directory that `dir` is now, and no symlink
    /// below it is followed. Other paths are an error. `access` says who may use what is created.
    ///
    /// # Errors
    /// What the system says, `NotFound` and `NotADirectory` among it.
    fn beneath(&self, dir: &Path, access: Access) -> io::Result<Arc<dyn Disk>>;

    /// What the file system that `dir` is on is called, if it is a network file system, whose locks may not reach other machines. By
    /// default `None`.
    ///
    /// # Errors
    /// What the system says.
    fn network_file_system(&self, dir: &Path) -> io::Result<Option<&'static str>> {
        let _ = dir;
        Ok(None)
    }

    /// Where a path really leads: its directory without symlinks, and the name at the end of the symlinks that its last name leads
    /// through. That name need not exist. By default the path itself, as on a disk without symlinks.
    ///
    /// # Errors
    /// What the system says, `NotFound` for a missing directory among it.
    fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        Ok(path.to_owned())
    }

    /// Opens a regular file.
    ///
    /// # Errors
    /// What the system says, `NotFound` and `AlreadyExists` among it; [`WrongFileType`] for anything but a regular file.
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>>;

    /// Renames a file, replacing what has the new name.
    ///
    /// # Errors
    /// What the system says.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Renames a file, unless the new name exists.
    ///
    /// # Errors
    /// `AlreadyExists`, and what the system says.
    fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()>;

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

    /// What the file is.
    ///
    /// # Errors
    /// What the system says.
    fn stat(&self) -> io::Result<FileStat>;

    /// Gives the file to another user and group, if this process is root's; otherwise does nothing. By default nothing, as on a
    /// disk without users.
    ///
    /// # Errors
    /// What the system says.
    fn set_owner(&self, owner: Owner) -> io::Result<()> {
        let _ = owner;
        Ok(())
    }

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

/// Whether [`write_file`] may put its file in place of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Existing {
    /// It replaces the file that has the name.
    Replace,
    /// It fails with `AlreadyExists`.
    Keep,
}

/// Writes the file `path` atomically and durably: a temporary file beside it, synced, renamed, the directory synced.
///
/// # Errors
/// What the system says. The file under `path` is then the old one or the new one, never a mixture, and no temporary file is left
/// unless it cannot be removed.
pub(crate) fn write_file(disk: &dyn Disk, path: &Path, bytes: &[u8], existing: Existing) -> io::Result<()> {
    let old = disk.stat(path)?;
    let temporary = Temporary::create(disk, path)?;
    let owned = || match (existing, old.and_then(|old| old.owner), temporary.file.stat()?.owner) {
        (Existing::Replace, Some(old), Some(new)) if old.stays(new) => temporary.file.set_owner(old),
        _ => Ok(()),
    };
    let written = owned().and_then(|()| temporary.file.write_at(bytes, 0)).and_then(|()| temporary.file.sync_data());
    let named = written.and_then(|()| match existing {
        Existing::Replace => disk.rename(&temporary.path, path),
        Existing::Keep => disk.rename_new(&temporary.path, path),
    });
    if let Err(error) = named {
        // Best effort: the caller hears of the first error, and the next opening removes the file.
        let _ = disk.remove_file(&temporary.path);
        return Err(error);
    }
    sync_parent(disk, path)
}

/// How many names a temporary file may try. Each name that cannot be had is in use by another process, or is no file.
const TEMPORARIES_MAX: u32 = 64;

/// A temporary file, locked by the process that writes it.
pub(crate) struct Temporary {
    pub(crate) file: Arc<dyn DiskFile>,
    pub(crate) path: PathBuf,
}

impl Temporary {
    /// Creates the temporary file of `path`, under the first name that is free or was left by a process that is gone.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn create(disk: &dyn Disk, path: &Path) -> io::Result<Self> {
        for number in 0..TEMPORARIES_MAX {
            let name = temporary_path(path, number);
            // A leftover is removed once, and then the name is tried again.
            for _ in 0..2 {
                match disk.open(&name, OpenMode::CreateNew) {
                    Ok(file) => match owns(disk, &*file, &name) {
                        Ok(true) => return Ok(Self { file, path: name }),
                        // Another process took it for a leftover before it was locked.
                        Ok(false) => {}
                        // Without locks no process can take it for a leftover.
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
        // Not `AlreadyExists`: to the caller that would be about `path` itself.
        Err(io::Error::new(io::ErrorKind::ResourceBusy, "all names of its temporary file are taken; remove them"))
    }
}

/// The name of a temporary file beside `path`: `X.tmp`, or `X.N.tmp`.
fn temporary_path(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(if number == 0 { ".tmp".to_owned() } else { format!(".{number}.tmp") });
    name.into()
}

/// Whether `name` is that of a temporary file of a file called `of`.
pub(crate) fn is_temporary(name: &str, of: &str) -> bool {
    let number =
        |text: &str| text.parse().is_ok_and(|n: u32| (1..TEMPORARIES_MAX).contains(&n) && n.to_string() == text);
    let middle = name.strip_prefix(of).and_then(|rest| rest.strip_suffix("tmp"));
    middle.is_some_and(|middle| {
        middle == "." || middle.strip_prefix('.').and_then(|rest| rest.strip_suffix('.')).is_some_and(number)
    })
}

/// Locks a file, and makes sure that it still has its name: a process that removes leftovers locks them first.
fn owns(disk: &dyn Disk, file: &dyn DiskFile, path: &Path) -> io::Result<bool> {
    if !file.try_lock()? {
        return Ok(false);
    }
    let (opened, named) = (file.stat()?, disk.stat(path)?);
    Ok(named.is_some_and(|named| named.identity == opened.identity))
}

/// Removes a temporary file that a process left which is gone. `false` when it is in use or cannot be removed.
pub(crate) fn remove_temporary(disk: &dyn Disk, path: &Path) -> bool {
    let removed = disk.open(path, OpenMode::ReadWrite).and_then(|file| match owns(disk, &*file, path)? {
        true => disk.remove_file(path),
        false => Err(io::ErrorKind::ResourceBusy.into()),
    });
    removed.map_or_else(|error| error.kind() == io::ErrorKind::NotFound, |()| true)
}

/// Removes the temporary files of `path` that processes left which are gone.
///
/// # Errors
/// What the system says of the directory. A temporary file that cannot be removed stays.
pub(crate) fn remove_temporaries(disk: &dyn Disk, path: &Path) -> io::Result<()> {
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else { return Ok(()) };
    for entry in disk.list_dir(path.parent().unwrap_or(Path::new(".")))? {
        if entry.kind == FileKind::File && is_temporary(&entry.name, name) {
            remove_temporary(disk, &path.with_file_name(&entry.name));
        }
    }
    Ok(())
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
    read_open_file(&*disk.open(path, OpenMode::Read)?, limit)
}

/// Reads a whole file of the user's configuration, to which a symlink may lead: credentials, certificates, a PIN.
///
/// # Errors
/// As [`read_file`].
#[cfg(any(feature = "kms-aliyun", feature = "kms-aws", feature = "kms-pkcs11"))]
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
