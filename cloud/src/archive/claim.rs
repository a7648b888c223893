//! Claims and restores: whose the shard is in the bucket, and what a start begins with.
//!
//! A claim is a root with a greater epoch, made by `PutMode::Create` at the next number, that says where the shipped WAL
//! ended. From then on a deposed owner can neither publish (its next root's name is taken) nor ship (the next WAL name
//! is taken by the claimant's first object). Neither of the two objects is ever deleted, so a deposed owner collides
//! however late it wakes up. The claiming root comes first and the WAL object second: what the second must protect is
//! then always on record.

use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use tracing::{info, warn};

use super::archiver::Held;
use super::load::{Loaded, READS_MAX};
use super::presence::BEAT;
use super::store::{backoff, random};
use super::{Archive, ArchiveError, LocalBlocks, Recovered, Snapshot, StoreError, StoredBlock, Tail};
use crate::block::{Block, BlockBuilder, BlockHeader};
use crate::manifest::{Fence, Index, OBJECT_BYTES_MAX, Root, sequence_of};
use crate::planted::{Bug, planted};

/// How often a start tries again when another owner was quicker.
const CLAIM_ATTEMPTS: usize = 16;

/// How long a start waits at first before it tries again.
const CLAIM_PAUSE: Duration = Duration::from_millis(20);

/// What a taken shard begins from: snapshot, the blocks after it, and the epoch.
type Taken = (Option<Snapshot>, Vec<StoredBlock>, u32);

/// What the bucket says of the shard.
#[derive(Debug, Clone)]
pub(super) struct View {
    /// The root in force.
    pub root: Root,
    /// First blocks of the shipped WAL objects from the root's on, ascending.
    pub wals: Vec<u64>,
    /// The newest shipped WAL object's blocks.
    pub last: Vec<StoredBlock>,
    /// Where the shipped WAL ends.
    pub next: u64,
}

/// How local blocks and bucket relate, provided that `check` is the same block in both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Judgement {
    /// The local WAL goes on where the bucket ends.
    Continue {
        /// The block to compare.
        check: u64,
    },
    /// The bucket has more than the local WAL, if there is one.
    Restore {
        /// The block to compare.
        check: Option<u64>,
    },
}

/// Decides between going on and restoring from the numbers alone.
pub(super) fn judge(bucket_next: u64, local: Option<(u64, u64)>) -> Judgement {
    match local {
        None => Judgement::Restore { check: None },
        Some((_, next)) if next < bucket_next && !planted(Bug::OlderDiskGoesOn) => {
            Judgement::Restore { check: next.checked_sub(1) }
        }
        Some(_) => Judgement::Continue { check: bucket_next.saturating_sub(1) },
    }
}

/// Why a claim came to nothing. Another may succeed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lost {
    /// Another node claimed at the same time.
    Rival,
    /// Whoever has the shard appended, shipped or published meanwhile.
    Outpaced,
    /// The same, and after this node's claim: that owner learns of the claim at its next beat, and then stops.
    OutpacedAfterClaim,
}

impl Lost {
    /// The error when that happened each time.
    fn after(self, attempts: usize) -> ArchiveError {
        match self {
            Self::Rival => ArchiveError::Contended,
            Self::Outpaced | Self::OutpacedAfterClaim => ArchiveError::Outpaced { attempts },
        }
    }
}

impl View {
    /// Of a shard that is not there yet.
    fn of_nothing(root: Root) -> Self {
        Self { next: root.trim, root, wals: Vec::new(), last: Vec::new() }
    }

    /// Whether block `seq`, locally `bytes`, is the one the bucket has; `None` if the bucket no longer says.
    fn agrees(&self, chain: &[StoredBlock], seq: u64, bytes: &Bytes) -> Option<bool> {
        if let Some(block) = chain.iter().chain(&self.last).find(|block| block.seq == seq) {
            return Some(block.bytes == *bytes);
        }
        let crc = self.root.trim_crc.filter(|_| seq.checked_add(1) == Some(self.root.trim));
        crc.map(|crc| crc == crc32c::crc32c(bytes))
    }
}

