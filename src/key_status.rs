//! Whether a key can be used now, and why it cannot.

use std::time::Duration;

use serde::Serialize;

use crate::kms::{KmsError, RevokedReason};

/// Whether the key of a Logstore can be used now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum KeyState {
    /// The Logstore has no envelope.
    None,
    /// Usable.
    Active,
    /// The KMS has not been asked yet. The first use of the key asks it.
    Idle,
    /// The KMS does not answer. The key is usable for as long as the lease lasts.
    Outage {
        /// The last error of the backend.
        detail: String,
    },
    /// The KMS refuses.
    Revoked {
        /// Why.
        reason: RevokedReason,
    },
}

/// The state of a Logstore's key and its lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct KeyStatus {
    /// The state.
    pub state: KeyState,
    /// How long the key may still be used should the KMS stop answering now; `None` where no KMS is
    /// involved, or where an outage never ends the use.
    pub lease_left: Option<Duration>,
}

/// Why a lease does not admit an operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The KMS refuses the use of the master key.
    Revoked(RevokedReason),
    /// The lease has ended and the KMS cannot be reached: the last error.
    Unreachable(String),
    /// The lease has ended and the KMS gives no valid answer: the last error.
    Invalid(String),
}

impl From<&KmsError> for Refusal {
    fn from(error: &KmsError) -> Self {
        match error {
            KmsError::Revoked { reason, .. } => Refusal::Revoked(*reason),
            KmsError::Invalid { detail } => Refusal::Invalid(detail.clone()),
            KmsError::Unreachable { detail } => Refusal::Unreachable(detail.clone()),
        }
    }
}
