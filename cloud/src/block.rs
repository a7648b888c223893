//! The block: the unit a shard appends, ships and recovers from.
//!
//! A block holds batches of many partitions, those of one partition adjacent, and the state that changed with them. It
//! is one atomic append: all of it is durable or none. Its bytes are the same in every WAL engine and in the bucket.
//! This module knows bytes; what a block means to a shard is `shard`'s, what its changes say is `state`'s.
//!
//! ```text
//! header: an envelope with magic TRBK, version 1
//!  0      16      20      24      32     40          48        52        56        60
//! +------+-------+-------+-------+------+-----------+---------+---------+---------+
//! | head | shard | epoch | nonce | seq  | appended  | data    | changes | entries |
//! |      | u32   | u32   | u64   | u64  | ms i64    | bytes   | bytes   | count   |
//! |      |       |       |       |      |           | u32     | u32     | u32     |
//! +------+-------+-------+-------+------+-----------+---------+---------+---------+
//! +---------------------------+-----------------------------+------------------------+-----------+
//! | data: RecordBatch v2, one | changes: `state` encoding,  | entries, 60 bytes each | block crc |
//! | after the other           | nothing when none           |                        | u32       |
//! +---------------------------+-----------------------------+------------------------+-----------+
//! entry, ascending in partition, one per partition; together they cover the data exactly:
//!  0          16      20      24       32       40        48         52      56        60
//! +----------+-------+-------+--------+--------+---------+----------+-------+---------+
//! | topic id | index | flags | base   | last   | max ts  | position | bytes | batches |
//! |          | u32   | u32   | offset | offset | ms i64  | u32      | u32   | u32     |
//! +----------+-------+-------+--------+--------+---------+----------+-------+---------+
//! claim mark, at the end of the first object of blocks that a node ships after a claim: an envelope with magic TRBM, version 1
//!  0      16      20      28
//! +------+-------+-------+
//! | head | epoch | nonce |
//! |      | u32   | u64   |
//! +------+-------+-------+
//! ```
//! All integers big-endian. `position` counts from the block's first byte. Flag bit 0: a batch of an idempotent producer is
//! among them; bit 1: a transactional one. Other bits are zero. The block crc is CRC-32C over everything before it; the
//! header has its own in the [`envelope`](crate::envelope)'s head.

use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use shared::batch::{Batch, BatchError};
use shared::name::{Offset, Partition, TimestampMs, TopicId};

use crate::envelope::{EnvelopeError, EnvelopeFormat, HEAD_BYTES};
use crate::state::{Change, StateError, decode_changes, encode_changes};

/// Bytes of the header.
pub const HEADER_BYTES: usize = HEAD_BYTES + FIELDS_BYTES;
/// Bytes of one index entry.
pub const ENTRY_BYTES: usize = 60;
/// Largest block that is read. The shard closes blocks far earlier; this bounds what damage can make us allocate.
pub const BLOCK_BYTES_MAX: usize = 256 * 1024 * 1024;

const HEADER: EnvelopeFormat = EnvelopeFormat { magic: *b"TRBK", version: 1, kind: 0 };
const MARK: EnvelopeFormat = EnvelopeFormat { magic: *b"TRBM", version: 1, kind: 0 };
const FIELDS_BYTES: usize = 44;
const CRC_BYTES: usize = 4;
const IDEMPOTENT: u32 = 1;
const TRANSACTIONAL: u32 = 2;

/// What makes an object of blocks unlike every other owner's, although the blocks may be the same: a data directory that
/// was copied holds blocks that the original ships too, and what both could write would keep neither of them out.
pub fn claim_mark(epoch: u32, nonce: u64) -> Bytes {
    MARK.seal(&[&epoch.to_be_bytes()[..], &nonce.to_be_bytes()].concat())
}

/// The epoch that a claim mark tells; `None` if `bytes` are not a mark and nothing else.
pub fn claim_mark_epoch(bytes: &[u8]) -> Option<u32> {
    MARK.open(bytes).ok()?.first_chunk().map(|epoch| u32::from_be_bytes(*epoch))
}

