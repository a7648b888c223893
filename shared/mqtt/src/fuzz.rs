//! Fuzz bodies: what must hold whatever a peer sends. Each takes any bytes and panics when a promise is broken.
//!
//! `tests/fuzz` runs them under libFuzzer; the tests at the end run them on the seeds that are kept in `tests/fuzz/corpus`.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;

use crate::codec::{
    CodecError, Connect, Frame, Packet, Properties, QoS, Split, Version, Will, decode_properties_and_payload,
    encode_properties_and_payload, split,
};
use crate::front::{Front, MEMORY_USES, Settings};
use crate::store::PublishProperties;
use crate::store::memory::{MemoryStore, Verdict};
use crate::topic::{TopicFilter, check_name};
use crate::tree::{Subscription, Tree};

const PACKET_BYTES_MAX: usize = 1 << 20;

/// A stream of packets. Whatever the pieces in which its bytes come, the same packets are found and the same end; and a
/// packet that was read means the same once it is written and read again.
///
/// The first byte says which version and how large the pieces are.
pub fn codec(data: &[u8]) {
    let Some((&how, bytes)) = data.split_first() else { return };
    let version = if how & 1 == 0 { Version::V4 } else { Version::V5 };
    let (frames, end) = frames(bytes, version);
    in_pieces(bytes, version, usize::from(how >> 1) % 17 + 1, &frames, &end);
    for frame in &frames {
        if let Ok(packet) = Packet::decode(frame, version) {
            survives(&packet, version);
        }
    }
    if let Ok((properties, payload)) = decode_properties_and_payload(bytes) {
        let mut out = Vec::new();
        encode_properties_and_payload(&properties, payload, &mut out).expect("what was read fits");
        assert_eq!(decode_properties_and_payload(&out), Ok((properties, payload)));
    }
}

/// The packets of a buffer, and why there are no more: an error, or how many bytes the next one needs.
fn frames(bytes: &[u8], version: Version) -> (Vec<Frame<'_>>, Result<usize, CodecError>) {
    let (mut rest, mut frames) = (bytes, Vec::new());
    loop {
        match split(rest, Some(version), PACKET_BYTES_MAX) {
            Ok(Split::Frame(frame)) => {
                assert_eq!(Some(frame.bytes), rest.get(..frame.bytes.len()), "a packet lies at the front");
                rest = rest.get(frame.bytes.len()..).expect("a packet lies within its buffer");
                frames.push(frame);
            }
            Ok(Split::More { need }) => return (frames, Ok(need)),
            Err(error) => return (frames, Err(error)),
        }
    }
}

fn in_pieces(bytes: &[u8], version: Version, piece: usize, frames: &[Frame<'_>], end: &Result<usize, CodecError>) {
    let (mut from, mut have, mut seen) = (0, 0, 0);
    loop {
        match split(&bytes[from..have], Some(version), PACKET_BYTES_MAX) {
            Ok(Split::Frame(frame)) => {
                assert_eq!(Some(&frame), frames.get(seen), "the same packet in pieces of {piece}");
                (from, seen) = (from + frame.bytes.len(), seen + 1);
            }
            Ok(Split::More { need }) => {
                assert!(need > have - from, "more is asked for than there is");
                if have == bytes.len() {
                    assert_eq!((seen, &Ok(need)), (frames.len(), end));
                    return;
                }
                have = bytes.len().min(have + piece);
            }
            Err(error) => {
                assert_eq!((seen, &Err(error)), (frames.len(), end), "refused at once or not at all");
                return;
            }
        }
    }
}

fn survives(packet: &Packet<'_>, version: Version) {
    let mut out = Vec::new();
    packet.encode(version, &mut out).expect("what was read can be written");
    let Ok(Split::Frame(frame)) = split(&out, Some(version), usize::MAX) else { panic!("{packet:?} is no packet") };
    assert_eq!(frame.bytes.len(), out.len(), "one packet");
    assert_eq!(Packet::decode(&frame, version).as_ref(), Ok(packet));
    let mut again = Vec::new();
    packet.encode(version, &mut again).expect("as before");
    assert_eq!(out, again);
}

/// Subscriptions come and go, and the tree finds what comparing each filter finds.
///
/// A line each: `+n` adds the filter that follows for subscriber `n`, `-n` removes it, anything else is a topic name.
pub fn topics(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let mut tree = Tree::default();
    // With the filter itself: a group's filter may look like one of another group, and would be read as that.
    let mut expected: BTreeMap<(&str, char), TopicFilter<'_>> = BTreeMap::new();
    for line in text.lines().take(200) {
        let mut rest = line.chars();
        match (rest.next(), rest.next()) {
            (Some(sign @ ('+' | '-')), Some(who)) => {
                let Ok(filter) = TopicFilter::parse(rest.as_str()) else { continue };
                if sign == '+' {
                    let new = expected.insert((filter.as_str(), who), filter).is_none();
                    assert_eq!(tree.insert(&filter, who, Subscription::default()), new);
                } else {
                    assert_eq!(tree.remove(&filter, &who), expected.remove(&(filter.as_str(), who)).is_some());
                }
            }
            _ if check_name(line).is_ok() => {
                let mut found = Vec::new();
                tree.find(line, &mut found);
                let mut found: Vec<char> = found.into_iter().map(|(who, _)| who).collect();
                found.sort_unstable();
                let matching = expected.iter().filter(|(_, filter)| filter.matches(line));
                let mut wanted: Vec<char> = matching.map(|((_, who), _)| *who).collect();
                wanted.sort_unstable();
                assert_eq!(found, wanted, "{line}");
            }
            _ => {}
        }
    }
    assert_eq!(tree.len(), expected.len());
    for ((_, who), filter) in expected {
        assert!(tree.remove(&filter, &who));
    }
    assert!(tree.is_empty());
}

/// Up to four clients write whatever they like to one front. When they are gone, no connection is left, nothing counts as
/// held for one, and a client that behaves is served.
///
/// Steps of `(who, length, bytes)`: two bits of `who` name the client, one says that it hangs up afterwards; for a client
/// that is not there the others say whether a valid CONNECT comes first, and of which kind.
pub fn front(data: &[u8]) {
    thread_local! {
        static RUNTIME: OnceCell<(Runtime, TcpListener)> = const { OnceCell::new() };
    }
    RUNTIME.with(|cell| {
        let (runtime, listener) = cell.get_or_init(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a port on loopback");
            (runtime, listener)
        });
        runtime.block_on(async {
            let played = tokio::time::timeout(Duration::from_secs(20), play(listener, data)).await;
            played.expect("the front answers, and lets go of clients that are gone");
        });
    });
}

