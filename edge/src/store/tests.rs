//! The store's promises, on a real file and on doubles.

use std::path::{Path, PathBuf};

use mqtt::store::{PublishProperties, SessionLeft, StoredSubscription};
use shared::clock::ClockReading;
use shared::config::{ByteSize, Span};
use shared::log::conformance::block_on;

use super::*;
use crate::streams::StreamSettings;

mod memory;
mod power;

const CLOCK_MS: TimestampMs = 1_700_000_000_000;

/// A wall clock and a monotonic one that a test sets.
#[derive(Clone)]
struct Hands(Arc<Mutex<ClockReading>>);

impl Hands {
    fn new(wall_ms: TimestampMs) -> Self {
        Self(Arc::new(Mutex::new(ClockReading { wall_ms, at: std::time::Instant::now() })))
    }

    /// Time passes, and the wall clock shows it.
    fn pass(&self, ms: i64) {
        let mut hands = self.0.lock();
        hands.at += Duration::from_millis(ms.unsigned_abs());
        hands.wall_ms += ms;
    }

    /// The wall clock is set.
    fn set(&self, wall_ms: TimestampMs) {
        self.0.lock().wall_ms = wall_ms;
    }

    fn clock(&self) -> Clock {
        let hands = self.0.clone();
        Arc::new(move || *hands.lock())
    }
}

fn settings(dir: &Path) -> StoreSettings {
    let edge = EdgeId::parse("gw-1").unwrap();
    StoreSettings { disk_budget: Some(64 << 20), clock: Hands::new(CLOCK_MS).clock(), ..StoreSettings::new(edge, dir) }
}

fn stream(name: &str, filter: &str) -> StreamSettings {
    StreamSettings { name: name.into(), filters: vec![filter.into()], ..StreamSettings::default() }
}

fn name(text: &str) -> StreamName {
    StreamName::parse(text).unwrap()
}

fn publish<'a>(topic: &'a str, payload: &'a [u8]) -> Publish<'a> {
    let properties = PublishProperties::default();
    Publish { topic, payload, qos: 1, retain: false, packet_id: Some(1), now_ms: CLOCK_MS, properties }
}

const KEPT: SessionRef<'_> = SessionRef { client_id: "dev", kept: true };

fn offer(store: &EdgeStore, publishes: &[Publish<'_>]) -> Vec<Admission> {
    let mut admissions = Vec::new();
    store.publish(&KEPT, publishes, &mut admissions);
    admissions
}

/// Publishes and waits until it is durable.
fn put(store: &EdgeStore, topic: &str, payload: &[u8]) {
    match offer(store, &[publish(topic, payload)])[..] {
        [Admission::Stored(ticket)] => block_on(store.wait(ticket)).unwrap(),
        ref other => panic!("{topic}: {other:?}"),
    }
}

fn values(store: &EdgeStore, stream: &str) -> Vec<Vec<u8>> {
    let first = store.position(&name(stream)).unwrap().first;
    let mut all = Vec::new();
    let mut next = first;
    loop {
        let batches = store.read(&name(stream), next, 100_000).unwrap();
        let Some(last) = batches.last() else { return all };
        next = last.next();
        for stored in &batches {
            all.extend(stored.batch.records(1 << 24).unwrap().map(|r| r.unwrap().value.unwrap().to_vec()));
        }
    }
}

#[test]
fn what_was_acknowledged_is_there_after_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let streams = vec![stream("a", "a/#"), stream("b", "b/#")];
    let store = EdgeStore::open(settings(dir.path()), streams.clone()).unwrap();
    let mut expected = Vec::new();
    for n in 0..50u32 {
        put(&store, "a/1", &n.to_be_bytes());
        expected.push(n.to_be_bytes().to_vec());
        if n % 10 == 0 {
            put(&store, "b/1", &vec![n as u8; 30_000]);
        }
    }
    assert_eq!(offer(&store, &[publish("c", b"")]), [Admission::NotStored]);
    assert_eq!(values(&store, "a"), expected);
    let before = store.position(&name("a")).unwrap();
    assert_eq!((before.first, before.next, before.confirmed), (0, 50, 0));
    assert_eq!(before.oldest_unsent_ms, Some(CLOCK_MS));
    let chain = store.chain_at(&name("a"), 50);
    store.set_confirmed(&name("a"), 20);
    drop(store);

    let store = EdgeStore::open(settings(dir.path()), streams).unwrap();
    assert_eq!(values(&store, "a"), expected);
    assert_eq!(values(&store, "b").len(), 5);
    let after = store.position(&name("a")).unwrap();
    assert_eq!((after.next, after.confirmed, after.incarnation), (50, 20, before.incarnation));
    assert_eq!(after.bytes, before.bytes);
    assert!(after.unsent_bytes > 0 && after.unsent_bytes < after.bytes);
    assert_eq!(store.chain_at(&name("a"), 50), chain);
    put(&store, "a/1", b"more");
    assert_eq!(store.read(&name("a"), 50, 1).unwrap()[0].batch.base_offset(), 50);
}

