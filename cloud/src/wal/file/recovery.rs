//! What a start finds: which files are live, where the log ends, and whether anything in between is damaged.
//!
//! Nothing is changed before all of it was judged, so a refused start leaves the files as they were.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use super::super::disk::{Disk, DiskFile};
use super::{
    EnvelopeError, FRAME_BYTES, FREE_MAX, FileWalSettings, Frame, Live, Location, RING_FILE, Ring, SECTOR, Slot, Spare,
    WalError,
};
use crate::block::SEQ_MAX;
use crate::planted::{Bug, planted};
use crate::wal::is_sound;

/// One file as found.
struct Found {
    number: u64,
    spare: Spare,
    /// The run of sound blocks from the file's beginning; `None` if it does not begin with one.
    run: Option<Run>,
}

struct Run {
    generation: u64,
    first: u64,
    locations: Vec<Location>,
    /// Where the first frame that does not hold lies.
    end: u64,
}

impl Run {
    fn next(&self) -> u64 {
        self.first + self.locations.len() as u64
    }
}

type RingFile = (Ring, Arc<dyn DiskFile>, Slot);

pub(super) fn recover(disk: &dyn Disk, settings: &FileWalSettings, wal_id: u64) -> Result<RingFile, WalError> {
    let (names, unfinished): (Vec<_>, Vec<_>) =
        disk.list().map_err(failed)?.into_iter().partition(|name| !name.ends_with(".new"));
    for name in &unfinished {
        disk.remove(name).map_err(failed)?;
    }
    let numbered: Vec<(u64, String)> =
        names.iter().filter_map(|name| Some((name.strip_suffix(".wal")?.parse().ok()?, name.clone()))).collect();
    if let Some((number, name)) = numbered.iter().find(|(number, _)| *number > SEQ_MAX) {
        let text = format!("the WAL holds a file {name}, and {number} is greater than any number can be: move it away");
        return Err(WalError::Corrupt(text));
    }
    if !names.iter().any(|name| name == RING_FILE) {
        if !numbered.is_empty() {
            let text = "the WAL has files but no `ring`: restore the whole directory, or move it away to start from the archive";
            return Err(WalError::Corrupt(text.into()));
        }
        let (file, slot) = begin(disk, wal_id).map_err(failed)?;
        return Ok((Ring::empty(0), file, slot));
    }
    let ring_file = disk.open(RING_FILE).map_err(failed)?;
    let mut slot = read_slot(&*ring_file)?;
    if slot.resetting {
        for (_, name) in &numbered {
            disk.remove(name).map_err(failed)?;
        }
        disk.sync_dir().map_err(failed)?;
        slot = Slot { count: slot.count + 1, resetting: false, has_blocks: false, ..slot };
        slot.write(&*ring_file).map_err(failed)?;
        return Ok((Ring::empty(0), ring_file, slot));
    }
    let mut found = Vec::new();
    for (number, name) in numbered {
        let file = disk.open(&name).map_err(failed)?;
        let bytes = file.bytes().map_err(failed)?;
        let spare = Spare { name, file, bytes };
        let run = scan_run(&spare, slot.wal_id).map_err(failed)?;
        found.push(Found { number, spare, run });
    }
    let ring = assemble(disk, settings, slot, found)?;
    slot.write(&*ring_file).and_then(|()| make_newest_durable(&ring)).and_then(|()| disk.sync_dir()).map_err(failed)?;
    Ok((ring, ring_file, slot))
}

/// What is served from here on must be durable, but a process that was killed leaves its last append in the page cache,
/// and one whose sync failed leaves it there marked as clean (fsyncgate): the newest block is written again and synced.
/// So are the slot in force, which says what may be written over, and the names of files that may be written next.
fn make_newest_durable(ring: &Ring) -> io::Result<()> {
    let (Some(newest), Some(location)) = (ring.live.back(), ring.blocks.back()) else { return Ok(()) };
    let file = &newest.spare.file;
    if newest.generation == location.generation && !planted(Bug::CacheTrusted) {
        let mut bytes = vec![0; FRAME_BYTES + location.bytes as usize];
        file.read_at(&mut bytes, location.position)?;
        file.write_at(&bytes, location.position)?;
    }
    if planted(Bug::CacheTrusted) { Ok(()) } else { file.sync() }
}

impl Ring {
    fn empty(number: u64) -> Self {
        Self {
            live: VecDeque::new(),
            free: Vec::new(),
            blocks: VecDeque::new(),
            bytes: 0,
            taken: 0,
            first: None,
            generation: 0,
            number,
            filling: 0,
            stopped: None,
        }
    }
}

