//! The read path: from a position in a shard to groups.

use std::{collections::VecDeque, sync::Arc};

use bytes::Bytes;

use super::{
    Shard,
    listing::SegmentRef,
    scanning::count,
    segment_reader::{Load, Refresh, SegmentReader},
    segments::{End, SegmentList},
};
use crate::{
    Error, ErrorKind, Result,
    crypto::wipe_shared,
    error::Location,
    group::{self, LogGroup},
    keys::gate::{InUse, KeptPlaintext},
    segment::{BlockHeader, BlockKind, DecodedHeader, entries},
    sync::{
        LockRank, Mutex,
        atomic::{AtomicUsize, Ordering},
        lock,
    },
};

/// The most ranges in [`Reader::lost`].
const LOST_RANGES_MAX: usize = 1024;

/// A place in a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Position {
    /// The oldest group there is.
    #[default]
    Begin,
    /// Behind the newest group there is.
    End,
    /// The group with this sequence number, or the first one after it. A reader that begins above the
    /// end of the shard fails with [`Error::AboveEnd`] when it gets there.
    Seq(u64),
    /// A receive time, in microseconds since the Unix epoch. To begin there means to leave out each
    /// group that was received earlier, to end there each group that was received at that time or
    /// later. Receive times go back where the clock was corrected.
    Time(u64),
}

/// How the bytes of sealed segments are fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum ReadMode {
    /// With positional reads: a bad sector or a truncated file is an error.
    #[default]
    Pread,
    /// From a map. If the file is truncated or the disk fails under it, the operating system ends
    /// the process with `SIGBUS`.
    ///
    /// Each block is copied out of the map before it is checked, since another process may write to
    /// the file. So a map saves one system call for each 256 KiB, but no copy, and each segment has
    /// to be mapped before it is read. A map pays only where system calls are expensive. Out of the
    /// page cache it is no faster: `cargo bench --bench engine -- read-mode` found 0.93 to 0.99 of
    /// the speed of positional reads in segments of 37 MiB (2 cores of an AMD EPYC, Linux, 29
    /// November 2026). The benchmark prints that ratio for the machine that it runs on.
    Map,
}

/// The range to read, and how.
///
/// ```
/// use envelog::{Position, ReadOptions};
/// let options = ReadOptions::default().from(Position::Seq(10)).max_groups(100);
/// # assert_eq!(options.max_groups, Some(100));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ReadOptions {
    /// Where to begin.
    pub from: Position,
    /// Where to end: the group there is not read. `None` reads as long as there is more.
    pub to: Option<Position>,
    /// The most groups to read; `None` is no limit.
    pub max_groups: Option<u64>,
    /// Ends once this many bytes of groups have been read; `None` is no limit.
    pub max_bytes: Option<u64>,
    /// How sealed segments are fetched.
    pub mode: ReadMode,
    /// Whether to continue behind groups that are lost or damaged, or whose data key was destroyed.
    /// Without it, a loss that no operator has accepted ends the reader with [`Error::Lost`], and a
    /// destroyed key with [`Error::Shredded`]. Forged data is always an error.
    pub skip_lost: bool,
}

impl ReadOptions {
    setters! {
        from: Position;
        to: Position, optional;
        max_groups: u64, optional;
        max_bytes: u64, optional;
        mode: ReadMode;
        skip_lost: bool;
    }
}

/// One group, or opaque record, as it was appended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Record {
    /// Its sequence number in the shard.
    pub seq: u64,
    /// When it was received, in microseconds since the Unix epoch.
    pub receive_time_us: u64,
    /// Whether it is a log group or opaque.
    pub kind: BlockKind,
    /// Its bytes, exactly as they were appended.
    pub bytes: Bytes,
}

impl Record {
    /// The log group, decoded.
    ///
    /// # Errors
    /// [`Error::InvalidGroup`] when the record is opaque.
    pub fn group(&self) -> Result<LogGroup> {
        Ok(LogGroup::decode_shared(self.bytes.clone())?)
    }
}

