//! Groups with a virtual clock; then the waiting and the durable part over a state log in memory.

use bytes::Bytes;
use proptest::prelude::*;
use shared::log::AppendError;
use shared::name::TopicId;

use super::*;
use crate::state::GroupChange;
use crate::state::memory::MemoryStateLog;

const GROUP: &str = "readers";

/// A coordinator, a clock, and the answers that came.
struct World {
    coordinator: Coordinator,
    now: u64,
    tickets: u64,
    ids: u64,
    joins: BTreeMap<Ticket, Result<Joined, GroupError>>,
    syncs: BTreeMap<Ticket, Result<Synced, GroupError>>,
    populated: i32,
}

fn settings() -> GroupSettings {
    GroupSettings { initial_rebalance_delay_ms: 0, members_max: 8, ..GroupSettings::default() }
}

fn request(protocols: &[&str]) -> JoinRequest {
    JoinRequest {
        client_id: "app".into(),
        client_host: "/127.0.0.1".into(),
        session_timeout_ms: 10_000,
        rebalance_timeout_ms: 60_000,
        protocol_type: "consumer".into(),
        protocols: protocols.iter().map(|p| ((*p).to_owned(), Bytes::from(format!("meta-{p}")))).collect(),
        ..JoinRequest::default()
    }
}

fn known(id: &str) -> JoinRequest {
    JoinRequest { member_id: id.to_owned(), ..request(&["range"]) }
}

fn named(instance: &str) -> JoinRequest {
    JoinRequest { instance_id: Some(instance.to_owned()), ..request(&["range"]) }
}

impl World {
    fn new(settings: GroupSettings) -> Self {
        Self {
            coordinator: Coordinator::new(settings),
            now: 0,
            tickets: 0,
            ids: 0,
            joins: BTreeMap::new(),
            syncs: BTreeMap::new(),
            populated: 0,
        }
    }

    fn take(&mut self, effects: Effects) {
        for (_, effect) in effects {
            match effect {
                Effect::Joined(t, answer) => assert!(self.joins.insert(t, answer).is_none(), "answered twice"),
                Effect::Synced(t, answer) => assert!(self.syncs.insert(t, answer).is_none(), "answered twice"),
                Effect::Populated => self.populated += 1,
                Effect::Emptied => self.populated -= 1,
            }
        }
        assert!((0..=1).contains(&self.populated), "populated and emptied alternate");
    }

    fn join(&mut self, request: JoinRequest) -> Ticket {
        self.tickets += 1;
        self.ids += 1;
        let (ticket, id) = (Ticket(self.tickets), format!("m{}", self.ids));
        let mut out = Vec::new();
        self.coordinator.join(self.now, GROUP, ticket, &id, request, &mut out);
        self.take(out);
        ticket
    }

    fn joined(&self, ticket: Ticket) -> Joined {
        self.joins.get(&ticket).expect("answered").clone().expect("joined")
    }

    fn join_error(&self, ticket: Ticket) -> GroupError {
        self.joins.get(&ticket).expect("answered").clone().expect_err("refused")
    }

    fn sync(&mut self, member: &str, generation: i32, assignments: &[(&str, &str)]) -> Ticket {
        let assignments = assignments.iter().map(|(m, a)| ((*m).to_owned(), Bytes::from((*a).to_owned()))).collect();
        self.sync_as(SyncRequest { member_id: member.into(), generation, assignments, ..SyncRequest::default() })
    }

    fn sync_as(&mut self, request: SyncRequest) -> Ticket {
        self.tickets += 1;
        let ticket = Ticket(self.tickets);
        let mut out = Vec::new();
        self.coordinator.sync(self.now, GROUP, ticket, request, &mut out);
        self.take(out);
        ticket
    }

    fn synced(&self, ticket: Ticket) -> String {
        let assignment = &self.syncs.get(&ticket).expect("answered").as_ref().expect("synced").assignment;
        String::from_utf8(assignment.to_vec()).unwrap()
    }

    fn sync_error(&self, ticket: Ticket) -> GroupError {
        self.syncs.get(&ticket).expect("answered").clone().expect_err("refused")
    }

    fn beat(&mut self, member: &str, generation: i32) -> Result<(), GroupError> {
        self.coordinator.heartbeat(self.now, GROUP, member, None, generation)
    }

    fn commit(&mut self, member: &str, generation: i32) -> Result<(), GroupError> {
        self.coordinator.check_commit(self.now, GROUP, member, None, generation)
    }

    fn leave(&mut self, member: &str, instance: Option<&str>) -> Result<(), GroupError> {
        let mut out = Vec::new();
        let members = [(member.to_owned(), instance.map(str::to_owned))];
        let mut results = self.coordinator.leave(self.now, GROUP, &members, &mut out).unwrap();
        self.take(out);
        results.remove(0)
    }

    fn pass(&mut self, ms: u64) {
        let end = self.now + ms;
        while let Some(deadline) = self.coordinator.deadline().filter(|at| *at <= end) {
            self.now = self.now.max(deadline);
            let mut out = Vec::new();
            self.coordinator.tick(self.now, &mut out);
            self.take(out);
        }
        self.now = end;
    }

