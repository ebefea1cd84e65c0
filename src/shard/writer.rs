//! The write path of a shard: queue, batch, compress, seal, write, sync.
//!
//! Callers put groups into a queue and wait for two watermarks, *written* and *synced*, to pass them. Whoever waits while nobody
//! drives becomes the driver: it takes a batch, makes a block of it, writes and syncs, and wakes the others; what came in meanwhile
//! is the next batch (group commit). What nobody waits for is driven by the scheduler, after `linger` at the latest.

use std::{collections::VecDeque, path::Path, sync::Arc, task::Waker, time::Duration};

use bytes::Bytes;

use super::{
    ActiveView, BLOCK_GROUPS, Durability, End, Head, Job, Payload, SegmentRef, Shard, Task, Ticket, WritePlan,
};
use crate::{
    Error, Result,
    crypto::CryptoError,
    group,
    ids::SegmentId,
    io::{DiskFile, OpenMode},
    segment::{
        BlockHeader, BlockKind, Compression, Compressor, DecodedHeader, Features, Predecessor, SealBuffer,
        SegmentHeader, segment_file_name,
    },
    sync::{lock, read, wait},
};

/// How many sequence numbers a segment reserves: after an unclean end the next one starts behind them.
const RESERVED_SEQS: u64 = 1 << 32;
/// A segment that has used this many rolls, long before its reserve runs out.
const SEQS_PER_SEGMENT: u64 = 1 << 31;
/// How long after a sync without further blocks a mark block records it.
const MARK_AFTER: Duration = Duration::from_secs(1);
/// How many ranges of failed appends are remembered for tickets that nobody has looked at yet.
const FAILURES_MAX: usize = 4096;
/// After how many blocks a sync is not put off any longer to be shared with more.
const BLOCKS_PER_SYNC: u32 = 16;
/// After how long acknowledged groups that could not be sealed for want of the key are tried again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// A group that waits to be written.
struct Pending {
    seq: u64,
    kind: BlockKind,
    bytes: Bytes,
    logs: u32,
    time_us: u64,
    /// When it came in (uptime).
    queued: Duration,
    /// Whether it was acknowledged already (`Durability::Buffered`).
    acked: bool,
}

/// Appends that failed: those from `from` to below `to`, or only those of them that asked to be synced.
struct Failure {
    from: u64,
    to: u64,
    synced_only: bool,
    error: Error,
}

/// What callers see; held only for moments.
#[derive(Default)]
pub(super) struct State {
    /// Whether there is an active segment that reserves the numbers being handed out.
    ready: bool,
    closed: bool,
    latched: Option<Arc<Error>>,
    next_seq: u64,
    limit_seq: u64,
    last_time_us: u64,
    queue: VecDeque<Pending>,
    queued_bytes: usize,
    /// What is below this is to be written now.
    flush_to: u64,
    /// What is below this is to be synced now.
    sync_to: u64,
    written: u64,
    synced: u64,
    /// One past the last group that was taken off the queue to be written.
    taken: u64,
    driving: bool,
    flush_scheduled: bool,
    /// Not to be tried before: the key could not be used.
    retry_at: Duration,
    mark_scheduled: bool,
    last_sync: Duration,
    failures: VecDeque<Failure>,
    pub(super) wakers: Vec<Waker>,
}

impl State {
    /// Whether the append of `seq` has succeeded or failed; `None` while it is under way.
    pub(super) fn outcome(&self, seq: u64, durability: Durability) -> Option<Result<()>> {
        let hit = |f: &&Failure| (f.from..f.to).contains(&seq) && (!f.synced_only || durability == Durability::Synced);
        if let Some(failure) = self.failures.iter().find(hit) {
            return Some(Err(failure.error.clone()));
        }
        let done = match durability {
            Durability::Buffered => true,
            Durability::Written => seq < self.written,
            Durability::Synced => seq < self.synced,
        };
        done.then_some(Ok(()))
    }

    fn fail(&mut self, from: u64, to: u64, synced_only: bool, error: &Error) {
        if from < to {
            if self.failures.len() >= FAILURES_MAX {
                self.failures.pop_front();
            }
            self.failures.push_back(Failure { from, to, synced_only, error: error.clone() });
        }
    }

    /// Takes groups off the front that may go into one block.
    fn take_batch(&mut self, bytes_max: usize) -> Option<Vec<Pending>> {
        let first = self.queue.pop_front()?;
        let mut bytes = first.bytes.len();
        let mut batch = vec![first];
        while let Some(next) = self.queue.front()
            && let Some(last) = batch.last()
            && next.kind == last.kind
            && next.seq == last.seq + 1
            && bytes + next.bytes.len() <= bytes_max
            && batch.len() < BLOCK_GROUPS
        {
            bytes += next.bytes.len();
            batch.extend(self.queue.pop_front());
        }
        self.queued_bytes -= bytes;
        self.taken = batch.last().map_or(self.taken, |last| last.seq + 1);
        Some(batch)
    }

