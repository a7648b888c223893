//! ApiVersions and Metadata: what clients learn before they do anything.

use kafka_wire::api_versions::{ApiVersionsRequest, ApiVersionsResponse};
use kafka_wire::metadata::{MetadataRequest, MetadataRequestTopic, MetadataResponse};
use kafka_wire::{ApiKey, ErrorCode, Uuid};

use super::super::dispatch::SERVED;
use super::super::operations;
use super::*;

fn named(names: &[&str]) -> MetadataRequest {
    let topic = |name: &&str| MetadataRequestTopic { name: Some(name.to_string()), ..Default::default() };
    MetadataRequest { topics: Some(names.iter().map(topic).collect()), ..Default::default() }
}

fn everyone() -> ApiVersionsRequest {
    ApiVersionsRequest { client_software_name: "test".into(), client_software_version: "1.0".into() }
}

#[tokio::test]
async fn every_version_lists_what_is_served() {
    let running = start().await;
    let mut client = running.client().await;
    for version in 0..=4 {
        let response: ApiVersionsResponse = client.call(version, &everyone()).await;
        assert_eq!(response.error_code, ErrorCode::NONE);
        assert_eq!(response.api_keys.len(), SERVED.len());
        assert!(response.api_keys.is_sorted_by_key(|key| key.api_key));
        let range = |wanted: ApiKey| {
            let key = response.api_keys.iter().find(|key| key.api_key == wanted as i16).unwrap();
            (key.min_version, key.max_version)
        };
        // What librdkafka's feature map tests for compression (KAFKA-18659).
        assert_eq!(range(ApiKey::Produce), (0, 11));
        assert_eq!(range(ApiKey::Fetch), (4, 17));
    }
}

#[test]
fn each_api_is_served_once_and_in_versions_that_are_known() {
    let mut keys: Vec<ApiKey> = SERVED.iter().map(|(key, _)| *key).collect();
    keys.sort();
    keys.dedup();
    assert_eq!(keys.len(), SERVED.len());
    for (key, versions) in SERVED {
        assert!(versions.start() <= versions.end(), "{key:?}");
    }
}

#[tokio::test]
async fn an_unknown_version_of_api_versions_is_answered_in_the_oldest_form() {
    let running = start().await;
    let mut client = running.client().await;
    for version in [5i16, 99, i16::MAX] {
        // A header of the future: what follows the correlation id is not ours to understand.
        let mut frame = BytesMut::new();
        frame.put_i32(2 + 2 + 4 + 2 + 1);
        frame.put_i16(ApiKey::ApiVersions as i16);
        frame.put_i16(version);
        frame.put_i32(41);
        frame.put_slice(&[0xff, 0xff, 0]);
        client.stream.write_all(&frame).await.unwrap();
        let (correlation_id, response): (_, ApiVersionsResponse) = client.receive(0).await;
        assert_eq!((correlation_id, response.error_code), (41, ErrorCode::UNSUPPORTED_VERSION));
        assert_eq!(response.api_keys.len(), SERVED.len());
    }
    let known: ApiVersionsResponse = client.call(4, &everyone()).await;
    assert_eq!(known.error_code, ErrorCode::NONE, "the connection goes on");
}

#[tokio::test]
async fn a_client_must_name_itself_decently() {
    let running = start().await;
    let mut client = running.client().await;
    for (name, expected) in [
        ("apache-kafka-java", ErrorCode::NONE),
        ("x", ErrorCode::NONE),
        ("", ErrorCode::INVALID_REQUEST),
        ("-x", ErrorCode::INVALID_REQUEST),
        ("x y", ErrorCode::INVALID_REQUEST),
        ("x.", ErrorCode::INVALID_REQUEST),
    ] {
        let request = ApiVersionsRequest { client_software_name: name.into(), ..everyone() };
        let response: ApiVersionsResponse = client.call(3, &request).await;
        assert_eq!(response.error_code, expected, "{name:?}");
    }
}

#[tokio::test]
async fn metadata_in_every_version_names_this_broker_as_everything() {
    let running = start().await;
    let id = running.topic("t", 3).await;
    let mut client = running.client().await;
    for version in 0..=13 {
        let response: MetadataResponse = client.call(version, &named(&["t"])).await;
        let broker = &response.brokers[0];
        assert_eq!((broker.node_id, &broker.host[..], broker.port), (1, "127.0.0.1", running.port as i32));
        let topic = &response.topics[0];
        assert_eq!((topic.error_code, topic.name.as_deref()), (ErrorCode::NONE, Some("t")));
        assert_eq!(topic.partitions.len(), 3);
        assert!(topic.partitions.iter().all(|p| p.leader_id == 1 && p.replica_nodes == [1] && p.isr_nodes == [1]));
        if version >= 10 {
            assert_eq!(topic.topic_id, Uuid(id.0));
        }
        if version >= 2 {
            assert_eq!(response.cluster_id.as_deref(), Some("test-cluster"));
        }
    }
}

