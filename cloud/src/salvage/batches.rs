//! Which batches of a block only its own node can bring back: those of Kafka clients. What gateways sent they send again by
//! themselves, for nothing of a block that never reached the bucket was `safe`.
//!
//! Pure: blocks and state in, batches out.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use shared::batch::{Batch, HEADER_BYTES};
use shared::link::GAPS_TOPIC;
use shared::name::{Offset, Partition};

use crate::block::{Block, BlockError};
use crate::state::{Change, State, StreamChange};

/// What one record of a batch may unpack to when it is looked at.
const UNPACKED_BYTES_MAX: usize = 64 << 20;
/// Every record of a gateway has it, unless its stream's settings say otherwise.
const EDGE_HEADER: &[u8] = b"tributary.edge";

/// Who wrote a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatchOrigin {
    /// A Kafka client.
    Client,
    /// A gateway, which sends it again.
    Edge,
    /// It cannot be told, so it counts as a client's: better twice than lost.
    Untold,
    /// This software itself: control batches, lines about gaps that are written again.
    Broker,
}

/// The batches of a block, in order within each partition.
pub fn batches(state: &State, block: &Block) -> Result<BTreeMap<Partition, Vec<(Batch, BatchOrigin)>>, BlockError> {
    let positions = positions(state, block)?;
    let mut all = BTreeMap::new();
    for entry in block.entries() {
        let batches = block.batches(entry)?;
        let is_gaps = state.topic(entry.partition.topic).is_some_and(|topic| topic.name.as_str() == GAPS_TOPIC);
        // Records of gateways in this partition, where it can be told from their positions alone.
        let sent = positions.get(&entry.partition).copied();
        let anonymous = batches.iter().filter(|batch| batch.producer_id() < 0 && !batch.is_control());
        let records: i64 = anonymous.map(|batch| i64::from(batch.record_count())).sum();
        let writer = |batch: Batch| {
            let writer = match sent {
                _ if batch.is_control() || is_gaps => BatchOrigin::Broker,
                _ if batch.producer_id() >= 0 => BatchOrigin::Client,
                None => BatchOrigin::Client,
                Some(Some(sent)) if sent == records => BatchOrigin::Edge,
                Some(_) if has_edge_header(&batch) => BatchOrigin::Edge,
                Some(_) => BatchOrigin::Untold,
            };
            (batch, writer)
        };
        all.insert(entry.partition, batches.into_iter().map(writer).collect());
    }
    Ok(all)
}

/// By how much gateways' positions in a partition rise with the block; `None` inside where one of them is new.
fn positions(state: &State, block: &Block) -> Result<BTreeMap<Partition, Option<Offset>>, BlockError> {
    let mut positions: BTreeMap<Partition, Option<Offset>> = BTreeMap::new();
    let mut newest = BTreeMap::new();
    for change in block.changes()? {
        let Change::Streams(StreamChange::Position { key, partition, next, .. }) = change else { continue };
        let before = newest.insert(key.clone(), next).or_else(|| state.stream(&key).map(|stream| stream.next));
        let rise = before.map(|before| next.saturating_sub(before));
        let sum = positions.entry(partition).or_insert(Some(0));
        *sum = sum.zip(rise).map(|(sum, rise)| sum.saturating_add(rise));
    }
    Ok(positions)
}

fn has_edge_header(batch: &Batch) -> bool {
    let first = batch.records(UNPACKED_BYTES_MAX).ok().and_then(|mut records| records.next());
    first.and_then(Result::ok).is_some_and(|record| record.headers.iter().any(|(name, _)| name[..] == *EDGE_HEADER))
}

/// What tells a batch that its own client sent once more, to the new owner: who, when and what. Epoch and sequence may have
/// begun anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BatchContent {
    producer_id: i64,
    times: (i64, i64),
    records: i32,
    bytes: usize,
    crc: u32,
}

impl BatchContent {
    /// Of an idempotent producer's batch; `None` of any other, which nothing tells from one that is only alike.
    pub fn of(batch: &Batch) -> Option<Self> {
        (batch.producer_id() >= 0).then(|| Self {
            producer_id: batch.producer_id(),
            times: (batch.base_timestamp(), batch.max_timestamp()),
            records: batch.record_count(),
            bytes: batch.len(),
            crc: crc32c::crc32c(batch.bytes().get(HEADER_BYTES..).unwrap_or_default()),
        })
    }
}

/// The same records, sealed for another producer.
pub fn produced_by(batch: &Batch, producer: (i64, i16), sequence: i32) -> Bytes {
    const ATTRIBUTES: usize = 21;
    let (id, epoch) = producer;
    let mut bytes = BytesMut::from(&batch.bytes()[..]);
    Batch::place(&mut bytes, 0, -1);
    bytes[43..51].copy_from_slice(&id.to_be_bytes());
    bytes[51..53].copy_from_slice(&epoch.to_be_bytes());
    bytes[53..57].copy_from_slice(&sequence.to_be_bytes());
    let crc = crc32c::crc32c(&bytes[ATTRIBUTES..]);
    bytes[17..21].copy_from_slice(&crc.to_be_bytes());
    bytes.freeze()
}

