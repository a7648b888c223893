//! Bugs that the simulation's tests plant, to prove that it finds them. In a build that is not a test there are none.

/// A bug that can be planted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bug {
    /// A take-over makes no fence block.
    NoFence,
    /// Collection deletes fence blocks and the roots of claims.
    FencesCollected,
    /// A name that is taken counts as one's own success, whoever's bytes are there.
    NoNonce,
    /// A stream's position is written in the block after its data.
    MarkerAfterData,
    /// A producer's append is answered before its block is durable.
    EarlyAnswer,
    /// What is durable is called safe before it is in the bucket.
    SafeIsDurable,
    /// No offsets are left out after a loss.
    OffsetsReused,
}

#[cfg(test)]
pub(crate) fn planted(bug: Bug) -> bool {
    crate::sim::planted(bug)
}

/// Never: a constant, so that nothing of it is left in a build.
#[cfg(not(test))]
pub(crate) const fn planted(_: Bug) -> bool {
    false
}
