//! The footer of a sealed segment.

use bytes::BufMut;

use super::{
    BlockHeader, HASH_LEN, INDEX_ENTRIES_MAX, INDEX_STRIDE_BYTES, SEGMENT_TAG_LEN, TAG_LEN,
    block::nonce, header::DecodedHeader,
};
use crate::{
    crypto::{self, HashAlg, Hasher},
    wire::{CRC_LEN, Cursor, DecodeError, put_crc, require, strip_crc},
};

const MAGIC: &[u8; 4] = b"EFTR";
const TRAILER_MAGIC: &[u8; 4] = b"SEAL";
const VERSION: u16 = 2;
const FIXED_LEN: usize = 128;
const ENTRY_LEN: usize = 32;
const RECOVERED: u32 = 1;

/// The summary at the end of a sealed segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footer {
    /// The tag of its segment: the first eight bytes of the hash of the segment's header.
    pub segment_tag: [u8; 8],
    /// The number of blocks, marks included.
    pub block_count: u32,
    /// The number of groups and opaque records.
    pub group_count: u64,
    /// The number of logs in all groups.
    pub log_count: u64,
    /// The total length of all lists before compression, in bytes.
    pub raw_bytes: u64,
    /// One past the last sequence number used. The segment's first sequence number if none was
    /// used.
    pub end_seq: u64,
    /// The receive time of the first group, in microseconds since the Unix epoch. 0 if there is
    /// none.
    pub first_time_us: u64,
    /// The receive time of the last group. 0 if there is none.
    pub last_time_us: u64,
    /// The offset in bytes at which the blocks end and the footer begins.
    pub offset: u64,
    /// The random part of the nonce.
    pub nonce_random: [u8; 8],
    /// Whether recovery wrote the segment, from the blocks of a segment that a crash had cut off.
    pub recovered: bool,
    /// The hash over the segment's blocks. [`Footer::digest`] computes the digest from it.
    pub body: [u8; 32],
    /// The positions of some of the blocks, in order.
    pub index: Vec<IndexEntry>,
}

/// The position of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexEntry {
    /// The offset in bytes of the block.
    pub offset: u64,
    /// The sequence number of its first group.
    pub first_seq: u64,
    /// The receive time of that group, in microseconds since the Unix epoch.
    pub first_time_us: u64,
    /// The block's number.
    pub block: u32,
}

/// A decoded footer, with its tag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DecodedFooter {
    /// The footer.
    pub footer: Footer,
    /// The tag that authenticates the encoded footer.
    pub tag: [u8; 16],
}

impl Footer {
    /// The longest footer in bytes, trailer included.
    pub const LEN_MAX: u64 =
        (FIXED_LEN + INDEX_ENTRIES_MAX as usize * ENTRY_LEN + TAG_LEN + CRC_LEN + Trailer::LEN)
            as u64;

