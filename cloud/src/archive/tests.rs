//! The archive's promises, on a shard double and a store that fails on order.

mod claims;
mod departure;
pub(crate) mod faulty;
pub(crate) mod node;
mod quiet;
pub(crate) mod s3;
mod shipping;
mod tiers;
mod upkeep;

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::Duration;

use shared::log::ReadLimits;

use super::*;
use faulty::Faulty;
use node::{Home, NoBlocks, Node, partition, settings};
use object_store::{ObjectStore, ObjectStoreExt};

/// What tells one writer's blocks from another's.
pub(crate) fn nonce() -> u64 {
    super::store::random()
}

/// Some blocks: a busy partition, and quiet ones.
fn produce(node: &Node, rounds: u8) {
    for n in 0..rounds {
        node.shard.append(&[(partition(1), 20), (partition(2 + n % 3), 1)]);
    }
}

async fn check_all(node: &Node) {
    for number in 1..=4 {
        node.check_readable(partition(number), 0).await;
    }
}

async fn keys_under(store: &Faulty, part: &str) -> Vec<String> {
    use futures_util::TryStreamExt;
    let all: Vec<_> = store.inner.list(None).try_collect().await.unwrap();
    let mut keys: Vec<String> = all.into_iter().map(|object| object.location.to_string()).collect();
    keys.retain(|key| key.contains(part));
    keys
}

#[tokio::test]
async fn what_is_split_is_read_from_the_archive_without_listing() {
    let (store, mut home) = (Faulty::new(), Home::new());
    let node = Node::start(&mut home, Some(&store)).await.unwrap();
    produce(&node, 9);
    node.split().await;
    produce(&node, 9);
    node.split().await;
    produce(&node, 2);
    let lists = node.archive.status().lists;
    check_all(&node).await;
    let cold = node.archive.cold();
    let bounds = cold.bounds(partition(1)).unwrap();
    assert_eq!((bounds.first, bounds.next), (0, 360));
    assert_eq!(cold.runs(partition(1)).len(), 2);
    for from in 0..360 {
        let read = cold.read(partition(1), from, ReadLimits { bytes_max: 1 }).await.unwrap();
        assert_eq!(read.next, from / 20 * 20 + 20, "one whole batch");
    }
    let nothing = cold.read(partition(1), 360, ReadLimits { bytes_max: 1 }).await.unwrap();
    assert_eq!(nothing, ColdRead { batches: Vec::new(), next: 360 });
    assert_eq!(node.archive.status().lists, lists);
    assert!(node.archive.status().gets < 60, "adjacent reads share what was fetched");

    let found = |time: i64, from| cold.find_time(partition(1), from, time);
    assert_eq!(found(1234, 0).await.unwrap().map(|point| point.offset), Some(124));
    assert_eq!(found(0, 77).await.unwrap().map(|point| point.offset), Some(77));
    assert_eq!(found(3591, 0).await.unwrap(), None);
    let max = cold.max_time(partition(1), 0).await.unwrap().unwrap();
    assert_eq!((max.offset, max.timestamp, max.leader_epoch), (359, 3590, 1));
    assert_eq!(cold.max_time(partition(9), 0).await.unwrap(), None);
}

#[tokio::test]
async fn a_start_with_the_bucket_only_has_everything_that_was_shipped() {
    let (store, mut home) = (Faulty::new(), Home::new());
    let node = Node::start(&mut home, Some(&store)).await.unwrap();
    produce(&node, 8);
    node.split().await;
    produce(&node, 6);
    node.shipped().await;
    let (cluster_id, state) = (node.archive.cluster_id().to_owned(), node.shard.state());
    node.kill().await;

    let mut new_home = Home::new();
    let node = Node::start(&mut new_home, Some(&store)).await.unwrap();
    assert_eq!(node.archive.cluster_id(), cluster_id);
    assert_eq!(node.shard.state(), state);
    assert!(node.archive.status().epoch <= 2);
    check_all(&node).await;
    produce(&node, 5);
    node.split().await;
    check_all(&node).await;

    // The old machine comes back: what it has is older than the bucket, and it is the bucket that counts.
    node.kill().await;
    let node = Node::start(&mut home, Some(&store)).await.unwrap();
    check_all(&node).await;
    assert_eq!(node.shard.state()[&partition(1)], 19 * 20);
}

#[tokio::test]
async fn a_restart_goes_on_with_the_local_log() {
    let (store, mut home) = (Faulty::new(), Home::new());
    for epoch in 1..6 {
        let node = Node::start(&mut home, Some(&store)).await.unwrap();
        produce(&node, 5);
        if epoch % 2 == 0 {
            node.split().await;
            produce(&node, 1);
        }
        if epoch % 3 == 0 {
            node.stop().await;
        } else {
            node.kill().await;
        }
    }
    let node = Node::start(&mut home, Some(&store)).await.unwrap();
    node.shipped().await;
    assert_eq!(node.archive.status().state, "claimed");
    check_all(&node).await;
    assert_eq!(node.shard.state()[&partition(1)], 27 * 20);
    node.split().await;
    check_all(&node).await;
}

