//! What a shard's blocks say besides data: topics, offsets of groups, positions of edges, leader epochs.
//!
//! A [`Change`] rests in a block beside the data it belongs to; [`State`] is all changes folded together. The shard
//! writes changes and keeps the durable state; catalogue, groups and ingest see both through [`StateLog`] and know
//! nothing of blocks. Nothing here reads a clock, a disk or a socket.
//!
//! ```text
//! changes in a block            snapshot in a manifest
//! +---------+----------+---     +---------+--------------------------+
//! | version | count    | ...    | version | State, postcard          |
//! | u8 = 2  | varint   |        | u8 = 5  |                          |
//! +---------+----------+---     +---------+--------------------------+
//! ```
//! Each change is postcard (varint variant number, then its fields in order). A variant is never edited or moved; what
//! must say more becomes a new variant at the end.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use shared::clock::ClockState;
use shared::log::{AppendError, BoxFuture, Chain, StreamKey};
use shared::name::{EdgeId, Incarnation, Offset, Partition, StreamName, TimestampMs, TopicId, TopicName};

pub mod memory;
mod partition_map;
mod slot;
mod snapshot;

pub use partition_map::PartitionMap;
pub use slot::{COORDINATOR_SLOTS, CoordinatorSlot, coordinator_log, coordinator_logs};

const CHANGES_VERSION: u8 = 2;

/// Most partitions one topic may have: bounds what a damaged or hostile change can make us allocate.
pub const TOPIC_PARTITIONS_MAX: u32 = 100_000;

/// Batches of one producer that are remembered, so that a repeated one is recognised (Kafka keeps five).
pub const PRODUCER_BATCHES_KEPT: usize = 5;

