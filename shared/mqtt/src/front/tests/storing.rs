use super::*;

#[tokio::test]
async fn acknowledgements_wait_for_the_commit_and_deliveries_do_not() {
    let store = MemoryStore::manual(|topic| if topic == "free" { Verdict::NotStored } else { Verdict::Store });
    let server = Server::start(&store).await;
    let mut subscriber = server.connect(V4, "s").await;
    subscriber.subscribe("#", AtMostOnce).await;
    let mut publisher = server.connect(V5, "p").await;
    publisher.publish("a", b"1", AtLeastOnce, 1).await;
    publisher.publish("free", b"2", AtLeastOnce, 2).await;
    publisher.publish("a", b"3", ExactlyOnce, 3).await;
    for expected in ["1", "2", "3"] {
        assert_eq!(subscriber.got_payload().await, expected);
    }
    // Nothing is durable: no acknowledgement, not even of what needs none, for it would leave before its turn.
    publisher.ping().await;
    assert_eq!(server.stats(|stats| stats.held_acks == 3).await.held_acks, 3);
    store.commit_to(1);
    publisher.expect_puback(1).await;
    publisher.expect_puback(2).await;
    publisher.ping().await;
    store.commit();
    publisher.expect(Packet::PubRec(Ack::new(3, Reason::SUCCESS))).await;
    assert_eq!(server.stats(|stats| stats.held_acks == 0).await.received_messages_total, 3);
}

#[tokio::test]
async fn a_repeated_qos_2_publish_is_stored_once_also_over_a_restart() {
    let store = MemoryStore::manual(|_| Verdict::Store);
    store.commit_always();
    let server = Server::start(&store).await;
    let (mut device, present) = server.connect_with(kept(V4, "d")).await;
    assert!(!present);
    device.publish("t", b"once", ExactlyOnce, 5).await;
    device.expect(Packet::PubRec(Ack::new(5, Reason::SUCCESS))).await;
    drop(device);
    for restart in [false, true] {
        let server =
            if restart { Server::start(&store).await } else { Server { front: server.front.clone(), ..server } };
        let (mut device, present) = server.connect_with(kept(V4, "d")).await;
        assert!(present);
        let mut again = publish("t", b"once", ExactlyOnce, 5);
        again.dup = true;
        device.send(&Packet::Publish(again)).await;
        device.expect(Packet::PubRec(Ack::new(5, Reason::SUCCESS))).await;
        assert_eq!(store.published().len(), 1);
        if restart {
            device.send(&Packet::PubRel(Ack::new(5, Reason::SUCCESS))).await;
            device.expect(Packet::PubComp(Ack::new(5, Reason::SUCCESS))).await;
            device.publish("t", b"next", ExactlyOnce, 5).await;
            device.expect(Packet::PubRec(Ack::new(5, Reason::SUCCESS))).await;
            assert_eq!(store.published().len(), 2);
        }
    }
}

#[tokio::test]
async fn a_repeat_does_not_overtake_the_commit_of_the_first() {
    let store = MemoryStore::manual(|_| Verdict::Store);
    let server = Server::start(&store).await;
    let mut device = server.connect(V4, "d").await;
    device.publish("t", b"x", ExactlyOnce, 5).await;
    device.publish("t", b"x", ExactlyOnce, 5).await;
    device.ping().await;
    assert_eq!(store.published().len(), 1);
    store.commit();
    for _ in 0..2 {
        device.expect(Packet::PubRec(Ack::new(5, Reason::SUCCESS))).await;
    }
    // PUBCOMP leaves when the release is durable; without a kept session there is nothing to release.
    device.send(&Packet::PubRel(Ack::new(5, Reason::SUCCESS))).await;
    device.expect(Packet::PubComp(Ack::new(5, Reason::SUCCESS))).await;
}

