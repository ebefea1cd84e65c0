//! The real file system.
//!
//! Every operation reaches a file in the same way. [`Root::parent`] opens the directory that holds
//! the last name of a path, without following a symlink below the root. The operation then acts on
//! that name alone and never follows it. So the rules about links and file types are in one place.

mod root;

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::{
    fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, RenameFlags, Stat, Uid},
    io::Errno,
};

use super::{
    Access, Clock, DirEntry, Disk, DiskFile, FileKind, FileStat, Map, OpenMode, Owner, SystemClock,
};
use root::{HANDLE, Resolver, Root};

/// How many zeros one write writes where the file system cannot allocate, in bytes.
const ZEROS_AT_ONCE: u64 = 64 << 10;
/// A second in nanoseconds.
const SECOND: i128 = 1_000_000_000;

/// The file system of the operating system.
///
/// Used directly, it reaches the directory of a path as the system does, and follows symlinks on
/// the way. [`Disk::beneath`] gives a disk that follows no symlink below a directory. Neither
/// follows the last name of a path, waits for a FIFO or a device, or opens anything but a regular
/// file.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealDisk;

/// The file system below one directory.
#[derive(Debug)]
struct RootedDisk {
    root: Root,
    access: Access,
}

impl RealDisk {
    /// As [`Disk::beneath`], without the Linux system call `openat2`: every path is walked one
    /// directory handle at a time.
    ///
    /// [`Disk::beneath`] falls back to this where the kernel lacks `openat2` or a sandbox forbids
    /// it. Tests use it on every kernel.
    ///
    /// # Errors
    /// As [`Disk::beneath`].
    #[doc(hidden)]
    pub fn beneath_by_walking(&self, dir: &Path, access: Access) -> io::Result<Arc<dyn Disk>> {
        Ok(Arc::new(RootedDisk { root: Root::open(dir, Resolver::Walk)?, access }))
    }

    /// The disk below the directory that holds the last name of `path`, and the path relative to
    /// that disk.
    fn at(path: &Path) -> io::Result<(RootedDisk, PathBuf)> {
        let (parent, name) = match (path.parent(), path.file_name()) {
            (Some(parent), Some(name)) if !parent.as_os_str().is_empty() => (parent, Some(name)),
            (Some(_), Some(name)) => (Path::new("."), Some(name)),
            // `.`, `..` and `/` have no last name: the root is the directory itself.
            _ => (path, None),
        };
        let root = Root::open(parent, Resolver::Kernel)?;
        let path = name.map_or_else(|| parent.to_owned(), |name| parent.join(name));
        Ok((RootedDisk { root, access: Access::Owner }, path))
    }

    fn directory(path: &Path) -> io::Result<RootedDisk> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        Ok(RootedDisk { root: Root::open(path, Resolver::Kernel)?, access: Access::Owner })
    }
}

impl Disk for RealDisk {
    fn beneath(&self, dir: &Path, access: Access) -> io::Result<Arc<dyn Disk>> {
        Ok(Arc::new(RootedDisk { root: Root::open(dir, Resolver::Kernel)?, access }))
    }

