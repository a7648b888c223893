//! SyncGroup.
