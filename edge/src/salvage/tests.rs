//! Salvage against a cloud that is the link's own receiver.

use std::collections::BTreeSet;

use mqtt::store::{Admission, Publish, PublishProperties, SessionRef, Store};
use shared::log::conformance::block_on;
use shared::name::EdgeId;

use super::cloud::{Cloud, Taken};
use super::*;
use crate::store::{EdgeStore, StoreSettings};
use crate::streams::StreamSettings;

const MESSAGES: u32 = 300;

/// The value of a record: its number, and something to fill it that is found nowhere else.
fn value(n: u32) -> Vec<u8> {
    // Every tenth is large enough for a row of its own.
    let mut value = vec![n as u8 ^ 0x5a; if n.is_multiple_of(10) { 15_000 } else { 200 }];
    value[..8].copy_from_slice(&(0xabcd_0000_0000_0000 | u64::from(n)).to_be_bytes());
    value
}

fn number(value: &[u8]) -> u32 {
    u32::from_be_bytes(value[4..8].try_into().unwrap())
}

fn numbers(taken: &Taken) -> Vec<u32> {
    taken.iter().map(|(value, _)| number(value)).collect()
}

fn open(dir: &Path) -> Arc<EdgeStore> {
    let stream = |name: &str, filter: &str| StreamSettings {
        name: name.into(),
        filters: vec![filter.into()],
        ..StreamSettings::default()
    };
    let settings =
        StoreSettings { disk_budget: Some(64 << 20), ..StoreSettings::new(EdgeId::parse("gw-1").unwrap(), dir) };
    EdgeStore::open(settings, vec![stream("a", "a/#"), stream("b", "b/#")]).unwrap()
}

fn put(store: &EdgeStore, topic: &str, payload: &[u8]) {
    let publish = Publish {
        topic,
        payload,
        qos: 1,
        retain: false,
        packet_id: Some(1),
        now_ms: 1_700_000_000_000,
        properties: PublishProperties::default(),
    };
    let mut admissions = Vec::new();
    store.publish(&SessionRef { client_id: "dev", kept: true }, &[publish], &mut admissions);
    match admissions[..] {
        [Admission::Stored(ticket)] => block_on(tokio::task::unconstrained(Store::wait(store, ticket))).unwrap(),
        ref other => panic!("{other:?}"),
    }
}

/// A database with [`MESSAGES`] on each of two streams.
fn database(dir: &Path) -> PathBuf {
    let store = open(dir);
    for n in 0..MESSAGES {
        put(&store, "a/1", &value(n));
        put(&store, "b/1", &value(n)[..100]);
    }
    drop(store);
    dir.join("edge.redb")
}

/// Flips a bit in every copy of record `n` of stream `a`.
fn damage(path: &Path, n: u32) {
    let mut bytes = std::fs::read(path).unwrap();
    let value = value(n);
    let needle = &value[..150];
    let found: Vec<usize> = (0..bytes.len() - needle.len()).filter(|at| bytes[*at..].starts_with(needle)).collect();
    assert!(!found.is_empty(), "record {n} is nowhere");
    for at in found {
        bytes[at + 120] ^= 4;
    }
    std::fs::write(path, bytes).unwrap();
}

async fn salvage(path: &Path, settings: &UplinkSettings) -> (Arc<Salvage>, Vec<StreamReport>) {
    let before = std::fs::read(path).unwrap();
    let salvage = Arc::new(Salvage::read(path, |_, _| {}).unwrap());
    let (_stop, stopping) = watch::channel(false);
    let reports = salvage.send(settings.clone(), stopping, |_, _| {}).await.unwrap();
    assert_eq!(std::fs::read(path).unwrap(), before, "the file was changed");
    (salvage, reports)
}

