//! What a read costs: requests counted by the store, and virtual time.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use object_store::ObjectStoreExt;
use shared::batch::{Batch, BatchBuilder, Compression};
use shared::log::ReadLimits;
use shared::name::{Offset, Partition};
use tokio::time::Instant;

use super::faulty::{Asked, Faulty};
use super::node::{Home, NoBlocks, partition, settings};
use crate::archive::cache::{Chunks, Object};
use crate::archive::*;
use crate::manifest::{HeldRun, Index, Keys, SegmentId};
use crate::segment::SegmentWriter;

const MIB: usize = 1 << 20;
/// Records of one batch, and about what it takes.
const RECORDS: i64 = 4;
const BATCH_BYTES: usize = 64 << 10;
const LATENCY: Duration = Duration::from_millis(50);

/// A bucket with segments.
struct Bucket {
    store: Faulty,
    index: Index,
    objects: u64,
    /// Chunks of all objects.
    chunks: usize,
}

impl Bucket {
    fn new() -> Self {
        Self { store: Faulty::new(), index: Index::default(), objects: 0, chunks: 0 }
    }

    /// `objects` objects with `batches` batches of partition 1 each.
    async fn filled(objects: usize, batches: usize) -> Self {
        let mut bucket = Self::new();
        for _ in 0..objects {
            bucket.segment(&[(partition(1), batches)]).await;
        }
        bucket
    }

    /// Adds one object with a run of so many batches for each of these partitions.
    async fn segment(&mut self, runs: &[(Partition, usize)]) {
        let mut writer = SegmentWriter::default();
        for (partition, batches) in runs {
            let base = self.index.next(*partition).unwrap_or(0);
            let slices = (0..*batches as i64).map(|n| (batch(base + n * RECORDS), 0));
            writer.run(*partition, base..base + *batches as i64 * RECORDS, slices).unwrap();
        }
        self.put(writer).await;
    }

    async fn put(&mut self, writer: SegmentWriter) {
        let segment = writer.finish();
        let object = SegmentId { seq: self.objects, epoch: 1, number: 0, nonce: 99 };
        self.objects += 1;
        self.chunks += (segment.bytes as usize).div_ceil(MIB);
        self.store.inner.put(&keys().segment(&object), segment.chunks.concat().into()).await.unwrap();
        let held = |(partition, run)| (partition, HeldRun { object, object_bytes: segment.bytes, run });
        self.index.extend(segment.runs.into_iter().map(held).collect()).unwrap();
    }

    /// A cold tier on it with so much memory for chunks.
    fn cold(&self, memory_bytes: usize) -> Arc<Cold> {
        let requests = RequestSettings { timeout: Duration::from_secs(60), ..RequestSettings::default() };
        let store = Arc::new(Store::new(Arc::new(self.store.clone()), "p".into(), requests));
        Arc::new(Cold::new(store, keys(), self.index.clone(), memory_bytes / 3 * 4, true))
    }

    fn asked(&self) -> Asked {
        self.store.asked()
    }
}

fn keys() -> Keys {
    Keys::new("p".into(), 0)
}

fn batch(base: Offset) -> Bytes {
    let mut builder = BatchBuilder::default();
    for n in base..base + RECORDS {
        let value = vec![n as u8; BATCH_BYTES / RECORDS as usize];
        builder.push(n * 10, None, Some(&value), &[]);
    }
    builder.finish(base, Compression::None).into_bytes()
}

/// Reads from `from` once and checks that it is whole batches that begin there, as they were written.
async fn read(cold: &Cold, number: u8, from: Offset, bytes_max: usize) -> Offset {
    let read = cold.read(partition(number), from, ReadLimits { bytes_max }).await.unwrap();
    let mut next = from;
    for mut slice in read.batches {
        while let Some(found) = Batch::split_first(&mut slice).unwrap() {
            assert_eq!(found.into_bytes(), batch(next));
            next += RECORDS;
        }
    }
    assert_eq!(next, read.next);
    next
}

/// Reads a partition from end to end, with a pause for each MiB or so that it is used.
async fn read_all(cold: &Cold, number: u8, bytes_max: usize, pause: Duration) {
    let end = cold.bounds(partition(number)).unwrap().next;
    let mut next = 0;
    while next < end {
        next = read(cold, number, next, bytes_max).await;
        tokio::time::sleep(pause).await;
    }
}

