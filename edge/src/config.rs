//! Settings of the edge broker: the shape of `edge.toml`.

use std::path::PathBuf;

use daemon::admin::DefaultPort;
use daemon::descriptors::{DoorShare, share};
use serde::{Deserialize, Serialize};
use shared::batch::Compression;
use shared::config::{
    ByteSize, ListenAddr, OneOrMany, Secret, Span, TlsFiles, distinct_listeners, is_loopback_url, redacted,
};
use shared::name::EdgeId;

use crate::streams::StreamSettings;

/// `edge.toml`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EdgeConfig {
    /// This gateway's identity; the host name when absent.
    pub id: Option<EdgeId>,
    /// Where the database rests.
    pub data_dir: PathBuf,
    /// Devices.
    pub mqtt: MqttConfig,
    /// Health, status and metrics.
    pub admin: AdminConfig,
    /// The cloud; `[]` for a gateway that only stores.
    pub uplink: OneOrMany<UplinkConfig>,
    /// The database.
    pub storage: StorageConfig,
    /// What is stored and under which topic it is forwarded; the first rule that matches wins.
    pub stream: Vec<StreamSettings>,
}

impl Default for EdgeConfig {
    fn default() -> Self {
        Self {
            id: None,
            data_dir: "data/edge".into(),
            mqtt: MqttConfig::default(),
            admin: AdminConfig::default(),
            uplink: OneOrMany(vec![UplinkConfig::default()]),
            storage: StorageConfig::default(),
            stream: vec![StreamSettings {
                name: "mqtt".into(),
                filters: vec!["#".into()],
                ..StreamSettings::default()
            }],
        }
    }
}

/// `[mqtt]`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MqttConfig {
    /// Short form of one plain `[[mqtt.listener]]`; 127.0.0.1:1883 when neither is given.
    pub listen: Option<ListenAddr>,
    /// With the short form: open to a network without authentication.
    pub allow_anonymous: bool,
    /// With the short form: takes passwords in plain text although others may listen.
    pub allow_plaintext: bool,
    /// The long form.
    pub listener: Vec<MqttListenerConfig>,
    /// Who may connect; with none, whoever reaches a listener.
    pub user: Vec<MqttUserConfig>,
    /// Largest packet taken.
    pub packet_bytes_max: ByteSize,
    /// QoS 1 and 2 PUBLISHes a client may have unacknowledged.
    pub receive_maximum: u16,
    /// Most connections at once.
    pub connections_max: usize,
    /// Most sessions that outlive their connections; for one more, the longest absent one that holds no message is ended.
    pub sessions_max: usize,
    /// Longest life of a session without a connection.
    pub session_expiry_max: Span,
    /// What all clients together may make the broker hold in memory, besides retained messages.
    pub memory_bytes: ByteSize,
    /// How long a PUBLISH waits for room in a full stream before its client is disconnected and must send again.
    pub hold_timeout: Span,
}

impl Default for MqttConfig {
    fn default() -> Self {
        Self {
            listen: None,
            allow_anonymous: false,
            allow_plaintext: false,
            listener: Vec::new(),
            user: Vec::new(),
            packet_bytes_max: ByteSize(1 << 20),
            receive_maximum: 1024,
            connections_max: 10_000,
            sessions_max: 20_000,
            session_expiry_max: Span::secs(7 * 24 * 3600),
            memory_bytes: ByteSize(64 << 20),
            hold_timeout: Span::secs(30),
        }
    }
}

/// `[[mqtt.listener]]`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MqttListenerConfig {
    /// Where it listens.
    pub bind: ListenAddr,
    /// What carries MQTT.
    #[serde(default)]
    pub transport: Transport,
    /// Certificate and key for `transport = "tls"`.
    #[serde(default)]
    pub tls: Option<TlsFiles>,
    /// Open to a network without authentication.
    #[serde(default)]
    pub allow_anonymous: bool,
    /// Takes passwords in plain text although others may listen.
    #[serde(default)]
    pub allow_plaintext: bool,
}

/// What carries MQTT.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// Plain TCP.
    #[default]
    Tcp,
    /// TLS over TCP.
    Tls,
}

/// `[[mqtt.user]]`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MqttUserConfig {
    /// User name in CONNECT.
    pub name: String,
    /// Its password.
    #[serde(default)]
    pub password: Option<Secret>,
    /// A file that holds it.
    #[serde(default)]
    pub password_file: Option<PathBuf>,
}

/// `[admin]`.
pub type AdminConfig = daemon::admin::AdminConfig<EdgeAdmin>;

/// The edge's admin port.
#[derive(Debug, Clone)]
pub struct EdgeAdmin;

impl DefaultPort for EdgeAdmin {
    const PORT: u16 = 9481;
}

