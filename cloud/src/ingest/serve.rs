//! The link's listener: how the link is served over HTTP.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use daemon::http::{self, HttpListener};
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::{Ingest, router};

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
    stop: watch::Receiver<bool>,
) -> io::Result<()> {
    let door = ingest.door.clone();
    let settings = HttpListener { name: "link", door, tls, window_bytes: WINDOW_BYTES, drain: DRAIN_TIMEOUT };
    http::serve(listener, router(ingest.clone()), settings, stop, || ingest.close()).await
}
