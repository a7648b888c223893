//! From a publisher's buffer to its subscribers: neighbouring messages of one topic are one run; each subscriber is locked
//! once per run, gets bytes that were encoded once per version, and is flushed once per buffer.

use std::cell::OnceCell;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::session::Session;
use super::stats::add;
use super::turns::Turn;
use super::{Front, Now};
use crate::codec::{QoS, Version};
use crate::message::{Content, Envelope, Message};
use crate::session::connect::granted;
use crate::session::outbound::Delivered;
use crate::tree::Subscription;

/// A subscriber of a topic: its matching subscriptions as one, so that it gets one copy (§3.3.4).
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub session: Arc<Session>,
    qos: QoS,
    no_local: bool,
    retain_as_published: bool,
    subscription_ids: Vec<u32>,
}

impl Target {
    /// Bytes of its subscription identifiers.
    pub fn subscription_ids_bytes(&self) -> usize {
        self.subscription_ids.capacity() * size_of::<u32>()
    }
}

/// One message of a run.
pub(crate) struct Live<'a> {
    pub content: Content<'a>,
    pub expiry_secs: Option<u32>,
    pub qos: QoS,
    pub retain: bool,
    /// Made when the first subscriber needs it remembered, shared by all.
    pub message: OnceCell<Arc<Message>>,
}

impl Live<'_> {
    pub fn remember(&self, now_ms: i64) -> Arc<Message> {
        let make = || Arc::new(Message::new(&self.content, self.expiry_secs, self.qos, now_ms));
        self.message.get_or_init(make).clone()
    }
}

/// Neighbouring messages of one topic.
pub(crate) struct Run<'a> {
    lives: &'a [Live<'a>],
    qos_max: QoS,
    any_retain: bool,
    bytes: usize,
    /// What the publisher sent, where a subscriber of that version gets just these bytes.
    raw: Option<(Version, &'a [u8])>,
    at_most_once: [OnceCell<Vec<u8>>; 2],
}

impl<'a> Run<'a> {
    pub fn new(lives: &'a [Live<'a>], raw: Option<(Version, &'a [u8])>) -> Self {
        Self {
            lives,
            qos_max: lives.iter().map(|live| live.qos).max().unwrap_or_default(),
            any_retain: lives.iter().any(|live| live.retain),
            bytes: lives.iter().map(|live| live.content.bytes()).sum(),
            raw,
            at_most_once: [OnceCell::new(), OnceCell::new()],
        }
    }

    /// What it costs to hand it to one subscriber, in the unit of [`Turn`].
    fn work_each(&self) -> usize {
        let messages = if self.qos_max == QoS::AtMostOnce { self.lives.len() / 16 } else { self.lives.len() * 4 };
        1 + messages + self.bytes / 1024
    }

    /// The whole run as QoS 0 without RETAIN.
    fn at_most_once(&self, version: Version) -> &[u8] {
        match self.raw {
            Some((raw_version, bytes)) if raw_version == version => bytes,
            _ => self.at_most_once[usize::from(version == Version::V5)].get_or_init(|| {
                let mut out = Vec::new();
                let envelope = envelope(version, QoS::AtMostOnce, false, &[]);
                self.lives.iter().for_each(|live| live.content.append(&envelope, &mut out));
                out
            }),
        }
    }
}

fn envelope(version: Version, qos: QoS, retain: bool, subscription_ids: &[u32]) -> Envelope<'_> {
    Envelope { version, qos, dup: false, retain, packet_id: 0, subscription_ids, expiry_secs: None }
}

impl Front {
    /// Who gets messages of this topic, the tree's generation that this is true for, and the steps it took.
    pub(crate) fn targets(&self, topic: &str) -> (Arc<[Target]>, u64, usize) {
        let mut found: Vec<(Arc<Session>, Subscription)> = Vec::new();
        let tree = self.tree.read();
        let generation = self.generation.load(Ordering::Acquire);
        let steps = tree.find(topic, &mut found);
        drop(tree);
        add(&self.counters.route_steps_total, steps);
        if found.len() > 1 {
            found.sort_by(|a, b| a.0.cmp(&b.0));
        }
        let mut targets: Vec<Target> = Vec::with_capacity(found.len());
        for (session, subscription) in found {
            let options = subscription.options;
            match targets.last_mut().filter(|last| last.session == session) {
                Some(last) => {
                    last.qos = last.qos.max(options.qos);
                    last.no_local &= options.no_local;
                    last.retain_as_published |= options.retain_as_published;
                    last.subscription_ids.extend(subscription.identifier);
                }
                None => targets.push(Target {
                    session,
                    qos: options.qos,
                    no_local: options.no_local,
                    retain_as_published: options.retain_as_published,
                    subscription_ids: subscription.identifier.into_iter().collect(),
                }),
            }
        }
        (targets.into(), generation, steps)
    }