    fn wants_work(&self, block_bytes: usize) -> bool {
        let front = self.queue.front().map(|pending| pending.seq);
        front.is_some_and(|seq| seq < self.flush_to || self.queued_bytes >= block_bytes)
            || (self.sync_to > self.synced && self.written > self.synced)
    }
}

/// How keys are used.
#[derive(Clone, Copy, PartialEq, Eq)]
enum KeyUse {
    /// As the lease admits.
    Admitted,
    /// Although the lease was lost, as long as they are in memory: to seal what was acknowledged.
    Held,
}

/// The files and buffers; held by whoever drives.
#[derive(Default)]
pub(super) struct Writer {
    active: Option<Active>,
    /// Where the next segment begins, once that is known.
    pub(super) next: Option<Next>,
    blocks_unsynced: u32,
    raw: Vec<u8>,
    buffer: SealBuffer,
    compressor: Compressor,
}

/// Where the next segment begins.
#[derive(Clone, Debug)]
pub(super) struct Next {
    pub(super) ordinal: u64,
    pub(super) first_seq: u64,
    pub(super) predecessor: Predecessor,
    pub(super) last_time_us: u64,
}

struct Active {
    file: Arc<dyn DiskFile>,
    path: Arc<Path>,
    header: Arc<DecodedHeader>,
    view: Arc<ActiveView>,
    plan: WritePlan,
    offset: u64,
    blocks: u32,
    /// Up to where the file is durable.
    durable: u64,
    /// The mark that the last block carries.
    marked: u64,
    last_time_us: u64,
    end_seq: u64,
    began: Duration,
}

/// What a turn of the driver came to.
enum Turn {
    Done,
    /// The key may not be used.
    Refused(Error),
}

impl Shard {
    /// Puts a group into the queue and returns its sequence number. `wait_for_room` blocks while the pipeline is full.
    pub(crate) fn enqueue(&self, payload: Payload, durability: Durability, wait_for_room: bool) -> Result<u64> {
        if self.context.read_only {
            return Err(Error::ReadOnly);
        }
        self.context.gate.admit()?;
        let size = payload.bytes.len();
        let budget = &self.context.budget;
        if !budget.try_take(size) {
            if !wait_for_room {
                return Err(Error::Full { pending: budget.used() as u64 });
            }
            if self.context.options.threads {
                budget.take_waiting(size);
            } else {
                self.context.wake.relieve();
                if !budget.try_take(size) {
                    return Err(Error::Full { pending: budget.used() as u64 });
                }
            }
            // The wait may have been long.
            self.context.gate.admit().inspect_err(|_| budget.release(size))?;
        }
        self.push(payload, durability).inspect_err(|_| budget.release(size))
    }

    fn push(&self, payload: Payload, durability: Durability) -> Result<u64> {
        let options = &self.context.options;
        let mut state = loop {
            let state = lock(&self.state);
            self.check_usable(&state)?;
            if state.ready {
                break state;
            }
            drop(state);
            self.prepare()?;
        };
        if state.next_seq >= state.limit_seq {
            return Err(Error::TooMany { what: "sequence numbers waiting to be written", limit: RESERVED_SEQS });
        }
        let seq = state.next_seq;
        state.next_seq += 1;
        // Receive times never run backwards within a shard, so that they can be searched.
        let time_us = self.context.clock.wall_us().max(state.last_time_us);
        state.last_time_us = time_us;
        let was_full = state.queued_bytes >= options.block_bytes;
        state.queued_bytes += payload.bytes.len();
        state.queue.push_back(Pending {
            seq,
            kind: payload.kind,
            bytes: payload.bytes,
            logs: payload.logs,
            time_us,
            queued: self.context.clock.uptime(),
            acked: durability == Durability::Buffered,
        });
        let fills = !was_full && state.queued_bytes >= options.block_bytes;
        if fills || !state.flush_scheduled {
            self.schedule_flush(&mut state);
        }
        Ok(seq)
    }

    /// Sees to it that somebody looks at the queue: at once if there is something to do, else when its first group has lingered.
    fn schedule_flush(&self, state: &mut State) {
        let options = &self.context.options;
        let now = self.context.clock.uptime();
        let delay = match state.queue.front() {
            _ if state.wants_work(options.block_bytes) => Duration::ZERO,
            Some(front) => (front.queued + options.linger).saturating_sub(now),
            None => return,
        };
        let delay = delay.max(state.retry_at.saturating_sub(now));
        state.flush_scheduled = true;
        self.context.wake.after(delay, self.task(), Job::Flush);
    }

    fn task(&self) -> std::sync::Weak<dyn Task> {
        self.this.clone()
    }

    fn check_usable(&self, state: &State) -> Result<()> {
        if state.closed {
            return Err(Error::Closed("the Logstore"));
        }
        match &state.latched {
            Some(cause) => Err(self.latched(cause)),
            None => Ok(()),
        }
    }

    fn latched(&self, cause: &Arc<Error>) -> Error {
        Error::Latched { logstore: self.name().clone(), shard: self.id, cause: Arc::clone(cause) }
    }

