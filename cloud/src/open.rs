//! Opens the shards of a node, each with its engine and its archive: the one place that names engines.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use cloud::archive::ArchiveError;
use cloud::archive::{
    AdvertisedListener, Archive, ArchiveSettings, DataDirLock, DiskCache, Presence, PresenceSettings, Recovered,
    StoreError,
};
use cloud::config::CloudConfig;
use cloud::shard::{Clock, LocalWal, Shard, ShardSettings};
use cloud::shards::{Member, Shards, assign, reserve_offsets};
use cloud::state::{CATALOGUE, Engine, SlotChange, read_state};
use cloud::wal::BlockLog;
use cloud::wal::disk::Directory;
use cloud::wal::file::{FileWal, FileWalSettings};
use cloud::wal::memory::MemoryWal;
use cloud::wal::object::ObjectWalSettings;
use shared::name::Offset;
use tracing::warn;

/// The shards of a node and their archives.
pub struct Opened {
    pub shards: Arc<Shards>,
    pub archives: BTreeMap<u32, Arc<Archive>>,
    pub cluster_id: String,
}

/// How long a PUT of a block may take before it is made again with the same bytes.
const BLOCK_PUT_TIMEOUT: Duration = Duration::from_secs(5);

struct Opener<'a> {
    config: &'a CloudConfig,
    data_dir: PathBuf,
    clock: Clock,
    archives: BTreeMap<u32, Arc<Archive>>,
    cache: Option<Arc<DiskCache>>,
    presence: Option<Arc<Presence>>,
    /// Credentials, region and endpoint of an `s3://` store.
    aws_variables: Vec<(String, String)>,
}

/// The node's heartbeat in the archive that the settings name, once nobody else who lives owns what is there; `None` where
/// archiving is off. Nothing is written.
pub async fn presence(
    config: &CloudConfig,
    data_dir: &Path,
    lock: &DataDirLock,
    aws_variables: Vec<(String, String)>,
    take_over: bool,
) -> anyhow::Result<Option<Arc<Presence>>> {
    let Some(url) = config.archive_url().map_err(|text| anyhow!(text))? else { return Ok(None) };
    let mut kafka = Vec::new();
    for listener in config.kafka_listeners() {
        let (host, port) = listener.advertised().map_err(|text| anyhow!(text))?;
        let name = listener.name.unwrap_or_else(|| listener.listen.to_string());
        kafka.push(AdvertisedListener { name, address: format!("{host}:{port}") });
    }
    let link = &config.link;
    let scheme = if link.tls.is_some() { "https" } else { "http" };
    let settings = PresenceSettings {
        node_id: config.node_id,
        identity: lock.identity(),
        kafka,
        link_url: (!link.listen.0.ip().is_unspecified()).then(|| format!("{scheme}://{}", link.listen)),
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        data_dir: data_dir.display().to_string(),
        take_over,
    };
    let options = config.archive.store_options(aws_variables);
    let presence = Presence::open(&url, &options, config.archive.requests(), settings)?;
    if take_over {
        for owner in presence.describe_owners().await {
            warn!(owner, "told to take over (--take-over): the owner is not asked whether it lives");
        }
    }
    match presence.admit().await {
        // Whoever needs the store says so; a file shard starts without it and asks before it claims.
        Err(ArchiveError::Store(StoreError::Failed { operation, key, reason })) => {
            warn!(operation, %key, reason, "the archive cannot be asked who owns it");
        }
        admitted => admitted?,
    }
    Ok(Some(presence))
}

