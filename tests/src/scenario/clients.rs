//! Kafka clients as they are: producing, consuming in groups and looking around, on one start of the cloud broker.

use std::process::Command;

use anyhow::{Result, ensure};

use super::Context;
use crate::process::run_to_end;

pub async fn kcat_confluent_and_java_on_one_broker(context: &Context) -> Result<String> {
    let lab = context.lab("clients")?;
    let mut cloud = lab.cloud()?;
    cloud.start().await?;
    let kafka = lab.cloud.kafka.to_string();

    let lines: String = (0..500).map(|n| format!("key-{n}:value-{n}\n")).collect();
    let input = lab.dir.join("lines");
    std::fs::write(&input, &lines)?;
    for codec in ["none", "gzip", "lz4", "snappy", "zstd"] {
        let topic = format!("kcat-{codec}");
        let mut produce = Command::new("kcat");
        produce
            .args(["-P", "-b", &kafka, "-t", &topic, "-K:", "-z", codec, "-X", "enable.idempotence=true", "-l"])
            .arg(&input);
        run_to_end(produce).await?;
        let mut consume = Command::new("kcat");
        consume.args(["-C", "-q", "-e", "-b", &kafka, "-t", &topic, "-o", "beginning", "-K:", "-X", "check.crcs=true"]);
        let read = String::from_utf8(run_to_end(consume).await?)?;
        ensure!(read == lines, "{codec}: kcat read {} bytes, wrote {}", read.len(), lines.len());
    }
    let mut list = Command::new("kcat");
    list.args(["-L", "-b", &kafka, "-J"]);
    let listed: serde_json::Value = serde_json::from_slice(&run_to_end(list).await?)?;
    let topics = listed["topics"].as_array().map_or(0, Vec::len);
    ensure!(topics >= 5, "kcat lists {topics} topics");

    let mut confluent = context.tools.script("everyday.py");
    confluent.arg(&kafka);
    let said = String::from_utf8(run_to_end(confluent).await?)?;
    ensure!(said.trim_end().ends_with("ok"), "{said}");
    let mut java = context.tools.java("Everyday");
    java.arg(&kafka);
    let said = String::from_utf8(run_to_end(java).await?)?;
    ensure!(said.trim_end().ends_with("ok"), "{said}");

    // All of it is still there after kill -9: an acknowledged produce is durable.
    cloud.kill()?;
    cloud.start().await?;
    let mut consume = Command::new("kcat");
    consume.args(["-C", "-q", "-e", "-b", &kafka, "-t", "kcat-zstd", "-o", "beginning", "-K:"]);
    ensure!(String::from_utf8(run_to_end(consume).await?)? == lines, "after kill -9");
    cloud.stop().await?;
    Ok(String::new())
}
