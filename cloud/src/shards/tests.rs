//! Several shards behave as one log, whatever stops between two of them.

use shared::block_on::block_on;
use shared::log::conformance::{self, Engine as UnderTest, batch, from_edge, from_producer, read_all, sized, stream};
use shared::name::TopicName;

use super::*;
use crate::archive::Recovered;
use crate::shard::ShardSettings;
use crate::state::{LogChange, ProducerChange, SlotChange, TopicChange};
use crate::wal::memory::MemoryWal;

mod groups;

const WAL_BYTES: u64 = 2 << 20;

/// The disks of a node: what is on them is there after a restart.
#[derive(Clone)]
struct Disks(BTreeMap<u32, MemoryWal>);

impl Disks {
    fn new() -> Self {
        Self((0..3).map(|number| (number, MemoryWal::new(WAL_BYTES))).collect())
    }

    fn open(&self, number: u32) -> Member {
        let settings = ShardSettings { shard: number, archived: true, ..ShardSettings::default() };
        let wal = Box::new(self.0[&number].clone());
        let shard = Shard::open(settings, wal, Recovered::default(), None, Arc::new(|| 1_000)).unwrap();
        Member { number, engine: Engine::File, shard }
    }

    /// Shards 0 to 2 on their disks, and shard 3 that keeps nothing.
    fn start(&self) -> Shards {
        let mut members: Vec<Member> = self.0.keys().map(|number| self.open(*number)).collect();
        let catalogue = members[0].shard.clone();
        let engines = [(0, Engine::File), (1, Engine::File), (2, Engine::File), (3, Engine::Memory)];
        let added = engines.map(|(shard, engine)| SlotChange::ShardAdded { shard, engine }.into());
        block_on(catalogue.commit(added.to_vec())).unwrap();
        let (begins, ceiling) = block_on(reserve_offsets(&catalogue, 3)).unwrap();
        let settings = ShardSettings { shard: 3, archived: false, drops_oldest: true, ..ShardSettings::default() };
        let wal = Box::new(MemoryWal::new(WAL_BYTES));
        let shard = Shard::open(settings, wal, Recovered::default(), None, Arc::new(|| 1_000)).unwrap();
        block_on(shard.commit(vec![begins])).unwrap();
        members.push(Member { number: 3, engine: Engine::Memory, shard });
        let shards = Shards::new(members, BTreeMap::from([(3, ceiling)]));
        block_on(shards.reconcile()).unwrap();
        shards
    }
}

impl Shards {
    fn member(&self, number: u32) -> &Arc<Shard> {
        numbered(&self.members, number).unwrap()
    }

    fn place(&self, n: u8, partitions: u32, shards: &[u32]) {
        block_on(self.commit(vec![placed(n, partitions, shards, CATALOGUE)])).unwrap();
    }

    fn append(&self, partition: Partition, records: i32) -> Offset {
        block_on(Log::append(self, from_producer(partition, batch(records, 1)))).unwrap().base_offset
    }

    /// Everything in this shard is in the bucket.
    fn ship(&self, number: u32) {
        let shard = self.member(number);
        crate::archive::Source::shipped(&**shard, shard.status().next_seq);
    }

    fn end(&self, partition: Partition) -> Offset {
        self.bounds(partition).unwrap().high_watermark
    }

    fn close(self) {
        self.members.iter().for_each(|member| member.shard.close());
    }
}

fn topic(n: u8, partitions: u32) -> Topic {
    let name = TopicName::parse(&format!("topic-{n}")).unwrap();
    Topic { id: TopicId([n; 16]), name, partitions, configs: BTreeMap::new(), created_ms: 0 }
}

fn placed(n: u8, partitions: u32, shards: &[u32], own: u32) -> Change {
    Change::Topics(TopicChange::Created { topic: topic(n, partitions), shards: shards.to_vec(), own, from: 0 })
}

fn at(n: u8, index: u32) -> Partition {
    Partition { topic: TopicId([n; 16]), index }
}

fn names(shards: &Shards) -> Vec<String> {
    read_state(shards, |state| state.topics().map(|topic| topic.name.to_string()).collect())
}

struct Node {
    disks: Disks,
    shards: Option<Arc<Shards>>,
    topics: u8,
}

impl UnderTest for Node {
    fn log(&self) -> Arc<dyn Log> {
        self.shards.clone().unwrap()
    }

    fn create(&mut self) -> Partition {
        self.topics += 1;
        let shards = self.shards.as_ref().unwrap();
        shards.place(self.topics, 2, &[1, 2]);
        at(self.topics, u32::from(self.topics) % 2)
    }

