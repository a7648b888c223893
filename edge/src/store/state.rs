//! What the store holds in memory, under one lock: open batches, cursors, what waits for the next commit.
//!
//! Nothing here touches the disk. Offsets are given when a commit is sealed, from what is durable: commits follow each
//! other one by one, so what is open needs none.

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use mqtt::codec::encode_properties_and_payload;
use shared::batch::{BatchBuilder, Compression, HEADER_BYTES};
use shared::clock::{ClockJump, ClockReading, ExpiryClock};
use shared::limited;

use super::memory::{MemoryRows, Room};
use super::sessions::SessionBooks;
use super::status::Counters;
use super::*;
use crate::redb_log::{Contents, Place, StreamAppend, StreamRecord, Trim, apply_append, apply_trim, chain_after};
use crate::retention::{Budget, StreamUse, trims};
use crate::streams::Rule;

/// All that is in memory.
pub(super) struct State {
    /// Those with a rule first, in the rules' order.
    pub(super) streams: Vec<Stream>,
    by_name: HashMap<StreamName, usize>,
    pub(super) pending: Pending,
    /// Number of the last commit that was taken.
    taken: u64,
    in_flight_bytes: usize,
    pub(super) in_flight_messages: u64,
    /// Bytes of records kept in all streams.
    record_bytes: u64,
    /// Sizes of retained messages by a hash of their topic: an estimate for the budget needs no more.
    retained: HashMap<u64, u32>,
    retained_bytes: u64,
    hasher: RandomState,
    pub(super) sessions: SessionBooks,
    /// The disk took no more although the estimate saw room.
    no_room: Option<NoRoom>,
    /// When the disk was last asked what it has free.
    looked: Option<Instant>,
    /// The log says that the disk has less than the budget.
    told_limited: bool,
    /// How old things are.
    clock: ExpiryClock,
    /// The count when the last commit was taken.
    taken_ms: TimestampMs,
    pub(super) budget: Budget,
    pub(super) batch_bytes_max: usize,
    pending_bytes_max: usize,
    commit_bytes: usize,
    /// Size of the largest PUBLISH that was held since there was room.
    held_bytes: usize,
    pub(super) counters: Counters,
    pub(super) trouble: Option<String>,
    pub(super) set_aside: Vec<PathBuf>,
    pub(super) ended: bool,
    last_commit: Instant,
}

/// What waits for the next commit.
#[derive(Default)]
pub(super) struct Pending {
    /// Bytes of records and of all else.
    pub(super) bytes: usize,
    pub(super) messages: u64,
    /// What of the bytes goes into small rows, and what those rows cost beside their bytes.
    row_bytes: usize,
    retained: BTreeMap<String, Option<StoredRetained>>,
    /// Something else wants a commit now.
    pub(super) urgent: bool,
}

/// What grows is not admitted until it is time to try again.
struct NoRoom {
    /// Records too; otherwise sessions alone.
    records: bool,
    until: Instant,
    pause: Duration,
}

/// A stream in memory.
pub(super) struct Stream {
    pub(super) id: u32,
    /// As it is durable; cursors may be ahead of what is.
    pub(super) record: StreamRecord,
    rule: Option<usize>,
    retention_bytes: Option<u64>,
    retention_age_ms: Option<i64>,
    pub(super) on_full: OnFull,
    /// Its rows, if they are not in the database. Then nothing of it is ever written there.
    pub(super) memory: Option<MemoryRows>,
    /// The record differs from the one stored.
    dirty: bool,
    /// Batches that are full, and the one that is open.
    full: Vec<BatchBuilder>,
    open: BatchBuilder,
    last_timestamp: TimestampMs,
    bytes_at_confirmed: u64,
    bytes_at_safe: u64,
    pub(super) oldest_unsent_ms: Option<TimestampMs>,
    /// Since when, by the count of running time, there is always something that is not confirmed.
    pub(super) unsent_since_ms: TimestampMs,
    pub(super) parked: Option<String>,
    /// Records dropped before they were sent, since the start.
    pub(super) dropped_records: u64,
    drop_bytes: u64,
}

/// What was open of a stream, taken for a commit.
pub(super) struct OpenStream {
    id: u32,
    builders: Vec<BatchBuilder>,
    base: Offset,
    chain: Chain,
    bytes_before: u64,
}

/// What became of a PUBLISH.
pub(super) enum Verdict {
    Admitted(Admission),
    Held,
}

