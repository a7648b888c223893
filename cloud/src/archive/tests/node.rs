//! A node for the archive's tests: a shard in memory that keeps its blocks through a crash, and an archive beside it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use parking_lot::Mutex;
use shared::batch::{Batch, BatchBuilder, Compression};
use shared::log::{BoxFuture, ReadLimits};
use shared::name::{Offset, Partition, TimestampMs, TopicId};
use tempfile::TempDir;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::faulty::Faulty;
use crate::archive::*;
use crate::block::{Block, BlockBuilder, BlockHeader, Placed};

pub fn partition(number: u8) -> Partition {
    Partition { topic: TopicId([number; 16]), index: 0 }
}

/// What the shard's state amounts to here: where each partition ends.
type State = BTreeMap<Partition, Offset>;

#[derive(Debug, Clone, Default)]
struct Content {
    epoch: u32,
    blocks: BTreeMap<u64, Bytes>,
    /// When those were appended that are not shipped.
    appended: BTreeMap<u64, (Instant, u64)>,
    unshipped_bytes: u64,
    next_seq: u64,
    state: State,
    shipped: u64,
    published: u64,
    fenced: Option<u32>,
    deleted: Vec<Partition>,
    log_starts: BTreeMap<Partition, Offset>,
    /// What the log's clock says, if not a millisecond per block.
    time_ms: Option<i64>,
    retention_ms: Option<i64>,
}

/// A shard in memory.
#[derive(Debug)]
pub struct Shard {
    content: Mutex<Content>,
    /// How much the WAL may hold, as it says; it takes more.
    pub wal_bytes_max: AtomicU64,
    next_seq: watch::Sender<u64>,
    /// Moves with each of `shipped`, `published` and `fenced`.
    events: watch::Sender<()>,
}

impl Shard {
    fn new(content: Content) -> Arc<Self> {
        let next_seq = watch::Sender::new(content.next_seq);
        let wal_bytes_max = AtomicU64::new(1 << 30);
        Arc::new(Self { content: Mutex::new(content), wal_bytes_max, next_seq, events: watch::Sender::new(()) })
    }

    /// Begins as a start would: from a snapshot, blocks of the bucket or its own, and an epoch block.
    pub fn open(recovered: Recovered, disk: Option<&Shard>) -> Arc<Self> {
        let mut content = disk.map(|disk| disk.content.lock().clone()).unwrap_or_default();
        (content.fenced, content.shipped, content.epoch) = (None, 0, recovered.epoch);
        let start = recovered.snapshot.as_ref().map_or(0, |snapshot| snapshot.next_seq);
        content.state = recovered
            .snapshot
            .map(|snapshot| postcard::from_bytes(&snapshot.state).expect("the state we wrote"))
            .unwrap_or_default();
        if let Tail::Bucket(blocks) = recovered.tail {
            content.blocks = blocks.into_iter().map(|block| (block.seq, block.bytes)).collect();
            content.next_seq = content.blocks.last_key_value().map_or(start, |(seq, _)| seq + 1);
        }
        let mut next = start;
        for (seq, bytes) in content.blocks.range(start..) {
            assert_eq!(*seq, next, "no block is missing");
            next += 1;
            let block = Block::parse(bytes.clone()).unwrap();
            for entry in block.entries() {
                let end = content.state.entry(entry.partition).or_default();
                assert!(entry.base >= *end, "offsets are not used twice");
                *end = entry.last + 1;
            }
        }
        content.next_seq = next;
        let shard = Self::new(content);
        shard.append(&[]);
        shard
    }

    /// A copy of the disk.
    pub fn image(&self) -> Arc<Self> {
        Self::new(self.content.lock().clone())
    }

    /// Appends one block with a batch of `records` records for each partition.
    pub fn append(&self, batches: &[(Partition, i32)]) {
        let mut content = self.content.lock();
        let mut builder = BlockBuilder::default();
        for (partition, records) in batches {
            let base_offset = *content.state.entry(*partition).or_default();
            let batch = batch(base_offset, *records);
            *content.state.entry(*partition).or_default() = base_offset + i64::from(*records);
            builder.push(Placed { partition: *partition, base_offset, leader_epoch: content.epoch as i32, batch });
        }
        let seq = content.next_seq;
        let header = BlockHeader {
            shard: 0,
            epoch: content.epoch,
            nonce: seq * 31 + u64::from(content.epoch),
            seq,
            append_ms: content.time_ms.unwrap_or(seq as i64),
        };
        // Another node's bytes differ: its nonce does.
        let header = BlockHeader { nonce: store::random() ^ header.nonce, ..header };
        let block = builder.finish(header);
        self.push(&mut content, block.bytes().clone());
    }

