//! The error type of the engine.
//!
//! A caller matches on [`Error`] itself, or on its coarser [`Error::kind`]. Sources that cannot be
//! cloned are shared, so every caller of a failed block gets the same error. No variant carries key
//! material or log content.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde::{Serialize, Serializer, ser::SerializeStruct};

pub use crate::config::ConfigError;
use crate::{
    config::LogstoreName,
    ids::ParseIdError,
    io::{FileKind, WrongFileType, is_full},
    kms::{Cmk, KmsError, KmsUrlError, NoKms, RevokedReason},
    wire::{DecodeError, FORMAT_VERSION},
};

#[cfg(feature = "kms-local")]
use crate::kms::LocalKmsError;

/// Another writer has taken over the store. The disk of a writer reports it as the inner error of
/// an [`io::Error`], which becomes [`Error::Fenced`].
#[derive(Clone, Debug, thiserror::Error)]
#[error("another writer has opened the store")]
pub(crate) struct TakenOver {
    pub(crate) path: PathBuf,
    pub(crate) epoch: u64,
}

/// A new envelope needs a KMS, so a region without one refuses the configuration.
impl From<NoKms> for Error {
    fn from(none: NoKms) -> Self {
        Error::Config(ConfigError::NoKmsForRegion { region: none.region })
    }
}

/// The result of an engine operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The position of a fault in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Location {
    /// The file.
    pub file: PathBuf,
    /// The block number within the segment, if the fault concerns a block.
    pub block: Option<u32>,
    /// The offset in bytes from the beginning of the file.
    pub offset: u64,
}

impl Location {
    /// A position in `file` that is not inside a block.
    pub fn new(file: impl Into<PathBuf>, offset: u64) -> Self {
        Self { file: file.into(), block: None, offset }
    }

    /// The same position, inside block number `block`.
    #[must_use]
    pub fn block(mut self, block: u32) -> Self {
        self.block = Some(block);
        self
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at byte {}", self.file.display(), self.offset)?;
        match self.block {
            Some(block) => write!(f, " (block {block})"),
            None => Ok(()),
        }
    }
}

/// The reaction to an error: who has to act, and whether the same call can succeed later.
///
/// | kind | the caller's next step | who acts | errors |
/// |---|---|---|---|
/// | [`Invalid`](Self::Invalid) | correct the call; never repeat it unchanged | the developer | [`Config`](Error::Config) otherwise, [`InvalidGroup`](Error::InvalidGroup), [`InvalidArgument`](Error::InvalidArgument), [`TooLarge`](Error::TooLarge), [`KmsUrl`](Error::KmsUrl), [`InvalidId`](Error::InvalidId), [`UnexpectedCmk`](Error::UnexpectedCmk), [`ReadOnly`](Error::ReadOnly), [`ShardReadOnly`](Error::ShardReadOnly) |
/// | [`NotFound`](Self::NotFound) | use another name, or create it | the developer | [`StoreMissing`](Error::StoreMissing), [`NotAStore`](Error::NotAStore), [`LogstoreMissing`](Error::LogstoreMissing), [`ShardMissing`](Error::ShardMissing), [`AboveEnd`](Error::AboveEnd), [`Shredded`](Error::Shredded) |
/// | [`Exists`](Self::Exists) | use the existing one, or another name | the developer | [`StoreExists`](Error::StoreExists), [`NotEmpty`](Error::NotEmpty), [`LogstoreExists`](Error::LogstoreExists), [`KeyringExists`](Error::KeyringExists) |
/// | [`Busy`](Self::Busy) | repeat the call soon, with a growing delay | - | [`Full`](Error::Full), [`TooManyReaders`](Error::TooManyReaders) |
/// | [`NoRoom`](Self::NoRoom) | repeat the call after an operator has made room | the operator | [`TooMany`](Error::TooMany), [`Io`](Error::Io) of a full disk, an exhausted quota, or a file at its largest size (ENOSPC, EDQUOT, EFBIG) |
/// | [`Revoked`](Self::Revoked) | stop until the customer allows the key again | the owner of the key | [`Revoked`](Error::Revoked), [`ServiceKey`](Error::ServiceKey) with a refusal, [`Config`](Error::Config) with [`CmkRefused`](ConfigError::CmkRefused) |
/// | [`KmsUnreachable`](Self::KmsUnreachable) | repeat the call later | the operator of the KMS | [`KmsUnreachable`](Error::KmsUnreachable), [`KmsInvalid`](Error::KmsInvalid), [`ServiceKey`](Error::ServiceKey) otherwise |
/// | [`Integrity`](Self::Integrity) | stop; find the cause; restore a backup | the operator | [`WrongKey`](Error::WrongKey), [`Tampered`](Error::Tampered), [`Corrupt`](Error::Corrupt), [`Truncated`](Error::Truncated), [`RolledBack`](Error::RolledBack), [`RetiredKeyVersion`](Error::RetiredKeyVersion), [`WrongFileType`](Error::WrongFileType) |
/// | [`Unavailable`](Self::Unavailable) | repeat the call after an operator has corrected the environment that the message names | the operator | [`Locked`](Error::Locked), [`Fenced`](Error::Fenced), [`Anchor`](Error::Anchor), [`AnchorBehind`](Error::AnchorBehind), [`NewerFormat`](Error::NewerFormat), [`OlderFormat`](Error::OlderFormat), [`UnsupportedFeature`](Error::UnsupportedFeature), [`KeyringMissing`](Error::KeyringMissing), [`KeyringForeign`](Error::KeyringForeign), [`KeyringUnsafe`](Error::KeyringUnsafe), [`KeyringTooOld`](Error::KeyringTooOld), [`NetworkFileSystem`](Error::NetworkFileSystem), [`BackupRefused`](Error::BackupRefused) |
/// | [`Io`](Self::Io) | stop; an operator checks the disk; [`Logstore::reopen_shard`](crate::Logstore::reopen_shard) if a shard has latched | the operator | [`Io`](Error::Io) otherwise |
/// | [`Closed`](Self::Closed) | open the store or the Logstore again | the developer | [`Closed`](Error::Closed), [`Forked`](Error::Forked), [`KeyringChanged`](Error::KeyringChanged) |
/// | [`Bug`](Self::Bug) | report it | the developers of envelog | [`Crypto`](Error::Crypto) |
///
/// [`Latched`](Error::Latched), [`Lost`](Error::Lost), [`GroupsLost`](Error::GroupsLost) and
/// [`KeyringNotRead`](Error::KeyringNotRead) have the kind of their cause. `LocalKms`, an error of
/// the administration of an embedded KMS, has the kind that its cause has in this table.
///
/// A kind is a class of reactions. [`Error::code`] names the variant: many codes have one kind. The
/// JSON of an error has both.
///
/// A service answers a request over HTTP like this. The last column is the header `Retry-After`:
///
/// | kind | status | retry |
/// |---|---|---|
/// | `Invalid` | 400 Bad Request | never |
/// | `NotFound` | 404 Not Found | never |
/// | `Exists` | 409 Conflict | never |
/// | `Busy` | 429 Too Many Requests | 1 s, doubled at each attempt |
/// | `NoRoom` | 507 Insufficient Storage | minutes: an operator has to act |
/// | `Revoked` | 403 Forbidden | never: the owner of the key has to act |
/// | `KmsUnreachable` | 503 Service Unavailable | 5 s |
/// | `Unavailable`, `Closed` | 503 Service Unavailable | 30 s; alert an operator |
/// | `Integrity`, `Io`, `Bug` | 500 Internal Server Error | never; alert an operator |
///
/// `Busy` is the back-pressure of the engine. Answer it with a status that slows the client down, as
/// here, or wait for room with [`Logstore::append_async`](crate::Logstore::append_async) or
/// [`Logstore::submit`](crate::Logstore::submit). `docs/blocking.md` has a recipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ErrorKind {
    /// The call or the configuration is not allowed. Correct it.
    Invalid,
    /// The name does not exist.
    NotFound,
    /// The name exists already.
    Exists,
    /// There is no room in memory at the moment. Repeat the call soon.
    Busy,
    /// A limit of the store, or the disk, is reached. An operator has to make room.
    NoRoom,
    /// The owner of the key refuses it. Stop until the owner allows it again.
    Revoked,
    /// The KMS does not answer, or its answer is invalid. Repeat the call later.
    KmsUnreachable,
    /// The bytes on disk differ from the written bytes. Restore a backup.
    Integrity,
    /// An operator has to correct the environment: a lock, a keyring, an anchor, a version.
    Unavailable,
    /// The operating system failed an operation. An operator has to check the disk.
    Io,
    /// The handle can no longer be used. Open the store or the Logstore again.
    Closed,
    /// A library failed where it cannot fail. Report it.
    Bug,
}

