//! The read path: from a position to groups.

use std::{collections::VecDeque, sync::Arc};

use bytes::Bytes;

use super::{
    Proof, Shard,
    segments::{End, Opened, SegmentRef},
};
use crate::{
    Error, Result,
    crypto::{hash, wipe},
    error::Location,
    group::{self, LogGroup},
    io::Map,
    keys::gate::{Gate, InUse, KeptPlaintext},
    segment::{BlockHeader, BlockKind, BlockView, Compression, DecodeError, Decompressor, Footer, IndexEntry, entries},
    sync::{
        LockRank, Mutex,
        atomic::{AtomicUsize, Ordering},
        lock,
    },
};

/// How much is read at once, in bytes, unless a block is longer.
const CHUNK_BYTES: usize = 256 << 10;
/// Where a segment's header has the time when it was made.
const CREATED_AT: u64 = 112;

/// A place in a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Position {
    /// The oldest group there is.
    #[default]
    Begin,
    /// Behind the newest group there is.
    End,
    /// The group with this sequence number, or the first one after it.
    Seq(u64),
    /// The first group received at this time or later, in microseconds since the Unix epoch.
    Time(u64),
}

/// How the bytes of sealed segments are fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum ReadMode {
    /// With positional reads: a bad sector or a truncated file is an error.
    #[default]
    Pread,
    /// From a map. Should the file be truncated or the disk fail under it, the operating system ends the process with `SIGBUS`.
    ///
    /// Each block is copied out of the map before it is checked, since another process may write to the file. So a map saves system
    /// calls, one for each 256 KiB, and no copy; and each segment that is entered has to be mapped first. It pays only where system
    /// calls are dear. Out of the page cache it is no faster: `cargo bench --bench engine -- read-mode` found 0.93 to 0.99 of the
    /// speed of positional reads in segments of 37 MiB (2 cores of an AMD EPYC, Linux, 29 November 2026). It prints that ratio for
    /// the machine that it runs on.
    Map,
}

/// What is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct ReadOptions {
    /// Where to begin.
    pub from: Position,
    /// Where to end: the group there is not read. `None` reads on for as long as there is more.
    pub to: Option<Position>,
    /// The most groups to read; `None` is no limit.
    pub max_groups: Option<u64>,
    /// Ends once this many bytes of groups have been read; `None` is no limit.
    pub max_bytes: Option<u64>,
    /// How sealed segments are fetched.
    pub mode: ReadMode,
}

impl ReadOptions {
    /// From `position` on, without a limit.
    pub fn from(position: Position) -> Self {
        Self { from: position, ..Self::default() }
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

/// Consecutive groups of one block.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RecordBlock {
    /// The groups as a valid `LogGroupList` message (for opaque records: framed the same way), to be handed on as it is.
    pub list: Bytes,
    /// The same groups one by one; they share the memory of `list`.
    pub records: Vec<Record>,
}

/// How many readers there may be at once.
#[derive(Debug)]
pub(crate) struct ReaderPermits {
    limit: usize,
    used: AtomicUsize,
}

impl ReaderPermits {
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, used: AtomicUsize::new(0) })
    }

    fn take(self: &Arc<Self>) -> Result<ReaderPermit> {
        let taken =
            self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| (used < self.limit).then(|| used + 1));
        match taken {
            Ok(_) => Ok(ReaderPermit(Arc::clone(self))),
            Err(_) => Err(Error::TooMany { what: "open readers", limit: self.limit as u64 }),
        }
    }
}

#[derive(Debug)]
struct ReaderPermit(Arc<ReaderPermits>);

