//! The edge's half of the link: decides what to send, and what an answer means.
//!
//! A [`Sender`] is asked for its next [`Step`] and told how each came out; it knows no socket and no clock. What it
//! wants of the store - positions to note, a new incarnation - it says as [`Output`]s. One append is on the wire at a
//! time, the next body is sealed meanwhile; one poll runs beside them.
//!
//! ```text
//!          hello_at           reply                  chain differs
//!  Down ------------> Greeting -----> Linked ----------------------> Renewing --+
//!   ^                    |              |  append failed, superseded            |
//!   +--------------------+--------------+---------------------------------------+
//! ```

mod seal;
mod words;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::limits::{BATCH_BYTES_MAX, LINK_BODY_BYTES_MAX, LINK_POLL_SECS_MAX};
use crate::link::Position;
use crate::link::frame::{
    self, Append, AppendReply, Credit, Hello, HelloReply, HelloStream, Limits, Outcome, Poll, PollReply, Session,
    SessionState, StreamReply,
};
use crate::name::{EdgeId, Incarnation, Offset, StreamName, TopicName};

pub use seal::{Body, SealOrder, seal_body};
use seal::{Care, StreamOrder};
pub use words::{Failure, Millis, Output, Report, Row, Rows, SenderSettings, Step, StreamInfo};

/// Smallest body the sender aims at, however slow the link.
const BODY_BYTES_MIN: usize = 16 * 1024;
/// A limit below this is taken for a mistake: whatever is larger would be set aside.
const BATCH_BYTES_MIN: u32 = 512;
const BODY_BYTES_START: usize = 256 * 1024;
/// Least time between the ends and starts of polls that brought news.
const POLL_PAUSE_MS: u64 = 1000;
/// Another run took the edge's id over: wait longer than usual, so that two gateways with one id do not fight.
const SUPERSEDED_WAIT_MS: u64 = 5000;

#[derive(Debug)]
enum Phase {
    Down { hello_at: Millis },
    Greeting,
    Renewing(BTreeSet<StreamName>),
    Linked,
}

#[derive(Debug)]
struct Stream {
    topic: TopicName,
    incarnation: Incarnation,
    /// What the cloud holds durably, as it last said.
    durable: Option<Position>,
    /// What the cloud will hold once everything sealed is stored, and where sealing goes on.
    after: Option<Position>,
    from: Offset,
    /// Where sealing begins while nothing is durable.
    start: Offset,
    safe: Offset,
    care: Option<Care>,
    /// Not sent until the next hello.
    blocked: bool,
    /// Answers "later" since the last other one, and until when nothing more is sent for it.
    later: u32,
    held_until: Millis,
    /// What the store was told.
    parked: Option<String>,
}

#[derive(Debug)]
struct Flight {
    entries: Vec<frame::AppendEntry>,
    bytes: usize,
    sent_at: Millis,
}

#[derive(Debug, Default)]
struct PollState {
    in_flight: Option<u32>,
    number: u32,
    at: Millis,
    wait_secs: u16,
    failures: u32,
}

/// The edge's half of the link.
#[derive(Debug)]
pub struct Sender {
    settings: SenderSettings,
    edge: EdgeId,
    session: Session,
    random: u64,
    phase: Phase,
    limits: Limits,
    credit: Credit,
    /// With no credit: when to try all the same.
    credit_at: Millis,
    body_bytes_max: usize,
    body_bytes: usize,
    streams: BTreeMap<StreamName, Stream>,
    turn: usize,
    generation: u64,
    sealing: bool,
    ready: Option<Body>,
    flight: Option<Flight>,
    /// The last body was full: there is a backlog, so do not linger and seal ahead.
    backlog: bool,
    linger_since: Option<Millis>,
    retry_at: Option<Millis>,
    poll: PollState,
    failures: u32,
    outputs: VecDeque<Output>,
}

