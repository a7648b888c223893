//! Every alert rule of `docs/monitoring/alerts.yml` rings on real processes that are in the state it speaks of.
//!
//! A rule waits for minutes, a test does not: what two scrapes of a process show is repeated, minute by minute, to
//! `promtool`, which evaluates the rules as Prometheus would. A rule that nothing here makes ring fails the test.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::Context;
use super::archive::{Moto, environment};
use super::hardship::{LIBFAKETIME, SmallDisk, largest_file, payload};
use crate::device::Link;
use crate::kafka::Client;
use crate::lab::{PATIENCE, until};
use crate::process::{Broker, run_to_end};
use crate::{admin, kafka};

const RULES: &str = include_str!("../../../docs/monitoring/alerts.yml");

/// What one process shows.
#[derive(Debug, Clone)]
struct Scrape {
    job: &'static str,
    instance: String,
    metrics: BTreeMap<String, f64>,
}

/// A process before and in a state, and the rule that shall ring of it.
struct Evidence {
    alert: &'static str,
    before: Scrape,
    after: Scrape,
}

#[derive(Default)]
struct Alarms {
    rings: Vec<Evidence>,
    /// Processes that are well: nothing rings of them.
    quiet: Vec<Scrape>,
}

impl Scrape {
    /// As Prometheus would: a process that does not answer is down.
    async fn of(broker: &Broker) -> Self {
        let mut metrics = admin::metrics(broker.admin).await.unwrap_or_default();
        metrics.insert("up".to_owned(), if metrics.is_empty() { 0.0 } else { 1.0 });
        Self { job: broker.kind.program(), instance: broker.admin.to_string(), metrics }
    }

    /// The sum over all series of a metric.
    fn sum(&self, name: &str) -> f64 {
        let of = |series: &str| series.split('{').next() == Some(name);
        self.metrics.iter().filter(|(series, _)| of(series)).map(|(_, value)| value).sum()
    }

    /// Series for promtool, going on from this as from `before` to this, for the metrics that rules use.
    fn series(&self, before: &Self, out: &mut String) -> Result<()> {
        for (series, value) in &self.metrics {
            let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
            if name != "up" && !RULES.contains(name.trim_end_matches("_bucket")) {
                continue;
            }
            let comma = if labels == "}" { "" } else { "," };
            let labels = labels.strip_suffix('}').context("labels end")?;
            let grows = name.ends_with("_total") || name.ends_with("_bucket");
            let first = before.metrics.get(series).copied().unwrap_or(0.0);
            // A process that started again counts from the beginning.
            let values = if grows { format!("{first}+{}x60", (value - first).max(0.0)) } else { format!("{value}x60") };
            let (job, instance) = (self.job, &self.instance);
            writeln!(
                out,
                "      - {{ series: '{name}{{{labels}{comma}job=\"{job}\",instance=\"{instance}\"}}', values: \"{values}\" }}"
            )?;
        }
        Ok(())
    }
}

