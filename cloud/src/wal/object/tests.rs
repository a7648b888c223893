//! The object engine's promises: shards whose only disk is a store that fails on order, and owners that fight over one.

use std::collections::BTreeMap;

use futures_util::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode};
use shared::log::conformance::{self, Engine, batch, from_edge, from_producer, read_all, sized, stream};
use shared::log::{
    Append, AppendError, Appended, Bounds, EpochEnd, Log, Read, ReadError, ReadLimits, TimePoint, TrimError,
};
use shared::name::{Partition, TopicId, TopicName};
use tempfile::TempDir;
use tokio::runtime::{Handle, Runtime};
use tokio::task::JoinHandle;

use super::*;
use crate::archive::tests::faulty::Faulty;
use crate::archive::tests::s3::S3;
use crate::archive::{Archive, ArchiveError, ArchiveSettings, RequestSettings, Source};
use crate::block::{BlockBuilder, BlockHeader};
use crate::manifest::Root;
use crate::shard::{Shard, ShardSettings};
use crate::state::{Change, StateLog, Topic};

const WAL_BYTES: u64 = 2 << 20;

fn topic(n: u8) -> Topic {
    let name = TopicName::parse(&format!("topic-{n}")).unwrap();
    Topic { id: TopicId([n; 16]), name, partitions: 1, configs: BTreeMap::new(), created_ms: 0 }
}

fn partition(n: u8) -> Partition {
    Partition { topic: TopicId([n; 16]), index: 0 }
}

fn requests() -> RequestSettings {
    RequestSettings { timeout: Duration::from_secs(2), attempts: 3, ..RequestSettings::default() }
}

fn archive_settings(home: &TempDir) -> ArchiveSettings {
    ArchiveSettings {
        owns_wal: true,
        data_dir: home.path().to_owned(),
        segment_age: Duration::from_secs(3600),
        grace: Duration::ZERO,
        requests: requests(),
        ..ArchiveSettings::default()
    }
}

fn shard_settings() -> ShardSettings {
    ShardSettings {
        archived: false,
        tail_bytes_max: 0,
        nonce: crate::archive::tests::nonce(),
        ..ShardSettings::default()
    }
}

fn wal_settings() -> ObjectWalSettings {
    ObjectWalSettings { bytes_max: WAL_BYTES, ..ObjectWalSettings::default() }
}

// ---- the contract, over each kind of store ----

struct UnderTest {
    runtime: Arc<Runtime>,
    open_store: Box<dyn Fn() -> Store>,
    home: TempDir,
    shard: Option<Arc<Shard>>,
    topics: u8,
}

impl UnderTest {
    fn new(runtime: Arc<Runtime>, open_store: Box<dyn Fn() -> Store>) -> Self {
        let mut new = Self { runtime, open_store, home: TempDir::new().unwrap(), shard: None, topics: 0 };
        new.open();
        new
    }

    fn open(&mut self) {
        let (store, settings) = ((self.open_store)(), archive_settings(&self.home));
        let (archive, recovered) = self.runtime.block_on(async {
            let archive = Archive::with_stores(settings, store, None).await.unwrap();
            let recovered = archive.take_over().await.unwrap();
            (archive, recovered)
        });
        let wal = archive.object_wal(&recovered, wal_settings());
        let _entered = self.runtime.enter();
        let opened = Shard::open(shard_settings(), Box::new(wal), recovered, Some(archive.cold()), Arc::new(|| 1_000));
        self.shard = Some(opened.unwrap());
    }

    fn shard(&self) -> &Arc<Shard> {
        self.shard.as_ref().unwrap()
    }
}

impl Engine for UnderTest {
    fn log(&self) -> Arc<dyn Log> {
        Arc::new(OnRuntime { shard: self.shard().clone(), runtime: self.runtime.handle().clone() })
    }

    fn create(&mut self) -> Partition {
        self.topics += 1;
        self.runtime.block_on(self.shard().commit(vec![Change::created(topic(self.topics))])).unwrap();
        partition(self.topics)
    }

    fn reopen(&mut self) -> bool {
        self.shard.take().unwrap().close();
        self.open();
        true
    }

    fn bytes_until_full(&self) -> Option<usize> {
        Some(WAL_BYTES as usize)
    }

    fn make_room(&mut self) {
        let next = self.shard().durable().next_seq;
        self.shard().published(next);
    }
}

/// The suite drives futures on threads of its own, and requests to a store need the runtime's timers.
struct OnRuntime {
    shard: Arc<Shard>,
    runtime: Handle,
}

