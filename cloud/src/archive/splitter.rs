//! Splitting: shipped blocks become segments, a manifest names them, and only then may the WAL go.
//!
//! One round: take a snapshot at block X; wait until everything below X is shipped; write the batches of blocks
//! `trim .. X` as runs into segment objects; drop runs that nobody may read any more; write what changed of the index,
//! the snapshot and a root; copy root and pages to the local disk; let the WAL be trimmed. What no root names any more is
//! deleted after a grace. A round that fails is begun anew; what it had written is found by the sweep of the next start.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use object_store::path::Path;
use shared::name::{Offset, Partition, TimestampMs};
use tokio::time::Instant;
use tracing::{info, warn};

use super::archiver::Held;
use super::store::{backoff, random};
use super::{Archive, ArchiveError, Snapshot, Source, SourceError, StoreError};
use crate::block::Block;
use crate::manifest::{
    self, HeldRun, Index, PagePointer, Root, SegmentId, epoch_of_segment, sequence_of, sequence_of_page,
};
use crate::planted::{Bug, planted};
use crate::segment::{Segment, SegmentError, SegmentWriter};

/// Objects that one round writes again to be rid of dead bytes.
const REWRITES_MAX: usize = 8;
/// How often runs are looked through for what may go, at most.
const MAINTENANCE: Duration = Duration::from_secs(60);

type Slices = Vec<(Bytes, TimestampMs)>;

/// Splits one shard's blocks.
pub(super) struct Splitter<'a> {
    archive: &'a Archive,
    source: &'a dyn Source,
    root: Root,
    index: Index,
    /// Objects that no root names, and when they may go.
    garbage: Vec<(Instant, Path)>,
    /// Since when blocks wait to be split.
    waiting: Option<Instant>,
    /// What the WAL kept when everything was split: its newest block at least.
    wal_floor: u64,
    maintained: Instant,
    /// The local copy of the manifest is older than the bucket's.
    mirror_behind: bool,
    /// Roots up to the claim were others'; what is swept is theirs.
    claim_seq: u64,
}

/// Pages written for a root under way.
struct Pages {
    pointers: Vec<PagePointer>,
    snapshot: Option<PagePointer>,
    fresh: HashMap<PagePointer, Bytes>,
}

impl<'a> Splitter<'a> {
    pub(super) fn new(archive: &'a Archive, source: &'a dyn Source, held: Held) -> Self {
        let now = Instant::now();
        let claim_seq = held.root.seq;
        let mut splitter = Self {
            archive,
            source,
            root: held.root,
            index: held.index,
            garbage: Vec::new(),
            waiting: None,
            wal_floor: 0,
            maintained: now,
            mirror_behind: false,
            claim_seq,
        };
        splitter.show();
        splitter
    }

    /// Splits until another owner is met.
    pub(super) async fn run(&mut self) -> ArchiveError {
        self.source.published(self.root.trim);
        let mut failures = 0u32;
        let mut swept = false;
        loop {
            if !swept {
                match self.sweep().await {
                    Ok(()) => swept = true,
                    Err(error) => warn!(%error, "the sweep waits"),
                }
            }
            let asked = self.tick(failures).await;
            self.clear().await;
            if !asked && !self.due() && !self.mirror_behind {
                continue;
            }
            match self.round().await {
                Ok(()) => {
                    failures = 0;
                    self.archive.worked();
                }
                Err(error @ (ArchiveError::Deposed { .. } | ArchiveError::Source(SourceError::Closed))) => {
                    return error;
                }
                Err(error) => {
                    failures += 1;
                    warn!(%error, trim = self.root.trim, "splitting waits");
                    self.archive.failed(&error);
                }
            }
        }
    }

    /// Waits for the next look; `true` when a roll was asked for.
    async fn tick(&self, failures: u32) -> bool {
        let tick = (self.archive.settings.segment_age / 10).clamp(Duration::from_millis(5), Duration::from_secs(1));
        if failures > 0 {
            tokio::time::sleep(backoff(tick, failures)).await;
            return false;
        }
        tokio::time::timeout(tick, self.archive.roll.notified()).await.is_ok()
    }

