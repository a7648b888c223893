//! A device: publishes its messages in order on a kept session and never gives up, as good firmware does.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;

use crate::message::Message;
use crate::packet::{self, Frame, PublishParts};

/// How a device behaves.
#[derive(Debug, Clone)]
pub struct Settings {
    pub client_id: String,
    pub v5: bool,
    /// QoS 1 and 2 messages under way at once.
    pub window: usize,
    /// Takes the least free packet id, as small firmware does, and not the next one: an id that the edge should have
    /// forgotten is then used again at once.
    pub reuse_ids: bool,
}

/// A message under way.
struct Flight {
    packet_id: u16,
    message: Message,
    /// PUBREC has come: PUBREL is repeated, never the PUBLISH.
    released: bool,
}

/// Publishes `messages` in order, not more than the count in `released` allows, and returns when all of QoS 1 and 2 are
/// through. Over every broken connection it comes back to the same session and repeats what was not answered.
pub async fn run(
    address: SocketAddr,
    settings: Settings,
    messages: Vec<Message>,
    mut released: watch::Receiver<usize>,
) -> Result<()> {
    let mut device = Device { settings, waiting: messages.into(), flights: VecDeque::new(), sent: 0, next_id: 0 };
    loop {
        match device.talk(address, &mut released).await {
            Ok(()) => return Ok(()),
            Err(Broken::Fatal(error)) => return Err(error),
            // The edge is down or the line is cut. A short pause, as any client makes.
            Err(Broken::Line) => tokio::time::sleep(Duration::from_millis(30)).await,
        }
    }
}

enum Broken {
    Line,
    Fatal(anyhow::Error),
}

impl From<std::io::Error> for Broken {
    fn from(_: std::io::Error) -> Self {
        Broken::Line
    }
}

struct Device {
    settings: Settings,
    waiting: VecDeque<Message>,
    flights: VecDeque<Flight>,
    sent: usize,
    next_id: u16,
}

impl Device {
    async fn talk(&mut self, address: SocketAddr, released: &mut watch::Receiver<usize>) -> Result<(), Broken> {
        let mut socket = TcpStream::connect(address).await?;
        socket.set_nodelay(true)?;
        let (mut input, mut output) = (BytesMut::new(), BytesMut::new());
        packet::connect(&mut output, &self.settings.client_id, self.settings.v5, false);
        socket.write_all(&output).await?;
        output.clear();
        let connack = read_frame(&mut socket, &mut input).await?;
        let present = accepted(&connack).map_err(Broken::Fatal)?;
        if !present {
            // No session: what was released is done as far as can be known, the rest is published anew.
            self.flights.retain(|flight| !flight.released);
        }
        for flight in &self.flights {
            if flight.released {
                packet::pubrel(&mut output, flight.packet_id);
            } else {
                put(&mut output, &flight.message, flight.packet_id, present, self.settings.v5);
            }
        }
        loop {
            let limit = *released.borrow_and_update();
            while self.sent < limit && self.flights.len() < self.settings.window {
                let Some(message) = self.waiting.pop_front() else { break };
                self.send(message, &mut output);
            }
            socket.write_all_buf(&mut output).await?;
            if self.waiting.is_empty() && self.flights.is_empty() {
                packet::disconnect(&mut output);
                socket.write_all(&output).await?;
                return Ok(socket.shutdown().await?);
            }
            let may_send_more = self.flights.len() < self.settings.window && !self.waiting.is_empty();
            tokio::select! {
                frame = read_frame(&mut socket, &mut input) => self.answer(&frame?, &mut output).map_err(Broken::Fatal)?,
                changed = released.changed(), if may_send_more => {
                    changed.map_err(|_| Broken::Fatal(anyhow::anyhow!("the test ended before its devices")))?;
                }
            }
            while let Some(frame) = packet::take_frame(&mut input) {
                self.answer(&frame, &mut output).map_err(Broken::Fatal)?;
            }
        }
    }

    fn send(&mut self, message: Message, output: &mut BytesMut) {
        self.sent += 1;
        if message.qos == 0 {
            put(output, &message, 0, false, self.settings.v5);
            return;
        }
        if self.settings.reuse_ids {
            self.next_id = 0;
        }
        loop {
            self.next_id = self.next_id.checked_add(1).unwrap_or(1);
            if !self.flights.iter().any(|f| f.packet_id == self.next_id) {
                break;
            }
        }
        put(output, &message, self.next_id, false, self.settings.v5);
        self.flights.push_back(Flight { packet_id: self.next_id, message, released: false });
    }

