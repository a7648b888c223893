//! What rests in object storage: shipping of WAL blocks, splitting into segments, restore.
//!
//! Two seams join it to the shard. [`ColdTier`] is what a shard asks for offsets that its WAL no longer has; [`Source`]
//! is how the archiver sees a shard. Neither knows the other's inside: blocks cross as stored bytes, the shard's state
//! as an opaque snapshot.

mod archiver;
mod cache;
mod claim;
mod cold;
mod confirmation;
mod departure;
mod identity;
mod load;
mod pace;
mod presence;
mod shipper;
mod splitter;
mod store;
#[cfg(test)]
pub(crate) mod tests;
pub mod tool;

use std::time::Duration;

use bytes::Bytes;
use shared::log::{BoxFuture, ReadError, ReadLimits, TimePoint};
use shared::name::{Offset, Partition, TimestampMs};

pub use archiver::{Archive, ArchiveError, ArchiveSettings, ArchiveStatus};
pub(crate) use cache::TwoQueue;
pub use cache::{CacheStatus, DiskCache};
pub use cold::Cold;
pub use confirmation::{Confirmation, Uptime, uptime};
pub use departure::Departure;
pub use identity::cluster_id_in;
pub use presence::{
    AdvertisedListener, BEAT, DataDirError, DataDirLock, Heartbeat, NodePhase, OwnedShard, OwnerIdentity, OwnerVerdict,
    OwnerWatch, Presence, PresenceSettings, PresenceStatus, Sighting, WATCH,
};
pub use store::{RequestSettings, Requests, STORAGE_CLASS, Store, StoreError, backoff, random};

/// Archived batches, readable by offset and time. All answers are about whole batches with their CRC checked.
pub trait ColdTier: Send + Sync + 'static {
    /// What is archived of a partition; `None` if nothing is. Never waits.
    fn bounds(&self, partition: Partition) -> Option<ColdBounds>;

    /// The partition's archived runs, ascending; what retention decides on. Never waits.
    fn runs(&self, partition: Partition) -> Vec<ColdRun>;

    /// The first of them that holds records at or after `from`: whether retention has to look at the others. Never waits.
    fn oldest(&self, partition: Partition, from: Offset) -> Option<ColdRun> {
        self.runs(partition).into_iter().find(|run| run.next > from)
    }

    /// Whole batches from the one that contains `from`, or from the first one after it where offsets have a hole.
    /// At least one batch if any is at or after `from`, whatever its size; otherwise empty.
    fn read(
        &self,
        partition: Partition,
        from: Offset,
        limits: ReadLimits,
    ) -> BoxFuture<'_, Result<ColdRead, ReadError>>;

    /// The first record at or after offset `from` whose timestamp is at or after `at`, to the record where the batch
    /// can be opened and to the batch otherwise; `None` if no archived one is.
    fn find_time(
        &self,
        partition: Partition,
        from: Offset,
        at: TimestampMs,
    ) -> BoxFuture<'_, Result<Option<TimePoint>, ReadError>>;

    /// The record at or after `from` with the greatest timestamp, the first if several share it; exact as `find_time`.
    fn max_time(&self, partition: Partition, from: Offset) -> BoxFuture<'_, Result<Option<TimePoint>, ReadError>>;
}

/// Where the archived part of a partition begins and ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ColdBounds {
    /// Base offset of the first archived batch.
    pub first: Offset,
    /// Offset after the last archived record.
    pub next: Offset,
    /// Bytes of batches.
    pub bytes: u64,
}

/// One run: adjacent batches of one partition within one object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ColdRun {
    /// Base offset of its first batch.
    pub base: Offset,
    /// Offset after its last record.
    pub next: Offset,
    /// Bytes of batches.
    pub bytes: u64,
    /// The greatest record timestamp.
    pub max_timestamp: TimestampMs,
    /// When its newest block was appended, by the shard's count of running time: time retention runs on this.
    pub appended_ms: TimestampMs,
}

/// What a cold read returned.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ColdRead {
    /// Whole batches, concatenated within a slice and across slices, ascending in offset.
    pub batches: Vec<Bytes>,
    /// The offset after the last record returned, or the offset asked for if nothing was.
    pub next: Offset,
}

/// A cold tier with nothing in it.
#[derive(Debug, Clone, Copy, Default)]
pub struct NothingCold;

impl ColdTier for NothingCold {
    fn bounds(&self, _: Partition) -> Option<ColdBounds> {
        None
    }

    fn runs(&self, _: Partition) -> Vec<ColdRun> {
        Vec::new()
    }

    fn read(&self, _: Partition, from: Offset, _: ReadLimits) -> BoxFuture<'_, Result<ColdRead, ReadError>> {
        Box::pin(async move { Ok(ColdRead { batches: Vec::new(), next: from }) })
    }

    fn find_time(
        &self,
        _: Partition,
        _: Offset,
        _: TimestampMs,
    ) -> BoxFuture<'_, Result<Option<TimePoint>, ReadError>> {
        Box::pin(async { Ok(None) })
    }

    fn max_time(&self, _: Partition, _: Offset) -> BoxFuture<'_, Result<Option<TimePoint>, ReadError>> {
        Box::pin(async { Ok(None) })
    }
}

