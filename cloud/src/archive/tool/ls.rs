//! `ls`: what is in an archive.

use std::collections::BTreeMap;
use std::io::Write;

use futures_util::StreamExt;
use object_store::path::Path;
use serde::Serialize;
use shared::batch::HEADER_BYTES;
use shared::name::{Offset, Partition, TimestampMs, TopicId};

use super::chain::{Follower, walk};
use super::view::{ShardView, View};
use super::{CLEAN, FINDINGS, Finding, ToolError, bytes_text};
use crate::archive::presence::{nodes, sightings};
use crate::archive::{NodePhase, Sighting, Store};
use crate::block::{Block, split_batches};
use crate::manifest::HeldRun;

/// First batches that are looked at, at a time.
const CONCURRENCY: usize = 16;

#[derive(Debug, Serialize)]
struct Listing {
    archive: String,
    cluster_id: Option<String>,
    /// What nodes say of themselves: a hint, and no part of the archive.
    nodes: Vec<NodeLine>,
    shards: Vec<ShardLine>,
    partitions: Vec<PartitionLine>,
    #[serde(skip_serializing_if = "Option::is_none")]
    objects: Option<Vec<ObjectLine>>,
    findings: Vec<Finding>,
}

#[derive(Debug, Serialize)]
struct ShardLine {
    shard: u32,
    root: u64,
    epoch: u32,
    trim: u64,
    /// First block of the shipped object that a replay begins with.
    wal: u64,
    segments: u64,
    segment_bytes: u64,
    wal_objects: u64,
    wal_bytes: u64,
    /// After the last shipped block.
    wal_next: u64,
}

#[derive(Debug, Default, Serialize)]
struct PartitionLine {
    topic: String,
    topic_id: String,
    partition: u32,
    shard: u32,
    /// The first offset that may be read.
    log_start: Offset,
    /// First and after-last offset of the records that are there, in segments or shipped.
    from: Offset,
    next: Offset,
    runs: u64,
    objects: u64,
    run_bytes: u64,
    wal_bytes: u64,
    /// Timestamp of the first record, and the greatest of all.
    first_timestamp: Option<TimestampMs>,
    max_timestamp: Option<TimestampMs>,
}

#[derive(Debug, Serialize)]
struct NodeLine {
    key: String,
    /// The node, for people.
    node: String,
    /// Whether it has stopped in order.
    gone: bool,
    /// Shards and the epochs that it claimed them with.
    shards: Vec<(u32, u32)>,
}

impl NodeLine {
    fn of(seen: &Sighting) -> Self {
        let beat = seen.beat.as_ref();
        Self {
            key: seen.key.to_string(),
            node: seen.describe(),
            gone: beat.is_some_and(|beat| beat.state == NodePhase::Gone),
            shards: beat
                .iter()
                .flat_map(|beat| &beat.shards)
                .filter(|owned| owned.claimed)
                .map(|owned| (owned.number, owned.epoch))
                .collect(),
        }
    }
}

#[derive(Debug, Serialize)]
struct ObjectLine {
    key: String,
    bytes: u64,
    /// Whether the root in force names it, or keeps it as a fence, or it is a node's heartbeat.
    named: bool,
}

/// Runs the command.
pub(super) async fn run(store: &Store, objects: bool, json: bool, out: &mut dyn Write) -> Result<i32, ToolError> {
    let listing = list(store, objects).await?;
    if json {
        serde_json::to_writer_pretty(&mut *out, &listing).map_err(std::io::Error::from)?;
        writeln!(out)?;
    } else {
        print(&listing, out)?;
    }
    for finding in &listing.findings {
        eprintln!("{finding}");
    }
    Ok(if listing.findings.is_empty() { CLEAN } else { FINDINGS })
}

