//! Power cuts, failing and slow disks: doubles under the database.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Condvar, Mutex};
use redb::StorageBackend;

use super::*;
use crate::redb_log::backend::{DiskBound, OpenStorage};

/// A disk in memory that records what is done to it, and fails or stalls when told to.
#[derive(Debug, Clone, Default)]
struct Disk(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    state: Mutex<DiskState>,
    moved: Condvar,
    syncs: AtomicU64,
}

#[derive(Debug, Default)]
struct DiskState {
    bytes: Vec<u8>,
    record: Option<Vec<Op>>,
    /// What the disk answers to the next syncs or writes.
    failing: Option<Failing>,
    /// Syncs wait while this is set.
    stalled: bool,
    /// Syncs that wait.
    waiting: usize,
}

#[derive(Debug, Clone)]
enum Op {
    Write(u64, Vec<u8>),
    Length(u64),
    Sync,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Failing {
    Sync,
    Write,
    Full,
}

impl Op {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Write(at, data) => bytes[*at as usize..][..data.len()].copy_from_slice(data),
            Self::Length(length) => bytes.resize(*length as usize, 0),
            Self::Sync => {}
        }
    }
}

impl Disk {
    fn holding(bytes: Vec<u8>) -> Self {
        let disk = Self::default();
        disk.0.state.lock().bytes = bytes;
        disk
    }

    fn opener(&self) -> OpenStorage {
        let disk = self.clone();
        Arc::new(move || Ok(Box::new(disk.clone())))
    }

    fn store(&self, streams: &[StreamSettings]) -> Arc<EdgeStore> {
        let bound = DiskBound::new(64 << 20, 8 << 20);
        EdgeStore::open_on(settings(Path::new("double")), streams, &self.opener(), bound).unwrap()
    }

    fn set_failing(&self, failing: Option<Failing>) {
        self.0.state.lock().failing = failing;
    }

    fn operate(&self, op: Op) -> io::Result<()> {
        let mut state = self.0.state.lock();
        let failed = |kind: io::ErrorKind| Err(io::Error::new(kind, "the double says so"));
        match (&op, state.failing) {
            (Op::Sync, Some(Failing::Sync)) | (Op::Write(..), Some(Failing::Write)) => {
                return failed(io::ErrorKind::Other);
            }
            (Op::Write(..), Some(Failing::Full)) => return failed(io::ErrorKind::StorageFull),
            _ => {}
        }
        op.apply(&mut state.bytes);
        if let Some(record) = &mut state.record {
            record.push(op);
        }
        Ok(())
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.state.lock().bytes.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let state = self.0.state.lock();
        let from = state.bytes.get(offset as usize..).and_then(|rest| rest.get(..out.len()));
        out.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.operate(Op::Length(len))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.syncs.fetch_add(1, Ordering::Relaxed);
        let mut state = self.0.state.lock();
        state.waiting += 1;
        self.0.moved.notify_all();
        while state.stalled {
            self.0.moved.wait(&mut state);
        }
        state.waiting -= 1;
        drop(state);
        self.operate(Op::Sync)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.operate(Op::Write(offset, data.to_vec()))
    }
}

fn rules() -> Vec<StreamSettings> {
    vec![stream("a", "a/#"), stream("b", "b/#")]
}

/// One PUBLISH buffer whose parts must appear together: a record on each stream, a retained message and a packet id.
fn put_together(store: &EdgeStore, n: u16) -> Ticket {
    let bytes = n.to_be_bytes();
    // Sizes that take each way into the rows: through the tail, and at once.
    let mut large = vec![n as u8; if n.is_multiple_of(9) { 14_000 } else { 300 }];
    large[..2].copy_from_slice(&bytes);
    let mut exact = publish("b/1", &bytes);
    (exact.qos, exact.packet_id, exact.retain) = (2, Some(n), true);
    let admissions = offer(store, &[publish("a/1", &large), exact]);
    if n > 0 {
        store.release("dev", n - 1);
    }
    match admissions[..] {
        [Admission::Stored(first), Admission::Stored(second)] => {
            assert_eq!(first, second, "one buffer, one commit");
            first
        }
        ref other => panic!("{other:?}"),
    }
}

