//! Shard and archive together: the log's contract while the WAL is taken away underneath, and what a start finds.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use cloud::archive::{Archive, ArchiveSettings, RequestSettings, Store};
use cloud::shard::{LocalWal, Shard, ShardSettings};
use cloud::state::{Change, CommittedOffset, GroupChange, StateLog, Topic, read_state};
use cloud::wal::disk::Directory;
use cloud::wal::file::{FileWal, FileWalSettings};
use object_store::memory::InMemory;
use shared::log::conformance::{self, Engine, batch, block_on, from_edge, from_producer, read_all, stream};
use shared::log::{
    Append, AppendError, Appended, Bounds, BoxFuture, EpochEnd, Log, Read, ReadError, ReadLimits, TimePoint, TrimError,
};
use shared::name::{Offset, Partition, TimestampMs, TopicId, TopicName};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap())
}

fn topic(n: u8) -> Topic {
    let name = TopicName::parse(&format!("topic-{n}")).unwrap();
    Topic { id: TopicId([n; 16]), name, partitions: 1, configs: BTreeMap::new(), created_ms: 0 }
}

fn partition(n: u8) -> Partition {
    Partition { topic: TopicId([n; 16]), index: 0 }
}

/// A node's log: shard and archive.
struct Node {
    shard: Arc<Shard>,
    archive: Arc<Archive>,
    stop: Option<oneshot::Sender<()>>,
    task: Option<JoinHandle<()>>,
}

impl Node {
    /// Starts on `home`; `store` is the bucket, without one segments stay in `home`.
    fn start(home: &Path, store: Option<Arc<InMemory>>, segment_age: Duration) -> Self {
        let _context = runtime().enter();
        let requests = RequestSettings { backoff: Duration::from_millis(1), ..RequestSettings::default() };
        let settings = ArchiveSettings {
            data_dir: home.into(),
            max_lag: Duration::from_millis(4),
            segment_age,
            grace: Duration::from_millis(50),
            cache_bytes: 20_000,
            requests,
            ..ArchiveSettings::default()
        };
        let files = FileWalSettings {
            file_bytes: 256 << 10,
            hasty_file_bytes: 64 << 10,
            bytes_max: 64 << 20,
            background: false,
        };
        let wal = FileWal::open(Box::new(Directory::open(&home.join("wal")).unwrap()), files, 7).unwrap();
        let (archive, recovered) = runtime().block_on(async {
            let archive = match store {
                None => Archive::open(settings).await.unwrap(),
                Some(store) => {
                    let store = Store::new(store, "p".into(), requests);
                    let mirror = Store::directory(&home.join("manifest"), requests).unwrap();
                    Archive::with_stores(settings, store, Some(mirror)).await.unwrap()
                }
            };
            let recovered = archive.recover(&LocalWal(&wal)).await.unwrap();
            (archive, recovered)
        });
        // With a tail of nothing, what is in the WAL is read from it.
        let settings = ShardSettings { tail_bytes_max: 0, archived: archive.ships(), ..ShardSettings::default() };
        let clock = Arc::new(|| 1_000);
        let shard = Shard::open(settings, Box::new(wal), recovered, Some(archive.cold()), clock).unwrap();
        let (stop, stopped) = oneshot::channel();
        let run = archive.clone().run(shard.clone(), async {
            let _ = stopped.await;
        });
        Self { shard, archive, stop: Some(stop), task: Some(runtime().spawn(run)) }
    }

    fn commit(&self, changes: Vec<Change>) {
        block_on(self.shard.commit(changes)).unwrap();
    }

    /// Waits until what is durable now is in segments, and in the bucket if there is one.
    fn split(&self) {
        let next = self.shard.status().next_seq;
        for _ in 0..20_000 {
            let status = self.archive.status();
            if status.split_seq >= next && self.shard.status().shipped_seq >= next {
                return;
            }
            self.archive.roll_now();
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("not archived in time: {:?}", self.archive.status());
    }

    fn close(&mut self) {
        SEGMENTS.fetch_add(self.archive.status().segments, Ordering::Relaxed);
        drop(self.stop.take());
        if let Some(task) = self.task.take() {
            runtime().block_on(task).unwrap();
        }
        self.shard.close();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.close();
    }
}

/// Segments that were there when nodes ended.
static SEGMENTS: AtomicU64 = AtomicU64::new(0);

/// An engine whose WAL is taken away all the time.
struct Rolling {
    node: Option<Arc<Node>>,
    home: TempDir,
    store: Option<Arc<InMemory>>,
    topics: u8,
}

const ALWAYS: Duration = Duration::from_millis(5);
const NEVER: Duration = Duration::from_secs(3600);

impl Rolling {
    fn new(store: Option<Arc<InMemory>>) -> Self {
        let home = TempDir::new().unwrap();
        let node = Some(Arc::new(Node::start(home.path(), store.clone(), ALWAYS)));
        Self { node, home, store, topics: 0 }
    }
}

/// The node's log, with everything but the newest block moved to segments before each read.
struct Archived(Arc<Node>);

impl Archived {
    /// The suite polls futures on threads of its own; a store's requests need the runtime.
    fn after_split<T, F>(&self, read: impl FnOnce(Arc<Shard>) -> F + Send + 'static) -> BoxFuture<'static, T>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        self.0.split();
        let reading = runtime().spawn(read(self.0.shard.clone()));
        Box::pin(async { reading.await.unwrap() })
    }
}

impl Log for Archived {
    fn append(&self, append: Append) -> BoxFuture<'static, Result<Appended, AppendError>> {
        self.0.shard.append(append)
    }

