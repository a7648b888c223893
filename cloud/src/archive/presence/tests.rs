//! Who may claim, and when: presences that share a bucket, under a virtual clock.

use futures_util::TryStreamExt as _;
use object_store::ObjectStore as _;
use object_store::memory::InMemory;

use super::*;
use crate::archive::ArchiveSettings;
use crate::archive::tests::faulty::Faulty;
use crate::archive::tests::node::{Home, Node, settings};

fn identity(own: u8) -> OwnerIdentity {
    OwnerIdentity { data_id: [own; 16], boot_id: [1; 16], device: 1, inode: own.into() }
}

/// A start on the data directory `own`.
fn start(bucket: &Arc<InMemory>, node_id: i32, own: u8, take_over: bool) -> Arc<Presence> {
    let store = Store::new(bucket.clone(), "some/prefix".into(), RequestSettings::default());
    let settings = PresenceSettings {
        node_id,
        identity: identity(own),
        kafka: vec![AdvertisedListener { name: "k".into(), address: format!("kafka-{own}:9092") }],
        link_url: None,
        host: format!("host-{own}"),
        data_dir: format!("/data-{own}"),
        take_over,
    };
    Presence::with_store(store, settings)
}

/// A node that has shard 0 and beats.
async fn owner(bucket: &Arc<InMemory>, node_id: i32, own: u8) -> (Arc<Presence>, tokio::task::JoinHandle<()>) {
    let presence = start(bucket, node_id, own, false);
    presence.before_claim(0, u32::from(own)).await.unwrap();
    presence.after_claim(0).await;
    let beating = tokio::spawn(presence.clone().run());
    (presence, beating)
}

async fn content(bucket: &Arc<InMemory>) -> Vec<(Path, Option<String>)> {
    let all: Vec<_> = bucket.list(None).try_collect().await.unwrap();
    all.into_iter().map(|object| (object.location, object.e_tag)).collect()
}