impl Drop for ReaderPermit {
    fn drop(&mut self) {
        self.0.used.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Reads a shard forward, group by group or block by block.
///
/// `None` (of the iterator or of [`Reader::next_block`]) means that there is nothing more *yet*: asking again later goes on with
/// what has been written since, which is how to follow a shard. After an error the reader has ended, and only gives `None`.
/// A reader sees what is at least `Written`. The lease of the key is asked for every group, also for those read ahead.
pub struct Reader {
    shard: Arc<Shard>,
    _permit: ReaderPermit,
    mode: ReadMode,
    next_seq: u64,
    /// Groups received earlier are passed over.
    from_us: u64,
    /// Set while the segment to begin in must be found by time.
    seek_time: bool,
    end_seq: u64,
    end_us: u64,
    groups_left: u64,
    bytes_left: u64,
    cursor: Option<SegmentReader>,
    ahead: Arc<ReadAhead>,
    /// Keeps the key of the segment it is in from being destroyed as unused.
    in_use: Option<InUse>,
    ended: bool,
}

/// What was decrypted and not handed out yet. It goes with the keys, also while nobody asks the reader for more.
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
    /// Whether records were taken away: the reader has to find them again.
    wiped: bool,
}

impl KeptPlaintext for ReadAhead {
    fn wipe(&self) {
        let mut ahead = lock(&self.0);
        ahead.wiped |= !ahead.records.is_empty();
        ahead.records.clear();
        // Memory that records share which were handed out is the caller's.
        if let Ok(mut list) = std::mem::take(&mut ahead.list).try_into_mut() {
            wipe(&mut list);
        }
    }
}

impl std::fmt::Debug for Reader {
    /// Without the groups that were read ahead.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader")
            .field("shard", &self.shard.id)
            .field("next_seq", &self.next_seq)
            .field("ended", &self.ended)
            .finish_non_exhaustive()
    }
}

impl Reader {
    pub(crate) fn open(shard: &Arc<Shard>, options: &ReadOptions) -> Result<Self> {
        let permit = shard.context.permits.take()?;
        shard.context.gate.admit()?;
        let ahead = Arc::new(ReadAhead::default());
        shard.context.gate.keep(Arc::downgrade(&(Arc::clone(&ahead) as Arc<dyn KeptPlaintext>)));
        let mut reader = Self {
            shard: Arc::clone(shard),
            _permit: permit,
            mode: options.mode,
            next_seq: 0,
            from_us: 0,
            seek_time: false,
            end_seq: u64::MAX,
            end_us: u64::MAX,
            groups_left: options.max_groups.unwrap_or(u64::MAX),
            bytes_left: options.max_bytes.unwrap_or(u64::MAX),
            cursor: None,
            ahead,
            in_use: None,
            ended: false,
        };
        match options.from {
            Position::Begin => {}
            Position::End => reader.next_seq = shard.proven_end_seq()?,
            Position::Seq(seq) => reader.next_seq = seq,
            Position::Time(time_us) => {
                reader.from_us = time_us;
                reader.seek_time = true;
            }
        }
        match options.to {
            None => {}
            Some(Position::Begin) => reader.end_seq = 0,
            Some(Position::End) => reader.end_seq = shard.proven_end_seq()?,
            Some(Position::Seq(seq)) => reader.end_seq = seq,
            Some(Position::Time(time_us)) => reader.end_us = time_us,
        }
        Ok(reader)
    }

    /// The sequence number that the reader looks for next: a later reader that begins there goes on where this one is.
    pub fn next_seq(&self) -> u64 {
        self.next_seq
    }