async fn play(listener: &TcpListener, data: &[u8]) {
    let store = MemoryStore::at_once(|topic| match topic.as_bytes().first() {
        Some(b's') => Verdict::Store,
        Some(b'h') => Verdict::Hold,
        _ => Verdict::NotStored,
    });
    let settings = Settings { hold_timeout: Duration::ZERO, ..Settings::default() };
    let front = Front::new(settings, Arc::new(store)).expect("an empty store loads");
    let mut clients: BTreeMap<u8, TcpStream> = BTreeMap::new();
    let mut rest = data;
    while let [who, length, tail @ ..] = rest {
        let (bytes, after) = tail.split_at(tail.len().min((*length).into()));
        rest = after;
        let number = who & 3;
        if let Entry::Vacant(place) = clients.entry(number) {
            let mut client = front.connect_for_fuzzing(listener).await;
            if who & 8 != 0 {
                let _ = client.write_all(&valid_connect(number, *who)).await;
            }
            place.insert(client);
        }
        let Some(client) = clients.get_mut(&number) else { continue };
        // A front that hangs up is as good as one that reads.
        let _ = client.write_all(bytes).await;
        for _ in 0..4 {
            tokio::task::yield_now().await;
        }
        if who & 4 != 0 {
            clients.remove(&number);
        } else {
            let _ = client.try_read(&mut [0; 4096]);
        }
    }
    drop(clients);
    while front.stats().connections > 0 {
        tokio::time::sleep(Duration::from_micros(50)).await;
    }
    let stats = front.stats();
    assert_eq!((stats.held_messages, stats.held_acks), (0, 0), "nothing waits for nobody");
    for (what, bytes) in MEMORY_USES.into_iter().zip(stats.memory_bytes) {
        // Kept sessions, and wills that wait, may hold the rest.
        let lasts = matches!(what, "wills" | "filters" | "queues");
        assert!(lasts || bytes == 0, "{bytes} bytes of {what} are counted for nobody");
    }
    let mut client = front.connect_for_fuzzing(listener).await;
    let mut hello = valid_connect(9, 0);
    hello.extend_from_slice(&[0xC0, 0]);
    client.write_all(&hello).await.expect("it is read");
    let mut answers = [0; 6];
    client.read_exact(&mut answers).await.expect("CONNACK and PINGRESP");
    assert_eq!(answers, [0x20, 2, 0, 0, 0xD0, 0]);
}

fn valid_connect(number: u8, who: u8) -> Vec<u8> {
    let client_id = format!("c{number}");
    let will = Will {
        topic: "s/will",
        payload: b"gone",
        qos: QoS::AtLeastOnce,
        retain: who & 128 != 0,
        delay_secs: 0,
        properties: PublishProperties::default(),
    };
    let connect = Connect {
        version: if who & 16 != 0 { Version::V5 } else { Version::V4 },
        clean_start: who & 32 == 0,
        keep_alive_secs: 0,
        client_id: &client_id,
        will: (who & 64 != 0).then_some(will),
        username: None,
        password: None,
        properties: Properties {
            session_expiry_secs: (who & 48 == 48).then_some(100),
            receive_maximum: (who & 144 == 144).then_some(2),
            ..Properties::default()
        },
    };
    let mut out = Vec::new();
    let version = connect.version;
    Packet::Connect(Box::new(connect)).encode(version, &mut out).expect("it is short");
    out
}

impl Front {
    /// A client's end of a connection that the front serves as if it had accepted it.
    async fn connect_for_fuzzing(self: &Arc<Self>, listener: &TcpListener) -> TcpStream {
        let address: SocketAddr = listener.local_addr().expect("it is bound");
        let (client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        let (stream, peer) = accepted.expect("loopback");
        self.serve_one(stream, peer);
        client.expect("loopback")
    }
}

#[cfg(test)]
#[path = "../../../tests/fuzz/replay.rs"]
mod replay;

#[cfg(test)]
mod tests {
    use super::replay::replay;

    #[test]
    fn codec() {
        replay("mqtt_codec", super::codec);
    }

    #[test]
    fn topics() {
        replay("mqtt_topics", super::topics);
    }

    #[test]
    fn front() {
        replay("mqtt_front", super::front);
    }
}
