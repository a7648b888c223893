//! The shard: one ordered sequence of blocks, its partitions and the state that changes with them.
//!
//! Callers decide under one short lock (`flight`): is it new, where does it go, into which block. A task on a thread
//! of its own (`committer`) takes the open block whenever the append before has ended - natural group commit -, makes it durable
//! without holding the lock, and only then moves what readers see. Under load the next block's bytes are put together meanwhile.
//! So every answer speaks of durable state, although repeats are recognised in flight.
//!
//! The shard knows no protocol, no engine of its WAL and no object store: [`BlockLog`] is below, [`ColdTier`] beside, the
//! archiver sees it as [`crate::archive::Source`].

use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use serde::Serialize;
use shared::block_on::block_on;
use shared::clock::{ClockReading, ExpiryClock};
use shared::histogram::Histogram;
use shared::log::{
    Append, AppendError, Appended, Bounds, BoxFuture, EpochEnd, Log, Read, ReadError, ReadLimits, StreamKey, TimePoint,
    TrimError,
};
use shared::name::{Offset, Partition, TimestampMs};
use tokio::sync::Notify;
use tokio::time::Instant;
use tracing::warn;

use crate::archive::{ColdTier, Confirmation, LocalBlocks, NothingCold, Recovered, SourceError};
use crate::block::BlockError;
use crate::planted::{Bug, planted};
use crate::state::{Change, State, StateError, StateLog, StreamState};
use crate::wal::{BlockLog, Usage, WalError};

mod committer;
mod flight;
mod fold;
mod index;
mod lease;
mod read;
mod recover;
mod retention;
mod source;
mod tail;
mod unshipped;
mod waits;

use flight::Inner;
pub(crate) use fold::fold;
use lease::Lease;

/// Milliseconds since 1970 by the machine's clock.
pub type Clock = Arc<dyn Fn() -> TimestampMs + Send + Sync>;

/// Bounds and identity of a shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardSettings {
    /// Its number.
    pub shard: u32,
    /// A random number that tells this writer's blocks from another's.
    pub nonce: u64,
    /// A block is closed before its batches exceed this; a single larger batch has a block of its own.
    pub block_bytes_max: usize,
    /// The next block is put together while one is written, once it has so many bytes of batches and as many as that one:
    /// with less there is nothing to gain.
    pub ahead_bytes_min: usize,
    /// Appends to the WAL begin at least so far apart, unless a block is full: what paces an engine whose appends cost
    /// money. Needs a tokio runtime when it is not zero.
    pub linger: Duration,
    /// Bytes of batches that wait for durability; beyond it appends are refused with [`AppendError::Full`].
    pub in_flight_bytes_max: usize,
    /// Changes that wait for durability; beyond it a commit is refused with [`AppendError::Full`] unless it is the only one.
    /// A store that does not answer must not fill the memory with what clients commit again and again.
    pub in_flight_changes_max: usize,
    /// Bytes of recent blocks kept in memory for readers at the end; the oldest go first.
    pub tail_bytes_max: usize,
    /// Bytes of batches read back from a WAL whose reads are charged by number ([`BlockLog::charges_per_read`]) that are
    /// kept for the reader that comes for the rest of them.
    pub read_cache_bytes_max: usize,
    /// Index entries (one per block and partition, 48 bytes) for blocks in the WAL; beyond it appends are refused until the
    /// archive has taken over.
    pub index_entries_max: usize,
    /// `retention.ms` of a topic that does not say; -1 is for ever.
    pub retention_ms: i64,
    /// `retention.bytes` of a topic that does not say; -1 is without bound.
    pub retention_bytes: i64,
    /// An idempotent producer that appended nothing for so long is forgotten (Kafka's `producer.id.expiration.ms`).
    pub producer_expiry_ms: i64,
    /// Whether blocks are shipped to a bucket. If not, what is durable is as safe as it gets.
    pub archived: bool,
    /// When the WAL fills up its oldest records go, instead of new ones being refused: for a shard without an archive.
    pub drops_oldest: bool,
}

