//! Towards the subscriber: the window of PUBLISHes with QoS 1 and 2 that are on their way, and the queue behind it.

use std::collections::VecDeque;
use std::sync::Arc;

use super::inbound::put_ack;
use crate::codec::{CodecError, QoS, Reason, Version};
use crate::message::{Content, Envelope, Message};

/// Bounds of one session's queue, and of what may wait for its socket.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    pub queue_messages_max: usize,
    pub queue_bytes_max: usize,
    /// No new PUBLISH is written while more waits for the socket.
    pub out_bytes_max: usize,
    /// Bytes of the memory budget that may still be written for the socket.
    pub room: usize,
    /// Bytes of the memory budget that may still be queued.
    pub queue_room: usize,
}

/// What became of one message for one subscriber.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Delivered {
    Sent,
    Queued,
    /// The queue is full: the newest is dropped.
    QueueFull,
    /// The subscriber does not take packets of this size (§3.1.2.11.4).
    TooLarge,
}

/// QoS 1 and 2 towards one session. Packet ids are given out in sequence, so the PUBLISHes on their way are a queue whose
/// first one has `first_id`: finding one by its id needs no search, and sending again goes by the queue's order.
#[derive(Debug)]
pub(crate) struct Outbound {
    version: Version,
    window: usize,
    packet_bytes_max: usize,
    /// Messages must be remembered until they are acknowledged, to be sent again on the next connection.
    kept: bool,
    slots: VecDeque<Slot>,
    first_id: u16,
    /// PUBLISHes sent on this connection that are not done: what the client's receive maximum counts (§4.9).
    sent: usize,
    /// The next slot to send again after a reconnect; at or past the end: none.
    resend_at: usize,
    queue: VecDeque<Queued>,
    /// Bytes of `queue`, and of `slots` where they hold a message.
    bytes: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    AwaitsPubAck,
    AwaitsPubRec,
    AwaitsPubComp,
    Done,
}

#[derive(Debug)]
struct Slot {
    state: State,
    /// It counts in [`Outbound::sent`].
    sent: bool,
    message: Option<Queued>,
}

#[derive(Debug, Clone)]
struct Queued {
    message: Arc<Message>,
    qos: QoS,
    retain: bool,
    subscription_ids: Box<[u32]>,
}

/// Most ids between the first slot and the next, which may be two windows: one that is never acknowledged stops the sending
/// there, long before an id could be used twice.
const SPAN_MAX: usize = 16_384;

impl Outbound {
    pub fn new() -> Self {
        Self {
            version: Version::V4,
            window: 1,
            packet_bytes_max: usize::MAX,
            kept: false,
            slots: VecDeque::new(),
            first_id: 1,
            sent: 0,
            resend_at: 0,
            queue: VecDeque::new(),
            bytes: 0,
        }
    }

    /// A connection begins: its terms, and all that is open will be sent again by [`Self::fill`].
    pub fn connected(&mut self, version: Version, window: u16, packet_bytes_max: usize, kept: bool) {
        self.version = version;
        self.window = window.into();
        self.packet_bytes_max = packet_bytes_max;
        self.kept = kept;
        self.resend_at = 0;
        self.sent = 0;
        self.slots.iter_mut().for_each(|slot| slot.sent = false);
    }

    pub fn version(&self) -> Version {
        self.version
    }

    pub fn packet_bytes_max(&self) -> usize {
        self.packet_bytes_max
    }

    pub fn queue_len(&self) -> usize {
        self.queue.len()
    }

    /// Messages queued or on their way.
    pub fn messages(&self) -> usize {
        self.queue.len() + self.slots.iter().filter(|slot| slot.state != State::Done).count()
    }

    /// Bytes that are remembered.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Bytes of what is remembered of messages on their way, besides the messages.
    pub fn slots_bytes(&self) -> usize {
        self.slots.capacity() * size_of::<Slot>()
    }

    /// Whether [`Self::fill`] may have something to write.
    pub fn has_more(&self) -> bool {
        !self.queue.is_empty() || self.resend_at < self.slots.len()
    }

    pub fn clear(&mut self) {
        *self = Self { version: self.version, ..Self::new() };
    }

    /// Whether the window lets another PUBLISH begin its way.
    pub fn may_send(&self) -> bool {
        let span = (self.window * 2).min(SPAN_MAX);
        self.sent < self.window && self.slots.len() < span && self.resend_at >= self.slots.len()
    }

    fn next_id(&self) -> u16 {
        id_after(self.first_id, self.slots.len())
    }

