use super::*;

#[tokio::test]
async fn every_qos_reaches_every_version() {
    let server = Server::start(&nothing_stored()).await;
    for (from, to) in [(V4, V4), (V4, V5), (V5, V4), (V5, V5)] {
        for sub_qos in [AtMostOnce, AtLeastOnce, ExactlyOnce] {
            let mut subscriber = server.connect(to, "s").await;
            subscriber.subscribe("t/+", sub_qos).await;
            let mut publisher = server.connect(from, "p").await;
            for (i, qos) in [AtMostOnce, AtLeastOnce, ExactlyOnce].into_iter().enumerate() {
                publisher.publish("t/x", b"hello", qos, 7).await;
                match qos {
                    AtMostOnce => {}
                    AtLeastOnce => publisher.expect_puback(7).await,
                    ExactlyOnce => {
                        publisher.expect(Packet::PubRec(Ack::new(7, Reason::SUCCESS))).await;
                        publisher.send(&Packet::PubRel(Ack::new(7, Reason::SUCCESS))).await;
                        publisher.expect(Packet::PubComp(Ack::new(7, Reason::SUCCESS))).await;
                    }
                }
                let got = subscriber.got().await;
                assert_eq!((&*got.topic, &*got.payload, got.qos), ("t/x", &b"hello"[..], qos.min(sub_qos)), "{i}");
                assert!(!got.retain && !got.dup);
            }
        }
    }
}

#[tokio::test]
async fn a_buffer_of_mixed_topics_keeps_its_order() {
    let server = Server::start(&nothing_stored()).await;
    let mut subscriber = server.connect(V5, "s").await;
    subscriber.subscribe("#", AtLeastOnce).await;
    let mut publisher = server.connect(V4, "p").await;
    let mut bytes = Vec::new();
    for i in 0..500u16 {
        let payload = i.to_string();
        let qos = if i % 3 == 0 { AtLeastOnce } else { AtMostOnce };
        let topic = format!("t/{}", i / 4 % 10);
        Packet::Publish(publish(&topic, payload.as_bytes(), qos, i + 1)).encode(V4, &mut bytes).unwrap();
    }
    publisher.send_bytes(&bytes).await;
    for i in 0..500u16 {
        let got = subscriber.got().await;
        assert_eq!((got.payload, got.topic), (i.to_string().into_bytes(), format!("t/{}", i / 4 % 10)));
    }
    for i in (0..500u16).step_by(3) {
        publisher.expect_puback(i + 1).await;
    }
}

#[tokio::test]
async fn retained_message_reaches_a_late_subscriber() {
    let store = nothing_stored();
    let server = Server::start(&store).await;
    let mut publisher = server.connect(V5, "p").await;
    publisher.send(&Packet::Publish(retained("a/1", b"one", AtLeastOnce, 1))).await;
    publisher.expect_puback(1).await;
    publisher.send(&Packet::Publish(retained("a/2", b"two", AtLeastOnce, 2))).await;
    publisher.expect_puback(2).await;
    publisher.send(&Packet::Publish(retained("a/2", b"", AtLeastOnce, 3))).await;
    publisher.expect_puback(3).await;

    let mut late = server.connect(V4, "late").await;
    late.subscribe("a/#", AtLeastOnce).await;
    let got = late.got().await;
    assert_eq!((&*got.topic, &*got.payload, got.retain, got.qos), ("a/1", &b"one"[..], true, AtLeastOnce));
    late.ping().await;

    // Live: RETAIN only for who asked for it as it was published.
    let mut as_published = server.connect(V5, "rap").await;
    let rap = SubscribeOptions {
        retain_as_published: true,
        retain_handling: RetainHandling::DoNotSend,
        ..SubscribeOptions::default()
    };
    as_published.subscribe_with(1, &[("a/#", rap)], None).await;
    publisher.send(&Packet::Publish(retained("a/1", b"new", AtMostOnce, 0))).await;
    assert!(as_published.got().await.retain);
    assert!(!late.got().await.retain);

    // After a restart the store still has it; "if new" sends it once.
    let server = Server::start(&store).await;
    let mut client = server.connect(V5, "c").await;
    let if_new = SubscribeOptions { retain_handling: RetainHandling::SendIfNew, ..SubscribeOptions::default() };
    client.subscribe_with(1, &[("a/+", if_new)], Some(77)).await;
    let got = client.got().await;
    assert_eq!((got.payload, got.retain, got.subscription_ids), (b"new".to_vec(), true, vec![77]));
    client.subscribe_with(2, &[("a/+", if_new)], None).await;
    client.ping().await;
}

