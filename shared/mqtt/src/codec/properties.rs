//! MQTT 5 properties (§2.2.2): which packet may carry which, each at most once, values within their range.

use super::wire::{Reader, put_remaining_length, put_u16, put_u32};
use super::{CodecError, EncodeError, QoS};
use crate::store::PublishProperties;

pub(super) mod id {
    pub const PAYLOAD_FORMAT: u8 = 0x01;
    pub const MESSAGE_EXPIRY: u8 = 0x02;
    pub const CONTENT_TYPE: u8 = 0x03;
    pub const RESPONSE_TOPIC: u8 = 0x08;
    pub const CORRELATION_DATA: u8 = 0x09;
    pub const SUBSCRIPTION_ID: u8 = 0x0B;
    pub const SESSION_EXPIRY: u8 = 0x11;
    pub const ASSIGNED_CLIENT_ID: u8 = 0x12;
    pub const SERVER_KEEP_ALIVE: u8 = 0x13;
    pub const AUTH_METHOD: u8 = 0x15;
    pub const AUTH_DATA: u8 = 0x16;
    pub const REQUEST_PROBLEM_INFO: u8 = 0x17;
    pub const WILL_DELAY: u8 = 0x18;
    pub const REQUEST_RESPONSE_INFO: u8 = 0x19;
    pub const RESPONSE_INFO: u8 = 0x1A;
    pub const SERVER_REFERENCE: u8 = 0x1C;
    pub const REASON_STRING: u8 = 0x1F;
    pub const RECEIVE_MAXIMUM: u8 = 0x21;
    pub const TOPIC_ALIAS_MAXIMUM: u8 = 0x22;
    pub const TOPIC_ALIAS: u8 = 0x23;
    pub const MAXIMUM_QOS: u8 = 0x24;
    pub const RETAIN_AVAILABLE: u8 = 0x25;
    pub const USER: u8 = 0x26;
    pub const MAXIMUM_PACKET_SIZE: u8 = 0x27;
    pub const WILDCARD_AVAILABLE: u8 = 0x28;
    pub const SUBSCRIPTION_IDS_AVAILABLE: u8 = 0x29;
    pub const SHARED_AVAILABLE: u8 = 0x2A;
}
use id::*;

const fn set(ids: &[u8]) -> u64 {
    let (mut mask, mut i) = (1 << USER, 0);
    while i < ids.len() {
        mask |= 1 << ids[i];
        i += 1;
    }
    mask
}

/// Which properties a packet may carry (§2.2.2.2, Table 2-4), as a set of bits; user properties everywhere.
pub(super) mod allowed {
    use super::*;
    pub const CONNECT: u64 = set(&[
        SESSION_EXPIRY,
        AUTH_METHOD,
        AUTH_DATA,
        REQUEST_PROBLEM_INFO,
        REQUEST_RESPONSE_INFO,
        RECEIVE_MAXIMUM,
        TOPIC_ALIAS_MAXIMUM,
        MAXIMUM_PACKET_SIZE,
    ]);
    pub const CONNACK: u64 = set(&[
        SESSION_EXPIRY,
        ASSIGNED_CLIENT_ID,
        SERVER_KEEP_ALIVE,
        AUTH_METHOD,
        AUTH_DATA,
        RESPONSE_INFO,
        SERVER_REFERENCE,
        REASON_STRING,
        RECEIVE_MAXIMUM,
        TOPIC_ALIAS_MAXIMUM,
        MAXIMUM_QOS,
        RETAIN_AVAILABLE,
        MAXIMUM_PACKET_SIZE,
        WILDCARD_AVAILABLE,
        SUBSCRIPTION_IDS_AVAILABLE,
        SHARED_AVAILABLE,
    ]);
    pub const MESSAGE: u64 = set(&[PAYLOAD_FORMAT, MESSAGE_EXPIRY, CONTENT_TYPE, RESPONSE_TOPIC, CORRELATION_DATA]);
    pub const PUBLISH: u64 = MESSAGE | set(&[SUBSCRIPTION_ID, TOPIC_ALIAS]);
    pub const WILL: u64 = MESSAGE | set(&[WILL_DELAY]);
    pub const ACK: u64 = set(&[REASON_STRING]);
    pub const SUBSCRIBE: u64 = set(&[SUBSCRIPTION_ID]);
    pub const UNSUBSCRIBE: u64 = set(&[]);
    pub const DISCONNECT: u64 = set(&[SESSION_EXPIRY, SERVER_REFERENCE, REASON_STRING]);
    pub const AUTH: u64 = set(&[AUTH_METHOD, AUTH_DATA, REASON_STRING]);
}

