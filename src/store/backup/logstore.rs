//! The copy of one Logstore.

use std::{collections::BTreeSet, sync::Arc};

use super::{
    Run, check_keys,
    copy::{Copier, Whole},
    source::View,
    with_shards,
};
use crate::{
    Error, Result,
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
}

impl<'r, 'a> CopyLogstore<'r, 'a> {
    pub(super) fn new(run: &'r mut Run<'a>, name: LogstoreName) -> Self {
        Self { run, name }
    }

    /// Copies the segments, verifies the new ones, and copies the metadata. `None` if the Logstore
    /// was deleted meanwhile.
    ///
    /// # Errors
    /// The integrity errors of its metadata, and [`Error::Io`].
    pub(super) fn run(mut self) -> Result<Option<Copied>> {
        for _ in 0..ATTEMPTS {
            let Some(view) = self.run.source.view(&self.name)? else { return Ok(None) };
            let Some(fresh) = self.segments(&view)? else { continue };
            return self.complete(&view, fresh).map(Some);
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
    fn segments(&mut self, view: &View) -> Result<Option<Vec<(CopiedShard, BTreeSet<u64>)>>> {
        self.count(view)?;
        let dir = self.run.target.make_logstore_dir(view.entry.id)?;
        let before = self.run.report.clone();
        let mut all = Vec::new();
        for (shard, segments) in &view.shards {
            let dir = shard_dir(&dir, shard.id());
            self.run.target.make_dir(&dir)?;
            let mut copied = CopiedShard { first: None, last: None, head: None };
            let mut fresh = BTreeSet::new();
            let mut dropped = false;
            for segment in segments.iter() {
                match self.segment(view, shard, segment)? {
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
    fn count(&mut self, view: &View) -> Result<()> {
        for segment in view.shards.iter().flat_map(|(_, segments)| segments.iter()) {
            let stat = self.run.core.env.disk.stat(&segment.path);
            let stat = stat.map_err(Error::io("look for", &*segment.path))?;
            self.run.state.bytes_total += stat.map_or(0, |stat| stat.len);
        }
        Ok(())
    }

    fn segment(&mut self, view: &View, shard: &Shard, segment: &SegmentRef) -> Result<Outcome> {
        let is_lost = shard.is_lost(segment.ordinal);
        let source =
            if segment.is_missing() { Err(segment.missing()) } else { shard.copy_source(segment) };
        let source = match source {
            Ok(source) => source,
            Err(_) if is_lost => return Ok(Outcome::Missing),
            Err(error) if error.is_loss() => {
                let name = &self.name;
                let (source, id) = (&mut self.run.source, shard.id());
                if source.is_dropped(name, &view.entry, id, segment.last_ordinal())? {
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
        let done = copier.segment(&source, &path)?;
        self.run.report.add(&done);
        self.run.advance(done.bytes());
        Ok(Outcome::Copied { is_new: !done.is_present() })
    }

    /// Verifies the new segments and writes the metadata.
    fn complete(self, view: &View, shards: Vec<(CopiedShard, BTreeSet<u64>)>) -> Result<Copied> {
        let Self { run, name } = self;
        let refused = check_keys(&view.logstore).err();
        if let Some(error) = &refused {
            run.verified.note(Some(&name), error.clone())?;
        }
        let keyless = refused.is_some();
        let records: Vec<_> = view
            .entry
            .shards
            .iter()
            .zip(&shards)
            .map(|(record, (copied, _))| copied.settle(record, record))
            .collect();
        let dir = run.target.logstore_dir(view.entry.id);
        let (logstore, disk) = (&view.logstore, run.target.shared_disk());
        let copies = run.core.registry.shards_in(logstore, &view.meta, disk, &dir, &records);
        let mut done = Vec::new();
        for (shard, (mut copied, mut wanted)) in copies.iter().zip(shards) {
            // Nothing but the last segment can have been verified without its key before and have
            // no successor that names it.
            wanted.extend(copied.last);
            let mut report = VerifyReport::default();
            verify_copy(&mut report, keyless, &name, shard, &wanted)?;
            let is_sound = report.faults.is_empty() && report.refused.is_empty();
            if is_sound && !keyless && copied.last.is_some() {
                copied.head = match shard.head_of_copy() {
                    // The store has recorded the head before it destroyed the key.
                    Err(Error::Shredded { .. }) => None,
                    head => head?,
                };
            }
            run.verified.faults.append(&mut report.faults);
            for (name, error) in report.refused {
                run.verified.note(Some(&name), error)?;
            }
            done.push(copied);
        }
        let (file, bytes) = &view.meta_file;
        run.target.put(&dir.join(file), bytes)?;
        Ok(Copied { name, entry: view.entry.clone(), shards: done })
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
