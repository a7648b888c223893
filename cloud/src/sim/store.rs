//! The object store: every node sees it through a network of its own, which is slow, loses answers, cuts bodies, refuses.
//!
//! A request that has left its node goes on by itself: it may arrive after the node gave it up, or after the node is gone.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::BoxStream;
use futures_util::{StreamExt, TryStreamExt};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use parking_lot::Mutex;
use shared::name::{Offset, Partition};
use tokio::sync::oneshot;

use super::node::{MANY, PREFIX};
use super::scheduler::{Owner, Processes, WORLD};
use super::{chance, draw, fail, note};
use crate::block::Block;
use crate::manifest::sequence_of;

/// What goes wrong, for all nodes or for one.
#[derive(Debug, Default, Clone)]
pub struct Weather {
    /// Nothing is reached.
    pub down: bool,
    /// Every request is refused.
    pub refused: bool,
    /// So many requests in a thousand go wrong in one way or another.
    pub per_mille: u64,
    /// Usual milliseconds of a request.
    pub latency_ms: u64,
    /// Roots do not arrive.
    pub no_roots: bool,
}

/// The bucket, and the weather around it.
#[derive(Clone)]
pub struct Bucket {
    pub content: Arc<InMemory>,
    processes: Processes,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    weather: Weather,
    nodes: BTreeMap<Owner, Weather>,
    wals: BTreeMap<u32, Wal>,
}

/// All WAL objects of a shard that there ever were.
#[derive(Default)]
struct Wal {
    /// First block's number to checksum and epochs of the first and last block.
    made: BTreeMap<u64, (u32, u32, u32)>,
    /// The epoch whose take-over is complete.
    owner: u32,
    /// Where the records that are in the bucket end.
    ends: BTreeMap<Partition, Offset>,
    /// The number after the newest block in the bucket.
    next: u64,
}

/// The bucket as one node sees it.
#[derive(Clone)]
pub struct View {
    bucket: Bucket,
    owner: Owner,
}

enum Fate {
    Well,
    /// It does not arrive.
    Lost,
    /// 5xx, nothing done.
    Refused,
    /// 409 with nothing done: two requests met.
    Conflict,
    /// It is done, and the answer is a 5xx.
    DoneButFailed,
    /// It is done, and no answer comes.
    DoneInSilence,
    /// It arrives long after.
    Late,
    /// The body ends early.
    Cut,
}

fn error(text: &'static str) -> Error {
    Error::Generic { store: "bucket", source: text.into() }
}

impl Bucket {
    pub fn new(processes: Processes) -> Self {
        let weather = Weather { latency_ms: 10, ..Weather::default() };
        let state = State { weather, ..State::default() };
        Self { content: Arc::new(InMemory::new()), processes, state: Arc::new(Mutex::new(state)) }
    }

    pub fn seen_by(&self, owner: Owner) -> View {
        View { bucket: self.clone(), owner }
    }

    /// Changes the weather for all.
    pub fn change(&self, change: impl FnOnce(&mut Weather)) {
        change(&mut self.state.lock().weather);
    }

    /// Changes the weather for one node.
    pub fn change_for(&self, owner: Owner, change: impl FnOnce(&mut Weather)) {
        change(self.state.lock().nodes.entry(owner).or_default());
    }

    pub fn clear_up(&self) {
        let mut state = self.state.lock();
        state.nodes.clear();
        state.weather = Weather { latency_ms: 10, ..Weather::default() };
    }

    /// A node has finished to take the shard over.
    pub fn taken_over(&self, shard: u32, epoch: u32) {
        let mut state = self.state.lock();
        let wal = state.wals.entry(shard).or_default();
        wal.owner = wal.owner.max(epoch);
    }

    /// Where the records of a partition that are in the bucket's WAL objects end.
    pub fn shipped(&self, shard: u32, partition: Partition) -> Offset {
        let state = self.state.lock();
        state.wals.get(&shard).and_then(|wal| wal.ends.get(&partition).copied()).unwrap_or(0)
    }

