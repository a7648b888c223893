//! How fast the file engine commits, as a part of what the disk gives: as many bytes written over a file that was zero-filled
//! before, one `pwrite` and one `fdatasync` per commit. They take turns, since other programs use the disk too.
//!
//! - `engine`: [`FileWal::append`] of a block of so many bytes, against raw commits of the same size, commit by commit;
//! - `shard`: batches for so many partitions appended to a [`Shard`] over such a WAL, as producers with a bounded number of bytes
//!   in flight do: whenever the oldest batch is answered the next one is sent, [`WINDOW`] commits' worth at a time. Blocks
//!   are held at a commit's size by `block_bytes_max`, or grow as they do by default. How large they became is shown; the raw
//!   commits that take turns with such a burst have that size.
//!
//! `cargo run --release -p tributary-cloud --example wal_rate -- DIR [ROUNDS [MIB_PER_BURST [COMMIT_KIB PARTITIONS [WINDOW [HELD]]]]]`:
//! 0 as COMMIT_KIB is all of them, 0 as HELD lets blocks grow.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use bytes::Bytes;
use cloud::archive::{Recovered, Source as _};
use cloud::block::{BlockBuilder, BlockHeader, Placed};
use cloud::shard::{Shard, ShardSettings};
use cloud::state::{Change, StateLog as _, Topic};
use cloud::wal::BlockLog as _;
use cloud::wal::disk::Directory;
use cloud::wal::file::{FileWal, FileWalSettings};
use shared::batch::Batch;
use shared::block_on::block_on;
use shared::log::conformance::{from_producer, sized};
use shared::log::{AppendError, Appended, BoxFuture, Log as _};
use shared::name::{Partition, TopicId, TopicName};

const COMMIT_BYTES: [usize; 3] = [64 << 10, 256 << 10, 1 << 20];
const PARTITIONS: [u32; 3] = [1, 128, 1_000];
/// Smaller batches are mostly header: with more partitions than a commit has room for they take turns.
const BATCH_BYTES_MIN: usize = 512;
const FILE_BYTES: u64 = 64 << 20;
/// Commits of the engine per round.
const COMMITS: usize = 48;
/// Commits' worth that producers have in flight.
const WINDOW: usize = 4;
/// Copies of a batch, so that what is appended does not rest in the fastest cache: bytes of all of them.
const COPIES_BYTES: usize = 4 << 20;

/// How much is measured.
struct Load {
    rounds: usize,
    /// Bytes that a shard is given before the disk alone has its turn.
    burst_bytes: usize,
    window: usize,
    /// Blocks are closed when they have a commit's worth.
    held: bool,
}

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let dir = PathBuf::from(args.next().context("a directory on the disk to measure")?);
    let mut number = |default: usize| args.next().map_or(Ok(default), |text| text.parse());
    let (rounds, burst_bytes) = (number(9)?, number(64)? << 20);
    let (only_kib, only_partitions) = (number(0)?, number(0)? as u32);
    let load = Load { rounds, burst_bytes, window: number(WINDOW)?, held: number(1)? > 0 };
    println!(
        "| commit | partitions | raw, MB/s | engine, MB/s | ratio | KiB per block | of it batches | raw, MB/s | shard, MB/s | ratio |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    for commit_bytes in COMMIT_BYTES {
        for partitions in PARTITIONS {
            if only_kib > 0 && (commit_bytes >> 10, partitions) != (only_kib, only_partitions) {
                continue;
            }
            let here = dir.join(format!("{commit_bytes}-{partitions}"));
            std::fs::create_dir_all(&here)?;
            println!("{}", case(&here, commit_bytes, partitions, &load)?);
            std::fs::remove_dir_all(&here)?;
        }
    }
    Ok(())
}

/// Rates of one side and the other, round by round.
#[derive(Default)]
struct Sides {
    raw: Vec<f64>,
    other: Vec<f64>,
}

impl Sides {
    fn add(&mut self, raw: &Spent, other: &Spent) {
        self.raw.push(raw.rate());
        self.other.push(other.rate());
    }

    /// Both and their ratio, as cells.
    fn cells(self) -> String {
        let ratios = self.raw.iter().zip(&self.other).map(|(raw, other)| other / raw).collect();
        format!("{} | {} | {}", spread(self.raw, 0), spread(self.other, 0), spread(ratios, 2))
    }
}

