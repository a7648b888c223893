//! A node: what `open` puts together, on a disk that loses power and a network of its own.

use std::sync::Arc;
use std::time::Duration;

use object_store::memory::InMemory;
use object_store::path::Path;
use parking_lot::Mutex;
use shared::log::BoxFuture;
use shared::name::{Partition, TopicId, TopicName};

use super::scheduler::Owner;
use super::world::World;
use super::{chance, draw, note, random, wall_ms};
use crate::archive::{Archive, ArchiveSettings, RequestSettings, Store};
use crate::ingest::{Ingest, IngestSettings, TopicError, Topics};
use crate::shard::{LocalWal, Shard, ShardSettings};
use crate::state::{Change, StateLog, Topic, read_state};
use crate::wal::file::{FileWal, FileWalSettings};
use crate::wal::object::ObjectWalSettings;
use crate::wal::powercut::CutDisk;

/// What a shard stores its blocks with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    Object,
    File,
}

/// What is the same for all nodes of a shard in one run.
#[derive(Debug, Clone)]
pub struct Tuning {
    pub segment_age: Duration,
    pub segment_bytes: u64,
    pub grace: Duration,
    pub max_lag: Duration,
    pub ship_bytes: usize,
    pub block_bytes: usize,
    pub tail_bytes: usize,
    pub linger: Duration,
}

impl Tuning {
    pub fn drawn() -> Self {
        Self {
            segment_age: Duration::from_secs(3 + draw(40)),
            segment_bytes: [2 << 10, 16 << 10, 1 << 20][draw(3) as usize],
            grace: Duration::from_secs(draw(3) * 5),
            max_lag: Duration::from_secs(1 + draw(10)),
            ship_bytes: [1, 2 << 10, 1 << 20][draw(3) as usize],
            block_bytes: [500, 4 << 10, 1 << 20][draw(3) as usize],
            tail_bytes: [0, 2 << 10, 1 << 20][draw(3) as usize],
            linger: Duration::from_millis(draw(2) * 50),
        }
    }
}

/// A running node.
#[derive(Clone)]
pub struct Up {
    pub shard: Arc<Shard>,
    pub ingest: Arc<Ingest>,
    pub archive: Arc<Archive>,
}

/// What a node keeps when it is off.
#[derive(Clone, Default)]
pub struct Disk {
    pub wal: CutDisk,
    pub mirror: Arc<InMemory>,
}

impl Disk {
    /// What is found when the power is back.
    pub fn survivor(&self) -> Self {
        let mut chance = crate::wal::powercut::Random(random().unwrap_or(0));
        Self { wal: self.wal.survivor(&mut chance), mirror: Arc::new(self.mirror.fork()) }
    }
}

/// A machine that may run a node.
pub struct Node {
    pub owner: Owner,
    pub engine: Engine,
    pub shard: u32,
    pub state: Mutex<NodeState>,
}

#[derive(Default)]
pub struct NodeState {
    pub up: Option<Up>,
    pub disk: Disk,
    /// Not to be started now.
    pub held_back: bool,
    /// The processes of a start or of a running node are there.
    pub started: bool,
    /// Clients and edges do not reach it.
    pub cut_off: bool,
    pub paused: bool,
}

/// The partition of a shard that the producer writes.
pub fn produced(shard: u32) -> Partition {
    Partition { topic: TopicId([10 + shard as u8; 16]), index: 0 }
}

/// The partition of a shard that edges' streams go to.
pub fn streamed(shard: u32) -> Partition {
    Partition { topic: TopicId([20 + shard as u8; 16]), index: 0 }
}

pub fn stream_topic(shard: u32) -> TopicName {
    TopicName::parse(&format!("streamed-{shard}")).expect("a name")
}

/// Topics of the link: they are all there already.
struct Fixed(u32);

impl Topics for Fixed {
    fn ensure_topic(&self, name: &TopicName, _: u32) -> BoxFuture<'_, Result<(TopicId, u32), TopicError>> {
        let found = if *name == stream_topic(self.0) {
            Ok((streamed(self.0).topic, 1))
        } else {
            Err(TopicError::Refused(format!("no topic {name}")))
        };
        Box::pin(std::future::ready(found))
    }
}

impl Node {
    pub fn new(owner: Owner, engine: Engine, shard: u32) -> Self {
        Self { owner, engine, shard, state: Mutex::default() }
    }

    /// What runs here, if it takes requests.
    pub fn up(&self) -> Option<Up> {
        let state = self.state.lock();
        state.up.clone().filter(|_| !state.cut_off)
    }

    fn archive_settings(&self, world: &World) -> ArchiveSettings {
        let tuning = world.tuning();
        ArchiveSettings {
            url: None,
            data_dir: world.home().to_owned(),
            shard: self.shard,
            owns_wal: self.engine == Engine::Object,
            max_lag: tuning.max_lag,
            ship_bytes: tuning.ship_bytes,
            segment_bytes: tuning.segment_bytes,
            segment_age: tuning.segment_age,
            grace: tuning.grace,
            cache_bytes: 1 << 16,
            requests: requests(),
            threads: false,
            clock: wall_ms,
            ..ArchiveSettings::default()
        }
    }

