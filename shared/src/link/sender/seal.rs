//! Makes the body of an append out of stored rows: merges neighbours, compresses, cuts to size, tells gaps, and turns a
//! record that the cloud can never take into one for the `.rejected` topic. Plain functions of rows and an order, so
//! that they can run on another thread while the body before is on the wire.

use bytes::Bytes;

use super::{Report, Row, Rows};
use crate::batch::{Batch, BatchBuilder, BatchError, Compression, seal};
use crate::limits::BATCH_UNPACKED_BYTES_MAX;
use crate::link::frame::{AppendEntry, ENTRIES_MAX};
use crate::link::{Position, REJECTED_BYTES_HEADER, REJECTED_HEADER};
use crate::log::Chain;
use crate::name::{Offset, StreamName};

/// Bytes of the header that an entry takes besides its stream's name, rounded up.
const ENTRY_BYTES: usize = 96;
/// Below this much room nothing more is put into a body that holds something.
const ROOM_BYTES_MIN: usize = 4 * 1024;

/// What to seal.
#[derive(Debug, Clone)]
pub struct SealOrder {
    pub(super) generation: u64,
    pub(super) streams: Vec<StreamOrder>,
    pub(super) compression: Compression,
    /// What neighbours are merged up to.
    pub(super) batch_bytes: usize,
    /// What the cloud takes at most.
    pub(super) batch_bytes_max: usize,
    /// What the body may come to; one record alone may exceed it.
    pub(super) body_bytes: usize,
}

/// Where a stream's next batch begins.
#[derive(Debug, Clone)]
pub(super) struct StreamOrder {
    pub name: StreamName,
    pub after: Option<Position>,
    pub from: Offset,
    pub dropped: Option<(Offset, Offset)>,
    pub care: Option<Care>,
}

/// A place that the cloud refused, and how to get over it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Care {
    /// Something in the records below `until` was refused: send so many at a time.
    Split { records: Offset, until: Offset },
    /// The record at `at` was refused, alone.
    Reject { at: Offset, reason: String },
}

/// A sealed body, ready for the wire.
#[derive(Debug)]
pub struct Body {
    pub(super) generation: u64,
    pub(super) entries: Vec<AppendEntry>,
    pub(super) batches: Vec<Bytes>,
    pub(super) bytes: usize,
    /// Sealing stopped for want of room, not of rows.
    pub(super) full: bool,
    pub(super) damaged: Vec<(StreamName, String)>,
    pub(super) reports: Vec<Report>,
}

