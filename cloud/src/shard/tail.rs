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
            if self.spare.len() < SPARE_MAX {
                self.spare.extend(oldest.into_buffer());
            }
        }
    }

    /// The buffer of a block that went.
    pub fn take_spare(&mut self) -> Option<BytesMut> {
        self.spare.pop()
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
