//! `restore`: an archive copied to another place, each object checked on the way.
//!
//! What names an object is written after it: segments, shipped log and pages first, then whose archive it is, the roots
//! last. A copy that was cut names nothing yet, and goes on where it was when it is begun again. Nothing at the target is
//! overwritten: every write is a `PutMode::Create`.

use std::collections::BTreeMap;
use std::io::Write;

use bytes::Bytes;
use futures_util::StreamExt;
use object_store::path::Path;
use shared::name::Partition;
use tokio::sync::Semaphore;

use super::chain::{Follower, walk};
use super::object::{Source, check_object};
use super::progress::Progress;
use super::view::{ShardView, View, fetch, wrong_size};
use super::{CLEAN, FINDINGS, Finding, ToolError, bytes_text};
use crate::archive::{Store, StoreError};
use crate::block::Block;
use crate::manifest::{Keys, OBJECT_BYTES_MAX, Root, sequence_of};
use crate::segment::Run;

/// Segments that are copied at a time.
const CONCURRENCY: usize = 4;
/// Memory for segments under way, in KiB; a larger one is copied alone.
const MEMORY_KIB: u32 = 256 << 10;
/// How often a copy is begun anew because the archive was published to meanwhile.
const ATTEMPTS: usize = 4;

/// Runs the command.
pub(super) async fn run(
    store: &Store,
    target: &Store,
    progress: &Progress,
    out: &mut dyn Write,
) -> Result<i32, ToolError> {
    for _ in 0..ATTEMPTS {
        let (findings, view) = progress.shown(copy(store, target, progress)).await?;
        if findings.is_empty() {
            let (objects, bytes) = progress.so_far();
            writeln!(
                out,
                "{} is at {}: {objects} objects, {}. Point [archive] url there and start a node with an empty data directory",
                store.describe(),
                target.describe(),
                bytes_text(bytes)
            )?;
            return Ok(CLEAN);
        }
        // What an older root named may have been cleared away while it was copied.
        if !findings.iter().all(|finding| finding.missing) || !view.is_outdated(store).await? {
            for finding in &findings {
                writeln!(out, "{finding}")?;
            }
            eprintln!("the copy at {} was not put in force: what is named above does not hold", target.describe());
            return Ok(FINDINGS);
        }
    }
    Err(ToolError::Restless(store.describe()))
}

/// Copies everything that the roots in force name. With findings, the roots were not written.
async fn copy(store: &Store, target: &Store, progress: &Progress) -> Result<(Vec<Finding>, View), ToolError> {
    let mut findings = Vec::new();
    let view = View::load(store, &mut findings).await?;
    let cluster_key = Keys::new(store.prefix().clone(), 0).cluster_id();
    // The roots say whose archive it is, too.
    findings.retain(|finding| !(finding.missing && finding.key == cluster_key.as_ref()));
    let Some(cluster_id) = view.cluster_id.clone().filter(|_| findings.is_empty()) else {
        return Ok((findings, view));
    };
    target.probe().await?;
    let copier = Copier { store, target, progress, there: check_target(store, target, &view, &cluster_id).await? };
    for shard in &view.shards {
        copier.segments(shard, &mut findings).await?;
        copier.log(shard, &mut findings).await?;
        copier.pages(shard, &mut findings).await?;
    }
    if !findings.is_empty() {
        return Ok((findings, view));
    }
    claim_target(target, &cluster_id).await?;
    // The catalogue is shard 0: when it is there, everything is.
    for shard in view.shards.iter().rev() {
        let key = shard.keys.root(shard.root.seq);
        copier.put(&key, shard.root_bytes.clone()).await?;
        copier.fences(shard).await?;
    }
    Ok((findings, view))
}

