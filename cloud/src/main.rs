//! `tributary-cloud`: the command line, and the one place that names engines and puts the parts together.

use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, anyhow};
use clap::{Parser, Subcommand};
use cloud::admin::{Node, render};
use cloud::archive::{Archive, ArchiveSettings, tool};
use cloud::catalogue::{Catalogue, CatalogueSettings};
use cloud::config::CloudConfig;
use cloud::front::{Broker, FrontSettings, Listener};
use cloud::groups::{GroupSettings, Groups};
use cloud::ingest::{EdgeGrant, Grants, Ingest, IngestSettings};
use cloud::shard::{Clock, LocalWal, Shard, ShardSettings};
use cloud::wal::disk::Directory;
use cloud::wal::file::{FileWal, FileWalSettings};
use daemon::settings::SettingsArgs;
use daemon::tls;
use shared::config::Loaded;
use shared::name::TimestampMs;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{error, info, warn};

const ENV_PREFIX: &str = "TRIBUTARY_CLOUD";
/// The catalogue's shard, the only one so far.
const SHARD: u32 = 0;
const RETENTION_CHECK: Duration = Duration::from_secs(30);

/// The cloud broker: receives edges, serves Kafka clients, archives to object storage.
#[derive(Parser)]
#[command(name = "tributary-cloud", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs the broker until SIGTERM or Ctrl-C.
    Run(SettingsArgs),
    /// Checks the settings and prints each effective value with its origin.
    Check(SettingsArgs),
    /// Looks into an archive, checks it or copies it, without a running broker.
    #[command(subcommand)]
    Archive(tool::ArchiveCommand),
    /// Prints topics, partitions and edges of a running broker.
    Status {
        /// The broker's admin port.
        #[arg(long, default_value = "http://127.0.0.1:9482", value_name = "URL")]
        admin: String,
    },
}

fn main() -> anyhow::Result<()> {
    tls::install_provider();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    match Cli::parse().command {
        Command::Run(args) => {
            daemon::init_logging();
            let loaded = load(&args)?;
            runtime.block_on(run(loaded.settings))
        }
        Command::Check(args) => {
            print!("{}", load(&args)?.describe()?);
            Ok(())
        }
        Command::Archive(command) => {
            let config = command.settings().load::<CloudConfig>(ENV_PREFIX)?.settings;
            std::process::exit(runtime.block_on(tool::run(&command, &config, aws_variables())))
        }
        Command::Status { admin } => {
            print!("{}", render(&runtime.block_on(daemon::admin::fetch_status(&admin))?));
            Ok(())
        }
    }
}

fn load(args: &SettingsArgs) -> anyhow::Result<Loaded<CloudConfig>> {
    let loaded = args.load::<CloudConfig>(ENV_PREFIX)?;
    loaded.settings.check().map_err(|text| anyhow!(text))?;
    grants(&loaded.settings)?;
    Ok(loaded)
}

fn wall_ms() -> TimestampMs {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as TimestampMs)
}

fn grants(config: &CloudConfig) -> anyhow::Result<Grants> {
    let mut grants = Vec::new();
    for edge in &config.link.edge {
        let token = daemon::settings::secret("[[link.edge]] token", edge.token.as_ref(), edge.token_file.as_deref())?;
        let token = token.with_context(|| format!("[[link.edge]] id = \"{}\": no token", edge.id))?;
        let (id, topics) = (edge.id.clone(), edge.topics.clone());
        grants.push(EdgeGrant { id, token: token.reveal().to_owned(), topics });
    }
    Ok(Grants::new(grants))
}

/// Everything that is opened before anything is served, so that a start either works or says why not.
struct Started {
    node: Node,
    stop: watch::Sender<bool>,
    tasks: JoinSet<anyhow::Result<()>>,
}

async fn run(config: CloudConfig) -> anyhow::Result<()> {
    let signal = daemon::stop_signal();
    tokio::pin!(signal);
    let mut started = tokio::select! {
        started = start(&config) => started?,
        stopped = &mut signal => return stopped,
    };
    let shard = started.node.shard.clone();
    let result = tokio::select! {
        stopped = signal => stopped,
        // A listener or the log that ends by itself ends the node: half a broker would look like a whole one.
        Some(ended) = started.tasks.join_next() => ended.context("a task panicked")?.and(Err(anyhow!("a listener ended"))),
    };
    if let Err(cause) = &result {
        error!("{cause:#}");
    }
    started.stop.send_replace(true);
    started.node.ingest.close();
    while let Some(ended) = started.tasks.join_next().await {
        if let Ok(Err(cause)) = ended {
            warn!("{cause:#}");
        }
    }
    tokio::task::spawn_blocking(move || shard.close()).await?;
    info!("stopped");
    result
}

