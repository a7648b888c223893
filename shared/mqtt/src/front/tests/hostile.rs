use std::task::Poll;

use super::*;
use proptest::prelude::*;
use shared::config::Secret;

#[tokio::test]
async fn more_than_the_receive_maximum_ends_the_connection() {
    let store = MemoryStore::manual(|_| Verdict::Store);
    let settings = Settings { receive_maximum: 3, ..Settings::default() };
    let server = Server::with(settings, &store).await;
    let mut device = server.connect(V5, "d").await;
    for id in 1..=4 {
        device.publish("t", b"x", AtLeastOnce, id).await;
    }
    device.expect_end(Reason::RECEIVE_MAXIMUM_EXCEEDED).await;
    assert_eq!(store.published().len(), 3);
    // A 3.1.1 client does not know the limit: the rest waits in its socket.
    let mut old = server.connect(V4, "old").await;
    for id in 1..=10 {
        old.publish("t", b"x", AtLeastOnce, id).await;
    }
    server.stats(|stats| stats.held_acks >= 3).await;
    store.commit_always();
    for id in 1..=10 {
        old.expect_puback(id).await;
    }
}

#[tokio::test]
async fn what_breaks_the_protocol_is_told_why() {
    let server = Server::start(&nothing_stored()).await;
    let cases: &[(&[u8], Reason)] = &[
        (&[0x00, 0x00], Reason::MALFORMED_PACKET),
        (&[0xC1, 0x00], Reason::MALFORMED_PACKET),
        (&[0x36, 0x00], Reason::MALFORMED_PACKET),
        (&[0x30, 0xFF, 0xFF, 0xFF, 0x7F], Reason::PACKET_TOO_LARGE),
        (&[0x30, 0x80, 0x80, 0x80, 0x80, 0x01], Reason::MALFORMED_PACKET),
        (b"\x30\x04\x00\x01+\x00", Reason::TOPIC_NAME_INVALID),
        (b"\x30\x07\x00\x01a\x03\x23\x00\x63", Reason::TOPIC_ALIAS_INVALID),
        (b"\x30\x06\x00\x01a\x02\x0b\x05", Reason::PROTOCOL_ERROR),
        (b"\x10\x0d\x00\x04MQTT\x05\x02\x00\x00\x00\x00\x00", Reason::PROTOCOL_ERROR),
        (&[0x20, 3, 0, 0, 0], Reason::PROTOCOL_ERROR),
        (&[0xD0, 0], Reason::PROTOCOL_ERROR),
        (&[0xF0, 0], Reason::PROTOCOL_ERROR),
        (&[0x82, 3, 0, 1, 0], Reason::PROTOCOL_ERROR),
        (&[0x40, 2, 0, 0], Reason::PROTOCOL_ERROR),
        (b"\xe0\x07\x00\x05\x11\x00\x00\x00\x05", Reason::PROTOCOL_ERROR),
    ];
    for (bytes, reason) in cases {
        let mut client = server.connect(V5, "c").await;
        // What stood before the bad packet in the same buffer still counts.
        let mut all = b"\x32\x06\x00\x01t\x00\x07\x00".to_vec();
        all.extend_from_slice(bytes);
        client.send_bytes(&all).await;
        let frame = client.recv().await;
        let disconnect = if frame[0] == 0x40 { client.recv().await } else { frame };
        let Packet::Disconnect(disconnect) = client.read(&disconnect) else { panic!("{bytes:?}") };
        assert_eq!(disconnect.reason, *reason, "{bytes:02x?} {disconnect:?}");
        assert_eq!(client.try_recv().await, None);
    }
    let stats = server.stats(|stats| stats.connections == 0).await;
    assert_eq!((stats.protocol_errors_total, stats.sessions), (cases.len() as u64, 0));
    assert_eq!(stats.received_messages_total, cases.len() as u64);
}

