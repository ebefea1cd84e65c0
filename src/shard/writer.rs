//! The segment files that this process writes: segments begun, blocks sealed and written, segments
//! sealed.
//!
//! A [`SegmentWriter`] takes no lock of the shard. It is handed everything it needs in a
//! [`WriteEnv`], and returns the results that other parts of the shard must learn of.
//!
//! It does not sync the active segment itself. It names the bytes to be synced ([`Unsynced`]), and
//! the caller syncs them without the lock of the writer: an fsync may take very long, and the
//! deadline of a lost key does not wait for it.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tracing::{debug, error, trace_span, warn};

use super::{
    CurrentPlan, ShardOptions, WritePlan,
    active::ActiveView,
    commit::{CLOCK_SLACK_US, Pending, Reserved},
    draft::{Draft, Run},
    hashing::PayloadHash,
    helpers::{Helpers, Scratch},
    listing::SegmentRef,
    record::Head,
};
use crate::{
    Error, Result,
    crypto::{CryptoError, SegmentCipher},
    epoch::Fence,
    ids::SegmentId,
    io::{Clock, Disk, DiskFile, Random, Temporary},
    keys::gate::Gate,
    metrics::Counters,
    segment::{
        BlockHeader, BlockKind, Compression, DecodedHeader, Features, FooterBuilder, KeySource,
        Predecessor, SealBuffer, SegmentHeader, SegmentName,
    },
    sync::atomic::Ordering,
};

/// How many sequence numbers a segment reserves. After an unclean end the next one starts behind
/// them.
pub(super) const RESERVED_SEQS: u64 = 1 << 32;
/// A segment that has used this many rolls, long before its reserve runs out.
const SEQS_PER_SEGMENT: u64 = 1 << 31;
/// After how many blocks an fsync is not put off any longer to be shared with more.
const BLOCKS_PER_SYNC: u32 = 16;

/// The environment that segments are written in.
pub(super) struct WriteEnv {
    pub(super) shard: u32,
    pub(super) dir: PathBuf,
    pub(super) disk: Arc<dyn Disk>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) random: Arc<dyn Random>,
    pub(super) gate: Arc<Gate>,
    pub(super) plan: Arc<CurrentPlan>,
    pub(super) helpers: Arc<Helpers>,
    pub(super) fence: Option<Arc<Fence>>,
    pub(super) options: ShardOptions,
}

impl WriteEnv {
    /// The suite, keys and compression for new blocks, as they are now.
    pub(super) fn plan(&self) -> WritePlan {
        self.plan.get()
    }

    /// Checks that no other writer has taken over the store. Must succeed before a write or a sync
    /// is acknowledged.
    pub(super) fn check_fence(&self) -> Result<()> {
        self.fence.as_ref().map_or(Ok(()), |fence| fence.check())
    }

    /// Syncs the file of a segment, and counts it.
    pub(super) fn sync_file(&self, file: &dyn DiskFile, path: &Path) -> Result<()> {
        let _span =
            trace_span!("fsync", logstore = %self.gate.name(), shard = self.shard).entered();
        let began = self.clock.uptime();
        let synced = file.sync_data();
        self.counters().synced(self.clock.uptime().saturating_sub(began));
        synced.map_err(|cause| {
            self.counters().sync_failures.fetch_add(1, Ordering::Relaxed);
            let (logstore, path_shown) = (self.gate.name(), path.display());
            error!(%logstore, shard = self.shard, path = %path_shown, error = %cause, "fsync failed");
            Error::io("sync", path)(cause)
        })
    }

    pub(super) fn counters(&self) -> &Counters {
        &self.gate.context().counters
    }

    /// Random bytes for the segment in `path`.
    pub(super) fn draw<const N: usize>(&self, path: &Path) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.random.fill(&mut bytes).map_err(Error::io("draw a random nonce for", path))?;
        Ok(bytes)
    }
}

