//! Towards the publisher: which packet ids are open, and answers in the order of what they answer.

use std::collections::{BTreeMap, VecDeque};

use crate::codec::{Ack, Packet, Properties, Reason, Version};
use crate::store::Ticket;

/// An answer that leaves once its ticket is durable.
#[derive(Debug)]
pub(crate) enum Answer<R> {
    PubAck(u16, Reason),
    PubRec(u16, Reason),
    PubComp(u16, Reason),
    /// Anything else the connection wants to do at that place in the order.
    Other(R),
}

/// Answers waiting for durability, in order (§4.6.0-2: PUBACK and PUBREC leave in the order of their PUBLISHes). One
/// order for all kinds is stricter than the standard asks and leaves nothing to argue about.
#[derive(Debug)]
pub(crate) struct Answers<R> {
    waiting: VecDeque<(Ticket, Answer<R>)>,
}

impl<R> Default for Answers<R> {
    fn default() -> Self {
        Self { waiting: VecDeque::new() }
    }
}

impl<R> Answers<R> {
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// `ticket`: [`Ticket::default`] when there is nothing to wait for but the answers before it.
    pub fn push(&mut self, ticket: Ticket, answer: Answer<R>) {
        self.waiting.push_back((ticket, answer));
    }

    /// The next answer, which may leave: what it waits for is durable.
    pub fn pop(&mut self) -> Option<Answer<R>> {
        let (_, answer) = self.waiting.pop_front()?;
        if self.waiting.is_empty() && self.waiting.capacity() > 64 {
            self.waiting = VecDeque::new();
        }
        Some(answer)
    }

    /// What the first answer waits for.
    pub fn waits_for(&self) -> Option<Ticket> {
        self.waiting.front().map(|(ticket, _)| *ticket)
    }
}

/// QoS 2 packet ids received and not released yet. They outlive the connection of a kept session.
#[derive(Debug, Default)]
pub(crate) struct ReceivedIds {
    open: BTreeMap<u16, Received>,
}

/// What an open packet id is taken to occupy: its entry, in a tree that is not full.
pub(crate) const PACKET_ID_BYTES: usize = 48;

#[derive(Debug, Clone, Copy)]
struct Received {
    ticket: Ticket,
    /// It counts against the receive maximum of the current connection.
    counted: bool,
}

impl ReceivedIds {
    /// Packet ids that were stored before a restart.
    pub fn restored(ids: &[u16]) -> Self {
        Self { open: ids.iter().map(|&id| (id, Received { ticket: Ticket::default(), counted: false })).collect() }
    }

    /// Bytes it occupies.
    pub fn bytes(&self) -> usize {
        self.open.len() * PACKET_ID_BYTES
    }

    pub fn insert(&mut self, id: u16, ticket: Ticket) {
        self.open.insert(id, Received { ticket, counted: true });
    }

    /// A PUBLISH that came before: the ticket its PUBREC waits for, and whether it counts for the first time here.
    pub fn repeated(&mut self, id: u16) -> Option<(Ticket, bool)> {
        let received = self.open.get_mut(&id)?;
        let first = !std::mem::replace(&mut received.counted, true);
        Some((received.ticket, first))
    }

    /// PUBREL: forgets the id; `None` if it is unknown, else whether it counted.
    pub fn release(&mut self, id: u16) -> Option<bool> {
        self.open.remove(&id).map(|received| received.counted)
    }

    /// A new connection starts with its whole receive maximum (§3.1.2.11.3).
    pub fn reconnected(&mut self) {
        self.open.values_mut().for_each(|received| received.counted = false);
    }

    /// Forgets the ids that were never stored: a PUBLISH that comes again under one of them is a new one.
    pub fn forget(&mut self, lost: impl Fn(Ticket) -> bool) {
        self.open.retain(|_, received| !lost(received.ticket));
    }

    pub fn clear(&mut self) {
        self.open.clear();
    }
}

/// Writes PUBACK (0x40), PUBREC (0x50), PUBREL (0x62) or PUBCOMP (0x70).
#[inline]
pub(crate) fn put_ack(first: u8, id: u16, reason: Reason, text: Option<&str>, version: Version, out: &mut Vec<u8>) {
    if version == Version::V4 || reason == Reason::SUCCESS {
        let [high, low] = id.to_be_bytes();
        out.extend_from_slice(&[first, 2, high, low]);
        return;
    }
    let properties = text.map(|text| Box::new(Properties { reason_string: Some(text), ..Properties::default() }));
    let ack = Ack { packet_id: id, reason, properties };
    let packet = match first {
        0x40 => Packet::PubAck(ack),
        0x50 => Packet::PubRec(ack),
        0x62 => Packet::PubRel(ack),
        _ => Packet::PubComp(ack),
    };
    let encoded = packet.encode(version, out);
    debug_assert_eq!(encoded, Ok(()), "every field is short");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_leave_in_order_whatever_becomes_durable_first() {
        let mut answers = Answers::<()>::default();
        for (ticket, id) in [(5, 1), (0, 2), (3, 3)] {
            answers.push(Ticket::of(ticket), Answer::PubAck(id, Reason::SUCCESS));
        }
        for (ticket, id) in [(5, 1), (0, 2), (3, 3)] {
            assert_eq!(answers.waits_for(), Some(Ticket::of(ticket)));
            let answer = answers.pop().unwrap();
            assert!(matches!(answer, Answer::PubAck(i, _) if i == id), "{answer:?}");
        }
        assert!(answers.is_empty());
    }

    #[test]
    fn a_repeated_publish_is_known_until_it_is_released() {
        let mut ids = ReceivedIds::default();
        assert_eq!(ids.repeated(7), None);
        ids.insert(7, Ticket::of(4));
        assert_eq!(ids.repeated(7), Some((Ticket::of(4), false)));
        ids.reconnected();
        assert_eq!(ids.repeated(7), Some((Ticket::of(4), true)));
        assert_eq!(ids.release(7), Some(true));
        assert_eq!((ids.release(7), ids.repeated(7)), (None, None));
    }
}
