//! A small world of edges, a wire and a cloud, driven by one seed. Judged by what is in the cloud's log at the end.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

use bytes::Bytes;

use crate::batch::{Batch, BatchBuilder, Compression, GAP_HEADER};
use crate::link::frame::{self, Credit, Limits, Outcome, PollReply, SessionState};
use crate::link::receiver::{EdgeSession, HelloRefused, Plan, Takeover, outcome_of};
use crate::link::sender::{
    Body, Failure, Output, Report, Row, Rows, Sender, SenderSettings, Step, StreamInfo, seal_body,
};
use crate::link::{Position, REJECTED_HEADER};
use crate::log::idempotence::check_position;
use crate::log::{Chain, StreamKey};
use crate::name::{EdgeId, Incarnation, Offset, Partition, StreamName, TopicId, TopicName};

pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 11) % bound.max(1)
    }

    pub fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }
}

/// The number that a record's value begins with: unique in its world.
pub fn mark(value: &[u8]) -> u64 {
    u64::from_be_bytes(value[..8].try_into().unwrap())
}

#[derive(Clone)]
pub struct StreamDouble {
    pub topic: TopicName,
    pub incarnation: Incarnation,
    pub rows: Vec<Row>,
    pub first: Offset,
    pub next: Offset,
    pub confirmed: Offset,
    pub safe: Offset,
    pub renewed_at: Offset,
    pub dropped: Option<(Offset, Offset)>,
    pub parked: Option<String>,
    chain: Chain,
    /// Marks of all records of this life of the disk that were not dropped.
    pub marks: BTreeSet<u64>,
}

impl StreamDouble {
    pub fn new(topic: &str, incarnation: u8) -> Self {
        Self {
            topic: TopicName::parse(topic).unwrap(),
            incarnation: Incarnation([incarnation; 16]),
            rows: Vec::new(),
            first: 0,
            next: 0,
            confirmed: 0,
            safe: 0,
            renewed_at: 0,
            dropped: None,
            parked: None,
            chain: Chain(u64::from(incarnation)),
            marks: BTreeSet::new(),
        }
    }

    pub fn push(&mut self, values: &[Vec<u8>]) {
        let mut builder = BatchBuilder::default();
        for value in values {
            builder.push(1_700_000_000_000, Some(b"key"), Some(value), &[]);
            self.marks.insert(mark(value));
        }
        let batch = builder.finish(self.next, Compression::None);
        self.next += values.len() as Offset;
        self.chain = Chain((self.chain.0 ^ u64::from(batch.crc())).wrapping_mul(0x100_0000_01b3).rotate_left(17));
        self.rows.push(Row { batch, chain: self.chain });
    }

    /// Deletes rows below `before`; those not confirmed count as dropped.
    pub fn trim(&mut self, before: Offset) {
        let from = self.first;
        let before = before.min(self.next);
        while let Some(row) = self.rows.first() {
            if row.batch.last_offset() >= before {
                break;
            }
            let row = self.rows.remove(0);
            self.first = row.batch.last_offset() + 1;
            for record in row.batch.records(1 << 20).unwrap().map(Result::unwrap) {
                if record.offset >= self.safe {
                    self.marks.remove(&mark(&record.value.unwrap()));
                }
            }
        }
        let lost = from.max(self.confirmed);
        if self.first > lost {
            self.dropped = Some((self.dropped.map_or(lost, |d| d.0), self.first));
        }
    }
}

#[derive(Clone, Default)]
pub struct StoreDouble(pub BTreeMap<StreamName, StreamDouble>);

impl Rows for StoreDouble {
    fn streams(&self) -> Vec<StreamInfo> {
        let info = |(name, s): (&StreamName, &StreamDouble)| StreamInfo {
            name: name.clone(),
            topic: s.topic.clone(),
            incarnation: s.incarnation,
            first: s.first,
            next: s.next,
            confirmed: s.confirmed,
            safe: s.safe,
            renewed_at: s.renewed_at,
            dropped: s.dropped,
        };
        self.0.iter().map(info).collect()
    }

    fn read(&self, stream: &StreamName, from: Offset, bytes_max: usize) -> Result<Vec<Row>, String> {
        let mut left = bytes_max;
        let mut out = Vec::new();
        for row in self.0[stream].rows.iter().filter(|row| row.batch.last_offset() >= from) {
            if !out.is_empty() && row.batch.len() > left {
                break;
            }
            left = left.saturating_sub(row.batch.len());
            out.push(row.clone());
        }
        Ok(out)
    }

