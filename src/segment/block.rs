//! Blocks: a block is the unit of compression, sealing and writing.

use bytes::BufMut;
use zeroize::Zeroize;

use super::{
    BLOCK_GROUPS_MAX, BLOCK_LIST_BYTES_MAX, Compression, HASH_LEN, SEGMENT_TAG_LEN, TAG_LEN,
};
use crate::wire::{CRC_LEN, Cursor, DecodeError, put_crc, require, strip_crc};

pub(super) const MAGIC: &[u8; 4] = b"EBLK";
/// The bytes behind the payload: tag and CRC32.
pub(super) const SUFFIX_LEN: usize = TAG_LEN + CRC_LEN;

/// The contents of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BlockKind {
    /// Log groups.
    Groups,
    /// Opaque records.
    Opaque,
    /// No data: the block only carries a durable mark.
    Mark,
}

impl BlockKind {
    /// Its name in reports: `groups`, `opaque` or `mark`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Groups => "groups",
            Self::Opaque => "opaque",
            Self::Mark => "mark",
        }
    }

    fn code(self) -> u8 {
        match self {
            Self::Groups => 1,
            Self::Opaque => 2,
            Self::Mark => 3,
        }
    }

    fn from_code(code: u8) -> Result<Self, DecodeError> {
        match code {
            1 => Ok(Self::Groups),
            2 => Ok(Self::Opaque),
            3 => Ok(Self::Mark),
            _ => Err(DecodeError::Field("kind of the block")),
        }
    }
}

/// The header of a block. The block's tag authenticates all of it together with the payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockHeader {
    /// The kind of its contents.
    pub kind: BlockKind,
    /// The compression of its payload.
    pub compression: Compression,
    /// The tag of its segment: the first eight bytes of the hash of the segment's header.
    pub segment_tag: [u8; 8],
    /// Its number within the segment: from 0, without gaps.
    pub number: u32,
    /// The length of the stored payload in bytes.
    pub payload_len: u32,
    /// The length of the payload before compression, in bytes: the list, then the table of receive
    /// times.
    pub raw_len: u32,
    /// The number of groups, or of opaque records.
    pub group_count: u32,
    /// The number of logs in all groups. 0 for opaque records.
    pub log_count: u32,
    /// The length of the list in bytes. The raw payload begins with the list. It is a valid
    /// `LogGroupList`; opaque records are framed in the same way.
    pub list_len: u32,
    /// The sequence number of the first group. In a mark, the sequence number of the next group.
    pub first_seq: u64,
    /// The receive time of the first group, in microseconds since the Unix epoch.
    pub first_time_us: u64,
    /// The receive time of the last group. It is not before that of the first.
    pub last_time_us: u64,
    /// The offset in bytes up to which the file was durable when the writer sealed this block.
    pub durable_mark: u64,
    /// The random part of the nonce.
    pub nonce_random: [u8; 8],
}

impl BlockHeader {
    /// The length of an encoded block header in bytes.
    pub const LEN: usize = 96;

