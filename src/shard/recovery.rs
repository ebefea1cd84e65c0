//! What happens to a segment that nobody sealed.
//!
//! Up to its durable mark it is kept where it is, and never changed: the header of its successor says where it ends. Valid blocks
//! above the mark are rewritten into a new segment, because after a failed sync the page cache may show what the disk does not
//! have; what follows them is a torn tail, dropped and reported. Damage below the mark is corruption: reported, nothing touched.
//!
//! A scan keeps no list of blocks. What needs them goes over the file again, and fails if it finds others than the scan did.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::Serialize;
use tracing::warn;

use super::{
    Head, Load, Proof, ReadMode, SegmentReader, Shard,
    segments::{End, Opened, SegmentRef, read_header},
    writer::{NewSegment, Next},
};
use crate::{
    Error, Result,
    crypto::wipe,
    error::Location,
    io::{OpenMode, read_exact_at},
    segment::{
        BlockHeader, BlockKind, BlockView, DecodedHeader, Footer, FooterBuilder, Predecessor, Prove, ScanReport,
        ScanVerdict, ScannedBlock, SealBuffer, scan,
    },
    sync::{lock, read},
};

/// What recovery found in a shard that was not closed cleanly.
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

/// What a repair kept and gave up.
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
}

/// A scanned segment. The blocks themselves are not kept: there may be as many as a file has room for.
struct Scanned {
    report: ScanReport,
    /// What decided about the blocks behind damage.
    proof: Proof,
    /// What all blocks that were found add up to.
    all: FooterBuilder,
    /// The bytes of those blocks.
    found: u64,
    /// Whether one of them lies behind damage.
    behind: bool,
}

impl Scanned {
    /// How many bytes belong to no block that can be read.
    fn bytes_lost(&self, opened: &Opened) -> u64 {
        self.report.data_end.saturating_sub(opened.header.body_start + self.found)
    }
}

/// Checks the tags of blocks, one after the other.
struct Prover<'a> {
    shard: &'a Shard,
    opened: &'a Opened,
    bytes: Vec<u8>,
    plain: Vec<u8>,
}

impl<'a> Prover<'a> {
    fn new(shard: &'a Shard, opened: &'a Opened) -> Self {
        Self { shard, opened, bytes: Vec::new(), plain: Vec::new() }
    }

    /// Whether there is a block with this header at `offset`, and its tag holds under the key of the segment. Where that key was
    /// destroyed on purpose the CRC32 alone decides.
    fn holds(&mut self, offset: u64, header: &BlockHeader) -> Result<bool> {
        let (file, path) = (&self.opened.file, &*self.opened.name.path);
        self.bytes.resize(header.block_len() as usize, 0);
        let read = file.read_at(&mut self.bytes, offset).map_err(Error::io("read", path))?;
        let view = match BlockView::parse(self.bytes.get(..read).unwrap_or_default()) {
            Ok(view) if view.header == *header => view,
            // It has been changed since it was found.
            _ => return Ok(false),
        };
        self.plain.clear();
        self.plain.resize(view.payload.len(), 0);
        let plain = &mut self.plain;
        let held = self.shard.context.gate.with_cipher(&self.opened.header, path, |cipher| {
            Ok(cipher.open_block(&header.nonce(), view.header_bytes, view.payload, &view.tag, plain).is_ok())
        });
        wipe(plain);
        match held {
            Err(Error::Shredded { .. }) => Ok(true),
            held => held,
        }
    }
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

    /// Takes the next block of the segment, if it is to be kept. After the first that is not, none is.
    fn takes(&mut self, block: &ScannedBlock, payload: &[u8]) -> bool {
        let end = block.offset + block.header.block_len();
        self.complete |= !block.contiguous || end > self.mark;
        if !self.complete {
            add(&mut self.builder, block, payload);
            self.end = end;
        }
        !self.complete
    }

    /// Where the segment stands if it ends behind them.
    fn head(&self) -> Head {
        Head::open(&self.opened.header.header, &self.builder, self.end)
    }
}

