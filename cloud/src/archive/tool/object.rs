//! One segment object: read in windows, so that memory is bounded whatever its size, and checked against its manifest.

use std::collections::HashMap;

use bytes::{Bytes, BytesMut};
use object_store::path::Path;
use shared::batch::{Batch, BatchError, HEADER_BYTES};
use shared::name::{Offset, Partition};

use super::Finding;
use crate::archive::{Store, StoreError};
use crate::segment::{Run, RunIndex, SegmentError, TRAILER_BYTES, Trailer};

/// Read at a time, where there is so much.
const WINDOW_BYTES: u64 = 4 << 20;
/// Largest batch that is read: far above what a broker takes.
const BATCH_BYTES_MAX: u64 = 256 << 20;
/// Largest index of one run that is read: that of a run of 20 GiB.
const INDEX_BYTES_MAX: u32 = 64 << 20;
/// Largest directory that is read: that of 800,000 runs.
const DIRECTORY_BYTES_MAX: u32 = 64 << 20;

/// Where an object's bytes come from.
pub(super) enum Source<'a> {
    /// The store.
    Stored(&'a Store, &'a Path),
    /// They were read already.
    Held(Bytes),
}

impl Source<'_> {
    async fn range(&self, range: std::ops::Range<u64>) -> Result<Bytes, StoreError> {
        match self {
            Self::Stored(store, key) => store.get_range_paced(key, range).await,
            Self::Held(bytes) => {
                let fits = range.start <= range.end && range.end <= bytes.len() as u64;
                let cut = || StoreError::Failed {
                    operation: "GET",
                    key: Path::default(),
                    reason: "beyond the end of the object".into(),
                };
                if fits { Ok(bytes.slice(range.start as usize..range.end as usize)) } else { Err(cut()) }
            }
        }
    }
}

/// A part of an object that moves forward over it; what was read and is still ahead is not read again.
pub(super) struct Window<'a> {
    source: &'a Source<'a>,
    /// Nothing beyond is read ahead.
    end: u64,
    start: u64,
    bytes: Bytes,
}

impl<'a> Window<'a> {
    pub fn new(source: &'a Source<'a>, end: u64) -> Self {
        Self { source, end, start: 0, bytes: Bytes::new() }
    }

    pub async fn range(&mut self, from: u64, to: u64) -> Result<Bytes, StoreError> {
        let held_end = self.start + self.bytes.len() as u64;
        if from < self.start || to > held_end {
            let kept = if (self.start..held_end).contains(&from) {
                self.bytes.slice((from - self.start) as usize..)
            } else {
                Bytes::new()
            };
            let read_from = from + kept.len() as u64;
            let read_to = to.max(self.end.min(read_from.saturating_add(WINDOW_BYTES)));
            let fresh = self.source.range(read_from..read_to).await?;
            self.bytes = if kept.is_empty() {
                fresh
            } else {
                let mut joined = BytesMut::with_capacity(kept.len() + fresh.len());
                joined.extend_from_slice(&kept);
                joined.extend_from_slice(&fresh);
                joined.freeze()
            };
            self.start = from;
        }
        let at = (from - self.start) as usize;
        Ok(self.bytes.slice(at..at + (to - from) as usize))
    }
}

/// Why a run could not be read on.
#[derive(Debug)]
pub(super) enum RunError {
    /// The store failed.
    Store(StoreError),
    /// The bytes at this position of the object are no batch.
    Batch(u64, BatchError),
}

/// Reads the batches of one run, one after the other, each checked.
pub(super) struct RunReader<'r> {
    run: &'r Run,
    /// Position within the run.
    at: u64,
}

impl<'r> RunReader<'r> {
    /// Begins at a batch boundary of the run.
    pub fn new(run: &'r Run, at: u64) -> Self {
        Self { run, at }
    }

