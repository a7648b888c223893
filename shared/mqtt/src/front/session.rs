//! A session as connections share it: its state under one lock, and the bytes on their way to its socket.

use std::cmp::Ordering;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::AcqRel, Ordering::Acquire};
use std::task::Waker;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::net::tcp::OwnedWriteHalf;
use tokio::sync::Notify;

use super::stats::add;
use super::{Front, Now};
use crate::codec::{QoS, Reason};
use crate::memory::{MemoryPermit, MemoryUse};
use crate::retained::{RetainedCursor, RetainedStep};
use crate::session::inbound::ReceivedIds;
use crate::session::outbound::{Bounds, Delivered, Outbound};
use crate::store::{SessionLeft, StoredSession, Ticket};
use crate::topic::TopicFilter;
use crate::tree::{Subscription, subscription_cost};

/// One session. The number orders sessions in the topic tree.
#[derive(Debug)]
pub(crate) struct Session {
    number: u64,
    pub client_id: Arc<str>,
    pub state: Mutex<SessionState>,
    /// A connection let go of it.
    pub released: Notify,
}

/// A session as an operator sees it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SessionInfo {
    /// The client identifier.
    pub client_id: String,
    /// The user it belongs to.
    pub user: Option<String>,
    /// A connection has it.
    pub connected: bool,
    /// When its last connection ended, milliseconds since 1970 as the gateway's clock stood; unknown after a crash.
    pub left_ms: Option<i64>,
    /// Subscriptions.
    pub subscriptions: usize,
    /// Messages with QoS 1 and 2 queued or on their way.
    pub queued_messages: usize,
    /// Bytes of those that must be remembered.
    pub queued_bytes: usize,
    /// Seconds it lives without a connection; 0: it ends with it, 4,294,967,295: for ever.
    pub expiry_secs: u32,
    /// Seconds until it ends, if nobody connects.
    pub expires_in_secs: Option<i64>,
}

#[derive(Debug)]
pub(crate) struct SessionState {
    /// The connection that owns it.
    pub handle: Option<Arc<Handle>>,
    /// CONNACK went out: PUBLISHes may follow.
    pub live: bool,
    /// It is over, and not among the sessions any more.
    pub ended: bool,
    /// It was there before the connection that owns it now.
    pub known: bool,
    /// The store has it.
    pub stored: bool,
    /// It outlives its connection, or is about to.
    pub kept: bool,
    /// Where it stands among the sessions that may be ended to make room.
    pub evictable: Option<u64>,
    /// Its end is durable with this ticket.
    pub deleted: Ticket,
    /// The user it belongs to.
    pub user: Option<String>,
    /// Seconds it outlives its connection; `u32::MAX`: for ever.
    pub expiry_secs: u32,
    /// When its last connection ended; only while nobody is connected, and not if the broker was killed meanwhile.
    pub left: Option<SessionLeft>,
    /// When it ends; only while nobody is connected.
    pub expires_ms: Option<i64>,
    pub subscriptions: BTreeMap<Arc<str>, SessionSubscription>,
    pub outbound: Outbound,
    pub received: ReceivedIds,
    /// Subscriptions that are still to get retained messages, each once; the first is at `cursor`.
    pub backlog: VecDeque<Arc<str>>,
    cursor: RetainedCursor,
    /// What is counted in the front's budget.
    counted: CountedBytes,
    pub will: Option<Arc<Will>>,
    /// When a delayed will is published.
    pub will_due_ms: Option<i64>,
    pub out: Out,
    /// Counts connections, so that a writer that comes back late finds that its bytes are nobody's any more.
    epoch: u64,
}

/// A subscription as its session has it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SessionSubscription {
    pub subscription: Subscription,
    /// It is in the session's backlog: retained messages up to this number are still to be sent.
    pub retained_upto: Option<u64>,
}

#[derive(Debug, Default)]
struct CountedBytes {
    queues: usize,
    outgoing: usize,
    filters: usize,
}

/// What [`SessionState::pull_retained`] came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pulled {
    /// There is nothing to do, or not before the socket or the client's acknowledgements move.
    Nothing,
    /// There is more to do: others first.
    More,
    /// The memory budget has no room at the moment.
    NoRoom,
}

