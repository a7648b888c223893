//! The link end to end in one process: uplink, a wire that is cut, ingest, shard. Real sockets; the edge's store is a
//! double that can be copied and looked into, and the real one where that is the point.

use std::collections::BTreeMap;
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use cloud::archive::Recovered;
use cloud::catalogue::{Catalogue, CatalogueSettings};
use cloud::ingest::{EdgeGrant, Grants, Ingest, IngestSettings};
use cloud::shard::{Shard, ShardSettings};
use cloud::wal::memory::MemoryWal;
use edge::store::{EdgeStore, StoreSettings};
use edge::streams::{OnFull, StreamSettings};
use edge::uplink::{StreamSource, Uplink, UplinkSettings, UplinkStatus};
use mqtt::store::{Admission, Publish, PublishProperties, SessionRef, Store};
use parking_lot::Mutex;
use shared::batch::{Batch, BatchBuilder, Compression};
use shared::config::{Secret, TlsFiles};
use shared::link::frame::Limits;
use shared::link::sender::{Row, Rows, StreamInfo};
use shared::log::{BoxFuture, Chain, Log as _, ReadLimits};
use shared::name::{EdgeId, Incarnation, Offset, Partition, StreamName, TopicName};
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};

/// An edge's streams in memory.
#[derive(Default)]
struct MemoryStreams {
    streams: Mutex<BTreeMap<StreamName, Stream>>,
    more: Arc<Notify>,
    lives: AtomicU64,
}

#[derive(Clone, Default)]
struct Stream {
    incarnation: u8,
    rows: Vec<Row>,
    next: Offset,
    confirmed: Offset,
    safe: Offset,
    renewed_at: Offset,
    parked: Option<String>,
}

impl MemoryStreams {
    fn new(names: &[&str]) -> Arc<Self> {
        let streams = Self::default();
        for name in names {
            streams.streams.lock().insert(stream(name), Stream { incarnation: 1, ..Stream::default() });
        }
        Arc::new(streams)
    }

    /// The same disk, copied.
    fn copy(&self) -> Arc<Self> {
        let streams = Mutex::new(self.streams.lock().clone());
        Arc::new(Self { streams, lives: AtomicU64::new(100), ..Self::default() })
    }

    fn push(&self, name: &str, values: &[String]) {
        let mut streams = self.streams.lock();
        let stream = streams.get_mut(&stream(name)).expect("a stream");
        let mut builder = BatchBuilder::default();
        for value in values {
            builder.push(1_700_000_000_000, Some(b"key"), Some(value.as_bytes()), &[]);
        }
        let batch = builder.finish(stream.next, Compression::None);
        stream.next += values.len() as Offset;
        let before = stream.rows.last().map_or(0, |row| row.chain.0);
        let chain = Chain((before ^ u64::from(batch.crc())).wrapping_mul(0x100_0000_01b3));
        stream.rows.push(Row { batch, chain });
        drop(streams);
        self.more.notify_waiters();
    }

    fn read<T>(&self, name: &str, read: impl FnOnce(&Stream) -> T) -> T {
        read(&self.streams.lock()[&stream(name)])
    }
}

impl Rows for MemoryStreams {
    fn streams(&self) -> Vec<StreamInfo> {
        let info = |(name, stream): (&StreamName, &Stream)| StreamInfo {
            name: name.clone(),
            topic: TopicName::parse(name.as_str()).expect("a name"),
            incarnation: Incarnation([stream.incarnation; 16]),
            first: 0,
            next: stream.next,
            confirmed: stream.confirmed,
            safe: stream.safe,
            renewed_at: stream.renewed_at,
            dropped: None,
        };
        self.streams.lock().iter().map(info).collect()
    }

    fn read(&self, stream: &StreamName, from: Offset, bytes_max: usize) -> Result<Vec<Row>, String> {
        let streams = self.streams.lock();
        let rows = &streams.get(stream).ok_or("no such stream")?.rows;
        let begin = rows.partition_point(|row| row.batch.last_offset() < from);
        let mut left = bytes_max;
        let mut out = Vec::new();
        for row in &rows[begin..] {
            if !out.is_empty() && row.batch.len() > left {
                break;
            }
            left = left.saturating_sub(row.batch.len());
            out.push(row.clone());
        }
        Ok(out)
    }

