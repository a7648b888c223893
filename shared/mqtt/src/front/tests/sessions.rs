use super::*;

fn with_will<'a>(mut connect: Connect<'a>, delay_secs: u32) -> Connect<'a> {
    connect.will = Some(Will {
        topic: "will",
        payload: b"gone",
        qos: AtLeastOnce,
        retain: false,
        delay_secs,
        properties: PublishProperties::default(),
    });
    connect
}

#[tokio::test]
async fn an_offline_session_gets_its_messages_when_it_comes_back() {
    for version in [V4, V5] {
        let server = Server::start(&nothing_stored()).await;
        let (mut client, present) = server.connect_with(kept(version, "k")).await;
        assert!(!present);
        client.subscribe("t", AtLeastOnce).await;
        let mut publisher = server.connect(V4, "p").await;
        publisher.publish("t", b"0", AtLeastOnce, 1).await;
        publisher.expect_puback(1).await;
        // Delivered and not acknowledged: comes again, marked.
        let frame = client.recv().await;
        let Packet::Publish(first) = client.read(&frame) else { panic!() };
        assert!(!first.dup);
        drop(client);
        server.stats(|stats| stats.connections == 1).await;
        for (id, payload) in [(2, b"1"), (3, b"2")] {
            publisher.publish("t", payload, AtLeastOnce, id).await;
            publisher.expect_puback(id).await;
        }
        publisher.publish("t", b"not kept", AtMostOnce, 0).await;
        publisher.ping().await;
        let (mut client, present) = server.connect_with(kept(version, "k")).await;
        assert!(present);
        let got = [client.got().await, client.got().await, client.got().await];
        assert_eq!(got.clone().map(|got| (got.payload[0], got.dup)), [(b'0', true), (b'1', false), (b'2', false)]);
        client.ping().await;
        // A clean start forgets it all.
        let (mut client, present) = server.connect_with(connect(version, "k")).await;
        assert!(!present);
        publisher.publish("t", b"3", AtLeastOnce, 4).await;
        publisher.expect_puback(4).await;
        client.ping().await;
    }
}

#[tokio::test]
async fn subscriptions_of_a_kept_session_survive_a_restart() {
    let store = nothing_stored();
    let server = Server::start(&store).await;
    let (mut client, _) = server.connect_with(kept(V5, "k")).await;
    let options = SubscribeOptions { qos: AtLeastOnce, retain_as_published: true, ..SubscribeOptions::default() };
    client.subscribe_with(1, &[("t/#", options)], Some(5)).await;
    let server = Server::start(&store).await;
    let (mut client, present) = server.connect_with(kept(V5, "k")).await;
    assert!(present);
    let mut publisher = server.connect(V4, "p").await;
    publisher.send(&Packet::Publish(retained("t/1", b"x", AtMostOnce, 0))).await;
    let got = client.got().await;
    assert_eq!((got.retain, got.subscription_ids), (true, vec![5]));
}

#[tokio::test]
async fn a_second_connection_takes_the_session_over() {
    let server = Server::start(&nothing_stored()).await;
    let (mut first, _) = server.connect_with(with_will(kept(V5, "k"), 0)).await;
    first.subscribe("t", AtLeastOnce).await;
    let mut watcher = server.connect(V4, "w").await;
    watcher.subscribe("will", AtMostOnce).await;
    let (mut second, present) = server.connect_with(kept(V5, "k")).await;
    assert!(present);
    first.expect_end(Reason::SESSION_TAKEN_OVER).await;
    assert_eq!(watcher.got_payload().await, "gone");
    watcher.publish("t", b"x", AtLeastOnce, 1).await;
    assert_eq!(second.got_payload().await, "x");
    // Many at once: one is left, and it works.
    let mut all = vec![];
    for _ in 0..20 {
        let mut client = server.raw().await;
        client.send(&Packet::Connect(Box::new(kept(V5, "k")))).await;
        all.push(client);
    }
    let stats = server.stats(|stats| stats.connections == 2).await;
    assert_eq!(stats.sessions, 2);
    watcher.publish("t", b"y", AtLeastOnce, 2).await;
    watcher.expect_puback(1).await;
    watcher.expect_puback(2).await;
    let mut delivered = 0;
    for mut client in all {
        while let Ok(Some(frame)) = tokio::time::timeout(Duration::from_millis(50), client.try_recv()).await {
            delivered += usize::from(frame[0] >> 4 == 3);
        }
    }
    assert_eq!(delivered, 1);
}

#[tokio::test]
async fn a_will_is_published_when_the_connection_is_lost_and_not_after_disconnect() {
    let server = Server::start(&MemoryStore::at_once(|_| Verdict::Store)).await;
    let mut watcher = server.connect(V5, "w").await;
    watcher.subscribe("will", AtLeastOnce).await;

    let (client, _) = server.connect_with(with_will(connect(V4, "lost"), 0)).await;
    drop(client);
    assert_eq!(watcher.got_payload().await, "gone");

    let (mut client, _) = server.connect_with(with_will(connect(V4, "polite"), 0)).await;
    client.send(&Packet::Disconnect(Disconnect::default())).await;
    assert_eq!(client.try_recv().await, None);
    server.stats(|stats| stats.connections == 1).await;
    watcher.ping().await;

    let (mut client, _) = server.connect_with(with_will(connect(V5, "asks"), 0)).await;
    client.send(&Packet::Disconnect(Disconnect { reason: Reason::DISCONNECT_WITH_WILL, properties: None })).await;
    assert_eq!(watcher.got_payload().await, "gone");

    // Delayed: the session that comes back in time cancels it; the one that ends does not wait for it.
    let (client, _) = server.connect_with(with_will(kept(V5, "delayed"), 1000)).await;
    drop(client);
    server.stats(|stats| stats.connections == 1).await;
    let (client, present) = server.connect_with(kept(V5, "delayed")).await;
    assert!(present);
    drop(client);
    server.stats(|stats| stats.connections == 1).await;
    watcher.ping().await;
    let (client, _) = server.connect_with(with_will(kept(V5, "delayed"), 1000)).await;
    drop(client);
    server.stats(|stats| stats.connections == 1).await;
    server.connect(V5, "delayed").await;
    assert_eq!(watcher.got_payload().await, "gone");
    let (client, _) = server.connect_with(with_will(kept(V5, "short"), 1)).await;
    drop(client);
    assert_eq!(watcher.got_payload().await, "gone");
}

