//! `verify`: whether everything in an archive is what was written, and whether nothing is missing.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;

use futures_util::StreamExt;
use object_store::path::Path;
use shared::name::Partition;

use super::chain::{Follower, walk};
use super::object::{Hole, Source, check_object};
use super::progress::Progress;
use super::view::{ShardView, View, fetch, wrong_size};
use super::{CLEAN, FAILED, FINDINGS, Finding, ToolError};
use crate::archive::{Store, StoreError};
use crate::block::Block;
use crate::manifest::{OBJECT_BYTES_MAX, Root};
use crate::segment::Run;
use crate::state::{CATALOGUE, Engine, State};

/// Longer than any engine's name.
const ENGINE_BYTES_MAX: u64 = 64;
/// Objects that are read at a time; each takes two windows of memory.
const CONCURRENCY: usize = 4;

/// What was found.
#[derive(Debug, Default)]
pub(super) struct Report {
    pub findings: Vec<Finding>,
    /// Objects that could not be read, and why.
    pub unchecked: Vec<String>,
    pub shards: usize,
    /// Objects that no manifest names, and their bytes: left by a cut, or about to be deleted.
    pub unnamed: (u64, u64),
}

/// Runs the command.
pub(super) async fn run(store: &Store, json: bool, progress: &Progress, out: &mut dyn Write) -> Result<i32, ToolError> {
    let report = progress.shown(check(store, progress)).await?;
    for finding in &report.findings {
        if json {
            writeln!(out, "{}", serde_json::to_string(finding).map_err(std::io::Error::other)?)?;
        } else {
            writeln!(out, "{finding}")?;
        }
    }
    for text in &report.unchecked {
        eprintln!("could not be checked: {text}");
    }
    let (objects, bytes) = progress.so_far();
    let (orphans, orphan_bytes) = report.unnamed;
    eprintln!(
        "{}: {} shards, {objects} objects, {} checked, {} findings; {orphans} objects ({}) that no manifest names",
        store.describe(),
        report.shards,
        super::bytes_text(bytes),
        report.findings.len(),
        super::bytes_text(orphan_bytes)
    );
    Ok(match (report.findings.is_empty(), report.unchecked.is_empty()) {
        (false, _) => FINDINGS,
        (true, false) => FAILED,
        (true, true) => CLEAN,
    })
}

/// Checks everything that the roots in force name.
pub(super) async fn check(store: &Store, progress: &Progress) -> Result<Report, ToolError> {
    let mut report = Report::default();
    let mut view = View::load(store, &mut report.findings).await?;
    report.shards = view.shards.len();
    for shard in &view.shards {
        let segments = shard.segments();
        progress.expect(segments.len() as u64, segments.values().map(|(size, _)| size).sum());
        let wals = shard.wals().into_iter().map(|seq| shard.keys.wal(seq));
        let sizes: Vec<u64> = wals.filter_map(|key| shard.objects.get(&key).copied()).collect();
        progress.expect(sizes.len() as u64, sizes.iter().sum());
        for pointer in shard.pages() {
            progress.expect(1, pointer.bytes);
            progress.done(pointer.bytes);
        }
        progress.expect(1, shard.root_bytes.len() as u64);
        progress.done(shard.root_bytes.len() as u64);
        let named = shard.named();
        for size in shard.objects.iter().filter(|(key, _)| !named.contains(*key)).map(|(_, size)| size) {
            report.unnamed.0 += 1;
            report.unnamed.1 += size;
        }
    }
    let engines = engines(&view);
    for shard in &mut view.shards {
        check_engine(store, shard, &engines, &mut report.findings).await?;
        check_shard(store, shard, progress, &mut report).await?;
    }
    forgive_what_moved_on(store, &view, &mut report).await?;
    Ok(report)
}

/// The engine of each shard, as the catalogue has it.
fn engines(view: &View) -> BTreeMap<u32, Engine> {
    let catalogue = view.shards.iter().find(|shard| shard.root.shard == CATALOGUE);
    catalogue.iter().flat_map(|shard| shard.state.shards()).map(|(number, entry)| (number, entry.engine)).collect()
}

/// What a shard says of its engine keeps nodes of another engine away from it.
async fn check_engine(
    store: &Store,
    shard: &ShardView,
    engines: &BTreeMap<u32, Engine>,
    findings: &mut Vec<Finding>,
) -> Result<(), ToolError> {
    let key = shard.keys.engine();
    if !shard.objects.contains_key(&key) {
        return Ok(());
    }
    let Some(said) = fetch(store, &key, ENGINE_BYTES_MAX, findings).await? else { return Ok(()) };
    let said = String::from_utf8_lossy(&said);
    let engine = said.strip_suffix('\n').and_then(Engine::parse).filter(|engine| *engine != Engine::Memory);
    match (engine, engines.get(&shard.root.shard)) {
        (None, _) => {
            let what = format!("it names the engine {said:?}, expected {:?} or {:?}", "file\n", "object\n");
            findings.push(Finding::new(&key, what));
        }
        (Some(engine), Some(known)) if engine != *known => {
            let what = format!("it names the engine {engine}, the catalogue has the shard with the engine {known}");
            findings.push(Finding::new(&key, what));
        }
        (Some(_), _) => {}
    }
    Ok(())
}

async fn check_shard(
    store: &Store,
    shard: &mut ShardView,
    progress: &Progress,
    report: &mut Report,
) -> Result<(), ToolError> {
    let holes = check_segments(store, shard, progress, report).await;
    check_fences(store, shard, &mut report.findings).await?;
    let mut state = shard.state.clone();
    let mut follower = Follower::new(&mut state);
    let follow = |key: &Path, position: u64, block: &Block, findings: &mut Vec<Finding>| {
        follower.follow(key, position, block, findings);
        Ok(())
    };
    walk(store, shard, &mut report.findings, follow, |size| progress.done(size)).await?;
    check_partitions(shard, &state, &holes, &mut report.findings);
    Ok(())
}

