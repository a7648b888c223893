//! A recorder on the wire between devices and the edge: it passes every byte on unchanged and notes each PUBLISH and
//! each acknowledgement with its time, before it passes it on. What it noted is the truth the log is judged by.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Result;
use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::lab::now_ms;
use crate::message::{Id, id_of};
use crate::packet::{self, Frame, SeenPublish};

/// What the wire saw of one message.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fate {
    /// When each PUBLISH of it passed.
    pub sent_ms: Vec<i64>,
    /// When its first PUBACK or PUBREC without an error passed: from then on the edge has promised it.
    pub acked_ms: Option<i64>,
    /// An acknowledgement with an error passed.
    pub refused: bool,
    /// PUBLISHes of it after its PUBREL: to the standard (4.3.3) new messages with the same payload, for the receiver may have
    /// forgotten the packet identifier by then. paho-mqtt 2.2 sends them if it has to connect twice after its PUBREL.
    pub begun_anew: usize,
}

/// What the wire saw of one client.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Session {
    pub connected: u32,
    /// Times the edge said it knew no session although it had one before.
    pub forgotten: u32,
    /// Asked for a clean session.
    pub clean: bool,
}

/// Everything seen.
#[derive(Debug, Default)]
pub struct Seen {
    pub fates: BTreeMap<Id, Fate>,
    pub sessions: BTreeMap<String, Session>,
    /// Sequence numbers of each device in the order in which they passed.
    pub order: BTreeMap<u32, Vec<u32>>,
    /// Message of each packet identifier in use, by client.
    outstanding: HashMap<(String, u16), Id>,
    /// Messages whose PUBREL passed since their last PUBLISH.
    released: HashSet<Id>,
    acked: u64,
    published: u64,
    log: Vec<String>,
}

/// The recorder; devices connect to `address`.
#[derive(Clone)]
pub struct Recorder {
    pub address: SocketAddr,
    seen: Arc<Mutex<Seen>>,
    acked: watch::Receiver<u64>,
}

