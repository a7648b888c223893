//! RecordBatch v2: the one shape in which records rest and travel, from the gateway's log to the analyst's client.
//!
//! ```text
//!  0        8      12     16    17      21          23                27              35            43
//! +--------+------+------+-----+-------+-----------+-----------------+---------------+-------------+
//! | base   | len  | lead | mag | crc   | attributes| last offset     | base          | max         |
//! | offset | i32  | epoch| ic  | u32   | i16       | delta i32       | timestamp i64 | timestamp   |
//! | i64    |      | i32  | i8  |       |           |                 |               | i64         |
//! +--------+------+------+-----+-------+-----------+-----------------+---------------+-------------+
//!  43            51              53             57             61
//! +-------------+---------------+--------------+--------------+---------------------------------+
//! | producer id | producer epoch| base sequence| record count | records, compressed as a whole  |
//! | i64         | i16           | i32          | i32          | or not                          |
//! +-------------+---------------+--------------+--------------+---------------------------------+
//! ```
//! All integers big-endian. `len` counts the bytes after itself. The CRC (Castagnoli) covers attributes to the end, so
//! base offset and leader epoch can be set without touching it: [`Batch::place`] writes 12 bytes and nothing else.
//!
//! There are two checks of a batch. [`Batch::parse`] is the storage check: what may lie in a log, which compaction thins and
//! empties. [`Batch::check_entry`] is the entry check: what a producer or a gateway may send. A reader never makes the second.

use std::io::{Read as _, Write as _};

use bytes::{Buf, Bytes};

use crate::name::{Offset, TimestampMs};

/// Bytes before the records.
pub const HEADER_BYTES: usize = 61;
/// Bytes of `base offset` and `len`, which `len` does not count.
const PREFIX_BYTES: usize = 12;
const CRC_FROM: usize = 21;
const TRANSACTIONAL: i16 = 1 << 4;
const CONTROL: i16 = 1 << 5;
const LOG_APPEND_TIME: i16 = 1 << 3;

/// How a batch's records are compressed (attribute bits 0..3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Not at all.
    #[default]
    None,
    /// RFC 1952. Passed through, never looked into.
    Gzip,
    /// Snappy. Passed through, never looked into.
    Snappy,
    /// LZ4 frame format.
    Lz4,
    /// RFC 8878.
    Zstd,
}

impl Compression {
    fn from_attributes(attributes: i16) -> Option<Self> {
        Some(match attributes & 7 {
            0 => Self::None,
            1 => Self::Gzip,
            2 => Self::Snappy,
            3 => Self::Lz4,
            4 => Self::Zstd,
            _ => return None,
        })
    }
}

/// Why bytes are not a batch we take.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    /// Fewer bytes than the header or `len` says.
    #[error("batch is cut: {found} bytes of {expected}")]
    Cut {
        /// What the header says.
        expected: usize,
        /// What there is.
        found: usize,
    },
    /// Not version 2.
    #[error("batch has magic {0}, only 2 is taken")]
    Magic(i8),
    /// The bytes are not those that were sealed.
    #[error("batch CRC is {found:08x}, its header says {expected:08x}")]
    Crc {
        /// In the header.
        expected: u32,
        /// Over the bytes.
        found: u32,
    },
    /// A field contradicts another or the format.
    #[error("batch is malformed: {0}")]
    Malformed(&'static str),
    /// A codec this build does not open.
    #[error("batch is compressed with {0:?}, which is only passed through")]
    Unopened(Compression),
    /// It would unpack to more than the bound.
    #[error("batch unpacks to more than {0} bytes")]
    Bomb(usize),
}

/// A whole batch that passed the storage check. It may have fewer records than offsets, and none.
#[derive(Clone, PartialEq, Eq)]
pub struct Batch(Bytes);

impl std::fmt::Debug for Batch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Batch({}..={}, {} bytes)", self.base_offset(), self.last_offset(), self.0.len())
    }
}

