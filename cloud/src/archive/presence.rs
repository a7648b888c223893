//! Ownership is asked for, not taken: heartbeats in the bucket, and a start that looks at them before it claims anything.
//!
//! A node writes its [`Heartbeat`] every [`BEAT`]. A start whose shards another node may own watches that one's heartbeat for
//! [`WATCH`]: if it moves, the start is refused with the owner's name; if not, the owner is dead. What a heartbeat says
//! decides on nothing else: whose a shard is is settled by the conditional PUT of a claim, as ever (`claim`).
//!
//! The order of a claim is what makes two starts at the same moment meet: read the root in force, look at the
//! heartbeats, write one's own with the shard in it, then claim after that very root. Of two that did not see each other's
//! heartbeat one finds the name of its claim taken, and then watches for the other.

mod heartbeat;
mod lock;
mod watch;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join;
use object_store::path::Path;
use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::watch as tokio_watch;
use tokio::time::{Instant, MissedTickBehavior, interval_at};
use tracing::{error, info, warn};

use super::store::random_bytes;
use super::{ArchiveError, RequestSettings, Store, StoreError};

pub(in crate::archive) use heartbeat::nodes;
pub use heartbeat::{AdvertisedListener, Heartbeat, NodePhase, OwnedShard, OwnerIdentity};
pub use lock::{DataDirError, DataDirLock};
pub use watch::{OwnerVerdict, OwnerWatch, Sighting, rivals};

/// How often a heartbeat is written.
pub const BEAT: Duration = Duration::from_secs(3);
/// How long an owner's heartbeat must stand still before the owner counts as dead.
pub const WATCH: Duration = Duration::from_secs(9);
/// How often a watch looks.
const LOOK: Duration = Duration::from_secs(1);
/// Longest time for one request of a beat. The two of a beat go out together, so that a heartbeat on a slow bucket still
/// moves during a watch.
const PATIENCE: Duration = Duration::from_secs(5);
const _: () = assert!(BEAT.as_secs() + PATIENCE.as_secs() < WATCH.as_secs(), "a live owner is seen to live");
/// Longest time that a node which stops spends on saying so.
const FAREWELL: Duration = Duration::from_secs(2);
/// Heartbeats that a start looks at; there are as many as nodes ever had numbers.
const NODES_MAX: usize = 1_024;

/// What a node says of itself, but for what changes.
#[derive(Debug, Clone)]
pub struct PresenceSettings {
    /// Its number.
    pub node_id: i32,
    /// Which process it is.
    pub identity: OwnerIdentity,
    /// Where Kafka clients are told to connect to.
    pub kafka: Vec<AdvertisedListener>,
    /// Where edges connect to, if it is known.
    pub link_url: Option<String>,
    /// The host's name, for people.
    pub host: String,
    /// The data directory, for people.
    pub data_dir: String,
    /// Claims are made whoever has the shards (`--take-over`).
    pub take_over: bool,
}

/// A node among those of its bucket.
#[derive(Debug)]
pub struct Presence {
    store: Store,
    key: Path,
    settings: PresenceSettings,
    incarnation: [u8; 16],
    counter: AtomicU64,
    /// Shards that are claimed or about to be.
    shards: Mutex<BTreeMap<u32, OwnedShard>>,
    /// Heartbeats that stood still for a whole watch, as they were.
    dead: Mutex<BTreeMap<Path, Bytes>>,
    /// A claim was lost to another node: the next one waits for that one's heartbeat.
    lost: AtomicBool,
    /// One beat at a time; none after the last.
    turn: tokio::sync::Mutex<bool>,
    /// The foreign heartbeat under this node's key that was seen last.
    stranger: Mutex<Option<Heartbeat>>,
    /// Moves with each beat: owners look whether they still are.
    beats: tokio_watch::Sender<u64>,
    beaten: Mutex<Option<Instant>>,
    last_error: Mutex<Option<String>>,
    watches: AtomicU64,
}

/// The heartbeat, for status pages and metrics.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PresenceStatus {
    /// This life of the process, as hexadecimal digits.
    pub incarnation: String,
    /// Heartbeats written.
    pub beats: u64,
    /// Milliseconds since the last one was; `None` before the first.
    pub age_ms: Option<u64>,
    /// What the last attempt said, if it failed.
    pub last_error: Option<String>,
}

impl Presence {
    /// Of a node whose archive is at `url`.
    pub fn open(
        url: &str,
        options: &[(String, String)],
        requests: RequestSettings,
        settings: PresenceSettings,
    ) -> Result<Arc<Self>, StoreError> {
        let requests = RequestSettings { timeout: PATIENCE, attempts: 2, ..requests };
        Ok(Self::with_store(Store::open_unsynced(url, options, requests)?, settings))
    }

