//! The key audit log: every transition of a key, chained and tagged.
//!
//! A record is a line: the JSON of it, a tab, its tag in hex, a tab, the CRC-32 of what precedes the last tab in hex, a newline. The
//! tag is HMAC-SHA-256 under a key from the service keyring over the tag before it and the JSON; so a record cannot be altered,
//! dropped from the middle or moved. The catalogue remembers how far the log was when it was last written.
//!
//! The version of the service key never decreases from one record to the next, and that of the last one is accepted by the keyring:
//! records under a retired version count in front of such a one alone. So the old key appends nothing to the log.

mod files;
mod line;
#[cfg(test)]
mod tests;
mod transitions;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{Deserialize, Serialize};
use tracing::{error, info};

pub(crate) use files::FILE_BYTES_LIMIT;
use files::{Beginning, FILE_BYTES_MAX, FIRST_READ_BYTES, Other, Part, Scan, Why, is_no_file, is_plain, number_of};
pub(crate) use line::Line;
use line::{LINE_BYTES_MAX, Lines, encode_line, parse_line};
use transitions::{KeyState, TRANSITIONS_MAX, Transitions, follow, kind, shortened, with_count, without_count};

use super::keyring::Keyring;
use crate::{
    Error, Result,
    config::LogstoreName,
    crypto::{SecretKey, hmac_sha256, tags_equal},
    epoch::Fence,
    error::Location,
    ids::{LogstoreId, hex_decode, hex_encode},
    io::{self, Clock, Disk, DiskFile, FileKind, OpenMode},
    metrics::Counters,
    sync::{Mutex, RwLock, atomic::Ordering, lock, read},
};

/// What happened to a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum AuditEvent {
    /// The store and its keyring were made.
    StoreCreated,
    /// A Logstore's first envelope was made.
    Created,
    /// The KMS refused the key; the detail says why.
    Revoked,
    /// The lease ended without an answer of the KMS.
    LeaseEnded,
    /// The key can be used again.
    Recovered,
    /// A new data-key version is about to be made.
    RotateIntended,
    /// A new data-key version is in use.
    Rotated,
    /// The envelopes are about to be wrapped again under the current wrapping key.
    RewrapIntended,
    /// The envelopes were wrapped anew under the current wrapping key.
    Rewrapped,
    /// The envelopes of many Logstores are being wrapped anew; the detail says of which.
    RewrapBegun,
    /// They have all been wrapped anew.
    RewrapEnded,
    /// A new service-key version is about to be made.
    ServiceRotateIntended,
    /// Everything that is authenticated by itself is under the new service-key version. The older ones are retired next.
    ServiceRotated,
    /// The master key is about to be replaced.
    ReplaceIntended,
    /// The master key was replaced.
    Replaced,
    /// Data-key versions are about to be destroyed.
    ShredIntended,
    /// Data-key versions were destroyed.
    Shredded,
    /// A Logstore is about to be deleted, and its envelopes with it.
    DeleteIntended,
    /// A Logstore was deleted, and its envelopes with it.
    Deleted,
    /// The store was recovered with a new keyring.
    KeyringReplaced,
    /// The keyring is about to be put under another master key, or under none; the detail says which.
    KeyringRewrapIntended,
    /// The keyring was put under another master key, or under none.
    KeyringRewrapped,
    /// The store has an anchor from now on.
    Anchored,
    /// A store that has an anchor was opened for writing without it.
    OpenedWithoutAnchor,
}

/// One record of the key audit log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct AuditRecord {
    /// Counts the records of the store, from 1.
    pub number: u64,
    /// When, in microseconds since the Unix epoch.
    pub time_us: u64,
    /// What happened.
    pub event: AuditEvent,
    /// To which Logstore, by name; none if it was the whole store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logstore: Option<LogstoreName>,
    /// To which Logstore, by id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logstore_id: Option<LogstoreId>,
    /// More about it, never a secret.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
    /// The version of the service keyring that tags the record.
    pub keyring_version: u32,
}

/// How far the log is: what the catalogue and checkpoints remember.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct AuditHead {
    pub(crate) number: u64,
    pub(crate) tag: String,
}

struct Tail {
    head: AuditHead,
    /// The number of the file that takes the next record, if one is known to be part of the log.
    current: Option<u32>,
    /// Where there is no current file, the next one gets a number above this one.
    after: u32,
    file: Option<Arc<dyn DiskFile>>,
    /// Up to where the current file has records.
    len: u64,
    /// Whether the log goes on from what the catalogue knew of it when the store was opened.
    follows: bool,
}

