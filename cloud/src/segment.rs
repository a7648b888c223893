//! Segments: runs of one partition's batches with a sparse index.
//!
//! A segment object holds the runs of one or many partitions. A run is plain RecordBatch v2, byte for byte as its
//! producer or gateway sealed it, so that a tool that knows Kafka's format reads it without knowing ours. This module
//! is pure: it turns batches into objects and bytes into indexes, and knows nothing of stores or manifests.
//!
//! ```text
//! +-------+-------+-----+---------+---------+-----+-----------+---------+
//! | run 0 | run 1 | ... | index 0 | index 1 | ... | directory | trailer |
//! +-------+-------+-----+---------+---------+-----+-----------+---------+
//!
//! index      envelope with magic TRBI, version 1; its payload is sections: kind u16, length u32, that many bytes
//!            kind 1 offsets   per entry: base offset i64, position within the run u64; the first is the run's first
//!                             batch, the next begins at least 8 KiB later; none for a run without batches
//!            kind 2 times     per entry of kind 1: greatest timestamp i64 of the batches from it to the next entry
//!            kind 3 epochs    leader epoch i32, offset i64 of its first batch in this run
//!            kind 4 is kept for aborted transactions; a reader skips kinds that it does not know
//! directory  envelope with magic TRBD, version 1; its payload is 80 bytes per run: topic id 16, partition u32,
//!            position u64, length u64, index position u64, index length u32, base offset i64, next offset i64,
//!            greatest timestamp i64, newest append time i64
//! trailer    36 bytes: directory position u64, directory length u32, bytes of all runs u64, then the head of these 20
//!            bytes with magic TRBS, version 1: an object is known by its last bytes
//! ```
//! All integers big-endian. Positions and lengths of index and directory include the heads of their
//! [`envelope`](crate::envelope)s. A run covers the offsets from its base offset to its next offset, whatever batches
//! compaction left in it: there may be none at either end, and none at all. A manifest names run and index by position, so
//! a reader of one quiet partition in an object of thousands fetches its own index only; the directory is for those who
//! have an object and no manifest.

use std::ops::Range;

use bytes::{Buf, BufMut, Bytes};
use shared::batch::{Batch, BatchError};
use shared::name::{Offset, Partition, TimestampMs, TopicId};

use crate::envelope::{EnvelopeError, EnvelopeFormat, HEAD_BYTES};

/// Bytes of runs between two entries of the sparse index, at least.
pub const INDEX_INTERVAL_BYTES: u64 = 8 * 1024;
/// Bytes of the trailer.
pub const TRAILER_BYTES: usize = 20 + HEAD_BYTES;

const TRAILER: EnvelopeFormat = EnvelopeFormat { magic: *b"TRBS", version: 1, kind: 0 };
const DIRECTORY: EnvelopeFormat = EnvelopeFormat { magic: *b"TRBD", version: 1, kind: 0 };
const INDEX: EnvelopeFormat = EnvelopeFormat { magic: *b"TRBI", version: 1, kind: 0 };
/// Bytes of one run's entry in the directory.
pub const DIRECTORY_ENTRY_BYTES: usize = 80;
const SECTION_OFFSETS: u16 = 1;
const SECTION_TIMES: u16 = 2;
const SECTION_EPOCHS: u16 = 3;

