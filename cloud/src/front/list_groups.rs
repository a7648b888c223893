//! ListGroups.
