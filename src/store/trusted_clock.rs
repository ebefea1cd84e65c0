//! The wall clock as far as retention trusts it.
//!
//! Data that is destroyed by age is destroyed by the wall clock, which may be wrong. So the
//! catalogue remembers the newest time that was trusted. A clock that is more than a day away from
//! that time has *jumped*. It is trusted again once it has advanced by `clock_settle` since a
//! process has seen the jump. While it is ahead, nothing is destroyed by age. A clock that is
//! behind destroys less than it should, and needs no such wait.

use std::time::Duration;

use super::catalogue::RetentionState;
use crate::{
    io::{Clock, DAY_US},
    sync::{LockRank, Mutex, lock},
};

/// By how much the clock may differ from the newest trusted time, in microseconds.
const JUMP_US: u64 = DAY_US;
/// After how long the catalogue records a newer time, if no other change of the state is due.
const RECORD_EVERY_US: u64 = 3600 * 1_000_000;

/// The trust in the wall clock, and when retention was applied last.
pub(crate) struct TrustedClock(Mutex<State>);

struct State {
    trusted_us: u64,
    jump: Option<Jump>,
    /// The uptime of the last look at the clock.
    looked: Duration,
    retained_us: u64,
    /// Whether the last look has returned a suspension.
    reported: bool,
}

/// A jump of the wall clock that is not trusted yet.
#[derive(Clone, Copy)]
struct Jump {
    /// The wall clock when it was first seen.
    seen_us: u64,
    /// The uptime then; `None` if an earlier process has seen it.
    at: Option<Duration>,
}

/// The state of the wall clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Look {
    pub(crate) now_us: u64,
    /// Whether the clock is ahead and not trusted yet: nothing is destroyed by age.
    pub(crate) suspended: bool,
    /// The newest trusted time.
    pub(crate) trusted_us: u64,
    /// The wall clock when the jump was first seen, if there is one.
    pub(crate) jump_us: Option<u64>,
    /// Whether this process finds or ends a suspension with this look.
    pub(crate) has_changed: bool,
}

impl TrustedClock {
    /// With the state in the catalogue. Without one, the clock is trusted as it is now.
    pub(crate) fn new(clock: &dyn Clock, known: Option<&RetentionState>) -> Self {
        let (now_us, looked) = (clock.wall_us(), clock.uptime());
        let jump = known.and_then(|known| known.jump_us);
        let state = State {
            trusted_us: known.and_then(|known| known.trusted_us).unwrap_or(now_us),
            jump: jump.map(|seen_us| Jump { seen_us, at: None }),
            looked,
            retained_us: known.map_or(now_us, |known| known.retained_us),
            reported: false,
        };
        Self(Mutex::new(LockRank::TrustedClock, state))
    }

    /// Reads the clock, and decides whether it is trusted.
    pub(crate) fn look(&self, clock: &dyn Clock, settle: Duration) -> Look {
        let (now_us, uptime) = (clock.wall_us(), clock.uptime());
        let mut state = lock(&self.0);
        state.look(now_us, uptime, settle);
        let suspended = state.is_suspended();
        let before = std::mem::replace(&mut state.reported, suspended);
        Look {
            now_us,
            suspended,
            trusted_us: state.trusted_us,
            jump_us: state.jump.map(|jump| jump.seen_us),
            has_changed: suspended != before,
        }
    }

    /// Trusts the clock as it is now.
    pub(crate) fn trust(&self, clock: &dyn Clock) {
        let mut state = lock(&self.0);
        (state.trusted_us, state.jump, state.looked) = (clock.wall_us(), None, clock.uptime());
    }

    /// Retention was applied.
    pub(crate) fn note_run(&self, now_us: u64) {
        lock(&self.0).retained_us = now_us;
    }

    /// How long until retention is due by the wall clock. It is due if the clock was set back behind
    /// the last run.
    pub(crate) fn due_in(&self, clock: &dyn Clock, every: Duration) -> Duration {
        let passed_us = clock.wall_us().checked_sub(lock(&self.0).retained_us);
        passed_us.map_or(Duration::ZERO, |us| every.saturating_sub(Duration::from_micros(us)))
    }

    /// The state for the catalogue. `by_age`: whether there is retention by age, which needs the
    /// clock.
    pub(crate) fn state(&self, by_age: bool) -> RetentionState {
        let state = lock(&self.0);
        RetentionState {
            retained_us: state.retained_us,
            trusted_us: by_age.then_some(state.trusted_us),
            jump_us: state.jump.map(|jump| jump.seen_us).filter(|_| by_age),
        }
    }
}

impl State {
    fn is_suspended(&self) -> bool {
        self.jump.is_some_and(|jump| jump.seen_us > self.trusted_us)
    }

