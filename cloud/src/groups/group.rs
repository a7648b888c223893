//! One classic consumer group as a state machine: who is a member, which generation is in force, who waits for what.
//!
//! ```text
//!            first member joins            delay or timeout over,             leader's SyncGroup
//!                                          or every member joined
//!   Empty ------------------> PreparingRebalance -------> CompletingRebalance -------------> Stable
//!     ^                         |        ^                        |                            |
//!     +---- nobody joined ------+        +---- a member joins, leaves, times out, never syncs -+
//! ```
//! It knows neither sockets nor clocks: `now` comes in with each call, and an answer goes out as an [`Effect`] that names the
//! [`Ticket`] the question came with, at once or in a later call. What members say to each other (metadata, assignments) is
//! opaque: consumers, Connect and Schema Registry all use this protocol with bytes of their own.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::GroupSettings;
use super::words::{DescribedMember, Description, GroupError, JoinRequest, Joined, JoinedMember, SyncRequest, Synced};

/// Milliseconds of a clock that only goes forward.
pub type Millis = u64;

/// Names a question whose answer may come later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// What a call came to, beyond its return value.
#[derive(Debug, PartialEq, Eq)]
pub enum Effect {
    /// A JoinGroup is answered.
    Joined(Ticket, Result<Joined, GroupError>),
    /// A SyncGroup is answered.
    Synced(Ticket, Result<Synced, GroupError>),
    /// The group has members now and had none.
    Populated,
    /// The group has no members now and had some.
    Emptied,
}

/// Where a group stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupState {
    /// No members.
    Empty,
    /// Waiting for members to join.
    PreparingRebalance,
    /// Waiting for the leader's assignment.
    CompletingRebalance,
    /// Every member may have its assignment.
    Stable,
}

impl GroupState {
    /// The name Kafka's tools show.
    pub fn name(self) -> &'static str {
        match self {
            Self::Empty => "Empty",
            Self::PreparingRebalance => "PreparingRebalance",
            Self::CompletingRebalance => "CompletingRebalance",
            Self::Stable => "Stable",
        }
    }
}

/// One group.
#[derive(Debug)]
pub struct Group {
    phase: Phase,
    generation: i32,
    protocol_type: Option<String>,
    protocol: Option<String>,
    leader: Option<String>,
    members: BTreeMap<String, Member>,
    /// Ids given with MEMBER_ID_REQUIRED and not used yet, and when they lapse.
    pending: BTreeMap<String, Millis>,
    /// Static name -> member id.
    instances: BTreeMap<String, String>,
}

#[derive(Debug)]
enum Phase {
    Empty,
    Preparing {
        /// When waiting ends.
        until: Millis,
        /// Set while an empty group waits for more first members, so that ten consumers that start together cause
        /// one rebalance and not ten.
        initial: Option<Initial>,
    },
    /// Members that have not sent SyncGroup by then are out.
    Completing {
        sync_until: Millis,
    },
    Stable {
        sync_until: Option<Millis>,
    },
}

#[derive(Debug)]
struct Initial {
    /// How much longer the wait may be drawn out.
    remaining: Millis,
    /// Somebody joined since the wait was last drawn out.
    newcomer: bool,
}

#[derive(Debug)]
struct Member {
    instance_id: Option<String>,
    client_id: String,
    client_host: String,
    session_timeout: Millis,
    rebalance_timeout: Millis,
    protocols: Vec<(String, Bytes)>,
    assignment: Bytes,
    /// Has not had an answer to its first JoinGroup: it cannot send heartbeats yet.
    is_new: bool,
    /// When it is out unless it is heard of.
    expires: Millis,
    join: Option<Ticket>,
    sync: Option<Ticket>,
    /// Has asked for its assignment in this generation.
    synced: bool,
}

impl Member {
    fn knows(&self, protocol: &str) -> bool {
        self.protocols.iter().any(|(name, _)| name == protocol)
    }

    fn metadata(&self, protocol: &str) -> Bytes {
        self.protocols.iter().find(|(name, _)| name == protocol).map(|(_, m)| m.clone()).unwrap_or_default()
    }

