//! A directory, and access to the names below it.

use std::{
    ffi::OsStr,
    fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags},
    io::Errno,
};

use super::kind_of;
use crate::io::{FileKind, WrongFileType};

/// The flags of a handle that only serves to open names below it.
#[cfg(any(target_os = "linux", target_os = "android"))]
pub(super) const HANDLE: OFlags = OFlags::PATH;
#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub(super) const HANDLE: OFlags = OFlags::RDONLY;

/// The most symlinks in the path of a file outside a store, as in Linux.
const SYMLINKS_MAX: usize = 40;

/// How a path of several names is resolved below a root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Resolver {
    /// One call of `openat2`, where the system has it.
    Kernel,
    /// One directory handle at a time.
    Walk,
}

/// An open directory, below which no symlink is followed.
#[derive(Debug)]
pub(super) struct Root {
    /// Its path, to make the paths of callers relative, and for messages.
    path: PathBuf,
    dir: OwnedFd,
    resolver: Resolver,
}

/// A name in an open directory.
#[derive(Debug)]
pub(super) struct Place<'a> {
    path: &'a Path,
    parent: Parent<'a>,
    name: &'a OsStr,
}

#[derive(Debug)]
enum Parent<'a> {
    Root(BorrowedFd<'a>),
    Below(OwnedFd),
}

impl Root {
    /// Opens a directory. Only this call follows symlinks in its path.
    pub(super) fn open(path: &Path, resolver: Resolver) -> io::Result<Self> {
        let dir = rustix::fs::openat(
            CWD,
            path,
            HANDLE | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        Ok(Self { path: path.to_owned(), dir, resolver })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Opens a directory below this one as a root of its own.
    pub(super) fn below(&self, path: &Path) -> io::Result<Self> {
        let dir = self.open_dir(path, HANDLE)?;
        Ok(Self { path: path.to_owned(), dir, resolver: self.resolver })
    }

    /// The directory that holds the last name of `path`. `path` begins with the path of the root.
    pub(super) fn parent<'a>(&'a self, path: &'a Path) -> io::Result<Place<'a>> {
        let relative = self.relative(path)?;
        let (parent, name) = match (relative.parent(), relative.file_name()) {
            (Some(parent), Some(name)) if !parent.as_os_str().is_empty() => {
                (Parent::Below(self.open_relative(parent, HANDLE)?), name)
            }
            (_, Some(name)) => (Parent::Root(self.dir.as_fd()), name),
            (_, None) => (Parent::Root(self.dir.as_fd()), OsStr::new(".")),
        };
        Ok(Place { path, parent, name })
    }

    /// Opens the directory `path`, which begins with the path of the root.
    pub(super) fn open_dir(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        self.open_relative(self.relative(path)?, flags)
    }

    fn relative<'a>(&self, path: &'a Path) -> io::Result<&'a Path> {
        let outside =
            || io::Error::new(io::ErrorKind::InvalidInput, "the path leads out of its root");
        let relative = path.strip_prefix(&self.path).map_err(|_| outside())?;
        let below = relative.components().all(|part| matches!(part, Component::Normal(_)));
        if below { Ok(relative) } else { Err(outside()) }
    }

    fn open_relative(&self, relative: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        let flags = flags | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        if relative.as_os_str().is_empty() {
            return Ok(rustix::fs::openat(&self.dir, ".", flags, Mode::empty())?);
        }
        #[cfg(any(target_os = "linux", target_os = "android"))]
        if self.resolver == Resolver::Kernel {
            use rustix::fs::{ResolveFlags, openat2};
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
            match openat2(&self.dir, relative, flags, Mode::empty(), resolve) {
                // An old kernel or a sandbox: walk. A name of the wrong type: the walk finds the
                // type.
                Err(Errno::NOSYS | Errno::PERM | Errno::LOOP | Errno::NOTDIR) => {}
                opened => return Ok(opened?),
            }
        }
        self.walk(relative, flags)
    }

    fn walk(&self, relative: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        let mut path = self.path.clone();
        let mut reached: Option<OwnedFd> = None;
        let mut names = relative.components().peekable();
        while let Some(name) = names.next() {
            let name = name.as_os_str();
            path.push(name);
            let dir = reached.as_ref().map_or(self.dir.as_fd(), AsFd::as_fd);
            let here = match names.peek() {
                Some(_) => HANDLE | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                None => flags,
            };
            let opened = rustix::fs::openat(dir, name, here, Mode::empty());
            if let Err(Errno::LOOP | Errno::NOTDIR) = opened {
                Place { path: &path, parent: Parent::Root(dir), name }
                    .check(FileKind::Directory)?;
            }
            reached = Some(opened?);
        }
        reached.ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

impl Place<'_> {
    pub(super) fn dir(&self) -> BorrowedFd<'_> {
        match &self.parent {
            Parent::Root(dir) => *dir,
            Parent::Below(dir) => dir.as_fd(),
        }
    }

    pub(super) fn name(&self) -> &OsStr {
        self.name
    }

    /// Opens the directory with this name.
    pub(super) fn open_dir(&self, flags: OFlags) -> io::Result<OwnedFd> {
        let flags = flags | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(self.dir(), self.name, flags, Mode::empty())?)
    }

    /// Checks that the name has the type `expected`. If it has another type, fails with
    /// [`WrongFileType`].
    pub(super) fn check(&self, expected: FileKind) -> io::Result<()> {
        match self.kind()? {
            found if found == expected => Ok(()),
            found => Err(self.wrong_type(expected, found)),
        }
    }

    /// Fails with [`WrongFileType`] if the name has the type `refused`.
    pub(super) fn check_not(&self, refused: FileKind, expected: FileKind) -> io::Result<()> {
        match self.kind()? {
            found if found == refused => Err(self.wrong_type(expected, found)),
            _ => Ok(()),
        }
    }

    pub(super) fn wrong_type(&self, expected: FileKind, found: FileKind) -> io::Error {
        WrongFileType { path: self.path.to_owned(), expected, found }.into()
    }

    fn kind(&self) -> io::Result<FileKind> {
        Ok(kind_of(&rustix::fs::statat(self.dir(), self.name, AtFlags::SYMLINK_NOFOLLOW)?))
    }
}

/// Resolves the path of a file outside a store: its directory without symlinks, and the name at the
/// end of the symlinks that the last name leads through. The file itself need not exist.
pub(super) fn resolve(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..SYMLINKS_MAX {
        let Some(name) = path.file_name() else { return fs::canonicalize(&path) };
        let parent =
            path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let parent = fs::canonicalize(parent)?;
        let here = parent.join(name);
        match fs::read_link(&here) {
            Ok(target) => path = parent.join(target),
            // The name is not a symlink, or does not exist.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::InvalidInput | io::ErrorKind::NotFound
                ) =>
            {
                return Ok(here);
            }
            Err(error) => return Err(error),
        }
    }
    Err(Errno::LOOP.into())
}
