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
    /// The WAL is trimmed before the manifest that names its segments is published.
    TrimmedEarly,
    /// A memory shard begins where the one before it began.
    LifeForgotten,
    /// A stream moves to another shard before its records are safe where they are.
    MovedUnsafe,
    /// An older local WAL goes on although the bucket has more.
    OlderDiskGoesOn,
    /// A start serves what the page cache shows, durable or not.
    CacheTrusted,
    /// An edge forgets at a restart where an incarnation began: the simulated one, for the real one is another program.
    #[cfg(test)]
    RenewalForgotten,
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