/// A range of sequence numbers in which groups cannot be read, and that a reader has passed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LostRange {
    /// The shard.
    pub shard: u32,
    /// No group before this sequence number is lost.
    pub from_seq: u64,
    /// No group from this sequence number on is lost. `None` if nothing behind the damage can be
    /// read.
    pub end_seq: Option<u64>,
    /// Whether an operator has accepted the loss ([`Admin::repair`](crate::Admin::repair)).
    pub accepted: bool,
    /// Whether the groups are there, and their data key was destroyed on purpose
    /// ([`Keys::shred_data_keys`](crate::Keys::shred_data_keys)).
    pub shredded: bool,
}

/// Consecutive groups of one block.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RecordBlock {
    /// The groups as a valid `LogGroupList` message (for opaque records: framed the same way),
    /// which can be sent on as it is.
    pub list: Bytes,
    /// The same groups one by one; they share the memory of `list`.
    pub records: Vec<Record>,
}

/// Limits how many readers, and how many followers, there may be at once.
#[derive(Clone, Debug)]
pub(crate) struct ReaderPermits {
    readers: Arc<Permits>,
    followers: Arc<Permits>,
}

impl ReaderPermits {
    pub(crate) fn new(readers_max: usize, followers_max: usize) -> Self {
        let new = |limit| Arc::new(Permits { limit, used: AtomicUsize::new(0) });
        Self { readers: new(readers_max), followers: new(followers_max) }
    }

    fn take(&self, follows: bool) -> Result<ReaderPermit> {
        let permits = if follows { &self.followers } else { &self.readers };
        let taken = permits.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
            (used < permits.limit).then(|| used + 1)
        });
        match taken {
            Ok(_) => Ok(ReaderPermit(Arc::clone(permits))),
            Err(_) => Err(Error::TooManyReaders { limit: permits.limit as u64 }),
        }
    }
}

#[derive(Debug)]
struct Permits {
    limit: usize,
    used: AtomicUsize,
}

/// Permission for one reader, returned when it is dropped.
#[derive(Debug)]
struct ReaderPermit(Arc<Permits>);

impl Drop for ReaderPermit {
    fn drop(&mut self) {
        self.0.used.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Reads a shard forward, group by group or block by block.
///
/// The iterator ends where the shard ends at that moment. [`Reader::try_next`] and
/// [`Reader::next_block`] continue after `Ok(None)` with the groups that were written since;
/// [`Logstore::follow`](crate::Logstore::follow) waits for them. After an error the reader has
/// ended. A reader sees groups that are at least `Written`. The lease of the key is checked for
/// every group, also for those read ahead.
pub struct Reader {
    list: Arc<SegmentList>,
    _permit: ReaderPermit,
    mode: ReadMode,
    skip_lost: bool,
    /// The losses that were passed.
    lost: Vec<LostRange>,
    /// The last segment that the reader entered, or tried to enter.
    at: Option<u64>,
    /// A lost segment: the reader continues in the segment behind it.
    passed: Option<u64>,
    next_seq: u64,
    /// Whether a record was returned.
    has_begun: bool,
    /// Groups received earlier are skipped.
    from_us: u64,
    /// Set while the segment to begin in must be found by time.
    seek_time: bool,
    end_seq: u64,
    /// Whether the caller chose a sequence number, and nothing was returned yet.
    from_seq: bool,
    /// One past the last sequence number that this process had given out when the reader was opened.
    given_out: u64,
    /// Groups received at this time or later are skipped.
    end_us: u64,
    /// Whether the rest of the current segment was received at `end_us` or later.
    past_end: bool,
    groups_left: u64,
    bytes_left: u64,
    cursor: Option<SegmentReader>,
    ahead: Arc<ReadAhead>,
    /// Keeps the key of the current segment from being destroyed as unused.
    in_use: Option<InUse>,
    ended: bool,
    /// Whether the iterator has returned `None`.
    exhausted: bool,
}

impl std::fmt::Debug for Reader {
    /// Omits the groups that were read ahead.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader")
            .field("shard", &self.list.shard())
            .field("next_seq", &self.next_seq)
            .field("ended", &self.ended)
            .finish_non_exhaustive()
    }
}

impl Reader {
    pub(crate) fn open(shard: &Shard, options: &ReadOptions) -> Result<Self> {
        Self::with(shard.permits().take(false)?, shard, options)
    }

