use super::*;
use crate::store::PublishProperties;
use Version::{V4, V5};
use proptest::prelude::*;

fn one(bytes: &[u8], version: Version) -> Result<Packet<'_>, CodecError> {
    match split(bytes, Some(version), usize::MAX)? {
        Split::Frame(frame) => {
            assert_eq!(frame.bytes.len(), bytes.len(), "one packet");
            Packet::decode(&frame, version)
        }
        Split::More { need } => panic!("incomplete: {need}"),
    }
}

fn encoded(packet: &Packet<'_>, version: Version) -> Vec<u8> {
    let mut out = Vec::new();
    packet.encode(version, &mut out).unwrap();
    out
}

/// Bytes and packet stand for each other.
fn golden(version: Version, bytes: &[u8], packet: Packet<'_>) {
    assert_eq!(one(bytes, version).as_ref(), Ok(&packet));
    assert_eq!(encoded(&packet, version), bytes);
}

#[test]
fn golden_bytes_of_the_standard() {
    // MQTT 3.1.1 §3.1.2.10 (Figure 3.6) with client id "abc", will, user name and password.
    let connect = Connect {
        version: V4,
        clean_start: true,
        keep_alive_secs: 10,
        client_id: "abc",
        will: Some(Will {
            topic: "w/t",
            payload: b"bye",
            qos: QoS::AtLeastOnce,
            retain: false,
            delay_secs: 0,
            properties: PublishProperties::default(),
        }),
        username: Some("u"),
        password: Some(b"p"),
        properties: Properties::default(),
    };
    golden(
        V4,
        b"\x10\x1f\x00\x04MQTT\x04\xce\x00\x0a\x00\x03abc\x00\x03w/t\x00\x03bye\x00\x01u\x00\x01p",
        Packet::Connect(Box::new(connect)),
    );
    // MQTT 5 §3.1.2.11: CONNECT variable header example, session expiry 10.
    let connect = Connect {
        version: V5,
        clean_start: true,
        keep_alive_secs: 10,
        client_id: "",
        will: None,
        username: None,
        password: None,
        properties: Properties { session_expiry_secs: Some(10), ..Properties::default() },
    };
    golden(
        V5,
        b"\x10\x12\x00\x04MQTT\x05\x02\x00\x0a\x05\x11\x00\x00\x00\x0a\x00\x00",
        Packet::Connect(Box::new(connect)),
    );
    golden(V4, &[0x20, 2, 1, 0], Packet::ConnAck(Box::new(ConnAck { session_present: true, ..ConnAck::default() })));
    golden(
        V5,
        &[0x20, 9, 0, 0, 6, 0x21, 0, 10, 0x22, 0, 16],
        Packet::ConnAck(Box::new(ConnAck {
            properties: Properties {
                receive_maximum: Some(10),
                topic_alias_maximum: Some(16),
                ..Properties::default()
            },
            ..ConnAck::default()
        })),
    );
    // §3.3.2.4: PUBLISH to "a/b", packet identifier 10.
    let publish = |version| Publish {
        dup: false,
        qos: QoS::AtLeastOnce,
        retain: version == V5,
        topic: "a/b",
        packet_id: Some(10),
        topic_alias: None,
        subscription_ids: vec![],
        properties: PublishProperties::default(),
        payload: b"hi",
    };
    golden(V4, b"\x32\x09\x00\x03a/b\x00\x0ahi", Packet::Publish(publish(V4)));
    golden(V5, b"\x33\x0a\x00\x03a/b\x00\x0a\x00hi", Packet::Publish(publish(V5)));
    golden(V4, &[0x40, 2, 0, 10], Packet::PubAck(Ack::new(10, Reason::SUCCESS)));
    golden(V5, &[0x50, 3, 0, 10, 0x97], Packet::PubRec(Ack::new(10, Reason::QUOTA_EXCEEDED)));
    golden(V5, &[0x62, 3, 0, 10, 0x92], Packet::PubRel(Ack::new(10, Reason::PACKET_IDENTIFIER_NOT_FOUND)));
    golden(V4, &[0x70, 2, 0, 10], Packet::PubComp(Ack::new(10, Reason::SUCCESS)));
    // MQTT 3.1.1 §3.8.3 (Figure 3.23): "a/b" with QoS 1, "c/d" with QoS 2.
    let options = |qos| SubscribeOptions { qos, ..SubscribeOptions::default() };
    let subscribe = Subscribe {
        packet_id: 10,
        properties: Properties::default(),
        filters: vec![("a/b", options(QoS::AtLeastOnce)), ("c/d", options(QoS::ExactlyOnce))],
    };
    golden(V4, b"\x82\x0e\x00\x0a\x00\x03a/b\x01\x00\x03c/d\x02", Packet::Subscribe(subscribe.clone()));
    golden(V5, b"\x82\x0f\x00\x0a\x00\x00\x03a/b\x01\x00\x03c/d\x02", Packet::Subscribe(subscribe));
    golden(
        V4,
        &[0x90, 5, 0, 10, 0, 2, 0x80],
        Packet::SubAck(SubAck { packet_id: 10, properties: None, reasons: vec![Reason(0), Reason(2), Reason(0x80)] }),
    );
    let unsubscribe = Unsubscribe { packet_id: 10, properties: None, filters: vec!["a/b", "c/d"] };
    golden(V4, b"\xa2\x0c\x00\x0a\x00\x03a/b\x00\x03c/d", Packet::Unsubscribe(unsubscribe));
    golden(V4, &[0xB0, 2, 0, 10], Packet::UnsubAck(SubAck { packet_id: 10, ..SubAck::default() }));
    golden(
        V5,
        &[0xB0, 5, 0, 10, 0, 0, 0x11],
        Packet::UnsubAck(SubAck { packet_id: 10, properties: None, reasons: vec![Reason(0), Reason(0x11)] }),
    );
    golden(V4, &[0xC0, 0], Packet::PingReq);
    golden(V4, &[0xD0, 0], Packet::PingResp);
    golden(V4, &[0xE0, 0], Packet::Disconnect(Disconnect::default()));
    golden(V5, &[0xE0, 0], Packet::Disconnect(Disconnect::default()));
    golden(V5, &[0xE0, 1, 4], Packet::Disconnect(Disconnect { reason: Reason(4), properties: None }));
    golden(V5, &[0xF0, 0], Packet::Auth(Disconnect::default()));
}

