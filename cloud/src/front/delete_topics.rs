//! DeleteTopics: by name, from v6 on by id as well (KIP-516). A topic asked for twice is refused the second time.
//!
//! What is not deleted in all its shards when the request's time-out is over is answered REQUEST_TIMED_OUT; what
//! has begun goes on.

use std::collections::HashSet;

use futures_util::future::join_all;
use kafka_wire::delete_topics::{DeletableTopicResult, DeleteTopicState, DeleteTopicsRequest, DeleteTopicsResponse};
use kafka_wire::{ErrorCode, Uuid};
use shared::name::TopicId;
use tokio::time::Instant;

use super::{Broker, RequestContext, patience};
use crate::catalogue::{CatalogueError, within};
use crate::state::Topic;

const STATES_VERSION_MIN: i16 = 6;

/// Answers DeleteTopics.
pub async fn handle(broker: &Broker, context: &RequestContext, request: DeleteTopicsRequest) -> DeleteTopicsResponse {
    let asked = if context.api_version >= STATES_VERSION_MIN {
        request.topics
    } else {
        let named = |name| DeleteTopicState { name: Some(name), topic_id: Uuid::ZERO };
        request.topic_names.into_iter().map(named).collect()
    };
    let deadline = Instant::now() + patience(request.timeout_ms);
    let mut seen = HashSet::new();
    let answers = asked.into_iter().map(|asked| {
        let found = find(broker, &asked, &mut seen);
        async move {
            let deleted = match found {
                Ok(topic) => within(deadline, broker.catalogue.delete(topic.id)).await.map_err(refusal),
                Err(refusal) => Err(refusal),
            };
            match deleted {
                Ok(topic) => DeletableTopicResult {
                    name: Some(topic.name.to_string()),
                    topic_id: Uuid(topic.id.0),
                    error_code: ErrorCode::NONE,
                    error_message: None,
                },
                Err((error_code, text)) => DeletableTopicResult {
                    name: asked.name,
                    topic_id: asked.topic_id,
                    error_code,
                    error_message: Some(text),
                },
            }
        }
    });
    DeleteTopicsResponse { responses: join_all(answers).await, ..Default::default() }
}

fn refusal(error: CatalogueError) -> (ErrorCode, String) {
    (ErrorCode(error.code()), error.to_string())
}

fn find(broker: &Broker, asked: &DeleteTopicState, seen: &mut HashSet<TopicId>) -> Result<Topic, (ErrorCode, String)> {
    let topic = match (&asked.name, asked.topic_id.is_zero()) {
        (Some(name), true) => broker.catalogue.topic(name).ok_or_else(|| CatalogueError::UnknownTopic(name.clone())),
        (None, false) => {
            let id = TopicId(asked.topic_id.0);
            broker.catalogue.topic_by_id(id).ok_or(CatalogueError::UnknownTopicId(id))
        }
        _ => return Err((ErrorCode::INVALID_REQUEST, "expected either a name or an id".to_owned())),
    };
    let topic = topic.map_err(refusal)?;
    if !seen.insert(topic.id) {
        return Err((ErrorCode::INVALID_REQUEST, "the topic is named more than once in the request".to_owned()));
    }
    Ok(topic)
}