/// Adds a block that was found to what a footer says.
fn add(builder: &mut FooterBuilder, block: &ScannedBlock, payload: &[u8]) {
    let payload_hash = builder.hash_payload(payload);
    builder.add(block.offset, &block.header, &payload_hash, &block.tag);
}

/// A segment in the making, out of blocks of another one.
struct Rewriting<'a> {
    shard: &'a Shard,
    opened: &'a Opened,
    /// Where it was begun.
    next: Next,
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
        self.shard.context.gate.end_segment(self.new.header.header.segment);
    }
}

impl<'a> Rewriting<'a> {
    fn begin(shard: &'a Shard, opened: &'a Opened, next: Next) -> Result<Self> {
        let mut plan = *read(&shard.context.plan);
        if opened.header.header.suite.encrypts() {
            // What was encrypted stays encrypted, also if encryption has been turned off since.
            plan.suite = plan.suite.encrypting();
        }
        let new = NewSegment::create(shard, &next, &plan)?;
        let (builder, offset) = (FooterBuilder::of(&new.header), new.header.body_start);
        Ok(Self { shard, opened, next, new, builder, offset, bytes: Vec::new(), buffer: SealBuffer::default() })
    }

    /// Seals the groups of a block under the key of the new segment, and writes them into it.
    fn add(&mut self, block: &ScannedBlock) -> Result<()> {
        let (gate, opened) = (&self.shard.context.gate, self.opened);
        let path = &*opened.name.path;
        let (target, new_path) = (&self.new.header, &*self.new.path);
        self.bytes.resize(block.header.block_len() as usize, 0);
        read_exact_at(&*opened.file, &mut self.bytes, block.offset).map_err(Error::io("read", path))?;
        let at = opened.at(block.offset).block(block.header.number);
        let view = BlockView::parse(&self.bytes).map_err(|error| Error::corrupt(at.clone(), error.to_string()))?;
        let payload = self.buffer.begin();
        payload.resize(SealBuffer::PAYLOAD_AT + view.payload.len(), 0);
        gate.with_cipher(&opened.header, path, |cipher| {
            let (_, plain) = payload.split_at_mut(SealBuffer::PAYLOAD_AT);
            cipher
                .open_block(&view.header.nonce(), view.header_bytes, view.payload, &view.tag, plain)
                .map_err(|_| Error::Tampered { at, what: "a block" })
        })?;
        let mut header = view.header;
        header.segment_tag = target.segment_tag();
        header.number = self.builder.so_far().block_count;
        header.durable_mark = target.body_start;
        let random = &self.shard.context.random;
        random.fill(&mut header.nonce_random).map_err(Error::io("draw a random nonce for", new_path))?;
        let sealing = self.buffer.with_header(&target.header_hash, &header);
        let tag = gate.with_cipher(target, new_path, |cipher| {
            cipher.seal_block(&header.nonce(), sealing, SealBuffer::PAYLOAD_AT).map_err(Error::Crypto)
        })?;
        let sealed = self.buffer.finish(&tag);
        self.new.file.write_at(sealed, self.offset).map_err(Error::io("write a block to", new_path))?;
        let payload_hash = self.builder.hash_payload(self.buffer.stored_payload());
        self.builder.add(self.offset, &header, &payload_hash, &tag);
        self.offset += header.block_len();
        Ok(())
    }

    /// Seals the segment, and gives it its name when it is durable. Returns where the shard goes on.
    fn finish(self) -> Result<Next> {
        let (shard, new) = (self.shard, &self.new);
        let len = new.seal(shard, &self.builder, self.offset)?;
        new.publish(shard)?;
        let head = Head::sealed(&new.header, &self.builder.build(0, [0; 8], true), len);
        let name = SegmentRef {
            ordinal: self.next.ordinal,
            first_seq: self.next.first_seq,
            epoch: new.epoch,
            path: Arc::clone(&new.path),
            active: None,
            sealed: Some(head.clone().into_end()),
        };
        shard.set_segments(|segments| segments.push(name));
        Ok(Next {
            ordinal: head.ordinal + 1,
            first_seq: head.next_seq,
            last_time_us: self.next.last_time_us,
            predecessor: Predecessor::Sealed(head.into_end()),
        })
    }
}

