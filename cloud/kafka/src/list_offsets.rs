//! ListOffsets (key 2): offsets by time.
//!
//! - v1 answers one offset per partition. v2 adds the isolation level. v4 the leader epoch (KIP-320). v6 is flexible.
//! - Special times: -1 latest, -2 earliest; v7 -3 greatest timestamp (KIP-734); v8 -4 earliest local (KIP-405); v9 -5
//!   latest tiered (KIP-1005). v10 adds a timeout for remote reads.

use crate::ErrorCode;

message! {
    /// Times to find.
    pub struct ListOffsetsRequest [ListOffsets, 1..=10, flexible 6..] {
        replica_id: i32 [0..];
        isolation_level: i8 [2..];
        topics: Vec<ListOffsetsTopic> [0..];
        timeout_ms: i32 [10..];
    }

    /// One topic.
    pub struct ListOffsetsTopic {
        name: String [0..];
        partitions: Vec<ListOffsetsPartition> [0..];
    }

    /// One partition.
    pub struct ListOffsetsPartition {
        partition_index: i32 [0..];
        current_leader_epoch: i32 [4..] = -1;
        timestamp: i64 [0..];
    }

    /// Offsets found.
    pub struct ListOffsetsResponse [ListOffsets, 1..=10, flexible 6..] {
        throttle_time_ms: i32 [2..];
        topics: Vec<ListOffsetsTopicResponse> [0..];
    }

    /// One topic.
    pub struct ListOffsetsTopicResponse {
        name: String [0..];
        partitions: Vec<ListOffsetsPartitionResponse> [0..];
    }

    /// One partition.
    pub struct ListOffsetsPartitionResponse {
        partition_index: i32 [0..];
        error_code: ErrorCode [0..];
        timestamp: i64 [1..] = -1;
        offset: i64 [1..] = -1;
        leader_epoch: i32 [4..] = -1;
    }
}
