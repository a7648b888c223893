//! The cloud's half of the link: who may send, and what of an append may be stored.
//!
//! An [`EdgeSession`] is what the cloud keeps in memory of one edge: its newest session and what its streams map to.
//! It decides; `ingest` does: it authenticates, looks positions up, appends to the log, and calls in one at a time for
//! each edge, so that a hello never reads a position while an older append of the same edge is still under way.
//! Positions are not kept here. They are read from the log's durable state each time, as the log alone knows them.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;

use crate::batch::Batch;
use crate::link::frame::{
    Append, AppendEntry, AppendReply, Credit, Hello, HelloReply, HelloStreamReply, Limits, Outcome, Session,
    SessionState, StreamReply, bounded_text, negotiate,
};
use crate::link::{Position, REJECTED_SUFFIX};
use crate::log::{AppendError, EdgeBatch, StreamKey};
use crate::name::{EdgeId, Incarnation, Offset, Partition, StreamName, TimestampMs, TopicName};

/// How many ended runs of an edge are remembered, to tell two gateways that fight from one that was started again.
const ENDED_MAX: usize = 8;

/// Looks up what is durable of a stream, and what is safe.
pub type Known<'a> = dyn Fn(&StreamKey) -> (Option<Position>, Option<Offset>) + 'a;

/// What is known of one edge while this process runs.
#[derive(Debug)]
pub struct EdgeSession {
    edge: EdgeId,
    current: Option<Session>,
    software: String,
    hello_ms: TimestampMs,
    ended: VecDeque<[u8; 16]>,
    alternations: u32,
    streams: BTreeMap<StreamName, Route>,
}

#[derive(Debug, Clone)]
struct Route {
    topic: TopicName,
    incarnation: Incarnation,
    /// Where its records go, or why they cannot.
    target: Result<Partition, String>,
}

/// What a hello means for the edge's other sessions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Takeover {
    /// Nobody else was there.
    None,
    /// The same run says hello again.
    Again,
    /// Another run was there and is ended.
    Superseded,
    /// A run that had been ended comes back: two gateways use one id, or one's data were copied to another.
    Alternating {
        /// How often that has happened since this process started.
        times: u32,
    },
}

/// Why a hello is not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HelloRefused {
    /// No version in common.
    #[error(
        "the edge speaks link versions {lowest} to {highest}, this cloud speaks {} to {}: upgrade the older side",
        crate::link::frame::VERSION_LOWEST,
        crate::link::frame::VERSION_HIGHEST
    )]
    Version {
        /// The edge's lowest.
        lowest: u8,
        /// The edge's highest.
        highest: u8,
    },
    /// A hello of the same run that was overtaken by a later one.
    #[error("a later hello of the same run was here already")]
    Stale,
}

/// What is to be done with one batch of an append.
#[derive(Debug)]
pub enum Plan {
    /// Append it to the partition of its stream.
    Store(StorePlan),
    /// Append it to the `.rejected` topic of its stream's topic, in the same way.
    Reject(StorePlan),
    /// Do not store it; all later batches of the stream in the same request are left out too.
    Refuse(StreamName, Outcome),
}

impl Plan {
    /// Whose batch it is.
    pub fn stream(&self) -> &StreamName {
        match self {
            Self::Store(plan) | Self::Reject(plan) => &plan.stream,
            Self::Refuse(stream, _) => stream,
        }
    }
}

/// A batch that may be stored.
#[derive(Debug)]
pub struct StorePlan {
    /// The stream.
    pub stream: StreamName,
    /// The stream's topic.
    pub topic: TopicName,
    /// The stream's own partition.
    pub partition: Partition,
    /// Nothing of the stream is stored yet, so that the log takes whatever comes first. What follows in the same request
    /// must wait until this is stored.
    pub begins: bool,
    /// The checked batch.
    pub batch: Batch,
    /// Its identity and position.
    pub source: EdgeBatch,
}

impl EdgeSession {
    /// An edge of which nothing is known yet.
    pub fn new(edge: EdgeId) -> Self {
        Self {
            edge,
            current: None,
            software: String::new(),
            hello_ms: 0,
            ended: VecDeque::new(),
            alternations: 0,
            streams: BTreeMap::new(),
        }
    }

    /// The edge.
    pub fn edge(&self) -> &EdgeId {
        &self.edge
    }

    /// Its software, as it says.
    pub fn software(&self) -> &str {
        &self.software
    }

    /// When it last said hello; 0 = never.
    pub fn hello_ms(&self) -> TimestampMs {
        self.hello_ms
    }

    /// How often two runs took the id from each other.
    pub fn alternations(&self) -> u32 {
        self.alternations
    }

