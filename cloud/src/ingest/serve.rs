//! The link's listener: plain or TLS, HTTP/1.1 or HTTP/2, and a clean end.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tracing::{debug, warn};

use super::{Ingest, router};

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest a connection may take to say what it wants. Longer than a poll, so that an idle one is not cut under it.
const HEADER_TIMEOUT: Duration = Duration::from_secs(90);
/// How long requests under way may take after the end was asked for.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// hyper's own is 1 MiB for a whole connection, which one body of 8 MiB would fill eight times.
const WINDOW_BYTES: u32 = 8 * 1024 * 1024;

/// Serves the link until `stop` turns true; then no new connection is taken, polls are answered at once, and appends
/// under way are finished.
pub async fn serve(
    ingest: Arc<Ingest>,
    listener: TcpListener,
    tls: Option<Arc<rustls::ServerConfig>>,
    mut stop: watch::Receiver<bool>,
) -> io::Result<()> {
    let acceptor = tls.map(|config| {
        let mut config = (*config).clone();
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        TlsAcceptor::from(Arc::new(config))
    });
    let room = Arc::new(Semaphore::new(ingest.settings.connections_max.clamp(1, Semaphore::MAX_PERMITS)));
    let router = router(ingest.clone());
    let mut connections = JoinSet::new();
    while !*stop.borrow_and_update() {
        let (stream, peer) = tokio::select! {
            _ = stop.changed() => break,
            _ = connections.join_next(), if !connections.is_empty() => continue,
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of file descriptors, mostly: taking the next one at once would fail as fast.
                    warn!(%error, "link connection not accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        let Ok(permit) = room.clone().try_acquire_owned() else {
            warn!(%peer, "link connection refused: too many");
            continue;
        };
        let _ = stream.set_nodelay(true);
        let (router, stop, acceptor) = (router.clone(), stop.clone(), acceptor.clone());
        connections.spawn(async move {
            match acceptor {
                None => connection(TokioIo::new(stream), router, stop).await,
                Some(acceptor) => match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
                    Ok(Ok(stream)) => connection(TokioIo::new(stream), router, stop).await,
                    Ok(Err(error)) => debug!(%peer, %error, "TLS handshake failed"),
                    Err(_) => debug!(%peer, "TLS handshake took too long"),
                },
            }
            drop(permit);
        });
    }
    ingest.close();
    let drained = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(DRAIN_TIMEOUT, drained).await.is_err() {
        warn!("link connections cut: requests took too long to end");
    }
    Ok(())
}

async fn connection<S>(stream: TokioIo<S>, router: axum::Router, mut stop: watch::Receiver<bool>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
    builder
        .http2()
        .timer(TokioTimer::new())
        .initial_connection_window_size(WINDOW_BYTES)
        .initial_stream_window_size(WINDOW_BYTES)
        .keep_alive_interval(Duration::from_secs(30));
    let served = builder.serve_connection(stream, TowerToHyperService::new(router));
    tokio::pin!(served);
    let stopped = async {
        // An error means that nobody can ask for the end any more, which ends it too.
        let _ = stop.wait_for(|stop| *stop).await;
    };
    tokio::select! {
        result = served.as_mut() => {
            if let Err(error) = result {
                debug!(%error, "link connection ended");
            }
            return;
        }
        () = stopped => {}
    }
    served.as_mut().graceful_shutdown();
    let _ = served.await;
}
