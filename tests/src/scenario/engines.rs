//! Shards of several engines in one node: each keeps what its acknowledgement promised, and no client can tell them apart
//! otherwise.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

use super::Context;
use super::kill::drain;
use crate::device::Link;
use crate::lab::{Lab, PATIENCE, until};
use crate::process::{open_log, run_to_end};
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
        // A start claims the shard in the object store, which begins a leader epoch; nothing else does where nothing was lost.
        let expected = was + i32::from(engine == "object");
        ensure!(is == expected, "nothing was lost on {engine}, its leader epoch went from {was} to {is}");
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

/// Groups that commit at once, more than two for each shard.
const GROUPS: [&str; 6] = ["g-1", "g-2", "g-3", "g-4", "g-5", "g-6"];
/// Commits that are acknowledged before the node is killed in the midst of more.
const COMMITS: usize = 300;

pub async fn groups_on_several_shards_keep_what_was_committed(context: &Context) -> Result<String> {
    let files = commits_outlive_kill_and_disk(context, "groups-file", "file = 2").await?;
    let objects = commits_outlive_kill_and_disk(context, "groups-object", "file = 0\nobject = 2").await?;
    Ok(format!("{files} commits in two file shards, {objects} in two object shards"))
}

async fn commits_outlive_kill_and_disk(context: &Context, name: &str, shards: &str) -> Result<usize> {
    // By the rule of docs/formats.md, and two shards that slots are spread over.
    let shard_of = |group: &&str| crc32c::crc32c(group.as_bytes()) % 64 % 2;
    let shards_used: BTreeSet<u32> = GROUPS.iter().map(shard_of).collect();
    ensure!(shards_used.len() == 2, "the groups' slots lie on both shards");
    let mut lab = context.lab(name)?;
    lab.cloud.extra = format!("[shards]\n{shards}\nobject_linger = \"0s\"\n");
    lab.cloud.archive_extra = "max_lag = \"200ms\"\n".into();
    let mut cloud = lab.cloud()?;
    cloud.start().await?;
    kafka::Client::connect(lab.cloud.kafka).await?.touch("t").await?;
    let before = admin::cloud_status(lab.cloud.admin).await?.shards;
    let slots: Vec<usize> = before.iter().map(|shard| shard.slots.len()).collect();
    ensure!(slots == [32, 32], "slots are spread over both shards: {slots:?}");

    let acks = lab.dir.join("acks");
    let mut commit = commits(context, &lab, "commit");
    commit.stdout(File::create(&acks)?).stderr(open_log(&lab.dir.join("commits.log"))?);
    let mut committing = commit.spawn()?;
    let many = until("commits to be acknowledged", PATIENCE, async || {
        Ok(acknowledged(&acks)?.filter(|(count, _)| *count >= COMMITS).map(drop))
    });
    let many = many.await;
    cloud.kill()?;
    committing.kill()?;
    committing.wait()?;
    many?;
    let (count, last) = acknowledged(&acks)?.context("acknowledgements")?;

    cloud.start().await?;
    let found = shown(context, &lab).await?;
    ensure!(found.listed == GROUPS, "all groups are listed: {:?}", found.listed);
    for group in GROUPS {
        let (acknowledged, is) = (last[group], found.committed[group]);
        // The one under way when the node was killed may be there as well.
        let right = is == acknowledged || is == acknowledged + 1;
        ensure!(right, "{group}: {acknowledged} was acknowledged, {is} is there");
    }
    let after = admin::cloud_status(lab.cloud.admin).await?.shards;
    ensure!(before.iter().zip(&after).all(|(was, is)| was.next_seq < is.next_seq), "both shards wrote: {after:?}");

    // The disk is lost, the bucket is there: each shard brings its groups back.
    until("everything to be in the bucket", PATIENCE, async || {
        let status = admin::cloud_status(lab.cloud.admin).await?;
        let is_shipped = |shard: &admin::ShardStatus| shard.engine == "object" || shard.shipped_seq == shard.next_seq;
        Ok(status.shards.iter().all(is_shipped).then_some(()))
    })
    .await?;
    cloud.kill()?;
    std::fs::remove_dir_all(&lab.cloud.data_dir)?;
    cloud.start().await?;
    let restored = shown(context, &lab).await?;
    ensure!(restored.committed == found.committed, "{found:?} became {restored:?}");
    cloud.stop().await?;
    Ok(count)
}

fn commits(context: &Context, lab: &Lab, what: &str) -> Command {
    let mut command = context.tools.script("commits.py");
    command.args([&lab.cloud.kafka.to_string(), "t", what]).args(GROUPS);
    command
}

/// How many commits were acknowledged so far, and the last one of each group; `None` until each has one.
fn acknowledged(acks: &Path) -> Result<Option<(usize, BTreeMap<String, i64>)>> {
    let text = std::fs::read_to_string(acks)?;
    // What follows the last line break may be half a line.
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let lines: Vec<(String, i64)> = whole.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let count = lines.len();
    let last: BTreeMap<String, i64> = lines.into_iter().collect();
    Ok((last.len() == GROUPS.len()).then_some((count, last)))
}

/// What a client sees of the groups.
#[derive(Debug, Deserialize)]
struct Shown {
    committed: BTreeMap<String, i64>,
    listed: Vec<String>,
}

async fn shown(context: &Context, lab: &Lab) -> Result<Shown> {
    Ok(serde_json::from_slice(&run_to_end(commits(context, lab, "show")).await?)?)
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
