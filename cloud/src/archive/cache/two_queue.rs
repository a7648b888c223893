//! What a cache keeps when it is full: the 2Q policy (Johnson and Shasha, 1994). Pure; the caller says what an entry weighs.
//!
//! New entries wait in a first queue and leave it in the order they came, however often they are used meanwhile: a
//! sequential reader asks for one chunk many times in a row, and that says nothing about the next hour. The names of those
//! that left are remembered for a while. Who is asked for again within that time has proved to be wanted, and goes to the
//! second queue, where the entry used longest ago leaves first. A pass over everything, of any length, goes through the
//! first queue only.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;

/// Entries by key, bounded in weight.
#[derive(Debug)]
pub(crate) struct TwoQueue<K, V> {
    entries: HashMap<K, Entry<V>>,
    /// Asked for once, by arrival.
    first: Queue<K>,
    /// Asked for again, by last use.
    second: Queue<K>,
    /// Names of what left the first queue, by when.
    left: Queue<K>,
    left_at: HashMap<K, (u64, u64)>,
    weight_max: u64,
    turn: u64,
}

#[derive(Debug)]
struct Entry<V> {
    value: V,
    weight: u64,
    turn: u64,
    is_second: bool,
}

#[derive(Debug)]
struct Queue<K> {
    keys: BTreeMap<u64, K>,
    weight: u64,
}

impl<K> Queue<K> {
    fn new() -> Self {
        Self { keys: BTreeMap::new(), weight: 0 }
    }

    fn push(&mut self, turn: u64, key: K, weight: u64) {
        self.keys.insert(turn, key);
        self.weight += weight;
    }

    fn remove(&mut self, turn: u64, weight: u64) {
        if self.keys.remove(&turn).is_some() {
            self.weight -= weight;
        }
    }
}

impl<K: Eq + Hash + Clone, V> TwoQueue<K, V> {
    /// Keeps at most `weight_max`; 0 keeps nothing.
    pub fn new(weight_max: u64) -> Self {
        Self {
            entries: HashMap::new(),
            first: Queue::new(),
            second: Queue::new(),
            left: Queue::new(),
            left_at: HashMap::new(),
            weight_max,
            turn: 0,
        }
    }

    /// The weight of everything kept.
    pub fn weight(&self) -> u64 {
        self.first.weight + self.second.weight
    }

    /// Whether an entry is here; no use of it.
    pub fn contains(&self, key: &K) -> bool {
        self.entries.contains_key(key)
    }

    /// Uses an entry.
    pub fn get(&mut self, key: &K) -> Option<&V> {
        let entry = self.entries.get_mut(key)?;
        if entry.is_second {
            self.turn += 1;
            self.second.remove(entry.turn, entry.weight);
            self.second.push(self.turn, key.clone(), entry.weight);
            entry.turn = self.turn;
        }
        Some(&entry.value)
    }

    /// Keeps an entry, or puts a new value in its place. Returns what had to go, the new one included if it alone is too
    /// heavy.
    pub fn insert(&mut self, key: K, value: V, weight: u64) -> Vec<(K, V)> {
        let mut gone = Vec::new();
        let was_second = self.entries.get(&key).is_some_and(|entry| entry.is_second);
        if let Some(old) = self.remove(&key) {
            gone.push((key.clone(), old));
        }
        if weight > self.weight_max {
            gone.push((key, value));
            return gone;
        }
        let is_second = self.forget_left(&key) || was_second;
        self.turn += 1;
        let queue = if is_second { &mut self.second } else { &mut self.first };
        queue.push(self.turn, key.clone(), weight);
        self.entries.insert(key, Entry { value, weight, turn: self.turn, is_second });
        while self.weight() > self.weight_max {
            let Some(pair) = self.evict() else { break };
            gone.push(pair);
        }
        gone
    }

    /// Drops an entry.
    pub fn remove(&mut self, key: &K) -> Option<V> {
        let entry = self.entries.remove(key)?;
        let queue = if entry.is_second { &mut self.second } else { &mut self.first };
        queue.remove(entry.turn, entry.weight);
        Some(entry.value)
    }

    /// Drops the entries that `keep` refuses and returns their keys.
    pub fn retain(&mut self, keep: impl Fn(&K) -> bool) -> Vec<K> {
        let refused: Vec<K> = self.entries.keys().filter(|key| !keep(key)).cloned().collect();
        for key in &refused {
            self.remove(key);
        }
        refused
    }

    /// Each queue may take all there is; when both want room, they have one half each.
    fn evict(&mut self) -> Option<(K, V)> {
        let from_first = self.first.weight > self.weight_max / 2 || self.second.keys.is_empty();
        let queue = if from_first { &self.first } else { &self.second };
        let key = queue.keys.values().next()?.clone();
        let weight = self.entries.get(&key)?.weight;
        let value = self.remove(&key)?;
        if from_first {
            self.remember(key.clone(), weight);
        }
        Some((key, value))
    }

