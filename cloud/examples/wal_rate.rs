//! How fast the file engine commits, as a part of what the disk gives: the same bytes written over a file that was
//! zero-filled before, one `fdatasync` per commit. The three take turns within each round, and each round gives a ratio.
//!
//! - `raw`: one `pwrite` and one `fdatasync` per commit;
//! - `engine`: [`FileWal::append`] of a block of as many bytes;
//! - `shard`: batches for so many partitions appended to a [`Shard`] over such a WAL. Two commits' worth is under way all the
//!   time, so that a block gathers while the one before is written. How large blocks became is shown.
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
/// How long each of the three works per round.
const TURN: Duration = Duration::from_millis(400);

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let dir = PathBuf::from(args.next().context("a directory on the disk to measure")?);
    let rounds: usize = args.next().map_or(Ok(7), |text| text.parse())?;
    println!("| commit | partitions | raw file, MB/s | engine, MB/s | ratio | shard, MB/s | ratio | bytes per block |");
    println!("|---|---|---|---|---|---|---|---|");
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

fn case(dir: &Path, commit_bytes: usize, partitions: u32, rounds: usize) -> anyhow::Result<String> {
    let mut raw = Raw::new(&dir.join("raw"))?;
    let mut engine = Engine::new(&dir.join("engine"), commit_bytes, partitions)?;
    let mut shard = ShardUnderLoad::new(&dir.join("shard"), commit_bytes, partitions)?;
    // Until files are recycled: what is measured is overwriting.
    engine.write(3 * FILE_BYTES)?;
    shard.write(3 * FILE_BYTES)?;
    let (mut rates, mut ratios) = ([const { Vec::new() }; 3], [const { Vec::new() }; 2]);
    let before = shard.shard.status();
    for _ in 0..rounds {
        let rate = [
            raw.turn(&engine.block)?,
            rate(|| engine.write(1).map(|()| engine.block.len()))?,
            rate(|| shard.write(1).map(|()| shard.wave_bytes))?,
        ];
        rates.iter_mut().zip(rate).for_each(|(rates, rate)| rates.push(rate));
        ratios.iter_mut().zip(&rate[1..]).for_each(|(ratios, other)| ratios.push(other / rate[0]));
    }
    shard.drain()?;
    let after = shard.shard.status();
    let block_bytes = (after.block_bytes - before.block_bytes) / (after.blocks - before.blocks).max(1);
    let [raw, engine, shard] = rates.map(|rates| spread(rates, 0));
    let [engine_ratio, shard_ratio] = ratios.map(|ratios| spread(ratios, 2));
    let commit = format!("{} KiB", commit_bytes >> 10);
    Ok(format!(
        "| {commit} | {partitions} | {raw} | {engine} | {engine_ratio} | {shard} | {shard_ratio} | {block_bytes} |"
    ))
}

/// MB/s of work repeated for a turn.
fn rate(mut work: impl FnMut() -> anyhow::Result<usize>) -> anyhow::Result<f64> {
    let (began, mut bytes) = (Instant::now(), 0);
    while began.elapsed() < TURN {
        bytes += work()?;
    }
    Ok(bytes as f64 / 1e6 / began.elapsed().as_secs_f64())
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
        Ok(Self { file, position: 0 })
    }

    fn turn(&mut self, block: &Bytes) -> anyhow::Result<f64> {
        rate(|| {
            if self.position + block.len() as u64 > FILE_BYTES {
                self.position = 0;
            }
            self.file.write_all_at(block, self.position)?;
            self.file.sync_data()?;
            self.position += (block.len() as u64).next_multiple_of(512);
            Ok(block.len())
        })
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
        Ok(Self { wal: wal(path)?, block: block.bytes().clone(), seq: 0 })
    }

    /// At least so many bytes.
    fn write(&mut self, bytes: u64) -> anyhow::Result<()> {
        let mut written = 0;
        while written < bytes {
            self.wal.append(self.seq, &self.block)?;
            self.seq += 1;
            written += self.block.len() as u64;
            // Two files' worth is kept, so that two others are free.
            self.wal.trim(self.seq.saturating_sub(2 * FILE_BYTES / self.block.len() as u64))?;
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
    under_way: Option<Wave>,
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
        Ok(Self { shard, batch, count, partitions, next: 0, wave_bytes, under_way: None })
    }

    /// At least so many bytes of batches.
    fn write(&mut self, bytes: u64) -> anyhow::Result<()> {
        let mut written = 0;
        while written < bytes {
            let wave = (0..self.count).map(|_| {
                self.next = (self.next + 1) % self.partitions;
                self.shard.append(from_producer(partition(self.next), self.batch.clone()))
            });
            let wave = wave.collect();
            if let Some(before) = self.under_way.replace(wave) {
                wait(before)?;
            }
            written += self.wave_bytes as u64;
            let durable = self.shard.durable();
            self.shard.published(durable.next_seq.saturating_sub(2 * FILE_BYTES / self.wave_bytes as u64));
        }
        Ok(())
    }

    fn drain(&mut self) -> anyhow::Result<()> {
        self.under_way.take().map_or(Ok(()), wait)
    }
}

fn wait(wave: Wave) -> anyhow::Result<()> {
    for appended in block_on(join_all(wave)) {
        appended?;
    }
    Ok(())
}
