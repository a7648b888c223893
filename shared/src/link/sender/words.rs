//! What a sender is told, and what it says: settings, steps, outputs, failures.

use bytes::Bytes;

use super::seal::SealOrder;
use crate::batch::{Batch, Compression};
use crate::limits::{BATCH_BYTES_MAX, LINK_BODY_BYTES_MAX};
use crate::link::frame::{HelloStream, Limits};
use crate::log::Chain;
use crate::name::{Incarnation, Offset, StreamName, TimestampMs, TopicName};

/// Milliseconds of a clock that only goes forward.
pub type Millis = u64;

/// What the sender reads of the edge's log. All of it is durable.
pub trait Rows {
    /// Every stream.
    fn streams(&self) -> Vec<StreamInfo>;

    /// Rows from the one that contains `from` (or, if that was dropped, the first after it), ascending: about
    /// `bytes_max` of them, one at least if there is any.
    fn read(&self, stream: &StreamName, from: Offset, bytes_max: usize) -> Result<Vec<Row>, String>;

    /// The chain value after record `next - 1`; `None` when that is not the end of a stored row, or was trimmed.
    fn chain_at(&self, stream: &StreamName, next: Offset) -> Option<Chain>;
}

/// Where a stream stands at the edge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamInfo {
    /// Its name.
    pub name: StreamName,
    /// The topic it goes to.
    pub topic: TopicName,
    /// The life of the database it is written in.
    pub incarnation: Incarnation,
    /// First offset held.
    pub first: Offset,
    /// Offset after the last durable record.
    pub next: Offset,
    /// Last offset (exclusive) known to be durable in the cloud.
    pub confirmed: Offset,
    /// Last offset (exclusive) known to be in the bucket.
    pub safe: Offset,
    /// Where its incarnation began, if it is not the first: what lies below was in the bucket under the one before.
    pub renewed_at: Offset,
    /// Records dropped before they were sent (end exclusive), and not yet told to the cloud.
    pub dropped: Option<(Offset, Offset)>,
}

impl StreamInfo {
    /// Where sending begins with a cloud that knows nothing of the incarnation. As long as nothing of it was in the
    /// bucket, that is no wonder: what lies below its beginning is there under the one before. A cloud that forgot
    /// what was in its bucket gets all there is.
    pub fn start(&self) -> Offset {
        if self.safe > self.renewed_at { self.first } else { self.first.max(self.renewed_at) }
    }
}

impl From<StreamInfo> for HelloStream {
    /// What a hello says of the stream.
    fn from(info: StreamInfo) -> Self {
        let StreamInfo { name, topic, incarnation, first, next, confirmed, safe, renewed_at: _, dropped: _ } = info;
        Self { name, topic, incarnation, first, next, confirmed, safe }
    }
}

/// One stored row: a batch, and the chain value after its last record.
#[derive(Debug, Clone)]
pub struct Row {
    /// The records.
    pub batch: Batch,
    /// The hash over every row up to and with this one.
    pub chain: Chain,
}

/// How the sender goes about its work.
#[derive(Debug, Clone)]
pub struct SenderSettings {
    /// How batches are compressed.
    pub compression: Compression,
    /// How long the first unsent record waits for company when nothing is on the wire.
    pub linger_ms: u64,
    /// What neighbouring rows are merged up to, in bytes before compression.
    pub batch_bytes: usize,
    /// Largest body; the cloud's own limit holds too.
    pub body_bytes_max: usize,
    /// What a body should take on the wire.
    pub body_ms: u64,
    /// First wait after a failure; it doubles from there.
    pub backoff_min_ms: u64,
    /// Longest wait after failures.
    pub backoff_max_ms: u64,
    /// How often a parked stream is tried.
    pub parked_retry_ms: u64,
    /// Name and version for the cloud's status.
    pub software: String,
}

impl Default for SenderSettings {
    fn default() -> Self {
        Self {
            compression: Compression::Lz4,
            linger_ms: 5,
            batch_bytes: BATCH_BYTES_MAX,
            body_bytes_max: LINK_BODY_BYTES_MAX,
            body_ms: 100,
            backoff_min_ms: 250,
            backoff_max_ms: 30_000,
            parked_retry_ms: 60_000,
            software: concat!("tributary-edge/", env!("CARGO_PKG_VERSION")).to_owned(),
        }
    }
}

