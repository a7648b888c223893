//! Streams in redb: one transaction per commit, rows, recovery.
//!
//! [`RedbLog`] applies a [`Commit`] as one durable transaction and reads rows back. It knows nothing of MQTT rules, of
//! waiting connections or of what may be deleted; it is told. One thread calls [`RedbLog::commit`], any number read.

pub mod backend;
pub mod committer;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod scan;
mod tables;
mod tail;

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use mqtt::store::{SessionLeft, StoredRetained, StoredSession, StoredSubscription};
use parking_lot::{Mutex, RwLock};
use redb::{Builder, Database, DatabaseError, ReadableDatabase, ReadableTable, StorageError};
use shared::clock::ClockState;
use shared::log::Chain;
use shared::name::{Incarnation, Offset, TimestampMs};
use tracing::{info, warn};

use backend::{AnyStorage, OpenStorage};
use tables::{
    ClockRow, FORMAT, META, META_CLOCK, META_COMMIT, META_FORMAT, META_INCARNATION, PACKETS, PacketRow, RETAINED, ROWS,
    RetainedRow, Row, SESSIONS, STREAMS, SUBSCRIPTIONS, SessionRow, StreamRow, SubscriptionRow, TAIL, encode_row,
    row_key,
};
pub use tables::{Damage, StoredBatch, StreamRecord, chain_after};
use tail::Tail;

/// Why the database could not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LogError {
    /// The disk, or the budget, is full.
    #[error("no room: {0}")]
    Full(String),
    /// The disk failed. The handle is of no use any more: [`RedbLog::reopen`].
    #[error("the disk failed: {0}")]
    Io(String),
    /// What is stored is not what was written.
    #[error("the database is damaged: {0}")]
    Damaged(String),
    /// Written by another version.
    #[error("the database has format {found}, this version reads format {FORMAT}")]
    OtherFormat {
        /// Its format.
        found: u32,
    },
    /// Not open: closed, or between an error and its reopening.
    #[error("the database is not open")]
    NotOpen,
}

impl From<StorageError> for LogError {
    fn from(error: StorageError) -> Self {
        match error {
            StorageError::Corrupted(what) => Self::Damaged(what),
            // How redb says that the magic number is another.
            StorageError::Io(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                Self::Damaged(error.to_string())
            }
            StorageError::Io(error) => {
                let full = matches!(
                    error.kind(),
                    std::io::ErrorKind::StorageFull
                        | std::io::ErrorKind::QuotaExceeded
                        | std::io::ErrorKind::FileTooLarge
                );
                if full { Self::Full(error.to_string()) } else { Self::Io(error.to_string()) }
            }
            other => Self::Io(other.to_string()),
        }
    }
}

impl From<Damage> for LogError {
    fn from(damage: Damage) -> Self {
        Self::Damaged(damage.0)
    }
}

/// redb has one error type per operation; what matters here is the same in all of them.
fn failed(error: impl Into<redb::Error>) -> LogError {
    match error.into() {
        redb::Error::Corrupted(what) => LogError::Damaged(what),
        redb::Error::Io(error) => StorageError::Io(error).into(),
        redb::Error::TableTypeMismatch { table, .. } => LogError::Damaged(format!("table {table} has other types")),
        other => LogError::Io(other.to_string()),
    }
}

/// What becomes durable together.
#[derive(Debug, Default)]
pub struct Commit {
    /// Its number: one above the last.
    pub number: u64,
    /// New batches.
    pub appends: Vec<StreamAppend>,
    /// Streams whose record is to be written, as it is without this commit's appends and trims.
    pub records: BTreeMap<u32, StreamRecord>,
    /// Those of them that are written only if a trim changes them.
    pub unchanged: BTreeSet<u32>,
    /// What to delete. Its streams are in `records`.
    pub trims: Vec<Trim>,
    /// Retained messages: set or deleted.
    pub retained: BTreeMap<String, Option<StoredRetained>>,
    /// Changes of sessions, by client id.
    pub sessions: BTreeMap<String, SessionChange>,
    /// How far the count of running time is.
    pub clock: Option<ClockState>,
    /// What is left out of it: there was no room.
    pub shed: Shed,
}