/// One thing that changed. Applied in the order written; applying is total: a change that names what is not there does nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    /// A topic exists from here on, its partitions in the shards named: partition `i` in `shards[i % shards.len()]`. Written to
    /// the catalogue and to each of these shards; a shard keeps the partitions that are its own. Where the topic is known,
    /// what it lacks of them is added.
    TopicCreated {
        /// The topic.
        topic: Topic,
        /// Where its partitions lie. Never empty, and never changed.
        shards: Vec<u32>,
        /// The shard this is written to.
        own: u32,
        /// Where new partitions begin: above 0 where records of this topic may have been lost.
        from: Offset,
    },
    /// A topic, its partitions, their records and what groups committed on them are gone.
    TopicDeleted {
        /// Which.
        id: TopicId,
    },
    /// A topic has more partitions.
    PartitionsAdded {
        /// Which.
        id: TopicId,
        /// The new total. A lower one than there is does nothing.
        count: u32,
    },
    /// A topic's settings are these now, all of them.
    TopicConfigured {
        /// Which.
        id: TopicId,
        /// Only what differs from the defaults.
        configs: BTreeMap<String, String>,
    },
    /// A group's position in a partition.
    OffsetCommitted {
        /// The group.
        group: String,
        /// The partition.
        partition: Partition,
        /// The position.
        committed: CommittedOffset,
    },
    /// A group's position was removed.
    OffsetDeleted {
        /// The group.
        group: String,
        /// The partition.
        partition: Partition,
    },
    /// A group and its positions were removed.
    GroupDeleted {
        /// The group.
        group: String,
    },
    /// What must outlive a restart of a group's membership.
    GroupTouched {
        /// The group.
        group: String,
        /// `consumer`, `connect`, ... or empty for a group that only commits.
        protocol_type: String,
        /// Since when it has no members (retention of its offsets starts there, KIP-211); `None` while it has.
        empty_since_ms: Option<TimestampMs>,
    },
    /// Producer ids below `next` may have been given out and are never given out again.
    ProducerIdsReserved {
        /// The first that is free.
        next: i64,
    },
    /// Records below `offset` are gone from a partition.
    LogStartMoved {
        /// Which.
        partition: Partition,
        /// The new log start. A lower one than there is does nothing.
        offset: Offset,
    },
    /// An edge said hello.
    EdgeSeen {
        /// Which.
        edge: EdgeId,
        /// When.
        seen_ms: TimestampMs,
        /// What it said of itself (software, address, ...), for people.
        detail: BTreeMap<String, String>,
    },
    /// A stream's partition, chosen once for each topic: a stream whose rule now names another topic gets one there.
    StreamPlaced {
        /// Edge and stream, whatever the incarnation.
        stream: (EdgeId, StreamName),
        /// The topic.
        topic: TopicId,
        /// The partition's number.
        index: u32,
    },
    /// A stream's position. Written by the shard alone, in the block that carries the data.
    StreamPosition {
        /// Which, in which incarnation.
        key: StreamKey,
        /// Where its records were stored.
        partition: Partition,
        /// The edge offset its next batch must begin with.
        next: Offset,
        /// The sender's chain value there.
        chain: Chain,
    },
    /// A leader epoch begins: every partition goes on `skip` offsets above its end, under this epoch.
    /// Written by the shard alone.
    EpochStarted {
        /// Its number, greater than all before.
        epoch: i32,
        /// Offsets that are left out because they may have been used by records that were lost; 0 if nothing was.
        skip: i64,
    },
    /// All shards have let go of a deleted topic.
    TopicGone {
        /// Which.
        id: TopicId,
    },
    /// A shard exists, with its engine for ever.
    ShardAdded {
        /// Its number.
        shard: u32,
        /// Its engine.
        engine: Engine,
    },
    /// Offsets below `ceiling` may be used by a shard that keeps nothing, in this leader epoch and before.
    OffsetsReserved {
        /// Which.
        shard: u32,
        /// The newest leader epoch it may use.
        epoch: i32,
        /// Where it begins when it is started again.
        ceiling: Offset,
    },
    /// What belongs to a slot's ids is in this shard from here on. Written to the catalogue, and only while no other shard
    /// holds anything of the slot.
    SlotPlaced {
        /// Which.
        slot: CoordinatorSlot,
        /// The shard, which outlives the process.
        shard: u32,
    },
    /// Producers that appended nothing since `before_ms` are forgotten, in every partition. Written by the shard alone.
    ProducersExpired {
        /// By the shard's count, see [`shared::clock`].
        before_ms: TimestampMs,
    },
    /// The shard's count of running time stands here. Written by the shard alone, where no other block tells it for long.
    TimeCounted(ClockState),
}

impl Change {
    /// A new topic, all of it in the catalogue's shard.
    pub fn created(topic: Topic) -> Self {
        Self::TopicCreated { topic, shards: vec![CATALOGUE], own: CATALOGUE, from: 0 }
    }
}

/// Where a shard's blocks rest, and so what its acknowledgements promise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// On the local disk, synced before an answer.
    File,
    /// In the object store, one conditional PUT per block before an answer.
    Object,
    /// In memory: nothing survives a restart.
    Memory,
}

impl Engine {
    /// All there are.
    pub const ALL: [Self; 3] = [Self::File, Self::Object, Self::Memory];

    /// Its name in settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Object => "object",
            Self::Memory => "memory",
        }
    }

    /// The engine of that name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|engine| engine.name() == name)
    }
}

impl std::fmt::Display for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A topic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topic {
    /// Its identity.
    pub id: TopicId,
    /// Its name.
    pub name: TopicName,
    /// How many partitions it has.
    pub partitions: u32,
    /// Its settings, as far as they differ from the defaults.
    pub configs: BTreeMap<String, String>,
    /// When it was created, by the count of the shard with the catalogue.
    pub created_ms: TimestampMs,
}

/// A group's position in a partition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommittedOffset {
    /// The next offset the group will read.
    pub offset: Offset,
    /// Leader epoch of the last record it read, or -1.
    pub leader_epoch: i32,
    /// Whatever the client said.
    pub metadata: String,
    /// When, by the count of the log it lies in.
    pub commit_ms: TimestampMs,
}