    /// Begins a session. From now on nothing of the older one is stored.
    pub fn hello(&mut self, now_ms: TimestampMs, hello: &Hello) -> Result<Takeover, HelloRefused> {
        let (lowest, highest) = (hello.lowest, hello.highest);
        negotiate(lowest, highest).ok_or(HelloRefused::Version { lowest, highest })?;
        let takeover = match self.current {
            None => Takeover::None,
            Some(current) if current.boot == hello.session.boot => {
                if hello.session.hello <= current.hello {
                    return Err(HelloRefused::Stale);
                }
                Takeover::Again
            }
            Some(current) => {
                let back = self.ended.contains(&hello.session.boot);
                self.ended.retain(|boot| *boot != hello.session.boot);
                self.ended.push_back(current.boot);
                if self.ended.len() > ENDED_MAX {
                    self.ended.pop_front();
                }
                if back {
                    self.alternations = self.alternations.saturating_add(1);
                    Takeover::Alternating { times: self.alternations }
                } else {
                    Takeover::Superseded
                }
            }
        };
        self.current = Some(hello.session);
        self.software = hello.software.clone();
        self.hello_ms = now_ms;
        self.streams.clear();
        Ok(takeover)
    }

    /// Notes where a stream of the hello goes, or why it cannot be taken.
    pub fn route(
        &mut self,
        stream: StreamName,
        topic: TopicName,
        incarnation: Incarnation,
        target: Result<Partition, String>,
    ) {
        self.streams.insert(stream, Route { topic, incarnation, target: target.map_err(bounded_text) });
    }

    /// Answers a hello, once all its streams have a route. `known` gives what is durable and what is safe.
    pub fn hello_reply(
        &self,
        now_ms: TimestampMs,
        hello: &Hello,
        limits: Limits,
        credit: Credit,
        known: &Known<'_>,
    ) -> HelloReply {
        let streams = hello.streams.iter().filter_map(|stream| {
            let route = self.streams.get(&stream.name)?;
            let (position, safe) = known(&self.key(&stream.name, route));
            let parked = route.target.as_ref().err().cloned();
            Some(HelloStreamReply { name: stream.name.clone(), position, safe, parked })
        });
        // The border has checked that a version is common.
        let version = negotiate(hello.lowest, hello.highest).unwrap_or_default();
        HelloReply { version, time_ms: now_ms, limits, credit, streams: streams.collect() }
    }

    /// Whether a session may go on.
    pub fn session(&self, session: Session) -> SessionState {
        match self.current {
            Some(current) if current == session => SessionState::Current,
            None => SessionState::Unknown,
            Some(current) if current.boot == session.boot => SessionState::Unknown,
            Some(_) => SessionState::Superseded,
        }
    }

    /// The key of a stream of this session.
    pub fn stream_key(&self, stream: &StreamName) -> Option<StreamKey> {
        self.streams.get(stream).map(|route| self.key(stream, route))
    }

    fn key(&self, stream: &StreamName, route: &Route) -> StreamKey {
        StreamKey { edge: self.edge.clone(), stream: stream.clone(), incarnation: route.incarnation }
    }

    /// Decides on each batch of an append. `position` gives what is durable; nothing of this edge may be in flight.
    pub fn plan(
        &self,
        append: &Append,
        bodies: Vec<Bytes>,
        batch_bytes_max: usize,
        position: &dyn Fn(&StreamKey) -> Option<Position>,
    ) -> Vec<Plan> {
        let mut heads: BTreeMap<&StreamName, Head> = BTreeMap::new();
        let mut plans = Vec::with_capacity(append.entries.len());
        for (entry, bytes) in append.entries.iter().zip(bodies) {
            let head = heads.entry(&entry.stream).or_insert_with(|| self.head(&entry.stream, position));
            if head.refused {
                continue;
            }
            let plan = head.plan(entry, bytes, batch_bytes_max);
            head.refused = matches!(plan, Plan::Refuse(..));
            plans.push(plan);
        }
        plans
    }

    fn head(&self, stream: &StreamName, position: &dyn Fn(&StreamKey) -> Option<Position>) -> Head {
        let route = self.streams.get(stream);
        let at = route.and_then(|route| position(&self.key(stream, route)));
        let route = route.map(|route| (route.clone(), self.key(stream, route)));
        Head { route, at, refused: false }
    }

    /// Answers an append once its batches are stored or refused. `results` holds one outcome for each plan, in order.
    pub fn append_reply(&self, results: Vec<(StreamName, Outcome)>, credit: Credit, known: &Known<'_>) -> AppendReply {
        let mut outcomes: BTreeMap<StreamName, Outcome> = BTreeMap::new();
        for (stream, outcome) in results {
            let first = outcomes.entry(stream).or_insert(Outcome::Stored);
            if *first == Outcome::Stored {
                *first = outcome;
            }
        }
        let streams = outcomes.into_iter().map(|(name, outcome)| {
            let (position, safe) = self.stream_key(&name).map_or((None, None), |key| known(&key));
            StreamReply { name, position, safe, outcome }
        });
        AppendReply { session: SessionState::Current, credit, streams: streams.collect() }
    }

