//! Where another owner's history left a node's own: what of its log that node alone has. Only looks; claims nothing.
//!
//! A block's nonce is random, so two logs with one block in common have everything before it in common. The bucket keeps
//! for ever what claims name, and the rest until it is in segments. For blocks that it no longer has, two rules say more:
//!
//! - A node writes a claim into its copy of the manifest before it ships, and each start has a greater epoch than all before
//!   it. So blocks of an epoch above that of the last own claim which took effect were never shipped from here. That is how
//!   a copied data directory departs, long before anybody else claims.
//! - Blocks of that epoch or below were shipped by the one owner they came from, up to the first claim of another one.

use super::claim::View;
use super::{Archive, ArchiveError, LocalBlocks, Snapshot, StoreError, StoredBlock};
use crate::block::Block;
use crate::manifest::{Fence, Root};

/// How often a look is begun again because the owner published meanwhile.
const LOOKS: usize = 16;

/// Blocks that are only in a node's own log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Departure {
    /// What the node's state was when it last published; none before that.
    pub snapshot: Option<Snapshot>,
    /// The first block that is not known to be in the bucket's history.
    pub first: u64,
    /// The first block that is known not to be. What lies between cannot be compared any more.
    pub certain: u64,
    /// After the last one.
    pub next: u64,
    /// The epoch of whoever has the shard now.
    pub epoch: u32,
}

/// Where a local log leaves the bucket's history. Both are the log's end or the bucket's where it does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Parting {
    /// The first local block that is not known to be in the bucket's history.
    pub first: u64,
    /// The first that is known not to be.
    pub certain: u64,
}

/// What comparing blocks has shown.
struct Comparison<'a> {
    local: &'a dyn LocalBlocks,
    start: u64,
    next: u64,
    /// After the last block that is the same.
    equal_to: u64,
    /// The first one that is not.
    different: Option<u64>,
}

impl Comparison<'_> {
    fn blocks(&mut self, blocks: &[StoredBlock]) -> Result<(), ArchiveError> {
        for block in blocks {
            self.block(block.seq, |own| own == block.bytes)?;
        }
        Ok(())
    }

    fn block(&mut self, seq: u64, is_same: impl Fn(&[u8]) -> bool) -> Result<(), ArchiveError> {
        if !(self.start..self.next).contains(&seq) {
            return Ok(());
        }
        if is_same(&self.local.read(seq)?) {
            self.equal_to = self.equal_to.max(seq + 1);
        } else {
            self.different = Some(self.different.map_or(seq, |known| known.min(seq)));
        }
        Ok(())
    }
}

/// The object that a claim names.
struct ClaimedObject {
    blocks: Vec<StoredBlock>,
    /// Whether the claimant made it: otherwise an earlier owner shipped once more after the claim.
    is_claimants: bool,
}

impl Archive {
    /// Compares a stopped node's log with the bucket. `None` if this node would go on where it was: no other node has claimed
    /// the shard since this one did, no block differs, and no other owner is alive.
    pub async fn departure(&self, local: &dyn LocalBlocks) -> Result<Option<Departure>, ArchiveError> {
        let known = self.mirror_root().await?;
        let (view, chain) = self.view_with_chain().await?;
        let ours = known.as_ref().map_or(&[][..], |root| &root.fences);
        let Some(since) = view.root.fences.strip_prefix(ours) else {
            let text = "its claims are not among those in the archive: the archive was restored from an older state, or is another one";
            return Err(ArchiveError::Local(text.into()));
        };
        let Parting { first, certain } = self.parting(&view, &chain, known.as_ref(), local).await?;
        let (start, next) = local.bounds().unwrap_or((view.next, view.next));
        let is_apart = !since.is_empty() || first < next.min(view.next);
        if !is_apart && !self.is_owned_by_another().await? {
            return Ok(None);
        }
        let snapshot = match &known {
            Some(root) => self.load_snapshot(root).await?,
            None => None,
        };
        let replayed = snapshot.as_ref().map_or(0, |snapshot| snapshot.next_seq);
        if start > replayed {
            return Err(ArchiveError::Hole { first: start, needed: replayed });
        }
        Ok(Some(Departure { snapshot, first, certain, next, epoch: view.root.epoch }))
    }