impl Tail {
    /// A log without a record.
    fn empty() -> Self {
        Self { head: AuditHead::default(), current: None, after: 0, file: None, len: 0, follows: true }
    }

    /// Ends the current file. The next record goes into another one.
    fn leave(&mut self) {
        self.after = self.after.max(self.current.take().unwrap_or(0));
        self.file = None;
        self.len = 0;
    }
}

/// The audit log of an open store.
pub(crate) struct AuditLog {
    disk: Arc<dyn Disk>,
    clock: Arc<dyn Clock>,
    keyring: Arc<RwLock<Keyring>>,
    dir: PathBuf,
    file_bytes_max: u64,
    counters: Arc<Counters>,
    /// Looked at before and after a record is written; `None` for a log that is only read.
    fence: Option<Arc<Fence>>,
    /// `None` until the log was read for them, when the first transition is to be recorded.
    transitions: Mutex<Option<Transitions>>,
    tail: Mutex<Tail>,
}

impl std::fmt::Debug for AuditLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AuditLog").field("dir", &self.dir).finish_non_exhaustive()
    }
}

impl AuditLog {
    /// The log in `dir`, whose end is not known yet.
    pub(crate) fn new(
        disk: Arc<dyn Disk>,
        clock: Arc<dyn Clock>,
        keyring: Arc<RwLock<Keyring>>,
        dir: PathBuf,
        file_bytes_max: u64,
        counters: Arc<Counters>,
        fence: Option<Arc<Fence>>,
    ) -> Self {
        let (transitions, tail) = (Mutex::default(), Mutex::new(Tail::empty()));
        Self { disk, clock, keyring, dir, file_bytes_max, counters, fence, transitions, tail }
    }

    /// Finds where the log ends, to go on there, and whether `known` is in it. Reads the first record of every file, the file that has
    /// `known` in it, and those behind it. Damage is no reason not to open a store: the log goes on behind it, and
    /// [`AuditLog::verified`] reports it. An error of the disk is one, since to go on elsewhere would fork the chain.
    pub(crate) fn find_end(&self, known: &AuditHead) -> Result<()> {
        let Scan { parts, others, .. } = self.scan()?;
        let mut end: Option<(u32, Lines)> = None;
        for part in parts.iter().rev().filter(|part| part.first.record.number <= known.number) {
            if self.front(part.number)?.lines.iter().any(|line| line.head() == *known) {
                let mut lines = self.lines(part.number)?;
                self.distrust(&mut lines, known, 0);
                self.cut_where_another_goes_on(&mut lines, part.number, &parts);
                end = Some((part.number, lines));
                break;
            }
        }
        let found = end.is_some() || known.number == 0;
        let mut head = end.as_ref().and_then(|(_, lines)| lines.head()).unwrap_or_default();
        if found {
            let mut rest: Vec<&Part> = parts.iter().collect();
            while let Some(next) = rest.iter().position(|part| self.goes_on(&part.first, &head)) {
                let part = rest.remove(next);
                let mut lines = self.lines(part.number)?;
                let before = end.as_ref().and_then(|(_, lines)| lines.lines.last());
                self.distrust(&mut lines, &head, before.map_or(0, |line| line.record.keyring_version));
                self.cut_where_another_goes_on(&mut lines, part.number, &parts);
                head = lines.head().unwrap_or(head);
                end = Some((part.number, lines));
            }
        } else if let Some(part) = parts.last() {
            let lines = self.lines(part.number)?;
            head = lines.head().unwrap_or_default();
            end = Some((part.number, lines));
        }
        let mut tail = lock(&self.tail);
        *tail = Tail::empty();
        tail.follows = found;
        tail.after = end.as_ref().map_or(0, |(number, _)| *number);
        let damaged = end.as_ref().is_some_and(|(number, lines)| lines.fault(known, &self.path(*number)).is_some());
        if damaged || (!found && head.number < known.number && others.iter().any(Other::may_have_records)) {
            // What is there may hold the records that are missing, so it stays as it is.
            tail.head = if head.number > known.number { head } else { known.clone() };
            tail.follows &= !damaged;
        } else {
            tail.head = head;
            tail.current = end.as_ref().map(|(number, _)| *number);
            tail.len = end.map_or(0, |(_, lines)| lines.valid_len);
        }
        // Records behind a gap have their numbers already.
        for part in &parts {
            if !found || part.first.record.number <= tail.head.number {
                continue;
            }
            let lines = self.front(part.number)?;
            let beyond = lines.head().filter(|head| head.number > tail.head.number);
            if let Some(head) = beyond.filter(|_| self.is_ours(&lines)) {
                tail.leave();
                tail.after = tail.after.max(part.number);
                tail.head = head;
                tail.follows = false;
            }
        }
        Ok(())
    }

