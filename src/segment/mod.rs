//! The bytes of a segment: header, blocks, footer.
//!
//! This module does no I/O and holds no key. The bytes that it decodes come from disk and are
//! hostile until their tag has been verified. So no function here panics on them, and none
//! allocates more than the limits below allow. All numbers are little-endian.

mod block;
mod codec;
mod contents;
mod footer;
mod header;
mod scan;

use std::fmt;

pub use block::{BlockHeader, BlockKind};
pub(crate) use block::{BlockView, SealBuffer};
pub use codec::{Compression, UnknownCompression};
pub(crate) use codec::{Compressor, Decompressor};
pub(crate) use contents::{check_groups, entries};
pub use footer::{DecodedFooter, Footer, IndexEntry};
pub(crate) use footer::{FooterBuilder, Trailer};
pub use header::{DecodedHeader, Extension, KeySource, Predecessor, PredecessorEnd, SegmentHeader};
pub(crate) use scan::{ScanReport, ScanVerdict, ScannedBlock, end_of_data, scan};

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
/// The bytes of a CRC32.
const CRC_LEN: usize = 4;

/// The reason why bytes cannot be decoded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The input is too short.
    #[error("{needed} bytes are needed, there are {have}")]
    Short {
        /// How many bytes are needed. Once more of the input is known, the number may rise.
        needed: u64,
        /// How many bytes the input has.
        have: u64,
    },
    /// The input does not begin with the magic bytes. A trailer must end with them.
    #[error("the magic bytes are wrong")]
    Magic,
    /// The CRC32 does not match the bytes that it covers.
    #[error("the CRC32 does not hold")]
    Crc,
    /// The input has this format version, which is newer than this build.
    #[error("format version {0} is newer than this build")]
    NewerVersion(u16),
    /// The input has this format version, which is older than the versions that this build reads.
    #[error("format version {0} is older than this build reads")]
    OlderVersion(u16),
    /// The input uses a feature that this build does not have.
    #[error("unknown feature: {0}")]
    Feature(String),
    /// This field has a value that the format does not allow.
    #[error("impossible value: {0}")]
    Field(&'static str),
}

/// The three sets of feature bits. This build knows no feature bit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// A build may read and write although it does not know one of these bits.
    pub compatible: u32,
    /// A build that does not know one of these bits may read, but must not write.
    pub read_only_compatible: u32,
    /// A build that does not know one of these bits must neither read nor write.
    pub incompatible: u32,
}

impl Features {
    /// The bits of [`Features::read_only_compatible`] that this build does not know. If there are
    /// any, this build must not write.
    #[must_use]
    pub fn unknown_read_only(&self) -> u32 {
        self.read_only_compatible
    }

    /// Fails if `read_only_compatible` has bits that this build does not know.
    pub(crate) fn check_writing(&self) -> Result<(), DecodeError> {
        match self.unknown_read_only() {
            0 => Ok(()),
            bits => Err(DecodeError::Feature(format!(
                "read-only-compatible feature bits {bits:#x}: it can be read, not written"
            ))),
        }
    }

    /// Fails if `incompatible` has bits that this build does not know.
    pub(crate) fn check(&self) -> Result<(), DecodeError> {
        match self.incompatible {
            0 => Ok(()),
            bits => Err(DecodeError::Feature(format!("incompatible feature bits {bits:#x}"))),
        }
    }

    pub(crate) fn encode(&self, out: &mut impl bytes::BufMut) {
        out.put_u32_le(self.compatible);
        out.put_u32_le(self.read_only_compatible);
        out.put_u32_le(self.incompatible);
    }

    pub(crate) fn decode(cursor: &mut Cursor<'_>) -> Result<Self, DecodeError> {
        Ok(Self { compatible: cursor.u32()?, read_only_compatible: cursor.u32()?, incompatible: cursor.u32()? })
    }
}

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

/// Reads little-endian values from the front of a byte string.
pub(crate) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.at >= self.bytes.len()
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Result<&'a [u8], DecodeError> {
        let short = || DecodeError::Short {
            needed: (self.at as u64).saturating_add(len as u64),
            have: self.bytes.len() as u64,
        };
        let end = self.at.checked_add(len).ok_or_else(short)?;
        let taken = self.bytes.get(self.at..end).ok_or_else(short)?;
        self.at = end;
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N)?);
        Ok(array)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, DecodeError> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    pub(crate) fn u16(&mut self) -> Result<u16, DecodeError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, DecodeError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, DecodeError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// Reads `len` bytes, which must be zero.
    pub(crate) fn zeros(&mut self, len: usize, what: &'static str) -> Result<(), DecodeError> {
        require(self.bytes(len)?.iter().all(|&byte| byte == 0), what)
    }

    /// Reads the bytes of `magic`.
    pub(crate) fn magic(&mut self, magic: &[u8]) -> Result<(), DecodeError> {
        if self.bytes(magic.len())? == magic { Ok(()) } else { Err(DecodeError::Magic) }
    }

    /// Reads a format version. It must be `known`, the version that this build reads and writes.
    pub(crate) fn version(&mut self, known: u16) -> Result<(), DecodeError> {
        match self.u16()? {
            version if version == known => Ok(()),
            0 => Err(DecodeError::Field("version")),
            version if version > known => Err(DecodeError::NewerVersion(version)),
            version => Err(DecodeError::OlderVersion(version)),
        }
    }
}

/// Fails with [`DecodeError::Field`] unless `holds`.
pub(crate) fn require(holds: bool, what: &'static str) -> Result<(), DecodeError> {
    if holds { Ok(()) } else { Err(DecodeError::Field(what)) }
}

/// Checks the CRC32 at the end of `bytes` and returns the bytes before it.
pub(crate) fn strip_crc(bytes: &[u8]) -> Result<&[u8], DecodeError> {
    match bytes.split_last_chunk::<CRC_LEN>() {
        Some((covered, crc)) if crc32fast::hash(covered) == u32::from_le_bytes(*crc) => Ok(covered),
        Some(_) => Err(DecodeError::Crc),
        None => Err(DecodeError::Short { needed: CRC_LEN as u64, have: bytes.len() as u64 }),
    }
}

/// Appends the CRC32 of the bytes of `out` from `from` on.
pub(crate) fn put_crc(out: &mut Vec<u8>, from: usize) {
    let crc = crc32fast::hash(&out[from..]);
    out.extend_from_slice(&crc.to_le_bytes());
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
        for (ordinal, first_seq) in [(1, 0), (7, 42), (9_999_999_999, 1), (10_000_000_000, 1), (u64::MAX - 1, u64::MAX)]
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

    #[test]
    fn cursor_reports_what_is_missing() {
        let mut cursor = Cursor::new(&[1, 2, 3]);
        assert_eq!(cursor.u16(), Ok(0x0201));
        assert_eq!(cursor.u32(), Err(DecodeError::Short { needed: 6, have: 3 }));
        assert_eq!(cursor.bytes(usize::MAX), Err(DecodeError::Short { needed: u64::MAX, have: 3 }));
        assert_eq!(cursor.u8(), Ok(3));
        assert!(cursor.is_empty());
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
