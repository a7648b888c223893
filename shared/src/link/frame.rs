//! Messages of the link: shapes, bounds, and their bytes. Knows nothing of what they lead to.
//!
//! Every message, in both directions, is the body of one HTTP request or response:
//!
//! ```text
//!  0         1              5                 5 + length
//! +---------+--------------+-----------------+------------------------------------------+
//! | version | length       | header          | sealed batches, one after the other      |
//! | u8      | u32, big-    | postcard,       | (append requests only; each entry of the |
//! |         | endian       | `length` bytes  | header says how long its batch is)       |
//! +---------+--------------+-----------------+------------------------------------------+
//! ```
//!
//! A published struct is never edited: the next version of the protocol has structs of its own. In every version a
//! [`Hello`] begins with the lowest and the highest version its sender speaks (one byte each, so they lie at 5 and 6),
//! travels in the lowest of them, and is answered in that one; all else travels in the version the reply chose.

use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::Position;
use crate::name::{EdgeId, Incarnation, Offset, StreamName, TimestampMs, TopicName};

/// Lowest version of the protocol that this build speaks.
pub const VERSION_LOWEST: u8 = 1;
/// Highest version of the protocol that this build speaks.
pub const VERSION_HIGHEST: u8 = 1;
/// Bytes before the header.
pub const PREFIX_BYTES: usize = 5;
/// Longest header taken, in bytes.
pub const HEADER_BYTES_MAX: usize = 1024 * 1024;
/// Most streams in one message.
pub const STREAMS_MAX: usize = 1024;
/// Most sealed batches in one append.
pub const ENTRIES_MAX: usize = 4096;
/// Longest text (a reason, a software name), in bytes.
pub const TEXT_BYTES_MAX: usize = 512;

/// Where requests go, below the link's base URL.
pub mod path {
    /// [`super::Hello`] to [`super::HelloReply`].
    pub const HELLO: &str = "/link/v1/hello";
    /// [`super::Append`] and batches to [`super::AppendReply`].
    pub const APPEND: &str = "/link/v1/append";
    /// [`super::Poll`] to [`super::PollReply`].
    pub const POLL: &str = "/link/v1/poll";
}

/// Why bytes are not a message we take.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Fewer bytes than were announced.
    #[error("message is cut: {found} bytes of {expected}")]
    Cut {
        /// What was announced.
        expected: usize,
        /// What there is.
        found: usize,
    },
    /// Written in a version we do not speak.
    #[error("message has link version {found}, this side speaks {VERSION_LOWEST} to {VERSION_HIGHEST}")]
    Version {
        /// The version byte.
        found: u8,
    },
    /// More than a bound allows.
    #[error("{what}: {found}, at most {max} are taken")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// How much there is.
        found: usize,
        /// The bound.
        max: usize,
    },
    /// A field contradicts another or the format.
    #[error("message is malformed: {0}")]
    Malformed(&'static str),
}

/// One run of an edge's uplink, and the number of the hello within it. `boot` is random for each run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Session {
    /// Random for each run of the edge.
    pub boot: [u8; 16],
    /// Counts the hellos of that run, so that a delayed one is known as old.
    pub hello: u32,
}

/// An edge introduces itself, and says where its streams stand.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Lowest version the edge speaks. In every version of the protocol the first byte of the header.
    pub lowest: u8,
    /// Highest version the edge speaks. In every version of the protocol the second byte of the header.
    pub highest: u8,
    /// Who it is. Its token must belong to this id.
    pub edge: EdgeId,
    /// The session that begins; the cloud ends the edge's older one.
    pub session: Session,
    /// Name and version of the software, for status pages.
    pub software: String,
    /// Its streams.
    pub streams: Vec<HelloStream>,
}

/// One stream of a [`Hello`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelloStream {
    /// Its name at the edge.
    pub name: StreamName,
    /// The topic it goes to.
    pub topic: TopicName,
    /// The life of the edge's database it is written in.
    pub incarnation: Incarnation,
    /// First offset the edge still holds.
    pub first: Offset,
    /// Offset after the last record the edge holds.
    pub next: Offset,
    /// Last offset (exclusive) the edge knows to be durable in the cloud.
    pub confirmed: Offset,
    /// Last offset (exclusive) the edge knows to be in the bucket.
    pub safe: Offset,
}