    /// Drops the records from which on a later file has others. A writer begins a new file where it takes over from one that may still
    /// run. What that one adds to the old file afterwards was never acknowledged.
    fn cut_where_another_goes_on(&self, lines: &mut Lines, number: u32, parts: &[Part]) {
        let later = parts.iter().filter(|part| part.number > number);
        for first in later.map(|part| &part.first).filter(|first| first.record.number > 1) {
            let before = lines.lines.iter().position(|line| line.record.number + 1 == first.record.number);
            let Some(at) = before.filter(|at| at + 1 < lines.lines.len()) else { continue };
            if lines.lines.get(at).is_some_and(|line| self.is_tagged(first, &line.tag)) {
                let dropped = lines.lines.split_off(at + 1);
                lines.valid_len = dropped.first().map_or(lines.valid_len, |line| line.offset);
                lines.torn = true;
            }
        }
    }

    /// Has the next record go into a new file: another writer may still add records to the current one.
    pub(crate) fn begin_new_file(&self) {
        lock(&self.tail).leave();
    }

    /// Whether `line` is the record that follows `head`.
    fn goes_on(&self, line: &Line, head: &AuditHead) -> bool {
        Some(line.record.number) == head.number.checked_add(1) && self.is_tagged(line, &head.tag)
    }

    /// Whether the tag of `line` holds behind a record whose tag is `previous`.
    fn is_tagged(&self, line: &Line, previous: &str) -> bool {
        read(&self.keyring).audit_key(line.record.keyring_version).is_ok_and(|key| tag_holds(&key, line, previous))
    }

    /// Whether the records of a file are of this log, as far as they can show it without the record before them. One record alone
    /// shows nothing: anyone can write it, and records that follow it could be verified never again.
    fn is_ours(&self, lines: &Lines) -> bool {
        let accepted = |line: &Line| line.record.keyring_version >= read(&self.keyring).accepts();
        matches!(&lines.lines[..], [.., before, last] if accepted(last) && self.is_tagged(last, &before.tag))
    }

    /// Takes the records behind `head` for damage from the first one on whose tag does not hold, or whose version of the service key is
    /// retired or below that of the record before it. Others can write such a record, and those that follow it could be verified never
    /// again. A rotation retires a version only when the catalogue knows of a record under a newer one. `version` is that of the record
    /// before these, where that is in another file.
    fn distrust(&self, lines: &mut Lines, head: &AuditHead, version: u32) {
        // Records up to `head` are vouched for by its tag.
        let (mut previous, begin) = match lines.lines.iter().position(|line| line.head() == *head) {
            Some(at) => (head.tag.as_str(), at + 1),
            None => (head.tag.as_str(), 0),
        };
        let before = begin.checked_sub(1).and_then(|index| lines.lines.get(index));
        let version = before.map_or(version, |line| line.record.keyring_version);
        let mut version = version.max(read(&self.keyring).accepts());
        let mut forged = None;
        for (index, line) in lines.lines.iter().enumerate().skip(begin) {
            if !self.is_tagged(line, previous) || line.record.keyring_version < version {
                forged = Some(index);
                break;
            }
            previous = &line.tag;
            version = line.record.keyring_version;
        }
        if let Some(forged) = forged {
            let behind = lines.lines.split_off(forged);
            lines.valid_len = behind.first().map_or(lines.valid_len, |line| line.offset);
            lines.within = behind.iter().map(|line| line.record.number).fold(lines.within, u64::max).max(1);
            (lines.torn, lines.damaged) = (true, true);
        }
    }

