//! The cloud's half.
