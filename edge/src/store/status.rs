//! Numbers of the store for `/status` and `/metrics`.

use std::time::Duration;

use serde::Serialize;
use shared::clock::ClockReading;
use shared::histogram::Histogram;

use super::*;

/// The store now.
#[derive(Debug, Clone, Serialize)]
pub struct StoreStatus {
    /// Streams, those with a rule first.
    pub streams: Vec<StreamStatus>,
    /// Seconds a commit took.
    pub commit_seconds: Histogram,
    /// Messages a commit made durable.
    pub commit_messages: Histogram,
    /// Bytes handed to the disk since the start.
    pub written_bytes_total: u64,
    /// Syncs asked of the disk since the start.
    pub syncs_total: u64,
    /// The disk budget of the database.
    pub disk_budget_bytes: u64,
    /// What the database file takes on the disk.
    pub disk_used_bytes: u64,
    /// Of these, what is not needed any more (estimated): freed pages that new records will fill.
    pub disk_dead_bytes: u64,
    /// What may not be deleted, estimated, as a share of what it may take, by the budget or the disk, whichever ends first.
    /// 1 when the next MiB of records would not be stored: then `on_full` decides.
    pub disk_budget_ratio: f64,
    /// What the disk has left; `None` where it does not say.
    pub disk_free_bytes: Option<u64>,
    /// Why the next MiB of records would not be stored; `None` while it would be.
    pub no_room: Option<String>,
    /// No record is admitted for want of room.
    pub full: bool,
    /// What kept sessions, their subscriptions and QoS 2 packet ids take.
    pub session_bytes: u64,
    /// Its bound: beyond it new sessions and subscriptions are refused.
    pub session_bytes_max: u64,
    /// Messages taken and not yet durable: their acknowledgements wait.
    pub held_acks: u64,
    /// Why the disk does not take commits at present.
    pub trouble: Option<String>,
    /// The store has failed for good.
    pub failed: bool,
    /// Damaged databases that were set aside and wait for `tributary-edge salvage`.
    pub set_aside: Vec<SetAside>,
}

/// A damaged database that was set aside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SetAside {
    /// Where it is.
    pub file: String,
    /// What it takes on the disk.
    pub bytes: u64,
}

/// A stream now.
#[derive(Debug, Clone, Serialize)]
pub struct StreamStatus {
    /// Its name.
    pub name: StreamName,
    /// Its Kafka topic.
    pub topic: TopicName,
    /// `redb`, or `memory`: gone with the process.
    pub engine: &'static str,
    /// The life it is in, hexadecimal.
    pub incarnation: String,
    /// The first record that is kept.
    pub first: Offset,
    /// The offset after the last durable record.
    pub next: Offset,
    /// Below this the cloud has everything in its log.
    pub durable: Offset,
    /// Below this the cloud has everything where it cannot be lost.
    pub safe: Offset,
    /// Bytes kept.
    pub bytes: u64,
    /// Bytes the cloud has not confirmed.
    pub unsent_bytes: u64,
    /// Age of the oldest record the cloud has not confirmed.
    pub oldest_unsent_seconds: f64,
    /// Why it is not forwarded.
    pub parked: Option<String>,
    /// Dropped records the cloud was not told of yet (end exclusive).
    pub gap: Option<(Offset, Offset)>,
    /// Records dropped before they were sent, since the start.
    pub dropped_records_total: u64,
}

/// What is counted as it happens.
pub(super) struct Counters {
    commit_seconds: Histogram,
    commit_messages: Histogram,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            commit_seconds: Histogram::new(&Histogram::COMMIT_SECONDS),
            commit_messages: Histogram::new(&[0.0, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10_000.0]),
        }
    }
}

impl Counters {
    pub(super) fn committed(&mut self, messages: u64, took: Duration) {
        self.commit_seconds.add(took.as_secs_f64());
        self.commit_messages.add(messages as f64);
    }
}

