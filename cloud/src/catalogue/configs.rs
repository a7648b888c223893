//! Topic settings: which exist, what they may be, and where each value comes from.
//!
//! A setting is listed here only if its value is true of this broker: either it is honoured, or it names the one way
//! things are done and cannot be set to another. Everything else is refused by name. An answer "ok" to a setting that is
//! then ignored would be worse than the error.

use std::collections::BTreeMap;

use super::CatalogueSettings;
use super::placement::ENGINE_SETTING;
use crate::state::Engine;

/// Kafka's `ConfigDef.Type`, as DescribeConfigs numbers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i8)]
pub enum ConfigType {
    /// `true` or `false`.
    Boolean = 1,
    /// Text.
    String = 2,
    /// 32 bits.
    Int = 3,
    /// 64 bits.
    Long = 5,
    /// Texts with commas between.
    List = 7,
}

/// Where a value comes from, as DescribeConfigs numbers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i8)]
pub enum ConfigSource {
    /// Set on the topic.
    Topic = 1,
    /// From the broker's configuration file.
    Broker = 4,
    /// Built in.
    Default = 5,
}

/// One setting as DescribeConfigs shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigEntry {
    /// Its name.
    pub name: &'static str,
    /// Its value in force.
    pub value: String,
    /// What the value is.
    pub kind: ConfigType,
    /// Where it comes from.
    pub source: ConfigSource,
    /// There is no way to set it to anything else.
    pub read_only: bool,
    /// The value in force and those behind it: name, value, source.
    pub synonyms: Vec<(&'static str, String, ConfigSource)>,
    /// One sentence.
    pub documentation: &'static str,
}

/// A topic's settings, typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TopicConfig {
    /// Records are dropped when they were appended so long ago; -1: never.
    pub retention_ms: i64,
    /// Oldest records are dropped when a partition is larger; -1: never.
    pub retention_bytes: i64,
    /// Largest batch taken.
    pub max_message_bytes: usize,
}

struct Definition {
    name: &'static str,
    /// The broker's setting that is the default.
    broker_name: &'static str,
    kind: ConfigType,
    takes: Takes,
    documentation: &'static str,
}

