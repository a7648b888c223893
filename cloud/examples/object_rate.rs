//! What the object engine does with a store that takes its time: how long a produce takes at low and high load, how much one
//! shard carries, and what it asks of the store, counted, with the price of that.
//!
//! The store is `InMemory` behind a wrapper that takes so many milliseconds for each PUT and GET. The shard is opened as a
//! node opens it, with its archive at work beside it: objects of blocks, segments and manifests all count.
//!
//! Producers come on time whether or not they were answered (an open loop), so that waiting is not left out.
//!
//! `cargo run --release -p tributary-cloud --example object_rate -- [SECONDS] [PUT_MS] [LINGER_MS]`

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use cloud::archive::{Archive, ArchiveSettings, ArchiveStatus, RequestSettings, Store};
use cloud::shard::{Shard, ShardSettings};
use cloud::state::{Change, StateLog as _, Topic};
use cloud::wal::object::ObjectWalSettings;
use futures_util::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMultipartOptions,
    PutOptions, PutPayload, PutResult, Result,
};
use shared::log::Log as _;
use shared::log::conformance::{from_producer, sized};
use shared::name::{Partition, TopicId, TopicName};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

const PARTITIONS: u32 = 16;
/// Dollars per million requests: Amazon S3 Standard, us-east-1. A LIST costs as a PUT, a DELETE nothing.
const PUT_PRICE: f64 = 5.0;
const GET_PRICE: f64 = 0.4;

/// Batches of so many bytes, so many per second.
const LOADS: [(&str, usize, u32); 4] = [
    ("10 batches of 1 KiB a second", 1 << 10, 10),
    ("1 MB/s in batches of 16 KiB", 16 << 10, 61),
    ("10 MB/s in batches of 64 KiB", 64 << 10, 153),
    ("40 MB/s in batches of 128 KiB", 128 << 10, 305),
];
/// What is never left waiting when the shard is to carry all it can.
const SATURATION: (usize, usize) = (128 << 10, 256);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let mut number = |or: u64| args.next().map_or(Ok(or), |text| text.parse::<u64>());
    let seconds = Duration::from_secs(number(20)?);
    let (latency, linger) = (Duration::from_millis(number(100)?), Duration::from_millis(number(100)?));
    println!("{latency:?} per request, linger {linger:?}, {seconds:?} per load");
    println!("| load | MB/s | p50, ms | p99, ms | PUTs/s | PUTs per GB | $ per TB |");
    println!("|---|---|---|---|---|---|---|");
    for (name, batch_bytes, per_second) in LOADS {
        let node = Node::start(latency, linger).await?;
        let pause = Duration::from_secs(1) / per_second;
        row(name, node, seconds, async |node, until| node.produce_on_time(batch_bytes, pause, until).await).await?;
    }
    let node = Node::start(latency, linger).await?;
    let (batch_bytes, in_flight) = SATURATION;
    row("all it carries", node, seconds, async |node, until| node.saturate(batch_bytes, in_flight, until).await).await
}

struct Produced {
    bytes: u64,
    waits: Vec<Duration>,
}

async fn row(
    name: &str,
    node: Node,
    seconds: Duration,
    produce: impl AsyncFnOnce(&Node, Instant) -> anyhow::Result<Produced>,
) -> anyhow::Result<()> {
    let (began, before) = (Instant::now(), node.archive.status());
    let Produced { bytes, mut waits } = produce(&node, began + seconds).await?;
    let elapsed = began.elapsed().as_secs_f64();
    // What is left becomes segments, and counts.
    let next = node.shard.status().next_seq;
    while node.archive.status().split_seq < next {
        node.archive.roll_now();
        sleep(Duration::from_millis(100)).await;
    }
    let after = node.archive.status();
    anyhow::ensure!(after.request_errors == 0, "no request fails here");
    waits.sort_unstable();
    let millis = |part: f64| waits[((waits.len() - 1) as f64 * part) as usize].as_secs_f64() * 1e3;
    let puts = (after.puts - before.puts + after.lists - before.lists) as f64;
    let gets = (after.gets - before.gets) as f64;
    let dollars = (puts * PUT_PRICE + gets * GET_PRICE) / 1e6 / (bytes as f64 / 1e12);
    println!(
        "| {name} | {:.1} | {:.0} | {:.0} | {:.1} | {:.0} | {dollars:.2} |",
        bytes as f64 / 1e6 / elapsed,
        millis(0.5),
        millis(0.99),
        puts / elapsed,
        puts / (bytes as f64 / 1e9),
    );
    let kinds = |s: &ArchiveStatus| [s.puts, s.gets, s.lists, s.deletes];
    eprintln!(
        "{name}: {} appends, blocks {}, PUT/GET/LIST/DELETE {:?} after {:?}, segments {}",
        waits.len(),
        node.shard.status().blocks,
        kinds(&after),
        kinds(&before),
        after.segments
    );
    Ok(())
}

