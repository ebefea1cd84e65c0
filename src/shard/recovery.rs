//! Recovery of a shard whose last segment was not sealed, and repair of a damaged one.
//!
//! Up to its durable mark the segment is kept where it is, and never changed: the header of its
//! successor says where it ends. Valid blocks above the mark are rewritten into a new segment,
//! because after a failed fsync the page cache may show blocks that the disk does not have. The
//! bytes behind them are a torn tail, dropped and reported. Damage below the mark is corruption:
//! reported, and the file is left alone.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tracing::warn;

use super::{
    listing::SegmentRef,
    record::{Head, Loss},
    rules::check_rules,
    scanning::{Prover, Scanned, add, in_place},
    segments::{End, Opened, Proof, SegmentList},
    writer::{KeyUse, NewSegment, Next, WriteEnv},
};
use crate::{
    Error, ErrorKind, Result,
    io::read_exact_at,
    segment::{BlockKind, BlockView, FooterBuilder, Predecessor, ScannedBlock, SealBuffer},
};

/// The result of recovering a shard that was not closed cleanly.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct RecoveryNotice {
    /// The shard.
    pub shard: u32,
    /// The segment that was cut off.
    #[serde(serialize_with = "crate::error::path_as_text")]
    pub segment: PathBuf,
    /// Groups above the durable mark that were there and were rewritten into a new segment.
    pub groups_rewritten: u64,
    /// Bytes of the torn tail, dropped: they were never acknowledged as synced.
    pub bytes_dropped: u64,
}

/// The result of a repair.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct RepairReport {
    /// The shard.
    pub shard: u32,
    /// The segment that was repaired; `None` when nothing needed it.
    #[serde(serialize_with = "crate::error::path_if_any_as_text")]
    pub segment: Option<PathBuf>,
    /// Groups behind the damage that could be read and were rewritten.
    pub groups_salvaged: u64,
    /// Bytes that could not be read.
    pub bytes_lost: u64,
    /// The losses that this repair has accepted.
    pub losses: Vec<AcceptedLoss>,
    /// The metadata that this repair has put in force, because the metadata that the catalogue names
    /// is lost.
    pub metadata: Option<AdoptedMetadata>,
}

/// Metadata of a Logstore that a repair has put in force in the place of lost metadata. It has the
/// configuration and the data keys of the time at which it was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct AdoptedMetadata {
    /// The generation of the metadata that is lost.
    pub lost_generation: u64,
    /// The generation of the metadata that was found.
    pub adopted_generation: u64,
}

/// Consecutive segments whose loss an operator has accepted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct AcceptedLoss {
    /// The shard.
    pub shard: u32,
    /// The first of the segments.
    pub first_ordinal: u64,
    /// The last of them.
    pub last_ordinal: u64,
    /// No group before this sequence number is lost.
    pub from_seq: u64,
    /// No group from this sequence number on is lost.
    pub end_seq: u64,
    /// When the loss was accepted, in microseconds since the Unix epoch.
    pub accepted_us: u64,
}

impl AcceptedLoss {
    pub(crate) fn new(shard: u32, loss: &Loss) -> Self {
        let Loss { first, last, from_seq, end_seq, accepted_us, .. } = *loss;
        Self { shard, first_ordinal: first, last_ordinal: last, from_seq, end_seq, accepted_us }
    }
}

/// Options of [`Admin::repair`](crate::Admin::repair).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct RepairOptions {
    /// Whether segments that are forged, or exchanged for others, are given up as lost ones are.
    pub accept_tampered: bool,
}

impl RepairOptions {
    setters! {
        accept_tampered: bool;
    }
}

/// Recovers and repairs a shard, from its segments and with an environment to write new ones.
pub(super) struct Recovery<'a> {
    pub(super) list: &'a SegmentList,
    pub(super) env: &'a WriteEnv,
}

