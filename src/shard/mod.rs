//! One shard: an ordered run of segments, its writer, its readers, and its recovery.
//!
//! A [`Shard`] wires parts that know nothing of each other:
//!
//! - [`commit::GroupCommit`]: the queue, the watermarks and the leadership of the writers;
//! - [`writer::SegmentWriter`]: the files of the segment that is being written;
//! - [`segments::SegmentList`]: the segments by name, how each ends, and the catalogue's record;
//! - [`recovery::Recovery`]: what to do with a segment that was not sealed.
//!
//! [`loss`] has the operations after a loss of the key.
//!
//! # Locks
//!
//! | lock | guards | locks that may be taken under it | I/O, fsync, KMS call under it |
//! |---|---|---|---|
//! | the writer ([`Shard`]) | the segment writer | all below, the gate's, the catalogue's | all three; no fsync of the active segment |
//! | [`commit::GroupCommit`] | queue, watermarks, leadership | none | none |
//! | the list ([`segments::SegmentList`]) | which segments there are | the record | I/O: listing |
//! | the record ([`segments::SegmentList`]) | the catalogue's record | none | none |
//! | the chain ([`chain::Chain`]) | which segments are proved | none | none |
//! | the view ([`active::ActiveView`]) | progress of the active segment | the helpers' | none |
//! | the unrecorded head, the notices, the lost groups ([`Shard`]) | one value each | none | none |
//!
//! Only [`Shard`] holds two locks of this table at once, and then the first of them is the
//! writer's; but for the list and the record, which are both inside of [`segments::SegmentList`]. A
//! leader takes the writer's lock after it has become the leader, and gives it back while it syncs
//! the active segment. A caller that waits for the leadership holds no lock.

mod active;
mod budget;
mod chain;
mod commit;
mod control;
mod copying;
mod draft;
mod follow;
mod handover;
mod hashing;
mod helpers;
mod leader;
mod listing;
mod loss;
mod merged;
mod payload;
mod reader;
mod record;
mod recovery;
mod rules;
mod salvage;
mod scanning;
mod segment_reader;
mod segments;
mod ticket;
mod wakers;
mod writer;

use std::{
    path::PathBuf,
    sync::{Arc, Weak},
    time::Duration,
};

use crate::{
    Error, Result,
    config::LogstoreName,
    crypto::{HashAlg, Suite},
    epoch::Fence,
    io::{Clock, Disk, Random},
    keys::gate::Gate,
    metrics::LogstoreMetrics,
    schedule::{ShardJob, Task, Wake},
    segment::{Compression, Footer, KeySource},
    sync::{
        LockRank, Mutex, RwLock,
        atomic::{AtomicU64, Ordering},
        lock, read, write,
    },
};

pub(crate) use budget::Budget;
pub(crate) use chain::Proved;
use commit::GroupCommit;
pub(crate) use commit::LostGroups;
pub(crate) use control::Paused;
pub(crate) use copying::{CopySource, Extent};
#[cfg(feature = "stream")]
pub use follow::FollowStream;
pub use follow::{Follow, WaitFor};
pub(crate) use helpers::Helpers;
pub(crate) use leader::NotTaken;
use leader::{KMS_RETRY_AFTER, Timers};
pub(crate) use listing::SegmentRef;
use loss::Lost;
pub(crate) use loss::{RecordLostGroups, ShardLoss};
pub use merged::{MergedPosition, MergedReader};
pub use payload::{Appended, Durability, Payload, ShardChoice};
pub(crate) use reader::ReaderPermits;
pub use reader::{LostRange, Position, ReadMode, ReadOptions, Reader, Record, RecordBlock};
pub(crate) use record::{Head, Loss, RecordHead, ReloadRecord, ShardRecord};
pub use recovery::{AcceptedLoss, AdoptedMetadata, RecoveryNotice, RepairOptions, RepairReport};
pub(crate) use salvage::FoundLoss;
pub(crate) use segment_reader::{Load, SegmentReader};
pub(crate) use segments::{End, Opened, Proof, SegmentList, is_segment_temporary, read_header};
pub(crate) use ticket::Route;
pub use ticket::{AppendFuture, Ticket};
use writer::{KeyUse, SegmentWriter, WriteEnv};

