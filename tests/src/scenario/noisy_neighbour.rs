//! Clients that keep to the standard and take all they can get, one kind after the other, beside a device and a reader
//! that do nothing wrong. What is judged is counted: every message of the device is acknowledged and reaches the
//! reader, in order; newcomers are served; the edge stays below its bounds of memory, descriptors and log lines.
//!
//! `NEIGHBOURS=name,name` runs only the kinds that are named.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::{BufMut, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};

use super::Context;
use crate::admin;
use crate::device::Link;
use crate::lab::{Lab, Rng, until};
use crate::load::percentiles;
use crate::packet::{self, Frame, PublishParts, put_packet, put_text, put_varint};
use crate::process::Broker;

/// What the edge may take at its height: one and a half times the budget of `mqtt.memory_bytes`, and what it takes without
/// clients.
const RESIDENT_MIB_MAX: u64 = 64 * 3 / 2 + 40;
/// Log lines that one kind may cause, however often it does what it does.
const LOG_LINES_MAX: usize = 50;
/// Descriptors that a connection may take, and what may be open beside connections when all are gone.
const SPARE_DESCRIPTORS: usize = 16;
/// Sessions that the edge keeps in the fast tier.
const SESSIONS: usize = 2_000;
/// Acknowledgements that the device gets while the hostile client has all it could take.
const ACKS_BESIDE: u64 = 25;
/// A hostile client that got nothing done for so long is held back, which is an answer.
const HELD_BACK: Duration = Duration::from_secs(2);
/// How long an innocent client waits before it counts as stopped.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// A client that takes all it can get. Returns what it goes on with.
type Attack = for<'a> fn(&'a Arena) -> Pin<Box<dyn Future<Output = Result<Grip>> + Send + 'a>>;

/// Connections that stay open, and lanes that go on, until this is dropped.
#[derive(Default)]
struct Grip {
    #[expect(dead_code, reason = "held for its connections")]
    open: Vec<Hostile>,
    lanes: JoinSet<()>,
}

impl From<Vec<Hostile>> for Grip {
    fn from(open: Vec<Hostile>) -> Self {
        Self { open, lanes: JoinSet::new() }
    }
}

struct Neighbour {
    name: &'static str,
    attack: Attack,
    /// How many descriptors the edge may have; empty: what the machine gives.
    descriptors: &'static [u32],
}

macro_rules! neighbours {
    ($($name:ident $(with $descriptors:literal descriptors)?,)*) => {
        const NEIGHBOURS: &[Neighbour] = &[$(Neighbour {
            name: stringify!($name),
            attack: |arena| Box::pin($name(arena)),
            descriptors: &[$($descriptors)?],
        },)*];
    };
}

neighbours! {
    client_of_another_server,
    huge_filters_in_one_kept_session,
    many_kept_sessions_of_large_filters,
    repeated_wildcards_over_retained_messages,
    client_ids_without_end,
    wills_of_a_megabyte,
    wills_delayed_for_ever,
    subscribers_that_do_not_read,
    topic_aliases_at_their_maximum,
    filters_of_a_hundred_levels,
    filters_that_all_match_one_topic,
    unsubscribes_without_end,
    reader_of_everything_beside_retain_publishers,
    subscribing_again_and_again_without_reading,
    silent_connections with 1024 descriptors,
    dripping_connects with 1024 descriptors,
    silent_connections_to_the_admin_port with 1024 descriptors,
    packets_that_never_end,
    packet_ids_never_released,
    acknowledgements_never_sent,
    retained_messages_without_end,
    retained_topics_of_a_hundred_levels,
    queues_of_absent_sessions,
    user_properties_without_end,
    connects_and_disconnects,
    one_client_id_for_all,
    pings_without_reading,
    small_messages_to_many_readers,
    malformed_bytes,
}

pub async fn one_hostile_client_of_each_kind_stops_nobody(context: &Context) -> Result<String> {
    let wanted = std::env::var("NEIGHBOURS").unwrap_or_default();
    let wanted: Vec<&str> = wanted.split(',').filter(|name| !name.is_empty()).collect();
    let mut failed = Vec::new();
    let mut count = 0;
    let mut highest = 0;
    // What the innocent have when the machine is busy with something else; the first kind shows it.
    let mut quiet = 0;
    for (n, neighbour) in NEIGHBOURS.iter().enumerate() {
        let calibrates = context.full && n == 0;
        if !calibrates && !wanted.is_empty() && !wanted.iter().any(|name| neighbour.name.contains(name)) {
            continue;
        }
        count += 1;
        let began = Instant::now();
        match beside(context, neighbour, quiet).await {
            Ok(figures) => {
                highest = highest.max(figures.resident_mib);
                if calibrates {
                    quiet = figures.p99;
                }
                println!("        {} ({:.1} s): {figures:?}", neighbour.name, began.elapsed().as_secs_f32());
            }
            Err(error) => {
                println!("        {} FAILED ({:.1} s): {error:#}", neighbour.name, began.elapsed().as_secs_f32());
                failed.push(neighbour.name);
            }
        }
    }
    ensure!(failed.is_empty(), "the innocent were hurt by {}", failed.join(", "));
    Ok(format!("{count} kinds, at most {highest} MiB"))
}

