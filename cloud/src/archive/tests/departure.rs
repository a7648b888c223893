//! What a deposed node alone has: where the bucket's history left it.

use std::sync::Arc;

use super::*;

/// Looks at a stopped node's log.
async fn look(home: &Home, store: &Faulty, mirror: &Faulty, system: &str) -> Result<Option<Departure>, ArchiveError> {
    let settings = settings(home.dir.path().into());
    let bucket = Store::new(Arc::new(store.clone()), "some/prefix".into(), settings.requests);
    let local = Store::new(Arc::new(mirror.clone()), "".into(), settings.requests);
    let archive = Archive::looking(settings, bucket, Some(local), system.to_owned());
    archive.departure(home.disk.as_ref().unwrap().as_ref()).await
}

async fn start(home: &mut Home, store: &Faulty, mirror: &Faulty) -> Node {
    let settings = settings(home.dir.path().into());
    Node::start_quick(home, store, mirror, settings).await.unwrap()
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
