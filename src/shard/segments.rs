//! The segments of a shard: listing them by name, opening one, and telling how it ends.

use std::{path::Path, sync::Arc};

use tracing::warn;

use super::{
    Head, Shard,
    hashing::PayloadHash,
    rules::{chain_rule, denies_predecessor},
};
use crate::{
    Error, Result,
    error::Location,
    io::{DiskFile, FileKind, OpenMode, is_temporary, read_exact_at},
    segment::{
        BlockHeader, DecodeError, DecodedFooter, DecodedHeader, Footer, FooterBuilder, KeySource, Predecessor,
        PredecessorEnd, SEGMENT_BYTES_MAX, SealBuffer, SegmentHeader, SegmentName, Trailer, end_of_data,
    },
    sync::{LockRank, Mutex, atomic::Ordering, lock, read, write},
};

/// A segment, as its name tells it.
#[derive(Clone, Debug)]
pub(crate) struct SegmentRef {
    pub(crate) ordinal: u64,
    pub(crate) first_seq: u64,
    pub(crate) epoch: u64,
    pub(crate) path: Arc<Path>,
    /// Set while this process writes it.
    pub(crate) active: Option<Arc<ActiveView>>,
    /// How it ends, once this process has sealed it. Nobody else may know yet.
    pub(crate) sealed: Option<PredecessorEnd>,
}

/// What readers see of the segment that this process writes.
#[derive(Debug)]
pub(crate) struct ActiveView {
    pub(crate) file: Arc<dyn DiskFile>,
    pub(crate) header: Arc<DecodedHeader>,
    progress: Mutex<Progress>,
}

struct Progress {
    visible: u64,
    /// Has counted all blocks. Its digest lacks the last one while that is pending.
    builder: FooterBuilder,
    pending: Option<PendingBlock>,
    /// For the next block.
    spare: SealBuffer,
}

/// A block that the digest does not cover yet.
struct PendingBlock {
    header: BlockHeader,
    payload_hash: PayloadHash,
    tag: [u8; 16],
}

impl Progress {
    /// Adds the last block to the digest.
    fn settle(&mut self) -> &FooterBuilder {
        if let Some(PendingBlock { header, payload_hash, tag }) = self.pending.take() {
            let (payload_hash, buffer) = payload_hash.settle();
            self.builder.add_to_digest(&header, &payload_hash, &tag);
            self.spare = buffer;
        }
        &self.builder
    }
}

impl std::fmt::Debug for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Progress").field("visible", &self.visible).finish_non_exhaustive()
    }
}

impl ActiveView {
    pub(super) fn new(file: Arc<dyn DiskFile>, header: Arc<DecodedHeader>) -> Arc<Self> {
        let (builder, visible, spare) = (FooterBuilder::of(&header), header.body_start, SealBuffer::default());
        Arc::new(Self {
            file,
            header,
            progress: Mutex::new(LockRank::ActiveView, Progress { visible, builder, pending: None, spare }),
        })
    }

    /// Adds a block that has been written and ends at `end`. Returns a buffer for the next block.
    pub(super) fn add(
        &self,
        offset: u64,
        header: &BlockHeader,
        payload_hash: PayloadHash,
        tag: &[u8; 16],
        end: u64,
    ) -> SealBuffer {
        let mut progress = lock(&self.progress);
        progress.settle();
        progress.builder.count(offset, header);
        progress.pending = Some(PendingBlock { header: *header, payload_hash, tag: *tag });
        progress.visible = end;
        std::mem::take(&mut progress.spare)
    }

    /// How far the file may be read.
    pub(crate) fn visible(&self) -> u64 {
        lock(&self.progress).visible
    }

    /// What the blocks so far add up to, digest included.
    pub(super) fn builder(&self) -> FooterBuilder {
        lock(&self.progress).settle().clone()
    }

    /// What the blocks so far add up to, but for the digest.
    pub(crate) fn with_counts<R>(&self, look: impl FnOnce(&Footer) -> R) -> R {
        look(lock(&self.progress).builder.so_far())
    }