#[test]
fn what_the_standard_forbids_is_refused_with_its_reason() {
    let check = |version: Version, bytes: &[u8], expected: Reason| {
        let error = split(bytes, Some(version), 1 << 20)
            .and_then(|split| match split {
                Split::Frame(frame) => Packet::decode(&frame, version).map(|p| format!("{p:?}")),
                Split::More { .. } => Ok("incomplete".into()),
            })
            .expect_err(&format!("{bytes:02x?}"));
        assert_eq!(error.reason(), expected, "{bytes:02x?}: {error}");
    };
    let malformed = Reason::MALFORMED_PACKET;
    let protocol = Reason::PROTOCOL_ERROR;
    check(V5, &[0x00, 0], malformed); // type 0
    check(V5, &[0xC1, 0], malformed); // PINGREQ flags
    check(V5, &[0x41, 2, 0, 1], malformed); // PUBACK flags
    check(V5, &[0x80, 2, 0, 1], malformed); // SUBSCRIBE flags
    check(V5, &[0x36, 5], malformed); // QoS 3, refused before its body is there
    check(V5, &[0x38, 5], malformed); // DUP with QoS 0
    check(V5, &[0x30, 0x80, 0x80, 0x80, 0x80], malformed); // five length bytes
    check(V5, &[0x40, 0x82, 0x00, 0, 1], malformed); // length longer than it must be
    check(V5, &[0x30, 0xFF, 0xFF, 0x7F], Reason::PACKET_TOO_LARGE);
    check(V5, &[0xC0, 1, 0], malformed); // PINGREQ with a body
    check(V5, &[0x40, 1, 0], malformed); // short field
    check(V5, &[0x40, 2, 0, 0], protocol); // packet id 0
    check(V5, &[0x40, 3, 0, 1, 0x04], malformed); // reason not of PUBACK
    check(V4, &[0x40, 3, 0, 1, 0], malformed); // trailing byte
    check(V4, &[0xE0, 1, 0], malformed);
    check(V4, &[0xF0, 0], malformed); // AUTH before MQTT 5
    check(V4, b"\x30\x03\x00\x01+", Reason::TOPIC_NAME_INVALID);
    check(V4, b"\x30\x03\x00\x01\x00", malformed); // U+0000
    check(V4, b"\x30\x05\x00\x03\xed\xa0\x80", malformed); // surrogate
    check(V4, b"\x30\x02\x00\x00", Reason::TOPIC_NAME_INVALID);
    check(V5, b"\x30\x03\x00\x00\x00", protocol); // neither topic nor alias
    check(V5, b"\x30\x07\x00\x01a\x03\x23\x00\x00", Reason::TOPIC_ALIAS_INVALID);
    check(V5, b"\x30\x08\x00\x01a\x04\x01\x00\x01\x00", protocol); // property twice
    check(V5, b"\x30\x06\x00\x01a\x02\x01\x02", protocol); // payload format 2
    check(V5, b"\x30\x06\x00\x01a\x02\x24\x01", malformed); // maximum QoS in a PUBLISH
    check(V5, b"\x30\x06\x00\x01a\x02\x0b\x00", protocol); // subscription identifier 0
    check(V5, b"\x30\x05\x00\x01a\x09\x01", malformed); // property length beyond the packet
    check(V5, b"\x30\x08\x00\x01a\x04\x08\x00\x01#", Reason::TOPIC_NAME_INVALID); // response topic with wildcard
    check(V4, &[0x82, 2, 0, 1], protocol); // SUBSCRIBE without a filter
    check(V4, b"\x82\x06\x00\x01\x00\x01a\x03", malformed); // QoS 3
    check(V5, b"\x82\x07\x00\x01\x00\x00\x01a\x30", malformed); // retain handling 3
    check(V5, b"\x82\x10\x00\x01\x00\x00\x0a$share/g/a\x04", protocol); // no local, shared
    check(V4, &[0xA2, 2, 0, 1], protocol);
    check(V4, b"\x10\x0c\x00\x04MQTT\x04\x01\x00\x0a\x00\x00", malformed); // reserved flag
    check(V4, b"\x10\x0c\x00\x04MQTT\x04\x08\x00\x0a\x00\x00", malformed); // will QoS without will
    check(V4, b"\x10\x0f\x00\x04MQTT\x04\x42\x00\x0a\x00\x00\x00\x01p", malformed); // password without user name
    check(V4, b"\x10\x0c\x00\x04MQTX\x04\x02\x00\x0a\x00\x00", malformed);
    check(V4, b"\x10\x0e\x00\x06MQIsdp\x03\x02\x00\x0a\x00\x00", Reason::UNSUPPORTED_PROTOCOL_VERSION);
    check(V4, b"\x10\x0c\x00\x04MQTT\x06\x02\x00\x0a\x00\x00", Reason::UNSUPPORTED_PROTOCOL_VERSION);
    check(V5, b"\x10\x10\x00\x04MQTT\x05\x02\x00\x0a\x03\x21\x00\x00\x00\x00", protocol); // receive maximum 0
    check(V5, b"\x10\x10\x00\x04MQTT\x05\x02\x00\x0a\x03\x16\x00\x00\x00\x00", protocol); // data without method
}