    /// A member whose question is parked is alive, except that a newcomer's question may be that of a client long gone.
    fn may_expire(&self) -> bool {
        self.is_new || (self.join.is_none() && self.sync.is_none())
    }

    fn heard(&mut self, now: Millis) {
        self.expires = now.saturating_add(self.session_timeout);
    }

    /// A newcomer's time runs from its JoinGroup alone.
    fn heard_unless_new(&mut self, now: Millis) {
        if !self.is_new {
            self.heard(now);
        }
    }

    fn bytes(&self) -> usize {
        let names = self.client_id.len() + self.client_host.len() + self.instance_id.as_ref().map_or(0, String::len);
        protocols_bytes(&self.protocols) + self.assignment.len() + names
    }
}

impl Default for Group {
    fn default() -> Self {
        Self::new()
    }
}

impl Group {
    /// A group nobody has joined.
    pub fn new() -> Self {
        Self {
            phase: Phase::Empty,
            generation: 0,
            protocol_type: None,
            protocol: None,
            leader: None,
            members: BTreeMap::new(),
            pending: BTreeMap::new(),
            instances: BTreeMap::new(),
        }
    }

    /// Where it stands.
    pub fn state(&self) -> GroupState {
        match self.phase {
            Phase::Empty => GroupState::Empty,
            Phase::Preparing { .. } => GroupState::PreparingRebalance,
            Phase::Completing { .. } => GroupState::CompletingRebalance,
            Phase::Stable { .. } => GroupState::Stable,
        }
    }

    /// What its members called their protocol; remembered when they are gone.
    pub fn protocol_type(&self) -> Option<&str> {
        self.protocol_type.as_deref()
    }

    /// Number of members.
    pub fn members(&self) -> usize {
        self.members.len()
    }

    /// Nothing in memory is worth keeping but the generation.
    pub fn is_idle(&self) -> bool {
        matches!(self.phase, Phase::Empty) && self.pending.is_empty()
    }

    /// Somebody has joined it, ever: before, it is an id that was given out and no group.
    pub fn has_begun(&self) -> bool {
        self.protocol_type.is_some()
    }

    /// Bytes of opaque data held.
    pub fn bytes(&self) -> usize {
        self.members.values().map(Member::bytes).sum()
    }

    /// When [`Group::tick`] has something to do, at the earliest.
    pub fn deadline(&self) -> Option<Millis> {
        let phase = match self.phase {
            Phase::Empty => None,
            Phase::Preparing { until, .. } => Some(until),
            Phase::Completing { sync_until } => Some(sync_until),
            Phase::Stable { sync_until } => sync_until,
        };
        let members = self.members.values().filter(|m| m.may_expire()).map(|m| m.expires);
        members.chain(self.pending.values().copied()).chain(phase).min()
    }

    /// JoinGroup. `fresh_id` is an id nobody has, used if the member needs one. The answer is an effect.
    pub fn join(
        &mut self,
        now: Millis,
        settings: &GroupSettings,
        ticket: Ticket,
        fresh_id: &str,
        request: JoinRequest,
        out: &mut Vec<Effect>,
    ) {
        match self.try_join(now, settings, ticket, fresh_id, request, out) {
            Ok(None) => {}
            Ok(Some(joined)) => out.push(Effect::Joined(ticket, Ok(joined))),
            Err(error) => out.push(Effect::Joined(ticket, Err(error))),
        }
    }

