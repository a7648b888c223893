//! Metadata (key 3): brokers, topics, leaders.
//!
//! - v0: an empty list asks for all topics. From v1 on null does, and an empty list asks for none.
//! - v4 lets the client forbid making topics. v5 adds offline replicas. v7 the leader epoch. v8 authorised operations.
//! - v9 is flexible. v10 adds topic ids (KIP-516), v12 asks by them. v13 adds a top-level error (KIP-1102).
//! - v11 took the cluster's authorised operations out again (KIP-700: DescribeCluster has them).

use crate::{ErrorCode, Uuid};

/// What authorised operations are when they were not asked for or are not known.
pub const OPERATIONS_UNKNOWN: i32 = i32::MIN;

message! {
    /// Topics to describe.
    pub struct MetadataRequest [Metadata, 0..=13, flexible 9..] {
        topics: Option<Vec<MetadataRequestTopic>> [0.., null 1..];
        allow_auto_topic_creation: bool [4..] = true;
        include_cluster_authorized_operations: bool [8..=10];
        include_topic_authorized_operations: bool [8..];
    }

    /// One topic, by name or (v12) by id.
    pub struct MetadataRequestTopic {
        topic_id: Uuid [10..];
        name: Option<String> [0.., null 10..];
    }

    /// The cluster.
    pub struct MetadataResponse [Metadata, 0..=13, flexible 9..] {
        throttle_time_ms: i32 [3..];
        brokers: Vec<MetadataResponseBroker> [0..];
        cluster_id: Option<String> [2..];
        controller_id: i32 [1..] = -1;
        topics: Vec<MetadataResponseTopic> [0..];
        cluster_authorized_operations: i32 [8..=10] = OPERATIONS_UNKNOWN;
        error_code: ErrorCode [13..];
    }

    /// One broker.
    pub struct MetadataResponseBroker {
        node_id: i32 [0..];
        host: String [0..];
        port: i32 [0..];
        rack: Option<String> [1..];
    }

    /// One topic.
    pub struct MetadataResponseTopic {
        error_code: ErrorCode [0..];
        name: Option<String> [0.., null 12..];
        topic_id: Uuid [10..];
        is_internal: bool [1..];
        partitions: Vec<MetadataResponsePartition> [0..];
        topic_authorized_operations: i32 [8..] = OPERATIONS_UNKNOWN;
    }

    /// One partition.
    pub struct MetadataResponsePartition {
        error_code: ErrorCode [0..];
        partition_index: i32 [0..];
        leader_id: i32 [0..];
        leader_epoch: i32 [7..] = -1;
        replica_nodes: Vec<i32> [0..];
        isr_nodes: Vec<i32> [0..];
        offline_replicas: Vec<i32> [5..];
    }
}
