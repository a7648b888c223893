//! All shards of a node behind one seam: protocols see a [`Log`] and a [`StateLog`] and cannot tell shards apart.
//!
//! Shard 0 keeps the catalogue: which topics there are and where their partitions lie. Each other shard keeps a copy of
//! the topics that it hosts partitions of. What concerns both is written in an order that leaves nothing wrong after a stop
//! between the two, and [`Shards::reconcile`] brings the rest about at the next start:
//!
//! - a topic, or a partition, comes to its shards first and to the catalogue last: nobody knows it before it can be written;
//! - it leaves the catalogue first, which notes that it is leaving, and then its shards;
//! - settings come to the catalogue first.
//!
//! A topic that a shard hosts and the catalogue neither knows nor has seen leave is taken back into the catalogue: its
//! records may have been acknowledged.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use futures_util::future::{select_all, try_join_all};
use parking_lot::RwLock;
use shared::log::{
    Append, AppendError, Appended, Bounds, BoxFuture, EpochEnd, Log, Read, ReadError, ReadLimits, Source, StreamKey,
    TimePoint, TrimError,
};
use shared::name::{EdgeId, Incarnation, Offset, Partition, StreamName, TimestampMs, TopicId};
use tracing::{info, warn};

use crate::ingest::Safety;
use crate::planted::{Bug, planted};
use crate::shard::Shard;
use crate::state::{CATALOGUE, Change, Engine, Hosting, State, StateLog, StreamState, Topic, read_state};

/// Offsets that a shard which keeps nothing reserves at a time.
const OFFSETS_RESERVED: i64 = 1 << 32;

/// One shard and its engine.
#[derive(Clone)]
pub struct Member {
    /// Its number.
    pub number: u32,
    /// Where its blocks rest.
    pub engine: Engine,
    /// The shard.
    pub shard: Arc<Shard>,
}

/// The shards of a node.
pub struct Shards {
    /// Ascending in number; the first is the catalogue's.
    members: Arc<[Member]>,
    /// Where topics' partitions lie, as far as it was asked. What a topic's entry says never changes.
    routes: RwLock<HashMap<TopicId, Arc<[u32]>>>,
    /// Up to where shards that keep nothing may use offsets.
    ceilings: RwLock<BTreeMap<u32, Offset>>,
}

/// Which shards there must be: those known, and as many more as are wanted. The first shard ever is the catalogue's.
/// The text says why that cannot be.
pub fn assign(known: &[(u32, Engine)], wanted: &[(Engine, u32)]) -> Result<Vec<(u32, Engine)>, String> {
    let mut all = known.to_vec();
    for (engine, wanted) in wanted {
        let there = known.iter().filter(|(_, known)| known == engine).count() as u32;
        if *wanted < there {
            return Err(format!(
                "[shards] {engine} = {wanted}, and this system has {there} shard(s) of that kind: there may be more, \
                 never fewer, since records lie in them. Set it to {there} or more"
            ));
        }
        for _ in there..*wanted {
            let next = all.iter().map(|(number, _)| number + 1).max().unwrap_or(CATALOGUE);
            all.push((next, *engine));
        }
    }
    Ok(all)
}

/// Makes the next reservation for a shard that keeps nothing, before the shard is opened: its partitions begin where no
/// earlier life of it can have been, in a leader epoch of its own. Returns what to write to it first.
pub async fn reserve_offsets(catalogue: &Shard, number: u32) -> Result<(Change, Offset), AppendError> {
    let known = read_state(catalogue, |state| state.shards().find(|(shard, _)| *shard == number).map(|(_, e)| *e));
    let (epoch, from) = known.map_or((1, 0), |entry| (entry.epoch.saturating_add(1), entry.ceiling));
    let from = if planted(Bug::LifeForgotten) { 0 } else { from };
    let ceiling = from.saturating_add(OFFSETS_RESERVED);
    catalogue.commit(vec![Change::OffsetsReserved { shard: number, epoch, ceiling }]).await?;
    Ok((Change::EpochStarted { epoch, skip: from }, ceiling))
}

impl Shards {
    /// These shards, the catalogue's among them. `ceilings` are those of [`reserve_offsets`].
    pub fn new(mut members: Vec<Member>, ceilings: BTreeMap<u32, Offset>) -> Self {
        members.sort_by_key(|member| member.number);
        assert!(members.first().is_some_and(|first| first.number == CATALOGUE), "the catalogue's shard is there");
        let shards = Self { members: members.into(), routes: RwLock::default(), ceilings: RwLock::new(ceilings) };
        for (number, ceiling) in shards.ceilings.read().iter() {
            if let Some(shard) = numbered(&shards.members, *number) {
                shard.allow_offsets_below(*ceiling);
            }
        }
        shards
    }

