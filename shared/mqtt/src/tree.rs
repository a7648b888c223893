//! Which subscriptions a topic name matches.
//!
//! Filters without wildcards are found by one hash lookup. The others stand in a tree with one node per level; a match
//! follows at most two children per level, the literal one and `+`, and looks for `#` on the way.

use std::collections::HashMap;

use crate::codec::SubscribeOptions;
use crate::topic::TopicFilter;

/// One subscription to one filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Subscription {
    /// QoS and the rest of the options byte.
    pub options: SubscribeOptions,
    /// MQTT 5 subscription identifier.
    pub identifier: Option<u32>,
}

/// Subscriptions by filter. `K` names the subscriber.
#[derive(Debug)]
pub struct Tree<K> {
    literal: HashMap<Box<str>, Subscribers<K>>,
    root: Node<K>,
    len: usize,
}

/// Sorted by subscriber: thousands may share a filter, and each comes and goes.
type Subscribers<K> = Vec<(K, Subscription)>;

#[derive(Debug)]
struct Node<K> {
    children: HashMap<Box<str>, Node<K>>,
    plus: Option<Box<Node<K>>>,
    /// Subscribers of the filter that ends here.
    here: Subscribers<K>,
    /// Subscribers of the filter that ends here with `/#`.
    hash: Subscribers<K>,
}

impl<K> Default for Tree<K> {
    fn default() -> Self {
        Self { literal: HashMap::new(), root: Node::default(), len: 0 }
    }
}

impl<K> Default for Node<K> {
    fn default() -> Self {
        Self { children: HashMap::new(), plus: None, here: Vec::new(), hash: Vec::new() }
    }
}

impl<K: Ord + Clone> Tree<K> {
    /// How many subscriptions there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds a subscription, or replaces the subscriber's one to the same filter; true if it is new.
    pub fn insert(&mut self, filter: &TopicFilter<'_>, subscriber: K, subscription: Subscription) -> bool {
        let list = if filter.has_wildcards() {
            self.root.list_mut(filter.as_str())
        } else if self.literal.contains_key(filter.as_str()) {
            self.literal.get_mut(filter.as_str()).expect("contains_key said so")
        } else {
            self.literal.entry(filter.as_str().into()).or_default()
        };
        match list.binary_search_by(|(k, _)| k.cmp(&subscriber)) {
            Ok(at) => {
                list[at].1 = subscription;
                false
            }
            Err(at) => {
                list.insert(at, (subscriber, subscription));
                self.len += 1;
                true
            }
        }
    }

    /// Removes a subscription; false if there was none.
    pub fn remove(&mut self, filter: &TopicFilter<'_>, subscriber: &K) -> bool {
        let removed = if filter.has_wildcards() {
            self.root.remove(filter.as_str(), subscriber)
        } else if let Some(list) = self.literal.get_mut(filter.as_str()) {
            let removed = remove_from(list, subscriber);
            if list.is_empty() {
                self.literal.remove(filter.as_str());
            }
            removed
        } else {
            false
        };
        self.len -= usize::from(removed);
        removed
    }

    /// Appends every subscription that `topic` matches. A subscriber appears once for each of its filters.
    pub fn find(&self, topic: &str, found: &mut Vec<(K, Subscription)>) {
        if let Some(list) = self.literal.get(topic) {
            found.extend_from_slice(list);
        }
        // A wildcard at the front does not match names that begin with `$` (§4.7.2).
        if topic.starts_with('$') {
            let (first, rest) = next_level(topic);
            if let Some(child) = self.root.children.get(first) {
                child.find(rest, found);
            }
        } else {
            self.root.find(Some(topic), found);
        }
    }
}

/// The first level, and what follows its slash.
fn next_level(levels: &str) -> (&str, Option<&str>) {
    match levels.split_once('/') {
        Some((first, rest)) => (first, Some(rest)),
        None => (levels, None),
    }
}

fn remove_from<K: Ord>(list: &mut Subscribers<K>, subscriber: &K) -> bool {
    match list.binary_search_by(|(k, _)| k.cmp(subscriber)) {
        Ok(at) => {
            list.remove(at);
            if list.capacity() > 8 && list.len() * 4 < list.capacity() {
                list.shrink_to_fit();
            }
            true
        }
        Err(_) => false,
    }
}

