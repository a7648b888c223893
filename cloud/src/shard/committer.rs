//! The one task that writes: takes the open block when the append before has ended, makes it durable, then moves what
//! readers see.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use shared::log::{AppendError, StreamKey};
use shared::name::Partition;
use tracing::{error, warn};

use super::flight::{Committing, Inner, OpenBlock};
use super::fold::fold;
use super::{Core, ShardSettings};
use crate::block::{Block, BlockError, BlockHeader};
use crate::planted::{Bug, planted};
use crate::state::Change;
use crate::wal::WalError;

/// However the committer ends, nobody waits for it afterwards.
struct StopOnEnd<'a>(&'a Core);

impl Drop for StopOnEnd<'_> {
    fn drop(&mut self) {
        self.0.inner.lock().stop(AppendError::Storage("the committer has ended".into()));
        self.0.committed.notify_waiters();
    }
}

impl Core {
    /// Runs until the shard is closed or its WAL fails.
    pub async fn commit_blocks(&self) {
        let _guard = StopOnEnd(self);
        let mut late = BTreeMap::new();
        while let Some((seq, mut open)) = self.take_open().await {
            if planted(Bug::MarkerAfterData) {
                std::mem::swap(&mut open.streams, &mut late);
            }
            for (key, (partition, next, chain)) in std::mem::take(&mut open.streams) {
                open.builder.change(Change::StreamPosition { key, partition, next, chain });
            }
            let dropped = self.drop_oldest(&mut open);
            let batches = open.builder.batches() as u64;
            let settings = &self.settings;
            let header = BlockHeader {
                shard: settings.shard,
                epoch: self.epoch,
                nonce: settings.nonce,
                seq,
                append_ms: self.now().stamp,
            };
            let block = open.builder.finish(header);
            let begun = Instant::now();
            let appended = self.wal.append(seq, block.bytes()).await;
            let micros = begun.elapsed().as_micros() as u64;
            match appended {
                Ok(()) => self.publish(block, batches, micros, dropped),
                Err(error) => self.fail(error),
            }
        }
    }

    /// Waits for something to write. `None` when there will be nothing more.
    async fn take_open(&self) -> Option<(u64, OpenBlock)> {
        loop {
            // Registered first, then looked: nothing is missed in between.
            let mut work = std::pin::pin!(self.work.notified());
            work.as_mut().enable();
            let wait = {
                let mut inner = self.inner.lock();
                if inner.stopped.is_some() {
                    return None;
                }
                match inner.linger_left(&self.settings) {
                    Some(Duration::ZERO) => return inner.take_open(&self.settings),
                    None if inner.closing => {
                        inner.stop(AppendError::Closed);
                        self.committed.notify_waiters();
                        return None;
                    }
                    wait => wait,
                }
            };
            match wait {
                None => work.await,
                Some(left) => {
                    let _ = tokio::time::timeout(left, work).await;
                }
            }
        }
    }

    /// The block is durable: from here on it is seen, and those who wait for it are answered.
    /// Blocks below `dropped` are not needed from here on.
    fn publish(&self, block: Block, batches: u64, micros: u64, dropped: Option<u64>) {
        let bytes = block.bytes().len() as u64;
        let usage = self.wal.usage();
        let mut inner = self.inner.lock();
        // Taken over meanwhile: whether the new owner saw this block is not known here, so it is not acknowledged.
        let Some(committing) = inner.committing.take() else { return };
        let seq = block.header().seq;
        inner.land(&block, &committing, seq);
        if let Err(error) = inner.absorb(block, &self.settings) {
            // The block was built by this very code.
            error!(%error, seq, "a block that was just written cannot be read: the shard stops");
            inner.stop(AppendError::Storage(error.to_string()));
            committing.outcome.complete(Err(AppendError::Storage(error.to_string())));
            return;
        }
        inner.wal_free_bytes = usage.free_bytes;
        inner.counters.blocks += 1;
        inner.counters.block_bytes += bytes;
        inner.counters.batches += batches;
        inner.counters.commit_seconds.add(micros as f64 / 1e6);
        drop(inner);
        if let Some(below) = dropped {
            self.published(below);
        }
        committing.outcome.complete(Ok(()));
        self.committed.notify_waiters();
        if !self.settings.archived {
            self.safety.notify_waiters();
        }
    }

    /// Where the oldest records make room: when less than a quarter of the WAL is free, moves log starts so that half of
    /// it will be. Returns the first block that is kept.
    fn drop_oldest(&self, open: &mut OpenBlock) -> Option<u64> {
        if !self.settings.drops_oldest {
            return None;
        }
        let usage = self.wal.usage();
        let inner = self.inner.lock();
        let crowded = inner.index.entries() >= self.settings.index_entries_max / 4 * 3;
        // An empty block is a call for room by somebody who was refused.
        if usage.free_bytes >= usage.bytes_max / 4 && !crowded && !open.builder.is_empty() {
            return None;
        }
        let half = usage.bytes_max / 2;
        let bytes = half.saturating_sub(usage.free_bytes).max(if crowded { usage.bytes / 2 } else { 0 });
        let below = self.wal.after_oldest(bytes)?;
        for (partition, start) in inner.index.starts_without(below) {
            let end = || inner.state.partition(partition).map(|partition| partition.high_watermark);
            if let Some(offset) = start.or_else(end) {
                open.builder.change(Change::LogStartMoved { partition, offset });
            }
        }
        Some(below)
    }

