//! Many quiet partitions: what hours of one record a minute cost, counted.

use std::time::Duration;

use shared::name::{Partition, TopicId};

use super::faulty::Faulty;
use super::keys_under;
use super::node::{Home, Node, settings};
use crate::archive::*;

/// What an hour took.
#[derive(Debug, Clone, Copy, Default)]
struct Hour {
    puts: u64,
    gets: u64,
    deletes: u64,
    put_bytes: u64,
    /// Segment, page, root and WAL objects at its end.
    objects: usize,
    segments: u64,
    runs: usize,
    index_bytes: usize,
}

/// Runs `count` partitions, one record a minute each, under the default settings but for the shipping, which is once a
/// minute here: what it costs is the same for any number of partitions.
async fn simulate(count: u32, hours: u64) -> Vec<Hour> {
    let partitions: Vec<Partition> =
        (0..count).map(|n| Partition { topic: TopicId([(n / 1000) as u8 + 1; 16]), index: n % 1000 }).collect();
    let (store, mirror, mut home) = (Faulty::new(), Faulty::new(), Home::new());
    let usual = ArchiveSettings::default();
    let settings = ArchiveSettings {
        max_lag: Duration::from_secs(60),
        ship_bytes: usual.ship_bytes,
        segment_bytes: usual.segment_bytes,
        segment_age: usual.segment_age,
        grace: usual.grace,
        ..settings(home.dir.path().into())
    };
    let node = Node::start_quick(&mut home, &store, &mirror, settings).await.unwrap();
    node.shard.keep_ms(7 * 24 * 3_600_000);
    let mut before = node.archive.status();
    let mut figures = Vec::new();
    for hour in 0..hours {
        for minute in hour * 60..hour * 60 + 60 {
            node.shard.at_ms(minute as i64 * 60_000);
            node.shard.append_each(&partitions, minute as i64);
            tokio::time::sleep(Duration::from_secs(60)).await;
        }
        let now = node.archive.status();
        let (runs, index_bytes) = node.archive.cold.with_index(|index| (index.run_count(), index.memory_bytes()));
        figures.push(Hour {
            puts: now.puts - before.puts,
            gets: now.gets - before.gets,
            deletes: now.deletes - before.deletes,
            put_bytes: now.put_bytes - before.put_bytes,
            objects: keys_under(&store, "").await.len(),
            segments: now.segments,
            runs,
            index_bytes,
        });
        before = now;
    }
    assert_eq!(node.shard.fenced_by(), None);
    for partition in [partitions[0], partitions[count as usize / 2], partitions[count as usize - 1]] {
        node.check_readable(partition, 0).await;
    }
    assert_eq!(node.archive.status().request_errors, 0);
    figures
}

fn print(count: u32, figures: &[Hour]) {
    println!("{count} partitions, one record a minute each");
    println!("hour   PUTs  of them ships  GETs  DELETEs  MB written  objects  segments    runs  index KB");
    for (hour, figures) in figures.iter().enumerate() {
        let Hour { puts, gets, deletes, put_bytes, objects, segments, runs, index_bytes } = figures;
        let (megabytes, kilobytes) = (*put_bytes as f64 / 1e6, index_bytes / 1000);
        println!(
            "{hour:4} {puts:6} {:14} {gets:5} {deletes:8} {megabytes:11.1} {objects:8} {segments:9} {runs:7} {kilobytes:9}",
            60
        );
    }
}

fn check(count: u32, figures: &[Hour]) {
    print(count, figures);
    for hour in figures {
        // 60 ships; 6 rounds and a few merges, each of an object or more, pages of 4096 runs, a snapshot, a root.
        let pages = 8 * u64::from(count.div_ceil(4096) + 1);
        // At midnight each object of the day reads from each of its hours.
        assert!(hour.puts < 60 + 50 + pages + hour.segments, "{hour:?}");
        assert!(hour.gets < 60 + hour.segments * 60 && hour.objects < 120 + pages as usize, "{hour:?}");
        assert!(hour.deletes < 60 + 70 + 4 * pages, "{hour:?}");
        assert!(hour.index_bytes < hour.runs * 84 + 100 * count as usize, "{hour:?}");
        // A run for each hour of the day that is over, six for the one that is not, one for each day.
        assert!(hour.runs <= (24 + 8) * count as usize, "{hour:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_quiet_partitions_cost_does_not_grow_with_their_number() {
    let few = simulate(50, 4).await;
    check(50, &few);
    let many = simulate(1000, 4).await;
    check(1000, &many);
    let puts = |figures: &[Hour]| figures.iter().skip(1).map(|hour| hour.puts).sum::<u64>();
    // Twenty times as many partitions: a second page of the index now and then.
    assert!(puts(&many) <= puts(&few) + puts(&few) / 20, "{} and {}", puts(&few), puts(&many));
}

#[tokio::test(start_paused = true)]
#[ignore = "for the figures in docs/benchmarks.md: minutes"]
async fn ten_thousand_quiet_partitions() {
    check(500, &simulate(500, 26).await);
    check(10_000, &simulate(10_000, 26).await);
}
