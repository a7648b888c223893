//! Archives for the tool's tests: made by a shard of the real kind, in a directory or on the small S3 server.

use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use shared::batch::{Batch, BatchBuilder, Compression};
use shared::log::conformance::{from_edge, from_producer, stream};
use shared::log::{Append, Log, ReadLimits};
use shared::name::{Offset, Partition, TopicId, TopicName};
use tempfile::TempDir;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::super::progress::Progress;
use super::super::{ArchiveCommand, ToolError, execute};
use crate::archive::{Archive, ArchiveSettings, RequestSettings};
use crate::config::CloudConfig;
use crate::shard::{LocalWal, Shard, ShardSettings};
use crate::state::{Change, StateLog, Topic};
use crate::wal::memory::MemoryWal;

pub fn partition(topic: u8, index: u32) -> Partition {
    Partition { topic: TopicId([topic; 16]), index }
}

/// A place for an archive.
pub struct Place {
    pub url: String,
    pub options: Vec<(String, String)>,
    dir: Option<TempDir>,
}

impl Place {
    pub fn directory() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { url: format!("file://{}/archive", dir.path().display()), options: Vec::new(), dir: Some(dir) }
    }

    pub fn s3(options: Vec<(String, String)>, prefix: &str) -> Self {
        Self { url: format!("s3://bucket/{prefix}"), options, dir: None }
    }

    pub fn path(&self) -> PathBuf {
        self.dir.as_ref().unwrap().path().join("archive")
    }

    /// Keys of all files, ascending.
    pub fn keys(&self) -> Vec<String> {
        fn collect(base: &FilePath, dir: &FilePath, keys: &mut Vec<String>) {
            for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
                if entry.file_type().unwrap().is_dir() {
                    collect(base, &entry.path(), keys);
                } else {
                    keys.push(entry.path().strip_prefix(base).unwrap().display().to_string());
                }
            }
        }
        let mut keys = Vec::new();
        collect(&self.path(), &self.path(), &mut keys);
        keys.sort();
        keys
    }

    pub fn read(&self, key: &str) -> Vec<u8> {
        std::fs::read(self.path().join(key)).unwrap()
    }

    pub fn write(&self, key: &str, bytes: &[u8]) {
        std::fs::write(self.path().join(key), bytes).unwrap();
    }

    pub fn remove(&self, key: &str) {
        std::fs::remove_file(self.path().join(key)).unwrap();
    }

    /// Runs a command on it: exit code, output and how much was done.
    pub async fn tool(&self, command: &str) -> Result<(i32, String), ToolError> {
        let (code, out) = self.tool_bytes(command).await?;
        Ok((code, String::from_utf8(out).unwrap()))
    }

    pub async fn tool_bytes(&self, command: &str) -> Result<(i32, Vec<u8>), ToolError> {
        let mut out = Vec::new();
        let command = parse(&format!("{command} --url {}", self.url));
        let code = execute(&command, &CloudConfig::default(), &self.options, &Progress::default(), &mut out).await?;
        Ok((code, out))
    }
}

/// A command as the command line has it.
pub fn parse(text: &str) -> ArchiveCommand {
    use clap::Parser as _;
    #[derive(clap::Parser)]
    struct Line {
        #[command(subcommand)]
        command: ArchiveCommand,
    }
    let line = Line::try_parse_from(std::iter::once("archive").chain(text.split_whitespace()));
    line.unwrap_or_else(|error| panic!("{error}")).command
}

/// A node: a shard, its log in memory, and its archive at a place.
pub struct Node {
    pub shard: Arc<Shard>,
    pub archive: Arc<Archive>,
    pub home: TempDir,
    pub wal: MemoryWal,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

impl Node {
    /// Starts with an empty data directory.
    pub async fn start(place: &Place) -> Self {
        Self::start_on(place, tempfile::tempdir().unwrap(), MemoryWal::new(64 << 20)).await
    }

    pub async fn start_on(place: &Place, home: TempDir, wal: MemoryWal) -> Self {
        Self::start_shard(place, home, wal, 0, 4).await
    }

    pub async fn start_shard(place: &Place, home: TempDir, wal: MemoryWal, number: u32, max_lag_ms: u64) -> Self {
        // Main installs the provider; a client cannot be made without one, even for http.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let settings = ArchiveSettings {
            url: Some(place.url.clone()),
            store_options: place.options.clone(),
            data_dir: home.path().to_owned(),
            shard: number,
            max_lag: Duration::from_millis(max_lag_ms),
            ship_bytes: 4000,
            segment_bytes: 100_000,
            segment_age: Duration::from_secs(3600),
            grace: Duration::ZERO,
            requests: RequestSettings { backoff: Duration::from_millis(1), ..RequestSettings::default() },
            ..ArchiveSettings::default()
        };
        let archive = Archive::open(settings).await.unwrap();
        let recovered = archive.recover(&LocalWal(&wal)).await.unwrap();
        let clock = Arc::new(|| 1_000);
        let cold = Some(archive.cold());
        let settings = ShardSettings { shard: number, ..ShardSettings::default() };
        let shard = Shard::open(settings, Box::new(wal.clone()), recovered, cold, clock).unwrap();
        let (stop, stopped) = oneshot::channel();
        let run = archive.clone().run(shard.clone(), async {
            let _ = stopped.await;
        });
        Self { shard, archive, home, wal, stop: Some(stop), task: tokio::spawn(run) }
    }

