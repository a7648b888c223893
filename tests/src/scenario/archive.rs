//! The bucket is enough: a cloud node that lost its disk comes back from the archive, and edges send what was not safe there.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::{Child, Stdio};

use anyhow::{Context as _, Result, bail, ensure};

use super::Context;
use super::kill::{compare_readers, drain};
use crate::device::Link;
use crate::judge::Record;
use crate::lab::{Lab, PATIENCE, free_port, until};
use crate::process::{open_log, signal};
use crate::tools::Reader;
use crate::{admin, kafka};

pub async fn cloud_comes_back_from_the_bucket_alone(context: &Context) -> Result<String> {
    let mut lab = context.lab("archive")?;
    // Long enough that the second half is on the disk only when that is lost.
    lab.cloud.archive_extra = "max_lag = \"5s\"\nsegment_bytes = \"16 KiB\"\nsegment_age = \"1s\"\n".into();
    lose_the_disk(context, lab).await
}

pub async fn cloud_comes_back_from_an_s3_bucket(context: &Context) -> Result<String> {
    let mut lab = context.lab("s3")?;
    let s3 = Moto::start(context, &lab).await?;
    lab.cloud.archive = Some("s3://bucket/tributary".into());
    lab.cloud.env = environment(s3.address);
    lose_the_disk(context, lab).await
}

async fn lose_the_disk(context: &Context, lab: Lab) -> Result<String> {
    let (mut cloud, mut edge) = (lab.cloud()?, lab.edge()?);
    cloud.start().await?;
    edge.start().await?;
    let mut device = Link::connect(lab.edge.mqtt, "d", false, true).await?;
    let mut sent = 0;
    for _ in 0..300 {
        device.publish("factory/1/telemetry/a", format!("n-{sent}").as_bytes()).await?;
        sent += 1;
    }
    // Half of it safely in the bucket, half perhaps only on the disk that is about to be lost.
    let safe = until("the first half to be in the archive", PATIENCE, async || {
        let status = admin::edge_status(lab.edge.admin).await?;
        Ok(status.stream("telemetry").filter(|s| s.safe == s.next).map(|s| s.safe))
    })
    .await?;
    let before = context.tools.read(Reader::Confluent, lab.cloud.kafka, "telemetry").await?;
    ensure!(safe == sent && before.len() as i64 == sent, "{} records, {safe} safe of {sent}", before.len());
    let cluster = admin::cloud_status(lab.cloud.admin).await?.cluster_id;
    for _ in 0..300 {
        device.publish("factory/1/telemetry/a", format!("n-{sent}").as_bytes()).await?;
        sent += 1;
    }
    drain(&lab, "telemetry").await?;
    cloud.kill()?;
    std::fs::remove_dir_all(&lab.cloud.data_dir)?;
    cloud.start().await?;

    // The edge learns that the cloud stands further back and sends again what was not safe.
    until("the records to be back", PATIENCE, async || {
        let records = kafka::Client::connect(lab.cloud.kafka).await?.batches("telemetry").await?;
        Ok(records.last().map(|b| b.last_offset).filter(|_| !records.is_empty()).map(|_| ()))
    })
    .await?;
    for _ in 0..50 {
        device.publish("factory/1/telemetry/a", format!("n-{sent}").as_bytes()).await?;
        sent += 1;
    }
    drain(&lab, "telemetry").await?;
    let after = context.tools.read(Reader::Confluent, lab.cloud.kafka, "telemetry").await?;
    ensure!(admin::cloud_status(lab.cloud.admin).await?.cluster_id == cluster, "the cluster id is the bucket's");
    if let Some((old, new)) = before.iter().zip(&after).find(|(old, new)| old != new) {
        bail!("an archived record changed: {old:?} became {new:?}");
    }
    let mut places: BTreeMap<Vec<u8>, Vec<&Record>> = BTreeMap::new();
    for record in &after {
        places.entry(record.value.clone().context("a value")?).or_default().push(record);
    }
    for n in 0..sent {
        let copies = places.get(format!("n-{n}").as_bytes()).map_or(0, Vec::len);
        ensure!(copies == 1, "n-{n} is there {copies} times");
    }
    compare_readers(context, &lab, &after).await?;
    let jump = after.windows(2).map(|w| w[1].offset - w[0].offset).max().unwrap_or(0);
    ensure!(jump == 1 || jump > 1 << 32, "after a loss offsets go on far above, not {jump} further");
    edge.stop().await?;
    cloud.stop().await?;
    Ok(format!("{sent} records, greatest step between offsets {jump}"))
}

/// moto: a server of the S3 protocol, for syntax and errors.
pub struct Moto {
    child: Child,
    pub address: SocketAddr,
}

impl Moto {
    pub async fn start(context: &Context, lab: &Lab) -> Result<Self> {
        let address = free_port()?;
        let log = open_log(&lab.dir.join("moto.log"))?;
        let mut command = std::process::Command::new(context.tools.installed.join("venv/bin/moto_server"));
        command.args(["-H", &address.ip().to_string(), "-p", &address.port().to_string()]);
        let child = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn().context("moto_server")?;
        let moto = Self { child, address };
        until("moto to listen", PATIENCE, async || Ok(admin::get(address, "/moto-api/").await.ok().map(|_| ())))
            .await?;
        let mut create = context.tools.script("make_bucket.py");
        create.args([&format!("http://{address}"), "bucket"]);
        crate::process::run_to_end(create).await?;
        Ok(moto)
    }
}

/// What the cloud needs to know of an S3 server, in the variables that every tool of this trade reads.
pub fn environment(address: SocketAddr) -> Vec<(String, String)> {
    let endpoint = format!("http://{address}");
    let pairs = [
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_REGION", "us-east-1"),
        ("AWS_ENDPOINT_URL", &endpoint),
        ("AWS_ALLOW_HTTP", "true"),
    ];
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

impl Moto {
    /// It takes connections and answers nothing any more.
    pub fn pause(&self) -> Result<()> {
        signal(self.child.id(), "STOP")
    }

    pub fn resume(&self) -> Result<()> {
        signal(self.child.id(), "CONT")
    }

    /// From here on it wants credentials of a user that it knows, and it knows none.
    pub async fn refuse_everybody(&self) -> Result<()> {
        self.count_open_requests("0").await
    }

    /// It takes any credentials again.
    pub async fn refuse_nobody(&self) -> Result<()> {
        self.count_open_requests("1000000000").await
    }

    /// How many requests are served without a look at their credentials.
    async fn count_open_requests(&self, count: &str) -> Result<()> {
        let (code, body) = admin::post(self.address, "/moto-api/reset-auth", count).await?;
        ensure!(code == 200, "moto answered {code}: {body}");
        Ok(())
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
