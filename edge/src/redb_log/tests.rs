//! The engine under the log's contract.
//!
//! The edge has one writer per stream, itself: no producers with sequences, no batches of other edges, no leader epochs.
//! The promises about these do not apply here; all others do.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::BytesMut;
use parking_lot::RwLock;
use shared::batch::Batch;
use shared::log::conformance::{Engine, PROMISES, block_on};
use shared::log::{
    Append, AppendError, Appended, Bounds, BoxFuture, EpochEnd, Log, Read, ReadError, ReadLimits, TimePoint, TrimError,
};
use shared::name::{Partition, StreamName, TopicId, TopicName};
use tokio::sync::watch;

use super::backend::{CappedFile, DiskBound};
use super::*;

/// The engine seen as a log of partitions: a stream each, every append a commit.
struct View {
    log: RedbLog,
    streams: Arc<RwLock<HashMap<Partition, StreamRecord>>>,
    starts: RwLock<HashMap<Partition, Offset>>,
    commit: Mutex<u64>,
    grown: watch::Sender<()>,
}

const EPOCH: i32 = 0;

impl View {
    fn id(partition: Partition) -> u32 {
        u32::from(partition.topic.0[0])
    }

    fn bounds_of(&self, partition: Partition) -> Result<Bounds, ReadError> {
        let streams = self.streams.read();
        let record = streams.get(&partition).ok_or(ReadError::UnknownPartition(partition))?;
        let log_start = self.starts.read().get(&partition).copied().unwrap_or(0).max(record.first);
        Ok(Bounds { log_start, high_watermark: record.next, leader_epoch: EPOCH })
    }

    fn append_now(&self, append: Append) -> Result<Appended, AppendError> {
        let mut number = self.commit.lock();
        let known = self.streams.read().get(&append.partition).cloned();
        let mut record = known.ok_or(AppendError::UnknownPartition(append.partition))?;
        let mut copy = BytesMut::from(&append.batch.bytes()[..]);
        Batch::place(&mut copy, record.next, EPOCH);
        let batch = Batch::parse(copy.freeze()).map_err(|error| AppendError::Storage(error.to_string()))?;
        let (base_offset, last_offset) = (batch.base_offset(), batch.last_offset());
        let entry = StoredBatch { chain: chain_after(record.next_chain, &batch), batch };
        let bytes_before = record.next_bytes;
        record.next = entry.next();
        record.next_chain = entry.chain;
        record.next_bytes += entry.stored_bytes();
        let stream = Self::id(append.partition);
        let commit = Commit {
            number: *number + 1,
            appends: vec![StreamAppend { stream, bytes_before, entries: vec![entry] }],
            records: BTreeMap::from([(stream, record.clone())]),
            ..Commit::default()
        };
        self.log.commit(&commit).map_err(|error| match error {
            LogError::Full(why) => AppendError::Full(why),
            other => AppendError::Storage(other.to_string()),
        })?;
        *number += 1;
        self.streams.write().insert(append.partition, record);
        self.grown.send_replace(());
        let log_start = self.bounds_of(append.partition).map_or(0, |bounds| bounds.log_start);
        Ok(Appended { base_offset, last_offset, log_start, duplicate: false })
    }

    fn read_now(&self, partition: Partition, from: Offset, limits: ReadLimits) -> Result<Read, ReadError> {
        let bounds = self.bounds_of(partition)?;
        if from < bounds.log_start || from > bounds.high_watermark {
            return Err(ReadError::OffsetOutOfRange { requested: from, bounds });
        }
        let found = self.log.read(Self::id(partition), from, limits.bytes_max);
        let mut found = found.map_err(|error| ReadError::Storage(error.to_string()))?;
        found.retain(|stored| stored.next() <= bounds.high_watermark);
        let next = found.last().map_or(from, StoredBatch::next);
        Ok(Read { batches: found.into_iter().map(|stored| stored.batch.into_bytes()).collect(), next, bounds })
    }

    /// All records from the log start on, by offset and time.
    fn points(&self, partition: Partition) -> Result<Vec<TimePoint>, ReadError> {
        let bounds = self.bounds_of(partition)?;
        let read = self.read_now(partition, bounds.log_start, ReadLimits { bytes_max: usize::MAX })?;
        let records = read.batches.into_iter().flat_map(|bytes| Batch::parse(bytes).unwrap().records(1 << 24).unwrap());
        let point = |record: shared::batch::Record| TimePoint {
            offset: record.offset,
            timestamp: record.timestamp,
            leader_epoch: EPOCH,
        };
        Ok(records.map(|record| point(record.unwrap())).filter(|point| point.offset >= bounds.log_start).collect())
    }

