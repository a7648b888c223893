//! Settings of the edge broker: the shape of `edge.toml`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use shared::batch::Compression;
use shared::config::{ByteSize, ListenAddr, OneOrMany, Secret, Span, TlsFiles};
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
    /// How long a PUBLISH waits for room in a full stream before its client is disconnected and must send again.
    pub hold_timeout: Span,
}

impl Default for MqttConfig {
    fn default() -> Self {
        Self {
            listen: None,
            allow_anonymous: false,
            listener: Vec::new(),
            user: Vec::new(),
            packet_bytes_max: ByteSize(1 << 20),
            receive_maximum: 1024,
            connections_max: 10_000,
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
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdminConfig {
    /// Where it listens.
    pub listen: ListenAddr,
    /// Open to a network: the port shows records and settings to whoever asks.
    pub allow_anonymous: bool,
}

impl Default for AdminConfig {
    fn default() -> Self {
        Self { listen: ListenAddr::loopback(9481), allow_anonymous: false }
    }
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

impl EdgeConfig {
    /// The MQTT listeners, the short form included.
    pub fn mqtt_listeners(&self) -> Vec<MqttListenerConfig> {
        let short = |bind| MqttListenerConfig {
            bind,
            transport: Transport::Tcp,
            tls: None,
            allow_anonymous: self.mqtt.allow_anonymous,
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
        }
        for user in &self.mqtt.user {
            if user.password.is_none() && user.password_file.is_none() {
                return Err(format!("[[mqtt.user]] name = {:?}: expected password_file (or password)", user.name));
            }
        }
        self.admin.listen.check_exposure("[admin] listen", false, "listen on 127.0.0.1", self.admin.allow_anonymous)?;
        if self.uplink.0.len() > 1 {
            return Err("[[uplink]] is given more than once: one uplink is served".to_owned());
        }
        for uplink in &self.uplink.0 {
            if !(uplink.url.starts_with("http://") || uplink.url.starts_with("https://")) {
                return Err(format!("[uplink] url = {:?}: expected http://HOST:PORT or https://HOST:PORT", uplink.url));
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
        parse(user).check().unwrap();
    }
}
