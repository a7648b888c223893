//! The worst legal packets, and clients that hold on to whatever they get: steps and bytes are counted.

use std::time::Instant;

use shared::door::{LEAVE_PAUSE, LEAVING_MAX};

use super::*;
use crate::front::session::SessionInfo;

const MIB: usize = 1 << 20;

fn qos(qos: QoS) -> SubscribeOptions {
    SubscribeOptions { qos, ..SubscribeOptions::default() }
}

fn used(stats: &Stats) -> u64 {
    stats.memory_bytes.iter().sum()
}

async fn retain(server: &Server, count: usize, topic: impl Fn(usize) -> String, payload: &[u8]) {
    let mut publisher = server.connect(V4, "retainer").await;
    for i in 0..count {
        publisher.send(&Packet::Publish(retained(&topic(i), payload, AtMostOnce, 0))).await;
    }
    publisher.ping().await;
}

/// An innocent client can connect with a will, subscribe, publish and get its own message.
async fn innocent(server: &Server) {
    let will = Will {
        topic: "innocent/will",
        payload: b"gone",
        qos: AtLeastOnce,
        retain: false,
        delay_secs: 0,
        properties: PublishProperties::default(),
    };
    let (mut client, _) = server.connect_with(Connect { will: Some(will), ..connect(V5, "innocent") }).await;
    client.subscribe("innocent/+", AtLeastOnce).await;
    client.publish("innocent/1", b"hello", AtLeastOnce, 7).await;
    let mut got = [client.recv().await[0] >> 4, client.recv().await[0] >> 4];
    got.sort();
    assert_eq!(got, [3, 4]);
}

#[tokio::test]
async fn twenty_thousand_times_one_filter_is_one_search() {
    let server = Server::start(&nothing_stored()).await;
    let devices = 2_000;
    retain(&server, devices, |i| format!("d{i}/x"), b"1").await;
    retain(&server, devices, |i| format!("d{i}/y"), b"1").await;
    let mut client = server.connect(V5, "c").await;
    let filters = vec![("+/x", qos(AtMostOnce)); 20_000];
    let reasons = client.subscribe_with(1, &filters, None).await;
    assert_eq!(reasons.len(), 20_000);
    assert!(reasons[..1024].iter().all(|reason| *reason == Reason::SUCCESS));
    assert!(reasons[1024..].iter().all(|reason| *reason == Reason::QUOTA_EXCEEDED));
    for _ in 0..devices {
        assert!(client.got().await.topic.ends_with("/x"));
    }
    client.ping().await;
    let stats = server.front.stats();
    assert_eq!(stats.subscriptions, 1);
    assert!(stats.retained_steps_total <= 3 * devices as u64, "{}", stats.retained_steps_total);
}

#[tokio::test]
async fn the_last_of_repeated_filters_counts_and_each_is_answered() {
    let server = Server::start(&nothing_stored()).await;
    retain(&server, 1, |_| "a".to_owned(), b"1").await;
    let mut client = server.connect(V5, "c").await;
    let filters = [("a", qos(ExactlyOnce)), ("b/#/c", qos(AtMostOnce)), ("a", qos(AtMostOnce))];
    let reasons = client.subscribe_with(1, &filters, None).await;
    assert_eq!(reasons, [Reason(2), Reason::TOPIC_FILTER_INVALID, Reason(0)]);
    assert_eq!(client.got().await.qos, AtMostOnce);
    client.publish("a", b"2", AtMostOnce, 0).await;
    assert_eq!(client.got().await.payload, b"2");
    client.ping().await;
    // An UNSUBSCRIBE of more filters than any session has is told.
    let filters = vec!["x"; 2_000];
    client.send(&Packet::Unsubscribe(crate::codec::Unsubscribe { packet_id: 3, properties: None, filters })).await;
    client.expect_end(Reason::QUOTA_EXCEEDED).await;
}