#[test]
fn the_chain_runs_through_every_row_and_is_known_at_each() {
    let dir = tempfile::tempdir().unwrap();
    let streams = vec![stream("a", "a/#"), stream("b", "b/#")];
    let store = EdgeStore::open(settings(dir.path()), streams.clone()).unwrap();
    // Small ones go through the tail, large ones directly; together they fill rows.
    for n in 0..60usize {
        put(&store, "a/1", &vec![n as u8; if n % 7 == 0 { 20_000 } else { 900 }]);
        put(&store, "b/1", &[n as u8; 100]);
    }
    let check = |store: &EdgeStore| {
        for stream in ["a", "b"] {
            let (mut next, mut chain) = (0, Chain(0));
            loop {
                let batches = store.read(&name(stream), next, 50_000).unwrap();
                if batches.is_empty() {
                    break;
                }
                for stored in batches {
                    assert_eq!(stored.batch.base_offset(), next);
                    assert_eq!(store.chain_at(&name(stream), next), Some(chain));
                    chain = crate::redb_log::chain_after(chain, &stored.batch);
                    assert_eq!(chain, stored.chain);
                    next = stored.next();
                }
            }
            assert_eq!(next, 60);
            assert_eq!(store.chain_at(&name(stream), 60), Some(chain));
            assert_eq!(store.chain_at(&name(stream), 61), None);
        }
    };
    check(&store);
    drop(store);
    check(&EdgeStore::open(settings(dir.path()), streams).unwrap());
}

#[test]
fn sessions_retained_messages_and_packet_ids_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let streams = vec![stream("a", "a/#")];
    let store = EdgeStore::open(settings(dir.path()), streams.clone()).unwrap();
    let subscription = StoredSubscription { filter: "x/#".into(), options: 1, identifier: Some(3) };
    let mut session = StoredSession {
        client_id: "dev".into(),
        user: Some("eve".into()),
        expiry_secs: 60,
        left: Some(SessionLeft { order: 3, wall_ms: CLOCK_MS }),
        ..StoredSession::default()
    };
    store.save_session(&session).unwrap();
    for filter in ["x/#", "gone"] {
        let one = StoredSubscription { filter: filter.into(), ..subscription.clone() };
        store.save_subscription("dev", &one).unwrap();
    }
    store.delete_subscription("dev", "gone");
    let mut exact = publish("a/1", b"x");
    (exact.qos, exact.packet_id) = (2, Some(7));
    let mut second = exact.clone();
    second.packet_id = Some(8);
    offer(&store, &[exact, second]);
    let mut kept = publish("a/r", b"21");
    kept.retain = true;
    kept.properties.content_type = Some("t");
    let mut gone = publish("a/gone", b"1");
    gone.retain = true;
    let mut unrouted = publish("z", b"5");
    unrouted.retain = true;
    let admissions = offer(&store, &[kept, gone.clone(), unrouted]);
    assert!(admissions.iter().all(|one| matches!(one, Admission::Stored(_))), "{admissions:?}");
    gone.payload = b"";
    offer(&store, &[gone]);
    let ticket = store.release("dev", 7);
    block_on(store.wait(ticket)).unwrap();
    drop(store);

    let store = EdgeStore::open(settings(dir.path()), streams).unwrap();
    (session.inbound_packet_ids, session.subscriptions) = (vec![8], vec![subscription]);
    assert_eq!(store.load_sessions().unwrap(), [session]);
    let retained = store.load_retained().unwrap();
    assert_eq!(retained.iter().map(|one| one.topic.as_str()).collect::<Vec<_>>(), ["a/r", "z"]);
    assert_eq!(retained[0].properties_and_payload, b"\x04\x03\x00\x01t21");
    block_on(store.wait(store.delete_session("dev"))).unwrap();
    assert!(store.load_sessions().unwrap().is_empty());
    assert_eq!(values(&store, "a").len(), 5, "an empty retained payload is a record too");
}

#[test]
fn sessions_have_a_bound_in_bytes_and_nobody_elses_puback_waits_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = EdgeStore::open(small(dir.path()), vec![stream("a", "#")]).unwrap();
    let max = store.status().session_bytes_max;
    let (mut taken, mut refused) = (0, 0);
    for client in 0..40 {
        let client = format!("c{client}");
        let session = StoredSession { client_id: client.clone(), expiry_secs: 60, ..StoredSession::default() };
        if store.save_session(&session).is_err() {
            refused += 1;
            continue;
        }
        for n in 0..24 {
            let filter = format!("{n}/{}", "x".repeat(60_000));
            let one = StoredSubscription { filter, options: 0, identifier: None };
            match store.save_subscription(&client, &one) {
                Ok(ticket) => {
                    block_on(store.wait(ticket)).unwrap();
                    taken += 1;
                }
                Err(refusal) => {
                    assert_eq!(refusal, Refusal::QuotaExceeded);
                    refused += 1;
                }
            }
        }
        put(&store, "t", b"an innocent");
    }
    let status = store.status();
    assert!(taken >= 3 && refused > 800, "{taken} taken, {refused} refused");
    assert!(status.session_bytes <= max && max < status.disk_budget_bytes / 8, "{status:?}");
    assert_eq!(status.trouble, None);
    // Those who want little find room all the same.
    let modest: Vec<String> = (0..40).map(|n| format!("small{n}{}", "x".repeat(1000))).collect();
    for client in &modest {
        let session = StoredSession { client_id: client.clone(), expiry_secs: 60, ..StoredSession::default() };
        block_on(store.wait(store.save_session(&session).unwrap())).unwrap();
        let one = StoredSubscription { filter: "a/+/b".into(), options: 0, identifier: None };
        block_on(store.wait(store.save_subscription(client, &one).unwrap())).unwrap();
    }
    for client in &modest {
        store.delete_session(client);
    }
    let status = store.status();
    // Who is known can leave, and come back; and what is deleted makes room.
    let left = Some(SessionLeft { order: 1, wall_ms: CLOCK_MS });
    let known = StoredSession { client_id: "c0".into(), expiry_secs: 60, left, ..StoredSession::default() };
    block_on(store.wait(store.save_session(&known).unwrap())).unwrap();
    drop(store);
    let store = EdgeStore::open(small(dir.path()), vec![stream("a", "#")]).unwrap();
    assert_eq!(store.status().session_bytes, status.session_bytes, "counted the same after a start");
    store.delete_session("c0");
    let new = StoredSession { client_id: "new".into(), expiry_secs: 60, ..StoredSession::default() };
    block_on(store.wait(store.save_session(&new).unwrap())).unwrap();
    assert!(store.status().session_bytes < status.session_bytes);
}