/// Bytes written, and the time that took.
#[derive(Default)]
struct Spent {
    bytes: u64,
    time: Duration,
}

impl Spent {
    fn on<T>(&mut self, bytes: usize, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
        let began = Instant::now();
        let done = work()?;
        self.time += began.elapsed();
        self.bytes += bytes as u64;
        Ok(done)
    }

    fn rate(&self) -> f64 {
        self.bytes as f64 / 1e6 / self.time.as_secs_f64()
    }
}

fn case(dir: &Path, commit_bytes: usize, partitions: u32, load: &Load) -> anyhow::Result<String> {
    let mut raw = Raw::new(&dir.join("raw"))?;
    let mut engine = Engine::new(&dir.join("engine"), commit_bytes, partitions)?;
    let mut shard = ShardUnderLoad::new(&dir.join("shard"), commit_bytes, partitions, load)?;
    // Until files are recycled: what is measured is overwriting.
    while engine.written < 3 * FILE_BYTES {
        engine.commit()?;
    }
    while shard.written < 3 * FILE_BYTES {
        shard.burst(load.burst_bytes)?;
        shard.trim();
    }
    let (mut of_engine, mut of_shard) = (Sides::default(), Sides::default());
    let (mut blocks, mut parts) = (Vec::new(), Vec::new());
    for _ in 0..load.rounds {
        let (mut raw_spent, mut spent) = (Spent::default(), Spent::default());
        for _ in 0..COMMITS {
            let bytes = engine.block.len();
            raw_spent.on(bytes, || raw.commit(bytes))?;
            spent.on(bytes, || engine.commit())?;
        }
        of_engine.add(&raw_spent, &spent);
        let (mut raw_spent, mut spent) = (Spent::default(), Spent::default());
        let before = shard.shard.status();
        let batch_bytes = spent.on(0, || shard.burst(load.burst_bytes))?;
        let after = shard.shard.status();
        shard.trim();
        let (count, bytes) = ((after.blocks - before.blocks).max(1), after.block_bytes - before.block_bytes);
        spent.bytes = bytes;
        for _ in 0..count {
            let bytes = (bytes / count) as usize;
            raw_spent.on(bytes, || raw.commit(bytes))?;
        }
        of_shard.add(&raw_spent, &spent);
        blocks.push(bytes as f64 / count as f64 / 1024.0);
        parts.push(batch_bytes as f64 / bytes as f64);
    }
    let commit = format!("{} KiB", commit_bytes >> 10);
    let (engine, shard) = (of_engine.cells(), of_shard.cells());
    let (blocks, parts) = (spread(blocks, 0), spread(parts, 2));
    Ok(format!("| {commit} | {partitions} | {engine} | {blocks} | {parts} | {shard} |"))
}

/// Median with the least and the greatest.
fn spread(mut values: Vec<f64>, digits: usize) -> String {
    values.sort_by(f64::total_cmp);
    let (least, middle, greatest) = (values[0], values[values.len() / 2], values[values.len() - 1]);
    format!("{middle:.digits$} ({least:.digits$}-{greatest:.digits$})")
}

/// The bound: a file of zeros, written over from its beginning again and again.
struct Raw {
    file: File,
    content: Vec<u8>,
    position: u64,
}

impl Raw {
    fn new(path: &Path) -> anyhow::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
        let zeros = vec![0; 1 << 20];
        for position in (0..FILE_BYTES).step_by(zeros.len()) {
            file.write_all_at(&zeros, position)?;
        }
        file.sync_all()?;
        Ok(Self { file, content: vec![7; 16 << 20], position: 0 })
    }

    fn commit(&mut self, bytes: usize) -> anyhow::Result<()> {
        if self.position + bytes as u64 > FILE_BYTES {
            self.position = 0;
        }
        self.file.write_all_at(&self.content[..bytes], self.position)?;
        self.file.sync_data()?;
        self.position += (bytes as u64).next_multiple_of(512);
        Ok(())
    }
}

fn wal(path: &Path) -> anyhow::Result<FileWal> {
    let settings = FileWalSettings { file_bytes: FILE_BYTES, ..FileWalSettings::default() };
    Ok(FileWal::open(Box::new(Directory::open(path)?), settings, 1)?)
}

fn partition(index: u32) -> Partition {
    Partition { topic: TopicId([1; 16]), index }
}

