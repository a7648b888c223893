//! A shard on a disk that loses power: whatever was acknowledged is there, and data and positions agree.

use shared::log::conformance::{batch, block_on, from_edge, from_producer, produced, read_all, stream};

use super::*;
use crate::state::{CommittedOffset, GroupChange};
use crate::wal::powercut::{CutDisk, Random};

const TOPIC: u8 = 1;

fn at(index: u32) -> Partition {
    Partition { topic: TopicId([TOPIC; 16]), index }
}

fn open_on(disk: &CutDisk) -> Result<Arc<Shard>, String> {
    let settings =
        FileWalSettings { file_bytes: 32 << 10, hasty_file_bytes: 32 << 10, bytes_max: 1 << 20, background: false };
    let wal = FileWal::open(Box::new(disk.clone()), settings, 3).map_err(|error| error.to_string())?;
    let settings = ShardSettings { tail_bytes_max: 4_000, ..ShardSettings::default() };
    Shard::open(settings, Box::new(wal), Recovered::default(), None, clock()).map_err(|error| error.to_string())
}

/// What was acknowledged.
#[derive(Default)]
struct Acknowledged {
    topic: bool,
    /// Sequence and offset of each of the producer's batches.
    produced: Vec<(i32, Offset)>,
    /// What the producer sends next.
    sequence: i32,
    /// The edge's position as it was told.
    position: Offset,
    log_start: Offset,
    committed: Offset,
}

/// Bursts of appends from a producer and an edge, with commits of a group and trims between.
fn work(shard: &Shard, random: &mut Random, acknowledged: &mut Acknowledged) -> Result<(), AppendError> {
    block_on(shard.commit(vec![Change::created(topic(TOPIC, 2))]))?;
    acknowledged.topic = true;
    for _ in 0..12 {
        let mut position = acknowledged.position;
        let mut calls = Vec::new();
        for _ in 0..1 + random.below(6) {
            let records = 1 + random.below(5) as i32;
            if random.below(2) == 0 {
                let sequence = acknowledged.sequence;
                acknowledged.sequence += records;
                let batch = produced(&batch(records, 1), 7, 0, sequence);
                calls.push((Some(sequence), shard.append(from_producer(at(0), batch))));
            } else {
                let next = position + i64::from(records);
                calls.push((None, shard.append(from_edge(at(1), &stream(1, 1), position, next - 1))));
                position = next;
            }
        }
        for (sequence, call) in calls {
            let appended = block_on(call)?;
            match sequence {
                Some(sequence) => acknowledged.produced.push((sequence, appended.base_offset)),
                None => acknowledged.position = appended.last_offset + 1,
            }
        }
        let offset = acknowledged.position;
        let committed = CommittedOffset { offset, leader_epoch: -1, metadata: String::new(), commit_ms: 0 };
        let group = "g".to_owned();
        block_on(shard.commit(vec![GroupChange::OffsetCommitted { group, partition: at(1), committed }.into()]))?;
        acknowledged.committed = offset;
        if random.below(3) == 0 {
            let before = random.below(acknowledged.position as u64 + 1) as i64;
            if let Ok(log_start) = block_on(shard.trim(at(1), before)) {
                acknowledged.log_start = log_start;
            }
        }
    }
    Ok(())
}

fn judge(shard: &Shard, acknowledged: &mut Acknowledged) {
    if !acknowledged.topic {
        return;
    }
    let found = read_all(shard, at(0), 0, 3_000);
    let mut next = 0;
    for batch in &found {
        assert_eq!(batch.base_offset(), next, "no hole");
        next = batch.last_offset() + 1;
    }
    for (sequence, offset) in &acknowledged.produced {
        let batch = found.iter().find(|batch| batch.base_offset() == *offset).expect("acknowledged");
        assert_eq!(batch.base_sequence(), *sequence);
    }
    let bounds = shard.bounds(at(1)).unwrap();
    assert!(bounds.log_start >= acknowledged.log_start);
    let position = read_state(shard, |state| state.stream(&stream(1, 1)).map_or(0, |stream| stream.next));
    assert!(position >= acknowledged.position, "{position} was {}", acknowledged.position);
    assert_eq!(position, bounds.high_watermark, "position and data are one append");
    let edge = read_all(shard, at(1), bounds.log_start, 3_000);
    assert_eq!(edge.last().map_or(bounds.log_start, |batch| batch.last_offset() + 1), bounds.high_watermark);
    let committed = read_state(shard, |state| state.committed("g", at(1)).map_or(0, |committed| committed.offset));
    assert!(committed >= acknowledged.committed);
    // Everybody goes on from what is there, as a producer and an edge do that ask.
    acknowledged.position = position;
    acknowledged.sequence = found.last().map_or(0, |batch| batch.base_sequence() + batch.record_count());
}

#[test]
fn a_power_cut_loses_nothing_that_was_answered() {
    let mut cut = 0;
    for seed in 0..150 {
        let mut random = Random(seed);
        let mut acknowledged = Acknowledged::default();
        let mut disk = CutDisk::cut_at(1 + random.below(150));
        for _ in 0..3 {
            if let Ok(shard) = open_on(&disk) {
                judge(&shard, &mut acknowledged);
                cut += usize::from(work(&shard, &mut random, &mut acknowledged).is_err());
                shard.close();
            }
            disk = disk.survivor(&mut random);
            disk.cut_after(1 + random.below(100));
        }
        let shard = open_on(&disk.survivor(&mut random)).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        judge(&shard, &mut acknowledged);
        if let Some((sequence, offset)) = acknowledged.produced.last() {
            let found = read_all(&*shard, at(0), *offset, 1);
            let records = found[0].record_count();
            let again = shard.append(from_producer(at(0), produced(&batch(records, 1), 7, 0, *sequence)));
            match block_on(again) {
                Ok(again) => assert_eq!((again.base_offset, again.duplicate), (*offset, true)),
                // More than five batches came behind it, unanswered.
                Err(error) => assert!(matches!(error, AppendError::OutOfOrderSequence { .. }), "{error}"),
            }
        }
    }
    assert!(cut > 200, "the power was cut {cut} times in the middle of work");
}