/// Checks what came back: all that was acknowledged, nothing half, the chain intact. Returns how much came back.
fn check(store: &EdgeStore, acknowledged: u16) -> u16 {
    let numbers = |stream: &str| -> Vec<u16> {
        values(store, stream).iter().map(|value| u16::from_be_bytes([value[0], value[1]])).collect()
    };
    let (a, b) = (numbers("a"), numbers("b"));
    assert!(a.iter().copied().eq(0..a.len() as u16), "{a:?}");
    assert_eq!(a, b, "records of one commit came back apart");
    let count = a.len() as u16;
    assert!(count >= acknowledged, "{acknowledged} were acknowledged, {count} are there");
    let retained = store.load_retained().unwrap();
    let last = retained.first().map(|one| one.properties_and_payload[1..].to_vec());
    assert_eq!(last, count.checked_sub(1).map(|n| n.to_be_bytes().to_vec()), "retained message and record came apart");
    if count > 0 {
        let sessions = store.load_sessions().unwrap();
        // The release of the one before is a change of its own and may have missed the commit.
        let ids = &sessions[0].inbound_packet_ids;
        assert!(ids.ends_with(&[count - 1]) && ids.len() <= 2, "packet id and record came apart: {ids:?}");
    }
    for stream in ["a", "b"] {
        let (mut next, mut chain) = (0, Chain(0));
        while next < i64::from(count) {
            for stored in store.read(&name(stream), next, usize::MAX).unwrap() {
                chain = crate::redb_log::chain_after(chain, &stored.batch);
                assert_eq!(chain, stored.chain);
                next = stored.next();
            }
        }
        assert_eq!(store.chain_at(&name(stream), next), Some(chain));
    }
    count
}

/// A small generator, so that a failure can be repeated.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

#[test]
fn a_power_cut_at_any_sync_loses_nothing_acknowledged() {
    let disk = Disk::default();
    let store = disk.store(&rules());
    let session = StoredSession { client_id: "dev".into(), expiry_secs: u32::MAX, ..StoredSession::default() };
    block_on(store.wait(store.save_session(&session))).unwrap();
    let mut synced = {
        // Making the database is not cut here: a real one is made under another name first.
        let mut state = disk.0.state.lock();
        state.record = Some(Vec::new());
        state.bytes.clone()
    };
    // Operations done when so many messages had been acknowledged.
    let mut acknowledged: Vec<usize> = Vec::new();
    const MESSAGES: u16 = 600;
    for n in 0..MESSAGES {
        let ticket = put_together(&store, n);
        if n % 5 == 4 {
            // Trims and cursors ride along.
            store.set_confirmed(&name("a"), i64::from(n / 2));
        }
        if n % 3 != 1 {
            block_on(store.wait(ticket)).unwrap();
            let done = disk.0.state.lock().record.as_ref().unwrap().len();
            acknowledged.resize(usize::from(n) + 1, done);
        }
    }
    drop(store);
    let ops = disk.0.state.lock().record.take().unwrap();
    let syncs: Vec<usize> = ops.iter().enumerate().filter(|(_, op)| matches!(op, Op::Sync)).map(|(at, _)| at).collect();
    assert!(syncs.len() >= 400, "{} syncs", syncs.len());

    // POWER_CUTS=N: so many more, at random moments.
    let more: usize = std::env::var("POWER_CUTS").ok().and_then(|n| n.parse().ok()).unwrap_or(0);
    let torn_each = more.div_ceil(syncs.len());
    let mut seed = 7 + more as u64;
    let (mut from, mut cuts, mut most) = (0, 0, 0);
    for (index, sync) in syncs.iter().enumerate() {
        ops[from..=*sync].iter().for_each(|op| op.apply(&mut synced));
        from = sync + 1;
        let until = syncs.get(index + 1).copied().unwrap_or(ops.len());
        for torn in std::iter::once(false).chain(std::iter::repeat_n(true, 1 + torn_each)) {
            let mut image = synced.clone();
            let mut at = from;
            if torn {
                // Some of what was written since the sync reached the disk, in part, in any order.
                at = from + random(&mut seed) as usize % (until - from + 1);
                for op in &ops[from..at] {
                    match op {
                        Op::Write(offset, data) if random(&mut seed).is_multiple_of(2) => {
                            let whole = !random(&mut seed).is_multiple_of(4);
                            let length = if whole { data.len() } else { data.len() / 512 / 2 * 512 };
                            Op::Write(*offset, data[..length].to_vec()).apply(&mut image);
                        }
                        Op::Write(..) => {}
                        other => other.apply(&mut image),
                    }
                }
            }
            let acked = acknowledged.partition_point(|done| *done <= at) as u16;
            let store = Disk::holding(image).store(&rules());
            most = most.max(check(&store, acked));
            cuts += 1;
        }
    }
    assert_eq!(most, MESSAGES);
    println!("{cuts} cuts");
    assert!(cuts >= 800, "{cuts} cuts");
}

