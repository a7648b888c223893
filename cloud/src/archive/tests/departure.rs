//! What a deposed node alone has: where the bucket's history left it.

use std::sync::Arc;

use super::*;

/// Looks at a stopped node's log.
async fn look(home: &Home, store: &Faulty, mirror: &Faulty, system: &str) -> Result<Option<Departure>, ArchiveError> {
    look_as(home, store, mirror, system, None).await
}

/// The same, and asks for living owners as `presence`.
async fn look_as(
    home: &Home,
    store: &Faulty,
    mirror: &Faulty,
    system: &str,
    presence: Option<Arc<Presence>>,
) -> Result<Option<Departure>, ArchiveError> {
    let settings = ArchiveSettings { presence, ..settings(home.dir.path().into()) };
    let bucket = Store::new(Arc::new(store.clone()), "some/prefix".into(), settings.requests);
    let local = Store::new(Arc::new(mirror.clone()), "".into(), settings.requests);
    let archive = Archive::looking(settings, bucket, Some(local), system.to_owned());
    archive.departure(home.disk.as_ref().unwrap().as_ref()).await
}

async fn start(home: &mut Home, store: &Faulty, mirror: &Faulty) -> Node {
    let settings = settings(home.dir.path().into());
    Node::start_quick(home, store, mirror, settings).await.unwrap()
}

/// Starts a node over, which claims once more and goes on; what was not named for ever is swept then, if it is to be.
async fn claim_again(home: &mut Home, store: &Faulty, mirror: &Faulty, is_swept: bool) -> Node {
    let node = start(home, store, mirror).await;
    produce(&node, 2);
    node.shipped().await;
    for _ in 0..if is_swept { 3 } else { 0 } {
        produce(&node, 2);
        node.split().await;
    }
    node
}

#[tokio::test(start_paused = true)]
async fn what_a_deposed_node_alone_has_begins_at_the_fence_and_stays_known() {
    let (store, mirror, mut home) = (Faulty::new(), Faulty::new(), Home::new());
    let node = start(&mut home, &store, &mirror).await;
    produce(&node, 4);
    node.split().await;
    produce(&node, 4);
    node.shipped().await;
    let (shipped, shard, system) = (node.shard.positions().0, node.shard.clone(), node.archive.cluster_id().to_owned());
    node.kill().await;
    // It goes on to acknowledge, and ships nothing more.
    for _ in 0..3 {
        shard.append(&[(partition(1), 5)]);
    }
    let before = store.inner.clone();
    assert_eq!(look(&home, &store, &mirror, &system).await.unwrap(), None, "nobody else has claimed");

    let mut other = Home::new();
    let node = start(&mut other, &store, &Faulty::new()).await;
    let found = look(&home, &store, &mirror, &system).await.unwrap().unwrap();
    assert_eq!((found.first, found.next), (shipped, shipped + 3));
    assert!(found.snapshot.is_some_and(|snapshot| snapshot.next_seq <= shipped));
    // However far the new owner is, and whoever comes after it.
    for _ in 0..3 {
        produce(&node, 6);
        node.split().await;
    }
    node.stop().await;
    let mut third = Home::new();
    let node = start(&mut third, &store, &Faulty::new()).await;
    produce(&node, 3);
    node.split().await;
    let found = look(&home, &store, &mirror, &system).await.unwrap().unwrap();
    assert_eq!((found.first, found.next), (shipped, shipped + 3));
    // Another system's bucket says nothing of it.
    assert!(matches!(look(&home, &store, &mirror, "other").await, Err(ArchiveError::ClusterMismatch { .. })));
    assert!(Arc::ptr_eq(&before, &store.inner));
}

#[tokio::test(start_paused = true)]
async fn a_deposed_node_that_had_shipped_everything_has_nothing_alone() {
    let (store, mirror, mut home) = (Faulty::new(), Faulty::new(), Home::new());
    let node = start(&mut home, &store, &mirror).await;
    produce(&node, 4);
    node.shipped().await;
    let (next, system) = (node.shard.positions().0, node.archive.cluster_id().to_owned());
    node.kill().await;
    let mut other = Home::new();
    let node = start(&mut other, &store, &Faulty::new()).await;
    produce(&node, 2);
    node.shipped().await;
    let found = look(&home, &store, &mirror, &system).await.unwrap().unwrap();
    assert_eq!((found.first, found.next), (next, next));
}

