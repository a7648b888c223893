//! LeaveGroup.
