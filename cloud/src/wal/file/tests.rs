use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bytes::BytesMut;
use tempfile::TempDir;

use super::super::disk::Directory;
use super::*;

/// Sound bytes that tell their number and version.
pub fn block(seq: u64, version: u8, bytes: usize) -> Bytes {
    let mut out = BytesMut::new();
    out.put_u64(seq);
    out.put_bytes(version, bytes.max(16) - 12);
    out.put_u32(crc32c::crc32c(&out));
    out.freeze()
}

fn small() -> FileWalSettings {
    FileWalSettings { file_bytes: 8 << 10, hasty_file_bytes: 4 << 10, bytes_max: 32 << 10, background: false }
}

fn open(directory: &TempDir) -> Result<FileWal, WalError> {
    FileWal::open(Box::new(Directory::open(directory.path())?), small(), 7)
}

fn append(wal: &FileWal, seqs: std::ops::Range<u64>, bytes: usize) {
    seqs.for_each(|seq| wal.append(seq, &block(seq, 1, bytes)).unwrap());
}

fn flip(directory: &TempDir, name: &str, position: usize) {
    let path = directory.path().join(name);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[position] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn golden_frame_and_slot() {
    let hex = |bytes: Bytes| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let frame = Frame { wal_id: 7, generation: 3, seq: 9, bytes: 1000 }.encode();
    let fields = "0000000000000007 0000000000000003 0000000000000009".replace(' ', "");
    assert_eq!(hex(frame), format!("545257460001000000000030237ac12a{fields}000003e8{}", "00".repeat(20)));
    let slot = Slot { wal_id: 7, count: 3, trim: 9, has_blocks: true, resetting: true }.encode();
    assert_eq!(hex(slot), format!("5452575200010000000000302a67f3b8{fields}0003{}", "00".repeat(22)));
}

#[test]
fn a_ring_of_another_version_is_said_to_be_one() {
    let directory = TempDir::new().unwrap();
    append(&open(&directory).unwrap(), 0..3, 1000);
    let path = directory.path().join("ring");
    let mut ring = std::fs::read(&path).unwrap();
    for slot in [0, 512] {
        // The other slot was written before it, by this build.
        let mut newer = ring.clone();
        let bytes = EnvelopeFormat { version: 2, ..RING }.seal(&ring[slot + HEAD_BYTES..slot + FRAME_BYTES]);
        newer[slot..slot + FRAME_BYTES].copy_from_slice(&bytes);
        std::fs::write(&path, newer).unwrap();
        let refused = open(&directory).err().expect("a newer build's").to_string();
        assert!(refused.contains("has version 2, this build reads 1"), "{refused}");
    }
    ring[5] ^= 3;
    std::fs::write(&path, ring).unwrap();
    assert_eq!(open(&directory).unwrap().bounds(), Some((0, 3)), "damaged, and the other slot holds");
}

#[test]
fn blocks_are_read_back_after_opening_again() {
    let directory = TempDir::new().unwrap();
    let wal = open(&directory).unwrap();
    assert_eq!(wal.bounds(), None);
    append(&wal, 5..25, 700);
    drop(wal);
    let wal = open(&directory).unwrap();
    assert_eq!(wal.bounds(), Some((5, 25)));
    for seq in 5..25 {
        assert_eq!(wal.read(seq).unwrap(), block(seq, 1, 700));
        assert_eq!(wal.read_part(seq, 2, 6).unwrap(), block(seq, 1, 700)[2..8]);
    }
    assert!(matches!(wal.read(25), Err(WalError::NotThere { requested: 25, first: 5, next: 25 })));
    assert!(matches!(wal.append(26, &block(26, 1, 20)), Err(WalError::WrongSequence { expected: 25, found: 26 })));
    append(&wal, 25..26, 20);
}

#[test]
fn a_second_process_is_refused() {
    let directory = TempDir::new().unwrap();
    let _first = open(&directory).unwrap();
    let Err(refused) = open(&directory) else { panic!("opened twice") };
    assert!(matches!(&refused, WalError::Locked(_)), "{refused}");
    assert!(refused.to_string().contains("data_dir"), "{refused}");
}

#[test]
fn a_full_wal_refuses_and_takes_again_after_a_trim() {
    let directory = TempDir::new().unwrap();
    let wal = open(&directory).unwrap();
    let mut next = 0;
    while wal.append(next, &block(next, 1, 1000)).is_ok() {
        next += 1;
    }
    assert_eq!(next, 4 * 5, "four files of 8 KiB, five frames of 1.5 KiB in each");
    assert!(matches!(wal.append(next, &block(next, 1, 1000)), Err(WalError::Full(_))));
    assert_eq!(wal.usage().held_bytes, 32 << 10);
    wal.trim(10).unwrap();
    append(&wal, next..next + 10, 1000);
    assert!(wal.append(next + 10, &block(next + 10, 1, 1000)).is_err());
    drop(wal);
    let wal = open(&directory).unwrap();
    assert_eq!(wal.bounds(), Some((10, 30)));
    assert_eq!(wal.read(29).unwrap(), block(29, 1, 1000));
}

#[test]
fn the_newest_block_is_never_trimmed() {
    let directory = TempDir::new().unwrap();
    let wal = open(&directory).unwrap();
    append(&wal, 0..9, 1000);
    wal.trim(100).unwrap();
    assert_eq!(wal.bounds(), Some((8, 9)));
    assert_eq!(wal.usage().bytes, 1000);
    drop(wal);
    assert_eq!(open(&directory).unwrap().bounds(), Some((8, 9)));
}

#[test]
fn files_are_written_again() {
    let directory = TempDir::new().unwrap();
    let wal = open(&directory).unwrap();
    for seq in 0..200 {
        wal.append(seq, &block(seq, 1, 1000)).unwrap();
        wal.trim(seq.saturating_sub(3)).unwrap();
    }
    assert!(std::fs::read_dir(directory.path()).unwrap().count() <= 6, "ring, lock and a few files");
    drop(wal);
    assert_eq!(open(&directory).unwrap().bounds(), Some((196, 200)));
}

#[test]
fn a_torn_tail_is_cut() {
    let directory = TempDir::new().unwrap();
    let wal = open(&directory).unwrap();
    append(&wal, 0..3, 1000);
    drop(wal);
    flip(&directory, "00000001.wal", 2 * 1536 + 500);
    let wal = open(&directory).unwrap();
    assert_eq!(wal.bounds(), Some((0, 2)));
    wal.append(2, &block(2, 9, 100)).unwrap();
    drop(wal);
    assert_eq!(open(&directory).unwrap().read(2).unwrap(), block(2, 9, 100));
}

#[test]
fn a_bad_block_before_a_good_one_stops_the_start() {
    // The same file, the file before, the frame's head, and the first frame of a file.
    for (name, position) in [
        ("00000001.wal", 600),
        ("00000001.wal", 1536 + 10),
        ("00000001.wal", 4 * 1536 + 100),
        ("00000002.wal", 70),
        ("00000002.wal", 3),
        ("00000003.wal", 3),
    ] {
        let directory = TempDir::new().unwrap();
        let wal = open(&directory).unwrap();
        append(&wal, 0..12, 1000);
        drop(wal);
        flip(&directory, name, position);
        let Err(refused) = open(&directory) else { panic!("{name} {position}: started") };
        assert!(matches!(refused, WalError::Corrupt(_)), "{refused}");
        assert!(refused.to_string().contains("start from the archive"), "{refused}");
        flip(&directory, name, position);
        assert_eq!(open(&directory).unwrap().bounds(), Some((0, 12)), "a refused start changed nothing");
    }
}

#[test]
fn missing_files_stop_the_start() {
    for name in ["00000001.wal", "00000002.wal", "ring"] {
        let directory = TempDir::new().unwrap();
        append(&open(&directory).unwrap(), 0..12, 1000);
        std::fs::remove_file(directory.path().join(name)).unwrap();
        assert!(matches!(open(&directory), Err(WalError::Corrupt(_))), "{name}");
    }
}

#[test]
fn a_reset_begins_anew() {
    let directory = TempDir::new().unwrap();
    let wal = open(&directory).unwrap();
    append(&wal, 0..12, 1000);
    wal.reset(100).unwrap();
    assert_eq!(wal.bounds(), None);
    append(&wal, 100..103, 1000);
    drop(wal);
    let wal = open(&directory).unwrap();
    assert_eq!(wal.bounds(), None, "provisional until settled");
    wal.reset(200).unwrap();
    append(&wal, 200..203, 1000);
    wal.settle().unwrap();
    drop(wal);
    let wal = open(&directory).unwrap();
    assert_eq!(wal.bounds(), Some((200, 203)));
}

#[test]
fn the_next_file_is_made_ahead() {
    let directory = TempDir::new().unwrap();
    let settings = FileWalSettings { background: true, ..small() };
    let wal = FileWal::open(Box::new(Directory::open(directory.path()).unwrap()), settings, 7).unwrap();
    for seq in 0..200 {
        wal.append(seq, &block(seq, 1, 1000)).unwrap();
        wal.trim(seq.saturating_sub(3)).unwrap();
    }
    drop(wal);
    assert_eq!(open(&directory).unwrap().bounds(), Some((196, 200)));
}

#[test]
fn parts_are_read_in_one_and_announced_where_they_lie_apart() {
    let directory = TempDir::new().unwrap();
    let settings = FileWalSettings { file_bytes: 256 << 10, bytes_max: 1 << 20, ..small() };
    let switch = Arc::new(Switch::default());
    let disk = Failing { directory: Directory::open(directory.path()).unwrap(), switch: switch.clone() };
    let wal = FileWal::open(Box::new(disk), settings, 7).unwrap();
    let bytes = 40_000;
    append(&wal, 5..10, bytes);
    let part = |seq, position, bytes| Part { seq, position, bytes };
    let expect = |parts: &[Part]| -> Vec<Bytes> {
        let cut = |part: &Part| {
            let from = part.position as usize;
            block(part.seq, 1, bytes).slice(from..from + part.bytes as usize)
        };
        parts.iter().map(cut).collect()
    };
    // One, or the end of a block and the beginning of the next.
    for parts in [&[part(6, 100, 300)][..], &[part(6, 30_000, 10_000), part(7, 60, 39_000), part(8, 0, 5)][..]] {
        assert_eq!(wal.read_parts(parts).unwrap(), expect(parts));
        assert!(switch.announced.lock().is_empty());
    }
    let parts = [part(5, 8, 1000), part(6, 8, 1000), part(9, 8, 1000)];
    assert_eq!(wal.read_parts(&parts).unwrap(), expect(&parts));
    let taken = Frame::taken(bytes as u64);
    assert_eq!(*switch.announced.lock(), [72, 72 + taken, 72 + 4 * taken].map(|position| (position, 1000)));
    // Those before the first that cannot be read, but one at least.
    let missing = [parts[0], part(6, 39_000, 1001), parts[2]];
    assert_eq!(wal.read_parts(&missing).unwrap(), expect(&parts[..1]));
    assert!(matches!(wal.read_parts(&missing[1..]), Err(WalError::Corrupt(_))));
    assert!(matches!(wal.read_parts(&[part(10, 0, 1)]), Err(WalError::NotThere { requested: 10, .. })));
}

/// A directory whose files fail on order.
struct Failing {
    directory: Directory,
    switch: Arc<Switch>,
}

#[derive(Default)]
struct Switch {
    sync: AtomicBool,
    full: AtomicBool,
    /// What the disk says that it has left.
    free: Mutex<Option<u64>>,
    written: AtomicUsize,
    announced: Mutex<Vec<(u64, u64)>>,
}

struct FailingFile(Arc<dyn DiskFile>, Arc<Switch>);

impl Failing {
    fn wrap(&self, file: io::Result<Arc<dyn DiskFile>>) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(FailingFile(file?, self.switch.clone())))
    }
}