impl Archive {
    /// Finds what the shard starts from, and claims the shard in the bucket if that can be reached. Without it, the
    /// start is from the local WAL and the local copy of the manifest, and [`Archive::run`] claims later.
    pub async fn recover(&self, local: &dyn LocalBlocks) -> Result<Recovered, ArchiveError> {
        let mirror = self.mirror_root().await;
        let (mut loaded, mut rivals, mut attempt) = (Loaded::default(), 0, 0u32);
        loop {
            let lost = match self.recover_once(local, mirror.as_ref().ok().and_then(Option::as_ref), &mut loaded).await
            {
                Ok(Ok(recovered)) => return Ok(recovered),
                Ok(Err(lost)) => lost,
                Err(ArchiveError::Store(error @ StoreError::Failed { .. })) if self.mirror.is_some() => {
                    warn!(%error, "the archive cannot be reached: starting from local files, nothing is shipped yet");
                    return self.recover_locally(local, mirror?, &error).await;
                }
                Err(error) => return Err(error),
            };
            self.claim_lost();
            info!(
                shard = self.settings.shard,
                ?lost,
                attempt,
                "another owner was quicker in the bucket, looking again"
            );
            rivals += usize::from(lost == Lost::Rival);
            if rivals >= CLAIM_ATTEMPTS {
                return Err(lost.after(rivals));
            }
            attempt = attempt.saturating_add(1);
            let pause = match lost {
                Lost::OutpacedAfterClaim => BEAT + BEAT / 3,
                Lost::Rival | Lost::Outpaced => backoff(CLAIM_PAUSE, attempt),
            };
            tokio::time::sleep(pause).await;
        }
    }

    async fn recover_once(
        &self,
        local: &dyn LocalBlocks,
        mirror: Option<&Root>,
        loaded: &mut Loaded,
    ) -> Result<Result<Recovered, Lost>, ArchiveError> {
        let newest_local = newest_epoch(local)?.max(mirror.map(|root| root.epoch));
        let Some(view) = self.view().await? else {
            if mirror.is_some_and(|root| root.seq > 0) {
                return Err(ArchiveError::Emptied(self.store.describe()));
            }
            let epoch = newest_local.unwrap_or(0) + 1;
            self.hold(None, epoch);
            return Ok(Ok(Recovered { snapshot: None, tail: Tail::Local, epoch }));
        };
        if view.root.cluster_id != self.cluster_id || view.root.shard != self.settings.shard {
            return Err(self.mismatch(view.root.cluster_id));
        }
        let epoch = view.root.epoch.max(newest_local.unwrap_or(0)) + 1;
        match judge(view.next, local.bounds()) {
            Judgement::Continue { check } => {
                self.check_continues(&view, local, check, mirror)?;
                self.resume(&view, loaded, epoch).await
            }
            Judgement::Restore { check } => self.restore(&view, loaded, local, check, epoch).await,
        }
    }

    /// Refuses a local WAL that is not the one the bucket's blocks came from.
    fn check_continues(
        &self,
        view: &View,
        local: &dyn LocalBlocks,
        check: u64,
        mirror: Option<&Root>,
    ) -> Result<(), ArchiveError> {
        let (first, next) = local.bounds().unwrap_or_default();
        if first > view.root.trim {
            return Err(ArchiveError::Hole { first, needed: view.root.trim });
        }
        let known = if (first..next).contains(&check) {
            view.agrees(&[], check, &local.read(check).map_err(|error| ArchiveError::Local(error.to_string()))?)
        } else {
            None
        };
        // The local copy of the manifest may lack the bucket's newest claim, if a start was cut short.
        let same = |root: &Root| root.snapshot.is_some() && root.snapshot == view.root.snapshot;
        let same_root = !self.ships || mirror.is_some_and(same);
        // Nothing was published yet but the claim itself: there is nothing to disagree about.
        let nothing = view.root.snapshot.is_none() && view.last.is_empty();
        match known {
            Some(true) => Ok(()),
            None if same_root || nothing => Ok(()),
            _ => Err(self.diverged(check)),
        }
    }

