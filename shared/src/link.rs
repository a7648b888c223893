//! The edge-to-cloud protocol: messages and both halves as pure state machines.
//!
//! [`frame`] is what travels; [`sender`] decides for the edge, [`receiver`] for the cloud. None of them knows a socket
//! or a clock: `uplink` in the edge and `ingest` in the cloud carry bytes and time to them. `tests` run both halves
//! against each other over a wire that cuts, repeats, reorders and delays.

pub mod frame;
pub mod receiver;
pub mod sender;

#[cfg(test)]
mod tests;

use crate::log::Chain;
use crate::name::Offset;

/// How far a stream has come: the offset after its last record, and the sender's chain value there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Position {
    /// Offset after the last record.
    pub next: Offset,
    /// Hash over every row before it.
    pub chain: Chain,
}

/// Header of a record in a `.rejected` topic: why the topic itself could not take it.
pub const REJECTED_HEADER: &str = "tributary-rejected";
/// Header of a record in a `.rejected` topic whose value was cut to fit: the value's true length in bytes.
pub const REJECTED_BYTES_HEADER: &str = "tributary-rejected-value-bytes";
/// What follows a topic's name in the name of the topic that takes what it cannot.
pub const REJECTED_SUFFIX: &str = ".rejected";
/// The topic that lists what edges dropped under `drop-oldest`.
pub const GAPS_TOPIC: &str = "tributary.gaps";
