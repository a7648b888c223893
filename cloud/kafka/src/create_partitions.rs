//! CreatePartitions (key 37): more partitions for topics. v2 is flexible, v3 may answer THROTTLING_QUOTA_EXCEEDED.

use crate::ErrorCode;

message! {
    /// Topics to grow.
    pub struct CreatePartitionsRequest [CreatePartitions, 0..=3, flexible 2..] {
        topics: Vec<CreatePartitionsTopic> [0..];
        timeout_ms: i32 [0..];
        validate_only: bool [0..];
    }

    /// One topic; `count` is the new total.
    pub struct CreatePartitionsTopic {
        name: String [0..];
        count: i32 [0..];
        assignments: Option<Vec<CreatePartitionsAssignment>> [0..];
    }

    /// Where one new partition's replicas should be.
    pub struct CreatePartitionsAssignment {
        broker_ids: Vec<i32> [0..];
    }

    /// What became of them.
    pub struct CreatePartitionsResponse [CreatePartitions, 0..=3, flexible 2..] {
        throttle_time_ms: i32 [0..];
        results: Vec<CreatePartitionsTopicResult> [0..];
    }

    /// One topic.
    pub struct CreatePartitionsTopicResult {
        name: String [0..];
        error_code: ErrorCode [0..];
        error_message: Option<String> [0..];
    }
}
