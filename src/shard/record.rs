//! The catalogue's record of a shard, and the heads in it.

use serde::{Deserialize, Serialize};

use super::writer::RESERVED_SEQS;
use crate::{
    Error, ErrorKind, Result,
    config::LogstoreName,
    ids::{LogstoreId, SegmentId},
    segment::{DecodedHeader, Footer, FooterBuilder, PredecessorEnd, SegmentHeader},
};

/// The catalogue's record of a shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ShardRecord {
    /// The first segment that retention has not dropped.
    pub(crate) first_ordinal: u64,
    /// The first sequence number that retention has not dropped.
    pub(crate) first_seq: u64,
    /// The last head of the shard that was recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) head: Option<Head>,
    /// The accepted losses among the segments that retention has not dropped, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) losses: Vec<Loss>,
}

impl Default for ShardRecord {
    fn default() -> Self {
        Self { first_ordinal: 1, first_seq: 0, head: None, losses: Vec::new() }
    }
}

impl ShardRecord {
    /// The accepted loss that includes a segment.
    pub(crate) fn loss(&self, ordinal: u64) -> Option<&Loss> {
        self.loss_from(ordinal).filter(|loss| loss.first <= ordinal)
    }

    /// The first accepted loss that includes a segment, or lies behind it.
    pub(crate) fn loss_from(&self, ordinal: u64) -> Option<&Loss> {
        self.losses.get(self.losses.partition_point(|loss| loss.last < ordinal))
    }

    /// The highest ordinal that the catalogue knows; 0 if it knows none.
    pub(crate) fn last_known(&self) -> u64 {
        let head = self.head.as_ref().map_or(0, |head| head.ordinal);
        head.max(self.losses.last().map_or(0, |loss| loss.last))
    }

    /// The highest first sequence number that a segment of this ordinal can have. A segment reserves
    /// [`RESERVED_SEQS`] numbers, and the catalogue records each point behind which a shard has
    /// skipped more.
    pub(super) fn first_seq_max(&self, ordinal: u64) -> u64 {
        let reach = |known: u64, seq: u64| {
            seq.saturating_add(RESERVED_SEQS.saturating_mul(ordinal.saturating_sub(known)))
        };
        let head = self.head.as_ref().map_or(0, |head| reach(head.ordinal, head.next_seq));
        let lost = self.losses.last().map_or(0, |loss| reach(loss.last, loss.end_seq));
        reach(self.first_ordinal.saturating_sub(1), self.first_seq).max(head).max(lost)
    }

    /// Adds an accepted loss. Keeps the order.
    pub(crate) fn accept(&mut self, loss: Loss) {
        let at = self.losses.partition_point(|known| known.first < loss.first);
        self.losses.insert(at, loss);
    }

    /// Forgets the losses that retention has dropped.
    pub(crate) fn forget_dropped_losses(&mut self) {
        let first = self.first_ordinal;
        self.losses.retain(|loss| loss.last >= first);
    }
}

/// Consecutive segments that are missing or damaged, and whose loss an operator has accepted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Loss {
    /// The first of the segments.
    pub(crate) first: u64,
    /// The last of them.
    pub(crate) last: u64,
    /// No group before this number is lost.
    pub(crate) from_seq: u64,
    /// No group from this number on is lost. If the shard ended in the loss, it continues here.
    pub(crate) end_seq: u64,
    /// Whether a segment was forged, or exchanged for another one, and that was accepted too.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) tampered: bool,
    /// The head behind the segment in front of the loss, if there is one. The header of the lost
    /// segment named that end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) before: Option<Head>,
    /// When the loss was accepted, in microseconds since the Unix epoch.
    pub(crate) accepted_us: u64,
}

impl Loss {
    /// Whether the acceptance covers this error of a lost segment.
    pub(crate) fn covers(&self, error: &Error) -> bool {
        error.is_loss() || (self.tampered && error.kind() == ErrorKind::Integrity)
    }