    fn fail(&self, error: WalError) {
        let mut inner = self.inner.lock();
        match error {
            WalError::Full(full) => {
                warn!(full, "the WAL took no block: producers are refused until there is room");
                inner.counters.refused_full += 1;
                inner.discard(&AppendError::Full(full));
            }
            WalError::Fenced(epoch) => {
                error!(epoch, "another node has taken this shard over: nothing more is acknowledged here");
                inner.stop(AppendError::Fenced(epoch));
                self.committed.notify_waiters();
            }
            error => {
                error!(%error, "the WAL failed: the shard stops, restart when the disk is well");
                inner.stop(AppendError::Storage(error.to_string()));
                self.committed.notify_waiters();
            }
        }
    }

    /// Takes nothing more, and lets the committer end when it has written what there is.
    pub fn begin_close(&self) {
        self.inner.lock().closing = true;
        self.wal.hurry();
        self.work.notify_one();
    }
}

impl Inner {
    /// How long the oldest open block is still kept open for more; `None` when there is nothing to write.
    ///
    /// Where an append costs money, appends begin at least `linger` apart. A block that comes after a pause does not wait.
    fn linger_left(&self, settings: &ShardSettings) -> Option<Duration> {
        let open = self.open.front()?;
        let is_full = self.open.len() > 1 || open.builder.batch_bytes() * 2 > settings.block_bytes_max;
        let begun = self.append_begun.filter(|_| !is_full && !self.closing);
        Some(begun.map_or(Duration::ZERO, |begun| settings.linger.saturating_sub(begun.elapsed())))
    }

    /// Hands the oldest open block to the committer.
    fn take_open(&mut self, settings: &ShardSettings) -> Option<(u64, OpenBlock)> {
        let mut open = self.open.pop_front()?;
        self.append_begun = (settings.linger > Duration::ZERO).then(Instant::now);
        self.committing = Some(Committing {
            outcome: open.outcome.clone(),
            batch_bytes: open.builder.batch_bytes(),
            committed_changes: open.committed_changes,
            producers: std::mem::take(&mut open.producers),
        });
        Some((self.next_seq, open))
    }

    /// What was in flight with this block is durable now: the overlay forgets it.
    fn land(&mut self, block: &Block, committing: &Committing, seq: u64) {
        self.in_flight_bytes = self.in_flight_bytes.saturating_sub(committing.batch_bytes);
        self.in_flight_changes = self.in_flight_changes.saturating_sub(committing.committed_changes);
        let overlay = &mut self.overlay;
        for entry in block.entries() {
            if overlay.ends.get(&entry.partition).is_some_and(|(_, newest)| *newest == seq) {
                overlay.ends.remove(&entry.partition);
            }
        }
        for key in &committing.producers {
            if let Some(flying) = overlay.producers.get_mut(key) {
                while flying.front().is_some_and(|(old, _)| *old <= seq) {
                    flying.pop_front();
                }
                if flying.is_empty() {
                    overlay.producers.remove(key);
                }
            }
        }
    }

    /// Folds a durable block into all that is known. The same for replay and for what was just written.
    pub fn absorb(&mut self, block: Block, settings: &ShardSettings) -> Result<(), BlockError> {
        let seq = block.header().seq;
        let changes = fold(&mut self.state, &block)?;
        let state = &self.state;
        self.index.add(&block, |partition| state.partition(partition).map(|state| state.log_start));
        for change in changes {
            self.note(change, seq, settings);
        }
        for entry in block.entries() {
            self.wake(entry.partition);
        }
        self.next_seq = seq + 1;
        self.tail.push(block, settings.tail_bytes_max);
        Ok(())
    }

    /// What a change means beside the state.
    fn note(&mut self, change: Change, seq: u64, settings: &ShardSettings) {
        match change {
            Change::LogStartMoved { partition, .. } => {
                if let Some(state) = self.state.partition(partition) {
                    self.index.trim_partition(partition, state.log_start);
                }
            }
            Change::TopicDeleted { id } => {
                self.index.remove_topic(id);
                self.overlay.deleting.remove(&id);
                let gone = |partition: &Partition| partition.topic == id;
                self.waiters.iter().filter(|(partition, _)| gone(partition)).for_each(|(_, w)| w.notify_waiters());
                self.waiters.retain(|partition, _| !gone(partition));
            }
            Change::StreamPosition { key, next, .. } => {
                if self.overlay.streams.get(&key).is_some_and(|(_, newest)| *newest == seq) {
                    self.overlay.streams.remove(&key);
                }
                if settings.archived {
                    self.unsafe_positions.push_back((seq, key, next));
                }
            }
            Change::EpochStarted { .. } => self.waiters.values().for_each(|waiter| waiter.notify_waiters()),
            _ => {}
        }
    }

    fn wake(&self, partition: Partition) {
        if let Some(waiter) = self.waiters.get(&partition) {
            waiter.notify_waiters();
        }
    }

    /// Blocks below `next_seq` are in the bucket: their positions are safe. Returns whether any moved.
    pub fn ship(&mut self, next_seq: u64) -> bool {
        let next_seq = next_seq.min(self.next_seq);
        self.shipped_seq = self.shipped_seq.max(next_seq);
        let mut moved = false;
        while self.unsafe_positions.front().is_some_and(|(seq, ..)| *seq < self.shipped_seq) {
            let Some((_, key, next)) = self.unsafe_positions.pop_front() else { break };
            moved |= self.raise_safe(key, next);
        }
        moved
    }

    fn raise_safe(&mut self, key: StreamKey, next: i64) -> bool {
        let known = self.safe.entry(key).or_insert(i64::MIN);
        let rises = next > *known;
        *known = (*known).max(next);
        rises
    }
}
