//! The books of kept sessions: what they take in the database, and what of them waits for the next commit.
//!
//! Bounds are on bytes: of one session, and of all together. Only what is new counts against them, so a session can always
//! be left, made smaller or deleted. What waits is kept by row, so that changing one row again and again takes no memory.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};

use mqtt::store::{Refusal, StoredSession, StoredSubscription};

use crate::redb_log::{SessionChange, Shed};
use crate::retention::SESSION_BYTES_MAX;

/// What a row takes beside its key and text: its value, its place in the page, its share of half-filled pages.
const ROW_BYTES: usize = 64;
/// What new rows may take in one commit.
const PENDING_BYTES_MAX: usize = 4 << 20;
/// The part of all sessions' bytes that is kept for those that take at most [`SMALL_BYTES`]: one in so many.
const RESERVE_PART: u64 = 4;
const SMALL_BYTES: usize = 4 << 10;
/// The first part number of a commit's tickets that stands for a session.
const FIRST_PART: u32 = 2;

/// What is kept of all sessions, in numbers.
pub(super) struct SessionBooks {
    sessions: HashMap<String, SessionUse>,
    bytes: u64,
    bytes_max: u64,
    hasher: RandomState,
    pending: BTreeMap<String, SessionChange>,
    /// What `pending` takes in memory, roughly.
    pending_bytes: usize,
    pending_growth: usize,
    parts: u32,
}

#[derive(Debug, Default)]
struct SessionUse {
    bytes: usize,
    row: usize,
    /// Subscriptions by a hash of their filter: whether one is there is all that is asked.
    subscriptions: HashSet<u64>,
    packets: usize,
}

fn row_cost(session: &StoredSession) -> usize {
    session.client_id.len() + session.user.as_ref().map_or(0, String::len) + ROW_BYTES
}

fn subscription_cost(client_id: &str, filter: &str) -> usize {
    client_id.len() + filter.len() + ROW_BYTES
}

/// What a packet id takes.
fn packet_cost(client_id: &str) -> usize {
    client_id.len() + ROW_BYTES
}

impl SessionBooks {
    /// `bytes_max`: of all sessions together.
    pub(super) fn new(stored: &[StoredSession], bytes_max: u64) -> Self {
        let mut books = Self {
            sessions: HashMap::new(),
            bytes: 0,
            bytes_max,
            hasher: RandomState::new(),
            pending: BTreeMap::new(),
            pending_bytes: 0,
            pending_growth: 0,
            parts: 0,
        };
        for session in stored {
            let client = session.client_id.as_str();
            let row = row_cost(session);
            let packets = session.inbound_packet_ids.len();
            let mut used = SessionUse { row, packets, ..SessionUse::default() };
            used.bytes = row + packets * packet_cost(client);
            for subscription in &session.subscriptions {
                used.subscriptions.insert(books.hasher.hash_one(&subscription.filter));
                used.bytes += subscription_cost(client, &subscription.filter);
            }
            books.bytes += used.bytes as u64;
            books.sessions.insert(client.to_owned(), used);
        }
        books
    }

    /// Bytes of all sessions, with what waits.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Their bound.
    pub(super) fn bytes_max(&self) -> u64 {
        self.bytes_max
    }

    /// Bytes that wait for the next commit.
    pub(super) fn pending_bytes(&self) -> usize {
        self.pending_bytes
    }

    /// Whether anything waits.
    pub(super) fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Whether a session was saved.
    pub(super) fn knows(&self, client_id: &str) -> bool {
        self.sessions.contains_key(client_id)
    }

    /// What `session` would take beyond what it takes now.
    pub(super) fn growth_of_row(&self, session: &StoredSession) -> usize {
        row_cost(session).saturating_sub(self.sessions.get(&session.client_id).map_or(0, |used| used.row))
    }

    /// What this subscription would take beyond what is there.
    pub(super) fn growth_of_subscription(&self, client_id: &str, filter: &str) -> usize {
        let known = self.sessions.get(client_id).is_some_and(|used| {
            let filter = self.hasher.hash_one(filter);
            used.subscriptions.contains(&filter)
        });
        if known { 0 } else { subscription_cost(client_id, filter) }
    }

    /// Whether a session may grow by so much.
    pub(super) fn has_room(&self, client_id: &str, growth: usize) -> bool {
        let fits_commit = self.pending_growth + growth <= PENDING_BYTES_MAX;
        growth == 0 || (self.fits(client_id, growth) && fits_commit)
    }

    /// Whether there is room for so much more of a session. The last quarter is for those that take little, so that those that
    /// take much lock nobody out.
    fn fits(&self, client_id: &str, growth: usize) -> bool {
        let own = self.sessions.get(client_id).map_or(0, |used| used.bytes) + growth;
        let reserve = if own <= SMALL_BYTES { 0 } else { self.bytes_max / RESERVE_PART };
        own <= SESSION_BYTES_MAX && self.bytes + growth as u64 + reserve <= self.bytes_max
    }

    /// Whether a session may open one more packet id. What waits of those is bounded with their PUBLISHes.
    pub(super) fn has_room_for_packet(&self, client_id: &str) -> bool {
        self.fits(client_id, packet_cost(client_id))
    }