impl Sender {
    /// A sender that has not said hello yet. `boot` must be random for each run; `seed` spreads the waits.
    pub fn new(settings: SenderSettings, edge: EdgeId, boot: [u8; 16], seed: u64) -> Self {
        let body_bytes_max = settings.body_bytes_max.max(BODY_BYTES_MIN);
        Self {
            edge,
            session: Session { boot, hello: 0 },
            random: seed | 1,
            phase: Phase::Down { hello_at: 0 },
            limits: Limits {
                batch_bytes_max: BATCH_BYTES_MAX as u32,
                body_bytes_max: LINK_BODY_BYTES_MAX as u32,
                poll_secs_max: LINK_POLL_SECS_MAX as u16,
            },
            credit: Credit { bytes: 0, wait_ms: 0 },
            credit_at: 0,
            body_bytes_max,
            body_bytes: BODY_BYTES_START.min(body_bytes_max),
            streams: BTreeMap::new(),
            turn: 0,
            generation: 0,
            sealing: false,
            ready: None,
            flight: None,
            backlog: false,
            linger_since: None,
            retry_at: None,
            poll: PollState::default(),
            failures: 0,
            outputs: VecDeque::new(),
            settings,
        }
    }

    /// Whether the cloud has answered, and nothing has failed since.
    pub fn is_linked(&self) -> bool {
        matches!(self.phase, Phase::Linked | Phase::Renewing(_))
    }

    /// What the cloud takes at most, as it last said.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// The next thing the store shall do or a person may want to know. Call until `None`.
    pub fn output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// What to do now. Call after everything told, and again after every step that is not [`Step::Wait`].
    pub fn step(&mut self, now: Millis, rows: &dyn Rows) -> Step {
        match &self.phase {
            Phase::Down { hello_at } if now >= *hello_at && self.flight.is_none() => self.hello(rows),
            Phase::Down { hello_at } if self.flight.is_none() => Step::Wait(Some(*hello_at)),
            Phase::Down { .. } | Phase::Greeting | Phase::Renewing(_) => Step::Wait(None),
            Phase::Linked => self.linked_step(now, rows),
        }
    }

    fn hello(&mut self, rows: &dyn Rows) -> Step {
        self.phase = Phase::Greeting;
        self.session.hello = self.session.hello.wrapping_add(1);
        self.discard_sealed();
        let mut infos = rows.streams();
        for info in infos.split_off(infos.len().min(frame::STREAMS_MAX)) {
            let reason = Some(format!("the link carries {} streams at most", frame::STREAMS_MAX));
            self.outputs.push_back(Output::Park { stream: info.name, reason });
        }
        let streams: Vec<HelloStream> = infos.into_iter().map(HelloStream::from).collect();
        let hello = Hello {
            lowest: frame::VERSION_LOWEST,
            highest: frame::VERSION_HIGHEST,
            edge: self.edge.clone(),
            session: self.session,
            software: frame::bounded_text(self.settings.software.clone()),
            streams,
        };
        let body = frame::encode(&hello);
        // What the cloud does not mention in its reply is not known to it: keep only what was asked for.
        let mut known = std::mem::take(&mut self.streams);
        for stream in hello.streams {
            let parked = known.remove(&stream.name).and_then(|old| old.parked);
            let fresh = Stream {
                topic: stream.topic,
                incarnation: stream.incarnation,
                durable: None,
                after: None,
                from: stream.first,
                start: stream.first,
                safe: stream.safe,
                care: None,
                blocked: true,
                later: 0,
                held_until: 0,
                parked,
            };
            self.streams.insert(stream.name, fresh);
        }
        Step::Hello(body)
    }

    fn linked_step(&mut self, now: Millis, rows: &dyn Rows) -> Step {
        let infos = rows.streams();
        let changed = infos.iter().take(frame::STREAMS_MAX).any(|info| {
            self.streams
                .get(&info.name)
                .is_none_or(|stream| stream.topic != info.topic || stream.incarnation != info.incarnation)
        });
        if self.flight.is_none() && (changed || self.retry_at.is_some_and(|at| now >= at)) {
            return self.hello(rows);
        }
        if let Some(step) = self.append(now) {
            return step;
        }
        if let Some(step) = self.seal(now, &infos) {
            return step;
        }
        if self.poll.in_flight.is_none() && now >= self.poll.at {
            return self.poll();
        }
        Step::Wait(self.wake(now))
    }

