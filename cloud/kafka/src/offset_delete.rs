//! OffsetDelete (key 47): positions of a group to forget (KIP-496). Only v0, never flexible.

use crate::ErrorCode;

message! {
    /// Which positions.
    pub struct OffsetDeleteRequest [OffsetDelete, 0..=0, flexible 1..] {
        group_id: String [0..];
        topics: Vec<OffsetDeleteRequestTopic> [0..];
    }

    /// One topic.
    pub struct OffsetDeleteRequestTopic {
        name: String [0..];
        partitions: Vec<OffsetDeleteRequestPartition> [0..];
    }

    /// One partition.
    pub struct OffsetDeleteRequestPartition {
        partition_index: i32 [0..];
    }

    /// What became of them.
    pub struct OffsetDeleteResponse [OffsetDelete, 0..=0, flexible 1..] {
        error_code: ErrorCode [0..];
        throttle_time_ms: i32 [0..];
        topics: Vec<OffsetDeleteResponseTopic> [0..];
    }

    /// One topic.
    pub struct OffsetDeleteResponseTopic {
        name: String [0..];
        partitions: Vec<OffsetDeleteResponsePartition> [0..];
    }

    /// One partition.
    pub struct OffsetDeleteResponsePartition {
        partition_index: i32 [0..];
        error_code: ErrorCode [0..];
    }
}