    fn trim_now(&self, partition: Partition, before: Offset) -> Result<Offset, TrimError> {
        let unknown = TrimError::UnknownPartition(partition);
        let bounds = self.bounds_of(partition).map_err(|_| unknown.clone())?;
        if before > bounds.high_watermark {
            return Err(TrimError::OffsetOutOfRange { requested: before, bounds });
        }
        let mut number = self.commit.lock();
        let stream = Self::id(partition);
        let mut record = self.streams.read().get(&partition).cloned().ok_or(unknown)?;
        record.confirmed = record.next;
        let commit = Commit {
            number: *number + 1,
            trims: vec![Trim { stream, below: before, bytes: u64::MAX, old: 0 }],
            records: BTreeMap::from([(stream, record.clone())]),
            ..Commit::default()
        };
        let trimmed =
            self.log.commit(&commit).map_err(|error| TrimError::Append(AppendError::Storage(error.to_string())))?;
        *number += 1;
        trimmed.iter().for_each(|trim| apply_trim(&mut record, trim));
        self.streams.write().insert(partition, record);
        let mut starts = self.starts.write();
        let start = starts.entry(partition).or_default();
        *start = before.max(*start);
        Ok(*start)
    }
}

impl Log for View {
    fn append(&self, append: Append) -> BoxFuture<'static, Result<Appended, AppendError>> {
        Box::pin(std::future::ready(self.append_now(append)))
    }

    fn read(&self, partition: Partition, from: Offset, limits: ReadLimits) -> BoxFuture<'_, Result<Read, ReadError>> {
        Box::pin(std::future::ready(self.read_now(partition, from, limits)))
    }

    fn bounds(&self, partition: Partition) -> Result<Bounds, ReadError> {
        self.bounds_of(partition)
    }

    fn wait(&self, partition: Partition, beyond: Offset) -> BoxFuture<'static, Result<(), ReadError>> {
        let (mut grown, streams) = (self.grown.subscribe(), self.streams.clone());
        Box::pin(async move {
            loop {
                grown.borrow_and_update();
                let next = streams.read().get(&partition).map(|record| record.next);
                if next.ok_or(ReadError::UnknownPartition(partition))? > beyond {
                    return Ok(());
                }
                grown.changed().await.map_err(|_| ReadError::Closed)?;
            }
        })
    }

    fn trim(&self, partition: Partition, before: Offset) -> BoxFuture<'static, Result<Offset, TrimError>> {
        Box::pin(std::future::ready(self.trim_now(partition, before)))
    }

    fn find_time(&self, partition: Partition, at: TimestampMs) -> BoxFuture<'_, Result<Option<TimePoint>, ReadError>> {
        let points = self.points(partition);
        Box::pin(std::future::ready(points.map(|points| points.into_iter().find(|point| point.timestamp >= at))))
    }

    fn max_time(&self, partition: Partition) -> BoxFuture<'_, Result<Option<TimePoint>, ReadError>> {
        let greatest = |points: Vec<TimePoint>| {
            points.into_iter().reduce(|best, point| if point.timestamp > best.timestamp { point } else { best })
        };
        Box::pin(std::future::ready(self.points(partition).map(greatest)))
    }

    fn epoch_end(&self, partition: Partition, _: i32) -> Result<Option<EpochEnd>, ReadError> {
        self.bounds_of(partition).map(|bounds| Some(EpochEnd { epoch: EPOCH, end: bounds.high_watermark }))
    }
}

fn mint() -> Incarnation {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    Incarnation(u128::from(NEXT.fetch_add(1, Ordering::Relaxed)).to_be_bytes())
}

fn partition(n: u8) -> Partition {
    Partition { topic: TopicId([n; 16]), index: 0 }
}

struct OnDisk {
    dir: tempfile::TempDir,
    view: Arc<View>,
    partitions: u8,
    bytes_max: u64,
}

impl OnDisk {
    fn new(bytes_max: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let view = Self::open(&dir, bytes_max);
        Self { dir, view, partitions: 0, bytes_max }
    }

