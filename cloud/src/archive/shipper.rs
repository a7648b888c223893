//! Shipping: WAL blocks, concatenated and unchanged, at most `max_lag` behind.
//!
//! Object after object, each named by its first block and made by `PutMode::Create`: the next name is the last block + 1,
//! so a restore follows them without a listing, and of two writers one collides. The first one after a claim ends with a
//! mark of its own, so that it is nobody else's even where the blocks are the same, and is kept for ever.

use std::time::Duration;

use bytes::Bytes;
use tracing::warn;

use super::store::{backoff, random};
use super::{Archive, ArchiveError, Source, SourceError, StoreError, StoredBlock};
use crate::block::claim_mark;

/// How long a stopping node goes on trying to ship what is left.
const FINISH: Duration = Duration::from_secs(5);

/// Before looking again where a wait ended without a block.
const IDLE: Duration = Duration::from_millis(100);

/// Ships one shard's blocks.
pub(super) struct Shipper<'a> {
    archive: &'a Archive,
    source: &'a dyn Source,
    next: u64,
    /// Blocks of the object under way: what came of its PUT may not be known, so it is made again with these bytes.
    pending: Vec<StoredBlock>,
    /// What the first object after a claim ends with; it is one block, for it is kept for ever.
    mark: Option<Bytes>,
}

impl<'a> Shipper<'a> {
    pub(super) fn new(archive: &'a Archive, source: &'a dyn Source, next: u64, epoch: u32) -> Self {
        let mark = Some(claim_mark(epoch, random()));
        Self { archive, source, next, pending: Vec::new(), mark }
    }

    /// Ships until another owner is met.
    pub(super) async fn run(&mut self) -> ArchiveError {
        let mut failures = 0;
        loop {
            if self.pending.is_empty() {
                self.wait().await;
            }
            let before = self.next;
            match self.ship().await {
                // A shard that has stopped ends all waits and has nothing more: looking again and again would spin.
                Ok(()) if self.next == before => tokio::time::sleep(IDLE).await,
                Ok(()) => {
                    failures = 0;
                    self.archive.worked();
                }
                Err(
                    error @ (ArchiveError::Deposed { .. }
                    | ArchiveError::Overtaken
                    | ArchiveError::Source(SourceError::Closed)),
                ) => {
                    return error;
                }
                Err(error) => {
                    failures += 1;
                    warn!(%error, next = self.next, "shipping waits");
                    self.archive.failed(&error);
                    let pause = (self.archive.settings.max_lag / 8).min(Duration::from_secs(1));
                    tokio::time::sleep(backoff(pause, failures)).await;
                }
            }
        }
    }

    /// Waits for a block, and then for more of them: the oldest may wait as long as no round of the splitter waits for it.
    async fn wait(&self) {
        // What another owner has shipped counts as our own until we collide with it.
        self.source.wait(self.next).await;
        let settings = &self.archive.settings;
        if !self.archive.ships || settings.owns_wal || self.mark.is_some() {
            return;
        }
        let mut wanted = self.archive.wanted.subscribe();
        while let Some(backlog) = self.source.backlog() {
            let left = (settings.max_lag / 2).saturating_sub(backlog.age);
            if left.is_zero() || *wanted.borrow_and_update() > self.next {
                return;
            }
            let _ = tokio::time::timeout(left, wanted.changed()).await;
        }
    }

    /// A last attempt when the node stops.
    pub(super) async fn finish(&mut self) {
        let rest = async {
            while self.source.durable().next_seq > self.next || !self.pending.is_empty() {
                if let Err(error) = self.ship().await {
                    warn!(%error, next = self.next, "stopping with blocks that are not shipped");
                    return;
                }
            }
        };
        if tokio::time::timeout(FINISH, rest).await.is_err() {
            warn!(next = self.next, "stopping with blocks that are not shipped: no answer in time");
        }
    }

    /// Ships one object.
    async fn ship(&mut self) -> Result<(), ArchiveError> {
        if !self.archive.ships || self.archive.settings.owns_wal {
            let next = self.source.durable().next_seq;
            if self.archive.settings.owns_wal {
                // Each block is an object of its own, and for the collection to delete.
                self.archive.wals.lock().extend(self.next..next);
            }
            self.shipped(next);
            return Ok(());
        }
        let bytes_max = if self.mark.is_some() { 1 } else { self.archive.settings.ship_bytes };
        if self.pending.is_empty() {
            let mut blocks = self.source.blocks(self.next, bytes_max).await?;
            if self.mark.is_some() {
                blocks.truncate(1);
            }
            if blocks.iter().enumerate().any(|(at, block)| block.seq != self.next + at as u64) {
                return Err(ArchiveError::Local(format!("the WAL skips a block after {}", self.next)));
            }
            self.pending = blocks;
        }
        let Some(last) = self.pending.last() else { return Ok(()) };
        let next = last.seq + 1;
        let chunks: Vec<Bytes> =
            self.pending.iter().map(|block| block.bytes.clone()).chain(self.mark.clone()).collect();
        let begun = self.archive.confirmation.now();
        match self.archive.store.create(&self.archive.keys.wal(self.next), &chunks).await {
            Ok(()) => self.archive.confirmation.confirm(begun),
            // An owner from before, or this node's own last life, shipped once more after the claim had looked.
            Err(StoreError::Taken(_)) if self.mark.is_some() && self.archive.is_still_ours().await? => {
                return Err(ArchiveError::Overtaken);
            }
            Err(StoreError::Taken(_)) => return Err(self.archive.taken_by().await),
            Err(error) => return Err(error.into()),
        }
        self.mark = None;
        self.archive.wals.lock().insert(self.next);
        self.pending.clear();
        self.shipped(next);
        Ok(())
    }

    fn shipped(&mut self, next: u64) {
        self.next = next;
        self.archive.shipped.send_replace(next);
        self.source.shipped(next);
    }
}
