//! Fuzz bodies: what must hold whatever comes over the link or lies in a batch. Each takes any bytes and panics when a
//! promise is broken.
//!
//! `tests/fuzz` runs them under libFuzzer; the tests at the end run them on the seeds that are kept in `tests/fuzz/corpus`.

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::batch::{Batch, BatchBuilder, BatchError, Compression, seal};
use crate::link::Position;
use crate::link::frame::{
    self, Append, AppendEntry, AppendReply, Credit, Hello, HelloReply, HelloStream, HelloStreamReply, Limits, Outcome,
    Poll, PollReply, Session, SessionState, StreamReply,
};
use crate::link::receiver::{EdgeSession, Plan};
use crate::link::sender::{Failure, Output, Row, Rows, Sender, SenderSettings, Step, StreamInfo, seal_body};
use crate::log::{Chain, StreamKey};
use crate::name::{EdgeId, Incarnation, Offset, Partition, StreamName, TopicId, TopicName};

#[path = "../../tests/fuzz/checksums.rs"]
mod checksums;

use checksums::set_checksums;

const UNPACKED_BYTES_MAX: usize = 1 << 20;

/// Bytes that may be record batches. The first byte says whether checksums are set right first, so that more than the
/// checksum is tried.
pub fn batch(data: &[u8]) {
    let Some((&how, bytes)) = data.split_first() else { return };
    let mut bytes = bytes.to_vec();
    if how & 1 != 0 {
        set_checksums(&mut bytes);
    }
    let mut rest = Bytes::from(bytes);
    while let Ok(Some(batch)) = Batch::split_first(&mut rest) {
        assert_eq!(Batch::parse(batch.bytes().clone()), Ok(batch.clone()));
        let Ok(records) = batch.records(UNPACKED_BYTES_MAX) else { continue };
        let count = records.take_while(Result::is_ok).count();
        assert!(count <= batch.record_count() as usize, "{count} records in {batch:?}");
        // What cannot be sealed again is said to be so; what can has the same offsets.
        if let Ok(sealed) = seal(std::slice::from_ref(&batch), Compression::Lz4, None) {
            assert_eq!(sealed.base_offset(), batch.base_offset());
            assert_eq!(Batch::parse(sealed.bytes().clone()), Ok(sealed));
        }
    }
}

/// Bytes that may be a message of the link: what can be read means the same once it is written and read again.
pub fn link_frames(data: &[u8]) {
    let bytes = Bytes::copy_from_slice(data);
    if let Ok(hello) = frame::decode::<Hello>(&bytes) {
        assert_eq!(frame::hello_versions(&bytes).is_some(), bytes.first() == Some(&hello.lowest));
    }
    again::<Hello>(&bytes);
    again::<HelloReply>(&bytes);
    again::<AppendReply>(&bytes);
    again::<Poll>(&bytes);
    again::<PollReply>(&bytes);
    if let Ok((append, batches)) = frame::decode_append(&bytes) {
        let sum: usize = batches.iter().map(Bytes::len).sum();
        assert!(sum <= bytes.len(), "the batches lie in the body");
        let written = frame::encode_append(&append, &batches);
        assert_eq!(frame::decode_append(&written), Ok((append, batches)));
    }
}

fn again<M: frame::Message + PartialEq + std::fmt::Debug>(bytes: &Bytes) {
    if let Ok(message) = frame::decode::<M>(bytes) {
        assert_eq!(frame::decode::<M>(&frame::encode(&message)).as_ref(), Ok(&message));
    }
}

/// Numbers drawn from the fuzzer's bytes; 0 when there are no more.
struct Draws<'a>(&'a [u8]);

impl Draws<'_> {
    fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        first
    }

    fn below(&mut self, bound: u8) -> u8 {
        self.byte() % bound.max(1)
    }

    /// Mostly a small number near `about`, now and then an extreme one.
    fn offset(&mut self, about: Offset) -> Offset {
        match self.byte() {
            255 => Offset::MAX,
            254 => Offset::MAX - 1,
            253 => 0,
            n => about.saturating_add(Offset::from(n % 16)).saturating_sub(8).max(0),
        }
    }

    fn size(&mut self) -> u32 {
        match self.byte() {
            255 => u32::MAX,
            n => u32::from(n) * u32::from(n) * 16,
        }
    }

    fn text(&mut self) -> String {
        "no".repeat(usize::from(self.byte()) * 2)
    }

    fn optional<T>(&mut self, draw: impl FnOnce(&mut Self) -> T) -> Option<T> {
        (self.byte() & 1 == 1).then(|| draw(self))
    }
}