    /// The rest of the current block, or the next one: the cheap way to hand groups on without looking into them.
    ///
    /// # Errors
    /// Whatever keeps it from being read; the reader has then ended.
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
            // The key may have been lost just now.
            if let (Some(first), Some(last)) = (records.first(), records.last()) {
                let list = framed(&ahead.list, &first.bytes, &last.bytes);
                return Ok(Some(RecordBlock { list, records }));
            }
        }
    }

    /// Whether there is a record to give now.
    fn ready(&mut self) -> Result<bool> {
        if self.ended || self.groups_left == 0 || self.bytes_left == 0 {
            return Ok(false);
        }
        let ready = self.fill();
        if ready.is_err() {
            self.ended = true;
            self.ahead.wipe();
            (self.cursor, self.in_use) = (None, None);
        }
        ready
    }

    /// Counts a record that is handed out.
    fn took(&mut self, record: &Record) {
        self.next_seq = record.seq + 1;
        self.groups_left -= 1;
        self.bytes_left = self.bytes_left.saturating_sub(record.bytes.len() as u64);
    }

    /// Sees to it that a record is read ahead, if there is any.
    fn fill(&mut self) -> Result<bool> {
        let shard = Arc::clone(&self.shard);
        let gate = &shard.context.gate;
        loop {
            gate.admit()?;
            {
                let mut ahead = lock(&self.ahead.0);
                if !ahead.records.is_empty() {
                    return Ok(true);
                }
                if std::mem::take(&mut ahead.wiped) {
                    self.cursor = None;
                    self.seek_time = self.next_seq == 0 && self.from_us > 0;
                }
            }
            if self.next_seq >= self.end_seq {
                return Ok(false);
            }
            let Some(cursor) = &mut self.cursor else {
                if self.begin()? {
                    continue;
                }
                return Ok(false);
            };
            match cursor.load(&shard)? {
                Load::Block(header) => {
                    cursor.prove_place(&header, gate)?;
                    let wanted = header.kind != BlockKind::Mark
                        && header.end_seq() > self.next_seq
                        && header.last_time_us >= self.from_us;
                    if !wanted {
                        cursor.pass();
                        continue;
                    }
                    // Whatever follows from the block's header, follows only once it is authenticated.
                    cursor.prove_passed(gate)?;
                    let at = cursor.here();
                    let raw = Bytes::from(cursor.open(gate)?);
                    shard.counters().read(cursor.opened.header.header.suite, header.list_len.into());
                    if header.first_seq >= self.end_seq || header.first_time_us >= self.end_us {
                        self.ended = true;
                        return Ok(false);
                    }
                    self.unpack(&header, &raw, at)?;
                }
                Load::End => {
                    cursor.prove_passed(gate)?;
                    cursor.check_end()?;
                    let (ordinal, last_time_us) = (cursor.opened.name.ordinal, cursor.last_time_us());
                    let mut segments = shard.segments(false)?;
                    // Lists the directory again only when no successor is known, so that reading a shard from end to end does
                    // not list it once for each segment.
                    if segments.last().is_none_or(|last| last.ordinal <= ordinal) {
                        segments = shard.segments(true)?;
                    }
                    let position = segments.partition_point(|segment| segment.ordinal <= ordinal);
                    let Some(next) = segments.get(position) else { return Ok(false) };
                    // Once retention has dropped a segment, the writer may have forgotten when its last group was received.
                    let before = position.checked_sub(1).and_then(|position| segments.get(position));
                    let is_there = before.is_some_and(|segment| segment.ordinal == ordinal);
                    let follows = is_there && next.ordinal == ordinal + 1;
                    self.enter(next, if follows { last_time_us } else { 0 })?;
                }
                Load::NotYet => {
                    cursor.prove_passed(gate)?;
                    match cursor.refresh(&shard)? {
                        Refresh::Same => return Ok(false),
                        Refresh::Changed => {}
                        // What follows is in its successors.
                        Refresh::Dropped => self.cursor = None,
                    }
                }
            }
        }
    }

    /// Finds the segment and the block to begin with. `false` when there are none yet. Without a cursor after that, retention was
    /// quicker, and another turn finds what is left.
    fn begin(&mut self) -> Result<bool> {
        let segments = self.shard.segments(true)?;
        let position = if self.seek_time {
            let mut low = 0;
            let mut high = segments.len();
            // The last segment that begins before the time, found by looking into O(log n) of them. One that begins at that very time
            // is not it: the one in front of it may end with groups of the same time.
            while low < high {
                let middle = low.midpoint(high);
                let Some(segment) = segments.get(middle) else { break };
                let Some(opened) = self.shard.open_listed(segment)? else { return Ok(true) };
                if opened.begins_us() < self.from_us {
                    low = middle + 1;
                } else {
                    high = middle;
                }
            }
            low
        } else {
            segments.partition_point(|segment| segment.first_seq <= self.next_seq)
        };
        let Some(segment) = segments.get(position.saturating_sub(1)) else { return Ok(false) };
        self.enter(segment, 0)?;
        self.seek_time &= self.cursor.is_none();
        Ok(true)
    }

    /// Opens a segment and goes to where the wanted groups may begin. Leaves no cursor when retention has dropped it. No group of the
    /// segment before it was received later than `before_us`.
    fn enter(&mut self, segment: &SegmentRef, before_us: u64) -> Result<()> {
        self.cursor = None;
        let Some(opened) = self.shard.open_listed(segment)? else { return Ok(()) };
        self.in_use = Some(self.shard.context.gate.in_use(opened.header.header.key_source));
        self.shard.authenticate(&opened)?;
        let mut cursor = SegmentReader::new(opened, self.mode)?;
        cursor.follow(before_us)?;
        cursor.seek(self.next_seq, self.from_us);
        self.cursor = Some(cursor);
        Ok(())
    }

    fn unpack(&mut self, header: &BlockHeader, raw: &Bytes, at: Location) -> Result<()> {
        let list = raw.slice(..(header.list_len as usize).min(raw.len()));
        let ahead = Arc::clone(&self.ahead);
        let mut ahead = lock(&ahead.0);
        let mut end_seq = self.end_seq;
        let unpacked = entries(header, raw, |entry| {
            if entry.seq >= end_seq || entry.time_us >= self.end_us {
                end_seq = end_seq.min(entry.seq);
            } else if entry.seq >= self.next_seq && entry.time_us >= self.from_us {
                let (seq, receive_time_us, bytes) = (entry.seq, entry.time_us, list.slice(entry.bytes));
                ahead.records.push_back(Record { seq, receive_time_us, kind: header.kind, bytes });
            }
        });
        self.end_seq = end_seq;
        ahead.list = list;
        unpacked.map_err(|rule| Error::corrupt(at, format!("a block: {rule}")))
    }
}

