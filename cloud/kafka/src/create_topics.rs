//! CreateTopics (key 19).
//!
//! - v4 takes -1 for partitions and replication factor: the broker's defaults (KIP-464). v5 is flexible and answers the
//!   settings the topic got (KIP-525). v6 may answer THROTTLING_QUOTA_EXCEEDED. v7 answers the topic's id.

use crate::{ErrorCode, Uuid};

message! {
    /// Topics to make.
    pub struct CreateTopicsRequest [CreateTopics, 2..=7, flexible 5..] {
        topics: Vec<CreatableTopic> [0..];
        timeout_ms: i32 [0..] = 60_000;
        validate_only: bool [1..];
    }

    /// One topic.
    pub struct CreatableTopic {
        name: String [0..];
        num_partitions: i32 [0..];
        replication_factor: i16 [0..];
        assignments: Vec<CreatableReplicaAssignment> [0..];
        configs: Vec<CreatableTopicConfig> [0..];
    }

    /// Where a partition's replicas should be.
    pub struct CreatableReplicaAssignment {
        partition_index: i32 [0..];
        broker_ids: Vec<i32> [0..];
    }

    /// One setting.
    pub struct CreatableTopicConfig {
        name: String [0..];
        value: Option<String> [0..];
    }

    /// What became of them.
    pub struct CreateTopicsResponse [CreateTopics, 2..=7, flexible 5..] {
        throttle_time_ms: i32 [2..];
        topics: Vec<CreatableTopicResult> [0..];
    }

    /// One topic.
    pub struct CreatableTopicResult {
        name: String [0..];
        topic_id: Uuid [7..];
        error_code: ErrorCode [0..];
        error_message: Option<String> [1..];
        num_partitions: i32 [5..] = -1;
        replication_factor: i16 [5..] = -1;
        configs: Option<Vec<CreatableTopicConfigs>> [5..];
    } tagged {
        0 topic_config_error_code: ErrorCode [5..];
    }

    /// One setting as it is.
    pub struct CreatableTopicConfigs {
        name: String [5..];
        value: Option<String> [5..];
        read_only: bool [5..];
        config_source: i8 [5..] = -1;
        is_sensitive: bool [5..];
    }
}
