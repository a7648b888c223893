//! A small S3 server over a store in memory: what our client asks of one, spoken over HTTP.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::response::Response;
use futures_util::TryStreamExt;
use http::{HeaderMap, Method, StatusCode, header};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode};
use parking_lot::Mutex;

/// The server: content, and the requests that came, as `METHOD key-or-query`.
#[derive(Debug, Clone, Default)]
pub struct S3 {
    pub content: Arc<InMemory>,
    pub log: Arc<Mutex<Vec<String>>>,
    /// The headers of each PUT, with its key.
    pub headers: Arc<Mutex<Vec<(String, HeaderMap)>>>,
    /// Objects a listing page holds.
    pub page: usize,
    /// `If-None-Match` is not looked at, as some servers do.
    pub careless: bool,
}

impl S3 {
    /// Listens on a port of its own; returns what `AWS_*` variables would say.
    pub async fn serve(&self) -> Vec<(String, String)> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let router = Router::new().fallback(handle).layer(DefaultBodyLimit::disable()).with_state(self.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        let options = [
            ("AWS_ENDPOINT", endpoint.as_str()),
            ("AWS_ACCESS_KEY_ID", "key"),
            ("AWS_SECRET_ACCESS_KEY", "secret"),
            ("AWS_REGION", "here"),
        ];
        options.map(|(key, value)| (key.to_owned(), value.to_owned())).to_vec()
    }

    async fn answer(&self, request: Request) -> Result<Response, object_store::Error> {
        let (parts, body) = request.into_parts();
        let path = parts.uri.path().trim_start_matches("/bucket").trim_start_matches('/').to_owned();
        let query = parts.uri.query().unwrap_or_default().to_owned();
        let shown = if path.is_empty() { query.clone() } else { path.clone() };
        self.log.lock().push(format!("{} {shown}", parts.method));
        let key = Path::from(path.as_str());
        match parts.method {
            Method::PUT => {
                self.headers.lock().push((path.clone(), parts.headers.clone()));
                let bytes = axum::body::to_bytes(body, usize::MAX).await.unwrap();
                let create = parts.headers.get(header::IF_NONE_MATCH).is_some_and(|value| value == "*");
                let mode = if create && !self.careless { PutMode::Create } else { PutMode::Overwrite };
                let put = self.content.put_opts(&key, bytes.into(), mode.into()).await?;
                Ok(reply(StatusCode::OK, put.e_tag, Body::empty()))
            }
            Method::GET if path.is_empty() => self.list(&query).await,
            Method::GET => {
                let ranged = parts.headers.get(header::RANGE).is_some();
                let options = GetOptions::new().with_range(range(&parts.headers));
                let result = self.content.get_opts(&key, options).await?;
                let (e_tag, span, size) = (result.meta.e_tag.clone(), result.range.clone(), result.meta.size);
                let status = if ranged { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK };
                let mut response = reply(status, e_tag, Body::from(result.bytes().await?));
                if ranged {
                    let said = format!("bytes {}-{}/{size}", span.start, span.end - 1);
                    response.headers_mut().insert(header::CONTENT_RANGE, said.parse().unwrap());
                }
                Ok(response)
            }
            Method::DELETE => {
                self.content.delete(&key).await?;
                Ok(reply(StatusCode::NO_CONTENT, None, Body::empty()))
            }
            _ => Ok(reply(StatusCode::NOT_IMPLEMENTED, None, Body::empty())),
        }
    }

    async fn list(&self, query: &str) -> Result<Response, object_store::Error> {
        let field = |name: &str| {
            let pair = query.split('&').find_map(|pair| pair.strip_prefix(&format!("{name}=")));
            pair.map(|value| value.replace("%2F", "/")).unwrap_or_default()
        };
        let (prefix, after) = (field("prefix"), field("continuation-token"));
        let mut all: Vec<_> = self.content.list(None).try_collect().await?;
        all.retain(|object| object.location.as_ref().starts_with(&prefix) && object.location.as_ref() > after.as_str());
        all.sort_by(|a, b| a.location.cmp(&b.location));
        let cut = all.len() > self.page.max(1);
        all.truncate(self.page.max(1));
        let mut xml = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?><ListBucketResult>");
        for object in &all {
            xml += &format!(
                "<Contents><Key>{}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><Size>{}</Size></Contents>",
                object.location, object.size
            );
        }
        if let Some(last) = all.last().filter(|_| cut) {
            xml += &format!("<NextContinuationToken>{}</NextContinuationToken>", last.location);
        }
        xml += &format!("<IsTruncated>{cut}</IsTruncated></ListBucketResult>");
        Ok(reply(StatusCode::OK, None, Body::from(xml)))
    }
}

async fn handle(State(s3): State<S3>, request: Request) -> Response {
    s3.answer(request).await.unwrap_or_else(|error| {
        let status = match error {
            object_store::Error::NotFound { .. } => StatusCode::NOT_FOUND,
            object_store::Error::AlreadyExists { .. } => StatusCode::PRECONDITION_FAILED,
            _ => StatusCode::BAD_REQUEST,
        };
        reply(status, None, Body::from(error.to_string()))
    })
}

fn reply(status: StatusCode, e_tag: Option<String>, body: Body) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::ETAG, e_tag.unwrap_or_else(|| "none".into()).parse().unwrap());
    headers.insert(header::LAST_MODIFIED, "Thu, 01 Jan 2026 00:00:00 GMT".parse().unwrap());
    response
}

fn range(headers: &HeaderMap) -> Option<GetRange> {
    let (first, last) = headers.get(header::RANGE)?.to_str().ok()?.strip_prefix("bytes=")?.split_once('-')?;
    Some(GetRange::Bounded(first.parse().ok()?..last.parse::<u64>().ok()? + 1))
}
