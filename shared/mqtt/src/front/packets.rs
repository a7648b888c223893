//! What the packets of a client mean.

use std::cell::OnceCell;
use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;

use super::connection::{Close, Connection, Held, Reply, Stage};
use super::fanout::{Live, PendingRun, Run, Target, Touched};
use super::session::Will;
use super::stats::add;
use super::{Front, Now};
use crate::codec::{
    self, Connect, Disconnect, Frame, Packet, QoS, Reason, RetainHandling, Split, SubAck, Subscribe, Unsubscribe,
    Version, encode_properties_and_payload, split,
};
use crate::memory::MemoryUse;
use crate::message::{Content, Message, encode_properties};
use crate::session::connect::{is_reserved, negotiate};
use crate::session::inbound::{Answer, PACKET_ID_BYTES};
use crate::store::{Admission, Publish, Refusal, SessionRef, StoredSubscription, Ticket};
use crate::topic::TopicFilter;
use crate::tree::Subscription;

/// A PUBLISH of the buffer that passed the checks of the protocol.
struct Incoming<'a> {
    bytes: &'a [u8],
    /// What was read, and where in it this PUBLISH begins.
    buffer: &'a [u8],
    start: usize,
    publish: codec::Publish<'a>,
    /// Its topic, if it came as an alias.
    alias: Option<Arc<str>>,
}

impl Incoming<'_> {
    fn topic(&self) -> &str {
        self.alias.as_deref().unwrap_or(self.publish.topic)
    }
}

impl Connection {
    /// Processes the packets at the front of `bytes` and returns how many bytes they had. PUBLISHes are gathered
    /// and go to the store together; whatever has to come after them in order makes them go first.
    pub(super) fn process(&mut self, bytes: &[u8], now: Now) -> Result<usize, Close> {
        let mut batch = Vec::new();
        let mut at = 0;
        let end = loop {
            let rest = bytes.get(at..).unwrap_or_default();
            if batch.len() >= BATCH_MESSAGES_MAX
                && let Err(close) = self.offer_batch(&mut batch, now)
            {
                break Err(close);
            }
            if self.turn.is_over() || !self.may_read() {
                self.backlog = !rest.is_empty();
                break Ok(());
            }
            let frame = match split(rest, self.version, self.front.settings.packet_bytes_max) {
                Ok(Split::Frame(frame)) => frame,
                Ok(Split::More { .. }) => break Ok(()),
                Err(error) => break Err(error.into()),
            };
            let work = packet_work(&frame);
            if self.pace.puts_off(&mut self.turn, work) {
                self.backlog = true;
                break Ok(());
            }
            at += frame.bytes.len();
            if let Err(close) = self.packet(&frame, work, bytes, at - frame.bytes.len(), &mut batch, now) {
                break Err(close);
            }
        };
        // What came before the end counts, however it ended.
        let offered = self.offer_batch(&mut batch, now);
        end.and(offered).map(|()| at)
    }

