//! The link's cloud half over HTTPS: who may send, what goes where, and what is answered.
//!
//! [`EdgeSession`] decides; this file does. Requests of one edge are worked off one at a time on its [`Lane`], each as a
//! task of its own: a client that hangs up does not stop an append half way, and no hello is answered while an older
//! append of the same edge is still under way. Bodies share one budget of memory. Knows nothing of engines.

mod auth;
mod http;
mod place;
mod safety;
mod serve;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use shared::batch::{BatchBuilder, Compression};
use shared::limits::{BATCH_BYTES_MAX, LINK_BODY_BYTES_MAX, LINK_POLL_SECS_MAX};
use shared::link::frame::{
    Append, AppendReply, Credit, HEADER_BYTES_MAX, Hello, HelloReply, Limits, Outcome, Poll, PollReply, SessionState,
};
use shared::link::receiver::{EdgeSession, HelloRefused, Plan, StorePlan, Takeover, outcome_of, rejected_topic};
use shared::link::{GAPS_TOPIC, Position};
use shared::log::{self, AppendError, Appended, BoxFuture, Log, Source, StreamKey};
use shared::name::{EdgeId, Offset, Partition, StreamName, TimestampMs, TopicName};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};
use tracing::{info, warn};

pub use auth::{AuthError, Caller, EdgeGrant, Grants};
pub use http::router;
pub use place::{TopicError, Topics};
pub use safety::Safety;
pub use serve::serve;

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
    /// Partitions of topics that are made because a stream names them.
    pub stream_partitions: u32,
    /// Most connections at once.
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
            stream_partitions: 16,
            connections_max: 20_000,
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
    counters: Counters,
}

