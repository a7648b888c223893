//! The log's contract as code: what every engine is run against.
//!
//! An engine's tests implement [`Engine`] and call [`run`], which makes a fresh log for each promise. Nothing here sleeps or
//! needs a runtime: futures are driven by [`block_on`]. Panics name the promise that was broken.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::thread;

use bytes::{Bytes, BytesMut};

use super::{
    Append, AppendError, Appended, Bounds, BoxFuture, Chain, EdgeBatch, EpochEnd, Log, Read, ReadError, ReadLimits,
    Source, StreamKey, TrimError,
};
use crate::batch::{Batch, BatchBuilder, Compression};
pub use crate::block_on::block_on;
use crate::name::{EdgeId, Incarnation, Offset, Partition, StreamName, TopicId};

/// What the suite needs of an engine under test.
pub trait Engine {
    /// The log.
    fn log(&self) -> Arc<dyn Log>;

    /// Makes a new, empty partition.
    fn create(&mut self) -> Partition;

    /// Closes the log and opens it again on what it stored; `false` if it stores nothing beyond its life.
    fn reopen(&mut self) -> bool;

    /// After how many bytes at most the engine says that it is full; `None` skips the promise about it.
    /// Trimming a partition must make room again (an engine that needs more than that does it in [`Engine::make_room`]).
    fn bytes_until_full(&self) -> Option<usize> {
        None
    }

    /// Does what turns trimmed records into room.
    fn make_room(&mut self) {}
}

/// One promise of the contract.
pub type Promise = fn(&mut dyn Engine);

/// All promises, by name.
pub const PROMISES: &[(&str, Promise)] = &[
    ("offsets follow the order of calls", offsets_follow_the_order_of_calls),
    ("bytes are kept but for base offset and leader epoch", bytes_are_kept),
    ("a read from inside a batch returns the whole batch", a_read_from_inside_a_batch_returns_it_whole),
    ("a read is bounded, and never empty below the high watermark", a_read_is_bounded),
    ("bounds are kept", bounds_are_kept),
    ("an unknown partition is named", an_unknown_partition_is_named),
    ("partitions are apart", partitions_are_apart),
    ("a wait ends with the append", a_wait_ends_with_the_append),
    ("a trim moves the log start and nothing else", a_trim_moves_the_log_start),
    ("records are found by time", records_are_found_by_time),
    ("a repeated sequence is stored once", a_repeated_sequence_is_stored_once),
    ("five batches are remembered", five_batches_are_remembered),
    ("a repeat in flight waits for the first", a_repeat_in_flight_waits_for_the_first),
    ("an edge's batches adjoin", an_edges_batches_adjoin),
    ("a declared gap is taken", a_declared_gap_is_taken),
    ("epochs end where the next begins", epochs_end_where_the_next_begins),
    ("a full log refuses and keeps what it has", a_full_log_refuses),
    ("concurrent writers and readers see one order", concurrent_writers_and_readers),
    ("what was acknowledged is there after reopening", acknowledged_is_there_after_reopening),
];

/// Runs every promise, each on a fresh engine.
pub fn run(make: &mut dyn FnMut() -> Box<dyn Engine>) {
    for (name, promise) in PROMISES {
        println!("promise: {name}");
        promise(&mut *make());
    }
}

/// A batch of `records` records with timestamps from `timestamp` on, 1 ms apart.
pub fn batch(records: i32, timestamp: i64) -> Batch {
    timed(&(0..i64::from(records)).map(|n| timestamp + n).collect::<Vec<_>>())
}

/// A batch with one record per timestamp.
pub fn timed(timestamps: &[i64]) -> Batch {
    let mut builder = BatchBuilder::default();
    for (n, timestamp) in timestamps.iter().enumerate() {
        builder.push(*timestamp, Some(b"key"), Some(format!("value {n}").as_bytes()), &[]);
    }
    builder.finish(0, Compression::None)
}

/// A batch with one record of `bytes` bytes.
pub fn sized(bytes: usize) -> Batch {
    let mut builder = BatchBuilder::default();
    builder.push(1, None, Some(&vec![b'x'; bytes]), &[]);
    builder.finish(0, Compression::None)
}

