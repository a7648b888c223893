//! What a shard's blocks say besides data, in sections: topics, logs, producers, streams, and the guests.
//!
//! A [`Change`] rests in a block beside the data it belongs to; [`State`] is all changes folded together. Each kind of state is
//! a [`Section`]: it owns its maps, its changes, its readers and the form of both. The first four are what the log itself
//! needs. The others are guests: the log carries their changes as bytes and never looks inside. A protocol that comes later
//! adds a file here and a line to [`guests`]. Nothing here reads a clock, a disk or a socket.
//!
//! ```text
//! changes in a block                                   snapshot in a manifest
//! +---------+--------+-----+---------+--------+---     +---------+--------+-----+---------+--------+---
//! | version | count  | tag | section | bytes, | ...    | version | count  | tag | section | bytes, | ...
//! | u8 = 3  | varint | u8  | version | varint |        | u8 = 6  | varint | u8  | version | varint |
//! |         |        |     | u8      | first  |        |         |        |     | u8      | first  |
//! +---------+--------+-----+---------+--------+---     +---------+--------+-----+---------+--------+---
//! ```
//! A section's bytes are postcard: a change is a varint variant number, then its fields in order; a snapshot is the section's
//! maps. A variant is never edited or moved; what must say more becomes a new variant at the end, or a section's next version.

use std::fmt::Debug;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use shared::log::{AppendError, BoxFuture, StreamKey};
use shared::name::{EdgeId, Incarnation, Offset, StreamName, TimestampMs, TopicId};

mod cow;
mod edges;
mod groups;
mod guests;
mod logs;
pub mod memory;
mod partition_map;
mod producers;
mod slots;
mod streams;
mod topics;

pub use cow::CowMap;
pub use edges::{Edge, EdgeChange, Edges};
pub use groups::{CommittedOffset, Group, GroupChange, Groups};
pub use guests::GuestChange;
pub use logs::{EpochStart, LogChange, Logs, PartitionState};
pub use partition_map::PartitionMap;
pub use producers::{PRODUCER_BATCHES_KEPT, ProducedBatch, Producer, ProducerChange, Producers};
pub use slots::{
    CATALOGUE, COORDINATOR_SLOTS, CoordinatorSlot, Engine, ShardEntry, SlotChange, Slots, coordinator_log,
    coordinator_logs,
};
pub use streams::{StreamChange, StreamState, Streams};
pub use topics::{Hosting, TOPIC_PARTITIONS_MAX, Topic, TopicChange, Topics};

use guests::Guests;

const CHANGES_VERSION: u8 = 3;
const SNAPSHOT_VERSION: u8 = 6;

/// One kind of state.
pub trait Section: Serialize + DeserializeOwned + Clone + PartialEq + Default + Debug + Send + Sync + 'static {
    /// Names it in blocks and snapshots, for ever. Below 16: the log's own. From 16 on: guests.
    const TAG: u8;
    /// The form of its changes and of its snapshot.
    const VERSION: u8 = 1;
    /// One thing that changed in it.
    type Change: Serialize + DeserializeOwned;

    /// Folds a change in. Total: a change that names what is not there does nothing.
    fn apply(&mut self, change: Self::Change);

    /// A topic is gone, whether this shard hosted it or not.
    fn topic_deleted(&mut self, _id: TopicId) {}

    /// Offsets were left out because what was stored last may have been lost.
    fn offsets_left_out(&mut self, _skip: Offset) {}

    /// Whether what was read from a snapshot can be.
    fn check(&self) -> Result<(), StateError> {
        Ok(())
    }
}

/// One thing that changed. Applied in the order written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Of [`Topics`].
    Topics(TopicChange),
    /// Of [`Logs`].
    Logs(LogChange),
    /// Of [`Producers`].
    Producers(ProducerChange),
    /// Of [`Streams`].
    Streams(StreamChange),
    /// Of a guest.
    Guest(GuestChange),
}

