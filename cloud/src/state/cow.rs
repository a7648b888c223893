//! A sorted map whose copy costs next to nothing: what a snapshot takes under the append lock.

use std::borrow::Borrow;
use std::ops::RangeInclusive;
use std::sync::Arc;

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Most entries of a chunk. A copy counts one reference for each chunk; the first change of a chunk after that copies its entries.
const CHUNK_ENTRIES_MAX: usize = 256;

/// Sorted chunks of sorted entries, none empty, shared with copies until one of them changes.
#[derive(Debug, Clone)]
pub struct CowMap<K, V> {
    chunks: Vec<Arc<Vec<(K, V)>>>,
}

impl<K, V> Default for CowMap<K, V> {
    fn default() -> Self {
        Self { chunks: Vec::new() }
    }
}

impl<K: Ord + Clone, V: Clone + PartialEq> PartialEq for CowMap<K, V> {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl<K: Ord + Clone, V: Clone + Eq> Eq for CowMap<K, V> {}

impl<K: Ord + Clone, V: Clone> CowMap<K, V> {
    /// The chunk that `key` is in, or would be.
    fn chunk_of<Q: Ord + ?Sized>(&self, key: &Q) -> usize
    where
        K: Borrow<Q>,
    {
        let begins = |chunk: &Arc<Vec<(K, V)>>| chunk.first().is_some_and(|(first, _)| first.borrow() <= key);
        self.chunks.partition_point(begins).saturating_sub(1)
    }

    /// Where in its chunk `key` is, or would be.
    fn find<Q: Ord + ?Sized>(&self, key: &Q) -> (usize, Result<usize, usize>)
    where
        K: Borrow<Q>,
    {
        let at = self.chunk_of(key);
        let found =
            self.chunks.get(at).map_or(Err(0), |chunk| chunk.binary_search_by(|(one, _)| one.borrow().cmp(key)));
        (at, found)
    }

    /// The value of `key`.
    pub fn get<Q: Ord + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        let (chunk, found) = self.find(key);
        self.chunks.get(chunk)?.get(found.ok()?).map(|(_, value)| value)
    }

    /// The value of `key`, to be changed.
    pub fn get_mut<Q: Ord + ?Sized>(&mut self, key: &Q) -> Option<&mut V>
    where
        K: Borrow<Q>,
    {
        let (chunk, found) = self.find(key);
        let place = found.ok()?;
        Arc::make_mut(self.chunks.get_mut(chunk)?).get_mut(place).map(|(_, value)| value)
    }

    /// Whether there is a value of `key`.
    pub fn contains_key<Q: Ord + ?Sized>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        self.find(key).1.is_ok()
    }

    /// The value of `key`, made if it is not there.
    pub fn or_insert_with(&mut self, key: K, new: impl FnOnce() -> V) -> &mut V {
        let (mut at, found) = self.find(&key);
        if self.chunks.is_empty() {
            self.chunks.push(Arc::default());
        }
        let mut place = found.unwrap_or_else(|place| place);
        if found.is_err() {
            let chunk = Arc::make_mut(&mut self.chunks[at]);
            chunk.insert(place, (key, new()));
            if chunk.len() > CHUNK_ENTRIES_MAX {
                let half = chunk.len() / 2;
                let rest = chunk.split_off(half);
                self.chunks.insert(at + 1, Arc::new(rest));
                if place >= half {
                    (at, place) = (at + 1, place - half);
                }
            }
        }
        &mut Arc::make_mut(&mut self.chunks[at])[place].1
    }

    /// Sets the value of `key`.
    pub fn insert(&mut self, key: K, value: V) {
        let mut new = Some(value);
        let slot = self.or_insert_with(key, || new.take().expect("called once"));
        if let Some(value) = new {
            *slot = value;
        }
    }

    /// Takes the value of `key` out.
    pub fn remove<Q: Ord + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        let (at, found) = self.find(key);
        let place = found.ok()?;
        let chunk = Arc::make_mut(self.chunks.get_mut(at)?);
        let (_, value) = chunk.remove(place);
        if chunk.is_empty() {
            self.chunks.remove(at);
        }
        Some(value)
    }

    /// Keeps what `keep` says. A chunk of which all is kept stays shared.
    pub fn retain(&mut self, keep: impl Fn(&K, &V) -> bool) {
        self.chunks.retain_mut(|chunk| {
            if !chunk.iter().all(|(key, value)| keep(key, value)) {
                Arc::make_mut(chunk).retain(|(key, value)| keep(key, value));
            }
            !chunk.is_empty()
        });
    }

    /// Changes the values that `wants` says; chunks without any stay shared.
    pub fn change(&mut self, wants: impl Fn(&V) -> bool, change: impl Fn(&mut V)) {
        for chunk in self.chunks.iter_mut().filter(|chunk| chunk.iter().any(|(_, value)| wants(value))) {
            Arc::make_mut(chunk).iter_mut().map(|(_, value)| value).filter(|value| wants(value)).for_each(&change);
        }
    }

    /// All entries, ascending.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.chunks.iter().flat_map(|chunk| chunk.iter()).map(|(key, value)| (key, value))
    }

    /// All keys, ascending.
    pub fn keys(&self) -> impl Iterator<Item = &K> {
        self.iter().map(|(key, _)| key)
    }

    /// All values, by key.
    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.iter().map(|(_, value)| value)
    }

    /// The entries within `range`, ascending.
    pub fn range(&self, range: RangeInclusive<K>) -> impl Iterator<Item = (&K, &V)> {
        let (first, last) = range.into_inner();
        let chunks = self.chunks.get(self.chunk_of(&first)..).unwrap_or_default();
        let from = chunks.iter().flat_map(|chunk| chunk.iter()).skip_while(move |(key, _)| *key < first);
        from.take_while(move |(key, _)| *key <= last).map(|(key, value)| (key, value))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.len()).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }
}