/// What cutting off a segment came to.
struct Cut {
    /// Where the shard goes on.
    next: Next,
    /// How many groups were rewritten.
    groups: u64,
    /// The bytes of the blocks that were given up although they were found.
    given_up: u64,
}

impl Shard {
    /// Finds out where the shard ends and deals with an unclean end. Called by the writer, with its lock held.
    pub(super) fn recover(&self) -> Result<Next> {
        self.remove_leftovers()?;
        let segments = self.segments(false)?;
        if !segments.is_empty() {
            self.make_names_durable()?;
        }
        let record = self.record();
        let Some(last) = segments.last() else {
            return Ok(match record.head {
                Some(head) => Next {
                    ordinal: head.ordinal + 1,
                    first_seq: head.next_seq.max(record.first_seq),
                    last_time_us: head.last_time_us,
                    predecessor: Predecessor::Sealed(head.into_end()),
                },
                None => Next {
                    ordinal: record.first_ordinal,
                    first_seq: record.first_seq,
                    last_time_us: 0,
                    predecessor: Predecessor::None,
                },
            });
        };
        let opened = self.open_segment(last)?;
        opened.header.header.features.check_writing().map_err(|error| error.in_file(&last.path, 0))?;
        match self.authenticate(&opened) {
            // Its key was destroyed on purpose: there is nothing left to authenticate, and the shard goes on behind it.
            Err(Error::Shredded { .. }) => {}
            verified => verified?,
        }
        match &opened.end {
            End::Sealed(footer) => {
                let len = opened.file.len().map_err(Error::io("get the length of", &*last.path))?;
                let head = self.last_head(&opened.header, &footer.footer, len);
                Ok(Next {
                    ordinal: head.ordinal + 1,
                    first_seq: head.next_seq,
                    last_time_us: footer.footer.last_time_us.max(opened.header.header.created_us),
                    predecessor: Predecessor::Sealed(head.into_end()),
                })
            }
            End::Cut(end) => Ok(Next {
                ordinal: end.ordinal + 1,
                first_seq: opened.header.header.limit_seq,
                last_time_us: end.last_time_us.max(opened.header.header.created_us),
                predecessor: Predecessor::Cut(*end),
            }),
            _ => {
                let scanned = self.scan(&opened, Proof::Tag)?;
                let mark = self.check_durable_part(&opened, &scanned)?;
                let Cut { next, groups: groups_rewritten, .. } = self.cut(&opened, &scanned, mark, None)?;
                let bytes_dropped = scanned.bytes_lost(&opened);
                if groups_rewritten > 0 || bytes_dropped > 0 {
                    let segment = last.path.to_path_buf();
                    warn!(
                        logstore = %self.name(),
                        shard = self.id,
                        segment = %segment.display(),
                        groups_rewritten,
                        bytes_dropped,
                        "a shard was recovered"
                    );
                    lock(&self.notices).push(RecoveryNotice {
                        shard: self.id,
                        segment,
                        groups_rewritten,
                        bytes_dropped,
                    });
                }
                Ok(next)
            }
        }
    }

    /// The ordinal of the next segment of a shard that has no writer. It is taken from the directory, because a writer that failed may
    /// have created a segment that is not in the list. Syncs the directory first, so that no ordinal is used twice.
    pub(super) fn next_ordinal_on_disk(&self) -> Result<u64> {
        self.make_names_durable()?;
        let record = self.record();
        let listed = self.list()?.last().map_or(0, |last| last.ordinal);
        let noted = record.head.map_or(0, |head| head.ordinal);
        Ok((listed.max(noted) + 1).max(record.first_ordinal))
    }