    fn due(&mut self) -> bool {
        let settings = &self.archive.settings;
        let durable = self.source.durable();
        if durable.next_seq <= self.root.trim {
            self.waiting = None;
        } else {
            let since = *self.waiting.get_or_insert_with(Instant::now);
            let enough = settings.segment_bytes.min(durable.wal_bytes_max / 2);
            let full = durable.wal_bytes.saturating_sub(self.wal_floor) >= enough;
            if full || since.elapsed() >= settings.segment_age {
                return true;
            }
        }
        if self.maintained.elapsed() < settings.segment_age.min(MAINTENANCE) {
            return false;
        }
        self.maintained = Instant::now();
        let source = self.source;
        self.index.partitions().any(|partition| {
            let Some(retained) = source.retained(partition) else { return true };
            self.index.runs(partition).next().is_some_and(|held| held.run.next <= retained.log_start)
        })
    }

    async fn round(&mut self) -> Result<(), ArchiveError> {
        if self.mirror_behind {
            self.archive.write_mirror(&self.root, &HashMap::new()).await?;
            self.mirrored();
        }
        let mut index = self.index.clone();
        // What may go is decided before the snapshot is taken, so that a restore from it knows as much.
        let rewritten = self.drop_unwanted(&mut index);
        let snapshot = self.source.snapshot().await?;
        if snapshot.next_seq == self.root.trim && rewritten.is_none() {
            return Ok(());
        }
        self.wait_shipped(snapshot.next_seq).await;
        let mut number = 0;
        let trim_crc = self.split(&mut index, snapshot.next_seq, &mut number).await?;
        for object in rewritten.unwrap_or_default() {
            self.rewrite(&mut index, object, snapshot.next_seq, &mut number).await?;
        }
        let trim = snapshot.next_seq;
        let pages = self.write_pages(&mut index, snapshot).await?;
        let root = Root {
            seq: self.root.seq + 1,
            nonce: random(),
            trim,
            wal: self.wal_object_of(trim),
            trim_crc: trim_crc.or(self.root.trim_crc),
            snapshot: pages.snapshot,
            pages: pages.pointers,
            ..self.root.clone()
        };
        self.publish(root, index, pages.fresh).await
    }

    async fn wait_shipped(&self, seq: u64) {
        // The sender lives as long as the archive, so this ends only when everything below `seq` is shipped.
        let _ = self.archive.shipped.subscribe().wait_for(|shipped| *shipped >= seq).await;
    }

    /// Drops runs of deleted topics and below log starts. `None` when there is none; otherwise objects that are worth
    /// writing again without their dead bytes: a deleted topic's must go, and so must what is mostly dead.
    fn drop_unwanted(&self, index: &mut Index) -> Option<Vec<SegmentId>> {
        let mut wanted: HashMap<Partition, Option<Offset>> = HashMap::new();
        for partition in index.partitions() {
            wanted.insert(partition, self.source.retained(partition).map(|retained| retained.log_start));
        }
        let start = |partition: Partition| wanted.get(&partition).copied().flatten();
        let gone = index.retain(|partition, held| start(partition).is_some_and(|start| held.run.next > start));
        if gone.is_empty() {
            return None;
        }
        let usage = index.usage();
        let deleted: BTreeSet<SegmentId> =
            gone.iter().filter(|(partition, _)| start(*partition).is_none()).map(|(_, held)| held.object).collect();
        let touched: BTreeSet<SegmentId> = gone.iter().map(|(_, held)| held.object).collect();
        let rewrite = touched.into_iter().filter(|object| {
            usage.get(object).is_some_and(|usage| deleted.contains(object) || usage.live * 2 < usage.bytes)
        });
        Some(rewrite.take(REWRITES_MAX).collect())
    }

