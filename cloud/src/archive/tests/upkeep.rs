//! Merging, rewriting and sweeping. Time is virtual: the log's clock is set, the task's pauses cost nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use object_store::ObjectStoreExt;
use shared::log::ReadLimits;

use super::faulty::{Faulty, Plan};
use super::node::{Home, Node, partition, settings};
use super::{check_all, keys_under};
use crate::archive::*;
use crate::manifest::SegmentId;

const MINUTE: Duration = Duration::from_secs(60);
const TEN_MINUTES_MS: i64 = 600_000;

/// As it is by default, but for small segments.
fn slow(home: &Home) -> ArchiveSettings {
    let usual = ArchiveSettings::default();
    ArchiveSettings {
        segment_bytes: 64 << 10,
        segment_age: usual.segment_age,
        grace: usual.grace,
        sweep_interval: usual.sweep_interval,
        ..settings(home.dir.path().into())
    }
}

struct Quiet {
    store: Faulty,
    mirror: Faulty,
    home: Home,
}

impl Quiet {
    fn new() -> Self {
        Self { store: Faulty::new(), mirror: Faulty::new(), home: Home::new() }
    }

    async fn start(&mut self) -> Node {
        let settings = slow(&self.home);
        Node::start_quick(&mut self.home, &self.store, &self.mirror, settings).await.unwrap()
    }

    async fn segments(&self) -> usize {
        keys_under(&self.store, "/segments/").await.len()
    }
}

/// Ten minutes of the log: each partition gets one record, and what there is becomes segments.
async fn ten_minutes(node: &Node, number: i64) {
    node.shard.at_ms(number * TEN_MINUTES_MS + 1);
    node.shard.append(&[1, 2, 3, 4].map(|number| (partition(number), 1)));
    node.split().await;
    tokio::time::sleep(MINUTE).await;
}

fn spans(node: &Node, number: u8) -> Vec<(i64, i64)> {
    node.archive.cold().runs(partition(number)).iter().map(|run| (run.base, run.next)).collect()
}

#[tokio::test(start_paused = true)]
async fn small_objects_become_hours_and_hours_become_days() {
    let mut quiet = Quiet::new();
    let node = quiet.start().await;
    node.shard.keep_ms(-1);
    for number in 0..9 {
        ten_minutes(&node, number).await;
    }
    assert_eq!(spans(&node, 1), [(0, 6), (6, 7), (7, 8), (8, 9)], "the first hour is over");
    for number in 9..(26 * 6 + 2) {
        ten_minutes(&node, number).await;
    }
    let end = 26 * 6 + 2;
    assert_eq!(spans(&node, 3), [(0, 144), (144, 150), (150, 156), (156, 157), (157, end)], "a day, two hours");
    tokio::time::sleep(6 * MINUTE).await;
    assert_eq!(quiet.segments().await, 6, "the day takes two objects, what was merged is deleted");
    let largest = node.archive.cold.with_index(|index| index.usage().values().map(|usage| usage.bytes).max());
    assert!(largest.unwrap() <= (64 << 10) + 44, "a segment's size");
    check_all(&node).await;
    let day = node.archive.cold().runs(partition(1))[0];
    assert_eq!((day.appended_ms, day.max_timestamp), (143 * TEN_MINUTES_MS + 1, 1430), "of the newest record");
    // Others find the same: from here, and from the bucket alone.
    node.kill().await;
    let node = quiet.start().await;
    check_all(&node).await;
    node.kill().await;
    let node = Node::start(&mut Home::new(), Some(&quiet.store)).await.unwrap();
    check_all(&node).await;
    assert_eq!(spans(&node, 4).len(), 5);
}

