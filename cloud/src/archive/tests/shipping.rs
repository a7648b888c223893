//! When blocks are shipped, on a virtual clock: late while nothing needs them shipped, and then as fast as they come.

use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, sleep};

use super::faulty::Faulty;
use super::node::{Home, Node, partition, settings};
use crate::archive::*;

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

async fn node(home: &mut Home) -> (Node, Faulty) {
    let (store, usual) = (Faulty::new(), ArchiveSettings::default());
    let settings = ArchiveSettings {
        max_lag: usual.max_lag,
        ship_bytes: usual.ship_bytes,
        segment_bytes: 1 << 40,
        ..settings(home.dir.path().into())
    };
    let node = Node::start_quick(home, &store, &Faulty::new(), settings).await.unwrap();
    // The claim's own object, which is made at once.
    node.shipped().await;
    (node, store)
}

/// Whatever the blocks' sizes are, what comes is shipped as fast as it comes, from half of `max_lag` on.
#[tokio::test(start_paused = true)]
async fn shipped_bytes_keep_up_with_blocks_of_every_size() {
    const RATE: usize = 32 * MIB;
    const STEPS_PER_SEC: usize = 100;
    const LATE: usize = 5;
    let (ship_bytes, max_lag) = (ArchiveSettings::default().ship_bytes, ArchiveSettings::default().max_lag);
    assert_eq!(max_lag.as_secs() as usize, 2 * LATE);
    let half = ship_bytes / 2;
    let cases: [&[usize]; 11] = [
        &[KIB],
        &[4 * KIB],
        &[100 * KIB],
        &[MIB],
        &[3 * MIB],
        &[half - 1],
        &[half + 1],
        &[ship_bytes],
        &[ship_bytes + 100],
        // Each small one makes an object that is less than half full, because the large one does not fit beside it.
        &[2 * MIB, 7 * MIB],
        &[KIB, ship_bytes, half + 1],
    ];
    for sizes in cases {
        let mut home = Home::new();
        let (node, _store) = node(&mut home).await;
        let blocks: Vec<Bytes> = sizes.iter().map(|size| vec![7; *size].into()).collect();
        let largest = sizes.iter().max().copied().unwrap_or(0);
        let (mut produced, mut next) = (0, blocks.iter().cycle());
        let mut shipped_in = Vec::new();
        for second in 0..LATE + 3 {
            let before = produced - node.backlog_bytes();
            for step in 0..STEPS_PER_SEC {
                let due = RATE * second + RATE / STEPS_PER_SEC * (step + 1);
                while produced < due {
                    let block = next.next().expect("a cycle").clone();
                    produced += block.len();
                    node.shard.append_opaque(block);
                }
                sleep(Duration::from_secs(1) / STEPS_PER_SEC as u32).await;
                // What may wait, and one object.
                let bound = RATE * LATE + ship_bytes + 2 * largest;
                let waits = node.backlog_bytes();
                assert!(waits <= bound, "{waits} bytes wait in second {second} with blocks of {sizes:?}");
            }
            shipped_in.push(produced - node.backlog_bytes() - before);
        }
        let (slack, kept_up) = (ship_bytes + 2 * largest, &shipped_in[LATE + 1..]);
        assert!(kept_up.iter().all(|bytes| *bytes + slack >= RATE), "{sizes:?}: {shipped_in:?} bytes per second");
        // Of two neighbours the second's first block did not fit into the first.
        let (puts, most) = (node.archive.status().puts as usize, produced * 2 / ship_bytes + 10);
        assert!(puts <= most, "{sizes:?}: {puts} PUTs for {produced} bytes");
        node.kill().await;
    }
}