fn only_ranges(ranges: usize, asked: Asked) {
    assert_eq!(asked, Asked { ranges, bytes: asked.bytes, ..Asked::default() });
}

#[tokio::test]
async fn reading_a_whole_partition_asks_for_each_chunk_once_and_for_nothing_else() {
    let bucket = Bucket::filled(3, 100).await;
    for (memory, bytes_max) in [(64 * MIB, MIB), (8 * MIB, MIB), (8 * MIB, 100 << 10), (32 * MIB, 20 * MIB)] {
        let cold = bucket.cold(memory);
        read_all(&cold, 1, bytes_max, Duration::ZERO).await;
        only_ranges(bucket.chunks, bucket.asked());
        assert_eq!(bucket.chunks, 21, "18.75 MiB in three objects, indexes included");
    }
}

/// The one object of `bucket` in a directory, as a file of `bytes` bytes at most.
async fn in_a_file(bucket: &Bucket, bytes: usize) -> (tempfile::TempDir, Arc<Store>, Object) {
    let directory = tempfile::tempdir().unwrap();
    let requests = RequestSettings { attempts: 1, ..RequestSettings::default() };
    let store = Arc::new(Store::directory(directory.path(), requests).unwrap());
    let (id, _) = bucket.index.usage().iter().next().unwrap();
    let content = bucket.store.inner.get(&keys().segment(id)).await.unwrap().bytes().await.unwrap();
    let object = Object { id: *id, bytes: content.len() as u64 };
    store.create(&keys().segment(id), &[content.slice(..bytes.min(content.len()))]).await.unwrap();
    (directory, store, object)
}

#[tokio::test]
async fn what_adjoins_in_a_file_is_read_with_one_request() {
    let bucket = Bucket::filled(1, 160).await;
    let (_directory, store, _) = in_a_file(&bucket, usize::MAX).await;
    let gets = || store.requests().gets.load(std::sync::atomic::Ordering::Relaxed);

    let cold = Cold::new(store.clone(), keys(), bucket.index.clone(), 64 * MIB, true);
    let next = read(&cold, 1, 0, 5 * MIB).await;
    assert_eq!((gets(), cold.cache_status().ahead), (3, 0), "the index, the first chunks, and the rest");
    // What is read ahead of the second read is one request as well.
    read(&cold, 1, next, MIB).await;
    while cold.cache_status().ahead < 1 || gets() < 5 {
        tokio::task::yield_now().await;
    }
    read_all(&cold, 1, MIB, Duration::ZERO).await;
    assert!(gets() <= 7, "{} requests for 11 chunks", gets());
}

#[tokio::test]
async fn a_bad_place_in_a_file_is_no_reason_not_to_read_beside_it() {
    let bucket = Bucket::filled(1, 160).await;
    let (_directory, store, object) = in_a_file(&bucket, 7 * MIB + 5).await;
    let chunks = Arc::new(Chunks::new(store, keys(), 64 << 20));
    let mib = |from: u64, to: u64| from << 20..to << 20;
    // The second one comes for a chunk that the request of the first is to bring.
    let ((), beside) = tokio::join!(chunks.fetch(object, mib(4, 8)), chunks.range(object, mib(5, 6)));
    assert_eq!(beside.unwrap()[0].len(), MIB);
    assert!(chunks.range(object, mib(7, 8)).await.is_err());
    assert!((4..7).all(|at| chunks.is_coming(object.id, at << 20)), "what can be had is there");
}

#[tokio::test]
async fn small_runs_in_one_object_share_its_chunks() {
    let mut bucket = Bucket::new();
    let runs: Vec<_> = (1..=60).map(|number| (partition(number), 1)).collect();
    for _ in 0..2 {
        bucket.segment(&runs).await;
    }
    let cold = bucket.cold(64 * MIB);
    for number in 1..=60 {
        read_all(&cold, number, MIB, Duration::ZERO).await;
        assert_eq!(cold.find_time(partition(number), 0, 55).await.unwrap().map(|point| point.offset), Some(6));
    }
    only_ranges(bucket.chunks, bucket.asked());
    assert_eq!(bucket.chunks, 8);
}