    /// `Ok(None)`: parked, or answered already.
    fn try_join(
        &mut self,
        now: Millis,
        settings: &GroupSettings,
        ticket: Ticket,
        fresh_id: &str,
        request: JoinRequest,
        out: &mut Vec<Effect>,
    ) -> Result<Option<Joined>, GroupError> {
        self.check_bounds(settings, &request)?;
        if !self.supports(&request) {
            return Err(GroupError::InconsistentGroupProtocol);
        }
        if request.member_id.is_empty() {
            let Some(instance) = &request.instance_id else {
                if request.two_steps {
                    let lapses = now.saturating_add(session_timeout(&request));
                    self.pending.insert(fresh_id.to_owned(), lapses);
                    return Err(GroupError::MemberIdRequired(fresh_id.to_owned()));
                }
                self.add(now, settings, ticket, fresh_id.to_owned(), request, out);
                return Ok(None);
            };
            return match self.instances.get(instance).cloned() {
                Some(old_id) => self.replace_static(now, settings, ticket, &old_id, fresh_id, request, out),
                None => {
                    self.add(now, settings, ticket, fresh_id.to_owned(), request, out);
                    Ok(None)
                }
            };
        }
        if request.instance_id.is_none() && self.pending.contains_key(&request.member_id) {
            let id = request.member_id.clone();
            self.add(now, settings, ticket, id, request, out);
            return Ok(None);
        }
        self.member(&request.member_id, request.instance_id.as_deref())?;
        self.rejoin(now, settings, ticket, request, out)
    }

    fn check_bounds(&self, settings: &GroupSettings, request: &JoinRequest) -> Result<(), GroupError> {
        let (min, max) = (settings.session_timeout_ms_min, settings.session_timeout_ms_max);
        if !(min..=max).contains(&request.session_timeout_ms) {
            return Err(GroupError::InvalidSessionTimeout { found: request.session_timeout_ms, min, max });
        }
        let known = self.members.contains_key(&request.member_id)
            || request.instance_id.as_ref().is_some_and(|i| self.instances.contains_key(i));
        let claimed = self.pending.contains_key(&request.member_id);
        let others = self.members.len() + self.pending.len() - usize::from(claimed);
        if !known && others >= settings.members_max {
            return Err(GroupError::GroupMaxSizeReached(settings.members_max));
        }
        let bytes = protocols_bytes(&request.protocols);
        if bytes > settings.member_bytes_max {
            let max = settings.member_bytes_max;
            return Err(GroupError::Bound(format!("member metadata of {bytes} bytes is more than {max}")));
        }
        Ok(())
    }

    /// Whether the group can go on with what this member knows (rule: one protocol that all know).
    fn supports(&self, request: &JoinRequest) -> bool {
        if request.protocol_type.is_empty() || request.protocols.is_empty() {
            return false;
        }
        self.members.is_empty()
            || (self.protocol_type.as_deref() == Some(&request.protocol_type)
                && request.protocols.iter().any(|(name, _)| self.members.values().all(|m| m.knows(name))))
    }

    fn add(
        &mut self,
        now: Millis,
        settings: &GroupSettings,
        ticket: Ticket,
        id: String,
        request: JoinRequest,
        out: &mut Vec<Effect>,
    ) {
        self.pending.remove(&id);
        if self.members.is_empty() {
            self.protocol_type = Some(request.protocol_type.clone());
        }
        if matches!(self.phase, Phase::Empty) {
            out.push(Effect::Populated);
        }
        self.leader.get_or_insert_with(|| id.clone());
        if let Some(instance) = &request.instance_id {
            self.instances.insert(instance.clone(), id.clone());
        }
        let member = Member {
            session_timeout: session_timeout(&request),
            rebalance_timeout: rebalance_timeout(&request),
            instance_id: request.instance_id,
            client_id: request.client_id,
            client_host: request.client_host,
            protocols: request.protocols,
            assignment: Bytes::new(),
            is_new: true,
            expires: now.saturating_add(settings.newcomer_join_timeout_ms),
            join: Some(ticket),
            sync: None,
            synced: false,
        };
        self.members.insert(id, member);
        if let Phase::Preparing { initial: Some(initial), .. } = &mut self.phase {
            initial.newcomer = true;
        }
        self.rebalance_or_complete(now, settings, out);
    }