/// A group, as far as it outlives a restart.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Group {
    /// `consumer`, `connect`, ... or empty for a group that only commits.
    pub protocol_type: String,
    /// Since when it has no members.
    pub empty_since_ms: Option<TimestampMs>,
    /// Its positions.
    pub offsets: BTreeMap<Partition, CommittedOffset>,
}

/// An edge, as it last said hello.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Edge {
    /// When.
    pub seen_ms: TimestampMs,
    /// What it said of itself.
    pub detail: BTreeMap<String, String>,
}

/// How far a stream's records are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamState {
    /// Where its last records were stored.
    pub partition: Partition,
    /// The edge offset its next batch must begin with.
    pub next: Offset,
    /// The sender's chain value there.
    pub chain: Chain,
}

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
    pub fn push(&mut self, epoch: i16, batch: ProducedBatch, append_ms: TimestampMs) {
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

/// A partition, as far as its records do not say it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PartitionState {
    /// The first offset that can be read.
    pub log_start: Offset,
    /// The offset after the last durable record.
    pub high_watermark: Offset,
    /// Leader epochs from the one that the log start is in, ascending, and only those that anything was written in but for the
    /// last. Never empty.
    pub epochs: Vec<EpochStart>,
    /// Idempotent producers by id.
    pub producers: BTreeMap<i64, Producer>,
}

impl PartitionState {
    fn new(epoch: i32, from: Offset) -> Self {
        let epochs = vec![EpochStart { epoch, start: from, before: from }];
        Self { log_start: from, high_watermark: from, epochs, ..Self::default() }
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

/// Which shards a topic's partitions lie in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hosting {
    /// Partition `i` lies in `shards[i % shards.len()]`.
    pub shards: Vec<u32>,
    /// The shard whose state this is.
    pub own: u32,
}

impl Hosting {
    /// The shard of a partition.
    pub fn shard_of(&self, index: u32) -> u32 {
        let at = usize::try_from(index).unwrap_or_default() % self.shards.len().max(1);
        self.shards.get(at).copied().unwrap_or(CATALOGUE)
    }
}

/// A shard, as the catalogue knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardEntry {
    /// Its engine.
    pub engine: Engine,
    /// The newest leader epoch that a shard which keeps nothing may have used.
    pub epoch: i32,
    /// Offsets below may have been used by it.
    pub ceiling: Offset,
}

/// The shard that keeps the catalogue.
pub const CATALOGUE: u32 = 0;

/// All changes so far, folded together.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct State {
    leader_epoch: i32,
    next_producer_id: i64,
    topics: BTreeMap<TopicId, Topic>,
    topic_ids: BTreeMap<TopicName, TopicId>,
    #[serde(serialize_with = "partition_map::serialize_ascending")]
    partitions: PartitionMap<PartitionState>,
    groups: BTreeMap<String, Group>,
    edges: BTreeMap<EdgeId, Edge>,
    placements: BTreeMap<(EdgeId, StreamName), Partition>,
    streams: BTreeMap<StreamKey, StreamState>,
    hosting: BTreeMap<TopicId, Hosting>,
    /// Deleted topics that a shard may still hold.
    leaving: BTreeMap<TopicId, Vec<u32>>,
    shards: BTreeMap<u32, ShardEntry>,
    /// Offsets left out by all epochs together.
    skipped: Offset,
    /// Coordinator slots that were placed; the others are in the catalogue's shard.
    slots: BTreeMap<CoordinatorSlot, u32>,
    /// The count of running time, as of the newest block.
    clock: ClockState,
}

/// Why stored state was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// Written by another build.
    #[error("state has format version {0}, which this build does not read: start the build that wrote it")]
    Version(u8),
    /// Not what any version writes.
    #[error("state is malformed: {0}")]
    Malformed(&'static str),
}

impl State {
    /// The topic of that identity.
    pub fn topic(&self, id: TopicId) -> Option<&Topic> {
        self.topics.get(&id)
    }

