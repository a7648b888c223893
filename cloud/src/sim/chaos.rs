//! What goes wrong in a run: a set of kinds drawn by the seed, struck again and again at drawn moments.

use std::sync::Arc;
use std::time::Duration;

use super::edge::Edge;
use super::node::{Disk, Hosted, Node, produced, streamed};
use super::scheduler::WORLD;
use super::world::World;
use super::{chance, draw, jump, note, now_ms};
use crate::wal::powercut::Trouble;

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
    EdgeDiskFull,
    StreamMoved,
    DiskLost,
    DiskImage,
    DiskTrouble,
    RootLost,
    Roll,
}

const KINDS: [Kind; 23] = [
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
    Kind::EdgeDiskFull,
    Kind::StreamMoved,
    Kind::DiskLost,
    Kind::DiskImage,
    Kind::DiskTrouble,
    Kind::RootLost,
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

fn any_edge(world: &World) -> &Arc<Edge> {
    &world.edges()[draw(world.edges().len() as u64) as usize]
}

/// One of the nodes with a disk that matters, and the shard on it.
fn any_disk(world: &World) -> Option<(&Arc<Node>, Hosted)> {
    let disks: Vec<_> = world.nodes().iter().filter_map(|node| Some((node, node.on_disk()?))).collect();
    disks.get(draw(disks.len().max(1) as u64) as usize).copied()
}

/// Whether the bucket has something of a shard's every partition, and so of all that came before.
fn is_known(world: &World, shard: Hosted) -> bool {
    [produced(shard.id), streamed(shard.id)].iter().any(|partition| world.bucket().shipped(shard.id, *partition) > 0)
}

/// Undoes something after a while.
fn later(world: &World, after: Duration, undo: impl FnOnce(&World) + Send + 'static) {
    let there = world.clone();
    world.processes().spawn(WORLD, async move {
        tokio::time::sleep(after).await;
        undo(&there);
    });
}

/// Strikes again after a while, if faults have not ended by then.
fn follow(world: &World, after: Duration, strike: impl FnOnce(&World) + Send + 'static) {
    later(world, after, move |world| {
        if world.writes() {
            strike(world);
        }
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
            world.nodes().iter().filter(|node| node.on_disk().is_some()).for_each(|node| node.cut_power_soon());
        }
        Kind::Suspended => {
            // An owner stands still, its requests wait, and meanwhile another goes on and clears up.
            let fighters = || world.nodes().iter().filter(|node| node.fights());
            let Some(owner) = fighters().find(|node| node.up().is_some()).map(|node| node.owner) else { return };
            world.processes().pause(owner);
            later(world, secs(200), move |world| world.processes().resume(owner));
            for node in fighters().filter(|node| node.owner != owner) {
                node.state.lock().held_back = false;
                world.start(node);
            }
        }
        Kind::TakeOver => {
            for node in world.nodes().iter().filter(|node| node.fights()) {
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
        Kind::EdgeCrash => any_edge(world).restart(world, None, false),
        Kind::EdgePause => {
            let owner = any_edge(world).owner;
            world.processes().pause(owner);
            later(world, secs(60), move |world| world.processes().resume(owner));
        }
        Kind::EdgeImage => {
            let edge = any_edge(world).clone();
            let image = edge.image();
            follow(world, secs(60), move |world| {
                edge.restart(world, Some(image), false);
                if chance(500) {
                    // And is killed before it has settled what that means.
                    follow(world, secs(1), move |world| edge.restart(world, None, false));
                }
            });
        }
        Kind::EdgeDiskFull => {
            let edge = any_edge(world).clone();
            edge.set_trouble(true);
            later(world, secs(60), move |_| edge.set_trouble(false));
        }
        Kind::StreamMoved => {
            let movable: Vec<_> = world.edges().iter().filter(|edge| edge.may_move()).collect();
            if let Some(edge) = movable.get(draw(movable.len().max(1) as u64) as usize) {
                world.count(|tally| tally.moved += 1);
                edge.restart(world, None, true);
                if chance(700) {
                    world.processes().spawn(WORLD, lose_disk_behind(world.clone(), Arc::clone(edge)));
                }
            }
        }
        Kind::DiskLost => {
            if let Some((node, _)) = any_disk(world) {
                lose_disk(world, node);
            }
        }
        Kind::DiskImage => {
            let Some((node, shard)) = any_disk(world) else { return };
            let (node, image) = (node.clone(), node.state.lock().disk.survivor());
            follow(world, secs([10, 60][draw(2) as usize]), move |world| restore_image(world, &node, shard, image));
        }
        Kind::DiskTrouble => {
            let Some((node, _)) = any_disk(world) else { return };
            let trouble = [Trouble::Full, Trouble::ReadOnly, Trouble::SyncFails][draw(3) as usize];
            note(|| format!("node {}: {trouble:?}", node.owner));
            node.state.lock().disk.wal.set_trouble(Some(trouble));
            let (there, node, ill) = (world.clone(), node.clone(), secs(30));
            world.processes().spawn(WORLD, async move {
                tokio::time::sleep(ill).await;
                node.state.lock().disk.wal.set_trouble(None);
                while node.up().is_none() && there.writes() {
                    tokio::time::sleep(Duration::from_millis(500)).await;
                }
                tokio::time::sleep(secs(5)).await;
                if there.writes() && chance(700) {
                    // Well again, at work, and without power: what was thought to be written shows.
                    there.crash_with(&node, secs(10), true);
                }
            });
        }
        Kind::RootLost => {
            // The manifest does not get through, and the node ends before it knows.
            let Some((node, _)) = any_disk(world) else { return };
            let (node, owner) = (node.clone(), node.owner);
            world.bucket().change_for(owner, |weather| weather.no_roots = true);
            if let Some(up) = node.up() {
                up.archives.iter().for_each(|archive| archive.roll_now());
            }
            let after = secs(20);
            follow(world, after, move |world| world.crash(&node, secs(5)));
            later(world, after, move |world| world.bucket().change_for(owner, |weather| weather.no_roots = false));
        }
        Kind::Roll => {
            if let Some(up) = node.up() {
                up.archives.iter().for_each(|archive| archive.roll_now());
            }
        }
    }
}

/// A disk is lost as soon as something of an edge's moved streams is stored elsewhere: what they left behind may not be in
/// the bucket yet.
async fn lose_disk_behind(world: World, edge: Arc<Edge>) {
    let ends = edge.disk.lock().ends();
    for _ in 0..200 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        if edge.disk.lock().has_more_confirmed(&ends) {
            break;
        }
    }
    if let Some(node) = world.node_of(edge.shards[0], 0).filter(|_| world.writes()) {
        lose_disk(&world, &node);
    }
}

fn lose_disk(world: &World, node: &Arc<Node>) {
    // Of a shard that the bucket has nothing of, a lost disk cannot be told from a new one.
    let Some(shard) = node.on_disk().filter(|shard| is_known(world, *shard)) else { return };
    world.crash(node, secs(20));
    world.judge().disk_lost(world, shard.id);
    node.state.lock().disk = Disk::default();
    world.count(|tally| tally.disks_lost += 1);
}

/// Puts an older copy of a node's disk back, as from a snapshot of a virtual machine.
fn restore_image(world: &World, node: &Arc<Node>, shard: Hosted, image: Disk) {
    let (next, held) = image.holds();
    let shipped = world.bucket().shipped_blocks(shard.id);
    // A copy from before there was anything is a new disk; where nothing tells of what came later, neither can the other
    // shards of a node be told.
    if !is_known(world, shard) || next == 0 || next >= shipped && node.shards.len() > 1 {
        return;
    }
    note(|| format!("node {}: goes on with an older copy of its disk: to {next}, shipped to {shipped}", node.owner));
    world.crash(node, secs(20));
    if next < shipped {
        world.judge().disk_lost(world, shard.id);
    } else {
        world.judge().set_back(shard.id, &held);
    }
    node.state.lock().disk = image;
    world.count(|tally| tally.images += 1);
}