    /// What a process wrote last that was killed may be in memory alone, or not even be on its way to the disk: unless the catalogue
    /// knows it, it is written once more and synced, before anything rests on it.
    pub(crate) fn make_durable(&self, known: &AuditHead) -> Result<()> {
        let mut tail = lock(&self.tail);
        let Some(number) = tail.current.filter(|_| tail.head != *known) else { return Ok(()) };
        let path = self.path(number);
        let lines = self.lines(number)?;
        let Some(last) = lines.lines.last() else { return Ok(()) };
        let write = || -> std::io::Result<Option<Arc<dyn DiskFile>>> {
            if !self.may_continue(&path)? {
                self.disk.open(&path, OpenMode::Read)?.sync_data()?;
                return Ok(None);
            }
            let Some(file) = self.reopen(&path, tail.len)? else { return Ok(None) };
            file.write_at(encode_line(&last.json, &last.tag).as_bytes(), last.offset)?;
            file.sync_data()?;
            Ok(Some(file))
        };
        tail.file = write().map_err(Error::io("sync the audit log", &path))?;
        Ok(())
    }

    /// What the catalogue is to remember: how far the log is, unless it does not go on from what is remembered already. Then that
    /// stays, so that what was taken away is found missing for good.
    pub(crate) fn head_after(&self, known: &AuditHead) -> AuditHead {
        let tail = lock(&self.tail);
        if tail.follows { tail.head.clone() } else { known.clone() }
    }

    /// Keeps what is there under another name, since the keyring that it was tagged under is lost, and begins anew.
    pub(crate) fn set_aside(&self, why: &str) -> Result<()> {
        let mut tail = lock(&self.tail);
        for (number, is_plain) in self.names()? {
            // Only files can be part of a log.
            if !is_plain {
                continue;
            }
            let from = self.path(number);
            let to = self.dir.join(format!("{why}-{number:06}.log"));
            self.disk.rename(&from, &to).map_err(Error::io("rename", &from))?;
        }
        self.disk.sync_dir(&self.dir).map_err(Error::io("sync", &self.dir))?;
        *tail = Tail::empty();
        drop(tail);
        *lock(&self.transitions) = None;
        Ok(())
    }

    fn path(&self, number: u32) -> PathBuf {
        self.dir.join(format!("audit-{number:06}.log"))
    }

    /// The numbers of all names that a file of the log may have, and whether what has the name is a plain file.
    fn names(&self) -> Result<BTreeMap<u32, bool>> {
        let entries = self.disk.list_dir(&self.dir).map_err(Error::io("list", &self.dir))?;
        Ok(entries.iter().filter_map(|entry| Some((number_of(&entry.name)?, is_plain(entry)))).collect())
    }

    /// Looks at the beginning of every file, to tell which of them are part of the log.
    fn scan(&self) -> Result<Scan> {
        let mut scan = Scan::default();
        let mut parts = Vec::new();
        for (number, is_plain) in self.names()? {
            scan.names.insert(number);
            let begin = if is_plain { self.beginning(number)? } else { Beginning::Other(Why::NoFile) };
            match begin {
                Beginning::Empty => {}
                Beginning::Record(first, identity) => parts.push(Part { number, first: *first, identity }),
                Beginning::Other(why) => scan.others.push(Other { number, why }),
            }
        }
        parts.sort_by_key(|part| (part.first.record.number, part.number));
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
            // A copy has the same records. Of two files that do, the one with more of them is part of the log.
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
        Ok(scan)
    }

    /// What a file begins with. Reads no more of it than a record may have.
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

    /// The files whose names are those of the log and which are no part of it, and why.
    pub(crate) fn strangers(&self) -> Result<Vec<String>> {
        let mut others = self.scan()?.others;
        others.sort_by_key(|other| other.number);
        let note = |other: &Other| {
            format!("{} is no part of the key audit log: {}", self.path(other.number).display(), other.why)
        };
        Ok(others.iter().map(note).collect())
    }

    pub(crate) fn head(&self) -> AuditHead {
        lock(&self.tail).head.clone()
    }

    /// Appends a record and makes it durable.
    pub(crate) fn record(
        &self,
        event: AuditEvent,
        logstore: Option<(&LogstoreName, LogstoreId)>,
        detail: impl Into<String>,
    ) -> Result<()> {
        let detail = shortened(detail.into());
        let mut transitions = lock(&self.transitions);
        if let (Some(all), Some((_, id))) = (&mut *transitions, logstore)
            && let Some(state) = all.get_mut(&id)
        {
            // What was left out comes before this. Whether it can be recorded does not decide about this record.
            let _ = self.catch_up(id, state);
        }
        self.put(event, logstore, &detail)?;
        if let (Some(all), Some((_, id))) = (&mut *transitions, logstore) {
            follow(all, event, id, &detail, self.clock.wall_us());
        }
        Ok(())
    }

