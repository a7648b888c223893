//! Streams in redb: group commit, rows, recovery.
