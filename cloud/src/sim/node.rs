//! A node: what `open` puts together, on a disk that loses power and a network of its own.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use object_store::memory::InMemory;
use object_store::path::Path;
use parking_lot::Mutex;
use shared::link::GAPS_TOPIC;
use shared::log::{BoxFuture, Log};
use shared::name::{Offset, Partition, TopicId, TopicName};

use super::judge::GAPS;
use super::scheduler::Owner;
use super::world::World;
use super::{chance, draw, note, random, wall_ms};
use crate::archive::{Archive, ArchiveSettings, Recovered, RequestSettings, Store, Tail};
use crate::block::Block;
use crate::ingest::{Ingest, IngestSettings, Safety, TopicError, Topics};
use crate::shard::{LocalWal, Shard, ShardSettings};
use crate::shards::{Member, Shards, reserve_offsets};
use crate::state::{CATALOGUE, Change, Engine, LogChange, SlotChange, StateLog, Topic, TopicChange, read_state};
use crate::wal::BlockLog;
use crate::wal::file::{FileWal, FileWalSettings};
use crate::wal::memory::MemoryWal;
use crate::wal::object::ObjectWalSettings;
use crate::wal::powercut::{CutDisk, Random};

/// A shard as a node opens it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hosted {
    /// What the simulation calls it: there are two systems in the bucket, and each has a shard 0.
    pub id: u32,
    /// Its number in its system.
    pub number: u32,
    pub engine: Engine,
}

/// Below this prefix lies the second system.
pub const PREFIX: &str = "many";
/// What is added to the numbers of its shards.
pub const MANY: u32 = 10;

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
    pub memory_bytes: u64,
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
            // Four times the largest batch, as the settings want it, or a lot.
            memory_bytes: [320 << 10, 4 << 20][draw(2) as usize],
            linger: Duration::from_millis(draw(2) * 50),
        }
    }
}

/// A running node.
#[derive(Clone)]
pub struct Up {
    pub log: Arc<dyn Log>,
    pub shards: Vec<Arc<Shard>>,
    pub ingest: Arc<Ingest>,
    pub archives: Vec<Arc<Archive>>,
}

impl Up {
    /// Whether one of its shards takes nothing more.
    pub fn has_stopped(&self) -> bool {
        self.shards.iter().any(|shard| shard.status().stopped.is_some())
    }
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
        let mut chance = Random(random().unwrap_or(0));
        Self { wal: self.wal.survivor(&mut chance), mirror: Arc::new(self.mirror.fork()) }
    }

    /// What is found after a process that was killed.
    pub fn restarted(&self) -> Self {
        Self { wal: self.wal.restarted(), mirror: self.mirror.clone() }
    }

    /// What the WAL on it holds: the number after its newest block, and where partitions end.
    pub fn holds(&self) -> (u64, BTreeMap<Partition, Offset>) {
        let Ok(wal) = FileWal::open(Box::new(self.wal.copy()), file_settings(), 0) else { return Default::default() };
        let Some((first, next)) = wal.bounds() else { return Default::default() };
        let mut ends = BTreeMap::new();
        for block in (first..next).filter_map(|seq| Block::parse(wal.read(seq).ok()?).ok()) {
            ends.extend(block.entries().iter().map(|entry| (entry.partition, entry.last + 1)));
        }
        (next, ends)
    }
}

fn file_settings() -> FileWalSettings {
    FileWalSettings { file_bytes: 32 << 10, hasty_file_bytes: 32 << 10, bytes_max: 2 << 20, background: false }
}

/// A machine that may run a node.
pub struct Node {
    pub owner: Owner,
    /// The catalogue's shard first, where there is one.
    pub shards: Vec<Hosted>,
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
    Partition { topic: TopicId([100 + shard as u8; 16]), index: 0 }
}

/// The partition of a shard that edges' streams go to.
pub fn streamed(shard: u32) -> Partition {
    Partition { topic: TopicId([200 + shard as u8; 16]), index: 0 }
}

pub fn stream_topic(shard: u32) -> TopicName {
    TopicName::parse(&format!("streamed-{shard}")).expect("a name")
}

/// Topics of the link: they are all there already.
struct Fixed(Vec<Hosted>);

impl Topics for Fixed {
    fn ensure_topic(&self, name: &TopicName, _: u32) -> BoxFuture<'_, Result<(TopicId, u32), TopicError>> {
        let found = self.0.iter().find(|shard| *name == stream_topic(shard.id)).map(|shard| streamed(shard.id).topic);
        let found = found.or_else(|| (name.as_str() == GAPS_TOPIC).then_some(GAPS.topic));
        let found = found.map(|topic| (topic, 1)).ok_or_else(|| TopicError::Refused(format!("no topic {name}")));
        Box::pin(std::future::ready(found))
    }
}

impl Node {
    pub fn new(owner: Owner, shards: impl IntoIterator<Item = Hosted>) -> Self {
        Self { owner, shards: shards.into_iter().collect(), state: Mutex::default() }
    }

    pub fn hosts(&self, id: u32) -> bool {
        self.shards.iter().any(|shard| shard.id == id)
    }

