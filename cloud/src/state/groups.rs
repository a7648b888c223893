//! Consumer groups, as far as they outlive a restart. A guest of the shard.

use serde::{Deserialize, Serialize};
use shared::name::{Offset, Partition, TimestampMs, TopicId};

use super::{Change, CowMap, GuestChange, Section, State};

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
    pub offsets: CowMap<Partition, CommittedOffset>,
}

/// What changes about groups.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum GroupChange {
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
    Deleted {
        /// The group.
        group: String,
    },
    /// What must outlive a restart of a group's membership.
    Touched {
        /// The group.
        group: String,
        /// `consumer`, `connect`, ... or empty for a group that only commits.
        protocol_type: String,
        /// Since when it has no members (retention of its offsets starts there, KIP-211); `None` while it has.
        empty_since_ms: Option<TimestampMs>,
    },
}

/// All groups.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Groups(CowMap<String, Group>);

impl Section for Groups {
    const TAG: u8 = 16;
    type Change = GroupChange;

    fn apply(&mut self, change: GroupChange) {
        match change {
            GroupChange::OffsetCommitted { group, partition, committed } => {
                self.0.or_insert_with(group, Group::default).offsets.insert(partition, committed);
            }
            GroupChange::OffsetDeleted { group, partition } => {
                if let Some(group) = self.0.get_mut(&group) {
                    group.offsets.remove(&partition);
                }
            }
            GroupChange::Deleted { group } => drop(self.0.remove(&group)),
            GroupChange::Touched { group, protocol_type, empty_since_ms } => {
                let group = self.0.or_insert_with(group, Group::default);
                (group.protocol_type, group.empty_since_ms) = (protocol_type, empty_since_ms);
            }
        }
    }

    /// Groups may have committed on a topic that this shard hosts nothing of.
    fn topic_deleted(&mut self, id: TopicId) {
        let of_topic = |partition: &Partition| partition.topic == id;
        self.0.change(
            |group| group.offsets.keys().any(of_topic),
            |group| group.offsets.retain(|partition, _| !of_topic(partition)),
        );
    }
}

impl From<GroupChange> for Change {
    fn from(change: GroupChange) -> Self {
        Self::Guest(GuestChange::of::<Groups>(&change))
    }
}

impl State {
    /// A group.
    pub fn group(&self, group: &str) -> Option<&Group> {
        self.guest::<Groups>().0.get(group)
    }

    /// All groups, by name.
    pub fn groups(&self) -> impl Iterator<Item = (&String, &Group)> {
        self.guest::<Groups>().0.iter()
    }

    /// How many groups there are.
    pub fn group_count(&self) -> usize {
        self.guest::<Groups>().0.len()
    }

    /// A group's position in a partition.
    pub fn committed(&self, group: &str, partition: Partition) -> Option<&CommittedOffset> {
        self.group(group)?.offsets.get(&partition)
    }
}