    /// A member the group knows joins again under its own id.
    fn rejoin(
        &mut self,
        now: Millis,
        settings: &GroupSettings,
        ticket: Ticket,
        request: JoinRequest,
        out: &mut Vec<Effect>,
    ) -> Result<Option<Joined>, GroupError> {
        let id = request.member_id.clone();
        let is_leader = self.leader.as_deref() == Some(&id);
        let unchanged = self.members.get(&id).is_some_and(|m| m.protocols == request.protocols);
        let answer_at_once = match self.phase {
            // It did not see our answer: say it again.
            Phase::Completing { .. } => unchanged,
            // The leader joins again because it saw something that needs a new assignment.
            Phase::Stable { .. } => unchanged && !is_leader,
            Phase::Preparing { .. } | Phase::Empty => false,
        };
        if answer_at_once {
            if let Some(member) = self.members.get_mut(&id) {
                member.heard(now);
            }
            let members = if is_leader { self.joined_members() } else { Vec::new() };
            return Ok(Some(self.joined(&id, members, false)));
        }
        self.update(now, settings, &id, request);
        self.park_join(&id, ticket, GroupError::RebalanceInProgress, out);
        self.rebalance_or_complete(now, settings, out);
        Ok(None)
    }

    /// A process with a known static name came without a member id: it was restarted. It takes the old one's place under a
    /// new id, and the old one is fenced (KIP-345).
    #[allow(clippy::too_many_arguments)]
    fn replace_static(
        &mut self,
        now: Millis,
        settings: &GroupSettings,
        ticket: Ticket,
        old_id: &str,
        new_id: &str,
        request: JoinRequest,
        out: &mut Vec<Effect>,
    ) -> Result<Option<Joined>, GroupError> {
        let Some(mut member) = self.members.remove(old_id) else { return Err(GroupError::UnknownMemberId) };
        if let Some(parked) = member.join.take() {
            out.push(Effect::Joined(parked, Err(GroupError::FencedInstanceId)));
        }
        if let Some(parked) = member.sync.take() {
            out.push(Effect::Synced(parked, Err(GroupError::FencedInstanceId)));
        }
        let old_leader = self.leader.clone().unwrap_or_default();
        if old_leader == old_id {
            self.leader = Some(new_id.to_owned());
        }
        if let Some(instance) = &member.instance_id {
            self.instances.insert(instance.clone(), new_id.to_owned());
        }
        member.heard(now);
        self.members.insert(new_id.to_owned(), member);
        let may_skip = request.may_skip_assignment;
        self.update(now, settings, new_id, request);

        if matches!(self.phase, Phase::Stable { .. }) && self.select_protocol() == self.protocol {
            // Same name, same protocol: the assignment stays and nobody else notices. A leader must then not assign anew.
            // It is told so from v9 on; before, it is told of the old leader and takes itself for a follower.
            let is_leader = self.leader.as_deref() == Some(new_id);
            if may_skip {
                let members = if is_leader { self.joined_members() } else { Vec::new() };
                return Ok(Some(self.joined(new_id, members, is_leader)));
            }
            let joined = self.joined(new_id, Vec::new(), false);
            return Ok(Some(Joined { leader: old_leader, ..joined }));
        }
        self.park_join(new_id, ticket, GroupError::RebalanceInProgress, out);
        self.rebalance_or_complete(now, settings, out);
        Ok(None)
    }

    fn update(&mut self, now: Millis, settings: &GroupSettings, id: &str, request: JoinRequest) {
        let Some(member) = self.members.get_mut(id) else { return };
        member.session_timeout = session_timeout(&request);
        member.rebalance_timeout = rebalance_timeout(&request);
        member.client_id = request.client_id;
        member.client_host = request.client_host;
        member.protocols = request.protocols;
        if member.is_new {
            member.expires = now.saturating_add(settings.newcomer_join_timeout_ms);
        } else {
            member.heard(now);
        }
    }

    /// A client that asks twice has given up on the first question.
    fn park_join(&mut self, id: &str, ticket: Ticket, to_older: GroupError, out: &mut Vec<Effect>) {
        let Some(member) = self.members.get_mut(id) else { return };
        if let Some(older) = member.join.replace(ticket) {
            out.push(Effect::Joined(older, Err(to_older)));
        }
    }

    /// SyncGroup. The answer is an effect.
    pub fn sync(
        &mut self,
        now: Millis,
        settings: &GroupSettings,
        ticket: Ticket,
        request: SyncRequest,
        out: &mut Vec<Effect>,
    ) {
        match self.try_sync(now, settings, ticket, request, out) {
            Ok(None) => {}
            Ok(Some(synced)) => out.push(Effect::Synced(ticket, Ok(synced))),
            Err(error) => out.push(Effect::Synced(ticket, Err(error))),
        }
    }

