//! Checks of a store that change nothing: verification, checkpoints, and exports of the key audit
//! log.

mod audit_export;
mod checkpoint;
mod copy;
mod report;
mod segment;
mod verify;

pub use audit_export::{AuditExport, AuditMark, AuditVerification};
pub(super) use audit_export::{accepted_losses, audit_records, export_audit, verify_audit};
pub use checkpoint::Checkpoint;
pub(super) use checkpoint::{checkpoint, checkpoint_of};
pub(super) use copy::verify_copy;
pub use report::{VerifyFault, VerifyOptions, VerifyProgress, VerifyReport};
pub(super) use verify::verify;
