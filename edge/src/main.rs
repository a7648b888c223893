//! `tributary-edge`: the command line, and the one place that names engines and puts the parts together.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use clap::{Parser, Subcommand};
use daemon::admin::{AdminArgs, AdminClient};
use daemon::descriptors::{self, DoorShare};
use daemon::files;
use daemon::settings::SettingsArgs;
use daemon::tls::{self, FILES_CHECK, FilesChange, FilesSeen, ServerCertificate};
use edge::admin::{Gateway, TAIL_PATIENCE, render, routes, tail};
use edge::config::{EdgeConfig, Transport, UplinkConfig};
use edge::salvage::{self, Salvage};
use edge::store::{EdgeStore, StoreSettings, lock};
use edge::uplink::{Uplink, UplinkSettings};
use mqtt::front::{Front, ListenerSettings, Settings, User};
use shared::config::{Loaded, Secret};
use shared::door::Door;
use shared::name::EdgeId;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{error, info, warn};

/// How long a running broker may take to say how it is.
const STATUS_PATIENCE: Duration = Duration::from_secs(10);
const ENV_PREFIX: &str = "TRIBUTARY_EDGE";
/// How long clients get to receive what is still owed to them at a stop.
const GOODBYE: Duration = Duration::from_secs(4);

/// The gateway broker: stores what devices publish over MQTT and forwards it, exactly once.
#[derive(Parser)]
#[command(name = "tributary-edge", version)]
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
    /// Prints streams and link state of a running broker.
    Status {
        /// The broker's admin port.
        #[arg(long, default_value = "http://127.0.0.1:9481", value_name = "URL")]
        admin: String,
        #[command(flatten)]
        access: AdminArgs,
    },
    /// Sends what can be read of a database that was set aside (edge.redb.bad-*) to the cloud of the settings.
    ///
    /// The file is only read, and may be sent again: what the cloud has stays there once. The broker must not run
    /// meanwhile.
    Salvage {
        /// The database.
        file: PathBuf,
        /// Deletes the file once every record it ever held is in the cloud's bucket; otherwise keeps it and says why.
        #[arg(long)]
        remove: bool,
        #[command(flatten)]
        settings: SettingsArgs,
    },
    /// Shows or ends the sessions of MQTT clients at a running broker.
    Sessions {
        #[command(subcommand)]
        command: SessionsCommand,
    },
    /// Prints a stream's records as they come.
    Tail {
        /// The stream.
        stream: String,
        /// The first offset to print.
        #[arg(long, default_value_t = 0, value_name = "N")]
        from: i64,
        /// One JSON object per line, keys and values in base64.
        #[arg(long)]
        json: bool,
        /// The broker's admin port.
        #[arg(long, default_value = "http://127.0.0.1:9481", value_name = "URL")]
        admin: String,
        #[command(flatten)]
        access: AdminArgs,
    },
}

#[derive(Subcommand)]
enum SessionsCommand {
    /// Prints each session: its client, whether it is connected, subscriptions, what is queued, when it ends.
    Ls {
        /// One JSON object per line.
        #[arg(long)]
        json: bool,
        /// The broker's admin port.
        #[arg(long, default_value = "http://127.0.0.1:9481", value_name = "URL")]
        admin: String,
        #[command(flatten)]
        access: AdminArgs,
    },
    /// Ends a session with all it holds: subscriptions, queued messages, packet ids. A connected client is disconnected.
    Rm {
        /// The client identifier.
        client: String,
        /// The broker's admin port.
        #[arg(long, default_value = "http://127.0.0.1:9481", value_name = "URL")]
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
        Command::Run(args) => {
            daemon::init_logging();
            let loaded = load(&args)?;
            warnings(&args, &loaded.settings).iter().for_each(|text| warn!("{text}"));
            runtime.block_on(run(loaded.settings))
        }
        Command::Check(args) => {
            let loaded = load(&args)?;
            print!("{}", loaded.describe()?);
            warnings(&args, &loaded.settings).iter().for_each(|text| println!("# WARN: {text}"));
            Ok(())
        }
        Command::Status { admin, access } => {
            let client = AdminClient::new(&admin, &access, STATUS_PATIENCE)?;
            print!("{}", render(&runtime.block_on(client.status())?));
            Ok(())
        }
        Command::Salvage { file, remove, settings } => {
            daemon::init_logging();
            let loaded = load(&settings)?;
            runtime.block_on(salvage(&file, remove, loaded.settings))
        }
        Command::Sessions { command } => runtime.block_on(async {
            match command {
                SessionsCommand::Ls { json, admin, access } => {
                    edge::sessions::ls(&AdminClient::new(&admin, &access, STATUS_PATIENCE)?, json).await
                }
                SessionsCommand::Rm { client, admin, access } => {
                    edge::sessions::rm(&AdminClient::new(&admin, &access, STATUS_PATIENCE)?, &client).await
                }
            }
        }),
        Command::Tail { stream, from, json, admin, access } => {
            let client = AdminClient::new(&admin, &access, TAIL_PATIENCE)?;
            runtime.block_on(tail(&client, &stream, from, json))
        }
    }
}