    fn state(&self) -> &'static str {
        self.coordinator.get(GROUP).map_or("none", |listed| listed.state)
    }

    /// Two dynamic members in a stable generation, the leader first.
    fn stable_pair(&mut self) -> (Joined, Joined) {
        let first = self.join(request(&["range"]));
        let first = self.joined(first);
        let second = self.join(request(&["range"]));
        let again = self.join(known(&first.member_id));
        let (leader, follower) = (self.joined(again), self.joined(second));
        let waits = self.sync(&follower.member_id, follower.generation, &[]);
        let parts = [(leader.member_id.as_str(), "p0"), (follower.member_id.as_str(), "p1")];
        let leads = self.sync(&leader.member_id, leader.generation, &parts);
        assert_eq!((self.synced(leads), self.synced(waits)), ("p0".into(), "p1".into()));
        assert_eq!(self.state(), "Stable");
        (leader, follower)
    }
}

#[test]
fn a_lone_member_leads_and_gets_what_it_assigned_itself() {
    let mut world = World::new(settings());
    let ticket = world.join(request(&["range", "roundrobin"]));
    let joined = world.joined(ticket);
    assert_eq!((joined.generation, joined.protocol.as_str(), &joined.leader), (1, "range", &joined.member_id));
    assert_eq!(joined.members.len(), 1);
    assert_eq!(joined.members[0].metadata, "meta-range");
    assert_eq!(world.state(), "CompletingRebalance");
    let synced = world.sync(&joined.member_id, 1, &[(&joined.member_id, "all")]);
    assert_eq!(world.synced(synced), "all");
    assert_eq!(world.beat(&joined.member_id, 1), Ok(()));
}

#[test]
fn a_member_that_knows_the_two_steps_is_first_given_an_id() {
    let mut world = World::new(settings());
    let first = world.join(JoinRequest { two_steps: true, ..request(&["range"]) });
    let GroupError::MemberIdRequired(id) = world.join_error(first) else { panic!("an id") };
    assert_eq!(world.state(), "none", "an id alone makes no group");
    let second = world.join(JoinRequest { two_steps: true, ..known(&id) });
    assert_eq!(world.joined(second).member_id, id);

    let lapsed = world.join(JoinRequest { two_steps: true, ..request(&["range"]) });
    let GroupError::MemberIdRequired(lapsed) = world.join_error(lapsed) else { panic!("an id") };
    world.pass(10_001);
    let late = world.join(known(&lapsed));
    assert_eq!(world.join_error(late), GroupError::UnknownMemberId);
}

#[test]
fn the_first_rebalance_waits_for_others_and_no_longer_than_their_rebalance_timeout() {
    let mut world = World::new(GroupSettings { initial_rebalance_delay_ms: 3_000, ..settings() });
    let first = world.join(request(&["range"]));
    world.pass(2_999);
    let second = world.join(request(&["range"]));
    world.pass(2_999);
    assert!(world.joins.is_empty(), "a newcomer draws the wait out");
    world.pass(10);
    assert_eq!(world.joined(first).generation, 1);
    assert_eq!(world.joined(second).generation, 1);
    assert_eq!(world.joined(first).members.len() + world.joined(second).members.len(), 2);

    let mut crowd = World::new(GroupSettings { initial_rebalance_delay_ms: 3_000, members_max: 100, ..settings() });
    let first = crowd.join(request(&["range"]));
    for _ in 0..60 {
        crowd.pass(2_000);
        crowd.join(request(&["range"]));
        if crowd.joins.contains_key(&first) {
            assert!(crowd.now <= 61_000);
            return;
        }
    }
    panic!("the wait never ended");
}

#[test]
fn a_second_member_makes_the_first_join_again() {
    let mut world = World::new(settings());
    let (leader, follower) = world.stable_pair();
    assert_eq!(leader.generation, 2);
    assert_eq!(follower.members, vec![], "only the leader is told of the others");
    assert_eq!(leader.members.len(), 2);
    let third = world.join(request(&["range"]));
    assert_eq!(world.state(), "PreparingRebalance");
    assert_eq!(world.beat(&leader.member_id, 2), Err(GroupError::RebalanceInProgress));
    assert_eq!(world.commit(&leader.member_id, 2), Ok(()), "work done so far still counts");
    let late = world.sync(&follower.member_id, 2, &[]);
    assert_eq!(world.sync_error(late), GroupError::RebalanceInProgress);
    world.join(known(&leader.member_id));
    world.join(known(&follower.member_id));
    assert_eq!(world.joined(third).generation, 3);
    assert_eq!(world.commit(&leader.member_id, 3), Err(GroupError::RebalanceInProgress));
    assert_eq!(world.commit(&leader.member_id, 2), Err(GroupError::IllegalGeneration));
    assert_eq!(world.beat(&leader.member_id, 3), Ok(()), "a beat while the leader assigns is good");
}