async fn start(config: &CloudConfig) -> anyhow::Result<Started> {
    let data_dir = std::path::absolute(&config.data_dir)?;
    std::fs::create_dir_all(&data_dir)
        .with_context(|| format!("data_dir = \"{}\" cannot be made or written", data_dir.display()))?;
    let mut random = [0; 16];
    getrandom::fill(&mut random).map_err(|cause| anyhow!("no randomness from the system: {cause}"))?;
    let (nonce, wal_id) = (u64::from_le_bytes(random[..8].try_into()?), u64::from_le_bytes(random[8..].try_into()?));

    let wal = open_wal(config, &data_dir, wal_id)?;
    let archive = Archive::open(archive_settings(config, &data_dir)?).await?;
    let recovered = archive.recover(&LocalWal(&wal)).await?;
    let shard_settings = ShardSettings {
        shard: SHARD,
        nonce,
        tail_bytes_max: config.wal.tail_cache_bytes.0 as usize,
        archived: archive.ships(),
        ..ShardSettings::default()
    };
    let clock: Clock = Arc::new(wall_ms);
    let cold = archive.cold();
    let shard =
        tokio::task::spawn_blocking(move || Shard::open(shard_settings, Box::new(wal), recovered, Some(cold), clock))
            .await??;
    info!(node = config.node_id, cluster = archive.cluster_id(), data_dir = %data_dir.display(), "log is open");

    let (stop, stopping) = watch::channel(false);
    let mut tasks: JoinSet<anyhow::Result<()>> = JoinSet::new();
    tasks.spawn(until_stopped(archive.clone().run(shard.clone(), stopped(stopping.clone())), stopping.clone()));
    tasks.spawn(retention(shard.clone(), stopping.clone()));

    let defaults = ShardSettings::default();
    let catalogue = CatalogueSettings {
        retention_ms: defaults.retention_ms,
        retention_bytes: defaults.retention_bytes,
        ..CatalogueSettings::default()
    };
    let catalogue = Arc::new(Catalogue::new(shard.clone(), catalogue));
    let broker = kafka(config, &shard, &archive, &catalogue, &mut tasks, &stopping).await?;
    let ingest = link(config, &shard, &catalogue, &mut tasks, &stopping).await?;

    let node = Node { node_id: config.node_id, shard, archive, broker, ingest };
    let admin = daemon::bind("[admin] listen", config.admin.listen.0).await?;
    info!(address = %config.admin.listen, "listening for admin");
    let (observed, collector) = (Arc::new(node.clone()), Box::new(node.clone()));
    let serving = daemon::admin::serve(admin, observed, collector, axum::Router::new(), stopping);
    tasks.spawn(async move { serving.await.context("[admin] listen") });
    Ok(Started { node, stop, tasks })
}

fn open_wal(config: &CloudConfig, data_dir: &Path, wal_id: u64) -> anyhow::Result<FileWal> {
    let directory = Directory::open(&data_dir.join("wal"))?;
    let settings = FileWalSettings {
        file_bytes: config.wal.file_bytes.0,
        bytes_max: config.wal.bytes_max.0,
        ..FileWalSettings::default()
    };
    Ok(FileWal::open(Box::new(directory), settings, wal_id)?)
}

/// Credentials, region and endpoint of an `s3://` store.
fn aws_variables() -> Vec<(String, String)> {
    std::env::vars().filter(|(name, _)| name.starts_with("AWS_")).collect()
}

fn archive_settings(config: &CloudConfig, data_dir: &Path) -> anyhow::Result<ArchiveSettings> {
    Ok(ArchiveSettings {
        url: config.archive_url().map_err(|text| anyhow!(text))?,
        store_options: config.archive.store_options(aws_variables()),
        requests: config.archive.requests(),
        data_dir: data_dir.to_owned(),
        shard: SHARD,
        max_lag: config.archive.max_lag.0,
        segment_bytes: config.archive.segment_bytes.0,
        segment_age: config.archive.segment_age.0,
        ..ArchiveSettings::default()
    })
}

