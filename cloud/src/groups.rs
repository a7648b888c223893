//! Classic consumer groups: membership in memory, offsets in the log.

/// The groups there are.
pub struct Groups {}