    /// Encodes the header.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        let mut out = &mut bytes[..];
        out.put_slice(MAGIC);
        out.put_u8(self.kind.code());
        out.put_u8(self.compression.code());
        out.put_u16_le(0);
        out.put_slice(&self.segment_tag);
        out.put_u32_le(self.number);
        out.put_u32_le(self.payload_len);
        out.put_u32_le(self.raw_len);
        out.put_u32_le(self.group_count);
        out.put_u32_le(self.log_count);
        out.put_u32_le(self.list_len);
        out.put_u64_le(self.first_seq);
        out.put_u64_le(self.first_time_us);
        out.put_u64_le(self.last_time_us);
        out.put_u64_le(self.durable_mark);
        out.put_slice(&self.nonce_random);
        bytes
    }

    /// Decodes the block header at the beginning of `bytes`. The CRC32 stands behind the payload
    /// and is not checked here.
    ///
    /// # Errors
    /// An impossible field is an error, so the caller may rely on its lengths being within the
    /// limits.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new(bytes);
        cursor.magic(MAGIC)?;
        let kind = cursor.u8()?;
        let compression = cursor.u8()?;
        cursor.zeros(2, "flags of the block")?;
        let header = Self {
            kind: BlockKind::from_code(kind)?,
            compression: Compression::from_code(compression)?,
            segment_tag: cursor.array()?,
            number: cursor.u32()?,
            payload_len: cursor.u32()?,
            raw_len: cursor.u32()?,
            group_count: cursor.u32()?,
            log_count: cursor.u32()?,
            list_len: cursor.u32()?,
            first_seq: cursor.u64()?,
            first_time_us: cursor.u64()?,
            last_time_us: cursor.u64()?,
            durable_mark: cursor.u64()?,
            nonce_random: cursor.array()?,
        };
        cursor.zeros(16, "reserved bytes of the block")?;
        header.check()?;
        Ok(header)
    }

    /// Checks that the fields agree with each other and with the limits. A writer calls this before
    /// it writes.
    ///
    /// # Errors
    /// The field that is wrong.
    pub fn check(&self) -> Result<(), DecodeError> {
        // The footer's nonce uses the last number.
        require(self.number != u32::MAX, "number of the block")?;
        require(self.list_len <= BLOCK_LIST_BYTES_MAX, "length of the list")?;
        require(self.group_count <= BLOCK_GROUPS_MAX, "number of groups")?;
        require(self.raw_len == self.list_len + 4 * self.group_count, "raw length")?;
        match self.kind {
            BlockKind::Mark => {
                require(self.group_count == 0 && self.list_len == 0, "contents of a mark")?;
                require(self.compression == Compression::None, "compression of a mark")?;
                require(self.first_time_us == self.last_time_us, "receive times of a mark")?;
            }
            // A group takes at least the two bytes of its frame.
            BlockKind::Groups | BlockKind::Opaque => {
                require(
                    self.group_count > 0 && self.list_len >= 2 * self.group_count,
                    "number of groups",
                )?;
            }
        }
        require(self.kind == BlockKind::Groups || self.log_count == 0, "number of logs")?;
        // Each log takes at least two bytes.
        require(self.log_count <= self.list_len / 2, "number of logs")?;
        match self.compression {
            Compression::None => require(self.payload_len == self.raw_len, "payload length")?,
            _ => {
                require(0 < self.payload_len && self.payload_len < self.raw_len, "payload length")?
            }
        }
        require(
            self.first_seq.checked_add(u64::from(self.group_count)).is_some(),
            "first sequence number",
        )?;
        require(self.first_time_us <= self.last_time_us, "receive times")
    }

    /// The nonce of the block: its number, big-endian, and the random part.
    #[must_use]
    pub fn nonce(&self) -> [u8; 12] {
        nonce(self.number, &self.nonce_random)
    }

    /// The length of the whole block in the file, in bytes.
    #[must_use]
    pub fn block_len(&self) -> u64 {
        Self::LEN as u64 + u64::from(self.payload_len) + SUFFIX_LEN as u64
    }

    /// One past the sequence number of its last group.
    #[must_use]
    pub fn end_seq(&self) -> u64 {
        self.first_seq.saturating_add(u64::from(self.group_count))
    }
}

/// A nonce: the block number in four bytes, big-endian, and eight random bytes.
pub(super) fn nonce(number: u32, random: &[u8; 8]) -> [u8; 12] {
    let mut nonce = [0; 12];
    nonce[..4].copy_from_slice(&number.to_be_bytes());
    nonce[4..].copy_from_slice(random);
    nonce
}

