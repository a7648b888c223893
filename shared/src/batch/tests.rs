use proptest::prelude::*;

use super::*;
use crate::log::conformance;

const UNPACKED_MAX: usize = 1 << 20;

type Row = (i64, Option<Vec<u8>>, Option<Vec<u8>>, Vec<(Vec<u8>, Vec<u8>)>);

fn build(rows: &[Row], base: Offset, compression: Compression) -> Batch {
    let mut builder = BatchBuilder::default();
    for (timestamp, key, value, headers) in rows {
        let headers: Vec<_> = headers.iter().map(|(n, v)| (&n[..], &v[..])).collect();
        builder.push(*timestamp, key.as_deref(), value.as_deref(), &headers);
    }
    builder.finish(base, compression)
}

fn rows(batch: &Batch) -> Vec<Row> {
    let bytes = |part: Option<Bytes>| part.map(|b| b.to_vec());
    batch
        .records(UNPACKED_MAX)
        .unwrap()
        .map(|record| {
            let r = record.unwrap();
            let headers = r.headers.into_iter().map(|(n, v)| (n.to_vec(), v.unwrap().to_vec())).collect();
            (r.timestamp, bytes(r.key), bytes(r.value), headers)
        })
        .collect()
}

fn any_rows() -> impl Strategy<Value = Vec<Row>> {
    let bytes = || proptest::collection::vec(any::<u8>(), 0..200);
    let headers = proptest::collection::vec((bytes(), bytes()), 0..4);
    proptest::collection::vec(
        (0..1i64 << 45, proptest::option::of(bytes()), proptest::option::of(bytes()), headers),
        1..20,
    )
}

fn any_codec() -> impl Strategy<Value = Compression> {
    prop_oneof![Just(Compression::None), Just(Compression::Lz4), Just(Compression::Zstd)]
}

proptest! {
    #[test]
    fn what_was_pushed_is_read_back(expected in any_rows(), base in 0..i64::MAX / 2, codec in any_codec()) {
        let batch = Batch::parse(build(&expected, base, codec).into_bytes()).unwrap();
        prop_assert_eq!(batch.base_offset(), base);
        prop_assert_eq!(batch.record_count() as usize, expected.len());
        prop_assert_eq!(batch.max_timestamp(), expected.iter().map(|r| r.0).max().unwrap());
        prop_assert_eq!(rows(&batch), expected);
    }

    #[test]
    fn sealing_keeps_every_record(a in any_rows(), b in any_rows(), codec in any_codec()) {
        let first = build(&a, 7, Compression::None);
        let second = build(&b, 7 + a.len() as i64, Compression::Lz4);
        let sealed = seal(&[first, second], codec, None).unwrap();
        let sealed = Batch::parse(sealed.into_bytes()).unwrap();
        prop_assert_eq!(sealed.base_offset(), 7);
        let expected: Vec<Row> = a.into_iter().chain(b).collect();
        prop_assert_eq!(rows(&sealed), expected);
    }

    #[test]
    fn any_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        if let Ok(batch) = Batch::parse(bytes.into()) {
            batch.records(UNPACKED_MAX).into_iter().flatten().for_each(drop);
        }
    }

    #[test]
    fn a_flipped_bit_is_refused_or_in_the_twelve_bytes(expected in any_rows(), at in any::<prop::sample::Index>(), bit in 0..8u8) {
        let sealed = build(&expected, 3, Compression::None).into_bytes();
        let mut bytes = sealed.to_vec();
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        let free = (0..8).contains(&at) || (12..16).contains(&at);
        prop_assert_eq!(Batch::parse(bytes.into()).is_ok(), free);
    }

    #[test]
    fn damaged_records_under_a_good_crc_never_panic(expected in any_rows(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut bytes = build(&expected, 3, Compression::None).into_bytes().to_vec();
        let at = HEADER_BYTES + at.index(bytes.len() - HEADER_BYTES);
        bytes[at] = byte;
        let crc = crc32c::crc32c(&bytes[CRC_FROM..]);
        bytes[17..21].copy_from_slice(&crc.to_be_bytes());
        let batch = Batch::parse(bytes.into()).unwrap();
        batch.records(UNPACKED_MAX).into_iter().flatten().for_each(drop);
    }
}

#[test]
fn kafka_protocol_reads_the_same_records() {
    use kafka_protocol::records::RecordBatchDecoder;
    let expected: Vec<Row> = vec![
        (1_700_000_000_000, Some(b"k".to_vec()), Some(b"value".to_vec()), vec![(b"h".to_vec(), b"1".to_vec())]),
        (1_700_000_000_005, None, Some(vec![]), vec![]),
        (1_700_000_000_005, Some(vec![]), None, vec![]),
    ];
    let batch = build(&expected, 42, Compression::None);
    let mut bytes = batch.into_bytes();
    let set = RecordBatchDecoder::decode(&mut bytes).unwrap();
    let seen: Vec<_> = set.records.iter().map(|r| (r.offset, r.timestamp, r.key.clone(), r.value.clone())).collect();
    assert_eq!(seen.len(), 3);
    for (index, (offset, timestamp, key, value)) in seen.into_iter().enumerate() {
        assert_eq!((offset, timestamp), (42 + index as i64, expected[index].0));
        assert_eq!(key.map(|b| b.to_vec()), expected[index].1);
        assert_eq!(value.map(|b| b.to_vec()), expected[index].2);
    }
    assert_eq!(set.records[0].headers.len(), 1);
}