/// Batches are cut so that a row of one stays below 64 KiB with its key: redb rounds values up to a power of two pages.
const BATCH_BYTES_TARGET: usize = 59_000;
/// What may wait for one commit, at least.
const PENDING_BYTES_MAX: usize = 4 << 20;
/// What retained messages and packet ids may take of one commit. A thousand small rows take longer than megabytes of
/// records, and everybody waits for the commit.
const PENDING_ROW_BYTES_MAX: usize = 512 << 10;
/// What the time for one row is worth in bytes.
const ROW_BYTES: usize = 256;
/// What a PUBLISH takes beside its record: its share of headers, a packet id.
const OVERHEAD_BYTES: usize = 64;
/// How long nothing that grows is admitted after the disk was full, at first and at most.
const FULL_PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// How often a disk with little room is asked what it has free.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// The part of a commit's tickets that stands for records, retained messages and QoS 2 packet ids.
pub(super) const RECORDS_PART: u32 = 1;
/// A step back of the clock up to this is NTP at work, or a leap second, or a time zone mistaken and mended.
const STEP_BACK_MS: i64 = 60 * 60 * 1000;
/// What of the count of running time a clean end may lose.
const COUNT_STORED_MS: i64 = 60_000;
/// Ages are looked at this often when nothing else happens.
const IDLE_TRIM: Duration = Duration::from_secs(60);