impl Recovery<'_> {
    /// Finds the end of the shard, and ends a segment that was not sealed. The caller holds the
    /// writer's lock, and no segment is open. Returns where the next segment begins, and a notice
    /// if the segment did not end at its durable mark.
    pub(super) fn recover(&self) -> Result<(Next, Option<RecoveryNotice>)> {
        let (next, notice) = self.find_end()?;
        Ok((self.behind_recorded(next), notice))
    }

    /// The next segment begins no earlier than the catalogue's head permits: a restore from a backup
    /// has raised that number.
    fn behind_recorded(&self, next: Next) -> Next {
        let recorded = self.list.record().head.map_or(0, |head| head.next_seq);
        Next { first_seq: next.first_seq.max(recorded), ..next }
    }

    fn find_end(&self) -> Result<(Next, Option<RecoveryNotice>)> {
        self.list.remove_leftovers(true)?;
        self.list.ensure_directory()?;
        let segments = self.list.segments(false)?;
        let Some(last) = segments.last() else { return Ok((self.behind_record(), None)) };
        self.list.make_names_durable()?;
        match (self.end_last(last), self.list.ends_in_loss()?) {
            // An operator has given it up.
            (Err(error), Some(loss)) if error.kind() == ErrorKind::Integrity => {
                Ok((self.behind_loss(&loss), None))
            }
            (ended, _) => ended,
        }
    }

    /// Where the shard goes on behind its last segment.
    fn end_last(&self, last: &SegmentRef) -> Result<(Next, Option<RecoveryNotice>)> {
        let opened = self.list.open_segment(last)?;
        opened.header.features.check_writing().map_err(|error| error.in_file(&last.path, 0))?;
        match self.list.authenticate(&opened) {
            // Its key was destroyed on purpose: it cannot be authenticated any more, and the shard
            // continues behind it.
            Err(Error::Shredded { .. }) => {}
            verified => verified?,
        }
        match &opened.end {
            End::Sealed(sealed) => {
                let head = self.list.last_head(&opened.header, &sealed.footer, opened.file_len()?);
                let next_seq = head.next_seq;
                let predecessor = Predecessor::Sealed(head.into_end());
                Ok((Next::behind(&opened.header, next_seq, predecessor), None))
            }
            End::Cut(end) => {
                let header = &opened.header;
                Ok((Next::behind(header, header.limit_seq, Predecessor::Cut(*end)), None))
            }
            End::Damaged(cause) => Err((**cause).clone()),
            End::Active(_) | End::Unknown => self.end_segment(&opened),
        }
    }

    /// Where the first segment begins in a directory without any.
    fn behind_record(&self) -> Next {
        let record = self.list.record();
        match record.head {
            Some(head) => Next {
                ordinal: head.ordinal + 1,
                first_seq: head.next_seq.max(record.first_seq),
                setbacks: 0,
                latest_us: head.last_time_us,
                predecessor: Predecessor::Sealed(head.into_end()),
            },
            None => Next {
                ordinal: record.first_ordinal,
                first_seq: record.first_seq,
                setbacks: 0,
                latest_us: 0,
                predecessor: Predecessor::None,
            },
        }
    }

    /// Where the next segment begins behind an accepted loss.
    fn behind_loss(&self, loss: &Loss) -> Next {
        let head = self.list.record().head.filter(|head| head.ordinal == loss.last);
        let recorded = head.as_ref().map_or(0, |head| head.next_seq);
        let end = head.map_or_else(|| loss.unknown_end(), Head::into_end);
        // The header of the lost segment had these values. Those of the segment in front of the
        // loss are as close as can be.
        let before = self.list.find(loss.first - 1).ok().flatten();
        let before = before.and_then(|name| self.list.header(&name).ok());
        let (setbacks, latest_us) =
            before.map_or((0, 0), |header| (header.setbacks, header.latest_before_us()));
        Next {
            ordinal: loss.last + 1,
            first_seq: loss.end_seq.max(recorded),
            setbacks,
            latest_us: latest_us.max(end.last_time_us),
            predecessor: Predecessor::Cut(end),
        }
    }

    /// Ends a segment that was not sealed.
    fn end_segment(&self, opened: &Opened) -> Result<(Next, Option<RecoveryNotice>)> {
        let scanned = Scanned::of(self.list, opened, Proof::Tag)?;
        let mark = scanned.check_durable_part()?;
        let Cut { next, groups: groups_rewritten, .. } = self.cut(opened, &scanned, mark, None)?;
        let bytes_dropped = scanned.bytes_lost();
        if groups_rewritten == 0 && bytes_dropped == 0 {
            return Ok((next, None));
        }
        let (shard, segment) = (self.list.shard(), opened.name.path.to_path_buf());
        let (logstore, path) = (self.list.gate().name(), segment.display());
        warn!(%logstore, shard, segment = %path, groups_rewritten, bytes_dropped, "shard recovered");
        Ok((next, Some(RecoveryNotice { shard, segment, groups_rewritten, bytes_dropped })))
    }

    /// Gives up damaged blocks at the end of the shard, so that it can be written again. Keeps
    /// everything that can be read. The caller holds the writer's lock. Returns where the next
    /// segment begins and the report; `None` if the shard needs no repair.
    pub(super) fn repair(&self) -> Result<Option<(Next, RepairReport)>> {
        self.list.ensure_directory()?;
        let segments = self.list.segments(true)?;
        let Some(last) = segments.last().filter(|last| last.active.is_none()) else {
            return Ok(None);
        };
        match (self.repair_last(last), self.list.ends_in_loss()?) {
            // Nothing of it can be kept.
            (Err(error), Some(loss)) if error.kind() == ErrorKind::Integrity => {
                let report = RepairReport {
                    shard: self.list.shard(),
                    segment: None,
                    groups_salvaged: 0,
                    bytes_lost: 0,
                    losses: Vec::new(),
                    metadata: None,
                };
                Ok(Some((self.behind_recorded(self.behind_loss(&loss)), report)))
            }
            (repaired, _) => repaired,
        }
    }

    /// Gives up the damaged blocks of the last segment.
    fn repair_last(&self, last: &SegmentRef) -> Result<Option<(Next, RepairReport)>> {
        if self.is_recoverable(last)? {
            // A broken rule of the format, or a retired key, is not mended by giving up blocks. It
            // is an error for the caller.
            check_rules(self.list, &self.list.open_segment(last)?)?;
            return Ok(None);
        }
        let path = &*last.path;
        let (file, header) = self.list.open_file(last)?;
        let opened = Opened { name: last.clone(), file, header, end: End::Unknown, vouched: None };
        self.list.authenticate(&opened)?;
        let scanned = Scanned::of(self.list, &opened, Proof::Tag)?;
        let mark = scanned.durable_mark().min(scanned.end());
        let prover = Prover::new(self.list.gate(), &opened);
        let Cut { next, groups, given_up } = self.cut(&opened, &scanned, mark, Some(prover))?;
        let report = RepairReport {
            shard: self.list.shard(),
            segment: Some(path.to_path_buf()),
            groups_salvaged: groups,
            bytes_lost: scanned.bytes_lost() + given_up,
            losses: Vec::new(),
            metadata: None,
        };
        Ok(Some((self.behind_recorded(next), report)))
    }

    /// Whether the last segment can be opened, recovered and read without a repair.
    fn is_recoverable(&self, last: &SegmentRef) -> Result<bool> {
        let checked = self.list.open_segment(last).and_then(|opened| match &opened.end {
            End::Unknown => self.check_open_segment(last),
            _ => Ok(()),
        });
        match checked {
            Err(error) if error.is_loss() => Ok(false),
            checked => checked.map(|()| true),
        }
    }

    /// Authenticates all blocks of the last segment, which is not sealed.
    pub(super) fn check_open_segment(&self, last: &SegmentRef) -> Result<()> {
        let opened = self.list.open_segment(last)?;
        let scanned = Scanned::of(self.list, &opened, Proof::Tag)?;
        scanned.check_durable_part()?;
        let mut prover = Prover::new(self.list.gate(), &opened);
        scanned.again(|block, _| {
            if prover.holds(block.offset, &block.header)? {
                return Ok(());
            }
            let at = opened.at(block.offset).block(block.header.number);
            Err(Error::corrupt(at, "the tag of a block does not hold"))
        })
    }

    /// Ends a segment at `mark`, and rewrites the groups found above it into a new one. With a
    /// `prover`, blocks whose tag does not hold are given up, and the segment ends in front of the
    /// first of them. Without one they are an error when they are rewritten.
    fn cut(
        &self,
        opened: &Opened,
        scanned: &Scanned<'_>,
        mark: u64,
        mut prover: Option<Prover<'_>>,
    ) -> Result<Cut> {
        let header = &opened.header;
        // Blocks under a key that was destroyed on purpose cannot be read any more.
        let key = self.env.gate.with_cipher(header, &opened.name.path, |_| Ok(()));
        let readable = !matches!(key, Err(Error::Shredded { .. }));
        let behind = |kept: &Kept<'_>| {
            Next::behind(header, header.limit_seq, Predecessor::Cut(kept.head().into_end()))
        };
        let mut kept = Kept::new(opened, mark);
        let mut rewriting: Option<Rewriting<'_>> = None;
        let (mut groups, mut given_up) = (0, 0);
        scanned.again(|block, payload| {
            if let Some(prover) = &mut prover
                && !prover.holds(block.offset, &block.header)?
            {
                kept.stop();
                given_up += block.header.block_len();
                return Ok(());
            }
            if kept.takes(&block, payload) || block.header.kind == BlockKind::Mark || !readable {
                return Ok(());
            }
            let rewriting = match &mut rewriting {
                Some(rewriting) => rewriting,
                none => {
                    let next = Next { first_seq: block.header.first_seq, ..behind(&kept) };
                    let first_time_us = block.header.first_time_us;
                    none.insert(Rewriting::begin(self.env, opened, next, first_time_us)?)
                }
            };
            groups += u64::from(block.header.group_count);
            rewriting.add(&block)
        })?;
        let mut next = behind(&kept);
        if let Some(rewriting) = rewriting {
            let (name, rewritten) = rewriting.finish()?;
            self.list.push(name);
            next = Next { first_seq: rewritten.first_seq.max(header.limit_seq), ..rewritten };
        }
        Ok(Cut { next, groups, given_up })
    }

    /// The head behind the blocks in place of the last segment, if no process has ended it and it
    /// cannot be ended now. Syncs those blocks. Needs no key.
    pub(super) fn head_in_place(&self) -> Result<Option<Head>> {
        let segments = self.list.segments(true)?;
        let Some(last) = segments.last() else { return head_on_disk(self.list) };
        let opened = self.list.open_segment(last)?;
        if !matches!(opened.end, End::Unknown) {
            return head_on_disk(self.list);
        }
        self.list.make_names_durable()?;
        self.env.sync_file(&*opened.file, &last.path)?;
        let scanned = Scanned::of(self.list, &opened, Proof::Crc)?;
        scanned.check_durable_part()?;
        let end = scanned.end();
        Ok(Some(Head::open(&opened.header, &in_place(&opened, end)?, end)))
    }
}

