//! The tool's promises, on archives that real shards made.

mod damage;
mod lab;
mod reader;
mod restore;

use std::collections::BTreeMap;

use bytes::Bytes;
use serde_json::Value;
use shared::batch::Batch;
use shared::log::Log;
use shared::name::Partition;

use super::{CLEAN, ToolError, run};
use crate::archive::tests::s3::S3;
use crate::config::CloudConfig;
use crate::wal::memory::MemoryWal;
use lab::{Node, Place, parse, partition, rich};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_whole_archive_is_clean_and_nothing_is_written_to_it() {
    let s3 = S3 { page: 1000, ..S3::default() };
    let place = Place::s3(s3.serve().await, "some/prefix");
    let node = rich(&place).await;
    node.stop().await;
    s3.log.lock().clear();
    let (code, out) = place.tool("verify").await.unwrap();
    assert_eq!((code, out.as_str()), (CLEAN, ""));
    let (code, out) = place.tool("ls --objects").await.unwrap();
    assert_eq!(code, CLEAN);
    assert!(out.contains("topic-1") && out.contains("some/prefix/shards/0/segments/"), "{out}");
    let (code, out) = place.tool("cat topic-2").await.unwrap();
    assert_eq!((code, out.lines().count()), (CLEAN, 3 * 33));
    let log = s3.log.lock().clone();
    assert!(log.iter().all(|line| line.starts_with("GET ")), "{log:?}");
    assert!(!log.iter().any(|line| line.contains("probe")), "{log:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_listing_says_what_the_node_has() {
    let place = Place::directory();
    let node = rich(&place).await;
    // Upkeep may publish between the two looks.
    let (listing, status) = loop {
        let before = node.archive.status().manifest_seq;
        let (_, out) = place.tool("ls --json").await.unwrap();
        let status = node.archive.status();
        if status.manifest_seq == before {
            break (serde_json::from_str::<Value>(&out).unwrap(), status);
        }
    };
    assert_eq!(listing["cluster_id"], node.archive.cluster_id());
    let shard = &listing["shards"][0];
    assert_eq!((&shard["root"], &shard["epoch"]), (&status.manifest_seq.into(), &status.epoch.into()));
    assert_eq!((&shard["trim"], &shard["wal_next"]), (&status.split_seq.into(), &status.shipped_seq.into()));
    assert_eq!((&shard["segments"], &shard["segment_bytes"]), (&status.segments.into(), &status.segment_bytes.into()));
    let lines: BTreeMap<(String, u64), &Value> = listing["partitions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|line| ((line["topic"].as_str().unwrap().to_owned(), line["partition"].as_u64().unwrap()), line))
        .collect();
    assert_eq!(lines.len(), 6);
    for (topic, index) in [(1, 0), (1, 1), (1, 2), (2, 0)] {
        let batches = node.read_all(partition(topic, index)).await;
        let line = lines[&(format!("topic-{topic}"), u64::from(index))];
        assert_eq!(line["from"], 0);
        assert_eq!(line["next"], node.shard.bounds(partition(topic, index)).unwrap().high_watermark);
        let bytes: usize = batches.iter().map(Batch::len).sum();
        assert_eq!(line["run_bytes"].as_u64().unwrap() + line["wal_bytes"].as_u64().unwrap(), bytes as u64);
        assert_eq!(line["first_timestamp"], batches[0].base_timestamp());
        assert_eq!(line["max_timestamp"], batches.iter().map(Batch::max_timestamp).max().unwrap());
        // The node may have split once more by itself.
        assert!(line["runs"].as_u64().unwrap() >= 2, "{line}");
    }
    let empty = lines[&("topic-3".to_owned(), 1)];
    // The record that began the second epoch is all there is.
    assert_eq!((&empty["from"], &empty["runs"]), (&(1i64 << 32).into(), &1.into()));
    node.stop().await;
}

/// What a consumer would get: every record but those of control batches.
async fn records(node: &Node, partition: Partition) -> Vec<(i64, i64, Vec<u8>)> {
    let mut records = Vec::new();
    for batch in node.read_all(partition).await.iter().filter(|batch| !batch.is_control()) {
        for record in batch.records(1 << 20).unwrap().map(Result::unwrap) {
            records.push((record.offset, record.timestamp, record.value.unwrap().to_vec()));
        }
    }
    records
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_come_out_as_they_went_in() {
    let place = Place::directory();
    let node = rich(&place).await;
    for (topic, index) in [(1, 0), (1, 2), (2, 0)] {
        let expected = records(&node, partition(topic, index)).await;
        let (code, out) = place.tool(&format!("cat topic-{topic} --partition {index}")).await.unwrap();
        assert_eq!(code, CLEAN);
        let lines: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let got: Vec<_> = lines
            .iter()
            .map(|line| {
                let value = line["value"].as_str().unwrap().as_bytes().to_vec();
                (line["offset"].as_i64().unwrap(), line["timestamp"].as_i64().unwrap(), value)
            })
            .collect();
        assert_eq!(got, expected);
        assert!(lines.iter().all(|line| line["partition"] == index && line["key"] == "key"));
        if topic == 1 {
            let header = serde_json::json!([{"name": "h", "value_base64": "/wA="}]);
            assert!(lines.iter().all(|line| line["headers"] == header), "{}", lines[0]);
        }

        let values: Vec<u8> = expected.iter().flat_map(|(_, _, value)| [value, &b"\n"[..]].concat()).collect();
        let (_, out) =
            place.tool_bytes(&format!("cat topic-{topic} --partition {index} --format value")).await.unwrap();
        assert!(out == values);

        let (_, raw) = place.tool_bytes(&format!("cat topic-{topic} --partition {index} --format raw")).await.unwrap();
        let (mut raw, mut batches) = (Bytes::from(raw), Vec::new());
        while let Some(batch) = Batch::split_first(&mut raw).unwrap() {
            batches.push(batch);
        }
        assert_eq!(batches, node.read_all(partition(topic, index)).await);
    }
    // From and to cut at the record, wherever it lies: in a segment, in another, across the hole, in the shipped log.
    let expected = records(&node, partition(1, 0)).await;
    for (from, to) in [(0, 1), (7, 23), (239, 341), (335, expected.len() - 150), (expected.len() - 21, expected.len())]
    {
        let (first, last) = (expected[from].0, expected[to - 1].0 + 1);
        let command = format!("cat {} --partition 0 --from {first} --to {last}", partition(1, 0).topic);
        let (_, out) = place.tool(&command).await.unwrap();
        let offsets: Vec<i64> =
            out.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["offset"].as_i64().unwrap()).collect();
        assert_eq!(offsets, expected[from..to].iter().map(|record| record.0).collect::<Vec<_>>(), "{from}..{to}");
    }
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_in_a_segment_and_in_the_shipped_log_comes_once() {
    let (place, copy) = (Place::directory(), Place::directory());
    let empty = (tempfile::tempdir().unwrap(), MemoryWal::new(16 << 20));
    let node = Node::start_shard(&place, empty.0, empty.1, 0, 60).await;
    node.create(1, 3).await;
    node.create(2, 1).await;
    node.shipped().await;
    // Until a shipped object holds blocks from below the trim and from above it: nothing can be shipped while a round
    // begins, so what is shipped then is from both sides.
    let (shipped, aside) = (place.path().join("shards/0/wal"), place.path().join("wal-aside"));
    for attempt in 0.. {
        assert!(attempt < 100, "shipping never reaches over a trim");
        let before = node.archive.status().manifest_seq;
        std::fs::rename(&shipped, &aside).unwrap();
        std::fs::write(&shipped, b"").unwrap();
        node.produce(1).await;
        node.archive.roll_now();
        // Small ones, so that an object holds many, and for some time, so that the round begins among them.
        node.trickle(30).await;
        std::fs::remove_file(&shipped).unwrap();
        std::fs::rename(&aside, &shipped).unwrap();
        while node.archive.status().manifest_seq == before {
            tokio::task::yield_now().await;
        }
        node.shipped().await;
        let (_, out) = place.tool("ls --json").await.unwrap();
        let shard = serde_json::from_str::<Value>(&out).unwrap()["shards"][0].clone();
        if shard["wal"].as_u64() < shard["trim"].as_u64() && shard["trim"].as_u64() < shard["wal_next"].as_u64() {
            break;
        }
    }
    place.tool(&format!("restore --to {}", copy.url)).await.unwrap();
    for place in [&place, &copy] {
        assert_eq!(place.tool("verify").await.unwrap(), (CLEAN, String::new()));
        for (topic, index) in [(1, 0), (1, 1), (2, 0)] {
            let values: Vec<Vec<u8>> =
                records(&node, partition(topic, index)).await.into_iter().map(|record| record.2).collect();
            let command = format!("cat topic-{topic} --partition {index} --format value");
            let (_, out) = place.tool_bytes(&command).await.unwrap();
            assert!(out == values.iter().flat_map(|value| [value, &b"\n"[..]].concat()).collect::<Vec<u8>>());
        }
        let wanted = reader::expected(&node, 2, 0, 0).await;
        assert_eq!(reader::read(place, &["topic-2", "0"]), wanted);
    }
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_deleted_is_not_shown() {
    let place = Place::directory();
    let node = rich(&place).await;
    node.shard.trim(partition(1, 0), 30).await.unwrap();
    let id = partition(2, 0).topic;
    crate::state::StateLog::commit(
        node.shard.as_ref(),
        vec![crate::state::Change::Topics(crate::state::TopicChange::Deleted { id })],
    )
    .await
    .unwrap();
    node.shipped().await;
    let (_, out) = place.tool("cat topic-1 --partition 0").await.unwrap();
    let first: Value = serde_json::from_str(out.lines().next().unwrap()).unwrap();
    assert_eq!(first["offset"], 30);
    let refused = place.tool("cat topic-2").await.unwrap_err();
    assert!(matches!(&refused, ToolError::Topic { known, .. } if known == "topic-1, topic-3"), "{refused}");
    assert_eq!(place.tool("verify").await.unwrap(), (CLEAN, String::new()));
    // The same when the manifest has caught up.
    node.split().await;
    assert_eq!(place.tool("verify").await.unwrap(), (CLEAN, String::new()));
    let (_, out) = place.tool("ls --json").await.unwrap();
    // Its runs are in the index until their objects are written again; they have no name any more.
    assert!(!out.contains("topic-2"), "{out}");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_archive_can_be_checked_while_its_node_works() {
    let place = Place::directory();
    let node = rich(&place).await;
    let work = async {
        for _ in 0..6 {
            node.produce(3).await;
            node.split().await;
        }
    };
    let check = async {
        for _ in 0..12 {
            assert_eq!(place.tool("verify").await.unwrap(), (CLEAN, String::new()));
        }
    };
    tokio::join!(work, check);
    node.stop().await;
}

#[tokio::test]
async fn where_nothing_is_that_is_said() {
    let place = Place::directory();
    let refused = place.tool("ls").await.unwrap_err();
    assert!(refused.to_string().contains("no such directory"), "{refused}");
    assert!(!place.path().exists(), "looking makes no directory");
    std::fs::create_dir_all(place.path()).unwrap();
    let refused = place.tool("verify").await.unwrap_err();
    assert!(matches!(refused, ToolError::Nothing(_)), "{refused}");
    let code = run(&parse(&format!("verify --url {}", place.url)), &CloudConfig::default(), Vec::new()).await;
    assert_eq!(code, super::FAILED);
}
