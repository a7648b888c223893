//! Settings of the cloud broker: the shape of `cloud.toml`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use daemon::admin::DefaultPort;
use daemon::descriptors::{DoorShare, share};
use serde::{Deserialize, Serialize};
use shared::config::{ByteSize, ListenAddr, Secret, Span, TlsFiles, distinct_listeners, redacted};
use shared::name::{EdgeId, TopicName};

use crate::archive::{RequestSettings, STORAGE_CLASS};
use crate::state::Engine;

/// `cloud.toml`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CloudConfig {
    /// This node's number, as Kafka clients see it.
    pub node_id: i32,
    /// Where everything local rests.
    pub data_dir: PathBuf,
    /// Kafka clients.
    pub kafka: KafkaConfig,
    /// Edges.
    pub link: LinkConfig,
    /// Health, status and metrics.
    pub admin: AdminConfig,
    /// Object storage.
    pub archive: ArchiveConfig,
    /// The local log.
    pub wal: WalConfig,
    /// How many shards there are of each engine.
    pub shards: ShardsConfig,
    /// What new topics are like, by name.
    pub topic: Vec<TopicRuleConfig>,
}

impl Default for CloudConfig {
    fn default() -> Self {
        Self {
            node_id: 1,
            data_dir: "data/cloud".into(),
            kafka: KafkaConfig::default(),
            link: LinkConfig::default(),
            admin: AdminConfig::default(),
            archive: ArchiveConfig::default(),
            wal: WalConfig::default(),
            shards: ShardsConfig::default(),
            topic: Vec::new(),
        }
    }
}

/// `[kafka]`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KafkaConfig {
    /// Short form of one plain `[[kafka.listener]]`; 127.0.0.1:9092 when neither is given.
    pub listen: Option<ListenAddr>,
    /// The address clients are told to come back to; the listener's own by default.
    pub advertise: Option<String>,
    /// With the short form: open to a network without authentication.
    pub allow_anonymous: bool,
    /// The long form.
    pub listener: Vec<KafkaListenerConfig>,
    /// Metadata requests make topics that do not exist.
    pub auto_create_topics: Option<bool>,
    /// How long a new group waits for more members before its first rebalance.
    pub group_initial_rebalance_delay: Option<Span>,
    /// Most connections at once, over all listeners.
    pub connections_max: usize,
}

impl Default for KafkaConfig {
    fn default() -> Self {
        Self {
            listen: None,
            advertise: None,
            allow_anonymous: false,
            listener: Vec::new(),
            auto_create_topics: None,
            group_initial_rebalance_delay: None,
            connections_max: 10_000,
        }
    }
}

/// `[[kafka.listener]]`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KafkaListenerConfig {
    /// Shown in logs.
    #[serde(default)]
    pub name: Option<String>,
    /// Where it listens.
    pub listen: ListenAddr,
    /// The address clients are told to come back to.
    #[serde(default)]
    pub advertise: Option<String>,
    /// Certificate and key; plain without.
    #[serde(default)]
    pub tls: Option<TlsFiles>,
    /// Open to a network without authentication.
    #[serde(default)]
    pub allow_anonymous: bool,
}

/// `[link]`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LinkConfig {
    /// Where edges connect.
    pub listen: ListenAddr,
    /// Certificate and key; plain HTTP without.
    pub tls: Option<TlsFiles>,
    /// Takes edges without a token although others can reach it.
    pub allow_anonymous: bool,
    /// Takes edges' tokens in plain text although others may listen.
    pub allow_plaintext: bool,
    /// Most connections at once.
    pub connections_max: usize,
    /// The edges that may connect; with none, any edge on loopback (or with `allow_anonymous`).
    pub edge: Vec<LinkEdgeConfig>,
}

impl Default for LinkConfig {
    fn default() -> Self {
        Self {
            listen: ListenAddr::loopback(9480),
            tls: None,
            allow_anonymous: false,
            allow_plaintext: false,
            connections_max: 10_000,
            edge: Vec::new(),
        }
    }
}

