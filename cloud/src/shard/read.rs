//! Reading: recent blocks, then the WAL, then the cold tier, and a reader cannot tell which.
//!
//! What to read is decided under the lock (`plan`), read without it, and cut to whole batches at the end, each of which is
//! checked there and then, once, unless it was in memory. A block that was trimmed away in between is in the cold tier by
//! then: the plan is made again.
//!
//! Where a reader ended is remembered, so that the one who goes on there takes what it wants of a block and no more, and
//! its next read is begun before it asks. Nothing else that was read from a local disk is kept: the kernel's cache has it.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt as _;
use parking_lot::Mutex;
use shared::batch::{Batch, BatchError, HEADER_BYTES};
use shared::block_on::block_on;
use shared::log::memory::first_at_or_after;
use shared::log::{Bounds, BoxFuture, Read, ReadError, ReadLimits, TimePoint};
use shared::name::{Offset, Partition, TimestampMs};

use super::Core;
use super::flight::Inner;
use super::index::Run;
use super::tail::Tail;
use crate::archive::TwoQueue;
use crate::block::split_batches;
use crate::wal::{Part, WalError};

/// Runs that one read takes at most: bounds what is pinned by it.
const PIECES_MAX: usize = 1_000;
/// How often a plan is made again, because the WAL was trimmed under it or a batch is larger than the limit.
const PLANS_MAX: usize = 5;
/// Where readers ended, of so many reads.
const READERS_MAX: u64 = 4_096;
/// What is read ahead of a reader that goes on.
const AHEAD_BYTES_MAX: usize = 4 << 20;
/// Runs that are fetched at the same time for one read, where each is a request.
const RUNS_AT_ONCE: usize = 8;
/// Readers ahead of whom something is read.
const AHEAD_READS_MAX: usize = 8;
/// Reads by others after which nobody is expected any more for what was read ahead, if another reader needs its place.
const AHEAD_TURNS_MAX: u64 = 256;
/// What is read of a run at least, however small the limit: most often the first batch, which is answered anyway, is whole.
const PART_BYTES_MIN: usize = 4 << 10;

/// What is known of readers.
#[derive(Debug)]
pub struct Readers {
    ends: Mutex<TwoQueue<(Partition, Offset), End>>,
    ahead: Mutex<Ahead>,
    /// Batches that were read back from a WAL whose reads are charged, for the reader who comes for the rest of them.
    /// Apart from the tail, so that a reader far behind takes nothing from readers at the end.
    kept: Mutex<TwoQueue<(u64, u32), Bytes>>,
}

/// Where a read ended: after so many bytes of its partition's run in a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct End {
    seq: u64,
    skip: u32,
}

impl Readers {
    /// `kept_bytes_max` bounds what is kept of reads that are charged.
    pub fn new(kept_bytes_max: usize) -> Self {
        Self {
            ends: Mutex::new(TwoQueue::new(READERS_MAX)),
            ahead: Mutex::default(),
            kept: Mutex::new(TwoQueue::new(kept_bytes_max as u64)),
        }
    }
}

type Fetch = BoxFuture<'static, Result<Vec<Found>, WalError>>;

/// What is being read, or was, for readers that will come for it.
#[derive(Default)]
struct Ahead {
    /// By the read's place, the oldest first, with the turn in which it began.
    fetches: VecDeque<((Partition, Offset), u64, Fetch)>,
    turn: u64,
}

impl Ahead {
    fn claim(&mut self, reader: (Partition, Offset)) -> Option<Fetch> {
        self.turn += 1;
        let index = self.fetches.iter().position(|(key, ..)| *key == reader)?;
        self.fetches.remove(index).map(|(.., fetch)| fetch)
    }

    /// Whether there is room for one more, and none for this reader yet.
    fn has_room(&mut self, reader: (Partition, Offset)) -> bool {
        let is_full = self.fetches.len() >= AHEAD_READS_MAX;
        if is_full && self.fetches.front().is_some_and(|(_, begun, _)| self.turn - begun > AHEAD_TURNS_MAX) {
            self.fetches.pop_front();
        }
        self.fetches.len() < AHEAD_READS_MAX && self.fetches.iter().all(|(key, ..)| *key != reader)
    }

    fn add(&mut self, reader: (Partition, Offset), fetch: Fetch) {
        if self.has_room(reader) {
            self.fetches.push_back((reader, self.turn, fetch));
        }
    }
}

impl std::fmt::Debug for Ahead {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ahead({} fetches)", self.fetches.len())
    }
}

