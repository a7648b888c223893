//! The edge as an MQTT broker: against apt's mosquitto and a bare forwarder, with and without storing.

mod slow_disk;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;

use super::{BEFORE, Table, build_release, cpu_seconds, older, resident_mib};
use crate::admin;
use crate::device::Link;
use crate::lab::{EdgeBuild, Lab, PATIENCE, free_port, until};
use crate::load::{self, Load};
use crate::process::Broker;
use crate::scenario::security::Authority;

#[derive(Args)]
pub struct Options {
    /// Alternating rounds; medians are of these.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// A program that only forwards, called with a port: the limit of this generator on this machine.
    #[arg(long)]
    forwarder: Option<PathBuf>,
    /// A directory with an older release build, measured in turns with this one.
    #[arg(long)]
    before: Option<PathBuf>,
    /// Scales the number of messages.
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// Also resident memory 60 s after a million stored messages.
    #[arg(long)]
    memory: bool,
    /// Only the rows with a disk of 20 ms per sync.
    #[arg(long)]
    slow_disk: bool,
    #[arg(long, default_value = "target/bench-edge")]
    dir: PathBuf,
}

struct Row {
    name: &'static str,
    qos: u8,
    publishers: usize,
    subscribers: usize,
    window: usize,
    messages: u64,
}

/// Nothing is stored: the work every broker does.
const LIVE: &[Row] = &[
    Row { name: "QoS 0, 1 -> 1, received/s", qos: 0, publishers: 1, subscribers: 1, window: 1, messages: 1_000_000 },
    Row {
        name: "QoS 1, 1 publisher, window 20, acked/s",
        qos: 1,
        publishers: 1,
        subscribers: 0,
        window: 20,
        messages: 300_000,
    },
    Row {
        name: "QoS 1, 50 publishers, window 20, acked/s",
        qos: 1,
        publishers: 50,
        subscribers: 0,
        window: 20,
        messages: 20_000,
    },
    Row {
        name: "QoS 1, 1 -> 1, window 20, received/s",
        qos: 1,
        publishers: 1,
        subscribers: 1,
        window: 20,
        messages: 200_000,
    },
];

/// Stored and fsynced before PUBACK: only the edge does this.
const STORED: &[Row] = &[
    Row { name: "stored, 1 publisher, window 1", qos: 1, publishers: 1, subscribers: 0, window: 1, messages: 3_000 },
    Row { name: "stored, 1 publisher, window 20", qos: 1, publishers: 1, subscribers: 0, window: 20, messages: 40_000 },
    Row {
        name: "stored, 50 publishers, window 20",
        qos: 1,
        publishers: 50,
        subscribers: 0,
        window: 20,
        messages: 20_000,
    },
];

pub async fn run(options: Options) -> Result<()> {
    build_release()?;
    slow_disk::build()?;
    std::fs::create_dir_all(&options.dir)?;
    let (mut table, mut slow) = (Table::default(), Table::default());
    let before = older(options.before.as_deref(), "tributary-edge")?;
    for round in 1..=options.rounds {
        println!("round {round} of {}", options.rounds);
        if before.is_none() {
            slow_disk::round(&options, &mut slow).await?;
        }
        if options.slow_disk {
            continue;
        }
        let build = |program| EdgeBuild { program, ..EdgeBuild::default() };
        ours(&options, &mut table, NAME, &build(None), round == 1).await?;
        if before.is_some() {
            ours(&options, &mut table, BEFORE, &build(before.clone()), round == 1).await?;
            continue;
        }
        mosquitto(&options, &mut table).await?;
        if let Some(program) = &options.forwarder {
            let address = free_port()?;
            let child = Command::new(program).arg(address.port().to_string()).spawn().context("forwarder")?;
            let _child = Running(child);
            listening(address).await?;
            live(&options, &mut table, "forwarder", address).await?;
        }
    }
    match before {
        Some(_) => table.print_pairs(NAME, BEFORE),
        None => table.print(),
    }
    slow.print();
    Ok(())
}

const NAME: &str = "tributary-edge";