#[tokio::test(start_paused = true)]
async fn a_shard_that_stands_still_is_merged_when_its_hour_is_long_over() {
    let mut quiet = Quiet::new();
    let node = quiet.start().await;
    node.shard.keep_ms(-1);
    for number in 0..4 {
        ten_minutes(&node, number).await;
    }
    let hour = |hours: i64| hours * 3_600_000;
    for (now_ms, expected) in [(0, 4), (hour(2) - 1, 4), (hour(2), 1)] {
        node.shard.at_ms(now_ms);
        tokio::time::sleep(130 * MINUTE).await;
        assert_eq!(spans(&node, 1).len(), expected, "at {now_ms}");
    }
    // Were its clock wrong, and the hour goes on: what came too early is made again, and nothing is lost.
    ten_minutes(&node, 4).await;
    ten_minutes(&node, 5).await;
    ten_minutes(&node, 6).await;
    assert_eq!(spans(&node, 1), [(0, 6), (6, 7)]);
    check_all(&node).await;
}

#[tokio::test(start_paused = true)]
async fn a_merged_run_spans_a_small_part_of_what_its_topic_keeps() {
    let hours = |hours: i64| hours * 3_600_000;
    for keep_ms in [hours(1), hours(5), hours(12), hours(24 * 7), -1] {
        let mut quiet = Quiet::new();
        let node = quiet.start().await;
        node.shard.keep_ms(keep_ms);
        // Nothing in the middle of the day, to be quick.
        for number in (0..70).chain(144 - 8..157) {
            ten_minutes(&node, number).await;
        }
        let spans = spans(&node, 2);
        let longest = spans.iter().map(|(base, next)| next - base).max().unwrap();
        match keep_ms {
            -1 | 604_800_000 => assert_eq!((spans.len(), longest), (4, 78), "a day, two hours, one round"),
            43_200_000 => assert_eq!((spans.len(), longest), (12 + 2 + 2 + 1, 6), "hours only: {spans:?}"),
            _ => assert_eq!((spans.len(), longest), (91, 1), "nothing"),
        }
        check_all(&node).await;
    }
}

#[tokio::test(start_paused = true)]
async fn busy_partitions_are_left_alone() {
    let mut quiet = Quiet::new();
    let node = quiet.start().await;
    node.shard.keep_ms(-1);
    for number in 0..8 {
        node.shard.at_ms(number * TEN_MINUTES_MS);
        // Half a segment each time, and a record beside it.
        node.shard.append(&[(partition(1), 300), (partition(2), 1)]);
        node.split().await;
        tokio::time::sleep(MINUTE).await;
    }
    assert_eq!(spans(&node, 1).len(), 8);
    assert_eq!(spans(&node, 2), [(0, 6), (6, 7), (7, 8)]);
    node.check_readable(partition(1), 0).await;
}