/// `[[link.edge]]`: one gateway and its token.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkEdgeConfig {
    /// The id this token belongs to.
    pub id: EdgeId,
    /// The token itself.
    #[serde(default)]
    pub token: Option<Secret>,
    /// A file that holds it.
    #[serde(default)]
    pub token_file: Option<PathBuf>,
    /// Topics it may write; all when absent.
    #[serde(default)]
    pub topics: Option<Vec<TopicName>>,
}

/// `[admin]`.
pub type AdminConfig = daemon::admin::AdminConfig<CloudAdmin>;

/// The cloud's admin port.
#[derive(Debug, Clone)]
pub struct CloudAdmin;

impl DefaultPort for CloudAdmin {
    const PORT: u16 = 9482;
}

const DISK_CACHE_BYTES: u64 = 1 << 30;
/// Some chunks for some readers: less would be written for nothing.
const DISK_CACHE_BYTES_MIN: u64 = 16 << 20;

/// `[archive]`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ArchiveConfig {
    /// `file:///path`, `s3://bucket/prefix`, `off`; `DATA_DIR/archive` when absent.
    pub url: Option<String>,
    /// How far the bucket may be behind the log: what a dead disk can cost.
    pub max_lag: Span,
    /// Size at which a segment is cut.
    pub segment_bytes: ByteSize,
    /// Age at which what there is becomes segments.
    pub segment_age: Span,
    /// Most bytes of `DATA_DIR/cache`, where what was read from the bucket is kept; 0 is off. When absent: 1 GiB for a
    /// bucket, off where the archive is a directory.
    pub disk_cache_bytes: Option<ByteSize>,
    /// How often the bucket is looked through for objects that no manifest names.
    pub sweep_interval: Span,
    /// Server-side encryption of an `s3://` store: `AES256` or `aws:kms`; the bucket's own setting when absent.
    pub sse: Option<String>,
    /// The key for `aws:kms`; the account's when absent.
    pub sse_kms_key_id: Option<String>,
    /// Storage class of segments in an `s3://` store; the bucket's when absent.
    pub storage_class: Option<String>,
    /// Second and further attempts that all requests may make together before some succeed again.
    pub retry_budget: u32,
    /// Bytes per second of shipping, splitting and the command-line tool; without bound when absent.
    pub bandwidth_max: Option<ByteSize>,
    /// A node that could not confirm for so long that its shards on the disk are still its own acknowledges nothing until it
    /// can; off when absent.
    pub stop_unconfirmed_after: Option<Span>,
}

impl Default for ArchiveConfig {
    fn default() -> Self {
        Self {
            url: None,
            max_lag: Span::secs(10),
            segment_bytes: ByteSize(64 << 20),
            segment_age: Span::secs(600),
            sweep_interval: Span::secs(24 * 3600),
            disk_cache_bytes: None,
            sse: None,
            sse_kms_key_id: None,
            storage_class: None,
            retry_budget: RequestSettings::default().retry_budget,
            bandwidth_max: None,
            stop_unconfirmed_after: None,
        }
    }
}

impl ArchiveConfig {
    /// How requests to the store are made.
    pub fn requests(&self) -> RequestSettings {
        RequestSettings {
            retry_budget: self.retry_budget,
            bandwidth_max: self.bandwidth_max.map(|bytes| bytes.0),
            ..RequestSettings::default()
        }
    }

