//! IncrementalAlterConfigs (key 44): changes settings one by one (KIP-339). v1 is flexible.

use crate::ErrorCode;

message! {
    /// Whose settings.
    pub struct IncrementalAlterConfigsRequest [IncrementalAlterConfigs, 0..=1, flexible 1..] {
        resources: Vec<IncrementalAlterConfigsResource> [0..];
        validate_only: bool [0..];
    }

    /// One topic or broker, and what changes on it.
    pub struct IncrementalAlterConfigsResource {
        /// 2: topic, 4: broker.
        resource_type: i8 [0..];
        resource_name: String [0..];
        configs: Vec<IncrementalAlterableConfig> [0..];
    }

    /// One change.
    pub struct IncrementalAlterableConfig {
        name: String [0..];
        /// 0: set, 1: delete, 2: append to a list, 3: subtract from a list.
        config_operation: i8 [0..];
        value: Option<String> [0..];
    }

    /// What became of it.
    pub struct IncrementalAlterConfigsResponse [IncrementalAlterConfigs, 0..=1, flexible 1..] {
        throttle_time_ms: i32 [0..];
        responses: Vec<IncrementalAlterConfigsResourceResponse> [0..];
    }

    /// One resource.
    pub struct IncrementalAlterConfigsResourceResponse {
        error_code: ErrorCode [0..];
        error_message: Option<String> [0..];
        resource_type: i8 [0..];
        resource_name: String [0..];
    }
}
