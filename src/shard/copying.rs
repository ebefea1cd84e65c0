//! Copies of a shard: how much of each file belongs to it, where a copy ends, and where a copy is
//! to be cut.

use std::sync::Arc;

use super::{
    Shard,
    listing::SegmentRef,
    record::{Head, ShardRecord},
    scanning::{Scanned, first_after, front_until},
    segments::{End, Opened, Proof, SegmentList, read_footer},
};
use crate::{
    Error, ErrorKind, Result,
    io::{DiskFile, OpenMode},
};

/// The part of a segment's file that a copy takes.
pub(crate) enum Extent {
    /// All of it. The segment is sealed, and its successor or the catalogue vouches for it: no
    /// process writes to the file any more.
    Sealed(u64),
    /// This many bytes from the front.
    Front(u64),
}

impl Extent {
    pub(crate) fn bytes(&self) -> u64 {
        match self {
            Self::Sealed(bytes) | Self::Front(bytes) => *bytes,
        }
    }
}

/// The file of a segment that is to be copied.
pub(crate) struct CopySource {
    pub(crate) file: Arc<dyn DiskFile>,
    pub(crate) extent: Extent,
    /// The damage, if the header or the end of the segment is damaged.
    pub(crate) damage: Option<Error>,
}

/// Where a copy cuts a segment.
pub(crate) struct CopyCut {
    /// The head behind the blocks in front of the cut, or in front of damage there.
    pub(crate) head: Head,
    /// The number of bytes in front of the cut.
    pub(crate) bytes: u64,
}

impl Shard {
    /// Opens a segment to copy it. The copy of an open segment ends behind its last block. A damaged
    /// file is copied as it is.
    ///
    /// # Errors
    /// [`Error::Truncated`] if there is no such file; [`Error::WrongFileType`]; [`Error::Io`].
    pub(crate) fn copy_source(&self, name: &SegmentRef) -> Result<CopySource> {
        let list = self.list();
        match list.open_segment(name) {
            Ok(opened) => {
                let extent = extent(list, &opened)?;
                Ok(CopySource { file: opened.file, extent, damage: None })
            }
            Err(error) if error.kind() == ErrorKind::Integrity && !name.is_missing() => {
                let path = &*name.path;
                let file = match self.context.disk.open(path, OpenMode::Read) {
                    Err(gone) if gone.kind() == std::io::ErrorKind::NotFound => return Err(error),
                    opened => opened.map_err(Error::io("open", path))?,
                };
                let len = file.len().map_err(Error::io("get the length of", path))?;
                Ok(CopySource { file, extent: Extent::Front(len), damage: Some(error) })
            }
            Err(error) => Err(error),
        }
    }

    /// Whether the shard has everything up to the head of an earlier copy, which has the record
    /// `former`. Retention may have dropped it. Damage is no answer, so the shard then counts as one
    /// that has it.
    ///
    /// # Errors
    /// [`Error::Io`] and others that are no damage.
    pub(crate) fn continues(&self, former: &ShardRecord) -> Result<bool> {
        let (list, record) = (self.list(), self.record());
        let Some(head) = former.head.as_ref().filter(|head| head.ordinal >= record.first_ordinal)
        else {
            return Ok(true);
        };
        if let Some(loss) = record.loss(head.ordinal) {
            return Ok(former.losses.contains(loss));
        }
        let Some(name) = list.find(head.ordinal)? else { return Ok(false) };
        match has_reached(list, &name, head) {
            Err(error) if error.kind() == ErrorKind::Integrity => Ok(true),
            reached => reached,
        }
    }

    /// The record of a copy whose catalogue is lost, with a head behind the last segment that can be
    /// read. Needs no key, so nothing of it is authenticated.
    ///
    /// # Errors
    /// [`Error::Io`] and others that are no damage.
    pub(crate) fn record_by_files(&self) -> Result<ShardRecord> {
        let list = self.list();
        for name in list.segments(false)?.iter().rev().filter(|name| !name.is_missing()) {
            match head_by_file(list, name) {
                Err(error) if error.kind() == ErrorKind::Integrity => {}
                head => return Ok(ShardRecord { head: Some(head?), ..list.record() }),
            }
        }
        Ok(list.record())
    }

