//! The protocol: what nodes do, in steps between which anything else may happen.
//!
//! A node that is paused is one whose next step is long in coming, so pauses need no action of their own, and a crashed
//! node is one that never wakes up. A request is done the moment it lands; its answer may be lost, and then a second
//! copy is under way that lands at any later time or never, while the sender asks again.

use super::bucket::{
    BlockId, Blocks, Bucket, CLAIM, COMMON, Doomed, Put, ROOTS, Root, STRAYS, SegmentName, Settled, WALS, has, letter,
};
use super::checker::{Broken, Model, Tale};
use super::promises::{self, Witness};

/// Nodes at most.
pub const NODES: usize = 3;

/// What the protocol does. `false` is a mistake that the check must notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// A claim writes a fence block where the WAL ends.
    pub fence_block: bool,
    /// Fence blocks are never deleted.
    pub keep_fence_blocks: bool,
    /// The first root of an epoch is never deleted.
    pub keep_fence_roots: bool,
    /// What exists already is read back and compared; otherwise it is taken for one's own.
    pub compare: bool,
    /// A claim goes on only if its root is the newest.
    pub check_claim: bool,
    /// It is looked at once more when the fence stands.
    pub check_fence: bool,
    /// The WAL is trimmed when the root that allows it is in force.
    pub publish_first: bool,
    /// A block whose PUT has no known outcome is repeated until it has one.
    pub repeat_block: bool,
    /// So is a root. Otherwise another one is made in its place.
    pub repeat_root: bool,
    /// Before it deletes anything, a publisher looks whether its root is the newest.
    pub check_publish: bool,
    /// What an owner who goes on with a local WAL calls its fence is the first block of its own epoch; otherwise
    /// whatever comes next.
    pub own_fence: bool,
}

impl Rules {
    /// The protocol.
    pub const ALL: Self = Self {
        fence_block: true,
        keep_fence_blocks: true,
        keep_fence_roots: true,
        compare: true,
        check_claim: true,
        check_fence: true,
        publish_first: true,
        repeat_block: true,
        repeat_root: true,
        check_publish: false,
        own_fence: true,
    };
}

/// How much may happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Node A owns the shard at the beginning, the others are idle.
    pub nodes: usize,
    /// Claims begun, those that start over counted again.
    pub claims: u8,
    /// Blocks appended, fences not counted.
    pub appends: u8,
    /// Roots published, claims not counted.
    pub publishes: u8,
    /// Answers lost.
    pub lost: u8,
    /// Whether others may act between two blocks that a claim reads.
    pub stepwise: bool,
    /// Where a local WAL ends that nodes A and B have in common, because one is a copy of the other. 0: there is none,
    /// the shard's only WAL is in the bucket.
    pub common: u8,
}

/// The protocol under bounds.
#[derive(Debug, Clone, Copy)]
pub struct Protocol {
    pub rules: Rules,
    pub bounds: Bounds,
    /// The promises of interest.
    pub promises: &'static [&'static str],
}

/// Where a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
enum At {
    #[default]
    Idle,
    ReadWal,
    PutRoot,
    SettleRoot,
    CheckRoot,
    PutFence,
    SettleFence,
    CheckFence,
    Serving,
}

/// Where an owner's append or publish is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
enum Under {
    #[default]
    Nothing,
    Put,
    Settle,
    Check,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
struct Node {
    at: At,
    /// The root read, then claimed with, then in force as far as the node knows; and its number.
    root: Root,
    seq: u8,
    /// The blocks that the node knows of, below `next`.
    history: Blocks,
    next: u8,
    epoch: u8,
    claim_seq: u8,
    append: Under,
    publish: Under,
    /// The root being published.
    draft: Root,
    swept: bool,
    /// Owns without a fence of its own yet, having gone on with a local WAL.
    unfenced: bool,
    /// Has the common local WAL.
    local: bool,
    /// Gave up the block before this one, whose number this one has.
    remade: bool,
}

/// Everything at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct State {
    pub bucket: Bucket,
    doomed: Doomed,
    strays: [Option<Put>; STRAYS],
    nodes: [Node; NODES],
    pub witness: Witness,
    claims: u8,
    appends: u8,
    publishes: u8,
    lost: u8,
}

