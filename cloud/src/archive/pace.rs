//! What keeps a store's requests within bounds: a budget for second attempts, and a rate for bodies. Pure: time is passed in.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Successes that earn one more attempt.
const SUCCESSES_PER_RETRY: u64 = 10;

/// Second attempts that all requests of a store share. In an outage every caller still makes its first attempt; what
/// would multiply the load is bounded.
#[derive(Debug)]
pub(super) struct RetryBudget {
    /// In tenths of an attempt.
    left: AtomicU64,
    max: u64,
}

impl RetryBudget {
    pub fn new(retries: u32) -> Self {
        let max = u64::from(retries) * SUCCESSES_PER_RETRY;
        Self { left: AtomicU64::new(max), max }
    }

    /// Takes one attempt, if there is one.
    pub fn take(&self) -> bool {
        let spend = |left: u64| left.checked_sub(SUCCESSES_PER_RETRY);
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, spend).is_ok()
    }

    /// A request succeeded.
    pub fn succeeded(&self) {
        let earn = |left: u64| (left < self.max).then_some(left + 1);
        let _ = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, earn);
    }
}

/// How much of a second may go at once after a pause.
const BURST: Duration = Duration::from_millis(250);

/// A token bucket in bytes per second. Whoever takes is told how long to wait; takers wait in the order they came.
#[derive(Debug)]
pub(super) struct Pacer {
    bytes_per_sec: u64,
    /// When everything taken so far is paid for.
    paid: Mutex<Option<Instant>>,
}

impl Pacer {
    pub fn new(bytes_per_sec: u64) -> Self {
        Self { bytes_per_sec: bytes_per_sec.max(1), paid: Mutex::new(None) }
    }

    /// What one taker takes at a time at most, so that takers share the rate.
    pub fn slice(&self) -> u64 {
        (self.bytes_per_sec / 4).max(1)
    }

    /// Takes `bytes` and says how long to wait before they may go.
    pub fn take(&self, now: Instant, bytes: u64) -> Duration {
        let cost = Duration::from_secs_f64(bytes as f64 / self.bytes_per_sec as f64);
        let mut paid = self.paid.lock();
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        let at = paid.map_or(earliest, |paid| paid.max(earliest)) + cost;
        *paid = Some(at);
        at.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_uses_the_budget_up_and_successes_earn_it_back() {
        let budget = RetryBudget::new(3);
        assert_eq!((0..10).filter(|_| budget.take()).count(), 3);
        for _ in 0..9 {
            budget.succeeded();
        }
        assert!(!budget.take(), "nine successes are not enough");
        budget.succeeded();
        assert!(budget.take() && !budget.take());
        for _ in 0..1000 {
            budget.succeeded();
        }
        assert_eq!((0..10).filter(|_| budget.take()).count(), 3, "no more than there was at first");
    }

    #[test]
    fn what_goes_in_a_minute_is_the_rate_and_one_burst() {
        let (pacer, start) = (Pacer::new(1_000_000), Instant::now());
        let (mut now, mut sent) = (start, 0u64);
        while now < start + Duration::from_secs(60) {
            now += pacer.take(now, pacer.slice());
            sent += pacer.slice();
        }
        assert!((60_000_000..=60_500_000).contains(&sent), "{sent}");
        // Idle time is not saved up beyond the burst.
        now += Duration::from_secs(3600);
        assert_eq!(pacer.take(now, 250_000), Duration::ZERO);
        assert_eq!(pacer.take(now, 500_000), Duration::from_millis(500));
        assert_eq!(pacer.take(now, 500_000), Duration::from_secs(1), "the next one waits behind");
    }
}
