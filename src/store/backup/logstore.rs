//! The copy of one Logstore.

use std::{collections::BTreeSet, sync::Arc};

use super::{
    Run, check_keys,
    copy::{Copier, Whole},
    source::View,
    with_shards,
};
use crate::{
    Error, ErrorKind, Result,
    config::LogstoreName,
    logstore::shard_dir,
    shard::{Head, SegmentRef, Shard, ShardRecord},
    store::{
        catalogue::Entry,
        inspect::{VerifyReport, verify_copy},
    },
};

/// How often a shard is copied again, all of whose segments retention has dropped meanwhile.
const ATTEMPTS: u32 = 16;

/// The copy of a Logstore.
pub(super) struct Copied {
    pub(super) name: LogstoreName,
    /// As the catalogue had it when the segments were listed.
    pub(super) entry: Entry,
    shards: Vec<CopiedShard>,
}

/// The copy of a shard, and the segments in it that this run has made.
type Fresh = (CopiedShard, BTreeSet<u64>);

/// The copy of a shard.
struct CopiedShard {
    /// The first segment that was copied, and the first sequence number in it, if retention has
    /// dropped others meanwhile.
    first: Option<(u64, u64)>,
    /// The last segment that was copied.
    last: Option<u64>,
    /// The head behind the copied blocks, if they were authenticated.
    head: Option<Head>,
}

impl Copied {
    /// A Logstore that the former backup has, and that cannot be read in the store.
    pub(super) fn as_it_was(name: LogstoreName, entry: Entry) -> Self {
        let unchanged = |_| CopiedShard { first: None, last: None, head: None };
        let shards = entry.shards.iter().map(unchanged).collect();
        Self { name, entry, shards }
    }

    /// The entry for the catalogue of the backup, and the one with the heads that the store has
    /// recorded. `now` is the entry that the store has at the end.
    pub(super) fn settle(&self, now: &Entry) -> (Entry, Entry) {
        let shards = || self.entry.shards.iter().zip(&self.shards).zip(&now.shards);
        let known: Vec<_> =
            shards().map(|((record, copied), now)| copied.settle(record, now)).collect();
        let reached = known.iter().zip(&self.shards).map(|(record, copied)| {
            let head =
                [&record.head, &copied.head].into_iter().flatten().max_by_key(|head| head.reach());
            ShardRecord { head: head.cloned(), ..record.clone() }
        });
        (with_shards(&self.entry, reached.collect()), with_shards(&self.entry, known.clone()))
    }
}

impl CopiedShard {
    /// The record of the shard without the segments that retention has dropped, as far as others
    /// were copied.
    fn settle(&self, record: &ShardRecord, now: &ShardRecord) -> ShardRecord {
        let dropped = (now.first_ordinal, now.first_seq);
        let first = match self.last {
            Some(last) if dropped.0 <= last && dropped.0 > record.first_ordinal => Some(dropped),
            _ => self.first,
        };
        let (first_ordinal, first_seq) = first.unwrap_or((record.first_ordinal, record.first_seq));
        let mut settled = ShardRecord { first_ordinal, first_seq, ..record.clone() };
        settled.forget_dropped_losses();
        settled
    }
}

/// Copies one Logstore.
pub(super) struct CopyLogstore<'r, 'a> {
    run: &'r mut Run<'a>,
    name: LogstoreName,
    view: View,
}

impl<'r, 'a> CopyLogstore<'r, 'a> {
    pub(super) fn new(run: &'r mut Run<'a>, view: View) -> Self {
        Self { run, name: view.name.clone(), view }
    }

