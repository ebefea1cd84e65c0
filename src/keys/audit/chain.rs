//! The chain of records: finds its end, and verifies it from the first record to the last.

use std::sync::Arc;

use super::{
    files::{AuditFiles, Other, Part, Scan, Why},
    line::{Line, Lines},
    record::AuditHead,
};
use crate::{
    Error, Result,
    crypto::{SecretKey, hmac_sha256, tags_equal},
    error::Location,
    ids::hex_decode,
    keys::service_key::ServiceKey,
};

/// Where the log ends, and where the next record goes.
#[derive(Clone)]
pub(super) struct End {
    pub(super) head: AuditHead,
    /// The number of the file that takes the next record, if one is known to be part of the log.
    pub(super) current: Option<u32>,
    /// Without a current file, the next file gets a number above this one.
    pub(super) after: u32,
    /// Up to where the current file has records.
    pub(super) len: u64,
    /// Whether the log continues the records that the catalogue knew when the store was opened.
    pub(super) follows: bool,
}

impl End {
    /// The end of a log without a record.
    pub(super) fn empty() -> Self {
        Self { head: AuditHead::default(), current: None, after: 0, len: 0, follows: true }
    }

    /// Ends the current file. The next record goes into another one.
    pub(super) fn leave(&mut self) {
        self.after = self.after.max(self.current.take().unwrap_or(0));
        self.len = 0;
    }
}

/// The records of all files, and the service key that checks their tags.
pub(super) struct Chain {
    pub(super) files: AuditFiles,
    pub(super) service: Arc<ServiceKey>,
}

impl Chain {
    /// Finds where the log ends and whether `known` is in it. Reads the first record of every file,
    /// the file with `known`, and the files behind it.
    ///
    /// A damaged log does not keep a store from being opened: the log continues behind the damage,
    /// and [`Chain::walk`] reports it.
    ///
    /// # Errors
    /// An error of the disk. To continue elsewhere would fork the chain.
    pub(super) fn find_end(&self, known: &AuditHead) -> Result<End> {
        let Scan { parts, others, .. } = self.files.scan()?;
        let mut last = self.part_with(known, &parts)?;
        let found = last.is_some() || known.number == 0;
        let mut head = last.as_ref().and_then(|(_, lines)| lines.head()).unwrap_or_default();
        if found {
            let mut rest: Vec<&Part> = parts.iter().collect();
            while let Some(next) = rest.iter().position(|part| self.goes_on(&part.first, &head)) {
                let part = rest.remove(next);
                let mut lines = self.files.lines(part.number)?;
                let before = last.as_ref().and_then(|(_, lines)| lines.lines.last());
                self.distrust(
                    &mut lines,
                    &head,
                    before.map_or(0, |line| line.record.keyring_version),
                );
                self.cut_where_another_goes_on(&mut lines, part.number, &parts);
                head = lines.head().unwrap_or(head);
                last = Some((part.number, lines));
            }
        } else if let Some(part) = parts.last() {
            let lines = self.files.lines(part.number)?;
            head = lines.head().unwrap_or_default();
            last = Some((part.number, lines));
        }
        let mut end = End::empty();
        end.follows = found;
        end.after = last.as_ref().map_or(0, |(number, _)| *number);
        let fault = |(number, lines): &(u32, Lines)| lines.fault(known, &self.files.path(*number));
        let damaged = last.as_ref().and_then(fault).is_some();
        let missing = !found && head.number < known.number;
        if damaged || (missing && others.iter().any(Other::may_have_records)) {
            // These files may hold the missing records, so they stay as they are.
            end.head = if head.number > known.number { head } else { known.clone() };
            end.follows &= !damaged;
        } else {
            end.head = head;
            end.current = last.as_ref().map(|(number, _)| *number);
            end.len = last.map_or(0, |(_, lines)| lines.valid_len);
        }
        if found {
            self.pass_records_behind_a_gap(&mut end, &parts)?;
        }
        Ok(end)
    }

    /// The file that has the record `known`, and its records as far as they can be trusted.
    fn part_with(&self, known: &AuditHead, parts: &[Part]) -> Result<Option<(u32, Lines)>> {
        for part in parts.iter().rev().filter(|part| part.first.record.number <= known.number) {
            if self.files.front(part.number)?.lines.iter().any(|line| line.head() == *known) {
                let mut lines = self.files.lines(part.number)?;
                self.distrust(&mut lines, known, 0);
                self.cut_where_another_goes_on(&mut lines, part.number, parts);
                return Ok(Some((part.number, lines)));
            }
        }
        Ok(None)
    }

    /// Moves the end behind records that follow a gap: their numbers are in use.
    fn pass_records_behind_a_gap(&self, end: &mut End, parts: &[Part]) -> Result<()> {
        for part in parts {
            if part.first.record.number <= end.head.number {
                continue;
            }
            let lines = self.files.front(part.number)?;
            let beyond = lines.head().filter(|head| head.number > end.head.number);
            if let Some(head) = beyond.filter(|_| self.is_ours(&lines)) {
                end.leave();
                end.after = end.after.max(part.number);
                end.head = head;
                end.follows = false;
            }
        }
        Ok(())
    }

