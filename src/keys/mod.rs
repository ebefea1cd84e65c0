//! Keys and their life: the service keyring, envelopes, leases, the gate in front of every read and
//! write, and the key audit log.

pub(crate) mod audit;
pub(crate) mod circuit_breaker;
pub(crate) mod envelope;
pub(crate) mod gate;
pub(crate) mod keyring;
pub(crate) mod keyring_file;
pub(crate) mod keyring_seal;
pub(crate) mod lease;
mod moment;
pub(crate) mod renewal_pool;
mod roots;
pub(crate) mod sealing;
pub(crate) mod service_key;

pub use audit::{AuditEvent, AuditRecord};
