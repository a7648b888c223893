//! Fetch: stored batches from given offsets on, as they are, with a long poll.
//!
//! - A read begins with the batch that contains the offset; the client drops what lies before (rule of the protocol).
//! - The answer waits until `min_bytes` are there over all partitions, or `max_wait_ms` is over; any error ends the wait.
//! - The first partition that has something gives one whole batch even beyond the limits (KIP-74), no other does.
//! - A partition named twice is refused the second time: there are never more waits than partitions.
//! - There are no transactions, so the last stable offset is the high watermark and nothing was aborted.
//! - Sessions are not kept: every answer says session 0, which tells the client to name all partitions each time
//!   (KIP-227 allows it always).
//! - v13 and later name topics by id: a topic made again under its name is another one.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::future::join_all;
use futures_util::stream::FuturesUnordered;
use kafka_wire::fetch::{
    EpochEndOffset, FetchPartition, FetchRequest, FetchResponse, FetchableTopicResponse, PartitionData,
};
use kafka_wire::{ErrorCode, Records};
use shared::batch::{Batch, Compression};
use shared::log::{Bounds, Read, ReadError, ReadLimits};
use shared::name::{Offset, Partition};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};
use tracing::error;

use super::{Broker, MEMORY_UNIT, RequestContext, Route, memory_units};

/// The first version whose clients know zstd (KIP-110).
const ZSTD_VERSION_MIN: i16 = 10;
/// The first version that names topics by id.
const TOPIC_ID_VERSION_MIN: i16 = 13;
const READ_COMMITTED: i8 = 1;
/// Partitions read at the same time for one answer.
pub(super) const READS_AT_ONCE: usize = 8;
/// Least time a Fetch waits for memory, even one that does not wait for records.
const MEMORY_WAIT: Duration = Duration::from_millis(100);
/// A session we never granted.
const NO_SESSION: i32 = 0;
/// The epoch of a request that names all partitions and wants no session, or ends one.
const FINAL_EPOCH: i32 = -1;

/// An answer and the memory its records are counted against.
pub(super) struct Fetched {
    pub response: FetchResponse,
    pub memory: Option<OwnedSemaphorePermit>,
}

/// Answers a Fetch.
pub(super) async fn handle(broker: &Broker, context: &RequestContext, request: FetchRequest) -> Fetched {
    if request.session_id != NO_SESSION && request.session_epoch != FINAL_EPOCH {
        let response = FetchResponse { error_code: ErrorCode::FETCH_SESSION_ID_NOT_FOUND, ..Default::default() };
        return Fetched { response, memory: None };
    }
    let wait = Duration::from_millis(request.max_wait_ms.max(0) as u64).min(broker.settings.fetch_wait_max);
    let mut poll = Poll {
        broker,
        slots: slots(broker, context.api_version, &request),
        bytes: 0,
        bytes_min: request.min_bytes.max(0) as usize,
        budget: Budget::new(broker, request.max_bytes.max(0) as usize),
        deadline: Instant::now() + wait,
    };
    poll.run().await;
    if context.api_version < ZSTD_VERSION_MIN {
        poll.refuse_zstd();
    }
    broker.counters.fetched_bytes.add(poll.bytes as u64);
    let memory = poll.budget.held.take();
    Fetched { response: respond(request, poll.slots), memory }
}

/// One partition of the request, in the order asked.
enum Slot {
    Failed(ErrorCode),
    Diverged(EpochEndOffset, Bounds),
    Open(Open),
}

struct Open {
    partition: Partition,
    /// Where to go on reading.
    next: Offset,
    bytes_max: usize,
    batches: Vec<Bytes>,
    bytes: usize,
    bounds: Bounds,
    /// Nothing more is to be had for this answer.
    full: bool,
}