impl<K: Ord + Clone> Node<K> {
    fn is_empty(&self) -> bool {
        self.children.is_empty() && self.plus.is_none() && self.here.is_empty() && self.hash.is_empty()
    }

    fn list_mut(&mut self, filter: &str) -> &mut Subscribers<K> {
        let mut node = self;
        for level in filter.split('/') {
            match level {
                "#" => return &mut node.hash,
                "+" => node = node.plus.get_or_insert_default(),
                level => node = node.children.entry(level.into()).or_default(),
            }
        }
        &mut node.here
    }

    /// Takes the subscription out and prunes what became empty. Depth is bounded by `TOPIC_LEVELS_MAX`.
    fn remove(&mut self, filter: &str, subscriber: &K) -> bool {
        let (level, rest) = next_level(filter);
        if level == "#" {
            return remove_from(&mut self.hash, subscriber);
        }
        let child = if level == "+" { self.plus.as_deref_mut() } else { self.children.get_mut(level) };
        let Some(child) = child else { return false };
        let removed = match rest {
            Some(rest) => child.remove(rest, subscriber),
            None => remove_from(&mut child.here, subscriber),
        };
        if removed && child.is_empty() {
            if level == "+" {
                self.plus = None;
            } else {
                self.children.remove(level);
            }
        }
        removed
    }

    /// `levels` is what is left of the topic, `None` past its last level.
    fn find(&self, levels: Option<&str>, found: &mut Vec<(K, Subscription)>) {
        found.extend_from_slice(&self.hash);
        let Some(levels) = levels else {
            found.extend_from_slice(&self.here);
            return;
        };
        if self.children.is_empty() && self.plus.is_none() {
            return;
        }
        let (level, rest) = next_level(levels);
        if let Some(child) = self.children.get(level) {
            child.find(rest, found);
        }
        if let Some(child) = &self.plus {
            child.find(rest, found);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn level() -> impl Strategy<Value = &'static str> {
        prop::sample::select(vec!["a", "b", "", "$s", "+"])
    }

    fn filter() -> impl Strategy<Value = String> {
        (prop::collection::vec(level(), 1..4), any::<bool>()).prop_filter_map("not empty", |(mut levels, hash)| {
            if hash {
                levels.push("#");
            }
            Some(levels.join("/")).filter(|f| !f.is_empty())
        })
    }

    proptest! {
        /// The tree finds what comparing each filter finds, also after removals, and keeps nothing of what was removed.
        #[test]
        fn the_tree_agrees_with_comparing_each_filter(
            filters in prop::collection::vec((filter(), 0u32..3, any::<bool>()), 0..30),
            topics in prop::collection::vec(prop::collection::vec(prop::sample::select(vec!["a", "b", "", "$s"]), 1..5), 1..8),
        ) {
            let mut tree = Tree::default();
            for (filter, subscriber, _) in &filters {
                tree.insert(&TopicFilter::parse(filter).unwrap(), *subscriber, Subscription::default());
            }
            let mut left: Vec<_> = filters.iter().map(|(f, s, _)| (f.clone(), *s)).collect();
            left.sort();
            left.dedup();
            for (filter, subscriber, _) in filters.iter().filter(|(.., remove)| *remove) {
                let expected = left.iter().position(|l| (&l.0, l.1) == (filter, *subscriber)).map(|at| left.remove(at));
                prop_assert_eq!(tree.remove(&TopicFilter::parse(filter).unwrap(), subscriber), expected.is_some());
            }
            prop_assert_eq!(tree.len(), left.len());
            for topic in topics.iter().map(|t| t.join("/")).filter(|t| !t.is_empty()) {
                let mut found = Vec::new();
                tree.find(&topic, &mut found);
                let mut found: Vec<u32> = found.into_iter().map(|(k, _)| k).collect();
                found.sort();
                let mut expected: Vec<u32> =
                    left.iter().filter(|(f, _)| TopicFilter::parse(f).unwrap().matches(&topic)).map(|(_, s)| *s).collect();
                expected.sort();
                prop_assert_eq!(found, expected, "{}", topic);
            }
            for (filter, subscriber) in left {
                tree.remove(&TopicFilter::parse(&filter).unwrap(), &subscriber);
            }
            prop_assert!(tree.is_empty() && tree.literal.is_empty() && tree.root.is_empty());
        }
    }
}