#[test]
fn golden_bytes() {
    let batch = build(&[(0x0102, Some(b"k".to_vec()), Some(b"v".to_vec()), vec![])], 5, Compression::None);
    let hex: String = batch.bytes().iter().map(|b| format!("{b:02x}")).collect();
    let crc = format!("{:08x}", batch.crc());
    let golden = format!(
        "0000000000000005{}ffffffff02{crc}0000{}{}{}{}{}{}{}{}",
        "0000003a",
        "00000000",
        "0000000000000102",
        "0000000000000102",
        "ffffffffffffffff",
        "ffff",
        "ffffffff",
        "00000001",
        "1000000002".to_owned() + "6b0276" + "00"
    );
    assert_eq!(hex, golden);
}

#[test]
fn a_placed_batch_keeps_its_checksum() {
    let mut bytes = build(&[(1, None, Some(b"v".to_vec()), vec![])], 5, Compression::None).into_bytes().to_vec();
    Batch::place(&mut bytes, 1 << 40, 9);
    let batch = Batch::parse(bytes.into()).unwrap();
    assert_eq!((batch.base_offset(), batch.leader_epoch()), (1 << 40, 9));
}

/// A batch with another number of records and last offset delta in its header, under a good checksum.
fn counted(batch: &Batch, records: i32, last_offset_delta: i32) -> Result<Batch, BatchError> {
    let mut bytes = batch.bytes().to_vec();
    bytes[23..27].copy_from_slice(&last_offset_delta.to_be_bytes());
    bytes[57..61].copy_from_slice(&records.to_be_bytes());
    let crc = crc32c::crc32c(&bytes[CRC_FROM..]);
    bytes[17..21].copy_from_slice(&crc.to_be_bytes());
    Batch::parse(bytes.into())
}

#[test]
fn a_thinned_batch_may_be_stored_and_not_sent() {
    let whole = conformance::batch(5, 1_000);
    assert_eq!(whole.check_entry(), Ok(()));
    for keep in [&[0, 1, 2, 3][..], &[1, 3], &[4], &[]] {
        let batch = conformance::thinned(&whole, keep);
        assert_eq!((batch.base_offset(), batch.last_offset()), (0, 4), "it covers what it covered");
        assert_eq!(Batch::parse(batch.bytes().clone()), Ok(batch.clone()));
        let records = batch.records(UNPACKED_MAX).unwrap().map(|record| record.unwrap());
        let expected: Vec<_> = keep.iter().map(|n| (*n as i64, 1_000 + *n as i64)).collect();
        assert_eq!(records.map(|record| (record.offset, record.timestamp)).collect::<Vec<_>>(), expected);
        assert!(matches!(batch.check_entry(), Err(BatchError::Malformed(_))), "{batch:?}");
        assert!(seal(&[batch], Compression::None, None).is_err(), "sealing would number the records anew");
    }
}

#[test]
fn an_emptied_batch_that_was_compressed_has_no_records() {
    let mut bytes = conformance::thinned(&conformance::batch(3, 1), &[]).bytes().to_vec();
    bytes[22] = 4;
    let crc = crc32c::crc32c(&bytes[CRC_FROM..]);
    bytes[17..21].copy_from_slice(&crc.to_be_bytes());
    let batch = Batch::parse(bytes.into()).unwrap();
    assert_eq!(batch.compression(), Compression::Zstd);
    assert_eq!(batch.records(UNPACKED_MAX).unwrap().count(), 0);
}

#[test]
fn counts_that_contradict_each_other_are_refused() {
    let whole = conformance::batch(5, 1_000);
    for (records, last_offset_delta) in [(-1, 4), (i32::MIN, 4), (6, 4), (i32::MAX, 4), (1, -1), (0, i32::MIN)] {
        let refused = counted(&whole, records, last_offset_delta);
        assert!(matches!(refused, Err(BatchError::Malformed(_))), "{records} {last_offset_delta}");
    }
    // A header that says more than there is: the records are what it is found by.
    let long = counted(&whole, 5, i32::MAX).unwrap();
    assert_eq!(long.last_offset(), i64::from(i32::MAX));
    assert!(long.check_entry().is_err());
    let all = counted(&whole, i32::MAX, i32::MAX - 1).unwrap();
    assert_eq!(all.check_entry(), Ok(()), "only reading them tells");
    assert!(all.records(UNPACKED_MAX).unwrap().any(|record| record.is_err()));
}

#[test]
fn a_gap_is_told_in_the_first_record() {
    let two =
        build(&[(1, None, Some(b"a".to_vec()), vec![]), (2, None, Some(b"b".to_vec()), vec![])], 20, Compression::None);
    let sealed = rows(&seal(&[two], Compression::None, Some((10, 20))).unwrap());
    assert_eq!(sealed[0].3, vec![(GAP_HEADER.as_bytes().to_vec(), b"10-19".to_vec())]);
    assert!(sealed[1].3.is_empty());
}

#[test]
fn batches_that_do_not_adjoin_are_not_sealed() {
    let row = || vec![(1, None, Some(b"a".to_vec()), vec![])];
    let (a, b) = (build(&row(), 1, Compression::None), build(&row(), 3, Compression::None));
    assert!(seal(&[a, b], Compression::None, None).is_err());
}

#[test]
fn a_bomb_is_not_unpacked() {
    let batch = build(&[(1, None, Some(vec![0; 1 << 20]), vec![])], 0, Compression::Zstd);
    assert!(batch.len() < 4096);
    assert_eq!(batch.records(1 << 16).unwrap_err(), BatchError::Bomb(1 << 16));
}
