//! Copies one file to another disk, or lets both share it.

use std::path::Path;

use crate::{
    Error, Result,
    io::{self, Disk, DiskFile, FileKind, OpenMode, Temporary},
    shard::{CopySource, Extent},
};

/// How much is copied at once, in bytes.
const CHUNK_BYTES: usize = 1 << 20;
/// How much is copied before it is synced, in bytes. A larger sync would delay those of the writer
/// on the same disk.
const SYNC_BYTES: u64 = 8 << 20;

/// Whether the files of sealed segments are shared where the file system can, or copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::store) enum Whole {
    Shared,
    Copied,
}

/// The result for one segment, with its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::store) enum Done {
    /// The file is there already.
    Present(u64),
    Copied(u64),
    Shared(u64),
}

impl Done {
    pub(in crate::store) fn bytes(self) -> u64 {
        match self {
            Self::Present(bytes) | Self::Copied(bytes) | Self::Shared(bytes) => bytes,
        }
    }

    pub(in crate::store) fn is_present(self) -> bool {
        matches!(self, Self::Present(_))
    }
}

/// How much of the front and of the end of a file is compared, in bytes. A header and a footer fit.
const COMPARED_BYTES: u64 = 4096;

/// Copies files to a disk. The caller syncs the directories.
pub(in crate::store) struct Copier<'a> {
    pub(in crate::store) to: &'a dyn Disk,
    pub(in crate::store) whole: Whole,
}

impl Copier<'_> {
    /// Makes the file of a segment under `path`. A file of that name keeps it, if it has the segment.
    /// Otherwise the new file replaces it, so that a process that ends in between leaves the one or
    /// the other. It also replaces an empty directory, and any other object that is no directory.
    ///
    /// A file that is as long and has other contents may be the only sound one: it keeps its name if
    /// `is_sound` says that the source is not.
    ///
    /// # Errors
    /// [`Error::WrongFileType`] for a directory with contents; [`Error::Io`]; those of `is_sound`.
    pub(in crate::store) fn segment(
        &self,
        source: &CopySource,
        path: &Path,
        is_sound: impl FnOnce() -> Result<bool>,
    ) -> Result<Done> {
        let bytes = source.extent.bytes();
        let mut found = self.to.stat(path).map_err(Error::io("look for", path))?;
        if found.is_some_and(|found| found.kind == FileKind::Directory) {
            self.remove_empty(path)?;
            found = None;
        }
        if let Some(found) = found
            && found.kind == FileKind::File
            && (self.has_segment(source, path, found.len)? || found.len >= bytes && !is_sound()?)
        {
            return Ok(Done::Present(found.len));
        }
        if self.whole == Whole::Shared
            && matches!(source.extent, Extent::Sealed(_))
            && self.share(&*source.file, path, found.is_some())
        {
            return Ok(Done::Shared(bytes));
        }
        self.copy(&*source.file, bytes, path)?;
        Ok(Done::Copied(bytes))
    }

    /// Removes the directory under `path`, unless it has contents.
    fn remove_empty(&self, path: &Path) -> Result<()> {
        self.to.remove_dir(path).map_err(|error| match error.kind() {
            std::io::ErrorKind::DirectoryNotEmpty => Error::WrongFileType {
                path: path.to_owned(),
                expected: FileKind::File,
                found: FileKind::Directory,
            },
            _ => Error::io("remove", path)(error),
        })
    }

    /// Whether the file of `len` bytes under `path` has the segment, by its length, its front and its
    /// end. A damaged segment replaces no file that is as long or longer.
    fn has_segment(&self, source: &CopySource, path: &Path, len: u64) -> Result<bool> {
        let bytes = source.extent.bytes();
        let is_long = match (&source.damage, &source.extent) {
            (Some(_), _) => return Ok(len >= bytes),
            (None, Extent::Sealed(_)) => len == bytes,
            // The file of an open segment may have a torn tail.
            (None, Extent::Front(_)) => len >= bytes,
        };
        if !is_long {
            return Ok(false);
        }
        let found = self.to.open(path, OpenMode::Read).map_err(Error::io("open", path))?;
        let compared = COMPARED_BYTES.min(bytes);
        let read = |file: &dyn DiskFile, at: u64| {
            let mut part = vec![0; compared as usize];
            io::read_exact_at(file, &mut part, at).map(|()| part)
        };
        for at in [0, bytes - compared] {
            let (ours, theirs) = (read(&*source.file, at), read(&*found, at));
            match (ours, theirs) {
                (Ok(ours), Ok(theirs)) if ours == theirs => {}
                // A file that became shorter, or that cannot be read, is made again.
                _ => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Shares a file by a reflink, or else by a hard link. `false` if the file system cannot.
    fn share(&self, file: &dyn DiskFile, path: &Path, replaces: bool) -> bool {
        let cloned = self.make(path, |new| {
            new.clone_contents(file)?;
            new.sync_data()
        });
        if cloned.is_ok() {
            return true;
        }
        let linked = if replaces {
            // The caller holds the lock of the directory, so no other process uses the name.
            let temporary = path.with_extension("tmp");
            let _ = self.to.remove_file(&temporary);
            self.to.link(file, &temporary).and_then(|()| self.to.rename(&temporary, path))
        } else {
            self.to.link(file, path)
        };
        linked.is_ok()
    }

    /// Copies the first `bytes` of a file.
    fn copy(&self, file: &dyn DiskFile, bytes: u64, path: &Path) -> Result<()> {
        let copied = self.make(path, |new| {
            let mut buffer = vec![0; CHUNK_BYTES.min(bytes as usize)];
            let (mut at, mut synced) = (0, 0);
            while at < bytes {
                let wanted = buffer.len().min((bytes - at) as usize);
                let chunk = buffer.get_mut(..wanted).unwrap_or_default();
                let read = file.read_at(chunk, at)?;
                if read == 0 {
                    // The file has become shorter. The copy is as long as it.
                    break;
                }
                new.write_at(chunk.get(..read).unwrap_or_default(), at)?;
                at += read as u64;
                if at - synced >= SYNC_BYTES {
                    new.sync_data()?;
                    synced = at;
                }
            }
            new.sync_data()
        });
        copied.map_err(Error::io("copy a segment to", path))
    }

    /// Makes a file with `fill` under a temporary name, and gives it its name.
    fn make(
        &self,
        path: &Path,
        fill: impl FnOnce(&dyn DiskFile) -> std::io::Result<()>,
    ) -> std::io::Result<()> {
        let temporary = Temporary::create(self.to, &path.with_extension(""))?;
        let made = fill(&*temporary.file).and_then(|()| self.to.rename(&temporary.path, path));
        made.inspect_err(|_| {
            // Best effort: the next run, or a writer of the copy, removes it too.
            let _ = self.to.remove_file(&temporary.path);
        })
    }
}