    /// Puts the sealed body on the wire.
    fn append(&mut self, now: Millis) -> Option<Step> {
        let may_send = self.flight.is_none() && (self.credit.bytes > 0 || now >= self.credit_at);
        let body = if may_send { self.ready.take()? } else { return None };
        let append = Append { edge: self.edge.clone(), session: self.session, entries: body.entries };
        let bytes = frame::encode_append(&append, &body.batches);
        self.flight = Some(Flight { entries: append.entries, bytes: bytes.len(), sent_at: now });
        Some(Step::Append(bytes))
    }

    /// Orders the next body, if there are rows for it.
    fn seal(&mut self, now: Millis, infos: &[StreamInfo]) -> Option<Step> {
        if self.sealing || self.ready.is_some() {
            return None;
        }
        let mut streams: Vec<StreamOrder> = infos
            .iter()
            .filter_map(|info| {
                let stream = self.streams.get(&info.name)?;
                if stream.blocked || now < stream.held_until {
                    return None;
                }
                (info.next > stream.from.max(info.first)).then(|| StreamOrder {
                    name: info.name.clone(),
                    after: stream.after,
                    from: stream.from,
                    dropped: info.dropped,
                    care: stream.care.clone(),
                })
            })
            .collect();
        if streams.is_empty() {
            self.linger_since = None;
            self.backlog = false;
            return None;
        }
        let since = *self.linger_since.get_or_insert(now);
        let lingers = now < since.saturating_add(self.settings.linger_ms);
        if !self.backlog && (lingers || self.flight.is_some()) {
            return None;
        }
        // Each body begins with another stream, so that a busy one does not starve the rest.
        self.turn = self.turn.wrapping_add(1);
        let turn = self.turn % streams.len();
        streams.rotate_left(turn);
        self.sealing = true;
        let credit = if self.credit.bytes > 0 { self.credit.bytes as usize } else { BODY_BYTES_MIN };
        let body_bytes = self.body_bytes.min(self.body_bytes_max).min(self.limits.body_bytes_max as usize).min(credit);
        let batch_bytes_max = self.limits.batch_bytes_max as usize;
        Some(Step::Seal(SealOrder {
            generation: self.generation,
            streams,
            compression: self.settings.compression,
            batch_bytes: self.settings.batch_bytes.min(batch_bytes_max),
            batch_bytes_max,
            body_bytes,
        }))
    }

    fn poll(&mut self) -> Step {
        self.poll.number = self.poll.number.wrapping_add(1);
        self.poll.in_flight = Some(self.poll.number);
        let known = self
            .streams
            .iter()
            // Those of which nothing is stored yet too: this poll may last longer than their first append.
            .filter(|(_, stream)| !stream.blocked)
            .map(|(name, stream)| (name.clone(), stream.safe))
            .collect();
        let wait_secs = self.poll.wait_secs.clamp(1, self.limits.poll_secs_max.max(1));
        let wants_credit = self.credit.bytes == 0;
        let poll = Poll { edge: self.edge.clone(), session: self.session, wait_secs, wants_credit, known };
        Step::Poll { number: self.poll.number, body: frame::encode(&poll), wait_secs }
    }

    fn wake(&self, now: Millis) -> Option<Millis> {
        let linger = self.linger_since.filter(|_| !self.sealing && self.ready.is_none() && self.flight.is_none());
        let linger = linger.map(|since| since.saturating_add(self.settings.linger_ms));
        let credit = (self.ready.is_some() && self.flight.is_none()).then_some(self.credit_at);
        let poll = self.poll.in_flight.is_none().then_some(self.poll.at);
        let retry = self.retry_at.filter(|_| self.flight.is_none());
        let held = self.streams.values().map(|stream| stream.held_until);
        [linger, credit, poll, retry].into_iter().flatten().chain(held).filter(|at| *at > now).min()
    }

    /// The body that was ordered.
    pub fn sealed(&mut self, now: Millis, body: Body) {
        self.sealing = false;
        self.linger_since = None;
        if body.generation != self.generation || !matches!(self.phase, Phase::Linked) {
            return;
        }
        self.backlog = body.full;
        for entry in &body.entries {
            if let Some(stream) = self.streams.get_mut(&entry.stream) {
                stream.after = Some(entry.end);
                stream.from = entry.end.next;
            }
        }
        for (stream, reason) in body.damaged.iter().cloned() {
            self.park(now, stream, reason);
        }
        self.outputs.extend(body.reports.iter().cloned().map(Output::Report));
        if !body.entries.is_empty() {
            self.ready = Some(body);
        }
    }

