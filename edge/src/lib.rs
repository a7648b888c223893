//! The gateway broker: stores what devices publish over MQTT and forwards it, exactly once, when there is a network.

pub mod admin;
pub mod config;
pub mod redb_log;
pub mod retention;
pub mod salvage;
pub mod sessions;
pub mod store;
pub mod streams;
pub mod uplink;
