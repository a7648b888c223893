//! DeleteRecords.