/// One property off the wire.
#[derive(Debug, Clone, Copy)]
pub(super) enum Value<'a> {
    Number(u32),
    Text(&'a str),
    Binary(&'a [u8]),
    Pair(&'a str, &'a str),
}

/// Properties that one packet may have. A megabyte holds 200,000 user properties, and no packet is decoded in steps.
pub const PROPERTIES_MAX: usize = 4096;

/// Reads the property length and hands each property that is allowed to `take`. A property twice is a protocol error
/// unless it may repeat: user properties, and subscription identifiers in a PUBLISH.
pub(super) fn read<'a>(
    r: &mut Reader<'a>,
    allowed: u64,
    mut take: impl FnMut(u8, Value<'a>) -> Result<(), CodecError>,
) -> Result<(), CodecError> {
    let length = r.varint()?;
    if length == 0 {
        return Ok(());
    }
    let mut r = Reader::new(r.take(length as usize)?);
    let mut repeatable = 1u64 << USER;
    if allowed == allowed::PUBLISH {
        repeatable |= 1 << SUBSCRIPTION_ID;
    }
    let (mut seen, mut count) = (0u64, 0);
    while !r.is_empty() {
        count += 1;
        if count > PROPERTIES_MAX {
            return Err(CodecError::TooManyProperties);
        }
        // Identifiers are variable byte integers; all that exist fit one byte.
        let id = r.varint()?;
        if id > 63 || allowed & (1 << id) == 0 {
            return Err(CodecError::Malformed("a property that this packet cannot carry"));
        }
        if seen & !repeatable & (1 << id) != 0 {
            return Err(CodecError::Protocol("a property twice"));
        }
        seen |= 1 << id;
        let id = id as u8;
        let value = match id {
            PAYLOAD_FORMAT
            | REQUEST_PROBLEM_INFO
            | REQUEST_RESPONSE_INFO
            | MAXIMUM_QOS
            | RETAIN_AVAILABLE
            | WILDCARD_AVAILABLE
            | SUBSCRIPTION_IDS_AVAILABLE
            | SHARED_AVAILABLE => match r.u8()? {
                byte @ 0..=1 => Value::Number(byte.into()),
                _ => return Err(CodecError::Protocol("a property that is neither 0 nor 1")),
            },
            SERVER_KEEP_ALIVE | TOPIC_ALIAS_MAXIMUM => Value::Number(r.u16()?.into()),
            TOPIC_ALIAS => match r.u16()? {
                0 => return Err(CodecError::TopicAlias),
                alias => Value::Number(alias.into()),
            },
            RECEIVE_MAXIMUM => Value::Number(not_zero(r.u16()?.into())?),
            MAXIMUM_PACKET_SIZE => Value::Number(not_zero(r.u32()?)?),
            SUBSCRIPTION_ID => Value::Number(not_zero(r.varint()?)?),
            MESSAGE_EXPIRY | SESSION_EXPIRY | WILL_DELAY => Value::Number(r.u32()?),
            CORRELATION_DATA | AUTH_DATA => Value::Binary(r.binary()?),
            USER => Value::Pair(r.string()?, r.string()?),
            CONTENT_TYPE | RESPONSE_TOPIC | ASSIGNED_CLIENT_ID | AUTH_METHOD | RESPONSE_INFO | SERVER_REFERENCE
            | REASON_STRING => Value::Text(r.string()?),
            _ => return Err(CodecError::Malformed("an unknown property")),
        };
        take(id, value)?;
    }
    Ok(())
}

fn not_zero(value: u32) -> Result<u32, CodecError> {
    if value == 0 { Err(CodecError::Protocol("a property that must not be 0")) } else { Ok(value) }
}

/// The properties of all packets but PUBLISH and will, whose own are [`PublishProperties`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[allow(missing_docs)] // The names are the standard's (§2.2.2.2).
pub struct Properties<'a> {
    pub subscription_id: Option<u32>,
    pub session_expiry_secs: Option<u32>,
    pub assigned_client_id: Option<&'a str>,
    pub server_keep_alive_secs: Option<u16>,
    pub authentication_method: Option<&'a str>,
    pub authentication_data: Option<&'a [u8]>,
    pub request_problem_information: Option<bool>,
    pub request_response_information: Option<bool>,
    pub response_information: Option<&'a str>,
    pub server_reference: Option<&'a str>,
    pub reason_string: Option<&'a str>,
    pub receive_maximum: Option<u16>,
    pub topic_alias_maximum: Option<u16>,
    pub maximum_qos: Option<QoS>,
    pub retain_available: Option<bool>,
    pub maximum_packet_size: Option<u32>,
    pub wildcard_subscription_available: Option<bool>,
    pub subscription_identifiers_available: Option<bool>,
    pub shared_subscription_available: Option<bool>,
    pub user: Vec<(&'a str, &'a str)>,
}

