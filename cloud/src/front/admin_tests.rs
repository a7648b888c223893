//! Groups and administration, handler by handler, over a log in memory.

use std::sync::Arc;

use bytes::Bytes;
use kafka_wire::create_topics::{
    CreatableReplicaAssignment, CreatableTopic, CreatableTopicConfig, CreateTopicsRequest,
};
use kafka_wire::delete_topics::{DeleteTopicState, DeleteTopicsRequest};
use kafka_wire::describe_configs::{DescribeConfigsRequest, DescribeConfigsResource, DescribeConfigsResult};
use kafka_wire::find_coordinator::FindCoordinatorRequest;
use kafka_wire::join_group::{JoinGroupRequest, JoinGroupRequestProtocol, JoinGroupResponse};
use kafka_wire::leave_group::{LeaveGroupRequest, MemberIdentity};
use kafka_wire::offset_commit::{
    OffsetCommitRequest, OffsetCommitRequestPartition, OffsetCommitRequestTopic, OffsetCommitResponse,
};
use kafka_wire::offset_fetch::{OffsetFetchRequest, OffsetFetchRequestGroup, OffsetFetchRequestTopic};
use kafka_wire::produce::{PartitionProduceData, ProduceRequest, TopicProduceData};
use kafka_wire::{ErrorCode, Uuid};
use shared::batch::{Batch, BatchBuilder, Compression};
use shared::log::conformance;
use shared::log::faulty::{Fault, FaultyLog};
use shared::log::memory::MemoryLog;
use shared::log::{Append, AppendError, BoxFuture, Source};
use shared::name::{Partition, TimestampMs};

use super::*;
use crate::catalogue::CatalogueSettings;
use crate::groups::GroupSettings;
use crate::state::memory::MemoryStateLog;
use crate::state::{Change, CoordinatorSlot, GroupChange, State, TopicChange};

/// A state log in memory that gives the log in memory its partitions, as a shard would. Groups are in a log of their own.
struct Store {
    state: MemoryStateLog,
    groups: Box<dyn StateLog>,
    log: Arc<MemoryLog>,
}

/// A log that shows what it has and takes nothing more, without a word.
struct Silent(MemoryStateLog);

impl StateLog for Silent {
    fn commit(&self, _: Vec<Change>) -> BoxFuture<'static, Result<(), AppendError>> {
        Box::pin(std::future::pending())
    }

    fn with_state(&self, read: &mut dyn FnMut(&State)) {
        self.0.with_state(read);
    }

    fn now_ms(&self) -> TimestampMs {
        self.0.now_ms()
    }
}

impl StateLog for Store {
    fn commit(&self, changes: Vec<Change>) -> BoxFuture<'static, Result<(), AppendError>> {
        for change in &changes {
            if let Change::Topics(TopicChange::Created { topic, .. }) = change {
                (0..topic.partitions).for_each(|index| self.log.create(Partition { topic: topic.id, index }));
            }
        }
        self.state.commit(changes)
    }

    fn with_state(&self, read: &mut dyn FnMut(&State)) {
        self.state.with_state(read);
    }

    fn now_ms(&self) -> TimestampMs {
        self.state.now_ms()
    }

    fn slot_log(&self, _: CoordinatorSlot) -> Option<&dyn StateLog> {
        Some(&*self.groups)
    }

    fn slot_logs(&self) -> Vec<&dyn StateLog> {
        vec![&self.state, &*self.groups]
    }
}

fn broker() -> Broker {
    broker_with(MemoryStateLog::new())
}

fn broker_with(groups: impl StateLog) -> Broker {
    let log = Arc::new(MemoryLog::new(1 << 20));
    let state = Arc::new(Store { state: MemoryStateLog::new(), groups: Box::new(groups), log: log.clone() });
    let catalogue = Arc::new(Catalogue::new(state.clone(), CatalogueSettings::default()));
    let groups =
        Groups::new(state.clone(), GroupSettings { initial_rebalance_delay_ms: 0, ..GroupSettings::default() });
    Broker::new(log, state, catalogue, groups, 7, "cluster".to_owned(), FrontSettings::default())
}

pub(super) fn version(api_version: i16) -> RequestContext {
    RequestContext {
        api_version,
        client_id: Some("app".to_owned()),
        peer: "192.0.2.1:4242".parse().unwrap(),
        listener: Arc::new(Listener {
            name: "plain".to_owned(),
            advertised_host: "broker.example".to_owned(),
            advertised_port: 9092,
            tls: None,
        }),
    }
}

