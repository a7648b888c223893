//! Classic consumer groups: membership in memory, offsets in the log.
