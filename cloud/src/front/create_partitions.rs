//! CreatePartitions: `count` is the new total. A topic named twice is refused both times.
//!
//! What is not durable when the request's time-out is over is answered REQUEST_TIMED_OUT; what
//! has begun goes on.

use futures_util::future::join_all;
use kafka_wire::ErrorCode;
use kafka_wire::create_partitions::{
    CreatePartitionsRequest, CreatePartitionsResponse, CreatePartitionsTopic, CreatePartitionsTopicResult,
};
use tokio::time::Instant;

use super::refused::{Refused, Repeated, outcome};
use super::{Broker, RequestContext, patience};
use crate::catalogue::within;

/// Answers CreatePartitions.
pub async fn handle(broker: &Broker, _: &RequestContext, request: CreatePartitionsRequest) -> CreatePartitionsResponse {
    let repeated = Repeated::among(request.topics.iter().map(|topic| topic.name.clone()));
    let deadline = Instant::now() + patience(request.timeout_ms);
    let answers = request.topics.into_iter().map(async |topic| {
        let grown = match repeated.check(&topic.name, "the topic") {
            Ok(()) => grow(broker, &topic, request.validate_only, deadline).await,
            refused => refused,
        };
        let (error_code, error_message) = outcome(grown);
        CreatePartitionsTopicResult { name: topic.name, error_code, error_message }
    });
    CreatePartitionsResponse { results: join_all(answers).await, ..Default::default() }
}

async fn grow(
    broker: &Broker,
    topic: &CreatePartitionsTopic,
    validate_only: bool,
    deadline: Instant,
) -> Result<(), Refused> {
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
