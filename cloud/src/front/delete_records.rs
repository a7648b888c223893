//! DeleteRecords: moves the log start, to the high watermark for offset -1. Answered when it is durable.

use futures_util::future::join_all;
use kafka_wire::ErrorCode;
use kafka_wire::delete_records::{
    DeleteRecordsPartition, DeleteRecordsPartitionResult, DeleteRecordsRequest, DeleteRecordsResponse,
    DeleteRecordsTopicResult,
};
use shared::log::{AppendError, ReadError, TrimError};

use super::{Broker, RequestContext};

const TO_HIGH_WATERMARK: i64 = -1;

/// Answers DeleteRecords.
pub async fn handle(broker: &Broker, _: &RequestContext, request: DeleteRecordsRequest) -> DeleteRecordsResponse {
    let mut topics = Vec::with_capacity(request.topics.len());
    for topic in request.topics {
        let trims = topic.partitions.into_iter().map(|asked| {
            let name = &topic.name;
            async move {
                let partition_index = asked.partition_index;
                let (low_watermark, error_code) = match trim(broker, name, asked).await {
                    Ok(start) => (start, ErrorCode::NONE),
                    Err(refused) => (-1, refused),
                };
                DeleteRecordsPartitionResult { partition_index, low_watermark, error_code }
            }
        });
        let partitions = join_all(trims).await;
        topics.push(DeleteRecordsTopicResult { name: topic.name, partitions });
    }
    DeleteRecordsResponse { topics, ..Default::default() }
}

async fn trim(broker: &Broker, topic: &str, asked: DeleteRecordsPartition) -> Result<i64, ErrorCode> {
    let partition = broker.catalogue.partition(topic, asked.partition_index);
    let partition = partition.ok_or(ErrorCode::UNKNOWN_TOPIC_OR_PARTITION)?;
    let before = match asked.offset {
        TO_HIGH_WATERMARK => broker.log.bounds(partition).map_err(refuse_read)?.high_watermark,
        offset if offset < 0 => return Err(ErrorCode::OFFSET_OUT_OF_RANGE),
        offset => offset,
    };
    broker.log.trim(partition, before).await.map_err(|error| match error {
        TrimError::UnknownPartition(_) => ErrorCode::UNKNOWN_TOPIC_OR_PARTITION,
        TrimError::OffsetOutOfRange { .. } => ErrorCode::OFFSET_OUT_OF_RANGE,
        TrimError::Append(AppendError::Fenced(_) | AppendError::Closed) => ErrorCode::NOT_LEADER_OR_FOLLOWER,
        TrimError::Append(_) => ErrorCode::KAFKA_STORAGE_ERROR,
    })
}

fn refuse_read(error: ReadError) -> ErrorCode {
    match error {
        ReadError::UnknownPartition(_) => ErrorCode::UNKNOWN_TOPIC_OR_PARTITION,
        ReadError::Closed => ErrorCode::NOT_LEADER_OR_FOLLOWER,
        _ => ErrorCode::KAFKA_STORAGE_ERROR,
    }
}
