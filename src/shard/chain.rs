//! What can be believed of a shard's segments without a key.
//!
//! The catalogue, which is authenticated, has the digest of the shard's head. That digest is over the header of the head's segment; the
//! header has the digest of the segment before it, and so on. Headers and ends of segments are proved along this chain, from the head
//! downward. Retention and the destruction of keys rest on nothing else.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use super::{End, Head, Opened, SegmentRef, Shard};
use crate::{
    Error, Result,
    keys::keyring::Keyring,
    segment::{DecodedHeader, KeySource, Predecessor, PredecessorEnd, SegmentHeader},
    sync::{LockRank, Mutex, lock},
};

/// A segment whose header and end are proved.
#[derive(Clone, Debug)]
pub(crate) struct Proved {
    pub(crate) header: Arc<DecodedHeader>,
    pub(crate) end: PredecessorEnd,
}

/// The segments of a shard that are proved, by ordinal.
pub(super) struct Chain(Mutex<BTreeMap<u64, Proved>>);

impl Default for Chain {
    fn default() -> Self {
        Self(Mutex::new(LockRank::ShardChain, BTreeMap::new()))
    }
}

impl Shard {
    /// A segment as the catalogue proves it, without a key; `None` when it is behind the head that the catalogue knows. Reads header and
    /// footer of each segment from the head down to this one, once, and the blocks of those that were cut or are open.
    ///
    /// # Errors
    /// A segment on the way is not the one that the catalogue, or its successor, knows; [`Error::Io`].
    pub(crate) fn proved(&self, ordinal: u64) -> Result<Option<Proved>> {
        let Some(head) = self.record().head.filter(|head| head.ordinal >= ordinal) else { return Ok(None) };
        let segments = self.segments(false)?;
        // Begins with the lowest segment from this one on that is proved already. The head's own may have grown since.
        let known = {
            let chain = lock(&self.chain.0);
            let mut known = chain.range(ordinal..=head.ordinal);
            known
                .find(|(at, proved)| **at < head.ordinal || proved.end.digest == head.digest)
                .map(|(_, one)| one.clone())
        };
        let mut next = match known {
            Some(proved) if proved.end.ordinal == ordinal => return Ok(Some(proved)),
            Some(proved) => predecessor(&proved.header),
            None => Some((head.sealed, head.into_end())),
        };
        while let Some((sealed, end)) = next {
            let at = segments.partition_point(|segment| segment.ordinal < end.ordinal);
            let Some(name) = segments.get(at).filter(|name| name.ordinal == end.ordinal) else { return Ok(None) };
            let proved = self.prove(name, sealed, end)?;
            lock(&self.chain.0).insert(end.ordinal, proved.clone());
            if end.ordinal == ordinal {
                return Ok(Some(proved));
            }
            next = predecessor(&proved.header);
        }
        Ok(None)
    }

    /// What the key of a segment is derived from, as the catalogue proves it or this process made it; `None` when it is not known.
    pub(crate) fn proved_key_source(&self, name: &SegmentRef) -> Result<Option<KeySource>> {
        if let Some(active) = &name.active {
            return Ok(Some(active.header.header.key_source));
        }
        Ok(self.proved(name.ordinal)?.map(|proved| proved.header.header.key_source))
    }

    /// Proves one segment by its end, which is authenticated.
    fn prove(&self, name: &SegmentRef, sealed: bool, end: PredecessorEnd) -> Result<Proved> {
        let opened = self.open_segment(name)?;
        let header = &opened.header;
        let same = match &opened.end {
            End::Sealed(footer) if sealed => {
                let footer = &footer.footer;
                footer.block_count == end.blocks
                    && footer.digest(header.header.payload_hash, &header.header_hash) == end.digest
            }
            // This process made its header.
            End::Active(_) => true,
            // Beside a writer, a head that is not sealed may be in a segment that has been sealed since.
            _ => self.in_place(&opened, end.bytes)?.digest() == end.digest,
        };
        if !same || header.header.segment != end.segment {
            let what = format!("{} is not the segment that the catalogue knows", name.path.display());
            return Err(Error::RolledBack { what });
        }
        Ok(Proved { header: Arc::clone(header), end })
    }