    /// Takes a message with QoS 1 or 2: writes it, or queues it when offline or beyond the window. `remember` is asked
    /// for a shared copy only if one must be kept.
    #[allow(clippy::too_many_arguments)]
    pub fn deliver(
        &mut self,
        content: &Content<'_>,
        qos: QoS,
        retain: bool,
        subscription_ids: &[u32],
        online: bool,
        remember: impl FnOnce() -> Arc<Message>,
        bounds: &mut Bounds,
        out: &mut Vec<u8>,
    ) -> Delivered {
        let envelope = Envelope {
            version: self.version,
            qos,
            dup: false,
            retain,
            packet_id: self.next_id(),
            subscription_ids,
            expiry_secs: None,
        };
        let bytes = content.packet_bytes(&envelope);
        if online && bytes > self.packet_bytes_max {
            return Delivered::TooLarge;
        }
        let queued_bytes = queued_cost(content.cost(), subscription_ids);
        if online && self.queue.is_empty() && out.len() < bounds.out_bytes_max && self.may_send() {
            if !self.kept && bytes <= bounds.room {
                bounds.room -= bytes;
                content.append(&envelope, out);
                self.open_slot(qos, None);
                return Delivered::Sent;
            }
            if self.kept
                && self.bytes < bounds.queue_bytes_max
                && bytes <= bounds.room
                && queued_bytes <= bounds.queue_room
            {
                bounds.room -= bytes;
                bounds.queue_room -= queued_bytes;
                content.append(&envelope, out);
                let queued = Queued { message: remember(), qos, retain, subscription_ids: subscription_ids.into() };
                self.bytes += queued.cost();
                self.open_slot(qos, Some(queued));
                return Delivered::Sent;
            }
        }
        if self.queue.len() >= bounds.queue_messages_max
            || self.bytes >= bounds.queue_bytes_max
            || queued_bytes > bounds.queue_room
        {
            return Delivered::QueueFull;
        }
        bounds.queue_room -= queued_bytes;
        let queued = Queued { message: remember(), qos, retain, subscription_ids: subscription_ids.into() };
        self.bytes += queued.cost();
        self.queue.push_back(queued);
        Delivered::Queued
    }

    /// Sends a retained message to a new subscription, whatever is queued. Above QoS 0 the caller has asked
    /// [`Self::may_send`]. `QueueFull`: the budget has no room for it now.
    #[allow(clippy::too_many_arguments)]
    pub fn send_retained(
        &mut self,
        message: &Arc<Message>,
        content: &Content<'_>,
        qos: QoS,
        subscription_ids: &[u32],
        expiry_secs: Option<u32>,
        bounds: &mut Bounds,
        out: &mut Vec<u8>,
    ) -> Delivered {
        let envelope = Envelope {
            version: self.version,
            qos,
            dup: false,
            retain: true,
            packet_id: self.next_id(),
            subscription_ids,
            expiry_secs,
        };
        let bytes = content.packet_bytes(&envelope);
        if bytes > self.packet_bytes_max {
            return Delivered::TooLarge;
        }
        let remembered = self.kept && qos > QoS::AtMostOnce;
        let queued_bytes = if remembered { queued_cost(content.cost(), subscription_ids) } else { 0 };
        if bytes > bounds.room || queued_bytes > bounds.queue_room {
            return Delivered::QueueFull;
        }
        bounds.room -= bytes;
        bounds.queue_room -= queued_bytes;
        content.append(&envelope, out);
        if qos > QoS::AtMostOnce {
            let queued = remembered.then(|| Queued {
                message: message.clone(),
                qos,
                retain: true,
                subscription_ids: subscription_ids.into(),
            });
            self.bytes += queued.as_ref().map_or(0, Queued::cost);
            self.open_slot(qos, queued);
        }
        Delivered::Sent
    }

    fn open_slot(&mut self, qos: QoS, message: Option<Queued>) {
        let state = if qos == QoS::ExactlyOnce { State::AwaitsPubRec } else { State::AwaitsPubAck };
        self.slots.push_back(Slot { state, sent: true, message });
        self.resend_at = self.slots.len();
        self.sent += 1;
    }