    /// Appends a block that only the shipper can read.
    pub fn append_opaque(&self, bytes: Bytes) {
        self.push(&mut self.content.lock(), bytes);
    }

    fn push(&self, content: &mut Content, bytes: Bytes) {
        let (seq, size) = (content.next_seq, bytes.len() as u64);
        content.appended.insert(seq, (Instant::now(), size));
        content.unshipped_bytes += size;
        content.blocks.insert(seq, bytes);
        content.next_seq += 1;
        self.next_seq.send_replace(content.next_seq);
    }

    /// Appends one block with the same batch of one record for each of many partitions, at offset `base`.
    pub fn append_each(&self, partitions: &[Partition], base: Offset) {
        let mut content = self.content.lock();
        let mut builder = BatchBuilder::default();
        builder.push(base * 60_000, Some(b"key"), Some(b"21.5"), &[]);
        let batch = builder.finish(base, Compression::None);
        let mut block = BlockBuilder::default();
        let leader_epoch = content.epoch as i32;
        for partition in partitions {
            content.state.insert(*partition, base + 1);
            block.push(Placed { partition: *partition, base_offset: base, leader_epoch, batch: batch.clone() });
        }
        let (seq, append_ms) = (content.next_seq, content.time_ms.unwrap_or(0));
        let header = BlockHeader { shard: 0, epoch: content.epoch, nonce: store::random(), seq, append_ms };
        self.push(&mut content, block.finish(header).bytes().clone());
    }

    pub fn state(&self) -> BTreeMap<Partition, Offset> {
        self.content.lock().state.clone()
    }

    pub fn delete(&self, partition: Partition) {
        self.content.lock().deleted.push(partition);
        self.append(&[]);
    }

    pub fn trim(&self, partition: Partition, log_start: Offset) {
        self.content.lock().log_starts.insert(partition, log_start);
        self.append(&[]);
    }

    /// Sets the log's clock.
    pub fn at_ms(&self, time_ms: i64) {
        self.content.lock().time_ms = Some(time_ms);
    }

    /// Sets `retention.ms` of every topic.
    pub fn keep_ms(&self, retention_ms: i64) {
        self.content.lock().retention_ms = Some(retention_ms);
    }

    pub fn positions(&self) -> (u64, u64, u64) {
        let content = self.content.lock();
        (content.next_seq, content.shipped, content.published)
    }

    pub fn fenced_by(&self) -> Option<u32> {
        self.content.lock().fenced
    }

    /// Waits until `reached` says so of (next, shipped, published) or the shard is fenced.
    pub async fn until(&self, reached: impl Fn((u64, u64, u64)) -> bool) {
        let mut events = self.events.subscribe();
        while !reached(self.positions()) && self.fenced_by().is_none() {
            let moved = tokio::time::timeout(Duration::from_secs(20), events.changed()).await;
            moved.expect("the archive goes on").expect("the shard is there");
        }
    }

    /// The batches of a partition in this shard's blocks, as stored.
    fn stored(&self, partition: Partition) -> Vec<Bytes> {
        let content = self.content.lock();
        let mut found = Vec::new();
        for bytes in content.blocks.values() {
            let block = Block::parse(bytes.clone()).unwrap();
            for entry in block.entries().iter().filter(|entry| entry.partition == partition) {
                found.extend(block.batches(entry).unwrap().into_iter().map(Batch::into_bytes));
            }
        }
        found
    }
}

/// Timestamps are ten times the offset.
fn batch(base: Offset, records: i32) -> Batch {
    let mut builder = BatchBuilder::default();
    for n in 0..i64::from(records) {
        builder.push((base + n) * 10, Some(b"key"), Some(&[b'v'; 100]), &[]);
    }
    builder.finish(base, Compression::None)
}

impl Source for Shard {
    fn durable(&self) -> Durable {
        let content = self.content.lock();
        let wal_bytes = content.blocks.values().map(|bytes| bytes.len() as u64).sum();
        Durable { next_seq: content.next_seq, wal_bytes, wal_bytes_max: self.wal_bytes_max.load(Ordering::Relaxed) }
    }

    fn backlog(&self) -> Option<Backlog> {
        let content = self.content.lock();
        let (oldest, _) = content.appended.values().next()?;
        Some(Backlog { bytes: content.unshipped_bytes, age: oldest.elapsed() })
    }

