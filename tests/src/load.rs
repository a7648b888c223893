//! A load generator for MQTT 3.1.1 brokers, a blocking thread per connection. It writes and reads by the buffer: a system
//! call carries as many packets as the window allows, and an incoming packet costs a look at its header. Otherwise it
//! would measure itself.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytes::{Buf, BytesMut};
use clap::Args;

use crate::packet::{self, PublishParts};

/// What to throw at a broker.
#[derive(Debug, Clone, Args)]
pub struct Load {
    /// The broker.
    pub address: SocketAddr,
    /// 0 or 1.
    #[arg(long, default_value_t = 0)]
    pub qos: u8,
    #[arg(long, default_value_t = 1)]
    pub publishers: usize,
    #[arg(long, default_value_t = 0)]
    pub subscribers: usize,
    /// Messages of each publisher.
    #[arg(long, default_value_t = 100_000)]
    pub messages: u64,
    /// Bytes of a payload.
    #[arg(long, default_value_t = 256)]
    pub size: usize,
    /// QoS 1 messages of a publisher under way.
    #[arg(long, default_value_t = 20)]
    pub window: usize,
    /// Topics are PREFIX/NUMBER of the publisher.
    #[arg(long, default_value = "live")]
    pub topic: String,
    /// Measure latency at this many messages a second instead of throughput.
    #[arg(long)]
    pub rate: Option<u64>,
}

/// How a throughput run went.
#[derive(Debug, Clone, Copy)]
pub struct Throughput {
    /// Until the broker had acknowledged all (QoS 0 without subscribers: had read all, seen by a PINGRESP).
    pub published_per_second: f64,
    /// Until the last subscriber had its last message.
    pub received_per_second: f64,
    pub received: u64,
}

/// Microseconds.
#[derive(Debug, Clone, Copy, Default)]
pub struct Percentiles {
    pub p50: u32,
    pub p99: u32,
}

/// How a latency run went.
#[derive(Debug, Clone, Copy, Default)]
pub struct Latency {
    pub puback: Percentiles,
    pub end_to_end: Percentiles,
}

pub fn throughput(load: &Load) -> Result<Throughput> {
    let expected = load.messages * load.publishers as u64;
    let start = Arc::new(Barrier::new(load.publishers + 1));
    let done = Arc::new(AtomicBool::new(false));
    let mut subscribers = Vec::new();
    for number in 0..load.subscribers {
        let mut link = Blocking::connect(load.address, &format!("load-sub-{number}"))?;
        link.subscribe(&format!("{}/#", load.topic), load.qos)?;
        let done = done.clone();
        subscribers.push(std::thread::spawn(move || subscriber(link, expected, &done)));
    }
    let mut publishers = Vec::new();
    for number in 0..load.publishers {
        let link = Blocking::connect(load.address, &format!("load-pub-{number}"))?;
        let (load, start) = (load.clone(), start.clone());
        publishers.push(std::thread::spawn(move || publisher(link, &load, number, &start)));
    }
    start.wait();
    let began = Instant::now();
    for publisher in publishers {
        join(publisher)?;
    }
    let published = began.elapsed();
    done.store(true, Ordering::Relaxed);
    let (mut received, mut last) = (0, began);
    for subscriber in subscribers {
        let (count, at) = join(subscriber)?;
        received += count;
        last = last.max(at);
    }
    Ok(Throughput {
        published_per_second: expected as f64 / published.as_secs_f64(),
        received_per_second: received as f64 / last.duration_since(began).as_secs_f64().max(1e-9),
        received,
    })
}

fn join<T>(thread: std::thread::JoinHandle<Result<T>>) -> Result<T> {
    thread.join().map_err(|_| anyhow::anyhow!("a load thread panicked"))?
}

fn publisher(mut link: Blocking, load: &Load, number: usize, start: &Barrier) -> Result<()> {
    let topic = format!("{}/{number}", load.topic);
    let mut frame = BytesMut::new();
    let payload = vec![b'x'; load.size];
    let parts = PublishParts {
        topic: &topic,
        payload: &payload,
        qos: load.qos,
        retain: false,
        duplicate: false,
        packet_id: 0,
        user: None,
    };
    packet::publish(&mut frame, &parts);
    let per_buffer = (BUFFER / frame.len()).max(1);
    let id_at = frame.len() - payload.len() - 2;
    start.wait();
    if load.qos == 0 {
        let mut left = load.messages;
        let whole = frame.repeat(per_buffer);
        while left > 0 {
            let n = left.min(per_buffer as u64);
            link.socket.write_all(&whole[..frame.len() * n as usize])?;
            left -= n;
        }
        if load.subscribers > 0 {
            return Ok(()); // The subscriber sees the end, and a bare forwarder need not know PINGREQ.
        }
        let mut ping = BytesMut::new();
        packet::pingreq(&mut ping);
        link.socket.write_all(&ping)?;
        return link.expect(13);
    }
    let (mut sent, mut acked, mut id) = (0_u64, 0_u64, 0_u16);
    let mut out = Vec::with_capacity(BUFFER + frame.len());
    while acked < load.messages {
        let room = (load.window as u64 - (sent - acked)).min(load.messages - sent).min(per_buffer as u64);
        out.clear();
        for _ in 0..room {
            id = id.checked_add(1).unwrap_or(1);
            let at = out.len() + id_at;
            out.extend_from_slice(&frame);
            out[at..at + 2].copy_from_slice(&id.to_be_bytes());
        }
        link.socket.write_all(&out)?;
        sent += room;
        acked += link.pubacks()?;
    }
    Ok(())
}

