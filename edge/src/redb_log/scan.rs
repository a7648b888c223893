//! Reads what can be read of a database that cannot be opened: page by page, from the file itself.
//!
//! redb takes a database whole or not at all: one flipped bit under one row, and it opens nothing. Here the file is read
//! as pages, and what holds by its own checks is taken. A leaf page names its keys and values, a row names its stream and
//! first offset, and every batch in it has a CRC and a chain value. Nothing is written.
//!
//! ```text
//! leaf page of redb's format 3, at a multiple of 4096, as long as its last value says
//!  0      1      2          4
//! +------+------+----------+----------------------------------+-------------+--------------+
//! | type | zero | entries  | value ends, u32 LE each, counted | keys, fixed | values       |
//! | 1    |      | u16 LE   | from the page's first byte       | width       |              |
//! +------+------+----------+----------------------------------+-------------+--------------+
//! ```
//! Keys: `rows` 12 bytes (u32 LE, u64 LE), `streams` 4 (u32 LE), `tail` 8 (u64 LE).
//!
//! redb copies a page before it writes, so a file holds older copies too, among them pages of commits that a power cut
//! undid. [`Current`] says what redb itself would show, if it opens the file (on a copy, where it may repair); then only
//! that is taken. Otherwise everything is, and [`Scan::assemble`] follows the chain where two pieces differ.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use redb::{Builder, ReadableDatabase, ReadableTable, StorageBackend};
use shared::batch::{Batch, HEADER_BYTES};
use shared::log::Chain;
use shared::name::Offset;

use super::tables::{CHAIN_BYTES, ROWS, STREAMS, StoredBatch, StreamRecord, StreamRow, TAIL};
use super::{LogError, chain_after, decode, failed};

const PAGE_BYTES: usize = 4096;
/// No value is longer: a row holds at least one batch, and a batch is a mebibyte or little more.
const LEAF_BYTES_MAX: usize = 8 << 20;
/// Pieces that are remembered: beyond this, memory is not bounded by the file any more.
const PIECES_MAX: usize = 4_000_000;

/// Adjoining batches that lie one after the other in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// First offset.
    pub base: Offset,
    /// The offset after the last record.
    pub next: Offset,
    /// Chain value after the last record, as stored.
    pub chain: Chain,
    /// Where its first entry lies in the file.
    at: u64,
    /// Bytes of its entries.
    bytes: u32,
}

/// What redb shows of the file.
#[derive(Debug, Default)]
pub struct Current {
    records: BTreeMap<u32, StreamRecord>,
    rows: HashSet<(u32, u64)>,
    tails: HashSet<u64>,
}

/// A piece that was chosen, and where in it the stream goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// The first offset that is taken of it.
    pub from: Offset,
    /// The piece.
    pub piece: Piece,
}

/// What was found in a file.
#[derive(Debug)]
pub struct Scan {
    file: Arc<File>,
    /// By base, next and chain: the same piece in an older copy of its page is the same.
    streams: BTreeMap<u32, BTreeMap<(Offset, Offset, u64), Piece>>,
    records: BTreeMap<u32, Vec<StreamRecord>>,
    /// Pages the disk did not give.
    pub pages_unreadable: u64,
    /// Entries in rows that were named by their key and did not hold.
    pub entries_damaged: u64,
    current: Option<Current>,
    pieces: usize,
}

/// A database file that takes writes in memory only: what "on a copy" means here.
#[derive(Debug)]
struct Overlay {
    file: Arc<File>,
    state: Mutex<OverlayState>,
}

#[derive(Debug, Default)]
struct OverlayState {
    length: u64,
    /// Of the file's own bytes only those below this are left.
    kept: u64,
    pages: BTreeMap<u64, Box<[u8; PAGE_BYTES]>>,
}

/// Pages that a repair may write: it writes few, and a gateway has little memory.
const OVERLAY_PAGES_MAX: usize = 16 * 1024;

impl Overlay {
    fn new(file: Arc<File>) -> io::Result<Self> {
        let length = file.metadata()?.len();
        let state = OverlayState { length, kept: length, pages: BTreeMap::new() };
        Ok(Self { file, state: Mutex::new(state) })
    }
}