enum Takes {
    /// A number in this range. The broker's default is a setting of its own.
    Number { min: i64, max: i64, of_broker: fn(&CatalogueSettings) -> i64 },
    /// Only this: it is how things are done here.
    Only(&'static str),
    /// One of these, and only when the topic is made.
    AtCreation { values: fn() -> Vec<&'static str>, of_broker: fn(&CatalogueSettings) -> &'static str },
}

const DEFINITIONS: &[Definition] = &[
    Definition {
        name: "cleanup.policy",
        broker_name: "log.cleanup.policy",
        kind: ConfigType::List,
        takes: Takes::Only("delete"),
        documentation: "Old records are deleted by retention. Compaction is not offered.",
    },
    Definition {
        name: "compression.type",
        broker_name: "compression.type",
        kind: ConfigType::String,
        takes: Takes::Only("producer"),
        documentation: "Batches are stored as their producer compressed them.",
    },
    Definition {
        name: "flush.messages",
        broker_name: "log.flush.interval.messages",
        kind: ConfigType::Long,
        takes: Takes::Only("1"),
        documentation: "Every batch is acknowledged when its topic's tributary.engine has it.",
    },
    Definition {
        name: "max.message.bytes",
        broker_name: "message.max.bytes",
        kind: ConfigType::Int,
        takes: Takes::Number {
            min: 0,
            max: super::MESSAGE_BYTES_LIMIT as i64,
            of_broker: |settings| i64::try_from(settings.max_message_bytes).unwrap_or(i64::MAX),
        },
        documentation: "The largest batch taken, as stored.",
    },
    Definition {
        name: "message.timestamp.after.max.ms",
        broker_name: "log.message.timestamp.after.max.ms",
        kind: ConfigType::Long,
        takes: Takes::Only("9223372036854775807"),
        documentation: "A record is never refused for a timestamp ahead of the broker's clock.",
    },
    Definition {
        name: "message.timestamp.before.max.ms",
        broker_name: "log.message.timestamp.before.max.ms",
        kind: ConfigType::Long,
        takes: Takes::Only("9223372036854775807"),
        documentation: "A record is never refused for a timestamp behind the broker's clock.",
    },
    Definition {
        name: "message.timestamp.type",
        broker_name: "log.message.timestamp.type",
        kind: ConfigType::String,
        takes: Takes::Only("CreateTime"),
        documentation: "Records keep the timestamp they were sent with.",
    },
    Definition {
        name: "min.insync.replicas",
        broker_name: "min.insync.replicas",
        kind: ConfigType::Int,
        takes: Takes::Only("1"),
        documentation: "A partition has one replica; durability is the log's and the archive's.",
    },
    Definition {
        name: "preallocate",
        broker_name: "log.preallocate",
        kind: ConfigType::Boolean,
        takes: Takes::Only("false"),
        documentation: "Topics have no files of their own to preallocate.",
    },
    Definition {
        name: "retention.bytes",
        broker_name: "log.retention.bytes",
        kind: ConfigType::Long,
        takes: Takes::Number { min: -1, max: i64::MAX, of_broker: |settings| settings.retention_bytes },
        documentation: "The oldest records of a partition go while the rest is at least this many bytes; -1 keeps all.",
    },
    Definition {
        name: "retention.ms",
        broker_name: "log.retention.ms",
        kind: ConfigType::Long,
        takes: Takes::Number { min: -1, max: i64::MAX, of_broker: |settings| settings.retention_ms },
        documentation: "Records go when this many milliseconds have passed since they were appended here; -1 keeps all.",
    },
    Definition {
        name: ENGINE_SETTING,
        broker_name: ENGINE_SETTING,
        kind: ConfigType::String,
        takes: Takes::AtCreation {
            values: || Engine::ALL.map(Engine::name).to_vec(),
            of_broker: |settings| settings.placement.default_engine().name(),
        },
        documentation: "Where records are durable before they are acknowledged: the local disk (file), the object store \
                        (object), or nowhere (memory). It is chosen when the topic is made and stays.",
    },
    Definition {
        name: "unclean.leader.election.enable",
        broker_name: "unclean.leader.election.enable",
        kind: ConfigType::Boolean,
        takes: Takes::Only("false"),
        documentation: "A partition is never led by a broker that lacks acknowledged records.",
    },
];

/// Checks settings from a client: each must be known and taken. Returns them in the form they are stored in.
pub fn check(configs: &[(String, Option<String>)]) -> Result<BTreeMap<String, String>, String> {
    let mut checked = BTreeMap::new();
    for (name, value) in configs {
        let definition = known(name)?;
        let value = value.as_deref().ok_or_else(|| format!("topic setting {name} has no value"))?.trim();
        let value = definition.takes.check(name, value)?;
        if checked.insert(name.clone(), value).is_some() {
            return Err(format!("topic setting {name} is given twice"));
        }
    }
    Ok(checked)
}

/// What is to become of one setting (KIP-339).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Alteration {
    /// It is this.
    Set(String),
    /// It is the broker's again.
    Delete,
    /// These are in its list as well.
    Append(String),
    /// These are not in its list any more.
    Subtract(String),
}

