//! The files of `audit/`: which of them are part of the log, and their records.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::line::{LINE_BYTES_MAX, Line, Lines, parse_line};
use crate::{
    Error, Result,
    io::{self, DirEntry, Disk, DiskFile, FileKind, OpenMode, WrongFileType},
};

/// How much of a file is read at first to find its first record.
const FIRST_READ_BYTES: usize = 4 << 10;
/// The largest size at which a file may be followed by the next.
pub(crate) const FILE_BYTES_LIMIT: u64 = 64 << 20;
/// The largest file that a reader takes: one record may begin right below the limit.
pub(super) const FILE_BYTES_MAX: u64 = FILE_BYTES_LIMIT + LINE_BYTES_MAX as u64 + 1;

/// The files of the directory, by the part that they have in the log.
#[derive(Default)]
pub(super) struct Scan {
    /// The numbers of all names that a file of the log may have.
    pub(super) names: BTreeSet<u32>,
    /// The files of the log, in the order of their first records.
    pub(super) parts: Vec<Part>,
    /// The files with such a name that are not part of the log, without the empty ones.
    pub(super) others: Vec<Other>,
}

/// A file of the log: it begins with a record.
pub(super) struct Part {
    pub(super) number: u32,
    pub(super) first: Line,
    identity: u64,
}

/// A file that is not part of the log.
pub(super) struct Other {
    pub(super) number: u32,
    pub(super) why: Why,
}

impl Other {
    /// Whether it may have been a file of the log, with records that no other file has.
    pub(super) fn may_have_records(&self) -> bool {
        !matches!(self.why, Why::Copy(_))
    }
}

/// Why a file is not part of the log.
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

/// The beginning of a file.
enum Beginning {
    Empty,
    /// A record, and the identity of the file.
    Record(Box<Line>, u64),
    Other(Why),
}

/// The directory of the log.
#[derive(Clone)]
pub(super) struct AuditFiles {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
}