fn load(args: &SettingsArgs) -> anyhow::Result<Loaded<EdgeConfig>> {
    let loaded = args.load::<EdgeConfig>(ENV_PREFIX)?;
    let config = &loaded.settings;
    config.check().map_err(|text| anyhow!(text))?;
    users(config)?;
    config.uplink.0.iter().try_for_each(|uplink| token(uplink).map(drop))?;
    config.admin.read_token()?;
    edge::streams::Rules::new(&config.stream)?;
    Ok(loaded)
}

/// What works, and a person should know.
fn warnings(args: &SettingsArgs, config: &EdgeConfig) -> Vec<String> {
    let limit = descriptors::raise();
    let doors = config.doors(limit);
    let doors = doors.iter().filter_map(|share| share.warning(limit));
    let file =
        args.config_file().filter(|_| config.holds_secrets()).map(|path| ("--config".to_owned(), path.to_owned()));
    let secrets = config.secret_files().into_iter().chain(file);
    let secrets = secrets.filter_map(|(key, path)| files::secret_warning(&key, &path));
    doors.chain(secrets).collect()
}

fn users(config: &EdgeConfig) -> anyhow::Result<Vec<User>> {
    let user = |user: &edge::config::MqttUserConfig| {
        let key = "[[mqtt.user]] password";
        let password = daemon::settings::secret(key, user.password.as_ref(), user.password_file.as_deref())?;
        let password = password.with_context(|| format!("[[mqtt.user]] name = {:?}: no password", user.name))?;
        Ok(User { name: user.name.clone(), password })
    };
    config.mqtt.user.iter().map(user).collect()
}

fn token(uplink: &UplinkConfig) -> anyhow::Result<Option<Secret>> {
    daemon::settings::secret("[uplink] token", uplink.token.as_ref(), uplink.token_file.as_deref())
}

/// Everything that is opened before anything is served, so that a start either works or says why not.
struct Started {
    gateway: Gateway,
    /// Said first: nobody else should come.
    told: watch::Sender<bool>,
    stop: watch::Sender<bool>,
    tasks: JoinSet<anyhow::Result<()>>,
}

async fn run(config: EdgeConfig) -> anyhow::Result<()> {
    let signal = daemon::stop_signal();
    tokio::pin!(signal);
    let mut started = tokio::select! {
        started = start(&config) => started?,
        stopped = &mut signal => return stopped,
    };
    let gateway = started.gateway.clone();
    let result = tokio::select! {
        stopped = signal => stopped,
        // After this nothing would be acknowledged any more; a new start reads again what is on disk.
        failed = gateway.store.failed() => Err(anyhow!("storage has failed: {}", failed.0)),
        Some(ended) = started.tasks.join_next() => ended.context("a task panicked")?.and(Err(anyhow!("a listener ended"))),
    };
    if let Err(cause) = &result {
        error!("{cause:#}");
    }
    started.told.send_replace(true);
    gateway.front.shutdown(GOODBYE).await;
    started.stop.send_replace(true);
    while let Some(ended) = started.tasks.join_next().await {
        if let Ok(Err(cause)) = ended {
            warn!("{cause:#}");
        }
    }
    let store = gateway.store.clone();
    tokio::task::spawn_blocking(move || store.close()).await?;
    info!("stopped");
    result
}

