//! The link's cloud half over HTTPS: who may send, what goes where, and what is answered.
//!
//! [`EdgeSession`] decides; this file does. Requests of one edge are worked off one at a time on its [`Lane`], each as a
//! task of its own: a client that hangs up does not stop an append half way, and no hello is answered while an older
//! append of the same edge is still under way. No answer takes longer than [`IngestSettings::answer_timeout`], however long
//! the log does (see `store`). Bodies share one budget of memory. Knows nothing of engines.

mod auth;
mod http;
mod place;
mod safety;
mod serve;
mod store;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use shared::batch::{BatchBuilder, Compression};
use shared::door::{Door, DoorStatus};
use shared::limited;
use shared::limits::{BATCH_BYTES_MAX, LINK_BODY_BYTES_MAX, LINK_POLL_SECS_MAX};
use shared::link::frame::{
    Append, AppendReply, Credit, HEADER_BYTES_MAX, Hello, HelloReply, Limits, Outcome, Poll, PollReply, SessionState,
};
use shared::link::receiver::{EdgeSession, HelloRefused, Plan, StorePlan, Takeover, outcome_of, rejected_topic};
use shared::link::{GAPS_TOPIC, Position};
use shared::log::{self, AppendError, Appended, BoxFuture, Log, Source, StreamKey};
use shared::login::LoginThrottle;
use shared::name::{EdgeId, Offset, Partition, StreamName, TimestampMs, TopicName};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, timeout_at};

pub use auth::{AuthError, Caller, EdgeGrant, Grants};
pub use http::router;
pub use place::{TopicError, Topics};
pub use safety::Safety;
pub use serve::serve;

use self::store::{Taken, unshared, waits};
use crate::state::StateLog;

/// How the link is served.
#[derive(Debug, Clone)]
pub struct IngestSettings {
    /// Who may connect.
    pub grants: Grants,
    /// Largest sealed batch.
    pub batch_bytes_max: usize,
    /// Largest sum of batches in one body.
    pub body_bytes_max: usize,
    /// Longest long poll.
    pub poll_secs_max: u16,
    /// Memory for all bodies together; beyond it edges wait.
    pub memory_bytes: usize,
    /// Longest a body may take to arrive, before its size is taken into account.
    pub body_timeout: Duration,
    /// Longest a hello or an append waits for the log. Shorter than edges wait for the answer, or they would learn less from
    /// none than from this one.
    pub answer_timeout: Duration,
    /// Partitions of topics that are made because a stream names them.
    pub stream_partitions: u32,
    /// Most connections at once. A further one takes the place of one that has not shown a good token, or is closed at once.
    pub connections_max: usize,
}

impl Default for IngestSettings {
    fn default() -> Self {
        Self {
            grants: Grants::default(),
            batch_bytes_max: BATCH_BYTES_MAX,
            body_bytes_max: LINK_BODY_BYTES_MAX,
            poll_secs_max: LINK_POLL_SECS_MAX as u16,
            memory_bytes: 128 * 1024 * 1024,
            body_timeout: Duration::from_secs(60),
            answer_timeout: Duration::from_secs(20),
            stream_partitions: 16,
            connections_max: 10_000,
        }
    }
}

/// Most edges known at once; in open mode anyone may name a new one.
const EDGES_MAX: usize = 65_536;
/// Unit of the memory budget.
const BUDGET_UNIT: usize = 1024;
/// Below this much free memory no credit is granted.
const CREDIT_BYTES_MIN: usize = 256 * 1024;
/// What an edge without credit waits, unless a poll grants some.
const CREDIT_WAIT_MS: u32 = 2000;

/// Receives edges' streams.
pub struct Ingest {
    settings: IngestSettings,
    log: Arc<dyn Log>,
    state: Arc<dyn StateLog>,
    topics: Arc<dyn Topics>,
    safety: Arc<dyn Safety>,
    clock: fn() -> TimestampMs,
    lanes: Mutex<HashMap<EdgeId, Arc<Lane>>>,
    placing: tokio::sync::Mutex<()>,
    budget: Arc<Semaphore>,
    freed: Notify,
    closing: watch::Sender<bool>,
    door: Arc<Door>,
    throttle: Arc<LoginThrottle>,
    counters: Counters,
}

/// One edge's requests, one at a time.
struct Lane {
    /// Whose turn it is also has what earlier requests left in the log without knowing what became of it.
    turn: tokio::sync::Mutex<Vec<Taken>>,
    session: Mutex<EdgeSession>,
    /// A hello has changed the session, or an append its positions.
    changed: Notify,
}

