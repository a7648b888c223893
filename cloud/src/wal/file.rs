//! The file engine: blocks in a ring of files that are zero-filled once and then written over.
//!
//! Overwriting bytes that were written before needs no change of file metadata, so one append costs one `pwrite` and one
//! `fdatasync` of data. A file is live while one of its blocks is needed, then it is free and written again from its
//! beginning, under the next *generation*: what is left of an older one behind the newest block is recognised by that.
//!
//! ```text
//! NNNNNNNN.wal: frames, each on a multiple of 512 bytes so that no sector with an acknowledged block is ever written again
//!  0      16       24           32     40      44      64
//! +------+--------+------------+------+-------+-------+----------------------------+
//! | head | WAL id | generation | seq  | block | zeros | block, then up to 511      |
//! | TRWF | u64    | u64        | u64  | bytes |       | bytes of anything          |
//! |      |        |            |      | u32   |       |                            |
//! +------+--------+------------+------+-------+-------+----------------------------+
//! ring: two slots, at 0 and 512, written in turn; the one with the higher count holds
//!  0      16       24           32     40      42      64
//! +------+--------+------------+------+-------+-------+
//! | head | WAL id | count      | trim | flags | zeros |
//! | TRWR | u64    | u64        | u64  | u16   |       |
//! +------+--------+------------+------+-------+-------+
//! ```
//! Big-endian. The first 64 bytes are an [`envelope`](crate::envelope), of one version in both: a start that finds the ring
//! of another looks at no frame. `WAL id` is random and never leaves the directory, so no payload can pass for a frame.
//! Every block from `trim` on must be there; files wholly below are written again only when that number rests in `ring`.
//! Flag bit 0: blocks were written before this slot; bit 1: a reset is under way, and a start throws all files away.
//!
//! Recovery reads every live file. The first frame that does not hold ends the log, and what comes behind it was never
//! acknowledged - unless a sound block with a higher number lies behind it: that is damage, and the start is refused.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use bytes::{Buf, BufMut, Bytes};
use parking_lot::Mutex;
use shared::log::BoxFuture;
use tracing::warn;

use super::disk::{Disk, DiskFile};
use super::{BlockLog, NoRoom, Part, Usage, WalError};
use crate::block::SEQ_MAX;
use crate::buffers::Buffers;
use crate::envelope::{EnvelopeError, EnvelopeFormat, HEAD_BYTES};

mod read;
mod recovery;

const FRAME: EnvelopeFormat = EnvelopeFormat { magic: *b"TRWF", version: 1, kind: 0 };
const RING: EnvelopeFormat = EnvelopeFormat { magic: *b"TRWR", ..FRAME };
const RING_FILE: &str = "ring";
const FRAME_BYTES: usize = 64;
const FIELDS_BYTES: usize = FRAME_BYTES - HEAD_BYTES;
const SECTOR: u64 = 512;
static ZEROS: [u8; 1 << 20] = [0; 1 << 20];
/// Free files that are kept for writing again.
const FREE_MAX: usize = 2;
/// A whole block of the largest size must fit in memory to be checked.
const BLOCK_BYTES_MAX: u32 = 256 * 1024 * 1024;
/// Buffers kept for later reads.
const IDLE_BYTES_MAX: usize = 16 << 20;

/// Sizes of a file WAL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileWalSettings {
    /// Bytes of one file in the ring.
    pub file_bytes: u64,
    /// Bytes of a file that is made while an append waits: small, because it is zero-filled at once.
    pub hasty_file_bytes: u64,
    /// Bytes all files may take together; beyond it appends are refused with [`WalError::Full`].
    pub bytes_max: u64,
    /// Threads may be used: to zero-fill the next file before it is needed, and for readers to wait on.
    pub background: bool,
}

impl Default for FileWalSettings {
    fn default() -> Self {
        Self { file_bytes: 256 << 20, hasty_file_bytes: 16 << 20, bytes_max: 2 << 30, background: true }
    }
}

impl FileWalSettings {
    /// Bytes of the file that is made while somebody waits who needs `bytes`, where files take `held` bytes.
    fn next_file_bytes(&self, bytes: u64, held: u64) -> u64 {
        let size = if self.background { self.hasty_file_bytes } else { self.file_bytes };
        // What is left of the bound may be less than a file, and is enough for what is small.
        let left = self.bytes_max.saturating_sub(held) / SECTOR * SECTOR;
        size.min(self.file_bytes).min(left).max(bytes).next_multiple_of(SECTOR)
    }
}

