//! DescribeGroups.