    fn reopen(&mut self) -> bool {
        self.shards.take().unwrap().members.iter().for_each(|member| member.shard.close());
        self.shards = Some(Arc::new(self.disks.start()));
        true
    }
}

#[test]
fn several_shards_keep_the_contract_of_one_log() {
    conformance::run(&mut || {
        let disks = Disks::new();
        let shards = Some(Arc::new(disks.start()));
        Box::new(Node { disks, shards, topics: 0 })
    });
}

#[test]
fn partitions_lie_where_the_catalogue_says_and_stay_there() {
    let disks = Disks::new();
    let shards = disks.start();
    block_on(shards.commit(vec![Change::created(topic(1, 2))])).unwrap();
    shards.place(2, 3, &[0, 1, 2]);
    for index in 0..3 {
        assert_eq!(shards.append(at(2, index), 5), 0);
        let own = shards.member(index).bounds(at(2, index)).unwrap();
        assert_eq!(own.high_watermark, 5);
        assert!(shards.member((index + 1) % 3).bounds(at(2, index)).is_err(), "in one shard only");
    }
    assert_eq!(shards.append(at(1, 1), 1), 0);
    assert!(shards.member(0).bounds(at(1, 1)).is_ok(), "without a placement in the catalogue's shard");
    block_on(shards.commit(vec![Change::Topics(TopicChange::PartitionsAdded { id: at(2, 0).topic, count: 5 })]))
        .unwrap();
    assert_eq!(shards.append(at(2, 4), 1), 0);
    assert!(shards.member(1).bounds(at(2, 4)).is_ok());
    shards.close();
    let shards = disks.start();
    for (index, end) in [5, 5, 5, 0, 1].into_iter().enumerate() {
        assert_eq!(shards.end(at(2, index as u32)), end);
    }
    block_on(shards.commit(vec![Change::Topics(TopicChange::Deleted { id: at(2, 0).topic })])).unwrap();
    assert!((0..5).all(|index| shards.bounds(at(2, index)).is_err()));
    assert!(shards.members.iter().all(|member| member.shard.bounds(at(2, 1)).is_err()));
    assert_eq!(read_state(&shards, |state| state.leaving().count()), 0);
    assert_eq!(names(&shards), ["topic-1"]);
}

#[test]
fn a_stop_between_two_shards_leaves_nothing_wrong() {
    let id = at(1, 0).topic;
    // Made in the shards and not in the catalogue: it may have records, so it is there.
    let disks = Disks::new();
    let shards = disks.start();
    for own in [1, 2] {
        block_on(shards.member(own).commit(vec![placed(1, 2, &[1, 2], own)])).unwrap();
    }
    block_on(shards.member(1).append(from_producer(at(1, 0), batch(3, 1)))).unwrap();
    shards.close();
    let shards = disks.start();
    assert_eq!((shards.end(at(1, 0)), names(&shards)), (3, vec!["topic-1".to_owned()]));
    // More partitions in the shards than in the catalogue.
    block_on(shards.member(2).commit(vec![Change::Topics(TopicChange::PartitionsAdded { id, count: 4 })])).unwrap();
    shards.close();
    let shards = disks.start();
    assert_eq!((shards.end(at(1, 2)), shards.end(at(1, 3))), (0, 0), "in both");
    // Settings in the catalogue and not in the shards.
    let configs = BTreeMap::from([("retention.ms".to_owned(), "5".to_owned())]);
    block_on(shards.catalogue().commit(vec![Change::Topics(TopicChange::Configured { id, configs: configs.clone() })]))
        .unwrap();
    shards.close();
    let shards = disks.start();
    for own in [1, 2] {
        assert_eq!(read_state(&**shards.member(own), |state| state.topic(id).unwrap().configs.clone()), configs);
    }
    // Deleted in the catalogue and not in the shards.
    block_on(shards.catalogue().commit(vec![Change::Topics(TopicChange::Deleted { id })])).unwrap();
    shards.close();
    let shards = disks.start();
    assert!(names(&shards).is_empty());
    assert!([1, 2].iter().all(|own| read_state(&**shards.member(*own), |state| state.topics().count()) == 0));
    assert_eq!(read_state(&shards, |state| state.leaving().count()), 0);
}

