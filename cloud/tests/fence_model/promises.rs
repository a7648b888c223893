//! The promises, and a witness who has seen everything and therefore knows when one is broken.

use super::bucket::{BlockId, Blocks, ROOTS, Root, SegmentName, WALS};
use super::checker::Broken;
use super::protocol::State;

pub const IN_HISTORY: &str = "what was acknowledged or served is in the history of every later owner";
pub const NO_INTERLEAVING: &str = "after a fence no block of an older epoch follows";
pub const NOTHING_LATE: &str = "a deposed owner acknowledges nothing that the newer one lacks";
pub const NO_HOLE: &str = "nothing that the root in force needs is missing";
pub const NOT_TWICE: &str = "no sequence number is acknowledged twice with different content";
pub const TRULY_PUBLISHED: &str = "what an owner takes for published has been in force";
pub const NOT_BY_ITSELF: &str = "no owner is deposed by a request of its own";

/// All of them.
pub const ALL: &[&str] =
    &[IN_HISTORY, NO_INTERLEAVING, NOTHING_LATE, NO_HOLE, NOT_TWICE, TRULY_PUBLISHED, NOT_BY_ITSELF];
/// All that are about data.
pub const SAFETY: &[&str] = &[IN_HISTORY, NO_INTERLEAVING, NOTHING_LATE, NO_HOLE, NOT_TWICE, TRULY_PUBLISHED];

/// What happened, seen from outside.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Witness {
    acknowledged: Blocks,
    /// The history with which the greatest epoch so far began to serve.
    served: Blocks,
    served_next: u8,
    served_epoch: u8,
    /// The nonces of the roots that were in force. A name gets its first content as the newest root; what gets it again,
    /// after a deletion, was never in force.
    in_force: [u8; ROOTS],
}

impl Witness {
    pub fn new(first: BlockId, root: &Root) -> Self {
        let mut served = Blocks::default();
        served[0] = first;
        let mut in_force = [0; ROOTS];
        in_force[0] = root.nonce();
        Self { acknowledged: Blocks::default(), served, served_next: 1, served_epoch: 1, in_force }
    }

    pub fn root_created(&mut self, seq: u8, root: &Root) {
        let first = &mut self.in_force[usize::from(seq)];
        if *first == 0 {
            *first = root.nonce();
        }
    }

    pub fn acknowledged(&mut self, name: char, epoch: u8, seq: u8, block: BlockId) -> Result<(), Broken> {
        let before = self.acknowledged[usize::from(seq)];
        if before.exists() && before != block {
            return broken(NOT_TWICE, format!("{name} acknowledges block {seq} as {block}, before it was {before}"));
        }
        let known = seq < self.served_next && self.served[usize::from(seq)] == block;
        if epoch < self.served_epoch && !known {
            let newer = self.served_epoch;
            return broken(
                NOTHING_LATE,
                format!("{name} acknowledges block {seq} = {block}, epoch {newer} serves without it"),
            );
        }
        self.acknowledged[usize::from(seq)] = block;
        Ok(())
    }

    pub fn serves(&mut self, name: char, epoch: u8, history: &Blocks, next: u8) -> Result<(), Broken> {
        let ours = |seq: usize| if seq < usize::from(next) { history[seq] } else { BlockId::NONE };
        for seq in 0..WALS {
            for (what, must) in [("acknowledged", self.acknowledged[seq]), ("served", self.served[seq])] {
                if must.exists() && ours(seq) != must {
                    return broken(IN_HISTORY, format!("block {seq} was {what} as {must}, {name} has {}", ours(seq)));
                }
            }
        }
        let known = &history[..usize::from(next)];
        if let Some(seq) = known.iter().position(|block| !block.exists()) {
            return broken(NO_HOLE, format!("{name} has no block {seq}"));
        }
        for (seq, pair) in (1..).zip(known.windows(2)) {
            let &[before, block] = pair else { continue };
            if block.epoch() < before.epoch() || block.is_fence() && block.epoch() == before.epoch() {
                return broken(NO_INTERLEAVING, format!("{name} has {block} as block {seq}, after {before}"));
            }
        }
        if epoch > self.served_epoch {
            (self.served_epoch, self.served_next, self.served) = (epoch, next, *history);
        }
        Ok(())
    }

    pub fn knows_no_newer(&self, epoch: u8) -> bool {
        epoch > self.served_epoch
    }

    pub fn published(&self, name: char, seq: u8, root: &Root) -> Result<(), Broken> {
        if self.in_force[usize::from(seq)] == root.nonce() {
            return Ok(());
        }
        broken(
            TRULY_PUBLISHED,
            format!("{name} takes root/{seq} {root} for published, another of that name was in force"),
        )
    }
}

/// What must hold of the bucket at every moment.
pub fn in_force(state: &State) -> Result<(), Broken> {
    let bucket = &state.bucket;
    let seq = bucket.newest().ok_or_else(no_root)?;
    let root = bucket.root(seq);
    let tail = bucket.wal.iter().rposition(|block| block.exists()).map_or(0, |last| last as u8 + 1);
    if let Some(missing) = (root.trim..tail).find(|seq| !bucket.block(*seq).exists()) {
        return broken(NO_HOLE, format!("root/{seq} needs the WAL from {}, wal/{missing} is missing", root.trim));
    }
    if bucket.segments >> root.segment & 1 == 0 {
        return broken(NO_HOLE, format!("root/{seq} names {}, which is missing", SegmentName(root.segment)));
    }
    for (at, must) in (0..).zip(state.witness.acknowledged) {
        let has = if at < root.trim { root.history[usize::from(at)] } else { bucket.block(at) };
        if must.exists() && has != must {
            return broken(IN_HISTORY, format!("block {at} was acknowledged as {must}, with root/{seq} it is {has}"));
        }
    }
    Ok(())
}

/// An owner of `own` (node, epoch) steps down before an object of `other`.
pub fn deposed(name: char, own: (u8, u8), other: (u8, u8)) -> Result<(), Broken> {
    if own != other {
        return Ok(());
    }
    broken(NOT_BY_ITSELF, format!("{name} steps down before an object of its own, epoch {}", own.1))
}

pub fn no_root() -> Broken {
    Broken { promise: NO_HOLE, how: "there is no root left".into() }
}

fn broken(promise: &'static str, how: String) -> Result<(), Broken> {
    Err(Broken { promise, how })
}