fn stream_name(number: u8) -> StreamName {
    StreamName::parse(["one", "two", "three"][usize::from(number % 3)]).expect("a name")
}

fn topic_name(number: u8) -> TopicName {
    TopicName::parse(["a", "b", "c"][usize::from(number % 3)]).expect("a name")
}

fn records(first: Offset, count: u8, payload: u8) -> Batch {
    let mut builder = BatchBuilder::default();
    for n in 0..count.max(1) {
        builder.push(i64::from(n), Some(b"k"), Some(&vec![b'v'; payload.into()]), &[]);
    }
    builder.finish(first, Compression::None)
}

/// The cloud's half against an edge that says anything. Nothing is stored but at the position that the stream has, and
/// every answer is one that the edge can read.
pub fn link_receiver(data: &[u8]) {
    let mut draws = Draws(data);
    let edge = EdgeId::parse("gw").expect("a name");
    let mut session = EdgeSession::new(edge.clone());
    let mut positions: BTreeMap<StreamKey, Position> = BTreeMap::new();
    let credit = Credit { bytes: 1, wait_ms: 0 };
    let limits = Limits { batch_bytes_max: 2000, body_bytes_max: 8000, poll_secs_max: 1 };
    for _ in 0..64 {
        if draws.0.is_empty() {
            return;
        }
        let known = Session { boot: [draws.below(3); 16], hello: draws.below(4).into() };
        if draws.byte() & 3 == 0 {
            let streams = (0..draws.below(3)).map(|n| hello_stream(&mut draws, n)).collect();
            let (lowest, highest) = (draws.below(3), draws.below(3));
            let hello = Hello { lowest, highest, edge: edge.clone(), session: known, software: draws.text(), streams };
            if session.hello(1, &hello).is_err() {
                continue;
            }
            for stream in &hello.streams {
                let target = match draws.below(4) {
                    0 => Err(draws.text()),
                    _ => Ok(Partition { topic: TopicId([1; 16]), index: 0 }),
                };
                session.route(stream.name.clone(), stream.topic.clone(), stream.incarnation, target);
            }
            let at = |key: &StreamKey| (positions.get(key).copied(), None);
            let reply = session.hello_reply(1, &hello, limits, credit, &at);
            assert_eq!(frame::decode::<HelloReply>(&frame::encode(&reply)), Ok(reply));
            continue;
        }
        if session.session(known) != SessionState::Current {
            continue;
        }
        let (mut entries, mut bodies) = (Vec::new(), Vec::new());
        for _ in 0..draws.below(4) {
            let (entry, body) = entry(&mut draws, &session, &positions);
            entries.push(entry);
            bodies.push(body);
        }
        let append = Append { edge: edge.clone(), session: known, entries };
        // The border reads an append before it is planned.
        let Ok((append, bodies)) = frame::decode_append(&frame::encode_append(&append, &bodies)) else { continue };
        let plans = session.plan(&append, bodies, 2000, &|key| positions.get(key).copied());
        let mut results = Vec::new();
        for plan in plans {
            let outcome = match &plan {
                Plan::Refuse(_, outcome) => outcome.clone(),
                Plan::Store(store) | Plan::Reject(store) => {
                    let before = positions.get(&store.source.stream).copied();
                    let from = store.source.gap.map_or(store.source.first, |gap| gap.0);
                    assert!(before.is_none_or(|at| at.next == from), "stored where the stream does not stand");
                    assert_eq!(store.begins, before.is_none());
                    assert_eq!(
                        (store.batch.base_offset(), store.batch.last_offset() + 1),
                        (store.source.first, store.source.next)
                    );
                    let position = Position { next: store.source.next, chain: store.source.chain };
                    positions.insert(store.source.stream.clone(), position);
                    Outcome::Stored
                }
            };
            results.push((plan.stream().clone(), outcome));
        }
        let reply = session.append_reply(results, credit, &|key| (positions.get(key).copied(), None));
        assert_eq!(frame::decode::<AppendReply>(&frame::encode(&reply)), Ok(reply));
    }
}