    /// The topic of that name.
    pub fn topic_named(&self, name: &TopicName) -> Option<&Topic> {
        self.topics.get(self.topic_ids.get(name)?)
    }

    /// All topics, ordered by name.
    pub fn topics(&self) -> impl Iterator<Item = &Topic> {
        self.topic_ids.values().filter_map(|id| self.topics.get(id))
    }

    /// All topics, by id: in a shard that hosts them there may be several of one name.
    pub fn topics_of_any_name(&self) -> impl Iterator<Item = &Topic> {
        self.topics.values()
    }

    /// A partition.
    pub fn partition(&self, partition: Partition) -> Option<&PartitionState> {
        self.partitions.get(&partition)
    }

    /// All partitions, ascending.
    pub fn partitions(&self) -> impl ExactSizeIterator<Item = (&Partition, &PartitionState)> {
        let mut all: Vec<_> = self.partitions.iter().collect();
        all.sort_unstable_by_key(|(partition, _)| **partition);
        all.into_iter()
    }

    /// The greatest offset after a partition's last durable record.
    pub fn highest_watermark(&self) -> Offset {
        self.partitions.values().map(|partition| partition.high_watermark).max().unwrap_or(0)
    }

    /// A group.
    pub fn group(&self, group: &str) -> Option<&Group> {
        self.groups.get(group)
    }

    /// All groups, by name.
    pub fn groups(&self) -> impl Iterator<Item = (&String, &Group)> {
        self.groups.iter()
    }

    /// A group's position in a partition.
    pub fn committed(&self, group: &str, partition: Partition) -> Option<&CommittedOffset> {
        self.groups.get(group)?.offsets.get(&partition)
    }

    /// An edge.
    pub fn edge(&self, edge: &EdgeId) -> Option<&Edge> {
        self.edges.get(edge)
    }

    /// All edges, by id.
    pub fn edges(&self) -> impl Iterator<Item = (&EdgeId, &Edge)> {
        self.edges.iter()
    }

    /// The partition a stream was given.
    pub fn placement(&self, edge: &EdgeId, stream: &StreamName) -> Option<Partition> {
        self.placements.get(&(edge.clone(), stream.clone())).copied()
    }

    /// All streams' partitions.
    pub fn placements(&self) -> impl Iterator<Item = (&(EdgeId, StreamName), &Partition)> {
        self.placements.iter()
    }

    /// How far a stream's records are stored.
    pub fn stream(&self, key: &StreamKey) -> Option<&StreamState> {
        self.streams.get(key)
    }

    /// The incarnations of one stream that have stored anything.
    pub fn incarnations(&self, edge: &EdgeId, stream: &StreamName) -> impl Iterator<Item = Incarnation> {
        let key = |bytes| StreamKey { edge: edge.clone(), stream: stream.clone(), incarnation: Incarnation(bytes) };
        self.streams.range(key([0; 16])..=key([0xff; 16])).map(|(key, _)| key.incarnation)
    }

    /// All streams, those of one edge together.
    pub fn streams(&self) -> impl Iterator<Item = (&StreamKey, &StreamState)> {
        self.streams.iter()
    }

    /// Where a topic's partitions lie.
    pub fn hosting(&self, id: TopicId) -> Option<&Hosting> {
        self.hosting.get(&id)
    }

    /// The shard a partition lies in.
    pub fn shard_of(&self, partition: Partition) -> u32 {
        self.hosting.get(&partition.topic).map_or(CATALOGUE, |hosting| hosting.shard_of(partition.index))
    }

    /// Deleted topics that shards may still hold, and which.
    pub fn leaving(&self) -> impl Iterator<Item = (TopicId, &[u32])> {
        self.leaving.iter().map(|(id, shards)| (*id, &shards[..]))
    }

    /// All shards there ever were, as far as they were noted.
    pub fn shards(&self) -> impl Iterator<Item = (u32, &ShardEntry)> {
        self.shards.iter().map(|(shard, entry)| (*shard, entry))
    }