/// One edge's requests, one at a time.
struct Lane {
    turn: tokio::sync::Mutex<()>,
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
            counters: Counters::default(),
        })
    }

    /// Ends long polls, now and from now on.
    pub fn close(&self) {
        self.closing.send_replace(true);
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
        detached(async move { ingest.hello_in_turn(&lane, hello, refusals).await }).await
    }

    async fn hello_in_turn(
        &self,
        lane: &Lane,
        hello: Hello,
        refusals: Vec<Option<String>>,
    ) -> Result<HelloReply, IngestError> {
        let _turn = lane.turn.lock().await;
        let now_ms = (self.clock)();
        let takeover = lane.session.lock().hello(now_ms, &hello)?;
        lane.changed.notify_waiters();
        self.note_takeover(&hello.edge, takeover);
        let targets = self.place(now_ms, &hello, refusals).await?;
        count(&self.counters.hellos, 1);

        let mut session = lane.session.lock();
        for (stream, target) in hello.streams.iter().zip(targets) {
            if let Err(reason) = &target {
                warn!(edge = %hello.edge, stream = %stream.name, reason, "stream is parked");
            }
            session.route(stream.name.clone(), stream.topic.clone(), stream.incarnation, target);
        }
        Ok(session.hello_reply(now_ms, &hello, self.limits(), self.credit(), &|key| self.known(key)))
    }

    fn note_takeover(&self, edge: &EdgeId, takeover: Takeover) {
        match takeover {
            Takeover::None | Takeover::Again => info!(%edge, "edge says hello"),
            Takeover::Superseded => {
                count(&self.counters.takeovers, 1);
                info!(%edge, "edge says hello from another run; the older session is ended");
            }
            Takeover::Alternating { times } => {
                count(&self.counters.takeovers, 1);
                warn!(
                    %edge, times,
                    "two gateways take this edge id from each other: give one of them another id and token"
                );
            }
        }
    }

    /// Answers an append, whose batches are `bodies`. `room` is dropped when the batches are.
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
        detached(async move {
            let reply = ingest.append_in_turn(&lane, append, bodies).await;
            drop(room);
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
    ) -> Result<AppendReply, IngestError> {
        let _turn = lane.turn.lock().await;
        count(&self.counters.appends, 1);
        let plans = {
            let session = lane.session.lock();
            match session.session(append.session) {
                SessionState::Current => {}
                state => return Ok(EdgeSession::refuse(state)),
            }
            let max = self.settings.batch_bytes_max;
            session.plan(&append, bodies, max, &|key| self.position(key))
        };
        let results = self.store(&append.edge, plans).await;
        lane.changed.notify_waiters();
        let session = lane.session.lock();
        Ok(session.append_reply(results, self.credit(), &|key| self.known(key)))
    }

    /// Appends what is planned, and says what became of each.
    async fn store(&self, edge: &EdgeId, plans: Vec<Plan>) -> Vec<(StreamName, Outcome)> {
        type Pending = BoxFuture<'static, Result<Appended, AppendError>>;
        let mut results = Vec::with_capacity(plans.len());
        let mut pending: Vec<(usize, StoreTold, Pending)> = Vec::with_capacity(plans.len());
        let mut stopped: BTreeSet<StreamName> = BTreeSet::new();
        for plan in plans {
            let (plan, rejected) = match plan {
                Plan::Store(plan) => (plan, false),
                Plan::Reject(plan) => (plan, true),
                Plan::Refuse(stream, outcome) => {
                    if outcome == Outcome::Have {
                        count(&self.counters.duplicates, 1);
                    }
                    results.push((stream, outcome));
                    continue;
                }
            };
            if stopped.contains(&plan.stream) {
                continue;
            }
            let told = StoreTold::of(&plan, rejected);
            match self.begin(edge, &plan, rejected).await {
                // The log would take the second batch of a stream it does not know as its first, if this one fails.
                Ok(future) if plan.begins => {
                    let outcome = self.finish(edge, &plan.stream, &told, future.await);
                    if outcome != Outcome::Stored {
                        stopped.insert(plan.stream.clone());
                    }
                    results.push((plan.stream, outcome));
                }
                Ok(future) => {
                    pending.push((results.len(), told, future));
                    results.push((plan.stream, Outcome::Stored));
                }
                Err(outcome) => {
                    stopped.insert(plan.stream.clone());
                    results.push((plan.stream, outcome));
                }
            }
        }
        for (index, told, future) in pending {
            let stored = future.await;
            let (stream, outcome) = &mut results[index];
            *outcome = self.finish(edge, stream, &told, stored);
        }
        results
    }

    fn finish(
        &self,
        edge: &EdgeId,
        stream: &StreamName,
        told: &StoreTold,
        stored: Result<Appended, AppendError>,
    ) -> Outcome {
        match stored {
            Ok(_) => {
                self.count_stored(told);
                Outcome::Stored
            }
            Err(error) => {
                if !matches!(error, AppendError::WrongPosition { .. }) {
                    warn!(%edge, %stream, %error, "append failed");
                }
                outcome_of(error)
            }
        }
    }

    /// Takes a batch's place in the log.
    async fn begin(
        &self,
        edge: &EdgeId,
        plan: &StorePlan,
        rejected: bool,
    ) -> Result<BoxFuture<'static, Result<Appended, AppendError>>, Outcome> {
        let mut partition = plan.partition;
        if rejected {
            let topic = rejected_topic(&plan.topic);
            warn!(%edge, stream = %plan.stream, offset = plan.source.first, %topic, "record is set aside");
            partition = self.single(&topic).await?;
        }
        if let Some((from, to)) = plan.source.gap {
            // Before the data: a gap may be listed twice after a crash, but never be missing.
            warn!(%edge, stream = %plan.stream, from, to, "edge dropped records");
            self.list_gap(edge, plan, from, to).await?;
        }
        let source = Source::Edge(plan.source.clone());
        Ok(self.log.append(log::Append { partition, batch: plan.batch.clone(), source }))
    }

    /// The only partition of a topic of our own, which is made if need be.
    async fn single(&self, topic: &TopicName) -> Result<Partition, Outcome> {
        match self.topics.ensure_topic(topic, 1).await {
            Ok((topic, _)) => Ok(Partition { topic, index: 0 }),
            Err(TopicError::Refused(reason)) => Err(Outcome::Parked { reason }),
            Err(TopicError::Unavailable(reason)) => Err(Outcome::Later { reason }),
        }
    }

    async fn list_gap(&self, edge: &EdgeId, plan: &StorePlan, from: Offset, to: Offset) -> Result<(), Outcome> {
        let partition = match TopicName::parse(GAPS_TOPIC) {
            Ok(topic) => self.single(&topic).await?,
            Err(error) => return Err(Outcome::Parked { reason: error.to_string() }),
        };
        let now_ms = (self.clock)();
        let value = serde_json::json!({
            "edge": edge,
            "stream": plan.stream,
            "incarnation": plan.source.stream.incarnation.to_string(),
            "topic": plan.topic,
            "first": from,
            "last": to - 1,
            "listed_ms": now_ms,
        });
        let mut builder = BatchBuilder::default();
        let key = format!("{edge}/{}", plan.stream);
        builder.push(now_ms, Some(key.as_bytes()), Some(value.to_string().as_bytes()), &[]);
        let batch = builder.finish(0, Compression::None);
        let append = log::Append { partition, batch, source: Source::Producer };
        self.log.append(append).await.map(drop).map_err(outcome_of)
    }

    fn count_stored(&self, told: &StoreTold) {
        count(&self.counters.batches, 1);
        count(&self.counters.records, told.records);
        count(&self.counters.bytes, told.bytes);
        count(&self.counters.rejected, u64::from(told.rejected));
        count(&self.counters.gaps, u64::from(told.gap));
    }

    /// Answers a poll once there is news, or its time is over.
    pub async fn poll(&self, caller: &Caller<'_>, poll: Poll) -> Result<PollReply, IngestError> {
        caller.is(&poll.edge)?;
        let lane = self.lane(&poll.edge)?;
        let wait = Duration::from_secs(u64::from(poll.wait_secs.min(self.settings.poll_secs_max)));
        let deadline = tokio::time::Instant::now() + wait;
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

/// What is remembered of a batch while it becomes durable.
struct StoreTold {
    records: u64,
    bytes: u64,
    rejected: bool,
    gap: bool,
}

impl StoreTold {
    fn of(plan: &StorePlan, rejected: bool) -> Self {
        Self {
            records: plan.batch.record_count().unsigned_abs().into(),
            bytes: plan.batch.len() as u64,
            rejected,
            gap: plan.source.gap.is_some(),
        }
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
