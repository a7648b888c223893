//! The network between edge and cloud, as it is on a bad day: cut, slow, with answers that get lost and requests that come
//! twice. It takes whole HTTP/1.1 requests from the edge, so that it can repeat one byte for byte.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::kafka::{BatchId, batches_within};

/// A link that can be disturbed; the edge's uplink goes to `address`.
#[derive(Clone)]
pub struct Proxy {
    pub address: SocketAddr,
    inner: Arc<Inner>,
}

struct Inner {
    upstream: SocketAddr,
    /// Counts cuts: a connection lives as long as the number it began with.
    cuts: watch::Sender<u64>,
    down: AtomicBool,
    delay_ms: AtomicU64,
    repeat: AtomicU64,
    lose: AtomicU64,
    repeated: AtomicU64,
    lost: AtomicU64,
    appends: watch::Sender<u64>,
    sealed: Mutex<HashSet<BatchId>>,
}

impl Proxy {
    pub async fn start(upstream: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let inner = Arc::new(Inner {
            upstream,
            cuts: watch::channel(0).0,
            down: AtomicBool::new(false),
            delay_ms: AtomicU64::new(0),
            repeat: AtomicU64::new(0),
            lose: AtomicU64::new(0),
            repeated: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            appends: watch::channel(0).0,
            sealed: Mutex::new(HashSet::new()),
        });
        let shared = inner.clone();
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                if shared.down.load(Ordering::Relaxed) {
                    continue;
                }
                let inner = shared.clone();
                tokio::spawn(async move {
                    let mut cut = inner.cuts.subscribe();
                    cut.mark_unchanged();
                    tokio::select! {
                        _ = inner.relay(socket) => {}
                        _ = cut.changed() => {}
                    }
                });
            }
        });
        Ok(Self { address, inner })
    }

    /// Breaks every connection and refuses new ones until [`Proxy::mend`].
    pub fn cut(&self) {
        self.inner.down.store(true, Ordering::Relaxed);
        self.inner.cuts.send_modify(|n| *n += 1);
    }

    pub fn mend(&self) {
        self.inner.down.store(false, Ordering::Relaxed);
    }

    /// Holds back every piece by this much, in each direction.
    pub fn delay(&self, by: Duration) {
        self.inner.delay_ms.store(by.as_millis() as u64, Ordering::Relaxed);
    }

    /// Sends the next `n` appends to the cloud a second time, over a connection of their own.
    pub fn repeat_appends(&self, n: u64) {
        self.inner.repeat.fetch_add(n, Ordering::Relaxed);
    }

    /// Delivers the next `n` appends and breaks the connection when their answer comes: the edge cannot know.
    pub fn lose_answers(&self, n: u64) {
        self.inner.lose.fetch_add(n, Ordering::Relaxed);
    }

    /// Returns when the next append has been handed to the cloud.
    pub async fn append_passed(&self) {
        let mut appends = self.inner.appends.subscribe();
        // The sender lives as long as this.
        let _ = appends.changed().await;
    }

    /// How many appends were repeated and how many answers lost so far.
    pub fn disturbed(&self) -> (u64, u64) {
        (self.inner.repeated.load(Ordering::Relaxed), self.inner.lost.load(Ordering::Relaxed))
    }

    /// Identities of all record batches that passed inside appends, as the edge sealed them.
    pub fn sealed(&self) -> HashSet<BatchId> {
        self.inner.sealed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn take_one(count: &AtomicU64) -> bool {
    count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok()
}

impl Inner {
    async fn relay(self: &Arc<Self>, edge: TcpStream) -> Result<()> {
        edge.set_nodelay(true)?;
        let cloud = TcpStream::connect(self.upstream).await?;
        cloud.set_nodelay(true)?;
        let (mut from_edge, mut to_edge) = edge.into_split();
        let (mut from_cloud, mut to_cloud) = cloud.into_split();
        let lose = AtomicBool::new(false);
        let up = async {
            let mut buffer = BytesMut::new();
            while let Some(request) = read_request(&mut from_edge, &mut buffer).await? {
                if request.starts_with(b"POST /link/v1/append") {
                    self.watch_append(&request, &lose);
                }
                self.hold_back().await;
                to_cloud.write_all(&request).await?;
                if request.starts_with(b"POST /link/v1/append") {
                    self.appends.send_modify(|n| *n += 1);
                }
            }
            anyhow::Ok(to_cloud.shutdown().await?)
        };
        let down = async {
            let mut chunk = vec![0; 64 << 10];
            loop {
                let n = from_cloud.read(&mut chunk).await?;
                if n == 0 {
                    return anyhow::Ok(to_edge.shutdown().await?);
                }
                if lose.load(Ordering::Relaxed) {
                    self.lost.fetch_add(1, Ordering::Relaxed);
                    bail!("the answer gets lost");
                }
                self.hold_back().await;
                to_edge.write_all(&chunk[..n]).await?;
            }
        };
        tokio::try_join!(up, down)?;
        Ok(())
    }

    fn watch_append(self: &Arc<Self>, request: &Bytes, lose: &AtomicBool) {
        self.sealed.lock().unwrap_or_else(PoisonError::into_inner).extend(batches_within(request));
        if take_one(&self.lose) {
            lose.store(true, Ordering::Relaxed);
        }
        if take_one(&self.repeat) {
            let (inner, request) = (self.clone(), request.clone());
            tokio::spawn(async move {
                if inner.send_again(&request).await.is_ok() {
                    inner.repeated.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    }

    async fn send_again(&self, request: &[u8]) -> Result<()> {
        let mut socket = TcpStream::connect(self.upstream).await?;
        socket.write_all(request).await?;
        let mut answer = [0; 512];
        if socket.read(&mut answer).await? == 0 {
            bail!("no answer");
        }
        Ok(())
    }

    async fn hold_back(&self) {
        let by = self.delay_ms.load(Ordering::Relaxed);
        if by > 0 {
            tokio::time::sleep(Duration::from_millis(by)).await;
        }
    }
}

/// One whole request, head and body; `None` at the end of the connection.
async fn read_request(from: &mut (impl AsyncReadExt + Unpin), buffer: &mut BytesMut) -> Result<Option<Bytes>> {
    loop {
        if let Some(length) = request_length(buffer)? {
            return Ok(Some(buffer.split_to(length).freeze()));
        }
        if from.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    }
}

/// Length of the first request in `buffer` once it is whole.
fn request_length(buffer: &[u8]) -> Result<Option<usize>> {
    let Some(head_end) = buffer.windows(4).position(|w| w == b"\r\n\r\n") else { return Ok(None) };
    let head = String::from_utf8_lossy(&buffer[..head_end]).to_ascii_lowercase();
    let field = |name: &str| head.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let body = head_end + 4;
    if field("transfer-encoding:").is_some_and(|v| v.contains("chunked")) {
        return chunked_end(buffer, body);
    }
    let length: usize = field("content-length:").unwrap_or("0").parse().context("content-length")?;
    Ok((buffer.len() >= body + length).then_some(body + length))
}

fn chunked_end(buffer: &[u8], mut at: usize) -> Result<Option<usize>> {
    loop {
        let Some(rest) = buffer.get(at..) else { return Ok(None) };
        let Some(line) = rest.windows(2).position(|w| w == b"\r\n") else { return Ok(None) };
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..line])?.trim(), 16).context("chunk size")?;
        at += line + 2 + size + 2;
        if size == 0 {
            return Ok((buffer.len() >= at).then_some(at));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_whole_only_with_its_body() {
        let whole = b"POST /link/v1/append HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello";
        for cut in 0..whole.len() {
            assert_eq!(request_length(&whole[..cut]).expect("valid"), None, "cut at {cut}");
        }
        let mut two = whole.to_vec();
        two.extend_from_slice(whole);
        assert_eq!(request_length(&two).expect("valid"), Some(whole.len()));
        let chunked = b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n";
        assert_eq!(request_length(chunked).expect("valid"), Some(chunked.len()));
        assert_eq!(request_length(&chunked[..chunked.len() - 1]).expect("valid"), None);
    }
}