/// Why bytes are not a segment, or batches do not make one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SegmentError {
    /// Its trailer, directory or index does not hold.
    #[error("segment cannot be read: {0}")]
    Envelope(#[from] EnvelopeError),
    /// A field is wrong; the text says which.
    #[error("segment is damaged: {0}")]
    Damaged(&'static str),
    /// A batch within a run is not whole.
    #[error("segment holds a bad batch: {0}")]
    Batch(#[from] BatchError),
    /// Batches do not ascend.
    #[error("batch begins at {found}, the run is already at {next}")]
    Order {
        /// Where the run ends so far.
        next: Offset,
        /// The batch's base offset.
        found: Offset,
    },
    /// Batches lie beyond the offsets that the run is said to cover, or it covers none.
    #[error("batches end at {next}, the run is said to cover {covered:?}")]
    Covered {
        /// What it is said to cover.
        covered: Range<Offset>,
        /// Where its batches end.
        next: Offset,
    },
}

/// Where a run and its index lie in their object, and what the run spans.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Run {
    /// Position of its first batch in the object.
    pub position: u64,
    /// Bytes of batches.
    pub length: u64,
    /// Position of its index in the object.
    pub index_position: u64,
    /// Bytes of its index.
    pub index_length: u32,
    /// The first offset it covers: the base offset of its first batch, or less where compaction left nothing of what was before.
    pub base: Offset,
    /// The offset after the last that it covers.
    pub next: Offset,
    /// The greatest record timestamp.
    pub max_timestamp: TimestampMs,
    /// When its newest block was appended.
    pub appended_ms: TimestampMs,
}

/// A finished segment: what to PUT, in pieces that are not copied, and what is in it.
#[derive(Debug, Clone)]
pub struct Segment {
    /// The object's bytes.
    pub chunks: Vec<Bytes>,
    /// Its runs, in the order they were written.
    pub runs: Vec<(Partition, Run)>,
    /// Total bytes.
    pub bytes: u64,
}

/// Builds a segment, run after run.
#[derive(Debug, Default)]
pub struct SegmentWriter {
    chunks: Vec<Bytes>,
    position: u64,
    runs: Vec<(Partition, Run, RunIndex)>,
}

impl SegmentWriter {
    /// Bytes of runs so far.
    pub fn bytes(&self) -> u64 {
        self.position
    }

    /// Whether it holds no run.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Adds a partition's run that covers the offsets `covered`: slices of whole batches, ascending within it, each with its
    /// block's append time. Every batch passes the storage check on the way. The batches need not fill the range, and there
    /// need be none: what the range covers and no batch has was compacted away.
    pub fn run(
        &mut self,
        partition: Partition,
        covered: Range<Offset>,
        slices: impl IntoIterator<Item = (Bytes, TimestampMs)>,
    ) -> Result<(), SegmentError> {
        let mut index = RunIndex::default();
        let mut run = Run {
            position: self.position,
            length: 0,
            index_position: 0,
            index_length: 0,
            base: covered.start,
            next: covered.end,
            max_timestamp: TimestampMs::MIN,
            appended_ms: TimestampMs::MIN,
        };
        let (mut chunks, mut next) = (Vec::new(), covered.start);
        for (slice, appended_ms) in slices {
            let mut rest = slice.clone();
            while let Some(batch) = Batch::split_first(&mut rest)? {
                if batch.base_offset() < next {
                    return Err(SegmentError::Order { next, found: batch.base_offset() });
                }
                index.push(&batch, run.length);
                run.length += batch.len() as u64;
                next = batch.last_offset().saturating_add(1);
                run.max_timestamp = run.max_timestamp.max(batch.max_timestamp());
            }
            run.appended_ms = run.appended_ms.max(appended_ms);
            chunks.push(slice);
        }
        if next > covered.end || covered.is_empty() {
            return Err(SegmentError::Covered { covered, next });
        }
        self.position += run.length;
        self.chunks.append(&mut chunks);
        self.runs.push((partition, run, index));
        Ok(())
    }

    /// Writes indexes, directory and trailer.
    pub fn finish(mut self) -> Segment {
        let mut tail = Vec::new();
        let mut runs = Vec::with_capacity(self.runs.len());
        for (partition, mut run, index) in self.runs {
            let bytes = index.encode();
            run.index_position = self.position + tail.len() as u64;
            run.index_length = bytes.len() as u32;
            tail.extend_from_slice(&bytes);
            runs.push((partition, run));
        }
        let directory = encode_directory(&runs);
        let directory_position = self.position + tail.len() as u64;
        tail.extend_from_slice(&directory);
        let mut trailer = Vec::with_capacity(TRAILER_BYTES);
        trailer.put_u64(directory_position);
        trailer.put_u32(directory.len() as u32);
        trailer.put_u64(self.position);
        tail.extend_from_slice(&trailer);
        tail.extend_from_slice(&TRAILER.head(&[], &trailer));
        let bytes = self.position + tail.len() as u64;
        self.chunks.push(tail.into());
        Segment { chunks: self.chunks, runs, bytes }
    }
}

fn encode_directory(runs: &[(Partition, Run)]) -> Bytes {
    let mut out = Vec::with_capacity(runs.len() * DIRECTORY_ENTRY_BYTES);
    for (partition, run) in runs {
        out.put_slice(&partition.topic.0);
        out.put_u32(partition.index);
        out.put_u64(run.position);
        out.put_u64(run.length);
        out.put_u64(run.index_position);
        out.put_u32(run.index_length);
        out.put_i64(run.base);
        out.put_i64(run.next);
        out.put_i64(run.max_timestamp);
        out.put_i64(run.appended_ms);
    }
    DIRECTORY.seal(&out)
}

/// Where an object's directory lies, from its last [`TRAILER_BYTES`] bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trailer {
    /// Position of the directory.
    pub directory_position: u64,
    /// Its bytes.
    pub directory_length: u32,
    /// Bytes of all runs together, from the object's first byte on.
    pub data_bytes: u64,
}