impl Default for ShardSettings {
    fn default() -> Self {
        Self {
            shard: 0,
            nonce: 0,
            block_bytes_max: 8 << 20,
            ahead_bytes_min: 32 << 10,
            linger: Duration::ZERO,
            in_flight_bytes_max: 128 << 20,
            in_flight_changes_max: 25_000,
            tail_bytes_max: 64 << 20,
            read_cache_bytes_max: 32 << 20,
            index_entries_max: 1 << 20,
            retention_ms: 7 * 24 * 3600 * 1000,
            retention_bytes: -1,
            producer_expiry_ms: 24 * 3600 * 1000,
            archived: true,
            drops_oldest: false,
        }
    }
}

impl ShardSettings {
    /// Not where appends are paced, for a block takes what comes until it may begin; nor where what goes depends on what was
    /// written.
    fn encodes_ahead(&self) -> bool {
        self.linger.is_zero() && !self.drops_oldest
    }
}

/// Why a shard did not start.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The WAL could not be read or written.
    #[error(transparent)]
    Wal(#[from] WalError),
    /// A block does not hold.
    #[error(
        "block {seq} of the WAL cannot be used: {error}. Restore the WAL from a copy, or move its directory away to start from the archive"
    )]
    Block {
        /// Its number.
        seq: u64,
        /// What is wrong with it.
        error: BlockError,
    },
    /// The snapshot does not hold.
    #[error("the archived state cannot be used: {0}")]
    Snapshot(#[from] StateError),
    /// WAL and snapshot do not meet.
    #[error(
        "the WAL holds blocks {first} .. {next}, the archived state goes up to {snapshot}: blocks in between are missing"
    )]
    Hole {
        /// First block there is.
        first: u64,
        /// After the last one.
        next: u64,
        /// The first block that must be replayed.
        snapshot: u64,
    },
    /// The committer thread could not be made.
    #[error("no thread for the committer: {0}")]
    Thread(String),
}

/// A shard. It implements [`Log`] and [`StateLog`]; dropping it closes it.
pub struct Shard {
    core: Arc<Core>,
    committer: Mutex<Vec<JoinHandle<()>>>,
}

/// What callers and the committer share.
struct Core {
    settings: ShardSettings,
    wal: Box<dyn BlockLog>,
    cold: Arc<dyn ColdTier>,
    clock: Clock,
    expiry: Mutex<ExpiryClock>,
    /// The owner's epoch, in every block's header.
    epoch: u32,
    /// Bytes of the WAL that only changes may use.
    wal_reserve: u64,
    /// Bytes of those that only the node's own changes may use. A start needs room before anything can be shipped, and
    /// clients' commits must not have taken all of it.
    own_reserve: u64,
    /// Offsets from here on may not be used yet.
    offsets_max: AtomicI64,
    /// What acknowledgements depend on besides durability.
    lease: OnceLock<Lease>,
    inner: Mutex<Inner>,
    /// Something can be written, or the shard is closing: for the writer.
    work: Notify,
    /// Something can be encoded or shown while the writer is at work, or the shard has stopped.
    ahead: Notify,
    /// A block became durable, or the shard stopped.
    committed: Arc<Notify>,
    /// What is safe moved.
    safety: Arc<Notify>,
    readers: read::Readers,
}

/// Counters and gauges of a shard.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct ShardStatus {
    /// Its number.
    pub shard: u32,
    /// The owner's epoch.
    pub epoch: u32,
    /// The newest leader epoch.
    pub leader_epoch: i32,
    /// Why it takes nothing more; `None` while it does.
    pub stopped: Option<String>,
    /// Why it acknowledges nothing for now; `None` while it does.
    pub holds_back: Option<String>,
    /// The number the next durable block will have.
    pub next_seq: u64,
    /// Blocks below this number are in the bucket.
    pub shipped_seq: u64,
    /// Bytes of durable blocks that are in no bucket yet; 0 where blocks are not shipped.
    pub unshipped_bytes: u64,
    /// For how long the oldest of them has been durable, milliseconds; 0 if there is none.
    pub unshipped_ms: u64,
    /// What the WAL holds.
    pub wal: Usage,
    /// Index entries for blocks in the WAL.
    pub index_entries: usize,
    /// Bytes of recent blocks in memory.
    pub tail_bytes: usize,
    /// Bytes that wait for durability.
    pub in_flight_bytes: usize,
    /// Blocks made durable since the start.
    pub blocks: u64,
    /// Their bytes.
    pub block_bytes: u64,
    /// Batches made durable since the start.
    pub batches: u64,
    /// Seconds an append to the WAL took.
    pub commit_seconds: Histogram,
    /// Batches that were refused, by reason.
    pub refused_batches: RefusedBatches,
    /// Commits of changes that were refused because too many wait for durability.
    pub refused_changes: u64,
    /// How much the log's disk has left; `None` where there is none.
    pub disk_free_bytes: Option<u64>,
    /// What is taken of the room for records, of whatever ends first: the log's bound, its disk, its index. 1 when the next
    /// MiB would be refused for want of room.
    pub full_ratio: f64,
    /// Why the next MiB of records would be refused; `None` while it would be taken.
    pub no_room: Option<String>,
}

