//! The reference engine: a log in memory, bounded, that says what the contract means in the fewest lines.
//!
//! It promises everything the seam promises but survival: what it holds ends with the process. When its bytes reach the
//! bound, appends are refused with [`AppendError::Full`] until something is trimmed.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use event_listener::{Event, EventListener};
use parking_lot::Mutex;

use super::idempotence::{BATCHES_REMEMBERED, Sequenced, Verdict};
use super::idempotence::{check_position, check_sequence, is_idempotent, last_sequence};
use super::{
    Append, AppendError, Appended, Bounds, BoxFuture, Chain, EpochEnd, Log, Read, ReadError, ReadLimits, Source,
    StreamKey, TimePoint, TrimError,
};
use crate::batch::Batch;
use crate::limits::BATCH_UNPACKED_BYTES_MAX;
use crate::name::{Offset, Partition, TimestampMs};

/// A log in memory. Clones are handles to the same log.
#[derive(Debug, Clone)]
pub struct MemoryLog {
    bytes_max: usize,
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug, Default)]
struct Inner {
    bytes: usize,
    closed: bool,
    partitions: BTreeMap<Partition, Records>,
    streams: HashMap<StreamKey, (Offset, Chain)>,
}

#[derive(Debug, Default)]
struct Records {
    batches: VecDeque<Batch>,
    log_start: Offset,
    next: Offset,
    /// Leader epochs and the offsets they begin at, ascending.
    epochs: Vec<(i32, Offset)>,
    producers: HashMap<i64, VecDeque<Sequenced>>,
    grown: Event,
}

impl Records {
    fn bounds(&self) -> Bounds {
        Bounds { log_start: self.log_start, high_watermark: self.next, leader_epoch: self.leader_epoch() }
    }

    fn leader_epoch(&self) -> i32 {
        self.epochs.last().map_or(0, |(epoch, _)| *epoch)
    }

    /// Index of the batch that contains `offset`, or of the first after it.
    fn find(&self, offset: Offset) -> usize {
        self.batches.partition_point(|batch| batch.last_offset() < offset)
    }

    fn push(&mut self, batch: &Batch) -> Appended {
        let base_offset = self.next;
        let epoch = self.leader_epoch();
        let mut copy = BytesMut::from(&batch.bytes()[..]);
        Batch::place(&mut copy, base_offset, epoch);
        let placed = Batch::trusted(copy.freeze()).expect("a placed batch keeps its length");
        let last_offset = placed.last_offset();
        if is_idempotent(batch) {
            let known = self.producers.entry(batch.producer_id()).or_default();
            if known.len() == BATCHES_REMEMBERED {
                known.pop_front();
            }
            known.push_back(Sequenced {
                epoch: batch.producer_epoch(),
                first_sequence: batch.base_sequence(),
                last_sequence: last_sequence(batch),
                base_offset,
                last_offset,
            });
        }
        self.batches.push_back(placed);
        self.next = last_offset + 1;
        Appended { base_offset, last_offset, log_start: self.log_start, duplicate: false }
    }
}

impl MemoryLog {
    /// An empty log that holds `bytes_max` bytes of batches at most.
    pub fn new(bytes_max: usize) -> Self {
        Self { bytes_max, inner: Arc::default() }
    }

    /// Makes a partition; one that exists stays as it is.
    pub fn create(&self, partition: Partition) {
        let records = || Records { epochs: vec![(0, 0)], ..Records::default() };
        self.inner.lock().partitions.entry(partition).or_insert_with(records);
    }

    /// Removes a partition and its records.
    pub fn remove(&self, partition: Partition) {
        let mut inner = self.inner.lock();
        if let Some(records) = inner.partitions.remove(&partition) {
            inner.bytes -= records.batches.iter().map(Batch::len).sum::<usize>();
            records.grown.notify(usize::MAX);
        }
    }

    /// Begins a leader epoch in every partition, `skip` offsets above its end.
    pub fn start_epoch(&self, epoch: i32, skip: i64) {
        for records in self.inner.lock().partitions.values_mut() {
            records.next += skip;
            records.epochs.push((epoch, records.next));
            records.grown.notify(usize::MAX);
        }
    }

    /// How far a stream is stored.
    pub fn position(&self, key: &StreamKey) -> Option<(Offset, Chain)> {
        self.inner.lock().streams.get(key).copied()
    }

    /// Bytes of batches held.
    pub fn bytes(&self) -> usize {
        self.inner.lock().bytes
    }

    /// Ends all waits; what is called afterwards is refused.
    pub fn close(&self) {
        let mut inner = self.inner.lock();
        inner.closed = true;
        inner.partitions.values().for_each(|records| {
            records.grown.notify(usize::MAX);
        });
    }