/// What may happen next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Claim(u8),
    Advance(u8),
    Append(u8),
    Draft {
        node: u8,
        rewrite: bool,
    },
    Publish(u8),
    Sweep(u8),
    /// The answer to the claim's, the append's, the publisher's PUT is lost, and the sender asks again.
    LoseClaim(u8),
    LoseAppend(u8),
    LosePublish(u8),
    /// The same, and the sender turns to something else.
    ForgetAppend(u8),
    ForgetPublish(u8),
    Land(u8),
    DeleteWal(u8),
    DeleteRoot(u8),
    DeleteSegment(u8),
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn initial(&self) -> State {
        let Bounds { nodes, claims, appends, publishes, lost, common, .. } = self.bounds;
        assert!(
            nodes <= NODES && usize::from(1 + claims + appends) <= WALS && usize::from(1 + claims + publishes) <= ROOTS
        );
        assert!(claims < 7 && lost < 8 && common <= 1 + appends);
        let fence = BlockId::new(1, 0, true);
        let root = Root { epoch: 1, fence_roots: 1, fence_wals: 1, segment: segment(1, 0, 0), ..Root::default() };
        let mut bucket = Bucket::default();
        bucket.wal[0] = fence;
        bucket.roots[0] = root;
        bucket.segments = 1 << root.segment;
        let mut all = [Node::default(); NODES];
        let [a, b, _] = &mut all;
        (a.local, b.local) = (common > 0, common > 0);
        (a.at, a.root, a.next, a.epoch, a.swept) = (At::Serving, root, 1, 1, true);
        a.history[0] = fence;
        let witness = Witness::new(fence, &root);
        let (doomed, strays) = Default::default();
        State { bucket, doomed, strays, nodes: all, witness, claims, appends, publishes, lost }
    }

    fn actions(&self, state: &State, found: &mut Vec<Action>) {
        // Idle nodes differ by name only, or by having a local WAL: the first of a kind acts for all.
        let mut idle = [false; 2];
        for (node, of) in (0..self.bounds.nodes as u8).zip(&state.nodes) {
            match of.at {
                At::Idle => {
                    let first = !std::mem::replace(&mut idle[usize::from(of.local)], true);
                    if state.claims > 0 && first {
                        found.push(Action::Claim(node));
                    }
                }
                At::Serving => self.owner_actions(state, node, found),
                at => {
                    found.push(Action::Advance(node));
                    if state.lost > 0 && matches!(at, At::PutRoot | At::PutFence) {
                        found.push(Action::LoseClaim(node));
                    }
                }
            }
        }
        for (at, stray) in (0..).zip(&state.strays) {
            let free = |put: &Put| state.bucket.settle(put) == Settled::Missing;
            if stray.as_ref().is_some_and(free) {
                found.push(Action::Land(at));
            }
        }
        // A DELETE commutes with all that does not touch its name: it need land only when somebody is about to.
        let Doomed { wals, roots, segments } = state.doomed;
        let noticed = self.noticed(state);
        let there = |seq: &u8| has(wals & noticed.wals, *seq) && state.bucket.block(*seq).exists();
        found.extend((0..WALS as u8).filter(there).map(Action::DeleteWal));
        let there = |seq: &u8| has(roots & noticed.roots, *seq) && state.bucket.root(*seq).exists();
        found.extend((0..ROOTS as u8).filter(there).map(Action::DeleteRoot));
        let segments = segments & noticed.segments & state.bucket.segments;
        if segments != 0 {
            found.push(Action::DeleteSegment(segments.trailing_zeros() as u8));
        }
    }

    fn step(&self, state: &State, action: Action, tale: &mut Tale) -> Result<State, Broken> {
        let mut after = state.clone();
        let kept = self.act(&mut after, action, tale).and_then(|()| promises::in_force(&after));
        match kept {
            Err(broken) if self.promises.contains(&broken.promise) => Err(broken),
            _ => Ok(after),
        }
    }

    fn picture(&self, state: &State) -> String {
        let present = |(seq, root): (usize, &Root)| root.exists().then(|| format!("{seq}{root}"));
        let roots: Vec<String> = state.bucket.roots.iter().enumerate().filter_map(present).collect();
        let wal: Vec<String> = state.bucket.wal.iter().map(BlockId::to_string).collect();
        format!("roots {} | wal {}", roots.join(" "), wal.join(" "))
    }
}

