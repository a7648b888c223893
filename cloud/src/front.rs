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

use std::io::ErrorKind::{BrokenPipe, ConnectionReset};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kafka_wire::Uuid;
use shared::door::{Door, DoorStatus, Seat};
use shared::limited;
use shared::log::Log;
use shared::name::{TopicId, TopicName};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tracing::{Instrument as _, debug, info_span};

use crate::catalogue::Catalogue;
use crate::groups::Groups;
use crate::state::{State, StateLog, Topic, read_state};

#[cfg(test)]
mod admin_tests;
pub mod alter_configs;
pub mod api_versions;
pub mod connection;
pub mod create_partitions;
pub mod create_topics;
pub mod delete_groups;
pub mod delete_records;
pub mod delete_topics;
pub mod describe_cluster;
pub mod describe_configs;
pub mod describe_groups;
pub mod dispatch;
pub mod fetch;
pub mod find_coordinator;
#[cfg(test)]
mod hang_tests;
pub mod heartbeat;
pub mod incremental_alter_configs;
pub mod init_producer_id;
pub mod join_group;
pub mod leave_group;
pub mod list_groups;
pub mod list_offsets;
pub mod metadata;
pub mod offset_commit;
pub mod offset_delete;
pub mod offset_fetch;
pub mod offset_for_leader_epoch;
pub mod produce;
mod refused;
pub mod sync_group;
#[cfg(test)]
mod tests;

use dispatch::Close;
use init_producer_id::ProducerIds;

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
    /// What happened so far.
    pub counters: Counters,
    memory: Memory,
    door: Arc<Door>,
    producer_ids: ProducerIds,
}

/// Memory that connections share, in units of [`MEMORY_UNIT`]. Requests and responses have budgets of their own, so that
/// neither can keep the other from going on. So have large requests: memory is granted on the word of a size field, and
/// a few that lie must not hold up everybody else's ordinary requests.
struct Memory {
    requests: Arc<Semaphore>,
    large_requests: Arc<Semaphore>,
    responses: Arc<Semaphore>,
}

/// Requests above this are large: more than one batch of the default bound.
const ORDINARY_REQUEST_BYTES_MAX: usize = 2 * 1024 * 1024;
/// The slowest a peer may send or take: keeps those who trickle from holding memory for ever.
const TRANSFER_BYTES_PER_SEC_MIN: usize = 16 * 1024;

/// Bounds on the time-out that a request may give.
const PATIENCE_MIN: Duration = Duration::from_secs(1);
const PATIENCE_MAX: Duration = Duration::from_secs(300);

/// How long a request is worked on before it is answered REQUEST_TIMED_OUT, by the time-out that it gives.
fn patience(timeout_ms: i32) -> Duration {
    Duration::from_millis(u64::try_from(timeout_ms).unwrap_or(0)).clamp(PATIENCE_MIN, PATIENCE_MAX)
}

/// Bytes per permit: semaphores count to 2^29 only, and a small request should not be free.
const MEMORY_UNIT: usize = 1024;

fn memory_units(bytes: usize) -> u32 {
    bytes.div_ceil(MEMORY_UNIT).max(1) as u32
}

impl Broker {
    /// Puts the parts together.
    pub fn new(
        log: Arc<dyn Log>,
        state: Arc<dyn StateLog>,
        catalogue: Arc<Catalogue>,
        groups: Arc<Groups>,
        node_id: i32,
        cluster_id: String,
        settings: FrontSettings,
    ) -> Self {
        // At least one request, and one response, of the largest size must fit, or it would wait for ever.
        let requests = (settings.memory_bytes_max / 4).max(ORDINARY_REQUEST_BYTES_MAX);
        let large_requests = (settings.memory_bytes_max / 4).max(settings.request_bytes_max);
        let responses = (settings.memory_bytes_max / 2).max(settings.fetch_bytes_max);
        let budget = |bytes| Arc::new(Semaphore::new(memory_units(bytes) as usize));
        Self {
            log,
            state,
            catalogue,
            groups,
            node_id,
            cluster_id,
            counters: Counters::default(),
            memory: Memory {
                requests: budget(requests),
                large_requests: budget(large_requests),
                responses: budget(responses),
            },
            door: Door::new(settings.connections_max),
            producer_ids: ProducerIds::default(),
            settings,
        }
    }