fn slots(broker: &Broker, version: i16, request: &FetchRequest) -> Vec<Slot> {
    let by_id = version >= TOPIC_ID_VERSION_MIN;
    let routes = match by_id {
        true => broker.routes_with_ids(request.topics.iter().map(|topic| topic.topic_id)),
        false => broker.routes_named(request.topics.iter().map(|topic| &topic.topic[..])),
    };
    let unknown = if by_id { ErrorCode::UNKNOWN_TOPIC_ID } else { ErrorCode::UNKNOWN_TOPIC_OR_PARTITION };
    let asked = request.topics.iter().zip(&routes);
    let mut seen = HashSet::new();
    asked
        .flat_map(|(topic, route)| topic.partitions.iter().map(move |asked| (route, asked)))
        .map(|(route, asked)| match route {
            Some(route) => slot(broker, route, asked, &mut seen).unwrap_or_else(Slot::Failed),
            None => Slot::Failed(unknown),
        })
        .collect()
}

fn slot(
    broker: &Broker,
    route: &Route,
    asked: &FetchPartition,
    seen: &mut HashSet<Partition>,
) -> Result<Slot, ErrorCode> {
    let partition = route.partition(asked.partition).ok_or(ErrorCode::UNKNOWN_TOPIC_OR_PARTITION)?;
    if !seen.insert(partition) {
        return Err(ErrorCode::INVALID_REQUEST);
    }
    let bounds = broker.log.bounds(partition).map_err(|error| refuse_read(&error))?;
    check_leader_epoch(asked.current_leader_epoch, bounds.leader_epoch)?;
    if asked.last_fetched_epoch >= 0 {
        let end = broker.log.epoch_end(partition, asked.last_fetched_epoch).map_err(|error| refuse_read(&error))?;
        if let Some(end) = end.filter(|end| end.epoch < asked.last_fetched_epoch || end.end < asked.fetch_offset) {
            return Ok(Slot::Diverged(EpochEndOffset { epoch: end.epoch, end_offset: end.end }, bounds));
        }
    }
    Ok(Slot::Open(Open {
        partition,
        next: asked.fetch_offset,
        bytes_max: asked.partition_max_bytes.max(0) as usize,
        batches: Vec::new(),
        bytes: 0,
        bounds,
        full: false,
    }))
}

/// What a client believes to be the leader's epoch, against what it is (KIP-320).
pub(super) fn check_leader_epoch(believed: i32, current: i32) -> Result<(), ErrorCode> {
    match believed {
        ..0 => Ok(()),
        older if older < current => Err(ErrorCode::FENCED_LEADER_EPOCH),
        newer if newer > current => Err(ErrorCode::UNKNOWN_LEADER_EPOCH),
        _ => Ok(()),
    }
}

/// What a client is told of a failed read.
pub(super) fn refuse_read(error: &ReadError) -> ErrorCode {
    match error {
        ReadError::UnknownPartition(_) => ErrorCode::UNKNOWN_TOPIC_OR_PARTITION,
        ReadError::OffsetOutOfRange { .. } => ErrorCode::OFFSET_OUT_OF_RANGE,
        ReadError::Closed => ErrorCode::NOT_LEADER_OR_FOLLOWER,
        ReadError::Corrupt(_) | ReadError::Storage(_) => {
            error!(%error, "a read failed");
            ErrorCode::KAFKA_STORAGE_ERROR
        }
    }
}

impl Slot {
    /// Where and how much to read, if there is anything to read now.
    fn expects(&mut self, broker: &Broker) -> Option<(Partition, Offset, usize)> {
        let Self::Open(open) = self else { return None };
        if open.full {
            return None;
        }
        match broker.log.bounds(open.partition) {
            // At the end: nothing to read, and nothing wrong either.
            Ok(bounds) if bounds.high_watermark == open.next => {
                open.bounds = bounds;
                None
            }
            Ok(_) => Some((open.partition, open.next, open.bytes_max.saturating_sub(open.bytes))),
            Err(error) => {
                self.fail(&error);
                None
            }
        }
    }