impl Disk for Failing {
    fn list(&self) -> io::Result<Vec<String>> {
        self.directory.list()
    }
    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        self.wrap(self.directory.create(name))
    }
    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        self.wrap(self.directory.open(name))
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.directory.rename(from, to)
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        self.directory.remove(name)
    }
    fn sync_dir(&self) -> io::Result<()> {
        self.directory.sync_dir()
    }
    fn free_bytes(&self) -> Option<u64> {
        *self.switch.free.lock()
    }
}

impl DiskFile for FailingFile {
    fn bytes(&self) -> io::Result<u64> {
        self.0.bytes()
    }
    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<()> {
        self.0.read_at(buffer, position)
    }
    fn will_read(&self, position: u64, bytes: u64) {
        self.1.announced.lock().push((position, bytes));
    }
    fn write_at(&self, bytes: &[u8], position: u64) -> io::Result<()> {
        if self.1.full.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.1.written.fetch_add(bytes.len(), Ordering::SeqCst);
        self.0.write_at(bytes, position)
    }
    fn sync(&self) -> io::Result<()> {
        if self.1.sync.load(Ordering::SeqCst) {
            return Err(io::Error::other("EIO"));
        }
        self.0.sync()
    }
}

fn failing(directory: &TempDir) -> (FileWal, Arc<Switch>) {
    let switch = Arc::new(Switch::default());
    let disk = Failing { directory: Directory::open(directory.path()).unwrap(), switch: switch.clone() };
    (FileWal::open(Box::new(disk), small(), 7).unwrap(), switch)
}

