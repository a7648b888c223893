//! The front both brokers run: listeners, connections, and what they share.
//!
//! Work goes by the buffer, not by the message: a connection reads a buffer, offers all its PUBLISHes to the
//! [`Store`] in one call, appends them to each subscriber's bytes in one go, and writes once. Sessions live here, above the
//! store; the store keeps what must survive. One rule for locks: a session's state may be held while the topic tree is
//! changed; never the other way round, and never two sessions at a time.
//!
//! Limits: messages queued for an offline session, and what was on its way to a subscriber, live in memory and go with the
//! process; so do wills. Shared subscriptions (0x9E) and enhanced authentication (0x8C) are refused. After a restart each kept
//! session gets its whole expiry again.
//!
//! No poll does much for one client: what a packet asks of others goes in steps ([`turns`], the search for
//! retained messages), and what it makes the front remember is counted in one budget ([`MemoryBudget`]).

mod connection;
mod fanout;
mod lifecycle;
mod packets;
pub(crate) mod session;
mod settings;
mod stats;
#[cfg(test)]
mod tests;
mod turns;

pub use crate::memory::MEMORY_USES;
pub use session::SessionInfo;
pub use settings::{ListenerSettings, Settings, User};
pub use stats::Stats;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::net::SocketAddr;
use std::ops::Bound;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::{Mutex, RwLock};
use shared::door::Door;
use shared::limited;
use shared::login::LoginThrottle;
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tracing::{debug, info, warn};

use crate::codec::Reason;
use crate::memory::MemoryBudget;
use crate::retained::Retained;
use crate::store::{Publish, PublishProperties, Store, StoreFailed};
use crate::tree::Tree;
use session::{Handle, Pool, Session};
use turns::Lanes;

/// A running MQTT front.
pub struct Front {
    pub(crate) settings: Settings,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) tree: RwLock<Tree<Arc<Session>>>,
    /// Counts changes of the tree: what connections remember of it is good for one value.
    pub(crate) generation: AtomicU64,
    pub(crate) sessions: Mutex<BTreeMap<Arc<str>, Arc<Session>>>,
    /// Of these, those that outlive their connections.
    pub(crate) sessions_kept: AtomicUsize,
    /// Of these, those that may be ended to make room, the longest absent first.
    pub(crate) evictable: Mutex<BTreeSet<(u64, Arc<str>)>>,
    pub(crate) memory: Arc<MemoryBudget>,
    pub(crate) retained: Mutex<Retained>,
    /// Delayed wills and session ends, by time.
    pub(crate) timers: Mutex<BTreeSet<(i64, Arc<str>)>>,
    pub(crate) pool: Pool,
    pub(crate) lanes: Lanes,
    pub(crate) counters: stats::Counters,
    pub(crate) throttle: Arc<LoginThrottle>,
    connections: Mutex<HashMap<u64, Arc<Handle>>>,
    /// Who may come in, and who leaves for that: a connection is known once its CONNECT is good.
    door: Arc<Door>,
    next_number: AtomicU64,
    /// Counts sessions that were left, over all starts.
    pub(crate) times_left: AtomicU64,
    started: Instant,
    closing: AtomicBool,
    changed: Notify,
    housekeeping: AtomicBool,
    weak: Weak<Front>,
}

/// The time, told twice: one that never jumps, one that people read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Now {
    pub instant: Instant,
    /// Milliseconds since the front started.
    pub ms: i64,
    /// Milliseconds since 1970.
    pub wall_ms: i64,
}

/// Why a listener does not run (any more).
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// It can be reached from elsewhere, and nobody would be asked who they are.
    #[error(
        "listener {name} on {address} can be reached from other machines and checks nobody: name who may connect, or set \
         allow_anonymous = true for this listener"
    )]
    OpenToAll {
        /// The listener's name.
        name: String,
        /// Where it is bound.
        address: SocketAddr,
    },
    /// The listening socket failed.
    #[error("listener {name}: {error}")]
    Listen {
        /// The listener's name.
        name: String,
        /// What the system said.
        error: io::Error,
    },
}

impl Front {
    /// Loads kept sessions and retained messages.
    pub fn new(settings: Settings, store: Arc<dyn Store>) -> Result<Arc<Self>, StoreFailed> {
        let memory = Arc::new(MemoryBudget::new(settings.memory_bytes_max));
        let door = Door::new(settings.connections_max);
        let front = Arc::new_cyclic(|weak| Self {
            settings,
            door,
            store,
            tree: RwLock::default(),
            generation: AtomicU64::new(1),
            sessions: Mutex::default(),
            sessions_kept: AtomicUsize::new(0),
            evictable: Mutex::default(),
            memory,
            retained: Mutex::default(),
            timers: Mutex::default(),
            pool: Pool::default(),
            lanes: Lanes::default(),
            counters: stats::Counters::default(),
            throttle: Arc::default(),
            connections: Mutex::default(),
            next_number: AtomicU64::new(1),
            times_left: AtomicU64::new(0),
            started: Instant::now(),
            closing: AtomicBool::new(false),
            changed: Notify::new(),
            housekeeping: AtomicBool::new(false),
            weak: weak.clone(),
        });
        front.load()?;
        Ok(front)
    }

