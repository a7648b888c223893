//! AlterConfigs: a topic has the settings named and no others. What both ways of altering have in common is here.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use futures_util::future::join_all;
use kafka_wire::ErrorCode;
use kafka_wire::alter_configs::{
    AlterConfigsRequest, AlterConfigsResource, AlterConfigsResourceResponse, AlterConfigsResponse,
};
use tokio::time::Instant;

use super::describe_configs::{BROKER, TOPIC};
use super::{Broker, RequestContext};
use crate::catalogue::{CatalogueSettings, configs, within};

/// How long an answer waits for what must be durable first: these requests have no time-out of their own, and clients give
/// up after 30 s. After it the answer is REQUEST_TIMED_OUT, and a change that has begun goes on.
const PATIENCE: Duration = Duration::from_secs(20);

/// Answers AlterConfigs.
pub async fn handle(broker: &Broker, _: &RequestContext, request: AlterConfigsRequest) -> AlterConfigsResponse {
    let named = Named::of(request.resources.iter().map(|one| (one.resource_type, one.resource_name.as_str())));
    let answers = request.resources.into_iter().map(async |resource| {
        let AlterConfigsResource { resource_type, resource_name, configs: wanted } = resource;
        let wanted: Vec<_> = wanted.into_iter().map(|one| (one.name, one.value)).collect();
        let altered = match named.check(resource_type, &resource_name, wanted.iter().map(|(name, _)| name.as_str())) {
            Ok(()) => {
                let altered = |current: &_, settings: &_| configs::replace(current, &wanted, settings);
                configure(broker, &resource_name, request.validate_only, altered).await
            }
            Err(refused) => Err(refused),
        };
        let (error_code, error_message) = answer(altered);
        AlterConfigsResourceResponse { error_code, error_message, resource_type, resource_name }
    });
    AlterConfigsResponse { responses: join_all(answers).await, ..Default::default() }
}

/// A refusal, and why.
pub(super) type Refused = (ErrorCode, String);

/// How often each resource is named in a request.
pub(super) struct Named(HashMap<(i8, String), usize>);

impl Named {
    pub(super) fn of<'a>(resources: impl Iterator<Item = (i8, &'a str)>) -> Self {
        let mut named: HashMap<(i8, String), usize> = HashMap::new();
        for (kind, name) in resources {
            *named.entry((kind, name.to_owned())).or_default() += 1;
        }
        Self(named)
    }

    /// Whether the resource is one whose settings can be altered, and it and each setting are named once.
    pub(super) fn check<'a>(
        &self,
        kind: i8,
        name: &str,
        mut settings: impl Iterator<Item = &'a str>,
    ) -> Result<(), Refused> {
        let refused = |text: String| Err((ErrorCode::INVALID_REQUEST, text));
        if self.0.get(&(kind, name.to_owned())).is_some_and(|times| *times > 1) {
            return refused("the resource is named more than once in the request".to_owned());
        }
        match kind {
            TOPIC => {}
            BROKER => {
                return refused("a broker's settings are in its configuration file and read when it starts".to_owned());
            }
            other => return refused(format!("settings of resource type {other} are not served")),
        }
        let mut seen = HashSet::new();
        match settings.find(|name| !seen.insert(*name)) {
            Some(twice) => {
                let twice: String = twice.chars().take(128).collect();
                refused(format!("setting {twice:?} is named more than once"))
            }
            None => Ok(()),
        }
    }
}

pub(super) async fn configure(
    broker: &Broker,
    topic: &str,
    validate_only: bool,
    altered: impl FnOnce(&BTreeMap<String, String>, &CatalogueSettings) -> Result<BTreeMap<String, String>, String>,
) -> Result<(), Refused> {
    let configured = broker.catalogue.configure(topic, validate_only, altered);
    let configured = within(Instant::now() + PATIENCE, configured).await;
    configured.map_err(|error| (ErrorCode(error.code()), error.to_string()))
}

pub(super) fn answer(altered: Result<(), Refused>) -> (ErrorCode, Option<String>) {
    match altered {
        Ok(()) => (ErrorCode::NONE, None),
        Err((code, text)) => (code, Some(text)),
    }
}
