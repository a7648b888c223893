//! What callers decide under the lock: is a batch new, where does it go, and whose durability must its answer await.
//!
//! `Inner` holds the durable state and, beside it, what is in flight. In-flight knowledge is only ever an overlay: when an
//! append fails it is thrown away, and what is left is what the log says.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use shared::batch::Batch;
use shared::log::idempotence::{Sequenced, Verdict, check_position, check_sequence, is_idempotent, last_sequence};
use shared::log::{
    Append, AppendError, Appended, Bounds, Chain, EdgeBatch, EpochEnd, ReadError, Source, StreamKey, TrimError,
};
use shared::name::{Offset, Partition, TopicId};
use tokio::sync::Notify;

use super::index::WalIndex;
use super::tail::Tail;
use super::unshipped::Unshipped;
use super::waits::DiskWaits;
use super::{Core, PartitionStatus, Refused, ShardSettings, ShardStatus};
use crate::block::{Block, BlockBuilder, Placed};
use crate::planted::{Bug, planted};
use crate::state::{Change, LogChange, PartitionMap, State, StreamState, TopicChange};
use crate::wal::{NoRoom, Usage};

/// What a block takes beside its batches, generously.
const BLOCK_OVERHEAD: u64 = 4096;

/// Changes that one block takes besides batches.
const CHANGES_MAX: usize = 10_000;

/// Everything behind the shard's lock.
pub struct Inner {
    /// What durable blocks say.
    pub state: State,
    /// The number the next durable block will have.
    pub next_seq: u64,
    /// Where batches lie in the WAL.
    pub index: WalIndex,
    /// Recent blocks.
    pub tail: Tail,
    /// Blocks that take nothing more, oldest first. The first one's number is `next_seq`.
    pub sealed: VecDeque<Sealed>,
    /// Blocks that wait for the committer, oldest first; the last one is being filled.
    pub open: VecDeque<OpenBlock>,
    /// Whether the disk waits for blocks, where appends wait for a disk.
    pub waits: DiskWaits,
    /// When the newest append to the WAL began, where appends are paced.
    pub append_begun: Option<tokio::time::Instant>,
    /// What is in flight, sealed blocks included.
    pub overlay: Overlay,
    /// Bytes of batches in flight.
    pub in_flight_bytes: usize,
    /// Changes in flight that callers wait for.
    pub in_flight_changes: usize,
    /// How much the WAL has room for, as of the last append or trim.
    pub wal_free_bytes: u64,
    /// When it was last told that the WAL is full.
    pub full_told: Option<tokio::time::Instant>,
    /// Why nothing more is taken and nothing in flight will be durable.
    pub stopped: Option<AppendError>,
    /// Nothing more is taken, what is in flight is made durable.
    pub closing: bool,
    /// Blocks below are in the bucket.
    pub shipped_seq: u64,
    /// The others, where blocks are shipped.
    pub unshipped: Unshipped,
    /// Per stream, the edge offset below which all is in the bucket.
    pub safe: HashMap<StreamKey, Offset>,
    /// Positions in blocks that are not shipped yet, oldest first.
    pub unsafe_positions: VecDeque<(u64, StreamKey, Offset)>,
    /// Who waits for which partition to grow.
    pub waiters: PartitionMap<Arc<Notify>>,
    /// Counters.
    pub counters: ShardStatus,
    /// Positions that a planted bug holds back from their block.
    pub late: Positions,
}

/// A block that is being filled.
///
/// Where there is no room for records, what is small goes on without them: so changes that callers wait for are kept apart
/// from what is only there because of records, and have an outcome of their own.
#[derive(Default)]
pub struct OpenBlock {
    pub builder: BlockBuilder,
    /// Of the records.
    pub outcome: Arc<Outcome>,
    /// Changes that callers wait for.
    pub changes: Vec<Change>,
    /// They are the node's own, and no client's.
    pub is_own: bool,
    /// Of those.
    pub committed: Arc<Outcome>,
    /// Positions taken over from another shard, before this block.
    pub adopted: Positions,
    /// Streams' positions after this block.
    pub streams: Positions,
    /// Producers with batches in it.
    pub producers: Vec<(Partition, i64)>,
}

