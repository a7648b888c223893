//! LeaveGroup: one member up to v2, several from v3 on, each with its own error (KIP-345).

use kafka_wire::ErrorCode;
use kafka_wire::leave_group::{LeaveGroupRequest, LeaveGroupResponse, MemberResponse};

use super::{Broker, RequestContext};

const BATCHED_VERSION_MIN: i16 = 3;

/// Answers LeaveGroup.
pub async fn handle(broker: &Broker, context: &RequestContext, request: LeaveGroupRequest) -> LeaveGroupResponse {
    let batched = context.api_version >= BATCHED_VERSION_MIN;
    let members: Vec<(String, Option<String>)> = if batched {
        request.members.into_iter().map(|member| (member.member_id, member.group_instance_id)).collect()
    } else {
        vec![(request.member_id, None)]
    };
    let results = match broker.groups.leave(&request.group_id, &members) {
        Ok(results) => results.into_iter().map(|result| result.err().map_or(0, |error| error.code())),
        Err(error) => return LeaveGroupResponse { error_code: ErrorCode(error.code()), ..Default::default() },
    };
    let member = |((member_id, group_instance_id), code)| MemberResponse {
        member_id,
        group_instance_id,
        error_code: ErrorCode(code),
    };
    let members: Vec<MemberResponse> = members.into_iter().zip(results).map(member).collect();
    if batched {
        return LeaveGroupResponse { members, ..Default::default() };
    }
    let error_code = members.first().map_or(ErrorCode::NONE, |member| member.error_code);
    LeaveGroupResponse { error_code, ..Default::default() }
}