impl Trailer {
    /// Reads the trailer of an object of `object_bytes` bytes.
    pub fn decode(bytes: &[u8], object_bytes: u64) -> Result<Self, SegmentError> {
        let (mut fields, head) = bytes.split_at(bytes.len().saturating_sub(HEAD_BYTES));
        TRAILER.check(head, &[], fields)?;
        if bytes.len() != TRAILER_BYTES {
            return Err(SegmentError::Damaged("trailer length"));
        }
        let (directory_position, directory_length) = (fields.get_u64(), fields.get_u32());
        let data_bytes = fields.get_u64();
        let end = directory_position.checked_add(u64::from(directory_length) + TRAILER_BYTES as u64);
        if end != Some(object_bytes) || data_bytes > directory_position {
            return Err(SegmentError::Damaged("trailer fields"));
        }
        Ok(Self { directory_position, directory_length, data_bytes })
    }

    /// Reads the directory: every run of the object.
    pub fn directory(&self, bytes: &[u8]) -> Result<Vec<(Partition, Run)>, SegmentError> {
        let entries = DIRECTORY.open(bytes)?;
        if !entries.len().is_multiple_of(DIRECTORY_ENTRY_BYTES) {
            return Err(SegmentError::Damaged("directory length"));
        }
        let mut runs = Vec::with_capacity(entries.len() / DIRECTORY_ENTRY_BYTES);
        for mut entry in entries.chunks_exact(DIRECTORY_ENTRY_BYTES) {
            let mut topic = [0; 16];
            entry.copy_to_slice(&mut topic);
            let partition = Partition { topic: TopicId(topic), index: entry.get_u32() };
            let run = Run {
                position: entry.get_u64(),
                length: entry.get_u64(),
                index_position: entry.get_u64(),
                index_length: entry.get_u32(),
                base: entry.get_i64(),
                next: entry.get_i64(),
                max_timestamp: entry.get_i64(),
                appended_ms: entry.get_i64(),
            };
            let data_end = run.position.checked_add(run.length);
            let index_end = run.index_position.checked_add(u64::from(run.index_length));
            let inside = data_end.is_some_and(|end| end <= self.data_bytes)
                && run.index_position >= self.data_bytes
                && index_end.is_some_and(|end| end <= self.directory_position);
            if !inside || run.next <= run.base {
                return Err(SegmentError::Damaged("directory entry"));
            }
            runs.push((partition, run));
        }
        Ok(runs)
    }
}

/// The sparse index of one run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RunIndex {
    entries: Vec<Entry>,
    epochs: Vec<(i32, Offset)>,
}

/// A stretch of a run: from one indexed batch to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    base: Offset,
    position: u64,
    max_timestamp: TimestampMs,
}

/// The bytes of one stretch, relative to the run's position; the last one ends with the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch {
    /// Base offset of its first batch.
    pub base: Offset,
    /// Position of its first byte within the run.
    pub start: u64,
    /// Position after its last byte within the run.
    pub end: u64,
    /// The greatest timestamp in it.
    pub max_timestamp: TimestampMs,
}