    /// How the hello came out.
    pub fn hello_done(&mut self, now: Millis, reply: Result<HelloReply, Failure>, rows: &dyn Rows) {
        let reply = match reply {
            Ok(reply) if frame::negotiate(reply.version, reply.version).is_some() => reply,
            Ok(reply) => {
                let error = format!("the cloud chose link version {}, which was not offered", reply.version);
                return self.down(now, error, 0);
            }
            Err(failure) => return self.failed(now, failure),
        };
        self.phase = Phase::Linked;
        self.limits = reply.limits;
        self.limits.batch_bytes_max = self.limits.batch_bytes_max.max(BATCH_BYTES_MIN);
        self.limits.body_bytes_max = self.limits.body_bytes_max.max(BATCH_BYTES_MIN);
        self.grant(now, reply.credit);
        self.retry_at = None;
        self.poll.at = now;
        self.poll.in_flight = None;
        self.poll.wait_secs = if self.poll.wait_secs == 0 { reply.limits.poll_secs_max } else { self.poll.wait_secs };
        self.report(Report::Linked { cloud_time_ms: reply.time_ms, limits: reply.limits });

        let infos: BTreeMap<StreamName, StreamInfo> =
            rows.streams().into_iter().map(|info| (info.name.clone(), info)).collect();
        for answer in reply.streams {
            let Some(info) = infos.get(&answer.name) else { continue };
            let Some(stream) = self.streams.get_mut(&answer.name) else { continue };
            if stream.incarnation != info.incarnation {
                continue;
            }
            stream.blocked = false;
            if self.adopt(info, answer.position, true, rows) {
                self.note_safe(&answer.name, answer.safe);
            }
            match answer.parked {
                Some(reason) => self.park(now, answer.name, reason),
                None => self.unpark(&answer.name),
            }
        }
        if self.streams.values().any(|stream| stream.blocked) {
            self.retry_at.get_or_insert(now.saturating_add(self.settings.parked_retry_ms));
        }
    }

    /// How the append came out.
    pub fn append_done(&mut self, now: Millis, reply: Result<AppendReply, Failure>, rows: &dyn Rows) {
        let Some(flight) = self.flight.take() else { return };
        if !matches!(self.phase, Phase::Linked) {
            return;
        }
        let reply = match reply {
            Ok(reply) => reply,
            Err(Failure::TooLarge(text)) => return self.too_large(now, &flight, text),
            Err(Failure::Busy { text, wait_ms }) => return self.busy(now, text, wait_ms),
            Err(failure) => {
                // The link may have become slow: try with less.
                self.body_bytes = (self.body_bytes / 2).max(BODY_BYTES_MIN);
                return self.failed(now, failure);
            }
        };
        match reply.session {
            SessionState::Current => {}
            state => return self.session_ended(now, state),
        }
        self.grant(now, reply.credit);
        self.measure(now, &flight);
        let infos: BTreeMap<StreamName, StreamInfo> =
            rows.streams().into_iter().map(|info| (info.name.clone(), info)).collect();
        for answer in reply.streams {
            let Some(info) = infos.get(&answer.name) else { continue };
            match &answer.outcome {
                Outcome::Later { reason } => self.hold(now, &answer.name, reason.clone()),
                _ => self.failures = 0,
            }
            self.stream_answer(now, answer, info, &flight, rows);
        }
    }

    /// The place that a stream's records go to takes none just now. The others, which may go elsewhere, do not wait for it.
    fn hold(&mut self, now: Millis, name: &StreamName, reason: String) {
        let Some(later) = self.streams.get(name).map(|stream| stream.later) else { return };
        let retry_ms = self.backoff(later);
        if let Some(stream) = self.streams.get_mut(name) {
            stream.later = later.saturating_add(1);
            stream.held_until = now.saturating_add(retry_ms);
        }
        self.report(Report::Held { reason, retry_ms });
    }

