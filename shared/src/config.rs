//! Layered settings: defaults, file, environment, flags; every value knows its origin.
