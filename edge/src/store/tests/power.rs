//! Doubles of the disk.
