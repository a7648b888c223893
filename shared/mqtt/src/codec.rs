//! MQTT 3.1.1 and 5 control packets: bytes to borrowed packets and back. Pure and strict.
//!
//! ```text
//! +------------+-----------------------+---------------------------+
//! | type flags | remaining length      | remaining length bytes    |   all integers big-endian
//! | 4 b  4 b   | 1-4 bytes, 7 bits each| variable header, payload  |   (MQTT 5 §1.5, §2.1)
//! +------------+-----------------------+---------------------------+
//! ```
//!
//! [`split`] finds one packet at the front of a buffer and refuses what can never become one as early as it shows;
//! [`Packet::decode`] reads it for a known version; [`Packet::encode`] writes. Nothing is copied: a packet borrows from the
//! buffer. What needs to be remembered between packets (packet ids in flight, topic aliases, who may send what) is
//! not known here.

mod decode;
mod encode;
mod packet;
mod properties;
#[cfg(test)]
mod tests;
mod wire;

pub use encode::{EncodeError, encode_properties_and_payload};
pub use packet::*;
pub use properties::{Properties, decode_properties_and_payload};

/// Largest remaining length that four bytes can carry (MQTT 5 §2.1.4).
pub const REMAINING_LENGTH_MAX: usize = 268_435_455;

/// The protocol version of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Version {
    /// MQTT 3.1.1, protocol level 4.
    V4,
    /// MQTT 5, protocol level 5.
    V5,
}

/// Quality of service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(u8)]
pub enum QoS {
    /// At most once.
    #[default]
    AtMostOnce = 0,
    /// At least once.
    AtLeastOnce = 1,
    /// Exactly once.
    ExactlyOnce = 2,
}

impl QoS {
    /// The quality of service with this number.
    pub fn from_u8(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::AtMostOnce),
            1 => Some(Self::AtLeastOnce),
            2 => Some(Self::ExactlyOnce),
            _ => None,
        }
    }
}

/// An MQTT 5 reason code (§2.4). In 3.1.1 CONNACK and SUBACK it holds their return codes as they stand on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Reason(pub u8);

#[allow(missing_docs)] // The names are the standard's (§2.4).
impl Reason {
    pub const SUCCESS: Self = Self(0x00);
    pub const DISCONNECT_WITH_WILL: Self = Self(0x04);
    pub const NO_MATCHING_SUBSCRIBERS: Self = Self(0x10);
    pub const NO_SUBSCRIPTION_EXISTED: Self = Self(0x11);
    pub const UNSPECIFIED_ERROR: Self = Self(0x80);
    pub const MALFORMED_PACKET: Self = Self(0x81);
    pub const PROTOCOL_ERROR: Self = Self(0x82);
    pub const IMPLEMENTATION_SPECIFIC_ERROR: Self = Self(0x83);
    pub const UNSUPPORTED_PROTOCOL_VERSION: Self = Self(0x84);
    pub const CLIENT_IDENTIFIER_NOT_VALID: Self = Self(0x85);
    pub const BAD_USER_NAME_OR_PASSWORD: Self = Self(0x86);
    pub const NOT_AUTHORIZED: Self = Self(0x87);
    pub const SERVER_UNAVAILABLE: Self = Self(0x88);
    pub const SERVER_BUSY: Self = Self(0x89);
    pub const SERVER_SHUTTING_DOWN: Self = Self(0x8B);
    pub const BAD_AUTHENTICATION_METHOD: Self = Self(0x8C);
    pub const KEEP_ALIVE_TIMEOUT: Self = Self(0x8D);
    pub const SESSION_TAKEN_OVER: Self = Self(0x8E);
    pub const TOPIC_FILTER_INVALID: Self = Self(0x8F);
    pub const TOPIC_NAME_INVALID: Self = Self(0x90);
    pub const PACKET_IDENTIFIER_IN_USE: Self = Self(0x91);
    pub const PACKET_IDENTIFIER_NOT_FOUND: Self = Self(0x92);
    pub const RECEIVE_MAXIMUM_EXCEEDED: Self = Self(0x93);
    pub const TOPIC_ALIAS_INVALID: Self = Self(0x94);
    pub const PACKET_TOO_LARGE: Self = Self(0x95);
    pub const QUOTA_EXCEEDED: Self = Self(0x97);
    pub const PAYLOAD_FORMAT_INVALID: Self = Self(0x99);
    pub const ADMINISTRATIVE_ACTION: Self = Self(0x98);
    pub const RETAIN_NOT_SUPPORTED: Self = Self(0x9A);
    pub const QOS_NOT_SUPPORTED: Self = Self(0x9B);
    pub const SHARED_SUBSCRIPTIONS_NOT_SUPPORTED: Self = Self(0x9E);

    /// 0x80 and above: the request failed.
    pub fn is_error(self) -> bool {
        self.0 >= 0x80
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "0x{:02X}", self.0)
    }
}

