//! The log seam: what every storage engine promises and all upper protocols depend on.
//!
//! A [`Log`] keeps many partitions. It knows RecordBatch v2 headers and nothing of MQTT or Kafka requests; protocols
//! know this trait and nothing of engines. `conformance` is the contract as code: each engine runs it.

pub mod conformance;
pub mod faulty;
pub mod idempotence;
pub mod memory;

use std::future::Future;
use std::pin::Pin;

use crate::batch::Batch;
use crate::name::{EdgeId, Incarnation, Offset, Partition, StreamName, TimestampMs};
use bytes::Bytes;

/// A boxed future, as object-safe traits need it.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Ordered, durable partitions of record batches.
///
/// Every answer speaks of durable state: an append resolves once its bytes would survive a power cut, and reads, bounds
/// and waits see nothing that is not durable yet.
pub trait Log: Send + Sync + 'static {
    /// Appends one batch. Its place in the order is taken in the call itself, before the future is first polled, so
    /// calls made one after the other are stored one after the other; the future resolves when the batch is durable.
    /// A duplicate (of a producer's sequence) resolves as the first one did, once that is durable.
    fn append(&self, append: Append) -> BoxFuture<'static, Result<Appended, AppendError>>;

    /// Reads whole batches from the one that contains `from`, in order, at least one if any is below the high watermark.
    /// At the high watermark the answer is empty.
    fn read(&self, partition: Partition, from: Offset, limits: ReadLimits) -> BoxFuture<'_, Result<Read, ReadError>>;

    /// Where the partition begins and ends now.
    fn bounds(&self, partition: Partition) -> Result<Bounds, ReadError>;

    /// Resolves when the partition's high watermark is above `beyond`, or the partition is gone or the log closed.
    fn wait(&self, partition: Partition, beyond: Offset) -> BoxFuture<'static, Result<(), ReadError>>;

    /// Moves the log start up to `before` (never down; at most to the high watermark) and returns the new log start,
    /// once that is durable.
    fn trim(&self, partition: Partition, before: Offset) -> BoxFuture<'static, Result<Offset, TrimError>>;

    /// The first record whose timestamp is at or after `at`; `None` if there is none. Answers to the batch at least;
    /// an engine that cannot look inside a compressed batch answers its base offset and maximum timestamp.
    fn find_time(&self, partition: Partition, at: TimestampMs) -> BoxFuture<'_, Result<Option<TimePoint>, ReadError>>;

    /// The record with the greatest timestamp, the first if several share it; `None` if the partition is empty.
    fn max_time(&self, partition: Partition) -> BoxFuture<'_, Result<Option<TimePoint>, ReadError>>;

    /// Where the largest leader epoch that is at most `epoch` ended (KIP-320): its number and the offset after its last record. Of an
    /// epoch below all that the log still knows: itself, and where the first of those begins. `None` below 0.
    fn epoch_end(&self, partition: Partition, epoch: i32) -> Result<Option<EpochEnd>, ReadError>;
}

/// A batch to append and where it comes from.
#[derive(Debug, Clone)]
pub struct Append {
    /// The partition to append to. It must exist.
    pub partition: Partition,
    /// The validated batch. Its base offset and leader epoch are overwritten by the log, all else is kept.
    pub batch: Batch,
    /// Who sent it, which decides how duplicates are recognised.
    pub source: Source,
}

/// Where a batch comes from.
#[derive(Debug, Clone)]
pub enum Source {
    /// A producer. Idempotence is read from the batch: producer id, epoch and base sequence (rule: last five batches kept).
    Producer,
    /// An edge's stream. Position and chain value are stored in the same atomic append as the data.
    Edge(EdgeBatch),
}

/// The identity and position of a sealed batch, which travel beside it and never inside its CRC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EdgeBatch {
    /// Stream of an edge in one incarnation.
    pub stream: StreamKey,
    /// Edge offset of the first record.
    pub first: Offset,
    /// Edge offset after the last record.
    pub next: Offset,
    /// The sender's chain value at `next`.
    pub chain: Chain,
    /// The records `gap.0 .. gap.1` (end exclusive) were dropped by the edge's own declared policy; `gap.1 == first`.
    pub gap: Option<(Offset, Offset)>,
}

/// A stream as the cloud knows it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct StreamKey {
    /// The edge.
    pub edge: EdgeId,
    /// The stream's name there.
    pub stream: StreamName,
    /// The life of the edge's database it was written in.
    pub incarnation: Incarnation,
}

/// A hash over every stored row of a stream up to some offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize)]
pub struct Chain(pub u64);