    /// A reader that begins at a sequence number and leaves out the groups that were received before a
    /// time. It ignores [`ReadOptions::from`].
    pub(super) fn continuing(
        shard: &Shard,
        seq: u64,
        from_us: u64,
        options: &ReadOptions,
    ) -> Result<Self> {
        let mut reader = Self::open(shard, &options.from(Position::Seq(seq)))?;
        reader.from_us = from_us;
        reader.seek_time = reader.must_seek_time();
        Ok(reader)
    }

    /// A reader for a follower.
    pub(super) fn following(shard: &Shard, options: &ReadOptions) -> Result<Self> {
        Self::with(shard.permits().take(true)?, shard, options)
    }

    fn with(permit: ReaderPermit, shard: &Shard, options: &ReadOptions) -> Result<Self> {
        let list = shard.list();
        list.gate().admit()?;
        let ahead = Arc::new(ReadAhead::default());
        list.gate().keep(Arc::downgrade(&(Arc::clone(&ahead) as Arc<dyn KeptPlaintext>)));
        let mut reader = Self {
            list: Arc::clone(list),
            _permit: permit,
            mode: options.mode,
            skip_lost: options.skip_lost,
            lost: Vec::new(),
            at: None,
            passed: None,
            next_seq: 0,
            has_begun: false,
            from_us: 0,
            seek_time: false,
            end_seq: u64::MAX,
            from_seq: matches!(options.from, Position::Seq(_)),
            given_out: shard.commit().next_seq(),
            end_us: u64::MAX,
            past_end: false,
            groups_left: options.max_groups.unwrap_or(u64::MAX),
            bytes_left: options.max_bytes.unwrap_or(u64::MAX),
            cursor: None,
            ahead,
            in_use: None,
            ended: false,
            exhausted: false,
        };
        match options.from {
            Position::Begin => {}
            Position::End => reader.next_seq = proven_end_seq(list)?,
            Position::Seq(seq) => reader.next_seq = seq,
            Position::Time(time_us) => {
                reader.from_us = time_us;
                reader.seek_time = true;
            }
        }
        match options.to {
            None => {}
            Some(Position::Begin) => reader.end_seq = 0,
            Some(Position::End) => reader.end_seq = proven_end_seq(list)?,
            Some(Position::Seq(seq)) => reader.end_seq = seq,
            Some(Position::Time(time_us)) => reader.end_us = time_us,
        }
        Ok(reader)
    }

    /// The sequence number that the reader looks for next. A later reader that begins there
    /// continues from here.
    pub fn next_seq(&self) -> u64 {
        self.next_seq
    }

    /// The losses that the reader has passed so far: accepted ones, and with
    /// [`ReadOptions::skip_lost`] the others. After 1,024 of them, the last one includes all later
    /// ones.
    pub fn lost(&self) -> &[LostRange] {
        &self.lost
    }

    /// The rest of the current block, or the next one: the cheap way to pass groups on without
    /// looking into them.
    ///
    /// # Errors
    /// Any error that keeps it from being read. The reader has then ended.
    pub fn next_block(&mut self) -> Result<Option<RecordBlock>> {
        loop {
            if !self.ready()? {
                return Ok(None);
            }
            let mut records = Vec::new();
            let ahead = Arc::clone(&self.ahead);
            let mut ahead = lock(&ahead.0);
            while self.groups_left > 0
                && self.bytes_left > 0
                && let Some(record) = ahead.records.pop_front()
            {
                self.took(&record);
                records.push(record);
            }
            // No record: the key was lost between the two locks.
            if let (Some(first), Some(last)) = (records.first(), records.last()) {
                let list = framed(&ahead.list, &first.bytes, &last.bytes);
                return Ok(Some(RecordBlock { list, records }));
            }
        }
    }

