//! The archive of one shard: its stores, what it knows of them, and the task that ships and splits.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::{Notify, watch};
use tracing::{error, info, warn};

use super::claim::View;
use super::confirmation::{self, Uptime};
use super::shipper::Shipper;
use super::splitter::Splitter;
use super::store::backoff;
use super::{
    CacheStatus, Cold, ColdTier, Confirmation, DiskCache, LocalBlocks, Presence, Recovered, RequestSettings, Source,
    SourceError, Store, StoreError, StoredBlock, Tail, identity,
};
use crate::manifest::{Index, Keys, OBJECT_BYTES_MAX, PagePointer, Root, sequence_of};
use crate::state::Engine;
use crate::wal::object::{ObjectWal, ObjectWalSettings};

/// How an archive behaves.
#[derive(Debug, Clone)]
pub struct ArchiveSettings {
    /// `file:///directory` or `s3://bucket/prefix`; `None`: nothing leaves the machine, segments lie in `data_dir`.
    pub url: Option<String>,
    /// The `AWS_*` variables that reach an `s3://` store: credentials, region, endpoint.
    pub store_options: Vec<(String, String)>,
    /// Where cluster id, local copy of the manifest and, without `url`, segments are kept.
    pub data_dir: PathBuf,
    /// The shard.
    pub shard: u32,
    /// The shard's WAL is its blocks in the store (the object engine): there is nothing to ship, and a start takes over
    /// what is there.
    pub owns_wal: bool,
    /// The node has shards whose log is nowhere but in the store, this one or others: it cannot do without it.
    pub required: bool,
    /// How far the bucket may be behind the log: what a dead disk can cost.
    pub max_lag: Duration,
    /// Largest object of shipped blocks, unless one block is larger.
    pub ship_bytes: usize,
    /// What is split at a time at most, and how large a segment becomes.
    pub segment_bytes: u64,
    /// Age at which what there is becomes segments, however little.
    pub segment_age: Duration,
    /// How long an object is kept after the last manifest that named it: readers may be under way.
    pub grace: Duration,
    /// How often the bucket is looked through for objects that no manifest names.
    pub sweep_interval: Duration,
    /// Most memory for indexes and fetched batches.
    pub cache_bytes: usize,
    /// How requests are made.
    pub requests: RequestSettings,
    /// Whether segments are built on threads of their own.
    pub threads: bool,
    /// The node's heartbeat, and whom to ask before a claim. Without it claims are made without asking.
    pub presence: Option<Arc<Presence>>,
    /// What the age of a confirmation is counted by.
    pub uptime: Uptime,
}

impl ArchiveSettings {
    /// That a store cannot be reached which a start needs.
    pub(super) fn unreachable(&self, store: &Store, error: &StoreError) -> ArchiveError {
        let way_out = match self.required || self.owns_wal {
            true => "; it holds the log of this node's object shards, so there is no start without it",
            false => ", or set [archive] url = \"off\"",
        };
        ArchiveError::Unreachable { archive: store.describe(), reason: error.to_string(), way_out }
    }
}

impl Default for ArchiveSettings {
    fn default() -> Self {
        Self {
            url: None,
            store_options: Vec::new(),
            data_dir: "data/cloud".into(),
            shard: 0,
            owns_wal: false,
            required: false,
            max_lag: Duration::from_secs(10),
            ship_bytes: 8 << 20,
            segment_bytes: 64 << 20,
            segment_age: Duration::from_secs(600),
            grace: Duration::from_secs(300),
            sweep_interval: Duration::from_secs(24 * 3600),
            cache_bytes: 64 << 20,
            requests: RequestSettings::default(),
            threads: true,
            presence: None,
            uptime: confirmation::uptime,
        }
    }
}

