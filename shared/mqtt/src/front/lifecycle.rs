//! Sessions as they come and go: claimed by a connection, taken over, left, resumed, expired; and the wills.

use std::collections::btree_map::Entry;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::MutexGuard;
use shared::limited;
use tracing::{debug, warn};

use super::fanout::{Live, PendingRun, Run, Touched};
use super::session::{Handle, Session, SessionState, Will};
use super::stats::add;
use super::turns::Turn;
use super::{Front, Now};
use crate::codec::{QoS, Reason, SubscribeOptions, decode_properties_and_payload};
use crate::memory::MemoryUse;
use crate::message::Message;
use crate::retained::Retained;
use crate::session::connect::{Claim, Terms};
use crate::session::inbound::ReceivedIds;
use crate::store::{Admission, Publish, Refusal, SessionLeft, SessionRef, StoreFailed, Ticket};
use crate::topic::TopicFilter;
use crate::tree::Subscription;

impl Front {
    /// Fills sessions and retained messages from the store. What cannot be read any more is left out and said.
    pub(super) fn load(&self) -> Result<(), StoreFailed> {
        let now = self.now();
        let mut cut_off = Vec::new();
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
            state.expiry_secs = stored.expiry_secs.min(self.settings.session_expiry_secs_max);
            state.left = stored.left;
            let order = stored.left.map_or(0, |left| left.order);
            self.times_left.fetch_max(order, Ordering::Relaxed);
            state.received = ReceivedIds::restored(&stored.inbound_packet_ids);
            state.count_bytes(self);
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
            self.set_kept(&mut state, true);
            match state.left {
                Some(_) => self.reconsider(&session, &mut state),
                None => cut_off.push(session.clone()),
            }
            drop(state);
            self.sessions.lock().insert(session.client_id.clone(), session);
        }
        // Their clients were connected when the process was killed: they were left last.
        for session in cut_off {
            let mut state = session.state.lock();
            let order = self.times_left.fetch_add(1, Ordering::Relaxed) + 1;
            state.left = Some(SessionLeft { order, wall_ms: now.wall_ms });
            self.reconsider(&session, &mut state);
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

    /// Makes the claimed session this connection's own, once whoever has it let go.
    pub(super) async fn claim(self: Arc<Self>, claim: Claim, handle: Arc<Handle>) -> Result<Arc<Session>, Reason> {
        loop {
            let full = claim.kept && self.sessions_kept.load(Ordering::Relaxed) >= self.settings.sessions_max;
            let session = match self.sessions.lock().entry(claim.client_id.as_str().into()) {
                Entry::Occupied(entry) => Some(entry.get().clone()),
                Entry::Vacant(_) if full => None,
                Entry::Vacant(entry) => {
                    let session = Arc::new(Session::new(self.next_number(), &claim.client_id));
                    let mut state = session.state.lock();
                    state.user = claim.user.clone();
                    self.set_kept(&mut state, claim.kept);
                    drop(state);
                    Some(entry.insert(session).clone())
                }
            };
            let Some(session) = session else {
                if self.evict_session() {
                    continue;
                }
                add(&self.counters.sessions_refused_total, 1);
                let max = self.settings.sessions_max;
                limited!(warn, client = %claim.client_id, max, "CONNECT refused: there are as many sessions as \
                    mqtt.sessions_max allows, and each is connected or holds messages");
                return Err(Reason::QUOTA_EXCEEDED);
            };
            let released = session.released.notified();
            tokio::pin!(released);
            released.as_mut().enable();
            {
                let mut state = session.state.lock();
                if state.ended {
                    continue;
                }
                // One that was begun when nobody was asked for a name belongs to whoever comes first.
                if !self.settings.users.is_empty() && state.user.is_some() && state.user != claim.user {
                    limited!(warn, client = %claim.client_id, user = claim.user.as_deref().unwrap_or_default(),
                        "CONNECT refused: the client identifier belongs to another user");
                    return Err(Reason::CLIENT_IDENTIFIER_NOT_VALID);
                }
                match &state.handle {
                    None => {
                        state.handle = Some(handle);
                        self.reconsider(&session, &mut state);
                        return Ok(session.clone());
                    }
                    Some(old) => {
                        debug!(client = %claim.client_id, "session taken over");
                        add(&self.counters.takeovers_total, 1);
                        old.kick(Reason::SESSION_TAKEN_OVER);
                    }
                }
            }
            released.await;
        }
    }

    /// Keeps the number of sessions that outlive their connections.
    fn set_kept(&self, state: &mut SessionState, kept: bool) {
        match (std::mem::replace(&mut state.kept, kept), kept) {
            (false, true) => drop(self.sessions_kept.fetch_add(1, Ordering::Relaxed)),
            (true, false) => drop(self.sessions_kept.fetch_sub(1, Ordering::Relaxed)),
            _ => {}
        }
    }

    /// Keeps in step which sessions may be ended to make room: nobody is connected, and they hold no message that was
    /// acknowledged to its publisher. Called after whatever may have changed that.
    pub(super) fn reconsider(&self, session: &Session, state: &mut SessionState) {
        let evictable = state.handle.is_none() && state.kept && !state.ended && state.outbound.bytes() == 0;
        let order = evictable.then(|| state.left.map_or(0, |left| left.order));
        if state.evictable != order {
            let mut all = self.evictable.lock();
            if let Some(old) = state.evictable {
                all.remove(&(old, session.client_id.clone()));
            }
            if let Some(order) = order {
                all.insert((order, session.client_id.clone()));
            }
            state.evictable = order;
        }
    }

    /// Ends the longest absent session that holds no message; false: there is none.
    fn evict_session(&self) -> bool {
        loop {
            let Some((_, client_id)) = self.evictable.lock().pop_first() else { return false };
            let Some(session) = self.sessions.lock().get(&client_id).cloned() else { continue };
            let mut state = session.state.lock();
            if state.evictable.take().is_none() || state.ended || state.handle.is_some() {
                continue; // Somebody was faster.
            }
            let will = state.will.take();
            self.end(&session, state);
            add(&self.counters.sessions_evicted_total, 1);
            let max = self.settings.sessions_max;
            limited!(warn, client = %client_id, max, "session ended, the longest absent one, to make room: there are \
                as many as mqtt.sessions_max allows");
            if let Some(will) = will {
                self.publish_will(client_id, will);
            }
            return true;
        }
    }

    /// Ends a session; if a connection has it, that is ended and the session with it, later: false.
    fn end_or_kick(&self, session: &Arc<Session>) -> bool {
        let mut state = session.state.lock();
        if state.ended {
            return true;
        }
        if let Some(handle) = &state.handle {
            handle.kick(Reason::ADMINISTRATIVE_ACTION);
            state.expiry_secs = 0;
            return false;
        }
        let will = state.will.take();
        self.end(session, state);
        if let Some(will) = will {
            self.publish_will(session.client_id.clone(), will);
        }
        true
    }

    /// Ends a session for an operator; a connected client is disconnected. False: there is none.
    pub async fn remove_session(&self, client_id: &str) -> Result<bool, StoreFailed> {
        let Some(session) = self.sessions.lock().get(client_id).cloned() else { return Ok(false) };
        loop {
            let released = session.released.notified();
            tokio::pin!(released);
            released.as_mut().enable();
            if self.end_or_kick(&session) {
                break;
            }
            released.await;
        }
        let ticket = session.state.lock().deleted;
        if ticket != Ticket::default() {
            self.store.wait(ticket).await?;
        }
        Ok(true)
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
            self.remove_from_tree(session, &state.take_subscriptions());
            state.filters_gone(self);
            state.forget(self);
            if std::mem::take(&mut state.stored) {
                ticket = self.store.delete_session(&session.client_id);
            }
        }
        state.known = true;
        self.unschedule(session, &mut state);
        state.expiry_secs = terms.session_expiry_secs;
        state.user = terms.user.clone().or(state.user.take());
        self.set_kept(&mut state, terms.session_expiry_secs > 0);
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
        let rest = state.disconnect(self);
        // What found no room on the disk was not acknowledged: the client sends it again.
        state.received.forget(|ticket| self.store.durable(ticket).is_err());
        state.count_bytes(self);
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
            self.reconsider(session, &mut state);
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

    /// Forgets when the session ends and its will goes out.
    fn unschedule(&self, session: &Session, state: &mut SessionState) {
        let due = state.will_due_ms.take().into_iter().chain(state.expires_ms.take());
        let mut timers = self.timers.lock();
        for at in due {
            timers.remove(&(at, session.client_id.clone()));
        }
    }

    /// Ends a session that nobody is connected to.
    fn end(&self, session: &Arc<Session>, mut state: MutexGuard<'_, SessionState>) {
        state.ended = true;
        self.unschedule(session, &mut state);
        self.unsubscribe_ended(session, &mut state);
        state.forget(self);
        self.set_kept(&mut state, false);
        self.reconsider(session, &mut state);
        if std::mem::take(&mut state.stored) {
            state.deleted = self.store.delete_session(&session.client_id);
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
        state.insert_subscription(filter.as_str(), subscription, self);
        new
    }

    /// Removes a subscription; false if there was none.
    pub(super) fn unsubscribe(
        &self,
        session: &Arc<Session>,
        state: &mut SessionState,
        filter: &TopicFilter<'_>,
    ) -> bool {
        let existed = state.remove_subscription(filter.as_str(), self);
        if existed {
            let mut tree = self.tree.write();
            tree.remove(filter, session);
            self.generation.fetch_add(1, Ordering::Release);
        }
        existed
    }

    /// Takes all subscriptions of an ended session out of the tree; if they are many, in steps: others have their turn in
    /// between, and the filters' bytes count until the last is out.
    fn unsubscribe_ended(&self, session: &Arc<Session>, state: &mut SessionState) {
        let filters = state.take_subscriptions();
        let front = self.weak.upgrade().filter(|_| filters.len() > UNSUBSCRIBED_AT_ONCE);
        let Some(front) = front else {
            self.remove_from_tree(session, &filters);
            return state.filters_gone(self);
        };
        let session = session.clone();
        tokio::spawn(async move {
            for some in filters.chunks(UNSUBSCRIBED_AT_ONCE) {
                let _lane = front.lanes.enter().await;
                front.remove_from_tree(&session, some);
            }
            session.state.lock().filters_gone(&front);
        });
    }

    fn remove_from_tree(&self, session: &Arc<Session>, filters: &[Arc<str>]) {
        for filters in filters.chunks(UNSUBSCRIBED_AT_ONCE) {
            let mut tree = self.tree.write();
            for filter in filters {
                if let Ok(filter) = TopicFilter::parse(filter) {
                    tree.remove(&filter, session);
                }
            }
            self.generation.fetch_add(1, Ordering::Release);
        }
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
    fn offer_will(&self, client_id: &str, will: &Arc<Will>) -> bool {
        let now = self.now();
        let Ok((properties, payload)) = decode_properties_and_payload(&will.properties_and_payload) else {
            return true;
        };
        let mut publish = Publish {
            topic: &will.topic,
            payload,
            qos: will.qos,
            retain: will.retain,
            packet_id: None,
            now_ms: now.wall_ms,
            properties,
        };
        // Held over both, so that what is retained here and in the store is in the same order.
        let mut retained = will.retain.then(|| self.retained.lock());
        let (messages_max, bytes_max) = (self.settings.retained_messages_max, self.settings.retained_bytes_max);
        let bytes = will.topic.len() + will.properties_and_payload.len();
        let fits = |retained: &Retained| retained.has_room(&will.topic, bytes, messages_max, bytes_max);
        if !payload.is_empty() && retained.as_deref().is_some_and(|retained| !fits(retained)) {
            add(&self.counters.refused_total, 1);
            limited!(warn, %client_id, topic = will.topic, "a will is not retained: as much is as the settings allow");
            (publish.retain, retained) = (false, None);
        }
        let mut admissions = Vec::with_capacity(1);
        self.store.publish(&SessionRef { client_id, kept: false }, std::slice::from_ref(&publish), &mut admissions);
        match admissions.first() {
            None => return false,
            Some(Admission::Refused(refusal)) => {
                add(&self.counters.refused_total, 1);
                limited!(warn, client = %client_id, ?refusal, "a will was refused");
                return true;
            }
            Some(_) => {}
        }
        let Some(message) = Self::retain(&publish, retained.as_deref_mut(), now) else { return true };
        drop(retained);
        self.deliver_message(&publish, message, now, Some(will));
        true
    }

    /// Retains a message that is not in a read buffer, if it says so. `None`: it cannot be read.
    pub(super) fn retain(publish: &Publish<'_>, retained: Option<&mut Retained>, now: Now) -> Option<Arc<Message>> {
        let message = Arc::new(Message::from_publish(publish, now.ms).ok()?);
        if let Some(retained) = retained.filter(|_| publish.retain) {
            if publish.payload.is_empty() {
                retained.remove(publish.topic);
            } else {
                retained.set(publish.topic, message.clone());
            }
        }
        Some(message)
    }

    /// Delivers a message that is not in a read buffer. So many subscribers that they are more than one poll's work get it from
    /// a task, which holds the will it came from until the last of them has it, so that its bytes count.
    pub(super) fn deliver_message(
        &self,
        publish: &Publish<'_>,
        message: Arc<Message>,
        now: Now,
        will: Option<&Arc<Will>>,
    ) {
        let live = Live {
            content: message.content(),
            expiry_secs: publish.properties.expiry_secs,
            qos: QoS::from_u8(publish.qos).unwrap_or_default(),
            retain: publish.retain,
            message: std::cell::OnceCell::from(message.clone()),
        };
        let lives = std::slice::from_ref(&live);
        let (targets, ..) = self.targets(publish.topic);
        let (mut touched, mut turn) = (Touched::default(), Turn::LITTLE);
        let delivered = self.deliver_some(None, &targets, &Run::new(lives, None), now, &mut touched, &mut turn);
        self.flush(&mut touched);
        if delivered >= targets.len() {
            return;
        }
        let mut rest = PendingRun::new(lives, Some(targets), delivered, now.ms);
        let (Some(front), will) = (self.weak.upgrade(), will.cloned()) else { return };
        tokio::spawn(async move {
            while let Some(targets) = rest.targets() {
                let _lane = front.lanes.enter().await;
                let (mut touched, mut turn) = (Touched::default(), Turn::WHOLE);
                let done = rest.go_on(&front, None, targets, front.now(), &mut touched, &mut turn);
                front.flush(&mut touched);
                if done {
                    break;
                }
            }
            drop(will);
        });
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
                while front.run_timers(front.now(), TIMERS_AT_ONCE) {
                    tokio::task::yield_now().await;
                }
                front.end_stuck_readers().await;
                ticks = ticks.wrapping_add(1);
                if ticks.is_multiple_of(5) {
                    front.pool.trim();
                }
                // The store's go too, under the same lock: nobody retains a new one in between.
                let gone = |topic: &str| front.store.delete_retained(topic);
                front.retained.lock().expire(front.now().ms, EXPIRED_AT_ONCE, gone);
            }
        });
    }