    /// The next batch and its position within the run.
    pub async fn next(&mut self, window: &mut Window<'_>) -> Result<Option<(u64, Batch)>, RunError> {
        let left = self.run.length.saturating_sub(self.at);
        if left == 0 {
            return Ok(None);
        }
        let position = self.run.position + self.at;
        let broken = |error| RunError::Batch(position, error);
        if left < HEADER_BYTES as u64 {
            return Err(broken(BatchError::Cut { expected: HEADER_BYTES, found: left as usize }));
        }
        let head = window.range(position, position + HEADER_BYTES as u64).await.map_err(RunError::Store)?;
        let length = head.get(8..12).and_then(|length| <[u8; 4]>::try_from(length).ok());
        let length = length.and_then(|length| u64::try_from(i32::from_be_bytes(length)).ok());
        let length = length.ok_or(broken(BatchError::Malformed("negative length")))? + 12;
        if length > left.min(BATCH_BYTES_MAX) {
            return Err(broken(BatchError::Cut { expected: length as usize, found: left as usize }));
        }
        let bytes = window.range(position, position + length.max(HEADER_BYTES as u64)).await;
        let batch = Batch::parse(bytes.map_err(RunError::Store)?).map_err(broken)?;
        let at = self.at;
        self.at += length;
        Ok(Some((at, batch)))
    }
}

/// Where offsets of a partition are missing within a run: the end of what was before, and what begins next.
pub(super) type Hole = (Partition, u64, Offset, Offset);

/// Checks an object of `size` bytes: trailer, directory, and of the runs that the manifest names all indexes and batches.
/// Holes between batches of a run are handed back, since state decides whether they are right.
pub(super) async fn check_object(
    source: &Source<'_>,
    key: &Path,
    size: u64,
    named: &[(Partition, Run)],
    findings: &mut Vec<Finding>,
) -> Result<Vec<Hole>, StoreError> {
    let mut holes = Vec::new();
    let damaged = |position: u64, error: &dyn std::fmt::Display| Finding::at(key, position, error);
    let trailer_at = size.saturating_sub(TRAILER_BYTES as u64);
    let trailer = source.range(trailer_at..size).await?;
    let trailer = match Trailer::decode(&trailer, size) {
        Ok(trailer) if trailer.directory_length <= DIRECTORY_BYTES_MAX => trailer,
        Ok(_) => {
            findings.push(damaged(trailer_at, &"its directory is larger than it can rightly be"));
            return Ok(holes);
        }
        Err(error) => {
            findings.push(damaged(trailer_at, &error));
            return Ok(holes);
        }
    };
    let directory_at = trailer.directory_position;
    let directory = source.range(directory_at..directory_at + u64::from(trailer.directory_length)).await?;
    // A directory that does not hold is a finding; the manifest names the runs without it.
    let directory = match trailer.directory(&directory) {
        Ok(directory) => {
            let places = directory.into_iter().map(|(partition, run)| ((partition, run.base), run));
            Some(places.collect::<HashMap<(Partition, Offset), Run>>())
        }
        Err(error) => {
            findings.push(damaged(directory_at, &error));
            None
        }
    };
    let mut named: Vec<&(Partition, Run)> = named.iter().collect();
    named.sort_by_key(|(_, run)| (run.position, run.length));
    for pair in named.windows(2) {
        if let [(_, before), (partition, run)] = pair
            && before.position.saturating_add(before.length) > run.position
        {
            findings.push(damaged(run.position, &format_args!("the run of {partition} begins within another run")));
        }
    }
    let mut data = Window::new(source, trailer.data_bytes);
    let mut indexes = Window::new(source, trailer.directory_position);
    for (partition, run) in named {
        if directory.as_ref().is_some_and(|entries| entries.get(&(*partition, run.base)) != Some(run)) {
            let what = format!("the manifest names a run of {partition} that the directory does not have so");
            findings.push(Finding::at(key, run.position, what));
        }
        check_run(&mut data, &mut indexes, key, *partition, run, findings, &mut holes).await?;
    }
    Ok(holes)
}

