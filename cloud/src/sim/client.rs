//! Clients of a shard: an idempotent producer as Kafka's, and a reader.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use shared::batch::{Batch, BatchBuilder, Compression};
use shared::log::conformance::{from_producer, produced as stamped};
use shared::log::{AppendError, Appended, ReadError, ReadLimits};

use super::node::{Up, produced, streamed};
use super::scheduler::Owner;
use super::world::{MEMORY, World};
use super::{chance, draw, fail, note};

/// Most batches without an answer, as in Kafka.
const UNANSWERED_MAX: usize = 5;

struct Unanswered {
    marks: Vec<u64>,
    sequence: i32,
    batch: Batch,
}

/// Sends numbered batches until each is acknowledged.
pub async fn produce(world: World, owner: Owner, shard: u32) {
    let producer_id = i64::from(owner);
    let (mut epoch, mut sequence) = (0i16, 0i32);
    let mut waiting: VecDeque<Unanswered> = VecDeque::new();
    let mut guess = 0;
    let pace = 50 + draw(2000);
    loop {
        let burst = if world.writes() { 1 + draw(UNANSWERED_MAX as u64) as usize } else { 0 };
        while waiting.len() < burst {
            let marks: Vec<u64> = (0..1 + draw(4)).map(|_| world.mark()).collect();
            let batch = stamped(&batch(&marks), producer_id, epoch, sequence);
            sequence += marks.len() as i32;
            let at = sequence - marks.len() as i32;
            waiting.push_back(Unanswered { marks, sequence: at, batch });
        }
        world.producer_idle(owner, waiting.is_empty());
        if waiting.is_empty() {
            tokio::time::sleep(Duration::from_millis(500)).await;
            continue;
        }
        let sent: Vec<Batch> = waiting.iter().map(|waiting| waiting.batch.clone()).collect();
        let Some(node) = world.node_of(shard, guess) else { return };
        let work = move |up: Up| -> shared::log::BoxFuture<'static, Vec<Result<Appended, AppendError>>> {
            // In order, as they lie in one connection.
            let appends: Vec<_> =
                sent.iter().map(|batch| up.log.append(from_producer(produced(shard), batch.clone()))).collect();
            Box::pin(async move { futures_util::future::join_all(appends).await })
        };
        let patience = Duration::from_millis(500 + draw(10_000));
        let answers = world.ask(owner, node, patience, Arc::new(work)).await;
        let mut went_wrong = answers.is_none();
        for answer in answers.into_iter().flatten() {
            match answer {
                Ok(appended) => {
                    let Some(first) = waiting.pop_front() else { break };
                    if appended.last_offset - appended.base_offset + 1 != first.marks.len() as i64 {
                        fail(format!("batch {} was answered with {appended:?}", first.sequence));
                    }
                    world.judge().acknowledged(produced(shard), &first.marks, appended.base_offset);
                    world.count(|tally| tally.acknowledged += first.marks.len() as u64);
                }
                Err(AppendError::OutOfOrderSequence { .. }) if shard == MEMORY || world.judge().was_restored(shard) => {
                    // What was acknowledged before is gone there: a new epoch, and what is unanswered again.
                    note(|| format!("producer {owner}: begins a new epoch"));
                    epoch += 1;
                    sequence = 0;
                    for unanswered in &mut waiting {
                        unanswered.sequence = sequence;
                        unanswered.batch = stamped(&batch(&unanswered.marks), producer_id, epoch, sequence);
                        sequence += unanswered.marks.len() as i32;
                    }
                    went_wrong = true;
                    break;
                }
                Err(error) => {
                    note(|| format!("producer {owner}: {error}"));
                    went_wrong = true;
                    break;
                }
            }
        }
        if went_wrong {
            guess = draw(2) as usize;
            tokio::time::sleep(Duration::from_millis(100 + draw(1500))).await;
        } else {
            tokio::time::sleep(Duration::from_millis(draw(pace))).await;
        }
    }
}

fn batch(marks: &[u64]) -> Batch {
    let mut builder = BatchBuilder::default();
    for mark in marks {
        builder.push(1_700_000_000_000, None, Some(&mark.to_be_bytes()), &[]);
    }
    builder.finish(0, Compression::None)
}

/// Reads what there is, again and again, at the end and from the beginning.
pub async fn consume(world: World, owner: Owner, shard: u32) {
    let mut from = [0, 0];
    loop {
        let which = draw(2) as usize;
        let partition = [produced(shard), streamed(shard)][which];
        let Some(node) = world.node_of(shard, draw(2) as usize) else { return };
        let (at, bytes_max) = (from[which], 1 + draw(5000) as usize);
        let work = move |up: Up| -> shared::log::BoxFuture<'static, _> {
            Box::pin(async move { up.log.read(partition, at, ReadLimits { bytes_max }).await })
        };
        match world.ask(owner, node, Duration::from_secs(20), Arc::new(work)).await {
            Some(Ok(read)) => {
                let found = world.judge().read(shard, partition, at, &read);
                world.count(|tally| tally.read += found.len() as u64);
                from[which] = read.next;
            }
            Some(Err(ReadError::OffsetOutOfRange { bounds, .. })) if at < bounds.log_start => {
                if shard != MEMORY {
                    fail(format!("{partition}: begins at {}, nothing was to be deleted", bounds.log_start));
                }
                from[which] = bounds.log_start;
            }
            // A deposed owner's end lies before where others have read.
            Some(Err(error)) => note(|| format!("reader {owner}: {error}")),
            None => {}
        }
        if chance(20) {
            from[which] = if chance(500) { 0 } else { draw(from[which].max(1) as u64) as i64 };
        }
        tokio::time::sleep(Duration::from_millis(draw(1500))).await;
    }
}