fn topic(name: &str, num_partitions: i32, replication_factor: i16) -> CreatableTopic {
    CreatableTopic { name: name.to_owned(), num_partitions, replication_factor, ..Default::default() }
}

async fn create(broker: &Broker, topics: Vec<CreatableTopic>) -> Vec<(ErrorCode, i32)> {
    let request = CreateTopicsRequest { topics, ..Default::default() };
    let response = create_topics::handle(broker, &version(7), request).await;
    response.topics.into_iter().map(|topic| (topic.error_code, topic.num_partitions)).collect()
}

#[tokio::test]
async fn each_topic_of_a_request_has_its_own_error() {
    let broker = broker();
    let assigned = |brokers: Vec<Vec<i32>>| CreatableTopic {
        assignments: (0..)
            .zip(brokers)
            .map(|(i, broker_ids)| CreatableReplicaAssignment { partition_index: i, broker_ids })
            .collect(),
        ..topic("assigned", -1, -1)
    };
    let config = |name: &str, value: Option<&str>| CreatableTopic {
        configs: vec![CreatableTopicConfig { name: name.to_owned(), value: value.map(str::to_owned) }],
        ..topic("configured", -1, -1)
    };
    for (asked, wanted) in [
        (topic("defaults", -1, -1), (ErrorCode::NONE, 1)),
        (topic("three", 3, 1), (ErrorCode::NONE, 3)),
        (topic("three", 3, 1), (ErrorCode::TOPIC_ALREADY_EXISTS, -1)),
        (topic("a/b", 1, 1), (ErrorCode::INVALID_TOPIC, -1)),
        (topic("none", 0, 1), (ErrorCode::INVALID_PARTITIONS, -1)),
        (topic("less", -2, 1), (ErrorCode::INVALID_PARTITIONS, -1)),
        (topic("replicated", 1, 3), (ErrorCode::INVALID_REPLICATION_FACTOR, -1)),
        (topic("replicated", 1, 0), (ErrorCode::INVALID_REPLICATION_FACTOR, -1)),
        (assigned(vec![vec![7], vec![8]]), (ErrorCode::INVALID_REPLICA_ASSIGNMENT, -1)),
        (assigned(vec![vec![7, 8]]), (ErrorCode::INVALID_REPLICA_ASSIGNMENT, -1)),
        (CreatableTopic { num_partitions: 2, ..assigned(vec![vec![7]]) }, (ErrorCode::INVALID_REQUEST, -1)),
        (assigned(vec![vec![7], vec![7]]), (ErrorCode::NONE, 2)),
        (config("cleanup.policy", Some("compact")), (ErrorCode::INVALID_CONFIG, -1)),
        (config("nonsense", Some("1")), (ErrorCode::INVALID_CONFIG, -1)),
        (config("retention.ms", None), (ErrorCode::INVALID_CONFIG, -1)),
        (config("retention.ms", Some("60000")), (ErrorCode::NONE, 1)),
    ] {
        let name = asked.name.clone();
        assert_eq!(create(&broker, vec![asked]).await, [wanted], "{name}");
    }
    let twice = create(&broker, vec![topic("x", 1, 1), topic("y", 1, 1), topic("x", 2, 1)]).await;
    let codes: Vec<ErrorCode> = twice.into_iter().map(|(code, _)| code).collect();
    assert_eq!(codes, [ErrorCode::INVALID_REQUEST, ErrorCode::NONE, ErrorCode::INVALID_REQUEST]);
    assert!(broker.catalogue.topic("x").is_none() && broker.catalogue.topic("y").is_some());

    let only = CreateTopicsRequest { topics: vec![topic("only", 2, -1)], validate_only: true, ..Default::default() };
    let judged = create_topics::handle(&broker, &version(7), only).await.topics.remove(0);
    assert_eq!((judged.error_code, judged.num_partitions, judged.topic_id), (ErrorCode::NONE, 2, Uuid::ZERO));
    assert!(judged.configs.unwrap().iter().any(|config| config.name == "retention.ms"));
    assert!(broker.catalogue.topic("only").is_none());
}