    fn chain_at(&self, stream: &StreamName, next: Offset) -> Option<Chain> {
        let streams = self.streams.lock();
        let mut rows = streams.get(stream)?.rows.iter();
        rows.find(|row| row.batch.last_offset() + 1 == next).map(|row| row.chain)
    }
}

impl StreamSource for MemoryStreams {
    fn set_confirmed(&self, stream: &StreamName, next: Offset) {
        if let Some(stream) = self.streams.lock().get_mut(stream) {
            assert!(next <= stream.next);
            stream.confirmed = stream.confirmed.max(next);
        }
    }

    fn set_safe(&self, stream: &StreamName, next: Offset) {
        if let Some(stream) = self.streams.lock().get_mut(stream) {
            assert!(next <= stream.next);
            stream.safe = stream.safe.max(next);
        }
    }

    fn renew_incarnation(&self, stream: &StreamName) -> BoxFuture<'static, Result<Incarnation, String>> {
        let life = self.lives.fetch_add(1, Ordering::Relaxed) as u8 + 10;
        if let Some(stream) = self.streams.lock().get_mut(stream) {
            (stream.incarnation, stream.confirmed, stream.renewed_at) = (life, stream.safe, stream.safe);
        }
        Box::pin(std::future::ready(Ok(Incarnation([life; 16]))))
    }

    fn park(&self, stream: &StreamName, reason: Option<String>) {
        if let Some(stream) = self.streams.lock().get_mut(stream) {
            stream.parked = reason;
        }
    }

    fn gap_declared(&self, _: &StreamName, _: Offset) {}

    fn wait(&self, stream: &StreamName, beyond: Offset) -> BoxFuture<'static, ()> {
        let more = self.more.clone();
        let there = self.streams.lock().get(stream).is_some_and(|stream| stream.next > beyond);
        // Created under no lock, but `notify_waiters` reaches it from here on.
        let notified = more.notified_owned();
        let there = there || self.streams.lock().get(stream).is_some_and(|stream| stream.next > beyond);
        Box::pin(async move {
            if !there {
                notified.await;
            }
        })
    }

    fn learn_limits(&self, limits: Limits) {
        assert!(limits.batch_bytes_max > 0);
    }
}

fn stream(name: &str) -> StreamName {
    StreamName::parse(name).expect("a name")
}

/// The cloud: a shard whose WAL is in memory, ingest, listener.
struct Cloud {
    shard: Arc<Shard>,
    topics: Arc<Catalogue>,
    ingest: Arc<Ingest>,
    address: std::net::SocketAddr,
    stop: watch::Sender<bool>,
}

impl Cloud {
    async fn start(settings: IngestSettings, tls: bool) -> Self {
        let unarchived = ShardSettings { archived: false, ..ShardSettings::default() };
        let wal = Box::new(MemoryWal::new(256 << 20));
        let shard = Shard::open(unarchived, wal, Recovered::default(), None, Arc::new(|| 7)).expect("a shard");
        Self::on(shard, settings, tls).await
    }

    async fn on(shard: Arc<Shard>, settings: IngestSettings, tls: bool) -> Self {
        daemon::tls::install_provider();
        let topics = Arc::new(Catalogue::new(shard.clone(), CatalogueSettings::default()));
        let ingest = Ingest::new(settings, shard.clone(), shard.clone(), topics.clone(), shard.clone(), || 7);
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let files = TlsFiles { cert_file: data("cert.pem"), key_file: data("key.pem") };
        let tls = tls.then(|| daemon::tls::ServerCertificate::read(&files).expect("a certificate").config());
        let (stop, stopped) = watch::channel(false);
        tokio::spawn(cloud::ingest::serve(ingest.clone(), listener, tls, stopped));
        Self { shard, topics, ingest, address, stop }
    }