    /// The next record; `None` if there is none yet. A later call continues with the groups that
    /// were written since. Blocks for file I/O and KMS calls.
    ///
    /// # Errors
    /// Any error that keeps it from being read. The reader has then ended.
    pub fn try_next(&mut self) -> Result<Option<Record>> {
        while self.ready()? {
            if let Some(record) = self.take_next() {
                return Ok(Some(record));
            }
        }
        Ok(None)
    }

    /// The sequence number at which a later reader continues with the next record of this one.
    pub(super) fn resume_seq(&self) -> u64 {
        lock(&self.ahead.0).records.front().map_or(self.next_seq, |record| record.seq)
    }

    /// Whether the segment to begin in must be found by time.
    fn must_seek_time(&self) -> bool {
        self.next_seq == 0 && self.from_us > 0
    }

    /// Takes a record that was read ahead. `None` if the key was lost since [`Reader::ready`].
    pub(super) fn take_next(&mut self) -> Option<Record> {
        let record = lock(&self.ahead.0).records.pop_front()?;
        self.took(&record);
        Some(record)
    }

    /// The receive time of the next record, if it was read ahead.
    pub(super) fn next_time_us(&self) -> Option<u64> {
        lock(&self.ahead.0).records.front().map(|record| record.receive_time_us)
    }

    /// The number of the shard.
    pub fn shard(&self) -> u32 {
        self.list.shard()
    }

    /// Whether a record was read ahead.
    pub(super) fn has_read_ahead(&self) -> bool {
        !lock(&self.ahead.0).records.is_empty()
    }

    /// Whether the reader has ended, by its options or by an error.
    pub(super) fn is_over(&self) -> bool {
        self.ended || self.groups_left == 0 || self.bytes_left == 0 || self.next_seq >= self.end_seq
    }

    /// Whether there is a record to return now.
    pub(super) fn ready(&mut self) -> Result<bool> {
        if self.ended || self.groups_left == 0 || self.bytes_left == 0 {
            return Ok(false);
        }
        let ready = loop {
            match self.fill() {
                Err(error) => {
                    if let Err(error) = self.pass_loss(error) {
                        break Err(error);
                    }
                }
                ready => break ready,
            }
        };
        if ready.is_err() {
            self.ended = true;
            self.ahead.wipe();
            (self.cursor, self.in_use) = (None, None);
        }
        ready
    }

    /// Goes to the next group that can be read, if the reader may pass the damage that `error` is
    /// about, or if it has not begun and the segment has no wanted group.
    ///
    /// # Errors
    /// `error`, if it is about anything else; otherwise [`Error::Lost`].
    fn pass_loss(&mut self, error: Error) -> Result<()> {
        let Some(ordinal) = self.at else { return Err(error) };
        let accepted = self.list.has_accepted(ordinal, &error);
        let shredded = matches!(error, Error::Shredded { .. });
        if !accepted && !shredded && !error.is_loss() {
            return Err(error);
        }
        // Behind a loss that was just passed.
        let passed_to = self.lost.last().and_then(|lost| lost.end_seq).unwrap_or(0);
        let (shard, from_seq) = (self.list.shard(), self.next_seq.max(passed_to));
        let within = match &mut self.cursor {
            // No block of a shredded segment can be read.
            Some(cursor) if !shredded => cursor.pass_lost_blocks(&self.list)?,
            _ => None,
        };
        let end_seq = match within {
            Some(seq) => Some(seq),
            // It was passed before, and nothing was entered since.
            None if self.passed == Some(ordinal) => return Err(error),
            None => {
                (self.cursor, self.passed) = (None, Some(ordinal));
                if !self.has_begun && self.is_unwanted(ordinal)? {
                    return Ok(());
                }
                let behind = self.list.behind(ordinal, false)?;
                let known = self.list.record().head.filter(|head| head.ordinal >= ordinal);
                behind.map(|segment| segment.first_seq).or(known.map(|head| head.next_seq))
            }
        };
        if !accepted && !self.skip_lost {
            return Err(match shredded {
                true => error,
                false => Error::Lost { shard, from_seq, end_seq, cause: Arc::new(error) },
            });
        }
        let is_full = self.lost.len() >= LOST_RANGES_MAX;
        match self.lost.last_mut() {
            Some(last)
                if is_full
                    || ((last.accepted, last.shredded, last.end_seq)
                        == (accepted, shredded, Some(from_seq))) =>
            {
                last.end_seq = end_seq;
            }
            _ => self.lost.push(LostRange { shard, from_seq, end_seq, accepted, shredded }),
        }
        Ok(())
    }