#[tokio::test]
async fn many_subscriptions_search_in_steps_while_others_publish_retained_messages() {
    let server = Server::start(&nothing_stored()).await;
    retain(&server, 2_000, |i| format!("a/b/d{i}"), b"1").await;
    let mut client = server.connect(V5, "c").await;
    let filters: Vec<_> = (0..200).map(|i| format!("+/+/+/x{i}")).collect();
    let filters: Vec<_> = filters.iter().map(|filter| (filter.as_str(), qos(AtMostOnce))).collect();
    client.subscribe_with(1, &filters, None).await;
    // Its search is not over, and takes the lock for some steps at a time only.
    let mut publisher = server.connect(V4, "p").await;
    publisher.send(&Packet::Publish(retained("a/b/d0", b"2", AtLeastOnce, 1))).await;
    publisher.expect_puback(1).await;
    let at_puback = server.front.stats().retained_steps_total;
    let stats = server.stats(|stats| stats.retained_steps_total >= 200 * 2_000).await;
    assert!(at_puback < stats.retained_steps_total / 2, "{at_puback} of {}", stats.retained_steps_total);
    client.ping().await;
}

#[tokio::test]
async fn retained_messages_are_pulled_as_the_socket_drains() {
    let settings = Settings { memory_bytes_max: 16 * MIB, outbound_bytes_max: MIB, ..Settings::default() };
    let server = Server::with(settings, &nothing_stored()).await;
    let (count, payload) = (400, vec![7; 64 << 10]);
    retain(&server, count, |i| format!("r/{i:03}"), &payload).await;
    assert!(server.front.stats().retained_bytes > 25 << 20);
    for qos in [AtMostOnce, AtLeastOnce] {
        let (mut client, _) = server.connect_with(kept(V5, "slow")).await;
        client.subscribe_with(1, &[("#", SubscribeOptions { qos, ..SubscribeOptions::default() })], None).await;
        // It does not read; whoever retains is served, and nothing piles up.
        let mut publisher = server.connect(V4, "p").await;
        publisher.send(&Packet::Publish(retained("other", b"2", AtLeastOnce, 1))).await;
        publisher.expect_puback(1).await;
        let stats = server.front.stats();
        assert!(used(&stats) < 5 * MIB as u64, "{stats:?}");
        let mut topics = std::collections::BTreeSet::new();
        while topics.len() < count {
            let got = client.got().await;
            if got.topic.starts_with("r/") {
                assert_eq!(got.payload.len(), payload.len());
                assert!(topics.insert(got.topic), "once");
            }
        }
    }
}

#[tokio::test]
async fn a_subscription_made_again_gets_the_retained_messages_again_and_one_taken_back_none() {
    let server = Server::start(&nothing_stored()).await;
    retain(&server, 50, |i| format!("r/{i:03}"), b"x").await;
    let mut client = server.connect(V5, "c").await;
    for _ in 0..2 {
        client.subscribe("r/+", AtMostOnce).await;
        for i in 0..50 {
            assert_eq!(client.got().await.topic, format!("r/{i:03}"));
        }
    }
    client.ping().await;
}

#[tokio::test]
async fn wills_are_bounded_together() {
    let server = Server::with(Settings { memory_bytes_max: 16 * MIB, ..Settings::default() }, &nothing_stored()).await;
    let text = "x".repeat(50_000);
    let mut clients = Vec::new();
    let mut refused = 0;
    for i in 0..60 {
        let version = if i % 2 == 0 { V5 } else { V4 };
        let user = if version == V5 { vec![("k", text.as_str()); 18] } else { vec![] };
        let payload = vec![0; 60_000];
        let properties = PublishProperties { user, ..PublishProperties::default() };
        let will = Will { topic: "w", payload: &payload, qos: AtMostOnce, retain: false, delay_secs: 0, properties };
        let id = format!("hog{i}");
        let mut client = server.raw().await;
        client.version = version;
        client.send(&Packet::Connect(Box::new(Connect { will: Some(will), ..connect(version, &id) }))).await;
        let frame = client.recv().await;
        let Packet::ConnAck(ack) = client.read(&frame) else { panic!("{frame:?}") };
        if ack.reason == Reason::SUCCESS {
            clients.push(client);
        } else {
            assert_eq!(ack.reason, if version == V5 { Reason::QUOTA_EXCEEDED } else { Reason(3) });
            refused += 1;
        }
    }
    let stats = server.front.stats();
    assert!(refused > 10 && clients.len() > 5, "{refused} {}", clients.len());
    assert!(used(&stats) <= 16 * MIB as u64, "{stats:?}");
    assert!(stats.memory_refused_total >= refused);
    innocent(&server).await;
    drop(clients);
    server.stats(|stats| stats.memory_bytes[0] == 0).await;
}

