//! Segments: runs of one partition's batches with a sparse index.
