use std::collections::BTreeMap;

use proptest::prelude::*;
use shared::clock::ClockState;
use shared::log::Chain;
use shared::name::{Incarnation, Partition, TopicName};

use super::*;

fn id(n: u8) -> TopicId {
    TopicId([n; 16])
}

fn topic(n: u8, name: &str, partitions: u32) -> Topic {
    Topic { id: id(n), name: TopicName::parse(name).unwrap(), partitions, configs: BTreeMap::new(), created_ms: 5 }
}

fn partition(n: u8, index: u32) -> Partition {
    Partition { topic: id(n), index }
}

fn stream() -> (EdgeId, StreamName) {
    (EdgeId::parse("gw-1").unwrap(), StreamName::parse("telemetry").unwrap())
}

fn slot(number: u8) -> CoordinatorSlot {
    CoordinatorSlot::try_from(number).unwrap()
}

fn committed(offset: Offset) -> CommittedOffset {
    CommittedOffset { offset, leader_epoch: 3, metadata: "m".into(), commit_ms: 9 }
}

/// One of every variant, and a topic in several shards.
pub fn one_of_each() -> Vec<Change> {
    let (edge, name) = stream();
    let map = BTreeMap::from([("k".to_owned(), "v".to_owned())]);
    vec![
        Change::created(topic(1, "t", 2)),
        Change::Topics(TopicChange::Deleted { id: id(9) }),
        Change::Topics(TopicChange::PartitionsAdded { id: id(1), count: 3 }),
        Change::Topics(TopicChange::Configured { id: id(1), configs: map.clone() }),
        GroupChange::OffsetCommitted { group: "g".into(), partition: partition(1, 0), committed: committed(7) }.into(),
        GroupChange::OffsetDeleted { group: "g".into(), partition: partition(1, 1) }.into(),
        GroupChange::Deleted { group: "h".into() }.into(),
        GroupChange::Touched { group: "g".into(), protocol_type: "consumer".into(), empty_since_ms: Some(4) }.into(),
        Change::Producers(ProducerChange::IdsReserved { next: 1000 }),
        Change::Logs(LogChange::StartMoved { partition: partition(1, 0), offset: 2 }),
        EdgeChange::Seen { edge: edge.clone(), seen_ms: 11, detail: map }.into(),
        EdgeChange::StreamPlaced { stream: (edge.clone(), name.clone()), topic: id(1), index: 1 }.into(),
        Change::Streams(StreamChange::Position {
            key: StreamKey { edge, stream: name, incarnation: Incarnation([7; 16]) },
            partition: partition(1, 1),
            next: 42,
            chain: Chain(0xfeed),
        }),
        Change::Logs(LogChange::EpochStarted { epoch: 1, skip: 1 << 32 }),
        Change::Topics(TopicChange::Created { topic: topic(2, "u", 3), shards: vec![0, 4], own: 0, from: 8 }),
        Change::Topics(TopicChange::Gone { id: id(8) }),
        SlotChange::ShardAdded { shard: 4, engine: Engine::Object }.into(),
        SlotChange::OffsetsReserved { shard: 4, epoch: 2, ceiling: 1 << 32 }.into(),
        SlotChange::Placed { slot: slot(63), shard: 4 }.into(),
        Change::Producers(ProducerChange::Expired { before_ms: 6 }),
        Change::Logs(LogChange::TimeCounted(ClockState { counted_ms: 100, ahead_ms: -3 })),
    ]
}

fn state() -> State {
    let mut state = State::default();
    one_of_each().iter().for_each(|change| state.apply(change).unwrap());
    state
}

