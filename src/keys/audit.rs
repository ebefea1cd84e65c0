//! The key audit log: every transition of a key, chained and tagged.
//!
//! A record is a line: the JSON of it, a tab, its tag in hex, a tab, the CRC-32 of what precedes the last tab in hex, a newline. The
//! tag is HMAC-SHA-256 under a key from the service keyring over the tag before it and the JSON; so a record cannot be altered,
//! dropped from the middle or moved. The catalogue remembers how far the log was when it was last written.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{Deserialize, Serialize};
use tracing::{error, info};

use super::keyring::Keyring;
use crate::{
    Error, Result,
    config::LogstoreName,
    crypto::{hmac_sha256, tags_equal},
    error::Location,
    ids::{LogstoreId, hex_decode, hex_encode},
    io::{self, Clock, Disk, DiskFile, OpenMode},
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
    /// The envelopes were wrapped anew under the current wrapping key.
    Rewrapped,
    /// The envelopes of many Logstores are being wrapped anew; the detail says of which.
    RewrapBegun,
    /// They have all been wrapped anew.
    RewrapEnded,
    /// A new service-key version is about to be made.
    ServiceRotateIntended,
    /// A new service-key version is in use.
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
    /// The number of the current file.
    file_number: u32,
    file: Option<Arc<dyn DiskFile>>,
    len: u64,
    /// Whether the log goes on from what the catalogue knew of it when the store was opened.
    follows: bool,
}

/// The audit log of an open store.
pub(crate) struct AuditLog {
    disk: Arc<dyn Disk>,
    clock: Arc<dyn Clock>,
    keyring: Arc<RwLock<Keyring>>,
    dir: PathBuf,
    file_bytes_max: u64,
    counters: Arc<Counters>,
    /// `None` until the log was read for them, when the first transition is to be recorded.
    losses: Mutex<Option<Losses>>,
    tail: Mutex<Tail>,
}

