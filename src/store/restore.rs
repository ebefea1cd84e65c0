//! Restores a store from a backup.
//!
//! The restored store continues where the backup ends, and its writers must not repeat a number that
//! the lost store has given out since. So each shard skips sequence numbers, and the writer epoch
//! skips openings, by more than a store uses up between two backups.

use std::{path::Path, sync::Arc};

use serde::{Deserialize, Serialize};
use tracing::info;

use super::{
    assembly::Setup,
    backup::{Copier, CopyProgress, Done, Whole},
    catalogue::{self, Catalogue, Entry, load_newest},
    core::Core,
    creation::{create_missing_directories, make_directory},
    identity::copy_identity,
    inspect::{self, VerifyFault, VerifyOptions, VerifyReport},
    lock::StoreLock,
    opening,
};
use crate::{
    Error, ErrorKind, Result,
    config::LogstoreName,
    document::DOCUMENT_BYTES_MAX,
    epoch::EPOCH_MAX,
    io::{self, Disk, Existing, FileKind},
    keys::{
        AuditEvent,
        audit::{AuditHead, is_audit_file},
        envelope::KeysSection,
    },
    logstore::{Meta, shard_dir},
    shard::{CopySource, Extent, Head, Loss, SegmentRef, Shard, ShardRecord},
};

/// How many sequence numbers each shard skips. A store that ends uncleanly uses up 2^32 of them, so
/// this covers 65,535 crashes since the backup.
pub(super) const RESTORE_SEQS: u64 = 1 << 48;
/// How many epochs the store skips. Each opening for writing uses up one.
const RESTORE_EPOCHS: u64 = 1 << 24;
/// The longest file of the key audit log, in bytes.
const AUDIT_BYTES_MAX: u64 = 65 << 20;

/// The options of [`StoreBuilder::restore`](crate::StoreBuilder::restore).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct RestoreOptions {
    /// Leaves out the records that were received after this time, in microseconds since the Unix
    /// epoch. Each shard ends in front of its first block that has such a record. So records that were
    /// received by then are left out too if they are in that block, because they waited for the same
    /// write, or behind it, because the clock was set back. Configurations and keys are those of the
    /// backup.
    pub until_us: Option<u64>,
    /// Whether to copy every byte. By default the store shares sealed segments with the backup where
    /// the file system can.
    pub copy: bool,
}

impl RestoreOptions {
    setters! {
        until_us: u64, optional;
        copy: bool;
    }
}

/// The result of a restore.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct RestoreReport {
    /// The number of Logstores.
    pub logstores: u64,
    /// The number of segments.
    pub segments: u64,
    /// The size of the segments, in bytes.
    pub bytes: u64,
    /// The bytes that were copied. The others are shared with the backup.
    pub bytes_copied: u64,
    /// The number of shards that end earlier than in the backup, because of
    /// [`RestoreOptions::until_us`].
    pub shards_cut: u64,
    /// The Logstores whose keys could not be used. They were verified without keys.
    pub without_keys: Vec<LogstoreName>,
    /// The faults: Logstores that were left out because their metadata cannot be read, and what the
    /// verification of the restored store has found.
    pub faults: Vec<VerifyFault>,
}

impl RestoreReport {
    fn add(&mut self, done: Done) {
        self.segments += 1;
        self.bytes += done.bytes();
        if let Done::Copied(bytes) = done {
            self.bytes_copied += bytes;
        }
    }
}

/// A restore under way.
struct Restore<'a> {
    /// The backup, open for reading.
    core: &'a Core,
    disk: Arc<dyn Disk>,
    dir: &'a Path,
    options: RestoreOptions,
    report: RestoreReport,
    faults: VerifyReport,
    state: CopyProgress,
    progress: &'a mut dyn FnMut(CopyProgress),
}

