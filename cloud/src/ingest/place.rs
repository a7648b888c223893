//! Where a stream's records go: its topic, which is made if need be, and the partition it keeps for ever.

use std::collections::BTreeMap;

use futures_util::future::join_all;
use shared::limited;
use shared::link::frame::Hello;
use shared::log::{BoxFuture, StreamKey};
use shared::name::{Partition, TimestampMs, TopicId, TopicName};
use tokio::time::{Instant, timeout_at};

use super::{Ingest, IngestError, count};
use crate::catalogue::{Catalogue, CatalogueError};
use crate::state::{Change, EdgeChange, read_state};

/// Makes topics.
pub trait Topics: Send + Sync + 'static {
    /// The topic's identity and partition count; it is made with `partitions` if it does not exist, durably.
    fn ensure_topic(&self, name: &TopicName, partitions: u32) -> BoxFuture<'_, Result<(TopicId, u32), TopicError>>;
}

/// Why there is no topic.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TopicError {
    /// It may not be made.
    #[error("{0}")]
    Refused(String),
    /// It cannot be made now.
    #[error("{0}")]
    Unavailable(String),
}

impl Topics for Catalogue {
    fn ensure_topic(&self, name: &TopicName, partitions: u32) -> BoxFuture<'_, Result<(TopicId, u32), TopicError>> {
        let name = name.clone();
        Box::pin(async move {
            match self.find_or_create(name.as_str(), Some(partitions)).await {
                Ok(topic) => Ok((topic.id, topic.partitions)),
                Err(error @ (CatalogueError::NotStored(_) | CatalogueError::TimedOut)) => {
                    Err(TopicError::Unavailable(error.to_string()))
                }
                Err(error) => Err(TopicError::Refused(error.to_string())),
            }
        })
    }
}

impl Ingest {
    /// Finds or chooses the partition of each stream of a hello, and notes the edge; one commit for all of it. A stream whose
    /// topic is not there in half the time has none.
    pub(super) async fn place(
        &self,
        now_ms: TimestampMs,
        hello: &Hello,
        refusals: Vec<Option<String>>,
        deadline: Instant,
    ) -> Result<Vec<Result<Partition, String>>, IngestError> {
        let now = Instant::now();
        // The other half is for the commit.
        let made_by = now + deadline.saturating_duration_since(now) / 2;
        let ensured = hello.streams.iter().zip(refusals).map(|(stream, refusal)| async move {
            match refusal {
                Some(reason) => {
                    count(&self.counters.refused, 1);
                    Err(reason)
                }
                None => self.ensure(&stream.topic, made_by).await,
            }
        });
        let topics = join_all(ensured).await;
        // What is in the catalogue's shard is all that is waited for from here on.
        let placed = timeout_at(deadline, self.place_in(now_ms, hello, topics)).await;
        placed.unwrap_or_else(|_| Err(IngestError::Unavailable("the catalogue's shard does not answer".to_owned())))
    }

    /// The topic's identity and partitions, or why there is none.
    async fn ensure(&self, topic: &TopicName, made_by: Instant) -> Result<(TopicId, u32), String> {
        let ensured = self.topics.ensure_topic(topic, self.settings.stream_partitions);
        match timeout_at(made_by, ensured).await {
            Ok(ensured) => ensured.map_err(|error| error.to_string()),
            Err(_) => {
                Err(format!("topic \"{topic}\" is being made, and a disk or store that it needs does not answer"))
            }
        }
    }

    async fn place_in(
        &self,
        now_ms: TimestampMs,
        hello: &Hello,
        topics: Vec<Result<(TopicId, u32), String>>,
    ) -> Result<Vec<Result<Partition, String>>, IngestError> {
        let _one_at_a_time = self.placing.lock().await;
        let detail = BTreeMap::from([
            ("software".to_owned(), hello.software.clone()),
            ("streams".to_owned(), hello.streams.len().to_string()),
        ]);
        let mut changes = vec![EdgeChange::Seen { edge: hello.edge.clone(), seen_ms: now_ms, detail }];
        let mut targets = Vec::with_capacity(hello.streams.len());
        for (stream, topic) in hello.streams.iter().zip(topics) {
            let (topic, partitions) = match topic {
                Ok(found) => found,
                Err(reason) => {
                    targets.push(Err(reason));
                    continue;
                }
            };
            let key =
                StreamKey { edge: hello.edge.clone(), stream: stream.name.clone(), incarnation: stream.incarnation };
            let (index, is_new) = self.index(&key, topic, partitions, &changes);
            if is_new {
                let stream = (hello.edge.clone(), stream.name.clone());
                changes.push(EdgeChange::StreamPlaced { stream, topic, index });
            }
            targets.push(Ok(Partition { topic, index }));
        }
        let committed = self.state.commit(changes.into_iter().map(Change::from).collect()).await;
        committed.map_err(|error| IngestError::Unavailable(error.to_string()))?;
        Ok(targets)
    }

    /// The partition a stream has in a topic, or else the one with the fewest streams; and whether it is a new one.
    fn index(&self, key: &StreamKey, topic: TopicId, partitions: u32, placing: &[EdgeChange]) -> (u32, bool) {
        let placed = read_state(&*self.state, |state| state.placement(&key.edge, &key.stream));
        if let Some(placed) = placed.filter(|placed| placed.topic == topic && placed.index < partitions) {
            // A known place but an unknown incarnation: the edge's data were restored, copied or set aside.
            let known = self.state.incarnations(&key.edge, &key.stream);
            if !known.is_empty() && !known.contains(&key.incarnation) {
                count(&self.counters.new_incarnations, 1);
                limited!(warn,
                    edge = %key.edge, stream = %key.stream, incarnation = %key.incarnation,
                    "stream goes on under a new incarnation; records may be there twice"
                );
            }
            return (placed.index, false);
        }
        read_state(&*self.state, |state| {
            let mut load: BTreeMap<u32, usize> = BTreeMap::new();
            let placed = state.placements().filter(|(_, at)| at.topic == topic).map(|(_, at)| at.index);
            let coming = placing.iter().filter_map(|change| match change {
                EdgeChange::StreamPlaced { topic: other, index, .. } if *other == topic => Some(*index),
                _ => None,
            });
            placed.chain(coming).for_each(|index| *load.entry(index).or_default() += 1);
            let index = (0..partitions.max(1)).min_by_key(|index| load.get(index).copied().unwrap_or(0));
            (index.unwrap_or(0), true)
        })
    }
}