/// What one kind cost.
#[derive(Debug)]
struct Figures {
    #[expect(dead_code, reason = "shown")]
    acked: u64,
    /// How many of the device's messages were acknowledged when the hostile client went.
    times_beside: usize,
    resident_mib: u64,
    /// Of the device's acknowledgements while the hostile client was there, in microseconds; 0 where it is not looked at.
    p99: u32,
    #[expect(dead_code, reason = "shown")]
    descriptors: usize,
    #[expect(dead_code, reason = "shown")]
    log_lines: usize,
}

/// What a hostile client knows.
struct Arena {
    edge: SocketAddr,
    admin: SocketAddr,
    pid: u32,
    full: bool,
    seed: u64,
}

/// `quiet_at_least`: microseconds that the 99th percentile of the innocent may be at, thrice, whatever it was before.
async fn beside(context: &Context, neighbour: &Neighbour, quiet_at_least: u32) -> Result<Figures> {
    let mut lab = context.lab(&format!("noisy-{}", neighbour.name))?;
    if !context.full {
        lab.edge.mqtt_extra = format!("sessions_max = {SESSIONS}");
    }
    let mut edge = lab.edge()?;
    if let [descriptors] = neighbour.descriptors {
        edge.wrapper = vec!["prlimit".into(), format!("--nofile={descriptors}:{descriptors}")];
    }
    edge.start().await?;
    let pid = edge.pid().context("a process")?;
    let arena = Arena { edge: lab.edge.mqtt, admin: lab.edge.admin, pid, full: context.full, seed: context.seed };
    let innocent = Innocent::start(lab.edge.mqtt).await?;
    innocent.is_served(if context.full { 500 } else { ACKS_BESIDE }).await.context("before anybody was hostile")?;
    let quiet = innocent.times_so_far();
    let (lines, descriptors) = (edge.log_text().lines().count(), open_descriptors(pid)?);
    let judged = judge(context, neighbour, &arena, &lab, &mut edge, &innocent).await;
    let acked = innocent.finish().await;
    let mut figures = match judged {
        Ok(figures) => figures,
        Err(error) => {
            // What became of the innocent says more than that something else went wrong.
            if let Err(stopped) = acked {
                return Err(error.context(format!("{stopped:#}")));
            }
            return Err(error);
        }
    };
    let acked = acked?;
    until("descriptors to be given back", SILENCE_MAX, async || {
        let left = open_descriptors(pid)?;
        Ok((left <= descriptors + SPARE_DESCRIPTORS).then_some(()))
    })
    .await?;
    let log_lines = edge.log_text().lines().count() - lines;
    ensure!(
        log_lines <= LOG_LINES_MAX,
        "{log_lines} log lines, at most {LOG_LINES_MAX} are in order: {}",
        edge.log.display()
    );
    ensure!(!edge.log_text().contains("panicked"), "it panicked; see {}", edge.log.display());
    if context.full {
        let part = |from, to| acked.times.get(from..to).unwrap_or_default().to_vec();
        let beside = part(quiet.len(), figures.times_beside);
        // What a client leaves behind when it goes is also its doing.
        let after = part(figures.times_beside, acked.times.len());
        let longest = beside.iter().chain(&after).max().copied().unwrap_or(0);
        let (quiet, beside, after) = (p99(&quiet).max(quiet_at_least), p99(&beside), p99(&after));
        let name = neighbour.name;
        println!(
            "        {name}: p99 of the innocent {beside} us, quiet {quiet} us, after it {after} us, longest {longest} us"
        );
        figures.p99 = beside;
        let beside = beside.max(after);
        // What the tests build is not optimised, and takes several times as long for a packet.
        let optimised = context.edge.program.is_some();
        let judged = optimised && quiet_at_least > 0;
        ensure!(!judged || beside <= 3 * quiet, "p99 of the innocent: {beside} us, quiet {quiet} us");
    }
    edge.stop().await?;
    Ok(Figures { acked: acked.count, log_lines, ..figures })
}

/// Of the messages that a device would have sent every half millisecond: whoever waits for an acknowledgement before the
/// next message sends few while it takes long, and those few would hide it.
fn p99(times: &[u32]) -> u32 {
    percentiles(times.iter().flat_map(|&time| (0..=time).rev().step_by(500)).collect()).p99
}

async fn judge(
    context: &Context,
    neighbour: &Neighbour,
    arena: &Arena,
    lab: &Lab,
    edge: &mut Broker,
    innocent: &Innocent,
) -> Result<Figures> {
    let hostile = Elsewhere::begin(neighbour.attack, arena).await.context("the hostile client itself")?;
    let beside = if context.full { 500 } else { ACKS_BESIDE };
    innocent.is_served(beside).await.context("beside the hostile client")?;
    until("/readyz to be answered with 200", SILENCE_MAX, async || {
        Ok(admin::is_ready(lab.edge.admin).await.then_some(()))
    })
    .await?;
    newcomer(lab.edge.mqtt).await.context("a newcomer beside the hostile client")?;
    if let Some(status) = edge.exited()? {
        bail!("the edge ended with {status}; see {}", edge.log.display());
    }
    let descriptors = open_descriptors(arena.pid)?;
    hostile.end()?;
    let times_beside = innocent.times_so_far().len();
    innocent.is_served(beside).await.context("after the hostile client")?;
    let resident_mib = status_kib(arena.pid, "VmHWM")? / 1024;
    ensure!(resident_mib <= RESIDENT_MIB_MAX, "{resident_mib} MiB resident, at most {RESIDENT_MIB_MAX} are in order");
    Ok(Figures { acked: 0, times_beside, resident_mib, p99: 0, descriptors, log_lines: 0 })
}