    /// Of a node whose archive is in `store`.
    pub fn with_store(store: Store, settings: PresenceSettings) -> Arc<Self> {
        Arc::new(Self {
            key: heartbeat::node(store.prefix(), settings.node_id),
            store,
            settings,
            incarnation: random_bytes(),
            counter: AtomicU64::new(0),
            shards: Mutex::default(),
            dead: Mutex::default(),
            lost: AtomicBool::new(false),
            turn: tokio::sync::Mutex::new(false),
            stranger: Mutex::default(),
            beats: tokio_watch::Sender::new(0),
            beaten: Mutex::default(),
            last_error: Mutex::default(),
            watches: AtomicU64::new(0),
        })
    }

    /// Whether nobody who lives owns shards of this archive; otherwise the error names the owner. An owner that may be alive
    /// is watched. Nothing is written.
    pub async fn admit(&self) -> Result<(), ArchiveError> {
        if self.settings.take_over {
            return Ok(());
        }
        let is_suspicious = self.lost.load(Ordering::Relaxed);
        let mut watch = OwnerWatch::new(WATCH, self.dead.lock().clone(), is_suspicious);
        let began = Instant::now();
        let mut is_told = false;
        loop {
            let seen = self.sightings().await?;
            match watch.look(began.elapsed(), rivals(&seen, &self.settings.identity)) {
                OwnerVerdict::Alive(owner) => return Err(self.refusal(&owner)),
                OwnerVerdict::Dead(dead) => {
                    self.lost.store(false, Ordering::Relaxed);
                    for owner in dead {
                        let known = self.dead.lock().insert(owner.key.clone(), owner.bytes.clone());
                        if known.as_ref() != Some(&owner.bytes) {
                            warn!(owner = %owner.describe(), watched = ?WATCH, "the owner's heartbeat does not move: it counts as dead, and its shards are taken over");
                        }
                    }
                    return Ok(());
                }
                OwnerVerdict::Unclear => {}
            }
            if !is_told {
                is_told = true;
                self.watches.fetch_add(1, Ordering::Relaxed);
                let owners = rivals(&seen, &self.settings.identity);
                let owners: Vec<String> = owners.iter().map(Sighting::describe).collect();
                info!(owners = %owners.join("; "), watched = ?WATCH, "another node may own this archive: watching its heartbeat before anything is claimed");
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Asks before a claim and announces it. To be called between the look at the root and the claim after it.
    pub(super) async fn before_claim(&self, shard: u32, epoch: u32) -> Result<(), ArchiveError> {
        self.admit().await?;
        self.shards.lock().insert(shard, OwnedShard { number: shard, epoch, claimed: false });
        self.beat().await;
        Ok(())
    }

    /// A claim that was announced is made: it is said at once.
    pub(super) async fn after_claim(&self, shard: u32) {
        if let Some(owned) = self.shards.lock().get_mut(&shard) {
            owned.claimed = true;
        }
        self.beat().await;
    }

    /// A claim came to nothing because another node was quicker.
    pub(super) fn claim_lost(&self, shard: u32) {
        self.shards.lock().remove(&shard);
        self.lost.store(true, Ordering::Relaxed);
    }

    /// Who has the shard with this epoch or a later one, if that node's heartbeat says so.
    pub(super) async fn owner_of(&self, shard: u32, epoch: u32) -> Option<String> {
        let seen = tokio::time::timeout(PATIENCE, self.sightings()).await.ok()?.ok()?;
        let others = seen.into_iter().filter_map(|seen| seen.beat);
        // Under this node's own number it may have been written over by now.
        let mut others = others.filter(|beat| beat.incarnation != self.incarnation).chain(self.stranger.lock().clone());
        others.find(|beat| beat.epoch_of(shard).is_some_and(|other| other >= epoch)).map(|beat| beat.to_string())
    }

    /// Whom a start that takes over takes the shards from, for the log.
    pub async fn describe_owners(&self) -> Vec<String> {
        let seen = self.sightings().await.unwrap_or_default();
        rivals(&seen, &self.settings.identity).iter().map(Sighting::describe).collect()
    }

    /// Beats until it is dropped.
    pub async fn run(self: Arc<Self>) {
        // However long a beat takes, the next one is no later for it than it must be.
        let mut beats = interval_at(Instant::now() + BEAT, BEAT);
        beats.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            beats.tick().await;
            // The look first: it must not wait for a PUT that hangs.
            self.beats.send_modify(|beats| *beats += 1);
            if !self.shards.lock().is_empty() {
                self.beat().await;
            }
        }
    }

    /// Resolves at each beat.
    pub(super) fn beats(&self) -> tokio_watch::Receiver<u64> {
        self.beats.subscribe()
    }

    /// Writes the heartbeat. That it cannot be written keeps nobody from serving.
    async fn beat(&self) {
        let has_gone = self.turn.lock().await;
        if *has_gone {
            return;
        }
        // What stands there is for whoever has the shards now: once that is another, the look comes first.
        let written = if self.is_known_outdone() {
            if self.is_outdone().await {
                return;
            }
            self.write(NodePhase::Serving).await
        } else {
            join(self.is_outdone(), self.write(NodePhase::Serving)).await.1
        };
        match written {
            Ok(()) => {
                *self.beaten.lock() = Some(Instant::now());
                if self.last_error.lock().take().is_some() {
                    info!("the heartbeat is written again");
                }
            }
            Err(cause) => {
                if self.last_error.lock().replace(cause.to_string()).is_none() {
                    warn!(%cause, "the heartbeat cannot be written: another node may take this one for dead");
                }
            }
        }
    }

    async fn write(&self, state: NodePhase) -> Result<(), StoreError> {
        let PresenceSettings { node_id, identity, kafka, link_url, host, data_dir, .. } = self.settings.clone();
        let shards = self.shards.lock().values().copied().collect();
        let heartbeat = Heartbeat {
            node_id,
            incarnation: self.incarnation,
            counter: self.counter.fetch_add(1, Ordering::Relaxed) + 1,
            identity,
            kafka,
            link_url,
            node_url: None,
            rack: None,
            host,
            data_dir,
            software: env!("CARGO_PKG_VERSION").to_owned(),
            level: 1,
            state,
            shards,
        };
        self.store.overwrite(&self.key, heartbeat.encode()).await
    }

    /// Looks who wrote this node's heartbeat last. True if a stranger says that it has a shard of this node's by a later claim.
    async fn is_outdone(&self) -> bool {
        // What the first beat finds was looked at by the start.
        if self.beaten.lock().is_none() {
            return false;
        }
        let Some(stranger) = self.stranger().await else { return false };
        let known = self.stranger.lock().replace(stranger.clone());
        if known.is_none_or(|known| known.incarnation != stranger.incarnation) {
            error!(%stranger, "another process writes this node's heartbeat: two nodes run with one node_id and one archive; looking whether the shards are still this one's");
            self.beats.send_modify(|beats| *beats += 1);
        }
        self.is_outdone_by(&stranger)
    }

    /// The same, by what was seen last.
    fn is_known_outdone(&self) -> bool {
        let stranger = self.stranger.lock().clone();
        stranger.is_some_and(|stranger| self.is_outdone_by(&stranger))
    }

    fn is_outdone_by(&self, stranger: &Heartbeat) -> bool {
        self.shards.lock().values().any(|own| stranger.epoch_of(own.number).is_some_and(|other| other > own.epoch))
    }

    async fn stranger(&self) -> Option<Heartbeat> {
        let there = self.store.glance(&self.key, heartbeat::HEARTBEAT_BYTES_MAX, PATIENCE).await.ok()?;
        let beat = Heartbeat::decode(&there).ok()?;
        (beat.incarnation != self.incarnation && beat.state == NodePhase::Serving).then_some(beat)
    }

    /// Says that nothing of this node runs any more, so that the next start need not watch. To be called when that is so.
    pub async fn leave(&self) {
        let mut has_gone = self.turn.lock().await;
        *has_gone = true;
        if self.beaten.lock().is_none() {
            return;
        }
        let farewell = async {
            // Another process has the number now: what it says must stay.
            if self.stranger().await.is_none()
                && let Err(cause) = self.write(NodePhase::Gone).await
            {
                warn!(%cause, "the last heartbeat was not written: a start on another data directory will watch for {WATCH:?}");
            }
        };
        if tokio::time::timeout(FAREWELL, farewell).await.is_err() {
            warn!(
                "the last heartbeat was not written in time: a start on another data directory will watch for {WATCH:?}"
            );
        }
    }

    /// What the heartbeat is at.
    pub fn status(&self) -> PresenceStatus {
        PresenceStatus {
            incarnation: format!("{:032x}", u128::from_be_bytes(self.incarnation)),
            beats: self.counter.load(Ordering::Relaxed),
            age_ms: self.beaten.lock().map(|at| at.elapsed().as_millis() as u64),
            last_error: self.last_error.lock().clone(),
        }
    }

    /// How many watches there were.
    pub fn watches(&self) -> u64 {
        self.watches.load(Ordering::Relaxed)
    }

    async fn sightings(&self) -> Result<Vec<Sighting>, StoreError> {
        sightings(&self.store).await
    }

    fn refusal(&self, owner: &Sighting) -> ArchiveError {
        ArchiveError::Owned { archive: self.store.describe(), owner: owner.describe() }
    }
}

/// All heartbeats of a bucket.
pub(in crate::archive) async fn sightings(store: &Store) -> Result<Vec<Sighting>, StoreError> {
    let mut seen = Vec::new();
    for object in store.list(&nodes(store.prefix())).await?.into_iter().take(NODES_MAX) {
        match store.get(&object.location, heartbeat::HEARTBEAT_BYTES_MAX).await {
            Ok(bytes) => seen.push(Sighting::new(object.location, bytes)),
            Err(StoreError::Missing(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(seen)
}

#[cfg(test)]
mod tests;