    /// What the bucket says of the shard, and its blocks that are not in segments alone.
    async fn view_with_chain(&self) -> Result<(View, Vec<StoredBlock>), ArchiveError> {
        for _ in 0..LOOKS {
            let Some(view) = self.view().await? else { return Err(ArchiveError::Emptied(self.store.describe())) };
            if view.root.cluster_id != self.cluster_id {
                return Err(self.mismatch(view.root.cluster_id));
            }
            if let Some(chain) = self.chain(&view).await? {
                return Ok((view, chain));
            }
        }
        Err(ArchiveError::Outpaced { attempts: LOOKS })
    }

    /// Whether a node of another data directory has a heartbeat that moves.
    async fn is_owned_by_another(&self) -> Result<bool, ArchiveError> {
        let Some(presence) = &self.settings.presence else { return Ok(false) };
        match presence.admit().await {
            Ok(()) => Ok(false),
            Err(ArchiveError::Owned { .. }) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Compares local blocks with all that the bucket still has. `known` is the local copy of the manifest, `chain` the
    /// blocks of `view`.
    pub(super) async fn parting(
        &self,
        view: &View,
        chain: &[StoredBlock],
        known: Option<&Root>,
        local: &dyn LocalBlocks,
    ) -> Result<Parting, ArchiveError> {
        let Some((start, next)) = local.bounds() else {
            return Ok(Parting { first: view.next, certain: view.next });
        };
        let mut seen = Comparison { local, start, next, equal_to: 0, different: None };
        seen.blocks(chain)?;
        if let (Some(crc), Some(seq)) = (view.root.trim_crc, view.root.trim.checked_sub(1)) {
            seen.block(seq, |own| crc32c::crc32c(own) == crc)?;
        }
        let ours = known.map_or(&[][..], |root| &root.fences);
        // The last own claim that took effect: an earlier owner that shipped once more made those after it void.
        let mut owner = None;
        for fence in ours.iter().rev() {
            let Some(object) = self.claimed_object(fence).await? else { continue };
            seen.blocks(&object.blocks)?;
            if object.is_claimants {
                owner = Some(fence.epoch);
                break;
            }
        }
        let mut others_from = u64::MAX;
        for fence in view.root.fences.iter().filter(|fence| !ours.contains(fence) && fence.wal_seq < next) {
            // A claim that came to nothing left no object.
            let Some(object) = self.claimed_object(fence).await? else { continue };
            seen.blocks(&object.blocks)?;
            if object.is_claimants {
                others_from = others_from.min(fence.wal_seq);
            }
        }
        let end = seen.different.unwrap_or(u64::MAX).min(view.next).min(next);
        // A claim is made after the log was compared, and only what is in the bucket is published.
        let claimed_at = ours.last().map_or(0, |fence| fence.wal_seq);
        let common = claimed_at.max(known.map_or(0, |root| root.trim)).max(seen.equal_to);
        let mut first = common.max(start).min(end);
        while first < end.min(others_from) && Some(epoch_of(local, first)?) <= owner {
            first += 1;
        }
        let mut certain = first;
        while certain < end && (owner.is_none() || Some(epoch_of(local, certain)?) <= owner) {
            certain += 1;
        }
        Ok(Parting { first, certain })
    }

    /// `None` where nothing was shipped after the claim.
    async fn claimed_object(&self, fence: &Fence) -> Result<Option<ClaimedObject>, ArchiveError> {
        let (blocks, mark) = match self.marked_wal_object(fence.wal_seq).await {
            Err(ArchiveError::Store(StoreError::Missing(_))) => return Ok(None),
            object => object?,
        };
        // One that restored from the bucket begins with a block of its own instead of a mark.
        let first = blocks.first().map(|block| parsed_epoch(block.seq, block.bytes.clone())).transpose()?;
        let is_claimants = mark == Some(fence.epoch) || first == Some(fence.epoch);
        Ok(Some(ClaimedObject { blocks, is_claimants }))
    }
}

fn epoch_of(local: &dyn LocalBlocks, seq: u64) -> Result<u32, ArchiveError> {
    parsed_epoch(seq, local.read(seq)?)
}

fn parsed_epoch(seq: u64, bytes: bytes::Bytes) -> Result<u32, ArchiveError> {
    let block = Block::parse(bytes).map_err(|error| ArchiveError::Local(format!("block {seq}: {error}")))?;
    Ok(block.header().epoch)
}