    fn try_sync(
        &mut self,
        now: Millis,
        settings: &GroupSettings,
        ticket: Ticket,
        request: SyncRequest,
        out: &mut Vec<Effect>,
    ) -> Result<Option<Synced>, GroupError> {
        self.member(&request.member_id, request.instance_id.as_deref())?;
        if request.generation != self.generation {
            return Err(GroupError::IllegalGeneration);
        }
        let differs = |said: &Option<String>, is: &Option<String>| said.is_some() && said != is;
        if differs(&request.protocol_type, &self.protocol_type) || differs(&request.protocol, &self.protocol) {
            return Err(GroupError::InconsistentGroupProtocol);
        }
        let is_leader = self.leader.as_deref() == Some(&request.member_id);
        match self.phase {
            Phase::Empty => Err(GroupError::UnknownMemberId),
            Phase::Preparing { .. } => Err(GroupError::RebalanceInProgress),
            Phase::Stable { .. } => {
                let protocol_type = self.protocol_type.clone().unwrap_or_default();
                let protocol = self.protocol.clone().unwrap_or_default();
                let Some(member) = self.members.get_mut(&request.member_id) else {
                    return Err(GroupError::UnknownMemberId);
                };
                member.synced = true;
                member.heard(now);
                let assignment = member.assignment.clone();
                self.clear_sync_deadline();
                Ok(Some(Synced { protocol_type, protocol, assignment }))
            }
            Phase::Completing { sync_until } => {
                if is_leader {
                    check_assignments(settings, &request.assignments)?;
                }
                if let Some(member) = self.members.get_mut(&request.member_id) {
                    member.synced = true;
                    if let Some(older) = member.sync.replace(ticket) {
                        out.push(Effect::Synced(older, Err(GroupError::RebalanceInProgress)));
                    }
                }
                if is_leader {
                    self.assign(now, sync_until, request.assignments, out);
                }
                Ok(None)
            }
        }
    }

    /// The leader has spoken: everybody who waits gets its part. Members the leader left out get nothing, which is an
    /// assignment too.
    fn assign(&mut self, now: Millis, sync_until: Millis, assignments: Vec<(String, Bytes)>, out: &mut Vec<Effect>) {
        let mut given: BTreeMap<String, Bytes> = assignments.into_iter().collect();
        let protocol_type = self.protocol_type.clone().unwrap_or_default();
        let protocol = self.protocol.clone().unwrap_or_default();
        for (id, member) in &mut self.members {
            member.assignment = given.remove(id).unwrap_or_default();
            if let Some(ticket) = member.sync.take() {
                member.heard(now);
                let assignment = member.assignment.clone();
                let (protocol_type, protocol) = (protocol_type.clone(), protocol.clone());
                out.push(Effect::Synced(ticket, Ok(Synced { protocol_type, protocol, assignment })));
            }
        }
        self.phase = Phase::Stable { sync_until: Some(sync_until) };
        self.clear_sync_deadline();
    }

    fn clear_sync_deadline(&mut self) {
        if let Phase::Stable { sync_until } = &mut self.phase
            && self.members.values().all(|m| m.synced)
        {
            *sync_until = None;
        }
    }

    /// Heartbeat.
    pub fn heartbeat(
        &mut self,
        now: Millis,
        member_id: &str,
        instance_id: Option<&str>,
        generation: i32,
    ) -> Result<(), GroupError> {
        let current = self.generation;
        let member = self.member(member_id, instance_id)?;
        if generation != current {
            return Err(GroupError::IllegalGeneration);
        }
        member.heard_unless_new(now);
        match self.phase {
            Phase::Empty => Err(GroupError::UnknownMemberId),
            Phase::Preparing { .. } => Err(GroupError::RebalanceInProgress),
            // A consumer beats as soon as it has joined, while the leader still assigns.
            Phase::Completing { .. } | Phase::Stable { .. } => Ok(()),
        }
    }

