//! What is under way: nothing is seen or answered before it is durable, and nothing of what failed stays.

use std::sync::mpsc::channel;
use std::time::Duration;

use parking_lot::Condvar;

use super::*;
use crate::state::ProducerChange;
use crate::wal::gated::{Gate, Gated};

type Hook = Box<dyn FnOnce() + Send>;

/// A WAL whose appends wait until they are told how to end.
pub type HeldWal = Gated<Orders>;

/// How appends end, one after the other.
#[derive(Clone, Default)]
pub struct Orders {
    orders: Arc<Mutex<std::collections::VecDeque<Result<(), WalError>>>>,
    given: Arc<Condvar>,
    pub entered: Arc<Mutex<u64>>,
    /// Appends wait until they are polled again, and not in the poll.
    is_polled: bool,
    /// What happens once, right after the next look at its usage.
    after_usage: Arc<Mutex<Option<Hook>>>,
}

impl Gate for Orders {
    fn pass(&self) -> BoxFuture<'_, Result<(), WalError>> {
        Box::pin(async move {
            *self.entered.lock() += 1;
            self.given.notify_all();
            loop {
                let order = {
                    let mut orders = self.orders.lock();
                    while orders.is_empty() && !self.is_polled {
                        self.given.wait(&mut orders);
                    }
                    orders.pop_front()
                };
                match order {
                    Some(result) => return result,
                    None => tokio::task::yield_now().await,
                }
            }
        })
    }

    fn told_usage(&self) {
        let after = self.after_usage.lock().take();
        after.into_iter().for_each(|after| after());
    }
}

impl HeldWal {
    pub fn new() -> Self {
        Self { inner: MemoryWal::new(WAL_BYTES), gate: Orders::default() }
    }

    /// One whose appends wait until they are polled again, and not in the poll.
    pub fn polled() -> Self {
        Self { inner: MemoryWal::new(WAL_BYTES), gate: Orders { is_polled: true, ..Orders::default() } }
    }

    pub fn order(&self, result: Result<(), WalError>) {
        self.gate.orders.lock().push_back(result);
        self.gate.given.notify_all();
    }

    /// Waits until the committer is inside its `count`th append.
    pub fn wait_entered(&self, count: u64) {
        let mut entered = self.gate.entered.lock();
        while *entered < count {
            self.gate.given.wait(&mut entered);
        }
    }
}

/// A shard whose appends are held, with topic 1 made.
pub fn held() -> (Arc<Shard>, HeldWal) {
    let wal = HeldWal::new();
    let shard = open(wal.clone());
    wal.order(Ok(()));
    block_on(shard.commit(vec![Change::created(topic(1, 1))])).unwrap();
    (shard, wal)
}

#[test]
fn nothing_is_seen_or_answered_before_it_is_durable() {
    let (shard, wal) = held();
    let sequenced = || from_producer(partition(1), produced(&batch(2, 1), 7, 0, 0));
    let edge = || {
        let mut append = from_edge(partition(1), &stream(1, 1), 0, 4);
        append.partition = partition(1);
        append
    };
    let mut calls = vec![shard.append(sequenced()), shard.append(edge())];
    wal.wait_entered(2);
    // A repeat of what is in flight: success, `have` and refusal all wait for the first one.
    calls.push(shard.append(sequenced()));
    calls.push(shard.append(edge()));
    let gap = from_producer(partition(1), produced(&batch(1, 1), 7, 0, 9));
    calls.push(shard.append(gap));
    let mut waiting = Log::wait(&*shard, partition(1), 0);
    assert!(calls.iter_mut().all(|call| poll_once(call).is_none()));
    assert!(poll_once(&mut waiting).is_none());
    assert_eq!(shard.bounds(partition(1)).unwrap().high_watermark, 0);
    assert_eq!(read_state(&*shard, |state| state.streams().count()), 0);
    wal.order(Ok(()));
    wal.order(Ok(()));
    let answers: Vec<_> = calls.into_iter().map(block_on).collect();
    assert_eq!(answers[0].as_ref().unwrap().base_offset, 0);
    assert!(answers[2].as_ref().unwrap().duplicate);
    assert_eq!(answers[3], Err(AppendError::WrongPosition { next: 5, have: true }));
    assert!(matches!(answers[4], Err(AppendError::OutOfOrderSequence { expected: 2, found: 9, .. })));
    assert_eq!(block_on(waiting), Ok(()));
}