#[tokio::test]
async fn a_node_that_stops_ships_what_is_left() {
    let (store, mut home) = (Faulty::new(), Home::new());
    let mut slow = settings(home.dir.path().into());
    slow.max_lag = Duration::from_secs(3600);
    let node = Node::start_with(&mut home, Some(&store), slow).await.unwrap();
    node.shipped().await;
    produce(&node, 5);
    let state = node.shard.state();
    node.stop().await;
    let node = Node::start(&mut Home::new(), Some(&store)).await.unwrap();
    assert_eq!(node.shard.state(), state);
}

#[tokio::test]
async fn a_start_without_the_bucket_serves_and_claims_when_it_is_back() {
    let (store, mut home) = (Faulty::new(), Home::new());
    let node = Node::start(&mut home, Some(&store)).await.unwrap();
    produce(&node, 5);
    node.split().await;
    produce(&node, 5);
    node.kill().await;

    let store = store.other();
    store.plan.lock().down = true;
    let before = keys_under(&store, "").await;
    let node = Node::start(&mut home, Some(&store)).await.unwrap();
    produce(&node, 5);
    assert_eq!(node.archive.cold().bounds(partition(1)).unwrap().next, 100, "the index is here");
    node.archive.roll_now();
    assert_eq!(node.archive.status().state, "waiting");
    assert_eq!(keys_under(&store, "").await, before);
    store.plan.lock().down = false;
    node.split().await;
    assert_eq!(node.archive.status().state, "claimed");
    check_all(&node).await;
}

#[tokio::test]
async fn a_new_node_does_not_guess_when_the_bucket_is_away() {
    let store = Faulty::new();
    store.plan.lock().down = true;
    let refused = Node::start(&mut Home::new(), Some(&store)).await.err().unwrap();
    assert!(matches!(refused, ArchiveError::Unreachable { .. }), "{refused}");
    assert!(refused.to_string().contains("url = \"off\""), "{refused}");
}

