//! The world: who is there, how requests travel, and the end at which everything is judged.

use std::collections::BTreeSet;
use std::path::Path as FilePath;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use object_store::ObjectStoreExt;
use object_store::path::Path;
use parking_lot::Mutex;
use shared::log::BoxFuture;
use tempfile::TempDir;
use tokio::sync::mpsc;

use super::edge::Edge;
use super::judge::Judge;
use super::node::{Hosted, MANY, Node, PREFIX, Tuning, Up, produced, streamed};
use super::scheduler::{Owner, Processes, WORLD};
use super::store::Bucket;
use super::{chance, chaos, client, draw, fail, note, now_ms};
use crate::state::Engine;

/// The shard of blocks in the bucket, which two nodes fight for.
const OBJECT: Hosted = Hosted { id: 0, number: 0, engine: Engine::Object };
/// The shard of blocks on a node's own disk.
const FILE: Hosted = Hosted { id: 1, number: 1, engine: Engine::File };
/// The shard of a node with several that keeps nothing.
pub const MEMORY: u32 = MANY + 2;

/// What happened how often.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Tally {
    pub acknowledged: u64,
    pub confirmed: u64,
    pub read: u64,
    pub renewed: u64,
    pub starts: u64,
    pub crashes: u64,
    pub strikes: u64,
    pub disks_lost: u64,
    pub images: u64,
    pub moved: u64,
    pub seconds: u64,
}

impl Tally {
    pub fn add(&mut self, other: &Self) {
        let Self {
            acknowledged,
            confirmed,
            read,
            renewed,
            starts,
            crashes,
            strikes,
            disks_lost,
            images,
            moved,
            seconds,
        } = other;
        self.acknowledged += acknowledged;
        self.confirmed += confirmed;
        self.read += read;
        self.renewed += renewed;
        self.starts += starts;
        self.crashes += crashes;
        self.strikes += strikes;
        self.disks_lost += disks_lost;
        self.images += images;
        self.moved += moved;
        self.seconds += seconds;
    }
}

/// Everything there is. Clones are handles.
#[derive(Clone)]
pub struct World(Arc<Inner>);

struct Inner {
    processes: Processes,
    bucket: Bucket,
    judge: Judge,
    tuning: Tuning,
    home: TempDir,
    nodes: Vec<Arc<Node>>,
    edges: Vec<Arc<Edge>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    tally: Tally,
    marks: u64,
    writes: bool,
    over: bool,
    /// Requests lost between clients and nodes, in a thousand.
    loss: u64,
    busy: BTreeSet<Owner>,
}

impl World {
    pub fn new(processes: Processes) -> Self {
        let base = FilePath::new("/dev/shm");
        let home = if base.is_dir() { TempDir::new_in(base) } else { TempDir::new() }.expect("a directory");
        std::fs::write(home.path().join("cluster-id"), "simulated\n").expect("a file");
        let bucket = Bucket::new(processes.clone());
        for id in [Path::from("cluster-id"), Path::from(PREFIX).join("cluster-id")] {
            let id = bucket.content.put(&id, "simulated\n".into()).now_or_never();
            assert!(id.is_some_and(|put| put.is_ok()), "memory answers at once");
        }
        let nodes = Self::nodes_drawn();
        let edges = (0..1 + draw(3)).map(|n| {
            let node = &nodes[draw(nodes.len() as u64) as usize];
            Arc::new(Edge::new(10 + n as Owner, node))
        });
        let edges = edges.collect();
        Self(Arc::new(Inner {
            bucket,
            judge: Judge::default(),
            tuning: Tuning::drawn(),
            home,
            nodes,
            edges,
            state: Mutex::new(State { writes: true, ..State::default() }),
            processes,
        }))
    }

    /// Nodes with a shard each, two of them with the same, or one with several of all engines; now and then both systems.
    fn nodes_drawn() -> Vec<Arc<Node>> {
        let (alone, many) = [(true, false), (false, true), (true, true)][draw(3) as usize];
        let mut nodes = Vec::new();
        if alone {
            nodes.extend([(1, OBJECT), (2, OBJECT), (3, FILE)].map(|(owner, shard)| Node::new(owner, [shard])));
            nodes[1].state.lock().held_back = true;
        }
        if many {
            let engines = [[Engine::File, Engine::Object], [Engine::Object, Engine::File]][draw(2) as usize];
            let engines = engines.into_iter().chain([Engine::Memory]);
            let shards = (0..).zip(engines).map(|(number, engine)| Hosted { id: MANY + number, number, engine });
            nodes.push(Node::new(4, shards));
        }
        nodes.into_iter().map(Arc::new).collect()
    }