/// Why a start is refused or the archive stands still. Each says what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ArchiveError {
    /// The store failed or does not qualify.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The shard could not be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Two systems met.
    #[error(
        "this data directory belongs to system {local}, the archive {archive} to system {bucket}. \
         Point [archive] url at a prefix of its own, or start with an empty data directory to restore {bucket}"
    )]
    ClusterMismatch {
        /// The data directory's id.
        local: String,
        /// The bucket's id.
        bucket: String,
        /// The store.
        archive: String,
    },
    /// The shard is another engine's.
    #[error(
        "shard {shard} in the archive {archive} is written by the engine {there}, and this node would open it with the \
         engine {here}: an engine is chosen once. Put [shards] back to what it was, or point [archive] url elsewhere"
    )]
    OtherEngine {
        /// The shard.
        shard: u32,
        /// What the bucket says.
        there: String,
        /// What the settings say.
        here: Engine,
        /// The store.
        archive: String,
    },
    /// Both have blocks of one number and they differ.
    #[error(
        "block {seq} here is not the one in {archive}: another node went on with this shard. \
         What only this node holds is in its WAL: send it to that node with `tributary-cloud salvage --to HOST:PORT`, then move \
         that directory away to start from the archive's content"
    )]
    Diverged {
        /// The block.
        seq: u64,
        /// The store.
        archive: String,
    },
    /// This node published to an archive that has nothing of it now.
    #[error(
        "the archive {0} is empty, although this node has published there: restore its content, \
         or point [archive] url back to where it was"
    )]
    Emptied(String),
    /// The WAL does not reach back to the manifest.
    #[error(
        "the WAL begins at block {first}, the manifest needs it from block {needed}: bring the WAL's older files back, or move the WAL away to start from the archive"
    )]
    Hole {
        /// Where the WAL begins.
        first: u64,
        /// Where it would have to.
        needed: u64,
    },
    /// Nothing here, and nothing to be had there.
    #[error(
        "this data directory holds no log and the archive {archive} cannot be reached, so a new system cannot be told \
         from a lost one ({reason}): make the archive reachable{way_out}"
    )]
    Unreachable {
        /// The store.
        archive: String,
        /// What it said.
        reason: String,
        /// What else can be done.
        way_out: &'static str,
    },
    /// The setting changed, and older records would be out of reach.
    #[error(
        "older records of this node are in {there}, and [archive] url no longer says so: put it back, or copy that tree to the new place"
    )]
    Moved {
        /// Where they are.
        there: String,
    },
    /// An object's bytes are not what was written.
    #[error("{key} does not hold: {reason}. If the object is damaged, bring it back from a copy of the archive")]
    Damaged {
        /// The object.
        key: String,
        /// In which way.
        reason: String,
    },
    /// Local files cannot be used.
    #[error("local files: {0}")]
    Local(String),
    /// Others were quicker each time.
    #[error("several nodes claim this shard in the archive at the same time: leave one of them running")]
    Contended,
    /// Whoever has the shard was quicker each time.
    #[error(
        "the node that has this shard wrote to the archive on each of {attempts} attempts to take it over: stop that node, \
         or start this one again"
    )]
    Outpaced {
        /// How often it was tried.
        attempts: usize,
    },
    /// What was shipped since the claim must be claimed over again.
    #[error("blocks were shipped by an earlier owner after this node's claim; it claims again")]
    Overtaken,
    /// The shards are owned by a node that is alive. Nothing was claimed.
    #[error(
        "the archive {archive} belongs to a node that is alive: {owner}. Nothing was claimed here. Set [archive] url to a place of \
         this node's own, or stop that node first, or start this one with --take-over: then that node stops at once, and what \
         it has acknowledged and not shipped is left on its disk, from where `tributary-cloud salvage` sends it"
    )]
    Owned {
        /// The store.
        archive: String,
        /// The node, for people.
        owner: String,
    },
    /// Another owner has the shard.
    #[error("another node has claimed this shard in the archive with epoch {epoch}: this one must stop")]
    Deposed {
        /// Its epoch.
        epoch: u32,
    },
}

/// How often an owner of the WAL in the store looks whether it still is, where no heartbeat sets the pace.
const OWNER_CHECK: Duration = Duration::from_secs(10);
/// How long such a look may take: there is another one soon.
const OWNER_LOOK_PATIENCE: Duration = Duration::from_secs(5);

/// What is in force, between a claim and the task that works on.
#[derive(Debug, Clone)]
pub(super) struct Held {
    pub root: Root,
    pub index: Index,
    /// Whether the bucket has acknowledged us as the owner.
    pub claimed: bool,
    /// Where the shipped WAL ends.
    pub shipped: u64,
    /// The local copy of the manifest is older than `root`: the WAL must not be trimmed to that.
    pub mirror_behind: bool,
}