const LINE_BYTES_MAX: usize = 64 << 10;
/// What of a detail goes on record, in bytes: in JSON each may become six, and the line holds it all the same.
const DETAIL_BYTES_MAX: usize = 8 << 10;
const FILE_BYTES_MAX: u64 = 1 << 30;

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
    ) -> Self {
        let tail = Tail { head: AuditHead::default(), file_number: 1, file: None, len: 0, follows: true };
        Self { disk, clock, keyring, dir, file_bytes_max, counters, losses: Mutex::default(), tail: Mutex::new(tail) }
    }

    /// Finds where the log ends, to go on there, and whether `known` is in it. Reads the last file, and back to the one that has
    /// `known` in it. A damaged file is no reason not to open a store: the log goes on behind it, and [`AuditLog::verified`] tells.
    pub(crate) fn find_end(&self, known: &AuditHead) -> Result<()> {
        let numbers = self.files()?;
        let mut tail = lock(&self.tail);
        tail.file_number = numbers.last().copied().unwrap_or(1);
        tail.follows = known.number == 0;
        for (index, &number) in numbers.iter().enumerate().rev() {
            let is_last = index + 1 == numbers.len();
            let lines = self.lines(number).and_then(|lines| {
                // Which record is damaged in a file that has no other is known when the files before it have been read.
                let before = if index == 0 { 0 } else { known.number };
                lines.up_to(known, before, &self.path(number))
            });
            let lines = match lines {
                Err(Error::Corrupt { .. }) => {
                    if is_last {
                        (tail.file_number, tail.head) = (number.saturating_add(1), known.clone());
                    }
                    tail.follows = false;
                    break;
                }
                lines => lines?,
            };
            if is_last {
                tail.len = lines.valid_len;
            }
            if let (0, Some(line)) = (tail.head.number, lines.lines.last()) {
                tail.head = line.head();
            }
            tail.follows |= lines.lines.iter().any(|line| line.head() == *known);
            if tail.follows && tail.head.number > 0 {
                break;
            }
        }
        Ok(())
    }

    /// What a process wrote last that was killed may be in memory alone, or not even be on its way to the disk: unless the catalogue
    /// knows it, it is written once more and synced, before anything rests on it.
    pub(crate) fn make_durable(&self, known: &AuditHead) -> Result<()> {
        let mut tail = lock(&self.tail);
        if tail.head == *known || tail.len == 0 {
            return Ok(());
        }
        let path = self.path(tail.file_number);
        let lines = self.lines(tail.file_number)?;
        let Some(last) = lines.lines.last() else { return Ok(()) };
        let file = self.open_file(&path, tail.len)?;
        file.write_at(encode_line(&last.json, &last.tag).as_bytes(), last.offset)
            .and_then(|()| file.sync_data())
            .map_err(Error::io("sync the audit log", &path))?;
        tail.file = Some(file);
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
        for number in self.files()? {
            let from = self.path(number);
            let to = self.dir.join(format!("{why}-{number:06}.log"));
            self.disk.rename(&from, &to).map_err(Error::io("rename", &from))?;
        }
        self.disk.sync_dir(&self.dir).map_err(Error::io("sync", &self.dir))?;
        *tail = Tail { head: AuditHead::default(), file_number: 1, file: None, len: 0, follows: true };
        drop(tail);
        *lock(&self.losses) = None;
        Ok(())
    }

    fn path(&self, number: u32) -> PathBuf {
        self.dir.join(format!("audit-{number:06}.log"))
    }

    fn files(&self) -> Result<Vec<u32>> {
        let mut numbers: Vec<u32> = self
            .disk
            .list_dir(&self.dir)
            .map_err(Error::io("list", &self.dir))?
            .iter()
            .filter_map(|entry| entry.name.strip_prefix("audit-")?.strip_suffix(".log")?.parse().ok())
            .collect();
        numbers.sort_unstable();
        Ok(numbers)
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
        self.put(event, logstore, &detail)?;
        if let Some(losses) = &mut *lock(&self.losses) {
            follow(losses, event, logstore.map(|(_, id)| id), &detail);
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
        let (keyring_version, key) = {
            let keyring = read(&self.keyring);
            (keyring.newest(), keyring.audit_key(keyring.newest())?)
        };
        let mut tail = lock(&self.tail);
        let record = AuditRecord {
            number: tail.head.number + 1,
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
            tail.file_number += 1;
            tail.file = None;
            tail.len = 0;
        }
        let path = self.path(tail.file_number);
        let file = match tail.file.clone() {
            Some(file) => file,
            None => self.open_file(&path, tail.len)?,
        };
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
        tail.len += line.len() as u64;
        tail.file = Some(file);
        tail.head = AuditHead { number: record.number, tag };
        Ok(record.number)
    }

    fn open_file(&self, path: &Path, len: u64) -> Result<Arc<dyn DiskFile>> {
        let open = || -> std::io::Result<Arc<dyn DiskFile>> {
            if self.disk.stat(path)?.is_none() {
                let file = self.disk.open(path, OpenMode::CreateNew)?;
                self.disk.sync_dir(&self.dir)?;
                return Ok(file);
            }
            let file = self.disk.open(path, OpenMode::ReadWrite)?;
            if file.len()? != len {
                file.set_len(len)?;
            }
            if len == 0 {
                // Whoever made it may not have got round to this.
                self.disk.sync_dir(&self.dir)?;
            }
            Ok(file)
        };
        open().map_err(Error::io("open the audit log", path))
    }

    /// Records that access to a key was lost or is back, unless the log says so already, be it by another process.
    pub(crate) fn transition(
        &self,
        event: AuditEvent,
        logstore: (&LogstoreName, LogstoreId),
        detail: String,
    ) -> Result<()> {
        let detail = shortened(detail);
        let mut losses = lock(&self.losses);
        let losses = losses.get_or_insert_with(|| self.read_losses());
        let known = losses.get(&logstore.1);
        let news = match (event, known) {
            (AuditEvent::Recovered, known) => known.is_some(),
            // How the KMS could not be reached may be said in many ways; it is one loss.
            (AuditEvent::LeaseEnded, Some((AuditEvent::LeaseEnded, before))) => kind(before) != kind(&detail),
            (event, Some((before, reason))) => event != *before || detail != *reason,
            (_, None) => true,
        };
        if news {
            self.put(event, Some(logstore), &detail)?;
            follow(losses, event, Some(logstore.1), &detail);
        }
        Ok(())
    }

    /// The Logstores whose last transition on record is a loss, and which. As far as the log can be read: a damaged one is for
    /// [`AuditLog::walk`] to tell of.
    fn read_losses(&self) -> Losses {
        let mut losses = Losses::new();
        for number in self.files().unwrap_or_default() {
            for line in self.lines(number).map(|lines| lines.lines).unwrap_or_default() {
                follow(&mut losses, line.record.event, line.record.logstore_id, &line.record.detail);
            }
        }
        losses
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
        let numbers = self.files()?;
        let mut count = 0;
        let mut previous = String::new();
        let mut seen = vec![false; heads.len()];
        for (index, &number) in numbers.iter().enumerate() {
            if number as usize != index + 1 {
                return Err(Error::truncated(
                    Location::new(self.path(number), 0),
                    "an audit file before this one is missing",
                ));
            }
            let is_last = index + 1 == numbers.len();
            let lines = self.lines(number)?;
            let path = self.path(number);
            let fault = if is_last {
                let missed = heads.iter().find_map(|head| lines.fault(head, count, &path));
                missed.or_else(|| lines.within.then(|| lines.damage(&path)))
            } else if lines.damaged {
                Some(lines.damage(&path))
            } else {
                let at = Location::new(&path, lines.valid_len);
                lines.torn.then(|| Error::truncated(at, "the end of an audit file"))
            };
            for line in lines.lines {
                let at = || Location::new(self.path(number), line.offset);
                let key = read(&self.keyring).audit_key(line.record.keyring_version)?;
                let expected = hmac_sha256(&key, &[previous.as_bytes(), line.json.as_bytes()]);
                let right = hex_decode(&line.tag).is_some_and(|tag| tags_equal(&tag, &expected));
                if !right || line.record.number != count + 1 {
                    return Err(Error::Tampered { at: at(), what: "an audit record" });
                }
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
        }
        if let Some((head, _)) = heads.iter().zip(&seen).find(|(head, seen)| head.number > 0 && !**seen) {
            return Err(if head.number > count {
                let at = Location::new(self.path(numbers.last().copied().unwrap_or(1)), 0);
                Error::truncated(at, format!("the audit log ends at record {count}, it had {}", head.number))
            } else {
                Error::RolledBack { what: format!("audit record {} is another than it was", head.number) }
            });
        }
        Ok(())
    }

    fn lines(&self, number: u32) -> Result<Lines> {
        let path = self.path(number);
        let bytes =
            io::read_file(&*self.disk, &path, FILE_BYTES_MAX).map_err(Error::io("read the audit log", &path))?;
        let mut lines = Lines { lines: Vec::new(), valid_len: 0, torn: false, damaged: false, within: false };
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
                    lines.within = after.split(|&byte| byte == b'\n').any(|line| parse_line(line, 0).is_some());
                    break;
                }
            }
            rest = after;
            lines.valid_len += end as u64 + 1;
        }
        Ok(lines)
    }
}