/// A hostile client on a thread of its own. In the full tier, where times are shown, the thread gets the processor time that
/// nobody else wants: in a plant the client has a machine of its own, and what it takes to be hostile slows nobody down.
struct Elsewhere {
    stop: oneshot::Sender<()>,
    thread: std::thread::JoinHandle<()>,
}

impl Elsewhere {
    /// Returns when the client has all it could get.
    async fn begin(attack: Attack, arena: &Arena) -> Result<Self> {
        let arena = Arena { ..*arena };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = oneshot::channel::<()>();
        let (report, reported) = oneshot::channel();
        let thread = std::thread::Builder::new().name("hostile".to_owned()).spawn(move || {
            let attacked = async {
                if arena.full {
                    when_idle()?;
                }
                attack(&arena).await
            };
            runtime.block_on(async {
                let (grip, outcome) = match attacked.await {
                    Ok(grip) => (Some(grip), Ok(())),
                    Err(error) => (None, Err(error)),
                };
                // The other end may have given up.
                let _ = report.send(outcome);
                let _ = stopped.await;
                drop(grip);
            });
        })?;
        reported.await.context("the hostile thread")??;
        Ok(Self { stop, thread })
    }

    /// Closes its connections.
    fn end(self) -> Result<()> {
        drop(self.stop);
        self.thread.join().map_err(|_| anyhow::anyhow!("the hostile thread panicked"))
    }
}

/// This thread runs when no other wants to.
fn when_idle() -> Result<()> {
    let thread = std::fs::read_link("/proc/thread-self")?;
    let id = thread.file_name().context("a thread id")?;
    let status = std::process::Command::new("chrt").args(["--idle", "--pid", "0"]).arg(id).status().context("chrt")?;
    ensure!(status.success(), "chrt ended with {status}");
    Ok(())
}

fn open_descriptors(pid: u32) -> Result<usize> {
    Ok(std::fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}

/// A figure of `/proc/pid/status` in KiB.
fn status_kib(pid: u32, name: &str) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find(|line| line.starts_with(name)).with_context(|| format!("{name} of process {pid}"))?;
    let digits: String = line.chars().filter(char::is_ascii_digit).collect();
    Ok(digits.parse()?)
}

/// Processor time that the edge has used, in ticks of the system.
fn processor_ticks(pid: u32) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // Behind the program's name, which is in brackets: state, then 10 fields, then user and system time.
    let fields: Vec<&str> = text.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok());
    ticks(11).zip(ticks(12)).map(|(user, system)| user + system).context("/proc/pid/stat")
}

/// Connects, publishes and reads what was published, as anybody may who comes now. Refusals are taken for "come again".
async fn newcomer(edge: SocketAddr) -> Result<()> {
    until("a newcomer to be served", SILENCE_MAX, async || {
        let serve = async {
            let mut link = Link::connect(edge, "newcomer", true, true).await?;
            link.write(|out| packet::subscribe(out, 7, "newcomer/+", 0, true)).await?;
            ensure!(link.read().await?.kind() == packet::SUBACK, "a SUBACK was due");
            link.publish("factory/newcomer/telemetry/t", b"hello").await?;
            let parts = PublishParts {
                topic: "newcomer/here",
                payload: b"hello",
                qos: 0,
                retain: false,
                duplicate: false,
                packet_id: 0,
                user: Some(&[]),
            };
            link.write(|out| packet::publish(out, &parts)).await?;
            ensure!(link.read().await?.kind() == packet::PUBLISH, "its own message was due");
            anyhow::Ok(())
        };
        tokio::time::timeout(SILENCE_MAX, serve).await.context("a newcomer gets no answer")?.map(Some)
    })
    .await
}

/// A device that publishes numbers one after the other at QoS 1, and a reader that wants them all.
struct Innocent {
    acked: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    times: Arc<std::sync::Mutex<Vec<u32>>>,
    device: JoinHandle<Result<u64>>,
    reader: JoinHandle<Result<u64>>,
}

struct Acked {
    count: u64,
    times: Vec<u32>,
}

const LAST: &[u8] = b"the last one";

