//! Just enough MQTT to play devices and to read what passes on a wire. Written apart from the product's codec on purpose:
//! a mistake there must not cancel out here.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// One control packet: its first byte (type and flags) and what follows the remaining length.
#[derive(Debug, Clone)]
pub struct Frame {
    pub first: u8,
    pub body: Bytes,
}

pub const CONNECT: u8 = 1;
pub const CONNACK: u8 = 2;
pub const PUBLISH: u8 = 3;
pub const PUBACK: u8 = 4;
pub const PUBREC: u8 = 5;
pub const PUBREL: u8 = 6;
pub const PUBCOMP: u8 = 7;
pub const SUBACK: u8 = 9;
pub const DISCONNECT: u8 = 14;

impl Frame {
    pub fn kind(&self) -> u8 {
        self.first >> 4
    }

    /// The first two bytes of the body: the packet identifier of acknowledgements.
    pub fn packet_id(&self) -> Option<u16> {
        self.body.get(..2).map(|b| u16::from_be_bytes([b[0], b[1]]))
    }

    /// Reason code of PUBACK, PUBREC, PUBREL and PUBCOMP; 3.1.1 has none, which means success.
    pub fn reason(&self) -> u8 {
        self.body.get(2).copied().unwrap_or(0)
    }
}

/// Takes one whole packet off the front of `buffer`; `None` until more bytes have come. A length of more than four bytes
/// is nonsense and reads as a packet of type 0.
pub fn take_frame(buffer: &mut BytesMut) -> Option<Frame> {
    let first = *buffer.first()?;
    let (length, used) = match varint(&buffer[1..]) {
        Varint::Whole { value, used } => (value, used),
        Varint::Short => return None,
        Varint::Bad => return Some(Frame { first: 0, body: buffer.split().freeze() }),
    };
    let head = 1 + used;
    if buffer.len() < head + length {
        return None;
    }
    let mut packet = buffer.split_to(head + length).freeze();
    packet.advance(head);
    Some(Frame { first, body: packet })
}

enum Varint {
    Whole { value: usize, used: usize },
    Short,
    Bad,
}

fn varint(bytes: &[u8]) -> Varint {
    let mut value = 0;
    for (i, byte) in bytes.iter().take(4).enumerate() {
        value |= usize::from(byte & 0x7f) << (7 * i);
        if byte & 0x80 == 0 {
            return Varint::Whole { value, used: i + 1 };
        }
    }
    if bytes.len() < 4 { Varint::Short } else { Varint::Bad }
}

/// A PUBLISH seen on a wire.
#[derive(Debug, Clone)]
pub struct SeenPublish {
    pub qos: u8,
    pub duplicate: bool,
    pub packet_id: Option<u16>,
    pub payload: Bytes,
}

/// Reads a PUBLISH; `v5` says whether it has properties.
pub fn read_publish(frame: &Frame, v5: bool) -> Option<SeenPublish> {
    let mut body = frame.body.clone();
    let qos = (frame.first >> 1) & 3;
    let topic_length = usize::from(body.get(..2).map(|b| u16::from_be_bytes([b[0], b[1]]))?);
    body = body.get(2 + topic_length..).map(|b| frame.body.slice_ref(b))?;
    let mut packet_id = None;
    if qos > 0 {
        packet_id = Some(u16::from_be_bytes([*body.first()?, *body.get(1)?]));
        body.advance(2);
    }
    if v5 {
        let Varint::Whole { value, used } = varint(&body) else { return None };
        if body.len() < value + used {
            return None;
        }
        body.advance(value + used);
    }
    Some(SeenPublish { qos, duplicate: frame.first & 8 != 0, packet_id, payload: body })
}

/// What a CONNECT asks for.
#[derive(Debug, Clone)]
pub struct SeenConnect {
    pub v5: bool,
    pub clean: bool,
    pub client_id: String,
}

pub fn read_connect(frame: &Frame) -> Option<SeenConnect> {
    let body = &frame.body;
    // Protocol name (2 + 4), level, flags, keep-alive (2).
    let level = *body.get(6)?;
    let flags = *body.get(7)?;
    let mut at = 10;
    if level == 5 {
        let Varint::Whole { value, used } = varint(body.get(at..)?) else { return None };
        at += value + used;
    }
    let length = usize::from(u16::from_be_bytes([*body.get(at)?, *body.get(at + 1)?]));
    let id = body.get(at + 2..at + 2 + length)?;
    Some(SeenConnect { v5: level == 5, clean: flags & 2 != 0, client_id: String::from_utf8_lossy(id).into_owned() })
}

pub fn put_text(out: &mut BytesMut, text: &str) {
    out.put_u16(text.len() as u16);
    out.put_slice(text.as_bytes());
}

pub fn put_varint(out: &mut BytesMut, mut value: usize) {
    loop {
        let low = (value & 0x7f) as u8;
        value >>= 7;
        out.put_u8(if value > 0 { low | 0x80 } else { low });
        if value == 0 {
            return;
        }
    }
}