/// What has happened since the start.
#[derive(Debug, Default)]
struct Counters {
    hellos: AtomicU64,
    appends: AtomicU64,
    batches: AtomicU64,
    records: AtomicU64,
    bytes: AtomicU64,
    duplicates: AtomicU64,
    rejected: AtomicU64,
    gaps: AtomicU64,
    refused: AtomicU64,
    takeovers: AtomicU64,
    new_incarnations: AtomicU64,
}

/// The link, for status pages and metrics.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct IngestStatus {
    /// Edges that said hello since the start.
    pub edges: Vec<EdgeStatus>,
    /// Hellos answered.
    pub hellos: u64,
    /// Appends answered.
    pub appends: u64,
    /// Sealed batches stored.
    pub batches: u64,
    /// Records stored.
    pub records: u64,
    /// Bytes of sealed batches stored.
    pub bytes: u64,
    /// Batches that were stored already.
    pub duplicates: u64,
    /// Records that went to a `.rejected` topic.
    pub rejected: u64,
    /// Gaps that edges declared.
    pub gaps: u64,
    /// Requests refused for their token, id, version or form.
    pub refused: u64,
    /// Sessions ended by another run of the same edge.
    pub takeovers: u64,
    /// Streams that went on under a new incarnation: their edge's data were restored, copied or set aside.
    pub new_incarnations: u64,
    /// Bytes of bodies that may be taken now.
    pub memory_free_bytes: u64,
}

/// One edge, for status pages.
#[derive(Debug, Clone, serde::Serialize)]
pub struct EdgeStatus {
    /// Its id.
    pub edge: EdgeId,
    /// Its software, as it says.
    pub software: String,
    /// Its last hello.
    pub hello_ms: TimestampMs,
    /// How often two runs took the id from each other: above 0, two gateways use it.
    pub alternations: u32,
}

