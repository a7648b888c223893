//! The edge's answer to what the MQTT front asks of a store, and what the uplink reads of it.
//!
//! Connection tasks append records to the open batch of their stream, under one lock per read buffer; the committer
//! (see [`crate::redb_log::committer`]) takes what is open, makes it durable in one transaction, and only then tickets
//! and offsets move. Nothing here blocks on the disk but [`EdgeStore::open`], `load_*`, [`EdgeStore::read`],
//! [`EdgeStore::chain_at`] and the setting of cursors, which read a row.

mod memory;
mod open;
mod sessions;
mod state;
mod status;
mod uplink;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use mqtt::store::{
    Admission, Publish, Refusal, SessionRef, Store, StoreFailed, StoredRetained, StoredSession, StoredSubscription,
    Ticket,
};
use parking_lot::Mutex;
use shared::log::{BoxFuture, Chain};
use shared::name::{EdgeId, Incarnation, Offset, StreamName, TimestampMs, TopicName};
use tokio::sync::watch;

use crate::redb_log::backend::DiskBound;
use crate::redb_log::committer::{Bell, Urgency, Work};
use crate::redb_log::{Commit, LogError, RedbLog, StoredBatch as Stored, Trimmed};
use crate::streams::{OnFull, RuleError, Rules};

pub use crate::redb_log::StoredBatch;
pub use open::{Clock, OpenError, StoreSettings, lock};
use state::{State, Verdict};
pub use status::{SetAside, StoreStatus, StreamStatus};

/// The edge's store.
pub struct EdgeStore {
    core: Arc<Core>,
    committer: Mutex<Option<JoinHandle<()>>>,
}

/// What the connections, the uplink and the committer share.
struct Core {
    log: RedbLog,
    rules: Rules,
    edge: EdgeId,
    state: Mutex<State>,
    /// Newest durable commit, for the question asked most.
    durable: AtomicU64,
    /// Newest commit of which a part found no room, and the parts of the newest such commits.
    refused: AtomicU64,
    refusals: Mutex<BTreeMap<u64, BTreeSet<u32>>>,
    progress: watch::Sender<Progress>,
    /// Counts commits and closings: those who wait for room look again.
    room: watch::Sender<u64>,
    bell: Bell,
    bound: Arc<DiskBound>,
    clock: Clock,
}

/// Commits of which refused parts are remembered. Whoever waits for one asks at the very next commit.
const REFUSALS_MAX: usize = 4096;

#[derive(Debug, Clone, Default)]
struct Progress {
    durable: u64,
    /// Nothing more will become durable.
    ended: Option<Arc<str>>,
}

/// A stream as the uplink sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamPositions {
    /// The life the stream is in.
    pub incarnation: Incarnation,
    /// The first record that is kept.
    pub first: Offset,
    /// The offset after the last durable record.
    pub next: Offset,
    /// Below this the cloud has everything in its log.
    pub confirmed: Offset,
    /// Below this the cloud has everything where it cannot be lost.
    pub safe: Offset,
    /// Bytes kept.
    pub bytes: u64,
    /// Bytes kept that the cloud has not confirmed.
    pub unsent_bytes: u64,
    /// Timestamp of the oldest record that is not confirmed.
    pub oldest_unsent_ms: Option<TimestampMs>,
    /// Why the stream is not forwarded, if it is not.
    pub parked: Option<String>,
    /// Records that were dropped and that the cloud was not told of (end exclusive).
    pub gap: Option<(Offset, Offset)>,
    /// The Kafka topic.
    pub topic: TopicName,
}

/// Why a stream could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// No such stream.
    #[error("no such stream: {0}")]
    Unknown(StreamName),
    /// Trimmed already, or not there yet.
    #[error("offset {requested} is outside {first} .. {next}")]
    OutOfRange {
        /// What was asked for.
        requested: Offset,
        /// The first that is kept.
        first: Offset,
        /// The offset after the last.
        next: Offset,
    },
    /// What is stored is not what was written.
    #[error("stored data is damaged: {0}")]
    Damaged(String),
    /// The disk failed; it may come back.
    #[error("storage failed: {0}")]
    Storage(String),
}