/// A block between the last batch it takes and the answers.
pub struct Sealed {
    pub outcome: Arc<Outcome>,
    pub batches: usize,
    pub batch_bytes: usize,
    pub changes: Arc<Vec<Change>>,
    pub is_own: bool,
    pub committed: Arc<Outcome>,
    pub producers: Vec<(Partition, i64)>,
    pub stage: Stage,
}

/// How far a sealed block has come. Only one is being written, and those before it are written.
pub enum Stage {
    /// Its batches are being copied together.
    Encoding,
    /// It waits for the append before to end.
    Ready(Encoded),
    /// It is being appended to the WAL.
    Writing,
    /// It is durable, and not seen yet. That took so long.
    Written(Encoded, Duration),
}

/// The bytes of a block and what is told of them when they are durable.
pub struct Encoded {
    pub block: Block,
    pub batches: u64,
    /// Bytes of the WAL that it must leave.
    pub leaves: u64,
    /// Blocks below are not needed once this one is durable.
    pub dropped: Option<u64>,
}

/// Streams' positions after a block: the last one of each counts.
pub type Positions = BTreeMap<StreamKey, (Partition, Offset, Chain)>;

/// What is in flight beyond the durable state.
#[derive(Default)]
pub struct Overlay {
    /// The next offset, and the block that brings the one before it.
    pub ends: PartitionMap<(Offset, u64)>,
    pub producers: HashMap<(Partition, i64), VecDeque<(u64, Sequenced)>>,
    pub streams: HashMap<StreamKey, (Offset, u64)>,
    /// Topics whose deletion is in flight.
    pub deleting: HashSet<TopicId>,
}

/// How a block ended.
#[derive(Default)]
pub struct Outcome {
    result: OnceLock<Result<(), AppendError>>,
    ended: Notify,
}

impl Outcome {
    /// Tells everybody who waits. The first word counts.
    pub fn complete(&self, result: Result<(), AppendError>) {
        let _ = self.result.set(result);
        self.ended.notify_waiters();
    }

    async fn wait(&self) -> Result<(), AppendError> {
        if self.result.get().is_none() {
            let mut ended = std::pin::pin!(self.ended.notified());
            // Registered, then looked again: nothing is missed in between.
            ended.as_mut().enable();
            if self.result.get().is_none() {
                ended.await;
            }
        }
        self.result.get().cloned().unwrap_or(Err(AppendError::Closed))
    }
}

/// An answer that may be given once a block is durable.
pub struct Admitted<T> {
    answer: Result<T, AppendError>,
    /// The block that must be durable first; `None` if everything the answer speaks of is.
    after: Option<Arc<Outcome>>,
}

impl<T> Admitted<T> {
    fn now(answer: Result<T, AppendError>) -> Self {
        Self { answer, after: None }
    }

    /// Waits, then answers. If the block fails, so does the answer, whatever it was.
    pub async fn resolve(self) -> Result<T, AppendError> {
        if let Some(after) = self.after {
            after.wait().await?;
        }
        self.answer
    }
}

impl Inner {
    pub fn new(state: State, next_seq: u64) -> Self {
        let safe = state.streams().map(|(key, stream)| (key.clone(), stream.next)).collect();
        Self {
            state,
            next_seq,
            index: WalIndex::default(),
            tail: Tail::default(),
            sealed: VecDeque::new(),
            open: VecDeque::new(),
            waits: DiskWaits::default(),
            append_begun: None,
            overlay: Overlay::default(),
            in_flight_bytes: 0,
            in_flight_changes: 0,
            wal_free_bytes: u64::MAX,
            full_told: None,
            stopped: None,
            closing: false,
            shipped_seq: next_seq,
            unshipped: Unshipped::default(),
            safe,
            unsafe_positions: VecDeque::new(),
            waiters: PartitionMap::default(),
            counters: ShardStatus::default(),
            late: Positions::new(),
        }
    }

