//! DeleteTopics.