    fn diverged(&self, seq: u64) -> ArchiveError {
        ArchiveError::Diverged { seq, archive: self.store.describe() }
    }

    /// The local WAL goes on: claim, and begin from the bucket's snapshot and local blocks.
    async fn resume(
        &self,
        view: &View,
        loaded: &mut Loaded,
        epoch: u32,
    ) -> Result<Result<Recovered, Lost>, ArchiveError> {
        if !self.load_state(&view.root, loaded).await? {
            return Ok(Err(Lost::Outpaced));
        }
        let (index, snapshot) = (loaded.index(), loaded.snapshot());
        let Some(root) = self.claim_from(&view.root, epoch, view.next).await? else { return Ok(Err(Lost::Rival)) };
        let held = self.claimed_with(root, index, view.next).await;
        self.hold(Some(held), epoch);
        Ok(Ok(Recovered { snapshot, tail: Tail::Local, epoch }))
    }

    /// The bucket has more than is here: claim, fence the WAL, and begin from what the bucket has.
    async fn restore(
        &self,
        view: &View,
        loaded: &mut Loaded,
        local: &dyn LocalBlocks,
        check: Option<u64>,
        epoch: u32,
    ) -> Result<Result<Recovered, Lost>, ArchiveError> {
        if !self.load(view, loaded).await? {
            return Ok(Err(Lost::Outpaced));
        }
        if let Some(seq) = check {
            let bytes = local.read(seq).map_err(|error| ArchiveError::Local(error.to_string()))?;
            match view.agrees(loaded.blocks(), seq, &bytes) {
                Some(true) => {}
                Some(false) => return Err(self.diverged(seq)),
                None => {
                    let known = self.mirror_root().await?;
                    let parting = self.parting(view, loaded.blocks(), known.as_ref(), local).await?;
                    if parting.certain <= seq {
                        return Err(self.diverged(parting.certain));
                    }
                    warn!(seq, "the local WAL is too old to be compared with the archive; it is set aside");
                }
            }
        }
        let taken = self.take(view, loaded, epoch).await?;
        Ok(taken.map(|(snapshot, blocks, epoch)| {
            info!(epoch, blocks = blocks.len(), "restored from the archive");
            Recovered { snapshot, tail: Tail::Bucket(blocks), epoch }
        }))
    }

    /// Takes the shard over whose WAL is in the store, from whoever had it: from here on an append of theirs fails. A
    /// shard that is not there yet begins.
    ///
    /// All is read before the claim: what cannot be read must not cost the owner the shard. The owner may go on appending
    /// meanwhile, so the bulk is read first and then what came since, and all of it is kept when the owner was quicker. It
    /// looks for claims now and then: at the latest then it stops.
    pub async fn take_over(&self) -> Result<Recovered, ArchiveError> {
        let shard = self.settings.shard;
        let (mut loaded, mut rivals, mut attempt) = (Loaded::default(), 0, 0u32);
        loop {
            let view = self.view().await?.unwrap_or_else(|| View::of_nothing(self.first_root(0)));
            if view.root.cluster_id != self.cluster_id || view.root.shard != shard {
                return Err(self.mismatch(view.root.cluster_id));
            }
            let lost = match self.take_from(view, &mut loaded).await? {
                Ok((snapshot, blocks, epoch)) => {
                    info!(shard, epoch, blocks = blocks.len(), "took the shard over");
                    return Ok(Recovered { snapshot, tail: Tail::Owned(blocks), epoch });
                }
                Err(lost) => lost,
            };
            self.claim_lost();
            info!(
                shard,
                ?lost,
                attempt,
                read_to = loaded.next(),
                "another owner was quicker in the bucket, looking again"
            );
            rivals += usize::from(lost == Lost::Rival);
            if rivals >= CLAIM_ATTEMPTS {
                return Err(lost.after(rivals));
            }
            attempt = attempt.saturating_add(1);
            tokio::time::sleep(backoff(CLAIM_PAUSE, attempt)).await;
        }
    }

