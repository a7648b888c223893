//! What an MQTT session decides, without sockets, locks or clocks: who may connect and on which terms ([`connect`]),
//! the order of the answers to a publisher ([`inbound`]), and the window and queue towards a subscriber ([`outbound`]).

pub(crate) mod connect;
pub(crate) mod inbound;
pub(crate) mod outbound;
