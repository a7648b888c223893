//! Sessions as they come and go: claimed by a connection, taken over, left, resumed, expired; and the wills.

use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::MutexGuard;
use shared::limited;
use tracing::{debug, warn};

use super::fanout::{Live, Run};
use super::session::{Handle, Session, SessionState, Will};
use super::stats::add;
use super::{Front, Now};
use crate::codec::{QoS, Reason, SubscribeOptions, decode_properties_and_payload};
use crate::message::Message;
use crate::session::connect::Terms;
use crate::session::inbound::ReceivedIds;
use crate::store::{Admission, Publish, Refusal, SessionLeft, SessionRef, StoreFailed, Ticket};
use crate::topic::TopicFilter;
use crate::tree::Subscription;

impl Front {
    /// Fills sessions and retained messages from the store. What cannot be read any more is left out and said.
    pub(super) fn load(&self) -> Result<(), StoreFailed> {
        let now = self.now();
        for stored in self.store.load_sessions()? {
            if stored.expiry_secs == 0 {
                self.store.delete_session(&stored.client_id);
                continue;
            }
            let session = Arc::new(Session::new(self.next_number(), &stored.client_id));
            let mut state = session.state.lock();
            state.known = true;
            state.stored = true;
            state.user = stored.user;
            state.expiry_secs = stored.expiry_secs;
            state.left = stored.left;
            let order = stored.left.map_or(0, |left| left.order);
            self.times_left.fetch_max(order, Ordering::Relaxed);
            state.received = ReceivedIds::restored(&stored.inbound_packet_ids);
            for subscription in &stored.subscriptions {
                let Ok(filter) = TopicFilter::parse(&subscription.filter) else {
                    warn!(client = %stored.client_id, "a stored subscription is not a topic filter: left out");
                    continue;
                };
                let Some(options) = SubscribeOptions::from_byte(subscription.options) else {
                    warn!(client = %stored.client_id, "a stored subscription has unknown options: left out");
                    continue;
                };
                self.subscribe(
                    &session,
                    &mut state,
                    &filter,
                    Subscription { options, identifier: subscription.identifier },
                );
            }
            // The time since it was left may have been told by a clock that was wrong (1970, 2099): each start
            // grants the whole expiry again rather than drop sessions of clients that are about to come back.
            self.schedule_end(&session, &mut state, now);
            drop(state);
            self.sessions.lock().insert(session.client_id.clone(), session);
        }
        let mut retained = self.retained.lock();
        for stored in self.store.load_retained()? {
            match Message::from_stored(&stored, now.ms, now.wall_ms) {
                Ok(message) => retained.set(&stored.topic, Arc::new(message)),
                Err(error) => warn!(%error, "a stored retained message cannot be read: left out"),
            }
        }
        Ok(())
    }

    /// Makes the session of `client_id` this connection's own, once whoever has it let go.
    pub(super) async fn claim(self: Arc<Self>, client_id: String, handle: Arc<Handle>) -> Result<Arc<Session>, Reason> {
        loop {
            let session = {
                let mut sessions = self.sessions.lock();
                let count = sessions.len();
                match sessions.entry(client_id.as_str().into()) {
                    Entry::Occupied(entry) => entry.get().clone(),
                    Entry::Vacant(_) if count >= self.settings.sessions_max => return Err(Reason::QUOTA_EXCEEDED),
                    Entry::Vacant(entry) => {
                        entry.insert(Arc::new(Session::new(self.next_number(), &client_id))).clone()
                    }
                }
            };
            let released = session.released.notified();
            tokio::pin!(released);
            released.as_mut().enable();
            {
                let mut state = session.state.lock();
                if state.ended {
                    continue;
                }
                match &state.handle {
                    None => {
                        state.handle = Some(handle);
                        return Ok(session.clone());
                    }
                    Some(old) => {
                        debug!(client = %client_id, "session taken over");
                        add(&self.counters.takeovers_total, 1);
                        old.kick(Reason::SESSION_TAKEN_OVER);
                    }
                }
            }
            released.await;
        }
    }

