//! What rests in the database: tables, keys and values.
//!
//! ```text
//! meta           "format" -> u32 LE      "commit" -> u64 LE      "incarnation" -> 16 bytes      "clock" -> postcard ClockRow
//! streams        u32 stream id                    -> postcard StreamRow
//! rows           (u32 stream id, u64 base offset) -> row
//! tail           u64 commit                       -> parts
//! retained       topic                            -> postcard RetainedRow
//! sessions       client id                        -> postcard SessionRow
//! subscriptions  (client id, topic filter)        -> postcard SubscriptionRow
//! packets        (client id, u16 packet id)       -> postcard PacketRow
//!
//! row                                              part, repeated
//!  0              8                                 0           4          8            16
//! +--------------+-------+-------+---              +-----------+----------+------------+-------+-------+---
//! | bytes before | entry | entry | ...             | stream id | length   | bytes      | entry | entry | ...
//! | u64          |       |       |                 | u32       | u32      | before u64 |       |       |
//! +--------------+-------+-------+---              +-----------+----------+------------+-------+-------+---
//! entry
//!  0       8
//! +-------+-----------------------------+
//! | chain | RecordBatch v2, whole       |
//! | u64   | (names its own length)      |
//! +-------+-----------------------------+
//! ```
//!
//! ```text
//! SessionRow          0         1
//!                    +---------+-----------------------+-------------+------------------------------------+
//!                    | version | user                  | expiry secs | left: option of                    |
//!                    | u8 = 0  | option of text        | u32         | (order u64, ms since 1970 i64)     |
//!                    +---------+-----------------------+-------------+------------------------------------+
//! SubscriptionRow    +---------+-----------------------+-----------------------+
//!                    | version | options byte of       | identifier            |
//!                    | u8 = 0  | SUBSCRIBE u8          | option of u32         |
//!                    +---------+-----------------------+-----------------------+
//! PacketRow          +---------+
//!                    | version |   the packet id is received and not released
//!                    | u8 = 0  |
//!                    +---------+
//! RetainedRow        +---------+-----------------------+---------+-------------------+
//!                    | version | MQTT 5 properties     | QoS     | stored at, ms     |
//!                    | u8 = 0  | and payload, bytes    | u8      | of the count i64  |
//!                    +---------+-----------------------+---------+-------------------+
//! ClockRow           +---------+-----------------------+------------------+
//!                    | version | running time that was | wall clock ahead |
//!                    | u8 = 0  | counted, ms i64       | of it, ms i64    |
//!                    +---------+-----------------------+------------------+
//! ```
//!
//! Each postcard row begins with its version: the variant number, one byte, 0 so far. `StreamRow` is a [`StreamRecord`]. A
//! database of another format is not opened.
//!
//! Integers of rows, parts and entries are big-endian, as in RecordBatch v2. `bytes before` counts the bytes of all
//! entries that were ever stored in the stream before this row, trimmed ones included, so that two reads say how much
//! lies between two offsets. `chain` is the stream's chain value after the entry's last record. `length` counts what
//! follows it.
//!
//! A commit that brings little for many streams writes one tail value; a stream's parts move to `rows` when there is
//! enough of them (see `docs/decisions/0001-edge-table-layout.md`).

use bytes::{Buf, BufMut, Bytes};
use redb::TableDefinition;
use serde::{Deserialize, Serialize};
use shared::batch::{Batch, HEADER_BYTES};
use shared::clock::ClockState;
use shared::log::Chain;
use shared::name::{Incarnation, Offset, StreamName, TimestampMs, TopicName};

use crate::retention::Ages;

/// What this build reads and writes. A database with another number is not opened.
pub(super) const FORMAT: u32 = 4;