/// A topic's settings after some of them were altered, each at most once.
pub fn alter(
    current: &BTreeMap<String, String>,
    alterations: Vec<(String, Alteration)>,
    settings: &CatalogueSettings,
) -> Result<BTreeMap<String, String>, String> {
    let mut altered: Vec<(String, Option<String>)> =
        current.iter().map(|(name, value)| (name.clone(), Some(value.clone()))).collect();
    for (name, alteration) in alterations {
        let definition = known(&name)?;
        let listed = || match definition.kind {
            ConfigType::List => Ok(current.get(&name).cloned().unwrap_or_else(|| definition.takes.of_broker(settings))),
            _ => Err(format!("{name} is no list: it can be set and deleted, not appended to or subtracted from")),
        };
        altered.retain(|(altered, _)| *altered != name);
        let words = |text: &str| text.split(',').map(|word| word.trim().to_owned()).collect::<Vec<_>>();
        let value = match alteration {
            Alteration::Set(value) => value,
            Alteration::Delete => continue,
            Alteration::Append(value) => {
                let mut list = words(&listed()?);
                for word in words(&value) {
                    if !list.contains(&word) {
                        list.push(word);
                    }
                }
                list.join(",")
            }
            Alteration::Subtract(value) => {
                let less = words(&value);
                words(&listed()?).into_iter().filter(|word| !less.contains(word)).collect::<Vec<_>>().join(",")
            }
        };
        altered.push((name, Some(value)));
    }
    let altered = check(&altered)?;
    let engine = engine_in(current, settings);
    match engine_in(&altered, settings) == engine {
        true => Ok(altered),
        false => Err(engine_stays(&engine)),
    }
}

/// A topic's settings when it is given these and no others. Its engine stays, named or not.
pub fn replace(
    current: &BTreeMap<String, String>,
    wanted: &[(String, Option<String>)],
    settings: &CatalogueSettings,
) -> Result<BTreeMap<String, String>, String> {
    let mut replaced = check(wanted)?;
    let engine = engine_in(current, settings);
    if replaced.get(ENGINE_SETTING).is_some_and(|wanted| *wanted != engine) {
        return Err(engine_stays(&engine));
    }
    if let Some(engine) = current.get(ENGINE_SETTING) {
        replaced.insert(ENGINE_SETTING.to_owned(), engine.clone());
    }
    Ok(replaced)
}

fn engine_in(configs: &BTreeMap<String, String>, settings: &CatalogueSettings) -> String {
    let of_broker = || settings.placement.default_engine().name().to_owned();
    configs.get(ENGINE_SETTING).cloned().unwrap_or_else(of_broker)
}

fn engine_stays(engine: &str) -> String {
    format!(
        "{ENGINE_SETTING} is {engine:?} and stays: where a topic's records are is chosen when it is made. Make another topic \
         with the engine wanted, and copy the records to it"
    )
}

fn known(name: &str) -> Result<&'static Definition, String> {
    DEFINITIONS.iter().find(|definition| definition.name == name).ok_or_else(|| {
        let honoured: Vec<&str> = DEFINITIONS.iter().map(|definition| definition.name).collect();
        let name: String = name.chars().take(128).collect();
        format!(
            "topic setting {name:?} is not known to this broker and would be ignored, so it is refused; known are {}",
            honoured.join(", ")
        )
    })
}

impl Takes {
    /// The value as it is stored: `007` is 7.
    fn check(&self, name: &str, value: &str) -> Result<String, String> {
        let shown: String = value.chars().take(128).collect();
        match self {
            Self::Number { min, max, .. } => match value.parse::<i64>() {
                Ok(number) if (*min..=*max).contains(&number) => Ok(number.to_string()),
                _ => Err(format!("{name} = {shown:?}: expected a whole number from {min} to {max}")),
            },
            Self::Only(only) if value == *only => Ok((*only).to_owned()),
            Self::Only(only) => Err(format!("{name} = {shown:?} is not offered: on this broker it is always {only}")),
            Self::AtCreation { values, .. } => match values().contains(&value) {
                true => Ok(value.to_owned()),
                false => Err(format!("{name} = {shown:?}: expected one of {}", values().join(", "))),
            },
        }
    }

    fn of_broker(&self, settings: &CatalogueSettings) -> String {
        match self {
            Self::Number { of_broker, .. } => of_broker(settings).to_string(),
            Self::Only(only) => (*only).to_owned(),
            Self::AtCreation { of_broker, .. } => of_broker(settings).to_owned(),
        }
    }
}