/// Refuses a target that belongs to another system or has gone its own way. Returns what is there.
async fn check_target(
    store: &Store,
    target: &Store,
    view: &View,
    cluster_id: &str,
) -> Result<BTreeMap<Path, u64>, ToolError> {
    check_owner(target, cluster_id).await?;
    let shards = target.prefix().clone().join("shards");
    let there: BTreeMap<Path, u64> =
        target.list(&shards).await?.into_iter().map(|object| (object.location, object.size)).collect();
    for key in there.keys().filter(|key| is_root(key)) {
        let root = target.get(key, OBJECT_BYTES_MAX).await?;
        let in_use = || ToolError::InUse(format!("{} at {}", key, target.describe()));
        let ours = Root::decode(&root).map_err(|_| in_use())?;
        if ours.cluster_id != cluster_id {
            let (target, there) = (target.describe(), ours.cluster_id);
            return Err(ToolError::Foreign { target, there, ours: cluster_id.to_owned() });
        }
        let shard = view.shards.iter().find(|shard| shard.root.shard == ours.shard).ok_or_else(in_use)?;
        let known = ours.seq == shard.root.seq && root == shard.root_bytes;
        let fence = shard.fence_roots().contains(&ours.seq)
            && fetch(store, &shard.keys.root(ours.seq), OBJECT_BYTES_MAX, &mut Vec::new()).await? == Some(root);
        if !known && !fence {
            return Err(in_use());
        }
    }
    Ok(there)
}

fn is_root(key: &Path) -> bool {
    key.as_ref().rsplit('/').nth(1) == Some("manifest") && sequence_of(key).is_some()
}

