//! `tributary-cloud`: the command line.
fn main() {}