#[test]
fn nothing_is_acknowledged_between_an_error_and_the_reopening() {
    for (failing, lost) in
        [(Failing::Sync, false), (Failing::Sync, true), (Failing::Write, false), (Failing::Full, false)]
    {
        let disk = Disk::default();
        let store = disk.store(&rules());
        let session = StoredSession { client_id: "dev".into(), expiry_secs: u32::MAX, ..StoredSession::default() };
        block_on(store.wait(store.save_session(&session))).unwrap();
        block_on(store.wait(put_together(&store, 0))).unwrap();
        let image = disk.0.state.lock().bytes.clone();
        disk.set_failing(Some(failing));
        let first = put_together(&store, 1);
        while store.status().trouble.is_none() {
            std::thread::yield_now();
        }
        let second = put_together(&store, 2);
        assert!(store.durable() < first && first < second, "{failing:?}");
        if lost {
            // The pages of the failed sync never reached the disk.
            disk.0.state.lock().bytes = image;
        }
        disk.set_failing(None);
        block_on(store.wait(second)).unwrap();
        assert!(store.durable() >= second);
        assert_eq!(check(&store, 3), 3, "{failing:?}");
        assert_eq!(store.status().trouble, None);
        drop(store);
        assert_eq!(check(&disk.store(&rules()), 3), 3, "{failing:?}");
    }
}

#[test]
fn a_database_that_comes_back_older_ends_the_store() {
    let disk = Disk::default();
    let store = disk.store(&rules());
    block_on(store.wait(put_together(&store, 0))).unwrap();
    let old = disk.0.state.lock().bytes.clone();
    for n in 1..4 {
        block_on(store.wait(put_together(&store, n))).unwrap();
    }
    disk.set_failing(Some(Failing::Sync));
    let ticket = put_together(&store, 4);
    while store.status().trouble.is_none() {
        std::thread::yield_now();
    }
    disk.0.state.lock().bytes = old;
    disk.set_failing(None);
    let failed = block_on(store.wait(ticket)).unwrap_err();
    assert!(failed.0.contains("came back with commit"), "{failed}");
    assert!(store.durable() < ticket);
    assert_eq!(offer(&store, &[publish("a/1", b"x")]), [Admission::Refused(Refusal::Unavailable)]);
    assert_eq!(block_on(store.failed()), failed);
    block_on(store.room());
}

#[test]
fn what_comes_during_a_commit_shares_the_next_one() {
    let disk = Disk::default();
    let store = disk.store(&rules());
    block_on(store.wait(put_together(&store, 0))).unwrap();
    disk.0.state.lock().stalled = true;
    let first = match offer(&store, &[publish("a/1", b"first")])[..] {
        [Admission::Stored(ticket)] => ticket,
        ref other => panic!("{other:?}"),
    };
    {
        let mut state = disk.0.state.lock();
        while state.waiting == 0 {
            disk.0.moved.wait(&mut state);
        }
    }
    let tickets: Vec<Admission> = (0..100).flat_map(|_| offer(&store, &[publish("a/1", b"later")])).collect();
    assert!(tickets.iter().all(|one| *one == Admission::Stored(Ticket(first.0 + 1))), "{tickets:?}");
    assert!(store.durable() < first, "not before its sync returned");
    assert_eq!(store.status().held_acks, 101);
    disk.0.state.lock().stalled = false;
    disk.0.moved.notify_all();
    block_on(store.wait(Ticket(first.0 + 1))).unwrap();
    assert_eq!(store.status().held_acks, 0);
    assert_eq!(values(&store, "a").len(), 102);
}