    /// Begins or resumes the claimed session on the agreed terms. CONNACK waits for the ticket.
    pub(super) fn open(
        &self,
        session: &Arc<Session>,
        terms: &Terms,
        will: Option<Will>,
    ) -> Result<(Ticket, bool), Refusal> {
        let mut state = session.state.lock();
        let mut ticket = Ticket::default();
        let mut lost_will = None;
        let present = state.known && !terms.clean_start;
        if present {
            state.will = None; // §3.1.3.2.2: it came back before the delay was over.
        } else {
            // §3.1.3.2.2: the session ends here, and a delayed will does not wait longer.
            lost_will = state.will.take().filter(|_| state.will_due_ms.is_some());
            self.unsubscribe_all(session, &mut state);
            state.forget(self);
            if std::mem::take(&mut state.stored) {
                ticket = self.store.delete_session(&session.client_id);
            }
        }
        state.known = true;
        let due = state.will_due_ms.take().into_iter().chain(state.expires_ms.take());
        let mut timers = self.timers.lock();
        due.for_each(|at| {
            timers.remove(&(at, session.client_id.clone()));
        });
        drop(timers);
        state.expiry_secs = terms.session_expiry_secs;
        state.left = None;
        state.will = will.map(Arc::new);
        state.received.reconnected();
        state.outbound.connected(terms.version, terms.window, terms.packet_bytes_max, terms.session_expiry_secs > 0);
        let mut refused = None;
        if state.expiry_secs > 0 || state.stored {
            match self.store.save_session(&state.to_stored(&session.client_id)) {
                Ok(saved) => {
                    state.stored = true;
                    ticket = ticket.max(saved);
                }
                Err(refusal) => {
                    // There was none before: it ends with this connection, and its will says nothing.
                    (state.known, state.will) = (false, None);
                    refused = Some(refusal);
                }
            }
        }
        drop(state);
        if let Some(will) = lost_will {
            self.publish_will(session.client_id.clone(), will);
        }
        refused.map_or(Ok((ticket, present)), Err)
    }

    /// The connection is over. Returns the bytes it had not written, if it is known where they end.
    pub(super) fn detach(
        &self,
        session: &Arc<Session>,
        handle: &Arc<Handle>,
        publish_will: bool,
        now: Now,
    ) -> Option<Vec<u8>> {
        let mut state = session.state.lock();
        if !state.handle.as_ref().is_some_and(|owner| Arc::ptr_eq(owner, handle)) {
            return None;
        }
        let rest = state.disconnect();
        // What found no room on the disk was not acknowledged: the client sends it again.
        state.received.forget(|ticket| self.store.durable(ticket).is_err());
        let mut will = None;
        if !publish_will {
            state.will = None;
        }
        if state.expiry_secs == 0 || !state.known {
            will = state.will.take();
            self.end(session, state);
        } else {
            match state.will.as_ref().map(|will| i64::from(will.delay_secs) * 1000) {
                Some(0) => will = state.will.take(),
                Some(delay) => {
                    let due = now.ms.saturating_add(delay);
                    state.will_due_ms = Some(due);
                    self.timers.lock().insert((due, session.client_id.clone()));
                }
                None => {}
            }
            self.schedule_end(session, &mut state, now);
            let order = self.times_left.fetch_add(1, Ordering::Relaxed) + 1;
            state.left = Some(SessionLeft { order, wall_ms: now.wall_ms });
            // Nobody waits for it: after a crash the session merely counts as left at the restart.
            let _ = self.store.save_session(&state.to_stored(&session.client_id));
            drop(state);
        }
        session.released.notify_waiters();
        if let Some(will) = will {
            self.publish_will(session.client_id.clone(), will);
        }
        rest
    }

    fn schedule_end(&self, session: &Session, state: &mut SessionState, now: Now) {
        if state.expiry_secs != u32::MAX {
            let at = now.ms.saturating_add(i64::from(state.expiry_secs) * 1000);
            state.expires_ms = Some(at);
            self.timers.lock().insert((at, session.client_id.clone()));
        }
    }

    /// Ends a session that nobody is connected to.
    fn end(&self, session: &Arc<Session>, mut state: MutexGuard<'_, SessionState>) {
        state.ended = true;
        self.unsubscribe_all(session, &mut state);
        state.forget(self);
        if std::mem::take(&mut state.stored) {
            let _ = self.store.delete_session(&session.client_id);
        }
        drop(state);
        let mut sessions = self.sessions.lock();
        if sessions.get(&session.client_id).is_some_and(|s| s == session) {
            sessions.remove(&session.client_id);
        }
    }

    /// Adds or replaces a subscription; true if it is new.
    pub(super) fn subscribe(
        &self,
        session: &Arc<Session>,
        state: &mut SessionState,
        filter: &TopicFilter<'_>,
        subscription: Subscription,
    ) -> bool {
        let mut tree = self.tree.write();
        let new = tree.insert(filter, session.clone(), subscription);
        self.generation.fetch_add(1, Ordering::Release);
        drop(tree);
        state.subscriptions.insert(filter.as_str().into(), subscription);
        new
    }

    /// Removes a subscription; false if there was none.
    pub(super) fn unsubscribe(
        &self,
        session: &Arc<Session>,
        state: &mut SessionState,
        filter: &TopicFilter<'_>,
    ) -> bool {
        let existed = state.subscriptions.remove(filter.as_str()).is_some();
        if existed {
            let mut tree = self.tree.write();
            tree.remove(filter, session);
            self.generation.fetch_add(1, Ordering::Release);
        }
        existed
    }