    /// The number after the newest block in a shard's WAL objects.
    pub fn shipped_blocks(&self, shard: u32) -> u64 {
        self.state.lock().wals.get(&shard).map_or(0, |wal| wal.next)
    }

    /// An object was made. WAL objects are looked into: never two contents of one number, never a deposed owner's.
    fn made(&self, key: &Path, payload: &PutPayload) {
        let text = key.as_ref();
        let (text, first) = match text.strip_prefix(PREFIX) {
            Some(rest) => (rest.trim_start_matches('/'), MANY),
            None => (text, 0),
        };
        let Some(rest) = text.strip_prefix("shards/") else { return };
        let Some((shard, rest)) = rest.split_once('/') else { return };
        let (Ok(shard), true) = (shard.parse::<u32>(), rest.starts_with("wal/")) else { return };
        let shard = first + shard;
        let Some(seq) = sequence_of(key) else { return };
        let bytes: Bytes = payload.iter().flat_map(|chunk| chunk.iter().copied()).collect::<Vec<u8>>().into();
        let crc = crc32c::crc32c(&bytes);
        let mut state = self.state.lock();
        let wal = state.wals.entry(shard).or_default();
        if let Some((known, ..)) = wal.made.get(&seq) {
            if *known != crc {
                fail(format!("WAL object {seq} of shard {shard} was made twice, with other bytes"));
            }
            return;
        }
        let (mut rest, mut epochs) = (bytes, Vec::new());
        while let Ok(Some(block)) = Block::split_first(&mut rest) {
            epochs.push(block.header().epoch);
            wal.next = wal.next.max(block.header().seq + 1);
            for entry in block.entries() {
                let end = wal.ends.entry(entry.partition).or_default();
                *end = (*end).max(entry.last + 1);
            }
        }
        let (first, last) = (epochs.first().copied().unwrap_or(0), epochs.last().copied().unwrap_or(0));
        note(|| format!("bucket: shard {shard} WAL {seq}, {} blocks, epoch {last}", epochs.len()));
        if last < wal.owner {
            fail(format!("epoch {last} wrote WAL object {seq} of shard {shard} after epoch {} took over", wal.owner));
        }
        let before = wal.made.range(..seq).map(|(_, (.., last))| *last).max().unwrap_or(0);
        if first < before {
            fail(format!("WAL object {seq} of shard {shard} has epoch {first}, an earlier one has {before}"));
        }
        wal.made.insert(seq, (crc, first, last));
    }
}

impl View {
    fn fate(&self, root: bool) -> (Fate, Duration) {
        let (weather, own) = {
            let state = self.bucket.state.lock();
            (state.weather.clone(), state.nodes.get(&self.owner).cloned().unwrap_or_default())
        };
        let latency = weather.latency_ms + own.latency_ms;
        let delay = Duration::from_millis(1 + draw(latency.max(1) * 2));
        let fate = if root && own.no_roots {
            Fate::Lost
        } else if weather.down || own.down {
            if chance(500) { Fate::Lost } else { Fate::Refused }
        } else if weather.refused || own.refused {
            Fate::Refused
        } else if chance(weather.per_mille + own.per_mille) {
            match draw(7) {
                0 => Fate::Lost,
                1 => Fate::Refused,
                2 => Fate::Conflict,
                3 => Fate::DoneButFailed,
                4 => Fate::DoneInSilence,
                5 => Fate::Late,
                _ => Fate::Cut,
            }
        } else {
            Fate::Well
        };
        (fate, delay)
    }

    /// Sends a request on its way. `Ok(true)`: the body is to be cut.
    async fn ask<T: Send + 'static>(
        &self,
        write: bool,
        request: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<(T, bool)> {
        self.ask_for(false, write, request).await
    }

