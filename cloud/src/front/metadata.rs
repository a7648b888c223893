//! Metadata: this broker, its topics and their partitions.
//!
//! - One node leads and holds everything: replicas = in-sync replicas = leader. It is told under the address of the
//!   listener the client came through.
//! - A topic that is asked for by name and does not exist is made, when both the client and the settings allow, and is
//!   answered ready; if that takes too long, LEADER_NOT_AVAILABLE, and the client asks again. Asking for all topics makes none.
//! - A topic asked for twice is answered once, or a small request could ask for a boundless answer.
//! - v0 asks for all with an empty list, later versions with null. v12 asks by id too.

use std::collections::HashSet;
use std::time::Duration;

use futures_util::future::join_all;
use kafka_wire::metadata::{
    MetadataRequest, MetadataRequestTopic, MetadataResponse, MetadataResponseBroker, MetadataResponsePartition,
    MetadataResponseTopic, OPERATIONS_UNKNOWN,
};
use kafka_wire::{ErrorCode, Uuid};
use shared::limited;
use shared::name::{Partition, TopicId, TopicName};
use tokio::time::Instant;

use super::{Broker, RequestContext, operations};
use crate::catalogue::{CatalogueError, within};
use crate::state::Topic;

/// The first version that asks by id.
const BY_ID_VERSION_MIN: i16 = 12;

/// How long topics that are asked for are waited for: well below clients' own time-outs, as the request gives none.
const CREATION_PATIENCE: Duration = Duration::from_secs(5);

/// Answers a Metadata.
pub async fn handle(broker: &Broker, context: &RequestContext, request: MetadataRequest) -> MetadataResponse {
    let view = View {
        node_id: broker.node_id,
        operations: match request.include_topic_authorized_operations {
            true => operations::TOPIC,
            false => OPERATIONS_UNKNOWN,
        },
    };
    let topics = match request.topics {
        None => view.all(broker),
        Some(asked) if asked.is_empty() && context.api_version == 0 => view.all(broker),
        Some(asked) => {
            let create = request.allow_auto_topic_creation && broker.settings.auto_create_topics;
            let deadline = Instant::now() + CREATION_PATIENCE;
            let mut seen = HashSet::new();
            let once = asked.into_iter().filter(|asked| seen.insert((asked.name.clone(), asked.topic_id)));
            let (view, version) = (&view, context.api_version);
            let shown = once.map(|asked| async move {
                match asked.name {
                    Some(name) => view.named(broker, name, create.then_some(deadline)).await,
                    None => view.identified(broker, version, &asked),
                }
            });
            join_all(shown).await
        }
    };
    MetadataResponse {
        brokers: vec![MetadataResponseBroker {
            node_id: broker.node_id,
            host: context.listener.advertised_host.clone(),
            port: context.listener.advertised_port.into(),
            rack: None,
        }],
        cluster_id: Some(broker.cluster_id.clone()),
        controller_id: broker.node_id,
        topics,
        cluster_authorized_operations: match request.include_cluster_authorized_operations {
            true => operations::CLUSTER,
            false => OPERATIONS_UNKNOWN,
        },
        ..Default::default()
    }
}

/// How topics are to be shown.
struct View {
    node_id: i32,
    operations: i32,
}

impl View {
    fn all(&self, broker: &Broker) -> Vec<MetadataResponseTopic> {
        let topics = broker.catalogue.topics();
        topics.iter().map(|topic| self.topic(broker, topic)).collect()
    }

    async fn named(&self, broker: &Broker, name: String, create: Option<Instant>) -> MetadataResponseTopic {
        let Ok(valid) = TopicName::parse(&name) else {
            return self.missing(ErrorCode::INVALID_TOPIC, Some(name), Uuid::ZERO);
        };
        if let Some(topic) = self.find(broker, &valid) {
            return topic;
        }
        let Some(deadline) = create else {
            return self.missing(ErrorCode::UNKNOWN_TOPIC_OR_PARTITION, Some(name), Uuid::ZERO);
        };
        let error = match within(deadline, broker.catalogue.find_or_create(&name, None)).await {
            Ok(_) => match self.find(broker, &valid) {
                Some(topic) => return topic,
                // Deleted again at once: the client asks again.
                None => ErrorCode::LEADER_NOT_AVAILABLE,
            },
            Err(CatalogueError::TimedOut) => ErrorCode::LEADER_NOT_AVAILABLE,
            Err(error) => {
                limited!(info, topic = name, %error, "a topic could not be made for a client that asked for it");
                ErrorCode(error.code())
            }
        };
        self.missing(error, Some(name), Uuid::ZERO)
    }

    fn find(&self, broker: &Broker, name: &TopicName) -> Option<MetadataResponseTopic> {
        broker.catalogue.topic(name.as_str()).map(|topic| self.topic(broker, &topic))
    }

    fn identified(&self, broker: &Broker, version: i16, asked: &MetadataRequestTopic) -> MetadataResponseTopic {
        let id = asked.topic_id;
        if version < BY_ID_VERSION_MIN || id.is_zero() {
            return self.missing(ErrorCode::INVALID_REQUEST, None, id);
        }
        let found = broker.catalogue.topic_by_id(TopicId(id.0)).map(|topic| self.topic(broker, &topic));
        found.unwrap_or_else(|| self.missing(ErrorCode::UNKNOWN_TOPIC_ID, None, id))
    }

    fn missing(&self, error_code: ErrorCode, name: Option<String>, topic_id: Uuid) -> MetadataResponseTopic {
        MetadataResponseTopic { error_code, name, topic_id, ..Default::default() }
    }

    fn topic(&self, broker: &Broker, topic: &Topic) -> MetadataResponseTopic {
        let partitions = (0..topic.partitions).map(|index| {
            let bounds = broker.log.bounds(Partition { topic: topic.id, index });
            MetadataResponsePartition {
                partition_index: index as i32,
                leader_id: self.node_id,
                leader_epoch: bounds.map_or(-1, |bounds| bounds.leader_epoch),
                replica_nodes: vec![self.node_id],
                isr_nodes: vec![self.node_id],
                ..Default::default()
            }
        });
        MetadataResponseTopic {
            name: Some(topic.name.to_string()),
            topic_id: Uuid(topic.id.0),
            partitions: partitions.collect(),
            topic_authorized_operations: self.operations,
            ..Default::default()
        }
    }
}