fn hello_stream(draws: &mut Draws<'_>, number: u8) -> HelloStream {
    let first = draws.offset(8);
    HelloStream {
        name: stream_name(number),
        topic: topic_name(draws.byte()),
        incarnation: Incarnation([draws.below(2); 16]),
        first,
        next: draws.offset(first),
        confirmed: draws.offset(first),
        safe: draws.offset(first),
    }
}

fn entry(
    draws: &mut Draws<'_>,
    session: &EdgeSession,
    positions: &BTreeMap<StreamKey, Position>,
) -> (AppendEntry, Bytes) {
    let stream = stream_name(draws.byte());
    let position = session.stream_key(&stream).and_then(|key| positions.get(&key).copied());
    let stands = position.map_or(0, |at| at.next);
    let first = draws.offset(stands.saturating_add(8));
    let (count, payload) = (draws.below(5).max(1), draws.byte());
    let chain = Chain(draws.byte().into());
    let after = if draws.below(4) == 0 {
        draws.optional(|d| Position { next: d.offset(stands.saturating_add(8)), chain })
    } else {
        position
    };
    let mut body = records(first, count, payload).into_bytes().to_vec();
    if draws.below(4) == 0
        && let Some(byte) = body.get_mut(usize::from(draws.byte()))
    {
        *byte ^= 1 << draws.below(8);
    }
    let next = if draws.below(8) == 0 { draws.offset(first) } else { first.saturating_add(count.into()) };
    let gap = draws.optional(|d| (d.offset(stands.saturating_add(8)), first));
    let rejected = draws.below(4) == 0;
    let bytes = body.len() as u32;
    (AppendEntry { stream, after, first, end: Position { next, chain }, gap, rejected, bytes }, body.into())
}

/// What the edge holds of one stream.
struct Holding {
    info: StreamInfo,
    rows: Vec<Row>,
}

struct Holdings(Vec<Holding>);

impl Holdings {
    fn of(&self, name: &StreamName) -> Option<&Holding> {
        self.0.iter().find(|holding| holding.info.name == *name)
    }

    fn of_mut(&mut self, name: &StreamName) -> Option<&mut Holding> {
        self.0.iter_mut().find(|holding| holding.info.name == *name)
    }
}

impl Rows for Holdings {
    fn streams(&self) -> Vec<StreamInfo> {
        self.0.iter().map(|holding| holding.info.clone()).collect()
    }

    fn read(&self, stream: &StreamName, from: Offset, bytes_max: usize) -> Result<Vec<Row>, String> {
        let rows = &self.of(stream).ok_or("no such stream")?.rows;
        let mut left = bytes_max;
        let mut found = Vec::new();
        for row in rows.iter().filter(|row| row.batch.last_offset() >= from) {
            if !found.is_empty() && row.batch.len() > left {
                break;
            }
            left = left.saturating_sub(row.batch.len());
            found.push(row.clone());
        }
        Ok(found)
    }

    fn chain_at(&self, stream: &StreamName, next: Offset) -> Option<Chain> {
        self.of(stream)?.rows.iter().find(|row| row.batch.last_offset() + 1 == next).map(|row| row.chain)
    }
}

impl Holding {
    fn push(&mut self, draws: &mut Draws<'_>) {
        let batch = records(self.info.next, draws.below(4), draws.byte());
        self.info.next = batch.last_offset() + 1;
        let chain = Chain((self.info.next as u64).wrapping_mul(31).wrapping_add(self.info.incarnation.0[0].into()));
        self.rows.push(Row { batch, chain });
    }

    /// Drops the oldest rows, safe or not.
    fn trim(&mut self) {
        if self.rows.len() < 2 {
            return;
        }
        let row = self.rows.remove(0);
        self.info.first = row.batch.last_offset() + 1;
        let lost = self.info.confirmed.max(self.info.dropped.map_or(row.batch.base_offset(), |dropped| dropped.0));
        if self.info.first > lost {
            self.info.dropped = Some((lost, self.info.first));
        }
    }

    fn position(&self, draws: &mut Draws<'_>) -> Option<Position> {
        match draws.below(8) {
            0 => None,
            1 => Some(Position { next: draws.offset(self.info.next), chain: Chain(draws.byte().into()) }),
            n => {
                let row = self.rows.get(usize::from(n - 2) % self.rows.len().max(1))?;
                Some(Position { next: row.batch.last_offset() + 1, chain: row.chain })
            }
        }
    }
}