    /// The options of the store: those of the environment, and over them those of the settings.
    pub fn store_options(&self, environment: impl IntoIterator<Item = (String, String)>) -> Vec<(String, String)> {
        let said = [
            ("aws_server_side_encryption", &self.sse),
            ("aws_sse_kms_key_id", &self.sse_kms_key_id),
            (STORAGE_CLASS, &self.storage_class),
        ];
        let said = said.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value.clone()?)));
        environment.into_iter().chain(said).collect()
    }

    fn check(&self) -> Result<(), String> {
        let s3 = self.url.as_deref().is_some_and(|url| url.starts_with("s3://"));
        for (key, value) in
            [("sse", &self.sse), ("sse_kms_key_id", &self.sse_kms_key_id), ("storage_class", &self.storage_class)]
        {
            if value.is_some() && !s3 {
                return Err(format!("[archive] {key} means nothing without url = \"s3://...\": leave it out"));
            }
        }
        match self.sse.as_deref() {
            None | Some("AES256" | "aws:kms") => {}
            Some(other) => return Err(format!("[archive] sse = {other:?}: expected \"AES256\" or \"aws:kms\"")),
        }
        if self.sse_kms_key_id.is_some() && self.sse.as_deref() != Some("aws:kms") {
            return Err("[archive] sse_kms_key_id is for sse = \"aws:kms\": set that, or leave the key out".into());
        }
        if let Some(class) = &self.storage_class {
            if matches!(class.as_str(), "GLACIER" | "DEEP_ARCHIVE") {
                return Err(format!(
                    "[archive] storage_class = {class:?}: its objects cannot be read at once, and consumers must. \
                     Use one that can, as STANDARD_IA or GLACIER_IR"
                ));
            }
            if class.is_empty() || !class.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_') {
                return Err(format!("[archive] storage_class = {class:?}: expected a name as STANDARD_IA"));
            }
        }
        if self.bandwidth_max.is_some_and(|bytes| bytes.0 < BANDWIDTH_MIN) {
            return Err(format!("[archive] bandwidth_max: expected {BANDWIDTH_MIN} bytes per second or more"));
        }
        if self.stop_unconfirmed_after.is_some_and(|span| span.0 < UNCONFIRMED_MIN) {
            return Err(format!(
                "[archive] stop_unconfirmed_after: expected {UNCONFIRMED_MIN:?} or more: the bucket is looked at every 3 s, and a \
                 request may take 5 s"
            ));
        }
        if self.stop_unconfirmed_after.is_some() && self.url.as_deref() == Some("off") {
            return Err("[archive] stop_unconfirmed_after means nothing with url = \"off\": leave it out".into());
        }
        // One object is one conditional PUT, whose body is held in memory.
        if self.segment_bytes.0 > SEGMENT_BYTES_MAX {
            return Err(format!("[archive] segment_bytes: expected {SEGMENT_BYTES_MAX} or less"));
        }
        Ok(())
    }
}

/// Less would stop a node that is well: one look at the bucket that fails, and the next.
const UNCONFIRMED_MIN: Duration = Duration::from_secs(10);
/// Below this, shipping could not even keep up with its own blocks.
const BANDWIDTH_MIN: u64 = 16 << 10;
/// Largest segment that may be asked for.
const SEGMENT_BYTES_MAX: u64 = 512 << 20;

/// `[wal]`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WalConfig {
    /// Size of one recycled file.
    pub file_bytes: ByteSize,
    /// Most bytes of all of them; producers then get a retriable error.
    pub bytes_max: ByteSize,
    /// Recent blocks kept in memory for consumers at the end of the log.
    pub tail_cache_bytes: ByteSize,
}

impl Default for WalConfig {
    fn default() -> Self {
        Self { file_bytes: ByteSize(64 << 20), bytes_max: ByteSize(2 << 30), tail_cache_bytes: ByteSize(64 << 20) }
    }
}

/// `[shards]`. They may become more, never fewer.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ShardsConfig {
    /// Shards on the local disk, synced before an answer. The first is the catalogue's.
    pub file: u32,
    /// Shards whose every block is one conditional PUT to the archive's store. Without a file shard the first is the
    /// catalogue's, and the node keeps nothing that matters on its disk.
    pub object: u32,
    /// Shards in memory: nothing in them survives a restart.
    pub memory: u32,
    /// PUTs of an object shard begin at least so far apart, unless a block is full: what a PUT costs against how long an
    /// answer takes.
    pub object_linger: Span,
    /// Bytes that one memory shard keeps; then its oldest records go.
    pub memory_bytes_max: ByteSize,
}

impl Default for ShardsConfig {
    fn default() -> Self {
        Self { file: 1, object: 0, memory: 0, object_linger: Span::millis(100), memory_bytes_max: ByteSize(256 << 20) }
    }
}

