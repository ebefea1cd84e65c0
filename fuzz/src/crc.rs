//! Corrects the CRC32s of damaged files, as an attacker who knows the format could. Otherwise the
//! fuzzer would rarely get past them.

use std::ops::Range;

use envelog::inspect::{BlockHeader, SegmentHeader};

const CRC_LEN: usize = 4;
const DOCUMENT_LEN_MIN: usize = 80 + 64 + CRC_LEN;
const BLOCK_SUFFIX_LEN: usize = 16 + CRC_LEN;
const TRAILER_LEN: usize = 16;

/// The offset of the CRC32 in a slot of `EPOCH`.
const EPOCH_CRC_AT: usize = 56;
const SECTOR: usize = 512;

/// Corrects every CRC32 in a file. The name determines the file's type.
pub(crate) fn fix(name: &str, bytes: &mut Vec<u8>) {
    if name.ends_with(".seg") {
        segment(bytes);
    } else if name.starts_with("audit-") {
        *bytes = audit(bytes);
    } else if name == "EPOCH" {
        for slot in [0, SECTOR] {
            put(bytes, slot, slot + EPOCH_CRC_AT);
        }
    } else if name.contains('-') {
        catalogue(bytes);
    } else {
        document(bytes);
    }
}

/// Corrects the CRC32s of the document, of both tips and of every record in a file of the
/// catalogue.
pub(crate) fn catalogue(bytes: &mut [u8]) {
    let layout = catalogue_layout(bytes);
    if let Some(document_of) = bytes.get_mut(layout.document.clone()) {
        document(document_of);
    }
    for part in layout.tips.into_iter().chain(layout.records) {
        put(bytes, part.start, part.end - CRC_LEN);
    }
}

/// The positions of the document, the tips and the records in a file of the catalogue, by its own
/// lengths. All are within the file.
pub(crate) struct CatalogueLayout {
    pub(crate) document: Range<usize>,
    /// Without the zeros behind their CRC32.
    pub(crate) tips: Vec<Range<usize>>,
    pub(crate) records: Vec<Range<usize>>,
}

pub(crate) fn catalogue_layout(bytes: &[u8]) -> CatalogueLayout {
    const TIP_LEN: usize = 92;
    const RECORD_FIXED_LEN: usize = 24;
    const RECORD_SUFFIX_LEN: usize = 32 + CRC_LEN;
    let u32_at = |at: usize| Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?) as usize);
    let document = 0..80 + u32_at(72).unwrap_or(0) + u32_at(76).unwrap_or(0) + 64 + CRC_LEN;
    let at = document.end.next_multiple_of(SECTOR);
    let tips = [at, at + SECTOR].map(|tip| tip..tip + TIP_LEN);
    let mut records = Vec::new();
    let mut at = at + 2 * SECTOR;
    while let Some(len) = u32_at(at + 4)
        && bytes.get(at..at + 4) == Some(b"ECHG")
        && at + RECORD_FIXED_LEN + len + RECORD_SUFFIX_LEN <= bytes.len()
    {
        let end = at + RECORD_FIXED_LEN + len + RECORD_SUFFIX_LEN;
        records.push(at..end);
        at = end;
    }
    let within = |part: &Range<usize>| part.end <= bytes.len();
    CatalogueLayout { tips: tips.into_iter().filter(within).collect(), document, records }
}

/// Corrects the CRC32 over all but the last four bytes of a document.
pub(crate) fn document(bytes: &mut [u8]) {
    if bytes.len() >= DOCUMENT_LEN_MIN {
        put(bytes, 0, bytes.len() - CRC_LEN);
    }
}

/// Corrects the CRC32 of a segment's header, for the length in the header.
pub(crate) fn header(bytes: &mut [u8]) {
    let claimed = bytes
        .get(12..16)
        .map_or(0, |len| u32::from_le_bytes([len[0], len[1], len[2], len[3]]) as usize);
    put(bytes, 0, claimed.saturating_add(32));
}

/// Corrects the CRC32 of each block from `at` on, and of the footer behind them.
pub(crate) fn body(bytes: &mut [u8], mut at: usize) {
    while let Some(Ok(header)) = bytes.get(at..).map(BlockHeader::decode) {
        let end = at + header.block_len() as usize;
        put(bytes, at, end - CRC_LEN);
        at = end;
    }
    if let Some(rest) = bytes.get_mut(at..) {
        footer(rest);
    }
}

/// Corrects the CRC32 of a footer in front of its trailer.
pub(crate) fn footer(bytes: &mut [u8]) {
    if let Some(covered) = bytes.len().checked_sub(TRAILER_LEN + CRC_LEN) {
        put(bytes, 0, covered);
    }
}

fn segment(bytes: &mut [u8]) {
    header(bytes);
    if let Ok(header) = SegmentHeader::decode(bytes) {
        body(bytes, header.body_start as usize);
    }
}

/// Corrects the CRC32 of the part before the last tab of each line, as text.
fn audit(bytes: &[u8]) -> Vec<u8> {
    let mut fixed = Vec::with_capacity(bytes.len());
    for line in bytes.split_inclusive(|&byte| byte == b'\n') {
        match line.iter().rposition(|&byte| byte == b'\t') {
            Some(tab) if line.ends_with(b"\n") => {
                fixed.extend_from_slice(&line[..tab]);
                fixed.extend_from_slice(
                    format!("\t{:08x}\n", crc32fast::hash(&line[..tab])).as_bytes(),
                );
            }
            _ => fixed.extend_from_slice(line),
        }
    }
    fixed
}

/// Writes the CRC32 of the bytes between `start` and `end` behind them, if there is room for it.
fn put(bytes: &mut [u8], start: usize, end: usize) {
    let Some(covered) = bytes.get(start..end) else { return };
    let crc = crc32fast::hash(covered).to_le_bytes();
    if let Some(place) = bytes.get_mut(end..end.saturating_add(CRC_LEN)) {
        place.copy_from_slice(&crc);
    }
}

/// The length of a block beyond its payload.
pub(crate) const BLOCK_OVERHEAD: usize = BlockHeader::LEN + BLOCK_SUFFIX_LEN;
