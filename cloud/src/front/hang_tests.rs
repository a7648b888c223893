//! Topics in a shard whose store does not answer, and those beside it. The clock is virtual: nothing here really waits.

use kafka_wire::ErrorCode;
use kafka_wire::create_partitions::{CreatePartitionsRequest, CreatePartitionsTopic};
use kafka_wire::create_topics::{CreatableTopic, CreateTopicsRequest};
use kafka_wire::delete_topics::DeleteTopicsRequest;
use kafka_wire::incremental_alter_configs::{
    IncrementalAlterConfigsRequest, IncrementalAlterConfigsResource, IncrementalAlterableConfig,
};
use kafka_wire::metadata::{MetadataRequest, MetadataRequestTopic};
use tokio::time::Instant;

use super::*;
use crate::groups::GroupSettings;
use crate::shards::gated::quick_and_slow;
use crate::wal::gated::GatedWal;

const OK: ErrorCode = ErrorCode::NONE;
const TIMED_OUT: ErrorCode = ErrorCode::REQUEST_TIMED_OUT;

/// Topics whose names begin with `slow` lie in the shard of the WAL returned.
fn broker() -> (Broker, GatedWal) {
    let (shards, topics, slow) = quick_and_slow();
    let catalogue = Arc::new(Catalogue::new(shards.clone(), topics));
    let groups = Groups::new(shards.clone(), GroupSettings::default());
    let settings = FrontSettings { auto_create_topics: true, ..FrontSettings::default() };
    (Broker::new(shards.clone(), shards, catalogue, groups, 1, "cluster".to_owned(), settings), slow)
}

fn context() -> RequestContext {
    super::admin_tests::version(1)
}

async fn create(broker: &Broker, names: &[&str], timeout_ms: i32) -> Vec<ErrorCode> {
    let topic = |name: &&str| CreatableTopic {
        name: (*name).to_owned(),
        num_partitions: 1,
        replication_factor: -1,
        ..Default::default()
    };
    let topics = names.iter().map(topic).collect();
    let request = CreateTopicsRequest { topics, timeout_ms, ..Default::default() };
    let response = create_topics::handle(broker, &context(), request).await;
    response.topics.iter().map(|topic| topic.error_code).collect()
}

async fn delete(broker: &Broker, names: &[&str], timeout_ms: i32) -> Vec<ErrorCode> {
    let topic_names = names.iter().map(|name| (*name).to_owned()).collect();
    let request = DeleteTopicsRequest { topic_names, timeout_ms, ..Default::default() };
    let response = delete_topics::handle(broker, &context(), request).await;
    response.responses.iter().map(|topic| topic.error_code).collect()
}

async fn grow(broker: &Broker, names: &[&str], count: i32, timeout_ms: i32) -> Vec<ErrorCode> {
    let topic = |name: &&str| CreatePartitionsTopic { name: (*name).to_owned(), count, ..Default::default() };
    let topics = names.iter().map(topic).collect();
    let request = CreatePartitionsRequest { topics, timeout_ms, ..Default::default() };
    let response = create_partitions::handle(broker, &context(), request).await;
    response.results.iter().map(|topic| topic.error_code).collect()
}

async fn look(broker: &Broker, names: &[&str]) -> Vec<ErrorCode> {
    let topic = |name: &&str| MetadataRequestTopic { name: Some((*name).to_owned()), ..Default::default() };
    let topics = Some(names.iter().map(topic).collect());
    let request = MetadataRequest { topics, allow_auto_topic_creation: true, ..Default::default() };
    let response = metadata::handle(broker, &context(), request).await;
    response.topics.iter().map(|topic| topic.error_code).collect()
}

#[tokio::test(start_paused = true)]
async fn a_hung_shard_holds_up_its_own_topics_only_and_no_longer_than_the_request_says() {
    let (broker, slow) = broker();
    assert_eq!(create(&broker, &["slow-old", "slow-grown"], 9_000).await, [OK, OK]);
    slow.hang();
    let begun = Instant::now();
    assert_eq!(create(&broker, &["slow-new", "quick"], 3_000).await, [TIMED_OUT, OK]);
    assert_eq!(begun.elapsed(), Duration::from_secs(3));
    // Whatever hangs, others do not wait for it.
    let begun = Instant::now();
    assert_eq!(create(&broker, &["quick-2"], 3_000).await, [OK]);
    assert_eq!(grow(&broker, &["quick"], 2, 3_000).await, [OK]);
    assert_eq!(delete(&broker, &["quick-2"], 3_000).await, [OK]);
    assert_eq!(begun.elapsed(), Duration::ZERO);
    assert_eq!(create(&broker, &["slow-new"], 3_000).await, [TIMED_OUT], "the same once more");
    assert_eq!(grow(&broker, &["slow-grown", "quick"], 3, 3_000).await, [TIMED_OUT, OK]);
    assert_eq!(delete(&broker, &["slow-old", "quick"], 3_000).await, [TIMED_OUT, OK]);
    assert_eq!(look(&broker, &["slow-seen", "quick-seen"]).await, [ErrorCode::LEADER_NOT_AVAILABLE, OK]);
    assert_eq!(begun.elapsed(), Duration::from_secs(3 + 3 + 3 + 5));

    // What had begun has gone on.
    slow.release();
    assert_eq!(create(&broker, &["slow-new"], 9_000).await, [ErrorCode::TOPIC_ALREADY_EXISTS]);
    assert_eq!(look(&broker, &["slow-seen"]).await, [OK]);
    assert_eq!(broker.catalogue.topic("slow-grown").unwrap().partitions, 3);
    assert_eq!(delete(&broker, &["slow-old"], 9_000).await, [ErrorCode::UNKNOWN_TOPIC_OR_PARTITION]);
    assert_eq!(create(&broker, &["slow-old"], 9_000).await, [OK]);
}

#[tokio::test(start_paused = true)]
async fn a_setting_is_waited_for_in_its_own_shard_only_and_goes_on() {
    let (broker, slow) = broker();
    assert_eq!(create(&broker, &["quick", "slow"], 1_000).await, [OK, OK]);
    let alter = async |topic: &str| {
        let (name, value) = ("retention.ms".to_owned(), Some("5".to_owned()));
        let configs = vec![IncrementalAlterableConfig { name, config_operation: 0, value }];
        let resource_name = topic.to_owned();
        let resources = vec![IncrementalAlterConfigsResource { resource_type: 2, resource_name, configs }];
        let request = IncrementalAlterConfigsRequest { resources, validate_only: false };
        let begun = Instant::now();
        let answer = incremental_alter_configs::handle(&broker, &context(), request).await.responses.remove(0);
        (answer.error_code, begun.elapsed().as_secs())
    };
    slow.hang();
    assert_eq!(alter("slow").await, (TIMED_OUT, 20));
    assert_eq!(alter("quick").await, (OK, 0));
    slow.release();
    assert_eq!(alter("slow").await, (OK, 0));
    let topic = broker.catalogue.topic("slow").unwrap();
    assert_eq!(broker.catalogue.config(&topic).retention_ms, 5);
}
