//! The shard's partitions as logs: where they begin and end, in which leader epochs, and the count of running time.

use serde::{Deserialize, Serialize};
use shared::clock::ClockState;
use shared::name::{Offset, Partition, TimestampMs, TopicId};

use super::{CowMap, Section, State, StateError};

/// Where a leader epoch begins in a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochStart {
    /// Its number.
    pub epoch: i32,
    /// The first offset written under it.
    pub start: Offset,
    /// The end of the records before it: less than `start` where offsets were left out.
    pub before: Offset,
}

/// A partition, as far as its records do not say it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartitionState {
    /// The first offset that can be read.
    pub log_start: Offset,
    /// The offset after the last durable record.
    pub high_watermark: Offset,
    /// Leader epochs from the one that the log start is in, ascending, and only those that anything was written in but for the
    /// last. Never empty.
    pub epochs: Vec<EpochStart>,
}

impl PartitionState {
    fn new(epoch: i32, from: Offset) -> Self {
        let epochs = vec![EpochStart { epoch, start: from, before: from }];
        Self { log_start: from, high_watermark: from, epochs }
    }

    /// A leader epoch begins `skip` offsets above the end. One in which nothing was written is replaced: nothing can be of it.
    fn start_epoch(&mut self, epoch: i32, skip: i64) {
        let end = self.high_watermark;
        let before = self.epochs.pop_if(|last| last.start == end).map_or(end, |empty| empty.before);
        self.high_watermark = end.saturating_add(skip);
        self.epochs.push(EpochStart { epoch, start: self.high_watermark, before });
    }

    /// Records below `offset` are gone, and leader epochs that ended there.
    fn move_log_start(&mut self, offset: Offset) {
        self.log_start = self.log_start.max(offset).min(self.high_watermark);
        let ended = self.epochs.iter().skip(1).take_while(|next| next.start <= self.log_start).count();
        self.epochs.drain(..ended);
    }

    /// The leader epoch in force.
    pub fn leader_epoch(&self) -> i32 {
        self.epochs.last().map_or(0, |last| last.epoch)
    }

    /// Whether the offsets `from .. to` were left out where epochs began, so that no record can be missing there.
    pub fn left_out(&self, from: Offset, to: Offset) -> bool {
        let mut to = to;
        for epoch in self.epochs.iter().rev().filter(|epoch| epoch.before < epoch.start) {
            if epoch.start == to {
                to = epoch.before;
            }
        }
        to <= from
    }
}

/// What changes about logs. The shard alone writes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum LogChange {
    /// Records below `offset` are gone from a partition.
    StartMoved {
        /// Which.
        partition: Partition,
        /// The new log start. A lower one than there is does nothing.
        offset: Offset,
    },
    /// A leader epoch begins: every partition goes on `skip` offsets above its end, under this epoch.
    EpochStarted {
        /// Its number, greater than all before.
        epoch: i32,
        /// Offsets that are left out because they may have been used by records that were lost; 0 if nothing was.
        skip: i64,
    },
    /// The shard's count of running time stands here. Written where no other block tells it for long.
    TimeCounted(ClockState),
}

/// All partitions of the shard.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Logs {
    leader_epoch: i32,
    /// The newest epoch that an owner wrote in.
    owner_epoch: u32,
    /// Offsets left out by all epochs together.
    skipped: Offset,
    /// The count of running time, as of the newest block.
    clock: ClockState,
    partitions: CowMap<Partition, PartitionState>,
}

impl Section for Logs {
    const TAG: u8 = 2;
    type Change = LogChange;

    fn apply(&mut self, change: LogChange) {
        match change {
            LogChange::StartMoved { partition, offset } => {
                if let Some(partition) = self.partitions.get_mut(&partition) {
                    partition.move_log_start(offset);
                }
            }
            LogChange::EpochStarted { epoch, skip } => {
                self.leader_epoch = epoch;
                self.skipped = self.skipped.saturating_add(skip);
                self.partitions.change(|_| true, |partition| partition.start_epoch(epoch, skip));
            }
            LogChange::TimeCounted(clock) => {
                self.count_to(clock.counted_ms);
                self.clock.ahead_ms = clock.ahead_ms;
            }
        }
    }

    fn topic_deleted(&mut self, id: TopicId) {
        self.partitions.retain(|partition, _| partition.topic != id);
    }

    fn check(&self) -> Result<(), StateError> {
        let is_sound = |partition: &PartitionState| {
            let ascends = partition.epochs.is_sorted_by(|one, next| one.epoch < next.epoch && one.start <= next.start);
            ascends && !partition.epochs.is_empty() && partition.log_start <= partition.high_watermark
        };
        match self.partitions.values().all(is_sound) {
            true => Ok(()),
            false => Err(StateError::Malformed("a partition without an epoch, or one that contradicts itself")),
        }
    }
}

impl Logs {
    /// A new partition, which begins at `from`.
    pub(super) fn create(&mut self, partition: Partition, from: Offset) {
        self.partitions.insert(partition, PartitionState::new(self.leader_epoch, from));
    }

    /// Whether nobody wrote in `epoch` or a later one before.
    pub(super) fn raise_owner(&mut self, epoch: u32) -> bool {
        let is_new = epoch > self.owner_epoch;
        self.owner_epoch = self.owner_epoch.max(epoch);
        is_new
    }

    fn count_to(&mut self, counted_ms: TimestampMs) {
        self.clock.counted_ms = self.clock.counted_ms.max(counted_ms);
    }
}

impl State {
    /// A partition.
    pub fn partition(&self, partition: Partition) -> Option<&PartitionState> {
        self.logs.partitions.get(&partition)
    }

    /// All partitions, ascending.
    pub fn partitions(&self) -> impl Iterator<Item = (&Partition, &PartitionState)> {
        self.logs.partitions.iter()
    }

    /// The greatest offset after a partition's last durable record.
    pub fn highest_watermark(&self) -> Offset {
        self.logs.partitions.values().map(|partition| partition.high_watermark).max().unwrap_or(0)
    }

    /// Records of a partition became durable up to `next`. Called by whoever folds a block in, before its changes.
    pub fn advance(&mut self, partition: Partition, next: Offset) {
        if let Some(partition) = self.logs.partitions.get_mut(&partition) {
            partition.high_watermark = partition.high_watermark.max(next);
        }
    }

    /// Offsets that all epochs so far have left out: a partition that may have been lost begins there.
    pub fn skipped(&self) -> Offset {
        self.logs.skipped
    }

    /// The newest leader epoch.
    pub fn leader_epoch(&self) -> i32 {
        self.logs.leader_epoch
    }

    /// The count of running time, as far as blocks tell it; `None` before the first.
    pub fn clock(&self) -> Option<ClockState> {
        (self.logs.clock != ClockState::default()).then_some(self.logs.clock)
    }

    /// A block was appended at `counted_ms`.
    pub fn count_to(&mut self, counted_ms: TimestampMs) {
        self.logs.count_to(counted_ms);
    }
}
