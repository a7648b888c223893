//! Where another owner's history left a node's own: what of its log that node alone has. Only looks; claims nothing.

use bytes::Bytes;

use super::{Archive, ArchiveError, LocalBlocks, Snapshot, StoreError};

/// Blocks that are only in a node's own log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Departure {
    /// What the node's state was when it last published; none before that.
    pub snapshot: Option<Snapshot>,
    /// The first block that is not in the bucket's history.
    pub first: u64,
    /// After the last one.
    pub next: u64,
    /// The epoch of whoever has the shard now.
    pub epoch: u32,
}

impl Archive {
    /// Compares a stopped node's log with the bucket. `None` if no other node has claimed the shard since this one did.
    ///
    /// The history departs at the first block, from the first claim on that this node did not make, that is not the one
    /// here: what a claim names is kept for ever, so it is there to be compared.
    pub async fn departure(&self, local: &dyn LocalBlocks) -> Result<Option<Departure>, ArchiveError> {
        let known = self.mirror_root().await?;
        let Some(view) = self.view().await? else { return Err(ArchiveError::Emptied(self.store.describe())) };
        if view.root.cluster_id != self.cluster_id {
            return Err(self.mismatch(view.root.cluster_id));
        }
        let ours = known.as_ref().map_or(&[][..], |root| &root.fences);
        let Some(since) = view.root.fences.strip_prefix(ours) else {
            let text = "its claims are not among those in the archive: the archive was restored from an older state, or is another one";
            return Err(ArchiveError::Local(text.into()));
        };
        let Some(claim) = since.first() else { return Ok(None) };
        let snapshot = match &known {
            Some(root) => self.load_snapshot(root).await?,
            None => None,
        };
        let (start, next) = local.bounds().unwrap_or((claim.wal_seq, claim.wal_seq));
        let replayed = snapshot.as_ref().map_or(0, |snapshot| snapshot.next_seq);
        if start > replayed {
            return Err(ArchiveError::Hole { first: start, needed: replayed });
        }
        let first = self.first_departed(claim.wal_seq, next, local).await?;
        Ok(Some(Departure { snapshot, first: first.min(next), next, epoch: view.root.epoch }))
    }

    async fn first_departed(&self, from: u64, next: u64, local: &dyn LocalBlocks) -> Result<u64, ArchiveError> {
        let mut seq = from;
        while seq < next {
            let blocks = match self.wal_object(seq).await {
                Ok(blocks) => blocks,
                Err(ArchiveError::Store(StoreError::Missing(_))) => {
                    let text = format!(
                        "whether the new owner has block {seq} cannot be told: its log went on with the blocks of this one, as that of a \
                         copied data directory does, and is in segments since"
                    );
                    return Err(ArchiveError::Local(text));
                }
                Err(error) => return Err(error),
            };
            for block in blocks {
                let own: Bytes = match block.seq < next {
                    true => local.read(block.seq)?,
                    false => break,
                };
                if own != block.bytes {
                    return Ok(block.seq);
                }
                seq = block.seq + 1;
            }
        }
        Ok(next)
    }
}
