//! What gateways live through: odd clocks, a twin with the same id, a damaged database, and disks that fill up.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Context as _, Result, bail, ensure};

use super::Context;
use super::bad_input;
use super::kill::drain;
use crate::device::Link;
use crate::judge::Record;
use crate::lab::{Lab, PATIENCE, Rng, now_ms, until};
use crate::packet::{self, PublishParts};
use crate::process::{Broker, run_to_end};
use crate::tools::Reader;
use crate::{admin, kafka};

pub const LIBFAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1";

pub async fn clocks_at_1970_and_2099_and_back_stop_nobody(context: &Context) -> Result<String> {
    let lab = context.lab("clocks")?;
    let mut cloud = lab.cloud()?;
    cloud.start().await?;
    // The first start has a dead clock battery, the next jumps far ahead, then the network's time comes and goes back a year.
    let clocks = [Some("@1970-01-02 00:00:00"), Some("@2099-01-01 00:00:00"), None, Some("-1y")];
    for (n, clock) in clocks.iter().enumerate() {
        let mut edge = lab.edge()?;
        if let Some(clock) = clock {
            // As the faketime program does, but without a process in between that SIGKILL would hit instead.
            edge.env = [("LD_PRELOAD", LIBFAKETIME), ("FAKETIME", clock), ("DONT_FAKE_MONOTONIC", "1")]
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .to_vec();
        }
        edge.start().await.with_context(|| format!("{clock:?}"))?;
        let mut device = Link::connect(lab.edge.mqtt, "d", false, true).await?;
        for i in 0..10 {
            device.publish("factory/1/telemetry/a", format!("{n}-{i}").as_bytes()).await?;
        }
        ensure!(drain(&lab, "telemetry").await? == 10 * (n as i64 + 1));
        edge.kill()?;
    }
    let records = context.tools.read(Reader::Confluent, lab.cloud.kafka, "telemetry").await?;
    ensure!(records.len() == 40, "{} records of 40", records.len());
    // A clock that was wrong marks what came meanwhile and nothing after it, over restarts too.
    let (now, hour, year) = (now_ms(), 3_600_000, 365 * 86_400_000);
    let expected = [
        0..2 * 86_400_000,
        4_070_000_000_000..4_080_000_000_000,
        now - hour..now + hour,
        now - year - hour..now - year + hour,
    ];
    for (n, (records, expected)) in records.chunks(10).zip(expected).enumerate() {
        let times: Vec<i64> = records.iter().map(|record| record.timestamp).collect();
        ensure!(times.is_sorted(), "timestamps fall under clock {n}: {times:?}");
        ensure!(times.iter().all(|time| expected.contains(time)), "under clock {n} {expected:?} was due: {times:?}");
    }
    cloud.stop().await?;
    Ok(String::new())
}

pub async fn two_edges_with_one_id_take_turns_and_lose_nothing(context: &Context) -> Result<String> {
    let lab = context.lab("twins")?;
    let mut other = context.lab("twins-other")?;
    other.edge.uplink_url = lab.edge.uplink_url.clone();
    let (mut cloud, mut first, mut second) = (lab.cloud()?, lab.edge()?, other.edge()?);
    cloud.start().await?;
    first.start().await?;
    let publish = async |at, name: &str| -> Result<()> {
        let mut device = Link::connect(at, name, false, true).await?;
        for n in 0..10 {
            device.publish("factory/1/telemetry/a", format!("{name}-{n}").as_bytes()).await?;
        }
        Ok(())
    };
    publish(lab.edge.mqtt, "one").await?;
    drain(&lab, "telemetry").await?;
    second.start().await?;
    publish(other.edge.mqtt, "two").await?;
    drain(&other, "telemetry").await?;
    publish(lab.edge.mqtt, "three").await?;
    drain(&lab, "telemetry").await?;
    let records = context.tools.read(Reader::Confluent, lab.cloud.kafka, "telemetry").await?;
    let copies = count(&records);
    for name in ["one", "two", "three"] {
        for n in 0..10 {
            let found = copies.get(format!("{name}-{n}").as_bytes()).copied().unwrap_or(0);
            ensure!(found == 1, "{name}-{n} is there {found} times");
        }
    }
    let metrics = admin::metrics(lab.cloud.admin).await?;
    let takeovers = metrics.get("tributary_cloud_link_takeovers_total").copied().unwrap_or(0.0);
    ensure!(takeovers >= 1.0, "takeovers are counted: {metrics:?}");
    for broker in [&mut first, &mut second, &mut cloud] {
        broker.stop().await?;
    }
    Ok(format!("{takeovers} takeovers"))
}

