//! OffsetCommit.