impl From<LogError> for StreamError {
    fn from(error: LogError) -> Self {
        match error {
            LogError::Damaged(what) => Self::Damaged(what),
            other => Self::Storage(other.to_string()),
        }
    }
}

impl std::fmt::Debug for EdgeStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EdgeStore").field("durable", &self.core.durable).finish_non_exhaustive()
    }
}

/// What the uplink asks.
impl EdgeStore {
    /// The names of all streams: those with a rule in the rules' order, then those whose rule is gone but not their records.
    pub fn streams(&self) -> Vec<StreamName> {
        self.core.state.lock().streams.iter().map(|stream| stream.record.name.clone()).collect()
    }

    /// Where a stream stands.
    pub fn position(&self, stream: &StreamName) -> Option<StreamPositions> {
        let state = self.core.state.lock();
        state.by_name(stream).map(|stream| stream.positions())
    }

    /// Durable batches from the one that holds `from` on: whole ones, at least one if there is any, none at the end.
    pub fn read(&self, stream: &StreamName, from: Offset, bytes_max: usize) -> Result<Vec<StoredBatch>, StreamError> {
        let (id, next) = {
            let state = self.core.state.lock();
            let found = state.by_name(stream).ok_or_else(|| StreamError::Unknown(stream.clone()))?;
            let (first, next) = (found.record.first, found.record.next);
            if from < first || from > next {
                return Err(StreamError::OutOfRange { requested: from, first, next });
            }
            if let Some(memory) = &found.memory {
                return Ok(memory.read(from, bytes_max));
            }
            (found.id, next)
        };
        if from == next {
            return Ok(Vec::new());
        }
        let mut batches = self.core.log.read(id, from, bytes_max)?;
        // What the committer has made durable and not yet told of stays unseen: all answers speak of one state.
        batches.retain(|batch| batch.next() <= next);
        match batches.first().map(|batch| batch.batch.base_offset()) {
            // Dropped between the look at the positions and the read.
            Some(first) if first > from => Err(StreamError::OutOfRange { requested: from, first, next }),
            Some(_) => Ok(batches),
            None => Err(StreamError::Damaged(format!("no row holds offset {from} of stream {stream}"))),
        }
    }

    /// The chain value after record `next - 1`, if that is the last of a stored batch; `None` when it is trimmed, never
    /// was, or lies inside a batch.
    pub fn chain_at(&self, stream: &StreamName, next: Offset) -> Option<Chain> {
        let id = {
            let state = self.core.state.lock();
            let found = state.by_name(stream)?;
            let record = &found.record;
            if next == record.next {
                return Some(record.next_chain);
            }
            if next == record.first {
                return Some(record.first_chain);
            }
            if next < record.first || next > record.next {
                return None;
            }
            if let Some(memory) = &found.memory {
                return memory.chain_at(next);
            }
            found.id
        };
        let (entry, _) = self.core.log.locate(id, next - 1).ok()??;
        (entry.next() == next).then_some(entry.chain)
    }

    /// The cloud has everything below `offset` in its log. Never moves back; what lies beyond the end counts as the end.
    pub fn set_confirmed(&self, stream: &StreamName, offset: Offset) {
        self.core.move_cursor(stream, offset, false);
    }

    /// The cloud has everything below `offset` where it cannot be lost: it may be deleted here.
    pub fn set_safe(&self, stream: &StreamName, offset: Offset) {
        self.core.move_cursor(stream, offset, true);
    }