/// Batches that were refused although nothing was wrong with them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct RefusedBatches {
    /// Too much waits for durability.
    pub in_flight: u64,
    /// The log is as large as it may be.
    pub wal_full: u64,
    /// The disk is full.
    pub disk_full: u64,
    /// The index of what is not archived yet is as large as it may be.
    pub index_full: u64,
    /// Offsets of a shard in memory are not reserved yet.
    pub offsets: u64,
    /// The shard takes nothing more.
    pub stopped: u64,
}

impl RefusedBatches {
    /// Each reason by its name.
    pub fn by_reason(&self) -> [(&'static str, u64); 6] {
        [
            ("in-flight", self.in_flight),
            ("wal-full", self.wal_full),
            ("disk-full", self.disk_full),
            ("index-full", self.index_full),
            ("offsets", self.offsets),
            ("stopped", self.stopped),
        ]
    }

    fn of(&mut self, why: &Refused) -> &mut u64 {
        match why {
            Refused::InFlight(_) => &mut self.in_flight,
            Refused::Wal(_) => &mut self.wal_full,
            Refused::Disk(_) => &mut self.disk_full,
            Refused::Index(_) => &mut self.index_full,
            Refused::Offsets(_) => &mut self.offsets,
            Refused::Stopped(_) => &mut self.stopped,
        }
    }
}

/// Why a batch is refused although nothing is wrong with it. The texts say what is full.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Too much waits for durability.
    #[error("{0}")]
    InFlight(String),
    /// The log is as large as it may be.
    #[error("{0}")]
    Wal(String),
    /// The disk is full.
    #[error("{0}")]
    Disk(String),
    /// The index of what is not archived yet is as large as it may be.
    #[error("{0}")]
    Index(String),
    /// Offsets of a shard in memory are not reserved yet.
    #[error("{0}")]
    Offsets(String),
    /// The shard takes nothing more.
    #[error("{0}")]
    Stopped(String),
}

/// What is asked for when somebody asks whether records would be taken.
pub const ROOM_BYTES: usize = 1 << 20;

/// A partition, for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PartitionStatus {
    /// Its topic's name.
    pub topic: String,
    /// Its number.
    pub index: u32,
    /// The first offset that can be read.
    pub log_start: Offset,
    /// The offset after the last durable record.
    pub high_watermark: Offset,
    /// Bytes of batches in archive and WAL.
    pub bytes: u64,
    /// Offsets below this are in segments in the bucket.
    pub archived: Offset,
}

impl Shard {
    /// Brings a shard back to where it was and begins to take appends.
    ///
    /// `recovered` says what to start from ([`Recovered::default`] without an archive: the local WAL alone).
    pub fn open(
        settings: ShardSettings,
        wal: Box<dyn BlockLog>,
        recovered: Recovered,
        cold: Option<Arc<dyn ColdTier>>,
        clock: Clock,
    ) -> Result<Arc<Self>, OpenError> {
        let shard = Self::recover(settings, wal, recovered, cold, clock)?;
        let name = format!("shard-{}", shard.core.settings.shard);
        let (core, beside) = (shard.core.clone(), shard.core.clone());
        if core.wal.blocks_threads() {
            shard.spawn(name.clone(), async move { core.write_blocks().await })?;
            shard.spawn(format!("{name}-ahead"), async move { beside.encode_ahead().await })?;
        } else {
            shard.spawn(name, async move { core.commit_blocks().await })?;
        }
        Ok(shard)
    }

