//! Writing blocks, one at a time, and moving what readers see when they are durable.
//!
//! The *writer* takes the open block when the append before has ended. While it waits for the disk another task *encodes
//! ahead*: once as much has gathered as is being written, that is sealed and its bytes are put together, so that the
//! next append follows the one before at once; and it shows what was written. Whoever comes first does either, under the shard's
//! lock, and in order. Where little gathers the writer does it all and nobody else is woken.

use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join;
use shared::log::{AppendError, StreamKey};
use shared::name::Partition;
use tokio::time::Instant;
use tracing::{error, info, warn};

use super::flight::{Encoded, Inner, OpenBlock, Outcome, Sealed, Stage};
use super::fold::fold;
use super::{Core, Refused, ShardSettings};
use crate::block::{Block, BlockError, BlockHeader};
use crate::planted::{Bug, planted};
use crate::state::{Change, LogChange, StreamChange, TopicChange};
use crate::wal::WalError;

/// How often it is told that the WAL is full.
const FULL_TOLD_AGAIN: Duration = Duration::from_secs(60);

/// However a task of the committer ends, nobody waits for it afterwards.
struct StopOnEnd<'a>(&'a Core);

impl Drop for StopOnEnd<'_> {
    fn drop(&mut self) {
        self.0.stop(AppendError::Storage("the committer has ended".into()));
    }
}

/// What the writer finds to do.
enum Next {
    Write(Encoded),
    Encode(BlockHeader, OpenBlock),
    /// Somebody who looks at what was written is late.
    Publish,
    /// Nothing to write, or not before so much time has passed.
    Wait(Option<Duration>),
    End,
}

impl Core {
    /// Runs until the shard is closed or its WAL fails.
    pub async fn commit_blocks(&self) {
        join(self.write_blocks(), self.encode_ahead()).await;
    }

    /// The writer's part of it.
    pub async fn write_blocks(&self) {
        let _guard = StopOnEnd(self);
        while let Some(encoded) = self.next_block().await {
            let begun = Instant::now();
            let bytes = encoded.block.bytes();
            let room = match encoded.leaves {
                0 => Ok(()),
                leave => self.wal.make_room(bytes.len() as u64, leave).await,
            };
            let appended = match room {
                Ok(()) => self.wal.append(encoded.block.header().seq, bytes).await,
                full => full,
            };
            let took = begun.elapsed();
            match appended {
                Ok(()) => self.written(encoded, begun, took),
                Err(error) => self.fail(error, encoded.block.bytes().len()),
            }
        }
    }

    /// The part that goes on while a block is written.
    pub async fn encode_ahead(&self) {
        let _guard = StopOnEnd(self);
        loop {
            // Registered first, then looked: nothing is missed in between.
            let mut ahead = std::pin::pin!(self.ahead.notified());
            ahead.as_mut().enable();
            while self.publish() {}
            let sealed = {
                let mut inner = self.inner.lock();
                if inner.stopped.is_some() {
                    return;
                }
                inner.is_worth_encoding(&self.settings).then(|| self.seal(&mut inner, Stage::Encoding)).flatten()
            };
            match sealed {
                Some((header, open)) => {
                    let outcome = open.outcome.clone();
                    let encoded = self.encode(header, open);
                    self.inner.lock().make_ready(&outcome, encoded);
                    self.work.notify_one();
                }
                None => ahead.await,
            }
        }
    }

    /// Waits for something to write. `None` when there will be nothing more.
    async fn next_block(&self) -> Option<Encoded> {
        loop {
            // Registered first, then looked: nothing is missed in between.
            let mut work = std::pin::pin!(self.work.notified());
            work.as_mut().enable();
            match self.look() {
                Next::Write(encoded) => return Some(encoded),
                Next::Encode(header, open) => return Some(self.encode(header, open)),
                Next::Publish => {
                    self.publish();
                }
                Next::Wait(None) => work.await,
                Next::Wait(Some(left)) => {
                    let _ = tokio::time::timeout(left, work).await;
                }
                Next::End => return None,
            }
        }
    }

    fn look(&self) -> Next {
        let mut inner = self.inner.lock();
        if inner.stopped.is_some() {
            return Next::End;
        }
        let next = match inner.take_ready() {
            Some(Some(encoded)) => Next::Write(encoded),
            // Who is at it says when they are ready.
            Some(None) => return Next::Wait(None),
            None => match inner.linger_left(&self.settings) {
                Some(Duration::ZERO) => match self.seal(&mut inner, Stage::Writing) {
                    Some((header, open)) => Next::Encode(header, open),
                    None => return Next::Wait(None),
                },
                _ if !inner.sealed.is_empty() => return Next::Publish,
                None if inner.closing => {
                    drop(inner);
                    self.stop(AppendError::Closed);
                    return Next::End;
                }
                wait => return Next::Wait(wait),
            },
        };
        if inner.is_worth_encoding(&self.settings) {
            self.ahead.notify_one();
        }
        next
    }