impl Protocol {
    fn owner_actions(&self, state: &State, node: u8, found: &mut Vec<Action>) {
        let of = &state.nodes[usize::from(node)];
        let lose = state.lost > 0;
        if of.append != Under::Nothing || state.appends > 0 {
            found.push(Action::Append(node));
        }
        if lose && (of.append == Under::Put || of.append == Under::Nothing && state.appends > 0) {
            found.push(Action::LoseAppend(node));
            if !self.rules.repeat_block {
                found.push(Action::ForgetAppend(node));
            }
        }
        match of.publish {
            Under::Nothing if state.publishes > 0 => {
                if of.next > of.root.trim {
                    found.push(Action::Draft { node, rewrite: false });
                }
                found.push(Action::Draft { node, rewrite: true });
            }
            Under::Nothing => {}
            under => {
                found.push(Action::Publish(node));
                if lose && under == Under::Put {
                    found.push(Action::LosePublish(node));
                    if !self.rules.repeat_root {
                        found.push(Action::ForgetPublish(node));
                    }
                }
            }
        }
        if !of.swept && self.swept(state, of) != state.doomed {
            found.push(Action::Sweep(node));
        }
    }

    /// The names that the root in force needs, or that a request touches which may be made next.
    fn noticed(&self, state: &State) -> Doomed {
        let newest = state.bucket.newest().unwrap_or(0);
        let root = state.bucket.root(newest);
        let from = |seq: u8| ((0xff_u16 << seq) & 0xff) as u8;
        let bit = |seq: u8| ((1_u16 << seq) & 0xff) as u8;
        let mut noticed = Doomed { wals: from(root.trim), roots: bit(newest), segments: 1 << root.segment };
        for of in &state.nodes {
            match of.at {
                At::Idle | At::CheckRoot | At::CheckFence => {}
                At::ReadWal => noticed.wals |= from(of.next),
                At::PutRoot | At::SettleRoot => noticed.roots |= bit(of.seq + 1),
                At::PutFence | At::SettleFence => noticed.wals |= bit(of.next),
                At::Serving => {
                    let appends = of.append != Under::Nothing || state.appends > 0;
                    noticed.wals |= if appends { bit(of.next) } else { 0 };
                    noticed.roots |= if of.publish == Under::Nothing { 0 } else { bit(of.seq + 1) };
                }
            }
        }
        for stray in state.strays.iter().flatten() {
            match *stray {
                Put::Block { seq, .. } => noticed.wals |= bit(seq),
                Put::Root { seq, .. } => noticed.roots |= bit(seq),
            }
        }
        noticed
    }