/// Which partitions one commit has batches of, and how large a batch is.
fn batches(commit_bytes: usize, partitions: u32) -> (u32, Batch) {
    let each = (commit_bytes / partitions as usize).max(BATCH_BYTES_MIN);
    ((commit_bytes / each) as u32, sized(each))
}

/// The engine alone.
struct Engine {
    wal: FileWal,
    block: Bytes,
    seq: u64,
    written: u64,
    trimmed: u64,
}

impl Engine {
    fn new(path: &Path, commit_bytes: usize, partitions: u32) -> anyhow::Result<Self> {
        let (count, batch) = batches(commit_bytes, partitions);
        let mut builder = BlockBuilder::default();
        for index in 0..count {
            let partition = partition(index);
            builder.push(Placed { partition, base_offset: 0, leader_epoch: 1, batch: batch.clone() });
        }
        let block = builder.finish(BlockHeader { shard: 0, epoch: 1, nonce: 1, seq: 0, append_ms: 0 });
        Ok(Self { wal: wal(path)?, block: block.bytes().clone(), seq: 0, written: 0, trimmed: 0 })
    }

    fn commit(&mut self) -> anyhow::Result<()> {
        self.wal.append(self.seq, &self.block)?;
        self.seq += 1;
        self.written += self.block.len() as u64;
        // As the archive does: a file's worth at a time.
        if self.written - self.trimmed > 2 * FILE_BYTES {
            self.trimmed += FILE_BYTES;
            self.wal.trim(self.trimmed / self.block.len() as u64)?;
        }
        Ok(())
    }
}

/// A shard that as many bytes as fit a window are always in flight to.
struct ShardUnderLoad {
    shard: Arc<Shard>,
    batches: Vec<Batch>,
    partitions: u32,
    next: usize,
    /// Batches in flight.
    window: usize,
    written: u64,
    /// Where the last bursts began.
    bursts: VecDeque<u64>,
}

impl ShardUnderLoad {
    fn new(path: &Path, commit_bytes: usize, partitions: u32, load: &Load) -> anyhow::Result<Self> {
        let mut settings = ShardSettings { archived: false, ..ShardSettings::default() };
        if load.held {
            // As large as a commit of the engine here: headers are not counted.
            settings.block_bytes_max = commit_bytes + commit_bytes / 4;
        }
        let clock = Arc::new(|| 1_000);
        let shard = Shard::open(settings, Box::new(wal(path)?), Recovered::default(), None, clock)?;
        let (id, name) = (partition(0).topic, TopicName::parse("rate")?);
        let topic = Topic { id, name, partitions, configs: BTreeMap::new(), created_ms: 0 };
        block_on(shard.commit(vec![Change::created(topic)]))?;
        let (count, batch) = batches(commit_bytes, partitions);
        let copies = (0..COPIES_BYTES.div_ceil(batch.len())).map(|_| Batch::parse(batch.bytes().to_vec().into()));
        let batches = copies.collect::<Result<_, _>>()?;
        let window = load.window * count as usize;
        Ok(Self { shard, batches, partitions, next: 0, window, written: 0, bursts: VecDeque::new() })
    }

    /// Appends at least `bytes` of batches and waits for all the answers. Returns how many bytes they were.
    fn burst(&mut self, bytes: usize) -> anyhow::Result<u64> {
        let count = bytes.div_ceil(self.batches[0].len());
        let bytes = (count * self.batches[0].len()) as u64;
        block_on(self.send(count))?;
        self.written += bytes;
        Ok(bytes)
    }

    /// As the archive does, so often that no file is made while rates are measured.
    fn trim(&mut self) {
        self.bursts.push_back(self.shard.durable().next_seq);
        if self.bursts.len() > 1
            && let Some(below) = self.bursts.pop_front()
        {
            self.shard.published(below);
        }
    }

    async fn send(&mut self, count: usize) -> Result<(), AppendError> {
        let mut in_flight: VecDeque<BoxFuture<'static, Result<Appended, AppendError>>> = VecDeque::new();
        for _ in 0..count {
            if in_flight.len() == self.window
                && let Some(oldest) = in_flight.pop_front()
            {
                oldest.await?;
            }
            self.next += 1;
            let partition = partition((self.next % self.partitions as usize) as u32);
            let batch = self.batches[self.next % self.batches.len()].clone();
            in_flight.push_back(self.shard.append(from_producer(partition, batch)));
        }
        for call in in_flight {
            call.await?;
        }
        Ok(())
    }
}
