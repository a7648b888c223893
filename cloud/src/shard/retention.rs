//! What may go: by age of the append and by size, per partition, over all tiers.

use shared::clock::{ClockState, JUMP_MS};
use shared::name::{Offset, Partition, TimestampMs};
use tokio::time::Instant;

use super::flight::Inner;
use super::{Core, ShardSettings};
use crate::archive::ColdRun;
use crate::state::{Change, LogChange, ProducerChange, State, Topic};

/// In how many steps producers expire, as parts of the time that they are remembered.
const PRODUCER_EXPIRY_STEPS: i64 = 24;

/// A shard to which nothing is appended stores its count as often as this part of what is kept shortest, ...
const COUNTED_PARTS: i64 = 16;
/// ... but at most and at least so often. What was counted since is lost in a restart, and what ages lives so much longer.
const COUNTED_MS: (i64, i64) = (20_000, 6 * 3600 * 1000);

/// What a topic keeps. -1 is for ever, or without bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kept {
    pub retention_ms: i64,
    pub retention_bytes: i64,
}

/// Something that goes as a whole: a run in a segment, or in a block of the WAL.
#[derive(Debug, Clone, Copy)]
struct Part {
    next: Offset,
    bytes: u64,
    appended_ms: TimestampMs,
}

/// How a topic's settings read, with what the broker does where they say nothing.
pub fn kept(topic: &Topic, retention_ms: i64, retention_bytes: i64) -> Kept {
    let number = |name: &str, default| topic.configs.get(name).and_then(|text| text.parse().ok()).unwrap_or(default);
    // A compacted topic that is not also deleted from keeps everything.
    let deletes = topic.configs.get("cleanup.policy").is_none_or(|policy| policy.contains("delete"));
    if !deletes {
        return Kept { retention_ms: -1, retention_bytes: -1 };
    }
    Kept {
        retention_ms: number("retention.ms", retention_ms),
        retention_bytes: number("retention.bytes", retention_bytes),
    }
}

impl Kept {
    fn is_too_old(&self, appended_ms: TimestampMs, now: TimestampMs) -> bool {
        self.retention_ms >= 0 && now.saturating_sub(appended_ms) > self.retention_ms
    }
}

/// The new log start, if it moves: whole parts go from the front, as long as they are too old or the rest is large enough.
fn new_start(parts: &[Part], kept: Kept, now: TimestampMs) -> Option<Offset> {
    let mut bytes: u64 = parts.iter().map(|part| part.bytes).sum();
    let mut start = None;
    for part in parts {
        let too_old = kept.is_too_old(part.appended_ms, now);
        let too_large =
            u64::try_from(kept.retention_bytes).is_ok_and(|bound| bytes.saturating_sub(part.bytes) >= bound);
        if !too_old && !too_large {
            break;
        }
        bytes -= part.bytes;
        start = Some(part.next);
    }
    start
}

impl Core {
    /// A copy of the state, which costs little: to look at all of it without the lock.
    fn state(&self) -> State {
        self.inner.lock().state.clone()
    }

    /// The log starts that retention moves now.
    pub fn retention_moves(&self) -> Vec<Change> {
        let now = self.now();
        let state = self.state();
        let mut moves = Vec::new();
        for (partition, kept) in kept_partitions(&state, &self.settings) {
            if kept.retention_ms < 0 && kept.retention_bytes < 0 {
                continue;
            }
            if kept.retention_bytes < 0 && !self.is_due(partition, kept, now) {
                continue;
            }
            let cold = self.cold.runs(partition);
            let inner = self.inner.lock();
            let Some(state) = inner.state.partition(partition) else { continue };
            let parts = inner.parts(partition, &cold, state.log_start);
            if let Some(offset) = new_start(&parts, kept, now).filter(|offset| *offset > state.log_start) {
                moves.push(Change::Logs(LogChange::StartMoved { partition, offset: offset.min(state.high_watermark) }));
            }
        }
        moves
    }

    /// Forgets producers that went away. Looked at in steps, so that many short lives are one change.
    pub fn expired_producers(&self) -> Option<Change> {
        let expiry = self.settings.producer_expiry_ms;
        let step = (expiry / PRODUCER_EXPIRY_STEPS).max(1);
        let before_ms = self.now().saturating_sub(expiry).div_euclid(step).saturating_mul(step);
        self.state().has_producers_before(before_ms).then_some(Change::Producers(ProducerChange::Expired { before_ms }))
    }