    /// The shard that keeps what belongs to a coordinator slot's ids.
    pub fn slot_shard(&self, slot: CoordinatorSlot) -> u32 {
        self.slots.get(&slot).copied().unwrap_or(CATALOGUE)
    }

    /// Offsets that all epochs so far have left out: a partition that may have been lost begins there.
    pub fn skipped(&self) -> Offset {
        self.skipped
    }

    /// The count of running time, as far as blocks tell it; `None` before the first.
    pub fn clock(&self) -> Option<ClockState> {
        (self.clock != ClockState::default()).then_some(self.clock)
    }

    /// A block was appended at `counted_ms`.
    pub fn count_to(&mut self, counted_ms: TimestampMs) {
        self.clock.counted_ms = self.clock.counted_ms.max(counted_ms);
    }

    /// Whether any producer is remembered that appended nothing since `before_ms`.
    pub fn has_producers_before(&self, before_ms: TimestampMs) -> bool {
        self.partitions.values().any(|partition| partition.producers.values().any(|known| known.append_ms < before_ms))
    }

    /// Ids below this may have been given out.
    pub fn next_producer_id(&self) -> i64 {
        self.next_producer_id
    }

    /// The newest leader epoch.
    pub fn leader_epoch(&self) -> i32 {
        self.leader_epoch
    }

    /// Folds one change in.
    pub fn apply(&mut self, change: &Change) {
        match change {
            Change::TopicDeleted { id } => self.delete(*id),
            Change::PartitionsAdded { id, count } => self.grow(*id, *count, 0),
            Change::TopicConfigured { id, configs } => {
                if let Some(topic) = self.topics.get_mut(id) {
                    topic.configs.clone_from(configs);
                }
            }
            Change::OffsetCommitted { group, partition, committed } => {
                self.groups.entry(group.clone()).or_default().offsets.insert(*partition, committed.clone());
            }
            Change::OffsetDeleted { group, partition } => {
                if let Some(group) = self.groups.get_mut(group) {
                    group.offsets.remove(partition);
                }
            }
            Change::GroupDeleted { group } => {
                self.groups.remove(group);
            }
            Change::GroupTouched { group, protocol_type, empty_since_ms } => {
                let group = self.groups.entry(group.clone()).or_default();
                group.protocol_type.clone_from(protocol_type);
                group.empty_since_ms = *empty_since_ms;
            }
            Change::ProducerIdsReserved { next } => self.next_producer_id = self.next_producer_id.max(*next),
            Change::LogStartMoved { partition, offset } => {
                if let Some(partition) = self.partitions.get_mut(partition) {
                    partition.move_log_start(*offset);
                }
            }
            Change::EdgeSeen { edge, seen_ms, detail } => {
                self.edges.insert(edge.clone(), Edge { seen_ms: *seen_ms, detail: detail.clone() });
            }
            Change::StreamPlaced { stream, topic, index } => {
                self.placements.insert(stream.clone(), Partition { topic: *topic, index: *index });
            }
            Change::StreamPosition { key, partition, next, chain } => {
                let state = StreamState { partition: *partition, next: *next, chain: *chain };
                self.streams.insert(key.clone(), state);
            }
            Change::EpochStarted { epoch, skip } => self.start_epoch(*epoch, *skip),
            Change::TopicCreated { topic, shards, own, from } => self.create(topic, shards, *own, *from),
            Change::TopicGone { id } => {
                self.leaving.remove(id);
            }
            Change::ShardAdded { shard, engine } => {
                let new = ShardEntry { engine: *engine, epoch: 0, ceiling: 0 };
                self.shards.entry(*shard).or_insert(new);
            }
            Change::OffsetsReserved { shard, epoch, ceiling } => {
                if let Some(entry) = self.shards.get_mut(shard) {
                    entry.epoch = entry.epoch.max(*epoch);
                    entry.ceiling = entry.ceiling.max(*ceiling);
                }
            }
            Change::SlotPlaced { slot, shard } => {
                self.slots.insert(*slot, *shard);
            }
            Change::ProducersExpired { before_ms } => self.expire_producers(*before_ms),
            Change::TimeCounted(clock) => {
                self.count_to(clock.counted_ms);
                self.clock.ahead_ms = clock.ahead_ms;
            }
        }
    }