async fn ours(options: &Options, table: &mut Table, name: &str, build: &EdgeBuild, first: bool) -> Result<()> {
    let mut lab = Lab::new(&options.dir.canonicalize()?, "lab", build)?;
    let ca = Authority::make(&lab.dir, "ca").await?;
    let certificate = ca.issue("server").await?;
    lab.edge.uplink_url = "http://127.0.0.1:9".into(); // Nobody there: the link is measured elsewhere.
    lab.edge.streams = format!(
        "[[mqtt.listener]]\nbind = \"{}\"\ntransport = \"tls\"\ntls = {{ cert_file = {:?}, key_file = {:?} }}\n\
         [[stream]]\nname = \"stored\"\nfilters = [\"stored/#\"]\n[storage]\ndisk_budget = \"20 GiB\"\n",
        free_port()?,
        certificate.chain,
        certificate.key
    );
    let mut edge = lab.edge()?;
    let began = Instant::now();
    edge.spawn()?;
    let mut link = until("the edge to take a message", PATIENCE, async || {
        Ok(Link::connect(lab.edge.mqtt, "first", false, true).await.ok())
    })
    .await?;
    link.publish("stored/first", b"x").await?;
    table.add("start to first PUBACK of a stored message, ms", name, began.elapsed().as_secs_f64() * 1e3);
    table.add("idle, TLS listener on, MiB resident", name, resident_mib(edge.pid().context("running")?)?);

    live(options, table, name, lab.edge.mqtt).await?;
    for row in STORED {
        let before = Counters::read(&edge).await?;
        let done = throughput(row, options, lab.edge.mqtt, "stored").await?;
        let after = Counters::read(&edge).await?;
        let messages = messages(row, options) * row.publishers as u64;
        let commits = after.commits - before.commits;
        table.add(&format!("{}, acked/s", row.name), name, done.published_per_second);
        table.add(&format!("{}, commits/s", row.name), name, commits * done.published_per_second / messages as f64);
        let written = (after.written - before.written) / (messages * 256) as f64;
        table.add(&format!("{}, bytes written per payload byte", row.name), name, written);
        table.add(&format!("{}, CPU us per message", row.name), name, (after.cpu - before.cpu) * 1e6 / messages as f64);
    }
    latency(table, &format!("{name} (stored)"), lab.edge.mqtt, "stored").await?;
    if options.memory && first {
        let row = Row { name: "", qos: 1, publishers: 50, subscribers: 0, window: 20, messages: 20_000 };
        throughput(
            &row,
            &Options { scale: 1.0, dir: options.dir.clone(), forwarder: None, before: None, ..*options },
            lab.edge.mqtt,
            "stored",
        )
        .await?;
        tokio::time::sleep(Duration::from_secs(60)).await;
        table.add("60 s after 1 M stored messages, MiB resident", name, resident_mib(edge.pid().context("running")?)?);
    }
    edge.stop().await
}

struct Counters {
    commits: f64,
    written: f64,
    cpu: f64,
}

impl Counters {
    async fn read(edge: &Broker) -> Result<Self> {
        let metrics = admin::metrics(edge.admin).await?;
        let sum = |prefix: &str| metrics.iter().filter(|(k, _)| k.starts_with(prefix)).map(|(_, v)| v).sum();
        let cpu = cpu_seconds(edge.pid().context("running")?)?;
        Ok(Self {
            commits: sum("tributary_edge_commit_seconds_count"),
            written: sum("tributary_edge_written_bytes_total"),
            cpu,
        })
    }
}

async fn mosquitto(options: &Options, table: &mut Table) -> Result<()> {
    let address = free_port()?;
    let config = options.dir.join("mosquitto.conf");
    // No bound on queues: a broker that drops would look fast.
    let text =
        format!("listener {} 127.0.0.1\nallow_anonymous true\nmax_queued_messages 0\nlog_type error\n", address.port());
    std::fs::write(&config, text)?;
    let mut command = Command::new("mosquitto");
    let child = command.arg("-c").arg(&config).stdin(Stdio::null()).spawn().context("apt-get install mosquitto")?;
    let _child = Running(child);
    listening(address).await?;
    live(options, table, "mosquitto", address).await
}

async fn live(options: &Options, table: &mut Table, peer: &str, address: SocketAddr) -> Result<()> {
    for row in LIVE {
        let done = throughput(row, options, address, "live").await?;
        let rate = if row.subscribers > 0 { done.received_per_second } else { done.published_per_second };
        table.add(row.name, peer, rate);
        let expected = messages(row, options) * row.publishers as u64;
        if row.subscribers > 0 && done.received < expected {
            table.add(&format!("{}: share that arrived", row.name), peer, done.received as f64 / expected as f64);
        }
    }
    latency(table, peer, address, "live").await
}

async fn latency(table: &mut Table, peer: &str, address: SocketAddr, topic: &str) -> Result<()> {
    let load = Load {
        address,
        qos: 1,
        publishers: 1,
        subscribers: 1,
        messages: 0,
        size: 256,
        window: 1,
        topic: topic.into(),
        rate: None,
    };
    let done = tokio::task::spawn_blocking(move || load::latency(&load, 1_000, Duration::from_secs(5))).await??;
    for (name, value) in [
        ("1,000/s, end to end p50, us", done.end_to_end.p50),
        ("1,000/s, end to end p99, us", done.end_to_end.p99),
        ("1,000/s, PUBACK p50, us", done.puback.p50),
        ("1,000/s, PUBACK p99, us", done.puback.p99),
    ] {
        table.add(name, peer, f64::from(value));
    }
    Ok(())
}

fn messages(row: &Row, options: &Options) -> u64 {
    ((row.messages as f64 * options.scale) as u64).max(1)
}

async fn throughput(row: &Row, options: &Options, address: SocketAddr, topic: &str) -> Result<load::Throughput> {
    let Row { qos, publishers, subscribers, window, .. } = *row;
    let messages = messages(row, options);
    let load =
        Load { address, qos, publishers, subscribers, messages, size: 256, window, topic: topic.into(), rate: None };
    tokio::task::spawn_blocking(move || load::throughput(&load)).await?.with_context(|| row.name.to_owned())
}

async fn listening(address: SocketAddr) -> Result<()> {
    let probe = async || Ok(tokio::net::TcpStream::connect(address).await.ok().map(drop));
    until(&format!("a listener on {address}"), PATIENCE, probe).await
}

/// A peer that ends with its round.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