impl OverlayState {
    fn page(&self, file: &File, number: u64) -> io::Result<Box<[u8; PAGE_BYTES]>> {
        if let Some(page) = self.pages.get(&number) {
            return Ok(page.clone());
        }
        let mut page = Box::new([0; PAGE_BYTES]);
        let at = number * PAGE_BYTES as u64;
        let there = self.kept.saturating_sub(at).min(PAGE_BYTES as u64) as usize;
        if let Some(part) = page.get_mut(..there) {
            file.read_exact_at(part, at)?;
        }
        Ok(page)
    }

    /// Calls with each page that the range touches: its number, where the range begins in it, and how much of it.
    fn pages_of(offset: u64, length: usize) -> impl Iterator<Item = (u64, usize, usize)> {
        let mut at = offset;
        let end = offset.saturating_add(length as u64);
        std::iter::from_fn(move || {
            let within = (at % PAGE_BYTES as u64) as usize;
            let take = (end - at).min((PAGE_BYTES - within) as u64) as usize;
            let number = at / PAGE_BYTES as u64;
            at += take as u64;
            (take > 0).then_some((number, within, take))
        })
    }
}

impl StorageBackend for Overlay {
    fn len(&self) -> io::Result<u64> {
        Ok(self.state.lock().length)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let state = self.state.lock();
        if offset.saturating_add(out.len() as u64) > state.length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut out = out;
        for (number, within, take) in OverlayState::pages_of(offset, out.len()) {
            let page = state.page(&self.file, number)?;
            let (part, rest) = out.split_at_mut(take);
            part.copy_from_slice(page.get(within..within + take).ok_or(io::ErrorKind::UnexpectedEof)?);
            out = rest;
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut state = self.state.lock();
        state.kept = state.kept.min(len);
        state.length = len;
        state.pages.retain(|number, _| number * (PAGE_BYTES as u64) < len);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut state = self.state.lock();
        let mut data = data;
        for (number, within, take) in OverlayState::pages_of(offset, data.len()) {
            let mut page = state.page(&self.file, number)?;
            let (part, rest) = data.split_at(take);
            page.get_mut(within..within + take).ok_or(io::ErrorKind::UnexpectedEof)?.copy_from_slice(part);
            state.pages.insert(number, page);
            data = rest;
        }
        if state.pages.len() > OVERLAY_PAGES_MAX {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "the repair writes more than memory is kept for"));
        }
        Ok(())
    }
}

/// Opens the file with redb, on a copy in memory that it may repair, and lists what it shows.
pub fn current(file: &Arc<File>, cache_bytes: usize) -> Result<Current, LogError> {
    let overlay = Overlay::new(file.clone()).map_err(|error| LogError::Io(error.to_string()))?;
    if overlay.state.lock().length == 0 {
        // redb would make a new database of it.
        return Err(LogError::Damaged("the file is empty".to_owned()));
    }
    let list = || -> Result<Current, LogError> {
        let mut builder = Builder::new();
        let database = builder.set_cache_size(cache_bytes).set_check_integrity_on_open(true);
        let database = database.create_with_backend(overlay).map_err(failed)?;
        let transaction = database.begin_read().map_err(failed)?;
        let mut found = Current::default();
        for row in transaction.open_table(STREAMS).map_err(failed)?.iter()? {
            let (key, value) = row?;
            if let Ok(StreamRow::V1(record)) = decode(value.value(), "a stream") {
                found.records.insert(key.value(), record);
            }
        }
        for row in transaction.open_table(ROWS).map_err(failed)?.iter()? {
            found.rows.insert(row?.0.value());
        }
        for row in transaction.open_table(TAIL).map_err(failed)?.iter()? {
            found.tails.insert(row?.0.value());
        }
        Ok(found)
    };
    catch_unwind(AssertUnwindSafe(list))
        .unwrap_or_else(|_| Err(LogError::Damaged("reading it made the database engine panic".to_owned())))
}