fn subscriber(mut link: Blocking, expected: u64, done: &AtomicBool) -> Result<(u64, Instant)> {
    let (mut count, mut last) = (0, Instant::now());
    link.socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    let mut acks = BytesMut::new();
    while count < expected {
        let more = link.fill();
        match more {
            Ok(()) => {}
            // Nothing for a while after the publishers ended: the broker dropped the rest, as QoS 0 allows.
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                if done.load(Ordering::Relaxed) {
                    break;
                }
                continue;
            }
            Err(error) => return Err(error.into()),
        }
        while let Some((first, body_at, end)) = header(&link.input) {
            if first >> 4 == packet::PUBLISH {
                count += 1;
                if first & 6 != 0 {
                    let topic = usize::from(u16::from_be_bytes([link.input[body_at], link.input[body_at + 1]]));
                    let id = [link.input[body_at + 2 + topic], link.input[body_at + 3 + topic]];
                    packet::acknowledge(&mut acks, packet::PUBACK, u16::from_be_bytes(id));
                }
            }
            link.input.advance(end);
        }
        last = Instant::now();
        link.socket.write_all(&acks)?;
        acks.clear();
    }
    Ok((count, last))
}

/// One publisher at a steady rate, one subscriber. Each payload begins with the time at which it was due.
pub fn latency(load: &Load, rate: u64, duration: Duration) -> Result<Latency> {
    let base = Instant::now();
    let count = (rate as f64 * duration.as_secs_f64()) as u64;
    let mut subscriber = Blocking::connect(load.address, "load-lat-sub")?;
    subscriber.subscribe(&format!("{}/#", load.topic), load.qos)?;
    let receiving = std::thread::spawn(move || receive_times(subscriber, count, base));
    let mut link = Blocking::connect(load.address, "load-lat-pub")?;
    let acking = Blocking { socket: link.socket.try_clone()?, input: BytesMut::new() };
    let sent_at: Arc<Vec<AtomicU64>> = Arc::new((0..count).map(|_| AtomicU64::new(0)).collect());
    let qos = load.qos;
    let acked = {
        let sent_at = sent_at.clone();
        std::thread::spawn(move || if qos == 0 { Ok(Vec::new()) } else { ack_times(acking, count, base, &sent_at) })
    };
    let topic = format!("{}/0", load.topic);
    let mut out = BytesMut::new();
    let mut payload = vec![0; load.size.max(8)];
    let began = base.elapsed();
    for n in 0..count {
        let due = began + Duration::from_nanos(n * 1_000_000_000 / rate);
        if let Some(early) = due.checked_sub(base.elapsed()) {
            std::thread::sleep(early);
        }
        let now = base.elapsed().as_nanos() as u64;
        sent_at[n as usize].store(now, Ordering::Relaxed);
        payload[..8].copy_from_slice(&now.to_be_bytes());
        out.clear();
        let packet_id = (n % 65_535) as u16 + 1;
        packet::publish(
            &mut out,
            &PublishParts {
                topic: &topic,
                payload: &payload,
                qos,
                retain: false,
                duplicate: false,
                packet_id,
                user: None,
            },
        );
        link.socket.write_all(&out)?;
    }
    Ok(Latency { puback: percentiles(join(acked)?), end_to_end: percentiles(join(receiving)?) })
}

/// One publisher that sends the next message when the last one is acknowledged: the times from PUBLISH to PUBACK.
pub fn round_trips(load: &Load) -> Result<Percentiles> {
    let mut link = Blocking::connect(load.address, "load-trip")?;
    let (topic, payload) = (format!("{}/0", load.topic), vec![b'x'; load.size]);
    let mut frame = BytesMut::new();
    let parts = PublishParts {
        topic: &topic,
        payload: &payload,
        qos: 1,
        retain: false,
        duplicate: false,
        packet_id: 1, // Free again once it is acknowledged.
        user: None,
    };
    packet::publish(&mut frame, &parts);
    let mut times = Vec::with_capacity(load.messages as usize);
    for _ in 0..load.messages {
        let sent = Instant::now();
        link.socket.write_all(&frame)?;
        link.expect(packet::PUBACK)?;
        times.push(sent.elapsed().as_micros() as u32);
    }
    Ok(percentiles(times))
}

