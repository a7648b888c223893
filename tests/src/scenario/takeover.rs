//! Several nodes and one bucket: a start asks who owns it, whoever takes a shard over has all of it, and whoever had it stops.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tokio::time::Instant;

use super::Context;
use super::archive::{Moto, environment};
use crate::attempts::{Attempt, Attempts, judge};
use crate::judge::Record;
use crate::lab::{Lab, PATIENCE, Rng, until};
use crate::process::{Broker, run_to_end};
use crate::proxy::Proxy;
use crate::tools::Reader;
use crate::{admin, kafka};

const TOPIC: &str = "orders";
const PRODUCERS: usize = 4;
/// Small segments, made and collected all the time.
const BUSY_ARCHIVE: &str = "max_lag = \"200ms\"\nsegment_bytes = \"16 KiB\"\nsegment_age = \"1s\"\n";
const OBJECT: &str = "[shards]\nfile = 0\nobject = 1\nobject_linger = \"5ms\"\n";

async fn make_topic(lab: &Lab) -> Result<()> {
    kafka::Client::connect(lab.cloud.kafka).await?.touch(TOPIC).await
}

/// Waits until the bucket has all of the file shard.
async fn is_shipped(lab: &Lab) -> Result<()> {
    until("the bucket to have it", PATIENCE, async || {
        let status = admin::cloud_status(lab.cloud.admin).await?;
        let shard = status.shard("file")?;
        Ok((shard.shipped_seq == shard.next_seq).then_some(()))
    })
    .await
}

async fn read(context: &Context, lab: &Lab) -> Result<Vec<Record>> {
    context.tools.read(Reader::Confluent, lab.cloud.kafka, TOPIC).await
}

/// Waits for a node to end by itself, and to say why.
async fn ends_with(broker: &mut Broker, text: &str) -> Result<()> {
    let status = broker.ended().await?;
    ensure!(!status.success(), "it ended as if it had been asked to");
    ensure!(broker.log_text().contains(text), "expected {text:?} in {}", broker.log.display());
    Ok(())
}

/// A start that must be refused, and say why.
async fn is_refused(broker: &mut Broker, text: &str) -> Result<()> {
    broker.spawn()?;
    ends_with(broker, text).await
}

pub async fn paused_owner_of_an_object_shard_is_fenced_and_nothing_is_lost(context: &Context) -> Result<String> {
    let rounds = if context.full { 20 } else { 3 };
    let mut rng = Rng(context.seed);
    let (mut lab, mut other) = (context.lab("takeover")?, context.lab("takeover-other")?);
    other.cloud.archive = lab.cloud.archive.clone();
    for plan in [&mut lab.cloud, &mut other.cloud] {
        (plan.extra, plan.archive_extra) = (OBJECT.into(), BUSY_ARCHIVE.into());
    }
    let (mut first, mut second) = (lab.cloud()?, other.cloud()?);
    first.start().await?;
    make_topic(&lab).await?;
    let mut all: Vec<Vec<Attempt>> = Vec::new();
    for round in 0..rounds {
        let mut load = Attempts::start(lab.cloud.kafka, TOPIC, &format!("first-{round}"), PRODUCERS);
        load.acknowledged(20 + rng.below(100) as usize).await?;
        tokio::time::sleep(Duration::from_millis(rng.below(20))).await;
        first.pause()?;
        if rng.below(2) == 0 && other.cloud.data_dir.exists() {
            // Nothing in it matters.
            std::fs::remove_dir_all(&other.cloud.data_dir)?;
        }
        // The owner's heartbeat stands still, which takes its time to be seen: later rounds are told to take over.
        (first.take_over, second.take_over) = (round > 0, round > 0);
        second.start().await.context("the node that takes over")?;
        let (taken, there) = (Instant::now(), read(context, &other).await?);
        let mut later = Attempts::start(other.cloud.kafka, TOPIC, &format!("second-{round}"), PRODUCERS);
        later.acknowledged(20).await?;
        first.resume()?;
        let asked = async { kafka::Client::connect(lab.cloud.kafka).await?.produce(TOPIC, b"too late").await };
        ensure!(asked.await.is_err(), "the fenced node acknowledges");
        ends_with(&mut first, "another node has taken this shard over").await?;
        let attempts = load.finish().await?;
        if let Some(late) = attempts.iter().flatten().find(|a| a.began > taken && a.acked.is_some()) {
            anyhow::bail!("the fenced node acknowledged {late:?}");
        }
        all.extend(attempts);
        judge(&all, &there, true).with_context(|| format!("round {round}: what the second node took over"))?;

        later.acknowledged(20 + rng.below(100) as usize).await?;
        tokio::time::sleep(Duration::from_millis(rng.below(20))).await;
        second.kill()?;
        all.extend(later.finish().await?);
        first.start().await.context("the first node, again")?;
        judge(&all, &read(context, &lab).await?, true).with_context(|| format!("round {round}: taken back"))?;
    }
    let status = admin::cloud_status(lab.cloud.admin).await?;
    let (epoch, records) = (status.shard("object")?.epoch, status.records(TOPIC));
    ensure!(epoch > 2 * rounds, "each take-over has an epoch of its own: {epoch}");
    first.stop().await?;
    let acked = all.iter().flatten().filter(|a| a.acked.is_some()).count();
    let tried: usize = all.iter().map(Vec::len).sum();
    Ok(format!("{rounds} rounds, {tried} records tried, {acked} acknowledged and all there, {records} in the log"))
}