/// The greatest number that anything stored may have. All are counted up from; none comes near it but by damage, and what
/// is above is refused where it is read, so that no sum of one more can overflow.
pub const SEQ_MAX: u64 = u64::MAX / 2;
/// The same for epochs.
pub const EPOCH_MAX: u32 = u32::MAX / 2;

/// What a block says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockHeader {
    /// The shard it belongs to.
    pub shard: u32,
    /// The owner's epoch when it was written.
    pub epoch: u32,
    /// The writer's own random number: tells its bytes from another writer's.
    pub nonce: u64,
    /// Its place in the shard's sequence, without holes.
    pub seq: u64,
    /// When it was appended, by the shard's count of running time (`shared::clock`). Retention by time runs on this.
    pub append_ms: TimestampMs,
}

/// Where one partition's batches lie in a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The partition.
    pub partition: Partition,
    /// Offset of the first record.
    pub base: Offset,
    /// Offset of the last record.
    pub last: Offset,
    /// The greatest record timestamp.
    pub max_timestamp: TimestampMs,
    /// Where the batches begin, from the block's first byte.
    pub position: u32,
    /// How many bytes they take.
    pub bytes: u32,
    /// How many they are.
    pub batches: u32,
    flags: u32,
}

impl Entry {
    /// Whether a batch of an idempotent producer is among them.
    pub fn has_idempotent(&self) -> bool {
        self.flags & IDEMPOTENT != 0
    }

    /// Whether a transactional batch is among them.
    pub fn has_transactional(&self) -> bool {
        self.flags & TRANSACTIONAL != 0
    }
}

