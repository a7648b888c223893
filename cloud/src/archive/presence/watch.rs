//! Whether an owner lives, by looking at its heartbeat again and again: it does if the object changes.
//!
//! Pure: what was seen and when is passed in. Only the reader's own monotonic clock counts; what another clock says is
//! never compared.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use object_store::path::Path;

use super::heartbeat::{Heartbeat, NodePhase, OwnerIdentity};

/// A heartbeat object as it was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sighting {
    /// Its key.
    pub key: Path,
    /// All of it.
    pub bytes: Bytes,
    /// What it says; `None` where it does not hold or is of a newer form. That it changes can be seen all the same.
    pub beat: Option<Heartbeat>,
}

impl Sighting {
    /// An object and what it says.
    pub fn new(key: Path, bytes: Bytes) -> Self {
        let beat = Heartbeat::decode(&bytes).ok();
        Self { key, bytes, beat }
    }

    /// Who it is, for people.
    pub fn describe(&self) -> String {
        match &self.beat {
            Some(beat) => beat.to_string(),
            None => format!("a node whose heartbeat {} is of a form that this build does not know", self.key),
        }
    }

    /// Whether another heartbeat names a greater epoch for each of its shards: it has been deposed.
    fn is_outdated(&self, all: &[Sighting]) -> bool {
        let Some(beat) = &self.beat else { return false };
        let greater =
            |number, epoch| all.iter().filter_map(|other| other.beat.as_ref()?.epoch_of(number)).any(|e| e > epoch);
        beat.shards.iter().all(|owned| greater(owned.number, owned.epoch))
    }
}

/// Those that may be the owner of shards which a start wants: not gone, not deposed, and neither this process nor an earlier
/// one of the same data directory, which has ended, since this one holds the lock.
pub fn rivals(all: &[Sighting], own: &OwnerIdentity) -> Vec<Sighting> {
    let is_rival = |seen: &&Sighting| match &seen.beat {
        Some(beat) => beat.state == NodePhase::Serving && beat.identity != *own && !seen.is_outdated(all),
        None => true,
    };
    all.iter().filter(is_rival).cloned().collect()
}

/// What a look came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OwnerVerdict {
    /// To be looked again.
    Unclear,
    /// This one's heartbeat has moved.
    Alive(Box<Sighting>),
    /// None of these has moved in all the time, or there is none.
    Dead(Vec<Sighting>),
}

/// A watch over owners' heartbeats.
#[derive(Debug)]
pub struct OwnerWatch {
    patience: Duration,
    /// Somebody has just claimed: wait although there is nobody to be seen yet.
    is_suspicious: bool,
    began: Option<Duration>,
    known: BTreeMap<Path, Bytes>,
}

impl OwnerWatch {
    /// A watch that lasts `patience`, if there is anybody to watch. `dead` were found dead by an earlier one, as they were.
    pub fn new(patience: Duration, dead: BTreeMap<Path, Bytes>, is_suspicious: bool) -> Self {
        Self { patience, is_suspicious, began: None, known: dead }
    }

    /// Takes in what is seen at `now`: all rivals.
    pub fn look(&mut self, now: Duration, rivals: Vec<Sighting>) -> OwnerVerdict {
        let is_first = self.began.is_none();
        let began = *self.began.get_or_insert(now);
        let mut is_new = false;
        for rival in &rivals {
            match self.known.get(&rival.key) {
                Some(known) if *known == rival.bytes => {}
                None if is_first => {
                    is_new = true;
                    self.known.insert(rival.key.clone(), rival.bytes.clone());
                }
                _ => return OwnerVerdict::Alive(Box::new(rival.clone())),
            }
        }
        let has_waited = now.saturating_sub(began) >= self.patience;
        let must_wait = self.is_suspicious || (!rivals.is_empty() && (is_new || !is_first));
        if must_wait && !has_waited {
            return OwnerVerdict::Unclear;
        }
        OwnerVerdict::Dead(rivals)
    }
}

#[cfg(test)]
mod tests {
    use super::super::heartbeat::OwnedShard;
    use super::super::heartbeat::tests::heartbeat;
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(9);

    fn seen(beat: Heartbeat) -> Sighting {
        Sighting::new(Path::from(format!("n/{}", beat.node_id)), beat.encode())
    }

    fn beats(node: i32, counter: u64) -> Sighting {
        seen(Heartbeat { counter, ..heartbeat(node, &[(0, 1)]) })
    }

    fn watch() -> OwnerWatch {
        OwnerWatch::new(PATIENCE, BTreeMap::new(), false)
    }

    fn at(secs: u64) -> Duration {
        // A clock that began long ago: only differences count.
        Duration::from_secs(1_000_000 + secs)
    }

    #[test]
    fn nobody_to_watch_costs_no_time() {
        assert_eq!(watch().look(at(0), Vec::new()), OwnerVerdict::Dead(Vec::new()));
    }