struct Lines {
    lines: Vec<Line>,
    valid_len: u64,
    /// What follows the last record is none.
    torn: bool,
    /// And it is not just cut off: it ends as a record does.
    damaged: bool,
    /// There are records behind what is damaged. A record is one write, and synced before the next one: a crash may have lost any
    /// part of the last one, and of no other.
    within: bool,
}

impl Lines {
    /// The same, unless what is damaged was durable once, as whoever remembers a later record knows: then no crash has torn it.
    /// `before` is the number of the last record in the files before this one.
    fn up_to(self, known: &AuditHead, before: u64, path: &Path) -> Result<Self> {
        self.fault(known, before, path).map_or(Ok(self), Err)
    }

    fn fault(&self, known: &AuditHead, before: u64, path: &Path) -> Option<Error> {
        let missed = self.lines.last().map_or(before, |line| line.record.number) < known.number;
        (self.damaged && (self.within || missed)).then(|| self.damage(path))
    }

    fn damage(&self, path: &Path) -> Error {
        Error::corrupt(Location::new(path, self.valid_len), "an audit record is damaged")
    }
}

/// The last loss of each Logstore whose key has not come back since: the event and its detail.
type Losses = BTreeMap<LogstoreId, (AuditEvent, String)>;

/// What a record says of losses.
fn follow(losses: &mut Losses, event: AuditEvent, logstore: Option<LogstoreId>, detail: &str) {
    let Some(logstore) = logstore else { return };
    match event {
        AuditEvent::Revoked | AuditEvent::LeaseEnded => {
            losses.insert(logstore, (event, detail.to_owned()));
        }
        // Nobody replaces a key that cannot be used.
        AuditEvent::Recovered | AuditEvent::Replaced | AuditEvent::Deleted => {
            losses.remove(&logstore);
        }
        _ => {}
    }
}

