//! Finds the segments of a shard that are missing or damaged, so that an operator can accept their
//! loss.

use super::{
    listing::SegmentRef,
    reader::ReadMode,
    record::{Head, Loss},
    recovery::Recovery,
    scanning::in_place,
    segment_reader::{Load, SegmentReader},
    segments::{End, Opened},
    writer::RESERVED_SEQS,
};
use crate::{Error, ErrorKind, Result, crypto::wipe};

/// Lost segments, and the error of the first of them.
pub(crate) struct FoundLoss {
    pub(crate) loss: Loss,
    pub(crate) cause: Error,
}

impl Recovery<'_> {
    /// The losses of the shard that were not accepted yet. Reads all segments. With
    /// `accept_tampered`, segments that are forged or exchanged count as lost.
    ///
    /// # Errors
    /// A segment is forged or exchanged; a key may not be used; [`Error::Io`].
    pub(super) fn find_losses(&self, accept_tampered: bool) -> Result<Vec<FoundLoss>> {
        let segments = self.list.segments(true)?;
        let mut found: Vec<FoundLoss> = Vec::new();
        for (index, segment) in segments.iter().enumerate() {
            if segment.active.is_some() || self.list.is_lost(segment.ordinal) {
                continue;
            }
            let is_last = index + 1 == segments.len();
            let cause = match self.check_segment(segment, is_last) {
                // The key of a shredded segment was destroyed on purpose.
                Ok(()) | Err(Error::Shredded { .. }) => continue,
                Err(error) if error.is_loss() => error,
                // Its key is lost with the newer metadata.
                Err(error) if self.list.is_ahead_of_metadata(segment) => error,
                Err(error) if accept_tampered && error.kind() == ErrorKind::Integrity => error,
                Err(error) => return Err(error),
            };
            let end_seq = match segments.get(index + 1) {
                Some(behind) => behind.first_seq,
                None => self.end_of_last(segment)?,
            };
            match found.last_mut().filter(|last| last.loss.last + 1 == segment.ordinal) {
                Some(last) => {
                    last.loss.tampered |= !cause.is_loss();
                    last.loss.last = segment.last_ordinal();
                    last.loss.end_seq = end_seq.max(last.loss.end_seq);
                }
                None => {
                    let loss = self.new_loss(segment, end_seq, !cause.is_loss())?;
                    found.push(FoundLoss { loss, cause });
                }
            }
        }
        if let Some(missing) = self.missing_at_end(&segments)? {
            let (cause, end_seq) = (missing.missing(), missing.first_seq);
            let loss = match found.last_mut() {
                Some(last) if last.loss.last + 1 == missing.ordinal => {
                    last.loss.last = missing.last_ordinal();
                    last.loss.end_seq = end_seq.max(last.loss.end_seq);
                    return Ok(found);
                }
                _ => self.new_loss(&missing, end_seq, false)?,
            };
            found.push(FoundLoss { loss, cause });
        }
        Ok(found)
    }

    /// The segments behind the last one that were there when the current data key was made, by the
    /// metadata. The next segment must not take the place of one under an older key.
    fn missing_at_end(&self, segments: &[SegmentRef]) -> Result<Option<SegmentRef>> {
        let section = self.env.gate.keys().section;
        let owned = section.as_ref().and_then(|section| section.versions.last());
        let owned = owned.and_then(|newest| newest.ordinals.get(self.list.shard() as usize));
        let record = self.list.record();
        let last = segments.last();
        let next = last.map_or(record.first_ordinal, |last| last.last_ordinal() + 1);
        let next = next.max(record.head.as_ref().map_or(0, |head| head.ordinal + 1));
        let Some(&owned) = owned.filter(|&&owned| owned > next) else { return Ok(None) };
        let begin = match last {
            Some(last) => self.end_of_last(last)?,
            None => record.first_seq.max(record.head.map_or(0, |head| head.next_seq)),
        };
        let used_up = || Error::InvalidArgument("the sequence numbers are used up".to_owned());
        let lost = RESERVED_SEQS.checked_mul(owned - next);
        let end_seq = lost.and_then(|lost| begin.checked_add(lost)).ok_or_else(used_up)?;
        Ok(Some(self.list.gap(next, owned - 1, end_seq)))
    }

    /// Authenticates a segment and all its blocks.
    fn check_segment(&self, segment: &SegmentRef, is_last: bool) -> Result<()> {
        let Some(opened) = self.list.open_listed(segment)? else { return Ok(()) };
        if is_last && matches!(opened.end, End::Unknown) {
            return self.check_open_segment(segment);
        }
        self.list.authenticate(&opened)?;
        let mut reader = SegmentReader::new(opened, ReadMode::Pread)?;
        loop {
            match reader.load(self.list) {
                Ok(Load::Block(header)) => {
                    reader.prove_place(&header, self.list.gate())?;
                    wipe(&mut reader.open(self.list.gate())?);
                }
                Ok(Load::End | Load::NotYet) => return reader.check_end(),
                // The segment behind it is lost or exchanged, and has said where this one ends.
                Err(error)
                    if error.kind() == ErrorKind::Integrity
                        && matches!(reader.opened.end, End::Damaged(_)) =>
                {
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// One past the last sequence number that the last segment may have given out.
    fn end_of_last(&self, segment: &SegmentRef) -> Result<u64> {
        if segment.is_missing() {
            return Ok(segment.first_seq);
        }
        let used_up = || Error::InvalidArgument("the sequence numbers are used up".to_owned());
        let reserved = segment.first_seq.checked_add(RESERVED_SEQS).ok_or_else(used_up)?;
        let head = self.list.record().head.filter(|head| head.ordinal == segment.ordinal);
        Ok(head.map_or(reserved, |head| head.next_seq.max(reserved)))
    }

    fn new_loss(&self, segment: &SegmentRef, end_seq: u64, tampered: bool) -> Result<Loss> {
        let first = segment.ordinal;
        let is_usable =
            |before: &SegmentRef| !before.is_missing() && !self.list.is_lost(before.ordinal);
        let before = match self.list.find(first - 1)?.filter(is_usable) {
            Some(before) => self.end_in_front(&before)?,
            None => None,
        };
        let from_seq = match &before {
            Some(before) => before.end_seq,
            None => self.list.record().first_seq,
        };
        Ok(Loss {
            first,
            last: segment.last_ordinal(),
            from_seq: from_seq.min(end_seq),
            end_seq,
            tampered,
            before,
            accepted_us: self.env.clock.wall_us(),
        })
    }

    /// The head behind the segment in front of a loss: by its footer, or behind its last authentic
    /// block.
    fn end_in_front(&self, before: &SegmentRef) -> Result<Option<Head>> {
        let Some(opened) = self.list.open_listed(before)? else { return Ok(None) };
        Ok(Some(match &opened.end {
            End::Sealed(sealed) => Head::sealed(&opened.header, &sealed.footer, opened.file_len()?),
            End::Cut(end) => Head { sealed: false, ..Head::behind(end, opened.header.limit_seq) },
            End::Active(_) => return Ok(None),
            End::Unknown | End::Damaged(_) => self.authentic_part(opened)?,
        }))
    }

    /// The head behind the authentic blocks in the front of a segment.
    fn authentic_part(&self, opened: Opened) -> Result<Head> {
        let mut reader = SegmentReader::new(opened, ReadMode::Pread)?;
        loop {
            match reader.load(self.list) {
                Ok(Load::Block(_)) => {}
                Ok(Load::End | Load::NotYet) => break,
                Err(error) if error.kind() == ErrorKind::Integrity => break,
                Err(error) => return Err(error),
            }
            match reader.open(self.list.gate()) {
                Ok(mut raw) => wipe(&mut raw),
                Err(error) if error.kind() == ErrorKind::Integrity => break,
                Err(error) => return Err(error),
            }
        }
        let (opened, end) = (&reader.opened, reader.offset);
        Ok(Head::open(&opened.header, &in_place(opened, end)?, end))
    }
}
