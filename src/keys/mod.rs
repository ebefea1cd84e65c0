//! Keys and their life: the service keyring, envelopes, leases, the gate in front of every read and write, and the audit log.

pub(crate) mod audit;
pub(crate) mod circuit;
pub(crate) mod custody;
pub(crate) mod envelope;
pub(crate) mod gate;
pub(crate) mod keyring;
pub(crate) mod keyring_file;
pub(crate) mod lease;
pub(crate) mod pool;

pub use audit::{AuditEvent, AuditRecord};
pub use lease::{KeyState, KeyStatus};
