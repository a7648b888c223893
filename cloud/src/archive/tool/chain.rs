//! The shipped WAL: block after block from the root's trim on.

use std::collections::BTreeMap;

use object_store::path::Path;
use shared::batch::Batch;
use shared::log::{Chain, StreamKey};
use shared::name::Offset;

use super::view::{ShardView, fetch};
use super::{Finding, ToolError};
use crate::archive::Store;
use crate::block::{Block, Entry};
use crate::manifest::OBJECT_BYTES_MAX;
use crate::shard::fold;
use crate::state::{Change, State, StreamChange};

/// What was walked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Walked {
    /// Objects.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// After the last block that follows the root without a hole.
    pub next: u64,
}

/// Walks over the shipped blocks in order, one object in memory at a time. `each` gets the blocks from the trim on that
/// follow each other without a hole, as a restore would; what comes after a hole or damage is checked and no more.
pub(super) async fn walk(
    store: &Store,
    shard: &ShardView,
    findings: &mut Vec<Finding>,
    mut each: impl FnMut(&Path, u64, &Block, &mut Vec<Finding>) -> Result<(), ToolError>,
    mut done: impl FnMut(u64),
) -> Result<Walked, ToolError> {
    let root = &shard.root;
    let mut walked = Walked { next: root.trim, ..Walked::default() };
    let mut expected = root.wal;
    let mut whole = true;
    for first in shard.wals() {
        let key = shard.keys.wal(first);
        if whole && first != expected {
            findings
                .push(Finding::new(&key, format!("block {expected} was expected next: the shipped log has a hole")));
            whole = false;
        }
        let Some(bytes) = fetch(store, &key, OBJECT_BYTES_MAX, findings).await? else {
            whole = false;
            continue;
        };
        let size = bytes.len() as u64;
        walked.objects += 1;
        walked.bytes += size;
        let mut rest = bytes;
        let mut seq = first;
        loop {
            let position = size - rest.len() as u64;
            let block = match Block::split_first(&mut rest) {
                Ok(Some(block)) => block,
                Ok(None) if position > 0 => break,
                Ok(None) => {
                    findings.push(Finding::new(&key, "it holds no block"));
                    whole = false;
                    break;
                }
                Err(error) => {
                    findings.push(Finding::at(&key, position, format!("block {seq}: {error}")));
                    whole = false;
                    break;
                }
            };
            let header = block.header();
            if header.seq != seq || header.shard != root.shard {
                let what = format!("block {} of shard {} where block {seq} was expected", header.seq, header.shard);
                findings.push(Finding::at(&key, position, what));
                whole = false;
                break;
            }
            if whole && seq + 1 == root.trim && root.trim_crc.is_some_and(|crc| crc != crc32c::crc32c(block.bytes())) {
                let what = format!("block {seq} is not the one that the segments were made from");
                findings.push(Finding::at(&key, position, what));
            }
            if whole && seq >= root.trim {
                each(&key, position, &block, findings)?;
                walked.next = seq + 1;
            }
            seq += 1;
        }
        if whole {
            expected = seq;
        }
        done(size);
    }
    if whole && expected < root.trim {
        let what = format!("it begins at block {}, the shipped log ends at {expected}", root.trim);
        findings.push(Finding::new(shard.keys.root(root.seq), what));
    }
    Ok(walked)
}

/// Folds blocks into a state, and says what contradicts it.
pub(super) struct Follower<'a> {
    pub state: &'a mut State,
    epoch: u32,
    streams: BTreeMap<StreamKey, (Offset, Chain)>,
}

impl<'a> Follower<'a> {
    pub fn new(state: &'a mut State) -> Self {
        let streams = state.streams().map(|(key, stream)| (key.clone(), (stream.next, stream.chain))).collect();
        Self { state, epoch: 0, streams }
    }

    /// Takes a block in.
    pub fn follow(&mut self, key: &Path, position: u64, block: &Block, findings: &mut Vec<Finding>) {
        let seq = block.header().seq;
        let mut wrong = |at: u64, what: String| findings.push(Finding::at(key, at, format!("block {seq}: {what}")));
        if block.header().epoch < self.epoch {
            wrong(position, format!("epoch {} after epoch {}", block.header().epoch, self.epoch));
        }
        self.epoch = block.header().epoch;
        for entry in block.entries() {
            if let Some(what) = check_entry(self.state, block, entry) {
                wrong(position + u64::from(entry.position), what);
            }
        }
        let changes = match fold(self.state, block) {
            Ok(changes) => changes,
            Err(error) => return wrong(position, error.to_string()),
        };
        for change in &changes {
            if let Change::Streams(StreamChange::Position { key, next, chain, .. }) = change {
                let before = self.streams.insert(key.clone(), (*next, *chain));
                let rises = before.is_none_or(|(at, had)| *next > at || (*next == at && *chain == had));
                if !rises || *next < 0 {
                    let (edge, stream) = (&key.edge, &key.stream);
                    let before = before.map_or(0, |(at, _)| at);
                    wrong(position, format!("stream {stream} of {edge} goes from position {before} to {next}"));
                }
            }
        }
    }
}

/// What is wrong with a partition's batches in a block.
fn check_entry(state: &State, block: &Block, entry: &Entry) -> Option<String> {
    let partition = entry.partition;
    if let Some(known) = state.partition(partition) {
        let (end, base) = (known.high_watermark, entry.base);
        if base < end || (base > end && !known.left_out(end, base)) {
            return Some(format!("{partition} goes on at offset {base}, {end} was expected"));
        }
    }
    let (mut rest, mut next, mut batches) = (block.data(entry), entry.base, 0);
    loop {
        match Batch::split_first(&mut rest) {
            Ok(Some(batch)) if batch.base_offset() == next => {
                next = batch.last_offset().saturating_add(1);
                batches += 1;
            }
            Ok(Some(batch)) => {
                return Some(format!("{partition}: batch at offset {}, {next} was expected", batch.base_offset()));
            }
            Ok(None) => break,
            Err(error) => return Some(format!("{partition}, batch expected at offset {next}: {error}")),
        }
    }
    let agrees = next == entry.last.saturating_add(1) && batches == entry.batches;
    (!agrees).then(|| format!("{partition}: its entry says other offsets than its batches"))
}
