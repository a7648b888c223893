//! The tail: what came in small pieces and has not been put into rows yet.
//!
//! A commit that brings a little for each of twenty streams would touch twenty leaves of the tree, 4 KiB each. It writes
//! one tail value instead, and a stream's pieces move to a row when they fill one. The tail is small and wholly in memory.

use std::collections::{BTreeMap, BTreeSet};

use shared::name::Offset;

use super::StreamAppend;
use super::tables::{ROW_BYTES_TARGET, Row, StoredBatch, put_part};

/// A stream that brings so much in one commit has its row at once: a page run of its own costs no more than the tail's.
const DIRECT_BYTES: u64 = 12_000;
/// Beyond this, streams that have been in the tail longest move to their rows although these are not full.
const TAIL_BYTES_MAX: usize = 1 << 20;

/// What is in the table `tail`.
#[derive(Debug, Default)]
pub(super) struct Tail {
    /// Per stream its pieces in order, each with the commit whose value holds it.
    streams: BTreeMap<u32, Pieces>,
    /// Values that are stored: their size, and the streams that still need them.
    values: BTreeMap<u64, Value>,
}

#[derive(Debug, Default)]
struct Pieces {
    bytes_before: u64,
    entries: Vec<(u64, StoredBatch)>,
}

#[derive(Debug, Default)]
struct Value {
    bytes: usize,
    streams: BTreeSet<u32>,
}

/// What a commit writes for its appends.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// Rows to insert.
    pub(super) rows: Vec<NewRow>,
    /// The commit's tail value; empty: none.
    pub(super) value: Vec<u8>,
    /// Tail values nobody needs any more.
    pub(super) dropped: Vec<u64>,
    /// Pieces that stay in the tail: stream, bytes before, entries.
    kept: Vec<(u32, u64, Vec<StoredBatch>)>,
    /// Streams whose pieces moved to rows.
    moved: BTreeSet<u32>,
}

/// A row to insert.
#[derive(Debug)]
pub(super) struct NewRow {
    pub(super) stream: u32,
    pub(super) base: Offset,
    pub(super) bytes_before: u64,
    pub(super) entries: Vec<StoredBatch>,
}

impl Tail {
    /// A piece found when the database was opened.
    pub(super) fn add(&mut self, commit: u64, stream: u32, row: Row) {
        let pieces = self.streams.entry(stream).or_default();
        if pieces.entries.is_empty() {
            pieces.bytes_before = row.bytes_before;
        }
        pieces.entries.extend(row.entries.into_iter().map(|entry| (commit, entry)));
        self.values.entry(commit).or_default().streams.insert(stream);
    }

    /// The size of a value found when the database was opened; also of one that nobody needs.
    pub(super) fn opened(&mut self, commit: u64, bytes: usize) {
        self.values.entry(commit).or_default().bytes = bytes;
    }

    /// The pieces of a stream, in order.
    pub(super) fn entries(&self, stream: u32) -> Vec<StoredBatch> {
        let pieces = self.streams.get(&stream);
        pieces.map(|pieces| pieces.entries.iter().map(|(_, entry)| entry.clone()).collect()).unwrap_or_default()
    }

    /// The pieces of a stream as one row.
    pub(super) fn row(&self, stream: u32) -> Option<Row> {
        let pieces = self.streams.get(&stream)?;
        Some(Row { bytes_before: pieces.bytes_before, entries: self.entries(stream) })
    }

    /// Decides where each append goes. Nothing changes until [`Tail::apply`].
    pub(super) fn plan(&self, appends: &[StreamAppend]) -> Plan {
        let mut plan = Plan::default();
        for append in appends {
            let waiting = self.streams.get(&append.stream);
            let bytes_waiting: u64 =
                waiting.map_or(0, |pieces| pieces.entries.iter().map(|(_, entry)| entry.stored_bytes()).sum());
            let bytes_new: u64 = append.entries.iter().map(StoredBatch::stored_bytes).sum();
            let fills_a_row = bytes_waiting + bytes_new >= ROW_BYTES_TARGET as u64 * 7 / 8;
            if fills_a_row || (bytes_waiting == 0 && bytes_new >= DIRECT_BYTES) {
                self.move_to_rows(append.stream, Some(append), &mut plan);
            } else {
                put_part(&mut plan.value, append.stream, append.bytes_before, &append.entries);
                plan.kept.push((append.stream, append.bytes_before, append.entries.clone()));
            }
        }
        let mut bytes: usize = plan.value.len() + self.values.values().map(|value| value.bytes).sum::<usize>();
        for value in self.values.values() {
            if bytes > TAIL_BYTES_MAX {
                for stream in &value.streams {
                    if !plan.moved.contains(stream) {
                        self.move_with_new(*stream, &mut plan);
                    }
                }
                bytes -= value.bytes;
            }
        }
        let dead = |value: &Value| value.streams.iter().all(|stream| plan.moved.contains(stream));
        plan.dropped = self.values.iter().filter(|(_, value)| dead(value)).map(|(commit, _)| *commit).collect();
        plan
    }

    /// Moves a stream whose new pieces may be in the plan's value already: those then live in both until the value dies,
    /// and opening prefers the rows.
    fn move_with_new(&self, stream: u32, plan: &mut Plan) {
        let new = plan.kept.iter().position(|(kept, _, _)| *kept == stream).map(|at| plan.kept.swap_remove(at));
        let append = new.map(|(stream, bytes_before, entries)| StreamAppend { stream, bytes_before, entries });
        self.move_to_rows(stream, append.as_ref(), plan);
        if plan.kept.is_empty() {
            plan.value.clear();
        }
    }

    fn move_to_rows(&self, stream: u32, append: Option<&StreamAppend>, plan: &mut Plan) {
        let waiting = self.streams.get(&stream);
        let mut bytes_before = waiting
            .filter(|pieces| !pieces.entries.is_empty())
            .map(|pieces| pieces.bytes_before)
            .or(append.map(|append| append.bytes_before))
            .unwrap_or_default();
        let old = waiting.into_iter().flat_map(|pieces| pieces.entries.iter().map(|(_, entry)| entry));
        let new = append.into_iter().flat_map(|append| &append.entries);
        let mut row: Option<NewRow> = None;
        let mut row_bytes = 0;
        for entry in old.chain(new) {
            let size = entry.stored_bytes();
            if row_bytes + size > ROW_BYTES_TARGET as u64 {
                plan.rows.extend(row.take());
            }
            let open = row.get_or_insert_with(|| {
                row_bytes = 0;
                NewRow { stream, base: entry.batch.base_offset(), bytes_before, entries: Vec::new() }
            });
            open.entries.push(entry.clone());
            row_bytes += size;
            bytes_before += size;
        }
        plan.rows.extend(row);
        plan.moved.insert(stream);
    }

    /// The plan was made durable as commit `number`.
    pub(super) fn apply(&mut self, number: u64, plan: Plan) {
        for stream in &plan.moved {
            self.streams.remove(stream);
        }
        for commit in &plan.dropped {
            self.values.remove(commit);
        }
        for value in self.values.values_mut() {
            value.streams.retain(|stream| !plan.moved.contains(stream));
        }
        if plan.value.is_empty() {
            return;
        }
        let value = self.values.entry(number).or_default();
        value.bytes = plan.value.len();
        for (stream, bytes_before, entries) in plan.kept {
            value.streams.insert(stream);
            let pieces = self.streams.entry(stream).or_default();
            if pieces.entries.is_empty() {
                pieces.bytes_before = bytes_before;
            }
            pieces.entries.extend(entries.into_iter().map(|entry| (number, entry)));
        }
    }
}