#[tokio::test]
async fn subscription_options_of_mqtt_5() {
    let server = Server::start(&nothing_stored()).await;
    let mut client = server.connect(V5, "c").await;
    let no_local = SubscribeOptions { no_local: true, ..SubscribeOptions::default() };
    client.subscribe_with(1, &[("own", no_local)], None).await;
    client.publish("own", b"x", AtMostOnce, 0).await;
    client.ping().await;
    let mut other = server.connect(V5, "o").await;
    other.publish("own", b"y", AtMostOnce, 0).await;
    assert_eq!(client.got_payload().await, "y");

    // Overlapping subscriptions: one copy, the highest QoS, both identifiers.
    let options = |qos| SubscribeOptions { qos, ..SubscribeOptions::default() };
    client.subscribe_with(2, &[("o/#", options(AtMostOnce))], Some(1)).await;
    client.subscribe_with(3, &[("o/+", options(AtLeastOnce))], Some(300)).await;
    other.publish("o/1", b"z", AtLeastOnce, 1).await;
    let mut got = client.got().await;
    got.subscription_ids.sort();
    assert_eq!((got.qos, got.subscription_ids), (AtLeastOnce, vec![1, 300]));
    client.ping().await;

    let refused = client
        .subscribe_with(
            4,
            &[("$share/g/a", options(AtMostOnce)), ("a/#/b", options(AtMostOnce)), ("ok", options(ExactlyOnce))],
            None,
        )
        .await;
    assert_eq!(refused, [Reason(0x9E), Reason(0x8F), Reason(2)]);
    let mut old = server.connect(V4, "old").await;
    let refused =
        old.subscribe_with(4, &[("$share/g/a", options(AtMostOnce)), ("a+", options(AtMostOnce))], None).await;
    assert_eq!(refused, [Reason(0x80), Reason(0x80)]);
}

#[tokio::test]
async fn unsubscribing_ends_the_deliveries() {
    let server = Server::start(&nothing_stored()).await;
    let mut client = server.connect(V5, "c").await;
    client.subscribe("a/#", AtMostOnce).await;
    client.publish("a/b", b"1", AtMostOnce, 0).await;
    assert_eq!(client.got_payload().await, "1");
    let unsubscribe = crate::codec::Unsubscribe { packet_id: 5, properties: None, filters: vec!["a/#", "never"] };
    client.send(&Packet::Unsubscribe(unsubscribe)).await;
    let frame = client.recv().await;
    let Packet::UnsubAck(ack) = client.read(&frame) else { panic!() };
    assert_eq!(ack.reasons, [Reason(0), Reason(0x11)]);
    client.publish("a/b", b"2", AtMostOnce, 0).await;
    client.ping().await;
    assert_eq!(server.front.stats().subscriptions, 0);
}

#[tokio::test]
async fn properties_travel_and_aliases_end_here() {
    let server = Server::start(&nothing_stored()).await;
    let mut subscriber = server.connect(V5, "s").await;
    subscriber.subscribe("t", AtLeastOnce).await;
    let mut publisher = server.connect(V5, "p").await;
    let properties = PublishProperties {
        payload_is_utf8: Some(true),
        expiry_secs: Some(100),
        content_type: Some("text/plain"),
        response_topic: Some("r"),
        correlation_data: Some(b"\x00\x01"),
        user: vec![("a", "1"), ("b", "2"), ("a", "3")],
    };
    let mut first = publish("t", b"one", AtMostOnce, 0);
    first.topic_alias = Some(3);
    first.properties = properties.clone();
    publisher.send(&Packet::Publish(first.clone())).await;
    first.topic = "";
    first.qos = AtLeastOnce;
    first.packet_id = Some(1);
    publisher.send(&Packet::Publish(first)).await;
    for _ in 0..2 {
        let frame = subscriber.recv().await;
        let Packet::Publish(got) = subscriber.read(&frame) else { panic!() };
        assert_eq!((got.topic, got.topic_alias, &got.properties), ("t", None, &properties));
    }
    let mut unknown = publish("", b"x", AtMostOnce, 0);
    unknown.topic_alias = Some(4);
    publisher.expect_puback(1).await;
    publisher.send(&Packet::Publish(unknown)).await;
    publisher.expect_end(Reason::TOPIC_ALIAS_INVALID).await;
}

