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
//!
//! What groups commit is in the shards that the catalogue places their slots in ([`slots`]). A topic's deletion is told to
//! these shards too, and nobody waits for them: offsets of a topic that is not in the catalogue are shown to nobody, and
//! the next start removes those that are left.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use futures_util::FutureExt as _;
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
use crate::state::{
    CATALOGUE, Change, CoordinatorSlot, Engine, Hosting, LogChange, SlotChange, State, StateLog, StreamState, Topic,
    TopicChange, read_state,
};

mod slots;

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
    routes: Arc<RwLock<HashMap<TopicId, Arc<[u32]>>>>,
    /// The shards that may know a stream, where there are several: those that have had records of it.
    streams: RwLock<HashMap<StreamKey, Vec<u32>>>,
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
            let next = match all.iter().map(|(number, _)| *number).max() {
                Some(last) => last.checked_add(1).ok_or("the catalogue knows a shard of the last number there is")?,
                None => CATALOGUE,
            };
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
    catalogue.commit_own(vec![SlotChange::OffsetsReserved { shard: number, epoch, ceiling }.into()]).await?;
    Ok((Change::Logs(LogChange::EpochStarted { epoch, skip: from }), ceiling))
}

impl Shards {
    /// These shards, the catalogue's among them. `ceilings` are those of [`reserve_offsets`].
    pub fn new(mut members: Vec<Member>, ceilings: BTreeMap<u32, Offset>) -> Self {
        members.sort_by_key(|member| member.number);
        assert!(members.first().is_some_and(|first| first.number == CATALOGUE), "the catalogue's shard is there");
        let mut streams: HashMap<StreamKey, Vec<u32>> = HashMap::new();
        for member in &members {
            for (key, _) in member.shard.streams() {
                streams.entry(key).or_default().push(member.number);
            }
        }
        let shards = Self {
            members: members.into(),
            routes: Arc::default(),
            streams: RwLock::new(streams),
            ceilings: RwLock::new(ceilings),
        };
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
        &self.member_of(partition).shard
    }

