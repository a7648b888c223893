//! The cloud broker: receives edges' streams, serves them to Kafka clients, archives them to object storage.

pub mod admin;
pub mod archive;
pub mod block;
mod buffers;
pub mod catalogue;
pub mod config;
pub mod envelope;
pub mod front;
pub mod groups;
pub mod ingest;
pub mod manifest;
mod planted;
pub mod salvage;
pub mod segment;
pub mod shard;
pub mod shards;
#[cfg(test)]
mod sim;
pub mod state;
pub mod wal;