#[tokio::test]
async fn before_connect_nothing_else_is_heard() {
    let settings = Settings { connect_timeout: Duration::from_millis(50), connections_max: 3, ..Settings::default() };
    let server = Server::with(settings, &nothing_stored()).await;
    for bytes in [&[0xC0, 0][..], &[0xFF; 8], b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00"] {
        let mut client = server.raw().await;
        client.send_bytes(bytes).await;
        assert_eq!(client.try_recv().await, None);
    }
    for (bytes, answer) in [
        (&b"\x10\x0e\x00\x06MQIsdp\x03\x02\x00\x0a\x00\x00"[..], [0x20, 2, 0, 1]),
        (b"\x10\x0c\x00\x04MQTT\x09\x02\x00\x0a\x00\x00", [0x20, 2, 0, 1]),
    ] {
        let mut client = server.raw().await;
        client.version = V4;
        client.send_bytes(bytes).await;
        assert_eq!(client.recv().await, answer);
        assert_eq!(client.try_recv().await, None);
    }
    let mut auth = connect(V5, "a");
    auth.properties.authentication_method = Some("SCRAM-SHA-256");
    let mut client = server.raw().await;
    client.send(&Packet::Connect(Box::new(auth))).await;
    let frame = client.recv().await;
    assert!(matches!(client.read(&frame), Packet::ConnAck(ack) if ack.reason == Reason::BAD_AUTHENTICATION_METHOD));
    // Nothing at all, and a packet that never ends.
    let mut silent = server.raw().await;
    assert_eq!(silent.try_recv().await, None);
    let mut endless = server.raw().await;
    endless.send_bytes(b"\x10\xff\x7f\x00\x04MQTT").await;
    assert_eq!(endless.try_recv().await, None);
    // One too many is closed at once.
    server.stats(|stats| stats.connections == 0).await;
    let mut all = vec![];
    for i in 0..3 {
        all.push(server.connect(V4, &i.to_string()).await);
    }
    assert_eq!(server.raw().await.try_recv().await, None);
    assert_eq!(server.front.stats().connections_refused_total, 1);
}

#[tokio::test]
async fn an_open_listener_must_say_so() {
    let front = Front::new(Settings::default(), Arc::new(nothing_stored())).unwrap();
    let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
    let error = front.serve(listener, None, ListenerSettings::default()).await.unwrap_err().to_string();
    assert!(error.contains("name who may connect") && error.contains("allow_anonymous"), "{error}");
}

#[tokio::test]
async fn a_packet_in_single_bytes_is_a_packet() {
    let server = Server::start(&nothing_stored()).await;
    let mut client = server.raw().await;
    let mut bytes = Vec::new();
    Packet::Connect(Box::new(connect(V5, "slow"))).encode(V5, &mut bytes).unwrap();
    Packet::Publish(publish("t", b"x", AtLeastOnce, 3)).encode(V5, &mut bytes).unwrap();
    for byte in bytes {
        client.send_bytes(&[byte]).await;
    }
    client.recv().await;
    client.expect_puback(3).await;
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever comes, the front lives on and serves the next client.
    #[test]
    fn any_bytes_leave_the_front_alive(
        bytes in prop::collection::vec(any::<u8>(), 0..600),
        first in prop::sample::select(vec![0x30u8, 0x32, 0x34, 0x62, 0x82, 0xA2, 0xE0, 0x50]),
        v5 in any::<bool>(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let server = Server::start(&nothing_stored()).await;
            let mut client = server.connect(if v5 { V5 } else { V4 }, "c").await;
            let mut all = vec![first, bytes.len().min(100) as u8];
            all.extend_from_slice(&bytes);
            client.send_bytes(&all).await;
            client.stream.shutdown().await.unwrap();
            while let Some(_frame) = client.try_recv().await {}
            server.stats(|stats| stats.connections == 0).await;
            let mut next = server.connect(V5, "next").await;
            next.ping().await;
        });
    }
}