impl Batch {
    /// The storage check: `bytes` are exactly one batch, of a compression that is known, its length, magic and CRC agree, and it has
    /// at most a record for each of its offsets. Compaction leaves fewer, and none where it keeps a producer's last batch for its
    /// sequence numbers.
    pub fn parse(bytes: Bytes) -> Result<Self, BatchError> {
        let length = frame_length(&bytes)?;
        if bytes.len() != length {
            return Err(BatchError::Malformed("bytes after the batch"));
        }
        let batch = Self(bytes);
        let (expected, found) = (batch.crc(), crc32c::crc32c(&batch.0[CRC_FROM..]));
        if expected != found {
            return Err(BatchError::Crc { expected, found });
        }
        if Compression::from_attributes(batch.attributes()).is_none() {
            return Err(BatchError::Malformed("unknown compression"));
        }
        if batch.last_offset_delta() < 0 {
            return Err(BatchError::Malformed("negative last offset delta"));
        }
        if batch.record_count() < 0 {
            return Err(BatchError::Malformed("negative record count"));
        }
        if i64::from(batch.record_count()) > i64::from(batch.last_offset_delta()) + 1 {
            return Err(BatchError::Malformed("more records than offsets"));
        }
        Ok(batch)
    }

    /// The entry check: a batch that comes into a log has a record at least, and one for each of its offsets.
    pub fn check_entry(&self) -> Result<(), BatchError> {
        if self.record_count() == 0 {
            return Err(BatchError::Malformed("no records"));
        }
        if i64::from(self.record_count()) != i64::from(self.last_offset_delta()) + 1 {
            return Err(BatchError::Malformed("record count and last offset delta disagree"));
        }
        Ok(())
    }

    /// Takes the first batch off `bytes`, checked. `None` when `bytes` is empty.
    pub fn split_first(bytes: &mut Bytes) -> Result<Option<Self>, BatchError> {
        if bytes.is_empty() {
            return Ok(None);
        }
        let length = frame_length(bytes)?;
        Self::parse(bytes.split_to(length)).map(Some)
    }

