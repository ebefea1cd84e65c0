//! Retention: drops whole segments by age and by size, and then the data keys without segments.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::{
    catalogue::Change,
    core::Core,
    key_change::{KeyChange, change_keys},
    logstores,
    registry::Closing,
    reserve::Borrower,
    trusted_clock::TrustedClock,
    unanswered::Unanswered,
};
use crate::{
    Error, ErrorKind, Result,
    config::LogstoreConfig,
    io::DAY_US,
    logstore::LogstoreShared,
    segment::KeySource,
    shard::{Proved, SegmentRef, Shard, ShardRecord},
    sync::MutexGuard,
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
    /// Whether retention by age is suspended, because the wall clock has jumped ahead.
    pub suspended: bool,
}

/// The options of [`Admin::retain`](crate::Admin::retain).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct RetainOptions {
    /// Whether the wall clock is trusted as it is now. Set this if the clock is right, and the store
    /// was not open for more than a day.
    pub trust_clock: bool,
}

impl RetainOptions {
    setters! {
        trust_clock: bool;
    }
}

/// The state of retention, from [`Admin::retention_status`](crate::Admin::retention_status).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct RetentionStatus {
    /// When retention was applied last, in microseconds since the Unix epoch. `None` until a
    /// Logstore has a limit. In a store that is open for reading, this is the time that the
    /// catalogue has, which may be up to an hour older.
    pub last_run_us: Option<u64>,
    /// The newest time that the store trusts, in microseconds since the Unix epoch. `None` until a
    /// Logstore has retention by age.
    pub trusted_us: Option<u64>,
    /// Whether retention by age is suspended: the wall clock is more than 24 h ahead of
    /// `trusted_us`, and has not advanced by [`crate::StoreOptions::clock_settle`] since.
    pub suspended: bool,
}

/// The limits of a Logstore.
#[derive(Clone, Copy)]
struct Limits {
    /// The generation of the metadata that has them.
    generation: u64,
    /// Segments whose last group was received before the first of these times, in microseconds
    /// since the Unix epoch, are too old. The second one is now.
    age: Option<(u64, u64)>,
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
    _borrowed: Borrower<'a>,
    report: RetentionReport,
    /// The wall clock at the begin of the run.
    now_us: u64,
    unanswered: Unanswered,
}

/// Segments that are over the limits of their shards when the store is closed.
pub(super) struct ExcessAtClose<'a> {
    /// Held until their files are removed.
    _one_at_a_time: MutexGuard<'a, ()>,
    of_shards: Vec<(Arc<LogstoreShared>, Arc<Shard>, Excess)>,
}

/// Drops the segments that are over the limits of their Logstores. A failure for one Logstore does
/// not stop the others. Calls KMSs at the end, so a KMS that does not answer delays only Logstores
/// that need one.
pub(super) fn apply(core: &Core, options: &RetainOptions) -> Result<RetentionReport> {
    core.registry.check_writable()?;
    if options.trust_clock {
        core.env.trusted.trust(&*core.env.clock);
    }
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

/// Looks at the wall clock when a store is opened for writing, and records a jump: a later process
/// trusts the clock once it has advanced.
pub(super) fn look_at_opening(core: &Core) {
    let by_age =
        core.registry.catalogue().retention.is_some_and(|known| known.trusted_us.is_some());
    if by_age {
        core.env.look_at_clock();
        note_failure(core, "at opening", record(core, None));
    }
}

/// How long until retention is due.
pub(super) fn due_in(core: &Core) -> Duration {
    let every = core.env.options.retention_every;
    match core.registry.catalogue().retention {
        Some(_) => core.env.trusted.due_in(&*core.env.clock, every),
        None => every,
    }
}

/// Applies retention before the store is closed, if it is due and as far as that needs no data key:
/// the process may have been too short for the periodic job.
pub(super) fn apply_at_close(core: &Core) {
    let Core { env, keys, registry } = core;
    if !env.read_only
        && !registry.is_closed()
        && keys.is_service_key_usable()
        && due_in(core).is_zero()
    {
        note_failure(core, "at close", apply_without_kms(core));
    }
}

/// Finds the segments that are over the size limits of the shards that this process has written,
/// once these are sealed. The caller records the changes with the heads.
pub(super) fn find_at_close<'a>(core: &'a Core, closing: &Closing<'_>) -> ExcessAtClose<'a> {
    let one_at_a_time = core.registry.remove_files();
    let mut excess = ExcessAtClose { _one_at_a_time: one_at_a_time, of_shards: Vec::new() };
    if !closing.is_first || core.env.read_only {
        return excess;
    }
    for logstore in core.registry.open_logstores() {
        let Some(bytes_max) = logstore.config().retention_bytes else { continue };
        if logstore.gate.is_unproved() {
            continue;
        }
        let generation = logstore.generation();
        let limits = Limits { generation, age: None, bytes_max: Some(bytes_max) };
        for shard in logstore.table().shards() {
            let found = is_over(core, shard, bytes_max).and_then(|is_over| {
                let found = if is_over { find_excess(shard, limits)? } else { None };
                if found.is_some() {
                    shard.make_names_durable()?;
                }
                Ok(found)
            });
            match found {
                Ok(Some(found)) => {
                    excess.of_shards.push((Arc::clone(&logstore), Arc::clone(shard), found));
                }
                Ok(None) => {}
                Err(error) => note_failure(core, "at close", Err(error)),
            }
        }
    }
    excess
}

impl ExcessAtClose<'_> {
    pub(super) fn is_empty(&self) -> bool {
        self.of_shards.is_empty()
    }

    /// The changes of the catalogue.
    pub(super) fn changes(&self) -> Vec<Change> {
        let dropped = |(logstore, shard, excess): &(Arc<LogstoreShared>, Arc<Shard>, Excess)| {
            dropped(logstore, shard, &excess.record)
        };
        self.of_shards.iter().map(dropped).collect()
    }

    /// The changes are recorded: removes the files.
    pub(super) fn remove(self) {
        for (logstore, shard, excess) in &self.of_shards {
            forget(logstore, shard, excess);
            if let Err(error) = shard.remove_leftovers() {
                warn!(logstore = %logstore.name, shard = shard.id(), %error, "files of dropped segments not removed; will retry");
            }
        }
    }
}

