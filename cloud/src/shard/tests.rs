use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, Ordering};

use shared::batch::Batch;
use shared::log::conformance::{
    self, Engine, batch, block_on, from_edge, from_producer, poll_once, produced, read_all, sized, split, stream,
};
use shared::name::{TopicId, TopicName};
use tempfile::TempDir;

use super::*;
use crate::archive::{ColdBounds, ColdRead, ColdRun, Snapshot, Source, StoredBlock, Tail};
use crate::block::{Block, BlockBuilder, BlockHeader};
use crate::state::{Topic, TopicChange, read_state};
use crate::wal::disk::Directory;
use crate::wal::file::{FileWal, FileWalSettings};
use crate::wal::memory::MemoryWal;

mod ahead;
mod clock;
mod flight;
mod full;
mod lease;
mod powercut;
mod replay;
mod room;
mod tiers;

const WAL_BYTES: u64 = 2 << 20;

fn topic(n: u8, partitions: u32) -> Topic {
    let name = TopicName::parse(&format!("topic-{n}")).unwrap();
    Topic { id: TopicId([n; 16]), name, partitions, configs: BTreeMap::new(), created_ms: 0 }
}

fn partition(n: u8) -> Partition {
    Partition { topic: TopicId([n; 16]), index: 0 }
}

fn clock() -> Clock {
    Arc::new(|| 1_000)
}

fn open(wal: impl BlockLog) -> Arc<Shard> {
    Shard::open(ShardSettings::default(), Box::new(wal), Recovered::default(), None, clock()).unwrap()
}

/// A shard with topic 1 in memory, and its WAL.
fn shard() -> (Arc<Shard>, MemoryWal) {
    let wal = MemoryWal::new(WAL_BYTES);
    let shard = open(wal.clone());
    block_on(shard.commit(vec![Change::created(topic(1, 1))])).unwrap();
    (shard, wal)
}

fn append(shard: &Shard, batch: Batch) -> Result<Appended, AppendError> {
    block_on(shard.append(from_producer(partition(1), batch)))
}

// ---- the contract, on each engine ----

type MakeWal = Box<dyn FnMut() -> Box<dyn BlockLog>>;

struct UnderTest {
    shard: Option<Arc<Shard>>,
    make_wal: MakeWal,
    settings: ShardSettings,
    topics: u8,
    _directory: Option<TempDir>,
}

impl UnderTest {
    fn new(mut make_wal: MakeWal, settings: ShardSettings, directory: Option<TempDir>) -> Self {
        let wal = make_wal();
        let shard = Shard::open(settings.clone(), wal, Recovered::default(), None, clock()).unwrap();
        Self { shard: Some(shard), make_wal, settings, topics: 0, _directory: directory }
    }

    fn shard(&self) -> &Arc<Shard> {
        self.shard.as_ref().unwrap()
    }
}

impl Engine for UnderTest {
    fn log(&self) -> Arc<dyn Log> {
        self.shard().clone()
    }

    fn create(&mut self) -> Partition {
        self.topics += 1;
        block_on(self.shard().commit(vec![Change::created(topic(self.topics, 1))])).unwrap();
        partition(self.topics)
    }

    fn reopen(&mut self) -> bool {
        self.shard.take().unwrap().close();
        let wal = (self.make_wal)();
        let recovered = Recovered::default();
        self.shard = Some(Shard::open(self.settings.clone(), wal, recovered, None, clock()).unwrap());
        true
    }

    fn bytes_until_full(&self) -> Option<usize> {
        Some(WAL_BYTES as usize)
    }

    fn make_room(&mut self) {
        let next = self.shard().durable().next_seq;
        self.shard().published(next);
    }
}

fn file_wal(directory: &TempDir) -> FileWal {
    let settings =
        FileWalSettings { file_bytes: 256 << 10, hasty_file_bytes: 64 << 10, bytes_max: WAL_BYTES, background: true };
    FileWal::open(Box::new(Directory::open(directory.path()).unwrap()), settings, 7).unwrap()
}

#[test]
fn the_memory_engine_keeps_the_contract() {
    conformance::run(&mut || {
        let wal = MemoryWal::new(WAL_BYTES);
        let make: MakeWal = Box::new(move || Box::new(wal.clone()));
        Box::new(UnderTest::new(make, ShardSettings::default(), None))
    });
}