    /// Whether a segment that cannot be read ends in front of the groups to begin with, by the end
    /// that the catalogue or its successor names for it. The reader enters the successor next, and
    /// authenticates it.
    fn is_unwanted(&self, ordinal: u64) -> Result<bool> {
        let end = match self.list.find(ordinal)? {
            Some(name) => self.list.named_end(&name),
            None => None,
        };
        Ok(end.is_some_and(|end| end.end_seq <= self.next_seq || end.last_time_us < self.from_us))
    }

    /// Counts a record that is returned.
    fn took(&mut self, record: &Record) {
        self.next_seq = record.seq + 1;
        (self.has_begun, self.from_seq, self.passed) = (true, false, None);
        self.groups_left -= 1;
        self.bytes_left = self.bytes_left.saturating_sub(record.bytes.len() as u64);
    }

    /// Reads ahead until there is a record to return. `false` if there is none yet.
    fn fill(&mut self) -> Result<bool> {
        let list = Arc::clone(&self.list);
        let gate = list.gate();
        loop {
            let era = gate.admit()?;
            {
                let mut ahead = lock(&self.ahead.0);
                if !ahead.records.is_empty() {
                    return Ok(true);
                }
                if std::mem::take(&mut ahead.wiped) {
                    (self.cursor, self.past_end) = (None, false);
                    self.seek_time = self.must_seek_time();
                }
            }
            if self.next_seq >= self.end_seq {
                return Ok(false);
            }
            if std::mem::take(&mut self.past_end) {
                if !self.leave()? {
                    return Ok(false);
                }
                continue;
            }
            let Some(cursor) = &mut self.cursor else {
                if self.begin()? {
                    continue;
                }
                return Ok(false);
            };
            match cursor.load(&list)? {
                Load::Block(header) => {
                    cursor.prove_place(&header, gate)?;
                    let wanted = header.kind != BlockKind::Mark
                        && header.end_seq() > self.next_seq
                        && header.last_time_us >= self.from_us;
                    if !wanted {
                        cursor.pass();
                        continue;
                    }
                    // Nothing may rest on the headers of the skipped blocks before they are proved.
                    cursor.prove_passed(gate)?;
                    let at = cursor.here();
                    let raw = Bytes::from(cursor.open(gate)?);
                    gate.count_read(cursor.opened.header.suite, header.list_len.into());
                    if header.first_seq >= self.end_seq {
                        self.ended = true;
                        return Ok(false);
                    }
                    self.unpack(&header, &raw, at)?;
                    // If the key was lost before that, the wipe has missed these records.
                    if !gate.is_still_in(era) {
                        self.ahead.wipe();
                    }
                }
                Load::End => {
                    cursor.prove_passed(gate)?;
                    cursor.check_end()?;
                    let before = (Arc::clone(&cursor.opened.header), cursor.last_time_us());
                    let end_seq = cursor.end_seq();
                    if !self.enter_next(&before)? {
                        return self.check_not_above(end_seq).map(|()| false);
                    }
                }
                Load::NotYet => {
                    cursor.prove_passed(gate)?;
                    match cursor.refresh(&list)? {
                        Refresh::Same => {
                            let end_seq = cursor.end_seq();
                            return self.check_not_above(end_seq).map(|()| false);
                        }
                        Refresh::Changed => {}
                        // The next groups are in the segments that are left.
                        Refresh::Dropped => self.cursor = None,
                    }
                }
            }
        }
    }

