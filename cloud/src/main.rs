//! `tributary-cloud`: the command line, and the one place that puts the parts together. Engines are named in `open`.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, anyhow};
use clap::{Parser, Subcommand};
use cloud::admin::{Node, render};
use cloud::archive::{DataDirLock, Presence, tool};
use cloud::catalogue::{Catalogue, CatalogueSettings, EngineRule, Placement};
use cloud::config::CloudConfig;
use cloud::front::{Broker, FrontSettings, Listener};
use cloud::groups::{GroupSettings, Groups};
use cloud::ingest::{EdgeGrant, Grants, Ingest, IngestSettings};
use cloud::salvage::{self, SalvageArgs};
use cloud::shard::{Clock, ShardSettings};
use cloud::shards::Shards;
use daemon::admin::{AdminArgs, AdminClient};
use daemon::descriptors::{self, DoorShare};
use daemon::files;
use daemon::settings::SettingsArgs;
use daemon::tls::{self, ServerCertificate};
use shared::config::{Loaded, TlsFiles};
use shared::door::Door;
use shared::name::TimestampMs;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{error, info, warn};

mod open;

use open::Opened;

const ENV_PREFIX: &str = "TRIBUTARY_CLOUD";
/// How long looking after one shard may take.
const CARE_PATIENCE: Duration = Duration::from_secs(2);
/// How long a running broker may take to say how it is.
const STATUS_PATIENCE: Duration = Duration::from_secs(10);
/// How long the end of a node waits for the archive to say who has its shard now.
const DEPOSED_PATIENCE: Duration = Duration::from_secs(2);
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
    Run {
        #[command(flatten)]
        settings: SettingsArgs,
        /// Takes the shards from a node that owns them in the archive, whether it lives or not. That node stops.
        #[arg(long)]
        take_over: bool,
    },
    /// Checks the settings and prints each effective value with its origin.
    Check(SettingsArgs),
    /// Looks into an archive, checks it or copies it, without a running broker.
    #[command(subcommand)]
    Archive(tool::ArchiveCommand),
    /// Sends what this node alone has, since another one took its shards over, to that one. Exit code: 0 everything was sent,
    /// 1 something was not.
    Salvage(SalvageArgs),
    /// Prints topics, partitions and edges of a running broker.
    Status {
        /// The broker's admin port.
        #[arg(long, default_value = "http://127.0.0.1:9482", value_name = "URL")]
        admin: String,
        #[command(flatten)]
        access: AdminArgs,
    },
}

fn main() -> anyhow::Result<()> {
    files::keep_private();
    tls::install_provider();
    let runtime = daemon::runtime()?;
    match Cli::parse().command {
        Command::Run { settings, take_over } => {
            daemon::init_logging();
            let loaded = load(&settings)?;
            warnings(&settings, &loaded.settings).iter().for_each(|text| warn!("{text}"));
            runtime.block_on(run(loaded.settings, take_over))
        }
        Command::Check(args) => {
            let loaded = load(&args)?;
            print!("{}", loaded.describe()?);
            warnings(&args, &loaded.settings).iter().for_each(|text| println!("# WARN: {text}"));
            Ok(())
        }
        Command::Archive(command) => {
            let config = command.settings().load::<CloudConfig>(ENV_PREFIX)?.settings;
            std::process::exit(runtime.block_on(tool::run(&command, &config, aws_variables())))
        }
        Command::Salvage(args) => {
            let config = args.settings.load::<CloudConfig>(ENV_PREFIX)?.settings;
            let code = runtime.block_on(salvage::run(&args, &config, aws_variables(), &mut std::io::stdout()))?;
            std::process::exit(code)
        }
        Command::Status { admin, access } => {
            let client = AdminClient::new(&admin, &access, STATUS_PATIENCE)?;
            print!("{}", render(&runtime.block_on(client.status())?));
            Ok(())
        }
    }
}

fn load(args: &SettingsArgs) -> anyhow::Result<Loaded<CloudConfig>> {
    let loaded = args.load::<CloudConfig>(ENV_PREFIX)?;
    loaded.settings.check().map_err(|text| anyhow!(text))?;
    grants(&loaded.settings)?;
    loaded.settings.admin.read_token()?;
    Ok(loaded)
}

/// What works, and a person should know.
fn warnings(args: &SettingsArgs, config: &CloudConfig) -> Vec<String> {
    let limit = descriptors::raise();
    let doors = config.doors(limit);
    let doors = doors.iter().filter_map(|share| share.warning(limit));
    let file =
        args.config_file().filter(|_| config.holds_secrets()).map(|path| ("--config".to_owned(), path.to_owned()));
    let secrets = config.secret_files().into_iter().chain(file);
    let secrets = secrets.filter_map(|(key, path)| files::secret_warning(&key, &path));
    doors.chain(secrets).collect()
}

