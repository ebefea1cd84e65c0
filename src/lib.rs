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
//!
//! # Features
//!
//! | feature | default | adds |
//! |---|---|---|
//! | `aws-lc` | yes | `crypto::AwsLc`: AES-256-GCM by AWS-LC, the fast provider; needs a C compiler |
//! | `kms-local` | yes | `kms::LocalKms`: a directory that acts as the customer's KMS, for tests, trials and single machines |
//! | `kms-aliyun` | no | `kms::AliyunKms`: Alibaba Cloud KMS, with an HTTPS client (TLS by rustls on AWS-LC) |
//! | `kms-aws` | no | `kms::AwsKms`: AWS KMS, in a role of the customer's account, with the same client |
//! | `kms-vault` | no | `kms::VaultKms`: the Transit engine of HashiCorp Vault and OpenBao, with the same client |
//! | `kms-pkcs11` | no | `kms::pkcs11`: keys in a hardware security module, through PKCS#11 |
//! | `kms-conformance` | no | `testing::conformance`: a test suite for KMS backends, for the tests of your own |
//! | `prometheus` | no | `StoreMetrics::to_prometheus`: the metrics as text that Prometheus scrapes |
//! | `stream` | no | `Follow::into_stream`: a `futures_core::Stream` |
//! | `testing` | no | `testing::FaultyKms`: a KMS that injects faults, for your tests |
//!
//! Features only add: no feature changes the behaviour of another part. Without any feature the engine
//! builds with a Rust toolchain and a C compiler for zstd. `crypto::Sm4Simd` is always available. It
//! has the same SM4 as `crypto::AwsLc`, and a slower AES. The engine needs Rust 1.89 or newer, and runs
//! on Linux and other Unix systems.

#![cfg_attr(docsrs, feature(doc_cfg))]
#![deny(missing_docs, unsafe_op_in_unsafe_fn)]
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

#[cfg(not(unix))]
compile_error!("envelog needs a Unix system: it relies on flock, fsync of directories and openat");
#[cfg(not(target_pointer_width = "64"))]
compile_error!("envelog needs a 64-bit system: a segment may have 4 GiB");

#[macro_use]
mod setters;

mod config;
pub mod crypto;
mod document;
mod epoch;
pub mod error;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
pub mod group;
pub mod ids;
pub mod io;
mod key_status;
mod keys;
pub mod kms;
mod logstore;
pub mod metrics;
mod schedule;
mod segment;
mod shard;
mod store;
mod sync;
#[cfg(any(feature = "testing", feature = "kms-conformance"))]
pub mod testing;
mod wire;

pub use config::{
    EncryptConf, EncryptType, LogstoreConfig, LogstoreName, LogstoreSpec, ProbeMode, RotateDataKey,
};
pub use error::{Error, ErrorKind, Result};
pub use group::LogGroup;
pub use key_status::{KeyState, KeyStatus};
pub use kms::Cmk;
pub use logstore::{AppendOptions, Logstore, LogstoreStatus};
pub use segment::{BlockKind, Compression};
#[cfg(feature = "stream")]
pub use shard::FollowStream;
pub use shard::{
    AppendFuture, Appended, Durability, Follow, LostRange, MergedPosition, MergedReader, Payload,
    Position, ReadMode, ReadOptions, Reader, Record, RecordBlock, ShardChoice, Ticket, WaitFor,
};
/// The crates whose types are in the signatures of this one: [`bytes::Bytes`] in [`Record`], and
/// [`prost::Message`], which [`LogGroup`] implements.
pub use {bytes, prost};

pub use store::{Admin, Background, Keys, Store, StoreBuilder, StoreOptions};

/// What the operations of [`Admin`] and [`Keys`] take and return: verification, retention, repair,
/// anchors, the use of keys, and their rotation.
pub mod admin {
    pub use crate::{
        config::{ShardInfo, ShardStatus},
        logstore::DataKeyStatus,
        shard::{AcceptedLoss, AdoptedMetadata, RecoveryNotice, RepairOptions, RepairReport},
        store::{
            Anchor, AnchorPlace, AnchorStatus, BackupOptions, BackupRecord, BackupReport,
            Checkpoint, CmkVersionUsage, CopyProgress, DataKeyUsage, DeleteReport, DirAnchor,
            FailedRepair, KeyNeed, KeyUsage, MasterKeyUsage, MetadataRepair, RecoverProgress,
            RecoverReport, Recoverable, ReplaceCmk, ReserveStatus, RestoreOptions, RestoreReport,
            RetainOptions, RetentionReport, RetentionStatus, RewrapOptions, RewrapProgress,
            RewrapReport, ServiceKeyUsage, ServiceRotation, ShardMerge, ShardRepair, ShardSplit,
            StoreRepairReport, VerifyFault, VerifyOptions, VerifyProgress, VerifyReport,
        },
    };
}

/// The key audit log.
pub mod audit {
    pub use crate::{
        keys::{AuditEvent, AuditRecord},
        store::{AuditExport, AuditMark, AuditVerification},
    };
}

/// Fixed limits. Those that an operator can set are in [`StoreOptions`].
pub mod limits {
    pub use crate::{
        config::{CMK_FIELD_BYTES_MAX, NAME_BYTES_MAX, ROTATE_BYTES_MIN, SHARDS_MAX, TTL_DAYS_MAX},
        group::{
            CONTENTS_PER_LOG_MAX, GROUP_BYTES_MAX, KEY_BYTES_MAX, LOGS_PER_GROUP_MAX,
            TAGS_PER_GROUP_MAX, VALUE_BYTES_MAX,
        },
        store::{LOGSTORES_MAX, STORE_SHARDS_MAX},
    };
}

/// The parts of a segment file, for tools that look at the bytes on disk and for fuzzing. No
/// promise of compatibility holds for this module.
#[doc(hidden)]
pub mod inspect {
    pub use crate::{segment::*, wire::FORMAT_VERSION};
}

#[cfg(all(doctest, feature = "aws-lc"))]
#[doc = include_str!("../README.md")]
struct Readme;