    /// Begins a new life of the stream: records keep their offsets, and what is not `safe` is to be sent again. Durable
    /// when it resolves.
    pub fn renew_incarnation(&self, stream: &StreamName) -> BoxFuture<'static, Result<Incarnation, StoreFailed>> {
        let incarnation = open::mint();
        let unknown = StoreFailed(format!("no such stream: {stream}"));
        let found = {
            let mut state = self.core.state.lock();
            if let Some(found) = state.by_name_mut(stream)
                && let Some(memory) = &found.memory
            {
                let from = found.record.safe.max(found.record.first);
                let place = memory.place(found.record.first_bytes, from);
                found.renew(incarnation, from, place);
                return Box::pin(std::future::ready(Ok(incarnation)));
            }
            state.by_name(stream).map(|found| (found.id, found.record.safe.max(found.record.first)))
        };
        let Some((id, from)) = found else { return Box::pin(std::future::ready(Err(unknown))) };
        let place = self.core.log.locate(id, from).ok().flatten().map(|(_, place)| place);
        let ticket = {
            let mut state = self.core.state.lock();
            let Some(found) = state.by_name_mut(stream) else {
                return Box::pin(std::future::ready(Err(unknown)));
            };
            found.renew(incarnation, from, place);
            state.pending.urgent = true;
            state.ticket()
        };
        self.core.bell.ring();
        let durable = self.core.wait(ticket);
        Box::pin(async move { durable.await.map(|()| incarnation) })
    }

    /// Says why a stream is not forwarded for now, or that it is again. Kept in memory only.
    pub fn park(&self, stream: &StreamName, why: Option<String>) {
        if let Some(found) = self.core.state.lock().by_name_mut(stream) {
            found.parked = why;
        }
    }

    /// The cloud was told of the gap up to `upto`.
    pub fn gap_declared(&self, stream: &StreamName, upto: Offset) {
        if let Some(found) = self.core.state.lock().by_name_mut(stream) {
            found.close_gap(upto);
        }
        self.core.bell.ring();
    }

    /// Resolves when the stream has durable records at or above `beyond`, or will never have more.
    pub fn wait_records(&self, stream: &StreamName, beyond: Offset) -> BoxFuture<'static, ()> {
        let (core, stream) = (self.core.clone(), stream.clone());
        Box::pin(async move {
            let mut progress = core.progress.subscribe();
            loop {
                let ended = progress.borrow_and_update().ended.is_some();
                let next = core.state.lock().by_name(&stream).map(|found| found.record.next);
                if ended || next.is_none_or(|next| next > beyond) || progress.changed().await.is_err() {
                    return;
                }
            }
        })
    }

    /// What the cloud takes at most, learnt in hello: larger records are refused before they are acknowledged.
    pub fn set_limits(&self, batch_bytes_max: usize) {
        self.core.state.lock().batch_bytes_max = batch_bytes_max;
    }

    /// Resolves when the store has failed for good: the process must start over.
    pub fn failed(&self) -> BoxFuture<'static, StoreFailed> {
        let mut progress = self.core.progress.subscribe();
        Box::pin(async move {
            loop {
                if let Some(why) = &progress.borrow_and_update().ended {
                    return StoreFailed(why.to_string());
                }
                if progress.changed().await.is_err() {
                    return StoreFailed("closed".to_owned());
                }
            }
        })
    }

    /// Numbers for status and metrics.
    pub fn status(&self) -> StoreStatus {
        let reading = (self.core.clock)();
        let mut state = self.core.state.lock();
        if state.looks_at_disk() {
            self.core.look_at_disk(&mut state);
        }
        status::of(&state, &self.core.bound, reading)
    }

    /// Makes durable what waits and closes the database cleanly. Blocks for a commit; also done on drop.
    pub fn close(&self) {
        let Some(committer) = self.committer.lock().take() else { return };
        self.core.state.lock().store_count((self.core.clock)().at);
        self.core.bell.close();
        if committer.join().is_err() {
            tracing::error!("the committer panicked");
        }
        self.core.end("closed".to_owned());
        self.core.log.close();
    }
}

impl Drop for EdgeStore {
    fn drop(&mut self) {
        self.close();
    }
}

impl Core {
    fn durable(&self, ticket: Ticket) -> Result<bool, StoreFailed> {
        if self.durable.load(Ordering::Acquire) < ticket.commit {
            return match &self.progress.borrow().ended {
                Some(why) => Err(StoreFailed(why.to_string())),
                None => Ok(false),
            };
        }
        // Refusals are written down before the commit is told of.
        if ticket.commit <= self.refused.load(Ordering::Acquire) {
            let refusals = self.refusals.lock();
            if refusals.get(&ticket.commit).is_some_and(|parts| parts.contains(&ticket.part)) {
                return Err(StoreFailed("the disk has no room for it".to_owned()));
            }
        }
        Ok(true)
    }

