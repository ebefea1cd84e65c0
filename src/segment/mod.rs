//! The bytes of a segment: header, blocks, footer.
//!
//! This module does no I/O and holds no key. The bytes that it decodes come from disk and are
//! hostile until their tag has been verified. So no function here panics on them, and none
//! allocates more than the limits below allow. All numbers are little-endian.

mod block;
mod compression;
mod contents;
mod footer;
mod header;
mod scan;

use std::fmt;

pub use block::{BlockHeader, BlockKind};
pub(crate) use block::{BlockView, SealBuffer};
pub use compression::{Compression, UnknownCompression};
pub(crate) use compression::{Compressor, Decompressor};
pub(crate) use contents::{check_groups, entries};
pub use footer::{DecodedFooter, Footer, IndexEntry};
pub(crate) use footer::{FooterBuilder, Trailer};
pub use header::{DecodedHeader, Extension, KeySource, Predecessor, PredecessorEnd, SegmentHeader};
pub(crate) use scan::{ScanReport, ScanVerdict, ScannedBlock, end_of_data, scan};

pub use crate::wire::{DecodeError, Features};

/// The longest segment file, in bytes.
pub const SEGMENT_BYTES_MAX: u64 = 4 << 30;
/// The longest `LogGroupList` of one block, in bytes, framing included.
pub const BLOCK_LIST_BYTES_MAX: u32 = 32 << 20;
/// The most groups (or opaque records) in one block.
pub const BLOCK_GROUPS_MAX: u32 = 1 << 16;
/// The most bytes that a block holds before compression: the list, and four bytes of receive time
/// for each group.
pub const BLOCK_RAW_BYTES_MAX: u32 = BLOCK_LIST_BYTES_MAX + 4 * BLOCK_GROUPS_MAX;
/// The size of a block beyond its payload, in bytes: header, tag and CRC32.
pub const BLOCK_OVERHEAD_BYTES: u64 = (BlockHeader::LEN + block::SUFFIX_LEN) as u64;
/// The most bytes of header extensions, their own headers included.
pub const EXTENSIONS_BYTES_MAX: u32 = 64 << 10;
/// The least distance, in bytes, between two blocks in a footer's index.
pub const INDEX_STRIDE_BYTES: u64 = 64 << 10;
/// The most entries in a footer's index.
pub const INDEX_ENTRIES_MAX: u32 = (SEGMENT_BYTES_MAX / INDEX_STRIDE_BYTES) as u32;

/// The length of a segment tag in bytes: the first bytes of the hash of the segment's header.
const SEGMENT_TAG_LEN: usize = 8;
/// The bytes of a hash.
const HASH_LEN: usize = 32;
/// The bytes of an authentication tag.
const TAG_LEN: usize = 16;

/// The parts of a segment's file name: `{ordinal:010}-{first_seq:020}-{epoch:010}.seg`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SegmentName {
    pub(crate) ordinal: u64,
    /// The epoch of the writer that created the segment. Because of it, two writers never use the
    /// same name.
    pub(crate) epoch: u64,
    pub(crate) first_seq: u64,
}

impl SegmentName {
    /// Parses a file name. `None` for any other name, and for an ordinal that no segment has:
    /// ordinals begin with 1, and each one has a successor.
    pub(crate) fn parse(name: &str) -> Option<Self> {
        let mut parts = name.strip_suffix(".seg")?.split('-');
        let mut number = || parts.next()?.parse().ok();
        let (ordinal, first_seq, epoch) = (number()?, number()?, number()?);
        let parsed = Self { ordinal, epoch, first_seq };
        ((1..u64::MAX).contains(&ordinal) && parsed.to_string() == name).then_some(parsed)
    }
}

impl fmt::Display for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:010}-{:020}-{:010}.seg", self.ordinal, self.first_seq, self.epoch)
    }
}

/// The tag by which blocks and footers name their segment: the first bytes of the hash of its
/// header.
pub(crate) fn segment_tag(header_hash: &[u8; HASH_LEN]) -> [u8; SEGMENT_TAG_LEN] {
    let mut tag = [0; SEGMENT_TAG_LEN];
    tag.copy_from_slice(&header_hash[..SEGMENT_TAG_LEN]);
    tag
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    /// Calls `refused` with every truncation and every single-bit flip of `bytes`.
    pub(crate) fn damage_each(bytes: &[u8], mut refused: impl FnMut(&[u8], String)) {
        for len in 0..bytes.len() {
            refused(&bytes[..len], format!("cut to {len}"));
        }
        let mut damaged = bytes.to_vec();
        for bit in 0..bytes.len() * 8 {
            damaged[bit / 8] ^= 1 << (bit % 8);
            refused(&damaged, format!("bit {bit}"));
            damaged[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn file_names() {
        let name = SegmentName { ordinal: 7, epoch: 3, first_seq: 42 };
        assert_eq!(name.to_string(), "0000000007-00000000000000000042-0000000003.seg");
        for (ordinal, first_seq) in
            [(1, 0), (7, 42), (9_999_999_999, 1), (10_000_000_000, 1), (u64::MAX - 1, u64::MAX)]
        {
            for epoch in [1, 9_999_999_999, u64::MAX] {
                let name = SegmentName { ordinal, epoch, first_seq };
                assert_eq!(SegmentName::parse(&name.to_string()), Some(name));
            }
        }
        for wrong in [
            "",
            ".seg",
            "-.seg",
            "7-42-1.seg",
            "0000000007-00000000000000000042.seg",
            "0000000007-00000000000000000042-0000000001.seg.tmp",
            "0000000007-00000000000000000042-0000000001.SEG",
            "00000000007-00000000000000000042-0000000001.seg",
            "+000000007-00000000000000000042-0000000001.seg",
            "0000000007-+0000000000000000042-0000000001.seg",
            "0000000007_00000000000000000042_0000000001.seg",
            "0000000007-99999999999999999999-0000000001.seg",
            "0000000007-00000000000000000042-1.seg",
            "0000000007-00000000000000000042-0000000001-0000000001.seg",
            "0000000000-00000000000000000042-0000000001.seg",
            "18446744073709551615-00000000000000000042-0000000001.seg",
        ] {
            assert_eq!(SegmentName::parse(wrong), None, "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn file_names_are_canonical(name in "[0-9]{9,11}-[0-9]{19,21}-[0-9]{9,11}\\.seg") {
            if let Some(parsed) = SegmentName::parse(&name) {
                prop_assert_eq!(parsed.to_string(), name);
            }
        }
    }
}
