//! The cold tier: reads of archived batches by offset and time.
//!
//! The manifest's index names run and run index by position, so a read costs at most two range GETs, none when both are
//! cached, and never a LIST or HEAD. Each fetched stretch is checked batch by batch, once.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use shared::batch::Batch;
use shared::limits::BATCH_UNPACKED_BYTES_MAX;
use shared::log::{BoxFuture, ReadError, ReadLimits, TimePoint};
use shared::name::{Offset, Partition, TimestampMs};

use super::store::{Store, StoreError};
use super::{ColdBounds, ColdRead, ColdRun, ColdTier};
use crate::manifest::{HeldRun, Index, Keys, SegmentId};
use crate::segment::{RunIndex, Stretch};

/// Fetched at least, where the run has so much: a reader that goes on finds the next batches here.
const READ_AHEAD_BYTES: u64 = 1024 * 1024;
/// Fetched at most, so that a reader cannot make us hold more.
const READ_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// Archived batches, readable.
#[derive(Debug)]
pub struct Cold {
    store: Arc<Store>,
    keys: Keys,
    index: RwLock<Index>,
    indexes: Cache<(SegmentId, u64), Arc<RunIndex>>,
    chunks: Cache<(SegmentId, u64, u64), Arc<Chunk>>,
}

/// Fetched and checked batches: part of one run.
#[derive(Debug)]
struct Chunk {
    bytes: Bytes,
    batches: Vec<Place>,
}

/// Where a batch lies in a chunk.
#[derive(Debug, Clone, Copy)]
struct Place {
    last: Offset,
    start: usize,
    end: usize,
}

impl Cold {
    /// Reads what `index` names; caches take at most `cache_bytes`.
    pub fn new(store: Arc<Store>, keys: Keys, index: Index, cache_bytes: usize) -> Self {
        Self {
            store,
            keys,
            index: RwLock::new(index),
            indexes: Cache::new(cache_bytes / 4),
            chunks: Cache::new(cache_bytes - cache_bytes / 4),
        }
    }

    /// Looks at the index.
    pub fn with_index<T>(&self, look: impl FnOnce(&Index) -> T) -> T {
        look(&self.index.read())
    }

    /// Puts a published index in force.
    pub fn publish(&self, index: Index) {
        *self.index.write() = index;
    }

    async fn run_index(&self, held: &HeldRun) -> Result<Arc<RunIndex>, ReadError> {
        let key = (held.object, held.run.index_position);
        if let Some(index) = self.indexes.get(|found| *found == key) {
            return Ok(index);
        }
        let start = held.run.index_position;
        let path = self.keys.segment(&held.object);
        let bytes = self.store.get_range(&path, start..start + u64::from(held.run.index_length)).await;
        let bytes = bytes.map_err(read_error)?;
        let index = RunIndex::decode(&bytes, &held.run)
            .map_err(|error| ReadError::Corrupt(format!("{path}, index at {start}: {error}")))?;
        let index = Arc::new(index);
        self.indexes.put(key, index.clone(), index.memory_bytes());
        Ok(index)
    }

    /// The chunk that begins with stretch `stretch`, at least to its end and about `bytes_max` long.
    async fn chunk(
        &self,
        held: &HeldRun,
        index: &RunIndex,
        stretch: Stretch,
        bytes_max: u64,
    ) -> Result<Arc<Chunk>, ReadError> {
        let end = index.reach(&held.run, stretch.start, bytes_max);
        let start = held.run.position + stretch.start;
        let path = self.keys.segment(&held.object);
        let bytes = self.store.get_range(&path, start..held.run.position + end).await.map_err(read_error)?;
        let chunk = Chunk::parse(bytes).map_err(|error| ReadError::Corrupt(format!("{path} at {start}: {error}")))?;
        let chunk = Arc::new(chunk);
        let key = (held.object, held.run.position, stretch.start);
        self.chunks.put(key, chunk.clone(), chunk.bytes.len() + 256 + chunk.batches.len() * size_of::<Place>());
        Ok(chunk)
    }

    async fn read_now(&self, partition: Partition, from: Offset, limits: ReadLimits) -> Result<ColdRead, ReadError> {
        let nothing = ColdRead { batches: Vec::new(), next: from };
        let Some(held) = self.index.read().at_offset(partition, from) else { return Ok(nothing) };
        let (object, position) = (held.object, held.run.position);
        if let Some(chunk) = self.chunks.find(|key, chunk: &Arc<Chunk>| {
            (key.0, key.1) == (object, position) && chunk.holds(from.max(held.run.base))
        }) && let Some(read) = chunk.read(from, limits)
        {
            return Ok(read);
        }
        let index = self.run_index(&held).await?;
        let bytes_max = (limits.bytes_max as u64).clamp(READ_AHEAD_BYTES, READ_BYTES_MAX);
        for stretch in index.stretches(&held.run, from) {
            // Records in a hole before the next batch: the stretch after this one has it.
            if let Some(read) = self.chunk(&held, &index, stretch, bytes_max).await?.read(from, limits) {
                return Ok(read);
            }
        }
        let path = self.keys.segment(&held.object);
        Err(ReadError::Corrupt(format!("{path} has no batch at {from}, its manifest says it has")))
    }