#[test]
fn a_node_of_one_shard_knows_its_streams_as_well() {
    let disks = Disks::new();
    let start = || Shards::new(vec![disks.open(0)], BTreeMap::new());
    let shards = start();
    block_on(shards.commit(vec![Change::created(topic(1, 1))])).unwrap();
    let key = stream(1, 1);
    block_on(Log::append(&shards, from_edge(at(1, 0), &key, 0, 9))).unwrap();
    let next = |shards: &Shards| StateLog::stream(shards, &key).map(|stream| stream.next);
    assert_eq!(next(&shards), Some(10));
    crate::archive::Source::shipped(&**shards.catalogue(), shards.catalogue().status().next_seq);
    assert_eq!(shards.safe(&key), Some(10));
    shards.close();
    assert_eq!(next(&start()), Some(10));
}

#[test]
fn a_setting_that_a_shard_did_not_take_is_not_answered_as_done() {
    let disks = Disks::new();
    let shards = disks.start();
    shards.place(1, 1, &[1]);
    let configs = BTreeMap::from([("retention.ms".to_owned(), "5".to_owned())]);
    let configured = || vec![Change::Topics(TopicChange::Configured { id: at(1, 0).topic, configs: configs.clone() })];
    block_on(shards.commit(configured())).unwrap();
    shards.member(1).close();
    assert!(block_on(shards.commit(configured())).is_err());
}

#[test]
fn a_shard_that_lost_a_topic_does_not_use_its_offsets_again() {
    let disks = Disks::new();
    let shards = disks.start();
    shards.place(1, 1, &[1]);
    shards.append(at(1, 0), 7);
    shards.close();
    // Its disk is gone, and what came from the bucket is older than the topic.
    let mut lost = disks.clone();
    lost.0.insert(1, MemoryWal::new(WAL_BYTES));
    let restored = lost.open(1);
    block_on(restored.shard.commit(vec![Change::Logs(LogChange::EpochStarted { epoch: 1, skip: 1 << 32 })])).unwrap();
    restored.shard.close();
    let shards = lost.start();
    let bounds = shards.bounds(at(1, 0)).unwrap();
    assert_eq!((bounds.log_start, bounds.high_watermark, bounds.leader_epoch), (1 << 32, 1 << 32, 1));
    assert_eq!(shards.append(at(1, 0), 1), 1 << 32);
}

#[test]
fn a_memory_shard_begins_above_all_it_may_have_used_in_an_epoch_of_its_own() {
    let disks = Disks::new();
    let mut begins = Vec::new();
    for life in 0..3 {
        let shards = disks.start();
        if life == 0 {
            shards.place(1, 1, &[3]);
        }
        let bounds = shards.bounds(at(1, 0)).unwrap();
        begins.push((bounds.log_start, bounds.leader_epoch));
        assert_eq!(shards.append(at(1, 0), 9), bounds.log_start);
        assert_eq!(read_all(&shards, at(1, 0), bounds.log_start, 1 << 20).len(), 1);
        shards.close();
    }
    assert_eq!(begins, [(0, 1), (1 << 32, 2), (2 << 32, 3)]);
}

#[test]
fn a_memory_shard_reserves_more_before_it_needs_it() {
    let disks = Disks::new();
    let shards = disks.start();
    shards.place(1, 1, &[3]);
    shards.member(3).allow_offsets_below(100);
    shards.ceilings.write().insert(3, 100);
    shards.append(at(1, 0), 99);
    let refused = block_on(Log::append(&shards, from_producer(at(1, 0), batch(2, 1))));
    assert!(matches!(refused, Err(AppendError::Full(text)) if text.contains("100")));
    block_on(shards.raise_ceilings()).unwrap();
    assert_eq!(shards.append(at(1, 0), 2), 99);
    let reserved = read_state(&shards, |state| state.shards().find(|(n, _)| *n == 3).unwrap().1.ceiling);
    assert!(reserved >= 101 && *shards.ceilings.read().get(&3).unwrap() <= reserved.max(100 + OFFSETS_RESERVED));
}

#[test]
fn a_full_memory_shard_lets_the_oldest_go() {
    let shards = Disks::new().start();
    shards.place(1, 2, &[3]);
    shards.append(at(1, 1), 5);
    for _ in 0..40 {
        block_on(Log::append(&shards, from_producer(at(1, 0), sized(200_000)))).unwrap();
    }
    let bounds = shards.bounds(at(1, 0)).unwrap();
    assert_eq!(bounds.high_watermark, 40);
    assert!((30..40).contains(&bounds.log_start), "{bounds:?}");
    assert_eq!(shards.bounds(at(1, 1)).unwrap().log_start, 5, "the quiet partition's oldest went too");
    assert_eq!(read_all(&shards, at(1, 0), bounds.log_start, 1 << 20).len() as i64, 40 - bounds.log_start);
    assert!(shards.member(3).status().wal.bytes <= WAL_BYTES);
    // A batch that finds no room calls for some.
    while block_on(Log::append(&shards, from_producer(at(1, 0), sized(700_000)))).is_err() {
        std::thread::yield_now();
    }
}

