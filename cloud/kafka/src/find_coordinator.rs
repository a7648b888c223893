//! FindCoordinator (key 10): which broker coordinates a group or transactional id.
//!
//! - v1 adds the key's type. v3 is flexible. v4 asks for many keys at once (KIP-699). v5 adds TRANSACTION_ABORTABLE as a
//!   possible error, v6 share groups (key type 2).

use crate::ErrorCode;

message! {
    /// Keys to find.
    pub struct FindCoordinatorRequest [FindCoordinator, 0..=6, flexible 3..] {
        key: String [0..=3];
        /// 0: group, 1: transactional id, 2: share group.
        key_type: i8 [1..];
        coordinator_keys: Vec<String> [4..];
    }

    /// Their coordinators: in the fields themselves up to v3, in the list from v4 on.
    pub struct FindCoordinatorResponse [FindCoordinator, 0..=6, flexible 3..] {
        throttle_time_ms: i32 [1..];
        error_code: ErrorCode [0..=3];
        error_message: Option<String> [1..=3];
        node_id: i32 [0..=3];
        host: String [0..=3];
        port: i32 [0..=3];
        coordinators: Vec<Coordinator> [4..];
    }

    /// One key's coordinator.
    pub struct Coordinator {
        key: String [4..];
        node_id: i32 [4..];
        host: String [4..];
        port: i32 [4..];
        error_code: ErrorCode [4..];
        error_message: Option<String> [4..];
    }
}