    /// Checks that the reader did not begin above the end of the shard. All blocks in front of the end
    /// are authenticated.
    fn check_not_above(&self, end_seq: u64) -> Result<()> {
        if !self.from_seq || self.next_seq <= end_seq.max(self.given_out) {
            return Ok(());
        }
        Err(Error::AboveEnd { shard: self.list.shard(), seq: self.next_seq, end_seq })
    }

    /// Leaves the current segment, whose rest was received too late. Ends the reader unless receive
    /// times go back later in the shard. `false` if there is no further segment.
    ///
    /// If they do not go back, this opens the last segment of the shard, and no other. Otherwise
    /// the reader enters each segment up to the last one where they do.
    fn leave(&mut self) -> Result<bool> {
        let Some(cursor) = &self.cursor else { return Ok(true) };
        let header = Arc::clone(&cursor.opened.header);
        if self.goes_back_after(&header)? {
            return self.enter_next(&(header, 0));
        }
        self.ended = true;
        Ok(false)
    }

    /// Whether receive times go back in the shard behind the segment with this header.
    fn goes_back_after(&self, header: &DecodedHeader) -> Result<bool> {
        // The directory is listed again only before the reader ends.
        Ok(self.goes_back_by(header, &self.list.segments(false)?)?
            || self.goes_back_by(header, &self.list.segments(true)?)?)
    }

    fn goes_back_by(&self, header: &DecodedHeader, segments: &[SegmentRef]) -> Result<bool> {
        let Some(last) = segments.last().filter(|last| last.ordinal > header.ordinal) else {
            return Ok(false);
        };
        let ordinal = last.ordinal;
        let opened = self.list.open_listed(last).and_then(|opened| match opened {
            Some(opened) => self.list.authenticate(&opened).map(|()| Some(opened)),
            None => Ok(None),
        });
        let last = match opened {
            Ok(opened) => opened.map(|opened| opened.header),
            Err(Error::Shredded { .. }) => {
                self.list.proved(last.ordinal)?.map(|proved| proved.header)
            }
            Err(lost) if lost.is_loss() || self.list.has_accepted(ordinal, &lost) => None,
            Err(error) => return Err(error),
        };
        Ok(last.is_none_or(|last| last.setbacks != header.setbacks))
    }

    /// Enters the segment after the one with this header, whose last group was received at that
    /// time; 0 if it is not known. `false` if there is none yet.
    fn enter_next(&mut self, before: &(Arc<DecodedHeader>, u64)) -> Result<bool> {
        let ordinal = before.0.ordinal;
        let Some(next) = self.list.behind(ordinal, true)? else { return Ok(false) };
        // Once retention has dropped a segment, the writer may have forgotten when its last group
        // was received.
        let is_there = self.list.find(ordinal)?.is_some();
        let follows = is_there && next.ordinal == ordinal + 1;
        self.enter(&next, follows.then_some(before))?;
        Ok(true)
    }

