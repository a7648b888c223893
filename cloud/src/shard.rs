//! The shard: one ordered sequence of blocks, its partitions and the state that changes with them.
