//! A block log that can be made to hang, as a store that does not answer makes one: for tests of what goes on meanwhile.

use bytes::Bytes;
use shared::log::BoxFuture;
use tokio::sync::watch;

use super::memory::MemoryWal;
use super::{BlockLog, Usage, WalError};

/// A [`MemoryWal`] whose appends wait while its gate is closed.
#[derive(Clone)]
pub struct GatedWal {
    inner: MemoryWal,
    open: watch::Sender<bool>,
}

impl GatedWal {
    /// An empty one, open.
    pub fn new(bytes_max: u64) -> Self {
        Self { inner: MemoryWal::new(bytes_max), open: watch::Sender::new(true) }
    }

    /// From now on appends wait.
    pub fn hang(&self) {
        self.open.send_replace(false);
    }

    /// Those that wait go on, and so do later ones.
    pub fn release(&self) {
        self.open.send_replace(true);
    }
}

impl BlockLog for GatedWal {
    fn append<'a>(&'a self, seq: u64, block: &'a Bytes) -> BoxFuture<'a, Result<(), WalError>> {
        Box::pin(async move {
            let mut open = self.open.subscribe();
            open.wait_for(|open| *open).await.map_err(|_| WalError::Closed)?;
            self.inner.append(seq, block)
        })
    }

    fn bounds(&self) -> Option<(u64, u64)> {
        self.inner.bounds()
    }

    fn read(&self, seq: u64) -> BoxFuture<'_, Result<Bytes, WalError>> {
        BlockLog::read(&self.inner, seq)
    }

    fn read_part(&self, seq: u64, position: u32, bytes: u32) -> BoxFuture<'_, Result<Bytes, WalError>> {
        BlockLog::read_part(&self.inner, seq, position, bytes)
    }

    fn trim(&self, below: u64) -> Result<(), WalError> {
        self.inner.trim(below)
    }

    fn reset(&self, next: u64) -> Result<(), WalError> {
        self.inner.reset(next)
    }

    fn settle(&self) -> Result<(), WalError> {
        self.inner.settle()
    }

    fn usage(&self) -> Usage {
        self.inner.usage()
    }

    fn hurry(&self) {
        self.release();
    }

    fn close(&self) {
        self.release();
    }
}
