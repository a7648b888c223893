//! MQTT 3.1.1 and 5: packet codec, session state, and the front both brokers run.

pub mod codec;
pub mod front;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod memory;
mod message;
mod retained;
mod session;
pub mod store;
pub mod topic;
pub mod tree;
