//! The records of the key audit log.

use serde::{Deserialize, Serialize};

use crate::{config::LogstoreName, ids::LogstoreId};

/// An event in the life of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum AuditEvent {
    /// The store and its keyring were made.
    StoreCreated,
    /// A Logstore's first envelope was made.
    Created,
    /// The KMS refused the key; the detail says why. Without a Logstore, the key is the service key.
    Revoked,
    /// The lease ended without an answer of the KMS. Without a Logstore, it is that of the service
    /// key.
    LeaseEnded,
    /// Groups that were acknowledged as [`Buffered`](crate::Durability::Buffered) were lost with
    /// the key: their shard could not be sealed in time. The detail names the shard, how many
    /// groups, and the lowest and the highest of their sequence numbers.
    GroupsLost,
    /// The key can be used again. Without a Logstore, the key is the service key.
    Recovered,
    /// A new data-key version is about to be made.
    RotateIntended,
    /// A new data-key version is in use.
    Rotated,
    /// The envelopes are about to be wrapped again under the current wrapping key.
    RewrapIntended,
    /// The envelopes were re-wrapped under the current wrapping key.
    Rewrapped,
    /// A re-wrap of the envelopes of many Logstores begins; the detail says of which.
    RewrapBegun,
    /// All of these envelopes were re-wrapped.
    RewrapEnded,
    /// A new service-key version is about to be made.
    ServiceRotateIntended,
    /// Every document that the service key authenticates is under the new version. The older
    /// versions are retired next.
    ServiceRotated,
    /// The master key is about to be replaced.
    ReplaceIntended,
    /// The master key was replaced.
    Replaced,
    /// Data-key versions are about to be destroyed.
    ShredIntended,
    /// Data-key versions were destroyed.
    Shredded,
    /// A Logstore is about to be deleted, and its envelopes with it.
    DeleteIntended,
    /// A Logstore was deleted, and its envelopes with it.
    Deleted,
    /// The store was recovered with a new keyring.
    KeyringReplaced,
    /// The keyring is about to be put under another master key, or under none; the detail says
    /// which.
    KeyringRewrapIntended,
    /// The keyring was put under another master key, or under none.
    KeyringRewrapped,
    /// The store has an anchor from now on.
    Anchored,
    /// An operator has accepted the loss of segments. The detail names the shard, the segments, the
    /// sequence numbers, the user of the process, and the damage. Without a Logstore, the loss is
    /// that of the key audit log before this record.
    LossAccepted,
    /// An operator has put other metadata of a Logstore in force, because the metadata that the
    /// catalogue names is lost. The detail names both generations, and the user of the process.
    MetadataAdopted,
    /// An operator has given up a Logstore whose metadata is lost. The detail names the damage, and
    /// the user of the process. The deletion follows.
    GivenUp,
    /// A store that has an anchor was opened for writing without it.
    OpenedWithoutAnchor,
    /// A caller asked a service for an administrative command, which has not begun yet. The detail
    /// names the caller and the command.
    CommandReceived,
    /// The store was restored from a backup. The detail names the backup, the user of the process,
    /// and the time from which on records were left out.
    Restored,
}

/// One record of the key audit log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct AuditRecord {
    /// The number of the record in the store, from 1.
    pub number: u64,
    /// When it was written, in microseconds since the Unix epoch.
    pub time_us: u64,
    /// The event.
    pub event: AuditEvent,
    /// The name of the Logstore; `None` for an event of the whole store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logstore: Option<LogstoreName>,
    /// The id of the Logstore.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logstore_id: Option<LogstoreId>,
    /// Details for people, never a secret.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
    /// The version of the service keyring that tags the record.
    pub keyring_version: u32,
}

/// A record, by its number and tag: how far the log was at some time. The catalogue and checkpoints
/// keep one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct AuditHead {
    pub(crate) number: u64,
    pub(crate) tag: String,
}
