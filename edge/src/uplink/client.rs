//! Messages over HTTP: what a status means to the sender.

use std::error::Error as _;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, RETRY_AFTER};
use reqwest::{Certificate, Client, Response, StatusCode};
use shared::link::frame::{self, HEADER_BYTES_MAX, Message, PREFIX_BYTES, bounded_text};
use shared::link::sender::Failure;

use super::UplinkSettings;

/// Why an uplink cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The token has bytes that no header may have.
    #[error("the uplink's token holds characters that cannot be sent: one line of printable ASCII is expected")]
    Token,
    /// The certificates do not parse.
    #[error("the uplink's ca_file holds no certificate in PEM: {0}")]
    Ca(String),
    /// TLS cannot be set up.
    #[error("the uplink's TLS cannot be set up: {0}; ca_file names certificates to trust")]
    Tls(String),
    /// The system gives no random numbers.
    #[error("no random numbers from the system: {0}")]
    Random(String),
}

/// A connection to one cloud, opened and opened again as needed.
#[derive(Debug)]
pub(super) struct LinkClient {
    client: Client,
    url: String,
}

const RESPONSE_BYTES_MAX: usize = PREFIX_BYTES + HEADER_BYTES_MAX;

impl LinkClient {
    pub fn new(settings: &UplinkSettings) -> Result<Self, ClientError> {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        if let Some(token) = &settings.token {
            let mut value =
                HeaderValue::from_str(&format!("Bearer {}", token.reveal().trim())).map_err(|_| ClientError::Token)?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        let mut builder = Client::builder()
            .default_headers(headers)
            .connect_timeout(Duration::from_secs(10))
            .tcp_nodelay(true)
            // A link that went away without a word is noticed within a minute, also when nothing is sent.
            .tcp_keepalive(Duration::from_secs(20))
            .tcp_keepalive_interval(Duration::from_secs(10))
            .tcp_keepalive_retries(3)
            // Sooner than the cloud closes idle connections, so that no request meets a closing one.
            .pool_idle_timeout(Duration::from_secs(60))
            .http2_keep_alive_interval(Duration::from_secs(20))
            .http2_keep_alive_timeout(Duration::from_secs(15))
            // Settings say where records go, not the environment.
            .no_proxy()
            // A redirect would carry records and token to where the settings do not point.
            .redirect(reqwest::redirect::Policy::none());
        if let Some(pem) = &settings.ca_pem {
            let trusted = Certificate::from_pem_bundle(pem).map_err(|error| ClientError::Ca(chain(&error)))?;
            if trusted.is_empty() {
                return Err(ClientError::Ca("it is empty".to_owned()));
            }
            builder = builder.tls_certs_only(trusted);
        } else if settings.url.starts_with("http://") {
            // Without TLS a gateway needs no certificates of the system, and may have none.
            builder = builder.tls_certs_only([]);
        }
        let client = builder.build().map_err(|error| ClientError::Tls(chain(&error)))?;
        Ok(Self { client, url: settings.url.trim_end_matches('/').to_owned() })
    }

    pub async fn post<M: Message>(&self, path: &str, body: Bytes, patience: Duration) -> Result<M, Failure> {
        let request = self.client.post(format!("{}{path}", self.url)).timeout(patience).body(body);
        let response = request.send().await.map_err(|error| Failure::Unreachable(chain(&error.without_url())))?;
        let status = response.status();
        let retry = response.headers().get(RETRY_AFTER).and_then(|secs| secs.to_str().ok()?.parse::<u64>().ok());
        let bytes = read(response).await?;
        if status == StatusCode::OK {
            return frame::decode(&bytes).map_err(|error| {
                Failure::Unreachable(format!(
                    "the answer is not the link's ({error}): is url the cloud's [link] listen?"
                ))
            });
        }
        let words = bounded_text(String::from_utf8_lossy(&bytes).trim());
        let text = format!("{status}: {words}");
        Err(match status {
            StatusCode::PAYLOAD_TOO_LARGE => Failure::TooLarge(text),
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                Failure::Busy { text, wait_ms: retry.unwrap_or(1).clamp(1, 300) * 1000 }
            }
            status if status.is_client_error() && status != StatusCode::REQUEST_TIMEOUT => Failure::Refused(text),
            _ => Failure::Unreachable(text),
        })
    }
}

