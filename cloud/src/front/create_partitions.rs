//! CreatePartitions.
