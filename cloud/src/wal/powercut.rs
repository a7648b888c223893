//! A disk in memory that loses power: only what was synced is sure to be there afterwards.
//!
//! Every operation is numbered, and the power can be cut in any of them. What was not synced survives by chance, each
//! sector of 512 bytes on its own and in any of the versions it was written with; so do names that were not synced. A
//! process that is killed leaves everything in the page cache. The disk can also be full or read-only, or fail to sync.
//! `TRIBUTARY_POWER_CUTS` sets how many random cuts are tried (default 1,000 together with the exhaustive ones).

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;

use super::disk::{Disk, DiskFile};
use super::file::{FileWal, FileWalSettings};
use super::{BlockLog, WalError};

const SECTOR: usize = 512;

/// Small, seeded and good enough to draw from (SplitMix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }
}

#[derive(Default)]
struct Content {
    synced: Vec<u8>,
    now: Vec<u8>,
    /// Since the last sync, in order.
    writes: Vec<(usize, Vec<u8>)>,
    /// What the page cache held at the last sync, where that failed: the disk may have other bytes, and nobody will write
    /// these any more (fsyncgate).
    cached: Option<Vec<u8>>,
}

impl Content {
    /// Writes down what was written since the last sync, and nothing else.
    fn sync(&mut self) {
        if self.cached.is_none() {
            self.synced.clone_from(&self.now);
            self.writes.clear();
            return;
        }
        for (position, bytes) in std::mem::take(&mut self.writes) {
            for sector in position / SECTOR..(position + bytes.len()).div_ceil(SECTOR) {
                let end = self.now.len().min((sector + 1) * SECTOR);
                put(&mut self.synced, sector * SECTOR, &self.now[sector * SECTOR..end]);
            }
        }
        self.cached = (self.synced != self.now).then(|| self.now.clone());
    }

    /// Fails to: what came through is chance, and the page cache takes all of it for written.
    fn fail_sync(&mut self, random: &mut Random) {
        let mood = random.below(4);
        self.synced = survive(self, random, mood).synced;
        self.writes.clear();
        self.cached = Some(self.now.clone());
    }
}

/// What is wrong with a disk that has power.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// No room: nothing new is written, and what is there can be written over only now and then.
    Full,
    /// No room for anything new, and what is there can be written over.
    NoRoom,
    /// Everything that would change it fails.
    ReadOnly,
    /// Writes are taken and syncs fail.
    SyncFails,
}

#[derive(Clone)]
enum NameChange {
    Add(String, usize),
    Rename(String, String),
    Remove(String),
}

impl NameChange {
    fn apply(&self, names: &mut BTreeMap<String, usize>) {
        match self {
            Self::Add(name, file) => {
                names.insert(name.clone(), *file);
            }
            Self::Rename(from, to) => {
                if let Some(file) = names.remove(from) {
                    names.insert(to.clone(), file);
                }
            }
            Self::Remove(name) => {
                names.remove(name);
            }
        }
    }
}

#[derive(Default)]
struct Model {
    files: Vec<Content>,
    names_synced: BTreeMap<String, usize>,
    names: BTreeMap<String, usize>,
    name_changes: Vec<NameChange>,
    operations: u64,
    cut_at: Option<u64>,
    trouble: Option<Trouble>,
    /// A planted bug: `sync` promises and does nothing.
    lies: bool,
}

/// The disk. Clones are handles to the same one.
#[derive(Clone, Default)]
pub struct CutDisk(Arc<Mutex<Model>>);

struct CutFile(CutDisk, usize);

impl Model {
    /// Counts an operation; an error once the power is off. In the very operation of the cut the change is still tried.
    fn step(&mut self) -> io::Result<bool> {
        self.operations += 1;
        match self.cut_at {
            Some(cut_at) if self.operations > cut_at => Err(io::Error::other("no power")),
            Some(cut_at) => Ok(self.operations == cut_at),
            None => Ok(false),
        }
    }

