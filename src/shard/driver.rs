//! The write path of a shard, as its callers drive it.
//!
//! Callers put groups into the queue and wait for two watermarks, *written* and *synced*, to pass them. Whoever waits while nobody
//! drives becomes the driver: it takes a batch, makes a block of it, writes and syncs, and wakes the others; what came in meanwhile
//! is the next batch (group commit). What nobody waits for is driven by the scheduler, after `linger` at the latest.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use tracing::error;

use super::{
    Durability, End, Head, Job, Payload, Shard, Task, Ticket,
    queue::{Pending, State},
    writer::{KeyUse, Next, RESERVED_SEQS, Writer},
};
use crate::{
    Error, Result,
    segment::KeySource,
    sync::{MutexGuard, atomic::Ordering, lock, wait},
};

/// How long after a sync without further blocks a mark block records it.
const MARK_AFTER: Duration = Duration::from_secs(1);
/// After how many blocks a sync is not put off any longer to be shared with more.
const BLOCKS_PER_SYNC: u32 = 16;
/// After how long acknowledged groups that could not be sealed for want of the key are tried again.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// What a waiting group takes of the budget beyond its own bytes.
const PENDING_BYTES: usize = size_of::<Pending>();

/// What a turn of the driver came to.
enum Turn {
    Done,
    /// The key may not be used.
    Refused(Error),
}

impl Shard {
    /// Puts a group into the queue and returns a ticket for it. `wait_for_room` blocks while the pipeline is full.
    pub(crate) fn enqueue(
        self: &Arc<Self>,
        payload: Payload,
        durability: Durability,
        wait_for_room: bool,
    ) -> Result<Ticket> {
        if self.context.read_only {
            return Err(Error::ReadOnly);
        }
        self.context.gate.admit()?;
        if let Some(limit) = &self.context.limit {
            limit.admit_append()?;
        }
        let charge = payload.bytes.len() + PENDING_BYTES;
        let budget = &self.context.budget;
        if !budget.try_take(charge) {
            if !wait_for_room {
                return Err(Error::Full { pending: budget.used() as u64 });
            }
            if self.context.options.threads {
                budget.take_waiting(charge);
            } else {
                self.context.wake.relieve();
                if !budget.try_take(charge) {
                    return Err(Error::Full { pending: budget.used() as u64 });
                }
            }
            // The wait may have been long.
            self.context.gate.admit().inspect_err(|_| budget.release(charge))?;
        }
        self.push(payload, durability, charge).inspect_err(|_| budget.release(charge))
    }