/// A shard on the object engine and its archive, as a node runs them.
struct Node {
    shard: Arc<Shard>,
    archive: Arc<Archive>,
    _data_dir: tempfile::TempDir,
    _archiving: JoinSet<()>,
}

impl Node {
    async fn start(latency: Duration, linger: Duration) -> anyhow::Result<Self> {
        let data_dir = tempfile::tempdir()?;
        let requests = RequestSettings::default();
        let store = Store::new(Arc::new(Slow { inner: InMemory::new(), latency }), Path::default(), requests);
        let settings =
            ArchiveSettings { data_dir: data_dir.path().to_owned(), owns_wal: true, requests, ..Default::default() };
        let archive = Archive::with_stores(settings, store, None).await?;
        let recovered = archive.take_over().await?;
        let wal = archive.object_wal(&recovered, ObjectWalSettings::default());
        let settings = ShardSettings { archived: false, linger, ..ShardSettings::default() };
        let clock = Arc::new(|| 1_000);
        let shard = Shard::open(settings, Box::new(wal), recovered, Some(archive.cold()), clock)?;
        let (id, name) = (partition(0).topic, TopicName::parse("rate")?);
        let topic = Topic { id, name, partitions: PARTITIONS, configs: BTreeMap::new(), created_ms: 0 };
        shard.commit(vec![Change::created(topic)]).await?;
        let mut archiving = JoinSet::new();
        archiving.spawn(archive.clone().run(shard.clone(), std::future::pending()));
        Ok(Self { shard, archive, _data_dir: data_dir, _archiving: archiving })
    }

    async fn produce_on_time(&self, bytes: usize, pause: Duration, until: Instant) -> anyhow::Result<Produced> {
        let (mut produced, mut under_way) = (Produced { bytes: 0, waits: Vec::new() }, JoinSet::new());
        let (mut due, mut number) = (Instant::now(), 0);
        while due < until {
            tokio::time::sleep_until(due).await;
            let append = self.shard.append(from_producer(partition(number), sized(bytes)));
            let from = due;
            under_way.spawn(async move { append.await.map(|_| from.elapsed()) });
            produced.bytes += bytes as u64;
            (due, number) = (due + pause, number + 1);
        }
        while let Some(wait) = under_way.join_next().await {
            produced.waits.push(wait??);
        }
        Ok(produced)
    }

    async fn saturate(&self, bytes: usize, in_flight: usize, until: Instant) -> anyhow::Result<Produced> {
        let (mut produced, mut under_way) = (Produced { bytes: 0, waits: Vec::new() }, JoinSet::new());
        let batch = sized(bytes);
        let mut number = 0;
        let mut begin = |under_way: &mut JoinSet<_>| {
            let (append, from) = (self.shard.append(from_producer(partition(number), batch.clone())), Instant::now());
            number += 1;
            under_way.spawn(async move { append.await.map(|_| from.elapsed()) });
        };
        (0..in_flight).for_each(|_| begin(&mut under_way));
        while let Some(wait) = under_way.join_next().await {
            produced.waits.push(wait??);
            produced.bytes += batch.len() as u64;
            if Instant::now() < until {
                begin(&mut under_way);
            }
        }
        Ok(produced)
    }
}

fn partition(number: u32) -> Partition {
    Partition { topic: TopicId([1; 16]), index: number % PARTITIONS }
}

/// A store that takes its time.
#[derive(Debug)]
struct Slow {
    inner: InMemory,
    latency: Duration,
}

impl fmt::Display for Slow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a store of {:?} per request", self.latency)
    }
}

#[async_trait]
impl ObjectStore for Slow {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        sleep(self.latency).await;
        self.inner.put_opts(location, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        sleep(self.latency).await;
        self.inner.get_opts(location, options).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}