    /// Writes the batches of blocks below `end` into segments. Returns the checksum of the last block.
    async fn split(&self, index: &mut Index, end: u64, number: &mut u32) -> Result<Option<u32>, ArchiveError> {
        let mut crc = None;
        let mut from = self.root.trim;
        while from < end {
            let mut blocks = self.source.blocks(from, self.archive.settings.segment_bytes as usize).await?;
            blocks.retain(|block| block.seq < end);
            let mut parts: BTreeMap<Partition, Slices> = BTreeMap::new();
            for stored in blocks {
                let damaged =
                    |error: &dyn std::fmt::Display| ArchiveError::Local(format!("WAL block {}: {error}", stored.seq));
                if stored.seq != from {
                    return Err(damaged(&format_args!("block {from} was expected")));
                }
                crc = Some(crc32c::crc32c(&stored.bytes));
                let block = Block::parse(stored.bytes.clone()).map_err(|error| damaged(&error))?;
                for entry in block.entries() {
                    let slice = (block.data(entry), block.header().append_ms);
                    parts.entry(entry.partition).or_default().push(slice);
                }
                from += 1;
            }
            for group in self.group(parts) {
                self.write_segment(index, group, end, number).await?;
            }
        }
        Ok(crc)
    }

    /// What goes into one object each: a busy partition alone, quiet ones that live equally long together.
    fn group(&self, parts: BTreeMap<Partition, Slices>) -> Vec<Vec<(Partition, Slices)>> {
        let segment_bytes = self.archive.settings.segment_bytes;
        let mut groups = Vec::new();
        let mut shared: BTreeMap<i64, (u64, Vec<(Partition, Slices)>)> = BTreeMap::new();
        for (partition, slices) in parts {
            // Deleted since: its bytes need not be written to be dropped.
            let Some(retained) = self.source.retained(partition) else { continue };
            let bytes: u64 = slices.iter().map(|(slice, _)| slice.len() as u64).sum();
            if bytes >= segment_bytes / 2 {
                groups.push(vec![(partition, slices)]);
                continue;
            }
            let (held, group) = shared.entry(retained.retention_ms).or_default();
            *held += bytes;
            group.push((partition, slices));
            if *held >= segment_bytes {
                groups.push(std::mem::take(group));
                *held = 0;
            }
        }
        groups.extend(shared.into_values().map(|(_, group)| group).filter(|group| !group.is_empty()));
        groups
    }

    async fn write_segment(
        &self,
        index: &mut Index,
        group: Vec<(Partition, Slices)>,
        seq: u64,
        number: &mut u32,
    ) -> Result<(), ArchiveError> {
        let (id, segment) = self.put_segment(group, seq, number).await?;
        for (partition, run) in segment.runs {
            if index.next(partition).is_some_and(|next| run.base < next) {
                return Err(ArchiveError::Local(format!("{partition}: offset {} is archived already", run.base)));
            }
            index.add(partition, HeldRun { object: id, object_bytes: segment.bytes, run });
        }
        Ok(())
    }

    async fn put_segment(
        &self,
        group: Vec<(Partition, Slices)>,
        seq: u64,
        number: &mut u32,
    ) -> Result<(SegmentId, Segment), ArchiveError> {
        let build = move || {
            let mut writer = SegmentWriter::default();
            group.into_iter().try_for_each(|(partition, slices)| writer.run(partition, slices))?;
            Ok::<_, SegmentError>(writer.finish())
        };
        // Every batch's checksum is computed again: tens of milliseconds for a full segment.
        let built = if self.archive.settings.threads {
            let built = tokio::task::spawn_blocking(build).await;
            built.map_err(|error| ArchiveError::Local(error.to_string()))?
        } else {
            build()
        };
        let segment = built.map_err(|error| ArchiveError::Local(format!("the WAL: {error}")))?;
        let id = SegmentId { seq, epoch: self.root.epoch, number: *number, nonce: random() };
        *number += 1;
        self.archive.store.create(&self.archive.keys.segment(&id), &segment.chunks).await?;
        Ok((id, segment))
    }

