//! Bytes written down by hand from Kafka's protocol guide, field by field: the encodings that are easiest to get wrong.

use bytes::Bytes;

use crate::api_versions::{ApiVersion, ApiVersionsRequest, ApiVersionsResponse};
use crate::fetch::{FetchResponse, FetchableTopicResponse, PartitionData};
use crate::header::encode_response_header;
use crate::metadata::{MetadataRequest, MetadataRequestTopic};
use crate::produce::{PartitionProduceData, ProduceRequest, TopicProduceData};
use crate::{ApiKey, ErrorCode, Message, Records, RequestHeader, Uuid, Writer};

fn check<M: Message + PartialEq + std::fmt::Debug>(message: &M, version: i16, parts: &[&[u8]]) {
    let expected = Bytes::from(parts.concat());
    assert_eq!(message.encode(version), expected, "v{version}");
    assert_eq!(M::decode(expected, version).as_ref(), Ok(message), "v{version}");
}

fn header(version: i16, parts: &[&[u8]]) -> RequestHeader {
    let bytes = Bytes::from(parts.concat());
    let (header, rest) = RequestHeader::decode(bytes.clone()).unwrap();
    assert_eq!(&rest[..], b"body");
    let mut writer = Writer::new(version, false);
    header.encode(&mut writer);
    assert_eq!(writer.finish().concat(), bytes.slice(..bytes.len() - 4));
    header
}

#[test]
fn request_headers() {
    let classic = header(8, &[&[0, 3, 0, 8, 0, 0, 0, 7, 0, 2], b"me", b"body"]);
    assert_eq!((classic.api_key, classic.api_version, classic.correlation_id), (3, 8, 7));
    assert_eq!(classic.client_id.as_deref(), Some("me"));
    // Flexible: the client id keeps its i16 length, tagged fields follow.
    let flexible = header(9, &[&[0, 3, 0, 9, 0, 0, 0, 7, 0, 2], b"me", &[0], b"body"]);
    assert_eq!(flexible.client_id.as_deref(), Some("me"));
    let nameless = header(0, &[&[0, 18, 0, 0, 0, 0, 0, 1, 0xff, 0xff], b"body"]);
    assert_eq!(nameless.client_id, None);
}

#[test]
fn response_headers() {
    let bytes = |key, version| {
        let mut writer = Writer::new(version, false);
        encode_response_header(key, version, 5, &mut writer);
        writer.finish().concat().to_vec()
    };
    assert_eq!(bytes(ApiKey::Metadata, 8), [0, 0, 0, 5]);
    assert_eq!(bytes(ApiKey::Metadata, 9), [0, 0, 0, 5, 0]);
    // KIP-511: never flexible, so that a client which guessed the version wrong can read it.
    assert_eq!(bytes(ApiKey::ApiVersions, 3), [0, 0, 0, 5]);
}

#[test]
fn api_versions() {
    let request =
        ApiVersionsRequest { client_software_name: "librdkafka".into(), client_software_version: "2.0.2".into() };
    check(&request, 3, &[&[11], b"librdkafka", &[6], b"2.0.2", &[0]]);
    check(&ApiVersionsRequest::default(), 0, &[]);
    let response = ApiVersionsResponse {
        error_code: ErrorCode::UNSUPPORTED_VERSION,
        api_keys: vec![ApiVersion { api_key: 18, min_version: 0, max_version: 4 }],
        ..Default::default()
    };
    check(&response, 0, &[&[0, 35], &[0, 0, 0, 1], &[0, 18, 0, 0, 0, 4]]);
    check(&response, 3, &[&[0, 35], &[2], &[0, 18, 0, 0, 0, 4, 0], &[0, 0, 0, 0], &[0]]);
}

#[test]
fn metadata_requests_null_and_empty_differ() {
    let all = MetadataRequest { topics: None, ..Default::default() };
    let none = MetadataRequest { topics: Some(Vec::new()), ..Default::default() };
    check(&all, 1, &[&[0xff, 0xff, 0xff, 0xff]]);
    check(&none, 1, &[&[0, 0, 0, 0]]);
    check(&all, 9, &[&[0], &[1, 0, 0], &[0]]);
    check(&none, 9, &[&[1], &[1, 0, 0], &[0]]);
    let by_id = MetadataRequestTopic { topic_id: Uuid([7; 16]), name: None };
    let by_id = MetadataRequest { topics: Some(vec![by_id]), ..Default::default() };
    check(&by_id, 12, &[&[2], &[7; 16], &[0], &[0], &[1, 0], &[0]]);
}

#[test]
fn produce_requests() {
    let data = PartitionProduceData { index: 3, records: Some(Bytes::from_static(b"batch")) };
    let topic = TopicProduceData { name: "t".into(), partition_data: vec![data] };
    let request = ProduceRequest { acks: -1, timeout_ms: 30_000, topic_data: vec![topic], ..Default::default() };
    check(
        &request,
        8,
        &[
            &[0xff, 0xff, 0xff, 0xff, 0, 0, 0x75, 0x30],
            &[0, 0, 0, 1, 0, 1, b't', 0, 0, 0, 1],
            &[0, 0, 0, 3, 0, 0, 0, 5],
            b"batch",
        ],
    );
    check(&request, 9, &[&[0, 0xff, 0xff, 0, 0, 0x75, 0x30], &[2, 2, b't', 2], &[0, 0, 0, 3, 6], b"batch", &[0, 0, 0]]);
}

#[test]
fn fetch_responses_carry_slices_uncopied() {
    let stored = Bytes::from(vec![0xab; 4000]);
    let partition = PartitionData {
        partition_index: 0,
        high_watermark: 9,
        last_stable_offset: 9,
        log_start_offset: 0,
        records: Some(Records(vec![stored.slice(..1500), stored.slice(1500..)])),
        ..Default::default()
    };
    let topic = FetchableTopicResponse { topic_id: Uuid([1; 16]), partitions: vec![partition], ..Default::default() };
    let response = FetchResponse { responses: vec![topic], ..Default::default() };
    let mut writer = Writer::frame(13, true);
    crate::Field::write(&response, &mut writer);
    let frame = writer.finish_frame();
    assert!(frame.chunks.iter().any(|chunk| chunk.as_ptr() == stored.as_ptr()), "the slice itself is sent");
    assert_eq!(frame.length, frame.chunks.iter().map(Bytes::len).sum::<usize>());
    let bytes = frame.concat();
    assert_eq!(bytes[..4], (bytes.len() as u32 - 4).to_be_bytes());
    let head: &[&[u8]] = &[
        &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2],
        &[1; 16],
        &[2, 0, 0, 0, 0, 0, 0],
        &9i64.to_be_bytes(),
        &9i64.to_be_bytes(),
        &0i64.to_be_bytes(),
        // No aborted list, no preferred replica, 4000 + 1 as a varint.
        &[0, 0xff, 0xff, 0xff, 0xff, 0xa1, 0x1f],
    ];
    assert_eq!(bytes.slice(4..4 + head.concat().len()), head.concat());
    assert!(bytes.ends_with(&[0xab, 0, 0, 0]));
}