/// How keys are used.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum KeyUse {
    /// As the lease admits.
    Admitted,
    /// As the lease admits. A segment begins only under a data key that is in memory: the thread
    /// waits for no KMS.
    InMemory,
    /// Although the lease was lost, as long as they are in memory: to seal acknowledged groups.
    Held,
}

/// Where the next segment begins.
#[derive(Clone, Debug)]
pub(super) struct Next {
    pub(super) ordinal: u64,
    pub(super) first_seq: u64,
    pub(super) predecessor: Predecessor,
    /// How often receive times have gone back in the shard so far.
    pub(super) setbacks: u32,
    /// The latest receive time in the shard so far, in microseconds since the Unix epoch.
    pub(super) latest_us: u64,
}

impl Next {
    /// Behind the segment with this header, which ends as `predecessor` says.
    pub(super) fn behind(header: &SegmentHeader, first_seq: u64, predecessor: Predecessor) -> Self {
        let (ordinal, setbacks) = (header.ordinal + 1, header.setbacks);
        let next = Self { ordinal, first_seq, predecessor, setbacks, latest_us: 0 };
        Self { latest_us: header.latest_before_us().max(next.last_time_us()), ..next }
    }

    /// The receive time of the last group so far.
    fn last_time_us(&self) -> u64 {
        match &self.predecessor {
            Predecessor::None => 0,
            Predecessor::Sealed(end) | Predecessor::Cut(end) => end.last_time_us,
        }
    }
}

/// Bytes of the active segment that are to be synced.
pub(super) struct Unsynced {
    file: Arc<dyn DiskFile>,
    path: Arc<Path>,
    /// The segment, which may have been given up when the sync returns.
    pub(super) segment: SegmentId,
    /// Where they end.
    end: u64,
}

impl Unsynced {
    /// Syncs the file.
    pub(super) fn sync(&self, env: &WriteEnv) -> Result<()> {
        env.sync_file(&*self.file, &self.path)
    }
}

/// Writes the active segment. The leader has it to itself.
pub(super) struct SegmentWriter {
    env: Arc<WriteEnv>,
    active: Option<Active>,
    /// Where the next segment begins, once that is known.
    next: Option<Next>,
    blocks_unsynced: u32,
    scratch: Scratch,
}

impl SegmentWriter {
    pub(super) fn new(env: Arc<WriteEnv>) -> Self {
        Self { env, active: None, next: None, blocks_unsynced: 0, scratch: Scratch::default() }
    }

    /// Whether a segment is open.
    pub(super) fn is_open(&self) -> bool {
        self.active.is_some()
    }

    /// Whether a segment is open and holds a block.
    pub(super) fn has_blocks(&self) -> bool {
        self.active.as_ref().is_some_and(|active| active.blocks > 0)
    }

    /// Whether a segment is open, of the suite and the payload hash and under the key that new ones
    /// are to have.
    pub(super) fn is_as_planned(&self) -> bool {
        self.active.as_ref().is_some_and(|active| active.is_as(&self.env.plan()))
    }

    /// The id of the active segment.
    pub(super) fn segment(&self) -> Option<SegmentId> {
        self.active.as_ref().map(|active| active.segment.header.segment)
    }

    /// How often the key had been lost when the active segment was begun.
    pub(super) fn begun_after(&self) -> Option<u64> {
        self.active.as_ref().map(|active| active.segment.losses)
    }

    /// Whether a thread syncs the active segment without the lock of the writer.
    pub(super) fn is_syncing(&self) -> bool {
        self.active.as_ref().is_some_and(|active| active.syncing)
    }

    /// Notes whether a thread syncs the active segment without the lock of the writer.
    pub(super) fn set_syncing(&mut self, syncing: bool) {
        if let Some(active) = &mut self.active {
            active.syncing = syncing;
        }
    }

    /// The key source of the active segment.
    pub(super) fn key_source(&self) -> Option<KeySource> {
        self.active.as_ref().map(|active| active.segment.header.key_source)
    }

