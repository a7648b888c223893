//! Measures table layouts for the edge's streams: bytes written per payload byte, file per payload, commits per second,
//! and the time to open after an unclean end. `cargo run --release --example layouts -p tributary-edge [DIR]`.
//!
//! Figures and the decision: `docs/decisions/0001-edge-table-layout.md`.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use redb::{Builder, Database, Error, ReadableDatabase, StorageBackend, TableDefinition};

const ROWS: TableDefinition<'_, (u32, u64), &[u8]> = TableDefinition::new("rows");
const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");
const INDEX: TableDefinition<'_, (u32, u64), (u64, u32, u32)> = TableDefinition::new("index");

/// A file that counts what is written to it.
#[derive(Debug)]
struct Counting(File, Arc<AtomicU64>);

impl StorageBackend for Counting {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(out, offset)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.1.fetch_add(data.len() as u64, Ordering::Relaxed);
        self.0.write_all_at(data, offset)
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Layout {
    /// One value per stream and commit.
    Rows,
    /// One value per commit, and an index row per stream.
    LogAndIndex,
    /// One value per commit while a stream brings little; its pieces move to a row when they fill one.
    Tail,
}

const PAYLOAD: usize = 256;
/// Lengths, deltas, key and header of a record; the header of a batch.
const RECORD: usize = PAYLOAD + 40;
const BATCH: usize = 61 + 8;
const DIRECT: usize = 12_000;
const FULL: usize = 52_500;
const TAIL_MAX: usize = 1 << 20;

/// The tail in memory: pieces per stream, live values.
#[derive(Default)]
struct Tail {
    pieces: BTreeMap<u32, (u64, Vec<u8>)>,
    values: BTreeMap<u64, (usize, Vec<u32>)>,
}

fn commit(
    database: &Database,
    layout: Layout,
    number: u64,
    parts: &[(u32, u64, Vec<u8>)],
    tail: &mut Tail,
) -> Result<(), Error> {
    let transaction = database.begin_write()?;
    {
        match layout {
            Layout::Rows => {
                let mut rows = transaction.open_table(ROWS)?;
                for (stream, base, batch) in parts {
                    rows.insert((*stream, *base), &batch[..])?;
                }
            }
            Layout::LogAndIndex => {
                let mut value = Vec::new();
                let mut index = transaction.open_table(INDEX)?;
                for (stream, base, batch) in parts {
                    index.insert((*stream, *base), (number, value.len() as u32, batch.len() as u32))?;
                    value.extend_from_slice(batch);
                }
                transaction.open_table(LOG)?.insert(number, &value[..])?;
            }
            Layout::Tail => {
                let mut rows = transaction.open_table(ROWS)?;
                let mut log = transaction.open_table(LOG)?;
                let (mut value, mut kept, mut moved) = (Vec::new(), Vec::new(), Vec::new());
                for (stream, base, batch) in parts {
                    let piece = tail.pieces.entry(*stream).or_insert_with(|| (*base, Vec::new()));
                    let alone = piece.1.is_empty();
                    piece.1.extend_from_slice(batch);
                    if piece.1.len() >= FULL || (alone && batch.len() >= DIRECT) {
                        moved.push(*stream);
                    } else {
                        value.extend_from_slice(batch);
                        kept.push(*stream);
                    }
                }
                let mut bytes: usize = tail.values.values().map(|(bytes, _)| bytes).sum();
                for (size, streams) in tail.values.values() {
                    if bytes > TAIL_MAX {
                        moved.extend(streams.iter().filter(|stream| !moved.contains(stream)).collect::<Vec<_>>());
                        bytes -= size;
                    }
                }
                for stream in &moved {
                    if let Some((base, bytes)) = tail.pieces.remove(stream) {
                        for (n, chunk) in bytes.chunks(60_000).enumerate() {
                            rows.insert((*stream, base + n as u64), chunk)?;
                        }
                    }
                }
                for (_, streams) in tail.values.values_mut() {
                    streams.retain(|stream| !moved.contains(stream));
                }
                let dead: Vec<u64> =
                    tail.values.iter().filter(|(_, (_, streams))| streams.is_empty()).map(|(n, _)| *n).collect();
                for number in dead {
                    tail.values.remove(&number);
                    log.remove(number)?;
                }
                if !value.is_empty() {
                    log.insert(number, &value[..])?;
                    kept.retain(|stream| !moved.contains(stream));
                    tail.values.insert(number, (value.len(), kept));
                }
            }
        }
    }
    transaction.commit()?;
    Ok(())
}

fn open(path: &Path, written: &Arc<AtomicU64>) -> Result<Database, Error> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
    Ok(Builder::new().set_cache_size(8 << 20).create_with_backend(Counting(file, written.clone()))?)
}

