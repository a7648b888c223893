//! DescribeGroups (key 15): classic groups in full.
//!
//! - v3 adds authorised operations (KIP-430). v4 static members. v5 is flexible. v6 adds an error message (KIP-1043).

use bytes::Bytes;

use crate::ErrorCode;

message! {
    /// Which groups.
    pub struct DescribeGroupsRequest [DescribeGroups, 0..=6, flexible 5..] {
        groups: Vec<String> [0..];
        include_authorized_operations: bool [3..];
    }

    /// The groups.
    pub struct DescribeGroupsResponse [DescribeGroups, 0..=6, flexible 5..] {
        throttle_time_ms: i32 [1..];
        groups: Vec<DescribedGroup> [0..];
    }

    /// One group.
    pub struct DescribedGroup {
        error_code: ErrorCode [0..];
        error_message: Option<String> [6..];
        group_id: String [0..];
        group_state: String [0..];
        protocol_type: String [0..];
        protocol_data: String [0..];
        members: Vec<DescribedGroupMember> [0..];
        authorized_operations: i32 [3..] = crate::metadata::OPERATIONS_UNKNOWN;
    }

    /// One member.
    pub struct DescribedGroupMember {
        member_id: String [0..];
        group_instance_id: Option<String> [4..];
        client_id: String [0..];
        client_host: String [0..];
        member_metadata: Bytes [0..];
        member_assignment: Bytes [0..];
    }
}