/// Limits appends.
pub(crate) trait AdmitAppend: Send + Sync {
    /// Called for each append.
    ///
    /// # Errors
    /// Why no group may be appended now.
    fn admit_append(&self) -> Result<()>;
}

/// The settings of a store that its shards use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ShardOptions {
    pub(crate) block_bytes: usize,
    pub(crate) linger: Duration,
    pub(crate) segment_bytes: u64,
    pub(crate) segment_age: Duration,
    /// Whether there are threads that run scheduled jobs.
    pub(crate) threads: bool,
    /// Whether a shard that a full disk has stopped writes again by itself.
    pub(crate) reopen_full_shards: bool,
}

/// How new blocks are sealed. Replaced as a whole when the configuration or the keys change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WritePlan {
    pub(crate) suite: Suite,
    pub(crate) key_source: KeySource,
    pub(crate) compression: Compression,
    pub(crate) payload_hash: HashAlg,
    pub(crate) generation: u64,
    /// A limit besides [`ShardOptions::segment_bytes`], so that retention by bytes drops small
    /// parts.
    pub(crate) segment_bytes_max: u64,
}

/// The write plan of a Logstore. Its shards read it, and the Logstore replaces it.
pub(crate) struct CurrentPlan(RwLock<WritePlan>);

impl CurrentPlan {
    pub(crate) fn new(plan: WritePlan) -> Self {
        Self(RwLock::new(LockRank::WritePlan, plan))
    }

    pub(crate) fn get(&self) -> WritePlan {
        *read(&self.0)
    }

    pub(crate) fn replace(&self, plan: WritePlan) {
        *write(&self.0) = plan;
    }
}

/// The environment that a Logstore gives to its shards.
pub(crate) struct ShardContext {
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) random: Arc<dyn Random>,
    pub(crate) wake: Arc<dyn Wake>,
    pub(crate) budget: Arc<Budget>,
    pub(crate) helpers: Arc<Helpers>,
    pub(crate) gate: Arc<Gate>,
    pub(crate) options: ShardOptions,
    pub(crate) read_only: bool,
    /// Records the head of each segment that is sealed when the shard rolls.
    pub(crate) heads: Arc<dyn RecordHead>,
    /// Checked before a write or a sync is acknowledged; `None` for a read-only opener.
    pub(crate) fence: Option<Arc<Fence>>,
    /// Called before each append; `None` if nothing limits them.
    pub(crate) limit: Option<Arc<dyn AdmitAppend>>,
    /// The Logstore keeps it current.
    pub(crate) plan: Arc<CurrentPlan>,
    pub(crate) permits: ReaderPermits,
    /// For a read-only opener.
    pub(crate) reload: Option<Weak<dyn ReloadRecord>>,
    /// Records acknowledged groups that are lost with the key.
    pub(crate) lost: Weak<dyn RecordLostGroups>,
}

/// What a shard has written since it was opened.
#[derive(Default)]
struct Written {
    groups: AtomicU64,
    bytes: AtomicU64,
}

/// A shard of an open Logstore.
pub(crate) struct Shard {
    context: Arc<ShardContext>,
    list: Arc<SegmentList>,
    env: Arc<WriteEnv>,
    commit: GroupCommit,
    writer: Mutex<SegmentWriter>,
    timers: Timers,
    written: Written,
    /// The last head up to which everything is synced, until the catalogue has it.
    unrecorded: Mutex<Option<Head>>,
    notices: Mutex<Vec<RecoveryNotice>>,
    lost: Mutex<Lost>,
    this: Weak<Self>,
}