    fn append_now(&self, append: &Append) -> Result<Appended, AppendError> {
        let mut inner = self.inner.lock();
        let inner = &mut *inner;
        if inner.closed {
            return Err(AppendError::Closed);
        }
        let records =
            inner.partitions.get_mut(&append.partition).ok_or(AppendError::UnknownPartition(append.partition))?;
        let batch = &append.batch;
        match &append.source {
            Source::Producer if is_idempotent(batch) => {
                let known = records.producers.entry(batch.producer_id()).or_default();
                if let Verdict::Duplicate(first) = check_sequence(known.make_contiguous(), batch)? {
                    let Sequenced { base_offset, last_offset, .. } = first;
                    return Ok(Appended { base_offset, last_offset, log_start: records.log_start, duplicate: true });
                }
            }
            Source::Producer => {}
            Source::Edge(edge) => check_position(inner.streams.get(&edge.stream).map(|(next, _)| *next), edge)?,
        }
        if inner.bytes + batch.len() > self.bytes_max {
            return Err(AppendError::Full(format!("{} of {} bytes in memory", inner.bytes, self.bytes_max)));
        }
        let appended = records.push(batch);
        inner.bytes += batch.len();
        if let Source::Edge(edge) = &append.source {
            inner.streams.insert(edge.stream.clone(), (edge.next, edge.chain));
        }
        records.grown.notify(usize::MAX);
        Ok(appended)
    }

    fn read_now(&self, partition: Partition, from: Offset, limits: ReadLimits) -> Result<Read, ReadError> {
        self.with(partition, |records| {
            let bounds = records.bounds();
            if from < bounds.log_start || from > bounds.high_watermark {
                return Err(ReadError::OffsetOutOfRange { requested: from, bounds });
            }
            let mut read = Read { batches: Vec::new(), next: bounds.high_watermark, bounds };
            let mut left = limits.bytes_max;
            for batch in records.batches.range(records.find(from)..) {
                if !read.batches.is_empty() && batch.len() > left {
                    read.next = batch.base_offset();
                    break;
                }
                left = left.saturating_sub(batch.len());
                read.batches.push(batch.bytes().clone());
            }
            Ok(read)
        })
    }

    fn trim_now(&self, partition: Partition, before: Offset) -> Result<Offset, TrimError> {
        let mut inner = self.inner.lock();
        let inner = &mut *inner;
        let records = inner.partitions.get_mut(&partition).ok_or(TrimError::UnknownPartition(partition))?;
        if before > records.next {
            return Err(TrimError::OffsetOutOfRange { requested: before, bounds: records.bounds() });
        }
        records.log_start = records.log_start.max(before);
        let gone = records.find(records.log_start);
        inner.bytes -= records.batches.drain(..gone).map(|batch| batch.len()).sum::<usize>();
        Ok(records.log_start)
    }

    fn with<T>(
        &self,
        partition: Partition,
        read: impl FnOnce(&Records) -> Result<T, ReadError>,
    ) -> Result<T, ReadError> {
        let inner = self.inner.lock();
        if inner.closed {
            return Err(ReadError::Closed);
        }
        read(inner.partitions.get(&partition).ok_or(ReadError::UnknownPartition(partition))?)
    }

    /// `None` when the wait is over, otherwise what to listen to.
    fn listen(&self, partition: Partition, beyond: Offset) -> Result<Option<EventListener>, ReadError> {
        self.with(partition, |records| Ok((records.next <= beyond).then(|| records.grown.listen())))
    }
}