    /// A ticket for a group in the queue, which is now on its way.
    pub(crate) fn ticket(self: &Arc<Self>, seq: u64, durability: Durability) -> Ticket {
        if durability != Durability::Buffered {
            let mut state = lock(&self.state);
            Self::want(&mut state, seq, durability);
            if !state.driving && state.outcome(seq, durability).is_none() {
                self.schedule_flush(&mut state);
            }
        }
        Ticket::new(Arc::clone(self), seq, durability)
    }

    fn want(state: &mut State, seq: u64, durability: Durability) {
        state.flush_to = state.flush_to.max(seq + 1);
        if durability == Durability::Synced {
            state.sync_to = state.sync_to.max(seq + 1);
        }
    }

    /// Waits until the group is as durable as asked, driving if nobody does.
    pub(crate) fn wait_for(&self, seq: u64, durability: Durability) -> Result<()> {
        let mut state = lock(&self.state);
        loop {
            if let Some(outcome) = state.outcome(seq, durability) {
                return outcome;
            }
            Self::want(&mut state, seq, durability);
            if state.driving {
                state = wait(&self.progress, state);
                continue;
            }
            state.driving = true;
            drop(state);
            let turn = self.turn(Some(seq));
            state = self.end_driving();
            if let Turn::Refused(error) = turn
                && seq >= state.written
                && state.outcome(seq, durability).is_none()
            {
                // It was acknowledged before and stays queued; it is not made durable now.
                return Err(error);
            }
        }
    }

    /// Works off what is due, in a thread of the scheduler. `all` does not let anything linger.
    pub(super) fn flush_queued(&self, all: bool) {
        let now = self.context.clock.uptime();
        let mut state = lock(&self.state);
        state.flush_scheduled = false;
        if state.queue.front().is_some_and(|front| all || front.queued + self.context.options.linger <= now) {
            state.flush_to = state.next_seq;
        }
        loop {
            if state.driving {
                return; // who drives looks at the queue when done
            }
            if !state.wants_work(self.context.options.block_bytes) {
                if !state.flush_scheduled {
                    self.schedule_flush(&mut state);
                }
                return;
            }
            state.driving = true;
            drop(state);
            let turn = self.turn(None);
            state = self.end_driving();
            if matches!(turn, Turn::Refused(_)) {
                // What was acknowledged stays queued until the loss of the key is dealt with, or the key is back.
                return;
            }
        }
    }

    /// Writes and syncs everything that has been appended so far.
    pub(crate) fn sync(&self) -> Result<()> {
        let last = {
            let state = lock(&self.state);
            if let Some(cause) = &state.latched {
                return Err(self.latched(cause));
            }
            let end = state.queue.back().map_or(state.taken.max(state.written), |last| last.seq + 1);
            if state.synced >= end {
                return Ok(());
            }
            end - 1
        };
        self.wait_for(last, Durability::Synced)
    }

    /// Makes everything durable that there is, also what was left by a process that was killed, or by a failed sync.
    pub(crate) fn make_durable(&self) -> Result<()> {
        self.sync()?;
        let mut writer = lock(&self.writer);
        if self.context.read_only || writer.active.is_some() || writer.next.is_some() {
            return Ok(());
        }
        let unsynced = match self.segments(false)?.last() {
            Some(last) => matches!(self.open_segment(last)?.end, End::Unknown),
            None => false,
        };
        if unsynced {
            self.context.gate.admit()?;
            writer.next = Some(self.recover().inspect_err(|error| self.latch_if_failed(&mut writer, error))?);
        }
        Ok(())
    }

    /// A failed operation stops the writer, a finding or a refusal does not.
    fn latch_if_failed(&self, writer: &mut Writer, error: &Error) {
        if matches!(error, Error::Io { .. }) {
            self.latch(writer, error.clone());
        }
    }