/// All settings of a topic, by name.
pub fn describe(configs: &BTreeMap<String, String>, settings: &CatalogueSettings) -> Vec<ConfigEntry> {
    let defaults = CatalogueSettings::default();
    DEFINITIONS
        .iter()
        .map(|definition| {
            let of_broker = definition.takes.of_broker(settings);
            let built_in = definition.takes.of_broker(&defaults);
            let broker_source = if of_broker == built_in { ConfigSource::Default } else { ConfigSource::Broker };
            let mut synonyms = Vec::with_capacity(3);
            if let Some(value) = configs.get(definition.name) {
                synonyms.push((definition.name, value.clone(), ConfigSource::Topic));
            }
            if broker_source == ConfigSource::Broker {
                synonyms.push((definition.broker_name, of_broker.clone(), ConfigSource::Broker));
            }
            synonyms.push((definition.broker_name, built_in, ConfigSource::Default));
            let (value, source) =
                synonyms.first().map_or((of_broker, broker_source), |(_, value, source)| (value.clone(), *source));
            ConfigEntry {
                name: definition.name,
                value,
                kind: definition.kind,
                source,
                read_only: !matches!(definition.takes, Takes::Number { .. }),
                synonyms,
                documentation: definition.documentation,
            }
        })
        .collect()
}

/// The same settings under their broker names, as DescribeConfigs of a broker shows them.
pub fn describe_broker(settings: &CatalogueSettings) -> Vec<ConfigEntry> {
    let mut entries = describe(&BTreeMap::new(), settings);
    for (entry, definition) in entries.iter_mut().zip(DEFINITIONS) {
        entry.name = definition.broker_name;
        entry.read_only = true;
    }
    entries
}

