//! The front over real sockets, a log in memory, and the codec from the client's side.

use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use kafka_wire::header::decode_response_header;
use kafka_wire::{Message, Reader, RequestHeader, Writer};
use shared::batch::{Batch, BatchBuilder, Compression};
use shared::log::memory::MemoryLog;
use shared::log::{AppendError, BoxFuture};
use shared::name::{Partition, TimestampMs, TopicId};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::{Broker, FrontSettings, Listener};
use crate::catalogue::{Catalogue, CatalogueSettings, NewTopic};
use crate::groups::{GroupSettings, Groups};
use crate::state::memory::MemoryStateLog;
use crate::state::{Change, State, StateLog, TopicChange};

mod clients;
mod connections;
mod consume;
mod look_around;
mod produce;

/// A state log that makes partitions in a memory log as a shard does.
struct Shard {
    log: MemoryLog,
    state: MemoryStateLog,
}

impl StateLog for Shard {
    fn commit(&self, changes: Vec<Change>) -> BoxFuture<'static, Result<(), AppendError>> {
        for change in &changes {
            match change {
                Change::Topics(TopicChange::Created { topic, .. }) => create(&self.log, topic.id, topic.partitions),
                Change::Topics(TopicChange::PartitionsAdded { id, count }) => create(&self.log, *id, *count),
                _ => {}
            }
        }
        self.state.commit(changes)
    }

    fn with_state(&self, read: &mut dyn FnMut(&State)) {
        self.state.with_state(read);
    }

    fn now_ms(&self) -> TimestampMs {
        self.state.now_ms()
    }
}

fn create(log: &MemoryLog, topic: TopicId, partitions: u32) {
    (0..partitions).for_each(|index| log.create(Partition { topic, index }));
}

/// A broker that listens on a port of its own.
struct Running {
    broker: Arc<Broker>,
    log: MemoryLog,
    shard: Arc<Shard>,
    port: u16,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

fn settings() -> FrontSettings {
    FrontSettings { transfer_timeout: Duration::from_secs(20), ..FrontSettings::default() }
}

async fn start() -> Running {
    start_with(settings(), MemoryLog::new(256 << 20)).await
}

async fn start_with(settings: FrontSettings, log: MemoryLog) -> Running {
    let shard = Arc::new(Shard { log: log.clone(), state: MemoryStateLog::new() });
    start_over(settings, log, shard).await
}

async fn start_over(settings: FrontSettings, log: MemoryLog, shard: Arc<Shard>) -> Running {
    run(settings, log, shard, None).await
}

async fn start_tls(settings: FrontSettings, tls: Arc<rustls::ServerConfig>) -> Running {
    let log = MemoryLog::new(1 << 20);
    let shard = Arc::new(Shard { log: log.clone(), state: MemoryStateLog::new() });
    run(settings, log, shard, Some(tls)).await
}

async fn run(
    settings: FrontSettings,
    log: MemoryLog,
    shard: Arc<Shard>,
    tls: Option<Arc<rustls::ServerConfig>>,
) -> Running {
    let catalogue = Arc::new(Catalogue::new(shard.clone(), CatalogueSettings::default()));
    let group_settings = GroupSettings { initial_rebalance_delay_ms: 0, ..GroupSettings::default() };
    let groups = Groups::new(shard.clone(), group_settings);
    let cluster_id = "test-cluster".to_owned();
    let broker = Broker::new(Arc::new(log.clone()), shard.clone(), catalogue, groups, 1, cluster_id, settings);
    let broker = Arc::new(broker);
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = socket.local_addr().unwrap().port();
    let listener =
        Listener { name: "test".to_owned(), advertised_host: "127.0.0.1".to_owned(), advertised_port: port, tls };
    let (stop, shutdown) = watch::channel(false);
    let task = tokio::spawn(broker.clone().serve(socket, Arc::new(listener), shutdown));
    Running { broker, log, shard, port, stop, task }
}

impl Running {
    /// Makes a topic and returns its id.
    async fn topic(&self, name: &str, partitions: u32) -> TopicId {
        self.topic_with(name, partitions, &[]).await
    }