    /// Starts everything.
    pub fn begin(&self) {
        note(|| format!("{:?}, {} edges", self.0.tuning, self.0.edges.len()));
        self.processes().spawn(WORLD, supervise(self.clone()));
        for edge in self.edges() {
            self.processes().spawn(edge.owner, edge.clone().run(self.clone()));
        }
        let shards: BTreeSet<u32> = self.nodes().iter().flat_map(|node| &node.shards).map(|shard| shard.id).collect();
        for shard in shards {
            self.processes().spawn(WORLD, client::produce(self.clone(), 30 + shard, shard));
            self.processes().spawn(WORLD, client::consume(self.clone(), 50 + shard, shard));
        }
        self.processes().spawn(WORLD, run(self.clone()));
    }

    pub fn processes(&self) -> &Processes {
        &self.0.processes
    }

    pub fn bucket(&self) -> &Bucket {
        &self.0.bucket
    }

    pub fn judge(&self) -> &Judge {
        &self.0.judge
    }

    pub fn tuning(&self) -> &Tuning {
        &self.0.tuning
    }

    pub fn home(&self) -> &FilePath {
        self.0.home.path()
    }

    pub fn nodes(&self) -> &[Arc<Node>] {
        &self.0.nodes
    }

    pub fn edges(&self) -> &[Arc<Edge>] {
        &self.0.edges
    }

    /// Whether devices and producers write.
    pub fn writes(&self) -> bool {
        self.0.state.lock().writes
    }

    pub fn is_over(&self) -> bool {
        self.0.state.lock().over
    }

    pub fn set_loss(&self, per_mille: u64) {
        self.0.state.lock().loss = per_mille;
    }

    /// A number that no other record has.
    pub fn mark(&self) -> u64 {
        let mut state = self.0.state.lock();
        state.marks += 1;
        state.marks
    }

    pub fn count(&self, count: impl FnOnce(&mut Tally)) {
        count(&mut self.0.state.lock().tally);
    }

    pub fn tally(&self) -> Tally {
        Tally { seconds: now_ms() / 1000, ..self.0.state.lock().tally.clone() }
    }

    pub fn producer_idle(&self, owner: Owner, idle: bool) {
        let mut state = self.0.state.lock();
        if idle {
            state.busy.remove(&owner)
        } else {
            state.busy.insert(owner)
        };
    }

    /// One of the machines that may serve a shard.
    pub fn node_of(&self, shard: u32, guess: usize) -> Option<Arc<Node>> {
        let mut serving = self.nodes().iter().filter(|node| node.hosts(shard));
        let count = serving.clone().count().max(1);
        serving.nth(guess % count).cloned()
    }

