//! The main job on a good day, packet by packet.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::process::Stdio;

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;

use super::Context;
use super::kill::drain;
use crate::device::Link;
use crate::lab::{Lab, now_ms};
use crate::packet::{self, PublishParts};
use crate::process::Broker;
use crate::tools::{Reader, from_base64};
use crate::{admin, judge};

pub async fn message_reaches_a_kafka_client_with_key_headers_and_time(context: &Context) -> Result<String> {
    let lab = context.lab("live")?;
    let (mut cloud, mut edge) = (lab.cloud()?, lab.edge()?);
    // The edge first: it stores without a cloud and sends once there is one.
    edge.start().await?;
    let before = now_ms();
    let mut old = Link::connect(lab.edge.mqtt, "old", false, true).await?;
    old.publish("factory/9/telemetry/t", &[0, 159, 255, 10]).await?;
    let mut new = Link::connect(lab.edge.mqtt, "new", true, true).await?;
    let user = [("unit".to_owned(), "°C".to_owned()), ("unit".to_owned(), "K".to_owned())];
    let parts = PublishParts {
        topic: "factory/9/telemetry/u",
        payload: b"",
        qos: 1,
        retain: false,
        duplicate: false,
        packet_id: 5,
        user: Some(&user),
    };
    new.write(|out| packet::publish(out, &parts)).await?;
    new.read().await?;
    let after = now_ms();
    // On no stream: delivered if anybody listens, never stored.
    old.publish("office/coffee", b"no").await?;
    cloud.start().await?;
    drain(&lab, "telemetry").await?;
    let records = context.tools.read(Reader::Confluent, lab.cloud.kafka, "telemetry").await?;
    let java = context.tools.read(Reader::Java, lab.cloud.kafka, "telemetry").await?;
    judge::same(("confluent-kafka", &records), ("the Java client", &java)).map_err(anyhow::Error::msg)?;
    let [first, second] = records.as_slice() else { bail!("expected two records, found {records:?}") };
    ensure!(first.key.as_deref() == Some(b"factory/9/telemetry/t") && first.value == Some(vec![0, 159, 255, 10]));
    ensure!(second.value == Some(Vec::new()), "an empty payload is an empty value, not null: {second:?}");
    for record in &records {
        ensure!(
            (before..=after).contains(&record.timestamp),
            "timestamp {} outside {before}..={after}",
            record.timestamp
        );
        let edge = record.headers.iter().find(|(name, _)| name == "tributary.edge").and_then(|(_, v)| v.as_deref());
        ensure!(edge == Some(b"gw-1"), "headers {:?}", record.headers);
    }
    let units: Vec<_> =
        second.headers.iter().filter(|(n, _)| n == "mqtt.user.unit").filter_map(|(_, v)| v.clone()).collect();
    ensure!(units == ["°C".as_bytes(), b"K"], "user properties {units:?}");
    edge.stop().await?;
    cloud.stop().await?;
    Ok(String::new())
}

pub async fn acknowledgements_leave_in_the_order_of_the_publishes(context: &Context) -> Result<String> {
    let lab = context.lab("order")?;
    let mut edge = lab.edge()?;
    edge.start().await?;
    for v5 in [false, true] {
        let mut link = Link::connect(lab.edge.mqtt, "d", v5, true).await?;
        // Two thirds lie on a stream and wait for the disk, one third does not: order must hold all the same (MQTT-4.6.0-2).
        let topics = ["factory/1/telemetry/a", "elsewhere", "factory/2/telemetry/b"];
        let none = [];
        link.write(|out| {
            for packet_id in 1..=300_u16 {
                let topic = topics[usize::from(packet_id) % 3];
                let user = v5.then_some(&none[..]);
                packet::publish(
                    out,
                    &PublishParts { topic, payload: b"x", qos: 1, retain: false, duplicate: false, packet_id, user },
                );
            }
        })
        .await?;
        for expected in 1..=300_u16 {
            let frame = link.read().await?;
            let found = (frame.kind(), frame.packet_id());
            ensure!(found == (packet::PUBACK, Some(expected)), "{found:?} where PUBACK {expected} was due");
        }
    }
    edge.stop().await?;
    Ok(String::new())
}

pub async fn retained_message_and_will_reach_a_subscriber(context: &Context) -> Result<String> {
    let lab = context.lab("retained")?;
    let mut edge = lab.edge()?;
    edge.start().await?;
    let mut device = Link::connect(lab.edge.mqtt, "d", false, true).await?;
    let parts = PublishParts {
        topic: "factory/1/telemetry/state",
        payload: b"on",
        qos: 1,
        retain: true,
        duplicate: false,
        packet_id: 1,
        user: None,
    };
    device.write(|out| packet::publish(out, &parts)).await?;
    device.read().await?;
    // A retained message outlives kill -9 once it is acknowledged.
    edge.kill()?;
    edge.start().await?;
    let mut late = Link::connect(lab.edge.mqtt, "late", true, true).await?;
    late.write(|out| packet::subscribe(out, 7, "factory/+/telemetry/#", 1, true)).await?;
    let suback = late.read().await?;
    ensure!(suback.kind() == packet::SUBACK && suback.packet_id() == Some(7));
    let retained = late.read().await?;
    let seen = packet::read_publish(&retained, true).context("a PUBLISH")?;
    ensure!(&seen.payload[..] == b"on" && retained.first & 1 == 1, "retained {retained:?}");
    if let Some(packet_id) = seen.packet_id {
        late.write(|out| packet::acknowledge(out, packet::PUBACK, packet_id)).await?;
    }
    late.write(packet::pingreq).await?;
    ensure!(late.read().await?.kind() == 13, "PINGRESP");
    edge.stop().await?;
    Ok(String::new())
}

