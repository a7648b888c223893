//! Both halves against each other: a virtual clock, and a wire that loses, repeats, delays and so reorders.

mod cases;
mod world;
