//! How fast a shard starts and how fast readers catch up, on the file engine with an archive in a directory:
//!
//! - the time to open a shard whose WAL holds so many MiB, of which no manifest knows: every block is read, checked and folded;
//! - the rate at which a consumer reads from the WAL and from segments in a `file://` archive, as a part of a plain
//!   sequential read of a file of as many bytes, of the same read with a CRC-32C of what it brought, and of a plain read of
//!   the very files that the shard reads, each from end to end, in turns. The tail cache is off, caches of archived chunks
//!   are as they come.
//!
//! The consumer has one request under way at a time, for all partitions that it reads, and asks for the next bytes as soon as
//! it has these. Each once from the page cache, where the bound is copying, and once from the disk: everything is synced
//! and dropped from the page cache before either side reads.
//!
//! `cargo run --release -p tributary-cloud --example tier_rate -- DIR [MIB] [ROUNDS]`

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use cloud::archive::{Archive, ArchiveSettings, ColdTier, Recovered};
use cloud::shard::{LocalWal, Shard, ShardSettings};
use cloud::state::{Change, StateLog as _, Topic};
use cloud::wal::disk::Directory;
use cloud::wal::file::{FileWal, FileWalSettings};
use futures_util::future::join_all;
use shared::log::conformance::{from_producer, sized};
use shared::log::{Log as _, ReadLimits};
use shared::name::{Partition, TopicId, TopicName};

const BATCH_BYTES: usize = 64 << 10;
/// Batches in flight: some 4 MiB per block.
const WAVE: usize = 64;
/// Of one request: as many bytes as the plain read takes at a time.
const READ_BYTES: usize = 4 << 20;
/// Partitions read at the same time, where there are so many.
const READERS: usize = 4;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let dir = PathBuf::from(args.next().context("a directory to work in")?);
    let bytes = args.next().map_or(Ok(1024), |text| text.parse::<u64>())? << 20;
    let rounds: usize = args.next().map_or(Ok(5), |text| text.parse())?;
    for partitions in [1, 128] {
        let here = dir.join(partitions.to_string());
        std::fs::create_dir_all(&here)?;
        recovery(&here, bytes, partitions, rounds).await?;
        catching_up(&here, bytes, partitions, rounds).await?;
        std::fs::remove_dir_all(&here)?;
    }
    Ok(())
}

fn wal(dir: &Path) -> anyhow::Result<FileWal> {
    let settings = FileWalSettings { file_bytes: 64 << 20, bytes_max: 8 << 30, ..FileWalSettings::default() };
    Ok(FileWal::open(Box::new(Directory::open(&dir.join("wal"))?), settings, 1)?)
}

fn open(wal: FileWal, recovered: Recovered, cold: Option<Arc<dyn ColdTier>>) -> anyhow::Result<Arc<Shard>> {
    let settings = ShardSettings { tail_bytes_max: 0, archived: false, ..ShardSettings::default() };
    Ok(Shard::open(settings, Box::new(wal), recovered, cold, Arc::new(|| 1_000))?)
}

fn partition(index: usize) -> Partition {
    Partition { topic: TopicId([1; 16]), index: index as u32 }
}

async fn fill(shard: &Shard, bytes: u64, partitions: usize) -> anyhow::Result<()> {
    let topic = Topic {
        id: partition(0).topic,
        name: TopicName::parse("rate")?,
        partitions: partitions as u32,
        configs: BTreeMap::new(),
        created_ms: 0,
    };
    shard.commit(vec![Change::created(topic)]).await?;
    let batch = sized(BATCH_BYTES);
    let count = bytes as usize / batch.len();
    for from in (0..count).step_by(WAVE) {
        let wave = (from..count.min(from + WAVE))
            .map(|n| shard.append(from_producer(partition(n % partitions), batch.clone())));
        for appended in join_all(wave.collect::<Vec<_>>()).await {
            appended?;
        }
    }
    Ok(())
}

/// Everything these partitions hold: bytes, and seconds taken.
async fn read(shard: &Shard, partitions: Range<usize>) -> anyhow::Result<(u64, f64)> {
    let (began, mut bytes) = (Instant::now(), 0);
    let limits = ReadLimits { bytes_max: READ_BYTES / partitions.len() };
    let starts = partitions.map(|index| Ok((partition(index), shard.bounds(partition(index))?.log_start)));
    let mut open = starts.collect::<anyhow::Result<Vec<_>>>()?;
    while !open.is_empty() {
        let reads = open.iter().map(|(partition, at)| shard.read(*partition, *at, limits));
        let reads = join_all(reads).await;
        let asked = std::mem::take(&mut open);
        for ((partition, _), read) in asked.into_iter().zip(reads) {
            let read = read?;
            bytes += read.bytes() as u64;
            open.extend((!read.batches.is_empty()).then_some((partition, read.next)));
        }
    }
    Ok((bytes, began.elapsed().as_secs_f64()))
}

async fn recovery(dir: &Path, bytes: u64, partitions: usize, rounds: usize) -> anyhow::Result<()> {
    let shard = open(wal(dir)?, Recovered::default(), None)?;
    fill(&shard, bytes, partitions).await?;
    let (blocks, log_bytes) = (shard.status().next_seq, shard.status().wal.bytes);
    shard.close();
    // The directory stays locked as long as the shard lives.
    drop(shard);
    let mut times = Vec::new();
    for _ in 0..rounds {
        let began = Instant::now();
        let shard = open(wal(dir)?, Recovered::default(), None)?;
        times.push(began.elapsed().as_secs_f64() * 1e9 / log_bytes as f64);
        shard.close();
    }
    let mib = log_bytes >> 20;
    println!("recovery, {partitions} partition(s), {blocks} blocks, {mib} MiB: {} s per GB", spread(times, 2));
    Ok(())
}