#[tokio::test]
async fn topics_are_deleted_by_name_or_id() {
    let broker = broker();
    create(&broker, vec![topic("a", 1, 1), topic("b", 1, 1), topic("c", 1, 1)]).await;
    let id = |name: &str| Uuid(broker.catalogue.topic(name).unwrap().id.0);
    let state = |name: Option<&str>, topic_id| DeleteTopicState { name: name.map(str::to_owned), topic_id };
    let b = id("b");
    let asked = vec![
        state(Some("a"), Uuid::ZERO),
        state(None, b),
        state(Some("b"), Uuid::ZERO),
        state(None, Uuid([9; 16])),
        state(Some("c"), id("c")),
        state(None, Uuid::ZERO),
    ];
    let request = DeleteTopicsRequest { topics: asked, ..Default::default() };
    let answers = delete_topics::handle(&broker, &version(6), request).await.responses;
    let codes: Vec<ErrorCode> = answers.iter().map(|answer| answer.error_code).collect();
    let wanted = [
        ErrorCode::NONE,
        ErrorCode::NONE,
        ErrorCode::INVALID_REQUEST,
        ErrorCode::UNKNOWN_TOPIC_ID,
        ErrorCode::INVALID_REQUEST,
        ErrorCode::INVALID_REQUEST,
    ];
    assert_eq!(codes, wanted);
    assert_eq!((answers[1].name.as_deref(), answers[1].topic_id), (Some("b"), b));
    let request = DeleteTopicsRequest { topic_names: vec!["c".to_owned(), "c".to_owned()], ..Default::default() };
    let codes: Vec<ErrorCode> =
        delete_topics::handle(&broker, &version(5), request).await.responses.iter().map(|a| a.error_code).collect();
    assert_eq!(codes, [ErrorCode::NONE, ErrorCode::INVALID_REQUEST]);
}

#[tokio::test]
async fn partitions_are_added_and_every_topic_is_answered() {
    use kafka_wire::create_partitions::{CreatePartitionsAssignment, CreatePartitionsRequest, CreatePartitionsTopic};
    let broker = broker();
    create(&broker, vec![topic("a", 1, 1), topic("b", 1, 1)]).await;
    let grow = |name: &str, count, assigned: Option<Vec<i32>>| CreatePartitionsTopic {
        name: name.to_owned(),
        count,
        assignments: assigned
            .map(|ids| ids.into_iter().map(|id| CreatePartitionsAssignment { broker_ids: vec![id] }).collect()),
    };
    let answer = async |topics, validate_only| {
        let request = CreatePartitionsRequest { topics, validate_only, ..Default::default() };
        let results = create_partitions::handle(&broker, &version(3), request).await.results;
        results.into_iter().map(|result| result.error_code).collect::<Vec<_>>()
    };
    let asked = vec![grow("a", 1, None), grow("nothing", 3, None), grow("b", 3, Some(vec![7]))];
    let wanted =
        [ErrorCode::INVALID_PARTITIONS, ErrorCode::UNKNOWN_TOPIC_OR_PARTITION, ErrorCode::INVALID_REPLICA_ASSIGNMENT];
    assert_eq!(answer(asked, false).await, wanted);
    assert_eq!(answer(vec![grow("a", 2, None), grow("a", 3, None)], false).await, [ErrorCode::INVALID_REQUEST; 2]);
    assert_eq!(answer(vec![grow("a", 4, None)], true).await, [ErrorCode::NONE]);
    assert_eq!(broker.catalogue.topic("a").unwrap().partitions, 1);
    assert_eq!(answer(vec![grow("a", 3, Some(vec![7, 7]))], false).await, [ErrorCode::NONE]);
    assert_eq!(broker.catalogue.topic("a").unwrap().partitions, 3);
}

