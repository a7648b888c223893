//! The admin port: `/livez`, `/readyz`, `/status` (JSON) and `/metrics` (Prometheus text), and the client side of them.

use std::marker::PhantomData;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use axum::extract::{Query, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use serde::{Deserialize, Serialize};
use shared::config::{ListenAddr, Secret, redacted};
use shared::door::Door;
use shared::limited;
use shared::login::LoginThrottle;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::http::{self, HttpListener, Visit};
use crate::settings::secret;

/// What a broker tells about itself.
pub trait Observed: Send + Sync + 'static {
    /// `Err` says why nobody can be served: it stops, or has failed. Being full, or without a link, is no reason.
    fn ready(&self) -> Result<(), String>;
    /// Whether it is ready for one kind of work, which `/readyz?for=` names; `None` where there is no such kind.
    fn ready_for(&self, what: &str) -> Option<Result<(), String>>;
    /// Everything a person wants to see.
    fn status(&self) -> serde_json::Value;
}

/// The port that a broker's admin port has unless the settings say otherwise.
pub trait DefaultPort: std::fmt::Debug + Clone {
    /// Its number.
    const PORT: u16;
}

/// `[admin]`, on loopback unless it says otherwise.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, bound = "P: DefaultPort")]
pub struct AdminConfig<P: DefaultPort> {
    /// Where it listens.
    pub listen: ListenAddr,
    /// Open to a network without a token: the port shows status, settings and records to whoever asks.
    pub allow_anonymous: bool,
    /// The token that every request but those for health must carry; none when absent.
    pub token: Option<Secret>,
    /// A file that holds it.
    pub token_file: Option<PathBuf>,
    /// Takes the token in plain text although others may listen.
    pub allow_plaintext: bool,
    /// Names by which it may be asked for, besides its own address, loopback and the host's name.
    pub hosts: Vec<String>,
    /// Most connections at once.
    pub connections_max: usize,
    #[serde(skip)]
    broker: PhantomData<P>,
}

impl<P: DefaultPort> Default for AdminConfig<P> {
    fn default() -> Self {
        Self {
            listen: ListenAddr::loopback(P::PORT),
            allow_anonymous: false,
            token: None,
            token_file: None,
            allow_plaintext: false,
            hosts: Vec::new(),
            connections_max: 64,
            broker: PhantomData,
        }
    }
}

impl<P: DefaultPort> AdminConfig<P> {
    /// Refuses what would be unsafe.
    pub fn check(&self) -> Result<(), String> {
        let token = self.token.is_some() || self.token_file.is_some();
        let (key, fix) = ("[admin] listen", "listen on 127.0.0.1, or set [admin] token_file");
        self.listen.check_exposure(key, token, fix, self.allow_anonymous)?;
        let fix = "listen on 127.0.0.1 and reach it through a tunnel or a proxy that speaks TLS";
        self.listen.check_plaintext(key, "a token", token, fix, self.allow_plaintext)
    }

    /// The token, read from its file if that is where it is.
    pub fn read_token(&self) -> anyhow::Result<Option<Secret>> {
        secret("[admin] token", self.token.as_ref(), self.token_file.as_deref())
    }

    /// The port as it is served.
    pub fn port(&self, door: Arc<Door>) -> anyhow::Result<AdminPort> {
        Ok(AdminPort { door, hosts: self.hosts.clone(), token: self.read_token()?, throttle: Arc::default() })
    }
}

/// How the admin port is served, and to whom.
#[derive(Debug, Clone)]
pub struct AdminPort {
    /// How many connections there may be.
    pub door: Arc<Door>,
    /// Names by which it may be asked for, besides its own address, loopback and the host's name.
    pub hosts: Vec<String>,
    /// What every request but `/livez` and `/readyz` must carry.
    pub token: Option<Secret>,
    /// The process's failed log-ins.
    pub throttle: Arc<LoginThrottle>,
}

