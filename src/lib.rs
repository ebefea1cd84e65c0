//! Embeddable, encrypted, append-only log storage, with keys that the customer controls.
//!
//! A [`Store`] holds [`Logstore`]s, and a Logstore holds log groups in shards. Each Logstore has
//! its own data key. The data key is stored only wrapped: under the engine's service key, or under
//! a customer master key in a [`kms::Kms`] (BYOK). If the customer's key is disabled, deleted or no
//! longer permitted, the engine refuses every read and write of that Logstore within a fixed bound
//! ([`StoreOptions::revalidate_every`] plus [`StoreOptions::kms_timeout`]). It wipes the data keys
//! as soon as the KMS refuses, and the keys of the segments that are being written within another
//! `kms_timeout`. Other Logstores are not affected. If the key returns, the Logstore does too, and
//! no group is missing that was acknowledged as [`Durability::Written`] or [`Durability::Synced`].
//!
//! Begin with [`Store::builder`]. `docs/format.md` specifies the bytes on disk, and
//! `docs/threat-model.md` the protection against each attacker.
//!
//! The engine runs in the threads of its callers and a few of its own. It needs no async runtime,
//! and any runtime can await a [`Ticket`] as a future. The caller passes in all external services:
//! files, time, randomness, cryptography, KMS.

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
mod schedule;
pub mod segment;
mod shard;
mod store;
mod sync;
mod wire;

pub use config::{
    CMK_FIELD_BYTES_MAX, ConfigError, EncryptConf, EncryptType, LogstoreConfig, LogstoreName,
    LogstoreSpec, NAME_BYTES_MAX, ProbeMode, ROTATE_BYTES_MIN, RotateDataKey, SHARDS_MAX,
    ShardInfo, ShardStatus, TTL_DAYS_MAX,
};
pub use error::{Error, ErrorKind, KeyringRisk, Location, Result};
pub use group::{GroupError, LogGroup};
pub use ids::{KeyringId, LogstoreId, ParseIdError, SegmentId, StoreId};
pub use key_status::{KeyState, KeyStatus};
pub use keys::{AuditEvent, AuditRecord};
pub use kms::Cmk;
pub use logstore::{AppendOptions, DataKeyStatus, Logstore, LogstoreStatus, ShardChoice};
pub use segment::Compression;
pub use shard::{
    Appended, Durability, Payload, Position, ReadMode, ReadOptions, Reader, Record, RecordBlock,
    RecoveryNotice, RepairReport, Ticket,
};
pub use store::{
    Admin, Anchor, AnchorPlace, AnchorStatus, AuditExport, AuditMark, AuditVerification,
    Background, Checkpoint, CmkVersionUsage, DataKeyUsage, DeleteReport, DirAnchor, KeyNeed,
    KeyUsage, Keys, LOGSTORES_MAX, MasterKeyUsage, RecoverReport, Recoverable, ReplaceCmk,
    RetentionReport, RewrapOptions, RewrapProgress, RewrapReport, STORE_SHARDS_MAX,
    ServiceKeyUsage, ServiceRotation, Store, StoreBuilder, StoreOptions, VerifyFault,
    VerifyOptions, VerifyProgress, VerifyReport,
};
pub use wire::FORMAT_VERSION;

#[cfg(all(doctest, feature = "aws-lc"))]
#[doc = include_str!("../README.md")]
struct Readme;
