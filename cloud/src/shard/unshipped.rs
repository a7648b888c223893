//! Durable blocks that are in no bucket yet: how many bytes, and for how long the oldest.
//!
//! Ages are measured by the monotonic clock, so that a wall clock that is set moves none. Only of blocks from before this
//! start nothing but the wall clock's word is known, and one that lies ahead of now counts as now.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use crate::archive::Backlog;

/// What waits to be shipped.
pub struct Unshipped {
    /// Times are milliseconds from here; what was appended before this start is below zero.
    base: Instant,
    /// Oldest first, without holes.
    blocks: VecDeque<UnshippedBlock>,
    /// The number after the newest one.
    next: u64,
    bytes: u64,
}

struct UnshippedBlock {
    at_ms: i64,
    bytes: u32,
}

impl Default for Unshipped {
    fn default() -> Self {
        Self { base: Instant::now(), blocks: VecDeque::new(), next: 0, bytes: 0 }
    }
}

impl Unshipped {
    /// Block `seq` is durable and was appended `age` ago.
    pub fn push(&mut self, seq: u64, bytes: usize, age: Duration) {
        let millis = |span: Duration| i64::try_from(span.as_millis()).unwrap_or(i64::MAX);
        let at_ms = millis(self.base.elapsed()).saturating_sub(millis(age));
        // A block is far below 4 GiB.
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        self.blocks.push_back(UnshippedBlock { at_ms, bytes });
        self.bytes += u64::from(bytes);
        self.next = seq + 1;
    }

    /// Every block below `next_seq` is in the bucket.
    pub fn shipped(&mut self, next_seq: u64) {
        let left = self.next.saturating_sub(next_seq);
        while self.blocks.len() as u64 > left {
            let Some(block) = self.blocks.pop_front() else { break };
            self.bytes = self.bytes.saturating_sub(u64::from(block.bytes));
        }
        if self.blocks.is_empty() {
            // Memory that an outage took is given back.
            self.blocks.shrink_to(1024);
        }
    }

    /// What waits now; `None` when nothing does.
    pub fn backlog(&self) -> Option<Backlog> {
        let oldest = self.blocks.front()?;
        let now_ms = i64::try_from(self.base.elapsed().as_millis()).unwrap_or(i64::MAX);
        let age = now_ms.saturating_sub(oldest.at_ms).max(0).unsigned_abs();
        Some(Backlog { bytes: self.bytes, age: Duration::from_millis(age) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backlog(unshipped: &Unshipped) -> Option<(u64, u64)> {
        unshipped.backlog().map(|backlog| (backlog.bytes, backlog.age.as_secs()))
    }

    #[tokio::test(start_paused = true)]
    async fn the_age_is_that_of_the_oldest_block_that_waits() {
        let pass = |secs| tokio::time::advance(Duration::from_secs(secs));
        let mut unshipped = Unshipped::default();
        assert_eq!(backlog(&unshipped), None);
        unshipped.push(7, 100, Duration::from_secs(50));
        unshipped.push(8, 10, Duration::ZERO);
        pass(5).await;
        unshipped.push(9, 1, Duration::ZERO);
        assert_eq!(backlog(&unshipped), Some((111, 55)));
        unshipped.shipped(7);
        assert_eq!(backlog(&unshipped), Some((111, 55)), "7 itself is not");
        unshipped.shipped(8);
        assert_eq!(backlog(&unshipped), Some((11, 5)));
        pass(3600).await;
        assert_eq!(backlog(&unshipped), Some((11, 3605)), "it rises while nothing is shipped");
        unshipped.shipped(10);
        assert_eq!(backlog(&unshipped), None);
        unshipped.push(10, 5, Duration::ZERO);
        assert_eq!(backlog(&unshipped), Some((5, 0)));
    }
}