/// Serves the admin port until `stop` turns true. `more` holds routes of the broker's own.
pub async fn serve(
    listener: TcpListener,
    observed: Arc<dyn Observed>,
    collector: Box<dyn Collector>,
    more: Router,
    port: AdminPort,
    stop: watch::Receiver<bool>,
) -> std::io::Result<()> {
    let mut registry = Registry::default();
    registry.register_collector(collector);
    let registry = Arc::new(registry);
    let metrics = move || {
        let registry = registry.clone();
        async move {
            let mut text = String::new();
            match encode(&mut text, &registry) {
                Ok(()) => ([(header::CONTENT_TYPE, METRICS_TYPE)], text).into_response(),
                Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
            }
        }
    };
    let settings = HttpListener {
        name: "admin",
        door: port.door.clone(),
        tls: None,
        window_bytes: WINDOW_BYTES,
        drain: DRAIN_TIMEOUT,
    };
    let guard = Arc::new(Guard { port, hostname: hostname() });
    let router = Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .route("/status", get(status))
        .with_state(observed)
        .route("/metrics", get(metrics))
        .merge(more)
        .layer(from_fn_with_state(guard, guarded));
    http::serve(listener, router, settings, stop, || {}).await
}

/// Answers are small, and nobody is in a hurry.
const WINDOW_BYTES: u32 = 64 << 10;
/// How long requests under way may take after the end was asked for.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(3);

/// Who may ask.
struct Guard {
    port: AdminPort,
    hostname: String,
}

fn hostname() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned()
}

async fn guarded(State(guard): State<Arc<Guard>>, request: Request, next: Next) -> Response {
    let Some(visit) = request.extensions().get::<Visit>().cloned() else {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    };
    if let Some(host) = guard.foreign_host(&request, visit.local().ip()) {
        let text = format!(
            "this admin port does not answer to the name {host:?}: a page in a browser may have been led here (DNS \
             rebinding). Ask for it by its address or host name, or add the name to [admin] hosts\n"
        );
        return (StatusCode::MISDIRECTED_REQUEST, text).into_response();
    }
    let is_health = matches!(request.uri().path(), "/livez" | "/readyz");
    if let Some(token) = &guard.port.token {
        let claimed = request.headers().get(header::AUTHORIZATION).map(HeaderValue::as_bytes).and_then(bearer);
        match claimed {
            Some(claimed) if token.matches(claimed) => visit.known(),
            _ if is_health => {}
            None => {
                return unauthorized(
                    "this admin port wants a token: give --admin-token-file, or a header \"Authorization: Bearer TOKEN\"\n",
                );
            }
            Some(_) => {
                let failed = guard.port.throttle.failed(Instant::now(), b"admin", visit.peer().ip());
                limited!(warn, peer = %visit.peer(), "admin request refused: the token is wrong");
                let Some(delay) = failed else { return unauthorized("too many wrong tokens\n") };
                tokio::time::sleep(delay.wait).await;
                return unauthorized("the token is not the one of [admin] token_file\n");
            }
        }
    } else {
        visit.known();
    }
    next.run(request).await
}

fn unauthorized(text: &'static str) -> Response {
    (StatusCode::UNAUTHORIZED, [(header::WWW_AUTHENTICATE, "Bearer")], text).into_response()
}

/// The token of an `Authorization` header.
pub fn bearer(header: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = header.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
}

impl Guard {
    /// The name a request came for, if it is not one of ours. A request without a name comes from no browser.
    fn foreign_host(&self, request: &Request, local: IpAddr) -> Option<String> {
        let header =
            request.headers().get(header::HOST).map(|host| String::from_utf8_lossy(host.as_bytes()).into_owned());
        let target = request.uri().authority().map(|authority| authority.as_str().to_owned());
        header.into_iter().chain(target).find(|host| !self.is_own(host, local))
    }

    fn is_own(&self, host: &str, local: IpAddr) -> bool {
        let name = without_port(host);
        if let Ok(address) = name.parse::<IpAddr>() {
            let address = address.to_canonical();
            if address.is_loopback() || address == local.to_canonical() {
                return true;
            }
        }
        let name = name.trim_end_matches('.');
        let own = [self.hostname.as_str(), "localhost"];
        let mut all = own.into_iter().chain(self.port.hosts.iter().map(String::as_str)).filter(|own| !own.is_empty());
        all.any(|own| own.eq_ignore_ascii_case(name))
    }
}

/// `[::1]:9481` and `localhost:9481` without the port and the brackets.
fn without_port(host: &str) -> &str {
    if let Some(rest) = host.strip_prefix('[') {
        return rest.split(']').next().unwrap_or(rest);
    }
    match host.rsplit_once(':') {
        Some((name, port)) if !name.contains(':') && port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    }
}

const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What may be asked of `/readyz`.
#[derive(Deserialize)]
struct ReadyQuery {
    r#for: Option<String>,
}