/// The sequence number after a batch: they wrap from the greatest i32 to 0.
pub fn sequence_after(sequence: i32, batch: &Batch) -> i32 {
    ((i64::from(sequence) + i64::from(batch.last_offset_delta()) + 1) % (1 << 31)) as i32
}

#[cfg(test)]
mod tests {
    use shared::batch::{BatchBuilder, Compression};
    use shared::log::conformance::{batch, produced, stream};
    use shared::log::{Chain, StreamKey};
    use shared::name::TopicId;

    use super::*;
    use crate::block::{BlockBuilder, BlockHeader, Placed};

    const P: Partition = Partition { topic: TopicId([1; 16]), index: 0 };

    fn block(batches: &[Batch], positions: &[(StreamKey, Offset)]) -> Block {
        let mut builder = BlockBuilder::default();
        let mut base_offset = 0;
        for batch in batches {
            builder.push(Placed { partition: P, base_offset, leader_epoch: 0, batch: batch.clone() });
            base_offset += i64::from(batch.record_count());
        }
        for (key, next) in positions {
            let (key, next) = (key.clone(), *next);
            builder.change(Change::Streams(StreamChange::Position { key, partition: P, next, chain: Chain(0) }));
        }
        builder.finish(BlockHeader { shard: 0, epoch: 1, nonce: 1, seq: 0, append_ms: 0 })
    }

    fn of_edge(records: usize) -> Batch {
        let mut builder = BatchBuilder::default();
        for n in 0..records {
            builder.push(n as i64, None, Some(b"v"), &[(&b"tributary.edge"[..], &b"gw"[..])]);
        }
        builder.finish(0, Compression::None)
    }

    fn writers(state: &State, block: &Block) -> Vec<BatchOrigin> {
        batches(state, block).unwrap().remove(&P).unwrap().into_iter().map(|(_, writer)| writer).collect()
    }

    #[test]
    fn clients_batches_are_told_from_gateways() {
        let (key, client, idempotent) = (stream(1, 1), batch(2, 1), produced(&batch(2, 1), 7, 0, 0));
        let mut known = State::default();
        known
            .apply(&Change::Streams(StreamChange::Position {
                key: key.clone(),
                partition: P,
                next: 10,
                chain: Chain(0),
            }))
            .unwrap();
        let unknown = State::default();
        for (state, batches, position, expected) in [
            (&unknown, vec![client.clone(), idempotent.clone()], None, vec![BatchOrigin::Client, BatchOrigin::Client]),
            // As many records as the position rose: all are the gateway's, with or without its header.
            (
                &known,
                vec![batch(3, 1), of_edge(2), idempotent.clone()],
                Some(15),
                vec![BatchOrigin::Edge, BatchOrigin::Edge, BatchOrigin::Client],
            ),
            // A client's between them: the header tells, or nothing does.
            (&known, vec![of_edge(2), client.clone()], Some(12), vec![BatchOrigin::Edge, BatchOrigin::Untold]),
            (&unknown, vec![of_edge(2), client.clone()], Some(12), vec![BatchOrigin::Edge, BatchOrigin::Untold]),
        ] {
            let positions: Vec<_> = position.map(|next| (key.clone(), next)).into_iter().collect();
            assert_eq!(writers(state, &block(&batches, &positions)), expected, "{batches:?}");
        }
    }

    #[test]
    fn a_batch_under_another_producer_has_the_same_records_and_a_right_checksum() {
        let original = produced(&batch(3, 9), 7, 2, 40);
        let again = Batch::parse(produced_by(&original, (1000, 1), 5)).unwrap();
        assert_eq!((again.producer_id(), again.producer_epoch(), again.base_sequence()), (1000, 1, 5));
        assert_eq!(again.bytes()[HEADER_BYTES..], original.bytes()[HEADER_BYTES..]);
        assert_eq!((again.record_count(), again.max_timestamp()), (3, original.max_timestamp()));
        // Its own client sends it again in a new epoch: the same content. Another client's is another, and of no client nothing is said.
        assert_eq!(BatchContent::of(&original), BatchContent::of(&produced(&batch(3, 9), 7, 3, 0)));
        assert_ne!(BatchContent::of(&original), BatchContent::of(&again));
        assert_eq!(BatchContent::of(&batch(3, 9)), None);
    }

    #[test]
    fn sequences_wrap() {
        assert_eq!(sequence_after(i32::MAX, &batch(1, 1)), 0);
        assert_eq!(sequence_after(7, &batch(3, 1)), 10);
    }
}