    /// Encodes the part that the tag authenticates: everything but the tag, the CRC32 and the
    /// trailer.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        debug_assert_eq!(self.check(), Ok(()));
        let mut out = Vec::with_capacity(self.total_len());
        out.put_slice(MAGIC);
        out.put_u16_le(VERSION);
        out.put_u16_le(0);
        out.put_slice(&self.segment_tag);
        out.put_u32_le(self.block_count);
        out.put_u32_le(self.index.len() as u32);
        out.put_u64_le(self.group_count);
        out.put_u64_le(self.log_count);
        out.put_u64_le(self.raw_bytes);
        out.put_u64_le(self.end_seq);
        out.put_u64_le(self.first_time_us);
        out.put_u64_le(self.last_time_us);
        out.put_u64_le(self.offset);
        out.put_slice(&self.nonce_random);
        out.put_u32_le(if self.recovered { RECOVERED } else { 0 });
        out.put_u32_le(0);
        out.put_slice(&self.body);
        for entry in &self.index {
            out.put_u64_le(entry.offset);
            out.put_u64_le(entry.first_seq);
            out.put_u64_le(entry.first_time_us);
            out.put_u32_le(entry.block);
            out.put_u32_le(0);
        }
        out
    }

    /// Completes the bytes that [`Footer::encode`] returned, with the tag over them.
    #[must_use]
    pub fn finish(&self, mut encoded: Vec<u8>, tag: &[u8; TAG_LEN]) -> Vec<u8> {
        encoded.put_slice(tag);
        put_crc(&mut encoded, 0);
        encoded.put_u32_le(self.total_len() as u32);
        encoded.put_slice(&self.segment_tag);
        encoded.put_slice(TRAILER_MAGIC);
        encoded
    }

    /// The length of the whole footer in the file, trailer included, in bytes.
    fn total_len(&self) -> usize {
        FIXED_LEN + self.index.len() * ENTRY_LEN + TAG_LEN + CRC_LEN + Trailer::LEN
    }

    /// Decodes a whole footer, from its first byte to the end of the file.
    ///
    /// # Errors
    /// Any impossible field is an error.
    pub fn decode(bytes: &[u8]) -> Result<DecodedFooter, DecodeError> {
        let mut cursor = Cursor::new(bytes);
        cursor.magic(MAGIC)?;
        cursor.version(VERSION)?;
        let (rest, trailer) =
            bytes.split_last_chunk().ok_or(DecodeError::Field("length of the footer"))?;
        let trailer = Trailer::decode(trailer)?;
        require(u64::from(trailer.footer_len) == bytes.len() as u64, "length of the footer")?;
        strip_crc(rest)?;

        cursor.zeros(2, "reserved bytes of the footer")?;
        let segment_tag = cursor.array()?;
        require(segment_tag == trailer.segment_tag, "segment of the footer")?;
        let block_count = cursor.u32()?;
        let entries = cursor.u32()?;
        require(entries <= INDEX_ENTRIES_MAX, "number of index entries")?;
        let mut footer = Self {
            segment_tag,
            block_count,
            group_count: cursor.u64()?,
            log_count: cursor.u64()?,
            raw_bytes: cursor.u64()?,
            end_seq: cursor.u64()?,
            first_time_us: cursor.u64()?,
            last_time_us: cursor.u64()?,
            offset: cursor.u64()?,
            nonce_random: cursor.array()?,
            recovered: match cursor.u32()? {
                0 => false,
                RECOVERED => true,
                _ => return Err(DecodeError::Field("flags of the footer")),
            },
            body: {
                cursor.zeros(4, "reserved bytes of the footer")?;
                cursor.array()?
            },
            index: Vec::new(),
        };
        let mut index = Cursor::new(cursor.bytes(entries as usize * ENTRY_LEN)?);
        while !index.is_empty() {
            footer.index.push(IndexEntry {
                offset: index.u64()?,
                first_seq: index.u64()?,
                first_time_us: index.u64()?,
                block: index.u32()?,
            });
            index.zeros(4, "reserved bytes of the index")?;
        }
        footer.check()?;
        require(footer.total_len() == bytes.len(), "length of the footer")?;
        Ok(DecodedFooter { footer, tag: cursor.array()? })
    }

    /// Checks that the fields agree with each other.
    fn check(&self) -> Result<(), DecodeError> {
        require(self.first_time_us <= self.last_time_us, "receive times of the footer")?;
        require((self.group_count == 0) == self.index.is_empty(), "number of index entries")?;
        let ordered = self.index.is_sorted_by(|a, b| {
            a.offset < b.offset
                && a.first_seq < b.first_seq
                && a.first_time_us <= b.first_time_us
                && a.block < b.block
        });
        let within = self.index.last().is_none_or(|last| {
            last.offset < self.offset
                && last.first_seq < self.end_seq
                && last.block < self.block_count
        });
        require(ordered && within, "index")
    }

    /// The digest of the segment. Its successor, the catalogue and checkpoints identify the segment
    /// by it. `algorithm` is the payload hash that the header names, and `header_hash` the hash of
    /// the header.
    #[must_use]
    pub fn digest(&self, algorithm: HashAlg, header_hash: &[u8; 32]) -> [u8; 32] {
        digest(algorithm, header_hash, self.block_count, &self.body)
    }

    /// The nonce of its tag.
    #[must_use]
    pub fn nonce(&self) -> [u8; 12] {
        nonce(u32::MAX, &self.nonce_random)
    }

    /// The number of bytes of the encoded footer that its tag authenticates.
    #[must_use]
    pub fn authenticated_len(&self) -> usize {
        FIXED_LEN + self.index.len() * ENTRY_LEN
    }

    /// The block from which a reader searches for group `seq`, or for the first group after it: no
    /// earlier block holds it. `None` if the segment has no groups.
    #[must_use]
    pub fn seek_seq(&self, seq: u64) -> Option<&IndexEntry> {
        self.before(self.index.partition_point(|entry| entry.first_seq <= seq))
    }

    /// The block from which a reader searches for the first group received at `time_us` or later:
    /// no earlier block holds it. `None` if the segment has no groups.
    #[must_use]
    pub fn seek_time(&self, time_us: u64) -> Option<&IndexEntry> {
        self.before(self.index.partition_point(|entry| entry.first_time_us < time_us))
    }

    fn before(&self, position: usize) -> Option<&IndexEntry> {
        self.index.get(position.saturating_sub(1))
    }
}

