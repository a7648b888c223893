//! Coordinator slots: which shard keeps what belongs to a group id or a transactional id.
//!
//! An id lies in one of 64 slots for ever: the CRC-32C of its UTF-8 bytes, modulo 64. The catalogue says which shard each
//! slot is in. There are so many slots, and not one per id, so that the catalogue stays small and does not change with ids.

use serde::{Deserialize, Serialize};

use super::StateLog;

/// How many slots there are, for ever.
pub const COORDINATOR_SLOTS: u8 = 64;

/// One of the slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct CoordinatorSlot(u8);

impl CoordinatorSlot {
    /// The slot of a group id or a transactional id.
    pub fn of(id: &str) -> Self {
        Self((crc32c::crc32c(id.as_bytes()) % u32::from(COORDINATOR_SLOTS)) as u8)
    }

    /// All there are, ascending.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..COORDINATOR_SLOTS).map(Self)
    }

    /// Its number, below [`COORDINATOR_SLOTS`].
    pub fn number(self) -> u8 {
        self.0
    }
}

impl TryFrom<u8> for CoordinatorSlot {
    type Error = String;

    fn try_from(number: u8) -> Result<Self, Self::Error> {
        if number < COORDINATOR_SLOTS {
            Ok(Self(number))
        } else {
            Err(format!("slot {number}, expected one below {COORDINATOR_SLOTS}"))
        }
    }
}

impl From<CoordinatorSlot> for u8 {
    fn from(slot: CoordinatorSlot) -> Self {
        slot.0
    }
}

/// The log that keeps what belongs to a group id or a transactional id.
pub fn coordinator_log<'a>(log: &'a dyn StateLog, id: &str) -> &'a dyn StateLog {
    log.slot_log(CoordinatorSlot::of(id)).unwrap_or(log)
}

/// All logs that may keep something of the kind.
pub fn coordinator_logs(log: &dyn StateLog) -> Vec<&dyn StateLog> {
    let logs = log.slot_logs();
    if logs.is_empty() { vec![log] } else { logs }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// These are in `docs/formats.md`. If one changes, committed offsets are not found any more.
    #[test]
    fn an_id_lies_in_the_same_slot_for_ever() {
        for (id, slot) in
            [("", 0), ("123456789", 3), ("readers", 39), ("orders-7", 21), ("console-consumer-1", 36), ("zähler", 28)]
        {
            assert_eq!(CoordinatorSlot::of(id).number(), slot, "{id:?}");
        }
    }

    #[test]
    fn ids_that_differ_in_a_number_are_spread() {
        let mut slots: BTreeMap<CoordinatorSlot, usize> = BTreeMap::new();
        (0..6400).for_each(|n| *slots.entry(CoordinatorSlot::of(&format!("group-{n}"))).or_default() += 1);
        assert_eq!(slots.len(), usize::from(COORDINATOR_SLOTS));
        assert!(slots.values().all(|ids| (50..200).contains(ids)), "{slots:?}");
    }

    #[test]
    fn a_number_that_is_no_slot_does_not_decode() {
        assert_eq!(postcard::from_bytes::<CoordinatorSlot>(&[63]).map(u8::from), Ok(63));
        assert!(postcard::from_bytes::<CoordinatorSlot>(&[64]).is_err());
    }
}