/// Why a request came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum IngestError {
    /// Token or id.
    #[error(transparent)]
    Auth(#[from] AuthError),
    /// No version in common, or overtaken.
    #[error(transparent)]
    Hello(#[from] HelloRefused),
    /// Too many edges, or the log or catalogue cannot take anything now.
    #[error("{0}")]
    Unavailable(String),
}

impl Ingest {
    /// A link over this log and state. `clock` is the wall clock.
    pub fn new(
        settings: IngestSettings,
        log: Arc<dyn Log>,
        state: Arc<dyn StateLog>,
        topics: Arc<dyn Topics>,
        safety: Arc<dyn Safety>,
        clock: fn() -> TimestampMs,
    ) -> Arc<Self> {
        // A budget that cannot hold one body would stop the link for ever.
        let least = settings.body_bytes_max + HEADER_BYTES_MAX;
        let budget = (settings.memory_bytes.max(least) / BUDGET_UNIT + 1).min(Semaphore::MAX_PERMITS);
        let door = Door::new(settings.connections_max);
        Arc::new(Self {
            settings,
            log,
            state,
            topics,
            safety,
            clock,
            lanes: Mutex::default(),
            placing: tokio::sync::Mutex::default(),
            budget: Arc::new(Semaphore::new(budget)),
            freed: Notify::new(),
            closing: watch::Sender::new(false),
            door,
            throttle: Arc::default(),
            counters: Counters::default(),
        })
    }

    /// Ends long polls, now and from now on.
    pub fn close(&self) {
        self.closing.send_replace(true);
    }

    /// The connections.
    pub fn door(&self) -> DoorStatus {
        self.door.status()
    }

    /// Requests with a wrong token, since the start.
    pub fn failed_logins(&self) -> u64 {
        self.throttle.failed_total()
    }

    /// Counters and edges.
    pub fn status(&self) -> IngestStatus {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let lanes: Vec<Arc<Lane>> = self.lanes.lock().values().cloned().collect();
        let mut edges: Vec<EdgeStatus> = lanes
            .iter()
            .map(|lane| lane.session.lock())
            .filter(|session| session.hello_ms() > 0)
            .map(|session| EdgeStatus {
                edge: session.edge().clone(),
                software: session.software().to_owned(),
                hello_ms: session.hello_ms(),
                alternations: session.alternations(),
            })
            .collect();
        edges.sort_by(|a, b| a.edge.cmp(&b.edge));
        let counters = &self.counters;
        IngestStatus {
            edges,
            hellos: read(&counters.hellos),
            appends: read(&counters.appends),
            batches: read(&counters.batches),
            records: read(&counters.records),
            bytes: read(&counters.bytes),
            duplicates: read(&counters.duplicates),
            rejected: read(&counters.rejected),
            gaps: read(&counters.gaps),
            refused: read(&counters.refused),
            takeovers: read(&counters.takeovers),
            new_incarnations: read(&counters.new_incarnations),
            memory_free_bytes: (self.budget.available_permits() * BUDGET_UNIT) as u64,
        }
    }

    /// Answers a hello.
    pub async fn hello(self: &Arc<Self>, caller: &Caller<'_>, hello: Hello) -> Result<HelloReply, IngestError> {
        caller.is(&hello.edge)?;
        let refusals = hello.streams.iter().map(|stream| caller.refuses(&stream.topic)).collect();
        let lane = self.lane(&hello.edge)?;
        let ingest = self.clone();
        let deadline = Instant::now() + self.settings.answer_timeout;
        detached(async move { ingest.hello_in_turn(&lane, hello, refusals, deadline).await }).await
    }

    async fn hello_in_turn(
        &self,
        lane: &Lane,
        hello: Hello,
        refusals: Vec<Option<String>>,
        deadline: Instant,
    ) -> Result<HelloReply, IngestError> {
        let mut late = lane.turn(deadline).await?;
        self.settle(&mut late);
        let now_ms = (self.clock)();
        let takeover = lane.session.lock().hello(now_ms, &hello)?;
        lane.changed.notify_waiters();
        self.note_takeover(&hello.edge, takeover);
        let targets = self.place(now_ms, &hello, refusals, deadline).await?;
        count(&self.counters.hellos, 1);

        let mut session = lane.session.lock();
        for (stream, target) in hello.streams.iter().zip(targets) {
            let (edge, name) = (hello.edge.clone(), stream.name.clone());
            let key = StreamKey { edge, stream: name, incarnation: stream.incarnation };
            let target = waits(&late, &key).map_or(target, Err);
            if let Err(reason) = &target {
                limited!(warn, edge = %hello.edge, stream = %stream.name, reason, "stream is parked");
            }
            session.route(stream.name.clone(), stream.topic.clone(), stream.incarnation, target);
        }
        Ok(session.hello_reply(now_ms, &hello, self.limits(), self.credit(), &|key| self.known(key)))
    }

    fn note_takeover(&self, edge: &EdgeId, takeover: Takeover) {
        match takeover {
            Takeover::None | Takeover::Again => limited!(info, %edge, "edge says hello"),
            Takeover::Superseded => {
                count(&self.counters.takeovers, 1);
                limited!(info, %edge, "edge says hello from another run; the older session is ended");
            }
            Takeover::Alternating { times } => {
                count(&self.counters.takeovers, 1);
                limited!(warn,
                    %edge, times,
                    "two gateways take this edge id from each other: give one of them another id and token"
                );
            }
        }
    }

    /// Answers an append, whose batches are `bodies`. `room` is dropped when the log has them.
    pub async fn append(
        self: &Arc<Self>,
        caller: &Caller<'_>,
        append: Append,
        bodies: Vec<Bytes>,
        room: OwnedSemaphorePermit,
    ) -> Result<AppendReply, IngestError> {
        caller.is(&append.edge)?;
        let lane = self.lane(&append.edge)?;
        let ingest = self.clone();
        let deadline = Instant::now() + self.settings.answer_timeout;
        detached(async move {
            let reply = ingest.append_in_turn(&lane, append, bodies, room, deadline).await;
            ingest.freed.notify_waiters();
            reply
        })
        .await
    }

    async fn append_in_turn(
        &self,
        lane: &Lane,
        append: Append,
        bodies: Vec<Bytes>,
        room: OwnedSemaphorePermit,
        deadline: Instant,
    ) -> Result<AppendReply, IngestError> {
        let mut late = lane.turn(deadline).await?;
        self.settle(&mut late);
        count(&self.counters.appends, 1);
        let plans = {
            let session = lane.session.lock();
            match session.session(append.session) {
                SessionState::Current => {}
                state => return Ok(EdgeSession::refuse(state)),
            }
            let max = self.settings.batch_bytes_max;
            session.plan(&append, unshared(bodies), max, &|key| self.position(key))
        };
        let results = self.store(&append.edge, plans, &mut late, room, deadline).await;
        lane.changed.notify_waiters();
        let session = lane.session.lock();
        Ok(session.append_reply(results, self.credit(), &|key| self.known(key)))
    }

    /// Answers a poll once there is news, or its time is over.
    pub async fn poll(&self, caller: &Caller<'_>, poll: Poll) -> Result<PollReply, IngestError> {
        caller.is(&poll.edge)?;
        let lane = self.lane(&poll.edge)?;
        let wait = Duration::from_secs(u64::from(poll.wait_secs.min(self.settings.poll_secs_max)));
        let deadline = Instant::now() + wait;
        let mut closing = self.closing.subscribe();
        loop {
            // Asked for before looking, so that nothing is missed in between.
            let (changed, freed, safer) = (lane.changed.notified(), self.freed.notified(), self.safety.changed());
            let reply = self.poll_reply(&lane, &poll);
            let news = reply.session != SessionState::Current
                || poll.wants_credit && reply.credit.bytes > 0
                || poll.known.iter().any(|(name, known)| reply.safe.iter().any(|(n, safe)| n == name && safe > known));
            if news || *closing.borrow_and_update() {
                return Ok(reply);
            }
            tokio::select! {
                biased;
                () = changed => {}
                () = safer => {}
                () = freed, if poll.wants_credit => {}
                _ = closing.changed() => {}
                () = tokio::time::sleep_until(deadline) => return Ok(self.poll_reply(&lane, &poll)),
            }
        }
    }

    fn poll_reply(&self, lane: &Lane, poll: &Poll) -> PollReply {
        let session = lane.session.lock();
        let state = session.session(poll.session);
        let mut safe = Vec::new();
        if state == SessionState::Current {
            safe.extend(poll.known.iter().filter_map(|(name, _)| {
                let at = self.known(&session.stream_key(name)?).1?;
                Some((name.clone(), at))
            }));
        }
        PollReply { session: state, credit: self.credit(), safe }
    }

    fn position(&self, key: &StreamKey) -> Option<Position> {
        self.state.stream(key).map(|stream| Position { next: stream.next, chain: stream.chain })
    }

    fn known(&self, key: &StreamKey) -> (Option<Position>, Option<Offset>) {
        let position = self.position(key);
        let safe = position.and_then(|position| Some(self.safety.safe(key)?.min(position.next)));
        (position, safe)
    }

    fn limits(&self) -> Limits {
        let bytes = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Limits {
            batch_bytes_max: bytes(self.settings.batch_bytes_max),
            body_bytes_max: bytes(self.settings.body_bytes_max),
            poll_secs_max: self.settings.poll_secs_max,
        }
    }

    fn credit(&self) -> Credit {
        let free = self.budget.available_permits() * BUDGET_UNIT;
        if free < CREDIT_BYTES_MIN {
            return Credit { bytes: 0, wait_ms: CREDIT_WAIT_MS };
        }
        let bytes = u32::try_from(free.min(self.settings.body_bytes_max)).unwrap_or(u32::MAX);
        Credit { bytes, wait_ms: 0 }
    }

    fn lane(&self, edge: &EdgeId) -> Result<Arc<Lane>, IngestError> {
        let mut lanes = self.lanes.lock();
        if let Some(lane) = lanes.get(edge) {
            return Ok(lane.clone());
        }
        if lanes.len() >= EDGES_MAX {
            return Err(IngestError::Unavailable(format!("{EDGES_MAX} edges are known already")));
        }
        let lane = Arc::new(Lane {
            turn: tokio::sync::Mutex::default(),
            session: Mutex::new(EdgeSession::new(edge.clone())),
            changed: Notify::new(),
        });
        lanes.insert(edge.clone(), lane.clone());
        Ok(lane)
    }
}

impl Lane {
    /// Waits until older requests of the edge are answered.
    async fn turn(&self, deadline: Instant) -> Result<tokio::sync::MutexGuard<'_, Vec<Taken>>, IngestError> {
        let turn = timeout_at(deadline, self.turn.lock()).await;
        turn.map_err(|_| IngestError::Unavailable("an older request of this edge is still under way".to_owned()))
    }
}

fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

/// Runs to the end even if the caller goes away.
async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T, IngestError>> + Send + 'static,
) -> Result<T, IngestError> {
    #[cfg(test)]
    if crate::sim::is_running() {
        // There nobody goes away but with the whole node.
        return work.await;
    }
    match tokio::spawn(work).await {
        Ok(result) => result,
        Err(error) => Err(IngestError::Unavailable(format!("the request's task failed: {error}"))),
    }
}
