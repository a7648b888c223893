use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use reqwest::StatusCode;
use shared::batch::{Batch, BatchBuilder, Compression, GAP_HEADER};
use shared::link::frame::{
    self, Append, AppendEntry, AppendReply, Hello, HelloReply, HelloStream, Outcome, Poll, PollReply, Session,
    SessionState, path,
};
use shared::link::{GAPS_TOPIC, Position};
use shared::log::faulty::{Fault, FaultyLog};
use shared::log::{AppendError, Chain, Log, ReadLimits};
use shared::name::{EdgeId, Incarnation, Offset, Partition, StreamName, TopicId, TopicName};
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::*;
use crate::archive::Recovered;
use crate::catalogue::{Catalogue, CatalogueSettings};
use crate::shard::{Shard, ShardSettings};
use crate::wal::memory::MemoryWal;

mod hang;

/// Every record of a topic: partition, value, headers.
async fn records(link: &Link, topic: &str) -> Vec<(u32, Bytes, Vec<String>)> {
    let Some((topic, partitions)) = link.topic(topic) else { return Vec::new() };
    let mut out = Vec::new();
    for index in 0..partitions {
        let partition = Partition { topic, index };
        let read = link.shard.read(partition, 0, ReadLimits { bytes_max: 1 << 24 }).await.unwrap();
        for mut bytes in read.batches {
            while let Some(batch) = Batch::split_first(&mut bytes).unwrap() {
                for record in batch.records(1 << 20).unwrap().map(Result::unwrap) {
                    let name = |header: &(Bytes, Option<Bytes>)| String::from_utf8(header.0.to_vec()).unwrap();
                    out.push((index, record.value.unwrap(), record.headers.iter().map(name).collect()));
                }
            }
        }
    }
    out
}

/// A link on a port of its own.
struct Link {
    shard: Arc<Shard>,
    faults: Arc<FaultyLog>,
    topics: Arc<Catalogue>,
    ingest: Arc<Ingest>,
    url: String,
    client: reqwest::Client,
    stop: watch::Sender<bool>,
    served: tokio::task::JoinHandle<std::io::Result<()>>,
}

impl Link {
    async fn start(settings: IngestSettings) -> Self {
        daemon::tls::install_provider();
        let (wal, recovered) = (Box::new(MemoryWal::new(64 << 20)), Recovered::default());
        let unarchived = ShardSettings { archived: false, ..ShardSettings::default() };
        let shard = Shard::open(unarchived, wal, recovered, None, Arc::new(|| 7)).unwrap();
        let topics = Arc::new(Catalogue::new(shard.clone(), CatalogueSettings::default()));
        let faults = Arc::new(FaultyLog::new(shard.clone()));
        let ingest = Ingest::new(settings, faults.clone(), shard.clone(), topics.clone(), shard.clone(), || 7);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (stop, stopped) = watch::channel(false);
        let served = tokio::spawn(serve(ingest.clone(), listener, None, stopped));
        let client = reqwest::Client::builder().no_proxy().tls_certs_only([]).build().unwrap();
        Self { shard, faults, topics, ingest, url, client, stop, served }
    }

    fn topic(&self, name: &str) -> Option<(TopicId, u32)> {
        self.topics.topic(name).map(|topic| (topic.id, topic.partitions))
    }

    async fn send(&self, path: &str, token: Option<&str>, body: Bytes) -> (StatusCode, Bytes) {
        let mut request = self.client.post(format!("{}{path}", self.url)).body(body);
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        let response = request.send().await.unwrap();
        (response.status(), response.bytes().await.unwrap())
    }

    async fn hello(&self, hello: &Hello) -> HelloReply {
        let (status, bytes) = self.send(path::HELLO, None, frame::encode(hello)).await;
        assert_eq!(status, StatusCode::OK, "{bytes:?}");
        frame::decode(&bytes).unwrap()
    }

    async fn append(&self, entries: Vec<(AppendEntry, Bytes)>, session: Session) -> AppendReply {
        let (entries, batches): (Vec<_>, Vec<_>) = entries.into_iter().unzip();
        let append = Append { edge: edge("gw"), session, entries };
        let (status, bytes) = self.send(path::APPEND, None, frame::encode_append(&append, &batches)).await;
        assert_eq!(status, StatusCode::OK, "{bytes:?}");
        frame::decode(&bytes).unwrap()
    }
}