impl Innocent {
    async fn start(edge: SocketAddr) -> Result<Self> {
        let mut reader = Link::connect(edge, "innocent-reader", true, true).await?;
        reader.write(|out| packet::subscribe(out, 1, "factory/innocent/telemetry/#", 1, true)).await?;
        ensure!(reader.read().await?.kind() == packet::SUBACK, "a SUBACK was due");
        let mut device = Link::connect(edge, "innocent-device", false, false).await?;
        let (acked, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let times = Arc::new(std::sync::Mutex::new(Vec::new()));
        let publishing = {
            let (acked, stop, times) = (acked.clone(), stop.clone(), times.clone());
            async move {
                let topic = "factory/innocent/telemetry/t";
                while !stop.load(Ordering::Relaxed) {
                    let number = acked.load(Ordering::Relaxed);
                    let sent = Instant::now();
                    soon(device.publish(topic, number.to_string().as_bytes()))
                        .await
                        .with_context(|| format!("the device's message {number} is not acknowledged"))?;
                    times.lock().map_err(|_| anyhow::anyhow!("a lock"))?.push(sent.elapsed().as_micros() as u32);
                    acked.store(number + 1, Ordering::Relaxed);
                }
                soon(device.publish(topic, LAST)).await.context("the device's last message is not acknowledged")?;
                Ok(acked.load(Ordering::Relaxed))
            }
        };
        let reading = async move {
            let mut next = 0_u64;
            loop {
                let frame =
                    soon(reader.read()).await.with_context(|| format!("the reader waits for message {next}"))?;
                ensure!(frame.kind() == packet::PUBLISH, "packet type {} for the reader", frame.kind());
                let seen = packet::read_publish(&frame, true).context("a PUBLISH")?;
                if let Some(id) = seen.packet_id {
                    reader.write(|out| packet::acknowledge(out, packet::PUBACK, id)).await?;
                }
                if &seen.payload[..] == LAST {
                    return Ok(next);
                }
                let number = std::str::from_utf8(&seen.payload)?;
                ensure!(number == next.to_string(), "the reader got message {number} where {next} was due");
                next += 1;
            }
        };
        Ok(Self { acked, stop, times, device: tokio::spawn(publishing), reader: tokio::spawn(reading) })
    }

    /// Waits until so many more of the device's messages are acknowledged.
    async fn is_served(&self, count: u64) -> Result<()> {
        let wanted = self.acked.load(Ordering::Relaxed) + count;
        until("the innocent to be served", SILENCE_MAX, async || {
            ensure!(!self.device.is_finished(), "the innocent device was stopped");
            ensure!(!self.reader.is_finished(), "the innocent reader was stopped");
            Ok((self.acked.load(Ordering::Relaxed) >= wanted).then_some(()))
        })
        .await
    }

    fn times_so_far(&self) -> Vec<u32> {
        self.times.lock().map(|times| times.clone()).unwrap_or_default()
    }

    /// Publishes a last message, and wants the reader to have all.
    async fn finish(self) -> Result<Acked> {
        self.stop.store(true, Ordering::Relaxed);
        let count = self.device.await??;
        let read = self.reader.await??;
        ensure!(read == count, "{count} messages were acknowledged, {read} were read");
        let times = self.times.lock().map(|times| times.clone()).unwrap_or_default();
        Ok(Acked { count, times })
    }
}

async fn soon<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::time::timeout(SILENCE_MAX, work).await.context("the edge is silent")?
}

/// One connection of a hostile client.
struct Hostile {
    socket: TcpStream,
    input: BytesMut,
}

/// What a hostile CONNECT says.
#[derive(Clone, Default)]
struct Hello {
    id: String,
    v5: bool,
    kept: bool,
    keep_alive: u16,
    /// Properties of MQTT 5, without their length.
    properties: Vec<u8>,
    /// Topic, properties of MQTT 5, payload.
    will: Option<(String, Vec<u8>, Vec<u8>)>,
}

impl Hello {
    fn v4(id: impl Into<String>) -> Self {
        Self { id: id.into(), ..Self::default() }
    }

    fn v5(id: impl Into<String>) -> Self {
        Self { v5: true, ..Self::v4(id) }
    }

    fn kept(self) -> Self {
        Self { kept: true, ..self }
    }

    fn bytes(&self) -> BytesMut {
        let mut body = BytesMut::new();
        put_text(&mut body, "MQTT");
        body.put_u8(if self.v5 { 5 } else { 4 });
        body.put_u8(if self.kept { 0 } else { 2 } | if self.will.is_some() { 4 } else { 0 });
        body.put_u16(self.keep_alive);
        if self.v5 {
            let mut properties = self.properties.clone();
            if self.kept {
                properties.extend_from_slice(&[0x11, 0xff, 0xff, 0xff, 0xff]);
            }
            put_varint(&mut body, properties.len());
            body.put_slice(&properties);
        }
        put_text(&mut body, &self.id);
        if let Some((topic, properties, payload)) = &self.will {
            if self.v5 {
                put_varint(&mut body, properties.len());
                body.put_slice(properties);
            }
            put_text(&mut body, topic);
            body.put_u16(payload.len() as u16);
            body.put_slice(payload);
        }
        packed(packet::CONNECT << 4, &body)
    }
}

impl Hostile {
    /// A connection that says nothing yet; `None` if the edge does not take it.
    async fn knock(arena: &Arena) -> Option<Self> {
        let socket = tokio::time::timeout(HELD_BACK, TcpStream::connect(arena.edge)).await.ok()?.ok()?;
        Some(Self { socket, input: BytesMut::new() })
    }

    /// A connection that the edge accepted; `None` if it was refused.
    async fn connect(arena: &Arena, hello: &Hello) -> Result<Option<Self>> {
        let Some(mut hostile) = Self::knock(arena).await else { return Ok(None) };
        if !hostile.offer(&hello.bytes()).await {
            return Ok(None);
        }
        let connack = hostile.answer(packet::CONNACK).await?;
        Ok(connack.filter(|frame| frame.body.get(1) == Some(&0)).map(|_| hostile))
    }

    /// Writes as far as the edge takes it, reading what the edge says meanwhile. False: it hung up or holds back.
    async fn offer(&mut self, bytes: &[u8]) -> bool {
        let (mut read, mut write) = self.socket.split();
        let mut at = 0;
        while let Some(rest) = bytes.get(at..).filter(|rest| !rest.is_empty()) {
            let progress = async {
                tokio::select! {
                    written = write.write(rest) => written.map(|n| (n, 1)),
                    heard = read.read_buf(&mut self.input) => heard.map(|n| (0, n)),
                }
            };
            match tokio::time::timeout(HELD_BACK, progress).await {
                Ok(Ok((written, heard))) if heard > 0 => at += written,
                _ => return false,
            }
            // Only what `answer` has not taken yet is of interest, and never much of it.
            if self.input.len() > 1 << 20 {
                self.input.clear();
            }
        }
        true
    }