/// These bytes rest in blocks and buckets: if this fails, the format changed and old data no longer reads.
#[test]
fn golden_bytes_of_every_change() {
    let t1 = "01".repeat(16);
    // The section's tag, and what it says.
    let golden = [
        (0x01, format!("00{t1}0174 02 00 0a 01 00 00 00")),
        (0x01, format!("01{}", "09".repeat(16))),
        (0x01, format!("02{t1}03")),
        (0x01, format!("03{t1}01016b0176")),
        (0x10, format!("00 0167 {t1}00 0e 06 016d 12")),
        (0x10, format!("01 0167 {t1}01")),
        (0x10, "02 0168".into()),
        (0x10, "03 0167 08636f6e73756d6572 0108".into()),
        (0x03, "00 d00f".into()),
        (0x02, format!("00 {t1}00 04")),
        (0x11, "00 0467772d31 16 01016b0176".into()),
        (0x11, format!("01 0467772d31 0974656c656d65747279 {t1} 01")),
        (0x04, format!("00 0467772d31 0974656c656d65747279 {} {t1}01 54 edfd03", "07".repeat(16))),
        (0x02, "01 02 8080808020".into()),
        (0x01, format!("00 {}0175 03 00 0a 02 00 04 00 10", "02".repeat(16))),
        (0x01, format!("04 {}", "08".repeat(16))),
        (0x12, "00 04 01".into()),
        (0x12, "01 04 04 8080808020".into()),
        (0x12, "02 3f 04".into()),
        (0x03, "01 0c".into()),
        (0x02, "02 c801 05".into()),
    ];
    assert_eq!(one_of_each().len(), golden.len());
    for (change, (tag, expected)) in one_of_each().iter().zip(golden) {
        let hex: String = encode_changes(std::slice::from_ref(change)).iter().map(|b| format!("{b:02x}")).collect();
        let expected = expected.replace(' ', "");
        assert_eq!(hex, format!("0301{tag:02x}01{:02x}{expected}", expected.len() / 2), "{change:?}");
    }
}

#[test]
fn changes_and_snapshots_are_read_back() {
    assert_eq!(decode_changes(&encode_changes(&one_of_each())).unwrap(), one_of_each());
    assert_eq!(decode_changes(&encode_changes(&[])).unwrap(), []);
    assert_eq!(State::decode(&state().encode()).unwrap(), state());
}

/// A manifest names these bytes: if this fails, the format changed and old data no longer reads.
#[test]
fn golden_bytes_of_a_snapshot() {
    let (t1, t2) = ("01".repeat(16), "02".repeat(16));
    let golden = [
        // Topics, their ids by name, where they lie, none leaving.
        (
            0x01,
            [
                format!("02 {t1}{t1}0174 03 01016b0176 0a {t2}{t2}0175 03 00 0a 02 0174{t1} 0175{t2}"),
                format!("02 {t1} 01 00 00 {t2} 02 00 04 00 00"),
            ]
            .concat(),
        ),
        // Leader epoch, the owner's epoch, offsets left out, the count of time; partitions: log start, end, epochs.
        (
            0x02,
            [
                "02 00 8080808020 c801 05 05".into(),
                (0..3).map(|n| format!("{t1}0{n} 00 8080808020 01 028080808020 00")).collect(),
                [0, 2].map(|n| format!("{t2}0{n} 10 10 01 021010")).concat(),
            ]
            .concat(),
        ),
        // The first producer id that is free, no producers.
        (0x03, "d08f808020 00".into()),
        (0x04, format!("01 0467772d31 0974656c656d65747279 {} {t1}01 54 edfd03", "07".repeat(16))),
        (0x10, format!("01 0167 08636f6e73756d6572 0108 01 {t1}00 0e 06 016d 12")),
        (0x11, format!("01 0467772d31 16 01016b0176 01 0467772d31 0974656c656d65747279 {t1}01")),
        (0x12, "01 04 01 04 8080808020 01 3f 04".into()),
    ];
    let mut expected = format!("06{:02x}", golden.len());
    for (tag, bytes) in golden {
        let bytes: String = bytes.replace(' ', "");
        let length = bytes.len() / 2;
        let length = if length < 0x80 {
            format!("{length:02x}")
        } else {
            format!("{:02x}{:02x}", length & 0x7f | 0x80, length >> 7)
        };
        expected += &format!("{tag:02x}01{length}{bytes}");
    }
    assert_eq!(state().encode().iter().map(|b| format!("{b:02x}")).collect::<String>(), expected);
    let mut longer = state().encode();
    longer.push(0);
    assert_eq!(State::decode(&longer), Err(StateError::Malformed("bytes after the sections or changes")));
}