/// Parts of a commit that are not written because the disk has no room for them. What frees room, and what the commit needs
/// to go on, is never among them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Shed {
    /// Sessions that stay as small as they are.
    pub sessions: BTreeSet<String>,
    /// All records, retained messages and QoS 2 packet ids.
    pub records: bool,
}

impl Shed {
    /// Nothing is left out.
    pub fn is_empty(&self) -> bool {
        !self.records && self.sessions.is_empty()
    }
}

impl Commit {
    /// Leaves more out: first the sessions that grow most, half of what is left each time, then the records. False: only
    /// what must be written is left.
    pub fn shed_more(&mut self) -> bool {
        let mut growing: Vec<(usize, &String)> = self
            .sessions
            .iter()
            .filter(|(client, change)| change.grows > 0 && !self.shed.sessions.contains(*client))
            .map(|(client, change)| (change.grows, client))
            .collect();
        if !growing.is_empty() {
            growing.sort_by_key(|(grows, _)| std::cmp::Reverse(*grows));
            growing.truncate(growing.len().div_ceil(2));
            self.shed.sessions.extend(growing.into_iter().map(|(_, client)| client.clone()));
            return true;
        }
        let packets = |change: &SessionChange| change.packets.values().any(|added| *added);
        let grows = !self.appends.is_empty()
            || self.retained.values().any(Option::is_some)
            || self.sessions.values().any(packets);
        !std::mem::replace(&mut self.shed.records, true) && grows
    }

    /// The appends that are made.
    pub fn appends(&self) -> &[StreamAppend] {
        if self.shed.records { &[] } else { &self.appends }
    }
}

/// New batches of one stream.
#[derive(Debug)]
pub struct StreamAppend {
    /// The stream.
    pub stream: u32,
    /// Bytes of all entries before these.
    pub bytes_before: u64,
    /// The batches, adjoining.
    pub entries: Vec<StoredBatch>,
}

/// Rows to delete from a stream's front.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trim {
    /// The stream.
    pub stream: u32,
    /// Nothing at or above this is deleted.
    pub below: Offset,
    /// Delete until so many bytes are gone.
    pub bytes: u64,
    /// And whole rows below this.
    pub old: Offset,
}

/// What changes of one session. What is deleted goes first.
#[derive(Debug, Default)]
pub struct SessionChange {
    /// Everything that is stored of it goes.
    pub deleted: bool,
    /// Its own row, without subscriptions and packet ids.
    pub row: Option<StoredSession>,
    /// Subscriptions by filter: set or deleted.
    pub subscriptions: BTreeMap<String, Option<StoredSubscription>>,
    /// QoS 2 packet ids: received or released.
    pub packets: BTreeMap<u16, bool>,
    /// Bytes that its row and subscriptions take beyond what they took before.
    pub grows: usize,
    /// The row is one of the things that are new.
    pub new: bool,
    /// The part of the commit's tickets that stands for what grows.
    pub part: u32,
}

/// Where a stream begins after a trim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trimmed {
    /// The stream.
    pub stream: u32,
    /// Its first record.
    pub first: Offset,
    /// Chain value before it.
    pub first_chain: Chain,
    /// Bytes of all entries before it.
    pub first_bytes: u64,
    /// Greatest timestamp of what went.
    pub youngest: TimestampMs,
    /// The bound on rows per commit was reached.
    pub more: bool,
}

/// A place in a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Bytes of all entries before the entry that holds it.
    pub bytes_before: u64,
    /// Base timestamp of that entry.
    pub timestamp: TimestampMs,
}

/// What a database held when it was opened.
#[derive(Debug)]
pub struct Contents {
    /// The life of this database.
    pub incarnation: Incarnation,
    /// Number of the last commit.
    pub commit: u64,
    /// How far the count of running time was.
    pub clock: Option<ClockState>,
    /// Its streams, with `next` as the rows say.
    pub streams: BTreeMap<u32, StreamRecord>,
    /// Topics of retained messages, and the bytes these take.
    pub retained: Vec<(String, u32)>,
}