/// Why bytes are not a block.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    /// Its header does not hold; or length or checksum of the whole block does not.
    #[error("block cannot be read: {0}")]
    Envelope(#[from] EnvelopeError),
    /// A field contradicts another or the format.
    #[error("block is malformed: {0}")]
    Malformed(&'static str),
    /// Its changes do not decode.
    #[error(transparent)]
    State(#[from] StateError),
    /// A batch in it does not decode.
    #[error(transparent)]
    Batch(#[from] BatchError),
}

/// A whole, checked block.
#[derive(Debug, Clone)]
pub struct Block {
    header: BlockHeader,
    entries: Vec<Entry>,
    changes: Bytes,
    bytes: Bytes,
    memory: usize,
}

/// All that a block is follows from its bytes.
impl PartialEq for Block {
    fn eq(&self, other: &Self) -> bool {
        self.bytes == other.bytes
    }
}

impl Eq for Block {}

impl Block {
    /// Checks that `bytes` are exactly one block: lengths, checksums and index agree.
    pub fn parse(mut bytes: Bytes) -> Result<Self, BlockError> {
        let block = Self::take(&mut bytes)?;
        if bytes.is_empty() { Ok(block) } else { Err(BlockError::Malformed("bytes after the block")) }
    }

    /// Takes the first block off `bytes`, checked. `None` when `bytes` is empty, or a [claim mark](claim_mark) alone:
    /// concatenated blocks end there.
    pub fn split_first(bytes: &mut Bytes) -> Result<Option<Self>, BlockError> {
        if claim_mark_epoch(bytes).is_some() {
            bytes.clear();
        }
        if bytes.is_empty() {
            return Ok(None);
        }
        Self::take(bytes).map(Some)
    }

    fn take(bytes: &mut Bytes) -> Result<Self, BlockError> {
        let (header, [data_end, changes_end, count, length]) = parse_header(bytes)?;
        if bytes.len() < length {
            return Err(EnvelopeError::Length { expected: length, found: bytes.len() }.into());
        }
        let bytes = bytes.split_to(length);
        let mut trailer = bytes.slice(length - CRC_BYTES..);
        let (expected, found) = (trailer.get_u32(), crc32c::crc32c(&bytes[..length - CRC_BYTES]));
        if expected != found {
            return Err(EnvelopeError::Crc { expected, found }.into());
        }
        let mut index = bytes.slice(changes_end..length - CRC_BYTES);
        let mut entries: Vec<Entry> = Vec::with_capacity(count);
        let mut position = HEADER_BYTES;
        for _ in 0..count {
            let entry = decode_entry(&mut index);
            let ordered = entry.base >= 0 && entry.last >= entry.base && entry.last < Offset::MAX;
            if entry.position as usize != position || !ordered || entry.bytes == 0 {
                return Err(BlockError::Malformed("an index entry contradicts itself or the one before"));
            }
            if entries.last().is_some_and(|before| before.partition >= entry.partition) {
                return Err(BlockError::Malformed("index entries are not ascending"));
            }
            position = position.saturating_add(entry.bytes as usize);
            entries.push(entry);
        }
        if position != data_end {
            return Err(BlockError::Malformed("index and data disagree"));
        }
        let changes = bytes.slice(data_end..changes_end);
        let memory = bytes.len();
        Ok(Self { header, entries, changes, bytes, memory })
    }

    /// What it says of itself.
    pub fn header(&self) -> &BlockHeader {
        &self.header
    }

    /// Where each partition's batches lie, ascending in partition.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// One partition's batches, as stored.
    pub fn data(&self, entry: &Entry) -> Bytes {
        let from = entry.position as usize;
        self.bytes.slice(from..from + entry.bytes as usize)
    }

    /// One partition's batches, one by one. Their CRCs are not checked again: the block's own holds.
    pub fn batches(&self, entry: &Entry) -> Result<Vec<Batch>, BlockError> {
        split_batches(self.data(entry))
    }

    /// The state that changed with the data, in order.
    pub fn changes(&self) -> Result<Vec<Change>, BlockError> {
        Ok(decode_changes(&self.changes)?)
    }

    /// Bytes of memory that it holds: more than its own if it was written where there was room for more.
    pub fn memory(&self) -> usize {
        self.memory
    }

    /// Its memory, if nobody else looks at it.
    pub fn into_buffer(self) -> Option<BytesMut> {
        let Self { changes, bytes, .. } = self;
        drop(changes);
        bytes.try_into_mut().ok()
    }

    /// Whether there is nothing in it but whose the shard is: the fence of an owner that took it over.
    pub fn is_fence(&self) -> bool {
        self.entries.is_empty() && self.changes.is_empty()
    }

    /// All its bytes, header to checksum.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }
}

/// Batches that lie one after the other, without a look at their CRCs.
pub fn split_batches(mut data: Bytes) -> Result<Vec<Batch>, BlockError> {
    let mut batches = Vec::new();
    while !data.is_empty() {
        let head = data.get(8..12).and_then(|length| <[u8; 4]>::try_from(length).ok());
        let length = head.and_then(|length| usize::try_from(i32::from_be_bytes(length)).ok());
        let length = length.ok_or(BlockError::Malformed("a batch is cut"))?.saturating_add(12);
        if length > data.len() {
            return Err(BlockError::Malformed("a batch is cut"));
        }
        batches.push(Batch::trusted(data.split_to(length))?);
    }
    Ok(batches)
}

/// Length of the block whose header `bytes` begin with: what a reader needs before it has all of it.
pub fn header_length(bytes: &[u8]) -> Result<usize, BlockError> {
    parse_header(bytes).map(|(_, [.., length])| length)
}

/// The header that `bytes` begin with, where data and changes end, how many entries follow, and the block's length.
fn parse_header(bytes: &[u8]) -> Result<(BlockHeader, [usize; 4]), BlockError> {
    let mut fields = HEADER.open_first(bytes)?;
    if fields.len() != FIELDS_BYTES {
        return Err(BlockError::Malformed("header"));
    }
    let header = BlockHeader {
        shard: fields.get_u32(),
        epoch: fields.get_u32(),
        nonce: fields.get_u64(),
        seq: fields.get_u64(),
        append_ms: fields.get_i64(),
    };
    if header.seq > SEQ_MAX || header.epoch > EPOCH_MAX {
        return Err(BlockError::Malformed("its number or epoch is greater than any can be"));
    }
    let [data, changes, count] = [(); 3].map(|()| u64::from(fields.get_u32()));
    let data_end = HEADER_BYTES as u64 + data;
    let changes_end = data_end + changes;
    let length = changes_end + count * ENTRY_BYTES as u64 + CRC_BYTES as u64;
    if length > BLOCK_BYTES_MAX as u64 {
        return Err(BlockError::Malformed("header"));
    }
    Ok((header, [data_end, changes_end, count, length].map(|n| n as usize)))
}

fn decode_entry(index: &mut Bytes) -> Entry {
    let mut topic = [0; 16];
    index.copy_to_slice(&mut topic);
    let partition = Partition { topic: TopicId(topic), index: index.get_u32() };
    let flags = index.get_u32();
    Entry {
        partition,
        flags,
        base: index.get_i64(),
        last: index.get_i64(),
        max_timestamp: index.get_i64(),
        position: index.get_u32(),
        bytes: index.get_u32(),
        batches: index.get_u32(),
    }
}

fn encode_entry(out: &mut BytesMut, entry: &Entry) {
    out.put_slice(&entry.partition.topic.0);
    out.put_u32(entry.partition.index);
    out.put_u32(entry.flags);
    out.put_i64(entry.base);
    out.put_i64(entry.last);
    out.put_i64(entry.max_timestamp);
    out.put_u32(entry.position);
    out.put_u32(entry.bytes);
    out.put_u32(entry.batches);
}

/// A batch with its place in the order.
#[derive(Debug, Clone)]
pub struct Placed {
    /// Where it goes.
    pub partition: Partition,
    /// Its first record's offset there.
    pub base_offset: Offset,
    /// The leader epoch in force there.
    pub leader_epoch: i32,
    /// The batch as it came.
    pub batch: Batch,
}

/// Collects what goes into a block. Nothing is copied before [`BlockBuilder::finish`].
#[derive(Debug, Default)]
pub struct BlockBuilder {
    batches: Vec<Placed>,
    /// Shared with whoever writes them again if the block is not stored.
    committed: Arc<Vec<Change>>,
    changes: Vec<Change>,
    batch_bytes: usize,
    buffer: BytesMut,
}

fn fits(room: usize, memory: usize) -> bool {
    (room..=2 * room).contains(&memory)
}

impl BlockBuilder {
    /// Memory to write the block to, if it is neither too small nor more than twice what is needed.
    pub fn reuse(&mut self, buffer: BytesMut) {
        self.buffer = buffer;
    }

    /// Whether so much memory may be enough, and is not more than twice what is needed. How many entries there will be is not
    /// known before [`BlockBuilder::finish`].
    pub fn fits(&self, memory: usize) -> bool {
        fits(HEADER_BYTES + self.batch_bytes + CRC_BYTES, memory)
    }

    /// Adds a batch. Batches of one partition come in the order of their offsets; partitions may alternate.
    pub fn push(&mut self, placed: Placed) {
        self.batch_bytes += placed.batch.len();
        self.batches.push(placed);
    }

    /// Adds a change.
    pub fn change(&mut self, change: Change) {
        self.changes.push(change);
    }

    /// Puts these changes before those that are added one by one.
    pub fn begin_with(&mut self, committed: Arc<Vec<Change>>) {
        self.committed = committed;
    }

    /// Bytes of batches so far.
    pub fn batch_bytes(&self) -> usize {
        self.batch_bytes
    }

    /// How many batches so far.
    pub fn batches(&self) -> usize {
        self.batches.len()
    }

    /// How many batches and changes so far.
    pub fn count(&self) -> usize {
        self.batches.len() + self.committed.len() + self.changes.len()
    }

    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.count() == 0
    }

    /// Writes the block: each batch is copied once and placed.
    pub fn finish(mut self, header: BlockHeader) -> Block {
        self.batches.sort_by_key(|placed| placed.partition); // Stable: offsets stay in order.
        let changes: Vec<&Change> = self.committed.iter().chain(&self.changes).collect();
        let changes = encode_changes(changes.iter().copied());
        let runs = self.batches.chunk_by(|a, b| a.partition == b.partition).count();
        let room = HEADER_BYTES + self.batch_bytes + changes.len() + runs * ENTRY_BYTES + CRC_BYTES;
        let mut out = std::mem::take(&mut self.buffer);
        out.clear();
        if !fits(room, out.capacity()) {
            // Blocks are seldom of one size: the next one may need a little more.
            out = BytesMut::with_capacity(room + room / 8);
        }
        let memory = out.capacity();
        out.put_bytes(0, HEADER_BYTES);
        let mut entries = Vec::with_capacity(runs);
        self.put_batches(&mut out, &mut entries);
        let data = out.len() - HEADER_BYTES;
        out.put_slice(&changes);
        entries.iter().for_each(|entry| encode_entry(&mut out, entry));
        let mut fields = Vec::with_capacity(FIELDS_BYTES);
        fields.put_u32(header.shard);
        fields.put_u32(header.epoch);
        fields.put_u64(header.nonce);
        fields.put_u64(header.seq);
        fields.put_i64(header.append_ms);
        fields.put_u32(data as u32);
        fields.put_u32(changes.len() as u32);
        fields.put_u32(entries.len() as u32);
        out[..HEADER_BYTES].copy_from_slice(&HEADER.seal(&fields));
        out.put_u32(crc32c::crc32c(&out));
        let bytes = out.freeze();
        let changes = bytes.slice(HEADER_BYTES + data..HEADER_BYTES + data + changes.len());
        Block { header, entries, changes, bytes, memory }
    }

    fn put_batches(&self, out: &mut BytesMut, entries: &mut Vec<Entry>) {
        for Placed { partition, base_offset, leader_epoch, batch } in &self.batches {
            let position = out.len();
            out.put_slice(batch.bytes());
            Batch::place(&mut out[position..], *base_offset, *leader_epoch);
            let last = base_offset.saturating_add(i64::from(batch.last_offset_delta()));
            let mut flags = if batch.producer_id() >= 0 { IDEMPOTENT } else { 0 };
            flags |= if batch.is_transactional() { TRANSACTIONAL } else { 0 };
            match entries.last_mut().filter(|entry| entry.partition == *partition) {
                Some(entry) => {
                    entry.last = last;
                    entry.max_timestamp = entry.max_timestamp.max(batch.max_timestamp());
                    entry.bytes += batch.len() as u32;
                    entry.batches += 1;
                    entry.flags |= flags;
                }
                None => entries.push(Entry {
                    partition: *partition,
                    base: *base_offset,
                    last,
                    max_timestamp: batch.max_timestamp(),
                    position: position as u32,
                    bytes: batch.len() as u32,
                    batches: 1,
                    flags,
                }),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::state::ProducerChange;
    use proptest::prelude::*;
    use shared::log::conformance::{batch, produced};

    use super::*;

    fn header(seq: u64) -> BlockHeader {
        BlockHeader { shard: 1, epoch: 2, nonce: 0x0102_0304_0506_0708, seq, append_ms: 1_700_000_000_000 }
    }

    fn partition(index: u32) -> Partition {
        Partition { topic: TopicId([0xaa; 16]), index }
    }

    fn placed(index: u32, base_offset: Offset, batch: Batch) -> Placed {
        Placed { partition: partition(index), base_offset, leader_epoch: 5, batch }
    }

    fn build(seq: u64, batches: Vec<Placed>, changes: Vec<Change>) -> Block {
        let mut builder = BlockBuilder::default();
        batches.into_iter().for_each(|placed| builder.push(placed));
        changes.into_iter().for_each(|change| builder.change(change));
        builder.finish(header(seq))
    }

    fn example() -> Block {
        let change = Change::Producers(ProducerChange::IdsReserved { next: 1000 });
        build(9, vec![placed(1, 10, batch(1, 7)), placed(0, 4, batch(2, 5)), placed(1, 11, batch(1, 3))], vec![change])
    }

    #[test]
    fn a_claim_mark_ends_concatenated_blocks_and_nothing_else() {
        let (block, mark) = (example(), claim_mark(7, 0x0102_0304_0506_0708));
        assert_eq!(hex(&mark), "5452424d000100000000000c55dd8abd000000070102030405060708");
        assert_eq!((claim_mark_epoch(&mark), claim_mark_epoch(block.bytes())), (Some(7), None));
        let mut object = Bytes::from([&block.bytes()[..], &mark].concat());
        assert_eq!(Block::split_first(&mut object).unwrap().unwrap().bytes(), block.bytes());
        assert!(Block::split_first(&mut object).unwrap().is_none());
        for bit in 0..mark.len() * 8 {
            let mut flipped = mark.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(Block::split_first(&mut flipped.into()).is_err(), "{bit}");
        }
        let mut before = Bytes::from([&mark[..], block.bytes()].concat());
        assert!(Block::split_first(&mut before).is_err());
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    /// These bytes rest on disks and in buckets: if this fails, the format changed and old data no longer reads.
    #[test]
    fn golden_bytes() {
        let block = example();
        let bytes = block.bytes();
        let expected_header = "5452424b 0001 0000 0000002c 324efa66 00000001 00000002 0102030405060708 0000000000000009 0000018bcfe56800 000000fb 00000008 00000002";
        assert_eq!(hex(&bytes[..60]), expected_header.replace(' ', ""));
        assert_eq!(hex(&bytes[311..319]), "030103010300d00f");
        let topic = "aa".repeat(16);
        let first = format!(
            "{topic} 00000000 00000000 0000000000000004 0000000000000005 0000000000000006 0000003c 0000005f 00000001"
        );
        let second = format!(
            "{topic} 00000001 00000000 000000000000000a 000000000000000b 0000000000000007 0000009b 0000009c 00000002"
        );
        assert_eq!(hex(&bytes[319..379]), first.replace(' ', ""));
        assert_eq!(hex(&bytes[379..439]), second.replace(' ', ""));
        assert_eq!(bytes.len(), 443);
        assert_eq!(hex(&bytes[439..]), "86eeef86");
    }

    #[test]
    fn batches_of_a_partition_lie_together_and_are_placed() {
        let block = Block::parse(example().bytes().clone()).unwrap();
        assert_eq!((&block, block.entries(), block.header()), (&example(), example().entries(), example().header()));
        assert_eq!(header_length(&block.bytes()[..HEADER_BYTES]), Ok(block.bytes().len()), "the header is enough");
        let [first, second] = block.entries() else { panic!("two entries") };
        assert_eq!((first.partition, first.base, first.last), (partition(0), 4, 5));
        assert_eq!((second.partition, second.base, second.last, second.batches), (partition(1), 10, 11, 2));
        for batch in block.batches(second).unwrap() {
            let checked = Batch::parse(batch.into_bytes()).unwrap();
            assert_eq!(checked.leader_epoch(), 5);
        }
        assert_eq!(block.changes().unwrap(), [Change::Producers(ProducerChange::IdsReserved { next: 1000 })]);
    }

    #[test]
    fn a_buffer_that_is_written_again_gives_the_same_block_and_is_not_larger_than_it_should_be() {
        let check = |buffer: BytesMut, reused: bool| {
            let (at, capacity) = (buffer.as_ptr(), buffer.capacity());
            let mut builder = BlockBuilder::default();
            builder.push(placed(0, 4, batch(2, 5)));
            builder.reuse(buffer);
            let block = builder.finish(header(9));
            assert_eq!(block, build(9, vec![placed(0, 4, batch(2, 5))], vec![]));
            assert_eq!(block.bytes().as_ptr() == at, reused, "{capacity}");
            let reader = block.bytes().clone();
            assert!(block.clone().into_buffer().is_none(), "somebody reads it");
            drop(reader);
            let memory = block.memory();
            assert_eq!(block.into_buffer().unwrap().capacity(), memory);
        };
        let bytes = build(9, vec![placed(0, 4, batch(2, 5))], vec![]).bytes().len();
        check(BytesMut::from(&vec![0xff; bytes][..]), true);
        check(BytesMut::with_capacity(bytes - 1), false);
        check(BytesMut::with_capacity(2 * bytes + 1), false);
    }

    #[test]
    fn an_idempotent_batch_is_marked() {
        let block = build(1, vec![placed(0, 0, batch(1, 1)), placed(0, 1, produced(&batch(1, 1), 7, 0, 0))], vec![]);
        assert!(block.entries()[0].has_idempotent() && !block.entries()[0].has_transactional());
    }

    #[test]
    fn concatenated_blocks_are_taken_apart() {
        let blocks = [build(1, vec![placed(0, 0, batch(1, 1))], vec![]), example(), build(3, vec![], vec![])];
        let mut joined: Bytes = blocks.iter().flat_map(|block| block.bytes().to_vec()).collect();
        for expected in &blocks {
            assert_eq!(Block::split_first(&mut joined).unwrap().as_ref(), Some(expected));
        }
        assert_eq!(Block::split_first(&mut joined).unwrap(), None);
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let good = example().bytes().to_vec();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1 << (at % 8);
            assert!(Block::parse(bad.into()).is_err(), "byte {at}");
        }
        for length in 0..good.len() {
            assert!(Block::parse(good[..length].to_vec().into()).is_err(), "cut to {length}");
        }
    }

    #[test]
    fn a_number_after_which_none_can_come_is_refused() {
        for (seq, epoch) in [(SEQ_MAX + 1, 1), (u64::MAX, 1), (1, EPOCH_MAX + 1), (1, u32::MAX)] {
            let header = BlockHeader { epoch, ..header(seq) };
            let block = BlockBuilder::default().finish(header);
            let refused = Block::parse(block.bytes().clone());
            assert!(matches!(refused, Err(BlockError::Malformed(text)) if text.contains("greater")), "{refused:?}");
        }
        let last = BlockBuilder::default().finish(BlockHeader { epoch: EPOCH_MAX, ..header(SEQ_MAX) });
        assert!(Block::parse(last.bytes().clone()).is_ok());
    }

    proptest! {
        #[test]
        fn what_was_built_is_read_back(sizes in proptest::collection::vec((0u32..4, 1i32..5), 0..20), seq in 0..=SEQ_MAX) {
            let mut next = [0i64; 4];
            let batches: Vec<Placed> = sizes.iter().map(|(index, records)| {
                let base = next[*index as usize];
                next[*index as usize] += i64::from(*records);
                placed(*index, base, batch(*records, 1))
            }).collect();
            let block = build(seq, batches, vec![]);
            let parsed = Block::parse(block.bytes().clone()).unwrap();
            prop_assert_eq!(&parsed, &block);
            for entry in parsed.entries() {
                let mut at = 0;
                for batch in parsed.batches(entry).unwrap() {
                    prop_assert_eq!(batch.base_offset(), at);
                    at = batch.last_offset() + 1;
                }
                prop_assert_eq!(at, next[entry.partition.index as usize]);
            }
        }

        #[test]
        fn any_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), at in 0usize..436, byte: u8) {
            let _ = Block::parse(bytes.clone().into());
            let _ = split_batches(bytes.into());
            // With its checksums made good again, a lie inside must still be refused or harmless.
            let mut lie = example().bytes().to_vec();
            lie[at] = byte;
            let head = HEADER.head(&[], &lie[HEAD_BYTES..HEADER_BYTES]);
            lie[..HEAD_BYTES].copy_from_slice(&head);
            let end = lie.len() - CRC_BYTES;
            let crc = crc32c::crc32c(&lie[..end]).to_be_bytes();
            lie[end..].copy_from_slice(&crc);
            if let Ok(block) = Block::parse(lie.into()) {
                let _ = block.changes();
                for entry in block.entries() {
                    let _ = block.batches(entry);
                }
            }
        }
    }
}