/// As much of a detail as goes on record.
fn shortened(mut detail: String) -> String {
    if detail.len() > DETAIL_BYTES_MAX {
        let end = (0..=DETAIL_BYTES_MAX).rev().find(|&end| detail.is_char_boundary(end));
        detail.truncate(end.unwrap_or(0));
        detail.push('…');
    }
    detail
}

/// The word that the detail of an ended lease begins with.
fn kind(detail: &str) -> &str {
    detail.split(':').next().unwrap_or_default()
}

/// A record as it stands in the log.
pub(crate) struct Line {
    offset: u64,
    pub(crate) json: String,
    pub(crate) record: AuditRecord,
    pub(crate) tag: String,
}

impl Line {
    fn head(&self) -> AuditHead {
        AuditHead { number: self.record.number, tag: self.tag.clone() }
    }
}

fn encode_line(json: &str, tag: &str) -> String {
    let body = format!("{json}\t{tag}");
    let crc = crc32fast::hash(body.as_bytes());
    format!("{body}\t{crc:08x}\n")
}

fn parse_line(line: &[u8], offset: u64) -> Option<Line> {
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

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "the tests damage files")]
mod tests {
    use std::fs;

    use super::*;
    use crate::{
        ids::StoreId,
        io::{RealDisk, SystemClock},
    };

    fn log(dir: &Path, file_bytes_max: u64) -> AuditLog {
        let keyring = Keyring::for_tests(&dir.join("keyring"), StoreId::from_bytes([1; 16]));
        let (disk, clock, counters) = (Arc::new(RealDisk), Arc::new(SystemClock), Arc::default());
        AuditLog::new(disk, clock, Arc::new(RwLock::new(keyring)), dir.to_owned(), file_bytes_max, counters)
    }

    /// The log as the next opener finds it, whose catalogue remembers `known`.
    fn reopened(log: &AuditLog, known: &AuditHead) -> AuditLog {
        let (disk, clock, keyring) = (Arc::clone(&log.disk), Arc::clone(&log.clock), Arc::clone(&log.keyring));
        let log = AuditLog::new(disk, clock, keyring, log.dir.clone(), log.file_bytes_max, Arc::default());
        log.find_end(known).unwrap();
        log
    }

    fn details(records: &[AuditRecord]) -> Vec<&str> {
        records.iter().map(|record| record.detail.as_str()).collect()
    }

    #[test]
    fn the_chain_goes_on_over_files_and_openings() {
        let dir = tempfile::tempdir().unwrap();
        let mut audit = log(dir.path(), 700);
        for n in 0..20 {
            if n % 6 == 0 {
                audit = reopened(&audit, &audit.head());
            }
            audit.record(AuditEvent::Rotated, None, n.to_string()).unwrap();
        }
        assert!(audit.files().unwrap().len() > 3);
        let records = audit.verified(&[&audit.head(), &AuditHead::default()]).unwrap();
        assert_eq!(records.len(), 20);
        assert!(records.iter().enumerate().all(|(n, record)| record.detail == n.to_string()));
        // Another log that is as long or longer, and one that was longer.
        for number in [1, 20] {
            let other = AuditHead { number, tag: "5a".repeat(32) };
            assert!(matches!(audit.verified(&[&other]), Err(Error::RolledBack { .. })), "{number}");
        }
        let longer = AuditHead { number: 21, tag: "5a".repeat(32) };
        assert!(matches!(audit.verified(&[&longer]), Err(Error::Truncated { .. })));
    }

