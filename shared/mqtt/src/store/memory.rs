//! A store that forgets: for tests, which decide when a ticket becomes durable and what has no room, and for measuring
//! the front alone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use parking_lot::Mutex;
use shared::log::BoxFuture;
use tokio::sync::Notify;

use super::*;
use crate::codec::encode_properties_and_payload;

/// Keeps everything in memory.
#[derive(Clone)]
pub struct MemoryStore {
    shared: Arc<Shared>,
}

/// What a [`MemoryStore`] does with a PUBLISH.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// On no stream.
    NotStored,
    /// Stored, and counted in [`MemoryStore::published`].
    Store,
    /// No room.
    Hold,
    /// Never.
    Refuse(Refusal),
}

/// One stored PUBLISH: client, topic, payload, QoS.
pub type Published = (String, String, Vec<u8>, u8);

struct Shared {
    state: Mutex<State>,
    durable: Notify,
    room: Notify,
}

struct State {
    newest: u64,
    durable: u64,
    /// Tickets are durable as soon as they are given out.
    at_once: bool,
    failed: Option<String>,
    /// Tickets that found no room.
    refused: BTreeSet<u64>,
    sessions_full: bool,
    verdict: Box<dyn FnMut(&str) -> Verdict + Send>,
    published: Vec<Published>,
    sessions: BTreeMap<String, StoredSession>,
    retained: BTreeMap<String, StoredRetained>,
}

impl State {
    fn durable(&self, ticket: Ticket) -> Result<bool, StoreFailed> {
        match &self.failed {
            Some(why) => Err(StoreFailed(why.clone())),
            None if self.refused.contains(&ticket.commit) => Err(StoreFailed("no room".to_owned())),
            None => Ok(self.durable >= ticket.commit),
        }
    }

    fn ticket(&mut self) -> Ticket {
        self.newest += 1;
        if self.at_once {
            self.durable = self.newest;
        }
        Ticket::of(self.newest)
    }
}

impl MemoryStore {
    /// A store whose tickets become durable with [`Self::commit`] only, and that decides by topic.
    pub fn manual(verdict: impl FnMut(&str) -> Verdict + Send + 'static) -> Self {
        let state = State {
            newest: 0,
            durable: 0,
            at_once: false,
            failed: None,
            refused: BTreeSet::new(),
            sessions_full: false,
            verdict: Box::new(verdict),
            published: Vec::new(),
            sessions: BTreeMap::new(),
            retained: BTreeMap::new(),
        };
        Self { shared: Arc::new(Shared { state: Mutex::new(state), durable: Notify::new(), room: Notify::new() }) }
    }

    /// A store where everything is durable at once.
    pub fn at_once(verdict: impl FnMut(&str) -> Verdict + Send + 'static) -> Self {
        let store = Self::manual(verdict);
        store.shared.state.lock().at_once = true;
        store
    }

    /// Makes tickets up to `ticket` durable.
    pub fn commit_to(&self, ticket: u64) {
        let mut state = self.shared.state.lock();
        state.durable = state.durable.max(ticket.min(state.newest));
        drop(state);
        self.shared.durable.notify_waiters();
    }

    /// Makes all tickets durable.
    pub fn commit(&self) {
        self.commit_to(u64::MAX);
    }

    /// Makes all tickets durable, and those to come at once.
    pub fn commit_always(&self) {
        self.shared.state.lock().at_once = true;
        self.commit();
    }

    /// Nothing that comes becomes durable by itself any more.
    pub fn commit_never(&self) {
        self.shared.state.lock().at_once = false;
    }

    /// Fails every wait.
    pub fn fail(&self, why: &str) {
        self.shared.state.lock().failed = Some(why.to_owned());
        self.shared.durable.notify_waiters();
    }

    /// Fails one ticket, as if its commit had found no room for it, and makes all others up to it durable.
    pub fn refuse_ticket(&self, ticket: u64) {
        self.shared.state.lock().refused.insert(ticket);
        self.commit_to(ticket);
    }

    /// From now on there is, or is no, room for more sessions and subscriptions.
    pub fn set_sessions_full(&self, full: bool) {
        self.shared.state.lock().sessions_full = full;
    }

    /// A kept session, as it is stored.
    pub fn session(&self, client_id: &str) -> Option<StoredSession> {
        self.shared.state.lock().sessions.get(client_id).cloned()
    }

    /// Decides differently from now on, and says that there may be room.
    pub fn set_verdict(&self, verdict: impl FnMut(&str) -> Verdict + Send + 'static) {
        self.shared.state.lock().verdict = Box::new(verdict);
        self.shared.room.notify_waiters();
    }

    /// What was stored.
    pub fn published(&self) -> Vec<Published> {
        self.shared.state.lock().published.clone()
    }