/// The archive of one shard.
#[derive(Debug)]
pub struct Archive {
    pub(super) settings: ArchiveSettings,
    pub(super) store: Arc<Store>,
    /// A copy of root and pages on the local disk, so that a start does not need the bucket.
    pub(super) mirror: Option<Arc<Store>>,
    /// Whether WAL blocks go to the store: not where it is the local disk itself.
    pub(super) ships: bool,
    pub(super) keys: Keys,
    pub(super) cluster_id: String,
    pub(super) cold: Arc<Cold>,
    pub(super) attempted: Mutex<Vec<u64>>,
    /// First blocks of the WAL objects that are in the store.
    pub(super) wals: Mutex<BTreeSet<u64>>,
    pub(super) shipped: watch::Sender<u64>,
    /// A round waits for the blocks below: they are shipped without waiting for more.
    pub(super) wanted: watch::Sender<u64>,
    pub(super) roll: Notify,
    pub(super) facts: Facts,
    held: Mutex<Option<Held>>,
    epoch: AtomicU32,
    pub(super) confirmation: Arc<Confirmation>,
}

/// What status and metrics show, kept where it happens.
#[derive(Debug, Default)]
pub(super) struct Facts {
    pub claimed_epoch: AtomicU32,
    pub manifest_seq: AtomicU64,
    pub trim: AtomicU64,
    pub segments: AtomicU64,
    pub segment_bytes: AtomicU64,
    pub errors: AtomicU64,
    pub fenced_by: AtomicU32,
    pub last_error: Mutex<Option<String>>,
    /// Why this node no longer has the shard, and what to do.
    pub deposed: Mutex<Option<String>>,
}

/// Where the archive stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ArchiveStatus {
    /// The store.
    pub archive: String,
    /// Whether WAL blocks leave the machine; if not, `safe` means `durable`.
    pub ships: bool,
    /// `claimed`, `waiting` (nothing is published or deleted until the bucket can be reached) or `fenced`.
    pub state: &'static str,
    /// The epoch claimed with.
    pub epoch: u32,
    /// How long ago the bucket last said that the shard is this node's; `None` if it never did.
    pub confirmed_age_ms: Option<u64>,
    /// Every block below is in the bucket.
    pub shipped_seq: u64,
    /// Every block below is in segments.
    pub split_seq: u64,
    /// The manifest in force.
    pub manifest_seq: u64,
    /// Segment objects named.
    pub segments: u64,
    /// Bytes of them.
    pub segment_bytes: u64,
    /// Rounds that failed and were or will be repeated.
    pub errors: u64,
    /// What the last of them said; gone when one succeeded.
    pub last_error: Option<String>,
    /// Why this node no longer has the shard, and what to do; `None` while it has it.
    pub deposed: Option<String>,
    /// Requests to the store.
    pub puts: u64,
    /// Bytes written.
    pub put_bytes: u64,
    /// Reads of objects and ranges.
    pub gets: u64,
    /// Bytes read.
    pub get_bytes: u64,
    /// Listings.
    pub lists: u64,
    /// Deletions.
    pub deletes: u64,
    /// Requests that failed.
    pub request_errors: u64,
    /// Second and further attempts.
    pub retries: u64,
    /// Those that were not made because too many had been.
    pub retries_refused: u64,
    /// Milliseconds that bodies waited for the bandwidth limit.
    pub paced_ms: u64,
    /// What the caches of archived records did.
    pub cache: CacheStatus,
}

impl Archive {
    /// Opens the archive that `settings` name: checks that the store qualifies and belongs to this system.
    /// A store that cannot be reached is no error where a local start is possible.
    pub async fn open(settings: ArchiveSettings) -> Result<Arc<Self>, ArchiveError> {
        if let Some(url) = settings.url.as_ref().filter(|_| settings.owns_wal) {
            let store = Store::open(url, &settings.store_options, settings.requests)?;
            return Self::with_stores(settings, store, None).await;
        }
        let local = RequestSettings { attempts: 1, ..settings.requests };
        let mirror = Store::directory(&settings.data_dir.join("manifest"), local)?;
        let segments = settings.data_dir.join("segments");
        match settings.url.clone() {
            Some(url) => {
                if segments.join("shards").exists() {
                    return Err(ArchiveError::Moved { there: segments.display().to_string() });
                }
                let store = Store::open(&url, &settings.store_options, settings.requests)?;
                Self::with_stores(settings, store, Some(mirror)).await
            }
            None => {
                if !mirror.list(&Keys::new(mirror.prefix().clone(), settings.shard).roots()).await?.is_empty() {
                    return Err(ArchiveError::Moved { there: "an object store".into() });
                }
                let store = Store::directory(&segments, local)?;
                Self::with_stores(settings, store, None).await
            }
        }
    }