/// What is published when a connection is lost.
#[derive(Debug)]
pub(crate) struct Will {
    pub topic: String,
    /// As [`crate::store::StoredRetained`] has it.
    pub properties_and_payload: Vec<u8>,
    pub qos: u8,
    pub retain: bool,
    pub delay_secs: u32,
    pub permit: MemoryPermit,
}

/// Bytes on their way to the socket: `front` is being written from `front_at` on, `back` is appended to.
#[derive(Debug, Default)]
pub(crate) struct Out {
    pub back: Vec<u8>,
    front: Vec<u8>,
    front_at: usize,
    /// Somebody took `front` to write it: how many bytes were left of it, and its capacity.
    writing: Option<(usize, usize)>,
    /// Since when the socket has taken nothing although there was something.
    stuck_since: Option<Instant>,
    /// The socket took no more; its owner waits for it.
    pub blocked: bool,
    /// The socket is broken; its owner will find out.
    pub failed: bool,
    /// It did not keep up: publishers do not wait for it.
    pub slow: bool,
    /// Somebody will flush.
    pub dirty: bool,
    /// Publishers that wait for it.
    waiters: Vec<Waker>,
}

/// How others reach the task of a connection.
#[derive(Debug)]
pub(crate) struct Handle {
    /// Plain TCP: whoever has bytes for it writes them without a detour through its task. TLS has one owner.
    pub socket: Option<Arc<OwnedWriteHalf>>,
    waker: Mutex<Option<Waker>>,
    kick: AtomicU8,
}

impl Handle {
    pub fn new(socket: Option<Arc<OwnedWriteHalf>>) -> Self {
        Self { socket, waker: Mutex::new(None), kick: AtomicU8::new(0) }
    }

    /// Called by the connection's task before it looks at what others may have changed.
    pub fn register(&self, waker: &Waker) {
        let mut slot = self.waker.lock();
        if !slot.as_ref().is_some_and(|old| old.will_wake(waker)) {
            *slot = Some(waker.clone());
        }
    }

    pub fn wake(&self) {
        let waker = self.waker.lock().clone();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Ends the connection with this reason.
    pub fn kick(&self, reason: Reason) {
        self.kick.store(reason.0, std::sync::atomic::Ordering::Release);
        self.wake();
    }

    pub fn kicked(&self) -> Option<Reason> {
        match self.kick.load(Acquire) {
            0 => None,
            reason => Some(Reason(reason)),
        }
    }

    pub fn take_kick(&self) {
        self.kick.swap(0, AcqRel);
    }
}

impl PartialEq for Session {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}
impl Eq for Session {}
impl PartialOrd for Session {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Session {
    fn cmp(&self, other: &Self) -> Ordering {
        self.number.cmp(&other.number)
    }
}

impl Session {
    pub fn new(number: u64, client_id: &str) -> Self {
        let state = SessionState {
            handle: None,
            live: false,
            ended: false,
            known: false,
            stored: false,
            kept: false,
            evictable: None,
            deleted: Ticket::default(),
            user: None,
            expiry_secs: 0,
            left: None,
            expires_ms: None,
            subscriptions: BTreeMap::new(),
            outbound: Outbound::new(),
            received: ReceivedIds::default(),
            backlog: VecDeque::new(),
            cursor: RetainedCursor::default(),
            counted: CountedBytes::default(),
            will: None,
            will_due_ms: None,
            out: Out::default(),
            epoch: 0,
        };
        Self { number, client_id: client_id.into(), state: Mutex::new(state), released: Notify::new() }
    }

    pub fn info(&self, now: Now) -> SessionInfo {
        let state = self.state.lock();
        SessionInfo {
            client_id: self.client_id.to_string(),
            user: state.user.clone(),
            connected: state.handle.is_some(),
            left_ms: state.left.map(|left| left.wall_ms).filter(|_| state.handle.is_none()),
            subscriptions: state.subscriptions.len(),
            queued_messages: state.outbound.messages(),
            queued_bytes: state.outbound.bytes(),
            expiry_secs: state.expiry_secs,
            expires_in_secs: state.expires_ms.map(|at| (at - now.ms).max(0) / 1000),
        }
    }