/// The state of retention.
pub(super) fn status(core: &Core) -> RetentionStatus {
    let Core { env, registry, .. } = core;
    let Some(known) = registry.catalogue().retention else { return RetentionStatus::default() };
    let by_age = known.trusted_us.is_some();
    if env.read_only {
        let trusted = TrustedClock::new(&*env.clock, Some(&known));
        let look = trusted.look(&*env.clock, env.options.clock_settle);
        // Without a recorded jump, the next writer decides.
        let suspended = by_age && known.jump_us.is_some() && look.suspended;
        let (last_run_us, trusted_us) = (Some(known.retained_us), known.trusted_us);
        return RetentionStatus { last_run_us, trusted_us, suspended };
    }
    let look = env.look_at_clock();
    RetentionStatus {
        last_run_us: Some(env.trusted.state(by_age).retained_us),
        trusted_us: by_age.then_some(look.trusted_us),
        suspended: by_age && look.suspended,
    }
}

/// Records the state of retention in the catalogue, if it is to be recorded now. `limited` has the
/// settings of a Logstore that the catalogue may not know to have limits.
fn record(core: &Core, limited: Option<&LogstoreConfig>) -> Result<()> {
    match core.registry.retention_change(limited, false) {
        Some(change) => core.registry.administer()?.commit(vec![change]),
        None => Ok(()),
    }
}

/// Logs a failure of retention, which the next run retries.
pub(super) fn note_failure(core: &Core, phase: &str, result: Result<()>) {
    match result {
        // The store is being closed, and applies retention then.
        Ok(()) | Err(Error::Closed(_)) => {}
        Err(error) => warn!(store = %core.env.id, phase, %error, "retention failed"),
    }
}

/// Retention drops the segments of a shard that are in front of its new record.
fn dropped(logstore: &LogstoreShared, shard: &Shard, record: &ShardRecord) -> Change {
    let (first_ordinal, first_seq) = (record.first_ordinal, record.first_seq);
    let (name, id, shard) = (logstore.name.clone(), logstore.id, shard.id());
    Change::Dropped { name, id, shard, first_ordinal, first_seq }
}

/// The catalogue has no record of these segments any more: forgets them.
fn forget(logstore: &LogstoreShared, shard: &Shard, excess: &Excess) {
    let ShardRecord { first_ordinal, first_seq, .. } = excess.record;
    shard.note_first(first_ordinal, first_seq);
    shard.drop_before(first_ordinal);
    let (logstore, shard, segments) = (&logstore.name, shard.id(), excess.segments);
    info!(%logstore, shard, segments, first_ordinal, "segments dropped by retention");
}