/// `[uplink]`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct UplinkConfig {
    /// Shown in logs and status.
    pub name: String,
    /// The cloud's `[link] listen`, as http:// or https://.
    pub url: String,
    /// This gateway's token.
    pub token: Option<Secret>,
    /// A file that holds it.
    pub token_file: Option<PathBuf>,
    /// Sends the token in plain text although others may listen.
    pub allow_plaintext: bool,
    /// Certificates to trust instead of the system's, PEM.
    pub ca_file: Option<PathBuf>,
    /// How sealed batches are compressed: none, lz4 or zstd.
    pub compression: Compression,
    /// How long small batches wait for neighbours before they are sent.
    pub linger: Span,
}

impl Default for UplinkConfig {
    fn default() -> Self {
        Self {
            name: "cloud".into(),
            url: "http://127.0.0.1:9480".into(),
            token: None,
            token_file: None,
            allow_plaintext: false,
            ca_file: None,
            compression: Compression::Lz4,
            linger: Span::millis(5),
        }
    }
}

/// `[storage]`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StorageConfig {
    /// Bound of the database's page cache.
    pub cache_bytes: ByteSize,
    /// Least time between starts of commits; 1s spares an SD card, 0 answers soonest.
    pub commit_interval: Span,
    /// Waiting bytes that start a commit before the interval is over.
    pub commit_bytes: ByteSize,
    /// Most bytes the database may take; the lesser of 1 GiB and half of what is free when absent.
    pub disk_budget: Option<ByteSize>,
}

impl Default for StorageConfig {
    fn default() -> Self {
        Self {
            cache_bytes: ByteSize(8 << 20),
            commit_interval: Span::millis(0),
            commit_bytes: ByteSize(1 << 20),
            disk_budget: None,
        }
    }
}

/// Files kept for the database, its copies, the uplink, the log and what the runtime needs.
const FILES: usize = 64;

/// The least memory for all clients, in largest packets.
const MEMORY_PER_PACKET: u64 = 8;

impl EdgeConfig {
    /// The MQTT listeners, the short form included.
    pub fn mqtt_listeners(&self) -> Vec<MqttListenerConfig> {
        let short = |bind| MqttListenerConfig {
            bind,
            transport: Transport::Tcp,
            tls: None,
            allow_anonymous: self.mqtt.allow_anonymous,
            allow_plaintext: self.mqtt.allow_plaintext,
        };
        let mut all: Vec<_> = self.mqtt.listen.map(short).into_iter().chain(self.mqtt.listener.clone()).collect();
        if all.is_empty() {
            all.push(short(ListenAddr::loopback(1883)));
        }
        all
    }

    /// This gateway's identity.
    pub fn edge_id(&self) -> Result<EdgeId, String> {
        if let Some(id) = &self.id {
            return Ok(id.clone());
        }
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        EdgeId::parse(host.trim()).map_err(|e| {
            format!("id is not set and the host name does not do as one ({e}): set id in the configuration")
        })
    }

    /// Files that hold a secret, by what names them.
    pub fn secret_files(&self) -> Vec<(String, PathBuf)> {
        let mut files = Vec::new();
        let mut add = |key: &str, path: Option<&PathBuf>| files.extend(path.map(|path| (key.to_owned(), path.clone())));
        self.mqtt.user.iter().for_each(|user| add("[[mqtt.user]] password_file", user.password_file.as_ref()));
        self.mqtt
            .listener
            .iter()
            .for_each(|one| add("[[mqtt.listener]] tls.key_file", one.tls.as_ref().map(|t| &t.key_file)));
        self.uplink.0.iter().for_each(|uplink| add("[uplink] token_file", uplink.token_file.as_ref()));
        add("[admin] token_file", self.admin.token_file.as_ref());
        files
    }

    /// Whether a secret stands in the settings themselves.
    pub fn holds_secrets(&self) -> bool {
        self.admin.token.is_some()
            || self.mqtt.user.iter().any(|user| user.password.is_some())
            || self.uplink.0.iter().any(|uplink| uplink.token.is_some() || redacted(&uplink.url) != uplink.url)
    }

    /// How many connections each kind of listener may hold when the process may open `limit` files: MQTT's, then the
    /// admin port's.
    pub fn doors(&self, limit: u64) -> [DoorShare; 2] {
        let admin = ("admin.connections_max", self.admin.connections_max);
        let mqtt = ("mqtt.connections_max", self.mqtt.connections_max);
        let shares = share(limit, FILES, &[admin], &[mqtt]);
        shares.try_into().map(|[admin, mqtt]: [DoorShare; 2]| [mqtt, admin]).expect("a share for each door")
    }

