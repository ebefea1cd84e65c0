//! The files of a shard that is written: segments begun, blocks sealed and written, segments sealed.

use std::{path::Path, sync::Arc, time::Duration};

use tracing::debug;

use zeroize::Zeroize;

use super::{ActiveView, Head, Job, SegmentRef, Shard, WritePlan, queue::Pending};
use crate::{
    Error, Result,
    crypto::CryptoError,
    group,
    ids::SegmentId,
    io::{DiskFile, Temporary},
    segment::{
        BlockHeader, BlockKind, Compression, Compressor, DecodedHeader, Features, FooterBuilder, Predecessor,
        SealBuffer, SegmentHeader, SegmentName,
    },
    sync::{atomic::Ordering, lock, read},
};

/// How many sequence numbers a segment reserves: after an unclean end the next one starts behind them.
pub(super) const RESERVED_SEQS: u64 = 1 << 32;
/// A segment that has used this many rolls, long before its reserve runs out.
const SEQS_PER_SEGMENT: u64 = 1 << 31;

/// How keys are used.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum KeyUse {
    /// As the lease admits.
    Admitted,
    /// Although the lease was lost, as long as they are in memory: to seal what was acknowledged.
    Held,
}

/// The files and buffers; held by whoever drives.
#[derive(Default)]
pub(super) struct Writer {
    pub(super) active: Option<Active>,
    /// Where the next segment begins, once that is known.
    pub(super) next: Option<Next>,
    pub(super) blocks_unsynced: u32,
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

pub(super) struct Active {
    pub(super) file: Arc<dyn DiskFile>,
    pub(super) path: Arc<Path>,
    pub(super) header: Arc<DecodedHeader>,
    pub(super) view: Arc<ActiveView>,
    plan: WritePlan,
    pub(super) offset: u64,
    pub(super) blocks: u32,
    /// Up to where the file is durable.
    pub(super) durable: u64,
    /// The mark that the last block carries.
    marked: u64,
    pub(super) last_time_us: u64,
    pub(super) end_seq: u64,
    pub(super) began: Duration,
}

impl Writer {
    /// Whether a segment is open, of the suite and the payload hash and under the key that new ones are to have.
    pub(super) fn is_as_planned(&self, shard: &Shard) -> bool {
        self.active.as_ref().is_some_and(|active| active.is_as(&read(&shard.context.plan)))
    }

    /// Makes one block of `batch` and writes it, rolling first if need be.
    pub(super) fn write_block(&mut self, shard: &Shard, batch: &[Pending], keys: KeyUse) -> Result<()> {
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
            // It fits: a batch ends where it would not.
            let delta = (pending.time_us - first.time_us) as u32;
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
    pub(super) fn write_mark(&mut self, shard: &Shard) -> Result<()> {
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
            if !full && !old && active.is_as(&plan) {
                if let Some(active) = &mut self.active {
                    active.plan = plan;
                }
                return Ok(());
            }
            self.seal_active(shard, KeyUse::Admitted)?;
            shard.record_head()?;
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
            epoch: new.epoch,
            path: Arc::clone(&new.path),
            active: Some(ActiveView::new(Arc::clone(&new.file), Arc::clone(&new.header))),
            sealed: None,
        };
        if let Err(error) = new.publish(shard) {
            shard.context.gate.end_segment(new.header.header.segment);
            return Err(error);
        }
        let Some(view) = name.active.clone() else { return Ok(()) };
        shard.counters().segments_begun.fetch_add(1, Ordering::Relaxed);
        debug!(logstore = %shard.name(), shard = shard.id, ordinal = next.ordinal, suite = plan.suite.name(), "a segment is begun");
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
        if !std::mem::replace(&mut lock(&shard.state).roll_scheduled, true) {
            shard.context.wake.after(shard.context.options.segment_age, shard.task(), Job::RollByAge);
        }
        Ok(())
    }

    /// Seals the active segment: footer, sync. Nothing of it is written any more. The blocks are synced first, so that a footer which
    /// a crash lets through proves that they were there.
    pub(super) fn seal_active(&mut self, shard: &Shard, keys: KeyUse) -> Result<()> {
        let Some(active) = &mut self.active else { return Ok(()) };
        if active.durable < active.offset {
            shard.sync_file(&*active.file, &active.path)?;
            active.durable = active.offset;
        }
        let end = active.view.builder();
        let file_len =
            write_footer(shard, &*active.file, &active.path, &active.header, &end, active.offset, false, keys)?;
        let header = Arc::clone(&active.header);
        let head = Head::sealed(&header, &end.build(active.offset, [0; 8], false), file_len);
        // Should the next segment not come to be, the one after this begins at its limit: queued groups have numbers behind its end.
        shard.reach(Head { next_seq: header.header.limit_seq, ..head.clone() });
        let (ordinal, first_seq, end) = (head.ordinal + 1, head.next_seq, head.into_end());
        let (last_time_us, predecessor) = (active.last_time_us, Predecessor::Sealed(end));
        shard.counters().segments_sealed.fetch_add(1, Ordering::Relaxed);
        debug!(logstore = %shard.name(), shard = shard.id, ordinal = end.ordinal, bytes = end.bytes, "a segment is sealed");
        self.next = Some(Next { ordinal, first_seq, last_time_us, predecessor });
        self.active = None;
        shard.context.gate.end_segment(header.header.segment);
        shard.set_segments(|segments| {
            if let Some(last) = segments.last_mut() {
                last.active = None;
                last.sealed = Some(end);
            }
        });
        Ok(())
    }

