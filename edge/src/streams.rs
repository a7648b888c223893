//! Stream rules: which PUBLISH goes to which stream, and what its record looks like.
//!
//! Rules are tried in the order of the configuration and the first that matches wins. The record of a PUBLISH is decided
//! here and nowhere else: key, value, headers. This file knows nothing of how streams are stored.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use mqtt::store::Publish;
use mqtt::topic::TopicFilter;
use parking_lot::RwLock;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use shared::batch::BatchBuilder;
use shared::config::{ByteSize, Span};
use shared::name::{EdgeId, NameError, StreamName, TimestampMs, TopicName};

/// `[[stream]]`: one rule.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StreamSettings {
    /// The stream's name.
    pub name: String,
    /// MQTT topic filters; a message whose topic matches one of them is stored.
    pub filters: Vec<String>,
    /// Filters that take topics out again.
    pub exclude: Vec<String>,
    /// Kafka topic; the stream's name when absent.
    pub topic: Option<String>,
    /// What becomes the record's key.
    pub key: KeyRule,
    /// What becomes the record's headers.
    pub headers: HeaderRule,
    /// What happens when there is no room and nothing may be deleted.
    pub on_full: OnFull,
    /// Where records rest until the cloud has them.
    pub engine: Engine,
    /// Bound of what `engine = "memory"` keeps; [`MEMORY_BYTES_DEFAULT`] when absent.
    pub memory_bytes: Option<ByteSize>,
    /// Records that are safe in the cloud are deleted beyond this size.
    pub retention_bytes: Option<ByteSize>,
    /// Records that are safe in the cloud are deleted beyond this age.
    pub retention_age: Option<Span>,
}

/// What becomes the record's key: in a file `"topic"`, `"client-id"` or the number of a topic level, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KeyRule {
    /// The MQTT topic.
    #[default]
    Topic,
    /// The publishing client's identifier.
    ClientId,
    /// One level of the topic, counted from 1; no key where the topic has fewer.
    Level(u8),
}

impl Serialize for KeyRule {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Topic => serializer.serialize_str("topic"),
            Self::ClientId => serializer.serialize_str("client-id"),
            Self::Level(n) => serializer.serialize_u8(*n),
        }
    }
}

impl<'de> Deserialize<'de> for KeyRule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form {
            Level(i64),
            Name(String),
        }
        const EXPECTED: &str = "expected \"topic\", \"client-id\" or the number of a topic level, 1 to 128";
        match Form::deserialize(deserializer).map_err(|_| serde::de::Error::custom(EXPECTED))? {
            Form::Level(n @ 1..=128) => Ok(Self::Level(n as u8)),
            Form::Name(name) if name == "topic" => Ok(Self::Topic),
            Form::Name(name) if name == "client-id" => Ok(Self::ClientId),
            _ => Err(serde::de::Error::custom(EXPECTED)),
        }
    }
}

/// Which headers a record gets: in a file `"minimal"`, `"all"` or a list of header names.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum HeaderRule {
    /// [`MINIMAL`] and the user properties.
    #[default]
    Minimal,
    /// Whatever MQTT says.
    All,
    /// These; `mqtt.user` stands for all user properties, `mqtt.user.<name>` for one.
    List(Vec<String>),
}

impl Serialize for HeaderRule {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Minimal => serializer.serialize_str("minimal"),
            Self::All => serializer.serialize_str("all"),
            Self::List(names) => names.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for HeaderRule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form {
            Word(String),
            List(Vec<String>),
        }
        let expected = || {
            let names: Vec<_> = NAMES.iter().map(|(name, _)| *name).collect();
            format!("expected \"minimal\", \"all\" or a list of {}, {USER_PREFIX}NAME", names.join(", "))
        };
        match Form::deserialize(deserializer).map_err(|_| serde::de::Error::custom(expected()))? {
            Form::Word(word) if word == "minimal" => Ok(Self::Minimal),
            Form::Word(word) if word == "all" => Ok(Self::All),
            Form::List(names) if names.iter().all(|name| header_bit(name).is_some()) => Ok(Self::List(names)),
            _ => Err(serde::de::Error::custom(expected())),
        }
    }
}