#[tokio::test]
async fn pubcomp_waits_until_the_forgotten_id_is_durable() {
    let store = MemoryStore::manual(|_| Verdict::Store);
    let server = Server::start(&store).await;
    let connecting = server.connect_with(kept(V5, "d"));
    tokio::pin!(connecting);
    // CONNACK waits for the stored session.
    let (mut device, _) = loop {
        tokio::select! {
            biased;
            done = &mut connecting => break done,
            () = tokio::task::yield_now() => if store.tickets() == 1 { store.commit() },
        }
    };
    device.publish("t", b"x", ExactlyOnce, 5).await;
    device.ping().await;
    store.commit();
    device.expect(Packet::PubRec(Ack::new(5, Reason::SUCCESS))).await;
    device.send(&Packet::PubRel(Ack::new(5, Reason::SUCCESS))).await;
    device.ping().await;
    store.commit();
    device.expect(Packet::PubComp(Ack::new(5, Reason::SUCCESS))).await;
}

#[tokio::test]
async fn a_held_publish_waits_for_room_while_pings_are_answered() {
    for version in [V4, V5] {
        let store = MemoryStore::at_once(|topic| if topic == "full" { Verdict::Hold } else { Verdict::Store });
        let server = Server::start(&store).await;
        let mut subscriber = server.connect(V4, "s").await;
        subscriber.subscribe("#", AtMostOnce).await;
        let mut device = server.connect(version, "d").await;
        device.publish("a", b"1", AtLeastOnce, 1).await;
        device.publish("full", b"2", AtLeastOnce, 2).await;
        device.publish("a", b"3", AtMostOnce, 0).await;
        device.expect_puback(1).await;
        device.ping().await;
        device.publish("a", b"4", AtLeastOnce, 4).await;
        device.ping().await;
        assert_eq!(subscriber.got_payload().await, "1");
        subscriber.ping().await; // not delivered, and what follows keeps its place
        assert_eq!(server.stats(|stats| stats.held_messages == 3).await.held_messages, 3);
        store.set_verdict(|_| Verdict::Store);
        device.expect_puback(2).await;
        device.expect_puback(4).await;
        for expected in ["2", "3", "4"] {
            assert_eq!(subscriber.got_payload().await, expected);
        }
        let stored: Vec<_> = store.published().into_iter().map(|(.., payload, _)| payload).collect();
        assert_eq!(stored, [b"1", b"2", b"3", b"4"]);
    }
}

#[tokio::test]
async fn what_finds_no_room_in_time_ends_the_connection() {
    for version in [V4, V5] {
        let store = MemoryStore::at_once(|_| Verdict::Hold);
        let settings = Settings { hold_timeout: Duration::from_millis(20), ..Settings::default() };
        let server = Server::with(settings, &store).await;
        let mut device = server.connect(version, "d").await;
        device.publish("full", b"1", AtLeastOnce, 1).await;
        device.expect_end(Reason::QUOTA_EXCEEDED).await;
        assert_eq!(server.stats(|stats| stats.held_messages == 0).await.hold_timeouts_total, 1);
    }
}

#[tokio::test]
async fn reading_stops_when_enough_is_held() {
    let store = MemoryStore::at_once(|_| Verdict::Hold);
    let settings = Settings { held_bytes_max: 100 << 10, ..Settings::default() };
    let server = Server::with(settings, &store).await;
    let mut device = server.connect(V4, "d").await;
    let payload = vec![7; 10 << 10];
    let mut bytes = Vec::new();
    for _ in 0..100 {
        Packet::Publish(publish("full", &payload, AtMostOnce, 0)).encode(V4, &mut bytes).unwrap();
    }
    Packet::PingReq.encode(V4, &mut bytes).unwrap();
    let writing = async {
        device.send_bytes(&bytes).await;
        device.expect(Packet::PingResp).await;
    };
    let watching = async {
        let stats = server.stats(|stats| stats.held_messages >= 10).await;
        assert!(stats.held_messages <= 23, "{stats:?}"); // the bound, and one read buffer
        store.set_verdict(|_| Verdict::Store);
    };
    tokio::join!(writing, watching);
    assert_eq!(store.published().len(), 100);
}

