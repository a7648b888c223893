//! An HTTP listener: plain or TLS, HTTP/1.1 or HTTP/2, within its door's bound, and a clean end.
//!
//! A client has a time for its TLS handshake and first request, and one between requests; who goes beyond is closed. hyper's own time-out
//! on headers begins only when it knows the protocol, which a silent client never tells.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::Request;
use hyper::body::Incoming;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use parking_lot::Mutex;
use shared::door::{Door, LEAVE_PAUSE, Seat};
use shared::limited;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_rustls::TlsAcceptor;
use tracing::{debug, warn};

/// How long a client may take until its first request's headers are there, its TLS handshake included.
pub const FIRST_REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection may stay without a request. Longer than clients keep theirs, so that no request meets a closing one.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(90);
/// How long the headers of one request may take, and a ping's answer.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// After an error, mostly for want of descriptors: taking the next connection at once would fail as fast.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// One HTTP listener.
#[derive(Debug, Clone)]
pub struct HttpListener {
    /// What it is for, in logs.
    pub name: &'static str,
    /// How many connections there may be.
    pub door: Arc<Door>,
    /// Certificates, when it speaks TLS.
    pub tls: Option<Arc<rustls::ServerConfig>>,
    /// HTTP/2 flow control window of a connection and of a stream.
    pub window_bytes: u32,
    /// How long requests under way may take after the end was asked for.
    pub drain: Duration,
}

/// The connection a request came by; an extension of every request.
#[derive(Debug, Clone)]
pub struct Visit(Arc<VisitState>);

#[derive(Debug)]
struct VisitState {
    peer: SocketAddr,
    local: SocketAddr,
    seat: Seat,
    work: Mutex<VisitWork>,
}

#[derive(Debug)]
struct VisitWork {
    requests: usize,
    due: Instant,
}

/// A request under way.
struct VisitRequest(Visit);

impl Visit {
    fn new(peer: SocketAddr, local: SocketAddr, seat: Seat) -> Self {
        let work = VisitWork { requests: 0, due: Instant::now() + FIRST_REQUEST_TIMEOUT };
        Self(Arc::new(VisitState { peer, local, seat, work: Mutex::new(work) }))
    }

    /// Where the client connects from.
    pub fn peer(&self) -> SocketAddr {
        self.0.peer
    }

    /// Where it connected to.
    pub fn local(&self) -> SocketAddr {
        self.0.local
    }

    /// The client has shown who it is, or needs not to.
    pub fn known(&self) {
        self.0.seat.known();
    }

    fn request(&self) -> VisitRequest {
        self.0.work.lock().requests += 1;
        VisitRequest(self.clone())
    }

    /// Resolves when no request was there for too long.
    async fn overdue(&self) {
        loop {
            let due = {
                let work = self.0.work.lock();
                if work.requests > 0 { Instant::now() + HEADER_TIMEOUT } else { work.due }
            };
            if Instant::now() >= due {
                return;
            }
            sleep_until(due).await;
        }
    }
}

impl Drop for VisitRequest {
    fn drop(&mut self) {
        let mut work = self.0.0.work.lock();
        work.requests -= 1;
        work.due = Instant::now() + IDLE_TIMEOUT;
    }
}

/// Serves `router` until `stop` turns true; then `ending` is called, no new connection is taken, and requests under way
/// are finished.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    settings: HttpListener,
    mut stop: watch::Receiver<bool>,
    ending: impl FnOnce(),
) -> io::Result<()> {
    let HttpListener { name, ref door, .. } = settings;
    let acceptor = settings.tls.as_ref().map(|config| {
        let mut config = (**config).clone();
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        TlsAcceptor::from(Arc::new(config))
    });
    let mut connections = JoinSet::new();
    while !*stop.borrow_and_update() {
        let (stream, peer) = tokio::select! {
            _ = stop.changed() => break,
            _ = connections.join_next(), if !connections.is_empty() => continue,
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    limited!(warn, listener = name, %error, "cannot accept connections, trying again");
                    door.evict();
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
        };
        let seat = tokio::select! {
            seat = door.enter() => seat,
            _ = stop.changed() => break,
        };
        let Some(seat) = seat else {
            let max = door.max();
            limited!(warn, listener = name, %peer, max, "connection refused: as many are open as are allowed");
            continue;
        };
        let _ = stream.set_nodelay(true);
        let local = stream.local_addr().or_else(|_| listener.local_addr())?;
        let visit = Visit::new(peer, local, seat);
        let (router, stop, acceptor) = (router.clone(), stop.clone(), acceptor.clone());
        let window = settings.window_bytes;
        connections.spawn(async move {
            let served = connection(stream, acceptor, router, window, &visit, stop);
            tokio::select! {
                () = served => {}
                () = visit.0.seat.evicted() => {
                    debug!(%peer, "silent connection closed in favour of another");
                    sleep(LEAVE_PAUSE).await;
                }
            }
        });
    }
    ending();
    let drained = async { while connections.join_next().await.is_some() {} };
    if timeout(settings.drain, drained).await.is_err() {
        warn!(listener = name, "connections cut: requests took too long to end");
    }
    Ok(())
}

