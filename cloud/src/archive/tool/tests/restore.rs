//! A copy of an archive is as good as the archive.

use shared::log::Log;
use shared::log::conformance::{batch, from_producer};
use shared::name::Partition;

use super::super::{CLEAN, FINDINGS, ToolError};
use super::lab::{Node, Place, named, partition, rich};
use super::records;
use crate::wal::memory::MemoryWal;

const ALL: [(u8, u32); 4] = [(1, 0), (1, 1), (1, 2), (2, 0)];

async fn restore(from: &Place, to: &Place) -> Result<(i32, String), ToolError> {
    from.tool(&format!("restore --to {}", to.url)).await
}

async fn content(node: &Node) -> Vec<(Partition, Vec<(i64, i64, Vec<u8>)>)> {
    let mut content = Vec::new();
    for (topic, index) in ALL {
        content.push((partition(topic, index), records(node, partition(topic, index)).await));
    }
    content
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_comes_up_on_a_copy_and_goes_on() {
    let (old, new) = (Place::directory(), Place::directory());
    let node = rich(&old).await;
    let expected = content(&node).await;
    let (cluster_id, leader_epoch) = (node.archive.cluster_id().to_owned(), node.shard.status().leader_epoch);
    let position = node.shard.safe(&shared::log::conformance::stream(1, 1));
    node.stop().await;

    assert_eq!(restore(&old, &new).await.unwrap().0, CLEAN);
    assert_eq!(new.tool("verify").await.unwrap(), (CLEAN, String::new()));
    std::fs::remove_dir_all(old.path()).unwrap();

    let node = Node::start(&new).await;
    assert_eq!(node.archive.cluster_id(), cluster_id);
    assert_eq!(content(&node).await, expected);
    assert_eq!(node.shard.safe(&shared::log::conformance::stream(1, 1)), position);
    assert_eq!(node.shard.status().leader_epoch, leader_epoch + 2, "its fence, and what may have been lost");
    let end = node.shard.bounds(partition(1, 0)).unwrap().high_watermark;
    node.produce(4).await;
    node.split().await;
    assert!(node.shard.bounds(partition(1, 0)).unwrap().high_watermark > end);
    assert_eq!(content(&node).await[0].1[..expected[0].1.len()], expected[0].1[..]);
    node.stop().await;
    assert_eq!(new.tool("verify").await.unwrap(), (CLEAN, String::new()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_was_cut_names_nothing_and_goes_on_where_it_was() {
    let old = Place::directory();
    let node = rich(&old).await;
    let expected = content(&node).await;
    node.stop().await;
    let whole = Place::directory();
    restore(&old, &whole).await.unwrap();
    let keys = whole.keys();
    let is_root = |key: &&String| key.contains("/manifest/");
    let root = keys.iter().filter(is_root).max().unwrap();
    // What a cut leaves: any part of the data, and no root.
    for cut in 0..=keys.len() {
        let new = Place::directory();
        for key in keys.iter().filter(|key| !is_root(key)).take(cut) {
            std::fs::create_dir_all(new.path().join(key).parent().unwrap()).unwrap();
            new.write(key, &whole.read(key));
        }
        assert_eq!(restore(&old, &new).await.unwrap().0, CLEAN);
        assert_eq!(new.keys(), keys);
        assert!(new.read(root) == whole.read(root));
    }
    // Again on a copy that is whole: nothing to do, nothing to refuse.
    assert_eq!(restore(&old, &whole).await.unwrap().0, CLEAN);
    let node = Node::start(&whole).await;
    assert_eq!(content(&node).await, expected);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_place_that_belongs_to_others_or_is_at_work_is_refused() {
    let (old, theirs, used) = (Place::directory(), Place::directory(), Place::directory());
    rich(&old).await.stop().await;
    rich(&theirs).await.stop().await;
    let before = theirs.keys();
    let refused = restore(&old, &theirs).await.unwrap_err();
    assert!(matches!(refused, ToolError::Foreign { .. }), "{refused}");
    assert_eq!(theirs.keys(), before);
    // Their cluster id is lost, their roots still say whose it is.
    theirs.remove("cluster-id");
    let refused = restore(&old, &theirs).await.unwrap_err();
    assert!(matches!(refused, ToolError::Foreign { .. }), "{refused}");

    restore(&old, &used).await.unwrap();
    let node = Node::start(&used).await;
    node.produce(1).await;
    node.split().await;
    node.stop().await;
    let before = used.keys();
    let refused = restore(&old, &used).await.unwrap_err();
    assert!(matches!(refused, ToolError::InUse(_)), "{refused}");
    assert_eq!(used.keys(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_shards_of_an_archive_are_listed_checked_read_and_copied() {
    let (old, new) = (Place::directory(), Place::directory());
    rich(&old).await.stop().await;
    let empty = (tempfile::tempdir().unwrap(), MemoryWal::new(16 << 20));
    let second = Node::start_shard(&old, empty.0, empty.1, 7, 4).await;
    second.create(9, 1).await;
    for records in [3, 4] {
        second.append(from_producer(partition(9, 0), batch(records, 5))).await;
        second.split().await;
    }
    second.append(from_producer(partition(9, 0), batch(5, 5))).await;
    second.shipped().await;
    second.stop().await;

    assert_eq!(restore(&old, &new).await.unwrap().0, CLEAN);
    for place in [&old, &new] {
        assert_eq!(place.tool("verify").await.unwrap(), (CLEAN, String::new()));
        let (_, out) = place.tool("ls").await.unwrap();
        assert!(out.contains("shard 0:") && out.contains("shard 7:"), "{out}");
        assert_eq!(place.tool("cat topic-9").await.unwrap().1.lines().count(), 12);
        assert_eq!(place.tool("cat topic-2").await.unwrap().1.lines().count(), 99);
    }
    // Damage in any of them keeps all of them out of force.
    let key = named(&old).await.into_iter().rfind(|key| key.contains("shards/7/segments/")).unwrap();
    let mut damaged = old.read(&key);
    damaged[20] ^= 1;
    old.write(&key, &damaged);
    let third = Place::directory();
    assert_eq!(restore(&old, &third).await.unwrap().0, FINDINGS);
    assert!(!third.keys().iter().any(|key| key.contains("/manifest/")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_is_not_copied_into_force() {
    let old = Place::directory();
    rich(&old).await.stop().await;
    for kind in ["/segments/", "/wal/", "/pages/"] {
        let new = Place::directory();
        let key = named(&old).await.into_iter().rfind(|key| key.contains(kind)).unwrap();
        let whole = old.read(&key);
        let mut damaged = whole.clone();
        damaged[whole.len() / 3] ^= 0x10;
        old.write(&key, &damaged);
        let (code, out) = restore(&old, &new).await.unwrap();
        assert_eq!(code, FINDINGS);
        assert!(out.contains(&key), "{out}");
        let there = if new.path().exists() { new.keys() } else { Vec::new() };
        assert!(!there.iter().any(|key| key.contains("/manifest/") || key == "cluster-id"), "{there:?}");
        // The object is brought back: the copy goes on.
        old.write(&key, &whole);
        assert_eq!(restore(&old, &new).await.unwrap().0, CLEAN);
        assert_eq!(new.tool("verify").await.unwrap(), (CLEAN, String::new()));
    }
    // An archive whose own cluster id is lost can be saved: its roots say whose it is.
    old.remove("cluster-id");
    let new = Place::directory();
    assert_eq!(restore(&old, &new).await.unwrap().0, CLEAN);
    assert_eq!(new.tool("verify").await.unwrap(), (CLEAN, String::new()));
}
