//! A store: a directory of Logstores under one service keyring, opened by one writer and any number
//! of readers.
//!
//! The imports point downwards in this order:
//!
//! - `handles` and `builder`: the public handles, whose methods call the operations.
//! - `creation`, `opening`: create and open a store, with the parts that `assembly` wires together
//!   and the life that `open_store` gives them.
//! - The operations: functions over a `core::Core`, one subject in each file.
//! - `registry` owns the Logstores, the catalogue, and the right to change them.
//! - `keys` owns the keyring, the leases, the probes, the envelopes, and the audit log.
//! - `env` is the immutable context. `catalogue`, `anchor`, `identity`, `scheduler`, `lock`,
//!   `trusted_clock` and `removal` each have one mechanism.

mod adoption;
mod anchor;
mod anchoring;
mod assembly;
mod auto_rotation;
mod backup;
mod builder;
mod catalogue;
mod core;
mod creation;
mod env;
mod handles;
mod identity;
mod inspect;
mod jobs;
mod key_change;
mod key_usage;
mod keyring_loss;
mod keys;
mod lock;
mod logstores;
mod open_store;
mod opening;
mod options;
mod registry;
mod removal;
mod repair;
mod reserve;
mod resharding;
mod restore;
mod retention;
mod rewrap_all;
mod scheduler;
mod service_rotation;
mod trusted_clock;
mod unanswered;

pub use anchor::{Anchor, AnchorPlace, AnchorStatus, DirAnchor};
pub use backup::{BackupOptions, BackupRecord, BackupReport, CopyProgress};
pub use builder::StoreBuilder;
pub use catalogue::{LOGSTORES_MAX, STORE_SHARDS_MAX};
pub use handles::{Admin, Keys, Store};
pub use inspect::{
    AuditExport, AuditMark, AuditVerification, Checkpoint, VerifyFault, VerifyOptions,
    VerifyProgress, VerifyReport,
};
pub use key_change::ReplaceCmk;
pub use key_usage::{
    CmkVersionUsage, DataKeyUsage, KeyNeed, KeyUsage, MasterKeyUsage, ServiceKeyUsage,
};
pub use keyring_loss::{RecoverProgress, RecoverReport, Recoverable};
pub use options::{Background, StoreOptions};
pub use removal::DeleteReport;
pub use repair::{FailedRepair, MetadataRepair, ShardRepair, StoreRepairReport};
pub use reserve::ReserveStatus;
pub use resharding::{ShardMerge, ShardSplit};
pub use restore::{RestoreOptions, RestoreReport};
pub use retention::{RetainOptions, RetentionReport, RetentionStatus};
pub use rewrap_all::{RewrapOptions, RewrapProgress, RewrapReport};
pub use service_rotation::ServiceRotation;
