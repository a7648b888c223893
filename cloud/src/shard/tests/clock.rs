//! Wall clocks that jump: what must stay, and what must go later all the same.

use super::*;
use crate::groups::{GroupSettings, Groups, OffsetCommit};

const HOUR_MS: i64 = 3_600_000;
const DAY_MS: i64 = 24 * HOUR_MS;
const WEEK_MS: i64 = 7 * DAY_MS;
/// When it begins.
const TODAY_MS: i64 = 20_000 * DAY_MS;

fn ms(ms: i64) -> Duration {
    Duration::from_millis(ms.unsigned_abs())
}

/// One WAL and the lives of its shard, on a clock that can be set wrong.
struct Machine {
    wal: MemoryWal,
    begun: Instant,
    wrong_by: Arc<AtomicI64>,
    shard: Arc<Shard>,
    groups: Arc<Groups>,
}

impl Machine {
    /// Topic 1 keeps an hour, topic 2 a week.
    async fn new() -> Self {
        let (wal, begun, wrong_by) = (MemoryWal::new(WAL_BYTES), Instant::now(), Arc::new(AtomicI64::new(0)));
        let (shard, groups) = Self::start(&wal, begun, &wrong_by);
        let short = Topic { configs: [("retention.ms".to_owned(), HOUR_MS.to_string())].into(), ..topic(1, 1) };
        shard.commit(vec![Change::created(short), Change::created(topic(2, 1))]).await.unwrap();
        Self { wal, begun, wrong_by, shard, groups }
    }

    fn start(wal: &MemoryWal, begun: Instant, wrong_by: &Arc<AtomicI64>) -> (Arc<Shard>, Arc<Groups>) {
        let wrong_by = wrong_by.clone();
        let clock: Clock =
            Arc::new(move || TODAY_MS + begun.elapsed().as_millis() as i64 + wrong_by.load(Ordering::SeqCst));
        let boxed = Box::new(wal.clone());
        let settings = ShardSettings::default();
        let (shard, commit) = Shard::open_driven(settings, boxed, Recovered::default(), None, clock).unwrap();
        tokio::spawn(commit);
        let groups = Groups::new(shard.clone(), GroupSettings::default());
        (shard, groups)
    }

    fn restart(&mut self) {
        self.shard.begin_close();
        (self.shard, self.groups) = Self::start(&self.wal, self.begun, &self.wrong_by);
    }

    async fn append(&self, n: u8, sequence: i32) -> Appended {
        let batch = produced(&batch(1, 1), 7, 0, sequence);
        let source = from_producer(partition(n), batch);
        self.shard.append(source).await.unwrap()
    }

    async fn commit_offset(&self, group: &str) {
        let at = OffsetCommit { partition: partition(2), offset: 1, leader_epoch: -1, metadata: String::new() };
        self.groups.commit_offsets(group, "", None, -1, vec![at]).await.unwrap();
    }

    /// Time passes, and what may go goes.
    async fn pass(&self, time_ms: i64) {
        tokio::time::advance(ms(time_ms)).await;
        self.shard.apply_retention().await.unwrap();
        self.groups.expire().await;
    }

    fn log_starts(&self) -> (Offset, Offset) {
        let start = |n| self.shard.bounds(partition(n)).unwrap().log_start;
        (start(1), start(2))
    }

    fn has_offset(&self, group: &str) -> bool {
        read_state(&*self.shard, |state| state.committed(group, partition(2)).is_some())
    }

    fn knows_producer(&self) -> bool {
        read_state(&*self.shard, |state| state.producer(partition(2), 7).is_some())
    }
}

