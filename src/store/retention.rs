//! Retention: drops whole segments by age and by size, and then the data keys without segments.

use std::{collections::BTreeSet, sync::Arc};

use serde::Serialize;
use tracing::info;

use super::{
    catalogue::Change,
    core::Core,
    key_change::{KeyChange, change_keys_in},
    keys::KeyService,
    logstores,
    registry::Administration,
};
use crate::{
    Error, ErrorKind, Result,
    config::LogstoreName,
    logstore::LogstoreShared,
    segment::KeySource,
    shard::{Shard, ShardRecord},
};

const DAY_US: u64 = 86_400_000_000;

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

impl RetentionReport {
    fn remove_leftovers(&mut self, shard: &Shard) -> Result<()> {
        let (freed, left) = shard.remove_leftovers()?;
        self.bytes += freed;
        self.left += left;
        Ok(())
    }
}

/// The limits of a Logstore.
#[derive(Clone, Copy)]
struct Limits {
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

/// Drops the segments that are over the limits of their Logstores. A failure for one Logstore does
/// not stop the others.
pub(super) fn apply(core: &Core) -> Result<RetentionReport> {
    core.registry.check_writable()?;
    let mut report =
        RetentionReport { suspended: core.env.has_clock_jumped(), ..Default::default() };
    let names = core.registry.names();
    let mut result = logstores::finish_deletions(core);
    for name in names {
        let done = retain(core, &name, &mut report);
        if !matches!(done, Err(Error::LogstoreMissing(_))) {
            result = result.and(done);
        }
    }
    result.map(|()| report)
}

fn retain(core: &Core, name: &LogstoreName, report: &mut RetentionReport) -> Result<()> {
    let Core { env, keys, registry } = core;
    let mut admin = registry.administer()?;
    let logstore = admin.logstore(name)?;
    let config = logstore.config();
    if config.ttl_days.is_none() && config.retention_bytes.is_none() {
        return Ok(());
    }
    let days = config.ttl_days.filter(|_| !report.suspended);
    let oldest_us = days.map(|days| env.clock.wall_us().saturating_sub(u64::from(days) * DAY_US));
    let limits = Limits { oldest_us, bytes_max: config.retention_bytes };
    logstore
        .shards
        .iter()
        .try_for_each(|shard| retain_shard(&mut admin, &logstore, shard, limits, report))?;
    shred_unused(keys, &mut admin, &logstore, report)
}

/// Drops the oldest segments of a shard until it is within its limits.
fn retain_shard(
    admin: &mut Administration<'_>,
    logstore: &LogstoreShared,
    shard: &Shard,
    limits: Limits,
    report: &mut RetentionReport,
) -> Result<()> {
    let Some(excess) = find_excess(shard, limits)? else {
        return if shard.has_leftovers() { report.remove_leftovers(shard) } else { Ok(()) };
    };
    prove_retention(logstore)?;
    commit_drop(admin, logstore, shard, &excess.record)?;
    shard.note_first(excess.record.first_ordinal, excess.record.first_seq);
    shard.drop_before(excess.record.first_ordinal);
    info!(
        logstore = %logstore.name,
        shard = shard.id(),
        segments = excess.segments,
        first_ordinal = excess.record.first_ordinal,
        "segments dropped by retention"
    );
    report.segments += excess.segments;
    report.remove_leftovers(shard)
}

/// Finds the segments that are over the limits. The chain of digests from the head in the
/// catalogue proves the identity, the length and the age of each segment. Segments behind that
/// head are never dropped.
fn find_excess(shard: &Shard, limits: Limits) -> Result<Option<Excess>> {
    let segments = shard.segments(false)?;
    let mut proved = Vec::with_capacity(segments.len());
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
        excess.record.first_seq =
            next.map_or(segment.end.end_seq, |next| next.header.header.first_seq);
        excess.segments += 1;
        left -= segment.end.bytes;
    }
    Ok((excess.segments > 0).then_some(excess))
}

/// Records in the catalogue that segments may be missing, and where the shard begins now. The
/// files are removed after that.
fn commit_drop(
    admin: &mut Administration<'_>,
    logstore: &LogstoreShared,
    shard: &Shard,
    record: &ShardRecord,
) -> Result<()> {
    shard.make_names_durable()?;
    let (name, id, shard) = (&logstore.name, logstore.id, shard.id());
    // The catalogue may not have the head yet by which this process has proved the segments.
    let reached = record.head.clone().map(|head| Change::reached(name, id, shard, head));
    let (first_ordinal, first_seq) = (record.first_ordinal, record.first_seq);
    let dropped = Change::Dropped { name: name.clone(), id, shard, first_ordinal, first_seq };
    admin.commit(reached.into_iter().chain([dropped]).collect())
}

/// Lets the data key prove the retention settings, once after the Logstore was opened. While the
/// key may not be used, the settings in the metadata apply unproved. May call the KMS.
fn prove_retention(logstore: &LogstoreShared) -> Result<()> {
    if !logstore.gate.is_unproved() {
        return Ok(());
    }
    match logstore.gate.admit().and_then(|_| logstore.gate.prove()) {
        Err(error) if matches!(error.kind(), ErrorKind::Revoked | ErrorKind::KmsUnreachable) => {
            info!(logstore = %logstore.name, %error, "retention settings applied without proof by the data key");
            Ok(())
        }
        proved => proved,
    }
}

/// Destroys the data-key versions without a segment. After an interruption, the next run finds
/// them again, or the next opening of the Logstore removes the older metadata, which has them.
fn shred_unused(
    keys: &KeyService,
    admin: &mut Administration<'_>,
    logstore: &Arc<LogstoreShared>,
    report: &mut RetentionReport,
) -> Result<()> {
    let unused = unused_versions(logstore)?;
    if unused.is_empty() {
        return Ok(());
    }
    if logstore.keys_section().is_some_and(|section| section.cmk.is_some())
        && let Err(error) = logstore.gate.admit()
    {
        info!(logstore = %logstore.name, %error, "destruction of unused data keys postponed");
        report.data_keys_postponed += 1;
        return Ok(());
    }
    let versions: Vec<u32> = unused.iter().copied().collect();
    let how = KeyChange::shred(&versions, ", since retention has dropped what it sealed");
    let shredded = change_keys_in(keys, admin, logstore, &how, |_, section| {
        for version in
            section.versions.iter_mut().filter(|version| unused.contains(&version.version))
        {
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
        if let Some(first) = shard.settled_segments()?.first() {
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
        for segment in shard.settled_segments()?.iter() {
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
