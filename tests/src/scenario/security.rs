//! TLS and tokens on the link: who may send what, and what a refusal looks like at the gateway.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

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

/// More silent connections than the process may have descriptors, on one door after the other.
pub async fn silent_connections_keep_nobody_out(context: &Context) -> Result<String> {
    const FILES: usize = 400;
    let lab = context.lab("silent")?;
    let (mut cloud, mut edge) = (lab.cloud()?, lab.edge()?);
    for broker in [&mut cloud, &mut edge] {
        broker.wrapper = vec!["prlimit".into(), format!("--nofile={FILES}:{FILES}")];
    }
    cloud.start().await?;
    edge.start().await?;
    ensure!(cloud.log_text().contains("kafka.connections_max = 10000: lowered to"), "see {}", cloud.log.display());
    for door in [lab.cloud.kafka, lab.cloud.link, lab.cloud.admin, lab.edge.admin] {
        // Some say nothing, some say half of something.
        let beginnings: [&[u8]; 4] = [b"", b"\0\0", b"PRI * HT", b"GET /status HTTP/1.1\r\nHost: lo"];
        let mut silent = Vec::new();
        for n in 0..FILES + 100 {
            let mut socket = TcpStream::connect(door).await?;
            // A socket closed in favour of another may be gone already.
            let _ = socket.write_all(beginnings[n % 4]).await;
            silent.push(socket);
        }
        admin::cloud_status(lab.cloud.admin).await?;
        admin::edge_status(lab.edge.admin).await?;
        let mut kafka = TcpStream::connect(lab.cloud.kafka).await?;
        kafka.write_all(b"\0\0\0\x0a\0\x12\0\0\0\0\0\x07\xff\xff").await?;
        let answer = tokio::time::timeout(PATIENCE, kafka.read_u32()).await??;
        ensure!(answer > 10, "Kafka answered {answer} bytes while {door} was full");
        let (code, text) = admin::post(lab.cloud.link, "/link/v1/hello", "no hello").await?;
        ensure!(code == 400, "the link answered {code} {text} while {door} was full");
        drop(silent);
    }
    let (_, metrics) = admin::get(lab.cloud.admin, "/metrics").await?;
    for listener in ["kafka", "link", "admin"] {
        let name = format!("tributary_cloud_connections_evicted_total{{listener=\"{listener}\"}} ");
        let evicted = metrics.lines().find_map(|line| line.strip_prefix(&name)).unwrap_or("0").to_owned();
        ensure!(evicted != "0", "no silent connection left the {listener} door:\n{metrics}");
    }
    edge.stop().await?;
    cloud.stop().await?;
    Ok(format!("{} silent connections at {FILES} descriptors, on each of 4 ports", FILES + 100))
}

/// Every file and directory is its owner's alone, also where an older one was open to others; secrets that others can read are told.
pub async fn data_is_for_its_owner_alone(context: &Context) -> Result<String> {
    use std::os::unix::fs::PermissionsExt as _;
    let open = |path: &Path, mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode));
    let mut lab = context.lab("modes")?;
    let ca = Authority::make(&lab.dir, "ca").await?;
    let certificate = ca.issue("server").await?;
    secure_cloud(&mut lab, &certificate, "")?;
    secure_edge(&mut lab, &ca, "gw-1-token")?;
    std::fs::create_dir_all(&lab.edge.data_dir)?;
    open(&lab.edge.data_dir, 0o755)?;
    for (name, mode) in [("edge.token", 0o644), ("gw-1.token", 0o604), ("server.key", 0o600)] {
        open(&lab.dir.join(name), mode)?;
    }
    let (mut cloud, mut edge) = (lab.cloud()?, lab.edge()?);
    cloud.start().await?;
    edge.start().await?;
    let mut device = Link::connect(lab.edge.mqtt, "d", false, true).await?;
    device.publish("factory/1/telemetry/a", b"x").await?;
    ensure!(drain(&lab, "telemetry").await? == 1);
    until("something in the archive", PATIENCE, async || {
        Ok(std::fs::read_dir(lab.dir.join("archive"))?.next().map(|_| ()))
    })
    .await?;
    let mut seen = 0;
    for root in [&lab.edge.data_dir, &lab.cloud.data_dir, &lab.dir.join("archive")] {
        let mut left = vec![root.clone()];
        while let Some(path) = left.pop() {
            // A file may be gone between the listing and now.
            let Ok(data) = std::fs::symlink_metadata(&path) else { continue };
            let mode = data.permissions().mode() & 0o7777;
            ensure!(mode & 0o077 == 0, "{} has mode {mode:04o}", path.display());
            seen += 1;
            if data.is_dir() {
                left.extend(std::fs::read_dir(&path)?.flatten().map(|entry| entry.path()));
            }
        }
    }
    for (broker, file, named) in
        [(&edge, "edge.token", true), (&cloud, "gw-1.token", true), (&cloud, "server.key", false)]
    {
        let config = broker.config.to_string_lossy().into_owned();
        let checked = String::from_utf8(run_to_end(broker.command(&["check", "--config", &config])).await?)?;
        for text in [broker.log_text(), checked] {
            let said = text.lines().any(|line| line.contains("WARN") && line.contains(file));
            ensure!(said == named, "{file} (told: {said}) in\n{text}");
        }
    }
    edge.stop().await?;
    cloud.stop().await?;
    Ok(format!("{seen} files and directories"))
}

