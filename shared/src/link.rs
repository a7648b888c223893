//! The edge-to-cloud protocol: messages and both halves as pure state machines.