    fn chain_at(&self, stream: &StreamName, next: Offset) -> Option<Chain> {
        let stream = &self.0[stream];
        stream.rows.iter().find(|row| row.batch.last_offset() + 1 == next).map(|row| row.chain)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Hello,
    Append,
    Poll,
}

enum Event {
    ToCloud { edge: usize, kind: Kind, number: u64, bytes: Bytes },
    ToEdge { edge: usize, kind: Kind, number: u64, reply: Result<Bytes, Failure> },
    Sealed { edge: usize, run: u64, body: Box<Body> },
    Renewed { edge: usize, run: u64, stream: StreamName },
    Wake { edge: usize },
    Tick,
}

#[derive(Clone)]
pub struct Stored {
    pub offset: Offset,
    pub mark: u64,
    pub rejected: bool,
}

#[derive(Clone, Default)]
pub struct Durable {
    pub positions: BTreeMap<StreamKey, Position>,
    pub records: BTreeMap<StreamKey, Vec<Stored>>,
}

#[derive(Default)]
pub struct Cloud {
    pub durable: Durable,
    pub bucket: Durable,
    pub sessions: BTreeMap<EdgeId, EdgeSession>,
    pub forbidden: BTreeSet<TopicName>,
    pub alarms: u32,
    /// There is no room where these go.
    pub full_streams: BTreeSet<StreamName>,
    /// Claims to hold other records, whatever it is asked.
    pub disagrees: bool,
}

pub struct EdgeDouble {
    pub id: EdgeId,
    pub store: StoreDouble,
    pub sender: Sender,
    pub reports: Vec<Report>,
    run: u64,
    open: [Option<u64>; 3],
    requests: u64,
    wake: u64,
}

/// What the wire and the cloud do to the edges, in percent of requests.
#[derive(Clone, Copy)]
pub struct Faults {
    pub lose: u64,
    pub lose_reply: u64,
    pub repeat: u64,
    pub full: u64,
    pub proxy_bytes_max: usize,
}

pub const CALM: Faults = Faults { lose: 0, lose_reply: 0, repeat: 0, full: 0, proxy_bytes_max: usize::MAX };

pub struct World {
    pub rng: Rng,
    pub now: u64,
    pub edges: Vec<EdgeDouble>,
    pub cloud: Cloud,
    pub faults: Faults,
    pub limits: Limits,
    pub settings: SenderSettings,
    pub writes: bool,
    pub value_bytes: u64,
    pub drop_oldest: bool,
    pub seals: u64,
    /// Marks of all records that were confirmed as durable to any edge and not lost by the cloud since.
    pub twice_ok: BTreeSet<u64>,
    marks: u64,
    boots: u64,
    order: u64,
    events: BinaryHeap<Reverse<(u64, u64)>>,
    due: BTreeMap<(u64, u64), Event>,
}

impl World {
    pub fn new(seed: u64) -> Self {
        let settings = SenderSettings { parked_retry_ms: 3000, ..SenderSettings::default() };
        let mut world = Self {
            rng: Rng::new(seed),
            now: 1,
            edges: Vec::new(),
            cloud: Cloud::default(),
            faults: CALM,
            limits: Limits { batch_bytes_max: 1 << 20, body_bytes_max: 8 << 20, poll_secs_max: 2 },
            settings,
            writes: false,
            value_bytes: 40,
            drop_oldest: false,
            seals: 0,
            twice_ok: BTreeSet::new(),
            marks: 0,
            boots: 0,
            order: 0,
            events: BinaryHeap::new(),
            due: BTreeMap::new(),
        };
        world.after(10, Event::Tick);
        world
    }

    pub fn add_edge(&mut self, id: &str, streams: &[&str], incarnation: u8) -> usize {
        let streams = streams
            .iter()
            .map(|name| (StreamName::parse(name).unwrap(), StreamDouble::new(&format!("{name}-topic"), incarnation)));
        let store = StoreDouble(streams.collect());
        self.add_copy(id, store)
    }

