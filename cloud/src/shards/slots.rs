//! Which shard each coordinator slot is in: decided at starts, before anything is served, and fixed until the next.
//!
//! A slot that holds anything stays where it is held, whatever the catalogue remembers: a catalogue that was restored from
//! an older state finds it again. A slot that holds nothing can go anywhere, so these are spread over all shards of the
//! catalogue's kind, those that were added since included. Never on a shard in memory: what groups commit must survive.

use std::collections::{BTreeMap, BTreeSet};

use tracing::warn;

use crate::state::{Change, CoordinatorSlot, SlotChange, State};

/// The slots that a shard holds something of. Whatever comes to belong to slots is to be counted here.
pub fn held(state: &State) -> BTreeSet<CoordinatorSlot> {
    state.groups().map(|(group, _)| CoordinatorSlot::of(group)).collect()
}

/// The shards that slots are in.
pub fn shards(catalogue: &State) -> BTreeSet<u32> {
    CoordinatorSlot::all().map(|slot| catalogue.slot_shard(slot)).collect()
}

/// What the catalogue must note, by what each shard that survives holds, and with the shards to spread slots over.
pub fn place(catalogue: &State, held: &BTreeMap<u32, BTreeSet<CoordinatorSlot>>, spread: &[u32]) -> Vec<Change> {
    let mut moved = Vec::new();
    for slot in CoordinatorSlot::all() {
        let was = catalogue.slot_shard(slot);
        let holders: Vec<u32> =
            held.iter().filter(|(_, slots)| slots.contains(&slot)).map(|(shard, _)| *shard).collect();
        let shard = match holders[..] {
            [] => spread.get(usize::from(slot.number()) % spread.len().max(1)).copied().unwrap_or(was),
            [holder] => holder,
            [first, ..] => {
                let shard = if holders.contains(&was) { was } else { first };
                let slot = slot.number();
                warn!(
                    slot,
                    shard,
                    ?holders,
                    "several shards hold groups of one slot; those not in this shard are unreachable"
                );
                shard
            }
        };
        if shard != was {
            moved.push(SlotChange::Placed { slot, shard }.into());
        }
    }
    moved
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(number: u8) -> CoordinatorSlot {
        CoordinatorSlot::try_from(number).unwrap()
    }

    fn holding(slots: &[(u32, &[u8])]) -> BTreeMap<u32, BTreeSet<CoordinatorSlot>> {
        slots.iter().map(|(shard, slots)| (*shard, slots.iter().copied().map(slot).collect())).collect()
    }

    /// Where slots 0 to 5 are after a start.
    fn start(catalogue: &mut State, held: &[(u32, &[u8])], spread: &[u32]) -> Vec<u32> {
        place(catalogue, &holding(held), spread).iter().for_each(|change| catalogue.apply(change).unwrap());
        assert_eq!(place(catalogue, &holding(held), spread), [], "once is enough");
        (0..6).map(|number| catalogue.slot_shard(slot(number))).collect()
    }

    #[test]
    fn slots_that_hold_nothing_are_spread_and_the_others_stay() {
        let mut catalogue = State::default();
        assert_eq!(start(&mut catalogue, &[], &[0]), [0; 6]);
        assert_eq!(start(&mut catalogue, &[], &[0, 2]), [0, 2, 0, 2, 0, 2], "a first start with two shards");
        assert_eq!(shards(&catalogue), BTreeSet::from([0, 2]));
        assert_eq!(start(&mut catalogue, &[(0, &[4]), (2, &[1, 5])], &[0, 2, 3]), [0, 2, 3, 0, 0, 2], "one shard more");
        let counts = |shard| CoordinatorSlot::all().filter(|slot| catalogue.slot_shard(*slot) == shard).count();
        assert_eq!([0, 2, 3].map(counts), [23, 21, 20]);
    }

    #[test]
    fn a_catalogue_that_remembers_less_finds_what_shards_hold() {
        assert_eq!(start(&mut State::default(), &[(0, &[1]), (2, &[0, 3])], &[0, 2]), [2, 0, 0, 2, 0, 2]);
        assert_eq!(start(&mut State::default(), &[(2, &[2])], &[0]), [0, 0, 2, 0, 0, 0], "and no slots elsewhere");
    }

    #[test]
    fn of_two_shards_that_hold_a_slot_the_one_it_was_placed_in_counts() {
        let mut catalogue = State::default();
        catalogue.apply(&SlotChange::Placed { slot: slot(1), shard: 2 }.into()).unwrap();
        assert_eq!(start(&mut catalogue, &[(0, &[1]), (2, &[1])], &[0])[1], 2);
        assert_eq!(start(&mut State::default(), &[(2, &[1]), (3, &[1])], &[0])[1], 2);
    }
}