    /// Accepts connections until [`Self::shutdown`]. `tls` makes it a TLS listener.
    pub async fn serve(
        self: Arc<Self>,
        listener: TcpListener,
        tls: Option<Arc<rustls::ServerConfig>>,
        settings: ListenerSettings,
    ) -> Result<(), ServeError> {
        let name = settings.name;
        let address = listener.local_addr().map_err(|error| ServeError::Listen { name: name.clone(), error })?;
        if !address.ip().is_loopback() && !settings.allow_anonymous && self.settings.users.is_empty() {
            return Err(ServeError::OpenToAll { name, address });
        }
        self.keep_house();
        info!(listener = %name, %address, tls = tls.is_some(), "listening for MQTT");
        loop {
            let closing = self.changed.notified();
            tokio::pin!(closing);
            closing.as_mut().enable();
            if self.closing.load(Ordering::Acquire) {
                return Ok(());
            }
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = closing.as_mut() => continue,
            };
            match accepted {
                Ok((stream, peer)) => {
                    let seat = tokio::select! {
                        seat = self.door.enter() => seat,
                        () = closing => continue,
                    };
                    let Some(seat) = seat else {
                        let max = self.door.max();
                        limited!(warn, %peer, max, "connection refused: there are as many clients as allowed");
                        continue;
                    };
                    stats::add(&self.counters.connections_total, 1);
                    if let Err(error) = stream.set_nodelay(true) {
                        debug!(%peer, %error, "TCP_NODELAY");
                    }
                    tokio::spawn(connection::run(self.clone(), stream, peer, tls.clone(), seat));
                }
                Err(error) => {
                    // Out of file descriptors, most likely: those who have said nothing yet make room for those who want to.
                    limited!(warn, listener = %name, %error, "cannot accept a connection");
                    self.door.evict();
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// Stops listening, waits until acknowledgements that wait for durability have left, says goodbye (0x8B) and closes;
    /// what is not done by `deadline` is cut.
    pub async fn shutdown(&self, deadline: Duration) {
        let until = tokio::time::Instant::now() + deadline;
        self.closing.store(true, Ordering::Release);
        self.changed.notify_waiters();
        let handles: Vec<_> = self.connections.lock().values().cloned().collect();
        handles.iter().for_each(|handle| handle.kick(Reason::SERVER_SHUTTING_DOWN));
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if self.connections.lock().is_empty() {
                return;
            }
            if tokio::time::timeout_at(until, changed).await.is_err() {
                let handles: Vec<_> = self.connections.lock().values().cloned().collect();
                warn!(connections = handles.len(), "closing connections whose acknowledgements still wait");
                handles.iter().for_each(|handle| handle.kick(Reason::UNSPECIFIED_ERROR));
                return;
            }
        }
    }

    /// CONNECTs with a wrong name or password, since the start.
    pub fn failed_logins(&self) -> u64 {
        self.throttle.failed_total()
    }

    /// Serves one connection, for whoever accepted it elsewhere.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn serve_one(self: &Arc<Self>, stream: tokio::net::TcpStream, peer: SocketAddr) {
        let front = self.clone();
        tokio::spawn(async move {
            if let Some(seat) = front.door.enter().await {
                connection::run(front, stream, peer, None, seat).await;
            }
        });
    }

    /// Counters and sizes.
    pub fn stats(&self) -> Stats {
        let mut stats = self.counters.read();
        let door = self.door.status();
        (stats.connections_refused_total, stats.connections_evicted_total) = (door.refused, door.evicted);
        stats.memory_bytes = self.memory.by_use();
        stats.memory_bytes_max = self.memory.bytes_max() as u64;
        stats.sessions_kept = self.sessions_kept.load(Ordering::Relaxed) as u64;
        stats.connections = self.connections.lock().len() as u64;
        stats.sessions = self.sessions.lock().len() as u64;
        stats.subscriptions = self.tree.read().len() as u64;
        let retained = self.retained.lock();
        stats.retained_messages = retained.len() as u64;
        stats.retained_bytes = retained.bytes() as u64;
        stats
    }

    /// Delivers a message of the broker's own (alarms, `$SYS`) to who subscribes to it. It is not offered to the store; a
    /// retained one lasts until the process ends.
    pub fn publish(&self, topic: &str, payload: &[u8], retain: bool) {
        let now = self.now();
        let publish = Publish {
            topic,
            payload,
            qos: 1,
            retain,
            packet_id: None,
            now_ms: now.wall_ms,
            properties: PublishProperties::default(),
        };
        let mut retained = retain.then(|| self.retained.lock());
        let Some(message) = Self::retain(&publish, retained.as_deref_mut(), now) else { return };
        drop(retained);
        self.deliver_message(&publish, message, now, None);
    }

    pub(crate) fn now(&self) -> Now {
        let instant = Instant::now();
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Now {
            instant,
            ms: instant.duration_since(self.started).as_millis() as i64,
            wall_ms: i64::try_from(wall.as_millis()).unwrap_or(i64::MAX),
        }
    }

    /// Up to `count` sessions in the order of their client identifiers, from the first behind `after`.
    pub fn sessions(&self, after: &str, count: usize) -> Vec<SessionInfo> {
        let now = self.now();
        self.sessions_after(after, count).iter().map(|session| session.info(now)).collect()
    }

    fn sessions_after(&self, after: &str, count: usize) -> Vec<Arc<Session>> {
        let range = (if after.is_empty() { Bound::Unbounded } else { Bound::Excluded(after) }, Bound::Unbounded);
        self.sessions.lock().range::<str, _>(range).take(count).map(|(_, session)| session.clone()).collect()
    }

    pub(crate) fn next_number(&self) -> u64 {
        self.next_number.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    fn enter(&self, number: u64, handle: Arc<Handle>) {
        self.connections.lock().insert(number, handle);
    }

    fn leave(&self, number: u64) {
        self.connections.lock().remove(&number);
        if self.closing() {
            self.changed.notify_waiters();
        }
    }
}
