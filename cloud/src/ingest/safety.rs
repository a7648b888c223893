//! What an edge may delete: how far each of its streams is in the bucket.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;
use shared::log::{BoxFuture, StreamKey};
use shared::name::Offset;

use crate::state::StateLog;

/// Tells how far streams are safe.
pub trait Safety: Send + Sync + 'static {
    /// Last offset (exclusive) of the stream that is safe; `None` when nothing is.
    fn safe(&self, key: &StreamKey) -> Option<Offset>;

    /// A stream's records below `next` have become durable.
    fn appended(&self, key: &StreamKey, next: Offset);

    /// Resolves when more may have become safe since the call.
    fn changed(&self) -> BoxFuture<'static, ()>;
}

/// Without an archive: what is durable is as safe as it gets.
pub struct DurableIsSafe(pub Arc<dyn StateLog>);

impl Safety for DurableIsSafe {
    fn safe(&self, key: &StreamKey) -> Option<Offset> {
        durable(&*self.0, key)
    }

    fn appended(&self, _: &StreamKey, _: Offset) {}

    fn changed(&self) -> BoxFuture<'static, ()> {
        // The reply to the append has said it already.
        Box::pin(std::future::pending())
    }
}

fn durable(state: &dyn StateLog, key: &StreamKey) -> Option<Offset> {
    let mut next = None;
    state.with_state(&mut |state| next = state.stream(key).map(|stream| stream.next));
    next
}

/// How far a shard's blocks are shipped to the bucket.
pub trait Shipping: Send + Sync + 'static {
    /// The sequence number the next durable block will have.
    fn durable_seq(&self) -> u64;

    /// Every block below this is in the bucket.
    fn shipped_seq(&self) -> u64;

    /// Resolves when `shipped_seq` has moved since the call.
    fn shipped_changed(&self) -> BoxFuture<'static, ()>;
}

/// Most steps remembered for a stream whose blocks are not shipped yet; beyond it neighbours are taken together, and
/// the earlier one is told a little late.
const STEPS_MAX: usize = 256;

/// With an archive: a stream is safe up to what it had reached when the newest shipped block was written.
pub struct ShippedIsSafe {
    state: Arc<dyn StateLog>,
    shipping: Arc<dyn Shipping>,
    streams: Mutex<BTreeMap<StreamKey, Steps>>,
}

#[derive(Default)]
struct Steps {
    safe: Option<Offset>,
    /// Once blocks below the first are shipped, offsets below the second are safe. Both ascend.
    ahead: VecDeque<(u64, Offset)>,
}

impl ShippedIsSafe {
    /// For the streams of one shard.
    pub fn new(state: Arc<dyn StateLog>, shipping: Arc<dyn Shipping>) -> Self {
        Self { state, shipping, streams: Mutex::default() }
    }
}

impl Steps {
    fn push(&mut self, seq: u64, next: Offset) {
        let is_full = self.ahead.len() >= STEPS_MAX;
        match self.ahead.back_mut() {
            Some(last) if next <= last.1 => {}
            Some(last) if seq <= last.0 || is_full => *last = (last.0.max(seq), next),
            _ => self.ahead.push_back((seq, next)),
        }
    }

    fn advance(&mut self, shipped: u64) {
        while let Some((_, next)) = self.ahead.pop_front_if(|(seq, _)| *seq <= shipped) {
            self.safe = self.safe.max(Some(next));
        }
    }
}

impl Safety for ShippedIsSafe {
    fn safe(&self, key: &StreamKey) -> Option<Offset> {
        let mut streams = self.streams.lock();
        if !streams.contains_key(key) {
            // Not seen since the start: all that is durable now lies in blocks below the next one.
            let next = durable(&*self.state, key)?;
            streams.entry(key.clone()).or_default().push(self.shipping.durable_seq(), next);
        }
        let steps = streams.get_mut(key)?;
        steps.advance(self.shipping.shipped_seq());
        steps.safe
    }

    fn appended(&self, key: &StreamKey, next: Offset) {
        // Asked for after the append was durable, so its block lies below.
        let seq = self.shipping.durable_seq();
        let mut streams = self.streams.lock();
        let steps = streams.entry(key.clone()).or_default();
        steps.push(seq, next);
        steps.advance(self.shipping.shipped_seq());
    }

    fn changed(&self) -> BoxFuture<'static, ()> {
        self.shipping.shipped_changed()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use shared::log::Chain;
    use shared::name::{EdgeId, Incarnation, Partition, StreamName, TopicId};

    use super::*;
    use crate::state::Change;
    use crate::state::memory::MemoryStateLog;

    #[derive(Default)]
    struct Blocks {
        durable: AtomicU64,
        shipped: AtomicU64,
    }

    impl Shipping for Blocks {
        fn durable_seq(&self) -> u64 {
            self.durable.load(Ordering::Relaxed)
        }

        fn shipped_seq(&self) -> u64 {
            self.shipped.load(Ordering::Relaxed)
        }

        fn shipped_changed(&self) -> BoxFuture<'static, ()> {
            Box::pin(std::future::ready(()))
        }
    }

    #[test]
    fn safe_follows_the_shipped_blocks() {
        let key = StreamKey {
            edge: EdgeId::parse("a").unwrap(),
            stream: StreamName::parse("s").unwrap(),
            incarnation: Incarnation([1; 16]),
        };
        let partition = Partition { topic: TopicId([1; 16]), index: 0 };
        let position = Change::StreamPosition { key: key.clone(), partition, next: 5, chain: Chain(0) };
        let blocks = Arc::new(Blocks::default());
        blocks.durable.store(10, Ordering::Relaxed);
        let safety = ShippedIsSafe::new(Arc::new(MemoryStateLog::with(&[position])), blocks.clone());
        let safe_when_shipped = |shipped| {
            blocks.shipped.store(shipped, Ordering::Relaxed);
            safety.safe(&key)
        };
        assert_eq!(safe_when_shipped(9), None, "block 9 may hold what was durable at the start");
        assert_eq!(safe_when_shipped(10), Some(5));
        blocks.durable.store(11, Ordering::Relaxed);
        safety.appended(&key, 7);
        safety.appended(&key, 8);
        blocks.durable.store(12, Ordering::Relaxed);
        safety.appended(&key, 9);
        assert_eq!(safe_when_shipped(10), Some(5));
        assert_eq!(safe_when_shipped(11), Some(8));
        for next in 10..2000 {
            blocks.durable.fetch_add(1, Ordering::Relaxed);
            safety.appended(&key, next);
        }
        assert!(safety.streams.lock()[&key].ahead.len() <= STEPS_MAX);
        assert_eq!(safe_when_shipped(12), Some(9));
        assert_eq!(safe_when_shipped(12 + 1990), Some(1999));
    }
}
