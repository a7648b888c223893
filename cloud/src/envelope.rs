//! The envelope: the head that each file, object and frame of the cloud begins with, and a segment ends with.
//!
//! ```text
//!  0       4         6      8        12      16
//! +-------+---------+------+--------+-------+-------------------------+
//! | magic | version | kind | length | crc   | payload, `length` bytes |
//! |       | u16     | u16  | u32    | u32   |                         |
//! +-------+---------+------+--------+-------+-------------------------+
//! ```
//! All integers big-endian. The crc is CRC-32C over the 12 bytes before it and the payload. Where bytes are good in one
//! place only, the name of that place is their *context*: the crc covers it first, and it is not stored. The head has this
//! form in every version of every format, so that a reader tells another version from damage. This module is pure and
//! knows no format.

use bytes::{Buf, BufMut, Bytes};

/// Bytes of a head.
pub const HEAD_BYTES: usize = 16;

const LENGTH_AT: usize = 8;
const CRC_AT: usize = 12;

/// What a format's heads say.
#[derive(Debug, Clone, Copy)]
pub struct EnvelopeFormat {
    /// The first bytes.
    pub magic: [u8; 4],
    /// The only version that is read, and the one that is written.
    pub version: u16,
    /// Tells payloads of one magic apart; 0 where there is one kind.
    pub kind: u16,
}

/// Why bytes are not an envelope of the format that was expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "each variant has what was expected and what was found")]
pub enum EnvelopeError {
    /// They are of another format, or of none.
    #[error("its magic is \"{}\", not \"{}\"", .found.escape_ascii(), .expected.escape_ascii())]
    Magic { expected: [u8; 4], found: [u8; 4] },
    /// Bytes are missing, or there are too many. Both counts include the head.
    #[error("it has {found} bytes, {expected} were expected")]
    Length { expected: usize, found: usize },
    /// The bytes are not those that were written.
    #[error("its checksum is {expected:08x}, that of its bytes is {found:08x}")]
    Crc { expected: u32, found: u32 },
    /// Sound, and written by another build.
    #[error(
        "it has version {found}, this build reads {expected}: use the tributary-cloud that wrote it, or a newer one"
    )]
    Version { expected: u16, found: u16 },
    /// Sound, and something else.
    #[error("it is of kind {found}, not {expected}")]
    Kind { expected: u16, found: u16 },
}

impl EnvelopeFormat {
    /// The head of `payload`, which is less than 4 GiB.
    pub fn head(&self, context: &[u8], payload: &[u8]) -> Vec<u8> {
        let mut head = Vec::with_capacity(HEAD_BYTES);
        head.put_slice(&self.magic);
        head.put_u16(self.version);
        head.put_u16(self.kind);
        // A wrong length would be found by the reader, when the bytes that this payload replaces are gone.
        head.put_u32(u32::try_from(payload.len()).expect("a payload is less than 4 GiB"));
        let crc = checksum(context, &head, payload);
        head.put_u32(crc);
        head
    }

    /// Head and payload.
    pub fn seal(&self, payload: &[u8]) -> Bytes {
        [&self.head(&[], payload), payload].concat().into()
    }

    /// Whether `payload` is what `head` says.
    pub fn check(&self, head: &[u8], context: &[u8], payload: &[u8]) -> Result<(), EnvelopeError> {
        if head.len() != HEAD_BYTES {
            return Err(EnvelopeError::Length { expected: HEAD_BYTES, found: head.len() });
        }
        let mut fields = head;
        let mut magic = [0; 4];
        fields.copy_to_slice(&mut magic);
        let (version, kind, length, crc) = (fields.get_u16(), fields.get_u16(), fields.get_u32(), fields.get_u32());
        if magic != self.magic {
            return Err(EnvelopeError::Magic { expected: self.magic, found: magic });
        }
        if length as usize != payload.len() {
            let expected = HEAD_BYTES.saturating_add(length as usize);
            return Err(EnvelopeError::Length { expected, found: HEAD_BYTES + payload.len() });
        }
        let found = checksum(context, &head[..CRC_AT], payload);
        if crc != found {
            return Err(EnvelopeError::Crc { expected: crc, found });
        }
        // Not before the checksum: a flipped bit is no other version.
        if version != self.version {
            return Err(EnvelopeError::Version { expected: self.version, found: version });
        }
        if kind != self.kind {
            return Err(EnvelopeError::Kind { expected: self.kind, found: kind });
        }
        Ok(())
    }

