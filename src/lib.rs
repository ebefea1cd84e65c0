//! Embeddable, encrypted, append-only log storage, with keys that the customer controls.
//!
//! A [`Store`] holds [`Logstore`]s; a Logstore holds log groups in shards. Each Logstore has its own data key, which is kept only
//! wrapped: under the engine's service key, or under a customer master key in a [`kms::Kms`] (BYOK). When the customer's key is
//! disabled, deleted or no longer permitted, every read and write of that Logstore is refused, within a bound that is a number
//! ([`StoreOptions::revalidate_every`] plus [`StoreOptions::kms_timeout`]), and nothing else is disturbed; when it comes back, so
//! does the Logstore, with nothing lost.
//!
//! Begin with [`Store::builder`]. The bytes on disk are specified in `docs/format.md`, what is protected against whom in
//! `docs/threat-model.md`.
//!
//! The engine runs in the threads of its callers and a few of its own; it needs no async runtime, and a [`Ticket`] is a future that
//! any runtime can await. Everything it needs of the world (files, time, randomness, cryptography, KMS) is passed to it.

#![deny(missing_docs, unsafe_op_in_unsafe_fn)]
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

mod config;
pub mod crypto;
mod document;
mod epoch;
pub mod error;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
pub mod group;
mod ids;
pub mod io;
mod key_status;
mod keys;
pub mod kms;
mod logstore;
pub mod metrics;
pub mod segment;
mod shard;
mod store;
mod sync;
mod wire;

pub use config::{
    CMK_FIELD_BYTES_MAX, ConfigError, EncryptConf, EncryptType, LogstoreConfig, LogstoreName, LogstoreSpec,
    NAME_BYTES_MAX, ROTATE_BYTES_MIN, RotateDataKey, SHARDS_MAX, ShardInfo, ShardStatus, TTL_DAYS_MAX,
};
pub use error::{Error, ErrorKind, KeyringRisk, Location, Result};
pub use group::{GroupError, LogGroup};
pub use ids::{KeyringId, LogstoreId, ParseIdError, SegmentId, StoreId};
pub use key_status::{KeyState, KeyStatus};
pub use keys::{AuditEvent, AuditRecord};
pub use kms::Cmk as UserCmkInfo;
pub use logstore::{AppendOptions, DataKeyStatus, Logstore, LogstoreStatus, ShardChoice};
pub use segment::Compression;
pub use shard::{
    Appended, Durability, Payload, Position, ReadMode, ReadOptions, Reader, Record, RecordBlock, RecoveryNotice,
    RepairReport, Ticket,
};
pub use store::{
    Anchor, AnchorPlace, AnchorStatus, AuditExport, AuditMark, AuditVerification, Background, Checkpoint,
    CmkVersionUsage, DataKeyUsage, DeleteReport, DirAnchor, Fault, KeyNeed, KeyUsage, LOGSTORES_MAX, MasterKeyUsage,
    RecoverReport, Recoverable, ReplaceCmk, RetentionReport, RewrapOptions, RewrapProgress, RewrapReport,
    STORE_SHARDS_MAX, ServiceKeyUsage, ServiceRotation, Store, StoreBuilder, StoreOptions, VerifyOptions,
    VerifyProgress, VerifyReport,
};
pub use wire::FORMAT_VERSION;

#[cfg(all(doctest, feature = "aws-lc"))]
#[doc = include_str!("../README.md")]
struct Readme;