fn count(records: &[Record]) -> BTreeMap<Vec<u8>, usize> {
    let mut copies = BTreeMap::new();
    for record in records {
        *copies.entry(record.value.clone().unwrap_or_default()).or_default() += 1;
    }
    copies
}

pub async fn damaged_database_is_set_aside_and_the_edge_goes_on(context: &Context) -> Result<String> {
    let lab = context.lab("damaged")?;
    let (mut cloud, mut edge) = (lab.cloud()?, lab.edge()?);
    cloud.start().await?;
    edge.start().await?;
    let mut device = Link::connect(lab.edge.mqtt, "d", false, true).await?;
    for n in 0..10 {
        device.publish("factory/1/telemetry/a", format!("before-{n}").as_bytes()).await?;
    }
    drain(&lab, "telemetry").await?;
    edge.stop().await?;
    let database = largest_file(&lab.edge.data_dir)?;
    let length = std::fs::metadata(&database)?.len() as usize;
    std::fs::write(&database, vec![0xa5; length])?;
    edge.start().await?;
    let mut device = Link::connect(lab.edge.mqtt, "d", false, true).await?;
    for n in 0..10 {
        device.publish("factory/1/telemetry/a", format!("after-{n}").as_bytes()).await?;
    }
    drain(&lab, "telemetry").await?;
    let records = context.tools.read(Reader::Confluent, lab.cloud.kafka, "telemetry").await?;
    ensure!(count(&records).len() == 20 && records.len() == 20, "{} records of 20", records.len());
    let metrics = admin::metrics(lab.edge.admin).await?;
    ensure!(
        metrics.get("tributary_edge_databases_set_aside") == Some(&1.0),
        "the damaged database is kept and counted"
    );
    edge.stop().await?;
    cloud.stop().await?;
    Ok(String::new())
}

/// One damaged page costs its records and no others: what was set aside is sent, once, however often it is tried.
pub async fn salvage_sends_what_a_damaged_database_still_holds(context: &Context) -> Result<String> {
    let lab = context.lab("salvage")?;
    let (mut cloud, mut edge) = left_behind(&lab, 120).await?;
    // The last message that the cloud does not have and that has others behind it.
    damage(&largest_file(&lab.edge.data_dir)?, &payload(70))?;
    edge.start().await?;
    let aside = set_aside(&lab.edge.data_dir)?;
    publish_numbers(&lab, 120..130).await?;

    let salvage = async |edge: &Broker| {
        let (file, config) = (aside.to_string_lossy(), edge.config.to_string_lossy());
        run_to_end(edge.command(&["salvage", &file, "--config", &config])).await
    };
    let Err(refused) = salvage(&edge).await else { bail!("salvage ran beside the broker that it speaks for") };
    let refused = format!("{refused:?}");
    ensure!(refused.contains("another process") && refused.contains("tributary-edge"), "{refused}");
    edge.stop().await?;
    let Err(unreached) = salvage(&edge).await else { bail!("salvage ended well without a cloud") };
    ensure!(format!("{unreached:?}").contains("nothing was sent"), "{unreached:?}");

    cloud.start().await?;
    let told = String::from_utf8(salvage(&edge).await?)?;
    let again = String::from_utf8(salvage(&edge).await?)?;
    edge.start().await?;
    drain(&lab, "telemetry").await?;

    let records = context.tools.read(Reader::Confluent, lab.cloud.kafka, "telemetry").await?;
    let copies = count(&records);
    let lost: Vec<u64> = (0..130).filter(|n| !copies.contains_key(&payload(*n))).collect();
    ensure!(records.len() == copies.len(), "{} records are there twice", records.len() - copies.len());
    ensure!(records.len() + lost.len() == 130, "{} records, {} lost, of 130", records.len(), lost.len());
    ensure!(lost.contains(&70) && lost.len() < 20, "one damaged page cost {lost:?}");
    let figures = |text: &str| -> Result<Vec<usize>> {
        let row = text.lines().find(|line| line.starts_with("telemetry")).context("a row for the stream")?;
        Ok(row.split_whitespace().filter_map(|word| word.parse().ok()).collect())
    };
    // Read, already there, sent, not sent, lost.
    let (read, lost) = (120 - lost.len(), lost.len());
    ensure!(figures(&told)? == [read, 20, read - 20, 0, lost], "the first run says\n{told}");
    // What was lost lies below the cloud's position now, where it could as well have been sent by the broker.
    ensure!(figures(&again)? == [read, read, 0, 0, 0], "the second run says\n{again}");
    let gaps = context.tools.read(Reader::Confluent, lab.cloud.kafka, "tributary.gaps").await?;
    ensure!(!gaps.is_empty(), "the loss is declared to consumers");
    edge.stop().await?;
    cloud.stop().await?;
    Ok(format!("{read} of 120 records read, {lost} lost"))
}

