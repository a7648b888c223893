//! Reading: recent blocks, then the WAL, then the cold tier, and a reader cannot tell which.
//!
//! What to read is decided under the lock (`plan`), read without it, and cut to whole batches at the end. A block that was
//! trimmed away in between is in the cold tier by then: the plan is made again.

use std::sync::Arc;

use bytes::Bytes;
use shared::batch::Batch;
use shared::block_on::block_on;
use shared::log::memory::first_at_or_after;
use shared::log::{Bounds, Read, ReadError, ReadLimits, TimePoint};
use shared::name::{Offset, Partition, TimestampMs};

use super::Core;
use super::flight::Inner;
use super::index::Run;
use crate::archive::TwoQueue;
use crate::block::split_batches;
use crate::wal::WalError;

/// Runs that one read takes at most: bounds what is pinned by it.
const PIECES_MAX: usize = 1_000;
/// How often a plan is made again because the WAL was trimmed under it.
const PLANS_MAX: usize = 5;

/// Batches that were read back from the WAL, for the reader who comes for the rest of them. Apart from the tail, so that a
/// reader far behind takes nothing from readers at the end.
#[derive(Debug)]
pub struct ReadCache(TwoQueue<(u64, u32), Bytes>);

impl ReadCache {
    pub fn new(bytes_max: usize) -> Self {
        Self(TwoQueue::new(bytes_max as u64))
    }

    fn find(&mut self, run: &Run) -> Option<Bytes> {
        self.0.get(&(run.seq, run.position)).cloned()
    }

    fn keep(&mut self, run: &Run, bytes: &Bytes) {
        self.0.insert((run.seq, run.position), bytes.clone(), bytes.len() as u64);
    }
}

/// One run's batches, at hand or to be fetched.
enum Piece {
    Here(Bytes),
    Stored(Run),
}

enum Plan {
    /// Nothing at or after `from`, and nothing can be missing.
    Nothing,
    /// Records at or after `from` are where this plan did not look.
    Missing,
    Cold,
    Local(Vec<Piece>),
}

impl Inner {
    fn plan(
        &self,
        partition: Partition,
        from: Offset,
        limits: ReadLimits,
        cold: bool,
    ) -> Result<(Bounds, Plan), ReadError> {
        let bounds = self.bounds(partition)?;
        if from < bounds.log_start || from > bounds.high_watermark {
            return Err(ReadError::OffsetOutOfRange { requested: from, bounds });
        }
        if from == bounds.high_watermark {
            return Ok((bounds, Plan::Nothing));
        }
        if cold && self.index.first(partition).is_none_or(|first| from < first) {
            return Ok((bounds, Plan::Cold));
        }
        let (mut pieces, mut bytes) = (Vec::new(), 0);
        for run in self.index.from(partition, from).take(PIECES_MAX) {
            // The first run may be needed in part only.
            if bytes >= limits.bytes_max && !pieces.is_empty() {
                break;
            }
            bytes += if pieces.is_empty() { 0 } else { run.bytes as usize };
            pieces.push(self.tail.run(run).map_or(Piece::Stored(*run), Piece::Here));
        }
        // A reader is led over a hole only where offsets were left out when an epoch began.
        let next = self.index.from(partition, from).next().map_or(bounds.high_watermark, |run| run.base);
        let whole = next <= from || self.state.partition(partition).is_some_and(|state| state.left_out(from, next));
        Ok((
            bounds,
            match pieces.is_empty() {
                _ if !whole => Plan::Missing,
                true => Plan::Nothing,
                false => Plan::Local(pieces),
            },
        ))
    }
}

impl Core {
    pub async fn read(
        self: Arc<Self>,
        partition: Partition,
        from: Offset,
        limits: ReadLimits,
    ) -> Result<Read, ReadError> {
        let mut cold = true;
        for _ in 0..PLANS_MAX {
            let (bounds, plan) = self.inner.lock().plan(partition, from, limits, cold)?;
            match plan {
                Plan::Nothing => return Ok(Read { batches: Vec::new(), next: bounds.high_watermark, bounds }),
                // Perhaps they moved to the archive between the two looks.
                Plan::Missing => cold = true,
                Plan::Cold => {
                    let found = self.cold.read(partition, from, limits).await?;
                    if !found.batches.is_empty() {
                        // What came and was archived while this was fetched may be among it.
                        let bounds = self.inner.lock().bounds(partition)?;
                        return Ok(Read { batches: found.batches, next: found.next, bounds });
                    }
                    cold = false;
                }
                Plan::Local(pieces) => match self.fetch(pieces).await {
                    Ok(pieces) => return assemble(pieces, from, limits, bounds),
                    Err(WalError::NotThere { .. }) => cold = true,
                    Err(error) => return Err(read_error(error)),
                },
            }
        }
        let text = format!("offset {from} of {partition} is neither in the WAL nor in the archive");
        Err(ReadError::Corrupt(text))
    }

