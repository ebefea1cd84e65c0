//! Segments proved without a key.
//!
//! The catalogue, which is authenticated, has the digest of the shard's head. That digest covers
//! the header of the head's segment. The header has the digest of the segment before it, and so on.
//! Headers and ends of segments are proved along this chain, from the head downward. Retention and
//! the destruction of keys rely on nothing else.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use super::{
    listing::SegmentRef,
    scanning::in_place,
    segments::{End, Opened, SegmentList},
};
use crate::{
    Error, Result,
    segment::{DecodedHeader, KeySource, Predecessor, PredecessorEnd, SegmentHeader},
    sync::{LockRank, Mutex, lock},
};

/// A segment whose header and end are proved.
#[derive(Clone, Debug)]
pub(crate) struct Proved {
    pub(crate) header: Arc<DecodedHeader>,
    pub(crate) end: PredecessorEnd,
}

/// The segments of a shard that are proved.
pub(super) struct Chain {
    /// By ordinal.
    proved: Mutex<BTreeMap<u64, Known>>,
}

/// A proof that was made before.
struct Known {
    proved: Proved,
    /// Whether the end is that of the whole segment. An open head may grow, and then the end is out
    /// of date.
    is_final: bool,
}

impl Default for Chain {
    fn default() -> Self {
        Self { proved: Mutex::new(LockRank::ShardChain, BTreeMap::new()) }
    }
}

impl Chain {
    /// A segment as the catalogue proves it, without a key. `None` when it is behind the head that
    /// the catalogue has, or when it, or a segment between it and the head, is lost, or another
    /// object is in its place. An accepted loss interrupts the chain for the lost segments only: it
    /// names the end in front of it. Reads header and footer of each segment from the head down to
    /// this one, once, and the blocks of those that were cut or are open.
    ///
    /// # Errors
    /// A segment on the way is not the one that the catalogue, or its successor, names;
    /// [`Error::Io`].
    pub(super) fn prove(&self, list: &SegmentList, ordinal: u64) -> Result<Option<Proved>> {
        let record = list.record();
        let Some(head) = record.head.clone().filter(|head| head.ordinal >= ordinal) else {
            return Ok(None);
        };
        // Begins with the lowest segment from this one on that is proved already. An open head may
        // have grown since, and have been sealed.
        let known = {
            let proved = lock(&self.proved);
            let mut known = proved.range(ordinal..=head.ordinal);
            let holds = |at: u64, known: &Known| match at == head.ordinal {
                true => known.proved.end.digest == head.digest,
                false => known.is_final,
            };
            known.find(|(at, one)| holds(**at, one)).map(|(_, one)| one.proved.clone())
        };
        let head_ordinal = head.ordinal;
        let mut next = match known {
            Some(proved) if proved.end.ordinal == ordinal => return Ok(Some(proved)),
            Some(proved) => predecessor(&proved.header),
            None => Some((head.sealed, head.into_end())),
        };
        while let Some((sealed, end)) = next {
            if let Some(loss) = record.loss(end.ordinal) {
                let before = loss.before.clone().filter(|head| head.ordinal >= ordinal);
                next = before.map(|head| (head.sealed, head.into_end()));
                continue;
            }
            let Some(name) = list.find(end.ordinal)? else { return Ok(None) };
            let proved = match prove_one(list, &name, sealed, end) {
                Err(lost) if lost.is_loss() || is_exchanged(&lost) => return Ok(None),
                proved => proved?,
            };
            let is_final = sealed || end.ordinal < head_ordinal;
            let known = Known { proved: proved.clone(), is_final };
            lock(&self.proved).insert(end.ordinal, known);
            if end.ordinal == ordinal {
                return Ok(Some(proved));
            }
            next = predecessor(&proved.header);
        }
        Ok(None)
    }

    /// Forgets the segments below `ordinal`: retention has dropped them.
    pub(super) fn drop_before(&self, ordinal: u64) {
        let mut proved = lock(&self.proved);
        *proved = proved.split_off(&ordinal);
    }
}

/// Whether another object is in the place of a segment. It says as little about the segments in front
/// as a missing file does.
fn is_exchanged(error: &Error) -> bool {
    matches!(error, Error::Tampered { .. } | Error::WrongFileType { .. })
}

