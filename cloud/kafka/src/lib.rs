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

pub mod api_versions;

#[cfg(test)]
mod tests;