    fn network_file_system(&self, dir: &Path) -> io::Result<Option<&'static str>> {
        Self::directory(dir)?.network_file_system(dir)
    }

    fn available(&self, dir: &Path) -> io::Result<Option<u64>> {
        let disk = Self::directory(dir)?;
        disk.available(disk.root.path())
    }

    fn allocate(&self, path: &Path, len: u64) -> io::Result<()> {
        let (disk, path) = Self::at(path)?;
        disk.allocate(&path, len)
    }

    fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        root::resolve(path)
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        let (disk, path) = Self::at(path)?;
        disk.open(&path, mode)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let ((source, from), (target, to)) = (Self::at(from)?, Self::at(to)?);
        rename(&source.root.parent(&from)?, &target.root.parent(&to)?)
    }

    fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()> {
        let ((source, from), (target, to)) = (Self::at(from)?, Self::at(to)?);
        rename_new(&source.root.parent(&from)?, &target.root.parent(&to)?)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let (disk, path) = Self::at(path)?;
        disk.remove_file(&path)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let (disk, path) = Self::at(path)?;
        disk.create_dir(&path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        let (disk, path) = Self::at(path)?;
        disk.remove_dir(&path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let disk = Self::directory(path)?;
        disk.sync_dir(disk.root.path())
    }

    fn list_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        let disk = Self::directory(path)?;
        disk.list_dir(disk.root.path())
    }

    fn names_mark(&self, dir: &Path) -> io::Result<Option<u128>> {
        let disk = Self::directory(dir)?;
        disk.names_mark(disk.root.path())
    }

    fn stat(&self, path: &Path) -> io::Result<Option<FileStat>> {
        match Self::at(path) {
            Ok((disk, path)) => disk.stat(&path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn link(&self, file: &dyn DiskFile, path: &Path) -> io::Result<()> {
        let (disk, path) = Self::at(path)?;
        disk.link(file, &path)
    }
}

impl RootedDisk {
    /// As [`Disk::open`].
    fn open_file(&self, path: &Path, mode: OpenMode) -> io::Result<RealFile> {
        let place = self.root.parent(path)?;
        let (dir, name) = (place.dir(), place.name());
        let common = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
        let flags = match mode {
            OpenMode::Read => OFlags::RDONLY,
            OpenMode::ReadWrite => OFlags::RDWR,
            OpenMode::CreateNew => {
                let flags = common | OFlags::RDWR | OFlags::CREATE | OFlags::EXCL;
                let file = rustix::fs::openat(dir, name, flags, Access::Owner.file_mode())?;
                if let Err(error) = adopt(file.as_fd(), dir, self.access.file_mode()) {
                    // Best effort: nothing has been written to the file yet.
                    let _ = rustix::fs::unlinkat(dir, name, AtFlags::empty());
                    return Err(error);
                }
                return Ok(RealFile(file.into()));
            }
        };
        // Checks the type before opening, because opening a device or the end of a FIFO can have
        // side effects.
        place.check(FileKind::File)?;
        let file = match rustix::fs::openat(dir, name, flags | common, Mode::empty()) {
            // Another process replaced the name between the two calls.
            Err(error @ (Errno::LOOP | Errno::NXIO | Errno::ISDIR)) => {
                place.check(FileKind::File)?;
                return Err(error.into());
            }
            opened => opened?,
        };
        match kind_of(&rustix::fs::fstat(&file)?) {
            FileKind::File => Ok(RealFile(file.into())),
            found => Err(place.wrong_type(FileKind::File, found)),
        }
    }
}

impl Disk for RootedDisk {
    fn beneath(&self, dir: &Path, access: Access) -> io::Result<Arc<dyn Disk>> {
        Ok(Arc::new(RootedDisk { root: self.root.below(dir)?, access }))
    }

    fn network_file_system(&self, dir: &Path) -> io::Result<Option<&'static str>> {
        #[cfg(target_os = "linux")]
        return Ok(network_file_system(
            rustix::fs::fstatfs(&self.root.open_dir(dir, OFlags::RDONLY)?)?.f_type as u32,
        ));
        #[cfg(not(target_os = "linux"))]
        return self.root.open_dir(dir, OFlags::RDONLY).map(|_| None);
    }

    fn available(&self, dir: &Path) -> io::Result<Option<u64>> {
        let stat = rustix::fs::fstatvfs(self.root.open_dir(dir, OFlags::RDONLY)?)?;
        Ok(Some(stat.f_bavail.saturating_mul(stat.f_frsize)))
    }

    fn allocate(&self, path: &Path, len: u64) -> io::Result<()> {
        let file = match self.open_file(path, OpenMode::ReadWrite) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.open_file(path, OpenMode::CreateNew)?
            }
            opened => opened?,
        };
        if file.stat()?.links > 1 {
            // The zeros would overwrite the file under its other name too.
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the file has another name"));
        }
        file.allocate(len)?;
        file.sync_data()
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(self.open_file(path, mode)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        rename(&self.root.parent(from)?, &self.root.parent(to)?)
    }

    fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()> {
        rename_new(&self.root.parent(from)?, &self.root.parent(to)?)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let place = self.root.parent(path)?;
        match rustix::fs::unlinkat(place.dir(), place.name(), AtFlags::empty()) {
            // For a directory, POSIX specifies EPERM and Linux returns EISDIR.
            Err(error @ (Errno::PERM | Errno::ISDIR)) => {
                place.check_not(FileKind::Directory, FileKind::File)?;
                Err(error.into())
            }
            removed => Ok(removed?),
        }
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let place = self.root.parent(path)?;
        let mode = self.access.dir_mode();
        rustix::fs::mkdirat(place.dir(), place.name(), Access::Owner.dir_mode())?;
        let made = open_made(&place).and_then(|made| adopt(made.as_fd(), place.dir(), mode));
        if made.is_err() {
            // Best effort: the directory is empty.
            let _ = rustix::fs::unlinkat(place.dir(), place.name(), AtFlags::REMOVEDIR);
        }
        made
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        let place = self.root.parent(path)?;
        match rustix::fs::unlinkat(place.dir(), place.name(), AtFlags::REMOVEDIR) {
            Err(error @ Errno::NOTDIR) => {
                place.check(FileKind::Directory)?;
                Err(error.into())
            }
            removed => Ok(removed?),
        }
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        Ok(rustix::fs::fsync(self.root.open_dir(path, OFlags::RDONLY)?)?)
    }

    fn list_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        let dir = self.root.open_dir(path, OFlags::RDONLY)?;
        let mut entries = Vec::new();
        for entry in Dir::read_from(&dir)? {
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let kind = match entry.file_type() {
                // Some file systems do not report the type.
                FileType::Unknown => {
                    match rustix::fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW) {
                        Err(Errno::NOENT) => continue,
                        stat => kind_of(&stat?),
                    }
                }
                kind => kind.into(),
            };
            entries.push(DirEntry { name: name.to_string_lossy().into_owned(), kind });
        }
        Ok(entries)
    }

    fn names_mark(&self, dir: &Path) -> io::Result<Option<u128>> {
        let stat = rustix::fs::fstat(self.root.open_dir(dir, HANDLE)?)?;
        let modified = i128::from(stat.st_mtime) * SECOND + i128::from(stat.st_mtime_nsec);
        let changed = i128::from(stat.st_ctime) * SECOND + i128::from(stat.st_ctime_nsec);
        Ok(mark_of(modified, changed, i128::from(SystemClock.wall_us()) * 1000))
    }

    fn stat(&self, path: &Path) -> io::Result<Option<FileStat>> {
        let place = match self.root.parent(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            place => place?,
        };
        match rustix::fs::statat(place.dir(), place.name(), AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => Ok(None),
            stat => Ok(Some(stat_of(&stat?))),
        }
    }

    #[cfg(any(target_os = "linux", target_os = "android"))]
    fn link(&self, file: &dyn DiskFile, path: &Path) -> io::Result<()> {
        let file = file.descriptor().ok_or(io::ErrorKind::Unsupported)?;
        let place = self.root.parent(path)?;
        // The file itself, also if another one has taken its name since it was opened.
        let file = format!("/proc/self/fd/{}", file.as_raw_fd());
        let (dir, name) = (place.dir(), place.name());
        Ok(rustix::fs::linkat(rustix::fs::CWD, file, dir, name, AtFlags::SYMLINK_FOLLOW)?)
    }
}