    /// The payload of the envelope that `bytes` are, all of them.
    pub fn open<'a>(&self, bytes: &'a [u8]) -> Result<&'a [u8], EnvelopeError> {
        let (head, payload) = bytes.split_at(bytes.len().min(HEAD_BYTES));
        self.check(head, &[], payload)?;
        Ok(payload)
    }

    /// The payload of the envelope that `bytes` begin with.
    pub fn open_first<'a>(&self, bytes: &'a [u8]) -> Result<&'a [u8], EnvelopeError> {
        let end = HEAD_BYTES.saturating_add(field(bytes, LENGTH_AT) as usize);
        self.open(&bytes[..end.min(bytes.len())])
    }
}

/// The checksum that the envelope says it has; 0 of less than a head.
pub fn crc(envelope: &[u8]) -> u32 {
    field(envelope, CRC_AT)
}

fn field(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|bytes| bytes.first_chunk()).map_or(0, |bytes| u32::from_be_bytes(*bytes))
}

fn checksum(context: &[u8], head: &[u8], payload: &[u8]) -> u32 {
    [context, head, payload].into_iter().fold(0, crc32c::crc32c_append)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FORMAT: EnvelopeFormat = EnvelopeFormat { magic: *b"TRXX", version: 3, kind: 2 };

    #[test]
    fn golden_bytes() {
        let hex: String = FORMAT.seal(b"payload").iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "5452585800030002000000075e8aa9bc7061796c6f6164");
    }

    #[test]
    fn what_is_wrong_is_named() {
        let check = |bytes: &[u8], text: &str| assert_eq!(FORMAT.open(bytes).unwrap_err().to_string(), text);
        let good = FORMAT.seal(b"payload");
        let other = EnvelopeFormat { magic: *b"TR\0Y", version: 4, kind: 1 };
        check(&other.seal(b"payload"), "its magic is \"TR\\x00Y\", not \"TRXX\"");
        check(&good[..15], "it has 15 bytes, 16 were expected");
        check(&good[..20], "it has 20 bytes, 23 were expected");
        check(&[&good[..], b"x"].concat(), "it has 24 bytes, 23 were expected");
        check(&EnvelopeFormat { kind: 1, ..FORMAT }.seal(b"payload"), "it is of kind 1, not 2");
        let text = "it has version 4, this build reads 3: use the tributary-cloud that wrote it, or a newer one";
        check(&EnvelopeFormat { magic: FORMAT.magic, ..other }.seal(b"more"), text);
        let mut flipped = good.to_vec();
        flipped[5] ^= 7;
        // It is no other version, though it says so.
        check(&flipped, "its checksum is 5e8aa9bc, that of its bytes is f772759f");
    }

    proptest! {
        #[test]
        fn what_was_sealed_is_opened_and_a_flipped_bit_is_found(
            payload in proptest::collection::vec(any::<u8>(), 0..100),
            context in proptest::collection::vec(any::<u8>(), 0..9),
            bit in any::<proptest::sample::Index>(),
        ) {
            let mut bytes = FORMAT.seal(&payload).to_vec();
            prop_assert_eq!(FORMAT.open(&bytes), Ok(&payload[..]));
            let longer = [&bytes[..], b"more"].concat();
            prop_assert_eq!(FORMAT.open_first(&longer), Ok(&payload[..]));
            prop_assert!(FORMAT.open(&longer).is_err());
            let head = FORMAT.head(&context, &payload);
            prop_assert_eq!(FORMAT.check(&head, &context, &payload), Ok(()));
            prop_assert!(FORMAT.check(&head, &[&context[..], b"x"].concat(), &payload).is_err());
            let bit = bit.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(FORMAT.open(&bytes).is_err() && FORMAT.open_first(&bytes).is_err());
        }

        #[test]
        fn any_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..40), ours: bool) {
            if let Some(magic) = bytes.first_chunk_mut().filter(|_| ours) {
                *magic = FORMAT.magic;
            }
            prop_assert!(FORMAT.open(&bytes).is_err() && FORMAT.open_first(&bytes).is_err());
            crc(&bytes);
        }
    }
}
