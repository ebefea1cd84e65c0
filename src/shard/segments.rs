//! The segments of a shard: listing them by name, opening one, and finding out how it ends.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    sync::{Arc, Weak},
};

use tracing::warn;

use super::{
    CurrentPlan, ShardContext,
    active::ActiveView,
    chain::{Chain, Proved, check_older, retired_end},
    listing::{SegmentRef, list_segments},
    record::{Head, Loss, ReloadRecord, ShardRecord, is_unknown_end},
    rules::{chain_rule, check_rules, denies_predecessor},
};
use crate::{
    Error, ErrorKind, Result,
    error::Location,
    io::{Disk, DiskFile, FileKind, OpenMode, is_temporary, read_exact_at},
    keys::gate::Gate,
    segment::{
        DecodeError, DecodedFooter, DecodedHeader, Footer, KeySource, Predecessor, PredecessorEnd,
        SEGMENT_BYTES_MAX, SegmentHeader, SegmentName, Trailer,
    },
    sync::{
        LockRank, RwLock,
        atomic::{AtomicBool, AtomicU32, Ordering},
        read, write,
    },
};

/// How a segment ends.
#[derive(Clone, Debug)]
pub(crate) enum End {
    /// With a footer.
    Sealed(Arc<DecodedFooter>),
    /// At the place that its successor names, because a crash cut it off; or that the catalogue
    /// names, for a segment under a retired version of the service keyring.
    Cut(PredecessorEnd),
    /// This process is writing it.
    Active(Arc<ActiveView>),
    /// Unknown: another process is writing it, or a crash cut it off and it was not recovered yet.
    Unknown,
    /// Unknown, because the segment, or the one behind it, is damaged or exchanged. The blocks in front of the
    /// damage are authentic. Behind the last of them the segment has this error.
    Damaged(Arc<Error>),
}

/// How blocks behind damage, in a segment that is not sealed, are recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Proof {
    /// By their tag, under the key of the segment.
    Tag,
    /// By their CRC32, for a caller that may use no key. A footer then proves nothing.
    Crc,
}

/// A segment with its file open and its header read. Nothing of it is authenticated yet.
#[derive(Clone, Debug)]
pub(crate) struct Opened {
    pub(crate) name: SegmentRef,
    pub(crate) file: Arc<dyn DiskFile>,
    pub(crate) header: Arc<DecodedHeader>,
    pub(crate) end: End,
    /// The end that its successor, or the catalogue, names for a sealed segment.
    pub(crate) vouched: Option<PredecessorEnd>,
}

impl Opened {
    pub(crate) fn at(&self, offset: u64) -> Location {
        Location::new(&*self.name.path, offset)
    }

    pub(super) fn file_len(&self) -> Result<u64> {
        self.file.len().map_err(Error::io("get the length of", &*self.name.path))
    }

    pub(super) fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        self.file.read_at(buf, offset).map_err(Error::io("read", &*self.name.path))
    }
}

/// The list of the segments, and what it was made of.
struct Listed {
    segments: Arc<Vec<SegmentRef>>,
    /// The mark of the directory from before it was listed.
    names: Option<u128>,
    record: ShardRecord,
}

/// How often a read-only opener relies on an unchanged directory before it lists the directory all
/// the same: a file system may show changes late.
const LOOKS_MAX: u32 = 64;

/// The segments of one shard, and the catalogue's record of it.
pub(crate) struct SegmentList {
    shard: u32,
    dir: PathBuf,
    disk: Arc<dyn Disk>,
    gate: Arc<Gate>,
    plan: Arc<CurrentPlan>,
    read_only: bool,
    /// For a read-only opener.
    reload: Option<Weak<dyn ReloadRecord>>,
    record: RwLock<ShardRecord>,
    /// By ordinal; `None` until they were listed.
    listed: RwLock<Option<Listed>>,
    /// How often a read-only opener has relied on the list since it was made.
    looks: AtomicU32,
    chain: Chain,
    /// Whether files that are not needed any more could not be removed.
    leftovers: AtomicBool,
    /// Whether no segment is under a data key.
    no_data_key: AtomicBool,
}

impl SegmentList {
    pub(super) fn new(
        context: &ShardContext,
        shard: u32,
        dir: PathBuf,
        record: ShardRecord,
    ) -> Self {
        Self {
            shard,
            dir,
            disk: Arc::clone(&context.disk),
            gate: Arc::clone(&context.gate),
            plan: Arc::clone(&context.plan),
            read_only: context.read_only,
            reload: context.reload.clone(),
            record: RwLock::new(LockRank::ShardRecord, record),
            listed: RwLock::new(LockRank::ShardSegments, None),
            looks: AtomicU32::new(0),
            chain: Chain::default(),
            leftovers: AtomicBool::new(false),
            no_data_key: AtomicBool::new(false),
        }
    }

    pub(super) fn shard(&self) -> u32 {
        self.shard
    }

