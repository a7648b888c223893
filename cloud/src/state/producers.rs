//! Idempotent producers: which ids are used, and what each sent last to each partition.

use serde::{Deserialize, Serialize};
use shared::name::{Offset, Partition, TimestampMs, TopicId};

use super::{CowMap, Section, State};

/// Batches of one producer that are remembered, so that a repeated one is recognised (Kafka keeps five).
pub const PRODUCER_BATCHES_KEPT: usize = 5;

/// A batch of an idempotent producer that is remembered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProducedBatch {
    /// Sequence of its first record.
    pub first_sequence: i32,
    /// Sequence of its last record.
    pub last_sequence: i32,
    /// Offset of its first record.
    pub base_offset: Offset,
    /// Offset of its last record.
    pub last_offset: Offset,
}

/// An idempotent producer in one partition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Producer {
    /// The newest epoch seen.
    pub epoch: i16,
    /// Its last batches under that epoch, oldest first, at most [`PRODUCER_BATCHES_KEPT`].
    pub batches: Vec<ProducedBatch>,
    /// When the last one was appended.
    pub append_ms: TimestampMs,
}

impl Producer {
    /// Remembers a batch that is durable; a newer epoch forgets the batches of the older one.
    pub(super) fn push(&mut self, epoch: i16, batch: ProducedBatch, append_ms: TimestampMs) {
        if epoch != self.epoch {
            self.batches.clear();
            self.epoch = epoch;
        }
        if self.batches.len() >= PRODUCER_BATCHES_KEPT {
            self.batches.remove(0);
        }
        self.batches.push(batch);
        self.append_ms = append_ms;
    }
}

/// What changes about producers beside their batches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProducerChange {
    /// Producer ids below `next` may have been given out and are never given out again.
    IdsReserved {
        /// The first that is free.
        next: i64,
    },
    /// Producers that appended nothing since `before_ms` are forgotten, in every partition. Written by the shard alone.
    Expired {
        /// By the shard's count, see [`shared::clock`].
        before_ms: TimestampMs,
    },
}

/// All producers.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Producers {
    next_id: i64,
    /// By id. A partition without any is not in it.
    partitions: CowMap<Partition, CowMap<i64, Producer>>,
}

impl Section for Producers {
    const TAG: u8 = 3;
    type Change = ProducerChange;

    fn apply(&mut self, change: ProducerChange) {
        match change {
            ProducerChange::IdsReserved { next } => self.next_id = self.next_id.max(next),
            // Kafka's `producer.id.expiration.ms`.
            ProducerChange::Expired { before_ms } => {
                let is_old = |producer: &Producer| producer.append_ms < before_ms;
                let any_old = |producers: &CowMap<i64, Producer>| producers.values().any(is_old);
                self.partitions.change(any_old, |producers| producers.retain(|_, producer| !is_old(producer)));
                self.partitions.retain(|_, producers| !producers.is_empty());
            }
        }
    }

    fn topic_deleted(&mut self, id: TopicId) {
        self.partitions.retain(|partition, _| partition.topic != id);
    }

    fn offsets_left_out(&mut self, skip: Offset) {
        // What was reserved since may have been lost with the rest.
        self.next_id = self.next_id.saturating_add(skip);
    }
}

impl State {
    /// Ids below this may have been given out.
    pub fn next_producer_id(&self) -> i64 {
        self.producers.next_id
    }

    /// A producer in a partition.
    pub fn producer(&self, partition: Partition, id: i64) -> Option<&Producer> {
        self.producers.partitions.get(&partition)?.get(&id)
    }

    /// How many producers are remembered, each in each partition.
    pub fn producer_count(&self) -> usize {
        self.producers.partitions.values().map(CowMap::len).sum()
    }

    /// Whether any producer is remembered that appended nothing since `before_ms`.
    pub fn has_producers_before(&self, before_ms: TimestampMs) -> bool {
        self.producers.partitions.values().flat_map(CowMap::values).any(|known| known.append_ms < before_ms)
    }

    /// A batch of an idempotent producer became durable.
    pub fn produced(
        &mut self,
        partition: Partition,
        producer_id: i64,
        epoch: i16,
        batch: ProducedBatch,
        append_ms: TimestampMs,
    ) {
        if self.partition(partition).is_some() {
            let producers = self.producers.partitions.or_insert_with(partition, CowMap::default);
            let new = || Producer { epoch, batches: Vec::new(), append_ms };
            producers.or_insert_with(producer_id, new).push(epoch, batch, append_ms);
        }
    }
}