    /// Its shard on a disk of its own, if it has one.
    pub fn on_disk(&self) -> Option<Hosted> {
        self.shards.iter().find(|shard| shard.engine == Engine::File).copied()
    }

    /// Whether another node may fight with it for its shard.
    pub fn fights(&self) -> bool {
        self.owner < 3
    }

    /// What runs here, if it takes requests.
    pub fn up(&self) -> Option<Up> {
        let state = self.state.lock();
        state.up.clone().filter(|_| !state.cut_off)
    }

    /// Whether anything runs here, reached or not.
    pub fn up_at_all(&self) -> bool {
        self.state.lock().up.is_some()
    }

    fn archive_settings(world: &World, shard: Hosted) -> ArchiveSettings {
        let tuning = world.tuning();
        ArchiveSettings {
            url: None,
            data_dir: world.home().to_owned(),
            shard: shard.number,
            owns_wal: shard.engine == Engine::Object,
            max_lag: tuning.max_lag,
            ship_bytes: tuning.ship_bytes,
            segment_bytes: tuning.segment_bytes,
            segment_age: tuning.segment_age,
            grace: tuning.grace,
            cache_bytes: 1 << 16,
            requests: requests(),
            threads: false,
            ..ArchiveSettings::default()
        }
    }

    fn shard_settings(world: &World, shard: Hosted) -> ShardSettings {
        let tuning = world.tuning();
        ShardSettings {
            shard: shard.number,
            nonce: random().unwrap_or(0),
            block_bytes_max: tuning.block_bytes,
            // Small as loads are here, blocks are put together ahead all the same.
            ahead_bytes_min: 1,
            tail_bytes_max: tuning.tail_bytes,
            linger: if shard.engine == Engine::Object { tuning.linger } else { Duration::ZERO },
            retention_ms: -1,
            archived: shard.engine == Engine::File,
            drops_oldest: shard.engine == Engine::Memory,
            ..ShardSettings::default()
        }
    }

    /// Starts and goes on until it succeeds.
    pub async fn boot(self: Arc<Self>, world: World) {
        loop {
            match self.start(&world).await {
                Ok(up) => {
                    note(|| format!("node {}: up with epoch {}", self.owner, up.shards[0].status().epoch));
                    self.state.lock().up = Some(up);
                    return;
                }
                Err(error) => {
                    note(|| format!("node {}: {error}", self.owner));
                    if error.contains("another node went on") {
                        // Its disk is of no use any more: a person would move it away.
                        self.on_disk().inspect(|shard| world.judge().disk_lost(&world, shard.id));
                        self.state.lock().disk = Disk::default();
                    }
                    if error.contains("no power") {
                        // The power went in the middle of the start, or the process did.
                        self.state.lock().end(chance(500));
                    }
                    tokio::time::sleep(Duration::from_millis(500 + draw(5000))).await;
                }
            }
        }
    }

    async fn start(&self, world: &World) -> Result<Up, String> {
        let (mut members, mut archives, mut ceilings) = (Vec::<Member>::new(), Vec::new(), BTreeMap::new());
        for hosted in self.shards.iter().copied() {
            let (recovered, wal, archive): (_, Box<dyn BlockLog>, _) = match hosted.engine {
                Engine::Object => self.object(world, hosted).await?,
                Engine::File => self.file(world, hosted).await?,
                Engine::Memory => {
                    let wal = MemoryWal::new(world.tuning().memory_bytes);
                    (Recovered::default(), Box::new(wal), None)
                }
            };
            let cold = archive.as_ref().map(|archive| archive.cold());
            let settings = Self::shard_settings(world, hosted);
            let opened = Shard::open_driven(settings, wal, recovered, cold, Arc::new(wall_ms));
            let (shard, commit) = opened.map_err(|error| error.to_string())?;
            world.processes().spawn(self.owner, commit);
            if hosted.engine == Engine::Memory {
                let catalogue = &members.first().ok_or("no catalogue")?.shard;
                let reserved = reserve_offsets(catalogue, hosted.number).await;
                let (begins, ceiling) = reserved.map_err(|error| error.to_string())?;
                if let Change::Logs(LogChange::EpochStarted { skip, .. }) = begins {
                    world.judge().begins_anew(hosted.id, skip);
                }
                ceilings.insert(hosted.number, ceiling);
                shard.commit(vec![begins]).await.map_err(|error| error.to_string())?;
            } else if hosted.number == CATALOGUE && self.shards.len() > 1 {
                let known = read_state(&*shard, |state| state.shards().count());
                let added = |one: &Hosted| SlotChange::ShardAdded { shard: one.number, engine: one.engine }.into();
                let added = self.shards.iter().skip(known).map(added).collect();
                shard.commit(added).await.map_err(|error| error.to_string())?;
            }
            archives.extend(archive.map(|archive| (archive, shard.clone())));
            members.push(Member { number: hosted.number, engine: hosted.engine, shard });
        }
        let shards: Vec<Arc<Shard>> = members.iter().map(|member| member.shard.clone()).collect();
        let (log, state, safety): (Arc<dyn Log>, Arc<dyn StateLog>, Arc<dyn Safety>) = match &shards[..] {
            [shard] => (shard.clone(), shard.clone(), shard.clone()),
            _ => {
                let shards = Arc::new(Shards::new(members, ceilings));
                shards.reconcile().await.map_err(|error| error.to_string())?;
                (shards.clone(), shards.clone(), shards)
            }
        };
        for (archive, shard) in &archives {
            let run = archive.clone().run(shard.clone(), std::future::pending());
            world.processes().spawn(self.owner, run);
        }
        self.make_topics(&*state).await?;
        let settings = IngestSettings { poll_secs_max: 10, stream_partitions: 1, ..IngestSettings::default() };
        let topics = Arc::new(Fixed(self.shards.clone()));
        let ingest = Ingest::new(settings, log.clone(), state, topics, safety, wall_ms);
        let archives = archives.into_iter().map(|(archive, _)| archive).collect();
        Ok(Up { log, shards, ingest, archives })
    }

