//! What may be deleted when, and what happens when nothing may.
//!
//! Pure: numbers in, decisions out. Only what is `safe` in the cloud is deleted, by three rules that add up: a stream's
//! `retention_bytes`, its `retention_age`, and the one disk budget. When the budget is reached and nothing is safe, the
//! stream's `on_full` decides about new messages; `drop-oldest` alone may delete what the cloud does not have.
//!
//! How old records are is counted, not read from a wall clock (see [`shared::clock`]): a clock that is wrong makes nothing
//! older than it is. [`Ages`] remembers where a stream's end was at what count.

use serde::{Deserialize, Serialize};
use shared::name::{Offset, TimestampMs};

use crate::redb_log::Trim;
use crate::streams::OnFull;

/// The disk budget, divided.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Budget {
    /// All of it.
    pub bytes_max: u64,
    /// What only deletes, cursors and sessions may use.
    pub reserve: u64,
    /// Share of the rest that live data may take: a tree with freed pages in between never packs perfectly. Falls when
    /// the estimate proves too high.
    ceiling: f64,
    /// What the file can grow to at present, if the disk has less room than the budget says.
    limit: u64,
}

/// Smallest budget with which the database works at all.
pub const BUDGET_BYTES_MIN: u64 = 8 << 20;
/// Default bound of the budget.
pub const BUDGET_BYTES_DEFAULT: u64 = 1 << 30;

/// Share that live data may take at first, and the least it falls to.
const CEILING: (f64, f64) = (0.85, 0.4);
/// Safe data is deleted from this share of the ceiling on, so that room is made before it is missed.
const TRIM_FROM: f64 = 0.9;
/// What the database takes beside records: header, tables, the tail.
const FIXED_BYTES: u64 = 2 << 20;

impl Budget {
    /// A budget of `bytes_max`.
    pub fn new(bytes_max: u64) -> Self {
        Self { bytes_max, reserve: reserve(bytes_max), ceiling: CEILING.0, limit: u64::MAX }
    }

    /// The default: the lesser of 1 GiB and half of what is free, what the database has now included.
    pub fn from_free(free: u64, in_use: u64) -> u64 {
        (free.saturating_add(in_use) / 2).min(BUDGET_BYTES_DEFAULT)
    }

    /// Bytes live data may take by our estimate.
    pub fn ceiling(&self) -> u64 {
        let bytes = self.bytes_max.min(self.limit);
        (bytes.saturating_sub(reserve(bytes)) as f64 * self.ceiling) as u64
    }

    /// Bytes that records and sessions may take together: half of the reserve is for sessions when records have taken all
    /// they may.
    pub fn ceiling_for_sessions(&self) -> u64 {
        self.ceiling() + reserve(self.bytes_max.min(self.limit)) / 2
    }

    /// Bytes that all sessions may take.
    pub fn session_bytes_max(&self) -> u64 {
        (self.bytes_max / 32).clamp(512 << 10, 32 << 20)
    }

    /// The file has `used` bytes and the disk `free` more: what others took of the disk is not there for records.
    pub fn limit_to(&mut self, used: u64, free: u64) {
        self.limit = used.saturating_add(free);
    }

    /// The disk has less room than the budget says.
    pub fn is_limited(&self) -> bool {
        self.limit < self.bytes_max
    }

    /// The disk refused although the estimate saw room.
    pub fn overestimated(&mut self) {
        self.ceiling = (self.ceiling * 0.9).max(CEILING.1);
    }

    /// How many bytes too many there are, before anything must be refused.
    pub fn excess(&self, live: u64) -> u64 {
        live.saturating_sub((self.ceiling() as f64 * TRIM_FROM) as u64)
    }

    /// Estimate of what so many bytes of records and other values take: rows are cut at 60,000 of 65,536 bytes.
    pub fn live(record_bytes: u64, other_bytes: u64) -> u64 {
        FIXED_BYTES + record_bytes + record_bytes / 8 + other_bytes * 2
    }
}

fn reserve(bytes: u64) -> u64 {
    (bytes / 8).clamp(2 << 20, 32 << 20)
}

/// Bytes of rows that one session may take: its own, its subscriptions' and its QoS 2 packet ids'.
pub const SESSION_BYTES_MAX: usize = 1 << 20;