    /// Writes an object again with the runs that are still wanted.
    async fn rewrite(
        &self,
        index: &mut Index,
        object: SegmentId,
        seq: u64,
        number: &mut u32,
    ) -> Result<(), ArchiveError> {
        let mut group = Vec::new();
        let key = self.archive.keys.segment(&object);
        let partitions: Vec<Partition> = index.partitions().collect();
        for partition in partitions {
            let held: Vec<HeldRun> = index.runs(partition).filter(|held| held.object == object).copied().collect();
            for HeldRun { run, .. } in held {
                let bytes = self.archive.store.get_range(&key, run.position..run.position + run.length).await?;
                group.push((partition, vec![(bytes, run.appended_ms)]));
            }
        }
        let (id, segment) = self.put_segment(group, seq, number).await?;
        let runs = segment
            .runs
            .into_iter()
            .map(|(partition, run)| ((partition, run.base), HeldRun { object: id, object_bytes: segment.bytes, run }));
        index.replace(object, &runs.collect());
        Ok(())
    }

    /// Writes the pages that changed, and the snapshot.
    async fn write_pages(&self, index: &mut Index, snapshot: Snapshot) -> Result<Pages, ArchiveError> {
        let mut objects = Vec::new();
        let mut pointer = |(bytes, crc): (Bytes, u32)| {
            let number = objects.len() as u32;
            let pointer =
                PagePointer { seq: self.root.seq + 1, number, nonce: random(), bytes: bytes.len() as u64, crc };
            objects.push((pointer, bytes));
            pointer
        };
        let pointers: Vec<PagePointer> =
            index.pages().map(|page| page.unwrap_or_else(|page| pointer(page.encode()))).collect();
        let known = self.root.snapshot.filter(|_| snapshot.next_seq == self.root.trim);
        let snapshot = known.unwrap_or_else(|| pointer(manifest::encode_snapshot(&snapshot.state)));
        for (pointer, bytes) in &objects {
            self.archive.store.create(&self.archive.keys.page(pointer), std::slice::from_ref(bytes)).await?;
        }
        index.stored(&pointers);
        Ok(Pages { pointers, snapshot: Some(snapshot), fresh: objects.into_iter().collect() })
    }

    /// Puts a root in force: in the bucket, for readers, here, and for the WAL, in this order.
    async fn publish(
        &mut self,
        root: Root,
        index: Index,
        fresh: HashMap<PagePointer, Bytes>,
    ) -> Result<(), ArchiveError> {
        let archive = self.archive;
        match archive.store.create(&archive.keys.root(root.seq), &[root.encode()]).await {
            Ok(()) => {}
            Err(StoreError::Taken(_)) => return Err(archive.taken_by().await),
            Err(error) => return Err(error.into()),
        }
        archive.cold.publish(index.clone());
        let old = std::mem::replace(&mut self.root, root);
        let old_index = std::mem::replace(&mut self.index, index);
        self.discard(&old, &old_index);
        self.waiting = None;
        self.show();
        info!(manifest = self.root.seq, trim = self.root.trim, "published");
        self.mirror_behind = true;
        archive.write_mirror(&self.root, &fresh).await?;
        self.mirrored();
        Ok(())
    }

    fn mirrored(&mut self) {
        self.mirror_behind = false;
        self.source.published(self.root.trim);
        let durable = self.source.durable();
        self.wal_floor = if durable.next_seq == self.root.trim { durable.wal_bytes } else { 0 };
    }

    fn show(&mut self) {
        let facts = &self.archive.facts;
        let usage = self.index.usage();
        facts.manifest_seq.store(self.root.seq, Ordering::Relaxed);
        facts.trim.store(self.root.trim, Ordering::Relaxed);
        facts.segments.store(usage.len() as u64, Ordering::Relaxed);
        facts.segment_bytes.store(usage.values().map(|usage| usage.bytes).sum(), Ordering::Relaxed);
    }

    /// The first block of the WAL object that holds block `seq`, or `seq` where the next object will begin.
    fn wal_object_of(&self, seq: u64) -> u64 {
        if !self.archive.ships || *self.archive.shipped.borrow() == seq {
            return seq;
        }
        self.archive.wals.lock().range(..=seq).next_back().copied().unwrap_or(self.root.wal)
    }

