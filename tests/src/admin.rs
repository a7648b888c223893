//! The admin ports: readiness, status and metrics, read with a bare HTTP/1.1 request.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// `GET path`: status code and body.
pub async fn get(address: SocketAddr, path: &str) -> Result<(u16, String)> {
    request(address, &format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")).await
}

/// `GET path` under a name and with a token.
pub async fn get_as(address: SocketAddr, path: &str, host: &str, authorization: &str) -> Result<(u16, String)> {
    let headers = format!("Host: {host}\r\nAuthorization: {authorization}\r\nConnection: close");
    request(address, &format!("GET {path} HTTP/1.1\r\n{headers}\r\n\r\n")).await
}

/// `POST path` with a body: status code and body.
pub async fn post(address: SocketAddr, path: &str, body: &str) -> Result<(u16, String)> {
    let length = body.len();
    let head = format!("POST {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {length}");
    request(address, &format!("{head}\r\n\r\n{body}")).await
}

async fn request(address: SocketAddr, request: &str) -> Result<(u16, String)> {
    let exchange = async {
        let mut socket = TcpStream::connect(address).await?;
        socket.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        socket.read_to_end(&mut answer).await?;
        anyhow::Ok(String::from_utf8_lossy(&answer).into_owned())
    };
    let answer = tokio::time::timeout(Duration::from_secs(30), exchange).await.context("admin port is silent")??;
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
    let code = head.split(' ').nth(1).and_then(|c| c.parse().ok()).context("no HTTP status")?;
    let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
    Ok((code, if chunked { unchunk(body)? } else { body.to_owned() }))
}

fn unchunk(mut body: &str) -> Result<String> {
    let mut whole = String::new();
    loop {
        let (size, rest) = body.split_once("\r\n").context("chunk size")?;
        let size = usize::from_str_radix(size.trim(), 16)?;
        if size == 0 {
            return Ok(whole);
        }
        whole.push_str(rest.get(..size).context("chunk is cut")?);
        body = rest.get(size + 2..).context("chunk end")?;
    }
}

pub async fn is_ready(address: SocketAddr) -> bool {
    matches!(get(address, "/readyz").await, Ok((200, _)))
}

/// Whether the edge takes nothing more: its budget is used up, or its disk does not take what was taken.
pub async fn edge_is_full(address: SocketAddr) -> Result<bool> {
    let status: serde_json::Value = status(address).await?;
    Ok(status["store"]["full"] == true || status["store"]["trouble"].is_string())
}

/// What the edge's `/status` says, as far as tests read it.
#[derive(Debug, Clone, Deserialize)]
pub struct EdgeStatus {
    pub id: String,
    pub streams: Vec<StreamStatus>,
}

/// One stream there. The offsets are ends: the first that is *not* stored, durable in the cloud, safe in the archive.
#[derive(Debug, Clone, Deserialize)]
pub struct StreamStatus {
    pub name: String,
    pub next: i64,
    pub durable: i64,
    pub safe: i64,
    #[serde(default)]
    pub parked: Option<String>,
}

/// What the cloud's `/status` says, as far as tests read it.
#[derive(Debug, Clone, Deserialize)]
pub struct CloudStatus {
    pub cluster_id: String,
    pub shards: Vec<ShardStatus>,
    pub topics: Vec<TopicStatus>,
}

#[derive(Debug, Clone, Deserialize)]
pub struct ShardStatus {
    pub engine: String,
    /// Coordinator slots in it.
    pub slots: Vec<u8>,
    /// The owner's epoch: it rises with every take-over.
    pub epoch: u32,
    /// The newest leader epoch: it rises when less was found than had been acknowledged.
    pub leader_epoch: i32,
    /// Every block below is in the bucket.
    pub shipped_seq: u64,
    pub next_seq: u64,
}

#[derive(Debug, Clone, Deserialize)]
pub struct TopicStatus {
    pub name: String,
    pub engine: String,
    pub partitions: Vec<PartitionStatus>,
}

#[derive(Debug, Clone, Deserialize)]
pub struct PartitionStatus {
    pub log_start: i64,
    pub high_watermark: i64,
}

pub async fn edge_status(address: SocketAddr) -> Result<EdgeStatus> {
    status(address).await
}

pub async fn cloud_status(address: SocketAddr) -> Result<CloudStatus> {
    status(address).await
}

async fn status<T: serde::de::DeserializeOwned>(address: SocketAddr) -> Result<T> {
    let (code, body) = get(address, "/status").await?;
    if code != 200 {
        bail!("/status answered {code}: {body}");
    }
    serde_json::from_str(&body).with_context(|| format!("/status is not what tests expect: {body}"))
}

impl EdgeStatus {
    pub fn stream(&self, name: &str) -> Option<&StreamStatus> {
        self.streams.iter().find(|s| s.name == name)
    }
}

impl CloudStatus {
    /// The only shard of an engine.
    pub fn shard(&self, engine: &str) -> Result<&ShardStatus> {
        let mut found = self.shards.iter().filter(|s| s.engine == engine);
        match (found.next(), found.next()) {
            (Some(shard), None) => Ok(shard),
            _ => bail!("expected one shard of engine {engine}, found {:?}", self.shards),
        }
    }

    pub fn topic(&self, name: &str) -> Option<&TopicStatus> {
        self.topics.iter().find(|t| t.name == name)
    }

    /// Records of a topic: the sum of its partitions' extents.
    pub fn records(&self, topic: &str) -> i64 {
        let partitions = self.topics.iter().filter(|t| t.name == topic).flat_map(|t| &t.partitions);
        partitions.map(|p| p.high_watermark - p.log_start).sum()
    }
}

/// `/metrics` as name (with labels) to value.
pub async fn metrics(address: SocketAddr) -> Result<BTreeMap<String, f64>> {
    let (code, body) = get(address, "/metrics").await?;
    if code != 200 {
        bail!("/metrics answered {code}");
    }
    let samples = body.lines().filter(|l| !l.starts_with('#') && !l.is_empty());
    Ok(samples.filter_map(|l| l.rsplit_once(' ')).filter_map(|(n, v)| Some((n.to_owned(), v.parse().ok()?))).collect())
}
