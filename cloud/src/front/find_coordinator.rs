//! FindCoordinator: this node coordinates every group.
//!
//! - Up to v3 one key, from v4 on several (KIP-699).
//! - Transactional ids (type 1) and share groups (type 2) are not served; a client that asks is told so at once rather
//!   than left to retry.

use kafka_wire::ErrorCode;
use kafka_wire::find_coordinator::{Coordinator, FindCoordinatorRequest, FindCoordinatorResponse};

use super::{Broker, RequestContext};

const GROUP: i8 = 0;
const BATCHED_VERSION_MIN: i16 = 4;

/// Answers FindCoordinator.
pub async fn handle(
    broker: &Broker,
    context: &RequestContext,
    request: FindCoordinatorRequest,
) -> FindCoordinatorResponse {
    let refusal = match request.key_type {
        GROUP => None,
        1 => Some("transactions are not served"),
        2 => Some("share groups are not served"),
        _ => Some("unknown key type"),
    };
    let find = |key: String| match refusal {
        None => Coordinator {
            key,
            node_id: broker.node_id,
            host: context.listener.advertised_host.clone(),
            port: i32::from(context.listener.advertised_port),
            error_code: ErrorCode::NONE,
            error_message: None,
        },
        Some(text) => Coordinator {
            key,
            node_id: -1,
            host: String::new(),
            port: -1,
            error_code: ErrorCode::INVALID_REQUEST,
            error_message: Some(text.to_owned()),
        },
    };
    if context.api_version >= BATCHED_VERSION_MIN {
        let coordinators = request.coordinator_keys.into_iter().map(find).collect();
        return FindCoordinatorResponse { coordinators, ..Default::default() };
    }
    let found = find(request.key);
    FindCoordinatorResponse {
        error_code: found.error_code,
        error_message: found.error_message,
        node_id: found.node_id,
        host: found.host,
        port: found.port,
        ..Default::default()
    }
}
