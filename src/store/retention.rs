//! Retention: whole segments go when they are older than the Logstore keeps them, or more than it keeps.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use serde::Serialize;
use tracing::{info, warn};

use super::{AdminState, Change, Store, StoreShared, keyops::KeyChange};
use crate::{
    Error, ErrorKind, Result,
    config::LogstoreName,
    io::Clock,
    logstore::LogstoreShared,
    schedule::{StoreJob, Task, Wake, Work},
    segment::KeySource,
    shard::{Head, Shard},
    sync::lock,
};

/// A wall clock that runs away from the uptime by more than this is not trusted with deleting.
const JUMP_MAX: Duration = Duration::from_secs(3600);
const DAY_US: u64 = 86_400_000_000;

/// The data-key version of a segment; 0 for one that is older than the first of them.
fn data_key_version(source: KeySource) -> u32 {
    match source {
        KeySource::DataKey(version) => version,
        KeySource::Keyring(_) => 0,
    }
}

/// Watches the wall clock for jumps since the store was opened.
pub(super) struct ClockWatch {
    wall_us: u64,
    uptime: Duration,
}

impl ClockWatch {
    pub(super) fn new(clock: &dyn Clock) -> Self {
        Self { wall_us: clock.wall_us(), uptime: clock.uptime() }
    }

    pub(super) fn has_jumped(&self, clock: &dyn Clock) -> bool {
        let passed = u64::try_from(clock.uptime().saturating_sub(self.uptime).as_micros()).unwrap_or(u64::MAX);
        clock.wall_us().abs_diff(self.wall_us.saturating_add(passed)) > JUMP_MAX.as_micros() as u64
    }
}

/// What retention did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct RetentionReport {
    /// Segments dropped.
    pub segments: u64,
    /// Bytes freed.
    pub bytes: u64,
    /// Files of dropped segments that the system did not let go. The next run tries again.
    pub left: u64,
    /// Data-key versions that were destroyed, since nothing is left under them.
    pub data_keys: u64,
    /// Logstores with data-key versions that nothing is left under, and whose master key cannot be used now: they are destroyed
    /// when it can be again.
    pub data_keys_postponed: u64,
    /// Whether retention by time is suspended, because the wall clock has jumped by more than an hour since the store was opened.
    pub suspended: bool,
}

impl RetentionReport {
    fn remove_leftovers(&mut self, shard: &Shard) -> Result<()> {
        let (freed, left) = shard.remove_leftovers()?;
        self.bytes += freed;
        self.left += left;
        Ok(())
    }
}

impl Store {
    /// Drops the segments that no Logstore keeps any more. Done by itself every [`crate::StoreOptions::retention_every`]. Needs no
    /// key.
    ///
    /// Where it has dropped the last segment of a data-key version that is not the current one, it destroys that version too. The
    /// metadata of a Logstore under a customer master key is tagged with the data key as well, so there this waits until the master
    /// key can be used.
    ///
    /// A KMS is called for this, and once after the opening of a Logstore under a customer master key before the first segment is
    /// dropped: the data key proves how long the Logstore keeps its segments. Where the master key cannot be used then, they are dropped
    /// all the same.
    ///
    /// # Errors
    /// [`Error::Io`], and what keeps a segment from being looked at; other Logstores are done all the same.
    pub fn apply_retention(&self) -> Result<RetentionReport> {
        self.shared.apply_retention()
    }
}

impl Task<StoreJob> for StoreShared {
    fn run(&self, job: StoreJob) {
        match job {
            StoreJob::Retention => {
                // What fails now is tried again next time.
                if let Err(error) = self.apply_retention() {
                    warn!(store = %self.id, %error, "retention has failed");
                }
                if let Err(error) = self.rotate_due_data_keys() {
                    warn!(store = %self.id, %error, "a data key could not be rotated by its policy");
                }
                if !self.read_only {
                    self.audit.settle();
                }
                self.schedule_retention();
            }
            StoreJob::Heads => {
                if let Err(error) = self.note_heads() {
                    warn!(store = %self.id, %error, "the catalogue could not note how far the shards are");
                }
                self.schedule_heads();
            }
        }
    }
}

impl StoreShared {
    pub(super) fn schedule_heads(&self) {
        self.scheduler.after(self.options.head_every, Work::Store(self.this.clone(), StoreJob::Heads));
    }