    /// The oldest open block takes nothing more from here on.
    fn seal(&self, inner: &mut Inner, stage: Stage) -> Option<(BlockHeader, OpenBlock)> {
        let mut open = inner.open.pop_front()?;
        let settings = &self.settings;
        inner.append_begun = (settings.linger > Duration::ZERO).then(Instant::now);
        if let Some(buffer) = inner.tail.take_spare(|bytes| open.builder.fits(bytes)) {
            open.builder.reuse(buffer);
        }
        if planted(Bug::MarkerAfterData) {
            std::mem::swap(&mut open.streams, &mut inner.late);
        }
        let header = BlockHeader {
            shard: settings.shard,
            epoch: self.epoch,
            nonce: settings.nonce,
            seq: inner.next_seq + inner.sealed.len() as u64,
            // Under the lock: times ascend as numbers do.
            append_ms: self.now(),
        };
        let changes = Arc::new(std::mem::take(&mut open.changes));
        open.builder.begin_with(changes.clone());
        inner.sealed.push_back(Sealed {
            outcome: open.outcome.clone(),
            batches: open.builder.batches(),
            batch_bytes: open.builder.batch_bytes(),
            changes,
            is_own: open.is_own,
            committed: open.committed.clone(),
            producers: std::mem::take(&mut open.producers),
            stage,
        });
        Some((header, open))
    }

    /// Puts the bytes of a block together: what takes time, and needs no lock.
    fn encode(&self, header: BlockHeader, mut open: OpenBlock) -> Encoded {
        let positions = std::mem::take(&mut open.adopted).into_iter().chain(std::mem::take(&mut open.streams));
        for (key, (partition, next, chain)) in positions {
            open.builder.change(Change::Streams(StreamChange::Position { key, partition, next, chain }));
        }
        let dropped = self.drop_oldest(&mut open);
        let batches = open.builder.batches() as u64;
        // Records leave room for what is small and needed to go on, and clients' commits leave room for a start.
        let leaves = match (batches, open.is_own || self.settings.drops_oldest) {
            (1.., _) => self.wal_reserve,
            (0, false) => self.own_reserve,
            (0, true) => 0,
        };
        Encoded { block: open.builder.finish(header), batches, leaves, dropped }
    }

    /// The block is durable. If another is ready or about to be, that goes first: there is somebody else to show this one.
    fn written(&self, encoded: Encoded, begun: Instant, took: Duration) {
        let goes_on = {
            let mut inner = self.inner.lock();
            let inner = &mut *inner;
            let mut sealed = inner.sealed.iter_mut().skip_while(|block| !matches!(block.stage, Stage::Writing));
            // Taken over meanwhile: whether the new owner saw this block is not known here, so it is not acknowledged.
            let Some(block) = sealed.next() else { return };
            block.stage = Stage::Written(encoded, took);
            if self.settings.encodes_ahead() && self.wal.blocks_threads() {
                inner.waits.appended(begun, took, block.batch_bytes);
            }
            sealed.next().is_some()
        };
        if goes_on {
            self.ahead.notify_one();
        } else {
            while self.publish() {}
        }
    }