#[test]
fn generations_members_and_instances_are_told_apart() {
    let mut world = World::new(settings());
    assert_eq!(world.beat("x", 1), Err(GroupError::UnknownMemberId));
    assert_eq!(world.commit("x", 1), Err(GroupError::IllegalGeneration));
    assert_eq!(world.commit("", -1), Ok(()), "a simple commit to a group that is not there");
    let (leader, _) = world.stable_pair();
    assert_eq!(world.beat("x", 2), Err(GroupError::UnknownMemberId));
    assert_eq!(world.beat(&leader.member_id, 1), Err(GroupError::IllegalGeneration));
    assert_eq!(world.beat(&leader.member_id, 3), Err(GroupError::IllegalGeneration));
    assert_eq!(world.commit("", -1), Err(GroupError::UnknownMemberId), "members alone commit while there are any");
    assert_eq!(world.commit(&leader.member_id, -1), Err(GroupError::IllegalGeneration));
    assert_eq!(world.commit("x", 2), Err(GroupError::UnknownMemberId));
    assert_eq!(world.commit(&leader.member_id, 2), Ok(()));
    let unknown = world.sync("x", 2, &[]);
    assert_eq!(world.sync_error(unknown), GroupError::UnknownMemberId);
    let old = world.sync(&leader.member_id, 1, &[]);
    assert_eq!(world.sync_error(old), GroupError::IllegalGeneration);
    let other = SyncRequest { member_id: leader.member_id.clone(), generation: 2, ..SyncRequest::default() };
    let type_differs = world.sync_as(SyncRequest { protocol_type: Some("connect".into()), ..other.clone() });
    assert_eq!(world.sync_error(type_differs), GroupError::InconsistentGroupProtocol);
    let name_differs = world.sync_as(SyncRequest { protocol: Some("sticky".into()), ..other.clone() });
    assert_eq!(world.sync_error(name_differs), GroupError::InconsistentGroupProtocol);
    let again = world.sync_as(SyncRequest { protocol: Some("range".into()), ..other });
    assert_eq!(world.synced(again), "p0", "asked again, said again");
    let guessed = world.join(known("guessed"));
    assert_eq!(world.join_error(guessed), GroupError::UnknownMemberId);
}

#[test]
fn the_protocol_is_one_that_all_members_know() {
    let mut world = World::new(settings());
    let first = world.join(request(&["sticky", "range"]));
    let id = world.joined(first).member_id;
    let stranger = world.join(request(&["cooperative"]));
    assert_eq!(world.join_error(stranger), GroupError::InconsistentGroupProtocol);
    let connect = world.join(JoinRequest { protocol_type: "connect".into(), ..request(&["range"]) });
    assert_eq!(world.join_error(connect), GroupError::InconsistentGroupProtocol);
    let nothing = world.join(request(&[]));
    assert_eq!(world.join_error(nothing), GroupError::InconsistentGroupProtocol);
    let second = world.join(request(&["range", "sticky"]));
    let third = world.join(request(&["range", "cooperative"]));
    world.join(JoinRequest { member_id: id, ..request(&["sticky", "range"]) });
    assert_eq!(world.joined(second).protocol, "range");
    assert_eq!(world.joined(third).protocol_type, "consumer");
}

#[test]
fn a_member_that_stays_silent_is_out_and_the_others_rebalance() {
    let mut world = World::new(settings());
    let (leader, follower) = world.stable_pair();
    world.pass(9_000);
    assert_eq!(world.beat(&follower.member_id, 2), Ok(()));
    world.pass(2_000);
    assert_eq!(world.state(), "PreparingRebalance");
    assert_eq!(world.beat(&leader.member_id, 2), Err(GroupError::UnknownMemberId));
    let again = world.join(known(&follower.member_id));
    let joined = world.joined(again);
    assert_eq!((joined.leader, joined.members.len()), (follower.member_id, 1));
    world.pass(60_000);
    assert_eq!(world.state(), "Empty");
    assert_eq!(world.populated, 0);
}

#[test]
fn a_member_that_does_not_rejoin_in_the_rebalance_timeout_is_out() {
    let mut world = World::new(settings());
    let (leader, follower) = world.stable_pair();
    let third = world.join(request(&["range"]));
    world.join(known(&leader.member_id));
    for _ in 0..61 {
        world.pass(1_000);
        let _ = world.beat(&follower.member_id, 2);
    }
    assert_eq!(world.joined(third).generation, 3);
    assert_eq!(world.beat(&follower.member_id, 2), Err(GroupError::UnknownMemberId));
}

#[test]
fn a_leader_that_never_assigns_is_out_and_followers_are_told_to_join_again() {
    let mut world = World::new(settings());
    let first = world.join(request(&["range"]));
    let leader = world.joined(first).member_id;
    let second = world.join(request(&["range"]));
    world.join(known(&leader));
    let follower = world.joined(second).member_id;
    let waits = world.sync(&follower, 2, &[]);
    world.pass(10_001);
    assert_eq!(world.sync_error(waits), GroupError::RebalanceInProgress, "the leader's session ended");
    let again = world.join(known(&follower));
    assert_eq!(world.joined(again).leader, follower);
}