    /// Adds what a read came to and returns how many bytes of it were taken.
    fn take(&mut self, outcome: Result<Read, ReadError>, limit: usize, first: bool) -> usize {
        let Self::Open(open) = self else { return 0 };
        match outcome {
            // A batch larger than what was left: it comes first in a later answer.
            Ok(read) if read.bytes() > limit && !first => {
                open.full = true;
                0
            }
            Ok(read) => {
                let bytes = read.bytes();
                open.full = bytes > 0 && read.next < read.bounds.high_watermark;
                open.next = read.next.max(open.next);
                open.bounds = read.bounds;
                open.bytes += bytes;
                open.batches.extend(read.batches);
                bytes
            }
            Err(error) => {
                self.fail(&error);
                0
            }
        }
    }

    fn fail(&mut self, error: &ReadError) {
        match self {
            // What was read before the failure is good; the next Fetch meets the failure again.
            Self::Open(open) if open.bytes > 0 => open.full = true,
            _ => *self = Self::Failed(refuse_read(error)),
        }
    }
}

/// A read that memory is set aside for.
struct GrantedRead {
    partition: Partition,
    from: Offset,
    limit: usize,
}

struct Poll<'a> {
    broker: &'a Broker,
    slots: Vec<Slot>,
    bytes: usize,
    bytes_min: usize,
    budget: Budget,
    deadline: Instant,
}

impl Poll<'_> {
    async fn run(&mut self) {
        loop {
            self.read_all().await;
            let failed = self.slots.iter().any(|slot| !matches!(slot, Slot::Open(_)));
            if failed || self.bytes >= self.bytes_min || self.budget.spent || !self.wait().await {
                return;
            }
        }
    }

    /// Reads on wherever something is expected, until the limits are reached; several partitions at a time, because a
    /// read of what only the bucket has takes a round trip.
    async fn read_all(&mut self) {
        let mut from = 0;
        while !self.budget.spent {
            let granted = self.grant_some(&mut from).await;
            if granted.is_empty() {
                return;
            }
            let reads = granted
                .iter()
                .map(|(_, read)| self.broker.log.read(read.partition, read.from, ReadLimits { bytes_max: read.limit }));
            let outcomes = join_all(reads).await;
            for ((at, read), outcome) in granted.into_iter().zip(outcomes) {
                let used = self.slots.get_mut(at).map_or(0, |slot| slot.take(outcome, read.limit, self.bytes == 0));
                self.budget.settle(read.limit, used);
                self.bytes += used;
            }
        }
    }

    /// Sets memory aside for the next few partitions at or behind `from` that have something to read.
    async fn grant_some(&mut self, from: &mut usize) -> Vec<(usize, GrantedRead)> {
        let mut granted = Vec::new();
        while let Some(slot) = self.slots.get_mut(*from).filter(|_| granted.len() < READS_AT_ONCE) {
            if let Some((partition, next, wanted)) = slot.expects(self.broker) {
                let first = self.bytes == 0 && granted.is_empty();
                let Some(limit) = self.budget.grant(wanted, first, self.deadline).await else { break };
                granted.push((*from, GrantedRead { partition, from: next, limit }));
            }
            *from += 1;
        }
        granted
    }

    /// A client that does not know zstd hears so, instead of bytes it would take for damaged.
    fn refuse_zstd(&mut self) {
        for slot in &mut self.slots {
            if matches!(slot, Slot::Open(open) if open.batches.iter().any(|slice| has_zstd(slice.clone()))) {
                *slot = Slot::Failed(ErrorCode::UNSUPPORTED_COMPRESSION_TYPE);
            }
        }
    }

    /// Waits until a partition that has room grew. `false` when time is up or nothing can come any more.
    async fn wait(&self) -> bool {
        let mut growing: FuturesUnordered<_> = self
            .slots
            .iter()
            .filter_map(|slot| match slot {
                Slot::Open(open) if !open.full => {
                    Some(self.broker.log.wait(open.partition, open.bounds.high_watermark))
                }
                _ => None,
            })
            .collect();
        // A failure counts as growth: the read that follows meets it and reports it.
        matches!(timeout_at(self.deadline, growing.next()).await, Ok(Some(_)))
    }
}

