//! ApiVersions (key 18): which APIs and versions a broker serves.
//!
//! - v1 adds throttle time. v3 is flexible and says who the client is (KIP-511) and which features there are (KIP-584).
//! - v4: features may have minimum version 0 (KIP-584); below v4 such features are left out (KAFKA-17492).
//! - The response header is v0 in every version, and an unknown version is answered in v0 with UNSUPPORTED_VERSION: the
//!   client cannot know yet what the broker understands.

use crate::ErrorCode;

message! {
    /// Asks for the versions.
    pub struct ApiVersionsRequest [ApiVersions, 0..=4, flexible 3..] {
        client_software_name: String [3..];
        client_software_version: String [3..];
    }

    /// The versions.
    pub struct ApiVersionsResponse [ApiVersions, 0..=4, flexible 3..] {
        error_code: ErrorCode [0..];
        api_keys: Vec<ApiVersion> [0..];
        throttle_time_ms: i32 [1..];
    } tagged {
        0 supported_features: Vec<SupportedFeature> [3..];
        1 finalized_features_epoch: i64 [3..] = -1;
        2 finalized_features: Vec<FinalizedFeature> [3..];
        3 zk_migration_ready: bool [3..];
    }

    /// One API.
    pub struct ApiVersion {
        api_key: i16 [0..];
        min_version: i16 [0..];
        max_version: i16 [0..];
    }

    /// A feature the broker could have.
    pub struct SupportedFeature {
        name: String [3..];
        min_version: i16 [3..];
        max_version: i16 [3..];
    }

    /// A feature the cluster has.
    pub struct FinalizedFeature {
        name: String [3..];
        max_version_level: i16 [3..];
        min_version_level: i16 [3..];
    }
}
