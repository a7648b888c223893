//! What consumers are promised.

use kafka_wire::fetch::{FetchPartition, FetchRequest, FetchResponse, FetchTopic, PartitionData};
use kafka_wire::list_offsets::{
    ListOffsetsPartition, ListOffsetsPartitionResponse, ListOffsetsRequest, ListOffsetsResponse, ListOffsetsTopic,
};
use kafka_wire::offset_for_leader_epoch::{
    OffsetForLeaderEpochRequest, OffsetForLeaderEpochResponse, OffsetForLeaderPartition, OffsetForLeaderTopic,
};
use kafka_wire::{ErrorCode, Uuid};
use tokio::time::Instant;

use super::produce::produce;
use super::*;

/// A request for partitions of one topic, that does not wait.
fn request(topic: &str, id: TopicId, offsets: &[(i32, i64)]) -> FetchRequest {
    let partition = |(partition, fetch_offset): &(i32, i64)| FetchPartition {
        partition: *partition,
        fetch_offset: *fetch_offset,
        partition_max_bytes: 1 << 20,
        ..Default::default()
    };
    let topic = FetchTopic {
        topic: topic.to_owned(),
        topic_id: Uuid(id.0),
        partitions: offsets.iter().map(partition).collect(),
    };
    FetchRequest { max_wait_ms: 0, min_bytes: 1, max_bytes: 10 << 20, topics: vec![topic], ..Default::default() }
}

async fn fetch(client: &mut Client, request: &FetchRequest) -> Vec<PartitionData> {
    let response: FetchResponse = client.call(12, request).await;
    assert_eq!((response.error_code, response.session_id), (ErrorCode::NONE, 0));
    response.responses.into_iter().flat_map(|topic| topic.partitions).collect()
}

fn bytes_of(partition: &PartitionData) -> Bytes {
    partition.records.as_ref().map(|records| records.0.concat()).unwrap_or_default().into()
}

fn batches_of(partition: &PartitionData) -> Vec<Batch> {
    let mut bytes = bytes_of(partition);
    std::iter::from_fn(|| Batch::split_first(&mut bytes).expect("whole, undamaged batches")).collect()
}

#[tokio::test]
async fn every_version_reads_back_the_bytes_that_were_sealed() {
    let running = start().await;
    let id = running.topic("t", 1).await;
    let mut client = running.client().await;
    let sealed = [batch(&[b"one", b"two"]), batch_of(5000)];
    for batch in &sealed {
        produce(&mut client, "t", 0, batch.bytes().clone()).await;
    }
    for version in 4..=17 {
        let response: FetchResponse = client.call(version, &request("t", id, &[(0, 0)])).await;
        let partition = &response.responses[0].partitions[0];
        assert_eq!((partition.error_code, partition.high_watermark), (ErrorCode::NONE, 3), "v{version}");
        assert_eq!(partition.last_stable_offset, 3);
        let read = batches_of(partition);
        assert_eq!(read.iter().map(Batch::base_offset).collect::<Vec<_>>(), [0, 2]);
        for (read, sealed) in read.iter().zip(&sealed) {
            assert_eq!(read.crc(), sealed.crc(), "the checksum that was sealed");
            assert_eq!(read.bytes()[16..], sealed.bytes()[16..]);
        }
    }
}

#[tokio::test]
async fn an_offset_inside_a_batch_gives_the_whole_batch() {
    let running = start().await;
    let id = running.topic("t", 1).await;
    let mut client = running.client().await;
    produce(&mut client, "t", 0, batch(&[b"0", b"1", b"2"]).into_bytes()).await;
    produce(&mut client, "t", 0, batch(&[b"3"]).into_bytes()).await;
    for (offset, bases) in [(0, vec![0, 3]), (2, vec![0, 3]), (3, vec![3]), (4, vec![])] {
        let partitions = fetch(&mut client, &request("t", id, &[(0, offset)])).await;
        let found: Vec<i64> = batches_of(&partitions[0]).iter().map(Batch::base_offset).collect();
        assert_eq!((partitions[0].error_code, found), (ErrorCode::NONE, bases), "offset {offset}");
    }
    for offset in [-1, 5] {
        let partitions = fetch(&mut client, &request("t", id, &[(0, offset)])).await;
        assert_eq!(partitions[0].error_code, ErrorCode::OFFSET_OUT_OF_RANGE, "offset {offset}");
    }
}