#[test]
fn a_member_that_beats_but_never_syncs_is_out() {
    let mut world = World::new(settings());
    let first = world.join(request(&["range"]));
    let leader = world.joined(first).member_id;
    let second = world.join(request(&["range"]));
    world.join(known(&leader));
    let silent = world.joined(second).member_id;
    world.sync(&leader, 2, &[(&leader, "all")]);
    for _ in 0..70 {
        world.pass(1_000);
        let _ = world.beat(&leader, 2);
        let _ = world.beat(&silent, 2);
    }
    assert_eq!(world.beat(&silent, 2), Err(GroupError::UnknownMemberId));
}

#[test]
fn leaving_rebalances_at_once_and_the_last_one_empties_the_group() {
    let mut world = World::new(settings());
    let (leader, follower) = world.stable_pair();
    assert_eq!(world.leave("x", None), Err(GroupError::UnknownMemberId));
    assert_eq!(world.leave(&leader.member_id, None), Ok(()));
    assert_eq!(world.beat(&follower.member_id, 2), Err(GroupError::RebalanceInProgress));
    let again = world.join(known(&follower.member_id));
    assert_eq!(world.joined(again).generation, 3);
    assert_eq!(world.leave(&follower.member_id, None), Ok(()));
    assert_eq!(world.state(), "Empty");
    assert_eq!(world.coordinator.delete(GROUP), Ok(()));
    assert_eq!(world.coordinator.delete(GROUP), Err(GroupError::GroupIdNotFound));
}

#[test]
fn a_leader_that_joins_again_causes_a_rebalance_and_a_follower_does_not() {
    let mut world = World::new(settings());
    let (leader, follower) = world.stable_pair();
    let same = world.join(known(&follower.member_id));
    assert_eq!(world.joined(same).generation, 2);
    assert_eq!(world.state(), "Stable");
    let changed =
        JoinRequest { protocols: vec![("range".into(), "other topics".into())], ..known(&follower.member_id) };
    world.join(changed);
    assert_eq!(world.state(), "PreparingRebalance", "other metadata needs another assignment");
    world.join(known(&leader.member_id));
    world.sync(&leader.member_id, 3, &[]);
    world.join(known(&leader.member_id));
    assert_eq!(world.state(), "PreparingRebalance");
    assert_eq!(world.coordinator.delete(GROUP), Err(GroupError::NonEmptyGroup));
}

#[test]
fn a_static_member_comes_back_without_a_rebalance_and_its_old_self_is_fenced() {
    let mut world = World::new(settings());
    let first = world.join(named("a"));
    let a = world.joined(first).member_id;
    let second = world.join(named("b"));
    world.join(JoinRequest { member_id: a.clone(), ..named("a") });
    let b = world.joined(second).member_id;
    world.sync(&a, 2, &[(&a, "p0"), (&b, "p1")]);
    let synced = world.sync(&b, 2, &[]);
    assert_eq!(world.synced(synced), "p1");

    let again = world.join(named("b"));
    let b2 = world.joined(again);
    assert_eq!((b2.generation, world.state()), (2, "Stable"));
    assert_ne!(b2.member_id, b);
    let synced = world.sync(&b2.member_id, 2, &[]);
    assert_eq!(world.synced(synced), "p1", "it has its old part");
    let now = world.now;
    let beat =
        |world: &mut World, id: &str, instance: &str| world.coordinator.heartbeat(now, GROUP, id, Some(instance), 2);
    assert_eq!(beat(&mut world, &b, "b"), Err(GroupError::FencedInstanceId));
    assert_eq!(beat(&mut world, &b2.member_id, "b"), Ok(()));
    assert_eq!(beat(&mut world, &b2.member_id, "c"), Err(GroupError::UnknownMemberId));
    let fenced = world.join(JoinRequest { member_id: b, ..named("b") });
    assert_eq!(world.join_error(fenced), GroupError::FencedInstanceId);

    // The leader too: told to leave the assignment alone if it understands that, and of its old self if it does not.
    let again = world.join(JoinRequest { may_skip_assignment: true, ..named("a") });
    let a2 = world.joined(again);
    assert!(a2.skip_assignment && a2.leader == a2.member_id && a2.members.len() == 2);
    let again = world.join(named("a"));
    let a3 = world.joined(again);
    assert!(!a3.skip_assignment && a3.leader == a2.member_id && a3.members.is_empty());

    assert_eq!(world.leave("", Some("b")), Ok(()), "an administrator names the instance alone");
    assert_eq!(world.state(), "PreparingRebalance");
    assert_eq!(world.leave("", Some("b")), Err(GroupError::UnknownMemberId));
}

#[test]
fn a_static_member_that_is_away_keeps_its_place_until_its_session_ends() {
    let mut world = World::new(settings());
    let long = |instance: &str| JoinRequest { session_timeout_ms: 300_000, ..named(instance) };
    let first = world.join(long("a"));
    let a = world.joined(first).member_id;
    let second = world.join(long("b"));
    world.pass(60_001);
    let b = world.joined(second);
    assert_eq!((b.generation, b.leader == b.member_id), (2, true), "a did not come back, so b leads");
    assert_eq!(b.members.len(), 2, "and a still has a place");
    world.sync(&b.member_id, 2, &[(&a, "p0"), (&b.member_id, "p1")]);
    world.pass(100_000);
    let again = world.join(long("a"));
    let a2 = world.joined(again).member_id;
    let synced = world.sync(&a2, 2, &[]);
    assert_eq!(world.synced(synced), "p0");
}