impl RunIndex {
    fn push(&mut self, batch: &Batch, position: u64) {
        match self.entries.last_mut() {
            Some(last) if position < last.position + INDEX_INTERVAL_BYTES => {
                last.max_timestamp = last.max_timestamp.max(batch.max_timestamp());
            }
            _ => self.entries.push(Entry { base: batch.base_offset(), position, max_timestamp: batch.max_timestamp() }),
        }
        if self.epochs.last().is_none_or(|(epoch, _)| *epoch != batch.leader_epoch()) {
            self.epochs.push((batch.leader_epoch(), batch.base_offset()));
        }
    }

    fn encode(&self) -> Bytes {
        let mut out = Vec::with_capacity(18 + self.entries.len() * 24 + self.epochs.len() * 12);
        out.put_u16(SECTION_OFFSETS);
        out.put_u32(self.entries.len() as u32 * 16);
        for entry in &self.entries {
            out.put_i64(entry.base);
            out.put_u64(entry.position);
        }
        out.put_u16(SECTION_TIMES);
        out.put_u32(self.entries.len() as u32 * 8);
        self.entries.iter().for_each(|entry| out.put_i64(entry.max_timestamp));
        out.put_u16(SECTION_EPOCHS);
        out.put_u32(self.epochs.len() as u32 * 12);
        for (epoch, start) in &self.epochs {
            out.put_i32(*epoch);
            out.put_i64(*start);
        }
        INDEX.seal(&out)
    }

    /// Reads the index of `run`.
    pub fn decode(bytes: &[u8], run: &Run) -> Result<Self, SegmentError> {
        let mut rest = INDEX.open(bytes)?;
        let (mut offsets, mut times, mut epochs): (&[u8], &[u8], &[u8]) = (&[], &[], &[]);
        while !rest.is_empty() {
            let kind = rest.try_get_u16().map_err(|_| SegmentError::Damaged("index is cut"))?;
            let length = rest.try_get_u32().map_err(|_| SegmentError::Damaged("index is cut"))?;
            let section;
            (section, rest) =
                rest.split_at_checked(length as usize).ok_or(SegmentError::Damaged("index section is cut"))?;
            match kind {
                SECTION_OFFSETS => offsets = section,
                SECTION_TIMES => times = section,
                SECTION_EPOCHS => epochs = section,
                _ => {}
            }
        }
        let whole = offsets.len().is_multiple_of(16) && times.len() * 2 == offsets.len();
        if !whole || !epochs.len().is_multiple_of(12) {
            return Err(SegmentError::Damaged("index sections disagree"));
        }
        let entries: Vec<Entry> = offsets
            .chunks_exact(16)
            .zip(times.chunks_exact(8))
            .map(|(mut offset, mut time)| Entry {
                base: offset.get_i64(),
                position: offset.get_u64(),
                max_timestamp: time.get_i64(),
            })
            .collect();
        // None where nothing is left of what the run covers.
        let begins = entries.first().map_or(run.length == 0, |first| first.position == 0 && first.base >= run.base);
        let ascends = entries.windows(2).all(|pair| match pair {
            [a, b] => a.base < b.base && a.position < b.position,
            _ => true,
        });
        let ends = entries.last().is_none_or(|last| last.position < run.length && last.base < run.next);
        if !begins || !ascends || !ends {
            return Err(SegmentError::Damaged("index entries"));
        }
        let epochs = epochs.chunks_exact(12).map(|mut epoch| (epoch.get_i32(), epoch.get_i64())).collect();
        Ok(Self { entries, epochs })
    }

    /// The stretch that holds `from`, or the first one after it; `None` beyond the last.
    pub fn at_offset(&self, run: &Run, from: Offset) -> Option<Stretch> {
        if from >= run.next {
            return None;
        }
        let after = self.entries.partition_point(|entry| entry.base <= from);
        self.stretch(run, after.saturating_sub(1))
    }

    /// Stretches that hold a record at or after offset `from`, in order.
    pub fn stretches<'a>(&'a self, run: &'a Run, from: Offset) -> impl Iterator<Item = Stretch> + 'a {
        let first = self.entries.partition_point(|entry| entry.base <= from).saturating_sub(1);
        let end = if from >= run.next { first } else { self.entries.len() };
        (first..end).filter_map(|number| self.stretch(run, number))
    }