/// What to do next.
#[derive(Debug)]
pub enum Step {
    /// Send this hello; tell [`Sender::hello_done`].
    Hello(Bytes),
    /// Send this append; tell [`Sender::append_done`].
    Append(Bytes),
    /// Send this poll, which may take so many seconds; tell [`Sender::poll_done`], with the number given here.
    Poll {
        /// To be handed back.
        number: u32,
        /// The request.
        body: Bytes,
        /// The longest it may take to be answered, network aside.
        wait_secs: u16,
    },
    /// Run [`seal_body`] on this; tell [`Sender::sealed`].
    Seal(SealOrder),
    /// Nothing until then (`None`: until something is told), or until there are more rows.
    Wait(Option<Millis>),
}

/// What the store shall do, and what happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Everything below `next` is durable in the cloud.
    Confirmed {
        /// The stream.
        stream: StreamName,
        /// End, exclusive.
        next: Offset,
    },
    /// Everything below `next` is in the bucket and may be deleted.
    Safe {
        /// The stream.
        stream: StreamName,
        /// End, exclusive.
        next: Offset,
    },
    /// The stream needs a new incarnation, which begins at what is `safe` (or `first`, if that is above). Tell
    /// [`Sender::renewed`] when both are durable.
    Renew {
        /// The stream.
        stream: StreamName,
    },
    /// The stream cannot be sent now, and why; `None`: it can again.
    Park {
        /// The stream.
        stream: StreamName,
        /// For a person.
        reason: Option<String>,
    },
    /// What was dropped below `upto` has been told to the cloud.
    GapDeclared {
        /// The stream.
        stream: StreamName,
        /// End, exclusive.
        upto: Offset,
    },
    /// Something a person may want to know.
    Report(Report),
}

/// Something a person may want to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    /// The cloud answered a hello.
    Linked {
        /// The cloud's clock.
        cloud_time_ms: TimestampMs,
        /// What it takes at most.
        limits: Limits,
    },
    /// The link failed.
    Down {
        /// Why.
        error: String,
        /// When it is tried again.
        retry_ms: u64,
    },
    /// Another gateway uses this edge id, or another process of this one.
    Superseded,
    /// The cloud holds other records, or more, under this incarnation than the edge ever wrote: the edge's data were
    /// restored or copied. Records `from .. upto` are sent under a new incarnation and may be in the topic twice.
    SentTwice {
        /// The stream.
        stream: StreamName,
        /// First record sent again.
        from: Offset,
        /// End, exclusive.
        upto: Offset,
    },
    /// The cloud had confirmed records below `confirmed` and now stands at `position`: it lost them. The edge sends
    /// from `resumed` what it still holds.
    CloudLost {
        /// The stream.
        stream: StreamName,
        /// What it stands at.
        position: Offset,
        /// What it had confirmed.
        confirmed: Offset,
        /// Where the edge goes on.
        resumed: Offset,
    },
    /// The cloud now knows that records `from .. upto` were dropped.
    GapDeclared {
        /// The stream.
        stream: StreamName,
        /// First dropped record.
        from: Offset,
        /// End, exclusive.
        upto: Offset,
    },
    /// A record goes to the `.rejected` topic.
    Rejected {
        /// The stream.
        stream: StreamName,
        /// The record.
        offset: Offset,
        /// Why.
        reason: String,
    },
    /// The cloud cannot take more just now, or not of one of the streams.
    Held {
        /// Why.
        reason: String,
        /// When it is tried again.
        retry_ms: u64,
    },
    /// A body was refused as too large; later ones are at most this large.
    BodyHalved {
        /// The new limit.
        bytes_max: usize,
    },
}

/// Why a request came to nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// No answer, or one that makes no sense.
    Unreachable(String),
    /// 413, from the cloud or from a proxy on the way.
    TooLarge(String),
    /// The cloud does not want this edge: token, version, id.
    Refused(String),
    /// The cloud is busy.
    Busy {
        /// Its words.
        text: String,
        /// When to try again.
        wait_ms: u64,
    },
}