#[tokio::test(start_paused = true)]
async fn a_deposed_node_with_records_of_its_own_does_not_start_however_far_the_new_owner_is() {
    // A start that cannot reach the bucket raises its epoch to the new owner's.
    for starts_alone in [false, true] {
        let (store, mirror, mut home) = (Faulty::new(), Faulty::new(), Home::new());
        let node = start(&mut home, &store, &mirror).await;
        produce(&node, 4);
        node.shipped().await;
        let (shipped, shard) = (node.shard.positions().0, node.shard.clone());
        node.kill().await;
        for _ in 0..3 {
            shard.append(&[(partition(1), 5)]);
        }
        if starts_alone {
            store.plan.lock().down = true;
            let node = start(&mut home, &store, &mirror).await;
            node.shard.append(&[(partition(1), 5)]);
            node.kill().await;
            store.plan.lock().down = false;
        }
        let mut other = Home::new();
        let node = start(&mut other, &store, &Faulty::new()).await;
        // All that could be compared block by block is in segments.
        for _ in 0..6 {
            produce(&node, 6);
            node.split().await;
        }
        node.stop().await;
        let settings = settings(home.dir.path().into());
        let refused = Node::start_quick(&mut home, &store, &mirror, settings).await.err().unwrap();
        assert!(matches!(refused, ArchiveError::Diverged { seq, .. } if seq == shipped), "{starts_alone}: {refused}");
    }
}

fn presence(store: &Faulty, own: u8) -> Arc<Presence> {
    let store = Store::new(store.inner.clone(), "some/prefix".into(), RequestSettings::default());
    let identity = OwnerIdentity { data_id: [own; 16], boot_id: [1; 16], device: 1, inode: own.into() };
    Presence::with_store(
        store,
        PresenceSettings {
            node_id: own.into(),
            identity,
            kafka: Vec::new(),
            link_url: None,
            host: format!("host-{own}"),
            data_dir: format!("/data-{own}"),
            take_over: false,
        },
    )
}

/// A copy of a data directory, made while its node runs.
fn copied(home: &Home, mirror: &Faulty) -> (Home, Faulty) {
    (home.image(), Faulty { inner: Arc::new(mirror.inner.fork()), plan: Arc::default() })
}

/// Starts a node without the bucket, and it acknowledges `blocks` blocks after the one that a start makes.
async fn go_alone(home: &mut Home, store: &Faulty, mirror: &Faulty, blocks: u32) {
    let away = store.other();
    away.plan.lock().down = true;
    let node = start(home, &away, mirror).await;
    for _ in 0..blocks {
        node.shard.append(&[(partition(1), 5)]);
    }
    node.kill().await;
}

#[tokio::test(start_paused = true)]
async fn a_copy_departs_from_a_live_original_that_claims_nothing_more() {
    for original_goes_on in [false, true] {
        let (store, mirror, mut home) = (Faulty::new(), Faulty::new(), Home::new());
        let owner = presence(&store, 1);
        let own = ArchiveSettings { presence: Some(owner.clone()), ..settings(home.dir.path().into()) };
        let node = Node::start_quick(&mut home, &store, &mirror, own).await.unwrap();
        let beating = tokio::spawn(owner.clone().run());
        produce(&node, 4);
        node.shipped().await;
        let (shipped, system) = (node.shard.positions().0, node.archive.cluster_id().to_owned());
        let (mut copy, copied_mirror) = copied(&home, &mirror);
        go_alone(&mut copy, &store, &copied_mirror, 3).await;
        if original_goes_on {
            produce(&node, 2);
            node.shipped().await;
        }
        let looked = look_as(&copy, &store, &copied_mirror, &system, Some(presence(&store, 2))).await.unwrap();
        let found = looked.expect("the original lives, so this node does not start again");
        assert_eq!((found.first, found.next), (shipped, shipped + 4), "{original_goes_on}");
        if original_goes_on {
            continue;
        }
        // Once nobody else lives and nothing else was written, this node may start and ship it.
        node.stop().await;
        beating.abort();
        owner.leave().await;
        let looked = look_as(&copy, &store, &copied_mirror, &system, Some(presence(&store, 2))).await.unwrap();
        assert_eq!(looked, None);
    }
}