#[tokio::test]
async fn all_topics_none_and_those_that_are_named() {
    let running = start().await;
    running.topic("a", 1).await;
    running.topic("b", 1).await;
    let mut client = running.client().await;
    let names = |response: &MetadataResponse| -> Vec<String> {
        response.topics.iter().filter_map(|topic| topic.name.clone()).collect()
    };
    let all = MetadataRequest { topics: None, ..Default::default() };
    let none = MetadataRequest { topics: Some(Vec::new()), ..Default::default() };
    let response: MetadataResponse = client.call(0, &none).await;
    assert_eq!(names(&response), ["a", "b"], "in v0 an empty list asks for all");
    for version in 1..=13 {
        let response: MetadataResponse = client.call(version, &all).await;
        assert_eq!(names(&response), ["a", "b"], "v{version}");
        let response: MetadataResponse = client.call(version, &none).await;
        assert!(response.topics.is_empty(), "v{version}");
    }
}

#[tokio::test]
async fn a_topic_is_made_when_client_and_broker_allow_and_is_ready_at_once() {
    let running = start().await;
    let mut client = running.client().await;
    let refused = MetadataRequest { allow_auto_topic_creation: false, ..named(&["new"]) };
    let response: MetadataResponse = client.call(9, &refused).await;
    assert_eq!(response.topics[0].error_code, ErrorCode::UNKNOWN_TOPIC_OR_PARTITION);
    let response: MetadataResponse = client.call(9, &named(&["new", "no/name", ""])).await;
    assert_eq!((response.topics[0].error_code, response.topics[0].partitions.len()), (ErrorCode::NONE, 1));
    assert_eq!(response.topics[1].error_code, ErrorCode::INVALID_TOPIC);
    assert_eq!(response.topics[2].error_code, ErrorCode::INVALID_TOPIC);
    let answer = super::produce::produce(&mut client, "new", 0, batch(&[b"value"]).into_bytes()).await;
    assert_eq!(answer.error_code, ErrorCode::NONE);

    let closed = start_with(FrontSettings { auto_create_topics: false, ..settings() }, MemoryLog::new(1000)).await;
    let mut client = closed.client().await;
    let response: MetadataResponse = client.call(9, &named(&["new"])).await;
    assert_eq!(response.topics[0].error_code, ErrorCode::UNKNOWN_TOPIC_OR_PARTITION);
}

#[tokio::test]
async fn topics_are_found_by_id() {
    let running = start().await;
    let id = running.topic("t", 1).await;
    let mut client = running.client().await;
    let by_id = |id: [u8; 16]| MetadataRequest {
        topics: Some(vec![MetadataRequestTopic { topic_id: Uuid(id), name: None }]),
        ..Default::default()
    };
    let found: MetadataResponse = client.call(12, &by_id(id.0)).await;
    assert_eq!(found.topics[0].name.as_deref(), Some("t"));
    let unknown: MetadataResponse = client.call(12, &by_id([9; 16])).await;
    assert_eq!((unknown.topics[0].error_code, &unknown.topics[0].name), (ErrorCode::UNKNOWN_TOPIC_ID, &None));
    let none: MetadataResponse = client.call(12, &by_id([0; 16])).await;
    assert_eq!(none.topics[0].error_code, ErrorCode::INVALID_REQUEST);
    let too_early: MetadataResponse = client.call(10, &by_id(id.0)).await;
    assert_eq!(too_early.topics[0].error_code, ErrorCode::INVALID_REQUEST);
}

#[tokio::test]
async fn a_topic_asked_for_often_is_answered_once() {
    let running = start().await;
    running.topic("t", 100).await;
    let mut client = running.client().await;
    let response: MetadataResponse = client.call(9, &named(&["t"; 5000])).await;
    assert_eq!(response.topics.len(), 1);
}

#[tokio::test]
async fn operations_are_told_to_who_asks() {
    let running = start().await;
    running.topic("t", 1).await;
    let mut client = running.client().await;
    let asked = MetadataRequest {
        include_topic_authorized_operations: true,
        include_cluster_authorized_operations: true,
        ..named(&["t"])
    };
    let response: MetadataResponse = client.call(8, &asked).await;
    assert_eq!(response.topics[0].topic_authorized_operations, operations::TOPIC);
    assert_eq!(response.cluster_authorized_operations, operations::CLUSTER);
    let response: MetadataResponse = client.call(8, &named(&["t"])).await;
    assert_eq!(response.topics[0].topic_authorized_operations, i32::MIN);
}
