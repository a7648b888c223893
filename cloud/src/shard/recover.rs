//! Bringing a shard back: snapshot, then every block after it, by the same code that a living shard commits with.

use std::sync::atomic::AtomicI64;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::BytesMut;
use parking_lot::Mutex;
use shared::batch::{Batch, BatchBuilder, Compression};
use shared::block_on::block_on;
use shared::clock::ExpiryClock;
use shared::name::TimestampMs;
use tokio::sync::Notify;
use tracing::{info, warn};

use super::flight::Inner;
use super::read::Readers;
use super::{Clock, Core, OpenError, ShardSettings, read_clock};
use crate::archive::{ColdTier, Recovered, Snapshot, StoredBlock, Tail};
use crate::block::{Block, BlockBuilder, BlockError, BlockHeader, Placed};
use crate::planted::{Bug, planted};
use crate::state::{Change, LogChange, State};
use crate::wal::BlockLog;

/// Offsets left out after a loss: more than any shard can have acknowledged and lost (design decision 10).
pub const OFFSETS_SKIPPED: i64 = 1 << 32;

/// Most bytes of the WAL that only changes may use; a small WAL keeps a sixteenth.
const WAL_RESERVE_MAX: u64 = 8 << 20;
/// The part of the reserve that is the node's own.
const OWN_RESERVE: u64 = 8;

pub fn recover(
    settings: ShardSettings,
    wal: Box<dyn BlockLog>,
    recovered: Recovered,
    cold: Arc<dyn ColdTier>,
    clock: Clock,
) -> Result<Core, OpenError> {
    let Recovered { snapshot, tail, epoch } = recovered;
    let (state, start) = match &snapshot {
        None => (State::default(), 0),
        Some(Snapshot { next_seq, state }) => (State::decode(state)?, *next_seq),
    };
    let now_ms = (clock)();
    let mut recovery = Recovery { inner: Inner::new(state, start), settings: &settings, epoch, now_ms };
    match tail {
        Tail::Local => recovery.replay_local(&*wal, start)?,
        Tail::Bucket(blocks) => recovery.restore(&*wal, start, blocks)?,
        Tail::Owned(blocks) => recovery.replay(blocks)?,
    }
    let Recovery { mut inner, epoch, .. } = recovery;
    let usage = wal.usage();
    let wal_reserve = (usage.bytes_max / 16).min(WAL_RESERVE_MAX);
    inner.wal_free_bytes = usage.free_bytes;
    info!(
        shard = settings.shard,
        next_seq = inner.next_seq,
        epoch,
        leader_epoch = inner.state.leader_epoch(),
        partitions = inner.state.partitions().count(),
        "shard recovered"
    );
    let core = Core {
        readers: Readers::new(settings.read_cache_bytes_max),
        settings,
        wal,
        expiry: Mutex::new(ExpiryClock::new(inner.state.clock(), read_clock(&clock))),
        cold,
        clock,
        epoch,
        offsets_max: AtomicI64::new(i64::MAX),
        lease: OnceLock::new(),
        wal_reserve,
        own_reserve: wal_reserve / OWN_RESERVE,
        inner: Mutex::new(inner),
        work: Notify::new(),
        ahead: Notify::new(),
        committed: Arc::new(Notify::new()),
        safety: Arc::new(Notify::new()),
    };
    core.look_at_clock();
    Ok(core)
}

/// A control batch that says nothing to any client: the commit marker of no transaction, without a timestamp.
fn beginning() -> Batch {
    const ATTRIBUTES: usize = 21;
    const CRC: std::ops::Range<usize> = 17..21;
    let mut builder = BatchBuilder::default();
    // Key: version 0, type 1 (COMMIT); value: version 0, coordinator epoch 0.
    builder.push(-1, Some(&[0, 0, 0, 1]), Some(&[0; 6]), &[]);
    let mut bytes = BytesMut::from(&builder.finish(0, Compression::None).into_bytes()[..]);
    bytes[ATTRIBUTES + 1] |= 1 << 5;
    let crc = crc32c::crc32c(&bytes[ATTRIBUTES..]);
    bytes[CRC].copy_from_slice(&crc.to_be_bytes());
    Batch::parse(bytes.freeze()).expect("a batch that was just sealed")
}

struct Recovery<'a> {
    inner: Inner,
    settings: &'a ShardSettings,
    epoch: u32,
    /// What the wall clock says of this start.
    now_ms: TimestampMs,
}

