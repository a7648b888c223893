//! Programs that the tests bring along: readers and devices in Python and Java, kcat and the mosquitto tools. The script
//! `tests/run` installs what they need.

use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::judge::Record;
use crate::lab::{PATIENCE, until};
use crate::message::Message;
use crate::process::{open_log, run_to_end};

/// Where the tools are.
#[derive(Debug, Clone)]
pub struct Tools {
    /// `tests/clients` in the source tree.
    pub clients: PathBuf,
    /// What `tests/run` installed: a Python environment and the Java classes.
    pub installed: PathBuf,
}

impl Tools {
    pub fn find() -> Result<Self> {
        let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
        let workspace = tests.parent().context("the workspace")?;
        let tools = Self { clients: tests.join("clients"), installed: workspace.join("target/test-tools") };
        if !tools.python().is_file() {
            bail!("{} is missing: `tests/run` installs the tools", tools.python().display());
        }
        Ok(tools)
    }

    pub fn python(&self) -> PathBuf {
        self.installed.join("venv/bin/python")
    }

    /// A Python program of `tests/clients`.
    pub fn script(&self, name: &str) -> Command {
        let mut command = Command::new(self.python());
        command.arg("-u").arg(self.clients.join(name));
        command
    }

    /// A Java program of `tests/clients/java`.
    pub fn java(&self, class: &str) -> Command {
        let mut command = Command::new("java");
        let class_path = format!("{0}/java/classes:{0}/java/lib/*", self.installed.display());
        command.args(["-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xmx512m", "-cp", &class_path, class]);
        command
    }

    /// Reads a whole topic from the earliest offset by assignment, without a group.
    pub async fn read(&self, reader: Reader, kafka: SocketAddr, topic: &str) -> Result<Vec<Record>> {
        let mut command = match reader {
            Reader::Confluent => self.script("read.py"),
            Reader::Java => self.java("Read"),
        };
        command.args([&kafka.to_string(), topic]);
        let mut records = Vec::new();
        for line in run_to_end(command).await?.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
            let line: Line =
                serde_json::from_slice(line).with_context(|| String::from_utf8_lossy(line).into_owned())?;
            records.push(line.into_record()?);
        }
        records.sort_by_key(|r| (r.partition, r.offset));
        Ok(records)
    }

    /// What kcat tells of every record, which is less: partition, offset, timestamp, key and length of the value.
    pub async fn read_with_kcat(&self, kafka: SocketAddr, topic: &str) -> Result<Vec<(i32, i64, i64, String, i64)>> {
        let mut command = Command::new("kcat");
        command.args(["-C", "-q", "-e", "-b", &kafka.to_string(), "-t", topic, "-o", "beginning"]);
        command.args(["-X", "check.crcs=true", "-f", "%p %o %T %S %k\n"]);
        let text = String::from_utf8(run_to_end(command).await?)?;
        let mut lines = Vec::new();
        for line in text.lines() {
            let mut words = line.splitn(5, ' ');
            let mut word = || words.next().with_context(|| format!("kcat printed {line:?}"));
            let (p, o, t, s) = (word()?.parse()?, word()?.parse()?, word()?.parse()?, word()?.parse()?);
            lines.push((p, o, t, word()?.to_owned(), s));
        }
        lines.sort();
        Ok(lines)
    }
}

/// Which client reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reader {
    /// confluent-kafka for Python, on librdkafka.
    Confluent,
    /// The official Java client.
    Java,
}

/// What readers print, one line per record; bytes in base64.
#[derive(Deserialize)]
struct Line {
    p: i32,
    o: i64,
    t: i64,
    k: Option<String>,
    v: Option<String>,
    h: Vec<(String, Option<String>)>,
}

impl Line {
    fn into_record(self) -> Result<Record> {
        let bytes = |text: Option<String>| text.map(|t| from_base64(&t)).transpose();
        let headers =
            self.h.into_iter().map(|(name, value)| anyhow::Ok((name, bytes(value)?))).collect::<Result<_>>()?;
        let (key, value) = (bytes(self.k)?, bytes(self.v)?);
        Ok(Record { partition: self.p, offset: self.o, timestamp: self.t, key, value, headers })
    }
}

/// A device that is a program of its own: it reads messages as lines on its standard input and ends when all are through.
pub struct Outsider {
    name: &'static str,
    child: Child,
    input: Option<ChildStdin>,
}

impl Outsider {
    /// paho-mqtt 2.
    pub fn paho(tools: &Tools, mqtt: SocketAddr, client_id: &str, v5: bool, log: &Path) -> Result<Self> {
        let mut command = tools.script("publish_paho.py");
        command.args([mqtt.ip().to_string().as_str(), &mqtt.port().to_string(), client_id, if v5 { "5" } else { "4" }]);
        Self::spawn("paho-mqtt", command, log)
    }

    /// mosquitto_pub, once per few messages, repeated until it ends well.
    pub fn mosquitto_pub(tools: &Tools, mqtt: SocketAddr, client_id: &str, log: &Path) -> Result<Self> {
        let mut command = tools.script("publish_mosquitto.py");
        command.args([mqtt.ip().to_string().as_str(), &mqtt.port().to_string(), client_id]);
        Self::spawn("mosquitto_pub", command, log)
    }

    fn spawn(name: &'static str, mut command: Command, log: &Path) -> Result<Self> {
        let log = open_log(log)?;
        let mut child = command.stdin(Stdio::piped()).stdout(log.try_clone()?).stderr(log).spawn()?;
        let input = child.stdin.take();
        Ok(Self { name, child, input })
    }

    pub fn publish(&mut self, messages: &[Message]) -> Result<()> {
        let input = self.input.as_mut().context("input is closed")?;
        for message in messages {
            let line = serde_json::json!({
                "topic": message.topic, "qos": message.qos, "payload": to_base64(&message.payload), "user": message.user,
            });
            writeln!(input, "{line}").with_context(|| format!("{} has ended early", self.name))?;
        }
        Ok(input.flush()?)
    }

    /// Says that nothing more comes, and waits until all is acknowledged.
    pub async fn finish(mut self) -> Result<()> {
        drop(self.input.take());
        let name = self.name;
        let child = Arc::new(Mutex::new(&mut self.child));
        let status = until(&format!("{name} to be acknowledged all it sent"), PATIENCE * 2, async || {
            Ok(child.lock().unwrap_or_else(PoisonError::into_inner).try_wait()?)
        })
        .await?;
        if !status.success() {
            bail!("{name} ended with {status}");
        }
        Ok(())
    }
}

impl Drop for Outsider {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

pub fn to_base64(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0_u32, |w, b| (w << 8) | u32::from(*b)) << (8 * (3 - chunk.len()));
        for i in 0..4 {
            let sextet = (word >> (18 - 6 * i)) & 63;
            out.push(if i <= chunk.len() { ALPHABET[sextet as usize] as char } else { '=' });
        }
    }
    out
}

pub fn from_base64(text: &str) -> Result<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len() / 4 * 3);
    let (mut word, mut bits) = (0_u32, 0);
    for byte in text.bytes().filter(|b| *b != b'=') {
        let value = ALPHABET.iter().position(|a| *a == byte).with_context(|| format!("not base64: {text:?}"))?;
        word = (word << 6) | value as u32;
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            out.push((word >> bits) as u8);
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_of_rfc_4648() {
        for (plain, coded) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg=="), ("fooba", "Zm9vYmE=")]
        {
            assert_eq!(to_base64(plain.as_bytes()), coded);
            assert_eq!(from_base64(coded).expect("valid"), plain.as_bytes());
        }
        assert!(from_base64("a b").is_err());
    }
}