    /// Accepts connections until `shutdown` turns true, then lets each finish what it is answering, for a moment.
    pub async fn serve(
        self: Arc<Self>,
        socket: TcpListener,
        listener: Arc<Listener>,
        mut shutdown: watch::Receiver<bool>,
    ) {
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                accepted = socket.accept() => accepted,
                _ = shutdown.wait_for(|stop| *stop) => break,
            };
            match accepted {
                Ok((stream, peer)) => {
                    let seat = tokio::select! {
                        seat = self.door.enter() => seat,
                        _ = shutdown.wait_for(|stop| *stop) => break,
                    };
                    match seat {
                        Some(seat) => self.accept(stream, peer, seat, &listener, &shutdown, &mut connections),
                        None => {
                            let max = self.door.max();
                            limited!(warn, %peer, max, "connection refused: as many are open as are allowed");
                        }
                    }
                }
                Err(error) => {
                    // Out of descriptors, mostly: without a pause this loop would burn a core until some are free.
                    limited!(warn, %error, listener = %listener.name, "cannot accept connections, trying again");
                    self.door.evict();
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
            while connections.try_join_next().is_some() {}
        }
        drop(socket);
        while connections.join_next().await.is_some() {}
    }

    fn accept(
        self: &Arc<Self>,
        stream: TcpStream,
        peer: SocketAddr,
        seat: Seat,
        listener: &Arc<Listener>,
        shutdown: &watch::Receiver<bool>,
        connections: &mut JoinSet<()>,
    ) {
        let (broker, listener, shutdown) = (self.clone(), listener.clone(), shutdown.clone());
        let span = info_span!("kafka", %peer, listener = %listener.name);
        let task = async move {
            broker.counters.connections_opened.add(1);
            let close = connection::run(&broker, listener, peer, stream, &seat, shutdown).await;
            match close {
                Close::Gone | Close::Idle | Close::Shutdown | Close::Silent | Close::Evicted => {
                    debug!(%close, "connection closed");
                }
                // How clients leave who have a Fetch waiting.
                Close::Failed(ref error) if matches!(error.kind(), BrokenPipe | ConnectionReset) => {
                    debug!(%close, "connection closed");
                }
                Close::Failed(_) | Close::Slow => limited!(info, %close, "connection closed"),
                _ => limited!(warn, %close, "connection closed"),
            }
            broker.counters.connections_closed.add(1);
            drop(seat);
        };
        connections.spawn(task.instrument(span));
    }
}

/// What a request needs to know of a topic.
#[derive(Debug, Clone)]
pub(crate) struct Route {
    pub id: TopicId,
    pub name: TopicName,
    pub partitions: u32,
    /// Largest batch it takes.
    pub batch_bytes_max: usize,
}

impl Route {
    fn of(broker: &Broker, topic: &Topic) -> Self {
        Self {
            id: topic.id,
            name: topic.name.clone(),
            partitions: topic.partitions,
            batch_bytes_max: broker.catalogue.config(topic).max_message_bytes,
        }
    }

    /// The partition with this number, if the topic has it.
    fn partition(&self, index: i32) -> Option<shared::name::Partition> {
        let index = u32::try_from(index).ok().filter(|index| *index < self.partitions)?;
        Some(shared::name::Partition { topic: self.id, index })
    }
}

impl Broker {
    /// The connections of all listeners.
    pub fn door(&self) -> DoorStatus {
        self.door.status()
    }

    /// The topics of these names, `None` where there is none, as of one moment.
    fn routes_named<'a>(&self, names: impl Iterator<Item = &'a str>) -> Vec<Option<Route>> {
        let find = |state: &State, name| {
            let topic = state.topic_named(&TopicName::parse(name).ok()?)?;
            Some(Route::of(self, topic))
        };
        read_state(&*self.state, |state| names.map(|name| find(state, name)).collect())
    }

    /// The topics of these ids.
    fn routes_with_ids(&self, ids: impl Iterator<Item = Uuid>) -> Vec<Option<Route>> {
        let find = |state: &State, id: Uuid| Some(Route::of(self, state.topic(TopicId(id.0))?));
        read_state(&*self.state, |state| ids.map(|id| find(state, id)).collect())
    }
}