    async fn topic_with(&self, name: &str, partitions: u32, configs: &[(&str, &str)]) -> TopicId {
        let configs = configs.iter().map(|(name, value)| (name.to_string(), Some(value.to_string()))).collect();
        let topic = NewTopic { name: name.to_owned(), partitions: Some(partitions), configs };
        self.broker.catalogue.create(topic).await.unwrap().id
    }

    async fn client(&self) -> Client {
        Client { stream: TcpStream::connect(("127.0.0.1", self.port)).await.unwrap(), correlation_id: 0 }
    }
}

/// A client that speaks one version at a time.
struct Client {
    stream: TcpStream,
    correlation_id: i32,
}

fn request_frame<M: Message>(correlation_id: i32, version: i16, request: &M) -> Bytes {
    let header = RequestHeader {
        api_key: M::KEY as i16,
        api_version: version,
        correlation_id,
        client_id: Some("test".to_owned()),
    };
    let mut writer = Writer::frame(version, M::is_flexible(version));
    header.encode(&mut writer);
    request.write(&mut writer);
    writer.finish_frame().concat()
}

impl Client {
    async fn send<M: Message>(&mut self, version: i16, request: &M) {
        self.correlation_id += 1;
        let frame = request_frame(self.correlation_id, version, request);
        self.stream.write_all(&frame).await.unwrap();
    }

    /// One answer's correlation id and body.
    async fn receive<R: Message>(&mut self, version: i16) -> (i32, R) {
        let size = self.stream.read_u32().await.expect("an answer");
        let mut frame = vec![0; size as usize];
        self.stream.read_exact(&mut frame).await.unwrap();
        let flexible = R::is_flexible(version);
        let mut reader = Reader::new(frame.into(), version, flexible);
        let correlation_id = decode_response_header(R::KEY, version, &mut reader).unwrap();
        let response = R::read(&mut reader).unwrap();
        assert_eq!(reader.remaining(), 0, "bytes after the response");
        (correlation_id, response)
    }

    async fn call<M: Message, R: Message>(&mut self, version: i16, request: &M) -> R {
        self.send(version, request).await;
        let (correlation_id, response) = self.receive(version).await;
        assert_eq!(correlation_id, self.correlation_id);
        response
    }

    /// Whether the broker has closed the connection, without sending anything more.
    async fn is_closed(&mut self) -> bool {
        let read = tokio::time::timeout(Duration::from_secs(10), self.stream.read_u8()).await;
        read.expect("closed in time").is_err()
    }
}

/// A batch of records with these values.
fn batch(values: &[&[u8]]) -> Batch {
    let mut builder = BatchBuilder::default();
    for (at, value) in values.iter().enumerate() {
        builder.push(1_000 + at as i64, Some(b"key"), Some(value), &[]);
    }
    builder.finish(0, Compression::None)
}

/// A batch of one record of about this many bytes.
fn batch_of(bytes: usize) -> Batch {
    batch(&[&vec![b'x'; bytes]])
}

/// A copy of a batch with some header bytes overwritten and its CRC made right again.
fn with_bytes(batch: &Batch, at: usize, bytes: &[u8]) -> Bytes {
    let mut copy = BytesMut::from(&batch.bytes()[..]);
    copy[at..at + bytes.len()].copy_from_slice(bytes);
    let crc = crc32c::crc32c(&copy[21..]);
    copy[17..21].copy_from_slice(&crc.to_be_bytes());
    copy.freeze()
}

/// A copy of a batch as an idempotent producer sends it.
fn identified(batch: &Batch, producer_id: i64, epoch: i16, sequence: i32) -> Bytes {
    let mut identity = BytesMut::new();
    identity.put_i64(producer_id);
    identity.put_i16(epoch);
    identity.put_i32(sequence);
    with_bytes(batch, 43, &identity)
}