impl Recorder {
    /// Listens on a free port and passes everything on to `upstream`.
    pub async fn start(upstream: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let seen = Arc::new(Mutex::new(Seen::default()));
        let (tell, acked) = watch::channel(0);
        let shared = seen.clone();
        let tell = Arc::new(tell);
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let (seen, tell) = (shared.clone(), tell.clone());
                tokio::spawn(async move {
                    // An edge that is down shows as a closed connection, as it would to the device itself.
                    if let Ok(to_edge) = TcpStream::connect(upstream).await {
                        let _ = relay(socket, to_edge, seen, tell).await;
                    }
                });
            }
        });
        Ok(Self { address, seen, acked })
    }

    pub fn seen(&self) -> MutexGuard<'_, Seen> {
        lock(&self.seen)
    }

    /// Messages acknowledged so far, as they grow.
    pub fn acked(&self) -> watch::Receiver<u64> {
        self.acked.clone()
    }

    /// Writes everything noted, for a person who looks for a failure's cause.
    pub fn write_log(&self, path: &Path) -> Result<()> {
        Ok(std::fs::write(path, self.seen().log.join("\n"))?)
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What both directions of a connection know of it.
#[derive(Default)]
struct Talk {
    client: String,
    v5: bool,
}

async fn relay(
    device: TcpStream,
    edge: TcpStream,
    seen: Arc<Mutex<Seen>>,
    tell: Arc<watch::Sender<u64>>,
) -> Result<()> {
    device.set_nodelay(true)?;
    edge.set_nodelay(true)?;
    let talk = Mutex::new(Talk::default());
    let (mut from_device, mut to_device) = device.into_split();
    let (mut from_edge, mut to_edge) = edge.into_split();
    let up = async {
        let (mut chunk, mut parse) = (vec![0; 64 << 10], BytesMut::new());
        loop {
            let n = from_device.read(&mut chunk).await?;
            if n == 0 {
                break;
            }
            parse.extend_from_slice(&chunk[..n]);
            while let Some(frame) = packet::take_frame(&mut parse) {
                let mut talk = talk.lock().unwrap_or_else(PoisonError::into_inner);
                lock(&seen).note_device(&frame, &mut talk);
            }
            to_edge.write_all(&chunk[..n]).await?;
        }
        to_edge.shutdown().await
    };
    let down = async {
        let (mut chunk, mut parse) = (vec![0; 64 << 10], BytesMut::new());
        loop {
            let n = from_edge.read(&mut chunk).await?;
            if n == 0 {
                break;
            }
            parse.extend_from_slice(&chunk[..n]);
            let mut acked = None;
            while let Some(frame) = packet::take_frame(&mut parse) {
                let talk = talk.lock().unwrap_or_else(PoisonError::into_inner);
                let mut seen = lock(&seen);
                seen.note_edge(&frame, &talk);
                acked = Some(seen.acked);
            }
            to_device.write_all(&chunk[..n]).await?;
            if let Some(acked) = acked {
                tell.send_if_modified(|a| std::mem::replace(a, acked.max(*a)) < acked);
            }
        }
        to_device.shutdown().await
    };
    // A side that fails ends both, like a cable; a side that only finished lets the other finish.
    tokio::try_join!(up, down)?;
    Ok(())
}

impl Seen {
    fn note_device(&mut self, frame: &Frame, talk: &mut Talk) {
        let now = now_ms();
        match frame.kind() {
            packet::CONNECT => {
                if let Some(connect) = packet::read_connect(frame) {
                    self.sessions.entry(connect.client_id.clone()).or_default().clean = connect.clean;
                    self.log
                        .push(format!("{now} {} CONNECT v5={} clean={}", connect.client_id, connect.v5, connect.clean));
                    *talk = Talk { client: connect.client_id, v5: connect.v5 };
                }
            }
            packet::PUBLISH => {
                let Some(publish) = packet::read_publish(frame, talk.v5) else { return };
                let Some(id) = id_of(&publish.payload) else { return };
                self.published += 1;
                let fate = self.fates.entry(id).or_default();
                fate.sent_ms.push(now);
                fate.begun_anew += usize::from(self.released.remove(&id));
                self.order.entry(id.0).or_default().push(id.1);
                if let Some(packet_id) = publish.packet_id {
                    self.outstanding.insert((talk.client.clone(), packet_id), id);
                }
                let SeenPublish { qos, duplicate, packet_id, .. } = publish;
                self.log.push(format!("{now} {} PUBLISH {id:?} q{qos} dup={duplicate} pid={packet_id:?}", talk.client));
            }
            packet::PUBREL => {
                let packet_id = frame.packet_id();
                let id = packet_id.and_then(|id| self.outstanding.get(&(talk.client.clone(), id)).copied());
                self.released.extend(id);
                self.log.push(format!("{now} {} PUBREL {id:?} pid={packet_id:?}", talk.client));
            }
            packet::DISCONNECT => self.log.push(format!("{now} {} DISCONNECT", talk.client)),
            _ => {}
        }
    }

    fn note_edge(&mut self, frame: &Frame, talk: &Talk) {
        let now = now_ms();
        match frame.kind() {
            packet::CONNACK => {
                let (flags, code) = (frame.body.first().copied().unwrap_or(0), frame.body.get(1).copied().unwrap_or(0));
                let session = self.sessions.entry(talk.client.clone()).or_default();
                if code == 0 {
                    session.forgotten += u32::from(session.connected > 0 && flags & 1 == 0 && !session.clean);
                    session.connected += 1;
                }
                self.log.push(format!("{now} {} CONNACK present={} code={code}", talk.client, flags & 1));
            }
            kind @ (packet::PUBACK | packet::PUBREC) => {
                let Some(packet_id) = frame.packet_id() else { return };
                let Some(id) = self.outstanding.get(&(talk.client.clone(), packet_id)).copied() else { return };
                let fate = self.fates.entry(id).or_default();
                if frame.reason() >= 0x80 {
                    fate.refused = true;
                } else if fate.acked_ms.is_none() {
                    fate.acked_ms = Some(now);
                    self.acked += 1;
                }
                let name = if kind == packet::PUBACK { "PUBACK" } else { "PUBREC" };
                self.log.push(format!("{now} {} {name} {id:?} pid={packet_id} reason={}", talk.client, frame.reason()));
            }
            packet::PUBCOMP => self.log.push(format!("{now} {} PUBCOMP {:?}", talk.client, frame.packet_id())),
            packet::DISCONNECT => {
                self.log.push(format!("{now} {} DISCONNECT by edge {:?}", talk.client, frame.body.first()))
            }
            _ => {}
        }
    }

    /// PUBLISH packets that passed, repetitions included.
    pub fn published(&self) -> u64 {
        self.published
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::PublishParts;

    #[test]
    fn a_publish_after_its_pubrel_is_a_new_message_and_one_before_it_is_not() {
        let (mut seen, mut talk) = (Seen::default(), Talk { client: "dev".into(), v5: false });
        let mut pass = |write: &dyn Fn(&mut BytesMut)| {
            let mut bytes = BytesMut::new();
            write(&mut bytes);
            seen.note_device(&packet::take_frame(&mut bytes).unwrap(), &mut talk);
            seen.fates[&(1, 5)].begun_anew
        };
        let publish = |out: &mut BytesMut| {
            let parts = PublishParts {
                topic: "t",
                payload: b"trib/1/5/",
                qos: 2,
                retain: false,
                duplicate: false,
                packet_id: 9,
                user: None,
            };
            packet::publish(out, &parts);
        };
        let release = |out: &mut BytesMut| packet::pubrel(out, 9);
        assert_eq!((pass(&publish), pass(&publish), pass(&release), pass(&release)), (0, 0, 0, 0));
        assert_eq!((pass(&publish), pass(&publish)), (1, 1));
        assert_eq!((pass(&release), pass(&publish)), (1, 2));
    }
}