    /// The same, where it matters whether the request makes a root.
    async fn ask_for<T: Send + 'static>(
        &self,
        root: bool,
        write: bool,
        request: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<(T, bool)> {
        let (fate, delay) = self.fate(root);
        let late = if matches!(fate, Fate::Late) { Duration::from_millis(draw(60_000)) } else { Duration::ZERO };
        match fate {
            Fate::Lost => return std::future::pending().await,
            Fate::Refused => {
                tokio::time::sleep(delay).await;
                return Err(error("503 before"));
            }
            Fate::Conflict if write => {
                tokio::time::sleep(delay).await;
                return Err(Error::AlreadyExists { path: "?".into(), source: "409, two requests met".into() });
            }
            _ => {}
        }
        let (tell, told) = oneshot::channel();
        self.bucket.processes.spawn(WORLD, async move {
            tokio::time::sleep(delay + late).await;
            let answer = request.await;
            tokio::time::sleep(delay).await;
            let _ = tell.send(answer);
        });
        let answer = match told.await {
            Ok(answer) => answer,
            Err(_) => std::future::pending().await,
        };
        match fate {
            Fate::DoneButFailed => Err(error("503 after")),
            Fate::DoneInSilence => std::future::pending().await,
            Fate::Cut if !write => answer.map(|found| (found, true)),
            _ => answer.map(|found| (found, false)),
        }
    }
}

impl fmt::Debug for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the bucket as {} sees it", self.owner)
    }
}

impl fmt::Display for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the bucket")
    }
}

#[async_trait]
impl ObjectStore for View {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        let is_root = location.as_ref().contains("/manifest/");
        let (bucket, location) = (self.bucket.clone(), location.clone());
        let put = async move {
            let made = bucket.content.put_opts(&location, payload.clone(), opts).await?;
            bucket.made(&location, &payload);
            Ok(made)
        };
        Ok(self.ask_for(is_root, true, put).await?.0)
    }

    async fn put_multipart_opts(&self, _: &Path, _: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        Err(error("no multipart here"))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let (content, location) = (self.bucket.content.clone(), location.clone());
        let (result, cut) = self.ask(false, async move { content.get_opts(&location, options).await }).await?;
        if !cut {
            return Ok(result);
        }
        let (meta, range, attributes, extensions) =
            (result.meta.clone(), result.range.clone(), result.attributes.clone(), result.extensions.clone());
        let bytes = result.bytes().await?;
        let half = bytes.slice(..bytes.len() / 2);
        let payload = GetResultPayload::Stream(futures_util::stream::once(async { Ok(half) }).boxed());
        Ok(GetResult { payload, meta, range, attributes, extensions })
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let view = self.clone();
        let delete = move |location: Result<Path>| {
            let view = view.clone();
            async move {
                let location = location?;
                let content = view.bucket.content.clone();
                let key = location.clone();
                let delete = async move {
                    let one = futures_util::stream::once(async { Ok(key) }).boxed();
                    content.delete_stream(one).try_collect::<Vec<Path>>().await
                };
                view.ask(true, delete).await?;
                note(|| format!("bucket: {location} deleted"));
                Ok(location)
            }
        };
        locations.then(delete).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (view, prefix) = (self.clone(), prefix.cloned());
        let list = async move {
            let content = view.bucket.content.clone();
            let list = async move { content.list(prefix.as_ref()).try_collect::<Vec<ObjectMeta>>().await };
            let (found, cut) = view.ask(false, list).await?;
            if cut { Err(error("the listing was cut")) } else { Ok(found) }
        };
        let found = futures_util::stream::once(list);
        found.map_ok(|found| futures_util::stream::iter(found.into_iter().map(Ok))).try_flatten().boxed()
    }

    async fn list_with_delimiter(&self, _: Option<&Path>) -> Result<ListResult> {
        Err(error("no such listing here"))
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
        Err(error("no copies here"))
    }
}
