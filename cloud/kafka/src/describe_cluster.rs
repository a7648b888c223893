//! DescribeCluster (key 60): the brokers (KIP-700). Flexible from the start. v1 adds the endpoint type (KIP-919), v2
//! fenced brokers (KIP-1073).

use crate::ErrorCode;

message! {
    /// What to include.
    pub struct DescribeClusterRequest [DescribeCluster, 0..=2, flexible 0..] {
        include_cluster_authorized_operations: bool [0..];
        /// 1: brokers, 2: controllers.
        endpoint_type: i8 [1..] = 1;
        include_fenced_brokers: bool [2..];
    }

    /// The cluster.
    pub struct DescribeClusterResponse [DescribeCluster, 0..=2, flexible 0..] {
        throttle_time_ms: i32 [0..];
        error_code: ErrorCode [0..];
        error_message: Option<String> [0..];
        endpoint_type: i8 [1..] = 1;
        cluster_id: String [0..];
        controller_id: i32 [0..] = -1;
        brokers: Vec<DescribeClusterBroker> [0..];
        cluster_authorized_operations: i32 [0..] = crate::metadata::OPERATIONS_UNKNOWN;
    }

    /// One broker.
    pub struct DescribeClusterBroker {
        broker_id: i32 [0..];
        host: String [0..];
        port: i32 [0..];
        rack: Option<String> [0..];
        is_fenced: bool [2..];
    }
}