impl Scan {
    /// Reads the whole file. `progress` is told how many bytes of how many are done.
    pub fn read(file: Arc<File>, current: Option<Current>, mut progress: impl FnMut(u64, u64)) -> io::Result<Self> {
        let length = file.metadata()?.len();
        let mut scan = Self {
            file,
            streams: BTreeMap::new(),
            records: BTreeMap::new(),
            pages_unreadable: 0,
            entries_damaged: 0,
            current,
            pieces: 0,
        };
        if let Some(current) = &scan.current {
            scan.records = current.records.iter().map(|(id, record)| (*id, vec![record.clone()])).collect();
        }
        let mut at = 0;
        let mut page = vec![0; PAGE_BYTES];
        while at < length {
            if at.is_multiple_of(64 << 20) {
                progress(at, length);
            }
            // The data of a sparse file are asked for, not its holes.
            if let Ok(data) = rustix::fs::seek(&scan.file, rustix::fs::SeekFrom::Data(at))
                && data >= at + PAGE_BYTES as u64
            {
                at = data / PAGE_BYTES as u64 * PAGE_BYTES as u64;
                continue;
            }
            let here = page.get_mut(..(length - at).min(PAGE_BYTES as u64) as usize).unwrap_or_default();
            if scan.file.read_exact_at(here, at).is_err() {
                scan.pages_unreadable += 1;
                at += PAGE_BYTES as u64;
                continue;
            }
            let covered = if here.first() == Some(&1) { scan.leaf(at, length)? } else { 0 };
            at += (covered.max(1)).div_ceil(PAGE_BYTES as u64) * PAGE_BYTES as u64;
        }
        progress(length, length);
        Ok(scan)
    }

    /// Looks at a page that may be a leaf of one of our tables. Returns how many bytes it was found to cover: what a
    /// device published may look like a page, and must not be taken for one.
    fn leaf(&mut self, at: u64, length: u64) -> io::Result<u64> {
        let left = (length - at).min(LEAF_BYTES_MAX as u64) as usize;
        let mut bytes = vec![0; left.min(PAGE_BYTES)];
        if self.file.read_exact_at(&mut bytes, at).is_err() {
            return Ok(0);
        }
        let Some(entries) = u16_at(&bytes, 2).filter(|entries| *entries > 0) else { return Ok(0) };
        let Some(end) = u32_at(&bytes, 4 + (usize::from(entries) - 1) * 4) else { return Ok(0) };
        let end = (end as usize).min(left);
        if end > bytes.len() {
            let first = bytes.len();
            bytes.resize(end, 0);
            // A sector that cannot be read leaves zeros: what lies before and behind it may hold.
            for (number, part) in bytes.chunks_mut(PAGE_BYTES).enumerate().skip(first / PAGE_BYTES) {
                if self.file.read_exact_at(part, at + (number * PAGE_BYTES) as u64).is_err() {
                    self.pages_unreadable += 1;
                }
            }
        }
        let found = self.rows_leaf(at, &bytes, entries) || self.tail_leaf(at, &bytes, entries);
        let found = found || self.streams_leaf(&bytes, entries);
        if self.pieces > PIECES_MAX {
            return Err(io::Error::other(format!("the file holds more than {PIECES_MAX} pieces")));
        }
        Ok(if found { end as u64 } else { 0 })
    }

    fn rows_leaf(&mut self, at: u64, bytes: &[u8], entries: u16) -> bool {
        let mut found = false;
        for (key, start, value) in values(bytes, entries, 12) {
            let (Some(stream), Some(base)) = (u32_at(key, 0), u64_at(key, 4)) else { continue };
            let wanted = self.current.as_ref().is_none_or(|current| current.rows.contains(&(stream, base)));
            let (pieces, damaged) = split(at + start as u64 + 8, value.get(8..).unwrap_or_default());
            self.entries_damaged += if wanted { damaged } else { 0 };
            // A key belongs to its value: the first batch has the key's offset, unless that batch is the damaged one.
            if pieces.first().is_none_or(|piece| piece.base < base as Offset) {
                continue;
            }
            found = true;
            if wanted {
                self.add(stream, pieces);
            }
        }
        found
    }

    fn tail_leaf(&mut self, at: u64, bytes: &[u8], entries: u16) -> bool {
        let mut found = false;
        for (key, start, value) in values(bytes, entries, 8) {
            let Some(commit) = u64_at(key, 0) else { continue };
            let wanted = self.current.as_ref().is_none_or(|current| current.tails.contains(&commit));
            let mut place = 0;
            // Parts: stream (4), length (4), bytes before (8), entries.
            while let Some(head) = value.get(place..place + 8) {
                let (stream, length) = (u32_be(head, 0), u32_be(head, 4) as usize);
                let part = value.get(place + 16..(place + 8).saturating_add(length)).unwrap_or_default();
                let (pieces, damaged) = split(at + (start + place + 16) as u64, part);
                found |= !pieces.is_empty();
                if wanted && (damaged > 0 || !pieces.is_empty()) {
                    self.entries_damaged += damaged;
                    self.add(stream, pieces);
                }
                place = place.saturating_add(8).saturating_add(length);
            }
        }
        found
    }

