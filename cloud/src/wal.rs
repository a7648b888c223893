//! The block log: where a shard's blocks become durable.
//!
//! A [`BlockLog`] keeps numbered blocks in order. It knows nothing of what is in them but that a block ends with the
//! CRC-32C of what comes before (see `block`). One append is in flight at a time, made by the shard's committer.
//!
//! Three engines: `file` (fsync on a local disk), `object` (one conditional PUT per block) and `memory` (nothing outlives
//! the process). They differ in what "durable" means and in nothing else.

use bytes::Bytes;
use shared::log::BoxFuture;

pub mod disk;
pub mod file;
pub mod memory;
pub mod object;

#[cfg(test)]
pub(crate) mod gated;
#[cfg(test)]
pub(crate) mod powercut;

/// Numbered blocks, durable when [`BlockLog::append`] resolves.
pub trait BlockLog: Send + Sync + 'static {
    /// Appends a block. `seq` is the number after the newest block's, or the first of a log without blocks. When
    /// this is `Ok`, the block survives what the engine promises to survive; after [`WalError::Full`] nothing of it was
    /// stored and a later append of the same number may succeed; after any other error the log takes nothing more until it
    /// is opened again.
    fn append<'a>(&'a self, seq: u64, block: &'a Bytes) -> BoxFuture<'a, Result<(), WalError>>;

    /// Whether a block of `block` bytes can be appended so that `leave` bytes more can be after it, come what may. Makes the
    /// room where an engine has to; [`WalError::Full`] if it cannot. Waits where an append does.
    fn make_room<'a>(&'a self, block: u64, leave: u64) -> BoxFuture<'a, Result<(), WalError>> {
        let Usage { free_bytes, .. } = self.usage();
        let needed = block.saturating_add(leave);
        let room = if needed <= free_bytes {
            Ok(())
        } else {
            Err(WalError::Full(format!("there is room for {free_bytes} bytes, and {leave} of them are kept")))
        };
        Box::pin(std::future::ready(room))
    }

    /// Number of the first block that can be read, and the number after the newest; `None` without blocks.
    fn bounds(&self) -> Option<(u64, u64)>;

    /// A whole block.
    fn read(&self, seq: u64) -> BoxFuture<'_, Result<Bytes, WalError>>;

    /// `bytes` bytes of a block from `position` on.
    fn read_part(&self, seq: u64, position: u32, bytes: u32) -> BoxFuture<'_, Result<Bytes, WalError>>;

    /// Parts of blocks, in order: all of them, or those before the first that cannot be read, but one at least.
    fn read_parts<'a>(&'a self, parts: &'a [Part]) -> BoxFuture<'a, Result<Vec<Bytes>, WalError>> {
        Box::pin(async move {
            let mut read = Vec::with_capacity(parts.len());
            for part in parts {
                match self.read_part(part.seq, part.position, part.bytes).await {
                    Ok(bytes) => read.push(bytes),
                    Err(error) if read.is_empty() => return Err(error),
                    Err(_) => break,
                }
            }
            Ok(read)
        })
    }

    /// Whether a read costs a request and a round trip however small it is: then more is read at a time than is asked for,
    /// and kept for the reader who comes for the rest.
    fn charges_per_read(&self) -> bool {
        false
    }

    /// Whether reads and appends wait for a disk inside the first poll: then they belong off the async threads, and what shall
    /// go on during an append needs a thread of its own.
    fn blocks_threads(&self) -> bool {
        false
    }

    /// Blocks below `below` are not needed any more. The newest block is kept all the same if the log
    /// [keeps it](BlockLog::keeps_newest).
    fn trim(&self, below: u64) -> Result<(), WalError>;

    /// The first block that would be kept if the oldest went, `bytes` of them or a little more; `None` where an engine
    /// does not let its oldest go.
    fn after_oldest(&self, _bytes: u64) -> Option<u64> {
        None
    }

    /// Throws all blocks away; the next append has the number `next`. Until [`BlockLog::settle`] is called the log is
    /// provisional: a start before that finds it empty.
    fn reset(&self, next: u64) -> Result<(), WalError>;

    /// What was appended since [`BlockLog::reset`] is whole and stays.
    fn settle(&self) -> Result<(), WalError>;

    /// Whether the newest block is never trimmed: where an empty log must not be taken for a new one.
    fn keeps_newest(&self) -> bool {
        true
    }

    /// How much is kept.
    fn usage(&self) -> Usage;

    /// What [`BlockLog::make_room`] would say, as far as that can be told without making any. Asks the disk, where there is
    /// one, how much it has left.
    fn room(&self, bytes: u64, leave: u64) -> Result<(), NoRoom> {
        let free = self.usage().free_bytes;
        if free < bytes.saturating_add(leave) {
            Err(NoRoom::Bound(format!("the log has room for {free} bytes more")))
        } else {
            Ok(())
        }
    }

    /// How much the disk has left that the log grows on; `None` where there is none, or it does not say.
    fn disk_free_bytes(&self) -> Option<u64> {
        None
    }

    /// The log is about to be closed: an append that may never end has a few seconds left.
    fn hurry(&self) {}

    /// Ends background work and lets go of locks. What is called afterwards is refused.
    fn close(&self);
}