/// Proves one segment by its end, which is authenticated.
fn prove_one(
    list: &SegmentList,
    name: &SegmentRef,
    sealed: bool,
    end: PredecessorEnd,
) -> Result<Proved> {
    let opened = match sealed {
        true => list.open_sealed(name, end)?,
        false => list.open_segment(name)?,
    };
    let header = &opened.header;
    let same = match &opened.end {
        End::Sealed(found) if sealed => {
            let footer = &found.footer;
            footer.block_count == end.blocks
                && footer.digest(header.payload_hash, &header.header_hash) == end.digest
        }
        // This process wrote its header.
        End::Active(_) => true,
        // Beside a writer, an unsealed head may be in a segment that has been sealed since.
        _ => in_place(&opened, end.bytes)?.digest() == end.digest,
    };
    if !same || header.segment != end.segment {
        let what = format!("{} is not the segment that the catalogue knows", name.path.display());
        return Err(Error::RolledBack { what });
    }
    Ok(Proved { header: Arc::clone(header), end })
}

/// Checks that a segment under an older data key is the segment that the catalogue proves, if the
/// catalogue knows of it. The holder of an older data key can forge whole segments that agree with
/// each other. Reads no blocks, so it does not find a block that such a holder changed in place; a
/// verification does.
///
/// # Errors
/// [`Error::RolledBack`].
pub(super) fn check_older(list: &SegmentList, opened: &Opened) -> Result<()> {
    let KeySource::DataKey(version) = opened.header.key_source else { return Ok(()) };
    if list.gate().keys().section.is_none_or(|section| section.current == version) {
        return Ok(());
    }
    match list.proved(opened.name.ordinal)? {
        Some(proved) if proved.header.header_hash != opened.header.header_hash => {
            let what = format!(
                "{} is not the segment that the catalogue knows",
                opened.name.path.display()
            );
            Err(Error::RolledBack { what })
        }
        _ => Ok(()),
    }
}

/// Checks that a segment may be read by its key. The holder of a retired version of the service
/// keyring can forge any segment under that version, so such a segment is read only if the
/// catalogue proves it. All its blocks are read for that.
///
/// # Errors
/// [`Error::RetiredKeyVersion`]: the catalogue does not know the segment, or knows other contents.
pub(super) fn check_retired(list: &SegmentList, opened: &Opened) -> Result<()> {
    let Some(retired) = retired(list, &opened.header, &opened.name.path)? else { return Ok(()) };
    let ordinal = opened.name.ordinal;
    let ended = |proved: &Proved| match &opened.end {
        End::Cut(end) if *end == proved.end => true,
        _ => list.record().head.is_some_and(|head| head.sealed || head.ordinal > ordinal),
    };
    match list.proved(ordinal)?.filter(ended) {
        Some(proved) if proved.header.header_hash == opened.header.header_hash => {
            if has_contents(opened, &proved.end)? { Ok(()) } else { Err(retired) }
        }
        _ => Err(retired),
    }
}

/// Where an open segment under a retired version of the service keyring ends: at the head that the
/// rotation has recorded. A holder of the old version may have written the blocks behind it. `None`
/// for any other segment.
pub(super) fn retired_end(
    list: &SegmentList,
    header: &SegmentHeader,
    path: &Path,
) -> Result<Option<PredecessorEnd>> {
    if retired(list, header, path)?.is_none() {
        return Ok(None);
    }
    let head = list.record().head;
    Ok(head
        .filter(|head| !head.sealed && head.ordinal == header.ordinal)
        .map(|head| head.into_end()))
}

/// The error about a segment that is under a retired version of the service keyring; `None` for any
/// other. A reader reads the catalogue again: the writer recorded the head when it rotated the key.
fn retired(list: &SegmentList, header: &SegmentHeader, path: &Path) -> Result<Option<Error>> {
    let KeySource::Keyring(version) = header.key_source else { return Ok(None) };
    let service = &list.gate().context().service;
    let checked = service.keyring().check_accepted(version, path, "a segment");
    let Err(retired) = checked else { return Ok(None) };
    list.reload_record().transpose()?;
    Ok(Some(retired))
}

/// Whether the blocks of a segment, up to an end, are those of its digest, and its footer is that
/// of these blocks. Reads all of them.
fn has_contents(opened: &Opened, end: &PredecessorEnd) -> Result<bool> {
    let footer = match &opened.end {
        End::Sealed(sealed) => Some(&sealed.footer),
        _ => None,
    };
    let contents = in_place(opened, footer.map_or(end.bytes, |footer| footer.offset))?;
    let same = contents.digest() == end.digest;
    let is_of = |footer: &crate::segment::Footer| {
        *footer == contents.build(footer.offset, footer.nonce_random, footer.recovered)
    };
    Ok(same && footer.is_none_or(is_of))
}

/// What a header says of the segment before it: whether it was sealed, and its end.
fn predecessor(header: &DecodedHeader) -> Option<(bool, PredecessorEnd)> {
    match header.predecessor {
        Predecessor::None => None,
        Predecessor::Sealed(end) => Some((true, end)),
        Predecessor::Cut(end) => Some((false, end)),
    }
}