async fn check_run(
    data: &mut Window<'_>,
    indexes: &mut Window<'_>,
    key: &Path,
    partition: Partition,
    run: &Run,
    findings: &mut Vec<Finding>,
    holes: &mut Vec<Hole>,
) -> Result<(), StoreError> {
    let index = match read_index(indexes, run).await {
        Ok(index) => Some(index),
        Err(IndexError::Store(error)) => return Err(error),
        Err(IndexError::Segment(error)) => {
            findings.push(Finding::at(key, run.index_position, format!("index of {partition}: {error}")));
            None
        }
    };
    let mut wrong = |position: u64, what: String| findings.push(Finding::at(key, position, what));
    let stretches: Vec<_> = index.iter().flat_map(|index| index.stretches(run, run.base)).collect();
    let mut stretches = stretches.into_iter().peekable();
    let mut epochs = index.iter().flat_map(|index| index.epochs().iter().copied());
    let (mut in_stretch, mut greatest, mut epoch) = (None::<(u64, i64, i64)>, i64::MIN, None);
    let mut next = run.base;
    let mut reader = RunReader::new(run, 0);
    loop {
        let (at, batch) = match reader.next(data).await {
            Ok(Some(found)) => found,
            Ok(None) => break,
            Err(RunError::Store(error)) => return Err(error),
            Err(RunError::Batch(position, error)) => {
                wrong(position, format!("{partition}, batch expected at offset {next}: {error}"));
                return Ok(());
            }
        };
        let position = run.position + at;
        if batch.base_offset() < next {
            wrong(
                position,
                format!("{partition}: batch begins at offset {}, {next} was expected", batch.base_offset()),
            );
        } else if batch.base_offset() > next {
            holes.push((partition, position, next, batch.base_offset()));
        }
        next = batch.last_offset().saturating_add(1);
        greatest = greatest.max(batch.max_timestamp());
        if index.is_some() {
            if stretches.peek().is_some_and(|stretch| stretch.start <= at) {
                close_stretch(in_stretch.take(), run, partition, &mut wrong);
                if let Some(stretch) = stretches.next() {
                    if (stretch.start, stretch.base) != (at, batch.base_offset()) {
                        let what = format!("index of {partition} points to no batch at {}", stretch.start);
                        wrong(run.index_position, what);
                    }
                    in_stretch = Some((at, stretch.max_timestamp, i64::MIN));
                }
            }
            if let Some((_, _, found)) = &mut in_stretch {
                *found = (*found).max(batch.max_timestamp());
            }
            if epoch != Some(batch.leader_epoch()) {
                epoch = Some(batch.leader_epoch());
                if epochs.next() != Some((batch.leader_epoch(), batch.base_offset())) {
                    wrong(
                        run.index_position,
                        format!("index of {partition} lacks an epoch at {}", batch.base_offset()),
                    );
                }
            }
        }
    }
    close_stretch(in_stretch, run, partition, &mut wrong);
    if stretches.next().is_some() || epochs.next().is_some() {
        wrong(run.index_position, format!("index of {partition} has entries beyond the run's batches"));
    }
    if next != run.next || greatest != run.max_timestamp {
        let what = format!(
            "the run of {partition} ends at offset {next} with greatest timestamp {greatest}, its manifest says {} and {}",
            run.next, run.max_timestamp
        );
        wrong(run.position, what);
    }
    Ok(())
}

fn close_stretch(
    stretch: Option<(u64, i64, i64)>,
    run: &Run,
    partition: Partition,
    wrong: &mut impl FnMut(u64, String),
) {
    if let Some((at, said, found)) = stretch.filter(|(_, said, found)| said != found) {
        let what = format!("index of {partition} says {said} is the greatest timestamp from {at} on, it is {found}");
        wrong(run.index_position, what);
    }
}

/// Why an index could not be had.
pub(super) enum IndexError {
    /// The store failed.
    Store(StoreError),
    /// It does not hold.
    Segment(SegmentError),
}

/// The index of a run.
pub(super) async fn read_index(window: &mut Window<'_>, run: &Run) -> Result<RunIndex, IndexError> {
    if run.index_length > INDEX_BYTES_MAX {
        return Err(IndexError::Segment(SegmentError::Damaged("index is larger than it can rightly be")));
    }
    let end = run.index_position + u64::from(run.index_length);
    let bytes = window.range(run.index_position, end).await.map_err(IndexError::Store)?;
    RunIndex::decode(&bytes, run).map_err(IndexError::Segment)
}
