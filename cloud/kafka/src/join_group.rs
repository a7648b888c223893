//! JoinGroup (key 11): a member enters a classic group or comes back to it.
//!
//! - v1 adds the rebalance timeout. v4: a new member is first told its id (MEMBER_ID_REQUIRED, KIP-394). v5 static members
//!   (KIP-345). v6 is flexible. v7 echoes the protocol type. v8 carries a reason (KIP-800). v9: the leader may be told to
//!   leave the assignment alone (KIP-814).

use bytes::Bytes;

use crate::ErrorCode;

message! {
    /// A member and the protocols it can use.
    pub struct JoinGroupRequest [JoinGroup, 0..=9, flexible 6..] {
        group_id: String [0..];
        session_timeout_ms: i32 [0..];
        /// -1 in v0: the session timeout stands for it.
        rebalance_timeout_ms: i32 [1..] = -1;
        member_id: String [0..];
        group_instance_id: Option<String> [5..];
        protocol_type: String [0..];
        protocols: Vec<JoinGroupRequestProtocol> [0..];
        reason: Option<String> [8..];
    }

    /// One protocol, in the member's order of preference.
    pub struct JoinGroupRequestProtocol {
        name: String [0..];
        metadata: Bytes [0..];
    }

    /// The generation; the leader also gets every member's metadata.
    pub struct JoinGroupResponse [JoinGroup, 0..=9, flexible 6..] {
        throttle_time_ms: i32 [2..];
        error_code: ErrorCode [0..];
        generation_id: i32 [0..] = -1;
        protocol_type: Option<String> [7..];
        protocol_name: Option<String> [0.., null 7..];
        leader: String [0..];
        skip_assignment: bool [9..];
        member_id: String [0..];
        members: Vec<JoinGroupResponseMember> [0..];
    }

    /// One member.
    pub struct JoinGroupResponseMember {
        member_id: String [0..];
        group_instance_id: Option<String> [5..];
        metadata: Bytes [0..];
    }
}