    /// The outcome of the block `seq`; `None` if it is durable.
    fn outcome_of(&self, seq: u64) -> Option<Arc<Outcome>> {
        let index = usize::try_from(seq.checked_sub(self.next_seq)?).ok()?;
        let outcome = match index.checked_sub(self.sealed.len()) {
            None => self.sealed.get(index).map(|block| &block.outcome),
            Some(behind) => self.open.get(behind).map(|block| &block.outcome),
        };
        outcome.cloned()
    }

    /// Number of the block that is being filled, if the ones before succeed.
    fn open_seq(&self) -> u64 {
        self.next_seq + (self.sealed.len() + self.open.len().saturating_sub(1)) as u64
    }

    pub fn bounds(&self, partition: Partition) -> Result<Bounds, ReadError> {
        if self.stopped == Some(AppendError::Closed) {
            return Err(ReadError::Closed);
        }
        self.state
            .partition(partition)
            .map(|state| Bounds {
                log_start: state.log_start,
                high_watermark: state.high_watermark,
                leader_epoch: state.leader_epoch(),
            })
            .ok_or(ReadError::UnknownPartition(partition))
    }

    /// What the state says of each partition; bytes and archive are left to be filled in.
    pub fn partition_statuses(&self) -> Vec<(Partition, PartitionStatus)> {
        let mut all = Vec::new();
        for topic in self.state.topics() {
            for index in 0..topic.partitions {
                let partition = Partition { topic: topic.id, index };
                let Some(state) = self.state.partition(partition) else { continue };
                let status = PartitionStatus {
                    topic: topic.name.to_string(),
                    index,
                    log_start: state.log_start,
                    high_watermark: state.high_watermark,
                    bytes: 0,
                    archived: 0,
                };
                all.push((partition, status));
            }
        }
        all
    }

    /// What to listen to until the partition may have grown; `None` when it is above `beyond`.
    pub fn waiter(&mut self, partition: Partition, beyond: Offset) -> Result<Option<Arc<Notify>>, ReadError> {
        if self.bounds(partition)?.high_watermark > beyond {
            return Ok(None);
        }
        match &self.stopped {
            None => Ok(Some(self.waiters.entry(partition).or_default().clone())),
            // It will not grow any more.
            Some(error) => Err(ReadError::Storage(error.to_string())),
        }
    }

    pub fn epoch_end(&self, partition: Partition, epoch: i32) -> Result<Option<EpochEnd>, ReadError> {
        self.bounds(partition)?;
        let state = self.state.partition(partition).ok_or(ReadError::UnknownPartition(partition))?;
        let after = state.epochs.partition_point(|start| start.epoch <= epoch);
        // Nothing is left of an epoch below the first one: whoever knows it is where the first one begins, at most.
        let known = after.checked_sub(1).and_then(|index| state.epochs.get(index)).map_or(epoch, |start| start.epoch);
        let end = state.epochs.get(after).map_or(state.high_watermark, |next| next.start);
        Ok((epoch >= 0).then_some(EpochEnd { epoch: known, end }))
    }

    /// The block to put `bytes` more into.
    fn open_block(&mut self, bytes: usize, settings: &ShardSettings) -> &mut OpenBlock {
        // The first of two that shall take turns; what comes after it is bounded by the largest size alone.
        let is_first = self.sealed.is_empty() && self.open.len() == 1;
        let cut = self.waits.cut().filter(|_| is_first).unwrap_or(usize::MAX).max(settings.ahead_bytes_min);
        let bytes_max = settings.block_bytes_max.min(cut);
        let is_full = |block: &OpenBlock| {
            let builder = &block.builder;
            let count = builder.count() + block.changes.len();
            count > 0 && (builder.batch_bytes() + bytes > bytes_max || count >= CHANGES_MAX)
        };
        if self.open.back().is_none_or(is_full) {
            self.open.push_back(OpenBlock::default());
        }
        self.open.back_mut().expect("one was just made if there was none")
    }

