//! Which files of `audit/` are part of the log.

use std::{collections::BTreeSet, fmt};

use super::line::{LINE_BYTES_MAX, Line};
use crate::io::{DirEntry, FileKind, WrongFileType};

/// How much of a file is read at first to find its first record.
pub(super) const FIRST_READ_BYTES: usize = 4 << 10;
/// The largest size at which a file may be followed by the next.
pub(crate) const FILE_BYTES_LIMIT: u64 = 64 << 20;
/// The largest file that a reader takes: one record may begin right below the limit.
pub(super) const FILE_BYTES_MAX: u64 = FILE_BYTES_LIMIT + LINE_BYTES_MAX as u64 + 1;

/// Which files of the directory are part of the log.
#[derive(Default)]
pub(super) struct Scan {
    /// The numbers of all names that a file of the log may have.
    pub(super) names: BTreeSet<u32>,
    /// The files of the log, in the order of the records that they begin with.
    pub(super) parts: Vec<Part>,
    /// The files with such a name that are no part of the log. Empty ones are not among them.
    pub(super) others: Vec<Other>,
}

/// A file of the log: it begins with a record.
pub(super) struct Part {
    pub(super) number: u32,
    pub(super) first: Line,
    pub(super) identity: u64,
}

/// A file that is no part of the log.
pub(super) struct Other {
    pub(super) number: u32,
    pub(super) why: Why,
}

impl Other {
    /// Whether it may have been a file of the log with records that no other file has.
    pub(super) fn may_have_records(&self) -> bool {
        !matches!(self.why, Why::Copy(_))
    }
}

/// Why a file is no part of the log.
pub(super) enum Why {
    NoFile,
    TooLarge,
    NoRecord,
    /// It has the beginning of a record and nothing else.
    CutShort,
    /// It has the same records as the file of this number.
    Copy(u32),
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Why::NoFile => f.write_str("it is not a regular file"),
            Why::TooLarge => write!(f, "it has more than {FILE_BYTES_MAX} bytes"),
            Why::NoRecord => f.write_str("it does not begin with a record"),
            Why::CutShort => f.write_str("it ends within its first record"),
            Why::Copy(number) => write!(f, "it is a copy of audit-{number:06}.log"),
        }
    }
}

/// What a file begins with.
pub(super) enum Beginning {
    Empty,
    /// A record, and the identity of the file.
    Record(Box<Line>, u64),
    Other(Why),
}

/// The number in the name of a file of the log: the name is exactly the one that this number has.
pub(super) fn number_of(name: &str) -> Option<u32> {
    let number = name.strip_prefix("audit-")?.strip_suffix(".log")?.parse().ok().filter(|number| *number > 0)?;
    (name == format!("audit-{number:06}.log")).then_some(number)
}

pub(super) fn is_plain(entry: &DirEntry) -> bool {
    entry.kind == FileKind::File
}

/// Whether an error of opening a name that is there means that it is not a regular file, rather than that the disk has failed.
pub(super) fn is_no_file(error: &std::io::Error) -> bool {
    let wrong_type = error.get_ref().is_some_and(|inner| inner.is::<WrongFileType>());
    wrong_type || matches!(error.kind(), std::io::ErrorKind::IsADirectory | std::io::ErrorKind::NotFound)
}
