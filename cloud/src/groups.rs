//! Consumer groups: membership in memory, offsets in the state log.
//!
//! [`group`] is one group as a pure state machine, [`coordinator`] all of them; this file gives them a clock, random member
//! ids, somebody who waits for the answer, and durable offsets. A commit is answered when it is durable. Membership does not
//! outlive the process: after a restart members are told UNKNOWN_MEMBER_ID and join again, which clients do by themselves.
//!
//! What is durable of a group is in the log of its coordinator slot. A log that does not answer holds up what must become
//! durable of its own groups, each time for `commit_timeout`, and nothing else: reads and lists are of what is in memory.
//!
//! Offsets live as long as somebody uses them: they go when their group has been empty for `offsets_retention`
//! (KIP-211), when their topic is deleted, or when they are told to.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use shared::limited;
use shared::log::{AppendError, BoxFuture};
use shared::name::{Partition, TimestampMs};
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;
use tracing::warn;

use crate::state::{
    Change, CommittedOffset, GroupChange, State, StateLog, coordinator_log, coordinator_logs, read_state,
};

pub mod coordinator;
pub mod group;
#[cfg(test)]
mod tests;
pub mod words;

pub use coordinator::{Coordinator, Effects, Listed};
pub use group::{Effect, Ticket};
pub use words::{Description, GroupError, JoinRequest, Joined, SyncRequest, Synced};

/// Longest group id, bytes. Each committed offset carries it into the log, so this bounds what one commit can write.
pub const GROUP_ID_BYTES_MAX: usize = 255;
/// Offsets removed in one commit when they expire.
const EXPIRED_PER_COMMIT: usize = 1000;

/// Bounds and times of groups. The defaults are Kafka's where Kafka has them.
#[derive(Debug, Clone)]
pub struct GroupSettings {
    /// How long the first rebalance of an empty group waits for more members; 0 does not wait.
    pub initial_rebalance_delay_ms: u64,
    /// Shortest session timeout taken.
    pub session_timeout_ms_min: i32,
    /// Longest session timeout taken.
    pub session_timeout_ms_max: i32,
    /// How long a first JoinGroup may be parked before its client is taken for gone.
    pub newcomer_join_timeout_ms: u64,
    /// Most members of one group, ids given out and not used yet among them.
    pub members_max: usize,
    /// Most groups, with members or with offsets.
    pub groups_max: usize,
    /// Most bytes of one member's metadata, and of one assignment.
    pub member_bytes_max: usize,
    /// Most bytes that all members of all groups hold together.
    pub bytes_max: usize,
    /// Most partitions one group may have offsets of.
    pub group_offsets_max: usize,
    /// Longest metadata string of a committed offset.
    pub offset_metadata_bytes_max: usize,
    /// How long offsets are kept once their group is empty.
    pub offsets_retention: Duration,
    /// How often expired offsets are looked for.
    pub offsets_retention_check: Duration,
    /// How long an answer waits for what must be durable first.
    pub commit_timeout: Duration,
    /// How long a group without members or offsets is still listed.
    pub empty_group_kept_ms: u64,
}

impl Default for GroupSettings {
    fn default() -> Self {
        Self {
            initial_rebalance_delay_ms: 3_000,
            session_timeout_ms_min: 6_000,
            session_timeout_ms_max: 1_800_000,
            newcomer_join_timeout_ms: 300_000,
            members_max: 1_000,
            groups_max: 10_000,
            member_bytes_max: 1024 * 1024,
            bytes_max: 256 * 1024 * 1024,
            group_offsets_max: 100_000,
            offset_metadata_bytes_max: 4096,
            offsets_retention: Duration::from_secs(7 * 24 * 3600),
            offsets_retention_check: Duration::from_secs(600),
            commit_timeout: Duration::from_secs(5),
            empty_group_kept_ms: 600_000,
        }
    }
}

/// One position to commit. Partition and metadata have been checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OffsetCommit {
    /// Of which partition.
    pub partition: Partition,
    /// The next offset to read.
    pub offset: i64,
    /// Leader epoch of the last record read, or -1.
    pub leader_epoch: i32,
    /// Whatever the client says.
    pub metadata: String,
}

/// How much there is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct GroupsStatus {
    /// Groups that have, or lately had, members.
    pub groups: usize,
    /// Their members.
    pub members: usize,
    /// Bytes of metadata and assignments held.
    pub bytes: usize,
    /// JoinGroup and SyncGroup requests that wait for an answer.
    pub parked: usize,
    /// Groups with durable offsets.
    pub durable_groups: usize,
}

