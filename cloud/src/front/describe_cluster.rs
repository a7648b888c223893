//! DescribeCluster: this node is the cluster (KIP-700).
//!
//! - v1 endpoint type: there is no controller to ask apart from the broker. v2 fenced brokers: there are none.

use kafka_wire::ErrorCode;
use kafka_wire::describe_cluster::{DescribeClusterBroker, DescribeClusterRequest, DescribeClusterResponse};

use super::{Broker, RequestContext, operations};

const BROKERS: i8 = 1;
const CONTROLLERS: i8 = 2;

/// Answers DescribeCluster.
pub async fn handle(
    broker: &Broker,
    context: &RequestContext,
    request: DescribeClusterRequest,
) -> DescribeClusterResponse {
    let refusal = match request.endpoint_type {
        BROKERS => None,
        CONTROLLERS => Some((ErrorCode::MISMATCHED_ENDPOINT_TYPE, "this is a broker's listener, not a controller's")),
        _ => Some((ErrorCode::UNSUPPORTED_ENDPOINT_TYPE, "unknown endpoint type")),
    };
    if let Some((error_code, text)) = refusal {
        let error_message = Some(text.to_owned());
        return DescribeClusterResponse { error_code, error_message, ..Default::default() };
    }
    let mut response = DescribeClusterResponse {
        cluster_id: broker.cluster_id.clone(),
        controller_id: broker.node_id,
        brokers: vec![DescribeClusterBroker {
            broker_id: broker.node_id,
            host: context.listener.advertised_host.clone(),
            port: i32::from(context.listener.advertised_port),
            rack: None,
            is_fenced: false,
        }],
        ..Default::default()
    };
    if request.include_cluster_authorized_operations {
        response.cluster_authorized_operations = operations::CLUSTER;
    }
    response
}
