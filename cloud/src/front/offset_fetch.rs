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
use shared::name::{Partition, TopicId, TopicName};

use super::{Broker, RequestContext};
use crate::state::{CommittedOffset, State, coordinator_log, read_state};

const BATCHED_VERSION_MIN: i16 = 8;

/// Answers OffsetFetch.
pub async fn handle(broker: &Broker, context: &RequestContext, request: OffsetFetchRequest) -> OffsetFetchResponse {
    if context.api_version < BATCHED_VERSION_MIN {
        let topics = committed(broker, &request.group_id, request.topics);
        return OffsetFetchResponse { topics, ..Default::default() };
    }
    let mut seen = HashSet::new();
    let mut groups = Vec::with_capacity(request.groups.len());
    for group in request.groups {
        let (topics, error_code) = if seen.insert(group.group_id.clone()) {
            (committed(broker, &group.group_id, group.topics), ErrorCode::NONE)
        } else {
            (Vec::new(), ErrorCode::INVALID_REQUEST)
        };
        groups.push(OffsetFetchResponseGroup { group_id: group.group_id, topics, error_code });
    }
    OffsetFetchResponse { groups, ..Default::default() }
}

/// Topics are the catalogue's and offsets those of the group's shard: they are looked at one after the other.
fn committed(
    broker: &Broker,
    group: &str,
    asked: Option<Vec<OffsetFetchRequestTopic>>,
) -> Vec<OffsetFetchResponseTopic> {
    let log = coordinator_log(&*broker.state, group);
    match asked {
        None => {
            let committed = read_state(log, |state| all(state, group));
            read_state(&*broker.state, |state| by_topic(state, committed))
        }
        Some(asked) => {
            let asked = read_state(&*broker.state, |state| with_ids(state, asked));
            read_state(log, |state| some(state, group, asked))
        }
    }
}

fn with_ids(state: &State, asked: Vec<OffsetFetchRequestTopic>) -> Vec<(OffsetFetchRequestTopic, Option<TopicId>)> {
    let find = |topic: OffsetFetchRequestTopic| {
        let known = TopicName::parse(&topic.name).ok().and_then(|name| state.topic_named(&name));
        (topic, known.map(|known| known.id))
    };
    asked.into_iter().map(find).collect()
}

fn some(
    state: &State,
    group: &str,
    asked: Vec<(OffsetFetchRequestTopic, Option<TopicId>)>,
) -> Vec<OffsetFetchResponseTopic> {
    let mut seen = HashSet::new();
    let topic = |(topic, known): (OffsetFetchRequestTopic, Option<TopicId>)| {
        let partition = |index: i32| {
            let at = known.zip(u32::try_from(index).ok()).map(|(topic, index)| Partition { topic, index });
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

/// All that a group committed, partitions of one topic together.
fn all(state: &State, group: &str) -> Vec<(TopicId, OffsetFetchResponsePartition)> {
    let committed = state.group(group).into_iter().flat_map(|group| group.offsets.iter());
    let one = |(partition, committed): (&Partition, &CommittedOffset)| {
        Some((partition.topic, answer(i32::try_from(partition.index).ok()?, Some(committed))))
    };
    committed.filter_map(one).collect()
}

/// Under the names of topics, as far as these are there.
fn by_topic(state: &State, committed: Vec<(TopicId, OffsetFetchResponsePartition)>) -> Vec<OffsetFetchResponseTopic> {
    let mut topics: BTreeMap<&TopicName, Vec<OffsetFetchResponsePartition>> = BTreeMap::new();
    for (id, partition) in committed {
        if let Some(topic) = state.topic(id) {
            topics.entry(&topic.name).or_default().push(partition);
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
