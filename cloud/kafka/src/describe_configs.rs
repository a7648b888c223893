//! DescribeConfigs (key 32): settings of topics and brokers, with where each comes from.
//!
//! - v1 adds sources and synonyms. v3 documentation and types (KIP-569). v4 is flexible.

use crate::ErrorCode;

message! {
    /// Whose settings.
    pub struct DescribeConfigsRequest [DescribeConfigs, 1..=4, flexible 4..] {
        resources: Vec<DescribeConfigsResource> [0..];
        include_synonyms: bool [1..];
        include_documentation: bool [3..];
    }

    /// One topic or broker; null keys ask for all its settings.
    pub struct DescribeConfigsResource {
        /// 2: topic, 4: broker.
        resource_type: i8 [0..];
        resource_name: String [0..];
        configuration_keys: Option<Vec<String>> [0..];
    }

    /// The settings.
    pub struct DescribeConfigsResponse [DescribeConfigs, 1..=4, flexible 4..] {
        throttle_time_ms: i32 [0..];
        results: Vec<DescribeConfigsResult> [0..];
    }

    /// One resource.
    pub struct DescribeConfigsResult {
        error_code: ErrorCode [0..];
        error_message: Option<String> [0..];
        resource_type: i8 [0..];
        resource_name: String [0..];
        configs: Vec<DescribeConfigsResourceResult> [0..];
    }

    /// One setting.
    pub struct DescribeConfigsResourceResult {
        name: String [0..];
        value: Option<String> [0..];
        read_only: bool [0..];
        /// 1: of the topic, 4: static of the broker, 5: default.
        config_source: i8 [1..] = -1;
        is_sensitive: bool [0..];
        synonyms: Vec<DescribeConfigsSynonym> [1..];
        /// 1 boolean, 2 string, 3 int, 4 short, 5 long, 6 double, 7 list, 8 class, 9 password.
        config_type: i8 [3..];
        documentation: Option<String> [3..];
    }

    /// What the setting would be without the source above.
    pub struct DescribeConfigsSynonym {
        name: String [1..];
        value: Option<String> [1..];
        source: i8 [1..];
    }
}