#[tokio::test]
async fn a_client_that_only_asks_and_never_reads_is_not_read_from() {
    let settings = Settings { outbound_bytes_max: 16 << 10, ..Settings::default() };
    let server = Server::with(settings, &nothing_stored()).await;
    let mut deaf = server.connect(V4, "deaf").await;
    let pings = [0xC0, 0].repeat(32 << 10);
    // The sockets' buffers take some megabytes; then the writing must stop.
    let mut sent = 0;
    while let Ok(()) = tokio::time::timeout(Duration::from_millis(300), deaf.send_bytes(&pings)).await {
        sent += pings.len();
        assert!(sent < 256 << 20, "it is read from for ever");
    }
    server.connect(V5, "other").await.ping().await;
    // It reads at last: every answer is there, and it goes on.
    let mut rest = sent;
    let mut chunk = vec![0; 1 << 20];
    while rest > 0 {
        let n = tokio::time::timeout(PATIENCE, deaf.stream.read(&mut chunk)).await.unwrap().unwrap();
        assert!(n > 0);
        rest = rest.saturating_sub(n);
    }
}

#[tokio::test(start_paused = true)]
async fn who_is_being_closed_and_still_sends_is_read_from_slowly() {
    let mut endless = tokio::io::repeat(b'x').take(64 << 20);
    tokio::time::timeout(connection::GOODBYE, connection::drain(&mut endless)).await.unwrap_err();
    let read = (64 << 20) - endless.limit();
    assert!((500_000..2_000_000).contains(&read), "{read} bytes");
}

/// One worker that looks for sockets as often as the brokers' do.
fn worker() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().event_interval(4).enable_all().build().unwrap()
}

#[test]
fn a_turn_of_large_work_is_short() {
    worker().block_on(a_client_between_large_subscribes());
}

async fn a_client_between_large_subscribes() {
    let server = Server::start(&nothing_stored()).await;
    let busy = server.connect(V4, "busy").await;
    let mut other = server.connect(V4, "other").await;
    let all = 5_000;
    let filter = format!("a{}", "/l".repeat(100));
    let mut one = Vec::new();
    let subscribe = Subscribe {
        packet_id: 1,
        properties: Properties::default(),
        filters: vec![(&filter, SubscribeOptions::default())],
    };
    Packet::Subscribe(subscribe).encode(V4, &mut one).unwrap();
    let (mut answers, mut asks) = tokio::io::split(busy.stream);
    let asking = tokio::spawn(async move { asks.write_all(&one.repeat(all)).await.map(|()| asks) });
    let mut answer = [0; 5];
    answers.read_exact(&mut answer).await.unwrap();
    // A PINGREQ waits for some turns, each of which does 40 of these, and not all of a buffer, which holds 300.
    other.ping().await;
    let (mut done, mut more) = (1, vec![0; 5 * all]);
    // What is there at this moment: waiting would let the broker go on.
    let mut read = Box::pin(answers.read(&mut more));
    if let Poll::Ready(Ok(n)) = std::future::poll_fn(|cx| Poll::Ready(read.as_mut().poll(cx))).await {
        done += n / 5;
    }
    drop(read);
    assert!(done < 1_000, "{done} of {all} SUBSCRIBEs came before a PINGREQ");
    drop(asking.await.unwrap().unwrap());
}

#[test]
fn who_has_little_to_do_does_not_wait_for_all_who_have_much() {
    worker().block_on(async {
        let server = Server::start(&nothing_stored()).await;
        let mut other = server.connect(V4, "other").await;
        // A read takes two of these.
        let topic = "l".repeat(1_000);
        let mut one = Vec::new();
        Packet::Publish(publish(&topic, &[0; 30_000], AtMostOnce, 0)).encode(V4, &mut one).unwrap();
        let mut busy = Vec::new();
        for n in 0..100 {
            let mut stream = std::net::TcpStream::connect(server.address).unwrap();
            let mut hello = Vec::new();
            Packet::Connect(Box::new(connect(V4, &format!("busy-{n}")))).encode(V4, &mut hello).unwrap();
            std::io::Write::write_all(&mut stream, &hello).unwrap();
            stream.set_nonblocking(true).unwrap();
            busy.push(stream);
        }
        server.stats(|stats| stats.sessions == 101).await;
        // All of them have much to do before the broker gets to do any of it.
        let all = one.repeat(60);
        for stream in &mut busy {
            let _ = std::io::Write::write(stream, &all).unwrap();
        }
        other.ping().await;
        let done = server.front.stats().received_messages_total;
        // A turn reads two of these, and each of a hundred would have had two turns at least.
        assert!(done < 60, "{done} messages of others came before a PINGREQ");
        server.stats(|stats| stats.received_messages_total > 400).await;
    });
}