#[test]
fn a_fenced_static_member_does_not_wait_for_ever() {
    let mut world = World::new(settings());
    let (leader, _) = world.stable_pair();
    let parked = world.join(named("s"));
    let newer = world.join(named("s"));
    assert_eq!(world.join_error(parked), GroupError::FencedInstanceId);
    assert!(!world.joins.contains_key(&newer), "the rebalance goes on with the newer one");
    assert_eq!(world.beat(&leader.member_id, 2), Err(GroupError::RebalanceInProgress));
}

#[test]
fn a_newcomer_whose_client_has_gone_does_not_stay() {
    let mut world = World::new(settings());
    let patient = |member_id: String| JoinRequest {
        session_timeout_ms: 1_000_000,
        rebalance_timeout_ms: 1_000_000,
        member_id,
        ..request(&["range"])
    };
    let first = world.join(patient(String::new()));
    let first = world.joined(first).member_id;
    let newcomer = world.join(patient(String::new()));
    world.pass(299_999);
    assert!(!world.joins.contains_key(&newcomer), "the first member has time to join again");
    world.pass(1);
    assert_eq!(world.join_error(newcomer), GroupError::UnknownMemberId);
    let again = world.join(patient(first));
    assert_eq!(world.joined(again).members.len(), 1);
}

#[test]
fn a_rebalance_waits_for_ids_that_were_given_out_and_an_empty_group_does_not() {
    let mut world = World::new(settings());
    let first = world.join(request(&["range"]));
    let first = world.joined(first).member_id;
    let given = world.join(JoinRequest { two_steps: true, ..request(&["range"]) });
    let GroupError::MemberIdRequired(given) = world.join_error(given) else { panic!("an id") };
    assert_eq!(world.beat(&first, 1), Ok(()), "an id alone disturbs nobody");
    let third = world.join(request(&["range"]));
    let again = world.join(known(&first));
    assert!(!world.joins.contains_key(&again), "the id may yet be used");
    world.join(known(&given));
    assert_eq!(world.joined(again).members.len(), 3);
    let third = world.joined(third).member_id;

    world.join(JoinRequest { two_steps: true, ..request(&["range"]) });
    for member in [first, given, third] {
        world.leave(&member, None).unwrap();
    }
    assert_eq!(world.state(), "Empty");
}

#[test]
fn bounds_refuse_and_say_so() {
    let mut world = World::new(settings());
    for _ in 0..8 {
        world.join(JoinRequest { two_steps: true, ..request(&["range"]) });
    }
    let ninth = world.join(request(&["range"]));
    assert_eq!(world.join_error(ninth), GroupError::GroupMaxSizeReached(8));
    let short = world.join(JoinRequest { session_timeout_ms: 5_999, ..request(&["range"]) });
    assert!(matches!(world.join_error(short), GroupError::InvalidSessionTimeout { .. }));
    let mut small = World::new(GroupSettings { member_bytes_max: 20, bytes_max: 60, groups_max: 1, ..settings() });
    let big = JoinRequest { protocols: vec![("range".into(), vec![0; 21].into())], ..request(&[]) };
    let big = small.join(big);
    assert!(matches!(small.join_error(big), GroupError::Bound(_)));
    small.join(request(&["range"]));
    let full = small.join(request(&["range", "sticky", "more", "more still"]));
    assert!(matches!(small.join_error(full), GroupError::Bound(_)));
    let mut out = Vec::new();
    small.coordinator.join(0, "another", Ticket(99), "x", request(&[]), &mut out);
    assert!(matches!(&out[..], [(_, Effect::Joined(_, Err(GroupError::Bound(_))))]), "{out:?}");
    out.clear();
    small.coordinator.join(0, "", Ticket(100), "x", request(&["range"]), &mut out);
    assert_eq!(out, vec![(String::new(), Effect::Joined(Ticket(100), Err(GroupError::InvalidGroupId)))]);
}

#[test]
fn an_empty_group_is_forgotten_after_a_while_and_makes_room_when_needed() {
    let mut world = World::new(GroupSettings { groups_max: 1, ..settings() });
    let first = world.join(request(&["range"]));
    let id = world.joined(first).member_id;
    world.leave(&id, None).unwrap();
    let mut out = Vec::new();
    world.coordinator.join(world.now, "another", Ticket(77), "x", request(&["range"]), &mut out);
    assert!(matches!(&out[..], [(_, Effect::Populated), (_, Effect::Joined(_, Ok(_)))]), "{out:?}");
    assert_eq!(world.state(), "none");
    let mut world = World::new(settings());
    let first = world.join(request(&["range"]));
    let id = world.joined(first).member_id;
    world.leave(&id, None).unwrap();
    assert_eq!(world.state(), "Empty");
    world.pass(600_001);
    assert_eq!((world.state(), world.coordinator.counts()), ("none", (0, 0, 0)));
}