impl Shard {
    pub(crate) fn new(
        context: Arc<ShardContext>,
        id: u32,
        dir: PathBuf,
        record: ShardRecord,
    ) -> Arc<Self> {
        let env = Arc::new(WriteEnv {
            shard: id,
            dir: dir.clone(),
            disk: Arc::clone(&context.disk),
            clock: Arc::clone(&context.clock),
            random: Arc::clone(&context.random),
            gate: Arc::clone(&context.gate),
            plan: Arc::clone(&context.plan),
            helpers: Arc::clone(&context.helpers),
            fence: context.fence.clone(),
            options: context.options,
        });
        Arc::new_cyclic(|this| Self {
            list: Arc::new(SegmentList::new(&context, id, dir, record)),
            commit: GroupCommit::new(context.options.block_bytes, context.options.linger),
            writer: Mutex::new(LockRank::ShardWriter, SegmentWriter::new(Arc::clone(&env))),
            env,
            context,
            timers: Timers::default(),
            written: Written::default(),
            unrecorded: Mutex::new(LockRank::ShardReached, None),
            notices: Mutex::new(LockRank::ShardNotices, Vec::new()),
            lost: Mutex::new(LockRank::ShardLost, Lost::default()),
            this: this.clone(),
        })
    }

    pub(crate) fn id(&self) -> u32 {
        self.list.shard()
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.context.read_only
    }

    fn name(&self) -> &LogstoreName {
        self.context.gate.name()
    }

    pub(crate) fn gate(&self) -> &Gate {
        &self.context.gate
    }

    /// Its segments, for a reader.
    pub(crate) fn list(&self) -> &Arc<SegmentList> {
        &self.list
    }

    fn commit(&self) -> &GroupCommit {
        &self.commit
    }

    fn permits(&self) -> &ReaderPermits {
        &self.context.permits
    }

    fn clock(&self) -> Arc<dyn Clock> {
        Arc::clone(&self.context.clock)
    }

    /// The notices of all recoveries since the shard was opened.
    pub(crate) fn notices(&self) -> Vec<RecoveryNotice> {
        lock(&self.notices).clone()
    }

    /// Adds the figures of the shard.
    pub(crate) fn add_to(&self, metrics: &mut LogstoreMetrics) {
        metrics.groups += self.written.groups.load(Ordering::Relaxed);
        metrics.bytes += self.written.bytes.load(Ordering::Relaxed);
        let (groups, bytes) = self.commit.queued();
        metrics.queued_groups += groups as u64;
        metrics.queued_bytes += bytes as u64;
    }

    // ---- a split or a merge ----

    /// Accepts no more groups, because other shards take the range of this one. Groups that it has
    /// accepted can still be written.
    pub(crate) fn retire(&self) {
        self.commit.retire();
    }

    /// Accepts groups again: the split or merge has failed.
    pub(crate) fn reinstate(&self) {
        self.commit.reinstate();
    }

    /// The shard is read-only for good. Its followers end once they have read everything.
    pub(crate) fn end(&self) {
        self.commit.end();
    }

    /// Fails the groups that were handed over and have no sequence number yet.
    pub(crate) fn refuse_handed_over(&self, error: &Error) {
        self.account(self.commit.refuse_handed_over(error));
    }

    // ---- heads ----

    /// Notes a head up to which everything is synced, to be recorded in the catalogue.
    fn reach(&self, head: Head) {
        self.list.set_head(head.clone());
        *lock(&self.unrecorded) = Some(head);
    }

    /// Takes the last head up to which everything is synced, unless it was taken before.
    pub(crate) fn take_reached(&self) -> Option<Head> {
        lock(&self.unrecorded).take()
    }

    /// Returns a head that could not be recorded, to be recorded later, unless there is a newer one
    /// by now.
    pub(crate) fn give_back(&self, head: Head) {
        lock(&self.unrecorded).get_or_insert(head);
    }