#[test]
fn after_a_failed_sync_nothing_is_taken() {
    let directory = TempDir::new().unwrap();
    let (wal, switch) = failing(&directory);
    append(&wal, 0..2, 100);
    switch.sync.store(true, Ordering::SeqCst);
    assert!(matches!(wal.append(2, &block(2, 1, 100)), Err(WalError::Io(_))));
    switch.sync.store(false, Ordering::SeqCst);
    assert!(matches!(wal.append(2, &block(2, 1, 100)), Err(WalError::Io(_))), "a second sync may lie");
    assert_eq!(wal.read(1).unwrap(), block(1, 1, 100), "what was acknowledged can be read");
    drop(wal);
    let next = open(&directory).unwrap().bounds().unwrap().1;
    assert!(next == 2 || next == 3, "the unanswered block is there or not, whole");
}

#[test]
fn a_start_writes_the_newest_block_again() {
    let directory = TempDir::new().unwrap();
    let (wal, switch) = failing(&directory);
    append(&wal, 0..3, 100);
    switch.sync.store(true, Ordering::SeqCst);
    assert!(wal.append(3, &block(3, 1, 100)).is_err());
    drop(wal);
    // The page cache shows the block, and the kernel has already told of its failure: a sync alone would prove nothing.
    let before = switch.written.load(Ordering::SeqCst);
    switch.sync.store(false, Ordering::SeqCst);
    let disk = Failing { directory: Directory::open(directory.path()).unwrap(), switch: switch.clone() };
    let wal = FileWal::open(Box::new(disk), small(), 7).unwrap();
    assert_eq!(wal.bounds(), Some((0, 4)));
    assert_eq!(switch.written.load(Ordering::SeqCst) - before, 64 + (64 + 100), "the slot in force and the block");
}

