//! What a shard's state costs where there are many partitions: a look-up, and a copy under the append lock. Beside it, what the same
//! costs in a hash map.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::{Duration, Instant};

use cloud::state::{Change, PartitionMap, PartitionState, State, Topic};
use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use shared::name::{Partition, TopicId, TopicName};

const PARTITIONS_PER_TOPIC: u32 = 100;

fn id(number: u32) -> TopicId {
    let mut id = [0; 16];
    id[..4].copy_from_slice(&number.wrapping_mul(0x9e37_79b9).to_be_bytes());
    TopicId(id)
}

fn state(topics: u32) -> (State, PartitionMap<PartitionState>, Vec<Partition>) {
    let mut state = State::default();
    for number in 0..topics {
        let name = TopicName::parse(&format!("topic-{number}")).expect("a name");
        let (partitions, configs) = (PARTITIONS_PER_TOPIC, BTreeMap::new());
        state
            .apply(&Change::created(Topic { id: id(number), name, partitions, configs, created_ms: 0 }))
            .expect("known");
    }
    let map = state.partitions().map(|(partition, known)| (*partition, known.clone())).collect();
    // In no order, as batches come.
    let mut all: Vec<Partition> = state.partitions().map(|(partition, _)| *partition).collect();
    all.sort_by_key(|partition| crc32c::crc32c(format!("{partition}").as_bytes()));
    (state, map, all)
}

fn measure(bench: &mut Criterion) {
    for topics in [10, 1_000] {
        let (state, map, all) = state(topics);
        let partitions = topics * PARTITIONS_PER_TOPIC;
        let mut group = bench.benchmark_group(format!("{partitions} partitions"));
        let mut turn = all.iter().cycle();
        group.bench_function("look up", |bench| {
            bench.iter(|| state.partition(*turn.next().expect("endless")).is_some())
        });
        group.bench_function("look up, hash map", |bench| {
            bench.iter(|| map.contains_key(turn.next().expect("endless")));
        });
        group.bench_function("copy", |bench| {
            bench.iter_batched(|| (), |()| black_box(state.clone()), BatchSize::PerIteration)
        });
        group.bench_function("copy, hash map", |bench| {
            bench.iter_batched(|| (), |()| black_box(map.clone()), BatchSize::PerIteration);
        });
        let mut changed = state.clone();
        let mut end = 0;
        group.bench_function("advance", |bench| {
            bench.iter(|| {
                end += 1;
                changed.advance(*turn.next().expect("endless"), end);
            });
        });
        group.bench_function("advance, each after a copy", |bench| {
            bench.iter_custom(|times| {
                let mut took = Duration::ZERO;
                for _ in 0..times {
                    let copy = changed.clone();
                    let began = Instant::now();
                    end += 1;
                    changed.advance(*turn.next().expect("endless"), end);
                    took += began.elapsed();
                    drop(copy);
                }
                took
            });
        });
        group.finish();
    }
}

criterion_group!(benches, measure);
criterion_main!(benches);