/// The database.
pub struct RedbLog {
    open: OpenStorage,
    mint: fn() -> Incarnation,
    cache_bytes: usize,
    database: RwLock<Option<Database>>,
    tail: Mutex<Tail>,
}

impl std::fmt::Debug for RedbLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RedbLog").field("cache_bytes", &self.cache_bytes).finish_non_exhaustive()
    }
}

/// Opening takes this long before the log tells how far it is.
const QUIET: Duration = Duration::from_secs(1);
/// Rows that one commit deletes at most: a commit that deletes 90 % of a database holds up every PUBACK behind it.
const TRIM_ROWS_MAX: usize = 64;

impl RedbLog {
    /// Opens or makes the database; a new one gets its incarnation from `mint`.
    pub fn open(
        open: OpenStorage,
        cache_bytes: usize,
        mint: fn() -> Incarnation,
    ) -> Result<(Self, Contents), LogError> {
        let log = Self { open, mint, cache_bytes, database: RwLock::new(None), tail: Mutex::default() };
        let contents = log.reopen()?;
        Ok((log, contents))
    }

    /// Opens the database again after an error; reads in between are refused.
    pub fn reopen(&self) -> Result<Contents, LogError> {
        let mut place = self.database.write();
        *place = None;
        let storage = AnyStorage((self.open)().map_err(|error| LogError::from(StorageError::Io(error)))?);
        // redb has been seen to panic on files that a full disk had left behind.
        let began = Instant::now();
        let opened = catch_unwind(AssertUnwindSafe(|| {
            let mut builder = Builder::new();
            // Every page is checked each time: what redb takes on trust after a clean end, a worn card may have changed
            // since, and cursors and sessions have no checksum of their own.
            let builder = builder.set_cache_size(self.cache_bytes).set_check_integrity_on_open(true);
            builder.set_repair_callback(move |check| {
                let percent = (check.progress() * 100.0).round();
                // redb reports this step only when the newest commit does not hold. A power cut leaves that, and so does a
                // bit that flipped in it since: the two cannot be told apart, as a commit is one sync.
                if (0.25..0.5).contains(&check.progress()) {
                    warn!("the last commit is not whole and is undone; it was never acknowledged, unless the disk altered it since");
                }
                // A small database is not worth a line.
                if began.elapsed() > QUIET {
                    info!(percent, "checking the database, nothing is served yet");
                }
            });
            builder.create_with_backend(storage)
        }));
        let mut database = match opened {
            Ok(Ok(database)) => database,
            Ok(Err(DatabaseError::Storage(error))) => return Err(error.into()),
            Ok(Err(DatabaseError::UpgradeRequired(version))) => {
                return Err(LogError::Damaged(format!("its file format {version} is none this version ever wrote")));
            }
            Ok(Err(other)) => return Err(LogError::Io(other.to_string())),
            Err(_) => return Err(LogError::Damaged("reading it made the database engine panic".to_owned())),
        };
        let (contents, tail) = match load(&database, self.mint) {
            Err(LogError::Damaged(_)) => {
                // What a quick look took for damage may be mended from the tree's other root.
                database.check_integrity().map_err(failed)?;
                load(&database, self.mint)?
            }
            other => other?,
        };
        *self.tail.lock() = tail;
        *place = Some(database);
        Ok(contents)
    }

    /// Moves what is live to the file's front and cuts the rest off, in commits of its own. Returns whether anything
    /// moved. After an error the database must be opened again.
    pub fn compact(&self) -> Result<bool, LogError> {
        let mut database = self.database.write();
        let database = database.as_mut().ok_or(LogError::NotOpen)?;
        let compacted = catch_unwind(AssertUnwindSafe(|| database.compact()));
        match compacted {
            Ok(Ok(moved)) => Ok(moved),
            Ok(Err(redb::CompactionError::Storage(error))) => Err(error.into()),
            Ok(Err(other)) => Err(LogError::Io(other.to_string())),
            Err(_) => Err(LogError::Damaged("compacting it made the database engine panic".to_owned())),
        }
    }

