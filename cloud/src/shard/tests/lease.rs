//! A shard that acknowledges only while its owner knows that it still is: under a clock of the test's own.

use std::sync::atomic::AtomicU64;

use super::*;
use crate::state::GroupChange;
use crate::wal::gated::GatedWal;

thread_local! {
    static SECS: AtomicU64 = const { AtomicU64::new(0) };
}

fn uptime() -> Duration {
    Duration::from_secs(SECS.with(|secs| secs.load(Ordering::Relaxed)))
}

fn at(secs: u64) {
    SECS.with(|now| now.store(secs, Ordering::Relaxed));
}

fn leased(shard: &Shard) -> Arc<Confirmation> {
    let confirmation = Arc::new(Confirmation::new(uptime));
    shard.acknowledge_while(confirmation.clone(), Duration::from_secs(10));
    confirmation
}

fn unconfirmed(secs: u64, stored: bool) -> AppendError {
    AppendError::Unconfirmed { secs, stored }
}

#[test]
fn without_a_confirmation_nothing_is_acknowledged_and_reads_go_on() {
    let (shard, _wal) = shard();
    append(&shard, batch(1, 1)).unwrap();
    at(100);
    let confirmation = leased(&shard);
    assert_eq!(append(&shard, batch(1, 1)), Err(unconfirmed(10, false)), "it never was");
    confirmation.confirm(uptime());
    append(&shard, batch(1, 1)).unwrap();
    at(110);
    append(&shard, batch(1, 1)).unwrap();
    assert_eq!(shard.holds_back(), None);
    at(111);
    assert_eq!(append(&shard, batch(1, 1)), Err(unconfirmed(11, false)));
    let group = GroupChange::Deleted { group: "g".into() }.into();
    assert_eq!(block_on(shard.commit(vec![group])), Err(unconfirmed(11, false)));
    let edge = from_edge(partition(1), &stream(1, 1), 0, 1);
    assert_eq!(block_on(shard.append(edge)), Err(unconfirmed(11, false)), "gateways are held");
    assert!(shard.holds_back().unwrap().contains("11 s"));
    assert_eq!(read_all(&*shard, partition(1), 0, 1 << 20).len(), 3, "consumers go on");
    // A confirmation counts from when it was asked for, and an older answer that comes late takes nothing back.
    confirmation.confirm(Duration::from_secs(105));
    confirmation.confirm(Duration::from_secs(90));
    append(&shard, batch(1, 1)).unwrap();
    assert_eq!(shard.status().holds_back, None);
}

#[test]
fn what_becomes_durable_too_late_is_stored_and_not_acknowledged() {
    at(100);
    let wal = GatedWal::new(WAL_BYTES);
    let shard = open(wal.clone());
    block_on(shard.commit(vec![Change::created(topic(1, 1))])).unwrap();
    let confirmation = leased(&shard);
    confirmation.confirm(uptime());
    let first = produced(&batch(1, 1), 7, 0, 0);
    wal.hang();
    let under_way = shard.append(from_producer(partition(1), first.clone()));
    at(120);
    wal.release();
    assert_eq!(block_on(under_way), Err(unconfirmed(20, true)));
    // Its producer sends it again, and it is known.
    confirmation.confirm(uptime());
    let again = append(&shard, first).unwrap();
    assert!(again.duplicate);
}
