//! A message between publisher and subscriber: written once, sent to many.

use crate::codec::{
    CodecError, EncodeError, QoS, REMAINING_LENGTH_MAX, Version, decode_properties_and_payload,
    encode_properties_and_payload,
};
use crate::store::{Publish, PublishProperties, StoredRetained};

/// What a PUBLISH carries, whoever it goes to. Borrowed from a read buffer or from a [`Message`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Content<'a> {
    pub topic: &'a [u8],
    /// MQTT 5 properties that outlive the hop, encoded, without their length.
    pub properties: &'a [u8],
    /// Where in `properties` the four bytes of the message expiry stand.
    pub expiry_at: Option<usize>,
    pub payload: &'a [u8],
}

/// How one PUBLISH to one subscriber differs from the others of its message.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Envelope<'a> {
    pub version: Version,
    pub qos: QoS,
    pub dup: bool,
    pub retain: bool,
    /// Used when `qos` is above 0.
    pub packet_id: u16,
    pub subscription_ids: &'a [u32],
    /// Seconds left; `None` leaves what the publisher said.
    pub expiry_secs: Option<u32>,
}

impl Content<'_> {
    /// Bytes of it all.
    pub fn bytes(&self) -> usize {
        self.topic.len() + self.properties.len() + self.payload.len()
    }

    fn properties_bytes(&self, envelope: &Envelope<'_>) -> usize {
        let ids: usize = envelope.subscription_ids.iter().map(|&id| 1 + varint_bytes(id as usize)).sum();
        self.properties.len() + ids
    }

    fn remaining_bytes(&self, envelope: &Envelope<'_>) -> usize {
        let id = if envelope.qos > QoS::AtMostOnce { 2 } else { 0 };
        let properties = match envelope.version {
            Version::V4 => 0,
            Version::V5 => {
                let bytes = self.properties_bytes(envelope);
                varint_bytes(bytes) + bytes
            }
        };
        2 + self.topic.len() + id + properties + self.payload.len()
    }

    /// Bytes of a [`Message`] with this content.
    pub fn cost(&self) -> usize {
        self.bytes() + std::mem::size_of::<Message>()
    }

    /// The whole packet's length.
    pub fn packet_bytes(&self, envelope: &Envelope<'_>) -> usize {
        let remaining = self.remaining_bytes(envelope);
        1 + varint_bytes(remaining) + remaining
    }

    /// Appends the PUBLISH. The caller has checked [`Self::packet_bytes`] against the subscriber's maximum.
    pub fn append(&self, envelope: &Envelope<'_>, out: &mut Vec<u8>) {
        let remaining = self.remaining_bytes(envelope);
        out.reserve(remaining + 5);
        out.push(0x30 | u8::from(envelope.dup) << 3 | (envelope.qos as u8) << 1 | u8::from(envelope.retain));
        put_varint(out, remaining);
        out.extend_from_slice(&(self.topic.len() as u16).to_be_bytes());
        out.extend_from_slice(self.topic);
        if envelope.qos > QoS::AtMostOnce {
            out.extend_from_slice(&envelope.packet_id.to_be_bytes());
        }
        if envelope.version == Version::V5 {
            put_varint(out, self.properties_bytes(envelope));
            for &id in envelope.subscription_ids {
                out.push(0x0B);
                put_varint(out, id as usize);
            }
            let start = out.len();
            out.extend_from_slice(self.properties);
            if let (Some(at), Some(secs)) = (self.expiry_at, envelope.expiry_secs)
                && let Some(field) = out.get_mut(start + at..start + at + 4)
            {
                field.copy_from_slice(&secs.to_be_bytes());
            }
        }
        out.extend_from_slice(self.payload);
    }
}

/// Encodes the properties of a PUBLISH that outlive the hop behind `arena`'s end, and tells where the expiry stands in them.
pub(crate) fn encode_properties(
    properties: &PublishProperties<'_>,
    arena: &mut Vec<u8>,
) -> Result<Option<usize>, EncodeError> {
    let start = arena.len();
    let mut block = Vec::new();
    encode_properties_and_payload(properties, &[], &mut block)?;
    let length = decode_properties_length(&block);
    arena.extend_from_slice(&block[length..]);
    // The encoder writes the payload format first (2 bytes), then the expiry: its identifier and 4 bytes.
    let expiry_at = properties.expiry_secs.map(|_| if properties.payload_is_utf8.is_some() { 3 } else { 1 });
    debug_assert!(expiry_at.is_none_or(|at| arena.get(start + at - 1) == Some(&0x02)));
    Ok(expiry_at)
}

fn decode_properties_length(block: &[u8]) -> usize {
    block.iter().position(|byte| byte & 0x80 == 0).map_or(block.len(), |at| at + 1)
}

/// A message that must be remembered: retained, queued, or in flight to a kept session.
#[derive(Debug)]
pub(crate) struct Message {
    /// Topic, properties, payload.
    bytes: Box<[u8]>,
    topic_end: usize,
    properties_end: usize,
    expiry_at: Option<usize>,
    expiry_secs: Option<u32>,
    /// Monotonic milliseconds of the front, so that a clock that jumps expires nothing.
    arrived_ms: i64,
    pub qos: QoS,
}

