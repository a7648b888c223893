//! OffsetForLeaderEpoch: where an epoch ended, so that a consumer notices that the log it read from was cut (KIP-320).
//!
//! An epoch the log does not know is answered -1 and -1, which clients take for "cannot tell".

use kafka_wire::ErrorCode;
use kafka_wire::offset_for_leader_epoch::{
    EpochEndOffset, OffsetForLeaderEpochRequest, OffsetForLeaderEpochResponse, OffsetForLeaderPartition,
    OffsetForLeaderTopicResult,
};
use shared::log::EpochEnd;

use super::fetch::{check_leader_epoch, refuse_read};
use super::{Broker, RequestContext, Route};

/// Answers an OffsetForLeaderEpoch.
pub async fn handle(
    broker: &Broker,
    _: &RequestContext,
    request: OffsetForLeaderEpochRequest,
) -> OffsetForLeaderEpochResponse {
    let routes = broker.routes_named(request.topics.iter().map(|topic| &topic.topic[..]));
    let topics = request.topics.into_iter().zip(routes).map(|(topic, route)| {
        let partitions = topic.partitions.iter().map(|asked| {
            let end = find(broker, route.as_ref(), asked);
            let error_code = end.err().unwrap_or_default();
            let (leader_epoch, end_offset) = end.ok().flatten().map_or((-1, -1), |end| (end.epoch, end.end));
            EpochEndOffset { error_code, partition: asked.partition, leader_epoch, end_offset }
        });
        OffsetForLeaderTopicResult { partitions: partitions.collect(), topic: topic.topic }
    });
    OffsetForLeaderEpochResponse { topics: topics.collect(), ..Default::default() }
}

fn find(
    broker: &Broker,
    route: Option<&Route>,
    asked: &OffsetForLeaderPartition,
) -> Result<Option<EpochEnd>, ErrorCode> {
    let partition = route.and_then(|route| route.partition(asked.partition));
    let partition = partition.ok_or(ErrorCode::UNKNOWN_TOPIC_OR_PARTITION)?;
    let bounds = broker.log.bounds(partition).map_err(|error| refuse_read(&error))?;
    check_leader_epoch(asked.current_leader_epoch, bounds.leader_epoch)?;
    if asked.leader_epoch < 0 {
        return Ok(None);
    }
    broker.log.epoch_end(partition, asked.leader_epoch).map_err(|error| refuse_read(&error))
}