/// Where a stream's records rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Engine {
    /// In the database: acknowledged after its commit.
    #[default]
    Redb,
    /// In memory: acknowledged at once, gone with the process.
    Memory,
}

/// What a stream keeps in memory unless it says otherwise.
pub const MEMORY_BYTES_DEFAULT: u64 = 16 << 20;

/// What happens to a PUBLISH when its stream is full and nothing may be deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnFull {
    /// It waits, and so does its client.
    #[default]
    Hold,
    /// It is refused.
    Reject,
    /// It is stored, and the oldest records are dropped: a declared gap.
    DropOldest,
}

/// Prefix of the headers that carry MQTT 5 user properties.
pub const USER_PREFIX: &str = "mqtt.user.";
/// User properties that keep their names as headers: those of W3C Trace Context, which tracing software of Kafka clients looks for.
const TRACE_CONTEXT: [&str; 2] = ["traceparent", "tracestate"];

/// The header that carries the user property of that name.
fn user_header(name: &str) -> Cow<'_, str> {
    if TRACE_CONTEXT.contains(&name) { name.into() } else { format!("{USER_PREFIX}{name}").into() }
}

const TOPIC: u16 = 1 << 0;
const RETAIN: u16 = 1 << 1;
const EDGE: u16 = 1 << 2;
const USER: u16 = 1 << 3;
const QOS: u16 = 1 << 4;
const CLIENT_ID: u16 = 1 << 5;
const CONTENT_TYPE: u16 = 1 << 6;
const RESPONSE_TOPIC: u16 = 1 << 7;
const CORRELATION_DATA: u16 = 1 << 8;
const EXPIRES_AT: u16 = 1 << 9;
/// `mqtt.user.<name>`: some of the user properties.
const SOME_USER: u16 = 1 << 10;

const MINIMAL: u16 = TOPIC | RETAIN | EDGE | USER;

/// The public names of headers, in the order in which a record carries them.
const NAMES: [(&str, u16); 10] = [
    ("mqtt.topic", TOPIC),
    ("mqtt.retain", RETAIN),
    ("tributary.edge", EDGE),
    ("mqtt.qos", QOS),
    ("mqtt.client_id", CLIENT_ID),
    ("mqtt.content_type", CONTENT_TYPE),
    ("mqtt.response_topic", RESPONSE_TOPIC),
    ("mqtt.correlation_data", CORRELATION_DATA),
    ("mqtt.expires_at", EXPIRES_AT),
    ("mqtt.user", USER),
];

fn header_bit(name: &str) -> Option<u16> {
    let known = NAMES.iter().find(|(known, _)| *known == name).map(|(_, bit)| *bit);
    known.or_else(|| name.strip_prefix(USER_PREFIX).is_some_and(|rest| !rest.is_empty()).then_some(SOME_USER))
}

/// Why the rules cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// A name is not one.
    #[error("[[stream]] {key}: {error}")]
    Name {
        /// The setting.
        key: &'static str,
        /// What is wrong with it.
        error: NameError,
    },
    /// Two rules share a name.
    #[error("[[stream]] name = \"{0}\" is given twice: every stream needs its own name")]
    Twice(StreamName),
    /// A rule that can match nothing.
    #[error(
        "[[stream]] name = \"{0}\": filters is empty: expected MQTT topic filters such as [\"factory/+/telemetry/#\"]"
    )]
    NoFilters(StreamName),
    /// A setting of the other engine.
    #[error("[[stream]] name = \"{stream}\": {key} goes with engine = \"{engine}\" only: leave one of them out")]
    Engine {
        /// The rule.
        stream: StreamName,
        /// The setting.
        key: &'static str,
        /// The engine that has it.
        engine: &'static str,
    },
    /// A filter is not one.
    #[error(
        "[[stream]] name = \"{stream}\": {key} holds {filter:?}, which is not an MQTT topic filter: `+` stands for a whole level, `#` for the rest"
    )]
    Filter {
        /// The rule.
        stream: StreamName,
        /// `filters` or `exclude`.
        key: &'static str,
        /// What was found.
        filter: String,
    },
}

