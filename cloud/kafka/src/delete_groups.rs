//! DeleteGroups (key 42): empty groups to remove. v2 is flexible.

use crate::ErrorCode;

message! {
    /// Which groups.
    pub struct DeleteGroupsRequest [DeleteGroups, 0..=2, flexible 2..] {
        groups_names: Vec<String> [0..];
    }

    /// What became of them.
    pub struct DeleteGroupsResponse [DeleteGroups, 0..=2, flexible 2..] {
        throttle_time_ms: i32 [0..];
        results: Vec<DeletableGroupResult> [0..];
    }

    /// One group.
    pub struct DeletableGroupResult {
        group_id: String [0..];
        error_code: ErrorCode [0..];
    }
}
