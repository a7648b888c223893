//! Bytes of archive objects, by chunk: from memory, else from the local disk, else from the bucket.
//!
//! A chunk is an aligned piece of an object, so that neighbours share it whoever asks: a reader that goes on, readers of
//! the small runs that lie in one object, the run indexes at its end. Whoever asks for a chunk that is on its way already
//! waits for that one request. Nothing here knows what the bytes mean; who finds them damaged says [`Chunks::forget`].

mod disk;
mod two_queue;

use std::collections::{HashMap, HashSet, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use futures_util::future::{Shared, WeakShared};
use futures_util::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use parking_lot::Mutex;
use serde::Serialize;
use shared::log::BoxFuture;

use disk::ChunkId;
pub use disk::DiskCache;
pub(crate) use two_queue::TwoQueue;

use super::store::{Store, StoreError};
use crate::manifest::{Keys, SegmentId};

/// What is fetched at a time, at a multiple of it: at a common round trip of 30 ms and 100 MB/s a request for it takes
/// hardly longer than one for a byte, and a terabyte costs a million requests.
pub(super) const CHUNK_BYTES: u64 = 1024 * 1024;
/// Chunks that one read waits for at the same time.
const CHUNKS_AT_ONCE: usize = 8;
/// What an entry takes in memory besides its bytes.
pub(crate) const ENTRY_BYTES: u64 = 256;
/// Requests given up half-way leave a name behind, which is cleared away beyond this.
const FLIGHTS_TIDY: usize = 1024;

/// An object and its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Object {
    pub id: SegmentId,
    pub bytes: u64,
}

type Key = (SegmentId, u64);
type Flight = BoxFuture<'static, Result<Bytes, StoreError>>;

/// The chunks of one shard's objects.
#[derive(Debug)]
pub(super) struct Chunks {
    store: Arc<Store>,
    keys: Keys,
    shard: u32,
    memory: Mutex<TwoQueue<Key, Bytes>>,
    disk: OnceLock<Arc<DiskCache>>,
    flights: Mutex<HashMap<Key, WeakShared<Flight>>>,
    counters: Counters,
}

#[derive(Debug, Default)]
struct Counters {
    memory_hits: AtomicU64,
    memory_misses: AtomicU64,
    disk_hits: AtomicU64,
    disk_misses: AtomicU64,
    ahead: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// What the caches of archived records did since the start. All are counts of chunks but for bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct CacheStatus {
    /// Found in memory.
    pub memory_hits: u64,
    /// Not found there.
    pub memory_misses: u64,
    /// Found on the disk.
    pub disk_hits: u64,
    /// Not found there, or damaged: asked of the bucket.
    pub disk_misses: u64,
    /// Fetched before they were asked for.
    pub ahead: u64,
    /// Bytes on the disk.
    pub disk_bytes: u64,
    /// Their bound; 0 without a disk cache.
    pub disk_bytes_max: u64,
    /// The disk took something no longer, and the disk cache is off until the next start.
    pub disk_is_off: bool,
}

impl Chunks {
    pub fn new(store: Arc<Store>, keys: Keys, memory_bytes: u64) -> Self {
        Self {
            shard: keys.shard(),
            store,
            keys,
            memory: Mutex::new(TwoQueue::new(memory_bytes)),
            disk: OnceLock::new(),
            flights: Mutex::default(),
            counters: Counters::default(),
        }
    }

    /// Puts a disk cache behind the memory. Only the first one counts.
    pub fn use_disk(&self, disk: Arc<DiskCache>) {
        let _ = self.disk.set(disk);
    }

    /// These bytes of an object, in order, cut where chunks are: nothing is copied.
    pub async fn range(self: &Arc<Self>, object: Object, range: Range<u64>) -> Result<VecDeque<Bytes>, StoreError> {
        if range.is_empty() {
            return Ok(VecDeque::new());
        }
        if range.end > object.bytes {
            return Err(self.failed(&object.id, format!("expected {range:?} within its {} bytes", object.bytes)));
        }
        let (first, last) = (chunk_start(range.start), chunk_start(range.end - 1));
        let starts = (first..=last).step_by(CHUNK_BYTES as usize);
        let mut chunks = futures_util::stream::iter(starts)
            .map(|start| async move { self.chunk(object, start).await.map(|bytes| (start, bytes)) })
            .buffered(CHUNKS_AT_ONCE);
        let mut parts = VecDeque::new();
        while let Some((start, bytes)) = chunks.try_next().await? {
            let part = cut(&bytes, start, &range)
                .ok_or_else(|| self.failed(&object.id, format!("chunk {start} does not hold {range:?}")))?;
            parts.push_back(part);
        }
        Ok(parts)
    }

    /// Fetches the chunk that holds `position` for a reader that is not there yet.
    pub async fn fetch_ahead(self: &Arc<Self>, object: Object, position: u64) {
        let key = (object.id, chunk_start(position));
        if position >= object.bytes || self.is_coming(object.id, position) {
            return;
        }
        count(&self.counters.ahead);
        // The reader that comes for it asks again and meets the failure.
        let _ = self.flight(object, key).await;
    }

