//! How the batches of an append get into the log, and what is answered when that takes too long.
//!
//! Streams do not wait for each other: one whose shard hangs is told to come again, and the others are stored. What the log
//! has taken may become durable after that all the same. Until it is known whether it did, nothing more of that stream is
//! appended: neither a repeat, nor to another shard, which could not know of it. Its edge parks it meanwhile.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use futures_util::future::{FutureExt as _, join_all};
use tokio::time::{Instant, timeout_at};

use super::*;

type Pending = BoxFuture<'static, Result<Appended, AppendError>>;

/// A batch that the log has taken, and of which it is not known yet whether it became durable.
pub(super) struct Taken {
    key: StreamKey,
    records: u64,
    bytes: u64,
    rejected: bool,
    gap: bool,
    /// It is a line of `tributary.gaps`, and none of the stream's own batches.
    is_listing: bool,
    stored: Pending,
}

impl Taken {
    fn new(plan: &StorePlan, rejected: bool, stored: Pending) -> Self {
        Self {
            key: plan.source.stream.clone(),
            records: plan.batch.record_count().unsigned_abs().into(),
            bytes: plan.batch.len() as u64,
            rejected,
            gap: plan.source.gap.is_some(),
            is_listing: false,
            stored,
        }
    }

    fn listing(plan: &StorePlan, stored: Pending) -> Self {
        Self { is_listing: true, ..Self::new(plan, false, stored) }
    }
}

/// Batches of one stream that the log has taken, and what became of the one after them; `Stored` if there is none.
struct Run {
    stream: StreamName,
    taken: VecDeque<Taken>,
    then: Outcome,
}

impl Ingest {
    /// Appends what is planned, and says what became of each stream. What is not durable at `deadline` is added to `late`.
    /// `room` is let go as soon as the log has the batches: from there on they count as its own.
    pub(super) async fn store(
        &self,
        edge: &EdgeId,
        plans: Vec<Plan>,
        late: &mut Vec<Taken>,
        room: OwnedSemaphorePermit,
        deadline: Instant,
    ) -> Vec<(StreamName, Outcome)> {
        let busy: BTreeSet<StreamKey> = late.iter().map(|taken| taken.key.clone()).collect();
        let mut streams: BTreeMap<StreamName, Vec<Plan>> = BTreeMap::new();
        for plan in plans {
            streams.entry(plan.stream().clone()).or_default().push(plan);
        }
        let taking = streams.into_iter().map(|(stream, plans)| self.take(edge, stream, plans, &busy, deadline));
        let runs = join_all(taking).await;
        drop(room);
        self.freed.notify_waiters();
        let mut results = Vec::with_capacity(runs.len());
        for (stream, outcome, more) in join_all(runs.into_iter().map(|run| self.end(edge, run, deadline))).await {
            late.extend(more);
            results.push((stream, outcome));
        }
        results
    }

    /// Brings the batches of one stream into the log, up to the first that is not taken.
    async fn take(
        &self,
        edge: &EdgeId,
        stream: StreamName,
        plans: Vec<Plan>,
        busy: &BTreeSet<StreamKey>,
        deadline: Instant,
    ) -> Run {
        let mut run = Run { stream, taken: VecDeque::new(), then: Outcome::Stored };
        let mut aside = None;
        for plan in plans {
            let (plan, rejected) = match plan {
                Plan::Store(plan) => (plan, false),
                Plan::Reject(plan) => (plan, true),
                Plan::Refuse(_, outcome) => {
                    count(&self.counters.duplicates, u64::from(outcome == Outcome::Have));
                    run.then = outcome;
                    break;
                }
            };
            if busy.contains(&plan.source.stream) {
                run.then = Outcome::Parked { reason: not_yet() };
                break;
            }
            // What is set aside may lie in another shard, which asks how far the stream is in this one, and back again.
            let turns = aside.replace(rejected).is_some_and(|before| before != rejected);
            if turns && !self.is_durable(&mut run, deadline).await {
                break;
            }
            let places = match timeout_at(deadline, self.places(edge, &plan, rejected)).await {
                Ok(places) => places,
                Err(_) => Err(Outcome::Parked { reason: NOT_MADE.to_owned() }),
            };
            let (partition, gaps) = match places {
                Ok(places) => places,
                Err(outcome) => {
                    run.then = outcome;
                    break;
                }
            };
            // Before the data: a gap may be listed twice when something fails, but never be missing.
            if let Some(gaps) = gaps {
                let listed = self.log.append(self.listing(edge, &plan, gaps));
                run.taken.push_back(Taken::listing(&plan, listed));
                if !self.is_durable(&mut run, deadline).await {
                    break;
                }
            }
            let source = Source::Edge(plan.source.clone());
            let stored = self.log.append(log::Append { partition, batch: plan.batch.clone(), source });
            run.taken.push_back(Taken::new(&plan, rejected, stored));
            // The log would take the second batch of a stream it does not know as its first, if this one fails.
            if plan.begins && !self.is_durable(&mut run, deadline).await {
                break;
            }
        }
        run
    }

    /// Waits until all that was taken is durable. False if something is not: `then` says why, unless there was no time.
    async fn is_durable(&self, run: &mut Run, deadline: Instant) -> bool {
        while let Some(taken) = run.taken.front_mut() {
            let Ok(stored) = timeout_at(deadline, &mut taken.stored).await else { return false };
            run.then = self.finish(taken, stored);
            run.taken.pop_front();
            if run.then != Outcome::Stored {
                return false;
            }
        }
        true
    }