/// Why bytes are not a packet we take. Each is an end of the connection (MQTT 5 §4.13).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// The bytes cannot be parsed.
    #[error("malformed packet: {0}")]
    Malformed(&'static str),
    /// They parse, and the standard forbids what they say.
    #[error("protocol error: {0}")]
    Protocol(&'static str),
    /// A packet beyond the bound.
    #[error("packet of {bytes} bytes: the largest taken is {max}")]
    TooLarge {
        /// The packet's length.
        bytes: usize,
        /// What is taken.
        max: usize,
    },
    /// User properties without end.
    #[error("more than {} properties in one packet", properties::PROPERTIES_MAX)]
    TooManyProperties,
    /// CONNECT for a version that is neither 3.1.1 nor 5.
    #[error("protocol level {0}: MQTT 3.1.1 (4) and MQTT 5 (5) are served")]
    UnsupportedVersion(u8),
    /// A topic name that is empty, has a wildcard, U+0000, or too many levels.
    #[error("topic name is not valid")]
    TopicName,
    /// A topic filter that is empty, or whose wildcards stand where they must not, or with too many levels.
    #[error("topic filter is not valid")]
    TopicFilter,
    /// Topic alias 0 or beyond what was offered.
    #[error("topic alias is not valid")]
    TopicAlias,
}

impl CodecError {
    /// The reason code of the DISCONNECT or CONNACK that answers it.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Malformed(_) => Reason::MALFORMED_PACKET,
            Self::Protocol(_) => Reason::PROTOCOL_ERROR,
            Self::TooLarge { .. } => Reason::PACKET_TOO_LARGE,
            Self::TooManyProperties => Reason::QUOTA_EXCEEDED,
            Self::UnsupportedVersion(_) => Reason::UNSUPPORTED_PROTOCOL_VERSION,
            Self::TopicName => Reason::TOPIC_NAME_INVALID,
            Self::TopicFilter => Reason::TOPIC_FILTER_INVALID,
            Self::TopicAlias => Reason::TOPIC_ALIAS_INVALID,
        }
    }
}

/// One packet's bytes, not decoded yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Type and flags.
    pub first: u8,
    /// What the remaining length counts.
    pub body: &'a [u8],
    /// The whole packet.
    pub bytes: &'a [u8],
}

/// What stands at the front of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split<'a> {
    /// A whole packet.
    Frame(Frame<'a>),
    /// Not enough yet: `need` is the packet's whole length, or at least one byte more than there is while that is unknown.
    More {
        /// Bytes the buffer must hold before it is worth asking again.
        need: usize,
    },
}

/// Finds the packet at the front of `buffer`. A type or flags that no packet has, a fifth length byte and a length beyond
/// `packet_bytes_max` are refused as soon as their bytes are there, so a peer cannot make us wait for them.
///
/// `version` is `None` before CONNECT. MQTT 5 demands the shortest form of the length (§1.5.5); 3.1.1 does not.
#[inline]
pub fn split(buffer: &[u8], version: Option<Version>, packet_bytes_max: usize) -> Result<Split<'_>, CodecError> {
    let Some((&first, rest)) = buffer.split_first() else { return Ok(Split::More { need: 2 }) };
    check_first_byte(first)?;
    let mut length = 0usize;
    for (i, &byte) in rest.iter().take(4).enumerate() {
        length |= usize::from(byte & 0x7F) << (7 * i);
        if byte & 0x80 != 0 {
            continue;
        }
        if byte == 0 && i > 0 && version == Some(Version::V5) {
            return Err(CodecError::Malformed("remaining length is longer than it must be"));
        }
        let header = i + 2;
        let bytes = header + length;
        if bytes > packet_bytes_max {
            return Err(CodecError::TooLarge { bytes, max: packet_bytes_max });
        }
        return Ok(match (buffer.get(..bytes), buffer.get(header..bytes)) {
            (Some(whole), Some(body)) => Split::Frame(Frame { first, body, bytes: whole }),
            _ => Split::More { need: bytes },
        });
    }
    if rest.len() >= 4 {
        return Err(CodecError::Malformed("remaining length has more than four bytes"));
    }
    Ok(Split::More { need: buffer.len() + 1 })
}

/// The version that the beginning of a CONNECT names, before the whole packet is there.
pub fn connect_version(buffer: &[u8]) -> Option<Version> {
    let (&0x10, rest) = buffer.split_first()? else { return None };
    let length_bytes = 1 + rest.iter().take(3).take_while(|byte| **byte & 0x80 != 0).count();
    match rest.get(length_bytes..)?.strip_prefix(b"\0\x04MQTT")?.first()? {
        4 => Some(Version::V4),
        5 => Some(Version::V5),
        _ => None,
    }
}

/// Types and their fixed flags (MQTT 5 §2.1.3, Table 2-2).
#[inline]
fn check_first_byte(first: u8) -> Result<(), CodecError> {
    let flags = first & 0x0F;
    match first >> 4 {
        0 => Err(CodecError::Malformed("packet type 0")),
        3 if flags & 0x06 == 0x06 => Err(CodecError::Malformed("QoS 3")),
        3 if flags & 0x0E == 0x08 => Err(CodecError::Malformed("DUP with QoS 0")),
        3 => Ok(()),
        6 | 8 | 10 if flags == 2 => Ok(()),
        6 | 8 | 10 => Err(CodecError::Malformed("reserved flags of PUBREL, SUBSCRIBE or UNSUBSCRIBE are not 0010")),
        _ if flags != 0 => Err(CodecError::Malformed("reserved flags are set")),
        _ => Ok(()),
    }
}