#[test]
fn the_file_engine_keeps_the_contract() {
    // With a tail of nothing every read goes to the disk.
    for tail_bytes_max in [0, 64 << 20] {
        conformance::run(&mut || {
            let directory = TempDir::new().unwrap();
            let path = directory.path().to_owned();
            let make: MakeWal = Box::new(move || {
                let settings = FileWalSettings {
                    file_bytes: 256 << 10,
                    hasty_file_bytes: 64 << 10,
                    bytes_max: WAL_BYTES,
                    background: true,
                };
                Box::new(FileWal::open(Box::new(Directory::open(&path).unwrap()), settings, 7).unwrap())
            });
            let settings = ShardSettings { tail_bytes_max, ..ShardSettings::default() };
            Box::new(UnderTest::new(make, settings, Some(directory)))
        });
    }
}

#[test]
fn within_a_runtime_the_contract_is_kept_too() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
    let _entered = runtime.enter();
    conformance::run(&mut || {
        let wal = MemoryWal::new(WAL_BYTES);
        let make: MakeWal = Box::new(move || Box::new(wal.clone()));
        // With a tail of nothing every read goes to another thread.
        let settings = ShardSettings { tail_bytes_max: 0, ..ShardSettings::default() };
        Box::new(UnderTest::new(make, settings, None))
    });
}

// ---- topics ----

#[test]
fn a_deleted_topic_is_gone_at_once_and_for_good() {
    let (shard, wal) = shard();
    append(&shard, batch(1, 1)).unwrap();
    let waiting = Log::wait(&*shard, partition(1), 1);
    let deletion = shard.commit(vec![Change::Topics(TopicChange::Deleted { id: TopicId([1; 16]) })]);
    let unknown = AppendError::UnknownPartition(partition(1));
    assert_eq!(append(&shard, batch(1, 1)), Err(unknown), "while the deletion is in flight");
    block_on(deletion).unwrap();
    assert_eq!(block_on(waiting), Err(ReadError::UnknownPartition(partition(1))));
    assert_eq!(shard.status().index_entries, 0);
    shard.close();
    assert!(open(wal).bounds(partition(1)).is_err());
}

// ---- tiers ----

/// What a splitter would have made of the shard's blocks.
#[derive(Default)]
struct ColdBlocks {
    blocks: Mutex<Vec<Block>>,
    /// What the next read waits for.
    gate: Mutex<Option<tokio::sync::oneshot::Receiver<()>>>,
    /// Batches below are covered, and compaction left nothing of them.
    compacted: AtomicI64,
}

impl ColdBlocks {
    fn batches(&self, partition: Partition) -> Vec<Batch> {
        let blocks = self.blocks.lock();
        let entries = blocks.iter().flat_map(|block| block.entries().iter().map(move |entry| (block, entry)));
        entries
            .filter(|(_, entry)| entry.partition == partition)
            .flat_map(|(block, entry)| block.batches(entry).unwrap())
            .collect()
    }
}

impl ColdTier for ColdBlocks {
    fn bounds(&self, partition: Partition) -> Option<ColdBounds> {
        let batches = self.batches(partition);
        let bytes = batches.iter().map(|batch| batch.len() as u64).sum();
        let next = batches.last()?.last_offset() + 1;
        Some(ColdBounds { first: batches.first()?.base_offset(), next, bytes })
    }
    fn runs(&self, partition: Partition) -> Vec<ColdRun> {
        let run = |batch: &Batch| ColdRun {
            base: batch.base_offset(),
            next: batch.last_offset() + 1,
            bytes: batch.len() as u64,
            max_timestamp: batch.max_timestamp(),
            appended_ms: 1_000,
        };
        self.batches(partition).iter().map(run).collect()
    }
    fn read(
        &self,
        partition: Partition,
        from: Offset,
        limits: ReadLimits,
    ) -> BoxFuture<'_, Result<ColdRead, ReadError>> {
        let gate = self.gate.lock().take();
        Box::pin(async move {
            if let Some(gate) = gate {
                let _ = gate.await;
            }
            let mut read = ColdRead { batches: Vec::new(), next: from };
            for batch in self.batches(partition).into_iter().filter(|batch| batch.last_offset() >= from) {
                if read.batches.iter().map(Bytes::len).sum::<usize>() >= limits.bytes_max {
                    break;
                }
                read.next = batch.last_offset() + 1;
                if read.next > self.compacted.load(Ordering::SeqCst) {
                    read.batches.push(batch.into_bytes());
                }
            }
            Ok(read)
        })
    }
    fn find_time(
        &self,
        partition: Partition,
        from: Offset,
        at: TimestampMs,
    ) -> BoxFuture<'_, Result<Option<TimePoint>, ReadError>> {
        let batches = self.batches(partition);
        let found = batches.iter().find_map(|batch| shared::log::memory::first_at_or_after(batch, from, at));
        Box::pin(std::future::ready(Ok(found)))
    }
    fn max_time(&self, partition: Partition, from: Offset) -> BoxFuture<'_, Result<Option<TimePoint>, ReadError>> {
        let batches = self.batches(partition);
        let latest = batches.iter().map(Batch::max_timestamp).max().unwrap_or(0);
        let found = batches.iter().find_map(|batch| shared::log::memory::first_at_or_after(batch, from, latest));
        Box::pin(std::future::ready(Ok(found)))
    }
}