/// Whether a file that takes `used` bytes of which `live` are needed is worth compacting at the start. Freed pages are
/// used again anyway; what is gained is room for others on the disk.
pub fn wants_compaction(used: u64, live: u64) -> bool {
    let dead = used.saturating_sub(live);
    dead >= COMPACTION_BYTES_MIN && dead > used / 2
}

/// Dead bytes below which a start does not compact.
pub const COMPACTION_BYTES_MIN: u64 = 16 << 20;

/// Where a stream's end was when: what lies below an offset is at least as old as its count. Few entries, coarser for a
/// longer `retention_age`: what must go goes at most a sixteenth of it late.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Ages(Vec<(TimestampMs, Offset)>);

/// The finest step of [`Ages`].
const AGE_STEP_MS_MIN: i64 = 1_000;

impl Ages {
    /// All records below `next` are there at `now_ms`. True if that is worth storing.
    pub fn note(&mut self, now_ms: TimestampMs, next: Offset, age_ms: i64) -> bool {
        let step = (age_ms / 16).max(AGE_STEP_MS_MIN);
        let due = match self.0.last() {
            Some((at, end)) => *end < next && now_ms.saturating_sub(*at) >= step,
            None => next > 0,
        };
        if due {
            self.0.push((now_ms, next));
            // Of those that are over the age only the last says anything.
            let old = self.0.iter().filter(|(at, _)| now_ms.saturating_sub(*at) >= age_ms).count();
            self.0.drain(..old.saturating_sub(1));
        }
        due
    }

    /// Everything below this is older than `age_ms`.
    pub fn older_than(&self, now_ms: TimestampMs, age_ms: i64) -> Offset {
        let old = self.0.iter().rev().find(|(at, _)| now_ms.saturating_sub(*at) >= age_ms);
        old.map_or(0, |(_, offset)| *offset)
    }
}

/// What the decision needs to know of a stream.
#[derive(Debug, Clone, PartialEq)]
pub struct StreamUse {
    /// Its id.
    pub stream: u32,
    /// Its first record.
    pub first: Offset,
    /// The offset after its last durable record.
    pub next: Offset,
    /// Below this all is safe.
    pub safe: Offset,
    /// Bytes kept.
    pub bytes: u64,
    /// Bytes kept that are safe.
    pub bytes_safe: u64,
    /// Its setting.
    pub retention_bytes: Option<u64>,
    /// Below this all is older than its `retention_age`.
    pub old: Offset,
    /// Its setting.
    pub on_full: OnFull,
    /// Bytes of new records that were admitted on the promise that the oldest go.
    pub drop_bytes: u64,
}

