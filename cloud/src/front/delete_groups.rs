//! DeleteGroups.