/// Restores the backup in `from` to the directory of the store, which is empty or absent.
pub(super) fn restore(
    setup: Setup,
    from: &Path,
    options: &RestoreOptions,
    progress: &mut dyn FnMut(CopyProgress),
) -> Result<RestoreReport> {
    let outside = Arc::clone(&setup.outside);
    let of_backup = Setup { dir: from.to_owned(), anchor: None, ..setup.clone() };
    let backup = opening::open_read_only(of_backup)?;
    make_empty(&setup, &*outside, from)?;
    // A keyring inside the store is refused before anything is copied.
    setup.keyring_file(&*outside)?;
    let restored = Setup { anchor: None, ..setup.clone() };
    let setup = setup.rooted()?;
    setup.check_file_system()?;
    let lock = StoreLock::take_or_create(&*setup.disk, &setup.dir)?;
    let restore = Restore {
        core: backup.core(),
        disk: Arc::clone(&setup.disk),
        dir: &setup.dir,
        options: *options,
        report: RestoreReport::default(),
        faults: VerifyReport::default(),
        state: CopyProgress::default(),
        progress: &mut *progress,
    };
    let mut report = restore.run(&setup)?;
    let resolved = outside.resolve(&setup.dir).map_err(Error::io("find", &setup.dir))?;
    io::sync_parent(&*outside, &resolved)
        .map_err(Error::io("sync the directory of", &setup.dir))?;
    verify(restored, &mut report, progress)?;
    lock.release();
    info!(dir = %setup.dir.display(), from = %from.display(), segments = report.segments, "store restored");
    Ok(report)
}

/// Makes the directory of the store, or checks that it is empty.
fn make_empty(setup: &Setup, outside: &dyn Disk, from: &Path) -> Result<()> {
    let dir = &setup.dir;
    let find = |path: &Path| outside.resolve(path).map_err(Error::io("find", path));
    let (to, backup) = (find(dir)?, find(from)?);
    if to.starts_with(&backup) || backup.starts_with(&to) {
        let what = format!("{} and {} lie within each other", dir.display(), from.display());
        return Err(Error::InvalidArgument(what));
    }
    match outside.list_dir(dir) {
        Ok(entries) if entries.is_empty() => Ok(()),
        Ok(_) => Err(Error::NotEmpty { path: dir.clone() }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            make_directory(outside, dir, setup.access())
        }
        Err(error) => Err(Error::io("list", dir)(error)),
    }
}

/// Verifies the restored store, with the keys that can be used.
fn verify(
    setup: Setup,
    report: &mut RestoreReport,
    progress: &mut dyn FnMut(CopyProgress),
) -> Result<()> {
    let store = opening::open_read_only(setup)?;
    let copied = report.bytes;
    let verified = inspect::verify(store.core(), &VerifyOptions::default(), &mut |at| {
        progress(CopyProgress { bytes: copied + at.bytes, bytes_total: copied + at.bytes_total });
    })?;
    report.faults.extend(verified.faults);
    report.without_keys = verified.refused.into_iter().map(|(name, _)| name).collect();
    Ok(())
}