    /// Why nothing can be appended.
    pub fn refuses(&self) -> Option<AppendError> {
        self.stopped.clone().or(self.closing.then_some(AppendError::Closed))
    }

    /// Counts a batch that is refused, and what its sender is told.
    fn refuse(&mut self, why: &Refused) -> AppendError {
        *self.counters.refused_batches.of(why) += 1;
        AppendError::Full(why.to_string())
    }

    /// Counts the batches in flight, all of which are refused.
    pub fn refuse_all(&mut self, why: &Refused) {
        let sealed: usize = self.sealed.iter().map(|block| block.batches).sum();
        let open: usize = self.open.iter().map(|block| block.builder.batches()).sum();
        *self.counters.refused_batches.of(why) += (sealed + open) as u64;
    }

    /// Throws away everything in flight: the durable state alone counts again.
    pub fn discard(&mut self, error: &AppendError) {
        self.overlay = Overlay::default();
        self.in_flight_bytes = 0;
        self.in_flight_changes = 0;
        for block in self.open.drain(..) {
            block.outcome.complete(Err(error.clone()));
            block.committed.complete(Err(error.clone()));
        }
        for block in self.sealed.drain(..) {
            block.outcome.complete(Err(error.clone()));
            block.committed.complete(Err(error.clone()));
        }
    }

    /// There was no room for the oldest block. Everything in flight that brings records is thrown away, for offsets and
    /// sequences follow each other; changes that callers wait for are written again without. If there was nothing else in that
    /// block there is no room for them either.
    pub fn refuse_records(&mut self, error: &AppendError) {
        let is_small = self.sealed.front().is_some_and(|block| block.batches == 0);
        let mut deleting = std::mem::take(&mut self.overlay.deleting);
        if is_small && let Some(block) = self.sealed.pop_front() {
            block.outcome.complete(Err(error.clone()));
            block.committed.complete(Err(error.clone()));
            for change in block.changes.iter() {
                if let Change::Topics(TopicChange::Deleted { id }) = change {
                    deleting.remove(id);
                }
            }
        }
        self.overlay = Overlay { deleting, ..Overlay::default() };
        self.in_flight_bytes = 0;
        let mut again = VecDeque::new();
        let mut keep = |changes: Vec<Change>, is_own, committed, outcome: Arc<Outcome>| {
            outcome.complete(Err(error.clone()));
            if !changes.is_empty() {
                again.push_back(OpenBlock { changes, is_own, committed, ..OpenBlock::default() });
            }
        };
        for block in self.sealed.drain(..) {
            keep(Arc::unwrap_or_clone(block.changes), block.is_own, block.committed, block.outcome);
        }
        for block in self.open.drain(..) {
            keep(block.changes, block.is_own, block.committed, block.outcome);
        }
        self.in_flight_changes = again.iter().map(|block| block.changes.len()).sum();
        self.open = again;
    }

    /// Nothing more is taken, and everybody who waits learns of it.
    pub fn stop(&mut self, error: AppendError) {
        let error = self.stopped.get_or_insert(error).clone();
        self.discard(&error);
        self.waiters.values().for_each(|waiter| waiter.notify_waiters());
    }

    fn recent(&self, partition: Partition, batch: &Batch) -> (Vec<Sequenced>, Option<u64>) {
        let id = batch.producer_id();
        let durable = self.state.producer(partition, id);
        let mut recent: Vec<Sequenced> = durable
            .iter()
            .flat_map(|producer| producer.batches.iter().map(|batch| (producer.epoch, batch)))
            .map(|(epoch, batch)| Sequenced {
                epoch,
                first_sequence: batch.first_sequence,
                last_sequence: batch.last_sequence,
                base_offset: batch.base_offset,
                last_offset: batch.last_offset,
            })
            .collect();
        let flying = self.overlay.producers.get(&(partition, id));
        recent.extend(flying.iter().flat_map(|flying| flying.iter().map(|(_, sequenced)| *sequenced)));
        (recent, flying.and_then(|flying| flying.back()).map(|(seq, _)| *seq))
    }

