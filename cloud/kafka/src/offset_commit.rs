//! OffsetCommit (key 8): a group's positions to keep.
//!
//! - v2 to v4 may ask for a retention time of their own. v6 adds the leader epoch (KIP-320). v7 static members. v8 is
//!   flexible. v9 serves the new group protocol too (KIP-848): the same bytes, more errors.

use crate::ErrorCode;

message! {
    /// Positions.
    pub struct OffsetCommitRequest [OffsetCommit, 2..=9, flexible 8..] {
        group_id: String [0..];
        /// -1 with an empty member id: a commit from outside any membership.
        generation_id_or_member_epoch: i32 [1..] = -1;
        member_id: String [1..];
        group_instance_id: Option<String> [7..];
        retention_time_ms: i64 [2..=4] = -1;
        topics: Vec<OffsetCommitRequestTopic> [0..];
    }

    /// One topic.
    pub struct OffsetCommitRequestTopic {
        name: String [0..];
        partitions: Vec<OffsetCommitRequestPartition> [0..];
    }

    /// One partition.
    pub struct OffsetCommitRequestPartition {
        partition_index: i32 [0..];
        committed_offset: i64 [0..];
        committed_leader_epoch: i32 [6..] = -1;
        committed_metadata: Option<String> [0..];
    }

    /// What became of them.
    pub struct OffsetCommitResponse [OffsetCommit, 2..=9, flexible 8..] {
        throttle_time_ms: i32 [3..];
        topics: Vec<OffsetCommitResponseTopic> [0..];
    }

    /// One topic.
    pub struct OffsetCommitResponseTopic {
        name: String [0..];
        partitions: Vec<OffsetCommitResponsePartition> [0..];
    }

    /// One partition.
    pub struct OffsetCommitResponsePartition {
        partition_index: i32 [0..];
        error_code: ErrorCode [0..];
    }
}