pub(super) const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
pub(super) const STREAMS: TableDefinition<'_, u32, &[u8]> = TableDefinition::new("streams");
pub(super) const ROWS: TableDefinition<'_, (u32, u64), &[u8]> = TableDefinition::new("rows");
pub(super) const TAIL: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("tail");
pub(super) const RETAINED: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("retained");
pub(super) const SESSIONS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("sessions");
pub(super) const SUBSCRIPTIONS: TableDefinition<'_, (&str, &str), &[u8]> = TableDefinition::new("subscriptions");
pub(super) const PACKETS: TableDefinition<'_, (&str, u16), &[u8]> = TableDefinition::new("packets");

pub(super) const META_FORMAT: &str = "format";
pub(super) const META_COMMIT: &str = "commit";
pub(super) const META_INCARNATION: &str = "incarnation";
pub(super) const META_CLOCK: &str = "clock";

/// How far the count of running time is.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) enum ClockRow {
    V1(ClockState),
}

/// A stream's record. Never edited: what changes becomes a new variant.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum StreamRow {
    V1(StreamRecord),
}

/// What is known of a stream beside its rows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamRecord {
    /// Its name.
    pub name: StreamName,
    /// The Kafka topic it is forwarded to.
    pub topic: TopicName,
    /// The life it is in.
    pub incarnation: Incarnation,
    /// The first record that is kept.
    pub first: Offset,
    /// Chain value before `first`.
    pub first_chain: Chain,
    /// Bytes of all entries before `first`.
    pub first_bytes: u64,
    /// The offset after the last record when this was written. Rows may lie above.
    pub next: Offset,
    /// Chain value before `next`.
    pub next_chain: Chain,
    /// Bytes of all entries before `next`.
    pub next_bytes: u64,
    /// Timestamp of the last record before `next`.
    pub last_timestamp: TimestampMs,
    /// Below this the cloud has everything in its log.
    pub confirmed: Offset,
    /// Below this the cloud has everything where it cannot be lost.
    pub safe: Offset,
    /// Records that were dropped and that the cloud was not told of yet (end exclusive).
    pub gap: Option<(Offset, Offset)>,
    /// Where the life began, if it is not the first: what lies below was safe under the one before.
    pub renewed_at: Offset,
    /// How old its records are, for `retention_age`.
    pub ages: Ages,
}

impl StreamRecord {
    /// A stream that holds nothing yet.
    pub fn new(name: StreamName, topic: TopicName, incarnation: Incarnation) -> Self {
        Self {
            name,
            topic,
            incarnation,
            first: 0,
            first_chain: Chain(0),
            first_bytes: 0,
            next: 0,
            next_chain: Chain(0),
            next_bytes: 0,
            last_timestamp: i64::MIN,
            confirmed: 0,
            safe: 0,
            gap: None,
            renewed_at: 0,
            ages: Ages::default(),
        }
    }
}

/// A retained message's record.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum RetainedRow {
    V1 { properties_and_payload: Vec<u8>, qos: u8, stored_ms: i64 },
}

/// A kept session's own record. `left`: its place among all that were left, and milliseconds since 1970.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum SessionRow {
    V1 { user: Option<String>, expiry_secs: u32, left: Option<(u64, i64)> },
}

/// One subscription of a kept session.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum SubscriptionRow {
    V1 { options: u8, identifier: Option<u32> },
}

/// A QoS 2 packet id that a kept session has open: that it is there is all there is to know.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum PacketRow {
    V1,
}

/// A stored batch and the chain value after its last record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredBatch {
    /// The batch. Its base offset is the edge's.
    pub batch: Batch,
    /// Chain value after its last record.
    pub chain: Chain,
}

impl StoredBatch {
    /// The offset after its last record.
    pub fn next(&self) -> Offset {
        self.batch.last_offset().saturating_add(1)
    }

    /// Bytes it takes in a row.
    pub fn stored_bytes(&self) -> u64 {
        (CHAIN_BYTES + self.batch.len()) as u64
    }
}

pub(super) const CHAIN_BYTES: usize = 8;

/// Stored bytes that are not what was written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Damage(pub String);