#[test]
fn a_full_disk_refuses_and_goes_on_when_there_is_room() {
    let directory = TempDir::new().unwrap();
    let (wal, switch) = failing(&directory);
    append(&wal, 0..7, 1000);
    switch.full.store(true, Ordering::SeqCst);
    for _ in 0..4 {
        assert!(matches!(wal.append(7, &block(7, 1, 1000)), Err(WalError::Full(_))));
    }
    switch.full.store(false, Ordering::SeqCst);
    append(&wal, 7..12, 1000);
    drop(wal);
    assert_eq!(open(&directory).unwrap().bounds(), Some((0, 12)));
}

#[test]
fn on_a_disk_without_room_for_a_file_none_is_begun() {
    let directory = TempDir::new().unwrap();
    let (wal, switch) = failing(&directory);
    append(&wal, 0..3, 1000);
    *switch.free.lock() = Some(small().file_bytes - 1);
    append(&wal, 3..5, 1000);
    let before = switch.written.load(Ordering::SeqCst);
    for _ in 0..4 {
        assert!(matches!(wal.append(5, &block(5, 1, 1000)), Err(WalError::Full(_))));
    }
    assert_eq!(switch.written.load(Ordering::SeqCst), before, "no zeros are written for what is refused");
    *switch.free.lock() = Some(small().file_bytes);
    append(&wal, 5..10, 1000);
}
