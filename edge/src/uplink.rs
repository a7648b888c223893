//! The link's edge half over HTTPS: runs the sender, carries its messages, and tells the store what came of them.
//!
//! [`Sender`] decides; this file gives it a clock, a network and a thread to seal on. It never ends because of what the
//! cloud or the network does: it reports, waits and tries again.

mod client;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use shared::batch::Compression;
use shared::config::{Secret, redacted};
use shared::link::frame::{
    self, AppendReply, Hello, HelloReply, HelloStream, Limits, PollReply, Session, bounded_text, path,
};
use shared::link::sender::{Body, Failure, Output, Report, Rows, Sender, SenderSettings, Step, StreamInfo, seal_body};
use shared::log::BoxFuture;
use shared::name::{EdgeId, Incarnation, Offset, StreamName};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{debug, error, info, warn};

pub use client::ClientError;
use client::LinkClient;

/// What the uplink wants of the store, besides reading its rows.
pub trait StreamSource: Rows + Send + Sync + 'static {
    /// Everything below `next` is durable in the cloud. Never moves down; a lower one is ignored.
    fn set_confirmed(&self, stream: &StreamName, next: Offset);

    /// Everything below `next` is in the bucket and may be deleted. Never moves down; a lower one is ignored.
    fn set_safe(&self, stream: &StreamName, next: Offset);

    /// Gives the stream a new incarnation, durable when this resolves. Rows keep their offsets, and what was confirmed
    /// is now only what is safe.
    fn renew_incarnation(&self, stream: &StreamName) -> BoxFuture<'static, Result<Incarnation, String>>;

    /// The cloud does not take the stream now, and why; `None`: it does again.
    fn park(&self, stream: &StreamName, reason: Option<String>);

    /// The cloud knows of everything that was dropped below `upto`.
    fn gap_declared(&self, stream: &StreamName, upto: Offset);

    /// Resolves when the stream has durable rows at or beyond `beyond`, or will never have any more.
    fn wait(&self, stream: &StreamName, beyond: Offset) -> BoxFuture<'static, ()>;

    /// What the cloud takes at most: what can never be sent is better refused before it is acknowledged.
    fn learn_limits(&self, limits: Limits);
}

/// Where the uplink goes and how.
#[derive(Debug, Clone)]
pub struct UplinkSettings {
    /// Shown in logs and status.
    pub name: String,
    /// The cloud's link, as `http://` or `https://`.
    pub url: String,
    /// This gateway.
    pub edge: EdgeId,
    /// Its token.
    pub token: Option<Secret>,
    /// Certificates to trust instead of the system's, in PEM.
    pub ca_pem: Option<Vec<u8>>,
    /// How sealed batches are compressed.
    pub compression: Compression,
    /// How long the first unsent record waits for company.
    pub linger: Duration,
    /// Longest wait between attempts while there is no link.
    pub backoff_max: Duration,
}

impl UplinkSettings {
    /// The defaults, for this gateway.
    pub fn new(edge: EdgeId) -> Self {
        let sender = SenderSettings::default();
        Self {
            name: "cloud".to_owned(),
            url: "http://127.0.0.1:9480".to_owned(),
            edge,
            token: None,
            ca_pem: None,
            compression: sender.compression,
            linger: Duration::from_millis(sender.linger_ms),
            backoff_max: Duration::from_millis(sender.backoff_max_ms),
        }
    }
}

/// The uplink, for status pages and metrics.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct UplinkStatus {
    /// Its name.
    pub name: String,
    /// Where it goes.
    pub url: String,
    /// The cloud has answered and nothing has failed since.
    pub up: bool,
    /// What failed last; `None` when nothing has since the link came up.
    pub last_error: Option<String>,
    /// Records not yet confirmed by the cloud, over all streams.
    pub behind_records: u64,
    /// Times the link came up.
    pub connects: u64,
    /// Appends answered.
    pub appends: u64,
    /// Bytes of bodies that were answered.
    pub bytes: u64,
    /// Requests that came to nothing.
    pub failures: u64,
    /// Streams that were sent under a new incarnation because the cloud held other data: restored, copied, set aside.
    pub sent_twice: u64,
    /// Records that went to a `.rejected` topic.
    pub rejected: u64,
    /// Gaps told to the cloud.
    pub gaps_declared: u64,
    /// Times the cloud had lost what it had confirmed.
    pub cloud_lost: u64,
    /// Times another gateway took this edge id over.
    pub superseded: u64,
    /// The cloud's clock less ours, in milliseconds, at the last hello.
    pub clock_behind_ms: i64,
}

