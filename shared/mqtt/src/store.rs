//! What the front asks of whoever keeps messages and sessions: the edge over redb, later the cloud over its log.
//!
//! All calls are made from connection tasks and must not block; durability is told by [`Ticket`]s.

pub mod memory;

use shared::log::BoxFuture;

use crate::codec::Reason;

/// A place in the order of commits, and what of that commit it stands for. Commits become durable in order, each as a
/// whole, but for the parts that found no room: [`Store::durable`] answers for one ticket.
///
/// The default stands for what nobody has to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Ticket {
    /// The commit's number.
    pub commit: u64,
    /// 0 is what the commit holds for all; any other number is what it holds for one session.
    pub part: u32,
}

impl Ticket {
    /// What the commit holds for all.
    pub fn of(commit: u64) -> Self {
        Self { commit, part: 0 }
    }
}

/// Keeps messages, retained messages and sessions durably.
pub trait Store: Send + Sync + 'static {
    /// Takes the PUBLISHes of one read buffer of one connection, in arrival order, under one lock. Pushes one admission
    /// for each, or fewer: the first that got none is *held* (no room, and its stream says to wait), and so is what
    /// follows it. Nothing of a held or refused PUBLISH is stored or retained; the front must not deliver it.
    ///
    /// The record, the retained change (`retain`) and the packet id (QoS 2 of a kept session) of one PUBLISH become
    /// durable together, with its ticket.
    fn publish(&self, session: &SessionRef<'_>, publishes: &[Publish<'_>], admissions: &mut Vec<Admission>);

    /// Resolves when a held PUBLISH is worth offering again.
    fn room(&self) -> BoxFuture<'static, ()>;

    /// PUBREL of a kept session: forgets the packet id. PUBCOMP may leave once the ticket is durable.
    fn release(&self, client_id: &str, packet_id: u16) -> Ticket;

    /// Whether `ticket` is durable by now. It fails if it never will be: there was no room for it on the disk, or the store
    /// has failed. Then the connection must be closed without the acknowledgements that waited for it.
    fn durable(&self, ticket: Ticket) -> Result<bool, StoreFailed>;

    /// Resolves when `ticket` is durable; fails as [`Store::durable`] does.
    fn wait(&self, ticket: Ticket) -> BoxFuture<'static, Result<(), StoreFailed>>;

    /// Every kept session, for the start.
    fn load_sessions(&self) -> Result<Vec<StoredSession>, StoreFailed>;

    /// Every retained message, for the start.
    fn load_retained(&self) -> Result<Vec<StoredRetained>, StoreFailed>;

    /// Deletes a retained message that has expired. Nobody waits for it.
    fn delete_retained(&self, topic: &str);

    /// Writes the row of a kept session: user, expiry and when it was left. Subscriptions and packet ids have rows of their
    /// own and stay as they are. CONNACK waits for the ticket. A session that was saved before is never refused.
    fn save_session(&self, session: &StoredSession) -> Result<Ticket, Refusal>;

    /// Writes one subscription of a saved session; SUBACK waits for the ticket. Refused: sessions have reached their bound.
    fn save_subscription(&self, client_id: &str, subscription: &StoredSubscription) -> Result<Ticket, Refusal>;

    /// Deletes one subscription; UNSUBACK waits for the ticket.
    fn delete_subscription(&self, client_id: &str, filter: &str) -> Ticket;

    /// Deletes a session and all it holds.
    fn delete_session(&self, client_id: &str) -> Ticket;
}

/// Who publishes.
#[derive(Debug, Clone, Copy)]
pub struct SessionRef<'a> {
    /// The client identifier.
    pub client_id: &'a str,
    /// The session outlives its connection, so its QoS 2 packet ids must be stored.
    pub kept: bool,
}