impl Iterator for Reader {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Result<Record>> {
        loop {
            match self.ready() {
                Ok(true) => {}
                Ok(false) => return None,
                Err(error) => return Some(Err(error)),
            }
            // None if the key was lost just now.
            let record = lock(&self.ahead.0).records.pop_front();
            if let Some(record) = record {
                self.took(&record);
                return Some(Ok(record));
            }
        }
    }
}

/// The part of a list that holds the records from `first` to `last`, frames included.
fn framed(list: &Bytes, first: &Bytes, last: &Bytes) -> Bytes {
    let base = list.as_ptr() as usize;
    let begin = first.as_ptr() as usize - base - (group::frame_len(first.len()) - first.len());
    let end = last.as_ptr() as usize - base + last.len();
    list.slice(begin..end)
}

/// What [`SegmentReader::load`] came to.
pub(crate) enum Load {
    /// The block is in memory and its CRC holds.
    Block(BlockHeader),
    /// The segment ends here, and says so.
    End,
    /// Nothing more, so far.
    NotYet,
}

/// What has become of a segment that a reader stands at the end of.
enum Refresh {
    /// Nothing.
    Same,
    /// It has been ended, or goes on.
    Changed,
    /// Retention has dropped it.
    Dropped,
}

/// Reads the blocks of one segment in order.
#[derive(Debug)]
pub(crate) struct SegmentReader {
    pub(crate) opened: Opened,
    map: Option<Map>,
    /// The offset of the next block, and its number.
    pub(crate) offset: u64,
    number: u32,
    bytes: Vec<u8>,
    bytes_at: u64,
    /// The block that was loaded last.
    loaded: Option<BlockHeader>,
    /// The end of the last block, and the length of the file, at which what follows was found to be no corruption.
    excused: Option<(u64, u64)>,
    /// How damage at the end of a segment that is not sealed is told from a torn tail.
    pub(crate) proof: Proof,
    /// The last block that was passed over for what its header says, and is not authenticated yet; and its offset.
    passed: Option<(u64, BlockHeader)>,
    /// One past the last sequence number of the blocks before the next one: no later block has a lower number.
    end_seq: u64,
    /// The last receive time of the blocks before the next one: no later block has an earlier one.
    last_time_us: u64,
    /// One past the number of the last group that was passed, if one was.
    groups_end: Option<u64>,
    /// The entry of the index that led to the next block.
    sought: Option<IndexEntry>,
    scratch: Scratch,
}

#[derive(Default)]
struct Scratch {
    stored: Vec<u8>,
    decompressor: Decompressor,
}

impl Drop for Scratch {
    fn drop(&mut self) {
        wipe(&mut self.stored);
    }
}

impl std::fmt::Debug for Scratch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Scratch")
    }
}