    fn act(&self, state: &mut State, action: Action, tale: &mut Tale) -> Result<(), Broken> {
        match action {
            Action::Claim(node) => {
                state.claims -= 1;
                let seq = state.bucket.newest().ok_or_else(promises::no_root)?;
                // If the root is gone again before it is read, this starts over: as if it had not begun.
                let root = state.bucket.root(seq);
                let of = &mut state.nodes[usize::from(node)];
                let (next, history) = (root.trim, root.history);
                *of = Node { at: At::ReadWal, root, seq, next, history, local: of.local, ..Node::default() };
                tale.tell(format_args!("{} wants the shard and reads the newest root/{seq} {root}", letter(node)));
            }
            Action::Advance(node) => return self.advance(state, node, tale),
            Action::Append(node) => return self.append(state, node, tale),
            Action::Draft { node, rewrite } => self.draft(state, node, rewrite, tale),
            Action::Publish(node) => return self.publish(state, node, tale),
            Action::Sweep(node) => {
                let of = state.nodes[usize::from(node)];
                state.doomed = self.swept(state, &of);
                state.nodes[usize::from(node)].swept = true;
                tale.tell(format_args!("{} sweeps up what earlier owners left", letter(node)));
            }
            Action::LoseClaim(node) => {
                let of = state.nodes[usize::from(node)];
                let put = if of.at == At::PutRoot { self.claim_put(state, node) } else { fence_put(&of, node) };
                stray(state, node, put, tale, "repeats it");
            }
            Action::LoseAppend(node) => {
                let of = &mut state.nodes[usize::from(node)];
                if of.append == Under::Nothing {
                    state.appends -= 1;
                    of.append = Under::Put;
                }
                let put = self.append_put(state, node);
                stray(state, node, put, tale, "repeats it");
            }
            Action::LosePublish(node) => {
                let put = publish_put(&state.nodes[usize::from(node)]);
                stray(state, node, put, tale, "repeats it");
            }
            Action::ForgetAppend(node) => {
                let put = self.append_put(state, node);
                let of = &mut state.nodes[usize::from(node)];
                state.appends -= u8::from(of.append == Under::Nothing);
                (of.append, of.remade) = (Under::Nothing, true);
                stray(state, node, put, tale, "gives it up");
            }
            Action::ForgetPublish(node) => {
                let of = &mut state.nodes[usize::from(node)];
                let put = publish_put(of);
                (of.publish, of.draft) = Default::default();
                stray(state, node, put, tale, "begins the round anew");
            }
            Action::Land(at) => {
                let put = state.strays[usize::from(at)].take().expect("only strays land");
                create(state, &put);
                tale.tell(format_args!("the delayed {put} lands"));
            }
            Action::DeleteWal(seq) => {
                state.bucket.wal[usize::from(seq)] = BlockId::NONE;
                tale.tell(format_args!("a DELETE of wal/{seq} lands"));
            }
            Action::DeleteRoot(seq) => {
                state.bucket.roots[usize::from(seq)] = Root::default();
                tale.tell(format_args!("a DELETE of root/{seq} lands"));
            }
            Action::DeleteSegment(id) => {
                state.bucket.segments &= !(1 << id);
                tale.tell(format_args!("a DELETE of {} lands", SegmentName(id)));
            }
        }
        Ok(())
    }

