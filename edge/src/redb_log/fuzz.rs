//! Fuzz bodies: what must hold whatever lies on a gateway's disk. Each takes any bytes and panics when a promise is broken.
//!
//! `tests/fuzz` runs them under libFuzzer; the tests at the end run them on the seeds that are kept in `tests/fuzz/corpus`.

use std::fs::File;
use std::io::Write as _;
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;
use shared::batch::{Batch, BatchError};

use super::scan::Scan;
use super::tables::{
    PacketRow, RetainedRow, Row, SessionRow, StreamRow, SubscriptionRow, decode_parts, encode_row, put_part,
};

#[path = "../../../tests/fuzz/checksums.rs"]
mod checksums;

use checksums::set_checksums;

/// A file that may be a damaged database. Reading it ends; what is taken of it holds by its own checks, in order and
/// without overlap.
///
/// The first byte says whether checksums of batches are set right first, so that more than the checksum is tried.
pub fn scan(data: &[u8]) {
    let Some((&how, bytes)) = data.split_first() else { return };
    let mut bytes = bytes.to_vec();
    if how & 1 != 0 {
        set_checksums(&mut bytes);
    }
    let memory = rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC).expect("a file in memory");
    let mut file = File::from(memory);
    file.write_all(&bytes).expect("memory");
    let found = Scan::read(Arc::new(file), None, |_, _| {}).expect("a file in memory can be read");
    assert_eq!(found.pages_unreadable, 0);
    for stream in found.streams() {
        let record = found.record(stream);
        let mut cursor = record.as_ref().map_or(0, |record| record.first);
        for held in found.assemble(stream, cursor) {
            assert!(held.piece.base <= held.from && held.from < held.piece.next, "{held:?}");
            assert!(held.from >= cursor, "{held:?} where {cursor} was reached");
            cursor = held.piece.next;
            let entries = found.entries(&held.piece).expect("what was read a moment ago holds");
            let (first, last) = (entries.first().expect("not empty"), entries.last().expect("not empty"));
            assert_eq!((first.batch.base_offset(), last.next()), (held.piece.base, held.piece.next));
        }
    }
}

/// Values that may be rows or tails: damage, or what was written is what was read.
pub fn rows(data: &[u8]) {
    let Some((&how, bytes)) = data.split_first() else { return };
    let mut bytes = bytes.to_vec();
    if how & 1 != 0 {
        set_checksums(&mut bytes);
    }
    let base = i64::from(how >> 1);
    if let Ok(row) = Row::decode(base, &bytes) {
        assert_eq!(encode_row(row.bytes_before, &row.entries), bytes);
    }
    if let Ok(parts) = decode_parts(0, &bytes) {
        let mut out = Vec::new();
        for (stream, base, row) in &parts {
            assert_eq!(row.entries.first().map(|entry| entry.batch.base_offset()), Some(*base));
            put_part(&mut out, *stream, row.bytes_before, &row.entries);
        }
        assert_eq!(out, bytes);
    }
    survives::<StreamRow>(&bytes);
    survives::<SessionRow>(&bytes);
    survives::<SubscriptionRow>(&bytes);
    survives::<PacketRow>(&bytes);
    survives::<RetainedRow>(&bytes);
}

/// What was read is read again from what is written of it.
fn survives<T: Serialize + DeserializeOwned>(bytes: &[u8]) {
    if let Ok(row) = postcard::from_bytes::<T>(bytes) {
        let written = postcard::to_stdvec(&row).expect("a row is plain data");
        let again: T = postcard::from_bytes(&written).expect("what was written is a row");
        assert_eq!(postcard::to_stdvec(&again).expect("as before"), written);
    }
}

#[cfg(test)]
#[path = "../../../tests/fuzz/replay.rs"]
mod replay;

#[cfg(test)]
mod tests {
    use super::replay::replay;

    #[test]
    fn scan() {
        replay("redb_scan", super::scan);
    }

    #[test]
    fn rows() {
        replay("redb_rows", super::rows);
    }
}
