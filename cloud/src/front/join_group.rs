//! JoinGroup.