    pub(super) fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Whether no segment was under a data key when that was checked. Since then, this process has
    /// added all others.
    pub(super) fn has_no_data_key(&self) -> bool {
        self.no_data_key.load(Ordering::Relaxed)
    }

    pub(super) fn note_no_data_key(&self) {
        self.no_data_key.store(true, Ordering::Relaxed);
    }

    // ---- the catalogue's record ----

    pub(super) fn record(&self) -> ShardRecord {
        read(&self.record).clone()
    }

    pub(super) fn set_record(&self, record: ShardRecord) {
        *write(&self.record) = record;
    }

    /// Sets the head, whether it is in the catalogue already or not. Recovery by this process keeps
    /// everything in front of it.
    pub(super) fn set_head(&self, head: Head) {
        write(&self.record).head = Some(head);
    }

    /// Notes that the catalogue has this head.
    pub(super) fn note_head(&self, head: &Head) {
        let mut record = write(&self.record);
        if record.head.as_ref().is_none_or(|known| known.reach() <= head.reach()) {
            record.head = Some(head.clone());
        }
    }

    /// Notes the first segment, and the first sequence number in it, that retention keeps.
    pub(super) fn note_first(&self, first_ordinal: u64, first_seq: u64) {
        let mut record = write(&self.record);
        (record.first_ordinal, record.first_seq) = (first_ordinal, first_seq);
        record.forget_dropped_losses();
    }

    /// Notes a loss that the catalogue has.
    pub(super) fn note_loss(&self, loss: Loss) {
        write(&self.record).accept(loss);
    }

    /// Whether the loss of a segment was accepted.
    pub(super) fn is_lost(&self, ordinal: u64) -> bool {
        read(&self.record).loss(ordinal).is_some()
    }

    /// Whether an operator has accepted this error of a segment.
    pub(super) fn has_accepted(&self, ordinal: u64, error: &Error) -> bool {
        read(&self.record).loss(ordinal).is_some_and(|loss| loss.covers(error))
    }

    /// Reads the record again, for a read-only opener. `None` for the writer, whose record is the
    /// current one.
    pub(super) fn reload_record(&self) -> Option<Result<()>> {
        let reload = self.reload.as_ref()?;
        let record = reload
            .upgrade()
            .ok_or(Error::Closed("the store"))
            .and_then(|reload| reload.reload_record(self.gate.name(), self.shard));
        Some(record.map(|record| self.set_record(record)))
    }

    /// The head behind the last segment of the shard, which is sealed. Numbers behind its end may
    /// have been given to groups that were still queued when it was sealed, or lie above the mark
    /// of the segment that it was recovered from. So only a recorded head can name a number below
    /// the reserved limit for the next segment.
    pub(super) fn last_head(&self, header: &DecodedHeader, footer: &Footer, file_len: u64) -> Head {
        let head = Head::sealed(header, footer, file_len);
        let recorded = self
            .record()
            .head
            .filter(|recorded| recorded.sealed && recorded.ordinal == head.ordinal);
        let next_seq =
            recorded.map_or(header.limit_seq, |recorded| recorded.next_seq.max(head.next_seq));
        Head { next_seq, ..head }
    }

    // ---- the list ----

    /// The segments by ordinal, from the first retained one. A process that writes lists the
    /// directory once and keeps the list itself from then on. A read-only opener looks at the
    /// directory again with `refresh`, which is how it finds new segments.
    pub(super) fn segments(&self, refresh: bool) -> Result<Arc<Vec<SegmentRef>>> {
        let refresh = refresh && self.read_only;
        if let Some(listed) = &*read(&self.listed)
            && (!refresh || self.is_current(listed))
        {
            return Ok(Arc::clone(&listed.segments));
        }
        let mut listed = write(&self.listed);
        if let Some(listed) = &*listed
            && !refresh
        {
            return Ok(Arc::clone(&listed.segments));
        }
        let mut found = self.look()?;
        let is_gone = |one: &SegmentRef| one.is_missing() && !self.is_lost(one.ordinal);
        if self.reload.is_some() && found.segments.iter().any(is_gone) {
            // Retention may have dropped segments that are in the copy of the record. Reading the
            // catalogue may call the KMS, so this thread gives up the lock meanwhile.
            drop(listed);
            self.reload_record().transpose()?;
            listed = write(&self.listed);
            found = self.look()?;
        }
        self.looks.store(0, Ordering::Relaxed);
        Ok(Arc::clone(&listed.insert(found).segments))
    }

    /// Lists the directory.
    fn look(&self) -> Result<Listed> {
        let (names, record) = (self.names_mark(), self.record());
        Ok(Listed { segments: Arc::new(self.list()?), names, record })
    }

    /// Whether another look at the directory would give the same list.
    fn is_current(&self, listed: &Listed) -> bool {
        listed.names.is_some()
            && self.looks.fetch_add(1, Ordering::Relaxed) < LOOKS_MAX
            && *read(&self.record) == listed.record
            && self.names_mark() == listed.names
    }

