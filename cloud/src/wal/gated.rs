//! A block log whose appends have to pass a gate, as those to a store that does not answer do: for tests of what goes on
//! meanwhile.

use bytes::Bytes;
use shared::log::BoxFuture;
use tokio::sync::watch;

use super::memory::MemoryWal;
use super::{BlockLog, Usage, WalError};

/// What an append has to pass.
pub trait Gate: Send + Sync + 'static {
    /// Ends when it may go on, or with what it ends with.
    fn pass(&self) -> BoxFuture<'_, Result<(), WalError>>;
    /// The log is closed: those that wait may go on.
    fn release(&self) {}
    /// Somebody has just been told how much the log keeps.
    fn told_usage(&self) {}
}

/// A [`MemoryWal`] behind a gate.
#[derive(Clone)]
pub struct Gated<G> {
    pub inner: MemoryWal,
    pub gate: G,
}

impl<G: Gate> BlockLog for Gated<G> {
    fn append<'a>(&'a self, seq: u64, block: &'a Bytes) -> BoxFuture<'a, Result<(), WalError>> {
        Box::pin(async move {
            self.gate.pass().await?;
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
        let usage = self.inner.usage();
        self.gate.told_usage();
        usage
    }

    fn hurry(&self) {
        self.gate.release();
    }

    fn close(&self) {
        self.gate.release();
    }
}

/// Open or closed.
#[derive(Clone)]
pub struct Door(watch::Sender<bool>);

impl Gate for Door {
    fn pass(&self) -> BoxFuture<'_, Result<(), WalError>> {
        Box::pin(async move {
            let mut open = self.0.subscribe();
            open.wait_for(|open| *open).await.map(drop).map_err(|_| WalError::Closed)
        })
    }

    fn release(&self) {
        self.0.send_replace(true);
    }
}

/// Appends wait while its door is closed.
pub type GatedWal = Gated<Door>;

impl GatedWal {
    /// An empty one, open.
    pub fn new(bytes_max: u64) -> Self {
        Self { inner: MemoryWal::new(bytes_max), gate: Door(watch::Sender::new(true)) }
    }

    /// From now on appends wait.
    pub fn hang(&self) {
        self.gate.0.send_replace(false);
    }

    /// Those that wait go on, and so do later ones.
    pub fn release(&self) {
        self.gate.release();
    }
}