impl Stream {
    fn new(id: u32, record: StreamRecord, rule: Option<(usize, &Rule)>, dirty: bool) -> Self {
        Self {
            id,
            rule: rule.map(|(index, _)| index),
            retention_bytes: rule.and_then(|(_, rule)| rule.retention_bytes),
            retention_age_ms: rule.and_then(|(_, rule)| rule.retention_age_ms),
            on_full: rule.map_or(OnFull::Hold, |(_, rule)| rule.on_full),
            memory: rule.and_then(|(_, rule)| rule.memory_bytes).map(MemoryRows::new),
            dirty,
            full: Vec::new(),
            open: BatchBuilder::default(),
            last_timestamp: record.last_timestamp,
            bytes_at_confirmed: record.next_bytes,
            bytes_at_safe: record.next_bytes,
            oldest_unsent_ms: None,
            unsent_since_ms: 0,
            parked: None,
            dropped_records: 0,
            drop_bytes: 0,
            record,
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.record.next_bytes.saturating_sub(self.record.first_bytes)
    }

    pub(super) fn bytes_safe(&self) -> u64 {
        self.bytes_at_safe.saturating_sub(self.record.first_bytes)
    }

    pub(super) fn unsent_bytes(&self) -> u64 {
        self.record.next_bytes.saturating_sub(self.bytes_at_confirmed.max(self.record.first_bytes))
    }

    pub(super) fn positions(&self) -> StreamPositions {
        StreamPositions {
            incarnation: self.record.incarnation,
            first: self.record.first,
            next: self.record.next,
            confirmed: self.record.confirmed,
            safe: self.record.safe,
            bytes: self.bytes(),
            unsent_bytes: self.unsent_bytes(),
            oldest_unsent_ms: self.oldest_unsent_ms,
            parked: self.parked.clone(),
            gap: self.record.gap,
            topic: self.record.topic.clone(),
        }
    }

    /// A new life: what is not safe is to be sent again, from `from` on, which lies at `place`.
    pub(super) fn renew(&mut self, incarnation: Incarnation, from: Offset, place: Option<Place>) {
        self.record.incarnation = incarnation;
        (self.record.confirmed, self.record.renewed_at) = (from, from);
        self.bytes_at_confirmed = place.map_or(self.bytes_at_safe, |place| place.bytes_before);
        self.oldest_unsent_ms = place.map(|place| place.timestamp);
        self.dirty = true;
    }

    pub(super) fn close_gap(&mut self, upto: Offset) {
        if let Some((from, to)) = self.record.gap {
            self.record.gap = (upto < to).then_some((from.max(upto), to));
            self.dirty = true;
        }
    }

    pub(super) fn move_cursor(&mut self, offset: Offset, place: Option<Place>, safe: bool) {
        let at_end = offset == self.record.next;
        let bytes = if at_end { Some(self.record.next_bytes) } else { place.map(|place| place.bytes_before) };
        if safe && offset > self.record.safe {
            self.record.safe = offset;
            self.bytes_at_safe = self.bytes_at_safe.max(bytes.unwrap_or(0));
            self.dirty = true;
        }
        // What is safe is confirmed.
        if offset > self.record.confirmed {
            self.record.confirmed = offset;
            self.bytes_at_confirmed = self.bytes_at_confirmed.max(bytes.unwrap_or(0));
            self.oldest_unsent_ms =
                if at_end { None } else { place.map(|place| place.timestamp).or(self.oldest_unsent_ms) };
            self.close_gap(offset);
            self.dirty = true;
        }
    }
}

impl OpenStream {
    /// Seals what was open.
    pub(super) fn seal(self) -> StreamAppend {
        let (mut base, mut chain) = (self.base, self.chain);
        let mut entries = Vec::with_capacity(self.builders.len());
        for builder in self.builders {
            let batch = builder.finish(base, Compression::None);
            chain = chain_after(chain, &batch);
            let entry = Stored { batch, chain };
            base = entry.next();
            entries.push(entry);
        }
        StreamAppend { stream: self.id, bytes_before: self.bytes_before, entries }
    }
}

impl State {
    pub(super) fn new(
        contents: Contents,
        sessions: &[StoredSession],
        reading: ClockReading,
        rules: &Rules,
        budget: Budget,
        batch_bytes_max: usize,
        commit_bytes: usize,
    ) -> Self {
        let mut clock = ExpiryClock::new(contents.clock, reading);
        say_jump(clock.look(reading));
        let mut stored = contents.streams;
        let mut streams = Vec::new();
        let mut next_id = stored.keys().next_back().map_or(0, |id| id.saturating_add(1));
        for rule in rules.all().iter().enumerate() {
            if rule.1.memory_bytes.is_some() {
                // What the database has under that name is safe in the cloud, or the store would not have opened.
                stored.retain(|_, record| record.name != rule.1.name);
                let record = StreamRecord::new(rule.1.name.clone(), rule.1.topic.clone(), open::mint());
                next_id += 1;
                streams.push(Stream::new(next_id - 1, record, Some(rule), false));
                continue;
            }
            let known = stored.iter().find(|(_, record)| record.name == rule.1.name).map(|(id, _)| *id);
            let stream = match known.and_then(|id| stored.remove_entry(&id)) {
                Some((id, mut record)) => {
                    let moved = record.topic != rule.1.topic;
                    record.topic = rule.1.topic.clone();
                    Stream::new(id, record, Some(rule), moved)
                }
                None => {
                    let record = StreamRecord::new(rule.1.name.clone(), rule.1.topic.clone(), contents.incarnation);
                    next_id += 1;
                    Stream::new(next_id - 1, record, Some(rule), true)
                }
            };
            streams.push(stream);
        }
        // A rule that is gone: its records are still forwarded.
        streams.extend(stored.into_iter().map(|(id, record)| Stream::new(id, record, None, false)));
        let by_name = streams.iter().enumerate().map(|(at, stream)| (stream.record.name.clone(), at)).collect();
        let record_bytes = streams.iter().map(Stream::bytes).sum();
        let hasher = RandomState::new();
        Self {
            streams,
            by_name,
            pending: Pending::default(),
            taken: contents.commit,
            in_flight_bytes: 0,
            in_flight_messages: 0,
            record_bytes,
            retained_bytes: contents.retained.iter().map(|(_, size)| u64::from(*size)).sum(),
            retained: contents.retained.into_iter().map(|(topic, size)| (hasher.hash_one(&topic[..]), size)).collect(),
            hasher,
            sessions: SessionBooks::new(sessions, budget.session_bytes_max()),
            no_room: None,
            looked: None,
            told_limited: false,
            taken_ms: clock.now(reading.at),
            clock,
            budget,
            batch_bytes_max,
            pending_bytes_max: PENDING_BYTES_MAX.max(commit_bytes.saturating_mul(2)),
            commit_bytes,
            held_bytes: 0,
            counters: Counters::default(),
            trouble: None,
            set_aside: Vec::new(),
            ended: false,
            last_commit: Instant::now(),
        }
    }

