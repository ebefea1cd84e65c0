//! Payloads of appends, and how durable an append is.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    group::{self, GROUP_BYTES_MAX, LogGroup},
    segment::BlockKind,
};

/// What an append survives once it has returned, or its ticket is done.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Durability {
    /// In memory. A killed process loses up to the last 100 ms. Survives the revocation of its key
    /// if the disk takes it within [`StoreOptions::kms_timeout`](crate::StoreOptions::kms_timeout),
    /// and a segment is open that can take it. Groups that do not survive are counted
    /// ([`StoreMetrics::groups_lost`](crate::metrics::StoreMetrics::groups_lost)), are on the key
    /// audit log ([`AuditEvent::GroupsLost`](crate::audit::AuditEvent::GroupsLost)), and are an error of
    /// the next [`Logstore::sync`](crate::Logstore::sync).
    Buffered,
    /// Written to the file: in the page cache. Survives the revocation of its key and the end of
    /// the process, not of the operating system.
    Written,
    /// Synced: survives a crash of the operating system and the loss of power, as far as the disk
    /// keeps its promises.
    #[default]
    Synced,
}

/// The shard that receives an append.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum ShardChoice {
    /// Each readwrite shard in turn.
    #[default]
    RoundRobin,
    /// The shard with this number. If it is read-only, the append fails with
    /// [`Error::ShardReadOnly`].
    Shard(u32),
    /// The readwrite shard that owns this hash key.
    HashKey(u128),
}

/// The contents of one append.
#[derive(Clone, Debug)]
pub struct Payload {
    pub(crate) kind: BlockKind,
    pub(crate) bytes: Bytes,
    pub(crate) logs: u32,
}

impl Payload {
    /// A log group that is encoded already (the `LogGroup` protobuf), stored byte for byte.
    ///
    /// # Errors
    /// [`Error::InvalidGroup`] when the bytes are not a log group with at least one log, within the
    /// limits.
    pub fn encoded(group: impl Into<Bytes>) -> Result<Self> {
        let bytes = group.into();
        let summary = group::validate_group(&bytes)?;
        Ok(Self { kind: BlockKind::Groups, bytes, logs: summary.logs })
    }

    /// Bytes of the caller's own, which the engine does not look into. May be empty.
    ///
    /// # Errors
    /// [`Error::TooLarge`] beyond [`GROUP_BYTES_MAX`].
    pub fn opaque(bytes: impl Into<Bytes>) -> Result<Self> {
        let bytes = bytes.into();
        if bytes.len() > GROUP_BYTES_MAX {
            return Err(Error::TooLarge {
                what: "opaque record (bytes)",
                size: bytes.len() as u64,
                limit: GROUP_BYTES_MAX as u64,
            });
        }
        Ok(Self { kind: BlockKind::Opaque, bytes, logs: 0 })
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

impl TryFrom<&LogGroup> for Payload {
    type Error = Error;

    fn try_from(group: &LogGroup) -> Result<Self> {
        Self::encoded(group.encode_to_bytes())
    }
}

/// Encodes the group, as the conversion from a reference does.
impl TryFrom<LogGroup> for Payload {
    type Error = Error;

    fn try_from(group: LogGroup) -> Result<Self> {
        Self::try_from(&group)
    }
}

/// The place of an appended group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Appended {
    /// The shard.
    pub shard: u32,
    /// The sequence number within the shard.
    pub seq: u64,
}