/// The parts of a block whose CRC32 matches. None of them is authenticated yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockView<'a> {
    pub(crate) header: BlockHeader,
    /// The encoded header.
    pub(crate) header_bytes: &'a [u8; BlockHeader::LEN],
    /// The payload as stored: compressed, and encrypted if the suite encrypts.
    pub(crate) payload: &'a [u8],
    pub(crate) tag: [u8; TAG_LEN],
}

impl<'a> BlockView<'a> {
    /// Parses the block at the beginning of `bytes`. More bytes may follow it.
    ///
    /// # Errors
    /// [`DecodeError::Short`] if the block is longer than `bytes`.
    pub(crate) fn parse(bytes: &'a [u8]) -> Result<Self, DecodeError> {
        let header = BlockHeader::decode(bytes)?;
        let block = Cursor::new(bytes).bytes(header.block_len() as usize)?;
        let covered = strip_crc(block)?;
        let (header_bytes, rest) =
            covered.split_first_chunk().ok_or(DecodeError::Field("block"))?;
        let (payload, tag) = rest.split_last_chunk().ok_or(DecodeError::Field("block"))?;
        Ok(Self { header, header_bytes, payload, tag: *tag })
    }
}

/// The buffer in which a writer builds a block. It holds `[hash of the segment's header][block
/// header][payload]`, the bytes that the tag authenticates, and then the tag and the CRC32. The
/// writer reuses it for the next block.
#[derive(Debug, Default)]
pub(crate) struct SealBuffer(Vec<u8>);

impl SealBuffer {
    /// The offset of the payload.
    pub(crate) const PAYLOAD_AT: usize = HASH_LEN + BlockHeader::LEN;

    /// Overwrites the whole buffer. After a failed seal it still holds plaintext.
    pub(crate) fn wipe(&mut self) {
        self.0.zeroize();
    }

    /// Begins a block. The caller appends the payload to the returned buffer.
    pub(crate) fn begin(&mut self) -> &mut Vec<u8> {
        self.0.clear();
        self.0.resize(Self::PAYLOAD_AT, 0);
        &mut self.0
    }

    /// How many bytes it has room for.
    pub(crate) fn capacity(&self) -> usize {
        self.0.capacity()
    }

    /// The number of payload bytes appended so far.
    pub(crate) fn payload_len(&self) -> usize {
        self.0.len() - Self::PAYLOAD_AT
    }

    /// Puts the header in front of the payload. Returns the bytes to seal, with the payload at
    /// [`SealBuffer::PAYLOAD_AT`]: in front of it are the associated data, the header hash and the
    /// block header. `SegmentCipher::open_block` builds the same associated data for a reader.
    pub(crate) fn with_header(
        &mut self,
        header_hash: &[u8; HASH_LEN],
        header: &BlockHeader,
    ) -> &mut [u8] {
        debug_assert_eq!(header.check(), Ok(()));
        debug_assert_eq!(header.segment_tag, header_hash[..SEGMENT_TAG_LEN]);
        debug_assert_eq!(header.payload_len as usize, self.payload_len());
        self.0[..HASH_LEN].copy_from_slice(header_hash);
        self.0[HASH_LEN..Self::PAYLOAD_AT].copy_from_slice(&header.encode());
        &mut self.0
    }

    /// Completes the block and returns its bytes for the file.
    pub(crate) fn finish(&mut self, tag: &[u8; TAG_LEN]) -> &[u8] {
        self.0.extend_from_slice(tag);
        put_crc(&mut self.0, HASH_LEN);
        &self.0[HASH_LEN..]
    }

