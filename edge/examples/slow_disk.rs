//! The edge's MQTT front and store on a disk whose syncs take at least so many milliseconds, for the benchmark of what
//! waits for the disk and what does not (`cargo bench-edge`). No uplink, no admin port; `stored/#` is stored.
//! `cargo run --release -p tributary-edge --example slow_disk -- 127.0.0.1:1883 DIR [MILLISECONDS]`

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use edge::redb_log::backend::{CappedFile, DiskBound, OpenStorage};
use edge::store::{EdgeStore, StoreSettings};
use edge::streams::StreamSettings;
use mqtt::front::{Front, ListenerSettings, Settings};
use redb::StorageBackend;
use shared::name::EdgeId;

/// As much as any run writes: nothing takes records away here, and a full disk is not what is measured.
const DISK_BUDGET: u64 = 20 << 30;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let address = args.next().context("an address to listen on")?;
    let dir = PathBuf::from(args.next().context("a directory for the database")?);
    let sync_min = Duration::from_millis(args.next().map_or(Ok(20), |text| text.parse())?);
    std::fs::create_dir_all(&dir)?;

    let rule = StreamSettings { name: "stored".into(), filters: vec!["stored/#".into()], ..StreamSettings::default() };
    let bound = DiskBound::new(DISK_BUDGET, 0);
    let storage: OpenStorage = {
        let (path, bound) = (dir.join("slow.redb"), bound.clone());
        Arc::new(move || Ok(Box::new(SlowDisk { file: CappedFile::open(&path, bound.clone())?, sync_min })))
    };
    let settings = StoreSettings { disk_budget: Some(DISK_BUDGET), ..StoreSettings::new(EdgeId::parse("gw-1")?, dir) };
    let store = EdgeStore::open_on(settings, &[rule], &storage, bound)?;

    let front = Front::new(Settings::default(), store.clone())?;
    let listener = tokio::net::TcpListener::bind(address).await?;
    tokio::spawn(front.clone().serve(listener, None, ListenerSettings::default()));
    tokio::signal::ctrl_c().await?;
    front.shutdown(Duration::from_secs(5)).await;
    tokio::task::spawn_blocking(move || store.close()).await?;
    Ok(())
}

/// The real file, really synced; what the disk was quicker than asked for is slept.
#[derive(Debug)]
struct SlowDisk {
    file: CappedFile,
    sync_min: Duration,
}

impl StorageBackend for SlowDisk {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        let began = Instant::now();
        let synced = self.file.sync_data();
        if let Some(left) = self.sync_min.checked_sub(began.elapsed()) {
            std::thread::sleep(left);
        }
        synced
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write(offset, data)
    }
}