    /// The mark of the names in the directory. Only a read-only opener needs it.
    fn names_mark(&self) -> Option<u128> {
        // The error is for the listing.
        self.read_only.then(|| self.disk.names_mark(&self.dir).ok().flatten()).flatten()
    }

    fn list(&self) -> Result<Vec<SegmentRef>> {
        Ok(self.list_of(&self.file_names()?))
    }

    fn list_of(&self, names: &[String]) -> Vec<SegmentRef> {
        list_segments(&self.dir, names, &self.record(), &|name| self.is_ours(name))
    }

    /// The files with the name of a segment that are no segment of the shard: an attacker made them,
    /// or a writer that had lost the store to another one.
    pub(super) fn strangers(&self) -> Result<Vec<PathBuf>> {
        let names = self.file_names()?;
        let listed: HashSet<_> = self.list_of(&names).into_iter().map(|one| one.path).collect();
        let first = self.record().first_ordinal;
        let is_strange =
            |name: &&String| SegmentName::parse(name).is_some_and(|name| name.ordinal >= first);
        let paths = names.iter().filter(is_strange).map(|name| self.dir.join(name));
        Ok(paths.filter(|path| !listed.contains(&**path)).collect())
    }

    /// Whether a file may be the segment of its name, by its header, which is not authenticated. A
    /// file that cannot be read may be.
    fn is_ours(&self, name: &SegmentName) -> bool {
        let path = self.dir.join(name.to_string());
        match self.disk.open(&path, OpenMode::Read).map_err(Error::io("open", &*path)) {
            Ok(file) => match read_header(&*file, &path) {
                Ok(header) => self.has_place(name, &header),
                Err(error) => error.kind() != ErrorKind::Integrity,
            },
            Err(error) => !matches!(error, Error::WrongFileType { .. }),
        }
    }

    /// Whether a header names this shard, and the ordinal, first sequence number and epoch of a
    /// name.
    fn has_place(&self, name: &SegmentName, header: &SegmentHeader) -> bool {
        header.store == self.gate.context().store
            && header.logstore == self.gate.id()
            && header.shard == self.shard
            && header.ordinal == name.ordinal
            && header.first_seq == name.first_seq
            && header.epoch == name.epoch
    }

    /// The names in the directory of the shard. No directory has none: a copy of a store may leave
    /// empty directories out.
    fn file_names(&self) -> Result<Vec<String>> {
        match self.disk.list_dir(&self.dir) {
            Ok(entries) => Ok(entries.into_iter().map(|entry| entry.name).collect()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(Error::io("list", &self.dir)(error)),
        }
    }

    /// The accepted loss that the shard ends in, if it does.
    pub(super) fn ends_in_loss(&self) -> Result<Option<Loss>> {
        let segments = self.segments(true)?;
        let Some(last) = segments.last() else { return Ok(None) };
        Ok(read(&self.record).loss(last.ordinal).cloned())
    }

    /// The segment of this ordinal, if there is one.
    pub(super) fn find(&self, ordinal: u64) -> Result<Option<SegmentRef>> {
        let segments = self.segments(false)?;
        let at = segments.partition_point(|segment| segment.last_ordinal() < ordinal);
        Ok(segments.get(at).filter(|name| name.ordinal <= ordinal).cloned())
    }

    /// The first segment behind an ordinal, if there is one. With `refresh` a read-only opener lists
    /// the directory again if it knows of none: reading a shard from end to end does not list it
    /// once for each segment.
    pub(super) fn behind(&self, ordinal: u64, refresh: bool) -> Result<Option<SegmentRef>> {
        let first_behind = |segments: &[SegmentRef]| {
            segments.get(segments.partition_point(|one| one.ordinal <= ordinal)).cloned()
        };
        match first_behind(&self.segments(false)?) {
            None if refresh => Ok(first_behind(&self.segments(true)?)),
            behind => Ok(behind),
        }
    }

    /// The ordinal of the next segment of a shard that has no writer. It is taken from the
    /// directory, because a writer that failed may have created a segment that is not in the list.
    /// Syncs the directory first, so that no ordinal is used twice.
    pub(super) fn next_ordinal_on_disk(&self) -> Result<u64> {
        self.make_names_durable()?;
        let record = self.record();
        let listed = self.list()?.last().map_or(0, SegmentRef::last_ordinal);
        let recorded = record.head.map_or(0, |head| head.ordinal);
        Ok((listed.max(recorded) + 1).max(record.first_ordinal))
    }

    /// Adds the segment that the writer has begun, or that recovery has rewritten.
    pub(super) fn push(&self, segment: SegmentRef) {
        self.change(|segments| segments.push(segment));
    }

    /// The writer has sealed the last segment.
    pub(super) fn seal_last(&self, end: PredecessorEnd) {
        self.change(|segments| {
            if let Some(last) = segments.last_mut() {
                last.active = None;
                last.sealed = Some(end);
            }
        });
    }

    /// The writer has given its segment up: blocks that are written and not synced are not part of
    /// the shard any more, although they can be read.
    pub(super) fn abandon_active(&self) {
        self.change(|segments| segments.iter_mut().for_each(|segment| segment.active = None));
    }

    /// Forgets the segments below `ordinal`: retention drops them.
    pub(super) fn drop_before(&self, ordinal: u64) {
        self.change(|segments| segments.retain(|segment| segment.last_ordinal() >= ordinal));
        self.chain.drop_before(ordinal);
    }

    /// Forgets the list: the next caller that needs it lists the directory again.
    pub(super) fn forget(&self) {
        *write(&self.listed) = None;
    }

    fn change(&self, change: impl FnOnce(&mut Vec<SegmentRef>)) {
        if let Some(listed) = &mut *write(&self.listed) {
            change(Arc::make_mut(&mut listed.segments));
        }
    }

    /// Creates the directory of the shard if it is missing: a copy of a store may leave empty
    /// directories out.
    pub(super) fn ensure_directory(&self) -> Result<()> {
        match self.disk.create_dir(&self.dir) {
            Ok(()) => {
                let parent = self.dir.parent().unwrap_or(&self.dir);
                self.disk.sync_dir(parent).map_err(Error::io("sync", parent))
            }
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(Error::io("create", &self.dir)(error)),
        }
    }

    /// Syncs the directory of the shard. An earlier process may have renamed a segment, and died or
    /// failed before it synced the directory. Call this before the catalogue refers to the
    /// segments.
    pub(super) fn make_names_durable(&self) -> Result<()> {
        match self.disk.sync_dir(&self.dir) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => self.ensure_directory(),
            synced => synced.map_err(Error::io("sync", &self.dir)),
        }
    }

