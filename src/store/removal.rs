//! Removing a Logstore's files: the names that the format defines, and nothing else. No symlink is followed.

use std::path::{Path, PathBuf};

use serde::Serialize;
use tracing::warn;

use crate::{
    Error, Result,
    io::{Disk, FileKind, WrongFileType},
    logstore::{MetaName, is_shard_dir},
    segment::SegmentName,
    shard::is_segment_temporary,
};

/// What a deletion could not remove.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct DeleteReport {
    /// Entries under the Logstore's directory that are still there: names that envelog did not give, entries of the wrong type, and
    /// files that the system did not let go. The Logstore is gone all the same. Its removal is tried again at each opening and
    /// with each run of retention.
    #[serde(serialize_with = "crate::error::paths_as_text")]
    pub left: Vec<PathBuf>,
}

/// Removes a Logstore's directory, its envelopes first. Says what is left.
///
/// # Errors
/// [`Error::Io`] when the directory cannot be looked at or synced.
pub(super) fn remove_logstore(disk: &dyn Disk, dir: &Path) -> Result<DeleteReport> {
    let mut removal = Removal { disk, report: DeleteReport::default() };
    match disk.stat(dir).map_err(Error::io("look for", dir))? {
        Some(stat) if stat.kind == FileKind::Directory => removal.directory(dir)?,
        Some(stat) => removal.leave(dir, &format!("it is a {}", stat.kind)),
        None => {}
    }
    let parent = dir.parent().unwrap_or(Path::new("."));
    // Syncs the parent also when the directory is gone, because the removal of its name may not be durable.
    disk.sync_dir(parent).map_err(Error::io("sync", parent))?;
    Ok(removal.report)
}

/// Refuses to delete a Logstore in whose directory something stands where a file or directory of ours belongs.
///
/// # Errors
/// [`Error::WrongFileType`], [`Error::Io`].
pub(super) fn check_types(disk: &dyn Disk, dir: &Path, meta: &Path) -> Result<()> {
    let check = |path: &Path, expected: FileKind, found: FileKind| {
        if found == expected {
            return Ok(());
        }
        Err(Error::io("look for", path)(WrongFileType { path: path.to_owned(), expected, found }.into()))
    };
    let stat = disk.stat(dir).map_err(Error::io("look for", dir))?;
    let Some(stat) = stat else { return Ok(()) };
    check(dir, FileKind::Directory, stat.kind)?;
    for entry in disk.list_dir(dir).map_err(Error::io("list", dir))? {
        let path = dir.join(&entry.name);
        if path == meta {
            check(&path, FileKind::File, entry.kind)?;
        } else if is_shard_dir(&entry.name) {
            check(&path, FileKind::Directory, entry.kind)?;
            for file in disk.list_dir(&path).map_err(Error::io("list", &path))? {
                if SegmentName::parse(&file.name).is_some() {
                    check(&path.join(&file.name), FileKind::File, file.kind)?;
                }
            }
        }
    }
    Ok(())
}

struct Removal<'a> {
    disk: &'a dyn Disk,
    report: DeleteReport,
}

impl Removal<'_> {
    fn directory(&mut self, dir: &Path) -> Result<()> {
        let disk = self.disk;
        let list = |dir: &Path| disk.list_dir(dir).map_err(Error::io("list", dir));
        let entries = list(dir)?;
        // The envelopes go first, so that a deletion that ends here leaves nothing that can be read.
        for entry in entries.iter().filter(|entry| MetaName::is_file_or_temporary(&entry.name)) {
            self.file(&dir.join(&entry.name), entry.kind);
        }
        disk.sync_dir(dir).map_err(Error::io("sync", dir))?;
        let shards = |entry: &&crate::io::DirEntry| entry.kind == FileKind::Directory && is_shard_dir(&entry.name);
        for shard in entries.iter().filter(shards) {
            let path = dir.join(&shard.name);
            for file in list(&path)? {
                if SegmentName::parse(&file.name).is_some() || is_segment_temporary(&file.name) {
                    self.file(&path.join(&file.name), file.kind);
                }
            }
            self.empty(&path)?;
        }
        self.empty(dir)
    }

    fn file(&mut self, path: &Path, kind: FileKind) {
        if kind == FileKind::Directory {
            return self.leave(path, "it is a directory");
        }
        match self.disk.remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => self.leave(path, &error.to_string()),
            _ => {}
        }
    }

    /// Removes a directory if nothing is left in it.
    fn empty(&mut self, dir: &Path) -> Result<()> {
        let left = self.disk.list_dir(dir).map_err(Error::io("list", dir))?;
        for entry in &left {
            let path = dir.join(&entry.name);
            if !self.report.left.iter().any(|left| left.starts_with(&path)) {
                self.leave(&path, "it is no file of this Logstore");
            }
        }
        if left.is_empty()
            && let Err(error) = self.disk.remove_dir(dir)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            self.leave(dir, &error.to_string());
        }
        Ok(())
    }

    fn leave(&mut self, path: &Path, why: &str) {
        warn!(path = %path.display(), why, "an entry of a deleted Logstore is left; its removal is tried again later");
        self.report.left.push(path.to_owned());
    }
}
