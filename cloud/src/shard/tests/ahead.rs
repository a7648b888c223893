//! A block that is put together while the one before it is written: writer and encoder polled by hand, step by step.

use super::flight::HeldWal;
use super::*;
use crate::state::GroupChange;

struct Steps {
    shard: Arc<Shard>,
    wal: HeldWal,
    writer: BoxFuture<'static, ()>,
    encoder: BoxFuture<'static, ()>,
}

impl Steps {
    /// Topic 1 is made, in block 0.
    fn new() -> Self {
        let wal = HeldWal::polled();
        let settings = ShardSettings { ahead_bytes_min: 1_000, ..ShardSettings::default() };
        let shard = Shard::recover(settings, Box::new(wal.clone()), Recovered::default(), None, clock()).unwrap();
        let (core, beside) = (shard.core.clone(), shard.core.clone());
        let writer = Box::pin(async move { core.write_blocks().await });
        let encoder = Box::pin(async move { beside.encode_ahead().await });
        let mut steps = Self { shard, wal, writer, encoder };
        let mut made = steps.shard.commit(vec![Change::created(topic(1, 1))]);
        steps.ends(Ok(()));
        assert_eq!(poll_once(&mut made), Some(Ok(())));
        steps
    }

    fn send(&self, bytes: usize) -> BoxFuture<'static, Result<Appended, AppendError>> {
        self.shard.append(from_producer(partition(1), sized(bytes)))
    }

    fn write(&mut self) {
        assert!(poll_once(&mut self.writer).is_none(), "it goes on");
    }

    fn encode(&mut self) {
        assert!(poll_once(&mut self.encoder).is_none(), "it goes on");
    }

    /// The append under way ends, and the writer goes on.
    fn ends(&mut self, result: Result<(), WalError>) {
        self.wal.order(result);
        self.write();
    }

    /// Appends that were begun, that of block 0 included.
    fn begun(&self) -> u64 {
        *self.wal.gate.entered.lock()
    }

    fn high_watermark(&self) -> Offset {
        self.shard.bounds(partition(1)).unwrap().high_watermark
    }

    /// One block is written, one has been put together, one gathers.
    fn three() -> (Self, [BoxFuture<'static, Result<Appended, AppendError>>; 3]) {
        let mut steps = Self::new();
        let first = steps.send(2_000);
        steps.write();
        let second = steps.send(2_000);
        steps.encode();
        let third = steps.send(2_000);
        (steps, [first, second, third])
    }
}

#[test]
fn a_block_put_together_ahead_follows_at_once_and_is_seen_only_when_it_is_durable() {
    let (mut steps, [mut first, mut second, mut third]) = Steps::three();
    assert_eq!((steps.begun(), steps.high_watermark()), (2, 0));
    steps.ends(Ok(()));
    // The next append has begun before anybody was told of the first.
    assert_eq!((steps.begun(), steps.high_watermark()), (3, 0));
    assert!(poll_once(&mut first).is_none());
    steps.encode();
    assert_eq!((poll_once(&mut first).unwrap().unwrap().base_offset, steps.high_watermark()), (0, 1));
    assert!(poll_once(&mut second).is_none() && poll_once(&mut third).is_none());
    steps.ends(Ok(()));
    steps.encode();
    assert_eq!((poll_once(&mut second).unwrap().unwrap().base_offset, steps.high_watermark()), (1, 2));
    // Nothing waits behind the last one: the writer shows it itself.
    steps.ends(Ok(()));
    assert_eq!((poll_once(&mut third).unwrap().unwrap().base_offset, steps.high_watermark()), (2, 3));
    assert_eq!(steps.wal.bounds(), Some((0, 4)), "each in a block of its own");
    assert_eq!(steps.shard.status().in_flight_bytes, 0);
    assert!(steps.shard.core.inner.lock().overlay.ends.is_empty());
}

#[test]
fn what_is_less_than_is_being_written_goes_on_gathering() {
    let mut steps = Steps::new();
    let mut calls = vec![steps.send(5_000)];
    steps.write();
    for _ in 0..4 {
        calls.push(steps.send(1_000));
        steps.encode();
    }
    steps.ends(Ok(()));
    steps.ends(Ok(()));
    assert!(calls.iter_mut().all(|call| poll_once(call).is_some_and(|answer| answer.is_ok())));
    assert_eq!(steps.wal.bounds(), Some((0, 3)), "all that came meanwhile is one block");
}