    /// Gets what is not at hand, off the async threads where that waits for a disk.
    async fn fetch(self: &Arc<Self>, pieces: Vec<Piece>) -> Result<Vec<Bytes>, WalError> {
        let at_hand = pieces.iter().all(|piece| matches!(piece, Piece::Here(_)));
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) if !at_hand && self.wal.blocks_threads() => {
                let core = self.clone();
                let fetched = runtime.spawn_blocking(move || block_on(core.fetch_here(pieces))).await;
                fetched.unwrap_or(Err(WalError::Closed))
            }
            _ => self.fetch_here(pieces).await,
        }
    }

    /// All pieces, or those before the first that fails: damage hurts only who reads it.
    async fn fetch_here(&self, pieces: Vec<Piece>) -> Result<Vec<Bytes>, WalError> {
        let mut fetched = Vec::with_capacity(pieces.len());
        for piece in pieces {
            match piece {
                Piece::Here(bytes) => fetched.push(bytes),
                Piece::Stored(run) => match self.load(&run).await {
                    Ok(bytes) => fetched.push(bytes),
                    Err(error) if fetched.is_empty() => return Err(error),
                    Err(_) => break,
                },
            }
        }
        Ok(fetched)
    }

    /// Reads a run back from the WAL and checks every batch in it.
    async fn load(&self, run: &Run) -> Result<Bytes, WalError> {
        let known = self.read_cache.lock().find(run);
        if let Some(bytes) = known {
            return Ok(bytes);
        }
        let bytes = self.wal.read_part(run.seq, run.position, run.bytes).await?;
        let mut rest = bytes.clone();
        while let Some(_sound) = Batch::split_first(&mut rest).map_err(|error| {
            WalError::Corrupt(format!("block {} of the WAL, offsets {} ..= {}: {error}", run.seq, run.base, run.last))
        })? {}
        self.read_cache.lock().keep(run, &bytes);
        Ok(bytes)
    }

    pub async fn find_time(
        self: Arc<Self>,
        partition: Partition,
        at: TimestampMs,
    ) -> Result<Option<TimePoint>, ReadError> {
        for _ in 0..PLANS_MAX {
            let log_start = self.inner.lock().bounds(partition)?.log_start;
            if let Some(found) = self.cold.find_time(partition, log_start, at).await? {
                return Ok(Some(found));
            }
            let late = self.runs(partition, log_start, |run| run.max_timestamp >= at);
            match self.search(late, |batch| first_at_or_after(batch, log_start, at)).await {
                Err(WalError::NotThere { .. }) => {}
                result => return result.map_err(read_error),
            }
        }
        Err(ReadError::Storage("the WAL was trimmed under the search again and again".into()))
    }

    pub async fn max_time(self: Arc<Self>, partition: Partition) -> Result<Option<TimePoint>, ReadError> {
        for _ in 0..PLANS_MAX {
            let log_start = self.inner.lock().bounds(partition)?.log_start;
            let mut greatest = self.cold.max_time(partition, log_start).await?;
            let mut runs = self.runs(partition, log_start, |_| true);
            runs.sort_by_key(|run| (std::cmp::Reverse(run.max_timestamp), run.base));
            let mut trimmed = false;
            for run in runs {
                // Runs come by falling greatest timestamp: no later one can beat what was found.
                let known = greatest.map_or(i64::MIN, |point| point.timestamp);
                let ties = known == run.max_timestamp && greatest.is_some_and(|point| point.offset > run.base);
                if greatest.is_some() && run.max_timestamp <= known && !ties {
                    break;
                }
                match self.fetch(vec![Piece::Stored(run)]).await {
                    Ok(pieces) => greatest = max_in(pieces, log_start, greatest)?,
                    Err(WalError::NotThere { .. }) => trimmed = true,
                    Err(error) => return Err(read_error(error)),
                }
            }
            if !trimmed {
                return Ok(greatest);
            }
        }
        Err(ReadError::Storage("the WAL was trimmed under the search again and again".into()))
    }

    fn runs(&self, partition: Partition, from: Offset, keep: impl Fn(&Run) -> bool) -> Vec<Run> {
        self.inner.lock().index.from(partition, from).filter(|run| keep(run)).copied().collect()
    }

    /// The first batch of these runs that `judge` finds something in.
    async fn search(
        self: &Arc<Self>,
        runs: Vec<Run>,
        judge: impl Fn(&Batch) -> Option<TimePoint>,
    ) -> Result<Option<TimePoint>, WalError> {
        for run in runs {
            for bytes in self.fetch(vec![Piece::Stored(run)]).await? {
                let batches = split_batches(bytes).map_err(|error| WalError::Corrupt(error.to_string()))?;
                if let Some(found) = batches.iter().find_map(&judge) {
                    return Ok(Some(found));
                }
            }
        }
        Ok(None)
    }
}