    /// How long until the active segment is so old that it must be rolled; zero if it is.
    pub(super) fn rolls_in(&self) -> Option<Duration> {
        let env = &self.env;
        self.active.as_ref().map(|active| {
            (active.began + env.options.segment_age).saturating_sub(env.clock.uptime())
        })
    }

    /// The sequence numbers that the active segment reserves.
    pub(super) fn reserved(&self) -> Option<Reserved> {
        self.active.as_ref().map(|active| Reserved {
            end_seq: active.end_seq,
            limit_seq: active.segment.header.limit_seq,
            last_time_us: active.last_time_us,
            losses: active.segment.losses,
        })
    }

    /// Where the next segment begins, once that is known.
    pub(super) fn next(&self) -> Option<&Next> {
        self.next.as_ref()
    }

    pub(super) fn set_next(&mut self, next: Next) {
        self.next = Some(next);
    }

    /// Whether so many blocks are written and not synced that the next fsync must not be put off.
    pub(super) fn owes_sync(&self) -> bool {
        self.blocks_unsynced >= BLOCKS_PER_SYNC
    }

    /// Whether the active segment takes another block, whose first group was received at
    /// `first_time_us`. If it does, it takes the current compression over for that block.
    pub(super) fn takes_another_block(&mut self, first_time_us: u64) -> bool {
        let (plan, options) = (self.env.plan(), &self.env.options);
        let Some(active) = &mut self.active else { return false };
        let full = active.offset >= options.segment_bytes.min(plan.segment_bytes_max)
            || active.end_seq - active.segment.header.first_seq >= SEQS_PER_SEGMENT
            || active.blocks >= u32::MAX - 2;
        let old = self.env.clock.uptime() >= active.began + options.segment_age;
        // Receive times do not go back within a segment.
        let back = first_time_us < active.last_time_us;
        let takes = !full && !old && !back && active.is_as(&plan);
        if takes {
            active.plan = plan;
        }
        takes
    }

    /// Begins to make blocks of `batches`. Helpers take a share of the work.
    pub(super) fn begin_run(&self, batches: Vec<Vec<Pending>>) -> Run {
        Run::new(&self.env.helpers, batches, self.env.plan().compression)
    }

    /// The next draft of `run`.
    pub(super) fn next_draft(&mut self, run: &mut Run) -> Option<Draft> {
        run.next(&mut self.scratch)
    }

    /// The batches that are left of `run`.
    pub(super) fn end_run(&mut self, run: Run) -> Vec<Pending> {
        run.into_rest(&mut self.scratch)
    }

    /// Writes a block to the active segment. Leaves the batch of `draft` in its place.
    pub(super) fn write_block(&mut self, draft: &mut Draft, keys: KeyUse) -> Result<()> {
        // After a loss of the key no segment is begun for times that go back.
        if let Some(active) = &self.active
            && draft.first_time_us < active.last_time_us
        {
            draft.raise(active.last_time_us, &mut self.scratch);
        }
        let mut buffer = std::mem::take(&mut draft.buffer);
        let (Some(first), Some(active)) = (draft.batch.first(), &mut self.active) else {
            buffer.wipe();
            return Err(Error::Closed("the active segment"));
        };
        let nonce_random = self.env.draw(&active.segment.path).inspect_err(|_| buffer.wipe())?;
        let logs = draft.batch.iter().map(|pending| pending.group.logs);
        let header = BlockHeader {
            kind: first.group.kind,
            compression: draft.compression,
            segment_tag: active.segment.header.segment_tag(),
            number: active.blocks,
            payload_len: buffer.payload_len() as u32,
            raw_len: draft.raw_len,
            group_count: draft.batch.len() as u32,
            log_count: logs.fold(0, u32::saturating_add),
            list_len: draft.list_len,
            first_seq: first.seq,
            first_time_us: draft.first_time_us,
            last_time_us: draft.last_time_us,
            durable_mark: active.durable,
            nonce_random,
        };
        active.append(&self.env, buffer, &header, keys)?;
        self.blocks_unsynced += 1;
        Ok(())
    }

