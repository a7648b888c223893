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
use super::store::{backoff, random};
use super::{Archive, ArchiveError, LocalBlocks, Recovered, Snapshot, StoreError, StoredBlock, Tail};
use crate::block::{Block, BlockBuilder, BlockHeader};
use crate::manifest::{self, Fence, Index, IndexPage, OBJECT_BYTES_MAX, PagePointer, Root, sequence_of};
use crate::planted::{Bug, planted};

/// How often a start tries again when another owner was quicker.
const CLAIM_ATTEMPTS: usize = 16;

/// What the bucket says of the shard.
#[derive(Debug, Clone)]
pub(super) struct View {
    /// The root in force.
    pub root: Root,
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

/// What a bucket has of a shard.
struct Loaded {
    index: Index,
    snapshot: Option<Snapshot>,
    /// Blocks from the root's WAL object on.
    blocks: Vec<StoredBlock>,
}

impl View {
    /// Of a shard that is not there yet.
    fn of_nothing(root: Root) -> Self {
        Self { next: root.trim, root, last: Vec::new() }
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
        for _ in 0..CLAIM_ATTEMPTS {
            match self.recover_once(local, mirror.as_ref().ok().and_then(Option::as_ref)).await {
                Ok(Some(recovered)) => return Ok(recovered),
                Ok(None) => info!("another owner was quicker in the bucket, looking again"),
                Err(ArchiveError::Store(error @ StoreError::Failed { .. })) if self.mirror.is_some() => {
                    warn!(%error, "the archive cannot be reached: starting from local files, nothing is shipped yet");
                    return self.recover_locally(local, mirror?, &error).await;
                }
                Err(error) => return Err(error),
            }
        }
        Err(ArchiveError::Contended)
    }