    fn packet<'a>(
        &mut self,
        frame: &Frame<'a>,
        work: usize,
        buffer: &'a [u8],
        start: usize,
        batch: &mut Vec<Incoming<'a>>,
        now: Now,
    ) -> Result<(), Close> {
        let Some(version) = self.version else { return self.first_packet(frame, now) };
        self.turn.add(work);
        if frame.first >> 4 == 3 {
            let publish = codec::Publish::decode(frame, version)?;
            self.turn.add(publish.properties.user.len());
            let incoming = Incoming { bytes: frame.bytes, buffer, start, publish, alias: None };
            return self.publish(incoming, batch, now);
        }
        match Packet::decode(frame, version)? {
            Packet::PubAck(ack) => self.outbound(|outbound, _| outbound.puback(ack.packet_id)),
            Packet::PubRec(ack) => self.outbound(|outbound, out| outbound.pubrec(ack.packet_id, ack.reason, out)),
            Packet::PubComp(ack) => self.outbound(|outbound, _| outbound.pubcomp(ack.packet_id)),
            Packet::PingReq => {
                self.reply.extend_from_slice(&[0xD0, 0]);
                Ok(())
            }
            Packet::PubRel(ack) => {
                self.offer_batch(batch, now)?;
                self.pubrel(ack.packet_id);
                Ok(())
            }
            Packet::Subscribe(subscribe) => {
                self.offer_batch(batch, now)?;
                self.subscribe(&subscribe, version);
                Ok(())
            }
            Packet::Unsubscribe(unsubscribe) => {
                self.offer_batch(batch, now)?;
                self.unsubscribe(&unsubscribe, version)
            }
            Packet::Disconnect(disconnect) => {
                self.offer_batch(batch, now)?;
                Err(self.disconnect(&disconnect))
            }
            Packet::Auth(_) => Err(Close::ours(Reason::PROTOCOL_ERROR, "AUTH without an authentication method")),
            Packet::Connect(_) => Err(Close::ours(Reason::PROTOCOL_ERROR, "a second CONNECT")),
            Packet::ConnAck(_) | Packet::SubAck(_) | Packet::UnsubAck(_) | Packet::PingResp | Packet::Publish(_) => {
                Err(Close::ours(Reason::PROTOCOL_ERROR, "a packet that only a server sends"))
            }
        }
    }

    fn first_packet(&mut self, frame: &Frame<'_>, now: Now) -> Result<(), Close> {
        let Packet::Connect(connect) = Packet::decode(frame, Version::V5)? else {
            return Err(Close::ours(Reason::PROTOCOL_ERROR, "the first packet is not CONNECT"));
        };
        self.version = Some(connect.version);
        // Two hash keys of the system's randomness: a kept session's id must not be guessed, nor given out again after a
        // restart.
        let random = || RandomState::new().build_hasher().finish();
        let assign = || format!("tributary-{:016x}{:016x}", random(), random());
        match negotiate(&connect, &self.front.settings, assign) {
            Err(Reason::BAD_USER_NAME_OR_PASSWORD) => {
                let user = connect.username.unwrap_or_default().as_bytes();
                // Without a delay there are too many failures already, and none of their answers is worth a wait.
                self.login_delay = self.front.throttle.failed(now.instant, user, self.peer.ip());
                if self.login_delay.is_some() {
                    self.refuse_connect(Reason::BAD_USER_NAME_OR_PASSWORD);
                }
                Err(Close::Refused)
            }
            Err(reason) => {
                self.refuse_connect(reason);
                Err(Close::Refused)
            }
            Ok(terms) => {
                let Some(will) = self.front.will(&connect)? else {
                    self.refuse_connect(Reason::QUOTA_EXCEEDED);
                    return Err(Close::Refused);
                };
                self.will = will;
                self.seat.known();
                let claim = self.front.clone().claim(terms.claim(), self.handle.clone());
                self.terms = Some(terms);
                self.stage = Stage::Claiming(Box::pin(claim));
                Ok(())
            }
        }
    }

    fn outbound(
        &mut self,
        act: impl FnOnce(&mut crate::session::outbound::Outbound, &mut Vec<u8>) -> Result<(), codec::CodecError>,
    ) -> Result<(), Close> {
        let Some(session) = &self.session else { return Ok(()) };
        let mut state = session.state.lock();
        act(&mut state.outbound, &mut self.reply)?;
        state.acknowledged(&self.front);
        Ok(())
    }

    /// Checks a PUBLISH against the state of the connection and adds it to the batch.
    fn publish<'a>(
        &mut self,
        mut incoming: Incoming<'a>,
        batch: &mut Vec<Incoming<'a>>,
        now: Now,
    ) -> Result<(), Close> {
        if !incoming.publish.subscription_ids.is_empty() {
            return Err(Close::ours(Reason::PROTOCOL_ERROR, "a subscription identifier from a client"));
        }
        if let Some(alias) = incoming.publish.topic_alias {
            incoming.alias = self.resolve(alias, incoming.publish.topic)?;
        }
        let Some(id) = incoming.publish.packet_id else {
            if is_reserved(incoming.topic()) {
                return self.refuse(&incoming, Reason::TOPIC_NAME_INVALID);
            }
            batch.push(incoming);
            return Ok(());
        };
        if incoming.publish.qos == QoS::ExactlyOnce {
            let same =
                |other: &Incoming<'_>| other.publish.qos == QoS::ExactlyOnce && other.publish.packet_id == Some(id);
            if batch.iter().any(same) {
                self.offer_batch(batch, now)?;
            }
            let known = self.session.as_ref().and_then(|session| session.state.lock().received.repeated(id));
            if let Some((ticket, first)) = known {
                // Known: the message went its way already. PUBREC again, once that is durable (§4.3.3).
                self.offer_batch(batch, now)?;
                if first {
                    self.count_unacked()?;
                }
                self.answers.push(ticket, Answer::PubRec(id, Reason::SUCCESS));
                return Ok(());
            }
        }
        self.count_unacked()?;
        if is_reserved(incoming.topic()) {
            self.offer_batch(batch, now)?;
            return self.refuse(&incoming, Reason::TOPIC_NAME_INVALID);
        }
        batch.push(incoming);
        Ok(())
    }

    fn count_unacked(&mut self) -> Result<(), Close> {
        self.unacked += 1;
        let max = self.front.settings.receive_maximum;
        if self.unacked > usize::from(max) && self.version == Some(Version::V5) {
            return Err(Close::ours(Reason::RECEIVE_MAXIMUM_EXCEEDED, "more PUBLISHes open than the receive maximum"));
        }
        Ok(())
    }

    /// Sets up or looks up a topic alias (§3.3.2.3.4).
    fn resolve(&mut self, alias: u16, topic: &str) -> Result<Option<Arc<str>>, Close> {
        let invalid = || Close::ours(Reason::TOPIC_ALIAS_INVALID, "a topic alias beyond the maximum, or not set up");
        if alias > self.front.settings.topic_alias_max {
            return Err(invalid());
        }
        let at = usize::from(alias) - 1;
        if topic.is_empty() {
            return self.aliases.get(at).cloned().flatten().map(Some).ok_or_else(invalid);
        }
        if self.aliases.len() <= at {
            self.aliases.resize(at + 1, None);
        }
        let room = self.front.memory.room(MemoryUse::Topics, self.memory_bytes());
        if let Some(slot) = self.aliases.get_mut(at)
            && slot.as_deref() != Some(topic)
        {
            let old = slot.as_deref().map_or(0, |old| old.len() + ALIAS_BYTES);
            let bytes = self.topics_bytes - old + topic.len() + ALIAS_BYTES;
            if bytes.saturating_sub(self.topics_bytes) > room {
                add(&self.front.counters.memory_refused_total, 1);
                return Err(Close::ours(Reason::QUOTA_EXCEEDED, "no memory is left for a topic alias"));
            }
            *slot = Some(topic.into());
            self.count_topics(bytes);
        }
        Ok(None)
    }

    /// Answers a PUBLISH that is not taken: neither stored nor retained nor delivered.
    fn refuse(&mut self, incoming: &Incoming<'_>, reason: Reason) -> Result<(), Close> {
        add(&self.front.counters.refused_total, 1);
        match (incoming.publish.packet_id, self.version) {
            // QoS 0 has no answer to say it with.
            (None, _) => {}
            (Some(_), Some(Version::V4)) => {
                return Err(Close::ours(reason, "a PUBLISH was refused, which MQTT 3.1.1 cannot say otherwise"));
            }
            (Some(id), _) if incoming.publish.qos == QoS::ExactlyOnce => {
                self.answers.push(Ticket::default(), Answer::PubRec(id, reason));
            }
            (Some(id), _) => self.answers.push(Ticket::default(), Answer::PubAck(id, reason)),
        }
        Ok(())
    }

    /// Offers the batch to the store and does what it decides.
    fn offer_batch(&mut self, batch: &mut Vec<Incoming<'_>>, now: Now) -> Result<(), Close> {
        if batch.is_empty() {
            return Ok(());
        }
        let batch = std::mem::take(batch);
        add(&self.front.counters.received_messages_total, batch.len());
        add(&self.front.counters.received_bytes_total, batch.iter().map(|incoming| incoming.bytes.len()).sum());
        if !self.held.is_empty() {
            self.hold(&batch, now);
            return Ok(());
        }
        self.offer(&batch, now)
    }

    /// Offers held PUBLISHes again.
    pub(super) fn offer_held(&mut self, now: Now) -> Result<(), Close> {
        let Some(version) = self.version else { return Ok(()) };
        let held = std::mem::take(&mut self.held);
        self.held_bytes = 0;
        let mut batch = Vec::with_capacity(held.len());
        for item in &held {
            // The bytes were read once already: they are a PUBLISH.
            if let Ok(Split::Frame(frame)) = split(&item.frame, Some(version), usize::MAX) {
                let publish = codec::Publish::decode(&frame, version)?;
                let alias = item.topic.clone();
                batch.push(Incoming { bytes: frame.bytes, buffer: frame.bytes, start: 0, publish, alias });
            }
        }
        let since = self.held_since;
        let offered = self.offer(&batch, now);
        if self.held.len() == batch.len() {
            self.held_since = since; // Nothing went in: the clock goes on.
        }
        offered
    }

    fn hold(&mut self, batch: &[Incoming<'_>], now: Now) {
        if self.held.is_empty() {
            self.held_since = now.instant;
        }
        for incoming in batch {
            self.held_bytes += incoming.bytes.len();
            let topic = incoming.publish.topic_alias.map(|_| Arc::from(incoming.topic()));
            self.held.push_back(Held { frame: incoming.bytes.into(), topic });
        }
        if self.room.is_none() {
            self.room = Some(self.front.store.room());
            self.again(now);
        }
    }

    fn offer(&mut self, batch: &[Incoming<'_>], now: Now) -> Result<(), Close> {
        let mut rest = batch;
        while !rest.is_empty() {
            let retains = rest.iter().any(|incoming| incoming.publish.retain);
            let fit = if retains { self.fit_retained(rest) } else { rest.len() };
            let fit = fit.min(self.fit_packet_ids(rest));
            let (now_rest, later) = rest.split_at(fit);
            let taken = self.offer_fitting(now_rest, retains, now)?;
            if taken < now_rest.len() {
                self.hold(rest.get(taken..).unwrap_or_default(), now);
                return Ok(());
            }
            let Some((first, later)) = later.split_first() else { return Ok(()) };
            self.refuse(first, Reason::QUOTA_EXCEEDED)?;
            rest = later;
        }
        Ok(())
    }

    /// How many PUBLISHes come before one whose packet id there is no memory to remember until its PUBREL.
    fn fit_packet_ids(&self, batch: &[Incoming<'_>]) -> usize {
        let exactly_once = |incoming: &Incoming<'_>| incoming.publish.qos == QoS::ExactlyOnce;
        if !batch.iter().any(exactly_once) {
            return batch.len();
        }
        let room = self.session.as_ref().map_or(0, |session| session.state.lock().queue_room(&self.front));
        let ids = room / PACKET_ID_BYTES;
        let too_many = batch.iter().enumerate().filter(|(_, incoming)| exactly_once(incoming)).nth(ids);
        too_many.map_or(batch.len(), |(at, _)| at)
    }

    /// How many PUBLISHes come before one whose message there is no room to retain.
    fn fit_retained(&self, batch: &[Incoming<'_>]) -> usize {
        let settings = &self.front.settings;
        let retained = self.front.retained.lock();
        let too_much = |incoming: &Incoming<'_>| {
            incoming.publish.retain
                && !incoming.publish.payload.is_empty()
                && !retained.has_room(
                    incoming.topic(),
                    incoming.bytes.len(),
                    settings.retained_messages_max,
                    settings.retained_bytes_max,
                )
        };
        batch.iter().position(too_much).unwrap_or(batch.len())
    }

    /// One call of the store, then answers and delivery. Returns how many were taken or refused; the next one is held.
    fn offer_fitting(&mut self, batch: &[Incoming<'_>], retains: bool, now: Now) -> Result<usize, Close> {
        let (Some(session), Some(version)) = (self.session.clone(), self.version) else { return Ok(batch.len()) };
        if batch.is_empty() {
            return Ok(0);
        }
        let publishes: Vec<Publish<'_>> = batch
            .iter()
            .map(|incoming| Publish {
                topic: incoming.topic(),
                payload: incoming.publish.payload,
                qos: incoming.publish.qos as u8,
                retain: incoming.publish.retain,
                packet_id: incoming.publish.packet_id,
                now_ms: now.wall_ms,
                properties: incoming.publish.properties.clone(),
            })
            .collect();
        let kept = self.terms.as_ref().is_some_and(|terms| terms.session_expiry_secs > 0);
        let session_ref = SessionRef { client_id: &session.client_id, kept };
        let mut admissions = Vec::with_capacity(batch.len());
        let front = self.front.clone();
        let mut delivery = Delivery::new(&front, version, now);
        {
            // Held over both, so that what is retained here and in the store is in the same order.
            let mut retained = retains.then(|| front.retained.lock());
            front.store.publish(&session_ref, &publishes, &mut admissions);
            admissions.truncate(batch.len());
            for (incoming, admission) in batch.iter().zip(&admissions) {
                if let (Some(retained), false) = (&mut retained, matches!(admission, Admission::Refused(_)))
                    && incoming.publish.retain
                {
                    if incoming.publish.payload.is_empty() {
                        retained.remove(incoming.topic());
                    } else if let Some(message) = remember(incoming, now) {
                        retained.set(incoming.topic(), message);
                    }
                }
            }
        }
        if batch.iter().any(|incoming| incoming.publish.qos == QoS::ExactlyOnce) {
            let mut state = session.state.lock();
            for (incoming, admission) in batch.iter().zip(&admissions) {
                let ticket = match admission {
                    Admission::Stored(ticket) => *ticket,
                    Admission::NotStored => Ticket::default(),
                    Admission::Refused(_) => continue,
                };
                if let (QoS::ExactlyOnce, Some(id)) = (incoming.publish.qos, incoming.publish.packet_id) {
                    state.received.insert(id, ticket);
                }
            }
            state.count_bytes(&front);
        }
        let mut result = Ok(admissions.len());
        for (incoming, admission) in batch.iter().zip(&admissions) {
            let ticket = match admission {
                Admission::Stored(ticket) => *ticket,
                Admission::NotStored => Ticket::default(),
                Admission::Refused(refusal) => {
                    delivery.skip();
                    let reason = match refusal {
                        Refusal::QuotaExceeded => Reason::QUOTA_EXCEEDED,
                        Refusal::TooLarge => Reason::IMPLEMENTATION_SPECIFIC_ERROR,
                        Refusal::Unavailable => {
                            result = Err(Close::ours(Reason::IMPLEMENTATION_SPECIFIC_ERROR, "storage failed"));
                            break;
                        }
                    };
                    if let Err(close) = self.refuse(incoming, reason) {
                        result = Err(close);
                        break;
                    }
                    continue;
                }
            };
            match (incoming.publish.qos, incoming.publish.packet_id) {
                (QoS::AtLeastOnce, Some(id)) => self.answers.push(ticket, Answer::PubAck(id, Reason::SUCCESS)),
                (QoS::ExactlyOnce, Some(id)) => self.answers.push(ticket, Answer::PubRec(id, Reason::SUCCESS)),
                _ => {}
            }
            delivery.add(incoming);
        }
        delivery.go(self);
        result
    }

    /// The subscribers of a topic, remembered for the next messages.
    pub(super) fn targets_of(&mut self, topic: &str) -> Arc<[Target]> {
        let generation = self.front.generation.load(std::sync::atomic::Ordering::Acquire);
        if let Some(at) = self.targets.iter().position(|(name, ..)| **name == *topic)
            && let Some((_, known, targets)) = self.targets.get_mut(at)
        {
            if *known == generation {
                return targets.clone();
            }
            // Subscriptions changed: asked again below.
            let (topic, _, targets) = self.targets.remove(at);
            self.count_topics(self.topics_bytes - route_bytes(&topic, &targets));
        }
        let (targets, generation, steps) = self.front.targets(topic);
        self.turn.add(steps);
        let mut bytes = self.topics_bytes + route_bytes(topic, &targets);
        if self.targets.len() >= TARGETS_REMEMBERED {
            let (topic, _, targets) = self.targets.remove(0);
            bytes -= route_bytes(&topic, &targets);
        }
        if bytes.saturating_sub(self.topics_bytes) <= self.front.memory.room(MemoryUse::Topics, self.memory_bytes()) {
            self.targets.push((topic.into(), generation, targets.clone()));
        } else {
            bytes -= route_bytes(topic, &targets); // No room to remember them: they are looked up each time.
        }
        self.count_topics(bytes);
        targets
    }

    pub(super) fn count_topics(&mut self, bytes: usize) {
        self.topics_bytes = bytes;
        self.front.memory.recount(MemoryUse::Topics, &mut self.counted_topics, bytes);
    }

    /// Goes on with what is to be delivered to many subscribers, for a while.
    pub(super) fn deliver_pending(&mut self, now: Now) {
        let (front, from) = (self.front.clone(), self.session.clone());
        let mut touched = Touched::default();
        while !self.turn.is_over()
            && let Some(mut run) = self.pending.pop_front()
        {
            let targets = match run.targets() {
                Some(targets) => targets,
                None => self.targets_of(run.topic()),
            };
            let bytes = run.bytes();
            if run.go_on(&front, from.as_ref(), targets, now, &mut touched, &mut self.turn) {
                self.pending_bytes -= bytes;
            } else {
                self.pending.push_front(run);
            }
        }
        front.flush(&mut touched);
        self.pause_for(touched, now);
    }

    fn pause_for(&mut self, touched: Touched, now: Now) {
        if touched.congested.is_empty() {
            return;
        }
        if self.congested.is_empty() {
            self.congested_until = now.instant + self.front.settings.slow_subscriber_wait;
        }
        self.congested.extend(touched.congested);
    }

    fn pubrel(&mut self, id: u16) {
        let Some(session) = self.session.clone() else { return };
        let mut state = session.state.lock();
        let (ticket, reason) = match state.received.release(id) {
            None => (Ticket::default(), Reason::PACKET_IDENTIFIER_NOT_FOUND),
            Some(counted) => {
                state.count_bytes(&self.front);
                self.unacked = self.unacked.saturating_sub(usize::from(counted));
                let ticket =
                    if state.stored { self.front.store.release(&session.client_id, id) } else { Ticket::default() };
                (ticket, Reason::SUCCESS)
            }
        };
        drop(state);
        self.answers.push(ticket, Answer::PubComp(id, reason));
    }

    fn subscribe(&mut self, subscribe: &Subscribe<'_>, version: Version) {
        let Some(session) = self.session.clone() else { return };
        let identifier = subscribe.properties.subscription_id;
        let front = self.front.clone();
        let mut state = session.state.lock();
        let mut ticket = Ticket::default();
        let mut retained: Vec<Arc<str>> = Vec::new();
        // What a filter is given when it is there more than once, the last time counts for.
        let mut last: HashMap<&str, (usize, Reason)> = HashMap::new();
        let count = subscribe.filters.len().min(FILTERS_PER_PACKET_MAX);
        let filters = subscribe.filters.get(..count).unwrap_or_default();
        for (i, &(text, _)) in filters.iter().enumerate() {
            last.insert(text, (i, Reason::SUCCESS));
        }
        for (i, &(text, options)) in filters.iter().enumerate() {
            let Some((_, reason)) = last.get_mut(text).filter(|(at, _)| *at == i) else { continue };
            let filter = match TopicFilter::parse(text) {
                Ok(filter) if filter.share().is_some() => {
                    *reason = Reason::SHARED_SUBSCRIPTIONS_NOT_SUPPORTED;
                    continue;
                }
                Ok(filter) => filter,
                Err(_) => {
                    *reason = Reason::TOPIC_FILTER_INVALID;
                    continue;
                }
            };
            let known = state.subscriptions.contains_key(text);
            if !known && state.subscriptions.len() >= front.settings.subscriptions_max {
                *reason = Reason::QUOTA_EXCEEDED;
                continue;
            }
            if !known && !state.has_room_for_filter(text.len(), &front) {
                add(&front.counters.memory_refused_total, 1);
                *reason = Reason::QUOTA_EXCEEDED;
                continue;
            }
            if state.stored {
                let stored = StoredSubscription { filter: text.to_owned(), options: options.byte(), identifier };
                match front.store.save_subscription(&session.client_id, &stored) {
                    Ok(saved) => ticket = ticket.max(saved),
                    Err(refusal) => {
                        *reason = refusal.reason();
                        continue;
                    }
                }
            }
            front.subscribe(&session, &mut state, &filter, Subscription { options, identifier });
            let send = match options.retain_handling {
                RetainHandling::Send => true,
                RetainHandling::SendIfNew => !known,
                RetainHandling::DoNotSend => false,
            };
            if send && let Some((filter, _)) = state.subscriptions.get_key_value(text) {
                // The session's own copy: a SUBACK may wait, and another thousand behind it.
                retained.push(filter.clone());
            }
        }
        // Read after the subscriptions are in the tree: what is retained from here on comes live.
        let upto = front.retained.lock().newest();
        let mut reasons: Vec<Reason> = filters
            .iter()
            .map(|(text, options)| match last.get(text) {
                Some((_, reason)) if reason.is_error() => *reason,
                _ => Reason(options.qos as u8),
            })
            .collect();
        reasons.resize(subscribe.filters.len(), Reason::QUOTA_EXCEEDED);
        if version == Version::V4 {
            reasons.iter_mut().filter(|reason| reason.is_error()).for_each(|reason| *reason = Reason(0x80));
        }
        let ack = Packet::SubAck(SubAck { packet_id: subscribe.packet_id, properties: None, reasons });
        if ticket == Ticket::default() && self.answers.is_empty() {
            // Nothing to wait for: SUBACK goes before anything the new subscription brings. The standard allows either,
            // simple clients expect this.
            let mut bytes = std::mem::take(&mut self.reply);
            encode(&ack, version, &mut bytes);
            state.back(&front).extend_from_slice(&bytes);
            retained.iter().for_each(|filter| state.start_retained(filter, upto));
        } else {
            drop(state);
            let mut bytes = Vec::new();
            encode(&ack, version, &mut bytes);
            self.answers.push(ticket, Answer::Other(Reply::SubAck { bytes, retained, upto }));
        }
    }

    fn unsubscribe(&mut self, unsubscribe: &Unsubscribe<'_>, version: Version) -> Result<(), Close> {
        let Some(session) = self.session.clone() else { return Ok(()) };
        if unsubscribe.filters.len() > FILTERS_PER_PACKET_MAX {
            // A 3.1.1 UNSUBACK cannot say that some were not done, and no session has so many.
            let why = format!(
                "an UNSUBSCRIBE of {} topic filters: at most {FILTERS_PER_PACKET_MAX} are taken, send several packets",
                unsubscribe.filters.len()
            );
            return Err(Close::ours(Reason::QUOTA_EXCEEDED, why));
        }
        let mut state = session.state.lock();
        let mut ticket = Ticket::default();
        let mut reasons = Vec::with_capacity(unsubscribe.filters.len());
        for text in &unsubscribe.filters {
            reasons.push(match TopicFilter::parse(text) {
                Err(_) => Reason::TOPIC_FILTER_INVALID,
                Ok(filter) if filter.share().is_some() => Reason::NO_SUBSCRIPTION_EXISTED,
                Ok(filter) if self.front.unsubscribe(&session, &mut state, &filter) => {
                    if state.stored {
                        ticket = ticket.max(self.front.store.delete_subscription(&session.client_id, text));
                    }
                    Reason::SUCCESS
                }
                Ok(_) => Reason::NO_SUBSCRIPTION_EXISTED,
            });
        }
        if version == Version::V4 {
            reasons.clear();
        }
        drop(state);
        let mut bytes = Vec::new();
        let ack = SubAck { packet_id: unsubscribe.packet_id, properties: None, reasons };
        encode(&Packet::UnsubAck(ack), version, &mut bytes);
        self.answers.push(ticket, Answer::Other(Reply::Bytes(bytes)));
        Ok(())
    }

    fn disconnect(&mut self, disconnect: &Disconnect<'_>) -> Close {
        let asked = disconnect.properties.as_ref().and_then(|properties| properties.session_expiry_secs);
        if let (Some(asked), Some(session)) = (asked, &self.session) {
            let mut state = session.state.lock();
            if state.expiry_secs == 0 && asked > 0 {
                // §3.14.2.2.2
                return Close::ours(Reason::PROTOCOL_ERROR, "DISCONNECT extends a session that was to end with it");
            }
            state.expiry_secs = asked.min(self.front.settings.session_expiry_secs_max);
        }
        Close::Client { will: disconnect.reason != Reason::SUCCESS }
    }
}

/// Topics whose subscribers a connection remembers.
const TARGETS_REMEMBERED: usize = 8;
/// PUBLISHes that go to the store together.
const BATCH_MESSAGES_MAX: usize = 1024;
/// Topic filters of one SUBSCRIBE; those beyond are refused (0x97). An UNSUBSCRIBE of more ends the connection (0x97).
const FILTERS_PER_PACKET_MAX: usize = 1024;
/// What a topic alias costs besides the topic.
const ALIAS_BYTES: usize = 48;

/// What it costs to remember the subscribers of a topic.
fn route_bytes(topic: &str, targets: &[Target]) -> usize {
    64 + topic.len() + size_of_val(targets) + targets.iter().map(Target::subscription_ids_bytes).sum::<usize>()
}

fn encode(packet: &Packet<'_>, version: Version, out: &mut Vec<u8>) {
    let encoded = packet.encode(version, out);
    debug_assert_eq!(encoded, Ok(()), "an acknowledgement is as long as the packet it answers, at most");
}

impl Front {
    /// The will of a CONNECT. `None`: there is one, and the memory budget has no room for it.
    fn will(&self, connect: &Connect<'_>) -> Result<Option<Option<Will>>, Close> {
        let Some(will) = &connect.will else { return Ok(Some(None)) };
        let mut properties_and_payload = Vec::new();
        encode_properties_and_payload(&will.properties, will.payload, &mut properties_and_payload)
            .map_err(|error| Close::ours(Reason::PROTOCOL_ERROR, error.to_string()))?;
        properties_and_payload.shrink_to_fit();
        let bytes = size_of::<Will>() + will.topic.len() + properties_and_payload.len();
        let Some(permit) = self.memory.take(MemoryUse::Wills, 0, bytes) else {
            add(&self.counters.memory_refused_total, 1);
            return Ok(None);
        };
        Ok(Some(Some(Will {
            topic: will.topic.to_owned(),
            properties_and_payload,
            qos: will.qos as u8,
            retain: will.retain,
            delay_secs: will.delay_secs,
            permit,
        })))
    }
}

fn remember(incoming: &Incoming<'_>, now: Now) -> Option<Arc<Message>> {
    let mut properties = Vec::new();
    let expiry_at = encode_properties(&incoming.publish.properties, &mut properties).ok()?;
    let content = Content {
        topic: incoming.topic().as_bytes(),
        properties: &properties,
        expiry_at,
        payload: incoming.publish.payload,
    };
    let expiry_secs = incoming.publish.properties.expiry_secs;
    Some(Arc::new(Message::new(&content, expiry_secs, incoming.publish.qos, now.ms)))
}

/// What of a batch goes to subscribers.
struct Delivery<'a, 'b> {
    front: &'a Arc<Front>,
    version: Version,
    now: Now,
    items: Vec<Option<&'b Incoming<'b>>>,
}

impl<'a, 'b> Delivery<'a, 'b> {
    fn new(front: &'a Arc<Front>, version: Version, now: Now) -> Self {
        Self { front, version, now, items: Vec::new() }
    }

    fn add(&mut self, incoming: &'b Incoming<'b>) {
        self.items.push(Some(incoming));
    }

    /// A refused one ends a run: its bytes stand between its neighbours'.
    fn skip(&mut self) {
        self.items.push(None);
    }

    fn go(self, connection: &mut Connection) {
        if self.front.tree.read().is_empty() {
            return;
        }
        // Properties of all, encoded, in one piece of memory; most messages have none.
        let mut arena = Vec::new();
        let mut properties = Vec::with_capacity(self.items.len());
        for incoming in self.items.iter().flatten() {
            let start = arena.len();
            let own = &incoming.publish.properties;
            let expiry_at = if own.is_empty() { None } else { encode_properties(own, &mut arena).unwrap_or_default() };
            properties.push((start, arena.len(), expiry_at));
        }
        let mut properties = properties.into_iter();
        let from = connection.session.clone();
        let mut touched = Touched::default();
        let mut lives = Vec::with_capacity(self.items.len());
        for run in self.items.chunk_by(|a, b| match (a, b) {
            (Some(a), Some(b)) => a.topic() == b.topic(),
            _ => false,
        }) {
            let Some(Some(first)) = run.first() else { continue };
            // Behind what is delivered in several polls, all is: in order.
            let later = !connection.pending.is_empty() || connection.turn.is_over();
            let targets = if later { None } else { Some(connection.targets_of(first.topic())) };
            lives.clear();
            for incoming in run.iter().flatten() {
                let (start, end, expiry_at) = properties.next().unwrap_or_default();
                lives.push(Live {
                    content: Content {
                        topic: incoming.topic().as_bytes(),
                        properties: arena.get(start..end).unwrap_or_default(),
                        expiry_at,
                        payload: incoming.publish.payload,
                    },
                    expiry_secs: incoming.publish.properties.expiry_secs,
                    qos: incoming.publish.qos,
                    retain: incoming.publish.retain,
                    message: OnceCell::new(),
                });
            }
            let delivered = match &targets {
                None => 0,
                Some(targets) if targets.is_empty() => continue,
                Some(targets) => {
                    let raw = raw_bytes(run, self.version).map(|bytes| (self.version, bytes));
                    let run = Run::new(&lives, raw);
                    let turn = &mut connection.turn;
                    let count = self.front.deliver_some(from.as_ref(), targets, &run, self.now, &mut touched, turn);
                    if count >= targets.len() {
                        continue;
                    }
                    count
                }
            };
            let pending = PendingRun::new(&lives, targets, delivered, self.now.ms);
            connection.pending_bytes += pending.bytes();
            connection.pending.push_back(pending);
        }
        self.front.flush(&mut touched);
        connection.pause_for(touched, self.now);
    }
}

/// What a packet costs by itself, in units of a turn.
fn packet_work(frame: &Frame<'_>) -> usize {
    let bytes = frame.bytes.len();
    match frame.first >> 4 {
        3 => 1 + bytes / 1024,
        // Each level is a node of the tree.
        8 | 10 => 1 + bytes / 2,
        _ => 1 + bytes / 16,
    }
}

/// The run's own bytes, if a subscriber with QoS 0 gets exactly these and they stand side by side.
fn raw_bytes<'a>(run: &[Option<&Incoming<'a>>], version: Version) -> Option<&'a [u8]> {
    let mut end = None;
    for incoming in run.iter().flatten() {
        let publish = &incoming.publish;
        let plain = publish.qos == QoS::AtMostOnce
            && !publish.retain
            && (version == Version::V4 || (publish.topic_alias.is_none() && publish.properties.is_empty()));
        if !plain || end.is_some_and(|end| end != incoming.start) {
            return None;
        }
        end = Some(incoming.start + incoming.bytes.len());
    }
    let first = run.first().copied().flatten()?;
    first.buffer.get(first.start..end?)
}