    fn streams_leaf(&mut self, bytes: &[u8], entries: u16) -> bool {
        let mut found = Vec::new();
        for (key, _, value) in values(bytes, entries, 4) {
            let Some(stream) = u32_at(key, 0) else { return false };
            // All of the page or nothing: these records have no checksum of their own.
            let Ok((StreamRow::V1(record), [])) = postcard::take_from_bytes(value) else { return false };
            let sound = 0 <= record.first && record.first <= record.next && record.confirmed <= record.next;
            if !sound || record.safe > record.next || record.renewed_at > record.next {
                return false;
            }
            found.push((stream, record));
        }
        let any = !found.is_empty();
        if self.current.is_none() {
            found.into_iter().for_each(|(stream, record)| self.records.entry(stream).or_default().push(record));
        }
        any
    }

    fn add(&mut self, stream: u32, pieces: Vec<Piece>) {
        let known = self.streams.entry(stream).or_default();
        for piece in pieces {
            self.pieces += usize::from(known.insert((piece.base, piece.next, piece.chain.0), piece).is_none());
        }
    }

    /// The ids of streams of which anything was found.
    pub fn streams(&self) -> BTreeSet<u32> {
        self.streams.keys().chain(self.records.keys()).copied().collect()
    }

    /// The newest record of a stream. Records have no checksum, but many older copies lie about: an incarnation that only
    /// one of them has is believed last.
    pub fn record(&self, stream: u32) -> Option<StreamRecord> {
        let all = self.records.get(&stream)?;
        let alike = |one: &StreamRecord| {
            let same = |other: &&StreamRecord| {
                (other.incarnation, &other.name, &other.topic) == (one.incarnation, &one.name, &one.topic)
            };
            all.iter().filter(same).take(2).count()
        };
        all.iter().max_by_key(|record| (alike(record), record.next, record.confirmed, record.safe)).cloned()
    }

    /// The pieces of a stream from `first` on, in order, without overlap but for their ends.
    pub fn assemble(&self, stream: u32, first: Offset) -> Vec<Held> {
        let mut waiting = self.streams.get(&stream).into_iter().flat_map(BTreeMap::values).copied().peekable();
        let mut open: Vec<Piece> = Vec::new();
        let mut held: Vec<Held> = Vec::new();
        let (mut cursor, mut before) = (first, None);
        loop {
            while let Some(piece) = waiting.next_if(|piece| piece.base <= cursor) {
                open.push(piece);
            }
            open.retain(|piece| piece.next > cursor);
            if let Some(piece) = self.choose(stream, &open, cursor, before) {
                held.push(Held { from: cursor, piece });
                (cursor, before) = (piece.next, Some(piece.chain));
            } else if let Some(piece) = waiting.peek() {
                (cursor, before) = (piece.base, None);
            } else {
                return held;
            }
        }
    }

    /// Which of the pieces that hold `cursor` goes on from `before`. Different ones are from commits that were undone, or
    /// from the tail before it moved to a row.
    fn choose(&self, stream: u32, open: &[Piece], cursor: Offset, before: Option<Chain>) -> Option<Piece> {
        let mut open: Vec<Piece> = open.to_vec();
        open.sort_by_key(|piece| std::cmp::Reverse(piece.next));
        let longest = *open.first()?;
        if open.len() == 1 {
            return Some(longest);
        }
        let links = |piece: &Piece, chain: Chain, at: Offset| {
            let entries = self.entries(piece).unwrap_or_default();
            entries.iter().any(|one| one.batch.base_offset() == at && chain_after(chain, &one.batch) == one.chain)
        };
        let linked: Vec<Piece> =
            open.into_iter().filter(|piece| before.is_none_or(|chain| links(piece, chain, cursor))).collect();
        let goes_on = |piece: &&Piece| {
            let from = (piece.next, 0, 0);
            let following = self.streams.get(&stream).into_iter().flat_map(|all| all.range(from..));
            let mut following = following.map(|(_, one)| one).take_while(|one| one.base == piece.next);
            following.any(|one| links(one, piece.chain, piece.next))
        };
        let best = linked.iter().find(goes_on).or(linked.first()).copied();
        Some(best.unwrap_or(longest))
    }