    /// The partition's runs that hold records at or after `from`.
    fn runs_from(&self, partition: Partition, from: Offset) -> Vec<HeldRun> {
        let index = self.index.read();
        index.runs(partition).filter(|held| held.run.next > from).collect()
    }

    async fn find_time_now(
        &self,
        partition: Partition,
        from: Offset,
        at: TimestampMs,
    ) -> Result<Option<TimePoint>, ReadError> {
        for held in self.runs_from(partition, from).into_iter().filter(|held| held.run.max_timestamp >= at) {
            let index = self.run_index(&held).await?;
            for stretch in index.stretches(&held.run, from).filter(|stretch| stretch.max_timestamp >= at) {
                let chunk = self.chunk(&held, &index, stretch, 0).await?;
                let found = chunk.batches()?.iter().find_map(|batch| first_at(batch, from, at));
                if found.is_some() {
                    return Ok(found);
                }
            }
        }
        Ok(None)
    }

    async fn max_time_now(&self, partition: Partition, from: Offset) -> Result<Option<TimePoint>, ReadError> {
        let mut best: Option<TimePoint> = None;
        let mut runs = self.runs_from(partition, from);
        runs.sort_by_key(|held| (std::cmp::Reverse(held.run.max_timestamp), held.run.base));
        for held in runs {
            // What follows has no greater timestamp, and an equal one only at a greater offset.
            if best.is_some_and(|best| best.timestamp >= held.run.max_timestamp) {
                break;
            }
            let index = self.run_index(&held).await?;
            let mut stretches: Vec<Stretch> = index.stretches(&held.run, from).collect();
            stretches.sort_by_key(|stretch| (std::cmp::Reverse(stretch.max_timestamp), stretch.start));
            for stretch in stretches {
                if best.is_some_and(|best| best.timestamp >= stretch.max_timestamp) {
                    break;
                }
                let chunk = self.chunk(&held, &index, stretch, 0).await?;
                for batch in chunk.batches()? {
                    let greatest = greatest(&batch, from);
                    if greatest.is_some_and(|new| best.is_none_or(|best| new.timestamp > best.timestamp)) {
                        best = greatest;
                    }
                }
            }
        }
        Ok(best)
    }
}

impl ColdTier for Cold {
    fn bounds(&self, partition: Partition) -> Option<ColdBounds> {
        let index = self.index.read();
        let mut runs = index.runs(partition).map(|held| held.run);
        let first = runs.next()?;
        let start = ColdBounds { first: first.base, next: first.next, bytes: first.length };
        Some(runs.fold(start, |bounds, run| ColdBounds { next: run.next, bytes: bounds.bytes + run.length, ..bounds }))
    }

    fn runs(&self, partition: Partition) -> Vec<ColdRun> {
        let index = self.index.read();
        let runs = index.runs(partition).map(|held| ColdRun {
            base: held.run.base,
            next: held.run.next,
            bytes: held.run.length,
            max_timestamp: held.run.max_timestamp,
            appended_ms: held.run.appended_ms,
        });
        runs.collect()
    }

    fn read(
        &self,
        partition: Partition,
        from: Offset,
        limits: ReadLimits,
    ) -> BoxFuture<'_, Result<ColdRead, ReadError>> {
        Box::pin(self.read_now(partition, from, limits))
    }

    fn find_time(
        &self,
        partition: Partition,
        from: Offset,
        at: TimestampMs,
    ) -> BoxFuture<'_, Result<Option<TimePoint>, ReadError>> {
        Box::pin(self.find_time_now(partition, from, at))
    }

    fn max_time(&self, partition: Partition, from: Offset) -> BoxFuture<'_, Result<Option<TimePoint>, ReadError>> {
        Box::pin(self.max_time_now(partition, from))
    }
}

impl Chunk {
    fn parse(bytes: Bytes) -> Result<Self, shared::batch::BatchError> {
        let mut rest = bytes.clone();
        let mut batches = Vec::new();
        let mut start = 0;
        while let Some(batch) = Batch::split_first(&mut rest)? {
            let end = start + batch.len();
            batches.push(Place { last: batch.last_offset(), start, end });
            start = end;
        }
        Ok(Self { bytes, batches })
    }