pub fn put_packet(out: &mut BytesMut, first: u8, body: &[u8]) {
    out.put_u8(first);
    put_varint(out, body.len());
    out.put_slice(body);
}

/// CONNECT without keep-alive. In MQTT 5 a session that is not clean also never expires.
pub fn connect(out: &mut BytesMut, client_id: &str, v5: bool, clean: bool) {
    let mut body = BytesMut::new();
    put_text(&mut body, "MQTT");
    body.put_u8(if v5 { 5 } else { 4 });
    body.put_u8(if clean { 2 } else { 0 });
    body.put_u16(0);
    if v5 {
        if clean {
            body.put_u8(0);
        } else {
            body.put_slice(&[5, 0x11, 0xff, 0xff, 0xff, 0xff]);
        }
    }
    put_text(&mut body, client_id);
    put_packet(out, CONNECT << 4, &body);
}

/// What a PUBLISH is made of.
pub struct PublishParts<'a> {
    pub topic: &'a str,
    pub payload: &'a [u8],
    pub qos: u8,
    pub retain: bool,
    pub duplicate: bool,
    pub packet_id: u16,
    /// User properties of MQTT 5; `None` means 3.1.1.
    pub user: Option<&'a [(String, String)]>,
}

pub fn publish(out: &mut BytesMut, parts: &PublishParts<'_>) {
    let mut body = BytesMut::with_capacity(parts.payload.len() + parts.topic.len() + 16);
    put_text(&mut body, parts.topic);
    if parts.qos > 0 {
        body.put_u16(parts.packet_id);
    }
    if let Some(user) = parts.user {
        let mut properties = BytesMut::new();
        for (name, value) in user {
            properties.put_u8(0x26);
            put_text(&mut properties, name);
            put_text(&mut properties, value);
        }
        put_varint(&mut body, properties.len());
        body.put_slice(&properties);
    }
    body.put_slice(parts.payload);
    let flags = (u8::from(parts.duplicate) << 3) | (parts.qos << 1) | u8::from(parts.retain);
    put_packet(out, (PUBLISH << 4) | flags, &body);
}

/// PUBREL, as both versions write it when all is well.
pub fn pubrel(out: &mut BytesMut, packet_id: u16) {
    put_packet(out, (PUBREL << 4) | 2, &packet_id.to_be_bytes());
}

/// PUBACK, PUBREC or PUBCOMP.
pub fn acknowledge(out: &mut BytesMut, kind: u8, packet_id: u16) {
    put_packet(out, kind << 4, &packet_id.to_be_bytes());
}

/// SUBSCRIBE to one filter.
pub fn subscribe(out: &mut BytesMut, packet_id: u16, filter: &str, qos: u8, v5: bool) {
    let mut body = BytesMut::new();
    body.put_u16(packet_id);
    if v5 {
        body.put_u8(0);
    }
    put_text(&mut body, filter);
    body.put_u8(qos);
    put_packet(out, (8 << 4) | 2, &body);
}

pub fn disconnect(out: &mut BytesMut) {
    out.put_slice(&[DISCONNECT << 4, 0]);
}

pub fn pingreq(out: &mut BytesMut) {
    out.put_slice(&[0xc0, 0]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes_of_mqtt_3_1_1() {
        let mut out = BytesMut::new();
        connect(&mut out, "ab", false, false);
        assert_eq!(&out[..], b"\x10\x0e\0\x04MQTT\x04\0\0\0\0\x02ab");
        out.clear();
        let parts = PublishParts {
            topic: "a/b",
            payload: b"hi",
            qos: 1,
            retain: false,
            duplicate: true,
            packet_id: 9,
            user: None,
        };
        publish(&mut out, &parts);
        assert_eq!(&out[..], b"\x3a\x09\0\x03a/b\0\x09hi");
    }

    #[test]
    fn a_publish_is_read_back_whatever_the_cut() {
        let user = vec![("k".to_owned(), "v".to_owned())];
        let payload = vec![7_u8; 300];
        let parts = PublishParts {
            topic: "t",
            payload: &payload,
            qos: 2,
            retain: false,
            duplicate: false,
            packet_id: 513,
            user: Some(&user),
        };
        let mut whole = BytesMut::new();
        publish(&mut whole, &parts);
        for cut in 0..whole.len() {
            assert!(take_frame(&mut BytesMut::from(&whole[..cut])).is_none(), "cut at {cut}");
        }
        let frame = take_frame(&mut whole).expect("whole");
        let seen = read_publish(&frame, true).expect("a publish");
        assert_eq!((seen.qos, seen.packet_id, &seen.payload[..]), (2, Some(513), &payload[..]));
    }

    #[test]
    fn a_connect_is_read_back() {
        for (v5, clean) in [(false, true), (false, false), (true, true), (true, false)] {
            let mut out = BytesMut::new();
            connect(&mut out, "dev-1", v5, clean);
            let seen = read_connect(&take_frame(&mut out).expect("whole")).expect("a connect");
            assert_eq!((seen.v5, seen.clean, seen.client_id.as_str()), (v5, clean, "dev-1"));
        }
    }
}