/// Cloud and edge, both stopped: the cloud has messages 0 to 19, the edge those up to `end` as well.
async fn left_behind(lab: &Lab, end: u64) -> Result<(Broker, Broker)> {
    let (mut cloud, mut edge) = (lab.cloud()?, lab.edge()?);
    cloud.start().await?;
    edge.start().await?;
    publish_numbers(lab, 0..20).await?;
    drain(lab, "telemetry").await?;
    cloud.stop().await?;
    publish_numbers(lab, 20..end).await?;
    edge.stop().await?;
    Ok((cloud, edge))
}

async fn publish_numbers(lab: &Lab, numbers: std::ops::Range<u64>) -> Result<()> {
    let mut device = Link::connect(lab.edge.mqtt, "d", false, true).await?;
    for n in numbers {
        device.publish("factory/1/telemetry/a", &payload(n)).await?;
    }
    Ok(())
}

/// Flips a bit in every copy that the file holds of these bytes' second half.
fn damage(file: &Path, bytes: &[u8]) -> Result<()> {
    let mut contents = std::fs::read(file)?;
    let needle = bytes.get(bytes.len() / 2..).filter(|half| half.len() >= 64).context("bytes to look for")?;
    let needle = &needle[..64];
    let found: Vec<usize> =
        contents.windows(needle.len()).enumerate().filter(|(_, at)| *at == needle).map(|(n, _)| n).collect();
    ensure!(!found.is_empty(), "{} does not hold the message", file.display());
    for at in found {
        contents[at] ^= 1;
    }
    Ok(std::fs::write(file, contents)?)
}

fn set_aside(dir: &Path) -> Result<PathBuf> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("edge.redb.bad-") {
            return Ok(entry.path());
        }
    }
    bail!("no database was set aside in {}", dir.display())
}

pub fn largest_file(dir: &Path) -> Result<PathBuf> {
    let mut largest = None;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        if metadata.is_file() && largest.as_ref().is_none_or(|(length, _)| metadata.len() > *length) {
            largest = Some((metadata.len(), entry.path()));
        }
    }
    Ok(largest.context("no file in the data directory")?.1)
}

const PAYLOAD: usize = 16 << 10;

pub fn payload(n: u64) -> Vec<u8> {
    let mut rng = Rng(n);
    let mut bytes = n.to_be_bytes().to_vec();
    bytes.extend((8..PAYLOAD).map(|_| rng.next() as u8));
    bytes
}