    /// A view of bytes that this process has checked before (read back from a block whose own checksum holds).
    /// Only the length is checked again.
    pub fn trusted(bytes: Bytes) -> Result<Self, BatchError> {
        let length = frame_length(&bytes)?;
        if bytes.len() != length {
            return Err(BatchError::Malformed("bytes after the batch"));
        }
        Ok(Self(bytes))
    }

    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        // A batch is at least HEADER_BYTES long, and all fields lie in the header.
        self.0[at..at + N].try_into().expect("field within the header")
    }

    /// The bytes.
    pub fn bytes(&self) -> &Bytes {
        &self.0
    }

    /// The bytes, owned.
    pub fn into_bytes(self) -> Bytes {
        self.0
    }

    /// Size in bytes, header and all.
    #[expect(clippy::len_without_is_empty, reason = "there is a header at least")]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The first offset it covers, whether or not the record is still there.
    pub fn base_offset(&self) -> Offset {
        i64::from_be_bytes(self.array(0))
    }

    /// The last offset it covers, whether or not the record is still there.
    pub fn last_offset(&self) -> Offset {
        self.base_offset().saturating_add(i64::from(self.last_offset_delta()))
    }

    /// Leader epoch it was stored in.
    pub fn leader_epoch(&self) -> i32 {
        i32::from_be_bytes(self.array(12))
    }

    /// The checksum that was sealed in.
    pub fn crc(&self) -> u32 {
        u32::from_be_bytes(self.array(17))
    }

    fn attributes(&self) -> i16 {
        i16::from_be_bytes(self.array(21))
    }

    /// How the records are compressed.
    pub fn compression(&self) -> Compression {
        Compression::from_attributes(self.attributes()).unwrap_or_default()
    }

    /// Part of a transaction (attribute bit 4).
    pub fn is_transactional(&self) -> bool {
        self.attributes() & TRANSACTIONAL != 0
    }

    /// Written by a broker, not by a producer (attribute bit 5).
    pub fn is_control(&self) -> bool {
        self.attributes() & CONTROL != 0
    }

    /// Timestamps were set by the broker (attribute bit 3).
    pub fn is_log_append_time(&self) -> bool {
        self.attributes() & LOG_APPEND_TIME != 0
    }

    /// The last offset it covers less the first.
    pub fn last_offset_delta(&self) -> i32 {
        i32::from_be_bytes(self.array(23))
    }

    /// What record timestamps are relative to.
    pub fn base_timestamp(&self) -> TimestampMs {
        i64::from_be_bytes(self.array(27))
    }

    /// The greatest timestamp in the batch.
    pub fn max_timestamp(&self) -> TimestampMs {
        i64::from_be_bytes(self.array(35))
    }

    /// Idempotent producer's id, or -1.
    pub fn producer_id(&self) -> i64 {
        i64::from_be_bytes(self.array(43))
    }

    /// Its epoch, or -1.
    pub fn producer_epoch(&self) -> i16 {
        i16::from_be_bytes(self.array(51))
    }

    /// Sequence number of the first record, or -1.
    pub fn base_sequence(&self) -> i32 {
        i32::from_be_bytes(self.array(53))
    }

    /// Number of records that are there.
    pub fn record_count(&self) -> i32 {
        i32::from_be_bytes(self.array(57))
    }

    /// Writes base offset and leader epoch over the first bytes of a copy of a batch; the CRC does not cover them.
    pub fn place(copy: &mut [u8], base_offset: Offset, leader_epoch: i32) {
        copy[0..8].copy_from_slice(&base_offset.to_be_bytes());
        copy[12..16].copy_from_slice(&leader_epoch.to_be_bytes());
    }

    /// The records, uncompressed; `bytes_max` bounds what they may unpack to.
    pub fn records(&self, bytes_max: usize) -> Result<Records, BatchError> {
        let packed = self.0.slice(HEADER_BYTES..);
        let bytes = match self.compression() {
            Compression::None => packed,
            // Nothing was compressed where compaction left nothing.
            _ if packed.is_empty() && self.record_count() == 0 => packed,
            codec => unpack(codec, &packed, bytes_max)?,
        };
        if bytes.len() > bytes_max {
            return Err(BatchError::Bomb(bytes_max));
        }
        Ok(Records {
            bytes,
            left: self.record_count(),
            base_offset: self.base_offset(),
            base_timestamp: self.base_timestamp(),
        })
    }
}

/// Length of the batch that `bytes` begins with, checked against what is there.
fn frame_length(bytes: &[u8]) -> Result<usize, BatchError> {
    let Some(header) = bytes.get(..HEADER_BYTES) else {
        return Err(BatchError::Cut { expected: HEADER_BYTES, found: bytes.len() });
    };
    let magic = header[16] as i8;
    if magic != 2 {
        return Err(BatchError::Magic(magic));
    }
    let length = i32::from_be_bytes(header[8..12].try_into().expect("four bytes"));
    let length = usize::try_from(length).map_err(|_| BatchError::Malformed("negative length"))? + PREFIX_BYTES;
    if length < HEADER_BYTES {
        return Err(BatchError::Malformed("length is less than a header"));
    }
    if bytes.len() < length {
        return Err(BatchError::Cut { expected: length, found: bytes.len() });
    }
    Ok(length)
}

fn unpack(codec: Compression, packed: &[u8], bytes_max: usize) -> Result<Bytes, BatchError> {
    let bound = bytes_max as u64 + 1;
    let mut out = Vec::new();
    let read = match codec {
        Compression::Lz4 => lz4_flex::frame::FrameDecoder::new(packed).take(bound).read_to_end(&mut out),
        Compression::Zstd => zstd::stream::read::Decoder::with_buffer(packed)
            .and_then(|decoder| decoder.take(bound).read_to_end(&mut out)),
        other => return Err(BatchError::Unopened(other)),
    };
    read.map_err(|_| BatchError::Malformed("records do not unpack"))?;
    if out.len() > bytes_max {
        return Err(BatchError::Bomb(bytes_max));
    }
    Ok(out.into())
}

/// Iterator over a batch's records.
#[derive(Debug)]
pub struct Records {
    bytes: Bytes,
    left: i32,
    base_offset: Offset,
    base_timestamp: TimestampMs,
}