/// The same records as an idempotent producer sends them, sealed again.
pub fn produced(batch: &Batch, producer_id: i64, epoch: i16, sequence: i32) -> Batch {
    let mut bytes = BytesMut::from(&batch.bytes()[..]);
    bytes[43..51].copy_from_slice(&producer_id.to_be_bytes());
    bytes[51..53].copy_from_slice(&epoch.to_be_bytes());
    bytes[53..57].copy_from_slice(&sequence.to_be_bytes());
    let crc = crc32c::crc32c(&bytes[21..]);
    bytes[17..21].copy_from_slice(&crc.to_be_bytes());
    Batch::parse(bytes.freeze()).expect("a sealed batch")
}

/// What compaction leaves of an uncompressed batch of small records: those that it keeps, by their number, with their offsets.
pub fn thinned(batch: &Batch, keep: &[usize]) -> Batch {
    let (header, mut rest) = batch.bytes().split_at(crate::batch::HEADER_BYTES);
    let mut bytes = BytesMut::from(header);
    for number in 0..batch.record_count() as usize {
        assert!(rest[0] < 0x80, "a record of less than 64 bytes has a length of one byte");
        let (record, behind) = rest.split_at(1 + usize::from(rest[0] / 2));
        if keep.contains(&number) {
            bytes.extend_from_slice(record);
        }
        rest = behind;
    }
    let length = bytes.len() as i32 - 12;
    bytes[8..12].copy_from_slice(&length.to_be_bytes());
    bytes[57..61].copy_from_slice(&(keep.len() as i32).to_be_bytes());
    let crc = crc32c::crc32c(&bytes[21..]);
    bytes[17..21].copy_from_slice(&crc.to_be_bytes());
    Batch::parse(bytes.freeze()).expect("a thinned batch may be stored")
}

/// A stream of edge `gw-{edge}` in its incarnation `life`.
pub fn stream(edge: u8, life: u8) -> StreamKey {
    StreamKey {
        edge: EdgeId::parse(&format!("gw-{edge}")).expect("a name"),
        stream: StreamName::parse("telemetry").expect("a name"),
        incarnation: Incarnation([life; 16]),
    }
}

/// An append of a stream's records `first ..= last`.
pub fn from_edge(partition: Partition, stream: &StreamKey, first: Offset, last: Offset) -> Append {
    let batch = batch((last - first + 1) as i32, 1_000 + first);
    let (stream, next) = (stream.clone(), last + 1);
    Append {
        partition,
        batch,
        source: Source::Edge(EdgeBatch { stream, first, next, chain: Chain(next as u64), gap: None }),
    }
}

/// An append of a producer.
pub fn from_producer(partition: Partition, batch: Batch) -> Append {
    Append { partition, batch, source: Source::Producer }
}

/// All batches from `from` to the end, read `bytes_max` bytes at a time and checked.
pub fn read_all(log: &dyn Log, partition: Partition, from: Offset, bytes_max: usize) -> Vec<Batch> {
    let (mut at, mut batches) = (from, Vec::new());
    loop {
        let read = block_on(log.read(partition, at, ReadLimits { bytes_max })).expect("within the bounds");
        let some = split(&read);
        assert!(read.next > at || some.is_empty(), "a read that returns something moves on");
        if some.is_empty() {
            return batches;
        }
        at = read.next;
        batches.extend(some);
    }
}

/// The batches of a read, each with its CRC checked.
pub fn split(read: &Read) -> Vec<Batch> {
    let mut batches = Vec::new();
    for slice in &read.batches {
        let mut slice = slice.clone();
        while let Some(batch) = Batch::split_first(&mut slice).expect("whole, checked batches") {
            batches.push(batch);
        }
    }
    batches
}

/// Polls a future once.
pub fn poll_once<T>(future: &mut BoxFuture<'_, T>) -> Option<T> {
    match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}

fn append(log: &dyn Log, append: Append) -> Result<Appended, AppendError> {
    block_on(log.append(append))
}

fn stored(log: &dyn Log, partition: Partition, batch: Batch) -> Appended {
    append(log, from_producer(partition, batch)).expect("appended")
}

fn nowhere() -> Partition {
    Partition { topic: TopicId([0xee; 16]), index: 9 }
}