/// The file engine.
pub struct FileWal {
    shared: Arc<Shared>,
    /// One append at a time, all of its steps.
    appending: Mutex<()>,
    filler: Mutex<Option<JoinHandle<()>>>,
    /// For readers of parts.
    buffers: Buffers,
}

struct Shared {
    disk: Box<dyn Disk>,
    settings: FileWalSettings,
    ring: Mutex<Ring>,
    /// The file `ring` and what it says.
    slot: Mutex<(Arc<dyn DiskFile>, Slot)>,
}

/// What is where. Never locked during I/O on blocks.
struct Ring {
    live: VecDeque<Live>,
    free: Vec<Spare>,
    blocks: VecDeque<Location>,
    /// Bytes of blocks.
    bytes: u64,
    /// Bytes that their frames take.
    taken: u64,
    /// Number of the first block in `blocks`, or of the next one; `None` before the first ever.
    first: Option<u64>,
    generation: u64,
    number: u64,
    /// Bytes of files being filled.
    filling: u64,
    /// Why nothing more is taken.
    stopped: Option<WalError>,
}

/// A file with blocks that are needed.
struct Live {
    spare: Spare,
    generation: u64,
    /// Number after its last block.
    next: u64,
    used: u64,
}

/// A file ready to be written from its beginning.
#[derive(Clone)]
struct Spare {
    name: String,
    file: Arc<dyn DiskFile>,
    bytes: u64,
}

#[derive(Clone, Copy)]
struct Location {
    generation: u64,
    position: u64,
    bytes: u32,
}

struct Frame {
    wal_id: u64,
    generation: u64,
    seq: u64,
    bytes: u32,
}

impl Frame {
    fn encode(&self) -> Bytes {
        let mut fields = Vec::with_capacity(FIELDS_BYTES);
        fields.put_u64(self.wal_id);
        fields.put_u64(self.generation);
        fields.put_u64(self.seq);
        fields.put_u32(self.bytes);
        fields.resize(FIELDS_BYTES, 0);
        FRAME.seal(&fields)
    }

    /// `None` if these bytes are no frame. Whose it is must be asked of the fields.
    fn decode(bytes: &[u8; FRAME_BYTES]) -> Option<Self> {
        let mut fields = FRAME.open(bytes).ok()?;
        let frame = Self {
            wal_id: fields.get_u64(),
            generation: fields.get_u64(),
            seq: fields.get_u64(),
            bytes: fields.get_u32(),
        };
        (frame.bytes <= BLOCK_BYTES_MAX && frame.seq <= SEQ_MAX && frame.generation <= SEQ_MAX).then_some(frame)
    }

    /// Bytes it takes in a file, block and all.
    fn taken(bytes: u64) -> u64 {
        (FRAME_BYTES as u64 + bytes).next_multiple_of(SECTOR)
    }
}

/// What `ring` says.
#[derive(Debug, Clone, Copy)]
struct Slot {
    wal_id: u64,
    count: u64,
    trim: u64,
    has_blocks: bool,
    resetting: bool,
}

impl Slot {
    fn encode(&self) -> Bytes {
        let mut fields = Vec::with_capacity(FIELDS_BYTES);
        fields.put_u64(self.wal_id);
        fields.put_u64(self.count);
        fields.put_u64(self.trim);
        fields.put_u16(u16::from(self.has_blocks) | u16::from(self.resetting) << 1);
        fields.resize(FIELDS_BYTES, 0);
        RING.seal(&fields)
    }

    /// `None` if no slot can say so.
    fn decode(bytes: &[u8; FRAME_BYTES]) -> Result<Option<Self>, EnvelopeError> {
        let mut fields = RING.open(bytes)?;
        let (wal_id, count, trim) = (fields.get_u64(), fields.get_u64(), fields.get_u64());
        let flags = fields.get_u16();
        let slot = Self { wal_id, count, trim, has_blocks: flags & 1 != 0, resetting: flags & 2 != 0 };
        Ok((slot.count <= SEQ_MAX && slot.trim <= SEQ_MAX).then_some(slot))
    }