    /// Appends a record, and says so or that it failed.
    fn put(&self, event: AuditEvent, logstore: Option<(&LogstoreName, LogstoreId)>, detail: &str) -> Result<()> {
        let name = logstore.map(|(name, _)| name.to_string());
        match self.append(event, logstore, detail.to_owned()) {
            Ok(number) => {
                self.counters.audit_records.fetch_add(1, Ordering::Relaxed);
                info!(number, ?event, logstore = name, detail, "on the key audit log");
                Ok(())
            }
            Err(cause) => {
                self.counters.audit_failures.fetch_add(1, Ordering::Relaxed);
                error!(?event, logstore = name, detail, error = %cause, "the key audit log could not be written");
                Err(cause)
            }
        }
    }

    fn append(&self, event: AuditEvent, logstore: Option<(&LogstoreName, LogstoreId)>, detail: String) -> Result<u64> {
        let mut tail = lock(&self.tail);
        // Asked for behind the lock, so that no record under an older version follows one under a newer.
        let (keyring_version, key) = {
            let keyring = read(&self.keyring);
            (keyring.newest(), keyring.audit_key(keyring.newest())?)
        };
        let record = AuditRecord {
            number: tail.head.number.saturating_add(1),
            time_us: self.clock.wall_us(),
            event,
            logstore: logstore.map(|(name, _)| name.clone()),
            logstore_id: logstore.map(|(_, id)| id),
            detail,
            keyring_version,
        };
        let json = serde_json::to_string(&record).expect("plain data always serializes");
        let tag = hex_encode(&hmac_sha256(&key, &[tail.head.tag.as_bytes(), json.as_bytes()]));
        let line = encode_line(&json, &tag);
        if tail.len >= self.file_bytes_max {
            tail.leave();
        }
        self.check_fence()?;
        let file = self.file_to_append_to(&mut tail)?;
        let path = self.path(tail.current.unwrap_or(1));
        // A record is one write; should it tear, its line is cut off before the next one is written.
        let len = tail.len;
        let written = file
            .write_at(line.as_bytes(), len)
            .and_then(|()| file.sync_data())
            .map_err(Error::io("append to the audit log", &path));
        if let Err(error) = written {
            tail.file = None;
            return Err(error);
        }
        self.check_fence()?;
        tail.len += line.len() as u64;
        tail.file = Some(file);
        tail.head = AuditHead { number: record.number, tag };
        Ok(record.number)
    }

    fn check_fence(&self) -> Result<()> {
        self.fence.as_ref().map_or(Ok(()), |fence| fence.check())
    }

    /// The current file, or the next one where it may not be continued.
    fn file_to_append_to(&self, tail: &mut Tail) -> Result<Arc<dyn DiskFile>> {
        if let Some(number) = tail.current {
            let path = self.path(number);
            let open = || -> std::io::Result<Option<Arc<dyn DiskFile>>> {
                if !self.may_continue(&path)? {
                    return Ok(None);
                }
                match tail.file.clone() {
                    Some(file) => Ok(Some(file)),
                    None => self.reopen(&path, tail.len),
                }
            };
            match open() {
                Ok(Some(file)) => return Ok(file),
                Err(error) if !is_no_file(&error) => return Err(Error::io("open the audit log", &path)(error)),
                _ => tail.leave(),
            }
        }
        self.next_file(tail)
    }

    /// Whether a file that is part of the log may take more records, and what a crash tore at its end may be cut off.
    fn may_continue(&self, path: &Path) -> std::io::Result<bool> {
        // A second name means that a copy was made by linking: a record added here would change the copy.
        Ok(self.disk.stat(path)?.is_some_and(|stat| stat.kind == FileKind::File && stat.links == 1))
    }