impl AuditFiles {
    pub(super) fn new(disk: Arc<dyn Disk>, dir: PathBuf) -> Self {
        Self { disk, dir }
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn path(&self, number: u32) -> PathBuf {
        self.dir.join(format!("audit-{number:06}.log"))
    }

    /// The numbers of all names that a file of the log may have, and whether each is a regular
    /// file.
    pub(super) fn names(&self) -> Result<BTreeMap<u32, bool>> {
        let entries = match self.disk.list_dir(&self.dir) {
            // A reader creates no directory.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            entries => entries.map_err(Error::io("list", &self.dir))?,
        };
        let numbered = |entry: &DirEntry| Some((number_of(&entry.name)?, is_plain(entry)));
        Ok(entries.iter().filter_map(numbered).collect())
    }

    /// Finds the files of the log by their beginnings.
    pub(super) fn scan(&self) -> Result<Scan> {
        let mut scan = Scan::default();
        let mut parts = Vec::new();
        for (number, is_plain) in self.names()? {
            scan.names.insert(number);
            let begin =
                if is_plain { self.beginning(number)? } else { Beginning::Other(Why::NoFile) };
            match begin {
                Beginning::Empty => {}
                Beginning::Record(first, identity) => {
                    parts.push(Part { number, first: *first, identity });
                }
                Beginning::Other(why) => scan.others.push(Other { number, why }),
            }
        }
        parts.sort_by_key(|part| (part.first.record.number, part.number));
        self.set_copies_apart(parts, &mut scan)?;
        Ok(scan)
    }

    /// Sorts files that begin with the same record into one that is part of the log, and its
    /// copies.
    fn set_copies_apart(&self, parts: Vec<Part>, scan: &mut Scan) -> Result<()> {
        // The records of the file that was compared last: there may be many copies of it.
        let mut compared: Option<(u32, Lines)> = None;
        for part in parts {
            let same = |other: &Part| other.first.head() == part.first.head();
            let Some(at) = scan.parts.iter().rposition(same) else {
                scan.parts.push(part);
                continue;
            };
            let number = scan.parts[at].number;
            if part.identity == scan.parts[at].identity {
                // Another name of the same file.
                scan.others.push(Other { number: part.number, why: Why::Copy(number) });
                continue;
            }
            // A copy has the same records. Of two such files the one with more records is part of
            // the log.
            let here = self.front(part.number)?;
            let there = match compared.take() {
                Some((of, lines)) if of == number => lines,
                _ => self.front(number)?,
            };
            let there = &compared.insert((number, there)).1;
            if here.lines.len() > there.lines.len() && here.goes_on_from(there) {
                compared = Some((part.number, here));
                let other = std::mem::replace(&mut scan.parts[at], part);
                let why = Why::Copy(scan.parts[at].number);
                scan.others.push(Other { number: other.number, why });
            } else if there.goes_on_from(&here) {
                let why = Why::Copy(scan.parts[at].number);
                scan.others.push(Other { number: part.number, why });
            } else {
                scan.parts.push(part);
            }
        }
        Ok(())
    }

    /// The beginning of a file. Reads at most as much as the longest record.
    fn beginning(&self, number: u32) -> Result<Beginning> {
        let read = || -> std::io::Result<Beginning> {
            let file = match self.disk.open(&self.path(number), OpenMode::Read) {
                Err(error) if is_no_file(&error) => return Ok(Beginning::Other(Why::NoFile)),
                file => file?,
            };
            let len = file.len()?;
            if len > FILE_BYTES_MAX {
                return Ok(Beginning::Other(Why::TooLarge));
            }
            let mut bytes = Vec::new();
            for limit in [FIRST_READ_BYTES, LINE_BYTES_MAX + 1] {
                bytes = vec![0; limit.min(len as usize)];
                let read = file.read_at(&mut bytes, 0)?;
                bytes.truncate(read);
                if let Some(end) = memchr::memchr(b'\n', &bytes) {
                    let line = bytes.get(..end).and_then(|line| parse_line(line, 0));
                    let Some(line) = line else { return Ok(Beginning::Other(Why::NoRecord)) };
                    return Ok(Beginning::Record(Box::new(line), file.stat()?.identity));
                }
            }
            Ok(match bytes.first() {
                None => Beginning::Empty,
                Some(b'{') => Beginning::Other(Why::CutShort),
                Some(_) => Beginning::Other(Why::NoRecord),
            })
        };
        read().map_err(Error::io("read the audit log", self.path(number)))
    }

    /// Sentences about the files that have a name of the log and are not part of it.
    pub(super) fn strangers(&self) -> Result<Vec<String>> {
        let mut others = self.scan()?.others;
        others.sort_by_key(|other| other.number);
        let note = |other: &Other| {
            let path = self.path(other.number);
            format!("{} is no part of the key audit log: {}", path.display(), other.why)
        };
        Ok(others.iter().map(note).collect())
    }

    /// The records that a file begins with. Reads up to the first bytes that are no record, so a
    /// large file with few records costs little.
    pub(super) fn front(&self, number: u32) -> Result<Lines> {
        let path = self.path(number);
        let read = || -> std::io::Result<Lines> {
            let file = self.disk.open(&path, OpenMode::Read)?;
            let mut lines = Lines::default();
            let mut bytes = vec![0; LINE_BYTES_MAX + 1];
            while lines.valid_len <= FILE_BYTES_MAX {
                let read = file.read_at(&mut bytes, lines.valid_len)?;
                let mut rest = bytes.get(..read).unwrap_or_default();
                while let Some(end) = memchr::memchr(b'\n', rest) {
                    let line = rest.get(..end).and_then(|line| parse_line(line, lines.valid_len));
                    let Some(line) = line else {
                        (lines.torn, lines.damaged) = (true, true);
                        return Ok(lines);
                    };
                    lines.lines.push(line);
                    lines.valid_len += end as u64 + 1;
                    rest = rest.get(end + 1..).unwrap_or_default();
                }
                // No record is as long as the bytes that were read without a newline.
                if read < bytes.len() || rest.len() == read {
                    lines.torn = !rest.is_empty();
                    break;
                }
            }
            Ok(lines)
        };
        read().map_err(Error::io("read the audit log", &path))
    }

    /// The records of a file up to the first bytes that are no record, and the highest number of
    /// the records behind those.
    pub(super) fn lines(&self, number: u32) -> Result<Lines> {
        let path = self.path(number);
        let bytes = io::read_file(&*self.disk, &path, FILE_BYTES_MAX)
            .map_err(Error::io("read the audit log", &path))?;
        let mut lines = Lines::default();
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let offset = lines.valid_len;
            let Some(end) = memchr::memchr(b'\n', rest) else {
                // A crash cut off the line. It was never acknowledged.
                lines.torn = true;
                break;
            };
            let (line, after) = (&rest[..end], &rest[end + 1..]);
            match parse_line(line, offset) {
                Some(line) => lines.lines.push(line),
                None => {
                    (lines.torn, lines.damaged) = (true, true);
                    let behind = after.split(|&byte| byte == b'\n');
                    let behind = behind.filter_map(|line| parse_line(line, 0));
                    lines.within = behind.map(|line| line.record.number).max().unwrap_or(0);
                    break;
                }
            }
            rest = after;
            lines.valid_len += end as u64 + 1;
        }
        Ok(lines)
    }