/// One record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its offset.
    pub offset: Offset,
    /// Its timestamp.
    pub timestamp: TimestampMs,
    /// Its key.
    pub key: Option<Bytes>,
    /// Its value.
    pub value: Option<Bytes>,
    /// Its headers, in order.
    pub headers: Vec<(Bytes, Option<Bytes>)>,
}

/// One record with its key, value and headers still encoded: what merging needs.
#[derive(Debug, Clone)]
struct RawRecord {
    offset: Offset,
    timestamp: TimestampMs,
    rest: Bytes,
}

const CUT_RECORD: BatchError = BatchError::Malformed("a record is cut");

impl Records {
    fn next_raw(&mut self) -> Result<Option<RawRecord>, BatchError> {
        if self.left == 0 {
            if !self.bytes.is_empty() {
                return Err(BatchError::Malformed("bytes after the last record"));
            }
            return Ok(None);
        }
        self.left -= 1;
        let length = varlong(&mut self.bytes)?;
        let length = usize::try_from(length).map_err(|_| BatchError::Malformed("negative record length"))?;
        if length > self.bytes.len() {
            return Err(CUT_RECORD);
        }
        let mut rest = self.bytes.split_to(length);
        if rest.is_empty() {
            return Err(CUT_RECORD);
        }
        rest.advance(1); // Attributes: none are defined.
        let timestamp = self.base_timestamp.wrapping_add(varlong(&mut rest)?);
        let offset = self.base_offset.wrapping_add(varlong(&mut rest)?);
        Ok(Some(RawRecord { offset, timestamp, rest }))
    }
}

impl Iterator for Records {
    type Item = Result<Record, BatchError>;

    fn next(&mut self) -> Option<Self::Item> {
        let step = self.next_raw().and_then(|raw| raw.map(RawRecord::decode).transpose());
        if step.is_err() {
            self.left = 0;
            self.bytes = Bytes::new();
        }
        step.transpose()
    }
}

impl RawRecord {
    fn decode(self) -> Result<Record, BatchError> {
        let mut rest = self.rest;
        let key = nullable(&mut rest)?;
        let value = nullable(&mut rest)?;
        let count = varlong(&mut rest)?;
        // Each header takes two bytes at least, so the bytes that remain bound the count.
        if count < 0 || count > rest.len() as i64 / 2 {
            return Err(BatchError::Malformed("header count"));
        }
        let mut headers = Vec::with_capacity(count as usize);
        for _ in 0..count {
            let name = nullable(&mut rest)?.ok_or(BatchError::Malformed("header without name"))?;
            headers.push((name, nullable(&mut rest)?));
        }
        if !rest.is_empty() {
            return Err(BatchError::Malformed("bytes after a record's headers"));
        }
        Ok(Record { offset: self.offset, timestamp: self.timestamp, key, value, headers })
    }
}

fn nullable(bytes: &mut Bytes) -> Result<Option<Bytes>, BatchError> {
    let length = varlong(bytes)?;
    if length == -1 {
        return Ok(None);
    }
    let length = usize::try_from(length).map_err(|_| BatchError::Malformed("negative length"))?;
    if length > bytes.len() {
        return Err(CUT_RECORD);
    }
    Ok(Some(bytes.split_to(length)))
}

/// A zigzag varint, base 128, least significant group first; at most ten bytes.
fn varlong(bytes: &mut Bytes) -> Result<i64, BatchError> {
    let mut value = 0u64;
    for shift in (0..70).step_by(7) {
        if bytes.is_empty() {
            return Err(CUT_RECORD);
        }
        let byte = bytes.get_u8();
        if shift == 63 && byte > 1 {
            break;
        }
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok((value >> 1) as i64 ^ -((value & 1) as i64));
        }
    }
    Err(BatchError::Malformed("varint is too long"))
}

fn put_varlong(out: &mut Vec<u8>, value: i64) {
    let mut zigzag = ((value << 1) ^ (value >> 63)) as u64;
    while zigzag >= 0x80 {
        out.push(zigzag as u8 | 0x80);
        zigzag >>= 7;
    }
    out.push(zigzag as u8);
}

