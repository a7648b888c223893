//! Topics, their ids, settings and partitions.