    /// One attempt at a take-over.
    async fn take_from(&self, mut view: View, loaded: &mut Loaded) -> Result<Result<Taken, Lost>, ArchiveError> {
        loop {
            let missing = loaded.behind(&view);
            if !self.load(&view, loaded).await? {
                return Ok(Err(Lost::Outpaced));
            }
            // Few enough to be read at once: the view is still fresh.
            if missing <= READS_MAX {
                break;
            }
            let root = view.root.seq;
            match self.view().await? {
                Some(newer) if newer.root.seq == root => view = newer,
                _ => return Ok(Err(Lost::Outpaced)),
            }
        }
        let epoch = view.root.epoch + 1;
        self.take(&view, loaded, epoch).await
    }

    /// Claims the shard and fences its WAL, once all that `view` shows is loaded. Returns what to begin from and the epoch.
    async fn take(&self, view: &View, loaded: &mut Loaded, epoch: u32) -> Result<Result<Taken, Lost>, ArchiveError> {
        let newest = newest_in(&view.last)?.unwrap_or(0);
        let epoch = epoch.max(newest + 1);
        // The heartbeat waits for the fence: the old owner ships as long as that is not there.
        let Some(root) = self.claim_quietly(&view.root, epoch, view.next).await? else { return Ok(Err(Lost::Rival)) };
        let fence = (self.ships && !planted(Bug::NoFence)).then(|| fence_block(self.settings.shard, epoch, view.next));
        if let Some(fence) = &fence {
            match self.store.create(&self.keys.wal(view.next), std::slice::from_ref(fence)).await {
                // The old owner appended or shipped once more before it noticed; its blocks count.
                Err(StoreError::Taken(_)) => return Ok(Err(Lost::OutpacedAfterClaim)),
                created => created?,
            }
        }
        if fence.is_some() && !self.is_newest(root.seq).await? {
            return Ok(Err(Lost::Rival));
        }
        self.announce_claim().await;
        let (index, snapshot, mut blocks) = (loaded.index(), loaded.snapshot(), loaded.take_blocks());
        let mut next = view.next;
        if let Some(bytes) = fence {
            blocks.push(StoredBlock { seq: next, bytes });
            next += 1;
        }
        blocks.retain(|block| block.seq >= root.trim);
        if self.settings.owns_wal {
            self.wals.lock().extend(blocks.iter().map(|block| block.seq));
        }
        let held = self.claimed_with(root, index, next).await;
        self.hold(Some(held), epoch);
        Ok(Ok((snapshot, blocks, epoch)))
    }

    /// The bucket is away: what is here must do.
    async fn recover_locally(
        &self,
        local: &dyn LocalBlocks,
        mirror: Option<Root>,
        error: &StoreError,
    ) -> Result<Recovered, ArchiveError> {
        let Some((first, next)) = local.bounds() else {
            return Err(self.settings.unreachable(&self.store, error));
        };
        let epoch = newest_epoch(local)?.max(mirror.as_ref().map(|root| root.epoch)).unwrap_or(0) + 1;
        let Some(root) = mirror else {
            self.hold(None, epoch);
            return Ok(Recovered { snapshot: None, tail: Tail::Local, epoch });
        };
        if root.trim < first || root.trim > next {
            return Err(ArchiveError::Hole { first, needed: root.trim });
        }
        let (index, snapshot) = (self.load_index(&root).await?, self.load_snapshot(&root).await?);
        self.hold(Some(Held { root, index, claimed: false, shipped: 0, mirror_behind: false }), epoch);
        Ok(Recovered { snapshot, tail: Tail::Local, epoch })
    }