fn varlong_bytes(value: i64) -> usize {
    let zigzag = ((value << 1) ^ (value >> 63)) as u64;
    (64 - (zigzag | 1).leading_zeros() as usize).div_ceil(7)
}

/// Builds a batch record by record. Producer id is -1: identity and position travel beside a batch, never inside.
#[derive(Debug)]
pub struct BatchBuilder {
    out: Vec<u8>,
    count: i32,
    base_timestamp: TimestampMs,
    max_timestamp: TimestampMs,
    last_timestamp: TimestampMs,
}

impl Default for BatchBuilder {
    fn default() -> Self {
        Self::with_capacity(0)
    }
}

impl BatchBuilder {
    /// An empty builder with room for so many bytes of records.
    pub fn with_capacity(bytes: usize) -> Self {
        let mut out = Vec::with_capacity(HEADER_BYTES + bytes);
        out.resize(HEADER_BYTES, 0);
        Self { out, count: 0, base_timestamp: 0, max_timestamp: i64::MIN, last_timestamp: i64::MIN }
    }

    /// Bytes so far, header included.
    pub fn len(&self) -> usize {
        self.out.len()
    }

    /// Whether no record was added.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Records so far.
    pub fn record_count(&self) -> i32 {
        self.count
    }

    /// The timestamp of the last record added.
    pub fn last_timestamp(&self) -> Option<TimestampMs> {
        (self.count > 0).then_some(self.last_timestamp)
    }

    /// Adds a record.
    pub fn push(
        &mut self,
        timestamp: TimestampMs,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
        headers: &[(&[u8], &[u8])],
    ) {
        let nullable_bytes = |part: Option<&[u8]>| part.map_or(1, |p| varlong_bytes(p.len() as i64) + p.len());
        let rest = nullable_bytes(key)
            + nullable_bytes(value)
            + varlong_bytes(headers.len() as i64)
            + headers.iter().map(|(n, v)| nullable_bytes(Some(n)) + nullable_bytes(Some(v))).sum::<usize>();
        self.begin(timestamp, rest);
        self.put_nullable(key);
        self.put_nullable(value);
        put_varlong(&mut self.out, headers.len() as i64);
        for (name, value) in headers {
            self.put_nullable(Some(name));
            self.put_nullable(Some(value));
        }
    }

    fn put_nullable(&mut self, part: Option<&[u8]>) {
        match part {
            None => put_varlong(&mut self.out, -1),
            Some(part) => {
                put_varlong(&mut self.out, part.len() as i64);
                self.out.extend_from_slice(part);
            }
        }
    }

    /// Writes a record's length, attributes and deltas; `rest` bytes must follow.
    fn begin(&mut self, timestamp: TimestampMs, rest: usize) {
        if self.count == 0 {
            self.base_timestamp = timestamp;
        }
        let timestamp_delta = timestamp.wrapping_sub(self.base_timestamp);
        let offset_delta = i64::from(self.count);
        let length = 1 + varlong_bytes(timestamp_delta) + varlong_bytes(offset_delta) + rest;
        put_varlong(&mut self.out, length as i64);
        self.out.push(0);
        put_varlong(&mut self.out, timestamp_delta);
        put_varlong(&mut self.out, offset_delta);
        self.max_timestamp = self.max_timestamp.max(timestamp);
        self.last_timestamp = timestamp;
        self.count += 1;
    }

    fn push_raw(&mut self, raw: &RawRecord) {
        self.begin(raw.timestamp, raw.rest.len());
        self.out.extend_from_slice(&raw.rest);
    }