#[tokio::test]
async fn settings_come_complete_with_source_type_and_synonyms() {
    let broker = broker();
    create(&broker, vec![topic("a", 1, 1)]).await;
    let ask = async |api_version, kind, name: &str, keys: Option<Vec<&str>>| -> DescribeConfigsResult {
        let resource = DescribeConfigsResource {
            resource_type: kind,
            resource_name: name.to_owned(),
            configuration_keys: keys.map(|keys| keys.into_iter().map(str::to_owned).collect()),
        };
        let request =
            DescribeConfigsRequest { resources: vec![resource], include_synonyms: true, include_documentation: true };
        describe_configs::handle(&broker, &version(api_version), request).await.results.remove(0)
    };
    let all = ask(4, 2, "a", None).await;
    let policy = all.configs.iter().find(|config| config.name == "cleanup.policy").unwrap();
    assert_eq!((policy.value.as_deref(), policy.config_source, policy.config_type), (Some("delete"), 5, 7));
    assert!(all.configs.iter().all(|c| c.value.is_some() && !c.synonyms.is_empty() && c.documentation.is_some()));
    let some = ask(4, 2, "a", Some(vec!["retention.ms", "no.such"])).await;
    assert_eq!(some.configs.len(), 1);
    for name in ["7", ""] {
        let own = ask(4, 4, name, None).await;
        assert!(own.configs.iter().any(|c| c.name == "broker.id" && c.value.as_deref() == Some("7")));
        assert!(own.configs.is_sorted_by_key(|config| config.name.clone()));
    }
    for (kind, name, wanted) in [
        (2, "none", ErrorCode::UNKNOWN_TOPIC_OR_PARTITION),
        (2, "a/b", ErrorCode::INVALID_TOPIC),
        (4, "8", ErrorCode::INVALID_REQUEST),
        (8, "7", ErrorCode::INVALID_REQUEST),
    ] {
        assert_eq!(ask(4, kind, name, None).await.error_code, wanted);
    }
}

#[tokio::test]
async fn settings_are_altered_in_both_ways_and_each_resource_is_judged_by_itself() {
    use kafka_wire::alter_configs::{AlterConfigsRequest, AlterConfigsResource, AlterableConfig};
    use kafka_wire::incremental_alter_configs::{
        IncrementalAlterConfigsRequest, IncrementalAlterConfigsResource, IncrementalAlterableConfig,
    };
    let broker = broker();
    create(&broker, vec![topic("a", 1, 1), topic("b", 1, 1)]).await;
    let of = |name: &str, config_operation, value: Option<&str>| IncrementalAlterableConfig {
        name: name.to_owned(),
        config_operation,
        value: value.map(str::to_owned),
    };
    let on = |resource_type, name: &str, configs: Vec<_>| IncrementalAlterConfigsResource {
        resource_type,
        resource_name: name.to_owned(),
        configs,
    };
    let alter = async |resources: Vec<_>, validate_only| -> Vec<ErrorCode> {
        let request = IncrementalAlterConfigsRequest { resources, validate_only };
        let answered = incremental_alter_configs::handle(&broker, &version(1), request).await.responses;
        assert!(answered.iter().all(|one| one.error_message.is_some() == (one.error_code != ErrorCode::NONE)));
        answered.into_iter().map(|one| one.error_code).collect()
    };
    let retention = |topic: &str| broker.catalogue.config(&broker.catalogue.topic(topic).unwrap()).retention_ms;
    let week = retention("a");
    let hour = || on(2, "a", vec![of("retention.ms", 0, Some("3600000")), of("max.message.bytes", 0, Some("5000"))]);
    assert_eq!(alter(vec![hour()], true).await, [ErrorCode::NONE]);
    assert_eq!(retention("a"), week, "only checked");
    let resources = vec![
        hour(),
        on(2, "none", vec![]),
        on(4, "7", vec![of("log.retention.ms", 0, Some("1"))]),
        on(8, "7", vec![]),
        on(2, "b", vec![of("retention.ms", 0, Some("soon"))]),
    ];
    let wanted = [
        ErrorCode::NONE,
        ErrorCode::UNKNOWN_TOPIC_OR_PARTITION,
        ErrorCode::INVALID_REQUEST,
        ErrorCode::INVALID_REQUEST,
        ErrorCode::INVALID_CONFIG,
    ];
    assert_eq!(alter(resources, false).await, wanted);
    assert_eq!((retention("a"), retention("b")), (3_600_000, week));
    for refused in [
        vec![of("retention.ms", 0, Some("1")), of("retention.ms", 1, None)],
        vec![of("retention.ms", 0, None)],
        vec![of("retention.ms", 4, Some("1"))],
    ] {
        assert_eq!(alter(vec![on(2, "b", refused)], false).await, [ErrorCode::INVALID_REQUEST]);
    }
    assert_eq!(alter(vec![hour(), hour()], false).await, [ErrorCode::INVALID_REQUEST; 2]);
    let engine = on(2, "a", vec![of("tributary.engine", 0, Some("object"))]);
    assert_eq!(alter(vec![engine], false).await, [ErrorCode::INVALID_CONFIG]);
    assert_eq!(alter(vec![on(2, "a", vec![of("max.message.bytes", 1, None)])], false).await, [ErrorCode::NONE]);
    assert_eq!(broker.catalogue.topic("a").unwrap().configs.len(), 1);

    let replace = async |topic: &str, configs: Vec<(&str, &str)>| {
        let configs = configs
            .into_iter()
            .map(|(name, value)| AlterableConfig { name: name.to_owned(), value: Some(value.to_owned()) })
            .collect();
        let resources = vec![AlterConfigsResource { resource_type: 2, resource_name: topic.to_owned(), configs }];
        let request = AlterConfigsRequest { resources, validate_only: false };
        alter_configs::handle(&broker, &version(2), request).await.responses.remove(0).error_code
    };
    assert_eq!(replace("a", vec![("retention.bytes", "1000")]).await, ErrorCode::NONE);
    assert_eq!(retention("a"), week, "what is not named is the default again");
    assert_eq!(replace("a", vec![("retention.ms", "1"), ("retention.ms", "1")]).await, ErrorCode::INVALID_REQUEST);
    assert_eq!(replace("none", vec![]).await, ErrorCode::UNKNOWN_TOPIC_OR_PARTITION);
}