#[test]
fn what_a_trim_makes_free_while_a_block_is_shown_is_not_forgotten() {
    let (shard, wal) = held();
    let call = shard.append(from_producer(partition(1), batch(1, 1)));
    wal.wait_entered(2);
    let (core, (trimmed, trims), (begun, trim)) = (shard.core.clone(), channel(), channel());
    *wal.gate.after_usage.lock() = Some(Box::new(move || {
        let trim = std::thread::spawn(move || {
            core.published(1);
            let _ = trimmed.send(());
        });
        // A trim that has to wait until the block is shown is as good.
        let _ = trims.recv_timeout(Duration::from_millis(100));
        begun.send(trim).unwrap();
    }));
    wal.order(Ok(()));
    block_on(call).unwrap();
    trim.recv().unwrap().join().unwrap();
    assert_eq!(shard.core.inner.lock().wal_free_bytes, wal.usage().free_bytes);
}

#[test]
fn what_comes_while_one_append_runs_is_one_block() {
    let (shard, wal) = held();
    let mut calls = vec![shard.append(from_producer(partition(1), batch(1, 1)))];
    wal.wait_entered(2);
    calls.extend((0..50).map(|_| shard.append(from_producer(partition(1), batch(1, 1)))));
    wal.order(Ok(()));
    wal.order(Ok(()));
    calls.into_iter().for_each(|call| {
        block_on(call).unwrap();
    });
    assert_eq!(wal.bounds(), Some((0, 3)));
    assert_eq!(Block::parse(wal.inner.read(2).unwrap()).unwrap().entries()[0].batches, 50);
}

#[test]
fn a_failed_append_is_forgotten_altogether() {
    let (shard, wal) = held();
    let sequenced = |sequence| from_producer(partition(1), produced(&batch(2, 1), 7, 0, sequence));
    let first = shard.append(sequenced(0));
    wal.wait_entered(2);
    let second = shard.append(sequenced(2));
    let again = shard.append(sequenced(0));
    let edge = shard.append(from_edge(partition(1), &stream(1, 1), 0, 4));
    let full = WalError::Full("test".into());
    wal.order(Err(full));
    for call in [first, second, again, edge] {
        assert!(matches!(block_on(call), Err(AppendError::Full(_))));
    }
    // Not a repeat, not out of order, at the offset it would have had.
    (0..2).for_each(|_| wal.order(Ok(())));
    let retried = block_on(shard.append(sequenced(0))).unwrap();
    assert_eq!((retried.base_offset, retried.duplicate), (0, false));
    assert_eq!(block_on(shard.append(from_edge(partition(1), &stream(1, 1), 0, 4))).unwrap().base_offset, 2);
}

#[test]
fn a_failed_disk_stops_the_shard_and_leaves_it_readable() {
    let (shard, wal) = held();
    wal.order(Ok(()));
    append(&shard, batch(3, 1)).unwrap();
    let (first, mut waiting) =
        (shard.append(from_producer(partition(1), batch(1, 1))), Log::wait(&*shard, partition(1), 3));
    wal.wait_entered(3);
    let second = shard.append(from_producer(partition(1), batch(1, 1)));
    assert!(poll_once(&mut waiting).is_none());
    wal.order(Err(WalError::Io("EIO".into())));
    for call in [first, second] {
        assert!(matches!(block_on(call), Err(AppendError::Storage(text)) if text.contains("EIO")));
    }
    assert!(matches!(append(&shard, batch(1, 1)), Err(AppendError::Storage(_))));
    assert!(matches!(block_on(waiting), Err(ReadError::Storage(_))));
    assert_eq!(read_all(&*shard, partition(1), 0, 1 << 20).len(), 1);
    assert!(shard.status().stopped.unwrap().contains("EIO"));
}

