//! What must go wrong clearly: a clear error, nothing lost.

use std::net::SocketAddr;
use std::process::Command;

use anyhow::{Result, bail, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::Context;
use super::archive::{Moto, environment};
use super::kill::drain;
use crate::admin;
use crate::device::Link;
use crate::lab::{PATIENCE, Rng, until};
use crate::process::{Broker, run_to_end};
use crate::proxy::Proxy;

/// Starts a broker that must not start, and returns what it said.
pub async fn refused(broker: &mut Broker) -> Result<String> {
    let from = broker.log_text().len();
    broker.spawn()?;
    let status = broker.ended().await?;
    ensure!(!status.success(), "{} ended well although it could not start", broker.kind.program());
    ensure!(status.code().is_some_and(|c| c < 100), "{} ended with {status}: that is a crash", broker.kind.program());
    Ok(broker.log_text().split_off(from))
}

fn must_say(text: &str, words: &[&str]) -> Result<()> {
    for word in words {
        ensure!(text.to_lowercase().contains(&word.to_lowercase()), "the error does not say {word:?}:\n{text}");
    }
    Ok(())
}

pub async fn second_process_on_a_data_directory_is_refused(context: &Context) -> Result<String> {
    let lab = context.lab("second")?;
    let (mut cloud, mut edge) = (lab.cloud()?, lab.edge()?);
    cloud.start().await?;
    edge.start().await?;
    let mut other = context.lab("second-other")?;
    other.edge.data_dir = lab.edge.data_dir.clone();
    other.cloud.data_dir = lab.cloud.data_dir.clone();
    must_say(&refused(&mut other.edge()?).await?, &[&lab.edge.data_dir.to_string_lossy()])?;
    must_say(&refused(&mut other.cloud()?).await?, &[&lab.cloud.data_dir.to_string_lossy()])?;
    // The first ones never noticed.
    let mut device = Link::connect(lab.edge.mqtt, "d", false, true).await?;
    device.publish("factory/1/telemetry/a", b"still here").await?;
    drain(&lab, "telemetry").await?;
    edge.stop().await?;
    cloud.stop().await?;
    Ok(String::new())
}

pub async fn unusable_data_directory_is_an_error_that_names_it(context: &Context) -> Result<String> {
    let lab = context.lab("unusable")?;
    // Tests often run as root, who may write into a read-only directory: a file in its place stops root too.
    for dir in [&lab.edge.data_dir, &lab.cloud.data_dir] {
        std::fs::write(dir, b"in the way")?;
    }
    must_say(&refused(&mut lab.edge()?).await?, &[&lab.edge.data_dir.to_string_lossy()])?;
    must_say(&refused(&mut lab.cloud()?).await?, &[&lab.cloud.data_dir.to_string_lossy()])?;
    Ok(String::new())
}

pub async fn listener_beyond_loopback_is_refused_with_both_fixes(context: &Context) -> Result<String> {
    let mut lab = context.lab("beyond")?;
    let beyond = |at: SocketAddr| SocketAddr::from(([0, 0, 0, 0], at.port()));
    lab.edge.mqtt = beyond(lab.edge.mqtt);
    must_say(&refused(&mut lab.edge()?).await?, &["allow_anonymous", "mqtt.user"])?;
    lab.cloud.kafka = beyond(lab.cloud.kafka);
    must_say(&refused(&mut lab.cloud()?).await?, &["allow_anonymous", "127.0.0.1"])?;
    // Allowed, but no client can connect to an unspecified address.
    lab.cloud.kafka_extra = "allow_anonymous = true\n".into();
    must_say(&refused(&mut lab.cloud()?).await?, &["advertise"])?;
    Ok(String::new())
}

pub async fn unknown_and_wrong_keys_are_named(context: &Context) -> Result<String> {
    let mut lab = context.lab("keys")?;
    lab.edge.extra = "surprise = 1".into();
    must_say(&refused(&mut lab.edge()?).await?, &["surprise", "edge.toml"])?;
    lab.edge.extra = String::new();
    lab.cloud.extra = "colour = \"blue\"".into();
    must_say(&refused(&mut lab.cloud()?).await?, &["colour", "cloud.toml"])?;
    lab.cloud.extra = String::new();
    // `check` says the same without starting anything.
    let cloud = lab.cloud()?;
    std::fs::write(&cloud.config, "node_id = \"one\"\n")?;
    let config = cloud.config.to_string_lossy().into_owned();
    let Err(error) = run_to_end(cloud.command(&["check", "--config", &config])).await else {
        bail!("node_id = \"one\" was accepted")
    };
    must_say(&format!("{error:?}"), &["node_id"])?;
    Ok(String::new())
}

pub async fn malformed_bytes_on_every_port_hurt_nobody(context: &Context) -> Result<String> {
    let lab = context.lab("malformed")?;
    let (mut cloud, mut edge) = (lab.cloud()?, lab.edge()?);
    cloud.start().await?;
    edge.start().await?;
    let mut device = Link::connect(lab.edge.mqtt, "d", false, true).await?;
    device.publish("factory/1/telemetry/a", b"before").await?;
    let rounds = if context.full { 2_000 } else { 150 };
    let mut rng = Rng(context.seed);
    let ports = [lab.edge.mqtt, lab.edge.admin, lab.cloud.kafka, lab.cloud.link, lab.cloud.admin];
    for round in 0..rounds {
        for port in ports {
            throw(port, &junk(&mut rng, round)).await?;
        }
    }
    // The same connection still works, and so does everything behind it.
    device.publish("factory/1/telemetry/a", b"after").await?;
    ensure!(drain(&lab, "telemetry").await? == 2);
    for broker in [&mut edge, &mut cloud] {
        let panicked = broker.log_text().contains("panicked");
        ensure!(!panicked, "{} panicked; see {}", broker.kind.program(), broker.log.display());
        broker.stop().await?;
    }
    Ok(format!("{rounds} throws at each of {} ports", ports.len()))
}

/// Nonsense of several kinds: noise, lengths that promise much, cut packets, beginnings of the right protocol.
fn junk(rng: &mut Rng, round: u64) -> Vec<u8> {
    let mut bytes: Vec<u8> = match round % 8 {
        0 => Vec::new(),
        1 => b"\x10\xff\xff\xff\x7f\x00\x04MQTT".to_vec(),
        2 => b"\x10\x0e\0\x04MQTT\x04\x02\0\0\0\x02ab\x30\xff\xff\xff\xff\xff".to_vec(),
        3 => b"\x7f\xff\xff\xff\x00\x12\x00\x03".to_vec(),
        4 => b"\0\0\0\x20\0\x03\0\x08\0\0\0\x01\0\0\x7f\xff\xff\xff".to_vec(),
        5 => b"POST /link/v1/hello HTTP/1.1\r\nHost: x\r\nContent-Length: 18446744073709551615\r\n\r\n".to_vec(),
        6 => b"POST /link/v1/append HTTP/1.1\r\nHost: x\r\nContent-Length: 64\r\n\r\n".to_vec(),
        _ => b"GET /status?".to_vec(),
    };
    let length = rng.below(if round.is_multiple_of(5) { 20_000 } else { 200 });
    bytes.extend((0..length).map(|_| rng.next() as u8));
    bytes
}

async fn throw(at: SocketAddr, bytes: &[u8]) -> Result<()> {
    let mut socket = TcpStream::connect(at).await?;
    let exchange = async {
        socket.write_all(bytes).await?;
        socket.shutdown().await?;
        let mut answer = Vec::new();
        socket.read_to_end(&mut answer).await
    };
    // The broker may hang up in the middle, answer, or wait; only an end of its process would be wrong.
    let _ = tokio::time::timeout(std::time::Duration::from_millis(500), exchange).await;
    Ok(())
}

pub async fn unreachable_bucket_does_not_stop_the_cloud(context: &Context) -> Result<String> {
    let mut lab = context.lab("no-bucket")?;
    let s3 = Moto::start(context, &lab).await?;
    let way = Proxy::start(s3.address).await?;
    lab.cloud.archive = Some("s3://bucket/prefix".into());
    lab.cloud.env = environment(way.address);
    let (mut cloud, mut edge) = (lab.cloud()?, lab.edge()?);
    cloud.start().await?;
    edge.start().await?;
    way.cut();
    let mut device = Link::connect(lab.edge.mqtt, "d", false, true).await?;
    for n in 0..50 {
        device.publish("factory/1/telemetry/a", format!("{n}").as_bytes()).await?;
    }
    drain(&lab, "telemetry").await?;
    let status = admin::edge_status(lab.edge.admin).await?;
    let stream = status.stream("telemetry").cloned();
    ensure!(stream.as_ref().is_some_and(|s| s.safe < s.next), "nothing is safe without a bucket: {stream:?}");
    let mut read = Command::new("kcat");
    read.args(["-C", "-q", "-e", "-b", &lab.cloud.kafka.to_string(), "-t", "telemetry", "-o", "beginning"]);
    let lines = String::from_utf8(run_to_end(read).await?)?.lines().count();
    ensure!(lines == 50, "{lines} of 50 records are served from the WAL");
    way.mend();
    until("the bucket to be caught up with", PATIENCE, async || {
        let status = admin::edge_status(lab.edge.admin).await?;
        Ok(status.stream("telemetry").filter(|s| s.safe == s.next).map(|_| ()))
    })
    .await?;
    cloud.stop().await?;
    edge.stop().await?;
    Ok(String::new())
}