    /// Drops the records that a later file has too, with other contents. A writer begins a new file
    /// when it takes over from a writer that may still run. Records that the earlier writer adds to
    /// the old file afterwards were never acknowledged.
    fn cut_where_another_goes_on(&self, lines: &mut Lines, number: u32, parts: &[Part]) {
        let later = parts.iter().filter(|part| part.number > number);
        for first in later.map(|part| &part.first).filter(|first| first.record.number > 1) {
            let is_before = |line: &Line| line.record.number + 1 == first.record.number;
            let before = lines.lines.iter().position(is_before);
            let Some(at) = before.filter(|at| at + 1 < lines.lines.len()) else { continue };
            if lines.lines.get(at).is_some_and(|line| self.is_tagged(first, &line.tag)) {
                lines.cut(at + 1);
            }
        }
    }

    /// Whether `line` is the record that follows `head`.
    fn goes_on(&self, line: &Line, head: &AuditHead) -> bool {
        Some(line.record.number) == head.number.checked_add(1) && self.is_tagged(line, &head.tag)
    }

    /// Whether the tag of `line` holds behind a record whose tag is `previous`.
    fn is_tagged(&self, line: &Line, previous: &str) -> bool {
        let key = self.service.keyring().audit_key(line.record.keyring_version);
        key.is_ok_and(|key| tag_holds(&key, line, previous))
    }

    /// Whether the last record of a file is of this log, as far as it can be checked without the
    /// file before. A record alone proves nothing: an attacker can write it, and no record behind
    /// it could ever be verified.
    fn is_ours(&self, lines: &Lines) -> bool {
        let accepts = self.service.keyring().accepts();
        match &lines.lines[..] {
            [.., before, last] if last.record.keyring_version >= accepts => {
                self.is_tagged(last, &before.tag)
            }
            _ => false,
        }
    }

    /// Counts the records behind `head` as damage, from the first one whose tag does not hold, or
    /// whose version of the service key is retired or below that of the record before it. Others
    /// can write such a record, and no record behind it could ever be verified. A rotation retires
    /// a version only when the catalogue knows a record under a newer one.
    ///
    /// `version` is that of the record before these, if it is in another file.
    fn distrust(&self, lines: &mut Lines, head: &AuditHead, version: u32) {
        // The tag of `head` proves the records up to it.
        let known = lines.lines.iter().position(|line| line.head() == *head);
        let mut previous = head.tag.as_str();
        let before = known.and_then(|at| lines.lines.get(at));
        let version = before.map_or(version, |line| line.record.keyring_version);
        let mut version = version.max(self.service.keyring().accepts());
        let mut forged = None;
        for (at, line) in lines.lines.iter().enumerate().skip(known.map_or(0, |at| at + 1)) {
            if !self.is_tagged(line, previous) || line.record.keyring_version < version {
                forged = Some(at);
                break;
            }
            previous = &line.tag;
            version = line.record.keyring_version;
        }
        if let Some(forged) = forged {
            let behind = lines.cut(forged);
            let numbers = behind.iter().map(|line| line.record.number);
            lines.within = numbers.fold(lines.within, u64::max).max(1);
            lines.damaged = true;
        }
    }

    /// Calls `each` with the records in order, and verifies the chain from the first to the last
    /// and against `heads` that were noted earlier.
    ///
    /// # Errors
    /// The first record that is not as it was written. `each` has seen the records before it.
    pub(super) fn walk(&self, heads: &[&AuditHead], each: &mut dyn FnMut(Line)) -> Result<()> {
        let scan = self.files.scan()?;
        let mut walk = Walk {
            chain: self,
            scan: &scan,
            heads,
            seen: vec![false; heads.len()],
            count: 0,
            previous: String::new(),
            version: 0,
            last_file: 0,
            torn: None,
        };
        for (index, part) in scan.parts.iter().enumerate() {
            walk.part(index, part, each)?;
        }
        walk.finish()
    }
}

/// A verification of the chain, as far as it has come.
struct Walk<'a> {
    chain: &'a Chain,
    scan: &'a Scan,
    heads: &'a [&'a AuditHead],
    /// Which of `heads` the records have had.
    seen: Vec<bool>,
    /// The number of the last record, its tag, and its version of the service key.
    count: u64,
    previous: String,
    version: u32,
    /// The number of the file before.
    last_file: u32,
    /// The bytes behind the last record of that file. They are no fault if the next file continues
    /// behind that record.
    torn: Option<Error>,
}

