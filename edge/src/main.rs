//! `tributary-edge`: the command line.
fn main() {}
