//! Internal functions for the fuzz targets in `fuzz/`. They exist only under `--cfg fuzzing`, which
//! fuzzers set.

#![allow(missing_docs)]

use crate::{
    segment::{
        Compression, Compressor, DecodedHeader, Decompressor, ScanVerdict, SegmentName, scan,
    },
    wire::DecodeError,
};

/// Scans the segment `bytes`, which begins with `header`, and checks that the report is consistent.
/// Returns the number of contiguous blocks and the offset of their end.
pub fn scan_segment(header: &DecodedHeader, bytes: &[u8]) -> (u32, u64) {
    let mut blocks = Vec::new();
    let read_at = |offset: u64, buf: &mut [u8]| {
        let rest =
            usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..)).unwrap_or_default();
        let len = rest.len().min(buf.len());
        buf[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    };
    let on_block = |block, _: &[u8]| {
        blocks.push(block);
        Ok::<_, std::convert::Infallible>(())
    };
    let Ok(report) =
        scan(header, bytes.len() as u64, read_at, on_block, Some(&mut |_, _| Ok(true)));
    let in_place = blocks.iter().take_while(|block| block.contiguous).count();
    assert_eq!(in_place, report.blocks as usize);
    assert!(blocks[in_place..].iter().all(|block| !block.contiguous), "{blocks:?}");
    assert!(
        blocks.is_sorted_by(|a, b| a.offset < b.offset && a.header.number < b.header.number),
        "{blocks:?}"
    );
    assert!(
        report.data_end <= bytes.len().max(header.body_start as usize) as u64
            && report.data_end >= report.end
    );
    for block in &blocks {
        assert_eq!(block.header.segment_tag, header.segment_tag());
        assert!(block.offset + block.header.block_len() <= report.data_end);
    }
    match report.verdict {
        ScanVerdict::Clean => assert!(report.end == report.data_end && blocks.len() == in_place),
        ScanVerdict::Incomplete => {
            assert!(report.end < report.data_end && blocks.len() == in_place)
        }
        ScanVerdict::TornTail { at } => assert!(at == report.end && report.mark <= at),
        ScanVerdict::Damaged { at, mark } => {
            assert!(at == report.end && mark == report.mark && at < mark)
        }
    }
    (report.blocks, report.end)
}

pub fn decompress(
    compression: Compression,
    stored: &[u8],
    raw_len: u32,
    out: &mut Vec<u8>,
) -> Result<(), DecodeError> {
    Decompressor::default().decompress(compression, stored, raw_len, out)
}

pub fn compress(compression: Compression, raw: &[u8], out: &mut Vec<u8>) -> Compression {
    Compressor::default().compress(compression, raw, out)
}

/// Parses a segment's file name and formats it again. `None` if `name` is not such a name.
pub fn segment_name(name: &str) -> Option<String> {
    SegmentName::parse(name).map(|parsed| parsed.to_string())
}
