//! Reads the blocks of one segment.

use std::sync::Arc;

use super::{
    reader::ReadMode,
    rules::check_times,
    scanning::check_open_end,
    segments::{End, Opened, Proof, SegmentList},
};
use crate::{
    Error, Result,
    crypto::{hash, wipe},
    error::Location,
    io::Map,
    keys::gate::Gate,
    segment::{
        BlockHeader, BlockKind, BlockView, Compression, DecodeError, Decompressor, Footer,
        IndexEntry, SegmentHeader,
    },
};

/// How much is read at once, in bytes, unless a block is longer.
const CHUNK_BYTES: usize = 256 << 10;

/// The result of [`SegmentReader::load`].
pub(crate) enum Load {
    /// The block is in memory and its CRC holds.
    Block(BlockHeader),
    /// The segment ends here, by its footer or its successor.
    End,
    /// Nothing more, so far.
    NotYet,
}

/// How a segment has changed since a reader reached its end.
pub(super) enum Refresh {
    Same,
    /// It has been ended, or has more blocks.
    Changed,
    /// Retention has dropped it.
    Dropped,
}

/// Reads the blocks of one segment in order.
#[derive(Debug)]
pub(crate) struct SegmentReader {
    pub(crate) opened: Opened,
    map: Option<Map>,
    /// The offset of the next block, and its number.
    pub(crate) offset: u64,
    number: u32,
    bytes: Vec<u8>,
    bytes_at: u64,
    /// The block that was loaded last.
    loaded: Option<BlockHeader>,
    /// The end of the last block, and the length of the file, for which the bytes behind that block
    /// were found to be no corruption.
    excused: Option<(u64, u64)>,
    /// How damage at the end of an unsealed segment is distinguished from a torn tail.
    pub(crate) proof: Proof,
    /// The last block that was passed over because of its header, and is not authenticated yet; and
    /// its offset.
    passed: Option<(u64, BlockHeader)>,
    /// One past the last sequence number of the blocks before the next one: no later block has a
    /// lower number.
    end_seq: u64,
    /// The last receive time of the blocks before the next one: no later block has an earlier one.
    last_time_us: u64,
    /// One past the number of the last group that was passed, if one was.
    groups_end: Option<u64>,
    /// The index entry that led to the next block.
    sought: Option<IndexEntry>,
    scratch: Scratch,
}

impl SegmentReader {
    pub(crate) fn new(opened: Opened, mode: ReadMode) -> Result<Self> {
        let map = match (&opened.end, mode) {
            (End::Sealed(_), ReadMode::Map) => {
                Some(opened.file.map().map_err(Error::io("map", &*opened.name.path))?)
            }
            _ => None,
        };
        Ok(Self {
            offset: opened.header.body_start,
            number: 0,
            end_seq: opened.header.first_seq,
            opened,
            map,
            bytes: Vec::new(),
            bytes_at: 0,
            loaded: None,
            excused: None,
            proof: Proof::Tag,
            passed: None,
            last_time_us: 0,
            groups_end: None,
            sought: None,
            scratch: Scratch::default(),
        })
    }

    /// Makes the segment follow the one with this header, whose last group was received at
    /// `before_us`; 0 if that is not known.
    pub(crate) fn follow(&mut self, before: &SegmentHeader, before_us: u64) -> Result<()> {
        self.last_time_us = if self.opened.header.is_setback() { 0 } else { before_us };
        check_times(before, before_us, &self.opened)
    }

    /// The last receive time in the segment, as far as it was read; 0 when more may have been read
    /// than the segment keeps.
    pub(crate) fn last_time_us(&self) -> u64 {
        match &self.opened.end {
            End::Cut(cut) if self.offset > cut.bytes => 0,
            End::Sealed(sealed) => self.last_time_us.max(sealed.footer.last_time_us),
            _ => self.last_time_us,
        }
    }

    /// One past the last sequence number of the blocks before the next one; at least the first number
    /// of the segment.
    pub(super) fn end_seq(&self) -> u64 {
        self.end_seq
    }

    /// Where the next block is.
    pub(crate) fn here(&self) -> Location {
        self.opened.at(self.offset).block(self.number)
    }