async fn list(store: &Store, objects: bool) -> Result<Listing, ToolError> {
    let mut findings = Vec::new();
    let mut view = View::load(store, &mut findings).await?;
    let mut listing = Listing {
        archive: store.describe(),
        cluster_id: view.cluster_id.clone(),
        nodes: sightings(store).await?.iter().map(NodeLine::of).collect(),
        shards: Vec::new(),
        partitions: Vec::new(),
        objects: None,
        findings: Vec::new(),
    };
    if objects {
        let lines = view.shards.iter().flat_map(|shard| {
            let named = shard.named();
            let line = move |(key, bytes): (&Path, &u64)| ObjectLine {
                key: key.to_string(),
                bytes: *bytes,
                named: named.contains(key),
            };
            shard.objects.iter().map(line)
        });
        let beats = store.list(&nodes(store.prefix())).await?.into_iter();
        let beats = beats.map(|beat| ObjectLine { key: beat.location.to_string(), bytes: beat.size, named: true });
        listing.objects = Some(lines.chain(beats).collect());
    }
    let mut partitions: BTreeMap<(u32, Partition), PartitionLine> = BTreeMap::new();
    for shard in &mut view.shards {
        let number = shard.root.shard;
        let mut lines = archived(store, shard).await?;
        let mut state = std::mem::take(&mut shard.state);
        let mut follower = Follower::new(&mut state);
        let follow = |key: &Path, position: u64, block: &Block, findings: &mut Vec<Finding>| {
            follower.follow(key, position, block, findings);
            add_block(&mut lines, block);
            Ok(())
        };
        let walked = walk(store, shard, &mut findings, follow, |_| {}).await?;
        let segments = shard.segments();
        listing.shards.push(ShardLine {
            shard: number,
            root: shard.root.seq,
            epoch: shard.root.epoch,
            trim: shard.root.trim,
            wal: shard.root.wal,
            segments: segments.len() as u64,
            segment_bytes: segments.values().map(|(size, _)| size).sum(),
            wal_objects: walked.objects,
            wal_bytes: walked.bytes,
            wal_next: walked.next,
        });
        for (partition, known) in state.partitions() {
            let line = lines.entry(*partition).or_insert_with(|| PartitionLine {
                from: known.high_watermark,
                next: known.high_watermark,
                ..PartitionLine::default()
            });
            line.log_start = known.log_start;
        }
        shard.state = state;
        partitions.extend(lines.into_iter().map(|(partition, line)| ((number, partition), line)));
    }
    let topics = view.topics();
    for ((shard, partition), line) in partitions {
        listing.partitions.push(PartitionLine {
            topic: topic_name(&topics, partition.topic),
            topic_id: partition.topic.to_string(),
            partition: partition.index,
            shard,
            ..line
        });
    }
    listing.partitions.sort_by(|a, b| (&a.topic, a.partition).cmp(&(&b.topic, b.partition)));
    listing.findings = findings;
    Ok(listing)
}

/// The name of a topic; of one that is deleted, its id.
fn topic_name(topics: &BTreeMap<TopicId, String>, id: TopicId) -> String {
    topics.get(&id).cloned().unwrap_or_else(|| format!("(deleted) {id}"))
}

/// What the index says of each partition, and when its first record was made.
async fn archived(store: &Store, shard: &ShardView) -> Result<BTreeMap<Partition, PartitionLine>, ToolError> {
    let lines = shard.runs.iter().map(|(partition, runs)| async move {
        let first = match runs.first() {
            Some(held) => first_timestamp(store, shard, held).await,
            None => None,
        };
        let mut objects: Vec<_> = runs.iter().map(|held| held.object).collect();
        objects.dedup();
        let line = PartitionLine {
            from: runs.first().map_or(0, |held| held.run.base),
            next: runs.last().map_or(0, |held| held.run.next),
            runs: runs.len() as u64,
            objects: objects.len() as u64,
            run_bytes: runs.iter().map(|held| held.run.length).sum(),
            first_timestamp: first,
            max_timestamp: runs.iter().map(|held| held.run.max_timestamp).max(),
            ..PartitionLine::default()
        };
        (*partition, line)
    });
    Ok(futures_util::stream::iter(lines).buffer_unordered(CONCURRENCY).collect().await)
}

/// The base timestamp of a run's first batch; `None` where it cannot be read, which is for `verify` to tell.
async fn first_timestamp(store: &Store, shard: &ShardView, held: &HeldRun) -> Option<TimestampMs> {
    let (key, start) = (shard.keys.segment(&held.object), held.run.position);
    let head = store.get_range_paced(&key, start..start + HEADER_BYTES as u64).await.ok()?;
    Some(i64::from_be_bytes(head.get(27..35)?.try_into().ok()?))
}

