//! Claims on a full data disk, and claims against an owner that is busy.

use std::sync::Arc;
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

/// A start in the bucket `store`, as node `node_id` of the data directory `own`.
fn presence(store: &Faulty, node_id: i32, own: u8, take_over: bool) -> Arc<Presence> {
    let store = Store::new(Arc::new(store.clone()), "some/prefix".into(), RequestSettings::default());
    let settings = PresenceSettings {
        node_id,
        identity: OwnerIdentity { data_id: [own; 16], boot_id: [1; 16], device: 1, inode: own.into() },
        kafka: Vec::new(),
        link_url: None,
        host: format!("host-{own}"),
        data_dir: format!("/data-{own}"),
        take_over,
    };
    Presence::with_store(store, settings)
}

/// The owner learns of a claim at its next beat; until then it may ship faster than anybody can claim.
#[tokio::test(start_paused = true)]
async fn a_take_over_outlasts_an_owner_that_ships_without_a_pause() {
    const STEP: Duration = Duration::from_millis(5);
    let store = Faulty::new();
    let (first, second) = (presence(&store, 1, 1, false), presence(&store, 2, 2, true));
    let mut home = Home::new();
    let owned = ArchiveSettings { presence: Some(first.clone()), segment_bytes: 1 << 40, ..quick(&home) };
    let owner = Node::start_quick(&mut home, &store, &Faulty::new(), owned).await.unwrap();
    owner.shipped().await;
    (store.plan.lock().latency, store.plan.lock().write_latency) = (STEP, STEP);
    let shard = owner.shard.clone();
    let producer = tokio::spawn(async move {
        loop {
            shard.append(&[(partition(1), 1)]);
            sleep(Duration::from_millis(1)).await;
        }
    });
    let beating = tokio::spawn(first.run());
    // Its next beat is as far away as can be.
    sleep(BEAT + Duration::from_millis(100)).await;

    let mut other = Home::new();
    let taking = ArchiveSettings { presence: Some(second), ..quick(&other) };
    let new = Node::start_quick(&mut other, &store, &Faulty::new(), taking).await;
    assert!(owner.shard.fenced_by().is_some(), "the owner has stopped");
    let new = new.unwrap();
    new.shipped().await;
    assert_eq!(new.shard.fenced_by(), None);
    assert_eq!(
        new.shard.positions().0,
        owner.shard.positions().1 + 2,
        "what was shipped, a fence and its own first block"
    );
    producer.abort();
    beating.abort();
}
