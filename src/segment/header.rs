//! The segment header.

use bytes::BufMut;

use super::{EXTENSIONS_BYTES_MAX, Footer, HASH_LEN, segment_tag};
use crate::{
    crypto::{self, HashAlg, Suite},
    ids::{LogstoreId, SegmentId, StoreId},
    wire::{CRC_LEN, Cursor, DecodeError, Features, put_crc, require, strip_crc},
};

const MAGIC: &[u8; 8] = b"ENVLSEG\0";
const VERSION: u16 = 2;
const FIXED_LEN: u32 = 272;
const COMMITMENT_LEN: usize = 32;
/// The bytes behind the hashed part: commitment and CRC32.
const SUFFIX_LEN: usize = COMMITMENT_LEN + CRC_LEN;
const CRITICAL: u16 = 1;

/// The header of a segment. All of it is hashed into the segment's key, so every block
/// authenticates it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    /// The cipher suite that seals its blocks.
    pub suite: Suite,
    /// Its feature bits.
    pub features: Features,
    /// The shard that it belongs to.
    pub shard: u32,
    /// The store that it belongs to.
    pub store: StoreId,
    /// The Logstore that it belongs to.
    pub logstore: LogstoreId,
    /// Its own identifier.
    pub segment: SegmentId,
    /// The generation of the Logstore's metadata when the writer created the segment.
    pub generation: u64,
    /// Its position within the shard: from 1, without gaps.
    pub ordinal: u64,
    /// The first sequence number that it may use.
    pub first_seq: u64,
    /// The first sequence number that it may not use.
    pub limit_seq: u64,
    /// The creation time, in microseconds since the Unix epoch.
    pub created_us: u64,
    /// The key from which the segment's key is derived.
    pub key_source: KeySource,
    /// The salt for the derivation of its key. No two segments have the same salt.
    pub salt: [u8; 32],
    /// The segment before it.
    pub predecessor: Predecessor,
    /// The hash algorithm for its stored payloads and for the digest over them.
    pub payload_hash: HashAlg,
    /// How often receive times have gone back in the shard, up to the beginning of this segment.
    pub setbacks: u32,
    /// The epoch of the writer that created the segment.
    pub epoch: u64,
    /// The latest receive time of all groups in front of this segment, in microseconds since the
    /// Unix epoch, if `setbacks` is above 0; else 0. See [`SegmentHeader::latest_before_us`].
    pub latest_us: u64,
    /// Optional parts, at most [`EXTENSIONS_BYTES_MAX`] bytes in total.
    pub extensions: Vec<Extension>,
}

/// The key from which a segment's key is derived.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum KeySource {
    /// This version of the Logstore's data key.
    DataKey(u32),
    /// This version of the store's service keyring.
    Keyring(u32),
}

/// The segment before this one. This header authenticates its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Predecessor {
    /// There is no predecessor: this is the first segment of its shard.
    None,
    /// The predecessor was sealed.
    Sealed(PredecessorEnd),
    /// A crash cut the predecessor off. The bytes behind its kept part are not part of the log.
    Cut(PredecessorEnd),
}

/// The end of a predecessor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PredecessorEnd {
    /// Its ordinal.
    pub ordinal: u64,
    /// Its identifier.
    pub segment: SegmentId,
    /// The number of its blocks that are kept, marks included.
    pub blocks: u32,
    /// For a sealed predecessor, the length of its file in bytes. For a cut one, the offset at
    /// which its kept part ends.
    pub bytes: u64,
    /// One past the last sequence number that it keeps. Its first sequence number if it keeps none.
    pub end_seq: u64,
    /// The digest over its header and kept blocks.
    pub digest: [u8; 32],
    /// The receive time of the last group that it keeps, in microseconds since the Unix epoch. If
    /// it keeps no group, the value that its own header records for the segment before it, or 0 if
    /// there was no segment before it.
    pub last_time_us: u64,
}

/// An optional part of a header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// The type: [`Extension::DICTIONARY`], [`Extension::PADDING`], [`Extension::REPLACES`] or a
    /// newer one.
    pub kind: u16,
    /// Whether a build that does not know the type must refuse the segment.
    pub critical: bool,
    /// Its contents.
    pub data: Vec<u8>,
}