    /// Closes the database cleanly. Reads and commits are refused from then on.
    pub fn close(&self) {
        *self.database.write() = None;
    }

    /// Makes `commit` durable. It may be called again with the same commit after an error and [`RedbLog::reopen`].
    pub fn commit(&self, commit: &Commit) -> Result<Vec<Trimmed>, LogError> {
        let database = self.database.read();
        let database = database.as_ref().ok_or(LogError::NotOpen)?;
        let transaction = database.begin_write().map_err(failed)?;
        let mut trimmed: Vec<Trimmed> = Vec::new();
        let appends = commit.appends();
        let plan = self.tail.lock().plan(appends);
        {
            let mut meta = transaction.open_table(META).map_err(failed)?;
            meta.insert(META_COMMIT, &commit.number.to_le_bytes()[..])?;
            if let Some(clock) = commit.clock {
                meta.insert(META_CLOCK, &encode(&ClockRow::V1(clock))?[..])?;
            }
            if !appends.is_empty() || !commit.trims.is_empty() {
                let mut rows = transaction.open_table(ROWS).map_err(failed)?;
                for row in &plan.rows {
                    rows.insert(row_key(row.stream, row.base), &encode_row(row.bytes_before, &row.entries)[..])?;
                }
                for trim in &commit.trims {
                    trimmed.extend(trim_rows(&mut rows, trim)?);
                }
            }
            if !plan.value.is_empty() || !plan.dropped.is_empty() {
                let mut tail = transaction.open_table(TAIL).map_err(failed)?;
                for number in &plan.dropped {
                    tail.remove(number)?;
                }
                if !plan.value.is_empty() {
                    tail.insert(commit.number, &plan.value[..])?;
                }
            }
        }
        if !commit.records.is_empty() {
            let mut streams = transaction.open_table(STREAMS).map_err(failed)?;
            for (id, record) in &commit.records {
                let mut record = record.clone();
                let append = appends.iter().find(|append| append.stream == *id);
                let trim = trimmed.iter().find(|trim| trim.stream == *id);
                if trim.is_none() && commit.unchanged.contains(id) {
                    continue;
                }
                append.into_iter().for_each(|append| apply_append(&mut record, append));
                trim.into_iter().for_each(|trim| apply_trim(&mut record, trim));
                streams.insert(*id, &encode(&StreamRow::V1(record))?[..])?;
            }
        }
        write_retained(&transaction, &commit.retained, &commit.shed)?;
        write_sessions(&transaction, &commit.sessions, &commit.shed)?;
        transaction.commit().map_err(failed)?;
        self.tail.lock().apply(commit.number, plan);
        Ok(trimmed)
    }

