//! The words both Tributary brokers use. Pure: bytes in, bytes out, `now` passed in; no sockets, threads or clocks.

pub mod batch;
pub mod block_on;
pub mod clock;
pub mod config;
pub mod door;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod histogram;
pub mod limits;
pub mod line_limit;
pub mod link;
pub mod log;
pub mod login;
pub mod name;
