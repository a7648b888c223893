//! Settings of the cloud broker.
