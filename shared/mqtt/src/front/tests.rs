//! Real sockets, our own codec as the client, and a store whose commits the test decides.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

use super::*;
use crate::codec::{
    Ack, Connect, Disconnect, Packet, Properties, QoS, RetainHandling, Split, Subscribe, SubscribeOptions, Version,
    Will, split,
};
use crate::store::Refusal;
use crate::store::memory::{MemoryStore, Verdict};
use QoS::{AtLeastOnce, AtMostOnce, ExactlyOnce};
use Version::{V4, V5};

mod bounds;
mod delivery;
mod hostile;
mod races;
mod sessions;
mod storing;

const PATIENCE: Duration = Duration::from_secs(20);

struct Server {
    front: Arc<Front>,
    address: SocketAddr,
}

impl Server {
    async fn start(store: &MemoryStore) -> Self {
        Self::with(Settings::default(), store).await
    }

    async fn with(settings: Settings, store: &MemoryStore) -> Self {
        let front = Front::new(settings, Arc::new(store.clone())).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(front.clone().serve(listener, None, ListenerSettings::default()));
        Self { front, address }
    }

    async fn raw(&self) -> Client {
        Client::over(TcpStream::connect(self.address).await.unwrap(), V5)
    }

    async fn connect(&self, version: Version, client_id: &str) -> Client {
        self.connect_with(connect(version, client_id)).await.0
    }

    /// Connects and returns whether the session was present.
    async fn connect_with(&self, connect: Connect<'_>) -> (Client, bool) {
        let mut client = self.raw().await;
        client.version = connect.version;
        client.send(&Packet::Connect(Box::new(connect))).await;
        let frame = client.recv().await;
        let Packet::ConnAck(ack) = client.read(&frame) else { panic!("{frame:?}") };
        assert_eq!(ack.reason, Reason::SUCCESS);
        (client, ack.session_present)
    }

    /// Waits until the front's counters satisfy `until`.
    async fn stats(&self, until: impl Fn(&Stats) -> bool) -> Stats {
        let wait = async {
            loop {
                let stats = self.front.stats();
                if until(&stats) {
                    return stats;
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("{:?}", self.front.stats()))
    }
}

fn nothing_stored() -> MemoryStore {
    MemoryStore::at_once(|_| Verdict::NotStored)
}

fn connect(version: Version, client_id: &str) -> Connect<'_> {
    Connect {
        version,
        clean_start: true,
        keep_alive_secs: 0,
        client_id,
        will: None,
        username: None,
        password: None,
        properties: Properties::default(),
    }
}

/// Keeps its session.
fn kept(version: Version, client_id: &str) -> Connect<'_> {
    let mut connect = connect(version, client_id);
    connect.clean_start = false;
    if version == V5 {
        connect.properties.session_expiry_secs = Some(1000);
    }
    connect
}

fn publish<'a>(topic: &'a str, payload: &'a [u8], qos: QoS, id: u16) -> crate::codec::Publish<'a> {
    crate::codec::Publish {
        dup: false,
        qos,
        retain: false,
        topic,
        packet_id: (qos > AtMostOnce).then_some(id),
        topic_alias: None,
        subscription_ids: vec![],
        properties: PublishProperties::default(),
        payload,
    }
}

fn retained<'a>(topic: &'a str, payload: &'a [u8], qos: QoS, id: u16) -> crate::codec::Publish<'a> {
    crate::codec::Publish { retain: true, ..publish(topic, payload, qos, id) }
}

/// A PUBLISH as it came.
#[derive(Debug, PartialEq, Eq, Clone)]
struct Got {
    topic: String,
    payload: Vec<u8>,
    qos: QoS,
    retain: bool,
    dup: bool,
    id: Option<u16>,
    subscription_ids: Vec<u32>,
}

trait Socket: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Socket for T {}

struct Client {
    stream: Box<dyn Socket>,
    buffer: Vec<u8>,
    version: Version,
}

impl Client {
    fn over(stream: impl Socket + 'static, version: Version) -> Self {
        Self { stream: Box::new(stream), buffer: Vec::new(), version }
    }