#[test]
fn packet_ids_count_and_are_given_back() {
    let dir = tempfile::tempdir().unwrap();
    let store = EdgeStore::open(settings(dir.path()), vec![stream("a", "#")]).unwrap();
    let dev = StoredSession { client_id: "dev".into(), expiry_secs: 60, ..StoredSession::default() };
    block_on(store.wait(store.save_session(&dev).unwrap())).unwrap();
    let empty = store.status().session_bytes;
    let mut ids = 0..=u16::MAX;
    let refused = ids.find(|id| {
        let mut exact = publish("t", b"x");
        (exact.qos, exact.packet_id) = (2, Some(*id));
        loop {
            match offer(&store, std::slice::from_ref(&exact))[..] {
                [Admission::Stored(_)] => return false,
                [Admission::Refused(Refusal::QuotaExceeded)] => return true,
                [] => block_on(store.room()),
                ref other => panic!("{other:?}"),
            }
        }
    });
    let refused = refused.expect("one client must not fill the database with packet ids");
    assert!(refused > 5_000, "{refused}");
    let released: Vec<_> = (0..refused).map(|id| store.release("dev", id)).collect();
    block_on(store.wait(released[released.len() - 1])).unwrap();
    assert_eq!(store.status().session_bytes, empty);
}

#[test]
fn a_subscribe_writes_its_own_row_and_not_the_session_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = EdgeStore::open(settings(dir.path()), vec![stream("a", "#")]).unwrap();
    let dev = StoredSession { client_id: "dev".into(), expiry_secs: 60, ..StoredSession::default() };
    store.save_session(&dev).unwrap();
    let one = |filter: String| StoredSubscription { filter, options: 0, identifier: None };
    for n in 0..15 {
        let long = one(format!("{n}/{}", "x".repeat(60_000)));
        block_on(store.wait(store.save_subscription("dev", &long).unwrap())).unwrap();
    }
    let before = store.status().written_bytes_total;
    for n in 0..10 {
        block_on(store.wait(store.save_subscription("dev", &one(format!("z/{n}"))).unwrap())).unwrap();
    }
    let each = (store.status().written_bytes_total - before) / 10;
    assert!(each < 200_000, "{each} bytes for each short subscription");
}

#[test]
fn a_clock_that_was_wrong_marks_what_came_meanwhile_and_nothing_after_it() {
    const HOUR: i64 = 3_600_000;
    const DAY: i64 = 24 * HOUR;
    // What the clock shows for a moment, and whether that moment is behind the records before it by more than an hour.
    for (what, wrong) in [
        ("-400 d", CLOCK_MS - 400 * DAY),
        ("-1 d", CLOCK_MS - DAY),
        ("+20 h", CLOCK_MS + 20 * HOUR),
        ("+8 d", CLOCK_MS + 8 * DAY),
        ("+1 y", CLOCK_MS + 365 * DAY),
        ("2099", 4_070_908_800_000),
        ("1970", 0),
    ] {
        for restart in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let streams = vec![stream("a", "#")];
            let mut store = EdgeStore::open(settings(dir.path()), streams.clone()).unwrap();
            let right = [CLOCK_MS + 2, CLOCK_MS + 1, CLOCK_MS + 3];
            for now_ms in [CLOCK_MS, wrong, wrong + 1].into_iter().chain(right) {
                let mut one = publish("t", b"x");
                one.now_ms = now_ms;
                // Two in one batch, and a third in the next: a step back never lies within a batch.
                let ticket = offer(&store, &[one.clone(), one.clone()]);
                let [.., Admission::Stored(ticket)] = ticket[..] else { panic!("refused") };
                block_on(store.wait(ticket)).unwrap();
                if restart {
                    drop(store);
                    store = EdgeStore::open(settings(dir.path()), streams.clone()).unwrap();
                }
            }
            let mut got = Vec::new();
            for stored in store.read(&name("a"), 0, usize::MAX).unwrap() {
                let times: Vec<i64> = stored.batch.records(1 << 20).unwrap().map(|r| r.unwrap().timestamp).collect();
                assert!(times.is_sorted(), "{what}: {times:?}");
                assert_eq!(stored.batch.max_timestamp(), times[times.len() - 1]);
                got.extend(times);
            }
            got.dedup();
            // Small steps back do not show.
            assert_eq!(got, [CLOCK_MS, wrong, wrong + 1, CLOCK_MS + 2, CLOCK_MS + 3], "{what}, restarts: {restart}");
        }
    }
}