    /// Writes what may go now: first what a reconnect must send again, then from the queue. Returns how many expired.
    pub fn fill(&mut self, now_ms: i64, bounds: &Bounds, out: &mut Vec<u8>) -> usize {
        // One at least, or the session would wait for a room that nobody announces.
        let out_bytes_max = bounds.out_bytes_max.min(bounds.room).max(1);
        while self.sent < self.window && out.len() < out_bytes_max {
            let id = id_after(self.first_id, self.resend_at);
            let (version, max) = (self.version, self.packet_bytes_max);
            let Some(slot) = self.slots.get_mut(self.resend_at) else { break };
            let too_large = slot
                .message
                .as_ref()
                .is_some_and(|queued| queued.message.content().packet_bytes(&queued.envelope(version, id, true)) > max);
            if too_large {
                // The client takes less than before: as good as done (§3.1.2.11.4).
                let slots = self.slots.len();
                self.close_slot(id);
                self.resend_at += usize::from(self.slots.len() == slots);
                continue;
            }
            slot.sent = matches!(slot.state, State::AwaitsPubAck | State::AwaitsPubRec);
            self.sent += usize::from(slot.sent);
            self.resend(self.resend_at, now_ms, out);
            self.resend_at += 1;
        }
        let mut expired = 0;
        while self.may_send() && out.len() < out_bytes_max {
            let Some(queued) = self.queue.pop_front() else { break };
            let cost = queued.cost();
            let envelope = queued.envelope(self.version, self.next_id(), false);
            let content = queued.message.content();
            let Ok(left) = queued.message.expiry_left(now_ms) else {
                self.bytes -= cost;
                expired += 1;
                continue;
            };
            if content.packet_bytes(&envelope) > self.packet_bytes_max {
                self.bytes -= cost;
                continue;
            }
            content.append(&Envelope { expiry_secs: left, ..envelope }, out);
            if self.kept {
                self.open_slot(queued.qos, Some(queued));
            } else {
                self.bytes -= cost;
                self.open_slot(queued.qos, None);
            }
        }
        if self.queue.is_empty() && self.queue.capacity() > 64 {
            self.queue = VecDeque::new();
        }
        expired
    }

    fn resend(&mut self, at: usize, now_ms: i64, out: &mut Vec<u8>) {
        let id = id_after(self.first_id, at);
        let Some(slot) = self.slots.get(at) else { return };
        match (slot.state, &slot.message) {
            (State::AwaitsPubAck | State::AwaitsPubRec, Some(queued)) => {
                let envelope = queued.envelope(self.version, id, true);
                // A message that began its way is finished even if it expired since (§4.4: it MUST be sent again).
                let left = queued.message.expiry_left(now_ms).unwrap_or(Some(1));
                queued.message.content().append(&Envelope { expiry_secs: left, ..envelope }, out);
            }
            (State::AwaitsPubComp, _) => put_ack(0x62, id, Reason::SUCCESS, None, self.version, out),
            _ => {}
        }
    }

    fn slot_mut(&mut self, id: u16) -> Option<&mut Slot> {
        let at = id_distance(self.first_id, id);
        self.slots.get_mut(at).filter(|slot| slot.state != State::Done)
    }

    /// PUBACK. An unknown id is passed over: it may be of before a restart.
    pub fn puback(&mut self, id: u16) -> Result<(), CodecError> {
        match self.slot_mut(id).map(|slot| slot.state) {
            None => Ok(()),
            Some(State::AwaitsPubAck) => {
                self.close_slot(id);
                Ok(())
            }
            Some(_) => Err(CodecError::Protocol("a PUBACK for a PUBLISH with QoS 2")),
        }
    }

    /// PUBREC: answers PUBREL, or forgets the message if the client refused it.
    pub fn pubrec(&mut self, id: u16, reason: Reason, out: &mut Vec<u8>) -> Result<(), CodecError> {
        let version = self.version;
        match self.slot_mut(id).map(|slot| slot.state) {
            None if reason.is_error() => {}
            None => put_ack(0x62, id, Reason::PACKET_IDENTIFIER_NOT_FOUND, None, version, out),
            Some(State::AwaitsPubAck) => return Err(CodecError::Protocol("a PUBREC for a PUBLISH with QoS 1")),
            Some(_) if reason.is_error() => self.close_slot(id),
            Some(_) => {
                let freed = match self.slot_mut(id) {
                    Some(slot) => {
                        slot.state = State::AwaitsPubComp;
                        slot.message.take().map_or(0, |queued| queued.cost())
                    }
                    None => 0,
                };
                self.bytes -= freed;
                put_ack(0x62, id, Reason::SUCCESS, None, version, out);
            }
        }
        Ok(())
    }

    /// PUBCOMP.
    pub fn pubcomp(&mut self, id: u16) -> Result<(), CodecError> {
        match self.slot_mut(id).map(|slot| slot.state) {
            None => Ok(()),
            Some(State::AwaitsPubComp) => {
                self.close_slot(id);
                Ok(())
            }
            Some(_) => Err(CodecError::Protocol("a PUBCOMP before its PUBREC")),
        }
    }

