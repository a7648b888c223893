//! What is wrong in an archive is found and named.

use serde_json::Value;

use super::super::{CLEAN, FINDINGS};
use super::lab::{Node, Place, named, partition, rich};
use crate::manifest::{Index, IndexPage, PagePointer, Root};
use crate::state::{Engine, SlotChange, StateLog, StreamChange};

/// A small generator, so that a failing run can be made again.
fn next(seed: &mut u64) -> usize {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*seed >> 33) as usize
}

async fn findings(place: &Place) -> Vec<(String, String)> {
    let (code, out) = place.tool("verify --json").await.unwrap();
    let lines = out.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let found: Vec<(String, String)> = lines
        .map(|line| (line["key"].as_str().unwrap().to_owned(), line["what"].as_str().unwrap().to_owned()))
        .collect();
    assert_eq!(code, if found.is_empty() { CLEAN } else { FINDINGS });
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_bit_anywhere_is_found_and_its_object_named() {
    let place = Place::directory();
    rich(&place).await.stop().await;
    let keys = named(&place).await;
    assert!(keys.len() > 8, "{keys:?}");
    let mut seed = 1;
    for key in &keys {
        let whole = place.read(key);
        for _ in 0..8 {
            let bit = next(&mut seed) % (whole.len() * 8);
            let mut damaged = whole.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            place.write(key, &damaged);
            let found = findings(&place).await;
            assert!(found.iter().any(|(at, _)| at == key), "{key}, bit {bit}: {found:?}");
        }
        place.write(key, &whole);
    }
    assert_eq!(findings(&place).await, []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_object_that_is_gone_or_cut_is_found() {
    let place = Place::directory();
    rich(&place).await.stop().await;
    let keys = named(&place).await;
    let root = keys.iter().filter(|key| key.contains("/manifest/")).max().unwrap().clone();
    for key in keys.iter().filter(|key| **key != root) {
        let whole = place.read(key);
        for cut in [whole.len() / 2, whole.len() - 1, 0] {
            place.write(key, &whole[..cut]);
            assert!(findings(&place).await.iter().any(|(at, _)| at == key), "{key} cut at {cut}");
        }
        place.remove(key);
        // The end of the shipped log can go unnoticed: nothing says where it ended. Everything else cannot.
        let found = findings(&place).await;
        let last = key.contains("/wal/") && keys.iter().filter(|key| key.contains("/wal/")).max() == Some(key);
        // A shard that does not say its engine says so at its next start.
        assert!(last || key.ends_with("/engine") || !found.is_empty(), "{key} is gone");
        place.write(key, &whole);
    }
    assert_eq!(findings(&place).await, []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_that_names_another_engine_than_the_catalogue_is_found() {
    let place = Place::directory();
    let node = Node::start(&place).await;
    node.shard.commit(vec![SlotChange::ShardAdded { shard: 0, engine: Engine::File }.into()]).await.unwrap();
    node.split().await;
    node.stop().await;
    assert_eq!(findings(&place).await, []);
    let key = "shards/0/engine";
    assert_eq!(place.read(key), b"file\n");
    for (said, expected) in [("object\n", "the catalogue has"), ("memory\n", "expected"), ("file", "expected")] {
        place.write(key, said.as_bytes());
        let found = findings(&place).await;
        assert!(matches!(&found[..], [(at, what)] if at == key && what.contains(expected)), "{said:?}: {found:?}");
    }
}

/// The root in force with its index, and a way to put another in its place.
struct Manifest {
    root: Root,
    root_key: String,
    index: Index,
}

fn page_key(pointer: &PagePointer) -> String {
    let PagePointer { seq, number, nonce, .. } = pointer;
    format!("shards/0/pages/{seq:020}-{number:04}-{nonce:016x}")
}

fn manifest(place: &Place) -> Manifest {
    let root_key = place.keys().into_iter().rfind(|key| key.contains("/manifest/")).unwrap();
    let root = Root::decode(&place.read(&root_key)).unwrap();
    let page =
        |pointer: &PagePointer| (*pointer, IndexPage::decode(&place.read(&page_key(pointer)).into(), pointer).unwrap());
    let index = Index::load(root.pages.iter().map(page)).unwrap();
    Manifest { root, root_key, index }
}

impl Manifest {
    /// Puts pages in force, whatever they say.
    fn publish(mut self, place: &Place, pages: Vec<IndexPage>) {
        self.root.pages.clear();
        for (number, page) in pages.into_iter().enumerate() {
            let (bytes, crc) = page.encode();
            let pointer = PagePointer { seq: 900, number: number as u32, nonce: 7, bytes: bytes.len() as u64, crc };
            place.write(&page_key(&pointer), &bytes);
            self.root.pages.push(pointer);
        }
        place.write(&self.root_key, &self.root.encode());
    }
}

/// The index on pages that were never stored, so that all of them are handed out.
fn pages(index: &Index) -> Vec<IndexPage> {
    let runs = index.partitions().flat_map(|partition| index.runs(partition).map(move |held| (partition, held)));
    let mut fresh = Index::default();
    fresh.extend(runs.collect()).unwrap();
    fresh.pages().filter_map(Result::err).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_is_missing_or_there_twice_is_found() {
    let place = Place::directory();
    rich(&place).await.stop().await;
    let busy = partition(1, 0);

    // The first run of a partition is not named any more.
    let mut without = manifest(&place);
    let first = (busy, without.index.first(busy).unwrap());
    without.index.replace(&[first], Vec::new()).unwrap();
    let saved = place.read(&without.root_key);
    let root_key = without.root_key.clone();
    let stored = pages(&without.index);
    without.publish(&place, stored);
    let found = findings(&place).await;
    assert!(found.iter().all(|(key, what)| *key == root_key && what.contains("offsets 0..240")), "{found:?}");
    assert_eq!(found.len(), 1);
    place.write(&root_key, &saved);

    // A run is named twice.
    let doubled = manifest(&place);
    let mut stored = pages(&doubled.index);
    for (partition, runs) in stored.iter_mut().flat_map(|page| &mut page.partitions) {
        if *partition == busy {
            runs.push(runs[0]);
        }
    }
    doubled.publish(&place, stored);
    let found = findings(&place).await;
    assert!(found.iter().any(|(_, what)| what.contains("overlap")), "{found:?}");
    place.write(&root_key, &saved);

    // Run and index are both whole, and belong to others.
    let mixed = manifest(&place);
    let mut stored = pages(&mixed.index);
    for (_, runs) in stored.iter_mut().flat_map(|page| &mut page.partitions) {
        for (_, run) in runs {
            run.max_timestamp += 1;
        }
    }
    mixed.publish(&place, stored);
    let found = findings(&place).await;
    assert!(found.iter().any(|(_, what)| what.contains("greatest timestamp")), "{found:?}");
    assert!(found.iter().any(|(_, what)| what.contains("directory")), "{found:?}");
    place.write(&root_key, &saved);
    assert_eq!(findings(&place).await, []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_that_contradict_each_other_are_found_though_their_checksums_hold() {
    use crate::block::{Block, BlockBuilder, BlockHeader, Placed};
    use crate::state::Change;
    use shared::log::Chain;
    use shared::log::conformance::{batch, stream};
    let place = Place::directory();
    rich(&place).await.stop().await;
    let last = place.keys().into_iter().rfind(|key| key.contains("/wal/")).unwrap();
    let whole = place.read(&last);
    let (mut rest, mut header) = (bytes::Bytes::from(whole.clone()), None);
    while let Some(block) = Block::split_first(&mut rest).unwrap() {
        header = Some(*block.header());
    }
    let header = header.unwrap();
    let add = |header: BlockHeader, builder: BlockBuilder| {
        place.write(&last, &[&whole[..], builder.finish(header).bytes()].concat());
    };
    let after = BlockHeader { seq: header.seq + 1, ..header };
    // A block that says nothing is no harm.
    add(after, BlockBuilder::default());
    assert_eq!(findings(&place).await, []);
    let cases: [(BlockHeader, Option<i64>, Option<i64>, &str); 5] = [
        (BlockHeader { seq: header.seq + 2, ..header }, None, None, "was expected"),
        (BlockHeader { shard: 3, ..after }, None, None, "of shard 3"),
        (BlockHeader { epoch: 0, ..after }, None, None, "epoch 0 after epoch"),
        (after, Some(5), None, "goes on at offset 5"),
        (after, None, Some(1), "to 1"),
    ];
    for (header, base, position, what) in cases {
        let mut builder = BlockBuilder::default();
        if let Some(base_offset) = base {
            let batch = batch(1, 0);
            builder.push(Placed { partition: partition(1, 0), base_offset, leader_epoch: 1, batch });
        }
        if let Some(next) = position {
            let (key, partition) = (stream(1, 1), partition(2, 0));
            builder.change(Change::Streams(StreamChange::Position { key, partition, next, chain: Chain(0) }));
        }
        add(header, builder);
        let found = findings(&place).await;
        assert!(found.iter().any(|(key, text)| *key == last && text.contains(what)), "{what}: {found:?}");
    }
}