#[test]
fn a_block_put_together_ahead_fails_with_the_one_before_it() {
    let (mut steps, calls) = Steps::three();
    steps.ends(Err(WalError::Full("test".into())));
    for mut call in calls {
        assert!(matches!(poll_once(&mut call), Some(Err(AppendError::Full(_)))));
    }
    // Nothing of them is left: what comes next is at their place.
    let mut again = steps.send(10);
    steps.write();
    steps.ends(Ok(()));
    assert_eq!(poll_once(&mut again).unwrap().unwrap().base_offset, 0);
    assert_eq!(steps.wal.bounds(), Some((0, 2)));
}

/// The encoder may be at it while the append before fails: what is written again does not come from there.
#[test]
fn commits_in_blocks_put_together_ahead_are_written_again_in_their_order() {
    let mut steps = Steps::new();
    let offset = |offset| {
        let committed =
            crate::state::CommittedOffset { offset, leader_epoch: -1, metadata: String::new(), commit_ms: 0 };
        vec![GroupChange::OffsetCommitted { group: "g".into(), partition: partition(1), committed }.into()]
    };
    let (mut records, mut commits) = (Vec::new(), Vec::new());
    for n in 1..=3 {
        commits.push(steps.shard.commit(offset(n)));
        records.push(steps.send(2_000));
        if n == 1 { steps.write() } else { steps.encode() }
    }
    steps.ends(Err(WalError::Full("test".into())));
    assert!(records.iter_mut().all(|call| matches!(poll_once(call), Some(Err(AppendError::Full(_))))));
    for (mut commit, n) in commits.into_iter().zip(1..) {
        assert!(poll_once(&mut commit).is_none());
        steps.ends(Ok(()));
        assert_eq!(poll_once(&mut commit), Some(Ok(())));
        let committed = read_state(&*steps.shard, |state| state.committed("g", partition(1)).unwrap().offset);
        assert_eq!(committed, n);
    }
    assert_eq!((steps.wal.bounds(), steps.high_watermark()), (Some((0, 4)), 0));
}

#[test]
fn what_is_durable_is_answered_although_the_disk_fails_behind_it() {
    let (mut steps, [mut first, mut second, mut third]) = Steps::three();
    steps.ends(Ok(()));
    assert!(poll_once(&mut first).is_none());
    steps.wal.order(Err(WalError::Io("EIO".into())));
    assert!(poll_once(&mut steps.writer).is_some(), "the writer has ended");
    assert!(poll_once(&mut steps.encoder).is_some(), "and the encoder with it");
    assert_eq!(poll_once(&mut first).unwrap().unwrap().base_offset, 0);
    assert_eq!(steps.high_watermark(), 1);
    for call in [&mut second, &mut third] {
        assert!(matches!(poll_once(call), Some(Err(AppendError::Storage(text))) if text.contains("EIO")));
    }
}

#[test]
fn a_close_waits_for_what_was_put_together_ahead() {
    let (mut steps, calls) = Steps::three();
    steps.shard.begin_close();
    (0..2).for_each(|_| steps.ends(Ok(())));
    steps.wal.order(Ok(()));
    assert!(poll_once(&mut steps.writer).is_some() && poll_once(&mut steps.encoder).is_some());
    for (mut call, offset) in calls.into_iter().zip(0..) {
        assert_eq!(poll_once(&mut call).unwrap().unwrap().base_offset, offset);
    }
}

#[test]
fn while_the_disk_waits_two_blocks_take_turns() {
    let mut steps = Steps::new();
    let now = tokio::time::Instant::now();
    for wait in [0, 1] {
        let begun = now + Duration::from_secs(wait);
        steps.shard.core.inner.lock().waits.appended(begun, Duration::ZERO, 4_400);
    }
    let mut calls: Vec<_> = (0..5).map(|_| steps.send(1_000)).collect();
    (0..2).for_each(|_| steps.ends(Ok(())));
    assert!(calls.iter_mut().all(|call| poll_once(call).is_some_and(|answer| answer.is_ok())));
    let batches = |seq| Block::parse(steps.wal.inner.read(seq).unwrap()).unwrap().entries()[0].batches;
    assert_eq!((steps.wal.bounds(), batches(1), batches(2)), (Some((0, 3)), 2, 3));
}
