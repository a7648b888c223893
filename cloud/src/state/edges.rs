//! The gateways that were here, and the partition that each of their streams was given. A guest of the catalogue's shard.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use shared::name::{EdgeId, Partition, StreamName, TimestampMs, TopicId};

use super::{Change, CowMap, GuestChange, Section, State};

/// An edge, as it last said hello.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Edge {
    /// When.
    pub seen_ms: TimestampMs,
    /// What it said of itself.
    pub detail: BTreeMap<String, String>,
}

/// What changes about edges.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum EdgeChange {
    /// An edge said hello.
    Seen {
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
}

/// All edges.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Edges {
    edges: CowMap<EdgeId, Edge>,
    placements: CowMap<(EdgeId, StreamName), Partition>,
}

impl Section for Edges {
    const TAG: u8 = 17;
    type Change = EdgeChange;

    fn apply(&mut self, change: EdgeChange) {
        match change {
            EdgeChange::Seen { edge, seen_ms, detail } => self.edges.insert(edge, Edge { seen_ms, detail }),
            EdgeChange::StreamPlaced { stream, topic, index } => {
                self.placements.insert(stream, Partition { topic, index });
            }
        }
    }

    fn topic_deleted(&mut self, id: TopicId) {
        self.placements.retain(|_, partition| partition.topic != id);
    }
}

impl From<EdgeChange> for Change {
    fn from(change: EdgeChange) -> Self {
        Self::Guest(GuestChange::of::<Edges>(&change))
    }
}

impl State {
    /// An edge.
    pub fn edge(&self, edge: &EdgeId) -> Option<&Edge> {
        self.guest::<Edges>().edges.get(edge)
    }

    /// All edges, by id.
    pub fn edges(&self) -> impl Iterator<Item = (&EdgeId, &Edge)> {
        self.guest::<Edges>().edges.iter()
    }

    /// The partition a stream was given.
    pub fn placement(&self, edge: &EdgeId, stream: &StreamName) -> Option<Partition> {
        self.guest::<Edges>().placements.get(&(edge.clone(), stream.clone())).copied()
    }

    /// All streams' partitions.
    pub fn placements(&self) -> impl Iterator<Item = (&(EdgeId, StreamName), &Partition)> {
        self.guest::<Edges>().placements.iter()
    }
}
