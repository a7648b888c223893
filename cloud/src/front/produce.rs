//! Produce: batches are checked, take their place in the log, and are answered when they are durable.
//!
//! - `acks` 1 and -1 mean the same here, the log has one durable copy before anything is answered. 0 has no answer;
//!   a failure then closes the connection.
//! - One batch per partition, RecordBatch v2, its base offset 0. Its header, length and CRC are checked
//!   ([`Batch::check_entry`]), its records are not looked into: they pass through as the producer sealed them.
//! - v0 to v2 carry older formats: each partition is answered UNSUPPORTED_VERSION.
//! - The request's own time-out bounds how long its answer waits for a slow disk or store: REQUEST_TIMED_OUT, which clients
//!   retry. The batch may still become durable; an idempotent producer's repeat is then recognised.
//! - Duplicates are recognised by the log and answered with their first offset, as a success.
//! - Transactions are not served: transactional and control batches are refused.

use std::time::Duration;

use bytes::Bytes;
use kafka_wire::ErrorCode;
use kafka_wire::produce::{
    PartitionProduceData, PartitionProduceResponse, ProduceRequest, ProduceResponse, TopicProduceResponse,
};
use shared::batch::{Batch, BatchError, Compression};
use shared::limited;
use shared::log::{Append, AppendError, Appended, BoxFuture, Source};
use tokio::time::{Instant, timeout_at};
use tracing::error;

use super::{Broker, RequestContext, Route, patience};

/// The first version that carries RecordBatch v2.
const VERSION_MIN: i16 = 3;
/// The first version whose clients know zstd (KIP-110).
const ZSTD_VERSION_MIN: i16 = 7;

/// Appends under way.
pub(super) struct Begun {
    acks: i16,
    timeout: Duration,
    topics: Vec<(String, Vec<PartitionBegun>)>,
}

struct PartitionBegun {
    index: i32,
    append: Result<BoxFuture<'static, Result<Appended, AppendError>>, Refusal>,
}

/// Why a partition's batch was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    pub code: ErrorCode,
    pub message: Option<String>,
}

impl From<ErrorCode> for Refusal {
    fn from(code: ErrorCode) -> Self {
        Self { code, message: None }
    }
}

/// Checks the batches and starts their appends, in the order they are in.
pub(super) fn begin(broker: &Broker, context: &RequestContext, request: ProduceRequest) -> Begun {
    let refuse_all = refuse_request(context.api_version, &request);
    // Without an answer nobody's time can be up.
    let timeout = patience(if request.acks == 0 { i32::MAX } else { request.timeout_ms });
    let routes = broker.routes_named(request.topic_data.iter().map(|topic| &topic.name[..]));
    let topics = request.topic_data.into_iter().zip(routes).map(|(topic, route)| {
        let partitions = topic.partition_data.into_iter().map(|data| {
            let index = data.index;
            let append = match &refuse_all {
                Some(refusal) => Err(refusal.clone()),
                None => begin_partition(broker, context.api_version, route.as_ref(), data),
            };
            if append.is_err() {
                broker.counters.refused_batches.add(1);
            }
            PartitionBegun { index, append }
        });
        (topic.name, partitions.collect())
    });
    Begun { acks: request.acks, timeout, topics: topics.collect() }
}

/// What is wrong with the request as a whole.
fn refuse_request(version: i16, request: &ProduceRequest) -> Option<Refusal> {
    if version < VERSION_MIN {
        return Some(ErrorCode::UNSUPPORTED_VERSION.into());
    }
    if !matches!(request.acks, -1..=1) {
        return Some(ErrorCode::INVALID_REQUIRED_ACKS.into());
    }
    if request.transactional_id.is_some() {
        return Some(transactions_not_served());
    }
    None
}

fn transactions_not_served() -> Refusal {
    Refusal { code: ErrorCode::INVALID_TXN_STATE, message: Some("transactions are not served".into()) }
}

fn begin_partition(
    broker: &Broker,
    version: i16,
    route: Option<&Route>,
    data: PartitionProduceData,
) -> Result<BoxFuture<'static, Result<Appended, AppendError>>, Refusal> {
    let route = route.ok_or(ErrorCode::UNKNOWN_TOPIC_OR_PARTITION)?;
    let partition = route.partition(data.index).ok_or(ErrorCode::UNKNOWN_TOPIC_OR_PARTITION)?;
    let batch = check(version, route, data.records.unwrap_or_default())?;
    broker.counters.produced_batches.add(1);
    broker.counters.produced_bytes.add(batch.len() as u64);
    Ok(broker.log.append(Append { partition, batch, source: Source::Producer }))
}