    /// Claims for a shard that runs already. `local` is what its WAL holds. `Ok(None)` when another owner was quicker.
    pub(super) async fn claim_running(
        &self,
        local: &dyn LocalBlocks,
        view: Option<View>,
        epoch: u32,
    ) -> Result<Option<Held>, ArchiveError> {
        let (first, _) = local.bounds().unwrap_or_default();
        let Some(view) = view else {
            if self.held_root().is_some_and(|root| root.seq > 0) {
                return Err(ArchiveError::Emptied(self.store.describe()));
            }
            return self.claim_first(first, epoch).await;
        };
        if view.root.cluster_id != self.cluster_id {
            return Err(self.mismatch(view.root.cluster_id));
        }
        // A claim of ours counts as long as nothing was shipped since: what is shipped next is what it fences with.
        let ours = self.attempted.lock().contains(&view.root.nonce)
            && view.root.fences.last().is_some_and(|fence| fence.wal_seq == view.next);
        if let Some(presence) = self.settings.presence.as_ref().filter(|_| !ours) {
            // Whose the shard is says more than that another history went on.
            presence.admit().await?;
        }
        let known = self.held_root();
        let continues = match judge(view.next, local.bounds()) {
            Judgement::Continue { check } => self.check_continues(&view, local, check, known.as_ref()),
            Judgement::Restore { check } => Err(self.diverged(check.unwrap_or(first))),
        };
        continues?;
        if ours {
            let index = self.load_index(&view.root).await?;
            return Ok(Some(self.claimed_with(view.root, index, view.next).await));
        }
        let epoch = epoch.max(view.root.epoch + 1);
        let index = self.load_index(&view.root).await?;
        let Some(root) = self.claim_from(&view.root, epoch, view.next).await? else { return Ok(None) };
        Ok(Some(self.claimed_with(root, index, view.next).await))
    }

    /// The first claim of a shard that the bucket does not know: its WAL begins with block `first`.
    async fn claim_first(&self, first: u64, epoch: u32) -> Result<Option<Held>, ArchiveError> {
        let root = self.first_root(first);
        let Some(root) = self.claim_from(&root, epoch, first).await? else { return Ok(None) };
        Ok(Some(self.claimed_with(root, Index::default(), first).await))
    }

    /// What is held once the bucket has acknowledged a claim. A local disk that is full does not undo the claim, and shipping
    /// is what may empty that disk: so only trimming waits for the local copy of the manifest, which the splitter writes.
    async fn claimed_with(&self, root: Root, index: Index, shipped: u64) -> Held {
        let mirrored = self.write_mirror(&root, &HashMap::new()).await;
        if let Err(error) = &mirrored {
            warn!(%error, "the manifest could not be copied to the local disk: the WAL is shipped, and not trimmed until it is");
            self.failed(error);
        }
        Held { root, index, claimed: true, shipped, mirror_behind: mirrored.is_err() }
    }

    /// What a shard that the bucket does not know is claimed after. It is not in the bucket.
    fn first_root(&self, first: u64) -> Root {
        Root {
            cluster_id: self.cluster_id.clone(),
            shard: self.settings.shard,
            epoch: 0,
            seq: 0,
            nonce: 0,
            trim: first,
            wal: first,
            trim_crc: None,
            snapshot: None,
            pages: Vec::new(),
            fences: Vec::new(),
        }
    }

    /// Whoever was quicker lives, or did a moment ago.
    fn claim_lost(&self) {
        if let Some(presence) = &self.settings.presence {
            presence.claim_lost(self.settings.shard);
        }
    }

    /// Says in the heartbeat that the shard is this node's.
    async fn announce_claim(&self) {
        if let Some(presence) = &self.settings.presence {
            presence.after_claim(self.settings.shard).await;
        }
    }

    /// Claims the shard after `old` and says so, once nobody else is known to own it. `None` when another owner was quicker.
    async fn claim_from(&self, old: &Root, epoch: u32, wal_next: u64) -> Result<Option<Root>, ArchiveError> {
        let claimed = self.claim_quietly(old, epoch, wal_next).await?;
        if claimed.is_some() {
            self.announce_claim().await;
        }
        Ok(claimed)
    }