#[tokio::test]
async fn while_the_bucket_is_away_nothing_is_trimmed_and_afterwards_it_catches_up() {
    let (store, mut home) = (Faulty::new(), Home::new());
    let node = Node::start(&mut home, Some(&store)).await.unwrap();
    produce(&node, 5);
    node.split().await;
    let (_, shipped, published) = node.shard.positions();
    store.plan.lock().down = true;
    produce(&node, 20);
    node.archive.roll_now();
    while node.archive.status().last_error.is_none() {
        tokio::task::yield_now().await;
    }
    assert_eq!(node.shard.positions(), (published + 20, shipped, published));
    store.plan.lock().down = false;
    node.split().await;
    check_all(&node).await;
    assert_eq!(node.shard.fenced_by(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_wal_refuses_producers_until_the_bucket_is_back() {
    use crate::shard::{Shard, ShardSettings};
    use crate::state::{Change, StateLog, Topic};
    use crate::wal::memory::MemoryWal;
    use shared::log::conformance::{from_producer, sized};
    use shared::log::{AppendError, Log};
    let (store, home) = (Faulty::new(), Home::new());
    let settings = settings(home.dir.path().into());
    let bucket = Store::new(std::sync::Arc::new(store.clone()), "p".into(), settings.requests);
    let mirror = Store::directory(&home.dir.path().join("manifest"), settings.requests).unwrap();
    let archive = Archive::with_stores(settings, bucket, Some(mirror)).await.unwrap();
    let recovered = archive.recover(&NoBlocks).await.unwrap();
    let wal = Box::new(MemoryWal::new(1 << 20));
    let clock = std::sync::Arc::new(|| 1);
    let shard = Shard::open(ShardSettings::default(), wal, recovered, Some(archive.cold()), clock).unwrap();
    let task = tokio::spawn(archive.clone().run(shard.clone(), std::future::pending()));
    let name = shared::name::TopicName::parse("t").unwrap();
    let topic = Topic { id: partition(1).topic, name, partitions: 1, configs: Default::default(), created_ms: 0 };
    shard.commit(vec![Change::created(topic)]).await.unwrap();
    let append = || shard.append(from_producer(partition(1), sized(50_000)));
    for _ in 0..3 {
        store.plan.lock().down = true;
        let refused = loop {
            if let Err(refused) = append().await {
                break refused;
            }
        };
        assert!(matches!(refused, AppendError::Full(_)), "{refused}");
        let end = shard.bounds(partition(1)).unwrap().high_watermark;
        store.plan.lock().down = false;
        // The producer tries again, as it is told to.
        while append().await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let batches = shard.read(partition(1), 0, ReadLimits { bytes_max: 1 << 30 }).await.unwrap();
        assert!(shard.bounds(partition(1)).unwrap().high_watermark > end && !batches.batches.is_empty());
    }
    task.abort();
}

#[tokio::test]
async fn of_two_nodes_with_one_data_directory_one_stops() {
    let (store, mut home) = (Faulty::new(), Home::new());
    let node = Node::start(&mut home, Some(&store)).await.unwrap();
    produce(&node, 5);
    node.split().await;
    node.stop().await;
    let mut clone_home = home.image();
    let first = Node::start(&mut home, Some(&store)).await.unwrap();
    produce(&first, 3);
    first.shipped().await;
    // The clone has one block that the bucket has not: none; so it takes what is there, and the first is deposed.
    let second = Node::start(&mut clone_home, Some(&store)).await.unwrap();
    produce(&first, 3);
    first.shard.until(|_| false).await;
    assert!(first.shard.fenced_by().is_some());
    assert_eq!(first.archive.status().state, "fenced");
    second.split().await;
    check_all(&second).await;
    assert_eq!(second.shard.state()[&partition(1)], 8 * 20);
}

#[tokio::test]
async fn a_deposed_owner_collides_even_after_its_objects_were_cleared_away() {
    let (store, mut home) = (Faulty::new(), Home::new());
    let paused_view = store.other();
    let paused = Node::start(&mut home, Some(&paused_view)).await.unwrap();
    produce(&paused, 3);
    paused.shipped().await;
    paused_view.plan.lock().down = true;
    let mut new_home = Home::new();
    let owner = Node::start(&mut new_home, Some(&store)).await.unwrap();
    for _ in 0..4 {
        produce(&owner, 4);
        owner.split().await;
    }
    // Everything but fences below the manifest is gone.
    owner.shard.append(&[]);
    owner.split().await;
    let wals = keys_under(&store, "/wal/").await;
    assert!(wals.iter().any(|key| key.ends_with("/00000000000000000004")), "the fence is kept");
    assert!(!wals.iter().any(|key| key.ends_with("/00000000000000000006")), "what follows it is not");
    produce(&paused, 3);
    paused_view.plan.lock().down = false;
    paused.shard.until(|_| false).await;
    assert_eq!(paused.shard.fenced_by(), Some(2));
    assert_eq!(paused.shard.positions().1, 4, "nothing more was called safe");
    owner.split().await;
    check_all(&owner).await;
}

#[tokio::test]
async fn a_copied_data_directory_fences_its_original_although_their_blocks_are_the_same() {
    let (store, mut home) = (Faulty::new(), Home::new());
    let paused_view = store.other();
    let original = Node::start(&mut home, Some(&paused_view)).await.unwrap();
    produce(&original, 3);
    original.shipped().await;
    let shipped = original.shard.positions().1;
    paused_view.plan.lock().down = true;
    // One block that the bucket has not, in the original and in the copy.
    original.shard.append(&[(partition(1), 20)]);
    let mut copied = home.image();
    let copy = Node::start(&mut copied, Some(&store)).await.unwrap();
    for _ in 0..3 {
        produce(&copy, 3);
        copy.split().await;
    }
    original.shard.append(&[(partition(1), 20)]);
    paused_view.plan.lock().down = false;
    original.shard.until(|_| false).await;
    assert_eq!(original.shard.fenced_by(), Some(2));
    assert_eq!(original.shard.positions().1, shipped, "nothing more was called safe");
    copy.split().await;
    check_all(&copy).await;
}

#[tokio::test]
async fn what_an_earlier_life_ships_after_the_claim_is_claimed_over_again() {
    let (store, mut home) = (Faulty::new(), Home::new());
    let view = store.other();
    let node = Node::start(&mut home, Some(&view)).await.unwrap();
    produce(&node, 3);
    node.shipped().await;
    view.plan.lock().down = true;
    node.shard.append(&[(partition(1), 20)]);
    let seq = node.shard.positions().0 - 1;
    let block = LocalBlocks::read(&*node.shard, seq).unwrap();
    node.kill().await;
    let node = Node::start(&mut home, Some(&store)).await.unwrap();
    // The claim has looked, and the first life's PUT lands.
    let key = crate::manifest::Keys::new("some/prefix".into(), 0).wal(seq);
    store.inner.put(&key, block.into()).await.unwrap();
    produce(&node, 3);
    node.shipped().await;
    assert_eq!(node.shard.fenced_by(), None);
    node.split().await;
    check_all(&node).await;
    node.kill().await;
    let restored = Node::start(&mut Home::new(), Some(&store)).await.unwrap();
    check_all(&restored).await;
}

#[tokio::test]
async fn a_restore_fences_the_old_owner_before_it_serves() {
    let (store, mut home) = (Faulty::new(), Home::new());
    let old = Node::start(&mut home, Some(&store)).await.unwrap();
    produce(&old, 3);
    old.shipped().await;
    // The new owner has restored and does nothing yet.
    let new_home = Home::new();
    let settings = settings(new_home.dir.path().into());
    let bucket = Store::new(std::sync::Arc::new(store.clone()), "some/prefix".into(), settings.requests);
    let mirror = Store::directory(&new_home.dir.path().join("manifest"), settings.requests).unwrap();
    let archive = Archive::with_stores(settings, bucket, Some(mirror)).await.unwrap();
    let recovered = archive.recover(&NoBlocks).await.unwrap();
    let Tail::Bucket(blocks) = recovered.tail else { panic!("nothing is local") };
    assert_eq!(blocks.len(), 5, "four that were shipped and the fence");
    produce(&old, 3);
    old.shard.until(|_| false).await;
    assert_eq!((old.shard.fenced_by(), old.shard.positions().1), (Some(2), 4));
}

#[tokio::test]
async fn histories_that_went_apart_are_not_mixed() {
    let (store, mut home) = (Faulty::new(), Home::new());
    let node = Node::start(&mut home, Some(&store)).await.unwrap();
    produce(&node, 2);
    node.split().await;
    node.stop().await;
    let mut image = home.image();
    let node = Node::start(&mut home, Some(&store)).await.unwrap();
    produce(&node, 3);
    node.shipped().await;
    node.stop().await;
    // The image goes on by itself, without the bucket, and then meets it.
    let away = store.other();
    away.plan.lock().down = true;
    let astray = Node::start(&mut image, Some(&away)).await.unwrap();
    produce(&astray, 8);
    away.plan.lock().down = false;
    astray.shard.until(|_| false).await;
    assert!(astray.shard.fenced_by().is_some());
    astray.kill().await;
    let refused = Node::start(&mut image, Some(&store)).await.err().unwrap();
    assert!(matches!(refused, ArchiveError::Diverged { .. }), "{refused}");
    let node = Node::start(&mut home, Some(&store)).await.unwrap();
    check_all(&node).await;
}

#[tokio::test]
async fn two_systems_do_not_share_an_archive() {
    let (store, mut home) = (Faulty::new(), Home::new());
    Node::start(&mut home, Some(&store)).await.unwrap().stop().await;
    let mut other = Home::new();
    Node::start(&mut other, Some(&Faulty::new())).await.unwrap().stop().await;
    let refused = Node::start(&mut other, Some(&store)).await.err().unwrap();
    let ArchiveError::ClusterMismatch { local, bucket, .. } = &refused else { panic!("{refused}") };
    assert!(refused.to_string().contains(local) && refused.to_string().contains(bucket));
}

#[tokio::test]
async fn an_emptied_archive_is_not_taken_for_a_new_one() {
    let (store, mut home) = (Faulty::new(), Home::new());
    let node = Node::start(&mut home, Some(&store)).await.unwrap();
    produce(&node, 2);
    node.split().await;
    node.stop().await;
    let refused = Node::start(&mut home, Some(&Faulty::new())).await.err().unwrap();
    assert!(matches!(refused, ArchiveError::Emptied(_)), "{refused}");
    // Neither is one that was moved out of the settings.
    let refused = Node::start(&mut home, None).await.err().unwrap();
    assert!(matches!(refused, ArchiveError::Moved { .. }), "{refused}");
}

#[tokio::test]
async fn a_store_that_overwrites_is_refused() {
    let store = Faulty::new();
    store.plan.lock().unconditional = true;
    let refused = Node::start(&mut Home::new(), Some(&store)).await.err().unwrap();
    assert!(matches!(refused, ArchiveError::Store(StoreError::Unconditional(_))), "{refused}");
}

#[tokio::test]
async fn a_store_that_fails_at_first_is_not_taken_for_one_that_overwrites() {
    for refused_first in 0..7 {
        let faulty = Faulty::new();
        faulty.plan.lock().refused_first = refused_first;
        let store = Store::new(std::sync::Arc::new(faulty), "".into(), settings(".".into()).requests);
        match store.probe().await {
            Ok(()) => assert!(refused_first < 5),
            Err(error) => assert!(matches!(error, StoreError::Failed { .. }) && refused_first >= 5, "{error}"),
        }
    }
}

#[tokio::test]
async fn an_outcome_that_is_not_known_is_settled_by_reading_back() {
    let inner = Faulty::new();
    let requests = settings(".".into()).requests;
    let store = Store::new(std::sync::Arc::new(inner.clone()), "".into(), requests);
    let key = object_store::path::Path::from("a");
    inner.inner.put(&key, "mine".into()).await.unwrap();
    assert_eq!(store.create(&key, &[Bytes::from("mi"), Bytes::from("ne")]).await, Ok(()));
    for other in ["min", "mine and more", "yours"] {
        assert_eq!(store.create(&key, &[Bytes::from(other)]).await, Err(StoreError::Taken(key.clone())));
    }
}

#[tokio::test(start_paused = true)]
async fn what_nobody_may_read_any_more_is_deleted() {
    let (store, mut home) = (Faulty::new(), Home::new());
    let node = Node::start(&mut home, Some(&store)).await.unwrap();
    for _ in 0..3 {
        produce(&node, 6);
        node.split().await;
    }
    assert_eq!(keys_under(&store, "/segments/").await.len(), 3);
    node.shard.trim(partition(1), 125);
    node.shard.delete(partition(2));
    node.split().await;
    let cold = node.archive.cold();
    assert_eq!(cold.bounds(partition(1)).unwrap().first, 120, "a run that is wholly below is gone");
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(cold.bounds(partition(2)), None, "with its objects, which are written again without it");
    node.check_readable(partition(1), 120).await;
    node.check_readable(partition(3), 0).await;
    node.check_readable(partition(4), 0).await;
    // One more round for what the last one unnamed; then no byte of the deleted topic is left anywhere.
    for _ in 0..2 {
        node.shard.append(&[]);
        node.split().await;
        tokio::time::sleep(Duration::from_secs(10)).await;
    }
    let mut left = 0;
    for key in keys_under(&store, "").await {
        let bytes = store.inner.get(&key.clone().into()).await.unwrap().bytes().await.unwrap();
        let fenced = key.contains("/wal/");
        assert!(fenced || !bytes.windows(16).any(|window| window == [2; 16]) || key.contains("/pages/"), "{key}");
        left += 1;
    }
    assert!(left < 20, "{:?}", keys_under(&store, "").await);
    // The claim, and what is in force.
    assert_eq!(keys_under(&store, "/manifest/").await.len(), 2);
}

#[tokio::test]
async fn without_an_archive_segments_stay_in_the_data_directory() {
    let mut home = Home::new();
    let node = Node::start(&mut home, None).await.unwrap();
    assert!(!node.archive.ships());
    produce(&node, 6);
    node.shipped().await;
    node.split().await;
    produce(&node, 6);
    node.kill().await;
    let node = Node::start(&mut home, None).await.unwrap();
    check_all(&node).await;
    node.split().await;
    check_all(&node).await;
    let state = node.shard.state();
    node.stop().await;
    // The WAL is lost: what was split is there.
    home.disk = None;
    let node = Node::start(&mut home, None).await.unwrap();
    assert_eq!(node.shard.state(), state);
    check_all(&node).await;
}

#[tokio::test]
async fn the_local_copy_of_the_manifest_can_be_lost() {
    let (store, mut home) = (Faulty::new(), Home::new());
    let node = Node::start(&mut home, Some(&store)).await.unwrap();
    produce(&node, 6);
    node.split().await;
    produce(&node, 6);
    node.kill().await;
    std::fs::remove_dir_all(home.dir.path().join("manifest")).unwrap();
    let node = Node::start(&mut home, Some(&store)).await.unwrap();
    node.split().await;
    check_all(&node).await;
    assert_eq!(node.shard.state()[&partition(1)], 240);
}

/// Cuts the node off after each number of writes, then starts it again on its disk, and another one on the bucket alone.
#[tokio::test]
async fn a_cut_after_any_write_loses_nothing() {
    for cut in 0..40 {
        let (store, mut home) = (Faulty::new(), Home::new());
        let view = store.other();
        let node = Node::start(&mut home, Some(&view)).await.unwrap();
        view.plan.lock().writes_left = Some(cut);
        for _ in 0..3 {
            produce(&node, 3);
            node.shard.trim(partition(1), 20);
            node.archive.roll_now();
            let next = node.shard.positions().0;
            let reached = node.shard.until(|(_, _, published)| published >= next);
            let stuck = async {
                while view.plan.lock().writes_left != Some(0) {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            };
            tokio::select! { () = reached => {}, () = stuck => {} }
        }
        let state = node.shard.state();
        let (_, shipped, _) = node.shard.positions();
        node.kill().await;

        let mut image = home.image();
        let node = Node::start(&mut home, Some(&store.other())).await.unwrap();
        assert_eq!(node.shard.fenced_by(), None, "cut {cut}");
        node.split().await;
        assert_eq!(node.shard.state(), state, "cut {cut}");
        node.check_readable(partition(2), 0).await;
        node.check_readable(partition(1), 20).await;
        node.kill().await;

        // Restored from the bucket: everything that was called safe, and the image of then steps back.
        let restored = Node::start(&mut Home::new(), Some(&store.other())).await.unwrap();
        assert!(restored.shard.positions().0 > shipped);
        restored.check_readable(partition(2), 0).await;
        restored.split().await;
        restored.kill().await;
        match Node::start(&mut image, Some(&store.other())).await {
            Ok(node) => node.check_readable(partition(2), 0).await,
            Err(error) => assert!(matches!(error, ArchiveError::Diverged { .. }), "cut {cut}: {error}"),
        }
    }
}

#[tokio::test]
async fn a_store_that_fails_now_and_then_loses_nothing() {
    for seed in 0..12 {
        let (store, mut home) = (Faulty::new(), Home::new());
        let view = store.other();
        let mut node = Node::start(&mut home, Some(&view)).await.unwrap();
        *view.plan.lock() = faulty::Plan { one_in: Some(4), seed, ..faulty::Plan::default() };
        for round in 0..6 {
            produce(&node, 3);
            if round % 3 == 2 {
                node.kill().await;
                node = match Node::start(&mut home, Some(&view)).await {
                    Ok(node) => node,
                    Err(error) => panic!("seed {seed}: {error}"),
                };
            }
            node.archive.roll_now();
            node.shipped().await;
            assert_eq!(node.shard.fenced_by(), None, "seed {seed}");
        }
        *view.plan.lock() = faulty::Plan::default();
        node.split().await;
        check_all(&node).await;
        assert_eq!(node.shard.state()[&partition(1)], 18 * 20);
        assert!(node.archive.store.requests().errors.load(Ordering::Relaxed) > 0);
        node.kill().await;
        let restored = Node::start(&mut Home::new(), Some(&store)).await.unwrap();
        check_all(&restored).await;
    }
}

#[tokio::test]
async fn a_damaged_object_is_named() {
    let (store, mut home) = (Faulty::new(), Home::new());
    let node = Node::start(&mut home, Some(&store)).await.unwrap();
    produce(&node, 6);
    node.split().await;
    let key = object_store::path::Path::from(keys_under(&store, "/segments/").await.remove(0));
    let mut bytes = store.inner.get(&key).await.unwrap().bytes().await.unwrap().to_vec();
    bytes[100] ^= 1;
    store.inner.put(&key, bytes.into()).await.unwrap();
    let cold = node.archive.cold();
    let read = cold.read(partition(1), 0, ReadLimits { bytes_max: 1 }).await.unwrap_err();
    assert!(read.to_string().contains(key.as_ref()), "{read}");
    store.inner.delete(&key).await.unwrap();
    let read = cold.read(partition(1), 0, ReadLimits { bytes_max: 1 }).await.unwrap_err();
    assert!(read.to_string().contains("gone"), "{read}");
    node.kill().await;
    let root = keys_under(&store, "/manifest/").await.pop().unwrap();
    store.inner.put(&root.clone().into(), "TRBRxxxxxxxxxxxxxxxxx".into()).await.unwrap();
    let refused = Node::start(&mut home, Some(&store)).await.err().unwrap();
    assert!(refused.to_string().contains(&root), "{refused}");
}

/// An archive in `store`, used in one way on every kind of store there is.
async fn use_store(open: impl Fn() -> Store) {
    let store = open();
    store.probe().await.unwrap();
    let key = store.prefix().clone().join("a").join("b");
    assert_eq!(store.get(&key, 100).await, Err(StoreError::Missing(key.clone())));
    store.create(&key, &[Bytes::from("0123"), Bytes::from("456789")]).await.unwrap();
    store.create(&key, &[Bytes::from("0123456789")]).await.unwrap();
    assert_eq!(store.create(&key, &[Bytes::from("x")]).await, Err(StoreError::Taken(key.clone())));
    assert_eq!(store.get(&key, 10).await.unwrap(), "0123456789");
    assert!(store.get(&key, 9).await.is_err(), "larger than it can rightly be");
    assert_eq!(store.get_range(&key, 2..5).await.unwrap(), "234");
    assert!(store.get_range(&key, 8..20).await.is_err(), "cut short");
    assert_eq!(store.get_range(&key, 5..5).await.unwrap(), "");
    for n in 0..7 {
        store.create(&store.prefix().clone().join("list").join(format!("{n}")), &[Bytes::from("x")]).await.unwrap();
    }
    let listed = store.list(&store.prefix().clone().join("list")).await.unwrap();
    assert_eq!(listed.iter().filter_map(|object| object.location.filename()).collect::<String>(), "0123456");
    let mut scanned = BTreeSet::new();
    store.scan(&store.prefix().clone().join("list"), |key| assert!(scanned.insert(key))).await.unwrap();
    assert!(scanned.into_iter().eq(listed.into_iter().map(|object| object.location)));
    store.delete(&key).await.unwrap();
    store.delete(&key).await.unwrap();
    assert_eq!(open().get(&key, 100).await, Err(StoreError::Missing(key.clone())));
    assert!(store.list(&store.prefix().clone().join("probe")).await.unwrap().is_empty(), "probes are cleared away");
    // Of 32 that write one name at a time, one succeeds.
    let key = store.prefix().clone().join("race");
    let stores: Vec<Store> = (0..32).map(|_| open()).collect();
    let race = stores.iter().enumerate().map(|(n, store)| {
        let (key, body) = (&key, Bytes::from(format!("writer {n}")));
        async move { store.create(key, &[body]).await }
    });
    let answers = futures_util::future::join_all(race).await;
    assert_eq!(answers.iter().filter(|answer| answer.is_ok()).count(), 1);
    assert_eq!(answers.iter().filter(|answer| **answer == Err(StoreError::Taken(key.clone()))).count(), 31);
}

#[tokio::test]
async fn every_store_keeps_the_same_contract() {
    let requests = || settings(".".into()).requests;
    let faulty = Faulty::new();
    use_store(|| Store::new(std::sync::Arc::new(faulty.clone()), "p".into(), requests())).await;
    let dir = tempfile::tempdir().unwrap();
    let patient = RequestSettings { timeout: Duration::from_secs(20), ..requests() };
    use_store(|| Store::open(&format!("file://{}/made", dir.path().display()), &[], patient).unwrap()).await;
    // Main installs the provider; a client cannot be made without one, even for http.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let s3 = s3::S3 { page: 3, ..s3::S3::default() };
    let options = s3.serve().await;
    use_store(|| Store::open("s3://bucket/some/prefix/", &options, patient).unwrap()).await;
    for bad in ["s3://", "file://relative", "http://x", "s3://bucket/a//b"] {
        assert!(matches!(Store::open(bad, &[], requests()), Err(StoreError::Url { .. })), "{bad}");
    }
}

#[tokio::test]
async fn a_node_archives_over_s3_and_comes_back_from_it() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let s3 = s3::S3 { page: 100, ..s3::S3::default() };
    let store_options = s3.serve().await;
    let with = |home: &Home| ArchiveSettings {
        url: Some("s3://bucket/prefix".into()),
        store_options: store_options.clone(),
        requests: RequestSettings { timeout: Duration::from_secs(20), ..settings(".".into()).requests },
        ..settings(home.dir.path().into())
    };
    let mut home = Home::new();
    let first = with(&home);
    let node = Node::start_with(&mut home, None, first).await.unwrap();
    produce(&node, 6);
    node.split().await;
    produce(&node, 6);
    node.shipped().await;
    let state = node.shard.state();
    node.kill().await;
    let mut home = Home::new();
    let second = with(&home);
    let node = Node::start_with(&mut home, None, second).await.unwrap();
    assert_eq!(node.shard.state(), state);
    // The start's claim and sweep list; from here on nothing does.
    node.split().await;
    let before = s3.log.lock().len();
    check_all(&node).await;
    let log = s3.log.lock().split_off(before);
    let reads = log.iter().filter(|line| line.starts_with("GET prefix/shards/0/segments/")).count();
    assert_eq!(reads, 2, "indexes and batches of four partitions in two small segments: {log:?}");
    assert!(!log.iter().any(|line| line.starts_with("HEAD") || line.contains("list-type")), "{log:?}");
}

#[tokio::test]
async fn objects_are_encrypted_and_stored_as_the_settings_say() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let s3 = s3::S3 { page: 100, ..s3::S3::default() };
    let variables = s3.serve().await;
    let archived = async |said: &str, prefix: &str| {
        let text = format!("[archive]\nurl = \"s3://bucket/{prefix}\"\n{said}");
        let config: crate::config::CloudConfig = toml::from_str(&text).unwrap();
        config.check().unwrap();
        let mut home = Home::new();
        let with = ArchiveSettings {
            url: config.archive_url().unwrap(),
            store_options: config.archive.store_options(variables.clone()),
            requests: RequestSettings { timeout: Duration::from_secs(20), ..config.archive.requests() },
            ..settings(home.dir.path().into())
        };
        s3.headers.lock().clear();
        let node = Node::start_with(&mut home, None, with).await.unwrap();
        produce(&node, 6);
        node.split().await;
        check_all(&node).await;
        s3.headers.lock().clone()
    };
    let header =
        |headers: &http::HeaderMap, name: &str| headers.get(name).map(|value| value.to_str().unwrap().to_owned());
    const SSE: &str = "x-amz-server-side-encryption";
    const KEY: &str = "x-amz-server-side-encryption-aws-kms-key-id";
    const CLASS: &str = "x-amz-storage-class";

    let plain = archived("", "plain").await;
    assert!(plain.len() > 5);
    for (key, headers) in plain {
        assert!([SSE, KEY, CLASS].iter().all(|name| header(&headers, name).is_none()), "{key}");
    }
    for (key, headers) in archived("sse = \"AES256\"", "aes").await {
        assert_eq!(header(&headers, SSE).as_deref(), Some("AES256"), "{key}");
        assert_eq!(header(&headers, KEY), None, "{key}");
    }
    let all = "sse = \"aws:kms\"\nsse_kms_key_id = \"arn:key/1\"\nstorage_class = \"GLACIER_IR\"";
    let mut segments = 0;
    for (key, headers) in archived(all, "kms").await {
        assert_eq!(header(&headers, SSE).as_deref(), Some("aws:kms"), "{key}");
        assert_eq!(header(&headers, KEY).as_deref(), Some("arn:key/1"), "{key}");
        let segment = key.contains("/segments/");
        segments += usize::from(segment);
        // Roots, pages and shipped blocks live for minutes: a class that bills by the month is not for them.
        assert_eq!(header(&headers, CLASS).as_deref(), segment.then_some("GLACIER_IR"), "{key}");
    }
    assert!(segments > 0);
}

#[tokio::test]
async fn in_an_outage_further_attempts_end_with_their_budget() {
    let faulty = Faulty::new();
    let requests = RequestSettings { retry_budget: 5, attempts: 4, ..settings(".".into()).requests };
    let store = Store::new(std::sync::Arc::new(faulty.clone()), "p".into(), requests);
    let load = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    let key = object_store::path::Path::from("p/object");
    faulty.plan.lock().down = true;
    for _ in 0..10 {
        assert!(matches!(store.get(&key, 100).await, Err(StoreError::Failed { .. })));
        assert!(matches!(store.create(&key, &["x".into()]).await, Err(StoreError::Failed { .. })));
    }
    assert_eq!(load(&store.requests().errors), 20 + 5, "twenty callers, and five attempts more for all of them");
    assert!(load(&store.requests().retries_refused) >= 15);
    // Every success earns a tenth.
    faulty.plan.lock().down = false;
    store.create(&key, &["x".into()]).await.unwrap();
    for _ in 0..19 {
        store.get(&key, 100).await.unwrap();
    }
    faulty.plan.lock().down = true;
    for _ in 0..10 {
        store.get(&key, 100).await.unwrap_err();
    }
    assert_eq!(load(&store.requests().errors), 25 + 10 + 2);
}

#[tokio::test]
async fn background_bodies_wait_for_the_bandwidth_and_consumers_do_not() {
    let faulty = Faulty::new();
    let requests = RequestSettings { bandwidth_max: Some(10_000_000), ..settings(".".into()).requests };
    let store = Store::new(std::sync::Arc::new(faulty), "p".into(), requests);
    let paced = || store.requests().paced_ms.load(Ordering::Relaxed);
    let key = |n: u32| object_store::path::Path::from(format!("p/{n}"));
    let body = bytes::Bytes::from(vec![7; 1_000_000]);
    for n in 0..5 {
        store.create(&key(n), std::slice::from_ref(&body)).await.unwrap();
    }
    // Half a second at this rate, of which a quarter may go at once; the clock gives some back.
    let written = paced();
    assert!((1..=300).contains(&written), "{written}");
    for n in 0..5 {
        store.get_range(&key(n), 0..1_000_000).await.unwrap();
        store.get(&key(n), 1_000_000).await.unwrap();
    }
    assert_eq!(paced(), written, "what consumers read is not held back");
    store.get_range_paced(&key(0), 0..1_000_000).await.unwrap();
    store.get_range_paced(&key(1), 0..1_000_000).await.unwrap();
    store.get_range_paced(&key(2), 0..1_000_000).await.unwrap();
    assert!(paced() > written);
}

#[tokio::test]
async fn an_s3_server_without_conditional_writes_is_refused() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let s3 = s3::S3 { page: 100, careless: true, ..s3::S3::default() };
    let store_options = s3.serve().await;
    let url = Some("s3://bucket/prefix".into());
    let home = Home::new();
    let refused = Archive::open(ArchiveSettings { url, store_options, ..settings(home.dir.path().into()) }).await;
    let refused = refused.err().unwrap();
    assert!(matches!(refused, ArchiveError::Store(StoreError::Unconditional(_))), "{refused}");
}

#[tokio::test]
async fn a_claim_is_judged_by_numbers_first() {
    use claim::{Judgement, judge};
    assert_eq!(judge(5, None), Judgement::Restore { check: None });
    assert_eq!(judge(5, Some((0, 5))), Judgement::Continue { check: 4 });
    assert_eq!(judge(5, Some((3, 9))), Judgement::Continue { check: 4 });
    assert_eq!(judge(5, Some((0, 4))), Judgement::Restore { check: Some(3) });
    assert!(NoBlocks.bounds().is_none());
}