    fn end_driving(&self) -> std::sync::MutexGuard<'_, State> {
        let mut state = lock(&self.state);
        state.driving = false;
        if !state.flush_scheduled {
            self.schedule_flush(&mut state);
        }
        self.progress.notify_all();
        for waker in state.wakers.drain(..) {
            waker.wake();
        }
        state
    }

    /// Becomes the driver, waiting for the one at work.
    fn start_driving(&self) {
        let mut state = lock(&self.state);
        while state.driving {
            state = wait(&self.progress, state);
        }
        state.driving = true;
    }

    /// One block, and one sync if somebody waits for it. The caller has set `driving`; `own` is the group that it waits for.
    fn turn(&self, own: Option<u64>) -> Turn {
        let mut writer = lock(&self.writer);
        let batch = lock(&self.state).take_batch(self.context.options.block_bytes);
        let turn = match batch {
            Some(batch) => self.write_batch(&mut writer, batch, KeyUse::Admitted),
            None => Turn::Done,
        };
        // What is written already is synced for those who wait for it, whether or not the key may be used.
        let refused = matches!(turn, Turn::Refused(_));
        let sync = {
            let state = lock(&self.state);
            // What is queued in front of the last group that waits for a sync shares it, unless that would take long.
            let nothing_first = state.queue.front().is_none_or(|front| front.seq >= state.sync_to);
            let enough = own.is_some_and(|own| state.written > own) || writer.blocks_unsynced >= BLOCKS_PER_SYNC;
            state.latched.is_none()
                && state.sync_to > state.synced
                && state.written > state.synced
                && (nothing_first || enough || refused)
        };
        if sync {
            self.sync_active(&mut writer);
        }
        turn
    }

    /// Makes a block of `batch` and writes it, keeping the watermarks.
    fn write_batch(&self, writer: &mut Writer, batch: Vec<Pending>, keys: KeyUse) -> Turn {
        let (Some(first), Some(last)) = (batch.first(), batch.last()) else { return Turn::Done };
        let (from, to) = (first.seq, last.seq + 1);
        let size: usize = batch.iter().map(|pending| pending.bytes.len()).sum();
        match writer.write_block(self, &batch, keys) {
            Ok(()) => {
                drop(batch);
                writer.blocks_unsynced += 1;
                self.context.budget.release(size);
                let mut state = lock(&self.state);
                state.written = to;
                state.retry_at = Duration::ZERO;
                if let Some(active) = &writer.active {
                    state.limit_seq = active.header.header.limit_seq;
                }
                Turn::Done
            }
            Err(error) if keys == KeyUse::Admitted && is_refusal(&error) => {
                self.refuse(batch, &error);
                Turn::Refused(error)
            }
            Err(error) => {
                drop(batch);
                self.context.budget.release(size);
                lock(&self.state).fail(from, to, false, &error);
                self.latch(writer, error);
                Turn::Done
            }
        }
    }

    /// The key may not be used: groups that wait fail, groups that were acknowledged go back into the queue.
    fn refuse(&self, batch: Vec<Pending>, error: &Error) {
        let mut state = lock(&self.state);
        let mut freed = 0;
        let mut kept = VecDeque::new();
        let queued = std::mem::take(&mut state.queue);
        for pending in batch.into_iter().chain(queued) {
            if pending.acked {
                kept.push_back(pending);
            } else {
                freed += pending.bytes.len();
                state.fail(pending.seq, pending.seq + 1, false, error);
            }
        }
        state.queued_bytes = kept.iter().map(|pending| pending.bytes.len()).sum();
        state.queue = kept;
        state.taken = state.written;
        if !state.queue.is_empty() {
            state.retry_at = self.context.clock.uptime() + RETRY_AFTER;
        }
        drop(state);
        self.context.budget.release(freed);
    }

    /// Stops the writer after a failure: nothing is retried as if it had worked. What is queued fails; what is written and not
    /// synced fails for those who wait for the sync.
    fn latch(&self, writer: &mut Writer, error: Error) {
        if let Some(active) = writer.active.take() {
            self.context.gate.end_segment(active.header.header.segment);
        }
        writer.next = None;
        let mut state = lock(&self.state);
        let (synced, written, next) = (state.synced, state.written, state.next_seq);
        let reported = self.latched(&Arc::new(error.clone()));
        state.fail(synced, written, true, &reported);
        state.fail(written, next, false, &reported);
        let freed = std::mem::take(&mut state.queued_bytes);
        state.queue.clear();
        state.written = next;
        state.synced = next;
        state.ready = false;
        state.latched = Some(Arc::new(error));
        drop(state);
        self.context.budget.release(freed);
    }

    fn sync_active(&self, writer: &mut Writer) {
        let now = self.context.clock.uptime();
        writer.blocks_unsynced = 0;
        let Some(active) = &mut writer.active else {
            let mut state = lock(&self.state);
            state.synced = state.written;
            return;
        };
        let offset = active.offset;
        match active.file.sync_data().map_err(Error::io("sync", &*active.path)) {
            Ok(()) => {
                active.durable = offset;
                let mut state = lock(&self.state);
                state.synced = state.written;
                state.last_sync = now;
                let schedule = !std::mem::replace(&mut state.mark_scheduled, true);
                drop(state);
                if schedule {
                    self.context.wake.after(MARK_AFTER, self.task(), Job::Mark);
                }
            }
            Err(error) => self.latch(writer, error),
        }
    }

    /// Finds out where the shard ends, recovering if need be, and begins a segment.
    fn prepare(&self) -> Result<()> {
        self.context.gate.admit()?;
        let mut writer = lock(&self.writer);
        {
            let state = lock(&self.state);
            self.check_usable(&state)?;
            if state.ready {
                return Ok(());
            }
        }
        let prepared = if writer.active.is_none() { self.begin(&mut writer) } else { Ok(()) };
        match prepared {
            Ok(()) => {
                let Some(active) = &writer.active else { return Ok(()) };
                let header = &active.header.header;
                let mut state = lock(&self.state);
                if state.queue.is_empty() {
                    // Whether it was begun here or by a repair.
                    state.next_seq = state.next_seq.max(header.first_seq);
                    state.written = state.written.max(header.first_seq);
                    state.synced = state.synced.max(header.first_seq);
                }
                state.limit_seq = header.limit_seq;
                state.last_time_us = state.last_time_us.max(active.last_time_us);
                state.ready = true;
                Ok(())
            }
            Err(error) => {
                self.latch_if_failed(&mut writer, &error);
                Err(error)
            }
        }
    }

    fn begin(&self, writer: &mut Writer) -> Result<()> {
        let next = match writer.next.clone() {
            Some(next) => next,
            None => self.recover()?,
        };
        // Numbers that were handed out and not written are not handed out again; those still queued go into this segment.
        let first_seq = {
            let state = lock(&self.state);
            state.queue.front().map_or(state.next_seq, |front| front.seq).max(next.first_seq)
        };
        writer.next = Some(Next { first_seq, ..next });
        writer.begin_segment(self)
    }

    /// Seals the active segment, so that a new one begins with the next append.
    fn seal(&self, writer: &mut Writer, keys: KeyUse) -> Result<()> {
        if writer.active.is_none() {
            return Ok(());
        }
        match writer.seal_active(self, keys) {
            Ok(()) => {
                let mut state = lock(&self.state);
                state.synced = state.written;
                // The numbers of the next append are not reserved yet.
                state.ready = false;
                Ok(())
            }
            Err(error) if is_refusal(&error) => Err(error),
            Err(error) => {
                self.latch(writer, error.clone());
                Err(error)
            }
        }
    }

    /// Access to the key was lost: what was acknowledged is sealed with the key that is still in memory, what was not fails. The
    /// caller wipes the key afterwards.
    pub(crate) fn lose_key(&self, error: &Error) {
        self.start_driving();
        {
            let mut writer = lock(&self.writer);
            self.refuse(Vec::new(), error);
            // Where no segment is open there is no key to seal with: what was acknowledged waits in memory until the key is back.
            while writer.active.is_some() {
                let batch = lock(&self.state).take_batch(self.context.options.block_bytes);
                let Some(batch) = batch else { break };
                self.write_batch(&mut writer, batch, KeyUse::Held);
            }
            // A failure latches the shard, which then says so; there is nobody here to tell.
            let _ = self.seal(&mut writer, KeyUse::Held);
        }
        drop(self.end_driving());
    }

    /// Writes everything, seals the active segment, and takes no more appends. Returns where the shard stands.
    pub(crate) fn close(&self) -> Result<Option<Head>> {
        lock(&self.state).closed = true;
        let flushed = match self.latch_cause() {
            Some(cause) => Err(self.latched(&cause)),
            None => self.sync(),
        };
        if let Err(error) = &flushed
            && is_refusal(error)
        {
            // Nobody else comes any more to seal what was acknowledged.
            self.lose_key(error);
        }
        self.start_driving();
        let sealed = {
            let mut writer = lock(&self.writer);
            let sealed = self
                .seal(&mut writer, KeyUse::Admitted)
                .or_else(|error| if is_refusal(&error) { self.seal(&mut writer, KeyUse::Held) } else { Err(error) });
            sealed.map(|()| self.head(&writer))
        };
        let mut state = self.end_driving();
        let closed = Error::Closed("the Logstore");
        let (written, next) = (state.written, state.next_seq);
        state.fail(written, next, false, &closed);
        let freed = std::mem::take(&mut state.queued_bytes);
        let given_up = !state.queue.is_empty();
        state.queue.clear();
        drop(state);
        self.context.budget.release(freed);
        let head = sealed?;
        match flushed {
            // What was acknowledged as buffered and has no key to be sealed with is lost, and the caller is told.
            Err(error) if given_up || !is_refusal(&error) => Err(error),
            _ => Ok(head),
        }
    }

    /// Where the shard stands. Numbers that were given to groups which never came to be written stay used.
    fn head(&self, writer: &Writer) -> Option<Head> {
        let head = writer.head()?;
        let next_seq = head.next_seq.max(lock(&self.state).next_seq);
        Some(Head { next_seq, ..head })
    }

    /// Takes no more appends, and forgets what is queued: the Logstore is being deleted.
    pub(crate) fn abandon(&self) {
        self.start_driving();
        {
            let mut writer = lock(&self.writer);
            self.latch(&mut writer, Error::Closed("the Logstore"));
        }
        let mut state = self.end_driving();
        state.closed = true;
    }

    /// Makes everything durable and marked, and returns where the shard stands. Without the key the mark is left out.
    pub(crate) fn checkpoint(&self) -> Result<Option<Head>> {
        if !self.context.read_only && lock(&self.state).latched.is_none() {
            match self.sync() {
                Err(error) if !is_refusal(&error) => return Err(error),
                _ => {}
            }
            self.start_driving();
            let head = {
                let mut writer = lock(&self.writer);
                let marked = writer.write_mark(self);
                match marked {
                    Ok(()) => self.sync_active(&mut writer),
                    Err(error) if is_refusal(&error) => {}
                    Err(error) => self.latch(&mut writer, error),
                }
                self.head(&writer)
            };
            drop(self.end_driving());
            if head.is_some() {
                return Ok(head);
            }
        }
        self.head_on_disk()
    }

    /// Rolls the active segment, if it has blocks. What was appended before is in it.
    pub(crate) fn roll(&self) -> Result<()> {
        if !lock(&self.state).queue.is_empty() {
            self.sync()?;
        }
        self.start_driving();
        let rolled = {
            let mut writer = lock(&self.writer);
            match &writer.active {
                Some(active) if active.blocks > 0 => self.seal(&mut writer, KeyUse::Admitted),
                _ => Ok(()),
            }
        };
        drop(self.end_driving());
        rolled
    }

    pub(super) fn roll_if_old(&self) {
        let age = self.context.options.segment_age;
        let began = lock(&self.writer).active.as_ref().map(|active| active.began);
        let Some(began) = began else { return };
        let left = (began + age).saturating_sub(self.context.clock.uptime());
        if left.is_zero() {
            // A refusal or failure shows at the next append; a queue that is not empty rolls in time by itself.
            let _ = self.roll();
        } else {
            self.context.wake.after(left, self.task(), Job::RollByAge);
        }
    }

    pub(super) fn mark_if_idle(&self) {
        let idle = {
            let mut state = lock(&self.state);
            state.mark_scheduled = false;
            let idle = self.context.clock.uptime().saturating_sub(state.last_sync);
            if idle < MARK_AFTER {
                state.mark_scheduled = true;
                drop(state);
                self.context.wake.after(MARK_AFTER - idle, self.task(), Job::Mark);
                return;
            }
            !state.driving && state.queue.is_empty() && state.ready
        };
        if !idle {
            return;
        }
        self.start_driving();
        {
            let mut writer = lock(&self.writer);
            match writer.write_mark(self) {
                Err(error) if !is_refusal(&error) => self.latch(&mut writer, error),
                _ => {}
            }
        }
        drop(self.end_driving());
    }

    /// Clears a latch, so that the next append recovers the shard first.
    pub(crate) fn reopen(&self) {
        let _writer = lock(&self.writer);
        let mut state = lock(&self.state);
        if !state.closed && state.latched.take().is_some() {
            // What failed half-way may have left a segment that is not in the list.
            self.forget_segments();
        }
    }

    /// Why the writer has stopped, if it has.
    pub(crate) fn latch_cause(&self) -> Option<Arc<Error>> {
        lock(&self.state).latched.clone()
    }
}

