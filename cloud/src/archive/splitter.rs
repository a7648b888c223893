//! Splitting: shipped blocks become segments, a manifest names them, and only then may the WAL go.
//!
//! One round: take a snapshot at block X; wait until everything below X is shipped; write the batches of blocks
//! `trim .. X` as runs into segment objects; drop runs that nobody may read any more; write what changed of the index,
//! the snapshot and a root; copy root and pages to the local disk; let the WAL be trimmed. What no root names any more is
//! deleted after a grace. A round that fails is begun anew; what it had written is deleted.
//!
//! Between rounds there is upkeep: objects are written again without their dead bytes, and small ones become larger
//! ones. It changes the index and not the trim, and is published in the same way.

mod compact;
mod merge;
mod sweep;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
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
use crate::manifest::{self, HeldRun, Index, PagePointer, Root, SegmentId};
use crate::planted::{Bug, planted};
use crate::segment::{Segment, SegmentError, SegmentWriter};

/// Largest segment, whatever the settings say: positions within one are kept in 32 bits, with room to spare.
const SEGMENT_BYTES_MAX: u64 = 1 << 30;
/// How often runs are looked through for what may go, at most.
const MAINTENANCE: Duration = Duration::from_secs(60);

/// A shard that split nothing for so long is looked through all the same, as often as that: its last hour and its last day
/// are merged when the count of time says that they are long over.
const IDLE: Duration = Duration::from_secs(3600);
/// How long an hour or a day has been over by the log's count of time then.
const IDLE_MS: i64 = 3_600_000;

/// How long upkeep waits while there is always more to split; then it writes one object.
const UPKEEP_PATIENCE: Duration = Duration::from_secs(10);

/// Shipping is asked to hurry when the log holds this part of what it may hold: a burst below that has the disk for itself.
const PRESSURE: u64 = 4;
/// How often a round that waits looks whether the log fills.
const PRESSURE_LOOK: Duration = Duration::from_millis(50);

#[derive(Default)]
struct Slices {
    /// The offsets that they cover, whatever batches are left in them.
    covered: Range<Offset>,
    /// Whole batches, each with its block's append time.
    parts: Vec<(Bytes, TimestampMs)>,
}

impl Slices {
    /// What covers the offsets after those that there are.
    fn push(&mut self, covered: Range<Offset>, bytes: Bytes, appended_ms: TimestampMs) {
        if self.parts.is_empty() {
            self.covered.start = covered.start;
        }
        self.covered.end = covered.end;
        self.parts.push((bytes, appended_ms));
    }

    fn bytes(&self) -> u64 {
        self.parts.iter().map(|(bytes, _)| bytes.len() as u64).sum()
    }
}

/// Splits one shard's blocks.
pub(super) struct Splitter<'a> {
    archive: &'a Archive,
    source: &'a dyn Source,
    root: Root,
    index: Index,
    /// Objects that no root names, and when they may go.
    garbage: Vec<(Instant, Path)>,
    /// Objects of our own that the last sweep found unnamed.
    suspects: BTreeSet<Path>,
    sweep_due: Instant,
    /// Since when blocks wait to be split.
    waiting: Option<Instant>,
    /// What the WAL kept when everything was split: its newest block at least.
    wal_floor: u64,
    maintained: Instant,
    split: Instant,
    /// When the newest block that is split was appended; not known before the first round.
    log_ms: Option<TimestampMs>,
    /// Partitions of deleted topics, as the snapshot in force knows them.
    condemned: BTreeSet<Partition>,
    /// Objects that cannot be read.
    shunned: BTreeSet<SegmentId>,
    settled: merge::Settled,
    /// Since when objects may be worth writing again.
    upkeep_due: Option<Instant>,
    /// When upkeep was last done.
    upkept: Instant,
    /// A root whose PUT has no known outcome: nothing else is published before that is settled.
    pending: Option<Pending>,
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

/// A publication that may or may not be in force already.
struct Pending {
    root: Root,
    index: Index,
    fresh: HashMap<PagePointer, Bytes>,
}

/// What is written for a publication under way, and named by nothing yet.
#[derive(Default)]
struct Work {
    segments: u32,
    written: Vec<Path>,
}

/// What a look at the index before a round finds to be of no use.
#[derive(Default)]
struct Unwanted {
    below_start: Vec<(Partition, HeldRun)>,
    condemned: BTreeSet<Partition>,
}

fn local(error: impl std::fmt::Display) -> ArchiveError {
    ArchiveError::Local(error.to_string())
}