    /// Writes without reading anything.
    async fn shout(&mut self, bytes: &[u8]) -> bool {
        matches!(tokio::time::timeout(HELD_BACK, self.socket.write_all(bytes)).await, Ok(Ok(())))
    }

    /// Reads until a packet of this type has come; `None` if the edge hung up.
    async fn answer(&mut self, kind: u8) -> Result<Option<Frame>> {
        let reading = async {
            loop {
                while let Some(frame) = packet::take_frame(&mut self.input) {
                    if frame.kind() == kind {
                        return Some(frame);
                    }
                }
                if !matches!(self.socket.read_buf(&mut self.input).await, Ok(n) if n > 0) {
                    return None;
                }
            }
        };
        tokio::time::timeout(SILENCE_MAX, reading)
            .await
            .with_context(|| format!("no packet of type {kind} for a hostile client"))
    }
}

fn packed(first: u8, body: &[u8]) -> BytesMut {
    let mut out = BytesMut::with_capacity(body.len() + 5);
    put_packet(&mut out, first, body);
    out
}

/// SUBSCRIBE of 3.1.1 to many filters at QoS `qos`.
fn subscribe<'a>(filters: impl IntoIterator<Item = &'a str>, qos: u8) -> BytesMut {
    let mut body = BytesMut::new();
    body.put_u16(1);
    for filter in filters {
        put_text(&mut body, filter);
        body.put_u8(qos);
    }
    packed(0x82, &body)
}

/// PUBLISH of 3.1.1; `packet_id` 0 means QoS 0.
fn publish(topic: &str, payload: &[u8], qos: u8, packet_id: u16, retain: bool) -> BytesMut {
    let mut out = BytesMut::new();
    packet::publish(&mut out, &PublishParts { topic, payload, qos, retain, duplicate: false, packet_id, user: None });
    out
}

/// User properties of MQTT 5 of about so many bytes.
fn user_properties(bytes: usize) -> Vec<u8> {
    let mut out = BytesMut::new();
    while out.len() + 60_010 <= bytes {
        out.put_u8(0x26);
        put_text(&mut out, "k");
        put_text(&mut out, &"v".repeat(60_000));
    }
    out.to_vec()
}

/// Connects so many clients, a few at a time, and keeps those that were taken.
async fn crowd(arena: &Arena, count: usize, hello: impl Fn(usize) -> Hello) -> Result<Vec<Hostile>> {
    let mut open = Vec::with_capacity(count);
    for n in 0..count {
        open.extend(Hostile::connect(arena, &hello(n)).await?);
    }
    Ok(open)
}

/// Takes what the machine has, and nothing of the edge.
async fn client_of_another_server(arena: &Arena) -> Result<Grip> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let mut client = std::net::TcpStream::connect(listener.local_addr()?)?;
    let (mut server, _) = listener.accept()?;
    let reads = std::thread::spawn(move || std::io::copy(&mut server, &mut std::io::sink()));
    let until = Instant::now() + Duration::from_millis(if arena.full { 2_000 } else { 100 });
    while Instant::now() < until {
        std::io::Write::write_all(&mut client, &[b'x'; 60_000])?;
    }
    drop(client);
    reads.join().map_err(|_| anyhow::anyhow!("the other server panicked"))??;
    Ok(Grip::default())
}

async fn huge_filters_in_one_kept_session(arena: &Arena) -> Result<Grip> {
    let Some(mut hostile) = Hostile::connect(arena, &Hello::v4("hog").kept()).await? else {
        return Ok(Grip::default());
    };
    for n in 0..480 {
        let filter = format!("{n}/{}", "x".repeat(60_000));
        if !hostile.offer(&subscribe([&*filter], 1)).await {
            break;
        }
    }
    Ok(vec![hostile].into())
}

async fn many_kept_sessions_of_large_filters(arena: &Arena) -> Result<Grip> {
    let mut open = crowd(arena, 45, |n| Hello::v4(format!("hog-{n}")).kept()).await?;
    let mut refused = 0;
    for (client, hostile) in open.iter_mut().enumerate() {
        for part in 0..2 {
            let filters: Vec<String> =
                (0..15).map(|n| format!("{client}/{part}/{n}/{}/+", "x".repeat(60_000))).collect();
            let offered = hostile.offer(&subscribe(filters.iter().map(String::as_str), 1)).await;
            let suback = if offered { hostile.answer(packet::SUBACK).await? } else { None };
            refused += usize::from(suback.is_none_or(|frame| frame.body.last() == Some(&0x80)));
        }
        // The edge has said no often enough.
        if refused >= 8 {
            break;
        }
    }
    // Absent, they are kept all the same.
    Ok(Grip::default())
}

/// Publishes retained messages `PREFIX/0`, `PREFIX/1`, ... of `bytes` each as far as the edge takes them.
async fn retain(arena: &Arena, prefix: &str, count: usize, bytes: usize) -> Result<Option<Hostile>> {
    let Some(mut hostile) = Hostile::connect(arena, &Hello::v4(format!("retains-{prefix}"))).await? else {
        return Ok(None);
    };
    let payload = vec![b'r'; bytes];
    for n in 0..count {
        if !hostile.offer(&publish(&format!("{prefix}/{n}"), &payload, 0, 0, true)).await {
            return Ok(None);
        }
    }
    if hostile.offer(&[0xc0, 0]).await {
        hostile.answer(13).await?;
    }
    Ok(Some(hostile))
}

