//! IncrementalAlterConfigs (KIP-339): each setting named is changed, the others stay.

use futures_util::future::join_all;
use kafka_wire::ErrorCode;
use kafka_wire::incremental_alter_configs::{
    IncrementalAlterConfigsRequest, IncrementalAlterConfigsResource, IncrementalAlterConfigsResourceResponse,
    IncrementalAlterConfigsResponse, IncrementalAlterableConfig,
};

use super::alter_configs::{check, configure};
use super::refused::{Refused, Repeated, outcome};
use super::{Broker, RequestContext};
use crate::catalogue::configs::{self, Alteration};

/// Answers IncrementalAlterConfigs.
pub async fn handle(
    broker: &Broker,
    _: &RequestContext,
    request: IncrementalAlterConfigsRequest,
) -> IncrementalAlterConfigsResponse {
    let repeated = Repeated::among(request.resources.iter().map(|one| (one.resource_type, one.resource_name.clone())));
    let answers = request.resources.into_iter().map(async |resource| {
        let IncrementalAlterConfigsResource { resource_type, resource_name, configs } = resource;
        let names = configs.iter().map(|one| one.name.as_str());
        let alterations = check(&repeated, resource_type, &resource_name, names)
            .and_then(|()| configs.into_iter().map(alteration).collect::<Result<Vec<_>, Refused>>());
        let altered = match alterations {
            Ok(alterations) => {
                let altered = |current: &_, settings: &_| configs::alter(current, alterations, settings);
                configure(broker, &resource_name, request.validate_only, altered).await
            }
            Err(refused) => Err(refused),
        };
        let (error_code, error_message) = outcome(altered);
        IncrementalAlterConfigsResourceResponse { error_code, error_message, resource_type, resource_name }
    });
    IncrementalAlterConfigsResponse { responses: join_all(answers).await, ..Default::default() }
}

fn alteration(wanted: IncrementalAlterableConfig) -> Result<(String, Alteration), Refused> {
    let IncrementalAlterableConfig { name, config_operation, value } = wanted;
    let alteration: fn(String) -> Alteration = match config_operation {
        0 => Alteration::Set,
        1 => return Ok((name, Alteration::Delete)),
        2 => Alteration::Append,
        3 => Alteration::Subtract,
        other => {
            let text = format!("operation {other}: expected 0 (set), 1 (delete), 2 (append) or 3 (subtract)");
            return Err((ErrorCode::INVALID_REQUEST, text));
        }
    };
    match value {
        Some(value) => Ok((name, alteration(value))),
        None => Err((ErrorCode::INVALID_REQUEST, "a setting without value: delete it instead".to_owned())),
    }
}
