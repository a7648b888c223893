//! Packet to bytes, both directions: tests and bridges are clients.

use super::properties::{id, put_number2, write_block};
use super::wire::{put_remaining_length, put_u16};
use super::*;
use crate::store::PublishProperties;

/// Why a packet cannot be put into bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// A string or binary field beyond 65,535 bytes.
    #[error("a field of {0} bytes: 65,535 is the most")]
    FieldTooLong(usize),
    /// A packet beyond [`REMAINING_LENGTH_MAX`].
    #[error("the packet is longer than 268,435,455 bytes")]
    PacketTooLong,
    /// QoS above 0 without a packet identifier.
    #[error("a PUBLISH with QoS 1 or 2 needs a packet identifier")]
    NoPacketId,
}

pub(super) fn put_field(out: &mut Vec<u8>, bytes: &[u8]) -> Result<(), EncodeError> {
    let length = u16::try_from(bytes.len()).map_err(|_| EncodeError::FieldTooLong(bytes.len()))?;
    put_u16(out, length);
    out.extend_from_slice(bytes);
    Ok(())
}

/// The body of an MQTT 5 PUBLISH from its properties on: property length, properties, payload. It is how a retained
/// message rests ([`crate::store::StoredRetained`]).
pub fn encode_properties_and_payload(
    properties: &PublishProperties<'_>,
    payload: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), EncodeError> {
    if properties.is_empty() {
        out.push(0);
    } else {
        write_block(out, |out| properties.write(out))?;
    }
    out.extend_from_slice(payload);
    Ok(())
}

impl Packet<'_> {
    /// Appends the packet's bytes for `version`. On an error `out` is as it was.
    pub fn encode(&self, version: Version, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        let start = out.len();
        let result = self.encode_frame(version, out);
        if result.is_err() {
            out.truncate(start);
        }
        result
    }

    fn encode_frame(&self, version: Version, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        match self {
            Self::Connect(connect) => frame(out, 0x10, |out| connect.encode(out)),
            Self::ConnAck(ack) => frame(out, 0x20, |out| {
                out.extend_from_slice(&[ack.session_present.into(), ack.reason.0]);
                if version == Version::V5 { ack.properties.write(out) } else { Ok(()) }
            }),
            Self::Publish(publish) => publish.encode(version, out),
            Self::PubAck(a) => ack(out, 0x40, a, version),
            Self::PubRec(a) => ack(out, 0x50, a, version),
            Self::PubRel(a) => ack(out, 0x62, a, version),
            Self::PubComp(a) => ack(out, 0x70, a, version),
            Self::Subscribe(subscribe) => frame(out, 0x82, |out| {
                put_u16(out, subscribe.packet_id);
                if version == Version::V5 {
                    subscribe.properties.write(out)?;
                }
                for (filter, options) in &subscribe.filters {
                    put_field(out, filter.as_bytes())?;
                    out.push(if version == Version::V5 { options.byte() } else { options.qos as u8 });
                }
                Ok(())
            }),
            Self::SubAck(a) => sub_ack(out, 0x90, a, version, true),
            Self::Unsubscribe(unsubscribe) => frame(out, 0xA2, |out| {
                put_u16(out, unsubscribe.packet_id);
                if version == Version::V5 {
                    put_properties(out, &unsubscribe.properties)?;
                }
                unsubscribe.filters.iter().try_for_each(|filter| put_field(out, filter.as_bytes()))
            }),
            Self::UnsubAck(a) => sub_ack(out, 0xB0, a, version, version == Version::V5),
            Self::PingReq => frame(out, 0xC0, |_| Ok(())),
            Self::PingResp => frame(out, 0xD0, |_| Ok(())),
            Self::Disconnect(d) if version == Version::V4 => {
                let _ = d; // 3.1.1 has no reason.
                frame(out, 0xE0, |_| Ok(()))
            }
            Self::Disconnect(d) => reason_and_properties(out, 0xE0, d),
            Self::Auth(a) => reason_and_properties(out, 0xF0, a),
        }
    }
}