/// Whether the error is the gate's: the key may not be used now, and nothing is wrong with the files.
fn is_refusal(error: &Error) -> bool {
    matches!(
        error,
        Error::Revoked { .. }
            | Error::KmsUnreachable { .. }
            | Error::KmsInvalid { .. }
            | Error::Forked
            | Error::Closed("the lease of the data key")
    )
}

impl Writer {
    /// Makes one block of `batch` and writes it, rolling first if need be.
    fn write_block(&mut self, shard: &Shard, batch: &[Pending], keys: KeyUse) -> Result<()> {
        let (Some(first), Some(last)) = (batch.first(), batch.last()) else { return Ok(()) };
        if keys == KeyUse::Admitted {
            self.roll_if_needed(shard, first.seq)?;
        }
        let Some(active) = &mut self.active else { return Err(Error::Closed("the active segment")) };

        self.raw.clear();
        for pending in batch {
            group::put_frame(&mut self.raw, &pending.bytes);
        }
        let list_len = self.raw.len();
        for pending in batch {
            let delta = u32::try_from(pending.time_us - first.time_us).unwrap_or(u32::MAX);
            self.raw.extend_from_slice(&delta.to_le_bytes());
        }
        let payload = self.buffer.begin();
        let compression = self.compressor.compress(active.plan.compression, &self.raw, payload);
        let header = BlockHeader {
            kind: first.kind,
            compression,
            segment_tag: active.header.segment_tag(),
            number: active.blocks,
            payload_len: self.buffer.payload_len() as u32,
            raw_len: self.raw.len() as u32,
            group_count: batch.len() as u32,
            log_count: batch.iter().fold(0, |sum: u32, pending| sum.saturating_add(pending.logs)),
            list_len: list_len as u32,
            first_seq: first.seq,
            first_time_us: first.time_us,
            last_time_us: last.time_us,
            durable_mark: active.durable,
            nonce_random: draw(shard, &active.path)?,
        };
        active.append(shard, &mut self.buffer, &header, keys)
    }