    pub async fn create(&self, topic: u8, partitions: u32) {
        let name = TopicName::parse(&format!("topic-{topic}")).unwrap();
        let topic = Topic { id: TopicId([topic; 16]), name, partitions, configs: Default::default(), created_ms: 0 };
        self.shard.commit(vec![Change::created(topic)]).await.unwrap();
    }

    pub async fn append(&self, append: Append) {
        self.shard.append(append).await.unwrap();
    }

    /// Some records: a busy partition with each compression in turn, quiet ones, and a gateway's stream.
    pub async fn produce(&self, rounds: i64) {
        for n in 0..rounds {
            self.append(from_producer(partition(1, 0), batch(n, 20))).await;
            self.append(from_producer(partition(1, 1 + (n % 2) as u32), batch(n, 1))).await;
            let at = self.position();
            self.append(from_edge(partition(2, 0), &stream(1, 1), at, at + 2)).await;
        }
    }

    /// Single records, one after the other.
    pub async fn trickle(&self, count: i64) {
        for n in 0..count {
            self.append(from_producer(partition(1, 1), batch(n, 1))).await;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Where the gateway's stream stands.
    fn position(&self) -> Offset {
        crate::state::read_state(self.shard.as_ref(), |state| state.stream(&stream(1, 1)).map_or(0, |s| s.next))
    }

    pub async fn shipped(&self) {
        let next = self.shard.status().next_seq;
        self.archive.shipped.subscribe().wait_for(|shipped| *shipped >= next).await.unwrap();
    }

    /// Makes segments of everything.
    pub async fn split(&self) {
        let next = self.shard.status().next_seq;
        while self.archive.status().split_seq < next {
            self.archive.roll_now();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    pub async fn stop(mut self) -> (TempDir, MemoryWal) {
        drop(self.stop.take());
        self.task.await.unwrap();
        self.shard.close();
        (self.home, self.wal)
    }

    /// All batches of a partition, through tail, log and archive.
    pub async fn read_all(&self, partition: Partition) -> Vec<Batch> {
        let (mut at, mut batches) = (self.shard.bounds(partition).unwrap().log_start, Vec::new());
        loop {
            let read = self.shard.read(partition, at, ReadLimits { bytes_max: 100_000 }).await.unwrap();
            for mut slice in read.batches {
                while let Some(batch) = Batch::split_first(&mut slice).unwrap() {
                    batches.push(batch);
                }
            }
            if read.next == at {
                return batches;
            }
            at = read.next;
        }
    }
}

fn batch(round: i64, records: i64) -> Batch {
    let mut builder = BatchBuilder::default();
    for n in 0..records {
        let value = format!("value {round}/{n} {}", "x".repeat(100));
        builder.push(
            1_000_000 + round * 100 + n,
            Some(b"key"),
            Some(value.as_bytes()),
            &[(&b"h"[..], &b"\xff\x00"[..])],
        );
    }
    let compression = [Compression::None, Compression::Lz4, Compression::Zstd];
    builder.finish(0, compression[round as usize % 3])
}

/// An archive with everything in it: segments, more segments, and blocks that are shipped and not split. Its first owner
/// was lost, so that it has epochs and offsets that were left out.
pub async fn rich(place: &Place) -> Node {
    let node = Node::start(place).await;
    node.create(1, 3).await;
    node.create(2, 1).await;
    node.create(3, 2).await;
    node.produce(12).await;
    node.split().await;
    node.produce(5).await;
    node.shipped().await;
    node.stop().await;
    let node = Node::start(place).await;
    node.produce(7).await;
    node.split().await;
    node.produce(9).await;
    node.shipped().await;
    node
}

/// Objects that the root in force names or keeps.
pub async fn named(place: &Place) -> Vec<String> {
    let (_, out) = place.tool("ls --objects --json").await.unwrap();
    let listing: serde_json::Value = serde_json::from_str(&out).unwrap();
    let objects = listing["objects"].as_array().unwrap().iter().filter(|object| object["named"] == true);
    let mut keys: Vec<String> = objects.map(|object| object["key"].as_str().unwrap().to_owned()).collect();
    keys.push("cluster-id".to_owned());
    keys
}