/// What the cloud grants and knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelloReply {
    /// The version of the protocol to go on with.
    pub version: u8,
    /// The cloud's clock, so that an edge can tell that its own is wrong.
    pub time_ms: TimestampMs,
    /// What the cloud takes at most.
    pub limits: Limits,
    /// What may be sent now.
    pub credit: Credit,
    /// The same streams as in the hello, in the same order.
    pub streams: Vec<HelloStreamReply>,
}

/// What the cloud takes at most. An edge refuses before PUBACK what would not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Largest sealed batch in bytes.
    pub batch_bytes_max: u32,
    /// Largest body of an append in bytes.
    pub body_bytes_max: u32,
    /// Longest wait of a poll in seconds.
    pub poll_secs_max: u16,
}

/// How many bytes the next append may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credit {
    /// Bytes; 0 = nothing now.
    pub bytes: u32,
    /// With 0 bytes: try again after so many milliseconds, unless a poll grants some earlier.
    pub wait_ms: u32,
}

/// What the cloud knows of one stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelloStreamReply {
    /// Its name at the edge.
    pub name: StreamName,
    /// What is durable in the cloud; `None` when this incarnation never sent anything that is still known.
    pub position: Option<Position>,
    /// Last offset (exclusive) that is in the bucket; `None` when nothing is.
    pub safe: Option<Offset>,
    /// Why the stream cannot be taken now. The others can.
    pub parked: Option<String>,
}

/// Header of an append: one entry for each sealed batch in the body, in the same order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Append {
    /// Who sends.
    pub edge: EdgeId,
    /// The session of its last hello.
    pub session: Session,
    /// The batches. Those of one stream follow one another in offset.
    pub entries: Vec<AppendEntry>,
}

/// One sealed batch of an append.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppendEntry {
    /// The stream, as in the hello.
    pub stream: StreamName,
    /// Where the sender believes the stream to stand in the cloud: stored only if that is so, chain and all.
    pub after: Option<Position>,
    /// Edge offset of the first record.
    pub first: Offset,
    /// The offset after the last record and the chain value there.
    pub end: Position,
    /// The records `gap.0 .. gap.1` (end exclusive) were dropped at the edge; `gap.1 == first`.
    pub gap: Option<(Offset, Offset)>,
    /// One record that the topic can never take: goes to `<topic>.rejected`.
    pub rejected: bool,
    /// Length of the batch in the body.
    pub bytes: u32,
}

/// What an append came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppendReply {
    /// Whether the session is still the edge's newest. If not, nothing was stored.
    pub session: SessionState,
    /// What may be sent next.
    pub credit: Credit,
    /// One for each stream of the request.
    pub streams: Vec<StreamReply>,
}

/// Whether a session goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SessionState {
    /// It is the edge's newest.
    Current,
    /// The cloud does not know it (it has been started again): say hello.
    Unknown,
    /// A newer hello of the same edge id, from another run, has ended it.
    Superseded,
}

/// What an append came to for one stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamReply {
    /// The stream.
    pub name: StreamName,
    /// What is durable now.
    pub position: Option<Position>,
    /// Last offset (exclusive) that is in the bucket.
    pub safe: Option<Offset>,
    /// What became of the batches: `Stored` if all were, else of the first that was not.
    pub outcome: Outcome,
}

/// What became of a stream's batches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// Stored and durable.
    Stored,
    /// The batch lies wholly below the position: it was stored before.
    Have,
    /// The batch does not begin at the position: seal again from there.
    WrongPosition,
    /// These records can never go into the topic.
    Rejected {
        /// Why, for a person.
        reason: String,
    },
    /// The stream cannot be taken now: not allowed, no topic.
    Parked {
        /// Why, for a person.
        reason: String,
    },
    /// Not now: the log is full or failed.
    Later {
        /// Why, for a person.
        reason: String,
    },
}

/// Asks to be told when more becomes safe, or when credit is granted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Poll {
    /// Who asks.
    pub edge: EdgeId,
    /// The session of its last hello.
    pub session: Session,
    /// Answer after so many seconds at the latest.
    pub wait_secs: u16,
    /// Answer when there is credit again.
    pub wants_credit: bool,
    /// What the edge knows to be safe; streams it does not wait for are left out.
    pub known: Vec<(StreamName, Offset)>,
}

