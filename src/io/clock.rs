//! Time.

use std::{
    fmt,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustix::time::{ClockId, clock_gettime};

/// A day in microseconds.
pub(crate) const DAY_US: u64 = 24 * 60 * 60 * 1_000_000;

/// The two clocks that the engine reads.
pub trait Clock: Send + Sync + fmt::Debug {
    /// The wall-clock time in microseconds since the Unix epoch. It may jump in either direction.
    fn wall_us(&self) -> u64;

    /// The time since some fixed moment. It never runs backwards, and it continues while the
    /// machine is suspended.
    fn uptime(&self) -> Duration;
}

/// The clocks of the operating system: `CLOCK_REALTIME` and `CLOCK_BOOTTIME`.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn wall_us(&self) -> u64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
    }

    fn uptime(&self) -> Duration {
        let time = clock_gettime(ClockId::Boottime);
        Duration::new(
            u64::try_from(time.tv_sec).unwrap_or(0),
            u32::try_from(time.tv_nsec).unwrap_or(0),
        )
    }
}