/// What is asked for when somebody asks whether records would be stored.
const ROOM_BYTES: u64 = 1 << 20;
/// What a commit of as much writes anew: pages of the tree are copied, and packed loosely.
const ROOM_ON_DISK: u64 = 4 * ROOM_BYTES;

/// Room for records, and why there is none.
struct Room {
    /// Part of it that is taken.
    ratio: f64,
    none: Option<String>,
}

fn room(state: &State, bound: &DiskBound) -> Room {
    let (live, ceiling) = (state.live(), state.budget.ceiling());
    // What is safe goes when room is needed.
    let kept = live.saturating_sub(state.deletable_bytes());
    let by_budget = kept as f64 / ceiling.max(1) as f64;
    // Freed pages are written again, the rest must come from the disk.
    let dead = bound.used().saturating_sub(live);
    let on_disk = bound.free().map(|free| free.saturating_add(dead).saturating_add(live - kept));
    let by_disk = on_disk.map_or(0.0, |left| kept as f64 / left.saturating_add(kept).max(1) as f64);
    let none = if state.ended {
        Some("the store has failed: the process must start again".to_owned())
    } else if let Some(why) = state.trouble.clone().or_else(|| state.why_no_room()) {
        Some(format!("records cannot be stored: {why}"))
    } else if let Some(left) = on_disk.filter(|left| *left < ROOM_ON_DISK) {
        Some(format!("the disk has room for {left} bytes more, and at least {ROOM_ON_DISK} should be free"))
    } else {
        state.full_stream(ROOM_BYTES, kept)
    };
    Room { ratio: if none.is_some() { 1.0 } else { by_budget.max(by_disk).min(1.0) }, none }
}

pub(super) fn of(state: &State, bound: &DiskBound, reading: ClockReading) -> StoreStatus {
    let room = room(state, bound);
    let stream = |stream: &state::Stream| {
        let at = stream.positions();
        StreamStatus {
            name: stream.record.name.clone(),
            topic: at.topic,
            engine: if stream.memory.is_some() { "memory" } else { "redb" },
            incarnation: at.incarnation.to_string(),
            first: at.first,
            next: at.next,
            durable: at.confirmed,
            safe: at.safe,
            bytes: at.bytes,
            unsent_bytes: at.unsent_bytes,
            // A record from a time to come was marked by a clock that was wrong: then the running time says how long
            // something has waited.
            oldest_unsent_seconds: at.oldest_unsent_ms.map_or(0, |oldest| match reading.wall_ms.checked_sub(oldest) {
                Some(age_ms) if age_ms >= 0 => age_ms,
                _ => state.age_ms(reading.at, stream.unsent_since_ms),
            }) as f64
                / 1000.0,
            parked: at.parked,
            gap: at.gap,
            dropped_records_total: stream.dropped_records,
        }
    };
    StoreStatus {
        streams: state.streams.iter().map(stream).collect(),
        commit_seconds: state.counters.commit_seconds.clone(),
        commit_messages: state.counters.commit_messages.clone(),
        written_bytes_total: bound.written(),
        syncs_total: bound.syncs(),
        disk_budget_bytes: state.budget.bytes_max,
        disk_used_bytes: bound.used(),
        disk_dead_bytes: bound.used().saturating_sub(state.live()),
        disk_budget_ratio: room.ratio,
        disk_free_bytes: bound.free(),
        no_room: room.none,
        full: state.is_full(),
        held_acks: state.pending.messages + state.in_flight_messages,
        session_bytes: state.sessions.bytes(),
        session_bytes_max: state.sessions.bytes_max(),
        trouble: state.trouble.clone().or_else(|| state.why_no_room()),
        failed: state.ended,
        // One that was moved away since the start is nobody's business here any more.
        set_aside: state
            .set_aside
            .iter()
            .filter(|path| path.exists())
            .map(|path| SetAside { file: path.display().to_string(), bytes: open::on_disk(path) })
            .collect(),
    }
}