async fn catching_up(dir: &Path, bytes: u64, partitions: usize, rounds: usize) -> anyhow::Result<()> {
    let archive = Archive::open(ArchiveSettings {
        url: Some(format!("file://{}", dir.join("archive").display())),
        data_dir: dir.join("data"),
        max_lag: Duration::from_millis(200),
        ..ArchiveSettings::default()
    })
    .await?;
    let log = wal(dir)?;
    let recovered = archive.recover(&LocalWal(&log)).await?;
    let shard = open(log, recovered, Some(archive.cold()))?;
    let (readers, piece) = (partitions.min(READERS), bytes / partitions as u64);
    std::fs::write(dir.join("plain"), vec![7; readers * piece as usize])?;
    let mut table = Vec::new();
    let mut unread = 0..partitions;
    for cached in [true, false] {
        table.push(("the WAL", cached, rates(dir, "wal", &shard, &mut unread, readers, rounds, cached).await?));
    }

    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let stopped = async {
        let _ = stopped.await;
    };
    let running = tokio::spawn(archive.clone().run(shard.clone(), stopped));
    let next = shard.status().next_seq;
    // The newest block stays in the WAL.
    while archive.status().split_seq < next || shard.status().index_entries > partitions {
        archive.roll_now();
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let _ = stop.send(());
    running.await?;
    let before = archive.status();
    for cached in [true, false] {
        table.push(("the archive", cached, rates(dir, "archive", &shard, &mut unread, readers, rounds, cached).await?));
    }
    let after = archive.status();
    anyhow::ensure!(after.get_bytes > before.get_bytes, "the archive was read");
    anyhow::ensure!(after.lists == before.lists, "reading lists nothing");
    shard.close();
    let each = piece >> 20;
    println!(
        "| {partitions} partition(s) of {each} MiB, {} segments | plain read, MB/s | and CRC | its own files | shard | to plain | to CRC | to its own files |",
        after.segments
    );
    println!("|---|---|---|---|---|---|---|---|");
    for (what, cached, rates) in table {
        println!("| {what}, from the {} | {rates} |", if cached { "page cache" } else { "disk" });
    }
    Ok(())
}

/// Makes the system forget what it has of every file below `dir`. What waits to be written would stay: it is synced.
fn forget(dir: &Path) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            forget(&entry.path())?;
        } else {
            let file = File::open(entry.path())?;
            file.sync_all()?;
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        }
    }
    Ok(())
}

/// Files of data below `dir`: those of the WAL, or segment objects.
fn data_files(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            found.append(&mut data_files(&path)?);
        } else if path.metadata()?.len() >= READ_BYTES as u64 {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// A plain sequential read, one with a checksum, one of the shard's own files, and the shard's, in turns.
async fn rates(
    dir: &Path,
    own: &str,
    shard: &Shard,
    unread: &mut Range<usize>,
    readers: usize,
    rounds: usize,
    cached: bool,
) -> anyhow::Result<String> {
    let mut columns: [Vec<f64>; 7] = Default::default();
    let (plain, own) = ([dir.join("plain")], data_files(&dir.join(own))?);
    for _ in 0..rounds {
        let prepare = || if cached { Ok(()) } else { forget(dir) };
        prepare()?;
        let alone = read_plain(&plain, false)?;
        prepare()?;
        let checked = read_plain(&plain, true)?;
        prepare()?;
        let of_own = read_plain(&own, false)?;
        prepare()?;
        // Other partitions each time where there are some: the caches have nothing of them. A single one is larger.
        let first = if readers == 1 { 0 } else { unread.start };
        unread.start += readers;
        let (bytes, seconds) = read(shard, first..first + readers).await?;
        let rate = bytes as f64 / 1e6 / seconds;
        let round = [alone, checked, of_own, rate, rate / alone, rate / checked, rate / of_own];
        columns.iter_mut().zip(round).for_each(|(column, value)| column.push(value));
    }
    let digits = [0, 0, 0, 0, 2, 2, 2];
    let columns = columns.into_iter().zip(digits).map(|(values, digits)| spread(values, digits));
    Ok(columns.collect::<Vec<_>>().join(" | "))
}

fn read_plain(paths: &[PathBuf], checked: bool) -> anyhow::Result<f64> {
    let mut buffer = vec![0; READ_BYTES];
    let (began, mut bytes, mut crc) = (Instant::now(), 0, 0);
    for path in paths {
        let mut file = File::open(path)?;
        loop {
            let read = file.read(&mut buffer)?;
            if read == 0 {
                break;
            }
            bytes += read;
            if checked {
                crc = buffer.chunks(BATCH_BYTES).fold(crc, |crc, batch| crc ^ crc32c::crc32c(batch));
            }
        }
    }
    std::hint::black_box(crc);
    Ok(bytes as f64 / 1e6 / began.elapsed().as_secs_f64())
}

/// Median with the least and the greatest.
fn spread(mut values: Vec<f64>, digits: usize) -> String {
    values.sort_by(f64::total_cmp);
    let (least, middle, greatest) = (values[0], values[values.len() / 2], values[values.len() - 1]);
    format!("{middle:.digits$} ({least:.digits$}-{greatest:.digits$})")
}
