//! Layered settings: defaults, file, environment, flags; later layers win, and every value knows where it came from.
//!
//! Pure: the text of the file, the environment's variables and the flags are passed in. A key that is unknown or has a
//! value of the wrong kind is refused with its name, its place (line, variable or flag), what was expected and the kind of
//! what came. The value itself is not shown: it may be a secret under a key that is misspelt or of the wrong kind.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{DeserializeOwned, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use toml::de::{DeTable, DeValue};
use toml::{Table, Value};

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Nobody set it.
    Default,
    /// The configuration file, at a line.
    File {
        /// From 1.
        line: usize,
    },
    /// An environment variable.
    Env(String),
    /// A command line flag.
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { line } => write!(f, "file, line {line}"),
            Self::Env(name) => write!(f, "environment {name}"),
            Self::Flag(name) => write!(f, "flag {name}"),
        }
    }
}

/// Why settings were refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The file; the text shows line, key and what was expected.
    #[error("configuration file {path}: {text}")]
    File {
        /// As given on the command line.
        path: String,
        /// The parser's own words with line and column.
        text: String,
    },
    /// A variable or flag.
    #[error("{origin}: {text}")]
    Override {
        /// Which.
        origin: String,
        /// What was wrong and what was expected.
        text: String,
    },
}

/// The layers read so far, over a settings type `T` whose every field has a default and that denies unknown fields.
#[derive(Debug)]
pub struct Layers {
    values: Table,
    origins: BTreeMap<String, Origin>,
}

/// Settings and where each came from.
#[derive(Debug, Clone)]
pub struct Loaded<T> {
    /// The settings in force.
    pub settings: T,
    origins: BTreeMap<String, Origin>,
}

impl Layers {
    /// Reads a file's text, checks it alone (so that errors name lines), and lays it over the defaults.
    pub fn file<T: DeserializeOwned>(path: &str, text: &str) -> Result<Self, ConfigError> {
        let refused = |error: toml::de::Error| ConfigError::File { path: path.to_owned(), text: placed(text, &error) };
        toml::from_str::<T>(text).map_err(refused)?;
        let values = toml::from_str::<Table>(text).map_err(refused)?;
        let mut origins = BTreeMap::new();
        let table = DeTable::parse(text).map_err(refused)?;
        note_lines(text, "", table.get_ref(), &mut origins);
        Ok(Self { values, origins })
    }

    /// No file.
    pub fn empty() -> Self {
        Self { values: Table::new(), origins: BTreeMap::new() }
    }

    /// Lays the variables that begin with `prefix` over what is there: `PREFIX__MQTT__LISTEN` is `mqtt.listen`; a value
    /// is read as TOML if it is TOML of the right kind (inline tables and arrays), else as a string.
    pub fn env<T: DeserializeOwned>(
        &mut self,
        prefix: &str,
        variables: impl IntoIterator<Item = (String, String)>,
    ) -> Result<(), ConfigError> {
        let prefix = format!("{prefix}__");
        let mut mine: Vec<_> = variables.into_iter().filter(|(name, _)| name.starts_with(&prefix)).collect();
        mine.sort();
        for (name, value) in mine {
            let key = name[prefix.len()..].to_lowercase().replace("__", ".");
            self.lay::<T>(&key, &value, Origin::Env(name))?;
        }
        Ok(())
    }

    /// Lays one flag over what is there.
    pub fn flag<T: DeserializeOwned>(&mut self, flag: &str, key: &str, value: &str) -> Result<(), ConfigError> {
        self.lay::<T>(key, value, Origin::Flag(flag.to_owned()))
    }

    fn lay<T: DeserializeOwned>(&mut self, key: &str, value: &str, origin: Origin) -> Result<(), ConfigError> {
        let as_text = Value::String(value.to_owned());
        let parsed = toml::from_str::<Table>(&format!("v = {value}")).ok().and_then(|mut t| t.remove("v"));
        let mut refused = None;
        for candidate in parsed.into_iter().chain([as_text]) {
            let mut table = Table::new();
            put(&mut table, key, candidate.clone()).map_err(|text| self.refuse(&origin, &text))?;
            match T::deserialize(table) {
                Ok(_) => {
                    put(&mut self.values, key, candidate.clone()).map_err(|text| self.refuse(&origin, &text))?;
                    let is_below = |k: &str| k.strip_prefix(key).is_some_and(|rest| rest.starts_with(['.', '[']));
                    self.origins.retain(|k, _| !is_below(k));
                    note_all(key, &candidate, &origin, &mut self.origins);
                    return Ok(());
                }
                // The first reading is the better one to complain about: a table was meant as a table.
                Err(error) => refused = refused.or(Some(error)),
            }
        }
        let text = refused.map(|e| without_values(e.message())).unwrap_or_default();
        Err(self.refuse(&origin, &format!("{key}: {text}")))
    }

