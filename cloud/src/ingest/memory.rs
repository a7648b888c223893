//! A shard in little: a log and a state that move together, in memory. For tests of what stands on both; it keeps
//! nothing beyond the process.

use std::sync::Arc;

use parking_lot::Mutex;
use shared::log::memory::MemoryLog;
use shared::log::{
    Append, AppendError, Appended, Bounds, BoxFuture, EpochEnd, Log, Read, ReadError, ReadLimits, Source, TimePoint,
    TrimError,
};
use shared::name::{Offset, Partition, TimestampMs, TopicId, TopicName};

use crate::state::memory::MemoryStateLog;
use crate::state::{Change, State, StateLog};

/// The log and the state, in step.
#[derive(Debug)]
pub struct MemoryShard {
    log: MemoryLog,
    state: Arc<MemoryStateLog>,
    refuse: Mutex<Option<AppendError>>,
}

impl MemoryShard {
    /// An empty one that keeps so many bytes.
    pub fn new(bytes_max: usize) -> Self {
        let (log, state) = (MemoryLog::new(bytes_max), Arc::new(MemoryStateLog::new()));
        Self { log, state, refuse: Mutex::new(None) }
    }

    /// From now on every append is refused with this, or taken again.
    pub fn refuse(&self, error: Option<AppendError>) {
        *self.refuse.lock() = error;
    }

    /// A topic's identity and number of partitions.
    pub fn topic(&self, name: &TopicName) -> Option<(TopicId, u32)> {
        let mut found = None;
        self.with_state(&mut |state| found = state.topic_named(name).map(|topic| (topic.id, topic.partitions)));
        found
    }
}

impl Log for MemoryShard {
    fn append(&self, append: Append) -> BoxFuture<'static, Result<Appended, AppendError>> {
        if let Some(error) = self.refuse.lock().clone() {
            return Box::pin(std::future::ready(Err(error)));
        }
        let (partition, source) = (append.partition, append.source.clone());
        let stored = self.log.append(append);
        let state = self.state.clone();
        Box::pin(async move {
            let appended = stored.await?;
            if let Source::Edge(edge) = source {
                let (key, next, chain) = (edge.stream, edge.next, edge.chain);
                state.commit(vec![Change::StreamPosition { key, partition, next, chain }]).await?;
            }
            Ok(appended)
        })
    }

    fn read(&self, partition: Partition, from: Offset, limits: ReadLimits) -> BoxFuture<'_, Result<Read, ReadError>> {
        self.log.read(partition, from, limits)
    }

    fn bounds(&self, partition: Partition) -> Result<Bounds, ReadError> {
        self.log.bounds(partition)
    }

    fn wait(&self, partition: Partition, beyond: Offset) -> BoxFuture<'static, Result<(), ReadError>> {
        self.log.wait(partition, beyond)
    }

    fn trim(&self, partition: Partition, before: Offset) -> BoxFuture<'static, Result<Offset, TrimError>> {
        self.log.trim(partition, before)
    }

    fn find_time(&self, partition: Partition, at: TimestampMs) -> BoxFuture<'_, Result<Option<TimePoint>, ReadError>> {
        self.log.find_time(partition, at)
    }

    fn max_time(&self, partition: Partition) -> BoxFuture<'_, Result<Option<TimePoint>, ReadError>> {
        self.log.max_time(partition)
    }

    fn epoch_end(&self, partition: Partition, epoch: i32) -> Result<Option<EpochEnd>, ReadError> {
        self.log.epoch_end(partition, epoch)
    }
}

impl StateLog for MemoryShard {
    fn commit(&self, changes: Vec<Change>) -> BoxFuture<'static, Result<(), AppendError>> {
        for change in &changes {
            if let Change::TopicCreated(topic) = change {
                (0..topic.partitions).for_each(|index| self.log.create(Partition { topic: topic.id, index }));
            }
        }
        self.state.commit(changes)
    }

    fn with_state(&self, read: &mut dyn FnMut(&State)) {
        self.state.with_state(read);
    }
}