async fn connection(
    stream: TcpStream,
    acceptor: Option<TlsAcceptor>,
    router: Router,
    window_bytes: u32,
    visit: &Visit,
    stop: watch::Receiver<bool>,
) {
    let Some(acceptor) = acceptor else { return requests(stream, router, window_bytes, visit, stop).await };
    match timeout(FIRST_REQUEST_TIMEOUT, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => requests(stream, router, window_bytes, visit, stop).await,
        Ok(Err(error)) => debug!(peer = %visit.peer(), %error, "TLS handshake failed"),
        Err(_) => debug!(peer = %visit.peer(), "TLS handshake took too long"),
    }
}

fn requests<S>(
    stream: S,
    router: Router,
    window_bytes: u32,
    visit: &Visit,
    mut stop: watch::Receiver<bool>,
) -> impl Future<Output = ()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
    builder
        .http2()
        .timer(TokioTimer::new())
        .initial_connection_window_size(window_bytes)
        .initial_stream_window_size(window_bytes)
        .keep_alive_interval(HEADER_TIMEOUT);
    let (router, visit) = (TowerToHyperService::new(router), visit.clone());
    async move {
        let peer = visit.peer();
        let service = service_fn(|mut request: Request<Incoming>| {
            let under_way = visit.request();
            request.extensions_mut().insert(visit.clone());
            let answer = router.call(request);
            async move {
                let _under_way = under_way;
                answer.await
            }
        });
        let served = builder.serve_connection(TokioIo::new(stream), service);
        tokio::pin!(served);
        let stopped = async {
            // An error means that nobody can ask for the end any more, which ends it too.
            let _ = stop.wait_for(|stop| *stop).await;
        };
        tokio::select! {
            result = served.as_mut() => {
                if let Err(error) = result {
                    debug!(%peer, %error, "connection ended");
                }
                return;
            }
            () = visit.overdue() => return debug!(%peer, "connection closed: no request came in time"),
            () = stopped => {}
        }
        served.as_mut().graceful_shutdown();
        let _ = served.await;
    }
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use shared::door::LEAVING_MAX;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// A server with so many seats, whose clients are known by their first request.
    async fn server(max: usize) -> (SocketAddr, Arc<Door>, watch::Sender<bool>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, door) = (listener.local_addr().unwrap(), Door::new(max));
        let (stop, stopping) = watch::channel(false);
        let settings = HttpListener {
            name: "test",
            door: door.clone(),
            tls: None,
            window_bytes: 64 << 10,
            drain: Duration::from_secs(1),
        };
        let answer = |request: Request<axum::body::Body>| async move {
            request.extensions().get::<Visit>().unwrap().known();
            "here"
        };
        tokio::spawn(serve(listener, Router::new().route("/", get(answer)), settings, stopping, || {}));
        (address, door, stop)
    }

    async fn asks(socket: &mut TcpStream) -> bool {
        if socket.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.is_err() {
            return false;
        }
        let mut text = Vec::new();
        while !text.ends_with(b"here") {
            let mut bytes = [0; 256];
            match socket.read(&mut bytes).await {
                Ok(n) if n > 0 => text.extend_from_slice(&bytes[..n]),
                _ => return false,
            }
        }
        true
    }

    async fn is_closed(socket: &mut TcpStream) -> bool {
        let mut rest = Vec::new();
        socket.read_to_end(&mut rest).await.is_ok_and(|_| !rest.starts_with(b"HTTP/1.1 200"))
    }

    #[tokio::test(start_paused = true)]
    async fn who_asks_for_nothing_in_time_is_closed() {
        let (address, door, _stop) = server(100).await;
        for beginning in [&b""[..], b"G", b"PRI * HTT", b"GET / HTTP/1.1\r\nHost: x\r\n"] {
            let mut socket = TcpStream::connect(address).await.unwrap();
            socket.write_all(beginning).await.unwrap();
            // The clock stands still but for timers that everybody waits for.
            let begun = Instant::now();
            assert!(is_closed(&mut socket).await, "{beginning:?}");
            assert!(begun.elapsed() <= FIRST_REQUEST_TIMEOUT + Duration::from_secs(1), "{beginning:?}");
        }
        let mut socket = TcpStream::connect(address).await.unwrap();
        assert!(asks(&mut socket).await);
        let begun = Instant::now();
        assert!(is_closed(&mut socket).await);
        assert!(begun.elapsed() >= FIRST_REQUEST_TIMEOUT && begun.elapsed() <= IDLE_TIMEOUT + Duration::from_secs(1));
        assert_eq!(door.status().evicted, 0);
    }

    #[tokio::test]
    async fn a_full_door_opens_for_who_asks() {
        let (address, door, _stop) = server(3).await;
        let mut known = TcpStream::connect(address).await.unwrap();
        assert!(asks(&mut known).await);
        let mut silent = Vec::new();
        let began = Instant::now();
        for _ in 0..200 {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        let mut new = TcpStream::connect(address).await.unwrap();
        assert!(asks(&mut new).await);
        assert!(asks(&mut known).await, "who is known stays");
        let status = door.status();
        assert!(status.connections - status.leaving <= 3 && status.evicted == 199, "{status:?}");
        let paced = LEAVE_PAUSE * (199 / LEAVING_MAX as u32 - 1);
        assert!(began.elapsed() >= paced, "a flood is let in slowly: {:?}", began.elapsed());
    }
}
