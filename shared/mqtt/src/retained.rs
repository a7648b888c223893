//! The retained message of each topic (MQTT 5 §3.3.1.3), in memory. [`crate::store::Store`] keeps the durable copy.
//!
//! Topics are in the order of their levels, so that all below one level stand together, and a search steps over those
//! that cannot match. A search is a [`RetainedCursor`]: it goes a few steps at a time, needs the lock for these only, and
//! is good whatever changed in between.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use crate::message::Message;
use crate::topic::TopicFilter;

/// Retained messages by topic, bounded in number and bytes.
#[derive(Debug, Default)]
pub(crate) struct Retained {
    by_topic: BTreeMap<Box<[u8]>, RetainedMessage>,
    bytes: usize,
    /// How many were set since the start.
    newest: u64,
    /// Where [`Self::expire`] goes on.
    sweep: RetainedCursor,
}

#[derive(Debug)]
struct RetainedMessage {
    number: u64,
    message: Arc<Message>,
}

/// Where a search is: the least key it has not passed. A key is a topic with 0 for each `/`: no topic holds a 0, and no
/// byte of a level is less, so that keys are in the order of their levels.
#[derive(Debug, Default)]
pub(crate) struct RetainedCursor {
    at: Vec<u8>,
}

/// What [`Retained::next`] came to.
#[derive(Debug)]
pub(crate) enum RetainedStep {
    /// A message for the subscription; the cursor stays at it until [`RetainedCursor::pass`].
    Found(Arc<Message>),
    /// The steps are used up.
    Paused,
    /// There is no more.
    Finished,
}

impl RetainedCursor {
    /// Goes on behind what was found.
    pub fn pass(&mut self) {
        self.at.push(0); // The least key above.
    }
}

/// What else a retained message costs than its [`Message`]: its key and entry.
fn entry_cost(key: &[u8], message: &Message) -> usize {
    message.cost() + key.len() + 64
}

fn key(topic: &str) -> Vec<u8> {
    let mut key = topic.as_bytes().to_vec();
    key.iter_mut().filter(|byte| **byte == b'/').for_each(|byte| *byte = 0);
    key
}

impl Retained {
    pub fn len(&self) -> usize {
        self.by_topic.len()
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The number of the newest message. What a subscription gets of those with greater ones comes live.
    pub fn newest(&self) -> u64 {
        self.newest
    }

    /// Whether a message of `bytes` for `topic` stays within the bounds.
    pub fn has_room(&self, topic: &str, bytes: usize, messages_max: usize, bytes_max: usize) -> bool {
        let key = key(topic);
        let old = self.by_topic.get(&*key);
        let messages = self.by_topic.len() + usize::from(old.is_none());
        let old_bytes = old.map_or(0, |old| entry_cost(&key, &old.message));
        messages <= messages_max && self.bytes - old_bytes + bytes + key.len() <= bytes_max
    }

    pub fn set(&mut self, topic: &str, message: Arc<Message>) {
        let key = key(topic).into_boxed_slice();
        self.bytes += entry_cost(&key, &message);
        self.newest += 1;
        let new = RetainedMessage { number: self.newest, message };
        match self.by_topic.get_mut(&key) {
            Some(slot) => self.bytes -= entry_cost(&key, &std::mem::replace(slot, new).message),
            None => drop(self.by_topic.insert(key, new)),
        }
    }

    pub fn remove(&mut self, topic: &str) {
        self.remove_key(&key(topic));
    }

    fn remove_key(&mut self, key: &[u8]) {
        if let Some(old) = self.by_topic.remove(key) {
            self.bytes -= entry_cost(key, &old.message);
        }
    }

    /// The next message for a subscription to `filter` that was made when `upto` was the newest: not expired, and not
    /// replaced since. `steps` counts down by one for each topic looked at.
    pub fn next(
        &self,
        filter: &TopicFilter<'_>,
        upto: u64,
        now_ms: i64,
        cursor: &mut RetainedCursor,
        steps: &mut usize,
    ) -> RetainedStep {
        loop {
            let range = (Bound::Included(&*cursor.at), Bound::Unbounded);
            let Some((key, retained)) = self.by_topic.range::<[u8], _>(range).next() else {
                return RetainedStep::Finished;
            };
            let Some(left) = steps.checked_sub(1) else { return RetainedStep::Paused };
            *steps = left;
            let at = &mut cursor.at;
            match place(filter.as_str(), key) {
                Place::Match => {
                    at.clear();
                    at.extend_from_slice(key);
                    if retained.number <= upto && retained.message.expiry_left(now_ms).is_ok() {
                        return RetainedStep::Found(retained.message.clone());
                    }
                    cursor.pass();
                }
                Place::Next => {
                    at.clear();
                    at.extend_from_slice(key);
                    cursor.pass();
                }
                Place::Seek { keep, then } => {
                    at.clear();
                    at.extend_from_slice(key.get(..keep).unwrap_or_default());
                    at.extend_from_slice(then);
                }
                Place::End => return RetainedStep::Finished,
            }
        }
    }

    /// Drops what has expired among the next `steps` messages, and tells its topics. Once around takes as many calls as
    /// needed.
    pub fn expire(&mut self, now_ms: i64, steps: usize, mut gone: impl FnMut(&str)) {
        let mut expired = Vec::new();
        let mut last = None;
        let range = (Bound::Included(&*self.sweep.at), Bound::Unbounded);
        for (key, retained) in self.by_topic.range::<[u8], _>(range).take(steps) {
            if retained.message.expiry_left(now_ms).is_err() {
                expired.push((key.clone(), retained.message.clone()));
            }
            last = Some(key);
        }
        let at = last.map_or(Vec::new(), |key| key.to_vec());
        self.sweep = RetainedCursor { at };
        if last.is_some() {
            self.sweep.pass();
        }
        for (key, message) in expired {
            self.remove_key(&key);
            gone(std::str::from_utf8(message.content().topic).unwrap_or_default());
        }
    }
}

/// What a key means for the search of a filter.
#[derive(Debug, PartialEq, Eq)]
enum Place<'a> {
    Match,
    /// No match; the very next may be one.
    Next,
    /// No match below this: the first `keep` bytes of the key, and `then`.
    Seek {
        keep: usize,
        then: &'a [u8],
    },
    /// No match in what follows either.
    End,
}