/// A stream that is full without a cloud, under one of the policies.
fn small(context: &Context, name: &str, policy: &str) -> Result<Lab> {
    let mut lab = context.lab(name)?;
    lab.edge.extra = "[storage]\ndisk_budget = \"8 MiB\"\n".into();
    lab.edge.mqtt_extra = "hold_timeout = \"10m\"\n".into();
    lab.edge.streams += &format!("on_full = \"{policy}\"\n");
    lab.cloud.archive_extra = "max_lag = \"200ms\"\n".into();
    Ok(lab)
}

pub async fn full_edge_holds_acknowledgements_until_there_is_room(context: &Context) -> Result<String> {
    let lab = small(context, "hold", "hold")?;
    let (mut cloud, mut edge) = (lab.cloud()?, lab.edge()?);
    edge.start().await?;
    let acked = Arc::new(AtomicU64::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let mut device = Link::connect(lab.edge.mqtt, "d", true, true).await?;
    let publishing = tokio::spawn({
        let (acked, stop) = (acked.clone(), stop.clone());
        async move {
            while !stop.load(Ordering::Relaxed) {
                let n = acked.load(Ordering::Relaxed);
                device.publish("factory/1/telemetry/a", &payload(n)).await?;
                acked.fetch_add(1, Ordering::Relaxed);
            }
            anyhow::Ok(())
        }
    });
    until("the edge to say that it is full", PATIENCE, async || {
        Ok(admin::edge_is_full(lab.edge.admin).await?.then_some(()))
    })
    .await?;
    let at_full = acked.load(Ordering::Relaxed);
    ensure!(at_full > 50, "only {at_full} messages of {PAYLOAD} bytes fit into 8 MiB");
    // Another client is served as ever: pings are answered, and what is not stored is acknowledged.
    let mut other = Link::connect(lab.edge.mqtt, "other", false, true).await?;
    other.write(packet::pingreq).await?;
    ensure!(other.read().await?.kind() == 13, "PINGRESP");
    other.publish("elsewhere", b"x").await?;
    cloud.start().await?;
    until("room", PATIENCE, async || Ok((acked.load(Ordering::Relaxed) > at_full + 20).then_some(()))).await?;
    stop.store(true, Ordering::Relaxed);
    publishing.await??;
    drain(&lab, "telemetry").await?;
    expect_each(context, &lab, 0..acked.load(Ordering::Relaxed)).await?;
    edge.stop().await?;
    cloud.stop().await?;
    Ok(format!("full after {at_full} messages, {} in the end", acked.load(Ordering::Relaxed)))
}

pub async fn full_edge_rejects_where_it_is_told_to(context: &Context) -> Result<String> {
    let lab = small(context, "reject", "reject")?;
    let (mut cloud, mut edge) = (lab.cloud()?, lab.edge()?);
    edge.start().await?;
    let mut device = Link::connect(lab.edge.mqtt, "d", true, true).await?;
    let mut acked = 0;
    let reason = loop {
        let reason = try_publish(&mut device, &payload(acked)).await?;
        if reason >= 0x80 {
            break reason;
        }
        acked += 1;
        ensure!(acked < 10_000, "8 MiB are never full");
    };
    ensure!(reason == 0x97, "QUOTA_EXCEEDED is 0x97, not {reason:#x}");
    cloud.start().await?;
    let refused_at = acked;
    let device = tokio::sync::Mutex::new(device);
    until("room", PATIENCE, async || {
        Ok((try_publish(&mut *device.lock().await, &payload(refused_at)).await? < 0x80).then_some(()))
    })
    .await?;
    drain(&lab, "telemetry").await?;
    // What was refused is nowhere; the one that was taken at last is there once.
    expect_each(context, &lab, 0..acked + 1).await?;
    edge.stop().await?;
    cloud.stop().await?;
    Ok(format!("refused after {acked} messages"))
}

/// Publishes at QoS 1 and returns the reason code of the PUBACK.
async fn try_publish(device: &mut Link, payload: &[u8]) -> Result<u8> {
    let parts = PublishParts {
        topic: "factory/1/telemetry/a",
        payload,
        qos: 1,
        retain: false,
        duplicate: false,
        packet_id: 1,
        user: Some(&[]),
    };
    device.write(|out| packet::publish(out, &parts)).await?;
    let frame = device.read().await?;
    ensure!(frame.kind() == packet::PUBACK, "packet type {} instead of PUBACK", frame.kind());
    Ok(frame.reason())
}

pub async fn full_edge_drops_the_oldest_and_declares_the_gap(context: &Context) -> Result<String> {
    let lab = small(context, "drop", "drop-oldest")?;
    let (mut cloud, mut edge) = (lab.cloud()?, lab.edge()?);
    edge.start().await?;
    let mut device = Link::connect(lab.edge.mqtt, "d", false, true).await?;
    let sent = 2_000; // 32 MiB into 8
    for n in 0..sent {
        device.publish("factory/1/telemetry/a", &payload(n)).await?;
    }
    cloud.start().await?;
    drain(&lab, "telemetry").await?;
    let records = context.tools.read(Reader::Confluent, lab.cloud.kafka, "telemetry").await?;
    let first = records.first().context("some records")?;
    let number = |r: &Record| r.value.as_deref().and_then(|v| v.get(..8)?.try_into().ok()).map(u64::from_be_bytes);
    let dropped = number(first).context("a number")?;
    ensure!(dropped > 0, "32 MiB did not fit into 8 MiB");
    expect_each(context, &lab, dropped..sent).await?;
    let gap = first.headers.iter().find(|(name, _)| name == "tributary-gap").and_then(|(_, v)| v.clone());
    let gap = String::from_utf8(gap.context("the first record after a gap carries the header tributary-gap")?)?;
    ensure!(gap == format!("0-{}", dropped - 1), "the gap is 0-{}, the header says {gap}", dropped - 1);
    let gaps = kafka::Client::connect(lab.cloud.kafka).await?.records("tributary.gaps").await?;
    ensure!(gaps >= 1, "the topic tributary.gaps lists it");
    edge.stop().await?;
    cloud.stop().await?;
    Ok(format!("gap {gap}"))
}

/// Exactly these numbers are in the topic, each once and in order.
async fn expect_each(context: &Context, lab: &Lab, numbers: std::ops::Range<u64>) -> Result<()> {
    let records = context.tools.read(Reader::Confluent, lab.cloud.kafka, "telemetry").await?;
    let expected = numbers.end - numbers.start;
    for (record, n) in records.iter().zip(numbers) {
        ensure!(record.value == Some(payload(n)), "{}:{} is not message {n}", record.partition, record.offset);
    }
    ensure!(records.len() as u64 == expected, "{} records of {expected}", records.len());
    Ok(())
}

pub async fn full_disk_at_either_side_loses_nothing(context: &Context) -> Result<String> {
    let lab = context.lab("enospc")?;
    let Some(edge_disk) = SmallDisk::mount(&lab.edge.data_dir, 24)? else {
        return Ok("NOT RUN: no right to mount a tmpfs".into());
    };
    let Some(cloud_disk) = SmallDisk::mount(&lab.cloud.data_dir, 48)? else {
        return Ok("NOT RUN: no right to mount a tmpfs".into());
    };
    let mut lab = lab;
    lab.edge.extra = "[storage]\ndisk_budget = \"1 GiB\"\n".into();
    lab.cloud.extra = "[wal]\nfile_bytes = \"4 MiB\"\n".into();
    let (mut cloud, mut edge) = (lab.cloud()?, lab.edge()?);
    edge.start().await?;
    let mut acked = fill(&lab, 0).await?;
    ensure!(acked > 0, "nothing fits on 24 MiB");
    let at_edge = acked;
    // Somebody makes room; the edge goes on by itself, or a supervisor starts it again.
    edge_disk.grow(512)?;
    revive(&mut edge).await?;
    cloud.start().await?;
    let mut device = until("the edge to take messages again", PATIENCE, async || {
        let mut device = Link::connect(lab.edge.mqtt, "again", false, true).await?;
        device.publish("factory/1/telemetry/a", &payload(acked)).await?;
        Ok(Some(device))
    })
    .await?;
    acked += 1;
    // Now the cloud's: 48 MiB are less than what comes.
    while acked < at_edge + 4_000 {
        device.publish("factory/1/telemetry/a", &payload(acked)).await?;
        acked += 1;
    }
    cloud_disk.grow(1024)?;
    revive(&mut cloud).await?;
    drain(&lab, "telemetry").await?;
    let records = context.tools.read(Reader::Confluent, lab.cloud.kafka, "telemetry").await?;
    let copies = count(&records);
    let missing = (0..acked).filter(|n| !copies.contains_key(&payload(*n))).count();
    ensure!(missing == 0, "{missing} of {acked} acknowledged messages are missing");
    edge.stop().await?;
    cloud.stop().await?;
    Ok(format!("{at_edge} messages filled the edge's disk, {acked} acknowledged in all and all there"))
}

/// A disk that came up read-only is named by both daemons, and what is on it is served again once it can be written.
pub async fn read_only_disk_is_named_and_harms_nothing(context: &Context) -> Result<String> {
    let lab = context.lab("read-only")?;
    let mut disks = Vec::new();
    for dir in [&lab.edge.data_dir, &lab.cloud.data_dir] {
        let Some(disk) = SmallDisk::mount(dir, 256)? else {
            return Ok("NOT RUN: no right to mount a tmpfs".into());
        };
        disks.push(disk);
    }
    let (mut cloud, mut edge) = left_behind(&lab, 40).await?;
    for disk in &disks {
        disk.remount("ro")?;
    }
    let said =
        |text: &str, dir: &Path| text.contains("Read-only file system") && text.contains(&*dir.to_string_lossy());
    for (broker, dir) in [(&mut edge, &lab.edge.data_dir), (&mut cloud, &lab.cloud.data_dir)] {
        let text = bad_input::refused(broker).await?;
        ensure!(said(&text, dir), "{} does not say what is wrong:\n{text}", broker.kind.program());
    }
    for disk in &disks {
        disk.remount("rw")?;
    }
    cloud.start().await?;
    edge.start().await?;
    drain(&lab, "telemetry").await?;
    expect_each(context, &lab, 0..40).await?;
    edge.stop().await?;
    cloud.stop().await?;
    Ok(String::new())
}

/// Publishes until the edge no longer acknowledges, whether it closes, waits or refuses; returns how many were acknowledged.
async fn fill(lab: &Lab, from: u64) -> Result<u64> {
    let mut device = Link::connect(lab.edge.mqtt, "fill", false, true).await?;
    let mut acked = from;
    while acked < from + 10_000 {
        let bytes = payload(acked);
        let publish = device.publish("factory/1/telemetry/a", &bytes);
        let held = async {
            let full = async || Ok(admin::edge_is_full(lab.edge.admin).await?.then_some(()));
            let _ = until("the edge to say it is full", PATIENCE, full).await;
        };
        tokio::select! {
            biased;
            done = publish => if done.is_err() { break } else { acked += 1 },
            () = held => break,
        }
    }
    Ok(acked)
}

async fn revive(broker: &mut Broker) -> Result<()> {
    if broker.exited()?.is_some() {
        broker.start().await?;
    }
    Ok(())
}

/// A small file system in memory over a data directory.
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    pub fn mount(dir: &Path, mib: u32) -> Result<Option<Self>> {
        std::fs::create_dir_all(dir)?;
        let mut command = Command::new("mount");
        command.args(["-t", "tmpfs", "-o", &format!("size={mib}m"), "tmpfs"]).arg(dir);
        Ok(command.output()?.status.success().then(|| Self(dir.to_owned())))
    }

    fn grow(&self, mib: u32) -> Result<()> {
        self.remount(&format!("size={mib}m"))
    }

    fn remount(&self, option: &str) -> Result<()> {
        let status = Command::new("mount").args(["-o", &format!("remount,{option}")]).arg(&self.0).status()?;
        ensure!(status.success(), "remount with {option}");
        Ok(())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
