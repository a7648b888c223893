//! Fetch (key 1): record batches from given offsets on, with a long poll.
//!
//! - v5 adds the log start offset. v7 sessions (KIP-227). v9 the leader epoch (KIP-320). v10 zstd. v11 the client's rack.
//! - v12 is flexible and reports diverging epochs (KIP-595). v13 names topics by id (KIP-516).
//! - v15 moves the replica id into a tag (KIP-903). v16 can name other leaders (KIP-951). v17 adds a replica's directory.

use crate::{ErrorCode, Records, Uuid};

message! {
    /// Where to read, and how long to wait for how much.
    pub struct FetchRequest [Fetch, 4..=17, flexible 12..] {
        /// -1 for consumers.
        replica_id: i32 [0..=14] = -1;
        max_wait_ms: i32 [0..];
        min_bytes: i32 [0..];
        max_bytes: i32 [3..] = i32::MAX;
        /// 0: everything below the high watermark, 1: only what is committed.
        isolation_level: i8 [4..];
        session_id: i32 [7..];
        session_epoch: i32 [7..] = -1;
        topics: Vec<FetchTopic> [0..];
        forgotten_topics_data: Vec<ForgottenTopic> [7..];
        rack_id: String [11..];
    } tagged {
        0 cluster_id: Option<String> [12..];
        1 replica_state: ReplicaState [15..];
    }

    /// A replica that fetches; consumers say -1.
    pub struct ReplicaState {
        replica_id: i32 [15..] = -1;
        replica_epoch: i64 [15..] = -1;
    }

    /// One topic.
    pub struct FetchTopic {
        topic: String [0..=12];
        topic_id: Uuid [13..];
        partitions: Vec<FetchPartition> [0..];
    }

    /// One partition.
    pub struct FetchPartition {
        partition: i32 [0..];
        current_leader_epoch: i32 [9..] = -1;
        fetch_offset: i64 [0..];
        last_fetched_epoch: i32 [12..] = -1;
        log_start_offset: i64 [5..] = -1;
        partition_max_bytes: i32 [0..];
    } tagged {
        0 replica_directory_id: Uuid [17..];
    }

    /// Partitions that leave a session.
    pub struct ForgottenTopic {
        topic: String [7..=12];
        topic_id: Uuid [13..];
        partitions: Vec<i32> [7..];
    }

    /// Batches.
    pub struct FetchResponse [Fetch, 4..=17, flexible 12..] {
        throttle_time_ms: i32 [1..];
        error_code: ErrorCode [7..];
        session_id: i32 [7..];
        responses: Vec<FetchableTopicResponse> [0..];
    } tagged {
        0 node_endpoints: Vec<NodeEndpoint> [16..];
    }

    /// One topic.
    pub struct FetchableTopicResponse {
        topic: String [0..=12];
        topic_id: Uuid [13..];
        partitions: Vec<PartitionData> [0..];
    }

    /// One partition.
    pub struct PartitionData {
        partition_index: i32 [0..];
        error_code: ErrorCode [0..];
        high_watermark: i64 [0..];
        last_stable_offset: i64 [4..] = -1;
        log_start_offset: i64 [5..] = -1;
        aborted_transactions: Option<Vec<AbortedTransaction>> [4..];
        preferred_read_replica: i32 [11..] = -1;
        records: Option<Records> [0..];
    } tagged {
        0 diverging_epoch: EpochEndOffset [12..];
        1 current_leader: LeaderIdAndEpoch [12..];
        2 snapshot_id: SnapshotId [12..];
    }

    /// Where the largest epoch that the broker knows and the client asked about ends.
    pub struct EpochEndOffset {
        epoch: i32 [12..] = -1;
        end_offset: i64 [12..] = -1;
    }

    /// Who leads the partition now.
    pub struct LeaderIdAndEpoch {
        leader_id: i32 [12..] = -1;
        leader_epoch: i32 [12..] = -1;
    }

    /// A snapshot to read instead; metadata quorum only.
    pub struct SnapshotId {
        end_offset: i64 [0..] = -1;
        epoch: i32 [0..] = -1;
    }

    /// A transaction whose records a read-committed consumer drops.
    pub struct AbortedTransaction {
        producer_id: i64 [4..];
        first_offset: i64 [4..];
    }

    /// Where a leader is.
    pub struct NodeEndpoint {
        node_id: i32 [16..];
        host: String [16..];
        port: i32 [16..];
        rack: Option<String> [16..];
    }
}