    /// What a disk in trouble answers to a change; `grows` if that takes new room.
    fn refuse(&self, grows: bool) -> io::Result<()> {
        match self.trouble {
            Some(Trouble::Full) if grows || self.operations.is_multiple_of(3) => Err(io::ErrorKind::StorageFull.into()),
            Some(Trouble::NoRoom) if grows => Err(io::ErrorKind::StorageFull.into()),
            Some(Trouble::ReadOnly) => Err(io::ErrorKind::ReadOnlyFilesystem.into()),
            _ => Ok(()),
        }
    }

    fn refuse_sync(&self) -> io::Result<()> {
        match self.trouble {
            Some(Trouble::SyncFails | Trouble::ReadOnly) => Err(io::Error::other("the sync failed")),
            _ => Ok(()),
        }
    }
}

fn cut_here(cut: bool) -> io::Result<()> {
    if cut { Err(io::Error::other("no power")) } else { Ok(()) }
}

impl CutDisk {
    pub fn cut_at(operation: u64) -> Self {
        let disk = Self::default();
        disk.0.lock().cut_at = Some(operation);
        disk
    }

    /// The power goes after so many more operations.
    pub fn cut_after(&self, operations: u64) {
        let mut model = self.0.lock();
        model.cut_at = Some(model.operations + operations);
    }

    /// Whether the power has gone.
    pub fn is_off(&self) -> bool {
        let model = self.0.lock();
        model.cut_at.is_some_and(|cut_at| model.operations >= cut_at)
    }

    /// Something goes wrong from here on, or no longer does.
    pub fn set_trouble(&self, trouble: Option<Trouble>) {
        self.0.lock().trouble = trouble;
    }

    /// What a process finds after one that was killed, wherever that stood: the disk had power all the time.
    pub fn restarted(&self) -> Self {
        self.0.lock().cut_at = None;
        self.clone()
    }

    pub fn lying() -> Self {
        let disk = Self::default();
        disk.0.lock().lies = true;
        disk
    }

    pub fn operations(&self) -> u64 {
        self.0.lock().operations
    }

    /// Another disk with all that is to be seen on this one.
    pub fn copy(&self) -> Self {
        let model = self.0.lock();
        let copied =
            |content: &Content| Content { synced: content.now.clone(), now: content.now.clone(), ..Content::default() };
        let (files, names) = (model.files.iter().map(copied).collect(), model.names.clone());
        Self(Arc::new(Mutex::new(Model { files, names_synced: names.clone(), names, ..Model::default() })))
    }

    /// A copy with one byte of one file changed.
    pub fn with_flipped(&self, name: &str, position: usize, mask: u8) -> Self {
        let copy = self.copy();
        {
            let mut model = copy.0.lock();
            let file = model.names.get(name).copied().expect("a name that was listed");
            if let Some(byte) = model.files[file].now.get_mut(position) {
                *byte ^= mask;
            }
        }
        copy
    }

    /// What is found when the power is back.
    pub fn survivor(&self, random: &mut Random) -> Self {
        let model = self.0.lock();
        let mut names = model.names_synced.clone();
        for change in &model.name_changes {
            if random.below(2) == 0 {
                change.apply(&mut names);
            }
        }
        // Sometimes all of it came through, sometimes none.
        let mood = random.below(4);
        let files = model.files.iter().map(|content| survive(content, random, mood)).collect();
        let survivor = Model { files, names_synced: names.clone(), names, ..Model::default() };
        Self(Arc::new(Mutex::new(survivor)))
    }
}

fn survive(content: &Content, random: &mut Random, mood: u64) -> Content {
    // A sector is written as it stands in memory: with all that was written to it so far, never with a later part alone.
    let mut versions: BTreeMap<usize, Vec<Vec<u8>>> = BTreeMap::new();
    let mut now = content.cached.as_ref().unwrap_or(&content.synced).clone();
    for (position, bytes) in &content.writes {
        put(&mut now, *position, bytes);
        for sector in position / SECTOR..(position + bytes.len()).div_ceil(SECTOR) {
            let end = now.len().min((sector + 1) * SECTOR);
            versions.entry(sector).or_default().push(now[sector * SECTOR..end].to_vec());
        }
    }
    let mut found = content.synced.clone();
    for (sector, versions) in versions {
        let kept = match mood {
            0 => versions.len(),
            1 => 0,
            _ => random.below(versions.len() as u64 + 1) as usize,
        };
        if let Some(version) = kept.checked_sub(1).and_then(|kept| versions.get(kept)) {
            put(&mut found, sector * SECTOR, version);
        }
    }
    Content { synced: found.clone(), now: found, ..Content::default() }
}