    fn stretch(&self, run: &Run, number: usize) -> Option<Stretch> {
        let entry = self.entries.get(number)?;
        let end = self.entries.get(number + 1).map_or(run.length, |next| next.position);
        Some(Stretch { base: entry.base, start: entry.position, end, max_timestamp: entry.max_timestamp })
    }

    /// The end of the last stretch that ends within `bytes_max` of `start`; the end of the stretch at `start` at least.
    pub fn reach(&self, run: &Run, start: u64, bytes_max: u64) -> u64 {
        let limit = start.saturating_add(bytes_max);
        if run.length <= limit {
            return run.length;
        }
        let beyond = self.entries.partition_point(|entry| entry.position <= limit);
        match self.entries.get(beyond.saturating_sub(1)) {
            Some(entry) if entry.position > start => entry.position,
            _ => self.entries.get(beyond).map_or(run.length, |entry| entry.position),
        }
    }

    /// The end of the stretch that `position` lies in or ends with.
    pub fn end_of(&self, run: &Run, position: u64) -> u64 {
        let after = self.entries.partition_point(|entry| entry.position < position);
        self.entries.get(after).map_or(run.length, |entry| entry.position)
    }

    /// Leader epochs in the run and where each begins.
    pub fn epochs(&self) -> &[(i32, Offset)] {
        &self.epochs
    }