#[test]
fn a_reader_cannot_tell_where_the_archive_ends() {
    let cold = Arc::new(ColdBlocks::default());
    let wal = MemoryWal::new(WAL_BYTES);
    let shard = Shard::open(
        ShardSettings { tail_bytes_max: 1_000, ..ShardSettings::default() },
        Box::new(wal.clone()),
        Recovered::default(),
        Some(cold.clone()),
        clock(),
    )
    .unwrap();
    block_on(shard.commit(vec![Change::created(topic(1, 1))])).unwrap();
    (0..30).for_each(|n| {
        append(&shard, batch(3, 100 * n)).unwrap();
    });
    let expected = read_all(&*shard, partition(1), 0, 700);
    for trim in [1, 11, 25, 31] {
        let blocks = block_on(shard.blocks(wal.bounds().unwrap().0, 1 << 20)).unwrap();
        let mut archived = cold.blocks.lock();
        let known = archived.len() as u64;
        let new = blocks.into_iter().filter(|block| (known..trim).contains(&block.seq));
        archived.extend(new.map(|block| Block::parse(block.bytes).unwrap()));
        drop(archived);
        shard.shipped(trim);
        shard.published(trim);
        assert_eq!(read_all(&*shard, partition(1), 0, 700), expected, "trimmed to {trim}");
        for at in [0, 1_001, 2_002, 2_900] {
            let found = block_on(shard.find_time(partition(1), at)).unwrap().unwrap();
            assert_eq!(found.timestamp, at.div_euclid(100) * 100 + at % 100, "at {at}, trimmed to {trim}");
        }
        assert_eq!(block_on(shard.max_time(partition(1))).unwrap().unwrap().offset, 89);
        assert!(matches!(
            block_on(shard.blocks(0, 1)),
            Err(SourceError::Trimmed { requested: 0, first }) if first == trim.min(30)
        ));
    }
}

#[test]
fn what_is_shipped_is_safe() {
    let (shard, _wal) = shard();
    let key = stream(1, 1);
    block_on(shard.append(from_edge(partition(1), &key, 0, 9))).unwrap();
    block_on(shard.append(from_edge(partition(1), &key, 10, 19))).unwrap();
    assert_eq!(shard.safe(&key), None);
    let mut changed = shard.safety_changed();
    assert!(poll_once(&mut changed).is_none());
    shard.shipped(2);
    assert!(poll_once(&mut changed).is_some());
    assert_eq!(shard.safe(&key), Some(10));
    shard.shipped(3);
    assert_eq!(shard.safe(&key), Some(20));
}