#[tokio::test]
async fn a_batch_larger_than_the_limits_is_returned_when_it_comes_first_and_only_then() {
    let running = start().await;
    let id = running.topic("t", 3).await;
    let mut client = running.client().await;
    for index in 0..3 {
        produce(&mut client, "t", index, batch_of(4000).into_bytes()).await;
        produce(&mut client, "t", index, batch_of(4000).into_bytes()).await;
    }
    let counts = |partitions: &[PartitionData]| -> Vec<usize> {
        partitions.iter().map(|partition| batches_of(partition).len()).collect()
    };
    let all = [(0, 0), (1, 0), (2, 0)];
    let tiny = FetchRequest { max_bytes: 1, ..request("t", id, &all) };
    assert_eq!(counts(&fetch(&mut client, &tiny).await), [1, 0, 0]);
    let none = FetchRequest { max_bytes: 0, ..request("t", id, &all) };
    assert_eq!(counts(&fetch(&mut client, &none).await), [1, 0, 0]);
    let some = FetchRequest { max_bytes: 13_000, ..request("t", id, &all) };
    assert_eq!(counts(&fetch(&mut client, &some).await), [2, 1, 0]);
    let mut per_partition = request("t", id, &all);
    per_partition.topics[0].partitions.iter_mut().for_each(|p| p.partition_max_bytes = 100);
    assert_eq!(counts(&fetch(&mut client, &per_partition).await), [1, 0, 0]);
    // An empty partition before it is not "first".
    let behind = FetchRequest { max_bytes: 1, ..request("t", id, &[(0, 2), (1, 0)]) };
    assert_eq!(counts(&fetch(&mut client, &behind).await), [0, 1]);
}

#[tokio::test]
async fn a_long_poll_ends_when_enough_is_there_over_all_partitions() {
    let running = start().await;
    let id = running.topic("t", 2).await;
    let (mut consumer, mut producer) = (running.client().await, running.client().await);
    let patient = FetchRequest { max_wait_ms: 30_000, min_bytes: 3000, ..request("t", id, &[(0, 0), (1, 0)]) };
    let began = Instant::now();
    consumer.send(12, &patient).await;
    produce(&mut producer, "t", 0, batch_of(2000).into_bytes()).await;
    produce(&mut producer, "t", 1, batch_of(2000).into_bytes()).await;
    let (_, response): (_, FetchResponse) = consumer.receive(12).await;
    let bytes: usize = response.responses[0].partitions.iter().map(|p| bytes_of(p).len()).sum();
    assert!(bytes >= 4000, "{bytes}");
    assert!(began.elapsed() < Duration::from_secs(20));
}

#[tokio::test]
async fn a_long_poll_gives_what_there_is_when_time_is_up() {
    let running = start().await;
    let id = running.topic("t", 1).await;
    let mut client = running.client().await;
    produce(&mut client, "t", 0, batch(&[b"small"]).into_bytes()).await;
    let patient = FetchRequest { max_wait_ms: 50, min_bytes: 1 << 20, ..request("t", id, &[(0, 0)]) };
    let began = Instant::now();
    assert_eq!(batches_of(&fetch(&mut client, &patient).await[0]).len(), 1);
    assert!(began.elapsed() >= Duration::from_millis(50));
    let empty = FetchRequest { max_wait_ms: 50, ..request("t", id, &[(0, 1)]) };
    let partitions = fetch(&mut client, &empty).await;
    assert_eq!((partitions[0].high_watermark, bytes_of(&partitions[0]).len()), (1, 0));
}

#[tokio::test]
async fn an_error_in_any_partition_ends_the_wait_at_once() {
    let running = start().await;
    let id = running.topic("t", 1).await;
    let mut client = running.client().await;
    let patient = |offsets: &[(i32, i64)]| FetchRequest { max_wait_ms: 30_000, ..request("t", id, offsets) };
    let began = Instant::now();
    let partitions = fetch(&mut client, &patient(&[(0, 0), (7, 0)])).await;
    assert_eq!(partitions[1].error_code, ErrorCode::UNKNOWN_TOPIC_OR_PARTITION);
    let partitions = fetch(&mut client, &patient(&[(0, 0), (0, 0)])).await;
    let codes: Vec<ErrorCode> = partitions.iter().map(|partition| partition.error_code).collect();
    assert_eq!(codes, [ErrorCode::NONE, ErrorCode::INVALID_REQUEST], "named twice");
    // A partition that goes away while it is waited for.
    client.send(12, &patient(&[(0, 0)])).await;
    running.log.remove(Partition { topic: id, index: 0 });
    let (_, response): (_, FetchResponse) = client.receive(12).await;
    let code = response.responses[0].partitions[0].error_code;
    assert_eq!(code, ErrorCode::UNKNOWN_TOPIC_OR_PARTITION);
    assert!(began.elapsed() < Duration::from_secs(20));
}

