//! Bytes of archive objects, by chunk: from memory, else from the local disk, else from the bucket.
//!
//! A chunk is an aligned piece of an object, so that neighbours share it whoever asks: a reader that goes on, readers of
//! the small runs that lie in one object, the run indexes at its end. Whoever asks for a chunk that is on its way already
//! waits for that one request. Nothing here knows what the bytes mean; who finds them damaged says [`Chunks::forget`].

mod disk;
mod two_queue;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::{Either, Ready, Shared, WeakShared, join_all, ready, try_join_all};
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
/// Chunks that one read waits for at the same time, and that one request brings at most.
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
/// A chunk at hand or on its way.
type Wanted = Either<Ready<Result<Bytes, StoreError>>, Shared<Flight>>;

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
    count_by(counter, 1);
}

fn count_by(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
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
        let mut parts = VecDeque::new();
        for window in windows(&range) {
            let chunks = self.wanted(object, &window);
            let hits = chunks.iter().filter(|chunk| matches!(chunk, Either::Left(_))).count();
            count_by(&self.counters.memory_hits, hits as u64);
            count_by(&self.counters.memory_misses, (chunks.len() - hits) as u64);
            for (start, bytes) in starts(&window).zip(try_join_all(chunks).await?) {
                let part = cut(&bytes, start, &range)
                    .ok_or_else(|| self.failed(&object.id, format!("chunk {start} does not hold {range:?}")))?;
                parts.push_back(part);
            }
        }
        Ok(parts)
    }

    /// Fetches the chunks of `range` for a reader that is not there yet. Who comes for what fails meets the failure.
    pub async fn fetch_ahead(self: &Arc<Self>, object: Object, range: Range<u64>) {
        let coming = starts(&range).filter(|start| self.is_coming(object.id, *start)).count();
        count_by(&self.counters.ahead, (starts(&range).count() - coming) as u64);
        self.fetch(object, range).await;
    }

    /// Fetches the chunks of `range`, as far as they can be had, for a reader that is about to ask for them.
    pub async fn fetch(self: &Arc<Self>, object: Object, range: Range<u64>) {
        for window in windows(&range) {
            join_all(self.wanted(object, &window)).await;
        }
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
        for start in starts(&range) {
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

    /// The chunks of a range in order, each from memory, by the request for it that is under way, or by a new one. Such a
    /// request ends when all who wait for it have gone.
    fn wanted(self: &Arc<Self>, object: Object, range: &Range<u64>) -> Vec<Wanted> {
        // Who brings a chunk puts it into memory before the flight goes: looked at in this order, and with flights locked
        // throughout, none is missed.
        let mut flights = self.flights.lock();
        if flights.len() >= FLIGHTS_TIDY {
            flights.retain(|_, flight| flight.upgrade().is_some());
        }
        let (mut wanted, mut lacking) = (BTreeMap::new(), Vec::new());
        for start in starts(range) {
            let key = (object.id, start);
            if let Some(flight) = flights.get(&key).and_then(WeakShared::upgrade) {
                wanted.insert(start, Either::Right(flight));
            } else if let Some(bytes) = self.memory.lock().get(&key) {
                wanted.insert(start, Either::Left(ready(Ok(bytes.clone()))));
            } else {
                lacking.push(start);
            }
        }
        for starts in lacking.chunk_by(|before, start| before + CHUNK_BYTES == *start) {
            for starts in starts.chunks(self.chunks_per_request()) {
                wanted.extend(self.begin(object, starts, &mut flights));
            }
        }
        wanted.into_values().collect()
    }

    /// Requests to a bucket are small, and several at a time; files are read in order.
    fn chunks_per_request(&self) -> usize {
        if self.store.is_local() && self.disk.get().is_none() { CHUNKS_AT_ONCE } else { 1 }
    }

    /// A new request for adjacent chunks, as a flight for each of them. If it fails each is asked for by itself: a bad place in
    /// a file is no reason not to read beside it.
    fn begin(
        self: &Arc<Self>,
        object: Object,
        starts: &[u64],
        flights: &mut HashMap<Key, WeakShared<Flight>>,
    ) -> Vec<(u64, Wanted)> {
        let (request, is_group) = (self.clone().load(object, starts.to_vec()).boxed().shared(), starts.len() > 1);
        let flight = |(index, start): (usize, &u64)| {
            let (chunks, request, key) = (self.clone(), request.clone(), (object.id, *start));
            let flight: Flight = Box::pin(async move {
                let missing = || chunks.failed(&object.id, format!("chunk {} did not come", key.1));
                let loaded = match request.await {
                    Err(_) if is_group => {
                        chunks.clone().load(object, vec![key.1]).await.map(|one| one.first().cloned())
                    }
                    loaded => loaded.map(|all| all.get(index).cloned()),
                };
                let loaded = loaded.and_then(|bytes| bytes.ok_or_else(missing));
                if let Ok(bytes) = &loaded {
                    chunks.memory.lock().insert(key, bytes.clone(), bytes.len() as u64 + ENTRY_BYTES);
                }
                chunks.flights.lock().remove(&key);
                loaded
            });
            let flight = flight.shared();
            flights.extend(flight.downgrade().map(|weak| (key, weak)));
            (*start, Either::Right(flight))
        };
        starts.iter().enumerate().map(flight).collect()
    }

    /// Adjacent chunks from where they are.
    async fn load(self: Arc<Self>, object: Object, starts: Vec<u64>) -> Result<Arc<[Bytes]>, StoreError> {
        let (Some(start), Some(last)) = (starts.first().copied(), starts.last()) else { return Ok(Arc::default()) };
        let end = last.saturating_add(CHUNK_BYTES).min(object.bytes);
        let name = ChunkId { shard: self.shard, object: object.id, start };
        // It may have been put in between since the group was made, and has one chunk per file.
        let disk = self.disk.get().filter(|_| starts.len() == 1);
        if let Some(disk) = disk {
            if let Some(bytes) = disk.get(name, (end - start) as usize).await {
                count(&self.counters.disk_hits);
                return Ok([bytes].into());
            }
            count(&self.counters.disk_misses);
        }
        let chunks = self.store.get_pieces(&self.keys.segment(&object.id), start..end, CHUNK_BYTES).await?;
        if let (Some(disk), Some(bytes)) = (disk, chunks.first()) {
            disk.keep(name, bytes.clone());
        }
        Ok(chunks.into())
    }

    fn failed(&self, object: &SegmentId, reason: String) -> StoreError {
        StoreError::Failed { operation: "GET", key: self.keys.segment(object), reason }
    }
}

/// Where the chunk that holds `position` begins.
pub(super) fn chunk_start(position: u64) -> u64 {
    position - position % CHUNK_BYTES
}

/// Where the chunks of a range begin.
pub(super) fn starts(range: &Range<u64>) -> impl Iterator<Item = u64> + use<> {
    (chunk_start(range.start)..range.end).step_by(CHUNK_BYTES as usize)
}

/// A range in parts of [`CHUNKS_AT_ONCE`] chunks.
fn windows(range: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
    let (bytes, range) = (CHUNKS_AT_ONCE as u64 * CHUNK_BYTES, range.clone());
    let starts = (chunk_start(range.start)..range.end).step_by(bytes as usize);
    starts.map(move |start| start.max(range.start)..range.end.min(start.saturating_add(bytes)))
}

/// The part of `range` that lies in the chunk at `start`.
fn cut(chunk: &Bytes, start: u64, range: &Range<u64>) -> Option<Bytes> {
    let from = usize::try_from(range.start.saturating_sub(start)).ok()?;
    let to = usize::try_from((range.end - start).min(CHUNK_BYTES)).ok()?;
    (from <= to && to <= chunk.len()).then(|| chunk.slice(from..to))
}
