//! Finding the blocks of a segment that has no footer.
//!
//! After a crash, blocks that were not synced may have reached the disk in any order. So the
//! presence of a valid block behind a bad one proves nothing. The durable mark in the block proves
//! more: up to the mark the file *was* durable. Damage below the mark is corruption. Damage at or
//! above it is the torn tail that a crash leaves.
//!
//! The search behind damage also meets bytes that are not blocks: payloads, which hold the log
//! lines of users, and bytes that an attacker has written. Where a key is available, the search
//! never accepts a block for its CRC32 alone. Its work is linear in the length of the file, for any
//! bytes:
//!
//! - A candidate with an impossible header costs the decoding of that header.
//! - [`Sums`] gives the CRC32 of a candidate from two pieces of at most a page, for any length that
//!   the candidate claims.
//! - The search skips an accepted candidate whole, so accepted candidates do not overlap.
//! - The search looks inside a candidate whose tag does not verify, so that the candidate hides no
//!   block. Candidates inside it may fail in the same way, so this work has a limit: see
//!   [`REFUTED_BYTES`]. Beyond the limit the search skips such candidates whole too, so those do
//!   not overlap either.
//!
//! The search checks every candidate that it reaches against its tag, even beyond the limit. A fake
//! block in a log line ends within its carrier, the block that holds the line. The fake's CRC32
//! cannot cover bytes that were unknown when the line was written, and the header of the next block
//! has a random part. So skipping a fake never skips the block behind its carrier, and that block
//! still proves how far the file was durable.

use crc32fast::Hasher;
use memchr::memmem::Finder;

use super::{
    BlockHeader, BlockView, DecodedHeader, SEGMENT_BYTES_MAX, SEGMENT_TAG_LEN, TAG_LEN,
    block::{MAGIC, SUFFIX_LEN},
};
use crate::wire::{CRC_LEN, DecodeError};

/// How much one read fetches, in bytes, unless a block is longer.
const CHUNK_BYTES: u64 = 1 << 20;
const BLOCK_LEN_MIN: usize = BlockHeader::LEN + SUFFIX_LEN;
/// The offset of the segment's tag in a block.
const TAG_AT: usize = 8;
/// The offset of the number in a block.
const NUMBER_AT: usize = TAG_AT + SEGMENT_TAG_LEN;
/// How many bytes of candidates with a wrong tag the search looks into, in addition to
/// [`REFUTED_PER_BYTE`] for each byte searched.
const REFUTED_BYTES: u64 = 64 << 20;
const REFUTED_PER_BYTE: u64 = 16;
/// The page size of [`Sums`], in bytes.
const PAGE: usize = 4 << 10;
/// How many pages [`Sums`] reads at once.
const PAGES_AT_ONCE: usize = 64;

/// A block whose CRC32 matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ScannedBlock {
    /// The offset in bytes at which the block begins.
    pub(crate) offset: u64,
    pub(crate) header: BlockHeader,
    pub(crate) tag: [u8; TAG_LEN],
    /// Whether this block and all blocks before it are present and in order. `false` for a block
    /// found behind damage.
    pub(crate) contiguous: bool,
}

/// How the scanned part of a file ends. Zeros at the end of the file are not part of it: nothing
/// has been written there yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ScanVerdict {
    /// The scanned part ends with a block.
    Clean,
    /// The scanned part ends inside the next block, it seems: a writer may still be writing it.
    Incomplete,
    /// The scanned part ends with a torn tail: from offset `at` on, at or above the durable mark,
    /// the bytes are not the next block.
    TornTail { at: u64 },
    /// The scanned part ends in corruption: at offset `at`, below the durable mark `mark`, the
    /// bytes are not the next block.
    Damaged { at: u64, mark: u64 },
}

/// The result of a scan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ScanReport {
    /// The offset in bytes at which the contiguous blocks end.
    pub(crate) end: u64,
    /// The number of contiguous blocks, which is the number of the next block.
    pub(crate) blocks: u32,
    /// One past the last sequence number that they use. The segment's first sequence number if they
    /// use none.
    pub(crate) end_seq: u64,
    /// The highest durable mark of all blocks that were given to `on_block`. The end of the header
    /// if there is no block.
    pub(crate) mark: u64,
    /// Where the data of the file ends. Only zeros follow, if anything.
    pub(crate) data_end: u64,
    pub(crate) verdict: ScanVerdict,
}

/// Returns whether the candidate at this offset is a block of the segment. Its header is given, and
/// its CRC32 matches.
pub(crate) type Prove<'a, E> = &'a mut dyn FnMut(u64, &BlockHeader) -> Result<bool, E>;

/// Scans the blocks behind `header`, up to offset `file_len`.
///
/// `read_at` reads at an offset and fills the buffer as far as the file reaches. `on_block`
/// receives each block with its stored payload, in the order of the file. The contiguous blocks
/// from the end of the header come first. If there is a `prove`, the scan then searches behind
/// damage, byte by byte, and the blocks that `prove` accepts follow. Block numbers and sequence
/// numbers increase, but may have gaps.
///
/// # Errors
/// Only the errors of `read_at`, `on_block` and `prove`.
pub(crate) fn scan<E>(
    header: &DecodedHeader,
    file_len: u64,
    read_at: impl FnMut(u64, &mut [u8]) -> Result<usize, E>,
    mut on_block: impl FnMut(ScannedBlock, &[u8]) -> Result<(), E>,
    prove: Option<Prove<'_, E>>,
) -> Result<ScanReport, E> {
    let mut window = Window {
        read_at,
        file_len,
        start: header.body_start,
        bytes: Vec::new(),
        segment_tag: header.segment_tag(),
    };
    let mut scan = Scan {
        header,
        end: header.body_start,
        number: 0,
        end_seq: header.first_seq,
        mark: header.body_start,
        data_end: header.body_start,
        incomplete: false,
    };
    scan.in_order(&mut window, &mut on_block)?;
    if let Some(prove) = prove {
        scan.behind_damage(&mut window, &mut on_block, prove)?;
    }
    let data_end = end_of_data(&mut window.read_at, scan.data_end, file_len)?;
    Ok(scan.report(data_end))
}

/// The state of a scan.
struct Scan<'a> {
    header: &'a DecodedHeader,
    /// Where the contiguous blocks end.
    end: u64,
    /// The number of contiguous blocks.
    number: u32,
    /// One past their last sequence number.
    end_seq: u64,
    /// The highest durable mark of all blocks.
    mark: u64,
    /// Where the last block ends.
    data_end: u64,
    /// Whether the file seems to end inside the next block.
    incomplete: bool,
}

