//! The broker's clock, not believed at once when it jumps.
//!
//! A clock that stands at 2099 for a minute must not delete every record by age, and one that begins at 1970 must not make
//! fresh records look fifty years old. So beside the clock runs an expectation: the last believed time and what a monotonic
//! clock has counted since. While the two differ by more than [`JUMP_MS`], blocks are stamped with the later and retention
//! uses the earlier - records may live longer, never shorter -, and after [`HOLD`] the clock is believed. At the start the
//! expectation is when the newest block was appended; a node that was off for long applies retention a day later.

use std::time::{Duration, Instant};

use shared::name::TimestampMs;
use tracing::warn;

/// A difference below this is a clock being set, a suspended host or a short stop.
const JUMP_MS: i64 = 24 * 3600 * 1000;
/// How long a clock must go on differing before it is believed.
const HOLD: Duration = Duration::from_secs(24 * 3600);

/// What a clock's word is taken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// For the header of a block.
    pub stamp: TimestampMs,
    /// For retention.
    pub retention: TimestampMs,
}

/// A clock with its expectation.
#[derive(Debug)]
pub struct CautiousClock {
    believed: TimestampMs,
    at: Instant,
    /// Since when the clock differs.
    jumped: Option<Instant>,
}

impl CautiousClock {
    /// Expects the clock to stand at `believed` now.
    pub fn new(believed: TimestampMs, at: Instant) -> Self {
        Self { believed, at, jumped: None }
    }

    /// What to make of the clock's `wall` at the monotonic time `at`.
    pub fn judge(&mut self, wall: TimestampMs, at: Instant) -> Now {
        let elapsed = at.saturating_duration_since(self.at).as_millis();
        let expected = self.believed.saturating_add(i64::try_from(elapsed).unwrap_or(i64::MAX));
        let held = self.jumped.is_some_and(|since| at.saturating_duration_since(since) >= HOLD);
        if wall.abs_diff(expected) <= JUMP_MS.unsigned_abs() || held {
            *self = Self::new(wall, at);
            return Now { stamp: wall, retention: wall };
        }
        if self.jumped.is_none() {
            warn!(
                clock_ms = wall,
                expected_ms = expected,
                "the clock is not where it should be (or the node was off for more than a day): retention by age goes by \
                 the earlier time for a day; set the clock if it is wrong"
            );
            self.jumped = Some(at);
        }
        Now { stamp: wall.max(expected), retention: wall.min(expected) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: i64 = 24 * 3600 * 1000;
    const TODAY: i64 = 20_000 * DAY;

    fn days(count: u64) -> Duration {
        Duration::from_secs(count * 24 * 3600)
    }

    #[test]
    fn a_clock_that_runs_is_believed() {
        let begin = Instant::now();
        let mut clock = CautiousClock::new(TODAY, begin);
        for (wall, after) in [(TODAY, 0), (TODAY + 5 * DAY, 5), (TODAY + 5 * DAY + DAY / 2, 5), (TODAY + 6 * DAY, 6)] {
            assert_eq!(clock.judge(wall, begin + days(after)), Now { stamp: wall, retention: wall });
        }
    }

    #[test]
    fn a_clock_at_2099_deletes_nothing() {
        let begin = Instant::now();
        let mut clock = CautiousClock::new(TODAY, begin);
        let year_2099 = 47_116 * DAY;
        let hour = Duration::from_secs(3600);
        let now = clock.judge(year_2099, begin + hour);
        assert_eq!(now, Now { stamp: year_2099, retention: TODAY + DAY / 24 });
        let wall = TODAY + DAY / 12;
        assert_eq!(clock.judge(wall, begin + 2 * hour), Now { stamp: wall, retention: wall }, "set right again");
    }

    #[test]
    fn a_clock_at_1970_makes_nothing_old() {
        let begin = Instant::now();
        let mut clock = CautiousClock::new(TODAY, begin);
        assert_eq!(clock.judge(5, begin), Now { stamp: TODAY, retention: 5 });
    }

    #[test]
    fn a_clock_that_stays_is_believed_after_a_day() {
        let begin = Instant::now();
        let mut clock = CautiousClock::new(TODAY, begin);
        let wall = TODAY + 60 * DAY;
        assert_eq!(clock.judge(wall, begin), Now { stamp: wall, retention: TODAY });
        let wall = wall + DAY;
        assert_eq!(clock.judge(wall, begin + days(1)), Now { stamp: wall, retention: wall });
    }
}