#[tokio::test(start_paused = true)]
async fn retention_goes_by_append_time_and_size() {
    let settings = ShardSettings { retention_ms: 500, ..ShardSettings::default() };
    let wal = MemoryWal::new(WAL_BYTES);
    let shard = Shard::open(settings, Box::new(wal), Recovered::default(), None, clock()).unwrap();
    block_on(shard.commit(vec![Change::created(topic(1, 1))])).unwrap();
    for _ in 0..3 {
        tokio::time::advance(Duration::from_millis(200)).await;
        // Whatever the device's clock says.
        append(&shard, batch(10, 4_000_000_000_000)).unwrap();
    }
    assert_eq!(block_on(shard.apply_retention()), Ok(0));
    tokio::time::advance(Duration::from_millis(350)).await;
    assert_eq!(block_on(shard.apply_retention()), Ok(1));
    assert_eq!(shard.bounds(partition(1)).unwrap().log_start, 20);
    let configs = BTreeMap::from([("retention.ms".to_owned(), "-1".to_owned())]);
    block_on(shard.commit(vec![Change::Topics(TopicChange::Configured { id: TopicId([1; 16]), configs })])).unwrap();
    tokio::time::advance(Duration::from_secs(1_000)).await;
    assert_eq!(block_on(shard.apply_retention()), Ok(0));
    let configs = BTreeMap::from([("retention.bytes".to_owned(), "0".to_owned())]);
    block_on(shard.commit(vec![Change::Topics(TopicChange::Configured { id: TopicId([1; 16]), configs })])).unwrap();
    assert_eq!(block_on(shard.apply_retention()), Ok(1));
    let bounds = shard.bounds(partition(1)).unwrap();
    assert_eq!((bounds.log_start, bounds.high_watermark), (30, 30));
}

/// An archive of many runs, which counts how often it must show them all.
#[derive(Default)]
struct ManyRuns {
    walks: AtomicI64,
}

impl ColdTier for ManyRuns {
    fn bounds(&self, _: Partition) -> Option<ColdBounds> {
        Some(ColdBounds { first: 0, next: 10, bytes: 1_000 })
    }
    fn runs(&self, partition: Partition) -> Vec<ColdRun> {
        self.walks.fetch_add(1, Ordering::SeqCst);
        (0..10).filter_map(|from| self.oldest(partition, from)).collect()
    }
    fn oldest(&self, _: Partition, from: Offset) -> Option<ColdRun> {
        let at = 1_000 + from * 100;
        let run = ColdRun { base: from, next: from + 1, bytes: 100, max_timestamp: 0, appended_ms: at };
        (0..10).contains(&from).then_some(run)
    }
    fn read(&self, _: Partition, from: Offset, _: ReadLimits) -> BoxFuture<'_, Result<ColdRead, ReadError>> {
        Box::pin(std::future::ready(Ok(ColdRead { batches: Vec::new(), next: from })))
    }
    fn find_time(
        &self,
        _: Partition,
        _: Offset,
        _: TimestampMs,
    ) -> BoxFuture<'_, Result<Option<TimePoint>, ReadError>> {
        Box::pin(std::future::ready(Ok(None)))
    }
    fn max_time(&self, _: Partition, _: Offset) -> BoxFuture<'_, Result<Option<TimePoint>, ReadError>> {
        Box::pin(std::future::ready(Ok(None)))
    }
}

#[tokio::test(start_paused = true)]
async fn retention_looks_at_the_oldest_run_alone_until_that_may_go() {
    let cold = Arc::new(ManyRuns::default());
    let settings = ShardSettings { retention_ms: 500, ..ShardSettings::default() };
    let wal = Box::new(MemoryWal::new(WAL_BYTES));
    let shard = Shard::open(settings, wal, Recovered::default(), Some(cold.clone()), clock()).unwrap();
    block_on(shard.commit(vec![Change::created(topic(1, 1))])).unwrap();
    append(&shard, batch(10, 1)).unwrap();
    let begun = Instant::now();
    for (at, moved, walks) in [(1_200, 0, 0), (1_500, 0, 0), (1_750, 1, 1), (1_760, 0, 1), (1_850, 1, 2)] {
        tokio::time::advance(Duration::from_millis(at - 1_000) - begun.elapsed()).await;
        assert_eq!(block_on(shard.apply_retention()), Ok(moved), "at {at}");
        assert_eq!(cold.walks.load(Ordering::SeqCst), walks, "at {at}");
    }
    assert_eq!(shard.bounds(partition(1)).unwrap().log_start, 4);
}

// ---- recovery ----