    /// Sends a request to a node. It may be lost or come twice, and so may the answer; what is not up refuses at once.
    pub async fn ask<T: Send + 'static>(
        &self,
        from: Owner,
        node: Arc<Node>,
        patience: Duration,
        work: Arc<dyn Fn(Up) -> BoxFuture<'static, T> + Send + Sync>,
    ) -> Option<T> {
        let (tell, mut told) = mpsc::unbounded_channel();
        let loss = self.0.state.lock().loss;
        let copies = 1 + u64::from(chance(loss / 2));
        for copy in 0..copies {
            if chance(loss) {
                // Nobody tells the sender.
                let tell = tell.clone();
                self.processes().spawn(WORLD, async move {
                    tokio::time::sleep(Duration::from_secs(60)).await;
                    drop(tell);
                });
                continue;
            }
            let delay = Duration::from_millis(1 + draw(30) + copy * draw(9000));
            let (world, node, work, tell) = (self.clone(), node.clone(), work.clone(), tell.clone());
            self.processes().spawn(WORLD, async move {
                tokio::time::sleep(delay).await;
                let (there, owner) = (world.clone(), node.owner);
                world.processes().spawn(owner, async move {
                    let Some(up) = node.up() else { return };
                    let answer = work(up).await;
                    let delay = Duration::from_millis(1 + draw(30) + if chance(loss) { 60_000 } else { 0 });
                    there.processes().spawn(WORLD, async move {
                        tokio::time::sleep(delay).await;
                        let _ = tell.send(answer);
                    });
                });
            });
        }
        drop(tell);
        let answer = tokio::time::timeout(patience, told.recv()).await.ok().flatten();
        note(|| format!("{from} asked: {}", if answer.is_some() { "answered" } else { "no answer" }));
        answer
    }

    /// Starts a node, if nothing of it runs.
    pub fn start(&self, node: &Arc<Node>) {
        let mut state = node.state.lock();
        if state.started || state.held_back {
            return;
        }
        state.started = true;
        drop(state);
        self.count(|tally| tally.starts += 1);
        self.processes().spawn(node.owner, node.clone().boot(self.clone()));
    }

    /// Ends a node's process for a while, by a kill or by taking its power away.
    pub fn crash(&self, node: &Arc<Node>, off: Duration) {
        self.crash_with(node, off, chance(500));
    }

    pub fn crash_with(&self, node: &Arc<Node>, off: Duration, power: bool) {
        note(|| format!("node {}: {} for {off:?}", node.owner, if power { "has no power" } else { "is killed" }));
        self.count(|tally| tally.crashes += 1);
        node.crash(self, power);
        let (world, node) = (self.clone(), node.clone());
        self.processes().spawn(WORLD, async move {
            tokio::time::sleep(off).await;
            world.start(&node);
        });
    }

    /// Faults end, and everything gets the time to be delivered. Returns whether it was.
    async fn settle(&self) -> bool {
        note(|| "faults end".to_owned());
        self.0.state.lock().writes = false;
        self.calm();
        let mut quiet = 0;
        for _ in 0..100 {
            tokio::time::sleep(Duration::from_secs(10)).await;
            let busy = !self.0.state.lock().busy.is_empty();
            let delivered = self.edges().iter().all(|edge| edge.disk.lock().is_delivered());
            quiet = if busy || !delivered { 0 } else { quiet + 1 };
            if quiet == 4 {
                return true;
            }
        }
        false
    }

    /// Nothing is in the way any more; of the two nodes that fight one is switched off.
    fn calm(&self) {
        self.bucket().clear_up();
        self.set_loss(0);
        for node in self.nodes() {
            self.processes().resume(node.owner);
            let second = node.owner == 2;
            let mut state = node.state.lock();
            (state.cut_off, state.paused, state.held_back) = (false, false, second);
            state.disk.wal.set_trouble(None);
            drop(state);
            if second {
                node.crash(self, true);
            } else {
                self.start(node);
            }
        }
        for edge in self.edges() {
            self.processes().resume(edge.owner);
            edge.set_trouble(false);
        }
    }

    async fn last_judgement(&self, delivered: bool) {
        note(|| "fresh nodes".to_owned());
        for node in self.nodes() {
            node.crash(self, true);
            // The other one of the two that fight.
            node.state.lock().held_back = node.owner == 1;
        }
        let mut services = Vec::new();
        for node in self.nodes().iter().filter(|node| node.owner != 1) {
            self.start(node);
            let mut up = None;
            for _ in 0..100 {
                tokio::time::sleep(Duration::from_secs(1)).await;
                up = node.up();
                if up.is_some() {
                    break;
                }
            }
            match up {
                Some(up) => services.extend(node.shards.iter().map(|shard| (shard.id, up.clone()))),
                None => return fail(format!("node {} does not start any more", node.owner)),
            }
        }
        for (shard, up) in &services {
            self.judge().last_word(self, *shard, up, produced(*shard)).await;
            self.judge().last_word(self, *shard, up, streamed(*shard)).await;
        }
        if !delivered {
            return fail("there is no progress, although nothing is in the way any more".into());
        }
        self.judge().edges(self, &services).await;
    }
}

async fn run(world: World) {
    chaos::reign(&world).await;
    let delivered = world.settle().await;
    world.last_judgement(delivered).await;
    world.0.state.lock().over = true;
    world.processes().finish();
}

/// Starts what is off and starts again what has stopped, as a service manager does.
async fn supervise(world: World) {
    loop {
        for node in world.nodes() {
            let (off, stopped) = {
                let state = node.state.lock();
                (state.disk.wal.is_off(), state.up.as_ref().is_some_and(Up::has_stopped))
            };
            // A machine without power does not wait for its disk to take a block.
            if stopped || off && node.up_at_all() {
                world.crash(node, Duration::from_millis(500 + draw(30_000)));
            } else if world.is_first_second() {
                world.start(node);
            }
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

impl World {
    fn is_first_second(&self) -> bool {
        now_ms() < 1000
    }
}