    /// Renames the files of the log. The next record then begins a new log.
    pub(super) fn set_aside(&self, why: &str) -> Result<()> {
        // Only regular files can be part of a log.
        for (number, _) in self.names()?.into_iter().filter(|(_, is_plain)| *is_plain) {
            let from = self.path(number);
            let to = self.dir.join(format!("{why}-{number:06}.log"));
            self.disk.rename(&from, &to).map_err(Error::io("rename", &from))?;
        }
        self.sync_dir()
    }

    pub(super) fn sync_dir(&self) -> Result<()> {
        self.disk.sync_dir(&self.dir).map_err(Error::io("sync", &self.dir))
    }

    /// Syncs a file that may not be written to.
    pub(super) fn sync(&self, path: &Path) -> std::io::Result<()> {
        self.disk.open(path, OpenMode::Read)?.sync_data()
    }

    /// Whether a file of the log may take more records, and its torn end may be cut off.
    pub(super) fn may_continue(&self, path: &Path) -> std::io::Result<bool> {
        // A second name means that a copy was made by linking. A record added here would change it.
        let stat = self.disk.stat(path)?;
        Ok(stat.is_some_and(|stat| stat.kind == FileKind::File && stat.links == 1))
    }

    /// Opens a file of the log to write behind its `len` bytes of records, and cuts off the rest.
    /// `None` if the file has become shorter.
    pub(super) fn reopen(
        &self,
        path: &Path,
        len: u64,
    ) -> std::io::Result<Option<Arc<dyn DiskFile>>> {
        let file = self.disk.open(path, OpenMode::ReadWrite)?;
        let found = file.len()?;
        if found < len {
            return Ok(None);
        }
        if found > len {
            file.set_len(len)?;
        }
        Ok(Some(file))
    }

    /// Makes a file of the log. `None` if the name is taken by now.
    pub(super) fn create(&self, path: &Path) -> std::io::Result<Option<Arc<dyn DiskFile>>> {
        match self.disk.open(path, OpenMode::CreateNew) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(None),
            file => file.map(Some),
        }
    }

    /// Opens a file that a crash left empty. `None` if it is not such a file.
    pub(super) fn reuse(&self, path: &Path) -> std::io::Result<Option<Arc<dyn DiskFile>>> {
        if self.disk.stat(path)?.is_none_or(|stat| stat.len > 0) || !self.may_continue(path)? {
            return Ok(None);
        }
        let file = match self.disk.open(path, OpenMode::ReadWrite) {
            Err(error) if is_no_file(&error) => return Ok(None),
            file => file?,
        };
        Ok((file.len()? == 0).then_some(file))
    }
}

/// Whether a file of the log may have this name.
pub(crate) fn is_audit_file(name: &str) -> bool {
    number_of(name).is_some()
}

/// The number in the name of a file of the log, if the name is exactly that of this number.
pub(super) fn number_of(name: &str) -> Option<u32> {
    let number = name.strip_prefix("audit-")?.strip_suffix(".log")?.parse().ok()?;
    (number > 0 && name == format!("audit-{number:06}.log")).then_some(number)
}

fn is_plain(entry: &DirEntry) -> bool {
    entry.kind == FileKind::File
}

/// Whether an error of opening an existing name means that it is not a regular file. Any other
/// error is a failure of the disk.
pub(super) fn is_no_file(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{IsADirectory, NotFound};
    let wrong_type = error.get_ref().is_some_and(|inner| inner.is::<WrongFileType>());
    wrong_type || matches!(error.kind(), IsADirectory | NotFound)
}