/// Opens a directory that this process has just created. The umask may have left its owner without
/// the right to read it.
fn open_made(place: &root::Place<'_>) -> io::Result<OwnedFd> {
    match place.open_dir(OFlags::RDONLY) {
        #[cfg(any(target_os = "linux", target_os = "android"))]
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            // A handle that only names the directory needs no right to it, and no symlink can
            // redirect it.
            let handle = place.open_dir(OFlags::PATH)?;
            let path = format!("/proc/self/fd/{}", handle.as_raw_fd());
            rustix::fs::chmod(path, Access::Owner.dir_mode())?;
            place.open_dir(OFlags::RDONLY)
        }
        opened => opened,
    }
}

/// Gives a new file or directory its permissions, independent of the umask. If root creates it, it
/// gets the owner and group of the directory that holds it. So one command run as root does not
/// lock out the owner of a store.
fn adopt(made: BorrowedFd<'_>, dir: BorrowedFd<'_>, mode: Mode) -> io::Result<()> {
    let is = rustix::fs::fstat(made)?;
    if rustix::process::geteuid().is_root() {
        let parent = rustix::fs::fstat(dir)?;
        if (is.st_uid, is.st_gid) != (parent.st_uid, parent.st_gid) {
            let (uid, gid) = (Uid::from_raw(parent.st_uid), Gid::from_raw(parent.st_gid));
            rustix::fs::fchown(made, Some(uid), Some(gid))?;
        }
    }
    if Mode::from_raw_mode(is.st_mode) != mode {
        rustix::fs::fchmod(made, mode)?;
    }
    Ok(())
}