    fn create(&mut self, topic: &Topic, shards: &[u32], own: u32, from: Offset) {
        let known = self.topics.contains_key(&topic.id);
        // Names are the catalogue's matter: a shard may still hold an older topic of this name.
        if shards.is_empty() || !known && own == CATALOGUE && self.topic_ids.contains_key(&topic.name) {
            return;
        }
        if !known {
            self.topic_ids.insert(topic.name.clone(), topic.id);
            self.topics.insert(topic.id, Topic { partitions: 0, ..topic.clone() });
            self.hosting.insert(topic.id, Hosting { shards: shards.to_vec(), own });
        }
        self.grow(topic.id, topic.partitions, from.max(0));
    }

    fn delete(&mut self, id: TopicId) {
        // Groups may have committed on a topic that this shard hosts nothing of.
        for group in self.groups.values_mut() {
            group.offsets.retain(|partition, _| partition.topic != id);
        }
        let Some(topic) = self.topics.remove(&id) else { return };
        if self.topic_ids.get(&topic.name) == Some(&id) {
            self.topic_ids.remove(&topic.name);
        }
        if let Some(mut hosting) = self.hosting.remove(&id)
            && hosting.own == CATALOGUE
        {
            hosting.shards.retain(|shard| *shard != CATALOGUE);
            if !hosting.shards.is_empty() {
                self.leaving.insert(id, hosting.shards);
            }
        }
        self.partitions.retain(|partition, _| partition.topic != id);
        self.placements.retain(|_, partition| partition.topic != id);
    }

    fn grow(&mut self, id: TopicId, count: u32, from: Offset) {
        let (Some(topic), Some(hosting)) = (self.topics.get_mut(&id), self.hosting.get(&id)) else { return };
        let count = count.min(TOPIC_PARTITIONS_MAX);
        for index in topic.partitions..count {
            if hosting.shard_of(index) == hosting.own {
                self.partitions.insert(Partition { topic: id, index }, PartitionState::new(self.leader_epoch, from));
            }
        }
        topic.partitions = topic.partitions.max(count);
    }

    fn start_epoch(&mut self, epoch: i32, skip: i64) {
        if epoch <= self.leader_epoch {
            return;
        }
        self.leader_epoch = epoch;
        let skip = skip.max(0);
        self.skipped = self.skipped.saturating_add(skip);
        if skip > 0 {
            // What was reserved since may have been lost with the rest.
            self.next_producer_id = self.next_producer_id.saturating_add(skip);
            for shard in self.shards.values_mut() {
                shard.ceiling = shard.ceiling.saturating_add(skip);
                shard.epoch = shard.epoch.saturating_add(1);
            }
        }
        self.partitions.values_mut().for_each(|partition| partition.start_epoch(epoch, skip));
    }

    /// Another process owns the shard from here on: a leader epoch begins, so that clients see that it moved (KIP-320). Called
    /// by whoever folds a fence in.
    pub fn change_owner(&mut self) {
        self.start_epoch(self.leader_epoch.saturating_add(1), 0);
    }

    /// Records of a partition became durable up to `next`. Called by whoever folds a block in, before its changes.
    pub fn advance(&mut self, partition: Partition, next: Offset) {
        if let Some(partition) = self.partitions.get_mut(&partition) {
            partition.high_watermark = partition.high_watermark.max(next);
        }
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
        if let Some(partition) = self.partitions.get_mut(&partition) {
            partition
                .producers
                .entry(producer_id)
                .or_insert_with(|| Producer { epoch, batches: Vec::new(), append_ms })
                .push(epoch, batch, append_ms);
        }
    }