#[test]
fn a_padded_length_is_taken_before_mqtt_5() {
    let padded = [0x40, 0x82, 0x00, 0, 1];
    assert!(matches!(split(&padded, Some(V4), 100), Ok(Split::Frame(frame)) if frame.body == [0, 1]));
}

#[test]
fn a_packet_is_found_whatever_the_pieces() {
    let mut bytes = encoded(&Packet::PingReq, V5);
    let first = bytes.len();
    bytes.extend(encoded(&Packet::PubAck(Ack::new(7, Reason(0x97))), V5));
    for end in 0..first {
        assert!(matches!(split(&bytes[..end], Some(V5), 100), Ok(Split::More { need }) if need > end));
    }
    let Ok(Split::Frame(frame)) = split(&bytes, Some(V5), 100) else { panic!() };
    assert_eq!(frame.bytes.len(), first);
}

/// A packet of the given kind out of arbitrary pieces. Only what both versions can carry when `version` is 3.1.1.
fn build<'a>(kind: u8, texts: &'a [String; 4], payload: &'a [u8], n: u32, flags: u16, version: Version) -> Packet<'a> {
    let v5 = version == V5;
    let flag = |bit: u16| flags & (1 << bit) != 0;
    let pick = |bit: u16| v5 && flag(bit);
    let id = (n as u16).max(1);
    let qos = QoS::from_u8((flags & 3).min(2) as u8).unwrap();
    let user: Vec<_> = if pick(4) { vec![(&*texts[1], &*texts[2]), (&*texts[1], &*texts[3])] } else { vec![] };
    let reason_string = pick(5).then_some(&*texts[2]);
    let message = PublishProperties {
        payload_is_utf8: pick(6).then_some(flag(7)),
        expiry_secs: pick(8).then_some(n),
        content_type: pick(9).then_some(&*texts[2]),
        response_topic: pick(10).then_some(&*texts[0]),
        correlation_data: pick(11).then_some(payload),
        user: user.clone(),
    };
    let small = Properties { reason_string, user: user.clone(), ..Properties::default() };
    let boxed = (small != Properties::default()).then(|| Box::new(small));
    let error = |reason| if pick(12) { Reason(reason) } else { Reason::SUCCESS };
    match kind % 15 {
        0 => Packet::Connect(Box::new(Connect {
            version,
            clean_start: flag(3),
            keep_alive_secs: n as u16,
            client_id: &texts[1],
            will: flag(13).then(|| Will {
                topic: &texts[0],
                payload,
                qos,
                retain: flag(14),
                delay_secs: if pick(15) { n } else { 0 },
                properties: message,
            }),
            username: flag(6).then_some(&*texts[2]),
            password: (flag(6) && flag(7)).then_some(payload),
            properties: Properties {
                session_expiry_secs: pick(8).then_some(n),
                receive_maximum: pick(9).then_some(id),
                maximum_packet_size: pick(10).then_some(n.max(1)),
                topic_alias_maximum: pick(11).then_some(n as u16),
                request_problem_information: pick(12).then_some(flag(1)),
                request_response_information: pick(12).then_some(flag(2)),
                authentication_method: pick(13).then_some(&*texts[3]),
                authentication_data: pick(13).then_some(payload),
                user,
                ..Properties::default()
            },
        })),
        1 => Packet::ConnAck(Box::new(ConnAck {
            session_present: flag(3),
            reason: error(0x87),
            properties: Properties {
                session_expiry_secs: pick(6).then_some(n),
                assigned_client_id: pick(7).then_some(&*texts[1]),
                server_keep_alive_secs: pick(8).then_some(n as u16),
                maximum_qos: pick(9).then_some(if flag(1) { QoS::AtLeastOnce } else { QoS::AtMostOnce }),
                retain_available: pick(10).then_some(flag(1)),
                wildcard_subscription_available: pick(11).then_some(flag(2)),
                subscription_identifiers_available: pick(13).then_some(flag(2)),
                shared_subscription_available: pick(14).then_some(flag(2)),
                response_information: pick(15).then_some(&*texts[3]),
                server_reference: pick(15).then_some(&*texts[3]),
                reason_string,
                user,
                ..Properties::default()
            },
        })),
        2 => Packet::Publish(Publish {
            dup: flag(3) && qos > QoS::AtMostOnce,
            qos,
            retain: flag(14),
            topic: if pick(13) && flag(15) { "" } else { &texts[0] },
            packet_id: (qos > QoS::AtMostOnce).then_some(id),
            topic_alias: pick(13).then_some(id),
            subscription_ids: if pick(12) { vec![n % 1000 + 1, n % 7 + 1] } else { vec![] },
            properties: message,
            payload,
        }),
        3 => Packet::PubAck(Ack { packet_id: id, reason: error(0x10), properties: boxed }),
        4 => Packet::PubRec(Ack { packet_id: id, reason: error(0x99), properties: boxed }),
        5 => Packet::PubRel(Ack { packet_id: id, reason: error(0x92), properties: boxed }),
        6 => Packet::PubComp(Ack { packet_id: id, reason: error(0x92), properties: boxed }),
        7 => Packet::Subscribe(Subscribe {
            packet_id: id,
            properties: Properties { subscription_id: pick(6).then_some(n % 1000 + 1), user, ..Properties::default() },
            filters: vec![
                (
                    &texts[0],
                    SubscribeOptions {
                        qos,
                        no_local: pick(7),
                        retain_as_published: pick(8),
                        retain_handling: if pick(9) { RetainHandling::DoNotSend } else { RetainHandling::Send },
                    },
                ),
                (&texts[1], SubscribeOptions::default()),
            ],
        }),
        8 => {
            Packet::SubAck(SubAck { packet_id: id, properties: boxed, reasons: vec![Reason(qos as u8), Reason(0x80)] })
        }
        9 => Packet::Unsubscribe(Unsubscribe {
            packet_id: id,
            properties: (!user.is_empty()).then(|| Box::new(Properties { user, ..Properties::default() })),
            filters: vec![&texts[0], &texts[1]],
        }),
        10 => Packet::UnsubAck(SubAck {
            packet_id: id,
            properties: boxed,
            reasons: if v5 { vec![Reason(0), Reason(0x11)] } else { vec![] },
        }),
        11 => Packet::PingReq,
        12 => Packet::PingResp,
        13 => Packet::Disconnect(Disconnect { reason: error(0x8B), properties: boxed }),
        _ if v5 => Packet::Auth(Disconnect { reason: error(0x18), properties: boxed }),
        _ => Packet::PingReq,
    }
}