async fn join(broker: &Broker, api_version: i16, member_id: &str, instance: Option<&str>) -> JoinGroupResponse {
    let request = JoinGroupRequest {
        group_id: "g".to_owned(),
        session_timeout_ms: 10_000,
        rebalance_timeout_ms: 60_000,
        member_id: member_id.to_owned(),
        group_instance_id: instance.map(str::to_owned),
        protocol_type: "consumer".to_owned(),
        protocols: vec![JoinGroupRequestProtocol { name: "range".to_owned(), metadata: Bytes::from_static(b"m") }],
        reason: None,
    };
    join_group::handle(broker, &version(api_version), request).await
}

#[tokio::test]
async fn a_member_joins_as_its_version_wants_it() {
    let broker = broker();
    let old = join(&broker, 3, "", None).await;
    assert_eq!((old.error_code, old.generation_id), (ErrorCode::NONE, 1));
    assert!(old.member_id.starts_with("app-"));
    let leave = LeaveGroupRequest { group_id: "g".to_owned(), member_id: old.member_id, members: vec![] };
    assert_eq!(leave_group::handle(&broker, &version(2), leave.clone()).await.error_code, ErrorCode::NONE);
    assert_eq!(leave_group::handle(&broker, &version(2), leave).await.error_code, ErrorCode::UNKNOWN_MEMBER_ID);

    let first = join(&broker, 9, "", None).await;
    assert_eq!((first.error_code, first.generation_id), (ErrorCode::MEMBER_ID_REQUIRED, -1));
    assert_eq!(first.protocol_name, None);
    let second = join(&broker, 9, &first.member_id, None).await;
    assert_eq!((second.error_code, second.protocol_type.as_deref()), (ErrorCode::NONE, Some("consumer")));
    assert_eq!((second.leader.as_str(), second.members.len()), (first.member_id.as_str(), 1));

    let member = |id: &str| MemberIdentity { member_id: id.to_owned(), ..Default::default() };
    let members = vec![member("nobody"), member(&second.member_id)];
    let leave = LeaveGroupRequest { group_id: "g".to_owned(), members, ..Default::default() };
    let left = leave_group::handle(&broker, &version(5), leave).await;
    assert_eq!(left.error_code, ErrorCode::NONE);
    let codes: Vec<ErrorCode> = left.members.iter().map(|member| member.error_code).collect();
    assert_eq!(codes, [ErrorCode::UNKNOWN_MEMBER_ID, ErrorCode::NONE]);
}

async fn commit(broker: &Broker, group: &str, partitions: Vec<(&str, i32, i64, &str)>) -> Vec<ErrorCode> {
    let topics = partitions
        .into_iter()
        .map(|(name, partition_index, committed_offset, metadata)| OffsetCommitRequestTopic {
            name: name.to_owned(),
            partitions: vec![OffsetCommitRequestPartition {
                partition_index,
                committed_offset,
                committed_leader_epoch: 4,
                committed_metadata: Some(metadata.to_owned()),
            }],
        })
        .collect();
    let request = OffsetCommitRequest {
        group_id: group.to_owned(),
        generation_id_or_member_epoch: -1,
        topics,
        ..Default::default()
    };
    let OffsetCommitResponse { topics, .. } = offset_commit::handle(broker, &version(8), request).await;
    topics.into_iter().map(|topic| topic.partitions[0].error_code).collect()
}