    /// Opens a file of the log to write behind its `len` bytes of records. `None` if it has become shorter.
    fn reopen(&self, path: &Path, len: u64) -> std::io::Result<Option<Arc<dyn DiskFile>>> {
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

    /// Begins the next file, under the first name above the files so far that is free or has an empty file. Should no name above them
    /// be free, it is one below them.
    fn next_file(&self, tail: &mut Tail) -> Result<Arc<dyn DiskFile>> {
        let names = self.names()?;
        let above = tail.after.saturating_add(1);
        for number in (above..=u32::MAX).chain(1..above) {
            let path = self.path(number);
            let usable = match names.get(&number) {
                None => self.create(&path),
                Some(true) => self.reuse(&path),
                Some(false) => Ok(None),
            };
            let Some(file) = usable.map_err(Error::io("open the audit log", &path))? else { continue };
            // The process that made an empty file may have died before this.
            self.disk.sync_dir(&self.dir).map_err(Error::io("sync", &self.dir))?;
            tail.current = Some(number);
            tail.file = Some(Arc::clone(&file));
            tail.len = 0;
            return Ok(file);
        }
        Err(Error::TooMany { what: "files in the audit log", limit: u64::from(u32::MAX) })
    }

    /// Makes a file of the log. `None` if the name is taken by now.
    fn create(&self, path: &Path) -> std::io::Result<Option<Arc<dyn DiskFile>>> {
        match self.disk.open(path, OpenMode::CreateNew) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(None),
            file => file.map(Some),
        }
    }

    /// Opens a file that a crash left empty. `None` if it is not such a file.
    fn reuse(&self, path: &Path) -> std::io::Result<Option<Arc<dyn DiskFile>>> {
        if self.disk.stat(path)?.is_none_or(|stat| stat.len > 0) || !self.may_continue(path)? {
            return Ok(None);
        }
        let file = match self.disk.open(path, OpenMode::ReadWrite) {
            Err(error) if is_no_file(&error) => return Ok(None),
            file => file?,
        };
        Ok((file.len()? == 0).then_some(file))
    }

