//! Which small objects become larger ones, decided from the index alone.
//!
//! What a shard's rounds wrote within an hour is merged when the hour is over, what lies in a day when the day is. Time is
//! the log's own: the append time of the newest block that is split. So everything that belongs to an hour is there when
//! it counts as over, whatever was late. For a log that stands still it is the log's count of running
//! time. Neither deletes anything: merged runs go when their records may.
//!
//! A merged run is kept until its newest record may go. It therefore spans at most a sixth of `retention.ms`, rounded down
//! to a power of two: topics that keep less than 2^29 ms (6.2 days) are not merged into days, those that keep less than
//! 2^25 ms (9.3 hours) not at all.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use shared::name::{Partition, TimestampMs};

use crate::manifest::{HeldRun, Index, SegmentId, Usage};

const HOUR_MS: i64 = 3_600_000;
/// The spans that objects are merged into, the longest first.
const LEVELS_MS: [i64; 2] = [24 * HOUR_MS, HOUR_MS];
/// A merged run spans at most this part of what its topic keeps.
const RETENTION_PARTS: i64 = 6;
/// An object whose runs are this part of a segment on average is left alone: there is little to win.
const LARGE_RUN_PARTS: u64 = 8;
/// A merge saves an object, or one run in so many.
const WORTH_RUNS: usize = 8;

/// Partitions whose data lives about equally long share objects: -1, or the power of two at or below `retention.ms`.
/// So the number of classes is bounded, whatever values topics have.
pub(super) fn class(retention_ms: i64) -> i64 {
    if retention_ms < 0 { -1 } else { 1 << retention_ms.max(1).ilog2() }
}

fn allows(retention_ms: i64, span: i64) -> bool {
    retention_ms < 0 || retention_ms / RETENTION_PARTS >= span
}

/// Adjacent runs of one partition that become one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Part {
    pub partition: Partition,
    pub runs: Vec<HeldRun>,
    pub bytes: u64,
}

/// What becomes one object.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Output {
    pub parts: Vec<Part>,
    pub bytes: u64,
}

/// Objects of one class, level and span: when the span ends, how long it is, the class.
type Group = (i64, i64, i64);

/// Groups that were looked at and are not worth merging, with what was in them.
#[derive(Debug, Default)]
pub(super) struct Settled(HashMap<Group, (usize, u64)>);

/// What a choice rests on.
pub(super) struct Choice<'a> {
    pub index: &'a Index,
    /// `retention.ms` of a partition; `None` if its topic is gone.
    pub retention: &'a dyn Fn(Partition) -> Option<i64>,
    /// When the newest split block was appended; later for a log that stands still.
    pub log_ms: TimestampMs,
    pub segment_bytes: u64,
    /// Bytes that are merged at a time, but one object at least.
    pub bytes_max: u64,
    /// Objects that cannot be read.
    pub shunned: &'a BTreeSet<SegmentId>,
}