#[tokio::test]
async fn offsets_come_back_as_they_were_committed() {
    let broker = broker();
    create(&broker, vec![topic("a", 2, 1), topic("b", 1, 1)]).await;
    let long = "x".repeat(4097);
    let codes = commit(
        &broker,
        "g",
        vec![
            ("a", 1, 5, "noted"),
            ("b", 0, 6, ""),
            ("a", 2, 7, ""),
            ("none", 0, 8, ""),
            ("a", 0, 9, &long),
            ("a", 0, -2, ""),
        ],
    )
    .await;
    let wanted = [
        ErrorCode::NONE,
        ErrorCode::NONE,
        ErrorCode::UNKNOWN_TOPIC_OR_PARTITION,
        ErrorCode::UNKNOWN_TOPIC_OR_PARTITION,
        ErrorCode::OFFSET_METADATA_TOO_LARGE,
        ErrorCode::INVALID_REQUEST,
    ];
    assert_eq!(codes, wanted);

    let some = vec![
        OffsetFetchRequestTopic { name: "a".to_owned(), partition_indexes: vec![1, 0, -3, 1] },
        OffsetFetchRequestTopic { name: "none".to_owned(), partition_indexes: vec![0] },
    ];
    let request = OffsetFetchRequest { group_id: "g".to_owned(), topics: Some(some), ..Default::default() };
    let fetched = offset_fetch::handle(&broker, &version(7), request).await;
    let first = &fetched.topics[0].partitions[0];
    assert_eq!((first.committed_offset, first.committed_leader_epoch), (5, 4));
    assert_eq!(first.metadata.as_deref(), Some("noted"));
    let absent: Vec<i64> =
        fetched.topics.iter().flat_map(|t| &t.partitions).skip(1).map(|p| p.committed_offset).collect();
    assert_eq!(absent, [-1, -1, -1, -1]);
    assert_eq!(fetched.topics[0].partitions[3].error_code, ErrorCode::INVALID_REQUEST, "asked for twice");

    let group = |id: &str| OffsetFetchRequestGroup { group_id: id.to_owned(), topics: None, ..Default::default() };
    let request = OffsetFetchRequest { groups: vec![group("g"), group("none"), group("g")], ..Default::default() };
    let fetched = offset_fetch::handle(&broker, &version(8), request).await.groups;
    assert_eq!(fetched[0].topics.len(), 2, "null topics are all topics");
    assert_eq!((fetched[1].topics.len(), fetched[1].error_code), (0, ErrorCode::NONE));
    assert_eq!(fetched[2].error_code, ErrorCode::INVALID_REQUEST);

    // With a member in the group, a commit from outside is refused, for every partition that was right by itself.
    join(&broker, 3, "", None).await;
    let codes = commit(&broker, "g", vec![("a", 1, 6, ""), ("none", 0, 6, "")]).await;
    assert_eq!(codes, [ErrorCode::UNKNOWN_MEMBER_ID, ErrorCode::UNKNOWN_TOPIC_OR_PARTITION]);
}

