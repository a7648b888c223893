//! Chunks of archive objects on the local disk, bounded in bytes, for as long as the disk likes.
//!
//! A file is one chunk, named by the object's key and the position of its first byte. Segment objects never change and
//! have a random number in their names, so an entry can be damaged but not out of date. Nothing is synced: a file that
//! was torn by a power cut fails its checksum, is thrown away and fetched again. A disk that takes nothing more turns the
//! cache off, and it gives back what it had taken.
//!
//! ```text
//! {shard}-{seq:020}-{epoch:08}-{number:04}-{nonce:016x}-{start:012}
//! ```
//! A file is an [`envelope`](crate::envelope) with magic TRBC, version 1. Its payload is the object's bytes from `start`
//! on, and its context the file's name.

use std::collections::{HashSet, VecDeque};
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use bytes::Bytes;
use parking_lot::Mutex;
use tracing::{info, warn};

use super::super::store::off_async;
use super::{CHUNK_BYTES, TwoQueue};
use crate::buffers::{Buffer, Buffers};
use crate::envelope::{EnvelopeFormat, HEAD_BYTES};
use crate::manifest::SegmentId;

const FORMAT: EnvelopeFormat = EnvelopeFormat { magic: *b"TRBC", version: 1, kind: 0 };
/// What a file takes at least, and a multiple of what it takes.
const DISK_UNIT_BYTES: u64 = 4096;
/// Chunks that wait to be written; beyond it they are not kept.
const WRITES_WAITING_MAX: usize = 32;
/// Buffers kept for later reads.
const IDLE_BYTES_MAX: usize = 8 << 20;

/// Which bytes: of an object of a shard, from `start` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct ChunkId {
    pub shard: u32,
    pub object: SegmentId,
    pub start: u64,
}

impl ChunkId {
    fn file_name(&self) -> String {
        let SegmentId { seq, epoch, number, nonce } = self.object;
        format!("{}-{seq:020}-{epoch:08}-{number:04}-{nonce:016x}-{:012}", self.shard, self.start)
    }

    fn parse(name: &str) -> Option<Self> {
        let mut fields = name.split('-');
        let id = Self {
            shard: fields.next()?.parse().ok()?,
            object: SegmentId {
                seq: fields.next()?.parse().ok()?,
                epoch: fields.next()?.parse().ok()?,
                number: fields.next()?.parse().ok()?,
                nonce: u64::from_str_radix(fields.next()?, 16).ok()?,
            },
            start: fields.next()?.parse().ok()?,
        };
        (id.file_name() == name).then_some(id)
    }
}

/// The cache. One serves all shards of a node.
#[derive(Debug)]
pub struct DiskCache {
    directory: PathBuf,
    bytes_max: u64,
    kept: Mutex<TwoQueue<ChunkId, ()>>,
    jobs: Mutex<Jobs>,
    is_off: AtomicBool,
    /// What files are read to.
    buffers: Buffers,
}

/// What one thread at a time does to the directory, in this order.
#[derive(Debug, Default)]
struct Jobs {
    waiting: VecDeque<Job>,
    writes: usize,
    is_running: bool,
}

#[derive(Debug)]
enum Job {
    Write(ChunkId, Bytes),
    Remove(ChunkId),
}

