//! Recent blocks in memory, bounded: a reader at the end never touches the disk.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

use super::index::Run;
use crate::block::Block;

/// Buffers that are kept for blocks to come.
const SPARE_MAX: usize = 2;

/// The newest blocks, without holes.
#[derive(Debug, Default)]
pub struct Tail {
    blocks: VecDeque<Block>,
    bytes: usize,
    /// Of blocks that went: fresh memory costs a page fault per 4 KiB.
    spare: Vec<BytesMut>,
}

impl Tail {
    /// Adds the newest block; the oldest go as long as the bound is exceeded.
    pub fn push(&mut self, block: Block, bytes_max: usize) {
        if self.blocks.back().is_some_and(|newest| newest.header().seq + 1 != block.header().seq) {
            self.clear();
        }
        self.bytes += block.memory();
        self.blocks.push_back(block);
        while self.bytes > bytes_max {
            let Some(oldest) = self.blocks.pop_front() else { break };
            self.bytes -= oldest.memory();
            self.spare.extend(oldest.into_buffer());
            if self.spare.len() > SPARE_MAX {
                self.spare.remove(0);
            }
        }
    }

    /// The buffer of a block that went: the largest of a size that fits.
    pub fn take_spare(&mut self, fits: impl Fn(usize) -> bool) -> Option<BytesMut> {
        let fitting = self.spare.iter().enumerate().filter(|(_, buffer)| fits(buffer.capacity()));
        let (index, _) = fitting.max_by_key(|(_, buffer)| buffer.capacity())?;
        Some(self.spare.remove(index))
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Bytes of memory held.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// A block, if it is here.
    pub fn block(&self, seq: u64) -> Option<&Block> {
        let first = self.blocks.front()?.header().seq;
        self.blocks.get(usize::try_from(seq.checked_sub(first)?).ok()?)
    }

    /// A run's batches, if its block is here.
    pub fn run(&self, run: &Run) -> Option<Bytes> {
        let from = run.position as usize;
        let bytes = self.block(run.seq)?.bytes();
        (from + run.bytes as usize <= bytes.len()).then(|| bytes.slice(from..from + run.bytes as usize))
    }
}

#[cfg(test)]
mod tests {
    use shared::log::conformance::batch;
    use shared::name::{Partition, TopicId};

    use super::*;
    use crate::block::{BlockBuilder, BlockHeader, Placed};

    fn block(seq: u64) -> Block {
        let partition = Partition { topic: TopicId([1; 16]), index: 0 };
        let mut builder = BlockBuilder::default();
        builder.push(Placed { partition, base_offset: 0, leader_epoch: 1, batch: batch(2, 1) });
        builder.finish(BlockHeader { shard: 0, epoch: 1, nonce: 1, seq, append_ms: 1 })
    }

    #[test]
    fn memory_held_is_bounded_and_that_of_a_block_that_went_is_given_where_it_fits() {
        let (mut tail, memory) = (Tail::default(), block(0).memory());
        assert!(memory > block(0).bytes().len(), "there is room to spare");
        (0..5).for_each(|seq| tail.push(block(seq), 2 * memory));
        assert_eq!((tail.blocks.len(), tail.bytes()), (2, 2 * memory));
        assert!(tail.take_spare(|bytes| bytes > memory).is_none());
        for _ in 0..SPARE_MAX {
            assert_eq!(tail.take_spare(|bytes| bytes == memory).map(|buffer| buffer.capacity()), Some(memory));
        }
        assert!(tail.take_spare(|_| true).is_none(), "no more than that are kept");
    }
}