    /// What the batch is, and the newest block in flight that this was judged by.
    fn judge(&self, append: &Append) -> (Result<Verdict, AppendError>, Option<u64>) {
        match &append.source {
            Source::Producer if is_idempotent(&append.batch) => {
                let (recent, flying) = self.recent(append.partition, &append.batch);
                (check_sequence(&recent, &append.batch), flying)
            }
            Source::Producer => (Ok(Verdict::Fresh), None),
            Source::Edge(edge) => {
                let flying = self.overlay.streams.get(&edge.stream);
                let durable = || self.state.stream(&edge.stream).map(|stream| stream.next);
                let position = flying.map(|(next, _)| *next).or_else(durable);
                (check_position(position, edge).map(|()| Verdict::Fresh), flying.map(|(_, seq)| *seq))
            }
        }
    }

    /// Takes a stream's position over from another shard, unless a later one is known.
    fn adopt(&mut self, key: &StreamKey, stream: StreamState, settings: &ShardSettings) {
        let flying = self.overlay.streams.get(key).map(|(next, _)| *next);
        let known = flying.or_else(|| self.state.stream(key).map(|stream| stream.next));
        if known.is_some_and(|known| known >= stream.next) {
            return;
        }
        let StreamState { partition, next, chain } = stream;
        let block = self.open_block(0, settings);
        block.adopted.insert(key.clone(), (partition, next, chain));
        let seq = self.open_seq();
        self.overlay.streams.insert(key.clone(), (next, seq));
    }

    fn place(
        &mut self,
        append: Append,
        log_start: Offset,
        leader_epoch: i32,
        end: Offset,
        settings: &ShardSettings,
    ) -> Admitted<Appended> {
        let Append { partition, batch, source } = append;
        let bytes = batch.len();
        let block = self.open_block(bytes, settings);
        let last_offset = end + i64::from(batch.last_offset_delta());
        let appended = Appended { base_offset: end, last_offset, log_start, duplicate: false };
        let after = Some(block.outcome.clone());
        let (producer_id, epoch) = (batch.producer_id(), batch.producer_epoch());
        let sequenced = Sequenced {
            epoch,
            first_sequence: batch.base_sequence(),
            last_sequence: last_sequence(&batch),
            base_offset: end,
            last_offset,
        };
        block.builder.push(Placed { partition, base_offset: end, leader_epoch, batch });
        if producer_id >= 0 {
            block.producers.push((partition, producer_id));
        }
        if let Source::Edge(EdgeBatch { stream, next, chain, .. }) = &source {
            block.streams.insert(stream.clone(), (partition, *next, *chain));
        }
        let seq = self.open_seq();
        if producer_id >= 0 {
            self.overlay.producers.entry((partition, producer_id)).or_default().push_back((seq, sequenced));
        }
        if let Source::Edge(edge) = source {
            self.overlay.streams.insert(edge.stream, (edge.next, seq));
        }
        self.overlay.ends.insert(partition, (last_offset + 1, seq));
        self.in_flight_bytes += bytes;
        Admitted { answer: Ok(appended), after }
    }
}

