//! How fast the file engine commits, as a part of what the disk gives: as many bytes written over a file that was zero-filled
//! before, one `pwrite` and one `fdatasync` per commit. They take turns commit by commit, since other programs use the disk too.
//!
//! - `engine`: [`FileWal::append`] of a block of so many bytes, against raw commits of the same size;
//! - `shard`: batches for so many partitions appended to a [`Shard`] over such a WAL. Two commits' worth is under way, so that
//!   a block gathers while the one before is written. How large blocks became is shown; the raw commits that take turns
//!   with such a burst have that size.
//!
//! `cargo run --release -p tributary-cloud --example wal_rate -- DIR [ROUNDS]`

use std::collections::BTreeMap;
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
use futures_util::future::join_all;
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
/// Commits per round.
const COMMITS: usize = 48;
/// Commits' worth that a shard is given at a time.
const BURST: usize = 16;

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let dir = PathBuf::from(args.next().context("a directory on the disk to measure")?);
    let rounds: usize = args.next().map_or(Ok(9), |text| text.parse())?;
    println!(
        "| commit | partitions | raw, MB/s | engine, MB/s | ratio | KiB per block | raw, MB/s | shard, MB/s | ratio |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for commit_bytes in COMMIT_BYTES {
        for partitions in PARTITIONS {
            let here = dir.join(format!("{commit_bytes}-{partitions}"));
            std::fs::create_dir_all(&here)?;
            println!("{}", case(&here, commit_bytes, partitions, rounds)?);
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
    fn on(&mut self, bytes: usize, work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
        let began = Instant::now();
        work()?;
        self.time += began.elapsed();
        self.bytes += bytes as u64;
        Ok(())
    }

    fn rate(&self) -> f64 {
        self.bytes as f64 / 1e6 / self.time.as_secs_f64()
    }
}

fn case(dir: &Path, commit_bytes: usize, partitions: u32, rounds: usize) -> anyhow::Result<String> {
    let mut raw = Raw::new(&dir.join("raw"))?;
    let mut engine = Engine::new(&dir.join("engine"), commit_bytes, partitions)?;
    let mut shard = ShardUnderLoad::new(&dir.join("shard"), commit_bytes, partitions)?;
    // Until files are recycled: what is measured is overwriting.
    while engine.written < 3 * FILE_BYTES {
        engine.commit()?;
    }
    while shard.written < 3 * FILE_BYTES {
        shard.burst()?;
    }
    let (mut of_engine, mut of_shard, mut blocks) = (Sides::default(), Sides::default(), Vec::new());
    for _ in 0..rounds {
        let (mut raw_spent, mut spent) = (Spent::default(), Spent::default());
        for _ in 0..COMMITS {
            let bytes = engine.block.len();
            raw_spent.on(bytes, || raw.commit(bytes))?;
            spent.on(bytes, || engine.commit())?;
        }
        of_engine.add(&raw_spent, &spent);
        let (mut raw_spent, mut spent) = (Spent::default(), Spent::default());
        let (before, mut after) = (shard.shard.status(), shard.shard.status());
        for _ in 0..COMMITS / BURST {
            let began = after.block_bytes;
            spent.on(BURST * shard.wave_bytes, || shard.burst())?;
            let was = after.blocks;
            after = shard.shard.status();
            let (count, bytes) = (after.blocks - was, after.block_bytes - began);
            for _ in 0..count {
                raw_spent.on((bytes / count) as usize, || raw.commit((bytes / count) as usize))?;
            }
        }
        of_shard.add(&raw_spent, &spent);
        let count = (after.blocks - before.blocks).max(1);
        blocks.push((after.block_bytes - before.block_bytes) as f64 / count as f64 / 1024.0);
    }
    let commit = format!("{} KiB", commit_bytes >> 10);
    let (engine, shard) = (of_engine.cells(), of_shard.cells());
    Ok(format!("| {commit} | {partitions} | {engine} | {} | {shard} |", spread(blocks, 0)))
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

type Wave = Vec<BoxFuture<'static, Result<Appended, AppendError>>>;

/// A shard that always has a block open while another is written.
struct ShardUnderLoad {
    shard: Arc<Shard>,
    batch: Batch,
    count: u32,
    partitions: u32,
    next: u32,
    wave_bytes: usize,
    written: u64,
    trimmed: u64,
    /// Where blocks began after so many bytes.
    kept: u64,
}

impl ShardUnderLoad {
    fn new(path: &Path, commit_bytes: usize, partitions: u32) -> anyhow::Result<Self> {
        let settings = ShardSettings { archived: false, ..ShardSettings::default() };
        let clock = Arc::new(|| 1_000);
        let shard = Shard::open(settings, Box::new(wal(path)?), Recovered::default(), None, clock)?;
        let (id, name) = (partition(0).topic, TopicName::parse("rate")?);
        let topic = Topic { id, name, partitions, configs: BTreeMap::new(), created_ms: 0 };
        block_on(shard.commit(vec![Change::TopicCreated(topic)]))?;
        let (count, batch) = batches(commit_bytes, partitions);
        let wave_bytes = batch.len() * count as usize;
        Ok(Self { shard, batch, count, partitions, next: 0, wave_bytes, written: 0, trimmed: 0, kept: 0 })
    }

    fn burst(&mut self) -> anyhow::Result<()> {
        let mut under_way: Option<Wave> = None;
        for _ in 0..BURST {
            let wave = (0..self.count).map(|_| {
                self.next = (self.next + 1) % self.partitions;
                self.shard.append(from_producer(partition(self.next), self.batch.clone()))
            });
            let wave = wave.collect();
            if let Some(before) = under_way.replace(wave) {
                wait(before)?;
            }
        }
        under_way.map_or(Ok(()), wait)?;
        self.written += (BURST * self.wave_bytes) as u64;
        if self.written - self.trimmed > 2 * FILE_BYTES {
            self.trimmed = self.written;
            self.shard.published(self.kept);
            self.kept = self.shard.durable().next_seq;
        }
        Ok(())
    }
}

fn wait(wave: Wave) -> anyhow::Result<()> {
    for appended in block_on(join_all(wave)) {
        appended?;
    }
    Ok(())
}
