//! OffsetDelete.