/// `[[topic]]`: what new topics are like whose name matches. The first that matches counts.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TopicRuleConfig {
    /// A topic's name, in which `*` stands for any characters.
    pub name: String,
    /// Where its records are durable: `file`, `object` or `memory`.
    pub engine: Engine,
}

impl ShardsConfig {
    /// How many of each engine; the catalogue's comes first.
    pub fn wanted(&self) -> [(Engine, u32); 3] {
        [(Engine::File, self.file), (Engine::Object, self.object), (Engine::Memory, self.memory)]
    }
}

/// Files kept for the archive's objects, the disk cache, sockets to the bucket, the log and what the runtime needs.
const FILES: u64 = 256;
/// Files of a WAL beyond those that hold its bound.
const WAL_SPARE_FILES: u64 = 4;
/// Most shards of one engine on a node: each has a committer, caches and a WAL of its own.
const SHARDS_MAX: u32 = 64;
/// Half of it must hold the largest batch, with room to spare.
const MEMORY_BYTES_MIN: u64 = 128 << 20;

impl CloudConfig {
    fn check_shards(&self) -> Result<(), String> {
        let shards = &self.shards;
        for (engine, count) in shards.wanted() {
            if count > SHARDS_MAX {
                return Err(format!("[shards] {engine} = {count}: expected {SHARDS_MAX} at most"));
            }
        }
        if shards.memory > 0 && shards.memory_bytes_max.0 < MEMORY_BYTES_MIN {
            let given = shards.memory_bytes_max;
            return Err(format!(
                "[shards] memory_bytes_max = {given}: expected 128 MiB or more, so that every batch fits"
            ));
        }
        if shards.file == 0 && shards.object == 0 {
            let text = "[shards] file = 0 and object = 0: the catalogue of topics must survive a restart; set one to 1 or more";
            return Err(text.to_owned());
        }
        if shards.object > 0 && self.archive_url()?.is_none() {
            let text = "[shards] object: its blocks lie in the archive's store, and [archive] url is \"off\"; \
                        set a url, or object = 0";
            return Err(text.to_owned());
        }
        for rule in &self.topic {
            if !shards.wanted().contains(&(rule.engine, 0)) {
                continue;
            }
            let TopicRuleConfig { name, engine } = rule;
            return Err(format!(
                "[[topic]] name = {name:?} wants the engine {engine}: set [shards] {engine} = 1 or more"
            ));
        }
        Ok(())
    }

    /// The Kafka listeners, the short form included.
    pub fn kafka_listeners(&self) -> Vec<KafkaListenerConfig> {
        let short = || KafkaListenerConfig {
            name: None,
            listen: self.kafka.listen.unwrap_or(ListenAddr::loopback(9092)),
            advertise: self.kafka.advertise.clone(),
            tls: None,
            allow_anonymous: self.kafka.allow_anonymous,
        };
        match (self.kafka.listen, self.kafka.listener.is_empty()) {
            (None, true) => vec![short()],
            (None, false) => self.kafka.listener.clone(),
            (Some(_), _) => std::iter::once(short()).chain(self.kafka.listener.clone()).collect(),
        }
    }

    /// Where the archive is: `None` when it is off.
    pub fn archive_url(&self) -> Result<Option<String>, String> {
        match self.archive.url.as_deref() {
            Some("off") => Ok(None),
            Some(url) if url.starts_with("file:///") || url.starts_with("s3://") => Ok(Some(url.to_owned())),
            Some(url) => {
                let url = redacted(url);
                Err(format!("[archive] url = {url:?}: expected file:///ABSOLUTE/PATH, s3://BUCKET/PREFIX or \"off\""))
            }
            None => {
                let dir = std::path::absolute(self.data_dir.join("archive")).map_err(|e| e.to_string())?;
                Ok(Some(format!("file://{}", dir.display())))
            }
        }
    }

    /// Most bytes of archived records kept on the local disk; 0 is off.
    pub fn disk_cache_bytes(&self) -> u64 {
        let remote = self.archive.url.as_deref().is_some_and(|url| url.starts_with("s3://"));
        let default = if remote { DISK_CACHE_BYTES } else { 0 };
        self.archive.disk_cache_bytes.map_or(default, |bytes| bytes.0)
    }