    /// Roughly what it takes in memory.
    pub fn memory_bytes(&self) -> usize {
        self.entries.len() * size_of::<Entry>() + self.epochs.len() * size_of::<(i32, Offset)>() + 64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use shared::batch::{BatchBuilder, Compression};
    use shared::log::conformance;

    fn partition(number: u8) -> Partition {
        Partition { topic: TopicId([number; 16]), index: u32::from(number) }
    }

    /// A batch of `records` records of `value_bytes` bytes at `base`, timestamps counting up from `base` * 10.
    fn batch(base: Offset, records: i64, value_bytes: usize, epoch: i32) -> Bytes {
        let mut builder = BatchBuilder::default();
        for n in 0..records {
            builder.push((base + n) * 10, None, Some(&vec![b'v'; value_bytes]), &[]);
        }
        let mut bytes = builder.finish(base, Compression::None).into_bytes().to_vec();
        Batch::place(&mut bytes, base, epoch);
        bytes.into()
    }

    fn whole(segment: &Segment) -> Vec<u8> {
        segment.chunks.concat()
    }

    fn open(object: &[u8]) -> Result<Vec<(Partition, Run, RunIndex)>, SegmentError> {
        let cut = object.len().saturating_sub(TRAILER_BYTES);
        let trailer = Trailer::decode(&object[cut..], object.len() as u64)?;
        let at = trailer.directory_position as usize;
        let directory = object.get(at..at + trailer.directory_length as usize).ok_or(SegmentError::Damaged("x"))?;
        let mut runs = Vec::new();
        for (partition, run) in trailer.directory(directory)? {
            let at = run.index_position as usize;
            let index = RunIndex::decode(&object[at..at + run.index_length as usize], &run)?;
            runs.push((partition, run, index));
        }
        Ok(runs)
    }

    #[test]
    fn runs_of_several_partitions_come_back_as_they_went_in() {
        let mut writer = SegmentWriter::default();
        let first: Vec<Bytes> = (0..10).map(|n| batch(n * 5, 5, 1000, 3)).collect();
        writer.run(partition(1), 0..50, first.iter().map(|b| (b.clone(), 77))).unwrap();
        // Two batches in one slice, a hole before the third, and a new epoch.
        let joined = Bytes::from([batch(100, 2, 10, 3), batch(102, 1, 10, 3)].concat());
        writer.run(partition(3), 100..(1 << 32) + 1, [(joined.clone(), 80), (batch(1 << 32, 1, 10, 4), 79)]).unwrap();
        let segment = writer.finish();
        let object = whole(&segment);
        assert_eq!(object.len() as u64, segment.bytes);

        let runs = open(&object).unwrap();
        assert_eq!(runs.iter().map(|(p, r, _)| (*p, *r)).collect::<Vec<_>>(), segment.runs);
        let (_, run, index) = &runs[0];
        assert_eq!((run.base, run.next, run.max_timestamp, run.appended_ms), (0, 50, 490, 77));
        assert_eq!(&object[run.position as usize..][..run.length as usize], first.concat());
        assert_eq!(index.at_offset(run, 50), None);
        // A stretch begins with a batch and holds what was asked for.
        for offset in 0..50 {
            let stretch = index.at_offset(run, offset).unwrap();
            let mut bytes = Bytes::copy_from_slice(&object[stretch.start as usize..stretch.end as usize]);
            let mut found = false;
            while let Some(batch) = Batch::split_first(&mut bytes).unwrap() {
                found |= (batch.base_offset()..=batch.last_offset()).contains(&offset);
                assert!(batch.max_timestamp() <= stretch.max_timestamp);
            }
            assert!(found, "{offset}");
        }
        assert!(index.stretches(run, 0).count() > 3);
        let (_, run, index) = &runs[1];
        assert_eq!((run.base, run.next, run.appended_ms), (100, (1 << 32) + 1, 80));
        assert_eq!(index.epochs(), [(3, 100), (4, 1 << 32)]);
    }

    #[test]
    fn a_read_reaches_at_least_one_stretch_and_at_most_its_limit() {
        let mut writer = SegmentWriter::default();
        writer.run(partition(1), 0..20, (0..20).map(|n| (batch(n, 1, 9000, 0), 0))).unwrap();
        let segment = writer.finish();
        let (_, run, index) = open(&whole(&segment)).unwrap().remove(0);
        let one = run.length / 20;
        assert_eq!(index.reach(&run, 0, 1), one);
        assert_eq!(index.reach(&run, 0, one * 3 + 5), one * 3);
        assert_eq!(index.reach(&run, one * 18, one), one * 19);
        assert_eq!(index.reach(&run, one * 19, 1), run.length);
        assert_eq!(index.reach(&run, 0, u64::MAX), run.length);
        assert_eq!(index.end_of(&run, 1), one);
        assert_eq!(index.end_of(&run, one), one);
        assert_eq!(index.end_of(&run, one * 3 + 5), one * 4);
        assert_eq!(index.end_of(&run, one * 19), one * 19);
        assert_eq!(index.end_of(&run, one * 19 + 1), run.length);
        assert_eq!(index.end_of(&run, u64::MAX), run.length);
    }

    #[test]
    fn batches_that_do_not_ascend_or_are_damaged_are_refused() {
        let mut writer = SegmentWriter::default();
        let twice = [(batch(5, 2, 1, 0), 0), (batch(6, 1, 1, 0), 0)];
        assert_eq!(writer.run(partition(1), 5..8, twice), Err(SegmentError::Order { next: 7, found: 6 }));
        let mut bad = batch(5, 2, 1, 0).to_vec();
        bad[70] ^= 1;
        assert!(matches!(writer.run(partition(1), 5..7, [(bad.into(), 0)]), Err(SegmentError::Batch(_))));
        for covered in [6..8, 0..6, 5..5] {
            let refused = writer.run(partition(1), covered.clone(), [(batch(5, 2, 1, 0), 0)]);
            assert!(matches!(refused, Err(SegmentError::Order { .. } | SegmentError::Covered { .. })), "{covered:?}");
        }
        assert!(matches!(writer.run(partition(1), 5..5, []), Err(SegmentError::Covered { .. })));
        assert!(writer.is_empty() && writer.finish().chunks.len() == 1, "a refused run leaves nothing behind");
    }

    #[test]
    fn a_run_covers_what_compaction_left_nothing_of() {
        let five = conformance::batch(5, 1_000);
        let placed = |batch: &Batch, base| {
            let mut bytes = batch.bytes().to_vec();
            Batch::place(&mut bytes, base, 3);
            Bytes::from(bytes)
        };
        // Emptied, thinned, and nothing of what is before, between and behind.
        let left = [placed(&conformance::thinned(&five, &[]), 10), placed(&conformance::thinned(&five, &[1, 3]), 20)];
        let mut writer = SegmentWriter::default();
        writer.run(partition(1), 0..40, left.iter().map(|bytes| (bytes.clone(), 77))).unwrap();
        writer.run(partition(2), 7..9, []).unwrap();
        writer.run(partition(3), 9..10, [(placed(&conformance::batch(1, 5), 9), 78)]).unwrap();
        let object = whole(&writer.finish());
        let runs = open(&object).unwrap();
        assert_eq!(runs.iter().map(|(_, run, _)| (run.base, run.next)).collect::<Vec<_>>(), [(0, 40), (7, 9), (9, 10)]);
        let (_, run, index) = &runs[0];
        for from in 0..40 {
            let stretch = index.at_offset(run, from).unwrap();
            assert_eq!((stretch.base, stretch.start, stretch.end), (10, 0, run.length));
        }
        let (_, run, index) = &runs[1];
        assert_eq!((run.length, index.at_offset(run, 7), index.stretches(run, 0).count()), (0, None, 0));
        let (_, run, _) = &runs[2];
        assert_eq!(object[run.position as usize..][..run.length as usize], placed(&conformance::batch(1, 5), 9));
    }

    #[test]
    fn golden_bytes() {
        let mut writer = SegmentWriter::default();
        writer.run(partition(1), 7..8, [(batch(7, 1, 1, 2), 99)]).unwrap();
        let segment = writer.finish();
        let object = whole(&segment);
        let tail: String = object[69..].iter().map(|b| format!("{b:02x}")).collect();
        let index = "545242490001000000000036ab5c78bf\
                     00010000001000000000000000070000000000000000\
                     0002000000080000000000000046\
                     00030000000c000000020000000000000007";
        let directory = "545242440001000000000050d004f737\
                         01010101010101010101010101010101\
                         00000001\
                         0000000000000000\
                         0000000000000045\
                         0000000000000045\
                         00000046\
                         0000000000000007\
                         0000000000000008\
                         0000000000000046\
                         0000000000000063";
        assert_eq!(&tail[..140], index);
        assert_eq!(&tail[140..332], directory);
        assert_eq!(&tail[332..], "000000000000008b000000600000000000000045545242530001000000000014c751b95b");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), size in any::<u64>()) {
            let run = Run {
                position: 0, length: size, index_position: 0, index_length: 0,
                base: 0, next: 10, max_timestamp: 0, appended_ms: 0,
            };
            let _ = RunIndex::decode(&bytes, &run);
            let cut = bytes.len().saturating_sub(TRAILER_BYTES);
            let _ = Trailer::decode(&bytes[cut..], size);
            let _ = open(&bytes);
        }

