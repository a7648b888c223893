//! The edge on a disk that takes 20 ms per sync, and on the same disk as it is: PUBACK must wait for it, live fan-out
//! must not. Runs `edge/examples/slow_disk.rs`, the edge's real front and store over a storage double.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::{Options, Row, Running, listening, messages, throughput};
use crate::bench::Table;
use crate::lab::free_port;
use crate::load::{self, Load, Percentiles};

const SYNC_MS: u64 = 20;
/// Name in the table, and least time of a sync.
const DISKS: [(&str, u64); 2] = [("disk of 20 ms per sync", SYNC_MS), ("the disk as it is", 0)];
const RATE: u64 = 1_000;

/// Builds the example. On its own: in one call with the brokers, these would get the features of test dependencies.
pub fn build() -> Result<()> {
    if let Some(cargo) = std::env::var_os("CARGO") {
        let what = ["build", "--release", "--quiet", "--package", "tributary-edge", "--example", "slow_disk"];
        if !Command::new(cargo).args(what).status()?.success() {
            bail!("edge/examples/slow_disk.rs does not build");
        }
    }
    Ok(())
}

pub async fn round(options: &Options, table: &mut Table) -> Result<()> {
    for (disk, sync_ms) in DISKS {
        let address = free_port()?;
        let dir = options.dir.join("slow-disk");
        let _ = std::fs::remove_dir_all(&dir);
        let child = Command::new(program()?)
            .arg(address.to_string())
            .arg(&dir)
            .arg(sync_ms.to_string())
            .spawn()
            .context("run")?;
        let _child = Running(child);
        listening(address).await?;
        measure(options, table, disk, address).await?;
    }
    Ok(())
}

fn program() -> Result<PathBuf> {
    let path = std::env::current_exe()?.with_file_name("examples").join("slow_disk");
    if !path.exists() {
        bail!("{} is missing: cargo build --release -p tributary-edge --example slow_disk", path.display());
    }
    Ok(path)
}

async fn measure(options: &Options, table: &mut Table, disk: &str, address: SocketAddr) -> Result<()> {
    let one = Row { name: "", qos: 1, publishers: 1, subscribers: 0, window: 1, messages: 250 };
    let alone = load(address, 1, messages(&one, options));
    let puback = tokio::task::spawn_blocking(move || load::round_trips(&alone)).await??;
    // In milliseconds, as syncs are.
    add(table, "1 publisher, window 1, PUBACK", "ms", disk, puback);

    let name = "50 publishers, window 20, acked/s";
    let many = Row { name, qos: 1, publishers: 50, subscribers: 0, window: 20, messages: 3_000 };
    table.add(name, disk, throughput(&many, options, address, "stored").await?.published_per_second);

    for qos in [0, 1] {
        let steady = load(address, qos, 0);
        let done = tokio::task::spawn_blocking(move || load::latency(&steady, RATE, Duration::from_secs(5))).await??;
        add(table, &format!("1,000/s, QoS {qos}, end to end"), "us", disk, done.end_to_end);
        if qos > 0 {
            // Unlike those of a window of 1, these messages come at any moment of a commit: up to two syncs.
            add(table, &format!("1,000/s, QoS {qos}, PUBACK"), "ms", disk, done.puback);
        }
    }
    Ok(())
}

fn load(address: SocketAddr, qos: u8, messages: u64) -> Load {
    let topic = "stored".into();
    Load { address, qos, publishers: 1, subscribers: 1, messages, size: 256, window: 1, topic, rate: None }
}

fn add(table: &mut Table, name: &str, unit: &str, disk: &str, found: Percentiles) {
    let micros = if unit == "ms" { 1e3 } else { 1.0 };
    for (percentile, value) in [("p50", found.p50), ("p99", found.p99)] {
        table.add(&format!("{name} {percentile}, {unit}"), disk, f64::from(value) / micros);
    }
}