    /// All of them, ascending in number.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// The catalogue's shard.
    pub fn catalogue(&self) -> &Arc<Shard> {
        &self.members[0].shard
    }

    /// The shard a partition lies in; the catalogue's, which will say so, if there is no such partition.
    fn shard_of(&self, partition: Partition) -> &Arc<Shard> {
        if self.members.len() == 1 {
            return self.catalogue();
        }
        let known = self.routes.read().get(&partition.topic).cloned();
        let shards = known.or_else(|| {
            let found = read_state(&**self.catalogue(), |state| match state.hosting(partition.topic) {
                Some(hosting) => Some(hosting.shards.as_slice().into()),
                None => state.topic(partition.topic).map(|_| Arc::from([CATALOGUE])),
            })?;
            self.routes.write().insert(partition.topic, Arc::clone(&found));
            Some(found)
        });
        let number = shards.and_then(|shards| shards.get(partition.index as usize % shards.len().max(1)).copied());
        number.and_then(|number| numbered(&self.members, number)).unwrap_or(self.catalogue())
    }

    fn others(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().skip(1)
    }

    /// Makes catalogue and shards agree. To be called before anything is served.
    pub async fn reconcile(&self) -> Result<(), AppendError> {
        for member in self.others() {
            let host = HostView::of(member);
            let missing = read_state(&**self.catalogue(), |state| for_catalogue(state, &host, member.number));
            for change in &missing {
                if let Change::TopicPlaced { topic, .. } = change {
                    warn!(topic = %topic.name, shard = member.number, "a topic that the catalogue had lost is back");
                }
            }
            self.catalogue().commit(missing).await?;
        }
        // What one shard brought to the catalogue may concern another.
        for member in self.others() {
            let host = HostView::of(member);
            let missing = read_state(&**self.catalogue(), |state| for_host(state, &host, member.number));
            if member.engine != Engine::Memory && !missing.is_empty() {
                info!(shard = member.number, changes = missing.len(), "catalogue and shard are brought together");
            }
            member.shard.commit(missing).await?;
        }
        let gone = read_state(&**self.catalogue(), |state| {
            state.leaving().map(|(id, _)| Change::TopicGone { id }).collect::<Vec<_>>()
        });
        self.catalogue().commit(gone).await
    }

    /// Raises the bound on offsets of shards that keep nothing, where it comes near. Call it now and then.
    pub async fn raise_ceilings(&self) -> Result<(), AppendError> {
        let ceilings = self.ceilings.read().clone();
        for (number, ceiling) in ceilings {
            let Some(shard) = numbered(&self.members, number) else { continue };
            if shard.highest_offset() < ceiling - OFFSETS_RESERVED / 2 {
                continue;
            }
            let ceiling = ceiling.saturating_add(OFFSETS_RESERVED);
            let epoch = read_state(&**shard, State::leader_epoch);
            self.catalogue().commit(vec![Change::OffsetsReserved { shard: number, epoch, ceiling }]).await?;
            self.ceilings.write().insert(number, ceiling);
            shard.allow_offsets_below(ceiling);
        }
        Ok(())
    }

    /// What a change means for the other shards, and when: before the catalogue has it, or after.
    fn steps(&self, changes: Vec<Change>) -> Steps {
        let mut steps = Steps::default();
        for change in changes {
            match &change {
                Change::TopicPlaced { topic, shards, from, .. } => {
                    for own in shards.iter().filter(|shard| **shard != CATALOGUE) {
                        let placed = Change::TopicPlaced {
                            topic: topic.clone(),
                            shards: shards.clone(),
                            own: *own,
                            from: *from,
                        };
                        steps.before.entry(*own).or_default().push(placed);
                    }
                }
                Change::PartitionsAdded { id, .. } => self.tell_hosts(*id, &change, &mut steps.before),
                Change::TopicConfigured { id, .. } => self.tell_hosts(*id, &change, &mut steps.after),
                Change::TopicDeleted { id } => {
                    self.tell_hosts(*id, &change, &mut steps.after);
                    if steps.after.values().flatten().any(|told| *told == change) {
                        steps.last.push(Change::TopicGone { id: *id });
                    }
                }
                _ => {}
            }
            steps.catalogue.push(change);
        }
        steps
    }

    fn tell_hosts(&self, id: TopicId, change: &Change, told: &mut BTreeMap<u32, Vec<Change>>) {
        let hosting = read_state(&**self.catalogue(), |state| state.hosting(id).cloned());
        for shard in hosting.iter().flat_map(|hosting| &hosting.shards).filter(|shard| **shard != CATALOGUE) {
            told.entry(*shard).or_default().push(change.clone());
        }
    }

    /// Where a stream's newest records are, and the shard.
    fn newest(&self, key: &StreamKey) -> Option<(u32, StreamState)> {
        let found = self.members.iter().filter_map(|member| Some((member.number, member.shard.stream(key)?)));
        found.max_by_key(|(_, stream)| stream.next)
    }
}

