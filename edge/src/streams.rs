//! Stream rules: which PUBLISH goes to which stream, and what its record looks like.
