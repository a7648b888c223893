//! Frame to packet.

use super::properties::{self, Value, allowed, id};
use super::wire::Reader;
use super::*;
use crate::store::PublishProperties;
use crate::topic;

impl<'a> Packet<'a> {
    /// Reads one frame as a packet of `version`. CONNECT names its own version, whatever is given here.
    pub fn decode(frame: &Frame<'a>, version: Version) -> Result<Self, CodecError> {
        check_first_byte(frame.first)?;
        let mut r = Reader::new(frame.body);
        let r = &mut r;
        Ok(match frame.first >> 4 {
            1 => Self::Connect(Box::new(Connect::decode(r)?)),
            2 => Self::ConnAck(Box::new(conn_ack(r, version)?)),
            3 => Self::Publish(Publish::decode(frame, version)?),
            4 => Self::PubAck(ack(r, version, &PUBACK_REASONS)?),
            5 => Self::PubRec(ack(r, version, &PUBACK_REASONS)?),
            6 => Self::PubRel(ack(r, version, &[0x00, 0x92])?),
            7 => Self::PubComp(ack(r, version, &[0x00, 0x92])?),
            8 => Self::Subscribe(subscribe(r, version)?),
            9 => Self::SubAck(sub_ack(r, version)?),
            10 => Self::Unsubscribe(unsubscribe(r, version)?),
            11 => Self::UnsubAck(unsub_ack(r, version)?),
            12 => r.end().map(|()| Self::PingReq)?,
            13 => r.end().map(|()| Self::PingResp)?,
            14 => Self::Disconnect(disconnect(r, version)?),
            15 if version == Version::V5 => Self::Auth(auth(r)?),
            _ => return Err(CodecError::Malformed("packet type 15 before MQTT 5")),
        })
    }
}

impl<'a> Connect<'a> {
    fn decode(r: &mut Reader<'a>) -> Result<Self, CodecError> {
        let name = r.string()?;
        let level = r.u8()?;
        let version = match (name, level) {
            ("MQTT", 4) => Version::V4,
            ("MQTT", 5) => Version::V5,
            ("MQTT" | "MQIsdp", level) => return Err(CodecError::UnsupportedVersion(level)),
            _ => return Err(CodecError::Malformed("the protocol name is not MQTT")),
        };
        let flags = r.u8()?;
        if flags & 1 != 0 {
            return Err(CodecError::Malformed("the reserved CONNECT flag is set"));
        }
        let keep_alive_secs = r.u16()?;
        let properties = match version {
            Version::V5 => Properties::read(r, allowed::CONNECT)?,
            Version::V4 => Properties::default(),
        };
        let client_id = r.string()?;
        let will = if flags & 0x04 != 0 {
            Some(will(r, flags, version)?)
        } else if flags & 0x38 != 0 {
            return Err(CodecError::Malformed("will QoS or retain without a will"));
        } else {
            None
        };
        let username = if flags & 0x80 != 0 { Some(r.string()?) } else { None };
        if flags & 0xC0 == 0x40 && version == Version::V4 {
            return Err(CodecError::Malformed("a password without a user name")); // MQTT 3.1.1 §3.1.2.9
        }
        let password = if flags & 0x40 != 0 { Some(r.binary()?) } else { None };
        r.end()?;
        let clean_start = flags & 0x02 != 0;
        Ok(Self { version, clean_start, keep_alive_secs, client_id, will, username, password, properties })
    }
}

fn will<'a>(r: &mut Reader<'a>, flags: u8, version: Version) -> Result<Will<'a>, CodecError> {
    let qos = QoS::from_u8(flags >> 3 & 3).ok_or(CodecError::Malformed("will QoS 3"))?;
    let (mut properties, mut delay_secs) = (PublishProperties::default(), 0);
    if version == Version::V5 {
        properties::read(r, allowed::WILL, |id, value| {
            match (id, value) {
                (id::WILL_DELAY, Value::Number(n)) => delay_secs = n,
                _ => properties.take(id, value),
            }
            Ok(())
        })?;
        check_response_topic(&properties)?;
    }
    let topic = r.string()?;
    topic::check_name(topic)?;
    let payload = r.binary()?;
    Ok(Will { topic, payload, qos, retain: flags & 0x20 != 0, delay_secs, properties })
}