impl Scan<'_> {
    /// Whether a block at `offset` may have this header, if the blocks in front of it end at
    /// sequence number `from_seq`.
    fn fits(&self, offset: u64, found: &BlockHeader, from_seq: u64) -> bool {
        let limit_seq = self.header.limit_seq;
        (from_seq..=limit_seq).contains(&found.first_seq)
            && found.end_seq() <= limit_seq
            && (self.header.body_start..=offset).contains(&found.durable_mark)
    }

    /// Goes through the contiguous blocks.
    fn in_order<E>(
        &mut self,
        window: &mut Window<impl FnMut(u64, &mut [u8]) -> Result<usize, E>>,
        on_block: &mut impl FnMut(ScannedBlock, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        while self.end < window.file_len {
            let (header, tag) = match window.probe(self.end)? {
                Probe::Block(header, tag) => (header, tag),
                Probe::Beyond(number) => {
                    self.incomplete = number.is_none_or(|number| number == self.number);
                    break;
                }
                Probe::Nothing => break,
            };
            if header.number != self.number || !self.fits(self.end, &header, self.end_seq) {
                break;
            }
            let block = ScannedBlock { offset: self.end, header, tag, contiguous: true };
            on_block(block, window.payload(self.end, &header)?)?;
            self.mark = self.mark.max(header.durable_mark);
            self.end += header.block_len();
            self.end_seq = header.end_seq();
            self.number += 1;
        }
        self.data_end = self.end;
        Ok(())
    }

    /// Searches for blocks behind the contiguous ones, byte by byte.
    fn behind_damage<E>(
        &mut self,
        window: &mut Window<impl FnMut(u64, &mut [u8]) -> Result<usize, E>>,
        on_block: &mut impl FnMut(ScannedBlock, &[u8]) -> Result<(), E>,
        prove: Prove<'_, E>,
    ) -> Result<(), E> {
        let (mut next_number, mut next_seq) = (self.number, self.end_seq);
        // A segment is never longer.
        window.file_len = window.file_len.min(SEGMENT_BYTES_MAX);
        let mut sums = Sums::new(self.end, window.file_len);
        let tag = window.segment_tag;
        let finder = Finder::new(&tag);
        let mut refuted: u64 = 0;
        let mut at = self.end;
        while let Some((offset, header)) = window.find(&finder, at)? {
            at = offset + 1;
            let len = header.block_len();
            if header.number < next_number || !self.fits(offset, &header, next_seq) {
                continue;
            }
            let Some(tag) = sums.tag_of(&mut window.read_at, offset, len)? else { continue };
            if prove(offset, &header)? {
                let block = ScannedBlock { offset, header, tag, contiguous: false };
                on_block(block, window.payload(offset, &header)?)?;
                self.incomplete = false;
                self.mark = self.mark.max(header.durable_mark);
                at = offset + len;
                self.data_end = at;
                (next_number, next_seq) = (header.number + 1, header.end_seq());
            } else if refuted + len <= REFUTED_BYTES + REFUTED_PER_BYTE * (offset - self.end) {
                refuted += len;
            } else {
                at = offset + len;
            }
        }
        Ok(())
    }

    /// The result, if only zeros follow `data_end`.
    fn report(self, data_end: u64) -> ScanReport {
        let Self { end, number: blocks, end_seq, mark, incomplete, .. } = self;
        let verdict = if end >= data_end {
            ScanVerdict::Clean
        } else if end < mark {
            ScanVerdict::Damaged { at: end, mark }
        } else if incomplete {
            ScanVerdict::Incomplete
        } else {
            ScanVerdict::TornTail { at: end }
        };
        ScanReport { end, blocks, end_seq, mark, data_end, verdict }
    }
}

/// The end of the data between two offsets of a file: behind the last byte that is not zero. Reads
/// backwards from the end.
pub(crate) fn end_of_data<E>(
    mut read_at: impl FnMut(u64, &mut [u8]) -> Result<usize, E>,
    from: u64,
    to: u64,
) -> Result<u64, E> {
    let mut end = to;
    let mut bytes = Vec::new();
    while end > from {
        let start = from.max(end.saturating_sub(CHUNK_BYTES));
        bytes.resize((end - start) as usize, 0);
        let read = read_at(start, &mut bytes)?;
        if read < bytes.len() {
            // Another process has truncated the file meanwhile.
            return Ok(end);
        }
        if let Some(last) = bytes.iter().rposition(|&byte| byte != 0) {
            return Ok(start + last as u64 + 1);
        }
        end = start;
    }
    Ok(from)
}

/// The result of looking for a block at an offset.
enum Probe {
    /// A block of the segment.
    Block(BlockHeader, [u8; TAG_LEN]),
    /// The beginning of a block that extends beyond the end of the file. Holds its number, if that
    /// part is present.
    Beyond(Option<u32>),
    /// Neither.
    Nothing,
}

/// A part of the file in memory.
struct Window<F> {
    read_at: F,
    file_len: u64,
    /// The file offset of `bytes`.
    start: u64,
    bytes: Vec<u8>,
    segment_tag: [u8; SEGMENT_TAG_LEN],
}

impl<E, F: FnMut(u64, &mut [u8]) -> Result<usize, E>> Window<F> {
    /// The bytes from `offset` on: at least `wanted` of them, unless the file ends before.
    fn at(&mut self, offset: u64, wanted: u64) -> Result<&[u8], E> {
        let left = self.file_len.saturating_sub(offset);
        let mut skip = offset
            .checked_sub(self.start)
            .and_then(|skip| usize::try_from(skip).ok())
            .unwrap_or(usize::MAX);
        if (self.bytes.len().saturating_sub(skip) as u64) < wanted.min(left) {
            self.bytes.drain(..skip.min(self.bytes.len()));
            self.start = offset;
            skip = 0;
            let kept = self.bytes.len();
            self.bytes.resize(wanted.max(CHUNK_BYTES).min(left) as usize, 0);
            if let Some(room) = self.bytes.get_mut(kept..).filter(|room| !room.is_empty()) {
                let read = (self.read_at)(offset + kept as u64, room)?;
                self.bytes.truncate(kept + read);
            }
        }
        Ok(self.bytes.get(skip..).unwrap_or_default())
    }

