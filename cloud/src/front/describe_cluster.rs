//! DescribeCluster.