impl<'a> Properties<'a> {
    pub(super) fn read(r: &mut Reader<'a>, allowed: u64) -> Result<Self, CodecError> {
        let mut all = Self::default();
        read(r, allowed, |id, value| {
            all.take(id, value);
            Ok(())
        })?;
        // §3.1.2.11.10: data without a method means nothing.
        if all.authentication_data.is_some() && all.authentication_method.is_none() {
            return Err(CodecError::Protocol("authentication data without a method"));
        }
        Ok(all)
    }

    /// Reads the properties of a packet that seldom has any.
    pub(super) fn read_boxed(r: &mut Reader<'a>, allowed: u64) -> Result<Option<Box<Self>>, CodecError> {
        if r.rest().first() == Some(&0) {
            r.u8()?;
            return Ok(None);
        }
        Self::read(r, allowed).map(|properties| Some(Box::new(properties)))
    }

    fn take(&mut self, id: u8, value: Value<'a>) {
        match (id, value) {
            (SUBSCRIPTION_ID, Value::Number(n)) => self.subscription_id = Some(n),
            (SESSION_EXPIRY, Value::Number(n)) => self.session_expiry_secs = Some(n),
            (ASSIGNED_CLIENT_ID, Value::Text(s)) => self.assigned_client_id = Some(s),
            (SERVER_KEEP_ALIVE, Value::Number(n)) => self.server_keep_alive_secs = Some(n as u16),
            (AUTH_METHOD, Value::Text(s)) => self.authentication_method = Some(s),
            (AUTH_DATA, Value::Binary(b)) => self.authentication_data = Some(b),
            (REQUEST_PROBLEM_INFO, Value::Number(n)) => self.request_problem_information = Some(n == 1),
            (REQUEST_RESPONSE_INFO, Value::Number(n)) => self.request_response_information = Some(n == 1),
            (RESPONSE_INFO, Value::Text(s)) => self.response_information = Some(s),
            (SERVER_REFERENCE, Value::Text(s)) => self.server_reference = Some(s),
            (REASON_STRING, Value::Text(s)) => self.reason_string = Some(s),
            (RECEIVE_MAXIMUM, Value::Number(n)) => self.receive_maximum = Some(n as u16),
            (TOPIC_ALIAS_MAXIMUM, Value::Number(n)) => self.topic_alias_maximum = Some(n as u16),
            (MAXIMUM_QOS, Value::Number(n)) => self.maximum_qos = QoS::from_u8(n as u8),
            (RETAIN_AVAILABLE, Value::Number(n)) => self.retain_available = Some(n == 1),
            (MAXIMUM_PACKET_SIZE, Value::Number(n)) => self.maximum_packet_size = Some(n),
            (WILDCARD_AVAILABLE, Value::Number(n)) => self.wildcard_subscription_available = Some(n == 1),
            (SUBSCRIPTION_IDS_AVAILABLE, Value::Number(n)) => self.subscription_identifiers_available = Some(n == 1),
            (SHARED_AVAILABLE, Value::Number(n)) => self.shared_subscription_available = Some(n == 1),
            (USER, Value::Pair(name, value)) => self.user.push((name, value)),
            _ => {}
        }
    }

    /// Writes property length and properties.
    pub(super) fn write(&self, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        write_block(out, |out| {
            if let Some(n) = self.subscription_id {
                out.push(SUBSCRIPTION_ID);
                put_remaining_length(out, n as usize);
            }
            put_number4(out, SESSION_EXPIRY, self.session_expiry_secs);
            put_text(out, ASSIGNED_CLIENT_ID, self.assigned_client_id)?;
            put_number2(out, SERVER_KEEP_ALIVE, self.server_keep_alive_secs);
            put_text(out, AUTH_METHOD, self.authentication_method)?;
            put_binary(out, AUTH_DATA, self.authentication_data)?;
            put_flag(out, REQUEST_PROBLEM_INFO, self.request_problem_information);
            put_flag(out, REQUEST_RESPONSE_INFO, self.request_response_information);
            put_text(out, RESPONSE_INFO, self.response_information)?;
            put_text(out, SERVER_REFERENCE, self.server_reference)?;
            put_text(out, REASON_STRING, self.reason_string)?;
            put_number2(out, RECEIVE_MAXIMUM, self.receive_maximum);
            put_number2(out, TOPIC_ALIAS_MAXIMUM, self.topic_alias_maximum);
            put_flag(out, MAXIMUM_QOS, self.maximum_qos.map(|qos| qos > QoS::AtMostOnce));
            put_flag(out, RETAIN_AVAILABLE, self.retain_available);
            put_number4(out, MAXIMUM_PACKET_SIZE, self.maximum_packet_size);
            put_flag(out, WILDCARD_AVAILABLE, self.wildcard_subscription_available);
            put_flag(out, SUBSCRIPTION_IDS_AVAILABLE, self.subscription_identifiers_available);
            put_flag(out, SHARED_AVAILABLE, self.shared_subscription_available);
            put_user(out, &self.user)
        })
    }
}

