//! All groups with members, and when each needs the clock: pure, like the groups themselves.
//!
//! What must outlive a restart (offsets, since when a group is empty) is not here but in the state log; a group that is
//! only there has no members. Bounded in groups, members and bytes; when full, a newcomer is refused and told why.

use std::collections::{BTreeMap, BTreeSet};

use super::GroupSettings;
use super::group::{Effect, Group, GroupState, Millis, Ticket};
use super::words::{Description, GroupError, JoinRequest, SyncRequest};

/// Effects of one call, each with its group.
pub type Effects = Vec<(String, Effect)>;

/// All groups that have, or lately had, members.
#[derive(Debug)]
pub struct Coordinator {
    settings: GroupSettings,
    groups: BTreeMap<String, Entry>,
    /// When to look at which group. A look that comes too early finds nothing to do and is put off.
    looks: BTreeSet<(Millis, String)>,
    bytes: usize,
}

#[derive(Debug)]
struct Entry {
    group: Group,
    look: Option<Millis>,
    bytes: usize,
    /// When an empty group is forgotten.
    forget: Option<Millis>,
}

/// One group in a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Its protocol type.
    pub protocol_type: String,
    /// Its state's name.
    pub state: &'static str,
}

impl Coordinator {
    /// With no groups.
    pub fn new(settings: GroupSettings) -> Self {
        Self { settings, groups: BTreeMap::new(), looks: BTreeSet::new(), bytes: 0 }
    }

    /// JoinGroup. The answer is an effect, now or later.
    pub fn join(
        &mut self,
        now: Millis,
        name: &str,
        ticket: Ticket,
        fresh_id: &str,
        request: JoinRequest,
        out: &mut Effects,
    ) {
        if let Err(error) = self.admit(name, &request) {
            out.push((name.to_owned(), Effect::Joined(ticket, Err(error))));
            return;
        }
        let entry = self.groups.entry(name.to_owned()).or_insert_with(Entry::new);
        let mut effects = Vec::new();
        entry.group.join(now, &self.settings, ticket, fresh_id, request, &mut effects);
        self.settle(now, name, effects, out);
    }

    fn admit(&mut self, name: &str, request: &JoinRequest) -> Result<(), GroupError> {
        if name.is_empty() {
            return Err(GroupError::InvalidGroupId);
        }
        let bytes: usize = request.protocols.iter().map(|(name, metadata)| name.len() + metadata.len()).sum();
        if self.bytes.saturating_add(bytes) > self.settings.bytes_max {
            let max = self.settings.bytes_max;
            return Err(GroupError::Bound(format!("all groups together hold {max} bytes of member metadata")));
        }
        if self.groups.contains_key(name) {
            return Ok(());
        }
        if !request.member_id.is_empty() {
            return Err(GroupError::UnknownMemberId);
        }
        if self.groups.len() >= self.settings.groups_max {
            let idle = |(name, entry): (&String, &Entry)| entry.group.is_idle().then(|| name.clone());
            let Some(idle) = self.groups.iter().find_map(idle) else {
                return Err(GroupError::Bound(format!("there are {} groups, the most allowed", self.groups.len())));
            };
            self.forget(&idle);
        }
        Ok(())
    }

    /// SyncGroup. The answer is an effect, now or later.
    pub fn sync(&mut self, now: Millis, name: &str, ticket: Ticket, request: SyncRequest, out: &mut Effects) {
        let bytes: usize = request.assignments.iter().map(|(id, assignment)| id.len() + assignment.len()).sum();
        let refused = if name.is_empty() {
            Some(GroupError::InvalidGroupId)
        } else if self.bytes.saturating_add(bytes) > self.settings.bytes_max {
            let max = self.settings.bytes_max;
            Some(GroupError::Bound(format!("all groups together hold {max} bytes of assignments")))
        } else {
            None
        };
        let mut effects = Vec::new();
        match (refused, self.groups.get_mut(name)) {
            (Some(error), _) => effects.push(Effect::Synced(ticket, Err(error))),
            (None, None) => effects.push(Effect::Synced(ticket, Err(GroupError::UnknownMemberId))),
            (None, Some(entry)) => entry.group.sync(now, &self.settings, ticket, request, &mut effects),
        }
        self.settle(now, name, effects, out);
    }

    /// Heartbeat.
    pub fn heartbeat(
        &mut self,
        now: Millis,
        name: &str,
        member_id: &str,
        instance_id: Option<&str>,
        generation: i32,
    ) -> Result<(), GroupError> {
        if name.is_empty() {
            return Err(GroupError::InvalidGroupId);
        }
        // A heartbeat only ever puts a deadline off, so the look that is noted stays early enough.
        let entry = self.groups.get_mut(name).ok_or(GroupError::UnknownMemberId)?;
        entry.group.heartbeat(now, member_id, instance_id, generation)
    }