fn edge(name: &str) -> EdgeId {
    EdgeId::parse(name).unwrap()
}

fn stream(name: &str) -> StreamName {
    StreamName::parse(name).unwrap()
}

fn session(boot: u8, hello: u32) -> Session {
    Session { boot: [boot; 16], hello }
}

fn hello(session: Session, streams: &[&str]) -> Hello {
    let stream = |name: &&str| HelloStream {
        name: stream(name),
        topic: TopicName::parse(&format!("{name}-topic")).unwrap(),
        incarnation: Incarnation([1; 16]),
        first: 0,
        next: 100,
        confirmed: 0,
        safe: 0,
    };
    let streams = streams.iter().map(stream).collect();
    Hello { lowest: 1, highest: 1, edge: edge("gw"), session, software: "test".into(), streams }
}

fn at(next: Offset) -> Position {
    Position { next, chain: Chain(next as u64 * 7) }
}

fn entry(name: &str, after: Option<Offset>, first: Offset, next: Offset) -> (AppendEntry, Bytes) {
    let mut builder = BatchBuilder::default();
    for offset in first..next {
        builder.push(5, None, Some(format!("{name}{offset}").as_bytes()), &[]);
    }
    let bytes = builder.finish(first, Compression::None).into_bytes();
    let entry = AppendEntry {
        stream: stream(name),
        after: after.map(at),
        first,
        end: at(next),
        gap: None,
        rejected: false,
        bytes: bytes.len() as u32,
    };
    (entry, bytes)
}

fn values(records: &[(u32, Bytes, Vec<String>)]) -> Vec<String> {
    records.iter().map(|record| String::from_utf8(record.1.to_vec()).unwrap()).collect()
}

#[tokio::test]
async fn what_is_sent_is_stored_once() {
    let link = Link::start(IngestSettings::default()).await;
    let reply = link.hello(&hello(session(1, 1), &["s", "t"])).await;
    assert_eq!((reply.version, reply.time_ms), (1, 7));
    assert!(reply.streams.iter().all(|stream| stream.position.is_none() && stream.parked.is_none()));

    let entries = vec![entry("s", None, 0, 2), entry("t", None, 0, 1), entry("s", Some(2), 2, 4)];
    let reply = link.append(entries.clone(), session(1, 1)).await;
    assert!(reply.streams.iter().all(|stream| stream.outcome == Outcome::Stored));
    assert_eq!(reply.streams[0].position, Some(at(4)));
    assert_eq!(reply.streams[0].safe, Some(4), "without an archive, durable is safe");
    let again = link.append(entries, session(1, 1)).await;
    assert!(again.streams.iter().all(|stream| stream.outcome == Outcome::Have));

    assert_eq!(values(&records(&link, "s-topic").await), ["s0", "s1", "s2", "s3"]);
    assert_eq!(values(&records(&link, "t-topic").await), ["t0"]);
    assert_eq!(link.topic("s-topic").unwrap().1, 16);
    let status = link.ingest.status();
    assert_eq!((status.records, status.batches, status.duplicates), (5, 3, 2));
}

#[tokio::test]
async fn streams_spread_over_partitions_and_keep_theirs() {
    let link = Link::start(IngestSettings::default()).await;
    let mut seen = std::collections::BTreeSet::new();
    for gateway in 0..16 {
        let mut first = hello(session(1, 1), &["s"]);
        first.edge = edge(&format!("gw-{gateway}"));
        link.hello(&first).await;
        let place = || {
            let mut place = None;
            link.shard.with_state(&mut |state| place = state.placement(&first.edge, &stream("s")));
            place.unwrap()
        };
        let placed = place();
        seen.insert(placed.index);
        first.session.hello = 2;
        link.hello(&first).await;
        assert_eq!(place(), placed);
    }
    assert_eq!(seen.len(), 16);
}

