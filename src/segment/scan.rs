//! Finding the blocks of a segment that has no footer, without any key.
//!
//! Blocks that were not synced may have reached the disk in any order when the system crashed, so a valid block behind a bad one
//! proves nothing. What does is the durable mark that every block carries: up to there the file *was* durable, and damage below it
//! is corruption; damage at or above it is the torn tail that a crash leaves.

use std::io;

use memchr::memmem::Finder;

use super::{
    BlockHeader, BlockView, DecodeError, DecodedHeader, SEGMENT_TAG_LEN, TAG_LEN,
    block::{MAGIC, SUFFIX_LEN},
};

/// How much is read at once, in bytes, unless a block is longer.
const CHUNK_BYTES: u64 = 1 << 20;
const BLOCK_LEN_MIN: usize = BlockHeader::LEN + SUFFIX_LEN;
/// Where a block has its segment's tag.
const TAG_AT: usize = 8;
/// Where a block has its number.
const NUMBER_AT: usize = TAG_AT + SEGMENT_TAG_LEN;

/// A block whose CRC32 holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ScannedBlock {
    /// The offset in bytes at which it begins.
    pub(crate) offset: u64,
    pub(crate) header: BlockHeader,
    pub(crate) tag: [u8; TAG_LEN],
    /// Whether it and all blocks before it are there and in order. `false` for what was found behind damage.
    pub(crate) contiguous: bool,
}

/// How the scanned part of a file ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ScanVerdict {
    /// With a block.
    Clean,
    /// Inside what looks like the next block: it may still be being written.
    Incomplete,
    /// With a torn tail: from offset `at` on, at or above the durable mark, the bytes are not the next block.
    TornTail { at: u64 },
    /// In corruption: at offset `at`, below the durable mark `mark`, the bytes are not the next block.
    Damaged { at: u64, mark: u64 },
}

/// What a scan found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ScanReport {
    /// The offset in bytes at which the contiguous blocks end.
    pub(crate) end: u64,
    /// How many contiguous blocks there are: the number of the next one.
    pub(crate) blocks: u32,
    /// One past the last sequence number that they use; the segment's first one if they use none.
    pub(crate) end_seq: u64,
    /// The highest durable mark that any valid block of the segment carries, wherever it lies. The end of the header if none does.
    pub(crate) mark: u64,
    /// How many bytes were scanned, from the beginning of the file.
    pub(crate) file_len: u64,
    pub(crate) verdict: ScanVerdict,
}

/// Scans the blocks of the segment that `header` begins, up to offset `file_len`.
///
/// `read_at` reads at an offset as much as there is, up to the length of the buffer. Each valid block is given to `on_block`, in the
/// order of the file. Behind damage, blocks are looked for byte by byte, and given if they are in order, though not without gaps.
///
/// # Errors
/// Only what `read_at` says.
pub(crate) fn scan(
    header: &DecodedHeader,
    file_len: u64,
    read_at: impl FnMut(u64, &mut [u8]) -> io::Result<usize>,
    mut on_block: impl FnMut(ScannedBlock),
) -> io::Result<ScanReport> {
    let (body_start, limit_seq) = (header.body_start, header.header.limit_seq);
    let mut window =
        Window { read_at, file_len, start: body_start, bytes: Vec::new(), segment_tag: header.segment_tag() };
    let (mut end, mut number, mut end_seq) = (body_start, 0, header.header.first_seq);
    let mut mark = body_start;
    let mut incomplete = false;
    while end < file_len {
        match window.probe(end)? {
            Probe::Block(found, tag) => {
                let in_place = found.number == number
                    && (end_seq..=limit_seq).contains(&found.first_seq)
                    && found.end_seq() <= limit_seq
                    && (body_start..=end).contains(&found.durable_mark);
                if !in_place {
                    break;
                }
                on_block(ScannedBlock { offset: end, header: found, tag, contiguous: true });
                mark = mark.max(found.durable_mark);
                end += found.block_len();
                end_seq = found.end_seq();
                number += 1;
            }
            Probe::Beyond(found) => {
                incomplete = found.is_none_or(|found| found == number);
                break;
            }
            Probe::Nothing => break,
        }
    }

    let (mut next_number, mut next_seq) = (number, end_seq);
    let mut at = end;
    while let Some(candidate) = window.find(at)? {
        at = candidate + 1;
        if let Probe::Block(found, tag) = window.probe(candidate)? {
            incomplete = false;
            mark = mark.max(found.durable_mark);
            at = candidate + found.block_len();
            if found.number >= next_number
                && (next_seq..=limit_seq).contains(&found.first_seq)
                && found.end_seq() <= limit_seq
            {
                on_block(ScannedBlock { offset: candidate, header: found, tag, contiguous: false });
                (next_number, next_seq) = (found.number + 1, found.end_seq());
            }
        }
    }

    let verdict = if end >= file_len {
        ScanVerdict::Clean
    } else if end < mark {
        ScanVerdict::Damaged { at: end, mark }
    } else if incomplete {
        ScanVerdict::Incomplete
    } else {
        ScanVerdict::TornTail { at: end }
    };
    Ok(ScanReport { end, blocks: number, end_seq, mark, file_len, verdict })
}