    fn wait(self: &Arc<Self>, ticket: Ticket) -> BoxFuture<'static, Result<(), StoreFailed>> {
        let core = self.clone();
        Box::pin(async move {
            let mut progress = core.progress.subscribe();
            loop {
                progress.borrow_and_update();
                if core.durable(ticket)? {
                    return Ok(());
                }
                if progress.changed().await.is_err() {
                    return Err(StoreFailed("closed".to_owned()));
                }
            }
        })
    }

    /// Remembers which parts of a commit found no room.
    fn refuse(&self, commit: &Commit) {
        if commit.shed.is_empty() {
            return;
        }
        let sessions = commit.sessions.iter().filter(|(client, _)| commit.shed.sessions.contains(*client));
        let mut parts: BTreeSet<u32> = sessions.map(|(_, change)| change.part).filter(|part| *part > 0).collect();
        if commit.shed.records {
            parts.insert(state::RECORDS_PART);
        }
        let mut refusals = self.refusals.lock();
        refusals.insert(commit.number, parts);
        if refusals.len() > REFUSALS_MAX {
            refusals.pop_first();
        }
        drop(refusals);
        self.refused.store(commit.number, Ordering::Release);
    }

    /// Asks the disk what it has free.
    fn look_at_disk(&self, state: &mut State) {
        state.disk_has(self.bound.used(), self.bound.free());
    }

    fn end(&self, why: String) {
        self.state.lock().ended = true;
        self.progress.send_if_modified(|progress| {
            let first = progress.ended.is_none();
            if first {
                progress.ended = Some(why.into());
            }
            first
        });
        self.room.send_modify(|count| *count += 1);
    }

    fn move_cursor(&self, stream: &StreamName, offset: Offset, safe: bool) {
        let (id, offset, end) = {
            let mut state = self.state.lock();
            let Some(found) = state.by_name_mut(stream) else { return };
            let record = &found.record;
            let offset = offset.min(record.next);
            if offset <= if safe { record.safe } else { record.confirmed } {
                return;
            }
            if let Some(memory) = &found.memory {
                let place = memory.place(record.first_bytes, offset);
                found.move_cursor(offset, place, safe);
                found.trim_memory();
                drop(state);
                self.room.send_modify(|count| *count += 1);
                return;
            }
            (found.id, offset, offset == record.next)
        };
        // Where the bytes of that offset lie; unknown means as good as nowhere further.
        let place = if end { None } else { self.log.locate(id, offset).ok().flatten().map(|(_, place)| place) };
        let wants_room = {
            let mut state = self.state.lock();
            let Some(found) = state.by_name_mut(stream) else { return };
            found.move_cursor(offset, place, safe);
            state.trims_wanted()
        };
        if wants_room {
            self.state.lock().pending.urgent = true;
        }
        self.bell.ring();
    }
}