/// Reads every segment that is named, several at a time. Returns the holes between batches of their runs.
async fn check_segments(
    store: &Store,
    shard: &ShardView,
    progress: &Progress,
    report: &mut Report,
) -> Vec<(Path, Hole)> {
    let mut holes = Vec::new();
    let checks = shard.segments().into_iter().map(|(key, (size, runs))| async move {
        let mut findings = Vec::new();
        let checked = check_segment(store, shard, &key, size, &runs, &mut findings).await;
        progress.done(size);
        (key, findings, checked)
    });
    let mut checks = futures_util::stream::iter(checks).buffer_unordered(CONCURRENCY);
    while let Some((key, findings, checked)) = checks.next().await {
        report.findings.extend(findings);
        match checked {
            Ok(found) => holes.extend(found.into_iter().map(|hole| (key.clone(), hole))),
            Err(StoreError::Missing(_)) => report.findings.push(Finding::missing(&key)),
            Err(error) => report.unchecked.push(error.to_string()),
        }
    }
    holes
}

async fn check_segment(
    store: &Store,
    shard: &ShardView,
    key: &Path,
    size: u64,
    runs: &[(Partition, Run)],
    findings: &mut Vec<Finding>,
) -> Result<Vec<Hole>, StoreError> {
    match shard.objects.get(key) {
        None => Err(StoreError::Missing(key.clone())),
        Some(found) if *found != size => {
            findings.push(Finding::new(key, wrong_size(*found, size)));
            Ok(Vec::new())
        }
        Some(_) => check_object(&Source::Stored(store, key), key, size, runs, findings).await,
    }
}

/// Offsets must go on without a hole, but where an epoch left some out or they were trimmed. `now` is the state at the
/// end of the shipped log: a topic that was deleted after the snapshot was taken may have had its data left out already.
fn check_partitions(shard: &ShardView, now: &State, holes: &[(Path, Hole)], findings: &mut Vec<Finding>) {
    let state = &shard.state;
    for (key, (partition, position, end, next)) in holes {
        let Some(known) = state.partition(*partition).filter(|_| now.partition(*partition).is_some()) else { continue };
        if !known.left_out((*end).max(known.log_start), *next) && *next > known.log_start {
            let what = format!("{partition}: offsets {end}..{next} are not there");
            findings.push(Finding::at(key, *position, what));
        }
    }
    let root = shard.keys.root(shard.root.seq);
    let mut wrong = |what: String| findings.push(Finding::new(&root, what));
    for (partition, known) in state.partitions().filter(|(partition, _)| now.partition(**partition).is_some()) {
        let mut end = known.log_start;
        for held in shard.runs.get(partition).into_iter().flatten() {
            if held.run.base > end && !known.left_out(end, held.run.base) {
                wrong(format!("{partition}: no run has the offsets {end}..{}", held.run.base));
            }
            end = end.max(held.run.next);
        }
        if end < known.high_watermark && !known.left_out(end, known.high_watermark) {
            wrong(format!("{partition}: no run has the offsets {end}..{}", known.high_watermark));
        }
        if end > known.high_watermark {
            wrong(format!("{partition} has runs up to {end}, its state ends at {}", known.high_watermark));
        }
    }
}

/// What earlier claims left must be there: an owner that was deposed collides with it.
async fn check_fences(store: &Store, shard: &ShardView, findings: &mut Vec<Finding>) -> Result<(), ToolError> {
    for seq in shard.fence_roots() {
        let key = shard.keys.root(seq);
        let Some(bytes) = fetch(store, &key, OBJECT_BYTES_MAX, findings).await? else { continue };
        match Root::decode(&bytes) {
            Ok(root) if root.seq == seq && root.cluster_id == shard.root.cluster_id => {}
            Ok(_) => findings.push(Finding::new(&key, "it contradicts its own name or belongs to another system")),
            Err(error) => findings.push(Finding::new(&key, error)),
        }
    }
    // Where nothing is shipped there are no WAL objects at all.
    if shard.wals().is_empty() {
        return Ok(());
    }
    for seq in shard.fence_wals() {
        let key = shard.keys.wal(seq);
        let Some(mut bytes) = fetch(store, &key, OBJECT_BYTES_MAX, findings).await? else { continue };
        let size = bytes.len();
        let mut expected = seq;
        loop {
            let position = (size - bytes.len()) as u64;
            let what = match Block::split_first(&mut bytes) {
                Ok(None) if expected > seq => break,
                Ok(None) => "it holds no block".to_owned(),
                Ok(Some(block)) if block.header().seq == expected => {
                    expected += 1;
                    continue;
                }
                Ok(Some(block)) => format!("block {} where block {expected} was expected", block.header().seq),
                Err(error) => error.to_string(),
            };
            findings.push(Finding::at(&key, position, what));
            break;
        }
    }
    Ok(())
}

/// A node may publish while an archive is read: what only an older root named may be gone.
async fn forgive_what_moved_on(store: &Store, view: &View, report: &mut Report) -> Result<(), ToolError> {
    if !report.findings.iter().any(|finding| finding.missing) || !view.is_outdated(store).await? {
        return Ok(());
    }
    let now = View::load(store, &mut Vec::new()).await?;
    let named: BTreeSet<String> = now.shards.iter().flat_map(ShardView::named).map(|key| key.to_string()).collect();
    report.findings.retain(|finding| !finding.missing || named.contains(&finding.key));
    Ok(())
}