    /// Every value of a topic, partition by partition, in order.
    async fn values(&self, topic: &str) -> Vec<String> {
        let Some(topic) = self.topics.topic(topic) else { return Vec::new() };
        let mut out = Vec::new();
        for index in 0..topic.partitions {
            let partition = Partition { topic: topic.id, index };
            let mut from = 0;
            loop {
                let read = self.shard.read(partition, from, ReadLimits { bytes_max: 1 << 20 }).await.expect("readable");
                if read.batches.is_empty() {
                    break;
                }
                from = read.next;
                for mut bytes in read.batches {
                    while let Some(batch) = Batch::split_first(&mut bytes).expect("whole batches") {
                        let records = batch.records(1 << 24).expect("records");
                        let text = |value: Bytes| String::from_utf8(value.to_vec()).expect("text");
                        out.extend(records.map(|record| text(record.expect("a record").value.expect("a value"))));
                    }
                }
            }
        }
        out
    }
}

fn data(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/link-tls").join(name)
}

/// Forwards connections to a cloud, and cuts each after a number of bytes while `rough`.
struct Wire {
    address: std::net::SocketAddr,
    rough: Arc<AtomicBool>,
    cuts: Arc<AtomicU64>,
}

impl Wire {
    async fn start(to: std::net::SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let (rough, cuts) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (is_rough, counted) = (rough.clone(), cuts.clone());
        tokio::spawn(async move {
            let mut seed = 12_345u64;
            while let Ok((near, _)) = listener.accept().await {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let budgets = [2000 + (seed >> 33) % 60_000, 100 + (seed >> 45) % 3000];
                let (is_rough, counted) = (is_rough.clone(), counted.clone());
                tokio::spawn(async move {
                    let Ok(far) = TcpStream::connect(to).await else { return };
                    let ((near_read, near_write), (far_read, far_write)) = (near.into_split(), far.into_split());
                    // Whichever direction ends first takes the other with it, in the middle of whatever it carries.
                    let cut = tokio::select! {
                        cut = carry(near_read, far_write, budgets[0], &is_rough) => cut,
                        cut = carry(far_read, near_write, budgets[1], &is_rough) => cut,
                    };
                    counted.fetch_add(u64::from(cut), Ordering::Relaxed);
                });
            }
        });
        Self { address, rough, cuts }
    }
}