fn wall_ms() -> TimestampMs {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as TimestampMs)
}

fn grants(config: &CloudConfig) -> anyhow::Result<Grants> {
    let mut grants: Vec<EdgeGrant> = Vec::new();
    for edge in &config.link.edge {
        let token = daemon::settings::secret("[[link.edge]] token", edge.token.as_ref(), edge.token_file.as_deref())?;
        let token = token.with_context(|| format!("[[link.edge]] id = \"{}\": no token", edge.id))?;
        if let Some(other) = grants.iter().find(|grant| grant.token == token) {
            anyhow::bail!(
                "[[link.edge]] id = \"{}\" and id = \"{}\" have the same token: a token says which gateway sends, so give \
                 each its own",
                other.id,
                edge.id
            );
        }
        let (id, topics) = (edge.id.clone(), edge.topics.clone());
        grants.push(EdgeGrant { id, token, topics });
    }
    Ok(Grants::new(grants))
}

/// Everything that is opened before anything is served, so that a start either works or says why not.
struct Started {
    node: Node,
    stop: watch::Sender<bool>,
    /// Ends the admin port, which tells to the end what the node does.
    closed: watch::Sender<bool>,
    tasks: JoinSet<anyhow::Result<()>>,
}

/// What listeners are started with.
struct Serving {
    tasks: JoinSet<anyhow::Result<()>>,
    stopping: watch::Receiver<bool>,
    /// Those of all listeners.
    certificates: Vec<Arc<ServerCertificate>>,
}

/// What is held for as long as the process runs.
struct NodeHold {
    data_dir: PathBuf,
    _lock: DataDirLock,
    presence: Option<Arc<Presence>>,
    /// Connections of each door: Kafka, link, admin.
    shares: [DoorShare; 3],
}

async fn run(config: CloudConfig, take_over: bool) -> anyhow::Result<()> {
    let signal = daemon::stop_signal();
    tokio::pin!(signal);
    let held = tokio::select! {
        held = hold(&config, take_over) => held?,
        stopped = &mut signal => return stopped,
    };
    let result = serve(&config, &held, signal).await;
    // Everything has ended: whoever comes next need not watch.
    if let Some(presence) = &held.presence {
        presence.leave().await;
    }
    info!("stopped");
    result
}

/// Takes the data directory, and asks who owns the archive.
async fn hold(config: &CloudConfig, take_over: bool) -> anyhow::Result<NodeHold> {
    let limit = descriptors::raise();
    let shares = config.doors(limit);
    info!(limit, kafka = shares[0].granted, link = shares[1].granted, "files that may be open, and connections");
    let data_dir = std::path::absolute(&config.data_dir)?;
    keep_private("data_dir", &data_dir)?;
    if let Some(archive) =
        config.archive_url().map_err(|text| anyhow!(text))?.as_deref().and_then(|url| url.strip_prefix("file://"))
    {
        keep_private("[archive] url", Path::new(archive))?;
    }
    let lock = DataDirLock::acquire(&data_dir)?;
    let presence = open::presence(config, &data_dir, &lock, aws_variables(), take_over).await?;
    if let Some(presence) = presence.clone() {
        // To the end: to open shards and to ship what is left may take long.
        tokio::spawn(presence.run());
    }
    Ok(NodeHold { data_dir, _lock: lock, presence, shares })
}

async fn serve(
    config: &CloudConfig,
    held: &NodeHold,
    mut signal: Pin<&mut impl Future<Output = anyhow::Result<()>>>,
) -> anyhow::Result<()> {
    let mut started = tokio::select! {
        started = start(config, held) => started?,
        stopped = &mut signal => return stopped,
    };
    let shards = started.node.shards.clone();
    let result = tokio::select! {
        stopped = signal => stopped,
        // A listener or the log that ends by itself ends the node: half a broker would look like a whole one.
        Some(ended) = started.tasks.join_next() => ended.context("a task panicked")?.and(Err(anyhow!("a listener ended"))),
    };
    if let Err(cause) = &result {
        error!("{cause:#}");
    }
    started.stop.send_replace(true);
    shards.members().iter().for_each(|member| member.shard.hurry());
    started.node.ingest.close();
    // All but the admin port, unless that is what ended.
    while started.tasks.len() > 1 {
        if let Some(Ok(Err(cause))) = started.tasks.join_next().await {
            warn!("{cause:#}");
        }
    }
    // All at once: one that waits for a bucket must not keep the others.
    let mut closing = JoinSet::new();
    for member in shards.members().iter().cloned() {
        closing.spawn_blocking(move || member.shard.close());
    }
    closing.join_all().await;
    started.closed.send_replace(true);
    while let Some(ended) = started.tasks.join_next().await {
        if let Ok(Err(cause)) = ended {
            warn!("{cause:#}");
        }
    }
    result
}