/// One run's batches, at hand or to be fetched: part of them, or all if a read is charged for whatever its size.
enum Piece {
    Here(Bytes),
    Stored(Run, Part),
}

/// Batches of a plan.
struct Found {
    bytes: Bytes,
    /// The run they come from and the part of it; `None` for those that need no check.
    stored: Option<(Run, Part)>,
}

enum Plan {
    /// Nothing at or after `from`, and nothing can be missing.
    Nothing,
    /// Records at or after `from` are where this plan did not look.
    Missing,
    Cold,
    Local(Vec<Piece>),
}

/// What a plan is made for.
struct Wish {
    partition: Partition,
    from: Offset,
    bytes_max: usize,
    /// What the first batch is known to need.
    bytes_min: usize,
    /// Where the reader ended before.
    end: Option<End>,
    /// Runs are taken whole.
    whole_runs: bool,
}

impl Piece {
    fn part(&self) -> Option<Part> {
        match self {
            Self::Here(_) => None,
            Self::Stored(_, part) => Some(*part),
        }
    }
}

impl Inner {
    fn plan(&self, wish: &Wish, cold: bool) -> Result<(Bounds, Plan), ReadError> {
        let Wish { partition, from, .. } = *wish;
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
        let pieces = wish.pieces(self.index.from(partition, from), &self.tail);
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

impl Wish {
    fn pieces<'a>(&self, runs: impl Iterator<Item = &'a Run>, tail: &Tail) -> Vec<Piece> {
        let (mut pieces, mut bytes) = (Vec::new(), 0);
        for run in runs.take(PIECES_MAX) {
            let is_first = pieces.is_empty();
            if bytes >= self.bytes_max && !is_first {
                break;
            }
            if let Some(batches) = tail.run(run) {
                // The first run may be needed in part only.
                bytes += if is_first { 0 } else { batches.len() };
                pieces.push(Piece::Here(batches));
                continue;
            }
            let part = self.part(run, is_first, self.bytes_max - bytes);
            if !is_first && (part.bytes as usize) < HEADER_BYTES {
                break;
            }
            let is_searched = is_first && run.base < self.from && part.position == run.position;
            bytes += if is_searched { 0 } else { part.bytes as usize };
            pieces.push(Piece::Stored(*run, part));
        }
        pieces
    }

    /// What to read of a run for the next `bytes` bytes of an answer.
    fn part(&self, run: &Run, is_first: bool, bytes: usize) -> Part {
        let skip = match self.end {
            Some(end) if is_first && end.seq == run.seq && end.skip < run.bytes => end.skip,
            _ => 0,
        };
        let rest = run.bytes - skip;
        let is_searched = is_first && run.base < self.from && skip == 0;
        let wanted = match is_first {
            true => bytes.max(self.bytes_min).max(PART_BYTES_MIN),
            false => bytes,
        };
        let taken = if is_searched || self.whole_runs { rest } else { rest.min(wanted.try_into().unwrap_or(rest)) };
        Part { seq: run.seq, position: run.position + skip, bytes: taken }
    }
}

/// What an assembled read came to.
enum Assembled {
    /// Batches, and where the last of them ends.
    Read(Read, Option<End>),
    /// The first batch takes so many bytes, more than were read.
    Cut(usize),
}

impl Core {
    pub async fn read(
        self: Arc<Self>,
        partition: Partition,
        from: Offset,
        limits: ReadLimits,
    ) -> Result<Read, ReadError> {
        let end = self.readers.ends.lock().get(&(partition, from)).copied();
        let whole_runs = self.wal.charges_per_read();
        let mut wish = Wish { partition, from, bytes_max: limits.bytes_max, bytes_min: 0, end, whole_runs };
        let mut begun = self.readers.ahead.lock().claim((partition, from));
        let mut cold = true;
        let mut plans = 0;
        while plans < PLANS_MAX {
            plans += 1;
            let (bounds, plan) = self.inner.lock().plan(&wish, cold)?;
            match plan {
                Plan::Nothing => return Ok(Read { batches: Vec::new(), next: bounds.high_watermark, bounds }),
                // Perhaps they moved to the archive between the two looks.
                Plan::Missing => cold = true,
                Plan::Cold => {
                    let found = self.cold.read(partition, wish.from, limits).await?;
                    if found.batches.is_empty() && found.next > wish.from {
                        // Compaction left nothing of what the archive covers from there on.
                        wish = Wish { from: found.next, end: None, ..wish };
                        begun = None;
                        plans = 0;
                        continue;
                    }
                    if !found.batches.is_empty() {
                        // The archive may have grown meanwhile, beyond what was durable when this began.
                        let high_watermark = self.inner.lock().bounds(partition)?.high_watermark;
                        let bounds = Bounds { high_watermark, ..bounds };
                        return Ok(Read { batches: found.batches, next: found.next, bounds });
                    }
                    cold = false;
                }
                Plan::Local(pieces) => match begun.take().unwrap_or_else(|| self.fetch(pieces)).await {
                    Ok(found) => match self.answer(found, &wish, bounds)? {
                        Assembled::Read(read, _) => return Ok(read),
                        Assembled::Cut(bytes) => wish.bytes_min = bytes,
                    },
                    Err(WalError::NotThere { .. }) => cold = true,
                    Err(error) => return Err(read_error(error)),
                },
            }
        }
        let text = format!("offset {from} of {partition} is neither in the WAL nor in the archive");
        Err(ReadError::Corrupt(text))
    }

