//! DeleteTopics (key 20).
//!
//! - v1 to v5 by name. v4 is flexible. v5 adds error messages. v6 by name or by id (KIP-516).

use crate::{ErrorCode, Uuid};

message! {
    /// Topics to delete.
    pub struct DeleteTopicsRequest [DeleteTopics, 1..=6, flexible 4..] {
        topics: Vec<DeleteTopicState> [6..];
        topic_names: Vec<String> [0..=5];
        timeout_ms: i32 [0..];
    }

    /// One topic, by name or id.
    pub struct DeleteTopicState {
        name: Option<String> [6..];
        topic_id: Uuid [6..];
    }

    /// What became of them.
    pub struct DeleteTopicsResponse [DeleteTopics, 1..=6, flexible 4..] {
        throttle_time_ms: i32 [1..];
        responses: Vec<DeletableTopicResult> [0..];
    }

    /// One topic.
    pub struct DeletableTopicResult {
        name: Option<String> [0.., null 6..];
        topic_id: Uuid [6..];
        error_code: ErrorCode [0..];
        error_message: Option<String> [5..];
    }
}