    fn probe(&mut self, offset: u64) -> Result<Probe, E> {
        let segment_tag = self.segment_tag;
        let left = self.file_len.saturating_sub(offset);
        let bytes = self.at(offset, BLOCK_LEN_MIN as u64)?;
        let Some(header) = bytes.get(..BlockHeader::LEN) else {
            let same = |at: usize, with: &[u8]| {
                with.iter().zip(bytes.iter().skip(at)).all(|(a, b)| a == b)
            };
            if !same(0, MAGIC) || !same(TAG_AT, &segment_tag) {
                return Ok(Probe::Nothing);
            }
            let number = bytes.get(NUMBER_AT..).and_then(|rest| rest.first_chunk());
            return Ok(Probe::Beyond(number.map(|number| u32::from_le_bytes(*number))));
        };
        let Ok(header) = BlockHeader::decode(header) else {
            return Ok(Probe::Nothing);
        };
        if header.segment_tag != segment_tag {
            return Ok(Probe::Nothing);
        }
        if header.block_len() > left {
            return Ok(Probe::Beyond(Some(header.number)));
        }
        Ok(match BlockView::parse(self.at(offset, header.block_len())?) {
            Ok(view) => Probe::Block(view.header, view.tag),
            Err(DecodeError::Short { .. }) => Probe::Beyond(Some(header.number)),
            Err(_) => Probe::Nothing,
        })
    }

    /// The stored payload of the block at `offset`. Empty if the file has been truncated meanwhile.
    fn payload(&mut self, offset: u64, header: &BlockHeader) -> Result<&[u8], E> {
        let block = self.at(offset, header.block_len())?;
        Ok(block
            .get(BlockHeader::LEN..)
            .and_then(|rest| rest.get(..header.payload_len as usize))
            .unwrap_or_default())
    }

    /// The first offset, from `at` on, that holds the header of a block of the segment, and that
    /// header.
    fn find(&mut self, finder: &Finder<'_>, mut at: u64) -> Result<Option<(u64, BlockHeader)>, E> {
        loop {
            let bytes = self.at(at, BLOCK_LEN_MIN as u64)?;
            if bytes.len() < BLOCK_LEN_MIN {
                return Ok(None);
            }
            let mut begins =
                finder.find_iter(bytes).filter_map(|tag_at| tag_at.checked_sub(TAG_AT));
            let found = begins.find_map(|begin| {
                let rest = bytes.get(begin..).filter(|rest| rest.starts_with(MAGIC))?;
                match BlockHeader::decode(rest) {
                    Ok(header) => Some((begin, Some(header))),
                    // The window holds only a part of the header.
                    Err(_) if begin > 0 && rest.len() < BLOCK_LEN_MIN => Some((begin, None)),
                    Err(_) => None,
                }
            });
            match found {
                Some((begin, Some(header))) => return Ok(Some((at + begin as u64, header))),
                Some((begin, None)) => at += begin as u64,
                // The window may end within a tag, so the search looks at such a beginning again.
                None => at += (bytes.len() - (NUMBER_AT - 1)) as u64,
            }
        }
    }
}

/// Gives the CRC32 of any range of a file in constant time, after one pass over the file. It stores
/// the CRC32 of everything in front of each page. The CRC32 of a range follows from the CRC32s of
/// everything in front of its two ends.
struct Sums {
    /// The offset of the first page.
    base: u64,
    /// The end of the file.
    file_len: u64,
    /// By page number, the CRC32 of the bytes between `base` and that page. [`Sums::sum_up_to`]
    /// adds entries on demand.
    before: Vec<u32>,
    /// The pages that hold the two ends of the last range.
    ends: [Page; 2],
    /// A read buffer for the pages to sum.
    bytes: Vec<u8>,
}

/// A page, and as many bytes behind it as the end of a block may reach.
#[derive(Default)]
struct Page {
    number: Option<u64>,
    bytes: Vec<u8>,
}

impl Sums {
    fn new(base: u64, file_len: u64) -> Self {
        Self { base, file_len, before: vec![0], ends: Default::default(), bytes: Vec::new() }
    }

    /// The tag of the block of `len` bytes at `offset`. `None` if its CRC32 does not match, or the
    /// file ends before the block does.
    fn tag_of<E>(
        &mut self,
        read_at: &mut impl FnMut(u64, &mut [u8]) -> Result<usize, E>,
        offset: u64,
        len: u64,
    ) -> Result<Option<[u8; TAG_LEN]>, E> {
        // The CRC32 covers everything before it.
        let covered = len - CRC_LEN as u64;
        let suffix_at = len - SUFFIX_LEN as u64;
        if len > self.file_len.saturating_sub(offset)
            || !self.sum_up_to(read_at, offset + suffix_at)?
        {
            return Ok(None);
        }
        let in_front = {
            let (sum, front, _) = self.around(read_at, 0, offset)?;
            continued(sum, &[front])
        };
        let (sum, front, suffix) = self.around(read_at, 1, offset + suffix_at)?;
        let Some((tag, crc)) =
            suffix.split_first_chunk().and_then(|(tag, crc)| Some((*tag, *crc.first_chunk()?)))
        else {
            return Ok(None);
        };
        let through = continued(sum, &[front, &tag]);
        let mut shifted = Hasher::new_with_initial(in_front);
        shifted.combine(&Hasher::new_with_initial_len(0, covered));
        Ok((through ^ shifted.finalize() == u32::from_le_bytes(crc)).then_some(tag))
    }

    /// The CRC32 of everything in front of the page that holds `offset`, the bytes of that page in
    /// front of `offset`, and the bytes from `offset` on.
    fn around<E>(
        &mut self,
        read_at: &mut impl FnMut(u64, &mut [u8]) -> Result<usize, E>,
        which: usize,
        offset: u64,
    ) -> Result<(u32, &[u8], &[u8]), E> {
        let (number, within) =
            ((offset - self.base) / PAGE as u64, (offset - self.base) % PAGE as u64);
        let page = &mut self.ends[which];
        if page.number.replace(number) != Some(number) {
            let at = self.base + number * PAGE as u64;
            page.bytes.resize((PAGE + SUFFIX_LEN).min((self.file_len - at) as usize), 0);
            let read = read_at(at, &mut page.bytes)?;
            page.bytes.truncate(read);
        }
        let sum = self.before.get(number as usize).copied().unwrap_or_default();
        let (front, rest) = page.bytes.split_at_checked(within as usize).unwrap_or_default();
        Ok((sum, front, rest))
    }

    /// Sums all pages in front of the page that holds `offset`. `false` if the file has been
    /// truncated meanwhile and ends before.
    fn sum_up_to<E>(
        &mut self,
        read_at: &mut impl FnMut(u64, &mut [u8]) -> Result<usize, E>,
        offset: u64,
    ) -> Result<bool, E> {
        let wanted = ((offset - self.base) / PAGE as u64) as usize;
        while self.before.len() <= wanted {
            let at = self.base + (self.before.len() as u64 - 1) * PAGE as u64;
            self.bytes.resize((PAGE * PAGES_AT_ONCE).min((self.file_len - at) as usize), 0);
            let read = read_at(at, &mut self.bytes)?;
            if read < self.bytes.len() {
                self.file_len = at + read as u64;
            }
            let pages = self.bytes.get(..read).unwrap_or_default().chunks_exact(PAGE);
            if pages.len() == 0 {
                return Ok(false);
            }
            let mut sum = Hasher::new_with_initial(self.before.last().copied().unwrap_or_default());
            for page in pages {
                sum.update(page);
                self.before.push(sum.clone().finalize());
            }
        }
        Ok(true)
    }
}

