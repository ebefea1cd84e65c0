//! Removes from a backup the files that its catalogue no longer names.

use std::path::Path;

use super::Run;
use crate::{
    Error, Result,
    io::{self, DirEntry, FileKind},
    logstore::{MetaName, shard_dir},
    segment::SegmentName,
    shard::is_segment_temporary,
    store::{
        catalogue::{Catalogue, Entry},
        removal::remove_logstore,
    },
};

impl Run<'_> {
    /// Removes older metadata, dropped segments, and deleted Logstores. The catalogue of the backup
    /// is in force.
    pub(super) fn prune(&mut self, mut catalogue: Catalogue, epoch: u64) -> Result<()> {
        for entry in catalogue.logstores.values() {
            self.prune_logstore(entry)?;
        }
        let deleted = std::mem::take(&mut catalogue.deleting);
        if deleted.is_empty() {
            return Ok(());
        }
        for id in deleted {
            let dir = self.target.logstore_dir(id);
            let (files, bytes) = self.measure(&dir)?;
            let report = remove_logstore(self.target.disk(), &dir)?;
            if report.left.is_empty() {
                self.report.files_pruned += files;
                self.report.bytes_pruned += bytes;
            } else {
                catalogue.deleting.push(id);
            }
        }
        self.target.put_catalogue(self.core, &catalogue, epoch)
    }

    fn prune_logstore(&mut self, entry: &Entry) -> Result<()> {
        let dir = self.target.logstore_dir(entry.id);
        let current = entry.meta().path(&dir);
        self.remove_files(&dir, |name| {
            MetaName::is_file_or_temporary(name) && dir.join(io::original_name(name)) != current
        })?;
        for (shard, record) in (0..).zip(&entry.shards) {
            self.remove_files(&shard_dir(&dir, shard), |name| {
                let segment = SegmentName::parse(name);
                segment.is_some_and(|segment| segment.ordinal < record.first_ordinal)
                    || is_segment_temporary(name)
            })?;
        }
        Ok(())
    }

    fn remove_files(&mut self, dir: &Path, is_old: impl Fn(&str) -> bool) -> Result<()> {
        let disk = self.target.disk();
        let mut removed = false;
        for DirEntry { name, kind } in disk.list_dir(dir).map_err(Error::io("list", dir))? {
            if kind != FileKind::File || !is_old(&name) {
                continue;
            }
            let path = dir.join(name);
            let stat = disk.stat(&path).map_err(Error::io("look for", &path))?;
            disk.remove_file(&path).map_err(Error::io("remove", &path))?;
            removed = true;
            self.report.files_pruned += 1;
            self.report.bytes_pruned += stat.map_or(0, |stat| stat.len);
        }
        if removed { self.target.sync_dir(dir) } else { Ok(()) }
    }

    /// The number and the bytes of the files in the directory of a Logstore.
    fn measure(&self, dir: &Path) -> Result<(u64, u64)> {
        let disk = self.target.disk();
        let (mut files, mut bytes) = (0, 0);
        let mut dirs = vec![dir.to_owned()];
        while let Some(dir) = dirs.pop() {
            for entry in disk.list_dir(&dir).map_err(Error::io("list", &dir))? {
                let path = dir.join(&entry.name);
                if entry.kind == FileKind::Directory {
                    dirs.push(path);
                    continue;
                }
                let stat = disk.stat(&path).map_err(Error::io("look for", &path))?;
                files += 1;
                bytes += stat.map_or(0, |stat| stat.len);
            }
        }
        Ok((files, bytes))
    }
}