    async fn send_bytes(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    async fn send(&mut self, packet: &Packet<'_>) {
        let mut bytes = Vec::new();
        packet.encode(self.version, &mut bytes).unwrap();
        self.send_bytes(&bytes).await;
    }

    async fn publish(&mut self, topic: &str, payload: &[u8], qos: QoS, id: u16) {
        self.send(&Packet::Publish(publish(topic, payload, qos, id))).await;
    }

    /// The next packet's bytes; `None` at the end of the connection.
    async fn try_recv(&mut self) -> Option<Vec<u8>> {
        let read = async {
            loop {
                if let Split::Frame(frame) = split(&self.buffer, Some(self.version), usize::MAX).unwrap() {
                    let frame = frame.bytes.to_vec();
                    self.buffer.drain(..frame.len());
                    return Some(frame);
                }
                let mut chunk = vec![0; 65536];
                match self.stream.read(&mut chunk).await {
                    Ok(0) | Err(_) => return None,
                    Ok(n) => self.buffer.extend_from_slice(&chunk[..n]),
                }
            }
        };
        tokio::time::timeout(PATIENCE, read).await.expect("a packet in time")
    }

    async fn recv(&mut self) -> Vec<u8> {
        self.try_recv().await.expect("a packet, not the end")
    }

    fn read<'a>(&self, frame: &'a [u8]) -> Packet<'a> {
        let Ok(Split::Frame(frame)) = split(frame, Some(self.version), usize::MAX) else { panic!() };
        Packet::decode(&frame, self.version).unwrap()
    }

    async fn expect(&mut self, packet: Packet<'_>) {
        let frame = self.recv().await;
        assert_eq!(self.read(&frame), packet);
    }

    async fn expect_puback(&mut self, id: u16) {
        self.expect(Packet::PubAck(Ack::new(id, Reason::SUCCESS))).await;
    }

    /// The connection ends; with this DISCONNECT in MQTT 5, without a word in 3.1.1.
    async fn expect_end(&mut self, reason: Reason) {
        let frame = self.try_recv().await;
        if self.version == V4 {
            assert_eq!(frame, None);
            return;
        }
        let frame = frame.expect("a DISCONNECT");
        let Packet::Disconnect(disconnect) = self.read(&frame) else { panic!("{frame:?}") };
        assert_eq!(disconnect.reason, reason, "{disconnect:?}");
        assert_eq!(self.try_recv().await, None);
    }

    /// Everything sent so far was processed, and nothing came before the answer.
    async fn ping(&mut self) {
        self.send(&Packet::PingReq).await;
        self.expect(Packet::PingResp).await;
    }

    async fn subscribe_with(
        &mut self,
        id: u16,
        filters: &[(&str, SubscribeOptions)],
        identifier: Option<u32>,
    ) -> Vec<Reason> {
        let properties = Properties { subscription_id: identifier, ..Properties::default() };
        self.send(&Packet::Subscribe(Subscribe { packet_id: id, properties, filters: filters.to_vec() })).await;
        let frame = self.recv().await;
        let Packet::SubAck(ack) = self.read(&frame) else { panic!("{frame:?}") };
        assert_eq!(ack.packet_id, id);
        ack.reasons
    }

    async fn subscribe(&mut self, filter: &str, qos: QoS) {
        let options = SubscribeOptions { qos, ..SubscribeOptions::default() };
        assert_eq!(self.subscribe_with(9, &[(filter, options)], None).await, [Reason(qos as u8)]);
    }

    /// The next packet is a PUBLISH; it is acknowledged.
    async fn got(&mut self) -> Got {
        let frame = self.recv().await;
        let Packet::Publish(publish) = self.read(&frame) else { panic!("{:?}", self.read(&frame)) };
        let got = Got {
            topic: publish.topic.to_owned(),
            payload: publish.payload.to_vec(),
            qos: publish.qos,
            retain: publish.retain,
            dup: publish.dup,
            id: publish.packet_id,
            subscription_ids: publish.subscription_ids.clone(),
        };
        match (got.qos, got.id) {
            (AtLeastOnce, Some(id)) => self.send(&Packet::PubAck(Ack::new(id, Reason::SUCCESS))).await,
            (ExactlyOnce, Some(id)) => {
                self.send(&Packet::PubRec(Ack::new(id, Reason::SUCCESS))).await;
                self.expect(Packet::PubRel(Ack::new(id, Reason::SUCCESS))).await;
                self.send(&Packet::PubComp(Ack::new(id, Reason::SUCCESS))).await;
            }
            _ => {}
        }
        got
    }

    async fn got_payload(&mut self) -> String {
        String::from_utf8(self.got().await.payload).unwrap()
    }
}
