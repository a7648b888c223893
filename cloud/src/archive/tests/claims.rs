//! Claims on a full data disk.

use std::time::Duration;

use tokio::time::sleep;

use super::faulty::Faulty;
use super::node::{Home, Node, partition, settings};
use crate::archive::*;

fn quick(home: &Home) -> ArchiveSettings {
    settings(home.dir.path().into())
}

async fn start(home: &mut Home, store: &Faulty, mirror: &Faulty) -> Node {
    let settings = quick(home);
    Node::start_quick(home, store, mirror, settings).await.unwrap()
}

/// Where the log's own files have filled the disk, shipping and trimming are what makes room on it.
#[tokio::test(start_paused = true)]
async fn a_full_data_disk_keeps_nobody_from_shipping_and_trimming_waits_for_the_local_manifest() {
    let (store, mirror, mut home) = (Faulty::new(), Faulty::new(), Home::new());
    let full = |is_full: bool| mirror.plan.lock().refused_first = if is_full { u32::MAX } else { 0 };
    // The first claim ever, of a shard that runs already.
    full(true);
    let node = start(&mut home, &store, &mirror).await;
    node.shard.append(&[(partition(1), 3)]);
    node.shipped().await;
    assert_eq!(node.archive.status().state, "claimed");
    full(false);
    node.split().await;
    let published = node.shard.positions().2;
    // A manifest that is in the bucket and not here.
    full(true);
    node.shard.append(&[(partition(1), 3)]);
    let next = node.shard.positions().0;
    node.archive.roll_now();
    while node.archive.status().split_seq < next {
        sleep(Duration::from_millis(10)).await;
    }
    node.kill().await;

    // A start that goes on with its own log.
    let node = start(&mut home, &store, &mirror).await;
    assert!(node.shard.positions().0 > next, "an own block after those that are there");
    node.shipped().await;
    node.archive.roll_now();
    sleep(Duration::from_secs(5)).await;
    assert_eq!(node.shard.positions().2, published, "without the bucket a start needs what is not trimmed");
    full(false);
    node.split().await;
    assert!(node.shard.positions().2 > next);
    node.check_readable(partition(1), 0).await;
    node.kill().await;

    // A restore.
    let (empty, mut other) = (Faulty::new(), Home::new());
    empty.plan.lock().refused_first = u32::MAX;
    let node = start(&mut other, &store, &empty).await;
    node.shard.append(&[(partition(1), 3)]);
    node.shipped().await;
    node.check_readable(partition(1), 0).await;
}