/// Makes `ring`, before any file that it speaks of.
fn begin(disk: &dyn Disk, wal_id: u64) -> io::Result<(Arc<dyn DiskFile>, Slot)> {
    let unfinished = format!("{RING_FILE}.new");
    let file = disk.create(&unfinished)?;
    file.write_at(&[0; 2 * SECTOR as usize], 0)?;
    let slot = Slot { wal_id, count: 0, trim: 0, has_blocks: false, resetting: false };
    slot.write(&*file)?;
    disk.rename(&unfinished, RING_FILE)?;
    disk.sync_dir()?;
    Ok((file, slot))
}

fn failed(error: io::Error) -> WalError {
    WalError::Io(error.to_string())
}

/// The slot in force. One of another version would be: another build wrote it after the other slot.
fn read_slot(file: &dyn DiskFile) -> Result<Slot, WalError> {
    let mut newest: Option<Slot> = None;
    for position in [0, SECTOR] {
        let mut bytes = [0; FRAME_BYTES];
        if position + FRAME_BYTES as u64 <= file.bytes().map_err(failed)? {
            file.read_at(&mut bytes, position).map_err(failed)?;
        }
        let slot = match Slot::decode(&bytes) {
            Err(error @ EnvelopeError::Version { .. }) => {
                return Err(WalError::Corrupt(format!("the WAL's `ring`: {error}")));
            }
            slot => slot.ok().flatten(),
        };
        newest = newest.into_iter().chain(slot).max_by_key(|slot| slot.count);
    }
    let text = "the WAL's `ring` is damaged, or another build wrote it: start that build, or restore the file; moving the directory away starts from the archive and loses what is not there";
    newest.ok_or_else(|| WalError::Corrupt(text.into()))
}

/// Joins the files' runs to one sequence, or says what is missing.
fn assemble(disk: &dyn Disk, settings: &FileWalSettings, slot: Slot, found: Vec<Found>) -> Result<Ring, WalError> {
    let number = found.iter().map(|file| file.number).max().unwrap_or(0);
    let (mut runs, mut rest): (Vec<_>, Vec<_>) = found.into_iter().partition(|file| file.run.is_some());
    runs.sort_by_key(|file| file.run.as_ref().map(|run| run.generation));
    let mut ring = Ring { number, ..Ring::empty(number) };
    // From the newest file back to the first that is needed.
    let mut next = None;
    while let Some(Found { number, spare, run: Some(run) }) = runs.pop() {
        ring.generation = ring.generation.max(run.generation);
        let first = ring.first.unwrap_or(u64::MAX);
        let is_newest = next.is_none();
        if !is_newest && first <= slot.trim {
            rest.push(Found { number, spare, run: Some(run) });
            continue;
        }
        if !is_newest && run.next() != first {
            return Err(damaged(&spare.name, run.end, run.next(), first));
        }
        next = next.or(Some(run.next()));
        ring.first = Some(run.first);
        let Run { generation, end, .. } = run;
        let after = run.next();
        run.locations.iter().rev().for_each(|location| ring.blocks.push_front(*location));
        ring.live.push_front(Live { spare, generation, next: after, used: end });
    }
    refuse_what_lies_behind(&ring, &rest, slot, next)?;
    match (ring.first, next) {
        (Some(first), Some(next)) if first > slot.trim || next <= slot.trim => {
            Err(WalError::Corrupt(format!(
                "the WAL should begin at block {} and holds {first} .. {next}: restore the missing files, or move the directory away to start from the archive",
                slot.trim
            )))
        }
        (None, _) if slot.has_blocks => Err(WalError::Corrupt(
            "the WAL's files with blocks are missing: restore them, or move the directory away to start from the archive".into(),
        )),
        _ => Ok(()),
    }?;
    tidy(disk, settings, slot, &mut ring, rest)?;
    Ok(ring)
}

/// A sound block of this WAL behind the place where the log seems to end is proof of damage.
fn refuse_what_lies_behind(ring: &Ring, rest: &[Found], slot: Slot, next: Option<u64>) -> Result<(), WalError> {
    let next = next.unwrap_or(slot.trim);
    let newest = ring.live.back().map(|live| (&live.spare, live.used));
    let others = rest.iter().map(|file| (&file.spare, file.run.as_ref().map_or(0, |run| run.end)));
    for (spare, end) in newest.into_iter().chain(others) {
        let behind = find_sound(spare, end, slot.wal_id, next);
        if let Some(seq) = behind.map_err(failed)? {
            return Err(damaged(&spare.name, end, next, seq));
        }
    }
    Ok(())
}