impl Recovery<'_> {
    /// The local WAL says it all.
    fn replay_local(&mut self, wal: &dyn BlockLog, start: u64) -> Result<(), OpenError> {
        let Some((first, next)) = wal.bounds() else { return Ok(()) };
        // Without a snapshot the log must begin at its beginning.
        if first > start || next < start {
            return Err(OpenError::Hole { first, next, snapshot: start });
        }
        for seq in first..next {
            let block = self.parse(seq, block_on(wal.read(seq))?)?;
            if seq >= start {
                self.absorb(seq, block)?;
            } else {
                // Part of the snapshot; its records can still be read from here.
                let state = &self.inner.state;
                self.inner.index.add(&block, |partition| state.partition(partition).map(|state| state.log_start));
                self.inner.tail.push(block, self.settings.tail_bytes_max);
            }
        }
        Ok(())
    }

    /// The blocks are the WAL: they say it all.
    fn replay(&mut self, blocks: Vec<StoredBlock>) -> Result<(), OpenError> {
        for stored in blocks {
            let (seq, block) = self.next(stored)?;
            self.absorb(seq, block)?;
        }
        Ok(())
    }

    /// The block that must come next.
    fn next(&mut self, StoredBlock { seq, bytes }: StoredBlock) -> Result<(u64, Block), OpenError> {
        if seq != self.inner.next_seq {
            return Err(OpenError::Hole { first: seq, next: seq, snapshot: self.inner.next_seq });
        }
        Ok((seq, self.parse(seq, bytes)?))
    }

    /// The bucket says it all, and acknowledged blocks may have been lost: offsets go on where none was used before.
    fn restore(&mut self, wal: &dyn BlockLog, start: u64, blocks: Vec<StoredBlock>) -> Result<(), OpenError> {
        warn!(
            shard = self.settings.shard,
            blocks = blocks.len(),
            from = start,
            "restored from the bucket: what was not shipped is lost here, edges send it again; leader epochs are raised"
        );
        // Until the log is settled a start finds it empty and comes here again: the raised epoch cannot be forgotten.
        wal.reset(start)?;
        // Fences at the end, this owner's among them: each but this one is of an owner that came this far as well, and of
        // whose blocks nothing reached the bucket. It may have acknowledged all the same, above what was left out for it.
        let mut lives = 0;
        for stored in blocks {
            let (seq, block) = self.next(stored)?;
            block_on(wal.append(seq, block.bytes()))?;
            lives = if block.is_fence() { lives + 1 } else { 0 };
            self.absorb(seq, block)?;
        }
        let lives = lives.max(1);
        // The count goes on from the newest block; none of it has passed in here.
        let now = self.inner.state.clock().map_or(self.now_ms, |clock| clock.counted_ms);
        // All of this came from the bucket.
        self.inner.ship(self.inner.next_seq);
        let mut builder = BlockBuilder::default();
        let epoch = self.inner.state.leader_epoch().saturating_add(lives);
        let skip = if planted(Bug::OffsetsReused) { 0 } else { OFFSETS_SKIPPED.saturating_mul(i64::from(lives)) };
        builder.change(Change::Logs(LogChange::EpochStarted { epoch, skip }));
        let seq = self.inner.next_seq;
        let ShardSettings { shard, nonce, .. } = *self.settings;
        let block = builder.finish(BlockHeader { shard, epoch: self.epoch, nonce, seq, append_ms: now });
        block_on(wal.append(seq, block.bytes()))?;
        self.absorb(seq, block)?;
        self.mark_beginnings(wal, now)?;
        wal.settle()?;
        Ok(())
    }

    /// Begins the new epoch of every partition with a control record, which clients skip: a consumer that reads to the end
    /// would otherwise wait at the left out offsets for a record that nobody may ever write.
    fn mark_beginnings(&mut self, wal: &dyn BlockLog, now: TimestampMs) -> Result<(), OpenError> {
        let mut builder = BlockBuilder::default();
        for (partition, state) in self.inner.state.partitions() {
            builder.push(Placed {
                partition: *partition,
                base_offset: state.high_watermark,
                leader_epoch: state.leader_epoch(),
                batch: beginning(),
            });
        }
        if builder.is_empty() {
            return Ok(());
        }
        let (seq, ShardSettings { shard, nonce, .. }) = (self.inner.next_seq, self.settings);
        let header = BlockHeader { shard: *shard, epoch: self.epoch, nonce: *nonce, seq, append_ms: now };
        let block = builder.finish(header);
        block_on(wal.append(seq, block.bytes()))?;
        self.absorb(seq, block)
    }

    fn parse(&mut self, seq: u64, bytes: bytes::Bytes) -> Result<Block, OpenError> {
        let block = Block::parse(bytes).map_err(|error| OpenError::Block { seq, error })?;
        let header = block.header();
        let wrong = |what| OpenError::Block { seq, error: BlockError::Malformed(what) };
        if header.seq != seq {
            return Err(wrong("it has another number"));
        }
        if header.shard != self.settings.shard {
            return Err(wrong("it belongs to another shard"));
        }
        self.epoch = self.epoch.max(header.epoch);
        Ok(block)
    }

    fn absorb(&mut self, seq: u64, block: Block) -> Result<(), OpenError> {
        let (bytes, append_ms, is_fence) = (block.bytes().len(), block.header().append_ms, block.is_fence());
        self.inner.absorb(block, self.settings).map_err(|error| OpenError::Block { seq, error })?;
        if self.settings.archived {
            // By the wall clock, which was so far ahead of the count then: the time off counts here. A clock that is behind
            // now makes no block younger than now, and a fence does not say when it was made.
            let ahead_ms = self.inner.state.clock().map_or(0, |clock| clock.ahead_ms);
            let age_ms = self.now_ms.saturating_sub(append_ms.saturating_add(ahead_ms)).max(0);
            let age_ms = if is_fence { 0 } else { age_ms.unsigned_abs() };
            self.inner.unshipped.push(seq, bytes, Duration::from_millis(age_ms));
        }
        Ok(())
    }
}
