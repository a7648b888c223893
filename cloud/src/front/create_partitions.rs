//! CreatePartitions: `count` is the new total. A topic named twice is refused both times.
//!
//! What is not durable when the request's time-out is over is answered REQUEST_TIMED_OUT; what
//! has begun goes on.

use std::collections::HashMap;

use futures_util::future::join_all;
use kafka_wire::ErrorCode;
use kafka_wire::create_partitions::{
    CreatePartitionsRequest, CreatePartitionsResponse, CreatePartitionsTopic, CreatePartitionsTopicResult,
};
use tokio::time::Instant;

use super::{Broker, RequestContext, patience};
use crate::catalogue::within;

/// Answers CreatePartitions.
pub async fn handle(broker: &Broker, _: &RequestContext, request: CreatePartitionsRequest) -> CreatePartitionsResponse {
    let mut named: HashMap<String, usize> = HashMap::new();
    for topic in &request.topics {
        *named.entry(topic.name.clone()).or_default() += 1;
    }
    let deadline = Instant::now() + patience(request.timeout_ms);
    let answers = request.topics.into_iter().map(|topic| {
        let twice = named.get(&topic.name).is_some_and(|times| *times > 1);
        async move {
            let grown = if twice {
                Err((ErrorCode::INVALID_REQUEST, "the topic is named more than once in the request".to_owned()))
            } else {
                grow(broker, &topic, request.validate_only, deadline).await
            };
            let (error_code, error_message) = match grown {
                Ok(()) => (ErrorCode::NONE, None),
                Err((code, text)) => (code, Some(text)),
            };
            CreatePartitionsTopicResult { name: topic.name, error_code, error_message }
        }
    });
    CreatePartitionsResponse { results: join_all(answers).await, ..Default::default() }
}

async fn grow(
    broker: &Broker,
    topic: &CreatePartitionsTopic,
    validate_only: bool,
    deadline: Instant,
) -> Result<(), (ErrorCode, String)> {
    if let (Some(assignments), Some(known)) = (&topic.assignments, broker.catalogue.topic(&topic.name)) {
        let added = i64::from(topic.count) - i64::from(known.partitions);
        let node_id = broker.node_id;
        let here = assignments.iter().all(|one| one.broker_ids == [node_id]);
        if added > 0 && (!here || assignments.len() as i64 != added) {
            let text = format!("expected the one replica [{node_id}] for each of {added} new partitions");
            return Err((ErrorCode::INVALID_REPLICA_ASSIGNMENT, text));
        }
    }
    let grown = broker.catalogue.add_partitions(&topic.name, topic.count, validate_only);
    within(deadline, grown).await.map_err(|error| (ErrorCode(error.code()), error.to_string()))
}