    /// Writes a block that only carries the durable mark, unless the last block carries it already.
    pub(super) fn write_mark(&mut self) -> Result<()> {
        let Some(active) = &mut self.active else { return Ok(()) };
        if active.marked == active.durable || active.offset == active.segment.header.body_start {
            return Ok(());
        }
        let mut buffer = self.env.helpers.buffer();
        buffer.begin();
        let header = BlockHeader {
            kind: BlockKind::Mark,
            compression: Compression::None,
            segment_tag: active.segment.header.segment_tag(),
            number: active.blocks,
            payload_len: 0,
            raw_len: 0,
            group_count: 0,
            log_count: 0,
            list_len: 0,
            first_seq: active.end_seq,
            first_time_us: active.last_time_us,
            last_time_us: active.last_time_us,
            durable_mark: active.durable,
            nonce_random: self.env.draw(&active.segment.path)?,
        };
        active.append(&self.env, buffer, &header, KeyUse::Admitted)
    }

    /// Begins a sync of the active segment: its blocks so far. `None` if no segment is open.
    pub(super) fn begin_sync(&mut self) -> Option<Unsynced> {
        self.blocks_unsynced = 0;
        self.active.as_ref().map(Active::unsynced)
    }

    /// As [`SegmentWriter::begin_sync`], for a segment that is to be sealed. `None` if its blocks
    /// are synced.
    pub(super) fn begin_sync_of_blocks(&self) -> Option<Unsynced> {
        let active = self.active.as_ref()?;
        (active.durable < active.offset).then(|| active.unsynced())
    }

    /// The active segment is synced. Returns the head behind it.
    pub(super) fn end_sync(&mut self, synced: &Unsynced) -> Option<Head> {
        let active = self.active.as_mut()?;
        active.durable = synced.end;
        Some(active.view.head())
    }

    /// Begins the segment that [`SegmentWriter::next`] describes: under a temporary name, durable,
    /// then under its own name. Its first group was received at `first_time_us`, if that is known.
    /// Returns its entry for the list of segments.
    pub(super) fn begin(&mut self, keys: KeyUse, first_time_us: Option<u64>) -> Result<SegmentRef> {
        let Some(next) = &self.next else { return Err(Error::Closed("the active segment")) };
        let (env, plan) = (&self.env, self.env.plan());
        let new = NewSegment::create(env, next, &plan, keys, first_time_us)?;
        new.publish(env).inspect_err(|_| env.gate.end_segment(new.header().segment))?;
        let segment = SegmentFile { path: new.path, ..new.segment };
        let view = ActiveView::new(Arc::clone(&segment.file), Arc::clone(&segment.header));
        env.counters().segments_begun.fetch_add(1, Ordering::Relaxed);
        let (logstore, suite) = (env.gate.name(), plan.suite.name());
        debug!(%logstore, shard = env.shard, ordinal = next.ordinal, suite, "segment begun");
        if segment.header.is_setback() {
            let (last_us, shard) = (next.last_time_us(), env.shard);
            warn!(%logstore, shard, last_us, "clock behind the last receive time; segment begun");
        }
        let name = SegmentRef { active: Some(Arc::clone(&view)), ..segment.name() };
        let body_start = segment.header.body_start;
        let last_time_us = if segment.header.is_setback() { 0 } else { next.last_time_us() };
        self.active = Some(Active {
            segment,
            view,
            plan,
            offset: body_start,
            blocks: 0,
            durable: body_start,
            marked: body_start,
            last_time_us,
            end_seq: next.first_seq,
            began: env.clock.uptime(),
            syncing: false,
        });
        Ok(name)
    }

    /// Writes the footer of the active segment, whose blocks are synced: a footer that survives a
    /// crash proves that they did. Returns the head behind it, and the bytes to be synced before
    /// [`SegmentWriter::end_segment`]; `None` if no segment is open.
    pub(super) fn write_footer(&mut self, keys: KeyUse) -> Result<Option<(Head, Unsynced)>> {
        let Some(active) = &self.active else { return Ok(None) };
        let (env, builder) = (&self.env, active.view.builder());
        let head = active.segment.write_footer(env, &builder, active.offset, false, keys)?;
        Ok(Some((head, active.unsynced())))
    }

