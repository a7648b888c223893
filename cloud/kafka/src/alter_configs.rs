//! AlterConfigs (key 33): gives topics all their settings anew; what is left out goes back to its default. Clients of
//! today use IncrementalAlterConfigs (KIP-339). v2 is flexible.

use crate::ErrorCode;

message! {
    /// Whose settings.
    pub struct AlterConfigsRequest [AlterConfigs, 0..=2, flexible 2..] {
        resources: Vec<AlterConfigsResource> [0..];
        validate_only: bool [0..];
    }

    /// One topic or broker, and all that is set on it.
    pub struct AlterConfigsResource {
        /// 2: topic, 4: broker.
        resource_type: i8 [0..];
        resource_name: String [0..];
        configs: Vec<AlterableConfig> [0..];
    }

    /// One setting.
    pub struct AlterableConfig {
        name: String [0..];
        value: Option<String> [0..];
    }

    /// What became of it.
    pub struct AlterConfigsResponse [AlterConfigs, 0..=2, flexible 2..] {
        throttle_time_ms: i32 [0..];
        responses: Vec<AlterConfigsResourceResponse> [0..];
    }

    /// One resource.
    pub struct AlterConfigsResourceResponse {
        error_code: ErrorCode [0..];
        error_message: Option<String> [0..];
        resource_type: i8 [0..];
        resource_name: String [0..];
    }
}