    /// The payload of a completed block, as it is stored in the file.
    pub(crate) fn stored_payload(&self) -> &[u8] {
        &self.0[Self::PAYLOAD_AT..self.0.len() - SUFFIX_LEN]
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;
    use crate::{
        ids::{hex_decode, hex_encode},
        segment::tests::damage_each,
    };

    #[test]
    fn what_was_to_be_sealed_is_overwritten() {
        let mut buffer = SealBuffer::default();
        buffer.begin().extend_from_slice(b"plaintext");
        buffer.wipe();
        assert!(buffer.0.is_empty());
    }

    fn sample() -> BlockHeader {
        BlockHeader {
            kind: BlockKind::Groups,
            compression: Compression::Lz4,
            segment_tag: [0x77; 8],
            number: 0x0102_0304,
            payload_len: 5,
            raw_len: 108,
            group_count: 2,
            log_count: 3,
            list_len: 100,
            first_seq: 6,
            first_time_us: 1_700_000_000_000_000,
            last_time_us: 1_700_000_000_000_001,
            durable_mark: 299,
            nonce_random: *b"nonce-08",
        }
    }

    fn block(header: &BlockHeader, payload: &[u8]) -> Vec<u8> {
        let mut hash = [0; HASH_LEN];
        hash[..8].copy_from_slice(&header.segment_tag);
        let mut buffer = SealBuffer::default();
        buffer.begin().extend_from_slice(payload);
        assert_eq!(buffer.payload_len(), payload.len());
        let sealing = buffer.with_header(&hash, header);
        assert_eq!(sealing[SealBuffer::PAYLOAD_AT..], *payload);
        assert_eq!(sealing[..HASH_LEN], hash);
        buffer.finish(&[0xaa; 16]).to_vec()
    }

    #[test]
    fn golden() {
        let golden = concat!(
            "45424c4b01010000777777777777777704030201050000006c0000000200000003000000640000000600000000000000",
            "00401e18240a060001401e18240a06002b010000000000006e6f6e63652d303800000000000000000000000000000000",
            "3132333435aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa14a61bd5",
        );
        let bytes = block(&sample(), b"12345");
        assert_eq!(hex_encode(&bytes), golden);
        let bytes = hex_decode(golden).unwrap();
        let view = BlockView::parse(&bytes).unwrap();
        assert_eq!(view.header, sample());
        assert_eq!(view.header_bytes[..], bytes[..96]);
        assert_eq!(view.payload, b"12345");
        assert_eq!(view.tag, [0xaa; 16]);
        assert_eq!(view.header.block_len(), bytes.len() as u64);
        assert_eq!(view.header.nonce(), *b"\x01\x02\x03\x04nonce-08");
        assert_eq!(view.header.end_seq(), 8);
    }

    #[test]
    fn damage_is_refused() {
        damage_each(&block(&sample(), b"12345"), |bytes, how| {
            BlockView::parse(bytes).expect_err(&how);
        });
    }

    #[test]
    fn impossible_fields_are_refused() {
        let mark = BlockHeader {
            kind: BlockKind::Mark,
            compression: Compression::None,
            payload_len: 0,
            raw_len: 0,
            group_count: 0,
            log_count: 0,
            list_len: 0,
            last_time_us: sample().first_time_us,
            ..sample()
        };
        let plain = BlockHeader { compression: Compression::None, payload_len: 108, ..sample() };
        let opaque = BlockHeader { kind: BlockKind::Opaque, log_count: 0, ..sample() };
        let largest = BlockHeader {
            payload_len: 1,
            raw_len: super::super::BLOCK_RAW_BYTES_MAX,
            group_count: BLOCK_GROUPS_MAX,
            list_len: BLOCK_LIST_BYTES_MAX,
            ..sample()
        };
        for fine in [mark, plain, opaque, largest] {
            assert_eq!(BlockHeader::decode(&fine.encode()), Ok(fine));
        }
        for (wrong, what) in [
            (BlockHeader { number: u32::MAX, ..sample() }, "number of the block"),
            (BlockHeader { list_len: BLOCK_LIST_BYTES_MAX + 1, ..largest }, "length of the list"),
            (BlockHeader { group_count: BLOCK_GROUPS_MAX + 1, ..largest }, "number of groups"),
            (BlockHeader { raw_len: 107, ..sample() }, "raw length"),
            (BlockHeader { group_count: 0, raw_len: 100, ..sample() }, "number of groups"),
            (BlockHeader { group_count: 51, raw_len: 304, ..sample() }, "number of groups"),
            (BlockHeader { log_count: 51, ..sample() }, "number of logs"),
            (BlockHeader { log_count: 1, ..opaque }, "number of logs"),
            (BlockHeader { log_count: 1, ..mark }, "number of logs"),
            (BlockHeader { list_len: 2, raw_len: 2, ..mark }, "contents of a mark"),
            (BlockHeader { compression: Compression::Zstd, ..mark }, "compression of a mark"),
            (BlockHeader { payload_len: 1, ..mark }, "payload length"),
            (
                BlockHeader { last_time_us: mark.first_time_us + 1, ..mark },
                "receive times of a mark",
            ),
            (BlockHeader { payload_len: 107, ..plain }, "payload length"),
            (BlockHeader { payload_len: 108, ..sample() }, "payload length"),
            (BlockHeader { payload_len: 0, ..sample() }, "payload length"),
            (BlockHeader { first_seq: u64::MAX - 1, ..sample() }, "first sequence number"),
            (BlockHeader { last_time_us: 0, ..sample() }, "receive times"),
        ] {
            assert_eq!(
                BlockHeader::decode(&wrong.encode()),
                Err(DecodeError::Field(what)),
                "{wrong:?}"
            );
        }
        for (at, what) in [
            (4, "kind of the block"),
            (5, "compression"),
            (6, "flags of the block"),
            (7, "flags of the block"),
            (80, "reserved bytes of the block"),
            (95, "reserved bytes of the block"),
        ] {
            let mut bytes = sample().encode();
            bytes[at] = 0x40;
            assert_eq!(BlockHeader::decode(&bytes), Err(DecodeError::Field(what)));
        }
    }

    proptest! {
        #[test]
        fn round_trip(
            payload in prop::collection::vec(any::<u8>(), 0..200),
            opaque: bool,
            group_count in 1u32..100,
            numbers in any::<(u32, u32, u64, u64, u64, u64)>(),
            segment_tag: [u8; 8],
            nonce_random: [u8; 8],
        ) {
            let (number, log_count, first_seq, time, other_time, durable_mark) = numbers;
            let list_len = 2 * group_count + payload.len() as u32;
            let payload = [&payload[..], &vec![0; (6 * group_count) as usize]].concat();
            let header = BlockHeader {
                kind: if opaque { BlockKind::Opaque } else { BlockKind::Groups },
                compression: Compression::None,
                segment_tag,
                number: number.saturating_sub(1),
                payload_len: payload.len() as u32,
                raw_len: list_len + 4 * group_count,
                group_count,
                log_count: if opaque { 0 } else { log_count % group_count },
                list_len,
                first_seq: first_seq.min(u64::MAX - 100),
                first_time_us: time.min(other_time),
                last_time_us: time.max(other_time),
                durable_mark,
                nonce_random,
            };
            let bytes = block(&header, &payload);
            let view = BlockView::parse(&bytes).unwrap();
            prop_assert_eq!(view.header, header);
            prop_assert_eq!(view.payload, &payload[..]);
        }

        #[test]
        fn decoding_is_canonical(at in 4..93usize, with: [u8; 4]) {
            let mut bytes = sample().encode();
            bytes[at..(at + 4).min(96)].copy_from_slice(&with[..(96 - at).min(4)]);
            if let Ok(header) = BlockHeader::decode(&bytes) {
                prop_assert_eq!(header.encode(), bytes);
            }
        }

        #[test]
        fn arbitrary_bytes_do_not_panic(bytes: Vec<u8>) {
            let _ = BlockView::parse(&bytes);
            let _ = BlockView::parse(&[&MAGIC[..], &[1, 1, 0, 0], &bytes].concat());
        }
    }
}