    fn open(dir: &tempfile::TempDir, bytes_max: u64) -> Arc<View> {
        let storage = CappedFile::opener(dir.path().join("log.redb"), DiskBound::new(bytes_max, 0));
        let (log, contents) = RedbLog::open(storage, 1 << 20, mint).unwrap();
        let streams = contents.streams.into_iter().map(|(id, record)| (partition(id as u8), record)).collect();
        let (streams, commit) = (Arc::new(RwLock::new(streams)), Mutex::new(contents.commit));
        Arc::new(View { log, streams, starts: RwLock::default(), commit, grown: watch::Sender::new(()) })
    }
}

impl Engine for OnDisk {
    fn log(&self) -> Arc<dyn Log> {
        self.view.clone()
    }

    fn create(&mut self) -> Partition {
        self.partitions += 1;
        let name = format!("s{}", self.partitions);
        let record = StreamRecord::new(
            StreamName::parse(&name).unwrap(),
            TopicName::parse(&name).unwrap(),
            Incarnation([0; 16]),
        );
        self.view.streams.write().insert(partition(self.partitions), record);
        partition(self.partitions)
    }

    fn reopen(&mut self) -> bool {
        self.view.log.close();
        self.view = Self::open(&self.dir, self.bytes_max);
        true
    }
}

/// What a stream of one writer does not have.
const NOT_AT_THE_EDGE: [&str; 7] = [
    "a repeated sequence is stored once",
    "five batches are remembered",
    "a repeat in flight waits for the first",
    "an edge's batches adjoin",
    "a declared gap is taken",
    "epochs end where the next begins",
    "what was acknowledged is there after reopening", // by sequences and edge positions; told here without them below
];

#[test]
fn the_engine_keeps_the_logs_promises() {
    let mut skipped = 0;
    for (name, promise) in PROMISES {
        if NOT_AT_THE_EDGE.contains(name) {
            skipped += 1;
            continue;
        }
        println!("promise: {name}");
        promise(&mut OnDisk::new(64 << 20));
    }
    assert_eq!(skipped, NOT_AT_THE_EDGE.len(), "a promise was renamed");
}

#[test]
fn what_was_committed_is_there_after_reopening() {
    let mut engine = OnDisk::new(64 << 20);
    let (a, b) = (engine.create(), engine.create());
    // Large ones go to rows at once, small ones through the tail; both move on together.
    for n in 0..200 {
        let large = shared::log::conformance::sized(if n % 20 == 0 { 30_000 } else { 700 });
        let from = |partition| shared::log::conformance::from_producer(partition, large.clone());
        block_on(engine.log().append(from(a))).unwrap();
        if n % 2 == 0 {
            block_on(engine.log().append(from(b))).unwrap();
        }
    }
    block_on(engine.log().trim(a, 50)).unwrap();
    let all = |engine: &OnDisk| {
        [(a, 50), (b, 0)].map(|(partition, from)| {
            let limits = ReadLimits { bytes_max: usize::MAX };
            block_on(engine.log().read(partition, from, limits)).unwrap().batches
        })
    };
    let before = all(&engine);
    assert_eq!(before.iter().map(Vec::len).collect::<Vec<_>>(), [150, 100]);
    for _ in 0..2 {
        assert!(engine.reopen());
        assert_eq!(all(&engine), before);
    }
    let next = block_on(
        engine.log().append(shared::log::conformance::from_producer(b, shared::log::conformance::batch(1, 1))),
    );
    assert_eq!(next.unwrap().base_offset, 100, "offsets go on");
}

#[test]
fn a_full_file_refuses_and_keeps_what_it_has() {
    let mut engine = OnDisk::new(4 << 20);
    let a = engine.create();
    let send = |engine: &OnDisk| {
        let large = shared::log::conformance::sized(100_000);
        block_on(engine.log().append(shared::log::conformance::from_producer(a, large)))
    };
    let mut kept = 0;
    let refused = loop {
        match send(&engine) {
            Ok(_) => kept += 1,
            Err(refused) => break refused,
        }
    };
    assert!(matches!(refused, AppendError::Full(_)), "{refused}");
    assert!(kept > 5, "{kept}");
    // The handle is gone with the error; what was committed is not.
    engine.reopen();
    let limits = ReadLimits { bytes_max: usize::MAX };
    assert_eq!(block_on(engine.log().read(a, 0, limits)).unwrap().batches.len(), kept);
    block_on(engine.log().trim(a, kept as i64)).unwrap();
    assert_eq!(send(&engine).unwrap().base_offset, kept as i64, "there is room again");
}
