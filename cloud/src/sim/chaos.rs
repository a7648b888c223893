//! What goes wrong in a run: a set of kinds drawn by the seed, struck again and again at drawn moments.

use std::sync::Arc;
use std::time::Duration;

use super::edge::EdgeDisk;
use super::node::{Disk, Engine, Node, produced, streamed};
use super::scheduler::WORLD;
use super::world::{FILE, World};
use super::{chance, draw, jump, note, now_ms};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    NodeCrash,
    NodePause,
    Suspended,
    PowerCut,
    TakeOver,
    StoreCutOff,
    CredentialsLost,
    StoreFaults,
    StoreSlow,
    Outage,
    ClientsCutOff,
    Loss,
    ClockJump,
    EdgeCrash,
    EdgePause,
    EdgeImage,
    DiskLost,
    Roll,
}

const KINDS: [Kind; 18] = [
    Kind::NodeCrash,
    Kind::NodePause,
    Kind::Suspended,
    Kind::PowerCut,
    Kind::TakeOver,
    Kind::StoreCutOff,
    Kind::CredentialsLost,
    Kind::StoreFaults,
    Kind::StoreSlow,
    Kind::Outage,
    Kind::ClientsCutOff,
    Kind::Loss,
    Kind::ClockJump,
    Kind::EdgeCrash,
    Kind::EdgePause,
    Kind::EdgeImage,
    Kind::DiskLost,
    Kind::Roll,
];

fn secs(below: u64) -> Duration {
    Duration::from_millis(100 + draw(below * 1000))
}

/// Strikes until the time is over.
pub async fn reign(world: &World) {
    // Few kinds at a time go deeper than all at once.
    let share = [200, 500, 900][draw(3) as usize];
    let kinds: Vec<Kind> = KINDS.into_iter().filter(|_| chance(share)).collect();
    let (end, pace) = (40_000 + draw(160_000), 1 + draw(20));
    note(|| format!("for {end} ms, every {pace} s: {kinds:?}"));
    tokio::time::sleep(secs(10)).await;
    while now_ms() < end {
        if !kinds.is_empty() {
            let kind = kinds[draw(kinds.len() as u64) as usize];
            note(|| format!("strike: {kind:?}"));
            world.count(|tally| tally.strikes += 1);
            strike(world, kind).await;
        }
        tokio::time::sleep(secs(pace)).await;
    }
}

fn any_node(world: &World) -> &Arc<Node> {
    &world.nodes()[draw(world.nodes().len() as u64) as usize]
}

/// Undoes something after a while.
fn later(world: &World, after: Duration, undo: impl FnOnce(&World) + Send + 'static) {
    let there = world.clone();
    world.processes().spawn(WORLD, async move {
        tokio::time::sleep(after).await;
        undo(&there);
    });
}

async fn strike(world: &World, kind: Kind) {
    let node = any_node(world).clone();
    let owner = node.owner;
    match kind {
        Kind::NodeCrash => world.crash(&node, secs(30)),
        Kind::NodePause => {
            world.processes().pause(owner);
            later(world, secs(120), move |world| world.processes().resume(owner));
        }
        Kind::PowerCut => {
            world.nodes().iter().filter(|node| node.engine == Engine::File).for_each(|node| node.cut_power_soon())
        }
        Kind::Suspended => {
            // An owner stands still, its requests wait, and meanwhile another goes on and clears up.
            let fighters = || world.nodes().iter().filter(|node| node.engine == Engine::Object);
            let Some(owner) = fighters().find(|node| node.up().is_some()).map(|node| node.owner) else { return };
            world.processes().pause(owner);
            later(world, secs(200), move |world| world.processes().resume(owner));
            for node in fighters().filter(|node| node.owner != owner) {
                node.state.lock().held_back = false;
                world.start(node);
            }
        }
        Kind::TakeOver => {
            for node in world.nodes().iter().filter(|node| node.engine == Engine::Object) {
                node.state.lock().held_back = false;
                world.start(node);
            }
        }
        Kind::StoreCutOff => {
            world.bucket().change_for(owner, |weather| weather.down = true);
            later(world, secs(60), move |world| world.bucket().change_for(owner, |weather| weather.down = false));
        }
        Kind::CredentialsLost => {
            world.bucket().change_for(owner, |weather| weather.refused = true);
            later(world, secs(200), move |world| world.bucket().change_for(owner, |weather| weather.refused = false));
        }
        Kind::StoreFaults => {
            let per_mille = [0, 50, 300][draw(3) as usize];
            world.bucket().change(|weather| weather.per_mille = per_mille);
        }
        Kind::StoreSlow => {
            let latency = [1, 10, 200, 1500][draw(4) as usize];
            world.bucket().change(|weather| weather.latency_ms = latency);
        }
        Kind::Outage => {
            world.bucket().change(|weather| weather.down = true);
            // Sometimes an hour, in which everybody goes on as he can.
            tokio::time::sleep(if chance(150) { Duration::from_secs(3600) } else { secs(60) }).await;
            world.bucket().change(|weather| weather.down = false);
        }
        Kind::ClientsCutOff => {
            node.state.lock().cut_off = true;
            later(world, secs(60), move |_| node.state.lock().cut_off = false);
        }
        Kind::Loss => world.set_loss([0, 50, 300][draw(3) as usize]),
        Kind::ClockJump => {
            let by = draw(2 * 3_600_000) as i64 - 3_600_000;
            jump(if chance(200) { by * 1000 } else { by });
        }
        Kind::EdgeCrash => restart_edge(world, None),
        Kind::EdgePause => {
            let owner = world.edges()[draw(world.edges().len() as u64) as usize].owner;
            world.processes().pause(owner);
            later(world, secs(60), move |world| world.processes().resume(owner));
        }
        Kind::EdgeImage => {
            let edge = draw(world.edges().len() as u64) as usize;
            let image = world.edges()[edge].disk.lock().clone();
            later(world, secs(60), move |world| {
                if world.writes() {
                    restart_edge(world, Some((edge, image)));
                }
            });
        }
        Kind::DiskLost => {
            let has = |partition| world.bucket().shipped(FILE, partition) > 0;
            if !has(produced(FILE)) && !has(streamed(FILE)) {
                // Of a shard that the bucket has nothing of, a lost disk cannot be told from a new one.
                return;
            }
            for node in world.nodes().iter().filter(|node| node.engine == Engine::File) {
                world.crash(node, secs(20));
                world.judge().disk_lost(world, FILE);
                node.state.lock().disk = Disk::default();
                world.count(|tally| tally.disks_lost += 1);
            }
        }
        Kind::Roll => {
            if let Some(up) = node.up() {
                up.archive.roll_now();
            }
        }
    }
}

/// Kills an edge's process and starts it again, on this disk or an older copy.
fn restart_edge(world: &World, image: Option<(usize, EdgeDisk)>) {
    let which = image.as_ref().map_or_else(|| draw(world.edges().len() as u64) as usize, |(edge, _)| *edge);
    let edge = &world.edges()[which];
    world.processes().kill(edge.owner);
    if let Some((_, image)) = image {
        note(|| format!("{}: goes on with an older copy of its disk", edge.id));
        let mut disk = edge.disk.lock();
        let kept = image.marks();
        world.judge().let_go(disk.marks().into_iter().filter(|mark| !kept.contains(mark)));
        *disk = image;
    }
    world.processes().spawn(edge.owner, edge.clone().run(world.clone()));
}
