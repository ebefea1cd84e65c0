//! A key of the embedded KMS, without its material.

use std::fmt;

/// The largest key file, in bytes: some thousand key versions and grants.
pub(super) const KEY_FILE_BYTES_MAX: usize = 256 * 1024;

/// The properties of a key of a [`LocalKms`](super::LocalKms), but for its material.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LocalKeyInfo {
    /// Its identifier: `key-` and 16 hexadecimal digits.
    pub key_id: String,
    /// The region that it belongs to.
    pub region_id: String,
    /// Whether it can be used.
    pub state: LocalKeyState,
    /// How many versions there are: 1, and one more for each rotation. None once the material is
    /// destroyed.
    pub versions: u32,
    /// The roles that may use it, in order.
    pub grants: Vec<String>,
    /// When it was created, in microseconds since the Unix epoch.
    pub created_us: u64,
    /// The day on which it will be, or was, deleted: days since 1970-01-01, UTC.
    pub deletion_day: Option<u32>,
}

/// Whether a key of a [`LocalKms`](super::LocalKms) can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LocalKeyState {
    /// It can.
    Enabled,
    /// Not until it is enabled again.
    Disabled,
    /// Not unless its deletion is cancelled in time.
    PendingDeletion {
        /// The day on which it will be deleted: days since 1970-01-01, UTC.
        day: u32,
    },
    /// Never again.
    Deleted,
}

impl LocalKeyState {
    /// The state as a word for programs: `enabled`, `disabled`, `pending_deletion`, `deleted`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Enabled => "enabled",
            Self::Disabled => "disabled",
            Self::PendingDeletion { .. } => "pending_deletion",
            Self::Deleted => "deleted",
        }
    }
}

impl fmt::Display for LocalKeyState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Enabled => "enabled",
            Self::Disabled => "disabled",
            Self::PendingDeletion { .. } => "pending deletion",
            Self::Deleted => "deleted",
        })
    }
}