#[tokio::test]
async fn a_refused_publish_is_neither_stored_nor_retained_nor_delivered() {
    let store = MemoryStore::at_once(|topic| match topic {
        "full" => Verdict::Refuse(Refusal::QuotaExceeded),
        _ => Verdict::Store,
    });
    let server = Server::start(&store).await;
    let mut subscriber = server.connect(V4, "s").await;
    subscriber.subscribe("#", AtMostOnce).await;
    let mut device = server.connect(V5, "d").await;
    device.publish("a", b"1", AtLeastOnce, 1).await;
    device.send(&Packet::Publish(retained("full", b"2", AtLeastOnce, 2))).await;
    device.send(&Packet::Publish(retained("full", b"3", ExactlyOnce, 3))).await;
    device.publish("a", b"4", AtLeastOnce, 4).await;
    device.expect_puback(1).await;
    device.expect(Packet::PubAck(Ack::new(2, Reason::QUOTA_EXCEEDED))).await;
    device.expect(Packet::PubRec(Ack::new(3, Reason::QUOTA_EXCEEDED))).await;
    device.expect_puback(4).await;
    assert_eq!([subscriber.got_payload().await, subscriber.got_payload().await], ["1", "4"]);
    assert_eq!(server.front.stats().retained_messages, 0);
    // The refused id is free.
    device.publish("a", b"5", ExactlyOnce, 3).await;
    device.expect(Packet::PubRec(Ack::new(3, Reason::SUCCESS))).await;

    let mut old = server.connect(V4, "old").await;
    old.publish("full", b"6", AtLeastOnce, 1).await;
    old.expect_end(Reason::QUOTA_EXCEEDED).await;
}

#[tokio::test]
async fn a_failed_store_ends_connections_without_the_acknowledgements() {
    for version in [V4, V5] {
        let store = MemoryStore::manual(|_| Verdict::Store);
        let server = Server::start(&store).await;
        let mut device = server.connect(version, "d").await;
        device.publish("a", b"1", AtLeastOnce, 1).await;
        device.ping().await;
        store.fail("the disk is gone");
        device.expect_end(Reason::IMPLEMENTATION_SPECIFIC_ERROR).await;
    }
}

#[tokio::test]
async fn retained_messages_are_bounded() {
    let settings = Settings { retained_messages_max: 2, ..Settings::default() };
    let store = MemoryStore::at_once(|_| Verdict::Store);
    let server = Server::with(settings, &store).await;
    let mut device = server.connect(V5, "d").await;
    for id in 1..=3u16 {
        device.send(&Packet::Publish(retained(&format!("t/{id}"), b"x", AtLeastOnce, id))).await;
        let reason = if id == 3 { Reason::QUOTA_EXCEEDED } else { Reason::SUCCESS };
        device.expect(Packet::PubAck(Ack::new(id, reason))).await;
    }
    device.send(&Packet::Publish(retained("t/1", b"y", AtLeastOnce, 4))).await;
    device.expect_puback(4).await;
    assert_eq!(store.published().len(), 3);
}

#[tokio::test]
async fn shutdown_lets_acknowledgements_leave_first() {
    let store = MemoryStore::manual(|_| Verdict::Store);
    let server = Server::start(&store).await;
    let mut device = server.connect(V5, "d").await;
    device.publish("a", b"1", AtLeastOnce, 1).await;
    device.ping().await;
    let stop = server.front.shutdown(PATIENCE);
    let client = async {
        // Told to stop, it does not read any more: wait for that by the order of things, not by time.
        store.commit();
        device.expect_puback(1).await;
        device.expect_end(Reason::SERVER_SHUTTING_DOWN).await;
    };
    tokio::join!(stop, client);
    assert_eq!(server.front.stats().connections, 0);
}

