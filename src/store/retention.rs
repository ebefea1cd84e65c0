//! Retention: drops whole segments by age and by size, and then the data keys without segments.

use std::{collections::BTreeSet, sync::Arc};

use serde::Serialize;
use tracing::info;

use super::{
    catalogue::Change,
    core::Core,
    key_change::{KeyChange, change_keys},
    logstores,
    unanswered::Unanswered,
};
use crate::{
    Error, ErrorKind, Result,
    io::DAY_US,
    logstore::LogstoreShared,
    segment::KeySource,
    shard::{SegmentRef, Shard, ShardRecord},
};

/// The result of retention.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct RetentionReport {
    /// The number of dropped segments.
    pub segments: u64,
    /// The number of freed bytes.
    pub bytes: u64,
    /// The number of files of dropped segments that could not be removed. The next run tries
    /// again.
    pub left: u64,
    /// The number of data-key versions that were destroyed because no segment is left under them.
    pub data_keys: u64,
    /// The number of Logstores that have data-key versions without a segment and whose master key
    /// cannot be used now. A later run destroys these versions.
    pub data_keys_postponed: u64,
    /// Whether retention by age is suspended, because the wall clock has jumped by more than an
    /// hour since the store was opened.
    pub suspended: bool,
}

/// The limits of a Logstore.
#[derive(Clone, Copy)]
struct Limits {
    /// The generation of the metadata that has them.
    generation: u64,
    /// Segments whose last group was received before this time, in microseconds since the Unix
    /// epoch, are too old.
    oldest_us: Option<u64>,
    bytes_max: Option<u64>,
}

/// The segments of a shard that are over the limits.
struct Excess {
    /// The record of the shard without them.
    record: ShardRecord,
    /// Their number.
    segments: u64,
}

/// A run of retention.
struct Run<'a> {
    core: &'a Core,
    report: RetentionReport,
    unanswered: Unanswered,
}

/// Drops the segments that are over the limits of their Logstores. A failure for one Logstore does
/// not stop the others. Calls KMSs at the end, so a KMS that does not answer delays only Logstores
/// that need one.
pub(super) fn apply(core: &Core) -> Result<RetentionReport> {
    let mut run = Run::new(core)?;
    let result = run.without_kms();
    result.and(run.with_kms()).map(|()| run.report)
}

/// As [`apply`], but leaves to [`apply_with_kms`] the work that may call a customer's KMS, or wait
/// for a thread that does. Calls the KMS of the service key if its last answer is too old.
pub(super) fn apply_without_kms(core: &Core) -> Result<()> {
    Run::new(core)?.without_kms()
}

/// The part of [`apply`] that [`apply_without_kms`] leaves.
pub(super) fn apply_with_kms(core: &Core) -> Result<()> {
    Run::new(core)?.with_kms()
}

impl<'a> Run<'a> {
    fn new(core: &'a Core) -> Result<Self> {
        core.registry.check_writable()?;
        let suspended = core.env.has_clock_jumped();
        let report = RetentionReport { suspended, ..RetentionReport::default() };
        Ok(Self { core, report, unanswered: Unanswered::default() })
    }

    /// Calls `retain` for each Logstore.
    fn each(
        &mut self,
        retain: impl Fn(&mut Self, &Arc<LogstoreShared>) -> Result<()>,
    ) -> Result<()> {
        let mut result = Ok(());
        for name in self.core.registry.names() {
            let logstore = self.core.registry.logstore(&name);
            let done = logstore.and_then(|logstore| retain(self, &logstore));
            if !matches!(done, Err(Error::LogstoreMissing(_))) {
                result = result.and(done);
            }
        }
        result
    }

    fn without_kms(&mut self) -> Result<()> {
        let result = logstores::finish_deletions(self.core);
        result.and(self.each(|run, logstore| {
            let Some(limits) = run.limits(logstore) else { return Ok(()) };
            match logstore.gate.is_unproved() {
                true => run.remove_leftovers(logstore),
                false => run.drop_excess(logstore, limits),
            }
        }))
    }

    fn with_kms(&mut self) -> Result<()> {
        // These come first, so that no KMS of a customer delays them.
        let result = self.each(|run, logstore| match run.limits(logstore) {
            Some(_) if !uses_kms(logstore) => run.shred_unused(logstore),
            _ => Ok(()),
        });
        result.and(self.each(|run, logstore| {
            let Some(limits) = run.limits(logstore).filter(|_| uses_kms(logstore)) else {
                return Ok(());
            };
            // After a first failure, the lease or the next run decides what applies unproved.
            if logstore.gate.is_unproved()
                && !run.unanswered.includes(logstore)
                && run.has_excess(logstore, limits)?
            {
                run.prove(logstore)?;
                run.drop_excess(logstore, limits)?;
            }
            run.shred_unused(logstore)
        }))
    }