#[tokio::test(start_paused = true)]
async fn a_start_is_refused_with_the_owners_name_and_writes_nothing() {
    // The same number, as everybody has it by default, and another one.
    for node_id in [1, 2] {
        let bucket = Arc::new(InMemory::new());
        let (_first, _beating) = owner(&bucket, 1, 1).await;
        let second = start(&bucket, node_id, 2, false);
        let before = content(&bucket).await;
        let refused = second.admit().await.unwrap_err().to_string();
        for part in ["node 1", "host-1", "kafka-1:9092", "/data-1", "[archive] url", "--take-over"] {
            assert!(refused.contains(part), "{part}: {refused}");
        }
        let keys = |content: Vec<(Path, _)>| content.into_iter().map(|(key, _)| key).collect::<Vec<_>>();
        assert_eq!(keys(content(&bucket).await), keys(before));
        let beat = Heartbeat::decode(
            &bucket
                .get_opts(&Path::from("some/prefix/cluster/nodes/0000000001"), Default::default())
                .await
                .unwrap()
                .bytes()
                .await
                .unwrap(),
        );
        assert_eq!(beat.unwrap().host, "host-1", "the owner's own heartbeat stands");
        assert_eq!(second.watches(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_dead_owner_is_watched_for_the_whole_time_and_then_followed() {
    let bucket = Arc::new(InMemory::new());
    let (_first, beating) = owner(&bucket, 1, 1).await;
    beating.abort();
    let second = start(&bucket, 1, 2, false);
    let began = Instant::now();
    second.admit().await.unwrap();
    assert!(began.elapsed() >= WATCH, "{:?}", began.elapsed());
    // Each of its shards asks again, and it costs no further watch.
    second.before_claim(0, 2).await.unwrap();
    second.before_claim(1, 1).await.unwrap();
    assert_eq!(second.watches(), 1);
}

#[tokio::test(start_paused = true)]
async fn its_own_restart_and_a_start_after_an_orderly_stop_watch_nobody() {
    let bucket = Arc::new(InMemory::new());
    let (_first, beating) = owner(&bucket, 1, 1).await;
    beating.abort();
    // Killed, and started again; under another number, too.
    for node_id in [1, 5] {
        let again = start(&bucket, node_id, 1, false);
        again.admit().await.unwrap();
        again.before_claim(0, 9).await.unwrap();
        again.after_claim(0).await;
        assert_eq!(again.watches(), 0);
        again.leave().await;
    }
    let other = start(&bucket, 3, 2, false);
    other.admit().await.unwrap();
    assert_eq!(other.watches(), 0, "the owner has said that it is gone, and was deposed under its older number");
}

#[tokio::test(start_paused = true)]
async fn who_takes_over_asks_nobody() {
    let bucket = Arc::new(InMemory::new());
    let (first, _beating) = owner(&bucket, 1, 1).await;
    let second = start(&bucket, 1, 2, true);
    assert_eq!(second.describe_owners().await.len(), 1);
    second.admit().await.unwrap();
    // The first one finds another's heartbeat under its number, and looks at once.
    let beats = first.beats();
    second.before_claim(0, 2).await.unwrap();
    second.after_claim(0).await;
    let before = *beats.borrow();
    first.beat().await;
    assert_eq!(*beats.borrow(), before + 1);
    assert!(first.owner_of(0, 2).await.unwrap().contains("host-2"));
    second.beat().await;
    first.beat().await;
    assert_eq!(*beats.borrow(), before + 1, "it is told once");
    // Neither what it would say nor that it stops stands for the other.
    first.leave().await;
    assert!(start(&bucket, 2, 3, false).owner_of(0, 2).await.unwrap().contains("host-2"));
}

#[tokio::test(start_paused = true)]
async fn a_claim_that_was_lost_waits_for_the_winner_to_be_seen() {
    let bucket = Arc::new(InMemory::new());
    let loser = start(&bucket, 2, 2, false);
    loser.before_claim(0, 1).await.unwrap();
    loser.claim_lost(0);
    // The winner had asked before the loser was to be seen.
    let winner = async {
        tokio::time::sleep(Duration::from_secs(4)).await;
        let winner = start(&bucket, 1, 1, false);
        winner.shards.lock().insert(0, OwnedShard { number: 0, epoch: 1, claimed: true });
        winner.beat().await;
    };
    let (refused, ()) = tokio::join!(loser.before_claim(0, 2), winner);
    assert!(refused.unwrap_err().to_string().contains("host-1"));
    // Whoever was quicker has died since.
    let bucket = Arc::new(InMemory::new());
    let loser = start(&bucket, 2, 2, false);
    loser.claim_lost(0);
    let began = Instant::now();
    loser.before_claim(0, 2).await.unwrap();
    assert!(began.elapsed() >= WATCH);
}

/// A node with an archive, on a bucket that others share.
async fn node(home: &mut Home, bucket: &Faulty, presence: &Arc<Presence>) -> Result<Node, ArchiveError> {
    let settings = ArchiveSettings { presence: Some(presence.clone()), ..settings(home.dir.path().into()) };
    Node::start_quick(home, bucket, &Faulty::new(), settings).await
}

#[tokio::test(start_paused = true)]
async fn of_two_starts_at_the_same_moment_one_goes_on_and_the_other_is_refused() {
    let bucket = Faulty::new();
    bucket.plan.lock().latency = Duration::from_millis(20);
    let (first, second) = (start(&bucket.inner, 1, 1, false), start(&bucket.inner, 2, 2, false));
    let beating = [tokio::spawn(first.clone().run()), tokio::spawn(second.clone().run())];
    let (mut home, mut other) = (Home::new(), Home::new());
    // Shards are claimed when there is a block; a root must be there for a start to claim.
    {
        let nobody = start(&bucket.inner, 7, 7, false);
        let mut before = Home::new();
        let node = node(&mut before, &bucket, &nobody).await.unwrap();
        node.shipped().await;
        node.stop().await;
        nobody.leave().await;
    }
    let (a, b) = tokio::join!(node(&mut home, &bucket, &first), node(&mut other, &bucket, &second));
    let refused = match (&a, &b) {
        (Ok(_), Err(error)) | (Err(error), Ok(_)) => error,
        both => panic!("one of them goes on: {:?}", (both.0.is_ok(), both.1.is_ok())),
    };
    assert!(matches!(refused, ArchiveError::Owned { .. }), "{refused}");
    let winner = a.or(b).unwrap();
    winner.shard.append(&[]);
    winner.shipped().await;
    assert_eq!(winner.shard.fenced_by(), None, "and it is not disturbed");
    beating.iter().for_each(tokio::task::JoinHandle::abort);
}

#[tokio::test(start_paused = true)]
async fn an_idle_owner_of_a_log_on_its_disk_stops_a_beat_after_it_was_deposed() {
    let bucket = Faulty::new();
    let (mut home, mut other) = (Home::new(), Home::new());
    let first = start(&bucket.inner, 1, 1, false);
    let old = node(&mut home, &bucket, &first).await.unwrap();
    old.shipped().await;
    let beating = tokio::spawn(first.clone().run());
    let second = start(&bucket.inner, 1, 2, true);
    let new = node(&mut other, &bucket, &second).await.unwrap();
    let deposed_at = Instant::now();
    old.shard.until(|_| false).await;
    assert!(old.shard.fenced_by().is_some());
    assert!(deposed_at.elapsed() <= BEAT, "{:?}", deposed_at.elapsed());
    assert_eq!(new.shard.fenced_by(), None);
    beating.abort();
}

#[tokio::test(start_paused = true)]
async fn a_node_that_started_without_the_bucket_asks_before_it_claims() {
    let bucket = Faulty::new();
    let mut home = Home::new();
    let first = start(&bucket.inner, 1, 1, false);
    let old = node(&mut home, &bucket, &first).await.unwrap();
    old.shipped().await;
    old.kill().await;
    // Its bucket is away at the next start, and another node takes the shard over meanwhile.
    let cut_off = bucket.other();
    cut_off.plan.lock().down = true;
    let again = Presence::with_store(
        Store::new(Arc::new(cut_off.clone()), "some/prefix".into(), RequestSettings::default()),
        first.settings.clone(),
    );
    assert!(matches!(again.admit().await, Err(ArchiveError::Store(_))));
    let old = node(&mut home, &cut_off, &again).await.unwrap();
    old.shard.append(&[]);
    let second = start(&bucket.inner, 1, 2, false);
    let mut other = Home::new();
    let new = node(&mut other, &bucket, &second).await.unwrap();
    let beating = tokio::spawn(second.clone().run());
    new.shard.append(&[]);
    new.shipped().await;
    cut_off.plan.lock().down = false;
    old.shard.until(|_| false).await;
    assert!(old.shard.fenced_by().is_some(), "it stops");
    let said = old.archive.status().last_error.unwrap();
    assert!(said.contains("host-2") && said.contains("--take-over"), "{said}");
    assert_eq!(new.shard.fenced_by(), None);
    beating.abort();
}

/// Both of a beat's requests take nearly as long as they may.
#[tokio::test(start_paused = true)]
async fn a_live_owner_with_a_slow_bucket_beats_more_often_than_a_watch_lasts() {
    let bucket = Faulty::new();
    let slow = bucket.other();
    let first = Presence::with_store(
        Store::new(Arc::new(slow.clone()), "some/prefix".into(), RequestSettings::default()),
        start(&bucket.inner, 1, 1, false).settings.clone(),
    );
    first.before_claim(0, 1).await.unwrap();
    first.after_claim(0).await;
    let late = PATIENCE - Duration::from_millis(100);
    (slow.plan.lock().latency, slow.plan.lock().write_latency) = (late, late);
    let beating = tokio::spawn(first.clone().run());
    let (mut known, mut moved, mut longest) = (content(&bucket.inner).await, Instant::now(), Duration::ZERO);
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(120) {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let now = content(&bucket.inner).await;
        if now != known {
            (known, moved) = (now, Instant::now());
        }
        longest = longest.max(moved.elapsed());
    }
    assert!(longest < WATCH, "{longest:?} between two beats");
    // Whatever comes in between, it is never taken for dead.
    for _ in 0..10 {
        assert!(matches!(start(&bucket.inner, 2, 2, false).admit().await, Err(ArchiveError::Owned { .. })));
        tokio::time::sleep(Duration::from_millis(700)).await;
    }
    beating.abort();
}
