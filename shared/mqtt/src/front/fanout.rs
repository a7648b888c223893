//! From a publisher's buffer to its subscribers: neighbouring messages of one topic are one run; each subscriber is locked
//! once per run, gets bytes that were encoded once per version, and is flushed once per buffer.

use std::cell::OnceCell;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Front;
use super::session::Session;
use super::stats::add;
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
            raw,
            at_most_once: [OnceCell::new(), OnceCell::new()],
        }
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
    /// Who gets messages of this topic, and the tree's generation that this is true for.
    pub(crate) fn targets(&self, topic: &str) -> (Arc<[Target]>, u64) {
        let mut found: Vec<(Arc<Session>, Subscription)> = Vec::new();
        let tree = self.tree.read();
        let generation = self.generation.load(Ordering::Acquire);
        tree.find(topic, &mut found);
        drop(tree);
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
        (targets.into(), generation)
    }

    /// Hands a run to its subscribers. Those that were given bytes are added to `touched` unless somebody already
    /// is about to flush them.
    pub(crate) fn deliver(
        &self,
        from: Option<&Arc<Session>>,
        targets: &[Target],
        run: &Run<'_>,
        now_ms: i64,
        touched: &mut Vec<Arc<Session>>,
    ) {
        for target in targets {
            if target.no_local && from.is_some_and(|from| *from == target.session) {
                continue;
            }
            self.deliver_to(target, run, now_ms, touched);
        }
    }

    fn deliver_to(&self, target: &Target, run: &Run<'_>, now_ms: i64, touched: &mut Vec<Arc<Session>>) {
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
            if state.pending_bytes() >= self.settings.outbound_bytes_max {
                add(&self.counters.dropped_slow_total, run.lives.len());
                return;
            }
            state.back(self).extend_from_slice(run.at_most_once(version));
            add(&self.counters.sent_messages_total, run.lives.len());
        } else {
            let bounds = self.bounds();
            let (mut sent, mut slow, mut full, mut large) = (0, 0, 0, 0);
            let online = state.live;
            let mut pending = state.pending_bytes();
            state.back(self);
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
                    } else if pending >= bounds.out_bytes_max {
                        slow += 1;
                    } else {
                        live.content.append(&envelope, back);
                        pending += bytes;
                        sent += 1;
                    }
                    continue;
                }
                let remember = || live.remember(now_ms);
                let ids = &target.subscription_ids;
                match outbound.deliver(&live.content, qos, retain, ids, online, remember, &bounds, back) {
                    Delivered::Sent => sent += 1,
                    Delivered::Queued => {}
                    Delivered::QueueFull => full += 1,
                    Delivered::TooLarge => large += 1,
                }
            }
            state.count_bytes(self);
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
    /// both the cores and the publisher's next buffer get their share. Returns those whose publishers should pause.
    pub(crate) fn flush(&self, touched: &mut Vec<Arc<Session>>) -> Vec<Arc<Session>> {
        let mut congested = Vec::new();
        let directly = touched.len() <= WRITE_DIRECTLY_MAX;
        for session in touched.drain(..) {
            let pause = if directly {
                session.flush(self)
            } else {
                let mut state = session.state.lock();
                state.out.dirty = false;
                if let Some(handle) = &state.handle {
                    handle.wake();
                }
                state.congested(self)
            };
            if pause {
                congested.push(session);
            }
        }
        congested
    }
}

/// Above so many subscribers per buffer each task writes for itself.
const WRITE_DIRECTLY_MAX: usize = 16;