    /// Writes the slot that is not in force, and makes it so.
    fn write(&self, file: &dyn DiskFile) -> io::Result<()> {
        file.write_at(&self.encode(), self.count % 2 * SECTOR)?;
        file.sync()
    }
}

impl Ring {
    fn next(&self) -> Option<u64> {
        self.first.map(|first| first + self.blocks.len() as u64)
    }

    fn held_bytes(&self) -> u64 {
        let live: u64 = self.live.iter().map(|live| live.spare.bytes).sum();
        live + self.free.iter().map(|spare| spare.bytes).sum::<u64>() + self.filling
    }

    /// Bytes that can be written before another file must be made; one that is being filled counts.
    fn free_bytes(&self) -> u64 {
        let newest = self.live.back().map_or(0, |live| live.spare.bytes - live.used);
        newest + self.free.iter().map(|spare| spare.bytes).sum::<u64>() + self.filling
    }

    /// Bytes that can be written for certain after a block that takes `taken` is; `None` if the block itself has no place.
    fn ready_after(&self, taken: u64) -> Option<u64> {
        let newest = self.live.back().map_or(0, |live| live.spare.bytes - live.used);
        let spares: u64 = self.free.iter().map(|spare| spare.bytes).sum();
        match newest.checked_sub(taken) {
            Some(rest) => Some(rest + spares),
            // What is left of the newest file is not used once another is begun.
            None => self.free.iter().any(|spare| spare.bytes >= taken).then(|| spares - taken),
        }
    }

    fn locate(&self, seq: u64) -> Result<(Location, Arc<dyn DiskFile>), WalError> {
        let (first, next) = (self.first.unwrap_or(0), self.next().unwrap_or(0));
        let index = seq.checked_sub(first).and_then(|index| usize::try_from(index).ok());
        let location = index.and_then(|index| self.blocks.get(index));
        let location = location.ok_or(WalError::NotThere { requested: seq, first, next })?;
        let live = self.live.iter().find(|live| live.generation == location.generation);
        let live = live.ok_or(WalError::NotThere { requested: seq, first, next })?;
        Ok((*location, live.spare.file.clone()))
    }
}

impl FileWal {
    /// Opens the WAL in a directory, or begins one. `wal_id` is used if it begins: a random number.
    pub fn open(disk: Box<dyn Disk>, settings: FileWalSettings, wal_id: u64) -> Result<Self, WalError> {
        let (ring, file, slot) = recovery::recover(&*disk, &settings, wal_id)?;
        let shared = Arc::new(Shared { disk, settings, ring: Mutex::new(ring), slot: Mutex::new((file, slot)) });
        let wal =
            Self { shared, appending: Mutex::new(()), filler: Mutex::new(None), buffers: Buffers::new(IDLE_BYTES_MAX) };
        wal.fill_ahead();
        Ok(wal)
    }

    /// A file with room for `taken` bytes, and where in it to write: the newest live one, or a free one made live.
    fn place(&self, taken: u64) -> Result<(Arc<dyn DiskFile>, u64, u64), WalError> {
        if let Some(place) = self.shared.place_in_ring(taken) {
            return Ok(place);
        }
        let filled = self.fill_now(taken);
        self.shared.place_in_ring(taken).ok_or_else(|| match filled {
            Err(full) => full,
            Ok(()) => WalError::Io("a new file has no room".into()),
        })
    }

    /// Makes a file of at least `bytes` bytes while somebody waits.
    fn fill_now(&self, bytes: u64) -> Result<(), WalError> {
        let held = self.shared.ring.lock().held_bytes();
        let filled = self.shared.fill(self.shared.settings.next_file_bytes(bytes, held));
        if filled.is_err() {
            // Perhaps a file is being filled at this moment that takes the room.
            if let Some(filler) = self.filler.lock().take() {
                let _ = filler.join();
            }
        }
        filled
    }

    fn make_room(&self, block: u64, leave: u64) -> Result<(), WalError> {
        let _one = self.appending.lock();
        self.shared.check()?;
        let taken = Frame::taken(block);
        // One file for the block, one for what is left after it.
        let mut filled = Ok(());
        for last in [false, false, true] {
            let ready = self.shared.ring.lock().ready_after(taken);
            match ready {
                Some(ready) if ready >= leave => return Ok(()),
                _ if last || filled.is_err() => {}
                Some(ready) => filled = self.fill_now(leave - ready),
                None => filled = self.fill_now(taken),
            }
        }
        filled.and_then(|()| {
            Err(WalError::Full(format!("a block of {block} bytes would leave less than the {leave} that are kept")))
        })
    }

