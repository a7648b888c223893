//! What a durable block does to the state: one code for the commit of a living shard and for replay.

use shared::batch::Batch;
use shared::log::idempotence::last_sequence;
use shared::name::Partition;

use crate::block::{Block, BlockError};
use crate::state::{Change, ProducedBatch, State};

/// Folds a block in: first its records, then its changes. Returns the changes.
pub fn fold(state: &mut State, block: &Block) -> Result<Vec<Change>, BlockError> {
    let changes = block.changes()?;
    state.count_to(block.header().append_ms);
    state.owned_in(block.header().epoch, block.is_fence());
    for entry in block.entries() {
        state.advance(entry.partition, entry.last.saturating_add(1));
        if entry.has_idempotent() {
            for batch in block.batches(entry)?.iter().filter(|batch| batch.producer_id() >= 0) {
                remember(state, entry.partition, batch, block.header().append_ms);
            }
        }
    }
    changes.iter().try_for_each(|change| state.apply(change))?;
    Ok(changes)
}

fn remember(state: &mut State, partition: Partition, batch: &Batch, append_ms: i64) {
    let produced = ProducedBatch {
        first_sequence: batch.base_sequence(),
        last_sequence: last_sequence(batch),
        base_offset: batch.base_offset(),
        last_offset: batch.last_offset(),
    };
    state.produced(partition, batch.producer_id(), batch.producer_epoch(), produced, append_ms);
}
