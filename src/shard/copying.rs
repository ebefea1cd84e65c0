//! Copies of a shard: how much of each file belongs to it, where a copy ends, and where a copy is
//! to be cut.

use std::sync::Arc;

use super::{
    Shard,
    listing::SegmentRef,
    record::{Head, ShardRecord},
    scanning::{Scanned, front_until},
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

impl Shard {
    /// Opens a segment to copy it. The copy of an open segment ends behind its last block. A damaged
    /// file is copied as it is.
    ///
    /// # Errors
    /// [`Error::Truncated`] if there is no such file; [`Error::Io`].
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

    /// The head behind the blocks of a segment in front of the first one with a group that was
    /// received after `until_us`. `None` if there is no such block. Needs no key.
    ///
    /// # Errors
    /// The integrity errors of the segment; [`Error::Io`].
    pub(crate) fn head_before(&self, name: &SegmentRef, until_us: u64) -> Result<Option<Head>> {
        let opened = self.list().open_segment(name)?;
        let blocks_end = match &opened.end {
            End::Sealed(sealed) if sealed.footer.last_time_us <= until_us => return Ok(None),
            End::Sealed(sealed) => sealed.footer.offset,
            End::Cut(end) => end.bytes,
            _ => opened.file_len()?,
        };
        let (front, end, is_cut) = front_until(&opened, blocks_end, until_us)?;
        Ok(is_cut.then(|| Head::open(&opened.header, &front, end)))
    }
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