    /// After opening: what lies before the cursors.
    pub(super) fn place_cursors(&mut self, id: u32, confirmed: Option<Place>, safe: Option<Place>) {
        let Some(stream) = self.streams.iter_mut().find(|stream| stream.id == id) else { return };
        let record = &stream.record;
        // Without a place the cursor is at the end, or below what is kept.
        let bytes = |offset: Offset, place: Option<Place>| match place {
            Some(place) => place.bytes_before,
            None if offset >= record.next => record.next_bytes,
            None => record.first_bytes,
        };
        stream.bytes_at_confirmed = bytes(record.confirmed, confirmed);
        stream.bytes_at_safe = bytes(record.safe, safe);
        stream.oldest_unsent_ms = confirmed.map(|place| place.timestamp).filter(|_| record.confirmed < record.next);
        stream.unsent_since_ms = self.taken_ms;
    }

    pub(super) fn by_name(&self, name: &StreamName) -> Option<&Stream> {
        self.by_name.get(name).and_then(|at| self.streams.get(*at))
    }

    pub(super) fn by_name_mut(&mut self, name: &StreamName) -> Option<&mut Stream> {
        let at = *self.by_name.get(name)?;
        self.streams.get_mut(at)
    }

    /// The ticket of what waits now and always goes in.
    pub(super) fn ticket(&self) -> Ticket {
        Ticket::of(self.taken + 1)
    }

    /// The ticket of a part of what waits now.
    fn part(&self, part: u32) -> Ticket {
        Ticket { part, ..self.ticket() }
    }

    /// Writes a session's row.
    pub(super) fn save_session(&mut self, session: &StoredSession) -> Result<Ticket, Refusal> {
        self.admit_session(self.sessions.growth_of_row(session), self.sessions.knows(&session.client_id))?;
        self.sessions.save(session).map(|part| self.part(part))
    }

    /// Writes a subscription.
    pub(super) fn save_subscription(&mut self, client: &str, one: &StoredSubscription) -> Result<Ticket, Refusal> {
        self.admit_session(self.sessions.growth_of_subscription(client, &one.filter), false)?;
        self.sessions.subscribe(client, one).map(|part| self.part(part))
    }

    fn admit_session(&self, growth: usize, always: bool) -> Result<(), Refusal> {
        let fits =
            || self.live() + growth as u64 * 2 <= self.budget.ceiling_for_sessions() && !self.is_disk_full(false);
        match growth {
            _ if self.ended => Err(Refusal::Unavailable),
            0 => Ok(()),
            _ if always || fits() => Ok(()),
            _ => Err(Refusal::QuotaExceeded),
        }
    }

    /// The disk has refused what fits by our estimate, and it is not time to try again.
    fn is_disk_full(&self, records: bool) -> bool {
        let closed = |no_room: &NoRoom| (no_room.records || !records) && Instant::now() < no_room.until;
        self.no_room.as_ref().is_some_and(closed)
    }

    /// Why the disk takes no records at present.
    pub(super) fn why_no_room(&self) -> Option<String> {
        (self.is_disk_full(true) || (self.budget.is_limited() && self.is_full()))
            .then(|| "the disk is full, or takes less than it says: free some space on it".to_owned())
    }

    /// Whether it is time to ask the disk what it has free: after each commit, and while it has little.
    pub(super) fn looks_at_disk(&self) -> bool {
        self.budget.is_limited() && self.looked.is_none_or(|looked| looked.elapsed() > LOOK_AGAIN)
    }

    /// The file takes `used` bytes, and the disk has `free`.
    pub(super) fn disk_has(&mut self, used: u64, free: Option<u64>) {
        let Some(free) = free else { return };
        self.budget.limit_to(used, free);
        self.looked = Some(Instant::now());
        // Told once, and again only after there was clearly enough.
        if used.saturating_add(free) > self.budget.bytes_max + self.budget.bytes_max / 8 {
            self.told_limited = false;
        }
        if self.budget.is_limited() && !std::mem::replace(&mut self.told_limited, true) {
            tracing::warn!(
                used,
                free,
                budget = self.budget.bytes_max,
                "the disk has less free than the disk budget needs: what it has is what may be used"
            );
        }
    }

    /// Whether the committer must be told that waiting bytes rose from `before`: when the first came, and when enough have.
    pub(super) fn rings(&self, before: usize) -> bool {
        let now = self.pending.bytes;
        now > before && (before == 0 || (before < self.commit_bytes && now >= self.commit_bytes))
    }

    /// Estimate of what the database takes, and will take with what was admitted.
    pub(super) fn live(&self) -> u64 {
        let records = self.record_bytes + (self.pending.bytes + self.in_flight_bytes) as u64;
        Budget::live(records, self.retained_bytes + self.sessions.bytes())
    }