impl Log for MemoryLog {
    fn append(&self, append: Append) -> BoxFuture<'static, Result<Appended, AppendError>> {
        let result = self.append_now(&append);
        Box::pin(std::future::ready(result))
    }

    fn read(&self, partition: Partition, from: Offset, limits: ReadLimits) -> BoxFuture<'_, Result<Read, ReadError>> {
        Box::pin(async move { self.read_now(partition, from, limits) })
    }

    fn bounds(&self, partition: Partition) -> Result<Bounds, ReadError> {
        self.with(partition, |records| Ok(records.bounds()))
    }

    fn wait(&self, partition: Partition, beyond: Offset) -> BoxFuture<'static, Result<(), ReadError>> {
        let log = self.clone();
        Box::pin(async move {
            while let Some(grown) = log.listen(partition, beyond)? {
                grown.await;
            }
            Ok(())
        })
    }

    fn trim(&self, partition: Partition, before: Offset) -> BoxFuture<'static, Result<Offset, TrimError>> {
        let result = self.trim_now(partition, before);
        Box::pin(std::future::ready(result))
    }

    fn find_time(&self, partition: Partition, at: TimestampMs) -> BoxFuture<'_, Result<Option<TimePoint>, ReadError>> {
        Box::pin(async move {
            self.with(partition, |records| {
                let late = records.batches.iter().filter(|batch| batch.max_timestamp() >= at);
                Ok(late.filter_map(|batch| first_at_or_after(batch, records.log_start, at)).next())
            })
        })
    }

    fn max_time(&self, partition: Partition) -> BoxFuture<'_, Result<Option<TimePoint>, ReadError>> {
        Box::pin(async move {
            self.with(partition, |records| {
                let mut greatest: Option<TimePoint> = None;
                for batch in &records.batches {
                    if greatest.is_none_or(|point| batch.max_timestamp() > point.timestamp) {
                        let found = first_at_or_after(batch, records.log_start, batch.max_timestamp());
                        greatest = found.or(greatest);
                    }
                }
                Ok(greatest)
            })
        })
    }

    fn epoch_end(&self, partition: Partition, epoch: i32) -> Result<Option<EpochEnd>, ReadError> {
        self.with(partition, |records| {
            let after = records.epochs.partition_point(|(known, _)| *known <= epoch);
            let known =
                after.checked_sub(1).and_then(|index| records.epochs.get(index)).map_or(epoch, |(known, _)| *known);
            let end = records.epochs.get(after).map_or(records.next, |(_, start)| *start);
            Ok((epoch >= 0).then_some(EpochEnd { epoch: known, end }))
        })
    }
}

/// The first record of a batch at or after offset `from` whose timestamp is at or after `at`. A batch that this build does
/// not open answers for itself as a whole, with its base offset and greatest timestamp.
pub fn first_at_or_after(batch: &Batch, from: Offset, at: TimestampMs) -> Option<TimePoint> {
    if batch.max_timestamp() < at || batch.last_offset() < from {
        return None;
    }
    let leader_epoch = batch.leader_epoch();
    let whole = TimePoint { offset: batch.base_offset().max(from), timestamp: batch.max_timestamp(), leader_epoch };
    if batch.is_log_append_time() {
        return Some(whole);
    }
    let Ok(records) = batch.records(BATCH_UNPACKED_BYTES_MAX) else { return Some(whole) };
    for record in records {
        let Ok(record) = record else { return Some(whole) };
        if record.offset >= from && record.timestamp >= at {
            return Some(TimePoint { offset: record.offset, timestamp: record.timestamp, leader_epoch });
        }
    }
    None
}

/// The bytes of a read, joined: for tests and small answers.
pub fn join(batches: &[Bytes]) -> Bytes {
    match batches {
        [one] => one.clone(),
        many => many.iter().flat_map(|slice| slice.iter().copied()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::conformance::{self, Engine};
    use super::*;
    use crate::name::TopicId;

    struct Memory {
        log: MemoryLog,
        partitions: u32,
    }

    impl Engine for Memory {
        fn log(&self) -> Arc<dyn Log> {
            Arc::new(self.log.clone())
        }

        fn create(&mut self) -> Partition {
            let partition = Partition { topic: TopicId([1; 16]), index: self.partitions };
            self.partitions += 1;
            self.log.create(partition);
            partition
        }

        fn reopen(&mut self) -> bool {
            false
        }

        fn bytes_until_full(&self) -> Option<usize> {
            Some(1 << 20)
        }
    }

    #[test]
    fn the_reference_engine_keeps_the_contract() {
        conformance::run(&mut || Box::new(Memory { log: MemoryLog::new(1 << 20), partitions: 0 }));
    }

    #[test]
    fn an_epoch_that_skips_is_read_across() {
        let log = MemoryLog::new(1 << 20);
        let partition = Partition { topic: TopicId([1; 16]), index: 0 };
        log.create(partition);
        let append = |log: &MemoryLog| {
            let batch = conformance::batch(2, 1);
            conformance::block_on(log.append(Append { partition, batch, source: Source::Producer })).unwrap()
        };
        append(&log);
        log.start_epoch(3, 100);
        let empty = log.read_now(partition, 2, ReadLimits { bytes_max: 1 }).unwrap();
        assert_eq!((empty.bytes(), empty.next), (0, 102));
        assert_eq!(append(&log).base_offset, 102);
        let read = log.read_now(partition, 50, ReadLimits { bytes_max: 1 }).unwrap();
        assert_eq!(Batch::parse(join(&read.batches)).unwrap().base_offset(), 102);
        assert_eq!(log.epoch_end(partition, 2).unwrap(), Some(EpochEnd { epoch: 0, end: 102 }));
        assert_eq!(log.epoch_end(partition, 9).unwrap(), Some(EpochEnd { epoch: 3, end: 104 }));
    }
}