    /// One member of a LeaveGroup: by id, or a static member by its name alone (as an administrator removes it).
    pub fn leave(
        &mut self,
        now: Millis,
        settings: &GroupSettings,
        member_id: &str,
        instance_id: Option<&str>,
        out: &mut Vec<Effect>,
    ) -> Result<(), GroupError> {
        if instance_id.is_none() && self.pending.remove(member_id).is_some() {
            self.react(now, settings, false, out);
            return Ok(());
        }
        let id = match (member_id, instance_id) {
            ("", Some(instance)) => self.instances.get(instance).cloned().ok_or(GroupError::UnknownMemberId)?,
            (id, instance) => {
                self.member(id, instance)?;
                id.to_owned()
            }
        };
        self.remove(&id, out);
        self.react(now, settings, true, out);
        Ok(())
    }

    /// Whether offsets may be committed by this member in this generation. `-1`, no member and no instance name is a simple
    /// commit, good while the group has no members.
    pub fn check_commit(
        &mut self,
        now: Millis,
        member_id: &str,
        instance_id: Option<&str>,
        generation: i32,
    ) -> Result<(), GroupError> {
        if self.members.is_empty() && generation < 0 {
            return Ok(());
        }
        let current = self.generation;
        let member = self.member(member_id, instance_id)?;
        if generation != current {
            return Err(GroupError::IllegalGeneration);
        }
        member.heard_unless_new(now);
        match self.phase {
            Phase::Empty => Err(GroupError::UnknownMemberId),
            // The heartbeat tells it to join again; until then its work counts.
            Phase::Preparing { .. } | Phase::Stable { .. } => Ok(()),
            // It has seen the new generation and cannot own anything in it yet.
            Phase::Completing { .. } => Err(GroupError::RebalanceInProgress),
        }
    }

    /// Does what is due by `now`.
    pub fn tick(&mut self, now: Millis, settings: &GroupSettings, out: &mut Vec<Effect>) {
        let pending_before = self.pending.len();
        self.pending.retain(|_, lapses| *lapses > now);
        let expired = |(id, m): (&String, &Member)| (m.may_expire() && m.expires <= now).then(|| id.clone());
        let expired: Vec<String> = self.members.iter().filter_map(expired).collect();
        for id in &expired {
            self.remove(id, out);
        }
        if !expired.is_empty() || self.pending.len() != pending_before {
            self.react(now, settings, !expired.is_empty(), out);
        }
        match &mut self.phase {
            Phase::Preparing { until, initial } if *until <= now => {
                if let Some(initial) = initial
                    && initial.newcomer
                    && initial.remaining > 0
                {
                    let delay = settings.initial_rebalance_delay_ms.min(initial.remaining);
                    initial.remaining -= delay;
                    initial.newcomer = false;
                    *until = now.saturating_add(delay);
                } else {
                    self.complete_join(now, out);
                }
            }
            Phase::Completing { sync_until: until } | Phase::Stable { sync_until: Some(until) } if *until <= now => {
                let silent = |(id, m): (&String, &Member)| (!m.synced).then(|| id.clone());
                let silent: Vec<String> = self.members.iter().filter_map(silent).collect();
                for id in &silent {
                    self.remove(id, out);
                }
                if let Phase::Stable { sync_until } = &mut self.phase {
                    *sync_until = None;
                }
                self.react(now, settings, !silent.is_empty(), out);
            }
            _ => {}
        }
    }

    /// What DescribeGroups says. Metadata and assignments are shown once they are in force.
    pub fn describe(&self) -> Description {
        let stable = matches!(self.phase, Phase::Stable { .. });
        let protocol = if stable { self.protocol.clone().unwrap_or_default() } else { String::new() };
        let member = |(id, m): (&String, &Member)| DescribedMember {
            member_id: id.clone(),
            instance_id: m.instance_id.clone(),
            client_id: m.client_id.clone(),
            client_host: m.client_host.clone(),
            metadata: if stable { m.metadata(&protocol) } else { Bytes::new() },
            assignment: if stable { m.assignment.clone() } else { Bytes::new() },
        };
        Description {
            state: self.state().name(),
            protocol_type: self.protocol_type.clone().unwrap_or_default(),
            members: self.members.iter().map(member).collect(),
            protocol,
        }
    }