impl OnRuntime {
    fn spawn<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, ReadError>> + Send + 'static,
    ) -> BoxFuture<'static, Result<T, ReadError>> {
        let spawned = self.runtime.spawn(work);
        Box::pin(async move { spawned.await.unwrap() })
    }
}

impl Log for OnRuntime {
    fn append(&self, append: Append) -> BoxFuture<'static, Result<Appended, AppendError>> {
        self.shard.append(append)
    }
    fn read(&self, partition: Partition, from: i64, limits: ReadLimits) -> BoxFuture<'_, Result<Read, ReadError>> {
        let shard = self.shard.clone();
        self.spawn(async move { shard.read(partition, from, limits).await })
    }
    fn bounds(&self, partition: Partition) -> Result<Bounds, ReadError> {
        self.shard.bounds(partition)
    }
    fn wait(&self, partition: Partition, beyond: i64) -> BoxFuture<'static, Result<(), ReadError>> {
        Log::wait(&*self.shard, partition, beyond)
    }
    fn trim(&self, partition: Partition, before: i64) -> BoxFuture<'static, Result<i64, TrimError>> {
        Log::trim(&*self.shard, partition, before)
    }
    fn find_time(&self, partition: Partition, at: i64) -> BoxFuture<'_, Result<Option<TimePoint>, ReadError>> {
        let shard = self.shard.clone();
        self.spawn(async move { shard.find_time(partition, at).await })
    }
    fn max_time(&self, partition: Partition) -> BoxFuture<'_, Result<Option<TimePoint>, ReadError>> {
        let shard = self.shard.clone();
        self.spawn(async move { shard.max_time(partition).await })
    }
    fn epoch_end(&self, partition: Partition, epoch: i32) -> Result<Option<EpochEnd>, ReadError> {
        self.shard.epoch_end(partition, epoch)
    }
}

fn runtime() -> Arc<Runtime> {
    Arc::new(tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap())
}

fn keeps_the_contract(mut make: impl FnMut(&Runtime) -> Box<dyn Fn() -> Store>) {
    let runtime = runtime();
    conformance::run(&mut || {
        let open = make(&runtime);
        Box::new(UnderTest::new(runtime.clone(), open))
    });
}

#[test]
fn the_object_engine_keeps_the_contract_in_memory() {
    keeps_the_contract(|_| {
        let store = Faulty::new();
        Box::new(move || Store::new(Arc::new(store.clone()), Path::default(), requests()))
    });
}

#[test]
fn the_object_engine_keeps_the_contract_in_a_directory() {
    keeps_the_contract(|_| {
        let directory = Arc::new(TempDir::new().unwrap());
        Box::new(move || Store::directory(directory.path(), requests()).unwrap())
    });
}

#[test]
fn the_object_engine_keeps_the_contract_on_an_s3_server() {
    daemon::tls::install_provider();
    keeps_the_contract(|runtime| {
        let options = runtime.block_on(S3 { page: 1000, ..S3::default() }.serve());
        Box::new(move || Store::open("s3://bucket/prefix", &options, requests()).unwrap())
    });
}

/// What the fence stands on: of 32 who make one name at a time, one does, and everybody can tell who.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_who_make_one_block_one_does() {
    daemon::tls::install_provider();
    let directory = TempDir::new().unwrap();
    let options = S3::default().serve().await;
    let stores = [
        Store::new(Arc::new(Faulty::new()), Path::default(), requests()),
        Store::directory(directory.path(), requests()).unwrap(),
        Store::open("s3://bucket/prefix", &options, requests()).unwrap(),
    ];
    for store in stores.map(Arc::new) {
        for round in 0..20u64 {
            let key = Keys::new(store.prefix().clone(), 0).wal(round);
            let makers = (0..32u8).map(|n| {
                let (store, key) = (store.clone(), key.clone());
                tokio::spawn(async move { (n, store.create(&key, &[Bytes::from(vec![n; 100])]).await) })
            });
            let mut winner = None;
            for made in futures_util::future::join_all(makers).await {
                match made.unwrap() {
                    (n, Ok(())) => assert_eq!(winner.replace(n), None, "{}", store.describe()),
                    (_, Err(error)) => assert_eq!(error, StoreError::Taken(key.clone())),
                }
            }
            assert_eq!(store.get(&key, 100).await.unwrap()[0], winner.expect("one made it"));
        }
    }
}

// ---- owners ----