#[tokio::test]
async fn topic_aliases_are_bounded_together() {
    let server = Server::with(Settings { memory_bytes_max: 4 * MIB, ..Settings::default() }, &nothing_stored()).await;
    let mut clients = Vec::new();
    for i in 0..40 {
        let mut client = server.connect(V5, &format!("hog{i}")).await;
        for alias in 1..=16 {
            let topic = format!("{alias}{}", "x".repeat(60_000));
            let publish = crate::codec::Publish { topic_alias: Some(alias), ..publish(&topic, b"", AtMostOnce, 0) };
            let mut bytes = Vec::new();
            Packet::Publish(publish).encode(V5, &mut bytes).unwrap();
            let _ = client.stream.write_all(&bytes).await;
        }
        clients.push(client);
    }
    let stats = server.stats(|stats| stats.received_messages_total + 16 * stats.memory_refused_total >= 16 * 30).await;
    assert!(used(&stats) <= 4 * MIB as u64, "{stats:?}");
    assert!(stats.memory_refused_total > 10, "{stats:?}");
    innocent(&server).await;
    drop(clients);
    server.stats(|stats| used(stats) == 0).await;
}

#[tokio::test]
async fn filters_are_bounded_together() {
    let server = Server::with(Settings { memory_bytes_max: 4 * MIB, ..Settings::default() }, &nothing_stored()).await;
    let deep = ["x/+"; 50].join("/");
    let (mut clients, mut refused, mut granted) = (Vec::new(), 0, 0);
    for i in 0..10 {
        let mut client = server.connect(V4, &format!("hog{i}")).await;
        let filters: Vec<_> = (0..500).map(|j| format!("{i}/{j}/{deep}/{j}")).collect();
        let filters: Vec<_> = filters.iter().map(|filter| (filter.as_str(), qos(AtMostOnce))).collect();
        for reason in client.subscribe_with(1, &filters, None).await {
            assert!(reason == Reason::SUCCESS || reason == Reason(0x80));
            refused += u64::from(reason.is_error());
            granted += u64::from(!reason.is_error());
        }
        clients.push(client);
    }
    let stats = server.front.stats();
    assert!(refused > 1_000 && granted > 1_000, "{refused} {granted}");
    assert!(used(&stats) <= 4 * MIB as u64, "{stats:?}");
    assert_eq!(stats.subscriptions, granted);
    innocent(&server).await;
    drop(clients);
    server.stats(|stats| used(stats) == 0 && stats.subscriptions == 0).await;
}

#[tokio::test]
async fn many_filters_of_a_session_that_ends_leave_in_steps_and_count_to_the_last() {
    let server = Server::start(&nothing_stored()).await;
    let mut client = server.connect(V4, "many").await;
    let filters: Vec<_> = (0..1_000).map(|n| format!("a/{n}/+")).collect();
    let filters: Vec<_> = filters.iter().map(|filter| (filter.as_str(), qos(AtMostOnce))).collect();
    assert!(client.subscribe_with(1, &filters, None).await.iter().all(|reason| *reason == Reason::SUCCESS));
    let filter_bytes = |stats: &Stats| stats.memory_bytes[2];
    let counted = filter_bytes(&server.front.stats());
    drop(client);
    let front = server.front.clone();
    // A task like the one that takes them out: they have turns one after the other.
    let watch = tokio::spawn(async move {
        let mut steps = 0;
        loop {
            let stats = front.stats();
            if (stats.subscriptions, filter_bytes(&stats)) == (0, 0) {
                return steps;
            }
            assert_eq!(filter_bytes(&stats), counted, "{stats:?}");
            steps += u32::from((1..1_000).contains(&stats.subscriptions));
            shared::door::others_first().await;
        }
    });
    let steps = tokio::time::timeout(PATIENCE, watch).await.unwrap().unwrap();
    assert!(steps > 20, "{steps}");
}