#[test]
fn a_description_shows_metadata_and_assignments_once_stable() {
    let mut world = World::new(settings());
    let (leader, _) = world.stable_pair();
    let described = world.coordinator.describe(GROUP).unwrap();
    assert_eq!((described.state, described.protocol.as_str()), ("Stable", "range"));
    let member = described.members.iter().find(|m| m.member_id == leader.member_id).unwrap();
    assert_eq!((&member.metadata[..], &member.assignment[..]), (&b"meta-range"[..], &b"p0"[..]));
    world.join(request(&["range"]));
    let described = world.coordinator.describe(GROUP).unwrap();
    assert_eq!((described.state, described.protocol.as_str()), ("PreparingRebalance", ""));
    assert!(described.members.iter().all(|m| m.metadata.is_empty() && m.assignment.is_empty()));
}

#[derive(Debug, Clone)]
enum Step {
    Join { two_steps: bool, instance: Option<u8>, protocols: u8 },
    JoinAgain { which: usize, protocols: u8 },
    Sync { which: usize },
    Beat { which: usize },
    Commit { which: usize },
    Leave { which: usize },
    Pass { ms: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (any::<bool>(), proptest::option::of(0..3u8), 1..4u8)
            .prop_map(|(two_steps, instance, protocols)| Step::Join { two_steps, instance, protocols }),
        4 => (any::<usize>(), 1..4u8).prop_map(|(which, protocols)| Step::JoinAgain { which, protocols }),
        5 => any::<usize>().prop_map(|which| Step::Sync { which }),
        3 => any::<usize>().prop_map(|which| Step::Beat { which }),
        1 => any::<usize>().prop_map(|which| Step::Commit { which }),
        1 => any::<usize>().prop_map(|which| Step::Leave { which }),
        3 => prop_oneof![0..2_000u64, 0..70_000u64].prop_map(|ms| Step::Pass { ms }),
    ]
}

fn protocols(bits: u8) -> Vec<&'static str> {
    [(1, "range"), (2, "sticky")].iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| *name).collect()
}