    /// Writes what waits for a plain socket, as far as it takes it. Any task may call it; one at a time writes, the
    /// others leave it to that one. Returns whether so much is left that publishers should wait.
    /// `owner`: the connection's own task calls, and needs no waking for what only that may do.
    pub fn flush(&self, front: &Front, owner: bool) -> bool {
        let mut state = self.state.lock();
        state.out.dirty = false;
        loop {
            let socket = match &state.handle {
                Some(handle) => match &handle.socket {
                    Some(socket) => socket.clone(),
                    None => {
                        handle.wake();
                        return state.congested(front);
                    }
                },
                None => return false,
            };
            let Some((chunk, mut at)) = state.take_chunk(front) else {
                if !owner
                    && state.may_pull(front)
                    && let Some(handle) = &state.handle
                {
                    handle.wake();
                }
                return state.congested(front);
            };
            let epoch = state.epoch;
            drop(state);
            let mut failed = false;
            let mut blocked = false;
            let start = at;
            while let Some(rest) = chunk.get(at..).filter(|rest| !rest.is_empty()) {
                match socket.try_write(rest) {
                    Ok(0) => {
                        failed = true;
                        break;
                    }
                    Ok(n) => at += n,
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                        blocked = true;
                        break;
                    }
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                    Err(_) => {
                        failed = true;
                        break;
                    }
                }
            }
            add(&front.counters.written_bytes_total, at - start);
            state = self.state.lock();
            if state.epoch != epoch {
                return false; // The connection ended meanwhile.
            }
            state.give_back(chunk, at, front);
            state.out.blocked = blocked;
            state.out.failed |= failed;
            if blocked || failed {
                if let Some(handle) = &state.handle {
                    handle.wake();
                }
                return state.congested(front);
            }
        }
    }
}

impl SessionState {
    /// Takes the bytes that are to be written next; `None`: nothing, or somebody is at it, or the socket is full.
    pub fn take_chunk(&mut self, front: &Front) -> Option<(Vec<u8>, usize)> {
        if self.out.writing.is_some() || self.out.blocked || self.out.failed {
            return None;
        }
        if self.out.front_at >= self.out.front.len() {
            if self.out.back.is_empty() && self.live && self.outbound.has_more() {
                self.fill(front);
            }
            if self.out.back.is_empty() {
                front.pool.give(std::mem::take(&mut self.out.back));
                self.count_bytes(front);
                return None;
            }
            self.out.front = std::mem::take(&mut self.out.back);
            self.out.front_at = 0;
        }
        let out = &mut self.out;
        out.writing = Some((out.front.len() - out.front_at, out.front.capacity()));
        Some((std::mem::take(&mut out.front), out.front_at))
    }

    /// Writes what waited for its turn: what must be sent again, and the queue.
    fn fill(&mut self, front: &Front) {
        let now_ms = front.now().ms;
        let bounds = self.bounds(front);
        let back = &mut self.out.back;
        if back.capacity() == 0 {
            *back = front.pool.take();
        }
        let expired = self.outbound.fill(now_ms, &bounds, back);
        add(&front.counters.expired_total, expired);
        self.count_bytes(front);
    }

    /// Whether [`Self::pull_retained`] may have something to do.
    pub fn may_pull(&self, front: &Front) -> bool {
        self.live
            && !self.backlog.is_empty()
            && !self.out.blocked
            && !self.out.failed
            && self.pending_bytes() < front.settings.outbound_bytes_max / 4
            && (self.outbound.may_send() || !self.pulls_acknowledged())
    }

    /// Whether the subscription that is next in the backlog has a QoS above 0.
    fn pulls_acknowledged(&self) -> bool {
        let next = self.backlog.front().and_then(|filter| self.subscriptions.get(filter));
        next.is_some_and(|next| next.subscription.options.qos > QoS::AtMostOnce)
    }

    /// Makes a subscription get the retained messages up to the number `upto`, from the first on.
    pub fn start_retained(&mut self, filter: &Arc<str>, upto: u64) {
        let Some((key, subscribed)) = self.subscriptions.get_key_value(filter) else { return };
        if subscribed.retained_upto.is_none() {
            self.backlog.push_back(key.clone());
        } else if self.backlog.front().is_some_and(|first| first == key) {
            self.cursor = RetainedCursor::default();
        }
        if let Some(subscribed) = self.subscriptions.get_mut(filter) {
            subscribed.retained_upto = Some(upto);
        }
    }