    /// Overwrites the plaintext of the last block.
    pub(super) fn wipe(&mut self) {
        self.raw.zeroize();
        self.buffer.wipe();
    }

    /// Where the shard stands, as far as this writer knows.
    pub(super) fn head(&self) -> Option<Head> {
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
                last_time_us: end.last_time_us,
                digest: end.digest,
            }),
            _ => None,
        }
    }
}

impl Active {
    fn is_as(&self, plan: &WritePlan) -> bool {
        let of = |plan: &WritePlan| (plan.suite, plan.key_source, plan.payload_hash);
        of(&self.plan) == of(plan)
    }

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
        let payload_hash = shard.context.hasher.hash(self.header.header.payload_hash, std::mem::take(buffer));
        *buffer = self.view.add(self.offset, header, payload_hash, &tag, end);
        shard.counters().appended(self.header.header.suite, header.list_len.into());
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
    builder: &FooterBuilder,
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
    // A sealed segment ends with its footer.
    if file.len().map_err(Error::io("get the length of", path))? > offset {
        file.set_len(offset).map_err(Error::io("cut", path))?;
    }
    file.write_at(&bytes, offset).map_err(Error::io("write the footer of", path))?;
    shard.sync_file(file, path)?;
    Ok(offset + bytes.len() as u64)
}

/// A segment that does not have its name yet.
pub(super) struct NewSegment {
    pub(super) file: Arc<dyn DiskFile>,
    pub(super) path: Arc<Path>,
    pub(super) epoch: u64,
    pub(super) header: Arc<DecodedHeader>,
    temporary: Arc<Path>,
}

impl NewSegment {
    /// Draws a salt, derives the key, and writes the header to a temporary file.
    pub(super) fn create(shard: &Shard, next: &Next, plan: &WritePlan) -> Result<Self> {
        let context = &shard.context;
        let epoch = context.fence.as_ref().map_or(0, |fence| fence.epoch());
        let name = SegmentName { ordinal: next.ordinal, epoch, first_seq: next.first_seq };
        let path: Arc<Path> = shard.dir.join(name.to_string()).into();
        let used_up = || Error::TooMany { what: "sequence numbers", limit: u64::MAX };
        let limit_seq = next.first_seq.checked_add(RESERVED_SEQS).ok_or_else(used_up)?;
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
            limit_seq,
            created_us: context.clock.wall_us().max(next.last_time_us),
            key_source: plan.key_source,
            salt: draw(shard, &path)?,
            predecessor: next.predecessor,
            payload_hash: plan.payload_hash,
            epoch,
            extensions: Vec::new(),
        };
        let encoded = header.encode();
        let hash = header.hash(&encoded);
        let commitment = context.gate.begin_segment(&header, &hash)?;
        let bytes = SegmentHeader::finish(encoded, &commitment);
        let create = || -> Result<Self> {
            let Temporary { file, path: temporary } = Temporary::create(&*context.disk, &path.with_extension(""))
                .map_err(Error::io("create a temporary file for", &*path))?;
            file.write_at(&bytes, 0).map_err(Error::io("write the header of", &*temporary))?;
            let header = SegmentHeader::decode(&bytes).map_err(|error| error.in_file(&temporary, 0))?;
            Ok(Self { file, path: Arc::clone(&path), epoch, header: Arc::new(header), temporary: temporary.into() })
        };
        create().inspect_err(|_| context.gate.end_segment(header.segment))
    }

    /// Makes the file durable and gives it its name. Only then has it authority.
    pub(super) fn publish(&self, shard: &Shard) -> Result<()> {
        let disk = &shard.context.disk;
        shard.sync_file(&*self.file, &self.temporary)?;
        disk.rename_new(&self.temporary, &self.path).map_err(Error::io("rename", &*self.temporary))?;
        disk.sync_dir(&shard.dir).map_err(Error::io("sync", &shard.dir))
    }

    /// Seals the blocks that `builder` collected, which end at `offset`. Returns the length of the file.
    pub(super) fn seal(&self, shard: &Shard, builder: &FooterBuilder, offset: u64) -> Result<u64> {
        write_footer(shard, &*self.file, &self.temporary, &self.header, builder, offset, true, KeyUse::Admitted)
    }
}