fn numbered(members: &[Member], number: u32) -> Option<&Arc<Shard>> {
    let at = members.binary_search_by_key(&number, |member| member.number).ok()?;
    members.get(at).map(|member| &member.shard)
}

/// Begins the commits in several shards.
fn commit_in(
    members: &[Member],
    changes: BTreeMap<u32, Vec<Change>>,
) -> Vec<BoxFuture<'static, Result<(), AppendError>>> {
    let begin = |(number, changes): (u32, Vec<Change>)| Some(numbered(members, number)?.commit(changes));
    changes.into_iter().filter_map(begin).collect()
}

/// Changes of one commit, by when they are written.
#[derive(Default)]
struct Steps {
    before: BTreeMap<u32, Vec<Change>>,
    catalogue: Vec<Change>,
    after: BTreeMap<u32, Vec<Change>>,
    last: Vec<Change>,
}

/// What a shard says of the topics it hosts.
struct HostView {
    topics: BTreeMap<TopicId, (Topic, Hosting)>,
    /// Where partitions begin whose records may have been lost.
    skipped: Offset,
}

impl HostView {
    fn of(member: &Member) -> Self {
        read_state(&*member.shard, |state| Self {
            topics: state
                .topics_of_any_name()
                .filter_map(|topic| Some((topic.id, (topic.clone(), state.hosting(topic.id)?.clone()))))
                .collect(),
            skipped: state.skipped(),
        })
    }
}

/// What the catalogue lacks of what shard `own` hosts.
fn for_catalogue(catalogue: &State, host: &HostView, own: u32) -> Vec<Change> {
    let leaving: Vec<TopicId> = catalogue.leaving().map(|(id, _)| id).collect();
    let mut changes = Vec::new();
    for (id, (hosted, hosting)) in &host.topics {
        match catalogue.topic(*id) {
            Some(topic) if topic.partitions < hosted.partitions => changes.push(Change::TopicPlaced {
                topic: Topic { partitions: hosted.partitions, ..topic.clone() },
                shards: hosting.shards.clone(),
                own: CATALOGUE,
                from: catalogue.skipped(),
            }),
            Some(_) => {}
            None if leaving.contains(id) => {}
            None if catalogue.topic_named(&hosted.name).is_some() => {
                warn!(topic = %hosted.name, %id, shard = own, "records of an older topic of this name stay unreachable");
            }
            None => changes.push(Change::TopicPlaced {
                topic: hosted.clone(),
                shards: hosting.shards.clone(),
                own: CATALOGUE,
                // What the catalogue's shard had of it may have been lost with the catalogue.
                from: catalogue.skipped(),
            }),
        }
    }
    changes
}

/// What shard `own` lacks of what the catalogue says, and what it must let go of.
fn for_host(catalogue: &State, host: &HostView, own: u32) -> Vec<Change> {
    let left = catalogue.leaving().filter(|(id, _)| host.topics.contains_key(id));
    let mut changes: Vec<Change> = left.map(|(id, _)| Change::TopicDeleted { id }).collect();
    for topic in catalogue.topics() {
        let Some(hosting) = catalogue.hosting(topic.id).filter(|hosting| hosting.shards.contains(&own)) else {
            continue;
        };
        let hosted = host.topics.get(&topic.id).map(|(hosted, _)| hosted);
        if hosted.is_none_or(|hosted| hosted.partitions < topic.partitions) {
            let (topic, shards) = (topic.clone(), hosting.shards.clone());
            // Lost here, or by a catalogue that has forgotten since that it was deleted.
            let from = host.skipped.max(catalogue.skipped());
            changes.push(Change::TopicPlaced { topic, shards, own, from });
        }
        if hosted.is_some_and(|hosted| hosted.configs != topic.configs) {
            changes.push(Change::TopicConfigured { id: topic.id, configs: topic.configs.clone() });
        }
    }
    changes
}