pub async fn status_metrics_and_check_say_what_is_so(context: &Context) -> Result<String> {
    let lab = context.lab("status")?;
    let (mut cloud, mut edge) = (lab.cloud()?, lab.edge()?);
    cloud.start().await?;
    edge.start().await?;
    let mut device = Link::connect(lab.edge.mqtt, "d", false, true).await?;
    for n in 0..10 {
        device.publish("factory/1/telemetry/a", format!("{n}").as_bytes()).await?;
    }
    let next = drain(&lab, "telemetry").await?;
    ensure!(next == 10, "ten records were stored, next is {next}");
    let status = admin::edge_status(lab.edge.admin).await?;
    ensure!(status.id == "gw-1");
    let status = admin::cloud_status(lab.cloud.admin).await?;
    ensure!(status.records("telemetry") == 10 && !status.cluster_id.is_empty());
    let edge_metrics = admin::metrics(lab.edge.admin).await?;
    for name in [
        "stream_unsent_bytes",
        "oldest_unsent_seconds",
        "commit_seconds",
        "commit_messages",
        "disk_budget_ratio",
        "held_acks",
        "uplink_up",
        "written_bytes_total",
    ] {
        let name = format!("tributary_edge_{name}");
        let found =
            edge_metrics.keys().any(|k| k.starts_with(&name) || k.starts_with(&name.replace("edge_", "edge_stream_")));
        ensure!(found, "{name} is not among {:?}", edge_metrics.keys().collect::<Vec<_>>());
    }
    let cloud_metrics = admin::metrics(lab.cloud.admin).await?;
    for name in metrics_in_monitoring() {
        let served = if name.starts_with("tributary_edge") { &edge_metrics } else { &cloud_metrics };
        ensure!(served.keys().any(|k| k.starts_with(&name)), "docs/monitoring names {name}, which no broker serves");
    }
    for broker in [&edge, &cloud] {
        for path in ["/livez", "/readyz"] {
            let (code, _) = admin::get(broker.admin, path).await?;
            ensure!(code == 200, "{path} of {} answers {code}", broker.kind.program());
        }
        let config = broker.config.to_string_lossy().into_owned();
        let text =
            String::from_utf8(crate::process::run_to_end(broker.command(&["check", "--config", &config])).await?)?;
        ensure!(text.contains("data_dir"), "check prints the effective configuration: {text}");
        let url = format!("http://{}", broker.admin);
        let text = String::from_utf8(crate::process::run_to_end(broker.command(&["status", "--admin", &url])).await?)?;
        ensure!(text.contains("telemetry"), "status prints a table: {text}");
    }
    edge.stop().await?;
    cloud.stop().await?;
    Ok(String::new())
}

/// Every metric that the alert rules and the dashboard use.
fn metrics_in_monitoring() -> BTreeSet<String> {
    let texts =
        [include_str!("../../../docs/monitoring/alerts.yml"), include_str!("../../../docs/monitoring/dashboard.json")];
    let words = texts.iter().flat_map(|text| text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_'));
    words.filter(|w| w.starts_with("tributary_edge_") || w.starts_with("tributary_cloud_")).map(str::to_owned).collect()
}

/// A row as `tributary-edge tail --json` prints it.
#[derive(Debug)]
pub struct Row {
    pub offset: i64,
    pub timestamp_ms: i64,
    pub key: Option<Vec<u8>>,
    pub value: Option<Vec<u8>>,
}

#[derive(Deserialize)]
struct RowLine {
    offset: i64,
    timestamp_ms: i64,
    key: Option<String>,
    value: Option<String>,
}

/// The first `count` rows that the edge has of a stream.
pub async fn tail(lab: &Lab, edge: &Broker, stream: &str, count: usize) -> Result<Vec<Row>> {
    let url = format!("http://{}", lab.edge.admin);
    let mut command = edge.command(&["tail", stream, "--from", "0", "--json", "--admin", &url]);
    let read = move || -> Result<Vec<Row>> {
        let mut child = command.stdout(Stdio::piped()).spawn()?;
        let mut rows = Vec::new();
        let output = child.stdout.take().context("its output")?;
        for line in BufReader::new(output).lines().take(count) {
            let line: RowLine = serde_json::from_str(&line?)?;
            let bytes = |text: Option<String>| text.map(|t| from_base64(&t)).transpose();
            rows.push(Row {
                offset: line.offset,
                timestamp_ms: line.timestamp_ms,
                key: bytes(line.key)?,
                value: bytes(line.value)?,
            });
        }
        // It follows the stream for ever; we have what we came for.
        child.kill()?;
        child.wait()?;
        Ok(rows)
    };
    tokio::task::spawn_blocking(read).await?
}
