//! Kafka protocol.