impl Extension {
    /// The identifier of a compression dictionary. Reserved: this build does not support it.
    pub const DICTIONARY: u16 = 1;
    /// Padding. Readers ignore it.
    pub const PADDING: u16 = 2;
    /// The segments that a compacted segment replaces. Reserved: this build does not support it.
    pub const REPLACES: u16 = 3;

    /// The encoded length in bytes: kind, flags, length and contents.
    fn encoded_len(&self) -> usize {
        8 + self.data.len()
    }
}

/// A decoded header, with the values that belong to its encoded form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DecodedHeader {
    /// The header.
    pub header: SegmentHeader,
    /// The hash over the hashed part of the encoded header, by the suite's algorithm.
    pub header_hash: [u8; 32],
    /// The commitment to the segment's key. The header is trustworthy only if the key reproduces
    /// the commitment.
    pub commitment: [u8; 32],
    /// The offset in bytes of the first block.
    pub body_start: u64,
}

impl std::ops::Deref for DecodedHeader {
    type Target = SegmentHeader;

    fn deref(&self) -> &SegmentHeader {
        &self.header
    }
}

impl DecodedHeader {
    /// The tag by which blocks and footer name this segment.
    #[must_use]
    pub fn segment_tag(&self) -> [u8; 8] {
        segment_tag(&self.header_hash)
    }
}

impl SegmentHeader {
    /// How many bytes a first read should fetch: enough for a header without long extensions.
    pub(crate) const READ_HINT: usize = 4096;
    /// The longest encoded header in bytes.
    pub(crate) const LEN_MAX: usize =
        FIXED_LEN as usize + EXTENSIONS_BYTES_MAX as usize + SUFFIX_LEN;