/// A PUT costs money: what comes slowly waits for company as long as `max_lag` allows.
#[tokio::test(start_paused = true)]
async fn a_trickle_costs_one_put_for_each_half_of_max_lag() {
    for (pause, bytes) in [(1000, KIB), (100, KIB), (20, 4 * KIB)] {
        let mut home = Home::new();
        let (node, _store) = node(&mut home).await;
        let before = node.archive.status().puts;
        let (block, begun) = (Bytes::from(vec![7; bytes]), Instant::now());
        let mut oldest = Duration::ZERO;
        while begun.elapsed() < Duration::from_secs(600) {
            node.shard.append_opaque(block.clone());
            sleep(Duration::from_millis(pause)).await;
            oldest = oldest.max(node.shard.backlog().map_or(Duration::ZERO, |backlog| backlog.age));
        }
        let puts = node.archive.status().puts - before;
        assert!((100..=121).contains(&puts), "{puts} PUTs in 120 halves of max_lag, a block each {pause} ms");
        assert!(oldest < Duration::from_secs(6), "a block waited {oldest:?}");
        node.kill().await;
    }
}

/// Producers may wait for what a round makes free, so it does not wait for blocks that never come.
#[tokio::test(start_paused = true)]
async fn a_round_does_not_wait_for_company_of_the_last_blocks() {
    let mut home = Home::new();
    let (node, _store) = node(&mut home).await;
    for _ in 0..5 {
        node.shard.append(&[(partition(1), 20)]);
        let begun = Instant::now();
        node.split().await;
        // A tick of the splitter, and no half of max_lag.
        assert!(begun.elapsed() < Duration::from_secs(2), "the round took {:?}", begun.elapsed());
    }
    node.check_readable(partition(1), 0).await;
}

/// What waits may wait, but not for room that producers need.
#[tokio::test(start_paused = true)]
async fn a_log_that_fills_is_shipped_before_its_time() {
    let mut home = Home::new();
    let store = Faulty::new();
    let settings = ArchiveSettings {
        segment_bytes: 16 << 10,
        ship_bytes: MIB,
        max_lag: Duration::from_secs(600),
        ..settings(home.dir.path().into())
    };
    let node = Node::start_quick(&mut home, &store, &Faulty::new(), settings).await.unwrap();
    node.shipped().await;
    node.shard.wal_bytes_max.store(256 << 10, Ordering::Relaxed);
    let fill = async |kib: u64| {
        while node.shard.durable().wal_bytes < kib << 10 {
            node.shard.append(&[(partition(1), 10)]);
        }
        sleep(Duration::from_secs(3)).await;
        node.shard.positions().0 - node.shard.positions().1
    };
    assert!(fill(60).await > 10, "below a quarter the oldest block's age counts");
    assert_eq!(fill(68).await, 0, "above it a round hurries");
    node.kill().await;
}

/// A log that fills is split again at once, for as long as there is enough for a round.
#[tokio::test(start_paused = true)]
async fn rounds_follow_each_other_while_there_is_enough() {
    let mut home = Home::new();
    let store = Faulty::new();
    let settings = ArchiveSettings { segment_bytes: 64 << 10, ship_bytes: MIB, ..settings(home.dir.path().into()) };
    let node = Node::start_quick(&mut home, &store, &Faulty::new(), settings).await.unwrap();
    store.plan.lock().write_latency = Duration::from_millis(20);
    let before = node.archive.status().manifest_seq;
    for _ in 0..1000 {
        // More than a round's worth.
        node.shard.append(&[(partition(1), 120)]);
        sleep(Duration::from_millis(10)).await;
    }
    // Each takes a handful of writes.
    let rounds = node.archive.status().manifest_seq - before;
    assert!(rounds > 30, "{rounds} rounds in 10 s");
}

/// The lag counts from when the oldest block was appended, however the archive fares.
#[tokio::test(start_paused = true)]
async fn the_backlog_ages_while_the_bucket_is_away_and_ends_with_it() {
    let mut home = Home::new();
    let (node, store) = node(&mut home).await;
    assert_eq!(node.shard.backlog(), None);
    store.plan.lock().down = true;
    node.shard.append(&[(partition(1), 20)]);
    for _ in 0..10 {
        sleep(Duration::from_secs(60)).await;
        node.shard.append(&[(partition(1), 20)]);
    }
    let backlog = node.shard.backlog().unwrap();
    assert_eq!(backlog.age.as_secs(), 600);
    store.plan.lock().down = false;
    // The pause between attempts has grown to half a minute or so.
    sleep(Duration::from_secs(120)).await;
    assert_eq!(node.shard.backlog(), None);
}
