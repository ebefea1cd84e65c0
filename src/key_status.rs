//! Whether a key can be used now, and why it cannot.

use std::time::Duration;

use serde::{Serialize, Serializer, ser::SerializeStruct};

use crate::kms::{KmsError, RevokedReason};

/// Whether the key of a Logstore can be used now.
///
/// As JSON it has the two fields `state` ([`name`](Self::name)) and `reason`
/// ([`reason`](Self::reason)).
#[derive(Clone, Debug, PartialEq, Eq)]
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

impl KeyState {
    /// The state as one word: `none`, `active`, `idle`, `outage` or `revoked`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Active => "active",
            Self::Idle => "idle",
            Self::Outage { .. } => "outage",
            Self::Revoked { .. } => "revoked",
        }
    }

    /// The cause of an outage or of a revocation, in words.
    pub fn reason(&self) -> Option<String> {
        match self {
            Self::Outage { detail } => Some(detail.clone()),
            Self::Revoked { reason } => Some(reason.to_string()),
            Self::None | Self::Active | Self::Idle => None,
        }
    }
}

impl Serialize for KeyState {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_struct("KeyState", 2)?;
        fields.serialize_field("state", self.name())?;
        fields.serialize_field("reason", &self.reason())?;
        fields.end()
    }
}

/// The state of a Logstore's key and its lease. As JSON it has the fields of [`KeyState`], and
/// `lease_left_s` in seconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct KeyStatus {
    /// The state.
    #[serde(flatten)]
    pub state: KeyState,
    /// How long the key may still be used should the KMS stop answering now; `None` where no KMS is
    /// involved, or where an outage never ends the use.
    #[serde(rename = "lease_left_s", serialize_with = "crate::error::seconds_if_any")]
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
