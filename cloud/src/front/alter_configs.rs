//! AlterConfigs: a topic has the settings named and no others. What both ways of altering have in common is here.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use futures_util::future::join_all;
use kafka_wire::ErrorCode;
use kafka_wire::alter_configs::{
    AlterConfigsRequest, AlterConfigsResource, AlterConfigsResourceResponse, AlterConfigsResponse,
};
use tokio::time::Instant;

use super::describe_configs::{BROKER, TOPIC};
use super::refused::{Refused, Repeated, outcome};
use super::{Broker, RequestContext};
use crate::catalogue::{CatalogueSettings, configs, within};

/// How long an answer waits for what must be durable first: these requests have no time-out of their own, and clients give
/// up after 30 s. After it the answer is REQUEST_TIMED_OUT, and a change that has begun goes on.
const PATIENCE: Duration = Duration::from_secs(20);

/// Answers AlterConfigs.
pub async fn handle(broker: &Broker, _: &RequestContext, request: AlterConfigsRequest) -> AlterConfigsResponse {
    let repeated = Repeated::among(request.resources.iter().map(|one| (one.resource_type, one.resource_name.clone())));
    let answers = request.resources.into_iter().map(async |resource| {
        let AlterConfigsResource { resource_type, resource_name, configs: wanted } = resource;
        let wanted: Vec<_> = wanted.into_iter().map(|one| (one.name, one.value)).collect();
        let names = wanted.iter().map(|(name, _)| name.as_str());
        let altered = match check(&repeated, resource_type, &resource_name, names) {
            Ok(()) => {
                let altered = |current: &_, settings: &_| configs::replace(current, &wanted, settings);
                configure(broker, &resource_name, request.validate_only, altered).await
            }
            refused => refused,
        };
        let (error_code, error_message) = outcome(altered);
        AlterConfigsResourceResponse { error_code, error_message, resource_type, resource_name }
    });
    AlterConfigsResponse { responses: join_all(answers).await, ..Default::default() }
}

/// Whether a resource is one whose settings can be altered, and it and each setting are named once.
pub(super) fn check<'a>(
    repeated: &Repeated<(i8, String)>,
    kind: i8,
    name: &str,
    mut settings: impl Iterator<Item = &'a str>,
) -> Result<(), Refused> {
    let refused = |text: String| Err((ErrorCode::INVALID_REQUEST, text));
    repeated.check(&(kind, name.to_owned()), "the resource")?;
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