#[tokio::test]
async fn subscribers_that_do_not_read_are_bounded_together() {
    let server = Server::with(Settings { memory_bytes_max: 8 * MIB, ..Settings::default() }, &nothing_stored()).await;
    let mut deaf = Vec::new();
    for i in 0..30 {
        let (mut client, _) = server.connect_with(kept(V5, &format!("deaf{i}"))).await;
        let filter = if i % 2 == 0 { ("flood", qos(AtMostOnce)) } else { ("flood", qos(AtLeastOnce)) };
        client.subscribe_with(1, &[filter], None).await;
        deaf.push(client);
    }
    let mut publisher = server.connect(V4, "p").await;
    let payload = vec![1; 100_000];
    let mut most = 0;
    for id in 1..=150 {
        publisher.publish("flood", &payload, AtLeastOnce, id).await;
        publisher.expect_puback(id).await;
        most = most.max(used(&server.front.stats()));
    }
    let stats = server.front.stats();
    assert!(most <= 8 * MIB as u64, "{most} {stats:?}");
    assert!(stats.dropped_slow_total + stats.dropped_queue_full_total > 500, "{stats:?}");
    innocent(&server).await;
    drop((deaf, publisher));
}

#[tokio::test]
async fn a_publish_for_many_subscribers_goes_out_in_steps_and_in_order() {
    let server = Server::start(&nothing_stored()).await;
    let mut subscribers = Vec::new();
    for i in 0..40 {
        let mut client = server.connect(V5, &format!("s{i}")).await;
        client.subscribe("t/+", AtLeastOnce).await;
        subscribers.push(client);
    }
    // One write, many runs: far more than one poll does.
    let mut bytes = Vec::new();
    for i in 0..1_000u32 {
        let topic = if i % 100 < 50 { "t/1" } else { "t/2" };
        Packet::Publish(publish(topic, &i.to_be_bytes(), AtLeastOnce, i as u16 + 1)).encode(V5, &mut bytes).unwrap();
    }
    let mut publisher = server.connect(V5, "p").await;
    publisher.send_bytes(&bytes).await;
    drop(publisher); // What was taken is delivered although its publisher is gone.
    for client in &mut subscribers {
        for i in 0..1_000u32 {
            assert_eq!(client.got().await.payload, i.to_be_bytes());
        }
    }
}