    /// A gateway that starts with a copy of another's disk.
    pub fn add_copy(&mut self, id: &str, store: StoreDouble) -> usize {
        let id = EdgeId::parse(id).unwrap();
        let sender = self.sender(&id);
        let run = self.boots;
        let edge = EdgeDouble { id, store, sender, reports: Vec::new(), run, open: [None; 3], requests: 0, wake: 0 };
        self.edges.push(edge);
        self.after(0, Event::Wake { edge: self.edges.len() - 1 });
        self.edges.len() - 1
    }

    fn sender(&mut self, id: &EdgeId) -> Sender {
        self.boots += 1;
        let mut boot = [0; 16];
        boot[..8].copy_from_slice(&self.boots.to_be_bytes());
        Sender::new(self.settings.clone(), id.clone(), boot, self.rng.next())
    }

    /// Kills the process and starts it again, on this disk.
    pub fn restart(&mut self, edge: usize, store: StoreDouble) {
        let sender = self.sender(&self.edges[edge].id.clone());
        let run = self.boots;
        let edge_double = &mut self.edges[edge];
        (edge_double.sender, edge_double.store, edge_double.run) = (sender, store, run);
        edge_double.open = [None; 3];
        self.after(1, Event::Wake { edge });
    }

    /// The cloud starts again and finds what the bucket has.
    pub fn restore_cloud(&mut self) {
        self.cloud.durable = self.cloud.bucket.clone();
        self.cloud.sessions.clear();
    }

    fn after(&mut self, delay: u64, event: Event) {
        self.order += 1;
        let key = (self.now + delay, self.order);
        self.events.push(Reverse(key));
        self.due.insert(key, event);
    }

    pub fn write(&mut self, edge: usize, stream: &StreamName, values: usize, bytes: u64) {
        let values: Vec<Vec<u8>> = (0..values)
            .map(|_| {
                self.marks += 1;
                let mut value = self.marks.to_be_bytes().to_vec();
                let length = self.rng.below(bytes.max(1));
                value.extend((0..length).map(|_| self.rng.next() as u8));
                value
            })
            .collect();
        self.edges[edge].store.0.get_mut(stream).unwrap().push(&values);
        self.drive(edge);
    }

    pub fn run(&mut self, for_ms: u64) {
        let end = self.now + for_ms;
        while let Some(Reverse((at, order))) = self.events.peek().copied() {
            if at > end {
                break;
            }
            self.events.pop();
            let event = self.due.remove(&(at, order)).unwrap();
            self.now = at;
            self.handle(event);
        }
        self.now = end;
    }

    /// Runs without faults until everything held is confirmed.
    pub fn settle(&mut self) {
        (self.faults, self.writes) = (CALM, false);
        for _ in 0..2000 {
            self.run(500);
            let done = |edge: &EdgeDouble| {
                edge.store.0.iter().all(|(name, s)| {
                    let key = StreamKey { edge: edge.id.clone(), stream: name.clone(), incarnation: s.incarnation };
                    self.cloud.forbidden.contains(&s.topic)
                        || s.next == s.first
                        || self.cloud.durable.positions.get(&key).is_some_and(|p| p.next == s.next)
                })
            };
            if self.edges.iter().all(done) {
                // The last replies are still on their way.
                return self.run(3000);
            }
        }
        panic!("the edges never finish at {}", self.now);
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::ToCloud { edge, kind, number, bytes } => self.at_cloud(edge, kind, number, bytes),
            Event::ToEdge { edge, kind, number, reply } => self.at_edge(edge, kind, number, reply),
            Event::Sealed { edge, run, body } => {
                if self.edges[edge].run == run {
                    self.edges[edge].sender.sealed(self.now, *body);
                    self.drive(edge);
                }
            }
            Event::Renewed { edge, run, stream } => {
                if self.edges[edge].run == run {
                    let incarnation = Incarnation(std::array::from_fn(|_| self.rng.next() as u8));
                    let double = self.edges[edge].store.0.get_mut(&stream).unwrap();
                    let from = double.safe.max(double.first);
                    (double.incarnation, double.confirmed, double.renewed_at) = (incarnation, from, from);
                    self.edges[edge].sender.renewed(self.now, &stream, Ok(()));
                    self.drive(edge);
                }
            }
            Event::Wake { edge } => self.drive(edge),
            Event::Tick => self.tick(),
        }
    }