    /// Waiting bytes leave room for so many more.
    fn has_room_to_wait(&self, bytes: usize) -> bool {
        self.pending.bytes == 0 || self.pending.bytes + bytes <= self.pending_bytes_max
    }

    fn has_room_for_rows(&self, row_bytes: usize) -> bool {
        let waiting = self.pending.row_bytes;
        row_bytes == 0 || waiting == 0 || waiting + row_bytes <= PENDING_ROW_BYTES_MAX
    }

    fn has_room_on_disk(&self, bytes: usize) -> bool {
        self.live() + bytes as u64 * 2 <= self.budget.ceiling() && !self.is_disk_full(true)
    }

    /// Whether what was held may be offered again.
    pub(super) fn has_room_for_held(&self) -> bool {
        let in_memory = self.streams.iter().all(Stream::memory_has_room);
        in_memory && self.has_room_to_wait(self.held_bytes) && self.has_room_on_disk(self.held_bytes)
    }

    /// Of what the database takes by our estimate, what may go when room is needed.
    pub(super) fn deletable_bytes(&self) -> u64 {
        let safe: u64 = self.in_database().map(Stream::bytes_safe).sum();
        (safe + safe / 8).min(self.live())
    }

    /// Why a stream would hold up or refuse `bytes` bytes of records, when `kept` bytes of the database may not go. One that
    /// drops its oldest takes them.
    pub(super) fn full_stream(&self, bytes: u64, kept: u64) -> Option<String> {
        let on_disk = kept.saturating_add(bytes * 2) <= self.budget.ceiling();
        let takes = |stream: &&Stream| {
            stream.on_full == OnFull::DropOldest
                || if stream.memory.is_some() { stream.memory_takes(bytes) } else { on_disk }
        };
        let full = self.streams.iter().filter(|stream| stream.rule.is_some()).find(|stream| !takes(stream))?;
        let what = if full.memory.is_some() { "its memory_bytes" } else { "the disk budget" };
        Some(format!("stream {} is full: {what} holds records that the cloud has not made safe", full.record.name))
    }

    /// Whether nothing more fits, for status.
    pub(super) fn is_full(&self) -> bool {
        !self.has_room_on_disk(self.held_bytes)
    }