/// A rule whose parts were checked.
#[derive(Debug, Clone)]
pub struct Rule {
    /// The stream.
    pub name: StreamName,
    /// Its Kafka topic.
    pub topic: TopicName,
    /// What happens when there is no room.
    pub on_full: OnFull,
    /// Bound of what is kept in memory; `None`: it rests in the database.
    pub memory_bytes: Option<u64>,
    /// Bound of what is kept although it is safe.
    pub retention_bytes: Option<u64>,
    /// Bound of how long what is safe is kept.
    pub retention_age_ms: Option<i64>,
    filters: Vec<String>,
    exclude: Vec<String>,
    key: KeyRule,
    headers: u16,
    /// Names of user properties, when only some are taken.
    user: HashSet<String>,
}

impl Rule {
    /// Checks the settings.
    pub fn new(settings: &StreamSettings) -> Result<Self, RuleError> {
        let name = StreamName::parse(&settings.name).map_err(|error| RuleError::Name { key: "name", error })?;
        let topic = TopicName::parse(settings.topic.as_deref().unwrap_or(&settings.name))
            .map_err(|error| RuleError::Name { key: "topic", error })?;
        if settings.filters.is_empty() {
            return Err(RuleError::NoFilters(name));
        }
        let kept = settings.retention_bytes.is_some() || settings.retention_age.is_some();
        match settings.engine {
            Engine::Redb if settings.memory_bytes.is_some() => {
                return Err(RuleError::Engine { stream: name, key: "memory_bytes", engine: "memory" });
            }
            Engine::Memory if kept => {
                return Err(RuleError::Engine { stream: name, key: "retention", engine: "redb" });
            }
            _ => {}
        }
        for (key, filters) in [("filters", &settings.filters), ("exclude", &settings.exclude)] {
            for filter in filters {
                // A shared subscription's filter says who receives, which a rule does not ask.
                if TopicFilter::parse(filter).map_or(true, |parsed| parsed.share().is_some()) {
                    return Err(RuleError::Filter { stream: name, key, filter: filter.clone() });
                }
            }
        }
        let (headers, user) = match &settings.headers {
            HeaderRule::Minimal => (MINIMAL, HashSet::new()),
            HeaderRule::All => (u16::MAX, HashSet::new()),
            HeaderRule::List(names) => (
                names.iter().filter_map(|name| header_bit(name)).fold(0, |bits, bit| bits | bit),
                names.iter().filter_map(|name| name.strip_prefix(USER_PREFIX)).map(str::to_owned).collect(),
            ),
        };
        Ok(Self {
            name,
            topic,
            on_full: settings.on_full,
            memory_bytes: (settings.engine == Engine::Memory)
                .then(|| settings.memory_bytes.map_or(MEMORY_BYTES_DEFAULT, |size| size.0)),
            retention_bytes: settings.retention_bytes.map(|size| size.0),
            retention_age_ms: settings.retention_age.map(|age| i64::try_from(age.0.as_millis()).unwrap_or(i64::MAX)),
            filters: settings.filters.clone(),
            exclude: settings.exclude.clone(),
            key: settings.key,
            headers,
            user,
        })
    }

    fn matches(&self, topic: &str) -> bool {
        let any = |filters: &[String]| {
            filters.iter().any(|filter| TopicFilter::parse(filter).is_ok_and(|filter| filter.matches(topic)))
        };
        any(&self.filters) && !any(&self.exclude)
    }

    /// Upper bound of the bytes the record of `publish` takes in a batch.
    pub fn record_bytes_max(&self, edge: &EdgeId, client_id: &str, publish: &Publish<'_>) -> usize {
        publish.payload.len()
            + 2 * publish.topic.len()
            + 2 * client_id.len()
            + edge.as_str().len()
            + publish.properties.bytes()
            + 27 * publish.properties.user.len()
            + 320 // names of headers, varints, numbers
    }

