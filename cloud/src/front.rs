//! The Kafka front: sockets in, [`Log`], [`StateLog`], [`Catalogue`] and [`Groups`] behind.
//!
//! `connection` frames bytes and keeps the order of answers, `dispatch` knows which API and version is served and by
//! whom; each API has its file with one function:
//!
//! ```text
//! pub async fn handle(broker: &Broker, context: &RequestContext, request: XRequest) -> XResponse
//! ```
//! A handler may wait (a Fetch, a JoinGroup): only its own connection waits with it. It answers errors inside the
//! response, by Kafka's codes; it cannot fail otherwise. What `dispatch::SERVED` does not name is not served and not
//! advertised.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use shared::log::Log;

use crate::catalogue::Catalogue;
use crate::groups::Groups;
use crate::state::StateLog;

pub mod create_partitions;
pub mod create_topics;
pub mod delete_groups;
pub mod delete_records;
pub mod delete_topics;
pub mod describe_cluster;
pub mod describe_configs;
pub mod describe_groups;
pub mod find_coordinator;
pub mod heartbeat;
pub mod join_group;
pub mod leave_group;
pub mod list_groups;
pub mod offset_commit;
pub mod offset_delete;
pub mod offset_fetch;
pub mod sync_group;

/// All that a request can be answered with.
pub struct Broker {
    /// The records.
    pub log: Arc<dyn Log>,
    /// Topics, groups and positions, durable.
    pub state: Arc<dyn StateLog>,
    /// Topics and their settings.
    pub catalogue: Arc<Catalogue>,
    /// Consumer groups.
    pub groups: Arc<Groups>,
    /// This node's number: leader, replica, controller and coordinator of everything.
    pub node_id: i32,
    /// Generated once, kept in data_dir and bucket.
    pub cluster_id: String,
    /// Bounds and habits.
    pub settings: FrontSettings,
}

/// One address Kafka clients connect to, and the one they are told to come back to.
#[derive(Debug, Clone)]
pub struct Listener {
    /// Shown in logs.
    pub name: String,
    /// Host that Metadata and FindCoordinator answer on this listener.
    pub advertised_host: String,
    /// Port that goes with it.
    pub advertised_port: u16,
    /// TLS, when the listener speaks it.
    pub tls: Option<Arc<rustls::ServerConfig>>,
}

/// Bounds of the front; every one has an answer to "and when it is reached?".
#[derive(Debug, Clone)]
pub struct FrontSettings {
    /// Largest produce request; a larger one closes the connection (Kafka's `socket.request.max.bytes`).
    pub request_bytes_max: usize,
    /// Largest request of every other API, which is decoded into values; a larger one closes the connection.
    pub plain_request_bytes_max: usize,
    /// Most connections at a time over all listeners; a further one is closed at once.
    pub connections_max: usize,
    /// Memory for requests being read and served, and for responses being built; further requests wait unread.
    pub memory_bytes_max: usize,
    /// Most record bytes in one Fetch response, whatever the client asks (Kafka's `fetch.max.bytes`).
    pub fetch_bytes_max: usize,
    /// Longest a Fetch is held, whatever the client asks.
    pub fetch_wait_max: Duration,
    /// A connection without a request for so long is closed (Kafka's `connections.max.idle.ms`).
    pub idle_timeout: Duration,
    /// A request that has begun, a TLS handshake or a response must be through in this time.
    pub transfer_timeout: Duration,
    /// Metadata for a topic that does not exist makes it, if the client allows.
    pub auto_create_topics: bool,
}

impl Default for FrontSettings {
    fn default() -> Self {
        Self {
            request_bytes_max: 100 * 1024 * 1024,
            plain_request_bytes_max: 8 * 1024 * 1024,
            connections_max: 10_000,
            memory_bytes_max: 512 * 1024 * 1024,
            fetch_bytes_max: 55 * 1024 * 1024,
            fetch_wait_max: Duration::from_secs(60),
            idle_timeout: Duration::from_secs(600),
            transfer_timeout: Duration::from_secs(60),
            auto_create_topics: true,
        }
    }
}

/// Who asks, and in which version.
#[derive(Debug, Clone)]
pub struct RequestContext {
    /// The version the request came in and the response leaves in.
    pub api_version: i16,
    /// What the client calls itself; unproven.
    pub client_id: Option<String>,
    /// Where it connects from.
    pub peer: SocketAddr,
    /// The listener it came through.
    pub listener: Arc<Listener>,
}
