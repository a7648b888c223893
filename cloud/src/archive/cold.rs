//! The cold tier: reads of archived batches by offset and time.
//!
//! The manifest's index names run and run index by position, so a read asks for ranges of objects it knows, and never for
//! a LIST or HEAD; [`Chunks`] says where their bytes come from. Every batch is checked before it is served, wherever it
//! came from; what fails the check is dropped from the caches and fetched once more.

use std::collections::{HashSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt as _;
use parking_lot::{Mutex, RwLock};
use shared::batch::{Batch, BatchError};
use shared::limits::BATCH_UNPACKED_BYTES_MAX;
use shared::log::{BoxFuture, ReadError, ReadLimits, TimePoint};
use shared::name::{Offset, Partition, TimestampMs};
use tokio::sync::Semaphore;

use super::cache::{CHUNK_BYTES, CacheStatus, Chunks, DiskCache, ENTRY_BYTES, Object, TwoQueue, chunk_start, starts};
use super::store::{Store, StoreError};
use super::{ColdBounds, ColdRead, ColdRun, ColdTier};
use crate::manifest::{HeldRun, Index, Keys, SegmentId};
use crate::segment::{Run, RunIndex, Stretch};

/// Runs that one read takes from at most.
const RUNS_MAX: usize = 64;
/// Fetched at most for one read, so that a reader cannot make us hold more.
const READ_BYTES_MAX: u64 = 16 * 1024 * 1024;
/// Readers whose position is remembered, so that they are known when they go on.
const READERS_MAX: u64 = 4096;
/// Chunks fetched ahead at the same time, for all readers together; where the cache is small, as many as half of it holds.
const AHEAD_MAX: usize = 16;
/// Chunks fetched ahead for one read; half of what all may have, where that is less.
const AHEAD_READ_MAX: usize = 4;

/// Archived batches, readable.
#[derive(Debug)]
pub struct Cold {
    index: RwLock<Index>,
    runs: Arc<Runs>,
    /// Where reads ended, and how many there were in a row.
    readers: Mutex<TwoQueue<(Partition, Offset), u32>>,
    ahead: Arc<Semaphore>,
    ahead_read_max: u64,
    /// Whether what takes long may go to threads of its own.
    threads: bool,
}

/// Runs of a shard's segment objects, and their indexes.
#[derive(Debug)]
struct Runs {
    keys: Keys,
    chunks: Arc<Chunks>,
    indexes: Mutex<TwoQueue<(SegmentId, u64), Arc<RunIndex>>>,
}

/// Checked batches, part of one run, where their chunks have them.
#[derive(Debug, Default)]
struct Span {
    slices: Vec<Bytes>,
    batches: Vec<Place>,
}

/// Where a batch lies in a span.
#[derive(Debug, Clone, Copy)]
struct Place {
    last: Offset,
    slice: usize,
    start: usize,
    end: usize,
}

impl Cold {
    /// Reads what `index` names; caches take at most `cache_bytes` of memory.
    pub fn new(store: Arc<Store>, keys: Keys, index: Index, cache_bytes: usize, threads: bool) -> Self {
        let (all, indexes) = (cache_bytes as u64, cache_bytes as u64 / 4);
        let chunks = Arc::new(Chunks::new(store, keys.clone(), all - indexes));
        let ahead_max = (((all - indexes) / 2 / CHUNK_BYTES) as usize).min(AHEAD_MAX);
        Self {
            index: RwLock::new(index),
            runs: Arc::new(Runs { keys, chunks, indexes: Mutex::new(TwoQueue::new(indexes)) }),
            readers: Mutex::new(TwoQueue::new(READERS_MAX)),
            ahead: Arc::new(Semaphore::new(ahead_max)),
            ahead_read_max: (ahead_max / 2).min(AHEAD_READ_MAX) as u64,
            threads,
        }
    }

    /// Puts a disk cache between memory and bucket. Only the first one counts.
    pub fn use_disk(&self, disk: Arc<DiskCache>) {
        self.runs.chunks.use_disk(disk);
    }

    /// What the caches did.
    pub fn cache_status(&self) -> CacheStatus {
        self.runs.chunks.status()
    }

    /// Looks at the index.
    pub fn with_index<T>(&self, look: impl FnOnce(&Index) -> T) -> T {
        look(&self.index.read())
    }

    /// Puts a published index in force. What it does not name leaves the caches.
    pub fn publish(&self, index: Index) {
        *self.index.write() = index.clone();
        let runs = self.runs.clone();
        let tidy = move || runs.retain(&index.usage().keys().copied().collect());
        // Looks at every run and may delete files.
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) if self.threads => drop(runtime.spawn_blocking(tidy)),
            _ => tidy(),
        }
    }

    /// Reads on from run to run until the limit: a quiet partition has many small ones.
    async fn read_now(&self, partition: Partition, from: Offset, limits: ReadLimits) -> Result<ColdRead, ReadError> {
        let before = self.readers.lock().get(&(partition, from)).copied().unwrap_or(0);
        let (mut read, mut bytes) = (ColdRead { batches: Vec::new(), next: from }, 0);
        for number in 0..RUNS_MAX as u32 {
            let (is_first, bytes_max) = (read.batches.is_empty(), limits.bytes_max.saturating_sub(bytes));
            if bytes_max == 0 && !is_first {
                break;
            }
            let Some(held) = self.index.read().at_offset(partition, read.next) else { break };
            // A second run within a read is going on as well.
            let before = before.saturating_add(number);
            let more = match self.read_run(partition, &held, read.next, ReadLimits { bytes_max }, before).await {
                Ok(more) => more,
                Err(error) if is_first => return Err(error),
                // What fails here fails again for the reader who comes for it, and is reported then.
                Err(_) => break,
            };
            let more_bytes: usize = more.batches.iter().map(Bytes::len).sum();
            if !is_first && more_bytes > bytes_max {
                break;
            }
            bytes += more_bytes;
            read.batches.extend(more.batches);
            read.next = more.next;
            // Short of the run's end: the limit allows no more, or it is in a chunk that is not worth waiting for.
            if read.next < held.run.next {
                break;
            }
        }
        if !read.batches.is_empty() {
            self.readers.lock().insert((partition, read.next), before.saturating_add(1), 1);
        }
        Ok(read)
    }

    /// Reads from one run, which covers offsets at or after `from`, for a reader who has read so many times before. No batches: there
    /// are none any more in what it covers from there on.
    async fn read_run(
        &self,
        partition: Partition,
        held: &HeldRun,
        from: Offset,
        limits: ReadLimits,
        before: u32,
    ) -> Result<ColdRead, ReadError> {
        let bytes_max = (limits.bytes_max as u64).min(READ_BYTES_MAX);
        let index = if before == 0 && from == held.run.base && self.ahead_read_max > 0 {
            // Where it begins is known without the index, and about where it ends: with the last stretch that the limit allows.
            let bytes = (bytes_max - bytes_max / 8).min(self.ahead_read_max * CHUNK_BYTES).min(held.run.length).max(1);
            let first = self.runs.chunks.fetch(object(held), held.run.position..held.run.position + bytes);
            // What fails here is asked for again below, and the failure is met there.
            tokio::try_join!(self.runs.index(held), first.map(Ok))?.0
        } else {
            self.runs.index(held).await?
        };
        for stretch in index.stretches(&held.run, from) {
            let end = read_end(&held.run, &index, &stretch, bytes_max);
            if before > 0 {
                self.fetch_ahead(partition, held, &(stretch.start..end), before);
            }
            // Records in a hole before the next batch: the stretch after this one has it.
            let span = self.runs.span(held, stretch.start..end).await?;
            if let Some(read) = span.read(from, limits) {
                let is_last = end == held.run.length && span.batches.last().is_some_and(|last| last.last < read.next);
                // Compaction may have left nothing of what the run covers behind its last batch.
                return Ok(ColdRead { next: if is_last { held.run.next } else { read.next }, ..read });
            }
        }
        Ok(ColdRead { batches: Vec::new(), next: held.run.next })
    }

    /// Fetches what a reader that has read `read` of `held`, after so many reads before, wants next: as many chunks after
    /// that as it has just read, twice as many each time it goes on, within bounds; where the run ends before, the next
    /// run's index and first chunk too. Skipped where enough is on its way already, and where there is no runtime.
    fn fetch_ahead(&self, partition: Partition, held: &HeldRun, read: &Range<u64>, before: u32) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let chunk = |position: u64| chunk_start(held.run.position + position);
        let last = chunk(read.end.saturating_sub(1));
        let just_read = (last - chunk(read.start)) / CHUNK_BYTES + 1;
        let count = just_read.saturating_mul(1 << (before - 1).min(8)).min(self.ahead_read_max);
        let (from, to) = (last + CHUNK_BYTES, last + (count + 1) * CHUNK_BYTES);
        let end = held.run.position + held.run.length;
        self.fetch(&runtime, *held, from..to.min(end));
        if to >= end + CHUNK_BYTES
            && let Some(next) = self.index.read().at_offset(partition, held.run.next)
        {
            self.fetch(&runtime, next, next.run.position..next.run.position + 1);
        }
    }

    /// Fetches a run's index and the chunks of this range of its object, from the first that is not on its way and as far
    /// as others leave room.
    fn fetch(&self, runtime: &tokio::runtime::Handle, held: HeldRun, range: Range<u64>) {
        let lacking = starts(&range).find(|start| !self.runs.is_coming(&held, *start));
        let Some(start) = lacking else { return };
        let count = (range.end - start).div_ceil(CHUNK_BYTES).min(self.ahead.available_permits() as u64);
        let permits = self.ahead.clone().try_acquire_many_owned(count as u32);
        let Some(permits) = permits.ok().filter(|_| count > 0) else { return };
        let (runs, range) = (self.runs.clone(), start..range.end.min(start.saturating_add(count * CHUNK_BYTES)));
        runtime.spawn(async move {
            let _permits = permits;
            // The reader who comes for what fails meets the failure.
            let _ = tokio::join!(runs.index(&held), runs.chunks.fetch_ahead(object(&held), range));
        });
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
            let index = self.runs.index(&held).await?;
            for stretch in index.stretches(&held.run, from).filter(|stretch| stretch.max_timestamp >= at) {
                let span = self.runs.span(&held, stretch.start..stretch.end).await?;
                let found = span.batches()?.iter().find_map(|batch| first_at(batch, from, at));
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
            let index = self.runs.index(&held).await?;
            let mut stretches: Vec<Stretch> = index.stretches(&held.run, from).collect();
            stretches.sort_by_key(|stretch| (std::cmp::Reverse(stretch.max_timestamp), stretch.start));
            for stretch in stretches {
                if best.is_some_and(|best| best.timestamp >= stretch.max_timestamp) {
                    break;
                }
                let span = self.runs.span(&held, stretch.start..stretch.end).await?;
                for batch in span.batches()? {
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

fn cold_run(held: HeldRun) -> ColdRun {
    ColdRun {
        base: held.run.base,
        next: held.run.next,
        bytes: held.run.length,
        max_timestamp: held.run.max_timestamp,
        appended_ms: held.run.appended_ms,
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
        self.index.read().runs(partition).map(cold_run).collect()
    }

    fn oldest(&self, partition: Partition, from: Offset) -> Option<ColdRun> {
        self.index.read().runs(partition).find(|held| held.run.next > from).map(cold_run)
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

impl Runs {
    /// The index of a run.
    async fn index(&self, held: &HeldRun) -> Result<Arc<RunIndex>, ReadError> {
        let key = (held.object, held.run.index_position);
        if let Some(index) = self.indexes.lock().get(&key) {
            return Ok(index.clone());
        }
        let start = held.run.index_position;
        let range = start..start + u64::from(held.run.index_length);
        let index = self.checked(held, range, |parts| RunIndex::decode(&whole(parts), &held.run)).await?;
        let index = Arc::new(index);
        self.indexes.lock().insert(key, index.clone(), index.memory_bytes() as u64 + ENTRY_BYTES);
        Ok(index)
    }

    /// The batches in `range` of a run, which begins and ends with a stretch.
    async fn span(&self, held: &HeldRun, range: Range<u64>) -> Result<Span, ReadError> {
        let range = held.run.position + range.start..held.run.position + range.end;
        self.checked(held, range, Span::parse).await
    }

    /// What `read` makes of a range of an object. A cache, a proxy or a wire may have damaged it: it has a second try,
    /// with bytes from the bucket.
    async fn checked<T, E: std::fmt::Display>(
        &self,
        held: &HeldRun,
        range: Range<u64>,
        read: impl Fn(VecDeque<Bytes>) -> Result<T, E>,
    ) -> Result<T, ReadError> {
        let mut is_second = false;
        loop {
            let parts = self.chunks.range(object(held), range.clone()).await.map_err(read_error)?;
            let error = match read(parts) {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            self.chunks.forget(held.object, range.clone());
            if std::mem::replace(&mut is_second, true) {
                let path = self.keys.segment(&held.object);
                return Err(ReadError::Corrupt(format!("{path} at {}: {error}", range.start)));
            }
        }
    }

    /// Whether a run's index and the chunk that holds `position` are in memory or on their way.
    fn is_coming(&self, held: &HeldRun, position: u64) -> bool {
        let is_known = self.indexes.lock().contains(&(held.object, held.run.index_position));
        let is_known = is_known || self.chunks.is_coming(held.object, held.run.index_position);
        is_known && self.chunks.is_coming(held.object, position)
    }

    fn retain(&self, live: &HashSet<SegmentId>) {
        self.indexes.lock().retain(|(object, _)| live.contains(object));
        self.chunks.retain(live);
    }
}

/// Where a read of up to `bytes_max` that begins somewhere in `stretch` ends: with the stretch that the last byte may be in,
/// so that the limit is used up, unless that one begins another chunk. That is not worth waiting for.
fn read_end(run: &Run, index: &RunIndex, stretch: &Stretch, bytes_max: u64) -> u64 {
    let sure = index.reach(run, stretch.start, bytes_max);
    let wished = index.end_of(run, stretch.end.saturating_add(bytes_max.saturating_sub(1)));
    let chunk = |end: u64| chunk_start((run.position + end).saturating_sub(1));
    if chunk(wished) == chunk(sure) { wished } else { sure }
}

/// Parts of an index in one; it seldom lies across two chunks.
fn whole(mut parts: VecDeque<Bytes>) -> Bytes {
    let first = parts.pop_front().unwrap_or_default();
    if parts.is_empty() { first } else { join(&first, usize::MAX, &mut parts) }
}

fn object(held: &HeldRun) -> Object {
    Object { id: held.object, bytes: held.object_bytes }
}

impl Span {
    /// Takes adjacent bytes apart. A batch that is cut between two of them is put together in a slice of its own.
    fn parse(mut parts: VecDeque<Bytes>) -> Result<Self, BatchError> {
        let mut span = Self::default();
        while let Some(part) = parts.pop_front() {
            let (slice, mut start, mut rest) = (span.slices.len(), 0, part.clone());
            let lacking = loop {
                match Batch::split_first(&mut rest) {
                    Ok(None) => break None,
                    Ok(Some(batch)) => {
                        let end = start + batch.len();
                        span.batches.push(Place { last: batch.last_offset(), slice, start, end });
                        start = end;
                    }
                    Err(BatchError::Cut { expected, .. }) if !parts.is_empty() => break Some(expected),
                    Err(error) => return Err(error),
                }
            };
            span.slices.push(part);
            if let Some(bytes) = lacking {
                let whole = join(&rest, bytes, &mut parts);
                parts.push_front(whole);
            }
        }
        Ok(span)
    }

    /// Whole batches from the first that ends at or after `from`, within the limit but one at least.
    fn read(&self, from: Offset, limits: ReadLimits) -> Option<ColdRead> {
        let first = self.batches.partition_point(|place| place.last < from);
        let (mut read, mut bytes) = (ColdRead { batches: Vec::new(), next: from }, 0);
        // Of one slice: the batches found so far, and where they begin and end.
        let mut adjacent: Option<Place> = None;
        let slice = |place: Place| self.slices.get(place.slice).map(|slice| slice.slice(place.start..place.end));
        for place in self.batches.get(first..)? {
            bytes += place.end - place.start;
            if adjacent.is_some() && bytes > limits.bytes_max {
                break;
            }
            adjacent = match adjacent {
                Some(before) if before.slice == place.slice => Some(Place { end: place.end, ..before }),
                before => {
                    read.batches.extend(before.and_then(slice));
                    Some(*place)
                }
            };
            read.next = place.last.saturating_add(1);
        }
        read.batches.extend(slice(adjacent?));
        Some(read)
    }

    fn batches(&self) -> Result<Vec<Batch>, ReadError> {
        let slices = self.batches.iter().filter_map(|place| Some((place, self.slices.get(place.slice)?)));
        let batches = slices.map(|(place, slice)| Batch::trusted(slice.slice(place.start..place.end)));
        batches.collect::<Result<_, _>>().map_err(|error| ReadError::Corrupt(error.to_string()))
    }
}

/// `first`, and what it lacks to `bytes` bytes of the parts that follow, as far as they go.
fn join(first: &[u8], bytes: usize, parts: &mut VecDeque<Bytes>) -> Bytes {
    let mut whole = BytesMut::from(first);
    while let Some(part) = parts.front_mut().filter(|_| whole.len() < bytes) {
        let taken = part.split_to(part.len().min(bytes - whole.len()));
        whole.extend_from_slice(&taken);
        if part.is_empty() {
            parts.pop_front();
        }
    }
    whole.freeze()
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