    fn spawn(&self, name: String, task: impl Future<Output = ()> + Send + 'static) -> Result<(), OpenError> {
        // The object engine's requests and pauses need the runtime's timers.
        let runtime = tokio::runtime::Handle::try_current();
        let run = move || match runtime {
            Ok(runtime) => runtime.block_on(task),
            Err(_) => block_on(task),
        };
        let thread = std::thread::Builder::new().name(name).spawn(run);
        self.committer.lock().push(thread.map_err(|error| OpenError::Thread(error.to_string()))?);
        Ok(())
    }

    /// The same without a thread: the caller drives the committer, the future returned. It ends some time after
    /// [`Shard::begin_close`].
    pub fn open_driven(
        settings: ShardSettings,
        wal: Box<dyn BlockLog>,
        recovered: Recovered,
        cold: Option<Arc<dyn ColdTier>>,
        clock: Clock,
    ) -> Result<(Arc<Self>, impl Future<Output = ()> + Send + 'static), OpenError> {
        let shard = Self::recover(settings, wal, recovered, cold, clock)?;
        let core = shard.core.clone();
        Ok((shard, async move { core.commit_blocks().await }))
    }

    fn recover(
        settings: ShardSettings,
        wal: Box<dyn BlockLog>,
        recovered: Recovered,
        cold: Option<Arc<dyn ColdTier>>,
        clock: Clock,
    ) -> Result<Arc<Self>, OpenError> {
        let cold = cold.unwrap_or_else(|| Arc::new(NothingCold));
        let core = Arc::new(recover::recover(settings, wal, recovered, cold, clock)?);
        Ok(Arc::new(Self { core, committer: Mutex::default() }))
    }

    /// Takes nothing more; what is in flight becomes durable if it can.
    pub fn begin_close(&self) {
        self.core.begin_close();
    }

    /// Makes durable what is in flight, ends all waits and lets go of the WAL. What is called afterwards is refused.
    pub fn close(&self) {
        self.core.begin_close();
        for committer in std::mem::take(&mut *self.committer.lock()) {
            // A panic there was reported by the thread itself, and the shard has stopped.
            let _ = committer.join();
        }
        self.core.wal.close();
    }

    /// Counters and gauges.
    pub fn status(&self) -> ShardStatus {
        let (wal, disk_free_bytes) = (self.core.wal.usage(), self.core.wal.disk_free_bytes());
        let holds_back = self.holds_back();
        let no_room = self.produce_room(ROOM_BYTES).err();
        // A shard that takes nothing for another reason may have all its room.
        let is_full = matches!(no_room, Some(Refused::Wal(_) | Refused::Disk(_) | Refused::Index(_)));
        let full_ratio = if is_full { 1.0 } else { self.core.taken_ratio(&wal, disk_free_bytes) };
        let inner = self.core.inner.lock();
        let backlog = inner.unshipped.backlog();
        ShardStatus {
            shard: self.core.settings.shard,
            epoch: self.core.epoch,
            leader_epoch: inner.state.leader_epoch(),
            stopped: inner.stopped.as_ref().map(ToString::to_string),
            holds_back,
            next_seq: inner.next_seq,
            shipped_seq: inner.shipped_seq,
            unshipped_bytes: backlog.map_or(0, |backlog| backlog.bytes),
            unshipped_ms: backlog.map_or(0, |backlog| backlog.age.as_millis() as u64),
            wal,
            index_entries: inner.index.entries(),
            tail_bytes: inner.tail.bytes(),
            in_flight_bytes: inner.in_flight_bytes,
            disk_free_bytes,
            full_ratio,
            no_room: no_room.map(|refused| refused.to_string()),
            ..inner.counters.clone()
        }
    }

