//! The main job in one command: a cloud node and an edge on their embedded defaults, a few devices that really publish over
//! MQTT, and the offsets as they move.

use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use crate::device::Link;
use crate::lab::{PATIENCE, Rng, until};
use crate::process::{Kind, program, terminate};
use crate::{admin, kafka};

#[derive(Args)]
pub struct Options {
    /// Messages a second of each device.
    #[arg(long, default_value_t = 5)]
    rate: u32,
    /// Simulated devices.
    #[arg(long, default_value_t = 4)]
    devices: u32,
    /// End by itself after so many seconds (0: on Ctrl-C).
    #[arg(long, default_value_t = 0)]
    seconds: u64,
}

// The embedded defaults of both brokers.
const MQTT: &str = "127.0.0.1:1883";
const KAFKA: &str = "127.0.0.1:9092";
const EDGE_ADMIN: &str = "127.0.0.1:9481";
const CLOUD_ADMIN: &str = "127.0.0.1:9482";
const STREAM: &str = "mqtt";

pub async fn run(options: Options) -> Result<()> {
    build()?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut ended = signal(SignalKind::terminate())?;
    let mut cloud = start(Kind::Cloud)?;
    let mut edge = start(Kind::Edge)?;
    let outcome = tokio::select! {
        outcome = show(&options, &mut cloud, &mut edge) => outcome,
        _ = interrupt.recv() => Ok(()),
        _ = ended.recv() => Ok(()),
    };
    println!("\nstopping; what is stored stays in ./data, and the next start goes on from there");
    // The devices have ended with the select; first the edge, so that it may still send.
    let edge = stop("tributary-edge", edge).await;
    let cloud = stop("tributary-cloud", cloud).await;
    outcome.and(edge).and(cloud)
}

/// Builds both brokers with the cargo that runs us; run by hand, the program takes what is there.
fn build() -> Result<()> {
    let Some(cargo) = std::env::var_os("CARGO") else { return Ok(()) };
    println!("building both brokers (the first time takes some minutes)");
    let mut command = Command::new(cargo);
    command.args(["build", "--workspace", "--bins", "--quiet"]);
    if !cfg!(debug_assertions) {
        command.arg("--release");
    }
    if !command.status()?.success() {
        bail!("the brokers do not build");
    }
    Ok(())
}

fn start(kind: Kind) -> Result<Child> {
    std::fs::create_dir_all("data")?;
    let log = crate::process::open_log(format!("data/{}.log", kind.program()).as_ref())?;
    let mut command = Command::new(program(kind.program())?);
    command.arg("run").stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    command.spawn().with_context(|| format!("start {}", kind.program()))
}

async fn stop(name: &str, mut child: Child) -> Result<()> {
    // Ctrl-C in a terminal reaches the brokers too; then they are on their way out already.
    if child.try_wait()?.is_none() {
        let _ = terminate(child.id());
    }
    let child = std::sync::Mutex::new(child);
    let exited = async || match child.lock() {
        Ok(mut child) => Ok(child.try_wait()?),
        Err(_) => bail!("lost track of {name}"),
    };
    let status = until(&format!("{name} to stop"), PATIENCE, exited).await?;
    if !status.success() {
        bail!("{name} ended with {status}; see data/{name}.log");
    }
    Ok(())
}

async fn show(options: &Options, cloud: &mut Child, edge: &mut Child) -> Result<()> {
    let (edge_admin, cloud_admin): (SocketAddr, SocketAddr) = (EDGE_ADMIN.parse()?, CLOUD_ADMIN.parse()?);
    for (name, child, address) in [("tributary-cloud", cloud, cloud_admin), ("tributary-edge", edge, edge_admin)] {
        let child = std::sync::Mutex::new(child);
        until(&format!("{name} to be ready"), PATIENCE, async || {
            if let Ok(mut child) = child.lock()
                && let Some(status) = child.try_wait()?
            {
                // Not an error to be retried: say it and end.
                return Ok(Some(Err(status)));
            }
            Ok(admin::is_ready(address).await.then_some(Ok(())))
        })
        .await?
        .map_err(|status| {
            anyhow::anyhow!("{name} ended with {status}: see data/{name}.log, perhaps its port is taken")
        })?;
    }
    println!(
        "
  devices --MQTT {MQTT}--> tributary-edge --HTTP--> tributary-cloud --Kafka {KAFKA}--> you

  read the topic with any Kafka client, for example, in another terminal:
    kcat -C -b {KAFKA} -t {STREAM} -o beginning -f '%p:%o %T %k  %s\\n'
    kafka-console-consumer.sh --bootstrap-server {KAFKA} --topic {STREAM} --from-beginning --property print.key=true
  publish something yourself:
    mosquitto_pub -t hello/world -q 1 -m hi
  end with Ctrl-C
"
    );
    let mut devices = tokio::task::JoinSet::new();
    let mqtt: SocketAddr = MQTT.parse()?;
    for number in 0..options.devices {
        devices.spawn(publish_for_ever(mqtt, number, options.rate.max(1)));
    }
    println!(
        "{:>8}  {:>14}  {:>14}  {:>14}  {:>16}  {:>8}",
        "seconds", "edge stored", "cloud has", "archived", "topic records", "rate/s"
    );
    let began = Instant::now();
    let mut before: Option<i64> = None;
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    loop {
        tick.tick().await;
        let status = admin::edge_status(edge_admin).await?;
        let records = kafka::Client::connect(KAFKA.parse()?).await?.records(STREAM).await?;
        if let Some(stream) = status.stream(STREAM) {
            let rate = before.map_or(0, |b| stream.next - b);
            before = Some(stream.next);
            let at = began.elapsed().as_secs();
            println!(
                "{at:>8}  {:>14}  {:>14}  {:>14}  {records:>16}  {rate:>8}",
                stream.next, stream.durable, stream.safe
            );
        }
        if options.seconds > 0 && began.elapsed().as_secs() >= options.seconds {
            return Ok(());
        }
    }
}

/// A machine that tells its temperature, and comes back when the line breaks.
async fn publish_for_ever(mqtt: SocketAddr, number: u32, rate: u32) {
    let mut rng = Rng(u64::from(number));
    let mut temperature = 40.0 + f64::from(number) * 5.0;
    let mut n = 0_u64;
    let mut pace = tokio::time::interval(Duration::from_secs(1) / rate);
    loop {
        if let Ok(mut link) = Link::connect(mqtt, &format!("press-{number}"), number % 2 == 1, false).await {
            loop {
                pace.tick().await;
                temperature += (rng.below(200) as f64 - 100.0) / 200.0;
                let payload = format!("{{\"machine\":\"press-{number}\",\"n\":{n},\"celsius\":{temperature:.1}}}");
                let topic = format!("factory/hall-{}/telemetry/press-{number}", number % 2);
                if link.publish(&topic, payload.as_bytes()).await.is_err() {
                    break;
                }
                n += 1;
            }
        }
        pace.tick().await;
    }
}