/// Opens every shard there is, and those that the settings add.
pub async fn open(
    config: &CloudConfig,
    data_dir: &Path,
    clock: Clock,
    aws_variables: Vec<(String, String)>,
    presence: Option<Arc<Presence>>,
) -> anyhow::Result<Opened> {
    let cache = disk_cache(config, data_dir);
    let (data_dir, archives) = (data_dir.to_owned(), BTreeMap::new());
    let mut opener = Opener { config, data_dir, clock, archives, cache, presence, aws_variables };
    let data_dir = opener.data_dir.clone();
    let wanted = config.shards.wanted();
    let first = if config.shards.file > 0 { Engine::File } else { Engine::Object };
    // Before anything is claimed: a take-over cannot be undone.
    anyhow::ensure!(
        first != Engine::Object || !data_dir.join("wal").exists(),
        "[shards] file = 0, and {} holds the log of a file shard: an engine is chosen once. Set file = 1 again, or use an \
         empty data_dir and an archive url of its own for a new system",
        data_dir.join("wal").display()
    );
    let catalogue = opener.durable(CATALOGUE, first).await?;
    let mut known: Vec<(u32, Engine)> =
        read_state(&*catalogue, |state| state.shards().map(|(number, entry)| (number, entry.engine)).collect());
    if known.is_empty() {
        catalogue.commit_own(vec![SlotChange::ShardAdded { shard: CATALOGUE, engine: first }.into()]).await?;
        known.push((CATALOGUE, first));
    }
    let was = known.iter().find(|(number, _)| *number == CATALOGUE).map_or(first, |(_, engine)| *engine);
    anyhow::ensure!(
        was == first,
        "[shards]: the catalogue of this system lies in a shard of engine {was}, and the settings would have it in one of \
         engine {first}: an engine is chosen once. Set {was} = 1 or more{}",
        if was == Engine::Object { " and file = 0" } else { "" }
    );
    let all = assign(&known, &wanted).map_err(|text| anyhow!(text))?;
    let added = all.iter().filter(|shard| !known.contains(shard));
    let added = added.map(|(shard, engine)| SlotChange::ShardAdded { shard: *shard, engine: *engine }.into()).collect();
    catalogue.commit_own(added).await?;
    let (mut members, mut ceilings) = (Vec::new(), BTreeMap::new());
    for (number, engine) in all {
        let shard = match (number, engine) {
            (CATALOGUE, _) => catalogue.clone(),
            (_, Engine::Memory) => opener.memory(&catalogue, number, &mut ceilings).await?,
            _ => opener.durable(number, engine).await?,
        };
        members.push(Member { number, engine, shard });
    }
    let shards = Arc::new(Shards::new(members, ceilings));
    shards.reconcile().await?;
    if let Some(age_max) = config.archive.stop_unconfirmed_after {
        // What an object shard acknowledges is in the bucket, where nobody else can have claimed it.
        for member in shards.members().iter().filter(|member| member.engine == Engine::File) {
            if let Some(archive) = opener.archives.get(&member.number) {
                member.shard.acknowledge_while(archive.confirmation(), age_max.0);
            }
        }
    }
    let archive = opener.archives.get(&CATALOGUE).context("the catalogue's shard has an archive")?;
    let cluster_id = archive.cluster_id().to_owned();
    Ok(Opened { shards, archives: opener.archives, cluster_id })
}