/// The greatest timestamp at or after `from` in these batches, if it beats what is known.
fn max_in(pieces: Vec<Bytes>, from: Offset, mut greatest: Option<TimePoint>) -> Result<Option<TimePoint>, ReadError> {
    for bytes in pieces {
        let batches = split_batches(bytes).map_err(|error| ReadError::Corrupt(error.to_string()))?;
        for batch in batches {
            let beats = |point: &TimePoint| {
                greatest.is_none_or(|known| (point.timestamp, -point.offset) > (known.timestamp, -known.offset))
            };
            greatest = latest(&batch, from).filter(beats).or(greatest);
        }
    }
    Ok(greatest)
}

/// The record of a batch at or after `from` with the greatest timestamp, the first of several.
fn latest(batch: &Batch, from: Offset) -> Option<TimePoint> {
    if batch.last_offset() < from {
        return None;
    }
    if let Some(found) = first_at_or_after(batch, from, batch.max_timestamp()) {
        return Some(found);
    }
    // The record that bears the header's timestamp lies below `from`.
    let records = batch.records(shared::limits::BATCH_UNPACKED_BYTES_MAX).ok()?;
    let kept = records.map_while(Result::ok).filter(|record| record.offset >= from);
    kept.min_by_key(|record| (std::cmp::Reverse(record.timestamp), record.offset)).map(|record| TimePoint {
        offset: record.offset,
        timestamp: record.timestamp,
        leader_epoch: batch.leader_epoch(),
    })
}

/// Cuts pieces to whole batches from the one that contains `from` up to the limit.
fn assemble(pieces: Vec<Bytes>, from: Offset, limits: ReadLimits, bounds: Bounds) -> Result<Read, ReadError> {
    let mut read = Read { batches: Vec::new(), next: from, bounds };
    let mut taken = 0;
    for piece in pieces {
        let (mut begin, mut end) = (None, 0);
        let mut is_full = false;
        while end < piece.len() {
            let (length, last) = frame(&piece[end..]).ok_or_else(|| ReadError::Corrupt("a batch is cut".into()))?;
            if last >= from {
                if taken > 0 && taken + length > limits.bytes_max {
                    is_full = true;
                    break;
                }
                begin.get_or_insert(end);
                taken += length;
                read.next = last + 1;
            }
            end += length;
        }
        if let Some(begin) = begin {
            read.batches.push(piece.slice(begin..end));
        }
        if is_full {
            break;
        }
    }
    Ok(read)
}

/// Length and last offset of the batch these bytes begin with.
fn frame(bytes: &[u8]) -> Option<(usize, Offset)> {
    let base = i64::from_be_bytes(*bytes.first_chunk::<8>()?);
    let length = i32::from_be_bytes(*bytes.get(8..12)?.first_chunk::<4>()?);
    let delta = i32::from_be_bytes(*bytes.get(23..27)?.first_chunk::<4>()?);
    let length = usize::try_from(length).ok()?.checked_add(12)?;
    (length <= bytes.len()).then_some((length, base.saturating_add(i64::from(delta))))
}

fn read_error(error: WalError) -> ReadError {
    match error {
        WalError::Corrupt(text) => ReadError::Corrupt(text),
        WalError::Closed => ReadError::Closed,
        error => ReadError::Storage(error.to_string()),
    }
}