    /// Whether the chunk that holds `position` is in memory or on its way there.
    pub fn is_coming(&self, object: SegmentId, position: u64) -> bool {
        let key = (object, chunk_start(position));
        let flights = self.flights.lock();
        let flies = flights.get(&key).and_then(WeakShared::upgrade).is_some();
        flies || self.memory.lock().contains(&key)
    }

    /// Drops the chunks that these bytes came from: they are damaged.
    pub fn forget(&self, object: SegmentId, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        for start in (chunk_start(range.start)..=chunk_start(range.end - 1)).step_by(CHUNK_BYTES as usize) {
            self.memory.lock().remove(&(object, start));
            if let Some(disk) = self.disk.get() {
                disk.forget(ChunkId { shard: self.shard, object, start });
            }
        }
    }

    /// Drops the chunks of objects that are not in `live`: nobody asks for them again, and deleted records are to go.
    pub fn retain(&self, live: &HashSet<SegmentId>) {
        self.memory.lock().retain(|(object, _)| live.contains(object));
        if let Some(disk) = self.disk.get() {
            disk.retain(self.shard, live);
        }
    }

    pub fn status(&self) -> CacheStatus {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let disk = self.disk.get();
        CacheStatus {
            memory_hits: load(&self.counters.memory_hits),
            memory_misses: load(&self.counters.memory_misses),
            disk_hits: load(&self.counters.disk_hits),
            disk_misses: load(&self.counters.disk_misses),
            ahead: load(&self.counters.ahead),
            disk_bytes: disk.map_or(0, |disk| disk.bytes()),
            disk_bytes_max: disk.map_or(0, |disk| disk.bytes_max()),
            disk_is_off: disk.is_some_and(|disk| disk.is_off()),
        }
    }

    /// The chunk that begins at `start`.
    async fn chunk(self: &Arc<Self>, object: Object, start: u64) -> Result<Bytes, StoreError> {
        let key = (object.id, start);
        if let Some(bytes) = self.memory.lock().get(&key).cloned() {
            count(&self.counters.memory_hits);
            return Ok(bytes);
        }
        count(&self.counters.memory_misses);
        self.flight(object, key).await
    }

    /// The request for a chunk that is under way, or a new one. It ends when all who wait for it have gone.
    fn flight(self: &Arc<Self>, object: Object, key: Key) -> Shared<Flight> {
        let mut flights = self.flights.lock();
        if let Some(flight) = flights.get(&key).and_then(WeakShared::upgrade) {
            return flight;
        }
        if flights.len() >= FLIGHTS_TIDY {
            flights.retain(|_, flight| flight.upgrade().is_some());
        }
        let chunks = self.clone();
        let flight: Flight = Box::pin(async move {
            // It may have arrived between the look that missed it and this.
            let known = chunks.memory.lock().get(&key).cloned();
            let loaded = match known {
                Some(bytes) => Ok(bytes),
                None => chunks.load(object, key).await,
            };
            if let Ok(bytes) = &loaded {
                chunks.memory.lock().insert(key, bytes.clone(), bytes.len() as u64 + ENTRY_BYTES);
            }
            chunks.flights.lock().remove(&key);
            loaded
        });
        let flight = flight.shared();
        flights.extend(flight.downgrade().map(|weak| (key, weak)));
        flight
    }

    async fn load(&self, object: Object, (id, start): Key) -> Result<Bytes, StoreError> {
        let end = start.saturating_add(CHUNK_BYTES).min(object.bytes);
        let name = ChunkId { shard: self.shard, object: id, start };
        if let Some(disk) = self.disk.get() {
            if let Some(bytes) = disk.get(name, (end - start) as usize).await {
                count(&self.counters.disk_hits);
                return Ok(bytes);
            }
            count(&self.counters.disk_misses);
        }
        let bytes = self.store.get_range(&self.keys.segment(&id), start..end).await?;
        if let Some(disk) = self.disk.get() {
            disk.keep(name, bytes.clone());
        }
        Ok(bytes)
    }

    fn failed(&self, object: &SegmentId, reason: String) -> StoreError {
        StoreError::Failed { operation: "GET", key: self.keys.segment(object), reason }
    }
}

/// Where the chunk that holds `position` begins.
pub(super) fn chunk_start(position: u64) -> u64 {
    position - position % CHUNK_BYTES
}

/// The part of `range` that lies in the chunk at `start`.
fn cut(chunk: &Bytes, start: u64, range: &Range<u64>) -> Option<Bytes> {
    let from = usize::try_from(range.start.saturating_sub(start)).ok()?;
    let to = usize::try_from((range.end - start).min(CHUNK_BYTES)).ok()?;
    (from <= to && to <= chunk.len()).then(|| chunk.slice(from..to))
}
