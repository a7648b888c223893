//! Readers, a writer and an archiver that takes the WAL away under them.

use std::sync::atomic::AtomicBool;
use std::thread;

use super::*;

const BATCHES: i64 = 400;

#[test]
fn readers_follow_while_the_archive_takes_the_wal_away() {
    let directory = TempDir::new().unwrap();
    let cold = Arc::new(ColdBlocks::default());
    let settings = ShardSettings { tail_bytes_max: 2_000, read_cache_bytes_max: 5_000, ..ShardSettings::default() };
    let wal = Box::new(file_wal(&directory));
    let shard = Shard::open(settings, wal, Recovered::default(), Some(cold.clone()), clock()).unwrap();
    block_on(shard.commit(vec![Change::created(topic(1, 1))])).unwrap();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let (shard, cold, done) = (&shard, &cold, &done);
        let writer = scope.spawn(move || {
            (0..BATCHES).for_each(|n| {
                append(shard, batch(1 + (n % 3) as i32, n)).unwrap();
            });
        });
        scope.spawn(move || {
            while !done.load(Ordering::SeqCst) {
                archive(shard, cold);
                thread::yield_now();
            }
        });
        let readers: Vec<_> =
            [1, 500, 1 << 20].map(|bytes_max| scope.spawn(move || follow(shard, bytes_max))).into_iter().collect();
        writer.join().unwrap();
        readers.into_iter().for_each(|reader| reader.join().unwrap());
        done.store(true, Ordering::SeqCst);
    });
    assert!(cold.bounds(partition(1)).is_some(), "something was taken away");
    let all = read_all(&*shard, partition(1), 0, 3_000);
    assert_eq!(all.len() as i64, BATCHES);
}

#[test]
fn a_slow_archive_returns_nothing_above_the_bounds_it_tells() {
    let cold = Arc::new(ColdBlocks::default());
    let wal = Box::new(MemoryWal::new(WAL_BYTES));
    let shard = Shard::open(ShardSettings::default(), wal, Recovered::default(), Some(cold.clone()), clock()).unwrap();
    block_on(shard.commit(vec![Change::created(topic(1, 1))])).unwrap();
    let grow = || {
        (0..2).for_each(|_| {
            append(&shard, batch(10, 1)).unwrap();
        });
        archive(&shard, &cold);
    };
    grow();
    let (open, gate) = tokio::sync::oneshot::channel();
    *cold.gate.lock() = Some(gate);
    let mut reading = shard.read(partition(1), 0, ReadLimits { bytes_max: 1 << 20 });
    assert!(poll_once(&mut reading).is_none());
    grow();
    open.send(()).unwrap();
    let read = block_on(reading).unwrap();
    assert_eq!((read.next, read.bounds.high_watermark), (40, 40));
}

#[test]
fn what_is_in_no_tier_is_not_skipped() {
    let (shard, _wal) = shard();
    (0..3).for_each(|_| {
        append(&shard, batch(10, 1)).unwrap();
    });
    // Trimmed, although nobody took it over.
    shard.published(2);
    let read = |from| block_on(shard.read(partition(1), from, ReadLimits { bytes_max: 1 }));
    assert!(matches!(read(5), Err(ReadError::Corrupt(text)) if text.contains("offset 5")));
    assert_eq!(split(&read(10).unwrap())[0].base_offset(), 10);
}

#[test]
fn a_reader_is_led_over_what_was_compacted_away_and_no_further() {
    let cold = Arc::new(ColdBlocks::default());
    let wal = Box::new(MemoryWal::new(WAL_BYTES));
    let shard = Shard::open(ShardSettings::default(), wal, Recovered::default(), Some(cold.clone()), clock()).unwrap();
    block_on(shard.commit(vec![Change::created(topic(1, 1))])).unwrap();
    let read = |from| block_on(shard.read(partition(1), from, ReadLimits { bytes_max: 1 << 20 })).unwrap();
    let bases = |read: &Read| split(read).iter().map(Batch::base_offset).collect::<Vec<_>>();
    for _ in 0..4 {
        append(&shard, batch(10, 1)).unwrap();
    }
    archive(&shard, &cold);
    append(&shard, batch(10, 1)).unwrap();
    cold.compacted.store(20, Ordering::SeqCst);
    assert_eq!((bases(&read(5)), read(5).next), (vec![20, 30], 40));
    // Nothing is left in the archive: what is still in the WAL comes next.
    cold.compacted.store(40, Ordering::SeqCst);
    for from in [0, 15, 29] {
        assert_eq!((bases(&read(from)), read(from).next), (vec![40], 50), "{from}");
    }
    // All of it is archived, and nothing is left.
    archive(&shard, &cold);
    cold.compacted.store(50, Ordering::SeqCst);
    assert_eq!((read(5).batches.len(), read(5).next), (0, 50));
}

/// Takes over all durable blocks but the newest.
fn archive(shard: &Shard, cold: &ColdBlocks) {
    let known = cold.blocks.lock().last().map_or(0, |block| block.header().seq + 1);
    let Ok(blocks) = block_on(shard.blocks(known, 20_000)) else { return };
    let new: Vec<Block> = blocks.into_iter().map(|block| Block::parse(block.bytes).unwrap()).collect();
    let Some(newest) = new.last().map(|block| block.header().seq) else { return };
    cold.blocks.lock().extend(new);
    shard.shipped(newest + 1);
    shard.published(newest + 1);
}

/// Reads from the beginning until all came, without a hole.
fn follow(shard: &Shard, bytes_max: usize) {
    let (mut next, mut seen) = (0, 0);
    while seen < BATCHES {
        block_on(Log::wait(shard, partition(1), next)).unwrap();
        let read = block_on(shard.read(partition(1), next, ReadLimits { bytes_max })).unwrap();
        for batch in split(&read) {
            assert_eq!(batch.base_offset(), next);
            assert_eq!(batch.base_timestamp(), seen, "each batch once, in order");
            next = batch.last_offset() + 1;
            seen += 1;
        }
        assert_eq!(read.next, next);
    }
}