    /// Waits for what the log has taken: what became of the stream, and what is late.
    async fn end(&self, edge: &EdgeId, run: Run, deadline: Instant) -> (StreamName, Outcome, Vec<Taken>) {
        let (mut outcome, mut late) = (Outcome::Stored, Vec::new());
        for mut taken in run.taken {
            let became = match timeout_at(deadline, &mut taken.stored).await {
                Ok(stored) => self.finish(&taken, stored),
                Err(_) if late.is_empty() => {
                    late.push(taken);
                    self.too_slow(edge, &run.stream)
                }
                Err(_) => {
                    late.push(taken);
                    continue;
                }
            };
            if outcome == Outcome::Stored {
                outcome = became;
            }
        }
        if outcome == Outcome::Stored {
            outcome = run.then;
        }
        (run.stream, outcome, late)
    }

    /// Looks what became of batches that were late, and keeps those of which it is still not known.
    pub(super) fn settle(&self, late: &mut Vec<Taken>) {
        late.retain_mut(|taken| match (&mut taken.stored).now_or_never() {
            None => true,
            Some(stored) => {
                self.finish(taken, stored);
                false
            }
        });
    }

    fn too_slow(&self, edge: &EdgeId, stream: &StreamName) -> Outcome {
        let waited = self.settings.answer_timeout;
        limited!(warn, %edge, %stream, ?waited, "the log has not answered in time; the edge sends again");
        let reason = format!("the disk or store of its shard did not answer in {waited:?}; it may still be stored");
        Outcome::Later { reason }
    }

    fn finish(&self, taken: &Taken, stored: Result<Appended, AppendError>) -> Outcome {
        match stored {
            Ok(_) if taken.is_listing => Outcome::Stored,
            Ok(_) => {
                count(&self.counters.batches, 1);
                count(&self.counters.records, taken.records);
                count(&self.counters.bytes, taken.bytes);
                count(&self.counters.rejected, u64::from(taken.rejected));
                count(&self.counters.gaps, u64::from(taken.gap));
                Outcome::Stored
            }
            Err(error) => {
                let StreamKey { edge, stream, .. } = &taken.key;
                if !matches!(error, AppendError::WrongPosition { .. }) {
                    limited!(warn, %edge, %stream, %error, "append failed");
                }
                outcome_of(error)
            }
        }
    }

    /// Where a batch goes, and where the gap before it is listed if there is one.
    async fn places(
        &self,
        edge: &EdgeId,
        plan: &StorePlan,
        rejected: bool,
    ) -> Result<(Partition, Option<Partition>), Outcome> {
        let mut partition = plan.partition;
        if rejected {
            let topic = rejected_topic(&plan.topic);
            limited!(warn, %edge, stream = %plan.stream, offset = plan.source.first, %topic, "record is set aside");
            partition = self.single(&topic).await?;
        }
        let gaps = match plan.source.gap {
            Some((from, to)) => {
                limited!(warn, %edge, stream = %plan.stream, from, to, "edge dropped records");
                let topic = TopicName::parse(GAPS_TOPIC);
                let topic = topic.map_err(|error| Outcome::Parked { reason: error.to_string() })?;
                Some(self.single(&topic).await?)
            }
            None => None,
        };
        Ok((partition, gaps))
    }

    /// The only partition of a topic of our own, which is made if need be.
    async fn single(&self, topic: &TopicName) -> Result<Partition, Outcome> {
        match self.topics.ensure_topic(topic, 1).await {
            Ok((topic, _)) => Ok(Partition { topic, index: 0 }),
            Err(TopicError::Refused(reason)) => Err(Outcome::Parked { reason }),
            Err(TopicError::Unavailable(reason)) => Err(Outcome::Later { reason }),
        }
    }

    /// The line of `tributary.gaps` about the gap before a batch.
    fn listing(&self, edge: &EdgeId, plan: &StorePlan, partition: Partition) -> log::Append {
        let now_ms = (self.clock)();
        let value = serde_json::json!({
            "edge": edge,
            "stream": plan.stream,
            "incarnation": plan.source.stream.incarnation.to_string(),
            "topic": plan.topic,
            "first": plan.source.gap.map(|(from, _)| from),
            "last": plan.source.gap.map(|(_, to)| to - 1),
            "listed_ms": now_ms,
        });
        let mut builder = BatchBuilder::default();
        let key = format!("{edge}/{}", plan.stream);
        builder.push(now_ms, Some(key.as_bytes()), Some(value.to_string().as_bytes()), &[]);
        let batch = builder.finish(0, Compression::None);
        log::Append { partition, batch, source: Source::Producer }
    }
}

const NOT_MADE: &str =
    "a topic that its records go to could not be made in time: the disk or store of that shard does not answer";

/// Why nothing can be taken of a stream that has late batches; `None` for one that has none.
pub(super) fn waits(late: &[Taken], key: &StreamKey) -> Option<String> {
    late.iter().any(|taken| taken.key == *key).then(not_yet)
}

fn not_yet() -> String {
    "the disk or store of its shard has not taken an earlier batch yet; it goes on when that answers".to_owned()
}

/// Gives batches that are a small part of their body memory of their own: one that waits for its shard would otherwise keep
/// all of the body, which nobody counts by then.
pub(super) fn unshared(batches: Vec<Bytes>) -> Vec<Bytes> {
    let whole: usize = batches.iter().map(Bytes::len).sum();
    let own = |batch: Bytes| if batch.len() * 2 < whole { Bytes::copy_from_slice(&batch) } else { batch };
    batches.into_iter().map(own).collect()
}