    /// Seals the batch with the given base offset (the edge's own; the cloud sets its own later).
    ///
    /// # Panics
    /// When no record was added.
    pub fn finish(self, base_offset: Offset, compression: Compression) -> Batch {
        assert!(self.count > 0, "a batch holds a record at least");
        let mut out = self.out;
        let mut codec = 0i16;
        if let Some(packed) = pack(compression, &out[HEADER_BYTES..]) {
            // Incompressible records travel as they are: smaller, and nobody unpacks them.
            if packed.len() < out.len() - HEADER_BYTES {
                out.truncate(HEADER_BYTES);
                out.extend_from_slice(&packed);
                codec = if compression == Compression::Lz4 { 3 } else { 4 };
            }
        }
        let length = (out.len() - PREFIX_BYTES) as i32;
        out[0..8].copy_from_slice(&base_offset.to_be_bytes());
        out[8..12].copy_from_slice(&length.to_be_bytes());
        out[12..16].copy_from_slice(&(-1i32).to_be_bytes());
        out[16] = 2;
        out[21..23].copy_from_slice(&codec.to_be_bytes());
        out[23..27].copy_from_slice(&(self.count - 1).to_be_bytes());
        out[27..35].copy_from_slice(&self.base_timestamp.to_be_bytes());
        out[35..43].copy_from_slice(&self.max_timestamp.to_be_bytes());
        out[43..51].copy_from_slice(&(-1i64).to_be_bytes());
        out[51..53].copy_from_slice(&(-1i16).to_be_bytes());
        out[53..57].copy_from_slice(&(-1i32).to_be_bytes());
        out[57..61].copy_from_slice(&self.count.to_be_bytes());
        let crc = crc32c::crc32c(&out[CRC_FROM..]);
        out[17..21].copy_from_slice(&crc.to_be_bytes());
        Batch(out.into())
    }
}

/// Compresses; `None` for [`Compression::None`] and for codecs we do not write.
fn pack(compression: Compression, records: &[u8]) -> Option<Vec<u8>> {
    match compression {
        Compression::Lz4 => {
            // Independent 64 KiB blocks: what Kafka clients of every language read.
            let info = lz4_flex::frame::FrameInfo::new().block_size(lz4_flex::frame::BlockSize::Max64KB);
            let mut encoder = lz4_flex::frame::FrameEncoder::with_frame_info(info, Vec::new());
            encoder.write_all(records).ok()?;
            encoder.finish().ok()
        }
        Compression::Zstd => zstd::stream::encode_all(records, 1).ok(),
        Compression::None | Compression::Gzip | Compression::Snappy => None,
    }
}

/// Header that tells a consumer which edge offsets were dropped before this record: `first-last`, both included.
pub const GAP_HEADER: &str = "tributary-gap";

/// Seals neighbouring stored batches into one. The records keep their bytes; only their deltas are written anew.
///
/// `batches` ascend and adjoin each other. `gap` (end exclusive) adds the header [`GAP_HEADER`] to the first record.
pub fn seal(batches: &[Batch], compression: Compression, gap: Option<(Offset, Offset)>) -> Result<Batch, BatchError> {
    let first = batches.first().ok_or(BatchError::Malformed("nothing to seal"))?;
    let mut builder = BatchBuilder::with_capacity(batches.iter().map(Batch::len).sum::<usize>() + 64);
    let mut next = first.base_offset();
    for batch in batches {
        if batch.base_offset() != next {
            return Err(BatchError::Malformed("batches do not adjoin"));
        }
        // Records are numbered anew: a hole would move those after it.
        batch.check_entry()?;
        next = batch.last_offset() + 1;
        let mut records = batch.records(crate::limits::BATCH_UNPACKED_BYTES_MAX)?;
        while let Some(raw) = records.next_raw()? {
            match gap {
                Some((from, to)) if builder.is_empty() => {
                    let record = raw.decode()?;
                    let text = format!("{from}-{}", to - 1);
                    let empty = Bytes::new();
                    let mut headers: Vec<(&[u8], &[u8])> =
                        record.headers.iter().map(|(n, v)| (&n[..], &v.as_ref().unwrap_or(&empty)[..])).collect();
                    headers.push((GAP_HEADER.as_bytes(), text.as_bytes()));
                    builder.push(record.timestamp, record.key.as_deref(), record.value.as_deref(), &headers);
                }
                _ => builder.push_raw(&raw),
            }
        }
    }
    Ok(builder.finish(first.base_offset(), compression))
}

#[cfg(test)]
mod tests;
