//! Shards of several engines in one node: each keeps what its acknowledgement promised, and no client can tell them apart
//! otherwise.

use std::collections::BTreeMap;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::Context;
use super::kill::drain;
use crate::device::Link;
use crate::lab::{Lab, PATIENCE, until};
use crate::process::run_to_end;
use crate::{admin, kafka};

/// Topics and the engine that each must be on: by default, by a rule, by a setting of the topic.
const TOPICS: [(&str, &str); 4] =
    [("plain", "file"), ("audit.orders", "object"), ("live.orders", "memory"), ("by-setting", "object")];
/// Where a memory shard's partitions begin in its second life: offsets are reserved so many at a time.
const RESERVED: i64 = 1 << 32;
const LINES: i64 = 200;

pub async fn each_engine_keeps_what_it_promised_on_kill_9(context: &Context) -> Result<String> {
    let mut lab = context.lab("engines")?;
    lab.cloud.extra = "[shards]\nfile = 1\nobject = 1\nmemory = 1\nobject_linger = \"10ms\"\n\
                       [[topic]]\nname = \"audit.*\"\nengine = \"object\"\n\
                       [[topic]]\nname = \"live.*\"\nengine = \"memory\"\n\
                       [[topic]]\nname = \"telemetry\"\nengine = \"object\"\n"
        .into();
    lab.cloud.kafka_extra = "group_initial_rebalance_delay = \"0s\"\n".into();
    // What is safe before that is so by its acknowledgement alone, and not because it was shipped.
    lab.cloud.archive_extra = "max_lag = \"1h\"\n".into();
    let (mut cloud, mut edge) = (lab.cloud()?, lab.edge()?);
    cloud.start().await?;
    edge.start().await?;
    let mut create = context.tools.script("create.py");
    run_to_end({
        create.args([&lab.cloud.kafka.to_string(), "plain", "audit.orders", "live.orders"]);
        create.arg("by-setting:tributary.engine=object");
        create
    })
    .await?;

    let lines: String = (0..LINES).map(|n| format!("value-{n}\n")).collect();
    std::fs::write(lab.dir.join("lines"), &lines)?;
    for (topic, engine) in TOPICS {
        ensure!(engine_of(context, &lab, topic).await? == engine, "{topic} is on {engine}");
        kcat_produce(&lab, topic).await?;
        ensure!(kcat_read(&lab, topic).await? == lines, "{topic}: kcat reads what it wrote");
    }
    let first = group(context, &lab).await?;
    for topic in ["plain", "audit.orders", "live.orders"] {
        let expected: Vec<(i64, String)> = (0..5).map(|n| (n, format!("value-{n}"))).collect();
        ensure!(first.get(topic) == Some(&expected), "the group begins at the beginning: {first:?}");
    }
    publish(&lab, "before", 50).await?;
    all_is_safe(&lab, 50).await?;
    let before = State::of(&lab).await?;

    cloud.kill()?;
    cloud.start().await?;
    let after = State::of(&lab).await?;
    for (topic, engine) in TOPICS {
        let (start, end) = after.bounds[topic];
        if engine == "memory" {
            ensure!(
                (start, end) == (RESERVED, RESERVED),
                "{topic} is empty above all it can have used: {start}..{end}"
            );
        } else {
            ensure!((start, end) == (0, LINES), "{topic} is whole: {start}..{end}");
            ensure!(kcat_read(&lab, topic).await? == lines, "{topic}: kcat reads what it wrote");
        }
    }
    for engine in ["file", "object"] {
        let (was, is) = (before.epochs[engine], after.epochs[engine]);
        ensure!(was == is, "nothing was lost on {engine}, its leader epoch went from {was} to {is}");
    }
    ensure!(after.epochs["memory"] > before.epochs["memory"], "a new leader epoch in memory: {:?}", after.epochs);

    for (topic, engine) in TOPICS {
        let next = if engine == "memory" { RESERVED } else { LINES };
        let mut client = kafka::Client::connect(lab.cloud.kafka).await?;
        for n in 0..5 {
            let offset = client.produce(topic, format!("after-{n}").as_bytes()).await?;
            ensure!(offset == next + n, "{topic} goes on at {}, not at {offset}", next + n);
        }
        let batches = client.batches(topic).await?;
        let epoch = batches.last().context("a batch")?.leader_epoch;
        ensure!(epoch == after.epochs[engine], "{topic}: a batch of epoch {epoch}, not {}", after.epochs[engine]);
    }
    let second = group(context, &lab).await?;
    for topic in ["plain", "audit.orders"] {
        let expected: Vec<(i64, String)> = (5..10).map(|n| (n, format!("value-{n}"))).collect();
        ensure!(second.get(topic) == Some(&expected), "the group goes on in {topic}: {second:?}");
    }
    let expected: Vec<(i64, String)> = (0..5).map(|n| (RESERVED + n, format!("after-{n}"))).collect();
    ensure!(second.get("live.orders") == Some(&expected), "what the group reads of memory is new: {second:?}");
    publish(&lab, "after", 20).await?;
    all_is_safe(&lab, 70).await?;
    let status = admin::cloud_status(lab.cloud.admin).await?;
    let telemetry = status.topic("telemetry").context("the stream's topic")?;
    ensure!(telemetry.engine == "object" && status.records("telemetry") == 70, "{telemetry:?}");
    edge.stop().await?;
    cloud.stop().await?;

    // More shards are taken, fewer refused.
    let extra = lab.cloud.extra.clone();
    lab.cloud.extra = extra.replace("object = 1", "object = 2").replace("file = 1", "file = 2");
    let mut cloud = lab.cloud()?;
    cloud.start().await?;
    ensure!(admin::cloud_status(lab.cloud.admin).await?.shards.len() == 5, "two shards more");
    for topic in ["plain", "audit.orders", "by-setting"] {
        ensure!(kcat_read(&lab, topic).await?.starts_with(&lines), "{topic} is where it was");
    }
    kafka::Client::connect(lab.cloud.kafka).await?.touch("audit.more").await?;
    ensure!(engine_of(context, &lab, "audit.more").await? == "object");
    cloud.stop().await?;
    lab.cloud.extra = extra;
    let mut fewer = lab.cloud()?;
    fewer.spawn()?;
    ensure!(!fewer.ended().await?.success(), "a node starts with fewer shards than there are");
    let says = fewer.log_text().contains("= 1, and this system has 2 shard(s) of that kind");
    ensure!(says, "it says what there is: {}", fewer.log.display());
    Ok(format!("{LINES} records on each of {} topics, 70 of a stream", TOPICS.len()))
}