/// Runs an uplink until the cloud has `upto` of stream `a`.
async fn forward(store: &Arc<EdgeStore>, settings: &UplinkSettings, upto: Offset) {
    let (stop, stopping) = watch::channel(false);
    let uplink = Uplink::start(settings.clone(), store.clone(), stopping).unwrap();
    let name = StreamName::parse("a").unwrap();
    while store.position(&name).unwrap().confirmed < upto {
        tokio::task::yield_now().await;
    }
    stop.send_replace(true);
    uplink.ended().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_be_read_reaches_the_cloud_once_and_the_rest_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = database(dir.path());
    for n in [100, 205, 299] {
        damage(&path, n);
    }
    let (cloud, settings) = Cloud::start().await;
    let (read, reports) = salvage(&path, &settings).await;
    assert!(read.refused.is_some(), "redb takes it whole or not at all");
    let lost = [100, 205, 299];
    let expected: Vec<u32> = (0..MESSAGES).filter(|n| !lost.contains(n)).collect();
    let taken = cloud.taken("a").await;
    assert_eq!(numbers(&taken), expected);
    assert!(taken.iter().all(|(got, _)| *got == value(number(got))), "bytes differ");
    let gaps: Vec<(u32, &str)> =
        taken.iter().filter_map(|(value, gap)| Some((number(value), gap.as_deref()?))).collect();
    assert_eq!(gaps, [(101, "100-100"), (206, "205-205")]);
    assert_eq!(numbers(&cloud.taken("b").await), (0..MESSAGES).collect::<Vec<_>>());
    let a = &reports[0];
    // What was damaged at the very end is known as a batch, not as an offset.
    assert_eq!((a.read, a.already, a.sent, a.lost), (297, 0, 297, 2));
    assert_eq!(a.lost_at, [(100, 101), (205, 206)]);
    assert!(read.damage().1 >= 3, "{:?}", read.damage());
    assert_eq!((reports[1].sent, reports[1].lost, reports[1].unsent()), (300, 0, 0));

    // Again: nothing is there twice.
    let (_, reports) = salvage(&path, &settings).await;
    assert_eq!(cloud.taken("a").await, taken);
    assert_eq!(cloud.taken("b").await.len(), 300);
    assert_eq!(reports.iter().map(|one| (one.already, one.sent)).collect::<Vec<_>>(), [(297, 0), (300, 0)]);
    let text = render(&reports);
    assert!(!text.contains("lost of"), "the cloud has all that is behind: {text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_may_go_when_all_it_ever_held_is_in_the_bucket_and_not_before() {
    let dir = tempfile::tempdir().unwrap();
    let path = database(dir.path());
    let (cloud, settings) = Cloud::start().await;
    let (read, reports) = salvage(&path, &settings).await;
    assert!(reports.iter().all(|one| one.unsent() == 0 && one.lost == 0), "{reports:?}");
    let why = read.why_kept().join("\n");
    assert!(why.contains("stream a are in the cloud, but not in its bucket"), "{why}");
    cloud.archive();
    let mut read = Salvage::read(&path, |_, _| {}).unwrap();
    read.wait_until_safe();
    let read = Arc::new(read);
    let (_stop, stopping) = watch::channel(false);
    read.send(settings.clone(), stopping, |_, _| {}).await.unwrap();
    assert_eq!(read.why_kept(), Vec::<String>::new());

    damage(&path, 100);
    let (read, _) = salvage(&path, &settings).await;
    let why = read.why_kept().join("\n");
    assert!(why.contains("does not open it") && why.contains("batches do not hold"), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_cloud_had_is_not_sent_again_even_where_its_place_is_lost() {
    for (sent, lost) in [
        (MESSAGES / 2, vec![10, 200]),
        // The cloud's position is the end of a lost record, its beginning, within a lost range, and behind all there is.
        (151, vec![150]),
        (150, vec![150]),
        (152, vec![150, 151, 152, 153]),
        (MESSAGES, vec![298, 299]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (cloud, settings) = Cloud::start().await;
        let store = open(dir.path());
        for n in 0..MESSAGES {
            if n == sent {
                forward(&store, &settings, n.into()).await;
            }
            put(&store, "a/1", &value(n));
        }
        if sent == MESSAGES {
            forward(&store, &settings, sent.into()).await;
        }
        drop(store);
        let path = dir.path().join("edge.redb");
        lost.iter().for_each(|n| damage(&path, *n));
        let (_, reports) = salvage(&path, &settings).await;
        let expected: Vec<u32> = (0..MESSAGES).filter(|n| *n < sent || !lost.contains(n)).collect();
        assert_eq!(numbers(&cloud.taken("a").await), expected, "{sent} sent, {lost:?} lost");
        let missing = lost.iter().filter(|n| **n >= sent).count() as u64;
        let a = &reports[0];
        assert_eq!((a.lost, a.renewed, a.unsent()), (missing, false, 0), "{a:?}");
        assert_eq!(a.already + a.sent, a.read);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_whose_beginning_is_gone_is_still_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = database(dir.path());
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[..4096].fill(0xee);
    std::fs::write(&path, bytes).unwrap();
    let (cloud, settings) = Cloud::start().await;
    let (read, _) = salvage(&path, &settings).await;
    assert!(read.refused.as_ref().is_some_and(|why| why.contains("magic")), "{:?}", read.refused);
    for topic in ["a", "b"] {
        assert_eq!(numbers(&cloud.taken(topic).await), (0..MESSAGES).collect::<Vec<_>>());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn other_records_in_the_cloud_cost_another_incarnation_and_only_one() {
    let dir = tempfile::tempdir().unwrap();
    let (cloud, settings) = Cloud::start().await;
    drop(open(dir.path()));
    let copy = tempfile::tempdir().unwrap();
    std::fs::copy(dir.path().join("edge.redb"), copy.path().join("edge.redb")).unwrap();
    // A cloned card that went its own way, and was first.
    let clone = open(copy.path());
    for n in 1000..1010 {
        put(&clone, "a/1", &value(n));
    }
    forward(&clone, &settings, 10).await;
    let path = database(dir.path());
    for round in 0..2 {
        let (read, reports) = salvage(&path, &settings).await;
        assert_eq!(read.refused, None);
        let taken = numbers(&cloud.taken("a").await);
        assert_eq!(taken, (1000..1010).chain(0..MESSAGES).collect::<Vec<_>>(), "round {round}");
        assert!(reports[0].renewed && !reports[1].renewed);
        assert_eq!(reports[0].already, if round == 0 { 0 } else { 300 });
    }
}

#[test]
fn whatever_bit_is_flipped_nothing_is_read_that_was_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = database(dir.path());
    let whole = std::fs::read(&path).unwrap();
    let used: Vec<usize> =
        (0..whole.len() / 4096).filter(|page| whole[page * 4096..][..4096].iter().any(|b| *b != 0)).collect();
    let mut seed = 11u64;
    let mut random = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize
    };
    let (mut refused, mut most_lost) = (0, 0);
    for round in 0..60 {
        let mut bytes = whole.clone();
        for _ in 0..=round % 3 {
            let at = used[random() % used.len()] * 4096 + random() % 4096;
            bytes[at] ^= 1 << (random() % 8);
        }
        let bad = dir.path().join("bad");
        std::fs::write(&bad, bytes).unwrap();
        let salvage = Salvage::read(&bad, |_, _| {}).unwrap();
        refused += u32::from(salvage.refused.is_some());
        let name = StreamName::parse("a").unwrap();
        let (mut next, mut seen) = (0, BTreeSet::new());
        loop {
            let rows = Rows::read(&salvage, &name, next, 100_000).unwrap_or_default();
            let Some(last) = rows.last() else { break };
            next = last.batch.last_offset() + 1;
            for record in rows.iter().flat_map(|row| row.batch.records(1 << 24).unwrap()) {
                let record = record.unwrap();
                assert_eq!(record.value.as_deref(), Some(&value(record.offset as u32)[..]), "round {round}");
                assert!(seen.insert(record.offset));
            }
        }
        most_lost = most_lost.max(MESSAGES as usize - seen.len());
    }
    println!("{refused} of 60 refused by redb, at most {most_lost} records lost");
    assert!(refused > 20 && most_lost < 100, "{refused} refused, {most_lost} lost");
}