/// Mistakes about a secret are told without the secret.
pub async fn no_error_shows_a_secret(context: &Context) -> Result<String> {
    const SECRET: &str = "hunter2";
    let lab = context.lab("secrets")?;
    let (cloud, edge) = (lab.cloud()?, lab.edge()?);
    let mut count = 0;
    for (broker, key, value) in [
        (&edge, "TRIBUTARY_EDGE__UPLINK__TOKN", SECRET.to_owned()),
        (&edge, "TRIBUTARY_EDGE__UPLINK__TOKEN__VALUE", SECRET.to_owned()),
        (&edge, "TRIBUTARY_EDGE__UPLINK", SECRET.to_owned()),
        (&edge, "TRIBUTARY_EDGE__TOKEN", SECRET.to_owned()),
        (&edge, "TRIBUTARY_EDGE__MQTT__USER", format!("[{{ name = \"a\", pasword = \"{SECRET}\" }}]")),
        (&edge, "TRIBUTARY_EDGE__MQTT__USER", format!("[{{ name = \"a\", password = \"{SECRET}\" ")),
        (&edge, "TRIBUTARY_EDGE__UPLINK__URL", format!("ftp://user:{SECRET}@host/?key={SECRET}")),
        (&cloud, "TRIBUTARY_CLOUD__LINK__EDGE", format!("[{{ id = \"gw\", tokn = \"{SECRET}\" }}]")),
        (&cloud, "TRIBUTARY_CLOUD__LINK__TOKEN", SECRET.to_owned()),
        (&cloud, "TRIBUTARY_CLOUD__ARCHIVE__URL", format!("gopher://key:{SECRET}@bucket")),
    ] {
        for word in ["check", "run"] {
            let config = broker.config.to_string_lossy().into_owned();
            let mut command = broker.command(&[word, "--config", &config]);
            command.env(key, &value);
            let output = tokio::task::spawn_blocking(move || command.output()).await??;
            let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
            ensure!(!output.status.success(), "{key} was taken");
            ensure!(!said.contains(SECRET), "{word} with {key} shows the secret:\n{said}");
            count += 1;
        }
    }
    // A URL with a password in it is shown without.
    let mut command = edge.command(&["check"]);
    command.env("TRIBUTARY_EDGE__UPLINK__URL", format!("https://user:{SECRET}@host"));
    let said = String::from_utf8(run_to_end(command).await?)?;
    ensure!(said.contains("(hidden)@host") && !said.contains(SECRET), "{said}");
    Ok(format!("{count} mistakes"))
}

pub async fn admin_port_answers_to_its_own_name_and_token(context: &Context) -> Result<String> {
    let mut lab = context.lab("admin")?;
    let (token, wrong) = (lab.dir.join("admin.token"), lab.dir.join("wrong.token"));
    std::fs::write(&token, "open sesame\n")?;
    std::fs::write(&wrong, "open barley\n")?;
    lab.edge.admin_extra = format!("token_file = {token:?}\nhosts = [\"gateway.example\"]\n");
    let mut edge = lab.edge()?;
    edge.start().await?;
    for (host, authorization, code) in [
        ("localhost", "Bearer open sesame", 200),
        ("gateway.example:80", "Bearer open sesame", 200),
        ("evil.example", "Bearer open sesame", 421),
        ("localhost", "Bearer open barley", 401),
        ("localhost", "Basic open sesame", 401),
    ] {
        let (got, text) = admin::get_as(lab.edge.admin, "/status", host, authorization).await?;
        ensure!(got == code, "{host} with {authorization}: {got} {text}");
        ensure!(!text.contains("sesame"), "{text}");
    }
    for path in ["/status", "/metrics", "/streams/telemetry/records"] {
        ensure!(admin::get(lab.edge.admin, path).await?.0 == 401, "{path} is open");
    }
    ensure!(admin::get(lab.edge.admin, "/livez").await?.0 == 200, "health is for everybody");
    let url = format!("http://{}", lab.edge.admin);
    let status =
        |file: &Path| edge.command(&["status", "--admin", &url, "--admin-token-file", &file.to_string_lossy()]);
    run_to_end(status(&token)).await?;
    ensure!(run_to_end(status(&wrong)).await.is_err(), "a wrong token was taken");
    edge.stop().await?;
    Ok(String::new())
}