    /// The stored batches from the one that holds `from` on, at least one if there is any.
    pub fn read(&self, stream: u32, from: Offset, bytes_max: usize) -> Result<Vec<StoredBatch>, LogError> {
        // The tail is copied first: what moves to the rows meanwhile is then seen twice, never missed.
        let tail = self.tail.lock().entries(stream);
        let database = self.database.read();
        let database = database.as_ref().ok_or(LogError::NotOpen)?;
        let transaction = database.begin_read().map_err(failed)?;
        let rows = transaction.open_table(ROWS).map_err(failed)?;
        let mut out: Vec<StoredBatch> = Vec::new();
        let mut bytes = 0;
        let mut next = from;
        let mut take = |entry: StoredBatch, next: &mut Offset| {
            if entry.next() <= *next {
                return true; // below, or seen already
            }
            let size = entry.batch.len();
            if !out.is_empty() && (bytes + size > bytes_max || entry.batch.base_offset() != *next) {
                return false;
            }
            bytes += size;
            *next = entry.next();
            out.push(entry);
            true
        };
        let start = row_at(&rows, stream, from)?.unwrap_or(row_key(stream, from));
        'rows: for row in rows.range(start..=(stream, u64::MAX))? {
            let (key, value) = row?;
            let row = Row::decode(key.value().1 as Offset, value.value())?;
            for entry in row.entries {
                if !take(entry, &mut next) {
                    break 'rows;
                }
            }
        }
        for entry in tail {
            if !take(entry, &mut next) {
                break;
            }
        }
        Ok(out)
    }

    /// The stored batch that holds `offset`, and how many bytes lie before it.
    pub fn locate(&self, stream: u32, offset: Offset) -> Result<Option<(StoredBatch, Place)>, LogError> {
        let found = |row: Row| {
            let mut bytes_before = row.bytes_before;
            for entry in row.entries {
                if entry.batch.base_offset() <= offset && offset < entry.next() {
                    let place = Place { bytes_before, timestamp: entry.batch.base_timestamp() };
                    return Some((entry, place));
                }
                bytes_before += entry.stored_bytes();
            }
            None
        };
        let in_tail = self.tail.lock().row(stream).and_then(found);
        if in_tail.is_some() {
            return Ok(in_tail);
        }
        let database = self.database.read();
        let database = database.as_ref().ok_or(LogError::NotOpen)?;
        let transaction = database.begin_read().map_err(failed)?;
        let rows = transaction.open_table(ROWS).map_err(failed)?;
        let Some(key) = row_at(&rows, stream, offset)? else { return Ok(None) };
        let Some(value) = rows.get(key)? else { return Ok(None) };
        Ok(found(Row::decode(key.1 as Offset, value.value())?))
    }

    /// Sizes of all rows.
    #[cfg(test)]
    pub(crate) fn row_sizes(&self) -> Result<Vec<usize>, LogError> {
        let database = self.database.read();
        let database = database.as_ref().ok_or(LogError::NotOpen)?;
        let transaction = database.begin_read().map_err(failed)?;
        let mut sizes = Vec::new();
        for row in transaction.open_table(ROWS).map_err(failed)?.iter()? {
            sizes.push(row?.1.value().len());
        }
        Ok(sizes)
    }

    /// All kept sessions.
    pub fn sessions(&self) -> Result<Vec<StoredSession>, LogError> {
        let database = self.database.read();
        let database = database.as_ref().ok_or(LogError::NotOpen)?;
        let transaction = database.begin_read().map_err(failed)?;
        let mut all: BTreeMap<String, StoredSession> = BTreeMap::new();
        for row in transaction.open_table(SESSIONS).map_err(failed)?.iter()? {
            let (key, value) = row?;
            let SessionRow::V1 { user, expiry_secs, left } = decode(value.value(), "a session")?;
            let session = StoredSession {
                client_id: key.value().to_owned(),
                user,
                expiry_secs,
                left: left.map(|(order, wall_ms)| SessionLeft { order, wall_ms }),
                ..StoredSession::default()
            };
            all.insert(session.client_id.clone(), session);
        }
        // Rows without their session are of one that found no room: nobody asks for them.
        for row in transaction.open_table(SUBSCRIPTIONS).map_err(failed)?.iter()? {
            let (key, value) = row?;
            let (client, filter) = key.value();
            let SubscriptionRow::V1 { options, identifier } = decode(value.value(), "a subscription")?;
            if let Some(session) = all.get_mut(client) {
                session.subscriptions.push(StoredSubscription { filter: filter.to_owned(), options, identifier });
            }
        }
        for row in transaction.open_table(PACKETS).map_err(failed)?.iter()? {
            let (key, value) = row?;
            let (client, packet_id) = key.value();
            let PacketRow::V1 = decode(value.value(), "a packet id")?;
            if let Some(session) = all.get_mut(client) {
                session.inbound_packet_ids.push(packet_id);
            }
        }
        Ok(all.into_values().collect())
    }

    /// All retained messages.
    pub fn retained(&self) -> Result<Vec<StoredRetained>, LogError> {
        let database = self.database.read();
        let database = database.as_ref().ok_or(LogError::NotOpen)?;
        let transaction = database.begin_read().map_err(failed)?;
        let mut all = Vec::new();
        for row in transaction.open_table(RETAINED).map_err(failed)?.iter()? {
            let (key, value) = row?;
            let RetainedRow::V1 { properties_and_payload, qos, stored_ms } =
                decode(value.value(), "a retained message")?;
            all.push(StoredRetained { topic: key.value().to_owned(), properties_and_payload, qos, stored_ms });
        }
        Ok(all)
    }
}