/// The chain value after `batch`, which follows `before`.
///
/// Eight bytes at a time, little-endian, the last ones padded with zeros: `h = (h ^ word) * 0x9E3779B97F4A7C15; h ^= h >> 32`;
/// then once more with the length as the word. Every step maps different words to different values, so two batches that
/// differ in one word never meet. It is a guard against mistakes and cloned disks, not against an adversary.
pub fn chain_after(before: Chain, batch: &Batch) -> Chain {
    const FACTOR: u64 = 0x9E37_79B9_7F4A_7C15;
    let step = |h: u64, word: u64| {
        let h = (h ^ word).wrapping_mul(FACTOR);
        h ^ (h >> 32)
    };
    let (words, rest) = batch.bytes().as_chunks::<8>();
    let mut h = words.iter().fold(before.0, |h, word| step(h, u64::from_le_bytes(*word)));
    let mut last = [0u8; 8];
    for (to, from) in last.iter_mut().zip(rest) {
        *to = *from;
    }
    h = step(h, u64::from_le_bytes(last));
    Chain(step(h, batch.len() as u64))
}

/// Writes a row.
pub(super) fn encode_row<'a>(bytes_before: u64, entries: impl IntoIterator<Item = &'a StoredBatch>) -> Vec<u8> {
    let mut out = Vec::with_capacity(ROW_BYTES_TARGET);
    out.put_u64(bytes_before);
    put_entries(&mut out, entries);
    out
}

/// Adds a part of a tail value.
pub(super) fn put_part<'a>(
    out: &mut Vec<u8>,
    stream: u32,
    bytes_before: u64,
    entries: impl IntoIterator<Item = &'a StoredBatch>,
) {
    out.put_u32(stream);
    let length_at = out.len();
    out.put_u32(0);
    out.put_u64(bytes_before);
    put_entries(out, entries);
    let length = (out.len() - length_at - 4) as u32;
    if let Some(place) = out.get_mut(length_at..length_at + 4) {
        place.copy_from_slice(&length.to_be_bytes());
    }
}

fn put_entries<'a>(out: &mut Vec<u8>, entries: impl IntoIterator<Item = &'a StoredBatch>) {
    for entry in entries {
        out.put_u64(entry.chain.0);
        out.extend_from_slice(entry.batch.bytes());
    }
}

/// A row cut so that it and its key lie just below 64 KiB: redb rounds values up to a power of two pages.
pub(super) const ROW_BYTES_TARGET: usize = 60_000;

/// A row, taken apart: what lies before it, and its entries.
#[derive(Debug, Clone)]
pub(super) struct Row {
    pub(super) bytes_before: u64,
    pub(super) entries: Vec<StoredBatch>,
}

impl Row {
    /// Reads a row whose first record must be `base`.
    pub(super) fn decode(base: Offset, value: &[u8]) -> Result<Self, Damage> {
        let mut rest = Bytes::copy_from_slice(value);
        if rest.len() < 8 {
            return Err(Damage(format!("the row at offset {base} has {} bytes", rest.len())));
        }
        let bytes_before = rest.get_u64();
        let mut entries: Vec<StoredBatch> = Vec::new();
        let mut next = base;
        while !rest.is_empty() {
            let damaged = |what: &dyn std::fmt::Display| Damage(format!("the row at offset {base}: {what}"));
            if rest.len() < CHAIN_BYTES + HEADER_BYTES {
                return Err(damaged(&"its last entry is cut"));
            }
            let chain = Chain(rest.get_u64());
            let batch = match Batch::split_first(&mut rest) {
                Ok(Some(batch)) => batch,
                Ok(None) => return Err(damaged(&"an entry is empty")),
                Err(error) => return Err(damaged(&error)),
            };
            if batch.base_offset() != next {
                return Err(damaged(&format_args!("a batch begins at {} where {next} was due", batch.base_offset())));
            }
            let entry = StoredBatch { batch, chain };
            next = entry.next();
            entries.push(entry);
        }
        if entries.is_empty() {
            return Err(Damage(format!("the row at offset {base} is empty")));
        }
        Ok(Self { bytes_before, entries })
    }

