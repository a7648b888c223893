//! OffsetDelete: only of a group without members.
//!
//! Of a group of consumers with members every partition is answered GROUP_SUBSCRIBED_TO_TOPIC: what its members read
//! is between them, so any topic may be among it.

use std::collections::BTreeSet;

use kafka_wire::ErrorCode;
use kafka_wire::offset_delete::{
    OffsetDeleteRequest, OffsetDeleteResponse, OffsetDeleteResponsePartition, OffsetDeleteResponseTopic,
};

use super::{Broker, RequestContext};
use crate::groups::GroupError;

/// Answers OffsetDelete.
pub async fn handle(broker: &Broker, _: &RequestContext, request: OffsetDeleteRequest) -> OffsetDeleteResponse {
    let mut delete = BTreeSet::new();
    let mut topics = Vec::with_capacity(request.topics.len());
    for topic in request.topics {
        let mut partitions = Vec::with_capacity(topic.partitions.len());
        for asked in topic.partitions {
            let partition = broker.catalogue.partition(&topic.name, asked.partition_index);
            let error_code = match partition {
                Some(_) => ErrorCode::NONE,
                None => ErrorCode::UNKNOWN_TOPIC_OR_PARTITION,
            };
            delete.extend(partition);
            partitions.push(OffsetDeleteResponsePartition { partition_index: asked.partition_index, error_code });
        }
        topics.push(OffsetDeleteResponseTopic { name: topic.name, partitions });
    }
    match broker.groups.delete_offsets(&request.group_id, delete).await {
        Ok(()) => OffsetDeleteResponse { topics, ..Default::default() },
        Err(error @ GroupError::SubscribedToTopic) => {
            for partition in topics.iter_mut().flat_map(|topic| &mut topic.partitions) {
                if !partition.error_code.is_error() {
                    partition.error_code = ErrorCode(error.code());
                }
            }
            OffsetDeleteResponse { topics, ..Default::default() }
        }
        Err(error) => OffsetDeleteResponse { error_code: ErrorCode(error.code()), ..Default::default() },
    }
}
