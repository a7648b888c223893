//! CreatePartitions: `count` is the new total. A topic named twice is refused both times.

use std::collections::HashMap;

use kafka_wire::ErrorCode;
use kafka_wire::create_partitions::{
    CreatePartitionsRequest, CreatePartitionsResponse, CreatePartitionsTopic, CreatePartitionsTopicResult,
};

use super::{Broker, RequestContext};

/// Answers CreatePartitions.
pub async fn handle(broker: &Broker, _: &RequestContext, request: CreatePartitionsRequest) -> CreatePartitionsResponse {
    let mut named: HashMap<String, usize> = HashMap::new();
    for topic in &request.topics {
        *named.entry(topic.name.clone()).or_default() += 1;
    }
    let mut results = Vec::with_capacity(request.topics.len());
    for topic in request.topics {
        let twice = named.get(&topic.name).is_some_and(|times| *times > 1);
        let grown = if twice {
            Err((ErrorCode::INVALID_REQUEST, "the topic is named more than once in the request".to_owned()))
        } else {
            grow(broker, &topic, request.validate_only).await
        };
        let (error_code, error_message) = match grown {
            Ok(()) => (ErrorCode::NONE, None),
            Err((code, text)) => (code, Some(text)),
        };
        results.push(CreatePartitionsTopicResult { name: topic.name, error_code, error_message });
    }
    CreatePartitionsResponse { results, ..Default::default() }
}

async fn grow(broker: &Broker, topic: &CreatePartitionsTopic, validate_only: bool) -> Result<(), (ErrorCode, String)> {
    if let (Some(assignments), Some(known)) = (&topic.assignments, broker.catalogue.topic(&topic.name)) {
        let added = i64::from(topic.count) - i64::from(known.partitions);
        let node_id = broker.node_id;
        let here = assignments.iter().all(|one| one.broker_ids == [node_id]);
        if added > 0 && (!here || assignments.len() as i64 != added) {
            let text = format!("expected the one replica [{node_id}] for each of {added} new partitions");
            return Err((ErrorCode::INVALID_REPLICA_ASSIGNMENT, text));
        }
    }
    let grown = broker.catalogue.add_partitions(&topic.name, topic.count, validate_only).await;
    grown.map_err(|error| (ErrorCode(error.code()), error.to_string()))
}
