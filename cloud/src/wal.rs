//! The block log: where a shard's blocks become durable.