/// Moves a stream's end behind an append.
pub fn apply_append(record: &mut StreamRecord, append: &StreamAppend) {
    let Some(last) = append.entries.last() else { return };
    record.next = last.next();
    record.next_chain = last.chain;
    record.next_bytes = append.bytes_before + append.entries.iter().map(StoredBatch::stored_bytes).sum::<u64>();
    record.last_timestamp = last.batch.max_timestamp();
}

/// Moves a stream's beginning to where a trim left it.
pub fn apply_trim(record: &mut StreamRecord, trim: &Trimmed) {
    record.first = trim.first;
    record.first_chain = trim.first_chain;
    record.first_bytes = trim.first_bytes;
    // Dropped although the cloud does not have it: a gap to declare.
    if trim.first > record.confirmed {
        let from = record.gap.map_or(record.confirmed, |gap| gap.0);
        record.gap = Some((from, trim.first));
    }
}

fn encode<T: serde::Serialize>(value: &T) -> Result<Vec<u8>, LogError> {
    postcard::to_stdvec(value).map_err(|error| LogError::Io(format!("cannot encode: {error}")))
}

fn decode<'a, T: serde::Deserialize<'a>>(bytes: &'a [u8], what: &str) -> Result<T, LogError> {
    postcard::from_bytes(bytes).map_err(|error| LogError::Damaged(format!("{what} does not decode: {error}")))
}

/// Key of the row that holds `offset` if any does: the last at or below it.
fn row_at(
    rows: &impl ReadableTable<(u32, u64), &'static [u8]>,
    stream: u32,
    offset: Offset,
) -> Result<Option<(u32, u64)>, LogError> {
    match rows.range((stream, 0)..=row_key(stream, offset))?.next_back() {
        Some(row) => Ok(Some(row?.0.value())),
        None => Ok(None),
    }
}

/// Deletes what `trim` says from the front, whole rows only. What is in the tail stays: it is little, and young.
fn trim_rows(rows: &mut redb::Table<'_, (u32, u64), &'static [u8]>, trim: &Trim) -> Result<Option<Trimmed>, LogError> {
    let mut gone: Vec<(u32, u64)> = Vec::new();
    let mut result: Option<Trimmed> = None;
    let mut bytes = 0u64;
    {
        let mut range = rows.range((trim.stream, 0)..=(trim.stream, u64::MAX))?.peekable();
        while let Some(row) = range.next() {
            let (key, value) = row?;
            let base = key.value().1 as Offset;
            let following = match range.peek() {
                Some(Ok((key, _))) => Some(key.value().1 as Offset),
                _ => None,
            };
            // A damaged row must not keep its stream full for ever; what follows it says where it ended.
            let (next, chain, row_bytes, before, youngest) = match (Row::decode(base, value.value()), following) {
                (Ok(row), _) => {
                    let last = row.entries.last();
                    let chain = last.map(|entry| entry.chain).unwrap_or_default();
                    let youngest = row.entries.iter().map(|entry| entry.batch.max_timestamp()).max();
                    (row.next(base), chain, row.bytes(), row.bytes_before, youngest.unwrap_or(i64::MIN))
                }
                (Err(_), Some(following)) => {
                    let before = result.map_or(0, |trimmed| trimmed.first_bytes);
                    (following, Chain(0), value.value().len() as u64, before, i64::MIN)
                }
                (Err(_), None) => break,
            };
            let wanted = bytes < trim.bytes || next <= trim.old;
            if next > trim.below || !wanted {
                break;
            }
            let more = gone.len() + 1 >= TRIM_ROWS_MAX;
            bytes += row_bytes;
            gone.push(key.value());
            result = Some(Trimmed {
                stream: trim.stream,
                first: next,
                first_chain: chain,
                first_bytes: before.saturating_add(row_bytes),
                youngest,
                more,
            });
            if more {
                break;
            }
        }
    }
    for key in gone {
        rows.remove(key)?;
    }
    Ok(result)
}