    fn close_slot(&mut self, id: u16) {
        let Some(slot) = self.slot_mut(id) else { return };
        slot.state = State::Done;
        let sent = std::mem::take(&mut slot.sent);
        let freed = slot.message.take().map_or(0, |queued| queued.cost());
        self.bytes -= freed;
        self.sent -= usize::from(sent);
        while self.slots.front().is_some_and(|slot| slot.state == State::Done) {
            self.slots.pop_front();
            self.first_id = id_after(self.first_id, 1);
            self.resend_at = self.resend_at.saturating_sub(1);
        }
        if self.slots.is_empty() && self.slots.capacity() > 256 {
            self.slots = VecDeque::new();
        }
    }
}

/// Bytes that one entry of a queue costs.
fn queued_cost(message_cost: usize, subscription_ids: &[u32]) -> usize {
    message_cost + size_of::<Queued>() + size_of_val(subscription_ids)
}

impl Queued {
    fn cost(&self) -> usize {
        queued_cost(self.message.cost(), &self.subscription_ids)
    }

    fn envelope(&self, version: Version, packet_id: u16, dup: bool) -> Envelope<'_> {
        Envelope {
            version,
            qos: self.qos,
            dup,
            retain: self.retain,
            packet_id,
            subscription_ids: &self.subscription_ids,
            expiry_secs: None,
        }
    }
}

/// The id `n` places after `first`: 1 to 65,535, around and around.
fn id_after(first: u16, n: usize) -> u16 {
    ((usize::from(first) - 1 + n) % 65_535 + 1) as u16
}