    /// Adds the record of `publish` to a batch.
    pub fn push(
        &self,
        builder: &mut BatchBuilder,
        timestamp: TimestampMs,
        edge: &EdgeId,
        client_id: &str,
        publish: &Publish<'_>,
    ) {
        let key: Option<&[u8]> = match self.key {
            KeyRule::Topic => Some(publish.topic.as_bytes()),
            KeyRule::ClientId => Some(client_id.as_bytes()),
            KeyRule::Level(level) => publish.topic.split('/').nth(usize::from(level) - 1).map(str::as_bytes),
        };
        let has = |bit: u16| self.headers & bit != 0;
        let properties = &publish.properties;
        let qos = [b'0' + publish.qos.min(9)];
        let expires_at = properties.expiry_secs.map(|secs| {
            let at = publish.now_ms.saturating_add(i64::from(secs) * 1000);
            at.to_string()
        });
        let user_names: Vec<Cow<'_, str>> = if has(USER | SOME_USER) && !properties.user.is_empty() {
            properties.user.iter().map(|(name, _)| user_header(name)).collect()
        } else {
            Vec::new()
        };
        let mut headers: Vec<(&[u8], &[u8])> = Vec::with_capacity(NAMES.len() + user_names.len());
        if has(TOPIC) && self.key != KeyRule::Topic {
            headers.push((b"mqtt.topic", publish.topic.as_bytes()));
        }
        if has(RETAIN) && publish.retain {
            headers.push((b"mqtt.retain", b"1"));
        }
        if has(EDGE) {
            headers.push((b"tributary.edge", edge.as_str().as_bytes()));
        }
        if has(QOS) {
            headers.push((b"mqtt.qos", &qos));
        }
        if has(CLIENT_ID) && self.key != KeyRule::ClientId {
            headers.push((b"mqtt.client_id", client_id.as_bytes()));
        }
        if let Some(content_type) = properties.content_type.filter(|_| has(CONTENT_TYPE)) {
            headers.push((b"mqtt.content_type", content_type.as_bytes()));
        }
        if let Some(response_topic) = properties.response_topic.filter(|_| has(RESPONSE_TOPIC)) {
            headers.push((b"mqtt.response_topic", response_topic.as_bytes()));
        }
        if let Some(data) = properties.correlation_data.filter(|_| has(CORRELATION_DATA)) {
            headers.push((b"mqtt.correlation_data", data));
        }
        if let Some(at) = expires_at.as_ref().filter(|_| has(EXPIRES_AT)) {
            headers.push((b"mqtt.expires_at", at.as_bytes()));
        }
        for (name, (bare, value)) in user_names.iter().zip(&properties.user) {
            if has(USER) || self.user.contains(*bare) {
                headers.push((name.as_bytes(), value.as_bytes()));
            }
        }
        builder.push(timestamp, key, Some(publish.payload), &headers);
    }
}

/// All rules, with a bounded memory of which topic goes where.
#[derive(Debug)]
pub struct Rules {
    rules: Vec<Rule>,
    /// Topic -> index of its rule. Devices publish on few topics, and again and again.
    cache: RwLock<HashMap<Box<str>, Option<u16>>>,
}

/// Topics remembered; when more come, all are forgotten and the busy ones are back at once.
const CACHE_TOPICS_MAX: usize = 4096;
/// Topics longer than this are not remembered: they would let one client fill memory.
const CACHE_TOPIC_BYTES_MAX: usize = 256;

impl Rules {
    /// Checks all settings.
    pub fn new(settings: &[StreamSettings]) -> Result<Self, RuleError> {
        let mut rules: Vec<Rule> = Vec::with_capacity(settings.len());
        for one in settings {
            let rule = Rule::new(one)?;
            if rules.iter().any(|other| other.name == rule.name) {
                return Err(RuleError::Twice(rule.name));
            }
            rules.push(rule);
        }
        Ok(Self { rules, cache: RwLock::default() })
    }