/// Compares level by level.
fn place<'a>(filter: &'a str, key: &[u8]) -> Place<'a> {
    // A wildcard at the front does not match names that begin with `$` (§4.7.2).
    if key.first() == Some(&b'$') && filter.starts_with(['+', '#']) {
        return Place::Seek { keep: 0, then: b"%" };
    }
    let mut levels = key.split(|byte| *byte == 0);
    // Where the key's level ends; where the one under the last `+` does.
    let mut end = 0;
    let mut plus = None;
    let past = |plus: Option<usize>| plus.map_or(Place::End, |keep| Place::Seek { keep, then: &[1] });
    for (i, want) in filter.split('/').enumerate() {
        if want == "#" {
            return Place::Match; // Also the parent level: "sport/#" matches "sport".
        }
        let Some(level) = levels.next() else { return Place::Next };
        let start = if i == 0 { 0 } else { end + 1 };
        end = start + level.len();
        if want == "+" {
            plus = Some(end);
            continue;
        }
        match level.cmp(want.as_bytes()) {
            Ordering::Equal => {}
            Ordering::Less => return Place::Seek { keep: start, then: want.as_bytes() },
            Ordering::Greater => return past(plus),
        }
    }
    match levels.next() {
        None => Place::Match,
        // Deeper than the filter: so is all that begins with these levels.
        Some(_) => Place::Seek { keep: end, then: &[1] },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::QoS;
    use crate::message::Content;
    use proptest::prelude::*;

    fn message(topic: &str, expiry_secs: Option<u32>) -> Arc<Message> {
        let content = Content { topic: topic.as_bytes(), properties: &[], expiry_at: None, payload: b"x" };
        Arc::new(Message::new(&content, expiry_secs, QoS::AtMostOnce, 0))
    }

    fn topic(message: &Message) -> String {
        String::from_utf8_lossy(message.content().topic).into_owned()
    }

    /// All a filter finds, some steps at a time, and how many steps it took.
    fn find(retained: &Retained, filter: &str) -> (Vec<String>, usize) {
        let filter = TopicFilter::parse(filter).unwrap();
        let (mut cursor, mut found, mut taken) = (RetainedCursor::default(), vec![], 0);
        loop {
            let mut steps = 3;
            let step = retained.next(&filter, u64::MAX, 0, &mut cursor, &mut steps);
            taken += 3 - steps;
            match step {
                RetainedStep::Found(message) => {
                    found.push(topic(&message));
                    cursor.pass();
                }
                RetainedStep::Paused => assert_eq!(steps, 0),
                RetainedStep::Finished => return (found, taken),
            }
        }
    }

    #[test]
    fn a_filter_finds_the_topics_it_matches() {
        let mut retained = Retained::default();
        let topics = ["a", "a/b", "a/b/c", "a-b", "b/b", "$SYS/x"];
        for topic in topics {
            retained.set(topic, message(topic, None));
        }
        for (filter, expected) in [
            ("a/#", vec!["a", "a/b", "a/b/c"]),
            ("a/+", vec!["a/b"]),
            ("+/b", vec!["a/b", "b/b"]),
            ("#", vec!["a", "a/b", "a/b/c", "a-b", "b/b"]),
            ("$SYS/#", vec!["$SYS/x"]),
            ("a", vec!["a"]),
        ] {
            assert_eq!(find(&retained, filter).0, expected, "{filter:?}");
        }
        let bytes = retained.bytes();
        retained.set("a", message("a", None));
        assert_eq!(retained.bytes(), bytes);
        assert!(retained.has_room("a", 1, 6, usize::MAX) && !retained.has_room("new", 1, 6, usize::MAX));
        topics.iter().for_each(|topic| retained.remove(topic));
        assert_eq!((retained.len(), retained.bytes()), (0, 0));
    }

    #[test]
    fn a_search_steps_over_what_cannot_match() {
        let mut retained = Retained::default();
        for i in 0..100 {
            for j in 0..100 {
                let topic = format!("d{i:02}/m/{j:02}");
                retained.set(&topic, message(&topic, None));
            }
        }
        for (filter, found, steps) in [
            ("+/x", 0, 200),
            ("d07/m/33", 1, 4),
            ("d07/#", 100, 102),
            ("+/+/50", 100, 400),
            ("z/#", 0, 2),
            ("+", 0, 200),
        ] {
            let (topics, taken) = find(&retained, filter);
            assert_eq!(topics.len(), found, "{filter}");
            assert!(taken <= steps, "{filter}: {taken} steps");
        }
    }

    #[test]
    fn what_was_replaced_is_left_to_the_live_message_and_a_cursor_survives_changes() {
        let mut retained = Retained::default();
        for topic in ["a", "b", "c", "d"] {
            retained.set(topic, message(topic, None));
        }
        let (upto, filter) = (retained.newest(), TopicFilter::parse("#").unwrap());
        let (mut cursor, mut steps) = (RetainedCursor::default(), 100);
        let mut next = |retained: &Retained, pass: bool| {
            let step = retained.next(&filter, upto, 0, &mut cursor, &mut steps);
            if pass {
                cursor.pass();
            }
            match step {
                RetainedStep::Found(message) => topic(&message),
                other => format!("{other:?}"),
            }
        };
        assert_eq!(next(&retained, true), "a");
        assert_eq!(next(&retained, false), "b", "not passed: it could not be sent");
        retained.remove("b");
        retained.set("c", message("c", None));
        retained.set("aa", message("aa", None));
        assert_eq!(next(&retained, true), "d");
        assert_eq!(next(&retained, true), "Finished");
    }

    #[test]
    fn expired_messages_are_swept_some_at_a_time() {
        let mut retained = Retained::default();
        for i in 0..100 {
            let topic = format!("t/{i}");
            retained.set(&topic, message(&topic, (i % 2 == 0).then_some(1)));
        }
        for _ in 0..5 {
            let before = retained.len();
            retained.expire(5_000, 20, |_| {});
            assert!(before - retained.len() <= 20);
        }
        assert_eq!(retained.len(), 50);
        retained.expire(5_000, 20, |_| {});
        retained.expire(5_000, 2000, |_| {});
        assert_eq!(retained.len(), 50);
    }

    proptest! {
        #[test]
        fn the_search_agrees_with_comparing_each_topic(
            topics in prop::collection::vec(prop::collection::vec(prop::sample::select(vec!["a", "b", "", "$s", "a-", "ab"]), 1..5), 0..40),
            filter in prop::collection::vec(prop::sample::select(vec!["a", "b", "", "$s", "ab", "+", "+"]), 1..5),
            hash in any::<bool>(),
        ) {
            let mut filter = filter.join("/");
            if hash {
                filter.push_str("/#");
            }
            let mut retained = Retained::default();
            let mut topics: Vec<_> = topics.iter().map(|t| t.join("/")).filter(|t| !t.is_empty()).collect();
            topics.iter().for_each(|topic| retained.set(topic, message(topic, None)));
            if let Ok(parsed) = TopicFilter::parse(&filter) {
                let (mut found, steps) = find(&retained, &filter);
                prop_assert!(steps <= 2 * topics.len() + 1);
                topics.retain(|topic| parsed.matches(topic));
                topics.sort();
                topics.dedup();
                found.sort();
                prop_assert_eq!(found, topics, "{}", filter);
            }
        }
    }
}