/// What changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PollReply {
    /// Whether the session is still the edge's newest.
    pub session: SessionState,
    /// What may be sent now.
    pub credit: Credit,
    /// What is safe of the streams asked for.
    pub safe: Vec<(StreamName, Offset)>,
}

/// A message that can be framed.
pub trait Message: Serialize + DeserializeOwned {
    /// Checks what the types do not say.
    fn check(&self) -> Result<(), FrameError>;
}

/// Writes a message without batches.
pub fn encode<M: Message>(message: &M) -> Bytes {
    encode_with(message, &[])
}

/// Writes an append: the header and the batches its entries describe.
pub fn encode_append(append: &Append, batches: &[Bytes]) -> Bytes {
    encode_with(append, batches)
}

fn encode_with<M: Message>(message: &M, batches: &[Bytes]) -> Bytes {
    let body: usize = batches.iter().map(Bytes::len).sum();
    let mut out = Vec::with_capacity(PREFIX_BYTES + 1024 + body);
    out.extend_from_slice(&[VERSION_LOWEST, 0, 0, 0, 0]);
    // Serialising these plain structs into memory has no way to fail.
    let mut out = postcard::to_extend(message, out).expect("a link message is plain data");
    let length = (out.len() - PREFIX_BYTES) as u32;
    out[1..PREFIX_BYTES].copy_from_slice(&length.to_be_bytes());
    batches.iter().for_each(|batch| out.extend_from_slice(batch));
    out.into()
}

/// Reads a message without batches.
pub fn decode<M: Message>(bytes: &Bytes) -> Result<M, FrameError> {
    let (message, rest) = decode_header(bytes)?;
    if !rest.is_empty() {
        return Err(FrameError::Malformed("bytes after the header"));
    }
    Ok(message)
}

/// Reads an append: its header, and one slice of the body for each entry. The batches are not looked into.
pub fn decode_append(bytes: &Bytes) -> Result<(Append, Vec<Bytes>), FrameError> {
    let (append, mut rest): (Append, Bytes) = decode_header(bytes)?;
    let expected: usize = append.entries.iter().map(|entry| entry.bytes as usize).sum();
    if expected != rest.len() {
        return Err(FrameError::Cut { expected, found: rest.len() });
    }
    let batches = append.entries.iter().map(|entry| rest.split_to(entry.bytes as usize)).collect();
    Ok((append, batches))
}

fn decode_header<M: Message>(bytes: &Bytes) -> Result<(M, Bytes), FrameError> {
    let [version, length @ ..] = prefix(bytes)?;
    if !(VERSION_LOWEST..=VERSION_HIGHEST).contains(&version) {
        return Err(FrameError::Version { found: version });
    }
    let length = u32::from_be_bytes(length) as usize;
    if length > HEADER_BYTES_MAX {
        return Err(FrameError::TooMany { what: "header bytes", found: length, max: HEADER_BYTES_MAX });
    }
    let end = PREFIX_BYTES + length;
    let header = bytes.get(PREFIX_BYTES..end).ok_or(FrameError::Cut { expected: end, found: bytes.len() })?;
    let (message, left) =
        postcard::take_from_bytes::<M>(header).map_err(|_| FrameError::Malformed("header does not decode"))?;
    if !left.is_empty() {
        return Err(FrameError::Malformed("bytes after the header's last field"));
    }
    message.check()?;
    Ok((message, bytes.slice(end..)))
}

fn prefix(bytes: &[u8]) -> Result<[u8; PREFIX_BYTES], FrameError> {
    bytes.first_chunk::<PREFIX_BYTES>().copied().ok_or(FrameError::Cut { expected: PREFIX_BYTES, found: bytes.len() })
}

/// The lowest and highest version the sender of a hello speaks, whatever version it is written in; `None` when the
/// bytes are no hello of any version.
pub fn hello_versions(bytes: &[u8]) -> Option<(u8, u8)> {
    let (lowest, highest) = (*bytes.get(PREFIX_BYTES)?, *bytes.get(PREFIX_BYTES + 1)?);
    (bytes.first() == Some(&lowest) && lowest <= highest).then_some((lowest, highest))
}

