//! A point in time by two clocks.

use std::time::Duration;

use crate::io::Clock;

/// A point in time, by the uptime and by the wall clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Moment {
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

    /// By how much the wall clock was ahead of the uptime, in microseconds, modulo 2^64.
    pub(super) fn apart(self) -> u64 {
        self.wall_us.wrapping_sub(micros(self.uptime))
    }

    /// Whether the two clocks have moved apart by more than `duration` since then. A paused machine
    /// may stop one of them, and a corrected wall clock moves that one.
    pub(super) fn clocks_have_parted(self, duration: Duration, clock: &dyn Clock) -> bool {
        let moved = Self::now(clock).apart().wrapping_sub(self.apart());
        moved.cast_signed().unsigned_abs() > micros(duration)
    }
}

/// A duration in microseconds.
pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
