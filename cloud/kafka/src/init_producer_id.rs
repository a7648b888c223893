//! InitProducerId (key 22): an identity for an idempotent or transactional producer.
//!
//! - v2 is flexible. v3 lets a producer name the id and epoch it has, to have the epoch raised (KIP-360).
//! - v4 adds PRODUCER_FENCED as a possible error, v5 TRANSACTION_ABORTABLE (KIP-890); neither changes the bytes.

use crate::ErrorCode;

message! {
    /// Asks for an id.
    pub struct InitProducerIdRequest [InitProducerId, 0..=5, flexible 2..] {
        transactional_id: Option<String> [0..];
        transaction_timeout_ms: i32 [0..];
        producer_id: i64 [3..] = -1;
        producer_epoch: i16 [3..] = -1;
    }

    /// The id.
    pub struct InitProducerIdResponse [InitProducerId, 0..=5, flexible 2..] {
        throttle_time_ms: i32 [0..];
        error_code: ErrorCode [0..];
        producer_id: i64 [0..] = -1;
        producer_epoch: i16 [0..];
    }
}