    /// Where it stands.
    pub(crate) fn head(&self) -> Head {
        let mut progress = lock(&self.progress);
        let visible = progress.visible;
        Head::open(&self.header.header, progress.settle(), visible)
    }
}

/// How a segment ends.
#[derive(Clone, Debug)]
pub(crate) enum End {
    /// With a footer.
    Sealed(Arc<DecodedFooter>),
    /// Where its successor says: a crash cut it off. Or where the catalogue does, under a retired version of the service keyring.
    Cut(PredecessorEnd),
    /// This process is writing it.
    Active(Arc<ActiveView>),
    /// Nobody has said yet: another process is writing it, or a crash cut it off and it was not recovered.
    Unknown,
}

/// What decides whether the bytes found behind damage, in a segment that is not sealed, belong to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Proof {
    /// Its tag, under the key of the segment.
    Tag,
    /// Its CRC32, for those that may use no key. A footer then proves nothing.
    Crc,
}

/// A segment with its file open and its header read. Nothing of it is authenticated yet.
#[derive(Clone, Debug)]
pub(crate) struct Opened {
    pub(crate) name: SegmentRef,
    pub(crate) file: Arc<dyn DiskFile>,
    pub(crate) header: Arc<DecodedHeader>,
    pub(crate) end: End,
    /// What its successor, or the catalogue, says of the end of a sealed segment.
    pub(crate) vouched: Option<PredecessorEnd>,
}

impl Opened {
    /// When its data begins, in microseconds since the Unix epoch: no group in it is older.
    pub(crate) fn begins_us(&self) -> u64 {
        match &self.end {
            End::Sealed(footer) if footer.footer.group_count > 0 => footer.footer.first_time_us,
            _ => self.header.header.created_us,
        }
    }

    pub(crate) fn at(&self, offset: u64) -> Location {
        Location::new(&*self.name.path, offset)
    }
}