    /// Marks what the root in force no longer names.
    fn discard(&mut self, old: &Root, old_index: &Index) {
        let keys = &self.archive.keys;
        let mut gone = Vec::new();
        if !self.root.fences.iter().any(|fence| fence.manifest_seq == old.seq) {
            gone.push(keys.root(old.seq));
        }
        let kept = |pointer: &&PagePointer| {
            !self.root.pages.contains(pointer) && self.root.snapshot.as_ref() != Some(*pointer)
        };
        gone.extend(old.pages.iter().chain(&old.snapshot).filter(kept).map(|pointer| keys.page(pointer)));
        let usage = self.index.usage();
        gone.extend(old_index.usage().keys().filter(|id| !usage.contains_key(id)).map(|id| keys.segment(id)));
        let mut wals = self.archive.wals.lock();
        let keep = wals.split_off(&self.root.wal);
        let fenced =
            |seq: &u64| !planted(Bug::FencesCollected) && self.root.fences.iter().any(|fence| fence.wal_seq == *seq);
        gone.extend(std::mem::replace(&mut *wals, keep).iter().filter(|seq| !fenced(seq)).map(|seq| keys.wal(*seq)));
        drop(wals);
        self.bury(gone);
    }

    fn bury(&mut self, keys: Vec<Path>) {
        let due = Instant::now() + self.archive.settings.grace;
        self.garbage.extend(keys.into_iter().map(|key| (due, key)));
    }

    /// Deletes what has been unnamed for long enough.
    async fn clear(&mut self) {
        let now = Instant::now();
        let (due, later) = std::mem::take(&mut self.garbage).into_iter().partition(|(due, _)| *due <= now);
        self.garbage = later;
        let due: Vec<(Instant, Path)> = due;
        for (_, key) in due {
            if let Err(error) = self.archive.store.delete(&key).await {
                warn!(%error, "could not delete, trying again later");
                self.bury(vec![key]);
            }
        }
    }

    /// Finds what earlier owners left: written and never named, or no longer named and not yet deleted. Looks only at
    /// names below our claim, so that an owner that has deposed us unnoticed loses nothing.
    async fn sweep(&mut self) -> Result<(), ArchiveError> {
        let archive = self.archive;
        let (keys, store) = (&archive.keys, &archive.store);
        let named = self.index.usage();
        let named: BTreeSet<Path> = named.keys().map(|id| keys.segment(id)).collect();
        let pages: BTreeSet<Path> =
            self.root.pages.iter().chain(&self.root.snapshot).map(|pointer| keys.page(pointer)).collect();
        let mut gone = Vec::new();
        for object in store.list(&keys.segments()).await? {
            let older = epoch_of_segment(&object.location).is_some_and(|epoch| epoch < self.root.epoch);
            if older && !named.contains(&object.location) {
                gone.push(object.location);
            }
        }
        for object in store.list(&keys.pages()).await? {
            let older = sequence_of_page(&object.location).is_some_and(|seq| seq < self.claim_seq);
            if older && !pages.contains(&object.location) {
                gone.push(object.location);
            }
        }
        for object in store.list(&keys.roots()).await? {
            let Some(seq) = sequence_of(&object.location) else { continue };
            if seq < self.claim_seq && !self.root.fences.iter().any(|fence| fence.manifest_seq == seq) {
                gone.push(object.location);
            }
        }
        let mut wals = BTreeSet::new();
        for object in store.list(&keys.wals()).await? {
            let Some(seq) = sequence_of(&object.location) else { continue };
            if seq >= self.root.wal {
                wals.insert(seq);
            } else if planted(Bug::FencesCollected) || !self.root.fences.iter().any(|fence| fence.wal_seq == seq) {
                gone.push(object.location);
            }
        }
        archive.wals.lock().append(&mut wals);
        if !gone.is_empty() {
            info!(objects = gone.len(), "found objects that no manifest names");
        }
        self.bury(gone);
        Ok(())
    }
}