    /// Refuses what would be unsafe or could not work.
    pub fn check(&self) -> Result<(), String> {
        self.edge_id()?;
        let users = !self.mqtt.user.is_empty();
        for listener in self.mqtt_listeners() {
            let fix = "name who may connect with [[mqtt.user]] name and password_file";
            listener.bind.check_exposure("[mqtt] listen", users, fix, listener.allow_anonymous)?;
            match (listener.transport, &listener.tls) {
                (Transport::Tls, None) => {
                    return Err(format!(
                        "[[mqtt.listener]] bind = \"{}\": transport = \"tls\" needs tls = {{ cert_file = FILE, key_file = FILE }}",
                        listener.bind
                    ));
                }
                (Transport::Tcp, Some(_)) => {
                    return Err(format!(
                        "[[mqtt.listener]] bind = \"{}\": tls is given, but transport is \"tcp\": expected transport = \"tls\"",
                        listener.bind
                    ));
                }
                _ => {}
            }
            let takes = users && listener.transport == Transport::Tcp;
            let fix = "use transport = \"tls\" with tls = { cert_file = FILE, key_file = FILE }";
            listener.bind.check_plaintext("[mqtt] listen", "passwords", takes, fix, listener.allow_plaintext)?;
        }
        let (memory, packet) = (self.mqtt.memory_bytes, self.mqtt.packet_bytes_max);
        if memory.0 / MEMORY_PER_PACKET < packet.0 {
            return Err(format!(
                "[mqtt] memory_bytes = \"{memory}\": one client gets an eighth of it, and packet_bytes_max is {packet}: \
                 expected at least {}",
                ByteSize(packet.0.saturating_mul(MEMORY_PER_PACKET))
            ));
        }
        let mqtt = self.mqtt_listeners();
        let all = mqtt.iter().map(|listener| ("[mqtt] listen", listener.bind));
        distinct_listeners(all.chain([("[admin] listen", self.admin.listen)]))?;
        for (index, user) in self.mqtt.user.iter().enumerate() {
            if self.mqtt.user.iter().take(index).any(|other| other.name == user.name) {
                return Err(format!(
                    "[[mqtt.user]] name = {:?} is given twice: one of them would never be used",
                    user.name
                ));
            }
            if user.password.is_none() && user.password_file.is_none() {
                return Err(format!("[[mqtt.user]] name = {:?}: expected password_file (or password)", user.name));
            }
        }
        self.admin.check()?;
        if self.uplink.0.len() > 1 {
            return Err("[[uplink]] is given more than once: one uplink is served".to_owned());
        }
        for uplink in &self.uplink.0 {
            if !(uplink.url.starts_with("http://") || uplink.url.starts_with("https://")) {
                let url = redacted(&uplink.url);
                return Err(format!("[uplink] url = {url:?}: expected http://HOST:PORT or https://HOST:PORT"));
            }
            let token = uplink.token.is_some() || uplink.token_file.is_some();
            if token && uplink.url.starts_with("http://") && !is_loopback_url(&uplink.url) && !uplink.allow_plaintext {
                return Err(format!(
                    "[uplink] url = {:?} would send this gateway's token and records to another machine in plain text, for \
                     everyone on the way to read. Either use https:// (with [link] tls in the cloud), or set \
                     allow_plaintext = true on this uplink if that is what you want",
                    redacted(&uplink.url)
                ));
            }
            if !matches!(uplink.compression, Compression::None | Compression::Lz4 | Compression::Zstd) {
                return Err("[uplink] compression: expected \"none\", \"lz4\" or \"zstd\"".to_owned());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> EdgeConfig {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn no_configuration_at_all_is_a_configuration() {
        let config = EdgeConfig::default();
        config.check().unwrap();
        assert_eq!(config.stream.len(), 1);
        assert_eq!(config.uplink.0[0].url, "http://127.0.0.1:9480");
        assert_eq!(config.mqtt_listeners()[0].bind, ListenAddr::loopback(1883));
    }

    #[test]
    fn memory_that_no_largest_packet_fits_in_is_refused() {
        let refused = parse("[mqtt]\npacket_bytes_max = \"16 MiB\"").check().unwrap_err();
        assert!(refused.contains("memory_bytes") && refused.contains("128 MiB"), "{refused}");
        parse("[mqtt]\npacket_bytes_max = \"16 MiB\"\nmemory_bytes = \"128 MiB\"").check().unwrap();
    }

    #[test]
    fn every_key_is_in_the_operating_guide() {
        let guide = include_str!("../../docs/operating.md");
        let loaded = shared::config::Layers::empty().load::<EdgeConfig>().unwrap();
        for line in loaded.describe().unwrap().lines() {
            let key = line.split(" = ").next().unwrap().replace("[0]", "");
            assert!(guide.contains(&format!("`{key}`")), "docs/operating.md lacks `{key}`");
        }
    }

    #[test]
    fn short_and_long_forms_say_the_same() {
        let short = parse("[uplink]\nurl = \"http://a:1\"\n[mqtt]\nlisten = \"127.0.0.1:7\"");
        let long = parse("[[uplink]]\nurl = \"http://a:1\"\n[[mqtt.listener]]\nbind = \"127.0.0.1:7\"");
        assert_eq!(short.uplink.0[0].url, long.uplink.0[0].url);
        assert_eq!(short.mqtt_listeners()[0].bind, long.mqtt_listeners()[0].bind);
        assert!(parse("uplink = []").uplink.0.is_empty());
        let wrong = toml::from_str::<EdgeConfig>("[uplink]\nulr = \"x\"").unwrap_err().to_string();
        assert!(wrong.contains("ulr") && wrong.contains("`url`"), "{wrong}");
    }

    #[test]
    fn an_open_listener_is_refused_with_both_fixes() {
        for text in ["[mqtt]\nlisten = \"0.0.0.0:1883\"", "[admin]\nlisten = \"0.0.0.0:9481\""] {
            let refused = parse(text).check().unwrap_err();
            assert!(refused.contains("allow_anonymous = true") && refused.contains("Either"), "{refused}");
            parse(&format!("{text}\nallow_anonymous = true")).check().unwrap();
        }
        let user = "[mqtt]\nlisten = \"0.0.0.0:1883\"\n[[mqtt.user]]\nname = \"a\"\npassword = \"b\"";
        assert!(!parse(user).check().unwrap_err().contains("allow_anonymous"));
    }

    #[test]
    fn what_is_given_twice_is_refused() {
        let user = "[[mqtt.user]]\nname = \"a\"\npassword = \"b\"\n";
        let refused = parse(&format!("{user}{user}")).check().unwrap_err();
        assert!(refused.contains("\"a\" is given twice"), "{refused}");
        for text in [
            "[mqtt]\nlisten = \"127.0.0.1:7\"\n[admin]\nlisten = \"127.0.0.1:7\"",
            "[[mqtt.listener]]\nbind = \"127.0.0.1:7\"\n[[mqtt.listener]]\nbind = \"127.0.0.1:7\"",
        ] {
            let refused = parse(text).check().unwrap_err();
            assert!(refused.contains("[mqtt] listen") && refused.contains("127.0.0.1:7"), "{refused}");
        }
    }

    #[test]
    fn secrets_in_plain_text_beyond_loopback_are_refused_with_both_fixes() {
        let users = "[[mqtt.user]]\nname = \"a\"\npassword = \"b\"\n";
        for (text, open, fix) in [
            (
                format!("[mqtt]\nlisten = \"0.0.0.0:1883\"\nOPEN\n{users}"),
                "allow_plaintext = true",
                "transport = \"tls\"",
            ),
            (
                format!("[mqtt]\n{users}[[mqtt.listener]]\nbind = \"[::]:1\"\nOPEN\n"),
                "allow_plaintext = true",
                "\"tls\"",
            ),
            // Who may connect without a password may have one all the same.
            (
                format!("[mqtt]\n{users}[[mqtt.listener]]\nbind = \"10.0.0.1:1\"\nallow_anonymous = true\nOPEN\n"),
                "allow_plaintext = true",
                "\"tls\"",
            ),
            (
                "[uplink]\nurl = \"http://cloud:9480\"\ntoken = \"t\"\nOPEN\n".into(),
                "allow_plaintext = true",
                "https://",
            ),
            (
                "[uplink]\nurl = \"http://10.0.0.1\"\ntoken_file = \"t\"\nOPEN\n".into(),
                "allow_plaintext = true",
                "https://",
            ),
            ("[admin]\nlisten = \"0.0.0.0:1\"\ntoken = \"t\"\nOPEN\n".into(), "allow_plaintext = true", "127.0.0.1"),
        ] {
            let refused = parse(&text.replace("OPEN", "")).check().unwrap_err();
            assert!(refused.contains("Either") && refused.contains(open) && refused.contains(fix), "{text}: {refused}");
            parse(&text.replace("OPEN", open)).check().unwrap();
        }
        for good in [
            &format!("[mqtt]\nlisten = \"127.0.0.1:1883\"\n{users}"),
            "[uplink]\nurl = \"http://localhost:9480\"\ntoken = \"t\"",
            "[uplink]\nurl = \"https://cloud:9480\"\ntoken = \"t\"",
            "[uplink]\nurl = \"http://cloud:9480\"",
            "[admin]\ntoken = \"t\"",
        ] {
            parse(good).check().unwrap();
        }
    }
}
