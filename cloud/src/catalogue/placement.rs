//! Which shards a new topic's partitions go to: by its setting `tributary.engine`, else by its name, else as the
//! catalogue's own shard.

use std::collections::BTreeMap;

use shared::name::TopicName;

use crate::state::{CATALOGUE, Engine};

/// The topic setting that names an engine.
pub const ENGINE_SETTING: &str = "tributary.engine";

/// A name pattern and the engine of new topics that match it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineRule {
    /// A topic's name, in which `*` stands for any characters.
    pub pattern: String,
    /// The engine.
    pub engine: Engine,
}

/// The shards there are, and how topics come to them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    shards: BTreeMap<Engine, Vec<u32>>,
    rules: Vec<EngineRule>,
    default: Engine,
}

impl Default for Placement {
    /// Everything in the catalogue's shard, on the local disk.
    fn default() -> Self {
        Self::new([(CATALOGUE, Engine::File)], Vec::new())
    }
}

impl Placement {
    /// Over these shards. The first rule whose pattern matches a topic's name counts.
    pub fn new(shards: impl IntoIterator<Item = (u32, Engine)>, rules: Vec<EngineRule>) -> Self {
        let mut by_engine: BTreeMap<Engine, Vec<u32>> = BTreeMap::new();
        for (shard, engine) in shards {
            by_engine.entry(engine).or_default().push(shard);
        }
        let of_catalogue = by_engine.iter().find(|(_, shards)| shards.contains(&CATALOGUE)).map(|(engine, _)| *engine);
        Self { shards: by_engine, rules, default: of_catalogue.unwrap_or(Engine::File) }
    }

    /// The engine of topics for which nothing says another.
    pub fn default_engine(&self) -> Engine {
        self.default
    }

    /// The engine and shards of a new topic with these settings. The text says why there are none.
    pub fn place(&self, name: &TopicName, configs: &BTreeMap<String, String>) -> Result<(Engine, Vec<u32>), String> {
        let ruled = || self.rules.iter().find(|rule| matches(&rule.pattern, name.as_str())).map(|rule| rule.engine);
        let set = configs.get(ENGINE_SETTING).and_then(|engine| Engine::parse(engine));
        let engine = set.or_else(ruled).unwrap_or(self.default);
        let shards = self.shards.get(&engine).cloned().ok_or_else(|| {
            let there: Vec<&str> = self.shards.keys().map(|engine| engine.name()).collect();
            format!(
                "topic {name} is to have the engine {engine}, and this broker has no shard of that kind, only of {}: \
                 set [shards] {engine} = 1 or more",
                there.join(" and ")
            )
        })?;
        Ok((engine, shards))
    }
}

/// Whether `name` is what `pattern` says, `*` being any characters or none.
fn matches(pattern: &str, name: &str) -> bool {
    let Some((head, rest)) = pattern.split_once('*') else { return pattern == name };
    let Some(mut left) = name.strip_prefix(head) else { return false };
    let mut parts: Vec<&str> = rest.split('*').collect();
    let tail = parts.pop().unwrap_or_default();
    for part in parts {
        // The first place is the best one: it leaves most for what follows.
        let Some(at) = left.find(part) else { return false };
        left = left.get(at + part.len()..).unwrap_or_default();
    }
    left.ends_with(tail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_is_any_characters() {
        for (pattern, name, expected) in [
            ("a", "a", true),
            ("a", "ab", false),
            ("*", "", true),
            ("*", "anything", true),
            ("metrics.*", "metrics.cpu", true),
            ("metrics.*", "metrics", false),
            ("*.tmp", "a.tmp", true),
            ("*.tmp", "a.tmp.b", false),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-c-b", false),
            ("aa*aa", "aaa", false),
            ("*a*a*", "a", false),
            ("é*", "éa", true),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn a_setting_beats_a_rule_and_a_rule_the_default() {
        let rule = |pattern: &str, engine| EngineRule { pattern: pattern.to_owned(), engine };
        let rules = vec![rule("cache.*", Engine::Memory), rule("*", Engine::Object)];
        let shards = [(0, Engine::File), (1, Engine::Object), (2, Engine::Object), (3, Engine::Memory)];
        let place = |rules: Vec<EngineRule>, name: &str, set: Option<&str>| {
            let configs = set.map(|set| (ENGINE_SETTING.to_owned(), set.to_owned())).into_iter().collect();
            Placement::new(shards, rules).place(&TopicName::parse(name).unwrap(), &configs).unwrap()
        };
        assert_eq!(place(rules.clone(), "cache.a", None), (Engine::Memory, vec![3]));
        assert_eq!(place(rules.clone(), "other", None), (Engine::Object, vec![1, 2]));
        assert_eq!(place(rules, "cache.a", Some("file")), (Engine::File, vec![0]));
        assert_eq!(place(Vec::new(), "other", None), (Engine::File, vec![0]));
        let object_only = Placement::new([(0, Engine::Object)], Vec::new());
        assert_eq!(object_only.default_engine(), Engine::Object);
    }

    #[test]
    fn an_engine_without_shards_says_what_to_set() {
        let configs = BTreeMap::from([(ENGINE_SETTING.to_owned(), "memory".to_owned())]);
        let refused = Placement::default().place(&TopicName::parse("t").unwrap(), &configs).unwrap_err();
        assert!(refused.contains("[shards] memory = 1") && refused.contains("only of file"), "{refused}");
    }
}