/// All changes so far, folded together.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct State {
    topics: Topics,
    logs: Logs,
    producers: Producers,
    streams: Streams,
    guests: Guests,
}

/// Why stored state was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// Written by another build.
    #[error("state has format version {0}, which this build does not read: start the build that wrote it")]
    Version(u8),
    /// A section that this build does not know, or not in this version.
    #[error(
        "state has section {tag} in version {version}, which this build does not read: start the build that wrote it"
    )]
    Section {
        /// Which.
        tag: u8,
        /// Its version.
        version: u8,
    },
    /// Not what any version writes.
    #[error("state is malformed: {0}")]
    Malformed(&'static str),
}

impl State {
    /// Folds one change in.
    pub fn apply(&mut self, change: &Change) -> Result<(), StateError> {
        match change {
            Change::Topics(change) => self.apply_to_topics(change.clone()),
            Change::Logs(LogChange::EpochStarted { epoch, skip }) => self.start_epoch(*epoch, *skip),
            Change::Logs(change) => self.logs.apply(change.clone()),
            Change::Producers(change) => self.producers.apply(change.clone()),
            Change::Streams(change) => self.streams.apply(change.clone()),
            Change::Guest(change) => self.guests.apply(change)?,
        }
        Ok(())
    }

    fn apply_to_topics(&mut self, change: TopicChange) {
        let (id, from) = match &change {
            TopicChange::Created { topic, from, .. } => (topic.id, (*from).max(0)),
            TopicChange::Deleted { id } => {
                self.logs.topic_deleted(*id);
                self.producers.topic_deleted(*id);
                self.guests.topic_deleted(*id);
                return self.topics.apply(change);
            }
            TopicChange::PartitionsAdded { id, .. } => (*id, 0),
            TopicChange::Configured { .. } | TopicChange::Gone { .. } => return self.topics.apply(change),
        };
        let known = self.topic(id).map_or(0, |topic| topic.partitions);
        self.topics.apply(change);
        self.topics.own_partitions(id, known).for_each(|partition| self.logs.create(partition, from));
    }

    fn start_epoch(&mut self, epoch: i32, skip: i64) {
        if epoch <= self.leader_epoch() {
            return;
        }
        let skip = skip.max(0);
        self.logs.apply(LogChange::EpochStarted { epoch, skip });
        if skip > 0 {
            self.producers.offsets_left_out(skip);
            self.guests.offsets_left_out(skip);
        }
    }

    /// A block was written by the owner in `epoch`. Where it is the fence of a new one, a leader epoch begins, so that clients see that
    /// the shard moved (KIP-320). A memory shard writes empty blocks too: those are of the epoch of the block before.
    pub fn owned_in(&mut self, epoch: u32, is_fence: bool) {
        if self.logs.raise_owner(epoch) && is_fence {
            self.start_epoch(self.leader_epoch().saturating_add(1), 0);
        }
    }

    fn guest<S: Section>(&self) -> &S {
        self.guests.get()
    }

    /// The whole state as bytes, for a manifest.
    pub fn encode(&self) -> Vec<u8> {
        let own = [encode(&self.topics), encode(&self.logs), encode(&self.producers), encode(&self.streams)];
        encode_pieces(SNAPSHOT_VERSION, own.into_iter().chain(self.guests.encode()).collect())
    }

    /// Reads what [`State::encode`] wrote. Nothing is allocated that the bytes do not back.
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        if bytes.is_empty() {
            return Err(StateError::Malformed("empty snapshot"));
        }
        let (mut state, mut own) = (Self::default(), 0);
        let pieces = decode_pieces(SNAPSHOT_VERSION, bytes)?;
        if !pieces.is_sorted_by(|one, next| one.tag < next.tag) {
            return Err(StateError::Malformed("sections are not in order"));
        }
        for piece in pieces {
            own += usize::from(piece.tag <= Streams::TAG);
            match piece.tag {
                Topics::TAG => state.topics = piece.section()?,
                Logs::TAG => state.logs = piece.section()?,
                Producers::TAG => state.producers = piece.section()?,
                Streams::TAG => state.streams = piece.section()?,
                _ => state.guests.decode(&piece)?,
            }
        }
        // A guest that came later has nothing in an older snapshot.
        if own < usize::from(Streams::TAG) {
            return Err(StateError::Malformed("a section of the log's own is missing"));
        }
        Ok(state)
    }
}