/// All consumer groups of this broker.
pub struct Groups {
    inner: Mutex<Inner>,
    state: Arc<dyn StateLog>,
    settings: GroupSettings,
    /// Told when something is due earlier than was thought, and at the end.
    wake: Arc<Notify>,
    /// A group that had members when the last process ended is empty since then, as far as anybody knows.
    began: Instant,
}

struct Inner {
    coordinator: Coordinator,
    next_ticket: u64,
    joins: HashMap<Ticket, oneshot::Sender<Result<Joined, GroupError>>>,
    syncs: HashMap<Ticket, oneshot::Sender<Result<Synced, GroupError>>>,
    /// Commits per group that are on their way to the disk: such a group is not looked through for expired offsets.
    committing: HashMap<String, usize>,
}

impl Groups {
    /// Groups over a state log. Called within a tokio runtime: two tasks of it keep time until the last handle is dropped.
    pub fn new(state: Arc<dyn StateLog>, settings: GroupSettings) -> Arc<Self> {
        let wake = Arc::new(Notify::new());
        let groups = Arc::new(Self {
            inner: Mutex::new(Inner {
                coordinator: Coordinator::new(settings.clone()),
                next_ticket: 0,
                joins: HashMap::new(),
                syncs: HashMap::new(),
                committing: HashMap::new(),
            }),
            state,
            wake: wake.clone(),
            began: Instant::now(),
            settings: settings.clone(),
        });
        tokio::spawn(keep_time(Arc::downgrade(&groups), wake));
        tokio::spawn(expire_offsets(Arc::downgrade(&groups), settings.offsets_retention_check));
        groups
    }

    /// Bounds and times in force.
    pub fn settings(&self) -> &GroupSettings {
        &self.settings
    }

    /// JoinGroup: resolves when the generation begins.
    pub async fn join(&self, group: &str, request: JoinRequest) -> Result<Joined, GroupError> {
        check_group_id(group)?;
        let fresh_id = fresh_member_id(request.instance_id.as_deref().unwrap_or(&request.client_id))?;
        let (answer, answered) = oneshot::channel();
        self.with(|inner, now, effects| {
            let ticket = inner.ticket();
            inner.joins.insert(ticket, answer);
            inner.coordinator.join(now, group, ticket, &fresh_id, request, effects);
        });
        answered.await.unwrap_or(Err(GroupError::UnknownMemberId))
    }

    /// SyncGroup: resolves when the leader has assigned.
    pub async fn sync(&self, group: &str, request: SyncRequest) -> Result<Synced, GroupError> {
        let (answer, answered) = oneshot::channel();
        self.with(|inner, now, effects| {
            let ticket = inner.ticket();
            inner.syncs.insert(ticket, answer);
            inner.coordinator.sync(now, group, ticket, request, effects);
        });
        answered.await.unwrap_or(Err(GroupError::UnknownMemberId))
    }

    /// Heartbeat.
    pub fn heartbeat(
        &self,
        group: &str,
        member_id: &str,
        instance_id: Option<&str>,
        generation: i32,
    ) -> Result<(), GroupError> {
        let now = self.now();
        self.inner.lock().coordinator.heartbeat(now, group, member_id, instance_id, generation)
    }

    /// LeaveGroup: one answer per member (id, static name).
    pub fn leave(
        &self,
        group: &str,
        members: &[(String, Option<String>)],
    ) -> Result<Vec<Result<(), GroupError>>, GroupError> {
        self.with(|inner, now, effects| inner.coordinator.leave(now, group, members, effects))
    }