    fn wait(&self, seq: u64) -> BoxFuture<'static, ()> {
        let mut next = self.next_seq.subscribe();
        async move {
            let _ = next.wait_for(|next| *next > seq).await;
        }
        .boxed()
    }

    fn blocks(&self, from: u64, bytes_max: usize) -> BoxFuture<'_, Result<Vec<StoredBlock>, SourceError>> {
        async move {
            let content = self.content.lock();
            if let Some((&first, _)) = content.blocks.first_key_value().filter(|(first, _)| from < **first) {
                return Err(SourceError::Trimmed { requested: from, first });
            }
            let mut held = 0;
            let blocks = content.blocks.range(from..).take_while(|(_, bytes)| {
                held += bytes.len();
                held == bytes.len() || held <= bytes_max
            });
            Ok(blocks.map(|(seq, bytes)| StoredBlock { seq: *seq, bytes: bytes.clone() }).collect())
        }
        .boxed()
    }

    fn snapshot(&self) -> BoxFuture<'_, Result<Snapshot, SourceError>> {
        async move {
            let content = self.content.lock();
            let mut state = content.state.clone();
            state.retain(|partition, _| !content.deleted.contains(partition));
            let state = postcard::to_stdvec(&state).unwrap().into();
            Ok(Snapshot { next_seq: content.next_seq, state })
        }
        .boxed()
    }

    fn shipped(&self, next_seq: u64) {
        let mut content = self.content.lock();
        assert!(next_seq >= content.shipped && next_seq <= content.next_seq);
        content.shipped = next_seq;
        while let Some(entry) = content.appended.first_entry().filter(|entry| *entry.key() < next_seq) {
            let (_, bytes) = entry.remove();
            content.unshipped_bytes -= bytes;
        }
        self.events.send_replace(());
    }

    fn published(&self, trim: u64) {
        let mut content = self.content.lock();
        content.published = trim;
        let keep = trim.min(content.next_seq - 1);
        content.blocks = content.blocks.split_off(&keep);
        self.events.send_replace(());
    }

    fn fenced(&self, epoch: u32) {
        self.content.lock().fenced = Some(epoch);
        self.events.send_replace(());
    }

    fn now_ms(&self) -> TimestampMs {
        self.content.lock().time_ms.unwrap_or(0)
    }

    fn retained(&self, partition: Partition) -> Option<Retained> {
        let content = self.content.lock();
        let log_start = content.log_starts.get(&partition).copied().unwrap_or(0);
        (!content.deleted.contains(&partition))
            .then_some(Retained { log_start, retention_ms: content.retention_ms.unwrap_or(1) })
    }
}

impl LocalBlocks for Shard {
    fn bounds(&self) -> Option<(u64, u64)> {
        let content = self.content.lock();
        content.blocks.first_key_value().map(|(first, _)| (*first, content.next_seq))
    }

    fn read(&self, seq: u64) -> Result<Bytes, SourceError> {
        let content = self.content.lock();
        content.blocks.get(&seq).cloned().ok_or(SourceError::Storage(format!("no block {seq}")))
    }
}

/// Quick settings: ships at once, rolls when asked.
pub fn settings(data_dir: PathBuf) -> ArchiveSettings {
    ArchiveSettings {
        data_dir,
        max_lag: Duration::from_millis(4),
        ship_bytes: 2000,
        segment_bytes: 1 << 20,
        segment_age: Duration::from_secs(3600),
        grace: Duration::ZERO,
        requests: RequestSettings {
            timeout: Duration::from_millis(200),
            bytes_per_sec_min: u64::MAX,
            attempts: 3,
            backoff: Duration::from_millis(1),
            ..RequestSettings::default()
        },
        ..ArchiveSettings::default()
    }
}

/// A data directory and the disk image of a shard's WAL in it.
pub struct Home {
    pub dir: TempDir,
    pub disk: Option<Arc<Shard>>,
}

impl Home {
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), disk: None }
    }

    /// A copy of everything in it.
    pub fn image(&self) -> Self {
        let copy = Self::new();
        copy_dir(self.dir.path(), copy.dir.path());
        Self { disk: self.disk.as_ref().map(|disk| disk.image()), ..copy }
    }
}

