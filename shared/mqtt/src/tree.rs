//! Which subscriptions a topic name matches.
//!
//! Filters without wildcards are found by one hash lookup. The others stand in a tree over their levels; levels that no
//! two filters part at are one node, so that a filter costs two nodes at most, however many levels it has. A match follows
//! at most two children per node, the literal one and `+`, and looks for `#` on the way. [`Tree::find`] counts its steps: filters can be
//! chosen such that one name visits very many nodes, and the caller must know.

use std::collections::HashMap;
use std::mem::size_of;

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
    /// The levels between the parent and here, `+` among them, joined by slashes; the root has none.
    label: Box<str>,
    /// The label holds `+`.
    wild: bool,
    /// By the first level of their label, where that is not `+`.
    children: HashMap<Box<str>, Box<Node<K>>>,
    /// The child whose label begins with `+`.
    plus: Option<Box<Node<K>>>,
    /// Subscribers of the filter that ends here.
    here: Subscribers<K>,
    /// Subscribers of the filter that ends here with `/#`.
    hash: Subscribers<K>,
}

/// Bytes that one subscription to a filter of `filter_bytes` costs, at most: two nodes and their places among their
/// parents' children, three times the text (label, key, the session's own), the entries.
pub(crate) fn subscription_cost(filter_bytes: usize) -> usize {
    2 * size_of::<Node<usize>>() + 2 * 160 + 3 * filter_bytes + 2 * size_of::<(usize, Subscription)>() + 64
}

impl<K> Default for Tree<K> {
    fn default() -> Self {
        Self { literal: HashMap::new(), root: Node::new(""), len: 0 }
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
                if list.is_empty() {
                    list.reserve_exact(1); // Most filters have one subscriber.
                }
                list.insert(at, (subscriber, subscription));
                self.len += 1;
                true
            }
        }
    }

    /// Removes a subscription; false if there was none.
    pub fn remove(&mut self, filter: &TopicFilter<'_>, subscriber: &K) -> bool {
        let removed = if filter.has_wildcards() {
            let (levels, hash) = split_hash(filter.as_str());
            self.root.remove(levels, hash, subscriber)
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

    /// Appends every subscription that `topic` matches; a subscriber appears once for each of its filters. Returns the
    /// steps it took: nodes visited and subscriptions found.
    pub fn find(&self, topic: &str, found: &mut Vec<(K, Subscription)>) -> usize {
        let before = found.len();
        if let Some(list) = self.literal.get(topic) {
            found.extend_from_slice(list);
        }
        let mut visited = 1;
        // A wildcard at the front does not match names that begin with `$` (§4.7.2).
        if topic.starts_with('$') {
            if let Some(child) = self.root.children.get(next_level(topic).0) {
                child.find(topic, found, &mut visited);
            }
        } else {
            found.extend_from_slice(&self.root.hash);
            self.root.find_children(topic, found, &mut visited);
        }
        visited + found.len() - before
    }
}

/// The first level, and what follows its slash.
fn next_level(levels: &str) -> (&str, Option<&str>) {
    match levels.split_once('/') {
        Some((first, rest)) => (first, Some(rest)),
        None => (levels, None),
    }
}

/// The levels before a final `#`, and whether there is one; `#` alone has none.
fn split_hash(filter: &str) -> (Option<&str>, bool) {
    match filter.strip_suffix('#') {
        Some("") => (None, true),
        Some(levels) => (Some(levels.strip_suffix('/').unwrap_or(levels)), true),
        None => (Some(filter), false),
    }
}

/// Bytes of the levels that both begin with; 0 if not even the first is the same.
fn common_levels(a: &str, b: &str) -> usize {
    let mut bytes = 0;
    for (i, (one, other)) in a.split('/').zip(b.split('/')).enumerate() {
        if one != other {
            break;
        }
        bytes += one.len() + usize::from(i > 0);
    }
    bytes
}

/// What is left of `levels` behind those that `label` matches: `Some(None)`: nothing, `None`: it does not match.
#[inline]
fn match_label<'a>(label: &str, wild: bool, levels: &'a str) -> Option<Option<&'a str>> {
    if !wild {
        let rest = levels.strip_prefix(label)?;
        return if rest.is_empty() { Some(None) } else { rest.strip_prefix('/').map(Some) };
    }
    let mut rest = Some(levels);
    for want in label.split('/') {
        let (level, after) = next_level(rest?);
        if want != "+" && want != level {
            return None;
        }
        rest = after;
    }
    Some(rest)
}

fn remove_from<K: Ord>(list: &mut Subscribers<K>, subscriber: &K) -> bool {
    match list.binary_search_by(|(k, _)| k.cmp(subscriber)) {
        Ok(at) => {
            list.remove(at);
            if list.len() * 4 < list.capacity() {
                list.shrink_to_fit();
            }
            true
        }
        Err(_) => false,
    }
}

impl<K> Node<K> {
    fn new(label: &str) -> Self {
        Self {
            label: label.into(),
            wild: label.contains('+'),
            children: HashMap::new(),
            plus: None,
            here: Vec::new(),
            hash: Vec::new(),
        }
    }

    fn set_label(&mut self, label: Box<str>) {
        self.wild = label.contains('+');
        self.label = label;
    }

    fn is_empty(&self) -> bool {
        self.children.is_empty() && self.plus.is_none() && self.here.is_empty() && self.hash.is_empty()
    }

    /// Puts a child where its label says.
    fn adopt(&mut self, child: Box<Self>) {
        match next_level(&child.label).0 {
            "+" => self.plus = Some(child),
            first => drop(self.children.insert(first.into(), child)),
        }
    }

