//! The Kafka protocol on the wire: requests, responses, headers and error codes.
//!
//! Pure: bytes in, values out, and back. It knows no socket, no log and no policy; which versions a broker *offers* is
//! the front's decision, this crate only says which it can read and write ([`Message::VERSIONS`]).
//!
//! Each API has its file, where requests and responses are declared in the notation of [`codec`]: one line per field
//! with the versions that carry it. Field names are those of Kafka's protocol guide.

#[macro_use]
pub mod codec;
pub mod error;
pub mod header;

pub use codec::{Encoded, Field, Message, Reader, Records, Uuid, WireError, Writer};
pub use error::ErrorCode;
pub use header::{ApiKey, RequestHeader};

pub mod alter_configs;
pub mod api_versions;
pub mod create_partitions;
pub mod create_topics;
pub mod delete_groups;
pub mod delete_records;
pub mod delete_topics;
pub mod describe_cluster;
pub mod describe_configs;
pub mod describe_groups;
pub mod fetch;
pub mod find_coordinator;
pub mod heartbeat;
pub mod incremental_alter_configs;
pub mod init_producer_id;
pub mod join_group;
pub mod leave_group;
pub mod list_groups;
pub mod list_offsets;
pub mod metadata;
pub mod offset_commit;
pub mod offset_delete;
pub mod offset_fetch;
pub mod offset_for_leader_epoch;
pub mod produce;
pub mod sync_group;

#[cfg(test)]
mod tests;