    /// The member with this id; with a static name, only if the name is still its own.
    fn member(&mut self, id: &str, instance_id: Option<&str>) -> Result<&mut Member, GroupError> {
        if let Some(instance) = instance_id {
            match self.instances.get(instance) {
                None => return Err(GroupError::UnknownMemberId),
                Some(owner) if owner != id => return Err(GroupError::FencedInstanceId),
                Some(_) => {}
            }
        }
        self.members.get_mut(id).ok_or(GroupError::UnknownMemberId)
    }

    fn remove(&mut self, id: &str, out: &mut Vec<Effect>) {
        let Some(mut member) = self.members.remove(id) else { return };
        if let Some(parked) = member.join.take() {
            out.push(Effect::Joined(parked, Err(GroupError::UnknownMemberId)));
        }
        if let Some(parked) = member.sync.take() {
            out.push(Effect::Synced(parked, Err(GroupError::UnknownMemberId)));
        }
        if let Some(instance) = &member.instance_id {
            self.instances.remove(instance);
        }
        if self.leader.as_deref() == Some(id) {
            self.leader = self.members.keys().next().cloned();
        }
    }

    /// Somebody is gone. A member's going begins a rebalance; that of an id that never became one matters only to a
    /// rebalance that waits for it.
    fn react(&mut self, now: Millis, settings: &GroupSettings, member_gone: bool, out: &mut Vec<Effect>) {
        match self.phase {
            Phase::Empty => {}
            Phase::Stable { .. } | Phase::Completing { .. } if !member_gone => {}
            _ => self.rebalance_or_complete(now, settings, out),
        }
    }

    fn rebalance_or_complete(&mut self, now: Millis, settings: &GroupSettings, out: &mut Vec<Effect>) {
        match self.phase {
            Phase::Preparing { .. } => {}
            Phase::Empty => {
                let delay = settings.initial_rebalance_delay_ms;
                if delay == 0 {
                    return self.complete_join(now, out);
                }
                let remaining = self.rebalance_timeout().saturating_sub(delay);
                let initial = Some(Initial { remaining, newcomer: false });
                self.phase = Phase::Preparing { until: now.saturating_add(delay), initial };
            }
            Phase::Completing { .. } | Phase::Stable { .. } => {
                for member in self.members.values_mut() {
                    if let Some(parked) = member.sync.take() {
                        member.expires = now.saturating_add(member.session_timeout);
                        out.push(Effect::Synced(parked, Err(GroupError::RebalanceInProgress)));
                    }
                }
                self.phase = Phase::Preparing { until: now.saturating_add(self.rebalance_timeout()), initial: None };
            }
        }
        let Phase::Preparing { initial, .. } = &self.phase else { return };
        let everybody = self.pending.is_empty() && self.members.values().all(|m| m.join.is_some());
        if self.members.is_empty() || (everybody && initial.is_none()) {
            self.complete_join(now, out);
        }
    }