    /// Stores the count of running time, where there is something that ages and no block has told the count for a part of what
    /// that is kept; and where the wall clock stands, if that has changed.
    pub fn time_counted(&self) -> Option<Change> {
        self.look_at_clock();
        let counted: ClockState = self.expiry.lock().state(Instant::now().into_std());
        let state = self.state();
        let stored = state.clock().unwrap_or_default();
        let moved = counted.ahead_ms.abs_diff(stored.ahead_ms) > JUMP_MS.unsigned_abs();
        let since = counted.counted_ms.saturating_sub(stored.counted_ms);
        let due = |shortest: i64| since >= (shortest / COUNTED_PARTS).clamp(COUNTED_MS.0, COUNTED_MS.1);
        // Not looked through where blocks come all the time.
        let idle = since >= COUNTED_MS.0;
        (moved || idle && shortest_kept(&state, &self.settings).is_some_and(due))
            .then_some(Change::Logs(LogChange::TimeCounted(counted)))
    }

    /// Whether the oldest part is too old. Parts go from the front, so that nothing else need be looked at if it is not.
    fn is_due(&self, partition: Partition, kept: Kept, now: TimestampMs) -> bool {
        let log_start = |inner: &Inner| inner.state.partition(partition).map(|state| state.log_start);
        let Some(log_start) = log_start(&self.inner.lock()) else { return false };
        // The cold tier has locks of its own: it is never asked under ours.
        let archived = self.cold.oldest(partition, log_start).map(|run| run.appended_ms);
        let oldest = archived.or_else(|| Some(self.inner.lock().index.from(partition, log_start).next()?.append_ms));
        oldest.is_some_and(|appended_ms| kept.is_too_old(appended_ms, now))
    }
}

fn kept_partitions(state: &State, settings: &ShardSettings) -> impl Iterator<Item = (Partition, Kept)> {
    let (retention_ms, retention_bytes) = (settings.retention_ms, settings.retention_bytes);
    state.topics_of_any_name().flat_map(move |topic| {
        let (id, kept) = (topic.id, kept(topic, retention_ms, retention_bytes));
        (0..topic.partitions).map(move |index| (Partition { topic: id, index }, kept))
    })
}

/// How long the first thing to expire is kept, as far as there is one.
fn shortest_kept(state: &State, settings: &ShardSettings) -> Option<i64> {
    let with_records = kept_partitions(state, settings).filter(|(partition, kept)| {
        let state = state.partition(*partition);
        kept.retention_ms >= 0 && state.is_some_and(|state| state.log_start < state.high_watermark)
    });
    let records = with_records.map(|(_, kept)| kept.retention_ms).min();
    let producers = (state.producer_count() > 0).then_some(settings.producer_expiry_ms);
    // How long offsets are kept is the groups' matter, and never so short that it counts here.
    let offsets = (state.group_count() > 0).then_some(COUNTED_MS.1.saturating_mul(COUNTED_PARTS));
    [records, producers, offsets].into_iter().flatten().min()
}

impl Inner {
    /// The partition's parts, ascending: the archive's, then what only the WAL has.
    fn parts(&self, partition: Partition, cold: &[ColdRun], log_start: Offset) -> Vec<Part> {
        let archived = cold.last().map_or(i64::MIN, |run| run.next);
        let cold = cold.iter().filter(|run| run.next > log_start).map(|run| Part {
            next: run.next,
            bytes: run.bytes,
            appended_ms: run.appended_ms,
        });
        let wal = self.index.from(partition, archived.max(log_start)).map(|run| Part {
            next: run.last + 1,
            bytes: u64::from(run.bytes),
            appended_ms: run.append_ms,
        });
        cold.chain(wal).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_parts_go_from_the_front() {
        let parts: Vec<Part> = (1..=4).map(|n| Part { next: n * 10, bytes: 100, appended_ms: n * 1_000 }).collect();
        let cases = [
            ((-1, -1), None),
            ((2_000, -1), Some(20)),
            ((0, -1), Some(40)),
            ((9_000, -1), None),
            ((-1, 400), None),
            ((-1, 399), None),
            ((-1, 300), Some(10)),
            ((-1, 150), Some(20)),
            ((-1, 0), Some(40)),
            ((3_500, 100), Some(30)),
        ];
        for ((retention_ms, retention_bytes), expected) in cases {
            let kept = Kept { retention_ms, retention_bytes };
            assert_eq!(new_start(&parts, kept, 4_500), expected, "{kept:?}");
        }
    }
}