fn damaged(name: &str, position: u64, bad: u64, good: u64) -> WalError {
    WalError::Corrupt(format!(
        "block {bad} is damaged (WAL file {name} from byte {position} on), but block {good} behind it is sound: acknowledged \
         data would be lost by going on. Restore the file from a copy, or move the WAL directory away to start from the archive"
    ))
}

/// Forgets what lies below the trim and keeps a few whole files to be written again.
fn tidy(
    disk: &dyn Disk,
    settings: &FileWalSettings,
    slot: Slot,
    ring: &mut Ring,
    rest: Vec<Found>,
) -> Result<(), WalError> {
    if let Some(first) = ring.first {
        let trimmed = slot.trim.saturating_sub(first) as usize;
        ring.blocks.drain(..trimmed.min(ring.blocks.len()));
        ring.first = Some(first.max(slot.trim));
    }
    ring.bytes = ring.blocks.iter().map(|block| u64::from(block.bytes)).sum();
    ring.taken = ring.blocks.iter().map(|block| Frame::taken(u64::from(block.bytes))).sum();
    let mut spares: Vec<Spare> = rest.into_iter().map(|file| file.spare).collect();
    while ring.live.len() > 1 && ring.live.front().is_some_and(|live| live.next <= slot.trim) {
        spares.extend(ring.live.pop_front().map(|live| live.spare));
    }
    for spare in spares {
        if spare.bytes == settings.file_bytes && ring.free.len() < FREE_MAX {
            ring.free.push(spare);
        } else {
            disk.remove(&spare.name).map_err(|error| WalError::Io(format!("{}: {error}", spare.name)))?;
        }
    }
    Ok(())
}

/// The sound blocks a file begins with.
fn scan_run(spare: &Spare, wal_id: u64) -> io::Result<Option<Run>> {
    let mut run: Option<Run> = None;
    let mut position = 0;
    let mut block = Vec::new();
    while let Some(frame) = read_frame(spare, position)?.filter(|frame| frame.wal_id == wal_id) {
        let follows = run.as_ref().is_none_or(|run| run.generation == frame.generation && run.next() == frame.seq);
        if !follows || !read_sound(spare, position, &frame, &mut block)? {
            break;
        }
        let location = Location { generation: frame.generation, position, bytes: frame.bytes };
        position += Frame::taken(u64::from(frame.bytes));
        let begin = || Run { generation: frame.generation, first: frame.seq, locations: Vec::new(), end: 0 };
        let run = run.get_or_insert_with(begin);
        run.locations.push(location);
        run.end = position;
    }
    Ok(run)
}

fn read_frame(spare: &Spare, position: u64) -> io::Result<Option<Frame>> {
    let mut bytes = [0; FRAME_BYTES];
    if position + FRAME_BYTES as u64 > spare.bytes {
        return Ok(None);
    }
    spare.file.read_at(&mut bytes, position)?;
    Ok(Frame::decode(&bytes))
}

fn read_sound(spare: &Spare, position: u64, frame: &Frame, block: &mut Vec<u8>) -> io::Result<bool> {
    let from = position + FRAME_BYTES as u64;
    if from + u64::from(frame.bytes) > spare.bytes {
        return Ok(false);
    }
    block.resize(frame.bytes as usize, 0);
    spare.file.read_at(block, from)?;
    Ok(is_sound(block))
}

/// Looks through a file for a sound block numbered `next` or higher.
fn find_sound(spare: &Spare, from: u64, wal_id: u64, next: u64) -> io::Result<Option<u64>> {
    let mut chunk = vec![0; 1 << 20];
    let mut block = Vec::new();
    let mut position = from.next_multiple_of(SECTOR);
    while position < spare.bytes {
        let length = (spare.bytes - position).min(chunk.len() as u64) as usize;
        spare.file.read_at(&mut chunk[..length], position)?;
        for (sector, at) in chunk[..length].chunks(SECTOR as usize).zip((position..).step_by(SECTOR as usize)) {
            let frame = sector.first_chunk().and_then(Frame::decode);
            let frame = frame.filter(|frame| frame.wal_id == wal_id && frame.seq >= next);
            if let Some(frame) = frame
                && read_sound(spare, at, &frame, &mut block)?
            {
                return Ok(Some(frame.seq));
            }
        }
        position += length as u64;
    }
    Ok(None)
}