/// A shard as the archiver sees it. Everything here speaks of durable blocks.
pub trait Source: Send + Sync + 'static {
    /// Where the WAL stands. Never waits.
    fn durable(&self) -> Durable;

    /// Durable blocks that [`Source::shipped`] has not reported; `None` when there is none. Never waits.
    fn backlog(&self) -> Option<Backlog>;

    /// Resolves when the WAL's next sequence number is above `seq`, or the shard is closed.
    fn wait(&self, seq: u64) -> BoxFuture<'static, ()>;

    /// Durable blocks from sequence number `from` on, in order and as stored: at least one if there is any, then as
    /// long as their bytes stay within `bytes_max`.
    fn blocks(&self, from: u64, bytes_max: usize) -> BoxFuture<'_, Result<Vec<StoredBlock>, SourceError>>;

    /// The shard's whole state at a block boundary: what replaying every block below `next_seq` gives.
    /// The bytes are the shard's own, versioned; the archiver stores them and hands them back to the shard's recovery.
    fn snapshot(&self) -> BoxFuture<'_, Result<Snapshot, SourceError>>;

    /// Every block below `next_seq` is in the bucket: what edges hold of them is `safe`. Called with rising values.
    fn shipped(&self, next_seq: u64);

    /// Every batch in blocks below `trim` can be read from the [`ColdTier`], and a manifest with a snapshot at
    /// `trim` is durable in the bucket and here: the WAL below may go. The shard keeps its newest block all the same,
    /// so that an empty WAL beside a manifest can only mean a lost WAL.
    fn published(&self, trim: u64);

    /// Another owner has claimed the shard in the bucket with this epoch: nothing more may be acknowledged.
    fn fenced(&self, epoch: u32);

    /// What time it is by the count that blocks are stamped with.
    fn now_ms(&self) -> TimestampMs;

    /// What must be kept of a partition; `None` when its topic is deleted (or was never there).
    fn retained(&self, partition: Partition) -> Option<Retained>;
}

/// Where a shard's WAL stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Durable {
    /// The sequence number the next durable block will have.
    pub next_seq: u64,
    /// Bytes that durable blocks which [`Source::published`] has not released take of the budget.
    pub wal_bytes: u64,
    /// Their budget: beyond it producers are refused.
    pub wal_bytes_max: u64,
}

/// What waits to be shipped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backlog {
    /// Bytes of blocks.
    pub bytes: u64,
    /// How long the oldest block has been durable.
    pub age: Duration,
}

/// One block as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredBlock {
    /// Its sequence number.
    pub seq: u64,
    /// All its bytes, header to checksum.
    pub bytes: Bytes,
}

/// A shard's state at a block boundary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The first sequence number that is not part of it.
    pub next_seq: u64,
    /// The state, in the shard's own encoding.
    pub state: Bytes,
}

/// What is kept of a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retained {
    /// The first offset that may be read.
    pub log_start: Offset,
    /// Partitions whose data lives equally long share objects: the topic's `retention.ms`, -1 for ever.
    pub retention_ms: i64,
}

/// Why a shard could not answer the archiver.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    /// The block was trimmed away.
    #[error("block {requested} is gone, the WAL begins at {first}")]
    Trimmed {
        /// What was asked for.
        requested: u64,
        /// The first block there is.
        first: u64,
    },
    /// The disk failed.
    #[error("the WAL could not be read: {0}")]
    Storage(String),
    /// The shard is shutting down.
    #[error("the shard is closed")]
    Closed,
}

/// The blocks a shard has locally, as a start compares them with the bucket's.
pub trait LocalBlocks: Send + Sync {
    /// First and next sequence number of what is readable; `None` when there is no block at all.
    fn bounds(&self) -> Option<(u64, u64)>;

    /// The stored bytes of one block.
    fn read(&self, seq: u64) -> Result<Bytes, SourceError>;
}

/// What a shard starts from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Recovered {
    /// The snapshot to begin with; `None` for a shard that never published one.
    pub snapshot: Option<Snapshot>,
    /// What to replay after it.
    pub tail: Tail,
    /// The shard epoch to open with: above every epoch seen here and in the bucket.
    pub epoch: u32,
}

/// The blocks that follow a snapshot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Tail {
    /// The local WAL, from the snapshot's `next_seq` on. Nothing was lost.
    #[default]
    Local,
    /// These blocks, from the bucket. Acknowledged blocks may have been lost: the local WAL is emptied and begins with
    /// these, leader epochs are bumped, and offsets go on at each partition's end + 2^32.
    Bucket(Vec<StoredBlock>),
    /// These blocks, which are the WAL itself: the object engine's. Nothing was lost.
    Owned(Vec<StoredBlock>),
}