    /// Writes a block that only carries the durable mark, unless the last block carries it already.
    fn write_mark(&mut self, shard: &Shard) -> Result<()> {
        let Some(active) = &mut self.active else { return Ok(()) };
        if active.marked == active.durable || active.offset == active.header.body_start {
            return Ok(());
        }
        self.buffer.begin();
        let header = BlockHeader {
            kind: BlockKind::Mark,
            compression: Compression::None,
            segment_tag: active.header.segment_tag(),
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
            nonce_random: draw(shard, &active.path)?,
        };
        active.append(shard, &mut self.buffer, &header, KeyUse::Admitted)
    }

    fn roll_if_needed(&mut self, shard: &Shard, next_seq: u64) -> Result<()> {
        let plan = *read(&shard.context.plan);
        if let Some(active) = &self.active {
            let options = &shard.context.options;
            let full = active.offset >= options.segment_bytes
                || active.end_seq - active.header.header.first_seq >= SEQS_PER_SEGMENT
                || active.blocks >= u32::MAX - 2;
            let old = shard.context.clock.uptime() >= active.began + options.segment_age;
            let changed = active.plan.suite != plan.suite || active.plan.key_source != plan.key_source;
            if !full && !old && !changed {
                if let Some(active) = &mut self.active {
                    active.plan = plan;
                }
                return Ok(());
            }
            self.seal_active(shard, KeyUse::Admitted)?;
        }
        match &mut self.next {
            Some(next) => next.first_seq = next_seq,
            None => return Err(Error::Closed("the active segment")),
        }
        self.begin_segment(shard)
    }