    /// The footer is synced: the active segment has ended with this head. Returns the head.
    pub(super) fn end_segment(&mut self, head: Head) -> Head {
        let Some(active) = self.active.take() else { return head };
        let env = &self.env;
        env.counters().segments_sealed.fetch_add(1, Ordering::Relaxed);
        let (logstore, bytes) = (env.gate.name(), head.bytes);
        debug!(%logstore, shard = env.shard, ordinal = head.ordinal, bytes, "segment sealed");
        env.gate.end_segment(head.segment);
        let predecessor = Predecessor::Sealed(head.clone().into_end());
        self.next = Some(Next::behind(&active.segment.header, head.next_seq, predecessor));
        // If the next segment cannot be begun, the shard continues at this limit: queued groups may
        // have numbers behind the end of this segment.
        Head { next_seq: active.segment.header.limit_seq, ..head }
    }

    /// Gives the active segment up after a failure. Returns whether there was one.
    pub(super) fn abandon(&mut self) -> bool {
        self.next = None;
        let active = self.active.take();
        active
            .as_ref()
            .inspect(|active| self.env.gate.end_segment(active.segment.header.segment))
            .is_some()
    }

    /// Overwrites the plaintext of the last blocks.
    pub(super) fn wipe(&mut self) {
        self.scratch.wipe();
        self.env.helpers.wipe();
    }

    /// The head of the shard, as far as this writer knows it.
    pub(super) fn head(&self) -> Option<Head> {
        if let Some(active) = &self.active {
            return Some(active.view.head());
        }
        match &self.next {
            Some(Next { predecessor: Predecessor::Sealed(end), first_seq, .. }) => {
                Some(Head::behind(end, *first_seq))
            }
            _ => None,
        }
    }
}

/// The segment that is being written.
struct Active {
    segment: SegmentFile,
    view: Arc<ActiveView>,
    plan: WritePlan,
    /// Where the next block goes.
    offset: u64,
    blocks: u32,
    /// Up to where the file is durable.
    durable: u64,
    /// The durable mark that the last block carries.
    marked: u64,
    /// No later group gets an earlier receive time.
    last_time_us: u64,
    end_seq: u64,
    /// When it was begun, by the uptime.
    began: Duration,
    /// Whether a thread syncs it without the lock of the writer.
    syncing: bool,
}

impl Active {
    fn is_as(&self, plan: &WritePlan) -> bool {
        let of = |plan: &WritePlan| (plan.suite, plan.key_source, plan.payload_hash);
        of(&self.plan) == of(plan)
    }

    fn unsynced(&self) -> Unsynced {
        let SegmentFile { file, path, header, .. } = &self.segment;
        let (file, path) = (Arc::clone(file), Arc::clone(path));
        Unsynced { file, path, segment: header.segment, end: self.offset }
    }

    /// Seals the block in `buffer` and writes it at the end. Changes nothing unless all of it
    /// succeeds.
    fn append(
        &mut self,
        env: &WriteEnv,
        mut buffer: SealBuffer,
        header: &BlockHeader,
        keys: KeyUse,
    ) -> Result<()> {
        let written = self.segment.write_block(env, &mut buffer, header, self.offset, keys);
        // Unless the block was sealed, the buffer has its plaintext.
        let (tag, end) = written.inspect_err(|_| buffer.wipe())?;
        let algorithm = self.segment.header.payload_hash;
        let payload_hash = PayloadHash::of(&env.helpers, algorithm, buffer);
        self.view.add(self.offset, header, payload_hash, &tag, end);
        env.counters().appended(self.segment.header.suite, header.list_len.into());
        self.offset = end;
        self.blocks += 1;
        self.marked = header.durable_mark;
        self.end_seq = header.end_seq().max(self.end_seq);
        self.last_time_us = header.last_time_us;
        Ok(())
    }
}

