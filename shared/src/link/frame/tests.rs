use proptest::prelude::*;

use super::*;
use crate::log::Chain;

fn name(text: &str) -> StreamName {
    StreamName::parse(text).unwrap()
}

fn session() -> Session {
    Session { boot: [7; 16], hello: 3 }
}

fn hello() -> Hello {
    Hello {
        lowest: 1,
        highest: 1,
        edge: EdgeId::parse("gw-1").unwrap(),
        session: session(),
        software: "t/0".into(),
        streams: vec![HelloStream {
            name: name("s"),
            topic: TopicName::parse("t").unwrap(),
            incarnation: Incarnation([9; 16]),
            first: 1,
            next: 300,
            confirmed: 200,
            safe: 100,
        }],
    }
}

fn append() -> (Append, Vec<Bytes>) {
    let entry = AppendEntry {
        stream: name("s"),
        after: Some(Position { next: 10, chain: Chain(5) }),
        first: 12,
        end: Position { next: 14, chain: Chain(300) },
        gap: Some((10, 12)),
        rejected: false,
        bytes: 3,
    };
    let append = Append { edge: EdgeId::parse("gw-1").unwrap(), session: session(), entries: vec![entry] };
    (append, vec![Bytes::from_static(b"abc")])
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[test]
fn golden_hello() {
    let boot = "07".repeat(16);
    let incarnation = "09".repeat(16);
    // Offsets are zigzag varints: 1 -> 02, 300 -> d804, 200 -> 9003, 100 -> c801.
    let header = format!("01010467772d31{boot}0303742f30010173{}74{incarnation}02d8049003c801", "01");
    let golden = format!("01{:08x}{header}", header.len() / 2);
    assert_eq!(hex(&encode(&hello())), golden);
    assert_eq!(hello_versions(&encode(&hello())), Some((1, 1)));
}

#[test]
fn golden_append() {
    let boot = "07".repeat(16);
    // after Some(10, 5), first 12, end (14, 300), gap Some(10, 12), not rejected, 3 bytes.
    let header = format!("0467772d31{boot}0301017301140518{}0114180003", "1cac02");
    let golden = format!("01{:08x}{header}616263", header.len() / 2);
    let (append, batches) = append();
    assert_eq!(hex(&encode_append(&append, &batches)), golden);
}

#[test]
fn golden_replies() {
    let credit = Credit { bytes: 128, wait_ms: 1 };
    let limits = Limits { batch_bytes_max: 1, body_bytes_max: 2, poll_secs_max: 25 };
    let position = Some(Position { next: 10, chain: Chain(5) });
    let stream = HelloStreamReply { name: name("s"), position, safe: None, parked: Some("no".into()) };
    let reply = HelloReply { version: 1, time_ms: 1, limits, credit, streams: vec![stream] };
    assert_eq!(hex(&encode(&reply)), "010000001301020102198001010101730114050001026e6f");

    let outcome = Outcome::Rejected { reason: "no".into() };
    let stream = StreamReply { name: name("s"), position, safe: Some(1), outcome };
    let reply = AppendReply { session: SessionState::Superseded, credit, streams: vec![stream] };
    assert_eq!(hex(&encode(&reply)), "010000001002800101010173011405010203026e6f");

    let known = vec![(name("s"), 1)];
    let poll = Poll { edge: EdgeId::parse("g").unwrap(), session: session(), wait_secs: 25, wants_credit: true, known };
    assert_eq!(hex(&encode(&poll)), format!("01000000190167{}0319010101{}02", "07".repeat(16), "73"));

    let reply = PollReply { session: SessionState::Current, credit, safe: vec![] };
    assert_eq!(hex(&encode(&reply)), "01000000050080010100");
}

#[test]
fn a_body_that_is_not_what_its_entries_say_is_refused() {
    let (append, _) = append();
    let bytes = encode_append(&append, &[Bytes::from_static(b"ab")]);
    assert_eq!(decode_append(&bytes), Err(FrameError::Cut { expected: 3, found: 2 }));
    let bytes = encode_append(&append, &[Bytes::from_static(b"abcd")]);
    assert!(decode_append(&bytes).is_err());
}

#[test]
fn contradictions_are_refused() {
    let check = |edit: fn(&mut AppendEntry)| {
        let (mut append, batches) = append();
        edit(&mut append.entries[0]);
        decode_append(&encode_append(&append, &batches)).unwrap_err()
    };
    check(|entry| entry.end.next = 12);
    check(|entry| entry.first = -1);
    check(|entry| entry.gap = Some((10, 11)));
    check(|entry| entry.gap = Some((12, 12)));

    let mut twice = hello();
    twice.streams.push(twice.streams[0].clone());
    assert_eq!(decode::<Hello>(&encode(&twice)), Err(FrameError::Malformed("a stream is named twice")));
    let mut long = hello();
    long.software = "x".repeat(TEXT_BYTES_MAX + 1);
    assert!(matches!(decode::<Hello>(&encode(&long)), Err(FrameError::TooMany { .. })));
}

#[test]
fn a_newer_hello_still_tells_its_versions() {
    let bytes = Bytes::from_static(&[4, 0, 0, 0, 2, 4, 6]);
    assert_eq!(decode::<Hello>(&bytes), Err(FrameError::Version { found: 4 }));
    assert_eq!(hello_versions(&bytes), Some((4, 6)));
}

#[test]
fn the_highest_common_version_is_chosen() {
    assert_eq!(negotiate(1, 1), Some(1));
    assert_eq!(negotiate(1, 9), Some(1));
    assert_eq!(negotiate(0, 0), None);
    assert_eq!(negotiate(2, 9), None);
}

#[test]
fn an_announced_length_is_not_trusted() {
    let bytes = Bytes::from_static(&[1, 0xff, 0xff, 0xff, 0xff, 1, 1]);
    assert!(matches!(decode::<Hello>(&bytes), Err(FrameError::TooMany { .. })));
    let bytes = Bytes::from_static(&[1, 0, 0, 0, 9, 1, 1]);
    assert!(matches!(decode::<Hello>(&bytes), Err(FrameError::Cut { .. })));
}

#[test]
fn a_long_text_is_cut_between_characters() {
    let text = bounded_text("ä".repeat(400));
    assert_eq!(text.len(), TEXT_BYTES_MAX);
    let text = bounded_text("a".to_owned() + &"ä".repeat(400));
    assert_eq!(text.len(), TEXT_BYTES_MAX - 1);
}

fn any_name() -> impl Strategy<Value = StreamName> {
    "[a-z][a-z0-9._-]{0,20}".prop_map(|text| StreamName::parse(&text).unwrap())
}

fn any_offset() -> impl Strategy<Value = Offset> {
    prop_oneof![0..1000i64, 0..i64::MAX]
}

fn any_position() -> impl Strategy<Value = Position> {
    (any_offset(), any::<u64>()).prop_map(|(next, chain)| Position { next, chain: Chain(chain) })
}

fn any_outcome() -> impl Strategy<Value = Outcome> {
    prop_oneof![
        Just(Outcome::Stored),
        Just(Outcome::Have),
        Just(Outcome::WrongPosition),
        ".{0,40}".prop_map(|reason| Outcome::Rejected { reason }),
        ".{0,40}".prop_map(|reason| Outcome::Parked { reason }),
        ".{0,40}".prop_map(|reason| Outcome::Later { reason }),
    ]
}

fn any_entry() -> impl Strategy<Value = (AppendEntry, Bytes)> {
    let after = proptest::option::of(any_position());
    let batch = proptest::collection::vec(any::<u8>(), 0..50);
    (any_name(), after, 1..1i64 << 60, any_position(), any::<bool>(), any::<bool>(), batch).prop_map(
        |(stream, after, first, mut end, gap, rejected, batch)| {
            end.next = end.next.max(first + 1);
            let gap = gap.then_some((first - 1, first));
            let bytes = batch.len() as u32;
            (AppendEntry { stream, after, first, end, gap, rejected, bytes }, batch.into())
        },
    )
}

proptest! {
    #[test]
    fn an_append_is_read_back(entries in proptest::collection::vec(any_entry(), 0..6), boot: [u8; 16], hello: u32) {
        let (entries, batches): (Vec<_>, Vec<_>) = entries.into_iter().unzip();
        let append = Append { edge: EdgeId::parse("e").unwrap(), session: Session { boot, hello }, entries };
        prop_assert_eq!(decode_append(&encode_append(&append, &batches)), Ok((append, batches)));
    }

    #[test]
    fn an_append_reply_is_read_back(
        streams in proptest::collection::vec((any_name(), proptest::option::of(any_position()),
            proptest::option::of(any_offset()), any_outcome()), 0..6),
        bytes: u32, wait_ms: u32,
    ) {
        let streams = streams.into_iter()
            .map(|(name, position, safe, outcome)| StreamReply { name, position, safe, outcome }).collect();
        let reply = AppendReply { session: SessionState::Unknown, credit: Credit { bytes, wait_ms }, streams };
        prop_assert_eq!(decode(&encode(&reply)), Ok(reply));
    }

    #[test]
    fn any_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), framed: bool) {
        if framed && bytes.len() >= PREFIX_BYTES {
            let length = (bytes.len() - PREFIX_BYTES) as u32;
            bytes[0] = 1;
            bytes[1..PREFIX_BYTES].copy_from_slice(&length.to_be_bytes());
        }
        let bytes = Bytes::from(bytes);
        let _ = decode::<Hello>(&bytes);
        let _ = decode::<HelloReply>(&bytes);
        let _ = decode_append(&bytes);
        let _ = decode::<AppendReply>(&bytes);
        let _ = decode::<Poll>(&bytes);
        let _ = decode::<PollReply>(&bytes);
        let _ = hello_versions(&bytes);
    }

    #[test]
    fn a_changed_byte_never_panics(at: prop::sample::Index, byte: u8) {
        let (append, batches) = append();
        for bytes in [encode(&hello()), encode_append(&append, &batches)] {
            let mut bytes = bytes.to_vec();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let bytes = Bytes::from(bytes);
            let _ = decode::<Hello>(&bytes);
            let _ = decode_append(&bytes);
        }
    }
}
