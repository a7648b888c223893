//! Streams in memory.

use super::*;
use crate::streams::Engine;

fn in_memory(name: &str, filter: &str, bytes: u64) -> StreamSettings {
    StreamSettings { engine: Engine::Memory, memory_bytes: Some(ByteSize(bytes)), ..stream(name, filter) }
}

#[test]
fn a_record_in_memory_is_acknowledged_without_a_sync_and_gone_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let rules = vec![in_memory("m", "m/#", 1 << 20), stream("a", "a/#")];
    let store = EdgeStore::open(settings(dir.path()), rules.clone()).unwrap();
    let syncs = store.status().syncs_total;
    for n in 0..100u8 {
        let admitted = offer(&store, &[publish("m/1", &[n]), publish("m/2", &[n])]);
        let [Admission::Stored(first), Admission::Stored(second)] = admitted[..] else { panic!("{admitted:?}") };
        assert_eq!((store.durable(first), store.durable(second)), (Ok(true), Ok(true)), "nothing is waited for");
    }
    assert_eq!(store.status().syncs_total, syncs, "memory costs no sync");
    assert_eq!(values(&store, "m").len(), 200);
    block_on(store.wait_records(&name("m"), 199));
    let before = store.position(&name("m")).unwrap();
    let mut chain = Chain(0);
    for row in store.read(&name("m"), 0, usize::MAX).unwrap() {
        chain = crate::redb_log::chain_after(chain, &row.batch);
        assert_eq!((row.chain, store.chain_at(&name("m"), row.next())), (chain, Some(chain)));
    }
    // Beside it, the database works as ever, and a message that is retained too is durable before it is acknowledged.
    let mut kept = publish("m/3", b"x");
    kept.retain = true;
    let admitted = offer(&store, &[kept]);
    let [Admission::Stored(ticket)] = admitted[..] else { panic!("{admitted:?}") };
    assert!(ticket > Ticket::default());
    block_on(store.wait(ticket)).unwrap();
    put(&store, "a/1", b"kept");
    let engines: Vec<&str> = store.status().streams.iter().map(|one| one.engine).collect();
    assert_eq!(engines, ["memory", "redb"]);
    drop(store);

    let store = EdgeStore::open(settings(dir.path()), rules).unwrap();
    let after = store.position(&name("m")).unwrap();
    assert_eq!((after.first, after.next), (0, 0));
    assert_ne!(after.incarnation, before.incarnation, "offsets begin again, so it is another life");
    assert_ne!(after.incarnation, store.position(&name("a")).unwrap().incarnation);
    assert_eq!(values(&store, "a"), [b"kept"]);
    assert_eq!(store.load_retained().unwrap().len(), 1);
}

#[test]
fn memory_is_bounded_and_full_is_what_the_rule_says() {
    let payload = vec![7u8; 10_000];
    for on_full in [OnFull::Hold, OnFull::Reject, OnFull::DropOldest] {
        let dir = tempfile::tempdir().unwrap();
        let rule = StreamSettings { on_full, ..in_memory("m", "#", 200_000) };
        let store = EdgeStore::open(settings(dir.path()), vec![rule]).unwrap();
        let mut admitted = 0;
        let end = loop {
            let admission = offer(&store, &[publish("t", &payload)]);
            match admission[..] {
                [Admission::Stored(_)] if admitted < 100 => admitted += 1,
                _ => break admission,
            }
        };
        let at = store.position(&name("m")).unwrap();
        assert!(at.bytes <= 200_000, "{on_full:?}: {at:?}");
        match on_full {
            OnFull::Hold => {
                assert_eq!(end, []);
                // Confirmed is not safe: the cloud may still lose it.
                store.set_confirmed(&name("m"), at.next);
                assert_eq!(offer(&store, &[publish("t", &payload)]), []);
                let room = store.room();
                store.set_safe(&name("m"), 5);
                block_on(room);
                let after = store.position(&name("m")).unwrap();
                assert_eq!((after.first, after.gap), (5, None));
                assert!(matches!(offer(&store, &[publish("t", &payload)])[..], [Admission::Stored(_)]));
            }
            OnFull::Reject => assert_eq!(end, [Admission::Refused(Refusal::QuotaExceeded)]),
            OnFull::DropOldest => {
                assert_eq!((at.next, at.gap), (101, Some((0, at.first))));
                assert!(at.first > 80, "{at:?}");
                assert_eq!(store.status().streams[0].dropped_records_total, at.first as u64);
                assert_eq!(values(&store, "m").len() as i64, at.next - at.first);
            }
        }
    }
}

#[test]
fn a_stream_leaves_the_database_only_when_all_of_it_is_safe() {
    let dir = tempfile::tempdir().unwrap();
    let store = EdgeStore::open(settings(dir.path()), vec![stream("a", "a"), stream("b", "b")]).unwrap();
    for _ in 0..3 {
        put(&store, "a", &[1; 20_000]);
        put(&store, "b", b"x");
    }
    store.set_safe(&name("a"), 2);
    drop(store);
    let moved = vec![in_memory("a", "a", 1 << 20), stream("b", "b")];
    let refused = EdgeStore::open(settings(dir.path()), moved.clone()).unwrap_err().to_string();
    assert!(refused.contains("holds 1 records") && refused.contains("engine = \"redb\""), "{refused}");
    let store = EdgeStore::open(settings(dir.path()), vec![stream("a", "a"), stream("b", "b")]).unwrap();
    store.set_safe(&name("a"), 3);
    drop(store);
    let store = EdgeStore::open(settings(dir.path()), moved.clone()).unwrap();
    assert_eq!(store.streams(), [name("a"), name("b")]);
    assert!(matches!(offer(&store, &[publish("a", b"new")])[..], [Admission::Stored(_)]));
    assert_eq!(values(&store, "a"), [b"new"]);
    put(&store, "b", b"y");
    drop(store);
    // And back: the database goes on where it was.
    let store = EdgeStore::open(settings(dir.path()), vec![stream("a", "a"), stream("b", "b")]).unwrap();
    let a = store.position(&name("a")).unwrap();
    assert_eq!((a.first, a.next), (3, 3));
    put(&store, "a", b"again");
    assert_eq!((values(&store, "a"), values(&store, "b").len()), (vec![b"again".to_vec()], 4));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_in_memory_is_forwarded_under_its_own_life() {
    use crate::salvage::cloud::Cloud;
    use crate::uplink::Uplink;
    let (cloud, uplink) = Cloud::start().await;
    for round in 0..2 {
        let dir = tempfile::tempdir().unwrap();
        let store = EdgeStore::open(settings(dir.path()), vec![in_memory("m", "#", 1 << 20)]).unwrap();
        let (stop, stopping) = watch::channel(false);
        let link = Uplink::start(uplink.clone(), store.clone(), stopping).unwrap();
        for n in 0..20u8 {
            assert!(matches!(offer(&store, &[publish("t", &[n])])[..], [Admission::Stored(_)]));
        }
        while store.position(&name("m")).unwrap().confirmed < 20 {
            tokio::task::yield_now().await;
        }
        stop.send_replace(true);
        link.ended().await;
        let taken: Vec<u8> = cloud.taken("m").await.iter().map(|(value, _)| value[0]).collect();
        assert_eq!(taken, (0..=round).flat_map(|_| 0..20).collect::<Vec<_>>());
    }
}