    /// Records that access to a key was lost or is back, unless the log says so already, be it by another process. Of one key at most
    /// [`TRANSITIONS_MAX`] are recorded in an hour; the others are counted, and the next record has their count.
    pub(crate) fn transition(
        &self,
        event: AuditEvent,
        logstore: (&LogstoreName, LogstoreId),
        detail: String,
    ) -> Result<()> {
        let detail = shortened(detail);
        let mut transitions = lock(&self.transitions);
        let transitions = transitions.get_or_insert_with(|| self.read_transitions());
        let (name, id) = logstore;
        let state = transitions.entry(id).or_default();
        let news = match (event, state.loss()) {
            (AuditEvent::Recovered, known) => known.is_some(),
            // How the KMS could not be reached may be said in many ways; it is one loss.
            (AuditEvent::LeaseEnded, Some((AuditEvent::LeaseEnded, before))) => kind(before) != kind(&detail),
            (event, Some((before, reason))) => event != before || detail != *reason,
            (_, None) => true,
        };
        if !news {
            return Ok(());
        }
        let now_us = self.clock.wall_us();
        if state.recent(now_us) < TRANSITIONS_MAX {
            let recorded = self.put(event, Some(logstore), &with_count(&detail, state.left_out));
            if recorded.is_ok() {
                state.recorded(event, detail, now_us);
                return Ok(());
            }
            if state.left_out == 0 {
                return recorded;
            }
        }
        if state.left_out == 0 {
            info!(logstore = %name, "the key changes its state so often that not every transition goes on record");
        }
        state.left_out += 1;
        state.latest = Some((event, detail, name.clone()));
        self.counters.audit_left_out.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Records in which state keys are whose last transition was left out, where the hour allows it.
    pub(crate) fn settle(&self) {
        let now_us = self.clock.wall_us();
        for (id, state) in lock(&self.transitions).iter_mut().flatten() {
            if state.latest.is_some() && state.recent(now_us) < TRANSITIONS_MAX {
                // What cannot be recorded now stays to be recorded.
                let _ = self.catch_up(*id, state);
            }
        }
    }

    /// Records the last transition that was left out, and how many were before it.
    fn catch_up(&self, id: LogstoreId, state: &mut KeyState) -> Result<()> {
        let Some((event, detail, name)) = state.latest.clone() else { return Ok(()) };
        self.put(event, Some((&name, id)), &with_count(&detail, state.left_out.saturating_sub(1)))?;
        state.recorded(event, detail, self.clock.wall_us());
        Ok(())
    }

    /// The state of every key as the log has it. As far as the log can be read: a damaged one is for [`AuditLog::walk`] to report.
    fn read_transitions(&self) -> Transitions {
        let mut transitions = Transitions::new();
        for part in self.scan().map(|scan| scan.parts).unwrap_or_default() {
            for line in self.front(part.number).map(|lines| lines.lines).unwrap_or_default() {
                if let Some(id) = line.record.logstore_id {
                    let detail = without_count(&line.record.detail);
                    follow(&mut transitions, line.record.event, id, detail, line.record.time_us);
                }
            }
        }
        transitions
    }

    /// All records, the chain verified from the first to the last, and against `heads` that were noted earlier.
    pub(crate) fn verified(&self, heads: &[&AuditHead]) -> Result<Vec<AuditRecord>> {
        let mut records = Vec::new();
        self.walk(heads, &mut |line| records.push(line.record))?;
        Ok(records)
    }

    /// Goes through the records, the chain verified from the first to the last, and against `heads` that were noted earlier. Stops
    /// at the first one that is not as it was written; those before it have been handed out.
    pub(crate) fn walk(&self, heads: &[&AuditHead], each: &mut dyn FnMut(Line)) -> Result<()> {
        let scan = self.scan()?;
        let mut count = 0;
        let mut previous = String::new();
        let mut version = 0;
        let mut seen = vec![false; heads.len()];
        let mut last_file = 0;
        // What follows the last record of the file before: no fault if the next file goes on behind that record.
        let mut torn = None;
        for (index, part) in scan.parts.iter().enumerate() {
            let path = self.path(part.number);
            let tampered = |offset| Error::Tampered { at: Location::new(&path, offset), what: "an audit record" };
            if part.first.record.number > count + 1 {
                return Err(torn.unwrap_or_else(|| self.gap(&scan, last_file, part, count)));
            }
            if part.number < last_file {
                return Err(tampered(0));
            }
            let lines = self.lines(part.number)?;
            // From there on a later file has the records. Those in this one were added by a writer after another one took over.
            let taken_over = scan.parts.get(index + 1).map_or(u64::MAX, |next| next.first.record.number);
            let mut fenced: Option<Line> = None;
            let fault = if lines.within > 0 {
                Some(lines.damage(&path))
            } else if index + 1 == scan.parts.len() {
                heads.iter().find_map(|head| lines.fault(head, &path))
            } else {
                None
            };
            let at = Location::new(&path, lines.valid_len);
            torn = if lines.damaged {
                Some(lines.damage(&path))
            } else {
                lines.torn.then(|| Error::truncated(at, "the end of an audit file"))
            };
            for line in lines.lines {
                let key = read(&self.keyring).audit_key(line.record.keyring_version)?;
                let (before, tag) = match &fenced {
                    Some(before) => (before.record.number, &before.tag),
                    None => (count, &previous),
                };
                let follows = line.record.number == before + 1 && line.record.keyring_version >= version;
                if !tag_holds(&key, &line, tag) || !follows {
                    return Err(tampered(line.offset));
                }
                if line.record.number >= taken_over {
                    fenced = Some(line);
                    continue;
                }
                version = line.record.keyring_version;
                for (seen, head) in seen.iter_mut().zip(heads) {
                    *seen |= head.number == line.record.number && head.tag == line.tag;
                }
                previous.clone_from(&line.tag);
                count += 1;
                each(line);
            }
            if let Some(fault) = fault {
                return Err(fault);
            }
            last_file = part.number;
        }
        let missing = heads.iter().zip(&seen).filter(|(head, seen)| head.number > 0 && !**seen).map(|(head, _)| head);
        let beyond = missing.clone().map(|head| head.number).max().filter(|number| *number > count);
        if let Some(number) = beyond {
            return Err(self.passed_over(&scan, last_file, u32::MAX, count + 1, number).unwrap_or_else(|| {
                let at = Location::new(self.path(last_file.max(1)), 0);
                Error::truncated(at, format!("the audit log ends at record {count}, it had {number}"))
            }));
        }
        if let Some(head) = missing.clone().next() {
            return Err(Error::RolledBack { what: format!("audit record {} is another than it was", head.number) });
        }
        // A file whose beginning is damaged may have records that are in no other.
        for other in scan.others.iter().filter(|other| matches!(other.why, Why::NoRecord)) {
            let lines = self.lines(other.number)?;
            if lines.within > count {
                return Err(lines.damage(&self.path(other.number)));
            }
        }
        match count {
            0 => Ok(()),
            _ => read(&self.keyring).check_accepted(
                version,
                &self.path(last_file),
                "the last record of the key audit log",
            ),
        }
    }

    /// What is wrong where `part` begins later than with the record after number `count`, which was the last one of file `last`.
    fn gap(&self, scan: &Scan, last: u32, part: &Part, count: u64) -> Error {
        if let Some(error) = self.passed_over(scan, last, part.number, count + 1, part.first.record.number - 1) {
            return error;
        }
        let path = self.path(part.number);
        let between = part.number.saturating_sub(last).saturating_sub(1);
        let has_names =
            last < part.number && scan.names.range(last + 1..part.number).count() as u64 == u64::from(between);
        if has_names || part.number < last {
            Error::Tampered { at: Location::new(path, 0), what: "an audit record" }
        } else {
            Error::truncated(Location::new(path, 0), "an audit file before this one is missing")
        }
    }

    /// Blames a file that is no part of the log for the records `first` to `last` that are missing, if there is one, rather than
    /// a removal: best one between the files `after` and `before`.
    fn passed_over(&self, scan: &Scan, after: u32, before: u32, first: u64, last: u64) -> Option<Error> {
        let mut others = scan.others.iter().filter(|other| other.may_have_records());
        let between = others.clone().find(|other| (after..=before).contains(&other.number));
        let other = between.or_else(|| others.next())?;
        let at = Location::new(self.path(other.number), 0);
        let what =
            format!("audit records {first} to {last} are missing, and a file of the log cannot be read: {}", other.why);
        Some(if matches!(other.why, Why::CutShort) { Error::truncated(at, what) } else { Error::corrupt(at, what) })
    }

    /// The records that a file begins with. Reads no further than to the first bytes that are none, so that a file costs little which
    /// is large and holds little.
    fn front(&self, number: u32) -> Result<Lines> {
        let path = self.path(number);
        let read = || -> std::io::Result<Lines> {
            let file = self.disk.open(&path, OpenMode::Read)?;
            let mut lines = Lines { lines: Vec::new(), valid_len: 0, torn: false, damaged: false, within: 0 };
            let mut bytes = vec![0; LINE_BYTES_MAX + 1];
            while lines.valid_len <= FILE_BYTES_MAX {
                let read = file.read_at(&mut bytes, lines.valid_len)?;
                let mut rest = bytes.get(..read).unwrap_or_default();
                while let Some(end) = memchr::memchr(b'\n', rest) {
                    let Some(line) = rest.get(..end).and_then(|line| parse_line(line, lines.valid_len)) else {
                        (lines.torn, lines.damaged) = (true, true);
                        return Ok(lines);
                    };
                    lines.lines.push(line);
                    lines.valid_len += end as u64 + 1;
                    rest = rest.get(end + 1..).unwrap_or_default();
                }
                // No record is as long as what has been read without an end.
                if read < bytes.len() || rest.len() == read {
                    lines.torn = !rest.is_empty();
                    break;
                }
            }
            Ok(lines)
        };
        read().map_err(Error::io("read the audit log", &path))
    }

    /// The records of a file, up to the first bytes that are none, and what is behind those.
    fn lines(&self, number: u32) -> Result<Lines> {
        let path = self.path(number);
        let bytes =
            io::read_file(&*self.disk, &path, FILE_BYTES_MAX).map_err(Error::io("read the audit log", &path))?;
        let mut lines = Lines { lines: Vec::new(), valid_len: 0, torn: false, damaged: false, within: 0 };
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let offset = lines.valid_len;
            let Some(end) = memchr::memchr(b'\n', rest) else {
                // A line that a crash cut off: it was never acknowledged.
                lines.torn = true;
                break;
            };
            let (line, after) = (&rest[..end], &rest[end + 1..]);
            match parse_line(line, offset) {
                Some(line) => lines.lines.push(line),
                None => {
                    (lines.torn, lines.damaged) = (true, true);
                    let behind = after.split(|&byte| byte == b'\n').filter_map(|line| parse_line(line, 0));
                    lines.within = behind.map(|line| line.record.number).max().unwrap_or(0);
                    break;
                }
            }
            rest = after;
            lines.valid_len += end as u64 + 1;
        }
        Ok(lines)
    }
}

fn tag_holds(key: &SecretKey, line: &Line, previous: &str) -> bool {
    let expected = hmac_sha256(key, &[previous.as_bytes(), line.json.as_bytes()]);
    hex_decode(&line.tag).is_some_and(|tag| tags_equal(&tag, &expected))
}