prop_compose! {
    fn pieces()(
        texts in prop::array::uniform4("[a-z/é漢]{1,12}"),
        payload in prop::collection::vec(any::<u8>(), 0..200),
        n in any::<u32>(),
        flags in any::<u16>(),
        kind in 0u8..15,
        v5 in any::<bool>(),
    ) -> ([String; 4], Vec<u8>, u32, u16, u8, Version) {
        (texts, payload, n, flags, kind, if v5 { V5 } else { V4 })
    }
}

proptest! {
    #[test]
    fn every_packet_survives_the_wire((texts, payload, n, flags, kind, version) in pieces()) {
        let packet = build(kind, &texts, &payload, n, flags, version);
        let bytes = encoded(&packet, version);
        prop_assert_eq!(one(&bytes, version).unwrap(), packet);
    }

    #[test]
    fn cut_and_changed_bytes_never_panic(
        (texts, payload, n, flags, kind, version) in pieces(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = encoded(&build(kind, &texts, &payload, n, flags, version), version);
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        bytes.truncate(cut.index(bytes.len() + 1));
        any_bytes(&bytes);
    }

    #[test]
    fn any_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        any_bytes(&bytes);
        let _ = decode_properties_and_payload(&bytes);
    }

    /// What both codecs take must mean the same.
    #[test]
    fn rumqttc_reads_what_we_write((texts, payload, n, flags, kind, version) in pieces()) {
        // Its v5 codec has no AUTH and no DISCONNECT without a reason; a password that is not UTF-8 it cannot read.
        // Nor does it count the bytes of a subscription identifier right: what follows one lands in its payload.
        prop_assume!(!(matches!(kind, 13 | 14) || kind == 0 && flags & 0xC0 == 0xC0 || kind == 2 && flags & 0x1000 != 0));
        let packet = build(kind, &texts, &payload, n, flags, version);
        let bytes = encoded(&packet, version);
        if version == V4 {
            let theirs = rumqttc::mqttbytes::v4::Packet::read(&mut bytes::BytesMut::from(&bytes[..]), 1 << 20).unwrap();
            if let (Packet::Publish(ours), rumqttc::mqttbytes::v4::Packet::Publish(theirs)) = (&packet, &theirs) {
                prop_assert_eq!(ours.topic, &theirs.topic);
                prop_assert_eq!(ours.payload, &theirs.payload[..]);
                prop_assert_eq!(ours.packet_id.unwrap_or(0), theirs.pkid);
                prop_assert_eq!((ours.qos as u8, ours.dup, ours.retain), (theirs.qos as u8, theirs.dup, theirs.retain));
            }
        } else {
            let theirs =
                rumqttc::v5::mqttbytes::v5::Packet::read(&mut bytes::BytesMut::from(&bytes[..]), Some(1 << 20)).unwrap();
            if let (Packet::Publish(ours), rumqttc::v5::mqttbytes::v5::Packet::Publish(theirs)) = (&packet, &theirs) {
                prop_assert_eq!(ours.topic.as_bytes(), &theirs.topic[..]);
                prop_assert_eq!(ours.payload, &theirs.payload[..]);
                let p = theirs.properties.clone().unwrap_or_default();
                prop_assert_eq!(ours.properties.expiry_secs, p.message_expiry_interval);
                prop_assert_eq!(ours.properties.content_type, p.content_type.as_deref());
                prop_assert_eq!(ours.topic_alias, p.topic_alias);
                prop_assert_eq!(ours.properties.user.len(), p.user_properties.len());
                let mut block = Vec::new();
                encode_properties_and_payload(&ours.properties, b"", &mut block).unwrap();
                let length = ours.properties.bytes();
                prop_assert_eq!(block.len(), length + if length < 128 { 1 } else { 2 });
            }
        }
    }

    /// And we read what a codec of other authors writes.
    #[test]
    fn we_read_what_mqttbytes_writes(topic in "[a-z/]{1,20}", payload in prop::collection::vec(any::<u8>(), 0..300), id in 1u16.., qos in 0u8..3) {
        let mut theirs = mqttbytes::v4::Publish::new(&*topic, mqttbytes::qos(qos).unwrap(), payload.clone());
        theirs.pkid = id;
        let mut bytes = bytes::BytesMut::new();
        theirs.write(&mut bytes).unwrap();
        let Packet::Publish(ours) = one(&bytes, V4).unwrap() else { panic!() };
        prop_assert_eq!((ours.topic, ours.payload, ours.qos as u8), (&*topic, &*payload, qos));
        prop_assert_eq!(ours.packet_id, (qos > 0).then_some(id));
    }
}

fn any_bytes(bytes: &[u8]) {
    for version in [V4, V5] {
        let mut rest = bytes;
        while let Ok(Split::Frame(frame)) = split(rest, Some(version), 1 << 16) {
            let _ = Packet::decode(&frame, version);
            rest = &rest[frame.bytes.len()..];
        }
    }
}

#[test]
fn user_properties_have_an_end() {
    let user = |count: usize| {
        let publish = Publish {
            dup: false,
            qos: QoS::AtMostOnce,
            retain: false,
            topic: "t",
            packet_id: None,
            topic_alias: None,
            subscription_ids: Vec::new(),
            properties: PublishProperties { user: vec![("", ""); count], ..PublishProperties::default() },
            payload: b"",
        };
        one(&encoded(&Packet::Publish(publish), V5), V5).map(|_| ())
    };
    assert_eq!(user(properties::PROPERTIES_MAX), Ok(()));
    let error = user(properties::PROPERTIES_MAX + 1).unwrap_err();
    assert_eq!((error.reason(), &error), (Reason::QUOTA_EXCEEDED, &CodecError::TooManyProperties));
}