    async fn recover_once(
        &self,
        local: &dyn LocalBlocks,
        mirror: Option<&Root>,
    ) -> Result<Option<Recovered>, ArchiveError> {
        let newest_local = newest_epoch(local)?.max(mirror.map(|root| root.epoch));
        let Some(view) = self.view().await? else {
            if mirror.is_some_and(|root| root.seq > 0) {
                return Err(ArchiveError::Emptied(self.store.describe()));
            }
            let epoch = newest_local.unwrap_or(0) + 1;
            self.hold(None, epoch);
            return Ok(Some(Recovered { snapshot: None, tail: Tail::Local, epoch }));
        };
        if view.root.cluster_id != self.cluster_id || view.root.shard != self.settings.shard {
            return Err(self.mismatch(view.root.cluster_id));
        }
        let epoch = view.root.epoch.max(newest_local.unwrap_or(0)) + 1;
        match judge(view.next, local.bounds()) {
            Judgement::Continue { check } => {
                self.check_continues(&view, local, check, mirror)?;
                self.resume(&view, epoch).await
            }
            Judgement::Restore { check } => self.restore(&view, local, check, epoch).await,
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
    async fn resume(&self, view: &View, epoch: u32) -> Result<Option<Recovered>, ArchiveError> {
        let loaded = async { Ok((self.load_index(&view.root).await?, self.load_snapshot(&view.root).await?)) };
        let Some((index, snapshot)) = self.unless_cleared(&view.root, loaded.await).await? else { return Ok(None) };
        let Some(root) = self.claim_from(&view.root, epoch, view.next).await? else { return Ok(None) };
        self.write_mirror(&root, &HashMap::new()).await?;
        self.hold(Some(Held { root, index, claimed: true, shipped: view.next }), epoch);
        Ok(Some(Recovered { snapshot, tail: Tail::Local, epoch }))
    }

    /// The bucket has more than is here: claim, fence the WAL, and begin from what the bucket has.
    async fn restore(
        &self,
        view: &View,
        local: &dyn LocalBlocks,
        check: Option<u64>,
        epoch: u32,
    ) -> Result<Option<Recovered>, ArchiveError> {
        let Some(loaded) = self.load(view).await? else { return Ok(None) };
        if let Some(seq) = check {
            let bytes = local.read(seq).map_err(|error| ArchiveError::Local(error.to_string()))?;
            match view.agrees(&loaded.blocks, seq, &bytes) {
                Some(true) => {}
                Some(false) => return Err(self.diverged(seq)),
                None => warn!(seq, "the local WAL is too old to be compared with the archive; it is set aside"),
            }
        }
        let Some((snapshot, blocks, epoch)) = self.take(view, loaded, epoch).await? else { return Ok(None) };
        info!(epoch, blocks = blocks.len(), "restored from the archive");
        Ok(Some(Recovered { snapshot, tail: Tail::Bucket(blocks), epoch }))
    }

    /// Takes the shard over whose WAL is in the store, from whoever had it: from here on an append of theirs fails. A
    /// shard that is not there yet begins.
    pub async fn take_over(&self) -> Result<Recovered, ArchiveError> {
        for attempt in 0..CLAIM_ATTEMPTS as u32 {
            if attempt > 0 {
                info!("another owner was quicker in the bucket, looking again");
                tokio::time::sleep(backoff(Duration::from_millis(20), attempt)).await;
            }
            let view = self.view().await?.unwrap_or_else(|| View::of_nothing(self.first_root(0)));
            if view.root.cluster_id != self.cluster_id || view.root.shard != self.settings.shard {
                return Err(self.mismatch(view.root.cluster_id));
            }
            let Some(loaded) = self.load(&view).await? else { continue };
            let epoch = view.root.epoch + 1;
            if let Some((snapshot, blocks, epoch)) = self.take(&view, loaded, epoch).await? {
                info!(shard = self.settings.shard, epoch, blocks = blocks.len(), "took the shard over");
                return Ok(Recovered { snapshot, tail: Tail::Owned(blocks), epoch });
            }
        }
        Err(ArchiveError::Contended)
    }

    /// What the bucket has of the shard; `None` if an owner that has published since has cleared it away.
    async fn load(&self, view: &View) -> Result<Option<Loaded>, ArchiveError> {
        let loaded = async {
            let index = self.load_index(&view.root).await?;
            let snapshot = self.load_snapshot(&view.root).await?;
            Ok(Loaded { index, snapshot, blocks: self.chain(&view.root, view.next).await? })
        };
        self.unless_cleared(&view.root, loaded.await).await
    }

    /// `None` where an object that `root` names is gone because an owner has published since.
    async fn unless_cleared<T>(&self, root: &Root, loaded: Result<T, ArchiveError>) -> Result<Option<T>, ArchiveError> {
        match loaded {
            Err(ArchiveError::Store(StoreError::Missing(_))) if !self.is_newest(root.seq).await? => Ok(None),
            loaded => loaded.map(Some),
        }
    }

    /// Claims the shard and fences its WAL. Returns what to begin from and the epoch; `None` when another owner was quicker.
    async fn take(
        &self,
        view: &View,
        loaded: Loaded,
        epoch: u32,
    ) -> Result<Option<(Option<Snapshot>, Vec<StoredBlock>, u32)>, ArchiveError> {
        let Loaded { index, snapshot, mut blocks } = loaded;
        let newest = newest_in(&blocks)?.unwrap_or(0);
        let epoch = epoch.max(newest + 1);
        let Some(root) = self.claim_from(&view.root, epoch, view.next).await? else { return Ok(None) };
        let mut next = view.next;
        if self.ships && !planted(Bug::NoFence) {
            let fence = fence_block(self.settings.shard, epoch, next, self.now_ms());
            match self.store.create(&self.keys.wal(next), std::slice::from_ref(&fence)).await {
                // The old owner appended or shipped once more before it noticed; its blocks count.
                Err(StoreError::Taken(_)) => return Ok(None),
                created => created?,
            }
            blocks.push(StoredBlock { seq: next, bytes: fence });
            next += 1;
            if !self.is_newest(root.seq).await? {
                return Ok(None);
            }
        }
        blocks.retain(|block| block.seq >= root.trim);
        if self.settings.owns_wal {
            self.wals.lock().extend(blocks.iter().map(|block| block.seq));
        }
        self.write_mirror(&root, &HashMap::new()).await?;
        self.hold(Some(Held { root, index, claimed: true, shipped: next }), epoch);
        Ok(Some((snapshot, blocks, epoch)))
    }

    /// The bucket is away: what is here must do.
    async fn recover_locally(
        &self,
        local: &dyn LocalBlocks,
        mirror: Option<Root>,
        error: &StoreError,
    ) -> Result<Recovered, ArchiveError> {
        let Some((first, next)) = local.bounds() else {
            return Err(ArchiveError::Unreachable { archive: self.store.describe(), reason: error.to_string() });
        };
        let epoch = newest_epoch(local)?.max(mirror.as_ref().map(|root| root.epoch)).unwrap_or(0) + 1;
        let Some(root) = mirror else {
            self.hold(None, epoch);
            return Ok(Recovered { snapshot: None, tail: Tail::Local, epoch });
        };
        if root.trim < first || root.trim > next {
            return Err(ArchiveError::Hole { first, needed: root.trim });
        }
        let index = self.load_index(&root).await?;
        let snapshot = self.load_snapshot(&root).await?;
        self.hold(Some(Held { root, index, claimed: false, shipped: 0 }), epoch);
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
        let known = self.held_root();
        let continues = match judge(view.next, local.bounds()) {
            Judgement::Continue { check } => self.check_continues(&view, local, check, known.as_ref()),
            Judgement::Restore { check } => Err(self.diverged(check.unwrap_or(first))),
        };
        continues?;
        if ours {
            let index = self.load_index(&view.root).await?;
            self.write_mirror(&view.root, &HashMap::new()).await?;
            return Ok(Some(Held { root: view.root, index, claimed: true, shipped: view.next }));
        }
        let epoch = epoch.max(view.root.epoch + 1);
        let index = self.load_index(&view.root).await?;
        let Some(root) = self.claim_from(&view.root, epoch, view.next).await? else { return Ok(None) };
        self.write_mirror(&root, &HashMap::new()).await?;
        Ok(Some(Held { root, index, claimed: true, shipped: view.next }))
    }

    /// The first claim of a shard that the bucket does not know: its WAL begins with block `first`.
    async fn claim_first(&self, first: u64, epoch: u32) -> Result<Option<Held>, ArchiveError> {
        let root = self.first_root(first);
        let Some(root) = self.claim_from(&root, epoch, first).await? else { return Ok(None) };
        self.write_mirror(&root, &HashMap::new()).await?;
        Ok(Some(Held { root, index: Index::default(), claimed: true, shipped: first }))
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

    /// Makes the root that claims the shard after `old`. `None` when another owner was quicker.
    async fn claim_from(&self, old: &Root, epoch: u32, wal_next: u64) -> Result<Option<Root>, ArchiveError> {
        let mut root = Root { epoch, seq: old.seq + 1, nonce: random(), ..old.clone() };
        root.fences.push(Fence { epoch, manifest_seq: root.seq, wal_seq: wal_next });
        self.attempted.lock().push(root.nonce);
        match self.store.create(&self.keys.root(root.seq), &[root.encode()]).await {
            Ok(()) => {}
            Err(StoreError::Taken(_)) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        // The name was free because its root had been cleared away: then there are newer ones, and this claim is void.
        Ok(self.is_newest(root.seq).await?.then_some(root))
    }

    async fn is_newest(&self, seq: u64) -> Result<bool, ArchiveError> {
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
        Err(ArchiveError::Contended)
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
            let next = root.trim;
            return Ok(View { root, last: Vec::new(), next });
        }
        let objects = self.store.list(&self.keys.wals()).await?;
        let newest = objects.iter().filter_map(|object| sequence_of(&object.location)).max();
        let last = match newest.filter(|newest| *newest >= root.wal) {
            Some(first) => self.wal_object(first).await?,
            None => Vec::new(),
        };
        let next = last.last().map_or(root.trim, |block| block.seq + 1);
        if next < root.trim {
            return Err(damaged(format!("it begins at block {}, the shipped WAL ends at {next}", root.trim)));
        }
        Ok(View { root, last, next })
    }

    /// The blocks of one shipped WAL object, checked.
    pub(super) async fn wal_object(&self, first: u64) -> Result<Vec<StoredBlock>, ArchiveError> {
        let key = self.keys.wal(first);
        let damaged = |reason: String| ArchiveError::Damaged { key: key.to_string(), reason };
        let mut bytes = self.store.get(&key, OBJECT_BYTES_MAX).await?;
        let mut blocks = Vec::new();
        let mut next = first;
        while let Some(block) = Block::split_first(&mut bytes).map_err(|error| damaged(error.to_string()))? {
            if block.header().seq != next || block.header().shard != self.settings.shard {
                return Err(damaged(format!("block {} where {next} was expected", block.header().seq)));
            }
            blocks.push(StoredBlock { seq: next, bytes: block.bytes().clone() });
            next += 1;
        }
        if blocks.is_empty() { Err(damaged("it holds no block".into())) } else { Ok(blocks) }
    }

    /// Shipped blocks from the root's WAL object on, to `next`.
    async fn chain(&self, root: &Root, next: u64) -> Result<Vec<StoredBlock>, ArchiveError> {
        let mut blocks: Vec<StoredBlock> = Vec::new();
        let mut at = root.wal;
        while self.ships && at < next {
            blocks.extend(self.wal_object(at).await?);
            at = blocks.last().map_or(next, |block| block.seq + 1);
        }
        Ok(blocks)
    }

    /// The segment index a root names.
    pub(super) async fn load_index(&self, root: &Root) -> Result<Index, ArchiveError> {
        let mut pages = Vec::with_capacity(root.pages.len());
        for pointer in &root.pages {
            let bytes = self.load_page(pointer).await?;
            let page = IndexPage::decode(&bytes, pointer).map_err(|error| self.damaged_page(pointer, &error))?;
            pages.push((*pointer, page));
        }
        let damaged = |error: manifest::ManifestError| ArchiveError::Damaged {
            key: self.keys.root(root.seq).to_string(),
            reason: error.to_string(),
        };
        Index::load(pages).map_err(damaged)
    }

    async fn load_snapshot(&self, root: &Root) -> Result<Option<Snapshot>, ArchiveError> {
        let Some(pointer) = &root.snapshot else { return Ok(None) };
        let bytes = self.load_page(pointer).await?;
        let state = manifest::decode_snapshot(&bytes, pointer).map_err(|error| self.damaged_page(pointer, &error))?;
        Ok(Some(Snapshot { next_seq: root.trim, state }))
    }

    fn damaged_page(&self, pointer: &PagePointer, error: &manifest::ManifestError) -> ArchiveError {
        ArchiveError::Damaged { key: self.keys.page(pointer).to_string(), reason: error.to_string() }
    }

    /// A page: the local copy if it is whole, the bucket's otherwise.
    pub(super) async fn load_page(&self, pointer: &PagePointer) -> Result<Bytes, ArchiveError> {
        if let Some(mirror) = &self.mirror
            && let Ok(bytes) = mirror.get(&self.mirror_keys().page(pointer), pointer.bytes).await
            && manifest::is_page(&bytes, pointer)
        {
            return Ok(bytes);
        }
        Ok(self.store.get(&self.keys.page(pointer), pointer.bytes).await?)
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

/// A block that says nothing but whose the shard is now.
fn fence_block(shard: u32, epoch: u32, seq: u64, append_ms: i64) -> Bytes {
    let header = BlockHeader { shard, epoch, nonce: random(), seq, append_ms };
    BlockBuilder::default().finish(header).bytes().clone()
}
