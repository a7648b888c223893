//! Several nodes and one bucket: whoever takes a shard over has all of it, and whoever had it stops.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tokio::time::Instant;

use super::Context;
use super::archive::{Moto, environment};
use crate::attempts::{Attempt, Attempts, judge};
use crate::judge::Record;
use crate::lab::{Lab, PATIENCE, Rng, until};
use crate::process::Broker;
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

pub async fn second_file_node_on_one_archive_stops_the_first_and_neither_harms_the_other(
    context: &Context,
) -> Result<String> {
    let (mut lab, mut other) = (context.lab("two-nodes")?, context.lab("two-nodes-other")?);
    let mut stranger = context.lab("two-nodes-stranger")?;
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
    until("the bucket to have it", PATIENCE, async || {
        let status = admin::cloud_status(lab.cloud.admin).await?;
        let shard = status.shard("file")?;
        Ok((shard.shipped_seq == shard.next_seq).then_some(()))
    })
    .await?;

    // From here on the bucket may lack up to `max_lag` of what the first node acknowledges, and its disk has it.
    let mut load = Attempts::start(lab.cloud.kafka, TOPIC, "perhaps", PRODUCERS);
    load.acknowledged(100).await?;
    second.start().await.context("the second node")?;
    ends_with(&mut first, "another node has").await?;
    let mut perhaps = load.finish().await?;
    let restored = read(context, &other).await?;
    let end = restored.last().map_or(0, |r| r.offset + 1);
    let lost = perhaps.iter_mut().flatten().filter(|a| a.acked.is_some_and(|offset| offset >= end));
    let lost = lost.map(|a| a.acked = None).count();
    all.extend(perhaps);
    judge(&all, &restored, true).context("what the second node restored")?;

    let mut load = Attempts::start(other.cloud.kafka, TOPIC, "second", PRODUCERS);
    load.acknowledged(100).await?;
    // The first node holds what the bucket does not. It is told so, and the second goes on.
    is_refused(&mut first, "another node went on with this shard").await?;
    // A system of its own that is pointed at this bucket is told so too.
    let mut strange = stranger.cloud()?;
    strange.start().await?;
    strange.stop().await?;
    stranger.cloud.archive = lab.cloud.archive.clone();
    is_refused(&mut stranger.cloud()?, "this data directory belongs to system").await?;
    load.acknowledged(50).await?;
    all.extend(load.finish().await?);
    judge(&all, &read(context, &other).await?, false).context("after the refused starts")?;
    second.kill()?;
    second.start().await?;
    judge(&all, &read(context, &other).await?, false).context("after kill -9")?;
    second.stop().await?;

    // The bucket alone, once more: a third node with nothing of its own.
    std::fs::remove_dir_all(&other.cloud.data_dir)?;
    second.start().await?;
    let records = read(context, &other).await?;
    let acked = judge(&all, &records, false).context("from the bucket alone")?;
    second.stop().await?;
    Ok(format!("{acked} acknowledged and all there, {lost} only on the first node's disk"))
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
    ensure!(was == is, "nothing was lost with the disk, and the leader epoch went from {was} to {is}");
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