/// Whether this process has sealed the newest segment of a shard, and the shard is over its size
/// limit. Reads the length of each file.
fn is_over(core: &Core, shard: &Shard, bytes_max: u64) -> Result<bool> {
    let segments = shard.segments(false)?;
    if segments.last().is_none_or(|last| last.sealed.is_none()) {
        return Ok(false);
    }
    let mut bytes = 0;
    for segment in segments.iter() {
        let stat = core.env.disk.stat(&segment.path);
        let stat = stat.map_err(Error::io("look for", &*segment.path))?;
        bytes += stat.map_or(0, |stat| stat.len);
    }
    Ok(bytes > bytes_max)
}

impl<'a> Run<'a> {
    fn new(core: &'a Core) -> Result<Self> {
        core.registry.check_writable()?;
        let look = core.env.look_at_clock();
        let report = RetentionReport { suspended: look.suspended, ..RetentionReport::default() };
        let (_borrowed, now_us) = (core.env.reserve.borrow(), look.now_us);
        Ok(Self { core, _borrowed, report, now_us, unanswered: Unanswered::default() })
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
        let result = result.and(self.each(|run, logstore| {
            let Some(limits) = run.limits(logstore) else { return Ok(()) };
            record(run.core, Some(&logstore.config()))?;
            match logstore.gate.is_unproved() {
                true => run.remove_leftovers(logstore),
                false => run.drop_excess(logstore, limits),
            }
        }));
        self.core.env.trusted.note_run(self.now_us);
        result.and(record(self.core, None))
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
        let now_us = self.now_us;
        let age = days.map(|days| (now_us.saturating_sub(u64::from(days) * DAY_US), now_us));
        let (generation, bytes_max) = (logstore.generation(), config.retention_bytes);
        Some(Limits { generation, age, bytes_max })
    }

    /// Drops the oldest segments of each shard until it is within its limits.
    fn drop_excess(&mut self, logstore: &Arc<LogstoreShared>, limits: Limits) -> Result<()> {
        let _one_at_a_time = self.core.registry.remove_files();
        for shard in logstore.table().shards() {
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
            let dropped = dropped(logstore, shard, record);
            admin.commit(reached.into_iter().chain([dropped]).collect())?;
            forget(logstore, shard, excess);
        }
        self.report.segments += excess.segments;
        self.remove_leftovers_of(shard)
    }

    fn remove_leftovers(&mut self, logstore: &LogstoreShared) -> Result<()> {
        let _one_at_a_time = self.core.registry.remove_files();
        let table = logstore.table();
        let mut shards = table.shards().iter().filter(|shard| shard.has_leftovers());
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
        for shard in logstore.table().shards() {
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
        for shard in logstore.table().shards() {
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
/// head are never dropped. The newest segment that has data is dropped for its age only.
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
    let newest = newest_with_data(behind, &proved);
    let received_us = limits.age.map(|(_, now_us)| receive_times(&proved, now_us));
    let mut excess = Excess { record: shard.record(), segments: 0 };
    for (index, segment) in proved.iter().enumerate() {
        let too_much = index < newest && limits.bytes_max.is_some_and(|max| left > max);
        let received_us = received_us.as_ref().and_then(|times| times.get(index).copied());
        let too_old = limits.age.zip(received_us).is_some_and(|((oldest, _), us)| us < oldest);
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

/// How many of the proved segments are in front of the newest segment that has data.
fn newest_with_data(behind: &[&SegmentRef], proved: &[Proved]) -> usize {
    // A segment behind the proved ones may have data.
    let is_empty = |segment: &&SegmentRef| {
        segment.active.as_ref().is_some_and(|view| view.with_counts(|it| it.group_count == 0))
    };
    if !behind.iter().all(is_empty) {
        return proved.len();
    }
    let has_data = |segment: &Proved| segment.end.end_seq > segment.header.first_seq;
    proved.iter().rposition(has_data).unwrap_or(0)
}

/// When the last group of each segment was received at the latest, in microseconds since the Unix
/// epoch. A time that is ahead of now was given by a wrong clock: the segment is as old as the next
/// one that has a time which is not. A time that is behind that of the segment before it may have
/// been given by a wrong clock too: the segment is not older than that one.
fn receive_times(proved: &[Proved], now_us: u64) -> Vec<u64> {
    let mut times = vec![u64::MAX; proved.len()];
    let mut next_us = u64::MAX;
    for (segment, time_us) in proved.iter().zip(&mut times).rev() {
        let before_us = segment.header.last_before_us();
        let last_us = segment.end.last_time_us;
        if last_us <= now_us {
            let bound_us = if before_us <= now_us { before_us } else { 0 };
            next_us = last_us.max(bound_us);
        }
        *time_us = next_us;
    }
    times
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
    for shard in logstore.table().shards() {
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
    for shard in logstore.table().shards() {
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