    /// Encodes the hashed part: everything but the commitment and the CRC32.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let extensions: usize = self.extensions.iter().map(Extension::encoded_len).sum();
        debug_assert!(extensions <= EXTENSIONS_BYTES_MAX as usize);
        let mut out = Vec::with_capacity(FIXED_LEN as usize + extensions + SUFFIX_LEN);
        out.put_slice(MAGIC);
        out.put_u16_le(VERSION);
        out.put_u16_le(self.suite.code());
        out.put_u32_le(FIXED_LEN + extensions as u32);
        self.features.encode(&mut out);
        out.put_u32_le(self.shard);
        out.put_slice(self.store.as_bytes());
        out.put_slice(self.logstore.as_bytes());
        out.put_slice(self.segment.as_bytes());
        out.put_u64_le(self.generation);
        out.put_u64_le(self.ordinal);
        out.put_u64_le(self.first_seq);
        out.put_u64_le(self.limit_seq);
        out.put_u64_le(self.created_us);
        let (source, version) = match self.key_source {
            KeySource::DataKey(version) => (0, version),
            KeySource::Keyring(version) => (1, version),
        };
        out.put_u32_le(source);
        out.put_u32_le(version);
        out.put_slice(&self.salt);
        let none = PredecessorEnd {
            ordinal: 0,
            segment: SegmentId::from_bytes([0; 16]),
            blocks: 0,
            bytes: 0,
            end_seq: 0,
            digest: [0; 32],
            last_time_us: 0,
        };
        let (kind, end) = match &self.predecessor {
            Predecessor::None => (0, &none),
            Predecessor::Sealed(end) => (1, end),
            Predecessor::Cut(end) => (2, end),
        };
        out.put_u32_le(kind);
        out.put_u32_le(end.blocks);
        out.put_u64_le(end.bytes);
        out.put_u64_le(end.end_seq);
        out.put_slice(end.segment.as_bytes());
        out.put_slice(&end.digest);
        out.put_u64_le(end.ordinal);
        out.put_u64_le(end.last_time_us);
        out.put_u16_le(self.payload_hash.code());
        out.put_bytes(0, 2);
        out.put_u32_le(self.setbacks);
        out.put_u64_le(self.epoch);
        out.put_u64_le(self.latest_us);
        for extension in &self.extensions {
            out.put_u16_le(extension.kind);
            out.put_u16_le(if extension.critical { CRITICAL } else { 0 });
            out.put_u32_le(extension.data.len() as u32);
            out.put_slice(&extension.data);
        }
        out
    }

    /// The receive time of the last group up to some point of the segment, in microseconds since
    /// the Unix epoch. 0 if there is none. `footer` summarizes the blocks up to that point.
    #[must_use]
    pub fn last_time_us(&self, footer: &Footer) -> u64 {
        if footer.group_count > 0 { footer.last_time_us } else { self.last_before_us() }
    }

    /// The receive time of the last group before this segment, in microseconds since the Unix
    /// epoch; 0 if there is none.
    #[must_use]
    pub fn last_before_us(&self) -> u64 {
        match &self.predecessor {
            Predecessor::None => 0,
            Predecessor::Sealed(end) | Predecessor::Cut(end) => end.last_time_us,
        }
    }

    /// The latest receive time of all groups before this segment, in microseconds since the Unix
    /// epoch; 0 if there is none. It never decreases along a shard.
    #[must_use]
    pub fn latest_before_us(&self) -> u64 {
        if self.setbacks == 0 { self.last_before_us() } else { self.latest_us }
    }

    /// Whether receive times go back at the beginning of this segment: the clock was corrected, and
    /// groups in it may have earlier times than the groups before it.
    #[must_use]
    pub fn is_setback(&self) -> bool {
        self.created_us < self.last_before_us()
    }

    /// The hash of the bytes that [`SegmentHeader::encode`] returned.
    #[must_use]
    pub fn hash(&self, encoded: &[u8]) -> [u8; HASH_LEN] {
        crypto::hash(self.suite.hash(), &[encoded])
    }

    /// Completes the bytes that [`SegmentHeader::encode`] returned. Blocks follow directly behind.
    #[must_use]
    pub fn finish(mut encoded: Vec<u8>, commitment: &[u8; COMMITMENT_LEN]) -> Vec<u8> {
        encoded.put_slice(commitment);
        put_crc(&mut encoded, 0);
        encoded
    }

    /// Decodes the header at the beginning of `bytes`. More bytes may follow it.
    ///
    /// # Errors
    /// [`DecodeError::Short`] gives the number of bytes that are needed. The caller reads that many
    /// and tries again, unless the file has no more.
    pub fn decode(bytes: &[u8]) -> Result<DecodedHeader, DecodeError> {
        let mut cursor = Cursor::new(bytes);
        cursor.magic(MAGIC)?;
        cursor.version(VERSION)?;
        let suite = cursor.u16()?;
        let hashed_len = cursor.u32()?;
        let extensions_len =
            hashed_len.checked_sub(FIXED_LEN).ok_or(DecodeError::Field("header length"))?;
        require(extensions_len <= EXTENSIONS_BYTES_MAX, "header length")?;
        let hashed_len = hashed_len as usize;
        let covered = strip_crc(Cursor::new(bytes).bytes(hashed_len + SUFFIX_LEN)?)?;

        let features = Features::decode(&mut cursor)?;
        features.check(0)?;
        let suite = Suite::from_code(suite)
            .ok_or_else(|| DecodeError::Feature(format!("cipher suite {suite}")))?;
        let header = Self {
            suite,
            features,
            shard: cursor.u32()?,
            store: StoreId::from_bytes(cursor.array()?),
            logstore: LogstoreId::from_bytes(cursor.array()?),
            segment: SegmentId::from_bytes(cursor.array()?),
            generation: cursor.u64()?,
            ordinal: cursor.u64()?,
            first_seq: cursor.u64()?,
            limit_seq: cursor.u64()?,
            created_us: cursor.u64()?,
            key_source: match (cursor.u32()?, cursor.u32()?) {
                (0, version) => KeySource::DataKey(version),
                (1, version) => KeySource::Keyring(version),
                _ => return Err(DecodeError::Field("key source")),
            },
            salt: cursor.array()?,
            predecessor: decode_predecessor(&mut cursor)?,
            payload_hash: {
                let code = cursor.u16()?;
                HashAlg::from_code(code)
                    .ok_or_else(|| DecodeError::Feature(format!("payload hash {code}")))?
            },
            setbacks: {
                cursor.zeros(2, "reserved bytes of the header")?;
                cursor.u32()?
            },
            epoch: cursor.u64()?,
            latest_us: cursor.u64()?,
            extensions: decode_extensions(cursor.bytes(extensions_len as usize)?)?,
        };
        require(header.setbacks > 0 || header.latest_us == 0, "latest receive time")?;
        require(header.first_seq <= header.limit_seq, "limit of the sequence numbers")?;
        Ok(DecodedHeader {
            header_hash: header.hash(Cursor::new(covered).bytes(hashed_len)?),
            commitment: cursor.array()?,
            body_start: (hashed_len + SUFFIX_LEN) as u64,
            header,
        })
    }
}