fn check_response_topic(properties: &PublishProperties<'_>) -> Result<(), CodecError> {
    // §3.3.2.3.5: it must not hold wildcards.
    properties.response_topic.map_or(Ok(()), topic::check_name)
}

fn conn_ack<'a>(r: &mut Reader<'a>, version: Version) -> Result<ConnAck<'a>, CodecError> {
    let flags = r.u8()?;
    if flags > 1 {
        return Err(CodecError::Malformed("reserved CONNACK flags are set"));
    }
    let reason = r.u8()?;
    let properties = match version {
        Version::V5 => {
            check_reason(reason, &CONNACK_REASONS)?;
            Properties::read(r, allowed::CONNACK)?
        }
        Version::V4 => {
            check_reason(reason, &[0, 1, 2, 3, 4, 5])?;
            Properties::default()
        }
    };
    r.end()?;
    Ok(ConnAck { session_present: flags == 1, reason: Reason(reason), properties })
}

impl<'a> Publish<'a> {
    /// Reads a PUBLISH frame; the front calls it for each message, without going through [`Packet`].
    #[inline]
    pub fn decode(frame: &Frame<'a>, version: Version) -> Result<Self, CodecError> {
        let mut r = Reader::new(frame.body);
        let qos = QoS::from_u8(frame.first >> 1 & 3).ok_or(CodecError::Malformed("QoS 3"))?;
        let topic = r.string()?;
        let packet_id = if qos == QoS::AtMostOnce { None } else { Some(r.packet_id()?) };
        let mut publish = Self {
            dup: frame.first & 0x08 != 0,
            qos,
            retain: frame.first & 0x01 != 0,
            topic,
            packet_id,
            topic_alias: None,
            subscription_ids: Vec::new(),
            properties: PublishProperties::default(),
            payload: &[],
        };
        if version == Version::V5 {
            publish.read_properties(&mut r)?;
        }
        if !topic.is_empty() {
            topic::check_name(topic)?;
        } else if version == Version::V4 {
            return Err(CodecError::TopicName);
        } else if publish.topic_alias.is_none() {
            return Err(CodecError::Protocol("a PUBLISH without topic and topic alias"));
        }
        publish.payload = r.rest();
        Ok(publish)
    }

    fn read_properties(&mut self, r: &mut Reader<'a>) -> Result<(), CodecError> {
        let Self { topic_alias, subscription_ids, properties, .. } = self;
        properties::read(r, allowed::PUBLISH, |id, value| {
            match (id, value) {
                (id::TOPIC_ALIAS, Value::Number(n)) => *topic_alias = Some(n as u16),
                (id::SUBSCRIPTION_ID, Value::Number(n)) => subscription_ids.push(n),
                _ => properties.take(id, value),
            }
            Ok(())
        })?;
        check_response_topic(properties)
    }
}

fn ack<'a>(r: &mut Reader<'a>, version: Version, reasons: &[u8]) -> Result<Ack<'a>, CodecError> {
    let mut ack = Ack::new(r.packet_id()?, Reason::SUCCESS);
    if version == Version::V5 && !r.is_empty() {
        ack.reason = Reason(check_reason(r.u8()?, reasons)?);
        if !r.is_empty() {
            ack.properties = Properties::read_boxed(r, allowed::ACK)?;
        }
    }
    r.end()?;
    Ok(ack)
}

fn subscribe<'a>(r: &mut Reader<'a>, version: Version) -> Result<Subscribe<'a>, CodecError> {
    let packet_id = r.packet_id()?;
    let properties = match version {
        Version::V5 => Properties::read(r, allowed::SUBSCRIBE)?,
        Version::V4 => Properties::default(),
    };
    let mut filters = Vec::new();
    while !r.is_empty() {
        let filter = r.string()?;
        let byte = r.u8()?;
        if version == Version::V4 && byte > 2 {
            return Err(CodecError::Malformed("reserved bits of the requested QoS are set"));
        }
        let options =
            SubscribeOptions::from_byte(byte).ok_or(CodecError::Malformed("reserved subscription options are set"))?;
        if options.no_local && filter.starts_with("$share/") {
            return Err(CodecError::Protocol("no local on a shared subscription")); // §3.8.3.1
        }
        filters.push((filter, options));
    }
    if filters.is_empty() {
        return Err(CodecError::Protocol("a SUBSCRIBE without a topic filter"));
    }
    Ok(Subscribe { packet_id, properties, filters })
}