    /// The rules, in order.
    pub fn all(&self) -> &[Rule] {
        &self.rules
    }

    /// The index of the first rule that matches.
    pub fn find(&self, topic: &str) -> Option<usize> {
        if let Some(found) = self.cache.read().get(topic) {
            return found.map(usize::from);
        }
        let found = self.rules.iter().position(|rule| rule.matches(topic));
        if topic.len() <= CACHE_TOPIC_BYTES_MAX {
            let mut cache = self.cache.write();
            if cache.len() >= CACHE_TOPICS_MAX {
                cache.clear();
            }
            cache.insert(topic.into(), found.and_then(|index| u16::try_from(index).ok()));
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use mqtt::store::PublishProperties;
    use shared::batch::{Compression, Record};

    use super::*;

    fn rule(text: &str) -> Rule {
        Rule::new(&toml::from_str(text).unwrap()).unwrap()
    }

    fn publish<'a>(topic: &'a str, payload: &'a [u8]) -> Publish<'a> {
        Publish {
            topic,
            payload,
            qos: 1,
            retain: false,
            packet_id: Some(1),
            now_ms: 1_000,
            properties: PublishProperties::default(),
        }
    }

    fn record(rule: &Rule, publish: &Publish<'_>) -> Record {
        let mut builder = BatchBuilder::default();
        let edge = EdgeId::parse("gw-1").unwrap();
        rule.push(&mut builder, 1_000, &edge, "dev-7", publish);
        let bound = rule.record_bytes_max(&edge, "dev-7", publish);
        assert!(builder.len() - shared::batch::HEADER_BYTES <= bound, "{} > {bound}", builder.len());
        builder.finish(0, Compression::None).records(1 << 20).unwrap().next().unwrap().unwrap()
    }

    fn headers(record: &Record) -> Vec<(String, String)> {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        record.headers.iter().map(|(n, v)| (text(n), text(v.as_ref().unwrap()))).collect()
    }

    #[test]
    fn the_first_matching_rule_wins() {
        let settings: Vec<StreamSettings> = vec![
            toml::from_str("name = \"alarms\"\nfilters = [\"+/alarm/#\"]\nexclude = [\"test/#\"]").unwrap(),
            toml::from_str("name = \"rest\"\nfilters = [\"a/#\", \"test/#\"]").unwrap(),
        ];
        let rules = Rules::new(&settings).unwrap();
        for _ in 0..2 {
            assert_eq!(rules.find("a/alarm/1"), Some(0));
            assert_eq!(rules.find("test/alarm"), Some(1));
            assert_eq!(rules.find("a"), Some(1));
            assert_eq!(rules.find("b"), None);
            assert_eq!(rules.find("$SYS/alarm/x"), None);
        }
        for n in 0..3 * CACHE_TOPICS_MAX {
            rules.find(&format!("t/{n}"));
        }
        assert!(rules.cache.read().len() <= CACHE_TOPICS_MAX);
        assert_eq!(
            Rules::new(&[settings[0].clone(), settings[0].clone()]).unwrap_err().to_string().split(':').next(),
            Some("[[stream]] name = \"alarms\" is given twice")
        );
    }

    #[test]
    fn a_record_is_what_the_rule_says() {
        let minimal = rule("name = \"s\"\nfilters = [\"#\"]");
        let mut p = publish("factory/3/t", b"21.5");
        p.properties.user = vec![("unit", "C"), ("unit", "K")];
        p.properties.content_type = Some("text/plain");
        p.properties.expiry_secs = Some(10);
        p.properties.correlation_data = Some(b"77");
        p.retain = true;
        let r = record(&minimal, &p);
        assert_eq!(r.key.as_deref(), Some(&b"factory/3/t"[..]));
        assert_eq!(r.value.as_deref(), Some(&b"21.5"[..]));
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        let user = [pair("mqtt.user.unit", "C"), pair("mqtt.user.unit", "K")];
        assert_eq!(headers(&r), [&[pair("mqtt.retain", "1"), pair("tributary.edge", "gw-1")][..], &user].concat());

        let mut traced = publish("factory/3/t", b"");
        traced.properties.user = vec![("traceparent", "00-1-2-01"), ("tracestate", "a=b"), ("Traceparent", "x")];
        let trace = [pair("traceparent", "00-1-2-01"), pair("tracestate", "a=b"), pair("mqtt.user.Traceparent", "x")];
        assert_eq!(headers(&record(&minimal, &traced))[1..], trace);
        let some = rule("name = \"s\"\nfilters = [\"#\"]\nheaders = [\"mqtt.user.tracestate\"]");
        assert_eq!(headers(&record(&some, &traced)), [pair("tracestate", "a=b")]);

        let all = rule("name = \"s\"\nfilters = [\"#\"]\nkey = 2\nheaders = \"all\"");
        let r = record(&all, &p);
        assert_eq!(r.key.as_deref(), Some(&b"3"[..]));
        let expected = [
            pair("mqtt.topic", "factory/3/t"),
            pair("mqtt.retain", "1"),
            pair("tributary.edge", "gw-1"),
            pair("mqtt.qos", "1"),
            pair("mqtt.client_id", "dev-7"),
            pair("mqtt.content_type", "text/plain"),
            pair("mqtt.correlation_data", "77"),
            pair("mqtt.expires_at", "11000"),
        ];
        assert_eq!(headers(&r), [&expected[..], &user].concat());

        let list =
            rule("name = \"s\"\nfilters = [\"#\"]\nkey = \"client-id\"\nheaders = [\"mqtt.qos\", \"mqtt.user.unit\"]");
        let mut p = publish("a", b"");
        p.properties.user = vec![("x", "1"), ("unit", "C")];
        let r = record(&list, &p);
        assert_eq!((r.key.as_deref(), r.value.as_deref()), (Some(&b"dev-7"[..]), Some(&b""[..])), "empty, never null");
        assert_eq!(headers(&r), [pair("mqtt.qos", "1"), pair("mqtt.user.unit", "C")]);
    }

    #[test]
    fn wrong_settings_say_what_was_expected() {
        let refused = |text: &str| match toml::from_str::<StreamSettings>(text) {
            Err(error) => error.to_string(),
            Ok(settings) => Rule::new(&settings).unwrap_err().to_string(),
        };
        for (text, expected) in [
            ("filters = [\"#\"]", "stream name"),
            ("name = \"s\"", "filters is empty"),
            ("name = \"s\"\nfilters = [\"a/b#\"]", "a/b#"),
            ("name = \"s\"\nfilters = [\"$share/g/a\"]", "$share/g/a"),
            ("name = \"s\"\nfilters = [\"a\"]\nexclude = [\"\"]", "exclude"),
            ("name = \"s\"\nfilters = [\"a\"]\ntopic = \"a/b\"", "topic name"),
            ("name = \"s\"\nkey = \"level 2\"", "client-id"),
            ("name = \"s\"\nkey = 0", "topic level"),
            ("name = \"s\"\nheaders = [\"mqtt.qoss\"]", "mqtt.qos"),
            ("name = \"s\"\nheaders = \"none\"", "minimal"),
            ("name = \"s\"\non_full = \"wait\"", "hold"),
            ("name = \"s\"\nfilter = [\"a\"]", "filters"),
        ] {
            let error = refused(text);
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn settings_survive_being_written_and_read() {
        let settings = StreamSettings {
            name: "s".into(),
            filters: vec!["a/#".into()],
            key: KeyRule::Level(3),
            headers: HeaderRule::List(vec!["mqtt.qos".into()]),
            on_full: OnFull::DropOldest,
            ..StreamSettings::default()
        };
        let text = toml::to_string(&settings).unwrap();
        assert_eq!(toml::from_str::<StreamSettings>(&text).unwrap(), settings);
    }
}