impl<'a> PublishProperties<'a> {
    pub(super) fn take(&mut self, id: u8, value: Value<'a>) {
        match (id, value) {
            (PAYLOAD_FORMAT, Value::Number(n)) => self.payload_is_utf8 = Some(n == 1),
            (MESSAGE_EXPIRY, Value::Number(n)) => self.expiry_secs = Some(n),
            (CONTENT_TYPE, Value::Text(s)) => self.content_type = Some(s),
            (RESPONSE_TOPIC, Value::Text(s)) => self.response_topic = Some(s),
            (CORRELATION_DATA, Value::Binary(b)) => self.correlation_data = Some(b),
            (USER, Value::Pair(name, value)) => self.user.push((name, value)),
            _ => {}
        }
    }

    /// Bytes on the wire, without their length.
    pub fn bytes(&self) -> usize {
        let text = |length: Option<usize>| length.map_or(0, |length| length + 3);
        self.payload_is_utf8.map_or(0, |_| 2)
            + self.expiry_secs.map_or(0, |_| 5)
            + text(self.content_type.map(str::len))
            + text(self.response_topic.map(str::len))
            + text(self.correlation_data.map(<[u8]>::len))
            + self.user.iter().map(|(name, value)| name.len() + value.len() + 5).sum::<usize>()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.payload_is_utf8.is_none()
            && self.expiry_secs.is_none()
            && self.content_type.is_none()
            && self.response_topic.is_none()
            && self.correlation_data.is_none()
            && self.user.is_empty()
    }

    /// Writes the properties without their length.
    pub(super) fn write(&self, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        put_flag(out, PAYLOAD_FORMAT, self.payload_is_utf8);
        put_number4(out, MESSAGE_EXPIRY, self.expiry_secs);
        put_text(out, CONTENT_TYPE, self.content_type)?;
        put_text(out, RESPONSE_TOPIC, self.response_topic)?;
        put_binary(out, CORRELATION_DATA, self.correlation_data)?;
        put_user(out, &self.user)
    }
}

/// Reads what [`super::encode_properties_and_payload`] wrote: the body of a PUBLISH from its properties on. It may come from a disk, so
/// it is checked like a packet.
pub fn decode_properties_and_payload(bytes: &[u8]) -> Result<(PublishProperties<'_>, &[u8]), CodecError> {
    let mut r = Reader::new(bytes);
    let mut properties = PublishProperties::default();
    read(&mut r, allowed::MESSAGE, |id, value| {
        properties.take(id, value);
        Ok(())
    })?;
    Ok((properties, r.rest()))
}

/// Writes a property block: its length, then what `write` appends.
pub(super) fn write_block(
    out: &mut Vec<u8>,
    write: impl FnOnce(&mut Vec<u8>) -> Result<(), EncodeError>,
) -> Result<(), EncodeError> {
    let start = out.len();
    write(out)?;
    let length = out.len() - start;
    if length > super::REMAINING_LENGTH_MAX {
        return Err(EncodeError::PacketTooLong);
    }
    // The length stands before the properties and is seldom longer than one byte: move them rather than write twice.
    let mut prefix = Vec::with_capacity(4);
    put_remaining_length(&mut prefix, length);
    out.splice(start..start, prefix);
    Ok(())
}

fn put_flag(out: &mut Vec<u8>, id: u8, value: Option<bool>) {
    if let Some(value) = value {
        out.extend_from_slice(&[id, value.into()]);
    }
}

pub(super) fn put_number2(out: &mut Vec<u8>, id: u8, value: Option<u16>) {
    if let Some(value) = value {
        out.push(id);
        put_u16(out, value);
    }
}

pub(super) fn put_number4(out: &mut Vec<u8>, id: u8, value: Option<u32>) {
    if let Some(value) = value {
        out.push(id);
        put_u32(out, value);
    }
}

fn put_text(out: &mut Vec<u8>, id: u8, value: Option<&str>) -> Result<(), EncodeError> {
    put_binary(out, id, value.map(str::as_bytes))
}

fn put_binary(out: &mut Vec<u8>, id: u8, value: Option<&[u8]>) -> Result<(), EncodeError> {
    if let Some(value) = value {
        out.push(id);
        super::encode::put_field(out, value)?;
    }
    Ok(())
}

fn put_user(out: &mut Vec<u8>, user: &[(&str, &str)]) -> Result<(), EncodeError> {
    for (name, value) in user {
        out.push(USER);
        super::encode::put_field(out, name.as_bytes())?;
        super::encode::put_field(out, value.as_bytes())?;
    }
    Ok(())
}