#[tokio::test]
async fn the_longest_absent_session_without_messages_makes_room() {
    let server = Server::with(Settings { sessions_max: 3, ..Settings::default() }, &nothing_stored()).await;
    let mut publisher = server.connect(V4, "p").await;
    for id in ["first", "second", "third"] {
        let (mut client, _) = server.connect_with(kept(V4, id)).await;
        client.subscribe(id, AtLeastOnce).await;
        drop(client);
        server.stats(|stats| stats.connections == 1).await;
    }
    // The longest absent one holds a message that its publisher was told is safe: the next longest goes.
    publisher.publish("first", b"x", AtLeastOnce, 1).await;
    publisher.expect_puback(1).await;
    let (fourth, present) = server.connect_with(kept(V5, "fourth")).await;
    assert!(!present);
    let stats = server.front.stats();
    assert_eq!((stats.sessions_evicted_total, stats.sessions_kept), (1, 3));
    let ids = |all: Vec<SessionInfo>| all.into_iter().map(|one| one.client_id).collect::<Vec<_>>();
    assert_eq!(ids(server.front.sessions("", 10)), ["first", "fourth", "p", "third"]);
    assert_eq!(ids(server.front.sessions("first", 2)), ["fourth", "p"]);
    // Connected ones never go, nor those with messages: then there is no room, and both versions are told.
    let (third, present) = server.connect_with(kept(V4, "third")).await;
    assert!(present);
    for (version, refused) in [(V4, Reason(3)), (V5, Reason::QUOTA_EXCEEDED)] {
        let mut client = server.raw().await;
        client.version = version;
        client.send(&Packet::Connect(Box::new(kept(version, "fifth")))).await;
        let frame = client.recv().await;
        assert!(matches!(client.read(&frame), Packet::ConnAck(ack) if ack.reason == refused));
    }
    assert_eq!(server.front.stats().sessions_refused_total, 2);
    // Who keeps no session needs no room, and who has one comes back.
    let clean = server.connect(V4, "clean").await;
    let (mut first, present) = server.connect_with(kept(V4, "first")).await;
    assert!(present);
    assert_eq!(first.got_payload().await, "x");
    drop((fourth, third, clean, first));
}

#[tokio::test]
async fn the_order_of_absence_survives_a_crash_and_who_was_connected_goes_last() {
    let store = nothing_stored();
    let settings = Settings { sessions_max: 3, ..Settings::default() };
    let server = Server::with(settings.clone(), &store).await;
    for id in ["z-first", "a-second"] {
        drop(server.connect_with(kept(V4, id)).await);
        server.stats(|stats| stats.connections == 0).await;
    }
    let connected = server.connect_with(kept(V4, "0-connected")).await;
    let server = Server::with(settings, &store).await;
    for (id, left) in [("new1", vec!["0-connected", "a-second", "new1"]), ("new2", vec!["0-connected", "new1", "new2"])]
    {
        drop(server.connect_with(kept(V4, id)).await);
        server.stats(|stats| stats.connections == 0).await;
        let ids: Vec<_> = server.front.sessions("", 9).into_iter().map(|session| session.client_id).collect();
        assert_eq!(ids, left);
    }
    drop(connected);
}

#[tokio::test]
async fn an_operator_removes_sessions_connected_or_not() {
    let store = nothing_stored();
    let server = Server::start(&store).await;
    let (away, _) = server.connect_with(kept(V4, "away")).await;
    drop(away);
    let (mut here, _) = server.connect_with(kept(V5, "here/#")).await;
    here.subscribe("t", AtLeastOnce).await;
    server.stats(|stats| stats.connections == 1).await;
    let all = server.front.sessions("", 10);
    assert!(!all[0].connected && all[0].left_ms.is_some() && all[0].expires_in_secs.is_some(), "{all:?}");
    assert!(all[1].connected && all[1].subscriptions == 1 && all[1].expiry_secs == 1000, "{all:?}");
    for id in ["away", "here/#"] {
        assert_eq!(server.front.remove_session(id).await, Ok(true));
        assert_eq!(server.front.remove_session(id).await, Ok(false));
    }
    here.expect_end(Reason::ADMINISTRATIVE_ACTION).await;
    let again = Server::start(&store).await;
    assert!(again.front.sessions("", 10).is_empty() && server.front.sessions("", 10).is_empty());
    assert_eq!(server.front.stats().subscriptions, 0);
}

#[tokio::test]
async fn a_session_kept_for_ever_gets_the_longest_life_there_is() {
    let settings = Settings { session_expiry_secs_max: 100, ..Settings::default() };
    let server = Server::with(settings, &nothing_stored()).await;
    let mut asks = kept(V5, "five");
    asks.properties.session_expiry_secs = Some(u32::MAX);
    let mut client = server.raw().await;
    client.send(&Packet::Connect(Box::new(asks))).await;
    let frame = client.recv().await;
    assert!(matches!(client.read(&frame), Packet::ConnAck(ack) if ack.properties.session_expiry_secs == Some(100)));
    let old = server.connect_with(kept(V4, "old")).await;
    assert!(server.front.sessions("", 10).iter().all(|session| session.expiry_secs == 100));
    drop(old);
}