impl SegmentReader {
    pub(crate) fn new(opened: Opened, mode: ReadMode) -> Result<Self> {
        let map = match (&opened.end, mode) {
            (End::Sealed(_), ReadMode::Map) => Some(opened.file.map().map_err(Error::io("map", &*opened.name.path))?),
            _ => None,
        };
        Ok(Self {
            offset: opened.header.body_start,
            number: 0,
            end_seq: opened.header.header.first_seq,
            opened,
            map,
            bytes: Vec::new(),
            bytes_at: 0,
            loaded: None,
            excused: None,
            proof: Proof::Tag,
            passed: None,
            last_time_us: 0,
            groups_end: None,
            sought: None,
            scratch: Scratch::default(),
        })
    }

    /// Has the segment follow one whose last group was received at `before_us`.
    pub(crate) fn follow(&mut self, before_us: u64) -> Result<()> {
        self.last_time_us = before_us;
        if self.opened.header.header.created_us >= before_us {
            return Ok(());
        }
        Err(Error::corrupt(
            self.opened.at(CREATED_AT),
            "the segment was made before the last receive time of the one before it",
        ))
    }

    /// The last receive time in the segment, as far as it was read; 0 when what was read may be more than the segment keeps.
    pub(crate) fn last_time_us(&self) -> u64 {
        match &self.opened.end {
            End::Cut(cut) if self.offset > cut.bytes => 0,
            End::Sealed(footer) => self.last_time_us.max(footer.footer.last_time_us),
            _ => self.last_time_us,
        }
    }

    /// Where the next block is.
    pub(crate) fn here(&self) -> Location {
        self.opened.at(self.offset).block(self.number)
    }

    /// Reads on to the end, from where it is, and authenticates that.
    pub(crate) fn prove_end(&mut self, shard: &Shard, gate: &Gate) -> Result<()> {
        while let Load::Block(header) = self.load(shard)? {
            self.prove_place(&header, gate)?;
            self.pass();
        }
        self.prove_passed(gate)?;
        self.check_end()
    }

    /// Goes to where the first group with at least this number and receive time may be.
    pub(crate) fn seek(&mut self, seq: u64, time_us: u64) {
        // What lies before the first block that an index names is looked for from the first block of the segment on.
        let entry = |footer: &Footer| {
            let by_seq = footer.seek_seq(seq).filter(|entry| entry.first_seq <= seq);
            let by_time = footer.seek_time(time_us).filter(|entry| entry.first_time_us < time_us);
            by_seq.into_iter().chain(by_time).max_by_key(|entry| entry.offset).copied()
        };
        self.sought = match &self.opened.end {
            End::Sealed(footer) => entry(&footer.footer),
            End::Active(view) => view.with_counts(entry),
            End::Cut(_) | End::Unknown => None,
        };
        if let Some(entry) = self.sought {
            (self.offset, self.number) = (entry.offset, entry.block);
            self.end_seq = self.end_seq.max(entry.first_seq);
            self.last_time_us = self.last_time_us.max(entry.first_time_us);
        }
    }

    /// Up to where there may be blocks now.
    fn end(&self) -> Result<u64> {
        Ok(match &self.opened.end {
            End::Sealed(footer) => footer.footer.offset,
            End::Cut(end) => end.bytes,
            End::Active(view) => view.visible(),
            End::Unknown => self.opened.file.len().map_err(Error::io("get the length of", &*self.opened.name.path))?,
        })
    }

