//! What rests in object storage: shipping of WAL blocks, splitting into segments, restore.
