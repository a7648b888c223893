//! Which batches are new, which are repeats and which are out of order: the rules all engines share.
//!
//! Pure: the engine says what it remembers (durable and in flight, oldest first), this says what the batch is.

use super::{AppendError, EdgeBatch};
use crate::batch::Batch;
use crate::name::Offset;

/// Batches of one producer and partition that are looked at for a repeat (Kafka's `NUM_BATCHES_TO_RETAIN`).
pub const BATCHES_REMEMBERED: usize = 5;

/// A batch of an idempotent producer that an engine remembers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sequenced {
    /// The producer's epoch.
    pub epoch: i16,
    /// Sequence of its first record.
    pub first_sequence: i32,
    /// Sequence of its last record.
    pub last_sequence: i32,
    /// Offset of its first record.
    pub base_offset: Offset,
    /// Offset of its last record.
    pub last_offset: Offset,
}

/// What an acceptable batch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Append it.
    Fresh,
    /// It was appended before, there.
    Duplicate(Sequenced),
}

/// Sequence of a batch's last record. Sequences wrap from `i32::MAX` to 0.
pub fn last_sequence(batch: &Batch) -> i32 {
    wrap(i64::from(batch.base_sequence()) + i64::from(batch.last_offset_delta()))
}

fn wrap(sequence: i64) -> i32 {
    sequence.rem_euclid(1 << 31) as i32
}

/// Whether a batch belongs to an idempotent producer.
pub fn is_idempotent(batch: &Batch) -> bool {
    batch.producer_id() >= 0
}

/// Judges an idempotent producer's batch by the newest batches of that producer in that partition, oldest first.
/// An unknown producer may begin anywhere: its older batches may be past retention.
pub fn check_sequence(recent: &[Sequenced], batch: &Batch) -> Result<Verdict, AppendError> {
    let Some(newest) = recent.last() else { return Ok(Verdict::Fresh) };
    let (producer_id, found) = (batch.producer_id(), batch.base_sequence());
    if batch.producer_epoch() < newest.epoch {
        return Err(AppendError::ProducerFenced { producer_id, current: newest.epoch, found: batch.producer_epoch() });
    }
    let expected = if batch.producer_epoch() > newest.epoch { 0 } else { wrap(i64::from(newest.last_sequence) + 1) };
    if found == expected {
        return Ok(Verdict::Fresh);
    }
    let last = last_sequence(batch);
    let is_repeat = |known: &&Sequenced| {
        known.epoch == batch.producer_epoch() && known.first_sequence == found && known.last_sequence == last
    };
    match recent.iter().rev().take(BATCHES_REMEMBERED).find(is_repeat) {
        Some(known) => Ok(Verdict::Duplicate(*known)),
        None => Err(AppendError::OutOfOrderSequence { producer_id, expected, found }),
    }
}

/// Judges an edge's batch by the stream's position; `None` is a stream (in this incarnation) never seen, whose first batch
/// may begin anywhere. Records may be missing only where the edge says that it dropped them.
pub fn check_position(position: Option<Offset>, edge: &EdgeBatch) -> Result<(), AppendError> {
    let Some(next) = position else { return Ok(()) };
    let declared = edge.gap.is_some_and(|(from, to)| to == edge.first && from <= next && next <= to);
    if edge.first == next || declared {
        return Ok(());
    }
    Err(AppendError::WrongPosition { next, have: edge.next <= next })
}

#[cfg(test)]
mod tests {
    use super::super::conformance::{batch, produced};
    use super::*;

    fn known(epoch: i16, first: i32, last: i32) -> Sequenced {
        Sequenced { epoch, first_sequence: first, last_sequence: last, base_offset: 100, last_offset: 109 }
    }

    #[test]
    fn a_producers_batches() {
        let recent = [known(1, 0, 9), known(1, 10, 19)];
        let of = |epoch, sequence, records| produced(&batch(records, 1), 7, epoch, sequence);
        let out_of_order = |expected, found| Err(AppendError::OutOfOrderSequence { producer_id: 7, expected, found });
        for (batch, expected) in [
            (of(1, 20, 1), Ok(Verdict::Fresh)),
            (of(1, 10, 10), Ok(Verdict::Duplicate(recent[1]))),
            (of(1, 0, 10), Ok(Verdict::Duplicate(recent[0]))),
            (of(1, 0, 9), out_of_order(20, 0)),
            (of(1, 21, 1), out_of_order(20, 21)),
            (of(2, 0, 1), Ok(Verdict::Fresh)),
            (of(2, 20, 1), out_of_order(0, 20)),
            (of(0, 20, 1), Err(AppendError::ProducerFenced { producer_id: 7, current: 1, found: 0 })),
        ] {
            assert_eq!(check_sequence(&recent, &batch), expected, "{}", batch.base_sequence());
        }
        assert_eq!(check_sequence(&[], &of(3, 55, 1)), Ok(Verdict::Fresh), "an unknown producer begins anywhere");
    }

    #[test]
    fn sequences_wrap_to_zero() {
        let end = produced(&batch(4, 1), 7, 0, i32::MAX - 1);
        assert_eq!(last_sequence(&end), 1);
        let recent = [known(0, i32::MAX - 9, i32::MAX)];
        assert_eq!(check_sequence(&recent, &produced(&batch(1, 1), 7, 0, 0)), Ok(Verdict::Fresh));
    }
}