    /// Brings the next block into memory and checks its CRC and its number. What else the format says of its place is for
    /// [`SegmentReader::check_place`], but in an open segment, where a block that breaks that may be what a crash has left.
    pub(crate) fn load(&mut self, shard: &Shard) -> Result<Load> {
        let end = self.end()?;
        if self.offset >= end {
            return match &self.opened.end {
                // A reader that was already beyond where recovery cut the segment goes on behind it.
                End::Cut(cut) if self.offset > cut.bytes => Ok(Load::End),
                End::Cut(cut) => self.ended(cut.blocks),
                End::Sealed(footer) => self.ended(footer.footer.block_count),
                End::Active(_) | End::Unknown => Ok(Load::NotYet),
            };
        }
        let (offset, number) = (self.offset, self.number);
        let tag = self.opened.header.segment_tag();
        let parsed = match self.window(BlockHeader::LEN, end)? {
            Ok(head) => BlockHeader::decode(head).and_then(|header| match header.block_len() <= end - offset {
                true => Ok(header.block_len()),
                false => Err(DecodeError::Short { needed: header.block_len(), have: end - offset }),
            }),
            Err(short) => Err(short),
        };
        let parsed = match parsed {
            Ok(len) => self.window(len as usize, end)?.and_then(|block| Ok(BlockView::parse(block)?.header)),
            Err(error) => Err(error),
        };
        match parsed {
            Ok(header)
                if header.segment_tag == tag
                    && header.number == number
                    && (!matches!(self.opened.end, End::Unknown) || self.out_of_place(&header).is_none()) =>
            {
                self.loaded = Some(header);
                Ok(Load::Block(header))
            }
            other => {
                if matches!(self.opened.end, End::Unknown) {
                    // Not written yet, incomplete, or torn: fine above the durable mark. Looked at once, however often a follower asks.
                    if self.excused != Some((offset, end)) {
                        shard.damage_in_open_segment(&self.opened, self.proof)?;
                        self.excused = Some((offset, end));
                    }
                    // A block may be written over what was read.
                    self.bytes.clear();
                    return Ok(Load::NotYet);
                }
                let at = self.opened.at(offset).block(number);
                Err(match other {
                    // A block that is whole, and was made for another place.
                    Ok(_) => Error::Tampered { at, what: "the place of a block" },
                    Err(error) => Error::corrupt(at, format!("a block: {error}")),
                })
            }
        }
    }

