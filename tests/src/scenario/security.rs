//! TLS and tokens on the link: who may send what, and what a refusal looks like at the gateway.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};

use super::Context;
use super::kill::drain;
use crate::admin;
use crate::device::Link;
use crate::lab::{Lab, PATIENCE, until};
use crate::process::{Broker, run_to_end};

pub async fn tls_and_token_let_the_right_edge_in(context: &Context) -> Result<String> {
    let mut lab = context.lab("tls")?;
    let ca = Authority::make(&lab.dir, "ca").await?;
    let certificate = ca.issue("server").await?;
    secure_cloud(&mut lab, &certificate, "topics = [\"telemetry\"]")?;
    lab.edge.streams += "[[stream]]\nname = \"forbidden\"\nfilters = [\"forbidden/#\"]\n";
    secure_edge(&mut lab, &ca, "gw-1-token")?;
    let (mut cloud, mut edge) = (lab.cloud()?, lab.edge()?);
    cloud.start().await?;
    edge.start().await?;
    let mut device = Link::connect(lab.edge.mqtt, "d", false, true).await?;
    device.publish("forbidden/a", b"stays here").await?;
    for n in 0..20 {
        device.publish("factory/1/telemetry/a", format!("{n}").as_bytes()).await?;
    }
    // A stream that may not go is parked with a reason; the others go on.
    ensure!(drain(&lab, "telemetry").await? == 20);
    let why = until("the forbidden stream to be parked", PATIENCE, async || {
        let status = admin::edge_status(lab.edge.admin).await?;
        Ok(status.stream("forbidden").and_then(|s| s.parked.clone()))
    })
    .await?;
    let status = admin::edge_status(lab.edge.admin).await?;
    ensure!(status.stream("forbidden").is_some_and(|s| s.next == 1 && s.durable == 0), "{status:?}");
    edge.stop().await?;
    cloud.stop().await?;
    Ok(format!("parked: {why}"))
}

pub async fn wrong_token_wrong_id_and_wrong_certificate_are_refused(context: &Context) -> Result<String> {
    let mut lab = context.lab("refused")?;
    let (ca, stranger) = (Authority::make(&lab.dir, "ca").await?, Authority::make(&lab.dir, "stranger").await?);
    let certificate = ca.issue("server").await?;
    secure_cloud(&mut lab, &certificate, "")?;
    let mut cloud = lab.cloud()?;
    cloud.start().await?;
    let mut published = 0;
    for (id, token, authority, complaint) in [
        ("gw-1", "not-the-token", &ca, "token"),
        ("gw-2", "gw-1-token", &ca, "token"),
        ("gw-1", "gw-1-token", &stranger, "certificate"),
    ] {
        lab.edge.id = id.into();
        secure_edge(&mut lab, authority, token)?;
        let mut edge = lab.edge()?;
        let from = edge.log_text().len();
        edge.start().await?;
        let mut device = Link::connect(lab.edge.mqtt, "d", false, true).await?;
        device.publish("factory/1/telemetry/a", b"kept until it may go").await?;
        published += 1;
        said(&edge, from, complaint).await?;
        let status = admin::edge_status(lab.edge.admin).await?;
        ensure!(status.stream("telemetry").is_some_and(|s| s.durable == 0), "nothing may have gone: {status:?}");
        edge.stop().await?;
    }
    // With the right papers all that was kept goes.
    lab.edge.id = "gw-1".into();
    secure_edge(&mut lab, &ca, "gw-1-token")?;
    let mut edge = lab.edge()?;
    edge.start().await?;
    ensure!(drain(&lab, "telemetry").await? == published);
    edge.stop().await?;
    cloud.stop().await?;
    Ok(String::new())
}

/// Waits until the edge has logged a line that names what is wrong.
async fn said(edge: &Broker, from: usize, complaint: &str) -> Result<()> {
    until(&format!("{complaint:?} in {}", edge.log.display()), PATIENCE, async || {
        let text = edge.log_text();
        Ok(text.get(from..).is_some_and(|t| t.to_lowercase().contains(complaint)).then_some(()))
    })
    .await
}

fn secure_cloud(lab: &mut Lab, certificate: &Certificate, more: &str) -> Result<()> {
    let token = lab.dir.join("gw-1.token");
    std::fs::write(&token, "gw-1-token\n")?;
    lab.cloud.link_extra = format!(
        "tls = {{ cert_file = {:?}, key_file = {:?} }}\n[[link.edge]]\nid = \"gw-1\"\ntoken_file = {token:?}\n{more}\n",
        certificate.chain, certificate.key
    );
    Ok(())
}

fn secure_edge(lab: &mut Lab, authority: &Authority, token: &str) -> Result<()> {
    let file = lab.dir.join("edge.token");
    std::fs::write(&file, token)?;
    lab.edge.uplink_url = format!("https://{}", lab.cloud.link);
    lab.edge.uplink_extra = format!("ca_file = {:?}\ntoken_file = {file:?}\n", authority.certificate);
    Ok(())
}

/// A certificate authority of the test's own.
pub struct Authority {
    dir: PathBuf,
    name: String,
    certificate: PathBuf,
}

pub struct Certificate {
    pub chain: PathBuf,
    pub key: PathBuf,
}

impl Authority {
    pub async fn make(dir: &Path, name: &str) -> Result<Self> {
        let certificate = dir.join(format!("{name}.pem"));
        let mut command = Command::new("openssl");
        command.args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            "2",
        ]);
        command.args(["-subj", &format!("/CN={name}"), "-addext", "basicConstraints=critical,CA:TRUE"]);
        command.arg("-keyout").arg(dir.join(format!("{name}.key"))).arg("-out").arg(&certificate);
        run_to_end(command).await?;
        Ok(Self { dir: dir.to_owned(), name: name.to_owned(), certificate })
    }

    /// A server certificate for 127.0.0.1.
    pub async fn issue(&self, name: &str) -> Result<Certificate> {
        let file = |end: &str| self.dir.join(format!("{name}.{end}"));
        let mut request = Command::new("openssl");
        request.args([
            "req",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-subj",
            "/CN=server",
        ]);
        request.arg("-keyout").arg(file("key")).arg("-out").arg(file("csr"));
        run_to_end(request).await?;
        std::fs::write(file("ext"), "subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n")?;
        let mut sign = Command::new("openssl");
        sign.args(["x509", "-req", "-days", "2", "-CAcreateserial"]);
        sign.arg("-in").arg(file("csr")).arg("-CA").arg(&self.certificate);
        sign.arg("-CAkey").arg(self.dir.join(format!("{}.key", self.name)));
        sign.arg("-extfile").arg(file("ext")).arg("-out").arg(file("pem"));
        run_to_end(sign).await?;
        Ok(Certificate { chain: file("pem"), key: file("key") })
    }
}
