//! The whole state as bytes, for a manifest.

use super::{State, StateError, encode_versioned};

pub(super) const SNAPSHOT_VERSION: u8 = 5;

impl State {
    /// The whole state as bytes, for a manifest.
    pub fn encode(&self) -> Vec<u8> {
        encode_versioned(SNAPSHOT_VERSION, self)
    }

    /// Reads what [`State::encode`] wrote. Nothing is allocated that the bytes do not back.
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let (version, body) = bytes.split_first().ok_or(StateError::Malformed("empty snapshot"))?;
        if *version != SNAPSHOT_VERSION {
            return Err(StateError::Version(*version));
        }
        let state: Self = match postcard::take_from_bytes(body) {
            Ok((state, [])) => state,
            Ok(_) => return Err(StateError::Malformed("bytes after the snapshot")),
            Err(_) => return Err(StateError::Malformed("snapshot does not decode")),
        };
        if state.partitions.values().any(|partition| partition.epochs.is_empty()) {
            return Err(StateError::Malformed("partition without an epoch"));
        }
        Ok(state)
    }
}