/// What lies at an offset.
enum Probe {
    /// A block of the segment.
    Block(BlockHeader, [u8; TAG_LEN]),
    /// The beginning of one that goes on beyond the end of the file, with its number if so much of it is there.
    Beyond(Option<u32>),
    /// Neither.
    Nothing,
}

/// A part of the file in memory.
struct Window<F> {
    read_at: F,
    file_len: u64,
    /// The offset of `bytes`.
    start: u64,
    bytes: Vec<u8>,
    segment_tag: [u8; SEGMENT_TAG_LEN],
}

impl<F: FnMut(u64, &mut [u8]) -> io::Result<usize>> Window<F> {
    /// The bytes from `offset` on: at least `wanted` of them, unless the file ends before.
    fn at(&mut self, offset: u64, wanted: u64) -> io::Result<&[u8]> {
        let left = self.file_len.saturating_sub(offset);
        let mut skip = offset.checked_sub(self.start).and_then(|skip| usize::try_from(skip).ok()).unwrap_or(usize::MAX);
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

    fn probe(&mut self, offset: u64) -> io::Result<Probe> {
        let segment_tag = self.segment_tag;
        let left = self.file_len.saturating_sub(offset);
        let bytes = self.at(offset, BLOCK_LEN_MIN as u64)?;
        let Some(header) = bytes.get(..BlockHeader::LEN) else {
            let same = |at: usize, with: &[u8]| with.iter().zip(bytes.iter().skip(at)).all(|(a, b)| a == b);
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

    /// The first offset, from `at` on, that looks like the beginning of a block.
    fn find(&mut self, mut at: u64) -> io::Result<Option<u64>> {
        let segment_tag = self.segment_tag;
        let finder = Finder::new(&segment_tag);
        loop {
            let bytes = self.at(at, BLOCK_LEN_MIN as u64)?;
            if bytes.len() < BLOCK_LEN_MIN {
                return Ok(None);
            }
            let begins = |&tag_at: &usize| {
                let before = tag_at.checked_sub(TAG_AT).and_then(|begin| bytes.get(begin..));
                before.is_some_and(|block| block.starts_with(MAGIC))
            };
            if let Some(tag_at) = finder.find_iter(bytes).find(begins) {
                return Ok(Some(at + (tag_at - TAG_AT) as u64));
            }
            // A beginning of which the tag is not wholly in the window yet is looked at again.
            at += (bytes.len() - (NUMBER_AT - 1)) as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;
    use crate::{
        crypto::Suite,
        ids::{LogstoreId, SegmentId, StoreId},
        segment::{BlockKind, Compression, Features, KeySource, Predecessor, SealBuffer, SegmentHeader},
    };

    /// A segment in the making.
    struct Sample {
        header: DecodedHeader,
        bytes: Vec<u8>,
        /// Where its blocks begin.
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
                extensions: Vec::new(),
            };
            let bytes = SegmentHeader::finish(header.encode(), &[5; 32]);
            Self { header: SegmentHeader::decode(&bytes).unwrap(), bytes, offsets: Vec::new(), next_seq: 100 }
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

        /// Appends a block that says that everything up to `mark` is durable.
        fn push(&mut self, payload_len: u32, mark: u64) {
            self.put(&self.next(payload_len, mark));
        }

        /// Blocks of these lengths, none of which was ever synced.
        fn unsynced(lens: &[u32]) -> Self {
            let mut sample = Self::new();
            for &len in lens {
                sample.push(len, sample.body_start());
            }
            sample
        }

        fn scan(&self) -> (ScanReport, Vec<ScannedBlock>) {
            let mut blocks = Vec::new();
            let read_at = |offset: u64, buf: &mut [u8]| {
                let rest = self.bytes.get(offset as usize..).unwrap_or_default();
                let len = rest.len().min(buf.len());
                buf[..len].copy_from_slice(&rest[..len]);
                Ok(len)
            };
            let report = scan(&self.header, self.len(), read_at, |block| blocks.push(block)).unwrap();
            assert_eq!(report.file_len, self.len());
            assert_eq!(blocks.iter().filter(|block| block.contiguous).count(), report.blocks as usize);
            assert!(blocks.is_sorted_by(|a, b| a.offset < b.offset && a.header.number < b.header.number));
            (report, blocks)
        }

        fn verdict(&self) -> ScanVerdict {
            self.scan().0.verdict
        }

        /// The numbers of the blocks found behind damage.
        fn behind(&self) -> Vec<u32> {
            self.scan().1.iter().filter(|block| !block.contiguous).map(|block| block.header.number).collect()
        }
    }

    #[test]
    fn empty_body() {
        let sample = Sample::new();
        let (report, blocks) = sample.scan();
        let end = sample.body_start();
        let expected =
            ScanReport { end, blocks: 0, end_seq: 100, mark: end, file_len: end, verdict: ScanVerdict::Clean };
        assert_eq!((report, blocks.len()), (expected, 0));
    }

    #[test]
    fn whole_blocks() {
        // One is longer than a chunk.
        let mut sample = Sample::unsynced(&[50, 60, 3_000_000, 70]);
        let durable = sample.len();
        sample.push(0, durable);
        sample.push(900_000, durable);
        let (report, blocks) = sample.scan();
        assert_eq!(report.verdict, ScanVerdict::Clean);
        assert_eq!((report.end, report.blocks, report.end_seq, report.mark), (sample.len(), 6, 115, durable));
        assert_eq!(blocks.iter().map(|block| block.offset as usize).collect::<Vec<_>>(), sample.offsets);
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
            assert_eq!((report.end, report.blocks, report.end_seq, blocks.len()), (end as u64, 1, 103, 1));
        }
        sample.bytes.pop();
        assert_eq!(sample.verdict(), ScanVerdict::Clean);
    }

    #[test]
    fn a_cut_that_cannot_be_the_next_block_is_torn() {
        let whole = Sample::unsynced(&[50, 60]);
        let at = whole.offsets[1];
        // In the magic bytes, the segment's tag and the number.
        for (wrong, lens) in [(0, 1..96), (10, 11..96), (17, 20..170)] {
            for len in lens {
                let mut sample = Sample::unsynced(&[50, 60]);
                sample.bytes[at + wrong] ^= 1;
                sample.bytes.truncate(at + len);
                assert_eq!(sample.verdict(), ScanVerdict::TornTail { at: at as u64 }, "{wrong} {len}");
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
            // The last block may seem to go on beyond the end.
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
        // Above the mark, the last block is damaged, and the one before says how far it was durable.
        let at = whole.offsets[2];
        whole.bytes[at + 100] ^= 1;
        assert_eq!(whole.verdict(), ScanVerdict::TornTail { at: at as u64 });
        // At the mark, but a later block that is fine says that it was durable.
        whole.push(10 + 12, mark + 1);
        assert_eq!(whole.verdict(), ScanVerdict::Damaged { at: at as u64, mark: mark + 1 });
        assert_eq!(whole.behind(), [3, 4]);
    }

    #[test]
    fn holes_and_garbage() {
        // The file was extended, but nothing was written.
        let mut sample = Sample::unsynced(&[50]);
        let at = sample.len();
        sample.bytes.resize(sample.bytes.len() + 5000, 0);
        assert_eq!(sample.verdict(), ScanVerdict::TornTail { at });
        // A later block arrived, more than a chunk behind.
        sample.bytes.resize(sample.bytes.len() + 2_000_001, 0);
        let durable = sample.body_start();
        sample.offsets.push(0);
        sample.push(60, durable);
        assert_eq!((sample.verdict(), sample.behind()), (ScanVerdict::TornTail { at }, vec![2]));
        sample.push(60, at + 1);
        assert_eq!((sample.verdict(), sample.behind()), (ScanVerdict::Damaged { at, mark: at + 1 }, vec![2, 3]));
        // Garbage that looks like the beginning of blocks does not hide them.
        let mut sample = Sample::unsynced(&[50]);
        for len in [4, 16, 20, 60, 96] {
            let start = sample.next(60, durable).encode();
            sample.bytes.extend_from_slice(&start[..len]);
        }
        sample.push(60, durable);
        assert_eq!((sample.verdict(), sample.behind()), (ScanVerdict::TornTail { at }, vec![1]));
    }

    /// What is read at once may end anywhere in the header of the next block.
    #[test]
    fn a_block_is_whole_wherever_the_chunk_ends() {
        let (chunk, overhead) = (CHUNK_BYTES as u32, BLOCK_LEN_MIN as u32);
        for in_chunk in 1..=overhead + 8 {
            let sample = Sample::unsynced(&[chunk - overhead - in_chunk, 20, 20]);
            assert_eq!(sample.offsets[1] as u64 + u64::from(in_chunk), sample.body_start() + CHUNK_BYTES);
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
            (BlockHeader { durable_mark: start - 1, ..next }, vec![2, 3]),
        ] {
            let mut sample = base();
            sample.put(&wrong);
            sample.next_seq = sample.next_seq.max(106);
            sample.push(80, start);
            assert_eq!(sample.verdict(), ScanVerdict::TornTail { at }, "{wrong:?}");
            assert_eq!(sample.behind(), listed, "{wrong:?}");
        }
        // A mark beyond itself is impossible, and taken for the worst.
        let mut sample = base();
        sample.put(&BlockHeader { durable_mark: at + 1, ..next });
        assert_eq!(sample.verdict(), ScanVerdict::Damaged { at, mark: at + 1 });
        // Another segment's block, or none at all.
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
            let read_at = |offset: u64, buf: &mut [u8]| {
                let rest = sample.bytes.get(offset as usize..).unwrap_or_default();
                let len = rest.len().min(buf.len());
                buf[..len].copy_from_slice(&rest[..len]);
                Ok(len)
            };
            scan(&sample.header, len, read_at, |_| {}).unwrap().verdict
        };
        assert_eq!(longer(sample.len() + 1000), ScanVerdict::Incomplete);
        let error = scan(&sample.header, sample.len(), |_, _| Err(io::ErrorKind::Other.into()), |_| {}).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Other);
    }

    proptest! {
        /// What is valid, and in which order, decides; the search finds every whole block.
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
                ScanVerdict::Clean => prop_assert_eq!(end, sample.len()),
                ScanVerdict::Damaged { at, mark: below } => prop_assert!(at == end && below == mark && at < mark),
                ScanVerdict::TornTail { at } => prop_assert!(at == end && at >= mark && at < sample.len()),
                ScanVerdict::Incomplete => prop_assert!(end >= mark && end < sample.len() && valid.len() == prefix),
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
