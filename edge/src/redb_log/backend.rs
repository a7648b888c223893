//! The file under redb: capped, and full in a way that can be survived.
//!
//! redb grows its file by doubling, and takes an error from below as the end of the handle. So the file may be as long as
//! redb wishes (the tail is a hole and takes no blocks), and what is bounded is the part that was ever written: a write
//! into a new chunk beyond the bound fails with [`io::ErrorKind::StorageFull`] and nothing of it is written. The store
//! admits records by its own, lower bound, so this one is met only when the estimate was wrong; [`DiskBound::raise`] then
//! lends the reserve to the commit that deletes.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;
use redb::StorageBackend;

/// Opens the storage afresh, as after an I/O error. Tests put doubles here.
pub type OpenStorage = Arc<dyn Fn() -> io::Result<Box<dyn StorageBackend>> + Send + Sync>;

/// Says how many bytes the disk has free, if anybody knows.
pub type FreeBytes = Box<dyn Fn() -> Option<u64> + Send + Sync>;

/// The bound of a database file, its use, and what was written, across reopenings.
#[derive(Default)]
pub struct DiskBound {
    bytes_max: u64,
    reserve: u64,
    free: Option<FreeBytes>,
    raised: AtomicBool,
    used: AtomicU64,
    written: AtomicU64,
    syncs: AtomicU64,
}

impl DiskBound {
    /// `bytes_max` in all, `reserve` of it only while raised.
    pub fn new(bytes_max: u64, reserve: u64) -> Arc<Self> {
        Arc::new(Self { bytes_max, reserve: reserve.min(bytes_max), ..Self::default() })
    }

    /// The same, on a disk that can be asked what it has free.
    pub fn on_disk(bytes_max: u64, reserve: u64, free: FreeBytes) -> Arc<Self> {
        Arc::new(Self { bytes_max, reserve: reserve.min(bytes_max), free: Some(free), ..Self::default() })
    }

    /// What the disk has free.
    pub fn free(&self) -> Option<u64> {
        self.free.as_ref().and_then(|free| free())
    }

    /// Lends or takes back the reserve.
    pub fn raise(&self, raised: bool) {
        self.raised.store(raised, Ordering::Relaxed);
    }

    /// What may be written now.
    pub fn bytes_max(&self) -> u64 {
        if self.raised.load(Ordering::Relaxed) { self.bytes_max } else { self.bytes_max - self.reserve }
    }

    /// What was ever written of the file, in bytes.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Bytes handed to the disk since the start.
    pub fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Syncs since the start.
    pub fn syncs(&self) -> u64 {
        self.syncs.load(Ordering::Relaxed)
    }
}

impl std::fmt::Debug for DiskBound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DiskBound")
            .field("bytes_max", &self.bytes_max)
            .field("used", &self.used)
            .finish_non_exhaustive()
    }
}

/// A file that takes no more than its [`DiskBound`].
#[derive(Debug)]
pub struct CappedFile {
    file: File,
    bound: Arc<DiskBound>,
    written: Mutex<Chunks>,
}

/// Granule in which use is counted.
const CHUNK_BYTES: u64 = 64 * 1024;

/// One bit per chunk that was ever written.
#[derive(Debug, Default)]
struct Chunks {
    bits: Vec<u64>,
    count: u64,
}

impl Chunks {
    fn has(&self, chunk: u64) -> bool {
        self.bits.get((chunk / 64) as usize).is_some_and(|word| word >> (chunk % 64) & 1 == 1)
    }

    fn add(&mut self, chunk: u64) {
        let word = (chunk / 64) as usize;
        if self.bits.len() <= word {
            self.bits.resize(word + 1, 0);
        }
        if !self.has(chunk)
            && let Some(word) = self.bits.get_mut(word)
        {
            *word |= 1 << (chunk % 64);
            self.count += 1;
        }
    }

    /// Forgets the chunks from `chunk` on.
    fn cut(&mut self, chunk: u64) {
        let end = self.bits.len() as u64 * 64;
        for gone in chunk..end {
            if self.has(gone)
                && let Some(word) = self.bits.get_mut((gone / 64) as usize)
            {
                *word &= !(1 << (gone % 64));
                self.count -= 1;
            }
        }
    }
}

fn chunks_of(offset: u64, length: u64) -> std::ops::RangeInclusive<u64> {
    let last = offset.saturating_add(length.saturating_sub(1));
    offset / CHUNK_BYTES..=last / CHUNK_BYTES
}