fn put(bytes: &mut Vec<u8>, at: usize, some: &[u8]) {
    if bytes.len() < at + some.len() {
        bytes.resize(at + some.len(), 0);
    }
    bytes[at..at + some.len()].copy_from_slice(some);
}

impl Disk for CutDisk {
    fn free_bytes(&self) -> Option<u64> {
        (self.0.lock().trouble == Some(Trouble::NoRoom)).then_some(0)
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.0.lock().names.keys().cloned().collect())
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let mut model = self.0.lock();
        let cut = model.step()?;
        model.refuse(true)?;
        if model.names.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let file = model.files.len();
        model.files.push(Content::default());
        model.names.insert(name.to_owned(), file);
        model.name_changes.push(NameChange::Add(name.to_owned(), file));
        cut_here(cut)?;
        Ok(Arc::new(CutFile(self.clone(), file)))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let file = *self.0.lock().names.get(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(CutFile(self.clone(), file)))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.change(NameChange::Rename(from.to_owned(), to.to_owned()))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.change(NameChange::Remove(name.to_owned()))
    }

    fn sync_dir(&self) -> io::Result<()> {
        let mut model = self.0.lock();
        cut_here(model.step()?)?;
        model.refuse_sync()?;
        if !model.lies {
            model.names_synced = model.names.clone();
            model.name_changes.clear();
        }
        Ok(())
    }
}

impl CutDisk {
    fn change(&self, change: NameChange) -> io::Result<()> {
        let mut model = self.0.lock();
        let cut = model.step()?;
        model.refuse(false)?;
        change.apply(&mut model.names);
        model.name_changes.push(change);
        cut_here(cut)
    }
}

impl DiskFile for CutFile {
    fn bytes(&self) -> io::Result<u64> {
        Ok(self.0.0.lock().files[self.1].now.len() as u64)
    }

    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<()> {
        let model = self.0.0.lock();
        let from = position as usize;
        let found = model.files[self.1].now.get(from..from + buffer.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(found);
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], position: u64) -> io::Result<()> {
        let mut model = self.0.0.lock();
        let cut = model.step()?;
        let grows = position as usize + bytes.len() > model.files[self.1].now.len();
        model.refuse(grows)?;
        let content = &mut model.files[self.1];
        put(&mut content.now, position as usize, bytes);
        content.writes.push((position as usize, bytes.to_vec()));
        cut_here(cut)
    }

    fn sync(&self) -> io::Result<()> {
        let mut model = self.0.0.lock();
        let cut = model.step()?;
        let (lies, refused, mut random) = (model.lies, model.refuse_sync(), Random(model.operations));
        let content = &mut model.files[self.1];
        // In the cut a sync may have done some of its work: the writes stay undecided.
        cut_here(cut)?;
        if refused.is_err() {
            content.fail_sync(&mut random);
        } else if !lies {
            content.sync();
        }
        refused
    }
}

fn settings() -> FileWalSettings {
    FileWalSettings { file_bytes: 8 << 10, hasty_file_bytes: 8 << 10, bytes_max: 64 << 10, background: false }
}

/// What the log has promised.
#[derive(Default)]
struct Promised {
    acknowledged: BTreeMap<u64, Bytes>,
    /// The block whose append did not return.
    unanswered: Option<(u64, Bytes)>,
    trim: u64,
}

/// Appends, trims and now and then resets, until done or the power is cut.
fn work(wal: &FileWal, random: &mut Random, promised: &mut Promised, appends: u64) -> Result<(), WalError> {
    for _ in 0..appends {
        let seq = wal.bounds().map_or(promised.acknowledged.len() as u64, |(_, next)| next);
        let bytes = 20 + random.below(2_600) as usize;
        let block = super::file::tests::block(seq, random.next() as u8, bytes);
        promised.unanswered = Some((seq, block.clone()));
        wal.append(seq, &block)?;
        promised.unanswered = None;
        promised.acknowledged.insert(seq, block);
        if random.below(3) == 0 {
            let trim = (seq + 1).saturating_sub(random.below(12));
            promised.trim = promised.trim.max(trim.min(seq));
            wal.trim(trim)?;
        }
    }
    Ok(())
}

