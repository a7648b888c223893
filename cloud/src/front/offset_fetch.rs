//! OffsetFetch.