#[tokio::test(start_paused = true)]
async fn a_shard_that_always_has_more_to_split_merges_all_the_same() {
    let mut quiet = Quiet::new();
    let node = quiet.start().await;
    node.shard.keep_ms(-1);
    for second in 0..60 {
        // A round each second: the log's clock goes ten minutes on in each of the first.
        node.shard.at_ms(TEN_MINUTES_MS * second.min(7));
        node.shard.append(&[(partition(1), 700), (partition(2), 1)]);
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert!(spans(&node, 1).len() > 50, "{}", spans(&node, 1).len());
    assert!(spans(&node, 2).iter().any(|(base, next)| next - base >= 5), "{:?}", spans(&node, 2));
}

#[tokio::test(start_paused = true)]
async fn readers_under_way_find_what_was_merged_for_the_grace() {
    let mut quiet = Quiet::new();
    let node = quiet.start().await;
    node.shard.keep_ms(-1);
    for number in 0..6 {
        ten_minutes(&node, number).await;
    }
    let before = keys_under(&quiet.store, "/segments/").await;
    node.shard.at_ms(6 * TEN_MINUTES_MS);
    node.shard.append(&[(partition(1), 1)]);
    node.split().await;
    tokio::time::sleep(MINUTE).await;
    assert_eq!(spans(&node, 1)[0], (0, 6));
    let there = keys_under(&quiet.store, "/segments/").await;
    assert!(before.iter().all(|key| there.contains(key)), "for five minutes");
    tokio::time::sleep(5 * MINUTE).await;
    assert!(keys_under(&quiet.store, "/segments/").await.iter().all(|key| !before.contains(key)));
    check_all(&node).await;
}

/// Cuts the node off after each number of writes of two hours, then starts it again on its disk and on the bucket alone.
#[tokio::test(start_paused = true)]
async fn a_cut_during_a_merge_loses_nothing() {
    let mut merged = 0;
    for cut in (0..110).step_by(2) {
        let mut quiet = Quiet::new();
        let all = quiet.store.clone();
        quiet.store = all.other();
        let node = quiet.start().await;
        node.shard.keep_ms(-1);
        quiet.store.plan.lock().writes_left = Some(cut);
        for number in 0..13 {
            node.shard.at_ms(number * TEN_MINUTES_MS);
            node.shard.append(&[1, 2, 3, 4].map(|number| (partition(number), 1)));
            node.archive.roll_now();
            tokio::time::sleep(MINUTE).await;
        }
        merged += u32::from(spans(&node, 1).len() < 6 && spans(&node, 1).contains(&(0, 6)));
        let state = node.shard.state();
        node.kill().await;
        quiet.store = all.other();
        let node = quiet.start().await;
        assert_eq!(node.shard.fenced_by(), None, "cut {cut}");
        ten_minutes(&node, 13).await;
        check_all(&node).await;
        assert!(state.iter().all(|(partition, end)| node.shard.state()[partition] == end + 1), "cut {cut}");
        assert!(spans(&node, 2).len() <= 4, "cut {cut}: {:?}", spans(&node, 2));
        tokio::time::sleep(6 * MINUTE).await;
        let named = node.archive.status().segments as usize;
        assert_eq!(quiet.segments().await, named, "cut {cut}: the start's sweep finds what was left");
        node.kill().await;
        let restored = Node::start(&mut Home::new(), Some(&all.other())).await.unwrap();
        check_all(&restored).await;
    }
    assert!(merged > 5, "{merged}");
}

#[tokio::test(start_paused = true)]
async fn a_store_that_fails_now_and_then_loses_nothing_in_upkeep() {
    for seed in 0..6 {
        let mut quiet = Quiet::new();
        let node = quiet.start().await;
        node.shard.keep_ms(-1);
        *quiet.store.plan.lock() = Plan { one_in: Some(4), seed, ..Plan::default() };
        for number in 0..20 {
            node.shard.at_ms(number * TEN_MINUTES_MS);
            node.shard.append(&[1, 2, 3, 4].map(|number| (partition(number), 1)));
            node.archive.roll_now();
            tokio::time::sleep(MINUTE).await;
            assert_eq!(node.shard.fenced_by(), None, "seed {seed}");
        }
        *quiet.store.plan.lock() = Plan::default();
        tokio::time::sleep(2 * MINUTE).await;
        node.split().await;
        tokio::time::sleep(10 * MINUTE).await;
        check_all(&node).await;
        assert_eq!(spans(&node, 1)[..3], [(0, 6), (6, 12), (12, 18)], "seed {seed}");
        node.kill().await;
        let restored = Node::start(&mut Home::new(), Some(&quiet.store)).await.unwrap();
        check_all(&restored).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_deposed_owner_merges_nothing() {
    let mut quiet = Quiet::new();
    let all = quiet.store.clone();
    quiet.store = all.other();
    let old = quiet.start().await;
    old.shard.keep_ms(-1);
    for number in 0..6 {
        ten_minutes(&old, number).await;
    }
    old.shard.at_ms(6 * TEN_MINUTES_MS);
    old.shard.append(&[(partition(1), 1)]);
    old.shipped().await;
    // It was about to merge the hour when it lost the bucket from sight.
    quiet.store.plan.lock().down = true;
    let mut new = Quiet { store: all.other(), mirror: Faulty::new(), home: Home::new() };
    let owner = new.start().await;
    owner.shard.keep_ms(-1);
    for number in 7..14 {
        ten_minutes(&owner, number).await;
    }
    let named = spans(&owner, 2);
    quiet.store.plan.lock().down = false;
    old.archive.roll_now();
    old.shard.append(&[(partition(1), 1)]);
    tokio::time::sleep(60 * MINUTE).await;
    assert_eq!(old.shard.fenced_by(), Some(2));
    assert_eq!(spans(&owner, 2), named);
    check_all(&owner).await;
}

#[tokio::test(start_paused = true)]
async fn a_root_whose_answer_was_lost_is_settled_and_not_made_twice() {
    let mut quiet = Quiet::new();
    let node = quiet.start().await;
    node.shard.keep_ms(-1);
    ten_minutes(&node, 0).await;
    quiet.store.plan.lock().lost_answers = Some("/manifest/");
    node.shard.append(&[(partition(1), 5)]);
    node.archive.roll_now();
    tokio::time::sleep(2 * MINUTE).await;
    let roots = keys_under(&quiet.store, "/manifest/").await.len();
    quiet.store.plan.lock().lost_answers = None;
    tokio::time::sleep(2 * MINUTE).await;
    assert_eq!(node.shard.fenced_by(), None);
    assert_eq!(keys_under(&quiet.store, "/manifest/").await.len(), roots);
    ten_minutes(&node, 1).await;
    check_all(&node).await;
}

async fn holders(store: &Faulty, bytes: &[u8; 16], but: &str) -> Vec<String> {
    let mut found = Vec::new();
    for key in keys_under(store, "").await {
        let object: Bytes = store.inner.get(&key.clone().into()).await.unwrap().bytes().await.unwrap();
        if !key.ends_with(but) && object.windows(16).any(|window| window == bytes) {
            found.push(key);
        }
    }
    found
}

#[tokio::test(start_paused = true)]
async fn a_deleted_topic_is_gone_from_the_bucket_in_the_stated_time() {
    let mut quiet = Quiet::new();
    let node = quiet.start().await;
    node.shard.keep_ms(-1);
    node.shipped().await;
    for number in 0..20 {
        ten_minutes(&node, number).await;
    }
    // Some of it is in a segment, some in shipped blocks only.
    node.shard.append(&[(partition(2), 3), (partition(1), 3)]);
    node.shipped().await;
    node.shard.delete(partition(2));
    // A look each minute, a few seconds to write, the grace of five minutes, a second until it is looked for.
    tokio::time::sleep(6 * MINUTE + Duration::from_secs(15)).await;
    let fence = "/wal/00000000000000000000";
    let left = holders(&quiet.store, &[2; 16], fence).await;
    assert!(!left.iter().any(|key| key.contains("/segments/")), "{left:?}");
    // Blocks are shipped until they are split: at the look's round here, after `segment_age` otherwise, and the grace.
    tokio::time::sleep(10 * MINUTE).await;
    assert_eq!(holders(&quiet.store, &[2; 16], fence).await, Vec::<String>::new(), "no block, no snapshot either");
    for number in [1, 3, 4] {
        node.check_readable(partition(number), 0).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_deleted_topic_in_many_objects_is_gone_from_all_of_them_even_after_a_kill() {
    let mut quiet = Quiet::new();
    let node = quiet.start().await;
    for number in 0..40 {
        node.shard.append(&[(partition(1), 100), (partition(2), 1), (partition(3), 100)]);
        node.split().await;
        assert_eq!(quiet.segments().await, number + 1, "a class that is not merged");
    }
    node.shard.delete(partition(2));
    node.archive.roll_now();
    // In the middle of it.
    while spans(&node, 2).len() == 40 {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(spans(&node, 2).len() > 20, "some at a time: {}", spans(&node, 2).len());
    node.kill().await;
    let node = quiet.start().await;
    node.shard.delete(partition(2));
    tokio::time::sleep(20 * MINUTE).await;
    assert_eq!(holders(&quiet.store, &[2; 16], "/wal/00000000000000000000").await, Vec::<String>::new());
    node.check_readable(partition(1), 0).await;
    node.check_readable(partition(3), 0).await;
}

#[tokio::test(start_paused = true)]
async fn an_object_that_is_mostly_dead_is_written_again_whatever_killed_it() {
    let mut quiet = Quiet::new();
    let node = quiet.start().await;
    for _ in 0..3 {
        node.shard.append(&[(partition(1), 100), (partition(2), 40)]);
        node.split().await;
    }
    let before = node.archive.status().segment_bytes;
    node.shard.trim(partition(1), 200);
    node.split().await;
    node.kill().await;
    // Whoever starts next looks at every object, not only at those it has touched.
    let node = quiet.start().await;
    tokio::time::sleep(6 * MINUTE).await;
    let after = node.archive.status().segment_bytes;
    assert!(after * 100 < before * 60, "{before} to {after}");
    let held: u64 = node.archive.cold.with_index(|index| index.usage().values().map(|usage| usage.bytes).sum());
    let stored: u64 = {
        let mut stored = 0;
        for key in keys_under(&quiet.store, "/segments/").await {
            stored += quiet.store.inner.head(&key.into()).await.unwrap().size;
        }
        stored
    };
    assert_eq!((stored, held), (after, after));
    node.check_readable(partition(1), 200).await;
    node.check_readable(partition(2), 0).await;
}

#[tokio::test(start_paused = true)]
async fn an_object_that_cannot_be_read_does_not_hold_up_the_others() {
    let mut quiet = Quiet::new();
    let node = quiet.start().await;
    node.shard.keep_ms(-1);
    for number in 0..3 {
        ten_minutes(&node, number).await;
    }
    let key = object_store::path::Path::from(keys_under(&quiet.store, "/segments/").await.remove(1));
    let mut bytes = quiet.store.inner.get(&key).await.unwrap().bytes().await.unwrap().to_vec();
    bytes[150] ^= 1;
    quiet.store.inner.put(&key, bytes.into()).await.unwrap();
    for number in 3..7 {
        ten_minutes(&node, number).await;
    }
    assert_eq!(spans(&node, 2), [(0, 1), (1, 2), (2, 6), (6, 7)], "the damaged run stays where it is");
    assert!(quiet.store.inner.head(&key).await.is_ok());
    let read = node.archive.cold().read(partition(2), 3, ReadLimits { bytes_max: 1000 }).await.unwrap();
    assert_eq!(read.next, 7);
}

#[tokio::test(start_paused = true)]
async fn a_sweep_takes_what_two_of_them_found_unnamed_and_nothing_that_may_be_anothers() {
    let mut quiet = Quiet::new();
    let node = quiet.start().await;
    node.shard.keep_ms(-1);
    for number in 0..3 {
        ten_minutes(&node, number).await;
    }
    let (epoch, seq) = (node.archive.status().epoch, node.archive.status().manifest_seq);
    let mut strays: BTreeMap<&str, object_store::path::Path> = BTreeMap::new();
    let segment = |epoch, nonce| node.archive.keys.segment(&SegmentId { seq: 1, epoch, number: 0, nonce });
    strays.insert("ours", segment(epoch, 1));
    strays.insert("theirs", segment(epoch + 1, 2));
    let page =
        |seq, nonce| node.archive.keys.page(&crate::manifest::PagePointer { seq, number: 0, nonce, bytes: 1, crc: 0 });
    strays.insert("our page", page(seq, 1));
    strays.insert("their page", page(seq + 2, 2));
    for key in strays.values() {
        quiet.store.inner.put(key, "x".into()).await.unwrap();
    }
    let there = async || {
        let mut there = Vec::new();
        for (name, key) in &strays {
            if quiet.store.inner.head(key).await.is_ok() {
                there.push(*name);
            }
        }
        there
    };
    let day = 24 * 60 * MINUTE;
    tokio::time::sleep(day + 6 * MINUTE).await;
    assert_eq!(there().await.len(), 4, "seen once");
    tokio::time::sleep(day + 6 * MINUTE).await;
    assert_eq!(there().await, ["their page", "theirs"]);
    assert!(node.archive.status().lists < 20);
    check_all(&node).await;
}