        #[test]
        fn a_flipped_bit_in_index_directory_or_trailer_is_found(bit in any::<proptest::sample::Index>()) {
            let mut writer = SegmentWriter::default();
            writer.run(partition(1), 0..5, (0..5).map(|n| (batch(n, 1, 5000, 0), 0))).unwrap();
            let segment = writer.finish();
            let mut object = whole(&segment);
            let data = segment.runs[0].1.length as usize;
            let bit = bit.index((object.len() - data) * 8);
            object[data + bit / 8] ^= 1 << (bit % 8);
            prop_assert!(open(&object).is_err());
        }

        #[test]
        fn every_offset_is_found(sizes in proptest::collection::vec((1i64..20, 1usize..6000, 0i64..50), 1..30)) {
            let mut next = 0;
            let mut batches = Vec::new();
            for (records, bytes, hole) in sizes {
                next += hole;
                batches.push((batch(next, records, bytes, 0), 1));
                next += records;
            }
            let mut writer = SegmentWriter::default();
            writer.run(partition(9), 0..next, batches.clone()).unwrap();
            let object = whole(&writer.finish());
            let (_, run, index) = open(&object).unwrap().remove(0);
            for (bytes, _) in &batches {
                let wanted = Batch::parse(bytes.clone()).unwrap();
                for from in [wanted.base_offset(), wanted.last_offset()] {
                    let stretch = index.at_offset(&run, from).unwrap();
                    prop_assert!(stretch.base <= from);
                    prop_assert!(object[stretch.start as usize..stretch.end as usize]
                        .windows(bytes.len()).any(|window| window == &bytes[..]));
                }
            }
        }
    }
}