/// Asks the cloud where streams stand, without sending anything.
pub struct Greeter {
    client: LinkClient,
    edge: EdgeId,
    session: Session,
}

impl std::fmt::Debug for Greeter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Greeter({})", self.edge)
    }
}

impl Greeter {
    /// A run of its own, as the cloud sees it.
    pub fn new(settings: &UplinkSettings) -> Result<Self, ClientError> {
        let mut boot = [0; 16];
        getrandom::fill(&mut boot).map_err(|error| ClientError::Random(error.to_string()))?;
        let session = Session { boot, hello: 0 };
        Ok(Self { client: LinkClient::new(settings)?, edge: settings.edge.clone(), session })
    }

    /// Says hello with these streams.
    pub async fn hello(&mut self, infos: Vec<StreamInfo>) -> Result<HelloReply, String> {
        self.session.hello += 1;
        let hello = Hello {
            lowest: frame::VERSION_LOWEST,
            highest: frame::VERSION_HIGHEST,
            edge: self.edge.clone(),
            session: self.session,
            software: bounded_text(SenderSettings::default().software),
            streams: infos.into_iter().map(HelloStream::from).collect(),
        };
        let reply = self.client.post(path::HELLO, frame::encode(&hello), Duration::from_secs(30)).await;
        reply.map_err(|failure| match failure {
            Failure::Unreachable(text) | Failure::TooLarge(text) | Failure::Refused(text) => text,
            Failure::Busy { text, .. } => text,
        })
    }
}

/// A running uplink. Dropping it ends it at once.
pub struct Uplink {
    status: Arc<Mutex<UplinkStatus>>,
    client: Arc<Mutex<Arc<LinkClient>>>,
    source: Arc<dyn StreamSource>,
    task: JoinSet<()>,
}

impl Uplink {
    /// Starts to send, until `stop` turns true.
    pub fn start(
        settings: UplinkSettings,
        source: Arc<dyn StreamSource>,
        stop: watch::Receiver<bool>,
    ) -> Result<Self, ClientError> {
        let client = Arc::new(Mutex::new(Arc::new(LinkClient::new(&settings)?)));
        let mut random = [0; 24];
        getrandom::fill(&mut random).map_err(|error| ClientError::Random(error.to_string()))?;
        let (mut boot, mut seed) = ([0; 16], [0; 8]);
        boot.copy_from_slice(&random[..16]);
        seed.copy_from_slice(&random[16..]);
        let sender_settings = SenderSettings {
            compression: settings.compression,
            linger_ms: settings.linger.as_millis() as u64,
            backoff_max_ms: settings.backoff_max.as_millis() as u64,
            ..SenderSettings::default()
        };
        let sender = Sender::new(sender_settings, settings.edge.clone(), boot, u64::from_le_bytes(seed));
        let status = UplinkStatus { name: settings.name, url: redacted(&settings.url), ..UplinkStatus::default() };
        let status = Arc::new(Mutex::new(status));
        let runner = Runner {
            sender,
            client: client.clone(),
            source: source.clone(),
            status: status.clone(),
            epoch: Instant::now(),
            work: JoinSet::new(),
            watched: BTreeSet::new(),
            last_error: String::new(),
        };
        let mut task = JoinSet::new();
        task.spawn(runner.run(stop));
        Ok(Self { status, client, source, task })
    }

    /// Uses another token and other trusted certificates from the next request on.
    pub fn renew(&self, settings: &UplinkSettings) -> Result<(), ClientError> {
        *self.client.lock() = Arc::new(LinkClient::new(settings)?);
        Ok(())
    }