#[tokio::test]
async fn a_packet_larger_than_any_buffer_arrives_whole() {
    let server = Server::start(&nothing_stored()).await;
    let mut subscriber = server.connect(V5, "s").await;
    subscriber.subscribe("big", AtLeastOnce).await;
    let mut publisher = server.connect(V4, "p").await;
    let payload: Vec<u8> = (0..900_000u32).map(|i| i as u8).collect();
    for id in 1..=3 {
        publisher.publish("big", &payload, AtLeastOnce, id).await;
        publisher.publish("big", b"small", AtMostOnce, 0).await;
        publisher.expect_puback(id).await;
        assert!(subscriber.got().await.payload == payload);
        assert_eq!(subscriber.got_payload().await, "small");
    }
}

#[tokio::test]
async fn a_client_is_not_sent_more_than_it_takes() {
    let server = Server::start(&nothing_stored()).await;
    let mut small = connect(V5, "small");
    small.properties.maximum_packet_size = Some(64);
    small.properties.receive_maximum = Some(2);
    let (mut small, _) = server.connect_with(small).await;
    small.subscribe("#", AtLeastOnce).await;
    let mut publisher = server.connect(V4, "p").await;
    publisher.publish("t", &[0; 100], AtMostOnce, 0).await;
    publisher.publish("t", &[0; 100], AtLeastOnce, 1).await;
    for id in 2..=5 {
        publisher.publish("t", &[id as u8], AtLeastOnce, id).await;
    }
    for id in 1..=5 {
        publisher.expect_puback(id).await;
    }
    // Two in flight, the others wait for their turn.
    let mut ids = vec![];
    for _ in 0..2 {
        let frame = small.recv().await;
        let Packet::Publish(got) = small.read(&frame) else { panic!() };
        ids.push(got.packet_id.unwrap());
    }
    small.ping().await;
    for id in ids {
        small.send(&Packet::PubAck(Ack::new(id, Reason::SUCCESS))).await;
    }
    assert_eq!([small.got().await.payload, small.got().await.payload], [[4], [5]]);
    assert_eq!(server.front.stats().dropped_too_large_total, 2);
}

#[tokio::test]
async fn a_subscriber_that_does_not_read_loses_qos_0_and_stops_nobody() {
    let settings = Settings {
        outbound_bytes_max: 64 << 10,
        slow_subscriber_wait: Duration::from_millis(5),
        ..Settings::default()
    };
    let server = Server::with(settings, &nothing_stored()).await;
    let mut deaf = server.connect(V4, "deaf").await;
    deaf.subscribe("t", AtMostOnce).await;
    let mut hears = server.connect(V4, "hears").await;
    hears.subscribe("end", AtMostOnce).await;
    let mut publisher = server.connect(V4, "p").await;
    let payload = vec![1; 32 << 10];
    while server.front.stats().dropped_slow_total == 0 {
        publisher.publish("t", &payload, AtMostOnce, 0).await;
    }
    publisher.publish("end", b"end", AtMostOnce, 0).await;
    assert_eq!(hears.got_payload().await, "end");
    // What it does read later are whole packets.
    assert_eq!(deaf.got().await.payload, payload);
}

#[tokio::test]
async fn the_brokers_own_messages_are_delivered_and_nobody_elses_on_sys() {
    let server = Server::start(&nothing_stored()).await;
    server.front.publish("$SYS/alarm", b"first", true);
    let mut client = server.connect(V5, "c").await;
    client.subscribe("#", AtLeastOnce).await;
    client.subscribe("$SYS/#", AtLeastOnce).await;
    assert_eq!(client.got_payload().await, "first");
    server.front.publish("$SYS/alarm", b"second", false);
    assert_eq!(client.got_payload().await, "second");
    client.publish("$SYS/alarm", b"forged", AtLeastOnce, 3).await;
    client.expect(Packet::PubAck(Ack::new(3, Reason::TOPIC_NAME_INVALID))).await;
    client.ping().await;
}