    fn tick(&mut self) {
        self.after(10, Event::Tick);
        if self.rng.percent(2) {
            self.cloud.bucket = self.cloud.durable.clone();
        }
        if !self.writes {
            return;
        }
        for edge in 0..self.edges.len() {
            let names: Vec<StreamName> = self.edges[edge].store.0.keys().cloned().collect();
            for name in names {
                if self.rng.percent(20) {
                    let records = 1 + self.rng.below(4) as usize;
                    self.write(edge, &name, records, self.value_bytes);
                }
                let drop_oldest = self.drop_oldest && self.rng.percent(2);
                let below = self.rng.below(4);
                let double = self.edges[edge].store.0.get_mut(&name).unwrap();
                if drop_oldest {
                    double.trim(double.first + 1 + below as Offset * 5);
                } else if below == 0 {
                    double.trim(double.safe);
                }
            }
        }
    }

    /// Lets an edge do all it wants to do now.
    fn drive(&mut self, edge: usize) {
        loop {
            self.outputs(edge);
            let double = &mut self.edges[edge];
            match double.sender.step(self.now, &double.store) {
                Step::Hello(bytes) => self.send(edge, Kind::Hello, bytes),
                Step::Append(bytes) => self.send(edge, Kind::Append, bytes),
                Step::Poll { number, body, .. } => {
                    double.wake = u64::from(number);
                    self.send(edge, Kind::Poll, body);
                }
                Step::Seal(order) => {
                    self.seals += 1;
                    let body = Box::new(seal_body(&order, &double.store));
                    let run = double.run;
                    let delay = self.rng.below(20);
                    self.after(delay, Event::Sealed { edge, run, body });
                }
                Step::Wait(until) => {
                    if let Some(until) = until {
                        assert!(until > self.now, "a wait that ended before it began would spin");
                        self.after(until - self.now, Event::Wake { edge });
                    }
                    return;
                }
            }
        }
    }

    fn outputs(&mut self, edge: usize) {
        while let Some(output) = self.edges[edge].sender.output() {
            let run = self.edges[edge].run;
            let store = &mut self.edges[edge].store.0;
            match output {
                Output::Confirmed { stream, next } => {
                    let double = store.get_mut(&stream).unwrap();
                    assert!(next <= double.next, "what was never written cannot be confirmed");
                    double.confirmed = double.confirmed.max(next);
                }
                Output::Safe { stream, next } => {
                    let double = store.get_mut(&stream).unwrap();
                    assert!(next <= double.next, "what was never written cannot be safe");
                    double.safe = double.safe.max(next);
                }
                Output::Renew { stream } => self.after(3, Event::Renewed { edge, run, stream }),
                Output::Park { stream, reason } => store.get_mut(&stream).unwrap().parked = reason,
                Output::GapDeclared { stream, upto } => {
                    let double = store.get_mut(&stream).unwrap();
                    double.dropped = double.dropped.filter(|d| d.1 > upto).map(|d| (d.0.max(upto), d.1));
                }
                Output::Report(report) => {
                    if let Report::SentTwice { stream, from, .. } = &report {
                        // Whatever is sent again from there may be there twice.
                        let double = &store[stream];
                        for row in double.rows.iter().filter(|row| row.batch.last_offset() >= *from) {
                            let records = row.batch.records(1 << 20).unwrap().map(Result::unwrap);
                            self.twice_ok.extend(records.map(|record| mark(&record.value.unwrap())));
                        }
                    }
                    self.edges[edge].reports.push(report);
                }
            }
        }
    }

    fn send(&mut self, edge: usize, kind: Kind, bytes: Bytes) {
        let double = &mut self.edges[edge];
        double.requests += 1;
        let number = double.run << 32 | double.requests;
        double.open[kind as usize] = Some(number);
        let late = Err(Failure::Unreachable("timed out".into()));
        let timeout = 4000 + self.rng.below(1000);
        self.after(timeout, Event::ToEdge { edge, kind, number, reply: late });
        if bytes.len() > self.faults.proxy_bytes_max {
            let reply = Err(Failure::TooLarge("proxy".into()));
            return self.after(5, Event::ToEdge { edge, kind, number, reply });
        }
        if self.rng.percent(self.faults.lose) {
            return;
        }
        let copies = if self.rng.percent(self.faults.repeat) { 2 } else { 1 };
        for copy in 0..copies {
            let delay = 1 + self.rng.below(40) + copy * self.rng.below(9000);
            self.after(delay, Event::ToCloud { edge, kind, number, bytes: bytes.clone() });
        }
    }