/// What to delete now, `excess` being the bytes above the budget's trim line.
pub fn trims(streams: &[StreamUse], excess: u64) -> Vec<Trim> {
    let mut trims: Vec<Trim> = Vec::new();
    let mut excess = excess;
    for stream in streams {
        let over = stream.retention_bytes.map_or(0, |max| stream.bytes.saturating_sub(max)).min(stream.bytes_safe);
        if stream.bytes_safe > 0 && (over > 0 || stream.old > stream.first) {
            excess = excess.saturating_sub(over);
            trims.push(Trim { stream: stream.stream, below: stream.safe, bytes: over, old: stream.old });
        }
    }
    // The rest of the excess comes from whoever has most that is safe.
    let mut by_safe: Vec<&StreamUse> = streams.iter().filter(|stream| stream.bytes_safe > 0).collect();
    by_safe.sort_by_key(|stream| std::cmp::Reverse(stream.bytes_safe));
    for stream in by_safe {
        if excess == 0 {
            break;
        }
        let take = excess.min(stream.bytes_safe);
        excess -= take;
        match trims.iter_mut().find(|trim| trim.stream == stream.stream) {
            Some(trim) => trim.bytes = trim.bytes.saturating_add(take),
            None => trims.push(Trim { stream: stream.stream, below: stream.safe, bytes: take, old: 0 }),
        }
    }
    // What was promised room by dropping, after all that is safe went.
    for stream in streams.iter().filter(|stream| stream.on_full == OnFull::DropOldest && stream.drop_bytes > 0) {
        let bytes = stream.drop_bytes.max(excess.min(stream.bytes));
        match trims.iter_mut().find(|trim| trim.stream == stream.stream) {
            Some(trim) => {
                trim.bytes = trim.bytes.saturating_add(bytes);
                trim.below = stream.next;
            }
            None => trims.push(Trim { stream: stream.stream, below: stream.next, bytes, old: 0 }),
        }
    }
    trims
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(id: u32, bytes: u64, bytes_safe: u64) -> StreamUse {
        StreamUse {
            stream: id,
            first: 0,
            next: 100,
            safe: 40,
            bytes,
            bytes_safe,
            retention_bytes: None,
            old: 0,
            on_full: OnFull::Hold,
            drop_bytes: 0,
        }
    }

    #[test]
    fn nothing_unsafe_is_ever_deleted_unless_the_stream_says_so() {
        for old in [0, 10, 40, 100] {
            for on_full in [OnFull::Hold, OnFull::Reject, OnFull::DropOldest] {
                let mut one = stream(1, 1000, 400);
                (one.retention_bytes, one.old, one.on_full) = (Some(10), old, on_full);
                for trim in trims(&[one.clone()], u64::MAX) {
                    assert_eq!(trim.below, 40);
                }
                one.drop_bytes = 10;
                let below = trims(&[one], u64::MAX)[0].below;
                assert_eq!(below, if on_full == OnFull::DropOldest { 100 } else { 40 });
            }
        }
    }

    #[test]
    fn the_budget_takes_from_whoever_has_most_that_is_safe() {
        let streams = [stream(1, 1000, 100), stream(2, 1000, 700), stream(3, 1000, 0)];
        let got = trims(&streams, 750);
        assert_eq!(got.iter().map(|t| (t.stream, t.bytes)).collect::<Vec<_>>(), [(2, 700), (1, 50)]);
        assert!(trims(&streams, 0).is_empty());
        assert!(trims(&streams[2..], 500).is_empty());
    }

    #[test]
    fn a_streams_own_bounds_come_first() {
        let mut one = stream(1, 1000, 500);
        one.retention_bytes = Some(800);
        assert_eq!(trims(&[one.clone()], 0), [Trim { stream: 1, below: 40, bytes: 200, old: 0 }]);
        one.retention_bytes = None;
        one.old = 30;
        assert_eq!(trims(&[one.clone()], 0), [Trim { stream: 1, below: 40, bytes: 0, old: 30 }]);
        one.first = 30;
        assert!(trims(&[one], 0).is_empty(), "nothing that is there is old");
    }

    #[test]
    fn ages_are_few_and_nothing_is_old_before_its_time() {
        const AGE: i64 = 3_600_000;
        let mut ages = Ages::default();
        let ends: Vec<Offset> = (0..20_000).map(|second| second * 3).collect();
        for (second, next) in ends.iter().enumerate() {
            let now = second as i64 * 1000;
            ages.note(now, *next, AGE);
            assert!(ages.0.len() <= 18, "{ages:?}");
            let old = ages.older_than(now, AGE);
            // No younger than the age, and gone when it is a sixteenth over it.
            let second = second as i64;
            assert!(old <= (second - AGE / 1000).max(0) * 3, "{old} at {second}");
            assert!(old >= (second - AGE / 1000 * 18 / 16).max(0) * 3, "{old} at {second}");
        }
        // The end of a stream at rest is noted once, and nothing is written for it any more.
        assert!(ages.note(20_300_000, ends[19_999], AGE));
        assert!(!ages.note(40_000_000, ends[19_999], AGE));
        assert_eq!(ages.older_than(60_000_000, AGE), ends[19_999]);
    }

    #[test]
    fn a_file_is_compacted_when_most_of_it_is_dead_and_it_is_worth_it() {
        assert!(wants_compaction(100 << 20, 20 << 20));
        assert!(!wants_compaction(100 << 20, 60 << 20), "half is alive");
        assert!(!wants_compaction(12 << 20, 1 << 20), "too little to gain");
        assert!(!wants_compaction(1 << 20, 4 << 20), "the estimate may exceed the file");
    }

    #[test]
    fn the_budget_keeps_a_reserve_and_learns() {
        assert_eq!(Budget::from_free(100 << 30, 0), 1 << 30);
        assert_eq!(Budget::from_free(200 << 20, 100 << 20), 150 << 20);
        let mut budget = Budget::new(64 << 20);
        let before = budget.ceiling();
        assert!(before < budget.bytes_max - budget.reserve);
        assert_eq!(budget.excess(before / 2), 0);
        assert!(budget.excess(before) > 0, "trimming starts below the ceiling");
        for _ in 0..100 {
            budget.overestimated();
        }
        assert!(budget.ceiling() < before && budget.ceiling() > before / 3);
    }
}
