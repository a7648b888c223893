//! What the store alone takes: publishers on threads, each with a window, as connections would offer their read buffers.
//! `cargo run --release --example store_rate -p tributary-edge DIR [PUBLISHERS] [WINDOW] [SECONDS]`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use edge::store::{EdgeStore, StoreSettings};
use edge::streams::StreamSettings;
use mqtt::store::{Admission, Publish, PublishProperties, SessionRef, Store};
use shared::log::conformance::block_on;
use shared::name::EdgeId;

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let dir = args.next().unwrap_or_else(|| "data/rate".to_owned());
    let mut number = |default: u64| args.next().and_then(|text| text.parse().ok()).unwrap_or(default);
    let (publishers, window, seconds) = (number(50), number(20), number(5));
    let rule = StreamSettings { name: "rate".into(), filters: vec!["#".into()], ..StreamSettings::default() };
    let store = EdgeStore::open(StoreSettings::new(EdgeId::parse("gw-1")?, dir), vec![rule])?;
    let stored = Arc::new(AtomicU64::new(0));
    let until = Instant::now() + Duration::from_secs(seconds);
    let before = store.status();
    std::thread::scope(|scope| {
        for publisher in 0..publishers {
            let (store, stored) = (&store, &stored);
            scope.spawn(move || {
                let topic = format!("rate/{publisher}");
                let payload = [publisher as u8; 256];
                let one = Publish {
                    topic: &topic,
                    payload: &payload,
                    qos: 1,
                    retain: false,
                    packet_id: Some(1),
                    now_ms: 1_700_000_000_000,
                    properties: PublishProperties::default(),
                };
                let buffer = vec![one; window as usize];
                let session = SessionRef { client_id: &topic, kept: false };
                let mut admissions = Vec::new();
                while Instant::now() < until {
                    admissions.clear();
                    store.publish(&session, &buffer, &mut admissions);
                    let Some(Admission::Stored(ticket)) = admissions.last() else {
                        block_on(store.room());
                        continue;
                    };
                    if block_on(store.wait(*ticket)).is_err() {
                        return;
                    }
                    stored.fetch_add(admissions.len() as u64, Ordering::Relaxed);
                    let name = &store.streams()[0];
                    if let Some(at) = store.position(name).filter(|at| at.bytes > 100 << 20) {
                        store.set_safe(name, at.next);
                    }
                }
            });
        }
    });
    let (after, stored) = (store.status(), stored.load(Ordering::Relaxed));
    let commits = after.commit_seconds.count() - before.commit_seconds.count();
    println!(
        "{} messages/s, {} commits/s, {:.1} messages/commit, {:.2} bytes written per payload byte, mean commit {:.2} ms",
        stored / seconds,
        commits / seconds,
        stored as f64 / commits as f64,
        (after.written_bytes_total - before.written_bytes_total) as f64 / (stored * 256).max(1) as f64,
        (after.commit_seconds.sum - before.commit_seconds.sum) * 1e3 / commits.max(1) as f64,
    );
    Ok(())
}