pub async fn ten_thousand_bad_requests_are_a_few_lines(context: &Context) -> Result<String> {
    const REQUESTS: usize = 10_000;
    let lab = context.lab("lines")?;
    let mut cloud = lab.cloud()?;
    cloud.start().await?;
    let warnings = || cloud.log_text().lines().filter(|line| line.contains(" WARN ")).count();
    let from = warnings();
    let began = tokio::time::Instant::now();
    let (mut read, mut write) = TcpStream::connect(lab.cloud.link).await?.into_split();
    let writing = tokio::spawn(async move {
        let one = b"POST /link/v1/hello HTTP/1.1\r\nHost: x\r\nContent-Length: 7\r\n\r\nnothing";
        for _ in 0..REQUESTS / 100 {
            write.write_all(&one.repeat(100)).await?;
        }
        anyhow::Ok(write)
    });
    let (mut answers, mut text, mut bytes) = (0, Vec::new(), [0; 16 << 10]);
    while answers < REQUESTS {
        let n = tokio::time::timeout(PATIENCE, read.read(&mut bytes)).await??;
        ensure!(n > 0, "the link closed after {answers} answers");
        text.extend_from_slice(&bytes[..n]);
        let marker = b"HTTP/1.1 400";
        answers += text.windows(marker.len()).filter(|window| window == marker).count();
        text.drain(..text.len().saturating_sub(marker.len() - 1));
    }
    drop(writing.await??);
    for _ in 0..REQUESTS / 10 {
        let mut socket = TcpStream::connect(lab.cloud.kafka).await?;
        socket.write_all(b"GET / HTTP/1.1\r\n\r\n").await?;
        let _ = socket.read(&mut bytes).await;
    }
    let lines = warnings() - from;
    // Five of a kind in ten seconds.
    let most = 2 * 5 * (began.elapsed().as_secs() as usize / 10 + 1);
    ensure!(lines <= most, "{lines} lines, {most} at most; see {}", cloud.log.display());
    cloud.stop().await?;
    Ok(format!("{lines} lines for {REQUESTS} requests to the link and {} to Kafka", REQUESTS / 10))
}

pub async fn renewed_certificate_is_used_without_a_restart(context: &Context) -> Result<String> {
    let mut lab = context.lab("renewed")?;
    let (old, new) = (Authority::make(&lab.dir, "old").await?, Authority::make(&lab.dir, "new").await?);
    let certificate = old.issue("server").await?;
    secure_cloud(&mut lab, &certificate, "")?;
    secure_edge(&mut lab, &old, "gw-1-token")?;
    let (mut cloud, mut edge) = (lab.cloud()?, lab.edge()?);
    cloud.start().await?;
    edge.start().await?;
    let mut device = Link::connect(lab.edge.mqtt, "d", false, true).await?;
    device.publish("factory/1/telemetry/a", b"before").await?;
    ensure!(drain(&lab, "telemetry").await? == 1);
    // Something broken first: the old one stays in use.
    std::fs::write(&certificate.chain, "broken")?;
    until("an error about the broken certificate", PATIENCE, async || {
        let text = cloud.log_text();
        Ok(text.lines().any(|line| line.contains("ERROR") && line.contains("stays in use")).then_some(()))
    })
    .await?;
    device.publish("factory/1/telemetry/a", b"meanwhile").await?;
    ensure!(drain(&lab, "telemetry").await? == 2);
    // The other authority's certificate takes the place, and the gateway is told to trust that one.
    let renewed = new.issue("renewed").await?;
    std::fs::copy(&renewed.key, &certificate.key)?;
    std::fs::copy(&renewed.chain, &certificate.chain)?;
    until("the renewed certificate", PATIENCE, async || {
        let text = cloud.log_text();
        Ok(text.contains("the certificate has changed and is in use").then_some(()))
    })
    .await?;
    std::fs::copy(&new.certificate, &old.certificate)?;
    said(&edge, 0, "trusted certificates have changed and are in use").await?;
    device.publish("factory/1/telemetry/a", b"after").await?;
    ensure!(drain(&lab, "telemetry").await? == 3);
    edge.stop().await?;
    cloud.stop().await?;
    Ok(String::new())
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
