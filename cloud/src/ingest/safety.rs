//! What an edge may delete. The shard answers: it knows which of its blocks are in the bucket.

use shared::log::{BoxFuture, StreamKey};
use shared::name::Offset;

/// Tells how far streams are safe.
pub trait Safety: Send + Sync + 'static {
    /// Last offset (exclusive) of the stream that is safe; `None` when nothing is. Without an archive what is durable is
    /// as safe as it gets.
    fn safe(&self, key: &StreamKey) -> Option<Offset>;

    /// Resolves when more may have become safe since the call.
    fn changed(&self) -> BoxFuture<'static, ()>;
}
