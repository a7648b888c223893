//! Snapshot and rest are the state: for every kind of change, and for what time takes away.

use super::*;
use crate::state::tests::one_of_each;
use crate::wal::powercut::Random;

const MINUTE: Duration = Duration::from_secs(60);

fn state_of(shard: &Shard) -> State {
    read_state(shard, State::clone)
}

fn replayed(wal: &MemoryWal, snapshot: Option<Snapshot>) -> State {
    let recovered = Recovered { snapshot, ..Recovered::default() };
    state_of(&Shard::recover(settings(), Box::new(wal.clone()), recovered, None, clock()).unwrap())
}

fn settings() -> ShardSettings {
    ShardSettings { retention_ms: 3_600_000, producer_expiry_ms: 7_200_000, ..ShardSettings::default() }
}

#[tokio::test(start_paused = true)]
async fn snapshot_and_rest_are_the_state() {
    let mut forgotten = 0;
    for seed in 0..60 {
        let mut random = Random(seed);
        let wal = MemoryWal::new(64 << 20);
        let (shard, commits) =
            Shard::open_driven(settings(), Box::new(wal.clone()), Recovered::default(), None, clock()).unwrap();
        tokio::spawn(commits);
        shard.commit(vec![Change::created(topic(1, 1)), Change::created(topic(2, 1))]).await.unwrap();
        let (mut snapshot, mut positions) = (None, [0; 3]);
        for _ in 0..60 {
            let n = 1 + random.below(2) as u8;
            match random.below(8) {
                0 | 1 => {
                    let id = random.below(4) as i64;
                    let _ = shard.append(from_producer(partition(n), produced(&batch(2, 1), id, 0, 0))).await;
                }
                2 => {
                    let position = &mut positions[n as usize];
                    let append = from_edge(partition(n), &stream(n, 1), *position, *position + 2);
                    *position += if shard.append(append).await.is_ok() { 3 } else { 0 };
                }
                3 => {
                    let changes = one_of_each();
                    let change = changes[random.below(changes.len() as u64) as usize].clone();
                    shard.commit(vec![change]).await.unwrap();
                }
                4 => {
                    let end = shard.bounds(partition(n)).map_or(0, |bounds| bounds.high_watermark);
                    let _ = shard.trim(partition(n), random.below(end as u64 + 1) as i64).await;
                }
                5 if random.below(3) == 0 => snapshot = Some(Source::snapshot(&*shard).await.unwrap()),
                _ => {
                    tokio::time::advance(MINUTE * random.below(90) as u32).await;
                    let before = State::producer_count(&state_of(&shard));
                    shard.apply_retention().await.unwrap();
                    forgotten += before - State::producer_count(&state_of(&shard));
                }
            }
        }
        let live = state_of(&shard);
        assert_eq!(replayed(&wal, None), live, "seed {seed}");
        assert_eq!(replayed(&wal, snapshot), live, "seed {seed}: snapshot and rest");
        assert_eq!(State::decode(&live.encode()).unwrap(), live);
        shard.begin_close();
    }
    assert!(forgotten > 50, "{forgotten} producers expired");
}