    /// What was found, checked. The next read of a reader that goes on begins before the check, so that the disk is at work
    /// meanwhile.
    fn answer(self: &Arc<Self>, found: Vec<Found>, wish: &Wish, bounds: Bounds) -> Result<Assembled, ReadError> {
        if wish.end.is_some()
            && let Ok(Assembled::Read(read, Some(end))) = assemble(&found, wish, bounds, false)
        {
            self.read_ahead(&Wish { from: read.next, end: Some(end), bytes_min: 0, ..*wish });
        }
        let answer = assemble(&found, wish, bounds, true)?;
        if let Assembled::Read(read, Some(end)) = &answer {
            self.readers.ends.lock().insert((wish.partition, read.next), *end, 1);
        }
        Ok(answer)
    }

    /// Begins a read that nobody has asked for yet, where it can go on by itself and others leave room for it.
    fn read_ahead(self: &Arc<Self>, wish: &Wish) {
        let reader = (wish.partition, wish.from);
        let has_threads = self.wal.blocks_threads() && tokio::runtime::Handle::try_current().is_ok();
        if !has_threads || !self.readers.ahead.lock().has_room(reader) {
            return;
        }
        let wish = Wish { bytes_max: wish.bytes_max.min(AHEAD_BYTES_MAX), ..*wish };
        let plan = self.inner.lock().plan(&wish, true);
        if let Ok((_, Plan::Local(pieces))) = plan
            && matches!(pieces.first(), Some(Piece::Stored(..)))
        {
            let fetch = self.fetch(pieces);
            self.readers.ahead.lock().add(reader, fetch);
        }
    }