    /// OffsetCommit: resolves when all of it is durable, or none of it will be. Generation -1 and no member is a simple commit.
    pub async fn commit_offsets(
        &self,
        group: &str,
        member_id: &str,
        instance_id: Option<&str>,
        generation: i32,
        offsets: Vec<OffsetCommit>,
    ) -> Result<(), GroupError> {
        if group.len() > GROUP_ID_BYTES_MAX {
            return Err(GroupError::InvalidGroupId);
        }
        // Of a partition that is named twice the last position counts, and one is written.
        let offsets: BTreeMap<Partition, OffsetCommit> = offsets.into_iter().map(|o| (o.partition, o)).collect();
        let (stored, _committing) = {
            // The commit takes its place in the log under the lock: no other generation's can come between check and log.
            let mut inner = self.inner.lock();
            let coordinator = &mut inner.coordinator;
            coordinator.check_commit(self.now(), group, member_id, instance_id, generation)?;
            if offsets.is_empty() {
                return Ok(());
            }
            let has_members = coordinator.has_members(group);
            let protocol_type = coordinator.get(group).map(|g| g.protocol_type).unwrap_or_default();
            let mut changes = Vec::with_capacity(offsets.len() + 1);
            let log = self.log(group);
            let touch = self.admit_commit(log, group, has_members, &offsets)?;
            let now_ms = log.now_ms();
            if touch {
                let empty_since_ms = (!has_members).then_some(now_ms);
                changes.push(GroupChange::Touched { group: group.to_owned(), protocol_type, empty_since_ms }.into());
            }
            changes.extend(offsets.into_values().map(|commit| {
                GroupChange::OffsetCommitted {
                    group: group.to_owned(),
                    partition: commit.partition,
                    committed: CommittedOffset {
                        offset: commit.offset,
                        leader_epoch: commit.leader_epoch,
                        metadata: commit.metadata,
                        commit_ms: now_ms,
                    },
                }
                .into()
            }));
            *inner.committing.entry(group.to_owned()).or_default() += 1;
            (log.commit(changes), Committing { groups: self, group })
        };
        self.stored(stored).await
    }

    /// Whether there is room, and whether the group's own record must be written along.
    fn admit_commit(
        &self,
        log: &dyn StateLog,
        group: &str,
        has_members: bool,
        offsets: &BTreeMap<Partition, OffsetCommit>,
    ) -> Result<bool, GroupError> {
        let known = read_state(log, |state| {
            let known = state.group(group)?;
            let added = offsets.keys().filter(|partition| !known.offsets.contains_key(partition)).count();
            Some((known.offsets.len() + added, known.empty_since_ms.is_some()))
        });
        let Some((count, is_noted_empty)) = known else {
            let groups = self.durable_groups();
            if groups >= self.settings.groups_max {
                return Err(GroupError::Bound(format!("there are {groups} groups with offsets, the most allowed")));
            }
            return Ok(true);
        };
        if count > self.settings.group_offsets_max {
            let max = self.settings.group_offsets_max;
            return Err(GroupError::Bound(format!("a group may have offsets of {max} partitions")));
        }
        Ok(has_members && is_noted_empty)
    }

    /// Removes offsets. Of a group with members none can go: which topics its members read is between them.
    pub async fn delete_offsets(&self, group: &str, partitions: BTreeSet<Partition>) -> Result<(), GroupError> {
        let stored = {
            let inner = self.inner.lock();
            let known = inner.coordinator.get(group);
            let log = self.log(group);
            let durable = read_state(log, |state| state.group(group).is_some());
            if known.is_none() && !durable {
                return Err(GroupError::GroupIdNotFound);
            }
            if inner.coordinator.has_members(group) {
                let consumers = known.is_some_and(|g| g.protocol_type == "consumer");
                return Err(if consumers { GroupError::SubscribedToTopic } else { GroupError::NonEmptyGroup });
            }
            if partitions.is_empty() {
                return Ok(());
            }
            let group = group.to_owned();
            let delete = |partition| GroupChange::OffsetDeleted { group: group.clone(), partition }.into();
            log.commit(partitions.into_iter().map(delete).collect())
        };
        self.stored(stored).await
    }

    /// Removes a group without members and all its offsets.
    pub async fn delete(&self, group: &str) -> Result<(), GroupError> {
        let stored = {
            let mut inner = self.inner.lock();
            let log = self.log(group);
            let durable = read_state(log, |state| state.group(group).is_some());
            match inner.coordinator.delete(group) {
                Ok(()) => {}
                Err(GroupError::GroupIdNotFound) if durable => {}
                Err(error) => return Err(error),
            }
            if !durable {
                return Ok(());
            }
            log.commit(vec![GroupChange::Deleted { group: group.to_owned() }.into()])
        };
        self.stored(stored).await
    }

    /// A group as DescribeGroups shows it; `None` if nobody ever joined it and it has no offsets.
    pub fn describe(&self, group: &str) -> Option<Description> {
        let described = self.inner.lock().coordinator.describe(group);
        described.or_else(|| {
            let durable = |state: &State| state.group(group).map(|group| group.protocol_type.clone());
            let protocol_type = read_state(self.log(group), durable)?;
            Some(Description { state: "Empty", protocol_type, protocol: String::new(), members: Vec::new() })
        })
    }