    /// Writes a session's row. Returns the part of the commit that stands for it.
    pub(super) fn save(&mut self, session: &StoredSession) -> Result<u32, Refusal> {
        let client = session.client_id.as_str();
        let growth = self.growth_of_row(session);
        let known = self.sessions.contains_key(client);
        if !known && !self.has_room(client, growth) {
            return Err(Refusal::QuotaExceeded);
        }
        let row = StoredSession { subscriptions: Vec::new(), inbound_packet_ids: Vec::new(), ..session.clone() };
        let cost = row_cost(session);
        let change = self.pending.entry(client.to_owned()).or_default();
        if change.row.replace(row).is_none() {
            self.pending_bytes += cost;
        }
        change.new |= !known;
        let used = self.sessions.entry(client.to_owned()).or_default();
        self.bytes = self.bytes - used.row as u64 + cost as u64;
        used.bytes = used.bytes - used.row + cost;
        used.row = cost;
        Ok(if known { 0 } else { self.grown(client, growth) })
    }

    /// Writes a subscription. Returns the part of the commit that stands for it.
    pub(super) fn subscribe(&mut self, client: &str, subscription: &StoredSubscription) -> Result<u32, Refusal> {
        let growth = self.growth_of_subscription(client, &subscription.filter);
        if !self.has_room(client, growth) {
            return Err(Refusal::QuotaExceeded);
        }
        let used = self.sessions.entry(client.to_owned()).or_default();
        used.subscriptions.insert(self.hasher.hash_one(&subscription.filter));
        used.bytes += growth;
        self.bytes += growth as u64;
        let change = self.pending.entry(client.to_owned()).or_default();
        let before = change.subscriptions.insert(subscription.filter.clone(), Some(subscription.clone()));
        if before.is_none() {
            self.pending_bytes += subscription_cost(client, &subscription.filter);
        }
        // Also one that replaces another: if this session is left out, so is that.
        Ok(self.grown(client, growth.max(1)))
    }

    /// Deletes a subscription.
    pub(super) fn unsubscribe(&mut self, client: &str, filter: &str) {
        let cost = subscription_cost(client, filter);
        self.forget_subscription(client, filter);
        let change = self.pending.entry(client.to_owned()).or_default();
        if change.subscriptions.insert(filter.to_owned(), None).is_none() {
            self.pending_bytes += cost;
        }
    }

    fn forget_subscription(&mut self, client: &str, filter: &str) {
        let Some(used) = self.sessions.get_mut(client) else { return };
        if used.subscriptions.remove(&self.hasher.hash_one(filter)) {
            let cost = subscription_cost(client, filter);
            used.bytes = used.bytes.saturating_sub(cost);
            self.bytes = self.bytes.saturating_sub(cost as u64);
        }
    }

    /// Deletes a session and all it has.
    pub(super) fn delete(&mut self, client: &str) {
        let used = self.sessions.remove(client).unwrap_or_default();
        self.bytes = self.bytes.saturating_sub(used.bytes as u64);
        let change = self.pending.entry(client.to_owned()).or_default();
        let before = std::mem::take(change);
        self.pending_growth = self.pending_growth.saturating_sub(before.grows);
        let waiting = before.row.as_ref().map_or(0, row_cost)
            + before.subscriptions.keys().map(|filter| subscription_cost(client, filter)).sum::<usize>()
            + before.packets.len() * packet_cost(client)
            + if before.deleted { packet_cost(client) } else { 0 };
        self.pending_bytes = self.pending_bytes.saturating_sub(waiting);
        if before.new && !before.deleted {
            // It never was in the database.
            self.pending.remove(client);
            return;
        }
        change.deleted = true;
        self.pending_bytes += packet_cost(client);
    }

    /// A QoS 2 PUBLISH came.
    pub(super) fn add_packet(&mut self, client: &str, id: u16) {
        let cost = packet_cost(client);
        let used = self.sessions.entry(client.to_owned()).or_default();
        used.packets += 1;
        used.bytes += cost;
        self.bytes += cost as u64;
        let change = self.pending.entry(client.to_owned()).or_default();
        if change.packets.insert(id, true).is_none() {
            self.pending_bytes += cost;
        }
    }

    /// Its PUBREL came.
    pub(super) fn remove_packet(&mut self, client: &str, id: u16) {
        self.give_back_packets(client, 1);
        let change = self.pending.entry(client.to_owned()).or_default();
        if change.packets.insert(id, false).is_none() {
            self.pending_bytes += packet_cost(client);
        }
    }

    fn give_back_packets(&mut self, client: &str, count: usize) {
        let Some(used) = self.sessions.get_mut(client) else { return };
        let count = count.min(used.packets);
        let cost = count * packet_cost(client);
        used.packets -= count;
        used.bytes = used.bytes.saturating_sub(cost);
        self.bytes = self.bytes.saturating_sub(cost as u64);
    }

    fn grown(&mut self, client: &str, growth: usize) -> u32 {
        self.pending_growth += growth;
        let Some(change) = self.pending.get_mut(client) else { return 0 };
        change.grows += growth;
        if change.part == 0 {
            change.part = FIRST_PART + self.parts;
            self.parts = self.parts.saturating_add(1);
        }
        change.part
    }

    /// Takes what waits.
    pub(super) fn take(&mut self) -> BTreeMap<String, SessionChange> {
        (self.pending_bytes, self.pending_growth, self.parts) = (0, 0, 0);
        std::mem::take(&mut self.pending)
    }

    /// Parts of this commit were not stored: their clients do not have them, and ask again.
    pub(super) fn not_stored(&mut self, changes: &BTreeMap<String, SessionChange>, shed: &Shed) {
        for (client, change) in changes {
            if shed.records {
                self.give_back_packets(client, change.packets.values().filter(|added| **added).count());
            }
            if !shed.sessions.contains(client) {
                continue;
            }
            if change.new {
                let used = self.sessions.remove(client).unwrap_or_default();
                self.bytes = self.bytes.saturating_sub(used.bytes as u64);
            }
            for (filter, _) in change.subscriptions.iter().filter(|(_, one)| one.is_some()) {
                self.forget_subscription(client, filter);
            }
        }
    }
}