/// The chain value in the middle of a row. It depends on the whole row, so that two rows that differ anywhere differ
/// here too.
fn chain_within(row: Chain, next: Offset) -> Chain {
    let mut mixed = row.0 ^ (next as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    Chain(mixed ^ (mixed >> 31))
}

/// The sender's chain value at `next`, which may lie within a row.
pub(super) fn chain_at(rows: &dyn Rows, stream: &StreamName, next: Offset) -> Option<Chain> {
    rows.chain_at(stream, next).or_else(|| {
        let row = rows.read(stream, next, 1).ok()?.into_iter().next()?;
        (row.batch.base_offset() < next && next <= row.batch.last_offset()).then(|| chain_within(row.chain, next))
    })
}

/// Seals a body: a batch of each stream in turn, until the body is full or the rows are used up.
pub fn seal_body(order: &SealOrder, rows: &dyn Rows) -> Body {
    let mut body = Body {
        generation: order.generation,
        entries: Vec::new(),
        batches: Vec::new(),
        bytes: 0,
        full: false,
        damaged: Vec::new(),
        reports: Vec::new(),
    };
    let mut open = order.streams.clone();
    while !open.is_empty() {
        open.retain_mut(|stream| match take(order, stream, &mut body, rows) {
            Ok(Taken::Entry) => true,
            Ok(Taken::NoRows) => false,
            Ok(Taken::NoRoom) => {
                body.full = true;
                false
            }
            Err(error) => {
                body.damaged.push((stream.name.clone(), error));
                false
            }
        });
    }
    body
}

enum Taken {
    Entry,
    NoRows,
    NoRoom,
}

/// Seals the next batch of one stream into the body.
fn take(order: &SealOrder, stream: &mut StreamOrder, body: &mut Body, rows: &dyn Rows) -> Result<Taken, String> {
    let alone = body.entries.is_empty();
    let overhead = ENTRY_BYTES + stream.name.as_str().len();
    let room = order.body_bytes.saturating_sub(body.bytes + overhead);
    if !alone && (room < ROOM_BYTES_MIN || body.entries.len() >= ENTRIES_MAX) {
        return Ok(Taken::NoRoom);
    }
    let wanted = order.batch_bytes.min(room).max(1);
    let rows = rows.read(&stream.name, stream.from, wanted)?;
    let Some(run) = Run::new(rows, stream.from, wanted) else { return Ok(Taken::NoRows) };
    let gap = match stream.after {
        Some(after) if after.next < run.first => Some((after.next, run.first)),
        Some(_) => None,
        None => stream.dropped.filter(|dropped| dropped.1 == run.first && dropped.0 < dropped.1),
    };
    let damaged = |error: BatchError| format!("rows at offset {} do not seal: {error}", run.first);

    let reject = match &stream.care {
        Some(Care::Reject { at, reason }) if *at == run.first => Some(reason.clone()),
        _ => None,
    };
    let mut records = match stream.care {
        Some(Care::Split { records, until }) if run.first < until => records.min(run.records()),
        _ => run.records(),
    };
    let (sealed, next, reason) = if let Some(reason) = reject {
        let record = run.batch(1, Compression::None, None).map_err(damaged)?;
        (rejected(&record, &reason, order.batch_bytes_max, gap).map_err(damaged)?, run.first + 1, Some(reason))
    } else {
        loop {
            let sealed = run.batch(records, order.compression, gap).map_err(damaged)?;
            let fits = if records == 1 && alone { order.batch_bytes_max } else { order.batch_bytes_max.min(room) };
            if sealed.len() <= fits {
                break (sealed, run.first + records, None);
            }
            if records > 1 {
                // Halving until it fits: rare, as rows are read up to what fits before compression.
                records /= 2;
                continue;
            }
            if sealed.len() <= order.batch_bytes_max {
                return Ok(Taken::NoRoom);
            }
            let reason = format!("the record takes {} bytes, the cloud takes {}", sealed.len(), order.batch_bytes_max);
            let record = run.batch(1, Compression::None, None).map_err(damaged)?;
            let sealed = rejected(&record, &reason, order.batch_bytes_max, gap).map_err(damaged)?;
            break (sealed, run.first + 1, Some(reason));
        }
    };
    if !alone && sealed.len() > room {
        return Ok(Taken::NoRoom);
    }

    if let Some(reason) = &reason {
        let (stream, reason) = (stream.name.clone(), reason.clone());
        body.reports.push(Report::Rejected { stream, offset: run.first, reason });
    }
    let end = Position { next, chain: run.chain(next) };
    body.entries.push(AppendEntry {
        stream: stream.name.clone(),
        after: stream.after,
        first: run.first,
        end,
        gap,
        rejected: reason.is_some(),
        bytes: sealed.len() as u32,
    });
    body.bytes += sealed.len() + overhead;
    body.batches.push(sealed.into_bytes());
    stream.after = Some(end);
    stream.from = next;
    Ok(Taken::Entry)
}

/// Rows that adjoin each other; the first may begin below `first`, because a batch once ended within it.
struct Run {
    rows: Vec<Row>,
    first: Offset,
}

impl Run {
    /// The leading rows that adjoin, as many as `bytes` hold and one at least. `None` when there is no row.
    fn new(mut rows: Vec<Row>, from: Offset, bytes: usize) -> Option<Self> {
        rows.retain(|row| row.batch.last_offset() >= from);
        let first = rows.first()?.batch.base_offset().max(from);
        let (mut next, mut total, mut count) = (rows.first()?.batch.base_offset(), 0, 0);
        for row in &rows {
            total += row.batch.len();
            if row.batch.base_offset() != next || (count > 0 && total > bytes) {
                break;
            }
            next = row.batch.last_offset() + 1;
            count += 1;
        }
        rows.truncate(count);
        Some(Self { rows, first })
    }

    fn records(&self) -> Offset {
        self.rows.last().map_or(0, |row| row.batch.last_offset() + 1 - self.first)
    }

    /// Seals the first `records`.
    fn batch(
        &self,
        records: Offset,
        compression: Compression,
        gap: Option<(Offset, Offset)>,
    ) -> Result<Batch, BatchError> {
        let end = self.first + records;
        let mut batches = Vec::with_capacity(self.rows.len());
        for Row { batch, .. } in &self.rows {
            if batch.base_offset() >= end {
                break;
            }
            let whole = batch.base_offset() >= self.first && batch.last_offset() < end;
            batches.push(if whole { batch.clone() } else { carve(batch, self.first, end)? });
        }
        seal(&batches, compression, gap)
    }

    /// The chain value at `next`, which lies in the run or at its end.
    fn chain(&self, next: Offset) -> Chain {
        let row = self.rows.iter().find(|row| row.batch.last_offset() + 1 >= next);
        match row {
            Some(row) if row.batch.last_offset() + 1 == next => row.chain,
            Some(row) => chain_within(row.chain, next),
            None => Chain::default(),
        }
    }
}

/// The records of a batch that lie in `from .. to`, as a batch.
fn carve(batch: &Batch, from: Offset, to: Offset) -> Result<Batch, BatchError> {
    let mut builder = BatchBuilder::with_capacity(batch.len());
    let mut base = None;
    for record in batch.records(BATCH_UNPACKED_BYTES_MAX)? {
        let record = record?;
        if record.offset < from || record.offset >= to {
            continue;
        }
        base.get_or_insert(record.offset);
        let empty = Bytes::new();
        let headers: Vec<(&[u8], &[u8])> =
            record.headers.iter().map(|(n, v)| (&n[..], &v.as_ref().unwrap_or(&empty)[..])).collect();
        builder.push(record.timestamp, record.key.as_deref(), record.value.as_deref(), &headers);
    }
    let base = base.ok_or(BatchError::Malformed("nothing to carve"))?;
    Ok(builder.finish(base, Compression::None))
}

/// The one record of `batch` as the `.rejected` topic takes it: with the reason, and cut to `bytes_max`.
fn rejected(batch: &Batch, reason: &str, bytes_max: usize, gap: Option<(Offset, Offset)>) -> Result<Batch, BatchError> {
    let record =
        batch.records(BATCH_UNPACKED_BYTES_MAX)?.next().ok_or(BatchError::Malformed("nothing to reject"))??;
    let empty = Bytes::new();
    let length = record.value.as_ref().map_or(0, Bytes::len).to_string();
    // The batch header, the record's varints, our three headers (the gap's among them) and a margin.
    let frame = 61 + 256 + reason.len();
    let headers_bytes: usize =
        record.headers.iter().map(|(n, v)| n.len() + v.as_ref().map_or(0, Bytes::len) + 12).sum();
    let key_bytes = record.key.as_ref().map_or(0, Bytes::len);
    let keeps_key = frame + key_bytes <= bytes_max / 2;
    let keeps_headers = frame + key_bytes + headers_bytes <= bytes_max / 2;
    let room = bytes_max
        .saturating_sub(frame)
        .saturating_sub(if keeps_key { key_bytes } else { 0 })
        .saturating_sub(if keeps_headers { headers_bytes } else { 0 });

    let mut headers: Vec<(&[u8], &[u8])> = Vec::new();
    if keeps_headers {
        headers.extend(record.headers.iter().map(|(n, v)| (&n[..], &v.as_ref().unwrap_or(&empty)[..])));
    }
    headers.push((REJECTED_HEADER.as_bytes(), reason.as_bytes()));
    let value = record.value.as_ref().map(|value| &value[..value.len().min(room)]);
    if value.map_or(0, <[u8]>::len) < record.value.as_ref().map_or(0, Bytes::len) {
        headers.push((REJECTED_BYTES_HEADER.as_bytes(), length.as_bytes()));
    }
    let key = record.key.as_deref().filter(|_| keeps_key);
    let mut builder = BatchBuilder::default();
    builder.push(record.timestamp, key, value, &headers);
    seal(&[builder.finish(record.offset, Compression::None)], Compression::None, gap)
}
