//! Removing the files of a Logstore: only names that the format defines. Follows no symlink.

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

/// The entries that a deletion could not remove.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct DeleteReport {
    /// The remaining entries under the directory of the Logstore: names that envelog did not give,
    /// entries of the wrong type, and files that could not be removed. The Logstore is deleted all
    /// the same. Each opening and each run of retention tries the removal again.
    #[serde(serialize_with = "crate::error::paths_as_text")]
    pub left: Vec<PathBuf>,
}

/// Removes the directory of a Logstore, its envelopes first. Reports the remaining entries.
///
/// # Errors
/// [`Error::Io`] when the directory cannot be listed or synced.
pub(super) fn remove_logstore(disk: &dyn Disk, dir: &Path) -> Result<DeleteReport> {
    let mut removal = Removal { disk, report: DeleteReport::default() };
    match disk.stat(dir).map_err(Error::io("look for", dir))? {
        Some(stat) if stat.kind == FileKind::Directory => removal.directory(dir)?,
        Some(stat) => removal.leave(dir, &format!("it is a {}", stat.kind)),
        None => {}
    }
    let parent = dir.parent().unwrap_or(Path::new("."));
    // Syncs the parent even if the directory is gone, because the removal of its name may not be
    // durable.
    disk.sync_dir(parent).map_err(Error::io("sync", parent))?;
    Ok(removal.report)
}

/// Refuses to delete a Logstore if an entry in its directory has a name of envelog and another
/// type.
///
/// # Errors
/// [`Error::WrongFileType`], [`Error::Io`].
pub(super) fn check_types(disk: &dyn Disk, dir: &Path, meta: &Path) -> Result<()> {
    let check = |path: &Path, expected: FileKind, found: FileKind| {
        if found == expected {
            return Ok(());
        }
        Err(Error::io("look for", path)(
            WrongFileType { path: path.to_owned(), expected, found }.into(),
        ))
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
        // The envelopes are removed first, so that an interrupted deletion leaves no readable data.
        for entry in entries.iter().filter(|entry| MetaName::is_file_or_temporary(&entry.name)) {
            self.file(&dir.join(&entry.name), entry.kind);
        }
        disk.sync_dir(dir).map_err(Error::io("sync", dir))?;
        let shards = |entry: &&crate::io::DirEntry| {
            entry.kind == FileKind::Directory && is_shard_dir(&entry.name)
        };
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
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                self.leave(path, &error.to_string())
            }
            _ => {}
        }
    }

    /// Removes a directory if it is empty.
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
        warn!(path = %path.display(), why, "entry of a deleted Logstore not removed; will retry");
        self.report.left.push(path.to_owned());
    }
}
