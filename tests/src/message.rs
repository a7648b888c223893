//! The messages of a test: each says who it is, and all of its bytes follow from that.

use crate::lab::Rng;

/// Which message: device and sequence number from 0.
pub type Id = (u32, u32);

/// One message to publish.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    pub id: Id,
    pub qos: u8,
    pub topic: String,
    pub payload: Vec<u8>,
    /// MQTT 5 user properties; none for 3.1.1 devices.
    pub user: Vec<(String, String)>,
}

/// How a device's payloads look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Alphabet {
    /// Any byte.
    Binary,
    /// Printable, one line: for tools that read lines.
    Text,
}

impl Message {
    /// Message `seq` of `device`. QoS follows from the numbers: of 20 messages 3 at QoS 0, 9 at QoS 1, 8 at QoS 2,
    /// unless `qos` says otherwise. Lengths are mostly small, now and then several KiB.
    pub fn new(id: Id, alphabet: Alphabet, qos: Option<u8>, v5: bool) -> Self {
        let (device, seq) = id;
        let mut rng = Rng((u64::from(device) << 32) | u64::from(seq));
        let qos = qos.unwrap_or(match rng.below(20) {
            0..=2 => 0,
            3..=11 => 1,
            _ => 2,
        });
        let length = match rng.below(50) {
            0 => rng.below(6_000),
            1..=10 => rng.below(900),
            _ => rng.below(120),
        };
        let mut payload = format!("trib/{device}/{seq}/{qos}/").into_bytes();
        payload.extend((0..length).map(|_| match alphabet {
            Alphabet::Binary => rng.next() as u8,
            Alphabet::Text => b"0123456789abcdefghijklmnopqrstuvwxyz"[rng.below(36) as usize],
        }));
        let user =
            if v5 { vec![("seq".into(), seq.to_string()), ("seq".into(), format!("again-{seq}"))] } else { Vec::new() };
        Self { id, qos, topic: topic(device), payload, user }
    }
}

/// Where a device publishes.
pub fn topic(device: u32) -> String {
    format!("factory/line-{}/telemetry/dev-{device:02}", device % 3)
}

/// Which message a payload claims to be.
pub fn id_of(payload: &[u8]) -> Option<Id> {
    let mut parts = payload.splitn(5, |b| *b == b'/');
    if parts.next()? != b"trib" {
        return None;
    }
    let mut number = || std::str::from_utf8(parts.next()?).ok()?.parse().ok();
    Some((number()?, number()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_names_its_message() {
        for seq in 0..200 {
            let message = Message::new((7, seq), Alphabet::Binary, None, true);
            assert_eq!(id_of(&message.payload), Some((7, seq)));
            assert_eq!(message, Message::new((7, seq), Alphabet::Binary, None, true));
        }
        assert_eq!(id_of(b"trib/1"), None);
        assert_eq!(id_of(b"hello/1/2/3/"), None);
    }
}
