//! The time limit of one call of a backend.

use std::time::Duration;

use crate::io::{Clock, SystemClock};

/// The time by which a call must end, on the clock that continues during suspend.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadline(Duration);

impl Deadline {
    pub(super) fn after(timeout: Duration) -> Self {
        Self(SystemClock.uptime().saturating_add(timeout))
    }

    /// The middle of the time that is left.
    #[cfg(any(feature = "kms-aliyun", feature = "kms-aws", feature = "kms-vault"))]
    pub(super) fn halfway(self) -> Self {
        Self::after(self.left().unwrap_or_default() / 2)
    }

    /// The time left, if any.
    pub(super) fn left(self) -> Option<Duration> {
        self.0.checked_sub(SystemClock.uptime()).filter(|left| !left.is_zero())
    }
}