    /// Takes a PUBLISH or says why not.
    pub(super) fn admit(
        &mut self,
        core: &Core,
        session: &SessionRef<'_>,
        publish: &Publish<'_>,
        rule: Option<usize>,
    ) -> Verdict {
        use Verdict::{Admitted, Held};
        let packet = publish.packet_id.filter(|_| publish.qos == 2 && session.kept);
        if rule.is_none() && !publish.retain && packet.is_none() {
            return Admitted(Admission::NotStored);
        }
        if self.ended {
            return Admitted(Admission::Refused(Refusal::Unavailable));
        }
        let stream = rule.and_then(|index| Some((index, core.rules.all().get(index)?)));
        let mut bytes = OVERHEAD_BYTES;
        if let Some((_, rule)) = stream {
            let record = rule.record_bytes_max(&core.edge, session.client_id, publish);
            if record + HEADER_BYTES > self.batch_bytes_max {
                return Admitted(Admission::Refused(Refusal::TooLarge));
            }
            bytes += record;
        }
        if packet.is_some() && !self.sessions.has_room_for_packet(session.client_id) {
            return Admitted(Admission::Refused(Refusal::QuotaExceeded));
        }
        let now_ms = self.taken_ms;
        let memory = stream.filter(|(_, rule)| rule.memory_bytes.is_some());
        if let Some((index, rule)) = memory
            && let Some(found) = self.streams.get_mut(index)
        {
            match found.memory_room(bytes, now_ms) {
                Room::Held => return Held,
                Room::Refused => return Admitted(Admission::Refused(Refusal::QuotaExceeded)),
                Room::Yes => {}
            }
            if !publish.retain && packet.is_none() {
                found.push(rule, core, session, publish, bytes);
                // Nothing of it waits for a commit.
                return Admitted(Admission::Stored(Ticket::default()));
            }
            bytes = OVERHEAD_BYTES;
        }
        let mut row_bytes = if packet.is_some() { ROW_BYTES } else { 0 };
        let mut retained = 0;
        if publish.retain {
            retained = 2 * (publish.topic.len() + publish.payload.len() + publish.properties.bytes());
            row_bytes += retained + ROW_BYTES;
        }
        bytes += retained;
        if !self.has_room_to_wait(bytes) || !self.has_room_for_rows(row_bytes) {
            self.held_bytes = self.held_bytes.max(bytes);
            return Held;
        }
        // A packet id alone, or the end of a retained message, may use the reserve.
        let grows = (stream.is_some() && memory.is_none()) || (publish.retain && !publish.payload.is_empty());
        if grows && !self.has_room_on_disk(bytes) {
            let on_full = stream.map_or(OnFull::Reject, |(_, rule)| rule.on_full);
            let found = stream.and_then(|(index, _)| self.streams.get_mut(index));
            match (on_full, found) {
                (OnFull::Reject, _) => return Admitted(Admission::Refused(Refusal::QuotaExceeded)),
                // Twice the record: what is dropped must make up for how rows pack.
                (OnFull::DropOldest, Some(found))
                    if memory.is_none() && found.bytes() > found.drop_bytes + bytes as u64 * 2 =>
                {
                    found.drop_bytes += bytes as u64 * 2;
                }
                _ => {
                    self.held_bytes = self.held_bytes.max(bytes);
                    return Held;
                }
            }
        }
        if let Some((index, rule)) = stream
            && let Some(found) = self.streams.get_mut(index)
        {
            // Rules and streams share their first indexes.
            debug_assert_eq!(found.rule, Some(index));
            let bound = rule.record_bytes_max(&core.edge, session.client_id, publish) + OVERHEAD_BYTES;
            let taken = found.push(rule, core, session, publish, bound);
            bytes = retained + if memory.is_some() { OVERHEAD_BYTES } else { taken + OVERHEAD_BYTES };
        }
        if publish.retain {
            self.retain(publish, (core.clock)().at);
        }
        if let Some(packet_id) = packet {
            self.sessions.add_packet(session.client_id, packet_id);
        }
        self.pending.bytes += bytes;
        self.pending.row_bytes += row_bytes;
        self.pending.messages += 1;
        Admitted(Admission::Stored(self.part(RECORDS_PART)))
    }

    fn retain(&mut self, publish: &Publish<'_>, at: Instant) {
        let mut message = None;
        if !publish.payload.is_empty() {
            let mut properties_and_payload = Vec::new();
            if let Err(error) =
                encode_properties_and_payload(&publish.properties, publish.payload, &mut properties_and_payload)
            {
                // What came off a wire fits into a packet.
                return limited!(warn, topic = publish.topic, %error, "a message cannot be retained");
            }
            message = Some(StoredRetained {
                topic: publish.topic.to_owned(),
                properties_and_payload,
                qos: publish.qos,
                stored_ms: self.clock.now(at),
            });
        }
        let size = message.as_ref().map_or(0, |one| (one.topic.len() + one.properties_and_payload.len()) as u32);
        self.count_retained(publish.topic, size);
        self.pending.retained.insert(publish.topic.to_owned(), message);
    }

    /// Deletes a retained message.
    pub(super) fn forget_retained(&mut self, topic: &str) {
        self.count_retained(topic, 0);
        self.pending.retained.insert(topic.to_owned(), None);
    }

    fn count_retained(&mut self, topic: &str, size: u32) {
        let topic = self.hasher.hash_one(topic);
        let before = if size > 0 { self.retained.insert(topic, size) } else { self.retained.remove(&topic) };
        self.retained_bytes =
            self.retained_bytes.saturating_sub(u64::from(before.unwrap_or(0))).saturating_add(u64::from(size));
    }

    /// How soon the committer should run.
    pub(super) fn urgency(&self) -> Urgency {
        let pending = &self.pending;
        if pending.urgent || pending.messages > 0 || self.sessions.has_pending() {
            return Urgency::Now { bytes: pending.bytes + self.sessions.pending_bytes() };
        }
        let old = self.last_commit.elapsed() > IDLE_TRIM
            && self.in_database().any(|stream| stream.retention_age_ms.is_some() && stream.bytes_safe() > 0);
        if old || self.in_database().any(|stream| stream.dirty) || !pending.retained.is_empty() {
            Urgency::Later
        } else {
            Urgency::None
        }
    }

    /// Whether somebody waits for room that a trim could make.
    pub(super) fn trims_wanted(&self) -> bool {
        self.held_bytes > 0 && self.in_database().any(|stream| stream.bytes_safe() > 0)
    }

