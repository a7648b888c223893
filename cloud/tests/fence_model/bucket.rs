//! The object store as the protocol sees it: names, `Create`, requests under way that land when they like.

use std::hash::{Hash, Hasher};

/// WAL names at most.
pub const WALS: usize = 8;
/// Root names at most.
pub const ROOTS: usize = 8;
/// Requests whose senders no longer listen, at most.
pub const STRAYS: usize = 2;

/// The node that stands in the blocks which a copied data directory has in common with its original.
pub const COMMON: u8 = 7;

/// What a block says: whose it is, and whether it is a fence. The sequence number is its name. 0: no block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BlockId(pub u8);

/// Hashing is most of the search's work where nothing is optimised: eight blocks are one number.
impl Hash for BlockId {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        hasher.write_u8(self.0);
    }

    fn hash_slice<H: Hasher>(blocks: &[Self], hasher: &mut H) {
        for eight in blocks.chunks(8) {
            hasher.write_u64(packed(eight.iter().map(|block| block.0)));
        }
    }
}

impl BlockId {
    pub const NONE: Self = Self(0);

    pub fn new(epoch: u8, node: u8, fence: bool) -> Self {
        Self((epoch << 4) | (node << 1) | u8::from(fence))
    }

    /// The same place and owner, other content: what is written after such a block was given up.
    pub fn remade(self) -> Self {
        Self(self.0 | 1 << 7)
    }

    pub fn epoch(self) -> u8 {
        self.0 >> 4 & 7
    }

    pub fn node(self) -> u8 {
        (self.0 >> 1) & 7
    }

    pub fn is_fence(self) -> bool {
        self.0 & 1 == 1
    }

    pub fn exists(self) -> bool {
        self.0 != 0
    }
}

impl std::fmt::Display for BlockId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.exists(), self.node()) {
            (false, _) => write!(f, "-"),
            (true, COMMON) => write!(f, "e{}common", self.epoch()),
            (true, node) => {
                let mark = if self.is_fence() { "!" } else { "" };
                write!(f, "e{}{}{mark}{}", self.epoch(), letter(node), if self.0 >> 7 == 1 { "'" } else { "" })
            }
        }
    }
}

/// The tag of a root that claims.
pub const CLAIM: u8 = 7;

/// Blocks by sequence number.
pub type Blocks = [BlockId; WALS];

/// A root's content. `epoch` 0: no root.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Root {
    pub epoch: u8,
    pub node: u8,
    /// With epoch and node, the nonce.
    pub tag: u8,
    /// Every block below is in what the root names; the WAL is needed from here.
    pub trim: u8,
    /// The manifest names of all fences, a bit each.
    pub fence_roots: u8,
    /// The WAL names of all fences, a bit each.
    pub fence_wals: u8,
    /// The object that holds what lies below `trim`, which publishing writes anew now and then.
    pub segment: u8,
    /// What lies below `trim`.
    pub history: Blocks,
}

impl Hash for Root {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        let Self { epoch, node, tag, trim, fence_roots, fence_wals, segment, history } = *self;
        if epoch == 0 {
            return hasher.write_u8(0);
        }
        hasher.write_u64(packed([epoch, node, tag, trim, fence_roots, fence_wals, segment].into_iter()));
        BlockId::hash_slice(&history, hasher);
    }
}

impl Root {
    pub fn exists(&self) -> bool {
        self.epoch != 0
    }

    /// What no two different roots of one name share.
    pub fn nonce(&self) -> u8 {
        (self.epoch << 5) | (self.node << 3) | self.tag
    }
}

/// The objects.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Bucket {
    pub wal: Blocks,
    pub roots: [Root; ROOTS],
    /// Segment objects, a bit each.
    pub segments: u128,
}

impl Bucket {
    /// What a LIST shows as the newest root's number.
    pub fn newest(&self) -> Option<u8> {
        self.roots.iter().rposition(Root::exists).map(|seq| seq as u8)
    }

    pub fn root(&self, seq: u8) -> Root {
        self.roots[usize::from(seq)]
    }

    pub fn block(&self, seq: u8) -> BlockId {
        self.wal[usize::from(seq)]
    }

    /// `PUT If-None-Match: *`. `false`: there is an object of that name.
    pub fn create(&mut self, put: &Put) -> bool {
        match *put {
            Put::Block { seq, block } => {
                let there = &mut self.wal[usize::from(seq)];
                let free = !there.exists();
                if free {
                    *there = block;
                }
                free
            }
            Put::Root { seq, root } => {
                let there = &mut self.roots[usize::from(seq)];
                let free = !there.exists();
                if free {
                    *there = root;
                }
                free
            }
        }
    }

    /// Reads back what has the name of `put`.
    pub fn settle(&self, put: &Put) -> Settled {
        let (exists, same) = match *put {
            Put::Block { seq, block } => (self.block(seq).exists(), self.block(seq) == block),
            Put::Root { seq, root } => (self.root(seq).exists(), self.root(seq) == root),
        };
        match (exists, same) {
            (false, _) => Settled::Missing,
            (true, true) => Settled::Same,
            (true, false) => Settled::Other,
        }
    }
}

/// What reading back an object that exists already says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settled {
    Same,
    Other,
    Missing,
}

/// A PUT.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Put {
    Block { seq: u8, block: BlockId },
    Root { seq: u8, root: Root },
}

impl std::fmt::Display for Put {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Block { seq, block } => write!(f, "PUT wal/{seq} = {block}"),
            Self::Root { seq, root } => write!(f, "PUT root/{seq} = {root}"),
        }
    }
}

impl std::fmt::Display for Root {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "(e{}{}", self.epoch, letter(self.node))?;
        if self.tag == CLAIM {
            write!(f, " claim")?;
        }
        write!(f, ", trim {}, {})", self.trim, SegmentName(self.segment))
    }
}

/// A segment's bit, for people: the epoch and the root that it was written for, marked to tell two of them apart.
pub struct SegmentName(pub u8);

impl std::fmt::Display for SegmentName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "seg{}-{}{}", self.0 >> 4, self.0 >> 1 & 7, if self.0 & 1 == 1 { "'" } else { "" })
    }
}

/// Names that a DELETE was ever sent for, a bit each. It is never taken back: a DELETE may land late, and twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Doomed {
    pub wals: u8,
    pub roots: u8,
    pub segments: u128,
}

fn packed(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0, |number, byte| number << 8 | u64::from(byte))
}

/// The name of a node.
pub fn letter(node: u8) -> char {
    (b'A' + node) as char
}

/// Whether bit `at` is set.
pub fn has(mask: u8, at: u8) -> bool {
    mask >> at & 1 == 1
}