/// A node that owns the shard, as long as nobody takes it away.
struct Owner {
    archive: Arc<Archive>,
    shard: Arc<Shard>,
    tasks: Vec<JoinHandle<()>>,
    _home: TempDir,
}

impl Owner {
    async fn try_start(store: &Faulty, settings: ShardSettings) -> Result<Self, ArchiveError> {
        let home = TempDir::new().unwrap();
        let archive = Archive::with_stores(
            archive_settings(&home),
            Store::new(Arc::new(store.clone()), Path::default(), requests()),
            None,
        )
        .await?;
        let recovered = archive.take_over().await?;
        let wal = archive.object_wal(&recovered, wal_settings());
        let clock = Arc::new(|| 1_000);
        let opened = Shard::open_driven(settings, Box::new(wal), recovered, Some(archive.cold()), clock);
        let (shard, commit) = opened.unwrap();
        let run = archive.clone().run(shard.clone(), std::future::pending());
        Ok(Self { archive, shard, tasks: vec![tokio::spawn(commit), tokio::spawn(run)], _home: home })
    }

    async fn start(store: &Faulty) -> Self {
        let owner = Self::try_start(store, shard_settings()).await.unwrap();
        owner.shard.commit(vec![Change::created(topic(1))]).await.unwrap();
        owner
    }

    async fn append(&self, records: i32) -> Result<Appended, AppendError> {
        self.shard.append(from_producer(partition(1), batch(records, 1))).await
    }