#[test]
fn a_shard_keeps_the_partitions_that_are_its_own() {
    let shards = vec![0, 4, 5];
    for (own, indexes) in [(0, vec![0, 3]), (4, vec![1, 4]), (5, vec![2])] {
        let mut state = State::default();
        state
            .apply(&Change::Topics(TopicChange::Created {
                topic: topic(2, "u", 3),
                shards: shards.clone(),
                own,
                from: 0,
            }))
            .unwrap();
        state.apply(&Change::Topics(TopicChange::PartitionsAdded { id: id(2), count: 5 })).unwrap();
        let kept: Vec<u32> = state.partitions().map(|(partition, _)| partition.index).collect();
        assert_eq!((kept, state.topic(id(2)).unwrap().partitions), (indexes, 5));
        assert_eq!(state.shard_of(partition(2, 4)), 4);
        // Told again, where it is known: only what is missing is added, and nothing begins anew.
        state.advance(partition(2, own % 4), 9);
        let before = state.clone();
        state
            .apply(&Change::Topics(TopicChange::Created {
                topic: topic(2, "u", 5),
                shards: shards.clone(),
                own,
                from: 7,
            }))
            .unwrap();
        assert_eq!(state, before);
        state.apply(&Change::Topics(TopicChange::Deleted { id: id(2) })).unwrap();
        assert_eq!(state.partitions().count() + state.topics().count(), 0);
        let leaving: Vec<_> = state.leaving().map(|(id, shards)| (id, shards.to_vec())).collect();
        assert_eq!(leaving, if own == 0 { vec![(id(2), vec![4, 5])] } else { vec![] });
    }
}

#[test]
fn a_section_that_is_unknown_twice_there_or_missing_is_refused() {
    let own = || [encode(&Topics::default()), encode(&Logs::default()), encode(&Producers::default())];
    let read = |more: Vec<Piece<'_>>| State::decode(&encode_pieces(6, own().into_iter().chain(more).collect()));
    assert_eq!(read(vec![encode(&Streams::default())]), Ok(State::default()), "guests may come later");
    assert!(matches!(read(vec![]), Err(StateError::Malformed(_))));
    assert!(matches!(read(vec![encode(&Logs::default())]), Err(StateError::Malformed(_))));
    for (tag, version) in [(99, 1), (Groups::TAG, 2)] {
        let other = || Piece { tag, version, bytes: vec![0].into() };
        let refused = Err(StateError::Section { tag, version });
        assert_eq!(read(vec![encode(&Streams::default()), other()]), refused);
        let changes = decode_changes(&encode_pieces(3, vec![other()])).unwrap();
        assert_eq!(State::default().apply(&changes[0]).map(|()| State::default()), refused);
    }
}

#[test]
fn what_several_owners_may_have_reserved_is_left_out_for_each() {
    let mut state = state();
    state.apply(&Change::Logs(LogChange::EpochStarted { epoch: 9, skip: 3 << 32 })).unwrap();
    let (_, entry) = state.shards().next().unwrap();
    assert_eq!((entry.epoch, entry.ceiling), (5, 4 << 32));
}

#[test]
fn another_version_is_named() {
    for version in [1, 9] {
        assert_eq!(decode_changes(&[version, 0]), Err(StateError::Version(version)));
        assert_eq!(State::decode(&[version]), Err(StateError::Version(version)));
    }
}