/// The result of cutting off a segment.
struct Cut {
    /// Where the next segment begins.
    next: Next,
    /// How many groups were rewritten.
    groups: u64,
    /// The bytes of the blocks that were found and given up.
    given_up: u64,
}

/// The blocks from the front of a segment that stay where they are when it is cut off.
struct Kept<'a> {
    opened: &'a Opened,
    /// Up to where blocks are kept.
    mark: u64,
    builder: FooterBuilder,
    /// Where the last one ends.
    end: u64,
    complete: bool,
}

impl<'a> Kept<'a> {
    fn new(opened: &'a Opened, mark: u64) -> Self {
        let (builder, end) = (FooterBuilder::of(&opened.header), opened.header.body_start);
        Self { opened, mark, builder, end, complete: false }
    }

    /// Takes the next block of the segment, if it is to be kept. After the first block that is not,
    /// none is.
    fn takes(&mut self, block: &ScannedBlock, payload: &[u8]) -> bool {
        let end = block.offset + block.header.block_len();
        self.complete |= !block.contiguous || end > self.mark;
        if !self.complete {
            add(&mut self.builder, block, payload);
            self.end = end;
        }
        !self.complete
    }

    /// Keeps no further block.
    fn stop(&mut self) {
        self.complete = true;
    }

    /// The head of the shard, if the segment ends behind these blocks.
    fn head(&self) -> Head {
        Head::open(&self.opened.header, &self.builder, self.end)
    }
}

