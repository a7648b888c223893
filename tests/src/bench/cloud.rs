//! The cloud as a Kafka broker, against Apache Kafka with and without an fsync per message set, driven by librdkafka's own
//! performance tool; and the link: how long a backlog takes. `tests/bench/install` fetches and builds the peers.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;

use super::{BEFORE, Table, build_release, cpu_seconds, older, resident_mib};
use crate::admin;
use crate::kafka::Client;
use crate::lab::{EdgeBuild, Lab, PATIENCE, free_port, until};
use crate::load::{self, Load};
use crate::process::{open_log, run_to_end};

#[derive(Args)]
pub struct Options {
    /// Alternating rounds; medians are of these.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Messages of 1 KiB produced and consumed per run.
    #[arg(long, default_value_t = 500_000)]
    messages: u64,
    /// Bytes of backlog that the link drains, in MB.
    #[arg(long, default_value_t = 150)]
    backlog_mb: u64,
    /// A directory with an older release build, measured in turns with this one, and without Apache Kafka.
    #[arg(long)]
    before: Option<PathBuf>,
    /// Where tests/bench/install put rdkafka_performance and Apache Kafka.
    #[arg(long, default_value = "target/bench-tools")]
    tools: PathBuf,
    #[arg(long, default_value = "target/bench-cloud")]
    dir: PathBuf,
}

const SIZE: u64 = 1024;

pub async fn run(options: Options) -> Result<()> {
    build_release()?;
    std::fs::create_dir_all(&options.dir)?;
    let tool = options.tools.join("rdkafka_performance");
    if !tool.is_file() {
        bail!("{} is missing: run tests/bench/install", tool.display());
    }
    let mut table = Table::default();
    let before = older(options.before.as_deref(), "tributary-cloud")?;
    for round in 1..=options.rounds {
        println!("round {round} of {}", options.rounds);
        ours(&options, &tool, &mut table, NAME, None).await?;
        if let Some(program) = &before {
            ours(&options, &tool, &mut table, BEFORE, Some(program)).await?;
            continue;
        }
        for (name, flush) in [("Apache Kafka, page cache", false), ("Apache Kafka, flush each", true)] {
            let kafka = ApacheKafka::start(&options, flush).await?;
            produce_and_consume(&options, &tool, &mut table, name, kafka.address, kafka.child.id()).await?;
        }
        drain(&options, &mut table).await?;
    }
    match before {
        Some(_) => table.print_pairs(NAME, BEFORE),
        None => table.print(),
    }
    Ok(())
}

const NAME: &str = "tributary-cloud";

async fn ours(options: &Options, tool: &Path, table: &mut Table, name: &str, program: Option<&PathBuf>) -> Result<()> {
    let lab = Lab::new(&options.dir.canonicalize()?, "lab", &EdgeBuild::default())?;
    let mut cloud = lab.cloud()?;
    cloud.program = program.unwrap_or(&cloud.program).clone();
    let began = Instant::now();
    cloud.start().await?;
    table.add("start to ready, ms", name, began.elapsed().as_secs_f64() * 1e3);
    let pid = cloud.pid().context("running")?;
    table.add("idle, MiB resident", name, resident_mib(pid)?);
    produce_and_consume(options, tool, table, name, lab.cloud.kafka, pid).await?;
    cloud.stop().await
}

async fn produce_and_consume(
    options: &Options,
    tool: &Path,
    table: &mut Table,
    peer: &str,
    kafka: SocketAddr,
    pid: u32,
) -> Result<()> {
    // Metadata makes the topic; what is measured begins after that.
    let mut warm = Command::new(tool);
    warm.args(["-P", "-t", "bench", "-b", &kafka.to_string(), "-s", "1024", "-c", "1000", "-a", "-1", "-q"]);
    run_to_end(warm).await?;
    let gigabytes = (options.messages * SIZE) as f64 / 1e9;
    let count = options.messages.to_string();
    let runs: [(&str, Vec<&str>); 3] = [
        ("produce, 1 KiB, acks=all, MB/s", vec!["-P", "-p", "0", "-s", "1024", "-a", "-1", "-X", "linger.ms=5"]),
        (
            "produce, 1 KiB, acks=all, lz4, MB/s",
            vec!["-P", "-p", "0", "-s", "1024", "-a", "-1", "-X", "linger.ms=5", "-z", "lz4"],
        ),
        ("consume, 1 KiB, MB/s", vec!["-C", "-p", "0", "-o", "beginning"]),
    ];
    for (row, arguments) in runs {
        let cpu = cpu_seconds(pid)?;
        let mut command = Command::new(tool);
        command.args(["-t", "bench", "-b", &kafka.to_string(), "-c", &count, "-u", "-q"]).args(&arguments);
        let text = String::from_utf8_lossy(&run_to_end(command).await?).into_owned();
        table.add(row, peer, megabytes_per_second(&text)?);
        let used = (cpu_seconds(pid)? - cpu) / gigabytes;
        table.add(&row.replace("MB/s", "CPU s per GB"), peer, used);
    }
    table.add("after the load, MiB resident", peer, resident_mib(pid)?);
    Ok(())
}