    fn refuse(&self, origin: &Origin, text: &str) -> ConfigError {
        ConfigError::Override { origin: origin.to_string(), text: text.to_owned() }
    }

    /// The settings in force.
    pub fn load<T: DeserializeOwned>(self) -> Result<Loaded<T>, ConfigError> {
        let settings = T::deserialize(self.values)
            .map_err(|e| ConfigError::Override { origin: "settings".into(), text: without_values(e.message()) })?;
        Ok(Loaded { settings, origins: self.origins })
    }
}

impl<T: Serialize> Loaded<T> {
    /// The effective settings, a line each: `key = value   # origin`. Secrets serialise themselves as `"(set)"`.
    pub fn describe(&self) -> Result<String, toml::ser::Error> {
        let mut lines = Vec::new();
        flatten("", &Value::try_from(&self.settings)?, &mut lines);
        let width = lines.iter().map(|(k, v)| k.len() + v.len()).max().unwrap_or(0).min(70);
        Ok(lines
            .into_iter()
            .map(|(key, value)| {
                let pad = " ".repeat(width.saturating_sub(key.len() + value.len()));
                format!("{key} = {value}{pad}  # {}\n", self.origin(&key))
            })
            .collect())
    }

    /// Where the value of `key` came from.
    pub fn origin(&self, key: &str) -> Origin {
        // What may be given as one table or as an array of them is shown as an array.
        let single = || self.origins.get(&key.replace("[0]", ""));
        self.origins.get(key).or_else(single).cloned().unwrap_or(Origin::Default)
    }
}

fn note_lines(text: &str, prefix: &str, table: &DeTable<'_>, origins: &mut BTreeMap<String, Origin>) {
    let line = |span: Range<usize>| 1 + text.as_bytes().iter().take(span.start).filter(|b| **b == b'\n').count();
    for (key, value) in table {
        let path = join(prefix, key.get_ref());
        match value.get_ref() {
            DeValue::Table(inner) => note_lines(text, &path, inner, origins),
            DeValue::Array(items) => {
                origins.insert(path.clone(), Origin::File { line: line(key.span()) });
                for (index, item) in items.iter().enumerate() {
                    if let DeValue::Table(inner) = item.get_ref() {
                        note_lines(text, &format!("{path}[{index}]"), inner, origins);
                    }
                }
            }
            _ => {
                origins.insert(path, Origin::File { line: line(key.span()) });
            }
        }
    }
}

/// Notes one origin for a value and all in it.
fn note_all(path: &str, value: &Value, origin: &Origin, origins: &mut BTreeMap<String, Origin>) {
    match value {
        Value::Table(table) => table.iter().for_each(|(key, value)| note_all(&join(path, key), value, origin, origins)),
        Value::Array(items) => {
            origins.insert(path.to_owned(), origin.clone());
            let tables = items.iter().enumerate().filter(|(_, item)| item.is_table());
            tables.for_each(|(index, item)| note_all(&format!("{path}[{index}]"), item, origin, origins));
        }
        _ => {
            origins.insert(path.to_owned(), origin.clone());
        }
    }
}

/// An error of the parser with its line, column and key. The parser's own words show the line, and a secret with it.
fn placed(text: &str, error: &toml::de::Error) -> String {
    let message = without_values(error.message());
    let Some(before) = error.span().and_then(|span| text.get(..span.start)) else { return message };
    let line = 1 + before.matches('\n').count();
    let begin = before.rfind('\n').map_or(0, |at| at + 1);
    let column = 1 + before.get(begin..).map_or(0, |part| part.chars().count());
    let written = text.get(begin..).and_then(|rest| rest.lines().next()).unwrap_or_default();
    let key = written.split_once('=').map(|(key, _)| key.trim()).filter(|key| {
        !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.'))
    });
    let key = key.map_or(String::new(), |key| format!(", at `{key}`"));
    format!("line {line}, column {column}{key}: {message}")
}