/// A new segment that is made of blocks of another one.
struct Rewriting<'a> {
    env: &'a WriteEnv,
    opened: &'a Opened,
    new: NewSegment,
    builder: FooterBuilder,
    /// Where the next block goes.
    offset: u64,
    bytes: Vec<u8>,
    buffer: SealBuffer,
}

impl Drop for Rewriting<'_> {
    fn drop(&mut self) {
        self.buffer.wipe();
        self.env.gate.end_segment(self.new.header().segment);
    }
}

impl<'a> Rewriting<'a> {
    fn begin(
        env: &'a WriteEnv,
        opened: &'a Opened,
        next: Next,
        first_time_us: u64,
    ) -> Result<Self> {
        let mut plan = env.plan();
        if opened.header.suite.encrypts() {
            // Encrypted blocks stay encrypted, also if encryption has been turned off since.
            plan.suite = plan.suite.encrypting();
        }
        let keys = KeyUse::Admitted;
        let new = NewSegment::create(env, &next, &plan, keys, Some(first_time_us))?;
        let (builder, offset) = (FooterBuilder::of(new.header()), new.header().body_start);
        Ok(Self {
            env,
            opened,
            new,
            builder,
            offset,
            bytes: Vec::new(),
            buffer: SealBuffer::default(),
        })
    }