#[test]
fn a_step_back_within_one_read_buffer_begins_a_batch() {
    let dir = tempfile::tempdir().unwrap();
    let store = EdgeStore::open(settings(dir.path()), vec![stream("a", "#")]).unwrap();
    let at = |now_ms| Publish { now_ms, ..publish("t", b"x") };
    let admitted = offer(&store, &[at(CLOCK_MS), at(4_070_908_800_000), at(CLOCK_MS + 1), at(CLOCK_MS)]);
    let [.., Admission::Stored(ticket)] = admitted[..] else { panic!("{admitted:?}") };
    block_on(store.wait(ticket)).unwrap();
    let times: Vec<(i64, i64)> = store
        .read(&name("a"), 0, usize::MAX)
        .unwrap()
        .iter()
        .map(|stored| (stored.batch.base_timestamp(), stored.batch.max_timestamp()))
        .collect();
    assert_eq!(times, [(CLOCK_MS, 4_070_908_800_000), (CLOCK_MS + 1, CLOCK_MS + 1)]);
}

#[test]
fn a_commit_waits_for_the_interval_unless_enough_has_come() {
    let dir = tempfile::tempdir().unwrap();
    let slow =
        || StoreSettings { commit_interval: Duration::from_secs(3600), commit_bytes: 20_000, ..settings(dir.path()) };
    let store = EdgeStore::open(slow(), vec![stream("a", "#")]).unwrap();
    put(&store, "t", b"the first begins a commit");
    let small = offer(&store, &[publish("t", b"waits")]);
    let large = vec![0; 20_000];
    let all = [small, offer(&store, &[publish("t", &large)])].concat();
    let [Admission::Stored(waiting), Admission::Stored(enough)] = all[..] else { panic!("{all:?}") };
    assert_eq!(waiting, enough, "no commit came in between");
    block_on(store.wait(enough)).unwrap();
    offer(&store, &[publish("t", b"closing does not wait")]);
    drop(store);
    let store = EdgeStore::open(slow(), vec![stream("a", "#")]).unwrap();
    assert_eq!(values(&store, "a").len(), 4);
}

#[test]
fn retained_messages_and_packet_ids_make_no_long_commit_for_others() {
    /// How many of these one commit takes; others' records go into it all the same.
    fn taken(publish_nth: impl Fn(u16) -> Publish<'static>) -> usize {
        let dir = tempfile::tempdir().unwrap();
        let slow = StoreSettings { commit_interval: Duration::from_secs(3600), ..settings(dir.path()) };
        let store = EdgeStore::open(slow, vec![stream("a", "a/#")]).unwrap();
        put(&store, "a", b"the first begins a commit");
        let taken = (1..=5_000).take_while(|n| !offer(&store, &[publish_nth(*n)]).is_empty()).count();
        assert!(matches!(offer(&store, &[publish("a", b"a record")])[..], [Admission::Stored(_)]));
        taken
    }
    let retained = |n: u16, properties| Publish { retain: true, properties, ..publish(format!("r/{n}").leak(), b"r") };
    let ids = taken(|n| Publish { qos: 2, packet_id: Some(n), ..publish("none", b"") });
    let small = taken(|n| retained(n, PublishProperties::default()));
    assert!((500..2_500).contains(&ids) && (500..2_500).contains(&small), "{ids} {small}");
    let large = vec![("name", "v".repeat(50_000).leak() as &str); 2];
    let large = taken(|n| retained(n, PublishProperties { user: large.clone(), ..PublishProperties::default() }));
    assert!((1..4).contains(&large), "{large} of 100 kB of properties");
}

#[test]
fn a_directory_that_cannot_be_used_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, b"").unwrap();
    let error = EdgeStore::open(settings(&file), vec![]).unwrap_err().to_string();
    assert!(error.contains("file") && error.contains("set another data_dir"), "{error}");
    let tiny = StoreSettings { disk_budget: Some(1 << 20), ..settings(dir.path()) };
    let error = EdgeStore::open(tiny, vec![]).unwrap_err().to_string();
    assert!(error.contains("disk_budget"), "{error}");
}

#[test]
fn a_second_process_is_told_so() {
    let dir = tempfile::tempdir().unwrap();
    let store = EdgeStore::open(settings(dir.path()), vec![]).unwrap();
    let error = EdgeStore::open(settings(dir.path()), vec![]).unwrap_err();
    assert!(matches!(error, OpenError::InUse(_)));
    assert!(error.to_string().contains("data_dir of its own"), "{error}");
    store.close();
    EdgeStore::open(settings(dir.path()), vec![]).unwrap();
}

