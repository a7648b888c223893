//! The manifest: a small root and immutable pages that name every archived object.