    /// Seals the groups of a block under the key of the new segment, and writes them into it.
    fn add(&mut self, block: &ScannedBlock) -> Result<()> {
        let (env, opened, target) = (self.env, self.opened, self.new.header());
        let path = &*opened.name.path;
        self.bytes.resize(block.header.block_len() as usize, 0);
        read_exact_at(&*opened.file, &mut self.bytes, block.offset)
            .map_err(Error::io("read", path))?;
        let at = opened.at(block.offset).block(block.header.number);
        let view = BlockView::parse(&self.bytes)
            .map_err(|error| Error::corrupt(at.clone(), error.to_string()))?;
        let payload = self.buffer.begin();
        payload.resize(SealBuffer::PAYLOAD_AT + view.payload.len(), 0);
        env.gate.with_cipher(&opened.header, path, |cipher| {
            let (_, plain) = payload.split_at_mut(SealBuffer::PAYLOAD_AT);
            cipher
                .open_block(&view.header.nonce(), view.header_bytes, view.payload, &view.tag, plain)
                .map_err(|_| Error::Tampered { at, what: "a block" })
        })?;
        let mut header = view.header;
        header.segment_tag = target.segment_tag();
        header.number = self.builder.so_far().block_count;
        header.durable_mark = target.body_start;
        header.nonce_random = env.draw(path)?;
        let tag = self.new.write_block(env, &mut self.buffer, &header, self.offset)?;
        let payload_hash = self.builder.hash_payload(self.buffer.stored_payload());
        self.builder.add(self.offset, &header, &payload_hash, &tag);
        self.offset += header.block_len();
        Ok(())
    }

    /// Seals the segment, and gives it its name once it is durable. Returns its entry for the list,
    /// and where the next segment begins.
    fn finish(self) -> Result<(SegmentRef, Next)> {
        let head = self.new.seal(self.env, &self.builder, self.offset)?;
        self.new.publish(self.env)?;
        let predecessor = Predecessor::Sealed(head.clone().into_end());
        let next = Next::behind(self.new.header(), head.next_seq, predecessor);
        Ok((self.new.sealed_name(&head), next))
    }
}

/// The head of the shard by its files, for a checkpoint of a shard that this process does not
/// write.
pub(super) fn head_on_disk(list: &SegmentList) -> Result<Option<Head>> {
    if !list.is_read_only() {
        list.make_names_durable()?;
    }
    let segments = list.segments(true)?;
    let Some(last) = segments.last().filter(|last| !last.is_missing()) else {
        return Ok(list.record().head);
    };
    let opened = list.open_segment(last)?;
    match &opened.end {
        End::Sealed(sealed) => {
            Ok(Some(list.last_head(&opened.header, &sealed.footer, opened.file_len()?)))
        }
        End::Active(view) => Ok(Some(view.head())),
        End::Cut(_) | End::Damaged(_) => Ok(list.record().head),
        End::Unknown => {
            // Under a customer's key no key is used: a checkpoint is also made while it is revoked.
            let proof = if list.gate().keys().lease.is_none() { Proof::Tag } else { Proof::Crc };
            let scanned = Scanned::of(list, &opened, proof)?;
            let mut kept = Kept::new(&opened, scanned.check_durable_part()?);
            scanned.again(|block, payload| {
                kept.takes(&block, payload);
                Ok(())
            })?;
            Ok(Some(kept.head()))
        }
    }
}