#[tokio::test]
async fn topics_are_found_by_name_or_by_id_and_another_id_is_another_topic() {
    let running = start().await;
    let id = running.topic("t", 1).await;
    let mut client = running.client().await;
    let other = TopicId([9; 16]);
    let by_id: FetchResponse = client.call(13, &request("", id, &[(0, 0)])).await;
    assert_eq!(by_id.responses[0].partitions[0].error_code, ErrorCode::NONE);
    assert_eq!(by_id.responses[0].topic_id, Uuid(id.0));
    let unknown: FetchResponse = client.call(13, &request("t", other, &[(0, 0)])).await;
    assert_eq!(unknown.responses[0].partitions[0].error_code, ErrorCode::UNKNOWN_TOPIC_ID);
    let unknown: FetchResponse = client.call(12, &request("other", id, &[(0, 0)])).await;
    assert_eq!(unknown.responses[0].partitions[0].error_code, ErrorCode::UNKNOWN_TOPIC_OR_PARTITION);
}

#[tokio::test]
async fn sessions_are_declined_and_one_that_was_never_granted_is_unknown() {
    let running = start().await;
    let id = running.topic("t", 1).await;
    let mut client = running.client().await;
    let opening = FetchRequest { session_epoch: 0, ..request("t", id, &[(0, 0)]) };
    fetch(&mut client, &opening).await;
    let going_on = FetchRequest { session_id: 77, session_epoch: 3, ..opening };
    let response: FetchResponse = client.call(12, &going_on).await;
    assert_eq!(response.error_code, ErrorCode::FETCH_SESSION_ID_NOT_FOUND);
}

#[tokio::test]
async fn leader_epochs_are_checked_and_divergence_is_reported() {
    let running = start().await;
    let id = running.topic("t", 1).await;
    let mut client = running.client().await;
    produce(&mut client, "t", 0, batch(&[b"a", b"b"]).into_bytes()).await;
    running.log.start_epoch(3, 100);
    produce(&mut client, "t", 0, batch(&[b"c"]).into_bytes()).await;
    let with_epochs = |current, last_fetched, offset| {
        let mut request = request("t", id, &[(0, offset)]);
        request.topics[0].partitions[0].current_leader_epoch = current;
        request.topics[0].partitions[0].last_fetched_epoch = last_fetched;
        request
    };
    for (current, expected) in [
        (-1, ErrorCode::NONE),
        (3, ErrorCode::NONE),
        (0, ErrorCode::FENCED_LEADER_EPOCH),
        (4, ErrorCode::UNKNOWN_LEADER_EPOCH),
    ] {
        let partitions = fetch(&mut client, &with_epochs(current, -1, 0)).await;
        assert_eq!(partitions[0].error_code, expected, "epoch {current}");
    }
    let good = fetch(&mut client, &with_epochs(3, 0, 1)).await;
    assert_eq!((good[0].diverging_epoch.epoch, batches_of(&good[0]).len()), (-1, 2));
    // Read further in epoch 0 than it went: the client must go back to where that epoch ended.
    let diverged = fetch(&mut client, &with_epochs(3, 0, 103)).await;
    assert_eq!(diverged[0].diverging_epoch.epoch, 0);
    assert!(bytes_of(&diverged[0]).is_empty());
    let end = diverged[0].diverging_epoch.end_offset;

    let asked = |leader_epoch| OffsetForLeaderPartition { partition: 0, current_leader_epoch: 3, leader_epoch };
    let request = OffsetForLeaderEpochRequest {
        topics: vec![OffsetForLeaderTopic { topic: "t".into(), partitions: [0, 3, -1].map(asked).to_vec() }],
        ..Default::default()
    };
    for version in 2..=4 {
        let response: OffsetForLeaderEpochResponse = client.call(version, &request).await;
        let found: Vec<_> = response.topics[0].partitions.iter().map(|p| (p.leader_epoch, p.end_offset)).collect();
        assert_eq!(found, [(0, end), (3, 103), (-1, -1)], "v{version}");
    }
}