#[tokio::test(start_paused = true)]
async fn whatever_the_clock_does_nothing_goes_early_and_everything_goes() {
    let jumps = [
        -400 * DAY_MS,
        -DAY_MS,
        20 * HOUR_MS,
        8 * DAY_MS,
        365 * DAY_MS,
        // To 2099, and to 1970.
        47_116 * DAY_MS - TODAY_MS,
        -TODAY_MS,
    ];
    for jump in jumps {
        for (at_a_start, comes_back) in [(false, false), (false, true), (true, false), (true, true)] {
            let case = format!("{jump} ms, at a start {at_a_start}, comes back {comes_back}");
            let mut machine = Machine::new().await;
            machine.append(1, 0).await;
            machine.append(2, 0).await;
            machine.commit_offset("before").await;
            machine.pass(0).await;
            machine.wrong_by.store(jump, Ordering::SeqCst);
            if at_a_start {
                machine.restart();
            }
            machine.pass(0).await;
            // While it is wrong.
            machine.append(1, 1).await;
            machine.append(2, 1).await;
            machine.commit_offset("meanwhile").await;
            machine.pass(1000).await;
            if comes_back {
                machine.wrong_by.store(0, Ordering::SeqCst);
            }
            machine.pass(76_000).await;
            machine.restart();
            machine.pass(HOUR_MS - 80_000).await;
            assert_eq!(machine.log_starts(), (0, 0), "{case}");
            assert!(machine.has_offset("before") && machine.has_offset("meanwhile"), "{case}");
            assert!(machine.knows_producer(), "{case}");
            assert!(machine.append(2, 1).await.duplicate, "{case}");

            // An hour and what the restart forgot later, what is kept for an hour is gone, and nothing else.
            machine.pass(300_000).await;
            assert_eq!(machine.log_starts(), (2, 0), "{case}");
            machine.pass(20 * HOUR_MS).await;
            assert!(machine.knows_producer(), "{case}");
            machine.pass(5 * HOUR_MS).await;
            assert!(!machine.knows_producer(), "{case}");
            machine.pass(WEEK_MS - 27 * HOUR_MS).await;
            assert_eq!(machine.log_starts(), (2, 0), "{case}");
            assert!(machine.has_offset("before") && machine.has_offset("meanwhile"), "{case}");
            machine.pass(3 * HOUR_MS).await;
            assert_eq!(machine.log_starts(), (2, 2), "{case}");
            assert!(!machine.has_offset("before") && !machine.has_offset("meanwhile"), "{case}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_that_is_restarted_often_counts_on() {
    let mut machine = Machine::new().await;
    machine.append(1, 0).await;
    let (mut ran_ms, mut blocks) = (0, 0);
    while machine.log_starts().0 == 0 {
        for _ in 0..20 {
            machine.pass(30_000).await;
            ran_ms += 30_000;
        }
        blocks = machine.shard.status().next_seq;
        // Off for long, and what it was off for does not count.
        tokio::time::advance(ms(5 * HOUR_MS)).await;
        machine.restart();
        assert!(ran_ms < 2 * HOUR_MS);
    }
    assert!(ran_ms >= HOUR_MS, "{ran_ms}");
    assert!(blocks < 60, "{blocks} blocks");
    // The producer goes after a day. With nothing that ages nothing is written.
    for expected in [20, 0] {
        let before = machine.shard.status().next_seq;
        for _ in 0..52 {
            machine.pass(30 * 60_000).await;
        }
        let blocks = machine.shard.status().next_seq - before;
        assert!(blocks <= expected, "{blocks} blocks");
    }
}

#[tokio::test(start_paused = true)]
async fn a_jump_is_stored_where_the_next_start_compares() {
    let mut machine = Machine::new().await;
    machine.pass(1000).await;
    let ahead = |machine: &Machine| read_state(&*machine.shard, |state| state.clock().unwrap().ahead_ms);
    assert_eq!(ahead(&machine), 0);
    machine.wrong_by.store(DAY_MS, Ordering::SeqCst);
    machine.pass(1000).await;
    assert_eq!(ahead(&machine), DAY_MS);
    machine.restart();
    let seq = machine.shard.status().next_seq;
    machine.pass(1000).await;
    assert_eq!(machine.shard.status().next_seq, seq, "nothing new");
}