    /// Files that hold a secret, by what names them.
    pub fn secret_files(&self) -> Vec<(String, PathBuf)> {
        let mut files = Vec::new();
        let mut add = |key: String, path: Option<&PathBuf>| files.extend(path.map(|path| (key, path.clone())));
        for listener in &self.kafka.listener {
            add("[[kafka.listener]] tls.key_file".to_owned(), listener.tls.as_ref().map(|tls| &tls.key_file));
        }
        add("[link] tls.key_file".to_owned(), self.link.tls.as_ref().map(|tls| &tls.key_file));
        for edge in &self.link.edge {
            add(format!("[[link.edge]] id = \"{}\", token_file", edge.id), edge.token_file.as_ref());
        }
        add("[admin] token_file".to_owned(), self.admin.token_file.as_ref());
        files
    }

    /// Whether a secret stands in the settings themselves.
    pub fn holds_secrets(&self) -> bool {
        self.admin.token.is_some() || self.link.edge.iter().any(|edge| edge.token.is_some())
    }

    /// How many connections each kind of listener may hold when the process may open `limit` files: Kafka's, the link's,
    /// then the admin port's.
    pub fn doors(&self, limit: u64) -> [DoorShare; 3] {
        let wal = u64::from(self.shards.file) * (self.wal.bytes_max.0 / self.wal.file_bytes.0.max(1) + WAL_SPARE_FILES);
        // More than half is never kept: a small limit must leave room for clients too.
        let files = (FILES + wal).min(limit / 2);
        let admin = ("admin.connections_max", self.admin.connections_max);
        let kafka = ("kafka.connections_max", self.kafka.connections_max);
        let link = ("link.connections_max", self.link.connections_max);
        let shares = share(limit, files as usize, &[admin], &[kafka, link]);
        shares
            .try_into()
            .map(|[admin, kafka, link]: [DoorShare; 3]| [kafka, link, admin])
            .expect("a share for each door")
    }

    /// Refuses what would be unsafe or could not work.
    pub fn check(&self) -> Result<(), String> {
        if self.node_id < 0 {
            return Err(format!("node_id = {}: expected 0 or more", self.node_id));
        }
        for listener in self.kafka_listeners() {
            let fix = "listen on 127.0.0.1 (Kafka clients are not asked for credentials yet)";
            listener.listen.check_exposure("[kafka] listen", false, fix, listener.allow_anonymous)?;
            listener.advertised()?;
        }
        let tokens = !self.link.edge.is_empty();
        let fix = "give each gateway a token with [[link.edge]] id and token_file";
        self.link.listen.check_exposure("[link] listen", tokens, fix, self.link.allow_anonymous)?;
        let fix = "set [link] tls = { cert_file = FILE, key_file = FILE }";
        let takes = tokens && self.link.tls.is_none();
        self.link.listen.check_plaintext("[link] listen", "edges' tokens", takes, fix, self.link.allow_plaintext)?;
        self.admin.check()?;
        for edge in &self.link.edge {
            if edge.token.is_none() && edge.token_file.is_none() {
                return Err(format!("[[link.edge]] id = \"{}\": expected token_file (or token)", edge.id));
            }
        }
        for (index, edge) in self.link.edge.iter().enumerate() {
            if self.link.edge.iter().take(index).any(|other| other.id == edge.id) {
                return Err(format!("[[link.edge]] id = \"{}\" is given twice: a gateway has one entry", edge.id));
            }
        }
        let kafka = self.kafka_listeners();
        let all = kafka.iter().map(|listener| ("[kafka] listen", listener.listen));
        let others = [("[link] listen", self.link.listen), ("[admin] listen", self.admin.listen)];
        distinct_listeners(all.chain(others))?;
        self.check_shards()?;
        if (1..DISK_CACHE_BYTES_MIN).contains(&self.disk_cache_bytes()) {
            let given = self.disk_cache_bytes();
            return Err(format!("[archive] disk_cache_bytes = {given}: expected 16 MiB or more, or 0 for none"));
        }
        self.archive.check()?;
        self.archive_url().map(drop)
    }
}