#[tokio::test]
async fn rumqttc_clients_publish_and_subscribe() {
    let server = Server::start(&nothing_stored()).await;
    let (host, port) = ("127.0.0.1", server.address.port());
    let (old, mut old_events) = rumqttc::AsyncClient::new(rumqttc::MqttOptions::new("old", host, port), 10);
    let (new, mut new_events) = rumqttc::v5::AsyncClient::new(rumqttc::v5::MqttOptions::new("new", host, port), 10);
    old.subscribe("x/#", rumqttc::QoS::ExactlyOnce).await.unwrap();
    let old_task = async {
        let mut payloads = vec![];
        while payloads.len() < 3 {
            match old_events.poll().await.unwrap() {
                rumqttc::Event::Incoming(rumqttc::Packet::SubAck(_)) => {
                    for qos in [0, 1, 2] {
                        let qos = rumqttc::v5::mqttbytes::qos(qos).unwrap();
                        new.publish("x/y", qos, false, format!("{qos:?}")).await.unwrap();
                    }
                }
                rumqttc::Event::Incoming(rumqttc::Packet::Publish(p)) => payloads.push(p.payload),
                _ => {}
            }
        }
        payloads
    };
    let new_task = async {
        loop {
            new_events.poll().await.unwrap();
        }
    };
    let payloads = tokio::time::timeout(PATIENCE, async {
        tokio::select! { payloads = old_task => payloads, () = new_task => unreachable!() }
    });
    assert_eq!(payloads.await.unwrap(), ["AtMostOnce", "AtLeastOnce", "ExactlyOnce"]);
}

#[tokio::test]
async fn the_same_over_tls() {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let _ = rustls::crypto::ring::default_provider().install_default();
    let certificate = CertificateDer::from_pem_slice(include_bytes!("cert.pem")).unwrap();
    let key = PrivateKeyDer::from_pem_slice(include_bytes!("key.pem")).unwrap();
    let config =
        rustls::ServerConfig::builder().with_no_client_auth().with_single_cert(vec![certificate.clone()], key).unwrap();
    let front = Front::new(Settings::default(), Arc::new(nothing_stored())).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(front.clone().serve(listener, Some(Arc::new(config)), ListenerSettings::default()));
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate).unwrap();
    let config = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let mut clients = Vec::new();
    // A newcomer waits for nobody's turn.
    let lane = front.lanes.enter().await;
    for id in ["a", "b"] {
        let stream = TcpStream::connect(address).await.unwrap();
        let stream = connector.connect("localhost".try_into().unwrap(), stream).await.unwrap();
        let mut client = Client::over(stream, V5);
        client.send(&Packet::Connect(Box::new(connect(V5, id)))).await;
        client.recv().await;
        clients.push(client);
    }
    drop(lane);
    let (mut b, mut a) = (clients.pop().unwrap(), clients.pop().unwrap());
    a.subscribe("t", AtLeastOnce).await;
    let payload = vec![3; 300_000];
    for id in 1..=3 {
        b.publish("t", &payload, AtLeastOnce, id).await;
        b.expect_puback(id).await;
        assert!(a.got().await.payload == payload);
    }
    front.shutdown(PATIENCE).await;
    a.expect_end(Reason::SERVER_SHUTTING_DOWN).await;
}

#[tokio::test]
async fn thousands_of_retained_messages_reach_a_subscriber_whatever_its_window() {
    let settings = Settings { queue_messages_max: 10, inflight_max: 5, ..Settings::default() };
    let server = Server::with(settings, &nothing_stored()).await;
    let mut publisher = server.connect(V4, "p").await;
    for i in 0..3000u16 {
        publisher.send(&Packet::Publish(retained(&format!("r/{i:04}"), b"x", AtLeastOnce, i + 1))).await;
        publisher.expect_puback(i + 1).await;
    }
    for qos in [AtMostOnce, AtLeastOnce, ExactlyOnce] {
        let mut late = server.connect(V5, "late").await;
        late.subscribe("r/#", qos).await;
        for i in 0..3000 {
            let got = late.got().await;
            assert_eq!((got.topic, got.qos, got.retain), (format!("r/{i:04}"), qos.min(AtLeastOnce), true));
        }
        late.ping().await;
    }
}

#[tokio::test]
async fn a_burst_of_large_messages_waits_for_its_subscriber() {
    let settings = Settings { slow_subscriber_wait: PATIENCE, ..Settings::default() };
    let server = Server::with(settings, &nothing_stored()).await;
    let (mut subscriber, _) = server.connect_with(kept(V5, "s")).await;
    subscriber.subscribe("big", AtLeastOnce).await;
    let mut publisher = server.connect(V4, "p").await;
    let payload = vec![9; 900_000];
    let sending = async {
        for id in 1..=20 {
            publisher.publish("big", &payload, AtLeastOnce, id).await;
        }
        for id in 1..=20 {
            publisher.expect_puback(id).await;
        }
    };
    let receiving = async {
        for _ in 0..20 {
            assert!(subscriber.got().await.payload == payload);
        }
    };
    tokio::join!(sending, receiving);
    assert_eq!(server.front.stats().dropped_queue_full_total, 0);
}