    /// Records the last synced head in the catalogue, so that the segments in front of it cannot be
    /// removed without detection.
    fn record_head(&self) -> Result<()> {
        let Some(head) = self.take_reached() else { return Ok(()) };
        let gate = &self.context.gate;
        match self.context.heads.record_head(gate.name(), gate.id(), self.id(), head.clone()) {
            Ok(()) => {
                self.list.note_head(&head);
                Ok(())
            }
            Err(error) => {
                self.give_back(head);
                Err(error)
            }
        }
    }

    // ---- segments, for the store ----

    pub(crate) fn record(&self) -> ShardRecord {
        self.list.record()
    }

    pub(crate) fn set_record(&self, record: ShardRecord) {
        self.list.set_record(record);
    }

    /// See [`SegmentList::note_first`].
    pub(crate) fn note_first(&self, first_ordinal: u64, first_seq: u64) {
        self.list.note_first(first_ordinal, first_seq);
    }

    /// See [`SegmentList::note_head`].
    pub(crate) fn note_head(&self, head: &Head) {
        self.list.note_head(head);
    }

    /// See [`SegmentList::segments`].
    pub(crate) fn segments(&self, refresh: bool) -> Result<Arc<Vec<SegmentRef>>> {
        self.list.segments(refresh)
    }

    /// The segments, including one that the writer was about to begin under keys that have been
    /// replaced since. Waits for the writer.
    pub(crate) fn settled_segments(&self) -> Result<Arc<Vec<SegmentRef>>> {
        drop(self.writer());
        self.list.segments(true)
    }

    /// The first segments that are missing and whose loss is not accepted.
    pub(crate) fn first_missing(&self) -> Result<Option<SegmentRef>> {
        let segments = self.list.segments(true)?;
        let is_missing = |one: &&SegmentRef| one.is_missing() && !self.is_lost(one.ordinal);
        Ok(segments.iter().find(is_missing).cloned())
    }

    /// See [`SegmentList::strangers`].
    pub(crate) fn strangers(&self) -> Result<Vec<PathBuf>> {
        self.list.strangers()
    }

    /// See [`SegmentList::open_listed`].
    pub(crate) fn open_listed(&self, name: &SegmentRef) -> Result<Option<Opened>> {
        self.list.open_listed(name)
    }

    /// As [`SegmentList::open_listed`], and opens a damaged segment for the blocks in front of the
    /// damage.
    pub(crate) fn open_readable(&self, name: &SegmentRef) -> Result<Option<Opened>> {
        match self.list.open_listed(name) {
            Err(lost) if lost.is_loss() => self.open_damaged(name, lost).map(Some),
            opened => opened,
        }
    }

    /// See [`SegmentList::open_damaged`].
    pub(crate) fn open_damaged(&self, name: &SegmentRef, cause: Error) -> Result<Opened> {
        self.list.open_damaged(name, cause)
    }

    /// See [`SegmentList::is_lost`].
    pub(crate) fn is_lost(&self, ordinal: u64) -> bool {
        self.list.is_lost(ordinal)
    }

    /// Whether an operator has accepted this error of a segment.
    pub(crate) fn has_accepted(&self, ordinal: u64, error: &Error) -> bool {
        self.list.has_accepted(ordinal, error)
    }

    /// The accepted losses.
    pub(crate) fn losses(&self) -> Vec<AcceptedLoss> {
        let record = self.list.record();
        record.losses.iter().map(|loss| AcceptedLoss::new(self.id(), loss)).collect()
    }

    /// See [`SegmentList::note_loss`].
    pub(crate) fn note_loss(&self, loss: Loss) {
        self.list.note_loss(loss);
    }

    /// Whether the end of a segment cannot change any more.
    pub(crate) fn is_sealed(&self, name: &SegmentRef) -> Result<bool> {
        Ok(matches!(self.list.open_segment(name)?.end, End::Sealed(_) | End::Cut(_)))
    }

