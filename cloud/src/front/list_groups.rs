//! ListGroups: all groups, those with members and those that only have offsets.
//!
//! - v4 filters by state (KIP-518), v5 by type (KIP-848); all groups here are of type `classic`. Filters do not mind case.

use kafka_wire::list_groups::{ListGroupsRequest, ListGroupsResponse, ListedGroup};

use super::{Broker, RequestContext};

const TYPE: &str = "classic";

/// Answers ListGroups.
pub async fn handle(broker: &Broker, _: &RequestContext, request: ListGroupsRequest) -> ListGroupsResponse {
    let passes =
        |filter: &[String], value: &str| filter.is_empty() || filter.iter().any(|f| f.eq_ignore_ascii_case(value));
    if !passes(&request.types_filter, TYPE) {
        return ListGroupsResponse::default();
    }
    let listed = broker.groups.list().into_iter();
    let groups =
        listed.filter(|(_, group)| passes(&request.states_filter, group.state)).map(|(group_id, group)| ListedGroup {
            group_id,
            protocol_type: group.protocol_type,
            group_state: group.state.to_owned(),
            group_type: TYPE.to_owned(),
        });
    ListGroupsResponse { groups: groups.collect(), ..Default::default() }
}