    /// A claim's next step.
    fn advance(&self, state: &mut State, node: u8, tale: &mut Tale) -> Result<(), Broken> {
        let name = letter(node);
        let mut of = state.nodes[usize::from(node)];
        match of.at {
            At::ReadWal => {
                while of.at == At::ReadWal {
                    let block = if usize::from(of.next) < WALS { state.bucket.block(of.next) } else { BlockId::NONE };
                    if block.exists() {
                        of.history[usize::from(of.next)] = block;
                        of.next += 1;
                        tale.tell(format_args!("{name} reads wal/{} = {block}, ", of.next - 1));
                    } else {
                        let newest = of.history.iter().map(|block| block.epoch()).max().unwrap_or(0);
                        (of.at, of.epoch) = (At::PutRoot, of.root.epoch.max(newest) + 1);
                        // Only a WAL that is the bucket's and more is gone on with.
                        let common = |block: &BlockId| !block.exists() || block.epoch() == 1;
                        of.local &= of.next <= self.bounds.common && of.history.iter().all(common);
                        tale.tell(format_args!("{name} finds no wal/{}: the WAL ends there", of.next));
                    }
                    if self.bounds.stepwise {
                        break;
                    }
                }
            }
            At::PutRoot => {
                let put = self.claim_put(state, node);
                if create(state, &put) || !self.rules.compare {
                    claimed(&mut of, &put);
                    tale.tell(format_args!("{name} claims: {put}"));
                } else {
                    of.at = At::SettleRoot;
                    tale.tell(format_args!("{name} claims: {put}: exists already"));
                }
            }
            At::SettleRoot => {
                let put = self.claim_put(state, node);
                let settled = state.bucket.settle(&put);
                tale.tell(format_args!("{name} reads back root/{}: {settled:?}", of.seq + 1));
                match settled {
                    Settled::Same => claimed(&mut of, &put),
                    Settled::Missing => of.at = At::PutRoot,
                    Settled::Other => of = start_over(&of),
                }
            }
            At::CheckRoot => {
                let newest = state.bucket.newest().ok_or_else(promises::no_root)?;
                if newest == of.seq || !self.rules.check_claim {
                    if of.local {
                        (of.at, of.unfenced) = (At::Serving, true);
                        tale.tell(format_args!(
                            "{name}'s root is the newest: it goes on with its local WAL from block {}",
                            of.next
                        ));
                    } else if self.rules.fence_block {
                        of.at = At::PutFence;
                        tale.tell(format_args!("{name} sees that root/{newest} is the newest, goes on"));
                    } else {
                        of.at = At::CheckFence;
                        tale.tell(format_args!(
                            "{name} sees that root/{newest} is the newest, goes on without a fence"
                        ));
                    }
                } else {
                    tale.tell(format_args!("{name} sees that root/{newest} is the newest, not its own; starts over"));
                    of = start_over(&of);
                }
            }
            At::PutFence => {
                let put = fence_put(&of, node);
                if create(state, &put) || !self.rules.compare {
                    fenced(&mut of, node);
                    tale.tell(format_args!("{name} fences: {put}"));
                } else {
                    of.at = At::SettleFence;
                    tale.tell(format_args!("{name} fences: {put}: exists already"));
                }
            }
            At::SettleFence => {
                let settled = state.bucket.settle(&fence_put(&of, node));
                tale.tell(format_args!("{name} reads back wal/{}: {settled:?}", of.next));
                match settled {
                    Settled::Same => fenced(&mut of, node),
                    Settled::Missing => of.at = At::PutFence,
                    Settled::Other => of = start_over(&of),
                }
            }
            At::CheckFence => {
                let newest = state.bucket.newest().ok_or_else(promises::no_root)?;
                if newest == of.seq || !self.rules.check_fence {
                    of.at = At::Serving;
                    state.nodes[usize::from(node)] = of;
                    tale.tell(format_args!(
                        "{name} sees that root/{newest} is the newest, and serves from block {}",
                        of.next
                    ));
                    return state.witness.serves(name, of.epoch, &of.history, of.next);
                }
                tale.tell(format_args!("{name} sees that root/{newest} is the newest, not its own; starts over"));
                of = start_over(&of);
            }
            At::Idle | At::Serving => unreachable!("neither is a step of a claim"),
        }
        state.nodes[usize::from(node)] = of;
        Ok(())
    }

    /// The next step of an owner's append.
    fn append(&self, state: &mut State, node: u8, tale: &mut Tale) -> Result<(), Broken> {
        let put = self.append_put(state, node);
        let at = usize::from(node);
        if state.nodes[at].append == Under::Nothing {
            state.appends -= 1;
        }
        let settled = if state.nodes[at].append == Under::Settle {
            state.bucket.settle(&put)
        } else if create(state, &put) || !self.rules.compare {
            Settled::Same
        } else {
            state.nodes[at].append = Under::Settle;
            tale.tell(format_args!("{} appends: {put}: exists already", letter(node)));
            return Ok(());
        };
        match settled {
            Settled::Missing => {
                state.nodes[at].append = Under::Put;
                tale.tell(format_args!("{} reads back what it appended: gone; asks again", letter(node)));
                Ok(())
            }
            Settled::Other => {
                tale.tell(format_args!("{} reads back {put}: another's. It is deposed", letter(node)));
                self.deposed(state, node, &put)
            }
            Settled::Same => {
                tale.tell(format_args!("{} appends: {put}, acknowledged", letter(node)));
                self.appended(state, node, &put)
            }
        }
    }