#[test]
fn a_record_the_cloud_can_never_take_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = EdgeStore::open(settings(dir.path()), vec![stream("a", "#")]).unwrap();
    store.set_limits(10_000);
    let large = vec![0; 10_000];
    let admissions = offer(&store, &[publish("t", b"1"), publish("t", &large), publish("t", b"3")]);
    assert!(matches!(
        admissions[..],
        [Admission::Stored(_), Admission::Refused(Refusal::TooLarge), Admission::Stored(_)]
    ));
}

#[test]
fn a_new_incarnation_sends_again_what_is_not_safe() {
    let dir = tempfile::tempdir().unwrap();
    let streams = vec![stream("a", "#")];
    let store = EdgeStore::open(settings(dir.path()), streams.clone()).unwrap();
    for _ in 0..4 {
        put(&store, "t", b"x");
    }
    store.set_confirmed(&name("a"), 3);
    store.set_safe(&name("a"), 2);
    let before = store.position(&name("a")).unwrap();
    let renewed = block_on(store.renew_incarnation(&name("a"))).unwrap();
    assert_ne!(renewed, before.incarnation);
    let after = store.position(&name("a")).unwrap();
    assert_eq!((after.confirmed, after.safe, after.next), (2, 2, 4));
    drop(store);
    let store = EdgeStore::open(settings(dir.path()), streams).unwrap();
    let after = store.position(&name("a")).unwrap();
    assert_eq!((after.incarnation, after.confirmed), (renewed, 2));
    // After a kill the uplink must still know what is in the bucket under the incarnation before.
    let info = shared::link::sender::Rows::streams(&*store).remove(0);
    assert_eq!((info.first, info.renewed_at, info.start()), (0, 2, 2));
    block_on(store.wait_records(&name("a"), 3));
}

#[test]
fn a_stream_without_a_rule_is_still_forwarded() {
    let dir = tempfile::tempdir().unwrap();
    let store = EdgeStore::open(settings(dir.path()), vec![stream("a", "#")]).unwrap();
    put(&store, "t", b"x");
    drop(store);
    let store = EdgeStore::open(settings(dir.path()), vec![stream("b", "#")]).unwrap();
    assert_eq!(store.streams(), [name("b"), name("a")]);
    put(&store, "t", b"y");
    assert_eq!((values(&store, "a"), values(&store, "b")), (vec![b"x".to_vec()], vec![b"y".to_vec()]));
}

/// Fills a store of the smallest budget until it says something else than `Stored`.
fn fill(store: &EdgeStore) -> Admission {
    let payload = vec![7u8; 10_000];
    for n in 0..3000u32 {
        let admissions = offer(store, &[publish("t", &payload), publish("t", &n.to_be_bytes())]);
        match admissions[..] {
            [.., Admission::Stored(ticket)] => block_on(store.wait(ticket)).unwrap(),
            [.., other] => return other,
            // Held: by what waits, or by the disk.
            [] if store.status().full => return Admission::NotStored,
            [] => block_on(store.room()),
        }
    }
    panic!("never full");
}

fn small(dir: &Path) -> StoreSettings {
    StoreSettings { disk_budget: Some(crate::retention::BUDGET_BYTES_MIN), ..settings(dir) }
}

#[test]
fn a_full_store_holds_and_goes_on_when_something_is_safe() {
    let dir = tempfile::tempdir().unwrap();
    let store = EdgeStore::open(small(dir.path()), vec![stream("a", "#")]).unwrap();
    assert_eq!(fill(&store), Admission::NotStored);
    let at = store.position(&name("a")).unwrap();
    assert_eq!(at.first, 0, "nothing unsafe is deleted");
    // Sessions use the reserve.
    block_on(store.wait(store.delete_session("dev"))).unwrap();
    store.set_safe(&name("a"), at.next);
    block_on(store.room());
    assert!(store.position(&name("a")).unwrap().first > 0);
    put(&store, "t", b"again");
    let used = store.status().disk_used_bytes;
    assert!(used <= crate::retention::BUDGET_BYTES_MIN, "{used}");
    // Many times its size through it: freed pages are used again.
    for _ in 0..5 {
        fill(&store);
        store.set_safe(&name("a"), store.position(&name("a")).unwrap().next);
        block_on(store.room());
    }
    assert!(store.status().disk_used_bytes <= crate::retention::BUDGET_BYTES_MIN);
    assert_eq!(store.status().trouble, None);
}

#[test]
fn a_wrong_estimate_is_survived_with_the_reserve() {
    let dir = tempfile::tempdir().unwrap();
    let rules = vec![stream("a", "#")];
    // Values just above a power of two take almost twice what they hold, which the estimate does not know.
    let payload = vec![7u8; 270_000];
    let mut stored = 0;
    let settings = || StoreSettings { disk_budget: Some(32 << 20), ..settings(dir.path()) };
    let store = EdgeStore::open(settings(), rules.clone()).unwrap();
    let estimate = store.core.state.lock().budget.ceiling();
    for round in 0..3 {
        loop {
            match offer(&store, &[publish("t", &payload)])[..] {
                [Admission::Stored(ticket)] => {
                    block_on(store.wait(ticket)).unwrap();
                    stored += 1;
                }
                [] if store.status().full => break,
                [] => block_on(store.room()),
                ref other => panic!("{other:?}"),
            }
        }
        let status = store.status();
        assert!(status.disk_used_bytes <= status.disk_budget_bytes, "{status:?}");
        let at = store.position(&name("a")).unwrap();
        assert_eq!(at.next, stored, "round {round}");
        store.set_safe(&name("a"), at.next);
        block_on(store.room());
    }
    assert!(store.core.state.lock().budget.ceiling() < estimate, "the disk never refused: nothing was shown here");
    drop(store);
    let store = EdgeStore::open(settings(), rules).unwrap();
    assert_eq!(store.position(&name("a")).unwrap().next, stored);
}