    /// Remembers names for half of what could be kept of them.
    fn remember(&mut self, key: K, weight: u64) {
        self.turn += 1;
        self.left.push(self.turn, key.clone(), weight);
        self.left_at.insert(key, (self.turn, weight));
        while self.left.weight > self.weight_max / 2 {
            let Some(oldest) = self.left.keys.values().next().cloned() else { break };
            self.forget_left(&oldest);
        }
    }

    fn forget_left(&mut self, key: &K) -> bool {
        let Some((turn, weight)) = self.left_at.remove(key) else { return false };
        self.left.remove(turn, weight);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Asks for a key, and keeps it if it was not here, as a cache does. Says whether it was here.
    fn ask(cache: &mut TwoQueue<u32, u32>, key: u32) -> bool {
        let here = cache.get(&key).is_some();
        if !here {
            cache.insert(key, key, 1);
        }
        here
    }

    fn ask_all(cache: &mut TwoQueue<u32, u32>, keys: impl IntoIterator<Item = u32>) {
        for key in keys {
            ask(cache, key);
        }
    }

    /// Eight keys that are wanted now and then among others.
    fn warm(cache: &mut TwoQueue<u32, u32>) {
        for round in 0..20 {
            ask_all(cache, 0..8);
            ask_all(cache, (0..12).map(|n| 1000 + round * 12 + n));
        }
    }

    #[test]
    fn one_pass_over_ten_times_the_cache_leaves_what_is_wanted_again_in_place() {
        let mut cache = TwoQueue::new(40);
        warm(&mut cache);
        for key in 10_000..10_400 {
            // A sequential reader comes back to the chunk it is in.
            ask_all(&mut cache, [key; 5]);
        }
        for key in 0..8 {
            assert!(ask(&mut cache, key), "{key} is still here");
        }
        assert_eq!(cache.weight(), 40);
    }

    #[test]
    fn what_fits_stays_without_having_proved_anything() {
        let mut cache = TwoQueue::new(40);
        ask_all(&mut cache, 0..40);
        assert!((0..40).all(|key| ask(&mut cache, key)));
    }

    #[test]
    fn what_was_wanted_makes_room_for_what_is_wanted_now() {
        let mut cache = TwoQueue::new(40);
        warm(&mut cache);
        for round in 0..30 {
            ask_all(&mut cache, 100..120);
            ask_all(&mut cache, (0..12).map(|n| 20_000 + round * 12 + n));
        }
        assert!((0..8).all(|key| !cache.contains(&key)));
        assert!((100..120).all(|key| cache.contains(&key)));
    }

    #[test]
    fn what_had_to_go_is_handed_back() {
        let mut cache = TwoQueue::new(10);
        assert_eq!(cache.insert(1, 'a', 11), [(1, 'a')], "too heavy by itself");
        assert!(cache.insert(1, 'a', 6).is_empty());
        assert_eq!(cache.insert(1, 'b', 4), [(1, 'a')], "a new value for the old");
        assert_eq!(cache.insert(2, 'c', 7), [(1, 'b')]);
        assert_eq!((cache.weight(), cache.remove(&2), cache.remove(&2)), (7, Some('c'), None));
        assert_eq!(TwoQueue::new(0).insert(1, 'a', 1), [(1, 'a')]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn the_bound_and_the_books_hold_whatever_is_asked(
            steps in proptest::collection::vec((0..6u8, 0..40u32, 1..30u64), 0..400),
            weight_max in 0..100u64,
        ) {
            let mut cache = TwoQueue::new(weight_max);
            let mut held: BTreeMap<u32, u64> = BTreeMap::new();
            for (step, key, weight) in steps {
                match step {
                    0..=2 => {
                        held.insert(key, weight);
                        for (key, value) in cache.insert(key, weight, weight) {
                            if held.get(&key) == Some(&value) && !cache.contains(&key) {
                                held.remove(&key);
                            }
                        }
                    }
                    3 => prop_assert_eq!(cache.get(&key).copied(), held.get(&key).copied()),
                    4 => prop_assert_eq!(cache.remove(&key), held.remove(&key)),
                    _ => {
                        for gone in cache.retain(|kept| kept % 7 != key % 7) {
                            prop_assert!(held.remove(&gone).is_some());
                        }
                    }
                }
                prop_assert!(cache.weight() <= weight_max);
                prop_assert_eq!(cache.weight(), held.values().sum::<u64>());
                prop_assert!(cache.left.weight <= weight_max / 2);
                prop_assert_eq!(cache.left.keys.len(), cache.left_at.len());
                prop_assert_eq!(cache.first.keys.len() + cache.second.keys.len(), cache.entries.len());
            }
        }
    }
}