fn write_retained(
    transaction: &redb::WriteTransaction,
    retained: &BTreeMap<String, Option<StoredRetained>>,
    shed: &Shed,
) -> Result<(), LogError> {
    if retained.is_empty() {
        return Ok(());
    }
    let mut table = transaction.open_table(RETAINED).map_err(failed)?;
    for (topic, message) in retained {
        match message {
            Some(_) if shed.records => {}
            Some(message) => {
                let row = RetainedRow::V1 {
                    properties_and_payload: message.properties_and_payload.clone(),
                    qos: message.qos,
                    stored_ms: message.stored_ms,
                };
                table.insert(topic.as_str(), &encode(&row)?[..])?;
            }
            None => drop(table.remove(topic.as_str())?),
        }
    }
    Ok(())
}

fn write_sessions(
    transaction: &redb::WriteTransaction,
    changes: &BTreeMap<String, SessionChange>,
    shed: &Shed,
) -> Result<(), LogError> {
    if changes.is_empty() {
        return Ok(());
    }
    let mut sessions = transaction.open_table(SESSIONS).map_err(failed)?;
    let mut subscriptions = transaction.open_table(SUBSCRIPTIONS).map_err(failed)?;
    let mut packets = transaction.open_table(PACKETS).map_err(failed)?;
    for (client, change) in changes {
        let client = client.as_str();
        let may_grow = !shed.sessions.contains(client);
        if change.deleted {
            sessions.remove(client)?;
            packets.retain_in((client, 0)..=(client, u16::MAX), |_, _| false)?;
            delete_subscriptions(&mut subscriptions, client)?;
        }
        if let Some(session) = change.row.as_ref().filter(|_| may_grow || !change.new) {
            let row = SessionRow::V1 {
                user: session.user.clone(),
                expiry_secs: session.expiry_secs,
                left: session.left.map(|left| (left.order, left.wall_ms)),
            };
            sessions.insert(client, &encode(&row)?[..])?;
        }
        for (filter, subscription) in &change.subscriptions {
            match subscription {
                None => drop(subscriptions.remove((client, filter.as_str()))?),
                Some(one) if may_grow => {
                    let row = SubscriptionRow::V1 { options: one.options, identifier: one.identifier };
                    subscriptions.insert((client, filter.as_str()), &encode(&row)?[..])?;
                }
                Some(_) => {}
            }
        }
        for (id, received) in &change.packets {
            match received {
                false => drop(packets.remove((client, *id))?),
                true if !shed.records => drop(packets.insert((client, *id), &encode(&PacketRow::V1)?[..])?),
                true => {}
            }
        }
    }
    Ok(())
}

/// Deletes all subscriptions of a client. Keys are ordered by client id first, and no filter is empty.
fn delete_subscriptions(
    table: &mut redb::Table<'_, (&'static str, &'static str), &'static [u8]>,
    client: &str,
) -> Result<(), LogError> {
    let mut filters = Vec::new();
    for row in table.range((client, "")..)? {
        let (key, _) = row?;
        let (owner, filter) = key.value();
        if owner != client {
            break;
        }
        filters.push(filter.to_owned());
    }
    for filter in filters {
        table.remove((client, filter.as_str()))?;
    }
    Ok(())
}

/// Reads what the store must know, and makes the tables of a new database in one commit.
fn load(database: &Database, mint: fn() -> Incarnation) -> Result<(Contents, Tail), LogError> {
    let transaction = database.begin_write().map_err(failed)?;
    let fresh = {
        let mut meta = transaction.open_table(META).map_err(failed)?;
        let format = meta.get(META_FORMAT)?.map(|value| value.value().to_vec());
        if let Some(bytes) = &format {
            let found = u32::from_le_bytes(fixed(bytes, META_FORMAT)?);
            if found != FORMAT {
                return Err(LogError::OtherFormat { found });
            }
        } else {
            meta.insert(META_FORMAT, &FORMAT.to_le_bytes()[..])?;
            meta.insert(META_COMMIT, &0u64.to_le_bytes()[..])?;
            meta.insert(META_INCARNATION, &mint().0[..])?;
        }
        format.is_none()
    };
    if fresh {
        transaction.open_table(STREAMS).map_err(failed)?;
        transaction.open_table(ROWS).map_err(failed)?;
        transaction.open_table(TAIL).map_err(failed)?;
        transaction.open_table(RETAINED).map_err(failed)?;
        transaction.open_table(SESSIONS).map_err(failed)?;
        transaction.open_table(SUBSCRIPTIONS).map_err(failed)?;
        transaction.open_table(PACKETS).map_err(failed)?;
        transaction.commit().map_err(failed)?;
    } else {
        transaction.abort()?;
    }
    read_contents(database)
}