impl Alarms {
    fn ring(&mut self, before: &Scrape, after: &Scrape, alerts: &[&'static str]) {
        let evidence = |alert: &&'static str| Evidence { alert, before: before.clone(), after: after.clone() };
        self.rings.extend(alerts.iter().map(evidence));
    }

    /// A test file for promtool.
    fn test_file(&self, rules: &Path) -> Result<String> {
        let mut text = format!("rule_files: [{:?}]\nevaluation_interval: 1m\ntests:\n", rules.display());
        for Evidence { alert, before, after } in &self.rings {
            writeln!(text, "  - name: {alert}\n    interval: 1m\n    input_series:")?;
            after.series(before, &mut text)?;
            writeln!(text, "    promql_expr_test:")?;
            let firing =
                format!("count by (alertname) (ALERTS{{alertname=\"{alert}\",alertstate=\"firing\"}}) > bool 0");
            writeln!(text, "      - expr: '{firing}'\n        eval_time: 40m")?;
            writeln!(text, "        exp_samples: [{{ labels: '{{alertname=\"{alert}\"}}', value: 1 }}]")?;
        }
        writeln!(text, "  - name: nothing rings of processes that are well\n    interval: 1m\n    input_series:")?;
        for scrape in &self.quiet {
            scrape.series(scrape, &mut text)?;
        }
        // How full this machine's disk is says nothing about the processes.
        let firing = "count by (alertname) (ALERTS{alertname!~\".*DiskLow\",alertstate=\"firing\"})";
        writeln!(text, "    promql_expr_test:\n      - {{ expr: '{firing}', eval_time: 40m, exp_samples: [] }}")?;
        Ok(text)
    }
}

pub async fn each_alert_rule_rings_of_a_real_process(context: &Context) -> Result<String> {
    let mut alarms = Alarms::default();
    link_is_refused_and_a_stream_parked(context, &mut alarms).await?;
    bucket_is_away_at_a_start(context, &mut alarms).await?;
    commits_take_long(context, &mut alarms).await?;
    let edge = edge_is_full_and_damaged(context, &mut alarms).await?;
    let cloud = cloud_disk_is_full(context, &mut alarms).await?;
    if !edge || !cloud {
        return Ok("NOT RUN: no right to mount a tmpfs".into());
    }
    let named: BTreeSet<&str> = RULES.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    let shown: BTreeSet<&str> = alarms.rings.iter().map(|evidence| evidence.alert).collect();
    ensure!(
        named.len() > 10 && named == shown,
        "rules that nothing makes ring, or that are not there: {:?}",
        named.symmetric_difference(&shown).collect::<Vec<_>>()
    );
    let rules = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/monitoring/alerts.yml").canonicalize()?;
    let file = context.lab("alarms")?.dir.join("rings.yml");
    std::fs::write(&file, alarms.test_file(&rules)?)?;
    let mut promtool = Command::new(context.tools.installed.join("prometheus/usr/bin/promtool"));
    promtool.args(["test", "rules"]).arg(&file);
    run_to_end(promtool).await?;
    Ok(format!("{} rules", named.len()))
}

/// A pair that is well, a stream that the cloud does not take, a gateway with a wrong token.
async fn link_is_refused_and_a_stream_parked(context: &Context, alarms: &mut Alarms) -> Result<()> {
    let mut lab = context.lab("alarms-link")?;
    lab.cloud.link_extra = "[[link.edge]]\nid = \"gw-1\"\ntoken = \"the right one\"\ntopics = [\"telemetry\"]\n".into();
    lab.edge.uplink_extra = "token = \"the right one\"\n".into();
    let (mut cloud, mut edge) = (lab.cloud()?, lab.edge()?);
    cloud.start().await?;
    edge.start().await?;
    let (well, cloud_well) = until("the pair to be well", PATIENCE, async || {
        let (edge, cloud) = (Scrape::of(&edge).await, Scrape::of(&cloud).await);
        let well = edge.sum("tributary_edge_uplink_up") == 1.0
            && cloud.sum("tributary_cloud_archive_claimed") == 1.0
            && cloud.sum("tributary_cloud_archive_waiting_bytes") == 0.0;
        Ok(well.then_some((edge, cloud)))
    })
    .await?;
    ensure!(cloud_well.sum("tributary_cloud_archive_lag_seconds") == 0.0, "nothing waits, and the lag is not 0");
    ensure!(cloud_well.sum("tributary_cloud_produce_ready") == 1.0 && well.sum("tributary_edge_publish_ready") == 1.0);
    alarms.quiet.extend([well.clone(), cloud_well.clone()]);
    edge.stop().await?;
    alarms.ring(&well, &Scrape::of(&edge).await, &["TributaryEdgeDown"]);

    lab.edge.streams += "[[stream]]\nname = \"forbidden\"\nfilters = [\"forbidden/#\"]\n";
    let mut edge = lab.edge()?;
    edge.start().await?;
    let parked = until("the stream to be parked", PATIENCE, async || {
        let scrape = Scrape::of(&edge).await;
        Ok((scrape.sum("tributary_edge_stream_parked") == 1.0).then_some(scrape))
    })
    .await?;
    alarms.ring(&well, &parked, &["TributaryEdgeStreamParked"]);

    edge.stop().await?;
    lab.edge.uplink_extra = "token = \"the wrong one\"\n".into();
    let mut edge = lab.edge()?;
    edge.start().await?;
    let refused = until("the token to be refused", PATIENCE, async || {
        let scrape = Scrape::of(&cloud).await;
        Ok((scrape.sum("tributary_cloud_link_refused_total") > 0.0).then_some(scrape))
    })
    .await?;
    alarms.ring(&cloud_well, &refused, &["TributaryCloudEdgeRefused"]);
    alarms.ring(&well, &Scrape::of(&edge).await, &["TributaryEdgeLinkDown"]);
    edge.stop().await?;
    cloud.stop().await?;
    alarms.ring(&cloud_well, &Scrape::of(&cloud).await, &["TributaryCloudDown"]);
    Ok(())
}

/// A node that starts while its bucket is away serves, ships nothing, and says since when. Its clocks run a hundred times as
/// fast, so that the minutes pass.
async fn bucket_is_away_at_a_start(context: &Context, alarms: &mut Alarms) -> Result<()> {
    let mut lab = context.lab("alarms-bucket")?;
    let s3 = Moto::start(context, &lab).await?;
    lab.cloud.archive = Some("s3://bucket/prefix".into());
    lab.cloud.env = environment(s3.address);
    let mut cloud = lab.cloud()?;
    cloud.start().await?;
    let mut client = Client::connect(lab.cloud.kafka).await?;
    client.touch("t").await?;
    until("the topic", PATIENCE, async || Ok(client_produces(&lab.cloud.kafka, "t", 100).await.ok())).await?;
    cloud.stop().await?;
    drop(s3);
    cloud.env.extend(
        [("LD_PRELOAD", LIBFAKETIME), ("FAKETIME", "+0 x100")].map(|(name, value)| (name.to_owned(), value.to_owned())),
    );
    cloud.start().await?;
    let before = Scrape::of(&cloud).await;
    until("a record to be taken", PATIENCE, async || Ok(client_produces(&lab.cloud.kafka, "t", 100).await.ok()))
        .await?;
    let behind = until("the archive to be five minutes behind", PATIENCE, async || {
        let scrape = Scrape::of(&cloud).await;
        Ok((scrape.sum("tributary_cloud_archive_lag_seconds") > 300.0).then_some(scrape))
    })
    .await?;
    ensure!(behind.sum("tributary_cloud_archive_waiting_bytes") > 0.0, "nothing waits, and the lag rises");
    ensure!(admin::is_ready(lab.cloud.admin).await, "a node without its bucket serves");
    alarms.ring(&before, &behind, &["TributaryCloudArchiveBehind", "TributaryCloudArchiveNotClaimed"]);
    cloud.kill()
}

async fn client_produces(kafka: &std::net::SocketAddr, topic: &str, bytes: usize) -> Result<i64> {
    kafka::Client::connect(*kafka).await?.produce(topic, &vec![7; bytes]).await
}

/// A file that takes all the room there is.
fn fill_up(dir: &Path) -> Result<PathBuf> {
    let path = dir.join("filler");
    let mut file = std::fs::File::create(&path)?;
    // To the last byte.
    while file.write_all(&[0; 1 << 12]).is_ok() {}
    Ok(path)
}

/// An edge that never reaches its cloud, on a small disk.
async fn edge_is_full_and_damaged(context: &Context, alarms: &mut Alarms) -> Result<bool> {
    let mut lab = context.lab("alarms-edge")?;
    let Some(_disk) = SmallDisk::mount(&lab.edge.data_dir, 48)? else { return Ok(false) };
    lab.edge.extra = "[storage]\ndisk_budget = \"8 MiB\"\n".into();
    lab.edge.streams +=
        "on_full = \"hold\"\n[[stream]]\nname = \"drop\"\nfilters = [\"drop/#\"]\non_full = \"drop-oldest\"\n";
    let mut edge = lab.edge()?;
    let yesterday = [("LD_PRELOAD", LIBFAKETIME), ("FAKETIME", "-2h"), ("DONT_FAKE_MONOTONIC", "1")];
    edge.env = yesterday.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
    edge.start().await?;
    Link::connect(lab.edge.mqtt, "d", false, true).await?.publish("factory/1/telemetry/a", b"old").await?;
    edge.stop().await?;
    edge.env.clear();
    edge.start().await?;
    let before = Scrape::of(&edge).await;
    ensure!(before.sum("tributary_edge_publish_ready") == 1.0, "an edge with room takes records");
    alarms.ring(&before, &before, &["TributaryEdgeBacklogOld", "TributaryEdgeDiskLow"]);

    // The disk is full, whatever the budget says: known before anybody publishes.
    let filler = fill_up(&lab.edge.data_dir)?;
    let (code, why) = admin::get(lab.edge.admin, "/readyz?for=publish").await?;
    ensure!(code == 503 && why.contains("disk"), "a full disk is known at once: {code} {why}");
    ensure!(admin::is_ready(lab.edge.admin).await, "an edge with a full disk serves");
    let full = Scrape::of(&edge).await;
    ensure!(full.sum("tributary_edge_disk_budget_ratio") == 1.0, "the ratio is 1 when full: {full:?}");
    alarms.ring(&before, &full, &["TributaryEdgeNearlyFull", "TributaryEdgeCannotStore"]);
    std::fs::remove_file(&filler)?;
    until("room", PATIENCE, async || {
        Ok((admin::get(lab.edge.admin, "/readyz?for=publish").await?.0 == 200).then_some(()))
    })
    .await?;

    let mut device = Link::connect(lab.edge.mqtt, "e", false, true).await?;
    let mut dropped = before.clone();
    for n in 0..5_000 {
        device.publish("drop/a", &payload(n)).await?;
        if n % 50 == 0 {
            dropped = Scrape::of(&edge).await;
            if dropped.sum("tributary_edge_stream_dropped_records_total") > 0.0 {
                break;
            }
        }
    }
    alarms.ring(
        &before,
        &dropped,
        &["TributaryEdgeRecordsDropped", "TributaryEdgeNearlyFull", "TributaryEdgeCannotStore"],
    );
    let (code, why) = admin::get(lab.edge.admin, "/readyz?for=publish").await?;
    ensure!(code == 503 && why.contains("telemetry"), "a full stream that holds is not ready: {code} {why}");
    ensure!(admin::get(lab.edge.admin, "/readyz?for=tea").await?.0 == 400, "there is no such readiness");
    ensure!(admin::is_ready(lab.edge.admin).await, "a full edge serves");

    edge.stop().await?;
    let database = largest_file(&lab.edge.data_dir)?;
    let length = std::fs::metadata(&database)?.len() as usize;
    std::fs::write(&database, vec![0xa5; length.min(4 << 20)])?;
    edge.start().await?;
    alarms.ring(&before, &Scrape::of(&edge).await, &["TributaryEdgeDatabaseSetAside"]);
    edge.stop().await?;
    Ok(true)
}

/// A disk that stalls: the process stands still for longer than a second in the midst of its commits, again and again.
async fn commits_take_long(context: &Context, alarms: &mut Alarms) -> Result<()> {
    let lab = context.lab("alarms-slow")?;
    let mut edge = lab.edge()?;
    edge.start().await?;
    let before = Scrape::of(&edge).await;
    let mut device = Link::connect(lab.edge.mqtt, "d", false, true).await?;
    let load = tokio::spawn(async move { while device.publish("factory/1/telemetry/a", b"x").await.is_ok() {} });
    let slow = until("commits that take more than a second", PATIENCE, async || {
        for _ in 0..5 {
            edge.pause()?;
            tokio::time::sleep(Duration::from_millis(1_100)).await;
            edge.resume()?;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let scrape = Scrape::of(&edge).await;
        let count = |scrape: &Scrape, le: &str| {
            scrape.metrics.get(&format!("tributary_edge_commit_seconds_bucket{{le=\"{le}\"}}")).copied().unwrap_or(0.0)
        };
        let since = |le: &str| count(&scrape, le) - count(&before, le);
        let (all, quick) = (since("+Inf"), since("1.0"));
        Ok(((all - quick) * 50.0 > all).then_some(scrape))
    })
    .await?;
    alarms.ring(&before, &slow, &["TributaryEdgeCommitsSlow"]);
    load.abort();
    edge.kill()
}

/// The disk itself is full, whatever the settings say: known before a record is refused, and gone when there is room.
async fn cloud_disk_is_full(context: &Context, alarms: &mut Alarms) -> Result<bool> {
    let mut lab = context.lab("alarms-cloud")?;
    let Some(_disk) = SmallDisk::mount(&lab.cloud.data_dir, 64)? else { return Ok(false) };
    lab.cloud.extra = "[wal]\nfile_bytes = \"4 MiB\"\n".into();
    let mut cloud = lab.cloud()?;
    cloud.start().await?;
    let mut client = Client::connect(lab.cloud.kafka).await?;
    client.touch("t").await?;
    until("the topic", PATIENCE, async || Ok(client_produces(&lab.cloud.kafka, "t", 100).await.ok())).await?;
    let before = Scrape::of(&cloud).await;
    let takes = async || -> Result<bool> { Ok(admin::get(lab.cloud.admin, "/readyz?for=produce").await?.0 == 200) };
    ensure!(takes().await?, "a node with room takes records");
    let filler = fill_up(&lab.cloud.data_dir)?;
    let (mut stored, mut known_at) = (1, None);
    let code = loop {
        if known_at.is_none() && !takes().await? {
            known_at = Some(stored);
        }
        match client.try_produce("t", &vec![7; 64 << 10], 30_000).await? {
            Ok(_) => stored += 1,
            Err(code) => break code,
        }
        ensure!(stored < 1_000, "64 MiB are never full");
    };
    ensure!(code == 19, "a full disk is NOT_ENOUGH_REPLICAS (19), which clients retry, not {code}");
    // Asked for before each record.
    ensure!(known_at.is_some(), "a record was refused that the node said it would take, after {stored}");
    let full = Scrape::of(&cloud).await;
    ensure!(full.sum("tributary_cloud_wal_budget_ratio") == 1.0, "the ratio is 1 when full: {full:?}");
    alarms.ring(
        &before,
        &full,
        &[
            "TributaryCloudWalNearlyFull",
            "TributaryCloudCannotStore",
            "TributaryCloudProduceRefused",
            "TributaryCloudDiskLow",
        ],
    );
    // Consumers are served.
    ensure!(admin::is_ready(lab.cloud.admin).await, "a full disk takes nobody off the network");
    let end = client.list_offset("t", 0, -1).await?;
    ensure!(end == stored, "{end} records of {stored}");
    std::fs::remove_file(&filler)?;
    ensure!(takes().await?, "there is room again");
    client.produce("t", &[7; 64 << 10]).await?;
    cloud.stop().await?;
    Ok(true)
}
