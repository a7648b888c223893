//! When an owner last knew that it is the owner: a look at the bucket, or a conditional PUT that went through, counts from
//! the moment at which it was begun.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Time that has passed since some moment, while the machine was suspended too.
pub type Uptime = fn() -> Duration;

/// The clock of [`Uptime`] on a real machine.
pub fn uptime() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// When a claim was confirmed last.
#[derive(Debug)]
pub struct Confirmation {
    uptime: Uptime,
    /// Milliseconds of uptime, and one; 0 is never.
    at: AtomicU64,
}

impl Confirmation {
    /// Never yet.
    pub fn new(uptime: Uptime) -> Self {
        Self { uptime, at: AtomicU64::new(0) }
    }

    /// Now: to be asked for before the request that may confirm.
    pub fn now(&self) -> Duration {
        (self.uptime)()
    }

    /// A request that was begun at `begun` has shown that nobody else had claimed.
    pub fn confirm(&self, begun: Duration) {
        self.at.fetch_max(begun.as_millis() as u64 + 1, Ordering::Relaxed);
    }

    /// How long ago that was; `None` if it never was.
    pub fn age(&self) -> Option<Duration> {
        let at = self.at.load(Ordering::Relaxed).checked_sub(1)?;
        Some(self.now().saturating_sub(Duration::from_millis(at)))
    }
}
