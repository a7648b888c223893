//! One clock for everything that expires: time that was counted while the process ran.
//!
//! A wall clock that is wrong for a second must delete nothing, and must leave nothing behind that is kept for ever. So the age
//! of a thing is never asked of the wall clock. The wall clock is read once, where the count begins for the first time; from
//! then on a monotonic clock adds what passed, and the sum is stored and goes on from there after a restart.
//!
//! - The count never runs faster than time passed. A jump forward of `d` deletes what it would have deleted only when it
//!   lasted as long as that was to be kept: by then the count has got there by itself, so that the jump need not be believed.
//! - A jump back changes nothing either, and when the clock is right again there is nothing to mend: no stamp is of a
//!   time that the count has not reached.
//! - Time during which the process did not run is not counted, for the wall clock is no proof of it: what expires may live
//!   longer by that, never shorter. A process that ends without storing its count loses what it counted since.
//!
//! A stamp is therefore good for ages alone. What people see (a record's timestamp) is the wall clock's.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::name::TimestampMs;

/// A difference below this is a clock being set right, a suspended host or a short stop.
pub const JUMP_MS: i64 = 15 * 60 * 1000;

/// Both clocks of a machine, read at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClockReading {
    /// Milliseconds since 1970, as far as the machine knows.
    pub wall_ms: TimestampMs,
    /// Monotonic.
    pub at: Instant,
}

/// What must be stored of a clock. A store that has nothing begins with `None`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ClockState {
    /// The count, milliseconds: the wall clock when it began, and the running time since.
    pub counted_ms: TimestampMs,
    /// How far the wall clock was ahead of the count when it was last looked at: what was not counted, and its errors.
    pub ahead_ms: i64,
}

/// The wall clock moved against the count by more than [`JUMP_MS`], or the process was off for so long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClockJump {
    /// Where the clock stands.
    pub clock_ms: TimestampMs,
    /// Where it should have stood.
    pub expected_ms: TimestampMs,
}

/// Counts. `at` and the readings are of one process.
#[derive(Debug, Clone)]
pub struct ExpiryClock {
    state: ClockState,
    at: Instant,
}

impl ExpiryClock {
    /// Goes on from what was stored; begins at the wall clock where nothing was. Call [`ExpiryClock::look`] afterwards to
    /// learn whether the wall clock is where it should be.
    pub fn new(stored: Option<ClockState>, reading: ClockReading) -> Self {
        // A clock at the end of time leaves nothing to count.
        let counted_ms = reading.wall_ms.clamp(0, i64::MAX / 2);
        let first = ClockState { counted_ms, ahead_ms: reading.wall_ms.saturating_sub(counted_ms) };
        Self { state: stored.unwrap_or(first), at: reading.at }
    }

    /// What time it is for what expires, and what to stamp things with that expire. Never goes back.
    pub fn now(&self, at: Instant) -> TimestampMs {
        let passed = at.saturating_duration_since(self.at).as_millis();
        self.state.counted_ms.saturating_add(i64::try_from(passed).unwrap_or(i64::MAX))
    }

    /// What to store.
    pub fn state(&self, at: Instant) -> ClockState {
        ClockState { counted_ms: self.now(at), ..self.state }
    }

    /// Looks at the wall clock: a jump is told once, and once more when the clock comes back.
    pub fn look(&mut self, reading: ClockReading) -> Option<ClockJump> {
        let (clock_ms, now) = (reading.wall_ms, self.now(reading.at));
        let expected_ms = now.saturating_add(self.state.ahead_ms);
        self.state.ahead_ms = clock_ms.saturating_sub(now);
        (clock_ms.abs_diff(expected_ms) > JUMP_MS.unsigned_abs()).then_some(ClockJump { clock_ms, expected_ms })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const HOUR: i64 = 3_600_000;
    const DAY: i64 = 24 * HOUR;
    const TODAY: i64 = 20_000 * DAY;
    const YEAR_2099: i64 = 47_116 * DAY;

    fn reading(wall_ms: i64, at: Instant) -> ClockReading {
        ClockReading { wall_ms, at }
    }

    fn ms(ms: i64) -> Duration {
        Duration::from_millis(ms.unsigned_abs())
    }

    /// What a clock shows instead of what is right.
    type Wrong = fn(i64) -> i64;

    const JUMPS: [(&str, Wrong); 7] = [
        ("-400 d", |right| right - 400 * DAY),
        ("-1 d", |right| right - DAY),
        ("+20 h", |right| right + 20 * HOUR),
        ("+8 d", |right| right + 8 * DAY),
        ("+1 y", |right| right + 365 * DAY),
        ("2099", |_| YEAR_2099),
        ("1970", |_| 0),
    ];

    #[test]
    fn whatever_the_clock_shows_the_count_is_what_passed() {
        for (name, wrong) in JUMPS {
            for at_a_start in [false, true] {
                for comes_back in [false, true] {
                    let begin = Instant::now();
                    let mut clock = ExpiryClock::new(None, reading(TODAY, begin));
                    assert_eq!(clock.look(reading(TODAY, begin)), None);
                    let mut at = begin + ms(HOUR);
                    if at_a_start {
                        let stored = clock.state(at);
                        clock = ExpiryClock::new(Some(stored), reading(wrong(TODAY + HOUR), at));
                    }
                    let jump = clock.look(reading(wrong(TODAY + HOUR), at));
                    let expected = ClockJump { clock_ms: wrong(TODAY + HOUR), expected_ms: TODAY + HOUR };
                    assert_eq!(jump, Some(expected), "{name}");
                    assert_eq!(clock.now(at), TODAY + HOUR, "{name}");
                    at += ms(1000);
                    let wall = if comes_back { TODAY + HOUR + 1000 } else { wrong(TODAY + HOUR) + 1000 };
                    assert_eq!(
                        clock.look(reading(wall, at)).is_some(),
                        comes_back,
                        "{name}: told once, and once more when it is back"
                    );
                    assert_eq!(clock.now(at + ms(8 * DAY)), TODAY + HOUR + 1000 + 8 * DAY, "{name}");
                }
            }
        }
    }

    #[test]
    fn a_count_that_begins_under_a_wrong_clock_still_counts() {
        for wall in [0, YEAR_2099, i64::MAX, i64::MIN] {
            let begin = Instant::now();
            let mut clock = ExpiryClock::new(None, reading(wall, begin));
            assert!(clock.look(reading(TODAY, begin + ms(1000))).is_some());
            assert_eq!(clock.now(begin + ms(DAY)) - clock.now(begin), DAY);
        }
    }

    #[test]
    fn time_off_is_told_and_not_counted() {
        let begin = Instant::now();
        let clock = ExpiryClock::new(None, reading(TODAY, begin));
        let stored = clock.state(begin + ms(DAY));
        let mut clock = ExpiryClock::new(Some(stored), reading(TODAY + 22 * DAY, begin));
        let jump = ClockJump { clock_ms: TODAY + 22 * DAY, expected_ms: TODAY + DAY };
        assert_eq!(clock.look(reading(TODAY + 22 * DAY, begin)), Some(jump));
        assert_eq!(clock.now(begin), TODAY + DAY);
        // The next start knows where the clock is.
        let stored = clock.state(begin + ms(HOUR));
        let mut clock = ExpiryClock::new(Some(stored), reading(TODAY + 22 * DAY + HOUR + 5000, begin));
        assert_eq!(clock.look(reading(TODAY + 22 * DAY + HOUR + 5000, begin)), None);
    }
}