    /// The wait is over: who has not joined is out (static members excepted, they only fall to their session timeout), and
    /// a generation begins with the rest.
    fn complete_join(&mut self, now: Millis, out: &mut Vec<Effect>) {
        let absent = |(id, m): (&String, &Member)| (m.join.is_none() && m.instance_id.is_none()).then(|| id.clone());
        let absent: Vec<String> = self.members.iter().filter_map(absent).collect();
        for id in &absent {
            self.remove(id, out);
        }
        if self.members.is_empty() {
            self.generation = next_generation(self.generation);
            self.protocol = None;
            self.leader = None;
            self.phase = Phase::Empty;
            out.push(Effect::Emptied);
            return;
        }
        let leader_joined =
            self.leader.as_ref().and_then(|id| self.members.get(id)).is_some_and(|leader| leader.join.is_some());
        if !leader_joined {
            let Some(elected) = self.members.iter().find(|(_, m)| m.join.is_some()).map(|(id, _)| id.clone()) else {
                // Only static members that have not come back: wait for them, or for their sessions to end.
                self.phase = Phase::Preparing { until: now.saturating_add(self.rebalance_timeout()), initial: None };
                return;
            };
            self.leader = Some(elected);
        }
        self.generation = next_generation(self.generation);
        self.protocol = self.select_protocol();
        self.phase = Phase::Completing { sync_until: now.saturating_add(self.rebalance_timeout()) };
        let mut answers = Vec::with_capacity(self.members.len());
        for (id, member) in &mut self.members {
            // A static member that is away has nothing to sync: only its session can end it.
            member.synced = member.join.is_none();
            member.assignment = Bytes::new();
            if let Some(ticket) = member.join.take() {
                member.is_new = false;
                member.heard(now);
                answers.push((ticket, id.clone()));
            }
        }
        for (ticket, id) in answers {
            let is_leader = self.leader.as_deref() == Some(&id);
            let members = if is_leader { self.joined_members() } else { Vec::new() };
            out.push(Effect::Joined(ticket, Ok(self.joined(&id, members, false))));
        }
    }

    fn rebalance_timeout(&self) -> Millis {
        self.members.values().map(|m| m.rebalance_timeout).max().unwrap_or(0)
    }

    /// Each member votes for the protocol it likes best of those all members know.
    fn select_protocol(&self) -> Option<String> {
        let mut known: Option<BTreeSet<&str>> = None;
        for member in self.members.values() {
            let names: BTreeSet<&str> = member.protocols.iter().map(|(name, _)| name.as_str()).collect();
            known = Some(match known {
                None => names,
                Some(known) => known.intersection(&names).copied().collect(),
            });
        }
        let known = known?;
        let mut votes: BTreeMap<&str, usize> = BTreeMap::new();
        for member in self.members.values() {
            if let Some((name, _)) = member.protocols.iter().find(|(name, _)| known.contains(name.as_str())) {
                *votes.entry(name).or_default() += 1;
            }
        }
        votes.into_iter().rev().max_by_key(|(_, votes)| *votes).map(|(name, _)| name.to_owned())
    }

    fn joined(&self, id: &str, members: Vec<JoinedMember>, skip_assignment: bool) -> Joined {
        Joined {
            generation: self.generation,
            protocol_type: self.protocol_type.clone().unwrap_or_default(),
            protocol: self.protocol.clone().unwrap_or_default(),
            leader: self.leader.clone().unwrap_or_default(),
            member_id: id.to_owned(),
            skip_assignment,
            members,
        }
    }

    fn joined_members(&self) -> Vec<JoinedMember> {
        let protocol = self.protocol.as_deref().unwrap_or_default();
        let member = |(id, m): (&String, &Member)| JoinedMember {
            member_id: id.clone(),
            instance_id: m.instance_id.clone(),
            metadata: m.metadata(protocol),
        };
        self.members.iter().map(member).collect()
    }
}

fn session_timeout(request: &JoinRequest) -> Millis {
    Millis::try_from(request.session_timeout_ms).unwrap_or(0)
}

fn rebalance_timeout(request: &JoinRequest) -> Millis {
    // v0 has no such field, and there the session timeout stands for it.
    Millis::try_from(request.rebalance_timeout_ms).unwrap_or_else(|_| session_timeout(request))
}

fn protocols_bytes(protocols: &[(String, Bytes)]) -> usize {
    protocols.iter().map(|(name, metadata)| name.len() + metadata.len()).sum()
}

fn check_assignments(settings: &GroupSettings, assignments: &[(String, Bytes)]) -> Result<(), GroupError> {
    match assignments.iter().map(|(_, a)| a.len()).find(|len| *len > settings.member_bytes_max) {
        Some(found) => {
            let max = settings.member_bytes_max;
            Err(GroupError::Bound(format!("an assignment of {found} bytes is more than {max}")))
        }
        None => Ok(()),
    }
}

fn next_generation(generation: i32) -> i32 {
    generation.checked_add(1).unwrap_or(1)
}