    /// The offset after its last record.
    pub(super) fn next(&self, base: Offset) -> Offset {
        self.entries.last().map_or(base, StoredBatch::next)
    }

    /// Bytes of its entries.
    pub(super) fn bytes(&self) -> u64 {
        self.entries.iter().map(StoredBatch::stored_bytes).sum()
    }
}

/// Reads a tail value: parts of `(stream, base offset, row)`.
pub(super) fn decode_parts(commit: u64, value: &[u8]) -> Result<Vec<(u32, Offset, Row)>, Damage> {
    let cut = || Damage(format!("the tail of commit {commit} is cut"));
    let mut parts = Vec::new();
    let mut rest = value;
    while !rest.is_empty() {
        if rest.len() < 8 {
            return Err(cut());
        }
        let (stream, length) = (rest.get_u32(), rest.get_u32() as usize);
        let part = rest.get(..length).ok_or_else(cut)?;
        rest = rest.get(length..).ok_or_else(cut)?;
        // The base offset stands in the first batch: bytes before (8), chain (8), base offset (8).
        let base: [u8; 8] = part.get(16..24).and_then(|bytes| bytes.try_into().ok()).ok_or_else(cut)?;
        let base = i64::from_be_bytes(base);
        parts.push((stream, base, Row::decode(base, part)?));
    }
    Ok(parts)
}