/// The effective user of this process.
pub(crate) fn process_user() -> u32 {
    rustix::process::geteuid().as_raw()
}

fn rename(from: &root::Place<'_>, to: &root::Place<'_>) -> io::Result<()> {
    Ok(rustix::fs::renameat(from.dir(), from.name(), to.dir(), to.name())?)
}

/// Renames a file, unless the new name exists.
fn rename_new(from: &root::Place<'_>, to: &root::Place<'_>) -> io::Result<()> {
    match rustix::fs::renameat_with(
        from.dir(),
        from.name(),
        to.dir(),
        to.name(),
        RenameFlags::NOREPLACE,
    ) {
        // The kernel, the file system or a sandbox does not offer this call. A hard link does not
        // replace a name either.
        Err(Errno::NOSYS | Errno::INVAL | Errno::PERM | Errno::NOTSUP) => link_and_unlink(from, to),
        renamed => Ok(renamed?),
    }
}

fn link_and_unlink(from: &root::Place<'_>, to: &root::Place<'_>) -> io::Result<()> {
    rustix::fs::linkat(from.dir(), from.name(), to.dir(), to.name(), AtFlags::empty())?;
    Ok(rustix::fs::unlinkat(from.dir(), from.name(), AtFlags::empty())?)
}

/// The name of a network file system, by the magic number from `statfs(2)`. The numbers are those
/// of `linux/magic.h` and of the manual page of `statfs(2)`; those of BeeGFS, GPFS and Lustre are
/// from their sources. FUSE is not in the list, because its number does not distinguish local from
/// remote file systems.
#[cfg(target_os = "linux")]
pub(super) fn network_file_system(magic: u32) -> Option<&'static str> {
    Some(match magic {
        0x6969 => "NFS",
        0x517b | 0xff53_4d42 | 0xfe53_4d42 => "SMB",
        0x0102_1997 => "9P",
        0x00c3_6400 => "Ceph",
        0x5346_414f | 0x6b41_4653 => "AFS",
        0x7375_7245 => "Coda",
        0x0116_1970 => "GFS2",
        0x7461_636f => "OCFS2",
        0x4750_4653 => "GPFS",
        0x0bd0_0bd0 => "Lustre",
        0x1983_0326 => "BeeGFS",
        _ => return None,
    })
}

/// As [`Disk::rename_new`] where the system cannot rename without replacing.
#[cfg(test)]
pub(super) fn rename_by_link(from: &Path, to: &Path) -> io::Result<()> {
    let ((source, from), (target, to)) = (RealDisk::at(from)?, RealDisk::at(to)?);
    link_and_unlink(&source.root.parent(&from)?, &target.root.parent(&to)?)
}

/// As [`Disk::allocate`] on a file system that cannot allocate.
#[cfg(test)]
pub(super) fn allocate_by_writing(path: &Path, len: u64) -> io::Result<()> {
    let (disk, path) = RealDisk::at(path)?;
    disk.open_file(&path, OpenMode::CreateNew)?.write_zeros(len)
}

fn kind_of(stat: &Stat) -> FileKind {
    FileType::from_raw_mode(stat.st_mode).into()
}

#[expect(
    clippy::unnecessary_cast,
    clippy::useless_conversion,
    reason = "the types of these fields differ between systems"
)]
fn stat_of(stat: &Stat) -> FileStat {
    FileStat {
        kind: kind_of(stat),
        len: u64::try_from(stat.st_size).unwrap_or(0),
        identity: stat.st_ino as u64,
        links: u64::from(stat.st_nlink),
        owner: Some(Owner {
            uid: stat.st_uid,
            gid: stat.st_gid,
            mode: u32::from(stat.st_mode) & 0o7777,
        }),
    }
}

