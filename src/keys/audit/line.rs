//! The lines of the key audit log: one record each.

use std::path::Path;

use super::record::{AuditHead, AuditRecord};
use crate::{Error, error::Location};

/// The longest line, in bytes, without its newline.
pub(super) const LINE_BYTES_MAX: usize = 64 << 10;

/// A record as its file has it.
pub(crate) struct Line {
    pub(super) offset: u64,
    pub(crate) json: String,
    pub(crate) record: AuditRecord,
    pub(crate) tag: String,
}

impl Line {
    pub(super) fn head(&self) -> AuditHead {
        AuditHead { number: self.record.number, tag: self.tag.clone() }
    }
}

pub(super) fn encode_line(json: &str, tag: &str) -> String {
    let body = format!("{json}\t{tag}");
    let crc = crc32fast::hash(body.as_bytes());
    format!("{body}\t{crc:08x}\n")
}

pub(super) fn parse_line(line: &[u8], offset: u64) -> Option<Line> {
    if line.len() > LINE_BYTES_MAX {
        return None;
    }
    let text = std::str::from_utf8(line).ok()?;
    let (body, crc) = text.rsplit_once('\t')?;
    if crc.len() != 8 || crc != format!("{:08x}", crc32fast::hash(body.as_bytes())) {
        return None;
    }
    let (json, tag) = body.rsplit_once('\t')?;
    let record = serde_json::from_str(json).ok()?;
    Some(Line { offset, json: json.to_owned(), record, tag: tag.to_owned() })
}

/// The records of one file, and how the file ends.
#[derive(Default)]
pub(super) struct Lines {
    pub(super) lines: Vec<Line>,
    /// The length of these lines: where the next record would begin.
    pub(super) valid_len: u64,
    /// Bytes follow that are no record.
    pub(super) torn: bool,
    /// These bytes are not just the beginning of a record: they have a newline.
    pub(super) damaged: bool,
    /// The highest number of the records behind the damage; 0 if there are none. A record is one
    /// write and is synced before the next one. So a crash may lose any part of the last record,
    /// and of no other.
    pub(super) within: u64,
}

impl Lines {
    /// The last record.
    pub(super) fn head(&self) -> Option<AuditHead> {
        self.lines.last().map(Line::head)
    }

    /// Whether these records begin with the records of `other`.
    pub(super) fn goes_on_from(&self, other: &Self) -> bool {
        let Some(last) = other.lines.last() else { return true };
        self.lines.get(other.lines.len() - 1).is_some_and(|line| line.head() == last.head())
    }

    /// Drops the records from `at` on.
    pub(super) fn cut(&mut self, at: usize) -> Vec<Line> {
        let dropped = self.lines.split_off(at);
        self.valid_len = dropped.first().map_or(self.valid_len, |line| line.offset);
        self.torn = true;
        dropped
    }

    /// The damage in the last file of the log, unless a crash may have caused it. A crash has not
    /// if a later record follows or is known, since each record is durable before the next is
    /// written.
    pub(super) fn fault(&self, known: &AuditHead, path: &Path) -> Option<Error> {
        let missed = self.lines.last().map_or(0, |line| line.record.number) < known.number;
        (self.damaged && (self.within > 0 || missed)).then(|| self.damage(path))
    }

    pub(super) fn damage(&self, path: &Path) -> Error {
        Error::corrupt(Location::new(path, self.valid_len), "an audit record is damaged")
    }
}
