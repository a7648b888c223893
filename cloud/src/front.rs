//! The Kafka protocol as a view of the log.
