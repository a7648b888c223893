//! DescribeGroups: state, protocol, members with their metadata and assignments as they sent them.
//!
//! - v3 authorized operations, v4 static names, v6 GROUP_ID_NOT_FOUND for a group that is not there; before, it is
//!   described as Dead. A group asked for twice is answered once.

use std::collections::HashSet;

use kafka_wire::ErrorCode;
use kafka_wire::describe_groups::{
    DescribeGroupsRequest, DescribeGroupsResponse, DescribedGroup, DescribedGroupMember,
};

use super::{Broker, RequestContext, operations};
use crate::groups::Description;
use crate::groups::words::DescribedMember;

const NOT_FOUND_VERSION_MIN: i16 = 6;

/// Answers DescribeGroups.
pub async fn handle(
    broker: &Broker,
    context: &RequestContext,
    request: DescribeGroupsRequest,
) -> DescribeGroupsResponse {
    let mut seen = HashSet::new();
    let mut groups = Vec::new();
    for group_id in request.groups {
        if !seen.insert(group_id.clone()) {
            continue;
        }
        let mut group = match broker.groups.describe(&group_id) {
            Some(description) => described(group_id, description),
            None => not_found(group_id, context.api_version),
        };
        if request.include_authorized_operations && !group.error_code.is_error() {
            group.authorized_operations = operations::GROUP;
        }
        groups.push(group);
    }
    DescribeGroupsResponse { groups, ..Default::default() }
}

fn described(group_id: String, description: Description) -> DescribedGroup {
    let member = |member: DescribedMember| DescribedGroupMember {
        member_id: member.member_id,
        group_instance_id: member.instance_id,
        client_id: member.client_id,
        client_host: member.client_host,
        member_metadata: member.metadata,
        member_assignment: member.assignment,
    };
    DescribedGroup {
        group_id,
        group_state: description.state.to_owned(),
        protocol_type: description.protocol_type,
        protocol_data: description.protocol,
        members: description.members.into_iter().map(member).collect(),
        ..Default::default()
    }
}

fn not_found(group_id: String, version: i16) -> DescribedGroup {
    let group_state = "Dead".to_owned();
    if version < NOT_FOUND_VERSION_MIN {
        return DescribedGroup { group_id, group_state, ..Default::default() };
    }
    DescribedGroup {
        error_code: ErrorCode::GROUP_ID_NOT_FOUND,
        error_message: Some(format!("Group {group_id} not found.")),
        group_id,
        group_state,
        ..Default::default()
    }
}