/// Opens what survived and compares it with what was promised. `Err` names the broken promise.
fn judge(disk: &CutDisk, promised: &mut Promised) -> Result<FileWal, String> {
    let wal = FileWal::open(Box::new(disk.clone()), settings(), 2).map_err(|error| format!("refused: {error}"))?;
    let (first, next) = wal.bounds().unwrap_or((0, 0));
    let expected = promised.acknowledged.last_key_value().map_or(0, |(seq, _)| seq + 1);
    if first > promised.trim && !promised.acknowledged.is_empty() {
        return Err(format!("begins at {first}, trimmed only to {}", promised.trim));
    }
    if let Some((seq, block)) = promised.unanswered.take()
        && next == seq + 1
    {
        promised.acknowledged.insert(seq, block);
    } else if next != expected {
        return Err(format!("ends at {next}, acknowledged to {expected}"));
    }
    for seq in first.max(promised.trim)..next {
        let found = wal.read(seq).map_err(|error| error.to_string())?;
        if Some(&found) != promised.acknowledged.get(&seq) {
            return Err(format!("block {seq} is another"));
        }
    }
    Ok(wal)
}

/// One life, a cut, a second life on what survived, a second cut, and a third opening.
fn cut_twice(seed: u64, cut_at: u64) -> Result<(), String> {
    let mut random = Random(seed);
    let mut promised = Promised::default();
    let disk = CutDisk::cut_at(cut_at);
    if let Ok(wal) = FileWal::open(Box::new(disk.clone()), settings(), 1) {
        let _ = work(&wal, &mut random, &mut promised, 25);
    }
    let mut chance = Random(seed ^ cut_at << 32);
    let survivor = disk.survivor(&mut chance);
    let wal = judge(&survivor, &mut promised)?;
    survivor.cut_after(1 + chance.below(60));
    let _ = work(&wal, &mut random, &mut promised, 15);
    drop(wal);
    judge(&survivor.survivor(&mut chance), &mut promised)?;
    Ok(())
}

#[test]
fn a_power_cut_loses_nothing_acknowledged() {
    let mut cuts = 0;
    // Every operation of a few runs, which is every sync point and every point between.
    for seed in 0..3 {
        let disk = CutDisk::default();
        let wal = FileWal::open(Box::new(disk.clone()), settings(), 1).unwrap();
        work(&wal, &mut Random(seed), &mut Promised::default(), 25).unwrap();
        for cut_at in 1..=disk.operations() {
            cut_twice(seed, cut_at).unwrap_or_else(|broken| panic!("seed {seed}, cut at {cut_at}: {broken}"));
            cuts += 1;
        }
    }
    let more = std::env::var("TRIBUTARY_POWER_CUTS").ok().and_then(|text| text.parse().ok()).unwrap_or(1_000);
    let mut random = Random(42);
    while cuts < more {
        let (seed, cut_at) = (random.next(), 1 + random.below(130));
        cut_twice(seed, cut_at).unwrap_or_else(|broken| panic!("seed {seed}, cut at {cut_at}: {broken}"));
        cuts += 1;
    }
    println!("{cuts} power cuts, each followed by a second");
}

/// A life that ends in the midst of what the disk does, by a kill or a failed sync, then one on what the page cache has, and a
/// power cut. What the second life served must survive that, whoever was to make it durable.
fn kill_then_cut(seed: u64, kill_at: u64) -> Result<(), String> {
    let mut random = Random(seed);
    let mut promised = Promised::default();
    let disk = CutDisk::cut_at(kill_at);
    let mut chance = Random(seed ^ kill_at << 32);
    if let Ok(wal) = FileWal::open(Box::new(disk.clone()), settings(), 1)
        && work(&wal, &mut random, &mut promised, chance.below(25)).is_ok()
    {
        disk.set_trouble(Some(Trouble::SyncFails));
        let _ = work(&wal, &mut random, &mut promised, 3);
        disk.set_trouble(None);
    }
    let disk = disk.restarted();
    let wal = judge(&disk, &mut promised)?;
    work(&wal, &mut random, &mut promised, chance.below(4)).map_err(|error| error.to_string())?;
    drop(wal);
    judge(&disk.survivor(&mut chance), &mut promised)?;
    Ok(())
}

