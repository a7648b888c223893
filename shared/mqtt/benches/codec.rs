//! PUBLISH in and out, beside the crate mqttbytes on the same bytes. Both read as a connection does: packet after packet
//! off the front of one buffer, with the checks each makes. `cargo bench -p mqtt --bench codec`

use std::hint::black_box;
use std::time::Duration;

use bytes::BytesMut;
use criterion::{BatchSize, Criterion, Throughput};
use mqtt::codec::{Packet, Publish, QoS, Split, Version, split};
use mqtt::store::PublishProperties;

const TOPIC: &str = "factory/7/telemetry/press";
const PAYLOAD: [u8; 256] = [b'x'; 256];
/// Packets in a buffer, as many as one read brings under load.
const PACKETS: u16 = 100;
const PACKET_BYTES_MAX: usize = 1 << 20;

fn main() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(3))
        .sample_size(50)
        .configure_from_args();
    decoding(&mut criterion);
    encoding(&mut criterion);
    criterion.final_summary();
}

fn decoding(criterion: &mut Criterion) {
    let mut bytes = Vec::new();
    (1..=PACKETS).for_each(|id| ours(id).encode(Version::V4, &mut bytes).expect("a short topic"));
    let mut group = criterion.benchmark_group("codec/decode PUBLISH QoS 1, 256 B");
    group.throughput(Throughput::Elements(PACKETS.into()));
    group.bench_function("tributary", |bench| {
        let buffer = || BytesMut::from(&bytes[..]);
        bench.iter_batched(buffer, |buffer| assert_eq!(read_ours(&buffer), PACKETS), BatchSize::SmallInput);
    });
    group.bench_function("mqttbytes", |bench| {
        let buffer = || BytesMut::from(&bytes[..]);
        bench.iter_batched(buffer, |buffer| assert_eq!(read_theirs(buffer), PACKETS), BatchSize::SmallInput);
    });
    group.finish();
}

fn encoding(criterion: &mut Criterion) {
    let ours = ours(1);
    let mut theirs = mqttbytes::v4::Publish::new(TOPIC, mqttbytes::QoS::AtLeastOnce, PAYLOAD);
    theirs.pkid = 1;
    let room = usize::from(PACKETS) * 512;
    let mut group = criterion.benchmark_group("codec/encode PUBLISH QoS 1, 256 B");
    group.throughput(Throughput::Elements(PACKETS.into()));
    group.bench_function("tributary", |bench| {
        let mut out = Vec::with_capacity(room);
        bench.iter(|| {
            out.clear();
            (0..PACKETS).for_each(|_| black_box(&ours).encode(Version::V4, &mut out).expect("a short topic"));
            black_box(&out);
        });
    });
    group.bench_function("mqttbytes", |bench| {
        let mut out = BytesMut::with_capacity(room);
        bench.iter(|| {
            out.clear();
            for _ in 0..PACKETS {
                black_box(&theirs).write(&mut out).expect("a short topic");
            }
            black_box(&out);
        });
    });
    group.finish();
}

fn ours(packet_id: u16) -> Packet<'static> {
    Packet::Publish(Publish {
        dup: false,
        qos: QoS::AtLeastOnce,
        retain: false,
        topic: TOPIC,
        packet_id: Some(packet_id),
        topic_alias: None,
        subscription_ids: Vec::new(),
        properties: PublishProperties::default(),
        payload: &PAYLOAD,
    })
}

fn read_ours(mut buffer: &[u8]) -> u16 {
    let mut count = 0;
    while let Split::Frame(frame) = split(buffer, Some(Version::V4), PACKET_BYTES_MAX).expect("written by us") {
        black_box(Packet::decode(&frame, Version::V4).expect("written by us"));
        buffer = &buffer[frame.bytes.len()..];
        count += 1;
    }
    count
}

fn read_theirs(mut buffer: BytesMut) -> u16 {
    let mut count = 0;
    while !buffer.is_empty() {
        black_box(mqttbytes::v4::read(&mut buffer, PACKET_BYTES_MAX).expect("written by us"));
        count += 1;
    }
    count
}
