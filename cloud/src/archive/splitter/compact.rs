//! Writing objects again: without their dead bytes, or several as one.
//!
//! Both do the same: read runs by range, build an object of them, and put its runs in the index in place of the old ones.
//! The old objects are read as they are; nothing is decoded, and every batch's checksum is looked at on the way.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use shared::batch::Batch;
use shared::name::Partition;
use tokio::time::Instant;
use tracing::{info, warn};

use super::merge::{Choice, Output, Part};
use super::{Slices, Splitter, Work};
use crate::archive::{ArchiveError, StoreError};
use crate::manifest::{HeldRun, Index, SegmentId};

/// Bytes rewritten at a time, in segments; and merged at a time.
const REWRITE_SEGMENTS_MAX: u64 = 4;
const MERGE_SEGMENTS_MAX: u64 = 16;
/// One range GET's bytes at most, unless one run is larger.
const RANGE_BYTES_MAX: u64 = 8 << 20;
/// Bytes that nobody wants which are read all the same, rather than with another request.
const RANGE_WASTE_BYTES_MAX: u64 = 64 << 10;
/// Range GETs under way.
const READS_AT_ONCE: usize = 4;

impl Splitter<'_> {
    /// Writes again what is worth it, and publishes the result. What is due by then to be split comes first; what
    /// remains is done the next time. Decides on nothing that the published snapshot does not know.
    pub(super) async fn upkeep(&mut self) -> Result<(), ArchiveError> {
        let mut work = Work::default();
        let done = self.upkeep_with(&mut work).await;
        if done.is_err() {
            self.bury(work.written);
        }
        done
    }

    async fn upkeep_with(&mut self, work: &mut Work) -> Result<(), ArchiveError> {
        let mut index = self.index.clone();
        let (dropped, outputs, mut more) = self.choose_rewrites(&index);
        let mut changed = !dropped.is_empty();
        index.replace(&dropped, Vec::new()).map_err(super::local)?;
        let rewrites = outputs.len();
        let mut queue: Vec<Output> = outputs;
        let mut merges = 0;
        if queue.is_empty() && !changed {
            queue = self.choose_merge(&index).unwrap_or_default();
            merges = queue.len();
            more |= merges > 0;
        }
        for (at, output) in queue.into_iter().enumerate() {
            if at > 0 && self.due() {
                more = true;
                break;
            }
            match self.carry_out(&mut index, output, work).await {
                Ok(()) => changed = true,
                Err(error @ ArchiveError::Damaged { .. }) => {
                    warn!(%error, "left as it is");
                    self.archive.failed(&error);
                    more = true;
                }
                // What is done already is published: it need not be done again.
                Err(error @ ArchiveError::Store(_)) if changed => {
                    warn!(%error, "the rest is written later");
                    more = true;
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        if changed {
            info!(rewrites, merges, dropped = dropped.len(), "objects were written anew");
            let pages = self.write_pages(&mut index, None, work).await?;
            let root = self.next_root(self.root.trim, self.root.trim_crc, &pages);
            self.publish(root, index, pages.fresh, work).await?;
        }
        self.upkeep_due = more.then(Instant::now);
        self.upkept = Instant::now();
        Ok(())
    }

    /// Objects with runs of deleted topics, and those that are mostly dead: runs that go at once, objects to write again,
    /// and whether there are more.
    fn choose_rewrites(&self, index: &Index) -> (Vec<(Partition, HeldRun)>, Vec<Output>, bool) {
        let condemned = self.condemned.iter().flat_map(|partition| index.runs(*partition));
        let mut objects: BTreeSet<SegmentId> = condemned.map(|held| held.object).collect();
        objects.extend(index.usage().iter().filter(|(_, usage)| usage.is_mostly_dead()).map(|(id, _)| *id));
        objects.retain(|object| !self.shunned.contains(object));
        let mut runs: BTreeMap<SegmentId, Vec<(Partition, HeldRun)>> = BTreeMap::new();
        for (partition, held) in index.runs_in(&objects) {
            runs.entry(held.object).or_default().push((partition, held));
        }
        let mut dropped = Vec::new();
        let mut outputs = Vec::new();
        let mut budget = self.segment_bytes().saturating_mul(REWRITE_SEGMENTS_MAX);
        let mut more = false;
        for runs in runs.into_values() {
            let (dead, live): (Vec<_>, Vec<_>) =
                runs.into_iter().partition(|(partition, _)| self.condemned.contains(partition));
            let part =
                |(partition, held): (Partition, HeldRun)| Part { partition, runs: vec![held], bytes: held.bytes() };
            let parts: Vec<Part> = live.into_iter().map(part).collect();
            let bytes: u64 = parts.iter().map(|part| part.bytes).sum();
            if !parts.is_empty() && !outputs.is_empty() && bytes > budget {
                more = true;
                continue;
            }
            budget = budget.saturating_sub(bytes);
            if parts.is_empty() {
                dropped.extend(dead);
            } else {
                outputs.push(Output { parts, bytes });
            }
        }
        (dropped, outputs, more)
    }

    fn choose_merge(&mut self, index: &Index) -> Option<Vec<Output>> {
        let source = self.source;
        let choice = Choice {
            index,
            retention: &|partition| source.retained(partition).map(|retained| retained.retention_ms),
            log_ms: self.log_ms()?,
            segment_bytes: self.segment_bytes(),
            bytes_max: self.segment_bytes().saturating_mul(MERGE_SEGMENTS_MAX),
            shunned: &self.shunned,
        };
        choice.next(&mut self.settled)
    }

    /// Makes one object and puts it in the index. Runs of deleted topics that lay in a rewritten object go with it.
    async fn carry_out(&mut self, index: &mut Index, output: Output, work: &mut Work) -> Result<(), ArchiveError> {
        let runs = output.parts.iter().flat_map(|part| &part.runs);
        let bytes = self.read_runs(runs.copied().collect()).await?;
        let group = output.parts.iter().map(|part| {
            let mut slices = Slices::default();
            for held in &part.runs {
                let bytes = bytes.get(&(held.object, held.run.index_position)).cloned().unwrap_or_default();
                slices.push(held.run.base..held.run.next, bytes, held.run.appended_ms);
            }
            (part.partition, slices)
        });
        let group: Vec<_> = group.collect();
        let (id, segment) = self.put_segment(group, self.root.trim, work).await?;
        if segment.runs.len() != output.parts.len() {
            return Err(super::local("a merged object has not the runs it was made of"));
        }
        let mut old: Vec<(Partition, HeldRun)> = Vec::new();
        for part in output.parts {
            old.extend(part.runs.into_iter().map(|held| (part.partition, held)));
        }
        let sources: BTreeSet<SegmentId> = old.iter().map(|(_, held)| held.object).collect();
        for partition in &self.condemned {
            let beside = index.runs(*partition).filter(|held| sources.contains(&held.object));
            old.extend(beside.map(|held| (*partition, held)));
        }
        let new = segment.runs.into_iter();
        let new = new.map(|(partition, run)| (partition, HeldRun { object: id, object_bytes: segment.bytes, run }));
        index.replace(&old, new.collect()).map_err(super::local)
    }

    /// The bytes of runs, checked, by object and the position of their index: those without batches share theirs with the next.
    async fn read_runs(&mut self, runs: Vec<HeldRun>) -> Result<HashMap<(SegmentId, u64), Bytes>, ArchiveError> {
        let (store, keys) = (&self.archive.store, &self.archive.keys);
        let reads = stream::iter(ranges(runs)).map(|(range, runs)| async move {
            let Some(object) = runs.first().map(|held| held.object) else { return Ok((range, Bytes::new(), runs)) };
            let bytes = store.get_range(&keys.segment(&object), range.clone()).await;
            bytes.map(|bytes| (range, bytes, runs)).map_err(|error| (object, error))
        });
        let read: Result<Vec<_>, _> = reads.buffered(READS_AT_ONCE).try_collect().await;
        let read = match read {
            Ok(read) => read,
            Err((object, error @ StoreError::Missing(_))) => return Err(self.shun(object, &error)),
            Err((_, error)) => return Err(error.into()),
        };
        let mut found = HashMap::new();
        for (range, bytes, runs) in read {
            for held in runs {
                let start = (held.run.position - range.start) as usize;
                let run = bytes.slice(start..start + held.run.length as usize);
                if let Err(error) = check(&held, run.clone()) {
                    return Err(self.shun(held.object, &error));
                }
                found.insert((held.object, held.run.index_position), run);
            }
        }
        Ok(found)
    }

    /// An object that cannot be read is not tried again before the next start, so that the others go on.
    fn shun(&mut self, object: SegmentId, reason: &dyn std::fmt::Display) -> ArchiveError {
        self.shunned.insert(object);
        ArchiveError::Damaged { key: self.archive.keys.segment(&object).to_string(), reason: reason.to_string() }
    }
}

/// Whether `bytes` are batches that the run may have: ascending, within the offsets that it covers.
fn check(held: &HeldRun, bytes: Bytes) -> Result<(), String> {
    let mut rest = bytes;
    let mut next = held.run.base;
    while let Some(batch) = Batch::split_first(&mut rest).map_err(|error| error.to_string())? {
        if batch.base_offset() < next || batch.last_offset() >= held.run.next {
            return Err(format!("a run of {} to {} has {batch:?} at {next}", held.run.base, held.run.next));
        }
        next = batch.last_offset().saturating_add(1);
    }
    Ok(())
}

/// What is read at a time: neighbours within one object.
fn ranges(mut runs: Vec<HeldRun>) -> Vec<(Range<u64>, Vec<HeldRun>)> {
    runs.sort_unstable_by_key(|held| (held.object, held.run.position));
    let mut ranges: Vec<(Range<u64>, Vec<HeldRun>, u64)> = Vec::new();
    for held in runs {
        let (start, end) = (held.run.position, held.run.position + held.run.length);
        let joins = |(range, with, waste): &&mut (Range<u64>, Vec<HeldRun>, u64)| {
            with.last().is_some_and(|last| last.object == held.object)
                && start >= range.end
                && *waste + (start - range.end) <= RANGE_WASTE_BYTES_MAX
                && end - range.start <= RANGE_BYTES_MAX
        };
        match ranges.last_mut().filter(joins) {
            Some((range, with, waste)) => {
                *waste += start - range.end;
                range.end = end;
                with.push(held);
            }
            None => ranges.push((start..end, vec![held], 0)),
        }
    }
    ranges.into_iter().map(|(range, with, _)| (range, with)).collect()
}