impl Message {
    pub fn new(content: &Content<'_>, expiry_secs: Option<u32>, qos: QoS, arrived_ms: i64) -> Self {
        let bytes = [content.topic, content.properties, content.payload].concat().into_boxed_slice();
        let topic_end = content.topic.len();
        Self {
            bytes,
            topic_end,
            properties_end: topic_end + content.properties.len(),
            expiry_at: content.expiry_at,
            expiry_secs,
            arrived_ms,
            qos,
        }
    }

    /// From a PUBLISH that is not in a read buffer: a will, or one of the broker's own.
    pub fn from_publish(publish: &Publish<'_>, arrived_ms: i64) -> Result<Self, EncodeError> {
        let mut properties = Vec::new();
        let expiry_at = encode_properties(&publish.properties, &mut properties)?;
        let content =
            Content { topic: publish.topic.as_bytes(), properties: &properties, expiry_at, payload: publish.payload };
        let qos = QoS::from_u8(publish.qos).unwrap_or_default();
        Ok(Self::new(&content, publish.properties.expiry_secs, qos, arrived_ms))
    }

    /// From disk, where anything may stand.
    pub fn from_stored(stored: &StoredRetained, now_ms: i64, wall_ms: i64) -> Result<Self, CodecError> {
        crate::topic::check_name(&stored.topic)?;
        let (properties, payload) = decode_properties_and_payload(&stored.properties_and_payload)?;
        let publish = Publish {
            topic: &stored.topic,
            payload,
            qos: QoS::from_u8(stored.qos).ok_or(CodecError::Malformed("QoS above 2"))? as u8,
            retain: true,
            packet_id: None,
            now_ms: stored.stored_ms,
            properties,
        };
        let age_ms = wall_ms.saturating_sub(stored.stored_ms).max(0);
        Self::from_publish(&publish, now_ms.saturating_sub(age_ms))
            .map_err(|_| CodecError::Malformed("a stored message is too long"))
    }

    pub fn content(&self) -> Content<'_> {
        let (topic, rest) = self.bytes.split_at(self.topic_end);
        let (properties, payload) = rest.split_at(self.properties_end - self.topic_end);
        Content { topic, properties, expiry_at: self.expiry_at, payload }
    }

    /// Bytes it occupies, roughly.
    pub fn cost(&self) -> usize {
        self.bytes.len() + std::mem::size_of::<Self>()
    }

    /// Seconds until it expires, `Err` if it has (§3.3.2.3.3).
    pub fn expiry_left(&self, now_ms: i64) -> Result<Option<u32>, Expired> {
        let Some(secs) = self.expiry_secs else { return Ok(None) };
        let waited = u32::try_from(now_ms.saturating_sub(self.arrived_ms).max(0) / 1000).unwrap_or(u32::MAX);
        match secs.checked_sub(waited) {
            Some(0) | None => Err(Expired),
            left => Ok(left),
        }
    }
}

/// The message's time is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Expired;

fn varint_bytes(value: usize) -> usize {
    match value {
        0..=0x7F => 1,
        0x80..=0x3FFF => 2,
        0x4000..=0x1F_FFFF => 3,
        _ => 4,
    }
}

fn put_varint(out: &mut Vec<u8>, mut value: usize) {
    debug_assert!(value <= REMAINING_LENGTH_MAX);
    while value > 0x7F {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{Packet, Split, split};

    #[test]
    fn a_message_reads_back_as_the_codec_says() {
        let properties = PublishProperties {
            payload_is_utf8: Some(true),
            expiry_secs: Some(60),
            content_type: Some("text/plain"),
            user: vec![("a", "1"), ("a", "2")],
            ..PublishProperties::default()
        };
        let publish = Publish {
            topic: "t/x",
            payload: b"hello",
            qos: 1,
            retain: true,
            packet_id: None,
            now_ms: 0,
            properties: properties.clone(),
        };
        let message = Message::from_publish(&publish, 1_000).unwrap();
        assert_eq!(message.expiry_left(11_500), Ok(Some(50)));
        assert_eq!(message.expiry_left(61_000), Err(Expired));
        for version in [Version::V4, Version::V5] {
            let envelope = Envelope {
                version,
                qos: QoS::AtLeastOnce,
                dup: true,
                retain: true,
                packet_id: 7,
                subscription_ids: &[5, 300],
                expiry_secs: Some(50),
            };
            let mut out = Vec::new();
            message.content().append(&envelope, &mut out);
            assert_eq!(out.len(), message.content().packet_bytes(&envelope));
            let Ok(Split::Frame(frame)) = split(&out, Some(version), 1 << 20) else { panic!() };
            let Ok(Packet::Publish(read)) = Packet::decode(&frame, version) else { panic!() };
            assert_eq!((read.topic, read.payload, read.packet_id), ("t/x", &b"hello"[..], Some(7)));
            assert!(read.dup && read.retain);
            if version == Version::V5 {
                assert_eq!(read.subscription_ids, [5, 300]);
                assert_eq!(read.properties, PublishProperties { expiry_secs: Some(50), ..properties.clone() });
            }
        }
    }
}