#[test]
fn a_stream_goes_on_in_another_shard_where_it_was() {
    let disks = Disks::new();
    let shards = disks.start();
    shards.place(1, 1, &[1]);
    shards.place(2, 1, &[2]);
    let key = stream(1, 1);
    let send =
        |shards: &Shards, n: u8, first, last| block_on(Log::append(shards, from_edge(at(n, 0), &key, first, last)));
    send(&shards, 1, 0, 9).unwrap();
    // What is not in the bucket could be lost in one shard, and the other's position would hide it.
    assert!(matches!(send(&shards, 2, 10, 19), Err(AppendError::Full(text)) if text.contains("shard 1")));
    shards.ship(1);
    // The first batch there is wrong: it is told so, although nothing else is written.
    assert_eq!(send(&shards, 2, 40, 49), Err(AppendError::WrongPosition { next: 10, have: false }));
    send(&shards, 2, 10, 19).unwrap();
    assert_eq!(send(&shards, 2, 10, 19), Err(AppendError::WrongPosition { next: 20, have: true }));
    assert_eq!(shards.stream(&key).unwrap().next, 20);
    // Back again, where an older position is known, and two at a time.
    shards.ship(2);
    let calls = [(20, 24), (25, 29)].map(|(first, last)| Log::append(&shards, from_edge(at(1, 0), &key, first, last)));
    assert!(calls.into_iter().all(|call| block_on(call).is_ok()));
    assert_eq!((shards.end(at(1, 0)), shards.end(at(2, 0))), (20, 10));
    assert!(matches!(send(&shards, 1, 40, 41), Err(AppendError::WrongPosition { next: 30, have: false })));
    shards.close();
    let shards = disks.start();
    assert_eq!(shards.stream(&key).unwrap().next, 30);
    assert_eq!(shards.streams().len(), 1);
    assert_eq!(shards.incarnations(&key.edge, &key.stream), [key.incarnation]);
}

#[test]
fn a_stream_is_safe_up_to_where_the_slowest_shard_is() {
    for (shards, expected) in [
        (vec![], None),
        (vec![(100, Some(80))], Some(80)),
        (vec![(100, None)], None),
        (vec![(100, Some(80)), (200, Some(200))], Some(80)),
        (vec![(100, Some(100)), (200, None)], Some(100)),
        (vec![(100, Some(100)), (200, Some(150))], Some(150)),
        (vec![(50, Some(50)), (100, Some(100))], Some(100)),
        (vec![(100, Some(70)), (200, Some(150))], Some(70)),
    ] {
        assert_eq!(safe_of(shards.clone().into_iter()), expected, "{shards:?}");
    }
    let shards = Disks::new().start();
    shards.place(1, 1, &[1]);
    shards.place(2, 1, &[2]);
    let key = stream(1, 1);
    let mut changed = Safety::changed(&shards);
    block_on(Log::append(&shards, from_edge(at(1, 0), &key, 0, 9))).unwrap();
    assert_eq!(Safety::safe(&shards, &key), None);
    shards.ship(1);
    assert_eq!(conformance::poll_once(&mut changed), Some(()));
    block_on(Log::append(&shards, from_edge(at(2, 0), &key, 10, 19))).unwrap();
    assert_eq!(Safety::safe(&shards, &key), Some(10));
    shards.ship(2);
    assert_eq!(Safety::safe(&shards, &key), Some(20));
}

/// A topic that was made in one of its shards only, or not deleted everywhere, must not be in the way of the next.
#[test]
fn a_name_that_a_shard_still_holds_is_free_for_a_new_topic() {
    let disks = Disks::new();
    let shards = disks.start();
    block_on(shards.member(1).commit(vec![placed(1, 1, &[1], 1)])).unwrap();
    let again = Topic { id: TopicId([9; 16]), ..topic(1, 1) };
    let placed = Change::Topics(TopicChange::Created { topic: again, shards: vec![1], own: CATALOGUE, from: 0 });
    block_on(shards.commit(vec![placed])).unwrap();
    assert_eq!(shards.append(at(9, 0), 3), 0);
    shards.close();
    let shards = disks.start();
    assert_eq!((shards.end(at(9, 0)), names(&shards)), (3, vec!["topic-1".to_owned()]));
    block_on(shards.commit(vec![Change::Topics(TopicChange::Deleted { id: TopicId([9; 16]) })])).unwrap();
    assert!(shards.bounds(at(9, 0)).is_err());
}