#[tokio::test]
async fn groups_are_listed_described_and_deleted() {
    use kafka_wire::delete_groups::DeleteGroupsRequest;
    use kafka_wire::describe_groups::DescribeGroupsRequest;
    use kafka_wire::list_groups::ListGroupsRequest;
    use kafka_wire::offset_delete::{OffsetDeleteRequest, OffsetDeleteRequestPartition, OffsetDeleteRequestTopic};
    let broker = broker();
    create(&broker, vec![topic("a", 1, 1)]).await;
    commit(&broker, "tool", vec![("a", 0, 1, "")]).await;
    let member = join(&broker, 3, "", None).await.member_id;
    let list = async |states: &[&str], types: &[&str]| {
        let own = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let request = ListGroupsRequest { states_filter: own(states), types_filter: own(types) };
        let listed = list_groups::handle(&broker, &version(5), request).await.groups;
        listed.into_iter().map(|group| format!("{} {}", group.group_id, group.group_state)).collect::<Vec<_>>()
    };
    assert_eq!(list(&[], &[]).await, ["g CompletingRebalance", "tool Empty"]);
    assert_eq!(list(&["empty"], &["Classic"]).await, ["tool Empty"]);
    assert!(list(&[], &["consumer"]).await.is_empty());

    let groups: Vec<String> = ["g", "none", "g"].iter().map(|group| (*group).to_owned()).collect();
    let request = DescribeGroupsRequest { groups, include_authorized_operations: true };
    let described = describe_groups::handle(&broker, &version(6), request.clone()).await.groups;
    assert_eq!(described.len(), 2);
    assert_eq!(
        (described[0].members[0].client_host.as_str(), described[0].protocol_type.as_str()),
        ("/192.0.2.1", "consumer")
    );
    assert_eq!(described[1].error_code, ErrorCode::GROUP_ID_NOT_FOUND);
    let described = describe_groups::handle(&broker, &version(5), request).await.groups;
    assert_eq!((described[1].error_code, described[1].group_state.as_str()), (ErrorCode::NONE, "Dead"));

    let delete_offset = async |group: &str, partition_index| {
        let partitions = vec![OffsetDeleteRequestPartition { partition_index }];
        let topics = vec![OffsetDeleteRequestTopic { name: "a".to_owned(), partitions }];
        let request = OffsetDeleteRequest { group_id: group.to_owned(), topics };
        let response = offset_delete::handle(&broker, &version(0), request).await;
        (response.error_code, response.topics.first().map(|topic| topic.partitions[0].error_code))
    };
    assert_eq!(delete_offset("none", 0).await, (ErrorCode::GROUP_ID_NOT_FOUND, None));
    assert_eq!(delete_offset("g", 0).await, (ErrorCode::NONE, Some(ErrorCode::GROUP_SUBSCRIBED_TO_TOPIC)));
    assert_eq!(delete_offset("tool", 1).await, (ErrorCode::NONE, Some(ErrorCode::UNKNOWN_TOPIC_OR_PARTITION)));
    assert_eq!(delete_offset("tool", 0).await, (ErrorCode::NONE, Some(ErrorCode::NONE)));

    let delete = async || {
        let groups_names = vec!["g".to_owned(), "tool".to_owned(), "none".to_owned()];
        let request = DeleteGroupsRequest { groups_names };
        let results = delete_groups::handle(&broker, &version(2), request).await.results;
        results.into_iter().map(|result| result.error_code).collect::<Vec<_>>()
    };
    assert_eq!(delete().await, [ErrorCode::NON_EMPTY_GROUP, ErrorCode::NONE, ErrorCode::GROUP_ID_NOT_FOUND]);
    broker.groups.leave("g", &[(member, None)]).unwrap();
    assert_eq!(delete().await, [ErrorCode::NONE, ErrorCode::GROUP_ID_NOT_FOUND, ErrorCode::GROUP_ID_NOT_FOUND]);
    assert!(list(&[], &[]).await.is_empty());
}

/// Kafka answers so when offsets are not stored in time, and clients try again.
#[tokio::test(start_paused = true)]
async fn what_a_silent_shard_does_not_store_is_answered_in_time_and_together() {
    use kafka_wire::delete_groups::DeleteGroupsRequest;
    let names = ["a", "b", "c"].map(str::to_owned);
    let touched = names.clone().map(|group| {
        GroupChange::Touched { group, protocol_type: "consumer".to_owned(), empty_since_ms: Some(1) }.into()
    });
    let broker = broker_with(Silent(MemoryStateLog::with(&touched)));
    create(&broker, vec![topic("t", 1, 1)]).await;
    let begun = tokio::time::Instant::now();
    let request = DeleteGroupsRequest { groups_names: names.to_vec() };
    let results = delete_groups::handle(&broker, &version(2), request).await.results;
    let deleted: Vec<_> = results.into_iter().map(|result| (result.group_id, result.error_code)).collect();
    assert_eq!(deleted, names.map(|name| (name, ErrorCode::COORDINATOR_NOT_AVAILABLE)));
    assert_eq!(begun.elapsed(), broker.groups.settings().commit_timeout);
    let committed = commit(&broker, "a", vec![("t", 0, 1, ""), ("none", 0, 1, "")]).await;
    assert_eq!(committed, [ErrorCode::COORDINATOR_NOT_AVAILABLE, ErrorCode::UNKNOWN_TOPIC_OR_PARTITION]);
    assert_eq!(begun.elapsed(), 2 * broker.groups.settings().commit_timeout);
}

