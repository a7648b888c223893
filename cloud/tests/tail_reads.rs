//! What readers cost the disk, counted underneath: nothing at the end of the log, which is in memory, and what they are
//! answered, once, far behind.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cloud::archive::Recovered;
use cloud::shard::{Shard, ShardSettings};
use cloud::state::{Change, StateLog as _, Topic};
use cloud::wal::disk::{Directory, Disk, DiskFile};
use cloud::wal::file::{FileWal, FileWalSettings};
use futures_util::future::join_all;
use shared::log::conformance::{block_on, from_producer, sized};
use shared::log::{Log as _, ReadLimits};
use shared::name::{Partition, TopicId, TopicName};
use tempfile::TempDir;

/// A directory that counts reads of its files.
struct Counted {
    inner: Directory,
    reads: Arc<AtomicU64>,
    bytes: Arc<AtomicU64>,
}

struct CountedFile {
    inner: Arc<dyn DiskFile>,
    reads: Arc<AtomicU64>,
    bytes: Arc<AtomicU64>,
}

impl Counted {
    fn file(&self, inner: Arc<dyn DiskFile>) -> Arc<dyn DiskFile> {
        Arc::new(CountedFile { inner, reads: self.reads.clone(), bytes: self.bytes.clone() })
    }
}

impl Disk for Counted {
    fn list(&self) -> io::Result<Vec<String>> {
        self.inner.list()
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        Ok(self.file(self.inner.create(name)?))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        Ok(self.file(self.inner.open(name)?))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.inner.rename(from, to)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.inner.remove(name)
    }

    fn sync_dir(&self) -> io::Result<()> {
        self.inner.sync_dir()
    }
}

impl DiskFile for CountedFile {
    fn bytes(&self) -> io::Result<u64> {
        self.inner.bytes()
    }

    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<()> {
        self.inner.read_at(buffer, position)?;
        self.bytes.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        self.reads.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], position: u64) -> io::Result<()> {
        self.inner.write_at(bytes, position)
    }

    fn sync(&self) -> io::Result<()> {
        self.inner.sync()
    }
}

const PARTITIONS: u32 = 8;

fn partition(index: u32) -> Partition {
    Partition { topic: TopicId([1; 16]), index }
}

/// A shard with one topic on such a directory.
fn open(directory: &TempDir, tail_bytes_max: usize, file_bytes: u64) -> (Arc<Shard>, Arc<AtomicU64>, Arc<AtomicU64>) {
    let (reads, bytes) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let inner = Directory::open(directory.path()).unwrap();
    let disk = Counted { inner, reads: reads.clone(), bytes: bytes.clone() };
    let settings = FileWalSettings { file_bytes, hasty_file_bytes: file_bytes / 4, ..FileWalSettings::default() };
    let wal = FileWal::open(Box::new(disk), settings, 7).unwrap();
    let settings = ShardSettings { tail_bytes_max, ..ShardSettings::default() };
    let shard = Shard::open(settings, Box::new(wal), Recovered::default(), None, Arc::new(|| 1_000)).unwrap();
    let (id, name) = (partition(0).topic, TopicName::parse("tail").unwrap());
    let topic = Topic { id, name, partitions: PARTITIONS, configs: BTreeMap::new(), created_ms: 0 };
    block_on(shard.commit(vec![Change::created(topic)])).unwrap();
    reads.store(0, Ordering::Relaxed);
    bytes.store(0, Ordering::Relaxed);
    (shard, reads, bytes)
}

/// Appends `count` batches of `bytes` at once, so that they share few blocks.
fn append_together(shard: &Shard, count: usize, bytes: usize) {
    let batch = sized(bytes);
    let waves = (0..count).map(|_| shard.append(from_producer(partition(0), batch.clone())));
    for appended in block_on(join_all(waves.collect::<Vec<_>>())) {
        appended.unwrap();
    }
}