/// Bytes of one section: a change, or its snapshot.
#[derive(Debug, Serialize, Deserialize)]
struct Piece<'a> {
    tag: u8,
    version: u8,
    #[serde(borrow)]
    bytes: std::borrow::Cow<'a, [u8]>,
}

impl Piece<'_> {
    fn value<S: Section, T: DeserializeOwned>(&self) -> Result<T, StateError> {
        if (self.tag, self.version) != (S::TAG, S::VERSION) {
            return Err(StateError::Section { tag: self.tag, version: self.version });
        }
        match postcard::take_from_bytes(&self.bytes) {
            Ok((value, [])) => Ok(value),
            Ok(_) => Err(StateError::Malformed("bytes after a section or a change")),
            Err(_) => Err(StateError::Malformed("a section or a change does not decode")),
        }
    }

    fn section<S: Section>(&self) -> Result<S, StateError> {
        let section: S = self.value::<S, S>()?;
        section.check()?;
        Ok(section)
    }

    fn change(self) -> Result<Change, StateError> {
        Ok(match self.tag {
            Topics::TAG => Change::Topics(self.value::<Topics, _>()?),
            Logs::TAG => Change::Logs(self.value::<Logs, _>()?),
            Producers::TAG => Change::Producers(self.value::<Producers, _>()?),
            Streams::TAG => Change::Streams(self.value::<Streams, _>()?),
            tag => Change::Guest(GuestChange::new(tag, self.version, self.bytes.into_owned())),
        })
    }
}

fn piece<'a, S: Section, T: Serialize>(value: &T) -> Piece<'a> {
    let bytes = postcard::to_stdvec(value).expect("plain data always encodes to memory");
    Piece { tag: S::TAG, version: S::VERSION, bytes: bytes.into() }
}

fn encode<'a, S: Section>(section: &S) -> Piece<'a> {
    piece::<S, S>(section)
}

fn encode_pieces(version: u8, pieces: Vec<Piece<'_>>) -> Vec<u8> {
    postcard::to_extend(&pieces, vec![version]).expect("plain data always encodes to memory")
}

fn decode_pieces(version: u8, bytes: &[u8]) -> Result<Vec<Piece<'_>>, StateError> {
    match bytes.split_first() {
        None => Ok(Vec::new()),
        Some((found, _)) if *found != version => Err(StateError::Version(*found)),
        Some((_, body)) => match postcard::take_from_bytes(body) {
            Ok((pieces, [])) => Ok(pieces),
            Ok(_) => Err(StateError::Malformed("bytes after the sections or changes")),
            Err(_) => Err(StateError::Malformed("sections or changes do not decode")),
        },
    }
}

/// Changes as a block carries them; no bytes for none.
pub fn encode_changes<'a>(changes: impl IntoIterator<Item = &'a Change>) -> Vec<u8> {
    let pieces = changes.into_iter().map(|change| match change {
        Change::Topics(change) => piece::<Topics, _>(change),
        Change::Logs(change) => piece::<Logs, _>(change),
        Change::Producers(change) => piece::<Producers, _>(change),
        Change::Streams(change) => piece::<Streams, _>(change),
        Change::Guest(change) => change.piece(),
    });
    let pieces: Vec<_> = pieces.collect();
    if pieces.is_empty() { Vec::new() } else { encode_pieces(CHANGES_VERSION, pieces) }
}

/// Reads what [`encode_changes`] wrote. Nothing is allocated that the bytes do not back.
pub fn decode_changes(bytes: &[u8]) -> Result<Vec<Change>, StateError> {
    decode_pieces(CHANGES_VERSION, bytes)?.into_iter().map(Piece::change).collect()
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
