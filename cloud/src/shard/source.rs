//! The shard as the archiver sees it, and what it can tell the link about safety.

use bytes::Bytes;
use shared::block_on::block_on;
use shared::log::{AppendError, BoxFuture, StreamKey};
use shared::name::{Offset, Partition, TimestampMs};
use tracing::{error, warn};

use super::{Core, Shard, retention};
use crate::archive::{Backlog, Durable, Retained, Snapshot, Source, SourceError, StoredBlock};
use crate::ingest::Safety;
use crate::wal::WalError;

/// A WAL's error in the archiver's words.
pub fn source_error(error: WalError) -> SourceError {
    match error {
        WalError::NotThere { requested, first, .. } => SourceError::Trimmed { requested, first },
        WalError::Closed | WalError::Fenced(_) => SourceError::Closed,
        error => SourceError::Storage(error.to_string()),
    }
}

impl Core {
    async fn block(&self, seq: u64) -> Result<Bytes, SourceError> {
        let recent = self.inner.lock().tail.block(seq).map(|block| block.bytes().clone());
        match recent {
            Some(bytes) => Ok(bytes),
            None => self.wal.read(seq).await.map_err(source_error),
        }
    }

    async fn blocks(&self, from: u64, next: u64, bytes_max: usize) -> Result<Vec<StoredBlock>, SourceError> {
        let (mut blocks, mut bytes) = (Vec::new(), 0);
        for seq in from..next {
            let block = self.block(seq).await?;
            if !blocks.is_empty() && bytes + block.len() > bytes_max {
                break;
            }
            bytes += block.len();
            blocks.push(StoredBlock { seq, bytes: block });
        }
        Ok(blocks)
    }

    /// Batches in blocks below `trim` are not read from the WAL any more.
    pub fn published(&self, trim: u64) {
        let trim = trim.min(self.inner.lock().next_seq);
        // The index first: who looks from here on asks the cold tier. A newest block that stays in one stays in both.
        {
            let mut inner = self.inner.lock();
            let kept = inner.next_seq - u64::from(self.wal.keeps_newest() && inner.next_seq > 0);
            inner.index.trim_blocks(trim.min(kept));
        }
        if let Err(error) = self.wal.trim(trim) {
            warn!(%error, trim, "the WAL could not be trimmed");
        }
        // Under the lock, as where a block is shown: the last one who looks has the newest answer.
        let mut inner = self.inner.lock();
        inner.wal_free_bytes = self.wal_free().0;
    }

    fn is_closed(&self) -> bool {
        self.inner.lock().stopped == Some(AppendError::Closed)
    }
}

impl Safety for Shard {
    fn safe(&self, key: &StreamKey) -> Option<Offset> {
        Shard::safe(self, key)
    }

    fn changed(&self) -> BoxFuture<'static, ()> {
        self.safety_changed()
    }
}

impl Source for Shard {
    fn durable(&self) -> Durable {
        let usage = self.core.wal.usage();
        let inner = self.core.inner.lock();
        // A full index presses for a roll as a full WAL does.
        let index = inner.index.entries() as u128 * u128::from(usage.bytes_max)
            / self.core.settings.index_entries_max.max(1) as u128;
        Durable {
            next_seq: inner.next_seq,
            // Small blocks take more than their bytes, and fill the log all the same.
            wal_bytes: usage.taken_bytes.max(u64::try_from(index).unwrap_or(u64::MAX)),
            wal_bytes_max: usage.bytes_max,
        }
    }

    fn backlog(&self) -> Option<Backlog> {
        self.core.inner.lock().unshipped.backlog()
    }

    fn wait(&self, seq: u64) -> BoxFuture<'static, ()> {
        let core = self.core.clone();
        Box::pin(async move {
            loop {
                // Registered first, then looked: nothing is missed in between.
                let committed = core.committed.clone().notified_owned();
                {
                    let inner = core.inner.lock();
                    if inner.next_seq > seq || inner.stopped.is_some() {
                        return;
                    }
                }
                committed.await;
            }
        })
    }

    fn blocks(&self, from: u64, bytes_max: usize) -> BoxFuture<'_, Result<Vec<StoredBlock>, SourceError>> {
        Box::pin(async move {
            let next = self.core.inner.lock().next_seq;
            if self.core.is_closed() {
                return Err(SourceError::Closed);
            }
            if from >= next {
                return Ok(Vec::new());
            }
            let recent = self.core.inner.lock().tail.block(from).is_some();
            match tokio::runtime::Handle::try_current() {
                // What is not recent comes from the disk: off the async threads where there are any.
                Ok(runtime) if !recent && self.core.wal.blocks_threads() => {
                    let core = self.core.clone();
                    let read = runtime.spawn_blocking(move || block_on(core.blocks(from, next, bytes_max)));
                    read.await.unwrap_or(Err(SourceError::Closed))
                }
                _ => self.core.blocks(from, next, bytes_max).await,
            }
        })
    }

    fn snapshot(&self) -> BoxFuture<'_, Result<Snapshot, SourceError>> {
        Box::pin(async move {
            if self.core.is_closed() {
                return Err(SourceError::Closed);
            }
            // Copied under the lock, which costs a reference for some hundred entries, and encoded without it.
            let (next_seq, state) = {
                let inner = self.core.inner.lock();
                (inner.next_seq, inner.state.clone())
            };
            Ok(Snapshot { next_seq, state: state.encode().into() })
        })
    }

    fn shipped(&self, next_seq: u64) {
        if self.core.inner.lock().ship(next_seq) {
            self.core.safety.notify_waiters();
        }
    }

    fn published(&self, trim: u64) {
        self.core.published(trim);
    }

    fn fenced(&self, epoch: u32) {
        error!(epoch, "another node has taken this shard over: nothing more is acknowledged here");
        self.core.stop(AppendError::Fenced(epoch));
    }

    fn now_ms(&self) -> TimestampMs {
        self.core.now()
    }

    fn retained(&self, partition: Partition) -> Option<Retained> {
        let inner = self.core.inner.lock();
        let settings = &self.core.settings;
        let kept =
            retention::kept(inner.state.topic(partition.topic)?, settings.retention_ms, settings.retention_bytes);
        let log_start = inner.state.partition(partition)?.log_start;
        Some(Retained { log_start, retention_ms: kept.retention_ms })
    }
}