    fn at_edge(&mut self, edge: usize, kind: Kind, number: u64, reply: Result<Bytes, Failure>) {
        let double = &mut self.edges[edge];
        if double.open[kind as usize] != Some(number) {
            return;
        }
        double.open[kind as usize] = None;
        let now = self.now;
        match kind {
            Kind::Hello => {
                let reply = reply.map(|bytes| frame::decode(&bytes).unwrap());
                double.sender.hello_done(now, reply, &double.store);
            }
            Kind::Append => {
                let reply = reply.map(|bytes| frame::decode(&bytes).unwrap());
                double.sender.append_done(now, reply, &double.store);
            }
            Kind::Poll => {
                let reply = reply.map(|bytes| frame::decode(&bytes).unwrap());
                double.sender.poll_done(now, double.wake as u32, reply);
            }
        }
        self.drive(edge);
    }

    fn at_cloud(&mut self, edge: usize, kind: Kind, number: u64, bytes: Bytes) {
        let reply = match kind {
            Kind::Hello => self.cloud_hello(&bytes),
            Kind::Append => Ok(self.cloud_append(&bytes)),
            Kind::Poll => Ok(self.cloud_poll(&bytes)),
        };
        if !self.rng.percent(self.faults.lose_reply) {
            let delay = 1 + self.rng.below(40);
            self.after(delay, Event::ToEdge { edge, kind, number, reply });
        }
    }

    fn credit(&mut self) -> Credit {
        Credit { bytes: if self.rng.percent(self.faults.full) { 0 } else { 1 << 20 }, wait_ms: 300 }
    }

    fn cloud_hello(&mut self, bytes: &Bytes) -> Result<Bytes, Failure> {
        let hello: frame::Hello = frame::decode(bytes).unwrap();
        let credit = self.credit();
        let cloud = &mut self.cloud;
        let session = cloud.sessions.entry(hello.edge.clone()).or_insert_with(|| EdgeSession::new(hello.edge.clone()));
        match session.hello(self.now as i64, &hello) {
            Ok(Takeover::Alternating { .. }) => cloud.alarms += 1,
            Ok(_) => {}
            Err(HelloRefused::Stale) => return Err(Failure::Unreachable("stale".into())),
            Err(refused) => return Err(Failure::Refused(refused.to_string())),
        }
        for stream in &hello.streams {
            let forbidden = cloud.forbidden.contains(&stream.topic);
            let partition = Partition { topic: TopicId([1; 16]), index: 0 };
            let target = if forbidden { Err("topic not allowed".to_owned()) } else { Ok(partition) };
            session.route(stream.name.clone(), stream.topic.clone(), stream.incarnation, target);
        }
        let known = known(&cloud.durable, &cloud.bucket);
        let mut reply = session.hello_reply(self.now as i64, &hello, self.limits, credit, &known);
        if cloud.disagrees {
            reply.streams.iter_mut().for_each(|s| s.position = Some(Position { next: 1_000, chain: Chain(1) }));
        }
        Ok(frame::encode(&reply))
    }

    fn cloud_append(&mut self, bytes: &Bytes) -> Bytes {
        let (append, batches) = frame::decode_append(bytes).unwrap();
        let credit = self.credit();
        let is_full = self.rng.percent(self.faults.full);
        let cloud = &mut self.cloud;
        let Some(session) = cloud.sessions.get(&append.edge) else {
            return frame::encode(&EdgeSession::refuse(SessionState::Unknown));
        };
        let state = session.session(append.session);
        if state != SessionState::Current {
            return frame::encode(&EdgeSession::refuse(state));
        }
        let max = self.limits.batch_bytes_max as usize;
        let plans = session.plan(&append, batches, max, &|key| cloud.durable.positions.get(key).copied());
        let mut results = Vec::new();
        for plan in plans {
            let (plan, rejected) = match plan {
                Plan::Store(plan) => (plan, false),
                Plan::Reject(plan) => (plan, true),
                Plan::Refuse(stream, outcome) => {
                    results.push((stream, outcome));
                    continue;
                }
            };
            if is_full || cloud.full_streams.contains(&plan.stream) {
                if results.iter().all(|(stream, _)| *stream != plan.stream) {
                    results.push((plan.stream, Outcome::Later { reason: "full".into() }));
                }
                continue;
            }
            let key = plan.source.stream.clone();
            let at = cloud.durable.positions.get(&key).map(|p| p.next);
            if let Err(error) = check_position(at, &plan.source) {
                results.push((plan.stream, outcome_of(error)));
                continue;
            }
            store(cloud.durable.records.entry(key.clone()).or_default(), &plan.batch, rejected, plan.source.gap);
            cloud.durable.positions.insert(key, Position { next: plan.source.next, chain: plan.source.chain });
            results.push((plan.stream, Outcome::Stored));
        }
        frame::encode(&session.append_reply(results, credit, &known(&cloud.durable, &cloud.bucket)))
    }