    /// An archive in `store`. With a `mirror` for its manifest it ships; without one, `store` is the local disk.
    pub async fn with_stores(
        settings: ArchiveSettings,
        store: Store,
        mirror: Option<Store>,
    ) -> Result<Arc<Self>, ArchiveError> {
        let ships = mirror.is_some() || settings.owns_wal;
        let keys = Keys::new(store.prefix().clone(), settings.shard);
        if ships {
            match store.probe().await {
                Err(StoreError::Failed { .. }) | Ok(()) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let cluster_id = identity::agree(&settings, &store, &keys.cluster_id(), ships).await?;
        if ships {
            let engine = if settings.owns_wal { Engine::Object } else { Engine::File };
            identity::agree_on_engine(&store, &keys.engine(), settings.shard, engine).await?;
        }
        Ok(Arc::new(Self::looking(settings, store, mirror, cluster_id)))
    }

    /// The same for who only looks: nothing is probed, agreed upon or written.
    pub fn looking(settings: ArchiveSettings, store: Store, mirror: Option<Store>, cluster_id: String) -> Self {
        let ships = mirror.is_some() || settings.owns_wal;
        let keys = Keys::new(store.prefix().clone(), settings.shard);
        let confirmation = Arc::new(Confirmation::new(settings.uptime));
        let store = Arc::new(store);
        let cold =
            Arc::new(Cold::new(store.clone(), keys.clone(), Index::default(), settings.cache_bytes, settings.threads));
        Self {
            settings,
            store,
            mirror: mirror.map(Arc::new),
            ships,
            keys,
            cluster_id,
            cold,
            attempted: Mutex::default(),
            wals: Mutex::default(),
            shipped: watch::Sender::new(0),
            wanted: watch::Sender::new(0),
            roll: Notify::new(),
            facts: Facts::default(),
            held: Mutex::default(),
            epoch: AtomicU32::new(0),
            confirmation,
        }
    }

    /// The id of the system that data directory and bucket belong to.
    pub fn cluster_id(&self) -> &str {
        &self.cluster_id
    }

    /// Whether WAL blocks leave the machine; if not, `safe` means `durable`.
    pub fn ships(&self) -> bool {
        self.ships
    }

    /// What the shard reads below its WAL.
    pub fn cold(&self) -> Arc<dyn ColdTier> {
        self.cold.clone()
    }

    /// The log of blocks that goes on after what [`Archive::take_over`] returned.
    pub fn object_wal(&self, recovered: &Recovered, settings: ObjectWalSettings) -> ObjectWal {
        let blocks: &[StoredBlock] = match &recovered.tail {
            Tail::Local => &[],
            Tail::Bucket(blocks) | Tail::Owned(blocks) => blocks,
        };
        let sizes = blocks.iter().map(|block| (block.seq, block.bytes.len() as u32));
        ObjectWal::new(self.store.clone(), self.keys.clone(), settings, sizes)
    }

    /// Keeps what is read from the bucket on the local disk as well. Only the first cache counts.
    pub fn use_disk_cache(&self, disk: Arc<DiskCache>) {
        self.cold.use_disk(disk);
    }

    /// When this node last knew that the shard is its own.
    pub fn confirmation(&self) -> Arc<Confirmation> {
        self.confirmation.clone()
    }

    /// Makes segments of what there is now, however little and young.
    pub fn roll_now(&self) {
        self.roll.notify_one();
    }

    pub(super) fn hold(&self, held: Option<Held>, epoch: u32) {
        if let Some(held) = &held {
            self.cold.publish(held.index.clone());
        }
        *self.held.lock() = held;
        self.epoch.store(epoch, Ordering::Relaxed);
    }

    pub(super) fn held_root(&self) -> Option<Root> {
        self.held.lock().as_ref().map(|held| held.root.clone())
    }

    pub(super) fn mismatch(&self, bucket: String) -> ArchiveError {
        ArchiveError::ClusterMismatch { local: self.cluster_id.clone(), bucket, archive: self.store.describe() }
    }

    /// Ships and splits until `stop` resolves or another owner takes over, then ships what is left if it can.
    pub async fn run(self: Arc<Self>, source: Arc<dyn Source>, stop: impl Future<Output = ()>) {
        tokio::pin!(stop);
        loop {
            let held = tokio::select! {
                biased;
                () = &mut stop => return,
                held = self.claimed(source.as_ref()) => held,
            };
            let Some(held) = held else { return };
            let epoch = held.root.epoch;
            self.facts.claimed_epoch.store(epoch, Ordering::Relaxed);
            source.shipped(held.shipped);
            self.shipped.send_replace(held.shipped);
            let mut shipper = Shipper::new(&self, source.as_ref(), held.shipped, epoch);
            let mut splitter = Splitter::new(&self, source.as_ref(), held);
            // The splitter has it now; a second one would keep pages in memory that are long replaced.
            *self.held.lock() = None;
            let fenced = tokio::select! {
                biased;
                () = &mut stop => None,
                error = shipper.run() => Some(error),
                error = splitter.run() => Some(error),
                error = self.watch_for_another() => Some(error),
            };
            match fenced {
                Some(ArchiveError::Overtaken) => {
                    info!(epoch, "an earlier owner shipped after the claim; claiming again")
                }
                Some(error) => return self.deposed(source.as_ref(), error).await,
                None => return shipper.finish().await,
            }
        }
    }

    /// Waits for the claim; tells the shard and ends if another owner has it.
    async fn claimed(&self, source: &dyn Source) -> Option<Held> {
        if let Some(held) = self.held.lock().clone().filter(|held| held.claimed) {
            return Some(held);
        }
        let mut attempt = 0;
        loop {
            match self.try_claim(source).await {
                Ok(Some(held)) => {
                    info!(epoch = held.root.epoch, "claimed the shard in the archive");
                    self.cold.publish(held.index.clone());
                    *self.held.lock() = Some(held.clone());
                    self.worked();
                    return Some(held);
                }
                Ok(None) => attempt = 0,
                Err(ArchiveError::Source(SourceError::Closed)) => return None,
                Err(error @ (ArchiveError::Store(_) | ArchiveError::Source(_) | ArchiveError::Local(_))) => {
                    attempt += 1;
                    warn!(%error, "not claimed in the archive yet; nothing is published or deleted there");
                    self.failed(&error);
                }
                Err(error) => {
                    self.deposed(source, error).await;
                    return None;
                }
            }
            let pause = self.settings.max_lag.min(Duration::from_secs(10));
            tokio::time::sleep(backoff(pause / 8, attempt.clamp(1, 4))).await;
        }
    }

    async fn try_claim(&self, source: &dyn Source) -> Result<Option<Held>, ArchiveError> {
        let first = match source.blocks(0, 1).await {
            Ok(blocks) => blocks.first().map(|block| block.seq),
            Err(SourceError::Trimmed { first, .. }) => Some(first),
            Err(error) => return Err(error.into()),
        };
        let Some(first) = first else {
            source.wait(0).await;
            return Ok(None);
        };
        let view = self.view().await?;
        let next = source.durable().next_seq;
        let check = view.as_ref().and_then(|view| view.next.checked_sub(1)).filter(|seq| (first..next).contains(seq));
        let block = match check {
            Some(seq) => source.blocks(seq, 1).await?.into_iter().next(),
            None => None,
        };
        let local = Compared { first, next, block };
        self.claim_running(&local, view, self.epoch.load(Ordering::Relaxed)).await
    }

    /// Looks at each beat whether another owner has claimed the shard. One that writes to the bucket learns it from its next
    /// PUT; one that does not would go on to answer readers, and with a log on its disk to acknowledge, from a state that is
    /// over.
    async fn watch_for_another(&self) -> ArchiveError {
        let mut beats = self.settings.presence.as_ref().filter(|_| self.ships).map(|presence| presence.beats());
        if beats.is_none() && !self.settings.owns_wal {
            std::future::pending::<()>().await;
        }
        loop {
            match &mut beats {
                // The sender lives as long as the settings.
                Some(beats) => drop(beats.changed().await),
                None => tokio::time::sleep(OWNER_CHECK).await,
            }
            if let Some(epoch) = self.look_for_another().await {
                return ArchiveError::Deposed { epoch };
            }
        }
    }

    /// The epoch of a later claim; `None` if there is none or the store does not say.
    async fn look_for_another(&self) -> Option<u32> {
        // A claim has the number after the newest root, and is never deleted.
        let next = self.facts.manifest_seq.load(Ordering::Relaxed) + 1;
        let begun = self.confirmation.now();
        let there = match self.store.glance(&self.keys.root(next), OBJECT_BYTES_MAX, OWNER_LOOK_PATIENCE).await {
            Ok(there) => there,
            Err(StoreError::Missing(_)) => {
                self.confirmation.confirm(begun);
                return None;
            }
            Err(_) => return None,
        };
        let own = self.facts.claimed_epoch.load(Ordering::Relaxed);
        Root::decode(&there).ok().map(|root| root.epoch).filter(|epoch| *epoch > own)
    }

    /// Another owner has the shard, or two histories met: the shard must acknowledge nothing more.
    async fn deposed(&self, source: &dyn Source, error: ArchiveError) {
        let epoch = match &error {
            ArchiveError::Deposed { epoch } => *epoch,
            ArchiveError::Source(SourceError::Closed) => return,
            _ => self.epoch_in_force().await,
        };
        self.facts.fenced_by.store(epoch.max(1), Ordering::Relaxed);
        // Before anything else is asked for: from here on nothing is acknowledged.
        source.fenced(epoch);
        self.failed(&error);
        let shard = self.settings.shard;
        let owner = match &self.settings.presence {
            Some(presence) => presence.owner_of(shard, epoch).await,
            None => None,
        };
        let owner = owner.map(|owner| format!("; {owner} has it now")).unwrap_or_default();
        let why = format!("shard {shard}: {error}{owner}. {}", self.what_is_here(source));
        error!("{why}");
        *self.facts.deposed.lock() = Some(why);
    }

    /// What of a shard that this node no longer has is on its disk alone, and how it gets to the new owner.
    fn what_is_here(&self, source: &dyn Source) -> String {
        if self.settings.owns_wal || !self.ships {
            return "All that was acknowledged is in the archive".to_owned();
        }
        let (from, to) = (*self.shipped.borrow(), source.durable().next_seq);
        let has_claimed = self.facts.claimed_epoch.load(Ordering::Relaxed) > 0;
        let what = match (has_claimed, to.saturating_sub(from)) {
            (true, 0) => return "All that was acknowledged is in the archive".to_owned(),
            (true, 1) => format!("Block {from} is"),
            (true, _) => format!("Blocks {from} to {} are", to.saturating_sub(1)),
            (false, _) => "What was acknowledged here since the last claim is".to_owned(),
        };
        format!(
            "{what} on this node's disk alone: `tributary-cloud salvage --to HOST:PORT`, with this node's settings, sends that to \
             the new owner. Edges send theirs again by themselves"
        )
    }

    /// The epoch of the root in force, as far as the store says it at once; 0 if it does not.
    async fn epoch_in_force(&self) -> u32 {
        let view = tokio::time::timeout(OWNER_LOOK_PATIENCE, self.view()).await;
        view.ok().and_then(Result::ok).flatten().map_or(0, |view: View| view.root.epoch)
    }

    /// Whether the root in force is one that this node has made.
    pub(super) async fn is_still_ours(&self) -> Result<bool, ArchiveError> {
        let epoch = self.view().await?.map(|view| view.root.epoch);
        Ok(epoch == Some(self.facts.claimed_epoch.load(Ordering::Relaxed)))
    }

    /// The epoch of whoever took the name that we wanted.
    pub(super) async fn taken_by(&self) -> ArchiveError {
        ArchiveError::Deposed { epoch: self.epoch_in_force().await }
    }

    pub(super) fn failed(&self, error: &ArchiveError) {
        self.facts.errors.fetch_add(1, Ordering::Relaxed);
        *self.facts.last_error.lock() = Some(error.to_string());
    }

    pub(super) fn worked(&self) {
        *self.facts.last_error.lock() = None;
    }

    /// The newest root of the local copy.
    pub(super) async fn mirror_root(&self) -> Result<Option<Root>, ArchiveError> {
        let Some(mirror) = &self.mirror else { return Ok(None) };
        let keys = self.mirror_keys();
        let roots = mirror.list(&keys.roots()).await?;
        let Some(seq) = roots.iter().filter_map(|object| sequence_of(&object.location)).max() else { return Ok(None) };
        let bytes = mirror.get(&keys.root(seq), crate::manifest::OBJECT_BYTES_MAX).await?;
        let damaged = |error: crate::manifest::ManifestError| {
            ArchiveError::Local(format!("the copy of the manifest in {}: {error}", mirror.describe()))
        };
        Root::decode(&bytes).map(Some).map_err(damaged)
    }

    pub(super) fn mirror_keys(&self) -> Keys {
        let prefix = self.mirror.as_ref().map(|mirror| mirror.prefix().clone()).unwrap_or_default();
        Keys::new(prefix, self.settings.shard)
    }

    /// Makes the local copy say what `root` says: pages first, then the root, then away with the rest. Pages that are
    /// not in `fresh` and not there already are fetched.
    pub(super) async fn write_mirror(
        &self,
        root: &Root,
        fresh: &HashMap<PagePointer, Bytes>,
    ) -> Result<(), ArchiveError> {
        let Some(mirror) = &self.mirror else { return Ok(()) };
        let keys = self.mirror_keys();
        let roots = mirror.list(&keys.roots()).await?;
        let pages = mirror.list(&keys.pages()).await?;
        // Roots of a history that is void would be taken for the newest.
        for stale in roots.iter().filter(|object| sequence_of(&object.location) >= Some(root.seq)) {
            mirror.delete(&stale.location).await?;
        }
        let mut wanted = HashSet::new();
        for pointer in root.pages.iter().chain(&root.snapshot) {
            let key = keys.page(pointer);
            if !pages.iter().any(|object| object.location == key && object.size == pointer.bytes) {
                let bytes = match fresh.get(pointer) {
                    Some(bytes) => bytes.clone(),
                    None => self.load_page(pointer).await?,
                };
                mirror.delete(&key).await?;
                mirror.create(&key, &[bytes]).await?;
            }
            wanted.insert(key);
        }
        mirror.create(&keys.root(root.seq), &[root.encode()]).await?;
        let old_roots = roots.iter().filter(|object| sequence_of(&object.location) < Some(root.seq));
        let old_pages = pages.iter().filter(|object| !wanted.contains(&object.location));
        for stale in old_roots.chain(old_pages) {
            mirror.delete(&stale.location).await?;
        }
        Ok(())
    }

    /// Where the archive stands now.
    pub fn status(&self) -> ArchiveStatus {
        let facts = &self.facts;
        let requests = self.store.requests();
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let claimed = facts.claimed_epoch.load(Ordering::Relaxed);
        ArchiveStatus {
            archive: self.store.describe(),
            ships: self.ships,
            state: match (facts.fenced_by.load(Ordering::Relaxed), claimed) {
                (1.., _) => "fenced",
                (_, 0) => "waiting",
                _ => "claimed",
            },
            epoch: claimed,
            confirmed_age_ms: self.confirmation.age().map(|age| age.as_millis() as u64),
            shipped_seq: *self.shipped.borrow(),
            split_seq: load(&facts.trim),
            manifest_seq: load(&facts.manifest_seq),
            segments: load(&facts.segments),
            segment_bytes: load(&facts.segment_bytes),
            errors: load(&facts.errors),
            last_error: facts.last_error.lock().clone(),
            deposed: facts.deposed.lock().clone(),
            puts: load(&requests.puts),
            put_bytes: load(&requests.put_bytes),
            gets: load(&requests.gets),
            get_bytes: load(&requests.get_bytes),
            lists: load(&requests.lists),
            deletes: load(&requests.deletes),
            request_errors: load(&requests.errors),
            retries: load(&requests.retries),
            retries_refused: load(&requests.retries_refused),
            paced_ms: load(&requests.paced_ms),
            cache: self.cold.cache_status(),
        }
    }
}

/// What a running shard's WAL holds, as far as a claim compares it.
struct Compared {
    first: u64,
    next: u64,
    block: Option<StoredBlock>,
}

impl LocalBlocks for Compared {
    fn bounds(&self) -> Option<(u64, u64)> {
        Some((self.first, self.next))
    }

    fn read(&self, seq: u64) -> Result<Bytes, SourceError> {
        let block = self.block.as_ref().filter(|block| block.seq == seq);
        block
            .map(|block| block.bytes.clone())
            .ok_or(SourceError::Storage(format!("block {seq} was not read for comparison")))
    }
}