#[test]
fn a_snapshot_and_the_wal_behind_it_give_the_same_state() {
    let (shard, wal) = shard();
    block_on(shard.append(from_edge(partition(1), &stream(1, 1), 0, 9))).unwrap();
    append(&shard, produced(&batch(3, 1), 7, 0, 0)).unwrap();
    let snapshot = block_on(shard.snapshot()).unwrap();
    assert_eq!(snapshot.next_seq, 3);
    append(&shard, produced(&batch(3, 1), 7, 0, 3)).unwrap();
    shard.published(2);
    let expected = read_state(&*shard, State::clone);
    shard.close();
    let recovered = Recovered { snapshot: Some(snapshot.clone()), tail: Tail::Local, epoch: 4 };
    let again = Shard::open(ShardSettings::default(), Box::new(wal.clone()), recovered, None, clock()).unwrap();
    assert_eq!(read_state(&*again, State::clone), expected);
    assert_eq!(again.safe(&stream(1, 1)), Some(10), "what the archived snapshot knows is safe");
    assert_eq!(read_all(&*again, partition(1), 10, 1 << 20).len(), 2);
    append(&again, batch(1, 1)).unwrap();
    assert_eq!(Block::parse(wal.read(4).unwrap()).unwrap().header().epoch, 4);
    drop(again);
    let late = Recovered { snapshot: Some(Snapshot { next_seq: 1, ..snapshot }), ..Recovered::default() };
    let refused = Shard::open(ShardSettings::default(), Box::new(wal), late, None, clock()).err().unwrap();
    assert!(matches!(refused, OpenError::Hole { first: 2, snapshot: 1, .. }), "{refused}");
}

#[test]
fn after_a_restore_no_offset_is_used_twice() {
    let (shard, _lost) = shard();
    append(&shard, batch(10, 1)).unwrap();
    let blocks = block_on(shard.blocks(0, 1 << 20)).unwrap();
    // Acknowledged, read by somebody, and not in the bucket.
    append(&shard, batch(10, 1)).unwrap();
    shard.close();
    let directory = TempDir::new().unwrap();
    let restore = |blocks: Vec<StoredBlock>| Recovered { snapshot: None, tail: Tail::Bucket(blocks), epoch: 1 };
    let again =
        Shard::open(ShardSettings::default(), Box::new(file_wal(&directory)), restore(blocks.clone()), None, clock())
            .unwrap();
    let bounds = again.bounds(partition(1)).unwrap();
    let begun = 10 + (1 << 32);
    assert_eq!((bounds.high_watermark, bounds.leader_epoch), (begun + 1, 1));
    assert_eq!(again.epoch_end(partition(1), 0).unwrap().unwrap().end, begun);
    // A consumer at the end or beyond it comes to the new end by a record that it does not see.
    for from in [10, 15, begun] {
        let read = block_on(again.read(partition(1), from, ReadLimits { bytes_max: 1 })).unwrap();
        let marker = &split(&read)[0];
        assert!(marker.is_control() && marker.leader_epoch() == 1);
        assert_eq!((marker.base_offset(), read.next), (begun, bounds.high_watermark));
    }
    assert_eq!(append(&again, batch(1, 1)).unwrap().base_offset, begun + 1);
    assert_eq!(read_all(&*again, partition(1), 0, 1 << 20).len(), 3);
    again.close();
    drop(again);
    let settled =
        Shard::open(ShardSettings::default(), Box::new(file_wal(&directory)), Recovered::default(), None, clock())
            .unwrap();
    assert_eq!(settled.bounds(partition(1)).unwrap().high_watermark, 12 + (1 << 32));
    drop(settled);
    // A start that dies before the epoch is raised leaves nothing that could pass for a whole log.
    let wal = file_wal(&directory);
    wal.reset(0).unwrap();
    wal.append(0, &blocks[0].bytes).unwrap();
    drop(wal);
    assert_eq!(file_wal(&directory).bounds(), None);
}

#[test]
fn offsets_of_lives_that_left_no_more_than_a_fence_are_not_used_either() {
    let (shard, _lost) = shard();
    append(&shard, batch(10, 1)).unwrap();
    let mut blocks = block_on(shard.blocks(0, 1 << 20)).unwrap();
    shard.close();
    // Each owner finds its own fence last, and of those before nothing but theirs.
    for life in 1..4 {
        let seq = blocks.len() as u64;
        let header = BlockHeader { shard: 0, epoch: life, nonce: 1, seq, append_ms: 1_000 };
        blocks.push(StoredBlock { seq, bytes: BlockBuilder::default().finish(header).bytes().clone() });
        let recovered = Recovered { snapshot: None, tail: Tail::Bucket(blocks.clone()), epoch: life };
        let wal = Box::new(MemoryWal::new(WAL_BYTES));
        let again = Shard::open(ShardSettings::default(), wal, recovered, None, clock()).unwrap();
        let bounds = again.bounds(partition(1)).unwrap();
        let begun = 10 + (i64::from(life) << 32);
        assert_eq!((bounds.high_watermark, bounds.leader_epoch), (begun + 1, 2 * life as i32));
        assert_eq!(again.epoch_end(partition(1), 0).unwrap().unwrap().end, begun);
        // Retention takes what was before: a consumer that read all of it goes on where what is known begins.
        block_on(again.trim(partition(1), begun + 1)).unwrap();
        assert_eq!(again.epoch_end(partition(1), 0), Ok(Some(EpochEnd { epoch: 0, end: begun })));
        assert_eq!(again.epoch_end(partition(1), -1), Ok(None));
    }
}