/// Reads a segment's header from its file.
pub(crate) fn read_header(file: &dyn DiskFile, path: &Path) -> Result<DecodedHeader> {
    let io = |error| Error::io("read", path)(error);
    let mut bytes = vec![0; SegmentHeader::READ_HINT];
    let read = file.read_at(&mut bytes, 0).map_err(io)?;
    bytes.truncate(read);
    match SegmentHeader::decode(&bytes) {
        Err(DecodeError::Short { needed, have })
            if read == SegmentHeader::READ_HINT && needed > have && needed <= SegmentHeader::LEN_MAX as u64 =>
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

/// Reads the footer at the end of a file of `len` bytes; `None` when it does not end in one.
pub(crate) fn read_footer(
    file: &dyn DiskFile,
    path: &Path,
    header: &DecodedHeader,
    len: u64,
) -> Result<Option<DecodedFooter>> {
    let io = |error| Error::io("read", path)(error);
    let Some(trailer_at) = len.checked_sub(Trailer::LEN as u64).filter(|&at| at >= header.body_start) else {
        return Ok(None);
    };
    let mut trailer = [0; Trailer::LEN];
    if file.read_at(&mut trailer, trailer_at).map_err(io)? < trailer.len() {
        return Ok(None);
    }
    let Ok(trailer) = Trailer::decode(&trailer) else { return Ok(None) };
    let Some(at) = len.checked_sub(trailer.footer_len.into()).filter(|&at| at >= header.body_start) else {
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

/// Whether a file of `len` bytes ends in a whole footer, of whatever segment.
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

impl Shard {
    /// The segments by ordinal, from the first retained one. Listed once by the process that writes, which then keeps the list
    /// itself; `refresh` lists again, which is how a read-only opener learns of new ones.
    pub(crate) fn segments(&self, refresh: bool) -> Result<Arc<Vec<SegmentRef>>> {
        if let Some(segments) = &*read(&self.segments)
            && !(refresh && self.context.read_only)
        {
            return Ok(Arc::clone(segments));
        }
        let mut segments = write(&self.segments);
        if let Some(segments) = &*segments
            && !(refresh && self.context.read_only)
        {
            return Ok(Arc::clone(segments));
        }
        let listed = match (self.list(), &self.context.reload) {
            (Err(Error::Truncated { .. }), Some(reload)) => {
                // Retention may have dropped what the catalogue, as it was read last, still counts on.
                self.set_record(reload(self.id)?);
                self.list()?
            }
            (listed, _) => listed?,
        };
        Ok(Arc::clone(segments.insert(Arc::new(listed))))
    }

    /// Lists the directory. The ordinals must be without a gap from the first retained one to the last.
    pub(super) fn list(&self) -> Result<Vec<SegmentRef>> {
        let record = self.record();
        let entries = self.context.disk.list_dir(&self.dir).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => {
                Error::truncated(Location::new(&self.dir, 0), "the directory of a shard is missing")
            }
            _ => Error::io("list", &self.dir)(error),
        })?;
        let mut names: Vec<SegmentName> = entries
            .iter()
            .filter_map(|entry| SegmentName::parse(&entry.name))
            .filter(|name| name.ordinal >= record.first_ordinal)
            .collect();
        let segments: Vec<SegmentRef> = in_force(&mut names)
            .into_iter()
            .map(|name| SegmentRef {
                ordinal: name.ordinal,
                first_seq: name.first_seq,
                epoch: name.epoch,
                path: self.dir.join(name.to_string()).into(),
                active: None,
                sealed: None,
            })
            .collect();
        let (mut expected, mut first_seq) = (record.first_ordinal, record.first_seq);
        for segment in &segments {
            if segment.ordinal != expected {
                let missing = format!("segment {expected} of the shard is missing");
                return Err(Error::truncated(Location::new(&*segment.path, 0), missing));
            }
            if segment.first_seq < first_seq {
                let what = format!("the segment begins at sequence number {}, below {first_seq}", segment.first_seq);
                return Err(Error::corrupt(Location::new(&*segment.path, 96), what));
            }
            (expected, first_seq) = (expected + 1, segment.first_seq);
        }
        match &record.head {
            Some(head) if head.ordinal >= record.first_ordinal && head.ordinal >= expected => {
                let missing = format!("segment {} of the shard is missing, the catalogue knows of it", head.ordinal);
                Err(Error::truncated(Location::new(&self.dir, 0), missing))
            }
            _ => Ok(segments),
        }
    }

    pub(super) fn set_segments(&self, change: impl FnOnce(&mut Vec<SegmentRef>)) {
        if let Some(segments) = &mut *write(&self.segments) {
            change(Arc::make_mut(segments));
        }
    }

    /// Lists the directory anew when the segments are asked for next.
    pub(super) fn forget_segments(&self) {
        *write(&self.segments) = None;
    }

    /// Makes the names of the segments durable that a process may have given which was killed, or failed, before it could: before the
    /// catalogue rests on them.
    pub(crate) fn make_names_durable(&self) -> Result<()> {
        self.context.disk.sync_dir(&self.dir).map_err(Error::io("sync", &self.dir))
    }

    /// Forgets the segments below `ordinal`: retention drops them.
    pub(crate) fn drop_before(&self, ordinal: u64) {
        self.set_segments(|segments| segments.retain(|segment| segment.ordinal >= ordinal));
        self.forget_proved(ordinal);
    }

    /// Removes the files in the directory that belong to no segment: dropped by retention, or left by a crash. Only for the writer,
    /// because no temporary file is in use then. A file that cannot be removed stays, and is tried again later. Returns how many
    /// bytes were freed, and how many files stay.
    pub(crate) fn remove_leftovers(&self) -> Result<(u64, u64)> {
        let first = self.record().first_ordinal;
        let disk = &self.context.disk;
        let (mut freed, mut left) = (0, 0);
        for entry in disk.list_dir(&self.dir).map_err(Error::io("list", &self.dir))? {
            let dropped = SegmentName::parse(&entry.name).is_some_and(|name| name.ordinal < first);
            if !dropped && !is_segment_temporary(&entry.name) {
                continue;
            }
            let path = self.dir.join(&entry.name);
            let len =
                disk.stat(&path).ok().flatten().filter(|stat| stat.kind == FileKind::File).map_or(0, |stat| stat.len);
            match disk.remove_file(&path) {
                Ok(()) => freed += len,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => {
                    left += 1;
                    warn!(logstore = %self.name(), shard = self.id, path = %path.display(), %error,
                        "a file that is not needed any more cannot be removed; this is tried again later");
                }
            }
        }
        self.leftovers.store(left > 0, Ordering::Relaxed);
        Ok((freed, left))
    }

    /// Whether a file that is not needed any more could not be removed when it was last tried.
    pub(crate) fn has_leftovers(&self) -> bool {
        self.leftovers.load(Ordering::Relaxed)
    }

    /// Opens a segment that was listed; `None` when retention has dropped it since, be it in the process of the writer.
    pub(crate) fn open_listed(&self, name: &SegmentRef) -> Result<Option<Opened>> {
        let error = match self.open_segment(name) {
            Ok(opened) => return Ok(Some(opened)),
            Err(error) => error,
        };
        if self.is_dropped(name) { Ok(None) } else { Err(error) }
    }

    /// Whether retention has dropped a segment since it was listed. A reader reads the catalogue again, and goes by its last copy if it
    /// cannot.
    pub(super) fn is_dropped(&self, name: &SegmentRef) -> bool {
        if let Some(Ok(record)) = self.context.reload.as_ref().map(|reload| reload(self.id)) {
            self.set_record(record);
        }
        name.ordinal < self.record().first_ordinal
    }

    /// Opens a segment, checks that its header is the one that belongs there, and finds out how it ends.
    pub(crate) fn open_segment(&self, name: &SegmentRef) -> Result<Opened> {
        if let Some(active) = &name.active {
            let (file, header) = (Arc::clone(&active.file), Arc::clone(&active.header));
            return Ok(Opened {
                name: name.clone(),
                file,
                header,
                end: End::Active(Arc::clone(active)),
                vouched: None,
            });
        }
        let path = &*name.path;
        let file = self.context.disk.open(path, OpenMode::Read).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Error::truncated(Location::new(path, 0), "the segment is missing"),
            _ => Error::io("open", path)(error),
        })?;
        let header = Arc::new(read_header(&*file, path)?);
        self.check_identity(name, &header.header)?;
        // Asked first: once there is a successor, the segment does not grow any more under a read-only opener.
        let expected = self.expected_end(name)?;
        let len = file.len().map_err(Error::io("get the length of", path))?;
        if len > SEGMENT_BYTES_MAX {
            let what = format!("the segment has {len} bytes, and may have {SEGMENT_BYTES_MAX}");
            return Err(Error::corrupt(Location::new(path, SEGMENT_BYTES_MAX), what));
        }
        let footer = read_footer(&*file, path, &header, len);
        let opened = |end| {
            let (name, file, header) = (name.clone(), Arc::clone(&file), Arc::clone(&header));
            Ok(Opened { name, file, header, end, vouched: None })
        };
        match (footer, expected) {
            (
                Err(error @ (Error::NewerFormat { .. } | Error::OlderFormat { .. } | Error::UnsupportedFeature { .. })),
                _,
            ) => Err(error),
            (_, Expected::Cut(end)) => {
                self.check_link(name, &header.header, &end)?;
                if len < end.bytes {
                    let what = format!("the segment has {len} bytes, its successor says {}", end.bytes);
                    return Err(Error::truncated(Location::new(path, len), what));
                }
                if end.bytes < header.body_start {
                    return Err(Error::corrupt(Location::new(path, end.bytes), "the segment is cut within its header"));
                }
                opened(End::Cut(end))
            }
            (Ok(Some(footer)), Expected::Sealed(end)) => {
                self.check_link(name, &header.header, &end)?;
                let digest = footer.footer.digest(header.header.payload_hash, &header.header_hash);
                let same = digest == end.digest && len == end.bytes;
                if !same {
                    let what =
                        format!("{} is another segment than its successor or the catalogue says", path.display());
                    return Err(Error::RolledBack { what });
                }
                Ok(Opened { vouched: Some(end), ..opened(End::Sealed(Arc::new(footer)))? })
            }
            // Recovery syncs a segment before it gives it its name.
            (Ok(Some(footer)), Expected::Open { .. }) if footer.footer.recovered => {
                opened(End::Sealed(Arc::new(footer)))
            }
            (Ok(None) | Err(Error::Corrupt { .. } | Error::Truncated { .. }), Expected::Sealed(end))
                if len < end.bytes =>
            {
                let what = format!("the segment has {len} bytes, it was sealed with {}", end.bytes);
                Err(Error::truncated(Location::new(path, len), what))
            }
            (Ok(None), Expected::Sealed(_)) => {
                let at = Location::new(path, len.saturating_sub(Trailer::LEN as u64));
                Err(match has_whole_footer(&*file, len) {
                    // Both are as somebody wrote them, and were not made for each other.
                    true => Error::Tampered { at, what: "the footer, or the header, of a sealed segment" },
                    false => Error::corrupt(at, "the footer of the sealed segment is damaged"),
                })
            }
            // Nobody vouches for the footer, if there is one: it may not have reached the disk yet, and a crash may have torn it. The
            // blocks tell how far the segment counts.
            (Ok(_) | Err(Error::Corrupt { .. } | Error::Truncated { .. }), Expected::Open { at_least }) => {
                if len < at_least {
                    let what = format!("the segment has {len} bytes, the catalogue says at least {at_least}");
                    return Err(Error::truncated(Location::new(path, len), what));
                }
                match self.retired_end(&header.header, path)? {
                    Some(end) => {
                        self.check_link(name, &header.header, &end)?;
                        opened(End::Cut(end))
                    }
                    None => opened(End::Unknown),
                }
            }
            (Err(error), _) => Err(error),
        }
    }

    /// What others say about how a segment ends: its successor, the catalogue, or whoever sealed it in this process.
    fn expected_end(&self, name: &SegmentRef) -> Result<Expected> {
        if let Some((header, path)) = self.successor(name)? {
            // The link is broken, and neither of its segments is read. A header with another ordinal is not the successor's.
            if header.header.ordinal == name.ordinal + 1
                && let Some((at, rule)) = chain_rule(&header.header)
            {
                return Err(Error::corrupt(Location::new(&*path, at), rule));
            }
            return match &header.header.predecessor {
                Predecessor::Sealed(end) => Ok(Expected::Sealed(*end)),
                Predecessor::Cut(end) => Ok(Expected::Cut(*end)),
                Predecessor::None => Err(denies_predecessor(&path)),
            };
        }
        if let Some(end) = name.sealed {
            return Ok(Expected::Sealed(end));
        }
        match self.record().head {
            Some(head) if head.ordinal == name.ordinal && head.sealed => Ok(Expected::Sealed(head.into_end())),
            Some(head) if head.ordinal == name.ordinal => Ok(Expected::Open { at_least: head.bytes }),
            _ => Ok(Expected::Open { at_least: 0 }),
        }
    }

    /// Where the blocks of a segment end that is not known to be sealed: where the file does, or where its footer begins, if the tag
    /// of that holds. Then everything in front of that has been durable, for it was synced before the footer was written.
    pub(crate) fn blocks_end(&self, opened: &Opened, proof: Proof) -> Result<(u64, Option<u64>)> {
        let path = &*opened.name.path;
        let len = opened.file.len().map_err(Error::io("get the length of", path))?;
        let footer = match read_footer(&*opened.file, path, &opened.header, len) {
            Ok(Some(footer)) if proof == Proof::Tag => footer,
            Err(error @ Error::Io { .. }) => return Err(error),
            _ => return Ok((len, None)),
        };
        let at = footer.footer.offset;
        let sealed = Opened { end: End::Sealed(Arc::new(footer)), ..opened.clone() };
        match self.verify_footer(&sealed) {
            Ok(()) => Ok((at, Some(at))),
            Err(Error::Tampered { .. } | Error::Shredded { .. }) => Ok((len, None)),
            Err(error) => Err(error),
        }
    }

    /// Whether a segment is the one that had this head, by what its header says and its successor says of it.
    pub(crate) fn agrees_with(&self, head: &Head) -> Result<bool> {
        let segments = self.segments(false)?;
        let at = segments.partition_point(|segment| segment.ordinal < head.ordinal);
        let Some(name) = segments.get(at).filter(|name| name.ordinal == head.ordinal) else { return Ok(false) };
        if self.header(name)?.header.segment != head.segment {
            return Ok(false);
        }
        Ok(match self.successor(name)?.map(|(header, _)| header.header.predecessor) {
            Some(Predecessor::Sealed(end)) => end.digest == head.digest || (!head.sealed && end.blocks > head.blocks),
            Some(Predecessor::Cut(end)) => !head.sealed && end.blocks >= head.blocks,
            Some(Predecessor::None) => false,
            None => true,
        })
    }

    /// Where the data ends of a segment that is not known to be sealed, whose blocks in place end at `from`. Zeros at the end of the file
    /// are no data: nothing has been written there yet.
    pub(crate) fn data_end(&self, opened: &Opened, from: u64, proof: Proof) -> Result<u64> {
        let (end, _) = self.blocks_end(opened, proof)?;
        let read_at =
            |offset, buf: &mut [u8]| opened.file.read_at(buf, offset).map_err(Error::io("read", &*opened.name.path));
        end_of_data(read_at, from, end)
    }

    /// The header of the segment after this one, not authenticated, and its path; `None` when this is the last.
    pub(super) fn successor(&self, name: &SegmentRef) -> Result<Option<(Arc<DecodedHeader>, Arc<Path>)>> {
        let segments = self.segments(false)?;
        let at = segments.partition_point(|segment| segment.ordinal <= name.ordinal);
        let Some(next) = segments.get(at).filter(|next| next.ordinal == name.ordinal + 1) else { return Ok(None) };
        Ok(Some((self.header(next)?, Arc::clone(&next.path))))
    }

    /// The header of a segment, not authenticated.
    fn header(&self, name: &SegmentRef) -> Result<Arc<DecodedHeader>> {
        if let Some(active) = &name.active {
            return Ok(Arc::clone(&active.header));
        }
        let file = self.context.disk.open(&name.path, OpenMode::Read).map_err(Error::io("open", &*name.path))?;
        Ok(Arc::new(read_header(&*file, &name.path)?))
    }

    /// What the key of a segment is derived from, by its header, which is not authenticated.
    pub(crate) fn key_source(&self, name: &SegmentRef) -> Result<KeySource> {
        let header = self.header(name)?;
        self.check_identity(name, &header.header)?;
        Ok(header.header.key_source)
    }

    /// Whether a segment has an end that cannot change any more.
    pub(crate) fn is_sealed(&self, name: &SegmentRef) -> Result<bool> {
        Ok(matches!(self.open_segment(name)?.end, End::Sealed(_) | End::Cut(_)))
    }

    /// The segments, those included that somebody was about to begin under keys that have been replaced since.
    pub(crate) fn settled_segments(&self) -> Result<Arc<Vec<SegmentRef>>> {
        drop(lock(&self.writer));
        self.segments(true)
    }

    fn check_identity(&self, name: &SegmentRef, header: &SegmentHeader) -> Result<()> {
        let path = &*name.path;
        let gate = &self.context.gate;
        let belongs = header.store == gate.context().store
            && header.logstore == gate.id()
            && header.shard == self.id
            && header.ordinal == name.ordinal
            && header.first_seq == name.first_seq
            && header.epoch == name.epoch;
        if !belongs {
            return Err(Error::Tampered { at: Location::new(path, 0), what: "a segment that belongs elsewhere" });
        }
        // A read-only opener may have metadata that is older than what is being written: it looks again, once the header is
        // authenticated.
        if self.context.read_only { Ok(()) } else { self.check_generation(path, header) }
    }

    /// Whether the metadata is at least as new as the header.
    pub(super) fn check_generation(&self, path: &Path, header: &SegmentHeader) -> Result<()> {
        if header.generation > read(&self.context.plan).generation {
            let what = format!(
                "the metadata of Logstore {} (generation {}) is older than {} (generation {})",
                self.name(),
                read(&self.context.plan).generation,
                path.display(),
                header.generation
            );
            return Err(Error::RolledBack { what });
        }
        Ok(())
    }

    fn check_link(&self, name: &SegmentRef, header: &SegmentHeader, end: &PredecessorEnd) -> Result<()> {
        if end.segment == header.segment && end.ordinal == header.ordinal {
            Ok(())
        } else {
            let what = format!("{} is not the segment that its successor or the catalogue names", name.path.display());
            Err(Error::RolledBack { what })
        }
    }
}

