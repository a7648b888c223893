//! The whole state as bytes, for a manifest, and every version of it that was ever written.

use std::collections::BTreeMap;

use serde::Deserialize;
use shared::log::StreamKey;
use shared::name::{EdgeId, Offset, Partition, StreamName, TopicId, TopicName};

use super::{
    CoordinatorSlot, Edge, Group, Hosting, PartitionMap, PartitionState, ShardEntry, State, StateError, StreamState,
    Topic, encode_versioned,
};

pub(super) const SNAPSHOT_VERSION: u8 = 4;

/// What a snapshot of version 1 holds.
#[derive(Deserialize)]
struct StateV1 {
    leader_epoch: i32,
    next_producer_id: i64,
    topics: BTreeMap<TopicId, Topic>,
    topic_ids: BTreeMap<TopicName, TopicId>,
    partitions: PartitionMap<PartitionState>,
    groups: BTreeMap<String, Group>,
    edges: BTreeMap<EdgeId, Edge>,
    placements: BTreeMap<(EdgeId, StreamName), Partition>,
    streams: BTreeMap<StreamKey, StreamState>,
}

/// What a snapshot of version 2 holds: that of version 1, and more.
#[derive(Deserialize)]
struct StateV2 {
    first: StateV1,
    hosting: BTreeMap<TopicId, Hosting>,
    leaving: BTreeMap<TopicId, Vec<u32>>,
    shards: BTreeMap<u32, ShardEntry>,
    skipped: Offset,
}

/// What a snapshot of version 3 holds.
#[derive(Deserialize)]
struct StateV3 {
    second: StateV2,
    slots: BTreeMap<CoordinatorSlot, u32>,
}

impl From<StateV1> for State {
    fn from(old: StateV1) -> Self {
        Self {
            leader_epoch: old.leader_epoch,
            next_producer_id: old.next_producer_id,
            topics: old.topics,
            topic_ids: old.topic_ids,
            partitions: old.partitions,
            groups: old.groups,
            edges: old.edges,
            placements: old.placements,
            streams: old.streams,
            ..Self::default()
        }
    }
}

impl From<StateV2> for State {
    fn from(old: StateV2) -> Self {
        let StateV2 { first, hosting, leaving, shards, skipped } = old;
        Self { hosting, leaving, shards, skipped, ..first.into() }
    }
}

impl From<StateV3> for State {
    fn from(old: StateV3) -> Self {
        Self { slots: old.slots, ..old.second.into() }
    }
}

impl State {
    /// The whole state as bytes, for a manifest.
    pub fn encode(&self) -> Vec<u8> {
        encode_versioned(SNAPSHOT_VERSION, self)
    }

    /// Reads what [`State::encode`] wrote, in this version or an older one. Nothing is allocated that the bytes do not back.
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let (version, body) = bytes.split_first().ok_or(StateError::Malformed("empty snapshot"))?;
        let state = match version {
            1 => decode_whole::<StateV1>(body)?.into(),
            2 => decode_whole::<StateV2>(body)?.into(),
            3 => decode_whole::<StateV3>(body)?.into(),
            &SNAPSHOT_VERSION => decode_whole::<Self>(body)?,
            _ => return Err(StateError::Version(*version)),
        };
        if state.partitions.values().any(|partition| partition.epochs.is_empty()) {
            return Err(StateError::Malformed("partition without an epoch"));
        }
        Ok(state)
    }
}

fn decode_whole<T: for<'de> Deserialize<'de>>(body: &[u8]) -> Result<T, StateError> {
    match postcard::take_from_bytes(body) {
        Ok((value, [])) => Ok(value),
        Ok(_) => Err(StateError::Malformed("bytes after the snapshot")),
        Err(_) => Err(StateError::Malformed("snapshot does not decode")),
    }
}