#[test]
fn a_call_for_room_is_no_take_over() {
    let settings = ShardSettings {
        archived: false,
        drops_oldest: true,
        in_flight_bytes_max: 2_000,
        block_bytes_max: 1_000,
        ..ShardSettings::default()
    };
    let wal = Box::new(MemoryWal::new(200_000));
    let (shard, commits) = Shard::open_driven(settings, wal, Recovered::default(), None, clock()).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        tokio::spawn(commits);
        shard.commit(vec![Change::created(topic(1, 1))]).await.unwrap();
        let mut refused = 0;
        for n in 0..50 {
            // All that fits is sealed or open, and who comes then makes a block that has nothing in it.
            let all: Vec<_> = (0..8).map(|_| shard.append(from_producer(partition(1), sized(900)))).collect();
            for one in all {
                refused += i32::from(one.await.is_err());
            }
            let late = shard.append(from_producer(partition(1), sized(1_900)));
            let later = shard.append(from_producer(partition(1), sized(1_900)));
            refused += i32::from(late.await.is_err()) + i32::from(later.await.is_err());
            assert_eq!(shard.bounds(partition(1)).unwrap().leader_epoch, 0, "{n}");
        }
        assert!(refused > 50, "{refused}");
    });
}

#[test]
fn another_shards_block_is_refused() {
    let (shard, wal) = shard();
    shard.close();
    let other = ShardSettings { shard: 5, ..ShardSettings::default() };
    let refused = Shard::open(other, Box::new(wal), Recovered::default(), None, clock()).err().unwrap();
    assert!(refused.to_string().contains("another shard"), "{refused}");
}

#[test]
fn a_damaged_block_is_named_and_the_rest_is_served() {
    let wal = MemoryWal::new(WAL_BYTES);
    let settings = ShardSettings { tail_bytes_max: 0, ..ShardSettings::default() };
    let shard = Shard::open(settings, Box::new(Damaged(wal)), Recovered::default(), None, clock()).unwrap();
    block_on(shard.commit(vec![Change::created(topic(1, 1))])).unwrap();
    (0..3).for_each(|_| {
        append(&shard, batch(1, 1)).unwrap();
    });
    let read = |from| block_on(shard.read(partition(1), from, ReadLimits { bytes_max: 1 }));
    assert!(matches!(read(1), Err(ReadError::Corrupt(text)) if text.contains("block 2")));
    assert!(read(0).is_ok() && read(2).is_ok());
}

/// Flips a bit in every part of block 2.
struct Damaged(MemoryWal);

impl BlockLog for Damaged {
    fn append<'a>(&'a self, seq: u64, block: &'a Bytes) -> BoxFuture<'a, Result<(), WalError>> {
        BlockLog::append(&self.0, seq, block)
    }
    fn bounds(&self) -> Option<(u64, u64)> {
        self.0.bounds()
    }
    fn read(&self, seq: u64) -> BoxFuture<'_, Result<Bytes, WalError>> {
        BlockLog::read(&self.0, seq)
    }
    fn read_part(&self, seq: u64, position: u32, bytes: u32) -> BoxFuture<'_, Result<Bytes, WalError>> {
        Box::pin(async move {
            let mut part = self.0.read_part(seq, position, bytes)?.to_vec();
            if seq == 2
                && let Some(byte) = part.last_mut()
            {
                *byte ^= 4;
            }
            Ok(part.into())
        })
    }
    fn trim(&self, below: u64) -> Result<(), WalError> {
        self.0.trim(below)
    }
    fn reset(&self, next: u64) -> Result<(), WalError> {
        self.0.reset(next)
    }
    fn settle(&self) -> Result<(), WalError> {
        self.0.settle()
    }
    fn usage(&self) -> Usage {
        self.0.usage()
    }
    fn close(&self) {}
}