    /// Copies the segments and verifies the new ones. `None` if the Logstore was deleted meanwhile.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn run(mut self) -> Result<Option<Copied>> {
        for _ in 0..ATTEMPTS {
            if let Some(fresh) = self.segments()? {
                return self.complete(fresh).map(Some);
            }
            let Some(view) = self.run.source.view(&self.name)? else { return Ok(None) };
            self.run.put_metadata(std::slice::from_ref(&view))?;
            self.view = view;
        }
        Err(Error::Io {
            op: "copy the segments of",
            path: self.run.core.env.logstores_dir(),
            source: Arc::new(std::io::Error::other(format!(
                "retention drops those of {} faster than they are copied",
                self.name
            ))),
        })
    }

    /// Copies the segments. Returns for each shard its copy and the new segments; `None` if
    /// retention has dropped all segments of a shard meanwhile.
    fn segments(&mut self) -> Result<Option<Vec<Fresh>>> {
        self.count()?;
        let dir = self.run.target.logstore_dir(self.view.entry.id);
        let before = self.run.report.clone();
        let mut all = Vec::new();
        for (shard, segments) in self.view.shards.clone() {
            let dir = shard_dir(&dir, shard.id());
            self.run.target.make_dir(&dir)?;
            let mut copied = CopiedShard { first: None, last: None, head: None };
            let (mut fresh, mut dropped) = (BTreeSet::new(), false);
            for segment in segments.iter() {
                match self.segment(&shard, segment)? {
                    Outcome::Copied { is_new } => {
                        if std::mem::take(&mut dropped) {
                            copied.first = Some((segment.ordinal, segment.first_seq));
                        }
                        copied.last = Some(segment.ordinal);
                        if is_new {
                            fresh.insert(segment.ordinal);
                        }
                    }
                    Outcome::Dropped => dropped = true,
                    Outcome::Missing => {}
                }
            }
            self.run.target.sync_dir(&dir)?;
            if dropped {
                self.run.report = before;
                return Ok(None);
            }
            all.push((copied, fresh));
        }
        Ok(Some(all))
    }

    /// Adds the segments to the total of the progress.
    fn count(&mut self) -> Result<()> {
        for segment in self.view.shards.iter().flat_map(|(_, segments)| segments.iter()) {
            let stat = self.run.core.env.disk.stat(&segment.path);
            let stat = stat.map_err(Error::io("look for", &*segment.path))?;
            self.run.state.bytes_total += stat.map_or(0, |stat| stat.len);
        }
        Ok(())
    }

    fn segment(&mut self, shard: &Shard, segment: &SegmentRef) -> Result<Outcome> {
        let source = match segment.is_missing() {
            true => Err(segment.missing()),
            false => shard.copy_source(segment),
        };
        let source = match source {
            Ok(source) => source,
            Err(_) if shard.is_lost(segment.ordinal) => return Ok(Outcome::Missing),
            Err(error) if error.kind() == ErrorKind::Integrity => {
                let (name, entry) = (&self.name, &self.view.entry);
                let last = segment.last_ordinal();
                if self.run.source.is_dropped(name, entry, shard.id(), last)? {
                    return Ok(Outcome::Dropped);
                }
                self.run.verified.note(Some(name), error)?;
                return Ok(Outcome::Missing);
            }
            Err(error) => return Err(error),
        };
        let path = self.run.target.path_of(&self.run.core.env.dir, &segment.path);
        let whole = if self.run.options.copy { Whole::Copied } else { Whole::Shared };
        let copier = Copier { to: self.run.target.disk(), whole };
        // Damage in front of the footer shows only in a verification of the whole segment.
        let mut found = VerifyReport::default();
        let is_sound = || {
            let keyless = check_keys(&self.view.logstore).is_err();
            let wanted = BTreeSet::from([segment.ordinal]);
            verify_copy(&mut found, keyless, &self.name, shard, &wanted)?;
            Ok(found.faults.is_empty())
        };
        let done = copier.segment(&source, &path, is_sound);
        self.run.verified.faults.append(&mut found.faults);
        let done = match done {
            // A directory has the name, so the backup does not have the segment.
            Err(error) if error.kind() == ErrorKind::Integrity => {
                self.run.verified.note(Some(&self.name), error)?;
                return Ok(Outcome::Missing);
            }
            done => done?,
        };
        // The verification of new segments finds the damage of others.
        if let Some(damage) = source.damage
            && done.is_present()
            && !shard.is_lost(segment.ordinal)
        {
            self.run.verified.note(Some(&self.name), damage)?;
        }
        self.run.report.add(&done);
        self.run.advance(done.bytes());
        Ok(Outcome::Copied { is_new: !done.is_present() })
    }

    /// Verifies the new segments, and finds the heads behind them.
    fn complete(self, shards: Vec<Fresh>) -> Result<Copied> {
        let Self { run, name, view } = self;
        let refused = check_keys(&view.logstore).err();
        let keyless = refused.is_some();
        if let Some(error) = refused {
            run.verified.note(Some(&name), error)?;
        }
        let records = view.entry.shards.iter().zip(&shards);
        let records: Vec<_> =
            records.map(|(record, (copied, _))| copied.settle(record, record)).collect();
        let dir = run.target.logstore_dir(view.entry.id);
        let (logstore, disk) = (&view.logstore, run.target.shared_disk());
        let copies = run.core.registry.shards_in(logstore, &view.meta, disk, &dir, &records);
        let mut done = Vec::new();
        for (shard, (mut copied, mut wanted)) in copies.iter().zip(shards) {
            // An earlier run may have verified the last segment without its key, and no successor
            // names its contents.
            wanted.extend(copied.last);
            let mut report = VerifyReport::default();
            verify_copy(&mut report, keyless, &name, shard, &wanted)?;
            let is_sound = report.faults.is_empty() && report.refused.is_empty();
            if is_sound && !keyless && copied.last.is_some() {
                copied.head = match shard.head_of_copy() {
                    // The store has recorded the head before it destroyed the key.
                    Err(Error::Shredded { .. }) => None,
                    // A directory is in the place of the last segment. That fault was noted.
                    Err(Error::WrongFileType { .. }) => None,
                    head => head?,
                };
            }
            run.verified.faults.append(&mut report.faults);
            for (name, error) in report.refused {
                run.verified.note(Some(&name), error)?;
            }
            done.push(copied);
        }
        Ok(Copied { name, entry: view.entry, shards: done })
    }
}

/// The result for one segment.
enum Outcome {
    Copied {
        /// Whether this run has made the file.
        is_new: bool,
    },
    /// Retention has dropped it meanwhile.
    Dropped,
    Missing,
}