/// The edge's half against a cloud that says anything. It comes to rest after each answer, every message it sends can be
/// read, and nothing is said to be confirmed or safe that the edge does not hold.
pub fn link_sender(data: &[u8]) {
    let mut draws = Draws(data);
    let mut sender = Sender::new(SenderSettings::default(), EdgeId::parse("gw").expect("a name"), [7; 16], 1);
    let mut holdings = Holdings(
        (0..2)
            .map(|n| Holding {
                info: StreamInfo {
                    name: stream_name(n),
                    topic: topic_name(n),
                    incarnation: Incarnation([n; 16]),
                    first: 0,
                    next: 0,
                    confirmed: 0,
                    safe: 0,
                    renewed_at: 0,
                    dropped: None,
                },
                rows: Vec::new(),
            })
            .collect(),
    );
    let mut now = 1;
    let mut asked: Vec<Asked> = Vec::new();
    while !draws.0.is_empty() {
        let wake = rest(&mut sender, now, &mut holdings, &mut asked, &mut draws);
        match draws.below(8) {
            0 | 1 => {
                let number = draws.below(2);
                if let Some(holding) = holdings.of_mut(&stream_name(number)) {
                    holding.push(&mut draws);
                }
            }
            2 => {
                let number = draws.below(2);
                holdings.of_mut(&stream_name(number)).into_iter().for_each(Holding::trim);
            }
            3 => now = wake.unwrap_or(now).max(now + u64::from(draws.byte())),
            _ if asked.is_empty() => now = wake.unwrap_or(now).max(now + 1),
            _ => {
                let question = asked.remove(usize::from(draws.below(asked.len() as u8)));
                answer(&mut sender, now, question, &holdings, &mut draws);
            }
        }
    }
    rest(&mut sender, now, &mut holdings, &mut asked, &mut draws);
}

enum Asked {
    Hello(Hello),
    Append(Append),
    Poll(u32),
}

/// Takes steps until there is nothing to do but wait.
fn rest(
    sender: &mut Sender,
    now: u64,
    holdings: &mut Holdings,
    asked: &mut Vec<Asked>,
    draws: &mut Draws<'_>,
) -> Option<u64> {
    for _ in 0..200 {
        while let Some(output) = sender.output() {
            carry_out(sender, now, output, holdings, draws);
        }
        match sender.step(now, holdings) {
            Step::Wait(until) => return until,
            Step::Hello(body) => {
                asked.push(Asked::Hello(frame::decode(&body).expect("a hello that the cloud can read")));
            }
            Step::Append(body) => {
                let (append, batches) = frame::decode_append(&body).expect("an append that the cloud can read");
                assert!(!append.entries.is_empty(), "an append holds something");
                for (entry, bytes) in append.entries.iter().zip(batches) {
                    let batch = Batch::parse(bytes).expect("a whole batch");
                    assert_eq!((batch.base_offset(), batch.last_offset() + 1), (entry.first, entry.end.next));
                }
                asked.push(Asked::Append(append));
            }
            Step::Poll { number, body, .. } => {
                frame::decode::<Poll>(&body).expect("a poll that the cloud can read");
                asked.push(Asked::Poll(number));
            }
            Step::Seal(order) => {
                let body = seal_body(&order, holdings);
                sender.sealed(now, body);
            }
        }
    }
    panic!("200 steps and no rest");
}