/// What a start says that watches another node's heartbeat.
const WATCHES: &str = "watching its heartbeat before anything is claimed";

/// Tells a node that shares `lab`'s archive apart: what it must be called in an error.
fn names_of(lab: &Lab) -> [String; 3] {
    ["node 1 on host ".to_owned(), lab.cloud.kafka.to_string(), lab.cloud.data_dir.display().to_string()]
}

pub async fn second_node_on_the_archive_of_a_live_one_is_refused_with_its_name(context: &Context) -> Result<String> {
    let mut refused = 0;
    for (engine, extra) in [("file", ""), ("object", OBJECT)] {
        let (mut lab, mut other) =
            (context.lab(&format!("asked-{engine}"))?, context.lab(&format!("asked-{engine}-other"))?);
        other.cloud.archive = lab.cloud.archive.clone();
        for plan in [&mut lab.cloud, &mut other.cloud] {
            (plan.extra, plan.archive_extra) = (extra.into(), BUSY_ARCHIVE.into());
        }
        let (mut first, mut second) = (lab.cloud()?, other.cloud()?);
        first.start().await?;
        ensure!(!first.log_text().contains(WATCHES), "an empty archive has nobody to be watched");
        make_topic(&lab).await?;
        let mut load = Attempts::start(lab.cloud.kafka, TOPIC, engine, PRODUCERS);
        load.acknowledged(50).await?;
        // The same node id, which is everybody's default, and another one.
        for id in ["node_id = 1", "node_id = 2"] {
            let text = std::fs::read_to_string(&second.config)?;
            std::fs::write(&second.config, text.replace("node_id = 1", id))?;
            is_refused(&mut second, "belongs to a node that is alive").await?;
            for name in names_of(&lab).iter().map(String::as_str).chain(["[archive] url", "--take-over"]) {
                ensure!(second.log_text().contains(name), "expected {name:?} in {}", second.log.display());
            }
            ensure!(!other.cloud.data_dir.join("cluster-id").exists(), "the refused node joined the owner's system");
            refused += 1;
        }
        // Idle it is an owner as well.
        let mut all = load.finish().await?;
        is_refused(&mut second, "belongs to a node that is alive").await?;
        let mut load = Attempts::start(lab.cloud.kafka, TOPIC, &format!("{engine}-after"), PRODUCERS);
        load.acknowledged(50).await.context("the owner goes on")?;
        all.extend(load.finish().await?);
        let status = admin::cloud_status(lab.cloud.admin).await?;
        ensure!(status.shard(engine)?.epoch <= 2, "nobody else has claimed the shard");

        // Its own restart asks nobody, killed or stopped.
        first.kill()?;
        first.start().await?;
        first.stop().await?;
        first.start().await?;
        ensure!(!first.log_text().contains(WATCHES), "the owner's own restart watches: {}", first.log.display());
        judge(&all, &read(context, &lab).await?, true)?;
        // Whoever comes after an orderly stop asks nobody either.
        first.stop().await?;
        let said = second.log_text().matches(WATCHES).count();
        second.start().await?;
        ensure!(second.log_text().matches(WATCHES).count() == said, "a start after an orderly stop watches");
        judge(&all, &read(context, &other).await?, false)?;
        second.stop().await?;
    }
    Ok(format!("{refused} starts refused"))
}