fn ack_times(mut link: Blocking, count: u64, base: Instant, sent_at: &[AtomicU64]) -> Result<Vec<u32>> {
    let mut times = Vec::with_capacity(count as usize);
    link.socket.set_read_timeout(Some(Duration::from_secs(60)))?;
    while (times.len() as u64) < count {
        link.fill()?;
        let now = base.elapsed().as_nanos() as u64;
        while let Some((first, _, end)) = header(&link.input) {
            if first >> 4 == packet::PUBACK {
                // Acknowledgements come in the order of the PUBLISHes.
                let sent =
                    sent_at.get(times.len()).context("more acknowledgements than messages")?.load(Ordering::Relaxed);
                times.push(((now - sent) / 1_000) as u32);
            }
            link.input.advance(end);
        }
    }
    Ok(times)
}

fn receive_times(mut link: Blocking, count: u64, base: Instant) -> Result<Vec<u32>> {
    let mut times = Vec::with_capacity(count as usize);
    let mut acks = BytesMut::new();
    link.socket.set_read_timeout(Some(Duration::from_secs(60)))?;
    while (times.len() as u64) < count {
        link.fill()?;
        let now = base.elapsed().as_nanos() as u64;
        while let Some(frame) = packet::take_frame(&mut link.input) {
            let Some(publish) = packet::read_publish(&frame, false).filter(|_| frame.kind() == packet::PUBLISH) else {
                continue;
            };
            let mut payload = publish.payload;
            times.push((now.saturating_sub(payload.get_u64()) / 1_000) as u32);
            if let Some(id) = publish.packet_id {
                packet::acknowledge(&mut acks, packet::PUBACK, id);
            }
        }
        link.socket.write_all(&acks)?;
        acks.clear();
    }
    Ok(times)
}

pub fn percentiles(mut times: Vec<u32>) -> Percentiles {
    times.sort_unstable();
    let at = |share: f64| {
        times.get(((times.len() as f64 * share) as usize).min(times.len().saturating_sub(1))).copied().unwrap_or(0)
    };
    Percentiles { p50: at(0.5), p99: at(0.99) }
}

const BUFFER: usize = 64 << 10;

/// A connection, read and written by the buffer.
struct Blocking {
    socket: TcpStream,
    input: BytesMut,
}

impl Blocking {
    fn connect(address: SocketAddr, client_id: &str) -> Result<Self> {
        let socket = TcpStream::connect(address).with_context(|| format!("connect to {address}"))?;
        socket.set_nodelay(true)?;
        let mut link = Self { socket, input: BytesMut::with_capacity(4 * BUFFER) };
        let mut out = BytesMut::new();
        packet::connect(&mut out, client_id, false, true);
        link.socket.write_all(&out)?;
        link.expect(packet::CONNACK)?;
        Ok(link)
    }

    fn subscribe(&mut self, filter: &str, qos: u8) -> Result<()> {
        let mut out = BytesMut::new();
        packet::subscribe(&mut out, 1, filter, qos, false);
        self.socket.write_all(&out)?;
        self.expect(packet::SUBACK)
    }

    fn fill(&mut self) -> std::io::Result<()> {
        let mut chunk = [0; BUFFER];
        let n = self.socket.read(&mut chunk)?;
        if n == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        self.input.extend_from_slice(&chunk[..n]);
        Ok(())
    }

    /// Reads until a packet of this type has come; others are passed over.
    fn expect(&mut self, kind: u8) -> Result<()> {
        loop {
            while let Some(frame) = packet::take_frame(&mut self.input) {
                match frame.kind() {
                    found if found == kind => return Ok(()),
                    packet::DISCONNECT | 0 => bail!("disconnected"),
                    _ => {}
                }
            }
            self.fill()?;
        }
    }

    /// Waits for bytes and counts the PUBACKs among them.
    fn pubacks(&mut self) -> Result<u64> {
        self.fill()?;
        let mut count = 0;
        while let Some((first, _, end)) = header(&self.input) {
            match first >> 4 {
                packet::PUBACK => count += 1,
                packet::DISCONNECT => bail!("disconnected"),
                _ => {}
            }
            self.input.advance(end);
        }
        Ok(count)
    }
}

/// First byte, where the body begins and where the packet ends, once it is whole.
fn header(input: &[u8]) -> Option<(u8, usize, usize)> {
    let (mut length, mut at) = (0, 1);
    loop {
        let byte = *input.get(at)?;
        length |= usize::from(byte & 0x7f) << (7 * (at - 1));
        at += 1;
        if byte & 0x80 == 0 || at > 4 {
            break;
        }
    }
    (input.len() >= at + length).then_some((input[0], at, at + length))
}

/// The subcommand.
pub fn run(load: &Load) -> Result<()> {
    if let Some(rate) = load.rate {
        let Latency { puback, end_to_end } = latency(load, rate, Duration::from_secs(10))?;
        println!(
            "PUBACK p50 {} us, p99 {} us; end to end p50 {} us, p99 {} us",
            puback.p50, puback.p99, end_to_end.p50, end_to_end.p99
        );
        return Ok(());
    }
    let done = throughput(load)?;
    println!(
        "published {:.0}/s, received {:.0}/s ({} messages)",
        done.published_per_second, done.received_per_second, done.received
    );
    Ok(())
}