/// An incoming PUBLISH that passed all checks of the protocol. A QoS 2 packet id that is already known never comes here.
#[derive(Debug, Clone)]
pub struct Publish<'a> {
    /// Topic name, aliases resolved.
    pub topic: &'a str,
    /// Payload, untouched.
    pub payload: &'a [u8],
    /// 0, 1 or 2.
    pub qos: u8,
    /// RETAIN flag: an empty payload deletes the retained message.
    pub retain: bool,
    /// Packet identifier of QoS 1 and 2.
    pub packet_id: Option<u16>,
    /// When it arrived.
    pub now_ms: i64,
    /// MQTT 5 properties; default for 3.1.1.
    pub properties: PublishProperties<'a>,
}

/// Properties of an MQTT 5 PUBLISH that outlive the hop (§3.3.2.3).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PublishProperties<'a> {
    /// Payload is UTF-8.
    pub payload_is_utf8: Option<bool>,
    /// Seconds until it expires.
    pub expiry_secs: Option<u32>,
    /// MIME type of the payload.
    pub content_type: Option<&'a str>,
    /// Where a response goes.
    pub response_topic: Option<&'a str>,
    /// Ties a response to its request.
    pub correlation_data: Option<&'a [u8]>,
    /// In order, names may repeat.
    pub user: Vec<(&'a str, &'a str)>,
}

/// What became of one PUBLISH.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// On no stream and nothing to keep: deliver and acknowledge at once.
    NotStored,
    /// Taken: deliver now, acknowledge once the ticket is durable.
    Stored(Ticket),
    /// Not taken.
    Refused(Refusal),
}

/// Why a PUBLISH was refused for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The stream is full and rejects: v5 reason 0x97, 3.1.1 close.
    QuotaExceeded,
    /// It could never be forwarded (limits learnt from the cloud): v5 reason 0x83 (PUBACK cannot carry 0x95), 3.1.1 close.
    TooLarge,
    /// Storage failed: the connection ends (v5 0x83; neither PUBACK nor DISCONNECT can carry 0x88).
    Unavailable,
}

impl Refusal {
    /// How a client is told.
    pub fn reason(self) -> Reason {
        match self {
            Self::QuotaExceeded => Reason::QUOTA_EXCEEDED,
            Self::TooLarge | Self::Unavailable => Reason::IMPLEMENTATION_SPECIFIC_ERROR,
        }
    }
}

/// The store failed; nothing that was not durable yet is known to be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the store failed: {0}")]
pub struct StoreFailed(pub String);

/// A session that outlives its connections.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StoredSession {
    /// The client identifier.
    pub client_id: String,
    /// The user it belongs to; `None`: it was begun without one.
    pub user: Option<String>,
    /// Seconds it lives after its connection ends; `u32::MAX`: for ever (and MQTT 3.1.1 with clean session 0).
    pub expiry_secs: u32,
    /// When its last connection ended; `None`: connected, or the broker was killed meanwhile.
    pub left: Option<SessionLeft>,
    /// Its subscriptions. Written by [`Store::save_subscription`] and [`Store::delete_subscription`] only.
    pub subscriptions: Vec<StoredSubscription>,
    /// QoS 2 packet ids received and not yet released. Written by [`Store::publish`] and [`Store::release`] only.
    pub inbound_packet_ids: Vec<u16>,
}

/// When a session was left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SessionLeft {
    /// Its place among all that were left, whatever the clock said: the longest absent session has the lowest.
    pub order: u64,
    /// Milliseconds since 1970.
    pub wall_ms: i64,
}

/// A subscription of a kept session.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StoredSubscription {
    /// The topic filter.
    pub filter: String,
    /// The options byte of SUBSCRIBE (MQTT 5 §3.8.3.1); in 3.1.1 its two lowest bits.
    pub options: u8,
    /// MQTT 5 subscription identifier.
    pub identifier: Option<u32>,
}

/// A retained message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredRetained {
    /// Topic name.
    pub topic: String,
    /// The PUBLISH's bytes in MQTT 5 form from the properties on: property length, properties, payload.
    pub properties_and_payload: Vec<u8>,
    /// 0, 1 or 2.
    pub qos: u8,
    /// When it arrived. From [`Store::load_retained`]: when it would have arrived if the clock had always been as it is now,
    /// so that a clock that was, or is, wrong does not make it older.
    pub stored_ms: i64,
}