    /// How many tickets were given out.
    pub fn tickets(&self) -> u64 {
        self.shared.state.lock().newest
    }
}

impl Store for MemoryStore {
    fn publish(&self, session: &SessionRef<'_>, publishes: &[Publish<'_>], admissions: &mut Vec<Admission>) {
        let mut state = self.shared.state.lock();
        for publish in publishes {
            let verdict = (state.verdict)(publish.topic);
            match verdict {
                Verdict::Hold => return,
                Verdict::Refuse(refusal) => {
                    admissions.push(Admission::Refused(refusal));
                    continue;
                }
                Verdict::NotStored | Verdict::Store => {}
            }
            let mut stored = verdict == Verdict::Store;
            if stored {
                let (client, topic) = (session.client_id.to_owned(), publish.topic.to_owned());
                state.published.push((client, topic, publish.payload.to_vec(), publish.qos));
            }
            if publish.retain {
                stored = true;
                let mut value = Vec::new();
                if publish.payload.is_empty() {
                    state.retained.remove(publish.topic);
                } else if encode_properties_and_payload(&publish.properties, publish.payload, &mut value).is_ok() {
                    let retained = StoredRetained {
                        topic: publish.topic.to_owned(),
                        properties_and_payload: value,
                        qos: publish.qos,
                        stored_ms: publish.now_ms,
                    };
                    state.retained.insert(publish.topic.to_owned(), retained);
                }
            }
            if let (2, true, Some(id)) = (publish.qos, session.kept, publish.packet_id) {
                stored = true;
                if let Some(session) = state.sessions.get_mut(session.client_id) {
                    session.inbound_packet_ids.push(id);
                }
            }
            admissions.push(if stored { Admission::Stored(state.ticket()) } else { Admission::NotStored });
        }
    }

    fn room(&self) -> BoxFuture<'static, ()> {
        let shared = self.shared.clone();
        Box::pin(async move { shared.room.notified().await })
    }

    fn release(&self, client_id: &str, packet_id: u16) -> Ticket {
        let mut state = self.shared.state.lock();
        if let Some(session) = state.sessions.get_mut(client_id) {
            session.inbound_packet_ids.retain(|&id| id != packet_id);
        }
        state.ticket()
    }

    fn durable(&self, ticket: Ticket) -> Result<bool, StoreFailed> {
        self.shared.state.lock().durable(ticket)
    }

    fn wait(&self, ticket: Ticket) -> BoxFuture<'static, Result<(), StoreFailed>> {
        let shared = self.shared.clone();
        Box::pin(async move {
            loop {
                let changed = shared.durable.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if shared.state.lock().durable(ticket)? {
                    return Ok(());
                }
                changed.await;
            }
        })
    }

    fn load_sessions(&self) -> Result<Vec<StoredSession>, StoreFailed> {
        Ok(self.shared.state.lock().sessions.values().cloned().collect())
    }

    fn load_retained(&self) -> Result<Vec<StoredRetained>, StoreFailed> {
        Ok(self.shared.state.lock().retained.values().cloned().collect())
    }

    fn delete_retained(&self, topic: &str) {
        self.shared.state.lock().retained.remove(topic);
    }

    fn save_session(&self, session: &StoredSession) -> Result<Ticket, Refusal> {
        let mut state = self.shared.state.lock();
        let (subscriptions, inbound_packet_ids) = match state.sessions.remove(&session.client_id) {
            Some(old) => (old.subscriptions, old.inbound_packet_ids),
            None if state.sessions_full => return Err(Refusal::QuotaExceeded),
            None => Default::default(),
        };
        let session = StoredSession { subscriptions, inbound_packet_ids, ..session.clone() };
        state.sessions.insert(session.client_id.clone(), session);
        Ok(state.ticket())
    }

    fn save_subscription(&self, client_id: &str, subscription: &StoredSubscription) -> Result<Ticket, Refusal> {
        let mut state = self.shared.state.lock();
        if state.sessions_full {
            return Err(Refusal::QuotaExceeded);
        }
        if let Some(session) = state.sessions.get_mut(client_id) {
            session.subscriptions.retain(|one| one.filter != subscription.filter);
            session.subscriptions.push(subscription.clone());
        }
        Ok(state.ticket())
    }

    fn delete_subscription(&self, client_id: &str, filter: &str) -> Ticket {
        let mut state = self.shared.state.lock();
        if let Some(session) = state.sessions.get_mut(client_id) {
            session.subscriptions.retain(|one| one.filter != filter);
        }
        state.ticket()
    }

    fn delete_session(&self, client_id: &str) -> Ticket {
        let mut state = self.shared.state.lock();
        state.sessions.remove(client_id);
        state.ticket()
    }
}