    fn member_of(&self, partition: Partition) -> &Member {
        let catalogue = &self.members[0];
        if self.members.len() == 1 {
            return catalogue;
        }
        let known = self.routes.read().get(&partition.topic).cloned();
        let shards = known.or_else(|| {
            // Looked up under the lock: a topic that is deleted meanwhile is taken out after this, and does not stay.
            let mut routes = self.routes.write();
            let found: Arc<[u32]> = read_state(&**self.catalogue(), |state| {
                state.hosting(partition.topic).map(|hosting| hosting.shards.as_slice().into())
            })?;
            routes.insert(partition.topic, Arc::clone(&found));
            Some(found)
        });
        let number = shards.and_then(|shards| shards.get(partition.index as usize % shards.len().max(1)).copied());
        number.and_then(|number| member(&self.members, number)).unwrap_or(catalogue)
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
                if let Change::Topics(TopicChange::Created { topic, .. }) = change {
                    warn!(topic = %topic.name, shard = member.number, "a topic that the catalogue had lost is back");
                }
            }
            self.catalogue().commit_own(missing).await?;
        }
        // What one shard brought to the catalogue may concern another.
        for member in self.others() {
            let host = HostView::of(member);
            let missing = read_state(&**self.catalogue(), |state| for_host(state, &host, member.number));
            if member.engine != Engine::Memory && !missing.is_empty() {
                info!(shard = member.number, changes = missing.len(), "catalogue and shard are brought together");
            }
            member.shard.commit_own(missing).await?;
        }
        let gone = read_state(&**self.catalogue(), |state| {
            state.leaving().map(|(id, _)| Change::Topics(TopicChange::Gone { id })).collect::<Vec<_>>()
        });
        self.catalogue().commit_own(gone).await?;
        self.place_slots().await?;
        self.forget_offsets().await
    }

    /// Puts coordinator slots where what they hold is, and spreads those that hold nothing.
    async fn place_slots(&self) -> Result<(), AppendError> {
        let held = self.durable().map(|member| (member.number, read_state(&*member.shard, slots::held))).collect();
        let engine = self.members[0].engine;
        let spread: Vec<u32> = self.members.iter().filter(|m| m.engine == engine).map(|m| m.number).collect();
        let moved = read_state(&**self.catalogue(), |state| slots::place(state, &held, &spread));
        if !moved.is_empty() {
            info!(slots = moved.len(), "coordinator slots are placed");
        }
        self.catalogue().commit_own(moved).await
    }

    /// Removes what groups committed on topics that no shard knows any more.
    async fn forget_offsets(&self) -> Result<(), AppendError> {
        let topics = |member: &Member| {
            read_state(&*member.shard, |state| state.topics_of_any_name().map(|topic| topic.id).collect::<Vec<_>>())
        };
        let known: BTreeSet<TopicId> = self.members.iter().flat_map(topics).collect();
        for member in self.durable() {
            let gone: BTreeSet<TopicId> = read_state(&*member.shard, |state| {
                let committed = state.groups().flat_map(|(_, group)| group.offsets.keys());
                committed.map(|partition| partition.topic).filter(|id| !known.contains(id)).collect()
            });
            member
                .shard
                .commit_own(gone.into_iter().map(|id| Change::Topics(TopicChange::Deleted { id })).collect())
                .await?;
        }
        Ok(())
    }

    /// Those that outlive the process.
    fn durable(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(|member| member.engine != Engine::Memory)
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
            self.catalogue()
                .commit_own(vec![SlotChange::OffsetsReserved { shard: number, epoch, ceiling }.into()])
                .await?;
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
                Change::Topics(TopicChange::Created { topic, shards, from, .. }) => {
                    for own in shards.iter().filter(|shard| **shard != CATALOGUE) {
                        let placed = Change::Topics(TopicChange::Created {
                            topic: topic.clone(),
                            shards: shards.clone(),
                            own: *own,
                            from: *from,
                        });
                        steps.before.entry(*own).or_default().push(placed);
                    }
                }
                Change::Topics(TopicChange::PartitionsAdded { id, .. }) => {
                    self.tell_hosts(*id, &change, &mut steps.before)
                }
                Change::Topics(TopicChange::Configured { id, .. }) => self.tell_hosts(*id, &change, &mut steps.after),
                Change::Topics(TopicChange::Deleted { id }) => {
                    self.tell_hosts(*id, &change, &mut steps.after);
                    if steps.after.values().flatten().any(|told| *told == change) {
                        steps.last.push(Change::Topics(TopicChange::Gone { id: *id }));
                    }
                    let slots = read_state(&**self.catalogue(), slots::shards);
                    for shard in slots.into_iter().filter(|shard| *shard != CATALOGUE) {
                        if !steps.after.get(&shard).is_some_and(|told| told.contains(&change)) {
                            steps.beside.entry(shard).or_default().push(change.clone());
                        }
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

    /// The shards that may know a stream: mostly one, so that nobody asks them all.
    fn knowing(&self, key: &StreamKey) -> impl Iterator<Item = &Member> {
        let numbers = match self.members.len() {
            1 => vec![CATALOGUE],
            _ => self.streams.read().get(key).cloned().unwrap_or_default(),
        };
        numbers.into_iter().filter_map(|number| member(&self.members, number))
    }

    /// Where a stream's newest records are, and the shard.
    fn newest(&self, key: &StreamKey) -> Option<(&Member, StreamState)> {
        let found = self.knowing(key).filter_map(|member| Some((member, member.shard.stream(key)?)));
        found.max_by_key(|(_, stream)| stream.next)
    }

    /// From now on this shard may know the stream.
    fn note_stream(&self, key: &StreamKey, number: u32) {
        if self.streams.read().get(key).is_some_and(|numbers| numbers.contains(&number)) {
            return;
        }
        let mut streams = self.streams.write();
        let numbers = streams.entry(key.clone()).or_default();
        if !numbers.contains(&number) {
            numbers.push(number);
        }
    }
}

fn member(members: &[Member], number: u32) -> Option<&Member> {
    members.get(members.binary_search_by_key(&number, |member| member.number).ok()?)
}

fn numbered(members: &[Member], number: u32) -> Option<&Arc<Shard>> {
    member(members, number).map(|member| &member.shard)
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
    /// With those after it, but that nobody waits for them.
    beside: BTreeMap<u32, Vec<Change>>,
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
            Some(topic) if topic.partitions < hosted.partitions => changes.push(Change::Topics(TopicChange::Created {
                topic: Topic { partitions: hosted.partitions, ..topic.clone() },
                shards: hosting.shards.clone(),
                own: CATALOGUE,
                from: catalogue.skipped(),
            })),
            Some(_) => {}
            None if leaving.contains(id) => {}
            None if catalogue.topic_named(&hosted.name).is_some() => {
                warn!(topic = %hosted.name, %id, shard = own, "records of an older topic of this name stay unreachable");
            }
            None => changes.push(Change::Topics(TopicChange::Created {
                topic: hosted.clone(),
                shards: hosting.shards.clone(),
                own: CATALOGUE,
                // What the catalogue's shard had of it may have been lost with the catalogue.
                from: catalogue.skipped(),
            })),
        }
    }
    changes
}