fn sub_ack<'a>(r: &mut Reader<'a>, version: Version) -> Result<SubAck<'a>, CodecError> {
    let packet_id = r.packet_id()?;
    let (properties, known): (_, &[u8]) = match version {
        Version::V5 => (Properties::read_boxed(r, allowed::ACK)?, &SUBACK_REASONS),
        Version::V4 => (None, &[0, 1, 2, 0x80]),
    };
    let reasons = reasons(r, known)?;
    Ok(SubAck { packet_id, properties, reasons })
}

fn unsubscribe<'a>(r: &mut Reader<'a>, version: Version) -> Result<Unsubscribe<'a>, CodecError> {
    let packet_id = r.packet_id()?;
    let properties = match version {
        Version::V5 => Properties::read_boxed(r, allowed::UNSUBSCRIBE)?,
        Version::V4 => None,
    };
    let mut filters = Vec::new();
    while !r.is_empty() {
        filters.push(r.string()?);
    }
    if filters.is_empty() {
        return Err(CodecError::Protocol("an UNSUBSCRIBE without a topic filter"));
    }
    Ok(Unsubscribe { packet_id, properties, filters })
}

fn unsub_ack<'a>(r: &mut Reader<'a>, version: Version) -> Result<SubAck<'a>, CodecError> {
    let packet_id = r.packet_id()?;
    if version == Version::V4 {
        r.end()?;
        return Ok(SubAck { packet_id, ..SubAck::default() });
    }
    let properties = Properties::read_boxed(r, allowed::ACK)?;
    let reasons = reasons(r, &[0x00, 0x11, 0x80, 0x83, 0x87, 0x8F, 0x91])?;
    Ok(SubAck { packet_id, properties, reasons })
}

fn reasons(r: &mut Reader<'_>, known: &[u8]) -> Result<Vec<Reason>, CodecError> {
    if r.is_empty() {
        return Err(CodecError::Protocol("an acknowledgement without a reason code"));
    }
    r.rest().iter().map(|&code| check_reason(code, known).map(Reason)).collect()
}

fn disconnect<'a>(r: &mut Reader<'a>, version: Version) -> Result<Disconnect<'a>, CodecError> {
    if version == Version::V4 {
        r.end()?;
    }
    reason_and_properties(r, &DISCONNECT_REASONS, allowed::DISCONNECT)
}

fn auth<'a>(r: &mut Reader<'a>) -> Result<Disconnect<'a>, CodecError> {
    reason_and_properties(r, &[0x00, 0x18, 0x19], allowed::AUTH)
}

/// DISCONNECT and AUTH: the reason may be left out, and the property length too (§3.14.2.1, §3.15.2.1).
fn reason_and_properties<'a>(r: &mut Reader<'a>, reasons: &[u8], allowed: u64) -> Result<Disconnect<'a>, CodecError> {
    let mut packet = Disconnect::default();
    if !r.is_empty() {
        packet.reason = Reason(check_reason(r.u8()?, reasons)?);
        if !r.is_empty() {
            packet.properties = Properties::read_boxed(r, allowed)?;
        }
    }
    r.end()?;
    Ok(packet)
}

/// §2.4, and the table of each packet: a code that the packet cannot carry makes it malformed.
fn check_reason(code: u8, known: &[u8]) -> Result<u8, CodecError> {
    if known.contains(&code) { Ok(code) } else { Err(CodecError::Malformed("a reason code this packet cannot carry")) }
}

const CONNACK_REASONS: [u8; 22] = [
    0x00, 0x80, 0x81, 0x82, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8A, 0x8C, 0x90, 0x95, 0x97, 0x99, 0x9A, 0x9B,
    0x9C, 0x9D, 0x9F,
];
const PUBACK_REASONS: [u8; 9] = [0x00, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99];
const SUBACK_REASONS: [u8; 12] = [0x00, 0x01, 0x02, 0x80, 0x83, 0x87, 0x8F, 0x91, 0x97, 0x9E, 0xA1, 0xA2];
const DISCONNECT_REASONS: [u8; 29] = [
    0x00, 0x04, 0x80, 0x81, 0x82, 0x83, 0x87, 0x89, 0x8B, 0x8D, 0x8E, 0x8F, 0x90, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98,
    0x99, 0x9A, 0x9B, 0x9C, 0x9D, 0x9E, 0x9F, 0xA0, 0xA1, 0xA2,
];