    fn in_database(&self) -> impl Iterator<Item = &Stream> {
        self.streams.iter().filter(|stream| stream.memory.is_none())
    }

    /// Shows what came for streams in memory. True if anything did.
    pub(super) fn seal_memory(&mut self, at: Instant) -> bool {
        let before: Offset = self.streams.iter().map(|stream| stream.record.next).sum();
        let now_ms = self.clock.now(at);
        self.streams.iter_mut().for_each(|stream| stream.seal_memory(now_ms));
        self.streams.iter().map(|stream| stream.record.next).sum::<Offset>() != before
    }

    fn excess(&self) -> u64 {
        self.budget.excess(self.live() + 2 * self.held_bytes as u64)
    }

    /// Decides what the next commit deletes.
    pub(super) fn plan_trims(&mut self, at: Instant) -> Vec<Trim> {
        let now_ms = self.clock.now(at);
        let uses: Vec<StreamUse> = self.in_database().map(|stream| stream.in_use(now_ms)).collect();
        trims(&uses, self.excess())
    }

    /// At a clean end: the count of running time is stored if it went on for long since it was.
    pub(super) fn store_count(&mut self, at: Instant) {
        self.pending.urgent |= self.age_ms(at, self.taken_ms) > COUNT_STORED_MS;
    }

    /// How long ago that was, by the count of running time.
    pub(super) fn age_ms(&self, at: Instant, counted_ms: TimestampMs) -> i64 {
        self.clock.now(at).saturating_sub(counted_ms).max(0)
    }

    /// Takes what waits: a commit without its appends, and these unsealed.
    pub(super) fn take(&mut self, reading: ClockReading) -> (Commit, Vec<OpenStream>) {
        say_jump(self.clock.look(reading));
        let now_ms = self.clock.now(reading.at);
        self.taken_ms = now_ms;
        for stream in self.streams.iter_mut().filter(|stream| stream.memory.is_none()) {
            if let Some(age_ms) = stream.retention_age_ms {
                stream.dirty |= stream.record.ages.note(now_ms, stream.record.next, age_ms);
            }
        }
        let (trims, clock) = (self.plan_trims(reading.at), Some(self.clock.state(reading.at)));
        let mut commit = Commit { number: self.taken + 1, trims, clock, ..Commit::default() };
        self.taken += 1;
        let pending = std::mem::take(&mut self.pending);
        commit.retained = pending.retained;
        commit.sessions = self.sessions.take();
        self.in_flight_bytes = pending.bytes;
        self.in_flight_messages = pending.messages;
        let mut open = Vec::new();
        for stream in self.streams.iter_mut().filter(|stream| stream.memory.is_none()) {
            let trimmed = commit.trims.iter().any(|trim| trim.stream == stream.id);
            if stream.dirty || trimmed {
                if !stream.dirty {
                    commit.unchanged.insert(stream.id);
                }
                commit.records.insert(stream.id, stream.record.clone());
                stream.dirty = false;
            }
            stream.drop_bytes = 0;
            open.extend(stream.take());
        }
        (commit, open)
    }