    /// Whether the next `bytes` bytes of batches would be taken, as far as that can be told without taking them.
    pub fn produce_room(&self, bytes: usize) -> Result<(), Refused> {
        {
            let mut inner = self.core.inner.lock();
            if let Some(error) = inner.refuses().or_else(|| self.core.check_lease(false).err()) {
                return Err(Refused::Stopped(error.to_string()));
            }
            // Where the oldest records make room, who was refused once is taken when it tries again.
            if self.core.settings.drops_oldest {
                return Ok(());
            }
            self.core.full(&mut inner, bytes)?;
        }
        self.core.wal_room(bytes)
    }

    /// All partitions, by topic name and number.
    pub fn partitions(&self) -> Vec<PartitionStatus> {
        let mut all = self.core.inner.lock().partition_statuses();
        // The cold tier has locks of its own: it is never asked under ours.
        for (partition, status) in &mut all {
            if let Some(cold) = self.core.cold.bounds(*partition) {
                (status.archived, status.bytes) = (cold.next, cold.bytes);
            }
        }
        let inner = self.core.inner.lock();
        all.into_iter()
            .map(|(partition, mut status)| {
                status.bytes += inner.index.bytes_from(partition, status.archived);
                status
            })
            .collect()
    }

    /// The edge offset below which a stream's records are in the bucket; without archiving, in the WAL. `None` for a stream
    /// of which nothing is.
    pub fn safe(&self, key: &StreamKey) -> Option<Offset> {
        let inner = self.core.inner.lock();
        if self.core.settings.archived && !planted(Bug::SafeIsDurable) {
            inner.safe.get(key).copied()
        } else {
            inner.state.stream(key).map(|stream| stream.next)
        }
    }

    /// Resolves when what [`Shard::safe`] says may have moved since this was called.
    pub fn safety_changed(&self) -> BoxFuture<'static, ()> {
        // Registered by the call, not by the first poll: nothing is missed in between.
        Box::pin(self.core.safety.clone().notified_owned())
    }

    /// Appends to a stream whose newest records lie in another shard, all of them safe: unless this one knows of later
    /// ones, the batch must adjoin those.
    pub fn append_after(
        &self,
        append: Append,
        stream: StreamState,
    ) -> BoxFuture<'static, Result<Appended, AppendError>> {
        let admitted = self.core.admit(append, Some(stream));
        Box::pin(self.core.clone().acknowledged(admitted))
    }

    /// From now on nothing is acknowledged while the last confirmation of this node's claim is older than `age_max`. Reads go
    /// on. The first call counts.
    pub fn acknowledge_while(&self, confirmation: Arc<Confirmation>, age_max: Duration) {
        self.core.set_lease(confirmation, age_max);
    }

    /// Why nothing is acknowledged now, although the shard goes on; `None` while all is.
    pub fn holds_back(&self) -> Option<String> {
        self.core.check_lease(false).err().map(|error| error.to_string())
    }

    /// The log is about to be closed: an append that may never end has a few seconds left.
    pub fn hurry(&self) {
        self.core.wal.hurry();
    }

    /// Offsets from `max` on are not used until this is called with more. Without a call there is no bound.
    pub fn allow_offsets_below(&self, max: Offset) {
        self.core.offsets_max.store(max, Ordering::Relaxed);
    }

    /// The greatest offset that any partition has reached, what is in flight included.
    pub fn highest_offset(&self) -> Offset {
        let inner = self.core.inner.lock();
        let in_flight = inner.overlay.ends.values().map(|(end, _)| *end).max();
        inner.state.highest_watermark().max(in_flight.unwrap_or(0))
    }

    /// [`StateLog::commit`] of changes that the node makes by itself, and not for a client: they may use the room that is kept
    /// for them.
    pub fn commit_own(&self, changes: Vec<Change>) -> BoxFuture<'static, Result<(), AppendError>> {
        let admitted = self.core.admit_changes(changes, true);
        Box::pin(self.core.clone().acknowledged(admitted))
    }

    /// Moves log starts to where topics' `retention.ms` and `retention.bytes` put them, and forgets producers that went away.
    /// Stores the time that was counted, where nothing else has for long. Returns how many partitions moved. Call it now and
    /// then.
    pub async fn apply_retention(&self) -> Result<usize, AppendError> {
        let mut changes = self.core.retention_moves();
        let count = changes.len();
        changes.extend(self.core.expired_producers());
        changes.extend(self.core.time_counted());
        if !changes.is_empty() {
            self.commit_own(changes).await?;
        }
        Ok(count)
    }
}