impl Walk<'_> {
    /// Verifies the records of one file.
    fn part(&mut self, index: usize, part: &Part, each: &mut dyn FnMut(Line)) -> Result<()> {
        let path = self.chain.files.path(part.number);
        let tampered = |offset| tampered(Location::new(&path, offset));
        if part.first.record.number > self.count + 1 {
            let torn = self.torn.take();
            return Err(torn.unwrap_or_else(|| self.gap(part)));
        }
        if part.number < self.last_file {
            return Err(tampered(0));
        }
        let lines = self.chain.files.lines(part.number)?;
        // The next file has the records from this number on. A fenced writer added those here.
        let next = self.scan.parts.get(index + 1);
        let taken_over = next.map_or(u64::MAX, |next| next.first.record.number);
        let fault = match next {
            _ if lines.within > 0 => Some(lines.damage(&path)),
            None => self.heads.iter().find_map(|head| lines.fault(head, &path)),
            Some(_) => None,
        };
        let at = Location::new(&path, lines.valid_len);
        self.torn = match (lines.damaged, lines.torn) {
            (true, _) => Some(lines.damage(&path)),
            (false, true) => Some(Error::truncated(at, "the end of an audit file")),
            (false, false) => None,
        };
        let mut fenced: Option<Line> = None;
        for line in lines.lines {
            let key = self.chain.service.keyring().audit_key(line.record.keyring_version)?;
            let (before, tag) = match &fenced {
                Some(before) => (before.record.number, &before.tag),
                None => (self.count, &self.previous),
            };
            let version = line.record.keyring_version;
            let follows = line.record.number == before + 1 && version >= self.version;
            if !tag_holds(&key, &line, tag) || !follows {
                return Err(tampered(line.offset));
            }
            if line.record.number >= taken_over {
                fenced = Some(line);
            } else {
                self.record(line, each);
            }
        }
        self.last_file = part.number;
        fault.map_or(Ok(()), Err)
    }

    fn record(&mut self, line: Line, each: &mut dyn FnMut(Line)) {
        self.version = line.record.keyring_version;
        for (seen, head) in self.seen.iter_mut().zip(self.heads) {
            *seen |= head.number == line.record.number && head.tag == line.tag;
        }
        self.previous.clone_from(&line.tag);
        self.count += 1;
        each(line);
    }

    /// Verifies all files together, after each was verified by itself.
    fn finish(self) -> Result<()> {
        let (count, last_file, files) = (self.count, self.last_file, &self.chain.files);
        let missing = self.heads.iter().zip(&self.seen);
        let missing = missing.filter(|(head, seen)| head.number > 0 && !**seen);
        let missing: Vec<_> = missing.map(|(head, _)| head).collect();
        let furthest = missing.iter().map(|head| head.number).max();
        if let Some(number) = furthest.filter(|number| *number > count) {
            return Err(self.passed_over(last_file, u32::MAX, count + 1, number).unwrap_or_else(
                || {
                    let at = Location::new(files.path(last_file.max(1)), 0);
                    let what = format!("the audit log ends at record {count}, it had {number}");
                    Error::truncated(at, what)
                },
            ));
        }
        if let Some(head) = missing.first() {
            let what = format!("audit record {} is another than it was", head.number);
            return Err(Error::RolledBack { what });
        }
        // A file whose beginning is damaged may have records that no other file has.
        for other in self.scan.others.iter().filter(|other| matches!(other.why, Why::NoRecord)) {
            let lines = files.lines(other.number)?;
            if lines.within > count {
                return Err(lines.damage(&files.path(other.number)));
            }
        }
        match count {
            0 => Ok(()),
            _ => self.chain.service.keyring().check_accepted(
                self.version,
                &files.path(last_file),
                "the last record of the key audit log",
            ),
        }
    }

    /// The fault where `part` begins later than with the next record.
    fn gap(&self, part: &Part) -> Error {
        let (last, next) = (self.last_file, part.first.record.number);
        let passed_over = self.passed_over(last, part.number, self.count + 1, next - 1);
        if let Some(error) = passed_over {
            return error;
        }
        let at = Location::new(self.chain.files.path(part.number), 0);
        let between = part.number.saturating_sub(last).saturating_sub(1);
        let has_names = last < part.number
            && self.scan.names.range(last + 1..part.number).count() as u64 == u64::from(between);
        if has_names || part.number < last {
            tampered(at)
        } else {
            Error::truncated(at, "an audit file before this one is missing")
        }
    }

    /// The error that blames a file that cannot be read for the missing records `first` to `last`,
    /// if there is such a file. A file between the files `after` and `before` is preferred.
    fn passed_over(&self, after: u32, before: u32, first: u64, last: u64) -> Option<Error> {
        let mut others = self.scan.others.iter().filter(|other| other.may_have_records());
        let between = others.clone().find(|other| (after..=before).contains(&other.number));
        let other = between.or_else(|| others.next())?;
        let at = Location::new(self.chain.files.path(other.number), 0);
        let what = format!(
            "audit records {first} to {last} are missing, and a file of the log cannot be read: {}",
            other.why
        );
        Some(match other.why {
            Why::CutShort => Error::truncated(at, what),
            _ => Error::corrupt(at, what),
        })
    }
}

fn tampered(at: Location) -> Error {
    Error::Tampered { at, what: "an audit record" }
}

fn tag_holds(key: &SecretKey, line: &Line, previous: &str) -> bool {
    let expected = hmac_sha256(key, &[previous.as_bytes(), line.json.as_bytes()]);
    hex_decode(&line.tag).is_some_and(|tag| tags_equal(&tag, &expected))
}
