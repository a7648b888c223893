//! Someone else's tool reads an archive by `docs/formats.md`.

use std::process::Command;

use serde_json::Value;
use shared::batch::Compression;

use super::lab::{Node, Place, partition, rich};

/// What `tests/clients/read_archive.py` prints: Python with its standard library, and none of our code.
pub fn read(place: &Place, arguments: &[&str]) -> Vec<Value> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/clients/read_archive.py");
    let output = Command::new("python3").arg(script).arg(place.path()).args(arguments).output();
    let output = output.expect("python3 is there");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines = String::from_utf8(output.stdout).unwrap();
    lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The same from the node.
pub async fn expected(node: &Node, topic: u8, index: u32, from: i64) -> Vec<Value> {
    let mut lines = Vec::new();
    for batch in node.read_all(partition(topic, index)).await {
        if batch.is_control() || batch.last_offset() < from {
            continue;
        }
        if batch.compression() != Compression::None {
            let codec = if batch.compression() == Compression::Lz4 { 3 } else { 4 };
            let (base, last) = (batch.base_offset(), batch.last_offset());
            lines.push(serde_json::json!({"base": base, "last": last, "codec": codec}));
            continue;
        }
        for record in batch.records(1 << 20).unwrap().map(Result::unwrap).filter(|record| record.offset >= from) {
            let text = |bytes: Option<bytes::Bytes>| bytes.map(|bytes| String::from_utf8(bytes.to_vec()).unwrap());
            lines.push(serde_json::json!({
                "offset": record.offset,
                "timestamp": record.timestamp,
                "key": text(record.key),
                "value": text(record.value),
            }));
        }
    }
    lines
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_independent_reader_gets_every_record_by_the_documented_layout() {
    let place = Place::directory();
    let node = rich(&place).await;
    for (topic, index) in [(1, 0), (1, 1), (1, 2), (2, 0)] {
        let wanted = expected(&node, topic, index, 0).await;
        assert!(!wanted.is_empty());
        assert_eq!(read(&place, &[&format!("topic-{topic}"), &index.to_string()]), wanted);
    }
    // From an offset within a batch, by the sparse index: in the first run, in the second, in the shipped log.
    let end = shared::log::Log::bounds(node.shard.as_ref(), partition(2, 0)).unwrap().high_watermark;
    for from in [1, 35, 40, end - 40, end - 29, end - 1, end] {
        let wanted = expected(&node, 2, 0, from).await;
        assert_eq!(read(&place, &["topic-2", "0", &from.to_string()]), wanted, "from {from}");
    }
    // A run that is long enough for several entries of the index.
    for from in [1, 100, 239] {
        let wanted = expected(&node, 1, 0, from).await;
        assert_eq!(read(&place, &["topic-1", "0", &from.to_string()]), wanted, "from {from}");
    }
    node.stop().await;
}