impl ErrorKind {
    /// The kind as a word for programs, such as `kms_unreachable`: the field `kind` of the JSON of
    /// an error.
    pub fn name(self) -> &'static str {
        match self {
            Self::Invalid => "invalid",
            Self::NotFound => "not_found",
            Self::Exists => "exists",
            Self::Busy => "busy",
            Self::NoRoom => "no_room",
            Self::Revoked => "revoked",
            Self::KmsUnreachable => "kms_unreachable",
            Self::Integrity => "integrity",
            Self::Unavailable => "unavailable",
            Self::Io => "io",
            Self::Closed => "closed",
            Self::Bug => "bug",
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The reason why a service keyring is refused. The message says how to correct it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum KeyringRisk {
    /// Its group or other users have a right to it.
    Exposed {
        /// Its permission bits.
        mode: u32,
        /// Whether the caller allows its group to read it.
        group_may_read: bool,
    },
    /// Its owner is neither the user of the process nor root. If the process runs as root, it may
    /// also be the owner of the store.
    ForeignOwner {
        /// The user.
        uid: u32,
    },
    /// It is inside the store directory, so every copy of the store would hold it.
    InsideStore,
}

impl fmt::Display for KeyringRisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exposed { mode, group_may_read: false } => {
                write!(
                    f,
                    "its mode is {mode:04o}, so users other than its owner have a right to it; run chmod 600 on it"
                )
            }
            Self::Exposed { mode, group_may_read: true } => {
                write!(
                    f,
                    "its mode is {mode:04o}, so its group has more than the right to read, or others have a right to it; run chmod 640 on it"
                )
            }
            Self::ForeignOwner { uid } => {
                write!(
                    f,
                    "it belongs to user {uid}, who is neither this process's user nor root; run chown on it"
                )
            }
            Self::InsideStore => f.write_str(
                "it lies inside the store directory; move it out of there, and name its new path",
            ),
        }
    }
}