    fn look(&mut self, now_us: u64, uptime: Duration, settle: Duration) {
        // The time that this process has seen pass is trusted by the uptime.
        let expected_us = self.trusted_us.saturating_add(micros(uptime, self.looked));
        self.looked = uptime;
        let ahead = now_us > expected_us.saturating_add(JUMP_US);
        let behind = now_us < self.trusted_us.saturating_sub(JUMP_US);
        if !ahead && !behind {
            (self.trusted_us, self.jump) = (self.trusted_us.max(now_us), None);
            return;
        }
        if ahead {
            self.trusted_us = expected_us;
        }
        let trusted_us = self.trusted_us;
        let same = |jump: &Jump| {
            let is_ahead = jump.seen_us > trusted_us;
            // Another jump since then proves nothing of the clock.
            let expected_us = jump.at.map(|at| jump.seen_us.saturating_add(micros(uptime, at)));
            is_ahead == ahead
                && now_us >= jump.seen_us
                && expected_us.is_none_or(|expected| now_us <= expected.saturating_add(JUMP_US))
        };
        let jump = self.jump.filter(same);
        let jump = *self.jump.insert(jump.unwrap_or(Jump { seen_us: now_us, at: Some(uptime) }));
        let advanced_us = now_us.saturating_sub(jump.seen_us);
        let passed_us = jump.at.map_or(u64::MAX, |at| micros(uptime, at));
        if u128::from(advanced_us.min(passed_us)) >= settle.as_micros() {
            (self.trusted_us, self.jump) = (now_us, None);
        }
    }
}

/// Whether the catalogue must record `now` in place of `known`, although nothing else is recorded.
pub(crate) fn must_record(known: &RetentionState, now: &RetentionState) -> bool {
    let trusted = known.trusted_us.zip(now.trusted_us);
    known.jump_us != now.jump_us
        || known.trusted_us.is_some() != now.trusted_us.is_some()
        || trusted.is_some_and(|(known, now)| known.abs_diff(now) >= RECORD_EVERY_US)
        || known.retained_us.abs_diff(now.retained_us) >= RECORD_EVERY_US
}

/// The time from one uptime to another, in microseconds.
fn micros(to: Duration, from: Duration) -> u64 {
    u64::try_from(to.saturating_sub(from).as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);
    const HOUR_US: u64 = 3_600_000_000;
    /// A time that is not near zero.
    const T: u64 = 1000 * DAY_US;

    fn state(trusted_us: u64) -> State {
        State { trusted_us, jump: None, looked: Duration::ZERO, retained_us: 0, reported: false }
    }

    /// The state after a look at this wall clock and uptime, in hours.
    fn after(state: &mut State, wall_h: u64, uptime_h: u64) -> (u64, bool) {
        state.look(T + wall_h * HOUR_US, Duration::from_secs(uptime_h * 3600), HOUR);
        ((state.trusted_us.saturating_sub(T)) / HOUR_US, state.is_suspended())
    }

    #[test]
    fn a_day_ahead_is_no_jump_and_more_is_one() {
        assert_eq!(after(&mut state(T), 24, 0), (24, false));
        let mut far = state(T);
        assert_eq!(after(&mut far, 25, 0), (0, true));
        // Half an hour later it has not settled, by either clock.
        far.look(T + 25 * HOUR_US + HOUR_US / 2, HOUR / 2, HOUR);
        assert!(far.is_suspended());
        assert_eq!(after(&mut far, 26, 1), (26, false));
    }

    #[test]
    fn time_that_the_process_has_seen_pass_is_trusted() {
        assert_eq!(after(&mut state(T), 400, 380), (400, false));
        assert_eq!(after(&mut state(T), 400, 370), (370, true));
    }

    #[test]
    fn a_clock_that_returns_ends_the_jump() {
        let mut returned = state(T);
        assert_eq!(after(&mut returned, 1000, 0), (0, true));
        assert_eq!(after(&mut returned, 1, 1), (1, false));
        assert!(returned.jump.is_none());
    }

    #[test]
    fn a_second_jump_begins_the_wait_again() {
        let mut twice = state(T);
        assert_eq!(after(&mut twice, 1000, 0), (0, true));
        assert_eq!(after(&mut twice, 9000, 2), (2, true));
        assert_eq!(after(&mut twice, 9001, 3), (9001, false));
        let mut corrected = state(T);
        assert_eq!(after(&mut corrected, 9000, 0), (0, true));
        assert_eq!(after(&mut corrected, 1000, 1), (1, true), "seen now");
        assert_eq!(after(&mut corrected, 1001, 2), (1001, false));
    }

    #[test]
    fn a_jump_that_an_earlier_process_has_seen_needs_the_wall_clock_alone() {
        let mut weekly =
            State { jump: Some(Jump { seen_us: T + 168 * HOUR_US, at: None }), ..state(T) };
        assert_eq!(after(&mut weekly, 336, 0), (336, false));
    }

    #[test]
    fn a_clock_behind_suspends_nothing_and_is_followed_once_it_settles() {
        let mut behind = State { trusted_us: T + 9000 * HOUR_US, ..state(T) };
        assert_eq!(after(&mut behind, 10, 0), (9000, false));
        assert_eq!(after(&mut behind, 11, 1), (11, false));
        // So the same wrong time is a jump again.
        assert_eq!(after(&mut behind, 9000, 2), (12, true));
    }
}