    /// Removes the segments that retention has dropped, and with `temporaries` also the temporary
    /// files that a crash has left: only the writer may remove those, while it has no segment in the
    /// making. A file that cannot be removed stays, and is tried again later. Returns how many bytes
    /// were freed, and how many files stay.
    pub(super) fn remove_leftovers(&self, temporaries: bool) -> Result<(u64, u64)> {
        let first = self.record().first_ordinal;
        let (mut freed, mut left) = (0, 0);
        for name in self.file_names()? {
            let dropped = SegmentName::parse(&name).is_some_and(|name| name.ordinal < first);
            let is_left = dropped || (temporaries && is_segment_temporary(&name));
            if !is_left {
                continue;
            }
            let path = self.dir.join(&name);
            let stat = self.disk.stat(&path).ok().flatten();
            let len = stat.filter(|stat| stat.kind == FileKind::File).map_or(0, |stat| stat.len);
            match self.disk.remove_file(&path) {
                Ok(()) => freed += len,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => {
                    left += 1;
                    let (logstore, path) = (self.gate.name(), path.display());
                    warn!(%logstore, shard = self.shard, %path, %error, "cannot remove a file of a shard; will retry");
                }
            }
        }
        self.leftovers.store(left > 0, Ordering::Relaxed);
        Ok((freed, left))
    }

    /// Whether the last call of [`SegmentList::remove_leftovers`] could not remove a file.
    pub(super) fn has_leftovers(&self) -> bool {
        self.leftovers.load(Ordering::Relaxed)
    }

    // ---- one segment ----

    /// Opens a segment that was listed; `None` if retention has dropped it since, in this process
    /// or in the writer's.
    pub(super) fn open_listed(&self, name: &SegmentRef) -> Result<Option<Opened>> {
        let error = match self.open_segment(name) {
            Ok(opened) => return Ok(Some(opened)),
            Err(error) => error,
        };
        if self.is_dropped(name) { Ok(None) } else { Err(error) }
    }

    /// Whether retention has dropped a segment since it was listed. A reader reads the catalogue
    /// again, and relies on its last copy if it cannot.
    fn is_dropped(&self, name: &SegmentRef) -> bool {
        let _ = self.reload_record();
        name.ordinal < self.record().first_ordinal
    }

    /// Opens a segment, checks that its header belongs there, and finds out how it ends.
    pub(super) fn open_segment(&self, name: &SegmentRef) -> Result<Opened> {
        self.open_with(name, || self.expected_end(name))
    }

    /// As [`SegmentList::open_segment`], for a sealed segment whose end is known. Does not look at
    /// the successor.
    pub(super) fn open_sealed(&self, name: &SegmentRef, end: PredecessorEnd) -> Result<Opened> {
        self.open_with(name, || Ok(Expected::Sealed(end)))
    }