    /// The limits of a Logstore; `None` if it has none.
    fn limits(&self, logstore: &LogstoreShared) -> Option<Limits> {
        let config = logstore.config();
        if config.ttl_days.is_none() && config.retention_bytes.is_none() {
            return None;
        }
        let days = config.ttl_days.filter(|_| !self.report.suspended);
        let now_us = self.core.env.clock.wall_us();
        let oldest_us = days.map(|days| now_us.saturating_sub(u64::from(days) * DAY_US));
        let (generation, bytes_max) = (logstore.generation(), config.retention_bytes);
        Some(Limits { generation, oldest_us, bytes_max })
    }

    /// Drops the oldest segments of each shard until it is within its limits.
    fn drop_excess(&mut self, logstore: &Arc<LogstoreShared>, limits: Limits) -> Result<()> {
        let _one_at_a_time = self.core.registry.remove_files();
        for shard in &logstore.shards {
            match find_excess(shard, limits)? {
                Some(excess) => self.drop_segments(logstore, shard, limits, &excess)?,
                None if shard.has_leftovers() => self.remove_leftovers_of(shard)?,
                None => {}
            }
        }
        Ok(())
    }

    /// Records in the catalogue that segments may be missing, and where the shard begins now, and
    /// then removes the files.
    fn drop_segments(
        &mut self,
        logstore: &Arc<LogstoreShared>,
        shard: &Shard,
        limits: Limits,
        excess: &Excess,
    ) -> Result<()> {
        shard.make_names_durable()?;
        let (name, id, record) = (&logstore.name, logstore.id, &excess.record);
        let (first_ordinal, first_seq) = (record.first_ordinal, record.first_seq);
        {
            let mut admin = self.core.registry.administer()?;
            admin.check_exists(logstore)?;
            if logstore.generation() != limits.generation {
                // The next run applies the new settings.
                return Ok(());
            }
            // The catalogue may not have the head yet by which this process has proved the
            // segments.
            let reached = record.head.clone();
            let reached = reached.map(|head| Change::reached(name, id, shard.id(), head));
            let dropped = Change::Dropped {
                name: name.clone(),
                id,
                shard: shard.id(),
                first_ordinal,
                first_seq,
            };
            admin.commit(reached.into_iter().chain([dropped]).collect())?;
            shard.note_first(first_ordinal, first_seq);
            shard.drop_before(first_ordinal);
        }
        let (shard_id, segments) = (shard.id(), excess.segments);
        info!(logstore = %name, shard = shard_id, segments, first_ordinal, "segments dropped by retention");
        self.report.segments += segments;
        self.remove_leftovers_of(shard)
    }

    fn remove_leftovers(&mut self, logstore: &LogstoreShared) -> Result<()> {
        let _one_at_a_time = self.core.registry.remove_files();
        let mut shards = logstore.shards.iter().filter(|shard| shard.has_leftovers());
        shards.try_for_each(|shard| self.remove_leftovers_of(shard))
    }

    fn remove_leftovers_of(&mut self, shard: &Shard) -> Result<()> {
        let (freed, left) = shard.remove_leftovers()?;
        self.report.bytes += freed;
        self.report.left += left;
        Ok(())
    }

    /// Lets the data key prove the retention settings, once after the Logstore was opened. While
    /// the key may not be used, the settings in the metadata apply unproved. May call the KMS.
    fn prove(&mut self, logstore: &LogstoreShared) -> Result<()> {
        let proved = logstore.gate.admit().and_then(|_| logstore.gate.prove());
        match self.unanswered.note(logstore, proved) {
            Err(error) if is_refusal(&error) => {
                info!(logstore = %logstore.name, %error, "retention settings applied without proof by the data key");
                Ok(())
            }
            proved => proved,
        }
    }