    fn read(&self, partition: Partition, from: Offset, limits: ReadLimits) -> BoxFuture<'_, Result<Read, ReadError>> {
        self.after_split(move |shard| async move { shard.read(partition, from, limits).await })
    }

    fn bounds(&self, partition: Partition) -> Result<Bounds, ReadError> {
        self.0.shard.bounds(partition)
    }

    fn wait(&self, partition: Partition, beyond: Offset) -> BoxFuture<'static, Result<(), ReadError>> {
        self.0.shard.wait(partition, beyond)
    }

    fn trim(&self, partition: Partition, before: Offset) -> BoxFuture<'static, Result<Offset, TrimError>> {
        self.0.shard.trim(partition, before)
    }

    fn find_time(&self, partition: Partition, at: TimestampMs) -> BoxFuture<'_, Result<Option<TimePoint>, ReadError>> {
        self.after_split(move |shard| async move { shard.find_time(partition, at).await })
    }

    fn max_time(&self, partition: Partition) -> BoxFuture<'_, Result<Option<TimePoint>, ReadError>> {
        self.after_split(move |shard| async move { shard.max_time(partition).await })
    }

    fn epoch_end(&self, partition: Partition, epoch: i32) -> Result<Option<EpochEnd>, ReadError> {
        self.0.shard.epoch_end(partition, epoch)
    }
}

impl Engine for Rolling {
    fn log(&self) -> Arc<dyn Log> {
        Arc::new(Archived(self.node.clone().unwrap()))
    }

    fn create(&mut self) -> Partition {
        self.topics += 1;
        self.node.as_ref().unwrap().commit(vec![Change::created(topic(self.topics))]);
        partition(self.topics)
    }

    fn reopen(&mut self) -> bool {
        self.node = None;
        self.node = Some(Arc::new(Node::start(self.home.path(), self.store.clone(), ALWAYS)));
        true
    }
}

#[test]
fn the_contract_holds_while_everything_moves_to_the_bucket() {
    let _context = runtime().enter();
    conformance::run(&mut || Box::new(Rolling::new(Some(Arc::new(InMemory::new())))));
    assert!(SEGMENTS.load(Ordering::Relaxed) > 20, "it was the archive that was read, too");
}

#[test]
fn the_contract_holds_while_everything_moves_to_local_segments() {
    let _context = runtime().enter();
    conformance::run(&mut || Box::new(Rolling::new(None)));
}

#[test]
fn with_the_bucket_alone_everything_that_was_shipped_is_back_and_offsets_go_on_above() {
    let _context = runtime().enter();
    let (home, store) = (TempDir::new().unwrap(), Arc::new(InMemory::new()));
    let node = Node::start(home.path(), Some(store.clone()), NEVER);
    node.commit(vec![Change::created(topic(1)), Change::created(topic(2))]);
    let key = stream(1, 1);
    for n in 0..20 {
        block_on(node.shard.append(from_producer(partition(1), batch(3, n * 10)))).unwrap();
        block_on(node.shard.append(from_edge(partition(2), &key, n * 2, n * 2 + 1))).unwrap();
    }
    node.split();
    let committed = CommittedOffset { offset: 17, leader_epoch: 0, metadata: "m".into(), commit_ms: 5 };
    node.commit(vec![
        GroupChange::OffsetCommitted { group: "g".into(), partition: partition(1), committed: committed.clone() }
            .into(),
    ]);
    block_on(node.shard.append(from_edge(partition(2), &key, 40, 44))).unwrap();
    while node.shard.safe(&key) != Some(45) {
        block_on(node.shard.safety_changed());
    }
    let before = [1, 2].map(|n| read_all(&*node.shard, partition(n), 0, 500));
    let bounds = node.shard.bounds(partition(2)).unwrap();
    drop(node);

    let home = TempDir::new().unwrap();
    let mut node = Node::start(home.path(), Some(store.clone()), NEVER);
    for again in 0..2 {
        // The new epoch begins with a control batch, so that readers get over the hole before there are new records.
        let mut after = [1, 2].map(|n| read_all(&*node.shard, partition(n), 0, 500));
        let control = after.each_mut().map(|batches| batches.pop().unwrap());
        assert_eq!(after, before);
        assert!(control.iter().all(|batch| batch.is_control()));
        let restored = node.shard.bounds(partition(2)).unwrap();
        assert_eq!(restored.leader_epoch, bounds.leader_epoch + 2, "a new owner, and what may have been lost");
        assert_eq!(control[1].base_offset(), bounds.high_watermark + (1 << 32));
        assert_eq!(restored.high_watermark, control[1].last_offset() + 1);
        assert_eq!(
            read_state(&*node.shard, |state| state.committed("g", partition(1)).cloned()),
            Some(committed.clone())
        );
        assert_eq!(read_state(&*node.shard, |state| state.stream(&key).map(|stream| stream.next)), Some(45));
        if again == 0 {
            // An ordinary restart after it changes nothing of that.
            node.split();
            drop(node);
            node = Node::start(home.path(), Some(store.clone()), NEVER);
        }
    }
    let appended = block_on(node.shard.append(from_edge(partition(2), &key, 45, 46))).unwrap();
    assert_eq!(appended.base_offset, bounds.high_watermark + (1 << 32) + 1);
    node.split();
    let all = read_all(&*node.shard, partition(2), 0, 500);
    assert_eq!(all.len(), before[1].len() + 2);
    assert_eq!(all.last().unwrap().base_offset(), appended.base_offset);
    // A read in the hole finds what comes after it.
    let hole = read_all(&*node.shard, partition(2), bounds.high_watermark + 5, 500);
    assert_eq!(hole.len(), 2);
}
