//! Heartbeat: REBALANCE_IN_PROGRESS tells a member to join again.

use kafka_wire::ErrorCode;
use kafka_wire::heartbeat::{HeartbeatRequest, HeartbeatResponse};

use super::{Broker, RequestContext};

/// Answers Heartbeat.
pub async fn handle(broker: &Broker, _: &RequestContext, request: HeartbeatRequest) -> HeartbeatResponse {
    let instance = request.group_instance_id.as_deref();
    let beat = broker.groups.heartbeat(&request.group_id, &request.member_id, instance, request.generation_id);
    let error_code = beat.err().map_or(ErrorCode::NONE, |error| ErrorCode(error.code()));
    HeartbeatResponse { error_code, ..Default::default() }
}
