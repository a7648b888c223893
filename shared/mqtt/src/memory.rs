//! The memory that clients may make a front use, all together: one budget, counted in bytes by what it is used for.
//!
//! Each client gets at most a quarter of what is free, so that many who want much share it evenly and the last of them still finds some. A
//! part of the budget is kept for clients that hold little: whoever wants [`SMALL_BYTES`] in all finds them there
//! although others have used up the rest. And what may be held for days (wills, subscriptions, queues of sessions whose clients are away)
//! gets one half of the budget, so that packets still come in and go out.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// What memory is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MemoryUse {
    /// Wills of connected clients, and delayed ones.
    Wills,
    /// Topic aliases, and subscribers that publishing connections remember.
    Topics,
    /// Subscriptions: the filter, its place in the tree, its entry in the session.
    Filters,
    /// Bytes that wait for sockets.
    Outgoing,
    /// Messages queued for sessions, or on their way to kept ones.
    Queues,
    /// Unfinished packets and held PUBLISHes.
    Incoming,
}

impl MemoryUse {
    /// Whether it lasts as long as a client likes, not as long as a packet is on its way.
    fn is_lasting(self) -> bool {
        match self {
            Self::Wills | Self::Filters | Self::Queues => true,
            Self::Topics | Self::Outgoing | Self::Incoming => false,
        }
    }
}

/// Names of [`MemoryUse`] in metrics, in its order.
pub const MEMORY_USES: [&str; 6] = ["wills", "topics", "filters", "outgoing", "queues", "incoming"];

/// What a client may hold of the budget's last part, see [`MemoryBudget::room`].
pub(crate) const SMALL_BYTES: usize = 4 << 10;
/// The part of the budget that is kept for clients that hold little: one in so many.
const RESERVE_PART: usize = 4;
/// The part of the budget that what lasts may use: one in so many.
const LASTING_PART: usize = 2;
/// The part of what is free that one client may hold: one in so many.
const SHARE_PART: usize = 4;

/// Counts bytes against a bound.
#[derive(Debug)]
pub(crate) struct MemoryBudget {
    bytes_max: usize,
    used: [AtomicUsize; MEMORY_USES.len()],
}

impl MemoryBudget {
    pub fn new(bytes_max: usize) -> Self {
        Self { bytes_max, used: Default::default() }
    }

    pub fn bytes_max(&self) -> usize {
        self.bytes_max
    }

    /// Bytes used, all together.
    pub fn bytes(&self) -> usize {
        // They are changed one by one: a sum read in between may even be short of nothing.
        self.used.iter().fold(0, |sum, used| sum.wrapping_add(used.load(Relaxed)))
    }

    fn bytes_of(&self, kind: MemoryUse) -> usize {
        self.used[kind as usize].load(Relaxed)
    }

    /// Bytes used by kind, in the order of [`MEMORY_USES`].
    pub fn by_use(&self) -> [u64; MEMORY_USES.len()] {
        self.used.each_ref().map(|used| used.load(Relaxed) as u64)
    }

    /// How many bytes more of this kind a client may take that holds `held`: up to a quarter of what is free and not
    /// reserved, and [`SMALL_BYTES`] in all as long as there are any.
    pub fn room(&self, kind: MemoryUse, held: usize) -> usize {
        let free = self.bytes_max.saturating_sub(self.bytes());
        let mut shared = free.saturating_sub(self.bytes_max / RESERVE_PART);
        if kind.is_lasting() {
            let lasting = [MemoryUse::Wills, MemoryUse::Filters, MemoryUse::Queues].map(|kind| self.bytes_of(kind));
            shared = shared.min((self.bytes_max / LASTING_PART).saturating_sub(lasting.iter().sum()));
        }
        let share = (shared / SHARE_PART).saturating_sub(held);
        share.max(SMALL_BYTES.saturating_sub(held).min(free))
    }

    /// Counts what was `counted` bytes as `bytes` from now on.
    pub fn recount(&self, kind: MemoryUse, counted: &mut usize, bytes: usize) {
        if bytes != *counted {
            let used = &self.used[kind as usize];
            match bytes.checked_sub(*counted) {
                Some(more) => used.fetch_add(more, Relaxed),
                None => used.fetch_sub(*counted - bytes, Relaxed),
            };
            *counted = bytes;
        }
    }

    /// Takes `bytes` for a client that holds `held`; `None` if that is more than it may.
    pub fn take(self: &Arc<Self>, kind: MemoryUse, held: usize, bytes: usize) -> Option<MemoryPermit> {
        (bytes <= self.room(kind, held)).then(|| {
            let mut permit = MemoryPermit { budget: self.clone(), kind, bytes: 0 };
            permit.budget.recount(kind, &mut permit.bytes, bytes);
            permit
        })
    }
}

/// Bytes of the budget, given back when it is dropped.
#[derive(Debug)]
pub(crate) struct MemoryPermit {
    budget: Arc<MemoryBudget>,
    kind: MemoryUse,
    bytes: usize,
}

impl MemoryPermit {
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for MemoryPermit {
    fn drop(&mut self) {
        self.budget.recount(self.kind, &mut self.bytes, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_greedy_share_and_the_small_still_find_room() {
        let budget = Arc::new(MemoryBudget::new(64 << 20));
        let mut taken = Vec::new();
        while let Some(permit) = budget.take(MemoryUse::Wills, 0, 1 << 20) {
            taken.push(permit);
        }
        assert!((26..32).contains(&taken.len()), "{}", taken.len());
        // One client may not have it all either, in whatever pieces; and packets come in and go out as before.
        assert!(budget.room(MemoryUse::Queues, 1 << 20) < 1 << 20);
        while let Some(permit) = budget.take(MemoryUse::Incoming, 0, 1 << 20) {
            taken.push(permit);
        }
        assert!((40..48).contains(&taken.len()), "{}", taken.len());
        // Whoever asks for as much as may be had leaves something for those who want little.
        for _ in 0..1_000 {
            for kind in [MemoryUse::Filters, MemoryUse::Outgoing] {
                taken.extend(budget.take(kind, 0, budget.room(kind, 0)));
            }
        }
        assert_eq!(budget.room(MemoryUse::Topics, 0), SMALL_BYTES);
        let innocents: Vec<_> = (0..1_000).filter_map(|_| budget.take(MemoryUse::Queues, 0, 2_000)).collect();
        assert_eq!(innocents.len(), 1_000);
        assert!(budget.bytes() <= budget.bytes_max());
        drop((taken, innocents));
        assert_eq!((budget.bytes(), budget.by_use()), (0, [0; 6]));
    }

    #[test]
    fn a_full_budget_gives_nothing() {
        let budget = Arc::new(MemoryBudget::new(1 << 20));
        let mut counted = 0;
        budget.recount(MemoryUse::Outgoing, &mut counted, 2 << 20);
        assert_eq!(budget.room(MemoryUse::Outgoing, 0), 0);
        budget.recount(MemoryUse::Outgoing, &mut counted, 1000);
        assert_eq!(budget.by_use()[3], 1000);
        assert_eq!(budget.take(MemoryUse::Topics, 0, 500).map(|permit| permit.bytes()), Some(500));
    }
}
