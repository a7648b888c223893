//! What producers are promised.

use bytes::Bytes;
use kafka_wire::ErrorCode;
use kafka_wire::init_producer_id::{InitProducerIdRequest, InitProducerIdResponse};
use kafka_wire::produce::{
    PartitionProduceData, PartitionProduceResponse, ProduceRequest, ProduceResponse, TopicProduceData,
};
use shared::log::Log as _;
use shared::name::Partition;

use super::*;
use crate::state::ProducerChange;

pub(super) fn request(topic: &str, acks: i16, partitions: &[(i32, Bytes)]) -> ProduceRequest {
    let data = |(index, records): &(i32, Bytes)| PartitionProduceData { index: *index, records: Some(records.clone()) };
    let topic = TopicProduceData { name: topic.to_owned(), partition_data: partitions.iter().map(data).collect() };
    ProduceRequest { acks, timeout_ms: 1000, topic_data: vec![topic], ..Default::default() }
}

/// Produces to one partition and returns its answer.
pub(super) async fn produce(client: &mut Client, topic: &str, index: i32, records: Bytes) -> PartitionProduceResponse {
    let response: ProduceResponse = client.call(9, &request(topic, -1, &[(index, records)])).await;
    response.responses[0].partition_responses[0].clone()
}

#[tokio::test]
async fn every_version_appends_and_answers_the_offset() {
    let running = start().await;
    let id = running.topic("t", 2).await;
    let mut client = running.client().await;
    for (count, version) in (3..=11).enumerate() {
        let records = batch(&[b"one", b"two"]).into_bytes();
        let request = request("t", -1, &[(1, records.clone()), (0, records), (2, Bytes::new())]);
        let response: ProduceResponse = client.call(version, &request).await;
        let partitions = &response.responses[0].partition_responses;
        assert_eq!(partitions.iter().map(|p| p.index).collect::<Vec<_>>(), [1, 0, 2]);
        assert_eq!(partitions[0].error_code, ErrorCode::NONE);
        assert_eq!(partitions[0].base_offset, count as i64 * 2, "v{version}");
        assert_eq!(partitions[2].error_code, ErrorCode::UNKNOWN_TOPIC_OR_PARTITION);
    }
    let bounds = running.log.bounds(Partition { topic: id, index: 1 }).unwrap();
    assert_eq!(bounds.high_watermark, 18);
    assert_eq!(running.broker.status().produced_batches, 18);
    assert_eq!(running.broker.status().refused_batches, 9);
}

#[tokio::test]
async fn the_old_formats_are_advertised_and_refused() {
    let running = start().await;
    running.topic("t", 1).await;
    let mut client = running.client().await;
    for version in 0..3 {
        let response: ProduceResponse = client.call(version, &request("t", 1, &[(0, Bytes::new())])).await;
        assert_eq!(response.responses[0].partition_responses[0].error_code, ErrorCode::UNSUPPORTED_VERSION);
    }
}

#[tokio::test]
async fn what_is_not_one_good_batch_is_refused_and_not_stored() {
    let running = start().await;
    let id = running.topic_with("t", 1, &[("max.message.bytes", "2000")]).await;
    let mut client = running.client().await;
    let good = batch(&[b"value"]);
    let bytes = good.bytes();
    let flip = |at: usize| {
        let mut copy = bytes.to_vec();
        copy[at] ^= 1;
        Bytes::from(copy)
    };
    let cases: Vec<(&str, Bytes, ErrorCode)> = vec![
        ("nothing", Bytes::new(), ErrorCode::INVALID_RECORD),
        ("two batches", [&bytes[..], &bytes[..]].concat().into(), ErrorCode::INVALID_RECORD),
        ("a byte behind", [&bytes[..], b"x"].concat().into(), ErrorCode::INVALID_RECORD),
        ("cut", bytes.slice(..bytes.len() - 1), ErrorCode::CORRUPT_MESSAGE),
        ("a bit flipped", flip(bytes.len() - 1), ErrorCode::CORRUPT_MESSAGE),
        ("old magic", flip(16), ErrorCode::INVALID_RECORD),
        ("another count", with_bytes(&good, 57, &[0, 0, 0, 9]), ErrorCode::INVALID_RECORD),
        ("a hole", with_bytes(&good, 23, &[0, 0, 0, 99]), ErrorCode::INVALID_RECORD),
        ("a base offset", with_bytes(&good, 0, &7_i64.to_be_bytes()), ErrorCode::INVALID_RECORD),
        ("no records", with_bytes(&good, 57, &[0, 0, 0, 0]), ErrorCode::INVALID_RECORD),
        ("a control batch", with_bytes(&good, 21, &[0, 1 << 5]), ErrorCode::INVALID_RECORD),
        ("a transaction", with_bytes(&good, 21, &[0, 1 << 4]), ErrorCode::INVALID_TXN_STATE),
        ("the broker's time", with_bytes(&good, 21, &[0, 1 << 3]), ErrorCode::INVALID_TIMESTAMP),
        ("an unknown codec", with_bytes(&good, 21, &[0, 7]), ErrorCode::INVALID_RECORD),
        ("an id without sequence", identified(&good, 5, 0, -1), ErrorCode::INVALID_RECORD),
        ("an id without epoch", identified(&good, 5, -1, 0), ErrorCode::INVALID_RECORD),
        ("too large", batch_of(2000).into_bytes(), ErrorCode::MESSAGE_TOO_LARGE),
    ];
    for (what, records, expected) in cases {
        let answer = produce(&mut client, "t", 0, records).await;
        assert_eq!((answer.error_code, answer.base_offset), (expected, -1), "{what}");
    }
    let unknown = produce(&mut client, "other", 0, bytes.clone()).await;
    assert_eq!(unknown.error_code, ErrorCode::UNKNOWN_TOPIC_OR_PARTITION);
    let zstd: ProduceResponse = client.call(6, &request("t", 1, &[(0, with_bytes(&good, 21, &[0, 4]))])).await;
    assert_eq!(zstd.responses[0].partition_responses[0].error_code, ErrorCode::UNSUPPORTED_COMPRESSION_TYPE);
    let bad_acks: ProduceResponse = client.call(8, &request("t", 2, &[(0, bytes.clone())])).await;
    assert_eq!(bad_acks.responses[0].partition_responses[0].error_code, ErrorCode::INVALID_REQUIRED_ACKS);
    let transaction = ProduceRequest { transactional_id: Some("id".into()), ..request("t", -1, &[(0, bytes.clone())]) };
    let refused: ProduceResponse = client.call(8, &transaction).await;
    assert_eq!(refused.responses[0].partition_responses[0].error_code, ErrorCode::INVALID_TXN_STATE);
    let bounds = running.log.bounds(Partition { topic: id, index: 0 }).unwrap();
    assert_eq!(bounds.high_watermark, 0, "nothing of all that was stored");
    assert_eq!(produce(&mut client, "t", 0, bytes.clone()).await.error_code, ErrorCode::NONE);
}

