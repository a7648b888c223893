//! JoinGroup: held until the generation begins.
//!
//! - v0 has no rebalance timeout: the session timeout stands for it.
//! - v4: a first join without a member id is answered MEMBER_ID_REQUIRED (KIP-394). v5: static members (KIP-345).
//! - v7 echoes the protocol type. v9: `skip_assignment` (KIP-814).

use bytes::Bytes;
use kafka_wire::ErrorCode;
use kafka_wire::join_group::{JoinGroupRequest, JoinGroupResponse, JoinGroupResponseMember};

use super::{Broker, RequestContext};
use crate::groups::{GroupError, JoinRequest, Joined};

const TWO_STEPS_VERSION_MIN: i16 = 4;
const SKIP_ASSIGNMENT_VERSION_MIN: i16 = 9;

/// Answers JoinGroup.
pub async fn handle(broker: &Broker, context: &RequestContext, request: JoinGroupRequest) -> JoinGroupResponse {
    let asked_as = request.member_id.clone();
    let join = JoinRequest {
        member_id: request.member_id,
        instance_id: request.group_instance_id,
        client_id: context.client_id.clone().unwrap_or_default(),
        client_host: format!("/{}", context.peer.ip()),
        session_timeout_ms: request.session_timeout_ms,
        rebalance_timeout_ms: request.rebalance_timeout_ms,
        protocol_type: request.protocol_type,
        // Copied: the group keeps them, and must not keep the whole request with them.
        protocols: request.protocols.into_iter().map(|p| (p.name, Bytes::copy_from_slice(&p.metadata))).collect(),
        two_steps: context.api_version >= TWO_STEPS_VERSION_MIN,
        may_skip_assignment: context.api_version >= SKIP_ASSIGNMENT_VERSION_MIN,
    };
    match broker.groups.join(&request.group_id, join).await {
        Ok(joined) => answer(joined),
        Err(error) => {
            let error_code = ErrorCode(error.code());
            let member_id = if let GroupError::MemberIdRequired(fresh) = error { fresh } else { asked_as };
            JoinGroupResponse { error_code, member_id, ..Default::default() }
        }
    }
}

fn answer(joined: Joined) -> JoinGroupResponse {
    let member = |m: crate::groups::words::JoinedMember| JoinGroupResponseMember {
        member_id: m.member_id,
        group_instance_id: m.instance_id,
        metadata: m.metadata,
    };
    JoinGroupResponse {
        generation_id: joined.generation,
        protocol_type: Some(joined.protocol_type),
        protocol_name: Some(joined.protocol),
        leader: joined.leader,
        skip_assignment: joined.skip_assignment,
        member_id: joined.member_id,
        members: joined.members.into_iter().map(member).collect(),
        ..Default::default()
    }
}