    /// The only child, taken out, if there is one and nothing else.
    fn take_only_child(&mut self) -> Option<Box<Self>> {
        if !self.here.is_empty() || !self.hash.is_empty() {
            return None;
        }
        match (self.children.len(), &self.plus) {
            (0, Some(_)) => self.plus.take(),
            (1, None) => self.children.drain().next().map(|(_, child)| child),
            _ => None,
        }
    }
}

impl<K: Ord + Clone> Node<K> {
    fn list_mut(&mut self, filter: &str) -> &mut Subscribers<K> {
        let (mut rest, hash) = split_hash(filter);
        let mut node = self;
        while let Some(levels) = rest {
            let first = next_level(levels).0;
            if first == "+" && node.plus.is_none() || first != "+" && !node.children.contains_key(first) {
                node.adopt(Box::new(Node::new(levels)));
            }
            let child = if first == "+" { node.plus.as_mut() } else { node.children.get_mut(first) };
            let child = child.expect("it is there, or was just made");
            let common = common_levels(&child.label, levels);
            if common < child.label.len() {
                // They part inside the label: what they share becomes a node above.
                let shared = Box::new(Node::new(child.label.get(..common).unwrap_or_default()));
                let mut lower = std::mem::replace(child, shared);
                let label = lower.label.get(common + 1..).unwrap_or_default().into();
                lower.set_label(label);
                child.adopt(lower);
            }
            rest = levels.get(common..).and_then(|rest| rest.strip_prefix('/'));
            node = child;
        }
        if hash { &mut node.hash } else { &mut node.here }
    }

    /// Takes the subscription out and joins or prunes what it leaves behind. Depth is bounded by `TOPIC_LEVELS_MAX`.
    fn remove(&mut self, levels: Option<&str>, hash: bool, subscriber: &K) -> bool {
        let Some(levels) = levels else {
            return remove_from(if hash { &mut self.hash } else { &mut self.here }, subscriber);
        };
        let first = next_level(levels).0;
        let child = if first == "+" { self.plus.as_mut() } else { self.children.get_mut(first) };
        let Some(child) = child else { return false };
        let common = common_levels(&child.label, levels);
        if common < child.label.len() {
            return false;
        }
        let rest = levels.get(common..).and_then(|rest| rest.strip_prefix('/'));
        let removed = child.remove(rest, hash, subscriber);
        if removed && child.is_empty() {
            if first == "+" {
                self.plus = None;
            } else {
                self.children.remove(first);
                if self.children.len() * 4 < self.children.capacity() {
                    self.children.shrink_to_fit();
                }
            }
        } else if removed && let Some(mut lower) = child.take_only_child() {
            let label = format!("{}/{}", child.label, lower.label).into();
            lower.set_label(label);
            *child = lower;
        }
        removed
    }

    /// `levels`: those of the topic that this node's label may match.
    fn find(&self, levels: &str, found: &mut Vec<(K, Subscription)>, visited: &mut usize) {
        *visited += 1;
        let Some(rest) = match_label(&self.label, self.wild, levels) else { return };
        found.extend_from_slice(&self.hash);
        match rest {
            None => found.extend_from_slice(&self.here),
            Some(rest) => self.find_children(rest, found, visited),
        }
    }

    fn find_children(&self, levels: &str, found: &mut Vec<(K, Subscription)>, visited: &mut usize) {
        if !self.children.is_empty()
            && let Some(child) = self.children.get(next_level(levels).0)
        {
            child.find(levels, found, visited);
        }
        if let Some(child) = &self.plus {
            child.find(levels, found, visited);
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
                let steps = tree.find(&topic, &mut found);
                prop_assert!(steps > found.len());
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

    fn nodes<K>(node: &Node<K>) -> usize {
        1 + node.children.values().chain(&node.plus).map(|child| nodes(child)).sum::<usize>()
    }

    #[test]
    fn a_filter_costs_two_nodes_however_many_levels_it_has() {
        let mut tree = Tree::default();
        let filter = |i: usize| format!("{i:03}/{}", ["x/+/y"; 33].join("/"));
        for i in 0..500 {
            // Pairs that part at their last level.
            for last in ["a", "b"] {
                let text = format!("{}/{last}", filter(i));
                tree.insert(&TopicFilter::parse(&text).unwrap(), 1, Subscription::default());
            }
        }
        assert!(nodes(&tree.root) <= 1 + 2 * tree.len(), "{} nodes for {} filters", nodes(&tree.root), tree.len());
        for i in 0..500 {
            assert!(tree.remove(&TopicFilter::parse(&format!("{}/a", filter(i))).unwrap(), &1));
        }
        assert_eq!(nodes(&tree.root), 501, "a pair's node is joined again with what is left of the pair");
        let mut found = Vec::new();
        let topic = format!("{}/b", filter(7).replace('+', "any"));
        assert_eq!((tree.find(&topic, &mut found), found.len()), (3, 1));
    }

    #[test]
    fn the_steps_of_a_match_are_counted() {
        let mut tree = Tree::default();
        for bits in 0..1024u32 {
            let levels: Vec<_> = (0..10).map(|i| if bits >> i & 1 == 1 { "+" } else { "a" }).collect();
            // It turns out only at the end that none of these matches.
            let text = format!("{}/z/#", levels.join("/"));
            tree.insert(&TopicFilter::parse(&text).unwrap(), 1, Subscription::default());
        }
        let mut found = Vec::new();
        let steps = tree.find(&["a"; 11].join("/"), &mut found);
        assert!(found.is_empty());
        assert!((1024..4096).contains(&steps), "{steps}");
    }
}