async fn readyz(State(observed): State<Arc<dyn Observed>>, Query(query): Query<ReadyQuery>) -> impl IntoResponse {
    let ready = match &query.r#for {
        None => Some(observed.ready()),
        Some(what) => observed.ready_for(what),
    };
    match ready {
        Some(Ok(())) => (StatusCode::OK, "ok\n".to_owned()),
        Some(Err(why)) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
        None => (
            StatusCode::BAD_REQUEST,
            "there is no such kind of readiness; leave ?for= out, or see operating.md\n".to_owned(),
        ),
    }
}

async fn status(State(observed): State<Arc<dyn Observed>>) -> impl IntoResponse {
    Json(observed.status())
}

/// Where a running broker is asked, and with what.
#[derive(Debug, Clone, clap::Args)]
pub struct AdminArgs {
    /// A file with the token that the broker's [admin] token_file holds, if it has one.
    #[arg(long, value_name = "FILE")]
    admin_token_file: Option<PathBuf>,
}

/// Asks a running broker's admin port.
#[derive(Debug)]
pub struct AdminClient {
    client: reqwest::Client,
    base: String,
    token: Option<Secret>,
}

impl AdminClient {
    /// A client of the admin port at `url`, whose requests take `patience` at most.
    pub fn new(url: &str, args: &AdminArgs, patience: Duration) -> anyhow::Result<Self> {
        let token = secret("--admin-token", None, args.admin_token_file.as_deref())?;
        let client = reqwest::Client::builder().timeout(patience).no_proxy().build()?;
        Ok(Self { client, base: url.trim_end_matches('/').to_owned(), token })
    }

    /// Asks for a path, and returns the body of a good answer.
    pub async fn get(&self, path: &str) -> anyhow::Result<String> {
        self.request(reqwest::Method::GET, path).await
    }

    /// Makes a request without a body, and returns the body of a good answer.
    pub async fn request(&self, method: reqwest::Method, path: &str) -> anyhow::Result<String> {
        let url = format!("{}{path}", self.base);
        let shown = redacted(&url);
        let mut request = self.client.request(method, &url);
        if let Some(token) = &self.token {
            request = request.bearer_auth(token.reveal());
        }
        let answer = request.send().await.map_err(reqwest::Error::without_url);
        let answer = answer.with_context(|| {
            format!("no answer from {shown}: is the broker running, and is --admin its [admin] listen?")
        })?;
        let status = answer.status();
        let text = answer.text().await.map_err(reqwest::Error::without_url);
        let text = text.with_context(|| format!("the answer of {shown} is cut"))?;
        anyhow::ensure!(status.is_success(), "{shown} answered {status}: {}", text.trim());
        Ok(text)
    }

    /// Asks for the broker's status.
    pub async fn status(&self) -> anyhow::Result<serde_json::Value> {
        let text = self.get("/status").await?;
        serde_json::from_str(&text).with_context(|| format!("{}/status did not answer with JSON", redacted(&self.base)))
    }
}

/// Lays rows out in columns, the first row being the heading.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|r| r.get(column)).map(|c| c.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_own_names_and_addresses_are_answered() {
        let port = AdminPort {
            door: Door::new(1),
            hosts: vec!["gateway.example".to_owned()],
            token: None,
            throttle: Arc::default(),
        };
        let guard = Guard { port, hostname: "gw-7".to_owned() };
        for (host, expected) in [
            ("localhost:9481", true),
            ("LOCALHOST.", true),
            ("127.0.0.1:9481", true),
            ("127.9.9.9", true),
            ("[::1]:9481", true),
            ("[::ffff:127.0.0.1]:1", true),
            ("10.0.0.7:9481", true),
            ("gw-7:9481", true),
            ("Gateway.Example:1", true),
            ("10.0.0.8", false),
            ("evil.example", false),
            ("localhost.evil.example:9481", false),
            ("127.0.0.1.evil.example", false),
            ("gateway.example.evil", false),
            ("", false),
            ("[::1", true),
            ("a:b:c", false),
        ] {
            assert_eq!(guard.is_own(host, "10.0.0.7".parse().unwrap()), expected, "{host:?}");
        }
    }

    #[test]
    fn a_table_lines_its_columns_up() {
        let row = |cells: [&str; 2]| cells.map(str::to_owned).to_vec();
        let text = super::table(&[row(["STREAM", "NEXT"]), row(["a", "17"])]);
        assert_eq!(text, "STREAM  NEXT\na       17\n");
    }
}