fn offsets_follow_the_order_of_calls(engine: &mut dyn Engine) {
    let (partition, log) = (engine.create(), engine.log());
    let mut calls: Vec<_> = (1..=20).map(|records| log.append(from_producer(partition, batch(records, 1)))).collect();
    // Answered last first: the place in the order was taken by the call.
    let mut answers: Vec<Appended> = Vec::new();
    while let Some(call) = calls.pop() {
        answers.push(block_on(call).expect("appended"));
    }
    answers.reverse();
    let mut next = 0;
    for (answer, records) in answers.iter().zip(1..) {
        assert_eq!((answer.base_offset, answer.last_offset), (next, next + records - 1));
        assert!(!answer.duplicate);
        next += records;
    }
    assert_eq!(log.bounds(partition).expect("bounds").high_watermark, next);
}

fn bytes_are_kept(engine: &mut dyn Engine) {
    let (partition, log) = (engine.create(), engine.log());
    let mut sent = vec![batch(3, 5), produced(&batch(2, 9), 77, 0, 0)];
    let mut builder = BatchBuilder::default();
    (0..50).for_each(|n| builder.push(n, Some(b"k"), Some(&[b'v'; 100]), &[(b"h", b"w")]));
    sent.push(builder.finish(0, Compression::Zstd));
    sent.iter().for_each(|batch| {
        stored(&*log, partition, batch.clone());
    });
    let epoch = log.bounds(partition).expect("bounds").leader_epoch;
    let found = read_all(&*log, partition, 0, 1 << 20);
    assert_eq!(found.len(), sent.len());
    for (found, sent) in found.iter().zip(&sent) {
        assert_eq!(found.bytes()[16..], sent.bytes()[16..], "nothing but 12 bytes differs");
        assert_eq!(found.bytes()[8..12], sent.bytes()[8..12]);
        assert_eq!(found.leader_epoch(), epoch);
    }
}

fn a_read_from_inside_a_batch_returns_it_whole(engine: &mut dyn Engine) {
    let (partition, log) = (engine.create(), engine.log());
    (0..3).for_each(|_| {
        stored(&*log, partition, batch(10, 1));
    });
    for (from, base) in [(0, 0), (9, 0), (10, 10), (15, 10), (29, 20)] {
        let read = block_on(log.read(partition, from, ReadLimits { bytes_max: 1 })).expect("read");
        let batches = split(&read);
        assert_eq!(batches.len(), 1, "one batch at least, and no more than the limit allows");
        assert_eq!((batches[0].base_offset(), read.next), (base, base + 10), "from {from}");
    }
}

fn a_read_is_bounded(engine: &mut dyn Engine) {
    let (partition, log) = (engine.create(), engine.log());
    (0..20).for_each(|_| {
        stored(&*log, partition, sized(1_000));
    });
    let one = split(&block_on(log.read(partition, 0, ReadLimits { bytes_max: 0 })).expect("read"))[0].len();
    for count in [1, 2, 7] {
        let read = block_on(log.read(partition, 3, ReadLimits { bytes_max: one * count + one / 2 })).expect("read");
        assert_eq!((split(&read).len(), read.next), (count, 3 + count as i64));
        assert_eq!(read.bytes(), one * count);
    }
    assert_eq!(read_all(&*log, partition, 0, one * 3).len(), 20);
}

fn bounds_are_kept(engine: &mut dyn Engine) {
    let (partition, log) = (engine.create(), engine.log());
    let bounds = log.bounds(partition).expect("bounds");
    assert_eq!((bounds.log_start, bounds.high_watermark), (0, 0));
    stored(&*log, partition, batch(4, 1));
    let limits = ReadLimits { bytes_max: 100 };
    let end = block_on(log.read(partition, 4, limits)).expect("at the high watermark");
    assert_eq!((end.bytes(), end.next, end.bounds.high_watermark), (0, 4, 4));
    for outside in [-1, 5, i64::MAX] {
        let refused = block_on(log.read(partition, outside, limits)).expect_err("outside");
        assert!(matches!(refused, ReadError::OffsetOutOfRange { requested, bounds }
            if requested == outside && bounds.high_watermark == 4));
    }
}