impl<'a> Splitter<'a> {
    pub(super) fn new(archive: &'a Archive, source: &'a dyn Source, held: Held) -> Self {
        let now = Instant::now();
        let (claim_seq, mirror_behind) = (held.root.seq, held.mirror_behind);
        let mut splitter = Self {
            archive,
            source,
            root: held.root,
            index: held.index,
            garbage: Vec::new(),
            suspects: BTreeSet::new(),
            sweep_due: now,
            waiting: None,
            wal_floor: 0,
            maintained: now,
            split: now,
            log_ms: None,
            condemned: BTreeSet::new(),
            shunned: BTreeSet::new(),
            settled: merge::Settled::default(),
            upkeep_due: Some(now),
            upkept: now,
            pending: None,
            mirror_behind,
            claim_seq,
        };
        splitter.show();
        splitter
    }

    /// Splits until another owner is met.
    pub(super) async fn run(&mut self) -> ArchiveError {
        if !self.mirror_behind {
            self.source.published(self.root.trim);
        }
        let mut failures = 0u32;
        let mut asked = false;
        loop {
            if self.pending.is_none() && self.sweep_due <= Instant::now() {
                let pause = match self.sweep().await {
                    Ok(()) => self.archive.settings.sweep_interval,
                    Err(error) => {
                        warn!(%error, "the sweep waits");
                        MAINTENANCE
                    }
                };
                self.sweep_due = Instant::now() + pause;
            }
            asked |= self.tick(failures).await;
            self.clear().await;
            match self.work(asked).await {
                Ok(false) => {}
                Ok(true) => {
                    (failures, asked) = (0, false);
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

    /// Does what is due; `false` when nothing was.
    async fn work(&mut self, asked: bool) -> Result<bool, ArchiveError> {
        let settled = self.pending.is_some();
        self.settle().await?;
        let split = asked || self.due() || self.mirror_behind;
        if split {
            self.round(asked).await?;
        }
        if self.upkept.elapsed() >= IDLE && self.is_idle() {
            self.upkeep_due.get_or_insert_with(Instant::now);
        }
        // Upkeep waits for splitting, but not for ever.
        let patience = if split { UPKEEP_PATIENCE } else { Duration::ZERO };
        let upkeep = self.upkeep_due.is_some_and(|since| since.elapsed() >= patience);
        if upkeep {
            self.upkeep().await?;
        }
        Ok(settled || split || upkeep)
    }

    /// Whether nothing was split for long, and nothing waits to be.
    fn is_idle(&self) -> bool {
        self.split.elapsed() >= IDLE && self.source.durable().next_seq <= self.root.trim
    }

    /// Up to when the log has everything. Of a log that stands still its count of time must say it.
    fn log_ms(&self) -> Option<TimestampMs> {
        self.log_ms.max(self.is_idle().then(|| self.source.now_ms().saturating_sub(IDLE_MS)))
    }

    /// Waits for the next look; `true` when a roll was asked for.
    async fn tick(&self, failures: u32) -> bool {
        let tick = (self.archive.settings.segment_age / 10).clamp(Duration::from_millis(5), Duration::from_secs(1));
        if failures > 0 {
            tokio::time::sleep(backoff(tick, failures)).await;
            return false;
        }
        // Under load the next round follows at once: what it waits for is room that producers may wait for.
        if self.has_enough() {
            return false;
        }
        tokio::time::timeout(tick, self.archive.roll.notified()).await.is_ok()
    }

    /// Whether what waits to be split is worth a round.
    fn has_enough(&self) -> bool {
        let durable = self.source.durable();
        let enough = self.archive.settings.segment_bytes.min(durable.wal_bytes_max / 2);
        durable.next_seq > self.root.trim && durable.wal_bytes.saturating_sub(self.wal_floor) >= enough
    }

    fn due(&mut self) -> bool {
        let settings = &self.archive.settings;
        let durable = self.source.durable();
        if durable.next_seq <= self.root.trim {
            self.waiting = None;
        } else {
            let since = *self.waiting.get_or_insert_with(Instant::now);
            if self.has_enough() || since.elapsed() >= settings.segment_age {
                return true;
            }
        }
        if self.maintained.elapsed() < settings.segment_age.min(MAINTENANCE) {
            return false;
        }
        // A deleted topic's bytes go soon. What retention gave up goes with the next blocks, or when none come.
        let idle = self.split.elapsed() >= settings.segment_age;
        let found = self.index.partitions().any(|partition| match self.source.retained(partition) {
            None => !self.condemned.contains(&partition),
            Some(kept) => idle && self.index.first(partition).is_some_and(|held| held.run.next <= kept.log_start),
        });
        // What is found stays due until a round has seen to it.
        if !found {
            self.maintained = Instant::now();
        }
        found
    }

    async fn round(&mut self, asked: bool) -> Result<(), ArchiveError> {
        let mut work = Work::default();
        let done = self.round_with(&mut work, asked).await;
        if done.is_err() {
            self.bury(work.written);
        }
        done
    }

    async fn round_with(&mut self, work: &mut Work, asked: bool) -> Result<(), ArchiveError> {
        if self.mirror_behind {
            self.archive.write_mirror(&self.root, &HashMap::new()).await?;
            self.mirrored();
        }
        // What may go is decided before the snapshot is taken, so that a restore from it knows as much.
        let unwanted = self.unwanted();
        let snapshot = self.source.snapshot().await?;
        if snapshot.next_seq != self.root.trim || !unwanted.below_start.is_empty() {
            self.wait_shipped(snapshot.next_seq, asked).await;
            let mut index = self.index.clone();
            index.replace(&unwanted.below_start, Vec::new()).map_err(local)?;
            let trim = snapshot.next_seq;
            let end = self.split(&mut index, trim, work).await?;
            let pages = self.write_pages(&mut index, Some(snapshot), work).await?;
            let root = self.next_root(trim, end.map(|(crc, _)| crc).or(self.root.trim_crc), &pages);
            self.publish(root, index, pages.fresh, work).await?;
            // A fence tells no time.
            self.log_ms = self.log_ms.max(end.map(|(_, appended_ms)| appended_ms).filter(|ms| *ms > 0));
        }
        self.split = Instant::now();
        self.maintained = self.split;
        self.condemned = unwanted.condemned;
        self.upkeep_due.get_or_insert(self.split);
        Ok(())
    }

    fn next_root(&self, trim: u64, trim_crc: Option<u32>, pages: &Pages) -> Root {
        Root {
            seq: self.root.seq + 1,
            nonce: random(),
            trim,
            wal: self.wal_object_of(trim),
            trim_crc,
            snapshot: pages.snapshot,
            pages: pages.pointers.clone(),
            ..self.root.clone()
        }
    }

    /// Waits until everything below `seq` is shipped, and hurries it when the round was asked for or the log fills.
    async fn wait_shipped(&self, seq: u64, asked: bool) {
        let mut shipped = self.archive.shipped.subscribe();
        loop {
            let durable = self.source.durable();
            if asked || durable.wal_bytes >= durable.wal_bytes_max / PRESSURE {
                self.archive.wanted.send_replace(seq);
            }
            // The sender lives as long as the archive, so the wait fails only by its time.
            if tokio::time::timeout(PRESSURE_LOOK, shipped.wait_for(|shipped| *shipped >= seq)).await.is_ok() {
                return;
            }
        }
    }

    /// Runs below log starts, and partitions of deleted topics. The runs of those stay named until their objects are
    /// written again without them: so they are not forgotten, whatever happens before.
    fn unwanted(&self) -> Unwanted {
        let mut unwanted = Unwanted::default();
        for partition in self.index.partitions() {
            let Some(retained) = self.source.retained(partition) else {
                unwanted.condemned.insert(partition);
                continue;
            };
            let below = self.index.runs(partition).take_while(|held| held.run.next <= retained.log_start);
            unwanted.below_start.extend(below.map(|held| (partition, held)));
        }
        unwanted
    }

    fn segment_bytes(&self) -> u64 {
        self.archive.settings.segment_bytes.clamp(1, SEGMENT_BYTES_MAX)
    }

    /// Writes the batches of blocks below `end` into segments. Returns the last block's checksum and append time.
    async fn split(
        &self,
        index: &mut Index,
        end: u64,
        work: &mut Work,
    ) -> Result<Option<(u32, TimestampMs)>, ArchiveError> {
        let mut last = None;
        let mut from = self.root.trim;
        while from < end {
            let mut blocks = self.source.blocks(from, self.segment_bytes() as usize).await?;
            blocks.retain(|block| block.seq < end);
            let mut parts: BTreeMap<Partition, Slices> = BTreeMap::new();
            for stored in blocks {
                let damaged =
                    |error: &dyn std::fmt::Display| ArchiveError::Local(format!("WAL block {}: {error}", stored.seq));
                if stored.seq != from {
                    return Err(damaged(&format_args!("block {from} was expected")));
                }
                let block = Block::parse(stored.bytes.clone()).map_err(|error| damaged(&error))?;
                last = Some((crc32c::crc32c(&stored.bytes), block.header().append_ms));
                for entry in block.entries() {
                    let covered = entry.base..entry.last.saturating_add(1);
                    parts.entry(entry.partition).or_default().push(
                        covered,
                        block.data(entry),
                        block.header().append_ms,
                    );
                }
                from += 1;
            }
            for group in self.group(parts) {
                self.write_segment(index, group, end, work).await?;
            }
        }
        Ok(last)
    }

    /// What goes into one object each: a busy partition alone, quiet ones that live equally long together.
    fn group(&self, parts: BTreeMap<Partition, Slices>) -> Vec<Vec<(Partition, Slices)>> {
        let segment_bytes = self.segment_bytes();
        let mut groups = Vec::new();
        let mut shared: BTreeMap<i64, (u64, Vec<(Partition, Slices)>)> = BTreeMap::new();
        for (partition, slices) in parts {
            // Deleted since: its bytes need not be written to be dropped.
            let Some(retained) = self.source.retained(partition) else { continue };
            let bytes = slices.bytes();
            if bytes >= segment_bytes / 2 {
                groups.push(vec![(partition, slices)]);
                continue;
            }
            let (held, group) = shared.entry(merge::class(retained.retention_ms)).or_default();
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
        work: &mut Work,
    ) -> Result<(), ArchiveError> {
        let (id, segment) = self.put_segment(group, seq, work).await?;
        let mut new = Vec::with_capacity(segment.runs.len());
        for (partition, run) in segment.runs {
            if index.next(partition).is_some_and(|next| run.base < next) {
                return Err(local(format_args!("{partition}: offset {} is archived already", run.base)));
            }
            new.push((partition, HeldRun { object: id, object_bytes: segment.bytes, run }));
        }
        index.extend(new).map_err(local)
    }

    async fn put_segment(
        &self,
        group: Vec<(Partition, Slices)>,
        seq: u64,
        work: &mut Work,
    ) -> Result<(SegmentId, Segment), ArchiveError> {
        let build = move || {
            let mut writer = SegmentWriter::default();
            group
                .into_iter()
                .try_for_each(|(partition, slices)| writer.run(partition, slices.covered, slices.parts))?;
            Ok::<_, SegmentError>(writer.finish())
        };
        // Every batch's checksum is computed again: tens of milliseconds for a full segment.
        let built = if self.archive.settings.threads {
            tokio::task::spawn_blocking(build).await.map_err(local)?
        } else {
            build()
        };
        let segment = built.map_err(|error| local(format_args!("the WAL: {error}")))?;
        let id = SegmentId { seq, epoch: self.root.epoch, number: work.segments, nonce: random() };
        work.segments += 1;
        let key = self.archive.keys.segment(&id);
        work.written.push(key.clone());
        self.archive.store.create(&key, &segment.chunks).await?;
        Ok((id, segment))
    }

    /// Writes the pages that changed, and the snapshot unless it is the one in force.
    async fn write_pages(
        &self,
        index: &mut Index,
        snapshot: Option<Snapshot>,
        work: &mut Work,
    ) -> Result<Pages, ArchiveError> {
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
        let fresh = snapshot.filter(|snapshot| self.root.snapshot.is_none() || snapshot.next_seq != self.root.trim);
        let fresh = fresh.map(|snapshot| pointer(manifest::encode_snapshot(&snapshot.state)));
        for (pointer, bytes) in &objects {
            let key = self.archive.keys.page(pointer);
            work.written.push(key.clone());
            self.archive.store.create(&key, std::slice::from_ref(bytes)).await?;
        }
        index.stored(&pointers);
        Ok(Pages { pointers, snapshot: fresh.or(self.root.snapshot), fresh: objects.into_iter().collect() })
    }

    /// Puts a root in force: in the bucket, for readers, here, and for the WAL, in this order.
    async fn publish(
        &mut self,
        root: Root,
        index: Index,
        fresh: HashMap<PagePointer, Bytes>,
        work: &mut Work,
    ) -> Result<(), ArchiveError> {
        // From here on the root may be in force, whatever is heard of its PUT: what it names is not ours to delete.
        work.written.clear();
        if planted(Bug::TrimmedEarly) {
            self.source.published(root.trim);
        }
        self.pending = Some(Pending { root, index, fresh });
        self.settle().await
    }

    /// Finds out what became of a root: its PUT is repeated with the same bytes until there is an answer.
    async fn settle(&mut self) -> Result<(), ArchiveError> {
        let Some(Pending { root, .. }) = &self.pending else { return Ok(()) };
        let archive = self.archive;
        match archive.store.create(&archive.keys.root(root.seq), &[root.encode()]).await {
            Ok(()) => {}
            Err(StoreError::Taken(_)) => return Err(archive.taken_by().await),
            Err(error) => return Err(error.into()),
        }
        let Some(Pending { root, index, fresh }) = self.pending.take() else { return Ok(()) };
        archive.cold.publish(index.clone());
        let old = std::mem::replace(&mut self.root, root);
        let old_index = std::mem::replace(&mut self.index, index);
        self.discard(&old, &old_index);
        if old.trim != self.root.trim {
            self.waiting = None;
            self.wal_floor = 0;
        }
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
        if durable.next_seq == self.root.trim {
            self.wal_floor = durable.wal_bytes;
        }
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
        let dead: BTreeSet<&SegmentId> = old_index.usage().keys().filter(|id| !usage.contains_key(id)).collect();
        gone.extend(dead.into_iter().map(|id| keys.segment(id)));
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
}