#[test]
fn a_reader_at_the_tail_never_touches_the_disk_and_one_far_behind_does() {
    let directory = tempfile::tempdir().unwrap();
    let (shard, reads, _) = open(&directory, 1 << 20, 4 << 20);
    let (limits, batch) = (ReadLimits { bytes_max: 1 << 20 }, sized(16 << 10));
    let read = |index, from| block_on(shard.read(partition(index), from, limits)).unwrap();
    let mut followed = [0; PARTITIONS as usize];
    for round in 0..40 {
        for index in 0..PARTITIONS {
            block_on(shard.append(from_producer(partition(index), batch.clone()))).unwrap();
        }
        // Half of the readers come each round, the others each fourth: some 512 KiB behind, within the tail.
        for index in (0..PARTITIONS).filter(|index| index % 2 == 0 || round % 4 == 3) {
            let at = &mut followed[index as usize];
            let found = read(index, *at);
            assert!(found.next > *at, "partition {index} grew in round {round}");
            *at = found.next;
        }
    }
    assert_eq!(reads.load(Ordering::Relaxed), 0, "reads of the disk for followers at the tail");
    let end = read(0, 0);
    assert!(!end.batches.is_empty() && reads.load(Ordering::Relaxed) > 0, "what left the tail comes from the disk");
    shard.close();
}

#[test]
fn a_reader_far_behind_reads_what_it_is_answered_once_however_large_the_blocks_are() {
    let directory = tempfile::tempdir().unwrap();
    let (shard, _, bytes) = open(&directory, 0, 16 << 20);
    // The first batch keeps the committer busy; the others come to be few blocks of up to 8 MiB.
    append_together(&shard, 256, 16 << 10);
    assert!(shard.status().next_seq < 100, "few blocks");
    let (mut next, mut answered, mut reads) = (0, 0, 0);
    loop {
        let read = block_on(shard.read(partition(0), next, ReadLimits { bytes_max: 100 << 10 })).unwrap();
        if read.batches.is_empty() {
            break;
        }
        (next, answered, reads) = (read.next, answered + read.bytes() as u64, reads + 1);
    }
    let read = bytes.load(Ordering::Relaxed);
    assert!(answered >= 256 * (16 << 10) && reads > 20);
    // At the end of each read a batch is cut and read again.
    assert!(read <= answered + reads * (18 << 10), "{read} bytes of the disk for {answered} in {reads} reads");

    // A batch larger than the limit is answered all the same.
    let read = block_on(shard.read(partition(0), 0, ReadLimits { bytes_max: 1 })).unwrap();
    assert!(read.bytes() >= 16 << 10 && read.bytes() < 18 << 10);
    shard.close();
}

#[test]
fn the_next_read_of_a_reader_that_goes_on_is_made_before_it_asks() {
    let directory = tempfile::tempdir().unwrap();
    let (shard, reads, _) = open(&directory, 0, 16 << 20);
    append_together(&shard, 64, 16 << 10);
    let read = |from| shard.read(partition(0), from, ReadLimits { bytes_max: 64 << 10 });
    // Without a runtime there is nobody to read ahead: what these two cost.
    let first = block_on(read(0)).unwrap();
    let before = reads.load(Ordering::Relaxed);
    let second = block_on(read(first.next)).unwrap();
    let cost = reads.load(Ordering::Relaxed) - before;
    let third = block_on(read(second.next)).unwrap();

    let before = reads.load(Ordering::Relaxed);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
    runtime.block_on(async {
        assert_eq!(read(first.next).await.unwrap().next, second.next);
        // Nobody has asked for more.
        while reads.load(Ordering::Relaxed) <= before + cost {
            tokio::task::yield_now().await;
        }
        for _ in 0..2 {
            let found = read(second.next).await.unwrap();
            assert_eq!((found.next, found.batches.concat()), (third.next, third.batches.concat()));
        }
    });
    shard.close();
}
