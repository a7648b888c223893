use std::collections::BTreeMap;

use super::*;

const PUBLISHERS: usize = 3;
const MESSAGES: u16 = 400;

/// Publishes in windows of ten, waiting for the acknowledgements.
async fn publisher(server: Arc<Server>, number: usize) {
    let version = if number.is_multiple_of(2) { V4 } else { V5 };
    let mut client = server.connect(version, &format!("p{number}")).await;
    for window in 0..MESSAGES / 10 {
        let ids = window * 10 + 1..=window * 10 + 10;
        let mut bytes = Vec::new();
        for id in ids.clone() {
            let payload = format!("{number} {id} {}", "x".repeat(usize::from(id) % 300));
            let packet = publish("race/t", payload.as_bytes(), AtLeastOnce, id);
            Packet::Publish(packet).encode(version, &mut bytes).unwrap();
        }
        client.send_bytes(&bytes).await;
        for id in ids {
            client.expect_puback(id).await;
        }
    }
}

/// Subscribes on a kept session, cuts its connection every so many messages, and returns what it got, in order.
async fn subscriber(server: Arc<Server>, id: &str, version: Version, cut_every: usize) -> Vec<(usize, u16, bool)> {
    let mut got = Vec::new();
    let mut first_seen = std::collections::HashSet::new();
    while first_seen.len() < PUBLISHERS * usize::from(MESSAGES) {
        let (mut client, _) = server.connect_with(kept(version, id)).await;
        for _ in 0..cut_every {
            let Some(frame) = client.try_recv().await else { break };
            let Packet::Publish(publish) = client.read(&frame) else { panic!() };
            let text = std::str::from_utf8(publish.payload).unwrap();
            let mut words = text.split(' ');
            let message: (usize, u16) =
                (words.next().unwrap().parse().unwrap(), words.next().unwrap().parse().unwrap());
            got.push((message.0, message.1, publish.dup));
            first_seen.insert(message);
            let id = publish.packet_id.unwrap();
            client.send(&Packet::PubAck(Ack::new(id, Reason::SUCCESS))).await;
            if first_seen.len() == PUBLISHERS * usize::from(MESSAGES) {
                break;
            }
        }
    }
    got
}

/// Threads, direct writes, take-overs and resends at once: every message arrives, in each publisher's order, and a second
/// copy only as a marked repetition.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn kept_sessions_miss_nothing_while_connections_come_and_go() {
    let settings = Settings { queue_messages_max: 10_000, queue_bytes_max: 64 << 20, ..Settings::default() };
    let server = Arc::new(Server::with(settings, &MemoryStore::at_once(|_| Verdict::Store)).await);
    for (id, version) in [("a", V4), ("b", V5), ("c", V5)] {
        let (mut client, _) = server.connect_with(kept(version, id)).await;
        client.subscribe("race/#", AtLeastOnce).await;
    }
    let subscribers: Vec<_> = [("a", V4, 37), ("b", V5, 101), ("c", V5, 10_000)]
        .map(|(id, version, cut)| tokio::spawn(subscriber(server.clone(), id, version, cut)))
        .into();
    let publishers: Vec<_> = (0..PUBLISHERS).map(|n| tokio::spawn(publisher(server.clone(), n))).collect();
    for publisher in publishers {
        publisher.await.unwrap();
    }
    for task in subscribers {
        let got = tokio::time::timeout(PATIENCE, task).await.expect("all messages in time").unwrap();
        let mut next = BTreeMap::new();
        for (publisher, id, dup) in got {
            let expected = next.entry(publisher).or_insert(1u16);
            if id == *expected {
                *expected += 1;
            } else {
                assert!(id < *expected && dup, "{publisher} {id} came before {expected}");
            }
        }
    }
    assert_eq!(server.front.stats().dropped_queue_full_total, 0);
}