/// Takes the one batch out of a partition's bytes, or says what is wrong with it.
fn check(version: i16, route: &Route, mut records: Bytes) -> Result<Batch, Refusal> {
    let invalid = |message: &str| Refusal { code: ErrorCode::INVALID_RECORD, message: Some(message.to_owned()) };
    // Before the checksum is made over it.
    if records.len() > route.batch_bytes_max {
        let message = format!(
            "a batch of {} bytes, topic {} takes {} (max.message.bytes)",
            records.len(),
            route.name,
            route.batch_bytes_max
        );
        return Err(Refusal { code: ErrorCode::MESSAGE_TOO_LARGE, message: Some(message) });
    }
    let batch = Batch::split_first(&mut records).map_err(refuse_batch)?;
    let batch = batch.ok_or_else(|| invalid("no batch"))?;
    if !records.is_empty() {
        return Err(invalid("more than one batch"));
    }
    batch.check_entry().map_err(refuse_batch)?;
    if batch.base_offset() != 0 {
        return Err(invalid("the base offset of a producer's batch is 0, the broker sets it"));
    }
    if batch.is_control() {
        return Err(invalid("control batches are written by brokers only"));
    }
    if batch.is_transactional() {
        return Err(transactions_not_served());
    }
    if batch.is_log_append_time() {
        let message = "only a broker sets the timestamp type LogAppendTime".to_owned();
        return Err(Refusal { code: ErrorCode::INVALID_TIMESTAMP, message: Some(message) });
    }
    let identified = batch.producer_id() >= 0;
    if identified && (batch.producer_epoch() < 0 || batch.base_sequence() < 0) {
        return Err(invalid("a producer id without epoch or sequence"));
    }
    if batch.compression() == Compression::Zstd && version < ZSTD_VERSION_MIN {
        return Err(ErrorCode::UNSUPPORTED_COMPRESSION_TYPE.into());
    }
    Ok(batch)
}

fn refuse_batch(error: BatchError) -> Refusal {
    let code = match error {
        BatchError::Cut { .. } | BatchError::Crc { .. } => ErrorCode::CORRUPT_MESSAGE,
        BatchError::Magic(_) | BatchError::Malformed(_) => ErrorCode::INVALID_RECORD,
        BatchError::Unopened(_) | BatchError::Bomb(_) => ErrorCode::INVALID_RECORD,
    };
    Refusal { code, message: Some(error.to_string()) }
}

/// What a client is told of a failed append. What may succeed later gets a code that clients retry by themselves.
pub(super) fn refuse_append(error: &AppendError) -> Refusal {
    let code = match error {
        AppendError::UnknownPartition(_) => ErrorCode::UNKNOWN_TOPIC_OR_PARTITION,
        AppendError::OutOfOrderSequence { .. } => ErrorCode::OUT_OF_ORDER_SEQUENCE_NUMBER,
        AppendError::ProducerFenced { .. } => ErrorCode::INVALID_PRODUCER_EPOCH,
        // Retried without a new look at the metadata, and it says that nothing was stored.
        AppendError::Full(_) | AppendError::Unconfirmed { stored: false, .. } => ErrorCode::NOT_ENOUGH_REPLICAS,
        AppendError::Unconfirmed { stored: true, .. } => ErrorCode::NOT_ENOUGH_REPLICAS_AFTER_APPEND,
        AppendError::Fenced(_) | AppendError::Closed => ErrorCode::NOT_LEADER_OR_FOLLOWER,
        AppendError::Storage(_) => ErrorCode::KAFKA_STORAGE_ERROR,
        AppendError::WrongPosition { .. } => ErrorCode::UNKNOWN_SERVER_ERROR,
    };
    Refusal { code, message: Some(error.to_string()) }
}

impl Begun {
    /// Waits until every append is durable or has failed. `None` where the protocol has no answer, an error where it
    /// has none and something failed.
    pub(super) async fn answer(self) -> Result<Option<ProduceResponse>, ErrorCode> {
        let mut responses = Vec::with_capacity(self.topics.len());
        let deadline = Instant::now() + self.timeout;
        for (name, partitions) in self.topics {
            let mut partition_responses = Vec::with_capacity(partitions.len());
            // One by one: all have begun, and those that share a block share the wake-up.
            for partition in partitions {
                partition_responses.push(partition.answer(deadline).await);
            }
            responses.push(TopicProduceResponse { name, partition_responses });
        }
        if self.acks != 0 {
            return Ok(Some(ProduceResponse { responses, ..Default::default() }));
        }
        let failed = responses
            .iter()
            .flat_map(|topic| &topic.partition_responses)
            .map(|partition| partition.error_code)
            .find(|code| code.is_error());
        failed.map_or(Ok(None), Err)
    }
}

impl PartitionBegun {
    async fn answer(self, deadline: Instant) -> PartitionProduceResponse {
        let appended = match self.append {
            Ok(append) => match timeout_at(deadline, append).await {
                Ok(appended) => appended.map_err(|error| {
                    match &error {
                        AppendError::Storage(_) => error!(%error, "an append failed"),
                        AppendError::Full(_) => limited!(warn, %error, "a producer is told to try again later"),
                        _ => {}
                    }
                    refuse_append(&error)
                }),
                Err(_) => Err(Refusal {
                    code: ErrorCode::REQUEST_TIMED_OUT,
                    message: Some("the batch is not durable yet, and may still become so".into()),
                }),
            },
            Err(refusal) => Err(refusal),
        };
        match appended {
            Ok(appended) => PartitionProduceResponse {
                index: self.index,
                base_offset: appended.base_offset,
                log_start_offset: appended.log_start,
                ..Default::default()
            },
            Err(refusal) => PartitionProduceResponse {
                index: self.index,
                error_code: refusal.code,
                base_offset: -1,
                error_message: refusal.message,
                ..Default::default()
            },
        }
    }
}
