//! Names and identities: parsed once at the border, the type is the proof inside.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// A position in a log: the number of a record in its stream or partition, from 0.
/// `i64` because Kafka's is (RecordBatch v2 `baseOffset`).
pub type Offset = i64;

/// Milliseconds since 1970-01-01 UTC, as Kafka and the link carry them.
pub type TimestampMs = i64;

/// Why a name was refused, in words a person can act on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind} {found:?} is not valid: expected {expected}")]
pub struct NameError {
    kind: &'static str,
    found: String,
    expected: &'static str,
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $max:expr, $expected:literal, $valid:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Arc<str>);

        impl $name {
            /// Longest name in bytes.
            pub const LENGTH_MAX: usize = $max;

            /// Parses a name from outside.
            pub fn parse(text: &str) -> Result<Self, NameError> {
                let valid: fn(&str) -> bool = $valid;
                if text.is_empty() || text.len() > Self::LENGTH_MAX || !valid(text) {
                    let found = text.chars().take(64).collect();
                    return Err(NameError { kind: $kind, found, expected: $expected });
                }
                Ok(Self(text.into()))
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                Self::parse(&text)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0.as_ref().to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", &*self.0)
            }
        }
    };
}

fn is_kafka_legal(text: &str) -> bool {
    text != "." && text != ".." && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

name!(
    /// A Kafka topic's name.
    TopicName, "topic name", 249,
    "1 to 249 of a-z A-Z 0-9 . _ - and neither \".\" nor \"..\"", is_kafka_legal
);
name!(
    /// A gateway's identity. One token belongs to one id.
    EdgeId, "edge id", 128,
    "1 to 128 of a-z A-Z 0-9 . _ - and neither \".\" nor \"..\"", is_kafka_legal
);
name!(
    /// The name of a stream at one edge.
    StreamName, "stream name", 128,
    "1 to 128 of a-z A-Z 0-9 . _ - and neither \".\" nor \"..\"", is_kafka_legal
);

macro_rules! id128 {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub [u8; 16]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }
    };
}

id128!(
    /// A topic's identity: a topic made again under the same name has another one (KIP-516).
    TopicId
);
id128!(
    /// The identity of one life of an edge's database: random, minted in its first commit.
    Incarnation
);

/// One partition of one topic: the unit a log orders, and readers ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Partition {
    /// The topic it belongs to.
    pub topic: TopicId,
    /// Its number within the topic, from 0.
    pub index: u32,
}

impl fmt::Display for Partition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.topic, self.index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_topic_name_is_what_kafka_allows() {
        for good in ["a", "telemetry", "a.b_c-9", "...", &"x".repeat(249)] {
            assert_eq!(TopicName::parse(good).unwrap().as_str(), good);
        }
        for bad in ["", ".", "..", "a/b", "a b", "ä", "a\0", &"x".repeat(250)] {
            assert!(TopicName::parse(bad).is_err(), "{bad:?}");
        }
    }
}