fn an_unknown_partition_is_named(engine: &mut dyn Engine) {
    engine.create();
    let (log, limits) = (engine.log(), ReadLimits { bytes_max: 1 });
    let unknown = ReadError::UnknownPartition(nowhere());
    assert_eq!(append(&*log, from_producer(nowhere(), batch(1, 1))), Err(AppendError::UnknownPartition(nowhere())));
    assert_eq!(log.bounds(nowhere()), Err(unknown.clone()));
    assert_eq!(block_on(log.read(nowhere(), 0, limits)).expect_err("unknown"), unknown);
    assert_eq!(block_on(log.wait(nowhere(), 0)), Err(unknown.clone()));
    assert_eq!(block_on(log.find_time(nowhere(), 0)), Err(unknown.clone()));
    assert_eq!(block_on(log.max_time(nowhere())), Err(unknown.clone()));
    assert_eq!(log.epoch_end(nowhere(), 0), Err(unknown));
    assert_eq!(block_on(log.trim(nowhere(), 0)), Err(TrimError::UnknownPartition(nowhere())));
}

fn partitions_are_apart(engine: &mut dyn Engine) {
    let (a, b) = (engine.create(), engine.create());
    let log = engine.log();
    let calls: Vec<_> = (0..10)
        .flat_map(|n| [(a, n), (b, 100 + n)])
        .map(|(partition, timestamp)| log.append(from_producer(partition, batch(1, timestamp))))
        .collect();
    calls.into_iter().for_each(|call| {
        block_on(call).expect("appended");
    });
    for (partition, first) in [(a, 0), (b, 100)] {
        let found = read_all(&*log, partition, 0, 1 << 20);
        let timestamps: Vec<_> = found.iter().map(Batch::base_timestamp).collect();
        assert_eq!(timestamps, (first..first + 10).collect::<Vec<_>>());
        assert!(found.iter().zip(0..).all(|(batch, offset)| batch.base_offset() == offset));
    }
}

fn a_wait_ends_with_the_append(engine: &mut dyn Engine) {
    let (partition, log) = (engine.create(), engine.log());
    let mut waiting = log.wait(partition, 0);
    let mut farther = log.wait(partition, 2);
    assert!(poll_once(&mut waiting).is_none(), "nothing is above the end");
    thread::scope(|scope| {
        let waiter = scope.spawn(|| block_on(waiting));
        stored(&*log, partition, batch(2, 1));
        assert_eq!(waiter.join().expect("no panic"), Ok(()));
    });
    assert!(poll_once(&mut farther).is_none());
    stored(&*log, partition, batch(1, 1));
    assert_eq!(block_on(farther), Ok(()));
    assert_eq!(block_on(log.wait(partition, 0)), Ok(()), "already above");
}

fn a_trim_moves_the_log_start(engine: &mut dyn Engine) {
    let (partition, log) = (engine.create(), engine.log());
    (0..3).for_each(|_| {
        stored(&*log, partition, batch(10, 1));
    });
    for (before, expected) in [(5, 5), (3, 5), (20, 20)] {
        assert_eq!(block_on(log.trim(partition, before)), Ok(expected));
        assert_eq!(log.bounds(partition).expect("bounds").log_start, expected);
    }
    let limits = ReadLimits { bytes_max: 1 << 20 };
    let below = block_on(log.read(partition, 19, limits)).expect_err("below the log start");
    assert!(matches!(below, ReadError::OffsetOutOfRange { bounds, .. } if bounds.log_start == 20));
    assert!(matches!(block_on(log.trim(partition, 31)), Err(TrimError::OffsetOutOfRange { .. })));
    // Inside a batch: it is still read whole.
    assert_eq!(block_on(log.trim(partition, 25)), Ok(25));
    assert_eq!(split(&block_on(log.read(partition, 25, limits)).expect("read"))[0].base_offset(), 20);
    assert_eq!(block_on(log.trim(partition, 30)), Ok(30));
    let empty = log.bounds(partition).expect("bounds");
    assert_eq!((empty.log_start, empty.high_watermark), (30, 30), "an emptied partition goes on where it ended");
    let next = stored(&*log, partition, batch(1, 1));
    assert_eq!((next.base_offset, next.log_start), (30, 30));
}

