//! LeaveGroup (key 13): members go.
//!
//! - v0 to v2 one member; v3 on several (KIP-345). v4 is flexible. v5 carries a reason (KIP-800).

use crate::ErrorCode;

message! {
    /// Who goes.
    pub struct LeaveGroupRequest [LeaveGroup, 0..=5, flexible 4..] {
        group_id: String [0..];
        member_id: String [0..=2];
        members: Vec<MemberIdentity> [3..];
    }

    /// One member.
    pub struct MemberIdentity {
        member_id: String [3..];
        group_instance_id: Option<String> [3..];
        reason: Option<String> [5..];
    }

    /// What became of it.
    pub struct LeaveGroupResponse [LeaveGroup, 0..=5, flexible 4..] {
        throttle_time_ms: i32 [1..];
        error_code: ErrorCode [0..];
        members: Vec<MemberResponse> [3..];
    }

    /// One member.
    pub struct MemberResponse {
        member_id: String [3..];
        group_instance_id: Option<String> [3..];
        error_code: ErrorCode [3..];
    }
}