fn carry_out(sender: &mut Sender, now: u64, output: Output, holdings: &mut Holdings, draws: &mut Draws<'_>) {
    match output {
        Output::Confirmed { stream, next } => {
            let holding = holdings.of_mut(&stream).expect("one of the edge's streams");
            assert!(next <= holding.info.next, "confirmed {next} of {}", holding.info.next);
            holding.info.confirmed = holding.info.confirmed.max(next);
        }
        Output::Safe { stream, next } => {
            let holding = holdings.of_mut(&stream).expect("one of the edge's streams");
            assert!(next <= holding.info.next, "safe {next} of {}", holding.info.next);
            holding.info.safe = holding.info.safe.max(next);
        }
        Output::Renew { stream } => {
            let holding = holdings.of_mut(&stream).expect("one of the edge's streams");
            let result = if draws.below(8) == 0 { Err("no".to_owned()) } else { Ok(()) };
            if result.is_ok() {
                let [byte, ..] = holding.info.incarnation.0;
                holding.info.incarnation = Incarnation([byte.wrapping_add(2); 16]);
                holding.info.renewed_at = holding.info.safe.max(holding.info.first);
            }
            sender.renewed(now, &stream, result);
        }
        Output::GapDeclared { stream, upto } => {
            let holding = holdings.of_mut(&stream).expect("one of the edge's streams");
            holding.info.dropped = holding.info.dropped.filter(|dropped| dropped.1 > upto);
        }
        Output::Park { .. } | Output::Report(_) => {}
    }
}

fn answer(sender: &mut Sender, now: u64, asked: Asked, holdings: &Holdings, draws: &mut Draws<'_>) {
    let failure = match draws.below(8) {
        0 => Some(Failure::Unreachable(draws.text())),
        1 => Some(Failure::TooLarge(draws.text())),
        2 => Some(Failure::Refused(draws.text())),
        3 => Some(Failure::Busy { text: draws.text(), wait_ms: draws.size().into() }),
        _ => None,
    };
    let credit = Credit { bytes: draws.size(), wait_ms: draws.size() };
    match asked {
        Asked::Hello(hello) => {
            let streams = hello.streams.iter().filter_map(|stream| {
                let holding = holdings.of(&stream.name).filter(|_| draws.below(8) > 0)?;
                let position = holding.position(draws);
                let safe = draws.optional(|d| d.offset(holding.info.next));
                let parked = if draws.below(8) == 0 { Some(draws.text()) } else { None };
                Some(HelloStreamReply { name: stream.name.clone(), position, safe, parked })
            });
            let streams = streams.collect();
            let limits = Limits {
                batch_bytes_max: draws.size(),
                body_bytes_max: draws.size(),
                poll_secs_max: draws.byte().into(),
            };
            let version = if draws.below(16) == 0 { draws.byte() } else { hello.highest };
            let reply = HelloReply { version, time_ms: 0, limits, credit, streams };
            sender.hello_done(now, failure.map_or(Ok(reply), Err), holdings);
        }
        Asked::Append(append) => {
            let streams = append.entries.iter().filter_map(|entry| {
                let holding = holdings.of(&entry.stream).filter(|_| draws.below(8) > 0)?;
                let stored = draws.byte() & 1 == 1;
                let position = if stored { Some(entry.end) } else { holding.position(draws) };
                let outcome = match draws.below(8) {
                    0 => Outcome::Have,
                    1 => Outcome::WrongPosition,
                    2 => Outcome::Rejected { reason: draws.text() },
                    3 => Outcome::Parked { reason: draws.text() },
                    4 => Outcome::Later { reason: draws.text() },
                    _ => Outcome::Stored,
                };
                let safe = draws.optional(|d| d.offset(holding.info.next));
                Some(StreamReply { name: entry.stream.clone(), position, safe, outcome })
            });
            let streams = streams.collect();
            let reply = AppendReply { session: state(draws), credit, streams };
            sender.append_done(now, failure.map_or(Ok(reply), Err), holdings);
        }
        Asked::Poll(number) => {
            let safe = holdings.0.iter().map(|h| (h.info.name.clone(), draws.offset(h.info.next))).collect();
            let reply = PollReply { session: state(draws), credit, safe };
            sender.poll_done(now, number, failure.map_or(Ok(reply), Err));
        }
    }
}

fn state(draws: &mut Draws<'_>) -> SessionState {
    match draws.below(16) {
        0 => SessionState::Unknown,
        1 => SessionState::Superseded,
        _ => SessionState::Current,
    }
}

#[cfg(test)]
#[path = "../../tests/fuzz/replay.rs"]
mod replay;

#[cfg(test)]
mod tests {
    use super::replay::replay;

    #[test]
    fn batch() {
        replay("batch", super::batch);
    }

    #[test]
    fn link_frames() {
        replay("link_frames", super::link_frames);
    }

    #[test]
    fn link_receiver() {
        replay("link_receiver", super::link_receiver);
    }

    #[test]
    fn link_sender() {
        replay("link_sender", super::link_sender);
    }
}