    /// All groups, those with members and those that only have offsets.
    pub fn list(&self) -> BTreeMap<String, Listed> {
        let empty = |(name, group): (&String, &crate::state::Group)| {
            (name.clone(), Listed { protocol_type: group.protocol_type.clone(), state: "Empty" })
        };
        let mut listed: BTreeMap<String, Listed> = BTreeMap::new();
        for log in coordinator_logs(&*self.state) {
            listed.extend(read_state(log, State::clone).groups().map(empty));
        }
        listed.extend(self.inner.lock().coordinator.list());
        listed
    }

    /// How much there is.
    pub fn status(&self) -> GroupsStatus {
        let durable_groups = self.durable_groups();
        let inner = self.inner.lock();
        let (groups, members, bytes) = inner.coordinator.counts();
        GroupsStatus { groups, members, bytes, parked: inner.joins.len() + inner.syncs.len(), durable_groups }
    }

    /// The log that keeps what is durable of a group.
    fn log(&self, group: &str) -> &dyn StateLog {
        coordinator_log(&*self.state, group)
    }

    fn durable_groups(&self) -> usize {
        coordinator_logs(&*self.state).into_iter().map(|log| read_state(log, State::group_count)).sum()
    }

    /// Waits until it is durable, but not for ever: a client that tries again gets its turn behind what still waits.
    async fn stored(&self, stored: BoxFuture<'static, Result<(), AppendError>>) -> Result<(), GroupError> {
        let patience = self.settings.commit_timeout;
        match tokio::time::timeout(patience, stored).await {
            Ok(stored) => stored.map_err(|error| GroupError::NotStored(error.to_string())),
            Err(_) => Err(GroupError::NotStored(format!("the log did not answer in {patience:?}"))),
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Runs one call on the coordinator and does what came of it.
    fn with<T>(&self, call: impl FnOnce(&mut Inner, u64, &mut Effects) -> T) -> T {
        let mut inner = self.inner.lock();
        let before = inner.coordinator.deadline();
        let mut effects = Vec::new();
        let result = call(&mut inner, self.now(), &mut effects);
        for (group, effect) in effects {
            match effect {
                // Who waited may have gone; the answer is then nobody's.
                Effect::Joined(ticket, answer) => {
                    if let Some(waits) = inner.joins.remove(&ticket) {
                        let _ = waits.send(answer);
                    }
                }
                Effect::Synced(ticket, answer) => {
                    if let Some(waits) = inner.syncs.remove(&ticket) {
                        let _ = waits.send(answer);
                    }
                }
                Effect::Populated => self.touch(&inner.coordinator, group, None),
                Effect::Emptied => {
                    let now_ms = self.log(&group).now_ms();
                    self.touch(&inner.coordinator, group, Some(now_ms));
                }
            }
        }
        let after = inner.coordinator.deadline();
        if after.is_some_and(|after| before.is_none_or(|before| after < before)) {
            self.wake.notify_one();
        }
        result
    }

    /// Notes that a group got its first member or lost its last. Nobody waits for it: if it is lost in a crash, the group
    /// is taken to be empty since the next start.
    fn touch(&self, coordinator: &Coordinator, group: String, empty_since_ms: Option<TimestampMs>) {
        let log = self.log(&group);
        let durable = read_state(log, |state| state.group(&group).is_some());
        // A first commit may be under way when the last member leaves, so that is noted in any case.
        if !durable && (empty_since_ms.is_none() || self.durable_groups() >= self.settings.groups_max) {
            return;
        }
        let protocol_type = coordinator.get(&group).map(|listed| listed.protocol_type).unwrap_or_default();
        let change = GroupChange::Touched { group: group.clone(), protocol_type, empty_since_ms }.into();
        let stored = log.commit(vec![change]);
        tokio::spawn(async move {
            if let Err(error) = stored.await {
                limited!(warn, %group, %error, "group state not stored");
            }
        });
    }

    /// Does what is due and says when to come back.
    fn tick(&self) -> Option<Instant> {
        self.with(|inner, now, effects| inner.coordinator.tick(now, effects));
        let deadline = self.inner.lock().coordinator.deadline()?;
        self.began.checked_add(Duration::from_millis(deadline))
    }

    /// Removes what nobody has used for the retention time; returns how many offsets and groups went.
    pub async fn expire(&self) -> usize {
        let mut removed = 0;
        for log in coordinator_logs(&*self.state) {
            removed += self.expire_in(log).await;
        }
        removed
    }

    async fn expire_in(&self, log: &dyn StateLog) -> usize {
        let mut removed = 0;
        let now_ms = log.now_ms();
        loop {
            let (count, stored) = {
                let inner = self.inner.lock();
                // A copy costs little, and looking at all groups is not for the log's lock.
                let expired = self.expired(&inner, &read_state(log, State::clone), now_ms);
                if expired.is_empty() {
                    return removed;
                }
                (expired.len(), log.commit(expired))
            };
            if let Err(error) = self.stored(stored).await {
                warn!(%error, "expired offsets not removed, trying again later");
                return removed;
            }
            removed += count;
        }
    }

    fn expired(&self, inner: &Inner, state: &State, now_ms: TimestampMs) -> Vec<Change> {
        let retention = i64::try_from(self.settings.offsets_retention.as_millis()).unwrap_or(i64::MAX);
        let kept = i64::try_from(self.settings.empty_group_kept_ms).unwrap_or(i64::MAX);
        let over = |since: TimestampMs, time: i64| since.checked_add(time).is_some_and(|until| until <= now_ms);
        let began_ms = now_ms.saturating_sub(i64::try_from(self.began.elapsed().as_millis()).unwrap_or(i64::MAX));
        let mut expired = Vec::new();
        for (name, group) in state.groups() {
            if inner.coordinator.has_members(name) || inner.committing.contains_key(name) {
                continue;
            }
            let empty_since = group.empty_since_ms.unwrap_or(began_ms);
            let mut left = group.offsets.len();
            for (partition, committed) in group.offsets.iter() {
                if over(empty_since.max(committed.commit_ms), retention) {
                    expired.push(GroupChange::OffsetDeleted { group: name.clone(), partition: *partition }.into());
                    left -= 1;
                }
                if expired.len() >= EXPIRED_PER_COMMIT {
                    return expired;
                }
            }
            if left == 0 && over(empty_since, kept) {
                expired.push(GroupChange::Deleted { group: name.clone() }.into());
            }
        }
        expired
    }
}

/// Holds a group's place in [`Inner::committing`], however the wait ends.
struct Committing<'a> {
    groups: &'a Groups,
    group: &'a str,
}

impl Drop for Committing<'_> {
    fn drop(&mut self) {
        let mut inner = self.groups.inner.lock();
        if let Some(count) = inner.committing.get_mut(self.group) {
            *count -= 1;
            if *count == 0 {
                inner.committing.remove(self.group);
            }
        }
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        self.wake.notify_one();
    }
}