/// From the last table row: `| elapsed ms | messages | bytes | ...`.
fn megabytes_per_second(text: &str) -> Result<f64> {
    let rows = text.lines().filter_map(|line| line.trim_start_matches(['%', ' ']).strip_prefix('|'));
    let numbers = |row: &str| row.split('|').filter_map(|cell| cell.trim().parse::<f64>().ok()).collect::<Vec<_>>();
    let usable = |n: &Vec<f64>| n.len() >= 3 && n[0] > 0.0 && n[2] > 0.0;
    let last = rows.map(numbers).rfind(usable).with_context(|| text.to_owned())?;
    Ok(last[2] / 1e6 / (last[0] / 1e3))
}

/// A single node of Apache Kafka in KRaft mode.
struct ApacheKafka {
    child: Child,
    address: SocketAddr,
}

impl ApacheKafka {
    async fn start(options: &Options, flush: bool) -> Result<Self> {
        let dir = options.dir.join("apache-kafka");
        if dir.exists() {
            std::fs::remove_dir_all(&dir)?;
        }
        std::fs::create_dir_all(&dir)?;
        let (address, controller) = (free_port()?, free_port()?);
        let mut properties = format!(
            "process.roles=broker,controller\nnode.id=1\ncontroller.quorum.voters=1@{controller}\n\
             listeners=PLAINTEXT://{address},CONTROLLER://{controller}\ncontroller.listener.names=CONTROLLER\n\
             log.dirs={}\noffsets.topic.replication.factor=1\nauto.create.topics.enable=true\n",
            dir.join("logs").display()
        );
        if flush {
            properties += "log.flush.interval.messages=1\n";
        }
        let file = dir.join("server.properties");
        std::fs::write(&file, properties)?;
        let class_path = format!("{}/kafka/*", options.tools.display());
        let mut format = Command::new("java");
        format
            .args(["-cp", &class_path, "kafka.tools.StorageTool", "format", "-t", "MkU3OEVBNTcwNTJENDM2Qg", "-c"])
            .arg(&file);
        run_to_end(format).await?;
        let log = open_log(&dir.join("log"))?;
        let mut command = Command::new("java");
        command.args(["-Xmx1g", "-Xms1g", "-XX:+UseG1GC", "-cp", &class_path, "kafka.Kafka"]).arg(&file);
        let child = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()?;
        let kafka = Self { child, address };
        until("Apache Kafka to answer", PATIENCE, async || {
            Ok(Some(Client::connect(address).await?.partitions("bench").await?))
        })
        .await?;
        Ok(kafka)
    }
}

impl Drop for ApacheKafka {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A gateway that was alone for a while: how long until the cloud has confirmed its backlog.
async fn drain(options: &Options, table: &mut Table) -> Result<()> {
    let mut lab = Lab::new(&options.dir.canonicalize()?, "drain", &EdgeBuild::default())?;
    lab.edge.extra = "[storage]\ndisk_budget = \"4 GiB\"\n".into();
    let (mut edge, mut cloud) = (lab.edge()?, lab.cloud()?);
    edge.start().await?;
    let messages = options.backlog_mb * 1_000_000 / 256 / 20;
    let topic = "factory/1/telemetry".into();
    let load = Load {
        address: lab.edge.mqtt,
        qos: 1,
        publishers: 20,
        subscribers: 0,
        messages,
        size: 256,
        window: 20,
        topic,
        rate: None,
    };
    tokio::task::spawn_blocking(move || load::throughput(&load)).await??;
    cloud.start().await?;
    let began = Instant::now();
    until("the backlog to be confirmed", Duration::from_secs(600), async || {
        let status = admin::edge_status(lab.edge.admin).await?;
        Ok(status.stream("telemetry").filter(|s| s.durable == s.next).map(|_| ()))
    })
    .await?;
    table.add(&format!("link: {} MB of backlog, s", options.backlog_mb), NAME, began.elapsed().as_secs_f64());
    edge.stop().await?;
    cloud.stop().await
}
