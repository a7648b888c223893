//! OffsetFetch (key 9): positions a group committed.
//!
//! - v1 to v7 one group; null topics (v2) ask for all. v5 adds the leader epoch. v6 is flexible. v7 can ask for stable
//!   offsets only (KIP-447). v8 asks for many groups (KIP-709). v9 adds member and epoch (KIP-848).

use crate::ErrorCode;

message! {
    /// Whose positions.
    pub struct OffsetFetchRequest [OffsetFetch, 1..=9, flexible 6..] {
        group_id: String [0..=7];
        topics: Option<Vec<OffsetFetchRequestTopic>> [0..=7, null 2..];
        groups: Vec<OffsetFetchRequestGroup> [8..];
        require_stable: bool [7..];
    }

    /// One topic, up to v7.
    pub struct OffsetFetchRequestTopic {
        name: String [0..];
        partition_indexes: Vec<i32> [0..];
    }

    /// One group, from v8 on.
    pub struct OffsetFetchRequestGroup {
        group_id: String [8..];
        member_id: Option<String> [9..];
        member_epoch: i32 [9..] = -1;
        topics: Option<Vec<OffsetFetchRequestTopic>> [8..];
    }

    /// The positions: in `topics` up to v7, in `groups` from v8 on.
    pub struct OffsetFetchResponse [OffsetFetch, 1..=9, flexible 6..] {
        throttle_time_ms: i32 [3..];
        topics: Vec<OffsetFetchResponseTopic> [0..=7];
        error_code: ErrorCode [2..=7];
        groups: Vec<OffsetFetchResponseGroup> [8..];
    }

    /// One group, from v8 on.
    pub struct OffsetFetchResponseGroup {
        group_id: String [8..];
        topics: Vec<OffsetFetchResponseTopic> [8..];
        error_code: ErrorCode [8..];
    }

    /// One topic.
    pub struct OffsetFetchResponseTopic {
        name: String [0..];
        partitions: Vec<OffsetFetchResponsePartition> [0..];
    }

    /// One partition; offset -1 where nothing was committed.
    pub struct OffsetFetchResponsePartition {
        partition_index: i32 [0..];
        committed_offset: i64 [0..];
        committed_leader_epoch: i32 [5..] = -1;
        metadata: Option<String> [0..];
        error_code: ErrorCode [0..];
    }
}