    /// LeaveGroup: one answer per member named.
    pub fn leave(
        &mut self,
        now: Millis,
        name: &str,
        members: &[(String, Option<String>)],
        out: &mut Effects,
    ) -> Result<Vec<Result<(), GroupError>>, GroupError> {
        if name.is_empty() {
            return Err(GroupError::InvalidGroupId);
        }
        let Some(entry) = self.groups.get_mut(name) else {
            return Ok(members.iter().map(|_| Err(GroupError::UnknownMemberId)).collect());
        };
        let mut effects = Vec::new();
        let results = members
            .iter()
            .map(|(id, instance)| entry.group.leave(now, &self.settings, id, instance.as_deref(), &mut effects))
            .collect();
        self.settle(now, name, effects, out);
        Ok(results)
    }

    /// Whether this commit may be stored.
    pub fn check_commit(
        &mut self,
        now: Millis,
        name: &str,
        member_id: &str,
        instance_id: Option<&str>,
        generation: i32,
    ) -> Result<(), GroupError> {
        match self.groups.get_mut(name) {
            Some(entry) => entry.group.check_commit(now, member_id, instance_id, generation),
            None if generation < 0 => Ok(()),
            // The client's generation is of a life of this broker that ended: it joins again.
            None => Err(GroupError::IllegalGeneration),
        }
    }

    /// What DescribeGroups says of a group that is here.
    pub fn describe(&self, name: &str) -> Option<Description> {
        self.groups.get(name).filter(|entry| entry.group.has_begun()).map(|entry| entry.group.describe())
    }

    /// A group's state and protocol type, if it is here.
    pub fn get(&self, name: &str) -> Option<Listed> {
        self.groups.get(name).filter(|entry| entry.group.has_begun()).map(listed)
    }

    /// All groups that are here.
    pub fn list(&self) -> BTreeMap<String, Listed> {
        let begun = self.groups.iter().filter(|(_, entry)| entry.group.has_begun());
        begun.map(|(name, entry)| (name.clone(), listed(entry))).collect()
    }

    /// Whether the group has members.
    pub fn has_members(&self, name: &str) -> bool {
        self.groups.get(name).is_some_and(|entry| entry.group.state() != GroupState::Empty)
    }

    /// Forgets a group. Only one without members.
    pub fn delete(&mut self, name: &str) -> Result<(), GroupError> {
        match self.groups.get(name) {
            None => Err(GroupError::GroupIdNotFound),
            Some(entry) if entry.group.state() != GroupState::Empty => Err(GroupError::NonEmptyGroup),
            Some(_) => {
                self.forget(name);
                Ok(())
            }
        }
    }

    /// Number of groups, of members, and bytes held.
    pub fn counts(&self) -> (usize, usize, usize) {
        (self.groups.len(), self.groups.values().map(|entry| entry.group.members()).sum(), self.bytes)
    }

    /// When [`Coordinator::tick`] has something to do, at the earliest.
    pub fn deadline(&self) -> Option<Millis> {
        self.looks.first().map(|(at, _)| *at)
    }

    /// Does what is due by `now`.
    pub fn tick(&mut self, now: Millis, out: &mut Effects) {
        while let Some((at, name)) = self.looks.first().cloned() {
            if at > now {
                return;
            }
            self.looks.remove(&(at, name.clone()));
            let Some(entry) = self.groups.get_mut(&name) else { continue };
            entry.look = None;
            if entry.forget.is_some_and(|forget| forget <= now) && entry.group.is_idle() {
                self.forget(&name);
                continue;
            }
            let mut effects = Vec::new();
            entry.group.tick(now, &self.settings, &mut effects);
            self.settle(now, &name, effects, out);
        }
    }

    /// After a call on a group: its bytes, its next look, its end.
    fn settle(&mut self, now: Millis, name: &str, effects: Vec<Effect>, out: &mut Effects) {
        out.extend(effects.into_iter().map(|effect| (name.to_owned(), effect)));
        let Some(entry) = self.groups.get_mut(name) else { return };
        let bytes = entry.group.bytes();
        self.bytes = self.bytes.saturating_sub(entry.bytes).saturating_add(bytes);
        entry.bytes = bytes;
        if !entry.group.is_idle() {
            entry.forget = None;
        } else if !entry.group.has_begun() {
            // A refused first JoinGroup leaves nothing behind.
            self.forget(name);
            return;
        } else {
            entry.forget.get_or_insert(now.saturating_add(self.settings.empty_group_kept_ms));
        }
        // A look is never in the present: what was due has been done, and time goes on.
        let next = entry.group.deadline().into_iter().chain(entry.forget).min().map(|at| at.max(now + 1));
        if let Some(next) = next
            && entry.look.is_none_or(|look| next < look)
        {
            if let Some(look) = entry.look.replace(next) {
                self.looks.remove(&(look, name.to_owned()));
            }
            self.looks.insert((next, name.to_owned()));
        }
    }

    fn forget(&mut self, name: &str) {
        let Some(entry) = self.groups.remove(name) else { return };
        self.bytes = self.bytes.saturating_sub(entry.bytes);
        if let Some(look) = entry.look {
            self.looks.remove(&(look, name.to_owned()));
        }
    }
}

impl Entry {
    fn new() -> Self {
        Self { group: Group::new(), look: None, bytes: 0, forget: None }
    }
}

fn listed(entry: &Entry) -> Listed {
    Listed {
        protocol_type: entry.group.protocol_type().unwrap_or_default().to_owned(),
        state: entry.group.state().name(),
    }
}