#[test]
fn a_full_store_rejects_where_the_rule_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let mut rule = stream("a", "#");
    rule.on_full = OnFull::Reject;
    let store = EdgeStore::open(small(dir.path()), vec![rule]).unwrap();
    assert_eq!(fill(&store), Admission::Refused(Refusal::QuotaExceeded));
    let large = vec![1; 50_000];
    let mut retained = publish("$x", &large);
    retained.retain = true;
    assert_eq!(offer(&store, &[retained]), [Admission::Refused(Refusal::QuotaExceeded)], "not retained either");
    assert_eq!(store.position(&name("a")).unwrap().first, 0);
}

#[test]
fn drop_oldest_drops_and_leaves_a_gap_to_declare() {
    let dir = tempfile::tempdir().unwrap();
    let mut rule = stream("a", "#");
    rule.on_full = OnFull::DropOldest;
    let store = EdgeStore::open(small(dir.path()), vec![rule.clone()]).unwrap();
    store.set_confirmed(&name("a"), 0);
    let payload = vec![7u8; 10_000];
    for _ in 0..2000 {
        match offer(&store, &[publish("t", &payload)])[..] {
            [Admission::Stored(ticket)] => block_on(store.wait(ticket)).unwrap(),
            [] => block_on(store.room()),
            ref other => panic!("{other:?}"),
        }
    }
    let at = store.position(&name("a")).unwrap();
    assert!(at.first > 1000, "{at:?}");
    assert_eq!(at.gap, Some((0, at.first)));
    assert_eq!(store.status().streams[0].dropped_records_total, at.first as u64);
    drop(store);
    let store = EdgeStore::open(small(dir.path()), vec![rule]).unwrap();
    assert_eq!(store.position(&name("a")).unwrap().gap, Some((0, at.first)), "the gap is durable");
    assert_eq!(store.read(&name("a"), at.first, 1).unwrap()[0].batch.base_offset(), at.first);
    store.gap_declared(&name("a"), at.first);
    assert_eq!(store.position(&name("a")).unwrap().gap, None);
}

#[test]
fn retention_deletes_what_is_safe_and_only_that() {
    let dir = tempfile::tempdir().unwrap();
    let mut by_bytes = stream("b", "b");
    by_bytes.retention_bytes = Some(ByteSize(200_000));
    let mut by_age = stream("a", "a");
    by_age.retention_age = Some(Span::secs(60));
    let hands = Hands::new(CLOCK_MS);
    let settings = StoreSettings { clock: hands.clock(), ..settings(dir.path()) };
    let store = EdgeStore::open(settings, vec![by_bytes, by_age]).unwrap();
    let payload = vec![1u8; 50_000];
    for _ in 0..20 {
        put(&store, "b", &payload);
        put(&store, "a", &payload);
        hands.pass(6_000);
    }
    for stream in ["a", "b"] {
        assert_eq!(store.position(&name(stream)).unwrap().first, 0);
        store.set_safe(&name(stream), 15);
    }
    for _ in 0..3 {
        put(&store, "b", b"x");
    }
    let b = store.position(&name("b")).unwrap();
    assert_eq!(b.first, 15, "{b:?}");
    let a = store.position(&name("a")).unwrap();
    assert_eq!(a.first, 10, "records 0 to 9 are older than a minute");
}