#[tokio::test]
async fn a_client_identifier_belongs_to_its_user() {
    let user = |name: &str| User { name: name.into(), password: shared::config::Secret::new("pw".to_owned()) };
    let store = nothing_stored();
    let settings = Settings { users: vec![user("alice"), user("mallory")], ..Settings::default() };
    let mut server = Server::with(settings.clone(), &store).await;
    let as_user = |name: &'static str, connect: Connect<'static>| Connect {
        username: Some(name),
        password: Some(b"pw"),
        ..connect
    };
    for restarted in [false, true] {
        if restarted {
            server = Server::with(settings.clone(), &store).await;
        }
        let (mut alice, present) = server.connect_with(as_user("alice", kept(V5, "device"))).await;
        assert_eq!(present, restarted);
        for (version, clean) in [(V4, false), (V4, true), (V5, false), (V5, true)] {
            let connect = if clean { connect(version, "device") } else { kept(version, "device") };
            let mut mallory = server.raw().await;
            mallory.version = version;
            mallory.send(&Packet::Connect(Box::new(as_user("mallory", connect)))).await;
            let frame = mallory.recv().await;
            let refused = if version == V5 { Reason::CLIENT_IDENTIFIER_NOT_VALID } else { Reason(2) };
            assert!(matches!(mallory.read(&frame), Packet::ConnAck(ack) if ack.reason == refused));
        }
        alice.ping().await;
    }
}

#[tokio::test]
async fn silent_connections_make_room_for_those_who_speak() {
    let settings = Settings { connections_max: 8, ..Settings::default() };
    let server = Server::with(settings, &nothing_stored()).await;
    let (mut silent, began) = (Vec::new(), Instant::now());
    for _ in 0..200 {
        silent.push(server.raw().await);
    }
    let client = server.connect(V4, "innocent").await;
    let stats = server.front.stats();
    let evicted = stats.connections_evicted_total as u32;
    let paced = LEAVE_PAUSE * (evicted / LEAVING_MAX as u32 - 1);
    assert!(began.elapsed() >= paced, "a flood is let in slowly: {:?}", began.elapsed());
    assert!(evicted >= 190 && stats.connections <= 8 + 16, "{stats:?}");
    assert_eq!(silent[0].try_recv().await, None);
    drop(client);
}

