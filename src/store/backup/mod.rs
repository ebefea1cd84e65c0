//! Backups: a consistent copy of a store, made beside the process that writes it.
//!
//! A backup takes no lock of the store and writes nothing into it. It is itself a store: the backup
//! writes a catalogue of its own, which names the files that were copied. Segments have names that
//! are never used twice, and a sealed segment never changes. So a backup into the same directory
//! copies only new files, and a run that is interrupted leaves the former backup in force: the new
//! catalogue is written last.

mod copy;
mod logstore;
mod prune;
mod record;
mod source;
mod target;

use std::{collections::BTreeSet, path::Path, sync::Arc};

use serde::{Deserialize, Serialize};
use tracing::info;

pub(super) use copy::{Copier, Done, Whole};
pub use record::BackupRecord;

use super::{
    catalogue::{Catalogue, Entry},
    core::Core,
    inspect::{self, VerifyFault, VerifyReport},
};
use crate::{
    Error, ErrorKind, Result, config::LogstoreName, ids::LogstoreId, logstore::LogstoreShared,
    shard::ShardRecord,
};
use logstore::{Copied, CopyLogstore};
use source::{Source, View};
use target::Target;

/// How often a run begins again because a rotation of the service key has ended meanwhile.
const ATTEMPTS: u32 = 4;

/// The options of [`Admin::backup`](crate::Admin::backup).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct BackupOptions {
    /// Whether to copy every byte. By default the backup shares sealed segments with the store
    /// where the file system can: by a reflink, or else by a hard link. That takes no space, and
    /// protects from nothing that happens to the disk.
    pub copy: bool,
    /// Whether to remove from the backup the files that its catalogue no longer names: segments
    /// that retention has dropped, deleted Logstores, and metadata with data keys that were
    /// destroyed since.
    pub prune: bool,
}

impl BackupOptions {
    setters! {
        copy: bool;
        prune: bool;
    }
}

/// The progress of a backup or of a restore.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct CopyProgress {
    /// The bytes of segments that are done, present ones included. A restore copies each byte, and
    /// then verifies it: it counts twice.
    pub bytes: u64,
    /// The bytes of the segments of all Logstores that the run has reached.
    pub bytes_total: u64,
}

/// The result of a backup.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct BackupReport {
    /// When the run began, in microseconds since the Unix epoch. Every record that was durable then
    /// is in the backup.
    pub begun_us: u64,
    /// When the backup was whole, in microseconds since the Unix epoch.
    pub finished_us: u64,
    /// The number of Logstores in the backup.
    pub logstores: u64,
    /// The number of segments in the backup.
    pub segments: u64,
    /// The size of these segments, in bytes.
    pub bytes: u64,
    /// The number of segments that this run copied.
    pub segments_copied: u64,
    /// The bytes that this run copied.
    pub bytes_copied: u64,
    /// The number of segments that this run added and that share the blocks of the disk with the
    /// store.
    pub segments_shared: u64,
    /// The size of these segments, in bytes.
    pub bytes_shared: u64,
    /// The number of files that this run removed from the backup.
    pub files_pruned: u64,
    /// The size of these files, in bytes.
    pub bytes_pruned: u64,
    /// The Logstores whose keys could not be used. Their new segments were verified without keys.
    pub without_keys: Vec<LogstoreName>,
    /// The faults of the store that this run found. The files are in the backup as they are in the
    /// store, unless an earlier run copied them before they were damaged.
    pub faults: Vec<VerifyFault>,
}

impl BackupReport {
    fn add(&mut self, done: &Done) {
        self.segments += 1;
        match *done {
            Done::Present(bytes) => self.bytes += bytes,
            Done::Copied(bytes) => {
                self.bytes += bytes;
                self.segments_copied += 1;
                self.bytes_copied += bytes;
            }
            Done::Shared(bytes) => {
                self.bytes += bytes;
                self.segments_shared += 1;
                self.bytes_shared += bytes;
            }
        }
    }
}

/// A run of a backup.
struct Run<'a> {
    core: &'a Core,
    target: &'a Target,
    options: BackupOptions,
    source: Source<'a>,
    report: BackupReport,
    /// The faults.
    verified: VerifyReport,
    state: CopyProgress,
    progress: &'a mut dyn FnMut(CopyProgress),
}

/// Makes a backup of a store in the directory `dir`, or brings the backup there up to date.
pub(super) fn backup(
    core: &Core,
    dir: &Path,
    options: &BackupOptions,
    progress: &mut dyn FnMut(CopyProgress),
) -> Result<BackupReport> {
    core.keys.check_process()?;
    core.keys.admit_service_key()?;
    let begun_us = core.env.clock.wall_us();
    let target = Target::open(core, dir)?;
    let mut attempts = 0;
    loop {
        let accepts = core.keys.keyring().accepts();
        let mut run = Run {
            core,
            target: &target,
            options: *options,
            source: Source::new(core)?,
            report: BackupReport { begun_us, ..BackupReport::default() },
            verified: VerifyReport::default(),
            state: CopyProgress::default(),
            progress,
        };
        target.check_not_newer(run.source.catalogue())?;
        let (views, kept) = run.look()?;
        target.check_continues(core, &views)?;
        target.begin(core, begun_us)?;
        let copied = run.copy(views, kept)?;
        core.keys.follow_keyring()?;
        attempts += 1;
        // The documents that were read first are under a version that is retired by now.
        if core.keys.keyring().accepts() == accepts || attempts == ATTEMPTS {
            return run.finish(copied);
        }
    }
}

