//! What a shard's blocks say besides data: topics, offsets of groups, positions of edges.
