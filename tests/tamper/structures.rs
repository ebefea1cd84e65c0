//! The parts of a store's files, and the CRC that covers each part.

use std::{ops::Range, path::Path};

use envelog::inspect::{BlockHeader, SegmentHeader};

use crate::common::catalogue::{
    Layout, RECORD_HEAD_LEN, RECORD_SUFFIX_LEN, is_catalogue_file, is_meta,
};

/// The kind of a file, derived from its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum FileKind {
    Store,
    Catalogue,
    Meta,
    Probe,
    Keyring,
    Audit,
    Segment,
    Lock,
    Epoch,
}

impl FileKind {
    pub(crate) fn of(path: &Path) -> Self {
        let name = path.file_name().unwrap().to_str().unwrap();
        match name {
            "STORE" => Self::Store,
            _ if is_catalogue_file(path) => Self::Catalogue,
            _ if is_meta(path) => Self::Meta,
            "keyring" => Self::Keyring,
            "LOCK" => Self::Lock,
            "EPOCH" => Self::Epoch,
            _ if path.parent().unwrap().ends_with("probes") => Self::Probe,
            _ if name.starts_with("audit-") && name.ends_with(".log") => Self::Audit,
            _ if name.ends_with(".seg") => Self::Segment,
            _ => panic!("a file that no test knows: {}", path.display()),
        }
    }
}

/// A part of a file.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub(crate) name: &'static str,
    pub(crate) bytes: Range<usize>,
    /// The bytes that the part's CRC covers; the CRC follows directly after them. `None` for a CRC
    /// itself, and for bytes without a CRC.
    pub(crate) covered: Option<Range<usize>>,
    /// Whether its loss does not harm the store.
    pub(crate) may_be_lost: bool,
}

impl Part {
    fn new(name: &'static str, bytes: Range<usize>, covered: Option<Range<usize>>) -> Self {
        Self { name, bytes, covered, may_be_lost: false }
    }

    fn that_may_be_lost(self) -> Self {
        Self { may_be_lost: true, ..self }
    }
}

/// The parts of a file, in order and without gaps.
pub(crate) fn parts(kind: FileKind, bytes: &[u8]) -> Vec<Part> {
    let parts = match kind {
        FileKind::Segment => segment(bytes),
        FileKind::Audit => audit(bytes),
        FileKind::Lock => vec![Part::new("process", 0..bytes.len(), None).that_may_be_lost()],
        // The next writer recreates it. It only contains the epoch, which the catalogue knows too.
        FileKind::Epoch => vec![Part::new("epoch", 0..bytes.len(), None).that_may_be_lost()],
        FileKind::Catalogue => catalogue(bytes),
        _ => document(bytes),
    };
    let end = parts.iter().fold(0, |at, part| {
        assert_eq!(part.bytes.start, at, "{kind:?}: {}", part.name);
        part.bytes.end
    });
    assert_eq!(end, bytes.len(), "{kind:?}");
    parts
}

/// Recomputes the CRC of a part after a change in it.
pub(crate) fn fix_crc(kind: FileKind, part: &Part, bytes: &mut [u8]) {
    let covered = part.covered.clone().expect("a part under a CRC");
    let crc = crc32fast::hash(&bytes[covered.clone()]);
    if kind == FileKind::Audit {
        // The CRC of a line is text after a tab.
        bytes[covered.end + 1..covered.end + 9].copy_from_slice(format!("{crc:08x}").as_bytes());
    } else {
        bytes[covered.end..covered.end + 4].copy_from_slice(&crc.to_le_bytes());
    }
}