/// Continues the CRC32 `crc` with `pieces`.
fn continued(crc: u32, pieces: &[&[u8]]) -> u32 {
    let mut hasher = Hasher::new_with_initial(crc);
    pieces.iter().for_each(|piece| hasher.update(piece));
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;
    use crate::{
        crypto::{HashAlg, Suite},
        ids::{LogstoreId, SegmentId, StoreId},
        segment::{
            BlockKind, Compression, Features, KeySource, Predecessor, SealBuffer, SegmentHeader,
        },
        wire::put_crc,
    };

    /// Reads from a file with these bytes.
    fn reading(bytes: &[u8]) -> impl FnMut(u64, &mut [u8]) -> Result<usize, Infallible> {
        |offset, buf| {
            let rest = bytes.get(offset as usize..).unwrap_or_default();
            let len = rest.len().min(buf.len());
            buf[..len].copy_from_slice(&rest[..len]);
            Ok(len)
        }
    }

    /// A segment under construction.
    struct Sample {
        header: DecodedHeader,
        bytes: Vec<u8>,
        /// The offsets of its blocks.
        offsets: Vec<usize>,
        next_seq: u64,
    }

    impl Sample {
        fn new() -> Self {
            let header = SegmentHeader {
                suite: Suite::Aes256Gcm,
                features: Features::default(),
                shard: 0,
                store: StoreId::from_bytes([1; 16]),
                logstore: LogstoreId::from_bytes([2; 16]),
                segment: SegmentId::from_bytes([3; 16]),
                generation: 1,
                ordinal: 1,
                first_seq: 100,
                limit_seq: 10_000_000,
                created_us: 0,
                key_source: KeySource::Keyring(1),
                salt: [4; 32],
                predecessor: Predecessor::None,
                payload_hash: HashAlg::Sha256,
                setbacks: 0,
                epoch: 1,
                latest_us: 0,
                extensions: Vec::new(),
            };
            let bytes = SegmentHeader::finish(header.encode(), &[5; 32]);
            Self {
                header: SegmentHeader::decode(&bytes).unwrap(),
                bytes,
                offsets: Vec::new(),
                next_seq: 100,
            }
        }

        fn body_start(&self) -> u64 {
            self.header.body_start
        }

        fn len(&self) -> u64 {
            self.bytes.len() as u64
        }

        fn next(&self, payload_len: u32, mark: u64) -> BlockHeader {
            let groups = if payload_len == 0 { 0 } else { 3 };
            BlockHeader {
                kind: if payload_len == 0 { BlockKind::Mark } else { BlockKind::Opaque },
                compression: Compression::None,
                segment_tag: self.header.segment_tag(),
                number: self.offsets.len() as u32,
                payload_len,
                raw_len: payload_len,
                group_count: groups,
                log_count: 0,
                list_len: payload_len.saturating_sub(4 * groups),
                first_seq: self.next_seq,
                first_time_us: 0,
                last_time_us: 0,
                durable_mark: mark,
                nonce_random: [6; 8],
            }
        }

        fn put(&mut self, header: &BlockHeader) {
            let mut buffer = SealBuffer::default();
            buffer.begin().resize(SealBuffer::PAYLOAD_AT + header.payload_len as usize, 0x45);
            buffer.with_header(&self.header.header_hash, header);
            self.offsets.push(self.bytes.len());
            self.bytes.extend_from_slice(buffer.finish(&[header.number as u8; TAG_LEN]));
            self.next_seq = header.end_seq();
        }

        /// Appends a block with the durable mark `mark`.
        fn push(&mut self, payload_len: u32, mark: u64) {
            self.put(&self.next(payload_len, mark));
        }

        /// A segment with blocks of these lengths, none of which was ever synced.
        fn unsynced(lens: &[u32]) -> Self {
            let mut sample = Self::new();
            for &len in lens {
                sample.push(len, sample.body_start());
            }
            sample
        }

        /// Scans without a key: the scan accepts every plausible block with a matching CRC32.
        fn scan(&self) -> (ScanReport, Vec<ScannedBlock>) {
            self.scan_with(Some(&mut |_, _| Ok(true)))
        }

        fn scan_with(
            &self,
            prove: Option<Prove<'_, Infallible>>,
        ) -> (ScanReport, Vec<ScannedBlock>) {
            let mut blocks = Vec::new();
            let on_block = |block: ScannedBlock, payload: &[u8]| {
                let begin = block.offset as usize + BlockHeader::LEN;
                assert_eq!(payload, &self.bytes[begin..begin + block.header.payload_len as usize]);
                blocks.push(block);
                Ok(())
            };
            let report =
                scan(&self.header, self.len(), reading(&self.bytes), on_block, prove).unwrap();
            assert!((report.end..=self.len()).contains(&report.data_end));
            assert!(self.bytes[report.data_end as usize..].iter().all(|&byte| byte == 0));
            assert_eq!(
                blocks.iter().filter(|block| block.contiguous).count(),
                report.blocks as usize
            );
            assert!(
                blocks
                    .is_sorted_by(|a, b| a.offset < b.offset && a.header.number < b.header.number)
            );
            (report, blocks)
        }

        fn verdict(&self) -> ScanVerdict {
            self.scan().0.verdict
        }

        /// The numbers of the blocks found behind damage.
        fn behind(&self) -> Vec<u32> {
            self.scan()
                .1
                .iter()
                .filter(|block| !block.contiguous)
                .map(|block| block.header.number)
                .collect()
        }
    }

    #[test]
    fn empty_body() {
        let sample = Sample::new();
        let (report, blocks) = sample.scan();
        let end = sample.body_start();
        let expected = ScanReport {
            end,
            blocks: 0,
            end_seq: 100,
            mark: end,
            data_end: end,
            verdict: ScanVerdict::Clean,
        };
        assert_eq!((report, blocks.len()), (expected, 0));
    }

    #[test]
    fn whole_blocks() {
        // One block is longer than a chunk.
        let mut sample = Sample::unsynced(&[50, 60, 3_000_000, 70]);
        let durable = sample.len();
        sample.push(0, durable);
        sample.push(900_000, durable);
        let (report, blocks) = sample.scan();
        assert_eq!(report.verdict, ScanVerdict::Clean);
        assert_eq!(
            (report.end, report.blocks, report.end_seq, report.mark),
            (sample.len(), 6, 115, durable)
        );
        assert_eq!(
            blocks.iter().map(|block| block.offset as usize).collect::<Vec<_>>(),
            sample.offsets
        );
        assert_eq!(blocks[3].tag, [3; 16]);
        assert_eq!(blocks[4].header.kind, BlockKind::Mark);
    }

    #[test]
    fn every_cut_is_incomplete() {
        let mut sample = Sample::unsynced(&[50, 60]);
        let end = sample.offsets[1];
        while sample.bytes.len() > end + 1 {
            sample.bytes.pop();
            let (report, blocks) = sample.scan();
            assert_eq!(report.verdict, ScanVerdict::Incomplete, "{}", sample.len());
            assert_eq!(
                (report.end, report.blocks, report.end_seq, blocks.len()),
                (end as u64, 1, 103, 1)
            );
        }
        sample.bytes.pop();
        assert_eq!(sample.verdict(), ScanVerdict::Clean);
    }

    #[test]
    fn a_cut_that_cannot_be_the_next_block_is_torn() {
        let whole = Sample::unsynced(&[50, 60]);
        let at = whole.offsets[1];
        // The wrong byte is in the magic bytes, in the segment's tag, or in the number.
        for (wrong, lens) in [(0, 1..96), (10, 11..96), (17, 20..170)] {
            for len in lens {
                let mut sample = Sample::unsynced(&[50, 60]);
                sample.bytes[at + wrong] ^= 1;
                sample.bytes.truncate(at + len);
                assert_eq!(
                    sample.verdict(),
                    ScanVerdict::TornTail { at: at as u64 },
                    "{wrong} {len}"
                );
            }
        }
    }

    #[test]
    fn damage_above_the_mark_is_a_torn_tail() {
        let lens = [50, 60, 70, 80];
        let whole = Sample::unsynced(&lens);
        for damaged in whole.body_start() as usize..whole.bytes.len() {
            let mut sample = Sample::unsynced(&lens);
            sample.bytes[damaged] ^= 0x10;
            let block = sample.offsets.partition_point(|&offset| offset <= damaged) - 1;
            let (report, _) = sample.scan();
            let at = sample.offsets[block] as u64;
            let expected = ScanVerdict::TornTail { at };
            // The last block may seem to extend beyond the end.
            let may_seem_longer = block == 3 && (20..24).contains(&(damaged - at as usize));
            assert!(report.verdict == expected || may_seem_longer, "{damaged} {report:?}");
            assert_eq!((report.end, report.blocks), (at, block as u32));
            assert_eq!(sample.behind(), (block as u32 + 1..4).collect::<Vec<_>>(), "{damaged}");
        }
    }

    #[test]
    fn damage_below_the_mark_is_corruption() {
        let mut whole = Sample::unsynced(&[50, 60]);
        let mark = whole.len();
        whole.push(70, mark);
        whole.push(0, mark);
        for damaged in whole.body_start() as usize..mark as usize {
            let at = whole.offsets[usize::from(damaged >= whole.offsets[1])] as u64;
            whole.bytes[damaged] ^= 0x10;
            assert_eq!(whole.verdict(), ScanVerdict::Damaged { at, mark }, "{damaged}");
            whole.bytes[damaged] ^= 0x10;
        }
        // The damaged block is above the mark. The block before it carries the mark.
        let at = whole.offsets[2];
        whole.bytes[at + 100] ^= 1;
        assert_eq!(whole.verdict(), ScanVerdict::TornTail { at: at as u64 });
        // The damage is at the mark, but the mark of a later, intact block is above it.
        whole.push(10 + 12, mark + 1);
        assert_eq!(whole.verdict(), ScanVerdict::Damaged { at: at as u64, mark: mark + 1 });
        assert_eq!(whole.behind(), [3, 4]);
    }

    #[test]
    fn holes_and_garbage() {
        // The file was extended, but nothing was written there: the segment ends before the zeros.
        let mut sample = Sample::unsynced(&[50]);
        let at = sample.len();
        for zeros in [1, 95, 5000] {
            sample.bytes.resize(at as usize + zeros, 0);
            let (report, _) = sample.scan();
            assert_eq!(
                (report.verdict, report.end, report.data_end),
                (ScanVerdict::Clean, at, at),
                "{zeros}"
            );
        }
        // A torn block in front of zeros ends with its last byte that is not zero.
        sample.bytes[at as usize + 17] = 1;
        let (report, _) = sample.scan();
        assert_eq!((report.verdict, report.data_end), (ScanVerdict::TornTail { at }, at + 18));
        sample.bytes[at as usize + 17] = 0;
        // A later block reached the disk, more than a chunk behind.
        sample.bytes.resize(sample.bytes.len() + 2_000_001, 0);
        let durable = sample.body_start();
        sample.offsets.push(0);
        sample.push(60, durable);
        assert_eq!((sample.verdict(), sample.behind()), (ScanVerdict::TornTail { at }, vec![2]));
        sample.push(60, at + 1);
        assert_eq!(
            (sample.verdict(), sample.behind()),
            (ScanVerdict::Damaged { at, mark: at + 1 }, vec![2, 3])
        );
        // Garbage that looks like the beginning of blocks does not hide them.
        let mut sample = Sample::unsynced(&[50]);
        for len in [4, 16, 20, 60, 96] {
            let start = sample.next(60, durable).encode();
            sample.bytes.extend_from_slice(&start[..len]);
        }
        sample.push(60, durable);
        assert_eq!((sample.verdict(), sample.behind()), (ScanVerdict::TornTail { at }, vec![1]));
    }

    /// A chunk may end anywhere in the header of the next block.
    #[test]
    fn a_block_is_whole_wherever_the_chunk_ends() {
        let (chunk, overhead) = (CHUNK_BYTES as u32, BLOCK_LEN_MIN as u32);
        for in_chunk in 1..=overhead + 8 {
            let sample = Sample::unsynced(&[chunk - overhead - in_chunk, 20, 20]);
            assert_eq!(
                sample.offsets[1] as u64 + u64::from(in_chunk),
                sample.body_start() + CHUNK_BYTES
            );
            assert_eq!(sample.scan().0.blocks, 3, "{in_chunk} bytes of the second block");
        }
    }

    #[test]
    fn a_block_is_found_at_every_offset_of_a_chunk() {
        for shift in 0..200 {
            let mut sample = Sample::unsynced(&[50]);
            let at = sample.bytes.len();
            sample.bytes.resize(at + CHUNK_BYTES as usize - shift, 0);
            sample.push(60, sample.body_start());
            assert_eq!(sample.behind(), [1], "{shift}");
        }
    }

    #[test]
    fn blocks_out_of_order_are_damage() {
        let start = Sample::new().body_start();
        let base = || Sample::unsynced(&[50, 60]);
        let next = base().next(70, start);
        let at = base().len();
        for (wrong, listed) in [
            (BlockHeader { number: 1, ..next }, vec![3]),
            (BlockHeader { number: 3, ..next }, vec![3]),
            (BlockHeader { first_seq: 105, ..next }, vec![3]),
            (BlockHeader { first_seq: 9_999_998, ..next }, vec![]),
            (BlockHeader { durable_mark: start - 1, ..next }, vec![3]),
            // A mark beyond the block itself is impossible.
            (BlockHeader { durable_mark: at + 1, ..next }, vec![3]),
        ] {
            let mut sample = base();
            sample.put(&wrong);
            sample.next_seq = sample.next_seq.max(106);
            sample.push(80, start);
            assert_eq!(sample.verdict(), ScanVerdict::TornTail { at }, "{wrong:?}");
            assert_eq!(sample.behind(), listed, "{wrong:?}");
        }
        // A block of another segment is no block of this one.
        let mut sample = base();
        let mut other = Sample::new();
        other.header.header_hash = [9; 32];
        other.offsets = vec![0; 2];
        other.push(70, start);
        sample.bytes.extend_from_slice(&other.bytes[start as usize..]);
        assert_eq!((sample.verdict(), sample.behind()), (ScanVerdict::TornTail { at }, vec![]));
        // Sequence numbers may have gaps.
        let mut sample = base();
        sample.put(&BlockHeader { first_seq: 500, ..next });
        assert_eq!((sample.verdict(), sample.scan().0.end_seq), (ScanVerdict::Clean, 503));
    }

    #[test]
    fn a_file_that_ends_early() {
        let sample = Sample::unsynced(&[50, 60]);
        let longer = |len: u64| {
            scan(
                &sample.header,
                len,
                reading(&sample.bytes),
                |_, _| Ok(()),
                Some(&mut |_, _| Ok(true)),
            )
            .unwrap()
            .verdict
        };
        assert_eq!(longer(sample.len() + 1000), ScanVerdict::Incomplete);
        assert_eq!(
            scan(&sample.header, sample.len(), |_, _| Err("no disk"), |_, _| Ok(()), None),
            Err("no disk")
        );
    }

    /// A whole block that no writer has written. Its CRC32 matches, but its tag does not verify.
    fn fake(header: &BlockHeader, payload: &[u8]) -> Vec<u8> {
        let mut bytes = [&header.encode()[..], payload, &[0xfa; TAG_LEN]].concat();
        put_crc(&mut bytes, 0);
        bytes
    }

    /// As many whole blocks, nested within each other, as fit into `len` bytes.
    fn nested(template: &BlockHeader, len: usize) -> Vec<u8> {
        let mut headers = Vec::new();
        let (mut core, mut suffixes) = (vec![0x45; 13], Vec::new());
        // The CRC32 of the bytes so far, from the innermost block outwards.
        let mut crc = Hasher::new();
        crc.update(&core);
        for raw_len in
            (core.len()..).step_by(BLOCK_LEN_MIN).take_while(|inner| inner + BLOCK_LEN_MIN <= len)
        {
            let raw_len = raw_len as u32;
            let fields = BlockHeader {
                payload_len: raw_len,
                raw_len,
                group_count: 1,
                list_len: raw_len - 4,
                ..*template
            };
            let header = fields.encode();
            let mut covered = Hasher::new();
            covered.update(&header);
            covered.combine(&crc);
            covered.update(&[0xfa; TAG_LEN]);
            suffixes.extend_from_slice(&[0xfa; TAG_LEN]);
            let suffix = covered.clone().finalize().to_le_bytes();
            suffixes.extend_from_slice(&suffix);
            covered.update(&suffix);
            crc = covered;
            headers.push(header);
        }
        let mut bytes: Vec<u8> = headers.iter().rev().flatten().copied().collect();
        bytes.append(&mut core);
        bytes.append(&mut suffixes);
        assert!(BlockView::parse(&bytes).is_ok() && bytes.len() <= len);
        bytes
    }

    /// A segment whose second block is torn and holds `payload`. A block with the durable mark
    /// `mark` follows it.
    fn torn_around(payload: &[u8], mark: u64) -> Sample {
        let mut sample = Sample::unsynced(&[50]);
        let at = sample.bytes.len() + BlockHeader::LEN;
        sample.push(payload.len() as u32, sample.body_start());
        sample.bytes[at..at + payload.len()].copy_from_slice(payload);
        sample.push(60, mark);
        sample
    }

    /// Scans with the key: `prove` accepts only the blocks that [`Sample`] made. Returns how many
    /// bytes it checked for fakes.
    fn scan_with_key(sample: &Sample) -> (ScanReport, Vec<u32>, u64) {
        let mut refuted = 0;
        let mut prove = |offset: u64, header: &BlockHeader| {
            let genuine = sample.offsets.contains(&(offset as usize));
            refuted += if genuine { 0 } else { header.block_len() };
            Ok(genuine)
        };
        let (report, blocks) = sample.scan_with(Some(&mut prove));
        let behind = blocks
            .iter()
            .filter(|block| !block.contiguous)
            .map(|block| block.header.number)
            .collect();
        (report, behind, refuted)
    }

    /// A log line may hold the bytes of a block. The mark in such a fake proves nothing.
    #[test]
    fn a_block_in_a_payload_proves_nothing() {
        let base = Sample::unsynced(&[50]);
        let (start, at) = (base.body_start(), base.len());
        let inside = at + BlockHeader::LEN as u64;
        for (mark, plausible) in
            [(inside + 1, false), (u64::MAX, false), (inside, true), (at + 1, true)]
        {
            let line = fake(&BlockHeader { number: 7, ..base.next(60, mark) }, &[0x45; 60]);
            let sample = torn_around(&line, start);
            let torn = ScanVerdict::TornTail { at };
            // Without a key the scan accepts the fake if its mark is plausible. The block behind it
            // is then out of order.
            let expected = if plausible { ScanVerdict::Damaged { at, mark } } else { torn };
            assert_eq!(
                (sample.verdict(), sample.behind()),
                (expected, vec![if plausible { 7 } else { 2 }]),
                "{mark}"
            );
            let (report, behind, refuted) = scan_with_key(&sample);
            assert_eq!((report.verdict, behind, refuted > 0), (torn, vec![2], plausible), "{mark}");
            // Damage below a genuine mark is corruption.
            let sample = torn_around(&line, at + 1);
            let (report, behind, _) = scan_with_key(&sample);
            assert_eq!(
                (report.verdict, behind),
                (ScanVerdict::Damaged { at, mark: at + 1 }, vec![2]),
                "{mark}"
            );
            // A scan without `prove` does not search behind damage, so it finds no block there.
            assert_eq!(sample.scan_with(None).0.verdict, ScanVerdict::TornTail { at });
        }
    }

    /// The scan does not search inside an intact block.
    #[test]
    fn what_is_in_a_whole_block_is_not_looked_at() {
        let base = Sample::unsynced(&[50]);
        let line = fake(&BlockHeader { number: 3, ..base.next(60, base.len() + 1) }, &[0x45; 60]);
        let mut sample = torn_around(&line, base.body_start());
        let carrier = sample.offsets[1];
        let end = sample.offsets[2];
        let crc = crc32fast::hash(&sample.bytes[carrier..end - CRC_LEN]);
        sample.bytes[end - CRC_LEN..end].copy_from_slice(&crc.to_le_bytes());
        assert_eq!((sample.verdict(), sample.scan().0.blocks), (ScanVerdict::Clean, 3));
        sample.bytes[sample.offsets[0] + 100] ^= 1;
        assert_eq!(sample.behind(), [1, 2]);
        assert_eq!(scan_with_key(&sample).2, 0);
    }

    /// Nested fakes reach the limit on refuted bytes. The search still finds the block behind them.
    #[test]
    fn nested_blocks_hide_nothing_and_cost_no_more_than_they_may() {
        let base = Sample::unsynced(&[50]);
        let at = base.len();
        let limit = |searched: u64| REFUTED_BYTES + (REFUTED_PER_BYTE + 1) * searched;
        let mut most = 0;
        for len in [300, 5_000, 2_000_000] {
            let inner = nested(&BlockHeader { number: 1, ..base.next(60, at) }, len);
            let sample = torn_around(&inner, at + 1);
            let (report, behind, refuted) = scan_with_key(&sample);
            assert_eq!(
                (report.verdict, behind),
                (ScanVerdict::Damaged { at, mark: at + 1 }, vec![2]),
                "{len}"
            );
            assert!(
                refuted >= 2 * 116 && refuted <= limit(inner.len() as u64 + 200),
                "{refuted} bytes for {len}"
            );
            most = refuted;
        }
        assert!(most > REFUTED_BYTES, "the limit was not reached: {most}");
    }

    /// Reading and proving are linear in the length of the file, for any number of headers and for
    /// any lengths that they claim.
    #[test]
    fn the_work_is_linear_in_the_length_of_the_file() {
        let read_for = |fill: &dyn Fn(&Sample, &mut Vec<u8>, usize), len: usize| {
            let mut sample = Sample::unsynced(&[50]);
            let mut tail = Vec::with_capacity(len);
            fill(&sample, &mut tail, len);
            sample.bytes.extend_from_slice(&tail);
            let (mut read, mut calls) = (0, 0);
            let mut inner = reading(&sample.bytes);
            let counted = |offset, buf: &mut [u8]| {
                let done = inner(offset, buf)?;
                read += done as u64;
                calls += 1;
                Ok::<_, Infallible>(done)
            };
            let report = scan(
                &sample.header,
                sample.len(),
                counted,
                |_, _| Ok(()),
                Some(&mut |_, _| Ok(false)),
            )
            .unwrap();
            assert_eq!(report.end, sample.offsets[0] as u64 + 50 + BLOCK_LEN_MIN as u64);
            (read, calls)
        };
        let headers = |vary: bool| {
            move |sample: &Sample, tail: &mut Vec<u8>, len: usize| {
                while tail.len() + BlockHeader::LEN < len {
                    let left = (len - tail.len() - BLOCK_LEN_MIN).min(30 << 20) as u32;
                    // A length whose end is in another page each time.
                    let payload = if vary {
                        left - (tail.len() as u32 / 96 * 7919) % (left / 2 + 1)
                    } else {
                        left
                    };
                    let header = sample.next(payload.max(40), sample.body_start());
                    tail.extend_from_slice(&BlockHeader { number: 1, ..header }.encode());
                    if len - tail.len() <= 2 * BLOCK_LEN_MIN + 96 {
                        break;
                    }
                }
                tail.resize(len, 0);
            }
        };
        let zeros = |_: &Sample, tail: &mut Vec<u8>, len: usize| tail.resize(len, 0);
        for (what, fill, most) in [
            ("zeros", &zeros as &dyn Fn(&Sample, &mut Vec<u8>, usize), 2),
            ("headers that claim all that follows", &headers(false), 4),
            // Two pages for each header of 96 bytes.
            ("headers that claim any length", &headers(true), 100),
        ] {
            for len in [1 << 20, 4 << 20] {
                let (read, calls) = read_for(fill, len);
                assert!(
                    read <= most * len as u64 + CHUNK_BYTES,
                    "{what}: {read} bytes read of {len}"
                );
                assert!(
                    calls <= 2 * len / BlockHeader::LEN + 100,
                    "{what}: {calls} reads of {len}"
                );
            }
        }
    }

    /// The sums equal the CRC32 by direct hashing, for each range of a file, and are `None` beyond
    /// its end.
    #[test]
    fn sums_are_those_of_the_bytes() {
        let bytes: Vec<u8> =
            (0..40_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        for base in [0, 1, 4095, 5000] {
            let mut sums = Sums::new(base, bytes.len() as u64);
            for (offset, len) in [
                (0, 20),
                (1, 5000),
                (4076, 40),
                (4095, 4097),
                (8192, 8192),
                (30_000, 4_999),
                (0, 34_000),
            ] {
                let begin = base as usize + offset;
                let mut file = bytes.clone();
                let end = begin + len;
                let wrong = sums.tag_of(&mut reading(&file), begin as u64, len as u64).unwrap();
                assert_eq!(wrong, None, "{base} {offset} {len}");
                let crc = crc32fast::hash(&file[begin..end - CRC_LEN]);
                file[end - CRC_LEN..end].copy_from_slice(&crc.to_le_bytes());
                let mut fresh = Sums::new(base, file.len() as u64);
                let tag = fresh.tag_of(&mut reading(&file), begin as u64, len as u64).unwrap();
                assert_eq!(
                    tag.unwrap()[..],
                    file[end - SUFFIX_LEN..end - CRC_LEN],
                    "{base} {offset} {len}"
                );
                // The file has been truncated meanwhile.
                let mut shorter = Sums::new(base, file.len() as u64);
                assert_eq!(
                    shorter
                        .tag_of(&mut reading(&file[..end - 1]), begin as u64, len as u64)
                        .unwrap(),
                    None
                );
                // The file was shorter from the start.
                assert_eq!(
                    Sums::new(base, end as u64 - 1)
                        .tag_of(&mut reading(&file), begin as u64, len as u64)
                        .unwrap(),
                    None
                );
            }
        }
    }

    /// Searches behind the contiguous blocks byte by byte and hashes each candidate whole. Returns
    /// the highest mark and the offsets of the blocks.
    fn oracle(sample: &Sample, from: &ScanReport, genuine: Option<&[usize]>) -> (u64, Vec<usize>) {
        let header = &sample.header;
        let (mut number, mut seq, mut mark) = (from.blocks, from.end_seq, 0);
        let (mut at, mut found) = (from.end as usize, Vec::new());
        while at < sample.bytes.len() {
            let block = BlockView::parse(&sample.bytes[at..]).ok().map(|view| view.header).filter(
                |block| {
                    block.segment_tag == header.segment_tag()
                        && block.number >= number
                        && block.first_seq >= seq
                        && block.end_seq() <= header.limit_seq
                        && (header.body_start..=at as u64).contains(&block.durable_mark)
                        && genuine.is_none_or(|genuine| genuine.contains(&at))
                },
            );
            match block {
                Some(block) => {
                    found.push(at);
                    mark = mark.max(block.durable_mark);
                    (number, seq) = (block.number + 1, block.end_seq());
                    at += block.block_len() as usize;
                }
                None => at += 1,
            }
        }
        (mark, found)
    }

    proptest! {
        /// The verdict depends on which blocks are valid and on their order. The search finds every
        /// whole block.
        #[test]
        fn any_damage(
            blocks in prop::collection::vec((0..300u32, any::<bool>()), 1..12),
            damage in prop::collection::vec((any::<prop::sample::Index>(), 1..400usize), 0..4),
            cut in 0..200usize,
            fill: u8,
        ) {
            let mut sample = Sample::new();
            let mut durable = sample.body_start();
            for (len, sync) in blocks {
                sample.push(if len < 30 { 0 } else { len }, durable);
                if sync {
                    durable = sample.len();
                }
            }
            let whole = sample.bytes.clone();
            let start = sample.body_start() as usize;
            for (at, len) in damage {
                let at = start + at.index(sample.bytes.len() - start);
                let end = (at + len).min(sample.bytes.len());
                sample.bytes[at..end].fill(fill);
            }
            sample.bytes.truncate(whole.len() - cut.min(whole.len() - start));

            let intact: Vec<bool> = (0..sample.offsets.len())
                .map(|n| {
                    let end = sample.offsets.get(n + 1).copied().unwrap_or(whole.len());
                    let range = sample.offsets[n]..end;
                    sample.bytes.get(range.clone()) == Some(&whole[range])
                })
                .collect();
            let (report, found) = sample.scan();
            let valid: Vec<u32> = (0..).zip(&intact).filter(|(_, intact)| **intact).map(|(n, _)| n).collect();
            prop_assert_eq!(found.iter().map(|block| block.header.number).collect::<Vec<_>>(), &valid[..]);
            let prefix = intact.iter().take_while(|intact| **intact).count();
            prop_assert_eq!(report.blocks as usize, prefix);
            let mark = found.iter().map(|block| block.header.durable_mark).fold(report.mark.min(start as u64), u64::max);
            prop_assert_eq!(report.mark, mark);
            let end = sample.offsets.get(prefix).copied().unwrap_or(whole.len()) as u64;
            prop_assert_eq!(report.end, end);
            match report.verdict {
                ScanVerdict::Clean => prop_assert_eq!(end, report.data_end),
                ScanVerdict::Damaged { at, mark: below } => prop_assert!(at == end && below == mark && at < mark),
                ScanVerdict::TornTail { at } => prop_assert!(at == end && at >= mark && at < sample.len()),
                ScanVerdict::Incomplete => prop_assert!(end >= mark && end < sample.len() && valid.len() == prefix),
            }
        }

        /// With and without a key, the scan finds the same blocks as a search that looks at each
        /// byte and hashes each candidate whole.
        #[test]
        fn the_search_finds_what_the_simplest_search_finds(
            blocks in prop::collection::vec((0..9000u32, any::<prop::sample::Index>()), 1..8),
            lines in prop::collection::vec((any::<[prop::sample::Index; 3]>(), 0..300usize, 0..9u32), 0..8),
            damage in prop::collection::vec((any::<prop::sample::Index>(), 1..400usize), 0..5),
            cut in 0..200usize,
        ) {
            let mut sample = Sample::new();
            for (len, mark) in blocks {
                let start = sample.body_start();
                let mark = start + mark.index((sample.len() - start + 1) as usize) as u64;
                sample.push(if len < 30 { 0 } else { len }, mark);
            }
            let start = sample.body_start() as usize;
            // Lines that hold blocks, at any position. Some overlap.
            for ([at, mark, seq], len, number) in lines {
                let at = start + at.index(sample.bytes.len() - start);
                let mark = mark.index(2 * sample.bytes.len()) as u64;
                let first_seq = 100 + seq.index(40) as u64;
                let header = sample.next(30 + len as u32, mark);
                let line = fake(&BlockHeader { number, first_seq, ..header }, &vec![0x45; 30 + len]);
                let fits = line.len().min(sample.bytes.len() - at);
                sample.bytes[at..at + fits].copy_from_slice(&line[..fits]);
            }
            for (at, len) in damage {
                let at = start + at.index(sample.bytes.len() - start);
                let end = (at + len).min(sample.bytes.len());
                sample.bytes[at..end].fill(0);
            }
            sample.bytes.truncate((sample.bytes.len() - cut).max(start));
            let genuine = sample.offsets.clone();
            for genuine in [None, Some(&genuine[..])] {
                let mut prove =
                    |offset: u64, _: &BlockHeader| Ok(genuine.is_none_or(|genuine| genuine.contains(&(offset as usize))));
                let (report, blocks) = sample.scan_with(Some(&mut prove));
                let (mark, expected) = oracle(&sample, &report, genuine);
                let behind = blocks.iter().filter(|block| !block.contiguous);
                prop_assert_eq!(behind.map(|block| block.offset as usize).collect::<Vec<_>>(), expected);
                let in_place = blocks.iter().filter(|block| block.contiguous).map(|block| block.header.durable_mark);
                prop_assert_eq!(report.mark, in_place.fold(mark.max(start as u64), u64::max));
                for block in &blocks {
                    let end = (block.offset + block.header.block_len()) as usize;
                    prop_assert_eq!(&block.tag[..], &sample.bytes[end - SUFFIX_LEN..end - CRC_LEN]);
                }
            }
        }

        #[test]
        fn arbitrary_bytes_do_not_panic(body: Vec<u8>, starts in prop::collection::vec(any::<[u8; 80]>(), 0..4)) {
            let mut sample = Sample::new();
            for start in starts {
                sample.bytes.extend_from_slice(&sample.next(9, 0).encode()[..16]);
                sample.bytes.extend_from_slice(&start);
            }
            sample.bytes.extend_from_slice(&body);
            sample.scan();
        }
    }
}