#[tokio::test]
async fn a_session_ends_when_its_time_is_over() {
    let server = Server::start(&nothing_stored()).await;
    let mut short = kept(V5, "k");
    short.properties.session_expiry_secs = Some(1);
    let (mut client, _) = server.connect_with(short.clone()).await;
    client.subscribe("t", AtLeastOnce).await;
    drop(client);
    let stats = server.stats(|stats| stats.sessions == 0).await;
    assert_eq!(stats.subscriptions, 0);
    let (mut client, present) = server.connect_with(short).await;
    assert!(!present);
    // DISCONNECT may shorten it to nothing.
    let properties = Some(Box::new(Properties { session_expiry_secs: Some(0), ..Properties::default() }));
    client.send(&Packet::Disconnect(Disconnect { reason: Reason::SUCCESS, properties })).await;
    server.stats(|stats| stats.sessions == 0).await;
}

#[tokio::test]
async fn silence_beyond_the_keep_alive_ends_the_connection() {
    let server = Server::start(&nothing_stored()).await;
    let mut quick = connect(V5, "c");
    quick.keep_alive_secs = 1;
    let (mut client, _) = server.connect_with(quick).await;
    client.expect_end(Reason::KEEP_ALIVE_TIMEOUT).await;
}

#[tokio::test]
async fn the_server_names_the_nameless_and_tells_its_limits() {
    let settings = Settings { keep_alive_secs_max: 30, receive_maximum: 7, ..Settings::default() };
    let server = Server::with(settings, &nothing_stored()).await;
    let mut client = server.raw().await;
    client.send(&Packet::Connect(Box::new(connect(V5, "")))).await;
    let frame = client.recv().await;
    let Packet::ConnAck(ack) = client.read(&frame) else { panic!() };
    let p = ack.properties;
    assert!(p.assigned_client_id.is_some_and(|id| id.len() > 20));
    assert_eq!((p.server_keep_alive_secs, p.receive_maximum, p.topic_alias_maximum), (Some(30), Some(7), Some(16)));
    assert_eq!((p.maximum_packet_size, p.shared_subscription_available), (Some(1 << 20), Some(false)));
    let mut old = server.raw().await;
    old.version = V4;
    old.send(&Packet::Connect(Box::new(kept(V4, "")))).await;
    assert_eq!(old.recv().await, [0x20, 2, 0, 2]);
    assert_eq!(old.try_recv().await, None);
}

#[tokio::test]
async fn what_all_sessions_queue_together_is_bounded() {
    let settings = Settings { memory_bytes_max: 64 << 10, ..Settings::default() };
    let server = Server::with(settings, &nothing_stored()).await;
    for id in ["a", "b", "c"] {
        let (mut client, _) = server.connect_with(kept(V5, id)).await;
        client.subscribe("t", AtLeastOnce).await;
    }
    let mut publisher = server.connect(V4, "p").await;
    server.stats(|stats| stats.connections == 1).await;
    for id in 1..=20 {
        publisher.publish("t", &[0; 900], AtLeastOnce, id).await;
        publisher.expect_puback(id).await;
    }
    let stats = server.front.stats();
    assert!((10_000..40_000).contains(&stats.queued_bytes()), "{stats:?}");
    assert!(stats.dropped_queue_full_total > 30, "{stats:?}");
    for id in ["a", "b", "c"] {
        server.connect(V5, id).await;
    }
    assert_eq!(server.front.stats().queued_bytes(), 0);
}

#[tokio::test]
async fn only_users_connect_where_there_are_some() {
    let user = User { name: "device".into(), password: shared::config::Secret::new("right".to_owned()) };
    let server = Server::with(Settings { users: vec![user], ..Settings::default() }, &nothing_stored()).await;
    for (username, password, known) in [
        (Some("device"), Some(&b"right"[..]), true),
        (Some("device"), Some(b"wrong"), false),
        (Some("device"), None, false),
        (Some("other"), Some(b"right"), false),
        (None, None, false),
    ] {
        for version in [V4, V5] {
            let mut client = server.raw().await;
            client.version = version;
            client.send(&Packet::Connect(Box::new(Connect { username, password, ..connect(version, "c") }))).await;
            let frame = client.recv().await;
            let Packet::ConnAck(ack) = client.read(&frame) else { panic!() };
            let refused = if version == V5 { Reason::BAD_USER_NAME_OR_PASSWORD } else { Reason(4) };
            assert_eq!(ack.reason, if known { Reason::SUCCESS } else { refused }, "{username:?} {password:?}");
        }
    }
}
