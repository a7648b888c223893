//! ListOffsets: the offset that belongs to a time.
//!
//! - -1 latest: the high watermark, which is the last stable offset too as there are no transactions.
//! - -2 earliest and -4 earliest local: the log start; where a record rests is not the reader's concern.
//! - -3 the record with the greatest timestamp. -5 latest tiered: unknown (-1), as Kafka answers without tiering.
//! - A time: the first record at or after it, -1 and -1 when there is none.
//! - A partition asked about twice is refused the second time, as in Kafka.
//! - A special time that the request's version does not have is answered UNSUPPORTED_VERSION.

use std::collections::HashSet;

use futures_util::stream::{self, StreamExt as _};
use kafka_wire::ErrorCode;
use kafka_wire::list_offsets::{
    ListOffsetsPartition, ListOffsetsPartitionResponse, ListOffsetsRequest, ListOffsetsResponse,
    ListOffsetsTopicResponse,
};
use shared::log::TimePoint;

use super::fetch::{READS_AT_ONCE, check_leader_epoch, refuse_read};
use super::{Broker, RequestContext, Route};

const LATEST: i64 = -1;
const EARLIEST: i64 = -2;
const MAX_TIMESTAMP: i64 = -3;
const EARLIEST_LOCAL: i64 = -4;
const LATEST_TIERED: i64 = -5;

/// Answers a ListOffsets.
pub async fn handle(broker: &Broker, context: &RequestContext, request: ListOffsetsRequest) -> ListOffsetsResponse {
    let routes = broker.routes_named(request.topics.iter().map(|topic| &topic.name[..]));
    let mut topics = Vec::with_capacity(request.topics.len());
    let mut seen = HashSet::new();
    for (topic, route) in request.topics.into_iter().zip(&routes) {
        // Gathered first: a stream over a closure that borrows is not known to be `Send`.
        let mut answers = Vec::with_capacity(topic.partitions.len());
        for asked in topic.partitions {
            let repeated = !seen.insert((topic.name.clone(), asked.partition_index));
            answers.push(answer(broker, context.api_version, route.as_ref(), asked, repeated));
        }
        let partitions = stream::iter(answers).buffered(READS_AT_ONCE).collect().await;
        topics.push(ListOffsetsTopicResponse { name: topic.name, partitions });
    }
    ListOffsetsResponse { topics, ..Default::default() }
}

async fn answer(
    broker: &Broker,
    version: i16,
    route: Option<&Route>,
    asked: ListOffsetsPartition,
    repeated: bool,
) -> ListOffsetsPartitionResponse {
    let found = match repeated {
        true => Err(ErrorCode::INVALID_REQUEST),
        false => find(broker, version, route, &asked).await,
    };
    let error_code = found.err().unwrap_or_default();
    let TimePoint { offset, timestamp, leader_epoch } = found.unwrap_or(NONE);
    let partition_index = asked.partition_index;
    ListOffsetsPartitionResponse { partition_index, error_code, timestamp, offset, leader_epoch }
}

const NONE: TimePoint = TimePoint { offset: -1, timestamp: -1, leader_epoch: -1 };

async fn find(
    broker: &Broker,
    version: i16,
    route: Option<&Route>,
    asked: &ListOffsetsPartition,
) -> Result<TimePoint, ErrorCode> {
    let partition = route.and_then(|route| route.partition(asked.partition_index));
    let partition = partition.ok_or(ErrorCode::UNKNOWN_TOPIC_OR_PARTITION)?;
    let bounds = broker.log.bounds(partition).map_err(|error| refuse_read(&error))?;
    check_leader_epoch(asked.current_leader_epoch, bounds.leader_epoch)?;
    let found = match asked.timestamp {
        LATEST => {
            let (offset, leader_epoch) = (bounds.high_watermark, bounds.leader_epoch);
            return Ok(TimePoint { offset, leader_epoch, ..NONE });
        }
        EARLIEST => return Ok(TimePoint { offset: bounds.log_start, ..NONE }),
        EARLIEST_LOCAL if version >= 8 => return Ok(TimePoint { offset: bounds.log_start, ..NONE }),
        LATEST_TIERED if version >= 9 => return Ok(NONE),
        MAX_TIMESTAMP if version >= 7 => broker.log.max_time(partition).await,
        time @ 0.. => broker.log.find_time(partition, time).await,
        _ => return Err(ErrorCode::UNSUPPORTED_VERSION),
    };
    found.map(|found| found.unwrap_or(NONE)).map_err(|error| refuse_read(&error))
}