    /// Begins the segment that `next` describes: under a temporary name, durable, then under its own.
    pub(super) fn begin_segment(&mut self, shard: &Shard) -> Result<()> {
        let Some(next) = self.next.clone() else { return Err(Error::Closed("the active segment")) };
        let plan = *read(&shard.context.plan);
        let new = NewSegment::create(shard, &next, &plan)?;
        let name = SegmentRef {
            ordinal: next.ordinal,
            first_seq: next.first_seq,
            path: Arc::clone(&new.path),
            active: Some(ActiveView::new(Arc::clone(&new.file), Arc::clone(&new.header))),
        };
        if let Err(error) = new.publish(shard) {
            shard.context.gate.end_segment(new.header.header.segment);
            return Err(error);
        }
        let Some(view) = name.active.clone() else { return Ok(()) };
        shard.set_segments(|segments| segments.push(name));
        let body_start = new.header.body_start;
        self.active = Some(Active {
            file: new.file,
            path: new.path,
            view,
            plan,
            offset: body_start,
            blocks: 0,
            durable: body_start,
            marked: body_start,
            last_time_us: next.last_time_us,
            end_seq: next.first_seq,
            began: shard.context.clock.uptime(),
            header: new.header,
        });
        shard.context.wake.after(shard.context.options.segment_age, shard.task(), Job::RollByAge);
        Ok(())
    }

    /// Seals the active segment: footer, sync. Nothing of it is written any more.
    fn seal_active(&mut self, shard: &Shard, keys: KeyUse) -> Result<()> {
        let Some(active) = &mut self.active else { return Ok(()) };
        let end = active.view.with_builder(Clone::clone);
        let file_len =
            write_footer(shard, &*active.file, &active.path, &active.header, &end, active.offset, false, keys)?;
        let header = Arc::clone(&active.header);
        let head = Head::sealed(&header.header, &end.build(active.offset, [0; 8], false), file_len);
        self.next = Some(Next {
            ordinal: head.ordinal + 1,
            first_seq: head.next_seq,
            last_time_us: active.last_time_us,
            predecessor: Predecessor::Sealed(head.into_end()),
        });
        self.active = None;
        shard.context.gate.end_segment(header.header.segment);
        shard.set_segments(|segments| {
            if let Some(last) = segments.last_mut() {
                last.active = None;
            }
        });
        Ok(())
    }

    /// Where the shard stands, as far as this writer knows.
    fn head(&self) -> Option<Head> {
        if let Some(active) = &self.active {
            return Some(active.view.head());
        }
        match &self.next {
            Some(Next { predecessor: Predecessor::Sealed(end), first_seq, .. }) => Some(Head {
                ordinal: end.ordinal,
                segment: end.segment,
                sealed: true,
                blocks: end.blocks,
                bytes: end.bytes,
                end_seq: end.end_seq,
                next_seq: *first_seq,
                digest: end.digest,
            }),
            _ => None,
        }
    }
}

impl Active {
    /// Seals the block in `buffer` and writes it at the end. Nothing is changed unless all of it succeeded.
    fn append(&mut self, shard: &Shard, buffer: &mut SealBuffer, header: &BlockHeader, keys: KeyUse) -> Result<()> {
        let sealing = buffer.with_header(&self.header.header_hash, header);
        let nonce = header.nonce();
        let tag = match keys {
            KeyUse::Admitted => shard.context.gate.with_cipher(&self.header, &self.path, |cipher| {
                cipher.seal_block(&nonce, sealing, SealBuffer::PAYLOAD_AT).map_err(Error::Crypto)
            })?,
            KeyUse::Held => held(shard.context.gate.with_held(self.header.header.segment, |cipher| {
                cipher.seal_block(&nonce, sealing, SealBuffer::PAYLOAD_AT)
            }))?,
        };
        let bytes = buffer.finish(&tag);
        let end = self.offset + bytes.len() as u64;
        self.file.write_at(bytes, self.offset).map_err(Error::io("write a block to", &*self.path))?;
        self.view.add(self.offset, header, &tag, end);
        self.offset = end;
        self.blocks += 1;
        self.marked = header.durable_mark;
        self.end_seq = header.end_seq().max(self.end_seq);
        self.last_time_us = header.last_time_us;
        Ok(())
    }
}