    /// The head of the shard when its last segment is sealed. Numbers behind its end may have been given to groups that were still
    /// queued when it was sealed, or are above the mark of what it was recovered from: only a head that the catalogue has noted says
    /// where the next segment may begin before the reserved limit.
    pub(crate) fn last_head(&self, header: &DecodedHeader, footer: &Footer, file_len: u64) -> Head {
        let head = Head::sealed(header, footer, file_len);
        let noted = self.record().head.filter(|noted| noted.sealed && noted.ordinal == head.ordinal);
        let next_seq = noted.map_or(header.header.limit_seq, |noted| noted.next_seq.max(head.next_seq));
        Head { next_seq, ..head }
    }

    /// Goes over the blocks of a segment up to offset `len`: those in place, and with `behind` also those behind damage.
    fn pass(
        &self,
        opened: &Opened,
        len: u64,
        behind: Option<Proof>,
        on_block: impl FnMut(ScannedBlock, &[u8]) -> Result<()>,
    ) -> Result<ScanReport> {
        let read_at =
            |offset, buf: &mut [u8]| opened.file.read_at(buf, offset).map_err(Error::io("read", &*opened.name.path));
        let mut prover = Prover::new(self, opened);
        let mut by_tag = |offset, header: &BlockHeader| prover.holds(offset, header);
        let mut by_crc = |_, _: &BlockHeader| Ok(true);
        let prove: Option<Prove<'_, Error>> = match behind {
            None => None,
            Some(Proof::Tag) => Some(&mut by_tag),
            Some(Proof::Crc) => Some(&mut by_crc),
        };
        scan(&opened.header, len, read_at, on_block, prove)
    }

    fn scan(&self, opened: &Opened, proof: Proof) -> Result<Scanned> {
        let (len, footer_at) = self.blocks_end(opened, proof)?;
        let (mut all, mut found, mut behind) = (FooterBuilder::of(&opened.header), 0, false);
        let mut report = self.pass(opened, len, Some(proof), |block, payload| {
            add(&mut all, &block, payload);
            found += block.header.block_len();
            behind |= !block.contiguous;
            Ok(())
        })?;
        if let Some(mark) = footer_at {
            report.mark = mark;
            if report.end < mark {
                report.verdict = ScanVerdict::Damaged { at: report.end, mark };
            }
        }
        Ok(Scanned { report, proof, all, found, behind })
    }

    /// Goes over the blocks that a scan has found once more.
    ///
    /// # Errors
    /// [`Error::Corrupt`], at the end, if they are not the same any more.
    fn again(
        &self,
        opened: &Opened,
        scanned: &Scanned,
        mut on_block: impl FnMut(ScannedBlock, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut all = FooterBuilder::of(&opened.header);
        let behind = scanned.behind.then_some(scanned.proof);
        let report = self.pass(opened, scanned.report.data_end, behind, |block, payload| {
            add(&mut all, &block, payload);
            on_block(block, payload)
        })?;
        if all.digest() != scanned.all.digest() {
            return Err(Error::corrupt(opened.at(report.end), "the segment was changed while it was being read"));
        }
        Ok(())
    }

    /// What the blocks in place in front of offset `end` add up to.
    pub(super) fn in_place(&self, opened: &Opened, end: u64) -> Result<FooterBuilder> {
        let mut builder = FooterBuilder::of(&opened.header);
        self.pass(opened, end, None, |block, payload| {
            add(&mut builder, &block, payload);
            Ok(())
        })?;
        Ok(builder)
    }

    /// Whether everything that is known to have been durable is there. Returns up to where that was.
    fn check_durable_part(&self, opened: &Opened, scanned: &Scanned) -> Result<u64> {
        let report = &scanned.report;
        if let ScanVerdict::Damaged { at, mark } = report.verdict {
            let what = format!("a block below the durable mark ({mark}) is damaged");
            return Err(Error::corrupt(opened.at(at).block(report.blocks), what));
        }
        let noted = self.record().head.filter(|head| head.ordinal == opened.name.ordinal);
        // A reader may have opened it before the writer sealed it. The head of a sealed segment does not say where its blocks end.
        let Some(head) = noted.filter(|head| !(head.sealed && matches!(opened.end, End::Unknown))) else {
            return Ok(report.mark);
        };
        if report.end < head.bytes {
            let what = format!("a block below what the catalogue knows to be durable ({}) is damaged", head.bytes);
            return Err(Error::corrupt(opened.at(report.end).block(report.blocks), what));
        }
        // The digest is over the hash of the header too, and so over the id of the segment.
        if self.in_place(opened, head.bytes)?.digest() != head.digest {
            let what = format!("{} is another segment than the catalogue knows", opened.name.path.display());
            return Err(Error::RolledBack { what });
        }
        Ok(report.mark.max(head.bytes))
    }

    /// Up to where a scanned segment is known to have been durable.
    fn durable_mark(&self, opened: &Opened, scanned: &Scanned) -> u64 {
        let head = self.record().head.filter(|head| head.ordinal == opened.name.ordinal);
        scanned.report.mark.max(head.map_or(0, |head| head.bytes))
    }

    /// Ends a segment at `mark`, and rewrites the groups found above it into a new one. With a `prover`, blocks whose tag does not hold
    /// are given up, and the segment ends in front of the first of them; without one they are an error, where they are rewritten.
    fn cut(&self, opened: &Opened, scanned: &Scanned, mark: u64, mut prover: Option<Prover<'_>>) -> Result<Cut> {
        let header = &opened.header.header;
        // What is under a key that was destroyed on purpose cannot be read any more.
        let key = self.context.gate.with_cipher(&opened.header, &opened.name.path, |_| Ok(()));
        let readable = !matches!(key, Err(Error::Shredded { .. }));
        let behind = |kept: &Kept<'_>| Next {
            ordinal: header.ordinal + 1,
            first_seq: header.limit_seq,
            last_time_us: scanned.all.so_far().last_time_us.max(header.created_us),
            predecessor: Predecessor::Cut(kept.head().into_end()),
        };
        let mut kept = Kept::new(opened, mark);
        let mut rewriting: Option<Rewriting<'_>> = None;
        let (mut groups, mut given_up) = (0, 0);
        self.again(opened, scanned, |block, payload| {
            if let Some(prover) = &mut prover
                && !prover.holds(block.offset, &block.header)?
            {
                kept.complete = true;
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
                    none.insert(Rewriting::begin(self, opened, next)?)
                }
            };
            groups += u64::from(block.header.group_count);
            rewriting.add(&block)
        })?;
        let mut next = behind(&kept);
        if let Some(rewriting) = rewriting {
            let rewritten = rewriting.finish()?;
            next = Next { first_seq: rewritten.first_seq.max(header.limit_seq), ..rewritten };
        }
        Ok(Cut { next, groups, given_up })
    }

    /// Where the shard stands by what is on disk, for a checkpoint of a shard that this process does not write.
    pub(super) fn head_on_disk(&self) -> Result<Option<Head>> {
        if !self.context.read_only {
            self.make_names_durable()?;
        }
        let segments = self.segments(true)?;
        let Some(last) = segments.last() else { return Ok(self.record().head) };
        let opened = self.open_segment(last)?;
        match &opened.end {
            End::Sealed(footer) => {
                let len = opened.file.len().map_err(Error::io("get the length of", &*last.path))?;
                Ok(Some(self.last_head(&opened.header, &footer.footer, len)))
            }
            End::Active(view) => Ok(Some(view.head())),
            End::Cut(_) => Ok(self.record().head),
            End::Unknown => {
                // Under a customer's key no key is asked for: a checkpoint is also made while it is revoked.
                let proof = if self.context.gate.keys().lease.is_none() { Proof::Tag } else { Proof::Crc };
                let scanned = self.scan(&opened, proof)?;
                let mut kept = Kept::new(&opened, self.check_durable_part(&opened, &scanned)?);
                self.again(&opened, &scanned, |block, payload| {
                    kept.takes(&block, payload);
                    Ok(())
                })?;
                Ok(Some(kept.head()))
            }
        }
    }

    /// Where the shard stands by the blocks in place of its last segment, which no process has ended and which cannot be ended now. They
    /// are made durable. Asks for no key.
    pub(crate) fn head_in_place(&self) -> Result<Option<Head>> {
        let segments = self.settled_segments()?;
        let Some(last) = segments.last() else { return self.head_on_disk() };
        let opened = self.open_segment(last)?;
        if !matches!(opened.end, End::Unknown) {
            return self.head_on_disk();
        }
        self.make_names_durable()?;
        self.sync_file(&*opened.file, &last.path)?;
        let scanned = self.scan(&opened, Proof::Crc)?;
        self.check_durable_part(&opened, &scanned)?;
        let end = scanned.report.end;
        Ok(Some(Head::open(&opened.header.header, &self.in_place(&opened, end)?, end)))
    }

    /// One past the last sequence number that a reader can see, authenticated: a reader begins or ends there.
    pub(super) fn proven_end_seq(&self) -> Result<u64> {
        let segments = self.segments(true)?;
        let Some(last) = segments.last() else { return self.end_seq() };
        let opened = self.open_segment(last)?;
        self.authenticate(&opened)?;
        Ok(match &opened.end {
            End::Sealed(footer) => {
                let end_seq = footer.footer.end_seq;
                // The last blocks have to end there too, or a reader would end before them.
                let mut reader = SegmentReader::new(opened, ReadMode::Pread)?;
                reader.seek(end_seq.saturating_sub(1), 0);
                reader.prove_end(self, &self.context.gate)?;
                end_seq
            }
            End::Cut(end) => end.end_seq,
            End::Active(view) => view.with_counts(|counts| counts.end_seq),
            End::Unknown => {
                let mut end_seq = opened.header.header.first_seq;
                let mut reader = SegmentReader::new(opened, ReadMode::Pread)?;
                while let Load::Block(header) = reader.load(self)? {
                    reader.prove_place(&header, &self.context.gate)?;
                    end_seq = header.end_seq();
                    reader.pass();
                }
                reader.prove_passed(&self.context.gate)?;
                end_seq
            }
        })
    }

    /// One past the last sequence number that a reader can see.
    pub(crate) fn end_seq(&self) -> Result<u64> {
        let segments = self.segments(true)?;
        let Some(last) = segments.last() else {
            let record = self.record();
            return Ok(record.head.map_or(record.first_seq, |head| head.end_seq.max(record.first_seq)));
        };
        let opened = self.open_segment(last)?;
        Ok(match &opened.end {
            End::Sealed(footer) => footer.footer.end_seq,
            End::Cut(end) => end.end_seq,
            End::Active(view) => view.with_counts(|counts| counts.end_seq),
            End::Unknown => {
                let len = opened.file.len().map_err(Error::io("get the length of", &*last.path))?;
                self.count(&opened, len)?.0.end_seq
            }
        })
    }

    /// Gives up what is damaged at the end of the shard, so that it can be written again: everything readable is kept. Returns what
    /// that was.
    pub(crate) fn repair(&self) -> Result<RepairReport> {
        let mut writer = lock(&self.writer);
        let none = RepairReport { shard: self.id, segment: None, groups_salvaged: 0, bytes_lost: 0 };
        let segments = self.segments(true)?;
        let Some(last) = segments.last().filter(|last| last.active.is_none()) else { return Ok(none) };
        if self.recover_is_possible(last)? {
            // A broken rule of the format, or a retired key, is not mended by giving up blocks: the caller hears of it.
            self.check_rules(&self.open_segment(last)?)?;
            return Ok(none);
        }
        let path = &*last.path;
        let file = self.context.disk.open(path, OpenMode::Read).map_err(Error::io("open", path))?;
        let header = Arc::new(read_header(&*file, path)?);
        let opened = Opened { name: last.clone(), file, header, end: End::Unknown, vouched: None };
        self.authenticate(&opened)?;
        let scanned = self.scan(&opened, Proof::Tag)?;
        let mark = self.durable_mark(&opened, &scanned).min(scanned.report.end);
        let prover = Prover::new(self, &opened);
        let Cut { next, groups: groups_salvaged, given_up } = self.cut(&opened, &scanned, mark, Some(prover))?;
        writer.next = Some(next);
        writer.begin_segment(self)?;
        Ok(RepairReport {
            shard: self.id,
            segment: Some(path.to_path_buf()),
            groups_salvaged,
            bytes_lost: scanned.bytes_lost(&opened) + given_up,
        })
    }

    /// Whether the last segment can be opened, recovered and read without a repair.
    fn recover_is_possible(&self, last: &SegmentRef) -> Result<bool> {
        let damaged = |error: &Error| matches!(error, Error::Corrupt { .. } | Error::Truncated { .. });
        let checked = self.open_segment(last).and_then(|opened| match &opened.end {
            End::Unknown => {
                let scanned = self.scan(&opened, Proof::Tag)?;
                self.check_durable_part(&opened, &scanned)?;
                let (mut prover, mut hold) = (Prover::new(self, &opened), true);
                self.again(&opened, &scanned, |block, _| {
                    hold = hold && prover.holds(block.offset, &block.header)?;
                    Ok(())
                })?;
                Ok(hold)
            }
            _ => Ok(true),
        });
        match checked {
            Err(error) if damaged(&error) => Ok(false),
            checked => checked,
        }
    }

    /// Counts the blocks in place of a segment without a footer, up to `end`. Needs no key. Also returns where the last of them ends.
    pub(crate) fn count(&self, opened: &Opened, end: u64) -> Result<(Footer, u64)> {
        let mut builder = FooterBuilder::of(&opened.header);
        let report = self.pass(opened, end, None, |block, _| {
            builder.count(block.offset, &block.header);
            Ok(())
        })?;
        Ok((builder.so_far().clone(), report.end))
    }

    /// Authenticates what reading a segment, or going on behind it, rests on before its first block: its header, and what says where
    /// it ends.
    pub(super) fn authenticate(&self, opened: &Opened) -> Result<()> {
        // Where a key was destroyed on purpose there is nothing left to authenticate, nor to read.
        let prove = |header: &DecodedHeader, path: &Path| match self.context.gate.with_cipher(header, path, |_| Ok(()))
        {
            Err(Error::Shredded { .. }) => Ok(()),
            proved => proved,
        };
        match &opened.end {
            End::Active(_) => return Ok(()),
            End::Sealed(_) => self.verify_footer(opened)?,
            End::Cut(_) | End::Unknown => {
                prove(&opened.header, &opened.name.path)?;
                if let Some((header, path)) = self.successor(&opened.name)? {
                    prove(&header, &path)?;
                }
            }
        }
        self.check_rules(opened)?;
        self.check_older(opened)
    }

    /// Authenticates the footer of a sealed segment.
    pub(crate) fn verify_footer(&self, opened: &Opened) -> Result<()> {
        let End::Sealed(decoded) = &opened.end else { return Ok(()) };
        let path = &*opened.name.path;
        let footer = &decoded.footer;
        let encoded = footer.encode();
        self.context.gate.with_cipher(&opened.header, path, |cipher| {
            cipher
                .verify_tag_only(&footer.nonce(), &encoded, &decoded.tag)
                .map_err(|_| Error::Tampered { at: Location::new(path, footer.offset), what: "the footer" })
        })
    }

    /// What a scan says about damage at the end of a segment that nobody sealed: an error below the durable mark, nothing above it.
    pub(super) fn damage_in_open_segment(&self, opened: &Opened, proof: Proof) -> Result<()> {
        let scanned = self.scan(opened, proof)?;
        self.check_durable_part(opened, &scanned).map(|_| ())
    }
}