#[tokio::test]
async fn offsets_are_found_by_time() {
    let running = start().await;
    running.topic("t", 2).await;
    let mut client = running.client().await;
    produce(&mut client, "t", 0, batch(&[b"at 1000", b"at 1001", b"at 1002"]).into_bytes()).await;
    for version in 1..=10 {
        let since = |min| if version >= min { ErrorCode::NONE } else { ErrorCode::UNSUPPORTED_VERSION };
        let or_none = |min, offset| if version >= min { offset } else { -1 };
        let cases = [
            (0, -1, ErrorCode::NONE, -1, 3),
            (0, -2, ErrorCode::NONE, -1, 0),
            (0, 0, ErrorCode::NONE, 1000, 0),
            (0, 1001, ErrorCode::NONE, 1001, 1),
            (0, 1003, ErrorCode::NONE, -1, -1),
            (1, 0, ErrorCode::NONE, -1, -1),
            (1, -1, ErrorCode::NONE, -1, 0),
            (2, -1, ErrorCode::UNKNOWN_TOPIC_OR_PARTITION, -1, -1),
            (0, -6, ErrorCode::UNSUPPORTED_VERSION, -1, -1),
            (0, -3, since(7), or_none(7, 1002), or_none(7, 2)),
            (0, -4, since(8), -1, or_none(8, 0)),
            (0, -5, since(9), -1, -1),
        ];
        for (partition, time, code, timestamp, offset) in cases {
            let found = &ask(&mut client, version, &[(partition, time)]).await[0];
            let found = (found.error_code, found.timestamp, found.offset);
            assert_eq!(found, (code, timestamp, offset), "v{version} partition {partition} time {time}");
        }
    }
    let answers = ask(&mut client, 7, &[(0, -1), (1, -1), (0, -2)]).await;
    let codes: Vec<ErrorCode> = answers.iter().map(|answer| answer.error_code).collect();
    assert_eq!(codes, [ErrorCode::NONE, ErrorCode::NONE, ErrorCode::INVALID_REQUEST], "asked about twice");
}

async fn ask(client: &mut Client, version: i16, asked: &[(i32, i64)]) -> Vec<ListOffsetsPartitionResponse> {
    let partition = |(partition_index, timestamp): &(i32, i64)| ListOffsetsPartition {
        partition_index: *partition_index,
        timestamp: *timestamp,
        ..Default::default()
    };
    let topic = ListOffsetsTopic { name: "t".into(), partitions: asked.iter().map(partition).collect() };
    let request = ListOffsetsRequest { replica_id: -1, topics: vec![topic], ..Default::default() };
    let response: ListOffsetsResponse = client.call(version, &request).await;
    response.topics[0].partitions.clone()
}

#[tokio::test]
async fn memory_for_answers_is_given_back() {
    let small = FrontSettings { memory_bytes_max: 1 << 20, fetch_bytes_max: 256 << 10, ..settings() };
    let running = start_with(small, MemoryLog::new(64 << 20)).await;
    let id = running.topic("t", 4).await;
    let mut client = running.client().await;
    for index in 0..4 {
        for _ in 0..4 {
            produce(&mut client, "t", index, batch_of(100_000).into_bytes()).await;
        }
    }
    let before = running.broker.status();
    let offsets = [(0, 0), (1, 0), (2, 0), (3, 0)];
    let clients: Vec<_> = futures_util::future::join_all((0..16).map(|_| running.client())).await;
    let reading = clients.into_iter().map(|mut client| async move {
        for _ in 0..10 {
            let partitions = fetch(&mut client, &request("t", id, &offsets)).await;
            assert!(!bytes_of(&partitions[0]).is_empty());
            let bytes: usize = partitions.iter().map(|partition| bytes_of(partition).len()).sum();
            assert!(bytes <= 256 << 10, "{bytes}");
        }
    });
    futures_util::future::join_all(reading).await;
    let after = running.broker.status();
    assert_eq!(after.response_memory_free_bytes, before.response_memory_free_bytes);
    assert_eq!(after.request_memory_free_bytes, before.request_memory_free_bytes);
}

#[tokio::test]
async fn who_does_not_know_zstd_is_told_and_not_given_it() {
    let running = start().await;
    let id = running.topic("t", 1).await;
    let mut client = running.client().await;
    produce(&mut client, "t", 0, batch(&[b"plain"]).into_bytes()).await;
    produce(&mut client, "t", 0, with_bytes(&batch_of(100), 21, &[0, 4])).await;
    let old: FetchResponse = client.call(9, &request("t", id, &[(0, 0)])).await;
    assert_eq!(old.responses[0].partitions[0].error_code, ErrorCode::UNSUPPORTED_COMPRESSION_TYPE);
    let new: FetchResponse = client.call(10, &request("t", id, &[(0, 0)])).await;
    assert_eq!(new.responses[0].partitions[0].error_code, ErrorCode::NONE);
}