/// Sends what the stopped node of `from` alone has to the node of `to`; returns what the command said.
async fn salvage(broker: &Broker, to: &Lab) -> Result<String> {
    let config = broker.config.to_string_lossy().into_owned();
    let command = broker.command(&["salvage", "--config", &config, "--to", &to.cloud.kafka.to_string()]);
    Ok(String::from_utf8(run_to_end(command).await?)?)
}

/// Records that were acknowledged by a node that was deposed before it shipped them have another offset after they were sent:
/// each must be there once. Returns how many there were.
fn sent_once(attempts: &mut [Vec<Attempt>], end: i64, records: &[Record]) -> Result<usize> {
    let mut moved = 0;
    for attempt in attempts.iter_mut().flatten().filter(|a| a.acked.is_some_and(|offset| offset >= end)) {
        let found: Vec<i64> = records
            .iter()
            .filter(|record| record.value.as_deref() == Some(attempt.value.as_bytes()))
            .map(|record| record.offset)
            .collect();
        let [offset] = found[..] else { anyhow::bail!("{attempt:?} was acknowledged and is there at {found:?}") };
        attempt.acked = Some(offset);
        moved += 1;
    }
    Ok(moved)
}

pub async fn what_a_deposed_file_node_alone_has_is_sent_and_nothing_is_lost(context: &Context) -> Result<String> {
    let (mut lab, mut other) = (context.lab("deposed")?, context.lab("deposed-other")?);
    let mut stranger = context.lab("deposed-stranger")?;
    other.cloud.archive = lab.cloud.archive.clone();
    for plan in [&mut lab.cloud, &mut other.cloud] {
        plan.archive_extra = BUSY_ARCHIVE.into();
    }
    let (mut first, mut second) = (lab.cloud()?, other.cloud()?);
    first.start().await?;
    make_topic(&lab).await?;
    let mut load = Attempts::start(lab.cloud.kafka, TOPIC, "shipped", PRODUCERS);
    load.acknowledged(200).await?;
    let mut all = load.finish().await?;
    is_shipped(&lab).await?;

    // From here on the bucket lacks nearly all of what the first node acknowledges, and its disk has it.
    first.stop().await?;
    lab.cloud.archive_extra = "max_lag = \"1h\"\nsegment_age = \"1h\"\n".into();
    let mut first = lab.cloud()?;
    first.start().await?;
    let mut load = Attempts::start(lab.cloud.kafka, TOPIC, "alone", PRODUCERS);
    load.acknowledged(200).await?;
    second.take_over = true;
    second.start().await.context("the second node")?;
    ends_with(&mut first, "on this node's disk alone").await?;
    ensure!(
        first.log_text().contains(&other.cloud.kafka.to_string()),
        "it says who has the shard: {}",
        first.log.display()
    );
    let mut alone = load.finish().await?;
    let restored = read(context, &other).await?;
    let end = restored.last().map_or(0, |r| r.offset + 1);

    let mut load = Attempts::start(other.cloud.kafka, TOPIC, "second", PRODUCERS);
    load.acknowledged(50).await?;
    let said = salvage(&first, &other).await.context("the first salvage")?;
    load.acknowledged(50).await?;
    // A reader would not come to an end beside it.
    all.extend(load.finish().await?);
    let there = read(context, &other).await?;
    let sent = sent_once(&mut alone, end, &there)?;
    ensure!(sent > 100, "the bucket lacked what the first node alone had: {sent}\n{said}");
    let again = salvage(&first, &other).await.context("the second salvage")?;
    all.extend(alone);
    judge(&all, &read(context, &other).await?, false).with_context(|| format!("after\n{said}\n{again}"))?;

    // The deposed node is told who has its shards, and a system of its own that it is pointed at the wrong bucket.
    is_refused(&mut first, "belongs to a node that is alive").await?;
    let mut strange = stranger.cloud()?;
    strange.start().await?;
    strange.stop().await?;
    stranger.cloud.archive = lab.cloud.archive.clone();
    let mut strange = stranger.cloud()?;
    strange.take_over = true;
    is_refused(&mut strange, "this data directory belongs to system").await?;
    second.take_over = false;
    second.kill()?;
    second.start().await?;
    judge(&all, &read(context, &other).await?, false).context("after kill -9")?;
    second.stop().await?;
    is_refused(&mut first, "another node went on with this shard").await?;

    // The bucket alone, once more: a third node with nothing of its own.
    std::fs::remove_dir_all(&other.cloud.data_dir)?;
    second.start().await?;
    let acked = judge(&all, &read(context, &other).await?, false).context("from the bucket alone")?;
    second.stop().await?;
    Ok(format!("{acked} acknowledged and all there, {sent} of them sent from the deposed node's disk"))
}

