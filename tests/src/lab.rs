//! A laboratory: one directory per scenario with its own ports, configurations, brokers and logs.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::process::{Broker, Kind};

/// Where a scenario lives. The directory stays when the scenario failed, so that its logs can be read.
pub struct Lab {
    pub dir: PathBuf,
    pub edge: EdgePlan,
    pub cloud: CloudPlan,
    edge_build: EdgeBuild,
}

/// Which build of the edge runs, and how.
#[derive(Debug, Clone, Default)]
pub struct EdgeBuild {
    /// The program, if not the one built beside this one.
    pub program: Option<PathBuf>,
    /// An emulator and its options, separated by spaces.
    pub wrapper: String,
}

/// What goes into `edge.toml`; `extra` is appended verbatim.
pub struct EdgePlan {
    pub id: String,
    pub data_dir: PathBuf,
    pub mqtt: SocketAddr,
    pub mqtt_extra: String,
    pub admin: SocketAddr,
    pub admin_extra: String,
    pub uplink_url: String,
    pub uplink_extra: String,
    pub streams: String,
    pub extra: String,
}

/// What goes into `cloud.toml`.
pub struct CloudPlan {
    pub data_dir: PathBuf,
    pub kafka: SocketAddr,
    pub kafka_extra: String,
    pub link: SocketAddr,
    pub link_extra: String,
    pub admin: SocketAddr,
    pub archive: Option<String>,
    pub archive_extra: String,
    pub extra: String,
    pub env: Vec<(String, String)>,
}

const TELEMETRY: &str = "[[stream]]\nname = \"telemetry\"\nfilters = [\"factory/+/telemetry/#\"]\n";

impl Lab {
    /// A fresh directory under `root` with an edge and a cloud planned on free loopback ports.
    pub fn new(root: &Path, name: &str, edge_build: &EdgeBuild) -> Result<Self> {
        let dir = root.join(name);
        if dir.exists() {
            std::fs::remove_dir_all(&dir).with_context(|| format!("clear {}", dir.display()))?;
        }
        std::fs::create_dir_all(&dir)?;
        let cloud = CloudPlan {
            data_dir: dir.join("cloud"),
            kafka: free_port()?,
            kafka_extra: String::new(),
            link: free_port()?,
            link_extra: String::new(),
            admin: free_port()?,
            archive: Some(format!("file://{}", dir.join("archive").display())),
            archive_extra: String::new(),
            extra: String::new(),
            env: Vec::new(),
        };
        let edge = EdgePlan {
            id: "gw-1".into(),
            data_dir: dir.join("edge"),
            mqtt: free_port()?,
            mqtt_extra: String::new(),
            admin: free_port()?,
            admin_extra: String::new(),
            uplink_url: format!("http://{}", cloud.link),
            uplink_extra: String::new(),
            streams: TELEMETRY.into(),
            extra: String::new(),
        };
        Ok(Self { dir, edge, cloud, edge_build: edge_build.clone() })
    }

    /// Writes `edge.toml` and describes the process; nothing runs yet.
    pub fn edge(&self) -> Result<Broker> {
        let e = &self.edge;
        let text = format!(
            "id = {:?}\ndata_dir = {:?}\n{}\n[mqtt]\nlisten = \"{}\"\n{}\n[admin]\nlisten = \"{}\"\n{}\n[uplink]\nurl = {:?}\n{}\n{}\n",
            e.id,
            e.data_dir,
            e.extra,
            e.mqtt,
            e.mqtt_extra,
            e.admin,
            e.admin_extra,
            e.uplink_url,
            e.uplink_extra,
            e.streams
        );
        let config = self.dir.join("edge.toml");
        std::fs::write(&config, text)?;
        let mut broker = Broker::new(Kind::Edge, &config, e.admin, &self.dir.join("edge.log"))?;
        if let Some(program) = &self.edge_build.program {
            broker.program = program.clone();
        }
        broker.wrapper = self.edge_build.wrapper.split_whitespace().map(str::to_owned).collect();
        Ok(broker)
    }

    /// Writes `cloud.toml` and describes the process; nothing runs yet.
    pub fn cloud(&self) -> Result<Broker> {
        let c = &self.cloud;
        let archive = match &c.archive {
            Some(url) => format!("[archive]\nurl = {url:?}\n{}", c.archive_extra),
            None => String::new(),
        };
        let text = format!(
            "node_id = 1\ndata_dir = {:?}\n{}\n[kafka]\nlisten = \"{}\"\n{}\n[admin]\nlisten = \"{}\"\n{archive}\n[link]\nlisten = \"{}\"\n{}\n",
            c.data_dir, c.extra, c.kafka, c.kafka_extra, c.admin, c.link, c.link_extra
        );
        let config = self.dir.join("cloud.toml");
        std::fs::write(&config, text)?;
        let mut broker = Broker::new(Kind::Cloud, &config, c.admin, &self.dir.join("cloud.log"))?;
        broker.env = c.env.clone();
        Ok(broker)
    }
}

/// A port that nothing listens on, below the range that outgoing connections take theirs from, so that a broker killed
/// and started again finds it free.
pub fn free_port() -> Result<SocketAddr> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = 15_000 + (std::process::id() % 12_000) as u16;
    for _ in 0..4_000 {
        let port = start + NEXT.fetch_add(1, Ordering::Relaxed) % 4_000;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        if TcpListener::bind(address).is_ok() {
            return Ok(address);
        }
    }
    bail!("no free port on loopback from {start}")
}

/// Asks `probe` again and again until it gives a value. The pause is only how often we look; what ends the wait is the event.
pub async fn until<T, F, Fut>(what: &str, patience: Duration, mut probe: F) -> Result<T>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<Option<T>>>,
{
    let deadline = tokio::time::Instant::now() + patience;
    let mut last = None;
    loop {
        match probe().await {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => {}
            Err(error) => last = Some(error),
        }
        if tokio::time::Instant::now() > deadline {
            return match last {
                Some(error) => Err(error).with_context(|| format!("gave up after {patience:?} waiting for {what}")),
                None => bail!("gave up after {patience:?} waiting for {what}"),
            };
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// How long an event may take: the disk of a small machine stalls for tens of seconds now and then.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Milliseconds since 1970, as records carry them.
pub fn now_ms() -> i64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_millis() as i64)
}

/// A small seeded generator (splitmix64): tests print their seed, so a failing run can be had again.
#[derive(Clone)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64 + 1) as usize);
        }
    }
}