    /// Goes some steps through the retained messages and writes those that new subscriptions are to get, as the socket, the
    /// client's window and the memory budget have room. Called by the connection's own task only: a search for one client is
    /// nobody else's work. Returns also what it cost, in units of a turn.
    pub fn pull_retained(&mut self, front: &Front, now: Now) -> (Pulled, usize) {
        if !self.may_pull(front) {
            return (Pulled::Nothing, 0);
        }
        let mut bounds = self.bounds(front);
        if self.out.back.capacity() == 0 {
            self.out.back = front.pool.take();
        }
        let (mut steps, before) = (RETAINED_STEPS, self.pending_bytes());
        let (mut sent, mut dropped) = (0, 0);
        let retained = front.retained.lock();
        let pulled = loop {
            let Some(text) = self.backlog.front().cloned() else { break Pulled::Nothing };
            let found =
                self.subscriptions.get(&text).map(|subscribed| (subscribed.subscription, subscribed.retained_upto));
            let (Some((subscription, Some(upto))), Ok(filter)) = (found, TopicFilter::parse(&text)) else {
                self.next_in_backlog();
                continue;
            };
            if self.pending_bytes() >= front.settings.outbound_bytes_max / 4
                || subscription.options.qos > QoS::AtMostOnce && !self.outbound.may_send()
            {
                break Pulled::Nothing;
            }
            let message = match retained.next(&filter, upto, now.ms, &mut self.cursor, &mut steps) {
                RetainedStep::Found(message) => message,
                RetainedStep::Paused => break Pulled::More,
                RetainedStep::Finished => {
                    self.next_in_backlog();
                    continue;
                }
            };
            let (content, ids) = (message.content(), subscription.identifier);
            let (outbound, back) = (&mut self.outbound, &mut self.out.back);
            let qos = message.qos.min(subscription.options.qos);
            let left = message.expiry_left(now.ms).ok().flatten();
            match outbound.send_retained(&message, &content, qos, ids.as_slice(), left, &mut bounds, back) {
                Delivered::Sent | Delivered::Queued => sent += 1,
                Delivered::TooLarge => dropped += 1,
                Delivered::QueueFull if sent > 0 => break Pulled::More,
                Delivered::QueueFull => break Pulled::NoRoom,
            }
            self.cursor.pass();
        };
        drop(retained);
        let steps = RETAINED_STEPS - steps;
        add(&front.counters.retained_steps_total, steps);
        add(&front.counters.sent_messages_total, sent);
        add(&front.counters.dropped_too_large_total, dropped);
        self.count_bytes(front);
        (pulled, steps + sent + self.pending_bytes().saturating_sub(before) / 1024)
    }

    fn next_in_backlog(&mut self) {
        self.cursor = RetainedCursor::default();
        if let Some(filter) = self.backlog.pop_front()
            && let Some(subscribed) = self.subscriptions.get_mut(&filter)
        {
            subscribed.retained_upto = None;
        }
        if self.backlog.is_empty() {
            self.backlog = VecDeque::new();
        }
    }

    /// Enters a subscription.
    pub fn insert_subscription(&mut self, filter: &str, subscription: Subscription, front: &Front) {
        match self.subscriptions.get_mut(filter) {
            Some(known) => known.subscription = subscription,
            None => {
                self.subscriptions.insert(filter.into(), SessionSubscription { subscription, retained_upto: None });
                let bytes = self.counted.filters + subscription_cost(filter.len());
                front.memory.recount(MemoryUse::Filters, &mut self.counted.filters, bytes);
            }
        }
    }

    /// Removes a subscription; false if there was none.
    pub fn remove_subscription(&mut self, filter: &str, front: &Front) -> bool {
        let Some((key, removed)) = self.subscriptions.remove_entry(filter) else { return false };
        if removed.retained_upto.is_some()
            && let Some(at) = self.backlog.iter().position(|waiting| Arc::ptr_eq(waiting, &key))
        {
            self.backlog.remove(at);
            if at == 0 {
                self.cursor = RetainedCursor::default();
            }
        }
        let bytes = self.counted.filters.saturating_sub(subscription_cost(filter.len()));
        front.memory.recount(MemoryUse::Filters, &mut self.counted.filters, bytes);
        true
    }

    /// Removes all subscriptions and returns their filters, which count until they are gone.
    pub fn take_subscriptions(&mut self) -> Vec<Arc<str>> {
        self.backlog = VecDeque::new();
        self.cursor = RetainedCursor::default();
        std::mem::take(&mut self.subscriptions).into_keys().collect()
    }

