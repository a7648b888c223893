//! How far the streams of edges are stored, in the block that carries the data.

use serde::{Deserialize, Serialize};
use shared::log::{Chain, StreamKey};
use shared::name::{EdgeId, Incarnation, Offset, Partition, StreamName};

use super::{CowMap, Section, State};

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

/// What changes about streams. The shard alone writes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum StreamChange {
    /// A stream's position.
    Position {
        /// Which, in which incarnation.
        key: StreamKey,
        /// Where its records were stored.
        partition: Partition,
        /// The edge offset its next batch must begin with.
        next: Offset,
        /// The sender's chain value there.
        chain: Chain,
    },
}

/// All streams. What was stored of a topic that is deleted stays stored.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Streams(CowMap<StreamKey, StreamState>);

impl Section for Streams {
    const TAG: u8 = 4;
    type Change = StreamChange;

    fn apply(&mut self, change: StreamChange) {
        let StreamChange::Position { key, partition, next, chain } = change;
        self.0.insert(key, StreamState { partition, next, chain });
    }
}

impl State {
    /// How far a stream's records are stored.
    pub fn stream(&self, key: &StreamKey) -> Option<&StreamState> {
        self.streams.0.get(key)
    }

    /// The incarnations of one stream that have stored anything.
    pub fn incarnations(&self, edge: &EdgeId, stream: &StreamName) -> impl Iterator<Item = Incarnation> {
        let key = |bytes| StreamKey { edge: edge.clone(), stream: stream.clone(), incarnation: Incarnation(bytes) };
        self.streams.0.range(key([0; 16])..=key([0xff; 16])).map(|(key, _)| key.incarnation)
    }

    /// All streams, those of one edge together.
    pub fn streams(&self) -> impl Iterator<Item = (&StreamKey, &StreamState)> {
        self.streams.0.iter()
    }
}