    /// The end that a segment behind the loss names for the last lost segment, of which nothing is
    /// known.
    pub(crate) fn unknown_end(&self) -> PredecessorEnd {
        PredecessorEnd {
            ordinal: self.last,
            segment: UNKNOWN,
            blocks: 0,
            bytes: 0,
            end_seq: self.end_seq,
            digest: [0; 32],
            last_time_us: self.before.as_ref().map_or(0, |head| head.last_time_us),
        }
    }
}

/// The segment id in an end of which nothing is known. No segment has it.
const UNKNOWN: SegmentId = SegmentId::from_bytes([0; 16]);

/// Whether an end is that of a lost segment of which nothing was known.
pub(super) fn is_unknown_end(end: &PredecessorEnd) -> bool {
    end.segment == UNKNOWN
}

/// The recorded end of a shard: a point up to which all its blocks are durable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Head {
    pub(crate) ordinal: u64,
    pub(crate) segment: SegmentId,
    /// Whether the segment is sealed. If so, it ends here, and later blocks are in its successor.
    pub(crate) sealed: bool,
    pub(crate) blocks: u32,
    /// Sealed: the length of the file. Otherwise: the offset at which the last of the blocks ends.
    pub(crate) bytes: u64,
    pub(crate) end_seq: u64,
    /// The first sequence number that the next segment may use.
    pub(crate) next_seq: u64,
    /// When the last group before this point was received: see
    /// [`crate::segment::PredecessorEnd::last_time_us`].
    pub(crate) last_time_us: u64,
    #[serde(with = "crate::ids::hex")]
    pub(crate) digest: [u8; 32],
}

impl Head {
    /// The head in a segment that is not sealed, behind the blocks that `builder` has counted. The
    /// last of them ends at `bytes`.
    pub(super) fn open(header: &SegmentHeader, builder: &FooterBuilder, bytes: u64) -> Self {
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

    /// The head behind a sealed segment.
    pub(super) fn sealed(header: &DecodedHeader, footer: &Footer, file_len: u64) -> Self {
        Self {
            ordinal: header.ordinal,
            segment: header.segment,
            sealed: true,
            blocks: footer.block_count,
            bytes: file_len,
            end_seq: footer.end_seq,
            next_seq: footer.end_seq,
            last_time_us: header.last_time_us(footer),
            digest: footer.digest(header.payload_hash, &header.header_hash),
        }
    }

    /// The head behind a sealed segment, of which its successor names this end.
    pub(super) fn behind(end: &PredecessorEnd, next_seq: u64) -> Self {
        Self {
            ordinal: end.ordinal,
            segment: end.segment,
            sealed: true,
            blocks: end.blocks,
            bytes: end.bytes,
            end_seq: end.end_seq,
            next_seq,
            last_time_us: end.last_time_us,
            digest: end.digest,
        }
    }

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

    /// Its place in the shard. The later of two heads has the greater place.
    pub(crate) fn reach(&self) -> (u64, bool, u32) {
        (self.ordinal, self.sealed, self.blocks)
    }
}

/// Records heads outside of the shard.
pub(crate) trait RecordHead: Send + Sync {
    /// Returns when `head` is durable in the catalogue.
    ///
    /// # Errors
    /// What kept it from being recorded. The shard must not begin another segment then.
    fn record_head(
        &self,
        logstore: &LogstoreName,
        id: LogstoreId,
        shard: u32,
        head: Head,
    ) -> Result<()>;
}

/// Reads the record of a shard again, for a read-only opener: the writer changes it.
pub(crate) trait ReloadRecord: Send + Sync {
    /// The record of `shard` as the catalogue has it now. Reads files.
    ///
    /// # Errors
    /// What kept the catalogue from being read; [`crate::Error::Closed`] where it no longer has the
    /// Logstore or the shard.
    fn reload_record(&self, logstore: &LogstoreName, shard: u32) -> Result<ShardRecord>;
}