    /// What [`Self::take_subscriptions`] gave is nowhere any more.
    pub fn filters_gone(&mut self, front: &Front) {
        front.memory.recount(MemoryUse::Filters, &mut self.counted.filters, 0);
    }

    /// Whether the budget lets this session have a filter of so many bytes.
    pub fn has_room_for_filter(&self, filter_bytes: usize, front: &Front) -> bool {
        subscription_cost(filter_bytes) <= front.memory.room(MemoryUse::Filters, self.memory_bytes())
    }

    /// Bytes of the budget that this session holds.
    pub fn memory_bytes(&self) -> usize {
        let CountedBytes { queues, outgoing, filters } = self.counted;
        queues + outgoing + filters + self.will.as_ref().map_or(0, |will| will.permit.bytes())
    }

    /// What this session may queue, and what may wait for its socket, at the moment.
    pub fn bounds(&self, front: &Front) -> Bounds {
        Bounds {
            queue_messages_max: front.settings.queue_messages_max,
            queue_bytes_max: front.settings.queue_bytes_max,
            out_bytes_max: front.settings.outbound_bytes_max,
            room: self.outgoing_room(front),
            queue_room: self.queue_room(front),
        }
    }

    /// Bytes more of messages and packet ids that may be remembered.
    pub fn queue_room(&self, front: &Front) -> usize {
        front.memory.room(MemoryUse::Queues, self.memory_bytes())
    }

    /// Bytes more that may wait for the socket.
    pub fn outgoing_room(&self, front: &Front) -> usize {
        front.memory.room(MemoryUse::Outgoing, self.memory_bytes())
    }

    /// What may wait for the socket before its client is not read from any more.
    pub fn outgoing_max(&self, front: &Front) -> usize {
        let held = self.memory_bytes() - self.counted.outgoing;
        front.settings.outbound_bytes_max.min(front.memory.room(MemoryUse::Outgoing, held))
    }

    /// Keeps the front's budget in step. Called after whatever may have changed `outbound` or `out`.
    pub fn count_bytes(&mut self, front: &Front) {
        let queues = self.outbound.bytes() + self.outbound.slots_bytes() + self.received.bytes();
        front.memory.recount(MemoryUse::Queues, &mut self.counted.queues, queues);
        let outgoing = self.out.capacity();
        front.memory.recount(MemoryUse::Outgoing, &mut self.counted.outgoing, outgoing);
    }

    /// A message found no room. Whoever has taken nothing for long and holds more than a share that is left gives it back:
    /// the connection ends.
    pub fn found_no_room(&mut self, front: &Front, now: Now) {
        let stuck = self.out.stuck_since.is_some_and(|since| now.instant > since + STUCK_READER);
        if stuck
            && self.outgoing_room(front) == 0
            && let Some(handle) = &self.handle
        {
            add(&front.counters.stuck_readers_total, 1);
            handle.kick(Reason::QUOTA_EXCEEDED);
        }
    }

    /// Forgets all messages and packet ids, in both directions.
    pub fn forget(&mut self, front: &Front) {
        self.outbound.clear();
        self.received.clear();
        self.count_bytes(front);
    }

    /// Returns what [`Self::take_chunk`] gave, written up to `at`.
    pub fn give_back(&mut self, mut chunk: Vec<u8>, at: usize, front: &Front) {
        let out = &mut self.out;
        let moved = out.writing.take().is_none_or(|(left, _)| chunk.len() - at < left);
        if at >= chunk.len() {
            out.front = Vec::new();
            out.front_at = 0;
            out.stuck_since = None;
            front.pool.give(chunk);
        } else {
            if moved || out.stuck_since.is_none() {
                out.stuck_since = Some(Instant::now());
            }
            let left = chunk.len() - at;
            if chunk.capacity() > 2 * left + 4096 {
                // It may wait for long: no longer than it must be.
                chunk = chunk.split_off(at);
                chunk.shrink_to_fit();
                out.front_at = 0;
            } else {
                out.front_at = at;
            }
            out.front = chunk;
        }
        self.count_bytes(front);
        if self.pending_bytes() <= front.settings.outbound_bytes_max / 4 {
            self.out.slow &= self.outbound.queue_len() > front.settings.queue_messages_max / 4;
            self.wake_waiters();
        }
    }

