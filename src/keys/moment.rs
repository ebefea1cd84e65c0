//! A point in time by two clocks.

use std::time::Duration;

use crate::io::Clock;

/// A point in time, by the uptime and by the wall clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Moment {
    pub(super) uptime: Duration,
    pub(super) wall_us: u64,
}

impl Moment {
    pub(super) fn now(clock: &dyn Clock) -> Self {
        Self { uptime: clock.uptime(), wall_us: clock.wall_us() }
    }

    /// Whether at least `duration` has passed since then, by either clock.
    pub(super) fn is_past(self, duration: Duration, clock: &dyn Clock) -> bool {
        clock.uptime() >= self.uptime + duration
            || clock.wall_us() >= self.wall_us.saturating_add(micros(duration))
    }
}

/// A duration in microseconds.
pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