async fn carry(
    from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut budget: u64,
    is_rough: &AtomicBool,
) -> bool {
    let mut buffer = [0; 1500];
    while from.readable().await.is_ok() {
        match from.try_read(&mut buffer) {
            Ok(0) => return false,
            Ok(read) => {
                if is_rough.load(Ordering::Relaxed) {
                    if budget < read as u64 {
                        let _ = to.write_all(&buffer[..budget as usize]).await;
                        return true;
                    }
                    budget -= read as u64;
                }
                if to.write_all(&buffer[..read]).await.is_err() {
                    return false;
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(_) => return false,
        }
    }
    false
}

fn settings(url: String) -> UplinkSettings {
    let mut settings = UplinkSettings::new(EdgeId::parse("gw-1").expect("a name"));
    (settings.url, settings.backoff_max) = (url, Duration::from_millis(300));
    settings
}

struct Running {
    uplink: Uplink,
    stop: watch::Sender<bool>,
}

fn run<S: StreamSource>(settings: UplinkSettings, source: &Arc<S>) -> Running {
    let (stop, stopped) = watch::channel(false);
    let uplink = Uplink::start(settings, source.clone(), stopped).expect("an uplink");
    Running { uplink, stop }
}

impl Running {
    async fn stop(self) {
        self.stop.send_replace(true);
        self.uplink.ended().await;
    }

    async fn until(&self, is: impl Fn(&UplinkStatus) -> bool) -> UplinkStatus {
        until(|| async { Some(self.uplink.status()).filter(&is) }).await
    }
}

/// Looks again and again until there is an answer; a minute is for stalling machines, not for the test.
async fn until<T, F: Future<Output = Option<T>>>(mut look: impl FnMut() -> F) -> T {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(tokio::time::Instant::now() < deadline, "it never comes");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn expected(name: &str, records: usize) -> Vec<String> {
    (0..records).map(|n| format!("{name}-{n}-{}", "x".repeat(n % 100))).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_record_arrives_once_over_a_wire_that_is_cut() {
    let cloud = Cloud::start(IngestSettings::default(), false).await;
    let wire = Wire::start(cloud.address).await;
    wire.rough.store(true, Ordering::Relaxed);
    let source = MemoryStreams::new(&["a", "b"]);
    let mut settings = settings(format!("http://{}", wire.address));
    settings.compression = Compression::None;

    let names = ["a", "b"];
    let all = names.map(|name| expected(name, 4000));
    let mut running = run(settings.clone(), &source);
    for (round, begin) in (0..4000).step_by(40).enumerate() {
        for (name, values) in names.iter().zip(&all) {
            source.push(name, &values[begin..begin + 40]);
        }
        if round % 10 == 0 {
            // Cut down in the middle of whatever it does, and started again on the same data.
            drop(running);
            running = run(settings.clone(), &source);
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    until(|| async { (wire.cuts.load(Ordering::Relaxed) >= 10).then_some(()) }).await;
    wire.rough.store(false, Ordering::Relaxed);
    running.until(|status| status.behind_records == 0).await;

    for (name, expected) in names.iter().zip(all) {
        assert!(cloud.values(name).await == expected, "stream {name} is not there once and in order");
        until(|| async { source.read(name, |stream| stream.safe == 4000).then_some(()) }).await;
    }
    assert!(running.uplink.status().up);
    assert_eq!(running.uplink.status().sent_twice, 0);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_and_a_token_open_the_link_and_nothing_else_does() {
    let edge = EdgeId::parse("gw-1").expect("a name");
    let grant = EdgeGrant { id: edge, token: shared::config::Secret::new("secret".to_owned()), topics: None };
    let grants = Grants::new(vec![grant]);
    let cloud = Cloud::start(IngestSettings { grants, ..IngestSettings::default() }, true).await;
    let source = MemoryStreams::new(&["a"]);
    // More than one window of HTTP/2 holds.
    let values: Vec<String> = (0..300).map(|n| format!("{n}{}", "x".repeat(40_000))).collect();
    values.chunks(10).for_each(|chunk| source.push("a", chunk));
    let mut settings = settings(format!("https://localhost:{}", cloud.address.port()));
    let failed = |words: &'static str| {
        move |status: &UplinkStatus| status.last_error.as_ref().is_some_and(|error| error.contains(words))
    };

    let untrusting = run(settings.clone(), &source);
    untrusting.until(failed("certificate")).await;
    untrusting.stop().await;

    settings.ca_pem = Some(std::fs::read(data("ca.pem")).expect("a certificate"));
    let nameless = run(settings.clone(), &source);
    nameless.until(failed("401")).await;
    nameless.stop().await;

    settings.token = Some(Secret::new("wrong".into()));
    let wrong = run(settings.clone(), &source);
    let status = wrong.until(failed("401")).await;
    assert!(!status.up);
    wrong.stop().await;
    assert!(cloud.values("a").await.is_empty());

    settings.token = Some(Secret::new("secret\n".into()));
    settings.compression = Compression::None;
    let right = run(settings, &source);
    right.until(|status| status.behind_records == 0).await;
    assert!(cloud.values("a").await == values);
    right.stop().await;
}

/// Publishes, and waits until all of it is durable at the edge.
async fn publish(store: &EdgeStore, values: &[String]) {
    let session = SessionRef { client_id: "device", kept: false };
    let publish = |payload| Publish {
        topic: "plant/1/temperature",
        payload,
        qos: 1,
        retain: false,
        packet_id: Some(1),
        now_ms: 1_700_000_000_000,
        properties: PublishProperties::default(),
    };
    let publishes: Vec<_> = values.iter().map(|value| publish(value.as_bytes())).collect();
    let mut taken = 0;
    while taken < publishes.len() {
        let mut admissions = Vec::new();
        store.publish(&session, &publishes[taken..], &mut admissions);
        taken += admissions.len();
        let held = taken < publishes.len();
        for admission in admissions {
            let Admission::Stored(ticket) = admission else { panic!("{admission:?}") };
            Store::wait(store, ticket).await.expect("durable");
        }
        if held {
            store.room().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_devices_publish_arrives_once_although_the_gateway_starts_again() {
    let cloud = Cloud::start(IngestSettings::default(), false).await;
    let wire = Wire::start(cloud.address).await;
    wire.rough.store(true, Ordering::Relaxed);
    let directory = tempfile::tempdir().expect("a directory");
    let all = expected("plant", 1000);
    let edge = EdgeId::parse("gw-1").expect("a name");
    for begin in (0..1000).step_by(200) {
        let (name, filters) = ("plant".to_owned(), vec!["plant/#".to_owned()]);
        let rules = vec![StreamSettings { name, filters, ..StreamSettings::default() }];
        let settings_store = StoreSettings::new(edge.clone(), directory.path());
        let store = EdgeStore::open(settings_store, rules).expect("a store");
        let running = run(settings(format!("http://{}", wire.address)), &store);
        for chunk in all[begin..begin + 200].chunks(50) {
            publish(&store, chunk).await;
        }
        if begin == 800 {
            wire.rough.store(false, Ordering::Relaxed);
            running.until(|status| status.behind_records == 0).await;
            let name = stream("plant");
            until(|| async { store.position(&name).filter(|at| at.safe == 1000) }).await;
        }
        running.stop().await;
        let closing = store.clone();
        tokio::task::spawn_blocking(move || closing.close()).await.expect("closes");
        until(|| async { (Arc::strong_count(&store) == 1).then_some(()) }).await;
        drop(store);
    }
    assert!(cloud.values("plant").await == all, "not there once and in order");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_full_gateway_dropped_is_declared_and_listed() {
    let cloud = Cloud::start(IngestSettings::default(), false).await;
    let directory = tempfile::tempdir().expect("a directory");
    let mut settings_store = StoreSettings::new(EdgeId::parse("gw-1").expect("a name"), directory.path());
    settings_store.disk_budget = Some(8 << 20);
    let rules = vec![StreamSettings {
        name: "plant".to_owned(),
        filters: vec!["plant/#".to_owned()],
        on_full: OnFull::DropOldest,
        ..StreamSettings::default()
    }];
    let store = EdgeStore::open(settings_store, rules).expect("a store");
    let position = || store.position(&stream("plant")).expect("a stream");
    let url = format!("http://{}", cloud.address);
    let values: Vec<String> = (0..2000).map(|n| format!("{n:05}{}", "x".repeat(10_000))).collect();

    let running = run(settings(url.clone()), &store);
    publish(&store, &values[..10]).await;
    until(|| async { (position().safe == 10).then_some(()) }).await;
    running.stop().await;
    for chunk in values[10..].chunks(10) {
        publish(&store, chunk).await;
    }
    let first = position().first;
    assert!(first > 10, "nothing was dropped");
    let running = run(settings(url), &store);
    let status = running.until(|status| status.behind_records == 0 && status.gaps_declared == 1).await;
    assert_eq!((status.sent_twice, status.cloud_lost), (0, 0));
    until(|| async { position().gap.is_none().then_some(()) }).await;

    let kept = [&values[..10], &values[first as usize..]].concat();
    assert!(cloud.values("plant").await == kept, "what was kept is not there once and in order");
    let listed = cloud.values("tributary.gaps").await;
    let listed: serde_json::Value = serde_json::from_str(&listed[0]).expect("JSON");
    assert_eq!((&listed["first"], &listed["last"]), (&10.into(), &(first - 1).into()));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_copy_of_the_disk_loses_nothing_new() {
    let cloud = Cloud::start(IngestSettings::default(), false).await;
    let directory = tempfile::tempdir().expect("a directory");
    let open = |name: &str| {
        let settings = StoreSettings::new(EdgeId::parse("gw-1").expect("a name"), directory.path().join(name));
        let rules = vec![StreamSettings {
            name: "plant".to_owned(),
            filters: vec!["plant/#".to_owned()],
            ..StreamSettings::default()
        }];
        EdgeStore::open(settings, rules).expect("a store")
    };
    let all = |status: &UplinkStatus| status.up && status.behind_records == 0;
    let link = || settings(format!("http://{}", cloud.address));

    let store = open("disk");
    publish(&store, &expected("before", 20)).await;
    let running = run(link(), &store);
    running.until(all).await;
    running.stop().await;
    store.close();
    std::fs::create_dir(directory.path().join("image")).expect("a directory");
    for file in std::fs::read_dir(directory.path().join("disk")).expect("files") {
        let file = file.expect("a file");
        std::fs::copy(file.path(), directory.path().join("image").join(file.file_name())).expect("copied");
    }
    let store = open("disk");
    publish(&store, &expected("after", 20)).await;
    let running = run(link(), &store);
    running.until(all).await;
    running.stop().await;

    // The image goes on where it was taken, and at first its offsets are those of other records in the cloud.
    let image = open("image");
    publish(&image, &expected("restored", 30)).await;
    let running = run(link(), &image);
    running.until(|status| all(status) && status.sent_twice == 1).await;
    running.stop().await;
    let values = cloud.values("plant").await;
    for kept in [expected("before", 20), expected("after", 20), expected("restored", 30)].concat() {
        assert!(values.contains(&kept), "{kept} is lost");
    }
    assert_eq!(values.len(), 70, "what was safe when the image was taken is not sent again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copied_gateway_is_reported_and_loses_nothing() {
    let cloud = Cloud::start(IngestSettings::default(), false).await;
    let source = MemoryStreams::new(&["a"]);
    source.push("a", &expected("first", 10));
    let image = source.copy();
    let running = run(settings(format!("http://{}", cloud.address)), &source);
    source.push("a", &expected("second", 10));
    running.until(|status| status.behind_records == 0).await;
    running.stop().await;

    image.push("a", &expected("third", 7));
    let restored = run(settings(format!("http://{}", cloud.address)), &image);
    let status = restored.until(|status| status.behind_records == 0 && status.sent_twice == 1).await;
    assert!(status.up);
    let values = cloud.values("a").await;
    for kept in [expected("first", 10), expected("second", 10), expected("third", 7)].concat() {
        assert!(values.contains(&kept), "{kept} is lost");
    }
    assert_eq!(cloud.ingest.status().new_incarnations, 1);
    restored.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cloud_that_ends_and_comes_back_is_found_again() {
    let cloud = Cloud::start(IngestSettings::default(), false).await;
    let source = MemoryStreams::new(&["a"]);
    let values = expected("a", 200);
    source.push("a", &values[..100]);
    let wire = Wire::start(cloud.address).await;
    let running = run(settings(format!("http://{}", wire.address)), &source);
    running.until(|status| status.behind_records == 0).await;
    cloud.stop.send_replace(true);
    running.until(|status| !status.up && status.last_error.is_some()).await;
    source.push("a", &values[100..]);
    running.stop().await;

    // Another process on the same log: sessions are forgotten, positions are not.
    let cloud = Cloud::on(cloud.shard, IngestSettings::default(), false).await;
    let running = run(settings(format!("http://{}", cloud.address)), &source);
    let status = running.until(|status| status.behind_records == 0).await;
    assert_eq!((status.sent_twice, status.cloud_lost), (0, 0));
    assert!(cloud.values("a").await == values);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_may_not_be_written_waits_and_says_why() {
    let edge = EdgeId::parse("gw-1").expect("a name");
    let topics = Some(vec![TopicName::parse("a").expect("a name")]);
    let grants =
        Grants::new(vec![EdgeGrant { id: edge, token: shared::config::Secret::new("secret".to_owned()), topics }]);
    let cloud = Cloud::start(IngestSettings { grants, ..IngestSettings::default() }, false).await;
    let source = MemoryStreams::new(&["a", "b"]);
    let mut settings = settings(format!("http://{}", cloud.address));
    settings.token = Some(Secret::new("secret".into()));
    let running = run(settings, &source);
    source.push("a", &expected("a", 10));
    source.push("b", &expected("b", 10));
    until(|| async { source.read("a", |stream| stream.confirmed == 10).then_some(()) }).await;
    let reason = until(|| async { source.read("b", |stream| stream.parked.clone()) }).await;
    assert!(reason.contains("\"b\" is not allowed"), "{reason}");
    assert_eq!(source.read("b", |stream| stream.confirmed), 0);
    running.stop().await;
}