fn read_clock(clock: &Clock) -> ClockReading {
    ClockReading { wall_ms: clock(), at: Instant::now().into_std() }
}

impl Core {
    /// What time it is, for blocks and for retention: see [`shared::clock`].
    fn now(&self) -> TimestampMs {
        self.expiry.lock().now(Instant::now().into_std())
    }

    /// Says so when the wall clock is not where it was.
    fn look_at_clock(&self) {
        let reading = read_clock(&self.clock);
        if let Some(jump) = self.expiry.lock().look(reading) {
            let by_secs = jump.clock_ms.saturating_sub(jump.expected_ms) / 1000;
            warn!(
                shard = self.settings.shard,
                clock_ms = jump.clock_ms,
                by_secs,
                "the wall clock jumped, or the node was off for so long: nothing expires sooner for it, ages are counted in \
                 running time; set the clock if it is wrong"
            );
        }
    }
}

impl Drop for Shard {
    fn drop(&mut self) {
        self.close();
    }
}

impl Log for Shard {
    fn append(&self, append: Append) -> BoxFuture<'static, Result<Appended, AppendError>> {
        let admitted = self.core.admit(append, None);
        Box::pin(self.core.clone().acknowledged(admitted))
    }

    fn read(&self, partition: Partition, from: Offset, limits: ReadLimits) -> BoxFuture<'_, Result<Read, ReadError>> {
        Box::pin(self.core.clone().read(partition, from, limits))
    }

    fn bounds(&self, partition: Partition) -> Result<Bounds, ReadError> {
        self.core.inner.lock().bounds(partition)
    }

    fn wait(&self, partition: Partition, beyond: Offset) -> BoxFuture<'static, Result<(), ReadError>> {
        let core = self.core.clone();
        Box::pin(async move {
            loop {
                let Some(grown) = core.inner.lock().waiter(partition, beyond)? else { return Ok(()) };
                // Registered first, then looked again: nothing is missed in between.
                let grown = grown.notified_owned();
                if core.inner.lock().waiter(partition, beyond)?.is_none() {
                    return Ok(());
                }
                grown.await;
            }
        })
    }

    fn trim(&self, partition: Partition, before: Offset) -> BoxFuture<'static, Result<Offset, TrimError>> {
        let begun = self.core.begin_trim(partition, before);
        let core = self.core.clone();
        Box::pin(async move {
            begun?.resolve().await?;
            let inner = core.inner.lock();
            Ok(inner.state.partition(partition).map_or(before, |partition| partition.log_start))
        })
    }

    fn find_time(&self, partition: Partition, at: TimestampMs) -> BoxFuture<'_, Result<Option<TimePoint>, ReadError>> {
        Box::pin(self.core.clone().find_time(partition, at))
    }

    fn max_time(&self, partition: Partition) -> BoxFuture<'_, Result<Option<TimePoint>, ReadError>> {
        Box::pin(self.core.clone().max_time(partition))
    }

    fn epoch_end(&self, partition: Partition, epoch: i32) -> Result<Option<EpochEnd>, ReadError> {
        self.core.inner.lock().epoch_end(partition, epoch)
    }
}

impl StateLog for Shard {
    fn commit(&self, changes: Vec<Change>) -> BoxFuture<'static, Result<(), AppendError>> {
        let admitted = self.core.admit_changes(changes, false);
        Box::pin(self.core.clone().acknowledged(admitted))
    }

    fn with_state(&self, read: &mut dyn FnMut(&State)) {
        read(&self.core.inner.lock().state);
    }

    fn now_ms(&self) -> TimestampMs {
        self.core.now()
    }
}

/// A WAL as a start compares it with the bucket.
pub struct LocalWal<'a>(pub &'a dyn BlockLog);

impl LocalBlocks for LocalWal<'_> {
    fn bounds(&self) -> Option<(u64, u64)> {
        self.0.bounds()
    }

    fn read(&self, seq: u64) -> Result<Bytes, SourceError> {
        block_on(self.0.read(seq)).map_err(source::source_error)
    }
}

#[cfg(test)]
mod tests;