fn fixed<const N: usize>(bytes: &[u8], what: &str) -> Result<[u8; N], LogError> {
    bytes.try_into().map_err(|_| LogError::Damaged(format!("meta {what} has {} bytes", bytes.len())))
}

fn read_contents(database: &Database) -> Result<(Contents, Tail), LogError> {
    let transaction = database.begin_read().map_err(failed)?;
    let meta = transaction.open_table(META).map_err(failed)?;
    let value = |key: &str| -> Result<Vec<u8>, LogError> {
        let found = meta.get(key)?.map(|value| value.value().to_vec());
        found.ok_or_else(|| LogError::Damaged(format!("meta {key} is missing")))
    };
    let commit = u64::from_le_bytes(fixed(&value(META_COMMIT)?, META_COMMIT)?);
    let incarnation = Incarnation(fixed(&value(META_INCARNATION)?, META_INCARNATION)?);
    let clock = match meta.get(META_CLOCK)? {
        Some(value) => {
            let ClockRow::V1(clock) = decode(value.value(), "the clock")?;
            Some(clock)
        }
        None => None,
    };
    let mut streams = BTreeMap::new();
    for row in transaction.open_table(STREAMS).map_err(failed)?.iter()? {
        let (key, value) = row?;
        let StreamRow::V1(record) = decode(value.value(), "a stream")?;
        streams.insert(key.value(), record);
    }
    let rows = transaction.open_table(ROWS).map_err(failed)?;
    // Where a stream's rows end and its part of the tail begins; the record's own `next` may lie in the tail.
    let mut rows_end: BTreeMap<u32, Offset> = BTreeMap::new();
    for (id, record) in &mut streams {
        let mut end = record.first;
        if let Some(row) = rows.range((*id, 0)..=(*id, u64::MAX))?.next_back() {
            let (key, value) = row?;
            let base = key.value().1 as Offset;
            let row = Row::decode(base, value.value())?;
            extend(record, base, &row);
            end = row.next(base);
        }
        rows_end.insert(*id, end);
    }
    let mut tail = Tail::default();
    for row in transaction.open_table(TAIL).map_err(failed)?.iter()? {
        let (key, value) = row?;
        for (id, base, part) in tables::decode_parts(key.value(), value.value())? {
            let Some(record) = streams.get_mut(&id) else {
                return Err(LogError::Damaged(format!("the tail names stream {id}, which does not exist")));
            };
            // Parts that moved to the rows stay in the value until all of it is dead.
            if rows_end.get(&id).is_some_and(|end| base >= *end) {
                extend(record, base, &part);
                tail.add(key.value(), id, part);
            }
        }
        tail.opened(key.value(), value.value().len());
    }
    let mut retained = Vec::new();
    for row in transaction.open_table(RETAINED).map_err(failed)?.iter()? {
        let (key, value) = row?;
        retained.push((key.value().to_owned(), (key.value().len() + value.value().len()) as u32));
    }
    Ok((Contents { incarnation, commit, clock, streams, retained }, tail))
}

/// Moves a stream's end to that of a row above it.
fn extend(record: &mut StreamRecord, base: Offset, row: &Row) {
    if let Some(last) = row.entries.last().filter(|_| row.next(base) > record.next) {
        record.next = last.next();
        record.next_chain = last.chain;
        record.next_bytes = row.bytes_before + row.bytes();
        record.last_timestamp = last.batch.max_timestamp();
    }
}

#[cfg(test)]
mod tests;