/// Adds parts of these lengths from `start` on, all under one CRC, which is the last part.
fn under_crc(parts: &mut Vec<Part>, start: usize, lens: &[(&'static str, usize)]) {
    let end = start + lens.iter().map(|(_, len)| len).sum::<usize>();
    let mut at = start;
    for &(name, len) in lens {
        parts.push(Part::new(name, at..at + len, Some(start..end)));
        at += len;
    }
    parts.push(Part::new("crc", end..end + 4, None));
}

fn u32_at(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
}

fn document(bytes: &[u8]) -> Vec<Part> {
    let mut parts = Vec::new();
    let fields = [
        ("magic", 8),
        ("version", 2),
        ("kind", 2),
        ("features", 8),
        ("incompatible features", 4),
        ("store", 16),
        ("subject", 16),
        ("generation", 8),
        ("keyring version", 4),
        ("reserved", 4),
        ("lengths", 8),
        ("part A", u32_at(bytes, 72)),
        ("part B", u32_at(bytes, 76)),
        ("tag A", 32),
        ("tag B", 32),
    ];
    under_crc(&mut parts, 0, &fields);
    parts
}

/// The snapshot, the tips, and the records after them.
fn catalogue(bytes: &[u8]) -> Vec<Part> {
    let layout = Layout::of(bytes);
    let mut parts = document(&bytes[layout.document.clone()]);
    parts.push(Part::new("padding", layout.document.end..layout.tips[0].start, None));
    let number = |tip: &Range<usize>| {
        u64::from_le_bytes(bytes[tip.start + 16..tip.start + 24].try_into().unwrap())
    };
    let [first, second] = layout.tips.each_ref().map(number);
    for (tip, is_newest) in layout.tips.iter().zip([first > second, first < second]) {
        let fields = [
            ("tip magic", 4),
            ("tip slot", 4),
            ("tip keyring version", 4),
            ("tip reserved", 4),
            ("tip number", 8),
            ("tip names", 32),
            ("tip tag", 32),
        ];
        let mut of_tip = Vec::new();
        under_crc(&mut of_tip, tip.start, &fields);
        of_tip.last_mut().unwrap().name = "tip crc";
        of_tip.push(Part::new("tip padding", tip.start + 92..tip.end, None));
        // A tip is written after the sync of the record that it names, so a crash may tear it.
        of_tip.iter_mut().for_each(|part| part.may_be_lost = is_newest);
        parts.extend(of_tip);
    }
    for record in layout.records {
        let fields = [
            ("change magic", 4),
            ("change length", 4),
            ("change number", 8),
            ("change keyring version", 4),
            ("change reserved", 4),
            ("changes", record.len() - RECORD_HEAD_LEN - RECORD_SUFFIX_LEN),
            ("change tag", 32),
        ];
        under_crc(&mut parts, record.start, &fields);
    }
    parts
}

/// The ranges of the blocks of a segment, and the end of the last one.
pub(crate) fn blocks(bytes: &[u8]) -> (Vec<Range<usize>>, usize) {
    let mut blocks = Vec::new();
    let mut at = SegmentHeader::decode(bytes).unwrap().body_start as usize;
    while let Ok(header) = BlockHeader::decode(&bytes[at..]) {
        blocks.push(at..at + header.block_len() as usize);
        at += header.block_len() as usize;
    }
    (blocks, at)
}

fn segment(bytes: &[u8]) -> Vec<Part> {
    let mut parts = Vec::new();
    let header = [
        ("magic", 8),
        ("version", 2),
        ("suite", 2),
        ("header length", 4),
        ("features", 8),
        ("incompatible features", 4),
        ("shard", 4),
        ("store", 16),
        ("logstore", 16),
        ("segment", 16),
        ("generation", 8),
        ("ordinal", 8),
        ("first seq", 8),
        ("limit seq", 8),
        ("created", 8),
        ("key source", 4),
        ("key version", 4),
        ("salt", 32),
        ("predecessor kind", 4),
        ("predecessor", 84),
        ("payload hash", 2),
        ("reserved", 2),
        ("setbacks", 4),
        ("epoch", 8),
        ("latest time", 8),
        ("commitment", 32),
    ];
    under_crc(&mut parts, 0, &header);
    let (blocks, end) = blocks(bytes);
    for block in blocks {
        let fields = [
            ("block magic", 4),
            ("block kind", 4),
            ("block segment tag", 8),
            ("block number", 4),
            ("block lengths", 20),
            ("block seq", 8),
            ("block times", 16),
            ("block mark", 8),
            ("block nonce", 8),
            ("block reserved", 16),
            ("block payload", block.len() - 96 - 20),
            ("block tag", 16),
        ];
        under_crc(&mut parts, block.start, &fields);
    }
    if end == bytes.len() {
        return parts;
    }
    let fields = [
        ("footer magic", 4),
        ("footer version", 2),
        ("footer reserved", 2),
        ("footer segment tag", 8),
        ("footer blocks", 4),
        ("footer index length", 4),
        ("footer counts", 72 - 24),
        ("footer offset", 8),
        ("footer nonce", 8),
        ("footer flags", 8),
        ("footer body", 32),
        ("footer index", bytes.len() - end - 128 - 16 - 4 - 16),
        ("footer tag", 16),
    ];
    under_crc(&mut parts, end, &fields);
    parts.push(Part::new("trailer", bytes.len() - 16..bytes.len(), None));
    parts
}

fn audit(bytes: &[u8]) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut start = 0;
    for line in bytes.split_inclusive(|&byte| byte == b'\n') {
        let end = start + line.len();
        // JSON, tab, 64 digits of the tag, tab, 8 digits of the CRC, newline.
        let (tag, crc) = (end - 74, end - 9);
        let covered = Some(start..crc - 1);
        parts.push(Part::new("record", start..tag - 1, covered.clone()));
        parts.push(Part::new("record tag", tag - 1..crc - 1, covered));
        parts.push(Part::new("record crc", crc - 1..end - 1, None));
        let newline = if end == bytes.len() { "last newline" } else { "newline" };
        parts.push(Part::new(newline, end - 1..end, None));
        start = end;
    }
    parts
}