    #[test]
    fn an_owner_that_moves_is_alive_and_one_that_does_not_is_dead_after_the_patience() {
        let mut moving = watch();
        assert_eq!(moving.look(at(0), vec![beats(1, 5)]), OwnerVerdict::Unclear);
        assert_eq!(moving.look(at(2), vec![beats(1, 5)]), OwnerVerdict::Unclear);
        assert_eq!(moving.look(at(3), vec![beats(1, 6)]), OwnerVerdict::Alive(Box::new(beats(1, 6))));

        let mut still = watch();
        for secs in [0, 1, 5, 8] {
            assert_eq!(still.look(at(secs), vec![beats(1, 5)]), OwnerVerdict::Unclear, "{secs}");
        }
        assert_eq!(still.look(at(9), vec![beats(1, 5)]), OwnerVerdict::Dead(vec![beats(1, 5)]));
        // The last look decides, however late it comes.
        let mut late = watch();
        assert_eq!(late.look(at(0), vec![beats(1, 5)]), OwnerVerdict::Unclear);
        assert_eq!(late.look(at(60), vec![beats(1, 6)]), OwnerVerdict::Alive(Box::new(beats(1, 6))));
    }

    #[test]
    fn a_new_process_under_the_same_number_is_alive_although_its_counter_is_lower() {
        let mut watch = watch();
        assert_eq!(watch.look(at(0), vec![beats(1, 500)]), OwnerVerdict::Unclear);
        let anew = seen(Heartbeat { incarnation: [9; 16], counter: 1, ..heartbeat(1, &[(0, 2)]) });
        assert_eq!(watch.look(at(1), vec![anew.clone()]), OwnerVerdict::Alive(Box::new(anew)));
    }

    #[test]
    fn one_that_appears_during_the_watch_is_alive() {
        let mut watch = watch();
        assert_eq!(watch.look(at(0), vec![beats(1, 5)]), OwnerVerdict::Unclear);
        assert_eq!(watch.look(at(1), vec![beats(1, 5), beats(2, 1)]), OwnerVerdict::Alive(Box::new(beats(2, 1))));
    }

    #[test]
    fn one_that_stops_in_order_during_the_watch_ends_it() {
        let mut watch = watch();
        assert_eq!(watch.look(at(0), vec![beats(1, 5)]), OwnerVerdict::Unclear);
        assert_eq!(watch.look(at(1), Vec::new()), OwnerVerdict::Dead(Vec::new()));
    }

    #[test]
    fn after_a_lost_claim_it_waits_although_there_is_nobody_yet() {
        let mut watch = OwnerWatch::new(PATIENCE, BTreeMap::new(), true);
        assert_eq!(watch.look(at(0), Vec::new()), OwnerVerdict::Unclear);
        assert_eq!(watch.look(at(2), vec![beats(1, 1)]), OwnerVerdict::Alive(Box::new(beats(1, 1))));
        let mut watch = OwnerWatch::new(PATIENCE, BTreeMap::new(), true);
        assert_eq!(watch.look(at(0), Vec::new()), OwnerVerdict::Unclear);
        assert_eq!(watch.look(at(9), Vec::new()), OwnerVerdict::Dead(Vec::new()));
    }

    #[test]
    fn who_was_found_dead_is_not_watched_again_unless_it_moved() {
        let dead = |beat: &Sighting| BTreeMap::from([(beat.key.clone(), beat.bytes.clone())]);
        let mut again = OwnerWatch::new(PATIENCE, dead(&beats(1, 5)), false);
        assert_eq!(again.look(at(0), vec![beats(1, 5)]), OwnerVerdict::Dead(vec![beats(1, 5)]));
        let mut moved = OwnerWatch::new(PATIENCE, dead(&beats(1, 5)), false);
        assert_eq!(moved.look(at(0), vec![beats(1, 6)]), OwnerVerdict::Alive(Box::new(beats(1, 6))));
    }

    #[test]
    fn who_may_be_the_owner() {
        let own = heartbeat(9, &[]).identity;
        let gone = |node, shards: &[(u32, u32)]| seen(Heartbeat { state: NodePhase::Gone, ..heartbeat(node, shards) });
        let mine = |shards: &[(u32, u32)]| seen(Heartbeat { node_id: 3, ..heartbeat(9, shards) });
        let owns = |node, shards: &[(u32, u32)]| seen(heartbeat(node, shards));
        let intends = |node| {
            let shards = vec![OwnedShard { number: 0, epoch: 2, claimed: false }];
            seen(Heartbeat { shards, ..heartbeat(node, &[]) })
        };
        let unknown = Sighting::new(Path::from("n/7"), Bytes::from_static(b"of a later version"));
        for (all, expected) in [
            (vec![owns(1, &[(0, 1)])], vec![owns(1, &[(0, 1)])]),
            (vec![gone(1, &[(0, 1)])], vec![]),
            // An earlier life of this data directory, whatever its number was.
            (vec![mine(&[(0, 4)])], vec![]),
            // Deposed by this one, by one that has gone since, by one that lives.
            (vec![owns(1, &[(0, 1)]), mine(&[(0, 2)])], vec![]),
            (vec![owns(1, &[(0, 1)]), gone(2, &[(0, 2)])], vec![]),
            (vec![owns(1, &[(0, 1)]), owns(2, &[(0, 2)])], vec![owns(2, &[(0, 2)])]),
            // Whoever only meant to claim has deposed nobody, and may be about to.
            (vec![owns(1, &[(0, 1)]), intends(2)], vec![owns(1, &[(0, 1)]), intends(2)]),
            // Only in one of its shards.
            (vec![owns(1, &[(0, 1), (1, 1)]), mine(&[(0, 2)])], vec![owns(1, &[(0, 1), (1, 1)])]),
            (vec![unknown.clone()], vec![unknown]),
            // It owns nothing.
            (vec![owns(1, &[])], vec![]),
        ] {
            assert_eq!(rivals(&all, &own), expected, "{all:?}");
        }
    }
}