    /// Whether the blocks of a segment, up to an end, are those of its digest, and its footer is what they add up to. Reads all of them.
    fn has_contents(&self, opened: &Opened, end: &PredecessorEnd) -> Result<bool> {
        let footer = match &opened.end {
            End::Sealed(footer) => Some(&footer.footer),
            _ => None,
        };
        let contents = self.in_place(opened, footer.map_or(end.bytes, |footer| footer.offset))?;
        let same = contents.digest() == end.digest;
        Ok(same
            && footer.is_none_or(|found| *found == contents.build(found.offset, found.nonce_random, found.recovered)))
    }

    /// Whether a segment may be read by its key. A holder of a retired version of the service keyring can make any segment under it, so
    /// one under such a version counts only as the catalogue proves it. All its blocks are read for that.
    ///
    /// # Errors
    /// [`Error::RetiredKeyVersion`]: the catalogue does not know the segment, or knows other contents.
    pub(super) fn check_retired(&self, opened: &Opened) -> Result<()> {
        let Some(retired) = self.retired(&opened.header.header, &opened.name.path)? else { return Ok(()) };
        let ordinal = opened.name.ordinal;
        let ended = |proved: &Proved| match &opened.end {
            End::Cut(end) if *end == proved.end => true,
            _ => self.record().head.is_some_and(|head| head.sealed || head.ordinal > ordinal),
        };
        match self.proved(ordinal)?.filter(ended) {
            Some(proved) if proved.header.header_hash == opened.header.header_hash => {
                if self.has_contents(opened, &proved.end)? { Ok(()) } else { Err(retired) }
            }
            _ => Err(retired),
        }
    }

    /// Where a segment ends that is open and under a retired version of the service keyring: at the head that the rotation has recorded.
    /// What is behind that may be by a holder of the old version.
    pub(super) fn retired_end(&self, header: &SegmentHeader, path: &Path) -> Result<Option<PredecessorEnd>> {
        if self.retired(header, path)?.is_none() {
            return Ok(None);
        }
        Ok(self.record().head.filter(|head| !head.sealed && head.ordinal == header.ordinal).map(Head::into_end))
    }

    /// The error about a segment that is under a retired version of the service keyring; `None` for any other. A reader reads the catalogue
    /// again: the writer has recorded the head when it rotated the key.
    fn retired(&self, header: &SegmentHeader, path: &Path) -> Result<Option<Error>> {
        let KeySource::Keyring(version) = header.key_source else { return Ok(None) };
        let check = |keyring: &Keyring| keyring.check_accepted(version, path, "a segment");
        let Err(retired) = self.context.gate.context().with_keyring(check) else { return Ok(None) };
        if let Some(reload) = &self.context.reload {
            self.set_record(reload(self.id)?);
        }
        Ok(Some(retired))
    }

    /// Forgets the segments below `ordinal`: retention has dropped them.
    pub(super) fn forget_proved(&self, ordinal: u64) {
        let mut proved = lock(&self.chain.0);
        *proved = proved.split_off(&ordinal);
    }

    /// Notes from where on retention keeps the shard.
    pub(crate) fn note_first(&self, first_ordinal: u64, first_seq: u64) {
        let mut record = crate::sync::write(&self.record);
        (record.first_ordinal, record.first_seq) = (first_ordinal, first_seq);
    }

    /// Notes that the catalogue knows this head.
    pub(crate) fn note_head(&self, head: &Head) {
        let mut record = crate::sync::write(&self.record);
        if record.head.as_ref().is_none_or(|known| known.reach() <= head.reach()) {
            record.head = Some(head.clone());
        }
    }
}

/// What a header says of the end of the segment before.
fn predecessor(header: &DecodedHeader) -> Option<(bool, PredecessorEnd)> {
    match header.header.predecessor {
        Predecessor::None => None,
        Predecessor::Sealed(end) => Some((true, end)),
        Predecessor::Cut(end) => Some((false, end)),
    }
}