    /// Segments are made of what there is, and the WAL objects below are collected.
    async fn split(&self) {
        let before = self.archive.status().split_seq;
        self.archive.roll_now();
        while self.archive.status().split_seq == before {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        // The collection follows at a later tick.
        tokio::time::sleep(Duration::from_secs(5)).await;
    }

    async fn records(&self) -> i64 {
        let (mut from, bounds) = (0, self.shard.bounds(partition(1)).unwrap());
        while from < bounds.high_watermark {
            let read = self.shard.read(partition(1), from, ReadLimits { bytes_max: 1 << 20 }).await.unwrap();
            assert!(read.next > from);
            from = read.next;
        }
        from
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

async fn wal_objects(store: &Faulty) -> Vec<u64> {
    let all: Vec<_> = store.inner.list(Some(&Path::from("shards/0/wal"))).try_collect().await.unwrap();
    let mut seqs: Vec<u64> = all.iter().filter_map(|object| crate::manifest::sequence_of(&object.location)).collect();
    seqs.sort_unstable();
    seqs
}

#[tokio::test(start_paused = true)]
async fn a_node_with_nothing_local_goes_on_where_the_last_one_was() {
    let store = Faulty::new();
    let first = Owner::start(&store).await;
    assert_eq!(first.append(5).await.unwrap().base_offset, 0);
    first.split().await;
    assert_eq!(first.append(2).await.unwrap().base_offset, 5);
    drop(first);
    let second = Owner::start(&store).await;
    assert_eq!(second.records().await, 7);
    assert_eq!(second.append(1).await.unwrap().base_offset, 7, "nothing was lost, so nothing is left out");
    assert_eq!(second.shard.bounds(partition(1)).unwrap().leader_epoch, 2, "clients see that it moved");
    let ends = [1, 2].map(|epoch| second.shard.epoch_end(partition(1), epoch).unwrap().unwrap().end);
    assert_eq!(ends, [7, 8], "what the first owner wrote is of its epoch");
    let key = stream(1, 1);
    second.shard.append(from_edge(partition(1), &key, 0, 3)).await.unwrap();
    assert_eq!(second.shard.safe(&key), Some(4), "what is durable is in the bucket");
}

/// Settings that say another engine must not cost the node that works its shard.
#[tokio::test(start_paused = true)]
async fn a_shard_of_another_engine_is_refused_before_it_is_claimed() {
    let store = Faulty::new();
    let owner = Owner::start(&store).await;
    let home = TempDir::new().unwrap();
    let settings = ArchiveSettings { owns_wal: false, ..archive_settings(&home) };
    let bucket = Store::new(Arc::new(store.other()), Path::default(), requests());
    let mirror = Store::directory(&home.path().join("manifest"), requests()).unwrap();
    let refused = Archive::with_stores(settings, bucket, Some(mirror)).await.unwrap_err();
    assert!(refused.to_string().contains("written by the engine object"), "{refused}");
    assert_eq!(owner.append(1).await.unwrap().base_offset, 0);
}

#[tokio::test(start_paused = true)]
async fn a_deposed_owner_acknowledges_nothing_more() {
    let store = Faulty::new();
    let old = Owner::start(&store).await;
    old.append(3).await.unwrap();
    let new = Owner::start(&store.other()).await;
    let answer = old.append(1).await;
    assert!(matches!(answer, Err(AppendError::Fenced(epoch)) if epoch == new.shard.status().epoch), "{answer:?}");
    assert!(old.append(1).await.is_err());
    assert_eq!(new.append(1).await.unwrap().base_offset, 3);
    assert_eq!(new.records().await, 4);
}

#[tokio::test(start_paused = true)]
async fn a_deposed_owner_that_nobody_writes_to_learns_of_it() {
    let store = Faulty::new();
    let old = Owner::start(&store).await;
    old.append(3).await.unwrap();
    let new = Owner::start(&store.other()).await;
    assert_eq!(old.shard.status().stopped, None, "nothing has told it yet");
    tokio::time::sleep(Duration::from_secs(15)).await;
    assert!(old.shard.status().stopped.is_some());
    assert_eq!(new.shard.status().stopped, None);
    assert_eq!(new.append(1).await.unwrap().base_offset, 3);
}

#[tokio::test(start_paused = true)]
async fn a_block_under_way_at_a_take_over_is_in_the_log_or_refused_never_both() {
    for lands_first in [true, false] {
        let store = Faulty::new();
        let old = Owner::start(&store).await;
        old.append(3).await.unwrap();
        // The old owner's PUT is under way, and its node goes quiet.
        store.plan.lock().down = true;
        let mut under_way = old.shard.append(from_producer(partition(1), batch(2, 1)));
        assert!(conformance::poll_once(&mut under_way).is_none());
        tokio::time::sleep(Duration::from_secs(1)).await;
        if lands_first {
            store.plan.lock().down = false;
            assert_eq!(under_way.await.unwrap().base_offset, 3);
            let new = Owner::start(&store.other()).await;
            assert_eq!(new.records().await, 5);
        } else {
            let new = Owner::start(&store.other()).await;
            store.plan.lock().down = false;
            assert!(matches!(under_way.await, Err(AppendError::Fenced(_))));
            assert_eq!(new.records().await, 3);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_owner_that_slept_through_the_collection_collides_all_the_same() {
    let store = Faulty::new();
    let old = Owner::start(&store).await;
    (0..3).for_each(|_| drop(old.shard.append(from_producer(partition(1), batch(1, 1)))));
    old.append(1).await.unwrap();
    old.split().await;
    let new = Owner::start(&store.other()).await;
    let fence = *wal_objects(&store).await.last().unwrap();
    for _ in 0..5 {
        new.append(1).await.unwrap();
    }
    new.split().await;
    new.append(1).await.unwrap();
    new.split().await;
    let left = wal_objects(&store).await;
    assert!(left.contains(&fence) || left.iter().any(|seq| *seq < fence), "fences are kept: {left:?}");
    assert!(left.len() < 8, "the rest is collected: {left:?}");
    assert!(matches!(old.append(1).await, Err(AppendError::Fenced(_))));
    assert_eq!(new.records().await, 10);
}

#[tokio::test(start_paused = true)]
async fn of_nodes_that_start_together_one_serves_and_the_others_stop() {
    let store = Faulty::new();
    drop(Owner::start(&store).await);
    let starts = (0..4).map(|_| {
        let store = store.other();
        async move { Owner::try_start(&store, shard_settings()).await }
    });
    let owners: Vec<_> = futures_util::future::join_all(starts).await.into_iter().filter_map(Result::ok).collect();
    let mut served = 0;
    for owner in &owners {
        served += usize::from(owner.append(1).await.is_ok());
    }
    assert_eq!(served, 1, "of {}", owners.len());
}

#[tokio::test(start_paused = true)]
async fn a_put_of_unknown_outcome_is_one_block() {
    let store = Faulty::new();
    let owner = Owner::start(&store).await;
    for seed in 0..40 {
        {
            let mut plan = store.plan.lock();
            (plan.one_in, plan.seed) = (Some(2), seed);
        }
        let appended = owner.append(1).await.unwrap();
        assert_eq!(appended.base_offset, seed as i64);
    }
    store.plan.lock().one_in = None;
    assert!(owner.archive.status().request_errors > 10);
    assert_eq!(owner.records().await, 40);
    drop(owner);
    assert_eq!(Owner::start(&store).await.records().await, 40);
}

/// The bytes of somebody else in our place, without a fence: the nonce in the block tells them from our own.
#[tokio::test(start_paused = true)]
async fn another_writers_block_is_not_taken_for_our_own() {
    let store = Faulty::new();
    let owner = Owner::start(&store).await;
    let seq = owner.shard.durable().next_seq;
    let header = BlockHeader { shard: 0, epoch: 77, nonce: 1, seq, append_ms: 1 };
    let block = BlockBuilder::default().finish(header).bytes().clone();
    let key = Keys::new(Path::default(), 0).wal(seq);
    store.inner.put_opts(&key, block.into(), PutMode::Create.into()).await.unwrap();
    assert_eq!(owner.append(1).await, Err(AppendError::Fenced(77)));
}

#[tokio::test(start_paused = true)]
async fn while_the_store_is_away_producers_wait_and_nothing_is_lost() {
    let store = Faulty::new();
    let owner = Owner::start(&store).await;
    store.plan.lock().down = true;
    let mut waiting = owner.shard.append(from_producer(partition(1), batch(1, 1)));
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert!(conformance::poll_once(&mut waiting).is_none(), "not acknowledged, not given up");
    let large = |_| owner.shard.append(from_producer(partition(1), sized(500_000)));
    let mut many: Vec<_> = (0..6).map(large).collect();
    let refused = many.iter_mut().filter_map(conformance::poll_once).filter(Result::is_err).count() as i64;
    assert!(refused >= 2, "what waits is bounded by the room there is");
    store.plan.lock().down = false;
    assert_eq!(waiting.await.unwrap().base_offset, 0);
    assert_eq!(owner.append(1).await.unwrap().base_offset, 1 + 6 - refused);
}

#[tokio::test(start_paused = true)]
async fn a_stop_does_not_wait_for_ever_for_a_store_that_is_away() {
    let store = Faulty::new();
    let mut owner = Owner::start(&store).await;
    store.plan.lock().down = true;
    let waiting = owner.shard.append(from_producer(partition(1), batch(1, 1)));
    tokio::time::sleep(Duration::from_secs(1)).await;
    owner.shard.begin_close();
    let committer = owner.tasks.remove(0);
    tokio::time::timeout(Duration::from_secs(6), committer).await.expect("in time").unwrap();
    assert!(waiting.await.is_err());
}

#[tokio::test(start_paused = true)]
async fn appends_are_paced_but_for_the_first_after_a_pause() {
    let store = Faulty::new();
    let settings = ShardSettings { linger: Duration::from_millis(100), ..shard_settings() };
    let owner = Owner::try_start(&store, settings).await.unwrap();
    owner.shard.commit(vec![Change::created(topic(1))]).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let puts = || owner.archive.status().puts;
    let (before, began) = (puts(), tokio::time::Instant::now());
    owner.append(1).await.unwrap();
    assert_eq!(began.elapsed(), Duration::ZERO, "after a pause the first goes at once");
    for _ in 0..100 {
        (0..10).for_each(|_| drop(owner.shard.append(from_producer(partition(1), batch(1, 1)))));
        tokio::time::sleep(Duration::from_millis(9)).await;
    }
    owner.append(1).await.unwrap();
    let (made, seconds) = (puts() - before, began.elapsed().as_secs_f64());
    assert_eq!(owner.records().await, 1002);
    assert!(made as f64 <= seconds * 10.0 + 2.0, "{made} PUTs in {seconds} s");
}

#[test]
fn every_bit_of_a_block_counts() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let store = Faulty::new();
    let (key, seq) = runtime.block_on(async {
        let owner = Owner::start(&store).await;
        owner.append(2).await.unwrap();
        let seq = owner.shard.durable().next_seq - 1;
        (Keys::new(Path::default(), 0).wal(seq), seq)
    });
    let whole = runtime.block_on(async { store.inner.get(&key).await.unwrap().bytes().await.unwrap() });
    for bit in (0..whole.len() * 8).step_by(7) {
        let mut bytes = whole.to_vec();
        bytes[bit / 8] ^= 1 << (bit % 8);
        runtime.block_on(async {
            store.inner.put_opts(&key, bytes.into(), PutMode::Overwrite.into()).await.unwrap();
            let started = Owner::try_start(&store.other(), shard_settings()).await;
            let Err(ArchiveError::Damaged { key: named, .. }) = started.map(drop) else {
                panic!("bit {bit} of block {seq} was not missed")
            };
            assert_eq!(named, key.to_string());
        });
    }
}

#[test]
fn reads_come_back_whole_whatever_the_limit() {
    let (runtime, store) = (runtime(), Faulty::new());
    let under_test = UnderTest::new(
        runtime.clone(),
        Box::new(move || Store::new(Arc::new(store.clone()), Path::default(), requests())),
    );
    let (log, shard) = (under_test.log(), under_test.shard());
    runtime.block_on(shard.commit(vec![Change::created(topic(1))])).unwrap();
    for records in 1..20 {
        runtime.block_on(shard.append(from_producer(partition(1), batch(records, 1)))).unwrap();
    }
    for bytes_max in [1, 300, 1 << 20] {
        assert_eq!(read_all(&*log, partition(1), 0, bytes_max).len(), 19);
    }
}

/// As long as the claim takes, the owner writes on: each block of it is read once, and many at a time.
#[tokio::test(start_paused = true)]
async fn a_take_over_reads_each_block_once_however_often_the_owner_is_quicker() {
    let store = Faulty::new();
    let old = Arc::new(Owner::start(&store).await);
    for _ in 0..300 {
        old.append(1).await.unwrap();
    }
    let busy = old.clone();
    let writing = tokio::spawn(async move {
        let mut written = 0;
        while busy.append(1).await.is_ok() {
            written += 1;
            tokio::time::sleep(Duration::from_millis(60)).await;
        }
        written
    });
    let seen = store.other();
    seen.plan.lock().latency = Duration::from_millis(100);
    let begun = Instant::now();
    let new = Owner::start(&seen).await;
    let taken = begun.elapsed();
    let written: i64 = writing.await.unwrap();
    assert_eq!(new.shard.bounds(partition(1)).unwrap().high_watermark, 300 + written, "all that was acknowledged");
    let asked = seen.asked();
    let blocks = usize::try_from(new.shard.durable().next_seq).unwrap();
    // Each attempt looks at the root and the newest block, and a start at what tells whose the store is.
    assert!(asked.wholes <= blocks + 3 * asked.lists + 8, "{asked:?} for {blocks} blocks");
    assert!(taken < Duration::from_secs(20), "{taken:?} for {blocks} blocks at 100 ms each");
}

#[tokio::test(start_paused = true)]
async fn what_stops_a_take_over_is_named() {
    let store = Faulty::new();
    let owner = Owner::start(&store).await;
    (0..40).for_each(|_| drop(owner.shard.append(from_producer(partition(1), batch(1, 1)))));
    owner.append(1).await.unwrap();
    let gone = Keys::new(Path::default(), 0).wal(1);
    store.inner.delete(&gone).await.unwrap();
    let refused = Owner::try_start(&store, shard_settings()).await.err().expect("a block is missing").to_string();
    assert!(refused.contains(gone.as_ref()), "{refused}");
    tokio::time::sleep(Duration::from_secs(60)).await;
    owner.append(1).await.expect("whoever has the shard keeps it");

    let (store, keys) = (Faulty::new(), Keys::new(Path::default(), 0));
    drop(Owner::start(&store).await);
    let claimed = store.inner.get(&keys.root(1)).await.unwrap().bytes().await.unwrap();
    let last = Root { epoch: u32::MAX, seq: 2, ..Root::decode(&claimed).unwrap() };
    store.inner.put(&keys.root(2), last.encode().into()).await.unwrap();
    let refused = Owner::try_start(&store, shard_settings()).await.err().expect("no epoch comes after").to_string();
    assert!(refused.contains(keys.root(2).as_ref()) && refused.contains("greater"), "{refused}");
}

#[tokio::test(start_paused = true)]
async fn a_bucket_that_is_gone_is_named_and_no_disk_is_blamed() {
    let store = Faulty::new();
    let owner = Owner::start(&store).await;
    store.plan.lock().bucketless = true;
    let Err(AppendError::Storage(text)) = owner.append(1).await else { panic!("there is no bucket") };
    assert!(text.contains("faulty store") && text.contains("bucket") && !text.contains("disk"), "{text}");
}

#[tokio::test(start_paused = true)]
async fn a_node_with_object_shards_is_not_told_to_do_without_the_archive() {
    let store = Faulty::new();
    store.plan.lock().down = true;
    let refused = Owner::try_start(&store, shard_settings()).await.err().expect("the store is away").to_string();
    assert!(refused.contains("object shards") && !refused.contains("off"), "{refused}");
}