/// What a start must keep or change.
struct State {
    bounds: BTreeMap<&'static str, (i64, i64)>,
    /// Newest leader epoch by engine.
    epochs: BTreeMap<String, i32>,
}

impl State {
    async fn of(lab: &Lab) -> Result<Self> {
        let mut client = kafka::Client::connect(lab.cloud.kafka).await?;
        let mut bounds = BTreeMap::new();
        for (topic, _) in TOPICS {
            bounds.insert(topic, (client.list_offset(topic, 0, -2).await?, client.list_offset(topic, 0, -1).await?));
        }
        let shards = admin::cloud_status(lab.cloud.admin).await?.shards;
        ensure!(shards.len() == 3, "three shards: {shards:?}");
        Ok(Self { bounds, epochs: shards.into_iter().map(|s| (s.engine, s.leader_epoch)).collect() })
    }
}

async fn engine_of(context: &Context, lab: &Lab, topic: &str) -> Result<String> {
    let mut command = context.tools.script("configs.py");
    command.args([&lab.cloud.kafka.to_string(), topic]);
    let settings: BTreeMap<String, Option<String>> = serde_json::from_slice(&run_to_end(command).await?)?;
    settings.get("tributary.engine").cloned().flatten().with_context(|| format!("no engine in {settings:?}"))
}

async fn kcat_produce(lab: &Lab, topic: &str) -> Result<()> {
    let mut produce = Command::new("kcat");
    produce.args(["-P", "-b", &lab.cloud.kafka.to_string(), "-t", topic, "-X", "enable.idempotence=true", "-l"]);
    produce.arg(lab.dir.join("lines"));
    run_to_end(produce).await.map(drop)
}

async fn kcat_read(lab: &Lab, topic: &str) -> Result<String> {
    let mut consume = Command::new("kcat");
    consume.args(["-C", "-q", "-e", "-b", &lab.cloud.kafka.to_string(), "-t", topic, "-o", "beginning"]);
    consume.args(["-X", "check.crcs=true"]);
    Ok(String::from_utf8(run_to_end(consume).await?)?)
}

/// The next five records of each topic that the group reads.
async fn group(context: &Context, lab: &Lab) -> Result<BTreeMap<String, Vec<(i64, String)>>> {
    let mut command = context.tools.script("group.py");
    command.args([&lab.cloud.kafka.to_string(), "readers", "5", "plain", "audit.orders", "live.orders"]);
    let mut records: BTreeMap<String, Vec<(i64, String)>> = BTreeMap::new();
    for line in String::from_utf8(run_to_end(command).await?)?.lines() {
        let (topic, offset, value): (String, i64, String) = serde_json::from_str(line)?;
        records.entry(topic).or_default().push((offset, value));
    }
    Ok(records)
}

async fn publish(lab: &Lab, name: &str, count: usize) -> Result<()> {
    let mut device = Link::connect(lab.edge.mqtt, "d", false, true).await?;
    for n in 0..count {
        device.publish("factory/1/telemetry/a", format!("{name}-{n}").as_bytes()).await?;
    }
    drain(lab, "telemetry").await.map(drop)
}

async fn all_is_safe(lab: &Lab, records: i64) -> Result<()> {
    until("the stream to be safe", PATIENCE, async || {
        let status = admin::edge_status(lab.edge.admin).await?;
        Ok(status.stream("telemetry").filter(|s| s.safe == records && s.next == records).map(drop))
    })
    .await
}