async fn start(config: &CloudConfig, held: &NodeHold) -> anyhow::Result<Started> {
    let NodeHold { data_dir, presence, shares, .. } = held;
    let [kafka_share, link_share, admin_share] = shares.clone();
    let (stop, stopping) = watch::channel(false);
    let mut tasks: JoinSet<anyhow::Result<()>> = JoinSet::new();
    let clock: Clock = Arc::new(wall_ms);
    let Opened { shards, archives, cluster_id } =
        open::open(config, data_dir, clock, aws_variables(), presence.clone()).await?;
    info!(node = config.node_id, cluster = cluster_id, shards = shards.members().len(), data_dir = %data_dir.display(), "log is open");

    for member in shards.members() {
        if let Some(archive) = archives.get(&member.number) {
            let (archive, stopping) = (archive.clone(), stopping.clone());
            let run = archive.clone().run(member.shard.clone(), stopped(stopping.clone()));
            tasks.spawn(async move {
                run.await;
                match archive.status().deposed {
                    Some(why) => Err(anyhow!(why)),
                    None => until_stopped(std::future::ready(()), stopping).await,
                }
            });
        }
    }
    tasks.spawn(retention(shards.clone(), stopping.clone()));

    let defaults = ShardSettings::default();
    let rules = config.topic.iter().map(|rule| EngineRule { pattern: rule.name.clone(), engine: rule.engine });
    let members = shards.members().iter().map(|member| (member.number, member.engine));
    let catalogue = CatalogueSettings {
        retention_ms: defaults.retention_ms,
        retention_bytes: defaults.retention_bytes,
        placement: Placement::new(members, rules.collect()),
        ..CatalogueSettings::default()
    };
    let catalogue = Arc::new(Catalogue::new(shards.clone(), catalogue));
    let mut serving = Serving { tasks, stopping: stopping.clone(), certificates: Vec::new() };
    let broker = kafka(config, kafka_share, &shards, &cluster_id, &catalogue, &mut serving).await?;
    let ingest = link(config, link_share, &shards, &catalogue, &mut serving).await?;
    let Serving { mut tasks, certificates, .. } = serving;
    if !certificates.is_empty() {
        tasks.spawn(tls::watch(certificates, stopping.clone()));
    }

    let port = config.admin.port(Door::new(admin_share.granted))?;
    let (admin, presence) = (port.clone(), presence.clone());
    let node =
        Node { node_id: config.node_id, cluster_id, shards, archives, broker, ingest, stopping, admin, presence };
    let admin = daemon::bind("[admin] listen", config.admin.listen.0)?;
    info!(address = %config.admin.listen, "listening for admin");
    let (observed, collector) = (Arc::new(node.clone()), Box::new(node.clone()));
    let (closed, closing) = watch::channel(false);
    let serving = daemon::admin::serve(admin, observed, collector, axum::Router::new(), port, closing);
    tasks.spawn(async move { serving.await.context("[admin] listen") });
    Ok(Started { node, stop, closed, tasks })
}

fn keep_private(key: &str, dir: &Path) -> anyhow::Result<()> {
    let tightened = files::private_dir(dir)
        .with_context(|| format!("{key} = \"{}\" cannot be made, read or kept private", dir.display()))?;
    if let Some(first) = tightened.first() {
        warn!(path = %first.display(), files = tightened.len(), "other users could read the data: their rights were taken away");
    }
    Ok(())
}

/// Credentials, region and endpoint of an `s3://` store.
fn aws_variables() -> Vec<(String, String)> {
    std::env::vars().filter(|(name, _)| name.starts_with("AWS_")).collect()
}