#[tokio::test]
async fn a_reader_is_led_over_runs_of_which_compaction_left_nothing() {
    let mut bucket = Bucket::new();
    let run = |covered: Range<Offset>, bases: &[Offset]| (covered, bases.iter().map(|b| (batch(*b), 0)).collect());
    let end = 100 * RECORDS;
    let mut runs: Vec<(_, Vec<_>)> = vec![run(0..RECORDS, &[]), run(RECORDS..10 * RECORDS, &[5 * RECORDS])];
    // More of them than a read looks at.
    runs.extend((10..99).map(|n| run(n * RECORDS..(n + 1) * RECORDS, &[])));
    runs.push(run(99 * RECORDS..end, &[99 * RECORDS]));
    runs.push(run(end..end + 7, &[]));
    for (covered, slices) in runs {
        let mut writer = SegmentWriter::default();
        writer.run(partition(1), covered, slices).unwrap();
        bucket.put(writer).await;
    }
    let cold = bucket.cold(64 * MIB);
    let bases = |read: &ColdRead| {
        let batches = read.batches.iter().map(|bytes| Batch::parse(bytes.clone()).unwrap());
        batches.map(|batch| batch.base_offset()).collect::<Vec<_>>()
    };
    for (from, bytes_max, expected, next) in [
        // One read looks at 64 runs.
        (0, MIB, vec![5 * RECORDS], 72 * RECORDS),
        (0, 1, vec![5 * RECORDS], 10 * RECORDS),
        (6 * RECORDS, 1, vec![], 73 * RECORDS),
        (73 * RECORDS, 1, vec![99 * RECORDS], end),
        (50 * RECORDS, MIB, vec![99 * RECORDS], end + 7),
        (end + 3, MIB, vec![], end + 7),
    ] {
        let read = cold.read(partition(1), from, ReadLimits { bytes_max }).await.unwrap();
        assert_eq!((bases(&read), read.next), (expected, next), "from {from}, {bytes_max} bytes");
    }
    let found = cold.find_time(partition(1), 0, 60 * RECORDS * 10).await.unwrap().unwrap();
    assert_eq!(found.offset, 99 * RECORDS);
    assert_eq!(cold.max_time(partition(1), 0).await.unwrap().unwrap().offset, end - 1);
}

#[tokio::test]
async fn a_read_takes_as_many_batches_as_its_limit_allows_wherever_it_begins() {
    let store = Faulty::new();
    let slices = (0..60).map(|base| {
        let mut builder = BatchBuilder::default();
        builder.push(base, None, Some(&[7; 1000]), &[]);
        (builder.finish(base, Compression::None).into_bytes(), 0)
    });
    let mut writer = SegmentWriter::default();
    writer.run(partition(1), 0..60, slices).unwrap();
    let segment = writer.finish();
    let object = SegmentId { seq: 0, epoch: 1, number: 0, nonce: 1 };
    store.inner.put(&keys().segment(&object), segment.chunks.concat().into()).await.unwrap();
    let (mut index, run) = (Index::default(), segment.runs[0].1);
    index.extend(vec![(partition(1), HeldRun { object, object_bytes: segment.bytes, run })]).unwrap();
    let cold = Cold::new(
        Arc::new(Store::new(Arc::new(store), "p".into(), RequestSettings::default())),
        keys(),
        index,
        4 * MIB,
        true,
    );
    let one = run.length as usize / 60;
    for from in 0..60 {
        for count in [0, 1, 2, 7, 20, 100] {
            let limits = ReadLimits { bytes_max: one * count + one / 2 };
            let read = cold.read(partition(1), from, limits).await.unwrap();
            assert_eq!(read.next, (from + count.max(1) as i64).min(60), "{count} from {from}");
        }
    }
}