    fn unsubscribe_all(&self, session: &Arc<Session>, state: &mut SessionState) {
        let subscriptions = std::mem::take(&mut state.subscriptions);
        if subscriptions.is_empty() {
            return;
        }
        let mut tree = self.tree.write();
        for filter in subscriptions.keys() {
            if let Ok(filter) = TopicFilter::parse(filter) {
                tree.remove(&filter, session);
            }
        }
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// A will goes the way of any PUBLISH. If there is no room it is offered again until the hold timeout.
    fn publish_will(&self, client_id: Arc<str>, will: Arc<Will>) {
        if self.offer_will(&client_id, &will) {
            return;
        }
        let room = self.store.room();
        // The front outlives its tasks, but a will needs it only as long as it lasts.
        let Some(front) = self.weak.upgrade() else { return };
        let until = tokio::time::Instant::now() + self.settings.hold_timeout;
        tokio::spawn(async move {
            let mut room = room;
            while tokio::time::timeout_at(until, room).await.is_ok() {
                if front.offer_will(&client_id, &will) {
                    return;
                }
                room = front.store.room();
            }
            add(&front.counters.hold_timeouts_total, 1);
            limited!(warn, client = %client_id, "a will found no room in its stream and is dropped");
        });
    }

    /// False: there is no room.
    fn offer_will(&self, client_id: &str, will: &Will) -> bool {
        let now = self.now();
        let Ok((properties, payload)) = decode_properties_and_payload(&will.properties_and_payload) else {
            return true;
        };
        let publish = Publish {
            topic: &will.topic,
            payload,
            qos: will.qos,
            retain: will.retain,
            packet_id: None,
            now_ms: now.wall_ms,
            properties,
        };
        let mut admissions = Vec::with_capacity(1);
        self.store.publish(&SessionRef { client_id, kept: false }, std::slice::from_ref(&publish), &mut admissions);
        match admissions.first() {
            None => return false,
            Some(Admission::Refused(refusal)) => {
                add(&self.counters.refused_total, 1);
                limited!(warn, client = %client_id, ?refusal, "a will was refused");
            }
            Some(_) => self.deliver_one(&publish, now),
        }
        true
    }

    /// Delivers a message that is not in a read buffer, and retains it if it says so.
    pub(super) fn deliver_one(&self, publish: &Publish<'_>, now: Now) {
        let Ok(message) = Message::from_publish(publish, now.ms) else { return };
        let message = Arc::new(message);
        if publish.retain {
            let mut retained = self.retained.lock();
            if publish.payload.is_empty() {
                retained.remove(publish.topic);
            } else {
                retained.set(publish.topic, message.clone());
            }
        }
        let live = Live {
            content: message.content(),
            expiry_secs: publish.properties.expiry_secs,
            qos: QoS::from_u8(publish.qos).unwrap_or_default(),
            retain: publish.retain,
            message: std::cell::OnceCell::from(message.clone()),
        };
        let (targets, _) = self.targets(publish.topic);
        let mut touched = Vec::new();
        self.deliver(None, &targets, &Run::new(std::slice::from_ref(&live), None), now.ms, &mut touched);
        self.flush(&mut touched);
    }

    /// Starts, once, the task that ends sessions and publishes delayed wills.
    pub(super) fn keep_house(self: &Arc<Self>) {
        if self.housekeeping.swap(true, Ordering::AcqRel) {
            return;
        }
        let front = Arc::downgrade(self);
        tokio::spawn(async move {
            let mut tick = tokio::time::interval(Duration::from_secs(1));
            tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            let mut ticks = 0u32;
            loop {
                tick.tick().await;
                let Some(front) = front.upgrade() else { return };
                front.run_timers(front.now());
                ticks = ticks.wrapping_add(1);
                if ticks.is_multiple_of(5) {
                    front.pool.trim();
                }
                if ticks.is_multiple_of(60) {
                    // The store's goes too, under the same lock: nobody retains a new one in between.
                    front.retained.lock().expire(front.now().ms, |topic| front.store.delete_retained(topic));
                }
            }
        });
    }

    fn run_timers(&self, now: Now) {
        loop {
            let client_id = {
                let mut timers = self.timers.lock();
                match timers.first() {
                    Some((at, _)) if *at <= now.ms => timers.pop_first().map(|(_, client_id)| client_id),
                    _ => None,
                }
            };
            let Some(client_id) = client_id else { return };
            let Some(session) = self.sessions.lock().get(&client_id).cloned() else { continue };
            let mut state = session.state.lock();
            if state.handle.is_some() || state.ended {
                continue;
            }
            let over = state.expires_ms.is_some_and(|at| at <= now.ms);
            let mut will = None;
            if over || state.will_due_ms.is_some_and(|at| at <= now.ms) {
                state.will_due_ms = None;
                will = state.will.take();
            }
            if over {
                limited!(info, client = %client_id, "session expired");
                self.end(&session, state);
            } else {
                drop(state);
            }
            if let Some(will) = will {
                self.publish_will(client_id, will);
            }
        }
    }
}