impl KafkaListenerConfig {
    /// Host and port that clients are told to connect to.
    pub fn advertised(&self) -> Result<(String, u16), String> {
        let text = match &self.advertise {
            Some(text) => text.clone(),
            None => self.listen.0.to_string(),
        };
        let wanted = || format!("[kafka] advertise = {text:?}: expected HOST:PORT that clients can reach");
        if let Ok(address) = text.parse::<SocketAddr>() {
            if address.ip().is_unspecified() {
                return Err(format!(
                    "{}; {} means \"every address\" and no client can connect to it. Set advertise to this host's name",
                    wanted(),
                    address.ip()
                ));
            }
            return Ok((address.ip().to_string(), address.port()));
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(wanted)?;
        let port = port.parse().map_err(|_| wanted())?;
        if host.is_empty() || host.len() > 255 || host.contains(['/', ' ']) {
            return Err(wanted());
        }
        Ok((host.to_owned(), port))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> CloudConfig {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn no_configuration_at_all_is_a_configuration() {
        let config = CloudConfig::default();
        config.check().unwrap();
        assert_eq!(config.kafka_listeners()[0].advertised().unwrap(), ("127.0.0.1".to_owned(), 9092));
        assert!(config.archive_url().unwrap().unwrap().ends_with("/data/cloud/archive"));
    }

    #[test]
    fn every_key_is_in_the_operating_guide() {
        let guide = include_str!("../../docs/operating.md");
        let loaded = shared::config::Layers::empty().load::<CloudConfig>().unwrap();
        for line in loaded.describe().unwrap().lines() {
            let key = line.split(" = ").next().unwrap();
            assert!(guide.contains(&format!("`{key}`")), "docs/operating.md lacks `{key}`");
        }
    }

    #[test]
    fn an_open_listener_is_refused_with_both_fixes() {
        for text in [
            "[kafka]\nlisten = \"0.0.0.0:9092\"\nadvertise = \"h:9092\"",
            "[link]\nlisten = \"0.0.0.0:9480\"",
            "[admin]\nlisten = \"[::]:9482\"",
        ] {
            let refused = parse(text).check().unwrap_err();
            assert!(refused.contains("allow_anonymous = true") && refused.contains("Either"), "{refused}");
            parse(&format!("{text}\nallow_anonymous = true")).check().unwrap();
        }
        let edge = "\n[[link.edge]]\nid = \"gw\"\ntoken = \"x\"";
        let open = "[link]\nlisten = \"0.0.0.0:9480\"";
        let refused = parse(&format!("{open}{edge}")).check().unwrap_err();
        assert!(refused.contains("Either set [link] tls") && refused.contains("allow_plaintext = true"), "{refused}");
        parse(&format!("{open}\nallow_plaintext = true{edge}")).check().unwrap();
        parse(&format!("{open}\ntls = {{ cert_file = \"c\", key_file = \"k\" }}{edge}")).check().unwrap();
    }

    #[test]
    fn what_is_given_twice_is_refused() {
        let edge = "[[link.edge]]\nid = \"gw\"\ntoken = \"x\"\n";
        let refused = parse(&format!("{edge}{edge}")).check().unwrap_err();
        assert!(refused.contains("\"gw\" is given twice"), "{refused}");
        for text in [
            "[link]\nlisten = \"127.0.0.1:9092\"",
            "[admin]\nlisten = \"127.0.0.1:9480\"",
            "[[kafka.listener]]\nlisten = \"127.0.0.1:1\"\n[[kafka.listener]]\nlisten = \"127.0.0.1:1\"",
        ] {
            assert!(parse(text).check().unwrap_err().contains("are one address"), "{text}");
        }
    }

    #[test]
    fn an_unspecified_address_is_not_advertised() {
        let open = "[kafka]\nlisten = \"0.0.0.0:9092\"\nallow_anonymous = true";
        assert!(parse(open).check().unwrap_err().contains("advertise"));
        parse(&format!("{open}\nadvertise = \"broker.example:9092\"")).check().unwrap();
    }

    #[test]
    fn shards_that_cannot_work_are_refused_with_what_to_do() {
        for (text, wanted) in [
            ("[shards]\nfile = 0", "set one to 1"),
            ("[shards]\nfile = 0\nmemory = 1", "catalogue"),
            ("[shards]\nobject = 1\n[archive]\nurl = \"off\"", "set a url"),
            ("[shards]\nmemory = 65", "64 at most"),
            ("[shards]\nmemory = 1\nmemory_bytes_max = \"16 MiB\"", "128 MiB or more"),
            ("[[topic]]\nname = \"a.*\"\nengine = \"memory\"", "[shards] memory = 1"),
        ] {
            let refused = parse(text).check().unwrap_err();
            assert!(refused.contains(wanted), "{text}: {refused}");
        }
        parse("[shards]\nfile = 0\nobject = 2\nmemory = 1\n[[topic]]\nname = \"a.*\"\nengine = \"memory\"")
            .check()
            .unwrap();
        assert!(toml::from_str::<CloudConfig>("[[topic]]\nname = \"a\"\nengine = \"tape\"").is_err());
    }

    #[test]
    fn store_options_that_cannot_work_are_refused_with_the_reason() {
        let s3 = "[archive]\nurl = \"s3://bucket/p\"\n";
        for (bad, reason) in [
            ("[archive]\nsse = \"AES256\"", "s3://"),
            (&format!("{s3}sse = \"rot13\""), "AES256"),
            (&format!("{s3}sse = \"AES256\"\nsse_kms_key_id = \"k\""), "aws:kms"),
            (&format!("{s3}storage_class = \"DEEP_ARCHIVE\""), "cannot be read at once"),
            (&format!("{s3}storage_class = \"standard\""), "STANDARD_IA"),
            (&format!("{s3}bandwidth_max = 100"), "16384"),
            (&format!("{s3}stop_unconfirmed_after = \"5s\""), "10s"),
            ("[archive]\nurl = \"off\"\nstop_unconfirmed_after = \"60s\"", "leave it out"),
            (&format!("{s3}segment_bytes = \"1 GiB\""), "536870912"),
        ] {
            let refused = parse(bad).check().unwrap_err();
            assert!(refused.contains(reason), "{bad}: {refused}");
        }
        let good = parse(&format!(
            "{s3}sse = \"aws:kms\"\nsse_kms_key_id = \"k\"\nstorage_class = \"STANDARD_IA\"\nbandwidth_max = \"8 MiB\""
        ));
        good.check().unwrap();
        assert_eq!(good.archive.requests().bandwidth_max, Some(8 << 20));
        let options = good.archive.store_options([("AWS_REGION".to_owned(), "here".to_owned())]);
        assert_eq!(options.len(), 4, "{options:?}");
    }

    #[test]
    fn the_archive_is_a_url_or_off() {
        assert_eq!(parse("[archive]\nurl = \"off\"").archive_url().unwrap(), None);
        assert!(parse("[archive]\nurl = \"archive\"").archive_url().unwrap_err().contains("file:///"));
    }

    #[test]
    fn a_bucket_is_cached_on_the_disk_and_a_directory_is_not() {
        let bytes = |text: &str| parse(text).disk_cache_bytes();
        assert_eq!(bytes(""), 0);
        assert_eq!(bytes("[archive]\nurl = \"file:///a\""), 0);
        assert_eq!(bytes("[archive]\nurl = \"s3://a\""), 1 << 30);
        assert_eq!(bytes("[archive]\nurl = \"s3://a\"\ndisk_cache_bytes = 0"), 0);
        assert_eq!(bytes("[archive]\nurl = \"file:///a\"\ndisk_cache_bytes = \"2 GiB\""), 2 << 30);
        assert!(parse("[archive]\ndisk_cache_bytes = 5").check().unwrap_err().contains("disk_cache_bytes"));
    }
}