#[tokio::test]
async fn what_was_read_once_comes_from_the_disk_and_after_a_restart_too() {
    let bucket = Bucket::filled(2, 60).await;
    let directory = tempfile::tempdir().unwrap();
    let open = || DiskCache::open(directory.path(), 64 << 20).unwrap();
    let disk = open();
    let cold = || {
        let cold = bucket.cold(4 * MIB);
        cold.use_disk(disk.clone());
        cold
    };
    let first = bucket.cold(16 * MIB);
    first.use_disk(disk.clone());
    read_all(&first, 1, MIB / 2, Duration::ZERO).await;
    disk.settled().await;
    only_ranges(bucket.chunks, bucket.asked());
    let status = first.cache_status();
    assert_eq!((status.disk_hits, status.disk_misses), (0, bucket.chunks as u64));
    assert!(status.disk_bytes > 7 << 20 && status.disk_bytes_max == 64 << 20 && !status.disk_is_off);

    read_all(&cold(), 1, MIB, Duration::ZERO).await;
    only_ranges(0, bucket.asked());

    let disk = open();
    let again = bucket.cold(4 * MIB);
    again.use_disk(disk.clone());
    read_all(&again, 1, MIB, Duration::ZERO).await;
    only_ranges(0, bucket.asked());
    assert!(again.cache_status().disk_hits >= bucket.chunks as u64);

    // Damage is found, and costs one request.
    let mut files: Vec<_> = std::fs::read_dir(directory.path()).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    let mut bytes = std::fs::read(&files[2]).unwrap();
    bytes[5000] ^= 1;
    std::fs::write(&files[2], bytes).unwrap();
    for expected in [1, 0] {
        let cold = bucket.cold(4 * MIB);
        cold.use_disk(disk.clone());
        read_all(&cold, 1, MIB, Duration::ZERO).await;
        disk.settled().await;
        only_ranges(expected, bucket.asked());
    }

    // A disk that is gone is no reason not to read.
    std::fs::remove_dir_all(directory.path()).unwrap();
    let cold = bucket.cold(4 * MIB);
    cold.use_disk(disk.clone());
    read_all(&cold, 1, MIB, Duration::ZERO).await;
    disk.settled().await;
    only_ranges(bucket.chunks, bucket.asked());
    assert!(cold.cache_status().disk_is_off);
}

#[tokio::test]
async fn objects_that_are_no_longer_named_leave_the_disk() {
    let mut bucket = Bucket::filled(2, 20).await;
    let directory = tempfile::tempdir().unwrap();
    let disk = DiskCache::open(directory.path(), 64 << 20).unwrap();
    let cold = bucket.cold(64 * MIB);
    cold.use_disk(disk.clone());
    read_all(&cold, 1, MIB, Duration::ZERO).await;
    disk.settled().await;
    let names = |part: &str| {
        let files = std::fs::read_dir(directory.path()).unwrap();
        files.filter(|file| file.as_ref().unwrap().file_name().to_str().unwrap().contains(part)).count()
    };
    let parts = ["-00000000000000000000-00000001-", "-00000000000000000001-00000001-"];
    assert_eq!(parts.map(names), [2, 2]);
    let objects = bucket.index.usage().keys().filter(|object| object.seq != 1).copied().collect();
    let gone = bucket.index.runs_in(&objects);
    bucket.index.replace(&gone, Vec::new()).unwrap();
    cold.publish(bucket.index.clone());
    while names(parts[0]) > 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(parts.map(names), [0, 2]);
}