impl Opener<'_> {
    fn shard_settings(&self, number: u32) -> anyhow::Result<ShardSettings> {
        Ok(ShardSettings {
            shard: number,
            nonce: random()?,
            tail_bytes_max: self.config.wal.tail_cache_bytes.0 as usize,
            ..ShardSettings::default()
        })
    }

    /// A shard that outlives the process, with its archive.
    async fn durable(&mut self, number: u32, engine: Engine) -> anyhow::Result<Arc<Shard>> {
        let settings = self.archive_settings(number, engine)?;
        let mut shard_settings = self.shard_settings(number)?;
        let (archive, recovered, wal): (_, _, Box<dyn BlockLog>) = if engine == Engine::Object {
            let archive = Archive::open(settings).await?;
            let recovered = archive.take_over().await.with_context(|| format!("shard {number} (object)"))?;
            shard_settings.archived = false;
            shard_settings.linger = self.config.shards.object_linger.0;
            let wal_settings = ObjectWalSettings { bytes_max: self.config.wal.bytes_max.0, ..Default::default() };
            let wal = archive.object_wal(&recovered, wal_settings);
            (archive, recovered, Box::new(wal))
        } else {
            let wal = self.file_wal(number)?;
            let archive = Archive::open(settings).await?;
            let recovered = archive.recover(&LocalWal(&wal)).await.with_context(|| format!("shard {number} (file)"))?;
            shard_settings.archived = archive.ships();
            (archive, recovered, Box::new(wal))
        };
        if let Some(cache) = &self.cache {
            archive.use_disk_cache(cache.clone());
        }
        let (cold, clock) = (archive.cold(), self.clock.clone());
        self.archives.insert(number, archive);
        let open = move || Shard::open(shard_settings, wal, recovered, Some(cold), clock);
        Ok(tokio::task::spawn_blocking(open).await??)
    }

    /// A shard that keeps nothing beyond the process.
    async fn memory(
        &self,
        catalogue: &Shard,
        number: u32,
        ceilings: &mut BTreeMap<u32, Offset>,
    ) -> anyhow::Result<Arc<Shard>> {
        let (begins, ceiling) = reserve_offsets(catalogue, number).await?;
        ceilings.insert(number, ceiling);
        let settings = ShardSettings { archived: false, drops_oldest: true, ..self.shard_settings(number)? };
        let wal = MemoryWal::new(self.config.shards.memory_bytes_max.0);
        let shard = Shard::open(settings, Box::new(wal), Recovered::default(), None, self.clock.clone())?;
        shard.commit_own(vec![begins]).await?;
        Ok(shard)
    }

    fn file_wal(&self, number: u32) -> anyhow::Result<FileWal> {
        let directory = match number {
            CATALOGUE => self.data_dir.join("wal"),
            number => self.data_dir.join("shards").join(number.to_string()).join("wal"),
        };
        std::fs::create_dir_all(directory.parent().unwrap_or(&self.data_dir))
            .with_context(|| format!("{} cannot be made", directory.display()))?;
        let settings = FileWalSettings {
            file_bytes: self.config.wal.file_bytes.0,
            bytes_max: self.config.wal.bytes_max.0,
            ..FileWalSettings::default()
        };
        Ok(FileWal::open(Box::new(Directory::open(&directory)?), settings, random()?)?)
    }

    fn archive_settings(&self, number: u32, engine: Engine) -> anyhow::Result<ArchiveSettings> {
        let config = &self.config.archive;
        let mut requests = config.requests();
        if engine == Engine::Object {
            requests.timeout = BLOCK_PUT_TIMEOUT;
        }
        Ok(ArchiveSettings {
            url: self.config.archive_url().map_err(|text| anyhow!(text))?,
            store_options: config.store_options(self.aws_variables.iter().cloned()),
            data_dir: self.data_dir.clone(),
            shard: number,
            owns_wal: engine == Engine::Object,
            required: self.config.shards.object > 0,
            max_lag: config.max_lag.0,
            segment_bytes: config.segment_bytes.0,
            segment_age: config.segment_age.0,
            sweep_interval: config.sweep_interval.0,
            requests,
            presence: self.presence.clone(),
            ..ArchiveSettings::default()
        })
    }
}

/// A cache that cannot be had is no reason not to start.
fn disk_cache(config: &CloudConfig, data_dir: &Path) -> Option<Arc<DiskCache>> {
    let (directory, bytes_max) = (data_dir.join("cache"), config.disk_cache_bytes());
    if bytes_max == 0 && !directory.exists() {
        return None;
    }
    match DiskCache::open(&directory, bytes_max) {
        Ok(cache) => (bytes_max > 0).then_some(cache),
        Err(cause) => {
            warn!(%cause, directory = %directory.display(), "no disk cache; archived records come from the bucket");
            None
        }
    }
}

fn random() -> anyhow::Result<u64> {
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(|cause| anyhow!("no randomness from the system: {cause}"))?;
    Ok(u64::from_le_bytes(random))
}