    /// The batches of a piece, read and checked again.
    pub fn entries(&self, piece: &Piece) -> io::Result<Vec<StoredBatch>> {
        let mut bytes = vec![0; piece.bytes as usize];
        self.file.read_exact_at(&mut bytes, piece.at)?;
        let mut rest = Bytes::from(bytes);
        let mut entries = Vec::new();
        while rest.len() > CHAIN_BYTES {
            let chain = Chain(u64::from_be_bytes(take(&mut rest)));
            match Batch::split_first(&mut rest) {
                Ok(Some(batch)) => entries.push(StoredBatch { batch, chain }),
                other => return Err(io::Error::other(format!("what was read a moment ago does not hold: {other:?}"))),
            }
        }
        Ok(entries)
    }
}

/// Splits entries into runs that hold and adjoin. A batch that does not is left out, if its length still leads to the next.
fn split(at: u64, bytes: &[u8]) -> (Vec<Piece>, u64) {
    let mut pieces: Vec<Piece> = Vec::new();
    let (mut place, mut damaged, mut adjoins) = (0, 0, false);
    while let Some(head) = bytes.get(place..place + CHAIN_BYTES + HEADER_BYTES) {
        let chain = Chain(u64_be(head, 0));
        // Base offset (8), then the length of what follows it (4).
        let length = CHAIN_BYTES + 12 + u32_be(head, CHAIN_BYTES + 8) as usize;
        let Some(whole) = bytes.get(place..place.saturating_add(length)) else { break };
        let batch = Batch::parse(Bytes::copy_from_slice(whole.get(CHAIN_BYTES..).unwrap_or_default()));
        match batch {
            Ok(batch) if batch.base_offset() >= 0 => {
                let (base, next) = (batch.base_offset(), batch.last_offset().saturating_add(1));
                match pieces.last_mut() {
                    Some(last) if adjoins && last.next == base => {
                        (last.next, last.chain) = (next, chain);
                        last.bytes += length as u32;
                    }
                    _ => pieces.push(Piece { base, next, chain, at: at + place as u64, bytes: length as u32 }),
                }
                adjoins = true;
            }
            // Without even the format's number where it belongs, this was never a row.
            _ if pieces.is_empty() && head.get(CHAIN_BYTES + 16) != Some(&2) => break,
            _ => {
                damaged += 1;
                adjoins = false;
            }
        }
        place += length;
    }
    // A row ends with its last entry.
    damaged += u64::from(!pieces.is_empty() && place < bytes.len());
    (pieces, damaged)
}

/// Keys of a leaf with their values and where these begin.
fn values(bytes: &[u8], entries: u16, key_bytes: usize) -> impl Iterator<Item = (&[u8], usize, &[u8])> {
    let entries = usize::from(entries);
    let keys = 4 + 4 * entries;
    let mut start = keys + key_bytes * entries;
    (0..entries).map_while(move |index| {
        let key = bytes.get(keys + key_bytes * index..keys + key_bytes * (index + 1))?;
        let end = (u32_at(bytes, 4 + 4 * index)? as usize).min(bytes.len());
        let value = bytes.get(start..end)?;
        let at = std::mem::replace(&mut start, end);
        Some((key, at, value))
    })
}

fn take(bytes: &mut Bytes) -> [u8; CHAIN_BYTES] {
    let head = bytes.split_to(CHAIN_BYTES.min(bytes.len()));
    head[..].try_into().unwrap_or_default()
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    array(bytes, at).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    array(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    array(bytes, at).map(u64::from_le_bytes)
}

fn u32_be(bytes: &[u8], at: usize) -> u32 {
    array(bytes, at).map_or(0, u32::from_be_bytes)
}

fn u64_be(bytes: &[u8], at: usize) -> u64 {
    array(bytes, at).map_or(0, u64::from_be_bytes)
}
