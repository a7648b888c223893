//! How long a start takes after a power cut, by the size of the database.
//! `cargo run --release --example open_after_cut -p tributary-edge DIR [MIB] [PAYLOAD BYTES] [MESSAGES PER COMMIT]`.
//!
//! Fills a database, copies its file while it is open (as a power cut leaves it), and opens the copy; then opens it again
//! after a clean end. The page cache's copy of the file is dropped before each, as far as the file system takes advice.

use std::path::Path;
use std::time::Instant;

use anyhow::Context as _;
use edge::store::{EdgeStore, StoreSettings};
use edge::streams::StreamSettings;
use mqtt::store::{Admission, Publish, PublishProperties, SessionRef, Store};
use shared::log::conformance::block_on;
use shared::name::EdgeId;

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let dir = args.next().unwrap_or_else(|| "data/cut".to_owned());
    let mut number = |default: usize| args.next().and_then(|text| text.parse().ok()).unwrap_or(default);
    let (mebibytes, payload_bytes, messages) = (number(1024), number(256), number(1000));
    let (whole, cut) = (Path::new(&dir).join("whole"), Path::new(&dir).join("cut"));
    let settings = |dir: &Path| -> anyhow::Result<StoreSettings> {
        let budget = Some((mebibytes as u64) << 21);
        Ok(StoreSettings { disk_budget: budget, ..StoreSettings::new(EdgeId::parse("gw-1")?, dir) })
    };
    let rule = || vec![StreamSettings { name: "s".into(), filters: vec!["#".into()], ..StreamSettings::default() }];
    let store = EdgeStore::open(settings(&whole)?, rule())?;
    let began = Instant::now();
    let payload: Vec<u8> = (0..payload_bytes).map(|n| (n as u8).wrapping_mul(151)).collect();
    let one = Publish {
        topic: "a/b",
        payload: &payload,
        qos: 1,
        retain: false,
        packet_id: Some(1),
        now_ms: 1_700_000_000_000,
        properties: PublishProperties::default(),
    };
    let buffer = vec![one; messages];
    let session = SessionRef { client_id: "dev", kept: false };
    while store.status().disk_used_bytes < (mebibytes as u64) << 20 {
        let mut admissions = Vec::new();
        store.publish(&session, &buffer, &mut admissions);
        let Some(Admission::Stored(ticket)) = admissions.last() else {
            block_on(store.room());
            continue;
        };
        block_on(store.wait(*ticket)).ok().context("not stored")?;
    }
    let file_mib = store.status().disk_used_bytes >> 20;
    let records = store.status().streams.first().map_or(0, |stream| stream.next);
    println!("{file_mib} MiB, {records} records, filled in {:.1} s", began.elapsed().as_secs_f64());
    std::fs::create_dir_all(&cut)?;
    std::fs::copy(whole.join("edge.redb"), cut.join("edge.redb"))?;
    drop(store);
    std::fs::File::open(cut.join("edge.redb"))?.sync_all()?;
    for what in ["after a power cut", "after a clean end"] {
        let began = Instant::now();
        let store = EdgeStore::open(settings(&cut)?, rule())?;
        let took = began.elapsed().as_secs_f64();
        let same = store.status().streams.first().is_some_and(|stream| stream.next == records);
        println!("opened {what}: {took:.2} s, {:.0} MiB/s, all there: {same}", file_mib as f64 / took);
        drop(store);
    }
    Ok(())
}