impl Core {
    /// Takes a batch's place in the order, or finds why not. `elsewhere` is where its stream stands in another shard.
    pub fn admit(&self, append: Append, elsewhere: Option<StreamState>) -> Admitted<Appended> {
        let mut inner = self.inner.lock();
        let inner = &mut *inner;
        if let Some(error) = inner.refuses().or_else(|| self.check_lease(false).err()) {
            inner.counters.refused_batches.stopped += 1;
            return Admitted::now(Err(error));
        }
        let partition = append.partition;
        let Some(state) =
            inner.state.partition(partition).filter(|_| !inner.overlay.deleting.contains(&partition.topic))
        else {
            return Admitted::now(Err(AppendError::UnknownPartition(partition)));
        };
        let (log_start, leader_epoch) = (state.log_start, state.leader_epoch());
        let end = inner.overlay.ends.get(&partition).map_or(state.high_watermark, |(end, _)| *end);
        if let (Source::Edge(edge), Some(stream)) = (&append.source, elsewhere) {
            inner.adopt(&edge.stream, stream, &self.settings);
            // Whatever becomes of the batch, the position is in an open block now.
            self.wake_committer(inner);
        }
        let (verdict, flying) = inner.judge(&append);
        let after = || flying.and_then(|seq| inner.outcome_of(seq));
        match verdict {
            // What it was judged by may still fail: then the judgement was wrong, and the failure is the answer.
            Err(error) => return Admitted { answer: Err(error), after: after() },
            Ok(Verdict::Duplicate(Sequenced { base_offset, last_offset, .. })) => {
                let answer = Ok(Appended { base_offset, last_offset, log_start, duplicate: true });
                return Admitted { answer, after: after() };
            }
            Ok(Verdict::Fresh) => {}
        }
        let offsets_max = self.offsets_max.load(Ordering::Relaxed);
        if end.saturating_add(i64::from(append.batch.last_offset_delta())) >= offsets_max {
            let refused = Refused::Offsets(format!("offsets below {offsets_max} are reserved so far"));
            return Admitted::now(Err(inner.refuse(&refused)));
        }
        if let Err(refused) = self.full(inner, append.batch.len()) {
            let error = inner.refuse(&refused);
            if self.settings.drops_oldest {
                // A block with nothing in it makes room for who tries again.
                inner.open_block(0, &self.settings);
                self.wake_committer(inner);
            }
            return Admitted::now(Err(error));
        }
        let is_early = planted(Bug::EarlyAnswer) && matches!(append.source, Source::Producer);
        let mut admitted = inner.place(append, log_start, leader_epoch, end, &self.settings);
        if is_early {
            admitted.after = None;
        }
        self.wake_committer(inner);
        admitted
    }

    /// Something is open: for the writer, unless it is at work or told by the encoder, and will look by itself.
    fn wake_committer(&self, inner: &Inner) {
        match inner.sealed.back().map(|block| &block.stage) {
            None | Some(Stage::Written(..)) => self.work.notify_one(),
            Some(Stage::Writing) if inner.is_worth_encoding(&self.settings) => self.ahead.notify_one(),
            Some(Stage::Writing | Stage::Encoding | Stage::Ready(_)) => {}
        }
    }

    /// Whether `bytes` bytes of batches are taken, by what is known under the lock.
    pub fn full(&self, inner: &mut Inner, bytes: usize) -> Result<(), Refused> {
        let settings = &self.settings;
        if inner.in_flight_bytes > 0 && inner.in_flight_bytes + bytes > settings.in_flight_bytes_max {
            return Err(Refused::InFlight(format!("{} bytes wait for the disk", inner.in_flight_bytes)));
        }
        // Changes may use what batches must leave: a full log can still be trimmed, and groups can commit.
        let needed = inner.in_flight_bytes as u64 + bytes as u64 + self.wal_reserve;
        if inner.wal_free_bytes < needed {
            // A disk has room again without saying so.
            let (free, bound) = self.wal_free();
            inner.wal_free_bytes = free;
            let text = format!("the WAL has room for {free} bytes more");
            match free < needed {
                true if bound < needed => return Err(Refused::Wal(text)),
                true => return Err(Refused::Disk(format!("{text} on this disk"))),
                false => {}
            }
        }
        if inner.index.entries() >= settings.index_entries_max {
            let entries = inner.index.entries();
            return Err(Refused::Index(format!("{entries} index entries wait for the archive")));
        }
        Ok(())
    }

