//! The key audit log: every transition of a key, chained and tagged.
//!
//! A record is a line: its JSON, a tab, its tag in hex, a tab, the CRC-32 in hex of the bytes in
//! front of that tab, a newline. The tag is HMAC-SHA-256, under a key from the service keyring,
//! over the tag of the record before it and the JSON. So an attacker without that key cannot alter
//! a record, drop one from the middle or move one. The catalogue remembers how far the log was when
//! it was last written.
//!
//! The version of the service key never decreases from one record to the next, and the keyring
//! accepts the version of the last record. A record under a retired version is valid only in front
//! of a record under an accepted one. So a holder of an old key cannot append to the log.
//!
//! [`files`] finds and reads the files, [`chain`] checks the tags and finds the end, [`tail`]
//! writes records, [`transitions`] limits how many transitions of one key are recorded, and
//! [`AuditLog`] puts them together.

mod chain;
mod files;
mod line;
mod log;
mod record;
mod tail;
#[cfg(test)]
mod tests;
mod transitions;

pub(crate) use files::{FILE_BYTES_LIMIT, is_audit_file};
pub(crate) use log::AuditLog;
pub(crate) use record::AuditHead;
pub use record::{AuditEvent, AuditRecord};
