//! SyncGroup: a follower's is held until the leader's has come.
//!
//! - v3: static members. v5: protocol type and name must be there and must be the group's.

use bytes::Bytes;
use kafka_wire::ErrorCode;
use kafka_wire::sync_group::{SyncGroupRequest, SyncGroupResponse};

use super::{Broker, RequestContext};
use crate::groups::SyncRequest;

const PROTOCOL_VERSION_MIN: i16 = 5;

/// Answers SyncGroup.
pub async fn handle(broker: &Broker, context: &RequestContext, request: SyncGroupRequest) -> SyncGroupResponse {
    let names_protocol = request.protocol_type.is_some() && request.protocol_name.is_some();
    if context.api_version >= PROTOCOL_VERSION_MIN && !names_protocol {
        return SyncGroupResponse { error_code: ErrorCode::INCONSISTENT_GROUP_PROTOCOL, ..Default::default() };
    }
    let sync = SyncRequest {
        member_id: request.member_id,
        instance_id: request.group_instance_id,
        generation: request.generation_id,
        protocol_type: request.protocol_type,
        protocol: request.protocol_name,
        // Copied: the group keeps them, and must not keep the whole request with them.
        assignments: request
            .assignments
            .into_iter()
            .map(|part| (part.member_id, Bytes::copy_from_slice(&part.assignment)))
            .collect(),
    };
    match broker.groups.sync(&request.group_id, sync).await {
        Ok(synced) => SyncGroupResponse {
            protocol_type: Some(synced.protocol_type),
            protocol_name: Some(synced.protocol),
            assignment: synced.assignment,
            ..Default::default()
        },
        Err(error) => SyncGroupResponse { error_code: ErrorCode(error.code()), ..Default::default() },
    }
}