    /// Whether a batch that begins here holds `from`: then nothing before this chunk does.
    fn holds(&self, from: Offset) -> bool {
        let first = self.bytes.first_chunk::<8>().map(|base| i64::from_be_bytes(*base));
        first.is_some_and(|base| base <= from) && self.batches.last().is_some_and(|place| place.last >= from)
    }

    /// Whole batches from the first that ends at or after `from`, within the limit but one at least.
    fn read(&self, from: Offset, limits: ReadLimits) -> Option<ColdRead> {
        let first = self.batches.partition_point(|place| place.last < from);
        let start = self.batches.get(first)?.start;
        let fits = |place: &&Place| place.end - start <= limits.bytes_max;
        let last = self.batches[first..].iter().take_while(fits).last().or(self.batches.get(first))?;
        Some(ColdRead { batches: vec![self.bytes.slice(start..last.end)], next: last.last.saturating_add(1) })
    }

    fn batches(&self) -> Result<Vec<Batch>, ReadError> {
        let batches = self.batches.iter().map(|place| Batch::trusted(self.bytes.slice(place.start..place.end)));
        batches.collect::<Result<_, _>>().map_err(|error| ReadError::Corrupt(error.to_string()))
    }
}

/// The first record of a batch at or after offset `from` with a timestamp at or after `at`.
fn first_at(batch: &Batch, from: Offset, at: TimestampMs) -> Option<TimePoint> {
    if batch.max_timestamp() < at || batch.last_offset() < from {
        return None;
    }
    times(batch, from).into_iter().find(|point| point.timestamp >= at)
}

/// The record of a batch at or after offset `from` with the greatest timestamp, the first of several.
fn greatest(batch: &Batch, from: Offset) -> Option<TimePoint> {
    times(batch, from).into_iter().reduce(|best, point| if point.timestamp > best.timestamp { point } else { best })
}

/// Offset and time of the batch's records at or after `from`. A batch that cannot be opened, or whose times were set
/// when it was appended, counts as one record at its first offset with its greatest timestamp.
fn times(batch: &Batch, from: Offset) -> Vec<TimePoint> {
    let leader_epoch = batch.leader_epoch();
    let whole = TimePoint { offset: batch.base_offset().max(from), timestamp: batch.max_timestamp(), leader_epoch };
    if batch.last_offset() < from {
        return Vec::new();
    }
    if batch.is_log_append_time() {
        return vec![whole];
    }
    let records = batch.records(BATCH_UNPACKED_BYTES_MAX).and_then(|records| records.collect::<Result<Vec<_>, _>>());
    let Ok(records) = records else { return vec![whole] };
    let points = records.into_iter().filter(|record| record.offset >= from);
    points.map(|record| TimePoint { offset: record.offset, timestamp: record.timestamp, leader_epoch }).collect()
}

fn read_error(error: StoreError) -> ReadError {
    match error {
        StoreError::Missing(key) => ReadError::Corrupt(format!("{key} is named by the manifest and gone")),
        error => ReadError::Storage(error.to_string()),
    }
}

/// A small cache bounded in bytes and entries; the entry used longest ago goes first.
#[derive(Debug)]
struct Cache<K, V> {
    kept: Mutex<Kept<K, V>>,
    bytes_max: usize,
}

/// Entries, the one used last at the end, and their bytes.
#[derive(Debug)]
struct Kept<K, V> {
    entries: VecDeque<(K, V, usize)>,
    bytes: usize,
}

/// Entries are looked through one by one.
const CACHE_ENTRIES_MAX: usize = 512;

impl<K: PartialEq + Copy, V: Clone> Cache<K, V> {
    fn new(bytes_max: usize) -> Self {
        Self { kept: Mutex::new(Kept { entries: VecDeque::new(), bytes: 0 }), bytes_max }
    }

    fn get(&self, wanted: impl Fn(&K) -> bool) -> Option<V> {
        self.find(|key, _| wanted(key))
    }

    fn find(&self, wanted: impl Fn(&K, &V) -> bool) -> Option<V> {
        let entries = &mut self.kept.lock().entries;
        let at = entries.iter().position(|(key, value, _)| wanted(key, value))?;
        let entry = entries.remove(at)?;
        let value = entry.1.clone();
        entries.push_back(entry);
        Some(value)
    }

    fn put(&self, key: K, value: V, bytes: usize) {
        if bytes > self.bytes_max {
            return;
        }
        let Kept { entries, bytes: held } = &mut *self.kept.lock();
        if let Some(at) = entries.iter().position(|(found, _, _)| *found == key)
            && let Some((_, _, old)) = entries.remove(at)
        {
            *held -= old;
        }
        entries.push_back((key, value, bytes));
        *held += bytes;
        while *held > self.bytes_max || entries.len() > CACHE_ENTRIES_MAX {
            let Some((_, _, old)) = entries.pop_front() else { break };
            *held -= old;
        }
    }
}
