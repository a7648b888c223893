//! A session as connections share it: its state under one lock, and the bytes on their way to its socket.

use std::cmp::Ordering;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::AcqRel, Ordering::Acquire};
use std::task::Waker;

use parking_lot::Mutex;
use tokio::net::tcp::OwnedWriteHalf;
use tokio::sync::Notify;

use super::Front;
use super::stats::{add, sub};
use crate::codec::{QoS, Reason};
use crate::message::{Envelope, Message};
use crate::session::inbound::ReceivedIds;
use crate::session::outbound::{Delivered, Outbound};
use crate::store::{SessionLeft, StoredSession};
use crate::tree::Subscription;

/// One session. The number orders sessions in the topic tree.
#[derive(Debug)]
pub(crate) struct Session {
    number: u64,
    pub client_id: Arc<str>,
    pub state: Mutex<SessionState>,
    /// A connection let go of it.
    pub released: Notify,
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
    /// The user it belongs to.
    pub user: Option<String>,
    /// Seconds it outlives its connection; `u32::MAX`: for ever.
    pub expiry_secs: u32,
    /// When its last connection ended; only while nobody is connected, and not if the broker was killed meanwhile.
    pub left: Option<SessionLeft>,
    /// When it ends; only while nobody is connected.
    pub expires_ms: Option<i64>,
    pub subscriptions: BTreeMap<Box<str>, Subscription>,
    pub outbound: Outbound,
    pub received: ReceivedIds,
    /// Retained messages that new subscriptions are still to get.
    pub backlog: VecDeque<RetainedDelivery>,
    /// What of `outbound` is counted in the front's gauge.
    counted_bytes: usize,
    pub will: Option<Arc<Will>>,
    /// When a delayed will is published.
    pub will_due_ms: Option<i64>,
    pub out: Out,
    /// Counts connections, so that a writer that comes back late finds that its bytes are nobody's any more.
    epoch: u64,
}

/// A retained message for a new subscription.
#[derive(Debug)]
pub(crate) struct RetainedDelivery {
    pub message: Arc<Message>,
    pub qos: QoS,
    pub subscription_id: Option<u32>,
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
}