    /// Hands a run to subscribers. Those that were given bytes are added to `touched` unless somebody already
    /// is about to flush them.
    pub(crate) fn deliver(
        &self,
        from: Option<&Arc<Session>>,
        targets: &[Target],
        run: &Run<'_>,
        now: Now,
        touched: &mut Touched,
    ) {
        let mut unwritten = 0;
        for target in targets {
            if target.no_local && from.is_some_and(|from| *from == target.session) {
                continue;
            }
            self.deliver_to(target, run, now, &mut touched.sessions);
            // A copy for each of many would be too much at once: what is large is written before the next is made.
            unwritten += run.bytes;
            if unwritten > UNWRITTEN_BYTES_MAX {
                self.flush(touched);
                unwritten = 0;
            }
        }
    }

    /// As [`Self::deliver`], to the first targets only when more would take too long; returns to how many.
    pub(crate) fn deliver_some(
        &self,
        from: Option<&Arc<Session>>,
        targets: &[Target],
        run: &Run<'_>,
        now: Now,
        touched: &mut Touched,
        turn: &mut Turn,
    ) -> usize {
        let each = run.work_each();
        let count = (turn.left() / each).clamp(1, targets.len().max(1)).min(targets.len());
        turn.add(each * count);
        self.deliver(from, targets.get(..count).unwrap_or_default(), run, now, touched);
        count
    }

    fn deliver_to(&self, target: &Target, run: &Run<'_>, now: Now, touched: &mut Vec<Arc<Session>>) {
        let mut guard = target.session.state.lock();
        let state = &mut *guard;
        if state.ended {
            return;
        }
        let version = state.outbound.version();
        let retain = target.retain_as_published && run.any_retain;
        let at_most_once = granted(run.qos_max, target.qos) == QoS::AtMostOnce;
        if at_most_once && !state.live {
            return; // §4.3.1: QoS 0 is not kept for who is away.
        }
        let whole = at_most_once
            && !retain
            && target.subscription_ids.is_empty()
            && state.outbound.packet_bytes_max() == usize::MAX;
        if whole {
            let bytes = run.at_most_once(version);
            if state.pending_bytes() >= self.settings.outbound_bytes_max || bytes.len() > state.outgoing_room(self) {
                add(&self.counters.dropped_slow_total, run.lives.len());
                state.found_no_room(self, now);
                return;
            }
            state.back(self).extend_from_slice(bytes);
            state.count_bytes(self);
            add(&self.counters.sent_messages_total, run.lives.len());
        } else {
            let mut bounds = state.bounds(self);
            let (mut sent, mut slow, mut full, mut large) = (0, 0, 0, 0);
            let online = state.live;
            let mut pending = state.pending_bytes();
            let held_nothing = state.outbound.bytes() == 0;
            if online {
                state.back(self);
            }
            let (outbound, back) = (&mut state.outbound, &mut state.out.back);
            for live in run.lives {
                let qos = granted(live.qos, target.qos);
                let retain = live.retain && target.retain_as_published;
                if qos == QoS::AtMostOnce {
                    let envelope = envelope(version, qos, retain, &target.subscription_ids);
                    let bytes = live.content.packet_bytes(&envelope);
                    if !online {
                    } else if bytes > outbound.packet_bytes_max() {
                        large += 1;
                    } else if pending >= bounds.out_bytes_max || bytes > bounds.room {
                        slow += 1;
                    } else {
                        live.content.append(&envelope, back);
                        bounds.room -= bytes;
                        pending += bytes;
                        sent += 1;
                    }
                    continue;
                }
                let remember = || live.remember(now.ms);
                let ids = &target.subscription_ids;
                match outbound.deliver(&live.content, qos, retain, ids, online, remember, &mut bounds, back) {
                    Delivered::Sent => sent += 1,
                    Delivered::Queued => {}
                    Delivered::QueueFull => full += 1,
                    Delivered::TooLarge => large += 1,
                }
            }
            state.count_bytes(self);
            if !online && held_nothing && state.outbound.bytes() > 0 {
                self.reconsider(&target.session, state); // It holds an acknowledged message from now on.
            }
            if slow + full > 0 {
                state.found_no_room(self, now);
            }
            add(&self.counters.sent_messages_total, sent);
            add(&self.counters.dropped_slow_total, slow);
            add(&self.counters.dropped_queue_full_total, full);
            add(&self.counters.dropped_too_large_total, large);
        }
        if state.live && !std::mem::replace(&mut state.out.dirty, true) {
            drop(guard);
            touched.push(target.session.clone());
        }
    }