/// The highest version that both sides speak.
pub fn negotiate(lowest: u8, highest: u8) -> Option<u8> {
    let version = highest.min(VERSION_HIGHEST);
    (version >= lowest.max(VERSION_LOWEST)).then_some(version)
}

/// Cuts a text to what a message may carry.
pub fn bounded_text(text: impl Into<String>) -> String {
    let mut text = text.into();
    if text.len() > TEXT_BYTES_MAX {
        let mut at = TEXT_BYTES_MAX;
        while !text.is_char_boundary(at) {
            at -= 1;
        }
        text.truncate(at);
    }
    text
}

fn check_count(what: &'static str, found: usize, max: usize) -> Result<(), FrameError> {
    if found > max {
        return Err(FrameError::TooMany { what, found, max });
    }
    Ok(())
}

fn check_text(text: &str) -> Result<(), FrameError> {
    check_count("bytes of text", text.len(), TEXT_BYTES_MAX)
}

fn check_offset(offset: Offset) -> Result<(), FrameError> {
    if offset < 0 {
        return Err(FrameError::Malformed("negative offset"));
    }
    Ok(())
}

fn check_position(position: &Option<Position>) -> Result<(), FrameError> {
    position.as_ref().map_or(Ok(()), |p| check_offset(p.next))
}

impl Message for Hello {
    fn check(&self) -> Result<(), FrameError> {
        check_text(&self.software)?;
        check_count("streams", self.streams.len(), STREAMS_MAX)?;
        if self.lowest > self.highest {
            return Err(FrameError::Malformed("lowest version above the highest"));
        }
        let mut names: Vec<_> = self.streams.iter().map(|stream| &stream.name).collect();
        names.sort_unstable();
        if names.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(FrameError::Malformed("a stream is named twice"));
        }
        for s in &self.streams {
            [s.first, s.next, s.confirmed, s.safe].into_iter().try_for_each(check_offset)?;
            if s.first > s.next {
                return Err(FrameError::Malformed("a stream's first offset lies above its next"));
            }
        }
        Ok(())
    }
}

impl Message for HelloReply {
    fn check(&self) -> Result<(), FrameError> {
        check_count("streams", self.streams.len(), STREAMS_MAX)?;
        for stream in &self.streams {
            check_position(&stream.position)?;
            check_offset(stream.safe.unwrap_or(0))?;
            stream.parked.as_deref().map_or(Ok(()), check_text)?;
        }
        Ok(())
    }
}

impl Message for Append {
    fn check(&self) -> Result<(), FrameError> {
        check_count("batches", self.entries.len(), ENTRIES_MAX)?;
        for entry in &self.entries {
            check_position(&entry.after)?;
            check_offset(entry.first)?;
            if entry.end.next <= entry.first {
                return Err(FrameError::Malformed("a batch ends before it begins"));
            }
            if let Some((from, to)) = entry.gap {
                check_offset(from)?;
                if from >= to || to != entry.first {
                    return Err(FrameError::Malformed("a gap does not end where its batch begins"));
                }
            }
        }
        Ok(())
    }
}

impl Message for AppendReply {
    fn check(&self) -> Result<(), FrameError> {
        check_count("streams", self.streams.len(), STREAMS_MAX)?;
        for stream in &self.streams {
            check_position(&stream.position)?;
            check_offset(stream.safe.unwrap_or(0))?;
            match &stream.outcome {
                Outcome::Rejected { reason } | Outcome::Parked { reason } | Outcome::Later { reason } => {
                    check_text(reason)?;
                }
                Outcome::Stored | Outcome::Have | Outcome::WrongPosition => {}
            }
        }
        Ok(())
    }
}

impl Message for Poll {
    fn check(&self) -> Result<(), FrameError> {
        check_count("streams", self.known.len(), STREAMS_MAX)?;
        self.known.iter().try_for_each(|(_, offset)| check_offset(*offset))
    }
}

impl Message for PollReply {
    fn check(&self) -> Result<(), FrameError> {
        check_count("streams", self.safe.len(), STREAMS_MAX)?;
        self.safe.iter().try_for_each(|(_, offset)| check_offset(*offset))
    }
}

#[cfg(test)]
mod tests;