/// Key of a row. Offsets are never negative.
pub(super) fn row_key(stream: u32, offset: Offset) -> (u32, u64) {
    (stream, offset.max(0) as u64)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use shared::batch::{BatchBuilder, Compression};

    use super::*;

    pub(in crate::redb_log) fn entries(base: Offset, sizes: &[usize]) -> Vec<StoredBatch> {
        let (mut next, mut chain) = (base, Chain(7));
        let mut all = Vec::new();
        for size in sizes {
            let mut builder = BatchBuilder::default();
            for n in 0..=(size % 3) {
                builder.push(n as i64, Some(b"k"), Some(&vec![b'v'; *size]), &[]);
            }
            let batch = builder.finish(next, Compression::None);
            chain = chain_after(chain, &batch);
            next = batch.last_offset() + 1;
            all.push(StoredBatch { batch, chain });
        }
        all
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn rows_and_tails_come_back(base in 0i64..1 << 40, sizes in proptest::collection::vec(0usize..300, 1..6)) {
            let written = entries(base, &sizes);
            let row = Row::decode(base, &encode_row(99, &written)).unwrap();
            prop_assert_eq!((row.bytes_before, &row.entries), (99, &written));
            let mut tail = Vec::new();
            put_part(&mut tail, 3, 5, &written);
            put_part(&mut tail, 4, 6, &written[..1]);
            let parts = decode_parts(1, &tail).unwrap();
            prop_assert_eq!(parts.len(), 2);
            prop_assert_eq!((parts[0].0, parts[0].1, &parts[0].2.entries), (3, base, &written));
            prop_assert_eq!((parts[1].0, parts[1].2.bytes_before), (4, 6));
        }

        #[test]
        fn any_bytes_are_a_row_or_damage(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Row::decode(0, &bytes);
            let _ = decode_parts(0, &bytes);
        }

        #[test]
        fn a_flipped_bit_is_noticed(sizes in proptest::collection::vec(0usize..50, 1..4), at in any::<prop::sample::Index>()) {
            let written = entries(5, &sizes);
            let mut bytes = encode_row(0, &written);
            let at = 8 + at.index(bytes.len() - 8);
            bytes[at] ^= 1;
            // Leader epoch and the chain itself are outside the batch's checksum; the chain check covers them.
            if let Ok(row) = Row::decode(5, &bytes) {
                let mut chain = Chain(7);
                let holds = row.entries.iter().all(|entry| {
                    chain = chain_after(chain, &entry.batch);
                    chain == entry.chain
                });
                prop_assert!(!holds, "byte {at}");
            }
        }
    }

    #[test]
    fn the_row_has_its_published_bytes() {
        let mut builder = BatchBuilder::default();
        builder.push(1_700_000_000_000, Some(b"k"), Some(b"v"), &[]);
        let batch = builder.finish(3, Compression::None);
        let chain = chain_after(Chain(0), &batch);
        assert_eq!(chain, Chain(GOLDEN_CHAIN), "{:#x}", chain.0);
        let row = encode_row(2, &[StoredBatch { batch: batch.clone(), chain }]);
        assert_eq!(row[..8], 2u64.to_be_bytes());
        assert_eq!(row[8..16], GOLDEN_CHAIN.to_be_bytes());
        assert_eq!(row[16..], batch.bytes()[..]);
    }

    #[test]
    fn stream_rows_have_their_published_bytes() {
        let name = |text| (StreamName::parse(text).unwrap(), TopicName::parse(text).unwrap());
        let (stream, topic) = name("s");
        let mut record = StreamRecord {
            safe: 3,
            gap: Some((1, 2)),
            renewed_at: 5,
            ..StreamRecord::new(stream, topic, Incarnation([7; 16]))
        };
        assert!(record.ages.note(1_700_000_000_000, 64, 60_000));
        let golden = [
            &[0, 1, b's', 1, b's'][..],
            &[7; 16],
            &[0; 6],
            &[255, 255, 255, 255, 255, 255, 255, 255, 255, 1],
            &[0, 6, 1, 2, 4, 10],
            &[1, 0x80, 0xa0, 0xab, 0xfe, 0xf9, 0x62, 0x80, 1],
        ]
        .concat();
        assert_eq!(postcard::to_stdvec(&StreamRow::V1(record.clone())).unwrap(), golden);
        let StreamRow::V1(read) = postcard::from_bytes(&golden).unwrap();
        assert_eq!(read, record);
        let clock = ClockRow::V1(ClockState { counted_ms: 1_700_000_000_000, ahead_ms: -1 });
        assert_eq!(postcard::to_stdvec(&clock).unwrap(), [0, 0x80, 0xa0, 0xab, 0xfe, 0xf9, 0x62, 1]);
    }

    #[test]
    fn rows_of_sessions_and_retained_messages_have_their_published_bytes() {
        fn check<T: Serialize + serde::de::DeserializeOwned + std::fmt::Debug>(row: &T, golden: &[u8]) {
            assert_eq!(postcard::to_stdvec(row).unwrap(), golden, "{row:?}");
            let read: T = postcard::from_bytes(golden).unwrap();
            assert_eq!(format!("{read:?}"), format!("{row:?}"));
        }
        check(&SessionRow::V1 { user: None, expiry_secs: 60, left: None }, &[0, 0, 60, 0]);
        let left = Some((7, 1_700_000_000_000));
        let row = SessionRow::V1 { user: Some("eve".into()), expiry_secs: u32::MAX, left };
        check(&row, &[0, 1, 3, b'e', b'v', b'e', 255, 255, 255, 255, 15, 1, 7, 0x80, 0xa0, 0xab, 0xfe, 0xf9, 0x62]);
        check(&SubscriptionRow::V1 { options: 0x2d, identifier: None }, &[0, 0x2d, 0]);
        check(&SubscriptionRow::V1 { options: 1, identifier: Some(300) }, &[0, 1, 1, 0xac, 2]);
        check(&PacketRow::V1, &[0]);
        let row = RetainedRow::V1 { properties_and_payload: vec![0, b'2', b'1'], qos: 1, stored_ms: -1 };
        check(&row, &[0, 3, 0, b'2', b'1', 1, 1]);
        assert!(postcard::from_bytes::<SessionRow>(&[1, 0, 60, 0]).is_err(), "a later version is refused, not misread");
    }

    /// Printed once and never changed: stored chains must stay comparable.
    const GOLDEN_CHAIN: u64 = 0x3001_57da_15be_21a2;
}