    fn open_with(
        &self,
        name: &SegmentRef,
        expected_end: impl FnOnce() -> Result<Expected>,
    ) -> Result<Opened> {
        let open = |file: &Arc<dyn DiskFile>, header: &Arc<DecodedHeader>, end, vouched| Opened {
            name: name.clone(),
            file: Arc::clone(file),
            header: Arc::clone(header),
            end,
            vouched,
        };
        if let Some(active) = &name.active {
            return Ok(open(&active.file, &active.header, End::Active(Arc::clone(active)), None));
        }
        let path = &*name.path;
        let (file, header) = self.open_file(name)?;
        // Must come before the length: once there is a successor, the segment grows no more under a
        // read-only opener.
        let expected = expected_end()?;
        let len = file.len().map_err(Error::io("get the length of", path))?;
        if len > SEGMENT_BYTES_MAX {
            let what = format!("the segment has {len} bytes, and may have {SEGMENT_BYTES_MAX}");
            return Err(Error::corrupt(Location::new(path, SEGMENT_BYTES_MAX), what));
        }
        let (end, vouched) =
            self.find_end(&open(&file, &header, End::Unknown, None), len, expected)?;
        Ok(open(&file, &header, end, vouched))
    }

    /// Opens the file of a segment, and reads the header.
    pub(super) fn open_file(
        &self,
        name: &SegmentRef,
    ) -> Result<(Arc<dyn DiskFile>, Arc<DecodedHeader>)> {
        if name.is_missing() {
            return Err(name.missing());
        }
        let path = &*name.path;
        let file = self.disk.open(path, OpenMode::Read).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => {
                Error::truncated(Location::new(path, 0), "the segment is missing")
            }
            _ => Error::io("open", path)(error),
        })?;
        let header = Arc::new(read_header(&*file, path)?);
        self.check_identity(name, &header)?;
        Ok((file, header))
    }

    /// Opens a segment that [`SegmentList::open_segment`] refuses with `cause`, to read the blocks
    /// in front of the damage.
    ///
    /// # Errors
    /// `cause`, if the header is lost too. [`Error::Io`] and others, which are no loss.
    pub(super) fn open_damaged(&self, name: &SegmentRef, cause: Error) -> Result<Opened> {
        let (file, header) = match self.open_file(name) {
            Err(error) if error.is_loss() => return Err(cause),
            opened => opened?,
        };
        let end = End::Damaged(Arc::new(cause));
        Ok(Opened { name: name.clone(), file, header, end, vouched: None })
    }

    /// How a segment of `len` bytes ends, by its footer and by the end that is expected of it. Also
    /// returns the end that successor or catalogue vouch for, if it is sealed and they do.
    fn find_end(
        &self,
        opened: &Opened,
        len: u64,
        expected: Expected,
    ) -> Result<(End, Option<PredecessorEnd>)> {
        let footer = read_footer(&*opened.file, &opened.name.path, &opened.header, len);
        match (footer, expected) {
            (
                Err(
                    error @ (Error::NewerFormat { .. }
                    | Error::OlderFormat { .. }
                    | Error::UnsupportedFeature { .. }),
                ),
                _,
            ) => Err(error),
            (_, Expected::Cut(end)) => Ok((cut_end(opened, len, end)?, None)),
            (footer, Expected::Sealed(end)) => {
                Ok((sealed_end(opened, len, footer, end)?, Some(end)))
            }
            (footer, Expected::Open { at_least }) => {
                Ok((self.open_end(opened, len, footer, at_least)?, None))
            }
            // The tag of the footer is checked before a block is read.
            (Ok(Some(sealed)), Expected::Unnamed(_)) => Ok((End::Sealed(Arc::new(sealed)), None)),
            (Ok(None), Expected::Unnamed(cause)) => Ok((End::Damaged(Arc::new(cause)), None)),
            (Err(error), Expected::Unnamed(_)) => Err(error),
        }
    }

    /// The end of a segment for which nothing vouches, except that it reaches `at_least` so far.
    fn open_end(
        &self,
        opened: &Opened,
        len: u64,
        footer: Result<Option<DecodedFooter>>,
        at_least: u64,
    ) -> Result<End> {
        let path = &*opened.name.path;
        match footer {
            // Recovery syncs a segment before it gives it its name.
            Ok(Some(sealed)) if sealed.footer.recovered => {
                return Ok(End::Sealed(Arc::new(sealed)));
            }
            // The footer may not have reached the disk yet, and a crash may have torn it. The
            // blocks decide how far the segment reaches.
            Ok(_) | Err(Error::Corrupt { .. } | Error::Truncated { .. }) => {}
            Err(error) => return Err(error),
        }
        if len < at_least {
            let what =
                format!("the segment has {len} bytes, the catalogue says at least {at_least}");
            return Err(Error::truncated(Location::new(path, len), what));
        }
        let Some(end) = retired_end(self, &opened.header, path)? else { return Ok(End::Unknown) };
        check_link(path, &opened.header, &end)?;
        Ok(End::Cut(end))
    }

    /// The end of a segment that its successor, the catalogue, or this process as its writer names.
    fn expected_end(&self, name: &SegmentRef) -> Result<Expected> {
        let loss = read(&self.record).loss(name.ordinal + 1).and_then(|loss| loss.before.clone());
        if let Some(head) = loss.filter(|head| head.ordinal == name.ordinal) {
            let sealed = head.sealed;
            let end = head.into_end();
            return Ok(if sealed { Expected::Sealed(end) } else { Expected::Cut(end) });
        }
        let successor = match self.successor(name) {
            // A file in the place of the successor says nothing about this segment.
            Err(error) if error.kind() == ErrorKind::Integrity => {
                return Ok(Expected::Unnamed(error));
            }
            successor => successor?,
        };
        if let Some((header, path)) = successor {
            if let Some((at, rule)) = chain_rule(&header) {
                // Where the link is broken, neither of the two segments is read.
                return Err(Error::corrupt(Location::new(&*path, at), rule));
            }
            return match &header.predecessor {
                Predecessor::Cut(end) if is_unknown_end(end) => {
                    Ok(Expected::Unnamed(Error::corrupt(
                        Location::new(&*path, 0),
                        "the end of the segment before it was lost",
                    )))
                }
                Predecessor::Sealed(end) => Ok(Expected::Sealed(*end)),
                Predecessor::Cut(end) => Ok(Expected::Cut(*end)),
                Predecessor::None => Err(denies_predecessor(&path)),
            };
        }
        if let Some(end) = name.sealed {
            return Ok(Expected::Sealed(end));
        }
        match self.record().head {
            Some(head) if head.ordinal == name.ordinal && head.sealed => {
                Ok(Expected::Sealed(head.into_end()))
            }
            Some(head) if head.ordinal == name.ordinal => {
                Ok(Expected::Open { at_least: head.bytes })
            }
            _ => Ok(Expected::Open { at_least: 0 }),
        }
    }

    /// The end that the catalogue, or the successor, names for a segment. A successor's header is
    /// not authenticated.
    pub(super) fn named_end(&self, name: &SegmentRef) -> Option<PredecessorEnd> {
        let last = SegmentRef { ordinal: name.last_ordinal(), ..name.clone() };
        match self.expected_end(&last) {
            Ok(Expected::Sealed(end) | Expected::Cut(end)) => Some(end),
            _ => None,
        }
    }

    /// Authenticates the parts of a segment that a reader relies on before it reads a block, and a
    /// writer before it begins the next segment: the header, and the statement of where it ends.
    pub(super) fn authenticate(&self, opened: &Opened) -> Result<()> {
        // A segment whose key was destroyed on purpose can be neither authenticated nor read.
        let prove =
            |header: &DecodedHeader, path: &Path| match self
                .gate
                .with_cipher(header, path, |_| Ok(()))
            {
                Err(Error::Shredded { .. }) => Ok(()),
                proved => proved,
            };
        match &opened.end {
            End::Active(_) => return Ok(()),
            End::Sealed(_) => self.verify_footer(opened)?,
            End::Damaged(_) => prove(&opened.header, &opened.name.path)?,
            End::Cut(_) | End::Unknown => {
                prove(&opened.header, &opened.name.path)?;
                if !self.is_lost(opened.name.ordinal + 1)
                    && let Some((header, path)) = self.successor(&opened.name)?
                {
                    prove(&header, &path)?;
                }
            }
        }
        check_rules(self, opened)?;
        check_older(self, opened)
    }

    /// Authenticates the footer of a sealed segment.
    pub(super) fn verify_footer(&self, opened: &Opened) -> Result<()> {
        let End::Sealed(sealed) = &opened.end else { return Ok(()) };
        let (path, footer) = (&*opened.name.path, &sealed.footer);
        let encoded = footer.encode();
        self.gate.with_cipher(&opened.header, path, |cipher| {
            cipher.verify_tag_only(&footer.nonce(), &encoded, &sealed.tag).map_err(|_| {
                Error::Tampered { at: Location::new(path, footer.offset), what: "the footer" }
            })
        })
    }

    /// Whether a segment is the one that had this head, by its header and by its successor's.
    pub(super) fn agrees_with(&self, head: &Head) -> Result<bool> {
        let Some(name) = self.find(head.ordinal)? else { return Ok(false) };
        if self.header(&name)?.segment != head.segment {
            return Ok(false);
        }
        Ok(match self.successor(&name)?.map(|(header, _)| header.predecessor) {
            Some(Predecessor::Sealed(end)) => {
                end.digest == head.digest || (!head.sealed && end.blocks > head.blocks)
            }
            Some(Predecessor::Cut(end)) => !head.sealed && end.blocks >= head.blocks,
            Some(Predecessor::None) => false,
            None => true,
        })
    }

    /// The header of the segment after this one, not authenticated, and its path; `None` when this
    /// is the last.
    ///
    /// # Errors
    /// The file of the next segment cannot be read, or has another segment in it.
    fn successor(&self, name: &SegmentRef) -> Result<Option<(Arc<DecodedHeader>, Arc<Path>)>> {
        let Some(next) = self.find(name.ordinal + 1)? else { return Ok(None) };
        let header = self.header(&next)?;
        self.check_place(&next, &header)?;
        let record = read(&self.record);
        let known = record.head.as_ref().filter(|head| head.ordinal == next.ordinal);
        if known.is_some_and(|head| head.segment != header.segment) {
            let what =
                format!("{} is not the segment that the catalogue knows", next.path.display());
            return Err(Error::RolledBack { what });
        }
        Ok(Some((header, next.path)))
    }

    /// The header of a segment, not authenticated.
    pub(super) fn header(&self, name: &SegmentRef) -> Result<Arc<DecodedHeader>> {
        if let Some(active) = &name.active {
            return Ok(Arc::clone(&active.header));
        }
        if name.is_missing() {
            return Err(name.missing());
        }
        let file =
            self.disk.open(&name.path, OpenMode::Read).map_err(Error::io("open", &*name.path))?;
        Ok(Arc::new(read_header(&*file, &name.path)?))
    }

    /// Whether a segment is of a later time than the metadata: its header, which is not authenticated,
    /// names a data key that the metadata lacks, or a later generation.
    pub(super) fn is_ahead_of_metadata(&self, name: &SegmentRef) -> bool {
        let Ok(header) = self.header(name) else { return false };
        let lacks_key = match header.key_source {
            KeySource::DataKey(version) => {
                let section = self.gate.keys().section;
                section.is_some_and(|section| section.version(version).is_none())
            }
            KeySource::Keyring(_) => false,
        };
        lacks_key || header.generation > self.plan.get().generation
    }

    /// Segments of these ordinals that are missing. The one behind them begins at `first_seq`.
    pub(super) fn gap(&self, first: u64, last: u64, first_seq: u64) -> SegmentRef {
        SegmentRef::gap(&self.dir, first, last, first_seq)
    }

    /// The key source in the header of a segment, which is not authenticated.
    pub(super) fn key_source(&self, name: &SegmentRef) -> Result<KeySource> {
        let header = self.header(name)?;
        self.check_identity(name, &header)?;
        Ok(header.key_source)
    }

    /// A segment as the catalogue proves it: see [`Chain::prove`].
    pub(super) fn proved(&self, ordinal: u64) -> Result<Option<Proved>> {
        self.chain.prove(self, ordinal)
    }

    /// The key source of a segment, as the catalogue proves it or this process wrote it; `None`
    /// when it is not known.
    pub(super) fn proved_key_source(&self, name: &SegmentRef) -> Result<Option<KeySource>> {
        if let Some(active) = &name.active {
            return Ok(Some(active.header.key_source));
        }
        Ok(self.proved(name.ordinal)?.map(|proved| proved.header.key_source))
    }

    /// Checks that a header is that of the segment with this name.
    fn check_place(&self, name: &SegmentRef, header: &SegmentHeader) -> Result<()> {
        let SegmentRef { ordinal, first_seq, epoch, .. } = *name;
        if self.has_place(&SegmentName { ordinal, first_seq, epoch }, header) {
            return Ok(());
        }
        let at = Location::new(&*name.path, 0);
        Err(Error::Tampered { at, what: "a segment that belongs elsewhere" })
    }

    fn check_identity(&self, name: &SegmentRef, header: &SegmentHeader) -> Result<()> {
        let path = &*name.path;
        self.check_place(name, header)?;
        // A read-only opener may have older metadata than the writer. It checks the generation
        // again once the header is authenticated.
        if self.read_only { Ok(()) } else { self.check_generation(path, header) }
    }

    /// Checks that the metadata is at least as new as the header.
    pub(super) fn check_generation(&self, path: &Path, header: &SegmentHeader) -> Result<()> {
        let generation = self.plan.get().generation;
        if header.generation > generation {
            let what = format!(
                "the metadata of Logstore {} (generation {generation}) is older than {} (generation {})",
                self.gate.name(),
                path.display(),
                header.generation
            );
            return Err(Error::RolledBack { what });
        }
        Ok(())
    }
}

