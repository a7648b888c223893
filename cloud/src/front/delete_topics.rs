//! DeleteTopics: by name, from v6 on by id as well (KIP-516). A topic asked for twice is refused the second time.

use std::collections::HashSet;

use kafka_wire::delete_topics::{DeletableTopicResult, DeleteTopicState, DeleteTopicsRequest, DeleteTopicsResponse};
use kafka_wire::{ErrorCode, Uuid};
use shared::name::TopicId;

use super::{Broker, RequestContext};
use crate::catalogue::CatalogueError;
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
    let mut seen = HashSet::new();
    let mut responses = Vec::with_capacity(asked.len());
    for topic in asked {
        responses.push(delete(broker, topic, &mut seen).await);
    }
    DeleteTopicsResponse { responses, ..Default::default() }
}

async fn delete(broker: &Broker, asked: DeleteTopicState, seen: &mut HashSet<TopicId>) -> DeletableTopicResult {
    let refused = |error_code, text: String| DeletableTopicResult {
        name: asked.name.clone(),
        topic_id: asked.topic_id,
        error_code,
        error_message: Some(text),
    };
    let topic: Result<Topic, CatalogueError> = match (&asked.name, asked.topic_id.is_zero()) {
        (Some(name), true) => broker.catalogue.topic(name).ok_or_else(|| CatalogueError::UnknownTopic(name.clone())),
        (None, false) => {
            let id = TopicId(asked.topic_id.0);
            broker.catalogue.topic_by_id(id).ok_or(CatalogueError::UnknownTopicId(id))
        }
        _ => return refused(ErrorCode::INVALID_REQUEST, "expected either a name or an id".to_owned()),
    };
    let topic = match topic {
        Ok(topic) => topic,
        Err(error) => return refused(ErrorCode(error.code()), error.to_string()),
    };
    if !seen.insert(topic.id) {
        return refused(ErrorCode::INVALID_REQUEST, "the topic is named more than once in the request".to_owned());
    }
    match broker.catalogue.delete(topic.id).await {
        Ok(topic) => DeletableTopicResult {
            name: Some(topic.name.to_string()),
            topic_id: Uuid(topic.id.0),
            error_code: ErrorCode::NONE,
            error_message: None,
        },
        Err(error) => refused(ErrorCode(error.code()), error.to_string()),
    }
}