/// All errors of the engine.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The KMS refuses the customer master key, so every read and write of the Logstore is refused.
    #[error(
        "access to Logstore {logstore} is refused: its master key {cmk} is {reason}; {}", reason.remedy()
    )]
    Revoked {
        /// The Logstore.
        logstore: LogstoreName,
        /// The `cmk_key_id`.
        cmk: String,
        /// The reason.
        reason: RevokedReason,
    },
    /// The KMS gave no usable answer for longer than the outage grace.
    #[error(
        "Logstore {logstore} is unavailable: the KMS of region {region} does not answer for master key {cmk}: {detail}; try again when it does"
    )]
    KmsUnreachable {
        /// The Logstore.
        logstore: LogstoreName,
        /// The `cmk_key_id`.
        cmk: String,
        /// The `region_id`.
        region: String,
        /// The backend's explanation.
        detail: String,
    },
    /// The KMS gave an impossible answer.
    #[error(
        "Logstore {logstore} is unavailable: the KMS gave a wrong answer for master key {cmk}: {detail}"
    )]
    KmsInvalid {
        /// The Logstore.
        logstore: LogstoreName,
        /// The `cmk_key_id`.
        cmk: String,
        /// The fault of the answer.
        detail: String,
    },
    /// The segment was sealed with another key than this one, or its header was altered together
    /// with its CRC32.
    #[error("wrong key, or an altered header: the key commitment does not hold in {at}")]
    WrongKey {
        /// The position.
        at: Location,
    },
    /// The CRC32 matches, but authentication fails: an attacker changed the bytes.
    #[error("tampering detected: {what} in {at} fails authentication")]
    Tampered {
        /// The position.
        at: Location,
        /// The part that was being read.
        what: &'static str,
    },
    /// The bytes are damaged.
    #[error("corruption: {what} in {at}")]
    Corrupt {
        /// The position.
        at: Location,
        /// The fault.
        what: String,
    },
    /// A file or a structure ends too early.
    #[error("truncated: {what} in {at}")]
    Truncated {
        /// The position of its end.
        at: Location,
        /// The missing part.
        what: String,
    },
    /// A file is older than the catalogue, a successor or a checkpoint records.
    #[error("rolled back: {what}")]
    RolledBack {
        /// The file or state that is too old.
        what: String,
    },
    /// A retired version of the service key authenticates the file. The file is from before the
    /// rotation, or a holder of the old key has made it.
    #[error(
        "{}: {what} is authenticated by version {version} of the service key, which a rotation has retired: the keyring accepts versions from \
         {accepts} on; if it is part of a backup from before the rotation, read the backup with --accept-retired, or else move the file away", path.display()
    )]
    RetiredKeyVersion {
        /// The file.
        path: PathBuf,
        /// The content of the file.
        what: &'static str,
        /// The version.
        version: u32,
        /// The oldest version that is accepted.
        accepts: u32,
    },
    /// A name in the store, or that of the keyring, has the wrong file type: a symlink, a named
    /// pipe, a socket, a device, a directory in place of a file, or a file in place of a directory.
    /// The engine neither followed nor changed it.
    #[error("{} is a {found}, where envelog keeps a {expected}; put the original back, or remove the {found}", path.display())]
    WrongFileType {
        /// The name.
        path: PathBuf,
        /// The expected type.
        expected: FileKind,
        /// The actual type.
        found: FileKind,
    },
    /// A configuration was refused. Nothing was changed.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Another process has the store open for writing.
    #[error("store {} is locked by {}", path.display(), pid.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}")))]
    Locked {
        /// The store.
        path: PathBuf,
        /// The process that holds the lock, if the lock file records it.
        pid: Option<u32>,
    },
    /// Another process has opened the store for writing while this one has it open. All writes that
    /// this process acknowledged are safe. Operations in progress are not acknowledged. Close the
    /// store, and find out why its `LOCK` did not hold: it was removed or replaced, or the file
    /// system does not share locks.
    #[error("store {} was opened by another writer after this one (epoch {epoch}); this one stops", path.display())]
    Fenced {
        /// The store.
        path: PathBuf,
        /// The epoch of this writer.
        epoch: u64,
    },
    /// The store has an anchor, and the anchor cannot be used. Pass the anchor, repair it, or
    /// deliberately open the store without it.
    #[error("the anchor of store {} cannot be used: {why}; give the anchor (--anchor), or leave it out deliberately (--without-anchor)", path.display())]
    Anchor {
        /// The store.
        path: PathBuf,
        /// The reason.
        why: String,
    },
    /// The anchor lags behind the appends by more than
    /// [`StoreOptions::anchor_required`](crate::StoreOptions::anchor_required). Nothing was
    /// appended. Appends resume when the anchor has caught up.
    #[error("the anchor is behind by {} s, {} s are allowed", behind.as_secs(), limit.as_secs())]
    AnchorBehind {
        /// The current lag.
        behind: Duration,
        /// The allowed lag.
        limit: Duration,
    },
    /// The directory takes no backup of the store. Nothing in it has changed.
    #[error("{} takes no backup of the store: {why}; name another directory", path.display())]
    BackupRefused {
        /// The directory.
        path: PathBuf,
        /// The reason.
        why: &'static str,
    },
    /// The directory that a backup is to be restored to is not empty.
    #[error("{} is not empty; restore to another directory, or move its contents away", path.display())]
    NotEmpty {
        /// The directory.
        path: PathBuf,
    },
    /// A reader was to begin at a sequence number above the end of the shard. No group has this
    /// number yet: it comes from another shard, or from a store that was rolled back or restored
    /// since.
    #[error(
        "sequence number {seq} is above the end of shard {shard}, which is {end_seq}; begin at {end_seq}, or find out whether the store was restored from a backup"
    )]
    AboveEnd {
        /// The shard.
        shard: u32,
        /// The sequence number.
        seq: u64,
        /// One past the last sequence number of the shard.
        end_seq: u64,
    },
    /// There is no store at the path.
    #[error("there is no store at {}; create one first", path.display())]
    StoreMissing {
        /// The path.
        path: PathBuf,
    },
    /// The path is not an envelog store.
    #[error("{} is not an envelog store", path.display())]
    NotAStore {
        /// The path.
        path: PathBuf,
    },
    /// There is a store at the path already.
    #[error("there is a store at {} already", path.display())]
    StoreExists {
        /// The path.
        path: PathBuf,
    },
    /// A newer envelog wrote the file.
    #[error("{} has format version {found}, this build reads {supported}; use a newer envelog", path.display())]
    NewerFormat {
        /// The file.
        path: PathBuf,
        /// Its format version.
        found: u16,
        /// The newest version that this build supports.
        supported: u16,
    },
    /// An unreleased early version of envelog wrote the file.
    #[error("{} has format version {found}, this build reads only version {supported}", path.display())]
    OlderFormat {
        /// The file.
        path: PathBuf,
        /// Its format version.
        found: u16,
        /// The version that this build reads.
        supported: u16,
    },
    /// The file uses a feature that this build does not have.
    #[error("{} uses a feature that this build does not know ({what}); use a newer envelog", path.display())]
    UnsupportedFeature {
        /// The file.
        path: PathBuf,
        /// The feature.
        what: String,
    },
    /// The service keyring is absent.
    #[error("the service keyring {} is missing; restore it from its backup", path.display())]
    KeyringMissing {
        /// The path that was searched.
        path: PathBuf,
    },
    /// The path for a new service keyring already holds one.
    #[error("there is a service keyring at {} already; it is never overwritten (remove it if an interrupted recovery without the keyring left it)", path.display())]
    KeyringExists {
        /// The path.
        path: PathBuf,
    },
    /// Another process has replaced the service keyring since this one opened the store. Nothing
    /// was written. Open the store again.
    #[error("another process has changed the service keyring {} since the store was opened; open the store again", path.display())]
    KeyringChanged {
        /// The keyring.
        path: PathBuf,
    },
    /// The service keyring belongs to another store.
    #[error(
        "the service keyring {} belongs to another store; name this store's own keyring, or, to create a store, a path where \
         there is no keyring yet; a keyring that no store needs can be deleted",
        path.display()
    )]
    KeyringForeign {
        /// The keyring file.
        path: PathBuf,
    },
    /// The store is on a network file system, where the writer's lock may not reach other machines.
    /// [`StoreOptions::allow_network_fs`](crate::StoreOptions::allow_network_fs) is off.
    #[error("{} is on a network file system ({kind}), whose locks may not keep out a writer on another machine", path.display())]
    NetworkFileSystem {
        /// The directory of the store.
        path: PathBuf,
        /// The name of the file system.
        kind: &'static str,
    },
    /// The metadata of a Logstore names a master key or a role that the caller of a recovery does
    /// not expect. The engine called no KMS.
    #[error("Logstore {logstore} names master key {} in {} with role {}, which is not expected", cmk.cmk_key_id, cmk.region_id, cmk.arn)]
    UnexpectedCmk {
        /// The Logstore, by its metadata.
        logstore: LogstoreName,
        /// The master key and the role that its metadata names.
        cmk: Cmk,
    },
    /// The location or the owner of the service keyring would let other users read or replace it.
    /// The engine did not read it.
    #[error("the service keyring {} is not safe: {why}", path.display())]
    KeyringUnsafe {
        /// The keyring file.
        path: PathBuf,
        /// The reason and the correction.
        why: KeyringRisk,
    },
    /// The service keyring is an old copy: it lacks a version that the store uses.
    #[error("the service keyring {} is too old: the store uses version {needed}, it ends at {newest}; restore the newest copy", path.display())]
    KeyringTooOld {
        /// The keyring file.
        path: PathBuf,
        /// The required version.
        needed: u32,
        /// The newest version in the keyring.
        newest: u32,
    },
    /// The service keyring is under a master key, and the KMS of that key refuses it, or gives no
    /// usable answer. The store cannot be opened without it. An open store refuses all operations
    /// that need a key until the KMS lets the master key be used again, and works again then.
    #[error("the service keyring {} cannot be used: it is under master key {cmk} of region {region}, and {cause}", path.display())]
    ServiceKey {
        /// The keyring file.
        path: PathBuf,
        /// The `cmk_key_id`.
        cmk: String,
        /// The `region_id`.
        region: String,
        /// The KMS's answer.
        cause: KmsError,
    },
    /// The KMS lets the master key of the service keyring be used again, and the keyring cannot be
    /// read from its file. The store refuses all operations that need a key until the file is
    /// restored, and works again then.
    #[error("the service keyring {} was wiped from memory, and cannot be read again: {cause}", path.display())]
    KeyringNotRead {
        /// The keyring file.
        path: PathBuf,
        /// Why it cannot be read.
        cause: Arc<Error>,
    },
    /// No Logstore has that name.
    #[error("there is no Logstore {0}")]
    LogstoreMissing(LogstoreName),
    /// A Logstore with that name exists already.
    #[error("Logstore {0} exists already")]
    LogstoreExists(LogstoreName),
    /// The Logstore has no such shard.
    #[error("Logstore {logstore} has no shard {shard}")]
    ShardMissing {
        /// The Logstore.
        logstore: LogstoreName,
        /// The shard.
        shard: u32,
    },
    /// The shard does not accept writes any more: it was split or merged.
    #[error(
        "shard {shard} of Logstore {logstore} is read-only: its range went to {}",
        shards(children)
    )]
    ShardReadOnly {
        /// The Logstore.
        logstore: LogstoreName,
        /// The shard.
        shard: u32,
        /// The shards that took its range. They may have been split or merged too.
        children: Vec<u32>,
    },
    /// The data key was deliberately destroyed. The data sealed under it is lost.
    #[error(
        "data-key version {version} of Logstore {logstore} was shredded: the data sealed under it is lost"
    )]
    Shredded {
        /// The Logstore.
        logstore: LogstoreName,
        /// The data-key version.
        version: u32,
    },
    /// The bytes are not a valid log group.
    #[error("invalid log group: {0}")]
    InvalidGroup(#[from] crate::group::GroupError),
    /// A value is larger than its limit.
    #[error("{what} is too large: {size}, the limit is {limit}")]
    TooLarge {
        /// The value.
        what: &'static str,
        /// Its size, in the unit that `what` names.
        size: u64,
        /// The limit, in the same unit.
        limit: u64,
    },
    /// As many readers are open as [`StoreOptions::readers_max`](crate::StoreOptions::readers_max)
    /// allows. Close one, or try again.
    #[error("too many open readers: the limit is {limit}; close one, or try again")]
    TooManyReaders {
        /// The limit.
        limit: u64,
    },
    /// The number of objects in the store has reached its limit.
    #[error("too many {what}: the limit is {limit}")]
    TooMany {
        /// The objects.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// The write pipeline has no room for another group at the moment.
    #[error("the write pipeline is full ({pending} bytes pending); wait, or use the blocking form")]
    Full {
        /// The number of bytes in the pipeline.
        pending: u64,
    },
    /// An argument is invalid.
    #[error("invalid argument: {0}")]
    InvalidArgument(String),
    /// The shard's writer stopped after a failed write. Reading still works. Reopening the shard
    /// clears the latch.
    #[error(
        "shard {shard} of Logstore {logstore} stopped writing after a failure; {}: {cause}",
        after_latch(cause)
    )]
    Latched {
        /// The Logstore.
        logstore: LogstoreName,
        /// The shard.
        shard: u32,
        /// The failure.
        cause: Arc<Error>,
    },
    /// Groups that were acknowledged as [`Buffered`](crate::Durability::Buffered) are lost: their
    /// key was lost, and the disk did not take them in time. [`crate::Logstore::sync`] or
    /// [`crate::Store::close`] reports each loss once.
    #[error(
        "shard {shard} of Logstore {logstore} lost {groups} buffered groups with its key, of the sequence numbers {first_seq} to {last_seq}: {cause}"
    )]
    GroupsLost {
        /// The Logstore.
        logstore: LogstoreName,
        /// The shard.
        shard: u32,
        /// How many groups.
        groups: u64,
        /// The lowest of their sequence numbers. Groups in between may not be lost.
        first_seq: u64,
        /// The highest of their sequence numbers.
        last_seq: u64,
        /// Why the key was lost.
        cause: Arc<Error>,
    },
    /// Groups of a shard are lost or damaged, within a range of sequence numbers. A reader continues
    /// behind them with [`ReadOptions::skip_lost`](crate::ReadOptions::skip_lost), and
    /// [`Admin::repair`](crate::Admin::repair) accepts the loss.
    #[error("groups of shard {shard} are lost, {}: {cause}", lost_range(*from_seq, *end_seq))]
    Lost {
        /// The shard.
        shard: u32,
        /// No group before this sequence number is lost.
        from_seq: u64,
        /// No group from this sequence number on is lost. `None` if nothing behind the damage can
        /// be read.
        end_seq: Option<u64>,
        /// The damage.
        cause: Arc<Error>,
    },
    /// The store was opened read-only.
    #[error("the store is open read-only")]
    ReadOnly,
    /// The process inherited the handle through `fork` and must not use it.
    #[error("this handle was inherited through fork; open the store again in this process")]
    Forked,
    /// The store, Logstore or reader has been closed or deleted.
    #[error("{0} is closed")]
    Closed(&'static str),
    /// The URL names no KMS of this build.
    #[error(transparent)]
    KmsUrl(#[from] KmsUrlError),
    /// The string is not an identifier.
    #[error(transparent)]
    InvalidId(#[from] ParseIdError),
    /// The administration of an embedded KMS failed.
    #[cfg(feature = "kms-local")]
    #[error(transparent)]
    LocalKms(Arc<LocalKmsError>),
    /// A cryptographic library failed.
    #[error("cryptography: {0}")]
    Crypto(#[from] crate::crypto::CryptoError),
    /// The operating system failed an operation.
    #[error("cannot {op} {}: {source}", path.display())]
    Io {
        /// The operation.
        op: &'static str,
        /// The file.
        path: PathBuf,
        /// The error of the system.
        source: Arc<io::Error>,
    },
}

impl DecodeError {
    /// Converts an error in decoding bytes at `offset` of the file `path`.
    pub(crate) fn in_file(self, path: &Path, offset: u64) -> Error {
        let at = Location::new(path, offset);
        match self {
            DecodeError::NewerVersion(found) => {
                Error::NewerFormat { path: path.to_owned(), found, supported: FORMAT_VERSION }
            }
            DecodeError::OlderVersion(found) => {
                Error::OlderFormat { path: path.to_owned(), found, supported: FORMAT_VERSION }
            }
            DecodeError::Feature(what) => Error::UnsupportedFeature { path: path.to_owned(), what },
            DecodeError::Short { .. } => Error::truncated(at, self.to_string()),
            other => Error::corrupt(at, other.to_string()),
        }
    }
}

/// "shards 4 and 5", for a message.
fn shards(shards: &[u32]) -> String {
    let texts: Vec<String> = shards.iter().map(u32::to_string).collect();
    match &texts[..] {
        [one] => format!("shard {one}"),
        _ => format!("shards {}", texts.join(" and ")),
    }
}

fn lost_range(from_seq: u64, end_seq: Option<u64>) -> String {
    match end_seq {
        Some(end_seq) => format!("from number {from_seq} to before {end_seq}"),
        None => format!("from number {from_seq} on"),
    }
}

#[cfg(feature = "kms-local")]
impl From<LocalKmsError> for Error {
    fn from(error: LocalKmsError) -> Self {
        Error::LocalKms(Arc::new(error))
    }
}

#[cfg(feature = "kms-local")]
fn kind_of_local_kms(error: &LocalKmsError) -> ErrorKind {
    match error {
        LocalKmsError::Missing { .. } | LocalKmsError::Busy { .. } => ErrorKind::KmsUnreachable,
        LocalKmsError::NotFound { .. } => ErrorKind::NotFound,
        LocalKmsError::WrongState { .. }
        | LocalKmsError::NotGranted { .. }
        | LocalKmsError::InvalidArgument { .. }
        | LocalKmsError::TooLarge { .. } => ErrorKind::Invalid,
        LocalKmsError::Damaged { .. } => ErrorKind::Integrity,
        LocalKmsError::Io { source, .. } => kind_of_io(source),
    }
}

fn kind_of_io(error: &io::Error) -> ErrorKind {
    match error.kind() {
        // A file has reached the limit of the process or of the file system (EFBIG). The disk is in
        // order, and an operator can raise the limit.
        io::ErrorKind::FileTooLarge => ErrorKind::NoRoom,
        _ if is_full(error) => ErrorKind::NoRoom,
        _ => ErrorKind::Io,
    }
}

fn code_of_io(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::FileTooLarge => "file_too_large",
        io::ErrorKind::PermissionDenied => "permission_denied",
        _ if is_full(error) => "disk_full",
        _ => "io",
    }
}

/// What lets a shard write again that has stopped after this failure.
fn after_latch(cause: &Error) -> &'static str {
    match cause.kind() {
        ErrorKind::NoRoom => "it can continue once there is room",
        _ => "reopen it to continue",
    }
}

impl From<std::convert::Infallible> for Error {
    fn from(never: std::convert::Infallible) -> Self {
        match never {}
    }
}

impl Error {
    /// The reaction to the error: the class of its variant. [`Error::code`] names the variant.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::Revoked { .. }
            | Error::ServiceKey { cause: KmsError::Revoked { .. }, .. }
            | Error::Config(ConfigError::CmkRefused { .. }) => ErrorKind::Revoked,
            Error::ServiceKey { .. } | Error::KmsUnreachable { .. } | Error::KmsInvalid { .. } => {
                ErrorKind::KmsUnreachable
            }
            Error::WrongKey { .. }
            | Error::Tampered { .. }
            | Error::Corrupt { .. }
            | Error::Truncated { .. }
            | Error::RolledBack { .. }
            | Error::RetiredKeyVersion { .. }
            | Error::WrongFileType { .. } => ErrorKind::Integrity,
            Error::Config(_)
            | Error::UnexpectedCmk { .. }
            | Error::InvalidGroup(_)
            | Error::TooLarge { .. }
            | Error::InvalidArgument(_)
            | Error::KmsUrl(_)
            | Error::InvalidId(_)
            | Error::ReadOnly
            | Error::ShardReadOnly { .. } => ErrorKind::Invalid,
            Error::StoreMissing { .. }
            | Error::NotAStore { .. }
            | Error::LogstoreMissing(_)
            | Error::ShardMissing { .. }
            | Error::AboveEnd { .. }
            | Error::Shredded { .. } => ErrorKind::NotFound,
            Error::StoreExists { .. }
            | Error::NotEmpty { .. }
            | Error::KeyringExists { .. }
            | Error::LogstoreExists(_) => ErrorKind::Exists,
            Error::Full { .. } | Error::TooManyReaders { .. } => ErrorKind::Busy,
            Error::TooMany { .. } => ErrorKind::NoRoom,
            Error::Locked { .. }
            | Error::Fenced { .. }
            | Error::Anchor { .. }
            | Error::AnchorBehind { .. }
            | Error::NewerFormat { .. }
            | Error::OlderFormat { .. }
            | Error::UnsupportedFeature { .. }
            | Error::KeyringMissing { .. }
            | Error::KeyringForeign { .. }
            | Error::KeyringUnsafe { .. }
            | Error::NetworkFileSystem { .. }
            | Error::BackupRefused { .. }
            | Error::KeyringTooOld { .. } => ErrorKind::Unavailable,
            Error::Latched { cause, .. }
            | Error::GroupsLost { cause, .. }
            | Error::Lost { cause, .. }
            | Error::KeyringNotRead { cause, .. } => cause.kind(),
            Error::Forked | Error::Closed(_) | Error::KeyringChanged { .. } => ErrorKind::Closed,
            Error::Crypto(_) => ErrorKind::Bug,
            #[cfg(feature = "kms-local")]
            Error::LocalKms(error) => kind_of_local_kms(error),
            Error::Io { source, .. } => kind_of_io(source),
        }
    }

    /// A short stable word for the variant, for programs: `revoked`, `kms_unreachable`, `tampered`,
    /// … [`Error::Lost`] has the word of its cause, and so has [`Error::Latched`] of the kind
    /// [`ErrorKind::NoRoom`]. It says what happened; [`Error::kind`] says what to do about it.
    pub fn code(&self) -> &'static str {
        match self {
            Error::Revoked { .. } => "revoked",
            Error::KmsUnreachable { .. } => "kms_unreachable",
            Error::KmsInvalid { .. } => "kms_invalid",
            Error::WrongKey { .. } => "wrong_key",
            Error::Tampered { .. } => "tampered",
            Error::Corrupt { .. } => "corrupt",
            Error::Truncated { .. } => "truncated",
            Error::RolledBack { .. } => "rolled_back",
            Error::RetiredKeyVersion { .. } => "retired_key_version",
            Error::WrongFileType { .. } => "wrong_file_type",
            Error::Config(config) => config.code(),
            Error::Locked { .. } => "locked",
            Error::Fenced { .. } => "fenced",
            Error::Anchor { .. } => "anchor",
            Error::AnchorBehind { .. } => "anchor_behind",
            Error::BackupRefused { .. } => "backup_refused",
            Error::NotEmpty { .. } => "not_empty",
            Error::AboveEnd { .. } => "above_end",
            Error::StoreMissing { .. } => "store_missing",
            Error::NotAStore { .. } => "not_a_store",
            Error::StoreExists { .. } => "store_exists",
            Error::NewerFormat { .. } => "newer_format",
            Error::OlderFormat { .. } => "older_format",
            Error::UnsupportedFeature { .. } => "unsupported_feature",
            Error::KeyringMissing { .. } => "keyring_missing",
            Error::KeyringExists { .. } => "keyring_exists",
            Error::KeyringForeign { .. } => "keyring_foreign",
            Error::UnexpectedCmk { .. } => "unexpected_cmk",
            Error::NetworkFileSystem { .. } => "network_file_system",
            Error::KeyringUnsafe { .. } => "keyring_unsafe",
            Error::KeyringTooOld { .. } => "keyring_too_old",
            Error::KeyringChanged { .. } => "keyring_changed",
            Error::ServiceKey { cause: KmsError::Revoked { .. }, .. } => "service_key_revoked",
            Error::ServiceKey { cause: KmsError::Invalid { .. }, .. } => "service_key_invalid",
            Error::ServiceKey { .. } => "service_key_unreachable",
            Error::KeyringNotRead { .. } => "keyring_not_read",
            Error::LogstoreMissing(_) => "logstore_missing",
            Error::LogstoreExists(_) => "logstore_exists",
            Error::ShardMissing { .. } => "shard_missing",
            Error::ShardReadOnly { .. } => "shard_read_only",
            Error::Shredded { .. } => "shredded",
            Error::InvalidGroup(_) => "invalid_group",
            Error::TooLarge { .. } => "too_large",
            Error::TooMany { .. } => "too_many",
            Error::TooManyReaders { .. } => "too_many_readers",
            Error::Full { .. } => "full",
            Error::InvalidArgument(_) => "invalid_argument",
            // The state of the disk says more than the state of the shard.
            Error::Latched { cause, .. } if cause.kind() == ErrorKind::NoRoom => cause.code(),
            Error::Latched { .. } => "latched",
            Error::GroupsLost { .. } => "groups_lost",
            Error::Lost { cause, .. } => cause.code(),
            Error::ReadOnly => "read_only",
            Error::Forked => "forked",
            Error::Closed(_) => "closed",
            Error::KmsUrl(_) => "kms_url",
            Error::InvalidId(_) => "invalid_id",
            #[cfg(feature = "kms-local")]
            Error::LocalKms(error) => error.code(),
            Error::Crypto(_) => "crypto",
            Error::Io { source, .. } => code_of_io(source),
        }
    }

    /// Whether the disk is full, or a quota is used up.
    pub(crate) fn is_disk_full(&self) -> bool {
        match self {
            Error::Io { source, .. } => is_full(source),
            Error::Latched { cause, .. } => cause.is_disk_full(),
            _ => false,
        }
    }

    /// Whether data is missing or damaged. A forged or an exchanged file is something else.
    pub(crate) fn is_loss(&self) -> bool {
        matches!(self, Error::Corrupt { .. } | Error::Truncated { .. })
    }

    pub(crate) fn io(
        op: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |source| match source.get_ref().and_then(|inner| inner.downcast_ref::<TakenOver>()) {
            Some(TakenOver { path, epoch }) => Error::Fenced { path: path.clone(), epoch: *epoch },
            None => Error::of_file(op, path, source),
        }
    }

    fn of_file(op: &'static str, path: PathBuf, source: io::Error) -> Error {
        match source.get_ref().and_then(|inner| inner.downcast_ref::<WrongFileType>()) {
            Some(WrongFileType { path, expected, found }) => {
                Error::WrongFileType { path: path.clone(), expected: *expected, found: *found }
            }
            // The limit is the engine's, not the system's.
            None if source.kind() == io::ErrorKind::FileTooLarge
                && source.raw_os_error().is_none() =>
            {
                Error::corrupt(
                    Location::new(path, 0),
                    "it is larger than any file that envelog writes there",
                )
            }
            None => Error::Io { op, path, source: Arc::new(source) },
        }
    }

    /// The same error, but if it is about a retired version of the service key, for `what` in
    /// `path`.
    pub(crate) fn retired_in(self, path: &Path, what: &'static str) -> Error {
        match self {
            Error::RetiredKeyVersion { version, accepts, .. } => {
                Error::RetiredKeyVersion { path: path.to_owned(), what, version, accepts }
            }
            other => other,
        }
    }

    /// Whether the error means that a file does not exist.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Error::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }

    pub(crate) fn corrupt(at: Location, what: impl Into<String>) -> Error {
        Error::Corrupt { at, what: what.into() }
    }

    pub(crate) fn truncated(at: Location, what: impl Into<String>) -> Error {
        Error::Truncated { at, what: what.into() }
    }
}

