//! Bytes that mean nothing, or almost something: never a panic, never an allocation on the word of a length.

use bytes::{BufMut as _, Bytes, BytesMut};
use proptest::prelude::*;

use super::Sampler;
use crate::codec::ELEMENTS_MAX;
use crate::{Message, RequestHeader, WireError};

fn decode<M: Message>(bytes: &Bytes, version: i16) -> Result<M, WireError> {
    M::decode(bytes.clone(), version)
}

/// Decodes noise and damaged messages of every version; whatever is accepted must survive being written again.
fn survive<M: Message + PartialEq + std::fmt::Debug>(noise: &Bytes, seed: u64) {
    for version in M::VERSIONS {
        let flexible = M::is_flexible(version);
        let mut sampler = Sampler::new(seed, version, flexible);
        let whole = M::sample(&mut sampler).encode(version);
        let mut damaged = BytesMut::from(&whole[..]);
        if !damaged.is_empty() {
            let at = sampler.number() as usize % damaged.len();
            damaged[at] = sampler.number() as u8;
        }
        let cut = whole.slice(..sampler.number() as usize % (whole.len() + 1));
        for bytes in [noise.clone(), damaged.freeze(), cut] {
            if let Ok(message) = decode::<M>(&bytes, version) {
                let again = M::decode(message.encode(version), version);
                assert_eq!(again.as_ref(), Ok(&message), "v{version}");
            }
        }
    }
}

macro_rules! every_message {
    ($check:ident $arguments:tt: $($module:ident :: $($message:ident),*;)*) => {
        $($( $check::<crate::$module::$message>$arguments; )*)*
    };
}

macro_rules! for_every_message {
    ($check:ident $arguments:tt) => {
        every_message! {
            $check $arguments:
            alter_configs::AlterConfigsRequest, AlterConfigsResponse;
            api_versions::ApiVersionsRequest, ApiVersionsResponse;
            create_partitions::CreatePartitionsRequest, CreatePartitionsResponse;
            create_topics::CreateTopicsRequest, CreateTopicsResponse;
            delete_groups::DeleteGroupsRequest, DeleteGroupsResponse;
            delete_records::DeleteRecordsRequest, DeleteRecordsResponse;
            delete_topics::DeleteTopicsRequest, DeleteTopicsResponse;
            describe_cluster::DescribeClusterRequest, DescribeClusterResponse;
            describe_configs::DescribeConfigsRequest, DescribeConfigsResponse;
            describe_groups::DescribeGroupsRequest, DescribeGroupsResponse;
            fetch::FetchRequest, FetchResponse;
            find_coordinator::FindCoordinatorRequest, FindCoordinatorResponse;
            heartbeat::HeartbeatRequest, HeartbeatResponse;
            incremental_alter_configs::IncrementalAlterConfigsRequest, IncrementalAlterConfigsResponse;
            init_producer_id::InitProducerIdRequest, InitProducerIdResponse;
            join_group::JoinGroupRequest, JoinGroupResponse;
            leave_group::LeaveGroupRequest, LeaveGroupResponse;
            list_groups::ListGroupsRequest, ListGroupsResponse;
            list_offsets::ListOffsetsRequest, ListOffsetsResponse;
            metadata::MetadataRequest, MetadataResponse;
            offset_commit::OffsetCommitRequest, OffsetCommitResponse;
            offset_delete::OffsetDeleteRequest, OffsetDeleteResponse;
            offset_fetch::OffsetFetchRequest, OffsetFetchResponse;
            offset_for_leader_epoch::OffsetForLeaderEpochRequest, OffsetForLeaderEpochResponse;
            produce::ProduceRequest, ProduceResponse;
            sync_group::SyncGroupRequest, SyncGroupResponse;
        }
    };
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    #[test]
    fn any_bytes_are_refused_or_understood(noise in proptest::collection::vec(any::<u8>(), 0..200), seed: u64) {
        let noise = Bytes::from(noise);
        let _ = RequestHeader::decode(noise.clone());
        for_every_message!(survive(&noise, seed));
    }
}

/// Every length and count a message can begin with, at its largest.
fn survive_claims<M: Message + PartialEq + std::fmt::Debug>(claim: &Bytes) {
    for version in M::VERSIONS {
        for lead in 0..24 {
            let mut bytes = BytesMut::new();
            bytes.put_bytes(0, lead);
            bytes.put_slice(claim);
            let _ = decode::<M>(&bytes.freeze(), version);
        }
    }
}

#[test]
fn a_claimed_length_allocates_nothing() {
    for claim in [
        &[0x7f, 0xff, 0xff, 0xff][..],
        &[0xff, 0xff, 0xff, 0xff, 0x0f],
        &[0x05, 0xf5, 0xe1, 0x00],
        &[0x80, 0x80, 0x80, 0x80, 0x08],
        &[0xff, 0xff, 0xff, 0xfe],
        &[0xff; 16],
    ] {
        for_every_message!(survive_claims(&Bytes::copy_from_slice(claim)));
    }
}

/// The request that aborts a codec which reserves what a count says (reference, kafka-protocol 0.18).
#[test]
fn five_bytes_that_claim_two_billion_topics_are_refused() {
    let bytes = Bytes::from_static(&[0x7f, 0xff, 0xff, 0xff, 0x00]);
    let refused = decode::<crate::metadata::MetadataRequest>(&bytes, 8);
    assert_eq!(refused, Err(WireError::Cut { wanted: 0x7fff_ffff, left: 1 }));
}

#[test]
fn elements_are_bounded_even_when_their_bytes_are_there() {
    let count = ELEMENTS_MAX as u32 + 1;
    let mut bytes = BytesMut::new();
    bytes.put_u32(count);
    bytes.put_bytes(0, count as usize * 2);
    bytes.put_u8(0);
    let refused = decode::<crate::describe_groups::DescribeGroupsRequest>(&bytes.freeze(), 3);
    assert_eq!(refused, Err(WireError::TooManyElements));
}

#[test]
fn null_is_refused_where_a_version_has_none() {
    let null_topics = Bytes::from_static(&[0xff, 0xff, 0xff, 0xff]);
    let refused = decode::<crate::metadata::MetadataRequest>(&null_topics, 0);
    assert_eq!(refused, Err(WireError::Null("topics")));
    assert!(decode::<crate::metadata::MetadataRequest>(&null_topics, 1).is_ok());
}

#[test]
fn a_version_that_is_not_known_is_refused() {
    let refused = decode::<crate::produce::ProduceRequest>(&Bytes::new(), 12);
    assert_eq!(refused, Err(WireError::UnknownVersion { key: 0, version: 12 }));
}

#[test]
fn unknown_tagged_fields_are_skipped() {
    // ApiVersions v3: name "a", version "1", one tagged field 9 of three bytes.
    let bytes = Bytes::from_static(&[2, b'a', 2, b'1', 1, 9, 3, 1, 2, 3]);
    let request = decode::<crate::api_versions::ApiVersionsRequest>(&bytes, 3).unwrap();
    assert_eq!((&request.client_software_name[..], &request.client_software_version[..]), ("a", "1"));
}