impl DiskCache {
    /// Opens a directory, which is made if need be, and keeps what is in it within `bytes_max`. With 0 it is emptied.
    pub fn open(directory: &Path, bytes_max: u64) -> io::Result<Arc<Self>> {
        fs::create_dir_all(directory)?;
        let mut found = Vec::new();
        for file in fs::read_dir(directory)? {
            let file = file?;
            // What is not ours is not touched.
            let Some(id) = file.file_name().to_str().and_then(ChunkId::parse) else { continue };
            let metadata = file.metadata()?;
            found.push((metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH), metadata.len(), id));
        }
        found.sort_by_key(|(written, _, id)| (*written, id.object, id.start));
        let cache = Self {
            directory: directory.to_owned(),
            bytes_max,
            // One chunk is written before what must go for it is removed.
            kept: Mutex::new(TwoQueue::new(bytes_max.saturating_sub(disk_bytes(CHUNK_BYTES)))),
            jobs: Mutex::default(),
            is_off: AtomicBool::new(bytes_max == 0),
            buffers: Buffers::new(IDLE_BYTES_MAX),
        };
        for (_, length, id) in &found {
            let gone = cache.kept.lock().insert(*id, (), disk_bytes(length.saturating_sub(HEAD_BYTES as u64)));
            for (id, ()) in gone {
                fs::remove_file(cache.path(&id))?;
            }
        }
        info!(directory = %directory.display(), bytes = cache.bytes(), bytes_max, "disk cache is open");
        Ok(Arc::new(cache))
    }

    /// Bytes of files.
    pub fn bytes(&self) -> u64 {
        self.kept.lock().weight()
    }

    /// Their bound.
    pub fn bytes_max(&self) -> u64 {
        self.bytes_max
    }

    /// Whether the disk took something it was asked to take no longer.
    pub fn is_off(&self) -> bool {
        self.is_off.load(Ordering::Relaxed)
    }

    /// The `length` bytes of a chunk, if they are here and sound.
    pub(super) async fn get(self: &Arc<Self>, id: ChunkId, length: usize) -> Option<Bytes> {
        self.kept.lock().get(&id)?;
        let cache = self.clone();
        let read = off_async(move || read_file(&cache.path(&id), &id, cache.buffers.take_exactly(length))).await?;
        match read {
            Ok(bytes) => Some(bytes),
            Err(error) => {
                warn!(%error, file = id.file_name(), "an entry of the disk cache is damaged and fetched again");
                self.forget(id);
                None
            }
        }
    }

    /// Keeps a chunk, some time soon; drops it if more wait already than the disk can take.
    pub(super) fn keep(self: &Arc<Self>, id: ChunkId, bytes: Bytes) {
        if !self.is_off() && !self.kept.lock().contains(&id) {
            self.give(Job::Write(id, bytes));
        }
    }

    /// Drops a chunk.
    pub(super) fn forget(self: &Arc<Self>, id: ChunkId) {
        {
            let mut jobs = self.jobs.lock();
            let before = jobs.waiting.len();
            jobs.waiting.retain(|job| !matches!(job, Job::Write(waiting, _) if *waiting == id));
            jobs.writes -= before - jobs.waiting.len();
        }
        if self.kept.lock().remove(&id).is_some() {
            self.give(Job::Remove(id));
        }
    }

    /// Drops the chunks of a shard's objects that are not in `live`.
    pub(super) fn retain(self: &Arc<Self>, shard: u32, live: &HashSet<SegmentId>) {
        let gone = self.kept.lock().retain(|id| id.shard != shard || live.contains(&id.object));
        for id in gone {
            self.give(Job::Remove(id));
        }
    }

    fn path(&self, id: &ChunkId) -> PathBuf {
        self.directory.join(id.file_name())
    }

    /// Hands a job to the thread that is at it, or to a new one. What waits is bounded: writes by their number, removals
    /// by that of the entries.
    fn give(self: &Arc<Self>, job: Job) {
        {
            let mut jobs = self.jobs.lock();
            if matches!(job, Job::Write(..)) {
                if jobs.writes >= WRITES_WAITING_MAX {
                    return;
                }
                jobs.writes += 1;
            }
            jobs.waiting.push_back(job);
            if std::mem::replace(&mut jobs.is_running, true) {
                return;
            }
        }
        let cache = self.clone();
        let work = move || {
            while let Some(job) = cache.next_job() {
                cache.perform(job);
            }
        };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(work)),
            Err(_) => work(),
        }
    }

    fn next_job(&self) -> Option<Job> {
        let mut jobs = self.jobs.lock();
        let job = jobs.waiting.pop_front();
        match &job {
            Some(Job::Write(..)) => jobs.writes -= 1,
            Some(Job::Remove(_)) => {}
            None => jobs.is_running = false,
        }
        job
    }

    fn perform(&self, job: Job) {
        let done = match job {
            Job::Write(id, _) | Job::Remove(id) if self.kept.lock().contains(&id) => Ok(()),
            Job::Write(..) if self.is_off() => Ok(()),
            Job::Write(id, bytes) => self.write(id, &bytes),
            Job::Remove(id) => self.remove_file(&id),
        };
        if let Err(error) = done {
            self.turn_off(&error);
        }
    }

    fn write(&self, id: ChunkId, bytes: &[u8]) -> io::Result<()> {
        let path = self.path(&id);
        if let Err(error) = write_file(&path, &id, bytes) {
            // What there is of it takes room and is of no use.
            let _ = fs::remove_file(&path);
            return Err(error);
        }
        let gone = self.kept.lock().insert(id, (), disk_bytes(bytes.len() as u64));
        gone.iter().try_for_each(|(id, ())| self.remove_file(id))
    }

    fn remove_file(&self, id: &ChunkId) -> io::Result<()> {
        match fs::remove_file(self.path(id)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn turn_off(&self, error: &io::Error) {
        if !self.is_off.swap(true, Ordering::Relaxed) {
            let directory = self.directory.display();
            warn!(%error, %directory, "the disk cache is off until the next start; archived records come from the bucket");
        }
        for id in self.kept.lock().retain(|_| false) {
            // The disk may refuse this too; a start looks again.
            let _ = fs::remove_file(self.path(&id));
        }
    }

    /// Waits until nothing waits to be written.
    #[cfg(test)]
    pub async fn settled(&self) {
        while self.jobs.lock().is_running {
            tokio::task::yield_now().await;
        }
    }
}

/// What a file of so many bytes of an object takes on the disk.
fn disk_bytes(length: u64) -> u64 {
    (length + HEAD_BYTES as u64).next_multiple_of(DISK_UNIT_BYTES)
}

fn write_file(path: &Path, id: &ChunkId, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(&FORMAT.head(id.file_name().as_bytes(), bytes))?;
    file.write_all(bytes)
}

/// Fills `buffer` with all that an entry has.
fn read_file(path: &Path, id: &ChunkId, mut buffer: Buffer) -> io::Result<Bytes> {
    let mut file = File::open(path)?;
    let (length, found) = (buffer.as_ref().len(), file.metadata()?.len());
    if found != (HEAD_BYTES + length) as u64 {
        return Err(io::Error::other(format!("expected {} bytes, found {found}", HEAD_BYTES + length)));
    }
    let mut head = [0; HEAD_BYTES];
    file.read_exact(&mut head)?;
    file.read_exact(buffer.bytes_mut())?;
    let bytes = buffer.freeze(length);
    FORMAT.check(&head, id.file_name().as_bytes(), &bytes).map_err(io::Error::other)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    const LENGTH: usize = 5000;
    /// Room for ten chunks of `LENGTH`.
    const ROOM: u64 = CHUNK_BYTES + 4096 + 10 * 8192;

    fn id(number: u64) -> ChunkId {
        ChunkId { shard: 3, object: SegmentId { seq: 7, epoch: 2, number: 0, nonce: number }, start: 1 << 20 }
    }

    fn bytes(number: u64) -> Bytes {
        vec![number as u8; LENGTH].into()
    }

    fn open(directory: &TempDir) -> Arc<DiskCache> {
        DiskCache::open(directory.path(), ROOM).unwrap()
    }

    fn on_disk(directory: &TempDir) -> u64 {
        let files = fs::read_dir(directory.path()).unwrap().map(Result::unwrap);
        files.map(|file| file.metadata().unwrap().len().next_multiple_of(4096)).sum()
    }

    #[test]
    fn golden_file() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("x");
        write_file(&path, &id(0xab), b"object").unwrap();
        let hex: String = fs::read(&path).unwrap().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(id(0xab).file_name(), "3-00000000000000000007-00000002-0000-00000000000000ab-000001048576");
        assert_eq!(hex, "545242430001000000000006a5bbaec56f626a656374");
        assert_eq!(ChunkId::parse(&id(9).file_name()), Some(id(9)));
        for other in ["", "3-7-2-0-ab-1", "a-b-c-d-e-f", "lost+found"] {
            assert_eq!(ChunkId::parse(other), None, "{other}");
        }
    }

    #[tokio::test]
    async fn what_is_kept_is_there_after_a_restart_and_within_the_bound() {
        let directory = TempDir::new().unwrap();
        let cache = open(&directory);
        for number in 0..30 {
            cache.keep(id(number), bytes(number));
            cache.settled().await;
            assert!(on_disk(&directory) <= ROOM - CHUNK_BYTES);
        }
        assert_eq!((cache.bytes(), cache.get(id(3), LENGTH).await), (10 * 8192, None));
        drop(cache);
        fs::write(directory.path().join("not-ours"), "x").unwrap();
        let cache = open(&directory);
        for number in 20..30 {
            assert_eq!(cache.get(id(number), LENGTH).await, Some(bytes(number)), "{number}");
        }
        // A smaller bound holds from the start on, and none at all empties it.
        let smaller = DiskCache::open(directory.path(), ROOM - 5 * 8192).unwrap();
        assert_eq!((smaller.bytes(), on_disk(&directory)), (5 * 8192, 5 * 8192 + 4096));
        let none = DiskCache::open(directory.path(), 0).unwrap();
        none.keep(id(1), bytes(1));
        assert_eq!((none.bytes(), on_disk(&directory)), (0, 4096));
    }

    #[tokio::test]
    async fn a_damaged_torn_or_renamed_file_is_dropped_and_not_served() {
        let directory = TempDir::new().unwrap();
        let cache = open(&directory);
        let path = cache.path(&id(1));
        for number in 0..6 {
            let damage = |file: &mut Vec<u8>| match number {
                0 => file[700] ^= 4,
                1 => file[14] ^= 4,
                2 => file[5] ^= 4,
                3 => file.truncate(900),
                4 => file.clear(),
                _ => file.push(0),
            };
            cache.keep(id(1), bytes(1));
            cache.settled().await;
            assert_eq!(cache.get(id(1), LENGTH).await, Some(bytes(1)));
            let mut file = fs::read(&path).unwrap();
            damage(&mut file);
            fs::write(&path, file).unwrap();
            assert_eq!(cache.get(id(1), LENGTH).await, None, "damage {number}");
            cache.settled().await;
            assert!(!path.exists(), "damage {number}");
        }
        cache.keep(id(2), bytes(2));
        cache.keep(id(1), bytes(1));
        cache.settled().await;
        fs::copy(cache.path(&id(2)), &path).unwrap();
        assert_eq!(cache.get(id(1), LENGTH).await, None, "another chunk's file");
        assert_eq!(cache.get(id(2), LENGTH - 1).await, None, "another length");
    }

    #[tokio::test]
    async fn a_disk_that_takes_nothing_more_turns_the_cache_off_and_gets_its_room_back() {
        let directory = TempDir::new().unwrap();
        let cache = open(&directory);
        cache.keep(id(1), bytes(1));
        cache.settled().await;
        // A file cannot be made where a directory stands.
        fs::create_dir(cache.path(&id(2))).unwrap();
        cache.keep(id(2), bytes(2));
        cache.settled().await;
        assert!(cache.is_off());
        assert_eq!((cache.bytes(), cache.path(&id(1)).exists(), cache.get(id(1), LENGTH).await), (0, false, None));
        cache.keep(id(3), bytes(3));
        cache.settled().await;
        assert!(!cache.path(&id(3)).exists());
    }

    #[tokio::test]
    async fn chunks_of_objects_that_are_gone_are_removed() {
        let directory = TempDir::new().unwrap();
        let cache = open(&directory);
        let other = ChunkId { shard: 4, ..id(1) };
        for id in [id(1), id(2), other] {
            cache.keep(id, bytes(1));
        }
        cache.settled().await;
        cache.retain(3, &HashSet::from([id(2).object]));
        cache.settled().await;
        assert_eq!([id(1), id(2), other].map(|id| cache.path(&id).exists()), [false, true, true]);
    }

    #[test]
    fn without_a_runtime_it_works_in_place() {
        let directory = TempDir::new().unwrap();
        let cache = open(&directory);
        cache.keep(id(1), bytes(1));
        assert_eq!(shared::log::conformance::block_on(cache.get(id(1), LENGTH)), Some(bytes(1)));
    }
}