#[tokio::test]
async fn one_dear_packet_waits_for_a_lane_and_cheap_ones_do_not() {
    let server = Server::start(&nothing_stored()).await;
    let mut greedy = server.connect(V4, "greedy").await;
    let mut other = server.connect(V4, "other").await;
    let lane = server.front.lanes.enter().await;
    // Not long: one read has all of it.
    let filters: Vec<_> = (0..40).map(|n| format!("{n}{}", "/l".repeat(25))).collect();
    let filters = filters.iter().map(|filter| (filter.as_str(), SubscribeOptions::default())).collect();
    let subscribe = Subscribe { packet_id: 1, properties: Properties::default(), filters };
    greedy.send(&Packet::Subscribe(subscribe)).await;
    // Nobody gives the lane back meanwhile: what is cheap is done on credit, which takes a millisecond to grow.
    tokio::time::sleep(Duration::from_millis(5)).await;
    other.ping().await;
    tokio::time::sleep(Duration::from_millis(5)).await;
    other.subscribe("cheap", AtMostOnce).await;
    assert_eq!(server.front.stats().subscriptions, 1);
    drop(lane);
    server.stats(|stats| stats.subscriptions == 41).await;
}

#[tokio::test]
async fn ending_a_session_of_many_filters_waits_for_a_lane() {
    let server = Server::start(&nothing_stored()).await;
    let (mut client, _) = server.connect_with(kept(V4, "many")).await;
    let filters: Vec<_> = (0..100).map(|n| format!("a/{n}")).collect();
    let filters: Vec<_> = filters.iter().map(|filter| (filter.as_str(), SubscribeOptions::default())).collect();
    client.subscribe_with(1, &filters, None).await;
    drop(client);
    server.stats(|stats| stats.connections == 0).await;
    let lane = server.front.lanes.enter().await;
    let mut again = server.raw().await;
    again.version = V4;
    again.send(&Packet::Connect(Box::new(connect(V4, "many")))).await;
    let mut other = server.connect(V4, "other").await;
    tokio::time::sleep(Duration::from_millis(5)).await;
    other.ping().await;
    assert_eq!(server.front.stats().subscriptions, 100);
    drop(lane);
    let frame = again.recv().await;
    assert!(
        matches!(again.read(&frame), Packet::ConnAck(ack) if ack.reason == Reason::SUCCESS && !ack.session_present)
    );
    assert_eq!(server.front.stats().subscriptions, 0);
}

#[tokio::test]
async fn what_is_left_of_who_is_gone_waits_for_a_lane() {
    let server = Server::start(&nothing_stored()).await;
    let mut subscribers = Vec::new();
    for n in 0..60 {
        let mut client = server.connect(V4, &n.to_string()).await;
        client.subscribe("gone", AtLeastOnce).await;
        subscribers.push(client);
    }
    let will = Will {
        topic: "gone",
        payload: b"x",
        qos: AtLeastOnce,
        retain: false,
        delay_secs: 0,
        properties: PublishProperties::default(),
    };
    let hello = Connect { will: Some(will), ..connect(V4, "many") };
    let (mut many, _) = server.connect_with(hello).await;
    let filters: Vec<_> = (0..100).map(|n| format!("a/{n}")).collect();
    let filters: Vec<_> = filters.iter().map(|filter| (filter.as_str(), SubscribeOptions::default())).collect();
    many.subscribe_with(1, &filters, None).await;
    let lane = server.front.lanes.enter().await;
    drop(many);
    // The first subscribers have the will; the others wait, and the filters stay.
    let stats = server.stats(|stats| stats.connections == 60 && stats.sent_messages_total > 0).await;
    assert!(stats.sent_messages_total < 60, "{stats:?}");
    assert_eq!(stats.subscriptions, 160);
    drop(lane);
    server.stats(|stats| stats.sent_messages_total == 60 && stats.subscriptions == 60).await;
}