#[tokio::test]
async fn a_connect_that_comes_slowly_is_not_waited_for() {
    let settings = Settings { connect_timeout: Duration::from_millis(300), ..Settings::default() };
    let server = Server::with(settings, &nothing_stored()).await;
    let mut slow = server.raw().await;
    // It announces 300 kB, and goes on sending.
    slow.send_bytes(&[0x10, 0xE0, 0xA7, 0x12]).await;
    let sends = async {
        while slow.stream.write_all(&[0; 4096]).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    // 300 kB take 1.5 s at this pace: it must be cut before.
    tokio::time::timeout(PATIENCE, sends).await.unwrap();
    let stats = server.stats(|stats| stats.connections == 0).await;
    assert_eq!(stats.protocol_errors_total, 0, "it was cut for its time, not for what it sent: {stats:?}");
}

/// Packets that fit a read buffer are many clients' way to hold much.
#[tokio::test]
async fn unfinished_small_packets_are_bounded_together() {
    let server = Server::with(Settings { memory_bytes_max: 4 * MIB, ..Settings::default() }, &nothing_stored()).await;
    let mut bytes = Vec::new();
    Packet::Publish(publish("t", &vec![0; 120_000], AtMostOnce, 0)).encode(V5, &mut bytes).unwrap();
    bytes.pop();
    let mut clients = Vec::new();
    for i in 0..80 {
        let mut client = server.connect(V5, &format!("hog{i}")).await;
        // One that is refused may find its connection closed while it sends.
        let _ = client.stream.write_all(&bytes).await;
        clients.push(client);
    }
    let stats = server.stats(|stats| stats.connections <= 60).await;
    assert!(used(&stats) <= 4 * MIB as u64, "{stats:?}");
    innocent(&server).await;
    drop(clients);
    server.stats(|stats| used(stats) == 0).await;
}

#[tokio::test]
async fn a_session_that_ended_is_in_no_timer() {
    let server = Server::start(&nothing_stored()).await;
    for i in 0..20 {
        let will = Will {
            topic: "w",
            payload: b"x",
            qos: AtMostOnce,
            retain: false,
            delay_secs: u32::MAX,
            properties: PublishProperties::default(),
        };
        let id = format!("c{i}");
        let (client, _) = server.connect_with(Connect { will: Some(will), ..kept(V5, &id) }).await;
        drop(client);
        server.stats(|stats| stats.connections == 0).await;
        assert!(!server.front.timers.lock().is_empty());
        assert_eq!(server.front.remove_session(&id).await, Ok(true));
    }
    assert_eq!(server.front.timers.lock().len(), 0);
}

#[tokio::test]
async fn wills_are_retained_within_the_bounds_of_retained_messages() {
    let store = nothing_stored();
    let server = Server::with(Settings { retained_messages_max: 3, ..Settings::default() }, &store).await;
    let mut reader = server.connect(V5, "reader").await;
    reader.subscribe("w/#", AtMostOnce).await;
    for i in 0..6 {
        let topic = format!("w/{i}");
        let properties = PublishProperties::default();
        let will = Will { topic: &topic, payload: b"x", qos: AtMostOnce, retain: true, delay_secs: 0, properties };
        let id = format!("c{i}");
        let (client, _) = server.connect_with(Connect { will: Some(will), ..connect(V5, &id) }).await;
        drop(client);
        assert_eq!(reader.got().await.topic, topic, "it goes out all the same");
    }
    assert_eq!(server.front.stats().retained_messages, 3);
    assert_eq!(store.load_retained().unwrap().len(), 3);
}

#[tokio::test]
async fn a_will_reaches_more_subscribers_than_one_poll_serves() {
    let server =
        Server::with(Settings { memory_bytes_max: 1024 * MIB, ..Settings::default() }, &nothing_stored()).await;
    let mut readers = Vec::new();
    for i in 0..200 {
        let mut reader = server.connect(V5, &format!("r{i}")).await;
        reader.subscribe("w", AtMostOnce).await;
        readers.push(reader);
    }
    // One poll serves some 160 subscribers with as much.
    let text = "x".repeat(60_000);
    let properties = PublishProperties { user: vec![("k", text.as_str()); 14], ..PublishProperties::default() };
    let will = Will { topic: "w", payload: b"last words", qos: AtMostOnce, retain: false, delay_secs: 0, properties };
    let (client, _) = server.connect_with(Connect { will: Some(will), ..connect(V5, "c") }).await;
    drop(client);
    for reader in &mut readers {
        assert_eq!(reader.got().await.payload, b"last words");
    }
    server.stats(|stats| stats.memory_bytes[0] == 0).await;
}

/// A 3.1.1 client is bound by no receive maximum.
#[tokio::test]
async fn packet_ids_that_are_never_released_are_bounded_together() {
    let server = Server::with(Settings { memory_bytes_max: MIB, ..Settings::default() }, &nothing_stored()).await;
    let mut bytes = Vec::new();
    for id in 1..=20_000 {
        Packet::Publish(publish("t", b"x", ExactlyOnce, id)).encode(V4, &mut bytes).unwrap();
    }
    let mut hogs = Vec::new();
    for i in 0..10 {
        let mut hog = server.connect(V4, &format!("hog{i}")).await;
        // The client is disconnected when it has opened too many.
        let _ = hog.stream.write_all(&bytes).await;
        hogs.push(hog);
    }
    server.stats(|stats| stats.connections == 0).await;
    innocent(&server).await;
    server.stats(|stats| used(stats) == 0).await;
}
