//! DeleteGroups: a group without members goes, with all its offsets.

use kafka_wire::ErrorCode;
use kafka_wire::delete_groups::{DeletableGroupResult, DeleteGroupsRequest, DeleteGroupsResponse};

use super::{Broker, RequestContext};

/// Answers DeleteGroups.
pub async fn handle(broker: &Broker, _: &RequestContext, request: DeleteGroupsRequest) -> DeleteGroupsResponse {
    let mut results = Vec::with_capacity(request.groups_names.len());
    for group_id in request.groups_names {
        let deleted = broker.groups.delete(&group_id).await;
        let error_code = deleted.err().map_or(ErrorCode::NONE, |error| ErrorCode(error.code()));
        results.push(DeletableGroupResult { group_id, error_code });
    }
    DeleteGroupsResponse { results, ..Default::default() }
}