#[test]
fn a_stream_that_is_held_waits_while_the_disk_stalls_and_goes_on() {
    let disk = Disk::default();
    let store = disk.store(&rules());
    block_on(store.wait(put_together(&store, 0))).unwrap();
    disk.0.state.lock().stalled = true;
    let payload = vec![0u8; 100_000];
    let mut stored = 0;
    // What waits is bounded: then nothing more is admitted.
    while let [Admission::Stored(_)] = offer(&store, &[publish("a/1", &payload)])[..] {
        stored += 1;
        assert!(stored < 1000, "memory is not bounded");
    }
    let room = store.room();
    disk.0.state.lock().stalled = false;
    disk.0.moved.notify_all();
    block_on(room);
    put(&store, "a/1", &payload);
    assert_eq!(values(&store, "a").len(), stored + 2);
}

/// What a store holds, as far as a client or the cloud could see it.
#[derive(Debug, PartialEq)]
struct Seen {
    values: Vec<Vec<Vec<u8>>>,
    positions: Vec<(Incarnation, Offset, Offset, Offset, Offset, Option<Chain>)>,
    sessions: Vec<StoredSession>,
    retained: Vec<StoredRetained>,
}

/// `Err`: something is damaged and says so.
fn seen(store: &EdgeStore) -> Result<Seen, String> {
    let mut seen = Seen {
        values: Vec::new(),
        positions: Vec::new(),
        sessions: store.load_sessions().map_err(|error| error.to_string())?,
        retained: store.load_retained().map_err(|error| error.to_string())?,
    };
    for stream in ["a", "b"] {
        let at = store.position(&name(stream)).ok_or("a stream is gone")?;
        let chain = store.chain_at(&name(stream), at.next);
        seen.positions.push((at.incarnation, at.first, at.next, at.confirmed, at.safe, chain));
        let (mut values, mut next) = (Vec::new(), at.first);
        while next < at.next {
            for stored in store.read(&name(stream), next, 100_000).map_err(|error| error.to_string())? {
                next = stored.next();
                for record in stored.batch.records(1 << 24).map_err(|error| error.to_string())? {
                    values.push(record.map_err(|error| error.to_string())?.value.unwrap_or_default().to_vec());
                }
            }
        }
        seen.values.push(values);
    }
    Ok(seen)
}