async fn check_owner(target: &Store, cluster_id: &str) -> Result<(), ToolError> {
    let key = Keys::new(target.prefix().clone(), 0).cluster_id();
    match target.get(&key, 64).await {
        Ok(bytes) if String::from_utf8_lossy(&bytes).trim() == cluster_id => Ok(()),
        Ok(bytes) => Err(ToolError::Foreign {
            target: target.describe(),
            there: String::from_utf8_lossy(&bytes).trim().to_owned(),
            ours: cluster_id.to_owned(),
        }),
        Err(StoreError::Missing(_)) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Says whose the target is. A node that was started there meanwhile has said so before us, and is not disturbed.
async fn claim_target(target: &Store, cluster_id: &str) -> Result<(), ToolError> {
    let key = Keys::new(target.prefix().clone(), 0).cluster_id();
    match target.create(&key, &[Bytes::from(format!("{cluster_id}\n"))]).await {
        Ok(()) => Ok(()),
        Err(StoreError::Taken(_)) => check_owner(target, cluster_id).await,
        Err(error) => Err(error.into()),
    }
}

struct Copier<'a> {
    store: &'a Store,
    target: &'a Store,
    progress: &'a Progress,
    there: BTreeMap<Path, u64>,
}

impl Copier<'_> {
    /// The same key below the target's prefix.
    fn key(&self, key: &Path) -> Path {
        let mut to = self.target.prefix().clone();
        for part in key.prefix_match(self.store.prefix()).into_iter().flatten() {
            to = to.join(part);
        }
        to
    }

    async fn put(&self, key: &Path, bytes: Bytes) -> Result<(), ToolError> {
        match self.target.create(&self.key(key), &[bytes]).await {
            Ok(()) => Ok(()),
            Err(StoreError::Taken(key)) => Err(ToolError::InUse(format!("{key} at {}", self.target.describe()))),
            Err(error) => Err(error.into()),
        }
    }

    async fn segments(&self, shard: &ShardView, findings: &mut Vec<Finding>) -> Result<(), ToolError> {
        let segments = shard.segments();
        self.progress.expect(segments.len() as u64, segments.values().map(|(size, _)| size).sum());
        let memory = Semaphore::new(MEMORY_KIB as usize);
        let memory = &memory;
        let copies = segments.into_iter().map(|(key, (size, runs))| async move {
            let kib = u32::try_from(size / 1024 + 1).unwrap_or(u32::MAX).min(MEMORY_KIB);
            let _memory = memory.acquire_many(kib).await;
            let mut findings = Vec::new();
            let copied = self.segment(shard, &key, size, &runs, &mut findings).await;
            self.progress.done(size);
            copied.map(|()| findings)
        });
        let mut copies = futures_util::stream::iter(copies).buffer_unordered(CONCURRENCY);
        while let Some(copied) = copies.next().await {
            findings.extend(copied?);
        }
        Ok(())
    }

    async fn segment(
        &self,
        shard: &ShardView,
        key: &Path,
        size: u64,
        runs: &[(Partition, Run)],
        findings: &mut Vec<Finding>,
    ) -> Result<(), ToolError> {
        // Its name is random and its write was atomic: what has the name and the size was checked when it was written.
        if self.there.get(&self.key(key)) == Some(&size) {
            return Ok(());
        }
        match shard.objects.get(key) {
            None => findings.push(Finding::missing(key)),
            Some(found) if *found != size => findings.push(Finding::new(key, wrong_size(*found, size))),
            Some(_) => {
                let bytes = match self.store.get_range_paced(key, 0..size).await {
                    Ok(bytes) => bytes,
                    Err(StoreError::Missing(_)) => {
                        findings.push(Finding::missing(key));
                        return Ok(());
                    }
                    Err(error) => return Err(error.into()),
                };
                let before = findings.len();
                check_object(&Source::Held(bytes.clone()), key, size, runs, findings).await?;
                if findings.len() == before {
                    self.put(key, bytes).await?;
                }
            }
        }
        Ok(())
    }

    /// The shipped log: its chain first, then object after object.
    async fn log(&self, shard: &ShardView, findings: &mut Vec<Finding>) -> Result<(), ToolError> {
        let before = findings.len();
        let mut state = shard.state.clone();
        let mut follower = Follower::new(&mut state);
        let each = |key: &Path, position: u64, block: &Block, findings: &mut Vec<Finding>| {
            follower.follow(key, position, block, findings);
            Ok(())
        };
        walk(self.store, shard, findings, each, |_| {}).await?;
        if findings.len() > before {
            return Ok(());
        }
        for seq in shard.wals() {
            let key = shard.keys.wal(seq);
            self.progress.expect(1, shard.objects.get(&key).copied().unwrap_or(0));
            let Some(bytes) = fetch(self.store, &key, OBJECT_BYTES_MAX, findings).await? else { continue };
            let size = bytes.len() as u64;
            if !is_blocks(&bytes) {
                findings.push(Finding::new(&key, "it was read twice, and the second time it did not hold"));
                continue;
            }
            self.put(&key, bytes).await?;
            self.progress.done(size);
        }
        Ok(())
    }

    async fn pages(&self, shard: &ShardView, findings: &mut Vec<Finding>) -> Result<(), ToolError> {
        for pointer in shard.pages() {
            let key = shard.keys.page(pointer);
            self.progress.expect(1, pointer.bytes);
            let Some(bytes) = fetch(self.store, &key, pointer.bytes, findings).await? else { continue };
            if !crate::manifest::is_page(&bytes, pointer) {
                findings.push(Finding::new(&key, "it is not the page that its root names"));
                continue;
            }
            self.put(&key, bytes).await?;
            self.progress.done(pointer.bytes);
        }
        Ok(())
    }

    /// What is kept of earlier claims. One that is gone from the archive was lost there, and no data with it.
    async fn fences(&self, shard: &ShardView) -> Result<(), ToolError> {
        for seq in shard.fence_wals() {
            let key = shard.keys.wal(seq);
            if let Some(bytes) = fetch(self.store, &key, OBJECT_BYTES_MAX, &mut Vec::new()).await?
                && is_blocks(&bytes)
            {
                self.put(&key, bytes).await?;
            }
        }
        for seq in shard.fence_roots() {
            let key = shard.keys.root(seq);
            if let Some(bytes) = fetch(self.store, &key, OBJECT_BYTES_MAX, &mut Vec::new()).await?
                && Root::decode(&bytes).is_ok_and(|root| root.seq == seq)
            {
                self.put(&key, bytes).await?;
            }
        }
        Ok(())
    }
}

fn is_blocks(bytes: &Bytes) -> bool {
    let mut rest = bytes.clone();
    loop {
        match Block::split_first(&mut rest) {
            Ok(Some(_)) => {}
            Ok(None) => return true,
            Err(_) => return false,
        }
    }
}