fn held<T>(sealed: Option<std::result::Result<T, CryptoError>>) -> Result<T> {
    sealed.ok_or(Error::Closed("the data key"))?.map_err(Error::Crypto)
}

fn draw<const N: usize>(shard: &Shard, path: &Path) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    shard.context.random.fill(&mut bytes).map_err(Error::io("draw a random nonce for", path))?;
    Ok(bytes)
}

/// Writes the footer of a segment whose blocks end at `offset`, and syncs the file. Returns its length.
#[expect(clippy::too_many_arguments, reason = "the writer and recovery both seal, and have little else in common")]
fn write_footer(
    shard: &Shard,
    file: &dyn DiskFile,
    path: &Path,
    header: &DecodedHeader,
    builder: &crate::segment::FooterBuilder,
    offset: u64,
    recovered: bool,
    keys: KeyUse,
) -> Result<u64> {
    let footer = builder.build(offset, draw(shard, path)?, recovered);
    let encoded = footer.encode();
    let nonce = footer.nonce();
    let gate = &shard.context.gate;
    let tag = match keys {
        KeyUse::Admitted => {
            gate.with_cipher(header, path, |cipher| cipher.tag_only(&nonce, &encoded).map_err(Error::Crypto))?
        }
        KeyUse::Held => held(gate.with_held(header.header.segment, |cipher| cipher.tag_only(&nonce, &encoded)))?,
    };
    let bytes = footer.finish(encoded, &tag);
    file.write_at(&bytes, offset).map_err(Error::io("write the footer of", path))?;
    file.sync_data().map_err(Error::io("sync", path))?;
    Ok(offset + bytes.len() as u64)
}

/// A segment that does not have its name yet.
pub(super) struct NewSegment {
    pub(super) file: Arc<dyn DiskFile>,
    pub(super) path: Arc<Path>,
    pub(super) header: Arc<DecodedHeader>,
    temporary: Arc<Path>,
}

impl NewSegment {
    /// Draws a salt, derives the key, and writes the header to a temporary file.
    pub(super) fn create(shard: &Shard, next: &Next, plan: &WritePlan) -> Result<Self> {
        let context = &shard.context;
        let path: Arc<Path> = shard.dir.join(segment_file_name(next.ordinal, next.first_seq)).into();
        let temporary: Arc<Path> = path.with_extension("tmp").into();
        let header = SegmentHeader {
            suite: plan.suite,
            features: Features::default(),
            shard: shard.id,
            store: context.gate.context().store,
            logstore: context.gate.id(),
            segment: SegmentId::from_bytes(draw(shard, &path)?),
            generation: plan.generation,
            ordinal: next.ordinal,
            first_seq: next.first_seq,
            limit_seq: next.first_seq + RESERVED_SEQS,
            created_us: context.clock.wall_us().max(next.last_time_us),
            key_source: plan.key_source,
            salt: draw(shard, &path)?,
            predecessor: next.predecessor,
            extensions: Vec::new(),
        };
        let encoded = header.encode();
        let hash = header.hash(&encoded);
        let commitment = context.gate.begin_segment(&header, &hash)?;
        let bytes = SegmentHeader::finish(encoded, &commitment);
        let create = || -> Result<Self> {
            let io = |op| Error::io(op, &*temporary);
            match context.disk.remove_file(&temporary) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(io("remove")(error)),
                _ => {}
            }
            let file = context.disk.open(&temporary, OpenMode::CreateNew).map_err(io("create"))?;
            file.write_at(&bytes, 0).map_err(io("write the header of"))?;
            let header = SegmentHeader::decode(&bytes).map_err(|error| error.in_file(&temporary, 0))?;
            Ok(Self { file, path: Arc::clone(&path), header: Arc::new(header), temporary: Arc::clone(&temporary) })
        };
        create().inspect_err(|_| context.gate.end_segment(header.segment))
    }

    /// Makes the file durable and gives it its name. Only then has it authority.
    pub(super) fn publish(&self, shard: &Shard) -> Result<()> {
        let disk = &shard.context.disk;
        self.file.sync_data().map_err(Error::io("sync", &*self.temporary))?;
        disk.rename(&self.temporary, &self.path).map_err(Error::io("rename", &*self.temporary))?;
        disk.sync_dir(&shard.dir).map_err(Error::io("sync", &shard.dir))
    }

    /// Seals the blocks that `builder` collected, which end at `offset`. Returns the length of the file.
    pub(super) fn seal(&self, shard: &Shard, builder: &crate::segment::FooterBuilder, offset: u64) -> Result<u64> {
        write_footer(shard, &*self.file, &self.temporary, &self.header, builder, offset, true, KeyUse::Admitted)
    }
}
