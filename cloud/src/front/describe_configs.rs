//! DescribeConfigs: every setting of a topic or of this broker, with source and synonyms.
//!
//! - No names, or null, ask for all settings. v3 adds types and, if asked for, documentation.
//! - A resource named twice is refused the second time, or a small request could ask for a boundless answer.
//! - Broker settings are shown under Kafka's names where there is one that means the same; they are set in `cloud.toml`.

use std::collections::HashSet;

use kafka_wire::ErrorCode;
use kafka_wire::describe_configs::{
    DescribeConfigsRequest, DescribeConfigsResource, DescribeConfigsResourceResult, DescribeConfigsResponse,
    DescribeConfigsResult, DescribeConfigsSynonym,
};
use shared::name::TopicName;

use super::{Broker, FrontSettings, RequestContext};
use crate::catalogue::CatalogueSettings;
use crate::catalogue::configs::{self, ConfigEntry, ConfigSource, ConfigType};
use crate::groups::GroupSettings;

/// Resource types, as requests about settings number them.
pub(super) const TOPIC: i8 = 2;
pub(super) const BROKER: i8 = 4;

/// Answers DescribeConfigs.
pub async fn handle(
    broker: &Broker,
    context: &RequestContext,
    request: DescribeConfigsRequest,
) -> DescribeConfigsResponse {
    let mut seen = HashSet::new();
    let mut results = Vec::with_capacity(request.resources.len());
    for resource in request.resources {
        let described = if seen.insert((resource.resource_type, resource.resource_name.clone())) {
            describe(broker, context, &resource)
        } else {
            Err((ErrorCode::INVALID_REQUEST, "the resource is named more than once in the request".to_owned()))
        };
        let mut result = DescribeConfigsResult {
            resource_type: resource.resource_type,
            resource_name: resource.resource_name,
            ..Default::default()
        };
        match described {
            Ok(entries) => {
                let keys = resource.configuration_keys.filter(|keys| !keys.is_empty());
                let asked = |entry: &ConfigEntry| keys.as_ref().is_none_or(|keys| keys.iter().any(|k| k == entry.name));
                let answer = |entry| answer(entry, request.include_synonyms, request.include_documentation);
                result.configs = entries.into_iter().filter(asked).map(answer).collect();
            }
            Err((code, text)) => (result.error_code, result.error_message) = (code, Some(text)),
        }
        results.push(result);
    }
    DescribeConfigsResponse { results, ..Default::default() }
}

fn describe(
    broker: &Broker,
    context: &RequestContext,
    resource: &DescribeConfigsResource,
) -> Result<Vec<ConfigEntry>, (ErrorCode, String)> {
    let name = resource.resource_name.as_str();
    match resource.resource_type {
        TOPIC => {
            TopicName::parse(name).map_err(|error| (ErrorCode::INVALID_TOPIC, error.to_string()))?;
            let topic = broker.catalogue.topic(name);
            let topic =
                topic.ok_or_else(|| (ErrorCode::UNKNOWN_TOPIC_OR_PARTITION, format!("there is no topic {name:?}")))?;
            Ok(configs::describe(&topic.configs, broker.catalogue.settings()))
        }
        BROKER if name.is_empty() || name == broker.node_id.to_string() => Ok(of_broker(broker, context)),
        BROKER => {
            let text = format!("broker {name:?}: expected {} or an empty name", broker.node_id);
            Err((ErrorCode::INVALID_REQUEST, text))
        }
        other => Err((ErrorCode::INVALID_REQUEST, format!("settings of resource type {other} are not served"))),
    }
}

fn answer(entry: ConfigEntry, with_synonyms: bool, with_documentation: bool) -> DescribeConfigsResourceResult {
    let synonym = |(name, value, source): (&'static str, String, ConfigSource)| DescribeConfigsSynonym {
        name: name.to_owned(),
        value: Some(value),
        source: source as i8,
    };
    DescribeConfigsResourceResult {
        name: entry.name.to_owned(),
        value: Some(entry.value),
        read_only: entry.read_only,
        config_source: entry.source as i8,
        is_sensitive: false,
        synonyms: if with_synonyms { entry.synonyms.into_iter().map(synonym).collect() } else { Vec::new() },
        config_type: entry.kind as i8,
        documentation: with_documentation.then(|| entry.documentation.to_owned()),
    }
}

