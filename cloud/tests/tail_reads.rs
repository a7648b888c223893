//! Consumers at the end of the log are served from memory: reads of the disk are counted underneath.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cloud::archive::Recovered;
use cloud::shard::{Shard, ShardSettings};
use cloud::state::{Change, StateLog as _, Topic};
use cloud::wal::disk::{Directory, Disk, DiskFile};
use cloud::wal::file::{FileWal, FileWalSettings};
use shared::log::conformance::{block_on, from_producer, sized};
use shared::log::{Log as _, ReadLimits};
use shared::name::{Partition, TopicId, TopicName};

/// A directory that counts reads of its files.
struct Counted {
    inner: Directory,
    reads: Arc<AtomicU64>,
}

struct CountedFile {
    inner: Arc<dyn DiskFile>,
    reads: Arc<AtomicU64>,
}

impl Counted {
    fn file(&self, inner: Arc<dyn DiskFile>) -> Arc<dyn DiskFile> {
        Arc::new(CountedFile { inner, reads: self.reads.clone() })
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
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.inner.read_at(buffer, position)
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

#[test]
fn a_reader_at_the_tail_never_touches_the_disk_and_one_far_behind_does() {
    let (directory, reads) = (tempfile::tempdir().unwrap(), Arc::new(AtomicU64::new(0)));
    let disk = Counted { inner: Directory::open(directory.path()).unwrap(), reads: reads.clone() };
    let settings = FileWalSettings { file_bytes: 4 << 20, hasty_file_bytes: 1 << 20, ..FileWalSettings::default() };
    let wal = FileWal::open(Box::new(disk), settings, 7).unwrap();
    let settings = ShardSettings { tail_bytes_max: 1 << 20, ..ShardSettings::default() };
    let shard = Shard::open(settings, Box::new(wal), Recovered::default(), None, Arc::new(|| 1_000)).unwrap();
    let (id, name) = (partition(0).topic, TopicName::parse("tail").unwrap());
    let topic = Topic { id, name, partitions: PARTITIONS, configs: BTreeMap::new(), created_ms: 0 };
    block_on(shard.commit(vec![Change::TopicCreated(topic)])).unwrap();

    let (limits, batch) = (ReadLimits { bytes_max: 1 << 20 }, sized(16 << 10));
    let read = |index, from| block_on(shard.read(partition(index), from, limits)).unwrap();
    reads.store(0, Ordering::Relaxed);
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