impl Store for EdgeStore {
    fn publish(&self, session: &SessionRef<'_>, publishes: &[Publish<'_>], admissions: &mut Vec<Admission>) {
        let core = &*self.core;
        let found: Vec<Option<usize>> = publishes.iter().map(|publish| core.rules.find(publish.topic)).collect();
        let mut state = core.state.lock();
        if state.looks_at_disk() {
            core.look_at_disk(&mut state);
        }
        let was_waiting = state.pending.bytes;
        for (publish, rule) in publishes.iter().zip(found) {
            match state.admit(core, session, publish, rule) {
                Verdict::Admitted(admission) => admissions.push(admission),
                Verdict::Held => break,
            }
        }
        let ring = state.rings(was_waiting);
        let shown = state.seal_memory((core.clock)().at);
        drop(state);
        if shown {
            // Wakes those who wait for records; nothing became durable.
            core.progress.send_modify(|_| {});
        }
        if ring {
            core.bell.ring();
        }
    }

    fn room(&self) -> BoxFuture<'static, ()> {
        let core = self.core.clone();
        Box::pin(async move {
            let mut room = core.room.subscribe();
            loop {
                room.borrow_and_update();
                let enough = {
                    let state = core.state.lock();
                    state.ended || state.has_room_for_held()
                };
                if enough || room.changed().await.is_err() {
                    return;
                }
            }
        })
    }

    fn release(&self, client_id: &str, packet_id: u16) -> Ticket {
        self.core.change(|state| {
            state.sessions.remove_packet(client_id, packet_id);
            state.ticket()
        })
    }

    fn durable(&self, ticket: Ticket) -> Result<bool, StoreFailed> {
        self.core.durable(ticket)
    }

    fn wait(&self, ticket: Ticket) -> BoxFuture<'static, Result<(), StoreFailed>> {
        self.core.wait(ticket)
    }

    fn load_sessions(&self) -> Result<Vec<StoredSession>, StoreFailed> {
        self.core.log.sessions().map_err(|error| StoreFailed(error.to_string()))
    }

    fn load_retained(&self) -> Result<Vec<StoredRetained>, StoreFailed> {
        let mut all = self.core.log.retained().map_err(|error| StoreFailed(error.to_string()))?;
        let (reading, state) = ((self.core.clock)(), self.core.state.lock());
        for one in &mut all {
            one.stored_ms = reading.wall_ms.saturating_sub(state.age_ms(reading.at, one.stored_ms));
        }
        Ok(all)
    }

    fn delete_retained(&self, topic: &str) {
        self.core.change(|state| state.forget_retained(topic));
    }

    fn save_session(&self, session: &StoredSession) -> Result<Ticket, Refusal> {
        self.core.change(|state| state.save_session(session))
    }

    fn save_subscription(&self, client_id: &str, subscription: &StoredSubscription) -> Result<Ticket, Refusal> {
        self.core.change(|state| state.save_subscription(client_id, subscription))
    }

    fn delete_subscription(&self, client_id: &str, filter: &str) -> Ticket {
        self.core.change(|state| {
            state.sessions.unsubscribe(client_id, filter);
            state.ticket()
        })
    }

    fn delete_session(&self, client_id: &str) -> Ticket {
        self.core.change(|state| {
            state.sessions.delete(client_id);
            state.ticket()
        })
    }
}

impl Core {
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let changed = change(&mut self.state.lock());
        self.bell.ring();
        changed
    }
}

impl Work for Core {
    fn urgency(&self) -> Urgency {
        self.state.lock().urgency()
    }

    fn take(&self) -> Commit {
        // Sealing costs a checksum and a hash over all bytes: done without the lock.
        let (mut commit, open) = self.state.lock().take((self.clock)());
        for stream in open {
            commit.appends.push(stream.seal());
        }
        commit
    }

    fn make_room(&self, commit: &mut Commit) {
        let mut state = self.state.lock();
        // The disk itself may be full, and then the estimate was not wrong.
        if self.bound.used() + (1 << 20) >= self.bound.bytes_max() {
            state.budget.overestimated();
        }
        commit.trims = state.plan_trims((self.clock)().at);
        for trim in &commit.trims {
            if let Some(stream) = state.streams.iter().find(|stream| stream.id == trim.stream) {
                commit.records.entry(trim.stream).or_insert_with(|| stream.record.clone());
            }
        }
    }

    fn committed(&self, commit: Commit, trimmed: Vec<Trimmed>, took: Duration) {
        let number = commit.number;
        self.refuse(&commit);
        {
            let mut state = self.state.lock();
            state.committed(commit, &trimmed, took);
            self.look_at_disk(&mut state);
        }
        self.durable.store(number, Ordering::Release);
        self.progress.send_modify(|progress| progress.durable = number);
        self.room.send_modify(|count| *count += 1);
    }

    fn troubled(&self, why: Option<&LogError>) {
        self.state.lock().trouble = why.map(ToString::to_string);
    }

    fn failed(&self, why: String) {
        self.end(why);
    }
}

#[cfg(test)]
mod tests;