/// The file of a segment that is not sealed yet.
struct SegmentFile {
    file: Arc<dyn DiskFile>,
    path: Arc<Path>,
    header: Arc<DecodedHeader>,
    /// How often the key had been lost when it was begun.
    losses: u64,
}

impl SegmentFile {
    /// Seals the block in `buffer` and writes it at `offset`. Returns its tag, and where it ends.
    fn write_block(
        &self,
        env: &WriteEnv,
        buffer: &mut SealBuffer,
        header: &BlockHeader,
        offset: u64,
        keys: KeyUse,
    ) -> Result<([u8; 16], u64)> {
        let sealing = buffer.with_header(&self.header.header_hash, header);
        let nonce = header.nonce();
        let tag = self.with_key(env, keys, |cipher| {
            cipher.seal_block(&nonce, sealing, SealBuffer::PAYLOAD_AT)
        })?;
        let bytes = buffer.finish(&tag);
        self.file.write_at(bytes, offset).map_err(Error::io("write a block to", &*self.path))?;
        Ok((tag, offset + bytes.len() as u64))
    }

    /// Writes the footer behind the blocks that `builder` has counted, which end at `offset`.
    /// Returns the head behind the segment.
    fn write_footer(
        &self,
        env: &WriteEnv,
        builder: &FooterBuilder,
        offset: u64,
        recovered: bool,
        keys: KeyUse,
    ) -> Result<Head> {
        let path = &*self.path;
        let footer = builder.build(offset, env.draw(path)?, recovered);
        let encoded = footer.encode();
        let nonce = footer.nonce();
        let tag = self.with_key(env, keys, |cipher| cipher.tag_only(&nonce, &encoded))?;
        let bytes = footer.finish(encoded, &tag);
        // A sealed segment ends with its footer.
        if self.file.len().map_err(Error::io("get the length of", path))? > offset {
            self.file.set_len(offset).map_err(Error::io("cut", path))?;
        }
        self.file.write_at(&bytes, offset).map_err(Error::io("write the footer of", path))?;
        Ok(Head::sealed(&self.header, &footer, offset + bytes.len() as u64))
    }

    fn with_key<R>(
        &self,
        env: &WriteEnv,
        keys: KeyUse,
        use_it: impl FnOnce(&SegmentCipher) -> std::result::Result<R, CryptoError>,
    ) -> Result<R> {
        match keys {
            KeyUse::Admitted | KeyUse::InMemory => {
                env.gate.with_cipher(&self.header, &self.path, |cipher| {
                    use_it(cipher).map_err(Error::Crypto)
                })
            }
            KeyUse::Held => {
                let used = env.gate.with_held(self.header.segment, use_it);
                used.ok_or(Error::Closed("the data key"))?.map_err(Error::Crypto)
            }
        }
    }

    /// Its entry for the list of segments.
    fn name(&self) -> SegmentRef {
        SegmentRef {
            ordinal: self.header.ordinal,
            missing_to: None,
            first_seq: self.header.first_seq,
            epoch: self.header.epoch,
            path: Arc::clone(&self.path),
            active: None,
            sealed: None,
        }
    }
}

/// A segment that does not have its name yet.
pub(super) struct NewSegment {
    /// Has the temporary name.
    segment: SegmentFile,
    /// The name that it will have.
    path: Arc<Path>,
}

