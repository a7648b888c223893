//! Bounds that both brokers and the link between them agree on.

/// Largest batch, in bytes as stored, that the cloud takes by default (Kafka's `message.max.bytes`, 1 MiB + 12).
pub const BATCH_BYTES_MAX: usize = 1_048_588;

/// Most bytes a batch's records may unpack to before we stop reading them.
pub const BATCH_UNPACKED_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Largest body of one link append request.
pub const LINK_BODY_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Longest long poll on the link, seconds: below what proxies cut (30 s and up).
pub const LINK_POLL_SECS_MAX: u64 = 25;