/// What an append came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Appended {
    /// Offset of the batch's first record.
    pub base_offset: Offset,
    /// Offset of the batch's last record.
    pub last_offset: Offset,
    /// Log start of the partition.
    pub log_start: Offset,
    /// Whether the batch had been stored before and was not stored again.
    pub duplicate: bool,
}

/// Why an append was refused. Nothing of it is stored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AppendError {
    /// The partition does not exist or is being deleted.
    #[error("no such partition: {0}")]
    UnknownPartition(Partition),
    /// Kafka's OUT_OF_ORDER_SEQUENCE_NUMBER.
    #[error("producer {producer_id}: sequence {found} where {expected} was expected")]
    OutOfOrderSequence {
        /// The producer.
        producer_id: i64,
        /// The next sequence that would be accepted.
        expected: i32,
        /// What came.
        found: i32,
    },
    /// Kafka's INVALID_PRODUCER_EPOCH: a newer instance of this producer exists.
    #[error("producer {producer_id}: epoch {found} is older than {current}")]
    ProducerFenced {
        /// The producer.
        producer_id: i64,
        /// The epoch in force.
        current: i16,
        /// What came.
        found: i16,
    },
    /// An edge batch that does not begin where the stream's stored position ends.
    #[error("stream position is {next}, the batch begins elsewhere")]
    WrongPosition {
        /// The edge offset a batch must begin with.
        next: Offset,
        /// The batch lies wholly below: everything in it is stored.
        have: bool,
    },
    /// No room now; the same append may succeed later.
    #[error("the log is full: {0}")]
    Full(String),
    /// The owner could not confirm for long that the log is still its own; the same append may succeed later.
    #[error(
        "this node could not confirm for {secs} s that it still owns the log, so it acknowledges nothing until it can"
    )]
    Unconfirmed {
        /// How long.
        secs: u64,
        /// The batch is in this node's log all the same.
        stored: bool,
    },
    /// Another owner has taken this log over.
    #[error("the log was taken over by epoch {0}")]
    Fenced(u32),
    /// The disk or store failed, and what was not answered yet is not known to be durable.
    #[error("storage failed: {0}")]
    Storage(String),
    /// The log is shutting down.
    #[error("the log is closed")]
    Closed,
}

/// How much a read may return.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadLimits {
    /// Bytes; the first batch is returned even if it alone is larger (KIP-74).
    pub bytes_max: usize,
}

/// What a read returned.
#[derive(Debug, Clone, Default)]
pub struct Read {
    /// Whole batches, concatenated within a slice and across slices, ascending in offset.
    pub batches: Vec<Bytes>,
    /// The offset to read from next.
    pub next: Offset,
    /// The bounds at the time of the read.
    pub bounds: Bounds,
}

impl Read {
    /// Total bytes.
    pub fn bytes(&self) -> usize {
        self.batches.iter().map(Bytes::len).sum()
    }
}

/// Where a partition begins and ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Bounds {
    /// The first offset that can be read.
    pub log_start: Offset,
    /// The offset the next durable record will have: consumers see records below it.
    pub high_watermark: Offset,
    /// The leader epoch in force.
    pub leader_epoch: i32,
}

/// A record found by time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimePoint {
    /// Its offset.
    pub offset: Offset,
    /// Its timestamp.
    pub timestamp: TimestampMs,
    /// The leader epoch it was written in.
    pub leader_epoch: i32,
}

/// The end of a leader epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EpochEnd {
    /// The epoch.
    pub epoch: i32,
    /// The offset after its last record.
    pub end: Offset,
}

/// Why a read was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The partition does not exist.
    #[error("no such partition: {0}")]
    UnknownPartition(Partition),
    /// Below the log start or above the high watermark.
    #[error("offset {requested} is outside {} .. {}", bounds.log_start, bounds.high_watermark)]
    OffsetOutOfRange {
        /// What was asked for.
        requested: Offset,
        /// What there is.
        bounds: Bounds,
    },
    /// Stored bytes are damaged; the text names where.
    #[error("stored data is damaged: {0}")]
    Corrupt(String),
    /// The disk or store failed.
    #[error("storage failed: {0}")]
    Storage(String),
    /// The log is shutting down.
    #[error("the log is closed")]
    Closed,
}

/// Why a trim failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TrimError {
    /// The partition does not exist.
    #[error("no such partition: {0}")]
    UnknownPartition(Partition),
    /// Above the high watermark.
    #[error("offset {requested} is above the high watermark {}", bounds.high_watermark)]
    OffsetOutOfRange {
        /// What was asked for.
        requested: Offset,
        /// What there is.
        bounds: Bounds,
    },
    /// As for an append.
    #[error(transparent)]
    Append(#[from] AppendError),
}