/// The last bytes of a sealed segment. A reader finds the footer from them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Trailer {
    /// The length of the footer in bytes, this trailer included.
    pub(crate) footer_len: u32,
    /// The tag of its segment.
    pub(crate) segment_tag: [u8; SEGMENT_TAG_LEN],
}

impl Trailer {
    /// The length of a trailer in bytes.
    pub(crate) const LEN: usize = 16;

    /// Decodes the last bytes of a file.
    ///
    /// # Errors
    /// [`DecodeError::Magic`]: the segment is not sealed.
    pub(crate) fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new(bytes);
        let trailer = Self { footer_len: cursor.u32()?, segment_tag: cursor.array()? };
        cursor.magic(TRAILER_MAGIC)?;
        require(u64::from(trailer.footer_len) <= Footer::LEN_MAX, "length of the footer")?;
        Ok(trailer)
    }
}

/// The digest of a segment up to one of its blocks.
fn digest(
    algorithm: HashAlg,
    header_hash: &[u8; HASH_LEN],
    blocks: u32,
    body: &[u8; HASH_LEN],
) -> [u8; HASH_LEN] {
    crypto::hash(algorithm, &[header_hash, &blocks.to_le_bytes(), body])
}

/// Collects the contents of a footer, block by block.
#[derive(Clone)]
pub(crate) struct FooterBuilder {
    footer: Footer,
    algorithm: HashAlg,
    header_hash: [u8; HASH_LEN],
    /// The hash over the blocks added so far. Each block adds its header, the hash of its stored
    /// payload, and its tag.
    body: Hasher,
}

impl FooterBuilder {
    /// Begins with a segment that has no blocks yet.
    pub(crate) fn of(header: &DecodedHeader) -> Self {
        Self::new(header.payload_hash, &header.header_hash, header.first_seq)
    }

    fn new(algorithm: HashAlg, header_hash: &[u8; HASH_LEN], first_seq: u64) -> Self {
        Self {
            footer: Footer {
                segment_tag: super::segment_tag(header_hash),
                block_count: 0,
                group_count: 0,
                log_count: 0,
                raw_bytes: 0,
                end_seq: first_seq,
                first_time_us: 0,
                last_time_us: 0,
                offset: 0,
                nonce_random: [0; 8],
                recovered: false,
                body: [0; HASH_LEN],
                index: Vec::new(),
            },
            algorithm,
            header_hash: *header_hash,
            body: Hasher::new(algorithm),
        }
    }

    /// The hash of a stored payload.
    pub(crate) fn hash_payload(&self, payload: &[u8]) -> [u8; HASH_LEN] {
        crypto::hash(self.algorithm, &[payload])
    }

    /// Adds the next block, which begins at `offset`.
    pub(crate) fn add(
        &mut self,
        offset: u64,
        header: &BlockHeader,
        payload_hash: &[u8; HASH_LEN],
        tag: &[u8; TAG_LEN],
    ) {
        self.add_to_digest(header, payload_hash, tag);
        self.count(offset, header);
    }

    /// Adds the next block to the digest alone.
    pub(crate) fn add_to_digest(
        &mut self,
        header: &BlockHeader,
        payload_hash: &[u8; HASH_LEN],
        tag: &[u8; TAG_LEN],
    ) {
        self.body.update(&header.encode());
        self.body.update(payload_hash);
        self.body.update(tag);
    }

    /// Adds the next block to all but the digest.
    pub(crate) fn count(&mut self, offset: u64, header: &BlockHeader) {
        let footer = &mut self.footer;
        footer.block_count += 1;
        if header.group_count == 0 {
            return;
        }
        if footer
            .index
            .last()
            .is_none_or(|last| offset.saturating_sub(last.offset) >= INDEX_STRIDE_BYTES)
        {
            // The index must not run backwards, even if receive times do. A seek by time then
            // begins a little too early.
            let first_time_us = footer.last_time_us.max(header.first_time_us);
            let (first_seq, block) = (header.first_seq, header.number);
            footer.index.push(IndexEntry { offset, first_seq, first_time_us, block });
        }
        if footer.group_count == 0 {
            footer.first_time_us = header.first_time_us;
        }
        footer.last_time_us = footer.last_time_us.max(header.last_time_us);
        footer.group_count += u64::from(header.group_count);
        footer.log_count += u64::from(header.log_count);
        footer.raw_bytes += u64::from(header.list_len);
        footer.end_seq = header.end_seq();
    }