#[tokio::test]
async fn what_found_no_room_on_the_disk_is_not_acknowledged_and_is_taken_again_when_it_comes_again() {
    let store = MemoryStore::at_once(|_| Verdict::Store);
    let server = Server::start(&store).await;
    let (mut device, _) = server.connect_with(kept(V5, "d")).await;
    let mut other = server.connect(V5, "o").await;
    store.commit_never();
    device.publish("t", b"x", ExactlyOnce, 5).await;
    device.ping().await;
    let refused = store.tickets();
    other.publish("t", b"y", AtLeastOnce, 1).await;
    other.ping().await;
    store.refuse_ticket(refused);
    device.expect_end(Reason::IMPLEMENTATION_SPECIFIC_ERROR).await;
    store.commit_always();
    other.expect_puback(1).await;
    let (mut device, present) = server.connect_with(kept(V5, "d")).await;
    assert!(present);
    // The device sends it again: it was never stored, so it is no repetition.
    let mut again = publish("t", b"x", ExactlyOnce, 5);
    again.dup = true;
    device.send(&Packet::Publish(again)).await;
    device.expect(Packet::PubRec(Ack::new(5, Reason::SUCCESS))).await;
    assert_eq!(store.published().len(), 3);
}

#[tokio::test]
async fn when_sessions_have_reached_their_bound_new_ones_are_refused_and_the_others_go_on() {
    let store = MemoryStore::at_once(|_| Verdict::Store);
    let server = Server::start(&store).await;
    let (mut known, _) = server.connect_with(kept(V5, "known")).await;
    known.subscribe("a", AtLeastOnce).await;
    let (mut old, _) = server.connect_with(kept(V4, "old")).await;
    store.set_sessions_full(true);
    let filters = [("b", SubscribeOptions::default()), ("c", SubscribeOptions::default())];
    assert_eq!(known.subscribe_with(3, &filters, None).await, [Reason::QUOTA_EXCEEDED; 2]);
    assert_eq!(old.subscribe_with(3, &filters, None).await, [Reason(0x80); 2]);
    assert_eq!(server.front.stats().subscriptions, 1, "what was refused is not subscribed to");
    for (version, code) in [(V5, 0x97), (V4, 3)] {
        let mut new = server.raw().await;
        new.version = version;
        new.send(&Packet::Connect(Box::new(kept(version, "new")))).await;
        let frame = new.recv().await;
        let Packet::ConnAck(ack) = new.read(&frame) else { panic!("{frame:?}") };
        assert_eq!((ack.reason, ack.session_present), (Reason(code), false));
        assert_eq!(new.try_recv().await, None);
    }
    // Who leaves nothing behind, and who is known, is served.
    let mut clean = server.connect(V5, "clean").await;
    clean.subscribe("b", AtLeastOnce).await;
    drop(known);
    let (mut known, present) = server.connect_with(kept(V5, "known")).await;
    assert!(present);
    clean.publish("a", b"1", AtLeastOnce, 1).await;
    assert_eq!(known.got_payload().await, "1");
    assert_eq!(server.stats(|stats| stats.sessions == 3).await.sessions, 3, "what was refused is not kept");
}

#[tokio::test]
async fn each_change_of_a_session_is_a_row_of_its_own_and_the_order_of_leaving_outlives_a_restart() {
    let store = MemoryStore::at_once(|_| Verdict::Store);
    let server = Server::start(&store).await;
    let (mut first, _) = server.connect_with(kept(V5, "first")).await;
    let (second, _) = server.connect_with(kept(V5, "second")).await;
    first.subscribe("a", AtLeastOnce).await;
    let before = store.tickets();
    first.subscribe("b", AtLeastOnce).await;
    assert_eq!(store.tickets(), before + 1);
    drop(second);
    server.stats(|stats| stats.connections == 1).await;
    drop(first);
    server.stats(|stats| stats.connections == 0).await;
    let left = |store: &MemoryStore, client: &str| store.session(client).unwrap().left.map(|left| left.order);
    assert_eq!((left(&store, "second"), left(&store, "first")), (Some(1), Some(2)));
    let filters: Vec<_> = store.session("first").unwrap().subscriptions.into_iter().map(|one| one.filter).collect();
    assert_eq!(filters, ["a", "b"]);
    // The next start goes on counting.
    let server = Server::start(&store).await;
    let (second, _) = server.connect_with(kept(V5, "second")).await;
    assert_eq!(left(&store, "second"), None);
    drop(second);
    server.stats(|stats| stats.connections == 0).await;
    assert_eq!(left(&store, "second"), Some(3));
}