    /// Makes the root that claims the shard.
    async fn claim_quietly(&self, old: &Root, epoch: u32, wal_next: u64) -> Result<Option<Root>, ArchiveError> {
        if let Some(presence) = &self.settings.presence {
            presence.before_claim(self.settings.shard, epoch).await?;
        }
        let mut root = Root { epoch, seq: old.seq + 1, nonce: random(), ..old.clone() };
        root.fences.push(Fence { epoch, manifest_seq: root.seq, wal_seq: wal_next });
        self.attempted.lock().push(root.nonce);
        let begun = self.confirmation.now();
        match self.store.create(&self.keys.root(root.seq), &[root.encode()]).await {
            Ok(()) => {}
            Err(StoreError::Taken(_)) => {
                self.claim_lost();
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        }
        // The name was free because its root had been cleared away: then there are newer ones, and this claim is void.
        let is_newest = self.is_newest(root.seq).await?;
        match is_newest {
            true => self.confirmation.confirm(begun),
            false => self.claim_lost(),
        }
        Ok(is_newest.then_some(root))
    }

    pub(super) async fn is_newest(&self, seq: u64) -> Result<bool, ArchiveError> {
        Ok(self.newest_seq().await? == Some(seq))
    }

    async fn newest_seq(&self) -> Result<Option<u64>, ArchiveError> {
        let roots = self.store.list(&self.keys.roots()).await?;
        Ok(roots.iter().filter_map(|object| sequence_of(&object.location)).max())
    }

    /// The root in force and where the shipped WAL ends; `None` for a shard the bucket does not know.
    pub(super) async fn view(&self) -> Result<Option<View>, ArchiveError> {
        for _ in 0..CLAIM_ATTEMPTS {
            let Some(seq) = self.newest_seq().await? else { return Ok(None) };
            match self.read_view(seq).await {
                // A root that is cleared away, or whose blocks are, while it is read: there is a newer one.
                Err(ArchiveError::Store(StoreError::Missing(_)) | ArchiveError::Damaged { .. })
                    if !self.is_newest(seq).await? => {}
                view => return view.map(Some),
            }
        }
        Err(Lost::Outpaced.after(CLAIM_ATTEMPTS))
    }

    async fn read_view(&self, seq: u64) -> Result<View, ArchiveError> {
        let key = self.keys.root(seq);
        let bytes = self.store.get(&key, OBJECT_BYTES_MAX).await?;
        let damaged = |reason: String| ArchiveError::Damaged { key: key.to_string(), reason };
        let root = Root::decode(&bytes).map_err(|error| damaged(error.to_string()))?;
        if root.seq != seq || root.wal > root.trim {
            return Err(damaged("it contradicts its own name".into()));
        }
        if !self.ships {
            return Ok(View::of_nothing(root));
        }
        let objects = self.store.list(&self.keys.wals()).await?;
        let firsts = objects.iter().filter_map(|object| sequence_of(&object.location));
        let mut wals: Vec<u64> = firsts.filter(|first| *first >= root.wal).collect();
        wals.sort_unstable();
        let last = match wals.last() {
            Some(first) => self.wal_object(*first).await?,
            None => Vec::new(),
        };
        let next = last.last().map_or(root.trim, |block| block.seq + 1);
        if next < root.trim {
            return Err(damaged(format!("it begins at block {}, the shipped WAL ends at {next}", root.trim)));
        }
        Ok(View { root, wals, last, next })
    }
}

/// The epoch of the newest local block.
fn newest_epoch(local: &dyn LocalBlocks) -> Result<Option<u32>, ArchiveError> {
    let Some(newest) = local.bounds().and_then(|(_, next)| next.checked_sub(1)) else { return Ok(None) };
    let bytes = local.read(newest).map_err(|error| ArchiveError::Local(error.to_string()))?;
    newest_in(&[StoredBlock { seq: newest, bytes }])
}

fn newest_in(blocks: &[StoredBlock]) -> Result<Option<u32>, ArchiveError> {
    let Some(newest) = blocks.last() else { return Ok(None) };
    let block = Block::parse(newest.bytes.clone())
        .map_err(|error| ArchiveError::Local(format!("block {}: {error}", newest.seq)))?;
    Ok(Some(block.header().epoch))
}

/// A block that says nothing but whose the shard is now: not even when, for no shard counts time here.
fn fence_block(shard: u32, epoch: u32, seq: u64) -> Bytes {
    let header = BlockHeader { shard, epoch, nonce: random(), seq, append_ms: 0 };
    BlockBuilder::default().finish(header).bytes().clone()
}