    /// Sends what the touched subscribers got. Few are written to here and now; many are left to their own tasks, so that
    /// both the cores and the publisher's next buffer get their share. Keeps those whose publishers should pause.
    pub(crate) fn flush(&self, touched: &mut Touched) {
        let directly = touched.sessions.len() <= WRITE_DIRECTLY_MAX;
        for session in touched.sessions.drain(..) {
            let pause = if directly {
                session.flush(self, false)
            } else {
                let mut state = session.state.lock();
                state.out.dirty = false;
                if let Some(handle) = &state.handle {
                    handle.wake();
                }
                state.congested(self)
            };
            if pause {
                touched.congested.push(session);
            }
        }
    }
}

/// Subscribers that were given bytes.
#[derive(Debug, Default)]
pub(crate) struct Touched {
    /// Not flushed yet.
    pub sessions: Vec<Arc<Session>>,
    /// Flushed, and so much is left that their publisher should pause.
    pub congested: Vec<Arc<Session>>,
}

/// A run that is delivered in several polls: to many subscribers, or behind one that is.
#[derive(Debug)]
pub(crate) struct PendingRun {
    messages: Vec<(Arc<Message>, bool)>,
    /// Not asked yet, if `None`.
    targets: Option<Arc<[Target]>>,
    delivered: usize,
}

impl PendingRun {
    pub fn new(lives: &[Live<'_>], targets: Option<Arc<[Target]>>, delivered: usize, now_ms: i64) -> Self {
        let messages = lives.iter().map(|live| (live.remember(now_ms), live.retain)).collect();
        Self { messages, targets, delivered }
    }

    /// Bytes it occupies.
    pub fn bytes(&self) -> usize {
        self.messages.iter().map(|(message, _)| message.cost()).sum()
    }

    pub fn topic(&self) -> &str {
        let topic = self.messages.first().map_or(&[][..], |(message, _)| message.content().topic);
        std::str::from_utf8(topic).unwrap_or_default()
    }

    pub fn targets(&self) -> Option<Arc<[Target]>> {
        self.targets.clone()
    }

    /// Delivers to some more of `targets`; true when it is done.
    pub fn go_on(
        &mut self,
        front: &Front,
        from: Option<&Arc<Session>>,
        targets: Arc<[Target]>,
        now: Now,
        touched: &mut Touched,
        turn: &mut Turn,
    ) -> bool {
        let lives: Vec<Live<'_>> = self
            .messages
            .iter()
            .map(|(message, retain)| Live {
                content: message.content(),
                expiry_secs: message.expiry_left(now.ms).ok().flatten(),
                qos: message.qos,
                retain: *retain,
                message: OnceCell::from(message.clone()),
            })
            .collect();
        let rest = targets.get(self.delivered..).unwrap_or_default();
        self.delivered += front.deliver_some(from, rest, &Run::new(&lives, None), now, touched, turn);
        let done = self.delivered >= targets.len();
        self.targets = Some(targets);
        done
    }
}

/// Above so many subscribers per buffer each task writes for itself.
const WRITE_DIRECTLY_MAX: usize = 16;
/// Bytes given to subscribers before they are written.
const UNWRITTEN_BYTES_MAX: usize = 1 << 20;
