//! Topics, their ids, settings and partitions.

/// The topics there are.
pub struct Catalogue {}
