//! The link's requests: from HTTP to messages and back, within the budget of memory.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use bytes::Bytes;
use daemon::http::Visit;
use shared::limited;
use shared::link::frame::{self, FrameError, HEADER_BYTES_MAX, Hello, PREFIX_BYTES, path};
use shared::link::receiver::HelloRefused;
use tokio::sync::OwnedSemaphorePermit;

use super::{AuthError, BUDGET_UNIT, Ingest, IngestError, count};

/// How long a request waits for memory before it is sent away.
const BUDGET_WAIT: Duration = Duration::from_secs(5);
/// Slowest link that may still deliver a body.
const BODY_BYTES_PER_SEC_MIN: u64 = 8 * 1024;

/// The link's routes.
pub fn router(ingest: Arc<Ingest>) -> Router {
    Router::new()
        .route(path::HELLO, post(hello))
        .route(path::APPEND, post(append))
        .route(path::POLL, post(poll))
        .with_state(ingest)
}

/// An answer that is not the one hoped for.
struct Refusal {
    status: StatusCode,
    text: String,
}

impl Refusal {
    fn new(status: StatusCode, text: impl Into<String>) -> Self {
        Self { status, text: text.into() }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut response = (self.status, self.text + "\n").into_response();
        let headers = response.headers_mut();
        match self.status {
            StatusCode::UNAUTHORIZED => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            }
            _ => {}
        }
        response
    }
}

impl From<IngestError> for Refusal {
    fn from(error: IngestError) -> Self {
        let status = match &error {
            IngestError::Auth(AuthError::OtherEdge { .. }) => StatusCode::FORBIDDEN,
            IngestError::Auth(_) => StatusCode::UNAUTHORIZED,
            IngestError::Hello(HelloRefused::Version { .. }) => StatusCode::UPGRADE_REQUIRED,
            IngestError::Hello(HelloRefused::Stale) => StatusCode::CONFLICT,
            IngestError::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
        };
        Self::new(status, error.to_string())
    }
}

impl From<FrameError> for Refusal {
    fn from(error: FrameError) -> Self {
        Self::new(StatusCode::BAD_REQUEST, error.to_string())
    }
}

fn authorization(headers: &HeaderMap) -> Option<&[u8]> {
    headers.get(header::AUTHORIZATION).map(HeaderValue::as_bytes)
}

async fn hello(State(ingest): State<Arc<Ingest>>, request: Request) -> Result<Response, Refusal> {
    let (parts, body) = request.into_parts();
    let caller = ingest.caller(&parts).await?;
    let (bytes, _room) = ingest.body(&parts.headers, body, PREFIX_BYTES + HEADER_BYTES_MAX).await?;
    let hello: Hello = match frame::decode(&bytes) {
        Ok(hello) => hello,
        Err(error @ FrameError::Version { .. }) => {
            return Err(ingest.refuse(match frame::hello_versions(&bytes) {
                Some((lowest, highest)) => IngestError::from(HelloRefused::Version { lowest, highest }).into(),
                None => error.into(),
            }));
        }
        Err(error) => return Err(ingest.refuse(error.into())),
    };
    let reply = ingest.hello(&caller, hello).await.map_err(|error| ingest.refuse(error.into()))?;
    Ok(message(frame::encode(&reply)))
}

async fn append(State(ingest): State<Arc<Ingest>>, request: Request) -> Result<Response, Refusal> {
    let (parts, body) = request.into_parts();
    let caller = ingest.caller(&parts).await?;
    let bytes_max = PREFIX_BYTES + HEADER_BYTES_MAX + ingest.settings.body_bytes_max;
    let (bytes, room) = ingest.body(&parts.headers, body, bytes_max).await?;
    let (append, batches) = frame::decode_append(&bytes).map_err(|error| ingest.refuse(error.into()))?;
    drop(bytes);
    let reply = ingest.append(&caller, append, batches, room).await.map_err(|error| ingest.refuse(error.into()))?;
    Ok(message(frame::encode(&reply)))
}

async fn poll(State(ingest): State<Arc<Ingest>>, request: Request) -> Result<Response, Refusal> {
    let (parts, body) = request.into_parts();
    let caller = ingest.caller(&parts).await?;
    let (bytes, room) = ingest.body(&parts.headers, body, PREFIX_BYTES + HEADER_BYTES_MAX).await?;
    let poll = frame::decode(&bytes).map_err(|error| ingest.refuse(error.into()))?;
    drop((bytes, room));
    let reply = ingest.poll(&caller, poll).await.map_err(|error| ingest.refuse(error.into()))?;
    Ok(message(frame::encode(&reply)))
}

fn message(bytes: Bytes) -> Response {
    ([(header::CONTENT_TYPE, "application/octet-stream")], bytes).into_response()
}

impl Ingest {
    /// Whose token a request carries. A wrong one is answered late; a right one at once, whatever failed before.
    async fn caller(&self, parts: &Parts) -> Result<super::Caller<'_>, Refusal> {
        let visit = parts.extensions.get::<Visit>();
        match self.settings.grants.caller(authorization(&parts.headers)) {
            Ok(caller) => {
                if let Some(visit) = visit {
                    visit.known();
                }
                Ok(caller)
            }
            Err(error) => {
                let refusal = self.refuse(IngestError::from(error).into());
                if let Some(visit) = visit
                    && let Some(delay) = self.throttle.failed(Instant::now(), b"", visit.peer().ip())
                {
                    tokio::time::sleep(delay.wait).await;
                }
                Err(refusal)
            }
        }
    }

    fn refuse(&self, refusal: Refusal) -> Refusal {
        count(&self.counters.refused, 1);
        limited!(warn, status = refusal.status.as_u16(), reason = refusal.text, "link request refused");
        refusal
    }

    /// Takes a body in, once there is memory for it. The memory is free again when the permit is dropped.
    async fn body(
        &self,
        headers: &HeaderMap,
        body: Body,
        bytes_max: usize,
    ) -> Result<(Bytes, OwnedSemaphorePermit), Refusal> {
        let announced = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
        let too_large = || {
            let text = format!("the body is larger than {bytes_max} bytes");
            Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, text)
        };
        let bytes: usize = announced.unwrap_or(bytes_max);
        if bytes > bytes_max {
            return Err(self.refuse(too_large()));
        }
        let units = u32::try_from(bytes / BUDGET_UNIT + 1).map_err(|_| too_large())?;
        let room = tokio::time::timeout(BUDGET_WAIT, self.budget.clone().acquire_many_owned(units)).await;
        let Ok(Ok(room)) = room else {
            return Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "all memory for bodies is in use"));
        };
        let patience = self.settings.body_timeout + Duration::from_secs(bytes as u64 / BODY_BYTES_PER_SEC_MIN);
        match tokio::time::timeout(patience, to_bytes(body, bytes_max)).await {
            Ok(Ok(bytes)) => Ok((bytes, room)),
            Ok(Err(_)) if announced.is_none() => Err(self.refuse(too_large())),
            Ok(Err(error)) => Err(Refusal::new(StatusCode::BAD_REQUEST, format!("the body is cut: {error}"))),
            Err(_) => Err(Refusal::new(StatusCode::REQUEST_TIMEOUT, "the body came too slowly")),
        }
    }
}
