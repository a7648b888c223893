//! The packets, as types that borrow from the buffer they were read from.

use super::{Properties, QoS, Reason, Version};
use crate::store::PublishProperties;

/// One control packet.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)] // The names are the standard's.
pub enum Packet<'a> {
    Connect(Box<Connect<'a>>),
    ConnAck(Box<ConnAck<'a>>),
    Publish(Publish<'a>),
    PubAck(Ack<'a>),
    PubRec(Ack<'a>),
    PubRel(Ack<'a>),
    PubComp(Ack<'a>),
    Subscribe(Subscribe<'a>),
    SubAck(SubAck<'a>),
    Unsubscribe(Unsubscribe<'a>),
    UnsubAck(SubAck<'a>),
    PingReq,
    PingResp,
    Disconnect(Disconnect<'a>),
    Auth(Disconnect<'a>),
}

/// CONNECT (§3.1).
#[derive(Debug, Clone, PartialEq)]
pub struct Connect<'a> {
    /// Protocol level.
    pub version: Version,
    /// Clean Start; in 3.1.1 Clean Session.
    pub clean_start: bool,
    /// Keep alive in seconds; 0: none.
    pub keep_alive_secs: u16,
    /// Client identifier, may be empty.
    pub client_id: &'a str,
    /// What to publish when the connection is lost.
    pub will: Option<Will<'a>>,
    /// User name.
    pub username: Option<&'a str>,
    /// Password.
    pub password: Option<&'a [u8]>,
    /// MQTT 5 properties.
    pub properties: Properties<'a>,
}

/// The will of a CONNECT (§3.1.2.5, §3.1.3.2).
#[derive(Debug, Clone, PartialEq)]
pub struct Will<'a> {
    /// Topic name.
    pub topic: &'a str,
    /// Payload.
    pub payload: &'a [u8],
    /// Quality of service.
    pub qos: QoS,
    /// RETAIN of the PUBLISH it becomes.
    pub retain: bool,
    /// Seconds between the loss and the PUBLISH.
    pub delay_secs: u32,
    /// Properties of the PUBLISH it becomes.
    pub properties: PublishProperties<'a>,
}

/// CONNACK (§3.2).
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ConnAck<'a> {
    /// The server holds a session for this client.
    pub session_present: bool,
    /// Reason code; in 3.1.1 the return code.
    pub reason: Reason,
    /// MQTT 5 properties.
    pub properties: Properties<'a>,
}

/// PUBLISH (§3.3).
#[derive(Debug, Clone, PartialEq)]
pub struct Publish<'a> {
    /// Sent before, perhaps.
    pub dup: bool,
    /// Quality of service.
    pub qos: QoS,
    /// Retain.
    pub retain: bool,
    /// Topic name; empty only with a topic alias.
    pub topic: &'a str,
    /// Packet identifier, for QoS 1 and 2.
    pub packet_id: Option<u16>,
    /// MQTT 5 topic alias.
    pub topic_alias: Option<u16>,
    /// MQTT 5 subscription identifiers, server to client only.
    pub subscription_ids: Vec<u32>,
    /// MQTT 5 properties that outlive the hop.
    pub properties: PublishProperties<'a>,
    /// Payload.
    pub payload: &'a [u8],
}

/// PUBACK, PUBREC, PUBREL and PUBCOMP (§3.4 - §3.7).
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Ack<'a> {
    /// Packet identifier.
    pub packet_id: u16,
    /// Reason code; in 3.1.1 always success.
    pub reason: Reason,
    /// MQTT 5 properties.
    pub properties: Option<Box<Properties<'a>>>,
}

impl Ack<'_> {
    /// An acknowledgement without properties.
    pub fn new(packet_id: u16, reason: Reason) -> Self {
        Self { packet_id, reason, properties: None }
    }
}

/// SUBSCRIBE (§3.8).
#[derive(Debug, Clone, PartialEq)]
pub struct Subscribe<'a> {
    /// Packet identifier.
    pub packet_id: u16,
    /// MQTT 5 properties: subscription identifier, user properties.
    pub properties: Properties<'a>,
    /// Filters with their options, at least one. They are UTF-8, not yet checked as filters.
    pub filters: Vec<(&'a str, SubscribeOptions)>,
}

/// The options byte of one filter (§3.8.3.1). 3.1.1 has only the QoS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SubscribeOptions {
    /// Greatest QoS of deliveries.
    pub qos: QoS,
    /// Not to the connection that published.
    pub no_local: bool,
    /// RETAIN as it was published.
    pub retain_as_published: bool,
    /// Whether retained messages are sent now.
    pub retain_handling: RetainHandling,
}

/// When retained messages are sent at SUBSCRIBE (§3.8.3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RetainHandling {
    /// Always.
    #[default]
    Send = 0,
    /// If the subscription is new.
    SendIfNew = 1,
    /// Never.
    DoNotSend = 2,
}

impl SubscribeOptions {
    /// Reads the options byte of MQTT 5; `None` for a reserved bit or value.
    pub fn from_byte(byte: u8) -> Option<Self> {
        let retain_handling = match byte >> 4 {
            0 => RetainHandling::Send,
            1 => RetainHandling::SendIfNew,
            2 => RetainHandling::DoNotSend,
            _ => return None,
        };
        Some(Self {
            qos: QoS::from_u8(byte & 3)?,
            no_local: byte & 4 != 0,
            retain_as_published: byte & 8 != 0,
            retain_handling,
        })
    }

    /// The options byte of MQTT 5.
    pub fn byte(self) -> u8 {
        self.qos as u8
            | u8::from(self.no_local) << 2
            | u8::from(self.retain_as_published) << 3
            | (self.retain_handling as u8) << 4
    }
}

/// SUBACK (§3.9) and UNSUBACK (§3.11).
#[derive(Debug, Clone, PartialEq, Default)]
pub struct SubAck<'a> {
    /// Packet identifier.
    pub packet_id: u16,
    /// MQTT 5 properties.
    pub properties: Option<Box<Properties<'a>>>,
    /// One for each filter. A 3.1.1 UNSUBACK has none.
    pub reasons: Vec<Reason>,
}

/// UNSUBSCRIBE (§3.10).
#[derive(Debug, Clone, PartialEq)]
pub struct Unsubscribe<'a> {
    /// Packet identifier.
    pub packet_id: u16,
    /// MQTT 5 properties: user properties.
    pub properties: Option<Box<Properties<'a>>>,
    /// Filters, at least one. They are UTF-8, not yet checked as filters.
    pub filters: Vec<&'a str>,
}

/// DISCONNECT (§3.14) and AUTH (§3.15).
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Disconnect<'a> {
    /// Reason code; in 3.1.1 always success.
    pub reason: Reason,
    /// MQTT 5 properties.
    pub properties: Option<Box<Properties<'a>>>,
}