/// What the broker does, under Kafka's names.
fn of_broker(broker: &Broker, context: &RequestContext) -> Vec<ConfigEntry> {
    let (catalogue, groups, front) = (broker.catalogue.settings(), broker.groups.settings(), &broker.settings);
    let (catalogue0, groups0, front0) =
        (CatalogueSettings::default(), GroupSettings::default(), FrontSettings::default());
    let listener = &context.listener;
    let mut entries = configs::describe_broker(catalogue);
    let mut add = |name, kind, value: String, default: Option<String>, documentation| {
        entries.push(setting(name, kind, value, default, documentation));
    };
    let minutes = |groups: &GroupSettings| (groups.offsets_retention.as_secs() / 60).to_string();
    let idle = |front: &FrontSettings| front.idle_timeout.as_millis().to_string();
    use ConfigType::{Boolean, Int, List, Long};
    add(
        "advertised.listeners",
        List,
        format!("{}://{}:{}", listener.name, listener.advertised_host, listener.advertised_port),
        None,
        "The address this client was told to come back to.",
    );
    add(
        "auto.create.topics.enable",
        Boolean,
        front.auto_create_topics.to_string(),
        Some(front0.auto_create_topics.to_string()),
        "A client that asks for a topic that is not there gets it made, if it allows that.",
    );
    add("broker.id", Int, broker.node_id.to_string(), None, "This node's number.");
    add("node.id", Int, broker.node_id.to_string(), None, "This node's number.");
    add(
        "connections.max.idle.ms",
        Long,
        idle(front),
        Some(idle(&front0)),
        "A connection without a request for so long is closed.",
    );
    add("default.replication.factor", Int, "1".into(), Some("1".into()), "A partition has one replica.");
    add("delete.topic.enable", Boolean, "true".into(), Some("true".into()), "Topics can be deleted.");
    add(
        "fetch.max.bytes",
        Int,
        front.fetch_bytes_max.to_string(),
        Some(front0.fetch_bytes_max.to_string()),
        "Most record bytes in one Fetch response.",
    );
    add(
        "group.initial.rebalance.delay.ms",
        Int,
        groups.initial_rebalance_delay_ms.to_string(),
        Some(groups0.initial_rebalance_delay_ms.to_string()),
        "How long the first rebalance of an empty group waits for more members.",
    );
    add(
        "group.max.session.timeout.ms",
        Int,
        groups.session_timeout_ms_max.to_string(),
        Some(groups0.session_timeout_ms_max.to_string()),
        "Longest session timeout a member may ask for.",
    );
    add(
        "group.max.size",
        Int,
        groups.members_max.to_string(),
        Some(groups0.members_max.to_string()),
        "Most members of one group.",
    );
    add(
        "group.min.session.timeout.ms",
        Int,
        groups.session_timeout_ms_min.to_string(),
        Some(groups0.session_timeout_ms_min.to_string()),
        "Shortest session timeout a member may ask for.",
    );
    add(
        "num.partitions",
        Int,
        catalogue.default_partitions.to_string(),
        Some(catalogue0.default_partitions.to_string()),
        "Partitions of a topic that does not say.",
    );
    add(
        "offset.metadata.max.bytes",
        Int,
        groups.offset_metadata_bytes_max.to_string(),
        Some(groups0.offset_metadata_bytes_max.to_string()),
        "Longest metadata string of a committed offset.",
    );
    add(
        "offsets.retention.minutes",
        Int,
        minutes(groups),
        Some(minutes(&groups0)),
        "How long offsets are kept once their group has no members.",
    );
    add(
        "socket.request.max.bytes",
        Int,
        front.request_bytes_max.to_string(),
        Some(front0.request_bytes_max.to_string()),
        "Largest request.",
    );
    entries.sort_by_key(|entry| entry.name);
    entries
}

/// A setting of the broker. Without a default it can only come from the configuration.
fn setting(
    name: &'static str,
    kind: ConfigType,
    value: String,
    default: Option<String>,
    documentation: &'static str,
) -> ConfigEntry {
    let source = if default.as_ref() == Some(&value) { ConfigSource::Default } else { ConfigSource::Broker };
    let mut synonyms = Vec::with_capacity(2);
    if source == ConfigSource::Broker {
        synonyms.push((name, value.clone(), ConfigSource::Broker));
    }
    synonyms.extend(default.map(|default| (name, default, ConfigSource::Default)));
    ConfigEntry { name, value, kind, source, read_only: true, synonyms, documentation }
}