    /// The digest over the blocks added so far.
    pub(crate) fn digest(&self) -> [u8; HASH_LEN] {
        digest(self.algorithm, &self.header_hash, self.footer.block_count, &self.body())
    }

    fn body(&self) -> [u8; HASH_LEN] {
        self.body.clone().finish()
    }

    /// The contents so far. Offset, nonce, hash over the blocks and `recovered` are not set.
    pub(crate) fn so_far(&self) -> &Footer {
        &self.footer
    }

    /// The footer, to be written at `offset`, the end of the blocks.
    pub(crate) fn build(&self, offset: u64, nonce_random: [u8; 8], recovered: bool) -> Footer {
        Footer { offset, nonce_random, recovered, body: self.body(), ..self.footer.clone() }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;
    use crate::{
        crypto,
        ids::{hex_decode, hex_encode},
        segment::{BlockKind, Compression, tests::damage_each},
    };

    fn sample() -> Footer {
        let entry = |n: u64| IndexEntry {
            offset: 308 + n * 70_000,
            first_seq: 6 + n,
            first_time_us: 1_700_000_000_000_000 + n / 2,
            block: n as u32,
        };
        Footer {
            segment_tag: [0x77; 8],
            block_count: 5,
            group_count: 30,
            log_count: 400,
            raw_bytes: 200_000,
            end_seq: 36,
            first_time_us: 1_700_000_000_000_000,
            last_time_us: 1_700_000_000_000_009,
            offset: 150_000,
            nonce_random: *b"nonce-08",
            recovered: true,
            body: [0x88; 32],
            index: vec![entry(0), entry(1)],
        }
    }

    fn encoded(footer: &Footer) -> Vec<u8> {
        let bytes = footer.encode();
        assert_eq!(bytes.len(), footer.authenticated_len());
        footer.finish(bytes, &[0xaa; 16])
    }

    /// Changes bytes of an encoded footer and corrects the CRC32.
    fn altered(at: usize, with: &[u8]) -> DecodeError {
        let mut bytes = sample().encode();
        bytes[at..at + with.len()].copy_from_slice(with);
        Footer::decode(&sample().finish(bytes, &[0xaa; 16])).unwrap_err()
    }

    #[test]
    fn golden() {
        let golden = concat!(
            "4546545202000000777777777777777705000000020000001e000000000000009001000000000000400d030000000000",
            "240000000000000000401e18240a060009401e18240a0600f0490200000000006e6f6e63652d30380100000000000000",
            "888888888888888888888888888888888888888888888888888888888888888834010000000000000600000000000000",
            "00401e18240a06000000000000000000a412010000000000070000000000000000401e18240a06000100000000000000",
            "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa5f8ce27ce400000077777777777777775345414c",
        );
        let bytes = encoded(&sample());
        assert_eq!(hex_encode(&bytes), golden);
        let bytes = hex_decode(golden).unwrap();
        assert_eq!(Footer::decode(&bytes), Ok(DecodedFooter { footer: sample(), tag: [0xaa; 16] }));
        let trailer = Trailer::decode(bytes.last_chunk().unwrap()).unwrap();
        assert_eq!(trailer, Trailer { footer_len: bytes.len() as u32, segment_tag: [0x77; 8] });
        assert_eq!(sample().nonce(), *b"\xff\xff\xff\xffnonce-08");
    }

    #[test]
    fn damage_is_refused() {
        damage_each(&encoded(&sample()), |bytes, how| {
            Footer::decode(bytes).expect_err(&how);
        });
    }

    #[test]
    fn impossible_fields_are_refused() {
        assert_eq!(altered(4, &[3]), DecodeError::NewerVersion(3));
        assert_eq!(altered(6, &[1]), DecodeError::Field("reserved bytes of the footer"));
        assert_eq!(altered(8, &[1]), DecodeError::Field("segment of the footer"));
        assert_eq!(altered(16, &[1]), DecodeError::Field("index"));
        assert_eq!(altered(20, &[0xff; 4]), DecodeError::Field("number of index entries"));
        assert_eq!(altered(20, &[1]), DecodeError::Field("length of the footer"));
        assert_eq!(altered(24, &[0]), DecodeError::Field("number of index entries"));
        assert_eq!(altered(48, &[7]), DecodeError::Field("index"));
        assert_eq!(altered(64, &[0; 8]), DecodeError::Field("receive times of the footer"));
        assert_eq!(altered(88, &[3]), DecodeError::Field("flags of the footer"));
        assert_eq!(altered(92, &[1]), DecodeError::Field("reserved bytes of the footer"));
        assert_eq!(altered(128 + 28, &[1]), DecodeError::Field("reserved bytes of the index"));
        assert_eq!(altered(160, &[0; 8]), DecodeError::Field("index"));
        let mut trailer = [0xff; 16];
        assert_eq!(Trailer::decode(&trailer), Err(DecodeError::Magic));
        trailer[12..].copy_from_slice(TRAILER_MAGIC);
        assert_eq!(Trailer::decode(&trailer), Err(DecodeError::Field("length of the footer")));
    }

    #[test]
    fn entries_out_of_order_or_out_of_the_segment_are_refused() {
        let refused = |change: fn(&mut Footer)| {
            let mut footer = sample();
            assert_eq!(footer.check(), Ok(()));
            change(&mut footer);
            assert_eq!(footer.check(), Err(DecodeError::Field("index")), "{footer:?}");
        };
        refused(|footer| footer.index[1].offset = footer.index[0].offset);
        refused(|footer| footer.index[1].first_seq = footer.index[0].first_seq);
        refused(|footer| footer.index[1].first_time_us = footer.index[0].first_time_us - 1);
        refused(|footer| footer.index[1].block = footer.index[0].block);
        refused(|footer| footer.offset = footer.index[1].offset);
        refused(|footer| footer.end_seq = footer.index[1].first_seq);
        refused(|footer| footer.block_count = footer.index[1].block);
    }

    #[test]
    fn the_longest_is_the_one_with_the_largest_index() {
        let entry = |n: u32| IndexEntry {
            offset: n.into(),
            first_seq: n.into(),
            first_time_us: 1,
            block: n,
        };
        let mut footer = sample();
        footer.index = (0..INDEX_ENTRIES_MAX).map(entry).collect();
        footer.first_time_us = 1;
        footer.offset = INDEX_ENTRIES_MAX.into();
        footer.end_seq = u64::MAX;
        footer.block_count = u32::MAX;
        let bytes = encoded(&footer);
        assert_eq!(bytes.len() as u64, Footer::LEN_MAX);
        assert_eq!(Footer::decode(&bytes).unwrap().footer, footer);
        assert!(Trailer::decode(bytes.last_chunk().unwrap()).is_ok());
        footer.index.push(entry(INDEX_ENTRIES_MAX));
        footer.offset += 1;
        let bytes = encoded(&footer);
        assert_eq!(Footer::decode(&bytes), Err(DecodeError::Field("length of the footer")));
        assert!(Trailer::decode(bytes.last_chunk().unwrap()).is_err());
    }

    fn block(number: u32, groups: u32, first_seq: u64, time: u64) -> BlockHeader {
        BlockHeader {
            kind: if groups == 0 { BlockKind::Mark } else { BlockKind::Groups },
            compression: Compression::None,
            segment_tag: [0x77; 8],
            number,
            payload_len: groups * 14,
            raw_len: groups * 14,
            group_count: groups,
            log_count: groups * 2,
            list_len: groups * 10,
            first_seq,
            first_time_us: time,
            last_time_us: time + 5,
            durable_mark: 0,
            nonce_random: [0; 8],
        }
    }

    #[test]
    fn built_from_blocks() {
        let hash = [0x77; 32];
        let mut builder = FooterBuilder::new(HashAlg::Sm3, &hash, 6);
        let empty = builder.build(308, [1; 8], false);
        assert_eq!(
            (empty.block_count, empty.end_seq, empty.index.len(), empty.recovered),
            (0, 6, 0, false)
        );
        assert_eq!(empty.body, crypto::hash(HashAlg::Sm3, &[]));
        assert_eq!(Footer::decode(&encoded(&empty)).unwrap().footer, empty);

        let stride = INDEX_STRIDE_BYTES;
        let mut hashed = Vec::new();
        for (offset, header) in [
            (308, block(0, 0, 6, 1)),
            (408, block(1, 2, 6, 100)),
            (407 + stride, block(2, 3, 8, 110)),
            (408 + stride, block(3, 1, 20, 90)),
            (500 + stride, block(4, 0, 21, 1)),
        ] {
            let payload_hash = builder.hash_payload(&[header.number as u8; 7]);
            builder.add(offset, &header, &payload_hash, &[header.number as u8; 16]);
            hashed.extend_from_slice(&header.encode());
            hashed.extend_from_slice(&crypto::hash(HashAlg::Sm3, &[&[header.number as u8; 7]]));
            hashed.extend_from_slice(&[header.number as u8; 16]);
            let body = crypto::hash(HashAlg::Sm3, &[&hashed]);
            let digest =
                crypto::hash(HashAlg::Sm3, &[&hash, &(header.number + 1).to_le_bytes(), &body]);
            assert_eq!(builder.digest(), digest);
            // The footer and the hash of the header are enough to compute the digest.
            assert_eq!(
                builder.build(offset + 1, [1; 8], false).digest(HashAlg::Sm3, &hash),
                digest
            );
        }
        let footer = builder.build(700 + stride, [1; 8], true);
        let expected = Footer {
            segment_tag: [0x77; 8],
            block_count: 5,
            group_count: 6,
            log_count: 12,
            raw_bytes: 60,
            end_seq: 21,
            first_time_us: 100,
            last_time_us: 115,
            offset: 700 + stride,
            nonce_random: [1; 8],
            recovered: true,
            body: crypto::hash(HashAlg::Sm3, &[&hashed]),
            index: vec![
                IndexEntry { offset: 408, first_seq: 6, first_time_us: 100, block: 1 },
                IndexEntry { offset: 408 + stride, first_seq: 20, first_time_us: 115, block: 3 },
            ],
        };
        assert_eq!(footer, expected);
        assert_eq!(builder.so_far().end_seq, 21);
        assert_eq!(Footer::decode(&encoded(&footer)).unwrap().footer, footer);
    }

    #[test]
    fn seeking() {
        let entry = |n: u64, time| IndexEntry {
            offset: n * 100_000,
            first_seq: n * 10,
            first_time_us: time,
            block: n as u32,
        };
        let footer = Footer {
            index: vec![entry(1, 50), entry(2, 60), entry(3, 60), entry(4, 70)],
            ..sample()
        };
        let by_seq = |seq| footer.seek_seq(seq).unwrap().block;
        assert_eq!([0, 10, 19, 20, 29, 39, 40, u64::MAX].map(by_seq), [1, 1, 1, 2, 2, 3, 4, 4]);
        let by_time = |time| footer.seek_time(time).unwrap().block;
        assert_eq!([0, 50, 51, 60, 61, 70, 71, u64::MAX].map(by_time), [1, 1, 1, 1, 3, 3, 4, 4]);
        let empty = Footer { index: Vec::new(), ..sample() };
        assert_eq!((empty.seek_seq(1), empty.seek_time(1)), (None, None));
    }

    proptest! {
        #[test]
        fn round_trip(blocks in prop::collection::vec((0..5u32, 1..100_000u64, any::<u32>(), any::<[u8; 16]>()), 0..40)) {
            let mut builder = FooterBuilder::new(HashAlg::Sha256, &[9; 32], 0);
            let (mut offset, mut seq) = (308, 0);
            for (number, (groups, len, time, tag)) in blocks.iter().enumerate() {
                let header = block(number as u32, *groups, seq, u64::from(*time));
                builder.add(offset, &header, &[8; 32], tag);
                offset += len;
                seq += u64::from(*groups);
            }
            let footer = builder.build(offset, [3; 8], false);
            let decoded = Footer::decode(&encoded(&footer)).unwrap().footer;
            prop_assert_eq!(decoded.end_seq, seq);
            prop_assert_eq!(decoded, footer);
        }

        #[test]
        fn decoding_is_canonical(at in 6..188usize, with: [u8; 4]) {
            let mut bytes = sample().encode();
            bytes[at..at + 4].copy_from_slice(&with);
            let bytes = sample().finish(bytes, &[0xaa; 16]);
            if let Ok(decoded) = Footer::decode(&bytes) {
                prop_assert_eq!(encoded(&decoded.footer), bytes);
            }
        }

        #[test]
        fn arbitrary_bytes_do_not_panic(bytes: Vec<u8>) {
            let _ = Footer::decode(&bytes);
            let _ = Footer::decode(&[&MAGIC[..], &[2, 0], &bytes].concat());
            let _ = Footer::decode(&[&MAGIC[..], &[2, 0], &bytes, &[200, 0, 0, 0], &[7; 8], TRAILER_MAGIC].concat());
        }
    }
}
