//! One shard: an ordered run of segments, its writer, its readers, and its recovery.

mod chain;
mod driver;
mod hashing;
mod queue;
mod reader;
mod recovery;
mod rules;
mod segments;
mod ticket;
mod writer;

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    time::Duration,
};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tracing::error;

use crate::{
    Error, Result,
    config::LogstoreName,
    crypto::{HashAlg, Suite},
    epoch::Fence,
    group::{self, GROUP_BYTES_MAX, LogGroup},
    ids::{LogstoreId, SegmentId},
    io::{Clock, Disk, DiskFile, Random},
    keys::gate::Gate,
    metrics::Counters,
    segment::{BLOCK_GROUPS_MAX, BlockKind, Compression, KeySource},
    sync::{
        Condvar, LockRank, Mutex, RwLock,
        atomic::{AtomicBool, Ordering},
        lock, wait,
    },
};

pub(crate) use driver::Paused;
pub(crate) use hashing::PayloadHasher;
use queue::State;
pub(crate) use reader::{Load, ReaderPermits, SegmentReader};
pub use reader::{Position, ReadMode, ReadOptions, Reader, Record, RecordBlock};
pub use recovery::{RecoveryNotice, RepairReport};
pub(crate) use segments::{ActiveView, End, Opened, Proof, SegmentRef, is_segment_temporary, read_header};
pub use ticket::Ticket;
use writer::Writer;

/// What an append survives once it has returned, or its ticket is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// In memory. Survives nothing but the revocation of its key: a killed process loses up to the last 100 ms.
    Buffered,
    /// Written to the file: in the page cache. Survives the end of the process, not of the operating system.
    Written,
    /// Synced: survives a crash of the operating system and the loss of power, as far as the disk keeps its promises.
    #[default]
    Synced,
}

/// What can be appended.
#[derive(Clone, Debug)]
pub struct Payload {
    pub(crate) kind: BlockKind,
    pub(crate) bytes: Bytes,
    pub(crate) logs: u32,
}

impl Payload {
    /// A log group that is encoded already (the `LogGroup` protobuf), stored byte for byte.
    ///
    /// # Errors
    /// [`Error::InvalidGroup`] when the bytes are not a log group with at least one log, within the limits.
    pub fn encoded(group: impl Into<Bytes>) -> Result<Self> {
        let bytes = group.into();
        let summary = group::validate_group(&bytes)?;
        Ok(Self { kind: BlockKind::Groups, bytes, logs: summary.logs })
    }

    /// Bytes of the caller's own, which the engine does not look into. May be empty.
    ///
    /// # Errors
    /// [`Error::TooLarge`] beyond [`GROUP_BYTES_MAX`].
    pub fn opaque(bytes: impl Into<Bytes>) -> Result<Self> {
        let bytes = bytes.into();
        if bytes.len() > GROUP_BYTES_MAX {
            return Err(Error::TooLarge {
                what: "opaque record (bytes)",
                size: bytes.len() as u64,
                limit: GROUP_BYTES_MAX as u64,
            });
        }
        Ok(Self { kind: BlockKind::Opaque, bytes, logs: 0 })
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

impl TryFrom<&LogGroup> for Payload {
    type Error = Error;

    fn try_from(group: &LogGroup) -> Result<Self> {
        Self::encoded(group.encode_to_bytes())
    }
}

/// Where an appended group is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Appended {
    /// The shard.
    pub shard: u32,
    /// The sequence number within the shard.
    pub seq: u64,
}

/// What is to be done later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Job {
    /// Write what has lingered in the queue.
    Flush,
    /// Write everything that is queued.
    FlushAll,
    /// Write a mark block, if nothing has carried the mark since.
    Mark,
    /// Roll the active segment, if it is old enough.
    RollByAge,
    /// Note how far the shards are.
    Heads,
    /// Drop what retention allows to drop.
    Retention,
}

/// Something that can be scheduled.
pub(crate) trait Task: Send + Sync {
    fn run(&self, job: Job);
}

/// Schedules tasks.
pub(crate) trait Wake: Send + Sync {
    fn after(&self, delay: Duration, task: Weak<dyn Task>, job: Job);

    /// Writes everything that is queued anywhere, in this thread: for a store without threads whose memory is used up.
    fn relieve(&self);
}

