//! Batches: building one record by record, sealing stored ones into what the link carries, and the check that stands
//! before anything from a peer or a disk. `cargo bench -p shared --bench batch`

use std::hint::black_box;
use std::time::Duration;

use bytes::Bytes;
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput};
use shared::batch::{Batch, BatchBuilder, Compression, seal};

const RECORDS: usize = 100;
const VALUE_BYTES: usize = 256;
const BATCHES: usize = 16;

fn main() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(3))
        .sample_size(50)
        .configure_from_args();
    building(&mut criterion);
    sealing(&mut criterion);
    parsing(&mut criterion);
    criterion.final_summary();
}

fn building(criterion: &mut Criterion) {
    let values = values(0);
    let mut group = criterion.benchmark_group("batch/build");
    group.throughput(Throughput::Bytes((RECORDS * VALUE_BYTES) as u64));
    group.bench_function("100 x 256 B", |bench| bench.iter(|| build(0, black_box(&values), Compression::None)));
    group.finish();
}

fn sealing(criterion: &mut Criterion) {
    let batches: Vec<Batch> =
        (0..BATCHES).map(|n| build((n * RECORDS) as i64, &values(n * RECORDS), Compression::None)).collect();
    let mut group = criterion.benchmark_group("batch/seal 16 x 100 x 256 B");
    group.throughput(Throughput::Bytes(batches.iter().map(Batch::len).sum::<usize>() as u64));
    for compression in [Compression::None, Compression::Lz4, Compression::Zstd] {
        let name = format!("{compression:?}").to_lowercase();
        group.bench_function(BenchmarkId::from_parameter(name), |bench| {
            bench.iter(|| seal(black_box(&batches), compression, None).expect("they adjoin"));
        });
    }
    group.finish();
}

/// The header's fields and a CRC-32C over everything behind it.
fn parsing(criterion: &mut Criterion) {
    let mut builder = BatchBuilder::with_capacity(64 << 10);
    builder.push(0, None, Some(&vec![b'x'; 64 << 10]), &[]);
    let bytes: Bytes = builder.finish(0, Compression::None).into_bytes();
    let mut group = criterion.benchmark_group("batch/parse");
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    group.bench_function("64 KiB", |bench| {
        bench.iter_batched(|| bytes.clone(), |bytes| Batch::parse(bytes).expect("sealed above"), BatchSize::SmallInput);
    });
    group.finish();
}

fn build(base: i64, values: &[Vec<u8>], compression: Compression) -> Batch {
    let mut builder = BatchBuilder::with_capacity(values.len() * (VALUE_BYTES + 80));
    for (n, value) in values.iter().enumerate() {
        let headers: [(&[u8], &[u8]); 1] = [(b"tributary.edge", b"gw-1")];
        builder.push(1_700_000_000_000 + n as i64, Some(b"factory/7/telemetry/press"), Some(value), &headers);
    }
    builder.finish(base, compression)
}

/// Telemetry: the same words again and again, and digits that are not.
fn values(from: usize) -> Vec<Vec<u8>> {
    let mut state = from as u64 + 1;
    let mut digits = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 40
    };
    let value = |n: usize| {
        let mut text = format!("{{\"device\":\"press-{}\",\"sequence\":{n}", n % 20);
        while text.len() < VALUE_BYTES {
            text += &format!(",\"temperature\":{},\"pressure\":{}", digits(), digits());
        }
        text.truncate(VALUE_BYTES);
        text.into_bytes()
    };
    (from..from + RECORDS).map(value).collect()
}