/// Bits of the operations a client may do (KIP-430). Without an authoriser these are all there are.
pub mod operations {
    /// On a topic: read, write, create, delete, alter, describe, describe and alter settings.
    pub const TOPIC: i32 = 0b1101_1111_1000;
    /// On a group: read, delete, describe.
    pub const GROUP: i32 = 0b0001_0100_1000;
    /// On the cluster: create, alter, describe, cluster action, describe and alter settings, idempotent write.
    pub const CLUSTER: i32 = 0b1_1111_1010_0000;
}

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds to it.
    pub fn add(&self, by: u64) {
        self.0.fetch_add(by, Ordering::Relaxed);
    }

    /// What it came to.
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What the front did so far.
#[derive(Debug, Default)]
pub struct Counters {
    /// Connections accepted.
    pub connections_opened: Counter,
    /// Of those, ended.
    pub connections_closed: Counter,
    /// Requests begun.
    pub requests: Counter,
    /// Bytes of requests, with their size fields.
    pub request_bytes: Counter,
    /// Bytes of responses, with their size fields.
    pub response_bytes: Counter,
    /// Batches appended.
    pub produced_batches: Counter,
    /// Bytes of these.
    pub produced_bytes: Counter,
    /// Batches refused, for whatever reason.
    pub refused_batches: Counter,
    /// Bytes of batches sent to consumers.
    pub fetched_bytes: Counter,
}

/// The front at a moment, for status and metrics.
#[derive(Debug, Clone, Copy, serde::Serialize)]
#[allow(missing_docs, reason = "the counters above, and what is free")]
pub struct FrontStatus {
    pub connections: u64,
    pub connections_opened: u64,
    pub connections_refused: u64,
    pub connections_evicted: u64,
    pub requests: u64,
    pub request_bytes: u64,
    pub response_bytes: u64,
    pub produced_batches: u64,
    pub produced_bytes: u64,
    pub refused_batches: u64,
    pub fetched_bytes: u64,
    pub request_memory_free_bytes: u64,
    pub response_memory_free_bytes: u64,
}

impl Broker {
    /// How long a peer may take to send or take so many bytes.
    fn transfer_time(&self, bytes: usize) -> Duration {
        self.settings.transfer_timeout + Duration::from_secs((bytes / TRANSFER_BYTES_PER_SEC_MIN) as u64)
    }

    /// The front at this moment.
    pub fn status(&self) -> FrontStatus {
        let counters = &self.counters;
        let free = |semaphore: &Semaphore| (semaphore.available_permits() * MEMORY_UNIT) as u64;
        let memory = &self.memory;
        let closed = counters.connections_closed.value();
        FrontStatus {
            connections: counters.connections_opened.value().saturating_sub(closed),
            connections_opened: counters.connections_opened.value(),
            connections_refused: self.door.status().refused,
            connections_evicted: self.door.status().evicted,
            requests: counters.requests.value(),
            request_bytes: counters.request_bytes.value(),
            response_bytes: counters.response_bytes.value(),
            produced_batches: counters.produced_batches.value(),
            produced_bytes: counters.produced_bytes.value(),
            refused_batches: counters.refused_batches.value(),
            fetched_bytes: counters.fetched_bytes.value(),
            request_memory_free_bytes: free(&memory.requests) + free(&memory.large_requests),
            response_memory_free_bytes: free(&memory.responses),
        }
    }
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
    /// Most connections at a time over all listeners. A further one takes the place of one that never made a request, or is
    /// closed at once.
    pub connections_max: usize,
    /// Memory for requests being read and served, and for responses being built; further requests wait unread.
    pub memory_bytes_max: usize,
    /// Most record bytes in one Fetch response, whatever the client asks (Kafka's `fetch.max.bytes`): a slow reader
    /// holds as much of `memory_bytes_max` until it has taken it. Clients simply ask again.
    pub fetch_bytes_max: usize,
    /// Longest a Fetch is held, whatever the client asks.
    pub fetch_wait_max: Duration,
    /// A TLS handshake must be through, and then the size of the first request be there, in this time each.
    pub first_request_timeout: Duration,
    /// A connection without a request for so long is closed (Kafka's `connections.max.idle.ms`).
    pub idle_timeout: Duration,
    /// A request that has begun, a TLS handshake or a response must be through in this time, or at 16 KiB a second.
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
            fetch_bytes_max: 8 * 1024 * 1024,
            fetch_wait_max: Duration::from_secs(60),
            first_request_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(600),
            transfer_timeout: Duration::from_secs(30),
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