/// Notes durably, outside the shard, how far it is.
pub(crate) trait RecordHead: Send + Sync {
    /// Returns when `head` is durable on record.
    ///
    /// # Errors
    /// What kept it from being recorded. The shard must not go on.
    fn record_head(&self, logstore: &LogstoreName, id: LogstoreId, shard: u32, head: Head) -> Result<()>;
}

/// Says whether groups may be appended at all.
pub(crate) trait AdmitAppend: Send + Sync {
    /// Called for each append.
    ///
    /// # Errors
    /// Why they may not.
    fn admit_append(&self) -> Result<()>;
}

/// The settings that concern a shard.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ShardOptions {
    pub(crate) block_bytes: usize,
    pub(crate) linger: Duration,
    pub(crate) segment_bytes: u64,
    pub(crate) segment_age: Duration,
    /// Whether there are threads that work off what is scheduled.
    pub(crate) threads: bool,
}

/// What new blocks are sealed with; changed as a whole when the configuration or the keys change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WritePlan {
    pub(crate) suite: Suite,
    pub(crate) key_source: KeySource,
    pub(crate) compression: Compression,
    pub(crate) payload_hash: HashAlg,
    pub(crate) generation: u64,
}

/// What the catalogue knows of a shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ShardRecord {
    /// The first segment that retention has not dropped.
    pub(crate) first_ordinal: u64,
    /// The first sequence number that retention has not dropped.
    pub(crate) first_seq: u64,
    /// How far the shard was at the last clean close or checkpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) head: Option<Head>,
}

impl Default for ShardRecord {
    fn default() -> Self {
        Self { first_ordinal: 1, first_seq: 0, head: None }
    }
}

/// A point that a shard has reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Head {
    pub(crate) ordinal: u64,
    pub(crate) segment: SegmentId,
    /// Whether the segment was sealed: then it ends there, and what follows is in its successor.
    pub(crate) sealed: bool,
    pub(crate) blocks: u32,
    /// Sealed: the length of the file. Otherwise: where the last of the blocks ends.
    pub(crate) bytes: u64,
    pub(crate) end_seq: u64,
    /// The first sequence number that the next segment may use.
    pub(crate) next_seq: u64,
    /// When the last group was received up to there: see [`crate::segment::PredecessorEnd::last_time_us`].
    pub(crate) last_time_us: u64,
    #[serde(with = "crate::ids::hex")]
    pub(crate) digest: [u8; 32],
}

impl Head {
    /// How far it is, to be compared with another head of the shard.
    pub(crate) fn reach(&self) -> (u64, bool, u32) {
        (self.ordinal, self.sealed, self.blocks)
    }
}

/// The memory that groups waiting to be written may take in the whole store.
pub(crate) struct Budget {
    limit: usize,
    used: Mutex<usize>,
    released: Condvar,
}

impl Budget {
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, used: Mutex::new(LockRank::Budget, 0), released: Condvar::new() })
    }

    /// Takes `bytes`; a single request larger than the whole budget is let in alone.
    fn try_take(&self, bytes: usize) -> bool {
        let mut used = lock(&self.used);
        let fits = *used == 0 || *used + bytes <= self.limit;
        if fits {
            *used += bytes;
        }
        fits
    }

    fn take_waiting(&self, bytes: usize) {
        let mut used = lock(&self.used);
        while *used > 0 && *used + bytes > self.limit {
            used = wait(&self.released, used);
        }
        *used += bytes;
    }

    fn release(&self, bytes: usize) {
        if bytes > 0 {
            *lock(&self.used) -= bytes;
            self.released.notify_all();
        }
    }

    pub(crate) fn used(&self) -> usize {
        *lock(&self.used)
    }
}

/// What a shard is given by its Logstore.
pub(crate) struct ShardContext {
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) random: Arc<dyn Random>,
    pub(crate) wake: Arc<dyn Wake>,
    pub(crate) budget: Arc<Budget>,
    pub(crate) hasher: Arc<PayloadHasher>,
    pub(crate) gate: Arc<Gate>,
    pub(crate) options: ShardOptions,
    pub(crate) read_only: bool,
    /// Takes the head of each segment that is sealed when the shard rolls.
    pub(crate) heads: Arc<dyn RecordHead>,
    /// Looked at before a write or a sync is acknowledged; `None` for a read-only opener.
    pub(crate) fence: Option<Arc<Fence>>,
    /// Asked before each append; `None` where nothing limits them.
    pub(crate) limit: Option<Arc<dyn AdmitAppend>>,
    /// Kept current by the Logstore.
    pub(crate) plan: Arc<RwLock<WritePlan>>,
    /// How many readers there may be.
    pub(crate) permits: Arc<ReaderPermits>,
    /// For a read-only opener.
    pub(crate) reload: Option<ReloadRecord>,
}