fn records_are_found_by_time(engine: &mut dyn Engine) {
    let (partition, log) = (engine.create(), engine.log());
    assert_eq!(block_on(log.find_time(partition, 0)), Ok(None));
    assert_eq!(block_on(log.max_time(partition)), Ok(None));
    // Clocks of devices jump: timestamps neither rise nor adjoin.
    for timestamps in [[100, 110, 120], [300, 50, 310], [200, 310, 220]] {
        stored(&*log, partition, timed(&timestamps));
    }
    for (at, expected) in [(0, Some(0)), (100, Some(0)), (101, Some(1)), (121, Some(3)), (301, Some(5)), (311, None)] {
        let found = block_on(log.find_time(partition, at)).expect("found");
        assert_eq!(found.map(|point| point.offset), expected, "at {at}");
        assert!(found.is_none_or(|point| point.timestamp >= at));
    }
    let greatest = block_on(log.max_time(partition)).expect("found").expect("some");
    assert_eq!((greatest.offset, greatest.timestamp), (5, 310), "the first of those that share it");
    block_on(log.trim(partition, 6)).expect("trimmed");
    let found = block_on(log.find_time(partition, 0)).expect("found").expect("some");
    assert_eq!((found.offset, found.timestamp), (6, 200), "what was trimmed is not found");
    assert_eq!(block_on(log.max_time(partition)).expect("found").map(|point| point.offset), Some(7));
}

fn a_repeated_sequence_is_stored_once(engine: &mut dyn Engine) {
    let (partition, log) = (engine.create(), engine.log());
    let send = |pid, epoch, sequence, records| {
        append(&*log, from_producer(partition, produced(&batch(records, 1), pid, epoch, sequence)))
    };
    let first = send(7, 0, 0, 3).expect("appended");
    send(7, 0, 3, 2).expect("appended");
    let again = send(7, 0, 0, 3).expect("a repeat is a success");
    assert_eq!(again, Appended { duplicate: true, ..first });
    let gap = AppendError::OutOfOrderSequence { producer_id: 7, expected: 5, found: 6 };
    assert_eq!(send(7, 0, 6, 1), Err(gap));
    assert_eq!(
        send(7, 1, 5, 1),
        Err(AppendError::OutOfOrderSequence { producer_id: 7, expected: 0, found: 5 }),
        "a new epoch begins at 0"
    );
    send(7, 1, 0, 1).expect("appended");
    assert_eq!(send(7, 0, 5, 1), Err(AppendError::ProducerFenced { producer_id: 7, current: 1, found: 0 }));
    send(8, 0, 40, 1).expect("an unknown producer begins anywhere");
    send(9, 0, i32::MAX, 2).expect("appended");
    send(9, 0, 1, 1).expect("sequences wrap to 0");
    let other = engine.create();
    append(&*engine.log(), from_producer(other, produced(&batch(1, 1), 7, 1, 0))).expect("sequences are per partition");
    let count: i32 = read_all(&*engine.log(), partition, 0, 1 << 20).iter().map(Batch::record_count).sum();
    assert_eq!(count, 3 + 2 + 1 + 1 + 2 + 1);
}

fn five_batches_are_remembered(engine: &mut dyn Engine) {
    let (partition, log) = (engine.create(), engine.log());
    let send = |sequence| append(&*log, from_producer(partition, produced(&batch(1, 1), 7, 0, sequence)));
    (0..7).for_each(|sequence| {
        send(sequence).expect("appended");
    });
    for sequence in 2..7 {
        let again = send(sequence).expect("remembered");
        assert_eq!((again.base_offset, again.duplicate), (i64::from(sequence), true));
    }
    assert!(matches!(send(1), Err(AppendError::OutOfOrderSequence { expected: 7, found: 1, .. })));
}

fn a_repeat_in_flight_waits_for_the_first(engine: &mut dyn Engine) {
    let (partition, log) = (engine.create(), engine.log());
    let send = || log.append(from_producer(partition, produced(&batch(4, 1), 7, 0, 0)));
    let (first, again) = (send(), send());
    let again = block_on(again).expect("a repeat is a success");
    assert!(again.duplicate);
    assert_eq!(log.bounds(partition).expect("bounds").high_watermark, 4, "the answer speaks of durable records");
    let first = block_on(first).expect("appended");
    assert_eq!((first.base_offset, first.duplicate), (again.base_offset, false));
}