    fn stream_answer(&mut self, now: Millis, answer: StreamReply, info: &StreamInfo, flight: &Flight, rows: &dyn Rows) {
        let name = &answer.name;
        let Some(stream) = self.streams.get_mut(name) else { return };
        if !matches!(answer.outcome, Outcome::Later { .. }) {
            stream.later = 0;
        }
        let mut sent = flight.entries.iter().filter(|entry| entry.stream == *name);
        let end = sent.clone().next_back().map(|entry| entry.end);
        // Of a declared gap the cloud has heard once its position lies beyond.
        let position = answer.position;
        let reached = |offset: Offset| position.is_some_and(|p| p.next >= offset);
        for entry in sent.clone() {
            if let (Some((from, upto)), true) = (entry.gap, reached(entry.end.next)) {
                self.outputs.push_back(Output::Report(Report::GapDeclared { stream: name.clone(), from, upto }));
            }
        }
        let refused = sent.find(|entry| entry.after == position);
        if position.is_some() && position == end {
            stream.durable = position;
            if stream.care.as_ref().is_some_and(|care| care.is_over(end)) {
                stream.care = None;
            }
            self.outputs.push_back(Output::Confirmed { stream: name.clone(), next: info.confirmed.max(end_of(end)) });
            self.unpark(name);
            self.note_safe(name, answer.safe);
            self.note_gap(info, end_of(end));
            return;
        }
        // Anything else than what was expected: what is sealed ahead builds on sand.
        self.discard_sealed();
        match answer.outcome {
            Outcome::Rejected { reason } => match refused {
                Some(entry) if entry.rejected => return self.park(now, answer.name, reason),
                Some(entry) if entry.end.next - entry.first == 1 => {
                    self.care(name, Care::Reject { at: entry.first, reason });
                }
                Some(entry) => {
                    let records = (entry.end.next - entry.first) / 2;
                    self.care(name, Care::Split { records, until: entry.end.next });
                }
                None => {}
            },
            Outcome::Parked { reason } => return self.park(now, answer.name, reason),
            Outcome::Stored | Outcome::Have | Outcome::WrongPosition | Outcome::Later { .. } => {}
        }
        if self.adopt(info, position, false, rows) {
            self.note_safe(name, answer.safe);
        }
    }

    fn care(&mut self, name: &StreamName, care: Care) {
        if let Some(stream) = self.streams.get_mut(name) {
            stream.care = Some(care);
        }
    }

    /// How the poll came out.
    pub fn poll_done(&mut self, now: Millis, number: u32, reply: Result<PollReply, Failure>) {
        if self.poll.in_flight != Some(number) || !matches!(self.phase, Phase::Linked) {
            return;
        }
        self.poll.in_flight = None;
        match reply {
            Ok(reply) if reply.session != SessionState::Current && self.flight.is_none() => {
                self.session_ended(now, reply.session);
            }
            Ok(reply) => {
                self.poll.at = now.saturating_add(POLL_PAUSE_MS);
                self.poll.failures = 0;
                if self.credit.bytes == 0 || reply.credit.bytes > 0 {
                    self.grant(now, reply.credit);
                }
                for (name, safe) in reply.safe {
                    self.note_safe(&name, Some(safe));
                }
            }
            Err(failure) => {
                // A proxy may cut long polls: ask for shorter ones. Appends tell soon enough if the link is gone; when
                // there are none, polls must.
                self.poll.failures += 1;
                self.poll.wait_secs = (self.poll.wait_secs / 2).max(1);
                self.poll.at = now.saturating_add(self.settings.backoff_min_ms.max(POLL_PAUSE_MS));
                if self.poll.failures >= 2 && self.flight.is_none() {
                    self.poll.failures = 0;
                    self.failed(now, failure);
                }
            }
        }
    }

    /// The new incarnation of a stream is durable, or could not be made so.
    pub fn renewed(&mut self, now: Millis, stream: &StreamName, result: Result<(), String>) {
        let Phase::Renewing(waiting) = &mut self.phase else { return };
        waiting.remove(stream);
        let done = waiting.is_empty();
        match result {
            Err(error) => self.down(now, format!("no new incarnation for stream {stream}: {error}"), 0),
            Ok(()) if done => {
                // At once, unless the cloud has not stored anything since the last time: each one costs a commit.
                let wait = if self.failures == 0 { 0 } else { self.backoff(self.failures) };
                self.failures = self.failures.saturating_add(1);
                self.phase = Phase::Down { hello_at: now.saturating_add(wait) };
            }
            Ok(()) => {}
        }
    }