    fn appended(&self, state: &mut State, node: u8, put: &Put) -> Result<(), Broken> {
        let Put::Block { seq, block } = *put else { unreachable!("appends put blocks") };
        let of = &mut state.nodes[usize::from(node)];
        of.history[usize::from(seq)] = block;
        (of.next, of.append, of.remade) = (seq + 1, Under::Nothing, false);
        let (epoch, history, next) = (of.epoch, of.history, of.next);
        // One that was paused before it heard that its fence stands may hear it when others serve: it begins nothing.
        if block.epoch() == epoch && std::mem::take(&mut of.unfenced) && state.witness.knows_no_newer(epoch) {
            state.witness.serves(letter(node), epoch, &history, next)?;
        }
        state.witness.acknowledged(letter(node), epoch, seq, block)
    }

    /// Begins a round: what the new root will say, and the objects that it will name.
    fn draft(&self, state: &mut State, node: u8, rewrite: bool, tale: &mut Tale) {
        state.publishes -= 1;
        let tag = state.publishes;
        let of = &mut state.nodes[usize::from(node)];
        let segment = if rewrite { segment(of.epoch, of.seq + 1, tag) } else { of.root.segment };
        state.bucket.segments |= 1 << segment;
        let mut history = of.history;
        history[usize::from(of.next)..].fill(BlockId::NONE);
        of.draft = Root { epoch: of.epoch, node, tag, trim: of.next, segment, history, ..of.root };
        of.publish = Under::Put;
        if !self.rules.publish_first {
            state.doomed.wals |= self.trimmed(&of.draft);
        }
        tale.tell(format_args!("{} begins a round for root/{} = {}", letter(node), of.seq + 1, of.draft));
    }

    /// The next step of an owner's publish.
    fn publish(&self, state: &mut State, node: u8, tale: &mut Tale) -> Result<(), Broken> {
        let at = usize::from(node);
        let put = publish_put(&state.nodes[at]);
        let (name, seq) = (letter(node), state.nodes[at].seq + 1);
        let under = state.nodes[at].publish;
        let settled = match under {
            Under::Check if state.bucket.newest() == Some(seq) => {
                tale.tell(format_args!("{name} sees that its root is the newest"));
                return self.published(state, node);
            }
            Under::Check => {
                tale.tell(format_args!("{name} sees that its root is not the newest: it is deposed"));
                state.nodes[at] = Node::default();
                return Ok(());
            }
            Under::Settle => state.bucket.settle(&put),
            _ if create(state, &put) || !self.rules.compare => Settled::Same,
            _ => {
                state.nodes[at].publish = Under::Settle;
                tale.tell(format_args!("{name} publishes: {put}: exists already"));
                return Ok(());
            }
        };
        match settled {
            Settled::Missing => {
                state.nodes[at].publish = Under::Put;
                tale.tell(format_args!("{name} reads back what it published: gone; asks again"));
                Ok(())
            }
            Settled::Other => {
                tale.tell(format_args!("{name} reads back root/{seq}: another's. It is deposed"));
                self.deposed(state, node, &put)
            }
            Settled::Same if self.rules.check_publish => {
                state.nodes[at].publish = Under::Check;
                tale.tell(format_args!("{name} publishes: {put}"));
                Ok(())
            }
            Settled::Same => {
                tale.tell(format_args!("{name} publishes: {put}"));
                self.published(state, node)
            }
        }
    }

    /// What the new root no longer names may go.
    fn published(&self, state: &mut State, node: u8) -> Result<(), Broken> {
        let of = &mut state.nodes[usize::from(node)];
        let (old, old_seq) = (std::mem::replace(&mut of.root, of.draft), of.seq);
        let root = of.root;
        (of.publish, of.draft, of.seq) = (Under::Nothing, Root::default(), old_seq + 1);
        let seq = of.seq;
        state.doomed.wals |= self.trimmed(&root);
        if !self.rules.keep_fence_roots || !has(root.fence_roots, old_seq) {
            state.doomed.roots |= 1 << old_seq;
        }
        if old.segment != root.segment {
            state.doomed.segments |= 1 << old.segment;
        }
        state.witness.published(letter(node), seq, &root)
    }

    fn trimmed(&self, root: &Root) -> u8 {
        let fences = if self.rules.keep_fence_blocks { root.fence_wals } else { 0 };
        ((1u16 << root.trim) - 1) as u8 & !fences
    }