#[tokio::test]
async fn a_newer_hello_ends_the_older_session() {
    let link = Link::start(IngestSettings::default()).await;
    link.hello(&hello(session(1, 1), &["s"])).await;
    link.hello(&hello(session(2, 1), &["s"])).await;
    let reply = link.append(vec![entry("s", None, 0, 2)], session(1, 1)).await;
    assert_eq!((reply.session, reply.streams.len()), (SessionState::Superseded, 0));
    assert!(records(&link, "s-topic").await.is_empty());
    link.hello(&hello(session(1, 2), &["s"])).await;
    assert_eq!(link.ingest.status().edges[0].alternations, 1);
    let (status, _) = link.send(path::HELLO, None, frame::encode(&hello(session(1, 2), &["s"]))).await;
    assert_eq!(status, StatusCode::CONFLICT, "a repeated hello changes nothing");
}

#[tokio::test]
async fn a_copy_at_the_same_offset_is_told_apart_by_its_chain() {
    let link = Link::start(IngestSettings::default()).await;
    link.hello(&hello(session(1, 1), &["s"])).await;
    link.append(vec![entry("s", None, 0, 2)], session(1, 1)).await;
    let (mut other, bytes) = entry("s", Some(2), 2, 3);
    other.after = Some(Position { next: 2, chain: Chain(999) });
    let reply = link.append(vec![(other, bytes)], session(1, 1)).await;
    assert_eq!(reply.streams[0].outcome, Outcome::WrongPosition);
    assert_eq!(reply.streams[0].position, Some(at(2)));
    let reply = link.append(vec![entry("s", Some(2), 3, 4)], session(1, 1)).await;
    assert_eq!(reply.streams[0].outcome, Outcome::WrongPosition, "a hole that was not declared");
}

#[tokio::test]
async fn a_declared_gap_is_stored_and_listed() {
    let link = Link::start(IngestSettings::default()).await;
    link.hello(&hello(session(1, 1), &["s"])).await;
    link.append(vec![entry("s", None, 0, 2)], session(1, 1)).await;
    let (mut after_gap, bytes) = entry("s", Some(2), 10, 12);
    after_gap.gap = Some((2, 10));
    let reply = link.append(vec![(after_gap, bytes)], session(1, 1)).await;
    assert_eq!(reply.streams[0].outcome, Outcome::Stored);
    let listed = values(&records(&link, GAPS_TOPIC).await);
    let listed: serde_json::Value = serde_json::from_str(&listed[0]).unwrap();
    assert_eq!((&listed["edge"], &listed["first"], &listed["last"]), (&"gw".into(), &2.into(), &9.into()));
    assert_eq!(GAP_HEADER, "tributary-gap");
}

#[tokio::test]
async fn a_record_set_aside_goes_to_the_rejected_topic_and_the_position_moves_on() {
    let link = Link::start(IngestSettings { batch_bytes_max: 300, ..IngestSettings::default() }).await;
    link.hello(&hello(session(1, 1), &["s"])).await;
    let reply = link.append(vec![entry("s", None, 0, 40)], session(1, 1)).await;
    assert!(matches!(reply.streams[0].outcome, Outcome::Rejected { .. }), "{reply:?}");
    let (mut aside, bytes) = entry("s", None, 0, 1);
    aside.rejected = true;
    let reply = link.append(vec![(aside, bytes), entry("s", Some(1), 1, 3)], session(1, 1)).await;
    assert_eq!((&reply.streams[0].outcome, reply.streams[0].position), (&Outcome::Stored, Some(at(3))));
    assert_eq!(values(&records(&link, "s-topic.rejected").await), ["s0"]);
    assert_eq!(values(&records(&link, "s-topic").await), ["s1", "s2"]);
}

#[tokio::test]
async fn a_damaged_batch_is_not_stored() {
    let link = Link::start(IngestSettings::default()).await;
    link.hello(&hello(session(1, 1), &["s", "t"])).await;
    let (entry_s, bytes) = entry("s", None, 0, 2);
    let mut bytes = bytes.to_vec();
    *bytes.last_mut().unwrap() ^= 1;
    let reply = link.append(vec![(entry_s, bytes.into()), entry("t", None, 0, 1)], session(1, 1)).await;
    assert!(matches!(reply.streams[0].outcome, Outcome::Rejected { .. }));
    assert_eq!(reply.streams[1].outcome, Outcome::Stored, "the other stream goes on");
    assert!(records(&link, "s-topic").await.is_empty());
}