#[test]
fn a_deleted_topic_takes_its_offsets_and_placements_along() {
    let mut state = state();
    state.apply(&Change::Topics(TopicChange::Deleted { id: id(1) })).unwrap();
    let (edge, name) = stream();
    assert!(state.topic_named(&TopicName::parse("t").unwrap()).is_none());
    assert!(state.partitions().all(|(partition, _)| partition.topic != id(1)));
    assert!(state.committed("g", partition(1, 0)).is_none());
    assert!(state.placement(&edge, &name).is_none());
    assert_eq!(state.streams().count(), 1, "what was stored stays stored");
    // Of a topic that this shard hosts nothing of too.
    let elsewhere =
        GroupChange::OffsetCommitted { group: "g".into(), partition: partition(7, 0), committed: committed(1) }.into();
    state.apply(&elsewhere).unwrap();
    state.apply(&Change::Topics(TopicChange::Deleted { id: id(7) })).unwrap();
    assert!(state.committed("g", partition(7, 0)).is_none());
}

#[test]
fn a_slot_is_where_it_was_placed_last() {
    let mut state = state();
    assert_eq!((state.slot_shard(slot(63)), state.slot_shard(slot(0))), (4, CATALOGUE));
    state.apply(&SlotChange::Placed { slot: slot(63), shard: 1 }.into()).unwrap();
    assert_eq!(state.slot_shard(slot(63)), 1);
}

#[test]
fn a_topic_made_twice_is_the_first() {
    let mut state = state();
    state.apply(&Change::created(topic(3, "t", 9))).unwrap();
    state
        .apply(&Change::Topics(TopicChange::Created {
            topic: topic(4, "t", 9),
            shards: vec![1],
            own: CATALOGUE,
            from: 0,
        }))
        .unwrap();
    assert_eq!(state.topic_named(&TopicName::parse("t").unwrap()).unwrap().id, id(1));
    assert_eq!(state.topics().count(), 2, "t and u");
}

#[test]
fn an_epoch_begins_above_what_may_have_been_lost() {
    let mut state = State::default();
    state.apply(&Change::created(topic(1, "t", 1))).unwrap();
    state.advance(partition(1, 0), 10);
    state.apply(&Change::Logs(LogChange::EpochStarted { epoch: 1, skip: 100 })).unwrap();
    state.apply(&Change::Logs(LogChange::EpochStarted { epoch: 1, skip: 100 })).unwrap();
    let found = state.partition(partition(1, 0)).unwrap();
    assert_eq!(found.high_watermark, 110);
    assert_eq!(
        found.epochs,
        [EpochStart { epoch: 0, start: 0, before: 0 }, EpochStart { epoch: 1, start: 110, before: 10 }]
    );
    for ((from, to), expected) in [
        ((10, 110), true),
        ((60, 110), true),
        ((9, 110), false),
        ((10, 109), false),
        ((10, 111), false),
        ((5, 5), true),
    ] {
        assert_eq!(found.left_out(from, to), expected, "{from} .. {to}");
    }
    let mut twice = state.clone();
    twice.apply(&Change::Logs(LogChange::EpochStarted { epoch: 2, skip: 100 })).unwrap();
    let found = twice.partition(partition(1, 0)).unwrap();
    assert!(found.left_out(10, 210) && found.left_out(150, 210) && !found.left_out(9, 210));
    state.apply(&Change::created(topic(2, "u", 1))).unwrap();
    assert_eq!(state.partition(partition(2, 0)).unwrap().leader_epoch(), 1);
}

#[test]
fn an_epoch_in_which_nothing_was_written_is_replaced() {
    let mut state = State::default();
    state.apply(&Change::created(topic(1, "t", 1))).unwrap();
    let epochs = |state: &State| {
        let epochs = &state.partition(partition(1, 0)).unwrap().epochs;
        epochs.iter().map(|epoch| (epoch.epoch, epoch.start, epoch.before)).collect::<Vec<_>>()
    };
    state.owned_in(1, true);
    // An empty block of the same owner, and any other block, begin nothing.
    state.owned_in(1, true);
    assert_eq!((state.leader_epoch(), epochs(&state)), (1, vec![(1, 0, 0)]));
    state.advance(partition(1, 0), 10);
    for owner in 2..5 {
        state.owned_in(owner, true);
    }
    assert_eq!((state.leader_epoch(), epochs(&state)), (4, vec![(1, 0, 0), (4, 10, 10)]));
    // What is left out stays left out, and more with it.
    state.apply(&Change::Logs(LogChange::EpochStarted { epoch: 5, skip: 100 })).unwrap();
    state.apply(&Change::Logs(LogChange::EpochStarted { epoch: 7, skip: 100 })).unwrap();
    state.owned_in(9, false);
    state.owned_in(9, true);
    assert_eq!(state.leader_epoch(), 7);
    state.owned_in(10, true);
    assert_eq!(epochs(&state), [(1, 0, 0), (8, 210, 10)]);
    let found = state.partition(partition(1, 0)).unwrap();
    assert!(found.left_out(10, 210) && !found.left_out(9, 210) && found.high_watermark == 210);
}