impl<K: Serialize + Ord + Clone, V: Serialize + Clone> Serialize for CowMap<K, V> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        // Its length first, which postcard needs.
        let mut map = to.serialize_map(Some(self.len()))?;
        for (key, value) in self.iter() {
            serde::ser::SerializeMap::serialize_entry(&mut map, key, value)?;
        }
        serde::ser::SerializeMap::end(map)
    }
}

impl<'de, K: Deserialize<'de> + Ord + Clone, V: Deserialize<'de> + Clone> Deserialize<'de> for CowMap<K, V> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Entries<K, V>(CowMap<K, V>);

        impl<'de, K: Deserialize<'de> + Ord + Clone, V: Deserialize<'de> + Clone> Visitor<'de> for Entries<K, V> {
            type Value = CowMap<K, V>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a map")
            }

            fn visit_map<A: MapAccess<'de>>(mut self, mut from: A) -> Result<Self::Value, A::Error> {
                while let Some((key, value)) = from.next_entry()? {
                    self.0.insert(key, value);
                }
                Ok(self.0)
            }
        }

        from.deserialize_map(Entries(Self::default()))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Step {
        Insert(u16, u8),
        Remove(u16),
        Change(u16),
        Retain(u16),
        All(u8),
    }

    fn any_step() -> impl Strategy<Value = Step> {
        prop_oneof![
            12 => (0..2000u16, any::<u8>()).prop_map(|(key, value)| Step::Insert(key, value)),
            4 => (0..2000u16).prop_map(Step::Remove),
            4 => (0..2000u16).prop_map(Step::Change),
            1 => (2..400u16).prop_map(Step::Retain),
            1 => any::<u8>().prop_map(Step::All),
        ]
    }

    fn same(map: &CowMap<u16, u8>, model: &BTreeMap<u16, u8>) {
        assert!(map.iter().eq(model.iter()));
        assert_eq!((map.len(), map.is_empty()), (model.len(), model.is_empty()));
        assert!(map.chunks.iter().all(|chunk| (1..=CHUNK_ENTRIES_MAX).contains(&chunk.len())));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn it_is_a_sorted_map_and_copies_stay_what_they_were(
            first in proptest::collection::vec((0..2000u16, any::<u8>()), 0..1500),
            steps in proptest::collection::vec(any_step(), 0..200),
        ) {
            let (mut map, mut model) = (CowMap::default(), BTreeMap::new());
            for (key, value) in first {
                map.insert(key, value);
                model.insert(key, value);
            }
            let (copy, was) = (map.clone(), model.clone());
            for step in steps {
                match step {
                    Step::Insert(key, value) => {
                        map.insert(key, value);
                        model.insert(key, value);
                    }
                    Step::Remove(key) => prop_assert_eq!(map.remove(&key), model.remove(&key)),
                    Step::Change(key) => {
                        prop_assert_eq!(map.get(&key), model.get(&key));
                        prop_assert_eq!(map.contains_key(&key), model.contains_key(&key));
                        map.get_mut(&key).into_iter().for_each(|value| *value = value.wrapping_add(1));
                        model.get_mut(&key).into_iter().for_each(|value| *value = value.wrapping_add(1));
                        prop_assert!(map.range(key..=key + 300).eq(model.range(key..=key + 300)));
                    }
                    Step::Retain(part) => {
                        map.retain(|key, _| key % part != 1);
                        model.retain(|key, _| key % part != 1);
                    }
                    Step::All(value) => {
                        map.change(|one| *one == value, |one| *one = 0);
                        model.values_mut().filter(|one| **one == value).for_each(|one| *one = 0);
                    }
                }
            }
            same(&map, &model);
            same(&copy, &was);
            let bytes = postcard::to_stdvec(&map).unwrap();
            prop_assert_eq!(&bytes, &postcard::to_stdvec(&model).unwrap());
            same(&postcard::from_bytes(&bytes).unwrap(), &model);
        }
    }

    #[test]
    fn a_copy_shares_what_is_not_changed() {
        let mut map: CowMap<u32, u32> = CowMap::default();
        (0..10_000).for_each(|n| map.insert(n, n));
        let copy = map.clone();
        *map.get_mut(&5_000).unwrap() = 0;
        map.retain(|key, _| *key != 9_999);
        map.change(|value| *value == 7, |value| *value = 8);
        let shared =
            copy.chunks.iter().filter(|chunk| map.chunks.iter().any(|other| Arc::ptr_eq(chunk, other))).count();
        assert_eq!(shared, copy.chunks.len() - 3);
        assert!(copy.chunks.len() <= 10_000 / (CHUNK_ENTRIES_MAX / 2) + 1);
    }
}
