//! No room for records: what is small and needed to go on goes on.

use super::flight::{HeldWal, held};
use super::*;
use crate::shards::{Member, Shards, reserve_offsets};
use crate::state::{CommittedOffset, GroupChange, TopicChange};
use crate::wal::powercut::{CutDisk, Trouble};

fn offset(offset: Offset) -> Vec<Change> {
    let committed = CommittedOffset { offset, leader_epoch: -1, metadata: String::new(), commit_ms: 0 };
    vec![GroupChange::OffsetCommitted { group: "g".into(), partition: partition(1), committed }.into()]
}

fn committed(shard: &Shard) -> Option<Offset> {
    read_state(shard, |state| Some(state.committed("g", partition(1))?.offset))
}

fn sequenced(sequence: i32) -> Append {
    from_producer(partition(1), produced(&batch(2, 1), 7, 0, sequence))
}

fn refused(call: BoxFuture<'static, Result<Appended, AppendError>>) {
    let answer = block_on(call);
    assert!(matches!(answer, Err(AppendError::Full(_))), "{answer:?}");
}

fn retried(shard: &Shard, wal: &HeldWal) {
    (0..2).for_each(|_| wal.order(Ok(())));
    let again = block_on(shard.append(sequenced(0))).unwrap();
    assert_eq!((again.base_offset, again.duplicate), (0, false), "not a repeat, and where it would have been");
    assert_eq!(block_on(shard.append(from_edge(partition(1), &stream(1, 1), 0, 4))).unwrap().base_offset, 2);
}

#[test]
fn a_commit_outlives_the_records_it_shared_a_block_with() {
    let (shard, wal) = held();
    let occupied = shard.commit(offset(1));
    wal.wait_entered(2);
    let (record, edge) = (shard.append(sequenced(0)), shard.append(from_edge(partition(1), &stream(1, 1), 0, 4)));
    let commit = shard.commit(offset(2));
    wal.order(Ok(()));
    block_on(occupied).unwrap();
    wal.order(Err(WalError::Full("test".into())));
    refused(record);
    refused(edge);
    assert_eq!(committed(&shard), Some(1));
    wal.order(Ok(()));
    block_on(commit).unwrap();
    assert_eq!((committed(&shard), shard.status().refused_batches.wal_full), (Some(2), 2));
    assert_eq!(read_state(&*shard, |state| state.streams().count()), 0, "the position went with its records");
    assert_eq!(shard.bounds(partition(1)).unwrap().high_watermark, 0);
    retried(&shard, &wal);
    shard.close();
    let again = open(wal.inner.clone());
    assert_eq!((committed(&again), again.bounds(partition(1)).unwrap().high_watermark), (Some(2), 7));
}

#[test]
fn a_commit_outlives_the_records_before_it() {
    let (shard, wal) = held();
    let record = shard.append(sequenced(0));
    wal.wait_entered(2);
    let calls = [shard.commit(offset(2)), shard.commit(offset(3))];
    wal.order(Err(WalError::Full("test".into())));
    refused(record);
    wal.order(Ok(()));
    calls.into_iter().for_each(|call| block_on(call).unwrap());
    assert_eq!(committed(&shard), Some(3), "in their order");
    retried(&shard, &wal);
}

#[test]
fn a_commit_without_room_fails_and_a_later_one_does_not() {
    let (shard, wal) = held();
    let first = shard.commit(offset(1));
    wal.wait_entered(2);
    let deleted = shard.commit(vec![Change::Topics(TopicChange::Deleted { id: TopicId([1; 16]) })]);
    wal.order(Err(WalError::Full("test".into())));
    assert!(matches!(block_on(first), Err(AppendError::Full(_))));
    wal.order(Err(WalError::Full("test".into())));
    assert!(matches!(block_on(deleted), Err(AppendError::Full(_))));
    wal.order(Ok(()));
    append(&shard, batch(1, 1)).expect("its deletion is not in flight any more");
    wal.order(Ok(()));
    block_on(shard.commit(offset(2))).unwrap();
    assert_eq!((committed(&shard), shard.status().in_flight_bytes), (Some(2), 0));
}