#[test]
fn epochs_that_ended_below_the_log_start_go() {
    let mut state = State::default();
    state.apply(&Change::created(topic(1, "t", 1))).unwrap();
    for (owner, end) in [(1, 10), (2, 20), (3, 30)] {
        state.advance(partition(1, 0), end);
        state.owned_in(owner, true);
    }
    for (offset, expected) in
        [(9, vec![0, 1, 2, 3]), (10, vec![1, 2, 3]), (19, vec![1, 2, 3]), (29, vec![2, 3]), (99, vec![3])]
    {
        state.apply(&Change::Logs(LogChange::StartMoved { partition: partition(1, 0), offset })).unwrap();
        let epochs = &state.partition(partition(1, 0)).unwrap().epochs;
        assert_eq!(epochs.iter().map(|epoch| epoch.epoch).collect::<Vec<_>>(), expected, "log start {offset}");
    }
}

#[test]
fn a_log_start_neither_falls_nor_passes_the_end() {
    let mut state = State::default();
    state.apply(&Change::created(topic(1, "t", 1))).unwrap();
    state.advance(partition(1, 0), 10);
    for (moved, expected) in [(4, 4), (2, 4), (99, 10)] {
        state.apply(&Change::Logs(LogChange::StartMoved { partition: partition(1, 0), offset: moved })).unwrap();
        assert_eq!(state.partition(partition(1, 0)).unwrap().log_start, expected);
    }
}

#[test]
fn five_batches_of_a_producer_are_remembered() {
    let mut producer = Producer { epoch: 0, batches: Vec::new(), append_ms: 0 };
    let batch = |n: i32| ProducedBatch {
        first_sequence: n,
        last_sequence: n,
        base_offset: i64::from(n),
        last_offset: i64::from(n),
    };
    (0..7).for_each(|n| producer.push(0, batch(n), 1));
    assert_eq!(producer.batches.iter().map(|b| b.first_sequence).collect::<Vec<_>>(), [2, 3, 4, 5, 6]);
    producer.push(1, batch(0), 1);
    assert_eq!(producer.batches.len(), 1);
}

/// What a block does to the state.
#[derive(Debug, Clone)]
enum Step {
    Change(Change),
    Advance(Partition, Offset),
    Produce(Partition, i64, i16),
    Count(i64),
    Fence(u32),
}

impl Step {
    fn take(&self, state: &mut State) {
        match self {
            Self::Change(change) => {
                let bytes = encode_changes([change]);
                decode_changes(&bytes).unwrap().iter().for_each(|change| state.apply(change).unwrap());
            }
            Self::Advance(partition, next) => state.advance(*partition, *next),
            Self::Produce(partition, id, epoch) => {
                let batch = ProducedBatch { first_sequence: 1, last_sequence: 2, base_offset: 3, last_offset: 4 };
                state.produced(*partition, *id, *epoch, batch, *id);
            }
            Self::Count(ms) => state.count_to(*ms),
            Self::Fence(epoch) => state.owned_in(*epoch, true),
        }
    }
}

