//! OffsetFetch: what groups have committed, -1 where they have not.
//!
//! - Null topics (v2) ask for all. Up to v7 one group, from v8 on several (KIP-709).
//! - `require_stable` (v7) has nothing to wait for: offsets are never pending in a transaction.
//! - Member id and epoch (v9) belong to another group protocol and are not looked at.
//! - A group or partition named twice is refused the second time, or a small request could ask for a boundless answer.

use std::collections::{BTreeMap, HashSet};

use kafka_wire::ErrorCode;
use kafka_wire::offset_fetch::{
    OffsetFetchRequest, OffsetFetchRequestTopic, OffsetFetchResponse, OffsetFetchResponseGroup,
    OffsetFetchResponsePartition, OffsetFetchResponseTopic,
};
use shared::name::{Partition, TopicName};

use super::{Broker, RequestContext};
use crate::state::{CommittedOffset, State, read_state};

const BATCHED_VERSION_MIN: i16 = 8;

/// Answers OffsetFetch.
pub async fn handle(broker: &Broker, context: &RequestContext, request: OffsetFetchRequest) -> OffsetFetchResponse {
    if context.api_version < BATCHED_VERSION_MIN {
        let topics = read_state(&*broker.state, |state| committed(state, &request.group_id, request.topics));
        return OffsetFetchResponse { topics, ..Default::default() };
    }
    let mut seen = HashSet::new();
    let mut groups = Vec::with_capacity(request.groups.len());
    for group in request.groups {
        let (topics, error_code) = if seen.insert(group.group_id.clone()) {
            let topics = read_state(&*broker.state, |state| committed(state, &group.group_id, group.topics));
            (topics, ErrorCode::NONE)
        } else {
            (Vec::new(), ErrorCode::INVALID_REQUEST)
        };
        groups.push(OffsetFetchResponseGroup { group_id: group.group_id, topics, error_code });
    }
    OffsetFetchResponse { groups, ..Default::default() }
}

fn committed(state: &State, group: &str, asked: Option<Vec<OffsetFetchRequestTopic>>) -> Vec<OffsetFetchResponseTopic> {
    let Some(asked) = asked else { return all(state, group) };
    let mut seen = HashSet::new();
    let topic = |topic: OffsetFetchRequestTopic| {
        let known = TopicName::parse(&topic.name).ok().and_then(|name| state.topic_named(&name));
        let partition = |index: i32| {
            let at = known.zip(u32::try_from(index).ok());
            let at = at.map(|(topic, number)| Partition { topic: topic.id, index: number });
            if at.is_some_and(|at| !seen.insert(at)) {
                return OffsetFetchResponsePartition { error_code: ErrorCode::INVALID_REQUEST, ..answer(index, None) };
            }
            answer(index, at.and_then(|at| state.committed(group, at)))
        };
        let partitions = topic.partition_indexes.into_iter().map(partition).collect();
        OffsetFetchResponseTopic { name: topic.name, partitions }
    };
    asked.into_iter().map(topic).collect()
}

fn all(state: &State, group: &str) -> Vec<OffsetFetchResponseTopic> {
    let mut topics: BTreeMap<&TopicName, Vec<OffsetFetchResponsePartition>> = BTreeMap::new();
    for (partition, committed) in state.group(group).into_iter().flat_map(|group| &group.offsets) {
        let index = i32::try_from(partition.index).ok();
        if let (Some(topic), Some(index)) = (state.topic(partition.topic), index) {
            topics.entry(&topic.name).or_default().push(answer(index, Some(committed)));
        }
    }
    let topic = |(name, partitions): (&TopicName, _)| OffsetFetchResponseTopic { name: name.to_string(), partitions };
    topics.into_iter().map(topic).collect()
}

fn answer(partition_index: i32, committed: Option<&CommittedOffset>) -> OffsetFetchResponsePartition {
    OffsetFetchResponsePartition {
        partition_index,
        committed_offset: committed.map_or(-1, |committed| committed.offset),
        committed_leader_epoch: committed.map_or(-1, |committed| committed.leader_epoch),
        metadata: Some(committed.map_or_else(String::new, |committed| committed.metadata.clone())),
        error_code: ErrorCode::NONE,
    }
}