    /// What was under way is lost: begin again with a hello.
    pub fn restart(&mut self, now: Millis, error: String) {
        self.sealing = false;
        self.flight = None;
        self.down(now, error, 0);
    }

    /// Goes on from where the cloud says the stream stands, or asks for a new incarnation if that cannot be. True if
    /// the position is one of ours.
    fn adopt(&mut self, info: &StreamInfo, position: Option<Position>, greeting: bool, rows: &dyn Rows) -> bool {
        let Some(stream) = self.streams.get_mut(&info.name) else { return false };
        let name = info.name.clone();
        let Some(position) = position else {
            let from = info.start();
            (stream.durable, stream.after, stream.from, stream.start) = (None, None, from, from);
            if info.confirmed > info.renewed_at && greeting {
                let confirmed = info.confirmed;
                self.report(Report::CloudLost { stream: name, position: 0, confirmed, resumed: from });
            }
            return true;
        };
        // Below what the edge holds nothing can be compared, and nothing that it holds is skipped by going on.
        let known = position.next <= info.first || seal::chain_at(rows, &name, position.next) == Some(position.chain);
        if !known {
            stream.blocked = true;
            let from = info.safe.max(info.first);
            self.report(Report::SentTwice { stream: name.clone(), from, upto: info.next });
            self.outputs.push_back(Output::Renew { stream: name.clone() });
            match &mut self.phase {
                Phase::Renewing(waiting) => drop(waiting.insert(name)),
                phase => *phase = Phase::Renewing(BTreeSet::from([name])),
            }
            self.discard_sealed();
            return false;
        }
        (stream.durable, stream.after, stream.from) = (Some(position), Some(position), position.next);
        stream.from = stream.from.max(info.first);
        stream.safe = stream.safe.min(position.next);
        self.note_gap(info, position.next);
        if position.next < info.safe {
            let (position, resumed) = (position.next, info.first.max(position.next));
            self.report(Report::CloudLost { stream: name, position, confirmed: info.safe, resumed });
        } else if position.next > info.confirmed {
            self.outputs.push_back(Output::Confirmed { stream: name, next: position.next });
        }
        true
    }

    fn note_safe(&mut self, name: &StreamName, safe: Option<Offset>) {
        let Some(stream) = self.streams.get_mut(name) else { return };
        let Some((safe, durable)) = safe.zip(stream.durable) else { return };
        // Never beyond what this sender has itself seen to be its own.
        let safe = safe.min(durable.next);
        if safe > stream.safe {
            stream.safe = safe;
            self.outputs.push_back(Output::Safe { stream: name.clone(), next: safe });
        }
    }

    /// What was dropped below the cloud's position was either stored there before it was dropped, or told.
    fn note_gap(&mut self, info: &StreamInfo, position: Offset) {
        if let Some((_, upto)) = info.dropped.filter(|dropped| dropped.1 <= position) {
            self.outputs.push_back(Output::GapDeclared { stream: info.name.clone(), upto });
        }
    }

    fn park(&mut self, now: Millis, name: StreamName, reason: String) {
        let Some(stream) = self.streams.get_mut(&name) else { return };
        stream.blocked = true;
        self.retry_at.get_or_insert(now.saturating_add(self.settings.parked_retry_ms));
        if stream.parked.as_ref() != Some(&reason) {
            stream.parked = Some(reason.clone());
            self.outputs.push_back(Output::Park { stream: name, reason: Some(reason) });
        }
    }

    fn unpark(&mut self, name: &StreamName) {
        if let Some(stream) = self.streams.get_mut(name)
            && stream.parked.take().is_some()
        {
            self.outputs.push_back(Output::Park { stream: name.clone(), reason: None });
        }
    }

    /// Forgets what was sealed ahead: every stream goes on from what is durable.
    fn discard_sealed(&mut self) {
        self.generation += 1;
        self.ready = None;
        self.backlog = false;
        for stream in self.streams.values_mut() {
            stream.after = stream.durable;
            stream.from = stream.durable.map_or(stream.start, |durable| durable.next);
        }
    }

