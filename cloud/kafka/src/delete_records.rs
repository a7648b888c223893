//! DeleteRecords (key 21): moves log starts up. v2 is flexible.

use crate::ErrorCode;

message! {
    /// Up to where.
    pub struct DeleteRecordsRequest [DeleteRecords, 0..=2, flexible 2..] {
        topics: Vec<DeleteRecordsTopic> [0..];
        timeout_ms: i32 [0..];
    }

    /// One topic.
    pub struct DeleteRecordsTopic {
        name: String [0..];
        partitions: Vec<DeleteRecordsPartition> [0..];
    }

    /// One partition; offset -1 is the high watermark.
    pub struct DeleteRecordsPartition {
        partition_index: i32 [0..];
        offset: i64 [0..];
    }

    /// Where the logs start now.
    pub struct DeleteRecordsResponse [DeleteRecords, 0..=2, flexible 2..] {
        throttle_time_ms: i32 [0..];
        topics: Vec<DeleteRecordsTopicResult> [0..];
    }

    /// One topic.
    pub struct DeleteRecordsTopicResult {
        name: String [0..];
        partitions: Vec<DeleteRecordsPartitionResult> [0..];
    }

    /// One partition.
    pub struct DeleteRecordsPartitionResult {
        partition_index: i32 [0..];
        low_watermark: i64 [0..];
        error_code: ErrorCode [0..];
    }
}