#[test]
fn what_a_start_serves_survives_the_next_power_cut() {
    let mut random = Random(7);
    for _ in 0..4_000 {
        let (seed, kill_at) = (random.next(), 1 + random.below(160));
        kill_then_cut(seed, kill_at).unwrap_or_else(|broken| panic!("seed {seed}, killed at {kill_at}: {broken}"));
    }
}

/// A full or read-only disk refuses, and when it is well again nothing that was acknowledged is missing.
#[test]
fn a_disk_in_trouble_loses_nothing_acknowledged() {
    for seed in 0..1_000 {
        let (mut random, mut promised) = (Random(seed), Promised::default());
        let mut disk = CutDisk::default();
        for trouble in [Trouble::Full, Trouble::ReadOnly, Trouble::SyncFails] {
            {
                let wal = judge(&disk, &mut promised).unwrap_or_else(|broken| panic!("seed {seed}: {broken}"));
                let appends = random.below(8);
                work(&wal, &mut random, &mut promised, appends).unwrap();
                disk.set_trouble(Some(trouble));
                // After a refusal for want of room the next may be taken; after anything else nothing is.
                for _ in 0..random.below(4) {
                    if !matches!(work(&wal, &mut random, &mut promised, 2), Ok(()) | Err(WalError::Full(_))) {
                        break;
                    }
                }
            }
            if let Err(WalError::Corrupt(text)) = FileWal::open(Box::new(disk.clone()), settings(), 2) {
                panic!("seed {seed}: {trouble:?} is taken for damage: {text}");
            }
            disk.set_trouble(None);
            disk = if random.below(2) == 0 { disk.restarted() } else { disk.survivor(&mut random) };
        }
        judge(&disk, &mut promised).unwrap_or_else(|broken| panic!("seed {seed}: {broken}"));
    }
}

/// The model finds what it is there for.
#[test]
fn a_disk_that_lies_about_sync_is_found_out() {
    let broken = (0..50).filter(|seed| {
        let disk = CutDisk::lying();
        let mut promised = Promised::default();
        let wal = FileWal::open(Box::new(disk.clone()), settings(), 1).unwrap();
        work(&wal, &mut Random(*seed), &mut promised, 25).unwrap();
        judge(&disk.survivor(&mut Random(*seed)), &mut promised).is_err()
    });
    assert!(broken.count() > 20);
}

/// Whatever byte is damaged: the start is refused, or it serves what was written - all but perhaps the newest block, whose
/// damage cannot be told from a torn tail.
#[test]
fn no_damaged_byte_is_served_or_hides_a_block() {
    let disk = CutDisk::default();
    let mut promised = Promised::default();
    {
        let wal = FileWal::open(Box::new(disk.clone()), settings(), 1).unwrap();
        for seq in 0..14 {
            let block = super::file::tests::block(seq, 1, 900);
            wal.append(seq, &block).unwrap();
            promised.acknowledged.insert(seq, block);
        }
        wal.trim(7).unwrap();
    }
    let (mut refused, mut served) = (0, 0);
    for name in disk.list().unwrap() {
        let bytes = disk.open(&name).unwrap().bytes().unwrap() as usize;
        for position in (0..bytes).step_by(5) {
            let damaged = disk.with_flipped(&name, position, 1 << (position % 8));
            let wal = match FileWal::open(Box::new(damaged), settings(), 2) {
                Ok(wal) => wal,
                Err(error) => {
                    assert!(matches!(error, WalError::Corrupt(_)), "{name} {position}: {error}");
                    refused += 1;
                    continue;
                }
            };
            let (first, next) = wal.bounds().unwrap();
            assert!(first <= 7 && next >= 13, "{name} {position}: {first} .. {next}");
            for seq in 7.max(first)..next {
                assert_eq!(&wal.read(seq).unwrap(), &promised.acknowledged[&seq], "{name} {position}");
            }
            served += 1;
        }
    }
    assert!(refused > 500 && served > 500, "{refused} refused, {served} served");
}