/// The catalogue's disk is lost and comes back older than what it had acknowledged.
#[test]
fn a_restored_catalogue_uses_nothing_twice() {
    let disks = Disks::new();
    let shards = disks.start();
    shards.place(1, 2, &[0, 1]);
    shards.place(2, 1, &[3]);
    shards.append(at(1, 0), 5);
    shards.append(at(1, 1), 5);
    shards.append(at(2, 0), 5);
    block_on(shards.commit(vec![Change::Producers(ProducerChange::IdsReserved { next: 1000 })])).unwrap();
    shards.close();
    let mut lost = disks.clone();
    lost.0.insert(0, MemoryWal::new(WAL_BYTES));
    let restored = lost.open(0);
    let engines = [(0, Engine::File), (1, Engine::File), (2, Engine::File), (3, Engine::Memory)];
    let mut known: Vec<Change> = engines
        .iter()
        .map(|(shard, engine)| SlotChange::ShardAdded { shard: *shard, engine: *engine }.into())
        .collect();
    known.push(Change::Logs(LogChange::EpochStarted { epoch: 1, skip: 1 << 32 }));
    block_on(restored.shard.commit(known)).unwrap();
    restored.shard.close();
    let shards = lost.start();
    assert_eq!(shards.end(at(1, 1)), 5, "its shard lost nothing");
    assert_eq!(shards.bounds(at(1, 0)).unwrap().log_start, 1 << 32, "this one lay in the catalogue's");
    assert!(read_state(&shards, State::next_producer_id) >= 1000);
    let (_, memory) = read_state(&shards, |state| state.shards().find(|(n, _)| *n == 3).map(|(n, e)| (n, *e))).unwrap();
    assert!(memory.epoch > 1 && memory.ceiling > 1 << 32, "{memory:?}");
}

#[test]
fn shards_become_more_and_never_fewer() {
    let known = [(0, Engine::File), (1, Engine::Object)];
    let wanted = |file, object, memory| [(Engine::File, file), (Engine::Object, object), (Engine::Memory, memory)];
    assert_eq!(assign(&[], &wanted(1, 0, 0)).unwrap(), [(0, Engine::File)]);
    let grown = assign(&known, &wanted(2, 1, 1)).unwrap();
    assert_eq!(grown[2..], [(2, Engine::File), (3, Engine::Memory)]);
    let refused = assign(&known, &wanted(1, 0, 0)).unwrap_err();
    assert!(refused.contains("[shards] object = 0") && refused.contains("Set it to 1"), "{refused}");
}

#[test]
fn a_deleted_topic_leaves_no_route() {
    let shards = Disks::new().start();
    block_on(shards.commit(vec![Change::created(topic(1, 1))])).unwrap();
    shards.place(2, 1, &[1]);
    for n in [1, 2] {
        shards.append(at(n, 0), 1);
        let mut deletion = shards.commit(vec![Change::Topics(TopicChange::Deleted { id: at(n, 0).topic })]);
        // Whoever still sees the topic finds its shard, and leaves it behind.
        assert_eq!(shards.shard_of(at(n, 0)).status().shard, u32::from(n) - 1);
        let _ = conformance::poll_once(&mut deletion);
        shards.shard_of(at(n, 0));
        block_on(deletion).unwrap();
        assert!(shards.routes.read().is_empty(), "topic {n}");
    }
}

#[test]
fn of_a_stream_only_those_shards_are_asked_that_have_had_records_of_it() {
    let disks = Disks::new();
    let shards = disks.start();
    shards.place(1, 1, &[1]);
    shards.place(2, 1, &[2]);
    let key = stream(1, 1);
    let send = |shards: &Shards, n: u8, first, last| {
        block_on(Log::append(shards, from_edge(at(n, 0), &key, first, last))).unwrap();
    };
    let asked = |shards: &Shards| shards.knowing(&key).map(|member| member.number).collect::<Vec<_>>();
    assert!(asked(&shards).is_empty());
    send(&shards, 1, 0, 9);
    send(&shards, 1, 10, 19);
    assert_eq!(asked(&shards), [1]);
    shards.ship(1);
    send(&shards, 2, 20, 29);
    assert_eq!(asked(&shards), [1, 2]);
    shards.close();
    let shards = disks.start();
    assert_eq!((asked(&shards), shards.stream(&key).unwrap().next), (vec![1, 2], 30));
}