    /// See [`SegmentList::key_source`].
    pub(crate) fn key_source(&self, name: &SegmentRef) -> Result<KeySource> {
        self.list.key_source(name)
    }

    /// See [`SegmentList::proved`].
    pub(crate) fn proved(&self, ordinal: u64) -> Result<Option<chain::Proved>> {
        self.list.proved(ordinal)
    }

    /// See [`SegmentList::proved_key_source`].
    pub(crate) fn proved_key_source(&self, name: &SegmentRef) -> Result<Option<KeySource>> {
        self.list.proved_key_source(name)
    }

    /// See [`SegmentList::agrees_with`].
    pub(crate) fn agrees_with(&self, head: &Head) -> Result<bool> {
        self.list.agrees_with(head)
    }

    /// See [`SegmentList::verify_footer`].
    pub(crate) fn verify_footer(&self, opened: &Opened) -> Result<()> {
        self.list.verify_footer(opened)
    }

    /// See [`rules::check_rules`].
    pub(crate) fn check_rules(&self, opened: &Opened) -> Result<()> {
        rules::check_rules(&self.list, opened)
    }

    /// See [`scanning::count`].
    pub(crate) fn count(&self, opened: &Opened, end: u64) -> Result<(Footer, u64)> {
        scanning::count(opened, end)
    }

    /// See [`scanning::data_end`].
    pub(crate) fn data_end(&self, opened: &Opened, from: u64, proof: Proof) -> Result<u64> {
        scanning::data_end(&self.list, opened, from, proof)
    }

    /// See [`reader::end_seq`].
    pub(crate) fn end_seq(&self) -> Result<u64> {
        reader::end_seq(&self.list)
    }

    /// See [`SegmentList::drop_before`].
    pub(crate) fn drop_before(&self, ordinal: u64) {
        self.list.drop_before(ordinal);
    }

    /// See [`SegmentList::make_names_durable`].
    pub(crate) fn make_names_durable(&self) -> Result<()> {
        self.list.make_names_durable()
    }

    /// See [`SegmentList::remove_leftovers`]. Leaves temporary files: the writer may be at work.
    pub(crate) fn remove_leftovers(&self) -> Result<(u64, u64)> {
        self.list.remove_leftovers(false)
    }

    /// See [`SegmentList::has_leftovers`].
    pub(crate) fn has_leftovers(&self) -> bool {
        self.list.has_leftovers()
    }
}

impl std::fmt::Debug for Shard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shard").field("id", &self.id()).finish_non_exhaustive()
    }
}

impl Task<ShardJob> for Shard {
    fn run(&self, job: ShardJob) {
        // A worker waits for no KMS: while one hangs, the shards of other Logstores need the
        // worker.
        if self.context.options.threads && !self.context.gate.decides_or_asks() {
            return self.schedule(KMS_RETRY_AFTER, job);
        }
        match job {
            ShardJob::Flush if self.context.options.threads => {
                self.flush_queued(false, KeyUse::InMemory);
            }
            ShardJob::Flush | ShardJob::FlushByKms => self.flush_queued(false, KeyUse::Admitted),
            ShardJob::FlushAll => self.flush_queued(true, KeyUse::Admitted),
            // The tickets of the groups have the error.
            ShardJob::Place => drop(self.place_handed_over()),
            ShardJob::Look => self.look(),
            ShardJob::Mark => self.mark_if_idle(),
            ShardJob::RollByAge => self.roll_if_old(),
            ShardJob::Abandon => self.abandon(),
            ShardJob::Reopen => self.reopen_if_room(),
        }
    }

    /// `Flush` waits for no KMS. The others wait for the writer, whose holder may call the KMS, or
    /// call it themselves.
    fn may_wait_for_a_kms(&self, job: ShardJob) -> bool {
        job != ShardJob::Flush && self.context.gate.may_call_a_kms()
    }
}