    /// Reads from here to the end, and authenticates the last block. Returns one past the last
    /// sequence number of the blocks that were read, if there was one.
    pub(super) fn prove_rest(&mut self, list: &SegmentList) -> Result<Option<u64>> {
        let mut end_seq = None;
        while let Load::Block(header) = self.load(list)? {
            self.prove_place(&header, list.gate())?;
            end_seq = Some(header.end_seq());
            self.pass();
        }
        self.prove_passed(list.gate())?;
        Ok(end_seq)
    }

    /// Passes over damaged blocks. Returns the first sequence number of the next block that can be
    /// read, which is not authenticated yet; `None` if the segment has none.
    pub(super) fn pass_lost_blocks(&mut self, list: &SegmentList) -> Result<Option<u64>> {
        while self.pass_damage()? {
            match self.load(list) {
                Ok(Load::Block(header)) => return Ok(Some(header.first_seq)),
                Ok(Load::End | Load::NotYet) => return Ok(None),
                Err(error) if error.is_loss() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Goes to the block that may have the first group with at least this number and receive time.
    pub(super) fn seek(&mut self, seq: u64, time_us: u64) {
        // A group in front of the first indexed block is searched from the first block on.
        let entry = |footer: &Footer| {
            let by_seq = footer.seek_seq(seq).filter(|entry| entry.first_seq <= seq);
            let by_time = footer.seek_time(time_us).filter(|entry| entry.first_time_us < time_us);
            by_seq.into_iter().chain(by_time).max_by_key(|entry| entry.offset).copied()
        };
        self.sought = match &self.opened.end {
            End::Sealed(sealed) => entry(&sealed.footer),
            End::Active(view) => view.with_counts(entry),
            End::Cut(_) | End::Unknown | End::Damaged(_) => None,
        };
        if let Some(entry) = self.sought {
            (self.offset, self.number) = (entry.offset, entry.block);
            self.end_seq = self.end_seq.max(entry.first_seq);
            self.last_time_us = self.last_time_us.max(entry.first_time_us);
        }
    }

    /// The offset up to which there may be blocks now.
    fn end(&self) -> Result<u64> {
        Ok(match &self.opened.end {
            End::Sealed(sealed) => sealed.footer.offset,
            End::Cut(end) => end.bytes,
            End::Active(view) => view.visible(),
            End::Unknown | End::Damaged(_) => self.opened.file_len()?,
        })
    }

    /// Reads the next block into memory and checks its CRC and its number. The other rules for its
    /// place are checked by [`SegmentReader::check_place`]; in an open segment also here, since a
    /// crash may have left a block that breaks them.
    pub(crate) fn load(&mut self, list: &SegmentList) -> Result<Load> {
        let end = self.end()?;
        if self.offset >= end {
            return match &self.opened.end {
                // A reader that had already read past the cut continues behind it.
                End::Cut(cut) if self.offset > cut.bytes => Ok(Load::End),
                End::Cut(cut) => self.ended(cut.blocks),
                End::Sealed(sealed) => self.ended(sealed.footer.block_count),
                End::Active(_) | End::Unknown => Ok(Load::NotYet),
                End::Damaged(cause) => Err((**cause).clone()),
            };
        }
        let (offset, number) = (self.offset, self.number);
        let tag = self.opened.header.segment_tag();
        match self.parse_next(end)? {
            Ok(header)
                if header.segment_tag == tag
                    && header.number == number
                    && (!matches!(self.opened.end, End::Unknown | End::Damaged(_))
                        || self.out_of_place(&header).is_none()) =>
            {
                self.loaded = Some(header);
                Ok(Load::Block(header))
            }
            other => {
                if matches!(self.opened.end, End::Unknown) {
                    // Not written yet, incomplete, or torn: no fault above the durable mark.
                    // Checked once, however often a caller polls.
                    if self.excused != Some((offset, end)) {
                        check_open_end(list, &self.opened, self.proof)?;
                        self.excused = Some((offset, end));
                    }
                    // The writer may still write a block over the bytes that were read.
                    self.bytes.clear();
                    return Ok(Load::NotYet);
                }
                if let End::Damaged(cause) = &self.opened.end {
                    return Err((**cause).clone());
                }
                let at = self.opened.at(offset).block(number);
                Err(match other {
                    // A whole block that was made for another place.
                    Ok(_) => Error::Tampered { at, what: "the place of a block" },
                    Err(error) => Error::corrupt(at, format!("a block: {error}")),
                })
            }
        }
    }

    /// The header of the next block, if the block is whole.
    fn parse_next(&mut self, end: u64) -> Result<Result<BlockHeader, DecodeError>> {
        let have = end - self.offset;
        let header = match self.window(BlockHeader::LEN, end)?.and_then(BlockHeader::decode) {
            Ok(header) => header,
            Err(error) => return Ok(Err(error)),
        };
        let needed = header.block_len();
        if needed > have {
            return Ok(Err(DecodeError::Short { needed, have }));
        }
        Ok(self.window(needed as usize, end)?.and_then(|block| Ok(BlockView::parse(block)?.header)))
    }

    /// The rule that the sequence numbers or the durable mark of the next block break.
    fn out_of_place(&self, header: &BlockHeader) -> Option<&'static str> {
        if header.first_seq < self.end_seq {
            return Some(
                "its sequence numbers lie below those of the block before it, or of its segment",
            );
        }
        if header.end_seq() > self.opened.header.limit_seq {
            return Some("its sequence numbers lie beyond the limit of its segment");
        }
        let durable = self.opened.header.body_start..=self.offset;
        (!durable.contains(&header.durable_mark))
            .then_some("its durable mark is outside of the blocks before it")
    }

    /// Checks the loaded block against those before it, and against the index that led to it.
    /// Neither it nor the block before it is authenticated yet: a caller that has the key uses
    /// [`SegmentReader::prove_place`].
    pub(crate) fn check_place(&self, header: &BlockHeader) -> Result<()> {
        let is_sought = |entry: IndexEntry| {
            (entry.first_seq, entry.first_time_us) == (header.first_seq, header.first_time_us)
        };
        let broken = if let Some(rule) = self.out_of_place(header) {
            rule
        } else if header.first_time_us < self.last_time_us {
            "it was received before the block before it, or before the end of the segment before"
        } else if !self.sought.is_none_or(is_sought) {
            "it is not the block that the index names"
        } else if !self.begins_as_footer_says(header) {
            "it is the first one with groups, and the footer names another first receive time"
        } else {
            return Ok(());
        };
        Err(Error::corrupt(self.here(), format!("a block: {broken}")))
    }

    /// As [`SegmentReader::check_place`]. If a rule is broken, both blocks are authenticated first,
    /// so that a forged one is reported as tampered.
    pub(crate) fn prove_place(&mut self, header: &BlockHeader, gate: &Gate) -> Result<()> {
        let Err(broken) = self.check_place(header) else { return Ok(()) };
        self.prove_passed(gate)?;
        self.prove(gate)?;
        Err(broken)
    }

    /// Whether the loaded block has the first receive time that the footer names, if it is the
    /// first block with groups.
    fn begins_as_footer_says(&self, header: &BlockHeader) -> bool {
        let End::Sealed(sealed) = &self.opened.end else { return true };
        let is_first =
            self.sought.is_none() && self.groups_end.is_none() && header.kind != BlockKind::Mark;
        !is_first || header.first_time_us == sealed.footer.first_time_us
    }

    /// Checks the blocks that were read against the end that the footer, or the successor of a cut
    /// segment, names. All of them are authenticated.
    pub(super) fn check_end(&self) -> Result<()> {
        let first_seq = self.opened.header.first_seq;
        let agrees = match (&self.opened.end, self.groups_end) {
            (End::Sealed(sealed), Some(end)) => {
                (end, self.last_time_us) == (sealed.footer.end_seq, sealed.footer.last_time_us)
            }
            (End::Cut(cut), Some(end)) if self.offset == cut.bytes => {
                (end, self.last_time_us) == (cut.end_seq, cut.last_time_us)
            }
            (End::Cut(cut), None) if self.offset == cut.bytes => cut.end_seq == first_seq,
            _ => true,
        };
        if agrees {
            return Ok(());
        }
        Err(Error::corrupt(
            self.opened.at(self.offset),
            "the blocks of the segment do not end as it was ended",
        ))
    }

    fn ended(&self, blocks: u32) -> Result<Load> {
        if self.number == blocks {
            return Ok(Load::End);
        }
        let what =
            format!("the segment ends after {} blocks, it should have {blocks}", self.number);
        Err(Error::truncated(self.opened.at(self.offset), what))
    }

    /// `len` bytes from the current offset on; a decoding error when the file has fewer. They are
    /// this reader's own copy, also of a map: the bytes that were checked are the ones that are
    /// decrypted.
    fn window(&mut self, len: usize, end: u64) -> Result<Result<&[u8], DecodeError>> {
        let short = |have| DecodeError::Short { needed: len as u64, have };
        let begin = self.offset.wrapping_sub(self.bytes_at) as usize;
        if begin.checked_add(len).is_none_or(|end| end > self.bytes.len()) {
            let wanted = (len.max(CHUNK_BYTES) as u64).min(end - self.offset) as usize;
            // Bytes that are there already are not read twice.
            let kept = self.bytes.len().saturating_sub(begin);
            if kept > 0 {
                self.bytes.copy_within(begin.., 0);
            }
            self.bytes.resize(wanted.max(kept), 0);
            self.bytes_at = self.offset;
            let (room, at) =
                (self.bytes.get_mut(kept..).unwrap_or_default(), self.offset + kept as u64);
            let read = match &self.map {
                Some(map) => map.read_at(room, at),
                None => self.opened.read_at(at, room)?,
            };
            self.bytes.truncate(kept + read);
            return Ok(self.bytes.get(..len).ok_or(short((kept + read) as u64)));
        }
        Ok(self.bytes.get(begin..begin + len).ok_or(short(0)))
    }

    /// Passes the loaded block over because, by its header, nothing in it is wanted. The header is
    /// not authenticated: [`SegmentReader::prove_passed`] must succeed before anything relies on
    /// it.
    pub(super) fn pass(&mut self) {
        self.passed = self.loaded.map(|header| (self.offset, header));
        self.skip();
    }

    /// Authenticates the block that was passed over last, if there is one. Sequence numbers and
    /// receive times never run backwards, so its header bounds those of the blocks in front of it.
    pub(super) fn prove_passed(&mut self, gate: &Gate) -> Result<()> {
        let Some((offset, header)) = self.passed.take() else { return Ok(()) };
        let loaded = self.loaded.replace(header);
        (self.offset, self.number) = (offset, header.number);
        // This leaves the reader at the end of the block, where it was before.
        self.prove(gate)?;
        self.loaded = loaded;
        Ok(())
    }

    /// Passes the loaded block over.
    pub(crate) fn skip(&mut self) {
        if let Some(header) = self.loaded.take() {
            self.offset += header.block_len();
            self.number += 1;
            self.end_seq = self.end_seq.max(header.end_seq());
            self.last_time_us = self.last_time_us.max(header.last_time_us);
            self.sought = None;
            if header.kind != BlockKind::Mark {
                self.groups_end = Some(header.end_seq());
            }
        }
    }

    /// Continues behind a damaged block of a sealed segment: at the end that its header names, if
    /// there is a block, else at the next block in the index. `false` when there is none.
    pub(crate) fn pass_damage(&mut self) -> Result<bool> {
        let End::Sealed(sealed) = &self.opened.end else { return Ok(false) };
        let sealed = Arc::clone(sealed);
        let (end, tag, number) =
            (sealed.footer.offset, self.opened.header.segment_tag(), self.number);
        self.loaded = None;
        // The damaged blocks may have had the first groups.
        self.groups_end.get_or_insert(self.end_seq);
        let damaged = self.offset;
        if let Ok(head) = self.window(BlockHeader::LEN, end)?
            && let Ok(header) = BlockHeader::decode(head)
            && header.number == number
            && header.block_len() < end - damaged
        {
            self.offset = damaged + header.block_len();
            let follows = self.window(BlockHeader::LEN, end)?.and_then(BlockHeader::decode);
            if follows.is_ok_and(|next| next.segment_tag == tag && next.number == number + 1) {
                self.number = number + 1;
                return Ok(true);
            }
        }
        let next = sealed.footer.index.iter().find(|entry| entry.offset > damaged);
        self.offset = next.map_or(end, |entry| entry.offset);
        self.number = next.map_or(sealed.footer.block_count, |entry| entry.block);
        Ok(next.is_some())
    }

    /// The raw bytes of the loaded block, authenticated, decrypted and decompressed. Then moves to
    /// the next block.
    pub(crate) fn open(&mut self, gate: &Gate) -> Result<Vec<u8>> {
        self.open_with(Some(gate))
    }

    /// Authenticates the loaded block, and wipes its plaintext. Then moves to the next block.
    fn prove(&mut self, gate: &Gate) -> Result<()> {
        self.open(gate).map(|mut raw| wipe(&mut raw))
    }

    /// As [`SegmentReader::open`], but not authenticated: for a suite that does not encrypt.
    pub(crate) fn open_unproved(&mut self) -> Result<Vec<u8>> {
        self.open_with(None)
    }

    fn open_with(&mut self, gate: Option<&Gate>) -> Result<Vec<u8>> {
        let header = self.loaded.ok_or(Error::Closed("the block"))?;
        let at = self.opened.at(self.offset).block(header.number);
        let mut scratch = std::mem::take(&mut self.scratch);
        let opened_header = Arc::clone(&self.opened.header);
        let path = Arc::clone(&self.opened.name.path);
        let end = self.offset + header.block_len();
        let block = self.window(header.block_len() as usize, end)?;
        let view = block
            .and_then(BlockView::parse)
            .map_err(|error| Error::corrupt(at.clone(), format!("a block: {error}")))?;
        let mut raw = Vec::new();
        // An uncompressed block is decrypted straight into its destination.
        let direct = header.compression == Compression::None;
        let target = if direct { &mut raw } else { &mut scratch.stored };
        target.resize(view.payload.len(), 0);
        let tampered = || Error::Tampered { at: at.clone(), what: "a block" };
        // Authenticates the header that was acted upon, even if the file has changed since.
        match gate {
            Some(gate) => gate.with_cipher(&opened_header, &path, |cipher| {
                cipher
                    .open_block(&header.nonce(), &header.encode(), view.payload, &view.tag, target)
                    .map_err(|_| tampered())
            })?,
            None => target.copy_from_slice(view.payload),
        }
        if !direct {
            scratch
                .decompressor
                .decompress(header.compression, &scratch.stored, header.raw_len, &mut raw)
                .map_err(|error| Error::corrupt(at.clone(), error.to_string()))?;
            wipe(&mut scratch.stored);
        }
        self.scratch = scratch;
        self.skip();
        Ok(raw)
    }

    /// The parts of the loaded block, besides its header, that the digest of the segment covers:
    /// the hash of its stored payload, and its tag.
    pub(crate) fn loaded_digest_parts(&mut self) -> Result<([u8; 32], [u8; 16])> {
        let header = self.loaded.ok_or(Error::Closed("the block"))?;
        let algorithm = self.opened.header.payload_hash;
        let end = self.offset + header.block_len();
        let at = self.opened.at(self.offset);
        let block = self.window(header.block_len() as usize, end)?;
        let view = block
            .and_then(BlockView::parse)
            .map_err(|error| Error::corrupt(at, error.to_string()))?;
        Ok((hash(algorithm, &[view.payload]), view.tag))
    }

    /// Checks whether the segment has been ended since it was opened.
    pub(super) fn refresh(&mut self, list: &SegmentList) -> Result<Refresh> {
        let segments = list.segments(true)?;
        let at = segments.binary_search_by_key(&self.opened.name.ordinal, |one| one.ordinal).ok();
        let Some(name) = at.and_then(|at| segments.get(at)) else { return Ok(Refresh::Dropped) };
        let changed = match (&self.opened.end, &name.active) {
            (End::Active(view), Some(active)) => !Arc::ptr_eq(view, active),
            (End::Active(_), None) => true,
            _ => {
                let before = self.end()?;
                let Some(opened) = list.open_listed(name)? else { return Ok(Refresh::Dropped) };
                let ended = !matches!(opened.end, End::Unknown);
                list.authenticate(&opened)?;
                self.opened.end = opened.end;
                return Ok(if ended || self.end()? > before {
                    Refresh::Changed
                } else {
                    Refresh::Same
                });
            }
        };
        if !changed {
            return Ok(Refresh::Same);
        }
        let Some(opened) = list.open_listed(name)? else { return Ok(Refresh::Dropped) };
        self.opened = opened;
        list.authenticate(&self.opened)?;
        Ok(Refresh::Changed)
    }
}

/// Buffers for the stored bytes of a block. Wiped when they are dropped.
#[derive(Default)]
struct Scratch {
    stored: Vec<u8>,
    decompressor: Decompressor,
}

impl Drop for Scratch {
    fn drop(&mut self) {
        wipe(&mut self.stored);
    }
}

impl std::fmt::Debug for Scratch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Scratch")
    }
}