    /// Link state and counters.
    pub fn status(&self) -> UplinkStatus {
        let mut status = self.status.lock().clone();
        let behind = |info: StreamInfo| info.next.saturating_sub(info.confirmed.max(info.first)).max(0).unsigned_abs();
        status.behind_records = self.source.streams().into_iter().map(behind).sum();
        status
    }

    /// Resolves when the uplink has ended, after `stop`.
    pub async fn ended(mut self) {
        while self.task.join_next().await.is_some() {}
    }
}

struct Runner {
    sender: Sender,
    client: Arc<Mutex<Arc<LinkClient>>>,
    source: Arc<dyn StreamSource>,
    status: Arc<Mutex<UplinkStatus>>,
    epoch: Instant,
    work: JoinSet<Done>,
    watched: BTreeSet<StreamName>,
    last_error: String,
}

/// What a task of the runner ended with.
enum Done {
    Hello(Result<HelloReply, Failure>),
    Append(usize, Result<AppendReply, Failure>),
    Poll(u32, Result<PollReply, Failure>),
    Sealed(Body),
    Renewed(StreamName, Result<(), String>),
    Rows(StreamName, Offset),
}

impl Runner {
    fn now(&self) -> u64 {
        self.epoch.elapsed().as_millis() as u64
    }

    async fn run(mut self, mut stop: watch::Receiver<bool>) {
        while !*stop.borrow_and_update() {
            self.outputs();
            let step = self.sender.step(self.now(), &*self.source);
            let Step::Wait(until) = step else {
                self.start(step);
                continue;
            };
            self.outputs();
            self.watch_rows();
            let sleep = until.map(|at| Duration::from_millis(at.saturating_sub(self.now())));
            tokio::select! {
                changed = stop.changed() => if changed.is_err() { break },
                Some(done) = self.work.join_next() => self.done(done),
                () = tokio::time::sleep(sleep.unwrap_or_default()), if sleep.is_some() => {}
            }
        }
        // What is on the wire is left to itself: the next hello tells what became of it.
        self.work.shutdown().await;
        info!("uplink ended");
    }

    fn start(&mut self, step: Step) {
        let client = self.client.lock().clone();
        match step {
            Step::Hello(body) => {
                self.work
                    .spawn(async move { Done::Hello(client.post(path::HELLO, body, Duration::from_secs(30)).await) });
            }
            Step::Append(body) => {
                let bytes = body.len();
                // Down to 16 KiB a second; a slower link is given smaller bodies.
                let patience = Duration::from_secs(30 + (bytes / (16 * 1024)) as u64);
                self.work.spawn(async move { Done::Append(bytes, client.post(path::APPEND, body, patience).await) });
            }
            Step::Poll { number, body, wait_secs } => {
                let patience = Duration::from_secs(u64::from(wait_secs) + 15);
                self.work.spawn(async move { Done::Poll(number, client.post(path::POLL, body, patience).await) });
            }
            Step::Seal(order) => {
                let source = self.source.clone();
                self.work.spawn_blocking(move || Done::Sealed(seal_body(&order, &*source)));
            }
            Step::Wait(_) => {}
        }
    }

    fn done(&mut self, done: Result<Done, tokio::task::JoinError>) {
        let now = self.now();
        match done {
            Ok(Done::Hello(reply)) => {
                self.note_failure(&reply);
                self.sender.hello_done(now, reply, &*self.source);
            }
            Ok(Done::Append(bytes, reply)) => {
                self.note_failure(&reply);
                if reply.is_ok() {
                    let mut status = self.status.lock();
                    status.appends += 1;
                    status.bytes += bytes as u64;
                    // Unless the reply itself says otherwise, which is reported next.
                    status.last_error = None;
                }
                self.sender.append_done(now, reply, &*self.source);
            }
            Ok(Done::Poll(number, reply)) => {
                if let Err(failure) = &reply {
                    debug!(?failure, "poll failed");
                }
                self.sender.poll_done(now, number, reply);
            }
            Ok(Done::Sealed(body)) => self.sender.sealed(now, body),
            Ok(Done::Renewed(stream, result)) => self.sender.renewed(now, &stream, result),
            Ok(Done::Rows(stream, beyond)) => {
                let more = self.source.streams().iter().any(|info| info.name == stream && info.next > beyond);
                if more {
                    self.watched.remove(&stream);
                } else {
                    // The store has ended: there will be no more, and asking again at once would not change that.
                    self.work.spawn(async move {
                        tokio::time::sleep(Duration::from_secs(1)).await;
                        Done::Rows(stream, Offset::MIN)
                    });
                }
            }
            Err(error) => {
                // A task of ours panicked: what it was to tell is lost, so begin again from the cloud's positions.
                error!(%error, "uplink task failed");
                self.work.abort_all();
                self.watched.clear();
                self.sender.restart(now, format!("a task of the uplink failed: {error}"));
            }
        }
    }