impl Inner {
    fn ticket(&mut self) -> Ticket {
        self.next_ticket += 1;
        Ticket(self.next_ticket)
    }
}

async fn keep_time(groups: Weak<Groups>, wake: Arc<Notify>) {
    loop {
        let Some(next) = groups.upgrade().map(|groups| groups.tick()) else { return };
        match next {
            None => wake.notified().await,
            Some(next) => {
                tokio::select! {
                    () = wake.notified() => {}
                    () = tokio::time::sleep_until(next) => {}
                }
            }
        }
    }
}

async fn expire_offsets(groups: Weak<Groups>, every: Duration) {
    loop {
        tokio::time::sleep(every.max(Duration::from_millis(100))).await;
        let Some(groups) = groups.upgrade() else { return };
        groups.expire().await;
    }
}

fn check_group_id(group: &str) -> Result<(), GroupError> {
    if group.is_empty() || group.len() > GROUP_ID_BYTES_MAX { Err(GroupError::InvalidGroupId) } else { Ok(()) }
}

/// `prefix-` and 128 random bits: nobody joins under a guessed id.
fn fresh_member_id(prefix: &str) -> Result<String, GroupError> {
    const PREFIX_CHARS_MAX: usize = 256;
    let mut random = [0; 16];
    getrandom::fill(&mut random).map_err(|error| GroupError::NotStored(format!("no randomness: {error}")))?;
    let prefix: String = prefix.chars().take(PREFIX_CHARS_MAX).collect();
    let hex = u128::from_be_bytes(random);
    Ok(format!("{prefix}-{hex:032x}"))
}