    /// The answer to an append of a session that is not the newest.
    pub fn refuse(state: SessionState) -> AppendReply {
        AppendReply { session: state, credit: Credit { bytes: 0, wait_ms: 0 }, streams: Vec::new() }
    }
}

/// How far a stream will be when the batches planned so far are stored.
struct Head {
    route: Option<(Route, StreamKey)>,
    at: Option<Position>,
    refused: bool,
}

impl Head {
    fn plan(&mut self, entry: &AppendEntry, bytes: Bytes, batch_bytes_max: usize) -> Plan {
        let refuse = |outcome| Plan::Refuse(entry.stream.clone(), outcome);
        let Some((route, key)) = &self.route else {
            return refuse(Outcome::Parked { reason: "the stream was not in the hello".to_owned() });
        };
        let partition = match &route.target {
            Ok(partition) => *partition,
            Err(reason) => return refuse(Outcome::Parked { reason: reason.clone() }),
        };
        if self.at.is_some_and(|at| entry.end.next <= at.next) {
            return refuse(Outcome::Have);
        }
        // The chain is part of the comparison: a copy of the edge that stands at the same offset is told apart.
        let begins = match (self.at, entry.gap) {
            (Some(at), None) => entry.first == at.next,
            (Some(at), Some(gap)) => gap == (at.next, entry.first),
            (None, _) => true,
        };
        if self.at != entry.after || !begins {
            return refuse(Outcome::WrongPosition);
        }
        let batch = match check_batch(entry, bytes, batch_bytes_max) {
            Ok(batch) => batch,
            Err(reason) => return refuse(Outcome::Rejected { reason: bounded_text(reason) }),
        };
        let begins = self.at.is_none();
        self.at = Some(entry.end);
        let source = EdgeBatch {
            stream: key.clone(),
            first: entry.first,
            next: entry.end.next,
            chain: entry.end.chain,
            gap: entry.gap,
        };
        let plan =
            StorePlan { stream: entry.stream.clone(), topic: route.topic.clone(), partition, begins, batch, source };
        if entry.rejected { Plan::Reject(plan) } else { Plan::Store(plan) }
    }
}

fn check_batch(entry: &AppendEntry, bytes: Bytes, batch_bytes_max: usize) -> Result<Batch, String> {
    if bytes.len() > batch_bytes_max {
        return Err(format!("a batch of {} bytes, at most {batch_bytes_max} are taken", bytes.len()));
    }
    let batch = Batch::parse(bytes).map_err(|error| error.to_string())?;
    batch.check_entry().map_err(|error| error.to_string())?;
    if batch.base_offset() != entry.first || batch.last_offset().checked_add(1) != Some(entry.end.next) {
        return Err(format!("{batch:?} does not hold the offsets {} .. {}", entry.first, entry.end.next));
    }
    if batch.is_transactional() || batch.is_control() || batch.producer_id() != -1 {
        return Err("a batch of an edge carries no producer and is no control batch".to_owned());
    }
    if entry.rejected && batch.record_count() != 1 {
        return Err("records are rejected one at a time".to_owned());
    }
    Ok(batch)
}

/// What an append's failure means to the edge.
pub fn outcome_of(error: AppendError) -> Outcome {
    match error {
        AppendError::WrongPosition { have: true, .. } => Outcome::Have,
        AppendError::WrongPosition { have: false, .. } => Outcome::WrongPosition,
        AppendError::UnknownPartition(partition) => {
            Outcome::Parked { reason: format!("the topic is gone (partition {partition})") }
        }
        error @ (AppendError::OutOfOrderSequence { .. } | AppendError::ProducerFenced { .. }) => {
            Outcome::Rejected { reason: bounded_text(error.to_string()) }
        }
        error @ (AppendError::Unconfirmed { .. }
        | AppendError::Full(_)
        | AppendError::Fenced(_)
        | AppendError::Storage(_)
        | AppendError::Closed) => Outcome::Later { reason: bounded_text(error.to_string()) },
    }
}

/// The topic that takes what `topic` cannot.
pub fn rejected_topic(topic: &TopicName) -> TopicName {
    let whole = format!("{topic}{REJECTED_SUFFIX}");
    TopicName::parse(&whole).unwrap_or_else(|_| {
        // Too long together. Names are ASCII, so any cut is between characters.
        let kept = &topic.as_str()[..TopicName::LENGTH_MAX - REJECTED_SUFFIX.len()];
        TopicName::parse(&format!("{kept}{REJECTED_SUFFIX}")).unwrap_or_else(|_| topic.clone())
    })
}