/// The mark of a directory with these times, in nanoseconds since the Unix epoch. A later change may
/// leave the times as they are, if the file system counts in steps and the step is not over. Linux
/// counts in steps of at most 10 ms. Some file systems store whole seconds, or every other one.
pub(super) fn mark_of(modified: i128, changed: i128, now: i128) -> Option<u128> {
    let last = modified.max(changed);
    let step = if last % SECOND == 0 { 3 * SECOND } else { SECOND / 20 };
    // 64 bits of nanoseconds are enough for 500 years.
    let mark = u128::from(modified as u64) << 64 | u128::from(changed as u64);
    (now >= last + step).then_some(mark)
}

impl From<FileType> for FileKind {
    fn from(kind: FileType) -> Self {
        match kind {
            FileType::RegularFile => Self::File,
            FileType::Directory => Self::Directory,
            FileType::Symlink => Self::Symlink,
            FileType::Fifo => Self::Fifo,
            FileType::Socket => Self::Socket,
            FileType::CharacterDevice | FileType::BlockDevice => Self::Device,
            FileType::Unknown => Self::Unknown,
        }
    }
}

impl Access {
    fn file_mode(self) -> Mode {
        Mode::from_raw_mode(match self {
            Access::Owner => 0o600,
            Access::GroupRead => 0o640,
        })
    }

    fn dir_mode(self) -> Mode {
        Mode::from_raw_mode(match self {
            Access::Owner => 0o700,
            Access::GroupRead => 0o750,
        })
    }
}

#[derive(Debug)]
struct RealFile(File);

impl RealFile {
    /// Gives blocks to the first `len` bytes of the file, and extends it.
    fn allocate(&self, len: u64) -> io::Result<()> {
        #[cfg(any(target_os = "linux", target_os = "android"))]
        match rustix::fs::fallocate(&self.0, rustix::fs::FallocateFlags::empty(), 0, len) {
            // The file system lacks it.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
            allocated => return Ok(allocated?),
        }
        self.write_zeros(len)
    }

    /// Overwrites the first `len` bytes with zeros.
    fn write_zeros(&self, len: u64) -> io::Result<()> {
        let zeros = vec![0; ZEROS_AT_ONCE as usize];
        let mut at = 0;
        while at < len {
            let part = (len - at).min(ZEROS_AT_ONCE);
            self.0.write_all_at(zeros.get(..part as usize).unwrap_or_default(), at)?;
            at += part;
        }
        Ok(())
    }
}

impl DiskFile for RealFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.0.read_at(rest, offset + done as u64) {
                Ok(0) => break,
                Ok(read) => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(buf, offset)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn stat(&self) -> io::Result<FileStat> {
        Ok(stat_of(&rustix::fs::fstat(&self.0)?))
    }

    fn set_owner(&self, owner: Owner) -> io::Result<()> {
        let is = rustix::fs::fstat(&self.0)?;
        if rustix::process::geteuid().is_root() && (is.st_uid, is.st_gid) != (owner.uid, owner.gid)
        {
            rustix::fs::fchown(
                &self.0,
                Some(Uid::from_raw(owner.uid)),
                Some(Gid::from_raw(owner.gid)),
            )?;
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn try_lock(&self) -> io::Result<bool> {
        match self.0.try_lock() {
            Ok(()) => Ok(true),
            Err(fs::TryLockError::WouldBlock) => Ok(false),
            Err(fs::TryLockError::Error(error)) => Err(error),
        }
    }

    fn map(&self) -> io::Result<Map> {
        Map::of_file(&self.0)
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }

    #[cfg(any(target_os = "linux", target_os = "android"))]
    fn clone_contents(&self, from: &dyn DiskFile) -> io::Result<()> {
        let from = from.descriptor().ok_or(io::ErrorKind::Unsupported)?;
        Ok(rustix::fs::ioctl_ficlone(&self.0, from)?)
    }
}