/// Reads anew what the catalogue knows of a shard.
pub(crate) type ReloadRecord = Box<dyn Fn(u32) -> Result<ShardRecord> + Send + Sync>;

/// A shard of an open Logstore.
pub(crate) struct Shard {
    context: Arc<ShardContext>,
    id: u32,
    dir: PathBuf,
    record: RwLock<ShardRecord>,
    /// The segments by ordinal; `None` until they were listed.
    segments: RwLock<Option<Arc<Vec<SegmentRef>>>>,
    state: Mutex<State>,
    progress: Condvar,
    writer: Mutex<Writer>,
    notices: Mutex<Vec<RecoveryNotice>>,
    /// What is proved of its segments without a key.
    chain: chain::Chain,
    /// How far it is synced, until the catalogue has noted that.
    reached: Mutex<Option<Head>>,
    /// Whether files that are not needed any more could not be removed.
    leftovers: AtomicBool,
    this: Weak<Shard>,
}

impl Shard {
    pub(crate) fn new(context: Arc<ShardContext>, id: u32, dir: PathBuf, record: ShardRecord) -> Arc<Self> {
        Arc::new_cyclic(|this| Self {
            context,
            id,
            dir,
            record: RwLock::new(LockRank::ShardRecord, record),
            segments: RwLock::new(LockRank::ShardSegments, None),
            state: Mutex::new(LockRank::ShardState, State::default()),
            progress: Condvar::new(),
            writer: Mutex::new(LockRank::ShardWriter, Writer::default()),
            notices: Mutex::new(LockRank::ShardNotices, Vec::new()),
            chain: chain::Chain::default(),
            reached: Mutex::new(LockRank::ShardReached, None),
            leftovers: AtomicBool::new(false),
            this: this.clone(),
        })
    }

    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    fn name(&self) -> &LogstoreName {
        self.context.gate.name()
    }

    pub(crate) fn record(&self) -> ShardRecord {
        crate::sync::read(&self.record).clone()
    }

    pub(crate) fn gate(&self) -> &Gate {
        &self.context.gate
    }

    pub(crate) fn set_record(&self, record: ShardRecord) {
        *crate::sync::write(&self.record) = record;
    }

    /// Keeps a point up to which everything is synced, to be noted in the catalogue.
    fn reach(&self, head: Head) {
        // A recovery by this process keeps it, whether the catalogue says so yet or not.
        crate::sync::write(&self.record).head = Some(head.clone());
        *lock(&self.reached) = Some(head);
    }

    /// Gives back a point that could not be noted in the catalogue, to be noted later, unless the shard is further by now.
    pub(crate) fn give_back(&self, head: Head) {
        lock(&self.reached).get_or_insert(head);
    }

    /// The last point up to which everything is synced, unless it was asked for before.
    pub(crate) fn take_reached(&self) -> Option<Head> {
        lock(&self.reached).take()
    }

    fn counters(&self) -> &Counters {
        &self.context.gate.context().counters
    }

    /// Syncs the file of a segment, and counts it.
    fn sync_file(&self, file: &dyn DiskFile, path: &Path) -> Result<()> {
        self.counters().syncs.fetch_add(1, Ordering::Relaxed);
        file.sync_data().map_err(|cause| {
            self.counters().sync_failures.fetch_add(1, Ordering::Relaxed);
            error!(logstore = %self.name(), shard = self.id, path = %path.display(), error = %cause, "a sync has failed");
            Error::io("sync", path)(cause)
        })
    }

    /// What recovery had to report since the shard was opened.
    pub(crate) fn notices(&self) -> Vec<RecoveryNotice> {
        lock(&self.notices).clone()
    }
}

impl std::fmt::Debug for Shard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shard").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Task for Shard {
    fn run(&self, job: Job) {
        match job {
            Job::Flush => self.flush_queued(false),
            Job::FlushAll => self.flush_queued(true),
            Job::Mark => self.mark_if_idle(),
            Job::RollByAge => self.roll_if_old(),
            Job::Retention | Job::Heads => {}
        }
    }
}

/// The most groups that one block takes.
const BLOCK_GROUPS: usize = BLOCK_GROUPS_MAX as usize;
