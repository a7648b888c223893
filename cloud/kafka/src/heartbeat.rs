//! Heartbeat (key 12): a member of a classic group lives.
//!
//! - v3 static members (KIP-345). v4 is flexible.

use crate::ErrorCode;

message! {
    /// A sign of life.
    pub struct HeartbeatRequest [Heartbeat, 0..=4, flexible 4..] {
        group_id: String [0..];
        generation_id: i32 [0..];
        member_id: String [0..];
        group_instance_id: Option<String> [3..];
    }

    /// What the group wants of it.
    pub struct HeartbeatResponse [Heartbeat, 0..=4, flexible 4..] {
        throttle_time_ms: i32 [1..];
        error_code: ErrorCode [0..];
    }
}
