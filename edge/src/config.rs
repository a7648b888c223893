//! Settings of the edge broker.