    fn push(self: &Arc<Self>, payload: Payload, durability: Durability, charged: usize) -> Result<Ticket> {
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
            charged,
        });
        let fills = !was_full && state.queued_bytes >= options.block_bytes;
        if fills || !state.flush_scheduled {
            self.schedule_flush(&mut state);
        }
        Ok(Ticket::new(Arc::clone(self), seq, durability, &mut state))
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

    pub(super) fn task(&self) -> Weak<dyn Task> {
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

    /// Sends a group in the queue on its way, although nobody waits for it yet.
    pub(super) fn hasten(&self, seq: u64, durability: Durability) {
        let mut state = lock(&self.state);
        if state.outcome(seq, durability).is_none() {
            Self::want(&mut state, seq, durability);
            if !state.driving {
                self.schedule_flush(&mut state);
            }
        }
    }

    fn want(state: &mut State, seq: u64, durability: Durability) {
        state.flush_to = state.flush_to.max(seq + 1);
        if durability == Durability::Synced {
            state.sync_to = state.sync_to.max(seq + 1);
        }
    }

    /// Waits until the group is as durable as asked, driving if nobody does. The caller is one of the state's askers.
    pub(super) fn wait_for(&self, seq: u64, durability: Durability) -> Result<()> {
        let mut state = lock(&self.state);
        loop {
            if let Some(outcome) = state.outcome(seq, durability) {
                return outcome;
            }
            Self::want(&mut state, seq, durability);
            if state.is_driven() {
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
            if state.is_driven() {
                return; // The driver looks at the queue when it ends.
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
            let mut state = lock(&self.state);
            if let Some(cause) = &state.latched {
                return Err(self.latched(cause));
            }
            let end = state.queue.back().map_or(state.taken.max(state.written), |last| last.seq + 1);
            if state.synced >= end {
                return Ok(());
            }
            state.ask();
            end - 1
        };
        let synced = self.wait_for(last, Durability::Synced);
        lock(&self.state).leave();
        synced
    }

    /// Makes everything durable that there is, also what was left by a process that was killed, or by a failed sync.
    pub(crate) fn make_durable(&self) -> Result<()> {
        self.sync()?;
        let mut writer = lock(&self.writer);
        if self.context.read_only || writer.active.is_some() || writer.next.is_some() {
            return Ok(());
        }
        let Some(last) = self.segments(false)?.last().cloned() else { return Ok(()) };
        if matches!(self.open_segment(&last)?.end, End::Unknown) {
            self.context.gate.admit()?;
            writer.next = Some(self.recover().inspect_err(|error| self.latch_if_failed(&mut writer, error))?);
            return Ok(());
        }
        // It is whole. Its name may be what a process gave it that was killed, or failed, before it could sync that.
        self.make_names_durable()?;
        self.check_fence()
    }

    /// Makes sure, before a write or a sync is acknowledged, that no other writer has taken over the store.
    fn check_fence(&self) -> Result<()> {
        self.context.fence.as_ref().map_or(Ok(()), |fence| fence.check())
    }

    /// A failed operation stops the writer, a finding or a refusal does not.
    fn latch_if_failed(&self, writer: &mut Writer, error: &Error) {
        if matches!(error, Error::Io { .. } | Error::Fenced { .. }) {
            self.latch(writer, error.clone());
        }
    }

    fn end_driving(&self) -> MutexGuard<'_, State> {
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
        state.claims += 1;
        while state.driving {
            state = wait(&self.progress, state);
        }
        state.claims -= 1;
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
        let charged: usize = batch.iter().map(|pending| pending.charged).sum();
        match writer.write_block(self, &batch, keys).and_then(|()| self.check_fence()) {
            Ok(()) => {
                drop(batch);
                writer.blocks_unsynced += 1;
                self.context.budget.release(charged);
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
                if writer.active.is_none() {
                    // The old segment is sealed and the new one could not be begun: nothing reserves numbers any more.
                    lock(&self.state).ready = false;
                }
                Turn::Refused(error)
            }
            Err(error) => {
                drop(batch);
                self.context.budget.release(charged);
                lock(&self.state).fail(from, to, false, &error);
                self.latch(writer, error);
                Turn::Done
            }
        }
    }

    /// The key may not be used: groups that wait fail, groups that were acknowledged go back into the queue.
    fn refuse(&self, batch: Vec<Pending>, error: &Error) {
        let mut state = lock(&self.state);
        let freed = state.refuse(batch, error);
        if !state.queue.is_empty() {
            state.retry_at = self.context.clock.uptime() + RETRY_AFTER;
        }
        drop(state);
        self.context.budget.release(freed);
    }

    /// Stops the writer after a failure: nothing is retried as if it had worked. What is queued fails; what is written and not
    /// synced fails for those who wait for the sync.
    fn latch(&self, writer: &mut Writer, error: Error) {
        // A writer that has taken over removes files that this one has not finished: that is why their names are gone.
        let error = if matches!(error, Error::Io { .. }) { self.check_fence().err().unwrap_or(error) } else { error };
        if let Some(active) = writer.active.take() {
            self.context.gate.end_segment(active.header.header.segment);
            // What was written and not synced has no standing any more, although it can be read.
            self.set_segments(|segments| segments.iter_mut().for_each(|segment| segment.active = None));
        }
        writer.next = None;
        if !matches!(error, Error::Closed(_)) {
            self.counters().writers_latched.fetch_add(1, Ordering::Relaxed);
            error!(logstore = %self.name(), shard = self.id, %error, "a failure has stopped the writer of a shard");
        }
        let mut state = lock(&self.state);
        let (synced, written, next) = (state.synced, state.written, state.next_seq);
        let reported = self.latched(&Arc::new(error.clone()));
        state.fail(synced, written, true, &reported);
        state.fail(written, next, false, &reported);
        let freed = state.forget();
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
        match self.sync_file(&*active.file, &active.path).and_then(|()| self.check_fence()) {
            Ok(()) => {
                active.durable = offset;
                self.reach(active.view.head());
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
        // A repair has begun a segment already.
        let prepared = if writer.active.is_none() { self.begin(&mut writer) } else { Ok(()) };
        match prepared {
            Ok(()) => {
                let Some(active) = &writer.active else { return Ok(()) };
                let mut state = lock(&self.state);
                if state.queue.is_empty() {
                    state.next_seq = state.next_seq.max(active.end_seq);
                    state.written = state.written.max(active.end_seq);
                    state.synced = state.synced.max(active.end_seq);
                }
                state.limit_seq = active.header.header.limit_seq;
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
        self.check_no_data_key()?;
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

    /// Notes in the catalogue how far the shard is, so that its segments cannot be removed unnoticed.
    pub(super) fn record_head(&self) -> Result<()> {
        let Some(head) = self.take_reached() else { return Ok(()) };
        let gate = &self.context.gate;
        match self.context.heads.record_head(gate.name(), gate.id(), self.id, head.clone()) {
            Ok(()) => {
                self.note_head(&head);
                Ok(())
            }
            Err(error) => {
                self.give_back(head);
                Err(error)
            }
        }
    }

    /// Seals the active segment, so that a new one begins with the next append.
    fn seal(&self, writer: &mut Writer, keys: KeyUse) -> Result<()> {
        if writer.active.is_none() {
            return Ok(());
        }
        match writer.seal_active(self, keys).and_then(|()| self.check_fence()) {
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
            // Where no segment is open there is no key to seal with, and one that was begun under older settings is not the place for
            // what came after them: encryption may be on since. What was acknowledged waits in memory until the key is back.
            while writer.is_as_planned(self) {
                let batch = lock(&self.state).take_batch(self.context.options.block_bytes);
                let Some(batch) = batch else { break };
                self.write_batch(&mut writer, batch, KeyUse::Held);
            }
            // A failure latches the shard, which then says so; there is nobody here to tell.
            let _ = self.seal(&mut writer, KeyUse::Held);
            writer.wipe();
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
        let given_up = !state.queue.is_empty();
        let freed = state.forget();
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
                    Err(error) if !is_refusal(&error) => self.latch(&mut writer, error),
                    _ => self.sync_active(&mut writer),
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

    /// Seals the active segment, and has no other one begun for as long as what is returned lives.
    pub(crate) fn pause(&self) -> Result<Paused<'_>> {
        self.start_driving();
        let mut paused = Paused { shard: self, writer: Some(lock(&self.writer)) };
        if let Some(writer) = &mut paused.writer {
            self.seal(writer, KeyUse::Admitted)?;
        }
        Ok(paused)
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
                Some(active) if active.blocks > 0 => self
                    .seal(&mut writer, KeyUse::Admitted)
                    .and_then(|()| self.record_head().inspect_err(|error| self.latch(&mut writer, error.clone()))),
                _ => Ok(()),
            }
        };
        drop(self.end_driving());
        rolled
    }

    /// Ends the last segment, where `ends` says so of its key and nothing has ended it yet: no block can be added to it from then on. One
    /// that another process left is recovered first, and the shard goes on in a new segment. Returns whether there was such a segment.
    pub(crate) fn end_segment_if(&self, ends: impl Fn(KeySource) -> bool) -> Result<bool> {
        self.start_driving();
        let sealed = {
            let mut writer = lock(&self.writer);
            let active = writer.active.as_ref().map(|active| active.header.header.key_source);
            match active {
                // The queue goes into the next segment. The loss of an access took no key of a segment that is being written.
                Some(source) if ends(source) => self
                    .seal(&mut writer, KeyUse::Admitted)
                    .or_else(|error| if is_refusal(&error) { self.seal(&mut writer, KeyUse::Held) } else { Err(error) })
                    .map(|()| Some(true)),
                Some(_) => Ok(Some(false)),
                None => Ok(None),
            }
        };
        drop(self.end_driving());
        if let Some(sealed) = sealed? {
            return Ok(sealed);
        }
        let Some(last) = self.settled_segments()?.last().cloned() else { return Ok(false) };
        let left_open = ends(self.key_source(&last)?) && matches!(self.open_segment(&last)?.end, End::Unknown);
        if left_open {
            self.prepare()?;
        }
        Ok(left_open)
    }

    pub(super) fn roll_if_old(&self) {
        let age = self.context.options.segment_age;
        lock(&self.state).roll_scheduled = false;
        let began = lock(&self.writer).active.as_ref().map(|active| active.began);
        let Some(began) = began else { return };
        let left = (began + age).saturating_sub(self.context.clock.uptime());
        if left.is_zero() {
            // A refusal or failure shows at the next append; a queue that is not empty rolls in time by itself.
            let _ = self.roll();
        } else if !std::mem::replace(&mut lock(&self.state).roll_scheduled, true) {
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

/// A shard whose writer stands still: no segment of it is open, and none is begun.
pub(crate) struct Paused<'a> {
    shard: &'a Shard,
    writer: Option<MutexGuard<'a, Writer>>,
}

impl Paused<'_> {
    /// The ordinal of the next segment. A recovery may make that segment itself.
    pub(crate) fn next_ordinal(&self) -> Result<u64> {
        if let Some(next) = self.writer.as_ref().and_then(|writer| writer.next.as_ref()) {
            return Ok(next.ordinal);
        }
        self.shard.next_ordinal_on_disk()
    }

    pub(crate) fn shard_id(&self) -> u32 {
        self.shard.id
    }

    /// Where the shard stands; `None` where its end has not been looked for yet.
    pub(crate) fn head(&self) -> Option<Head> {
        self.shard.head(self.writer.as_ref()?)
    }

    /// Notes that the catalogue knows where the shard stands.
    pub(crate) fn note_head(&self) {
        if let Some(head) = self.head() {
            self.shard.note_head(&head);
        }
    }
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        self.writer = None;
        drop(self.shard.end_driving());
    }
}

/// Whether the error is the gate's: the key may not be used now, and nothing is wrong with the files.
fn is_refusal(error: &Error) -> bool {
    matches!(error, Error::Revoked { .. } | Error::KmsUnreachable { .. } | Error::KmsInvalid { .. } | Error::Forked)
}
