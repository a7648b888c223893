//! A map by partition that is fast to look into: every batch is looked up several times on its way.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use shared::name::Partition;

/// A map by partition. Its order is the same in every run, and says nothing.
pub type PartitionMap<T> = HashMap<Partition, T, BuildHasherDefault<PartitionHasher>>;

/// Hashes partitions that exist: their ids are random numbers of our own and no peer chooses them, so that
/// nothing keyed is needed to spread them.
#[derive(Debug, Default, Clone, Copy)]
pub struct PartitionHasher(u64);

impl Hasher for PartitionHasher {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u32(&mut self, word: u32) {
        self.write_u64(u64::from(word));
    }

    fn write_u64(&mut self, word: u64) {
        /// Odd, and its bits without a pattern: 2^64 divided by the golden ratio.
        const SPREAD: u128 = 0x9e37_79b9_7f4a_7c15;
        let product = u128::from(self.0.rotate_left(23) ^ word) * SPREAD;
        self.0 = product as u64 ^ (product >> 64) as u64;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::hash::BuildHasher as _;

    use shared::name::TopicId;

    use super::*;

    #[test]
    fn partitions_and_topics_are_spread() {
        let hasher = BuildHasherDefault::<PartitionHasher>::default();
        let topics = (0..=255).map(|byte| TopicId([byte; 16]));
        let partitions = topics.flat_map(|topic| (0..256).map(move |index| Partition { topic, index }));
        let hashes: Vec<u64> = partitions.map(|partition| hasher.hash_one(partition)).collect();
        let distinct = |part: &dyn Fn(u64) -> u64| hashes.iter().map(|hash| part(*hash)).collect::<HashSet<_>>().len();
        assert_eq!(distinct(&|hash| hash), 65_536);
        // A table goes by the lowest bits and by the highest seven. Chance alone leaves 41,400 of 65,536.
        assert!(distinct(&|hash| hash & 0xffff) > 40_000);
        assert_eq!(distinct(&|hash| hash >> 57), 128);
    }
}