    /// What the owner may delete of what a listing shows.
    fn swept(&self, state: &State, of: &Node) -> Doomed {
        let mut doomed = state.doomed;
        let fences = if self.rules.keep_fence_roots { of.root.fence_roots } else { 0 };
        for seq in (0..of.claim_seq).filter(|seq| !has(fences, *seq) && state.bucket.root(*seq).exists()) {
            doomed.roots |= 1 << seq;
        }
        let trimmed = self.trimmed(&of.root);
        for seq in (0..of.root.trim).filter(|seq| has(trimmed, *seq) && state.bucket.block(*seq).exists()) {
            doomed.wals |= 1 << seq;
        }
        let older = (1u128 << segment(of.epoch, 0, 0)) - 1;
        doomed.segments |= state.bucket.segments & older & !(1 << of.root.segment);
        doomed
    }

    /// An owner met another's object under the name of `put`.
    fn deposed(&self, state: &mut State, node: u8, put: &Put) -> Result<(), Broken> {
        let epoch = state.nodes[usize::from(node)].epoch;
        state.nodes[usize::from(node)] = Node::default();
        let (owner, by) = match *put {
            Put::Block { seq, .. } => (state.bucket.block(seq).node(), state.bucket.block(seq).epoch()),
            Put::Root { seq, .. } => (state.bucket.root(seq).node, state.bucket.root(seq).epoch),
        };
        promises::deposed(letter(node), (node, epoch), (owner, by))
    }

    fn claim_put(&self, state: &State, node: u8) -> Put {
        let of = &state.nodes[usize::from(node)];
        let seq = of.seq + 1;
        let fence = if of.local && self.rules.own_fence { self.bounds.common } else { of.next };
        let (fence_roots, fence_wals) = (of.root.fence_roots | 1 << seq, of.root.fence_wals | 1 << fence);
        Put::Root { seq, root: Root { epoch: of.epoch, node, tag: CLAIM, fence_roots, fence_wals, ..of.root } }
    }

    fn append_put(&self, state: &State, node: u8) -> Put {
        let of = &state.nodes[usize::from(node)];
        let common = of.local && of.next < self.bounds.common;
        let block = if common { BlockId::new(1, COMMON, false) } else { BlockId::new(of.epoch, node, false) };
        Put::Block { seq: of.next, block: if of.remade { block.remade() } else { block } }
    }
}

/// A PUT, with what the witness must know of it.
fn create(state: &mut State, put: &Put) -> bool {
    let created = state.bucket.create(put);
    if let (true, Put::Root { seq, root }) = (created, put) {
        state.witness.root_created(*seq, root);
    }
    created
}

fn stray(state: &mut State, node: u8, put: Put, tale: &mut Tale, then: &str) {
    state.lost -= 1;
    let free = state.strays.iter_mut().find(|stray| stray.is_none());
    *free.expect("no more answers are lost than strays are kept") = Some(put);
    tale.tell(format_args!("{} sends {put}, is left without an answer and {then}", letter(node)));
}

fn start_over(of: &Node) -> Node {
    Node { local: of.local, ..Node::default() }
}

fn claimed(of: &mut Node, put: &Put) {
    if let Put::Root { seq, root } = *put {
        (of.at, of.root, of.seq, of.claim_seq) = (At::CheckRoot, root, seq, seq);
    }
}

fn fence_put(of: &Node, node: u8) -> Put {
    Put::Block { seq: of.next, block: BlockId::new(of.epoch, node, true) }
}

fn fenced(of: &mut Node, node: u8) {
    of.history[usize::from(of.next)] = BlockId::new(of.epoch, node, true);
    (of.at, of.next) = (At::CheckFence, of.next + 1);
}

fn publish_put(of: &Node) -> Put {
    Put::Root { seq: of.seq + 1, root: of.draft }
}

/// The name of the segment that a round for root `seq` writes.
fn segment(epoch: u8, seq: u8, tag: u8) -> u8 {
    (epoch << 4) | (seq << 1) | (tag & 1)
}