impl Choice<'_> {
    /// The next merge, the oldest first; `None` when there is none.
    pub(super) fn next(&self, settled: &mut Settled) -> Option<Vec<Output>> {
        let mut groups: BTreeMap<Group, BTreeSet<SegmentId>> = BTreeMap::new();
        for (id, usage) in self.index.usage() {
            if let Some(group) = self.group_of(id, usage) {
                groups.entry(group).or_default().insert(*id);
            }
        }
        groups.retain(|_, objects| objects.len() > 1);
        settled.0.retain(|group, _| groups.contains_key(group));
        for (group, objects) in groups {
            let mark = (objects.len(), objects.iter().fold(0, |mark, id| mark ^ id.nonce));
            if settled.0.get(&group) == Some(&mark) {
                continue;
            }
            let outputs = self.plan(&objects, group.1);
            if outputs.is_some() {
                return outputs;
            }
            settled.0.insert(group, mark);
        }
        None
    }

    fn group_of(&self, id: &SegmentId, usage: &Usage) -> Option<Group> {
        let mean = usage.live / u64::from(usage.runs.max(1));
        let small = usage.bytes < self.segment_bytes / 2 || mean < self.segment_bytes / LARGE_RUN_PARTS;
        if !small || self.shunned.contains(id) {
            return None;
        }
        let class = class((self.retention)(usage.sample)?);
        LEVELS_MS.into_iter().filter(|span| allows(class, *span)).find_map(|span| {
            let end = usage.newest_ms.div_euclid(span).saturating_add(1).saturating_mul(span);
            (end <= self.log_ms).then_some((end, span, class))
        })
    }

    fn plan(&self, objects: &BTreeSet<SegmentId>, span: i64) -> Option<Vec<Output>> {
        let mut runs = self.index.runs_in(objects);
        // A topic that was deleted has its objects rewritten first; one whose retention was shortened keeps its runs.
        let mut barred: BTreeSet<SegmentId> = BTreeSet::new();
        for same in runs.chunk_by(|a, b| a.0 == b.0) {
            let retention = same.first().and_then(|(partition, _)| (self.retention)(*partition));
            if !retention.is_some_and(|retention_ms| allows(retention_ms, span)) {
                barred.extend(same.iter().map(|(_, held)| held.object));
            }
        }
        runs.retain(|(_, held)| !barred.contains(&held.object));
        let mut parts = self.join(&runs);
        // An object stays where it is when it is not small and none of its runs finds another to join.
        let usage = self.index.usage();
        let small = |id: &SegmentId| usage.get(id).is_some_and(|usage| usage.bytes < self.segment_bytes / 2);
        let joined = parts.iter().filter(|part| part.runs.len() > 1).flat_map(|part| &part.runs);
        let mut sources: BTreeSet<SegmentId> = joined.map(|held| held.object).collect();
        sources.extend(objects.iter().filter(|id| small(id) && !barred.contains(id)));
        parts.retain(|part| part.runs.iter().all(|held| sources.contains(&held.object)));
        let before: usize = parts.iter().map(|part| part.runs.len()).sum();
        let saved = before - parts.len();
        let mut outputs = pack(parts, self.segment_bytes);
        if sources.len() < 2 || (outputs.len() >= sources.len() && saved * WORTH_RUNS < before.max(1)) {
            return None;
        }
        let mut bytes = 0;
        let fits = outputs.iter().take_while(|output| {
            bytes += output.bytes;
            bytes <= self.bytes_max
        });
        let fits = fits.count().max(1);
        if fits < outputs.len() {
            outputs.truncate(fits);
            // Moving runs without joining any could go on for ever.
            outputs.iter().flat_map(|output| &output.parts).find(|part| part.runs.len() > 1)?;
        }
        Some(outputs)
    }

    /// Runs that follow each other become one, up to a segment's size.
    fn join(&self, runs: &[(Partition, HeldRun)]) -> Vec<Part> {
        let mut parts: Vec<Part> = Vec::new();
        for (partition, held) in runs {
            let bytes = held.bytes();
            let joins = |part: &&mut Part| {
                let last = part.runs.last().map(|last| last.run.next);
                part.partition == *partition
                    && part.bytes + bytes <= self.segment_bytes
                    && last.and_then(|next| self.index.at_offset(*partition, next)) == Some(*held)
            };
            match parts.last_mut().filter(joins) {
                Some(part) => {
                    part.runs.push(*held);
                    part.bytes += bytes;
                }
                None => parts.push(Part { partition: *partition, runs: vec![*held], bytes }),
            }
        }
        parts
    }
}

/// Parts in their order, as many in each object as a segment holds.
fn pack(parts: Vec<Part>, segment_bytes: u64) -> Vec<Output> {
    let mut outputs: Vec<Output> = Vec::new();
    for part in parts {
        match outputs.last_mut().filter(|output| output.bytes + part.bytes <= segment_bytes) {
            Some(output) => {
                output.bytes += part.bytes;
                output.parts.push(part);
            }
            None => outputs.push(Output { bytes: part.bytes, parts: vec![part] }),
        }
    }
    outputs
}