    /// Finds the segment and the block to begin with. `false` when there are none yet. If there is
    /// no cursor after `true`, retention has dropped the segment: the caller tries again.
    fn begin(&mut self) -> Result<bool> {
        if let Some(passed) = self.passed {
            let Some(behind) = self.list.behind(passed, true)? else { return Ok(false) };
            self.enter(&behind, None)?;
            return Ok(true);
        }
        let segments = self.list.segments(true)?;
        let position = if self.seek_time {
            let mut low = 0;
            let mut high = segments.len();
            // The last segment such that all groups in front of it are older, found by opening
            // O(log n) of them. The latest receive time in front of a segment never decreases.
            while low < high {
                let middle = low.midpoint(high);
                // A segment that cannot be opened has no time, so the next one with a time decides
                // for it. No time is authenticated here. The reader begins in a segment that names
                // the latest time in front of it, and authenticates that.
                let (mut at, mut before_us) = (middle, None);
                while let Some(segment) = segments.get(at).filter(|_| at < high)
                    && before_us.is_none()
                {
                    before_us = match self.list.open_listed(segment) {
                        Ok(Some(opened)) => Some(opened.header.latest_before_us()),
                        Ok(None) => return Ok(true),
                        Err(error) if error.kind() == ErrorKind::Integrity => None,
                        Err(error) => return Err(error),
                    };
                    at += 1;
                }
                match before_us {
                    Some(before_us) if before_us < self.from_us => low = at,
                    _ => high = middle,
                }
            }
            low
        } else {
            segments.partition_point(|segment| segment.first_seq <= self.next_seq)
        };
        let Some(segment) = segments.get(position.saturating_sub(1)) else {
            return self.check_not_above(end_seq(&self.list)?).map(|()| false);
        };
        self.enter(segment, None)?;
        self.seek_time &= self.cursor.is_none();
        Ok(true)
    }

    /// Opens a segment and seeks to the block that may have the first wanted group. Leaves no
    /// cursor when retention has dropped the segment. `before` is the header of the segment before
    /// it, and when the last group of that was received.
    fn enter(
        &mut self,
        segment: &SegmentRef,
        before: Option<&(Arc<DecodedHeader>, u64)>,
    ) -> Result<()> {
        (self.cursor, self.at) = (None, Some(segment.last_ordinal()));
        let opened = match self.list.open_listed(segment) {
            // The reader returns every authentic record in front of the damage. It reads no forged or
            // exchanged segment, even if an operator has accepted that one: a segment of a fork has
            // authentic blocks.
            Err(error) if error.is_loss() => Some(self.list.open_damaged(segment, error)?),
            opened => opened?,
        };
        let Some(opened) = opened else { return Ok(()) };
        self.in_use = Some(self.list.gate().mark_in_use(opened.header.key_source));
        self.list.authenticate(&opened)?;
        let mut cursor = SegmentReader::new(opened, self.mode)?;
        if let Some((header, last_time_us)) = before {
            cursor.follow(header, *last_time_us)?;
        }
        cursor.seek(self.next_seq, self.from_us);
        self.cursor = Some(cursor);
        Ok(())
    }

