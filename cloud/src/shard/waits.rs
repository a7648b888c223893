//! Whether the disk waits for the shard, rather than the shard for the disk.
//!
//! Producers with a bounded window that are all answered at once send all they may at once: everything in flight is one block,
//! and while they send and it is put together the disk has nothing to do. Two blocks that take turns keep it busy. That
//! pays where the disk waits at least as long as it writes: then two appends, each at most as long as the one of all
//! together, take no longer than one and the wait. On a disk that takes its time all stays one block.

use std::time::Duration;

use tokio::time::Instant;

/// What the newest append says about that.
#[derive(Debug, Default)]
pub struct DiskWaits {
    ended: Option<Instant>,
    /// Bytes of batches of the newest block, if the disk waited for it longer than it took.
    long_for: Option<usize>,
}

impl DiskWaits {
    /// A block with so many bytes of batches was appended.
    pub fn appended(&mut self, begun: Instant, took: Duration, batch_bytes: usize) {
        let waited = self.ended.map(|ended| begun.saturating_duration_since(ended));
        self.long_for = waited.is_some_and(|waited| waited >= took).then_some(batch_bytes);
        self.ended = Some(begun + took);
    }

    /// Where the next block is closed if nothing is being written when it is begun.
    pub fn cut(&self) -> Option<usize> {
        self.long_for.map(|bytes| bytes / 2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_halved_where_the_disk_waits_longer_than_it_writes() {
        let start = Instant::now();
        let millis = Duration::from_millis;
        let check = |wait: u64, took: u64, expected: Option<usize>| {
            let mut waits = DiskWaits::default();
            waits.appended(start, millis(10), 500);
            assert_eq!(waits.cut(), None, "nothing to compare the first one with");
            waits.appended(start + millis(10 + wait), millis(took), 800);
            assert_eq!(waits.cut(), expected, "{wait} {took}");
        };
        check(0, 1, None);
        check(2, 3, None);
        check(3, 3, Some(400));
        check(9, 3, Some(400));
    }
}