/// The work that one SUBSCRIBE may order is less than what it took to publish what it asks for.
async fn repeated_wildcards_over_retained_messages(arena: &Arena) -> Result<Grip> {
    let count = if arena.full { 20_000 } else { 6_000 };
    let before = processor_ticks(arena.pid)?;
    let publisher = retain(arena, "shelf", count, 16).await?;
    let published = processor_ticks(arena.pid)?;
    let Some(mut hostile) = Hostile::connect(arena, &Hello::v4("asks")).await? else { return Ok(Grip::default()) };
    // It matches nothing, so that all of the work is the search.
    if hostile.offer(&subscribe(std::iter::repeat_n("+/x", count), 0)).await {
        hostile.answer(packet::SUBACK).await?;
    }
    let (storing, searching) = (published - before, processor_ticks(arena.pid)? - published);
    ensure!(
        searching <= storing,
        "a SUBSCRIBE of {count} filters took {searching} ticks, publishing {count} messages {storing}"
    );
    Ok([Some(hostile), publisher].into_iter().flatten().collect::<Vec<_>>().into())
}

/// Each comes once with clean session 0 and leaves for ever.
async fn client_ids_without_end(arena: &Arena) -> Result<Grip> {
    let mut tasks = JoinSet::new();
    for lane in 0..32_usize {
        let arena = Arena { ..*arena };
        tasks.spawn(async move {
            for n in (lane..if arena.full { 21_000 } else { SESSIONS + 200 }).step_by(32) {
                Hostile::connect(&arena, &Hello::v4(format!("once-{n}")).kept()).await?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    Ok(Grip::default())
}

async fn wills_of_a_megabyte(arena: &Arena) -> Result<Grip> {
    let properties = user_properties(960_000);
    let will = Some(("noise/will".to_owned(), properties, vec![b'w'; 60_000]));
    Ok(crowd(arena, 400, |n| Hello { will: will.clone(), ..Hello::v5(format!("dying-{n}")) }).await?.into())
}

/// The clients are gone; their wills are due in 136 years.
async fn wills_delayed_for_ever(arena: &Arena) -> Result<Grip> {
    let mut properties = vec![0x18, 0xff, 0xff, 0xff, 0xff];
    properties.extend(user_properties(480_000));
    let will = Some(("noise/will".to_owned(), properties, vec![b'w'; 60_000]));
    drop(crowd(arena, 400, |n| Hello { will: will.clone(), ..Hello::v5(format!("delayed-{n}")).kept() }).await?);
    Ok(Grip::default())
}

async fn subscribers_that_do_not_read(arena: &Arena) -> Result<Grip> {
    let mut open = crowd(arena, 300, |n| Hello::v4(format!("deaf-{n}"))).await?;
    for hostile in &mut open {
        hostile.offer(&subscribe(["noise/#"], 1)).await;
        hostile.answer(packet::SUBACK).await?;
    }
    let Some(mut loud) = Hostile::connect(arena, &Hello::v4("loud")).await? else { return Ok(open.into()) };
    let payload = vec![b'n'; 100_000];
    for n in 0..60_u16 {
        let qos = (n % 2) as u8;
        if !loud.offer(&publish("noise/x", &payload, qos, n + 1, false)).await {
            break;
        }
    }
    open.push(loud);
    Ok(open.into())
}

async fn topic_aliases_at_their_maximum(arena: &Arena) -> Result<Grip> {
    let mut open = crowd(arena, 300, |n| Hello::v5(format!("alias-{n}"))).await?;
    for (client, hostile) in open.iter_mut().enumerate() {
        for alias in 1..=16_u16 {
            let mut body = BytesMut::new();
            put_text(&mut body, &format!("{client}/{alias}/{}", "a".repeat(60_000)));
            body.put_slice(&[3, 0x23]);
            body.put_u16(alias);
            if !hostile.offer(&packed(0x30, &body)).await {
                break;
            }
        }
    }
    Ok(open.into())
}

async fn filters_of_a_hundred_levels(arena: &Arena) -> Result<Grip> {
    let mut open = crowd(arena, 18, |n| Hello::v4(format!("deep-{n}"))).await?;
    for (client, hostile) in open.iter_mut().enumerate() {
        for n in 0..1_000 {
            let filter = format!("{client}/{n}{}/+", "/l".repeat(98));
            if !hostile.offer(&subscribe([&*filter], 0)).await {
                break;
            }
        }
    }
    Ok(open.into())
}

/// Every mixture of `l` and `+` over 14 levels, on each message of the topic that all of them match.
async fn filters_that_all_match_one_topic(arena: &Arena) -> Result<Grip> {
    let mut open = crowd(arena, 16, |n| Hello::v4(format!("overlaps-{n}"))).await?;
    for (client, hostile) in open.iter_mut().enumerate() {
        for n in 0..1_000 {
            let number = client * 1_000 + n;
            let levels: Vec<&str> = (0..14).map(|bit| if number >> bit & 1 == 1 { "+" } else { "l" }).collect();
            if !hostile.offer(&subscribe([&*levels.join("/")], 1)).await {
                break;
            }
        }
    }
    let topic = ["l"; 14].join("/");
    for hostile in open.iter_mut().take(4) {
        for n in 1..=50 {
            if !hostile.offer(&publish(&topic, &[b'x'; 1_000], 1, n, false)).await {
                break;
            }
        }
    }
    Ok(open.into())
}

async fn unsubscribes_without_end(arena: &Arena) -> Result<Grip> {
    let mut body = BytesMut::new();
    body.put_u16(1);
    for _ in 0..300_000 {
        put_text(&mut body, "a");
    }
    let packet = packed(0xa2, &body);
    let mut open = crowd(arena, 4, |n| Hello::v4(format!("unsubscribes-{n}"))).await?;
    for hostile in &mut open {
        for _ in 0..5 {
            if !hostile.offer(&packet).await {
                break;
            }
        }
    }
    Ok(open.into())
}

async fn reader_of_everything_beside_retain_publishers(arena: &Arena) -> Result<Grip> {
    let publisher = retain(arena, "shelf", if arena.full { 20_000 } else { 5_000 }, 64).await?;
    let mut open: Vec<Hostile> = publisher.into_iter().collect();
    for n in 0..8 {
        let Some(mut hostile) = Hostile::connect(arena, &Hello::v4(format!("all-{n}"))).await? else { continue };
        hostile.offer(&subscribe(["#"], 0)).await;
        open.push(hostile);
        open.extend(retain(arena, &format!("other-{n}"), 200, 64).await?);
    }
    Ok(open.into())
}

async fn subscribing_again_and_again_without_reading(arena: &Arena) -> Result<Grip> {
    let mut open: Vec<Hostile> = retain(arena, "shelf", 2_000, 1_000).await?.into_iter().collect();
    for n in 0..20 {
        let Some(mut hostile) = Hostile::connect(arena, &Hello::v4(format!("again-{n}"))).await? else { continue };
        for _ in 0..50 {
            if !hostile.shout(&subscribe(["#", "+/+", "shelf/#"], 1)).await {
                break;
            }
        }
        open.push(hostile);
    }
    Ok(open.into())
}

/// As many as the edge has descriptors, which say nothing; one that the edge closes comes again at once.
async fn silent_connections(arena: &Arena) -> Result<Grip> {
    lanes(arena, arena.edge, 0).await
}

/// The same, with a byte of a CONNECT now and then.
async fn dripping_connects(arena: &Arena) -> Result<Grip> {
    lanes(arena, arena.edge, 20).await
}

async fn silent_connections_to_the_admin_port(arena: &Arena) -> Result<Grip> {
    lanes(arena, arena.admin, 0).await
}

/// Connections that come again for ever. Each writes so many bytes of a CONNECT, one by one, and waits until the edge
/// has enough. Returns when the edge has been tried by all of them, or by as many as it lets come.
async fn lanes(arena: &Arena, at: SocketAddr, bytes: usize) -> Result<Grip> {
    let count = 1_100;
    let mut grip = Grip::default();
    let knocked = Arc::new(AtomicU64::new(0));
    for _ in 0..count {
        let (arena, knocked) = (Arena { edge: at, ..*arena }, knocked.clone());
        grip.lanes.spawn(async move {
            let hello = Hello::v4("a-client-id-that-takes-its-time").bytes();
            loop {
                let hostile = Hostile::knock(&arena).await;
                knocked.fetch_add(1, Ordering::Relaxed);
                let Some(mut hostile) = hostile else { continue };
                for byte in hello.iter().take(bytes) {
                    hostile.shout(&[*byte]).await;
                    // What is slow about it: a second for each byte.
                    let _ = tokio::time::timeout(Duration::from_secs(1), hostile.socket.readable()).await;
                }
                let _ = hostile.socket.read(&mut [0; 16]).await;
            }
        });
    }
    until("the edge to be knocked at", SILENCE_MAX, async || {
        Ok((knocked.load(Ordering::Relaxed) >= count as u64).then_some(()))
    })
    .await?;
    Ok(grip)
}

/// A PUBLISH of nearly the largest size, but for its last byte.
async fn packets_that_never_end(arena: &Arena) -> Result<Grip> {
    let mut open = crowd(arena, 300, |n| Hello::v4(format!("endless-{n}"))).await?;
    let whole = publish("noise/x", &vec![b'n'; 1_000_000], 0, 0, false);
    for hostile in &mut open {
        hostile.offer(&whole[..whole.len() - 1]).await;
    }
    Ok(open.into())
}

async fn packet_ids_never_released(arena: &Arena) -> Result<Grip> {
    let mut open = crowd(arena, 4, |n| Hello::v4(format!("keeps-{n}")).kept()).await?;
    for hostile in &mut open {
        let mut out = BytesMut::new();
        for id in 1..=if arena.full { u16::MAX } else { 5_000 } {
            out.extend_from_slice(&publish("factory/9/telemetry/q", b"q", 2, id, false));
        }
        hostile.offer(&out).await;
    }
    Ok(open.into())
}

/// As subscribers they acknowledge nothing, as publishers they go on before they may.
async fn acknowledgements_never_sent(arena: &Arena) -> Result<Grip> {
    let mut open = crowd(arena, 20, |n| Hello::v5(format!("owes-{n}")).kept()).await?;
    for hostile in &mut open {
        let mut out = BytesMut::new();
        packet::subscribe(&mut out, 1, "noise/#", 2, true);
        hostile.offer(&out).await;
        hostile.answer(packet::SUBACK).await?;
    }
    let payload = vec![b'n'; 1_000];
    for hostile in open.iter_mut().take(4) {
        let mut out = BytesMut::new();
        for packet_id in 1..=5_000 {
            let topic = "noise/x";
            let user = Some(&[][..]);
            packet::publish(
                &mut out,
                &PublishParts { topic, payload: &payload, qos: 2, retain: false, duplicate: false, packet_id, user },
            );
        }
        hostile.offer(&out).await;
    }
    Ok(open.into())
}

async fn retained_messages_without_end(arena: &Arena) -> Result<Grip> {
    let mut open: Vec<Hostile> = retain(arena, "large", 150, 900_000).await?.into_iter().collect();
    open.extend(retain(arena, "small", if arena.full { 120_000 } else { 10_000 }, 0x100).await?);
    Ok(open.into())
}

async fn retained_topics_of_a_hundred_levels(arena: &Arena) -> Result<Grip> {
    let Some(mut hostile) = Hostile::connect(arena, &Hello::v4("retains-deep")).await? else {
        return Ok(Grip::default());
    };
    for n in 0..20_000 {
        if !hostile.offer(&publish(&format!("{n}{}", "/l".repeat(100)), b"r", 0, 0, true)).await {
            break;
        }
    }
    Ok(vec![hostile].into())
}

async fn queues_of_absent_sessions(arena: &Arena) -> Result<Grip> {
    let mut absent = crowd(arena, 100, |n| Hello::v4(format!("absent-{n}")).kept()).await?;
    for hostile in &mut absent {
        hostile.offer(&subscribe(["noise/#"], 1)).await;
        hostile.answer(packet::SUBACK).await?;
    }
    drop(absent);
    let Some(mut loud) = Hostile::connect(arena, &Hello::v4("loud")).await? else { return Ok(Grip::default()) };
    for n in 0..200_u16 {
        // Different each time, so that no copy is shared.
        let payload = vec![n as u8; 500_000];
        if !loud.offer(&publish("noise/x", &payload, 1, n + 1, false)).await {
            break;
        }
    }
    Ok(vec![loud].into())
}

/// 200,000 empty user properties fit into a packet; on a stream each of them is a header.
async fn user_properties_without_end(arena: &Arena) -> Result<Grip> {
    let mut body = BytesMut::new();
    put_text(&mut body, "factory/9/telemetry/p");
    body.put_u16(1);
    let properties = [0x26, 0, 0, 0, 0].repeat(200_000);
    put_varint(&mut body, properties.len());
    body.put_slice(&properties);
    let packet = packed(0x32, &body);
    let mut open = crowd(arena, 10, |n| Hello::v5(format!("verbose-{n}"))).await?;
    for hostile in &mut open {
        for _ in 0..3 {
            if !hostile.offer(&packet).await {
                break;
            }
        }
    }
    Ok(open.into())
}

async fn connects_and_disconnects(arena: &Arena) -> Result<Grip> {
    for n in 0..if arena.full { 20_000 } else { 2_000 } {
        let hello = if n % 2 == 0 { Hello::v4("storm") } else { Hello::v5(format!("storm-{n}")) };
        let Some(mut hostile) = Hostile::knock(arena).await else { continue };
        hostile.shout(&hello.bytes()).await;
        match n % 3 {
            0 => drop(hostile),
            1 => drop(hostile.shout(&[0xe0, 0]).await),
            _ => drop(hostile.answer(packet::CONNACK).await?),
        }
    }
    Ok(Grip::default())
}

/// They take the session from each other.
async fn one_client_id_for_all(arena: &Arena) -> Result<Grip> {
    let mut open = Vec::new();
    for n in 0..1_000 {
        let hello = if n % 2 == 0 { Hello::v4("the-one").kept() } else { Hello::v5("the-one").kept() };
        let Some(mut hostile) = Hostile::knock(arena).await else { continue };
        hostile.shout(&hello.bytes()).await;
        hostile.shout(&subscribe(["noise/#"], 1)).await;
        open.push(hostile);
    }
    Ok(open.into())
}

async fn pings_without_reading(arena: &Arena) -> Result<Grip> {
    let mut open = crowd(arena, 10, |n| Hello { keep_alive: u16::MAX, ..Hello::v4(format!("pings-{n}")) }).await?;
    let pings = [0xc0, 0].repeat(500_000);
    for hostile in &mut open {
        hostile.shout(&pings).await;
    }
    Ok(open.into())
}

async fn small_messages_to_many_readers(arena: &Arena) -> Result<Grip> {
    let mut open = crowd(arena, 50, |n| Hello::v4(format!("reads-little-{n}"))).await?;
    for hostile in &mut open {
        hostile.offer(&subscribe(["n"], 0)).await;
    }
    let messages = publish("n", b"", 0, 0, false).repeat(20_000);
    for hostile in open.iter_mut().take(4) {
        hostile.offer(&messages).await;
    }
    Ok(open.into())
}

async fn malformed_bytes(arena: &Arena) -> Result<Grip> {
    let mut rng = Rng(arena.seed);
    for n in 0..if arena.full { 10_000 } else { 1_000 } {
        let Some(mut hostile) = Hostile::knock(arena).await else { continue };
        let mut bytes = if n % 2 == 0 { Hello::v5(format!("bad-{n}")).bytes() } else { BytesMut::new() };
        bytes.extend((0..rng.below(200)).map(|_| rng.next() as u8));
        hostile.shout(&bytes).await;
    }
    Ok(Grip::default())
}
