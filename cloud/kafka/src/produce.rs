//! Produce (key 0): record batches to append.
//!
//! - v3 is the first with RecordBatch v2 and the transactional id; v0 to v2 carry older formats
//!   in the same request without that field.
//! - v5 adds the log start offset to the response. v7 allows zstd (KIP-110). v8 adds errors of single records (KIP-467).
//! - v9 is flexible. v10 can name the new leader (KIP-951). v11 is v10 with TRANSACTION_ABORTABLE as a possible error.

use bytes::Bytes;

use crate::ErrorCode;

message! {
    /// Batches, by topic and partition.
    pub struct ProduceRequest [Produce, 0..=11, flexible 9..] {
        transactional_id: Option<String> [3..];
        /// 0: no answer at all, 1: the leader has it, -1: all in-sync replicas have it.
        acks: i16 [0..];
        timeout_ms: i32 [0..];
        topic_data: Vec<TopicProduceData> [0..];
    }

    /// One topic.
    pub struct TopicProduceData {
        name: String [0..];
        partition_data: Vec<PartitionProduceData> [0..];
    }

    /// One partition.
    pub struct PartitionProduceData {
        index: i32 [0..];
        /// One batch (more than one is refused from v3 on).
        records: Option<Bytes> [0..];
    }

    /// What became of them.
    pub struct ProduceResponse [Produce, 0..=11, flexible 9..] {
        responses: Vec<TopicProduceResponse> [0..];
        throttle_time_ms: i32 [1..];
    } tagged {
        0 node_endpoints: Vec<NodeEndpoint> [10..];
    }

    /// One topic.
    pub struct TopicProduceResponse {
        name: String [0..];
        partition_responses: Vec<PartitionProduceResponse> [0..];
    }

    /// One partition.
    pub struct PartitionProduceResponse {
        index: i32 [0..];
        error_code: ErrorCode [0..];
        /// Offset of the first record.
        base_offset: i64 [0..];
        /// When the broker set the timestamps, or -1.
        log_append_time_ms: i64 [2..] = -1;
        log_start_offset: i64 [5..] = -1;
        record_errors: Vec<BatchIndexAndErrorMessage> [8..];
        error_message: Option<String> [8..];
    } tagged {
        0 current_leader: ProduceLeader [10..];
    }

    /// A record that was refused.
    pub struct BatchIndexAndErrorMessage {
        batch_index: i32 [8..];
        batch_index_error_message: Option<String> [8..];
    }

    /// Who leads the partition now.
    pub struct ProduceLeader {
        leader_id: i32 [10..] = -1;
        leader_epoch: i32 [10..] = -1;
    }

    /// Where that leader is.
    pub struct NodeEndpoint {
        node_id: i32 [10..];
        host: String [10..];
        port: i32 [10..];
        rack: Option<String> [10..];
    }
}
