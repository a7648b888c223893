//! The object engine: every block is one object, made by one conditional PUT at `wal/{seq}`. Nothing local is needed.
//!
//! The condition is the fence. A new owner has made a block of its own at the number that this one would use next, and that
//! block is never deleted: this one's next PUT finds the name taken and the log stops, however long its node was away.
//!
//! A PUT whose outcome is not known is made again with the same bytes, which carry the writer's nonce, until it is known:
//! the shard waits, and its producers are told that their time is up. It is never given up for another block of the same
//! number, for the first may still arrive. Objects are deleted by the archive's collection alone, see `archive::splitter`.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use shared::log::BoxFuture;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::warn;

use super::{BlockLog, Usage, WalError, is_sound};
use crate::archive::{Store, StoreError, backoff};
use crate::block::Block;
use crate::manifest::{Keys, OBJECT_BYTES_MAX};

/// How an object log behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ObjectWalSettings {
    /// Bytes of blocks that are not in segments yet; beyond it appends are refused with [`WalError::Full`].
    pub bytes_max: u64,
    /// The pause before a PUT of unknown outcome is made again, doubled for each further one.
    pub backoff: Duration,
    /// How long a log that is about to be closed waits for the outcome of its last PUT.
    pub finish: Duration,
}

impl Default for ObjectWalSettings {
    fn default() -> Self {
        Self { bytes_max: 2 << 30, backoff: Duration::from_millis(200), finish: Duration::from_secs(5) }
    }
}

/// Blocks as objects.
#[derive(Debug)]
pub struct ObjectWal {
    store: Arc<Store>,
    keys: Keys,
    settings: ObjectWalSettings,
    held: Mutex<Held>,
    /// When an append under way is given up, once the log was hurried.
    deadline: watch::Sender<Option<Instant>>,
}

/// What is known of the objects.
#[derive(Debug, Default)]
struct Held {
    /// Number of the first block, or of the next when there is none; `None` before the first.
    first: Option<u64>,
    sizes: VecDeque<u32>,
    bytes: u64,
    /// Why nothing more is taken.
    stopped: Option<WalError>,
}

impl Held {
    fn next(&self) -> Option<u64> {
        self.first.map(|first| first + self.sizes.len() as u64)
    }

    fn push(&mut self, seq: u64, bytes: u32) {
        self.first.get_or_insert(seq);
        self.bytes += u64::from(bytes);
        self.sizes.push_back(bytes);
    }

    fn size(&self, seq: u64) -> Result<u32, WalError> {
        let index = seq.checked_sub(self.first.unwrap_or(0)).and_then(|index| usize::try_from(index).ok());
        let size = index.and_then(|index| self.sizes.get(index)).copied();
        size.ok_or_else(|| self.not_there(seq))
    }

    fn not_there(&self, requested: u64) -> WalError {
        WalError::NotThere { requested, first: self.first.unwrap_or(0), next: self.next().unwrap_or(0) }
    }
}

impl ObjectWal {
    /// A log that goes on after `blocks`, which are in the store: number and size of each, ascending without a hole.
    pub fn new(
        store: Arc<Store>,
        keys: Keys,
        settings: ObjectWalSettings,
        blocks: impl IntoIterator<Item = (u64, u32)>,
    ) -> Self {
        let mut held = Held::default();
        blocks.into_iter().for_each(|(seq, bytes)| held.push(seq, bytes));
        Self { store, keys, settings, held: Mutex::new(held), deadline: watch::Sender::new(None) }
    }

    fn stop(&self, error: WalError) -> WalError {
        self.held.lock().stopped.get_or_insert(error).clone()
    }

    /// Makes the object, however often that must be tried.
    async fn put(&self, seq: u64, block: &Bytes) -> Result<(), WalError> {
        let key = self.keys.wal(seq);
        let mut failures = 0;
        loop {
            match self.store.create_at_once(&key, std::slice::from_ref(block)).await {
                Ok(()) => return Ok(()),
                Err(StoreError::Taken(_)) => return Err(WalError::Fenced(self.owner_of(seq).await)),
                Err(error @ StoreError::Failed { .. }) => {
                    failures += 1;
                    warn!(%error, seq, failures, "a block's PUT has no known outcome yet; it is made again");
                    tokio::time::sleep(backoff(self.settings.backoff, failures)).await;
                }
                Err(error) => return Err(self.failed(error)),
            }
        }
    }

    fn failed(&self, error: StoreError) -> WalError {
        let reason = match error {
            // Of an object that is to be made this is what a store says whose bucket is gone.
            StoreError::Missing(key) => format!("it has no place for {key}: is the bucket there?"),
            error => error.to_string(),
        };
        WalError::Store { store: self.store.describe(), reason }
    }

    /// The epoch of whoever's block has this number; 0 if it cannot be read.
    async fn owner_of(&self, seq: u64) -> u32 {
        let found = self.store.get(&self.keys.wal(seq), OBJECT_BYTES_MAX).await;
        let block = found.ok().and_then(|mut bytes| Block::split_first(&mut bytes).ok().flatten());
        block.map_or(0, |block| block.header().epoch)
    }