async fn kafka(
    config: &CloudConfig,
    share: DoorShare,
    shards: &Arc<Shards>,
    cluster_id: &str,
    catalogue: &Arc<Catalogue>,
    serving: &mut Serving,
) -> anyhow::Result<Arc<Broker>> {
    let mut groups = GroupSettings::default();
    if let Some(delay) = config.kafka.group_initial_rebalance_delay {
        groups.initial_rebalance_delay_ms = delay.0.as_millis() as u64;
    }
    let groups = Groups::new(shards.clone(), groups);
    let mut settings = FrontSettings { connections_max: share.granted, ..FrontSettings::default() };
    if let Some(auto_create) = config.kafka.auto_create_topics {
        settings.auto_create_topics = auto_create;
    }
    let (log, state, cluster_id) = (shards.clone(), shards.clone(), cluster_id.to_owned());
    let broker = Broker::new(log, state, catalogue.clone(), groups, config.node_id, cluster_id, settings);
    let broker = Arc::new(broker);
    for listener in config.kafka_listeners() {
        let (advertised_host, advertised_port) = listener.advertised().map_err(|text| anyhow!(text))?;
        let tls = certificate(listener.tls.as_ref(), &mut serving.certificates)?;
        let socket = daemon::bind("[kafka] listen", listener.listen.0)?;
        info!(address = %listener.listen, advertised = %format!("{advertised_host}:{advertised_port}"), "listening for Kafka");
        let name = listener.name.unwrap_or_else(|| listener.listen.to_string());
        let listener = Arc::new(Listener { name, advertised_host, advertised_port, tls });
        let stopping = serving.stopping.clone();
        let served = broker.clone().serve(socket, listener, stopping.clone());
        serving.tasks.spawn(until_stopped(served, stopping));
    }
    Ok(broker)
}

async fn link(
    config: &CloudConfig,
    share: DoorShare,
    shards: &Arc<Shards>,
    catalogue: &Arc<Catalogue>,
    serving: &mut Serving,
) -> anyhow::Result<Arc<Ingest>> {
    let settings =
        IngestSettings { grants: grants(config)?, connections_max: share.granted, ..IngestSettings::default() };
    let ingest = Ingest::new(settings, shards.clone(), shards.clone(), catalogue.clone(), shards.clone(), wall_ms);
    let tls = certificate(config.link.tls.as_ref(), &mut serving.certificates)?;
    let socket = daemon::bind("[link] listen", config.link.listen.0)?;
    info!(address = %config.link.listen, tls = tls.is_some(), "listening for edges");
    let served = cloud::ingest::serve(ingest.clone(), socket, tls, serving.stopping.clone());
    serving.tasks.spawn(async move { served.await.context("[link] listen") });
    Ok(ingest)
}

/// A listener's TLS, whose certificate joins those that are read again when they change.
fn certificate(
    files: Option<&TlsFiles>,
    certificates: &mut Vec<Arc<ServerCertificate>>,
) -> anyhow::Result<Option<Arc<rustls::ServerConfig>>> {
    let Some(files) = files else { return Ok(None) };
    let certificate = ServerCertificate::read(files)?;
    certificates.push(certificate.clone());
    Ok(Some(certificate.config()))
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

/// Applies retention now and then, and ends the node when one of its logs has stopped: a restart reads again what is there.
async fn retention(shards: Arc<Shards>, stopping: watch::Receiver<bool>) -> anyhow::Result<()> {
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    let mut due = tokio::time::Instant::now() + RETENTION_CHECK;
    while !*stopping.borrow() {
        tokio::select! {
            _ = tick.tick() => {}
            () = stopped(stopping.clone()) => break,
        }
        for member in shards.members() {
            if let Some(why) = member.shard.status().stopped {
                // Why an owner was deposed takes a moment to be found out, and is the better word.
                tokio::time::sleep(DEPOSED_PATIENCE).await;
                anyhow::bail!("the log of shard {} ({}) has stopped: {why}", member.number, member.engine);
            }
        }
        // A store that does not answer holds up its own shard and nothing else here.
        match tokio::time::timeout(CARE_PATIENCE, shards.raise_ceilings()).await {
            Ok(Ok(())) => {}
            Ok(Err(cause)) => warn!(%cause, "no more offsets were reserved for shards in memory, trying again"),
            Err(_) => {
                warn!("no more offsets were reserved for shards in memory: the catalogue's shard does not answer")
            }
        }
        if tokio::time::Instant::now() >= due {
            due += RETENTION_CHECK;
            for member in shards.members() {
                match tokio::time::timeout(CARE_PATIENCE, member.shard.apply_retention()).await {
                    Ok(Ok(_)) => {}
                    Ok(Err(cause)) => {
                        warn!(shard = member.number, %cause, "retention was not applied, trying again later")
                    }
                    Err(_) => warn!(shard = member.number, "retention is not durable yet: the shard does not answer"),
                }
            }
        }
    }
    Ok(())
}