impl NewSegment {
    /// Draws a salt, derives the key, and writes the header to a temporary file. The gate keeps the
    /// key until [`Gate::end_segment`]. Receive times go back if the first group, or else the clock,
    /// is behind the last group before the segment.
    pub(super) fn create(
        env: &WriteEnv,
        next: &Next,
        plan: &WritePlan,
        keys: KeyUse,
        first_time_us: Option<u64>,
    ) -> Result<Self> {
        let (now_us, last_us) = (env.clock.wall_us(), next.last_time_us());
        let begins_us = first_time_us.unwrap_or(now_us.saturating_add(CLOCK_SLACK_US));
        let back = begins_us < last_us;
        let setbacks = next.setbacks.saturating_add(back.into());
        let epoch = env.fence.as_ref().map_or(0, |fence| fence.epoch());
        let name = SegmentName { ordinal: next.ordinal, epoch, first_seq: next.first_seq };
        let path: Arc<Path> = env.dir.join(name.to_string()).into();
        let used_up = || Error::TooMany { what: "sequence numbers", limit: u64::MAX };
        let limit_seq = next.first_seq.checked_add(RESERVED_SEQS).ok_or_else(used_up)?;
        let header = SegmentHeader {
            suite: plan.suite,
            features: Features::default(),
            shard: env.shard,
            store: env.gate.context().store,
            logstore: env.gate.id(),
            segment: SegmentId::from_bytes(env.draw(&path)?),
            generation: plan.generation,
            ordinal: next.ordinal,
            first_seq: next.first_seq,
            limit_seq,
            created_us: if back { first_time_us.unwrap_or(now_us) } else { now_us.max(last_us) },
            key_source: plan.key_source,
            salt: env.draw(&path)?,
            predecessor: next.predecessor,
            payload_hash: plan.payload_hash,
            setbacks,
            epoch,
            latest_us: if setbacks > 0 { next.latest_us } else { 0 },
            extensions: Vec::new(),
        };
        let encoded = header.encode();
        let hash = header.hash(&encoded);
        let (commitment, losses) =
            env.gate.begin_segment(&header, &hash, keys != KeyUse::InMemory)?;
        let bytes = SegmentHeader::finish(encoded, &commitment);
        let create = || -> Result<SegmentFile> {
            let Temporary { file, path: temporary } =
                Temporary::create(&*env.disk, &path.with_extension(""))
                    .map_err(Error::io("create a temporary file for", &*path))?;
            file.write_at(&bytes, 0).map_err(Error::io("write the header of", &*temporary))?;
            let header =
                SegmentHeader::decode(&bytes).map_err(|error| error.in_file(&temporary, 0))?;
            Ok(SegmentFile { file, path: temporary.into(), header: Arc::new(header), losses })
        };
        let segment = create().inspect_err(|_| env.gate.end_segment(header.segment))?;
        Ok(Self { segment, path })
    }

    pub(super) fn header(&self) -> &Arc<DecodedHeader> {
        &self.segment.header
    }

    /// Seals the block in `buffer` and writes it at `offset`. Returns its tag.
    pub(super) fn write_block(
        &self,
        env: &WriteEnv,
        buffer: &mut SealBuffer,
        header: &BlockHeader,
        offset: u64,
    ) -> Result<[u8; 16]> {
        self.segment.write_block(env, buffer, header, offset, KeyUse::Admitted).map(|(tag, _)| tag)
    }

    /// Seals the segment behind the blocks that `builder` has counted, which end at `offset`.
    /// Returns the head behind it.
    pub(super) fn seal(
        &self,
        env: &WriteEnv,
        builder: &FooterBuilder,
        offset: u64,
    ) -> Result<Head> {
        let head = self.segment.write_footer(env, builder, offset, true, KeyUse::Admitted)?;
        env.sync_file(&*self.segment.file, &self.segment.path)?;
        Ok(head)
    }

    /// Makes the file durable and gives it its name. It is part of the shard from then on.
    pub(super) fn publish(&self, env: &WriteEnv) -> Result<()> {
        let temporary = &*self.segment.path;
        env.sync_file(&*self.segment.file, temporary)?;
        env.disk.rename_new(temporary, &self.path).map_err(Error::io("rename", temporary))?;
        env.disk.sync_dir(&env.dir).map_err(Error::io("sync", &env.dir))
    }

    /// Its entry for the list of segments, once it is sealed and published.
    pub(super) fn sealed_name(&self, head: &Head) -> SegmentRef {
        SegmentRef {
            path: Arc::clone(&self.path),
            sealed: Some(head.clone().into_end()),
            ..self.segment.name()
        }
    }
}