fn add_block(lines: &mut BTreeMap<Partition, PartitionLine>, block: &Block) {
    for entry in block.entries() {
        let line = lines
            .entry(entry.partition)
            .or_insert_with(|| PartitionLine { from: entry.base, ..PartitionLine::default() });
        line.next = entry.last.saturating_add(1);
        line.wal_bytes += u64::from(entry.bytes);
        line.max_timestamp = line.max_timestamp.max(Some(entry.max_timestamp));
        if line.first_timestamp.is_none() {
            let batches = split_batches(block.data(entry)).unwrap_or_default();
            line.first_timestamp = batches.first().map(|batch| batch.base_timestamp());
        }
    }
}

fn print(listing: &Listing, out: &mut dyn Write) -> Result<(), ToolError> {
    let cluster = listing.cluster_id.as_deref().unwrap_or("unknown");
    writeln!(out, "archive {}, system {cluster}", listing.archive)?;
    for line in &listing.nodes {
        let state = if line.gone { "stopped in order" } else { "says that it serves" };
        writeln!(out, "{}: {state}", line.node)?;
    }
    for shard in &listing.shards {
        writeln!(
            out,
            "shard {}: root {}, epoch {}, trim {}; {} segments ({}); {} shipped log objects ({}) up to block {}",
            shard.shard,
            shard.root,
            shard.epoch,
            shard.trim,
            shard.segments,
            bytes_text(shard.segment_bytes),
            shard.wal_objects,
            bytes_text(shard.wal_bytes),
            shard.wal_next
        )?;
    }
    let head =
        ["TOPIC", "PARTITION", "SHARD", "FROM", "TO", "RUNS", "OBJECTS", "BYTES", "IN LOG", "FIRST", "GREATEST TIME"];
    let mut rows: Vec<Vec<String>> = vec![head.map(str::to_owned).to_vec()];
    let time = |at: Option<TimestampMs>| at.map_or("-".to_owned(), utc);
    rows.extend(listing.partitions.iter().map(|line| {
        vec![
            line.topic.clone(),
            line.partition.to_string(),
            line.shard.to_string(),
            line.from.max(line.log_start).to_string(),
            line.next.to_string(),
            line.runs.to_string(),
            line.objects.to_string(),
            bytes_text(line.run_bytes),
            bytes_text(line.wal_bytes),
            time(line.first_timestamp),
            time(line.max_timestamp),
        ]
    }));
    print_rows(&rows, out)?;
    if let Some(objects) = &listing.objects {
        let rows: Vec<Vec<String>> = objects
            .iter()
            .map(|line| {
                let named = if line.named { "" } else { "not named" };
                vec![line.key.clone(), line.bytes.to_string(), named.to_owned()]
            })
            .collect();
        print_rows(&rows, out)?;
    }
    Ok(())
}

fn print_rows(rows: &[Vec<String>], out: &mut dyn Write) -> Result<(), ToolError> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    for row in rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        writeln!(out, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
    }
    Ok(())
}

/// A time for people: `2026-01-31T23:59:59Z`. Days to dates after the proleptic Gregorian calendar, in eras of 400 years.
fn utc(ms: TimestampMs) -> String {
    let seconds = ms.div_euclid(1000);
    let (days, in_day) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Years begin in March, so that a leap day comes last.
    let days = days + 719_468;
    let (era, day) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", in_day / 3600, in_day / 60 % 60, in_day % 60)
}

#[cfg(test)]
mod tests {
    use super::utc;

    #[test]
    fn times_are_told_as_the_calendar_has_them() {
        for (ms, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399_999, "2000-02-28T23:59:59Z"),
            (951_782_400_000, "2000-02-29T00:00:00Z"),
            (951_868_800_000, "2000-03-01T00:00:00Z"),
            (1_767_225_599_000, "2025-12-31T23:59:59Z"),
            (-1, "1969-12-31T23:59:59Z"),
        ] {
            assert_eq!(utc(ms), text);
        }
    }
}