fn an_edges_batches_adjoin(engine: &mut dyn Engine) {
    let (partition, log) = (engine.create(), engine.log());
    let (life, next_life) = (stream(1, 1), stream(1, 2));
    let send = |stream: &StreamKey, first, last| append(&*log, from_edge(partition, stream, first, last));
    send(&life, 40, 49).expect("an unknown stream begins anywhere");
    send(&life, 50, 54).expect("adjoins");
    let wrong = |have| Err(AppendError::WrongPosition { next: 55, have });
    assert_eq!(send(&life, 50, 54), wrong(true), "a repeat is all there");
    assert_eq!(send(&life, 40, 42), wrong(true));
    assert_eq!(send(&life, 53, 57), wrong(false), "never trimmed to fit");
    assert_eq!(send(&life, 56, 57), wrong(false), "a hole that was not declared");
    let (one, two) = (log.append(from_edge(partition, &life, 55, 55)), log.append(from_edge(partition, &life, 56, 56)));
    block_on(two).expect("positions in flight count");
    block_on(one).expect("appended");
    send(&next_life, 0, 3).expect("another incarnation is another stream");
    let found = read_all(&*log, partition, 0, 1 << 20);
    assert_eq!(found.iter().map(Batch::record_count).sum::<i32>(), 10 + 5 + 2 + 4);
}

fn a_declared_gap_is_taken(engine: &mut dyn Engine) {
    let (partition, log) = (engine.create(), engine.log());
    let stream = stream(1, 1);
    let send = |first, last, gap| {
        let mut append = from_edge(partition, &stream, first, last);
        if let Source::Edge(edge) = &mut append.source {
            edge.gap = gap;
        }
        block_on(log.append(append))
    };
    send(0, 9, None).expect("appended");
    let wrong = Err(AppendError::WrongPosition { next: 10, have: false });
    assert_eq!(send(20, 24, Some((12, 20))), wrong, "10 and 11 are missing undeclared");
    assert_eq!(send(20, 24, Some((10, 19))), wrong, "19 is missing undeclared");
    send(20, 24, Some((10, 20))).expect("declared");
    send(30, 30, Some((22, 30))).expect("what was dropped may have come before it was dropped");
    assert_eq!(send(31, 31, None).expect("adjoins").base_offset, 16);
}

fn epochs_end_where_the_next_begins(engine: &mut dyn Engine) {
    let (partition, log) = (engine.create(), engine.log());
    stored(&*log, partition, batch(3, 1));
    let bounds = log.bounds(partition).expect("bounds");
    let newest = EpochEnd { epoch: bounds.leader_epoch, end: 3 };
    assert_eq!(log.epoch_end(partition, bounds.leader_epoch), Ok(Some(newest)));
    assert_eq!(log.epoch_end(partition, i32::MAX), Ok(Some(newest)), "the largest that is at most the one asked for");
    assert_eq!(log.epoch_end(partition, -1), Ok(None));
}

fn a_full_log_refuses(engine: &mut dyn Engine) {
    let Some(bytes_until_full) = engine.bytes_until_full() else { return };
    let (partition, log) = (engine.create(), engine.log());
    let send = |log: &dyn Log| append(log, from_producer(partition, sized(16 * 1024)));
    let mut kept = 0i64;
    let refused = loop {
        match send(&*log) {
            Ok(appended) => assert_eq!(appended.base_offset, kept),
            Err(refused) => break refused,
        }
        kept += 1;
        assert!(kept as usize * 16 * 1024 <= 2 * bytes_until_full, "a log is bounded");
    };
    assert!(matches!(refused, AppendError::Full(_)), "{refused}");
    assert!(matches!(send(&*log), Err(AppendError::Full(_))), "and goes on refusing");
    assert_eq!(log.bounds(partition).expect("bounds").high_watermark, kept);
    assert_eq!(read_all(&*log, partition, 0, 1 << 20).len() as i64, kept, "what it has can be read");
    block_on(log.trim(partition, kept)).expect("a full log can be trimmed");
    engine.make_room();
    assert_eq!(send(&*engine.log()).expect("there is room again").base_offset, kept);
}

