//! Topic names and topic filters (MQTT 5 §4.7, §4.8).

use crate::codec::CodecError;

/// Most levels of a name or filter: bounds what one filter costs in the tree. The standard sets none.
pub const TOPIC_LEVELS_MAX: usize = 128;

/// Checks a topic name: not empty, no wildcard, no U+0000, at most [`TOPIC_LEVELS_MAX`] levels.
#[inline]
pub fn check_name(name: &str) -> Result<(), CodecError> {
    let mut levels = 1;
    for byte in name.bytes() {
        match byte {
            b'+' | b'#' | 0 => return Err(CodecError::TopicName),
            b'/' => levels += 1,
            _ => {}
        }
    }
    if name.is_empty() || levels > TOPIC_LEVELS_MAX { Err(CodecError::TopicName) } else { Ok(()) }
}

/// A topic filter whose wildcards stand where they may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TopicFilter<'a> {
    text: &'a str,
    share: Option<&'a str>,
    wildcards: bool,
}

impl<'a> TopicFilter<'a> {
    /// Parses `filter` or `$share/group/filter`.
    pub fn parse(text: &'a str) -> Result<Self, CodecError> {
        let (share, filter) = match text.strip_prefix("$share/") {
            Some(rest) => {
                let (group, filter) = rest.split_once('/').ok_or(CodecError::TopicFilter)?;
                if group.is_empty() || group.contains(['+', '#']) {
                    return Err(CodecError::TopicFilter);
                }
                (Some(group), filter)
            }
            None => (None, text),
        };
        if filter.is_empty() || text.len() > usize::from(u16::MAX) || filter.contains('\0') {
            return Err(CodecError::TopicFilter);
        }
        let mut wildcards = false;
        let mut levels = filter.split('/').enumerate().peekable();
        while let Some((i, level)) = levels.next() {
            let hash_at_end = level == "#" && levels.peek().is_none();
            if i >= TOPIC_LEVELS_MAX || (level.contains(['+', '#']) && level != "+" && !hash_at_end) {
                return Err(CodecError::TopicFilter);
            }
            wildcards |= level == "+" || level == "#";
        }
        Ok(Self { text: filter, share, wildcards })
    }

    /// The filter, without `$share/group/`.
    pub fn as_str(&self) -> &'a str {
        self.text
    }

    /// The group of a shared subscription.
    pub fn share(&self) -> Option<&'a str> {
        self.share
    }

    /// Whether it holds `+` or `#`.
    pub fn has_wildcards(&self) -> bool {
        self.wildcards
    }

    /// Whether a topic name matches. A filter that begins with a wildcard does not match a name that begins with `$` (§4.7.2).
    pub fn matches(&self, topic: &str) -> bool {
        if !self.wildcards {
            return self.text == topic;
        }
        if topic.starts_with('$') && self.text.starts_with(['+', '#']) {
            return false;
        }
        let mut levels = topic.split('/');
        for want in self.text.split('/') {
            match (want, levels.next()) {
                ("#", _) => return true, // also the parent level: "sport/#" matches "sport"
                ("+", Some(_)) => {}
                (want, Some(level)) if want == level => {}
                _ => return false,
            }
        }
        levels.next().is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_match_as_the_standard_says() {
        // MQTT 5 §4.7.1.2, §4.7.1.3, §4.7.2
        for (filter, topic, expected) in [
            ("sport/tennis/player1/#", "sport/tennis/player1", true),
            ("sport/tennis/player1/#", "sport/tennis/player1/ranking", true),
            ("sport/tennis/player1/#", "sport/tennis/player1/score/wimbledon", true),
            ("sport/#", "sport", true),
            ("#", "a/b/c", true),
            ("sport/tennis/+", "sport/tennis/player1", true),
            ("sport/tennis/+", "sport/tennis/player1/ranking", false),
            ("sport/+", "sport", false),
            ("sport/+", "sport/", true),
            ("+/+", "/finance", true),
            ("/+", "/finance", true),
            ("+", "/finance", false),
            ("#", "$SYS/monitor/Clients", false),
            ("+/monitor/Clients", "$SYS/monitor/Clients", false),
            ("$SYS/#", "$SYS/monitor/Clients", true),
            ("$SYS/monitor/+", "$SYS/monitor/Clients", true),
            ("+/#", "a", true),
            ("a//b", "a//b", true),
            ("a/+/b", "a//b", true),
            ("ACCOUNTS", "Accounts", false),
        ] {
            assert_eq!(TopicFilter::parse(filter).unwrap().matches(topic), expected, "{filter} on {topic}");
        }
    }

    #[test]
    fn misplaced_wildcards_are_refused() {
        let deep = "a/".repeat(TOPIC_LEVELS_MAX);
        let bad = [
            "",
            "sport/tennis#",
            "sport/tennis/#/ranking",
            "sport+",
            "a/b+/c",
            "##",
            "#/a",
            "+a",
            "a\0b",
            "$share/g",
            "$share//a",
        ];
        for filter in bad.into_iter().chain(["$share/g+/a", "$share/#/a", "$share/g/", &deep]) {
            assert_eq!(TopicFilter::parse(filter), Err(CodecError::TopicFilter), "{filter:?}");
        }
        for name in ["", "a/+", "#", "a\0", &deep] {
            assert_eq!(check_name(name), Err(CodecError::TopicName), "{name:?}");
        }
    }

    #[test]
    fn a_shared_filter_is_group_and_filter() {
        let filter = TopicFilter::parse("$share/consumers/a/+/#").unwrap();
        assert_eq!((filter.share(), filter.as_str(), filter.has_wildcards()), (Some("consumers"), "a/+/#", true));
    }
}