    /// What the archive lies in, as this node sees it.
    fn store(&self, world: &World, shard: Hosted) -> Store {
        let prefix = if shard.id < MANY { Path::default() } else { Path::from(PREFIX) };
        Store::new(Arc::new(world.bucket().seen_by(self.owner)), prefix, requests())
    }

    async fn object(&self, world: &World, shard: Hosted) -> Result<Opened, String> {
        let settings = Self::archive_settings(world, shard);
        let archive = Archive::with_stores(settings, self.store(world, shard), None).await;
        let archive = archive.map_err(|error| error.to_string())?;
        let recovered = archive.take_over().await.map_err(|error| error.to_string())?;
        world.bucket().taken_over(shard.id, recovered.epoch);
        let wal_settings = ObjectWalSettings { bytes_max: 4 << 20, ..ObjectWalSettings::default() };
        let wal = archive.object_wal(&recovered, wal_settings);
        Ok((recovered, Box::new(wal), Some(archive)))
    }

    async fn file(&self, world: &World, shard: Hosted) -> Result<Opened, String> {
        let disk = self.state.lock().disk.clone();
        let wal = FileWal::open(Box::new(disk.wal.clone()), file_settings(), random().unwrap_or(0));
        let wal = wal.map_err(|error| error.to_string())?;
        let mirror = Store::new(disk.mirror.clone(), Path::default(), requests());
        let settings = Self::archive_settings(world, shard);
        let archive = Archive::with_stores(settings, self.store(world, shard), Some(mirror)).await;
        let archive = archive.map_err(|error| error.to_string())?;
        let recovered = archive.recover(&LocalWal(&wal)).await.map_err(|error| error.to_string())?;
        if matches!(recovered.tail, Tail::Bucket(_)) {
            note(|| format!("node {}: restored from the bucket", self.owner));
            world.judge().restored(shard.id);
        } else if archive.status().state == "waiting" {
            // The bucket is away, so that an older copy of the disk cannot be told from the newest.
            let (next, held) = disk.holds();
            if next < world.bucket().shipped_blocks(shard.id) {
                note(|| format!("node {}: goes on from {next} without asking the bucket, which has more", self.owner));
                world.judge().set_back(shard.id, &held);
            }
        }
        Ok((recovered, Box::new(wal), Some(archive)))
    }

    async fn make_topics(&self, state: &dyn StateLog) -> Result<(), String> {
        let own = self.shards.iter().flat_map(|shard| {
            let produced = (*shard, produced(shard.id), format!("produced-{}", shard.id));
            [produced, (*shard, streamed(shard.id), stream_topic(shard.id).to_string())]
        });
        let gaps = self.shards.first().map(|shard| (*shard, GAPS, GAPS_TOPIC.to_owned()));
        let mut changes = Vec::new();
        for (shard, partition, name) in own.chain(gaps) {
            if read_state(state, |state| state.topic(partition.topic).is_some()) {
                continue;
            }
            let topic = Topic {
                id: partition.topic,
                name: TopicName::parse(&name).expect("a name"),
                partitions: 1,
                configs: Default::default(),
                created_ms: 0,
            };
            // A shard that is alone has the catalogue, whatever its number.
            let home = if self.shards.len() == 1 { CATALOGUE } else { shard.number };
            changes.push(Change::Topics(TopicChange::Created { topic, shards: vec![home], own: CATALOGUE, from: 0 }));
        }
        state.commit(changes).await.map_err(|error| error.to_string())
    }

    /// Ends the process, and takes the power away or leaves it on.
    pub fn crash(&self, world: &World, power: bool) {
        world.processes().kill(self.owner);
        let mut state = self.state.lock();
        let up = state.up.take();
        (state.started, state.paused) = (false, false);
        state.end(power);
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

impl NodeState {
    fn end(&mut self, power: bool) {
        self.disk = if power { self.disk.survivor() } else { self.disk.restarted() };
    }
}

/// What a shard begins with, where its blocks go, and its archive.
type Opened = (Recovered, Box<dyn BlockLog>, Option<Arc<Archive>>);

fn requests() -> RequestSettings {
    RequestSettings { timeout: Duration::from_secs(2), attempts: 3, ..RequestSettings::default() }
}