#[test]
fn a_flipped_bit_is_harmless_or_found_named_and_contained() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("edge.redb");
    let open = || EdgeStore::open(settings(dir.path()), rules());
    let store = open().unwrap();
    let session = StoredSession { client_id: "dev".into(), expiry_secs: u32::MAX, ..StoredSession::default() };
    block_on(store.wait(store.save_session(&session))).unwrap();
    for n in 0..200 {
        block_on(store.wait(put_together(&store, n))).unwrap();
    }
    store.set_confirmed(&name("a"), 50);
    // As a power cut leaves it, before and after the last commit, and as a clean end does.
    put(&store, "a/1", b"last but one");
    let prior = std::fs::read(&path).unwrap();
    put(&store, "a/1", b"last");
    let cut = std::fs::read(&path).unwrap();
    drop(store);
    let store = open().unwrap();
    let expected = seen(&store).unwrap();
    drop(store);
    let clean = std::fs::read(&path).unwrap();
    std::fs::write(&path, &prior).unwrap();
    let prior = seen(&open().unwrap()).unwrap();
    assert_ne!(prior, expected);

    let flips: usize = std::env::var("BIT_FLIPS").ok().and_then(|n| n.parse().ok()).unwrap_or(100);
    let mut seed = 3 + flips as u64;
    let (mut harmless, mut undone, mut aside, mut named, mut refused) = (0, 0, 0, 0, 0);
    for round in 0..flips {
        let mut image = if round % 2 == 0 { clean.clone() } else { cut.clone() };
        let pages: Vec<usize> =
            (0..image.len() / 4096).filter(|page| image[page * 4096..][..4096] != [0; 4096]).collect();
        // The header is one page of many, and the one that everything hangs on.
        let at = match random(&mut seed) as usize {
            header if header.is_multiple_of(8) => random(&mut seed) as usize % 320,
            // Cursors lie behind their stream's incarnation, and have no checksum of their own.
            cursor if cursor.is_multiple_of(4) => {
                let life = expected.positions[0].0.0;
                let found: Vec<usize> = (0..image.len() - 64).filter(|at| image[*at..].starts_with(&life)).collect();
                found[cursor / 4 % found.len()] + random(&mut seed) as usize % 60
            }
            page => pages[page % pages.len()] * 4096 + random(&mut seed) as usize % 4096,
        };
        image[at] ^= 1 << (random(&mut seed) % 8);
        for entry in std::fs::read_dir(dir.path()).unwrap() {
            std::fs::remove_file(entry.unwrap().path()).unwrap();
        }
        std::fs::write(&path, &image).unwrap();
        let store = match open() {
            Ok(store) => store,
            // The start ends and says why; the file is as it was.
            Err(error) => {
                refused += 1;
                assert!(error.to_string().contains("edge.redb"), "{error}");
                assert!(path.exists());
                continue;
            }
        };
        if let [bad] = &store.status().set_aside[..] {
            aside += 1;
            assert!(Path::new(bad).exists());
            assert_ne!(store.position(&name("a")).unwrap().incarnation, expected.positions[0].0, "a life of its own");
            put(&store, "a/1", b"goes on");
            continue;
        }
        match seen(&store) {
            // In what the last commit before a power cut wrote, a flip looks like a commit that was cut off. It is
            // undone as a whole (docs/limits.md); nothing older may be touched, and nothing after a clean end.
            Ok(seen) if round % 2 == 1 && seen == prior => undone += 1,
            Ok(seen) => {
                harmless += 1;
                assert_eq!(seen, expected, "flip at byte {at} of round {round} was not noticed");
            }
            Err(why) => {
                named += 1;
                assert!(!why.is_empty());
                put(&store, "b/1", b"the rest goes on");
            }
        }
    }
    println!(
        "{flips} flips: {harmless} harmless, {undone} undid the last commit, {aside} set aside, {named} named, {refused} refused"
    );
    assert!(aside > flips / 20, "few flips met anything");
}

#[test]
fn a_power_cut_while_the_database_is_compacted_loses_nothing() {
    let disk = Disk::default();
    let mut few = rules();
    few.iter_mut().for_each(|rule| rule.retention_bytes = Some(ByteSize(100_000)));
    let store = disk.store(&few);
    let payload = vec![9u8; 50_000];
    for n in 0..60u32 {
        put(&store, "a/1", &payload);
        put(&store, "b/1", &n.to_be_bytes());
    }
    store.set_safe(&name("a"), 55);
    while store.position(&name("a")).unwrap().first < 50 {
        put(&store, "b/1", b"x");
    }
    let expected = seen(&store).unwrap();
    drop(store);
    let (log, _) = crate::redb_log::RedbLog::open(disk.opener(), 1 << 20, open::mint).unwrap();
    let mut synced = {
        let mut state = disk.0.state.lock();
        state.record = Some(Vec::new());
        state.bytes.clone()
    };
    let before = synced.len();
    assert!(log.compact().unwrap());
    log.close();
    let ops = disk.0.state.lock().record.take().unwrap();
    let mut syncs = 0;
    for (at, op) in ops.iter().enumerate() {
        op.apply(&mut synced);
        if !matches!(op, Op::Sync) {
            continue;
        }
        syncs += 1;
        // Every other write until the next sync reached the disk.
        let mut torn = synced.clone();
        let until = ops[at + 1..].iter().position(|op| matches!(op, Op::Sync)).map_or(ops.len(), |next| at + 1 + next);
        ops[at + 1..until].iter().step_by(2).for_each(|op| op.apply(&mut torn));
        for image in [synced.clone(), torn] {
            let store = Disk::holding(image).store(&few);
            assert_eq!(seen(&store).unwrap(), expected, "after sync {syncs}");
        }
    }
    assert!(syncs >= 4 && synced.len() < before, "{syncs} syncs, {before} -> {} bytes", synced.len());
}