    /// Notes in the catalogue how far the synced part of each open segment reaches, so that no more than the last few seconds of it can
    /// be cut off unnoticed.
    fn note_heads(&self) -> Result<()> {
        let mut heads = Vec::new();
        for logstore in self.open_logstores() {
            for shard in &logstore.shards {
                heads.extend(shard.take_reached().map(|head| (Arc::clone(&logstore), Arc::clone(shard), head)));
            }
        }
        if !heads.is_empty() {
            let change = |(logstore, shard, head): &(Arc<LogstoreShared>, Arc<Shard>, Head)| {
                Change::reached(&logstore.name, logstore.id, shard.id(), head.clone())
            };
            let noted = self.catalogue.commit(heads.iter().map(change).collect());
            for (_, shard, head) in heads {
                match noted {
                    Ok(()) => shard.note_head(&head),
                    Err(_) => shard.give_back(head),
                }
            }
            noted?;
        }
        self.catalogue.settle()
    }

    pub(super) fn schedule_retention(&self) {
        self.scheduler.after(self.options.retention_every, Work::Store(self.this.clone(), StoreJob::Retention));
    }

    fn apply_retention(&self) -> Result<RetentionReport> {
        self.check_writable()?;
        let mut report =
            RetentionReport { suspended: lock(&self.retention).has_jumped(&*self.clock), ..Default::default() };
        let names = self.names();
        let mut result = self.finish_deletions();
        for name in names {
            let done = self.retain(&name, &mut report);
            if !matches!(done, Err(Error::LogstoreMissing(_))) {
                result = result.and(done);
            }
        }
        result.map(|()| report)
    }

    fn retain(&self, name: &LogstoreName, report: &mut RetentionReport) -> Result<()> {
        let mut admin = self.administer()?;
        let logstore = self.logstore_locked(&mut admin, name)?;
        let (ttl_days, retention_bytes) = {
            let meta = lock(&logstore.meta);
            (meta.config.ttl_days, meta.config.retention_bytes)
        };
        if ttl_days.is_none() && retention_bytes.is_none() {
            return Ok(());
        }
        let oldest_us = ttl_days
            .filter(|_| !report.suspended)
            .map(|days| self.clock.wall_us().saturating_sub(u64::from(days) * DAY_US));
        logstore.shards.iter().try_for_each(|shard| {
            self.retain_shard(&mut admin, &logstore, shard, oldest_us, retention_bytes, report)
        })?;
        self.shred_unused(&mut admin, &logstore, report)
    }

    /// Destroys the data-key versions that nothing is left under. Whatever interrupts it, the next run finds them again.
    fn shred_unused(
        &self,
        admin: &mut AdminState,
        logstore: &Arc<LogstoreShared>,
        report: &mut RetentionReport,
    ) -> Result<()> {
        let Some(section) = logstore.keys_section() else { return Ok(()) };
        let older: Vec<u32> = section
            .envelopes()
            .map(|(version, _)| version.version)
            .filter(|version| *version != section.current)
            .collect();
        if older.is_empty() {
            return Ok(());
        }
        // Versions only grow along a shard: one look at its oldest segment tells that there is nothing to do, as there mostly is.
        let mut oldest = u32::MAX;
        for shard in &logstore.shards {
            if let Some(first) = shard.settled_segments()?.first() {
                // A segment that the catalogue does not know yet may be under any key.
                let Some(source) = shard.proved_key_source(first)? else { return Ok(()) };
                oldest = oldest.min(data_key_version(source));
            }
        }
        let mut unused: BTreeSet<u32> = older.into_iter().filter(|version| *version < oldest).collect();
        if unused.is_empty() {
            return Ok(());
        }
        // What is destroyed for good is made sure of segment by segment.
        for shard in &logstore.shards {
            for segment in shard.settled_segments()?.iter() {
                let Some(source) = shard.proved_key_source(segment)? else { return Ok(()) };
                unused.remove(&data_key_version(source));
            }
        }
        unused.retain(|version| logstore.gate.readers(KeySource::DataKey(*version)) == 0);
        if unused.is_empty() {
            return Ok(());
        }
        if section.cmk.is_some()
            && let Err(error) = self.admit(logstore)
        {
            info!(logstore = %logstore.name, %error, "unused data keys are destroyed when the master key can be used");
            report.data_keys_postponed += 1;
            return Ok(());
        }
        let versions: Vec<u32> = unused.iter().copied().collect();
        let how = KeyChange::shred(&versions, ", since retention has dropped what it sealed");
        let shredded = self.change_keys_locked(admin, logstore, &how, |_, _, section| {
            for version in section.versions.iter_mut().filter(|version| unused.contains(&version.version)) {
                version.wrapped = None;
            }
            Ok(unused.len() as u32)
        });
        match shredded.map_err(|error| (error.kind(), error)) {
            Ok(count) => report.data_keys += u64::from(count),
            Err((ErrorKind::Revoked | ErrorKind::KmsUnreachable, _)) => report.data_keys_postponed += 1,
            Err((_, error)) => return Err(error),
        }
        Ok(())
    }