async fn start(config: &EdgeConfig) -> anyhow::Result<Started> {
    let id = config.edge_id().map_err(|text| anyhow!(text))?;
    let limit = descriptors::raise();
    let [mqtt_share, admin_share] = config.doors(limit);
    info!(limit, mqtt = mqtt_share.granted, "files that may be open, and connections");
    let data_dir = std::path::absolute(&config.data_dir)?;
    let tightened = files::private_dir(&data_dir)
        .with_context(|| format!("data_dir = \"{}\" cannot be made, read or kept private", data_dir.display()))?;
    if let Some(first) = tightened.first() {
        warn!(path = %first.display(), files = tightened.len(), "other users could read the data: their rights were taken away");
    }
    let settings = StoreSettings {
        cache_bytes: config.storage.cache_bytes.0 as usize,
        commit_interval: config.storage.commit_interval.0,
        commit_bytes: config.storage.commit_bytes.0 as usize,
        disk_budget: config.storage.disk_budget.map(|bytes| bytes.0),
        ..StoreSettings::new(id.clone(), &data_dir)
    };
    let streams = config.stream.clone();
    let store = tokio::task::spawn_blocking(move || EdgeStore::open(settings, streams)).await??;
    info!(edge = %id, data_dir = %data_dir.display(), "store is open");

    let (stop, stopping) = watch::channel(false);
    let mut tasks: JoinSet<anyhow::Result<()>> = JoinSet::new();
    let (front, certificates) = mqtt(config, mqtt_share, store.clone(), &mut tasks).await?;
    if !certificates.is_empty() {
        tasks.spawn(tls::watch(certificates, stopping.clone()));
    }
    let uplink = match config.uplink.0.first() {
        Some(uplink) => Some(Arc::new(Uplink::start(uplink_settings(uplink, &id)?, store.clone(), stopping.clone())?)),
        None => None,
    };
    let port = config.admin.port(Door::new(admin_share.granted))?;
    if let (Some(config), Some(uplink)) = (config.uplink.0.first(), &uplink)
        && (config.token_file.is_some() || config.ca_file.is_some())
    {
        tasks.spawn(renew_uplink(config.clone(), id.clone(), uplink.clone(), stopping.clone()));
    }
    let (told, told_to_stop) = watch::channel(false);
    let gateway = Gateway { id, store, front, uplink, stopping: told_to_stop, admin: port.clone() };
    let admin = daemon::bind("[admin] listen", config.admin.listen.0)?;
    info!(address = %config.admin.listen, "listening for admin");
    let (observed, collector) = (Arc::new(gateway.clone()), Box::new(gateway.clone()));
    let serving = daemon::admin::serve(admin, observed, collector, routes(gateway.clone()), port, stopping);
    tasks.spawn(async move { serving.await.context("[admin] listen") });
    Ok(Started { gateway, told, stop, tasks })
}

async fn salvage(file: &Path, remove: bool, config: EdgeConfig) -> anyhow::Result<()> {
    let id = config.edge_id().map_err(|text| anyhow!(text))?;
    let uplink = config.uplink.0.first().context("uplink = []: salvage needs the cloud's [uplink] url")?;
    let settings = uplink_settings(uplink, &id)?;
    let data_dir = std::path::absolute(&config.data_dir)?;
    // Broker and salvage speak for one gateway, and the cloud listens to the last that said hello.
    let _held = if data_dir.is_dir() { Some(lock(&data_dir)?) } else { None };
    anyhow::ensure!(
        !remove || !is_same_file(file, &data_dir.join("edge.redb")),
        "--remove: {} is the database the broker works with; only one that was set aside (edge.redb.bad-*) is removed",
        file.display()
    );
    let reading = |done: u64, of: u64| eprintln!("read {} of {} MiB", done >> 20, of >> 20);
    let path = file.to_owned();
    let salvage = tokio::task::spawn_blocking(move || Salvage::read(&path, reading)).await??;
    if let Some(why) = &salvage.refused {
        eprintln!("the database engine does not open {}, not even to repair a copy: {why}", file.display());
        eprintln!("its pages were read one by one: what holds by its own checksums is sent");
    }
    let (pages, batches) = salvage.damage();
    eprintln!("{pages} pages could not be read, {batches} batches do not hold");
    for (stream, records) in &salvage.nameless {
        eprintln!("{records} records of stream number {stream} cannot be sent: its name is lost");
    }
    let (stop, stopping) = watch::channel(false);
    tokio::spawn(async move {
        let _ = daemon::stop_signal().await;
        stop.send_replace(true);
    });
    let mut salvage = salvage;
    if remove {
        salvage.wait_until_safe();
    }
    let salvage = Arc::new(salvage);
    let reports = salvage
        .send(settings, stopping, |reports, link| {
            let (sent, left) = reports.iter().fold((0, 0), |sum, one| (sum.0 + one.sent, sum.1 + one.unsent()));
            let trouble = link.last_error.as_ref().map_or(String::new(), |why| format!("; the link: {why}"));
            eprintln!("sent {sent} records, {left} to go{trouble}");
        })
        .await?;
    print!("{}", salvage::render(&reports));
    let left: u64 = reports.iter().map(salvage::StreamReport::unsent).sum();
    if remove {
        let why = salvage.why_kept();
        if why.is_empty() {
            std::fs::remove_file(file).with_context(|| format!("cannot remove {}", file.display()))?;
            println!("{} is removed: all it held is in the cloud's bucket", file.display());
        } else {
            println!("{} is kept:", file.display());
            why.iter().for_each(|why| println!("- {why}"));
            println!("remove it yourself when what is in the cloud is enough for you");
        }
    }
    anyhow::ensure!(left == 0, "{left} records were read and not sent: run this again when the reason is mended");
    Ok(())
}