    fn shard_settings(&self, world: &World) -> ShardSettings {
        let tuning = world.tuning();
        ShardSettings {
            shard: self.shard,
            nonce: random().unwrap_or(0),
            block_bytes_max: tuning.block_bytes,
            // Small as loads are here, blocks are put together ahead all the same.
            ahead_bytes_min: 1,
            tail_bytes_max: tuning.tail_bytes,
            linger: if self.engine == Engine::Object { tuning.linger } else { Duration::ZERO },
            retention_ms: -1,
            archived: self.engine == Engine::File,
            ..ShardSettings::default()
        }
    }

    /// Starts and goes on until it succeeds.
    pub async fn boot(self: Arc<Self>, world: World) {
        loop {
            match self.start(&world).await {
                Ok(up) => {
                    note(|| format!("node {}: up with epoch {}", self.owner, up.shard.status().epoch));
                    self.state.lock().up = Some(up);
                    return;
                }
                Err(error) => {
                    note(|| format!("node {}: {error}", self.owner));
                    if error.contains("another node went on") {
                        // Its disk is of no use any more: a person would move it away.
                        world.judge().disk_lost(&world, self.shard);
                        self.state.lock().disk = Disk::default();
                    }
                    if error.contains("no power") {
                        // The power went in the middle of the start, and comes back.
                        let mut state = self.state.lock();
                        state.disk = state.disk.survivor();
                    }
                    tokio::time::sleep(Duration::from_millis(500 + draw(5000))).await;
                }
            }
        }
    }

    async fn start(&self, world: &World) -> Result<Up, String> {
        let (settings, shard_settings) = (self.archive_settings(world), self.shard_settings(world));
        let store = Store::new(Arc::new(world.bucket().seen_by(self.owner)), Path::default(), requests());
        let clock = Arc::new(wall_ms);
        let disk = self.state.lock().disk.clone();
        let (archive, shard) = match self.engine {
            Engine::Object => {
                let archive = Archive::with_stores(settings, store, None).await.map_err(|error| error.to_string())?;
                let recovered = archive.take_over().await.map_err(|error| error.to_string())?;
                world.bucket().taken_over(self.shard, recovered.epoch);
                let wal_settings = ObjectWalSettings { bytes_max: 4 << 20, ..ObjectWalSettings::default() };
                let wal = archive.object_wal(&recovered, wal_settings);
                let opened = Shard::open_driven(shard_settings, Box::new(wal), recovered, Some(archive.cold()), clock);
                let (shard, commit) = opened.map_err(|error| error.to_string())?;
                world.processes().spawn(self.owner, commit);
                (archive, shard)
            }
            Engine::File => {
                let wal_settings = FileWalSettings {
                    file_bytes: 32 << 10,
                    hasty_file_bytes: 32 << 10,
                    bytes_max: 2 << 20,
                    background: false,
                };
                let wal = FileWal::open(Box::new(disk.wal.clone()), wal_settings, random().unwrap_or(0));
                let wal = wal.map_err(|error| error.to_string())?;
                let mirror = Store::new(disk.mirror.clone(), Path::default(), requests());
                let archive = Archive::with_stores(settings, store, Some(mirror)).await;
                let archive = archive.map_err(|error| error.to_string())?;
                let recovered = archive.recover(&LocalWal(&wal)).await.map_err(|error| error.to_string())?;
                if matches!(recovered.tail, crate::archive::Tail::Bucket(_)) {
                    note(|| format!("node {}: restored from the bucket", self.owner));
                    world.judge().restored(self.shard);
                }
                let opened = Shard::open_driven(shard_settings, Box::new(wal), recovered, Some(archive.cold()), clock);
                let (shard, commit) = opened.map_err(|error| error.to_string())?;
                world.processes().spawn(self.owner, commit);
                (archive, shard)
            }
        };
        let run = archive.clone().run(shard.clone(), std::future::pending());
        world.processes().spawn(self.owner, run);
        self.make_topics(&shard).await?;
        let (log, state, safety) = (shard.clone(), shard.clone(), shard.clone());
        let settings = IngestSettings { poll_secs_max: 10, stream_partitions: 1, ..IngestSettings::default() };
        let ingest = Ingest::new(settings, log, state, Arc::new(Fixed(self.shard)), safety, wall_ms);
        Ok(Up { shard, ingest, archive })
    }

    async fn make_topics(&self, shard: &Arc<Shard>) -> Result<(), String> {
        for (partition, name) in [
            (produced(self.shard), format!("produced-{}", self.shard)),
            (streamed(self.shard), stream_topic(self.shard).to_string()),
        ] {
            if read_state(&**shard, |state| state.topic(partition.topic).is_some()) {
                continue;
            }
            let topic = Topic {
                id: partition.topic,
                name: TopicName::parse(&name).expect("a name"),
                partitions: 1,
                configs: Default::default(),
                created_ms: 0,
            };
            shard.commit(vec![Change::TopicCreated(topic)]).await.map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    /// Takes the power away. Returns whether there was any.
    pub fn crash(&self, world: &World) {
        world.processes().kill(self.owner);
        let mut state = self.state.lock();
        let up = state.up.take();
        (state.started, state.paused) = (false, false);
        state.disk = state.disk.survivor();
        drop(state);
        drop(up);
    }

    /// A stop in the middle of what the disk does: the next few operations still happen.
    pub fn cut_power_soon(&self) {
        if chance(700) {
            self.state.lock().disk.wal.cut_after(1 + draw(30));
        }
    }
}

fn requests() -> RequestSettings {
    RequestSettings { timeout: Duration::from_secs(2), attempts: 3, ..RequestSettings::default() }
}