#[tokio::test(start_paused = true)]
async fn readers_of_one_chunk_share_one_request() {
    let bucket = Bucket::filled(1, 8).await;
    bucket.store.plan.lock().latency = LATENCY;
    let cold = bucket.cold(64 * MIB);
    let start = Instant::now();
    join_all((0..20).map(|_| read(&cold, 1, 0, MIB))).await;
    only_ranges(1, bucket.asked());
    assert_eq!(start.elapsed(), LATENCY);

    // Who asked first goes away: the others are served all the same.
    let cold = bucket.cold(64 * MIB);
    let first = tokio::time::timeout(LATENCY / 2, read(&cold, 1, 0, MIB));
    let (first, _) = tokio::join!(first, read(&cold, 1, 4, MIB));
    assert!(first.is_err());
    only_ranges(1, bucket.asked());
    // And who was alone and went away takes the request along.
    let cold = bucket.cold(64 * MIB);
    assert!(tokio::time::timeout(LATENCY / 2, read(&cold, 1, 0, MIB)).await.is_err());
    read(&cold, 1, 0, MIB).await;
    only_ranges(2, bucket.asked());
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_goes_on_finds_the_next_chunk_there() {
    let bucket = Bucket::filled(3, 160).await;
    bucket.store.plan.lock().latency = LATENCY;
    let cold = bucket.cold(64 * MIB);
    let start = Instant::now();
    // About 15 batches to a read, 32 reads.
    read_all(&cold, 1, MIB, LATENCY).await;
    only_ranges(bucket.chunks, bucket.asked());
    let waited = start.elapsed().as_millis() / LATENCY.as_millis();
    // Each read is used for as long as a request takes. At the start there is nothing to go on from: the index together with
    // the first chunk, and the second. A read that goes on in the next run waits for its beginning.
    let reads = bucket.index.next(partition(1)).unwrap() / RECORDS / 15;
    assert_eq!(reads, 32);
    assert!(waited <= reads as u128 + 6 + 2, "{waited} request times for {reads} reads");
    assert!(cold.cache_status().ahead >= bucket.chunks as u64 - 6 - 2);
}

#[tokio::test(start_paused = true)]
async fn the_longer_a_reader_goes_on_the_more_is_fetched_ahead_of_it() {
    let bucket = Bucket::filled(1, 480).await;
    bucket.store.plan.lock().latency = LATENCY;
    let cold = bucket.cold(64 * MIB);
    let start = Instant::now();
    // Each of 32 reads is used for a quarter of the time that a request takes.
    read_all(&cold, 1, MIB, LATENCY / 4).await;
    only_ranges(bucket.chunks, bucket.asked());
    assert!(start.elapsed() <= LATENCY * (32 / 4 + 3), "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn the_beginning_of_a_run_is_fetched_together_with_its_index() {
    let bucket = Bucket::filled(1, 160).await;
    bucket.store.plan.lock().latency = LATENCY;
    for (from, bytes_max, times, requests) in [(0, 1, 1, 2), (0, 3 * MIB, 1, 4), (80 * RECORDS, 1, 2, 2)] {
        let (cold, start) = (bucket.cold(64 * MIB), Instant::now());
        read(&cold, 1, from, bytes_max).await;
        assert_eq!(start.elapsed(), LATENCY * times);
        only_ranges(requests, bucket.asked());
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_is_fetched_ahead_of_a_reader_that_jumps() {
    let bucket = Bucket::filled(3, 160).await;
    bucket.store.plan.lock().latency = LATENCY;
    let cold = bucket.cold(64 * MIB);
    let mut at = 7;
    for _ in 0..200 {
        at = (at * 193 + 71) % 479;
        read(&cold, 1, at * RECORDS, 1).await;
    }
    assert_eq!(cold.cache_status().ahead, 0);
}

#[tokio::test(start_paused = true)]
async fn what_is_fetched_ahead_is_bounded_for_all_readers_together() {
    let mut bucket = Bucket::new();
    for number in 1..=40 {
        bucket.segment(&[(partition(number), 40)]).await;
    }
    let cold = bucket.cold(200 * MIB);
    for number in 1..=40 {
        assert_eq!(read(&cold, number, 0, 1).await, RECORDS);
    }
    bucket.asked();
    bucket.store.plan.lock().silent = true;
    // What they read now is there already.
    for number in 1..=40 {
        assert_eq!(read(&cold, number, RECORDS, 1).await, 2 * RECORDS);
    }
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    only_ranges(16, bucket.asked());
}

#[tokio::test]
async fn a_pass_over_the_whole_archive_leaves_what_others_read_in_memory() {
    let mut bucket = Bucket::filled(4, 250).await;
    bucket.segment(&[(partition(2), 8)]).await;
    let cold = bucket.cold(6 * MIB);
    // What is asked for again and again, among other things.
    for from in (0..960).step_by(80) {
        read(&cold, 2, 0, MIB).await;
        read(&cold, 1, from * RECORDS, 1).await;
    }
    read_all(&cold, 1, MIB / 4, Duration::ZERO).await;
    bucket.asked();
    read(&cold, 2, 0, MIB).await;
    only_ranges(0, bucket.asked());
}

#[tokio::test]
async fn damage_is_not_kept() {
    let bucket = Bucket::filled(1, 8).await;
    let key = keys().segment(&SegmentId { seq: 0, epoch: 1, number: 0, nonce: 99 });
    let sound = bucket.store.inner.get(&key).await.unwrap().bytes().await.unwrap();
    // In a batch, and in the index.
    for position in [70_000, 8 * (BATCH_BYTES + 100) + 20] {
        let directory = tempfile::tempdir().unwrap();
        let disk = DiskCache::open(directory.path(), 64 << 20).unwrap();
        let cold = bucket.cold(64 * MIB);
        cold.use_disk(disk.clone());
        let mut damaged = sound.to_vec();
        damaged[position] ^= 1;
        bucket.store.inner.put(&key, damaged.into()).await.unwrap();
        for _ in 0..2 {
            let refused = cold.read(partition(1), 0, ReadLimits { bytes_max: MIB }).await.map(drop).unwrap_err();
            assert!(refused.to_string().contains(key.as_ref()), "{refused}");
            disk.settled().await;
        }
        bucket.store.inner.put(&key, sound.clone().into()).await.unwrap();
        assert_eq!(read(&cold, 1, 0, MIB).await, 8 * RECORDS, "{position}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bucket_that_does_not_answer_delays_no_producer_and_no_reader_at_the_end() {
    use crate::shard::{Shard, ShardSettings};
    use crate::state::{Change, StateLog, Topic};
    use crate::wal::memory::MemoryWal;
    use shared::log::Log;
    use shared::log::conformance::{from_producer, sized};
    let (store, home) = (Faulty::new(), Home::new());
    let mut settings = settings(home.dir.path().into());
    settings.requests.timeout = Duration::from_secs(60);
    // Every read of the archive asks the bucket.
    settings.cache_bytes = 0;
    let bucket = Store::new(Arc::new(store.clone()), "p".into(), settings.requests);
    let mirror = Store::directory(&home.dir.path().join("manifest"), settings.requests).unwrap();
    let archive = Archive::with_stores(settings, bucket, Some(mirror)).await.unwrap();
    let recovered = archive.recover(&NoBlocks).await.unwrap();
    let tail_bytes_max = 500_000;
    let settings = ShardSettings { tail_bytes_max, read_cache_bytes_max: 0, ..ShardSettings::default() };
    let wal = Box::new(MemoryWal::new(64 << 20));
    let shard = Shard::open(settings, wal, recovered, Some(archive.cold()), Arc::new(|| 1)).unwrap();
    let task = tokio::spawn(archive.clone().run(shard.clone(), std::future::pending()));
    let name = shared::name::TopicName::parse("t").unwrap();
    let topic = Topic { id: partition(1).topic, name, partitions: 1, configs: Default::default(), created_ms: 0 };
    shard.commit(vec![Change::created(topic)]).await.unwrap();
    let append = || shard.append(from_producer(partition(1), sized(50_000)));
    // Many times what the tail holds.
    for _ in 0..100 {
        append().await.unwrap();
    }
    let end = shard.bounds(partition(1)).unwrap().high_watermark;
    // The newest block stays in the WAL.
    while shard.status().index_entries > 1 {
        archive.roll_now();
        tokio::task::yield_now().await;
    }
    for _ in 0..8 {
        append().await.unwrap();
    }
    let limits = ReadLimits { bytes_max: 100_000 };
    let tail = shard.status().tail_bytes;
    assert!(tail > 300_000 && tail <= tail_bytes_max);

    // One consumer from the beginning to the archive's end: the tail is as it was.
    let mut next = 0;
    while next < end {
        let read = shard.read(partition(1), next, limits).await.unwrap();
        assert!(read.next > next);
        next = read.next;
    }
    assert_eq!(shard.status().tail_bytes, tail);
    assert!(store.asked().ranges > 0);

    // Another one waits for a bucket that does not answer, and nobody else does.
    store.plan.lock().silent = true;
    let stuck = {
        let shard = shard.clone();
        tokio::spawn(async move { shard.read(partition(1), 0, ReadLimits { bytes_max: 100_000 }).await.map(drop) })
    };
    while store.asked().ranges == 0 {
        tokio::task::yield_now().await;
    }
    for _ in 0..20 {
        let at = append().await.unwrap().base_offset;
        let read = shard.read(partition(1), at, limits).await.unwrap();
        assert!(read.next > at && !read.batches.is_empty());
        assert_eq!(shard.bounds(partition(1)).unwrap().high_watermark, read.next);
    }
    assert!(shard.partitions().iter().all(|partition| partition.archived >= end));
    assert!(!stuck.is_finished());
    store.plan.lock().silent = false;
    stuck.abort();
    task.abort();
}
