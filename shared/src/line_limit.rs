//! Log lines that a client can cause, bounded: the first few of a kind per interval, then how many were held back.
//!
//! A line per refused request lets whoever reaches a port fill a disk or wear out a gateway's card.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Lines of one kind that pass per interval.
pub const LINES_PER_INTERVAL: u32 = 5;
/// How long they count against each other.
pub const INTERVAL: Duration = Duration::from_secs(10);

/// One kind of log line.
#[derive(Debug, Default)]
pub struct LineLimit(Mutex<Lines>);

#[derive(Debug, Default)]
struct Lines {
    since: Option<Instant>,
    passed: u32,
    held_back: u64,
}

impl LineLimit {
    /// Nothing was logged yet.
    pub const fn new() -> Self {
        Self(Mutex::new(Lines { since: None, passed: 0, held_back: 0 }))
    }

    /// Whether a line may be logged now: `Some` of how many were held back since the last one that was.
    pub fn pass(&self, now: Instant) -> Option<u64> {
        let mut lines = self.0.lock();
        let over = lines.since.is_none_or(|since| now.saturating_duration_since(since) >= INTERVAL);
        if over {
            (lines.since, lines.passed) = (Some(now), 0);
        }
        if lines.passed == LINES_PER_INTERVAL {
            lines.held_back += 1;
            return None;
        }
        lines.passed += 1;
        Some(std::mem::take(&mut lines.held_back))
    }
}

/// Logs like `tracing::warn!` and its siblings, at most [`LINES_PER_INTERVAL`] lines per [`INTERVAL`] and place in the
/// source: `limited!(warn, %peer, "connection refused")`. A line after some that were held back says how many in the
/// field `more_like_it`.
#[macro_export]
macro_rules! limited {
    ($level:ident, $($line:tt)+) => {{
        static LIMIT: $crate::line_limit::LineLimit = $crate::line_limit::LineLimit::new();
        match LIMIT.pass(::std::time::Instant::now()) {
            Some(0) => ::tracing::$level!($($line)+),
            Some(more_like_it) => ::tracing::$level!(more_like_it, $($line)+),
            None => {}
        }
    }};
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_thousand_lines_are_a_few_and_a_count() {
        let (limit, start) = (LineLimit::new(), Instant::now());
        let passed: Vec<u64> = (0..10_000).filter_map(|_| limit.pass(start)).collect();
        assert_eq!(passed, [0; LINES_PER_INTERVAL as usize]);
        assert_eq!(limit.pass(start + INTERVAL - Duration::from_millis(1)), None);
        assert_eq!(limit.pass(start + INTERVAL), Some(10_001 - u64::from(LINES_PER_INTERVAL)));
        assert_eq!(limit.pass(start + INTERVAL), Some(0));
    }
}
