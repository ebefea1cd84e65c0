//! Batches of groups on their way to a block: framed and compressed, in order, by several threads.

use std::{collections::VecDeque, sync::Arc};

use super::{
    commit::Pending,
    helpers::{Deferred, Helpers, Scratch},
};
use crate::{
    group,
    segment::{Compression, SealBuffer},
};

/// A batch, and the payload of its block before it is sealed.
pub(super) struct Draft {
    pub(super) batch: Vec<Pending>,
    pub(super) buffer: SealBuffer,
    pub(super) compression: Compression,
    pub(super) raw_len: u32,
    pub(super) list_len: u32,
    /// The receive times of the first and the last group, in microseconds since the Unix epoch.
    pub(super) first_time_us: u64,
    pub(super) last_time_us: u64,
}

/// What a [`Draft`] is made of.
struct Input {
    batch: Vec<Pending>,
    buffer: SealBuffer,
    compression: Compression,
}

impl Draft {
    /// The sequence number of the first group.
    pub(super) fn first_seq(&self) -> u64 {
        self.batch.first().map_or(0, |first| first.seq)
    }

    /// One past the sequence number of the last group.
    pub(super) fn end_seq(&self) -> u64 {
        self.batch.last().map_or(0, |last| last.seq + 1)
    }

    /// The batch of a draft that is not sealed. Wipes the payload.
    pub(super) fn into_batch(mut self) -> Vec<Pending> {
        self.buffer.wipe();
        self.batch
    }

    fn new(Input { batch, buffer, compression }: Input, scratch: &mut Scratch) -> Self {
        Self::with_floor(batch, buffer, compression, 0, scratch)
    }

    /// As [`Draft::new`]. No group gets an earlier receive time than `floor_us`.
    pub(super) fn with_floor(
        batch: Vec<Pending>,
        mut buffer: SealBuffer,
        compression: Compression,
        floor_us: u64,
        scratch: &mut Scratch,
    ) -> Self {
        let raw = &mut scratch.raw;
        raw.clear();
        for pending in &batch {
            group::put_frame(raw, &pending.group.bytes);
        }
        let list_len = raw.len() as u32;
        let time_us = |pending: &Pending| pending.group.time_us.max(floor_us);
        let first_time_us = batch.first().map_or(floor_us, time_us);
        for pending in &batch {
            // It fits: a batch ends before a difference that does not.
            let delta = (time_us(pending) - first_time_us) as u32;
            raw.extend_from_slice(&delta.to_le_bytes());
        }
        let compression = scratch.compressor.compress(compression, raw, buffer.begin());
        Self {
            buffer,
            compression,
            raw_len: raw.len() as u32,
            list_len,
            first_time_us,
            last_time_us: batch.last().map_or(floor_us, time_us),
            batch,
        }
    }
}

impl Draft {
    /// Makes it again, so that no group has an earlier receive time than `floor_us`.
    pub(super) fn raise(&mut self, floor_us: u64, scratch: &mut Scratch) {
        let (batch, buffer) = (std::mem::take(&mut self.batch), std::mem::take(&mut self.buffer));
        *self = Self::with_floor(batch, buffer, self.compression, floor_us, scratch);
    }
}

/// The batches that a leader has taken, in order. Helpers make drafts of all but the first, as far
/// as they come to it.
pub(super) struct Run {
    drafts: VecDeque<Arc<Deferred<Input, Draft>>>,
}

impl Run {
    pub(super) fn new(
        helpers: &Helpers,
        batches: Vec<Vec<Pending>>,
        compression: Compression,
    ) -> Self {
        let input = |batch| Input { batch, buffer: helpers.buffer(), compression };
        let drafts: VecDeque<_> =
            batches.into_iter().map(|batch| Deferred::new(input(batch), Draft::new)).collect();
        for draft in drafts.iter().skip(1) {
            helpers.push(draft);
        }
        Self { drafts }
    }

    /// The next draft. Makes it, or while a helper does that, those behind it.
    pub(super) fn next(&mut self, scratch: &mut Scratch) -> Option<Draft> {
        let next = self.drafts.pop_front()?;
        next.run(scratch);
        while !next.is_done() && self.drafts.iter().any(|later| later.run(scratch)) {}
        Some(next.settle(scratch))
    }

    /// The batches that are left, in one. The buffers hold no plaintext after that.
    pub(super) fn into_rest(self, scratch: &mut Scratch) -> Vec<Pending> {
        let rest = self.drafts.into_iter().flat_map(|draft| match draft.begin() {
            Some(input) => input.batch,
            None => draft.settle(scratch).into_batch(),
        });
        rest.collect()
    }
}
