//! A stream whose engine is memory: rows in a bounded queue, no disk, nothing left after the process.
//!
//! It lives in an incarnation of its own, minted at each start, because its offsets begin again. A record is
//! acknowledged when it is here. What is safe in the cloud goes at once; what is full follows `on_full`.

use std::collections::VecDeque;

use shared::batch::Compression;
use shared::log::Chain;
use shared::name::{Offset, TimestampMs};

use super::state::Stream;
use crate::redb_log::{Place, StoredBatch, Trimmed, apply_trim, chain_after};
use crate::streams::OnFull;

/// The rows of a stream in memory.
#[derive(Debug, Default)]
pub(super) struct MemoryRows {
    rows: VecDeque<StoredBatch>,
    bytes_max: u64,
    /// Size of the largest PUBLISH that was held since there was room.
    held_bytes: u64,
}

/// Whether a record may come in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Room {
    Yes,
    Held,
    Refused,
}

impl MemoryRows {
    pub(super) fn new(bytes_max: u64) -> Self {
        Self { bytes_max, ..Self::default() }
    }

    fn index(&self, offset: Offset) -> usize {
        self.rows.partition_point(|row| row.next() <= offset)
    }

    /// Rows from the one that holds `from` on, at least one if there is any.
    pub(super) fn read(&self, from: Offset, bytes_max: usize) -> Vec<StoredBatch> {
        let mut bytes = 0;
        let wanted = |(number, row): &(usize, &StoredBatch)| {
            bytes += row.batch.len();
            *number == 0 || bytes <= bytes_max
        };
        self.rows.range(self.index(from)..).enumerate().take_while(wanted).map(|(_, row)| row.clone()).collect()
    }

    /// The chain value at the end of a row.
    pub(super) fn chain_at(&self, next: Offset) -> Option<Chain> {
        let row = self.rows.get(self.index(next.saturating_sub(1)))?;
        (row.next() == next).then_some(row.chain)
    }

    /// Where `offset` lies, `first_bytes` being what lay before the first row.
    pub(super) fn place(&self, first_bytes: u64, offset: Offset) -> Option<Place> {
        let index = self.index(offset);
        let timestamp: TimestampMs = self.rows.get(index)?.batch.base_timestamp();
        let before: u64 = self.rows.range(..index).map(StoredBatch::stored_bytes).sum();
        Some(Place { bytes_before: first_bytes + before, timestamp })
    }
}

impl Stream {
    /// Makes room for a record of at most `bytes`, or says that there is none.
    pub(super) fn memory_room(&mut self, bytes: usize, now_ms: TimestampMs) -> Room {
        let bytes = bytes as u64;
        while !self.memory_fits(bytes) {
            match self.on_full {
                OnFull::Reject => return Room::Refused,
                OnFull::DropOldest => {
                    if !self.drop_first() {
                        // All there is came in this very buffer.
                        self.seal_memory(now_ms);
                    }
                }
                OnFull::Hold => {
                    if let Some(memory) = &mut self.memory {
                        memory.held_bytes = memory.held_bytes.max(bytes);
                    }
                    return Room::Held;
                }
            }
        }
        Room::Yes
    }

    fn memory_fits(&self, bytes: u64) -> bool {
        let Some(memory) = &self.memory else { return true };
        // One record goes in however small the bound.
        let waiting = self.open_bytes() as u64;
        (memory.rows.is_empty() && waiting == 0) || self.bytes() + waiting + bytes <= memory.bytes_max
    }

    /// Whether what was held in memory may be offered again.
    pub(super) fn memory_has_room(&self) -> bool {
        self.memory.as_ref().is_none_or(|memory| memory.held_bytes == 0 || self.memory_fits(memory.held_bytes))
    }

    /// Whether `bytes` bytes more are taken, or as many as the stream takes at all.
    pub(super) fn memory_takes(&self, bytes: u64) -> bool {
        self.memory.as_ref().is_none_or(|memory| self.memory_fits(bytes.min(memory.bytes_max / 4)))
    }

    /// Seals what is open: from now on the uplink sees it.
    pub(super) fn seal_memory(&mut self, now_ms: TimestampMs) {
        if self.memory.is_none() {
            return;
        }
        for builder in self.take_builders() {
            let batch = builder.finish(self.record.next, Compression::None);
            let row = StoredBatch { chain: chain_after(self.record.next_chain, &batch), batch };
            if self.oldest_unsent_ms.is_none() {
                self.oldest_unsent_ms = Some(row.batch.base_timestamp());
                self.unsent_since_ms = now_ms;
            }
            let record = &mut self.record;
            (record.next, record.next_chain) = (row.next(), row.chain);
            record.next_bytes += row.stored_bytes();
            record.last_timestamp = row.batch.max_timestamp();
            if let Some(memory) = &mut self.memory {
                memory.rows.push_back(row);
            }
        }
    }

    /// Lets go what is safe.
    pub(super) fn trim_memory(&mut self) {
        while self
            .memory
            .as_ref()
            .and_then(|memory| memory.rows.front())
            .is_some_and(|row| row.next() <= self.record.safe)
        {
            self.drop_first();
        }
        if self.memory_has_room()
            && let Some(memory) = &mut self.memory
        {
            memory.held_bytes = 0;
        }
    }

    /// Drops the first row. What the cloud does not have of it is a gap to declare.
    fn drop_first(&mut self) -> bool {
        let Some(row) = self.memory.as_mut().and_then(|memory| memory.rows.pop_front()) else { return false };
        let (gap, unsent_from) = (self.record.gap, self.record.first.max(self.record.confirmed));
        let trimmed = Trimmed {
            stream: self.id,
            first: row.next(),
            first_chain: row.chain,
            first_bytes: self.record.first_bytes + row.stored_bytes(),
            youngest: row.batch.max_timestamp(),
            more: false,
        };
        apply_trim(&mut self.record, &trimmed);
        if self.record.gap != gap {
            self.dropped_records += trimmed.first.saturating_sub(unsent_from).max(0).unsigned_abs();
            self.oldest_unsent_ms = self.oldest_unsent_ms.map(|oldest| oldest.max(trimmed.youngest));
        }
        true
    }
}