#[tokio::test(start_paused = true)]
async fn a_copy_departs_where_it_was_made_however_late_its_original_claims_again() {
    for is_swept in [false, true] {
        let (store, mirror, mut home) = (Faulty::new(), Faulty::new(), Home::new());
        let node = start(&mut home, &store, &mirror).await;
        produce(&node, 4);
        node.split().await;
        produce(&node, 4);
        node.shipped().await;
        let (shipped, system) = (node.shard.positions().0, node.archive.cluster_id().to_owned());
        let (mut copy, copied_mirror) = copied(&home, &mirror);
        go_alone(&mut copy, &store, &copied_mirror, 12).await;
        produce(&node, 3);
        node.shipped().await;
        node.kill().await;
        let node = claim_again(&mut home, &store, &mirror, is_swept).await;
        let found = look(&copy, &store, &copied_mirror, &system).await.unwrap().unwrap();
        assert_eq!((found.first, found.next), (shipped, shipped + 13), "{is_swept}");
        node.stop().await;
        // Nor is its log set aside by a start.
        let settings = settings(copy.dir.path().into());
        let refused = Node::start_quick(&mut copy, &store, &copied_mirror, settings).await.err().unwrap();
        assert!(matches!(refused, ArchiveError::Diverged { .. }), "{refused}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_copy_that_took_over_and_was_overtaken_departs_where_it_was_made() {
    for is_swept in [false, true] {
        let (store, mirror, mut home) = (Faulty::new(), Faulty::new(), Home::new());
        let view = store.other();
        let node = start(&mut home, &view, &mirror).await;
        produce(&node, 4);
        node.shipped().await;
        let system = node.archive.cluster_id().to_owned();
        view.plan.lock().down = true;
        // One block that both have and the bucket has not.
        node.shard.append(&[(partition(1), 20)]);
        let made = node.shard.positions().0;
        let (mut copy, copied_mirror) = copied(&home, &mirror);
        let copy_view = store.other();
        let taker = start(&mut copy, &copy_view, &copied_mirror).await;
        copy_view.plan.lock().down = true;
        for _ in 0..5 {
            taker.shard.append(&[(partition(1), 5)]);
        }
        // The original ships once more, where the copy would have.
        view.plan.lock().down = false;
        node.shipped().await;
        produce(&node, 3);
        node.shipped().await;
        copy_view.plan.lock().down = false;
        taker.shard.until(|_| false).await;
        assert!(taker.shard.fenced_by().is_some());
        taker.kill().await;
        node.kill().await;
        let _node = claim_again(&mut home, &store, &mirror, is_swept).await;
        let found = look(&copy, &store, &copied_mirror, &system).await.unwrap().unwrap();
        assert_eq!((found.first, found.next), (made, made + 6), "{is_swept}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_take_over_under_load_leaves_enough_to_tell_what_is_alone_after_the_sweep() {
    for alone in [0, 3] {
        let (store, mirror, mut home) = (Faulty::new(), Faulty::new(), Home::new());
        let node = start(&mut home, &store, &mirror).await;
        produce(&node, 4);
        node.shipped().await;
        let system = node.archive.cluster_id().to_owned();
        // The old owner ships between the new one's look and its fence, and so the fence is made again further on.
        let slow = store.other();
        slow.plan.lock().write_latency = Duration::from_millis(20);
        let mut other = Home::new();
        let load = async {
            for _ in 0..20 {
                node.shard.append(&[(partition(1), 5)]);
                tokio::time::sleep(Duration::from_millis(7)).await;
            }
        };
        let other_mirror = Faulty::new();
        let (owner, ()) = tokio::join!(start(&mut other, &slow, &other_mirror), load);
        slow.plan.lock().write_latency = Duration::ZERO;
        let (next, shipped, _) = node.shard.positions();
        let shard = node.shard.clone();
        node.kill().await;
        for _ in 0..alone {
            shard.append(&[(partition(1), 5)]);
        }
        for _ in 0..4 {
            produce(&owner, 4);
            owner.split().await;
        }
        let fences = keys_under(&store, "/wal/").await;
        assert!(fences.len() >= 3, "the first claim's, and at least two of the take-over: {fences:?}");
        let found = look(&home, &store, &mirror, &system).await.unwrap().unwrap();
        assert_eq!((found.first, found.next), (shipped, next + alone));
    }
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_compared_any_more_is_named_and_not_taken_for_common() {
    let (store, mirror, mut home) = (Faulty::new(), Faulty::new(), Home::new());
    let view = store.other();
    let node = start(&mut home, &view, &mirror).await;
    produce(&node, 4);
    node.shipped().await;
    let (claimed, system) = (node.shard.positions().0, node.archive.cluster_id().to_owned());
    view.plan.lock().down = true;
    produce(&node, 3);
    // The copy ships blocks that the original has too, and then its own.
    let (mut copy, copied_mirror) = copied(&home, &mirror);
    produce(&node, 3);
    node.kill().await;
    let owner = start(&mut copy, &store, &copied_mirror).await;
    produce(&owner, 3);
    owner.shipped().await;
    let found = look(&home, &store, &mirror, &system).await.unwrap().unwrap();
    assert_eq!((found.first, found.certain), (claimed + 3, claimed + 3));
    for _ in 0..3 {
        produce(&owner, 4);
        owner.split().await;
    }
    // The copy's first object is kept, and what followed it is in segments.
    let found = look(&home, &store, &mirror, &system).await.unwrap().unwrap();
    assert_eq!((found.first, found.certain, found.next), (claimed + 1, claimed + 6, claimed + 6));
}