#[tokio::test]
async fn a_full_log_says_later_and_keeps_the_order() {
    let link = Link::start(IngestSettings::default()).await;
    link.hello(&hello(session(1, 1), &["s"])).await;
    link.faults.script([Fault::Refuse(AppendError::Full("the disk".into()))]);
    let reply = link.append(vec![entry("s", None, 0, 2), entry("s", Some(2), 2, 3)], session(1, 1)).await;
    assert!(matches!(&reply.streams[0].outcome, Outcome::Later { reason } if reason.contains("the disk")));
    assert_eq!(reply.streams[0].position, None);
    let reply = link.append(vec![entry("s", None, 0, 3)], session(1, 1)).await;
    assert_eq!(reply.streams[0].outcome, Outcome::Stored);
}

#[tokio::test]
async fn an_append_that_failed_after_it_was_stored_is_not_stored_again() {
    let link = Link::start(IngestSettings::default()).await;
    link.hello(&hello(session(1, 1), &["s"])).await;
    link.faults.script([Fault::StoreThenFail(AppendError::Storage("no answer".into()))]);
    let reply = link.append(vec![entry("s", None, 0, 2), entry("s", Some(2), 2, 3)], session(1, 1)).await;
    assert!(matches!(&reply.streams[0].outcome, Outcome::Later { .. }));
    assert_eq!(reply.streams[0].position, Some(at(2)), "the reply speaks of what is durable");
    let reply = link.append(vec![entry("s", None, 0, 2)], session(1, 1)).await;
    assert_eq!(reply.streams[0].outcome, Outcome::Have);
    let reply = link.append(vec![entry("s", Some(2), 2, 3)], session(1, 1)).await;
    assert_eq!(reply.streams[0].outcome, Outcome::Stored);
    assert_eq!(values(&records(&link, "s-topic").await), ["s0", "s1", "s2"]);
}

#[tokio::test]
async fn a_hello_waits_for_an_append_under_way() {
    let link = Link::start(IngestSettings::default()).await;
    link.hello(&hello(session(1, 1), &["s"])).await;
    link.faults.script([Fault::Hold]);
    let sent = link.append(vec![entry("s", None, 0, 2)], session(1, 1));
    let newer = hello(session(2, 1), &["s"]);
    let greeting = async {
        // The append is under way once nothing is left of its turn.
        while link.ingest.status().appends == 0 {
            tokio::task::yield_now().await;
        }
        let mut greeting = std::pin::pin!(link.hello(&newer));
        assert!(futures_util::poll!(&mut greeting).is_pending());
        link.faults.release();
        greeting.await
    };
    let (_, reply) = tokio::join!(sent, greeting);
    assert_eq!(reply.streams[0].position, Some(at(2)), "and not the position before it");
}

#[tokio::test]
async fn a_token_opens_its_own_edge_and_topics_only() {
    let topics = Some(vec![TopicName::parse("s-topic").unwrap()]);
    let grant = EdgeGrant { id: edge("gw"), token: shared::config::Secret::new("secret".to_owned()), topics };
    let link = Link::start(IngestSettings { grants: Grants::new(vec![grant]), ..IngestSettings::default() }).await;
    let mine = frame::encode(&hello(session(1, 1), &["s", "t"]));
    let mut other = hello(session(1, 1), &["s"]);
    other.edge = edge("other");
    let other = frame::encode(&other);
    for (token, body, expected) in [
        (None, &mine, StatusCode::UNAUTHORIZED),
        (Some("wrong"), &mine, StatusCode::UNAUTHORIZED),
        (Some("secret"), &other, StatusCode::FORBIDDEN),
        (Some("secret"), &mine, StatusCode::OK),
    ] {
        let (status, text) = link.send(path::HELLO, token, body.clone()).await;
        assert_eq!(status, expected, "{text:?}");
    }
    let (_, bytes) = link.send(path::HELLO, Some("secret"), frame::encode(&hello(session(1, 2), &["s", "t"]))).await;
    let reply: HelloReply = frame::decode(&bytes).unwrap();
    assert_eq!(reply.streams[0].parked, None);
    assert!(reply.streams[1].parked.as_ref().unwrap().contains("t-topic"));
    assert_eq!(link.topic("t-topic"), None, "what is not allowed is not made");
}