/// A topic's settings, typed. What does not parse (a newer build wrote it) falls back to the broker's.
pub fn typed(configs: &BTreeMap<String, String>, settings: &CatalogueSettings) -> TopicConfig {
    let number = |name: &str| configs.get(name).and_then(|value| value.parse::<i64>().ok());
    let bytes = number("max.message.bytes").and_then(|bytes| usize::try_from(bytes).ok());
    TopicConfig {
        retention_ms: number("retention.ms").unwrap_or(settings.retention_ms),
        retention_bytes: number("retention.bytes").unwrap_or(settings.retention_bytes),
        max_message_bytes: bytes.unwrap_or(settings.max_message_bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(name: &str, value: &str) -> Result<BTreeMap<String, String>, String> {
        check(&[(name.to_owned(), Some(value.to_owned()))])
    }

    #[test]
    fn what_would_be_ignored_is_refused_and_says_so() {
        for (name, value, wanted) in [
            ("cleanup.policy", "compact", "always delete"),
            ("compression.type", "zstd", "always producer"),
            ("message.timestamp.type", "LogAppendTime", "always CreateTime"),
            ("min.insync.replicas", "2", "always 1"),
            ("segment.ms", "1000", "would be ignored"),
            ("retention.ms", "a week", "whole number"),
            ("retention.ms", "-2", "from -1"),
            ("max.message.bytes", "9999999999", "whole number"),
            ("tributary.engine", "tape", "file, object, memory"),
        ] {
            let refused = one(name, value).unwrap_err();
            assert!(refused.contains(wanted) && refused.contains(name), "{refused}");
        }
        assert!(check(&[("retention.ms".into(), None)]).unwrap_err().contains("no value"));
        let twice = [("retention.ms".into(), Some("1".into())), ("retention.ms".into(), Some("2".into()))];
        assert!(check(&twice).unwrap_err().contains("twice"));
        assert_eq!(one("retention.ms", "+007").unwrap()["retention.ms"], "7");
        for (name, value) in [("cleanup.policy", "delete"), ("retention.ms", " -1 "), ("max.message.bytes", "2000000")]
        {
            one(name, value).unwrap();
        }
    }

    fn set(name: &str, value: &str) -> (String, Alteration) {
        (name.to_owned(), Alteration::Set(value.to_owned()))
    }

    #[test]
    fn settings_are_altered_one_by_one() {
        let settings = CatalogueSettings::default();
        let current = one("retention.ms", "60000").unwrap();
        let alter = |alterations| alter(&current, alterations, &settings);
        let both = alter(vec![set("max.message.bytes", "2000")]).unwrap();
        assert_eq!((both["retention.ms"].as_str(), both["max.message.bytes"].as_str()), ("60000", "2000"));
        assert_eq!(alter(vec![set("retention.ms", "1")]).unwrap()["retention.ms"], "1");
        assert!(alter(vec![("retention.ms".into(), Alteration::Delete)]).unwrap().is_empty());
        let list = |alteration: fn(String) -> Alteration, value: &str| {
            alter(vec![("cleanup.policy".to_owned(), alteration(value.to_owned()))])
        };
        assert_eq!(list(Alteration::Append, "delete").unwrap()["cleanup.policy"], "delete");
        assert!(list(Alteration::Append, "compact").unwrap_err().contains("always delete"));
        assert!(list(Alteration::Subtract, "delete").unwrap_err().contains("always delete"));
        assert_eq!(list(Alteration::Subtract, "compact").unwrap()["cleanup.policy"], "delete");
        let refused = alter(vec![("retention.ms".into(), Alteration::Append("1".into()))]).unwrap_err();
        assert!(refused.contains("no list"), "{refused}");
        assert!(alter(vec![("segment.ms".into(), Alteration::Delete)]).unwrap_err().contains("would be ignored"));
    }

    #[test]
    fn an_engine_stays_whatever_is_altered() {
        let settings = CatalogueSettings::default();
        let (on_file, on_object) = (BTreeMap::new(), one(ENGINE_SETTING, "object").unwrap());
        let engine = |current, value: &str| alter(current, vec![set(ENGINE_SETTING, value)], &settings);
        assert_eq!(engine(&on_file, "file").unwrap()[ENGINE_SETTING], "file");
        assert_eq!(engine(&on_object, "object").unwrap(), on_object);
        for refused in [
            engine(&on_file, "object"),
            engine(&on_object, "file"),
            alter(&on_object, vec![(ENGINE_SETTING.to_owned(), Alteration::Delete)], &settings),
            replace(&on_object, &[(ENGINE_SETTING.to_owned(), Some("memory".to_owned()))], &settings),
        ] {
            assert!(refused.unwrap_err().contains("Make another topic"));
        }
        let replaced = replace(&on_object, &[("retention.ms".to_owned(), Some("5".to_owned()))], &settings).unwrap();
        assert_eq!((replaced[ENGINE_SETTING].as_str(), replaced["retention.ms"].as_str()), ("object", "5"));
        assert_eq!(replace(&replaced, &[], &settings).unwrap(), on_object);
    }

    #[test]
    fn a_value_says_where_it_comes_from() {
        let configs = one("retention.ms", "60000").unwrap();
        let settings = CatalogueSettings { retention_bytes: 5, ..CatalogueSettings::default() };
        let entries = describe(&configs, &settings);
        let find = |name: &str| entries.iter().find(|entry| entry.name == name).unwrap();
        let time = find("retention.ms");
        assert_eq!((time.value.as_str(), time.source), ("60000", ConfigSource::Topic));
        assert_eq!(time.synonyms.len(), 2);
        let bytes = find("retention.bytes");
        assert_eq!((bytes.value.as_str(), bytes.source, bytes.read_only), ("5", ConfigSource::Broker, false));
        assert_eq!(bytes.synonyms.last().unwrap().2, ConfigSource::Default);
        let policy = find("cleanup.policy");
        assert_eq!((policy.value.as_str(), policy.source, policy.read_only), ("delete", ConfigSource::Default, true));
        assert_eq!(typed(&configs, &settings).retention_ms, 60_000);
        assert_eq!(typed(&configs, &settings).retention_bytes, 5);
        assert!(describe_broker(&settings).iter().any(|e| e.name == "log.retention.bytes" && e.value == "5"));
        assert!(entries.is_sorted_by_key(|entry| entry.name));
    }
}