pub async fn file_owner_that_was_paused_stops_soon_and_nothing_is_lost(context: &Context) -> Result<String> {
    let (mut lab, mut other) = (context.lab("paused-file")?, context.lab("paused-file-other")?);
    other.cloud.archive = lab.cloud.archive.clone();
    for plan in [&mut lab.cloud, &mut other.cloud] {
        plan.archive_extra = BUSY_ARCHIVE.into();
    }
    let (mut first, mut second) = (lab.cloud()?, other.cloud()?);
    first.start().await?;
    make_topic(&lab).await?;
    // A salvage sends records and makes no topics.
    is_shipped(&lab).await?;
    let mut load = Attempts::start(lab.cloud.kafka, TOPIC, "first", PRODUCERS);
    load.acknowledged(200).await?;
    first.pause()?;
    second.start().await.context("the second node")?;
    ensure!(second.log_text().contains("it counts as dead"), "it says whom it follows: {}", second.log.display());
    let end = read(context, &other).await?.last().map_or(0, |r| r.offset + 1);
    first.resume()?;
    ends_with(&mut first, "another node has taken this shard over").await?;
    let mut all = load.finish().await?;
    let said = salvage(&first, &other).await?;
    let records = read(context, &other).await?;
    let sent = sent_once(&mut all, end, &records)?;
    let acked = judge(&all, &records, false).context(said)?;
    second.stop().await?;
    Ok(format!("{acked} acknowledged and all there, {sent} of them sent from the deposed node's disk"))
}

pub async fn owner_that_cannot_confirm_its_claim_acknowledges_nothing(context: &Context) -> Result<String> {
    const NOT_ENOUGH_REPLICAS: i16 = 19;
    let mut lab = context.lab("unconfirmed")?;
    let s3 = Moto::start(context, &lab).await?;
    let way = Proxy::start(s3.address).await?;
    lab.cloud.archive = Some("s3://bucket/prefix".into());
    lab.cloud.archive_extra = "stop_unconfirmed_after = \"10s\"\n".into();
    lab.cloud.env = environment(way.address);
    let mut cloud = lab.cloud()?;
    cloud.start().await?;
    // Nothing is acknowledged before the first claim is confirmed either.
    until("the first claim to be confirmed", PATIENCE, async || {
        make_topic(&lab).await?;
        Ok(kafka::Client::connect(lab.cloud.kafka).await?.produce(TOPIC, b"confirmed").await.ok())
    })
    .await?;
    way.cut();
    let acknowledged = AtomicUsize::new(1);
    until("produce to be refused", PATIENCE, async || {
        let mut client = kafka::Client::connect(lab.cloud.kafka).await?;
        match client.try_produce(TOPIC, b"cut off", 10_000).await? {
            Ok(_) => {
                acknowledged.fetch_add(1, Ordering::Relaxed);
                Ok(None)
            }
            Err(NOT_ENOUGH_REPLICAS) => Ok(Some(())),
            Err(code) => anyhow::bail!("a producer is told {code}"),
        }
    })
    .await?;
    let acknowledged = acknowledged.into_inner();
    ensure!(acknowledged > 1, "it acknowledges until the time is over");
    let read = read(context, &lab).await?;
    ensure!(read.len() >= acknowledged, "consumers go on: {} of {acknowledged}", read.len());
    way.mend();
    until("produce to go on", PATIENCE, async || {
        let mut client = kafka::Client::connect(lab.cloud.kafka).await?;
        Ok(client.try_produce(TOPIC, b"mended", 10_000).await?.ok())
    })
    .await?;
    cloud.stop().await?;
    Ok(format!("{acknowledged} acknowledged before it stopped to"))
}