/// Reads an answer, as long as an answer may be.
async fn read(mut response: Response) -> Result<Bytes, Failure> {
    let mut bytes = BytesMut::new();
    while let Some(chunk) = response.chunk().await.map_err(|error| Failure::Unreachable(chain(&error.without_url())))? {
        if bytes.len() + chunk.len() > RESPONSE_BYTES_MAX {
            return Err(Failure::Unreachable(format!("the answer is longer than {RESPONSE_BYTES_MAX} bytes")));
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes.freeze())
}

/// An error with all that led to it: reqwest's own text does not say why.
fn chain(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text += ": ";
        text += &cause.to_string();
        source = cause.source();
    }
    bounded_text(text)
}

#[cfg(test)]
mod tests {
    use axum::Router;
    use axum::http::StatusCode as Status;
    use axum::response::IntoResponse as _;
    use shared::config::Secret;
    use shared::link::frame::{Credit, PollReply, SessionState};
    use shared::name::EdgeId;

    use super::*;

    /// A client of a server that always answers the same.
    async fn client(status: Status, headers: &'static [(&'static str, &'static str)], body: Bytes) -> LinkClient {
        // An error means that another test was first.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let answer = move || {
            let mut response = (status, body.clone()).into_response();
            for (name, value) in headers {
                response.headers_mut().insert(*name, HeaderValue::from_static(value));
            }
            std::future::ready(response)
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, Router::new().fallback(answer)).await });
        let mut settings = UplinkSettings::new(EdgeId::parse("gw").unwrap());
        settings.url = url;
        LinkClient::new(&settings).unwrap()
    }

    async fn answer(client: &LinkClient) -> Result<PollReply, Failure> {
        client.post("/link/v1/poll", Bytes::from_static(b"x"), Duration::from_secs(20)).await
    }

    #[tokio::test]
    async fn a_status_says_what_to_do_next() {
        let words = || Bytes::from_static(b"because");
        for (status, headers, expected) in [
            (Status::PAYLOAD_TOO_LARGE, &[][..], "TooLarge"),
            (Status::UNAUTHORIZED, &[], "Refused"),
            (Status::UPGRADE_REQUIRED, &[], "Refused"),
            (Status::NOT_FOUND, &[], "Refused"),
            (Status::REQUEST_TIMEOUT, &[], "Unreachable"),
            (Status::BAD_GATEWAY, &[], "Unreachable"),
            (Status::FOUND, &[("location", "http://127.0.0.1:1/")], "Unreachable"),
            (Status::SERVICE_UNAVAILABLE, &[], "wait_ms: 1000"),
            (Status::TOO_MANY_REQUESTS, &[("retry-after", "7")], "wait_ms: 7000"),
        ] {
            let failure = answer(&client(status, headers, words()).await).await.unwrap_err();
            let text = format!("{failure:?}");
            assert!(text.contains(expected) && text.contains("because"), "{text}");
        }
    }

    #[tokio::test]
    async fn an_answer_is_the_links_or_none() {
        let reply =
            PollReply { session: SessionState::Current, credit: Credit { bytes: 1, wait_ms: 2 }, safe: Vec::new() };
        let good = client(Status::OK, &[], frame::encode(&reply)).await;
        assert_eq!(answer(&good).await, Ok(reply));
        let page = client(Status::OK, &[], Bytes::from_static(b"<html>sign in to this network</html>")).await;
        assert!(matches!(answer(&page).await, Err(Failure::Unreachable(text)) if text.contains("[link] listen")));
        let endless = client(Status::OK, &[], vec![1; 3 << 20].into()).await;
        assert!(matches!(answer(&endless).await, Err(Failure::Unreachable(text)) if text.contains("longer")));
    }

    #[test]
    fn settings_that_cannot_work_are_refused() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let with = |edit: fn(&mut UplinkSettings)| {
            let mut settings = UplinkSettings::new(EdgeId::parse("gw").unwrap());
            edit(&mut settings);
            LinkClient::new(&settings).map(drop).unwrap_err().to_string()
        };
        assert!(with(|settings| settings.token = Some(Secret::new("a\nb".into()))).contains("token"));
        assert!(with(|settings| settings.ca_pem = Some(b"no certificate".to_vec())).contains("ca_file"));
    }
}