    /// Acknowledgements made room: publishers that wait for it need not wait for the next write.
    pub fn acknowledged(&mut self, front: &Front) {
        self.count_bytes(front);
        if !self.out.waiters.is_empty() && !self.congested(front) {
            self.wake_waiters();
        }
    }

    pub fn wake_waiters(&mut self) {
        self.out.waiters.drain(..).for_each(Waker::wake);
    }

    /// Bytes that wait for the socket.
    pub fn pending_bytes(&self) -> usize {
        self.out.writing.map_or(self.out.front.len() - self.out.front_at, |(left, _)| left) + self.out.back.len()
    }

    /// So much waits that publishers should pause for a moment.
    pub fn congested(&self, front: &Front) -> bool {
        self.live
            && !self.out.slow
            && !self.out.failed
            && (self.pending_bytes() > front.settings.outbound_bytes_max / 2
                || self.outbound.queue_len() > front.settings.queue_messages_max / 2
                || self.outbound.bytes() > front.settings.queue_bytes_max / 2)
    }

    /// Wakes this publisher when the subscriber has caught up.
    pub fn wait_until_drained(&mut self, waker: &Waker) {
        if !self.out.waiters.iter().any(|old| old.will_wake(waker)) {
            self.out.waiters.push(waker.clone());
        }
    }

    /// Bytes to append to, with room from the pool.
    pub fn back(&mut self, front: &Front) -> &mut Vec<u8> {
        if self.out.back.capacity() == 0 {
            self.out.back = front.pool.take();
        }
        &mut self.out.back
    }

    /// The connection is gone; returns what it had not written, unless somebody is writing right now.
    pub fn disconnect(&mut self, front: &Front) -> Option<Vec<u8>> {
        self.handle = None;
        self.live = false;
        self.epoch += 1;
        self.wake_waiters();
        let out = std::mem::take(&mut self.out);
        self.count_bytes(front);
        if out.writing.is_some() {
            return None;
        }
        let mut rest = out.front.get(out.front_at..).unwrap_or_default().to_vec();
        rest.extend_from_slice(&out.back);
        Some(rest)
    }

    /// Its own row; subscriptions and packet ids have theirs.
    pub fn to_stored(&self, client_id: &str) -> StoredSession {
        StoredSession {
            client_id: client_id.to_owned(),
            user: self.user.clone(),
            expiry_secs: self.expiry_secs,
            left: self.left,
            ..StoredSession::default()
        }
    }
}

impl Out {
    /// Bytes it occupies, used or not.
    fn capacity(&self) -> usize {
        self.back.capacity() + self.front.capacity() + self.writing.map_or(0, |(_, capacity)| capacity)
    }
}

/// Topics that a search for retained messages looks at before others have their turn.
const RETAINED_STEPS: usize = 128;
/// How long a socket may take nothing before its connection can be ended for the memory it holds.
const STUCK_READER: Duration = Duration::from_secs(10);

/// Buffers between uses, so that an idle connection holds none.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    free: Mutex<PooledBuffers>,
}

#[derive(Debug, Default)]
struct PooledBuffers {
    buffers: Vec<Vec<u8>>,
    bytes: usize,
}

const POOLED_BUFFERS_MAX: usize = 32;
const POOLED_BYTES_MAX: usize = 8 << 20;

impl Pool {
    /// Gives half of what lies unused back to the system.
    pub fn trim(&self) {
        let mut free = self.free.lock();
        let keep = free.buffers.len() / 2;
        free.buffers.truncate(keep);
        free.bytes = free.buffers.iter().map(Vec::capacity).sum();
    }

    pub fn take(&self) -> Vec<u8> {
        let mut free = self.free.lock();
        let buffer = free.buffers.pop().unwrap_or_default();
        free.bytes -= buffer.capacity();
        buffer
    }

    pub fn give(&self, mut buffer: Vec<u8>) {
        let bytes = buffer.capacity();
        if bytes == 0 {
            return;
        }
        buffer.clear();
        let mut free = self.free.lock();
        if free.buffers.len() < POOLED_BUFFERS_MAX && free.bytes + bytes <= POOLED_BYTES_MAX {
            free.bytes += bytes;
            free.buffers.push(buffer);
        }
    }
}
