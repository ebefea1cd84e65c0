//! The lines of the key audit log: one record each.

use std::path::Path;

use super::{AuditHead, AuditRecord};
use crate::{Error, error::Location};

pub(super) const LINE_BYTES_MAX: usize = 64 << 10;

/// A record as it stands in the log.
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

/// The records of one file, and how it ends.
pub(super) struct Lines {
    pub(super) lines: Vec<Line>,
    pub(super) valid_len: u64,
    /// What follows the last record is none.
    pub(super) torn: bool,
    /// And it is not just cut off: it ends as a record does.
    pub(super) damaged: bool,
    /// The highest number of the records behind what is damaged; 0 if there are none. A record is one write, and synced before the
    /// next one: a crash may have lost any part of the last one, and of no other.
    pub(super) within: u64,
}

impl Lines {
    /// The last record.
    pub(super) fn head(&self) -> Option<AuditHead> {
        self.lines.last().map(Line::head)
    }

    /// Whether the records of `other` are the first ones of these.
    pub(super) fn goes_on_from(&self, other: &Self) -> bool {
        let Some(last) = other.lines.last() else { return true };
        self.lines.get(other.lines.len() - 1).is_some_and(|line| line.head() == last.head())
    }

    /// What is damaged in the last file of the log, unless a crash may have done it: it has not where a later record follows or is
    /// known, since a record is durable before the next one is written.
    pub(super) fn fault(&self, known: &AuditHead, path: &Path) -> Option<Error> {
        let missed = self.lines.last().map_or(0, |line| line.record.number) < known.number;
        (self.damaged && (self.within > 0 || missed)).then(|| self.damage(path))
    }

    pub(super) fn damage(&self, path: &Path) -> Error {
        Error::corrupt(Location::new(path, self.valid_len), "an audit record is damaged")
    }
}