impl Log for Shards {
    fn append(&self, append: Append) -> BoxFuture<'static, Result<Appended, AppendError>> {
        let shard = self.shard_of(append.partition);
        if let Source::Edge(edge) = &append.source
            && self.members.len() > 1
            && let Some((number, newest)) = self.newest(&edge.stream)
            && let Some(there) = numbered(&self.members, number).filter(|there| !Arc::ptr_eq(there, shard))
        {
            // Until they are safe there, a loss there would be hidden by the position here.
            let is_safe = there.safe(&edge.stream).is_some_and(|safe| safe >= newest.next);
            if !is_safe && !planted(Bug::MovedUnsafe) {
                let text = format!("the stream's records in shard {number} are not in the archive yet");
                return Box::pin(std::future::ready(Err(AppendError::Full(text))));
            }
            // The stream's rule names another topic now: its position moves along, or offsets would seem to be missing.
            return shard.append_after(append, newest);
        }
        shard.append(append)
    }

    fn read(&self, partition: Partition, from: Offset, limits: ReadLimits) -> BoxFuture<'_, Result<Read, ReadError>> {
        self.shard_of(partition).read(partition, from, limits)
    }

    fn bounds(&self, partition: Partition) -> Result<Bounds, ReadError> {
        self.shard_of(partition).bounds(partition)
    }

    fn wait(&self, partition: Partition, beyond: Offset) -> BoxFuture<'static, Result<(), ReadError>> {
        Log::wait(&**self.shard_of(partition), partition, beyond)
    }

    fn trim(&self, partition: Partition, before: Offset) -> BoxFuture<'static, Result<Offset, TrimError>> {
        self.shard_of(partition).trim(partition, before)
    }

    fn find_time(&self, partition: Partition, at: TimestampMs) -> BoxFuture<'_, Result<Option<TimePoint>, ReadError>> {
        self.shard_of(partition).find_time(partition, at)
    }

    fn max_time(&self, partition: Partition) -> BoxFuture<'_, Result<Option<TimePoint>, ReadError>> {
        self.shard_of(partition).max_time(partition)
    }

    fn epoch_end(&self, partition: Partition, epoch: i32) -> Result<Option<EpochEnd>, ReadError> {
        self.shard_of(partition).epoch_end(partition, epoch)
    }
}

impl StateLog for Shards {
    /// Atomic in each shard. Across shards a stop may leave the later steps to the next start.
    fn commit(&self, changes: Vec<Change>) -> BoxFuture<'static, Result<(), AppendError>> {
        if self.members.len() == 1 {
            return self.catalogue().commit(changes);
        }
        let Steps { before, catalogue, after, last } = self.steps(changes);
        if before.is_empty() && after.is_empty() {
            return self.catalogue().commit(catalogue);
        }
        for change in &catalogue {
            if let Change::TopicDeleted { id } = change {
                self.routes.write().remove(id);
            }
        }
        let begun = commit_in(&self.members, before);
        let (members, catalogue_shard) = (self.members.clone(), self.catalogue().clone());
        Box::pin(async move {
            try_join_all(begun).await?;
            catalogue_shard.commit(catalogue).await?;
            // From here on it is done, and what fails now is made up for at the next start.
            let told = match try_join_all(commit_in(&members, after)).await {
                Ok(_) => catalogue_shard.commit(last).await,
                Err(error) => Err(error),
            };
            if let Err(error) = told {
                warn!(%error, "a change did not reach every shard; the next start makes up for it");
            }
            Ok(())
        })
    }

    fn with_state(&self, read: &mut dyn FnMut(&State)) {
        self.catalogue().with_state(read);
    }

    fn stream(&self, key: &StreamKey) -> Option<StreamState> {
        self.newest(key).map(|(_, stream)| stream)
    }

    fn streams(&self) -> Vec<(StreamKey, StreamState)> {
        let mut all: BTreeMap<StreamKey, StreamState> = BTreeMap::new();
        for (key, stream) in self.members.iter().flat_map(|member| member.shard.streams()) {
            let newest = all.entry(key).or_insert(stream);
            if newest.next < stream.next {
                *newest = stream;
            }
        }
        all.into_iter().collect()
    }

    fn incarnations(&self, edge: &EdgeId, stream: &StreamName) -> Vec<Incarnation> {
        let mut all: Vec<_> = self.members.iter().flat_map(|member| member.shard.incarnations(edge, stream)).collect();
        all.sort_unstable();
        all.dedup();
        all
    }
}

impl Safety for Shards {
    /// A stream whose records lie in several shards is safe up to where the slowest of them is.
    fn safe(&self, key: &StreamKey) -> Option<Offset> {
        safe_of(self.members.iter().filter_map(|member| Some((member.shard.stream(key)?.next, member.shard.safe(key)))))
    }

    fn changed(&self) -> BoxFuture<'static, ()> {
        let changes: Vec<_> = self.members.iter().map(|member| member.shard.safety_changed()).collect();
        Box::pin(async move {
            select_all(changes).await;
        })
    }
}

/// How far a stream is safe, by the position and what is safe in each shard that knows it. A shard that knows it and has
/// shipped nothing of it took the position over from one where all below is safe, or it is the only one.
fn safe_of(shards: impl Iterator<Item = (Offset, Option<Offset>)>) -> Option<Offset> {
    let (mut whole, mut behind): (Option<Offset>, Option<Offset>) = (None, None);
    for (next, safe) in shards {
        match safe {
            Some(safe) if safe >= next => whole = whole.max(Some(next)),
            Some(safe) => behind = Some(behind.map_or(safe, |behind| behind.min(safe))),
            None => {}
        }
    }
    behind.or(whole)
}

#[cfg(test)]
mod tests;