#[tokio::test]
async fn a_repeated_sequence_is_a_success_with_the_first_offset_and_a_gap_is_refused() {
    let running = start().await;
    running.topic("t", 1).await;
    let mut client = running.client().await;
    let given: InitProducerIdResponse = client.call(4, &InitProducerIdRequest::default()).await;
    assert_eq!((given.error_code, given.producer_epoch), (ErrorCode::NONE, 0));
    let two = batch(&[b"a", b"b"]);
    let send = |sequence| identified(&two, given.producer_id, 0, sequence);
    for (sequence, offset) in [(0, 0), (2, 2), (4, 4), (0, 0), (2, 2)] {
        let answer = produce(&mut client, "t", 0, send(sequence)).await;
        assert_eq!((answer.error_code, answer.base_offset), (ErrorCode::NONE, offset), "sequence {sequence}");
    }
    let gap = produce(&mut client, "t", 0, send(9)).await;
    assert_eq!(gap.error_code, ErrorCode::OUT_OF_ORDER_SEQUENCE_NUMBER);
    let newer = produce(&mut client, "t", 0, identified(&two, given.producer_id, 1, 0)).await;
    assert_eq!((newer.error_code, newer.base_offset), (ErrorCode::NONE, 6));
    let fenced = produce(&mut client, "t", 0, send(6)).await;
    assert_eq!(fenced.error_code, ErrorCode::INVALID_PRODUCER_EPOCH);
}

#[tokio::test]
async fn without_acknowledgement_there_is_no_answer_and_a_failure_closes() {
    let running = start().await;
    let id = running.topic("t", 1).await;
    let mut client = running.client().await;
    let good = batch(&[b"value"]).into_bytes();
    client.send(9, &request("t", 0, &[(0, good.clone())])).await;
    // The next answer on the connection belongs to the next question.
    let answer = produce(&mut client, "t", 0, good.clone()).await;
    assert_eq!(answer.base_offset, 1);
    assert_eq!(running.log.bounds(Partition { topic: id, index: 0 }).unwrap().high_watermark, 2);
    client.send(9, &request("missing", 0, &[(0, good)])).await;
    assert!(client.is_closed().await);
}

#[tokio::test]
async fn a_full_log_is_answered_with_an_error_that_clients_retry() {
    let running = start_with(settings(), MemoryLog::new(3000)).await;
    running.topic("t", 1).await;
    let mut client = running.client().await;
    let records = batch_of(2000).into_bytes();
    assert_eq!(produce(&mut client, "t", 0, records.clone()).await.error_code, ErrorCode::NONE);
    let full = produce(&mut client, "t", 0, records).await;
    assert_eq!(full.error_code, ErrorCode::NOT_ENOUGH_REPLICAS);
    let closed = {
        running.log.close();
        produce(&mut client, "t", 0, batch_of(10).into_bytes()).await
    };
    assert_eq!(closed.error_code, ErrorCode::NOT_LEADER_OR_FOLLOWER);
}

#[tokio::test]
async fn producer_ids_are_never_given_out_twice_not_even_after_a_restart() {
    let running = start().await;
    let (log, shard) = (running.log.clone(), running.shard.clone());
    let mut given = Vec::new();
    for running in [running, start_over(settings(), log.clone(), shard.clone()).await] {
        let mut client = running.client().await;
        for version in (0..=5).cycle().take(600) {
            let answer: InitProducerIdResponse = client.call(version, &InitProducerIdRequest::default()).await;
            assert_eq!(answer.error_code, ErrorCode::NONE);
            given.push(answer.producer_id);
        }
    }
    let count = given.len();
    given.sort_unstable();
    given.dedup();
    assert_eq!(given.len(), count);
    let reserved = shard
        .state
        .commits()
        .iter()
        .flatten()
        .filter(|c| matches!(c, Change::Producers(ProducerChange::IdsReserved { .. })))
        .count();
    assert_eq!(reserved, 2, "a range at a time");
}

#[tokio::test]
async fn transactions_are_refused_rather_than_pretended() {
    let running = start().await;
    let mut client = running.client().await;
    let request = InitProducerIdRequest { transactional_id: Some("id".into()), ..Default::default() };
    let answer: InitProducerIdResponse = client.call(4, &request).await;
    assert_eq!((answer.error_code, answer.producer_id), (ErrorCode::INVALID_REQUEST, -1));
}