    /// The rule that the sequence numbers or the durable mark of the next block break.
    fn out_of_place(&self, header: &BlockHeader) -> Option<&'static str> {
        if header.first_seq < self.end_seq {
            return Some("its sequence numbers lie below those of the block before it, or of its segment");
        }
        if header.end_seq() > self.opened.header.header.limit_seq {
            return Some("its sequence numbers lie beyond the limit of its segment");
        }
        let durable = self.opened.header.body_start..=self.offset;
        (!durable.contains(&header.durable_mark)).then_some("its durable mark is outside of what stands before it")
    }

    /// Checks the loaded block against those before it, and against the index that led to it. Neither it nor the block before it is
    /// authenticated yet: [`SegmentReader::prove_place`] is for those who have the key.
    pub(crate) fn check_place(&self, header: &BlockHeader) -> Result<()> {
        let is_sought =
            |entry: IndexEntry| (entry.first_seq, entry.first_time_us) == (header.first_seq, header.first_time_us);
        let broken = if let Some(rule) = self.out_of_place(header) {
            rule
        } else if header.first_time_us < self.last_time_us {
            "it was received before the block before it, or before the end of the segment before"
        } else if !self.sought.is_none_or(is_sought) {
            "it is not the block that the index names"
        } else if !self.begins_as_footer_says(header) {
            "it is the first one with groups, and the footer names another first receive time"
        } else {
            return Ok(());
        };
        Err(Error::corrupt(self.here(), format!("a block: {broken}")))
    }

    /// As [`SegmentReader::check_place`]. Where a rule is broken, both blocks are authenticated first: a forged one is *tampered*.
    pub(crate) fn prove_place(&mut self, header: &BlockHeader, gate: &Gate) -> Result<()> {
        let Err(broken) = self.check_place(header) else { return Ok(()) };
        self.prove_passed(gate)?;
        self.open(gate)?;
        Err(broken)
    }

    /// Whether the loaded block has the first receive time that the footer names, if it is the first block with groups.
    fn begins_as_footer_says(&self, header: &BlockHeader) -> bool {
        let End::Sealed(footer) = &self.opened.end else { return true };
        let is_first = self.sought.is_none() && self.groups_end.is_none() && header.kind != BlockKind::Mark;
        !is_first || header.first_time_us == footer.footer.first_time_us
    }

    /// Checks what was read against what the footer, or the successor of a cut segment, says of the end. All of it is authenticated.
    fn check_end(&self) -> Result<()> {
        let first_seq = self.opened.header.header.first_seq;
        let agrees = match (&self.opened.end, self.groups_end) {
            (End::Sealed(footer), Some(end)) => {
                (end, self.last_time_us) == (footer.footer.end_seq, footer.footer.last_time_us)
            }
            (End::Cut(cut), Some(end)) if self.offset == cut.bytes => {
                (end, self.last_time_us) == (cut.end_seq, cut.last_time_us)
            }
            (End::Cut(cut), None) if self.offset == cut.bytes => cut.end_seq == first_seq,
            _ => true,
        };
        if agrees {
            return Ok(());
        }
        Err(Error::corrupt(self.opened.at(self.offset), "the blocks of the segment do not end as it was ended"))
    }

    fn ended(&self, blocks: u32) -> Result<Load> {
        if self.number == blocks {
            return Ok(Load::End);
        }
        let what = format!("the segment ends after {} blocks, it should have {blocks}", self.number);
        Err(Error::truncated(self.opened.at(self.offset), what))
    }

    /// `len` bytes from the current offset on; an error of decoding when the file has fewer. They are this reader's own copy, also of a
    /// map: what was checked there is what is opened.
    fn window(&mut self, len: usize, end: u64) -> Result<Result<&[u8], DecodeError>> {
        let short = |have| DecodeError::Short { needed: len as u64, have };
        let begin = self.offset.wrapping_sub(self.bytes_at) as usize;
        if begin.checked_add(len).is_none_or(|end| end > self.bytes.len()) {
            let wanted = (len.max(CHUNK_BYTES) as u64).min(end - self.offset) as usize;
            // What is there already is not read twice.
            let kept = self.bytes.len().saturating_sub(begin);
            if kept > 0 {
                self.bytes.copy_within(begin.., 0);
            }
            self.bytes.resize(wanted.max(kept), 0);
            self.bytes_at = self.offset;
            let (room, at) = (self.bytes.get_mut(kept..).unwrap_or_default(), self.offset + kept as u64);
            let read = match &self.map {
                Some(map) => map.read_at(room, at),
                None => self.opened.file.read_at(room, at).map_err(Error::io("read", &*self.opened.name.path))?,
            };
            self.bytes.truncate(kept + read);
            return Ok(self.bytes.get(..len).ok_or(short((kept + read) as u64)));
        }
        Ok(self.bytes.get(begin..begin + len).ok_or(short(0)))
    }

    /// Passes the loaded block over because its header says that nothing in it is wanted. That is only believed once
    /// [`SegmentReader::prove_passed`] has succeeded, which must come before anything rests on it.
    pub(super) fn pass(&mut self) {
        self.passed = self.loaded.map(|header| (self.offset, header));
        self.skip();
    }

    /// Authenticates the block that was passed over last, if one was. Sequence numbers and receive times never run backwards, so
    /// what it says holds for those in front of it as well.
    pub(super) fn prove_passed(&mut self, gate: &Gate) -> Result<()> {
        let Some((offset, header)) = self.passed.take() else { return Ok(()) };
        let loaded = self.loaded.replace(header);
        (self.offset, self.number) = (offset, header.number);
        // This ends where the block ends, which is where the reader was.
        self.open(gate)?;
        self.loaded = loaded;
        Ok(())
    }

    /// Passes the loaded block over.
    pub(crate) fn skip(&mut self) {
        if let Some(header) = self.loaded.take() {
            self.offset += header.block_len();
            self.number += 1;
            self.end_seq = self.end_seq.max(header.end_seq());
            self.last_time_us = self.last_time_us.max(header.last_time_us);
            self.sought = None;
            if header.kind != BlockKind::Mark {
                self.groups_end = Some(header.end_seq());
            }
        }
    }

    /// Goes on behind a damaged block of a sealed segment: where its header says, if that leads to a block, else to the next block that
    /// the index names. `false` when there is none.
    pub(crate) fn pass_damage(&mut self) -> Result<bool> {
        let End::Sealed(footer) = &self.opened.end else { return Ok(false) };
        let footer = Arc::clone(footer);
        let (end, tag, number) = (footer.footer.offset, self.opened.header.segment_tag(), self.number);
        self.loaded = None;
        // What is passed over may have been the first groups.
        self.groups_end.get_or_insert(self.end_seq);
        let damaged = self.offset;
        if let Ok(head) = self.window(BlockHeader::LEN, end)?
            && let Ok(header) = BlockHeader::decode(head)
            && header.number == number
            && header.block_len() < end - damaged
        {
            self.offset = damaged + header.block_len();
            let follows = self.window(BlockHeader::LEN, end)?.and_then(BlockHeader::decode);
            if follows.is_ok_and(|next| next.segment_tag == tag && next.number == number + 1) {
                self.number = number + 1;
                return Ok(true);
            }
        }
        let next = footer.footer.index.iter().find(|entry| entry.offset > damaged);
        self.offset = next.map_or(end, |entry| entry.offset);
        self.number = next.map_or(footer.footer.block_count, |entry| entry.block);
        Ok(next.is_some())
    }

    /// The raw bytes of the loaded block, authenticated, decrypted and decompressed; goes on to the next block.
    pub(crate) fn open(&mut self, gate: &Gate) -> Result<Vec<u8>> {
        self.open_with(Some(gate))
    }

    /// As [`SegmentReader::open`], not authenticated: for a suite that does not encrypt.
    pub(crate) fn open_unproved(&mut self) -> Result<Vec<u8>> {
        self.open_with(None)
    }

    fn open_with(&mut self, gate: Option<&Gate>) -> Result<Vec<u8>> {
        let header = self.loaded.ok_or(Error::Closed("the block"))?;
        let at = self.opened.at(self.offset).block(header.number);
        let mut scratch = std::mem::take(&mut self.scratch);
        let opened_header = Arc::clone(&self.opened.header);
        let path = Arc::clone(&self.opened.name.path);
        let end = self.offset + header.block_len();
        let block = self.window(header.block_len() as usize, end)?;
        let view = block
            .and_then(BlockView::parse)
            .map_err(|error| Error::corrupt(at.clone(), format!("a block: {error}")))?;
        let mut raw = Vec::new();
        // What is not compressed is decrypted straight into its destination.
        let direct = header.compression == Compression::None;
        let target = if direct { &mut raw } else { &mut scratch.stored };
        target.resize(view.payload.len(), 0);
        let tampered = || Error::Tampered { at: at.clone(), what: "a block" };
        // The header that was acted upon is the one that is authenticated, even if the file changes meanwhile.
        match gate {
            Some(gate) => gate.with_cipher(&opened_header, &path, |cipher| {
                cipher
                    .open_block(&header.nonce(), &header.encode(), view.payload, &view.tag, target)
                    .map_err(|_| tampered())
            })?,
            None => target.copy_from_slice(view.payload),
        }
        if !direct {
            scratch
                .decompressor
                .decompress(header.compression, &scratch.stored, header.raw_len, &mut raw)
                .map_err(|error| Error::corrupt(at.clone(), error.to_string()))?;
            wipe(&mut scratch.stored);
        }
        self.scratch = scratch;
        self.skip();
        Ok(raw)
    }

    /// What the digest of the segment covers of the loaded block besides its header: the hash of its stored payload, and its tag.
    pub(crate) fn loaded_digest_parts(&mut self) -> Result<([u8; 32], [u8; 16])> {
        let header = self.loaded.ok_or(Error::Closed("the block"))?;
        let algorithm = self.opened.header.header.payload_hash;
        let end = self.offset + header.block_len();
        let at = self.opened.at(self.offset);
        let block = self.window(header.block_len() as usize, end)?;
        let view = block.and_then(BlockView::parse).map_err(|error| Error::corrupt(at, error.to_string()))?;
        Ok((hash(algorithm, &[view.payload]), view.tag))
    }

    /// Looks whether the segment has been ended meanwhile.
    fn refresh(&mut self, shard: &Shard) -> Result<Refresh> {
        let segments = shard.segments(true)?;
        let Some(name) = segments.iter().find(|segment| segment.ordinal == self.opened.name.ordinal) else {
            return Ok(Refresh::Dropped);
        };
        let changed = match (&self.opened.end, &name.active) {
            (End::Active(view), Some(active)) => !Arc::ptr_eq(view, active),
            (End::Active(_), None) => true,
            _ => {
                let before = self.end()?;
                let Some(opened) = shard.open_listed(name)? else { return Ok(Refresh::Dropped) };
                let ended = !matches!(opened.end, End::Unknown);
                shard.authenticate(&opened)?;
                self.opened.end = opened.end;
                return Ok(if ended || self.end()? > before { Refresh::Changed } else { Refresh::Same });
            }
        };
        if !changed {
            return Ok(Refresh::Same);
        }
        let Some(opened) = shard.open_listed(name)? else { return Ok(Refresh::Dropped) };
        self.opened = opened;
        shard.authenticate(&self.opened)?;
        Ok(Refresh::Changed)
    }
}