    fn too_large(&mut self, now: Millis, flight: &Flight, text: String) {
        self.discard_sealed();
        if let [entry] = &flight.entries[..]
            && entry.end.next - entry.first == 1
        {
            let reason = format!("a body of {} bytes with one record is refused on the way: {text}", flight.bytes);
            return self.park(now, entry.stream.clone(), reason);
        }
        self.body_bytes_max = (flight.bytes / 2).max(1024);
        self.body_bytes = self.body_bytes.min(self.body_bytes_max);
        self.report(Report::BodyHalved { bytes_max: self.body_bytes_max });
    }

    fn busy(&mut self, now: Millis, text: String, wait_ms: u64) {
        self.discard_sealed();
        self.failures = self.failures.saturating_add(1);
        self.credit = Credit { bytes: 0, wait_ms: 0 };
        self.credit_at = now.saturating_add(wait_ms.min(self.settings.backoff_max_ms));
        self.report(Report::Held { reason: text, retry_ms: wait_ms });
    }

    fn session_ended(&mut self, now: Millis, state: SessionState) {
        if state == SessionState::Superseded {
            self.report(Report::Superseded);
            return self.down(now, "another gateway has said hello with this edge id".to_owned(), SUPERSEDED_WAIT_MS);
        }
        // The cloud was started again: no reason to wait, unless it happens all the time.
        let wait = if self.failures == 0 { 0 } else { self.backoff(self.failures) };
        self.failures = self.failures.saturating_add(1);
        self.discard_sealed();
        self.phase = Phase::Down { hello_at: now.saturating_add(wait) };
    }

    fn failed(&mut self, now: Millis, failure: Failure) {
        match failure {
            Failure::Unreachable(text) | Failure::TooLarge(text) => self.down(now, text, 0),
            Failure::Refused(text) => self.down(now, text, self.settings.backoff_max_ms / 4),
            Failure::Busy { text, wait_ms } => self.down(now, text, wait_ms),
        }
    }

    fn down(&mut self, now: Millis, error: String, wait_ms: u64) {
        let retry_ms = self.backoff(self.failures).max(wait_ms);
        self.failures = self.failures.saturating_add(1);
        self.discard_sealed();
        self.phase = Phase::Down { hello_at: now.saturating_add(retry_ms) };
        self.report(Report::Down { error, retry_ms });
    }

    /// The wait after so many failures: doubling, and between half and all of that, so that a thousand gateways do not
    /// come back in step.
    fn backoff(&mut self, failures: u32) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let (min, max) = (self.settings.backoff_min_ms.max(2), self.settings.backoff_max_ms.max(2));
        let whole = min.saturating_mul(1 << failures.min(16)).min(max);
        whole / 2 + self.random % (whole / 2 + 1)
    }

    fn grant(&mut self, now: Millis, credit: Credit) {
        self.credit = credit;
        self.credit_at = now.saturating_add(u64::from(credit.wait_ms));
    }

    /// Sets the size of the next bodies by how fast this one went.
    fn measure(&mut self, now: Millis, flight: &Flight) {
        let elapsed = now.saturating_sub(flight.sent_at).max(1);
        let fitting = (flight.bytes as u64).saturating_mul(self.settings.body_ms) / elapsed;
        let fitting = usize::try_from(fitting).unwrap_or(usize::MAX).max(BODY_BYTES_MIN).min(self.body_bytes_max);
        // A small body says nothing about how long a large one takes; it can only show that more would fit.
        if flight.bytes * 2 >= self.body_bytes || fitting > self.body_bytes {
            self.body_bytes = fitting.min(self.body_bytes.saturating_mul(2));
        }
    }

    fn report(&mut self, report: Report) {
        self.outputs.push_back(Output::Report(report));
    }
}

impl Care {
    fn is_over(&self, end: Option<Position>) -> bool {
        let end = end_of(end);
        match self {
            Care::Split { until, .. } => end >= *until,
            Care::Reject { at, .. } => end > *at,
        }
    }
}

fn end_of(position: Option<Position>) -> Offset {
    position.map_or(0, |position| position.next)
}