    /// Has the data key prove how long the Logstore keeps its segments, where that was not done since it was opened. While the key may
    /// not be used, the retention in the metadata applies unproved.
    fn prove_retention(&self, logstore: &LogstoreShared) -> Result<()> {
        if !logstore.gate.is_unproved() {
            return Ok(());
        }
        match self.admit(logstore).and_then(|()| logstore.gate.prove()) {
            Err(error) if matches!(error.kind(), ErrorKind::Revoked | ErrorKind::KmsUnreachable) => {
                info!(logstore = %logstore.name, %error, "retention goes by settings that the data key has not proved");
                Ok(())
            }
            proved => proved,
        }
    }

    /// Drops the oldest segment until the shard is within its age and size limits. The chain of digests from the head in the catalogue
    /// proves each segment's identity, length and age. Segments behind that head are never dropped.
    fn retain_shard(
        &self,
        admin: &mut AdminState,
        logstore: &LogstoreShared,
        shard: &Shard,
        oldest_us: Option<u64>,
        bytes_max: Option<u64>,
        report: &mut RetentionReport,
    ) -> Result<()> {
        let segments = shard.segments(false)?;
        let mut proved = Vec::with_capacity(segments.len());
        for segment in segments.iter().filter(|segment| segment.active.is_none()) {
            let Some(found) = shard.proved(segment.ordinal)? else { break };
            proved.push(found);
        }
        let behind = segments.get(proved.len()..).unwrap_or_default();
        let written: u64 = behind.iter().filter_map(|segment| Some(segment.active.as_ref()?.visible())).sum();
        let mut left: u64 = proved.iter().map(|proved| proved.end.bytes).sum::<u64>() + written;
        let mut record = shard.record();
        let mut dropped = 0;
        for (index, segment) in proved.iter().enumerate() {
            let too_much = bytes_max.is_some_and(|max| left > max);
            let too_old = oldest_us.is_some_and(|oldest| segment.end.last_time_us < oldest);
            // The head of the shard goes on, unless it is sealed.
            let ended = record.head.as_ref().is_some_and(|head| head.sealed || head.ordinal > segment.end.ordinal);
            if !(too_much || too_old) || !ended {
                break;
            }
            record.first_ordinal = segment.end.ordinal + 1;
            record.first_seq = proved.get(index + 1).map_or(segment.end.end_seq, |next| next.header.header.first_seq);
            left -= segment.end.bytes;
            dropped += 1;
        }
        if dropped == 0 {
            return if shard.has_leftovers() { report.remove_leftovers(shard) } else { Ok(()) };
        }
        self.prove_retention(logstore)?;
        // First the catalogue says that they may be missing, and that the shard goes on in the next one; then they go.
        shard.make_names_durable()?;
        let dropped_to = Change::Dropped {
            name: logstore.name.clone(),
            id: logstore.id,
            shard: shard.id(),
            first_ordinal: record.first_ordinal,
            first_seq: record.first_seq,
        };
        // The catalogue may not know the head yet that this process has proved the segments by, and the shard goes on behind it.
        let reached = record.head.clone().map(|head| Change::reached(&logstore.name, logstore.id, shard.id(), head));
        self.commit(admin, reached.into_iter().chain([dropped_to]).collect())?;
        shard.note_first(record.first_ordinal, record.first_seq);
        shard.drop_before(record.first_ordinal);
        info!(
            logstore = %logstore.name,
            shard = shard.id(),
            segments = dropped,
            first_ordinal = record.first_ordinal,
            "retention drops segments"
        );
        report.segments += dropped;
        report.remove_leftovers(shard)
    }
}