fn copy_dir(from: &std::path::Path, to: &std::path::Path) {
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            std::fs::create_dir_all(&to).unwrap();
            copy_dir(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}

/// A running node.
pub struct Node {
    pub archive: Arc<Archive>,
    pub shard: Arc<Shard>,
    stop: Option<oneshot::Sender<()>>,
    task: Option<JoinHandle<()>>,
}

impl Node {
    /// Starts a node on `home` with the archive in `store`; `None` keeps segments in the data directory.
    pub async fn start(home: &mut Home, store: Option<&Faulty>) -> Result<Self, ArchiveError> {
        Self::start_with(home, store, settings(home.dir.path().into())).await
    }

    pub async fn start_with(
        home: &mut Home,
        store: Option<&Faulty>,
        settings: ArchiveSettings,
    ) -> Result<Self, ArchiveError> {
        let archive = match store {
            Some(store) => {
                let store = Store::new(Arc::new(store.clone()), "some/prefix".into(), settings.requests);
                let mirror = Store::directory(&home.dir.path().join("manifest"), settings.requests)?;
                Archive::with_stores(settings, store, Some(mirror)).await?
            }
            None => Archive::open(settings).await?,
        };
        Self::start_archive(home, archive).await
    }

    /// Starts a node whose local copy of the manifest is in `mirror`: a disk that costs no time.
    pub async fn start_quick(
        home: &mut Home,
        store: &Faulty,
        mirror: &Faulty,
        settings: ArchiveSettings,
    ) -> Result<Self, ArchiveError> {
        let store = Store::new(Arc::new(store.clone()), "some/prefix".into(), settings.requests);
        let mirror = Store::new(Arc::new(mirror.clone()), "".into(), settings.requests);
        Self::start_archive(home, Archive::with_stores(settings, store, Some(mirror)).await?).await
    }

    async fn start_archive(home: &mut Home, archive: Arc<Archive>) -> Result<Self, ArchiveError> {
        let recovered = match &home.disk {
            Some(disk) => archive.recover(disk.as_ref()).await?,
            None => archive.recover(&NoBlocks).await?,
        };
        let shard = Shard::open(recovered, home.disk.as_deref());
        home.disk = Some(shard.clone());
        let (stop, stopped) = oneshot::channel();
        let run = archive.clone().run(shard.clone(), async {
            let _ = stopped.await;
        });
        Ok(Self { archive, shard, stop: Some(stop), task: Some(tokio::spawn(run)) })
    }

    /// Ends at once, as a kill would.
    pub async fn kill(mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
            let _ = task.await;
        }
    }

    /// Ends in order.
    pub async fn stop(mut self) {
        drop(self.stop.take());
        if let Some(task) = self.task.take() {
            task.await.unwrap();
        }
    }

    /// Waits until everything is shipped.
    pub async fn shipped(&self) {
        let next = self.shard.positions().0;
        self.shard.until(|(_, shipped, _)| shipped >= next).await;
    }

    /// Bytes of blocks that are not shipped.
    pub fn backlog_bytes(&self) -> usize {
        self.shard.backlog().map_or(0, |backlog| backlog.bytes as usize)
    }

    /// Waits until everything is in segments.
    pub async fn split(&self) {
        let next = self.shard.positions().0;
        self.archive.roll_now();
        self.shard.until(|(_, _, published)| published >= next).await;
    }

    /// Every record of `partition`, from the cold tier and then the WAL: each offset once, whole and in order.
    pub async fn check_readable(&self, partition: Partition, from: Offset) {
        let end = self.shard.state().get(&partition).copied().unwrap_or(0);
        let cold = self.archive.cold();
        let mut next = from;
        while cold.bounds(partition).is_some_and(|bounds| next < bounds.next) {
            let read = cold.read(partition, next, ReadLimits { bytes_max: 3000 }).await.unwrap();
            assert!(!read.batches.is_empty());
            for slice in read.batches {
                next = follow(slice, next);
            }
            assert_eq!(next, read.next);
        }
        for bytes in self.shard.stored(partition) {
            let batch = Batch::parse(bytes.clone()).unwrap();
            if batch.base_offset() >= next {
                next = follow(bytes, next);
            }
        }
        assert_eq!(next, end, "{partition} is whole");
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
        }
    }
}

fn follow(mut bytes: Bytes, mut next: Offset) -> Offset {
    while let Some(batch) = Batch::split_first(&mut bytes).unwrap() {
        assert_eq!(batch.base_offset(), next, "no record is missing or twice");
        next = batch.last_offset() + 1;
    }
    next
}

/// A data directory without a WAL.
pub struct NoBlocks;

impl LocalBlocks for NoBlocks {
    fn bounds(&self) -> Option<(u64, u64)> {
        None
    }

    fn read(&self, seq: u64) -> Result<Bytes, SourceError> {
        Err(SourceError::Storage(format!("no block {seq}")))
    }
}