    #[test]
    fn every_change_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let audit = log(dir.path(), 1 << 20);
        for n in 0..3 {
            audit.record(AuditEvent::Created, None, n.to_string()).unwrap();
        }
        let (head, path) = (audit.head(), audit.path(1));
        let good = fs::read(&path).unwrap();
        let check = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            audit.verified(&[&head])
        };
        for byte in 0..good.len() {
            let mut bad = good.clone();
            bad[byte] ^= 0x10;
            assert!(check(&bad).is_err(), "byte {byte}");
            assert!(
                matches!(check(&good[..byte]), Err(Error::Truncated { .. } | Error::Corrupt { .. })),
                "cut at {byte}"
            );
        }
        // A record taken out, two swapped, and one altered along with its CRC.
        let lines: Vec<&[u8]> = good.split_inclusive(|&byte| byte == b'\n').collect();
        assert!(matches!(check(&[lines[0], lines[2]].concat()), Err(Error::Tampered { .. })));
        assert!(matches!(check(&[lines[1], lines[0], lines[2]].concat()), Err(Error::Tampered { .. })));
        let text = std::str::from_utf8(lines[2]).unwrap().trim_end();
        let (body, _) = text.rsplit_once('\t').unwrap();
        let forged = body.replace("created", "rotated");
        let forged = format!("{forged}\t{:08x}\n", crc32fast::hash(forged.as_bytes()));
        assert!(matches!(check(&[lines[0], lines[1], forged.as_bytes()].concat()), Err(Error::Tampered { .. })));
        // The records in front of what is damaged are sound, and handed out as that.
        for damaged in 0..3 {
            let mut bad = good.clone();
            bad[lines[..damaged].concat().len() + 5] ^= 1;
            fs::write(&path, bad).unwrap();
            for heads in [&[][..], &[&head]] {
                let mut sound = 0;
                let walked = audit.walk(heads, &mut |_| sound += 1);
                assert!(
                    matches!(walked, Err(Error::Corrupt { .. })) || (damaged == 2 && heads.is_empty()),
                    "{walked:?}"
                );
                assert_eq!(sound, damaged);
            }
        }
        assert_eq!(check(&good).unwrap().len(), 3);
    }

    #[test]
    fn a_torn_record_is_cut_off_and_the_chain_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let audit = log(dir.path(), 1 << 20);
        audit.record(AuditEvent::Created, None, "kept").unwrap();
        let path = audit.path(1);
        let mut torn = fs::read(&path).unwrap();
        torn.extend_from_slice(b"{\"number\":2,\"time");
        // It may be longer than the record that comes in its place.
        torn.resize(4096, b' ');
        fs::write(&path, torn).unwrap();
        let audit = reopened(&audit, &audit.head());
        audit.record(AuditEvent::Deleted, None, "after").unwrap();
        assert_eq!(details(&audit.verified(&[]).unwrap()), ["kept", "after"]);
        assert!(fs::read(&path).unwrap().ends_with(b"\n"), "nothing of it is left");
    }

    #[test]
    fn a_detail_of_any_length_leaves_a_log_that_can_be_read() {
        let dir = tempfile::tempdir().unwrap();
        let audit = log(dir.path(), 1 << 20);
        // What JSON writes in six bytes, and a character that the limit falls into.
        let long = ["\u{1}".repeat(100_000), format!("{}€", "x".repeat(DETAIL_BYTES_MAX - 1))];
        for detail in &long {
            audit.record(AuditEvent::Created, None, detail.clone()).unwrap();
        }
        let records = reopened(&audit, &audit.head()).verified(&[&audit.head()]).unwrap();
        assert_eq!(records.len(), 2);
        assert!(records.iter().zip(&long).all(|(record, detail)| {
            let kept = record.detail.strip_suffix('…').unwrap();
            detail.starts_with(kept) && kept.len() > DETAIL_BYTES_MAX - 4
        }));
        let longest = "x".repeat(DETAIL_BYTES_MAX);
        assert_eq!(shortened(longest.clone()), longest);
    }

    #[test]
    fn a_line_is_read_up_to_the_limit_and_no_further() {
        let dir = tempfile::tempdir().unwrap();
        let audit = log(dir.path(), 1 << 20);
        audit.record(AuditEvent::Created, None, "x").unwrap();
        let json = audit.lines(1).unwrap().lines.remove(0).json;
        let padded = |len: usize| {
            let shorter = encode_line(&json, "").len() - 1;
            encode_line(&json.replace("\"x\"", &format!("\"x{}\"", "y".repeat(len - shorter))), "")
        };
        for (len, read) in [(LINE_BYTES_MAX, true), (LINE_BYTES_MAX + 1, false), (LINE_BYTES_MAX + 2, false)] {
            let line = padded(len);
            let line = line.trim_end().as_bytes();
            assert_eq!((line.len(), parse_line(line, 0).is_some()), (len, read));
        }
    }

    #[test]
    fn what_is_known_of_it_is_found_in_whichever_file() {
        let dir = tempfile::tempdir().unwrap();
        let audit = log(dir.path(), 700);
        let mut heads = vec![AuditHead::default()];
        for n in 0..16 {
            audit.record(AuditEvent::Rotated, None, n.to_string()).unwrap();
            heads.push(audit.head());
        }
        let end = audit.head();
        assert!(audit.files().unwrap().len() > 3);
        let found = |known: &AuditHead| {
            let again = reopened(&audit, known);
            assert_eq!((again.head(), again.head_after(known)), (end.clone(), end.clone()));
        };
        heads.iter().for_each(found);
        // A crash left a new file behind that has nothing in it yet.
        fs::write(audit.path(audit.files().unwrap().len() as u32 + 1), b"").unwrap();
        heads.iter().for_each(found);
        // What it does not have stays to be missed, while it goes on.
        for number in [1, 8, 16, 17] {
            let missing = AuditHead { number, tag: "5a".repeat(32) };
            let again = reopened(&audit, &missing);
            assert_eq!((again.head(), again.head_after(&missing)), (end.clone(), missing));
        }
        // What is older than what is known is not looked at.
        let mut damaged = fs::read(audit.path(1)).unwrap();
        damaged[5] ^= 1;
        fs::write(audit.path(1), damaged).unwrap();
        heads[15..].iter().for_each(found);
    }

    #[test]
    fn whether_a_damaged_first_record_of_a_file_was_ever_there_is_known_by_what_came_before() {
        let dir = tempfile::tempdir().unwrap();
        let audit = log(dir.path(), 1);
        audit.record(AuditEvent::Created, None, "kept").unwrap();
        let known = audit.head();
        // A crash lost a part of a record that nobody was told of.
        fs::write(audit.path(2), b"{\"number\":2,\0\0\0\n").unwrap();
        let again = reopened(&audit, &known);
        assert_eq!((again.head(), again.head_after(&known)), (known.clone(), known.clone()));
        again.record(AuditEvent::Deleted, None, "after").unwrap();
        assert_eq!(details(&again.verified(&[&known]).unwrap()), ["kept", "after"]);
        // This one was there: it is left as it is, for verification to find.
        let damaged = b"{\"number\":1,\0\0\0\n";
        fs::write(audit.path(1), damaged).unwrap();
        fs::remove_file(audit.path(2)).unwrap();
        let again = reopened(&audit, &known);
        assert_eq!(again.head(), known);
        again.record(AuditEvent::Deleted, None, "after").unwrap();
        assert_eq!(fs::read(audit.path(1)).unwrap(), damaged);
        assert!(matches!(again.verified(&[&known]), Err(Error::Corrupt { .. })));
    }
}
