//! Which block holds which offsets: one entry per block and partition, for blocks that are still in the WAL.

use std::collections::VecDeque;

use shared::name::{Offset, Partition, TimestampMs, TopicId};

use crate::block::Block;
use crate::state::PartitionMap;

/// The batches of one partition in one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Offset of the first record.
    pub base: Offset,
    /// Offset of the last record.
    pub last: Offset,
    /// The greatest record timestamp.
    pub max_timestamp: TimestampMs,
    /// When the block was appended.
    pub append_ms: TimestampMs,
    /// The block.
    pub seq: u64,
    /// Where in it.
    pub position: u32,
    /// How many bytes.
    pub bytes: u32,
}

/// The index. Its size is bounded by whoever adds to it: see [`WalIndex::entries`].
#[derive(Debug, Default)]
pub struct WalIndex {
    partitions: PartitionMap<VecDeque<Run>>,
    entries: usize,
}

impl WalIndex {
    /// How many entries.
    pub fn entries(&self) -> usize {
        self.entries
    }

    /// Adds a block's runs, as far as their partition is kept.
    pub fn add(&mut self, block: &Block, mut log_start: impl FnMut(Partition) -> Option<Offset>) {
        for entry in block.entries() {
            if log_start(entry.partition).is_none_or(|start| entry.last < start) {
                continue;
            }
            self.partitions.entry(entry.partition).or_default().push_back(Run {
                base: entry.base,
                last: entry.last,
                max_timestamp: entry.max_timestamp,
                append_ms: block.header().append_ms,
                seq: block.header().seq,
                position: entry.position,
                bytes: entry.bytes,
            });
            self.entries += 1;
        }
    }

    /// Forgets a topic.
    pub fn remove_topic(&mut self, id: TopicId) {
        self.partitions.retain(|partition, runs| {
            let goes = partition.topic == id;
            self.entries -= if goes { runs.len() } else { 0 };
            !goes
        });
    }

    /// Forgets what lies wholly below a partition's log start.
    pub fn trim_partition(&mut self, partition: Partition, log_start: Offset) {
        if let Some(runs) = self.partitions.get_mut(&partition) {
            let gone = runs.partition_point(|run| run.last < log_start);
            self.entries -= runs.drain(..gone).count();
        }
    }

    /// Forgets blocks below `seq`.
    pub fn trim_blocks(&mut self, seq: u64) {
        for runs in self.partitions.values_mut() {
            let gone = runs.partition_point(|run| run.seq < seq);
            self.entries -= runs.drain(..gone).count();
        }
        self.partitions.retain(|_, runs| !runs.is_empty());
    }

    /// Partitions with records in blocks below `seq`, and where each begins without them; `None` where nothing is left.
    pub fn starts_without(&self, seq: u64) -> impl Iterator<Item = (Partition, Option<Offset>)> {
        let touched = self.partitions.iter().filter(move |(_, runs)| runs.front().is_some_and(|run| run.seq < seq));
        touched.map(move |(partition, runs)| {
            let first = runs.partition_point(|run| run.seq < seq);
            (*partition, runs.get(first).map(|run| run.base))
        })
    }

    /// A partition's runs from the one that contains `from` (or the first after it) on.
    pub fn from(&self, partition: Partition, from: Offset) -> impl Iterator<Item = &Run> {
        let runs = self.partitions.get(&partition);
        runs.into_iter().flat_map(move |runs| runs.range(runs.partition_point(|run| run.last < from)..))
    }

    /// Where the partition begins in the WAL.
    pub fn first(&self, partition: Partition) -> Option<Offset> {
        self.partitions.get(&partition)?.front().map(|run| run.base)
    }

    /// Bytes of batches from `from` on.
    pub fn bytes_from(&self, partition: Partition, from: Offset) -> u64 {
        self.from(partition, from).map(|run| u64::from(run.bytes)).sum()
    }
}
