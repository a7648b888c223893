//! Whether records would be taken, told before one is refused, while one is, and when there is room again.

use std::io;
use std::sync::atomic::AtomicU64;

use super::flight::HeldWal;
use super::*;
use crate::wal::disk::{Disk, DiskFile};
use crate::wal::powercut::CutDisk;

/// A disk that others fill.
struct SharedDisk {
    inner: Directory,
    free: Arc<AtomicU64>,
}

impl Disk for SharedDisk {
    fn list(&self) -> io::Result<Vec<String>> {
        self.inner.list()
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        match self.free.load(Ordering::SeqCst) {
            0 => Err(io::ErrorKind::StorageFull.into()),
            _ => self.inner.create(name),
        }
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        self.inner.open(name)
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

    fn free_bytes(&self) -> Option<u64> {
        Some(self.free.load(Ordering::SeqCst))
    }
}

#[test]
fn a_full_disk_is_known_before_a_batch_is_refused_and_ends_with_it() {
    const FILE_BYTES: u64 = 32 << 20;
    let directory = tempfile::tempdir().unwrap();
    let free = Arc::new(AtomicU64::new(1 << 40));
    let disk = SharedDisk { inner: Directory::open(&directory.path().join("wal")).unwrap(), free: free.clone() };
    let settings =
        FileWalSettings { file_bytes: FILE_BYTES, hasty_file_bytes: FILE_BYTES, bytes_max: 1 << 30, background: false };
    let shard = open(FileWal::open(Box::new(disk), settings, 1).unwrap());
    block_on(shard.commit(vec![Change::created(topic(1, 1))])).unwrap();
    append(&shard, sized(100_000)).unwrap();
    assert_eq!(shard.produce_room(ROOM_BYTES), Ok(()));
    assert!(shard.status().full_ratio < 0.1);

    // What is made already is still written: the next MiB has a place, and the ratio says how much that is.
    free.store(0, Ordering::SeqCst);
    assert_eq!(shard.produce_room(ROOM_BYTES), Ok(()));
    let mut known = false;
    let mut ratio = shard.status().full_ratio;
    let refused = loop {
        match append(&shard, sized(100_000)) {
            Ok(_) => {
                let status = shard.status();
                assert!(status.full_ratio >= ratio, "{} after {ratio}", status.full_ratio);
                (known, ratio) = (status.no_room.is_some(), status.full_ratio);
            }
            Err(error) => break error,
        }
    };
    assert!(known && ratio == 1.0, "the disk is full, and the ratio was {ratio}");
    assert!(matches!(refused, AppendError::Full(_)), "{refused}");
    let status = shard.status();
    assert_eq!((status.refused_batches.disk_full, status.refused_batches.wal_full), (1, 0));
    assert!(status.no_room.is_some_and(|why| why.contains("disk")));
    assert_eq!(status.stopped, None);

    free.store(1 << 40, Ordering::SeqCst);
    assert_eq!(shard.produce_room(ROOM_BYTES), Ok(()));
    append(&shard, sized(100_000)).unwrap();
}

#[test]
fn a_full_log_counts_what_it_refuses_and_has_room_when_it_is_trimmed() {
    let (shard, _wal) = shard();
    assert!(shard.produce_room(ROOM_BYTES).is_ok());
    while append(&shard, sized(100_000)).is_ok() {}
    assert!(matches!(shard.produce_room(ROOM_BYTES), Err(Refused::Wal(_))), "{:?}", shard.produce_room(ROOM_BYTES));
    let status = shard.status();
    assert_eq!((status.refused_batches.wal_full, status.full_ratio), (1, 1.0));
    shard.published(shard.durable().next_seq);
    assert_eq!(shard.produce_room(ROOM_BYTES), Ok(()));
    assert!(shard.status().full_ratio < 0.5);
}

/// A small block takes a whole frame: the archiver must see the log fill.
#[test]
fn a_log_of_small_blocks_that_refuses_says_that_it_is_full() {
    let settings =
        FileWalSettings { file_bytes: 16 << 10, hasty_file_bytes: 16 << 10, bytes_max: 256 << 10, background: false };
    let shard = open(FileWal::open(Box::new(CutDisk::default()), settings, 1).unwrap());
    block_on(shard.commit(vec![Change::created(topic(1, 1))])).unwrap();
    while append(&shard, batch(1, 1)).is_ok() {}
    let durable = shard.durable();
    let (taken, bound) = (durable.wal_bytes, durable.wal_bytes_max);
    assert!(taken > bound / 4 * 3 && taken <= bound, "{taken} of {bound} bytes");
    shard.published(durable.next_seq);
    assert!(shard.durable().wal_bytes < 1 << 10, "{} bytes are left of it", shard.durable().wal_bytes);
}

#[test]
fn a_log_that_takes_nothing_for_another_reason_is_not_full() {
    let wal = HeldWal::new();
    let settings = ShardSettings { in_flight_bytes_max: 4_000, ..ShardSettings::default() };
    let shard = Shard::open(settings, Box::new(wal.clone()), Recovered::default(), None, clock()).unwrap();
    wal.order(Ok(()));
    block_on(shard.commit(vec![Change::created(topic(1, 1))])).unwrap();
    let send = shard.append(from_producer(partition(1), sized(3_000)));
    let look = || (shard.produce_room(ROOM_BYTES).unwrap_err(), shard.status());
    let flying = look();
    wal.order(Ok(()));
    block_on(send).unwrap();
    shard.begin_close();
    let closing = look();
    assert!(matches!((&flying.0, &closing.0), (Refused::InFlight(_), Refused::Stopped(_))), "{flying:?} {closing:?}");
    for (refused, status) in [flying, closing] {
        assert_eq!(status.no_room, Some(refused.to_string()));
        assert!(status.full_ratio < 0.1, "{refused}: {}", status.full_ratio);
    }
}

#[tokio::test(start_paused = true)]
async fn the_lag_is_the_age_of_the_oldest_block_that_is_not_shipped() {
    let (shard, _wal) = shard();
    append(&shard, batch(1, 1)).unwrap();
    let next = shard.durable().next_seq;
    tokio::time::advance(Duration::from_secs(90)).await;
    append(&shard, batch(1, 1)).unwrap();
    let status = shard.status();
    assert_eq!(status.unshipped_ms / 1000, 90);
    assert!(status.unshipped_bytes > 0);
    shard.shipped(next);
    assert_eq!(shard.status().unshipped_ms / 1000, 0);
    shard.shipped(next + 1);
    assert_eq!((shard.status().unshipped_ms, shard.status().unshipped_bytes), (0, 0));
}

/// A start reads when blocks were appended; a clock that stood in the future then makes none younger than now.
#[tokio::test(start_paused = true)]
async fn blocks_from_before_a_start_are_as_old_as_they_say() {
    for (then, now, lag_secs) in [(1_000_000, 1_060_000, 60), (9_000_000, 1_000_000, 0)] {
        let wal = MemoryWal::new(WAL_BYTES);
        let at = |ms: i64| -> Clock { Arc::new(move || ms) };
        let open = |clock: Clock| {
            Shard::open(ShardSettings::default(), Box::new(wal.clone()), Recovered::default(), None, clock).unwrap()
        };
        let shard = open(at(then));
        block_on(shard.commit(vec![Change::created(topic(1, 1))])).unwrap();
        shard.close();
        let shard = open(at(now));
        let status = shard.status();
        assert_eq!(status.unshipped_ms / 1000, lag_secs, "appended at {then}, started at {now}");
        assert!(status.unshipped_bytes > 0);
    }
}
