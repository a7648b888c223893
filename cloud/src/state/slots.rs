//! Which shards there are, and which of them keeps what belongs to a group id or a transactional id. A guest of the catalogue's
//! shard.
//!
//! An id lies in one of 64 slots for ever: the CRC-32C of its UTF-8 bytes, modulo 64. The catalogue says which shard each
//! slot is in. There are so many slots, and not one per id, so that the catalogue stays small and does not change with ids.

use serde::{Deserialize, Serialize};
use shared::name::Offset;

use super::{Change, CowMap, GuestChange, Section, State, StateLog};

/// The shard that keeps the catalogue.
pub const CATALOGUE: u32 = 0;

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

/// Where a shard's blocks rest, and so what its acknowledgements promise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// On the local disk, synced before an answer.
    File,
    /// In the object store, one conditional PUT per block before an answer.
    Object,
    /// In memory: nothing survives a restart.
    Memory,
}

impl Engine {
    /// All there are.
    pub const ALL: [Self; 3] = [Self::File, Self::Object, Self::Memory];

    /// Its name in settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Object => "object",
            Self::Memory => "memory",
        }
    }

    /// The engine of that name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|engine| engine.name() == name)
    }
}

impl std::fmt::Display for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A shard, as the catalogue knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardEntry {
    /// Its engine.
    pub engine: Engine,
    /// The newest leader epoch that a shard which keeps nothing may have used.
    pub epoch: i32,
    /// Offsets below may have been used by it.
    pub ceiling: Offset,
}

/// What changes about shards and slots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SlotChange {
    /// A shard exists, with its engine for ever.
    ShardAdded {
        /// Its number.
        shard: u32,
        /// Its engine.
        engine: Engine,
    },
    /// Offsets below `ceiling` may be used by a shard that keeps nothing, in this leader epoch and before.
    OffsetsReserved {
        /// Which.
        shard: u32,
        /// The newest leader epoch it may use.
        epoch: i32,
        /// Where it begins when it is started again.
        ceiling: Offset,
    },
    /// What belongs to a slot's ids is in this shard from here on. Written to the catalogue, and only while no other shard
    /// holds anything of the slot.
    Placed {
        /// Which.
        slot: CoordinatorSlot,
        /// The shard, which outlives the process.
        shard: u32,
    },
}

/// All shards and slots.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Slots {
    shards: CowMap<u32, ShardEntry>,
    /// Those that were placed; the others are in the catalogue's shard.
    slots: CowMap<CoordinatorSlot, u32>,
}

impl Section for Slots {
    const TAG: u8 = 18;
    type Change = SlotChange;

    fn apply(&mut self, change: SlotChange) {
        match change {
            SlotChange::ShardAdded { shard, engine } => {
                self.shards.or_insert_with(shard, || ShardEntry { engine, epoch: 0, ceiling: 0 });
            }
            SlotChange::OffsetsReserved { shard, epoch, ceiling } => {
                if let Some(entry) = self.shards.get_mut(&shard) {
                    entry.epoch = entry.epoch.max(epoch);
                    entry.ceiling = entry.ceiling.max(ceiling);
                }
            }
            SlotChange::Placed { slot, shard } => self.slots.insert(slot, shard),
        }
    }

    fn offsets_left_out(&mut self, skip: Offset) {
        // What was reserved since may have been lost with the rest, by each owner for whom offsets are left out.
        let lives = i32::try_from(skip >> 32).unwrap_or(i32::MAX).max(1);
        let raise = |shard: &mut ShardEntry| {
            shard.ceiling = shard.ceiling.saturating_add(skip);
            shard.epoch = shard.epoch.saturating_add(lives);
        };
        self.shards.change(|_| true, raise);
    }
}

impl From<SlotChange> for Change {
    fn from(change: SlotChange) -> Self {
        Self::Guest(GuestChange::of::<Slots>(&change))
    }
}

impl State {
    /// All shards there ever were, as far as they were noted.
    pub fn shards(&self) -> impl Iterator<Item = (u32, &ShardEntry)> {
        self.guest::<Slots>().shards.iter().map(|(shard, entry)| (*shard, entry))
    }

    /// The shard that keeps what belongs to a coordinator slot's ids.
    pub fn slot_shard(&self, slot: CoordinatorSlot) -> u32 {
        self.guest::<Slots>().slots.get(&slot).copied().unwrap_or(CATALOGUE)
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