    fn unpack(&mut self, header: &BlockHeader, raw: &Bytes, at: Location) -> Result<()> {
        let list = raw.slice(..(header.list_len as usize).min(raw.len()));
        let ahead = Arc::clone(&self.ahead);
        let mut ahead = lock(&ahead.0);
        let (end_seq, mut past_end) = (self.end_seq, false);
        let unpacked = entries(header, raw, |entry| {
            past_end |= entry.time_us >= self.end_us;
            if entry.seq < end_seq
                && !past_end
                && entry.seq >= self.next_seq
                && entry.time_us >= self.from_us
            {
                let (seq, receive_time_us, bytes) =
                    (entry.seq, entry.time_us, list.slice(entry.bytes));
                ahead.records.push_back(Record { seq, receive_time_us, kind: header.kind, bytes });
            }
        });
        self.past_end = past_end;
        ahead.list = list;
        unpacked.map_err(|rule| Error::corrupt(at, format!("a block: {rule}")))
    }
}

impl Iterator for Reader {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Result<Record>> {
        if self.exhausted {
            return None;
        }
        let next = self.try_next().transpose();
        self.exhausted = next.is_none();
        next
    }
}

impl std::iter::FusedIterator for Reader {}

/// Records that were decrypted and not returned yet. They are wiped together with the keys, whether
/// or not the reader is used again.
struct ReadAhead(Mutex<Ahead>);

impl Default for ReadAhead {
    fn default() -> Self {
        Self(Mutex::new(LockRank::ReadAhead, Ahead::default()))
    }
}

#[derive(Default)]
struct Ahead {
    records: VecDeque<Record>,
    /// The list that they are parts of.
    list: Bytes,
    /// Whether records were wiped: the reader has to read them again.
    wiped: bool,
}

impl KeptPlaintext for ReadAhead {
    fn wipe(&self) {
        let mut ahead = lock(&self.0);
        ahead.wiped |= !ahead.records.is_empty();
        ahead.records.clear();
        wipe_shared(std::mem::take(&mut ahead.list));
    }
}

/// The part of a list that holds the records from `first` to `last`, frames included.
fn framed(list: &Bytes, first: &Bytes, last: &Bytes) -> Bytes {
    let base = list.as_ptr() as usize;
    let begin = first.as_ptr() as usize - base - (group::frame_len(first.len()) - first.len());
    let end = last.as_ptr() as usize - base + last.len();
    list.slice(begin..end)
}

/// One past the last sequence number that a reader can see, not authenticated.
pub(super) fn end_seq(list: &SegmentList) -> Result<u64> {
    if let Some(loss) = list.ends_in_loss()? {
        return Ok(loss.end_seq);
    }
    let segments = list.segments(true)?;
    let Some(last) = segments.last() else {
        let record = list.record();
        return Ok(record.head.map_or(record.first_seq, |head| head.end_seq.max(record.first_seq)));
    };
    let known = list.record().head.filter(|head| head.ordinal == last.ordinal);
    let known = known.map_or(last.first_seq, |head| head.end_seq);
    let opened = match list.open_segment(last) {
        Err(lost) if lost.is_loss() => match list.open_damaged(last, lost) {
            Err(lost) if lost.is_loss() => return Ok(known),
            opened => opened?,
        },
        opened => opened?,
    };
    Ok(match &opened.end {
        End::Sealed(sealed) => sealed.footer.end_seq,
        End::Cut(end) => end.end_seq,
        End::Active(view) => view.with_counts(|counts| counts.end_seq),
        End::Unknown => count(&opened, opened.file_len()?)?.0.end_seq,
        End::Damaged(_) => count(&opened, opened.file_len()?)?.0.end_seq.max(known),
    })
}

/// As [`end_seq`], authenticated: a reader begins or ends there.
fn proven_end_seq(list: &SegmentList) -> Result<u64> {
    if let Some(loss) = list.ends_in_loss()? {
        return Ok(loss.end_seq);
    }
    let segments = list.segments(true)?;
    let Some(last) = segments.last() else { return end_seq(list) };
    let authenticated = list.open_segment(last).and_then(|opened| {
        list.authenticate(&opened)?;
        Ok(opened)
    });
    let opened = match authenticated {
        Ok(opened) => opened,
        // The catalogue has the end of a sealed segment that cannot be read.
        Err(error) if error.is_loss() || matches!(error, Error::Shredded { .. }) => {
            list.reload_record().transpose()?;
            let head = list.record().head;
            let head = head.filter(|head| head.ordinal == last.ordinal && head.sealed);
            return head.map(|head| head.end_seq).ok_or(error);
        }
        Err(error) => return Err(error),
    };
    Ok(match &opened.end {
        End::Sealed(sealed) => {
            let end_seq = sealed.footer.end_seq;
            // The last blocks have to end there too, or a reader would end before them.
            let mut reader = SegmentReader::new(opened, ReadMode::Pread)?;
            reader.seek(end_seq.saturating_sub(1), 0);
            reader.prove_rest(list)?;
            reader.check_end()?;
            end_seq
        }
        End::Cut(end) => end.end_seq,
        End::Active(view) => view.with_counts(|counts| counts.end_seq),
        End::Unknown | End::Damaged(_) => {
            let first_seq = opened.header.first_seq;
            SegmentReader::new(opened, ReadMode::Pread)?.prove_rest(list)?.unwrap_or(first_seq)
        }
    })
}