#[test]
fn whatever_the_clock_shows_retention_by_age_counts_what_passed() {
    const HOUR: i64 = 3_600_000;
    const DAY: i64 = 24 * HOUR;
    for (what, wrong) in [
        ("-400 d", CLOCK_MS - 400 * DAY),
        ("-1 d", CLOCK_MS - DAY),
        ("+20 h", CLOCK_MS + 20 * HOUR),
        ("+8 d", CLOCK_MS + 8 * DAY),
        ("+1 y", CLOCK_MS + 365 * DAY),
        ("2099", 4_070_908_800_000),
        ("1970", 0),
    ] {
        for (comes_back, restarts) in [(true, false), (false, false), (true, true), (false, true)] {
            let dir = tempfile::tempdir().unwrap();
            let mut rule = stream("a", "a");
            rule.retention_age = Some(Span::secs(3600));
            let hands = Hands::new(CLOCK_MS);
            let open = || {
                let settings = StoreSettings { clock: hands.clock(), ..settings(dir.path()) };
                EdgeStore::open(settings, vec![rule.clone()]).unwrap()
            };
            let mut store = open();
            let payload = vec![1u8; 50_000];
            let mut kept = publish("kept", b"r");
            (kept.retain, kept.properties.expiry_secs) = (true, Some(3600));
            offer(&store, &[kept]);
            let again = |store: Arc<EdgeStore>| {
                if !restarts {
                    return store;
                }
                drop(store);
                open()
            };
            for _ in 0..5 {
                put(&store, "a", &payload);
                hands.pass(60_000);
            }
            store.set_safe(&name("a"), 5);
            store = again(store);
            let right = hands.0.lock().wall_ms;
            hands.set(wrong);
            store = again(store);
            for _ in 0..5 {
                put(&store, "a", &payload);
                hands.pass(60_000);
            }
            store.set_safe(&name("a"), 10);
            put(&store, "a", &payload);
            assert_eq!(store.position(&name("a")).unwrap().first, 0, "{what}: nothing is an hour old");
            let stored_ms = store.load_retained().unwrap()[0].stored_ms;
            let age = hands.0.lock().wall_ms - stored_ms;
            assert!((9 * 60_000..=10 * 60_000).contains(&age), "{what}: the retained message is {age} ms old");
            if comes_back {
                hands.set(right + 5 * 60_000);
            }
            store = again(store);
            put(&store, "a", &payload);
            assert_eq!(store.position(&name("a")).unwrap().first, 0, "{what}: nothing is an hour old");
            // An hour passes: what is older goes, whatever the clock shows.
            for _ in 0..12 {
                hands.pass(6 * 60_000);
                put(&store, "a", b"x");
                store = again(store);
            }
            let at = store.position(&name("a")).unwrap();
            assert_eq!((at.first, at.safe), (10, 10), "{what}, comes back: {comes_back}, restarts: {restarts}");
        }
    }
}

#[test]
fn a_clean_stop_keeps_the_time_that_passed_since_the_last_commit() {
    let dir = tempfile::tempdir().unwrap();
    let mut rule = stream("a", "a");
    rule.retention_age = Some(Span::secs(3600));
    let hands = Hands::new(CLOCK_MS);
    let open = || {
        let settings = StoreSettings { clock: hands.clock(), ..settings(dir.path()) };
        EdgeStore::open(settings, vec![rule.clone()]).unwrap()
    };
    for _ in 0..3 {
        let store = open();
        put(&store, "a", &vec![1; 50_000]);
        put(&store, "a", b"x");
        let next = store.position(&name("a")).unwrap().next;
        store.set_safe(&name("a"), next);
        hands.pass(1_300_000);
    }
    let store = open();
    for _ in 0..2 {
        put(&store, "a", &vec![1; 50_000]);
    }
    assert_eq!(store.position(&name("a")).unwrap().first, 1, "an hour passed over three runs without a commit");
}

#[test]
fn a_database_of_another_format_ends_the_start_with_the_remedy() {
    for format in [1u32, 2, 99] {
        let dir = tempfile::tempdir().unwrap();
        drop(EdgeStore::open(settings(dir.path()), vec![]).unwrap());
        {
            let database = redb::Database::create(dir.path().join("edge.redb")).unwrap();
            let transaction = database.begin_write().unwrap();
            let meta: redb::TableDefinition<'_, &str, &[u8]> = redb::TableDefinition::new("meta");
            transaction.open_table(meta).unwrap().insert("format", &format.to_le_bytes()[..]).unwrap();
            transaction.commit().unwrap();
        }
        let error = EdgeStore::open(settings(dir.path()), vec![]).unwrap_err().to_string();
        assert!(error.contains(&format!("format {format}")) && error.contains("install the version"), "{error}");
        assert!(error.contains("salvage"), "{error}");
        assert!(dir.path().join("edge.redb").exists());
    }
}

#[test]
fn whatever_is_damaged_and_how_often_nothing_acknowledged_is_deleted_and_every_start_works() {
    for disk_budget in [None, Some(64 << 20), Some(32 << 20), Some(crate::retention::BUDGET_BYTES_MIN)] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("edge.redb");
        // Once the clock stands still, once a name is taken by something else.
        std::fs::create_dir(dir.path().join(format!("edge.redb.bad-{}", CLOCK_MS / 1000 + 1))).unwrap();
        let bad = || -> BTreeMap<PathBuf, Vec<u8>> {
            let paths = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path());
            let bad = paths.filter(|path| path.is_file() && path.to_string_lossy().contains(".bad-"));
            bad.map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
        };
        let (mut incarnations, mut damaged) = (Vec::new(), Vec::new());
        for round in 0..6 {
            let settings = StoreSettings { disk_budget, ..settings(dir.path()) };
            let store = EdgeStore::open(settings, vec![stream("a", "#")]).unwrap();
            // More than a tenth of the budget each time: together they are larger than all of it.
            let payload = vec![round as u8 + 1; 400_000];
            for _ in 0..10 {
                match offer(&store, &[publish("t", &payload)])[..] {
                    [Admission::Stored(ticket)] => block_on(store.wait(ticket)).unwrap(),
                    [] if store.status().full => break,
                    ref other => panic!("{other:?}"),
                }
            }
            put(&store, "t", b"the smallest budget still takes records");
            incarnations.push(store.position(&name("a")).unwrap().incarnation);
            let status = store.status();
            assert_eq!(status.set_aside.len(), round);
            assert!(status.disk_budget_bytes >= crate::retention::BUDGET_BYTES_MIN, "{status:?}");
            drop(store);
            let found = bad();
            assert_eq!(found.len(), round);
            for bytes in &damaged {
                assert!(found.values().any(|one| one == bytes), "a database with acknowledged records is gone");
            }
            let mut bytes = std::fs::read(&path).unwrap();
            bytes.iter_mut().skip(4096).for_each(|byte| *byte = !*byte);
            std::fs::write(&path, &bytes).unwrap();
            damaged.push(bytes);
        }
        incarnations.dedup();
        assert_eq!(incarnations.len(), 6, "a new life each time");
    }
}