    /// Does what may wait for a disk on a thread that may, from now on; in place where there is none, when it is polled.
    fn waiting<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, WalError>> + Send + 'static,
    ) -> BoxFuture<'static, Result<T, WalError>> {
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) if self.wal.blocks_threads() => {
                let task = runtime.spawn_blocking(move || block_on(work));
                Box::pin(async move { task.await.unwrap_or(Err(WalError::Closed)) })
            }
            _ => Box::pin(work),
        }
    }

    /// All pieces, or those before the first that fails: damage hurts only who reads it.
    fn fetch(self: &Arc<Self>, pieces: Vec<Piece>) -> Fetch {
        let core = self.clone();
        if self.wal.charges_per_read() {
            return Box::pin(async move { core.fetch_runs(pieces).await });
        }
        let parts: Vec<Part> = pieces.iter().filter_map(Piece::part).collect();
        let is_at_hand = parts.is_empty();
        let read = async move { core.wal.read_parts(&parts).await };
        let read = if is_at_hand { None } else { Some(self.waiting(read)) };
        Box::pin(async move {
            let mut read = match read {
                Some(read) => read.await?,
                None => Vec::new(),
            }
            .into_iter();
            let found = pieces.into_iter().map_while(|piece| match piece {
                Piece::Here(bytes) => Some(Found { bytes, stored: None }),
                Piece::Stored(run, part) => read.next().map(|bytes| Found { bytes, stored: Some((run, part)) }),
            });
            Ok(found.collect())
        })
    }

    /// The same by whole runs, several requests at a time.
    async fn fetch_runs(&self, pieces: Vec<Piece>) -> Result<Vec<Found>, WalError> {
        let mut runs = futures_util::stream::iter(pieces)
            .map(|piece| async move {
                match piece {
                    Piece::Here(bytes) => Ok(bytes),
                    Piece::Stored(run, _) => self.load(&run).await,
                }
            })
            .buffered(RUNS_AT_ONCE);
        let mut found = Vec::new();
        while let Some(loaded) = runs.next().await {
            match loaded {
                Ok(bytes) => found.push(Found { bytes, stored: None }),
                Err(error) if found.is_empty() => return Err(error),
                Err(_) => break,
            }
        }
        Ok(found)
    }

    /// As [`Core::load`], off the async threads.
    async fn load_waiting(self: &Arc<Self>, run: Run) -> Result<Bytes, WalError> {
        let core = self.clone();
        self.waiting(async move { core.load(&run).await }).await
    }

    /// Reads a run back from the WAL and checks every batch in it.
    async fn load(&self, run: &Run) -> Result<Bytes, WalError> {
        let key = (run.seq, run.position);
        let known = self.readers.kept.lock().get(&key).cloned();
        if let Some(bytes) = known {
            return Ok(bytes);
        }
        let bytes = self.wal.read_part(run.seq, run.position, run.bytes).await?;
        let mut rest = bytes.clone();
        while let Some(_sound) = Batch::split_first(&mut rest).map_err(|error| damaged(run, &error))? {}
        if self.wal.charges_per_read() {
            self.readers.kept.lock().insert(key, bytes.clone(), bytes.len() as u64);
        }
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
                match self.load_waiting(run).await {
                    Ok(batches) => greatest = max_in(batches, log_start, greatest)?,
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
            let batches = split_batches(self.load_waiting(run).await?);
            let batches = batches.map_err(|error| WalError::Corrupt(error.to_string()))?;
            if let Some(found) = batches.iter().find_map(&judge) {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }
}

/// The greatest timestamp at or after `from` in these batches, if it beats what is known.
fn max_in(batches: Bytes, from: Offset, mut greatest: Option<TimePoint>) -> Result<Option<TimePoint>, ReadError> {
    for batch in split_batches(batches).map_err(|error| ReadError::Corrupt(error.to_string()))? {
        let beats = |point: &TimePoint| {
            greatest.is_none_or(|known| (point.timestamp, -point.offset) > (known.timestamp, -known.offset))
        };
        greatest = latest(&batch, from).filter(beats).or(greatest);
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

/// Puts together what was found, whole batches from the one that contains the offset asked for up to the limit, and
/// checks them if it is to. Damage behind the first batch ends the read; who comes for it hears of it.
fn assemble(found: &[Found], wish: &Wish, bounds: Bounds, is_checked: bool) -> Result<Assembled, ReadError> {
    let mut read = Read { batches: Vec::new(), next: wish.from, bounds };
    let (mut taken, mut end) = (0, None);
    for found in found {
        let cut = found.cut(wish.from, wish.bytes_max, taken, is_checked);
        if !cut.batches.is_empty() {
            taken += cut.batches.len();
            read.next = cut.next;
            end = found.stored.map(|(run, part)| {
                let end = part.position - run.position + cut.batches.end as u32;
                End { seq: run.seq, skip: end }
            });
            read.batches.push(found.bytes.slice(cut.batches));
        }
        match cut.stop {
            None => {}
            Some(Stop::Lacks(bytes)) if taken == 0 => return Ok(Assembled::Cut(bytes)),
            Some(Stop::Damaged(error)) if taken == 0 => return Err(read_error(error)),
            Some(_) => break,
        }
    }
    Ok(Assembled::Read(read, end))
}

/// What is answered of one piece.
struct Cut {
    batches: Range<usize>,
    /// The offset after them.
    next: Offset,
    /// Why nothing is answered of what follows.
    stop: Option<Stop>,
}

enum Stop {
    Full,
    /// The next batch goes on where the part that was read ends: so many bytes of it were needed.
    Lacks(usize),
    Damaged(WalError),
}

impl Found {
    /// Batches from the one that contains `from` within the limit, of which `taken` bytes are used; checked, if they are to
    /// be and nobody has.
    fn cut(&self, from: Offset, bytes_max: usize, taken: usize, is_checked: bool) -> Cut {
        let (mut begin, mut end, mut next) = (None, 0, from);
        let stop = loop {
            let rest = self.bytes.get(end..).unwrap_or_default();
            if rest.is_empty() {
                break None;
            }
            let Some((length, last)) = frame(rest) else { break Some(self.lack(end)) };
            if last >= from {
                let before = taken + end - begin.unwrap_or(end);
                if before > 0 && before + length > bytes_max {
                    break Some(Stop::Full);
                }
                if is_checked && let Err(error) = self.check(end..end + length) {
                    break Some(Stop::Damaged(error));
                }
                begin.get_or_insert(end);
                next = last.saturating_add(1);
            }
            end += length;
        };
        Cut { batches: begin.unwrap_or(end)..end, next, stop }
    }

    fn check(&self, batch: Range<usize>) -> Result<(), WalError> {
        let Some((run, _)) = &self.stored else { return Ok(()) };
        Batch::parse(self.bytes.slice(batch)).map(drop).map_err(|error| damaged(run, &error))
    }

    /// The batch at `start` is not all here: it goes on behind the part, if that is not the end of the run.
    fn lack(&self, start: usize) -> Stop {
        let rest = self.bytes.get(start..).unwrap_or_default();
        let Some((run, part)) = &self.stored else {
            return Stop::Damaged(WalError::Corrupt("a batch in memory is cut".into()));
        };
        let left = (run.position as usize + run.bytes as usize).saturating_sub(part.position as usize + start);
        let length = frame_length(rest).unwrap_or(HEADER_BYTES);
        if length <= rest.len() || length > left {
            return Stop::Damaged(damaged(run, &BatchError::Cut { expected: length, found: left }));
        }
        Stop::Lacks(start + length)
    }
}

fn damaged(run: &Run, error: &BatchError) -> WalError {
    WalError::Corrupt(format!("block {} of the WAL, offsets {} ..= {}: {error}", run.seq, run.base, run.last))
}

/// Length and last offset of the batch these bytes begin with, if they hold all of it.
fn frame(bytes: &[u8]) -> Option<(usize, Offset)> {
    let base = i64::from_be_bytes(*bytes.first_chunk::<8>()?);
    let delta = i32::from_be_bytes(*bytes.get(23..27)?.first_chunk::<4>()?);
    let length = frame_length(bytes)?;
    (length >= HEADER_BYTES && length <= bytes.len()).then_some((length, base.saturating_add(i64::from(delta))))
}

fn frame_length(bytes: &[u8]) -> Option<usize> {
    let length = i32::from_be_bytes(*bytes.get(8..12)?.first_chunk::<4>()?);
    usize::try_from(length).ok()?.checked_add(12)
}

fn read_error(error: WalError) -> ReadError {
    match error {
        WalError::Corrupt(text) => ReadError::Corrupt(text),
        WalError::Closed => ReadError::Closed,
        error => ReadError::Storage(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use shared::log::conformance::block_on;
    use shared::name::TopicId;

    use super::*;

    fn reader(n: u64) -> (Partition, Offset) {
        (Partition { topic: TopicId([1; 16]), index: 0 }, n as Offset)
    }

    fn fetch(bytes: &'static [u8]) -> Fetch {
        Box::pin(async move { Ok(vec![Found { bytes: Bytes::from_static(bytes), stored: None }]) })
    }

    #[test]
    fn what_is_read_ahead_is_for_so_many_readers_and_given_once_to_who_comes_for_it() {
        let mut ahead = Ahead::default();
        for n in 0..20 {
            ahead.add(reader(n), fetch(b"seen"));
        }
        assert_eq!(ahead.fetches.len(), AHEAD_READS_MAX);
        assert!(!ahead.has_room(reader(20)));
        let found = block_on(ahead.claim(reader(3)).unwrap()).unwrap();
        assert_eq!(found[0].bytes, b"seen"[..]);
        assert!(ahead.claim(reader(3)).is_none() && ahead.claim(reader(9)).is_none());
        assert!(ahead.has_room(reader(20)));
        assert!(!ahead.has_room(reader(4)), "something is read for that one already");
    }

    #[test]
    fn who_does_not_come_back_makes_room_when_others_need_it() {
        let mut ahead = Ahead::default();
        for n in 0..AHEAD_READS_MAX as u64 {
            ahead.add(reader(n), fetch(b""));
        }
        for _ in 0..AHEAD_TURNS_MAX {
            assert!(ahead.claim(reader(99)).is_none());
            assert!(!ahead.has_room(reader(99)));
        }
        assert!(ahead.claim(reader(99)).is_none());
        ahead.add(reader(99), fetch(b""));
        assert!(ahead.claim(reader(99)).is_some());
        assert!(ahead.claim(reader(0)).is_none(), "the oldest went");
        assert!(ahead.claim(reader(1)).is_some());
    }
}