fn is_same_file(a: &Path, b: &Path) -> bool {
    let real = |path: &Path| std::fs::canonicalize(path).ok();
    real(a).is_some_and(|a| real(b) == Some(a))
}

/// Gives the uplink its token and trusted certificates anew when their files have changed, until `stop` turns true.
async fn renew_uplink(
    config: UplinkConfig,
    id: EdgeId,
    uplink: Arc<Uplink>,
    mut stop: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let files: Vec<PathBuf> = config.token_file.iter().chain(&config.ca_file).cloned().collect();
    let paths: Vec<&Path> = files.iter().map(PathBuf::as_path).collect();
    let mut change = FilesChange::new(&paths);
    while tokio::time::timeout(FILES_CHECK, stop.wait_for(|stop| *stop)).await.is_err() {
        let seen = change.look(&paths);
        if seen == FilesSeen::Same {
            continue;
        }
        match uplink_settings(&config, &id).and_then(|settings| Ok(uplink.renew(&settings)?)) {
            Ok(()) => {
                change.settled();
                info!("the uplink's token or trusted certificates have changed and are in use");
            }
            // A file may be half written.
            Err(_) if seen == FilesSeen::Changed => {}
            Err(cause) => {
                change.settled();
                error!(
                    cause = format!("{cause:#}"),
                    "the uplink's changed files cannot be used; what was read before stays in use"
                );
            }
        }
    }
    Ok(())
}

fn uplink_settings(uplink: &UplinkConfig, id: &EdgeId) -> anyhow::Result<UplinkSettings> {
    let ca_pem = uplink
        .ca_file
        .as_ref()
        .map(|path| std::fs::read(path).with_context(|| format!("[uplink] ca_file: cannot read {}", path.display())));
    Ok(UplinkSettings {
        name: uplink.name.clone(),
        url: uplink.url.clone(),
        token: token(uplink)?,
        ca_pem: ca_pem.transpose()?,
        compression: uplink.compression,
        linger: uplink.linger.0,
        ..UplinkSettings::new(id.clone())
    })
}

async fn mqtt(
    config: &EdgeConfig,
    share: DoorShare,
    store: Arc<EdgeStore>,
    tasks: &mut JoinSet<anyhow::Result<()>>,
) -> anyhow::Result<(Arc<Front>, Vec<Arc<ServerCertificate>>)> {
    let settings = Settings {
        packet_bytes_max: config.mqtt.packet_bytes_max.0 as usize,
        receive_maximum: config.mqtt.receive_maximum,
        connections_max: share.granted,
        sessions_max: config.mqtt.sessions_max,
        session_expiry_secs_max: u32::try_from(config.mqtt.session_expiry_max.0.as_secs()).unwrap_or(u32::MAX),
        memory_bytes_max: usize::try_from(config.mqtt.memory_bytes.0).unwrap_or(usize::MAX),
        hold_timeout: config.mqtt.hold_timeout.0,
        users: users(config)?,
        ..Settings::default()
    };
    let front = Front::new(settings, store)?;
    let mut certificates = Vec::new();
    for listener in config.mqtt_listeners() {
        let tls = match (listener.transport, &listener.tls) {
            (Transport::Tls, Some(tls)) => {
                let certificate = ServerCertificate::read(tls)?;
                certificates.push(certificate.clone());
                Some(certificate.config())
            }
            _ => None,
        };
        let socket = daemon::bind("[mqtt] listen", listener.bind.0)?;
        let settings = ListenerSettings { name: listener.bind.to_string(), allow_anonymous: listener.allow_anonymous };
        let serving = front.clone().serve(socket, tls, settings);
        tasks.spawn(async move { Ok(serving.await?) });
    }
    Ok((front, certificates))
}