    fn answer(&mut self, frame: &Frame, output: &mut BytesMut) -> Result<()> {
        let kind = frame.kind();
        if kind == packet::DISCONNECT || kind == 13 {
            return Ok(()); // The end of the stream follows; PINGRESP means nothing here.
        }
        let packet_id = frame.packet_id().context("an acknowledgement without packet identifier")?;
        // 0x92, the edge does not know the identifier any more: this PUBREL was a repetition, its PUBCOMP got lost (MQTT 5 §4.3.3).
        if frame.reason() >= 0x80 && !(kind == packet::PUBCOMP && frame.reason() == 0x92) {
            bail!("{}: packet type {kind} refused with reason {:#x}", self.settings.client_id, frame.reason());
        }
        let position = self.flights.iter().position(|f| f.packet_id == packet_id);
        let Some(position) = position else {
            // An answer that was on its way when the line broke: its flight has ended since.
            return Ok(());
        };
        let qos = self.flights[position].message.qos;
        match (kind, qos) {
            (packet::PUBACK, 1) | (packet::PUBCOMP, 2) => {
                self.flights.remove(position);
            }
            (packet::PUBREC, 2) => {
                self.flights[position].released = true;
                packet::pubrel(output, packet_id);
            }
            _ => bail!("{}: packet type {kind} answers a PUBLISH of QoS {qos}", self.settings.client_id),
        }
        Ok(())
    }
}

fn put(output: &mut BytesMut, message: &Message, packet_id: u16, duplicate: bool, v5: bool) {
    let parts = PublishParts {
        topic: &message.topic,
        payload: &message.payload,
        qos: message.qos,
        retain: false,
        duplicate,
        packet_id,
        user: v5.then_some(message.user.as_slice()),
    };
    packet::publish(output, &parts);
}

async fn read_frame(socket: &mut TcpStream, input: &mut BytesMut) -> std::io::Result<Frame> {
    loop {
        if let Some(frame) = packet::take_frame(input) {
            return Ok(frame);
        }
        if socket.read_buf(input).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
}

/// Reads a CONNACK: whether the session was there.
fn accepted(frame: &Frame) -> Result<bool> {
    if frame.kind() != packet::CONNACK || frame.body.len() < 2 {
        bail!("no CONNACK but packet type {}", frame.kind());
    }
    if frame.body[1] != 0 {
        bail!("CONNECT refused with code {:#x}", frame.body[1]);
    }
    Ok(frame.body[0] & 1 == 1)
}

/// A connection for tests that look at single packets.
pub struct Link {
    socket: TcpStream,
    input: BytesMut,
    v5: bool,
}

impl Link {
    pub async fn connect(address: SocketAddr, client_id: &str, v5: bool, clean: bool) -> Result<Self> {
        let mut socket = TcpStream::connect(address).await?;
        socket.set_nodelay(true)?;
        let mut output = BytesMut::new();
        packet::connect(&mut output, client_id, v5, clean);
        socket.write_all(&output).await?;
        let mut input = BytesMut::new();
        let connack = soon(read_frame(&mut socket, &mut input)).await?;
        accepted(&connack)?;
        Ok(Self { socket, input, v5 })
    }

    pub async fn write(&mut self, build: impl FnOnce(&mut BytesMut)) -> Result<()> {
        let mut output = BytesMut::new();
        build(&mut output);
        Ok(self.socket.write_all(&output).await?)
    }

    pub async fn read(&mut self) -> Result<Frame> {
        soon(read_frame(&mut self.socket, &mut self.input)).await
    }

    /// Publishes at QoS 1 and waits for the acknowledgement.
    pub async fn publish(&mut self, topic: &str, payload: &[u8]) -> Result<()> {
        let user = self.v5.then_some(&[][..]);
        let parts = PublishParts { topic, payload, qos: 1, retain: false, duplicate: false, packet_id: 1, user };
        self.write(|out| packet::publish(out, &parts)).await?;
        let frame = self.read().await?;
        if frame.kind() != packet::PUBACK || frame.reason() >= 0x80 {
            bail!("packet type {} reason {:#x} instead of PUBACK", frame.kind(), frame.reason());
        }
        Ok(())
    }
}

async fn soon<T>(read: impl Future<Output = std::io::Result<T>>) -> Result<T> {
    Ok(tokio::time::timeout(crate::lab::PATIENCE, read).await.context("the edge is silent")??)
}