/// Bytes of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// The block.
    pub seq: u64,
    /// Where in it.
    pub position: u32,
    /// How many.
    pub bytes: u32,
}

/// How much a block log keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct Usage {
    /// Bytes of blocks that were not trimmed.
    pub bytes: u64,
    /// The same with what an engine keeps beside each block and rounds it up to: what they take of the bound.
    pub taken_bytes: u64,
    /// Bytes taken on the disk or in memory, ready to be written again included.
    pub held_bytes: u64,
    /// The bound on them.
    pub bytes_max: u64,
    /// How much can be appended before the log is full, about: frames and rounding are not counted.
    pub free_bytes: u64,
}

/// Why a block would not be taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoRoom {
    /// The bound in the settings.
    #[error("{0}")]
    Bound(String),
    /// The disk itself.
    #[error("{0}")]
    Disk(String),
}

/// Why a block log did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WalError {
    /// No room for the block; nothing of it was stored.
    #[error("the WAL is full: {0}")]
    Full(String),
    /// Not the number that comes next: another owner wrote, or the caller is wrong.
    #[error("block {found} was to be appended where {expected} comes next")]
    WrongSequence {
        /// What comes next.
        expected: u64,
        /// What was asked for.
        found: u64,
    },
    /// The block was trimmed or never written.
    #[error("block {requested} is not there, the WAL holds {first} .. {next}")]
    NotThere {
        /// What was asked for.
        requested: u64,
        /// The first there is.
        first: u64,
        /// After the last there is.
        next: u64,
    },
    /// Stored bytes are not those that were written.
    #[error("{0}")]
    Corrupt(String),
    /// The disk failed; what was not acknowledged before may or may not be there.
    #[error("the disk failed: {0}")]
    Io(String),
    /// The object store failed, or does not know us; what was not acknowledged before may or may not be there.
    #[error("the object store {store} failed: {reason}")]
    Store {
        /// Which.
        store: String,
        /// What came of the request.
        reason: String,
    },
    /// Another process uses the same directory.
    #[error("{0} is in use by another process: stop it, or give this one a data_dir of its own")]
    Locked(String),
    /// Another owner has taken the log over.
    #[error("another node has taken this log over with epoch {0}")]
    Fenced(u32),
    /// The log was closed.
    #[error("the WAL is closed")]
    Closed,
}

/// Whether a block ends with the checksum of what comes before.
fn is_sound(block: &[u8]) -> bool {
    block
        .split_last_chunk::<4>()
        .is_some_and(|(body, crc)| !body.is_empty() && crc32c::crc32c(body) == u32::from_be_bytes(*crc))
}