    fn cloud_poll(&mut self, bytes: &Bytes) -> Bytes {
        let poll: frame::Poll = frame::decode(bytes).unwrap();
        let credit = self.credit();
        let Some(session) = self.cloud.sessions.get(&poll.edge) else {
            return frame::encode(&PollReply { session: SessionState::Unknown, credit, safe: vec![] });
        };
        let safe = poll.known.iter().filter_map(|(name, _)| {
            let at = self.cloud.bucket.positions.get(&session.stream_key(name)?)?;
            Some((name.clone(), at.next))
        });
        frame::encode(&PollReply { session: session.session(poll.session), credit, safe: safe.collect() })
    }

    /// Everything every disk holds is in the cloud, in order, once (or reported), and every hole is declared.
    pub fn check(&self) {
        let mut seen: BTreeMap<u64, u32> = BTreeMap::new();
        for (key, records) in &self.cloud.durable.records {
            assert!(records.windows(2).all(|pair| pair[0].offset < pair[1].offset), "{key:?} is out of order");
            for record in records {
                *seen.entry(record.mark).or_default() += 1;
            }
        }
        for edge in &self.edges {
            for (name, stream) in &edge.store.0 {
                let missing: Vec<_> = stream.marks.iter().filter(|mark| !seen.contains_key(mark)).collect();
                assert!(missing.is_empty(), "{}/{name} lost {missing:?}", edge.id);
            }
        }
        for (mark, times) in seen {
            assert!(times == 1 || self.twice_ok.contains(&mark), "record {mark} is there {times} times, unreported");
        }
    }

    pub fn count(&self, is: fn(&Stored) -> bool) -> usize {
        self.cloud.durable.records.values().flatten().filter(|record| is(record)).count()
    }

    pub fn reports(&self, is: fn(&Report) -> bool) -> usize {
        self.edges.iter().flat_map(|edge| &edge.reports).filter(|report| is(report)).count()
    }
}

fn known<'a>(
    durable: &'a Durable,
    bucket: &'a Durable,
) -> impl Fn(&StreamKey) -> (Option<Position>, Option<Offset>) + 'a {
    |key| (durable.positions.get(key).copied(), bucket.positions.get(key).map(|p| p.next))
}

fn store(log: &mut Vec<Stored>, batch: &Batch, rejected: bool, gap: Option<(Offset, Offset)>) {
    let next = log.last().map(|last| last.offset + 1);
    for (index, record) in batch.records(1 << 20).unwrap().map(Result::unwrap).enumerate() {
        let header = |name: &str| record.headers.iter().find(|h| h.0 == name.as_bytes()).map(|h| h.1.clone());
        assert_eq!(header(REJECTED_HEADER).is_some(), rejected);
        let told = header(GAP_HEADER).map(|text| String::from_utf8(text.unwrap().to_vec()).unwrap());
        let expected = gap.filter(|_| index == 0).map(|(from, to)| format!("{from}-{}", to - 1));
        assert_eq!(told, expected, "a gap is told in the record after it");
        if let Some(next) = next.filter(|_| index == 0) {
            assert_eq!(gap.map_or(record.offset, |gap| gap.0), next, "every hole is declared");
        }
        log.push(Stored { offset: record.offset, mark: mark(&record.value.unwrap()), rejected });
    }
}

pub fn stream(name: &str) -> StreamName {
    StreamName::parse(name).unwrap()
}
