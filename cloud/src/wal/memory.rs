//! A block log in memory, bounded: for memory shards and tests. It keeps nothing beyond the process.

use std::collections::VecDeque;

use bytes::Bytes;
use parking_lot::Mutex;
use shared::log::BoxFuture;

use super::{BlockLog, Usage, WalError};

/// Blocks in memory. Clones are handles to the same blocks, so that a test can open a shard again on them.
#[derive(Debug, Clone)]
pub struct MemoryWal {
    bytes_max: u64,
    inner: std::sync::Arc<Mutex<Inner>>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Number of the first block, or of the next when there is none; `None` before the first.
    first: Option<u64>,
    blocks: VecDeque<Bytes>,
    bytes: u64,
}

impl Inner {
    fn next(&self) -> Option<u64> {
        self.first.map(|first| first + self.blocks.len() as u64)
    }

    fn find(&self, seq: u64) -> Result<Bytes, WalError> {
        let (first, next) = (self.first.unwrap_or(0), self.next().unwrap_or(0));
        let index = seq.checked_sub(first).and_then(|index| usize::try_from(index).ok());
        let block = index.and_then(|index| self.blocks.get(index));
        block.cloned().ok_or(WalError::NotThere { requested: seq, first, next })
    }
}

impl MemoryWal {
    /// An empty one that holds `bytes_max` bytes at most.
    pub fn new(bytes_max: u64) -> Self {
        Self { bytes_max, inner: Default::default() }
    }
}

impl MemoryWal {
    /// [`BlockLog::append`], which never waits here.
    pub fn append(&self, seq: u64, block: &Bytes) -> Result<(), WalError> {
        let mut inner = self.inner.lock();
        let expected = inner.next().unwrap_or(seq);
        if expected != seq {
            return Err(WalError::WrongSequence { expected, found: seq });
        }
        if inner.bytes + block.len() as u64 > self.bytes_max {
            return Err(WalError::Full(format!("{} of {} bytes in memory", inner.bytes, self.bytes_max)));
        }
        inner.first.get_or_insert(seq);
        inner.bytes += block.len() as u64;
        inner.blocks.push_back(block.clone());
        Ok(())
    }

    /// [`BlockLog::read`], which never waits here.
    pub fn read(&self, seq: u64) -> Result<Bytes, WalError> {
        self.inner.lock().find(seq)
    }

    /// [`BlockLog::read_part`], which never waits here.
    pub fn read_part(&self, seq: u64, position: u32, bytes: u32) -> Result<Bytes, WalError> {
        let block = self.inner.lock().find(seq)?;
        let (from, to) = (position as usize, position as usize + bytes as usize);
        if to > block.len() {
            return Err(WalError::Corrupt(format!(
                "block {seq} has {} bytes, {from} .. {to} were asked for",
                block.len()
            )));
        }
        Ok(block.slice(from..to))
    }
}

impl BlockLog for MemoryWal {
    fn append<'a>(&'a self, seq: u64, block: &'a Bytes) -> BoxFuture<'a, Result<(), WalError>> {
        Box::pin(async move { self.append(seq, block) })
    }

    fn bounds(&self) -> Option<(u64, u64)> {
        let inner = self.inner.lock();
        if inner.blocks.is_empty() { None } else { inner.first.zip(inner.next()) }
    }

    fn read(&self, seq: u64) -> BoxFuture<'_, Result<Bytes, WalError>> {
        Box::pin(async move { self.read(seq) })
    }

    fn read_part(&self, seq: u64, position: u32, bytes: u32) -> BoxFuture<'_, Result<Bytes, WalError>> {
        Box::pin(async move { self.read_part(seq, position, bytes) })
    }

    fn trim(&self, below: u64) -> Result<(), WalError> {
        let mut inner = self.inner.lock();
        while inner.blocks.len() > 1 && inner.first.is_some_and(|first| first < below) {
            let gone = inner.blocks.pop_front().map_or(0, |block| block.len() as u64);
            inner.bytes -= gone;
            inner.first = inner.first.map(|first| first + 1);
        }
        Ok(())
    }

    fn after_oldest(&self, bytes: u64) -> Option<u64> {
        let inner = self.inner.lock();
        let mut left = bytes;
        let gone = inner.blocks.iter().take_while(|block| {
            let goes = left > 0;
            left = left.saturating_sub(block.len() as u64);
            goes
        });
        let gone = gone.count() as u64;
        inner.first.map(|first| first + gone)
    }

    fn reset(&self, next: u64) -> Result<(), WalError> {
        *self.inner.lock() = Inner { first: Some(next), ..Inner::default() };
        Ok(())
    }

    fn settle(&self) -> Result<(), WalError> {
        Ok(())
    }

    fn usage(&self) -> Usage {
        let bytes = self.inner.lock().bytes;
        Usage {
            bytes,
            taken_bytes: bytes,
            held_bytes: bytes,
            bytes_max: self.bytes_max,
            free_bytes: self.bytes_max.saturating_sub(bytes),
        }
    }

    fn close(&self) {}
}
