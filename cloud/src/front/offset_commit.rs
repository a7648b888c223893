//! OffsetCommit: answered when the positions are durable.
//!
//! - Generation -1 without a member is a simple commit, good while the group has no members: Flink, Spark and tools
//!   that move offsets commit so.
//! - A partition that does not exist or metadata that is too long is refused by itself; an error of the group is given
//!   to all the others.
//! - `retention_time_ms` (v2 to v4) is not looked at: offsets are kept as KIP-211 says, whatever the client.

use kafka_wire::ErrorCode;
use kafka_wire::offset_commit::{
    OffsetCommitRequest, OffsetCommitRequestPartition, OffsetCommitResponse, OffsetCommitResponsePartition,
    OffsetCommitResponseTopic,
};
use shared::name::Partition;

use super::{Broker, RequestContext};
use crate::groups::OffsetCommit;
use crate::state::Topic;

/// Answers OffsetCommit.
pub async fn handle(broker: &Broker, _: &RequestContext, request: OffsetCommitRequest) -> OffsetCommitResponse {
    let mut commits = Vec::new();
    let mut topics = Vec::with_capacity(request.topics.len());
    for topic in request.topics {
        let known = broker.catalogue.topic(&topic.name);
        let mut partitions = Vec::with_capacity(topic.partitions.len());
        for asked in topic.partitions {
            let partition_index = asked.partition_index;
            let error_code = match check(broker, known.as_ref(), asked) {
                Ok(commit) => {
                    commits.push(commit);
                    ErrorCode::NONE
                }
                Err(refused) => refused,
            };
            partitions.push(OffsetCommitResponsePartition { partition_index, error_code });
        }
        topics.push(OffsetCommitResponseTopic { name: topic.name, partitions });
    }
    let instance = request.group_instance_id.as_deref();
    let generation = request.generation_id_or_member_epoch;
    let stored = broker.groups.commit_offsets(&request.group_id, &request.member_id, instance, generation, commits);
    if let Err(error) = stored.await {
        for partition in topics.iter_mut().flat_map(|topic| &mut topic.partitions) {
            if !partition.error_code.is_error() {
                partition.error_code = ErrorCode(error.code());
            }
        }
    }
    OffsetCommitResponse { topics, ..Default::default() }
}

fn check(
    broker: &Broker,
    topic: Option<&Topic>,
    asked: OffsetCommitRequestPartition,
) -> Result<OffsetCommit, ErrorCode> {
    let topic = topic.ok_or(ErrorCode::UNKNOWN_TOPIC_OR_PARTITION)?;
    let index = u32::try_from(asked.partition_index).ok().filter(|index| *index < topic.partitions);
    let index = index.ok_or(ErrorCode::UNKNOWN_TOPIC_OR_PARTITION)?;
    let metadata = asked.committed_metadata.unwrap_or_default();
    if metadata.len() > broker.groups.settings().offset_metadata_bytes_max {
        return Err(ErrorCode::OFFSET_METADATA_TOO_LARGE);
    }
    if asked.committed_offset < 0 {
        return Err(ErrorCode::INVALID_REQUEST);
    }
    Ok(OffsetCommit {
        partition: Partition { topic: topic.id, index },
        offset: asked.committed_offset,
        leader_epoch: asked.committed_leader_epoch,
        metadata,
    })
}