/// Whether any of some stored batches is compressed with zstd.
fn has_zstd(mut batches: Bytes) -> bool {
    while let Some(length) = batches.get(8..12).and_then(|length| length.try_into().ok()).map(i32::from_be_bytes) {
        let end = batches.len().min(12 + length.max(0) as usize);
        let batch = Batch::trusted(batches.split_to(end));
        if batch.is_ok_and(|batch| batch.compression() == Compression::Zstd) {
            return true;
        }
    }
    false
}

/// What one answer may still take: of its own limit, and of the memory that all share.
struct Budget {
    shared: Arc<Semaphore>,
    held: Option<OwnedSemaphorePermit>,
    /// Bytes that reads may still be granted.
    left: usize,
    /// The answer takes nothing more.
    spent: bool,
}

impl Budget {
    fn new(broker: &Broker, bytes_max: usize) -> Self {
        let left = bytes_max.min(broker.settings.fetch_bytes_max);
        Self { shared: broker.memory.responses.clone(), held: None, left, spent: false }
    }

    /// Sets memory aside for one read and returns how many bytes it is for. The first read of an answer waits for
    /// memory and is granted even where the limit is nothing (KIP-74); later ones make do with the answer as it is.
    async fn grant(&mut self, wanted: usize, first: bool, deadline: Instant) -> Option<usize> {
        let limit = wanted.min(self.left);
        if self.left == 0 && !first {
            return None;
        }
        let permits = self.shared.clone();
        let permit = match first {
            true => {
                // Others' answers leave within their transfer time; this one may then be late, but is not empty.
                let until = deadline.max(Instant::now() + MEMORY_WAIT);
                timeout_at(until, permits.acquire_many_owned(memory_units(limit))).await.ok().and_then(Result::ok)
            }
            false => permits.try_acquire_many_owned(memory_units(limit)).ok(),
        };
        self.spent |= permit.is_none();
        match (&mut self.held, permit?) {
            (Some(held), permit) => held.merge(permit),
            (none, permit) => *none = Some(permit),
        }
        self.left -= limit;
        Some(limit)
    }

    /// Gives back what a read did not need.
    fn settle(&mut self, granted: usize, used: usize) {
        let unused = memory_units(granted).saturating_sub(used.div_ceil(MEMORY_UNIT) as u32);
        if let Some(held) = &mut self.held {
            drop(held.split(unused as usize));
        }
        self.left += granted.saturating_sub(used);
        self.spent |= self.left == 0 && used > 0;
    }
}

fn respond(request: FetchRequest, slots: Vec<Slot>) -> FetchResponse {
    let read_committed = request.isolation_level == READ_COMMITTED;
    let mut slots = slots.into_iter();
    let responses = request.topics.into_iter().map(|topic| FetchableTopicResponse {
        partitions: topic
            .partitions
            .iter()
            .zip(&mut slots)
            .map(|(asked, slot)| partition_data(asked.partition, slot, read_committed))
            .collect(),
        topic: topic.topic,
        topic_id: topic.topic_id,
    });
    FetchResponse { responses: responses.collect(), ..Default::default() }
}

fn partition_data(partition_index: i32, slot: Slot, read_committed: bool) -> PartitionData {
    let empty = PartitionData { partition_index, records: Some(Records::default()), ..Default::default() };
    let aborted_transactions = read_committed.then(Vec::new);
    let bounded = |bounds: Bounds| PartitionData {
        high_watermark: bounds.high_watermark,
        last_stable_offset: bounds.high_watermark,
        log_start_offset: bounds.log_start,
        aborted_transactions,
        ..empty.clone()
    };
    match slot {
        Slot::Failed(error_code) => PartitionData { error_code, high_watermark: -1, ..empty },
        Slot::Diverged(diverging_epoch, bounds) => PartitionData { diverging_epoch, ..bounded(bounds) },
        Slot::Open(open) => PartitionData { records: Some(Records(open.batches)), ..bounded(open.bounds) },
    }
}