/// The error as `code`, its [code](Error::code), `kind`, the name of its [kind](Error::kind), and
/// `message`, its sentence.
impl Serialize for Error {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_struct("Error", 3)?;
        fields.serialize_field("code", self.code())?;
        fields.serialize_field("kind", &self.kind())?;
        fields.serialize_field("message", &format_args!("{self}"))?;
        fields.end()
    }
}

/// A path as text, for reports. A name that is not UTF-8 must not block a report.
struct PathText<'a>(&'a Path);

impl Serialize for PathText<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0.display())
    }
}

/// A duration in seconds, with a fraction.
pub(crate) fn seconds_if_any<S: Serializer>(
    time: &Option<Duration>,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    time.map(|time| time.as_secs_f64()).serialize(serializer)
}

pub(crate) fn path_as_text<S: Serializer>(
    path: &Path,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    PathText(path).serialize(serializer)
}

pub(crate) fn path_if_any_as_text<S: Serializer>(
    path: &Option<PathBuf>,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    path.as_deref().map(PathText).serialize(serializer)
}

pub(crate) fn paths_as_text<S: Serializer>(
    paths: &[PathBuf],
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_seq(paths.iter().map(|path| PathText(path)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::{ffi::OsStr, os::unix::ffi::OsStrExt};

    use super::*;

    #[test]
    fn a_full_disk_is_known_as_such_however_it_is_wrapped() {
        let of = |raw: rustix::io::Errno| Error::io("write", "f")(raw.into());
        let latched = |cause: Error| Error::Latched {
            logstore: "p/l".parse().unwrap(),
            shard: 0,
            cause: Arc::new(cause),
        };
        for (raw, code, is_full) in [
            (rustix::io::Errno::NOSPC, "disk_full", true),
            (rustix::io::Errno::DQUOT, "disk_full", true),
            (rustix::io::Errno::FBIG, "file_too_large", false),
        ] {
            for error in [of(raw), latched(of(raw))] {
                assert_eq!((error.kind(), error.code()), (ErrorKind::NoRoom, code), "{error}");
                assert_eq!(error.is_disk_full(), is_full, "{error}");
            }
        }
        let broken = latched(of(rustix::io::Errno::IO));
        assert_eq!((broken.kind(), broken.code()), (ErrorKind::Io, "latched"));
        assert!(!broken.is_disk_full());
        // The limit of the engine is no limit of the system.
        let damaged = Error::io("read", "f")(io::ErrorKind::FileTooLarge.into());
        assert_eq!(damaged.kind(), ErrorKind::Integrity);
    }

    #[test]
    fn an_error_serializes_to_its_code_its_kind_and_its_sentence() {
        let full = Error::Full { pending: 7 };
        let json =
            serde_json::json!({ "code": "full", "kind": "busy", "message": full.to_string() });
        assert_eq!(serde_json::to_value(&full).unwrap(), json);
        let kinds = [
            ErrorKind::Invalid,
            ErrorKind::NotFound,
            ErrorKind::Exists,
            ErrorKind::Busy,
            ErrorKind::NoRoom,
            ErrorKind::Revoked,
            ErrorKind::KmsUnreachable,
            ErrorKind::Integrity,
            ErrorKind::Unavailable,
            ErrorKind::Io,
            ErrorKind::Closed,
            ErrorKind::Bug,
        ];
        for kind in kinds {
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.name());
        }
    }

    #[test]
    fn a_refused_key_is_revoked_whichever_operation_meets_it() {
        let reasons = [
            (RevokedReason::Disabled, "enable the key"),
            (RevokedReason::PendingDeletion, "cancel the deletion"),
            (RevokedReason::Deleted, "restore the key"),
            (RevokedReason::NotPermitted, "grant"),
        ];
        for (reason, remedy) in reasons {
            let cmk = "key-1".to_owned();
            let used =
                Error::Revoked { logstore: "p/a".parse().unwrap(), cmk: cmk.clone(), reason };
            let created =
                Error::Config(ConfigError::CmkRefused { cmk, reason, detail: "no".to_owned() });
            for error in [used, created] {
                assert_eq!(error.kind(), ErrorKind::Revoked);
                let said = error.to_string();
                assert!(said.contains(remedy) && said.contains(&reason.to_string()), "{said}");
                assert!(said.contains("enable") == (reason == RevokedReason::Disabled), "{said}");
            }
        }
    }

    #[test]
    fn a_report_takes_any_path() {
        let path = PathBuf::from(OsStr::from_bytes(b"a\xffb"));
        let notice = crate::admin::RecoveryNotice {
            shard: 0,
            segment: path.clone(),
            groups_rewritten: 0,
            bytes_dropped: 0,
        };
        let repair = crate::admin::RepairReport {
            shard: 0,
            segment: Some(path.clone()),
            groups_salvaged: 0,
            bytes_lost: 0,
            losses: Vec::new(),
            metadata: None,
        };
        let none = crate::admin::RepairReport { segment: None, ..repair.clone() };
        let delete = crate::admin::DeleteReport { left: vec![path] };
        let shown = "a\u{fffd}b";
        assert_eq!(serde_json::to_value(notice).unwrap()["segment"], shown);
        assert_eq!(serde_json::to_value(repair).unwrap()["segment"], shown);
        assert_eq!(serde_json::to_value(none).unwrap()["segment"], serde_json::Value::Null);
        assert_eq!(serde_json::to_value(delete).unwrap()["left"][0], shown);
    }
}