fn concurrent_writers_and_readers(engine: &mut dyn Engine) {
    const WRITERS: i64 = 4;
    const BATCHES: i64 = 50;
    let partitions = [engine.create(), engine.create()];
    let log = engine.log();
    thread::scope(|scope| {
        for writer in 0..WRITERS {
            let log = &log;
            scope.spawn(move || {
                for n in 0..BATCHES {
                    let partition = partitions[(n % 2) as usize];
                    stored(&**log, partition, batch(1 + (n % 3) as i32, writer * 1_000_000 + n * 100));
                }
            });
        }
        for partition in partitions {
            let log = &log;
            scope.spawn(move || follow(&**log, partition, WRITERS * BATCHES / 2));
        }
    });
}

/// Reads a partition as it grows until `batches` came, and checks that they are gapless and in each writer's order.
fn follow(log: &dyn Log, partition: Partition, batches: i64) {
    let (mut next, mut left) = (0, batches);
    let mut newest: BTreeMap<i64, i64> = BTreeMap::new();
    while left > 0 {
        block_on(log.wait(partition, next)).expect("the log is open");
        let read = block_on(log.read(partition, next, ReadLimits { bytes_max: 2_000 })).expect("read");
        let some = split(&read);
        assert!(!some.is_empty(), "a wait that ended left something to read");
        for batch in some {
            assert_eq!(batch.base_offset(), next, "no gap and no repeat");
            assert!(batch.last_offset() < read.bounds.high_watermark);
            let (writer, n) = (batch.base_timestamp() / 1_000_000, batch.base_timestamp() % 1_000_000);
            assert!(newest.insert(writer, n).is_none_or(|before| before < n), "each writer's order is kept");
            next = batch.last_offset() + 1;
            left -= 1;
        }
    }
    assert_eq!(log.bounds(partition).expect("bounds").high_watermark, next);
}

fn acknowledged_is_there_after_reopening(engine: &mut dyn Engine) {
    let (a, b) = (engine.create(), engine.create());
    let log = engine.log();
    for n in 0..6 {
        stored(&*log, a, produced(&batch(3, 100 * i64::from(n)), 7, 2, 3 * n));
        append(&*log, from_edge(b, &stream(1, 1), 10 * i64::from(n), 10 * i64::from(n) + 9)).expect("appended");
    }
    block_on(log.trim(a, 4)).expect("trimmed");
    let expected: Vec<Vec<Bytes>> = [(a, 4), (b, 0)].map(|(partition, from)| bytes(&*log, partition, from)).to_vec();
    let bounds = [a, b].map(|partition| log.bounds(partition).expect("bounds"));
    drop(log);
    if !engine.reopen() {
        return;
    }
    let log = engine.log();
    for (partition, before) in [a, b].into_iter().zip(bounds) {
        let now = log.bounds(partition).expect("bounds");
        assert!(now.leader_epoch >= before.leader_epoch, "it may have changed its owner: {now:?}, before {before:?}");
        assert_eq!(Bounds { leader_epoch: before.leader_epoch, ..now }, before);
    }
    assert_eq!([(a, 4), (b, 0)].map(|(partition, from)| bytes(&*log, partition, from)).to_vec(), expected);
    let found = block_on(log.find_time(a, 300)).expect("found").expect("some");
    assert_eq!((found.offset, found.timestamp), (9, 300));
    let again = append(&*log, from_producer(a, produced(&batch(3, 200), 7, 2, 6))).expect("still known");
    assert_eq!((again.base_offset, again.duplicate), (6, true));
    assert!(matches!(
        append(&*log, from_producer(a, produced(&batch(1, 1), 7, 2, 20))),
        Err(AppendError::OutOfOrderSequence { expected: 18, .. })
    ));
    assert_eq!(
        append(&*log, from_edge(b, &stream(1, 1), 50, 59)),
        Err(AppendError::WrongPosition { next: 60, have: true })
    );
    assert_eq!(append(&*log, from_edge(b, &stream(1, 1), 60, 60)).expect("adjoins").base_offset, 60);
    assert_eq!(stored(&*log, a, batch(1, 1)).base_offset, 18, "offsets go on");
}

fn bytes(log: &dyn Log, partition: Partition, from: Offset) -> Vec<Bytes> {
    read_all(log, partition, from, 1 << 20).into_iter().map(Batch::into_bytes).collect()
}