fn run(dir: &Path, layout: Layout, streams: u32, per_commit: usize, commits: u64) -> Result<(), Error> {
    let path = dir.join("layout.redb");
    let _ = std::fs::remove_file(&path);
    let written = Arc::new(AtomicU64::new(0));
    let database = open(&path, &written)?;
    let mut tail = Tail::default();
    let mut seed = 1u64;
    let mut noise = move || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as u8
    };
    let pool: Vec<u8> = (0..1 << 20).map(|_| noise()).collect();
    let mut times = Vec::new();
    let start = Instant::now();
    for number in 0..commits {
        let active = (streams as usize).min(per_commit);
        let parts: Vec<(u32, u64, Vec<u8>)> = (0..active)
            .map(|n| {
                // One message per commit goes round the streams.
                let stream = (n as u64 + if per_commit < streams as usize { number } else { 0 }) as u32 % streams;
                let messages = per_commit / active;
                let length = BATCH + messages * RECORD;
                let from = (number as usize * 7919 + n * 104_729) % (pool.len() / 2);
                let bytes = pool[from..].iter().cycle().take(length).copied().collect();
                (stream, number * messages as u64, bytes)
            })
            .collect();
        let begin = Instant::now();
        commit(&database, layout, number, &parts, &mut tail)?;
        times.push(begin.elapsed());
    }
    let took = start.elapsed();
    times.sort();
    let payload = commits * per_commit as u64 * PAYLOAD as u64;
    let written_bytes = written.load(Ordering::Relaxed);
    // An unclean end: the handle is never dropped, so nothing is tidied up.
    std::mem::forget(database);
    let begin = Instant::now();
    let again = open(&path, &written)?;
    let opened = begin.elapsed();
    let rows = again.begin_read()?.open_table(ROWS).map_or(0, |rows| rows.range((0, 0)..).map_or(0, Iterator::count));
    let on_disk = std::fs::metadata(&path)?.blocks() * 512;
    println!(
        "| {layout:?} | {streams} | {per_commit} | {:.2} | {:.2} | {:.0} | {:.1} | {:.1} | {:.0} | {rows} |",
        written_bytes as f64 / payload as f64,
        on_disk as f64 / payload as f64,
        commits as f64 / took.as_secs_f64(),
        times[times.len() / 2].as_secs_f64() * 1e3,
        times[times.len() * 99 / 100].as_secs_f64() * 1e3,
        opened.as_secs_f64() * 1e3,
    );
    Ok(())
}

fn main() -> Result<(), Error> {
    let dir = std::env::args().nth(1).unwrap_or_else(|| ".".to_owned());
    println!(
        "| layout | streams | messages/commit | written/payload | file/payload | commits/s | p50 ms | p99 ms | open ms | rows |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    for (per_commit, commits) in [(1, 2000), (10, 2000), (100, 1500), (1000, 200)] {
        for streams in [1, 20] {
            for layout in [Layout::Rows, Layout::LogAndIndex, Layout::Tail] {
                run(Path::new(&dir), layout, streams, per_commit, commits)?;
            }
        }
    }
    let _ = std::fs::remove_file(Path::new(&dir).join("layout.redb"));
    Ok(())
}
