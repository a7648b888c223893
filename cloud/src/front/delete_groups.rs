//! DeleteGroups: a group without members goes, with all its offsets. All groups of a request are waited for together: one
//! whose shard does not answer must not hold up the others.

use futures_util::future::join_all;
use kafka_wire::ErrorCode;
use kafka_wire::delete_groups::{DeletableGroupResult, DeleteGroupsRequest, DeleteGroupsResponse};

use super::{Broker, RequestContext};

/// Answers DeleteGroups.
pub async fn handle(broker: &Broker, _: &RequestContext, request: DeleteGroupsRequest) -> DeleteGroupsResponse {
    let delete = async |group_id: String| {
        let deleted = broker.groups.delete(&group_id).await;
        let error_code = deleted.err().map_or(ErrorCode::NONE, |error| ErrorCode(error.code()));
        DeletableGroupResult { group_id, error_code }
    };
    let results = join_all(request.groups_names.into_iter().map(delete)).await;
    DeleteGroupsResponse { results, ..Default::default() }
}