#[tokio::test]
async fn bad_requests_are_answered_in_words() {
    let link = Link::start(IngestSettings { body_bytes_max: 10_000, ..IngestSettings::default() }).await;
    let mut newer = frame::encode(&hello(session(1, 1), &[])).to_vec();
    (newer[0], newer[5], newer[6]) = (3, 3, 5);
    let huge = Bytes::from(vec![0; 2 << 20]);
    let garbage = Bytes::from_static(b"GET / HTTP/1.1");
    for (path, body, expected, words) in [
        (path::HELLO, Bytes::from(newer), StatusCode::UPGRADE_REQUIRED, "3 to 5, this cloud speaks 1 to 1"),
        (path::HELLO, garbage.clone(), StatusCode::BAD_REQUEST, "version"),
        (path::HELLO, Bytes::new(), StatusCode::BAD_REQUEST, "cut"),
        (path::APPEND, garbage, StatusCode::BAD_REQUEST, "version"),
        (path::APPEND, huge, StatusCode::PAYLOAD_TOO_LARGE, "larger"),
    ] {
        let (status, text) = link.send(path, None, body).await;
        let text = String::from_utf8(text.to_vec()).unwrap();
        assert_eq!(status, expected, "{text}");
        assert!(text.contains(words), "{text}");
    }
    assert_eq!(link.ingest.status().refused, 5);
}

#[tokio::test]
async fn without_memory_there_is_no_credit_and_a_poll_tells_when_there_is() {
    let link = Link::start(IngestSettings::default()).await;
    link.hello(&hello(session(1, 1), &["s"])).await;
    let all = link.ingest.budget.available_permits() as u32;
    let taken = link.ingest.budget.clone().acquire_many_owned(all - 100).await.unwrap();
    let reply = link.append(vec![entry("s", None, 0, 2)], session(1, 1)).await;
    assert_eq!(reply.credit.bytes, 0);
    let poll = |wants_credit| {
        let known = vec![(stream("s"), 2)];
        let poll = Poll { edge: edge("gw"), session: session(1, 1), wait_secs: 20, wants_credit, known };
        link.send(path::POLL, None, frame::encode(&poll))
    };
    drop(taken);
    let (_, bytes) = poll(true).await;
    let reply: PollReply = frame::decode(&bytes).unwrap();
    assert!(reply.credit.bytes > 0);
}

#[tokio::test]
async fn a_poll_ends_when_its_session_does() {
    let link = Link::start(IngestSettings::default()).await;
    link.hello(&hello(session(1, 1), &["s"])).await;
    let poll = Poll { edge: edge("gw"), session: session(1, 1), wait_secs: 25, wants_credit: false, known: vec![] };
    let waiting = link.send(path::POLL, None, frame::encode(&poll));
    let newer = hello(session(2, 1), &["s"]);
    let next = link.hello(&newer);
    let ((_, bytes), _) = tokio::join!(waiting, next);
    assert_eq!(frame::decode::<PollReply>(&bytes).unwrap().session, SessionState::Superseded);
}

#[tokio::test]
async fn the_end_answers_polls_and_closes() {
    let link = Link::start(IngestSettings::default()).await;
    link.hello(&hello(session(1, 1), &["s"])).await;
    let poll = Poll { edge: edge("gw"), session: session(1, 1), wait_secs: 25, wants_credit: false, known: vec![] };
    let (stop, served) = (link.stop, link.served);
    let request = link.client.post(format!("{}{}", link.url, path::POLL)).body(frame::encode(&poll)).send();
    let ended = async {
        stop.send_replace(true);
        tokio::time::timeout(Duration::from_secs(20), served).await.expect("ends").unwrap().unwrap();
    };
    // Whether the poll was there before the end or not, it does not hold it up.
    let (_, ()) = tokio::join!(request, ended);
}