/// Of every section, about few things, so that changes meet.
fn any_step() -> impl Strategy<Value = Step> {
    let few = || (0..3u8, 0..3u32, 0..40i64);
    let change = (0..21usize, few()).prop_map(|(kind, (n, index, value))| {
        let (edge, name) = stream();
        let (group, at) = (format!("g{n}"), partition(n, index));
        let configs = BTreeMap::from([("k".to_owned(), value.to_string())]);
        let key = StreamKey { edge: edge.clone(), stream: name.clone(), incarnation: Incarnation([n; 16]) };
        match kind {
            0 => Change::created(topic(n, &format!("t{index}"), 2)),
            1 => Change::Topics(TopicChange::Created {
                topic: topic(n, &format!("t{index}"), index),
                shards: vec![4, 0],
                own: 4 * (index % 2),
                from: value,
            }),
            2 => Change::Topics(TopicChange::Deleted { id: id(n) }),
            3 => Change::Topics(TopicChange::PartitionsAdded { id: id(n), count: index + 1 }),
            4 => Change::Topics(TopicChange::Configured { id: id(n), configs }),
            5 => Change::Topics(TopicChange::Gone { id: id(n) }),
            6 => Change::Logs(LogChange::StartMoved { partition: at, offset: value }),
            7 => Change::Logs(LogChange::EpochStarted { epoch: index as i32, skip: value % 4 }),
            8 => Change::Logs(LogChange::TimeCounted(ClockState { counted_ms: value, ahead_ms: -value })),
            9 => Change::Producers(ProducerChange::IdsReserved { next: value }),
            10 => Change::Producers(ProducerChange::Expired { before_ms: value }),
            11 => Change::Streams(StreamChange::Position { key, partition: at, next: value, chain: Chain(7) }),
            12 => GroupChange::OffsetCommitted { group, partition: at, committed: committed(value) }.into(),
            13 => GroupChange::OffsetDeleted { group, partition: at }.into(),
            14 => GroupChange::Deleted { group }.into(),
            15 => GroupChange::Touched { group, protocol_type: "p".into(), empty_since_ms: Some(value) }.into(),
            16 => EdgeChange::Seen { edge, seen_ms: value, detail: configs }.into(),
            17 => EdgeChange::StreamPlaced { stream: (edge, name), topic: id(n), index }.into(),
            18 => SlotChange::ShardAdded { shard: index, engine: Engine::ALL[usize::from(n)] }.into(),
            19 => SlotChange::OffsetsReserved { shard: index, epoch: i32::from(n), ceiling: value }.into(),
            _ => SlotChange::Placed { slot: slot(n), shard: index }.into(),
        }
    });
    let place = || few().prop_map(|(n, index, value)| (partition(n, index), value));
    prop_oneof![
        8 => change.prop_map(Step::Change),
        2 => place().prop_map(|(partition, next)| Step::Advance(partition, next)),
        2 => place().prop_map(|(partition, id)| Step::Produce(partition, id, (id % 2) as i16)),
        1 => (0..100i64).prop_map(Step::Count),
        1 => (0..9u32).prop_map(Step::Fence),
    ]
}

proptest! {
    #[test]
    fn any_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), cut in 0usize..400, at in 0usize..400, flip: u8) {
        let _ = decode_changes(&bytes);
        let _ = State::decode(&bytes);
        for mut good in [encode_changes(&one_of_each()), state().encode()] {
            if let Some(byte) = good.get_mut(at) {
                *byte ^= flip;
            }
            good.truncate(cut.max(1));
            if let Ok(changes) = decode_changes(&good) {
                let mut state = State::default();
                changes.iter().for_each(|change| drop(state.apply(change)));
            }
            let _ = State::decode(&good);
        }
    }

    #[test]
    fn a_snapshot_and_the_rest_are_the_state(steps in proptest::collection::vec(any_step(), 0..60), cut: prop::sample::Index) {
        let mut whole = State::default();
        steps.iter().for_each(|step| step.take(&mut whole));
        let (before, after) = steps.split_at(cut.index(steps.len() + 1));
        let mut first = State::default();
        before.iter().for_each(|step| step.take(&mut first));
        let mut again = State::decode(&first.encode()).unwrap();
        prop_assert_eq!(&again, &first);
        after.iter().for_each(|step| step.take(&mut again));
        prop_assert_eq!(again.encode(), whole.encode());
        prop_assert_eq!(again, whole);
    }
}