/// What serde says, without what it quotes: ``invalid type: string "x", expected a number`` shows a value of a kind that the key
/// does not take, so it may be another key's. What a key's own reader says of its own text stays.
fn without_values(message: &str) -> String {
    let message = message.trim();
    let Some(rest) = message.strip_prefix("invalid type: ") else { return message.replace('\n', "; ") };
    let Some((found, expected)) = rest.rsplit_once(", expected ") else { return "invalid type".to_owned() };
    let kind = found.split(['`', '"']).next().unwrap_or_default().trim();
    format!("invalid type: {kind}, expected {expected}")
}

fn join(prefix: &str, key: &str) -> String {
    if prefix.is_empty() { key.to_owned() } else { format!("{prefix}.{key}") }
}

fn put(table: &mut Table, key: &str, value: Value) -> Result<(), String> {
    match key.split_once('.') {
        None if key.is_empty() => Err("the key is empty".to_owned()),
        None => {
            table.insert(key.to_owned(), value);
            Ok(())
        }
        Some((first, rest)) => {
            let inner = table.entry(first).or_insert_with(|| Value::Table(Table::new()));
            match inner {
                Value::Table(inner) => put(inner, rest, value),
                _ => Err(format!("{first} is not a table here; set it as a whole")),
            }
        }
    }
}

fn flatten(prefix: &str, value: &Value, lines: &mut Vec<(String, String)>) {
    match value {
        Value::Table(table) => table.iter().for_each(|(key, value)| flatten(&join(prefix, key), value, lines)),
        Value::Array(items) if items.iter().any(Value::is_table) => {
            for (index, item) in items.iter().enumerate() {
                flatten(&format!("{prefix}[{index}]"), item, lines);
            }
        }
        Value::String(text) if prefix.rsplit('.').next() == Some("url") => {
            lines.push((prefix.to_owned(), Value::String(redacted(text)).to_string()));
        }
        other => lines.push((prefix.to_owned(), other.to_string())),
    }
}

/// A number of bytes: an integer, or text with a unit (`"64 KiB"`, `"8MiB"`, `"1GiB"`, `"500MB"`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct ByteSize(pub u64);

/// A length of time: an integer number of seconds, or text with a unit (`"250ms"`, `"10s"`, `"5m"`, `"1h"`, `"7d"`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Span(pub Duration);

/// Splits `"64 KiB"` into 64 and `"KiB"`.
fn number_and_unit(text: &str) -> Option<(u64, &str)> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    Some((text[..digits].parse().ok()?, text[digits..].trim()))
}

impl ByteSize {
    const UNITS: [(&'static str, u64); 7] = [
        ("GiB", 1 << 30),
        ("MiB", 1 << 20),
        ("KiB", 1 << 10),
        ("GB", 1_000_000_000),
        ("MB", 1_000_000),
        ("kB", 1_000),
        ("B", 1),
    ];

    /// Reads text with a unit.
    pub fn parse(text: &str) -> Option<Self> {
        let (number, unit) = number_and_unit(text)?;
        let (_, factor) = Self::UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit))?;
        number.checked_mul(*factor).map(Self)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = Self::UNITS.iter().take(3).find(|(_, factor)| self.0 >= *factor && self.0.is_multiple_of(*factor));
        match unit {
            Some((name, factor)) => write!(f, "{} {name}", self.0 / factor),
            None => write!(f, "{} B", self.0),
        }
    }
}

impl Span {
    const UNITS: [(&'static str, u64); 5] =
        [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];

    /// So many milliseconds.
    pub const fn millis(millis: u64) -> Self {
        Self(Duration::from_millis(millis))
    }

    /// So many seconds.
    pub const fn secs(secs: u64) -> Self {
        Self(Duration::from_secs(secs))
    }

    /// Reads text with a unit.
    pub fn parse(text: &str) -> Option<Self> {
        let (number, unit) = number_and_unit(text)?;
        let (_, factor) = Self::UNITS.iter().find(|(name, _)| *name == unit)?;
        number.checked_mul(*factor).map(Self::millis)
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = self.0.as_millis() as u64;
        let unit = Self::UNITS.iter().find(|(_, factor)| millis >= *factor && millis.is_multiple_of(*factor));
        match unit {
            Some((name, factor)) => write!(f, "{}{name}", millis / factor),
            None => write!(f, "{millis}ms"),
        }
    }
}

macro_rules! measure {
    ($name:ident, $from:expr, $expected:literal) => {
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Measure;
                impl Visitor<'_> for Measure {
                    type Value = $name;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($expected)
                    }
                    fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<$name, E> {
                        let number = u64::try_from(number)
                            .map_err(|_| E::invalid_value(serde::de::Unexpected::Signed(number), &self))?;
                        Ok($from(number))
                    }
                    fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<$name, E> {
                        Ok($from(number))
                    }
                    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<$name, E> {
                        $name::parse(text).ok_or_else(|| E::invalid_value(serde::de::Unexpected::Str(text), &self))
                    }
                }
                deserializer.deserialize_any(Measure)
            }
        }
    };
}