fn decode_predecessor(cursor: &mut Cursor<'_>) -> Result<Predecessor, DecodeError> {
    let kind = cursor.u32()?;
    let bytes = cursor.bytes(84)?;
    let mut cursor = Cursor::new(bytes);
    let end = PredecessorEnd {
        blocks: cursor.u32()?,
        bytes: cursor.u64()?,
        end_seq: cursor.u64()?,
        segment: SegmentId::from_bytes(cursor.array()?),
        digest: cursor.array()?,
        ordinal: cursor.u64()?,
        last_time_us: cursor.u64()?,
    };
    match kind {
        0 if bytes.iter().all(|&byte| byte == 0) => Ok(Predecessor::None),
        1 => Ok(Predecessor::Sealed(end)),
        2 => Ok(Predecessor::Cut(end)),
        _ => Err(DecodeError::Field("predecessor")),
    }
}

fn decode_extensions(bytes: &[u8]) -> Result<Vec<Extension>, DecodeError> {
    let field = |_| DecodeError::Field("header extension");
    let mut cursor = Cursor::new(bytes);
    let mut extensions = Vec::new();
    while !cursor.is_empty() {
        let kind = cursor.u16().map_err(field)?;
        let flags = cursor.u16().map_err(field)?;
        let len = cursor.u32().map_err(field)?;
        let data = cursor.bytes(len as usize).map_err(field)?.to_vec();
        require(flags & !CRITICAL == 0, "header extension")?;
        let critical = flags == CRITICAL;
        if critical && kind != Extension::PADDING {
            return Err(DecodeError::Feature(format!("critical header extension {kind}")));
        }
        extensions.push(Extension { kind, critical, data });
    }
    Ok(extensions)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;
    use crate::{
        ids::{hex_decode, hex_encode},
        segment::{FooterBuilder, tests::damage_each},
    };

    const COMMITMENT: [u8; 32] = [0xcc; 32];

    fn sample() -> SegmentHeader {
        SegmentHeader {
            suite: Suite::Aes256Gcm,
            features: Features { compatible: 1, read_only_compatible: 2, incompatible: 0 },
            shard: 3,
            store: StoreId::from_bytes([0x11; 16]),
            logstore: LogstoreId::from_bytes([0x22; 16]),
            segment: SegmentId::from_bytes([0x33; 16]),
            generation: 4,
            ordinal: 5,
            first_seq: 6,
            limit_seq: 1000,
            created_us: 1_700_000_000_000_000,
            key_source: KeySource::DataKey(7),
            salt: [0x44; 32],
            predecessor: Predecessor::Cut(PredecessorEnd {
                ordinal: 4,
                segment: SegmentId::from_bytes([0x55; 16]),
                blocks: 8,
                bytes: 4096,
                end_seq: 6,
                digest: [0x66; 32],
                last_time_us: 1_699_999_999_999_999,
            }),
            payload_hash: HashAlg::Sm3,
            setbacks: 0,
            epoch: 11,
            latest_us: 0,
            extensions: vec![Extension {
                kind: Extension::PADDING,
                critical: true,
                data: vec![0; 3],
            }],
        }
    }

    fn encoded(header: &SegmentHeader) -> Vec<u8> {
        SegmentHeader::finish(header.encode(), &COMMITMENT)
    }

    /// Changes bytes of an encoded header and corrects the CRC32.
    fn altered(
        header: &SegmentHeader,
        at: usize,
        with: &[u8],
    ) -> Result<DecodedHeader, DecodeError> {
        let mut bytes = header.encode();
        bytes[at..at + with.len()].copy_from_slice(with);
        SegmentHeader::decode(&SegmentHeader::finish(bytes, &COMMITMENT))
    }

    #[test]
    fn golden() {
        let golden = concat!(
            "454e564c53454700020001001b0100000100000002000000000000000300000011111111111111111111111111111111",
            "222222222222222222222222222222223333333333333333333333333333333304000000000000000500000000000000",
            "0600000000000000e80300000000000000401e18240a0600000000000700000044444444444444444444444444444444",
            "444444444444444444444444444444440200000008000000001000000000000006000000000000005555555555555555",
            "555555555555555566666666666666666666666666666666666666666666666666666666666666660400000000000000",
            "ff3f1e18240a060002000000000000000b0000000000000000000000000000000200010003000000000000cccccccccc",
            "ccccccccccccccccccccccccccccccccccccccccccccccccccccccdee52a8e",
        );
        let bytes = encoded(&sample());
        assert_eq!(hex_encode(&bytes), golden);
        let decoded = SegmentHeader::decode(&hex_decode(golden).unwrap()).unwrap();
        assert_eq!(decoded.header, sample());
        assert_eq!(decoded.commitment, COMMITMENT);
        assert_eq!(decoded.body_start, bytes.len() as u64);
        assert_eq!(
            decoded.header_hash,
            crypto::hash(crate::crypto::HashAlg::Sha256, &[&bytes[..272 + 11]])
        );
        assert_eq!(decoded.segment_tag()[..], decoded.header_hash[..8]);
        assert_eq!(decoded.header.features.unknown_read_only(), 2);
    }

    #[test]
    fn the_suite_chooses_the_hash() {
        let header = SegmentHeader { suite: Suite::Sm4Gmac, ..sample() };
        let decoded = SegmentHeader::decode(&encoded(&header)).unwrap();
        assert_eq!(
            decoded.header_hash,
            crypto::hash(crate::crypto::HashAlg::Sm3, &[&header.encode()])
        );
    }

    #[test]
    fn the_last_receive_time_is_that_of_the_last_group() {
        let header = sample();
        let builder = FooterBuilder::of(&SegmentHeader::decode(&encoded(&header)).unwrap());
        let none = builder.so_far().clone();
        assert_eq!(header.last_time_us(&none), 1_699_999_999_999_999);
        assert_eq!(
            header.last_time_us(&Footer { group_count: 1, last_time_us: 5, ..none.clone() }),
            5
        );
        assert_eq!(
            SegmentHeader { predecessor: Predecessor::None, ..header }.last_time_us(&none),
            0
        );
    }

    #[test]
    fn damage_is_refused() {
        damage_each(&encoded(&sample()), |bytes, how| {
            let error = SegmentHeader::decode(bytes).expect_err(&how);
            assert!(!matches!(error, DecodeError::Feature(_)), "{how}: {error}");
        });
    }

    #[test]
    fn short_says_how_much_to_read() {
        let mut header = sample();
        header.extensions[0].data = vec![0; EXTENSIONS_BYTES_MAX as usize - 8];
        let bytes = encoded(&header);
        assert_eq!(bytes.len(), SegmentHeader::LEN_MAX);
        let short = SegmentHeader::decode(&bytes[..SegmentHeader::READ_HINT]).unwrap_err();
        assert_eq!(short, DecodeError::Short { needed: bytes.len() as u64, have: 4096 });
        assert_eq!(SegmentHeader::decode(&bytes).unwrap().header, header);
    }

    #[test]
    fn what_is_not_known_is_refused() {
        let refused = |at, with: &[u8]| altered(&sample(), at, with).unwrap_err();
        assert_eq!(refused(8, &[3, 0]), DecodeError::NewerVersion(3));
        assert_eq!(refused(8, &[0, 0]), DecodeError::Field("version"));
        assert_eq!(refused(10, &[9, 0]), DecodeError::Feature("cipher suite 9".to_owned()));
        assert_eq!(
            refused(24, &[4]),
            DecodeError::Feature("incompatible feature bits 0x4".to_owned())
        );
        assert_eq!(refused(120, &[2]), DecodeError::Field("key source"));
        assert_eq!(refused(160, &[0]), DecodeError::Field("predecessor"));
        assert_eq!(refused(160, &[3]), DecodeError::Field("predecessor"));
        for at in [250, 251] {
            assert_eq!(refused(at, &[1]), DecodeError::Field("reserved bytes of the header"));
        }
        for code in [0, 3] {
            assert_eq!(refused(248, &[code]), DecodeError::Feature(format!("payload hash {code}")));
        }
        let first = SegmentHeader { predecessor: Predecessor::None, ..sample() };
        assert_eq!(altered(&first, 240, &[1]), Err(DecodeError::Field("predecessor")));
        assert_eq!(refused(96, &[0xff, 0xff]), DecodeError::Field("limit of the sequence numbers"));
        assert_eq!(
            refused(272, &[9]),
            DecodeError::Feature("critical header extension 9".to_owned())
        );
        assert_eq!(
            refused(272, &[1]),
            DecodeError::Feature("critical header extension 1".to_owned())
        );
        assert_eq!(refused(274, &[2]), DecodeError::Field("header extension"));
        assert_eq!(refused(276, &[4]), DecodeError::Field("header extension"));
        let optional = altered(&sample(), 272, &[9, 0, 0, 0]).unwrap();
        assert_eq!(
            optional.header.extensions,
            [Extension { kind: 9, critical: false, data: vec![0; 3] }]
        );
    }

    prop_compose! {
        fn header()(
            suite in 1u16..=4,
            (compatible, read_only_compatible, shard) in any::<(u32, u32, u32)>(),
            ids in any::<[[u8; 16]; 3]>(),
            (generation, ordinal, created_us) in any::<(u64, u64, u64)>(),
            seqs in any::<(u64, u64)>(),
            (keyring, version, salt) in any::<(bool, u32, [u8; 32])>(),
            predecessor in 0..3usize,
            (end, last_time_us, sm3, epoch) in any::<((u64, [u8; 16], u32, u64, u64, [u8; 32]), u64, bool, u64)>(),
            (setbacks, latest_us) in (0..4u32, any::<u64>()),
            extensions in prop::collection::vec((any::<u16>(), prop::collection::vec(any::<u8>(), 0..50)), 0..4),
        ) -> SegmentHeader {
            let (ordinal_before, segment, blocks, bytes, end_seq, digest) = end;
            let segment = SegmentId::from_bytes(segment);
            let end = PredecessorEnd { ordinal: ordinal_before, segment, blocks, bytes, end_seq, digest, last_time_us };
            SegmentHeader {
                suite: Suite::from_code(suite).unwrap(),
                features: Features { compatible, read_only_compatible, incompatible: 0 },
                shard,
                store: StoreId::from_bytes(ids[0]),
                logstore: LogstoreId::from_bytes(ids[1]),
                segment: SegmentId::from_bytes(ids[2]),
                generation,
                ordinal,
                first_seq: seqs.0.min(seqs.1),
                limit_seq: seqs.0.max(seqs.1),
                created_us,
                key_source: if keyring { KeySource::Keyring(version) } else { KeySource::DataKey(version) },
                salt,
                predecessor: [Predecessor::None, Predecessor::Sealed(end), Predecessor::Cut(end)][predecessor],
                payload_hash: if sm3 { HashAlg::Sm3 } else { HashAlg::Sha256 },
                setbacks,
                epoch,
                latest_us: if setbacks == 0 { 0 } else { latest_us },
                extensions: extensions.into_iter().map(|(kind, data)| Extension { kind, critical: false, data }).collect(),
            }
        }
    }

    proptest! {
        #[test]
        fn round_trip(header in header(), commitment: [u8; 32], behind: Vec<u8>) {
            let hash = header.hash(&header.encode());
            let mut bytes = SegmentHeader::finish(header.encode(), &commitment);
            let body_start = bytes.len() as u64;
            bytes.extend_from_slice(&behind);
            let expected = DecodedHeader { header, header_hash: hash, commitment, body_start };
            prop_assert_eq!(SegmentHeader::decode(&bytes), Ok(expected));
        }

        #[test]
        fn decoding_is_canonical(header in header(), at in 8..300usize, with: [u8; 4]) {
            let mut bytes = header.encode();
            let at = at.min(bytes.len() - 4);
            bytes[at..at + 4].copy_from_slice(&with);
            let bytes = SegmentHeader::finish(bytes, &COMMITMENT);
            if let Ok(decoded) = SegmentHeader::decode(&bytes) {
                prop_assert_eq!(encoded(&decoded.header), bytes);
            }
        }

        #[test]
        fn arbitrary_bytes_do_not_panic(bytes: Vec<u8>) {
            let _ = SegmentHeader::decode(&bytes);
            let _ = SegmentHeader::decode(&[&MAGIC[..], &bytes].concat());
        }
    }
}