impl Run<'_> {
    /// Looks at all Logstores. Returns also those that cannot be read, as the former backup has them.
    fn look(&mut self) -> Result<(Vec<View>, Vec<Copied>)> {
        let names: Vec<_> = self.source.catalogue().logstores.keys().cloned().collect();
        let (mut views, mut kept) = (Vec::new(), Vec::new());
        for name in names {
            match self.source.view(&name) {
                Ok(view) => views.extend(view),
                // The other Logstores are copied all the same.
                Err(error) if error.kind() == ErrorKind::Integrity => {
                    self.verified.note(Some(&name), error)?;
                    kept.extend(self.former(&name));
                }
                Err(error) => return Err(error),
            }
        }
        Ok((views, kept))
    }

    /// Copies the metadata of all Logstores, and then their segments.
    fn copy(&mut self, views: Vec<View>, mut all: Vec<Copied>) -> Result<Vec<Copied>> {
        self.put_metadata(&views)?;
        for view in views {
            all.extend(CopyLogstore::new(self, view).run()?);
        }
        Ok(all)
    }

    /// Writes metadata into the backup and puts it in force in the former backup. New segments may
    /// be under data keys that only the new metadata has, so it comes first: if this run is
    /// interrupted, a reader of the former backup can read them too.
    fn put_metadata(&mut self, views: &[View]) -> Result<()> {
        for view in views {
            let dir = self.target.make_logstore_dir(view.entry.id)?;
            let (file, bytes) = &view.meta_file;
            self.target.put_twice(&dir.join(file), bytes)?;
        }
        let Some(former) = self.target.former() else { return Ok(()) };
        let mut catalogue = former.catalogue.clone();
        for View { name, entry, .. } in views {
            if let Some(former) = catalogue.logstores.get_mut(name).filter(|it| it.id == entry.id) {
                (former.generation, former.tag) = (entry.generation, entry.tag);
            }
        }
        if catalogue == former.catalogue {
            return Ok(());
        }
        self.target.put_catalogue(self.core, &catalogue, self.source.epoch())
    }

    /// The Logstore as the former backup has it.
    fn former(&self, name: &LogstoreName) -> Option<Copied> {
        let id = self.source.catalogue().logstores.get(name)?.id;
        let former = self.target.former()?.catalogue.logstores.get(name)?;
        (former.id == id).then(|| Copied::as_it_was(name.clone(), former.clone()))
    }

    /// Writes the documents of the backup, and then the catalogue. The checkpoint comes behind it: the
    /// former backup does not reach a newer checkpoint.
    fn finish(mut self, copied: Vec<Copied>) -> Result<BackupReport> {
        self.source.reload()?;
        let (catalogue, checkpoint) = self.compose(copied)?;
        let checkpoint = inspect::checkpoint_of(self.core, &checkpoint)?;
        self.target.put_documents(self.core, &catalogue, &mut self.verified)?;
        let epoch = self.source.epoch();
        self.target.put_catalogue(self.core, &catalogue, epoch)?;
        self.target.put_checkpoint(&checkpoint)?;
        if self.options.prune {
            self.prune(catalogue, epoch)?;
        }
        self.report.finished_us = self.core.env.clock.wall_us();
        self.report.faults = std::mem::take(&mut self.verified.faults);
        let refused = std::mem::take(&mut self.verified.refused);
        self.report.without_keys = refused.into_iter().map(|(name, _)| name).collect();
        self.target.note(&BackupRecord::of(self.core, &self.report))?;
        let (store, report) = (self.core.env.id, &self.report);
        let (segments, copied) = (report.segments, report.bytes_copied);
        info!(%store, dir = %self.target.dir().display(), segments, copied, "backup finished");
        Ok(self.report)
    }

    /// The catalogue of the backup, and the one with the heads that the store vouches for. A Logstore
    /// that was deleted meanwhile is left out.
    fn compose(&mut self, copied: Vec<Copied>) -> Result<(Catalogue, Catalogue)> {
        let now = self.source.catalogue();
        let catalogue =
            Catalogue { logstores: Default::default(), deleting: Vec::new(), ..now.clone() };
        let (mut catalogue, mut recorded) = (catalogue.clone(), catalogue);
        for one in copied {
            let Some(entry) = now.logstores.get(&one.name).filter(|now| now.id == one.entry.id)
            else {
                continue;
            };
            let (reached, known) = one.settle(entry);
            catalogue.logstores.insert(one.name.clone(), reached);
            recorded.logstores.insert(one.name, known);
        }
        let present = self.target.logstores()?;
        let named: BTreeSet<LogstoreId> =
            catalogue.logstores.values().map(|entry| entry.id).collect();
        catalogue.deleting = present.difference(&named).copied().collect();
        self.report.logstores = catalogue.logstores.len() as u64;
        Ok((catalogue, recorded))
    }

    fn advance(&mut self, bytes: u64) {
        self.state.bytes += bytes;
        (self.progress)(self.state);
    }
}

/// The entry of a Logstore with other records of its shards.
fn with_shards(entry: &Entry, shards: Vec<ShardRecord>) -> Entry {
    Entry { shards, ..entry.clone() }
}

/// Whether the keys of a Logstore can be used now. May call the KMS.
fn check_keys(logstore: &Arc<LogstoreShared>) -> Result<()> {
    logstore.gate.admit()?;
    logstore.gate.prove()
}

/// The error of a directory that takes no backup of the store.
fn refused(dir: &Path, why: &'static str) -> Error {
    Error::BackupRefused { path: dir.to_owned(), why }
}