async fn kafka(
    config: &CloudConfig,
    shard: &Arc<Shard>,
    archive: &Archive,
    catalogue: &Arc<Catalogue>,
    tasks: &mut JoinSet<anyhow::Result<()>>,
    stopping: &watch::Receiver<bool>,
) -> anyhow::Result<Arc<Broker>> {
    let mut groups = GroupSettings::default();
    if let Some(delay) = config.kafka.group_initial_rebalance_delay {
        groups.initial_rebalance_delay_ms = delay.0.as_millis() as u64;
    }
    let groups = Groups::new(shard.clone(), groups);
    let mut settings = FrontSettings::default();
    if let Some(auto_create) = config.kafka.auto_create_topics {
        settings.auto_create_topics = auto_create;
    }
    let cluster_id = archive.cluster_id().to_owned();
    let log = shard.clone();
    let broker = Broker::new(log, shard.clone(), catalogue.clone(), groups, config.node_id, cluster_id, settings);
    let broker = Arc::new(broker);
    for listener in config.kafka_listeners() {
        let (advertised_host, advertised_port) = listener.advertised().map_err(|text| anyhow!(text))?;
        let tls = listener.tls.as_ref().map(tls::server_config).transpose()?;
        let socket = daemon::bind("[kafka] listen", listener.listen.0).await?;
        info!(address = %listener.listen, advertised = %format!("{advertised_host}:{advertised_port}"), "listening for Kafka");
        let name = listener.name.unwrap_or_else(|| listener.listen.to_string());
        let listener = Arc::new(Listener { name, advertised_host, advertised_port, tls });
        tasks.spawn(until_stopped(broker.clone().serve(socket, listener, stopping.clone()), stopping.clone()));
    }
    Ok(broker)
}

async fn link(
    config: &CloudConfig,
    shard: &Arc<Shard>,
    catalogue: &Arc<Catalogue>,
    tasks: &mut JoinSet<anyhow::Result<()>>,
    stopping: &watch::Receiver<bool>,
) -> anyhow::Result<Arc<Ingest>> {
    let settings = IngestSettings { grants: grants(config)?, ..IngestSettings::default() };
    let ingest = Ingest::new(settings, shard.clone(), shard.clone(), catalogue.clone(), shard.clone(), wall_ms);
    let tls = config.link.tls.as_ref().map(tls::server_config).transpose()?;
    let socket = daemon::bind("[link] listen", config.link.listen.0).await?;
    info!(address = %config.link.listen, tls = tls.is_some(), "listening for edges");
    let serving = cloud::ingest::serve(ingest.clone(), socket, tls, stopping.clone());
    tasks.spawn(async move { serving.await.context("[link] listen") });
    Ok(ingest)
}

/// Resolves when `stopping` turns true.
async fn stopped(mut stopping: watch::Receiver<bool>) {
    let _ = stopping.wait_for(|stop| *stop).await;
}

/// A task that may end only after a stop was asked for.
async fn until_stopped(task: impl Future<Output = ()>, stopping: watch::Receiver<bool>) -> anyhow::Result<()> {
    task.await;
    anyhow::ensure!(*stopping.borrow(), "a part of the node ended by itself; see above");
    Ok(())
}

/// Applies retention now and then, and ends the node when its log has stopped: a restart reads again what is on disk.
async fn retention(shard: Arc<Shard>, stopping: watch::Receiver<bool>) -> anyhow::Result<()> {
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    let mut due = tokio::time::Instant::now() + RETENTION_CHECK;
    while !*stopping.borrow() {
        tokio::select! {
            _ = tick.tick() => {}
            () = stopped(stopping.clone()) => break,
        }
        if let Some(why) = shard.status().stopped {
            anyhow::bail!("the log has stopped: {why}");
        }
        if tokio::time::Instant::now() >= due {
            due += RETENTION_CHECK;
            if let Err(cause) = shard.apply_retention().await {
                warn!(%cause, "retention was not applied, trying again later");
            }
        }
    }
    Ok(())
}