#[tokio::test]
async fn deleted_records_are_gone_from_the_start() {
    use kafka_wire::delete_records::{DeleteRecordsPartition, DeleteRecordsRequest, DeleteRecordsTopic};
    let broker = broker();
    create(&broker, vec![topic("a", 1, 1)]).await;
    let partition = broker.catalogue.partition("a", 0).unwrap();
    for _ in 0..5 {
        let append = Append { partition, batch: one_record(), source: Source::Producer };
        broker.log.append(append).await.unwrap();
    }
    let delete = async |partition_index, offset| {
        let partitions = vec![DeleteRecordsPartition { partition_index, offset }];
        let topics = vec![DeleteRecordsTopic { name: "a".to_owned(), partitions }];
        let request = DeleteRecordsRequest { topics, timeout_ms: 1000 };
        let result = delete_records::handle(&broker, &version(2), request).await.topics.remove(0).partitions.remove(0);
        (result.error_code, result.low_watermark)
    };
    assert_eq!(delete(0, 3).await, (ErrorCode::NONE, 3));
    assert_eq!(delete(0, 1).await, (ErrorCode::NONE, 3), "never down");
    assert_eq!(delete(0, 6).await, (ErrorCode::OFFSET_OUT_OF_RANGE, -1));
    assert_eq!(delete(0, -2).await, (ErrorCode::OFFSET_OUT_OF_RANGE, -1));
    assert_eq!(delete(1, 0).await, (ErrorCode::UNKNOWN_TOPIC_OR_PARTITION, -1));
    assert_eq!(delete(0, -1).await, (ErrorCode::NONE, 5));
    assert_eq!(broker.log.bounds(partition).unwrap().log_start, 5);
}

fn one_record() -> Batch {
    let mut builder = BatchBuilder::with_capacity(64);
    builder.push(1_700_000_000_000, None, Some(b"value"), &[]);
    builder.finish(0, Compression::None)
}

#[tokio::test]
async fn this_node_is_cluster_and_coordinator() {
    use kafka_wire::describe_cluster::DescribeClusterRequest;
    let broker = broker();
    let keys = vec!["g".to_owned(), "h".to_owned()];
    let request = FindCoordinatorRequest { coordinator_keys: keys, ..Default::default() };
    let found = find_coordinator::handle(&broker, &version(4), request).await.coordinators;
    assert_eq!((found.len(), found[0].node_id, found[1].host.as_str()), (2, 7, "broker.example"));
    let request = FindCoordinatorRequest { key: "t".to_owned(), key_type: 1, ..Default::default() };
    let found = find_coordinator::handle(&broker, &version(2), request).await;
    assert_eq!((found.error_code, found.node_id), (ErrorCode::INVALID_REQUEST, -1));
    let request = |endpoint_type| DescribeClusterRequest { endpoint_type, ..Default::default() };
    let cluster = describe_cluster::handle(&broker, &version(2), request(1)).await;
    assert_eq!((cluster.cluster_id.as_str(), cluster.controller_id, cluster.brokers[0].port), ("cluster", 7, 9092));
    let cluster = describe_cluster::handle(&broker, &version(2), request(2)).await;
    assert_eq!(cluster.error_code, ErrorCode::MISMATCHED_ENDPOINT_TYPE);
}

#[tokio::test(start_paused = true)]
async fn a_store_that_does_not_answer_costs_a_producer_its_time_out_and_no_more() {
    let mut broker = broker();
    let log = Arc::new(FaultyLog::new(broker.log.clone()));
    broker.log = log.clone();
    broker.catalogue.find_or_create("t", Some(1)).await.unwrap();
    let request = |acks, timeout_ms| {
        let records = Some(conformance::batch(1, 1).into_bytes());
        let topic =
            TopicProduceData { name: "t".to_owned(), partition_data: vec![PartitionProduceData { index: 0, records }] };
        ProduceRequest { acks, timeout_ms, topic_data: vec![topic], ..Default::default() }
    };
    for (timeout_ms, waited) in [(30_000, 30), (0, 1), (-1, 1), (i32::MAX, 300)] {
        log.script([Fault::Hold]);
        let began = tokio::time::Instant::now();
        let begun = super::produce::begin(&broker, &version(9), request(-1, timeout_ms));
        let answer = begun.answer().await.unwrap().unwrap();
        assert_eq!(answer.responses[0].partition_responses[0].error_code, ErrorCode::REQUEST_TIMED_OUT);
        assert_eq!(began.elapsed().as_secs(), waited, "{timeout_ms}");
    }
    let answer = super::produce::begin(&broker, &version(9), request(1, 1)).answer().await.unwrap().unwrap();
    assert_eq!(answer.responses[0].partition_responses[0].error_code, ErrorCode::NONE);
}