/// Whatever members do and in whatever order: nobody is answered twice (checked by `World`), nobody waits for ever, all
/// members of a generation hear the same, and what is assigned reaches whom it is for.
fn check_any_history(steps: Vec<Step>, delay: u64) {
    let mut world = World::new(GroupSettings { initial_rebalance_delay_ms: delay, ..settings() });
    let mut seen: Vec<(String, Option<String>, i32)> = Vec::new();
    let mut asked: BTreeSet<Ticket> = BTreeSet::new();
    let mut syncs: BTreeMap<Ticket, (String, i32)> = BTreeMap::new();
    let mut heard: BTreeMap<i32, (String, String)> = BTreeMap::new();
    let mut read: BTreeSet<Ticket> = BTreeSet::new();
    for step in steps {
        let pick = |which: usize| seen.get(which % seen.len().max(1)).cloned();
        match step {
            Step::Join { two_steps, instance, protocols: bits } => {
                let instance_id = instance.map(|i| format!("i{i}"));
                asked.insert(world.join(JoinRequest { two_steps, instance_id, ..request(&protocols(bits)) }));
            }
            Step::JoinAgain { which, protocols: bits } => {
                let Some((member_id, instance_id, _)) = pick(which) else { continue };
                asked.insert(world.join(JoinRequest { member_id, instance_id, ..request(&protocols(bits)) }));
            }
            Step::Sync { which } => {
                let Some((member_id, instance_id, generation)) = pick(which) else { continue };
                let to = |(id, ..): &(String, Option<String>, i32)| (id.clone(), format!("{id}@{generation}").into());
                let assignments = seen.iter().map(to).collect();
                syncs.insert(
                    world.sync_as(SyncRequest {
                        member_id: member_id.clone(),
                        instance_id,
                        generation,
                        assignments,
                        ..SyncRequest::default()
                    }),
                    (member_id, generation),
                );
            }
            Step::Beat { which } => {
                let Some((id, instance, generation)) = pick(which) else { continue };
                let _ = world.coordinator.heartbeat(world.now, GROUP, &id, instance.as_deref(), generation);
            }
            Step::Commit { which } => {
                let Some((id, instance, generation)) = pick(which) else { continue };
                let _ = world.coordinator.check_commit(world.now, GROUP, &id, instance.as_deref(), generation);
            }
            Step::Leave { which } => {
                let Some((id, instance, _)) = pick(which) else { continue };
                let _ = world.leave(&id, instance.as_deref());
            }
            Step::Pass { ms } => world.pass(ms),
        }
        for (ticket, answer) in &world.joins {
            if !read.insert(*ticket) {
                continue;
            }
            match answer {
                Ok(joined) => {
                    let said = (joined.protocol.clone(), joined.protocol_type.clone());
                    assert_eq!(heard.entry(joined.generation).or_insert_with(|| said.clone()), &said);
                    if !joined.members.is_empty() {
                        assert_eq!(joined.leader, joined.member_id);
                        assert!(joined.members.iter().all(|m| m.metadata == format!("meta-{}", joined.protocol)));
                    }
                    let instance = joined.members.iter().find(|m| m.member_id == joined.member_id);
                    let instance = instance.and_then(|m| m.instance_id.clone());
                    seen.push((joined.member_id.clone(), instance, joined.generation));
                }
                Err(GroupError::MemberIdRequired(id)) => seen.push((id.clone(), None, -1)),
                Err(_) => {}
            }
        }
        if seen.len() > 12 {
            seen.remove(0);
        }
        let (_, members, bytes) = world.coordinator.counts();
        assert!(members <= 8);
        assert!(bytes < 10_000);
    }
    world.pass(10_000_000);
    assert_eq!(world.state(), "none", "without anybody the group ends");
    assert_eq!(world.coordinator.counts(), (0, 0, 0));
    assert!(world.coordinator.deadline().is_none());
    assert!(asked.iter().all(|ticket| world.joins.contains_key(ticket)), "nobody waits for ever");
    assert!(syncs.keys().all(|ticket| world.syncs.contains_key(ticket)), "nobody waits for ever");
    for (ticket, answer) in &world.syncs {
        let (member, generation) = &syncs[ticket];
        if let Ok(synced) = answer
            && !synced.assignment.is_empty()
        {
            let wanted = format!("{member}@{generation}");
            let is_own =
                synced.assignment == wanted || synced.assignment.ends_with(format!("@{generation}").as_bytes());
            assert!(is_own, "{:?} for {wanted}", synced.assignment);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]
    #[test]
    fn any_history_leaves_nobody_waiting(steps in proptest::collection::vec(step(), 1..120), delayed in any::<bool>()) {
        check_any_history(steps, if delayed { 3_000 } else { 0 });
    }
}

fn partition(index: u32) -> Partition {
    Partition { topic: TopicId([7; 16]), index }
}

fn commit(index: u32, offset: i64) -> Vec<OffsetCommit> {
    vec![OffsetCommit { partition: partition(index), offset, leader_epoch: 3, metadata: "here".into() }]
}

fn committed(log: &MemoryStateLog, group: &str, index: u32) -> Option<(i64, String)> {
    read_state(log, |state| state.committed(group, partition(index)).map(|c| (c.offset, c.metadata.clone())))
}

#[tokio::test]
async fn a_commit_is_answered_when_it_is_durable_and_not_otherwise() {
    let log = Arc::new(MemoryStateLog::new());
    let groups = Groups::new(log.clone(), settings());
    groups.commit_offsets("simple", "", None, -1, commit(0, 5)).await.unwrap();
    assert_eq!(committed(&log, "simple", 0), Some((5, "here".into())));
    log.refuse(Some(AppendError::Storage("disk gone".into())));
    let refused = groups.commit_offsets("simple", "", None, -1, commit(0, 6)).await;
    assert!(matches!(refused, Err(GroupError::NotStored(_))), "{refused:?}");
    assert_eq!(committed(&log, "simple", 0), Some((5, "here".into())));
    log.refuse(None);
    assert_eq!(groups.list().get("simple").map(|l| l.state), Some("Empty"));
    groups.delete_offsets("simple", BTreeSet::from([partition(0)])).await.unwrap();
    assert_eq!(committed(&log, "simple", 0), None);
    groups.delete("simple").await.unwrap();
    assert_eq!(groups.delete("simple").await, Err(GroupError::GroupIdNotFound));
    assert_eq!(groups.delete_offsets("simple", BTreeSet::new()).await, Err(GroupError::GroupIdNotFound));
    assert!(groups.list().is_empty());
}

#[tokio::test]
async fn members_wait_for_each_other_and_their_group_outlives_them() {
    let log = Arc::new(MemoryStateLog::new());
    let groups = Groups::new(log.clone(), GroupSettings { initial_rebalance_delay_ms: 20, ..settings() });
    let (one, two) = tokio::join!(groups.join("g", request(&["range"])), groups.join("g", request(&["range"])));
    let (one, two) = (one.unwrap(), two.unwrap());
    let (leader, follower) = if one.members.is_empty() { (two, one) } else { (one, two) };
    let sync = |joined: &Joined, assignments| SyncRequest {
        member_id: joined.member_id.clone(),
        generation: joined.generation,
        assignments,
        ..SyncRequest::default()
    };
    let parts = vec![(leader.member_id.clone(), Bytes::from("a")), (follower.member_id.clone(), Bytes::from("b"))];
    let (f, l) = tokio::join!(groups.sync("g", sync(&follower, vec![])), groups.sync("g", sync(&leader, parts)));
    assert_eq!((&f.unwrap().assignment[..], &l.unwrap().assignment[..]), (&b"b"[..], &b"a"[..]));
    assert_eq!(groups.status().members, 2);

    let week = 7 * 24 * 3600 * 1000;
    groups.commit_offsets("g", &leader.member_id, None, 1, commit(1, 9)).await.unwrap();
    let durable = |log: &MemoryStateLog| {
        read_state(log, |s| s.group("g").map(|g| (g.protocol_type.clone(), g.empty_since_ms.is_some())))
    };
    assert_eq!(durable(&log), Some(("consumer".into(), false)));
    assert_eq!(groups.delete("g").await, Err(GroupError::NonEmptyGroup));
    assert_eq!(groups.delete_offsets("g", BTreeSet::from([partition(1)])).await, Err(GroupError::SubscribedToTopic));
    log.set_now(100 * week);
    assert_eq!(groups.expire().await, 0, "nothing expires while there are members");

    let both = [(leader.member_id, None), (follower.member_id, None)];
    groups.leave("g", &both).unwrap();
    assert_eq!(durable(&log), Some(("consumer".into(), true)));

    // Another life of the broker: the members are gone, the offsets are not, and the group says so.
    drop(groups);
    let groups = Groups::new(log.clone(), settings());
    assert_eq!(groups.describe("g").map(|d| (d.state, d.protocol_type)), Some(("Empty", "consumer".into())));
    assert_eq!(groups.heartbeat("g", &both[0].0, None, 1), Err(GroupError::UnknownMemberId));
    let stale = groups.commit_offsets("g", &both[0].0, None, 1, commit(1, 10)).await;
    assert_eq!(stale, Err(GroupError::IllegalGeneration));
    log.set_now(101 * week - 60_000);
    assert_eq!(groups.expire().await, 0);
    assert_eq!(committed(&log, "g", 1), Some((9, "here".into())));
    log.set_now(101 * week + 60_000);
    assert_eq!(groups.expire().await, 2, "the offset and the group");
    assert!(groups.list().is_empty());
}

#[tokio::test]
async fn offsets_and_groups_are_bounded() {
    let log = Arc::new(MemoryStateLog::new());
    let groups = Groups::new(log.clone(), GroupSettings { groups_max: 1, group_offsets_max: 1, ..settings() });
    groups.commit_offsets("a", "", None, -1, commit(0, 1)).await.unwrap();
    groups.commit_offsets("a", "", None, -1, commit(0, 2)).await.unwrap();
    let twice = [commit(0, 3), commit(0, 4)].concat();
    groups.commit_offsets("a", "", None, -1, twice).await.unwrap();
    let written = log.commits().pop().unwrap();
    assert_eq!((written.len(), committed(&log, "a", 0)), (1, Some((4, "here".into()))), "the last one counts");
    assert!(matches!(groups.commit_offsets("a", "", None, -1, commit(1, 1)).await, Err(GroupError::Bound(_))));
    let long = "x".repeat(GROUP_ID_BYTES_MAX + 1);
    assert_eq!(groups.commit_offsets(&long, "", None, -1, commit(0, 1)).await, Err(GroupError::InvalidGroupId));
    assert!(matches!(groups.commit_offsets("b", "", None, -1, commit(0, 1)).await, Err(GroupError::Bound(_))));
}

#[tokio::test]
async fn retention_begins_when_the_group_is_empty_and_after_each_commit() {
    let day = 24 * 3600 * 1000;
    let now = 100 * day;
    let committed = |commit_ms| CommittedOffset { offset: 1, leader_epoch: -1, metadata: String::new(), commit_ms };
    let touched = |group: &str, empty_since_ms| {
        GroupChange::Touched { group: group.into(), protocol_type: "consumer".into(), empty_since_ms }.into()
    };
    let changes =
        [("emptied late", 1, 99), ("committed late", 99, 1), ("long gone", 1, 2)].map(|(group, commit, empty)| {
            let offset = GroupChange::OffsetCommitted {
                group: group.into(),
                partition: partition(0),
                committed: committed(commit * day),
            }
            .into();
            [touched(group, Some(empty * day)), offset]
        });
    let log = Arc::new(MemoryStateLog::with(&changes.concat()));
    log.set_now(now);
    let groups = Groups::new(log, settings());
    groups.expire().await;
    assert_eq!(groups.list().into_keys().collect::<Vec<_>>(), ["committed late", "emptied late"]);
}

#[tokio::test]
async fn a_commit_mends_what_was_not_noted_when_the_first_member_came() {
    let log = Arc::new(MemoryStateLog::new());
    let groups = Groups::new(log.clone(), settings());
    groups.commit_offsets("g", "", None, -1, commit(0, 1)).await.unwrap();
    log.refuse(Some(AppendError::Full("for a moment".into())));
    let member = groups.join("g", request(&["range"])).await.unwrap();
    log.refuse(None);
    let noted = |log: &MemoryStateLog| read_state(log, |s| s.group("g").and_then(|g| g.empty_since_ms).is_none());
    assert!(!noted(&log));
    let assignments = vec![(member.member_id.clone(), Bytes::new())];
    let sync =
        SyncRequest { member_id: member.member_id.clone(), generation: 1, assignments, ..SyncRequest::default() };
    groups.sync("g", sync).await.unwrap();
    groups.commit_offsets("g", &member.member_id, None, 1, commit(0, 2)).await.unwrap();
    assert!(noted(&log));
}
