//! ListGroups (key 16): the groups there are.
//!
//! - v3 is flexible. v4 filters by state (KIP-518). v5 filters by type (KIP-848).

use crate::ErrorCode;

message! {
    /// A filter; an empty list lets everything through.
    pub struct ListGroupsRequest [ListGroups, 0..=5, flexible 3..] {
        states_filter: Vec<String> [4..];
        types_filter: Vec<String> [5..];
    }

    /// The groups.
    pub struct ListGroupsResponse [ListGroups, 0..=5, flexible 3..] {
        throttle_time_ms: i32 [1..];
        error_code: ErrorCode [0..];
        groups: Vec<ListedGroup> [0..];
    }

    /// One group.
    pub struct ListedGroup {
        group_id: String [0..];
        protocol_type: String [0..];
        group_state: String [4..];
        group_type: String [5..];
    }
}