#[test]
fn a_hundred_new_connections_are_not_all_taken_before_others_are_served() {
    worker().block_on(async {
        let server = Server::start(&nothing_stored()).await;
        let mut other = server.connect(V4, "other").await;
        other.ping().await;
        let before = server.front.stats().connections_total;
        // They are connected before the broker gets to run.
        let new: Vec<_> = (0..100).map(|_| std::net::TcpStream::connect(server.address).unwrap()).collect();
        other.ping().await;
        let taken = server.front.stats().connections_total - before;
        assert!(taken < 30, "{taken} connections were taken before a PINGREQ");
        server.stats(|stats| stats.connections_total == before + 100).await;
        drop(new);
    });
}

#[tokio::test]
async fn unfinished_large_packets_are_bounded_together() {
    let settings = Settings { memory_bytes_max: 8 << 20, ..Settings::default() };
    let server = Server::with(settings, &nothing_stored()).await;
    // Each announces a megabyte and sends all of it but the last byte.
    let mut bytes = Vec::new();
    Packet::Publish(publish("big", &vec![0; 900_000], AtMostOnce, 0)).encode(V5, &mut bytes).unwrap();
    bytes.pop();
    let mut clients = Vec::new();
    for i in 0..6 {
        let mut client = server.connect(V5, &i.to_string()).await;
        // One that is refused may find its connection closed while it sends.
        let _ = client.stream.write_all(&bytes).await;
        clients.push(client);
    }
    let stats = server.stats(|stats| stats.connections <= 3).await;
    assert!(stats.input_bytes() <= 4 << 20, "{stats:?}");
    let mut small = server.connect(V4, "small").await;
    small.publish("t", b"x", AtLeastOnce, 1).await;
    small.expect_puback(1).await;
    drop(clients);
    server.stats(|stats| stats.input_bytes() == 0).await;
}

#[tokio::test]
async fn a_bug_ends_one_connection_and_its_session_can_be_had_again() {
    let store = MemoryStore::at_once(|topic| if topic == "bug" { panic!("as arranged") } else { Verdict::Store });
    let server = Server::start(&store).await;
    let (mut device, _) = server.connect_with(kept(V5, "d")).await;
    let mut other = server.connect(V4, "o").await;
    device.publish("bug", b"x", AtLeastOnce, 1).await;
    device.expect_end(Reason::IMPLEMENTATION_SPECIFIC_ERROR).await;
    let (mut device, present) = server.connect_with(kept(V5, "d")).await;
    assert!(present);
    device.publish("fine", b"x", AtLeastOnce, 1).await;
    device.expect_puback(1).await;
    other.ping().await;
    drop((device, other));
    server.stats(|stats| stats.connections == 0).await;
}

#[tokio::test]
async fn wrong_passwords_wait_and_right_ones_never() {
    let user = |name: &str| User { name: name.to_owned(), password: Secret::new(format!("{name}'s")) };
    let settings = Settings { users: vec![user("a"), user("b")], ..Settings::default() };
    let server = Server::with(settings, &nothing_stored()).await;
    let with = |client: &'static str, name: &'static str, password: &'static [u8]| {
        let mut connect = connect(V5, client);
        (connect.username, connect.password) = (Some(name), Some(password));
        connect
    };
    let mut guessing = Vec::new();
    for n in 0..20 {
        let mut client = server.raw().await;
        client.send(&Packet::Connect(Box::new(with("guess", "a", b"wrong")))).await;
        // One after the other, so that each failure is one more.
        while server.front.failed_logins() <= n {
            tokio::task::yield_now().await;
        }
        guessing.push(client);
    }
    // Nobody is locked out: neither the same user from the same address, nor others.
    for name in ["a", "b"] {
        let password: &[u8] = if name == "a" { b"a's" } else { b"b's" };
        let (_client, present) = server.connect_with(with("right", name, password)).await;
        assert!(!present);
    }
    // The first of the wrong ones is answered after its delay, and those beyond the bound are closed without an answer.
    let frame = guessing[0].recv().await;
    let Packet::ConnAck(ack) = guessing[0].read(&frame) else { panic!("{frame:?}") };
    assert_eq!(ack.reason, Reason::BAD_USER_NAME_OR_PASSWORD);
    assert_eq!(guessing[19].try_recv().await, None);
}
