//! SyncGroup (key 14): the leader hands in the assignment, each member gets its part.
//!
//! - v3 static members (KIP-345). v4 is flexible. v5 names protocol type and name (KIP-559).

use bytes::Bytes;

use crate::ErrorCode;

message! {
    /// The leader's assignment, or a member's wish for its own.
    pub struct SyncGroupRequest [SyncGroup, 0..=5, flexible 4..] {
        group_id: String [0..];
        generation_id: i32 [0..];
        member_id: String [0..];
        group_instance_id: Option<String> [3..];
        protocol_type: Option<String> [5..];
        protocol_name: Option<String> [5..];
        assignments: Vec<SyncGroupRequestAssignment> [0..];
    }

    /// One member's part.
    pub struct SyncGroupRequestAssignment {
        member_id: String [0..];
        assignment: Bytes [0..];
    }

    /// The member's own part.
    pub struct SyncGroupResponse [SyncGroup, 0..=5, flexible 4..] {
        throttle_time_ms: i32 [1..];
        error_code: ErrorCode [0..];
        protocol_type: Option<String> [5..];
        protocol_name: Option<String> [5..];
        assignment: Bytes [0..];
    }
}