/// The end of a segment that others name.
enum Expected {
    Sealed(PredecessorEnd),
    Cut(PredecessorEnd),
    /// None is named. The catalogue may know how far the segment reached at least.
    Open {
        at_least: u64,
    },
    /// The successor, which names it, is missing or damaged, or another object has its name.
    Unnamed(Error),
}

/// Checks that the end which successor or catalogue name is that of the segment in `path`.
fn check_link(path: &Path, header: &SegmentHeader, end: &PredecessorEnd) -> Result<()> {
    if end.segment == header.segment && end.ordinal == header.ordinal {
        return Ok(());
    }
    let what =
        format!("{} is not the segment that its successor or the catalogue names", path.display());
    Err(Error::RolledBack { what })
}

/// Reads a segment's header from its file.
pub(crate) fn read_header(file: &dyn DiskFile, path: &Path) -> Result<DecodedHeader> {
    let io = |error| Error::io("read", path)(error);
    let mut bytes = vec![0; SegmentHeader::READ_HINT];
    let read = file.read_at(&mut bytes, 0).map_err(io)?;
    bytes.truncate(read);
    match SegmentHeader::decode(&bytes) {
        Err(DecodeError::Short { needed, have })
            if read == SegmentHeader::READ_HINT
                && needed > have
                && needed <= SegmentHeader::LEN_MAX as u64 =>
        {
            bytes.resize(SegmentHeader::LEN_MAX, 0);
            let read = file.read_at(&mut bytes, 0).map_err(io)?;
            bytes.truncate(read);
            SegmentHeader::decode(&bytes)
        }
        decoded => decoded,
    }
    .map_err(|error| error.in_file(path, 0))
}

