//! The decoders of segments and of log groups. They need nothing but bytes.

use std::sync::OnceLock;

use envelog::{
    Compression, LogGroup, fuzzing, group,
    group::GroupError,
    inspect::{BLOCK_RAW_BYTES_MAX, BlockHeader, DecodedHeader, Footer, SegmentHeader},
};
use prost::Message;

use crate::{crc, golden::golden};

/// Decodes a segment's header, unchanged and with a corrected CRC32.
pub fn segment_header(data: &[u8]) {
    let mut bytes = data.to_vec();
    for fixed in [false, true] {
        if fixed {
            crc::header(&mut bytes);
        }
        match SegmentHeader::decode(&bytes) {
            Err(error) => drop(error.to_string()),
            Ok(decoded) => {
                let again = SegmentHeader::finish(decoded.header.encode(), &decoded.commitment);
                assert_eq!(again.len() as u64, decoded.body_start);
                assert!(bytes.starts_with(&again), "{decoded:?}");
                assert_eq!(decoded.header_hash, decoded.header.hash(&decoded.header.encode()));
            }
        }
    }
    let name = String::from_utf8_lossy(data);
    if let Some(again) = fuzzing::segment_name(&name) {
        assert_eq!(again, name);
    }
}

pub fn block(data: &[u8]) {
    match BlockHeader::decode(data) {
        Err(error) => drop(error.to_string()),
        Ok(header) => {
            assert_eq!(header.encode()[..], data[..BlockHeader::LEN]);
            assert_eq!(header.check(), Ok(()));
            assert_eq!(
                header.block_len(),
                crc::BLOCK_OVERHEAD as u64 + u64::from(header.payload_len)
            );
            assert!(header.end_seq() >= header.first_seq);
            assert_eq!(header.nonce()[..4], header.number.to_be_bytes());
        }
    }
}

/// Decodes a footer, unchanged and with corrected lengths, tags and CRC32.
pub fn footer(data: &[u8]) {
    let mut bytes = data.to_vec();
    for fixed in [false, true] {
        if fixed && let Some(trailer) = bytes.len().checked_sub(16).filter(|_| bytes.len() > 16) {
            let len = (bytes.len() as u32).to_le_bytes();
            bytes[trailer..trailer + 4].copy_from_slice(&len);
            bytes.copy_within(8..16, trailer + 4);
            bytes[trailer + 12..].copy_from_slice(b"SEAL");
            crc::footer(&mut bytes);
        }
        match Footer::decode(&bytes) {
            Err(error) => drop(error.to_string()),
            Ok(decoded) => {
                let footer = decoded.footer;
                assert_eq!(footer.encode().len(), footer.authenticated_len());
                assert_eq!(footer.finish(footer.encode(), &decoded.tag), bytes);
                for entry in &footer.index {
                    assert_eq!(footer.seek_seq(entry.first_seq), Some(entry));
                    let by_time = footer.seek_time(entry.first_time_us).expect("there is an index");
                    assert!(by_time.block <= entry.block);
                }
                for place in [0, u64::MAX] {
                    assert_eq!(footer.seek_seq(place).is_some(), !footer.index.is_empty());
                    assert_eq!(footer.seek_time(place).is_some(), !footer.index.is_empty());
                }
            }
        }
    }
}

/// The header that [`scan`] puts in front of its bytes, encoded and decoded.
pub fn scanned_header() -> (&'static [u8], &'static DecodedHeader) {
    static HEADER: OnceLock<(Vec<u8>, DecodedHeader)> = OnceLock::new();
    let (bytes, decoded) = HEADER.get_or_init(|| {
        let file = golden("unclean").first_segment();
        let decoded = SegmentHeader::decode(&file).expect("the header of a golden segment");
        (file[..decoded.body_start as usize].to_vec(), decoded)
    });
    (bytes, decoded)
}

/// Scans blocks behind the header of a golden segment, with given and with corrected CRC32s.
pub fn scan(data: &[u8]) {
    let (header_bytes, header) = scanned_header();
    let mut bytes = header_bytes.to_vec();
    bytes.extend_from_slice(data);
    let (before, _) = fuzzing::scan_segment(header, &bytes);
    crc::body(&mut bytes, header.body_start as usize);
    let (after, end) = fuzzing::scan_segment(header, &bytes);
    assert!(after >= before, "{after} blocks with their CRC32s made right, {before} without");
    // The scan finds the same blocks again if the file ends behind them.
    assert_eq!(fuzzing::scan_segment(header, &bytes[..end as usize]), (after, end));
}

/// Decompresses and compresses.
pub fn compression(data: &[u8]) {
    let Some((&[method, len @ ..], rest)) = data.split_first_chunk::<4>() else { return };
    let method = match method % 3 {
        0 => Compression::Lz4,
        1 => Compression::Zstd,
        _ => Compression::None,
    };
    let raw_len = u32::from_le_bytes([len[0], len[1], len[2], 0]);
    let mut out = b"what was there before".to_vec();
    if fuzzing::decompress(method, rest, raw_len, &mut out).is_ok() {
        assert_eq!(out.len(), raw_len as usize);
    }
    assert!(fuzzing::decompress(method, rest, BLOCK_RAW_BYTES_MAX + 1, &mut out).is_err());
    let mut stored = b"in front".to_vec();
    let used = fuzzing::compress(method, rest, &mut stored);
    let stored = stored.strip_prefix(b"in front").expect("compressing appends");
    fuzzing::decompress(used, stored, rest.len() as u32, &mut out).expect("what was compressed");
    assert_eq!(out, rest);
}

/// Compares the decoding of log groups with prost, and checks the lists that hold them.
pub fn group(data: &[u8]) {
    let by_prost = <LogGroup as Message>::decode(data).ok();
    let valid = group::validate_group(data);
    let decoded = LogGroup::decode(data);
    assert_eq!(valid.as_ref().err(), decoded.as_ref().err());
    assert_eq!(decoded, LogGroup::decode_shared(data.to_vec().into()));
    match (&valid, decoded) {
        (Ok(summary), Ok(group)) => {
            assert_eq!(by_prost.as_ref(), Some(&group));
            assert_eq!(summary.logs as usize, group.logs.len());
            assert_eq!(LogGroup::decode(&group.encode_to_bytes()), Ok(group));
        }
        (Err(error), _) => {
            drop(error.to_string());
            let stricter = matches!(
                error,
                GroupError::Malformed {
                    what: "log without its time" | "pair without its key or value",
                    ..
                } | GroupError::Empty
                    | GroupError::NoLogs
                    | GroupError::TooLarge { .. }
            );
            assert!(
                stricter || by_prost.is_none(),
                "prost accepts it, and the engine says: {error}"
            );
        }
        (Ok(_), Err(_)) => unreachable!("compared above"),
    }
    let mut list = Vec::new();
    for frame in group::frames(data).map_while(Result::ok) {
        group::put_frame(&mut list, &data[frame]);
    }
    let again: Vec<_> = group::frames(&list).map(|frame| frame.expect("put just now")).collect();
    assert_eq!(again.last().map_or(0, |frame| frame.end), list.len());
}