    /// From here on the oldest block is seen, and those who wait for it are answered. Returns whether there was one that
    /// is durable.
    fn publish(&self) -> bool {
        let mut inner = self.inner.lock();
        let Some((sealed, Encoded { block, batches, dropped, .. }, took)) = inner.take_written() else { return false };
        let (seq, bytes) = (block.header().seq, block.bytes().len() as u64);
        inner.land(&block, &sealed, seq);
        if let Err(error) = inner.absorb(block, &self.settings) {
            // The block was built by this very code.
            error!(%error, seq, "a block that was just written cannot be read: the shard stops");
            let error = AppendError::Storage(error.to_string());
            drop(inner);
            self.stop(error.clone());
            sealed.outcome.complete(Err(error.clone()));
            sealed.committed.complete(Err(error));
            return false;
        }
        if self.settings.archived {
            inner.unshipped.push(seq, bytes as usize, Duration::ZERO);
        }
        // Looked at under the lock: what a trim made free meanwhile must not be forgotten, for a full WAL gets no next block.
        inner.wal_free_bytes = self.wal_free().0;
        inner.counters.blocks += 1;
        inner.counters.block_bytes += bytes;
        inner.counters.batches += batches;
        inner.counters.commit_seconds.add(took.as_secs_f64());
        drop(inner);
        if let Some(below) = dropped {
            self.published(below);
        }
        sealed.outcome.complete(Ok(()));
        sealed.committed.complete(Ok(()));
        self.committed.notify_waiters();
        if !self.settings.archived {
            self.safety.notify_waiters();
        }
        true
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
                open.builder.change(Change::Logs(LogChange::StartMoved { partition, offset }));
            }
        }
        Some(below)
    }

    /// The block that was being written was not stored. What is durable before it is seen all the same.
    fn fail(&self, error: WalError, block_bytes: usize) {
        while self.publish() {}
        match error {
            WalError::Full(full) => {
                // The log knows that it is full; the disk says whether that is why.
                let why = match self.wal_room(block_bytes) {
                    Err(refused @ Refused::Disk(_)) => refused,
                    _ => Refused::Wal(full.clone()),
                };
                let free = self.wal_free();
                let mut inner = self.inner.lock();
                let told = inner.full_told.replace(Instant::now());
                if told.is_none_or(|told| told.elapsed() >= FULL_TOLD_AGAIN) {
                    warn!(full, "the WAL took no block: producers are refused until there is room");
                }
                inner.wal_free_bytes = free.0;
                inner.refuse_all(&why);
                inner.refuse_records(&AppendError::Full(full));
            }
            WalError::Fenced(epoch) => {
                error!(epoch, "another node has taken this shard over: nothing more is acknowledged here");
                self.stop(AppendError::Fenced(epoch));
            }
            WalError::Closed => {
                info!("closed with a block under way: the next start finds out what became of it");
                self.stop(AppendError::Closed);
            }
            error => {
                error!(%error, "the log failed: the shard stops; start again when that is mended");
                self.stop(AppendError::Storage(error.to_string()));
            }
        }
    }

    /// Nothing more is taken, nothing in flight is acknowledged, and everybody who waits learns of it.
    pub fn stop(&self, error: AppendError) {
        self.inner.lock().stop(error);
        self.work.notify_one();
        self.ahead.notify_one();
        self.committed.notify_waiters();
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

    /// Whether a block is put together while the one before is written: it has as much as that one, and enough for its
    /// encoding to take time. With less it goes on gathering, for small blocks waste the disk.
    pub fn is_worth_encoding(&self, settings: &ShardSettings) -> bool {
        let Some(Sealed { stage: Stage::Writing, batch_bytes, .. }) = self.sealed.back() else { return false };
        let enough = (*batch_bytes).max(settings.ahead_bytes_min);
        let has_enough = |open: &OpenBlock| open.builder.batch_bytes() >= enough;
        settings.encodes_ahead() && (self.open.len() > 1 || self.open.front().is_some_and(has_enough))
    }

    /// The bytes of the oldest block that is not written, which is being written from here on. `Some(None)` while they are
    /// put together.
    fn take_ready(&mut self) -> Option<Option<Encoded>> {
        let block = self.sealed.iter_mut().find(|block| !matches!(block.stage, Stage::Written(..)))?;
        Some(match std::mem::replace(&mut block.stage, Stage::Writing) {
            Stage::Ready(encoded) => Some(encoded),
            stage => {
                block.stage = stage;
                None
            }
        })
    }

    fn make_ready(&mut self, outcome: &Arc<Outcome>, encoded: Encoded) {
        // If it is not there, an append before it failed, and it with that one.
        if let Some(block) = self.sealed.iter_mut().find(|block| Arc::ptr_eq(&block.outcome, outcome)) {
            block.stage = Stage::Ready(encoded);
        }
    }

    /// The oldest block, if it is durable and nobody has seen it.
    fn take_written(&mut self) -> Option<(Sealed, Encoded, Duration)> {
        let mut sealed = self.sealed.pop_front()?;
        match std::mem::replace(&mut sealed.stage, Stage::Encoding) {
            Stage::Written(encoded, took) => Some((sealed, encoded, took)),
            stage => {
                sealed.stage = stage;
                self.sealed.push_front(sealed);
                None
            }
        }
    }

    /// What was in flight with this block is durable now: the overlay forgets it.
    fn land(&mut self, block: &Block, sealed: &Sealed, seq: u64) {
        self.in_flight_bytes = self.in_flight_bytes.saturating_sub(sealed.batch_bytes);
        self.in_flight_changes = self.in_flight_changes.saturating_sub(sealed.changes.len());
        let overlay = &mut self.overlay;
        for entry in block.entries() {
            if let Entry::Occupied(end) = overlay.ends.entry(entry.partition)
                && end.get().1 == seq
            {
                end.remove();
            }
        }
        for key in &sealed.producers {
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
            Change::Logs(LogChange::StartMoved { partition, .. }) => {
                if let Some(state) = self.state.partition(partition) {
                    self.index.trim_partition(partition, state.log_start);
                }
            }
            Change::Topics(TopicChange::Deleted { id }) => {
                self.index.remove_topic(id);
                self.overlay.deleting.remove(&id);
                let gone = |partition: &Partition| partition.topic == id;
                self.waiters.iter().filter(|(partition, _)| gone(partition)).for_each(|(_, w)| w.notify_waiters());
                self.waiters.retain(|partition, _| !gone(partition));
            }
            Change::Streams(StreamChange::Position { key, next, .. }) => {
                if self.overlay.streams.get(&key).is_some_and(|(_, newest)| *newest == seq) {
                    self.overlay.streams.remove(&key);
                }
                if settings.archived {
                    self.unsafe_positions.push_back((seq, key, next));
                }
            }
            Change::Logs(LogChange::EpochStarted { .. }) => {
                self.waiters.values().for_each(|waiter| waiter.notify_waiters())
            }
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
        self.unshipped.shipped(self.shipped_seq);
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
