//! Which topics there are and which shards their partitions lie in.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use shared::name::{Offset, Partition, TimestampMs, TopicId, TopicName};

use super::{CATALOGUE, Change, CowMap, Section, State};

/// Most partitions one topic may have: bounds what a damaged or hostile change can make us allocate.
pub const TOPIC_PARTITIONS_MAX: u32 = 100_000;

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

/// What changes about topics.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum TopicChange {
    /// A topic exists from here on, its partitions in the shards named: partition `i` in `shards[i % shards.len()]`. Written to
    /// the catalogue and to each of these shards; a shard keeps the partitions that are its own. Where the topic is known,
    /// what it lacks of them is added.
    Created {
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
    Deleted {
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
    Configured {
        /// Which.
        id: TopicId,
        /// Only what differs from the defaults.
        configs: BTreeMap<String, String>,
    },
    /// All shards have let go of a deleted topic.
    Gone {
        /// Which.
        id: TopicId,
    },
}

impl Change {
    /// A new topic, all of it in the catalogue's shard.
    pub fn created(topic: Topic) -> Self {
        Self::Topics(TopicChange::Created { topic, shards: vec![CATALOGUE], own: CATALOGUE, from: 0 })
    }
}

/// All topics.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Topics {
    topics: CowMap<TopicId, Topic>,
    topic_ids: CowMap<TopicName, TopicId>,
    hosting: CowMap<TopicId, Hosting>,
    /// Deleted topics that a shard may still hold.
    leaving: CowMap<TopicId, Vec<u32>>,
}

impl Section for Topics {
    const TAG: u8 = 1;
    type Change = TopicChange;

    fn apply(&mut self, change: TopicChange) {
        match change {
            TopicChange::Created { topic, shards, own, .. } => self.create(topic, shards, own),
            TopicChange::Deleted { id } => self.delete(id),
            TopicChange::PartitionsAdded { id, count } => self.grow(id, count),
            TopicChange::Configured { id, configs } => {
                if let Some(topic) = self.topics.get_mut(&id) {
                    topic.configs = configs;
                }
            }
            TopicChange::Gone { id } => drop(self.leaving.remove(&id)),
        }
    }
}

impl Topics {
    fn create(&mut self, topic: Topic, shards: Vec<u32>, own: u32) {
        let known = self.topics.contains_key(&topic.id);
        // Names are the catalogue's matter: a shard may still hold an older topic of this name.
        if shards.is_empty() || !known && own == CATALOGUE && self.topic_ids.contains_key(&topic.name) {
            return;
        }
        let (id, count) = (topic.id, topic.partitions);
        if !known {
            self.topic_ids.insert(topic.name.clone(), id);
            self.hosting.insert(id, Hosting { shards, own });
            self.topics.insert(id, Topic { partitions: 0, ..topic });
        }
        self.grow(id, count);
    }

    fn delete(&mut self, id: TopicId) {
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
    }

    fn grow(&mut self, id: TopicId, count: u32) {
        if let Some(topic) = self.topics.get_mut(&id) {
            topic.partitions = topic.partitions.max(count.min(TOPIC_PARTITIONS_MAX));
        }
    }

    /// The topic's partitions that lie in this shard, from the one numbered `first` on.
    pub(super) fn own_partitions(&self, id: TopicId, first: u32) -> impl Iterator<Item = Partition> + '_ {
        let known = self.topics.get(&id).zip(self.hosting.get(&id));
        known.into_iter().flat_map(move |(topic, hosting)| {
            let own = (first..topic.partitions).filter(|index| hosting.shard_of(*index) == hosting.own);
            own.map(move |index| Partition { topic: id, index })
        })
    }
}

impl State {
    /// The topic of that identity.
    pub fn topic(&self, id: TopicId) -> Option<&Topic> {
        self.topics.topics.get(&id)
    }

    /// The topic of that name.
    pub fn topic_named(&self, name: &TopicName) -> Option<&Topic> {
        self.topic(*self.topics.topic_ids.get(name)?)
    }

    /// All topics, ordered by name.
    pub fn topics(&self) -> impl Iterator<Item = &Topic> {
        self.topics.topic_ids.values().filter_map(|id| self.topic(*id))
    }

    /// All topics, by id: in a shard that hosts them there may be several of one name.
    pub fn topics_of_any_name(&self) -> impl Iterator<Item = &Topic> {
        self.topics.topics.values()
    }

    /// Where a topic's partitions lie.
    pub fn hosting(&self, id: TopicId) -> Option<&Hosting> {
        self.topics.hosting.get(&id)
    }

    /// The shard a partition lies in.
    pub fn shard_of(&self, partition: Partition) -> u32 {
        self.hosting(partition.topic).map_or(CATALOGUE, |hosting| hosting.shard_of(partition.index))
    }

    /// Deleted topics that shards may still hold, and which.
    pub fn leaving(&self) -> impl Iterator<Item = (TopicId, &[u32])> {
        self.topics.leaving.iter().map(|(id, shards)| (*id, &shards[..]))
    }
}