    /// What was taken is durable.
    pub(super) fn committed(&mut self, commit: Commit, trimmed: &[Trimmed], took: Duration) {
        for append in commit.appends() {
            let Some(stream) = self.streams.iter_mut().find(|stream| stream.id == append.stream) else { continue };
            if let (None, Some(first)) = (stream.oldest_unsent_ms, append.entries.first()) {
                stream.oldest_unsent_ms = Some(first.batch.base_timestamp());
                stream.unsent_since_ms = self.taken_ms;
            }
            apply_append(&mut stream.record, append);
        }
        self.settle_room(&commit);
        for trim in trimmed {
            let Some(stream) = self.streams.iter_mut().find(|stream| stream.id == trim.stream) else { continue };
            let (gap, unsent_from) = (stream.record.gap, stream.record.first.max(stream.record.confirmed));
            apply_trim(&mut stream.record, trim);
            if stream.record.gap != gap {
                stream.dropped_records += trim.first.saturating_sub(unsent_from).max(0) as u64;
                // What is oldest now came right after what went.
                stream.oldest_unsent_ms = stream.oldest_unsent_ms.map(|oldest| oldest.max(trim.youngest));
                shared::limited!(warn, stream = %stream.record.name, gap = ?stream.record.gap, "records were dropped before \
                    they were sent, as on_full = \"drop-oldest\" says");
            }
            self.pending.urgent |= trim.more;
        }
        self.record_bytes = self.in_database().map(Stream::bytes).sum();
        self.counters.committed(self.in_flight_messages, took);
        self.in_flight_bytes = 0;
        self.in_flight_messages = 0;
        self.last_commit = Instant::now();
        if self.held_bytes > 0 {
            if self.has_room_for_held() {
                self.held_bytes = 0;
            } else if !self.has_room_on_disk(self.held_bytes) && self.in_database().any(|one| one.bytes_safe() > 0) {
                // Somebody is held, and more can be deleted.
                self.pending.urgent |= trimmed.iter().any(|trim| trim.more);
            }
        }
    }
}

fn say_jump(jump: Option<ClockJump>) {
    if let Some(ClockJump { clock_ms, expected_ms }) = jump {
        tracing::warn!(
            clock_ms,
            expected_ms,
            "the clock jumped, or this was off for so long: nothing is deleted sooner for it, and what it marks meanwhile has its time"
        );
    }
}

/// The timestamp of the next record. Kafka searches by time and expects it to rise, so a clock that is set back a little does
/// not show. One that is set back further was wrong before: it must not mark all records that follow.
fn next_timestamp(last: TimestampMs, now: TimestampMs) -> TimestampMs {
    if now >= last || last.saturating_sub(now) <= STEP_BACK_MS { now.max(last) } else { now }
}

impl State {
    /// What found no room in a commit closes the door for a while; what did opens it.
    fn settle_room(&mut self, commit: &Commit) {
        self.sessions.not_stored(&commit.sessions, &commit.shed);
        if commit.shed.is_empty() {
            if !commit.appends.is_empty() {
                self.no_room = None;
            }
            return;
        }
        let pause = self.no_room.as_ref().map_or(FULL_PAUSE.0, |before| (before.pause * 2).min(FULL_PAUSE.1));
        self.no_room = Some(NoRoom { records: commit.shed.records, until: Instant::now() + pause, pause });
    }
}

impl Stream {
    fn in_use(&self, now_ms: TimestampMs) -> StreamUse {
        StreamUse {
            stream: self.id,
            first: self.record.first,
            next: self.record.next,
            safe: self.record.safe,
            bytes: self.bytes(),
            bytes_safe: self.bytes_safe(),
            retention_bytes: self.retention_bytes,
            old: self.retention_age_ms.map_or(0, |age_ms| self.record.ages.older_than(now_ms, age_ms)),
            on_full: self.on_full,
            drop_bytes: self.drop_bytes,
        }
    }

    /// Adds a record of at most `bound` bytes and returns what it took.
    fn push(
        &mut self,
        rule: &Rule,
        core: &Core,
        session: &SessionRef<'_>,
        publish: &Publish<'_>,
        bound: usize,
    ) -> usize {
        let timestamp = next_timestamp(self.last_timestamp, publish.now_ms);
        // Within a batch time rises, so that its greatest timestamp is its last.
        let cut = self.open.len() + bound > BATCH_BYTES_TARGET || timestamp < self.last_timestamp;
        if !self.open.is_empty() && cut {
            self.full.push(std::mem::take(&mut self.open));
        }
        self.last_timestamp = timestamp;
        let before = self.open.len();
        rule.push(&mut self.open, self.last_timestamp, &core.edge, session.client_id, publish);
        self.open.len() - before
    }

    /// Takes the batches that are full and the one that is open.
    pub(super) fn take_builders(&mut self) -> Vec<BatchBuilder> {
        let mut builders = std::mem::take(&mut self.full);
        if !self.open.is_empty() {
            builders.push(std::mem::take(&mut self.open));
        }
        builders
    }

    /// Bytes of records that are in no sealed batch yet.
    pub(super) fn open_bytes(&self) -> usize {
        let open = if self.open.is_empty() { 0 } else { self.open.len() };
        open + self.full.iter().map(BatchBuilder::len).sum::<usize>()
    }

    fn take(&mut self) -> Option<OpenStream> {
        let builders = self.take_builders();
        (!builders.is_empty()).then_some(OpenStream {
            id: self.id,
            builders,
            base: self.record.next,
            chain: self.record.next_chain,
            bytes_before: self.record.next_bytes,
        })
    }
}