/// How many places `id` stands after `first`.
fn id_distance(first: u16, id: u16) -> usize {
    (usize::from(id) + 65_535 - usize::from(first)) % 65_535
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{Packet, Split, split};

    const BOUNDS: Bounds = Bounds {
        queue_messages_max: 10,
        queue_bytes_max: 100_000,
        out_bytes_max: 1 << 20,
        room: 1 << 20,
        queue_room: 1 << 20,
    };

    fn content() -> Content<'static> {
        Content { topic: b"t", properties: &[], expiry_at: None, payload: b"x" }
    }

    fn deliver(o: &mut Outbound, qos: QoS, online: bool, out: &mut Vec<u8>) -> Delivered {
        let remember = || Arc::new(Message::new(&content(), None, qos, 0));
        o.deliver(&content(), qos, false, &[], online, remember, &mut { BOUNDS }, out)
    }

    /// (type, packet id, dup) of each packet.
    fn read(out: &mut Vec<u8>) -> Vec<(u8, u16, bool)> {
        let bytes = std::mem::take(out);
        let (mut rest, mut all) = (&bytes[..], vec![]);
        while let Ok(Split::Frame(frame)) = split(rest, Some(Version::V5), 1 << 20) {
            all.push(match Packet::decode(&frame, Version::V5).unwrap() {
                Packet::Publish(p) => (3, p.packet_id.unwrap(), p.dup),
                Packet::PubRel(a) => (6, a.packet_id, a.reason.is_error()),
                other => panic!("{other:?}"),
            });
            rest = &rest[frame.bytes.len()..];
        }
        all
    }

    #[test]
    fn the_window_holds_back_and_the_queue_follows() {
        let (mut o, mut out) = (Outbound::new(), Vec::new());
        o.connected(Version::V5, 2, usize::MAX, false);
        for expected in [Delivered::Sent, Delivered::Sent, Delivered::Queued] {
            assert_eq!(deliver(&mut o, QoS::AtLeastOnce, true, &mut out), expected);
        }
        for _ in 0..9 {
            deliver(&mut o, QoS::AtLeastOnce, true, &mut out);
        }
        assert_eq!(deliver(&mut o, QoS::AtLeastOnce, true, &mut out), Delivered::QueueFull);
        assert_eq!(read(&mut out), [(3, 1, false), (3, 2, false)]);
        o.puback(2).unwrap();
        o.fill(0, &BOUNDS, &mut out);
        assert_eq!(read(&mut out), [(3, 3, false)]);
        o.puback(1).unwrap();
        o.puback(3).unwrap();
        o.fill(0, &BOUNDS, &mut out);
        assert_eq!(read(&mut out), [(3, 4, false), (3, 5, false)]);
    }

    #[test]
    fn what_was_open_is_sent_again_in_order_with_its_ids() {
        let (mut o, mut out) = (Outbound::new(), Vec::new());
        o.connected(Version::V5, 10, usize::MAX, true);
        deliver(&mut o, QoS::AtLeastOnce, true, &mut out);
        deliver(&mut o, QoS::ExactlyOnce, true, &mut out);
        deliver(&mut o, QoS::ExactlyOnce, true, &mut out);
        o.pubrec(3, Reason::SUCCESS, &mut out).unwrap();
        assert_eq!(read(&mut out), [(3, 1, false), (3, 2, false), (3, 3, false), (6, 3, false)]);
        assert_eq!(deliver(&mut o, QoS::AtLeastOnce, false, &mut out), Delivered::Queued);
        o.connected(Version::V5, 10, usize::MAX, true);
        // A new message does not overtake what must be sent again.
        assert_eq!(deliver(&mut o, QoS::AtLeastOnce, true, &mut out), Delivered::Queued);
        o.fill(0, &BOUNDS, &mut out);
        assert_eq!(read(&mut out), [(3, 1, true), (3, 2, true), (6, 3, false), (3, 4, false), (3, 5, false)]);
        o.pubcomp(3).unwrap();
        o.puback(1).unwrap();
        o.pubrec(2, Reason::SUCCESS, &mut out).unwrap();
        o.pubcomp(2).unwrap();
        o.puback(4).unwrap();
        o.puback(5).unwrap();
        assert_eq!((o.bytes(), o.slots.len(), o.first_id), (0, 0, 6));
    }

    #[test]
    fn a_smaller_window_after_a_reconnect_holds_for_what_is_sent_again() {
        let (mut o, mut out) = (Outbound::new(), Vec::new());
        o.connected(Version::V5, 10, usize::MAX, true);
        for _ in 0..4 {
            deliver(&mut o, QoS::AtLeastOnce, true, &mut out);
        }
        deliver(&mut o, QoS::ExactlyOnce, true, &mut out);
        o.pubrec(5, Reason::SUCCESS, &mut out).unwrap();
        out.clear();
        o.connected(Version::V5, 2, usize::MAX, true);
        o.fill(0, &BOUNDS, &mut out);
        assert_eq!(read(&mut out), [(3, 1, true), (3, 2, true)]);
        o.puback(1).unwrap();
        o.puback(2).unwrap();
        o.fill(0, &BOUNDS, &mut out);
        assert_eq!(read(&mut out), [(3, 3, true), (3, 4, true)]);
        // An acknowledgement of before the reconnect may come for what was not sent again yet.
        o.puback(4).unwrap();
        o.fill(0, &BOUNDS, &mut out);
        assert_eq!(read(&mut out), [(6, 5, false)]);
        assert_eq!(deliver(&mut o, QoS::AtLeastOnce, true, &mut out), Delivered::Sent);
        o.pubcomp(5).unwrap();
        o.puback(3).unwrap();
        o.puback(6).unwrap();
        assert_eq!((o.sent, o.bytes(), o.slots.len()), (0, 0, 0));
        // A client that takes smaller packets than before does not get what was open, and what follows goes on.
        deliver(&mut o, QoS::AtLeastOnce, true, &mut out);
        deliver(&mut o, QoS::AtLeastOnce, false, &mut out);
        o.connected(Version::V5, 2, 3, true);
        out.clear();
        o.fill(0, &BOUNDS, &mut out);
        assert_eq!((read(&mut out), o.bytes(), o.slots.len()), (vec![], 0, 0));
    }

    #[test]
    fn ids_go_around_without_zero() {
        assert_eq!([id_after(65_535, 1), id_after(65_534, 1), id_after(1, 65_534)], [1, 65_535, 65_535]);
        assert_eq!([id_distance(65_535, 1), id_distance(5, 5), id_distance(6, 5)], [1, 0, 65_534]);
        let (mut o, mut out) = (Outbound::new(), Vec::new());
        o.connected(Version::V5, 1, usize::MAX, false);
        for i in 0..70_000usize {
            assert_eq!(deliver(&mut o, QoS::AtLeastOnce, true, &mut out), Delivered::Sent);
            o.puback(id_after(1, i)).unwrap();
        }
    }

    #[test]
    fn an_acknowledgement_of_the_wrong_kind_is_a_protocol_error() {
        let (mut o, mut out) = (Outbound::new(), Vec::new());
        o.connected(Version::V5, 10, usize::MAX, false);
        deliver(&mut o, QoS::AtLeastOnce, true, &mut out);
        deliver(&mut o, QoS::ExactlyOnce, true, &mut out);
        assert!(o.pubrec(1, Reason::SUCCESS, &mut out).is_err());
        assert!(o.puback(2).is_err() && o.pubcomp(2).is_err());
        assert!(o.puback(999).is_ok());
        out.clear();
        o.pubrec(999, Reason::SUCCESS, &mut out).unwrap();
        assert_eq!(read(&mut out), [(6, 999, true)]);
    }
}