/// Writes a fixed header and the body that `body` appends.
fn frame(
    out: &mut Vec<u8>,
    first: u8,
    body: impl FnOnce(&mut Vec<u8>) -> Result<(), EncodeError>,
) -> Result<(), EncodeError> {
    out.push(first);
    write_block(out, body)
}

fn put_properties(out: &mut Vec<u8>, properties: &Option<Box<Properties<'_>>>) -> Result<(), EncodeError> {
    match properties {
        Some(properties) => properties.write(out),
        None => {
            out.push(0);
            Ok(())
        }
    }
}

fn ack(out: &mut Vec<u8>, first: u8, ack: &Ack<'_>, version: Version) -> Result<(), EncodeError> {
    let [high, low] = ack.packet_id.to_be_bytes();
    if version == Version::V4 || (ack.reason == Reason::SUCCESS && ack.properties.is_none()) {
        out.extend_from_slice(&[first, 2, high, low]);
        return Ok(());
    }
    frame(out, first, |out| {
        out.extend_from_slice(&[high, low, ack.reason.0]);
        if ack.properties.is_some() { put_properties(out, &ack.properties) } else { Ok(()) }
    })
}

fn sub_ack(out: &mut Vec<u8>, first: u8, ack: &SubAck<'_>, version: Version, reasons: bool) -> Result<(), EncodeError> {
    frame(out, first, |out| {
        put_u16(out, ack.packet_id);
        if version == Version::V5 {
            put_properties(out, &ack.properties)?;
        }
        if reasons {
            out.extend(ack.reasons.iter().map(|reason| reason.0));
        }
        Ok(())
    })
}

fn reason_and_properties(out: &mut Vec<u8>, first: u8, packet: &Disconnect<'_>) -> Result<(), EncodeError> {
    frame(out, first, |out| {
        if packet.reason != Reason::SUCCESS || packet.properties.is_some() {
            out.push(packet.reason.0);
        }
        if packet.properties.is_some() { put_properties(out, &packet.properties) } else { Ok(()) }
    })
}

impl Connect<'_> {
    fn encode(&self, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        put_field(out, b"MQTT")?;
        let mut flags = u8::from(self.clean_start) << 1;
        if let Some(will) = &self.will {
            flags |= 0x04 | (will.qos as u8) << 3 | u8::from(will.retain) << 5;
        }
        flags |= u8::from(self.username.is_some()) << 7 | u8::from(self.password.is_some()) << 6;
        out.extend_from_slice(&[if self.version == Version::V5 { 5 } else { 4 }, flags]);
        put_u16(out, self.keep_alive_secs);
        if self.version == Version::V5 {
            self.properties.write(out)?;
        }
        put_field(out, self.client_id.as_bytes())?;
        if let Some(will) = &self.will {
            if self.version == Version::V5 {
                write_block(out, |out| {
                    if will.delay_secs > 0 {
                        super::properties::put_number4(out, id::WILL_DELAY, Some(will.delay_secs));
                    }
                    will.properties.write(out)
                })?;
            }
            put_field(out, will.topic.as_bytes())?;
            put_field(out, will.payload)?;
        }
        if let Some(username) = self.username {
            put_field(out, username.as_bytes())?;
        }
        if let Some(password) = self.password {
            put_field(out, password)?;
        }
        Ok(())
    }
}

impl Publish<'_> {
    fn encode(&self, version: Version, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        let first = 0x30 | u8::from(self.dup) << 3 | (self.qos as u8) << 1 | u8::from(self.retain);
        frame(out, first, |out| {
            put_field(out, self.topic.as_bytes())?;
            if self.qos > QoS::AtMostOnce {
                put_u16(out, self.packet_id.ok_or(EncodeError::NoPacketId)?);
            }
            if version == Version::V5 {
                write_block(out, |out| {
                    put_number2(out, id::TOPIC_ALIAS, self.topic_alias);
                    for &n in &self.subscription_ids {
                        out.push(id::SUBSCRIPTION_ID);
                        put_remaining_length(out, n as usize);
                    }
                    self.properties.write(out)
                })?;
            }
            out.extend_from_slice(self.payload);
            Ok(())
        })
    }
}
