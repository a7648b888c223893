//! CreateTopics: each topic right or wrong by itself, those that go to the same shards in one commit.
//!
//! - What is not durable when the request's time-out is over is answered REQUEST_TIMED_OUT and goes on: asked for again, it is
//!   there or is waited for.
//! - Partitions and replication factor -1 ask for the broker's defaults. There is one replica: another factor is refused.
//! - A manual assignment must name this node for each partition from 0 on.
//! - `validate_only` says what would come of it. v5 answers the settings in force, v7 the topic id.
//! - A topic named twice is refused both times.

use std::collections::BTreeMap;

use futures_util::future::join_all;
use kafka_wire::create_topics::{
    CreatableReplicaAssignment, CreatableTopic, CreatableTopicConfigs, CreatableTopicResult, CreateTopicsRequest,
    CreateTopicsResponse,
};
use kafka_wire::{ErrorCode, Uuid};
use tokio::time::Instant;

use super::refused::{Refused, Repeated};
use super::{Broker, RequestContext, patience};
use crate::catalogue::{NewTopic, configs, within};
use crate::state::Topic;

/// Answers CreateTopics.
pub async fn handle(broker: &Broker, _: &RequestContext, request: CreateTopicsRequest) -> CreateTopicsResponse {
    let repeated = Repeated::among(request.topics.iter().map(|topic| topic.name.clone()));
    let mut wanted = Vec::new();
    let mut topics: Vec<CreatableTopicResult> = Vec::with_capacity(request.topics.len());
    for topic in request.topics {
        let name = topic.name.clone();
        let once = repeated.check(&name, &format!("topic {name:?}"));
        match once.and_then(|()| check(broker, topic)) {
            Ok(new) => {
                wanted.push(new);
                topics.push(CreatableTopicResult { name, ..Default::default() });
            }
            Err(why) => topics.push(refused(name, why)),
        }
    }
    let deadline = Instant::now() + patience(request.timeout_ms);
    let making = broker.catalogue.create_all(wanted, request.validate_only);
    let made = join_all(making.into_iter().map(|made| within(deadline, made))).await;
    let open = topics.iter_mut().filter(|result| !result.error_code.is_error());
    for (result, made) in open.zip(made) {
        let name = std::mem::take(&mut result.name);
        *result = match made {
            Ok(topic) => created(broker, &topic, request.validate_only),
            Err(error) => refused(name, (ErrorCode(error.code()), error.to_string())),
        };
    }
    CreateTopicsResponse { topics, ..Default::default() }
}

fn check(broker: &Broker, topic: CreatableTopic) -> Result<NewTopic, Refused> {
    let partitions = match (topic.assignments.is_empty(), topic.num_partitions, topic.replication_factor) {
        (false, -1, -1) => Some(check_assignment(broker.node_id, &topic.assignments)?),
        (false, _, _) => {
            let text = "partitions or replication factor, and an assignment as well: expected one of the two";
            return Err((ErrorCode::INVALID_REQUEST, text.to_owned()));
        }
        (true, _, factor) if factor != -1 && factor != 1 => {
            let text = format!("replication factor {factor}: there is one broker, expected 1 or -1");
            return Err((ErrorCode::INVALID_REPLICATION_FACTOR, text));
        }
        (true, -1, _) => None,
        (true, partitions, _) => match u32::try_from(partitions) {
            Ok(partitions) if partitions > 0 => Some(partitions),
            _ => {
                let text = format!("{partitions} partitions: expected 1 or more, or -1 for the default");
                return Err((ErrorCode::INVALID_PARTITIONS, text));
            }
        },
    };
    let configs = topic.configs.into_iter().map(|config| (config.name, config.value)).collect();
    Ok(NewTopic { name: topic.name, partitions, configs })
}

fn check_assignment(node_id: i32, assignments: &[CreatableReplicaAssignment]) -> Result<u32, Refused> {
    let by_index: BTreeMap<i32, &[i32]> =
        assignments.iter().map(|one| (one.partition_index, one.broker_ids.as_slice())).collect();
    let consecutive = by_index.len() == assignments.len() && by_index.keys().copied().eq(0..by_index.len() as i32);
    if !consecutive || by_index.values().any(|brokers| *brokers != [node_id]) {
        let text = format!("expected each partition from 0 on once, with the one replica [{node_id}]");
        return Err((ErrorCode::INVALID_REPLICA_ASSIGNMENT, text));
    }
    Ok(by_index.len() as u32)
}

fn created(broker: &Broker, topic: &Topic, validate_only: bool) -> CreatableTopicResult {
    let entries = configs::describe(&topic.configs, broker.catalogue.settings()).into_iter();
    let configs = entries.map(|entry| CreatableTopicConfigs {
        name: entry.name.to_owned(),
        value: Some(entry.value),
        read_only: entry.read_only,
        config_source: entry.source as i8,
        is_sensitive: false,
    });
    CreatableTopicResult {
        name: topic.name.to_string(),
        // What was only judged has no id yet.
        topic_id: if validate_only { Uuid::ZERO } else { Uuid(topic.id.0) },
        num_partitions: i32::try_from(topic.partitions).unwrap_or(i32::MAX),
        replication_factor: 1,
        configs: Some(configs.collect()),
        ..Default::default()
    }
}

fn refused(name: String, (error_code, text): Refused) -> CreatableTopicResult {
    CreatableTopicResult {
        name,
        error_code,
        error_message: Some(text),
        configs: Some(Vec::new()),
        ..Default::default()
    }
}