/// Bytes on their way to the socket: `front` is being written from `front_at` on, `back` is appended to.
#[derive(Debug, Default)]
pub(crate) struct Out {
    pub back: Vec<u8>,
    front: Vec<u8>,
    front_at: usize,
    /// Somebody took `front` to write it; this many bytes.
    writing: Option<usize>,
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
            user: None,
            expiry_secs: 0,
            left: None,
            expires_ms: None,
            subscriptions: BTreeMap::new(),
            outbound: Outbound::new(),
            received: ReceivedIds::default(),
            backlog: VecDeque::new(),
            counted_bytes: 0,
            will: None,
            will_due_ms: None,
            out: Out::default(),
            epoch: 0,
        };
        Self { number, client_id: client_id.into(), state: Mutex::new(state), released: Notify::new() }
    }

    /// Writes what waits for a plain socket, as far as it takes it. Any task may call it; one at a time writes, the
    /// others leave it to that one. Returns whether so much is left that publishers should wait.
    pub fn flush(&self, front: &Front) -> bool {
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
            let Some((chunk, mut at)) = state.take_chunk(front) else { return state.congested(front) };
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
            if self.out.back.is_empty() && self.live && (self.outbound.has_more() || !self.backlog.is_empty()) {
                self.fill(front);
            }
            let out = &mut self.out;
            if out.back.is_empty() {
                front.pool.give(std::mem::take(&mut out.back));
                return None;
            }
            out.front = std::mem::take(&mut out.back);
            out.front_at = 0;
        }
        let out = &mut self.out;
        out.writing = Some(out.front.len() - out.front_at);
        Some((std::mem::take(&mut out.front), out.front_at))
    }

    /// Writes what waited for its turn: retained messages of new subscriptions, what must be sent again, the queue.
    fn fill(&mut self, front: &Front) {
        let now_ms = front.now().ms;
        let bounds = front.bounds();
        let back = &mut self.out.back;
        if back.capacity() == 0 {
            *back = front.pool.take();
        }
        if !self.backlog.is_empty() {
            let retained = front.retained.lock();
            let (mut sent, mut dropped) = (0, 0);
            while let Some(next) = self.backlog.front() {
                if back.len() >= bounds.out_bytes_max / 4 || self.outbound.queue_len() * 2 > bounds.queue_messages_max {
                    break;
                }
                let content = next.message.content();
                let ids = next.subscription_id.as_slice();
                // One that was replaced meanwhile came as a live message already; after it the old one would mislead.
                let current = retained.is_current(&next.message);
                let left = next.message.expiry_left(now_ms);
                if let (true, Ok(left)) = (current, left) {
                    let envelope = Envelope {
                        version: self.outbound.version(),
                        qos: next.qos,
                        dup: false,
                        retain: true,
                        packet_id: 0,
                        subscription_ids: ids,
                        expiry_secs: left,
                    };
                    if content.packet_bytes(&envelope) > self.outbound.packet_bytes_max() {
                        dropped += 1;
                    } else if next.qos == QoS::AtMostOnce {
                        content.append(&envelope, back);
                        sent += 1;
                    } else {
                        let remember = || next.message.clone();
                        let outbound = &mut self.outbound;
                        match outbound.deliver(&content, next.qos, true, ids, true, remember, &bounds, back) {
                            Delivered::QueueFull => break,
                            Delivered::TooLarge => dropped += 1,
                            Delivered::Sent | Delivered::Queued => sent += 1,
                        }
                    }
                }
                self.backlog.pop_front();
            }
            if self.backlog.is_empty() {
                self.backlog = VecDeque::new();
            }
            add(&front.counters.sent_messages_total, sent);
            add(&front.counters.dropped_too_large_total, dropped);
        }
        let expired = self.outbound.fill(now_ms, &bounds, &mut self.out.back);
        add(&front.counters.expired_total, expired);
        self.count_bytes(front);
    }

    /// Keeps the front's gauge of queued bytes in step. Called after whatever may have changed `outbound`.
    pub fn count_bytes(&mut self, front: &Front) {
        let (now, counted) = (self.outbound.bytes(), self.counted_bytes);
        if now > counted {
            add(&front.counters.queued_bytes, now - counted);
        } else {
            sub(&front.counters.queued_bytes, counted - now);
        }
        self.counted_bytes = now;
    }

    /// Forgets all messages and packet ids, in both directions.
    pub fn forget(&mut self, front: &Front) {
        self.outbound.clear();
        self.received.clear();
        self.backlog = VecDeque::new();
        self.count_bytes(front);
    }

    /// Returns what [`Self::take_chunk`] gave, written up to `at`.
    pub fn give_back(&mut self, chunk: Vec<u8>, at: usize, front: &Front) {
        let out = &mut self.out;
        out.writing = None;
        if at >= chunk.len() {
            out.front = Vec::new();
            out.front_at = 0;
            front.pool.give(chunk);
        } else {
            out.front = chunk;
            out.front_at = at;
        }
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
        self.out.writing.unwrap_or(self.out.front.len() - self.out.front_at) + self.out.back.len()
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
    pub fn disconnect(&mut self) -> Option<Vec<u8>> {
        self.handle = None;
        self.live = false;
        self.epoch += 1;
        self.wake_waiters();
        let out = std::mem::take(&mut self.out);
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

/// Buffers between uses, so that an idle connection holds none.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    free: Mutex<Vec<Vec<u8>>>,
}

const POOLED_BUFFERS_MAX: usize = 32;
const POOLED_BYTES_MAX: usize = 1 << 20;

impl Pool {
    /// Gives half of what lies unused back to the system.
    pub fn trim(&self) {
        let mut free = self.free.lock();
        let keep = free.len() / 2;
        free.truncate(keep);
    }

    pub fn take(&self) -> Vec<u8> {
        self.free.lock().pop().unwrap_or_default()
    }

    pub fn give(&self, mut buffer: Vec<u8>) {
        if buffer.capacity() == 0 || buffer.capacity() > POOLED_BYTES_MAX {
            return;
        }
        buffer.clear();
        let mut free = self.free.lock();
        if free.len() < POOLED_BUFFERS_MAX {
            free.push(buffer);
        }
    }
}