/// What shard `own` lacks of what the catalogue says, and what it must let go of.
fn for_host(catalogue: &State, host: &HostView, own: u32) -> Vec<Change> {
    let left = catalogue.leaving().filter(|(id, _)| host.topics.contains_key(id));
    let mut changes: Vec<Change> = left.map(|(id, _)| Change::Topics(TopicChange::Deleted { id })).collect();
    for topic in catalogue.topics() {
        let Some(hosting) = catalogue.hosting(topic.id).filter(|hosting| hosting.shards.contains(&own)) else {
            continue;
        };
        let hosted = host.topics.get(&topic.id).map(|(hosted, _)| hosted);
        if hosted.is_none_or(|hosted| hosted.partitions < topic.partitions) {
            let (topic, shards) = (topic.clone(), hosting.shards.clone());
            // Lost here, or by a catalogue that has forgotten since that it was deleted.
            let from = host.skipped.max(catalogue.skipped());
            changes.push(Change::Topics(TopicChange::Created { topic, shards, own, from }));
        }
        if hosted.is_some_and(|hosted| hosted.configs != topic.configs) {
            changes.push(Change::Topics(TopicChange::Configured { id: topic.id, configs: topic.configs.clone() }));
        }
    }
    changes
}

impl Log for Shards {
    fn append(&self, append: Append) -> BoxFuture<'static, Result<Appended, AppendError>> {
        let Member { number, shard, .. } = self.member_of(append.partition);
        if let Source::Edge(edge) = &append.source
            && self.members.len() > 1
        {
            let newest = self.newest(&edge.stream);
            self.note_stream(&edge.stream, *number);
            if let Some((there, newest)) = newest.filter(|(there, _)| there.number != *number) {
                // Until they are safe there, a loss there would be hidden by the position here.
                let is_safe = there.shard.safe(&edge.stream).is_some_and(|safe| safe >= newest.next);
                if !is_safe && !planted(Bug::MovedUnsafe) {
                    let text = format!("the stream's records in shard {} are not in the archive yet", there.number);
                    return Box::pin(std::future::ready(Err(AppendError::Full(text))));
                }
                // The stream's rule names another topic now: its position moves along, or offsets would seem to be missing.
                return shard.append_after(append, newest);
            }
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
        let Steps { before, catalogue, after, beside, last } = self.steps(changes);
        let deleted =
            |change: &Change| if let Change::Topics(TopicChange::Deleted { id }) = change { Some(*id) } else { None };
        let deleted: Vec<TopicId> = catalogue.iter().filter_map(deleted).collect();
        if before.is_empty() && after.is_empty() && beside.is_empty() && deleted.is_empty() {
            return self.catalogue().commit(catalogue);
        }
        let is_setting =
            catalogue.iter().any(|change| matches!(change, Change::Topics(TopicChange::Configured { .. })));
        let begun = commit_in(&self.members, before);
        let routes = self.routes.clone();
        let (members, catalogue_shard) = (self.members.clone(), self.catalogue().clone());
        Box::pin(async move {
            try_join_all(begun).await?;
            catalogue_shard.commit(catalogue).await?;
            deleted.iter().for_each(|id| drop(routes.write().remove(id)));
            // From here on it is done, and what fails now is made up for at the next start.
            let refused =
                commit_in(&members, beside).into_iter().filter_map(|begun| begun.now_or_never()?.err()).last();
            let told = match try_join_all(commit_in(&members, after)).await {
                Ok(_) => catalogue_shard.commit(last).await,
                Err(error) => Err(error),
            };
            if let Some(error) = told.err().or(refused) {
                warn!(%error, "a change did not reach every shard; the next start makes up for it");
                // Retention is by what the shard knows, which is not what was asked for.
                if is_setting {
                    return Err(error);
                }
            }
            Ok(())
        })
    }

    fn with_state(&self, read: &mut dyn FnMut(&State)) {
        self.catalogue().with_state(read);
    }

    fn now_ms(&self) -> TimestampMs {
        self.catalogue().now_ms()
    }

    fn slot_log(&self, slot: CoordinatorSlot) -> Option<&dyn StateLog> {
        let number = read_state(&**self.catalogue(), |state| state.slot_shard(slot));
        numbered(&self.members, number).map(|shard| &**shard as &dyn StateLog)
    }

    fn slot_logs(&self) -> Vec<&dyn StateLog> {
        self.durable().map(|member| &*member.shard as &dyn StateLog).collect()
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
        safe_of(self.knowing(key).filter_map(|member| Some((member.shard.stream(key)?.next, member.shard.safe(key)))))
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
pub(crate) mod gated;
#[cfg(test)]
mod tests;