impl Restore<'_> {
    /// Copies everything. The file `STORE` comes last: without it, the directory is no store.
    fn run(mut self, setup: &Setup) -> Result<RestoreReport> {
        let Core { env, keys, registry } = self.core;
        create_missing_directories(&*self.disk, self.dir)?;
        self.sync_dir(self.dir)?;
        let found =
            keys.with_keyring(|keyring| load_newest(&*env.disk, &env.dir, env.id, keyring))?;
        let mut logstores = std::collections::BTreeMap::new();
        for (name, entry) in &found.catalogue.logstores {
            match registry.load_meta(name, entry) {
                Ok(meta) => {
                    logstores.insert(name.clone(), self.logstore(name, entry, meta)?);
                }
                // The other Logstores are restored all the same.
                Err(error) if error.kind() == ErrorKind::Integrity => {
                    self.faults.note(Some(name), error)?;
                }
                Err(error) => return Err(error),
            }
        }
        self.report.logstores = logstores.len() as u64;
        let audit = self.audit_log(&found.catalogue.audit)?;
        if !setup.accept_retired {
            self.probes()?;
        }
        let (deleting, generation) = (Vec::new(), found.catalogue.generation + 1);
        let catalogue =
            Catalogue { generation, audit, logstores, deleting, ..found.catalogue.clone() };
        let epoch = found.place.epoch.saturating_add(RESTORE_EPOCHS);
        if epoch >= EPOCH_MAX {
            return Err(Error::TooMany { what: "openings of the store", limit: EPOCH_MAX });
        }
        let keyring = keys.keyring();
        catalogue::write_copy(&*self.disk, self.dir, env.id, &keyring, &catalogue, epoch)?;
        copy_identity(&*env.disk, &env.dir, &*self.disk, self.dir, &keyring)?;
        self.report.faults = self.faults.faults;
        Ok(self.report)
    }

    fn logstore(&mut self, name: &LogstoreName, entry: &Entry, mut meta: Meta) -> Result<Entry> {
        let Core { env, keys, registry } = self.core;
        let logstore = registry.logstore(name)?;
        let (from, to) = (env.logstore_dir(entry.id), self.in_store(&env.logstore_dir(entry.id)));
        self.make_dir(&to)?;
        let shards = registry.shards_in(&logstore, &meta, &env.disk, &from, &entry.shards);
        let mut listed = Vec::new();
        for shard in &shards {
            let segments = shard.segments(false)?;
            for segment in segments.iter() {
                let stat = env.disk.stat(&segment.path);
                let stat = stat.map_err(Error::io("look for", &*segment.path))?;
                self.state.bytes_total += stat.map_or(0, |stat| stat.len);
            }
            listed.push(segments);
        }
        let mut records = Vec::new();
        for (shard, segments) in shards.iter().zip(&listed) {
            let dir = shard_dir(&to, shard.id());
            self.make_dir(&dir)?;
            let cut = self.segments(name, shard, segments, &dir)?;
            self.sync_dir(&dir)?;
            records.push(self.record(shard, segments, cut, meta.keys.as_ref())?);
        }
        // Under the newest version of the service key.
        meta.generation += 1;
        meta.save(&*self.disk, &to, env.id, entry.id, &keys.keyring(), None)?;
        let (generation, tag) = (meta.generation, meta.tag);
        Ok(Entry { id: entry.id, generation, tag, shards: records })
    }

    /// Copies the segments of a shard. Returns the head where the shard is cut, if it is.
    fn segments(
        &mut self,
        name: &LogstoreName,
        shard: &Shard,
        segments: &[SegmentRef],
        dir: &Path,
    ) -> Result<Option<Head>> {
        let whole = if self.options.copy { Whole::Copied } else { Whole::Shared };
        for segment in segments {
            // The verification reports it.
            if segment.is_missing() {
                continue;
            }
            let source = match shard.copy_source(segment) {
                Err(error) if error.kind() == ErrorKind::Integrity => {
                    if !shard.is_lost(segment.ordinal) {
                        self.faults.note(Some(name), error)?;
                    }
                    continue;
                }
                source => source?,
            };
            let cut = match self.options.until_us {
                Some(until_us) => shard.cut_before(segment, until_us)?,
                None => None,
            };
            let source = match &cut {
                Some(cut) => CopySource { extent: Extent::Front(cut.bytes), ..source },
                None => source,
            };
            let path =
                segment.path.file_name().map_or_else(|| dir.to_owned(), |name| dir.join(name));
            let done = Copier { to: &*self.disk, whole }.segment(&source, &path, || Ok(true))?;
            self.report.add(done);
            self.state.bytes += done.bytes();
            (self.progress)(self.state);
            if let Some(cut) = cut {
                self.report.shards_cut += 1;
                return Ok(Some(cut.head));
            }
        }
        Ok(None)
    }

    /// The record of a restored shard, which skips sequence numbers.
    fn record(
        &self,
        shard: &Shard,
        segments: &[SegmentRef],
        cut: Option<Head>,
        keys: Option<&KeysSection>,
    ) -> Result<ShardRecord> {
        let mut record = shard.record();
        let floor = first_seq_behind(&record, segments)?;
        if let Some(head) = cut {
            let head = Head { next_seq: floor, ..head };
            record.losses.retain(|loss| loss.last < head.ordinal);
            if let Some(loss) = self.given_up(shard.id(), head.ordinal, keys) {
                let (from_seq, before) = (head.end_seq, Some(head.clone()));
                record.losses.push(Loss { from_seq, end_seq: floor, before, ..loss });
            }
            record.head = Some(head);
            return Ok(record);
        }
        match (&mut record.head, segments.last().filter(|last| !last.is_missing())) {
            (Some(head), _) => head.next_seq = floor,
            // The backup could not use the key, and the store had recorded nothing.
            (head @ None, Some(last)) => match shard.head_of_front(last) {
                Ok(front) => *head = Some(Head { next_seq: floor, ..front }),
                // The verification reports it. No number of the lost store may be repeated.
                Err(error) if error.kind() == ErrorKind::Integrity => {
                    record.losses.push(self.loss_of(last, floor));
                }
                Err(error) => return Err(error),
            },
            (None, None) => record.first_seq = floor,
        }
        if let Some(last) = segments.last()
            && let Some(loss) = self.given_up(shard.id(), last.last_ordinal(), keys)
        {
            let head = record.head.clone().filter(|head| head.ordinal == last.ordinal);
            let before = head.or_else(|| shard.head_of_copy().ok().flatten());
            let from_seq = before.as_ref().map_or(last.first_seq, |head| head.end_seq);
            record.losses.push(Loss { from_seq, end_seq: floor, before, ..loss });
        }
        Ok(record)
    }

    /// The loss of the last segment of a shard, which cannot be read, and of which nothing is recorded.
    fn loss_of(&self, last: &SegmentRef, end_seq: u64) -> Loss {
        Loss {
            first: last.ordinal,
            last: last.ordinal,
            from_seq: last.first_seq.min(end_seq),
            end_seq,
            tampered: false,
            before: None,
            accepted_us: self.core.env.clock.wall_us(),
        }
    }

    /// The segments behind the last one that is restored, up to those that the current data key owns.
    /// They are given up as lost: otherwise the next segment would be under the current key in the
    /// place of one under an older key.
    fn given_up(&self, shard: u32, last: u64, keys: Option<&KeysSection>) -> Option<Loss> {
        let owned = *keys?.versions.last()?.ordinals.get(shard as usize)?;
        let accepted_us = self.core.env.clock.wall_us();
        let loss = Loss {
            first: last + 1,
            last: owned - 1,
            from_seq: 0,
            end_seq: 0,
            tampered: false,
            before: None,
            accepted_us,
        };
        (owned > last + 1).then_some(loss)
    }

    /// Copies the key audit log, and records the restore in it. Returns its end.
    fn audit_log(&self, known: &AuditHead) -> Result<AuditHead> {
        let Core { env, keys, .. } = self.core;
        let dir = env.dir.join("audit");
        let entries = match env.disk.list_dir(&dir) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            entries => entries.map_err(Error::io("list", &dir))?,
        };
        for entry in entries.iter().filter(|entry| is_audit_file(&entry.name)) {
            if entry.kind == FileKind::File {
                self.copy_file(&dir.join(&entry.name), AUDIT_BYTES_MAX)?;
            }
        }
        let log = keys.audit_log_in(&self.disk, self.in_store(&dir));
        log.find_end(known)?;
        let until = match self.options.until_us {
            Some(until_us) => format!(", without records received after {until_us} us since 1970"),
            None => String::new(),
        };
        let user = rustix::process::getuid().as_raw();
        let detail = format!("from the backup {}{until}, by user {user}", env.dir.display());
        log.record(AuditEvent::Restored, None, detail)?;
        Ok(log.head_after(known))
    }

    fn probes(&self) -> Result<()> {
        self.core
            .keys
            .probe_paths()?
            .iter()
            .try_for_each(|path| self.copy_file(path, DOCUMENT_BYTES_MAX))
    }

    fn copy_file(&self, path: &Path, limit: u64) -> Result<()> {
        let bytes =
            io::read_file(&*self.core.env.disk, path, limit).map_err(Error::io("read", path))?;
        let to = self.in_store(path);
        io::write_file(&*self.disk, &to, &bytes, Existing::Keep).map_err(Error::io("write", to))
    }

    /// The place of a file of the backup in the store.
    fn in_store(&self, path: &Path) -> std::path::PathBuf {
        self.dir.join(path.strip_prefix(&self.core.env.dir).unwrap_or(path))
    }

    fn make_dir(&self, dir: &Path) -> Result<()> {
        self.disk.create_dir(dir).map_err(Error::io("create", dir))?;
        self.sync_dir(dir.parent().unwrap_or(dir))
    }

    fn sync_dir(&self, dir: &Path) -> Result<()> {
        self.disk.sync_dir(dir).map_err(Error::io("sync", dir))
    }
}

/// The first sequence number that the lost store has certainly not given out.
fn first_seq_behind(record: &ShardRecord, segments: &[SegmentRef]) -> Result<u64> {
    let reserved = segments.last().map_or(0, |last| last.limit_seq());
    let head = record.head.as_ref().map_or(0, |head| head.next_seq);
    let lost = record.losses.last().map_or(0, |loss| loss.end_seq);
    let used_up = || Error::TooMany { what: "sequence numbers", limit: u64::MAX };
    let begun = record.first_seq.max(reserved).max(head).max(lost);
    begun.checked_add(RESTORE_SEQS).ok_or_else(used_up)
}
