//! A cloud for tests: the link's own receiver over the log in memory, behind a socket.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Router;
use axum::extract::State;
use axum::routing::post;
use bytes::Bytes;
use parking_lot::Mutex;
use shared::batch::Batch;
use shared::link::frame::{self, Append, Credit, Hello, Limits, Outcome, Poll, PollReply, path};
use shared::link::receiver::{EdgeSession, Plan, outcome_of};
use shared::link::{Position, receiver};
use shared::log::memory::MemoryLog;
use shared::log::{self, Log as _, ReadLimits, Source, StreamKey};
use shared::name::{EdgeId, Offset, Partition, TopicId, TopicName};

use crate::uplink::UplinkSettings;

/// What came of a stream: value, and the gap that was declared before it.
pub(crate) type Taken = Vec<(Vec<u8>, Option<String>)>;

pub(crate) struct Cloud {
    log: MemoryLog,
    state: Mutex<(EdgeSession, BTreeMap<TopicName, Partition>)>,
    /// What is in its log is in its bucket too.
    archives: AtomicBool,
}

impl Cloud {
    /// Starts one, and gives the settings to reach it.
    pub(crate) async fn start() -> (Arc<Self>, UplinkSettings) {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let edge = EdgeId::parse("gw-1").unwrap();
        let log = MemoryLog::new(1 << 30);
        let state = Mutex::new((EdgeSession::new(edge.clone()), BTreeMap::new()));
        let cloud = Arc::new(Self { log, state, archives: AtomicBool::new(false) });
        let router = Router::new()
            .route(path::HELLO, post(hello))
            .route(path::APPEND, post(append))
            .route(path::POLL, post(poll))
            .with_state(cloud.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut settings = UplinkSettings::new(edge);
        settings.url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await });
        (cloud, settings)
    }

    /// From now on its bucket is there.
    pub(crate) fn archive(&self) {
        self.archives.store(true, Ordering::Relaxed);
    }

    /// What is durable of a stream, and what is safe.
    fn known(&self, key: &StreamKey) -> (Option<Position>, Option<Offset>) {
        let position = self.position(key);
        let safe = position.filter(|_| self.archives.load(Ordering::Relaxed)).map(|position| position.next);
        (position, safe)
    }

    fn position(&self, key: &StreamKey) -> Option<Position> {
        self.log.position(key).map(|(next, chain)| Position { next, chain })
    }

    /// Everything in a topic, in the log's order.
    pub(crate) async fn taken(&self, topic: &str) -> Taken {
        let partition = self.state.lock().1.get(&TopicName::parse(topic).unwrap()).copied();
        let Some(partition) = partition else { return Vec::new() };
        let read = self.log.read(partition, 0, ReadLimits { bytes_max: usize::MAX }).await.unwrap();
        let batches = read.batches.into_iter().map(|bytes| Batch::parse(bytes).unwrap());
        let records = batches.flat_map(|batch| batch.records(1 << 26).unwrap().map(Result::unwrap).collect::<Vec<_>>());
        let gap = |record: &shared::batch::Record| {
            let header = record.headers.iter().find(|(name, _)| &name[..] == shared::batch::GAP_HEADER.as_bytes());
            header.map(|(_, value)| String::from_utf8(value.clone().unwrap().to_vec()).unwrap())
        };
        records.map(|record| (record.value.clone().unwrap().to_vec(), gap(&record))).collect()
    }
}

const LIMITS: Limits = Limits { batch_bytes_max: 1 << 20, body_bytes_max: 8 << 20, poll_secs_max: 1 };
const CREDIT: Credit = Credit { bytes: 1 << 20, wait_ms: 100 };

async fn hello(State(cloud): State<Arc<Cloud>>, body: Bytes) -> Vec<u8> {
    let hello: Hello = frame::decode(&body).unwrap();
    let mut state = cloud.state.lock();
    let (session, topics) = &mut *state;
    session.hello(1, &hello).unwrap();
    for stream in &hello.streams {
        let index = topics.len() as u8;
        let partition = *topics.entry(stream.topic.clone()).or_insert_with(|| {
            let partition = Partition { topic: TopicId([index + 1; 16]), index: 0 };
            cloud.log.create(partition);
            partition
        });
        session.route(stream.name.clone(), stream.topic.clone(), stream.incarnation, Ok(partition));
    }
    let known = |key: &StreamKey| cloud.known(key);
    frame::encode(&session.hello_reply(1, &hello, LIMITS, CREDIT, &known)).to_vec()
}

async fn append(State(cloud): State<Arc<Cloud>>, body: Bytes) -> Vec<u8> {
    let (append, bodies): (Append, Vec<Bytes>) = frame::decode_append(&body).unwrap();
    let plans = {
        let state = cloud.state.lock();
        match state.0.session(append.session) {
            frame::SessionState::Current => state.0.plan(&append, bodies, 1 << 20, &|key| cloud.position(key)),
            other => return frame::encode(&EdgeSession::refuse(other)).to_vec(),
        }
    };
    let mut results = Vec::new();
    for plan in plans {
        match plan {
            Plan::Store(plan) | Plan::Reject(plan) => {
                let (partition, source) = (plan.partition, Source::Edge(plan.source));
                let append = log::Append { partition, batch: plan.batch, source };
                let outcome = cloud.log.append(append).await.map_or_else(outcome_of, |_| Outcome::Stored);
                results.push((plan.stream, outcome));
            }
            Plan::Refuse(stream, outcome) => results.push((stream, outcome)),
        }
    }
    let known: &receiver::Known<'_> = &|key| cloud.known(key);
    let reply = cloud.state.lock().0.append_reply(results, CREDIT, known);
    frame::encode(&reply).to_vec()
}

async fn poll(State(cloud): State<Arc<Cloud>>, body: Bytes) -> Vec<u8> {
    let poll: Poll = frame::decode(&body).unwrap();
    let session = cloud.state.lock().0.session(poll.session);
    frame::encode(&PollReply { session, credit: CREDIT, safe: Vec::new() }).to_vec()
}