    /// Destroys the data-key versions without a segment. After an interruption, the next run finds
    /// them again, or the next opening of the Logstore removes the older metadata, which has them.
    fn shred_unused(&mut self, logstore: &Arc<LogstoreShared>) -> Result<()> {
        let core = self.core;
        if self.unused_versions(logstore)?.is_empty() {
            return Ok(());
        }
        let one = match uses_kms(logstore) {
            true if self.unanswered.includes(logstore) => None,
            // Its holder may wait for the KMS.
            true => core.registry.try_administer_logstore(&logstore.name)?,
            false => Some(core.registry.administer_logstore(&logstore.name)?),
        };
        let Some(one) = one else {
            self.report.data_keys_postponed += 1;
            return Ok(());
        };
        let logstore = one.logstore()?;
        for shard in &logstore.shards {
            shard.settled_segments()?;
        }
        let unused = self.unused_versions(&logstore)?;
        if unused.is_empty() {
            return Ok(());
        }
        // The gate is asked first, so that no intent is recorded that the KMS would prevent.
        let shredded = logstore.gate.admit().and_then(|_| {
            let versions: Vec<u32> = unused.iter().copied().collect();
            let how = KeyChange::shred(&versions, ", since retention has dropped what it sealed");
            change_keys(core, &one, &logstore, &how, |_, section| {
                let versions = section.versions.iter_mut();
                for version in versions.filter(|version| unused.contains(&version.version)) {
                    version.wrapped = None;
                }
                Ok(unused.len() as u32)
            })
        });
        match self.unanswered.note(&logstore, shredded) {
            Ok(count) => self.report.data_keys += u64::from(count),
            Err(error) if is_refusal(&error) => {
                info!(logstore = %logstore.name, %error, "destruction of unused data keys postponed");
                self.report.data_keys_postponed += 1;
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// The data-key versions that can be destroyed now.
    fn unused_versions(&self, logstore: &LogstoreShared) -> Result<BTreeSet<u32>> {
        let _no_other_run = self.core.registry.remove_files();
        unused_versions(logstore)
    }

    /// Whether a Logstore has segments that are over its limits.
    fn has_excess(&self, logstore: &LogstoreShared, limits: Limits) -> Result<bool> {
        let _no_other_run = self.core.registry.remove_files();
        for shard in &logstore.shards {
            if find_excess(shard, limits)?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Whether the data keys of a Logstore are under a customer master key.
fn uses_kms(logstore: &LogstoreShared) -> bool {
    logstore.keys_section().is_some_and(|section| section.cmk.is_some())
}

/// Whether the key may not be used now.
fn is_refusal(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Revoked | ErrorKind::KmsUnreachable)
}

/// Finds the segments that are over the limits. The chain of digests from the head in the
/// catalogue proves the identity, the length and the age of each segment. Segments behind that
/// head are never dropped.
fn find_excess(shard: &Shard, limits: Limits) -> Result<Option<Excess>> {
    let segments = shard.segments(false)?;
    let mut proved = Vec::with_capacity(segments.len());
    let lost = |segment: &&SegmentRef| shard.is_lost(segment.ordinal);
    let segments: Vec<&SegmentRef> = segments.iter().filter(|segment| !lost(segment)).collect();
    for segment in segments.iter().filter(|segment| segment.active.is_none()) {
        let Some(found) = shard.proved(segment.ordinal)? else { break };
        proved.push(found);
    }
    let behind = segments.get(proved.len()..).unwrap_or_default();
    let written: u64 =
        behind.iter().filter_map(|segment| Some(segment.active.as_ref()?.visible())).sum();
    let mut left: u64 = proved.iter().map(|proved| proved.end.bytes).sum::<u64>() + written;
    let mut excess = Excess { record: shard.record(), segments: 0 };
    for (index, segment) in proved.iter().enumerate() {
        let too_much = limits.bytes_max.is_some_and(|max| left > max);
        let too_old = limits.oldest_us.is_some_and(|oldest| segment.end.last_time_us < oldest);
        // The segment of the head stays unless it is sealed.
        let head = excess.record.head.as_ref();
        let ended = head.is_some_and(|head| head.sealed || head.ordinal > segment.end.ordinal);
        if !(too_much || too_old) || !ended {
            break;
        }
        let next = proved.get(index + 1);
        excess.record.first_ordinal = segment.end.ordinal + 1;
        excess.record.first_seq = next.map_or(segment.end.end_seq, |next| next.header.first_seq);
        excess.segments += 1;
        left -= segment.end.bytes;
    }
    Ok((excess.segments > 0).then_some(excess))
}

/// The older data-key versions without a segment and without a reader of this process. None if a
/// segment is found whose key is not proved.
fn unused_versions(logstore: &LogstoreShared) -> Result<BTreeSet<u32>> {
    let none = Ok(BTreeSet::new());
    let Some(section) = logstore.keys_section() else { return none };
    let older = section.envelopes().map(|(version, _)| version.version);
    let mut unused: BTreeSet<u32> = older.filter(|version| *version != section.current).collect();
    if unused.is_empty() {
        return none;
    }
    // Versions only grow along a shard, so its oldest segment alone often decides.
    let mut oldest = u32::MAX;
    for shard in &logstore.shards {
        if let Some(first) = shard.segments(true)?.iter().find(|segment| !segment.is_missing()) {
            // A segment that the catalogue does not know yet may be under any key.
            let Some(source) = shard.proved_key_source(first)? else { return none };
            oldest = oldest.min(data_key_version(source));
        }
    }
    unused.retain(|version| *version < oldest);
    if unused.is_empty() {
        return none;
    }
    // A destroyed key is lost for ever, so every segment is checked.
    for shard in &logstore.shards {
        let segments = shard.segments(true)?;
        let is_gone = |one: &SegmentRef| one.is_missing() && shard.is_lost(one.ordinal);
        for segment in segments.iter().filter(|segment| !is_gone(segment)) {
            let Some(source) = shard.proved_key_source(segment)? else { return none };
            unused.remove(&data_key_version(source));
        }
    }
    unused.retain(|version| logstore.gate.readers(KeySource::DataKey(*version)) == 0);
    Ok(unused)
}

/// The data-key version of a segment; 0 for a segment from before the first version.
fn data_key_version(source: KeySource) -> u32 {
    match source {
        KeySource::DataKey(version) => version,
        KeySource::Keyring(_) => 0,
    }
}