    /// Zero-fills the next file on a thread, if there is none and the newest is half used.
    fn fill_ahead(&self) {
        let settings = &self.shared.settings;
        if !settings.background {
            return;
        }
        let ring = self.shared.ring.lock();
        // Not before the first file is used: an idle node writes no zeros.
        let half_used = ring.live.back().is_some_and(|live| live.used * 2 >= live.spare.bytes);
        let room = ring.held_bytes() + settings.file_bytes <= settings.bytes_max;
        if !ring.free.is_empty() || ring.filling > 0 || !half_used || !room || ring.stopped.is_some() {
            return;
        }
        drop(ring);
        // On a disk that is nearly full it would be filled again and again, and take the room of smaller files.
        if self.disk_free_bytes().is_some_and(|free| free < settings.file_bytes) {
            return;
        }
        let shared = self.shared.clone();
        let fill = move || {
            if let Err(error) = shared.fill(shared.settings.file_bytes) {
                warn!(%error, "the next WAL file could not be made ahead");
            }
        };
        // Without a thread the file is made when it is needed.
        *self.filler.lock() = std::thread::Builder::new().name("wal-fill".into()).spawn(fill).ok();
    }
}

impl Shared {
    fn place_in_ring(&self, taken: u64) -> Option<(Arc<dyn DiskFile>, u64, u64)> {
        let mut ring = self.ring.lock();
        if let Some(live) = ring.live.back().filter(|live| live.used + taken <= live.spare.bytes) {
            return Some((live.spare.file.clone(), live.generation, live.used));
        }
        let index = ring.free.iter().position(|spare| spare.bytes >= taken)?;
        let spare = ring.free.remove(index);
        ring.generation += 1;
        let (file, generation, next) = (spare.file.clone(), ring.generation, ring.next().unwrap_or(0));
        ring.live.push_back(Live { spare, generation, next, used: 0 });
        Some((file, generation, 0))
    }

    /// Makes a free file of `bytes` zeros. It gets its name when it is whole.
    fn fill(&self, bytes: u64) -> Result<(), WalError> {
        // Its zeros would be written up to where the disk is full, for each append that is refused, and removed again.
        if let Some(free) = self.disk.free_bytes().filter(|free| *free < bytes) {
            return Err(WalError::Full(format!("a WAL file of {bytes} bytes is needed, and the disk has {free} left")));
        }
        let number = {
            let mut ring = self.ring.lock();
            let held = ring.held_bytes();
            if held + bytes > self.settings.bytes_max {
                let bound = self.settings.bytes_max;
                return Err(WalError::Full(format!(
                    "{held} of {bound} bytes are taken and another {bytes} are needed"
                )));
            }
            ring.number += 1;
            ring.filling += bytes;
            ring.number
        };
        let filled = self.fill_file(&format!("{number:08}.wal"), bytes);
        let mut ring = self.ring.lock();
        ring.filling -= bytes;
        match filled {
            Ok(spare) => {
                ring.free.push(spare);
                Ok(())
            }
            // Nothing was promised about this file: the log is whole without it.
            Err(error) => Err(WalError::Full(format!("a WAL file of {bytes} bytes could not be made: {error}"))),
        }
    }

    fn fill_file(&self, name: &str, bytes: u64) -> io::Result<Spare> {
        let unfinished = format!("{name}.new");
        let file = self.disk.create(&unfinished)?;
        let write = || {
            let mut position = 0;
            while position < bytes {
                let chunk = (bytes - position).min(ZEROS.len() as u64);
                file.write_at(&ZEROS[..chunk as usize], position)?;
                position += chunk;
                // In steps, so that a commit that syncs meanwhile does not wait for the whole file.
                if position % (16 << 20) == 0 {
                    file.sync()?;
                }
            }
            file.sync()?;
            self.disk.rename(&unfinished, name)?;
            self.disk.sync_dir()
        };
        if let Err(error) = write() {
            let _ = self.disk.remove(&unfinished);
            return Err(error);
        }
        Ok(Spare { name: name.to_owned(), file, bytes })
    }