measure!(ByteSize, ByteSize, "a number of bytes, as 1048576 or \"1 MiB\"");
measure!(Span, Span::secs, "a time, as 10 (seconds), \"250ms\", \"10s\", \"5m\", \"1h\" or \"7d\"");

/// Where a server listens: an IP address and port, or `localhost:PORT`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListenAddr(pub SocketAddr);

impl ListenAddr {
    /// A port on the loopback address.
    pub const fn loopback(port: u16) -> Self {
        Self(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port))
    }

    /// Refuses what would be open to a network without anybody having said so (`what` names the listener's key).
    pub fn check_exposure(self, what: &str, authenticated: bool, fix: &str, open: bool) -> Result<(), String> {
        if self.0.ip().is_loopback() || authenticated || open {
            return Ok(());
        }
        Err(format!(
            "{what} = \"{}\" is reachable from other machines and asks nobody who they are. Either {fix}, or set \
             allow_anonymous = true on this listener if that is what you want",
            self.0
        ))
    }
}

impl ListenAddr {
    /// Refuses to take `secrets` in plain text where others may listen (`what` names the listener's key).
    pub fn check_plaintext(self, what: &str, secrets: &str, takes: bool, fix: &str, open: bool) -> Result<(), String> {
        if self.0.ip().to_canonical().is_loopback() || !takes || open {
            return Ok(());
        }
        Err(format!(
            "{what} = \"{}\" would take {secrets} from other machines in plain text, for everyone on the way to read. Either \
             {fix}, or set allow_plaintext = true on this listener if that is what you want",
            self.0
        ))
    }
}

/// Refuses two listeners (by their keys) on one address.
pub fn distinct_listeners<'a>(listeners: impl IntoIterator<Item = (&'a str, ListenAddr)>) -> Result<(), String> {
    let mut seen: Vec<(&str, SocketAddr)> = Vec::new();
    for (key, ListenAddr(address)) in listeners {
        let meets = |other: &SocketAddr| {
            let same_family = other.is_ipv4() == address.is_ipv4();
            let any = (other.ip().is_unspecified() || address.ip().is_unspecified()) && same_family;
            // Port 0 is a free one each time.
            other.port() == address.port() && address.port() != 0 && (other.ip() == address.ip() || any)
        };
        if let Some((other, at)) = seen.iter().find(|(_, at)| meets(at)) {
            return Err(format!(
                "{other} = \"{at}\" and {key} = \"{address}\" are one address: give one of them another port"
            ));
        }
        seen.push((key, address));
    }
    Ok(())
}

/// Whether a URL's host is this machine. A host that is named in another way than `localhost` may be anywhere.
pub fn is_loopback_url(url: &str) -> bool {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name.eq_ignore_ascii_case("localhost")
        || name.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
}

impl fmt::Display for ListenAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Serialize for ListenAddr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for ListenAddr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error as _;
        let text = String::deserialize(deserializer)?;
        let loopback = text.strip_prefix("localhost:").map(|port| format!("127.0.0.1:{port}"));
        loopback.as_ref().unwrap_or(&text).parse().map(Self).map_err(|_| {
            D::Error::custom(format!("{text:?} is not an address: expected IP:PORT as 127.0.0.1:1883 or [::1]:1883"))
        })
    }
}

/// A certificate chain and its key, PEM files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// Certificate chain, the server's own first.
    pub cert_file: PathBuf,
    /// Private key.
    pub key_file: PathBuf,
}

/// One table or an array of them: `[uplink]` is the short form of `[[uplink]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OneOrMany<T>(pub Vec<T>);

impl<T> Default for OneOrMany<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Serialize> Serialize for OneOrMany<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for OneOrMany<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // By hand, for serde's untagged enums hide which key was wrong.
        struct Forms<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Forms<T> {
            type Value = OneOrMany<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a table or an array of tables")
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(|one| OneOrMany(vec![one]))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Self::Value, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(seq)).map(OneOrMany)
            }
        }
        deserializer.deserialize_any(Forms(PhantomData))
    }
}

