//! The block: the unit a shard appends, ships and recovers from.