    fn note_failure<T>(&mut self, reply: &Result<T, Failure>) {
        if reply.is_err() {
            self.status.lock().failures += 1;
        }
    }

    /// Keeps one watcher on each stream, so that a commit wakes the sender.
    fn watch_rows(&mut self) {
        for info in self.source.streams() {
            if self.watched.insert(info.name.clone()) {
                let more = self.source.wait(&info.name, info.next);
                self.work.spawn(async move {
                    more.await;
                    Done::Rows(info.name, info.next)
                });
            }
        }
    }

    fn outputs(&mut self) {
        while let Some(output) = self.sender.output() {
            match output {
                Output::Confirmed { stream, next } => self.source.set_confirmed(&stream, next),
                Output::Safe { stream, next } => self.source.set_safe(&stream, next),
                Output::GapDeclared { stream, upto } => self.source.gap_declared(&stream, upto),
                Output::Renew { stream } => {
                    let renewed = self.source.renew_incarnation(&stream);
                    self.work.spawn(async move { Done::Renewed(stream, renewed.await.map(drop)) });
                }
                Output::Park { stream, reason } => {
                    match &reason {
                        Some(reason) => warn!(%stream, reason, "stream is parked; the others go on"),
                        None => info!(%stream, "stream goes on"),
                    }
                    self.source.park(&stream, reason);
                }
                Output::Report(report) => self.report(report),
            }
        }
        self.status.lock().up = self.sender.is_linked();
    }

    fn report(&mut self, report: Report) {
        let mut status = self.status.lock();
        match report {
            Report::Linked { cloud_time_ms, limits } => {
                status.connects += 1;
                status.clock_behind_ms = cloud_time_ms.saturating_sub(wall_clock_ms());
                if status.last_error.take().is_some() || status.connects == 1 {
                    info!(url = status.url, clock_behind_ms = status.clock_behind_ms, "link is up");
                }
                self.last_error.clear();
                drop(status);
                self.source.learn_limits(limits);
            }
            Report::Down { error, retry_ms } => {
                // Said once, not at every attempt of a night without a network.
                if error != self.last_error {
                    warn!(error, retry_ms, "link is down");
                    self.last_error.clone_from(&error);
                }
                status.last_error = Some(error);
            }
            Report::Held { reason, retry_ms } => {
                debug!(reason, retry_ms, "the cloud takes no more just now");
                status.last_error = Some(reason);
            }
            Report::Superseded => {
                status.superseded += 1;
                warn!("another gateway says it is this one: give one of them another id and token");
            }
            Report::SentTwice { stream, from, upto } => {
                status.sent_twice += 1;
                error!(
                    %stream, from, upto,
                    "the cloud holds other records of this stream: this gateway's data were restored or copied; \
                     these records are sent under a new incarnation and may be in the topic twice"
                );
            }
            Report::CloudLost { stream, position, confirmed, resumed } => {
                status.cloud_lost += 1;
                error!(%stream, position, confirmed, resumed, "the cloud lost what it had confirmed; sending what is held");
            }
            Report::GapDeclared { stream, from, upto } => {
                status.gaps_declared += 1;
                warn!(%stream, from, upto, "the cloud was told of dropped records");
            }
            Report::Rejected { stream, offset, reason } => {
                status.rejected += 1;
                error!(%stream, offset, reason, "record goes to the .rejected topic");
            }
            Report::BodyHalved { bytes_max } => {
                warn!(bytes_max, "a body was too large for the way; smaller ones are sent from now on");
            }
        }
    }
}

fn wall_clock_ms() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}