    fn stop(&self, what: &str, error: &io::Error) -> WalError {
        let stopped = WalError::Io(format!("{what}: {error}"));
        self.ring.lock().stopped = Some(stopped.clone());
        stopped
    }

    /// Changes what `ring` says, durably.
    fn set_slot(&self, change: impl FnOnce(&mut Slot)) -> Result<(), WalError> {
        let mut slot = self.slot.lock();
        let mut changed = slot.1;
        change(&mut changed);
        changed.count += 1;
        changed.write(&*slot.0).map_err(|error| self.stop("ring", &error))?;
        slot.1 = changed;
        Ok(())
    }

    fn check(&self) -> Result<(), WalError> {
        self.ring.lock().stopped.clone().map_or(Ok(()), Err)
    }
}

impl FileWal {
    /// [`BlockLog::append`], which waits for the disk in the call.
    pub fn append(&self, seq: u64, block: &Bytes) -> Result<(), WalError> {
        let _one = self.appending.lock();
        self.shared.check()?;
        let expected = self.shared.ring.lock().next().unwrap_or(seq);
        let bytes = u32::try_from(block.len()).ok().filter(|bytes| *bytes <= BLOCK_BYTES_MAX);
        let bytes = bytes.ok_or_else(|| WalError::Full(format!("a block of {} bytes", block.len())))?;
        if seq != expected {
            return Err(WalError::WrongSequence { expected, found: seq });
        }
        let taken = Frame::taken(u64::from(bytes));
        let (file, generation, position) = self.place(taken)?;
        let begins = self.shared.ring.lock().blocks.is_empty();
        let wal_id = self.shared.slot.lock().1.wal_id;
        if begins {
            self.shared.set_slot(|slot| slot.trim = seq)?;
        }
        let frame = Frame { wal_id, generation, seq, bytes };
        let written =
            file.write_at(block, position + FRAME_BYTES as u64).and_then(|()| file.write_at(&frame.encode(), position));
        match written {
            Ok(()) => {}
            // Nothing was synced, and the next append writes over it.
            Err(error) if error.kind() == io::ErrorKind::StorageFull => return Err(WalError::Full(error.to_string())),
            Err(error) => return Err(self.shared.stop("write", &error)),
        }
        // After a failed sync nobody knows what is on the disk, and a second sync may lie (fsyncgate): stop.
        file.sync().map_err(|error| self.shared.stop("fdatasync", &error))?;
        let mut ring = self.shared.ring.lock();
        ring.first.get_or_insert(seq);
        ring.bytes += u64::from(bytes);
        ring.taken += taken;
        ring.blocks.push_back(Location { generation, position, bytes });
        if let Some(live) = ring.live.back_mut() {
            live.used = position + taken;
            live.next = seq + 1;
        }
        drop(ring);
        if begins {
            // From here on a start that finds no block knows that they were lost.
            self.shared.set_slot(|slot| slot.has_blocks = true)?;
        }
        self.fill_ahead();
        Ok(())
    }
}

impl BlockLog for FileWal {
    fn append<'a>(&'a self, seq: u64, block: &'a Bytes) -> BoxFuture<'a, Result<(), WalError>> {
        Box::pin(async move { self.append(seq, block) })
    }