/// A value that is never shown.
#[derive(Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Wraps a value, read from a file for instance.
    pub fn new(value: String) -> Self {
        Self(value)
    }

    /// The value, for those who must send it.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// Whether it has no characters: such a one opens nothing.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether `claimed` is the value; the time it takes tells no more than the length. Nothing is an empty one's value.
    pub fn matches(&self, claimed: &[u8]) -> bool {
        let own = self.0.as_bytes();
        let differs = own.iter().zip(claimed).fold(0, |differs, (a, b)| differs | (a ^ b));
        std::hint::black_box(differs) == 0 && own.len() == claimed.len() && !own.is_empty()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(set)")
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str("(set)")
    }
}

/// A URL as it may be shown: without the user's name and password that may stand before its host, and without its query.
pub fn redacted(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").map_or(("", url), |(scheme, rest)| (scheme, rest));
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    let (user, host) = match authority.rsplit_once('@') {
        Some((_, host)) => ("(hidden)@", host),
        None => ("", authority),
    };
    let (path, hidden) = match path.find(['?', '#']) {
        Some(at) => (&path[..at], "?(hidden)"),
        None => (path, ""),
    };
    let separator = if scheme.is_empty() { "" } else { "://" };
    format!("{scheme}{separator}{user}{host}{path}{hidden}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default, Serialize, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Settings {
        id: String,
        mqtt: Mqtt,
        stream: Vec<Stream>,
    }

    #[derive(Debug, Default, Serialize, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Mqtt {
        listen: String,
        keep_alive: Span,
        packet_bytes_max: ByteSize,
        token: Option<Secret>,
    }

    #[derive(Debug, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Stream {
        name: String,
    }

    const FILE: &str = "id = \"gw\"\n[mqtt]\nlisten = \"a:1\"\ntoken = \"hush\"\n\n[[stream]]\nname = \"s\"\n";

    #[test]
    fn flags_beat_the_environment_which_beats_the_file() {
        let mut layers = Layers::file::<Settings>("x.toml", FILE).unwrap();
        let variables = [
            ("E__MQTT__KEEP_ALIVE", "5m"),
            ("E__ID", "17"),
            ("E__STREAM", "[{ name = \"other\" }]"),
            ("OTHER__ID", "no"),
        ];
        layers.env::<Settings>("E", variables.map(|(a, b)| (a.to_owned(), b.to_owned()))).unwrap();
        layers.flag::<Settings>("--set", "mqtt.packet_bytes_max", "2 MiB").unwrap();
        let loaded = layers.load::<Settings>().unwrap();
        let settings = &loaded.settings;
        assert_eq!((settings.id.as_str(), settings.mqtt.listen.as_str()), ("17", "a:1"));
        assert_eq!(settings.mqtt.keep_alive, Span::secs(300));
        assert_eq!(settings.mqtt.packet_bytes_max, ByteSize(2 << 20));
        assert_eq!(settings.stream[0].name, "other");
        assert_eq!(loaded.origin("mqtt.listen"), Origin::File { line: 3 });
        assert_eq!(loaded.origin("stream[0].name"), Origin::Env("E__STREAM".into()));
        let text = loaded.describe().unwrap();
        assert!(text.contains("mqtt.keep_alive = \"5m\""), "{text}");
        assert!(!text.contains("hush"), "{text}");
        assert!(text.contains("# flag --set"), "{text}");
    }

    #[test]
    fn a_wrong_key_is_named_with_its_line_and_what_was_expected() {
        let check = |text: &str, expected: &[&str]| {
            let error = Layers::file::<Settings>("edge.toml", text).unwrap_err().to_string();
            for part in expected {
                assert!(error.contains(part), "{error}\nlacks {part}");
            }
        };
        check("id = \"a\"\nlisen = 1\n", &["edge.toml", "line 2", "lisen", "expected one of", "`mqtt`"]);
        check("[mqtt]\nlisten = 5\n", &["line 2", "listen", "expected a string"]);
        check("[mqtt]\nkeep_alive = \"5 fortnights\"\n", &["line 2", "\"10s\""]);
        check("[[stream]]\nname = \"a\"\nnmae = 1\n", &["line 3", "nmae"]);
        check("id = \n", &["line 1", "`id`"]);
        check("id = \"a\"\n[mqtt]\nlisten = a:1\n", &["line 3", "`listen`"]);
    }

    #[test]
    fn no_error_shows_a_value_that_may_be_a_secret() {
        for text in [
            "[mqtt]\ntoken = hunter2\n",
            "[mqtt]\ntoken = \"hunter2\n",
            "[mqtt]\ntoken = [\"hunter2\"]\n",
            "[mqtt]\ntoken = { a = \"hunter2\" }\n",
            "[mqtt]\ntokn = \"hunter2\"\n",
            "mqtt = \"hunter2\"\n",
            "stream = [\"hunter2\"]\n",
            "stream = [{ name = \"a\", token = \"hunter2\" }]\n",
            "stream = [{ name = \"a\", token = \"hunter2 }]\n",
            "[mqtt]\ntoken = \"a\"\ntoken = \"hunter2\"\n",
            "[mqtt]\ntoken = \"\"\"hunter2\n",
            "[mqtt]\ntoken: \"hunter2\"\n",
            "[mqtt]\ntoken \"hunter2\"\n",
            "[mqtt]\ntoken = \"hunter2\" \"hunter2\"\n",
            "[mqtt]\ntoken = \"\\hunter2\"\n",
        ] {
            let error = Layers::file::<Settings>("x.toml", text).unwrap_err();
            let shown = format!("{error} {error:?}");
            assert!(!shown.contains("hunter2") && shown.contains("line "), "{text}: {shown}");
        }
        for (key, value) in [
            ("E__MQTT__TOKN", "hunter2"),
            ("E__MQTT__TOKEN__FILE", "hunter2"),
            ("E__MQTT__TOKEN", "[\"hunter2\""),
            ("E__MQTT", "hunter2"),
            ("E__MQTT", "{ token = \"hunter2\", x = 1 }"),
            ("E__MQTT", "{ tokn = \"hunter2\" }"),
            ("E__STREAM", "hunter2"),
            ("E__STREAM", "[\"hunter2\"]"),
            ("E__STREAM", "[{ name = \"a\", password = \"hunter2\" }]"),
            ("E__STREAM", "[{ name = \"a\", password = \"hunter2\" "),
            ("E__TOKEN", "hunter2"),
        ] {
            let mut layers = Layers::empty();
            let taken = layers.env::<Settings>("E", [(key.to_owned(), value.to_owned())]);
            let Err(error) = taken else {
                // A secret may be any text.
                assert_eq!(key, "E__MQTT__TOKEN");
                continue;
            };
            let shown = format!("{error} {error:?}");
            assert!(!shown.contains("hunter2") && shown.contains(key), "{key}={value}: {shown}");
            let error = Layers::empty().flag::<Settings>("--set", &key[3..].to_lowercase().replace("__", "."), value);
            assert!(!format!("{error:?}").contains("hunter2"), "{error:?}");
        }
    }

    #[test]
    fn every_value_knows_its_own_origin() {
        let text = "[mqtt]\nlisten = \"a\"\n[one]\na = 1\n[[stream]]\nname = \"s\"\n[[stream]]\nname = \"t\"\n\
                    tags = [\"x\"]\nmore = { a = 2 }\n";
        #[derive(Debug, Default, Serialize, Deserialize)]
        #[serde(default)]
        struct All {
            mqtt: BTreeMap<String, String>,
            one: OneOrMany<BTreeMap<String, u8>>,
            stream: Vec<Row>,
        }
        #[derive(Debug, Default, Serialize, Deserialize)]
        #[serde(default)]
        struct Row {
            name: String,
            tags: Vec<String>,
            more: BTreeMap<String, u8>,
        }
        let mut layers = Layers::file::<All>("x.toml", text).unwrap();
        layers.env::<All>("E", [("E__ONE__B".to_owned(), "2".to_owned())]).unwrap();
        let described = layers.load::<All>().unwrap().describe().unwrap();
        for (key, origin) in [
            ("mqtt.listen", "file, line 2"),
            ("one[0].a", "file, line 4"),
            ("one[0].b", "environment E__ONE__B"),
            ("stream[0].name", "file, line 6"),
            ("stream[0].tags", "default"),
            ("stream[1].name", "file, line 8"),
            ("stream[1].tags", "file, line 9"),
            ("stream[1].more.a", "file, line 10"),
        ] {
            let line = described.lines().find(|line| line.starts_with(&format!("{key} ="))).unwrap_or_default();
            assert!(line.ends_with(&format!("# {origin}")), "{key}: {line:?} in\n{described}");
        }
        let mut layers = Layers::file::<All>("x.toml", text).unwrap();
        layers.flag::<All>("--set", "stream", "[{ name = \"f\" }]").unwrap();
        let loaded = layers.load::<All>().unwrap();
        assert_eq!(loaded.origin("stream[0].name"), Origin::Flag("--set".into()));
        assert_eq!(loaded.origin("stream[0].tags"), Origin::Default);
        assert_eq!(loaded.origin("stream[1].name"), Origin::Default);
    }

    #[test]
    fn a_wrong_variable_is_named() {
        let mut layers = Layers::empty();
        let variables = [("E__MQTT__LISEN".to_owned(), "x".to_owned())];
        let error = layers.env::<Settings>("E", variables).unwrap_err().to_string();
        assert!(error.contains("E__MQTT__LISEN") && error.contains("`listen`"), "{error}");
    }

    #[test]
    fn measures_read_and_show_their_units() {
        for (text, bytes) in [("1 KiB", 1024), ("8MiB", 8 << 20), ("500MB", 500_000_000), ("7 b", 7)] {
            assert_eq!(ByteSize::parse(text), Some(ByteSize(bytes)), "{text}");
        }
        assert_eq!(ByteSize::parse("99999999999 GiB"), None);
        assert_eq!(ByteSize(8 << 20).to_string(), "8 MiB");
        assert_eq!(Span::parse("250ms"), Some(Span::millis(250)));
        assert_eq!(Span::parse("1w"), None);
        assert_eq!(Span::secs(7200).to_string(), "2h");
        assert_eq!(Span::millis(0).to_string(), "0ms");
    }

    #[test]
    fn two_listeners_on_one_address_are_refused() {
        let check = |a: &str, b: &str| {
            distinct_listeners([("a", ListenAddr(a.parse().unwrap())), ("b", ListenAddr(b.parse().unwrap()))])
        };
        assert!(check("127.0.0.1:1", "127.0.0.1:1").unwrap_err().contains("a = \"127.0.0.1:1\" and b"));
        assert!(check("0.0.0.0:1", "127.0.0.1:1").is_err());
        for (a, b) in [
            ("127.0.0.1:1", "127.0.0.1:2"),
            ("127.0.0.1:1", "127.0.0.2:1"),
            ("127.0.0.1:0", "127.0.0.1:0"),
            ("0.0.0.0:1", "[::]:1"),
        ] {
            assert_eq!(check(a, b), Ok(()), "{a} {b}");
        }
    }

    #[test]
    fn a_url_of_this_machine_is_known() {
        for (url, expected) in [
            ("http://127.0.0.1:9480", true),
            ("http://127.8.0.1", true),
            ("http://localhost:1/x", true),
            ("http://[::1]:9480", true),
            ("http://user:p@127.0.0.1:1", true),
            ("http://10.0.0.1:9480", false),
            ("http://127.0.0.1@evil.example", false),
            ("http://localhost.example", false),
            ("http://cloud", false),
        ] {
            assert_eq!(is_loopback_url(url), expected, "{url}");
        }
    }

    #[test]
    fn a_url_is_shown_without_what_may_be_secret() {
        for (url, shown) in [
            ("https://host:1/p", "https://host:1/p"),
            ("https://user:pass@host:1/p?token=x", "https://(hidden)@host:1/p?(hidden)"),
            ("s3://key:p@ss@bucket", "s3://(hidden)@bucket"),
            ("https://token@host#f", "https://(hidden)@host?(hidden)"),
            ("user:pass@host", "(hidden)@host"),
            ("https://host/a@b", "https://host/a@b"),
            ("", ""),
        ] {
            assert_eq!(redacted(url), shown, "{url}");
        }
    }

    #[test]
    fn a_secret_matches_itself_and_an_empty_one_nothing() {
        let secret = |value: &str| Secret::new(value.to_owned());
        for (own, claimed, expected) in [
            ("right", "right", true),
            ("right", "wrong", false),
            ("right", "right and more", false),
            ("right", "righ", false),
            ("right", "", false),
            ("", "anything", false),
            ("", "", false),
        ] {
            assert_eq!(secret(own).matches(claimed.as_bytes()), expected, "{own:?} {claimed:?}");
        }
    }
}