/// The segments that count, in order. A writer that another one has taken over from may have begun segments that the other did not
/// see, before it found out. Nothing in them was acknowledged. They have an older epoch than the segment of the same ordinal, or than
/// one before them.
fn in_force(names: &mut [SegmentName]) -> Vec<SegmentName> {
    names.sort_unstable();
    let mut segments: Vec<SegmentName> = Vec::with_capacity(names.len());
    for name in names.iter() {
        match segments.last_mut() {
            Some(last) if last.ordinal == name.ordinal && last.epoch < name.epoch => *last = *name,
            Some(last) if last.epoch > name.epoch => {}
            _ => segments.push(*name),
        }
    }
    segments
}

/// Whether a name is that of a segment's temporary file.
pub(crate) fn is_segment_temporary(name: &str) -> bool {
    let stem = name.split('.').next().unwrap_or_default();
    SegmentName::parse(&format!("{stem}.seg")).is_some() && is_temporary(name, stem)
}

enum Expected {
    Sealed(PredecessorEnd),
    Cut(PredecessorEnd),
    /// Nobody says; the catalogue may know how far it reached at least.
    Open {
        at_least: u64,
    },
}

impl Head {
    pub(crate) fn into_end(self) -> PredecessorEnd {
        PredecessorEnd {
            ordinal: self.ordinal,
            segment: self.segment,
            blocks: self.blocks,
            bytes: self.bytes,
            end_seq: self.end_seq,
            digest: self.digest,
            last_time_us: self.last_time_us,
        }
    }

    /// The head of a segment that is not sealed, behind the blocks that `builder` has counted, which end at `bytes`.
    pub(crate) fn open(header: &SegmentHeader, builder: &FooterBuilder, bytes: u64) -> Self {
        let so_far = builder.so_far();
        Self {
            ordinal: header.ordinal,
            segment: header.segment,
            sealed: false,
            blocks: so_far.block_count,
            bytes,
            end_seq: so_far.end_seq,
            next_seq: header.limit_seq,
            last_time_us: header.last_time_us(so_far),
            digest: builder.digest(),
        }
    }

    /// The head of a sealed segment.
    pub(crate) fn sealed(decoded: &DecodedHeader, footer: &Footer, file_len: u64) -> Self {
        let header = &decoded.header;
        Self {
            ordinal: header.ordinal,
            segment: header.segment,
            sealed: true,
            blocks: footer.block_count,
            bytes: file_len,
            end_seq: footer.end_seq,
            next_seq: footer.end_seq,
            last_time_us: header.last_time_us(footer),
            digest: footer.digest(header.payload_hash, &decoded.header_hash),
        }
    }
}
