//! The retained message of each topic (MQTT 5 §3.3.1.3), in memory. [`crate::store::Store`] keeps the durable copy.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use crate::message::Message;
use crate::topic::TopicFilter;

/// Retained messages by topic, bounded in number and bytes.
#[derive(Debug, Default)]
pub(crate) struct Retained {
    by_topic: BTreeMap<Box<str>, Arc<Message>>,
    bytes: usize,
}

impl Retained {
    pub fn len(&self) -> usize {
        self.by_topic.len()
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether a message of `bytes` for `topic` stays within the bounds.
    pub fn has_room(&self, topic: &str, bytes: usize, messages_max: usize, bytes_max: usize) -> bool {
        let old = self.by_topic.get(topic);
        let messages = self.by_topic.len() + usize::from(old.is_none());
        let old_bytes = old.map_or(0, |message| message.cost());
        messages <= messages_max && self.bytes - old_bytes + bytes <= bytes_max
    }

    pub fn set(&mut self, topic: &str, message: Arc<Message>) {
        self.bytes += message.cost();
        let old = match self.by_topic.get_mut(topic) {
            Some(slot) => Some(std::mem::replace(slot, message)),
            None => self.by_topic.insert(topic.into(), message),
        };
        self.bytes -= old.map_or(0, |old| old.cost());
    }

    /// Whether it is still its topic's retained message.
    pub fn is_current(&self, message: &Arc<Message>) -> bool {
        std::str::from_utf8(message.content().topic)
            .is_ok_and(|topic| self.by_topic.get(topic).is_some_and(|current| Arc::ptr_eq(current, message)))
    }

    pub fn remove(&mut self, topic: &str) {
        if let Some(old) = self.by_topic.remove(topic) {
            self.bytes -= old.cost();
        }
    }

    /// The messages a new subscription gets, expired ones left out.
    pub fn find(&self, filter: &TopicFilter<'_>, now_ms: i64) -> Vec<Arc<Message>> {
        let fresh = |message: &Arc<Message>| message.expiry_left(now_ms).is_ok();
        if !filter.has_wildcards() {
            return self.by_topic.get(filter.as_str()).filter(|m| fresh(m)).cloned().into_iter().collect();
        }
        // Only names that begin as the filter does before its first wildcard; "a/#" also matches "a".
        let literal = filter.as_str().split(['+', '#']).next().unwrap_or_default();
        let prefix = literal.strip_suffix('/').unwrap_or(literal);
        self.by_topic
            .range::<str, _>((Bound::Included(prefix), Bound::Unbounded))
            .take_while(|(topic, _)| topic.starts_with(prefix))
            .filter(|(topic, message)| filter.matches(topic) && fresh(message))
            .map(|(_, message)| message.clone())
            .collect()
    }

    /// Drops what has expired, and tells its topics.
    pub fn expire(&mut self, now_ms: i64, mut gone: impl FnMut(&str)) {
        let bytes = &mut self.bytes;
        self.by_topic.retain(|topic, message| {
            let fresh = message.expiry_left(now_ms).is_ok();
            if !fresh {
                *bytes -= message.cost();
                gone(topic);
            }
            fresh
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::QoS;
    use crate::message::Content;

    fn message(topic: &str) -> Arc<Message> {
        let content = Content { topic: topic.as_bytes(), properties: &[], expiry_at: None, payload: b"x" };
        Arc::new(Message::new(&content, None, QoS::AtMostOnce, 0))
    }

    #[test]
    fn a_filter_finds_the_topics_it_matches() {
        let mut retained = Retained::default();
        for topic in ["a", "a/b", "a/b/c", "a-b", "b/b", "$SYS/x"] {
            retained.set(topic, message(topic));
        }
        for (filter, expected) in [
            ("a/#", vec!["a", "a/b", "a/b/c"]),
            ("a/+", vec!["a/b"]),
            ("+/b", vec!["a/b", "b/b"]),
            ("#", vec!["a", "a-b", "a/b", "a/b/c", "b/b"]),
            ("$SYS/#", vec!["$SYS/x"]),
            ("a", vec!["a"]),
        ] {
            let filter = TopicFilter::parse(filter).unwrap();
            let found: Vec<_> = retained
                .find(&filter, 0)
                .iter()
                .map(|m| String::from_utf8_lossy(m.content().topic).into_owned())
                .collect();
            assert_eq!(found, expected, "{filter:?}");
        }
        let bytes = retained.bytes();
        retained.set("a", message("a"));
        assert_eq!(retained.bytes(), bytes);
        assert!(retained.has_room("a", 1, 6, usize::MAX) && !retained.has_room("new", 1, 6, usize::MAX));
        for topic in ["a", "a/b", "a/b/c", "a-b", "b/b", "$SYS/x"] {
            retained.remove(topic);
        }
        assert_eq!((retained.len(), retained.bytes()), (0, 0));
    }
}