pub async fn object_shard_on_s3_needs_no_disk_and_outlives_an_outage(context: &Context) -> Result<String> {
    let mut lab = context.lab("object-s3")?;
    let s3 = Moto::start(context, &lab).await?;
    lab.cloud.archive = Some("s3://bucket/tributary".into());
    lab.cloud.env = environment(s3.address);
    lab.cloud.extra = OBJECT.into();
    let mut cloud = lab.cloud()?;
    cloud.start().await?;
    make_topic(&lab).await?;
    let before = admin::cloud_status(lab.cloud.admin).await?;
    let mut load = Attempts::start(lab.cloud.kafka, TOPIC, "before", PRODUCERS);
    load.acknowledged(60).await?;
    cloud.kill()?;
    let mut all = load.finish().await?;
    std::fs::remove_dir_all(&lab.cloud.data_dir)?;
    cloud.start().await?;
    let after = admin::cloud_status(lab.cloud.admin).await?;
    ensure!(after.cluster_id == before.cluster_id, "the cluster id is the bucket's");
    let (was, is) = (before.shard("object")?.leader_epoch, after.shard("object")?.leader_epoch);
    ensure!(is == was + 1, "one start, nothing lost with the disk, and the leader epoch went from {was} to {is}");
    judge(&all, &read(context, &lab).await?, true).context("without the data directory")?;

    let mut load = Attempts::start(lab.cloud.kafka, TOPIC, "after", PRODUCERS);
    load.acknowledged(20).await?;
    s3.pause()?;
    all.push(vec![times_out(&lab, "while it is silent").await?]);
    s3.resume()?;
    load.acknowledged(20).await.context("after the silence")?;
    s3.refuse_everybody().await?;
    all.push(vec![times_out(&lab, "while it refuses").await?]);
    s3.refuse_nobody().await?;
    load.acknowledged(20).await.context("after the refusals")?;
    all.extend(load.finish().await?);
    let acked = judge(&all, &read(context, &lab).await?, true)?;

    // The same at a start.
    cloud.stop().await?;
    std::fs::remove_dir_all(&lab.cloud.data_dir)?;
    s3.refuse_everybody().await?;
    is_refused(&mut cloud, "InvalidAccessKeyId").await?;
    ensure!(cloud.log_text().contains("make the archive reachable"), "it says what to do: {}", cloud.log.display());
    s3.refuse_nobody().await?;
    cloud.start().await?;
    judge(&all, &read(context, &lab).await?, true).context("after the refused start")?;
    cloud.stop().await?;
    Ok(format!("{acked} acknowledged and all there"))
}

/// A record for which the producer does not want to wait long. It may become durable all the same.
async fn times_out(lab: &Lab, value: &str) -> Result<Attempt> {
    const REQUEST_TIMED_OUT: i16 = 7;
    let began = Instant::now();
    let mut client = kafka::Client::connect(lab.cloud.kafka).await?;
    let answer = client.try_produce(TOPIC, value.as_bytes(), 1_000).await?;
    ensure!(answer == Err(REQUEST_TIMED_OUT), "{value}: a producer is told {answer:?}");
    Ok(Attempt { value: value.to_owned(), began, acked: None })
}