#[test]
fn a_setting_ends_a_start_and_what_the_program_left_does_not() {
    let budget = |path: &Path, disk_budget, aside: &[PathBuf]| {
        let settings = StoreSettings { disk_budget, ..settings(path) };
        open::disk_budget(&settings, &path.join("edge.redb"), aside)
    };
    let dir = tempfile::tempdir().unwrap();
    let aside = dir.path().join("edge.redb.bad-1");
    std::fs::write(&aside, vec![1; 40 << 20]).unwrap();
    let min = crate::retention::BUDGET_BYTES_MIN;
    assert_eq!(budget(dir.path(), Some(32 << 20), std::slice::from_ref(&aside)).unwrap(), min);
    let left = budget(dir.path(), Some(64 << 20), std::slice::from_ref(&aside)).unwrap();
    assert!((20 << 20..=24 << 20).contains(&left), "{left}");
    assert!(matches!(budget(dir.path(), Some(min - 1), &[]), Err(OpenError::Budget { found }) if found == min - 1));
    // A database that is larger than what is left keeps its place.
    std::fs::write(dir.path().join("edge.redb"), vec![1; 30 << 20]).unwrap();
    let kept = budget(dir.path(), Some(64 << 20), std::slice::from_ref(&aside)).unwrap();
    assert!(kept >= 30 << 20, "{kept}");
}

#[test]
fn a_file_that_is_mostly_dead_is_compacted_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let mut rule = stream("a", "#");
    rule.retention_bytes = Some(ByteSize(1 << 20));
    let store = EdgeStore::open(settings(dir.path()), vec![rule.clone()]).unwrap();
    let payload = vec![3u8; 50_000];
    for n in 0..700u32 {
        let admissions = offer(&store, &[publish("t", &payload), publish("t", &n.to_be_bytes())]);
        let [.., Admission::Stored(ticket)] = admissions[..] else { panic!("{admissions:?}") };
        block_on(store.wait(ticket)).unwrap();
    }
    store.set_safe(&name("a"), 1390);
    // Each commit deletes a bounded number of rows.
    while store.position(&name("a")).unwrap().first < 1300 {
        put(&store, "t", b"x");
    }
    let before = store.status();
    assert!(before.disk_dead_bytes > 20 << 20 && before.disk_dead_bytes > before.disk_used_bytes / 2, "{before:?}");
    let (expected, at) = (values(&store, "a"), store.position(&name("a")).unwrap());
    drop(store);
    let store = EdgeStore::open(settings(dir.path()), vec![rule]).unwrap();
    let after = store.status();
    assert!(
        after.disk_used_bytes < before.disk_used_bytes / 2,
        "{} -> {}",
        before.disk_used_bytes,
        after.disk_used_bytes
    );
    assert_eq!(values(&store, "a"), expected);
    assert_eq!(store.position(&name("a")).unwrap().next, at.next);
    put(&store, "t", b"goes on");
}

#[test]
fn rows_fill_the_page_runs_they_take() {
    // redb rounds a leaf up to a power of two pages: a row one byte beyond 64 KiB with its key would take 128 KiB.
    for payload_bytes in [200usize, 900, 11_000, 14_500, 29_000, 32_600, 40_000, 59_000] {
        let dir = tempfile::tempdir().unwrap();
        let store = EdgeStore::open(settings(dir.path()), vec![stream("a", "#")]).unwrap();
        let payload = vec![5u8; payload_bytes];
        let mut stored = 0;
        while stored < 6_000_000 {
            let publishes = vec![publish("t", &payload); (120_000 / payload_bytes).max(1)];
            match offer(&store, &publishes)[..] {
                [.., Admission::Stored(ticket)] => block_on(store.wait(ticket)).unwrap(),
                ref other => panic!("{other:?}"),
            }
            stored += publishes.len() * payload_bytes;
        }
        let rows = store.core.log.row_sizes().unwrap();
        let longest = rows.iter().max().copied().unwrap_or(0);
        assert!(longest + 12 + 8 <= 65_536, "a row of {longest} bytes does not fit 16 pages");
        let runs: usize = rows.iter().map(|bytes| (bytes + 20).div_ceil(4096).next_power_of_two() * 4096).sum();
        let ratio = runs as f64 / rows.iter().sum::<usize>() as f64;
        println!("payloads of {payload_bytes}: {} rows, {ratio:.2} on the disk", rows.len());
        // One record that is alone too large for half a run and too small for a whole one cannot be packed better.
        let bound = if payload_bytes > 29_000 { 1.7 } else { 1.25 };
        assert!(ratio < bound, "payloads of {payload_bytes}: {ratio}");
    }
}
