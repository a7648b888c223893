//! ApiVersions: what is served, told to whoever asks, in whatever version.
//!
//! Features are left empty: nothing here is versioned by feature level (no transactions v2, no KRaft), and clients take
//! an absent list for "none".

use kafka_wire::ErrorCode;
use kafka_wire::api_versions::{ApiVersion, ApiVersionsRequest, ApiVersionsResponse};

use super::dispatch::SERVED;
use super::{Broker, RequestContext};

/// Answers the list of [`SERVED`].
pub async fn handle(_: &Broker, context: &RequestContext, request: ApiVersionsRequest) -> ApiVersionsResponse {
    let named = is_software_name(&request.client_software_name) && is_software_name(&request.client_software_version);
    if context.api_version >= 3 && !named {
        return ApiVersionsResponse { error_code: ErrorCode::INVALID_REQUEST, ..Default::default() };
    }
    ApiVersionsResponse { api_keys: served(), ..Default::default() }
}

/// What a client hears that asked in a version we do not know; to be written as v0.
pub(super) fn unsupported_version() -> ApiVersionsResponse {
    ApiVersionsResponse { error_code: ErrorCode::UNSUPPORTED_VERSION, api_keys: served(), ..Default::default() }
}

fn served() -> Vec<ApiVersion> {
    let mut keys: Vec<ApiVersion> = SERVED
        .iter()
        .map(|(key, versions)| ApiVersion {
            api_key: *key as i16,
            min_version: *versions.start(),
            max_version: *versions.end(),
        })
        .collect();
    keys.sort_by_key(|key| key.api_key);
    keys
}

/// KIP-511: letters, digits, `-` and `.`, the first and last of which is a letter or digit.
fn is_software_name(name: &str) -> bool {
    let edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = name.as_bytes();
    edge(bytes.first())
        && edge(bytes.last())
        && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.'))
}