    /// Resolves when a log that was hurried has waited long enough.
    async fn out_of_patience(&self) {
        let mut deadline = self.deadline.subscribe();
        // The sender lives as long as `self`.
        let at = deadline.wait_for(Option::is_some).await.ok().and_then(|at| *at);
        if let Some(at) = at {
            tokio::time::sleep_until(at).await;
        }
    }

    async fn append_now(&self, seq: u64, block: &Bytes) -> Result<(), WalError> {
        let bytes =
            u32::try_from(block.len()).map_err(|_| WalError::Full(format!("a block of {} bytes", block.len())))?;
        {
            let held = self.held.lock();
            if let Some(stopped) = &held.stopped {
                return Err(stopped.clone());
            }
            let expected = held.next().unwrap_or(seq);
            if expected != seq {
                return Err(WalError::WrongSequence { expected, found: seq });
            }
            if held.bytes + u64::from(bytes) > self.settings.bytes_max {
                let text = format!("{} of {} bytes wait to become segments", held.bytes, self.settings.bytes_max);
                return Err(WalError::Full(text));
            }
        }
        let put = tokio::select! {
            biased;
            put = self.put(seq, block) => put,
            // What became of it is for the next owner to find out; it is not acknowledged.
            () = self.out_of_patience() => Err(WalError::Closed),
        };
        put.map_err(|error| self.stop(error))?;
        self.held.lock().push(seq, bytes);
        Ok(())
    }

    async fn read_now(&self, seq: u64, range: std::ops::Range<u64>) -> Result<Bytes, WalError> {
        match self.store.get_range(&self.keys.wal(seq), range).await {
            Ok(bytes) => Ok(bytes),
            // Collected since: its batches are in segments.
            Err(StoreError::Missing(_)) => Err(self.held.lock().not_there(seq)),
            Err(error) => Err(self.failed(error)),
        }
    }
}

impl BlockLog for ObjectWal {
    fn append<'a>(&'a self, seq: u64, block: &'a Bytes) -> BoxFuture<'a, Result<(), WalError>> {
        Box::pin(self.append_now(seq, block))
    }

    fn bounds(&self) -> Option<(u64, u64)> {
        let held = self.held.lock();
        if held.sizes.is_empty() { None } else { held.first.zip(held.next()) }
    }

    fn read(&self, seq: u64) -> BoxFuture<'_, Result<Bytes, WalError>> {
        Box::pin(async move {
            let size = self.held.lock().size(seq)?;
            let block = self.read_now(seq, 0..u64::from(size)).await?;
            if !is_sound(&block) {
                let key = self.keys.wal(seq);
                return Err(WalError::Corrupt(format!("{key} is damaged: its checksum does not hold")));
            }
            Ok(block)
        })
    }

    fn read_part(&self, seq: u64, position: u32, bytes: u32) -> BoxFuture<'_, Result<Bytes, WalError>> {
        Box::pin(async move {
            let size = self.held.lock().size(seq)?;
            let (from, to) = (u64::from(position), u64::from(position) + u64::from(bytes));
            if to > u64::from(size) {
                let text = format!("block {seq} has {size} bytes, {from} .. {to} were asked for");
                return Err(WalError::Corrupt(text));
            }
            self.read_now(seq, from..to).await
        })
    }

    fn charges_per_read(&self) -> bool {
        true
    }

    fn trim(&self, below: u64) -> Result<(), WalError> {
        let mut held = self.held.lock();
        while !held.sizes.is_empty() && held.first.is_some_and(|first| first < below) {
            let gone = held.sizes.pop_front().unwrap_or(0);
            held.bytes -= u64::from(gone);
            held.first = held.first.map(|first| first + 1);
        }
        Ok(())
    }

    /// Objects are never thrown away for a restore: they are what a restore begins from.
    fn reset(&self, _next: u64) -> Result<(), WalError> {
        Err(WalError::Corrupt("a log of objects cannot be reset".into()))
    }

    fn settle(&self) -> Result<(), WalError> {
        Ok(())
    }

    /// What is trimmed is deleted, the newest block too; the manifest and the claims tell a new shard from an old one.
    fn keeps_newest(&self) -> bool {
        false
    }

    fn usage(&self) -> Usage {
        let (bytes, bytes_max) = (self.held.lock().bytes, self.settings.bytes_max);
        Usage { bytes, taken_bytes: bytes, held_bytes: bytes, bytes_max, free_bytes: bytes_max.saturating_sub(bytes) }
    }

    fn hurry(&self) {
        let at = Instant::now() + self.settings.finish;
        self.deadline.send_if_modified(|deadline| deadline.replace(deadline.unwrap_or(at)).is_none());
    }

    fn close(&self) {
        self.stop(WalError::Closed);
    }
}

#[cfg(test)]
mod tests;