impl CappedFile {
    /// Opens or makes the file.
    pub fn open(path: &Path, bound: Arc<DiskBound>) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        // After a failed sync the page cache may show what the disk does not hold. Dropping what is clean makes the
        // database read, and check, the disk. Only advice: a file system may ignore it.
        let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
        let written = written_chunks(&file)?;
        bound.used.store(written.count * CHUNK_BYTES, Ordering::Relaxed);
        Ok(Self { file, bound, written: Mutex::new(written) })
    }

    /// What [`OpenStorage`] asks for.
    pub fn opener(path: PathBuf, bound: Arc<DiskBound>) -> OpenStorage {
        Arc::new(move || Ok(Box::new(Self::open(&path, bound.clone())?)))
    }
}

/// The chunks that hold data, as the file system knows them; all, where it does not know.
fn written_chunks(file: &File) -> io::Result<Chunks> {
    use rustix::fs::SeekFrom;
    let length = file.metadata()?.len();
    let mut chunks = Chunks::default();
    let mut at = 0;
    while at < length {
        let from = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(from) => from,
            Err(rustix::io::Errno::NXIO) => break,
            Err(_) => at,
        };
        let to = rustix::fs::seek(file, SeekFrom::Hole(from)).unwrap_or(length).max(from + 1);
        chunks_of(from, to - from).for_each(|chunk| chunks.add(chunk));
        at = to;
    }
    Ok(chunks)
}

impl StorageBackend for CappedFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(out, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut written = self.written.lock();
        self.file.set_len(len)?;
        written.cut(len.div_ceil(CHUNK_BYTES));
        self.bound.used.store(written.count * CHUNK_BYTES, Ordering::Relaxed);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.bound.syncs.fetch_add(1, Ordering::Relaxed);
        self.file.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut written = self.written.lock();
        let touched = chunks_of(offset, data.len() as u64);
        let new = touched.clone().filter(|chunk| !written.has(*chunk)).count() as u64;
        if new > 0 && (written.count + new) * CHUNK_BYTES > self.bound.bytes_max() {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "the database has reached its disk budget"));
        }
        self.file.write_all_at(data, offset)?;
        touched.for_each(|chunk| written.add(chunk));
        self.bound.used.store(written.count * CHUNK_BYTES, Ordering::Relaxed);
        self.bound.written.fetch_add(data.len() as u64, Ordering::Relaxed);
        Ok(())
    }
}

/// A backend whose kind is known at run time only.
#[derive(Debug)]
pub(super) struct AnyStorage(pub(super) Box<dyn StorageBackend>);

impl StorageBackend for AnyStorage {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.0.close()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_takes_no_more_than_its_bound_and_old_places_stay_writable() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let bound = DiskBound::new(4 * CHUNK_BYTES, CHUNK_BYTES);
        let file = CappedFile::open(&path, bound.clone()).unwrap();
        file.set_len(1 << 30).unwrap();
        assert_eq!(bound.used(), 0, "length alone takes nothing");
        for chunk in [0u64, 1000, 3] {
            file.write(chunk * CHUNK_BYTES + 5, b"x").unwrap();
        }
        let full = file.write(77 * CHUNK_BYTES, b"x").unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::StorageFull);
        let crossing = file.write(4 * CHUNK_BYTES - 1, b"xy").unwrap_err();
        assert_eq!(crossing.kind(), io::ErrorKind::StorageFull);
        file.write(1000 * CHUNK_BYTES, b"again").unwrap();
        bound.raise(true);
        file.write(77 * CHUNK_BYTES, b"x").unwrap();
        bound.raise(false);
        file.sync_data().unwrap();
        drop(file);
        let file = CappedFile::open(&path, bound.clone()).unwrap();
        assert_eq!(bound.used(), 4 * CHUNK_BYTES, "holes are known again after reopening");
        file.set_len(80 * CHUNK_BYTES).unwrap();
        assert_eq!(bound.used(), 3 * CHUNK_BYTES);
        file.set_len(CHUNK_BYTES).unwrap();
        file.write(0, b"x").unwrap();
        assert_eq!((bound.used(), bound.syncs()), (CHUNK_BYTES, 1));
        // Three bytes at first, then five, one with the reserve, one now; what was refused never reached the file.
        assert_eq!(bound.written(), 10, "every byte that reached the file, and no other");
    }
}