#[test]
fn records_leave_room_for_commits() {
    let (shard, _wal) = shard();
    let mut taken = 0;
    while append(&shard, sized(10_000)).is_ok() {
        taken += 1;
    }
    assert!(taken > 100);
    assert!(matches!(shard.produce_room(ROOM_BYTES), Err(Refused::Wal(_))));
    for n in 0..500 {
        block_on(shard.commit(offset(n))).unwrap();
        assert!(append(&shard, sized(10_000)).is_err());
    }
    assert!(block_on(shard.trim(partition(1), taken)).is_ok());
    assert_eq!((committed(&shard), shard.status().refused_batches.wal_full), (Some(499), 501));
    shard.published(shard.durable().next_seq);
    assert_eq!(shard.produce_room(ROOM_BYTES), Ok(()));
    append(&shard, sized(10_000)).unwrap();
}

/// Nothing is shipped before a start is over: one that needs room which clients have used up would never be.
#[test]
fn clients_commits_leave_room_for_a_start() {
    let disk = CutDisk::default();
    let files =
        FileWalSettings { file_bytes: 64 << 10, hasty_file_bytes: 16 << 10, bytes_max: 1 << 20, background: false };
    let file = || -> Box<dyn BlockLog> { Box::new(FileWal::open(Box::new(disk.clone()), files.clone(), 3).unwrap()) };
    let memory = MemoryWal::new(1 << 20);
    let wals: [&dyn Fn() -> Box<dyn BlockLog>; 2] = [&file, &|| Box::new(memory.clone())];
    for wal in wals {
        let start = || Shard::open(ShardSettings::default(), wal(), Recovered::default(), None, clock()).unwrap();
        let shard = start();
        block_on(shard.commit(vec![Change::created(topic(1, 1))])).unwrap();
        while append(&shard, sized(10_000)).is_ok() {}
        let mut commits = 0;
        while block_on(shard.commit(offset(commits))).is_ok() {
            commits += 1;
        }
        assert!(commits > 50, "{commits}");
        // A start again and again while the bucket is away, each with what a start writes.
        let mut shard = shard;
        for _ in 0..3 {
            shard.close();
            drop(shard);
            shard = start();
            block_on(reserve_offsets(&shard, 5)).unwrap();
            let catalogue = Member { number: 0, engine: crate::state::Engine::File, shard: shard.clone() };
            block_on(Shards::new(vec![catalogue], BTreeMap::new()).reconcile()).unwrap();
            assert!(block_on(shard.commit(offset(0))).is_err(), "clients wait");
        }
        shard.published(shard.durable().next_seq);
        block_on(shard.commit(offset(commits))).unwrap();
        assert_eq!(committed(&shard), Some(commits));
    }
}

#[tokio::test(start_paused = true)]
async fn a_full_disk_refuses_records_before_they_enter_a_block_and_nothing_else() {
    let disk = CutDisk::default();
    let files =
        FileWalSettings { file_bytes: 64 << 10, hasty_file_bytes: 64 << 10, bytes_max: 2 << 20, background: false };
    let wal = FileWal::open(Box::new(disk.clone()), files, 3).unwrap();
    let settings = ShardSettings::default();
    let (shard, commits) = Shard::open_driven(settings, Box::new(wal), Recovered::default(), None, clock()).unwrap();
    tokio::spawn(commits);
    shard.commit(vec![Change::created(topic(1, 1))]).await.unwrap();
    let send = || shard.append(from_producer(partition(1), sized(5_000)));
    for _ in 0..10 {
        send().await.unwrap();
    }
    assert_eq!(shard.produce_room(ROOM_BYTES), Ok(()));
    disk.set_trouble(Some(Trouble::NoRoom));
    let mut taken = 10;
    while send().await.is_ok() {
        taken += 1;
    }
    // The log has room for many more, the disk has none.
    assert!(matches!(shard.produce_room(ROOM_BYTES), Err(Refused::Disk(_))));
    let operations = disk.operations();
    for _ in 0..50 {
        assert!(matches!(send().await, Err(AppendError::Full(_))));
    }
    assert_eq!(disk.operations(), operations, "nothing is tried for them");
    for n in 0..100 {
        shard.commit(offset(n)).await.unwrap();
    }
    assert_eq!(shard.trim(partition(1), taken).await, Ok(taken));
    assert_eq!(read_all(&*shard, partition(1), taken, 1 << 20).len(), 0);
    assert!(send().await.is_err());

    disk.set_trouble(None);
    assert_eq!(shard.produce_room(ROOM_BYTES), Ok(()));
    assert_eq!(send().await.unwrap().base_offset, taken);
    assert_eq!(committed(&shard), Some(99));
}