    /// How much the WAL has room for on its disk, and how much by its bound.
    pub fn wal_free(&self) -> (u64, u64) {
        let Usage { free_bytes, held_bytes, bytes_max, .. } = self.wal.usage();
        let growth = bytes_max.saturating_sub(held_bytes);
        let on_disk = self.wal.disk_free_bytes().map_or(growth, |free| growth.min(free));
        (free_bytes.saturating_sub(growth - on_disk), free_bytes)
    }

    /// Whether the log itself would take a block with so many bytes of batches.
    pub fn wal_room(&self, bytes: usize) -> Result<(), Refused> {
        self.wal.room(bytes as u64 + BLOCK_OVERHEAD, self.wal_reserve).map_err(|none| match none {
            NoRoom::Bound(text) => Refused::Wal(text),
            NoRoom::Disk(text) => Refused::Disk(text),
        })
    }

    /// What is taken of the room for records, of whatever ends first.
    pub fn taken_ratio(&self, wal: &Usage, disk_free: Option<u64>) -> f64 {
        // What the log may still grow by, and on this disk can.
        let growth = wal.bytes_max.saturating_sub(wal.held_bytes);
        let usable = wal.held_bytes + disk_free.map_or(growth, |free| growth.min(free));
        let free = wal.free_bytes.saturating_sub(growth) + (usable - wal.held_bytes);
        let left = free.saturating_sub(if self.settings.drops_oldest { 0 } else { self.wal_reserve });
        let log = 1.0 - left as f64 / usable.max(1) as f64;
        let index = self.inner.lock().index.entries() as f64 / self.settings.index_entries_max.max(1) as f64;
        log.max(index).clamp(0.0, 1.0)
    }

    /// Takes changes' place in the order. Those that are the node's own may use the last of the log.
    pub fn admit_changes(&self, changes: Vec<Change>, is_own: bool) -> Admitted<()> {
        let mut inner = self.inner.lock();
        if let Some(error) = inner.refuses().or_else(|| self.check_lease(false).err()) {
            return Admitted::now(Err(error));
        }
        if changes.is_empty() {
            return Admitted::now(Ok(()));
        }
        let (waiting, max) = (inner.in_flight_changes, self.settings.in_flight_changes_max);
        if waiting > 0 && waiting + changes.len() > max {
            inner.counters.refused_changes += 1;
            let text = format!("{waiting} changes wait for durability, at most {max} may");
            return Admitted::now(Err(AppendError::Full(text)));
        }
        inner.in_flight_changes += changes.len();
        // Each in blocks of its own: a client's must not come along into the room that is kept.
        if inner.open.back().is_some_and(|block| !block.changes.is_empty() && block.is_own != is_own) {
            inner.open.push_back(OpenBlock::default());
        }
        let block = inner.open_block(0, &self.settings);
        block.is_own = is_own;
        let after = Some(block.committed.clone());
        let deleted: Vec<TopicId> = changes
            .iter()
            .filter_map(
                |change| if let Change::Topics(TopicChange::Deleted { id }) = change { Some(*id) } else { None },
            )
            .collect();
        block.changes.extend(changes);
        inner.overlay.deleting.extend(deleted);
        self.wake_committer(&inner);
        Admitted { answer: Ok(()), after }
    }

    /// Begins to move a log start.
    pub fn begin_trim(&self, partition: Partition, before: Offset) -> Result<Admitted<()>, TrimError> {
        let bounds = self.inner.lock().bounds(partition).map_err(|error| match error {
            ReadError::Closed => TrimError::Append(AppendError::Closed),
            _ => TrimError::UnknownPartition(partition),
        })?;
        if before > bounds.high_watermark {
            return Err(TrimError::OffsetOutOfRange { requested: before, bounds });
        }
        if before <= bounds.log_start {
            return Ok(Admitted::now(Ok(())));
        }
        Ok(self.admit_changes(vec![Change::Logs(LogChange::StartMoved { partition, offset: before })], false))
    }
}
