//! InitProducerId: an identity for idempotent producers.
//!
//! Ids come in ranges that are in the log before the first of them is given out, so none is given out twice, whatever
//! crashes. Transactions are not served: a transactional id is answered INVALID_REQUEST, and the broker's log says why.
//! A producer that names the id it has gets a new one (as in Kafka without a transactional id); clients raise the epoch
//! of an idempotent producer themselves (KIP-360).

use std::ops::Range;

use kafka_wire::ErrorCode;
use kafka_wire::init_producer_id::{InitProducerIdRequest, InitProducerIdResponse};
use shared::limited;
use tokio::sync::Mutex;

use super::produce::refuse_append;
use super::{Broker, RequestContext};
use crate::state::{Change, ProducerChange, read_state};

/// Ids reserved in one append.
const RANGE: i64 = 1000;

/// Ids that are reserved and not given out yet.
#[derive(Debug, Default)]
pub(super) struct ProducerIds {
    free: Mutex<Range<i64>>,
}

/// Answers an InitProducerId.
pub async fn handle(
    broker: &Broker,
    context: &RequestContext,
    request: InitProducerIdRequest,
) -> InitProducerIdResponse {
    let outcome = match request.transactional_id {
        Some(transactional_id) => {
            let client = context.client_id.as_deref().unwrap_or_default();
            limited!(warn, transactional_id, client, "a producer asks for transactions, which are not served");
            Err(ErrorCode::INVALID_REQUEST)
        }
        None if (request.producer_id < 0) != (request.producer_epoch < 0) => Err(ErrorCode::INVALID_REQUEST),
        None => next(broker).await,
    };
    match outcome {
        Ok(producer_id) => InitProducerIdResponse { producer_id, producer_epoch: 0, ..Default::default() },
        Err(error_code) => InitProducerIdResponse { error_code, producer_epoch: -1, ..Default::default() },
    }
}

async fn next(broker: &Broker) -> Result<i64, ErrorCode> {
    let mut free = broker.producer_ids.free.lock().await;
    if free.is_empty() {
        let first = read_state(&*broker.state, |state| state.next_producer_id());
        let reserved =
            broker.state.commit(vec![Change::Producers(ProducerChange::IdsReserved { next: first + RANGE })]).await;
        reserved.map_err(|error| match refuse_append(&error).code {
            // The two that clients try again on this API.
            ErrorCode::NOT_LEADER_OR_FOLLOWER => ErrorCode::NOT_COORDINATOR,
            _ => ErrorCode::COORDINATOR_NOT_AVAILABLE,
        })?;
        *free = first..first + RANGE;
    }
    free.next().ok_or(ErrorCode::UNKNOWN_SERVER_ERROR)
}