    /// Whether a client that holds nothing would find no room for its largest packet.
    pub(super) fn is_short_of_memory(&self) -> bool {
        self.memory.room(MemoryUse::Incoming, 0) < self.settings.packet_bytes_max
    }

    /// While memory is short: ends connections that read nothing and hold what others want, though nobody publishes to
    /// them any more.
    async fn end_stuck_readers(&self) {
        let mut after: Arc<str> = "".into();
        while self.is_short_of_memory() {
            let page = self.sessions_after(&after, SESSIONS_AT_ONCE);
            let Some(last) = page.last() else { return };
            after = last.client_id.clone();
            let now = self.now();
            page.iter().for_each(|session| session.state.lock().found_no_room(self, now));
            tokio::task::yield_now().await;
        }
    }

    /// Ends sessions and publishes wills whose time has come, at most so many; true if there may be more.
    fn run_timers(&self, now: Now, at_most: usize) -> bool {
        for _ in 0..at_most {
            let client_id = {
                let mut timers = self.timers.lock();
                match timers.first() {
                    Some((at, _)) if *at <= now.ms => timers.pop_first().map(|(_, client_id)| client_id),
                    _ => None,
                }
            };
            let Some(client_id) = client_id else { return false };
            let Some(session) = self.sessions.lock().get(&client_id).cloned() else { continue };
            let mut state = session.state.lock();
            if state.handle.is_some() || state.ended {
                continue;
            }
            let over = state.expires_ms.is_some_and(|at| at <= now.ms);
            let mut will = None;
            if over || state.will_due_ms.is_some_and(|at| at <= now.ms) {
                will = state.will.take();
            }
            if over {
                limited!(info, client = %client_id, "session expired");
                self.end(&session, state);
            } else {
                if will.is_some() {
                    state.will_due_ms = None;
                }
                drop(state);
            }
            if let Some(will) = will {
                self.publish_will(client_id, will);
            }
        }
        true
    }
}

/// Subscriptions removed under one hold of the tree's lock, which publishers need: one of 100 levels takes some 10
/// microseconds.
const UNSUBSCRIBED_AT_ONCE: usize = 16;
/// Sessions looked at before others have their turn.
const SESSIONS_AT_ONCE: usize = 100;
/// Sessions ended before others have their turn.
const TIMERS_AT_ONCE: usize = 16;
/// Retained messages that are looked at each second for whether they have expired.
const EXPIRED_AT_ONCE: usize = 2_000;
