//! The edge's half.
