//! OffsetForLeaderEpoch (key 23): where leader epochs end, so that a client notices a log that was cut (KIP-320).
//!
//! - v2 adds the epoch the client believes current. v3 the replica id. v4 is flexible.

use crate::ErrorCode;

message! {
    /// Epochs to find.
    pub struct OffsetForLeaderEpochRequest [OffsetForLeaderEpoch, 2..=4, flexible 4..] {
        /// -2: a consumer of an old version; -1: a consumer.
        replica_id: i32 [3..] = -2;
        topics: Vec<OffsetForLeaderTopic> [0..];
    }

    /// One topic.
    pub struct OffsetForLeaderTopic {
        topic: String [0..];
        partitions: Vec<OffsetForLeaderPartition> [0..];
    }

    /// One partition.
    pub struct OffsetForLeaderPartition {
        partition: i32 [0..];
        current_leader_epoch: i32 [2..] = -1;
        leader_epoch: i32 [0..];
    }

    /// Their ends.
    pub struct OffsetForLeaderEpochResponse [OffsetForLeaderEpoch, 2..=4, flexible 4..] {
        throttle_time_ms: i32 [2..];
        topics: Vec<OffsetForLeaderTopicResult> [0..];
    }

    /// One topic.
    pub struct OffsetForLeaderTopicResult {
        topic: String [0..];
        partitions: Vec<EpochEndOffset> [0..];
    }

    /// One partition.
    pub struct EpochEndOffset {
        error_code: ErrorCode [0..];
        partition: i32 [0..];
        leader_epoch: i32 [1..] = -1;
        end_offset: i64 [0..] = -1;
    }
}
