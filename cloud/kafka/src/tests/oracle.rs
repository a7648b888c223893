//! Against `kafka-protocol`, which is generated from Kafka's own tables: what we write it reads, what it writes from
//! that is what we wrote, and what we read back is what we began with. Its decoder is only ever given our own bytes.

use bytes::{Bytes, BytesMut};
use kafka_protocol::protocol::{Decodable, Encodable};
use proptest::prelude::*;

use super::Sampler;
use crate::Message;

fn round_trip<M: Message + PartialEq + std::fmt::Debug>(seed: u64, version: i16) -> (M, Bytes) {
    let message = M::sample(&mut Sampler::new(seed, version, M::is_flexible(version)));
    let bytes = message.encode(version);
    assert_eq!(M::decode(bytes.clone(), version).as_ref(), Ok(&message), "v{version}");
    (message, bytes)
}

fn check<M, O>(seed: u64)
where
    M: Message + PartialEq + std::fmt::Debug,
    O: Encodable + Decodable + kafka_protocol::protocol::Message,
{
    for version in M::VERSIONS {
        let (message, ours) = round_trip::<M>(seed, version);
        if version < O::VERSIONS.min || version > O::VERSIONS.max {
            continue;
        }
        let mut left = ours.clone();
        let theirs = O::decode(&mut left, version).unwrap_or_else(|e| panic!("v{version}: {e}\n{message:?}"));
        assert!(left.is_empty(), "v{version}: {} bytes left of {message:?}", left.len());
        let mut out = BytesMut::new();
        theirs.encode(&mut out, version).unwrap_or_else(|e| panic!("v{version}: {e}\n{message:?}"));
        assert_eq!(out, ours, "v{version}: {message:?}");
    }
}

macro_rules! oracle {
    ($($module:ident $request:ident $response:ident;)*) => {$(
        proptest! {
            #![proptest_config(ProptestConfig::with_cases(64))]
            #[test]
            fn $module(seed: u64) {
                check::<crate::$module::$request, kafka_protocol::messages::$request>(seed);
                check::<crate::$module::$response, kafka_protocol::messages::$response>(seed);
            }
        }
    )*};
}

oracle! {
    alter_configs AlterConfigsRequest AlterConfigsResponse;
    api_versions ApiVersionsRequest ApiVersionsResponse;
    create_partitions CreatePartitionsRequest CreatePartitionsResponse;
    create_topics CreateTopicsRequest CreateTopicsResponse;
    delete_groups DeleteGroupsRequest DeleteGroupsResponse;
    delete_records DeleteRecordsRequest DeleteRecordsResponse;
    delete_topics DeleteTopicsRequest DeleteTopicsResponse;
    describe_cluster DescribeClusterRequest DescribeClusterResponse;
    describe_configs DescribeConfigsRequest DescribeConfigsResponse;
    describe_groups DescribeGroupsRequest DescribeGroupsResponse;
    fetch FetchRequest FetchResponse;
    find_coordinator FindCoordinatorRequest FindCoordinatorResponse;
    heartbeat HeartbeatRequest HeartbeatResponse;
    incremental_alter_configs IncrementalAlterConfigsRequest IncrementalAlterConfigsResponse;
    init_producer_id InitProducerIdRequest InitProducerIdResponse;
    join_group JoinGroupRequest JoinGroupResponse;
    leave_group LeaveGroupRequest LeaveGroupResponse;
    list_groups ListGroupsRequest ListGroupsResponse;
    list_offsets ListOffsetsRequest ListOffsetsResponse;
    metadata MetadataRequest MetadataResponse;
    offset_commit OffsetCommitRequest OffsetCommitResponse;
    offset_delete OffsetDeleteRequest OffsetDeleteResponse;
    offset_fetch OffsetFetchRequest OffsetFetchResponse;
    offset_for_leader_epoch OffsetForLeaderEpochRequest OffsetForLeaderEpochResponse;
    produce ProduceRequest ProduceResponse;
    sync_group SyncGroupRequest SyncGroupResponse;
}