/// The end of a segment of `len` bytes that its successor cut there.
fn cut_end(opened: &Opened, len: u64, end: PredecessorEnd) -> Result<End> {
    let (header, path) = (&*opened.header, &*opened.name.path);
    check_link(path, header, &end)?;
    if len < end.bytes {
        let what = format!("the segment has {len} bytes, its successor says {}", end.bytes);
        return Err(Error::truncated(Location::new(path, len), what));
    }
    if end.bytes < header.body_start {
        let at = Location::new(path, end.bytes);
        return Err(Error::corrupt(at, "the segment is cut within its header"));
    }
    Ok(End::Cut(end))
}

/// The end of a segment of `len` bytes that successor or catalogue know as sealed.
fn sealed_end(
    opened: &Opened,
    len: u64,
    footer: Result<Option<DecodedFooter>>,
    end: PredecessorEnd,
) -> Result<End> {
    let (header, path) = (&*opened.header, &*opened.name.path);
    match footer {
        Ok(Some(sealed)) => {
            check_link(path, header, &end)?;
            let digest = sealed.footer.digest(header.payload_hash, &header.header_hash);
            if digest != end.digest || len != end.bytes {
                let what = format!(
                    "{} is another segment than its successor or the catalogue says",
                    path.display()
                );
                return Err(Error::RolledBack { what });
            }
            Ok(End::Sealed(Arc::new(sealed)))
        }
        Ok(None) | Err(Error::Corrupt { .. } | Error::Truncated { .. }) if len < end.bytes => {
            let what = format!("the segment has {len} bytes, it was sealed with {}", end.bytes);
            Err(Error::truncated(Location::new(path, len), what))
        }
        Ok(None) => {
            let at = Location::new(path, len.saturating_sub(Trailer::LEN as u64));
            Err(match has_whole_footer(&*opened.file, len) {
                // Header and footer are both intact, and were not made for each other.
                true => {
                    Error::Tampered { at, what: "the footer, or the header, of a sealed segment" }
                }
                false => Error::corrupt(at, "the footer of the sealed segment is damaged"),
            })
        }
        Err(error) => Err(error),
    }
}