/// An object log gives up the PUT under way when its node stops: nothing has failed.
#[test]
fn a_log_that_is_closed_under_an_append_has_not_failed() {
    let (shard, wal) = held();
    let under_way = shard.append(from_producer(partition(1), batch(1, 1)));
    wal.order(Err(WalError::Closed));
    assert_eq!(block_on(under_way), Err(AppendError::Closed));
    assert_eq!(append(&shard, batch(1, 1)), Err(AppendError::Closed));
}

#[test]
fn a_close_makes_durable_what_is_in_flight() {
    let (shard, wal) = shard();
    let calls: Vec<_> = (0..100).map(|_| shard.append(from_producer(partition(1), batch(1, 1)))).collect();
    shard.close();
    calls.into_iter().for_each(|call| {
        block_on(call).unwrap();
    });
    assert_eq!(append(&shard, batch(1, 1)), Err(AppendError::Closed));
    assert_eq!(shard.bounds(partition(1)), Err(ReadError::Closed));
    assert_eq!(open(wal).bounds(partition(1)).unwrap().high_watermark, 100);
}

#[test]
fn too_much_in_flight_is_refused() {
    let wal = HeldWal::new();
    let settings = ShardSettings { in_flight_bytes_max: 4_000, block_bytes_max: 1_500, ..ShardSettings::default() };
    let shard = Shard::open(settings, Box::new(wal.clone()), Recovered::default(), None, clock()).unwrap();
    wal.order(Ok(()));
    block_on(shard.commit(vec![Change::created(topic(1, 1))])).unwrap();
    let send = || shard.append(from_producer(partition(1), sized(1_000)));
    let calls: Vec<_> = (0..3).map(|_| send()).collect();
    assert!(matches!(block_on(send()), Err(AppendError::Full(_))));
    (0..3).for_each(|_| wal.order(Ok(())));
    calls.into_iter().for_each(|call| {
        block_on(call).unwrap();
    });
    assert_eq!(wal.bounds(), Some((0, 4)), "each in a block of its own");
    wal.order(Ok(()));
    block_on(send()).unwrap();
}

#[test]
fn too_many_changes_in_flight_are_refused() {
    let wal = HeldWal::new();
    let settings = ShardSettings { in_flight_changes_max: 3, ..ShardSettings::default() };
    let shard = Shard::open(settings, Box::new(wal.clone()), Recovered::default(), None, clock()).unwrap();
    let commit = |count| shard.commit(vec![Change::Producers(ProducerChange::IdsReserved { next: 1 }); count]);
    let only = commit(4);
    wal.wait_entered(1);
    assert!(matches!(block_on(commit(1)), Err(AppendError::Full(text)) if text.contains("at most 3")));
    wal.order(Ok(()));
    block_on(only).unwrap();
    let one = commit(1);
    wal.wait_entered(2);
    let two = [one, commit(2)];
    assert!(matches!(block_on(commit(1)), Err(AppendError::Full(_))));
    (0..2).for_each(|_| wal.order(Ok(())));
    assert!(two.into_iter().all(|commit| block_on(commit).is_ok()));
    // What failed does not wait any more.
    let failed = commit(3);
    wal.order(Err(WalError::Full("disk".into())));
    assert!(matches!(block_on(failed), Err(AppendError::Full(text)) if text == "disk"));
    wal.order(Ok(()));
    block_on(commit(3)).unwrap();
}

#[test]
fn a_fenced_shard_acknowledges_nothing() {
    let (shard, wal) = held();
    let call = shard.append(from_producer(partition(1), batch(1, 1)));
    wal.wait_entered(2);
    shard.fenced(9);
    wal.order(Ok(()));
    assert_eq!(block_on(call), Err(AppendError::Fenced(9)));
    assert_eq!(append(&shard, batch(1, 1)), Err(AppendError::Fenced(9)));
}