    /// The head behind the last block of a copy, all of whose bytes are synced. The caller has
    /// authenticated the blocks of its last segment.
    ///
    /// # Errors
    /// The integrity errors of the last segment; [`Error::Io`].
    pub(crate) fn head_of_copy(&self) -> Result<Option<Head>> {
        let list = self.list();
        let segments = list.segments(false)?;
        let Some(last) = segments.last().filter(|last| !last.is_missing()) else {
            return Ok(list.record().head);
        };
        let opened = list.open_segment(last)?;
        let len = opened.file_len()?;
        let sealed = match &opened.end {
            End::Sealed(sealed) => Some(Arc::clone(sealed)),
            End::Unknown => {
                read_footer(&*opened.file, &last.path, &opened.header, len)?.map(Arc::new)
            }
            _ => return Ok(list.record().head),
        };
        if let Some(sealed) = sealed {
            let opened = Opened { end: End::Sealed(Arc::clone(&sealed)), ..opened };
            list.verify_footer(&opened)?;
            return Ok(Some(list.last_head(&opened.header, &sealed.footer, len)));
        }
        let end = Scanned::of(list, &opened, Proof::Tag)?.end();
        let (builder, end, _) = front_until(&opened, end, u64::MAX)?;
        Ok(Some(Head::open(&opened.header, &builder, end)))
    }

    /// The head behind the header of a segment. Needs no key.
    ///
    /// # Errors
    /// The integrity errors of the segment; [`Error::Io`].
    pub(crate) fn head_of_front(&self, name: &SegmentRef) -> Result<Head> {
        let opened = self.list().open_segment(name)?;
        let begin = opened.header.body_start;
        let (builder, ..) = front_until(&opened, begin, u64::MAX)?;
        Ok(Head::open(&opened.header, &builder, begin))
    }

    /// Where a segment has its first block with a group that was received after `until_us`. `None` if
    /// there is no such block, or if the header of the segment cannot be read. Needs no key.
    ///
    /// # Errors
    /// [`Error::Io`] and others that are no damage.
    pub(crate) fn cut_before(&self, name: &SegmentRef, until_us: u64) -> Result<Option<CopyCut>> {
        let list = self.list();
        let opened = list.open_segment(name).or_else(|error| match error.kind() {
            ErrorKind::Integrity => list.open_damaged(name, error),
            _ => Err(error),
        });
        let opened = match opened {
            Err(error) if error.kind() == ErrorKind::Integrity => return Ok(None),
            opened => opened?,
        };
        let blocks_end = match &opened.end {
            End::Sealed(sealed) if sealed.footer.last_time_us <= until_us => return Ok(None),
            End::Sealed(sealed) => sealed.footer.offset,
            End::Cut(end) => end.bytes,
            _ => opened.file_len()?,
        };
        let at = first_after(&opened, list.gate(), blocks_end, until_us)?;
        let Some(bytes) = at else { return Ok(None) };
        let (front, end, _) = front_until(&opened, bytes, u64::MAX)?;
        Ok(Some(CopyCut { head: Head::open(&opened.header, &front, end), bytes }))
    }
}

/// The head behind the blocks of a segment, by its file.
fn head_by_file(list: &SegmentList, name: &SegmentRef) -> Result<Head> {
    let opened = list.open_segment(name)?;
    let len = opened.file_len()?;
    let footer = read_footer(&*opened.file, &name.path, &opened.header, len)?;
    let blocks_end = footer.as_ref().map_or(len, |sealed| sealed.footer.offset);
    let (builder, end, _) = front_until(&opened, blocks_end, u64::MAX)?;
    Ok(Head::open(&opened.header, &builder, if footer.is_some() { len } else { end }))
}

/// Whether a segment, or the one that recovery has rewritten its last blocks into, reaches a head.
fn has_reached(list: &SegmentList, name: &SegmentRef, head: &Head) -> Result<bool> {
    let opened = list.open_segment(name)?;
    if opened.header.segment != head.segment {
        return Ok(false);
    }
    if extent(list, &opened)?.bytes() >= head.bytes {
        return Ok(true);
    }
    let Some(next) = list.find(head.ordinal + 1)? else { return Ok(false) };
    Ok(match list.open_segment(&next)?.end {
        End::Sealed(sealed) => sealed.footer.recovered && sealed.footer.end_seq >= head.end_seq,
        _ => false,
    })
}

fn extent(list: &SegmentList, opened: &Opened) -> Result<Extent> {
    let len = opened.file_len()?;
    Ok(match &opened.end {
        End::Sealed(_) if opened.vouched.is_some() => Extent::Sealed(len),
        End::Cut(end) => Extent::Front(end.bytes),
        End::Unknown => {
            let path = &*opened.name.path;
            match read_footer(&*opened.file, path, &opened.header, len) {
                Ok(None) => Extent::Front(Scanned::of(list, opened, Proof::Crc)?.data_end()),
                Err(error @ Error::Io { .. }) => return Err(error),
                _ => Extent::Front(len),
            }
        }
        End::Sealed(_) | End::Active(_) | End::Damaged(_) => Extent::Front(len),
    })
}