    fn make_room<'a>(&'a self, block: u64, leave: u64) -> BoxFuture<'a, Result<(), WalError>> {
        Box::pin(async move { self.make_room(block, leave) })
    }

    fn bounds(&self) -> Option<(u64, u64)> {
        let ring = self.shared.ring.lock();
        if ring.blocks.is_empty() { None } else { ring.first.zip(ring.next()) }
    }

    fn read(&self, seq: u64) -> BoxFuture<'_, Result<Bytes, WalError>> {
        Box::pin(async move { self.read(seq) })
    }

    fn read_part(&self, seq: u64, position: u32, bytes: u32) -> BoxFuture<'_, Result<Bytes, WalError>> {
        Box::pin(async move { self.read_part(seq, position, bytes) })
    }

    fn read_parts<'a>(&'a self, parts: &'a [Part]) -> BoxFuture<'a, Result<Vec<Bytes>, WalError>> {
        Box::pin(async move { self.read_parts(parts) })
    }

    fn blocks_threads(&self) -> bool {
        self.shared.settings.background
    }

    fn trim(&self, below: u64) -> Result<(), WalError> {
        self.shared.check()?;
        let Some((first, next)) = self.bounds() else { return Ok(()) };
        let trim = below.min(next.saturating_sub(1));
        if trim <= first {
            return Ok(());
        }
        self.shared.set_slot(|slot| (slot.trim, slot.has_blocks) = (trim, true))?;
        let settings = &self.shared.settings;
        let mut gone = Vec::new();
        {
            let mut ring = self.shared.ring.lock();
            let count = ring.first.map_or(0, |first| trim.saturating_sub(first) as usize).min(ring.blocks.len());
            for _ in 0..count {
                let Some(block) = ring.blocks.pop_front() else { break };
                ring.bytes -= u64::from(block.bytes);
                ring.taken -= Frame::taken(u64::from(block.bytes));
            }
            ring.first = Some(trim);
            while ring.live.len() > 1 && ring.live.front().is_some_and(|live| live.next <= trim) {
                let Some(live) = ring.live.pop_front() else { break };
                // Hasty files are too small to be worth keeping, and more than two spares are never needed.
                if live.spare.bytes == settings.file_bytes && ring.free.len() < FREE_MAX {
                    ring.free.push(live.spare);
                } else {
                    gone.push(live.spare);
                }
            }
        }
        for spare in &gone {
            let removed = self.shared.disk.remove(&spare.name);
            removed.map_err(|error| WalError::Io(format!("{}: {error}", spare.name)))?;
        }
        Ok(())
    }

    fn reset(&self, next: u64) -> Result<(), WalError> {
        let _one = self.appending.lock();
        self.shared.check()?;
        // From here on a start throws away whatever is left.
        self.shared.set_slot(|slot| (slot.trim, slot.resetting) = (next, true))?;
        let mut ring = self.shared.ring.lock();
        let live = std::mem::take(&mut ring.live).into_iter().map(|live| live.spare);
        let spares: Vec<Spare> = live.chain(std::mem::take(&mut ring.free)).collect();
        for spare in spares {
            let removed = self.shared.disk.remove(&spare.name);
            removed.map_err(|error| WalError::Io(format!("{}: {error}", spare.name)))?;
        }
        self.shared.disk.sync_dir().map_err(|error| WalError::Io(format!("reset: {error}")))?;
        ring.blocks.clear();
        (ring.first, ring.bytes, ring.taken) = (Some(next), 0, 0);
        drop(ring);
        self.shared.set_slot(|slot| slot.has_blocks = false)
    }

    fn settle(&self) -> Result<(), WalError> {
        self.shared.set_slot(|slot| slot.resetting = false)
    }

    fn usage(&self) -> Usage {
        let ring = self.shared.ring.lock();
        let (held_bytes, bytes_max) = (ring.held_bytes(), self.shared.settings.bytes_max);
        let free_bytes = ring.free_bytes() + bytes_max.saturating_sub(held_bytes);
        Usage { bytes: ring.bytes, taken_bytes: ring.taken, held_bytes, bytes_max, free_bytes }
    }

    fn room(&self, bytes: u64, leave: u64) -> Result<(), NoRoom> {
        let taken = Frame::taken(bytes);
        let needed = {
            let ring = self.shared.ring.lock();
            let missing = match ring.ready_after(taken) {
                Some(ready) if ready >= leave => return Ok(()),
                Some(ready) => leave - ready,
                None => taken,
            };
            let (held, bound) = (ring.held_bytes(), self.shared.settings.bytes_max);
            let needed = self.shared.settings.next_file_bytes(missing, held);
            // One that is being filled will do, if the disk lets it.
            if ring.filling < missing && held + needed > bound {
                return Err(NoRoom::Bound(format!(
                    "the log takes {held} of wal.bytes_max = {bound} bytes, and its next file needs {needed}"
                )));
            }
            needed
        };
        match self.disk_free_bytes() {
            Some(free) if free < needed => Err(NoRoom::Disk(format!(
                "the disk has {free} bytes left, and the next file of the log needs {needed}"
            ))),
            _ => Ok(()),
        }
    }

    fn disk_free_bytes(&self) -> Option<u64> {
        self.shared.disk.free_bytes()
    }

    fn close(&self) {
        if let Some(filler) = self.filler.lock().take() {
            let _ = filler.join();
        }
        self.shared.ring.lock().stopped.get_or_insert(WalError::Closed);
    }
}

impl Drop for FileWal {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
pub(in crate::wal) mod tests;