    /// Forgets producers that appended nothing since `before_ms` (Kafka's `producer.id.expiration.ms`).
    fn expire_producers(&mut self, before_ms: TimestampMs) {
        for partition in self.partitions.values_mut() {
            partition.producers.retain(|_, producer| producer.append_ms >= before_ms);
        }
    }
}

/// Changes as a block carries them; no bytes for none.
pub fn encode_changes<'a>(changes: impl IntoIterator<Item = &'a Change, IntoIter: ExactSizeIterator>) -> Vec<u8> {
    let changes = changes.into_iter();
    let count = changes.len();
    if count == 0 {
        return Vec::new();
    }
    changes.fold(encode_versioned(CHANGES_VERSION, &count), |out, change| {
        postcard::to_extend(change, out).expect("plain data always encodes to memory")
    })
}

/// Reads what [`encode_changes`] wrote. Nothing is allocated that the bytes do not back.
pub fn decode_changes(bytes: &[u8]) -> Result<Vec<Change>, StateError> {
    let Some((version, body)) = bytes.split_first() else { return Ok(Vec::new()) };
    if *version != CHANGES_VERSION {
        return Err(StateError::Version(*version));
    }
    let (changes, rest) = postcard::take_from_bytes::<Vec<Change>>(body)
        .map_err(|_| StateError::Malformed("changes do not decode, or another build wrote them"))?;
    if !rest.is_empty() {
        return Err(StateError::Malformed("bytes after the changes"));
    }
    Ok(changes)
}

fn encode_versioned<T: Serialize + ?Sized>(version: u8, value: &T) -> Vec<u8> {
    postcard::to_extend(value, vec![version]).expect("plain data always encodes to memory")
}

/// What the catalogue, groups and ingest need of the log that keeps the state.
pub trait StateLog: Send + Sync + 'static {
    /// Writes changes in one atomic append. Their place in the order is taken in the call itself; resolves when they
    /// are durable and visible in [`StateLog::with_state`].
    fn commit(&self, changes: Vec<Change>) -> BoxFuture<'static, Result<(), AppendError>>;

    /// Shows the durable state, under a lock: copy what is needed and return. Where there are several shards it is the
    /// catalogue's: of partitions, of streams' positions and of groups it knows only those in its own shard.
    fn with_state(&self, read: &mut dyn FnMut(&State));

    /// What time it is for what expires in this log, and what to stamp that with: see [`shared::clock`].
    fn now_ms(&self) -> TimestampMs;

    /// The log that keeps what belongs to a coordinator slot's ids, groups and all; `None` if it is this one. Changes of
    /// a group are committed there. See [`coordinator_log`].
    fn slot_log(&self, _slot: CoordinatorSlot) -> Option<&dyn StateLog> {
        None
    }

    /// All logs that may keep something of a slot's; none if this one keeps it all. See [`coordinator_logs`].
    fn slot_logs(&self) -> Vec<&dyn StateLog> {
        Vec::new()
    }

    /// How far a stream's records are stored, whichever shard they are in.
    fn stream(&self, key: &StreamKey) -> Option<StreamState> {
        read_state(self, |state| state.stream(key).copied())
    }

    /// Every stream that has stored anything, those of one edge together.
    fn streams(&self) -> Vec<(StreamKey, StreamState)> {
        read_state(self, |state| state.streams().map(|(key, stream)| (key.clone(), *stream)).collect())
    }

    /// The incarnations of one stream that have stored anything.
    fn incarnations(&self, edge: &EdgeId, stream: &StreamName) -> Vec<Incarnation> {
        read_state(self, |state| state.incarnations(edge, stream).collect())
    }
}

/// Reads something out of the durable state.
pub fn read_state<T, L: StateLog + ?Sized>(log: &L, read: impl FnOnce(&State) -> T) -> T {
    let mut read = Some(read);
    let mut out = None;
    log.with_state(&mut |state| {
        if let Some(read) = read.take() {
            out = Some(read(state));
        }
    });
    out.expect("a state log calls the reader")
}

#[cfg(test)]
pub(crate) mod tests;