/// Reads the footer at the end of a file of `len` bytes; `None` when it does not end in one.
pub(super) fn read_footer(
    file: &dyn DiskFile,
    path: &Path,
    header: &DecodedHeader,
    len: u64,
) -> Result<Option<DecodedFooter>> {
    let io = |error| Error::io("read", path)(error);
    let Some(trailer_at) =
        len.checked_sub(Trailer::LEN as u64).filter(|&at| at >= header.body_start)
    else {
        return Ok(None);
    };
    let mut trailer = [0; Trailer::LEN];
    if file.read_at(&mut trailer, trailer_at).map_err(io)? < trailer.len() {
        return Ok(None);
    }
    let Ok(trailer) = Trailer::decode(&trailer) else { return Ok(None) };
    let Some(at) = len.checked_sub(trailer.footer_len.into()).filter(|&at| at >= header.body_start)
    else {
        return Ok(None);
    };
    if trailer.segment_tag != header.segment_tag() {
        return Ok(None);
    }
    let mut bytes = vec![0; trailer.footer_len as usize];
    if file.read_at(&mut bytes, at).map_err(io)? < bytes.len() {
        return Ok(None);
    }
    let decoded = Footer::decode(&bytes).map_err(|error| error.in_file(path, at))?;
    if decoded.footer.offset != at {
        return Err(Error::corrupt(Location::new(path, at), "the footer is not where it says"));
    }
    Ok(Some(decoded))
}

/// Whether a file of `len` bytes ends in a whole footer, of any segment.
fn has_whole_footer(file: &dyn DiskFile, len: u64) -> bool {
    let read = |len: usize, at: u64| {
        let mut bytes = vec![0; len];
        read_exact_at(file, &mut bytes, at).ok().map(|()| bytes)
    };
    let footer = || {
        let trailer = read(Trailer::LEN, len.checked_sub(Trailer::LEN as u64)?)?;
        let footer_len = Trailer::decode(trailer.first_chunk()?).ok()?.footer_len;
        Footer::decode(&read(footer_len as usize, len.checked_sub(footer_len.into())?)?).ok()
    };
    footer().is_some()
}

/// Whether a name is that of a segment's temporary file.
pub(crate) fn is_segment_temporary(name: &str) -> bool {
    let stem = name.split('.').next().unwrap_or_default();
    SegmentName::parse(&format!("{stem}.seg")).is_some() && is_temporary(name, stem)
}
